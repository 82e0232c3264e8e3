//! Cloister's side: a scenario's agents made over GraphQL, run, decided about, and read.

use std::collections::{BTreeMap, HashSet};
use std::time::{Duration, Instant};

use cloister_tests::{Client, PATIENCE};
use serde_json::{Map, Value, json};

use crate::scenario::{Agent, Decision, Run, Scenario};
use crate::script::Servers;

const RUN: &str = "query ($id: ID!, $after: String) { run(id: $id) {
    status output outputJson error { code message } currentAgent { name } conversation { id }
    usage { requests inputTokens outputTokens cacheReadTokens cacheWriteTokens reasoningTokens totalTokens estimated }
    pendingApprovals { callId name arguments argumentsHash }
    items(first: 100, after: $after) { pageInfo { hasNextPage endCursor } nodes {
        __typename agentName turn scope
        ... on MessageItem { role text }
        ... on ReasoningItem { text }
        ... on ToolCallItem { callId name arguments }
        ... on ToolOutputItem { callId output }
        ... on HandoffItem { callId toAgentName }
        ... on ApprovalItem { approved }
        ... on GuardrailItem { name }
    } }
} }";

/// Types of the calls that a provider makes itself.
const HOSTED: [&str; 3] = ["web_search_call", "code_interpreter_call", "image_generation_call"];

const EVENTS: &str = "subscription ($id: ID!) { runEvents(runId: $id) {
    __typename
    ... on TextDelta { turn index offset text }
    ... on RunItemAdded { item { __typename turn scope ... on MessageItem { role part: index text } } }
} }";

/// Plays a scenario with the model of this name; the outcome of each run.
///
/// # Panics
/// Cloister refuses something.
pub async fn play(client: &Client, model: &str, scenario: &Scenario, servers: &Servers) -> Vec<Value> {
    let stage = Stage { client, model, scenario, servers };
    let ids = stage.agents().await;
    let mut outcomes = Vec::new();
    let mut conversation = None;
    for run in &scenario.runs {
        let mut input = json!({"agentId": ids[&scenario.start], "input": run.input});
        if !run.variables.is_empty() {
            input["variables"] = json!(run.variables);
        }
        match &conversation {
            Some(id) => input["conversationId"] = json!(id),
            None if scenario.runs.len() > 1 => input["newConversation"] = json!(true),
            None => {}
        }
        let started = stage.mutate("startRun", "StartRunInput", "run { id }", input).await;
        let id = started["run"]["id"].as_str().expect("an id");
        let (streamed, (state, pauses)) = tokio::join!(stage.streamed(id), stage.follow(id, run));
        conversation = state["conversation"]["id"].as_str().map(str::to_owned);
        let mut outcome = outcome(&state, pauses);
        outcome["streamed"] = json!(streamed);
        outcomes.push(outcome);
    }
    outcomes
}

struct Stage<'a> {
    client: &'a Client,
    model: &'a str,
    scenario: &'a Scenario,
    servers: &'a Servers,
}

impl Stage<'_> {
    /// Makes the agents and publishes the first; ids by key.
    async fn agents(&self) -> BTreeMap<String, String> {
        let mut ids = BTreeMap::new();
        // First all of them, then what they know of each other: handoffs may go in circles.
        for (key, agent) in &self.scenario.agents {
            let name = agent.name.as_ref().unwrap_or(key);
            let instructions = agent.instructions.clone().unwrap_or_else(|| format!("You are {key}."));
            let input = json!({"name": name, "model": self.model, "instructions": instructions});
            let made = self.mutate("createAgent", "CreateAgentInput", "agent { id }", input).await;
            ids.insert(key.clone(), made["agent"]["id"].as_str().expect("an id").to_owned());
        }
        for (key, agent) in &self.scenario.agents {
            let mut input = self.fields(agent, &ids);
            if !input.is_empty() {
                input.insert("agentId".to_owned(), json!(ids[key]));
                self.mutate("updateAgent", "UpdateAgentInput", "agent { id }", input.into()).await;
            }
        }
        let start = json!({"agentId": ids[&self.scenario.start]});
        self.mutate("publishAgent", "AgentIdInput", "agent { id }", start).await;
        ids
    }

    /// An agent as `UpdateAgentInput`, without what it was made with.
    fn fields(&self, agent: &Agent, ids: &BTreeMap<String, String>) -> Map<String, Value> {
        let Value::Object(mut fields) = json!(agent) else { unreachable!("a struct is an object") };
        fields.retain(|name, _| !["name", "instructions"].contains(&name.as_str()));
        // What the scenario calls by a key, the API calls by an id.
        let with_id = |object: &mut Value| {
            if let Some(key) = object.as_object_mut().expect("an object").remove("agent") {
                object["agentId"] = json!(ids[key.as_str().expect("an agent's key")]);
            }
        };
        let each = |fields: &mut Map<String, Value>, name: &str, change: &dyn Fn(&mut Value)| {
            fields.get_mut(name).and_then(Value::as_array_mut).into_iter().flatten().for_each(change);
        };
        each(&mut fields, "tools", &|tool| {
            let tool = tool.as_object_mut().expect("a tool");
            if let Some(webhook) = tool.get_mut("webhook") {
                webhook["url"] =
                    json!(self.servers.tools.url(&format!("/{}", webhook["name"].as_str().expect("a name"))));
            }
            tool.values_mut().for_each(with_id);
        });
        each(&mut fields, "handoffs", &with_id);
        each(&mut fields, "guardrails", &|guardrail| with_id(&mut guardrail["rule"]));
        fields
    }

    async fn mutate(&self, mutation: &str, input_type: &str, selection: &str, input: Value) -> Value {
        let query = format!(
            "mutation ($input: {input_type}!) {{
                {mutation}(input: $input) {{ {selection} errors {{ code message field }} }}
            }}"
        );
        let payload = self.client.data(&query, json!({"input": input})).await[mutation].clone();
        assert_eq!(payload["errors"], json!([]), "{mutation} is refused: {input}");
        payload
    }

    /// Follows a run to its end, deciding what the scenario decides at each pause; its last state, and the pauses.
    async fn follow(&self, id: &str, run: &Run) -> (Value, Vec<Value>) {
        let (mut pauses, mut decided) = (Vec::new(), HashSet::new());
        let begun = Instant::now();
        loop {
            assert!(begun.elapsed() < PATIENCE, "the run does not end; it is {}", self.state(id).await);
            let state = self.state(id).await;
            match state["status"].as_str() {
                Some("SUCCEEDED" | "FAILED" | "CANCELLED" | "PAUSED_QUOTA") => return (state, pauses),
                Some("WAITING_APPROVAL") if is_at_rest(&state, &decided) => {}
                _ => {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    continue;
                }
            }
            let pending = state["pendingApprovals"].as_array().expect("approvals").clone();
            let shown =
                |call: &Value| json!({"call": call["callId"], "name": call["name"], "arguments": call["arguments"]});
            let calls: Vec<String> =
                pending.iter().map(|call| call["callId"].as_str().expect("an id").to_owned()).collect();
            let decisions = run.decisions_at(pauses.len(), &calls, decided.len());
            pauses.push(pending.iter().map(shown).collect());
            let Some(decisions) = decisions else { return (state, pauses) };
            for decision in decisions {
                self.decide(id, &pending, &decision).await;
                decided.insert(decision.call);
            }
        }
    }

    /// The text that a subscriber sees of a run that is decided about to its end; none if the scenario doesn't stream.
    async fn streamed(&self, id: &str) -> Option<String> {
        if !self.scenario.stream {
            return None;
        }
        let mut events = self.client.subscribe_sse(EVENTS, json!({"id": id})).await;
        let mut messages = BTreeMap::<(u64, u64), String>::new();
        while let Some(result) = events.next_result().await {
            let event = &result["data"]["runEvents"];
            let item = &event["item"];
            let place =
                |value: &Value, index: &str| (value["turn"].as_u64().unwrap_or(0), value[index].as_u64().unwrap_or(0));
            if event["__typename"] == "TextDelta" {
                let text = messages.entry(place(event, "index")).or_default();
                let offset = event["offset"].as_u64().expect("an offset") as usize;
                // What is below the length that is there overlaps.
                text.truncate(offset);
                assert_eq!(text.len(), offset, "a delta leaves a gap: {event}");
                *text += event["text"].as_str().expect("a text");
            } else if item["role"] == "ASSISTANT" && item["scope"].is_null() {
                let whole = item["text"].as_str().expect("a text");
                let text = messages.entry(place(item, "part")).or_default();
                assert!(whole.starts_with(text.as_str()), "{text:?} was streamed of {whole:?}");
                whole.clone_into(text);
            }
        }
        Some(messages.into_values().collect())
    }

    async fn decide(&self, id: &str, pending: &[Value], decision: &Decision) {
        let call = pending.iter().find(|call| call["callId"] == decision.call.as_str());
        let call = call.unwrap_or_else(|| panic!("{} does not wait, but {pending:?}", decision.call));
        let mut input = json!({
            "runId": id, "callId": decision.call, "approve": decision.approve, "argumentsHash": call["argumentsHash"],
            "always": decision.always,
        });
        if let Some(message) = &decision.message {
            input["message"] = json!(message);
        }
        self.mutate("decideToolCall", "DecideToolCallInput", "run { id }", input).await;
    }

    /// A run with all its items.
    async fn state(&self, id: &str) -> Value {
        let mut state = self.client.data(RUN, json!({"id": id})).await["run"].clone();
        while state["items"]["pageInfo"]["hasNextPage"] == true {
            let after = &state["items"]["pageInfo"]["endCursor"];
            let mut next = self.client.data(RUN, json!({"id": id, "after": after})).await["run"].clone();
            let mut nodes = state["items"]["nodes"].take();
            let more = next["items"]["nodes"].as_array_mut().expect("items");
            nodes.as_array_mut().expect("items").append(more);
            state = next;
            state["items"]["nodes"] = nodes;
        }
        state
    }
}

/// Whether a waiting run has done all that was decided, so that only what waits is left.
fn is_at_rest(state: &Value, decided: &HashSet<String>) -> bool {
    let pending = state["pendingApprovals"].as_array().expect("approvals");
    let items = state["items"]["nodes"].as_array().expect("items");
    let is_answered = |call: &&String| {
        let answers = ["ToolOutputItem", "HandoffItem"];
        items
            .iter()
            .any(|item| answers.iter().any(|kind| item["__typename"] == *kind) && item["callId"] == call.as_str())
    };
    pending.iter().all(|call| !decided.contains(call["callId"].as_str().unwrap_or_default()))
        && decided.iter().all(|call| is_answered(&call))
}

/// A run as both sides tell it.
fn outcome(state: &Value, pauses: Vec<Value>) -> Value {
    let usage = &state["usage"];
    let number = |name: &str| usage[name].as_u64().expect("a count");
    assert_eq!(usage["estimated"], false, "the script says what it charges");
    let items = state["items"]["nodes"].as_array().expect("items");
    let guardrail = items.iter().rfind(|item| item["__typename"] == "GuardrailItem");
    let error = match &state["error"] {
        Value::Null => Value::Null,
        error if error["code"] == "GUARDRAIL" => {
            json!({"code": error["code"], "guardrail": guardrail.map(|item| &item["name"])})
        }
        error => json!({"code": error["code"], "guardrail": null}),
    };
    json!({
        "output": state["output"],
        "json": state["outputJson"],
        "error": error,
        "message": state["error"]["message"],
        "agent": state["currentAgent"]["name"],
        "items": items.iter().filter_map(neutral).collect::<Vec<_>>(),
        "usage": {
            "requests": usage["requests"],
            "input": number("inputTokens") + number("cacheReadTokens") + number("cacheWriteTokens"),
            "output": usage["outputTokens"],
            "cached": usage["cacheReadTokens"],
            "reasoning": usage["reasoningTokens"],
            "total": usage["totalTokens"],
        },
        "pauses": pauses,
    })
}

/// An item as both sides tell it; none for what only we have, as what happened in nested runs.
fn neutral(item: &Value) -> Option<Value> {
    if !item["scope"].is_null() {
        return None;
    }
    let (agent, turn) = (&item["agentName"], &item["turn"]);
    let mut told = match item["__typename"].as_str().expect("a type") {
        "MessageItem" if item["role"] == "ASSISTANT" => {
            json!({"kind": "message", "agent": agent, "text": item["text"]})
        }
        "ReasoningItem" => json!({"kind": "reasoning", "agent": agent, "text": item["text"]}),
        "ToolCallItem" if HOSTED.iter().any(|name| item["name"] == *name) => {
            json!({"kind": "hosted_call", "agent": agent, "call": item["callId"], "name": item["name"]})
        }
        "ToolCallItem" => json!({
            "kind": "call", "agent": agent, "call": item["callId"], "name": item["name"], "arguments": item["arguments"],
        }),
        "ToolOutputItem" => json!({"kind": "output", "agent": agent, "call": item["callId"], "output": item["output"]}),
        "HandoffItem" => json!({"kind": "handoff", "agent": agent, "call": item["callId"], "to": item["toAgentName"]}),
        "ApprovalItem" if item["approved"].is_null() => json!({"kind": "asked"}),
        _ => return None,
    };
    told["turn"] = turn.clone();
    Some(told)
}
