//! Handoffs from one agent to another.

use cloister_tests::app::TestAppBuilder;
use cloister_tests::{Reply, ToolAnswer};
use serde_json::{Value, json};

use crate::both::on_both;
use crate::steps::{Stage, text, update_agent, with};

on_both!(
    a_handoff_is_offered_as_a_tool_and_the_other_agent_goes_on,
    of_two_handoffs_the_first_happens_after_the_tools,
    an_agent_is_handed_back_to_as_it_was,
);

fn call(turn: u64, at: usize, name: &str) -> Value {
    let function = json!({"name": name, "arguments": "{}"});
    json!({"id": format!("call_{turn:08}_{at}"), "type": "function", "function": function})
}

fn output(turn: u64, at: usize, text: &str) -> Value {
    json!({"role": "tool", "tool_call_id": format!("call_{turn:08}_{at}"), "content": text})
}

async fn a_handoff_is_offered_as_a_tool_and_the_other_agent_goes_on(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    stage.model.script([Reply::tool_call("transfer_to_zo__billing__", json!({"ignored": 1})), Reply::text("Paid.")]);
    let billing = json!({
        "name": "Zoë Billing 日", "instructions": "You bill.", "handoffDescription": "For bills.",
        "modelSettings": {"temperature": 0.5}, "tools": [stage.tool("pay")],
    });
    let billing = stage.agent(billing).await;
    let plain = stage.agent(json!({"name": "Plain-Talk"})).await;
    let named = json!({"agentId": plain, "toolName": "ask_someone", "toolDescription": "Asks someone."});
    let handoffs = json!([{"agentId": billing}, {"agentId": plain}, named]);
    let triage = stage.agent(json!({"name": "Triage", "tools": [stage.tool("look")], "handoffs": handoffs})).await;
    let ended = stage.run(&triage, "My bill").await;
    assert_eq!(ended.output(), "Paid.");

    let requests = stage.model.requests();
    let handoff = |name: &str, description: &str| {
        let parameters = json!({"additionalProperties": false, "type": "object", "properties": {}, "required": []});
        let function = json!({"name": name, "description": description, "parameters": parameters, "strict": true});
        json!({"type": "function", "function": function})
    };
    let offered = requests[0].body["tools"].as_array().unwrap();
    assert_eq!(requests[0].tool_names()[0], "look");
    assert_eq!(
        offered[1..],
        [
            handoff(
                "transfer_to_zo__billing__",
                "Handoff to the Zoë Billing 日 agent to handle the request. For bills."
            ),
            // The space stays where there is no description.
            handoff("transfer_to_plain_talk", "Handoff to the Plain-Talk agent to handle the request. "),
            handoff("ask_someone", "Asks someone."),
        ]
    );
    let call = with(
        call(1, 0, "transfer_to_zo__billing__"),
        json!({"function": {"name": "transfer_to_zo__billing__", "arguments": "{\"ignored\":1}"}}),
    );
    assert_eq!(
        requests[1].messages(),
        [
            json!({"role": "system", "content": "You bill."}),
            json!({"role": "user", "content": "My bill"}),
            json!({"role": "assistant", "content": null, "tool_calls": [call]}),
            output(1, 0, r#"{"assistant": "Zo\u00eb Billing \u65e5"}"#),
        ]
    );
    assert_eq!((requests[1].tool_names(), &requests[1].body["temperature"]), (vec!["pay"], &json!(0.5)));
    assert!(requests[0].body["temperature"].is_null());

    assert_eq!(ended.run["agent"]["name"], "Triage");
    assert_eq!(ended.run["currentAgent"]["name"], "Zoë Billing 日");
    let handoffs = ended.of_type("HandoffItem");
    assert_eq!(handoffs.len(), 1);
    assert_eq!(
        (&handoffs[0]["toAgentName"], &handoffs[0]["agentName"], &handoffs[0]["turn"], &handoffs[0]["callId"]),
        (&json!("Zoë Billing 日"), &json!("Triage"), &json!(1), &json!("call_00000001_0"))
    );
    let answer = ended.of_type("MessageItem")[1];
    assert_eq!((&answer["agentName"], &answer["turn"]), (&json!("Zoë Billing 日"), &json!(2)));
    let look = "query ($id: ID!) { agent(id: $id) { handoffs { agent { id } toolName toolDescription } } }";
    let shown = stage.client().data(look, json!({"id": triage})).await["agent"]["handoffs"].clone();
    assert_eq!(shown[0]["toolName"], "transfer_to_zo__billing__");
    assert_eq!(shown[1]["toolDescription"], offered[2]["function"]["description"]);
    assert_eq!(
        shown[2],
        json!({"agent": {"id": plain}, "toolName": "ask_someone", "toolDescription": "Asks someone."})
    );
}

async fn of_two_handoffs_the_first_happens_after_the_tools(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    stage.tools.script([ToolAnswer::text("seen")]);
    stage.model.script([
        Reply::text("One moment.")
            .and_tool_call("transfer_to_b", json!({}))
            .and_tool_call("transfer_to_c", json!({}))
            .and_tool_call("nope", json!({}))
            .and_tool_call("look", json!({})),
        Reply::text("This is B."),
    ]);
    let b = stage.agent(json!({"name": "B", "instructions": ""})).await;
    let c = stage.agent(json!({"name": "C"})).await;
    let handoffs = json!([{"agentId": b}, {"agentId": c}]);
    let behavior = json!({"name": "A", "tools": [stage.tool("look")], "handoffs": handoffs});
    // A handoff goes before the tool-use behaviour.
    let a = stage.agent(with(behavior, json!({"toolUseBehavior": "STOP_ON_FIRST_TOOL"}))).await;
    let ended = stage.run(&a, "Go").await;
    assert_eq!((ended.output(), &ended.run["currentAgent"]["name"]), ("This is B.".to_owned(), &json!("B")));
    let calls = ["transfer_to_b", "transfer_to_c", "nope", "look"];
    let calls: Vec<Value> = calls.iter().enumerate().map(|(at, name)| call(1, at, name)).collect();
    assert_eq!(
        stage.model.requests()[1].messages(),
        [
            json!({"role": "user", "content": "Go"}),
            json!({"role": "assistant", "content": "One moment.", "tool_calls": calls}),
            output(1, 3, "seen"),
            output(1, 2, "Tool 'nope' not found."),
            output(1, 1, "Multiple handoffs detected, ignoring this one."),
            output(1, 0, r#"{"assistant": "B"}"#),
        ]
    );
    assert_eq!(ended.of_type("HandoffItem").len(), 1);
}

async fn an_agent_is_handed_back_to_as_it_was(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let forced = json!({"toolChoice": "required"});
    let a = stage.agent(json!({"name": "A", "publish": false, "modelSettings": forced})).await;
    let b = json!({"name": "B", "modelSettings": forced, "handoffs": [{"agentId": a}], "publish": false});
    let b = stage.agent(b).await;
    update_agent(stage.client(), &a, json!({"handoffs": [{"agentId": b}], "maxTurns": 4})).await;
    crate::steps::publish(stage.client(), &a).await;
    let there = |name: &str| Reply::tool_call(name, json!({}));
    stage.model.script([there("transfer_to_b"), there("transfer_to_a"), there("transfer_to_b"), Reply::text("Done")]);
    let ended = stage.run(&a, "Go").await;
    assert_eq!((ended.output(), &ended.run["turns"]), ("Done".to_owned(), &json!(4)));
    assert_eq!(ended.run["currentAgent"]["name"], "B");
    let at_work: Vec<String> = ended.of_type("UsageItem").iter().map(|item| text(&item["agentName"])).collect();
    assert_eq!(at_work, ["A", "B", "A", "B"]);
    // Each agent's choice is forced until it has used a tool itself, also over being handed back to.
    let requests = stage.model.requests();
    let forced: Vec<bool> = requests.iter().map(|request| request.body["tool_choice"] == "required").collect();
    assert_eq!(forced, [true, true, false, false]);

    // Handoffs do not start the count of turns anew: the limit is the first agent's.
    let replies = ["transfer_to_b", "transfer_to_a", "transfer_to_b", "transfer_to_a"].map(there);
    stage.model.script(replies);
    assert_eq!(stage.run(&a, "Go").await.error(), "MAX_TURNS");
    assert_eq!(stage.model.requests().len(), 8);
}
