//! Webhook tools: what their endpoints are sent, what the model is told, and where they may not point.

use std::collections::HashMap;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::http::{HeaderMap, HeaderValue, Uri};
use cloister_tests::app::TestAppBuilder;
use cloister_tests::{PATIENCE, Reply, ToolAnswer, ToolServer};
use entity::{TenantOwned, agent_versions, agents, runs};
use serde_json::{Value, json};
use standardwebhooks::Webhook;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio_util::task::AbortOnDropHandle;

use crate::both::on_both;
use crate::steps::{
    Ended, Stage, ended, granted, mutate, publish, refusals, start, text, tool, try_create_agent, try_update_agent,
    update_agent, wait_for_item,
};

const FAILED: &str = "An error occurred while running the tool. Please try again.";

on_both!(
    a_call_reaches_its_endpoint_signed_and_repeatable,
    a_rotated_secret_signs_beside_the_old_one_for_its_grace,
    the_model_is_told_the_answers_text,
    a_redirect_is_not_followed,
    an_answer_may_have_a_mebibyte,
    calls_run_side_by_side_within_bounds_and_stand_in_call_order,
    tokens_go_to_their_endpoint_and_nowhere_else,
    a_token_is_kept_only_for_its_name_and_origin,
    urls_that_point_inside_are_refused_when_an_agent_is_saved,
    a_name_that_resolves_inside_is_never_connected_to,
);

async fn rotate(stage: &Stage, grace_seconds: i64) -> String {
    let input = json!({"graceSeconds": grace_seconds});
    let payload = mutate(stage.client(), "rotateWebhookSecret", "RotateWebhookSecretInput", "secret", input).await;
    text(&granted(payload)["secret"])
}

async fn a_call_reaches_its_endpoint_signed_and_repeatable(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let secret = rotate(&stage, 0).await;
    assert!(secret.starts_with("whsec_"));
    stage.model.script([
        Reply::tool_call("look", json!({})),
        Reply::tool_call("nope", json!({})).and_tool_call_raw("weather", "{ \"city\": \"Köln\" }"),
        Reply::text("Done"),
    ]);
    let url = stage.tools.url("/hooks/weather?unit=c");
    let tools = [stage.tool("look"), tool("weather", &url, json!({"token": "s3cret"}))];
    let agent = stage.agent(json!({"tools": tools})).await;
    stage.run(&agent, "Go").await.output();

    let requests = stage.tools.requests();
    let [look, weather] = &requests[..] else { panic!("two calls, not {}", requests.len()) };
    assert_eq!((weather.method.as_str(), weather.path.as_str()), ("POST", "/hooks/weather?unit=c"));
    assert_eq!(weather.body, "{ \"city\": \"Köln\" }", "as the model wrote it");
    assert_eq!(weather.header("content-type"), Some("application/json"));
    assert_eq!(weather.header("authorization"), Some("Bearer s3cret"));
    assert_eq!((look.header("authorization"), &look.body[..]), (None, &b"{}"[..]));
    let run = runs::Entity::across_tenants().one(&stage.app.database().await).await.unwrap().unwrap();
    // The run, the turn from 1, and the call's place in its response from 0.
    assert_eq!(look.header("idempotency-key"), Some(format!("{}:1.0", run.id).as_str()));
    assert_eq!(weather.header("idempotency-key"), Some(format!("{}:2.1", run.id).as_str()));
    let webhook = Webhook::new(&secret).unwrap();
    for request in [look, weather] {
        webhook.verify(&request.body, &request.headers).unwrap();
        assert!(!request.header("webhook-id").unwrap().contains('.'), "full stops part what is signed");
        assert_eq!(request.header("webhook-signature").unwrap().split(' ').count(), 1);
    }
    assert_ne!(look.header("webhook-id"), weather.header("webhook-id"));
    assert!(webhook.verify(b"{}", &weather.headers).is_err(), "the body is signed");
}

async fn a_rotated_secret_signs_beside_the_old_one_for_its_grace(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    stage.model.always(|request| match request.messages().last().map(|message| &message["role"]) {
        Some(role) if role == "tool" => Reply::text("Done"),
        _ => Reply::tool_call("look", json!({})),
    });
    let agent = stage.agent(json!({"tools": [stage.tool("look")]})).await;
    let (first, second) = (rotate(&stage, 0).await, rotate(&stage, 600).await);
    stage.run(&agent, "Go").await.output();
    let third = rotate(&stage, 0).await;
    stage.run(&agent, "Go").await.output();

    let signed_by = |at: usize| -> Vec<bool> {
        let request = &stage.tools.requests()[at];
        let verifies = |secret: &String| Webhook::new(secret).unwrap().verify(&request.body, &request.headers).is_ok();
        [&first, &second, &third].map(verifies).into()
    };
    assert_eq!(signed_by(0), [true, true, false], "both within the grace");
    assert_eq!(signed_by(1), [false, false, true]);
    let payload = mutate(
        stage.client(),
        "rotateWebhookSecret",
        "RotateWebhookSecretInput",
        "secret",
        json!({"graceSeconds": -1}),
    );
    assert_eq!(refusals(&payload.await), [("INVALID".to_owned(), "graceSeconds".to_owned())]);
}

/// The outputs of one response that calls each of the tools, in call order.
async fn outputs(stage: &Stage, tools: &[Value]) -> Vec<(String, bool)> {
    let names: Vec<String> = tools.iter().map(|tool| text(&tool["webhook"]["name"])).collect();
    let mut reply = Reply::tool_call(&names[0], json!({}));
    for name in &names[1..] {
        reply = reply.and_tool_call(name, json!({}));
    }
    stage.model.script([reply, Reply::text("Done")]);
    let agent = stage.agent(json!({"tools": tools})).await;
    let ended = stage.run(&agent, "Go").await;
    ended.output();
    in_call_order(&ended)
}

fn in_call_order(ended: &Ended) -> Vec<(String, bool)> {
    let outputs = ended.of_type("ToolOutputItem");
    let output = |call: &&Value| outputs.iter().find(|output| output["callId"] == call["callId"]).copied();
    let found = ended.of_type("ToolCallItem").into_iter().map(|call| output(&call).expect("an output"));
    found.map(|item| (text(&item["output"]), item["isError"] == true)).collect()
}

async fn the_model_is_told_the_answers_text(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    stage.tools.always(|request| match request.path.as_str() {
        "/text" => ToolAnswer::text("  Grüße,\n\"x\"  "),
        "/json" => ToolAnswer::json(&json!({"sunny": true})),
        "/nothing" => ToolAnswer::status(204),
        "/bytes" => ToolAnswer::bytes(&b"a\xffb"[..]),
        "/slow" => ToolAnswer::hang(),
        path => ToolAnswer::status(path[1..].parse().unwrap()),
    });
    let slow = tool("slow", &stage.tools.url("/slow"), json!({"timeoutMs": 200}));
    let mut tools: Vec<Value> = ["text", "json", "nothing", "bytes", "404", "500"].map(|name| stage.tool(name)).into();
    tools.push(slow);
    // Nothing listens on this port of ours.
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    tools.push(tool("closed", &format!("http://{closed}/"), json!({})));
    let told = outputs(&stage, &tools).await;
    let expected = [
        ("  Grüße,\n\"x\"  ", false),
        (r#"{"sunny":true}"#, false),
        ("", false),
        ("a\u{fffd}b", false),
        (FAILED, true),
        (FAILED, true),
        ("Tool 'slow' timed out after 0.2 seconds.", true),
        (FAILED, true),
    ];
    assert_eq!(told, expected.map(|(text, is_error)| (text.to_owned(), is_error)));
    let requests = stage.model.requests();
    let sent: Vec<&Value> = requests[1].messages().iter().map(|message| &message["content"]).collect();
    assert_eq!(sent[3..], expected.map(|(text, _)| text));
}

async fn a_redirect_is_not_followed(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let elsewhere = ToolServer::start().await;
    stage.tools.script([ToolAnswer::redirect(&elsewhere.url("/inside"))]);
    let told = outputs(&stage, &[stage.tool("look")]).await;
    assert_eq!(told, [(FAILED.to_owned(), true)]);
    assert_eq!((stage.tools.requests().len(), elsewhere.requests().len()), (1, 0));
}

async fn an_answer_may_have_a_mebibyte(app: TestAppBuilder) {
    const MEBIBYTE: usize = 1024 * 1024;
    let stage = Stage::set(app).await;
    stage.tools.always(|request| match request.path.as_str() {
        "/fits" => ToolAnswer::text("x".repeat(MEBIBYTE)),
        _ => ToolAnswer::text("x".repeat(MEBIBYTE + 1)),
    });
    // The first tool's output is the run's, so that a model need not be sent as much.
    let run = async |name: &str| {
        stage.model.script([Reply::tool_call(name, json!({}))]);
        let fields = json!({"tools": [stage.tool(name)], "toolUseBehavior": "STOP_ON_FIRST_TOOL"});
        stage.run(&stage.agent(fields).await, "Go").await.output()
    };
    assert_eq!(run("fits").await.len(), MEBIBYTE);
    assert_eq!(run("too_long").await, FAILED);
}

/// An endpoint that answers only when it is let to, and knows how many calls were open at once.
struct Gate {
    address: SocketAddr,
    state: Arc<GateState>,
    _serving: AbortOnDropHandle<()>,
}

#[derive(Default)]
struct GateState {
    open: AtomicUsize,
    most: AtomicUsize,
    arrived: watch::Sender<Vec<String>>,
    paths: Mutex<HashMap<String, Arc<Semaphore>>>,
}

impl GateState {
    fn path(&self, path: &str) -> Arc<Semaphore> {
        let mut paths = self.paths.lock().unwrap();
        paths.entry(path.to_owned()).or_insert_with(|| Arc::new(Semaphore::new(0))).clone()
    }

    async fn pass(&self, path: &str) -> String {
        let open = self.open.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(open, Ordering::SeqCst);
        self.arrived.send_modify(|arrived| arrived.push(path.to_owned()));
        self.path(path).acquire().await.unwrap().forget();
        self.open.fetch_sub(1, Ordering::SeqCst);
        format!("from {path}")
    }
}

impl Gate {
    async fn start() -> Gate {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(GateState::default());
        let serving = state.clone();
        let router = Router::new().fallback(move |uri: Uri| {
            let state = serving.clone();
            async move { state.pass(uri.path()).await }
        });
        let serving = AbortOnDropHandle::new(tokio::spawn(async move {
            let _ = axum::serve(listener, router).await;
        }));
        Gate { address, state, _serving: serving }
    }

    fn tool(&self, name: &str) -> Value {
        tool(name, &format!("http://{}/{name}", self.address), json!({}))
    }

    async fn wait_for(&self, count: usize) -> Vec<String> {
        let mut arrived = self.state.arrived.subscribe();
        let enough = tokio::time::timeout(PATIENCE, arrived.wait_for(|arrived| arrived.len() >= count)).await;
        enough.expect("the calls come").expect("the gate stands").clone()
    }

    fn open(&self, path: &str) {
        self.state.path(path).add_permits(1);
    }
}

async fn calls_run_side_by_side_within_bounds_and_stand_in_call_order(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let gate = Gate::start().await;
    let names = ["a", "b", "c", "d"];
    let mut reply = Reply::tool_call("a", json!({}));
    for name in &names[1..] {
        reply = reply.and_tool_call(name, json!({}));
    }
    stage.model.script([reply, Reply::text("Done")]);
    let tools = names.map(|name| gate.tool(name));
    let agent = stage.agent(json!({"tools": tools, "maxToolConcurrency": 2})).await;
    let id = start(stage.client(), json!({"agentId": agent, "input": "Go"})).await;
    let mut at_first = gate.wait_for(2).await;
    at_first.sort();
    assert_eq!(at_first, ["/a", "/b"]);
    // Out of their order: each is stored as it comes.
    for (name, then) in [("b", 3), ("c", 4), ("d", 4), ("a", 4)] {
        gate.open(&format!("/{name}"));
        wait_for_item(stage.client(), &id, |item| item["output"] == format!("from /{name}")).await;
        gate.wait_for(then).await;
    }
    let ended = ended(stage.client(), &id).await;
    assert_eq!(gate.state.most.load(Ordering::SeqCst), 2);
    let stored: Vec<String> = ended.outputs().into_iter().map(|(output, _)| output).collect();
    assert_eq!(stored, ["from /b", "from /c", "from /d", "from /a"]);
    let requests = stage.model.requests();
    let told: Vec<&Value> = requests[1].messages()[3..].iter().map(|message| &message["content"]).collect();
    assert_eq!(told, ["from /a", "from /b", "from /c", "from /d"]);
}

const TOOLS: &str =
    "query ($id: ID!) { agent(id: $id) { tools { ... on WebhookTool { name url hasToken timeoutMs } } } }";

async fn tokens_go_to_their_endpoint_and_nowhere_else(app: TestAppBuilder) {
    const TOKEN: &str = "tok_3mJ9XkQv7LpZ";
    let stage = Stage::set(app).await;
    stage.model.script([Reply::tool_call("a", json!({})).and_tool_call("b", json!({})), Reply::text("Done")]);
    let url = stage.tools.url("/a");
    let tools = [tool("a", &url, json!({"token": TOKEN, "timeoutMs": 1500})), stage.tool("b")];
    let agent = stage.agent(json!({"tools": tools})).await;
    stage.run(&agent, "Go").await.output();

    let shown = stage.client().data(TOOLS, json!({"id": agent})).await;
    let of_a = json!({"name": "a", "url": url, "hasToken": true, "timeoutMs": 1500});
    let of_b = json!({"name": "b", "url": stage.tools.url("/b"), "hasToken": false, "timeoutMs": 30000});
    assert_eq!(shown["agent"]["tools"], json!([of_a, of_b]));
    let tokens: HashMap<String, Option<HeaderValue>> = stage.tools.requests().into_iter().map(with_token).collect();
    assert_eq!(tokens["/a"], Some(HeaderValue::from_str(&format!("Bearer {TOKEN}")).unwrap()));
    assert_eq!(tokens["/b"], None);

    // At rest it is sealed, and nothing that is logged or sent to a model has it.
    let database = stage.app.database().await;
    let mut stored = Vec::new();
    stored.extend(agents::Entity::across_tenants().all(&database).await.unwrap().into_iter().map(|row| row.definition));
    let versions = agent_versions::Entity::across_tenants().all(&database).await.unwrap();
    stored.extend(versions.into_iter().map(|row| row.definition));
    stored.extend(runs::Entity::across_tenants().all(&database).await.unwrap().into_iter().map(|row| row.spec));
    assert_eq!(stored.len(), 3);
    let places = stored.iter().map(Value::to_string).chain([stage.app.log()]);
    let sent = stage.model.requests().into_iter().map(|request| request.body.to_string());
    for place in places.chain(sent) {
        assert!(!place.contains(TOKEN), "{place}");
    }
    assert!(stored.iter().all(|definition| definition.to_string().contains("v1.")), "sealed, not lost");
}

fn with_token(request: cloister_tests::tool_server::ToolRequest) -> (String, Option<HeaderValue>) {
    let headers: &HeaderMap = &request.headers;
    (request.path.clone(), headers.get("authorization").cloned())
}

async fn a_token_is_kept_only_for_its_name_and_origin(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let elsewhere = ToolServer::start().await;
    let tools = [tool("a", &stage.tools.url("/a"), json!({"token": "secret"}))];
    let agent = stage.agent(json!({"tools": tools})).await;
    let has_token = async |tools: Value| {
        update_agent(stage.client(), &agent, json!({"tools": tools})).await;
        stage.client().data(TOOLS, json!({"id": agent})).await["agent"]["tools"][0]["hasToken"] == true
    };
    assert!(has_token(json!([tool("a", &stage.tools.url("/other/path"), json!({}))])).await);
    publish(stage.client(), &agent).await;
    stage.model.script([Reply::tool_call("a", json!({})), Reply::text("Done")]);
    stage.run(&agent, "Go").await.output();
    assert_eq!(stage.tools.requests()[0].header("authorization"), Some("Bearer secret"), "kept as it was");

    let given = || json!([tool("a", &stage.tools.url("/a"), json!({"token": "secret"}))]);
    assert!(!has_token(json!([tool("b", &stage.tools.url("/a"), json!({}))])).await, "another name");
    assert!(has_token(given()).await);
    assert!(!has_token(json!([tool("a", &elsewhere.url("/a"), json!({}))])).await, "another port");
    assert!(has_token(given()).await);
    assert!(!has_token(json!([tool("a", &stage.tools.url("/a"), json!({"token": null}))])).await, "taken away");
    assert!(!has_token(json!([tool("a", &stage.tools.url("/a"), json!({}))])).await, "gone for good");
    let refused = try_update_agent(
        stage.client(),
        &agent,
        json!({"tools": [tool("a", &stage.tools.url("/a"), json!({"token": "two words"}))]}),
    );
    assert_eq!(refusals(&refused.await), [("INVALID".to_owned(), "tools.0.webhook.token".to_owned())]);
}

async fn urls_that_point_inside_are_refused_when_an_agent_is_saved(app: TestAppBuilder) {
    let stage = Stage::set(app.env("CLOISTER_WEBHOOKS__ALLOWED_HOSTS", "")).await;
    let port = stage.tools.url("").rsplit(':').next().unwrap().to_owned();
    let hosts = [
        "127.0.0.1",
        "127.1",
        "127.0.0.53",
        "2130706433",
        "0x7f.1",
        "0x7f000001",
        "0177.0.0.1",
        "0",
        "0.0.0.0",
        "１２７.0.0.1",
        "localhost",
        "LOCALHOST",
        "localhost.",
        "foo.localhost",
        "printer.local",
        "db.internal",
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[::127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
        "[2001:0:4136:e378:8000:63bf:80ff:fffe]",
        "[fe80::1]",
        "[fd00:ec2::254]",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "100.64.0.1",
        "169.254.169.254",
        "168.63.129.16",
        "224.0.0.1",
        "255.255.255.255",
    ];
    let mut urls: Vec<String> = hosts.iter().map(|host| format!("http://{host}:{port}/")).collect();
    urls.extend(
        ["file:///etc/passwd", "gopher://example.com/", "ftp://example.com/", "not a url", "//example.com/", ""]
            .map(str::to_owned),
    );
    urls.push("https://user:password@example.com/".to_owned());
    urls.push(format!("https://example.com/{}", "x".repeat(2_048)));
    let tools: Vec<Value> = urls.iter().enumerate().map(|(at, url)| tool(&format!("t{at}"), url, json!({}))).collect();
    // All of them at once: each is refused at its own place.
    let refused = refusals(&try_create_agent(stage.client(), json!({"tools": tools})).await);
    for (at, url) in urls.iter().enumerate() {
        let own = ("INVALID".to_owned(), format!("tools.{at}.webhook.url"));
        assert!(refused.contains(&own), "{url} was let through");
    }
    assert!(refused.iter().all(|(code, field)| code == "INVALID" && field.ends_with(".webhook.url")), "{refused:?}");
    let count = stage.client().data("{ agents { nodes { id } } }", json!({})).await;
    assert_eq!(count["agents"]["nodes"], json!([]), "nothing is stored");
    assert!(stage.tools.requests().is_empty());
    let public = [tool("ok", "https://example.com:8443/hook", json!({}))];
    granted(try_create_agent(stage.client(), json!({"tools": public})).await);
}

/// A name of this machine's own in its table of hosts: nothing tells by its form that it points inside.
pub fn name_of_an_inside_address() -> Option<(String, IpAddr)> {
    let hosts = fs::read_to_string("/etc/hosts").ok()?;
    let plain = |name: &&str| !["localhost", "local", "internal"].contains(&name.rsplit('.').next().unwrap_or(name));
    hosts.lines().find_map(|line| {
        let mut words = line.split('#').next()?.split_whitespace();
        let address: IpAddr = words.next()?.parse().ok()?;
        let name = words.find(plain)?;
        // Only what can be listened on here proves anything.
        std::net::TcpListener::bind((address, 0)).ok()?;
        Some((name.to_owned(), address))
    })
}

async fn a_name_that_resolves_inside_is_never_connected_to(app: TestAppBuilder) {
    let Some((name, address)) = name_of_an_inside_address() else {
        eprintln!("not tested: this machine's table of hosts has no name but localhost");
        return;
    };
    let stage = Stage::set(app.env("CLOISTER_WEBHOOKS__ALLOWED_HOSTS", "elsewhere.test")).await;
    let listener = TcpListener::bind((address, 0)).await.unwrap();
    let url = format!("http://{name}:{}/", listener.local_addr().unwrap().port());
    let told = outputs(&stage, &[tool("look", &url, json!({}))]).await;
    assert_eq!(told, [(FAILED.to_owned(), true)]);
    // A connection that was ever made waits in the listener's queue: ours would not be the first.
    let ours = tokio::net::TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (_, first) = listener.accept().await.unwrap();
    assert_eq!(first, ours.local_addr().unwrap(), "the endpoint was connected to");
}
