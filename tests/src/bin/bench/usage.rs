//! A month's `usage` with ten thousand and with a million records: it is read from counters and totals, so that it
//! must take the same.

use std::net::SocketAddr;
use std::time::Instant;

use chrono::{DateTime, Datelike, Duration, Utc};
use cloister_tests::Tenant;
use entity::{TenantOwned, agents, quota_counters, usage_totals};
use hdrhistogram::Histogram;
use sea_orm::{ConnectionTrait, DatabaseConnection, DbBackend, EntityTrait, Set, Statement, Value as SqlValue};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::load::{histogram, median, milliseconds, ok, range};
use crate::model::Model;
use crate::platform::{Database, Platform, agent, graphql_request};
use crate::results::{Results, Row, shown};
use crate::wire::Connection;

/// Agents whose calls a tenant's records are.
const AGENTS: usize = 4;

/// Of each record.
const INPUT_TOKENS: i64 = 20;
const OUTPUT_TOKENS: i64 = 10;
const COST: i64 = 40_000;

const USAGE: &str = "{ usage { totalTokens totalCost requestCount
    byDay { date usage { totalTokens cost } }
    byModel { model usage { totalTokens cost } }
    byAgent { version usage { totalTokens cost } }
} }";

/// Measures both databases.
pub async fn measure(results: &Results) {
    for database in Database::ALL {
        let model = Model::start();
        let platform = Platform::start(database, &model).await;
        let (few, _) = platform.neighbour().await;
        let (few_records, many_records) = (results.pick(10_000, 1_000), results.pick(1_000_000, 20_000));
        let db = platform.app.database().await;
        let few_records = fill(&db, &few, few_records).await;
        let many_records = fill(&db, &platform.tenant, many_records).await;
        if database == Database::Postgres {
            db.execute_unprepared("ANALYZE").await.expect("ANALYZE");
        }
        let (few, many) = (Asked::of(&few, few_records), Asked::of(&platform.tenant, many_records));
        let (mut of_few, mut of_many) = (Vec::new(), Vec::new());
        for pair in 0..results.pairs() {
            let order = if pair % 2 == 0 { [false, true] } else { [true, false] };
            for is_many in order {
                let (asked, times) = if is_many { (&many, &mut of_many) } else { (&few, &mut of_few) };
                let latency = asked.times(platform.address(), results.pick(500, 100)).await;
                times.push((milliseconds(&latency, 0.5), milliseconds(&latency, 0.99)));
            }
        }
        let ratios: Vec<f64> = of_many.iter().zip(&of_few).map(|(many, few)| many.0 / few.0).collect();
        let (low, high) = range(&ratios);
        let p50 = |times: &[(f64, f64)]| shown(median(&times.iter().map(|times| times.0).collect::<Vec<_>>()));
        let p99 = |times: &[(f64, f64)]| shown(median(&times.iter().map(|times| times.1).collect::<Vec<_>>()));
        results.add(
            Row::new("usage")
                .cell("Database", database.name())
                .cell("Records", format!("{} and {}", shown(few_records as f64), shown(many_records as f64)))
                .cell("Few: p50, ms", p50(&of_few))
                .cell("p99, ms", p99(&of_few))
                .cell("Many: p50, ms", p50(&of_many))
                .cell("p99 of many, ms", p99(&of_many))
                .cell("Ratio of p50", format!("{}× ({} to {})", shown(median(&ratios)), shown(low), shown(high)))
                .cell("Goal", "2×")
                .figures(json!({"few": of_few, "many": of_many, "ratios": ratios})),
        );
    }
}

/// A tenant that asks for its usage, and the records it has.
struct Asked {
    request: Vec<u8>,
    records: i64,
}

impl Asked {
    fn of(tenant: &Tenant, records: i64) -> Asked {
        Asked { request: graphql_request(&tenant.key, USAGE, &json!({})), records }
    }

    /// Asks `count` times, after a warm-up, one question after the other.
    async fn times(&self, address: SocketAddr, count: usize) -> Histogram<u64> {
        let mut connection = Connection::open(address).await.expect("the server listens");
        let mut latency = histogram();
        for at in 0..count + 50 {
            let sent = Instant::now();
            let answer = ok(connection.exchange(&self.request).await);
            let elapsed = sent.elapsed();
            if at < 50 {
                self.check(&answer);
            } else {
                latency.saturating_record(u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX).max(1));
            }
        }
        latency
    }

    /// What was written is what is read.
    fn check(&self, answer: &str) {
        let answer: Value = serde_json::from_str(answer).expect("JSON");
        let usage = &answer["data"]["usage"];
        let tokens = self.records * (INPUT_TOKENS + OUTPUT_TOKENS);
        assert_eq!((&usage["requestCount"], &usage["totalTokens"]), (&json!(self.records), &json!(tokens)), "{answer}");
    }
}

/// Writes about so many records of this month's days for a tenant, with the totals and the counter that go with
/// them; returns how many.
async fn fill(db: &DatabaseConnection, tenant: &Tenant, records: i64) -> i64 {
    for _ in 1..AGENTS {
        agent(&tenant.client).await;
    }
    let tenant_id = uuid(&tenant.id);
    let agents = agents::Entity::in_tenant(tenant_id).all(db).await.expect("the tenant's agents");
    let days = days_so_far();
    let count = records / (days.len() * agents.len()) as i64;
    for day in &days {
        for agent in &agents {
            insert_records(db, tenant_id, agent.id, *day, count).await;
            let totals = usage_totals::ActiveModel {
                tenant_id: Set(tenant_id),
                day: Set(day.format("%Y-%m-%d").to_string()),
                agent_id: Set(agent.id),
                agent_version: Set(1),
                model: Set("scripted".to_owned()),
                key_id: Set(Uuid::nil()),
                requests: Set(count),
                estimated_requests: Set(0),
                input_tokens: Set(count * INPUT_TOKENS),
                cache_read_tokens: Set(0),
                cache_write_tokens: Set(0),
                output_tokens: Set(count * OUTPUT_TOKENS),
                reasoning_tokens: Set(0),
                cost: Set(count * COST),
            };
            usage_totals::Entity::insert(totals).exec_without_returning(db).await.expect("the day's totals");
        }
    }
    let records = count * (days.len() * agents.len()) as i64;
    let counter = quota_counters::ActiveModel {
        tenant_id: Set(tenant_id),
        scope: Set(quota_counters::Scope::Tenant),
        scope_id: Set(tenant_id),
        period: Set(days[0].format("%Y-%m").to_string()),
        used: Set(records * (INPUT_TOKENS + OUTPUT_TOKENS)),
        reserved: Set(0),
    };
    quota_counters::Entity::insert(counter).exec_without_returning(db).await.expect("the month's counter");
    records
}

async fn insert_records(db: &DatabaseConnection, tenant: Uuid, agent: Uuid, day: DateTime<Utc>, count: i64) {
    let backend = db.get_database_backend();
    let id = if backend == DbBackend::Postgres { "gen_random_uuid()" } else { "randomblob(16)" };
    let sql = format!(
        "WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < $1)
         INSERT INTO usage_records (call_id, created_at, tenant_id, attempt, agent_id, agent_version, agent_path, model,
             price_id, input_tokens, cache_read_tokens, cache_write_tokens, output_tokens, reasoning_tokens, cost,
             estimated)
         SELECT {id}, $2, $3, 1, $4, 1, '', 'scripted', $3, {INPUT_TOKENS}, 0, 0, {OUTPUT_TOKENS}, 0, {COST}, false
         FROM numbers"
    );
    let values: [SqlValue; 4] = [count.into(), day.into(), tenant.into(), agent.into()];
    db.execute_raw(Statement::from_sql_and_values(backend, sql, values)).await.expect("the records");
}

/// A moment of each day of this month, today's included.
#[expect(clippy::disallowed_methods, reason = "there is no App here; days are exact enough")]
fn days_so_far() -> Vec<DateTime<Utc>> {
    let now = Utc::now();
    let month = now.month();
    let mut days: Vec<_> =
        (0..31).map(|ago| now - Duration::days(ago)).take_while(|day| day.month() == month).collect();
    days.reverse();
    days
}

/// The id in the database behind one that a client is given.
fn uuid(id: &str) -> Uuid {
    const DIGITS: &str = "0123456789abcdefghjkmnpqrstvwxyz";
    let digits = id.rsplit('_').next().unwrap_or_default().chars().filter_map(|digit| DIGITS.find(digit));
    Uuid::from_u128(digits.fold(0, |value, digit| (value << 5) | digit as u128))
}
