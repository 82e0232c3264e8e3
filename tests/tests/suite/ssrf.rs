//! No URL of a tenant's leads into our own network: not when it is saved, nor when an operator stops vouching for its
//! host, nor by a redirect or a name that leads inside.

use std::collections::BTreeSet;
use std::net::Ipv6Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::Router;
use axum::http::{StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use cloister_tests::{Reply, TestApp};
use futures_util::future::join_all;
use reqwest::Url;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::task::AbortOnDropHandle;

use crate::steps::{Stage, refusals, tool, try_create_agent};
use crate::tools::name_of_an_inside_address;

const FAILED: &str = "An error occurred while running the tool. Please try again.";

/// Hosts inside, each in its own disguise: loopback, unspecified, private, shared, link-local, metadata, special and
/// multicast ranges, IPv4 inside IPv6, and names.
const INSIDE: [&str; 92] = [
    "127.0.0.1",
    "127.1",
    "127.0.1",
    "127.0.0.53",
    "127.255.255.254",
    "2130706433",
    "0x7f000001",
    "0x7f.1",
    "0X7F.0.0.0x1",
    "0177.0.0.1",
    "017700000001",
    "00000177.0.0.01",
    "127.0.0.1.",
    "0",
    "0x0",
    "0.0.0.0",
    "0.1.2.3",
    "１２７.0.0.1",
    "127。0。0。1",
    "①②⑦.0.0.1",
    "%31%32%37.0.0.1",
    "127%2e0%2e0%2e1",
    "localhost",
    "LOCALHOST",
    "localhost.",
    "foo.localhost",
    "ⓛocalhost",
    "loc%61lhost",
    "printer.local",
    "db.internal",
    "metadata.google.internal",
    "metadata.google.internal.",
    "10.0.0.1",
    "10.255.255.255",
    "167772161",
    "0xa000001",
    "012.0.0.1",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.0.1",
    "192.168.1",
    "3232235521",
    "100.64.0.1",
    "100.127.255.255",
    "169.254.169.254",
    "2852039166",
    "0xa9fea9fe",
    "0251.0376.0251.0376",
    "169.254.170.2",
    "168.63.129.16",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "[::1]",
    "[::]",
    "[0:0:0:0:0:0:0:1]",
    "[0000::0001]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::ffff:a9fe:a9fe]",
    "[::127.0.0.1]",
    "[::ffff:0:127.0.0.1]",
    "[64:ff9b::7f00:1]",
    "[64:ff9b::169.254.169.254]",
    "[64:ff9b:1::7f00:1]",
    "[2002:7f00:1::]",
    "[2002:a9fe:a9fe::1]",
    "[2002:0a00:0001::1]",
    "[2001:0:4136:e378:8000:63bf:80ff:fffe]",
    "[2001:0:7f00:1::]",
    "[fe80::1]",
    "[febf::1]",
    "[fec0::1]",
    "[fc00::1]",
    "[fd00:ec2::254]",
    "[fd12:3456:789a::1]",
    "[ff02::1]",
    "[ff05::2]",
    "[100::1]",
    "[2001:db8::1]",
    "[2001:2::1]",
    "[2001:10::1]",
    "[2001:20::1]",
    "[3fff::1]",
    "[5f00::1]",
];

/// What can't even be a URL of a tool, wherever it leads.
const MALFORMED: [&str; 14] = [
    "http://user@127.0.0.1/",
    "http://user:password@example.com/",
    "http://example.com@127.0.0.1/",
    "http://[fe80::1%25eth0]/",
    "http://[fe80::1%eth0]/",
    "http://127.0.0.1:99999/",
    "http://127.0.0.1%00.example.com/",
    "http://",
    "http://256.256.256.256/",
    "file:///etc/passwd",
    "gopher://127.0.0.1/",
    "ftp://127.0.0.1/",
    "unix:/run/docker.sock",
    "//127.0.0.1/",
];

/// Listens on all addresses of this machine, and counts who comes.
struct Sentinel {
    port: u16,
    visits: Arc<AtomicUsize>,
    _listening: AbortOnDropHandle<()>,
}

impl Sentinel {
    async fn start() -> Sentinel {
        let listener = match TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)).await {
            Ok(listener) => listener,
            Err(_) => TcpListener::bind(("0.0.0.0", 0)).await.unwrap(),
        };
        let port = listener.local_addr().unwrap().port();
        let visits = Arc::new(AtomicUsize::new(0));
        let counted = visits.clone();
        let listening = tokio::spawn(async move {
            while let Ok((visitor, _)) = listener.accept().await {
                counted.fetch_add(1, Ordering::SeqCst);
                drop(visitor);
            }
        });
        Sentinel { port, visits, _listening: AbortOnDropHandle::new(listening) }
    }

    /// Whoever came before us was counted before us.
    async fn assert_unvisited(&self) {
        let before = self.visits.load(Ordering::SeqCst);
        let _ours = TcpStream::connect(("127.0.0.1", self.port)).await.unwrap();
        let counted = || async { self.visits.load(Ordering::SeqCst) };
        let after = crate::steps::until("we are counted", counted, |count| *count > before).await;
        assert_eq!(after, 1, "somebody connected");
    }
}

fn mcp(url: &str) -> Value {
    json!({"mcp": {"name": "Inside", "url": url}})
}

#[tokio::test(flavor = "multi_thread")]
async fn urls_that_lead_inside_are_refused_when_an_agent_is_saved() {
    let stage = Stage::set(TestApp::builder().env("CLOISTER_WEBHOOKS__ALLOWED_HOSTS", "")).await;
    let sentinel = Sentinel::start().await;
    let inside = INSIDE.iter().map(|host| format!("http://{host}:{}/", sentinel.port));
    let urls: Vec<String> = inside.chain(MALFORMED.map(str::to_owned)).collect();
    for kind in ["webhook", "mcp"] {
        let made = |(at, url): (usize, &String)| match kind {
            "webhook" => tool(&format!("t{at}"), url, json!({})),
            _ => json!({"mcp": {"name": format!("S{at}"), "url": url}}),
        };
        let tools: Vec<Value> = urls.iter().enumerate().map(made).collect();
        let refused = refusals(&try_create_agent(stage.client(), json!({"tools": tools})).await);
        for (at, url) in urls.iter().enumerate() {
            let own = ("INVALID".to_owned(), format!("tools.{at}.{kind}.url"));
            assert!(refused.contains(&own), "{kind} {url} was let through");
        }
    }
    sentinel.assert_unvisited().await;
}

/// Saved while the operator vouched for its host, an agent is run when nobody does any more.
#[tokio::test(flavor = "multi_thread")]
async fn urls_that_lead_inside_are_not_called() {
    let sentinel = Sentinel::start().await;
    let urls: Vec<String> = INSIDE.iter().map(|host| format!("http://{host}:{}/", sentinel.port)).collect();
    let hosts: BTreeSet<String> =
        urls.iter().map(|url| Url::parse(url).unwrap().host_str().unwrap().trim_end_matches('.').to_owned()).collect();
    let allowed = hosts.into_iter().collect::<Vec<_>>().join(",");
    let mut stage = Stage::set(TestApp::builder().env("CLOISTER_WEBHOOKS__ALLOWED_HOSTS", &allowed)).await;

    let named = urls.iter().enumerate().map(|(at, url)| tool(&format!("t{at}"), url, json!({})));
    let caller = stage.agent(json!({"tools": named.collect::<Vec<_>>()})).await;
    let mut askers = Vec::new();
    for url in &urls {
        askers.push(stage.agent(json!({"tools": [mcp(url)]})).await);
    }
    stage.app.set_env("CLOISTER_WEBHOOKS__ALLOWED_HOSTS", "elsewhere.test");
    stage.app.restart().await;
    stage.tenant.client = stage.app.client(&stage.tenant.key);

    let call = |at: usize| format!("t{at}");
    let first = Reply::tool_call(&call(0), json!({}));
    let reply = (1..urls.len()).fold(first, |reply, at| reply.and_tool_call(&call(at), json!({})));
    stage.model.script([reply, Reply::text("Done")]);
    let ended = stage.run(&caller, "Go").await;
    ended.output();
    assert_eq!(ended.outputs(), vec![(FAILED.to_owned(), true); urls.len()]);

    let runs = join_all(askers.iter().map(|agent| stage.run(agent, "Go"))).await;
    for (run, url) in runs.iter().zip(&urls) {
        assert_eq!(run.error(), "TOOL", "{url}");
        let message = run.run["error"]["message"].as_str().unwrap();
        assert!(message.contains("\"Inside\" can't be called"), "{url}: {message}");
    }
    assert_eq!(stage.model.requests().len(), 2, "no model is asked before the tools are known");
    sentinel.assert_unvisited().await;
}

/// Answers `/303` with a redirect of that status to the port.
async fn redirector(port: u16) -> (String, AbortOnDropHandle<()>) {
    let answer = move |uri: Uri| async move {
        let status: u16 = uri.path().trim_start_matches('/').parse().unwrap();
        let location = [("location", format!("http://127.0.0.1:{port}/"))];
        let response: Response = (StatusCode::from_u16(status).unwrap(), location).into_response();
        response
    };
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let host = listener.local_addr().unwrap().to_string();
    let serving = tokio::spawn(async move {
        let _ = axum::serve(listener, Router::new().fallback(answer)).await;
    });
    (host, AbortOnDropHandle::new(serving))
}

#[tokio::test(flavor = "multi_thread")]
async fn redirects_are_not_followed_whatever_their_status() {
    let sentinel = Sentinel::start().await;
    let (host, _serving) = redirector(sentinel.port).await;
    // The operator vouches for the one that redirects, not for where it leads.
    let stage = Stage::set(TestApp::builder().env("CLOISTER_WEBHOOKS__ALLOWED_HOSTS", &host)).await;
    let statuses: Vec<u16> = (300..=308).collect();
    let tools: Vec<Value> = statuses
        .iter()
        .map(|status| tool(&format!("t{status}"), &format!("http://{host}/{status}"), json!({})))
        .collect();
    let agent = stage.agent(json!({"tools": tools})).await;
    let reply = (301..=308)
        .fold(Reply::tool_call("t300", json!({})), |reply, at| reply.and_tool_call(&format!("t{at}"), json!({})));
    stage.model.script([reply, Reply::text("Done")]);
    let ended = stage.run(&agent, "Go").await;
    assert_eq!(ended.outputs(), vec![(FAILED.to_owned(), true); statuses.len()]);
    for status in statuses {
        let agent = stage.agent(json!({"tools": [mcp(&format!("http://{host}/{status}"))]})).await;
        let run = stage.run(&agent, "Go").await;
        assert_eq!(run.error(), "TOOL");
        let message = run.run["error"]["message"].as_str().unwrap();
        assert!(message.contains(&format!("status {status}")), "{message}");
    }
    sentinel.assert_unvisited().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_leads_inside_is_no_mcp_server() {
    let Some((name, address)) = name_of_an_inside_address() else {
        eprintln!("not tested: this machine's table of hosts has no name but localhost");
        return;
    };
    let stage = Stage::set(TestApp::builder().env("CLOISTER_WEBHOOKS__ALLOWED_HOSTS", "elsewhere.test")).await;
    let sentinel = Sentinel::start().await;
    let agent = stage.agent(json!({"tools": [mcp(&format!("http://{name}:{}/", sentinel.port))]})).await;
    let run = stage.run(&agent, "Go").await;
    assert_eq!(run.error(), "TOOL");
    let message = run.run["error"]["message"].as_str().unwrap();
    assert!(message.contains(&format!("points to {address}")), "{message}");
    sentinel.assert_unvisited().await;
}
