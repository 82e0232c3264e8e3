//! Whole runs a second: 64 clients, one model call each, Cloister and the article's stack by turns.

use std::time::Duration;

use serde_json::json;

use crate::load::{Load, closed_loop, median, milliseconds, range};
use crate::model::Model;
use crate::peers::Article;
use crate::platform::{Database, Platform};
use crate::results::{Results, Row, shown};

const CLIENTS: usize = 64;

/// Cloister against its peer, on both databases.
pub async fn measure(results: &Results) {
    for database in Database::ALL {
        against_peer(results, database).await;
    }
}

async fn against_peer(results: &Results, database: Database) {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for pair in 0..results.pairs() {
        // ABBA: what drifts meanwhile does not always fall on the same one.
        if pair % 2 == 0 {
            ours.push(platform(results, database).await);
            theirs.push(article(results, database).await);
        } else {
            theirs.push(article(results, database).await);
            ours.push(platform(results, database).await);
        }
    }
    let each = |loads: &[Load], figure: fn(&Load) -> f64| loads.iter().map(figure).collect::<Vec<_>>();
    let middle = |loads: &[Load], figure: fn(&Load) -> f64| shown(median(&each(loads, figure)));
    let p99 = |load: &Load| milliseconds(&load.latency, 0.99);
    let ratios: Vec<f64> = ours.iter().zip(&theirs).map(|(ours, theirs)| ours.rate / theirs.rate).collect();
    let (low, high) = range(&ratios);
    results.add(
        Row::new("runs")
            .cell("Database", database.name())
            .cell("Cloister, runs/s", middle(&ours, |load| load.rate))
            .cell("p99, ms", middle(&ours, p99))
            .cell("Processor a run, ms", middle(&ours, |load| load.cpu))
            .cell("Peer, runs/s", middle(&theirs, |load| load.rate))
            .cell("Peer's p99, ms", middle(&theirs, p99))
            .cell("Its processor a run, ms", middle(&theirs, |load| load.cpu))
            .cell("Ratio", format!("{}× ({} to {})", shown(median(&ratios)), shown(low), shown(high)))
            .cell("Goal", "20×")
            .figures(json!({
                "cloister": each(&ours, |load| load.rate), "cloister_cpu": each(&ours, |load| load.cpu),
                "peer": each(&theirs, |load| load.rate), "peer_cpu": each(&theirs, |load| load.cpu),
                "ratios": ratios,
            })),
    );
}

/// Cloister on SQLite against itself on PostgreSQL.
pub async fn writers(results: &Results) {
    let (mut sqlite, mut postgres) = (Vec::new(), Vec::new());
    for pair in 0..results.pairs() {
        let order = if pair % 2 == 0 { Database::ALL } else { [Database::Postgres, Database::Sqlite] };
        for database in order {
            let rate = platform(results, database).await.rate;
            match database {
                Database::Sqlite => sqlite.push(rate),
                Database::Postgres => postgres.push(rate),
            }
        }
    }
    let ratios: Vec<f64> = sqlite.iter().zip(&postgres).map(|(sqlite, postgres)| sqlite / postgres).collect();
    let (low, high) = range(&ratios);
    results.add(
        Row::new("writers")
            .cell("SQLite, runs/s", shown(median(&sqlite)))
            .cell("PostgreSQL, runs/s", shown(median(&postgres)))
            .cell("Busy errors", "none")
            .cell("Ratio", format!("{}× ({} to {})", shown(median(&ratios)), shown(low), shown(high)))
            .cell("Goal", "0.5×")
            .figures(json!({"sqlite": sqlite, "postgres": postgres, "ratios": ratios})),
    );
}

/// A stretch of load on Cloister. Any answer but 200, and any error in its log, ends the benchmark.
async fn platform(results: &Results, database: Database) -> Load {
    let model = Model::start();
    let platform = Platform::start(database, &model).await;
    let request = platform.run_request("Hello");
    let load = closed_loop(platform.address(), &request, CLIENTS, stretch(results), model.pid()).await;
    platform.check_log();
    load
}

async fn article(results: &Results, database: Database) -> Load {
    let model = Model::start();
    let article = Article::start(database, &model).await;
    closed_loop(article.address(), &article.run_request("Hello"), CLIENTS, stretch(results), model.pid()).await
}

/// Warm-up and measured time.
fn stretch(results: &Results) -> (Duration, Duration) {
    (Duration::from_secs(2), Duration::from_secs(results.pick(10, 3)))
}
