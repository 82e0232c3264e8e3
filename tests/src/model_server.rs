//! A model provider under the test's control: the OpenAI API over HTTP, answers from a script, and
//! a count of every token it charged. It speaks Chat Completions and the Responses API: the same script answers either.
//!
//! The script is a queue of [`Reply`]s ([`ModelServer::script`]); where it is empty, a function
//! answers ([`ModelServer::always`]). Nothing here is random, and nothing depends on the clock
//! unless the script asks for a delay.

mod completion;
mod delivery;
mod record;
mod reply;
mod responses;
mod validate;
mod validate_responses;

use std::collections::VecDeque;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{get, post};
use axum::serve::ListenerExt;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::task::AbortOnDropHandle;

use self::completion::Rendered;
use self::delivery::Gate;
pub use self::record::{Api, Ending, RecordedRequest, Served, Usage};
use self::record::{Book, Ticket};
pub use self::reply::Reply;
use self::reply::{Answer, Refusal};

/// The largest request body taken, in bytes.
const MAX_BODY: usize = 64 * 1024 * 1024;

type Script = Arc<dyn Fn(&RecordedRequest) -> Reply + Send + Sync>;

/// A scripted model server. It stops when it is dropped.
pub struct ModelServer {
    address: SocketAddr,
    provider: Arc<Provider>,
    _serving: AbortOnDropHandle<()>,
}

/// What the handlers share.
struct Provider {
    queue: Mutex<VecDeque<Reply>>,
    otherwise: Mutex<Option<Script>>,
    book: Arc<Book>,
    gate: Arc<Gate>,
}

impl ModelServer {
    /// Starts a server on a free port of the loopback interface.
    pub async fn start() -> ModelServer {
        Self::listen((Ipv4Addr::LOCALHOST, 0).into()).await.expect("a free port")
    }

    /// Starts a server on `address`.
    ///
    /// # Errors
    /// The address can't be bound.
    pub async fn listen(address: SocketAddr) -> io::Result<ModelServer> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let provider = Arc::new(Provider {
            queue: Mutex::default(),
            otherwise: Mutex::default(),
            book: Arc::default(),
            gate: Arc::default(),
        });
        let router = Router::new()
            .route("/v1/chat/completions", post(chat_completions))
            .route("/v1/responses", post(create_response))
            .route("/v1/models", get(models))
            .route("/served", get(served))
            .fallback(unknown_route)
            .with_state(provider.clone());
        let listener = listener.tap_io(|stream| {
            // Each piece of a reply is to leave as it is, not gathered with the next.
            let _ = stream.set_nodelay(true);
        });
        let serving = AbortOnDropHandle::new(tokio::spawn(async move {
            let _ = axum::serve(listener, router).await;
        }));
        Ok(ModelServer { address, provider, _serving: serving })
    }

    /// The base URL a client is given: `http://127.0.0.1:PORT/v1`.
    pub fn url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    /// Adds replies to the queue: each answers one request, in the order the requests come.
    pub fn script(&self, replies: impl IntoIterator<Item = Reply>) {
        self.provider.queue.lock().unwrap().extend(replies);
    }

    /// Answers every request that finds the queue empty.
    pub fn always(&self, script: impl Fn(&RecordedRequest) -> Reply + Send + Sync + 'static) {
        *self.provider.otherwise.lock().unwrap() = Some(Arc::new(script));
    }

    /// Replies still in the queue.
    pub fn unused(&self) -> usize {
        self.provider.queue.lock().unwrap().len()
    }

    /// What was charged so far. A call is charged once the head of its 2xx answer is sent, whether
    /// or not the rest of it arrives.
    pub fn served(&self) -> Served {
        self.provider.book.served()
    }

    /// The requests so far, in the order they came, as they stand now.
    pub fn requests(&self) -> Vec<RecordedRequest> {
        self.provider.book.requests()
    }

    /// Keeps only the last `count` requests in memory. Counters are not affected.
    pub fn keep_last(&self, count: usize) {
        self.provider.book.keep_last(count);
    }

    /// Waits until `count` requests have come, counted from the start, and returns the first `count`.
    ///
    /// # Panics
    /// They don't come within [`crate::PATIENCE`].
    pub async fn wait_for_requests(&self, count: usize) -> Vec<RecordedRequest> {
        let mut requests = self.wait_for(&format!("{count} requests"), |seen| seen.len() >= count).await;
        requests.truncate(count);
        requests
    }

    /// Waits until the requests so far satisfy `condition`, such as that the third one's client is gone.
    ///
    /// # Panics
    /// They don't within [`crate::PATIENCE`].
    pub async fn wait_for(&self, what: &str, condition: impl Fn(&[RecordedRequest]) -> bool) -> Vec<RecordedRequest> {
        self.provider.book.wait_for(what, condition).await
    }

    /// Waits until `count` replies stand still at their hold.
    ///
    /// # Panics
    /// They don't within [`crate::PATIENCE`].
    pub async fn wait_for_held(&self, count: usize) {
        self.provider.gate.wait_for_held(count).await;
    }

    /// Lets go on the reply that has been held longest. False if none is held.
    pub fn release(&self) -> bool {
        self.provider.gate.release()
    }

    /// Lets go on every reply that is held now; returns how many.
    pub fn release_all(&self) -> usize {
        std::iter::from_fn(|| self.release().then_some(())).count()
    }
}

impl Provider {
    /// The script's next word. One that has none is told so by a status that nobody retries.
    fn next_reply(&self, request: &RecordedRequest) -> Reply {
        if let Some(reply) = self.queue.lock().unwrap().pop_front() {
            return reply;
        }
        let script = self.otherwise.lock().unwrap().clone();
        match script {
            Some(script) => script(request),
            None => Reply::status(400).error_code("script_exhausted").error_message("The script has no reply left."),
        }
    }
}

async fn chat_completions(State(provider): State<Arc<Provider>>, headers: HeaderMap, body: Body) -> Response {
    respond(&provider, Api::ChatCompletions, headers, body).await
}

async fn create_response(State(provider): State<Arc<Provider>>, headers: HeaderMap, body: Body) -> Response {
    respond(&provider, Api::Responses, headers, body).await
}

async fn respond(provider: &Provider, api: Api, headers: HeaderMap, body: Body) -> Response {
    let body = match axum::body::to_bytes(body, MAX_BODY).await {
        Ok(body) => body,
        Err(_) => return Refusal::new(413, "The request body could not be read.").into_response(),
    };
    let parsed = serde_json::from_slice::<Value>(&body).ok();
    let (request, ticket) = provider.book.open(api, headers, parsed.clone().unwrap_or(Value::Null));
    let reply = match validate::check(&request, parsed.is_some()) {
        Ok(()) => provider.next_reply(&request),
        Err(refusal) => Reply::refused(refusal),
    };
    let mut response = answer(provider, reply, &request, ticket).await;
    let headers = response.headers_mut();
    headers.insert("x-request-id", format!("req_{:016x}", request.number).parse().expect("ASCII"));
    headers.insert("openai-version", "2020-10-01".parse().expect("ASCII"));
    response
}

async fn answer(provider: &Provider, reply: Reply, request: &RecordedRequest, mut ticket: Ticket) -> Response {
    tokio::time::sleep(reply.head_delay).await;
    let (status, content_type, steps) = match &reply.answer {
        Answer::Hang => std::future::pending().await,
        Answer::DropConnection => {
            ticket.end(Ending::Cut);
            // hyper closes the connection on it, before anything of the head has left.
            return Body::from_stream(futures_util::stream::iter([Err::<Bytes, _>(io::Error::other("dropped"))]))
                .into_response();
        }
        Answer::Refused(refusal) => (refusal.status, "application/json", delivery::whole(refusal.body())),
        Answer::Raw(bytes) => {
            ticket.charge(reply.usage.unwrap_or_default());
            let content_type =
                if request.is_stream() { "text/event-stream; charset=utf-8" } else { "application/json" };
            (StatusCode::OK, content_type, delivery::whole(bytes.clone()))
        }
        Answer::Completion(completion) => {
            let numbered = reply.number.map(|number| RecordedRequest { number, ..request.clone() });
            let request = numbered.as_ref().unwrap_or(request);
            let Rendered { content_type, pieces, usage } = completion::render(completion, reply.usage, request);
            ticket.charge(usage);
            (StatusCode::OK, content_type, delivery::steps(pieces, reply.hold))
        }
    };
    let steps = delivery::shape(steps, reply.wire_chunk, reply.cut_after);
    let body = delivery::body(steps, reply.gap, provider.gate.clone(), ticket);
    let mut response = (status, [("content-type", content_type)], body).into_response();
    response.headers_mut().extend(reply.headers);
    response
}

async fn models(headers: HeaderMap) -> Response {
    if let Err(refusal) = validate::authorised(&headers) {
        return refusal.into_response();
    }
    let model = |id: &str| json!({"id": id, "object": "model", "created": completion::CREATED, "owned_by": "cloister"});
    Json(json!({"object": "list", "data": [model("scripted-1"), model("scripted-2")]})).into_response()
}

async fn served(State(provider): State<Arc<Provider>>) -> Json<Served> {
    Json(provider.book.served())
}

async fn unknown_route(method: Method, uri: Uri) -> Refusal {
    Refusal::new(404, &format!("There is nothing at {method} {}.", uri.path())).code("unknown_url")
}
