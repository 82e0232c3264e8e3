//! What the tests of agents and runs do over and over: a stage is set, an agent is made, a run is started and
//! its end awaited.

use std::time::Duration;

use cloister_tests::app::{SCRIPTED_MODEL, TestAppBuilder};
use cloister_tests::client::SseStream;
use cloister_tests::{Client, ModelServer, PATIENCE, Tenant, TestApp, ToolServer};
use serde_json::{Value, json};

/// `Run` with what the tests look at.
pub const RUN: &str = "id status input output outputJson turns error { code message } agent { id name }
    agentVersion { version } currentAgent { name } conversation { id } usage { requests totalTokens }
    pendingApprovals { callId name arguments argumentsHash agentName scope } startedAt finishedAt";

/// `RunItem` with everything, as the fragment `Item`.
pub const ITEM: &str = "fragment Item on RunItem {
    __typename sequence agentName turn scope
    ... on MessageItem { part: index role text }
    ... on ReasoningItem { index text }
    ... on ToolCallItem { index callId name arguments argumentsHash }
    ... on ToolOutputItem { callId output isError }
    ... on HandoffItem { callId toAgentName }
    ... on ApprovalItem { callId approved }
    ... on GuardrailItem { name stage reason }
    ... on UsageItem { model usage { totalTokens } }
    ... on StatusItem { status error { code message } }
}";

const EVENTS: &str = "subscription ($id: ID!, $after: Int) { runEvents(runId: $id, after: $after) {
    __typename
    ... on RunItemAdded { item { ...Item } }
    ... on TextDelta { turn index offset text }
    ... on ArgumentsDelta { turn index callId name offset text }
    ... on TurnRestarted { turn }
} }";

/// The subscription to a run's events; its variables are `id` and `after`.
pub fn events_query() -> String {
    format!("{EVENTS} {ITEM}")
}

/// A server, its provider, a tool server and a tenant.
pub struct Stage {
    pub app: TestApp,
    pub model: ModelServer,
    pub tools: ToolServer,
    pub tenant: Tenant,
}

impl Stage {
    /// Sets the stage.
    pub async fn set(app: TestAppBuilder) -> Stage {
        let model = ModelServer::start().await;
        let tools = ToolServer::start().await;
        let app = app.model_server(&model).start().await;
        let tenant = app.tenant("acme").await;
        Stage { app, model, tools, tenant }
    }

    /// The tenant's client.
    pub fn client(&self) -> &Client {
        &self.tenant.client
    }

    /// A `ToolInput` of this name, answered by the tool server under `/name`; it takes any object.
    pub fn tool(&self, name: &str) -> Value {
        tool(name, &self.tools.url(&format!("/{name}")), json!({}))
    }

    /// Makes and publishes an agent with these fields beside the least it must have.
    pub async fn agent(&self, fields: Value) -> String {
        create_agent(self.client(), fields).await
    }

    /// Starts a run and waits for its end.
    pub async fn run(&self, agent_id: &str, input: &str) -> Ended {
        let id = start(self.client(), json!({"agentId": agent_id, "input": input})).await;
        ended(self.client(), &id).await
    }

    /// Starts a run of the conversation and waits for its end.
    pub async fn say(&self, agent_id: &str, conversation_id: &str, input: &str) -> Ended {
        let input = json!({"agentId": agent_id, "conversationId": conversation_id, "input": input});
        let id = start(self.client(), input).await;
        ended(self.client(), &id).await
    }

    /// Begins a conversation with a run and waits for the run's end. Returns the conversation's id too.
    pub async fn open_conversation(&self, agent_id: &str, input: &str) -> (String, Ended) {
        let input = json!({"agentId": agent_id, "newConversation": true, "input": input});
        let id = start(self.client(), input).await;
        let ended = ended(self.client(), &id).await;
        (text(&ended.run["conversation"]["id"]), ended)
    }
}

/// A webhook as `ToolInput`, with fields over the usual ones.
pub fn tool(name: &str, url: &str, fields: Value) -> Value {
    json!({"webhook": with(json!({"name": name, "description": format!("Does {name}."), "url": url}), fields)})
}

/// An object with another's fields over its own.
pub fn with(mut object: Value, fields: Value) -> Value {
    let fields = fields.as_object().expect("fields").clone();
    object.as_object_mut().expect("an object").extend(fields);
    object
}

/// A value that must be text.
pub fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("no text: {value}")).to_owned()
}

/// A mutation's payload; `input_type` is the name of its input, `selection` what is asked for beside the errors.
pub async fn mutate(client: &Client, mutation: &str, input_type: &str, selection: &str, input: Value) -> Value {
    let query = format!(
        "mutation ($input: {input_type}!) {{
            {mutation}(input: $input) {{ {selection} errors {{ code message field }} }}
        }}"
    );
    client.data(&query, json!({"input": input})).await[mutation].clone()
}

/// A payload without errors.
pub fn granted(payload: Value) -> Value {
    assert_eq!(payload["errors"], json!([]), "{payload}");
    payload
}

/// Code and path of each error of a payload, whose other fields must be null.
pub fn refusals(payload: &Value) -> Vec<(String, String)> {
    for (name, value) in payload.as_object().expect("a payload") {
        assert!(name == "errors" || value.is_null(), "refused, and yet there is {name}: {value}");
    }
    let errors = payload["errors"].as_array().expect("errors");
    let path = |error: &Value| -> String {
        let parts = error["field"].as_array().expect("a path").iter().map(text);
        parts.collect::<Vec<_>>().join(".")
    };
    errors.iter().map(|error| (text(&error["code"]), path(error))).collect()
}

/// The one refusal of a payload.
pub fn refusal(payload: &Value) -> (String, String) {
    let refusals = refusals(payload);
    assert_eq!(refusals.len(), 1, "{payload}");
    refusals.into_iter().next().expect("one")
}

/// The payload of `createAgent`, for an agent with these fields beside the least it must have.
pub async fn try_create_agent(client: &Client, fields: Value) -> Value {
    let least = json!({"name": "Ada", "model": SCRIPTED_MODEL, "instructions": "Be brief.", "publish": true});
    mutate(client, "createAgent", "CreateAgentInput", "agent { id }", with(least, fields)).await
}

/// Makes and publishes an agent; its id.
pub async fn create_agent(client: &Client, fields: Value) -> String {
    text(&granted(try_create_agent(client, fields).await)["agent"]["id"])
}

/// The payload of `updateAgent`.
pub async fn try_update_agent(client: &Client, id: &str, fields: Value) -> Value {
    mutate(client, "updateAgent", "UpdateAgentInput", "agent { id }", with(json!({"agentId": id}), fields)).await
}

/// Changes an agent's draft.
pub async fn update_agent(client: &Client, id: &str, fields: Value) {
    granted(try_update_agent(client, id, fields).await);
}

/// The payload of `publishAgent`.
pub async fn try_publish(client: &Client, id: &str) -> Value {
    let selection = "agent { published { version } }";
    mutate(client, "publishAgent", "AgentIdInput", selection, json!({"agentId": id})).await
}

/// Publishes an agent; the number of its new version.
pub async fn publish(client: &Client, id: &str) -> i64 {
    granted(try_publish(client, id).await)["agent"]["published"]["version"].as_i64().expect("a version")
}

/// The payload of `startRun`.
pub async fn try_start(client: &Client, input: Value) -> Value {
    mutate(client, "startRun", "StartRunInput", &format!("run {{ {RUN} }}"), input).await
}

/// Starts a run; its id.
pub async fn start(client: &Client, input: Value) -> String {
    text(&granted(try_start(client, input).await)["run"]["id"])
}

/// The payload of `cancelRun`.
pub async fn try_cancel(client: &Client, id: &str) -> Value {
    mutate(client, "cancelRun", "RunIdInput", "run { status }", json!({"runId": id})).await
}

/// A run as it is now.
pub async fn run(client: &Client, id: &str) -> Value {
    client.data(&format!("query ($id: ID!) {{ run(id: $id) {{ {RUN} }} }}"), json!({"id": id})).await["run"].clone()
}

/// A run that has ended, and its journal.
pub struct Ended {
    pub run: Value,
    pub items: Vec<Value>,
}

impl Ended {
    /// The items of a type.
    pub fn of_type(&self, name: &str) -> Vec<&Value> {
        self.items.iter().filter(|item| item["__typename"] == name).collect()
    }

    /// The outputs of tools in the order they were stored: the text, and whether it is ours.
    pub fn outputs(&self) -> Vec<(String, bool)> {
        let outputs = self.of_type("ToolOutputItem");
        outputs.iter().map(|item| (text(&item["output"]), item["isError"] == true)).collect()
    }

    /// The run's id.
    pub fn id(&self) -> String {
        text(&self.run["id"])
    }

    /// The output of a run that succeeded.
    pub fn output(&self) -> String {
        assert_eq!(self.run["status"], "SUCCEEDED", "{}", self.run);
        text(&self.run["output"])
    }

    /// The code of a run that failed.
    pub fn error(&self) -> String {
        assert_eq!((&self.run["status"], &self.run["output"]), (&json!("FAILED"), &Value::Null), "{}", self.run);
        let last = self.items.last().expect("an item");
        assert_eq!((&last["status"], &last["error"]), (&json!("FAILED"), &self.run["error"]));
        text(&self.run["error"]["code"])
    }
}

/// Subscribes to a run's events.
pub async fn events(client: &Client, id: &str, after: i64) -> SseStream {
    client.subscribe_sse(&events_query(), json!({"id": id, "after": after})).await
}

/// The next event of a stream; none once it is complete.
pub async fn next_event(stream: &mut SseStream) -> Option<Value> {
    let result = stream.next_result().await;
    if result.is_none() {
        assert!(stream.completed(), "the stream broke off");
    }
    let result = result?;
    assert!(result["errors"].is_null(), "{result}");
    Some(result["data"]["runEvents"].clone())
}

/// The events that are still to come.
pub async fn rest(stream: &mut SseStream) -> Vec<Value> {
    let mut events = Vec::new();
    while let Some(event) = next_event(stream).await {
        events.push(event);
    }
    events
}

/// The items among events.
pub fn items_of(events: &[Value]) -> Vec<Value> {
    events.iter().filter(|event| event["__typename"] == "RunItemAdded").map(|event| event["item"].clone()).collect()
}

/// Waits for an item that satisfies the condition.
pub async fn wait_for_item(client: &Client, id: &str, condition: impl Fn(&Value) -> bool) -> Value {
    let mut stream = events(client, id, 0).await;
    loop {
        let event = next_event(&mut stream).await.expect("the run ends without such an item");
        if event["__typename"] == "RunItemAdded" && condition(&event["item"]) {
            return event["item"].clone();
        }
    }
}

/// Waits for a run's end.
pub async fn ended(client: &Client, id: &str) -> Ended {
    let events = rest(&mut events(client, id, 0).await).await;
    Ended { run: run(client, id).await, items: items_of(&events) }
}

/// Asks again and again until the answer satisfies the condition.
pub async fn until<T, F: Future<Output = T>>(what: &str, ask: impl Fn() -> F, condition: impl Fn(&T) -> bool) -> T {
    let asking = async {
        loop {
            let answer = ask().await;
            if condition(&answer) {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
    };
    tokio::time::timeout(PATIENCE, asking).await.unwrap_or_else(|_| panic!("not within {PATIENCE:?}: {what}"))
}
