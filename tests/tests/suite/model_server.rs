//! The scripted model server speaks the real API: the official `openai` client is the judge.

use cloister_tests::client::http;
use cloister_tests::model_server::{Api, Ending, Usage};
use cloister_tests::{ModelServer, Reply, node};
use futures_util::StreamExt;
use serde_json::{Value, json};

/// What the client prints of one call.
async fn openai(model: &ModelServer, call: &str, body: Value) -> Vec<Value> {
    let argument = json!({"baseURL": model.url(), "apiKey": "sk-test", "call": call, "body": body});
    node::run("openai.mjs", &argument).await
}

fn ask(text: &str) -> Value {
    json!({"model": "scripted-1", "messages": [{"role": "user", "content": text}]})
}

fn ask_with_tool(text: &str) -> Value {
    let mut body = ask(text);
    let parameters = json!({"type": "object", "properties": {"city": {"type": "string"}}});
    body["tools"] = json!([{"type": "function", "function": {"name": "weather", "parameters": parameters}}]);
    body
}

/// Joins what the chunks say of one field of the delta.
fn joined(lines: &[Value], pointer: &str) -> String {
    lines.iter().filter_map(|line| line.pointer(&format!("/chunk/choices/0/delta{pointer}"))?.as_str()).collect()
}

async fn post(model: &ModelServer, body: &Value) -> reqwest::Result<reqwest::Response> {
    http().post(format!("{}/chat/completions", model.url())).bearer_auth("sk-test").json(body).send().await
}

#[tokio::test]
async fn openai_client_streams_text_and_usage() {
    let model = ModelServer::start().await;
    model.script([Reply::text("Grüße aus Köln").usage(10, 5).cached(4).reasoning("hm").reasoning_tokens(2)]);
    let mut body = ask("hi");
    body["stream_options"] = json!({"include_usage": true});
    let lines = openai(&model, "stream", body).await;

    assert_eq!(joined(&lines, "/content"), "Grüße aus Köln");
    assert_eq!(joined(&lines, "/reasoning_content"), "hm");
    assert_eq!(lines.last(), Some(&json!({"complete": true})));
    let usage = &lines[lines.len() - 2]["chunk"]["usage"];
    assert_eq!(usage["total_tokens"], 15);
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 4);
    assert_eq!(usage["completion_tokens_details"]["reasoning_tokens"], 2);
    assert_eq!(lines[lines.len() - 3]["chunk"]["choices"][0]["finish_reason"], "stop");
    let served = model.served();
    assert_eq!((served.requests, served.prompt_tokens, served.completion_tokens, served.total), (1, 10, 5, 15));
    let request = &model.requests()[0];
    assert_eq!((request.ending, request.header("authorization")), (Ending::Completed, Some("Bearer sk-test")));
    assert_eq!(request.last_user_text(), "hi");
}

#[tokio::test]
async fn openai_client_streams_text_and_tool_calls() {
    let model = ModelServer::start().await;
    let paris = json!({"city": "Paris"});
    let rome = json!({"city": "Rome"});
    model.script([Reply::text("Wait.").and_tool_call("weather", paris.clone()).and_tool_call("weather", rome.clone())]);
    let lines = openai(&model, "stream", ask_with_tool("weather?")).await;

    assert_eq!(joined(&lines, "/content"), "Wait.");
    let calls: Vec<&Value> =
        lines.iter().filter_map(|line| line.pointer("/chunk/choices/0/delta/tool_calls/0")).collect();
    let ids: Vec<&Value> = calls.iter().map(|call| &call["id"]).filter(|id| id.is_string()).collect();
    assert_eq!(ids, ["call_00000001_0", "call_00000001_1"]);
    for (index, arguments) in [paris, rome].iter().enumerate() {
        let own = calls.iter().filter(|call| call["index"] == index);
        let text: String = own.filter_map(|call| call["function"]["arguments"].as_str()).collect();
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), *arguments);
    }
    let finish = lines.iter().filter_map(|line| line.pointer("/chunk/choices/0/finish_reason")?.as_str());
    assert_eq!(finish.collect::<Vec<_>>(), ["tool_calls"]);
}

#[tokio::test]
async fn openai_client_reads_an_answer_in_one_piece() {
    let model = ModelServer::start().await;
    model.script([Reply::tool_call("weather", json!({"city": "Paris"})).usage(7, 3), Reply::refusal("No.")]);
    let lines = openai(&model, "chat", ask_with_tool("weather?")).await;
    let choice = &lines[0]["completion"]["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls");
    assert_eq!(choice["message"]["content"], Value::Null);
    assert_eq!(choice["message"]["tool_calls"][0]["function"]["arguments"], r#"{"city":"Paris"}"#);
    assert_eq!(lines[0]["completion"]["usage"]["total_tokens"], 10);

    let lines = openai(&model, "chat", ask("again")).await;
    assert_eq!(lines[0]["completion"]["choices"][0]["message"]["refusal"], "No.");
    assert_eq!(model.served().requests, 2);
}

#[tokio::test]
async fn openai_client_lists_models() {
    let model = ModelServer::start().await;
    let lines = openai(&model, "models", Value::Null).await;
    assert_eq!((&lines[0]["model"]["id"], &lines[0]["model"]["object"]), (&json!("scripted-1"), &json!("model")));
    assert_eq!(model.served().requests, 0);
}

#[tokio::test]
async fn openai_client_maps_error_statuses() {
    let model = ModelServer::start().await;
    let cases = [
        (Reply::status(400), "BadRequestError", 400),
        (Reply::status(401), "AuthenticationError", 401),
        (Reply::status(403), "PermissionDeniedError", 403),
        (Reply::status(404), "NotFoundError", 404),
        (Reply::status(500), "InternalServerError", 500),
        (Reply::status(429).retry_after(3).error_code("insufficient_quota"), "RateLimitError", 429),
    ];
    let mut error = Value::Null;
    for (reply, class, status) in cases {
        model.script([reply]);
        error = openai(&model, "stream", ask("hi")).await[0]["error"].clone();
        assert_eq!((&error["class"], &error["status"]), (&json!(class), &json!(status)));
        assert!(error["requestID"].as_str().unwrap().starts_with("req_"));
    }
    assert_eq!((&error["code"], &error["retryAfter"]), (&json!("insufficient_quota"), &json!("3")));
    assert_eq!(model.served().total, 0);
}

#[tokio::test]
async fn requests_that_openai_refuses_are_refused() {
    let model = ModelServer::start().await;
    model.always(|_| Reply::text("taken"));
    let unanswered = json!([{"role": "assistant", "tool_calls": [{"id": "a"}]}, {"role": "user", "content": "hi"}]);
    let patches = [
        json!({"model": ""}),
        json!({"messages": []}),
        json!({"messages": [{"role": "user", "content": null}]}),
        json!({"messages": [{"role": "tool", "tool_call_id": "a", "content": "x"}]}),
        json!({"messages": unanswered}),
        json!({"tools": []}),
        json!({"tool_choice": "auto"}),
        json!({"parallel_tool_calls": true}),
        json!({"stream_options": {"include_usage": true}}),
    ];
    for patch in patches {
        let mut body = ask("hi");
        body.as_object_mut().unwrap().extend(patch.as_object().unwrap().clone());
        let response = post(&model, &body).await.unwrap();
        assert_eq!(response.status(), 400, "{patch}");
        assert_eq!(response.json::<Value>().await.unwrap()["error"]["type"], "invalid_request_error");
    }
    let unauthorised = http().post(format!("{}/chat/completions", model.url())).json(&ask("hi")).send().await.unwrap();
    assert_eq!(unauthorised.status(), 401);
    assert_eq!(model.served().requests, 0);
    assert_eq!(post(&model, &ask("hi")).await.unwrap().status(), 200);
}

#[tokio::test]
async fn an_exhausted_script_says_so() {
    let model = ModelServer::start().await;
    let answer: Value = post(&model, &ask("hi")).await.unwrap().json().await.unwrap();
    assert_eq!(answer["error"]["code"], "script_exhausted");
}

#[tokio::test]
async fn a_cut_comes_after_exactly_so_many_bytes() {
    let model = ModelServer::start().await;
    let mut body = ask("hi");
    body["stream"] = json!(true);
    for bytes in [0, 1, 120, 1000] {
        model.script([Reply::text("A text of some length, to be cut.").usage(3, 9).cut_after_bytes(bytes)]);
        let mut stream = post(&model, &body).await.unwrap().bytes_stream();
        let mut received = 0;
        let broken = loop {
            match stream.next().await {
                Some(Ok(piece)) => received += piece.len(),
                Some(Err(_)) => break true,
                None => break false,
            }
        };
        assert!(broken);
        assert_eq!(received, bytes);
    }
    assert_eq!(model.served().total, 4 * 12);
    assert!(model.requests().iter().all(|request| request.ending == Ending::Cut));
}

#[tokio::test]
async fn a_dropped_connection_has_no_head_and_no_charge() {
    let model = ModelServer::start().await;
    model.script([Reply::drop_connection()]);
    let error = post(&model, &ask("hi")).await.unwrap_err();
    assert!(error.is_request() && error.status().is_none(), "{error:?}");
    assert_eq!(model.served().requests, 0);
}

#[tokio::test]
async fn a_client_that_leaves_is_noticed_and_charged_only_after_the_head() {
    let model = ModelServer::start().await;
    model.script([Reply::hang(), Reply::text("Hello there").usage(2, 3).hold()]);
    let waiting = tokio::spawn({
        let (url, body) = (model.url(), ask("hi"));
        async move { http().post(format!("{url}/chat/completions")).bearer_auth("k").json(&body).send().await }
    });
    model.wait_for_requests(1).await;
    waiting.abort();
    model.wait_for("a client that left", |requests| requests[0].ending == Ending::ClientGone).await;
    assert_eq!(model.served().requests, 0);

    let mut body = ask("hi");
    body["stream"] = json!(true);
    let response = post(&model, &body).await.unwrap();
    model.wait_for_held(1).await;
    drop(response);
    let requests = model.wait_for("a client that left", |requests| requests[1].ending == Ending::ClientGone).await;
    assert_eq!(requests[1].charged, Some(Usage { prompt_tokens: 2, completion_tokens: 3, ..Usage::default() }));
    assert!(!model.release());
}

#[tokio::test]
async fn many_replies_are_held_together() {
    let model = ModelServer::start().await;
    model.always(|request| Reply::text(format!("Hello {}", request.last_user_text())).hold());
    let clients: Vec<_> = (0..200)
        .map(|number| {
            let mut body = ask(&number.to_string());
            body["stream"] = json!(true);
            let url = format!("{}/chat/completions", model.url());
            tokio::spawn(async move {
                let response = http().post(url).bearer_auth("k").json(&body).send().await.unwrap();
                response.text().await.unwrap()
            })
        })
        .collect();
    model.wait_for_held(200).await;
    assert_eq!(model.release_all(), 200);
    for client in clients {
        assert!(client.await.unwrap().ends_with("data: [DONE]\n\n"));
    }
}

#[tokio::test]
async fn max_tokens_is_honoured_where_the_script_says_so() {
    let model = ModelServer::start().await;
    model.script([Reply::text("12345678 and more").honour_max_tokens()]);
    let mut body = ask("hi");
    body["max_completion_tokens"] = json!(2);
    let answer: Value = post(&model, &body).await.unwrap().json().await.unwrap();
    assert_eq!(answer["choices"][0]["message"]["content"], "12345678");
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert_eq!(answer["usage"]["completion_tokens"], 2);
}

#[tokio::test]
async fn a_stream_may_end_in_any_wrong_way() {
    let model = ModelServer::start().await;
    model.script([
        Reply::text("hi").no_usage().without_finish_reason().without_done(),
        Reply::text("hi").fail_in_stream("overloaded"),
        Reply::raw("data: nonsense\n\n").usage(1, 1),
        Reply::text("Größe").wire_chunks_of(1).chunk_delay(0),
    ]);
    let mut body = ask("hi");
    body["stream"] = json!(true);
    body["stream_options"] = json!({"include_usage": true});
    let text = async || post(&model, &body).await.unwrap().text().await.unwrap();
    let bare = text().await;
    assert!(!bare.contains("[DONE]") && !bare.contains("\"stop\"") && !bare.contains("usage"));
    assert!(text().await.trim_end().ends_with(r#""code":null}}"#));
    assert_eq!(text().await, "data: nonsense\n\n");
    assert!(text().await.contains("Größ"));
    assert_eq!(model.served().requests, 4);
    assert_eq!(model.unused(), 0);
}

/// What the client prints of one call of the Responses API, and the last response it made of it.
async fn responses(model: &ModelServer, call: &str, body: Value) -> (Vec<Value>, Value) {
    let lines = openai(model, call, body).await;
    let last = lines.iter().rev().find_map(|line| line.get("final").or(line.get("response"))).cloned();
    let last = last.unwrap_or_else(|| panic!("no response in {lines:?}"));
    (lines, last)
}

fn input(text: &str) -> Value {
    json!({"model": "scripted-1", "input": [{"role": "user", "content": text}]})
}

/// The output as the client gives it back, without what it adds to it.
fn output(response: &Value) -> Value {
    let mut output = response["output"].clone();
    for item in output.as_array_mut().unwrap() {
        item.as_object_mut().unwrap().remove("parsed_arguments");
        for part in item.get_mut("content").and_then(Value::as_array_mut).into_iter().flatten() {
            part.as_object_mut().unwrap().remove("parsed");
        }
    }
    output
}

#[tokio::test]
async fn openai_client_streams_responses() {
    let model = ModelServer::start().await;
    let reply = || {
        Reply::text("Grüße aus Köln")
            .reasoning("Let me see.")
            .encrypted_reasoning("gAAAA")
            .and_hosted_call("web_search_call", json!({"action": {"type": "search", "query": "Köln"}}))
            .and_tool_call("weather", json!({"city": "Köln"}))
            .call_id("call_a")
            .usage(10, 5)
            .cached(4)
            .reasoning_tokens(2)
    };
    model.script([reply(), reply()]);
    let mut body = input("hi");
    let parameters = json!({"type": "object", "properties": {"city": {"type": "string"}}});
    body["tools"] = json!([{"type": "function", "name": "weather", "parameters": parameters, "strict": false}]);
    let (lines, streamed) = responses(&model, "responseStream", body.clone()).await;
    let (_, whole) = responses(&model, "response", body).await;

    let joined = |kind: &str| -> String {
        let events = lines.iter().map(|line| &line["event"]).filter(|event| event["type"] == kind);
        events.filter_map(|event| event["delta"].as_str()).collect()
    };
    assert_eq!(joined("response.output_text.delta"), "Grüße aus Köln");
    assert_eq!(joined("response.reasoning_summary_text.delta"), "Let me see.");
    assert_eq!(joined("response.function_call_arguments.delta"), r#"{"city":"Köln"}"#);
    for (number, response) in [(1, &streamed), (2, &whole)] {
        let id = |prefix: &str| format!("{prefix}_{number:08}");
        let text = json!({"type": "output_text", "annotations": [], "logprobs": [], "text": "Grüße aus Köln"});
        let expected = json!([
            {"id": id("rs"), "type": "reasoning", "summary": [{"type": "summary_text", "text": "Let me see."}],
             "encrypted_content": "gAAAA"},
            {"id": id("ws_0"), "type": "web_search_call", "status": "completed",
             "action": {"type": "search", "query": "Köln"}},
            {"id": id("msg"), "type": "message", "status": "completed", "role": "assistant", "content": [text]},
            {"id": id("fc_0"), "type": "function_call", "status": "completed", "call_id": "call_a", "name": "weather",
             "arguments": r#"{"city":"Köln"}"#},
        ]);
        assert_eq!(output(response), expected);
        assert_eq!(response["status"], "completed");
        let usage = json!({
            "input_tokens": 10, "input_tokens_details": {"cached_tokens": 4},
            "output_tokens": 5, "output_tokens_details": {"reasoning_tokens": 2}, "total_tokens": 15,
        });
        assert_eq!(response["usage"], usage);
    }
    let requests = model.requests();
    assert_eq!(requests.iter().map(|request| request.api).collect::<Vec<_>>(), [Api::Responses; 2]);
    assert_eq!((requests[0].last_user_text().as_str(), requests[0].tool_names()), ("hi", vec!["weather"]));
}

#[tokio::test]
async fn responses_can_refuse_stay_incomplete_and_fail() {
    let model = ModelServer::start().await;
    model.script([
        Reply::refusal("I won't."),
        Reply::incomplete("Half", "max_output_tokens"),
        Reply::incomplete("Ha", "content_filter"),
        Reply::failed("rate_limit_exceeded", "Too much."),
        Reply::text("Half").fail_in_stream("overloaded"),
    ]);
    let (_, refused) = responses(&model, "response", input("1")).await;
    let content = json!([{"type": "refusal", "refusal": "I won't."}]);
    assert_eq!((&refused["status"], &refused["output"][0]["content"]), (&json!("completed"), &content));
    let (lines, cut) = responses(&model, "responseStream", input("2")).await;
    assert_eq!(cut["incomplete_details"], json!({"reason": "max_output_tokens"}));
    let last_event = |lines: &[Value]| lines.iter().rev().find_map(|line| line.get("event")).unwrap()["type"].clone();
    assert_eq!(last_event(&lines), "response.incomplete");
    let (_, withheld) = responses(&model, "response", input("3")).await;
    assert_eq!(withheld["incomplete_details"], json!({"reason": "content_filter"}));
    assert_eq!(withheld["output"][0]["status"], "incomplete");
    let (_, failed) = responses(&model, "response", input("4")).await;
    assert_eq!(failed["error"], json!({"code": "rate_limit_exceeded", "message": "Too much."}));
    let lines = openai(&model, "responseStream", input("5")).await;
    assert!(lines.last().unwrap()["error"]["message"].as_str().unwrap().contains("overloaded"), "{lines:?}");
}

#[tokio::test]
async fn requests_that_the_responses_api_refuses_are_refused() {
    let model = ModelServer::start().await;
    model.always(|_| Reply::text("taken"));
    let user = json!({"role": "user", "content": "hi"});
    let call = json!({"type": "function_call", "id": "fc_1", "call_id": "a", "name": "f", "arguments": "{}"});
    let output = json!({"type": "function_call_output", "call_id": "a", "output": "1"});
    let reasoning = json!({"type": "reasoning", "id": "rs_1", "summary": []});
    let with = |field: &str, value: Value| {
        let mut item = call.clone();
        item[field] = value;
        item
    };
    let status = async |body: Value| {
        let url = format!("{}/responses", model.url());
        http().post(url).bearer_auth("sk-test").json(&body).send().await.unwrap().status().as_u16()
    };
    let items = async |items: Value| status(json!({"model": "m", "input": items})).await;
    assert_eq!(items(json!([user, reasoning, call, output])).await, 200);
    for refused in [
        json!([]),
        json!([user, call]),
        json!([user, output]),
        json!([user, reasoning, user]),
        json!([user, with("id", json!("__fake_id__")), output]),
        json!([user, with("provider_data", json!({})), output]),
        json!([{"role": "tool", "content": "x"}]),
        json!([{"type": "telepathy", "id": "x"}]),
    ] {
        assert_eq!(items(refused.clone()).await, 400, "{refused}");
    }
    let open = json!({"type": "object", "properties": {"x": {"type": "string"}}});
    for (name, value) in [
        ("messages", json!([user])),
        ("tool_choice", json!("required")),
        ("tool_choice", json!({"type": "function", "name": "f"})),
        ("tools", json!([{"type": "function", "function": {"name": "f"}}])),
        ("tools", json!([{"type": "function", "name": "f", "parameters": open, "strict": true}])),
        ("text", json!({"format": {"type": "json_schema", "name": "x", "schema": open, "strict": true}})),
    ] {
        let mut body = input("hi");
        body[name] = value;
        assert_eq!(status(body.clone()).await, 400, "{body}");
    }
}
