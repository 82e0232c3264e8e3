//! The tenant's side of webhook tools: an HTTP server that records what it is sent and answers as told.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::header::{LOCATION, RETRY_AFTER};
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use crate::PATIENCE;

/// What a webhook was sent.
#[derive(Clone, Debug)]
pub struct ToolRequest {
    /// The HTTP method.
    pub method: Method,
    /// The path with its query.
    pub path: String,
    /// The HTTP headers.
    pub headers: HeaderMap,
    /// The body, byte by byte, as a signature covers it.
    pub body: Bytes,
}

impl ToolRequest {
    /// A header's value, if it is there and text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// The body as JSON; null if it is none.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }
}

/// What a webhook answers.
#[derive(Clone, Debug)]
#[must_use]
pub struct ToolAnswer {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
    delay: Duration,
    hangs: bool,
}

impl ToolAnswer {
    /// 200 with this text.
    pub fn text(body: impl Into<String>) -> ToolAnswer {
        ToolAnswer::new(200, Bytes::from(body.into()))
    }

    /// 200 with this JSON.
    pub fn json(body: &Value) -> ToolAnswer {
        let mut answer = ToolAnswer::text(body.to_string());
        answer.headers.insert("content-type", "application/json".parse().expect("ASCII"));
        answer
    }

    /// 200 with exactly these bytes.
    pub fn bytes(body: impl Into<Bytes>) -> ToolAnswer {
        ToolAnswer::new(200, body.into())
    }

    /// This status, with an empty body.
    pub fn status(status: u16) -> ToolAnswer {
        ToolAnswer::new(status, Bytes::new())
    }

    /// A redirect (307, which keeps method and body) to `url`.
    pub fn redirect(url: &str) -> ToolAnswer {
        let mut answer = ToolAnswer::status(307);
        answer.headers.insert(LOCATION, url.parse().expect("a URL"));
        answer
    }

    /// No answer ever.
    pub fn hang() -> ToolAnswer {
        ToolAnswer { hangs: true, ..ToolAnswer::status(200) }
    }

    /// Waits before it answers, in milliseconds.
    pub fn delay(mut self, milliseconds: u64) -> ToolAnswer {
        self.delay = Duration::from_millis(milliseconds);
        self
    }

    /// `Retry-After`, in seconds.
    pub fn retry_after(mut self, seconds: u64) -> ToolAnswer {
        self.headers.insert(RETRY_AFTER, seconds.into());
        self
    }

    fn new(status: u16, body: Bytes) -> ToolAnswer {
        let status = StatusCode::from_u16(status).expect("an HTTP status");
        ToolAnswer { status, headers: HeaderMap::new(), body, delay: Duration::ZERO, hangs: false }
    }
}

type Script = Arc<dyn Fn(&ToolRequest) -> ToolAnswer + Send + Sync>;

#[derive(Default)]
struct Receiver {
    queue: Mutex<VecDeque<ToolAnswer>>,
    otherwise: Mutex<Option<Script>>,
    requests: Mutex<Vec<ToolRequest>>,
    count: watch::Sender<usize>,
}

/// A webhook receiver. It stops when it is dropped.
pub struct ToolServer {
    address: SocketAddr,
    receiver: Arc<Receiver>,
    _serving: AbortOnDropHandle<()>,
}

impl ToolServer {
    /// Starts a receiver on a free port of the loopback interface. It answers 200 with `ok` until it is told otherwise.
    pub async fn start() -> ToolServer {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let receiver = Arc::new(Receiver::default());
        let router = Router::new().fallback(receive).with_state(receiver.clone());
        let serving = AbortOnDropHandle::new(tokio::spawn(async move {
            let _ = axum::serve(listener, router).await;
        }));
        ToolServer { address, receiver, _serving: serving }
    }

    /// The URL of a path, such as `/weather`.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// Adds answers to the queue, one for each request, in the order they come.
    pub fn script(&self, answers: impl IntoIterator<Item = ToolAnswer>) {
        self.receiver.queue.lock().unwrap().extend(answers);
    }

    /// Answers every request that finds the queue empty.
    pub fn always(&self, script: impl Fn(&ToolRequest) -> ToolAnswer + Send + Sync + 'static) {
        *self.receiver.otherwise.lock().unwrap() = Some(Arc::new(script));
    }

    /// The requests so far, in the order they came.
    pub fn requests(&self) -> Vec<ToolRequest> {
        self.receiver.requests.lock().unwrap().clone()
    }

    /// Waits until `count` requests have come, counted from the start, and returns the first `count`.
    ///
    /// # Panics
    /// They don't come within [`PATIENCE`].
    pub async fn wait_for_requests(&self, count: usize) -> Vec<ToolRequest> {
        let mut seen = self.receiver.count.subscribe();
        let enough = tokio::time::timeout(PATIENCE, seen.wait_for(|seen| *seen >= count)).await;
        assert!(enough.is_ok(), "{} webhook requests came, not {count}", self.requests().len());
        let mut requests = self.requests();
        requests.truncate(count);
        requests
    }
}

async fn receive(
    State(receiver): State<Arc<Receiver>>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let request = ToolRequest { method, path: uri.to_string(), headers, body };
    receiver.requests.lock().unwrap().push(request.clone());
    receiver.count.send_modify(|count| *count += 1);
    let answer = receiver.next_answer(&request);
    if answer.hangs {
        std::future::pending::<()>().await;
    }
    tokio::time::sleep(answer.delay).await;
    (answer.status, answer.headers, answer.body).into_response()
}

impl Receiver {
    fn next_answer(&self, request: &ToolRequest) -> ToolAnswer {
        if let Some(answer) = self.queue.lock().unwrap().pop_front() {
            return answer;
        }
        let script = self.otherwise.lock().unwrap().clone();
        script.map_or_else(|| ToolAnswer::text("ok"), |script| script(request))
    }
}
