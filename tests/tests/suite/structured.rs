//! Agents whose output is a value, what of a history is shown, and runs that go on when there are tokens again.

use cloister_tests::Reply;
use cloister_tests::app::TestAppBuilder;
use sea_orm::ConnectionTrait;
use serde_json::{Value, json};

use super::both::on_both;
use super::calls::done;
use super::steps::{Stage, ended, run, start, text, until};

on_both!(
    an_output_is_a_value_of_its_schema,
    a_history_is_limited_to_whole_turns,
    a_paused_run_goes_on_when_a_limit_is_raised,
    a_paused_run_goes_on_in_the_new_month,
);

async fn an_output_is_a_value_of_its_schema(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let city = json!({"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]});
    let agent = stage.agent(json!({"outputSchema": city, "maxTurns": 2})).await;
    stage.model.script([Reply::text(r#"{"city": "Rome"}"#)]);
    let ran = stage.run(&agent, "Where?").await;
    assert_eq!((ran.output().as_str(), &ran.run["outputJson"]), (r#"{"city": "Rome"}"#, &json!({"city": "Rome"})));
    let strict = with_closed(city);
    let format = json!({
        "type": "json_schema", "json_schema": {"name": "final_output", "schema": strict, "strict": true},
    });
    assert_eq!(stage.model.requests()[0].body["response_format"], format);
    // A NUL by its escape, which PostgreSQL can't store.
    stage.model.script([Reply::text("{\"city\": \"Ro\\u0000me\"}")]);
    assert_eq!(stage.run(&agent, "Where?").await.run["outputJson"], json!({"city": "Ro\u{fffd}me"}));
    for bad in ["Rome", r#"{"city": 1}"#, r#"{"town": "Rome"}"#, r#"{"city": "Rome""#] {
        stage.model.script([Reply::text(bad)]);
        let ran = stage.run(&agent, "Where?").await;
        assert_eq!((ran.error().as_str(), &ran.run["outputJson"]), ("MODEL_BEHAVIOR", &Value::Null), "{bad}");
    }
    // No text: the same is asked again, which is a turn.
    stage.model.script([Reply::text(""), Reply::text(r#"{"city": "Oslo"}"#)]);
    let ran = stage.run(&agent, "Where?").await;
    assert_eq!((&ran.run["outputJson"]["city"], &ran.run["turns"]), (&json!("Oslo"), &json!(2)));
    let requests = stage.model.requests();
    let [.., first, second] = &requests[..] else { panic!("not two") };
    assert_eq!(first.body, second.body);
    stage.model.script([Reply::text(""), Reply::text("")]);
    assert_eq!(stage.run(&agent, "Where?").await.error(), "MAX_TURNS");
    stage.model.script([Reply::refusal("No.")]);
    assert_eq!(stage.run(&agent, "Where?").await.error(), "MODEL_REFUSAL");

    let list = stage.agent(json!({"outputSchema": {"type": "array", "items": {"type": "string"}}})).await;
    stage.model.script([Reply::text(r#"{"response": ["a", "b"]}"#)]);
    let ran = stage.run(&list, "Which?").await;
    assert_eq!(ran.run["outputJson"], json!(["a", "b"]));
    let sent = stage.model.requests().pop().unwrap().body["response_format"]["json_schema"]["schema"].clone();
    assert_eq!((&sent["required"], &sent["additionalProperties"]), (&json!(["response"]), &json!(false)));
    // As a tool it says its value.
    let ask = json!({"agent": {"name": "ask", "description": "Asks.", "agentId": list}});
    let outer = stage.agent(json!({"name": "Outer", "tools": [ask]})).await;
    let answer = Reply::text(r#"{"response": ["a"]}"#);
    stage.model.script([Reply::tool_call("ask", json!({"input": "?"})), answer, Reply::text("Done.")]);
    assert_eq!(stage.run(&outer, "Go").await.outputs()[0].0, r#"["a"]"#);
}

fn with_closed(mut schema: Value) -> Value {
    schema["additionalProperties"] = json!(false);
    schema
}

async fn a_history_is_limited_to_whole_turns(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let agent = stage.agent(json!({"tools": [stage.tool("look")]})).await;
    // First · call and output · One. · Second · Two.: six items in five parts.
    for (limit, shown) in [
        (json!(null), vec!["user", "assistant", "tool", "assistant", "user", "assistant", "user"]),
        (json!(6), vec!["user", "assistant", "tool", "assistant", "user", "assistant", "user"]),
        (json!(5), vec!["assistant", "tool", "assistant", "user", "assistant", "user"]),
        (json!(4), vec!["assistant", "user", "assistant", "user"]),
        (json!(1), vec!["assistant", "user"]),
    ] {
        stage.model.script([Reply::tool_call("look", json!({})), Reply::text("One.")]);
        let (conversation, _) = stage.open_conversation(&agent, "First").await;
        stage.model.script([Reply::text("Two."), Reply::text("More.")]);
        stage.say(&agent, &conversation, "Second").await;
        let input = json!({
            "agentId": agent, "conversationId": conversation, "input": "More?", "historyLimit": limit,
        });
        let id = start(stage.client(), input).await;
        ended(stage.client(), &id).await;
        let request = stage.model.requests().pop().unwrap();
        let roles: Vec<_> = request.messages()[1..].iter().map(|message| text(&message["role"])).collect();
        assert_eq!(roles, shown, "{limit}");
    }
}

async fn a_paused_run_goes_on_when_a_limit_is_raised(app: TestAppBuilder) {
    let stage = Stage::set(app.env("CLOISTER_RUNS__LEASE_SECONDS", "3")).await;
    let agent = stage.agent(json!({"modelSettings": {"maxOutputTokens": 300}, "tools": [stage.tool("look")]})).await;
    let admin = stage.app.admin();
    let tenant = &stage.tenant.id;
    done(&admin, "updateTenant", json!({"tenantId": tenant, "monthlyTokenLimit": 1000})).await;
    stage.model.script([Reply::tool_call("look", json!({})).usage(500, 300), Reply::text("Done.").usage(20, 5)]);
    let id = start(stage.client(), json!({"agentId": agent, "input": "Go"})).await;
    until("it is paused", || run(stage.client(), &id), |run| run["status"] == "PAUSED_QUOTA").await;
    done(&admin, "updateTenant", json!({"tenantId": tenant, "monthlyTokenLimit": 100_000})).await;
    let ran = ended(stage.client(), &id).await;
    assert_eq!((ran.output().as_str(), ran.run["turns"].as_i64()), ("Done.", Some(2)));
    let states: Vec<_> = ran.of_type("StatusItem").iter().map(|item| text(&item["status"])).collect();
    assert_eq!(states, ["PAUSED_QUOTA", "QUEUED", "SUCCEEDED"]);
}

async fn a_paused_run_goes_on_in_the_new_month(app: TestAppBuilder) {
    let stage = Stage::set(app.env("CLOISTER_RUNS__LEASE_SECONDS", "3")).await;
    let agent = stage.agent(json!({"modelSettings": {"maxOutputTokens": 300}, "tools": [stage.tool("look")]})).await;
    let limit = json!({"tenantId": stage.tenant.id, "monthlyTokenLimit": 1000});
    done(&stage.app.admin(), "updateTenant", limit).await;
    stage.model.script([Reply::tool_call("look", json!({})).usage(500, 300), Reply::text("Done.").usage(20, 5)]);
    let id = start(stage.client(), json!({"agentId": agent, "input": "Go"})).await;
    until("it is paused", || run(stage.client(), &id), |run| run["status"] == "PAUSED_QUOTA").await;
    // What a new month makes of it: all that there is lies in an earlier one.
    let db = stage.app.database().await;
    for sql in [
        "UPDATE quota_counters SET period = '2020-01' WHERE period <> 'run'",
        "UPDATE runs SET paused_at = '2020-01-31T12:00:00+00:00'",
    ] {
        db.execute_unprepared(sql).await.unwrap();
    }
    let ran = ended(stage.client(), &id).await;
    assert_eq!((ran.output().as_str(), ran.run["turns"].as_i64()), ("Done.", Some(2)));
}
