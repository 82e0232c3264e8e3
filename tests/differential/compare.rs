//! What must be equal, and the few things that need not. These, and nothing else:
//!
//! - a request's [`ALLOWED_IN_REQUESTS`];
//! - the order of a turn's outputs among the items, and of calls among the webhooks' requests: the journal has outputs
//!   as they finish. What the model is told stands in order, and the requests show it;
//! - a scenario that says `concurrent`: the order of the requests of agents that run at the same time;
//! - after a handoff that removes tools: the SDK's result forgets the turn's tools, the journal keeps everything;
//! - after an error: the SDK's exceptions don't tell of the turn that failed (some of nothing at all), nor what it cost.
//!   What the provider charged is compared with our usage instead, always.

use std::fmt::Write;

use serde_json::{Value, json};

use crate::scenario::Scenario;
use crate::script::Asked;

/// Fields of a request that may differ, each with its reason.
const ALLOWED_IN_REQUESTS: [(&str, &str); 2] = [
    ("stream", "Cloister streams every answer, so that whoever watches a run sees it at once"),
    ("stream_options", "and asks for its usage, which the SDK does only when it is told to"),
];

/// One side of a scenario.
pub struct Side {
    /// What it asked.
    pub asked: Asked,
    /// The outcome of each run.
    pub runs: Vec<Value>,
}

/// The first difference, for people; none if both sides are the same.
pub fn difference(scenario: &Scenario, ours: &Side, sdk: &Side) -> Option<String> {
    requests(scenario, ours, sdk).or_else(|| calls(ours, sdk)).or_else(|| outcomes(scenario, ours, sdk))
}

fn requests(scenario: &Scenario, ours: &Side, sdk: &Side) -> Option<String> {
    let (mut left, mut right) = (ours.asked.requests.clone(), sdk.asked.requests.clone());
    if scenario.concurrent {
        // Agents that run at the same time ask in any order; each request is known by the reply it took.
        left.sort_by_key(|(reply, _)| reply.unwrap_or(usize::MAX));
        right.sort_by_key(|(reply, _)| reply.unwrap_or(usize::MAX));
    }
    for (at, (left, right)) in left.iter().zip(&right).enumerate() {
        let (left_body, right_body) = (compared(&left.1), compared(&right.1));
        if let Some(found) = first(&left_body, &right_body, &format!("request {}", at + 1)) {
            return Some(format!("{found}\n{}", both("request", &left_body, &right_body)));
        }
        if left.0 != right.0 {
            return Some(format!("request {} took reply {:?}, the SDK's {:?}", at + 1, left.0, right.0));
        }
    }
    (left.len() != right.len()).then(|| {
        let mut text = format!("{} requests to the model, the SDK made {}", left.len(), right.len());
        let more = if left.len() > right.len() { &left[right.len()..] } else { &right[left.len()..] };
        let _ = write!(text, "; the first that only one side made: {}", pretty(&more[0].1));
        text
    })
}

/// A request without what may differ.
fn compared(body: &Value) -> Value {
    let mut body = body.clone();
    if let Some(fields) = body.as_object_mut() {
        fields.retain(|name, _| ALLOWED_IN_REQUESTS.iter().all(|(allowed, _)| allowed != name));
    }
    body
}

/// Tools that run at the same time are reached in any order.
fn calls(ours: &Side, sdk: &Side) -> Option<String> {
    let sorted = |side: &Side| {
        let mut calls = side.asked.calls.clone();
        calls.sort();
        json!(calls)
    };
    first(&sorted(ours), &sorted(sdk), "calls of webhooks")
}

fn outcomes(scenario: &Scenario, ours: &Side, sdk: &Side) -> Option<String> {
    for (at, (left, right)) in ours.runs.iter().zip(&sdk.runs).enumerate() {
        let (mut left, mut right) = (left.clone(), right.clone());
        let items = in_order(&without_filtered(scenario, &left["items"]).into());
        left["items"] =
            if right["error"].is_null() { items.into() } else { without_failed_turn(items, &right["items"]) };
        if right["items"].is_array() {
            right["items"] = in_order(&right["items"]).into();
        }
        for item in left["items"].as_array_mut().into_iter().flatten() {
            item.as_object_mut().expect("an item").remove("turn");
        }
        for field in ["pauses", "error", "output", "json", "agent", "items", "usage", "streamed"] {
            // Exceptions don't tell what the turn cost that failed, and some of them nothing of the run.
            let is_known = field != "usage" && (!right[field].is_null() || !["agent", "items"].contains(&field));
            if !right["error"].is_null() && !is_known {
                continue;
            }
            if let Some(found) = first(&left[field], &right[field], &format!("run {}, {field}", at + 1)) {
                return Some(format!("{found}\n{}", both("run", &left, &right)));
            }
        }
    }
    if ours.runs.len() != sdk.runs.len() {
        return Some(format!("{} runs, the SDK made {}", ours.runs.len(), sdk.runs.len()));
    }
    // Everything that the provider charges is counted, whatever became of it.
    let total: u64 = ours.runs.iter().map(|run| run["usage"]["total"].as_u64().expect("a count")).sum();
    (total != ours.asked.charged)
        .then(|| format!("{total} tokens in the runs' usage, the provider charged {}", ours.asked.charged))
}

/// A run's items, the outputs of a turn in call order: in the journal they stand as they finished.
fn in_order(items: &Value) -> Vec<Value> {
    let items = items.as_array().cloned().unwrap_or_default();
    let place = |item: &Value| items.iter().position(|call| call["kind"] == "call" && call["call"] == item["call"]);
    let mut sorted = items.clone();
    for outputs in sorted.chunk_by_mut(|left, right| left["kind"] == "output" && right["kind"] == "output") {
        outputs.sort_by_key(place);
    }
    sorted
}

/// Our items as the SDK has them after a handoff that removes tools: of its turn it forgets what the journal keeps,
/// unless the turn paused in between.
fn without_filtered(scenario: &Scenario, items: &Value) -> Vec<Value> {
    let mut kept = Vec::new();
    for item in items.as_array().into_iter().flatten() {
        kept.push(item.clone());
        if item["kind"] == "handoff" && removes_tools(scenario, &item["agent"], &item["to"]) {
            let begun = kept.iter().position(|other| other["turn"] == item["turn"]).unwrap_or_default();
            let paused = kept.iter().rposition(|other| other["kind"] == "asked").map_or(0, |at| at + 1);
            let since = kept.split_off(begun.max(paused));
            kept.extend(since.into_iter().filter(|item| item["kind"] == "message"));
        }
    }
    kept.retain(|item| item["kind"] != "asked");
    kept
}

/// Whether the handoff from one agent to another removes tools; both by name.
fn removes_tools(scenario: &Scenario, from: &Value, to: &Value) -> bool {
    let named = |name: &Value| scenario.agents.iter().find(|(key, agent)| agent.name.as_ref().unwrap_or(key) == name);
    let (Some((_, from)), Some((to, _))) = (named(from), named(to)) else { return false };
    let handoff = from.handoffs.iter().find(|handoff| handoff["agent"] == to.as_str());
    handoff.is_some_and(|handoff| handoff.get("inputFilter").is_some_and(|filter| filter == "REMOVE_TOOLS"))
}

/// Our items without the turn that failed, unless the SDK's exception tells of it too.
fn without_failed_turn(items: Vec<Value>, sdk: &Value) -> Value {
    let known = sdk.as_array().map_or(0, Vec::len);
    let failed = items.last().map(|item| item["turn"].clone());
    let is_all_of_it = items.iter().skip(known).all(|item| Some(&item["turn"]) == failed.as_ref())
        && known
            .checked_sub(1)
            .is_none_or(|last| items.get(last).is_none_or(|item| Some(&item["turn"]) != failed.as_ref()));
    if is_all_of_it { items.into_iter().take(known).collect() } else { items.into() }
}

/// The first place where two values differ. Objects are equal whatever the order of their keys.
fn first(left: &Value, right: &Value, path: &str) -> Option<String> {
    match (left, right) {
        (Value::Object(left), Value::Object(right)) => {
            let missing = right.keys().find(|key| !left.contains_key(*key));
            if let Some(key) = missing {
                return Some(format!("{path}.{key}: ours has none, the SDK {}", right[key]));
            }
            left.iter().find_map(|(key, value)| match right.get(key) {
                Some(other) => first(value, other, &format!("{path}.{key}")),
                None => Some(format!("{path}.{key}: ours {value}, the SDK has none")),
            })
        }
        (Value::Array(left), Value::Array(right)) => {
            let found = left.iter().zip(right).enumerate();
            let found = found.map(|(at, (left, right))| first(left, right, &format!("{path}[{at}]")));
            found.flatten().next().or_else(|| {
                let length = |array: &[Value]| array.len();
                (left.len() != right.len())
                    .then(|| format!("{path}: ours has {}, the SDK {}", length(left), length(right)))
            })
        }
        _ => (left != right).then(|| format!("{path}: ours {left}, the SDK {right}")),
    }
}

fn both(what: &str, ours: &Value, sdk: &Value) -> String {
    format!("── our {what} ──\n{}\n── the SDK's ──\n{}", pretty(ours), pretty(sdk))
}

fn pretty(value: &Value) -> String {
    serde_json::to_string_pretty(value).expect("JSON")
}
