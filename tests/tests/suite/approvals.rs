//! Calls that wait until somebody has agreed to them.

use cloister_tests::app::TestAppBuilder;
use cloister_tests::{Client, Reply, ToolAnswer};
use serde_json::{Value, json};

use super::both::on_both;
use super::calls::{done, mutate, refusals};
use super::steps::{Stage, create_agent, ended, run, start, text, tool, until, with};

on_both!(
    a_run_waits_without_a_worker_and_goes_on_with_what_was_decided,
    several_calls_are_decided_in_any_order,
    a_decision_may_stand_for_all_later_calls,
    a_handoff_waits_for_the_decision_beside_it,
    a_decision_is_bound_to_what_was_seen,
    nobody_decides_for_too_long,
    what_waits_is_cancelled,
    what_a_nested_run_no_longer_needs_is_not_waited_for,
);

/// A webhook that needs approval.
fn asking(stage: &Stage, name: &str) -> Value {
    tool(name, &stage.tools.url(&format!("/{name}")), json!({"needsApproval": true}))
}

/// Waits until a run waits for so many decisions; the calls.
async fn pending(client: &Client, id: &str, count: usize) -> Vec<Value> {
    let waits =
        |run: &Value| run["status"] == "WAITING_APPROVAL" && run["pendingApprovals"].as_array().unwrap().len() == count;
    let run = until("it waits", || run(client, id), waits).await;
    run["pendingApprovals"].as_array().unwrap().clone()
}

fn decision(id: &str, call: &Value, approve: bool) -> Value {
    json!({"runId": id, "callId": call["callId"], "argumentsHash": call["argumentsHash"], "approve": approve})
}

async fn decide(client: &Client, id: &str, call: &Value, approve: bool, more: Value) {
    done(client, "decideToolCall", with(decision(id, call, approve), more)).await;
}

async fn a_run_waits_without_a_worker_and_goes_on_with_what_was_decided(app: TestAppBuilder) {
    let mut stage = Stage::set(app).await;
    let tools = json!([asking(&stage, "pay"), stage.tool("look")]);
    let agent = stage.agent(json!({"tools": tools})).await;
    let asks = Reply::tool_call("pay", json!({"amount": 3})).call_id("call_p").and_tool_call("look", json!({}));
    stage.model.script([asks.usage(10, 2), Reply::text("Paid.").usage(20, 3)]);
    let id = start(stage.client(), json!({"agentId": agent, "input": "Pay"})).await;
    let [call] = &pending(stage.client(), &id, 1).await[..] else { panic!("not one call") };
    assert_eq!((&call["name"], &call["arguments"]), (&json!("pay"), &json!(r#"{"amount":3}"#)));
    // What needs no approval has run.
    assert_eq!(stage.tools.requests().iter().map(|r| r.path.clone()).collect::<Vec<_>>(), ["/look"]);
    let status = "{ runs(filter: {status: [RUNNING]}) { nodes { id } } }";
    assert_eq!(stage.client().data(status, json!({})).await["runs"]["nodes"], json!([]));
    stage.app.kill();
    stage.app.restart().await;
    let call = pending(stage.client(), &id, 1).await.remove(0);
    decide(stage.client(), &id, &call, true, json!({})).await;
    let ended = ended(stage.client(), &id).await;
    assert_eq!((ended.output().as_str(), ended.run["turns"].as_i64()), ("Paid.", Some(2)));
    let kinds: Vec<_> = ended.items.iter().map(|item| text(&item["__typename"])).collect();
    let kinds: Vec<_> = kinds.iter().map(|kind| kind.trim_end_matches("Item")).collect();
    assert_eq!(
        kinds,
        [
            "Message",
            "ToolCall",
            "ToolCall",
            "Usage",
            "ToolOutput",
            "Approval",
            "Status",
            "Approval",
            "Status",
            "ToolOutput",
            "Message",
            "Usage",
            "Status"
        ]
    );
    let states: Vec<_> = ended.of_type("StatusItem").iter().map(|item| text(&item["status"])).collect();
    assert_eq!(states, ["WAITING_APPROVAL", "QUEUED", "SUCCEEDED"]);
    // What waited for a decision stands behind what did not.
    let told: Vec<_> = stage.model.requests()[1].messages().iter().filter(|m| m["role"] == "tool").cloned().collect();
    assert_eq!(told[1]["tool_call_id"], "call_p");
    assert_eq!(stage.model.served().requests, 2);
    assert_eq!(ended.run["usage"]["totalTokens"], 35);
}

async fn several_calls_are_decided_in_any_order(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let agent = stage.agent(json!({"tools": [asking(&stage, "a"), asking(&stage, "b"), asking(&stage, "c")]})).await;
    let asks = Reply::tool_call("a", json!({})).and_tool_call("b", json!({})).and_tool_call("c", json!({}));
    stage.model.script([asks, Reply::text("Done.")]);
    stage.tools.always(|_| ToolAnswer::text("ran").delay(200));
    let id = start(stage.client(), json!({"agentId": agent, "input": "Go"})).await;
    let calls = pending(stage.client(), &id, 3).await;
    decide(stage.client(), &id, &calls[2], true, json!({})).await;
    // While the one that was decided runs, another decision comes.
    stage.tools.wait_for_requests(1).await;
    decide(stage.client(), &id, &calls[1], false, json!({"message": "Not b."})).await;
    let left = pending(stage.client(), &id, 1).await;
    assert_eq!(left[0]["name"], "a");
    decide(stage.client(), &id, &left[0], false, json!({})).await;
    let ended = ended(stage.client(), &id).await;
    assert_eq!(ended.output(), "Done.");
    let told: Vec<_> = stage.model.requests()[1].messages().iter().filter(|m| m["role"] == "tool").cloned().collect();
    let told: Vec<_> = told.iter().map(|message| text(&message["content"])).collect();
    assert_eq!(told, ["ran", "Not b.", "Tool execution was not approved."], "in the order of the decisions");
    assert_eq!(stage.tools.requests().len(), 1);
    let again = mutate(stage.client(), "decideToolCall", decision(&id, &calls[0], true)).await;
    assert_eq!(refusals(&again, "decideToolCall"), [("STATE".to_owned(), "runId".to_owned())]);
}

async fn a_decision_may_stand_for_all_later_calls(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let agent = stage.agent(json!({"tools": [asking(&stage, "a"), asking(&stage, "b")]})).await;
    let both = || Reply::tool_call("a", json!({})).and_tool_call("b", json!({}));
    stage.model.script([both(), both(), both(), Reply::text("Done.")]);
    let id = start(stage.client(), json!({"agentId": agent, "input": "Go"})).await;
    let calls = pending(stage.client(), &id, 2).await;
    decide(stage.client(), &id, &calls[0], true, json!({"always": true})).await;
    let left = pending(stage.client(), &id, 1).await;
    decide(stage.client(), &id, &left[0], false, json!({"always": true, "message": "Never b."})).await;
    let ended = ended(stage.client(), &id).await;
    assert_eq!(ended.output(), "Done.");
    assert_eq!(stage.tools.requests().len(), 3);
    let last = stage.model.requests().pop().unwrap();
    let told: Vec<_> = last.messages().iter().filter(|m| m["role"] == "tool").map(|m| text(&m["content"])).collect();
    assert_eq!(told, ["ok", "Never b.", "ok", "Never b.", "ok", "Never b."]);
    assert_eq!(ended.of_type("ApprovalItem").len(), 4);
}

async fn a_handoff_waits_for_the_decision_beside_it(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let other = stage.agent(json!({"name": "Other", "instructions": "other"})).await;
    let fields = json!({"tools": [asking(&stage, "pay")], "handoffs": [{"agentId": other}]});
    let agent = stage.agent(fields).await;
    stage.model.script([
        Reply::tool_call("transfer_to_other", json!({})).and_tool_call("pay", json!({})),
        Reply::text("Mine now."),
    ]);
    let id = start(stage.client(), json!({"agentId": agent, "input": "Go"})).await;
    let calls = pending(stage.client(), &id, 1).await;
    assert_eq!(run(stage.client(), &id).await["currentAgent"]["name"], "Ada");
    decide(stage.client(), &id, &calls[0], true, json!({})).await;
    let ended = ended(stage.client(), &id).await;
    assert_eq!((ended.output().as_str(), &ended.run["currentAgent"]["name"]), ("Mine now.", &json!("Other")));
    assert_eq!(stage.model.requests().len(), 2, "no model call before the handoff");
    assert_eq!(stage.model.requests()[1].messages()[0]["content"], "other");
}

async fn a_decision_is_bound_to_what_was_seen(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let agent = stage.agent(json!({"tools": [asking(&stage, "pay"), stage.tool("look")]})).await;
    let asks = Reply::tool_call("pay", json!({})).call_id("call_p").and_tool_call("look", json!({})).call_id("call_l");
    stage.model.script([asks]);
    let id = start(stage.client(), json!({"agentId": agent, "input": "Go"})).await;
    let call = pending(stage.client(), &id, 1).await.remove(0);
    let other = stage.app.tenant("other").await;
    let good = decision(&id, &call, true);
    for (client, what, input, refused) in [
        (
            stage.client(),
            "other arguments",
            with(good.clone(), json!({"argumentsHash": "00"})),
            ("CONFLICT", "argumentsHash"),
        ),
        (stage.client(), "no such call", with(good.clone(), json!({"callId": "call_x"})), ("NOT_FOUND", "callId")),
        (
            stage.client(),
            "a call that needs none",
            with(good.clone(), json!({"callId": "call_l"})),
            ("STATE", "callId"),
        ),
        (
            stage.client(),
            "a message with an approval",
            with(good.clone(), json!({"message": "Why"})),
            ("INVALID", "message"),
        ),
        (
            stage.client(),
            "no such run",
            with(good.clone(), json!({"runId": super::calls::missing("run")})),
            ("NOT_FOUND", "runId"),
        ),
        (&other.client, "another tenant", good.clone(), ("NOT_FOUND", "runId")),
    ] {
        let payload = mutate(client, "decideToolCall", input).await;
        let refused = (refused.0.to_owned(), refused.1.to_owned());
        assert_eq!(refusals(&payload, "decideToolCall"), [refused], "{what}");
    }
    assert_eq!(stage.tools.requests().len(), 1);
    assert_eq!(pending(stage.client(), &id, 1).await.remove(0), call);
}

async fn nobody_decides_for_too_long(app: TestAppBuilder) {
    let app = app.env("CLOISTER_RUNS__APPROVAL_TIMEOUT_SECONDS", "1").env("CLOISTER_RUNS__LEASE_SECONDS", "3");
    let stage = Stage::set(app).await;
    let agent = stage.agent(json!({"tools": [asking(&stage, "pay")]})).await;
    stage.model.script([Reply::tool_call("pay", json!({}))]);
    let id = start(stage.client(), json!({"agentId": agent, "input": "Go"})).await;
    let ended = ended(stage.client(), &id).await;
    assert_eq!(ended.error(), "TIMEOUT");
    assert_eq!(ended.outputs(), [("Nobody decided about this call in time.".to_owned(), true)]);
    assert_eq!(ended.run["pendingApprovals"], json!([]));
    assert!(stage.tools.requests().is_empty());
}

async fn what_waits_is_cancelled(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let inner = stage.agent(json!({"name": "Inner", "instructions": "inner", "tools": [asking(&stage, "pay")]})).await;
    let ask = json!({"agent": {"name": "ask", "description": "Asks.", "agentId": inner}});
    let agent = create_agent(stage.client(), json!({"tools": [ask]})).await;
    stage.model.script([
        Reply::tool_call("ask", json!({"input": "?"})).call_id("call_o"),
        Reply::tool_call("pay", json!({})).call_id("call_i"),
        Reply::text("Again."),
    ]);
    let (conversation, id) = {
        let input = json!({"agentId": agent, "newConversation": true, "input": "Go"});
        let id = start(stage.client(), input).await;
        (text(&run(stage.client(), &id).await["conversation"]["id"]), id)
    };
    let call = pending(stage.client(), &id, 1).await.remove(0);
    assert_eq!((&call["agentName"], &call["scope"]), (&json!("Inner"), &json!("call_o")));
    done(stage.client(), "cancelRun", json!({"runId": id})).await;
    let payload = mutate(stage.client(), "decideToolCall", decision(&id, &call, true)).await;
    assert_eq!(refusals(&payload, "decideToolCall"), [("STATE".to_owned(), "runId".to_owned())]);
    // The conversation goes on, with no orphan in it and nothing of the nested run.
    let next = stage.say(&agent, &conversation, "And now?").await;
    assert_eq!(next.output(), "Again.");
    let shown: Vec<_> = stage.model.requests()[2].messages()[1..].to_vec();
    let roles: Vec<_> = shown.iter().map(|message| text(&message["role"])).collect();
    assert_eq!(roles, ["user", "assistant", "tool", "user"]);
    assert_eq!(shown[2], json!({"role": "tool", "tool_call_id": "call_o", "content": "The run was cancelled."}));
}

async fn what_a_nested_run_no_longer_needs_is_not_waited_for(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let mut fields =
        json!({"name": "Inner", "instructions": "inner", "tools": [asking(&stage, "a"), asking(&stage, "b")]});
    fields["guardrails"] = json!([{
        "name": "never", "stage": "TOOL_INPUT", "tool": "a", "onTrip": "FAIL", "rule": {"regex": {"pattern": "."}},
    }]);
    let inner = stage.agent(fields).await;
    let ask = json!({"agent": {"name": "ask", "description": "Asks.", "agentId": inner}});
    let agent = create_agent(stage.client(), json!({"tools": [ask, asking(&stage, "pay")]})).await;
    stage.model.always(|request| {
        let messages = request.messages();
        let has_answers = messages.iter().any(|message| message["role"] == "tool");
        match messages[0]["content"].as_str() {
            Some("inner") => Reply::tool_call("a", json!({})).and_tool_call("b", json!({})),
            _ if has_answers => Reply::text("Done."),
            _ => Reply::tool_call("ask", json!({"input": "?"})).and_tool_call("pay", json!({})),
        }
    });
    let id = start(stage.client(), json!({"agentId": agent, "input": "Go"})).await;
    let calls = pending(stage.client(), &id, 3).await;
    let of = |name: &str| calls.iter().find(|call| call["name"] == name).unwrap();
    decide(stage.client(), &id, of("a"), true, json!({})).await;
    // The nested run has failed: its other call waits no longer, and the run does.
    let left = pending(stage.client(), &id, 1).await;
    assert_eq!(left[0]["name"], "pay");
    let again = mutate(stage.client(), "decideToolCall", decision(&id, of("b"), true)).await;
    assert_eq!(refusals(&again, "decideToolCall"), [("STATE".to_owned(), "callId".to_owned())]);
    decide(stage.client(), &id, &left[0], true, json!({})).await;
    let ended = ended(stage.client(), &id).await;
    assert_eq!(ended.output(), "Done.");
    let waits = ended.of_type("StatusItem").iter().filter(|item| item["status"] == "WAITING_APPROVAL").count();
    assert_eq!(waits, 2, "it goes round once for each decision");
}
