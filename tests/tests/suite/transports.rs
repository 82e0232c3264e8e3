//! GraphQL's doors: HTTP, server-sent events and WebSockets, as clients meet them.

use std::time::Duration;

use cloister_tests::app::TestAppBuilder;
use cloister_tests::client::{Ws, WsEvent, http};
use cloister_tests::node::{self, NodeScript};
use cloister_tests::{PATIENCE, Reply, TestApp};
use futures_util::StreamExt;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio_tungstenite::connect_async;
use tokio_tungstenite::tungstenite::{Message, client::IntoClientRequest};

use crate::both::on_both;
use crate::steps::{Stage, ended, events_query, items_of, rest, start, text};

on_both!(
    the_npm_client_of_graphql_ws_drives_a_run_to_its_end,
    the_npm_client_of_graphql_sse_drives_a_run_to_its_end,
    queries_and_mutations_go_over_a_websocket_too,
    sigterm_closes_sockets_and_streams_in_order,
);

/// What each of the npm clients is to show of a run.
async fn check_npm_client(stage: &Stage, script: &str, argument: Value) {
    stage.model.script([
        Reply::text("Let me look.").and_tool_call("look", json!({})).hold(),
        Reply::text("Grüße 😀").chunks_of(1).hold(),
    ]);
    let agent = stage.agent(json!({"tools": [stage.tool("look")]})).await;
    let id = start(stage.client(), json!({"agentId": agent, "input": "Go"})).await;
    stage.model.wait_for_held(1).await;
    let argument = crate::steps::with(argument, json!({"query": events_query(), "variables": {"id": id, "after": 0}}));
    let mut node = NodeScript::start(script, &argument).await;
    let mut told = Vec::new();
    // Connected, the user's item, the text so far: then it follows live.
    while told.len() < 2 {
        let line = node.next().await.expect("a line");
        if line["data"].is_object() {
            told.push(line["data"]["runEvents"].clone());
        }
    }
    stage.model.release();
    stage.model.wait_for_requests(2).await;
    stage.model.wait_for_held(1).await;
    stage.model.release();
    let rest = node.rest().await;
    assert_eq!(rest.last(), Some(&json!({"complete": true})));
    told.extend(rest.iter().filter(|line| line["data"].is_object()).map(|line| line["data"]["runEvents"].clone()));
    assert_eq!(items_of(&told), ended(stage.client(), &id).await.items);
    let of_turn = |turn: i64| -> String {
        let deltas = told.iter().filter(|event| event["__typename"] == "TextDelta" && event["turn"] == turn);
        deltas.map(|delta| text(&delta["text"])).collect()
    };
    assert_eq!((of_turn(1).as_str(), of_turn(2).as_str()), ("Let me look.", "Grüße 😀"));
}

async fn the_npm_client_of_graphql_ws_drives_a_run_to_its_end(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let params = |key: &str| json!({"url": stage.app.ws_url(), "connectionParams": {"X-API-Key": key}});
    check_npm_client(&stage, "ws.mjs", params(&stage.tenant.key)).await;
    let query = |key: &str, query: &str| crate::steps::with(params(key), json!({"query": query}));
    let lines = node::run("ws.mjs", &query(&stage.tenant.key, "{ viewer { tenant { name } } }")).await;
    let viewer = json!({"data": {"viewer": {"tenant": {"name": "acme"}}}});
    assert_eq!(lines, [json!({"connected": true}), viewer, json!({"complete": true})]);
    let lines = node::run("ws.mjs", &query("clo_wrong", "{ viewer { scopes } }")).await;
    assert_eq!(lines.last().unwrap()["close"]["code"], 4403);
    let lines = node::run("ws.mjs", &query(&stage.tenant.key, "{ nothing }")).await;
    assert!(lines.last().unwrap()["errors"][0]["extensions"]["code"].is_string(), "{lines:?}");
}

async fn the_npm_client_of_graphql_sse_drives_a_run_to_its_end(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let with_key = |key: &str| json!({"url": stage.client().url("/graphql"), "headers": {"X-API-Key": key}});
    check_npm_client(&stage, "sse.mjs", with_key(&stage.tenant.key)).await;
    let query = |key: &str, query: &str| crate::steps::with(with_key(key), json!({"query": query}));
    let lines = node::run("sse.mjs", &query(&stage.tenant.key, "{ viewer { tenant { name } } }")).await;
    let viewer = json!({"data": {"viewer": {"tenant": {"name": "acme"}}}});
    assert_eq!(lines[lines.len() - 2..], [viewer, json!({"complete": true})]);
    let lines = node::run("sse.mjs", &query("clo_wrong", "{ viewer { scopes } }")).await;
    assert_eq!(lines.last().unwrap()["status"], 401);
}

async fn queries_and_mutations_go_over_a_websocket_too(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    stage.model.script([Reply::text("Done")]);
    let agent = stage.agent(json!({})).await;
    let mut ws = stage.client().ws_ready().await;
    let start = "mutation ($input: StartRunInput!) { startRun(input: $input) { run { id } errors { code } } }";
    ws.subscribe("a", start, json!({"input": {"agentId": agent, "input": "Go"}})).await;
    let next = ws.next().await.message().clone();
    assert_eq!((&next["type"], &next["id"]), (&json!("next"), &json!("a")));
    let id = text(&next["payload"]["data"]["startRun"]["run"]["id"]);
    assert_eq!(ws.next().await.message(), &json!({"type": "complete", "id": "a"}));
    assert_eq!(ended(stage.client(), &id).await.output(), "Done");
    // The id is free again.
    ws.subscribe("a", "query ($id: ID!) { run(id: $id) { output } }", json!({"id": id})).await;
    assert_eq!(ws.next().await.message()["payload"], json!({"data": {"run": {"output": "Done"}}}));
    assert_eq!(ws.next().await.message(), &json!({"type": "complete", "id": "a"}));
    // An operation that is refused leaves the socket open.
    ws.subscribe("b", "{ nothing }", json!({})).await;
    let refused = ws.next().await.message().clone();
    assert_eq!((&refused["type"], &refused["id"]), (&json!("error"), &json!("b")));
    assert!(refused["payload"][0]["extensions"]["traceId"].is_string());
    // Two at once, told apart by their ids; one that is completed by the client is told no more.
    ws.subscribe("events", &events_query(), json!({"id": id, "after": 3})).await;
    ws.subscribe("runs", "subscription { runs { id } }", json!({})).await;
    let told = ws.next().await.message().clone();
    assert_eq!((&told["id"], &told["payload"]["data"]["runEvents"]["item"]["sequence"]), (&json!("events"), &json!(4)));
    assert_eq!(ws.next().await.message(), &json!({"type": "complete", "id": "events"}));
    ws.send(&json!({"type": "complete", "id": "runs"})).await;
    stage.model.script([Reply::text("Unheard")]);
    stage.run(&agent, "Go").await.output();
    ws.send(&json!({"type": "ping"})).await;
    assert_eq!(ws.next().await.message(), &json!({"type": "pong"}));
}

async fn sigterm_closes_sockets_and_streams_in_order(app: TestAppBuilder) {
    let mut stage = Stage::set(app).await;
    stage.model.script([Reply::text("Half").hold()]);
    let agent = stage.agent(json!({})).await;
    let id = start(stage.client(), json!({"agentId": agent, "input": "Go"})).await;
    stage.model.wait_for_held(1).await;
    let mut ws = stage.client().ws_ready().await;
    ws.subscribe("1", &events_query(), json!({"id": id, "after": 0})).await;
    assert_eq!(ws.next().await.message()["payload"]["data"]["runEvents"]["item"]["sequence"], 1);
    let mut sse = crate::steps::events(stage.client(), &id, 0).await;
    assert!(crate::steps::next_event(&mut sse).await.is_some());
    assert!(crate::steps::next_event(&mut sse).await.is_some());

    let client = stage.tenant.client.clone();
    let (status, ()) = tokio::join!(stage.app.terminate(), async {
        let closed = loop {
            match ws.next().await {
                WsEvent::Message(_) => {}
                WsEvent::Closed { code, .. } => break code,
            }
        };
        assert_eq!(closed, 1012, "clients connect again after a restart");
        // Not complete: there is more to come from the next process.
        assert_eq!((sse.next_result().await, sse.completed()), (None, false));
        stage.model.release();
    });
    assert!(status.success(), "{status}");
    stage.app.restart().await;
    let told = rest(&mut crate::steps::events(&client, &id, 0).await).await;
    assert_eq!(items_of(&told).last().unwrap()["status"], "SUCCEEDED");
    assert_eq!(stage.model.requests().len(), 1, "the turn was finished before the server ended");
}

async fn close_code(mut ws: Ws) -> u16 {
    loop {
        if let Some(code) = ws.next().await.close_code() {
            return code;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn websockets_close_with_the_protocols_codes() {
    let app = TestApp::builder().env("CLOISTER_GRAPHQL__WS_INIT_TIMEOUT_MS", "400").start().await;
    let client = app.tenant("acme").await.client;
    let invalid = [
        Message::text("nonsense"),
        Message::text("[]"),
        Message::text("{}"),
        Message::text(r#"{"type":"start"}"#),
        Message::text(r#"{"type":"connection_init","payload":"key"}"#),
        Message::text(r#"{"type":"subscribe","id":"1"}"#),
        Message::text(r#"{"type":"subscribe","id":1,"payload":{"query":"{ a }"}}"#),
        Message::binary(&br#"{"type":"connection_init"}"#[..]),
    ];
    for message in invalid {
        let mut ws = client.ws().await;
        ws.send_raw(message.clone()).await;
        assert_eq!(close_code(ws).await, 4400, "{message}");
    }
    let payloads = [json!(null), json!({}), json!({"query": 1}), json!({"query": "{ a }", "variables": []}), json!([])];
    for payload in payloads {
        let mut ws = client.ws_ready().await;
        ws.send(&json!({"type": "subscribe", "id": "1", "payload": payload})).await;
        assert_eq!(close_code(ws).await, 4400, "{payload}");
    }
    let mut ws = client.ws_ready().await;
    ws.subscribe("", "{ models { name } }", json!({})).await;
    assert_eq!(close_code(ws).await, 4400, "an empty id");

    let mut ws = client.ws().await;
    ws.subscribe("1", "{ models { name } }", json!({})).await;
    assert_eq!(close_code(ws).await, 4401);

    for payload in [json!({}), json!({"Authorization": "Bearer clo_wrong"}), json!({"X-API-Key": "x"})] {
        let mut ws = client.ws().await;
        ws.send(&json!({"type": "connection_init", "payload": payload})).await;
        assert_eq!(close_code(ws).await, 4403);
    }

    let began = std::time::Instant::now();
    let mut ws = client.ws().await;
    ws.send(&json!({"type": "ping"})).await;
    assert_eq!(ws.next().await.message()["type"], "pong", "pings are answered before connection_init");
    assert_eq!(close_code(ws).await, 4408);
    assert!(began.elapsed() >= Duration::from_millis(400));

    let mut ws = client.ws_ready().await;
    for _ in 0..2 {
        ws.subscribe("same", "subscription { runs { id } }", json!({})).await;
    }
    assert_eq!(close_code(ws).await, 4409);

    let mut ws = client.ws_ready().await;
    ws.send(&json!({"type": "connection_init"})).await;
    assert_eq!(close_code(ws).await, 4429);

    for ready in [false, true] {
        let mut ws = if ready { client.ws_ready().await } else { client.ws().await };
        ws.send_raw(Message::text("x".repeat(1024 * 1024 + 1))).await;
        assert_eq!(close_code(ws).await, 1009);
    }
    // Right up to the limit it is read: and found to be nonsense.
    let mut ws = client.ws_ready().await;
    ws.send_raw(Message::text("x".repeat(1024 * 1024))).await;
    assert_eq!(close_code(ws).await, 4400);
}

#[tokio::test(flavor = "multi_thread")]
async fn websockets_need_the_subprotocol() {
    let app = TestApp::start().await;
    let request = app.ws_url().into_client_request().unwrap();
    let (mut socket, response) = connect_async(request).await.unwrap();
    assert!(!response.headers().contains_key("sec-websocket-protocol"));
    let frame = tokio::time::timeout(PATIENCE, socket.next()).await.unwrap().unwrap().unwrap();
    let Message::Close(Some(frame)) = frame else { panic!("not closed: {frame}") };
    assert_eq!((u16::from(frame.code), frame.reason.as_str()), (4406, "Subprotocol not acceptable"));
    // A client that offers another one sees that none was chosen.
    assert!(app.anonymous().try_ws("graphql-ws", &[]).await.is_err());
    // A wrong key in the headers is refused before the upgrade.
    let refused = app.anonymous().try_ws("graphql-transport-ws", &[("x-api-key", "clo_wrong")]).await;
    let Err(tokio_tungstenite::tungstenite::Error::Http(response)) = refused else { panic!("it was let in") };
    assert_eq!(response.status(), 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_in_the_headers_is_enough_for_a_websocket() {
    let app = TestApp::start().await;
    let tenant = app.tenant("acme").await;
    let authorization = format!("Bearer {}", tenant.key);
    let mut ws = app.anonymous().try_ws("graphql-transport-ws", &[("authorization", &authorization)]).await.unwrap();
    ws.send(&json!({"type": "connection_init"})).await;
    assert_eq!(ws.next().await.message(), &json!({"type": "connection_ack"}));
    ws.subscribe("1", "{ viewer { tenant { name } } }", json!({})).await;
    assert_eq!(ws.next().await.message()["payload"]["data"]["viewer"]["tenant"]["name"], "acme");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_peer_is_pinged_and_then_closed() {
    let app = TestApp::builder().env("CLOISTER_GRAPHQL__WS_PING_MS", "100").start().await;
    let client = app.tenant("acme").await.client;
    let ping = || json!({"type": "ping"});
    // One that answers stays, for as long as it does.
    let mut ws = client.ws_ready().await;
    for _ in 0..6 {
        assert_eq!(ws.next().await.message(), &ping());
        ws.send(&json!({"type": "pong", "payload": {"any": 1}})).await;
    }
    ws.send(&json!({"type": "ping", "payload": {"mine": [1, "ä"]}})).await;
    loop {
        let message = ws.next().await.message().clone();
        if message != ping() {
            assert_eq!(message, json!({"type": "pong", "payload": {"mine": [1, "ä"]}}));
            break;
        }
        ws.send(&json!({"type": "pong"})).await;
    }
    let mut silent = client.ws_ready().await;
    for _ in 0..2 {
        assert_eq!(silent.next().await, WsEvent::Message(ping()));
    }
    assert_eq!(silent.next().await, WsEvent::Closed { code: 1001, reason: "No answer to pings".to_owned() });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_carries_a_bounded_number_of_operations() {
    let app = TestApp::builder().env("CLOISTER_GRAPHQL__MAX_SUBSCRIPTIONS_PER_SOCKET", "3").start().await;
    let client = app.tenant("acme").await.client;
    let mut ws = client.ws_ready().await;
    let runs = "subscription { runs { id } }";
    for id in ["1", "2", "3", "4"] {
        ws.subscribe(id, runs, json!({})).await;
    }
    let refused = ws.next().await.message().clone();
    assert_eq!((&refused["type"], &refused["id"]), (&json!("error"), &json!("4")));
    assert_eq!(refused["payload"][0]["extensions"]["code"], "LIMIT_EXCEEDED");
    ws.send(&json!({"type": "complete", "id": "2"})).await;
    ws.subscribe("4", runs, json!({})).await;
    ws.send(&json!({"type": "ping"})).await;
    assert_eq!(ws.next().await.message(), &json!({"type": "pong"}), "the fourth is taken now");
}

#[tokio::test(flavor = "multi_thread")]
async fn media_types_are_negotiated() {
    const GRAPHQL: &str = "application/graphql-response+json; charset=utf-8";
    const JSON: &str = "application/json; charset=utf-8";
    let app = TestApp::start().await;
    let client = app.tenant("acme").await.client;
    let post = async |accept: Option<&str>, query: &str| {
        let mut request = client.request(Method::POST, "/graphql").header("content-type", "application/json");
        if let Some(accept) = accept {
            request = request.header("accept", accept);
        }
        let response = request.body(json!({"query": query}).to_string()).send().await.unwrap();
        let content_type = response.headers()["content-type"].to_str().unwrap().to_owned();
        (response.status().as_u16(), content_type, response.text().await.unwrap())
    };
    let (good, bad) = ("{ viewer { isPlatformAdmin } }", "{ nothing }");
    let data = r#"{"data":{"viewer":{"isPlatformAdmin":false}}}"#;
    for (accept, content_type, status_of_bad) in [
        (None, GRAPHQL, 400),
        (Some("*/*"), GRAPHQL, 400),
        (Some("application/json"), JSON, 200),
        (Some("application/graphql-response+json"), GRAPHQL, 400),
        (Some("application/json;q=0.5, application/graphql-response+json"), GRAPHQL, 400),
        (Some("application/graphql-response+json;q=0.5, application/json"), JSON, 200),
    ] {
        assert_eq!(post(accept, good).await, (200, content_type.to_owned(), data.to_owned()), "{accept:?}");
        let (status, answered, body) = post(accept, bad).await;
        assert_eq!((status, answered.as_str()), (status_of_bad, content_type), "{accept:?}");
        let body: Value = serde_json::from_str(&body).unwrap();
        assert!(body.get("data").is_none() && body["errors"][0]["message"].is_string(), "{body}");
    }
    // What is executed with errors is 200 in both, with data.
    let partly = "{ viewer { isPlatformAdmin } tenants { nodes { id } } }";
    assert_eq!(post(None, partly).await.0, 200);
    for accept in ["text/html", "image/png", "application/json;q=0"] {
        let (status, _, body) = post(Some(accept), good).await;
        let body: Value = serde_json::from_str(&body).unwrap();
        assert_eq!((status, &body["errors"][0]["extensions"]["code"]), (406, &json!("NOT_ACCEPTABLE")), "{accept}");
    }
    let (status, content_type, body) = post(Some("text/event-stream"), good).await;
    assert_eq!((status, content_type.as_str()), (200, "text/event-stream"));
    assert_eq!(body, format!("event: next\ndata: {data}\n\nevent: complete\ndata:\n\n"));

    for content_type in ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""] {
        let request = client.request(Method::POST, "/graphql").header("content-type", content_type);
        let response = request.body(json!({"query": good}).to_string()).send().await.unwrap();
        assert_eq!(response.status(), StatusCode::UNSUPPORTED_MEDIA_TYPE, "{content_type:?}");
    }
    for method in [Method::GET, Method::PUT, Method::DELETE, Method::PATCH] {
        let url = client.url("/graphql?query=%7Bviewer%7BisPlatformAdmin%7D%7D");
        let response = http().request(method.clone(), url).bearer_auth("any").send().await.unwrap();
        assert_eq!(response.status(), StatusCode::METHOD_NOT_ALLOWED, "{method}");
        assert_eq!(response.headers()["allow"], "POST");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn graphiql_is_served() {
    let app = TestApp::start().await;
    let response = http().get(app.anonymous().url("/graphiql")).send().await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    assert!(response.headers()["content-type"].to_str().unwrap().starts_with("text/html"));
    let page = response.text().await.unwrap();
    assert!(page.contains("Cloister GraphiQL") && page.contains("/graphql"), "{page}");
}
