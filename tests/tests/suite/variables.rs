//! Variables in instructions: filled in when a run starts, once, and with nothing but what the caller gave for them.

use cloister_tests::Reply;
use cloister_tests::app::TestAppBuilder;
use serde_json::{Value, json};

use crate::both::on_both;
use crate::steps::{Stage, ended, granted, publish, refusal, refusals, start, text, try_start, update_agent, with};

on_both!(
    values_are_filled_in_for_every_agent,
    what_is_filled_in_is_not_looked_at_again,
    values_are_asked_for_at_once_and_no_others_are_taken,
    values_are_part_of_what_an_idempotency_key_stands_for,
    values_are_bounded,
);

/// The system messages of the requests since the last time.
fn instructions(stage: &Stage, from: usize) -> Vec<String> {
    stage.model.requests()[from..].iter().map(|request| text(&request.messages()[0]["content"])).collect()
}

fn at(code: &str, field: &str) -> (String, String) {
    (code.to_owned(), field.to_owned())
}

async fn run(stage: &Stage, agent: &str, fields: Value) {
    let id = start(stage.client(), with(json!({"agentId": agent, "input": "Go"}), fields)).await;
    ended(stage.client(), &id).await.output();
}

async fn values_are_filled_in_for_every_agent(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    stage.model.always(|request| match request.tool_names().first() {
        Some(handoff) => Reply::tool_call(handoff, json!({})),
        None => Reply::text("Done"),
    });
    let b = stage.agent(json!({"name": "B", "instructions": "Be {{ tone }}, {{name}}."})).await;
    let a = json!({
        "name": "A", "handoffs": [{"agentId": b}],
        "instructions": r#"{{name}}: {{count}} {{rate}} {{sure}} {{ name }} \{{name}} {"a": {"b": 1}}"#,
    });
    let a = stage.agent(a).await;
    let given = |name: &str| json!({"name": name, "tone": "kind", "count": 3, "rate": 0.5, "sure": true});
    for name in ["Ada", "Grace", ""] {
        let from = stage.model.requests().len();
        run(&stage, &a, json!({"variables": given(name)})).await;
        let first = format!(r#"{name}: 3 0.5 true {name} {{{{name}}}} {{"a": {{"b": 1}}}}"#);
        assert_eq!(instructions(&stage, from), [first, format!("Be kind, {name}.")]);
    }
    // A draft and a pinned version ask for their own.
    update_agent(stage.client(), &a, json!({"instructions": "Draft of {{author}}", "handoffs": []})).await;
    let from = stage.model.requests().len();
    run(&stage, &a, json!({"draft": true, "variables": {"author": "Ada"}})).await;
    assert_eq!(publish(stage.client(), &a).await, 2);
    run(&stage, &a, json!({"variables": {"author": "Grace"}})).await;
    run(&stage, &a, json!({"version": 1, "variables": given("Ada")})).await;
    let told = instructions(&stage, from);
    assert_eq!((&told[..2], told.len()), (&["Draft of Ada".to_owned(), "Draft of Grace".to_owned()][..], 4));
    // What is read of the agent is what was written.
    let shown = "query ($id: ID!) { agent(id: $id) { instructions } }";
    let shown = stage.client().data(shown, json!({"id": b})).await;
    assert_eq!(shown["agent"]["instructions"], "Be {{ tone }}, {{name}}.");
}

async fn what_is_filled_in_is_not_looked_at_again(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    stage.model.always(|_| Reply::text("Done"));
    let id = stage.agent(json!({"instructions": "{{a}} and {{b}}"})).await;
    let variables = json!({"a": "{{b}}", "b": r"\{{a}} {{c}} {{"});
    let input = "My name is {{a}}, \\{{b}} {{nobody}} {{";
    run(&stage, &id, json!({"variables": variables, "input": input})).await;
    let request = &stage.model.requests()[0];
    assert_eq!(text(&request.messages()[0]["content"]), r"{{b}} and \{{a}} {{c}} {{");
    assert_eq!(request.last_user_text(), input);
    // Nor is what a conversation has said before.
    stage.model.always(|_| Reply::text("{{a}}"));
    let begin = json!({"agentId": id, "input": "Go", "newConversation": true, "variables": {"a": "x", "b": "y"}});
    let begun = granted(try_start(stage.client(), begin).await)["run"].clone();
    ended(stage.client(), &text(&begun["id"])).await.output();
    let again = json!({"conversationId": begun["conversation"]["id"], "variables": {"a": "z", "b": "y"}});
    run(&stage, &id, again).await;
    let last = stage.model.requests().last().unwrap().clone();
    let told: Vec<String> = last.messages().iter().map(|message| text(&message["content"])).collect();
    assert_eq!(told, ["z and y", "Go", "{{a}}", "Go"]);
}

async fn values_are_asked_for_at_once_and_no_others_are_taken(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let b = stage.agent(json!({"name": "B", "instructions": "{{c}} {{a}}"})).await;
    let a = stage.agent(json!({"instructions": "{{b}} {{b}}", "handoffs": [{"agentId": b}]})).await;
    for (variables, expected) in [
        (Value::Null, vec![at("INVALID", "variables")]),
        (json!({}), vec![at("INVALID", "variables")]),
        (json!({"a": "x", "b": "y"}), vec![at("INVALID", "variables")]),
        (
            json!({"a": "x", "d": 1, "e": 2}),
            vec![at("INVALID", "variables"), at("INVALID", "variables.d"), at("INVALID", "variables.e")],
        ),
        (json!({"a": "x", "b": "y", "c": "z", "B": "w"}), vec![at("INVALID", "variables.B")]),
    ] {
        for draft in [false, true] {
            let input = json!({"agentId": a, "input": "Go", "variables": variables, "draft": draft});
            let refused = try_start(stage.client(), input).await;
            assert_eq!(refusals(&refused), expected, "{variables}");
            if variables == json!({}) {
                assert!(text(&refused["errors"][0]["message"]).ends_with(": a, b, c."), "{refused}");
            }
        }
    }
    let run = stage.client().rest_post("/v1/run", &json!({"agent_id": a, "message": "Go"})).await;
    assert_eq!(run.status, 422, "{}", run.body);
    let runs = stage.client().data("{ runs { nodes { id } } }", json!({})).await;
    assert_eq!(runs["runs"]["nodes"], json!([]));
}

async fn values_are_part_of_what_an_idempotency_key_stands_for(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    stage.model.always(|_| Reply::text("Done"));
    let id = stage.agent(json!({"instructions": "{{a}} {{b}}"})).await;
    let input = |variables: &str| {
        let variables: Value = serde_json::from_str(variables).unwrap();
        json!({"agentId": id, "input": "Go", "idempotencyKey": "once", "variables": variables})
    };
    let first = start(stage.client(), input(r#"{"a": "1", "b": "2"}"#)).await;
    // In whatever order they are written.
    assert_eq!(start(stage.client(), input(r#"{"b": "2", "a": "1"}"#)).await, first);
    for other in [r#"{"a": "2", "b": "1"}"#, r#"{"a": "1", "b": ""}"#, "{}"] {
        let refused = try_start(stage.client(), input(other)).await;
        assert_eq!(refusal(&refused), at("IDEMPOTENCY_MISMATCH", "idempotencyKey"));
    }
    let limited = with(input(r#"{"a": "1", "b": "2"}"#), json!({"historyLimit": 5}));
    let refused = try_start(stage.client(), limited).await;
    assert_eq!(refusal(&refused), at("IDEMPOTENCY_MISMATCH", "idempotencyKey"));
    ended(stage.client(), &first).await.output();
    assert_eq!(stage.model.requests().len(), 1);
}

async fn values_are_bounded(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    stage.model.always(|_| Reply::text("Done"));
    // Each of many places takes the whole of a value.
    let id = stage.agent(json!({"instructions": "{{a}}".repeat(60)})).await;
    let input = |length: usize| json!({"agentId": id, "input": "Go", "variables": {"a": "x".repeat(length)}});
    assert_eq!(refusal(&try_start(stage.client(), input(20_000)).await), at("LIMIT_EXCEEDED", "variables"));
    let run = start(stage.client(), input(100)).await;
    ended(stage.client(), &run).await.output();
    assert_eq!(instructions(&stage, 0), ["x".repeat(6_000)]);
}
