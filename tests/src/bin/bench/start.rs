//! How soon a run starts: from the moment its request is sent until its first model call arrives at the provider.
//! That is an upper bound of the time from the run's commit to its pickup.

use std::net::SocketAddr;
use std::time::Duration;

use hdrhistogram::Histogram;
use sea_orm::{ConnectionTrait, Statement};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::load::{histogram, median, milliseconds, note, ok, range};
use crate::model::{Model, now};
use crate::platform::{Database, Limits, Platform, run_request, start_request};
use crate::results::{Results, Row, shown};
use crate::wire::Connection;

/// Runs that the noisy tenant has waiting.
const BACKLOG: usize = 10_000;

/// What the noisy tenant may run at once; the process has room for 256.
const NOISY_RUNS: u32 = 50;

/// Pickup with idle workers, on both databases.
pub async fn pickup(results: &Results) {
    for database in Database::ALL {
        let model = Model::start();
        let platform = Platform::start(database, &model).await;
        let request = platform.run_request("Hello");
        let count = results.pick(1_000, 100);
        starts(platform.address(), &request, 1, 20, Duration::ZERO).await;
        let starts = starts(platform.address(), &request, 1, count, Duration::from_millis(10)).await;
        results.add(
            Row::new("pickup")
                .cell("Database", database.name())
                .cell("p50, ms", shown(milliseconds(&starts, 0.5)))
                .cell("p99, ms", shown(milliseconds(&starts, 0.99)))
                .cell("Goal, p99", "20 ms")
                .figures(json!({"p50": milliseconds(&starts, 0.5), "p99": milliseconds(&starts, 0.99)})),
        );
    }
}

/// A tenant's starts with a neighbour that has a backlog, and alone.
pub async fn neighbour(results: &Results) {
    for database in Database::ALL {
        let (mut alone, mut beside) = (Vec::new(), Vec::new());
        for pair in 0..results.pairs() {
            let order = if pair % 2 == 0 { [false, true] } else { [true, false] };
            for is_noisy in order {
                let starts = starts_of_quiet_tenant(results, database, is_noisy).await;
                let part = if is_noisy { &mut beside } else { &mut alone };
                part.push((milliseconds(&starts, 0.5), milliseconds(&starts, 0.99)));
            }
        }
        let ratios: Vec<f64> = beside.iter().zip(&alone).map(|(beside, alone)| beside.1 / alone.1).collect();
        let (low, high) = range(&ratios);
        let middle =
            |part: &[(f64, f64)], of: fn(&(f64, f64)) -> f64| shown(median(&part.iter().map(of).collect::<Vec<_>>()));
        results.add(
            Row::new("neighbour")
                .cell("Database", database.name())
                .cell("Alone: p50, ms", middle(&alone, |part| part.0))
                .cell("p99, ms", middle(&alone, |part| part.1))
                .cell("Beside: p50, ms", middle(&beside, |part| part.0))
                .cell("p99 beside, ms", middle(&beside, |part| part.1))
                .cell("Ratio of p99", format!("{}× ({} to {})", shown(median(&ratios)), shown(low), shown(high)))
                .cell("Goal", "1.5×")
                .figures(json!({"alone": alone, "beside": beside, "ratios": ratios})),
        );
    }
}

async fn starts_of_quiet_tenant(results: &Results, database: Database, is_noisy: bool) -> Histogram<u64> {
    let model = Model::start();
    let platform = Platform::with(database, &model, Limits { runs: NOISY_RUNS }).await;
    let (quiet, agent) = platform.neighbour().await;
    let backlog = results.pick(BACKLOG, 1_000);
    if is_noisy {
        // Runs that take ten seconds: the backlog lasts, and yet runs end and are claimed all the time.
        let request = start_request(&platform.tenant.key, &platform.agent, "Hello wait=10000");
        enqueue(platform.address(), &request, backlog + NOISY_RUNS as usize).await;
    }
    let request = run_request(&quiet.key, &agent, "Hello");
    starts(platform.address(), &request, 4, 200, Duration::ZERO).await;
    let starts = starts(platform.address(), &request, 4, results.pick(2_000, 400), Duration::from_millis(2)).await;
    if is_noisy {
        let waiting = waiting(&platform).await;
        assert!(waiting >= backlog * 9 / 10, "only {waiting} runs of the noisy tenant wait still");
    }
    starts
}

/// Starts `count` runs and does not wait for them.
pub async fn enqueue(address: SocketAddr, request: &[u8], count: usize) {
    let mut tasks = JoinSet::new();
    let clients = 32;
    for client in 0..clients {
        let request = request.to_vec();
        tasks.spawn(async move {
            let mut connection = Connection::open(address).await.expect("the server listens");
            for _ in (client..count).step_by(clients) {
                let answer = ok(connection.exchange(&request).await);
                assert!(answer.contains(r#""errors":[]"#), "the run is refused: {answer}");
            }
        });
    }
    while let Some(client) = tasks.join_next().await {
        client.expect("a client does not panic");
    }
}

/// Does `count` runs with `clients` clients that pause between two, and tells how soon each started.
async fn starts(address: SocketAddr, request: &[u8], clients: usize, count: usize, pause: Duration) -> Histogram<u64> {
    let mut tasks = JoinSet::new();
    for client in 0..clients {
        let request = request.to_vec();
        tasks.spawn(async move {
            let mut connection = Connection::open(address).await.expect("the server listens");
            let mut starts = histogram();
            for _ in (client..count).step_by(clients) {
                tokio::time::sleep(pause).await;
                let sent = now();
                let answer: Value = serde_json::from_str(&ok(connection.exchange(&request).await)).expect("JSON");
                let text = answer["response"].as_str().unwrap_or_default();
                let arrived = text.split(' ').next().and_then(|arrived| arrived.parse::<u64>().ok());
                note(&mut starts, arrived.expect("when the call arrived").saturating_sub(sent));
            }
            starts
        });
    }
    let mut starts = histogram();
    while let Some(part) = tasks.join_next().await {
        starts.add(part.expect("a client does not panic")).expect("histograms of the same bounds");
    }
    starts
}

/// Runs in the queue.
async fn waiting(platform: &Platform) -> usize {
    let db = platform.app.database().await;
    let sql = "SELECT COUNT(*) AS waiting FROM runs WHERE vtime IS NOT NULL AND started_at IS NULL";
    let row = db.query_one_raw(Statement::from_string(db.get_database_backend(), sql)).await.expect("the runs");
    let waiting: i64 = row.and_then(|row| row.try_get("", "waiting").ok()).unwrap_or(0);
    usize::try_from(waiting).unwrap_or(0)
}
