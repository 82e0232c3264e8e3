//! Many subscribers of one run, and many subscriptions to which nothing happens.

use std::fs;

use cloister_tests::TestApp;
use cloister_tests::client::Ws;
use hdrhistogram::Histogram;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::load::{histogram, milliseconds, note, ok};
use crate::model::{Model, now};
use crate::platform::{Database, Platform, start_request};
use crate::results::{Results, Row, shown};
use crate::wire::Connection;

/// Tokens of the run that is watched, and the milliseconds between them.
const DELTAS: usize = 50;
const GAP_MS: usize = 200;

const EVENTS: &str = "subscription ($run: ID!) { runEvents(runId: $run) {
    ... on TextDelta { offset text }
    ... on RunItemAdded { item { sequence ... on MessageItem { role text } ... on StatusItem { status } } }
} }";

/// What one subscriber was told.
#[derive(PartialEq, Eq, Debug)]
struct Told {
    /// The sequences of the items.
    items: Vec<i64>,
    /// The deltas' text, put together.
    streamed: String,
    /// The answer's text as the stored item has it.
    stored: String,
}

/// Two thousand subscribers of one run, over WebSockets.
pub async fn watch(results: &Results) {
    let count = results.pick(2_000, 200);
    let model = Model::start();
    let platform = Platform::start(Database::Postgres, &model).await;
    warm(&platform).await;
    let before = memory(&platform.app);
    let mut sockets = open(&platform, count).await;
    // Time enough for all to subscribe before the first token.
    let message = format!("Hello wait=8000 deltas={DELTAS} gap={GAP_MS} ");
    let start = start_request(&platform.tenant.key, &platform.agent, &message);
    let mut connection = Connection::open(platform.address()).await.expect("the server listens");
    let started: Value = serde_json::from_str(&ok(connection.exchange(&start).await)).expect("JSON");
    let run = started["data"]["startRun"]["run"]["id"].clone();
    for socket in &mut sockets {
        socket.subscribe("1", EVENTS, json!({"run": run})).await;
    }
    let mut tasks = JoinSet::new();
    for socket in sockets {
        tasks.spawn(told(socket));
    }
    let mut peak = before;
    let mut lags = histogram();
    let mut everyone = Vec::new();
    while let Some(joined) = tasks.join_next().await {
        if everyone.is_empty() {
            peak = memory(&platform.app);
        }
        let (told, lag) = joined.expect("a subscriber does not panic");
        lags.add(lag).expect("histograms of the same bounds");
        everyone.push(told);
    }
    let first = &everyone[0];
    assert!(!first.stored.is_empty() && first.streamed == first.stored, "the text was not streamed whole: {first:?}");
    let gapless = (1..=first.items.len() as i64).collect::<Vec<_>>();
    assert_eq!(first.items, gapless, "items are missing or repeated");
    let same = everyone.iter().filter(|told| *told == first).count();
    let kibibytes = peak.saturating_sub(before) as f64 / count as f64;
    results.add(
        Row::new("subscribers")
            .cell("Subscribers", shown(count as f64))
            .cell("Told everything", shown(same as f64))
            .cell("Lag: p50, ms", shown(milliseconds(&lags, 0.5)))
            .cell("p99, ms", shown(milliseconds(&lags, 0.99)))
            .cell("Memory each, KiB", shown(kibibytes))
            .figures(json!({"p99": milliseconds(&lags, 0.99), "kibibytes": kibibytes, "told": same})),
    );
}

/// A thousand WebSockets, each with a subscription to which nothing happens.
pub async fn idle(results: &Results) {
    let count = results.pick(1_000, 200);
    let model = Model::start();
    for database in Database::ALL {
        let platform = Platform::start(database, &model).await;
        warm(&platform).await;
        let before = memory(&platform.app);
        let mut sockets = open(&platform, count).await;
        for socket in &mut sockets {
            socket.subscribe("1", "subscription { runs { id status } }", json!({})).await;
            // The answer to a ping says that what came before it was taken up.
            socket.send(&json!({"type": "ping"})).await;
            assert_eq!(socket.next().await.message(), &json!({"type": "pong"}));
        }
        let kibibytes = memory(&platform.app).saturating_sub(before) as f64 / count as f64;
        results.add(
            Row::new("idle")
                .cell("Database", database.name())
                .cell("Subscriptions", shown(count as f64))
                .cell("Memory each, KiB", shown(kibibytes))
                .cell("Server before, MiB", shown(before as f64 / 1024.0))
                .figures(json!({"kibibytes": kibibytes, "before": before})),
        );
    }
}

/// A run and a few subscriptions first, so that what is made once is there.
async fn warm(platform: &Platform) {
    let mut connection = Connection::open(platform.address()).await.expect("the server listens");
    for _ in 0..100 {
        ok(connection.exchange(&platform.run_request("Hello")).await);
    }
    drop(open(platform, 10).await);
}

async fn open(platform: &Platform, count: usize) -> Vec<Ws> {
    let mut sockets = Vec::with_capacity(count);
    for _ in 0..count {
        sockets.push(platform.tenant.client.ws_ready().await);
    }
    sockets
}

/// Listens to the run's end. A delta's lag is from its leaving the provider to its arrival here.
async fn told(mut socket: Ws) -> (Told, Histogram<u64>) {
    let mut told = Told { items: Vec::new(), streamed: String::new(), stored: String::new() };
    let mut lags = histogram();
    loop {
        let event = socket.next().await;
        let (received, message) = (now(), event.message());
        if message["type"] == "complete" {
            return (told, lags);
        }
        let event = &message["payload"]["data"]["runEvents"];
        if let Some(text) = event["text"].as_str() {
            // The first text has the call's arrival before the time it left.
            let skipped = usize::from(!text.starts_with(' '));
            let sent = text.split(' ').filter(|stamp| !stamp.is_empty()).skip(skipped);
            sent.filter_map(|sent| sent.parse().ok())
                .for_each(|sent: u64| note(&mut lags, received.saturating_sub(sent)));
            told.streamed.push_str(text);
        } else {
            let item = &event["item"];
            told.items.extend(item["sequence"].as_i64());
            if item["role"] == "ASSISTANT" {
                told.stored = item["text"].as_str().unwrap_or_default().to_owned();
            }
        }
    }
}

/// The server's resident memory, in KiB.
fn memory(app: &TestApp) -> u64 {
    let pid = app.pid().expect("the server is running");
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the server's status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kibibytes = line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse().ok());
    kibibytes.expect("the server's resident memory")
}
