//! MCP servers: how their tools are offered and called, and what becomes of servers that misbehave.

use std::time::{Duration, Instant};

use cloister_runtime::mcp::{McpClient, McpFault as Fault};
use cloister_runtime::spec;
use cloister_runtime::webhook::AddressPolicy;
use cloister_tests::app::TestAppBuilder;
use cloister_tests::{McpAnswer, McpFault, McpServer, Reply};
use serde_json::{Value, json};

use crate::both::on_both;
use crate::steps::{Stage, text, until};

const FAILED: &str = "An error occurred while running the tool. Please try again.";
const TOKEN: &str = "t0ken-of-the-server";

on_both!(
    tools_are_offered_before_the_agents_own_and_called,
    what_a_server_answers_reaches_the_model,
    a_server_that_can_not_be_asked_fails_the_run_by_its_name,
);

fn schema() -> Value {
    json!({"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]})
}

fn mcp(server: &McpServer, fields: Value) -> Value {
    json!({"mcp": crate::steps::with(json!({"name": "Weather", "url": server.url()}), fields)})
}

async fn tools_are_offered_before_the_agents_own_and_called(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let server = McpServer::start(&[("b", schema()), ("a", json!({"type": "object"})), ("hidden", schema())]).await;
    server.require_token(TOKEN);
    server.page_size(1);
    server.answer(|call| McpAnswer::text(&format!("Sunny in {}.", call.arguments["city"])));
    stage.model.script([
        Reply::tool_call("b", json!({"city": "Köln"})).and_tool_call("look", json!({})),
        Reply::tool_call("b", json!({"city": "Rom"})),
        Reply::text("Done"),
    ]);
    let tools = json!([stage.tool("look"), mcp(&server, json!({"token": TOKEN, "allowedTools": ["a", "b"]}))]);
    let agent = stage.agent(json!({"tools": tools})).await;
    let ended = stage.run(&agent, "Go").await;
    ended.output();

    let request = &stage.model.requests()[0];
    assert_eq!(request.tool_names(), ["b", "a", "look"], "the server's, in its order, then the agent's own");
    let offered = |at: usize| &request.body["tools"][at]["function"];
    let expected = json!({"name": "b", "description": "Does b.", "parameters": schema(), "strict": false});
    assert_eq!(*offered(0), expected);
    assert_eq!(offered(1)["parameters"], json!({"type": "object", "properties": {}}));
    let calls: Vec<Value> = server.calls().iter().map(|call| json!([call.tool, call.arguments])).collect();
    assert_eq!(json!(calls), json!([["b", {"city": "Köln"}], ["b", {"city": "Rom"}]]));
    let outputs: Vec<String> = ended.outputs().into_iter().map(|(output, _)| output).collect();
    assert!(outputs.contains(&"Sunny in \"Köln\".".to_owned()), "{outputs:?}");
    // One session for the whole run, which ends with it; each request brings the token.
    assert_eq!((server.count("initialize"), server.count("tools/list")), (1, 3));
    let deleted = || async { server.requests().iter().filter(|request| request.method == "DELETE").count() };
    until("the session ends", deleted, |deleted| *deleted == 1).await;
    for request in server.requests() {
        assert_eq!(request.headers["authorization"], format!("Bearer {TOKEN}"), "{request:?}");
    }
    assert!(!stage.app.log().contains(TOKEN));
}

async fn what_a_server_answers_reaches_the_model(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let server = McpServer::start(&[("look", schema())]).await;
    server.answer(|call| match call.arguments["city"].as_str().unwrap() {
        "error" => McpAnswer::Result(json!({"isError": true, "content": [{"type": "text", "text": "No such city."}]})),
        "refuse" => McpAnswer::Error(-32000, "Out of order.".to_owned()),
        "two" => McpAnswer::Result(json!({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]})),
        "none" => McpAnswer::Result(json!({"content": [], "structuredContent": {"a": 1}})),
        city => McpAnswer::text(&format!("Sunny in {city}.")),
    });
    let cities = ["Rom", "error", "refuse", "two", "none"];
    let mut reply = Reply::tool_call("look", json!({}));
    for city in cities {
        reply = reply.and_tool_call("look", json!({"city": city}));
    }
    for arguments in ["[]", "{", "null"] {
        reply = reply.and_tool_call_raw("look", arguments);
    }
    stage.model.script([reply, Reply::text("Done")]);
    let agent = stage.agent(json!({"tools": [mcp(&server, json!({}))], "modelSettings": {"parallelToolCalls": true}}));
    let ended = stage.run(&agent.await, "Go").await;
    ended.output();
    let outputs = ended.of_type("ToolOutputItem");
    let told = |call: &&Value| {
        let output = outputs.iter().find(|output| output["callId"] == call["callId"]).expect("an output");
        (text(&output["output"]), output["isError"] == true)
    };
    let told: Vec<(String, bool)> = ended.of_type("ToolCallItem").iter().map(told).collect();
    let ours = || (FAILED.to_owned(), true);
    let theirs = |text: &str| (text.to_owned(), false);
    let expected = [
        ours(),
        theirs("Sunny in Rom."),
        theirs("No such city."),
        ours(),
        theirs("a\nb"),
        theirs("[]"),
        ours(),
        ours(),
        ours(),
    ];
    assert_eq!(told, expected);
    assert_eq!(server.calls().len(), cities.len(), "what does not fit is not called");
}

async fn a_server_that_can_not_be_asked_fails_the_run_by_its_name(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let server = McpServer::start(&[]).await;
    server.require_token("another");
    let agent = stage.agent(json!({"tools": [mcp(&server, json!({"token": TOKEN}))]})).await;
    let ended = stage.run(&agent, "Go").await;
    assert_eq!(ended.error(), "TOOL");
    let message = text(&ended.run["error"]["message"]);
    assert!(message.contains("\"Weather\"") && message.contains("check its token"), "{message}");
    assert!(!message.contains(TOKEN) && !stage.app.log().contains(TOKEN));
    assert_eq!(stage.model.requests().len(), 0);
}

fn client() -> McpClient {
    cloister_tests::client::http();
    McpClient::new(AddressPolicy { allowed_hosts: vec!["127.0.0.1".to_owned()], ..AddressPolicy::default() }).unwrap()
}

fn at(url: &str) -> spec::McpServer {
    spec::McpServer {
        name: "Weather".to_owned(),
        url: url.to_owned(),
        token: Some(TOKEN.to_owned()),
        allowed_tools: None,
        needs_approval: false,
    }
}

const PATIENCE: Duration = Duration::from_millis(500);

#[tokio::test]
async fn servers_that_misbehave_are_told_apart() {
    let server = McpServer::start(&[("look", json!({"type": "object"}))]).await;
    let megabytes = |start: &str, end: &str| [start, &"x".repeat(2 * 1024 * 1024), end].concat();
    let long_json =
        megabytes(r#"{"jsonrpc": "2.0", "id": 1, "result": {"content": [{"type": "text", "text": ""#, r#""}]}}"#);
    let long_event = megabytes("data: ", "\n\n");
    let redirect = |status| McpFault { headers: vec![("location", server.url())], ..McpFault::status(status) };
    let faults = [
        (McpFault::status(401), Fault::Unauthorized(401)),
        (
            McpFault { headers: vec![("www-authenticate", "Bearer".to_owned())], ..McpFault::status(401) },
            Fault::Unauthorized(401),
        ),
        (McpFault::status(403), Fault::Unauthorized(403)),
        (McpFault::status(404), Fault::Status(404)),
        (McpFault::status(429), Fault::Status(429)),
        (McpFault::status(500), Fault::Status(500)),
        (redirect(301), Fault::Status(301)),
        (redirect(302), Fault::Status(302)),
        (redirect(303), Fault::Status(303)),
        (redirect(307), Fault::Status(307)),
        (redirect(308), Fault::Status(308)),
        (McpFault::hang(), Fault::TimedOut),
        (McpFault::body("text/html", "<html>"), Fault::NotMcp),
        (McpFault::body("application/json", "{}"), Fault::NotMcp),
        (McpFault::body("application/json", long_json), Fault::TooLong),
    ];
    for (fault, expected) in faults {
        let status = fault.status;
        server.sabotage(move |request| (request.rpc == "initialize").then(|| fault.clone()));
        let client = client();
        let error = client.sessions().call(&at(&server.url()), "look", json!({}), PATIENCE).await.unwrap_err();
        assert_eq!(error.fault, expected, "{status:?}");
        assert!(error.to_string().starts_with("the MCP server \"Weather\" "), "{error}");
        assert!(!error.to_string().contains(TOKEN) && !error.to_string().contains("127.0.0.1"), "{error}");
    }
    // Streams that never come to the answer end with the caller's patience at the latest, as does what hangs later on.
    for (rpc, fault) in [
        ("initialize", McpFault::body("text/event-stream", long_event.clone())),
        ("initialize", McpFault::body("text/event-stream", "data: {\n\n")),
        ("tools/call", McpFault::body("text/event-stream", long_event)),
        ("tools/call", McpFault::body("text/event-stream", ": nothing\n\n")),
        ("tools/call", McpFault::hang()),
        ("tools/call", McpFault::status(500)),
    ] {
        server.sabotage(move |request| (request.rpc == rpc).then(|| fault.clone()));
        let begun = Instant::now();
        client().sessions().call(&at(&server.url()), "look", json!({}), PATIENCE).await.unwrap_err();
        assert!(begun.elapsed() < PATIENCE * 4, "{rpc}");
    }
    server.sabotage(|_| None);
    let sessions = client().sessions();
    let output = sessions.call(&at(&server.url()), "look", json!({}), PATIENCE * 10).await.unwrap();
    assert_eq!(output.text, "ok");
    drop(server);
    let error = client().sessions().call(&at("http://127.0.0.1:1/"), "look", json!({}), PATIENCE).await.unwrap_err();
    assert!(matches!(error.fault, Fault::Unreachable(_)), "{error}");
}

#[tokio::test]
async fn a_run_goes_on_in_a_new_session_when_a_server_forgot_the_old_one() {
    let server = McpServer::start(&[("look", json!({"type": "object"}))]).await;
    let sessions = client().sessions();
    let server_spec = at(&server.url());
    let call = || sessions.call(&server_spec, "look", json!({}), PATIENCE * 10);
    assert_eq!(call().await.unwrap().text, "ok");
    let old = server.requests().iter().find_map(|request| request.headers.get("mcp-session-id").cloned()).unwrap();
    server
        .sabotage(move |request| (request.headers.get("mcp-session-id") == Some(&old)).then(|| McpFault::status(404)));
    assert_eq!(call().await.unwrap().text, "ok");
    assert_eq!(server.count("initialize"), 2);
}

#[tokio::test]
async fn lists_are_kept_until_their_server_says_that_they_changed() {
    let server = McpServer::start(&[("one", json!({"type": "object"}))]).await;
    let client = client();
    let names = |tools: Vec<cloister_runtime::model::ToolDefinition>| -> Vec<String> {
        tools.into_iter().map(|tool| tool.name).collect()
    };
    let known = at(&server.url());
    assert_eq!(names(client.list(&known).await.unwrap()), ["one"]);
    assert_eq!(names(client.list(&known).await.unwrap()), ["one"]);
    assert_eq!(server.count("tools/list"), 1);
    // Who brings another token is another.
    let other = spec::McpServer { token: None, ..known.clone() };
    assert_eq!(names(client.list(&other).await.unwrap()), ["one"]);
    assert_eq!(server.count("tools/list"), 2);

    let sessions = client.sessions();
    sessions.call(&known, "one", json!({}), PATIENCE * 10).await.unwrap();
    // The word comes over a stream that the session opens on its own.
    let listening = || async { server.requests().iter().any(|request| request.method == "GET") };
    until("the session listens", listening, |listening| *listening).await;
    server.change_tools(&[("two", json!({"type": "object"}))]).await;
    until("the change is known", || async { names(client.list(&known).await.unwrap()) }, |names| names == &["two"])
        .await;
}

#[tokio::test]
async fn a_list_without_end_is_not_taken() {
    let long = "x".repeat(100_000);
    let tools: Vec<(String, Value)> =
        (0..20).map(|at| (format!("t{at}"), json!({"type": "object", "description": long}))).collect();
    let tools: Vec<(&str, Value)> = tools.iter().map(|(name, schema)| (name.as_str(), schema.clone())).collect();
    let server = McpServer::start(&tools).await;
    server.page_size(1);
    let error = client().list(&at(&server.url())).await.unwrap_err();
    assert_eq!(error.fault, Fault::ListTooLong);
}
