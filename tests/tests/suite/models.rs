//! Models over both of OpenAI's APIs, and what becomes of a run whose model is not to be had.

use cloister_tests::Reply;
use cloister_tests::app::TestAppBuilder;
use cloister_tests::model_server::{Api, RecordedRequest};
use serde_json::{Value, json};

use crate::both::on_both;
use crate::ledger::{rows_of, uuid};
use crate::steps::{Stage, refusals, try_create_agent};

on_both!(
    a_tool_loop_over_the_responses_api_sends_everything_back,
    a_response_that_the_provider_ends_itself_fails_the_run_and_is_charged,
    the_first_model_that_is_there_answers_and_is_charged_at_its_price,
    what_comes_back_before_an_answer_decides_about_the_next_model,
);

/// Models beside the scripted one: `thinker` is asked over the Responses API, `spare` costs twice as much, `small` gives
/// few tokens, and `away`'s provider is not there.
fn with_models(builder: TestAppBuilder) -> TestAppBuilder {
    let model = |name: &str, provider: &str, max: u32, input: u32, api: &str| {
        format!(
            "[[models]]\nname = \"{name}\"\nprovider = \"{provider}\"\ncontext_window = 128000\nmax_output_tokens = {max}\n\
             {api}\n[models.price]\ninput = \"{input}.00\"\noutput = \"{input}.00\"\n"
        )
    };
    builder
        .config(&model("thinker", "scripted", 16_384, 1, "api = \"responses\""))
        .config(&model("spare", "scripted", 16_384, 2, ""))
        .config(&model("small", "scripted", 300, 1, ""))
        .config(&model("away", "away", 16_384, 1, ""))
        .env("CLOISTER_PROVIDERS__AWAY__BASE_URL", "http://127.0.0.1:1/v1")
        .env("CLOISTER_PROVIDERS__AWAY__ATTEMPTS", "1")
        .env("CLOISTER_PROVIDERS__SCRIPTED__ATTEMPTS", "2")
}

fn asked(requests: &[RecordedRequest]) -> Vec<&str> {
    requests.iter().map(RecordedRequest::model).collect()
}

async fn a_tool_loop_over_the_responses_api_sends_everything_back(builder: TestAppBuilder) {
    let stage = Stage::set(with_models(builder)).await;
    stage.tools.always(|_| cloister_tests::ToolAnswer::text("sunny"));
    stage.model.script([
        Reply::tool_call("weather", json!({"city": "Rome"}))
            .call_id("call_a")
            .and_text("Let me see.")
            .reasoning("A city.")
            .encrypted_reasoning("gAAAA\0")
            .usage(100, 20)
            .cached(60)
            .reasoning_tokens(5),
        Reply::text("Sunny.").usage(130, 5),
    ]);
    let settings = json!({
        "temperature": 0.5, "maxOutputTokens": 900, "toolChoice": "weather", "parallelToolCalls": false, "reasoningEffort": "LOW",
    });
    let agent = json!({"model": "thinker", "tools": [stage.tool("weather")], "modelSettings": settings});
    let agent = stage.agent(agent).await;
    let (conversation, ended) = stage.open_conversation(&agent, "How is Rome?").await;
    assert_eq!(ended.output(), "Sunny.");
    assert_eq!(ended.of_type("ReasoningItem")[0]["text"], "A city.");
    let usage: Vec<&Value> = ended.of_type("UsageItem").iter().map(|item| &item["model"]).collect();
    assert_eq!(usage, ["thinker", "thinker"]);

    let requests = stage.model.requests();
    assert!(requests.iter().all(|request| request.api == Api::Responses && request.charged.is_some()));
    let first = &requests[0].body;
    let tools = &first["tools"];
    let expected = json!({
        "model": "thinker",
        "instructions": "Be brief.",
        "input": [{"role": "user", "content": "How is Rome?"}],
        "include": [],
        "tools": tools,
        "temperature": 0.5,
        "max_output_tokens": 900,
        "tool_choice": {"type": "function", "name": "weather"},
        "parallel_tool_calls": false,
        "reasoning": {"effort": "low"},
        "stream": true,
    });
    assert_eq!(first, &expected);
    assert_eq!((&tools[0]["type"], &tools[0]["name"]), (&json!("function"), &json!("weather")));
    let summary = json!([{"type": "summary_text", "text": "A city."}]);
    let text = |text: &str| json!([{"type": "output_text", "annotations": [], "logprobs": [], "text": text}]);
    let message = |id: &str, said: &str| json!({"id": id, "type": "message", "status": "completed", "role": "assistant", "content": text(said)});
    // No database holds a NUL.
    let turn = [
        json!({"role": "user", "content": "How is Rome?"}),
        json!({"id": "rs_00000001", "type": "reasoning", "summary": summary, "encrypted_content": "gAAAA\u{fffd}"}),
        message("msg_00000001", "Let me see."),
        json!({"id": "fc_0_00000001", "type": "function_call", "status": "completed", "call_id": "call_a",
               "name": "weather", "arguments": "{\"city\":\"Rome\"}"}),
        json!({"type": "function_call_output", "call_id": "call_a", "output": "sunny"}),
    ];
    assert_eq!(requests[1].input(), turn);
    assert!(requests[1].body.get("tool_choice").is_none(), "a tool was used");

    // A later run of the conversation is shown the same, over either API.
    stage.model.script([Reply::text("Still.")]);
    assert_eq!(stage.say(&agent, &conversation, "And now?").await.output(), "Still.");
    let third = &stage.model.requests()[2];
    assert_eq!(third.input()[..5], turn);
    assert_eq!(third.input()[5..], [message("msg_00000002", "Sunny."), json!({"role": "user", "content": "And now?"})]);
    stage.model.script([Reply::text("Indeed.")]);
    let chatting = stage.agent(json!({"name": "Chat"})).await;
    assert_eq!(stage.say(&chatting, &conversation, "Sure?").await.output(), "Indeed.");
    let fourth = stage.model.requests().pop().unwrap();
    assert_eq!(fourth.api, Api::ChatCompletions);
    let call = json!({"id": "call_a", "type": "function",
                      "function": {"name": "weather", "arguments": "{\"city\":\"Rome\"}"}});
    let said = json!({"role": "assistant", "content": "Let me see.", "tool_calls": [call]});
    assert_eq!(fourth.messages()[2], said);
    // And what Chat Completions answered goes over the Responses API.
    stage.model.script([Reply::text("Yes.")]);
    assert_eq!(stage.say(&agent, &conversation, "Really?").await.output(), "Yes.");
    let mut indeed = message("", "Indeed.");
    indeed.as_object_mut().unwrap().remove("id");
    let fifth = stage.model.requests().pop().unwrap();
    assert_eq!(fifth.input()[fifth.input().len() - 2], indeed);

    let db = stage.app.database().await;
    let row = &rows_of(&db, &ended.id()).await[0];
    let buckets = [row.input_tokens, row.cache_read_tokens, row.output_tokens, row.reasoning_tokens];
    assert_eq!((row.model.as_str(), buckets, row.estimated), ("thinker", [40, 60, 20, 5], false));
}

async fn a_response_that_the_provider_ends_itself_fails_the_run_and_is_charged(builder: TestAppBuilder) {
    let stage = Stage::set(with_models(builder)).await;
    let agent = stage.agent(json!({"model": "thinker", "fallbackModels": ["spare"]})).await;
    let db = stage.app.database().await;
    let ends = [
        (Reply::incomplete("Half", "max_output_tokens"), "MODEL_BEHAVIOR", "max_output_tokens"),
        (Reply::incomplete("Ha", "content_filter"), "MODEL_BEHAVIOR", "content_filter"),
        (Reply::failed("server_error", "Sorry."), "MODEL_BEHAVIOR", "Sorry."),
        (Reply::text("Half").fail_in_stream("overloaded"), "MODEL_BEHAVIOR", "overloaded"),
        (Reply::refusal("I won't."), "MODEL_REFUSAL", "I won't."),
        (Reply::text("Half").without_finish_reason(), "MODEL_UNAVAILABLE", "before it was complete"),
    ];
    for (number, (reply, code, reason)) in (1..).zip(ends) {
        stage.model.script([reply.usage(50, 7)]);
        let ended = stage.run(&agent, "Go").await;
        assert_eq!(ended.error(), code, "{}", ended.run);
        let message = ended.run["error"]["message"].as_str().unwrap();
        assert!(message.contains(reason), "{message}");
        assert_eq!(stage.model.requests().len(), number, "no answer that broke off is asked for again");
        let rows = rows_of(&db, &ended.id()).await;
        let charged: Vec<(&str, bool)> = rows.iter().map(|row| (row.model.as_str(), row.input_tokens > 0)).collect();
        assert_eq!(charged, [("thinker", true)]);
    }
}

async fn the_first_model_that_is_there_answers_and_is_charged_at_its_price(builder: TestAppBuilder) {
    let stage = Stage::set(with_models(builder)).await;
    // Nobody has configured OpenAI.
    let models = json!({"model": "gpt-4o", "fallbackModels": ["away", "scripted", "spare"],
                        "modelSettings": {"maxOutputTokens": 900}});
    let agent = stage.agent(models).await;
    stage.model.script([Reply::status(503), Reply::status(429).retry_after(0), Reply::text("Spared.").usage(100, 10)]);
    let ended = stage.run(&agent, "Hi").await;
    assert_eq!(ended.output(), "Spared.");
    assert_eq!(ended.of_type("UsageItem")[0]["model"], "spare");
    assert_eq!(asked(&stage.model.requests()), ["scripted-1", "scripted-1", "spare"]);
    let db = stage.app.database().await;
    let rows = rows_of(&db, &ended.id()).await;
    let charged: Vec<(&str, i64)> = rows.iter().map(|row| (row.model.as_str(), row.cost)).collect();
    assert_eq!(charged, [("spare", 2_000 * 110)]);
    assert_eq!((rows[0].run_id, rows[0].attempt), (Some(uuid(&ended.id())), 4), "away once, scripted twice");

    // A model that gives less than it is asked for is asked for what it gives.
    let agent = json!({"name": "Small", "model": "gpt-4o", "fallbackModels": ["small"],
                       "modelSettings": {"maxOutputTokens": 900}});
    let agent = stage.agent(agent).await;
    stage.model.script([Reply::text("Yes.")]);
    assert_eq!(stage.run(&agent, "Hi").await.output(), "Yes.");
    assert_eq!(stage.model.requests().pop().unwrap().max_tokens(), Some(300));
}

async fn what_comes_back_before_an_answer_decides_about_the_next_model(builder: TestAppBuilder) {
    let stage = Stage::set(with_models(builder)).await;
    let agent = stage.agent(json!({"fallbackModels": ["spare"]})).await;
    let db = stage.app.database().await;

    stage.model.script([Reply::status(400).error_message("Too odd.")]);
    assert_eq!(stage.run(&agent, "Refused").await.error(), "MODEL_REJECTED");
    assert_eq!(asked(&stage.model.requests()), ["scripted-1"]);

    // An answer that broke off after its head may have been charged; it is not asked for anew.
    stage.model.script([Reply::text("Half of it").usage(50, 7).cut_after_bytes(300)]);
    let broken = stage.run(&agent, "Broken").await;
    assert_eq!(broken.error(), "MODEL_UNAVAILABLE");
    assert_eq!(stage.model.requests().len(), 2);
    assert_eq!(rows_of(&db, &broken.id()).await.len(), 1);

    // A request without any answer may have been charged too: each attempt is, at its own model's price.
    stage.model.script([Reply::drop_connection(), Reply::drop_connection(), Reply::text("There.").usage(30, 3)]);
    let dropped = stage.run(&agent, "Dropped").await;
    assert_eq!(dropped.output(), "There.");
    let rows = rows_of(&db, &dropped.id()).await;
    let charged: Vec<(&str, bool)> = rows.iter().map(|row| (row.model.as_str(), row.estimated)).collect();
    assert_eq!(charged, [("scripted", true), ("scripted", true), ("spare", false)]);

    stage.model.script([503; 4].map(Reply::status));
    let none = stage.run(&agent, "None").await;
    assert_eq!(none.error(), "MODEL_UNAVAILABLE");
    let message = none.run["error"]["message"].as_str().unwrap();
    assert!(message.contains("scripted: ") && message.contains("spare: "), "{message}");
    assert!(rows_of(&db, &none.id()).await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn hosted_tools_go_to_providers_that_have_them() {
    let stage = Stage::set(with_models(cloister_tests::TestApp::builder())).await;
    let hosted = json!([{"hosted": {"name": "web_search", "config": {"search_context_size": "low"}}}]);
    let refused = try_create_agent(stage.client(), json!({"tools": hosted})).await;
    assert_eq!(refusals(&refused).len(), 1, "{refused}");
    let fallback = json!({"model": "thinker", "fallbackModels": ["spare"], "tools": hosted});
    assert_eq!(refusals(&try_create_agent(stage.client(), fallback).await).len(), 1);

    let search = json!({"action": {"type": "search", "query": "Rome"}});
    stage.model.script([Reply::text("Found.").and_hosted_call("web_search_call", search), Reply::text("Yes.")]);
    let settings = json!({"toolChoice": "web_search"});
    let agent = json!({"name": "Finder", "model": "thinker", "tools": hosted, "modelSettings": settings});
    let agent = stage.agent(agent).await;
    let (conversation, ended) = stage.open_conversation(&agent, "Find Rome").await;
    assert_eq!(ended.output(), "Found.");
    assert_eq!(ended.of_type("ToolCallItem")[0]["name"], "web_search_call");
    assert_eq!(stage.say(&agent, &conversation, "Sure?").await.output(), "Yes.");

    let requests = stage.model.requests();
    assert_eq!(requests[0].body["tools"], json!([{"type": "web_search", "search_context_size": "low"}]));
    assert_eq!(requests[0].body["tool_choice"], json!({"type": "web_search"}));
    let call = json!({"id": "ws_0_00000001", "type": "web_search_call", "status": "completed",
                      "action": {"type": "search", "query": "Rome"}});
    assert_eq!(requests[1].input()[1], call);

    // Chat Completions has no words for such a call.
    let chatting = stage.agent(json!({"name": "Chat"})).await;
    let ended = stage.say(&chatting, &conversation, "And you?").await;
    assert_eq!(ended.error(), "MODEL_REJECTED");
    assert!(ended.run["error"]["message"].as_str().unwrap().contains("web_search_call"), "{}", ended.run);
    assert_eq!(stage.model.requests().len(), 2);
}
