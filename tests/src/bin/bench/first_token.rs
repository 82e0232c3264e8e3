//! What the platform adds to the time until the first token, and to each token after it, with 32 streams at once.
//!
//! The model server says in each delta when the call arrived and when the delta left, on the clock that is also the
//! client's. So what is measured leaves out the provider's own time, whose timer is too coarse to be subtracted.

use std::net::SocketAddr;
use std::time::Duration;

use cloister_tests::Client;
use cloister_tests::client::http;
use futures_util::StreamExt;
use hdrhistogram::Histogram;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::load::{histogram, milliseconds, note, ok};
use crate::model::{Model, now};
use crate::platform::{Database, Platform, start_request};
use crate::results::{Results, Row, shown};
use crate::wire::Connection;

const STREAMS: usize = 32;

/// The provider's time to its first token. It lets the client subscribe before there is anything to tell.
const WAIT_MS: u64 = 200;

/// Rounds before those that count: connections are opened, caches filled.
const WARM_UP: usize = 3;

const MESSAGE: &str = "Hello wait=200 deltas=4 gap=20 ";

const EVENTS: &str = "subscription ($run: ID!) {
    runEvents(runId: $run) {
        ... on TextDelta { offset text }
        ... on RunItemAdded { item { ... on StatusItem { status } } }
    }
}";

/// Times of many streams, in microseconds.
struct Times {
    /// From the client's request to the call's arrival at the provider.
    there: Histogram<u64>,
    /// From the first token's leaving the provider to its arrival at the client.
    back: Histogram<u64>,
    /// Both, a stream at a time: what was added to its first token.
    added: Histogram<u64>,
    /// As `back`, of the tokens after the first.
    later: Histogram<u64>,
}

impl Times {
    fn new() -> Times {
        Times { there: histogram(), back: histogram(), added: histogram(), later: histogram() }
    }

    /// Notes a delta: `ARRIVED SENT` for the first, ` SENT` for another. Deltas may come together.
    fn delta(&mut self, begun: u64, text: &str) {
        let received = now();
        let stamps: Vec<u64> = text.split(' ').filter_map(|stamp| stamp.parse().ok()).collect();
        if text.starts_with(' ') {
            stamps.iter().for_each(|sent| note(&mut self.later, received.saturating_sub(*sent)));
        } else if let [arrived, sent, ..] = stamps[..] {
            let (there, back) = (arrived.saturating_sub(begun), received.saturating_sub(sent));
            note(&mut self.there, there);
            note(&mut self.back, back);
            note(&mut self.added, there + back);
        }
    }

    fn add(&mut self, other: &Times) {
        let parts = [(&mut self.there, &other.there), (&mut self.back, &other.back)];
        for (into, from) in parts.into_iter().chain([(&mut self.added, &other.added), (&mut self.later, &other.later)])
        {
            into.add(from).expect("histograms of the same bounds");
        }
    }

    /// Tokens that took from 35 to 50 ms: where Nagle's algorithm and delayed acknowledgements meet.
    fn near_40_ms(&self) -> u64 {
        [&self.back, &self.later].iter().map(|times| times.count_between(35_000, 50_000)).sum()
    }
}

/// What streams go through.
#[derive(Clone)]
enum Way {
    /// Nothing: the client calls the provider.
    Direct { http: reqwest::Client, url: String },
    /// `startRun`, then `runEvents` over server-sent events.
    Platform { client: Client, address: SocketAddr, start: Vec<u8> },
}

impl Way {
    fn through(platform: &Platform) -> Way {
        let start = start_request(&platform.tenant.key, &platform.agent, MESSAGE);
        Way::Platform { client: platform.tenant.client.clone(), address: platform.address(), start }
    }

    /// Runs `rounds` streams one after the other, [`STREAMS`] times at once.
    async fn times(&self, rounds: usize) -> Times {
        let mut tasks = JoinSet::new();
        for at in 0..STREAMS as u64 {
            let way = self.clone();
            tasks.spawn(async move {
                // Spread over the time that one takes, rather than all in step.
                tokio::time::sleep(Duration::from_millis(at * WAIT_MS / STREAMS as u64)).await;
                way.streams(rounds).await
            });
        }
        let mut all = Times::new();
        while let Some(times) = tasks.join_next().await {
            all.add(&times.expect("a stream does not panic"));
        }
        all
    }

    async fn streams(&self, rounds: usize) -> Times {
        let mut times = Times::new();
        match self {
            Way::Direct { http, url } => {
                for _ in 0..rounds {
                    direct(http, url, &mut times).await;
                }
            }
            Way::Platform { client, address, start } => {
                let mut connection = Connection::open(*address).await.expect("the server listens");
                for _ in 0..rounds {
                    let begun = now();
                    let started: Value = serde_json::from_str(&ok(connection.exchange(start).await)).expect("JSON");
                    follow(client, &started["data"]["startRun"]["run"]["id"], begun, &mut times).await;
                }
            }
        }
        times
    }
}

/// One stream from the provider itself.
async fn direct(http: &reqwest::Client, url: &str, times: &mut Times) {
    let body = json!({"model": "scripted-1", "stream": true, "messages": [{"role": "user", "content": MESSAGE}]});
    let begun = now();
    let response = http.post(format!("{url}/chat/completions")).json(&body).send().await.expect("the provider answers");
    let mut chunks = response.bytes_stream();
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.expect("the stream goes on");
        // The provider sends each event by itself; only those with text are asked for.
        for event in String::from_utf8_lossy(&chunk).split("data: ") {
            let event: Value = serde_json::from_str(event.trim()).unwrap_or_default();
            let text = event["choices"][0]["delta"]["content"].as_str().unwrap_or_default();
            times.delta(begun, text);
        }
    }
}

/// One run, watched to its end.
async fn follow(client: &Client, run: &Value, begun: u64, times: &mut Times) {
    let mut events = client.subscribe_sse(EVENTS, json!({"run": run})).await;
    while let Some(event) = events.next_result().await {
        times.delta(begun, event["data"]["runEvents"]["text"].as_str().unwrap_or_default());
    }
}

/// Measures the provider called directly, and the platform on both databases.
pub async fn measure(results: &Results) {
    let model = Model::start();
    let rounds = results.pick(60, 8);
    let direct = Way::Direct { http: http(), url: model.url() };
    direct.times(WARM_UP).await;
    row(results, "none: direct calls", &direct.times(rounds).await, "");
    for database in Database::ALL {
        let platform = Platform::start(database, &model).await;
        let way = Way::through(&platform);
        way.times(WARM_UP).await;
        row(results, database.name(), &way.times(rounds).await, "2 ms");
    }
}

fn row(results: &Results, database: &str, times: &Times, goal: &str) {
    let p50 = milliseconds(&times.added, 0.5);
    let p99 = milliseconds(&times.added, 0.99);
    results.add(
        Row::new("first-token")
            .cell("Database", database)
            .cell("Added: p50, ms", shown(p50))
            .cell("p99, ms", shown(p99))
            .cell("To the provider: p99", shown(milliseconds(&times.there, 0.99)))
            .cell("Back: p99", shown(milliseconds(&times.back, 0.99)))
            .cell("Later tokens: p99", shown(milliseconds(&times.later, 0.99)))
            .cell("From 35 to 50 ms", format!("{} of {}", times.near_40_ms(), times.back.len() + times.later.len()))
            .cell("Goal, p99", goal)
            .figures(json!({"p50": p50, "p99": p99, "streams": times.added.len()})),
    );
}
