//! The instant model server: the least that speaks Chat Completions, in a process of its own, so that what is
//! measured is the stack before it.
//!
//! A user's message may set the pace: `wait=MS` until the first token, `deltas=N`, `gap=MS` between them; and with
//! `turns=N` all answers but the Nth call the tool `look`, which is served here too. Each
//! answer's text says when it was made: `ARRIVED SENT`, then ` SENT` with each further delta, in [`now`]'s
//! nanoseconds.

use std::convert::Infallible;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::serve::ListenerExt;
use cloister_tests::scope::{EndBy, Scope};
use futures_util::stream;
use tokio::net::TcpListener;

/// What every call is charged, in tokens.
const PROMPT_TOKENS: u32 = 20;
const COMPLETION_TOKENS: u32 = 10;

/// What every chunk of a stream begins with.
const CHUNK: &str = r#""id":"chatcmpl-1","object":"chat.completion.chunk","created":1700000000,"model":"scripted-1""#;

/// Nanoseconds since 1970. All processes of a measurement share the machine's clock.
#[expect(clippy::disallowed_methods, reason = "there is no App here, and the clock must be other processes' too")]
pub fn now() -> u64 {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX)
}

/// The server, running as a child. It ends when it is dropped.
pub struct Model {
    child: Child,
    address: SocketAddr,
}

impl Model {
    /// Starts one on a free port.
    pub fn start() -> Model {
        let program = std::env::current_exe().expect("the benchmark's own path");
        let mut child = Command::new(program).arg("model").stdout(Stdio::piped()).spawn().expect("the model server");
        Scope::current().adopt(child.id(), EndBy::Kill);
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("the model server's address");
        let address = line.trim().parse().expect("the model server's address");
        Model { child, address }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The base URL a client is given.
    pub fn url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    /// Where the tool is.
    pub fn tool_url(&self) -> String {
        format!("http://{}/tool", self.address)
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        Scope::current().disown(self.child.id());
    }
}

/// Serves until the process is killed; prints the address first.
pub async fn serve() -> std::io::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("{}", listener.local_addr()?);
    let served = Arc::new(AtomicU64::new(0));
    let router = Router::new()
        .route("/v1/chat/completions", post(chat))
        .route("/tool", post(async || "ok"))
        .route("/served", get(async |State(served): State<Arc<AtomicU64>>| served.load(Ordering::Relaxed).to_string()))
        .with_state(served);
    axum::serve(listener.tap_io(|stream| drop(stream.set_nodelay(true))), router).await
}

async fn chat(State(served): State<Arc<AtomicU64>>, body: Bytes) -> Response {
    let arrived = now();
    served.fetch_add(1, Ordering::Relaxed);
    let body = String::from_utf8_lossy(&body);
    let pace = Pace::of(&body);
    // The SDKs write JSON with and without a space after the colon.
    let is_stream = body.contains(r#""stream":true"#) || body.contains(r#""stream": true"#);
    if !pace.wait.is_zero() {
        tokio::time::sleep(pace.wait).await;
    }
    if calls_tool(&body) {
        let id = served.load(Ordering::Relaxed);
        return match is_stream {
            true => ([(CONTENT_TYPE, "text/event-stream")], streamed_call(id)).into_response(),
            false => ([(CONTENT_TYPE, "application/json")], whole_call(id)).into_response(),
        };
    }
    if !is_stream {
        return ([(CONTENT_TYPE, "application/json")], completion(arrived)).into_response();
    }
    let first = chunk(r#"{"role":"assistant","content":""}"#, "null") + &delta(&format!("{arrived} {}", now()));
    let body = if pace.deltas <= 1 { Body::from(first + &ending()) } else { paced(first, pace) };
    ([(CONTENT_TYPE, "text/event-stream")], body).into_response()
}

/// Whether the run has turns left before its last one.
fn calls_tool(body: &str) -> bool {
    let Some(turns) = Pace::value(body, "turns=") else { return false };
    let answered = body.matches(r#""role":"tool""#).count() + body.matches(r#""role": "tool""#).count();
    (answered as u64) + 1 < turns
}

fn call(id: u64) -> String {
    format!(r#"{{"id":"call_{id}","type":"function","function":{{"name":"look","arguments":"{{}}"}}}}"#)
}

fn whole_call(id: u64) -> String {
    let (call, usage) = (call(id), usage());
    format!(
        "{{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion\",\"created\":1700000000,\"model\":\"scripted-1\",\
         \"choices\":[{{\"index\":0,\"message\":{{\"role\":\"assistant\",\"content\":null,\"refusal\":null,\
         \"tool_calls\":[{call}]}},\"logprobs\":null,\"finish_reason\":\"tool_calls\"}}],\"usage\":{usage}}}"
    )
}

fn streamed_call(id: u64) -> String {
    let call = call(id).replacen('{', r#"{"index":0,"#, 1);
    let first = chunk(&format!(r#"{{"role":"assistant","content":null,"tool_calls":[{call}]}}"#), "null");
    let usage = format!("data: {{{CHUNK},\"choices\":[],\"usage\":{}}}\n\ndata: [DONE]\n\n", usage());
    first + &chunk("{}", r#""tool_calls""#) + &usage
}

/// The answer in pieces, each sent when it is made.
fn paced(first: String, pace: Pace) -> Body {
    Body::from_stream(stream::unfold(0, move |at| {
        let first = first.clone();
        async move {
            if at > pace.deltas {
                return None;
            }
            if at > 0 {
                tokio::time::sleep(pace.gap).await;
            }
            let piece = match at {
                0 => first,
                at if at < pace.deltas => delta(&format!(" {}", now())),
                _ => ending(),
            };
            Some((Ok::<_, Infallible>(Bytes::from(piece)), at + 1))
        }
    }))
}

/// How an answer goes out.
#[derive(Clone, Copy)]
struct Pace {
    wait: Duration,
    deltas: u64,
    gap: Duration,
}

impl Pace {
    /// What the last message in `body` asks for; everything at once unless it says otherwise.
    fn of(body: &str) -> Pace {
        let value = |name: &str| Pace::value(body, name);
        let milliseconds = |name| Duration::from_millis(value(name).unwrap_or(0));
        Pace { wait: milliseconds("wait="), deltas: value("deltas=").unwrap_or(1), gap: milliseconds("gap=") }
    }

    /// What the last `name` in a body is followed by.
    fn value(body: &str, name: &str) -> Option<u64> {
        let digits = &body[body.rfind(name)? + name.len()..];
        digits[..digits.find(|c: char| !c.is_ascii_digit())?].parse().ok()
    }
}

fn completion(arrived: u64) -> String {
    let (sent, usage) = (now(), usage());
    format!(
        "{{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion\",\"created\":1700000000,\"model\":\"scripted-1\",\
         \"choices\":[{{\"index\":0,\"message\":{{\"role\":\"assistant\",\"content\":\"{arrived} {sent}\",\
         \"refusal\":null}},\"logprobs\":null,\"finish_reason\":\"stop\"}}],\"usage\":{usage}}}"
    )
}

fn delta(text: &str) -> String {
    chunk(&format!(r#"{{"content":"{text}"}}"#), "null")
}

/// The last pieces: why it ends, what it used, and that it is over.
fn ending() -> String {
    format!("{}data: {{{CHUNK},\"choices\":[],\"usage\":{}}}\n\ndata: [DONE]\n\n", chunk("{}", r#""stop""#), usage())
}

fn chunk(delta: &str, finish_reason: &str) -> String {
    format!(
        "data: {{{CHUNK},\"choices\":[{{\"index\":0,\"delta\":{delta},\"finish_reason\":{finish_reason}}}],\
         \"usage\":null}}\n\n"
    )
}

fn usage() -> String {
    let total = PROMPT_TOKENS + COMPLETION_TOKENS;
    format!(
        "{{\"prompt_tokens\":{PROMPT_TOKENS},\"completion_tokens\":{COMPLETION_TOKENS},\"total_tokens\":{total},\
         \"prompt_tokens_details\":{{\"cached_tokens\":0}},\"completion_tokens_details\":{{\"reasoning_tokens\":0}}}}"
    )
}
