//! A subscriber that reconnects: what it has of a run, over all its connections, checked as it comes.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use cloister_tests::Client;
use cloister_tests::model_server::RecordedRequest;
use futures_util::StreamExt;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::ledger::EVENTS;

/// How long a subscriber puts up with silence: a fault may last a while.
const PATIENCE: Duration = Duration::from_secs(150);

/// What a subscriber has of a run, over all its connections.
#[derive(Default)]
pub struct Followed {
    /// The items, as they came.
    pub items: Vec<Value>,
    /// Connections that it took.
    pub connections: usize,
    /// Text of parts in progress, by turn and index.
    parts: BTreeMap<(i64, i64), String>,
    /// Parts that stood half told when a connection broke.
    torn: BTreeSet<(i64, i64)>,
    /// Messages and calls that their deltas had told whole.
    pub told_whole: usize,
}

impl Followed {
    fn cursor(&self) -> i64 {
        self.items.last().map_or(0, |item| item["sequence"].as_i64().unwrap())
    }

    fn ended(&self) -> bool {
        let status = self.items.last().map(|item| &item["status"]);
        status.is_some_and(|status| ["SUCCEEDED", "FAILED", "CANCELLED"].iter().any(|end| status == end))
    }

    fn take(&mut self, event: &Value) {
        let int = |name: &str| event[name].as_i64().unwrap_or_else(|| panic!("{event}"));
        match event["__typename"].as_str().unwrap() {
            "RunItemAdded" => self.take_item(&event["item"]),
            "TextDelta" | "ArgumentsDelta" => {
                let at = (int("turn"), int("index"));
                let offset = usize::try_from(int("offset")).unwrap();
                let part = self.parts.entry(at).or_default();
                assert!(offset <= part.len(), "a gap before {event}, after {part:?}");
                if offset == 0 {
                    self.torn.remove(&at);
                }
                part.truncate(offset);
                part.push_str(event["text"].as_str().unwrap());
            }
            "TurnRestarted" => {
                let turn = int("turn");
                self.parts.retain(|(of, _), _| *of != turn);
                self.torn.retain(|(of, _)| *of != turn);
            }
            other => panic!("an event of type {other}"),
        }
    }

    fn take_item(&mut self, item: &Value) {
        assert_eq!(item["sequence"], self.cursor() + 1, "neither a gap nor a repeat");
        let text = match item["__typename"].as_str().unwrap() {
            "MessageItem" => item["text"].as_str(),
            "ToolCallItem" => item["arguments"].as_str(),
            _ => None,
        };
        if let (Some(text), Some(turn), Some(index)) = (text, item["turn"].as_i64(), item["index"].as_i64())
            && let Some(told) = self.parts.remove(&(turn, index))
        {
            // Deltas stop, and the item brings the whole, where something of them was lost.
            assert!(text.starts_with(&told), "{told:?} of {item}");
            if !self.torn.remove(&(turn, index)) && told == text {
                self.told_whole += 1;
            }
        }
        self.items.push(item.clone());
    }

    fn connection_broke(&mut self) {
        self.torn.extend(self.parts.keys());
    }
}

/// Follows a run to its end, over as many connections as it takes, to each server in turn; counts the events.
pub async fn follow(mut clients: Vec<Client>, run: String, count: watch::Sender<usize>) -> Followed {
    let mut followed = Followed::default();
    while !followed.ended() {
        let variables = json!({"run": run, "after": followed.cursor()});
        let mut events = Client::reconnect_sse_to(&clients, EVENTS, variables).await;
        followed.connections += 1;
        let mut failed = false;
        while let Some(result) = next(&mut events, &run).await {
            failed = !result["errors"].is_null();
            if failed {
                break;
            }
            followed.take(&result["data"]["runEvents"]);
            count.send_modify(|count| *count += 1);
        }
        assert!(failed || !events.completed() || followed.ended(), "complete before the run's end");
        followed.connection_broke();
        clients.rotate_left(1);
    }
    followed
}

async fn next(events: &mut (impl StreamExt<Item = Value> + Unpin), run: &str) -> Option<Value> {
    tokio::time::timeout(PATIENCE, events.next()).await.unwrap_or_else(|_| panic!("nothing is told of {run}"))
}

/// The turn that a request asks for: one more than the answers it has seen.
pub fn turn_of(request: &RecordedRequest) -> u64 {
    1 + request.messages().iter().filter(|message| message["role"] == "assistant").count() as u64
}
