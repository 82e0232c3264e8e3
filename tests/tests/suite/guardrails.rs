//! Guardrails at every stage, by every rule.

use cloister_tests::Reply;
use cloister_tests::app::TestAppBuilder;
use serde_json::{Value, json};

use super::both::on_both;
use super::steps::{Stage, ended, start, text};

on_both!(
    an_input_guardrail_is_asked_before_the_model,
    a_parallel_guardrail_lets_no_tool_run_before_its_verdict,
    what_an_output_guardrail_withholds_stays_out_of_the_conversation,
    a_tool_guardrail_rejects_or_ends_the_run,
    an_agent_decides_and_one_without_a_verdict_trips,
    a_nested_runs_guardrails_are_its_own,
);

fn guardrail(name: &str, stage: &str, rule: Value) -> Value {
    json!({"name": name, "stage": stage, "rule": rule})
}

fn secret() -> Value {
    json!({"regex": {"pattern": r"(?i)secret|\d{4}"}})
}

async fn an_input_guardrail_is_asked_before_the_model(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let rules = [
        guardrail("no_secrets", "INPUT", secret()),
        guardrail("must_greet", "INPUT", json!({"regex": {"pattern": "(?i)^hello", "tripOnMatch": false}})),
        guardrail("short", "INPUT", json!({"maxLength": 20})),
    ];
    let agent = stage.agent(json!({"guardrails": rules})).await;
    stage.model.always(|_| Reply::text("Hello."));
    for (input, tripped) in [
        ("hello you", None),
        ("Hello, my SECRET", Some("no_secrets")),
        ("Hi you", Some("must_greet")),
        ("hello 日本語日本語日本語日本語日本語", Some("short")),
        ("hello 日本語日本語日本語日本語日本", None),
    ] {
        let before = stage.model.served().requests;
        let run = stage.run(&agent, input).await;
        match tripped {
            None => assert_eq!(run.output(), "Hello.", "{input}"),
            Some(name) => {
                assert_eq!(run.error(), "GUARDRAIL", "{input}");
                assert!(text(&run.run["error"]["message"]).contains(name), "{}", run.run);
                let items = run.of_type("GuardrailItem");
                assert_eq!((items.len(), &items[0]["name"], &items[0]["stage"]), (1, &json!(name), &json!("INPUT")));
                assert!(!text(&items[0]["reason"]).contains("SECRET"));
                assert_eq!(stage.model.served().requests, before, "{input}: no model call before the verdict");
            }
        }
    }
    let json = stage
        .agent(json!({"guardrails": [guardrail("form", "INPUT", json!({"jsonSchema": {
            "type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}
        }}))]}))
        .await;
    assert_eq!(stage.run(&json, r#"{"city": "Rome"}"#).await.output(), "Hello.");
    for input in [r#"{"city": 1}"#, "Rome", "[]"] {
        assert_eq!(stage.run(&json, input).await.error(), "GUARDRAIL", "{input}");
    }
    // Only the first agent's, and only at the first turn; the user's input stays.
    let other = stage.agent(json!({"name": "Other", "instructions": "other", "guardrails": rules})).await;
    let first = stage.agent(json!({"name": "First", "handoffs": [{"agentId": other}]})).await;
    stage.model.script([Reply::tool_call("transfer_to_other", json!({}))]);
    assert_eq!(stage.run(&first, "my secret").await.output(), "Hello.");
    let (conversation, tripped) = stage.open_conversation(&agent, "Hello secret").await;
    assert_eq!(tripped.error(), "GUARDRAIL");
    assert_eq!(stage.say(&agent, &conversation, "hello again").await.output(), "Hello.");
    let last = stage.model.requests().pop().unwrap();
    let said: Vec<_> = last.messages()[1..].iter().map(|message| text(&message["content"])).collect();
    assert_eq!(said, ["Hello secret", "hello again"]);
}

async fn a_parallel_guardrail_lets_no_tool_run_before_its_verdict(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let judge = stage.agent(json!({"name": "Judge", "instructions": "judge", "outputSchema": verdict_schema()})).await;
    let mut parallel = guardrail("judge", "INPUT", json!({"agentId": judge}));
    parallel["parallel"] = json!(true);
    let agent = stage.agent(json!({"tools": [stage.tool("look")], "guardrails": [parallel]})).await;
    let verdict = |tripped: bool| Reply::text(json!({"tripped": tripped, "reason": "Why."}).to_string());
    for trips in [false, true] {
        stage.model.always(move |request| match request.messages()[0]["content"].as_str() {
            Some("judge") => verdict(trips).hold(),
            _ if request.messages().iter().any(|message| message["role"] == "tool") => Reply::text("Done."),
            _ => Reply::tool_call("look", json!({})),
        });
        let before = stage.tools.requests().len();
        let requests = stage.model.requests().len();
        let id = start(stage.client(), json!({"agentId": agent, "input": "Go"})).await;
        // Both are asked side by side; the response is there, and the tool waits.
        stage.model.wait_for_requests(requests + 2).await;
        stage.model.wait_for_held(1).await;
        super::steps::wait_for_item(stage.client(), &id, |item| item["__typename"] == "ToolCallItem").await;
        assert_eq!(stage.tools.requests().len(), before);
        stage.model.release_all();
        let run = ended(stage.client(), &id).await;
        if trips {
            assert_eq!(run.error(), "GUARDRAIL");
            assert_eq!(stage.tools.requests().len(), before, "no tool has run");
        } else {
            assert_eq!(run.output(), "Done.");
            assert_eq!(stage.tools.requests().len(), before + 1);
        }
    }
}

async fn what_an_output_guardrail_withholds_stays_out_of_the_conversation(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let guardrails = json!([guardrail("no_secrets", "OUTPUT", secret())]);
    let agent = stage.agent(json!({"tools": [stage.tool("look")], "guardrails": guardrails})).await;
    stage.model.script([
        Reply::tool_call("look", json!({})).call_id("call_1"),
        Reply::text("The secret is 1234."),
        Reply::text("All well."),
    ]);
    let (conversation, run) = stage.open_conversation(&agent, "Tell me").await;
    assert_eq!(run.error(), "GUARDRAIL");
    assert_eq!(run.of_type("GuardrailItem")[0]["stage"], "OUTPUT");
    assert_eq!(stage.say(&agent, &conversation, "And?").await.output(), "All well.");
    let shown = stage.model.requests()[2].messages()[1..].to_vec();
    let roles: Vec<_> = shown.iter().map(|message| text(&message["role"])).collect();
    assert_eq!(roles, ["user", "assistant", "tool", "user"], "the turn before stays");
    assert!(!json!(shown).to_string().contains("1234"), "{shown:?}");
    let messages = "query ($id: ID!) { conversation(id: $id) { messages { nodes { ... on MessageItem { text } } } } }";
    let listed = stage.client().data(messages, json!({"id": conversation})).await;
    let texts: Vec<_> =
        listed["conversation"]["messages"]["nodes"].as_array().unwrap().iter().map(|m| text(&m["text"])).collect();
    assert_eq!(texts, ["Tell me", "And?", "All well."]);

    // An output that came from a tool: the call stays, its output is replaced.
    let fields = json!({
        "tools": [stage.tool("look")], "guardrails": guardrails, "toolUseBehavior": "STOP_ON_FIRST_TOOL",
    });
    let agent = stage.agent(fields).await;
    stage.tools.script([cloister_tests::ToolAnswer::text("secret 9999")]);
    stage
        .model
        .script([Reply::text("Looking.").and_tool_call("look", json!({})).call_id("call_2"), Reply::text("Fine.")]);
    let (conversation, run) = stage.open_conversation(&agent, "Look").await;
    assert_eq!(run.error(), "GUARDRAIL");
    assert_eq!(stage.say(&agent, &conversation, "Well?").await.output(), "Fine.");
    let shown = stage.model.requests().pop().unwrap().messages()[1..].to_vec();
    assert_eq!(shown[1]["content"], Value::Null);
    assert_eq!(shown[2]["content"], "Output withheld by an output guardrail.");
    assert!(!json!(shown).to_string().contains("9999"));
}

async fn a_tool_guardrail_rejects_or_ends_the_run(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let mut on_input = guardrail("args", "TOOL_INPUT", secret());
    on_input["tool"] = json!("look");
    on_input["message"] = json!("Not with that.");
    let on_output = guardrail("answers", "TOOL_OUTPUT", json!({"maxLength": 5}));
    let mut ends = guardrail("never", "TOOL_INPUT", json!({"regex": {"pattern": "forbidden"}}));
    ends["onTrip"] = json!("FAIL");
    let any = json!({"type": "object", "properties": {"q": {"type": "string"}}});
    let tools = ["look", "ask"].map(|name| {
        let mut tool = stage.tool(name);
        tool["webhook"]["parameters"] = any.clone();
        tool
    });
    let agent = stage.agent(json!({"tools": tools, "guardrails": [on_input, on_output, ends]})).await;
    stage.model.script([
        Reply::tool_call("look", json!({"q": "secret"})).and_tool_call("ask", json!({"q": "secret"})),
        Reply::tool_call("look", json!({"q": "fine"})),
        Reply::text("Done."),
    ]);
    stage.tools.always(|request| match request.path.as_str() {
        "/ask" => cloister_tests::ToolAnswer::text("ok"),
        _ => cloister_tests::ToolAnswer::text("far too long"),
    });
    let run = stage.run(&agent, "Go").await;
    assert_eq!(run.output(), "Done.");
    let told: Vec<_> = run.outputs().into_iter().map(|(text, _)| text).collect();
    assert!(told.contains(&"Not with that.".to_owned()) && told.contains(&"ok".to_owned()), "{told:?}");
    assert!(told[2].starts_with("Rejected by the guardrail 'answers'"), "{told:?}");
    assert_eq!(stage.tools.requests().iter().map(|r| r.path.clone()).collect::<Vec<_>>(), ["/ask", "/look"]);
    let names: Vec<_> = run.of_type("GuardrailItem").iter().map(|item| text(&item["name"])).collect();
    assert_eq!(names, ["args", "answers"]);

    stage.model.script([Reply::tool_call("ask", json!({"q": "forbidden"}))]);
    let run = stage.run(&agent, "Go").await;
    assert_eq!(run.error(), "GUARDRAIL");
    assert!(text(&run.run["error"]["message"]).contains("never"));
    assert_eq!(stage.tools.requests().len(), 2);
}

fn verdict_schema() -> Value {
    json!({
        "type": "object", "required": ["tripped", "reason"], "additionalProperties": false,
        "properties": {"tripped": {"type": "boolean"}, "reason": {"type": "string"}},
    })
}

async fn an_agent_decides_and_one_without_a_verdict_trips(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let judge = stage.agent(json!({"name": "Judge", "instructions": "judge", "outputSchema": verdict_schema()})).await;
    let agent = stage.agent(json!({"guardrails": [guardrail("judge", "OUTPUT", json!({"agentId": judge}))]})).await;
    for (answer, reason) in [
        (Reply::text(r#"{"tripped": false, "reason": "Fine."}"#), None),
        (Reply::text(r#"{"tripped": true, "reason": "Rude."}"#), Some("Rude.")),
        (Reply::text("I would say no."), Some("no verdict")),
        (Reply::refusal("I judge nobody."), Some("no verdict")),
        (Reply::status(400), Some("no verdict")),
    ] {
        stage.model.script([Reply::text("Hello."), answer]);
        let run = stage.run(&agent, "Greet").await;
        match reason {
            None => assert_eq!(run.output(), "Hello."),
            Some(reason) => {
                assert_eq!(run.error(), "GUARDRAIL");
                assert!(text(&run.run["error"]["message"]).contains(reason), "{}", run.run);
            }
        }
        let asked = stage.model.requests().pop().unwrap();
        assert_eq!(asked.messages()[1..], [json!({"role": "user", "content": "Hello."})]);
    }
    let usage = stage.client().data("{ usage { byAgent { agent { name } usage { requests } } } }", json!({})).await;
    let judged = usage["usage"]["byAgent"].as_array().unwrap().iter().find(|line| line["agent"]["name"] == "Judge");
    assert_eq!(judged.unwrap()["usage"]["requests"], 4, "an error status charges nothing");
}

async fn a_nested_runs_guardrails_are_its_own(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let rules = json!([guardrail("in", "INPUT", secret()), guardrail("out", "OUTPUT", secret())]);
    let inner = stage.agent(json!({"name": "Inner", "instructions": "inner", "guardrails": rules})).await;
    let ask = json!({"agent": {"name": "ask", "description": "Asks.", "agentId": inner}});
    let outer = stage.agent(json!({"name": "Outer", "instructions": "outer", "tools": [ask]})).await;
    for (input, answer, told) in [
        ("plain", Some("Fine."), "Fine."),
        ("secret", None, "An error occurred while running the tool. Please try again."),
        ("plain", Some("A secret."), "An error occurred while running the tool. Please try again."),
    ] {
        stage.model.script([Reply::tool_call("ask", json!({"input": input}))]);
        stage.model.script(answer.map(Reply::text));
        stage.model.script([Reply::text("Done.")]);
        let run = stage.run(&outer, "Go").await;
        assert_eq!((run.output().as_str(), run.outputs()[0].0.as_str()), ("Done.", told));
        assert_eq!(stage.model.unused(), 0);
    }
}
