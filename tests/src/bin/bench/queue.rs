//! Claim and finish a second, Cloister and graphile-worker by turns, on the same PostgreSQL.
//!
//! Cloister's no-op is a run whose own token limit leaves no room for a model call. It is claimed, its input goes into
//! its journal, its call is refused before anything is reserved, and it ends as FAILED/TOKEN_LIMIT with all that a run's
//! end writes.

use std::time::Duration;

use chrono::{DateTime, Utc};
use entity::{TenantOwned, runs};
use sea_orm::{ColumnTrait, ConnectionTrait, DatabaseConnection, PaginatorTrait, QueryFilter, QuerySelect};
use serde_json::json;

use crate::load::{median, range};
use crate::model::Model;
use crate::peers;
use crate::platform::{Database, Platform, graphql_request, start_request};
use crate::results::{Results, Row, shown};
use crate::start::enqueue;

/// graphile-worker's jobs at once: more made it slower where this was written.
const CONCURRENCY: usize = 24;

/// How long a backlog may take.
const DEADLINE: Duration = Duration::from_secs(600);

/// Measures both.
pub async fn measure(results: &Results) {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for pair in 0..results.pairs() {
        if pair % 2 == 0 {
            ours.push(platform(results).await);
            theirs.push(graphile_worker(results).await);
        } else {
            theirs.push(graphile_worker(results).await);
            ours.push(platform(results).await);
        }
    }
    let ratios: Vec<f64> = ours.iter().zip(&theirs).map(|(ours, theirs)| ours / theirs).collect();
    let (low, high) = range(&ratios);
    results.add(
        Row::new("queue")
            .cell("Database", Database::Postgres.name())
            .cell("Cloister, runs/s", shown(median(&ours)))
            .cell("graphile-worker, jobs/s", shown(median(&theirs)))
            .cell("Ratio", format!("{}× ({} to {})", shown(median(&ratios)), shown(low), shown(high)))
            .cell("Goal", "1×")
            .figures(json!({"cloister": ours, "graphile_worker": theirs, "ratios": ratios})),
    );
}

async fn graphile_worker(results: &Results) -> f64 {
    let claims = peers::graphile_worker(results.pick(20_000, 2_000), CONCURRENCY).await;
    claims.jobs as f64 / claims.seconds
}

/// Runs are queued behind one that holds the only place; then the server starts anew with room for many.
async fn platform(results: &Results) -> f64 {
    let model = Model::start();
    let mut platform = Platform::start(Database::Postgres, &model).await;
    platform.app.set_env("CLOISTER_RUNS__CONCURRENCY", "1");
    platform.app.restart().await;
    let db = platform.app.database().await;
    let holder = start_request(&platform.tenant.key, &platform.agent, "Hello wait=600000 ");
    enqueue(platform.address(), &holder, 1).await;
    let started = runs::Entity::across_tenants().filter(runs::Column::StartedAt.is_not_null());
    until(async || started.clone().count(&db).await.expect("the runs") == 1).await;

    let count = results.pick(10_000, 1_000);
    let query = "mutation ($input: StartRunInput!) { startRun(input: $input) { run { id } errors { code } } }";
    let input = json!({"input": {"agentId": platform.agent, "input": "Hello", "maxTokens": 1}});
    enqueue(platform.address(), &graphql_request(&platform.tenant.key, query, &input), count).await;
    db.execute_unprepared("VACUUM ANALYZE").await.expect("VACUUM");
    platform.app.set_env("CLOISTER_RUNS__CONCURRENCY", "256");
    platform.app.restart().await;
    let finished = runs::Entity::across_tenants().filter(runs::Column::FinishedAt.is_not_null());
    until(async || finished.clone().count(&db).await.expect("the runs") == count as u64).await;
    platform.check_log();
    count as f64 / seconds(&db).await
}

/// From the first claim of a finished run to the last finish.
async fn seconds(db: &DatabaseConnection) -> f64 {
    let times: Option<(DateTime<Utc>, DateTime<Utc>)> = runs::Entity::across_tenants()
        .filter(runs::Column::FinishedAt.is_not_null())
        .select_only()
        .column_as(runs::Column::StartedAt.min(), "first")
        .column_as(runs::Column::FinishedAt.max(), "last")
        .into_tuple()
        .one(db)
        .await
        .expect("the runs");
    let (first, last) = times.expect("runs have finished");
    (last - first).as_seconds_f64()
}

/// Waits until `condition` holds.
async fn until(mut condition: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(DEADLINE, waiting).await.expect("what is measured comes to its end");
}
