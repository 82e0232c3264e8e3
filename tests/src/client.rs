//! Clients of the API for tests: GraphQL over HTTP, server-sent events and a raw WebSocket, and the
//! REST routes.

use std::pin::Pin;
use std::sync::Once;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::http::{HeaderMap, StatusCode};
use bytes::{Bytes, BytesMut};
use futures_util::stream::BoxStream;
use futures_util::{SinkExt, Stream, StreamExt};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::{Error as WsError, Message, client::IntoClientRequest};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

use crate::PATIENCE;

/// A client of one server, with or without a key.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    base: String,
    key: Option<String>,
}

impl Client {
    /// A client of the server at `base` (`http://127.0.0.1:PORT`), with a key.
    pub fn new(base: &str, key: &str) -> Client {
        Client { key: Some(key.to_owned()), ..Client::anonymous(base) }
    }

    /// A client that sends no key.
    pub fn anonymous(base: &str) -> Client {
        Client { http: http(), base: base.to_owned(), key: None }
    }

    /// The URL of a path of the server.
    pub fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    /// POSTs a GraphQL operation. What comes back is not judged.
    pub async fn query(&self, query: &str, variables: Value) -> GraphqlResponse {
        let request = self.request(reqwest::Method::POST, "/graphql");
        let request = request.header("accept", "application/graphql-response+json, application/json;q=0.9");
        GraphqlResponse::read(send(request.json(&json!({"query": query, "variables": variables}))).await).await
    }

    /// As [`Client::query`], for one who bears that a connection breaks: with a pod that goes, before it is answered.
    ///
    /// # Errors
    /// No answer came.
    pub async fn try_query(&self, query: &str, variables: Value) -> Result<GraphqlResponse, reqwest::Error> {
        let request = self.request(reqwest::Method::POST, "/graphql").header("accept", "application/json");
        let answer = request.json(&json!({"query": query, "variables": variables})).send().await?;
        Ok(GraphqlResponse::read(answer).await)
    }

    /// The data of a GraphQL operation.
    ///
    /// # Panics
    /// It has errors.
    pub async fn data(&self, query: &str, variables: Value) -> Value {
        self.query(query, variables).await.data().clone()
    }

    /// POSTs JSON to a REST route.
    pub async fn rest_post(&self, path: &str, body: &Value) -> GraphqlResponse {
        GraphqlResponse::read(send(self.rest_request(reqwest::Method::POST, path).json(body)).await).await
    }

    /// GETs a REST route.
    pub async fn rest_get(&self, path: &str) -> GraphqlResponse {
        GraphqlResponse::read(send(self.rest_request(reqwest::Method::GET, path)).await).await
    }

    /// A request with the key as a bearer token, to be completed and sent by the test.
    pub fn request(&self, method: reqwest::Method, path: &str) -> reqwest::RequestBuilder {
        let request = self.http.request(method, self.url(path));
        match &self.key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }

    /// Subscribes over server-sent events.
    ///
    /// # Panics
    /// The server refuses.
    pub async fn subscribe_sse(&self, query: &str, variables: Value) -> SseStream {
        match self.try_subscribe_sse(query, variables).await {
            Ok(stream) => stream,
            Err(refused) => panic!("the subscription is refused: {} {}", refused.status, refused.body),
        }
    }

    /// Subscribes over server-sent events.
    ///
    /// # Errors
    /// What the server answered, where that is no event stream.
    pub async fn try_subscribe_sse(&self, query: &str, variables: Value) -> Result<SseStream, GraphqlResponse> {
        let request = self.request(reqwest::Method::POST, "/graphql").header("accept", "text/event-stream");
        let response = send(request.json(&json!({"query": query, "variables": variables}))).await;
        let content_type = response.headers().get("content-type").and_then(|value| value.to_str().ok());
        if content_type.is_some_and(|content_type| content_type.starts_with("text/event-stream")) {
            Ok(SseStream::new(response))
        } else {
            Err(GraphqlResponse::read(response).await)
        }
    }

    /// Subscribes over server-sent events as soon as the server is there, as a client does that lost it.
    ///
    /// # Panics
    /// The server refuses, or is not there within [`PATIENCE`].
    pub async fn reconnect_sse(&self, query: &str, variables: Value) -> SseStream {
        Self::reconnect_sse_to(std::slice::from_ref(self), query, variables).await
    }

    /// Subscribes over server-sent events at the first of several servers that takes it; those that are away, or say
    /// that they can't (5xx), are asked again in turn.
    ///
    /// # Panics
    /// One refuses, or none is there within [`PATIENCE`].
    pub async fn reconnect_sse_to(clients: &[Client], query: &str, variables: Value) -> SseStream {
        let body = json!({"query": query, "variables": variables});
        let connected = async {
            for client in clients.iter().cycle() {
                let request = client.request(reqwest::Method::POST, "/graphql").header("accept", "text/event-stream");
                match request.json(&body).send().await {
                    Ok(response) if !response.status().is_server_error() => return response,
                    _ => tokio::time::sleep(Duration::from_millis(10)).await,
                }
            }
            unreachable!("a cycle has no end");
        };
        let response = tokio::time::timeout(PATIENCE, connected).await.expect("a server comes back");
        assert_eq!(response.status(), StatusCode::OK, "the subscription is refused");
        SseStream::new(response)
    }

    /// Opens a graphql-transport-ws socket, without a key and without `connection_init`.
    ///
    /// # Panics
    /// The server refuses the upgrade.
    pub async fn ws(&self) -> Ws {
        match self.try_ws("graphql-transport-ws", &[]).await {
            Ok(ws) => ws,
            Err(error) => panic!("the upgrade is refused: {error}"),
        }
    }

    /// Opens a socket and has it acknowledged, the key as `Authorization` in `connection_init`.
    ///
    /// # Panics
    /// The server refuses.
    pub async fn ws_ready(&self) -> Ws {
        let mut ws = self.ws().await;
        let payload = self.key.as_ref().map(|key| json!({"Authorization": format!("Bearer {key}")}));
        ws.send(&json!({"type": "connection_init", "payload": payload.unwrap_or_else(|| json!({}))})).await;
        assert_eq!(ws.next().await.message()["type"], "connection_ack");
        ws
    }

    /// Opens a socket with a subprotocol and headers of the test's choice.
    ///
    /// # Errors
    /// The server refuses the upgrade.
    pub async fn try_ws(&self, protocol: &str, headers: &[(&'static str, &str)]) -> Result<Ws, WsError> {
        let url = self.url("/graphql").replacen("http", "ws", 1);
        let mut request = url.into_client_request()?;
        request.headers_mut().insert("sec-websocket-protocol", protocol.parse().expect("a header's value"));
        for (name, value) in headers {
            request.headers_mut().insert(*name, value.parse().expect("a header's value"));
        }
        let (socket, _) = connect_async(request).await?;
        Ok(Ws { socket })
    }

    /// The seed's REST routes take the key in a header of their own.
    fn rest_request(&self, method: reqwest::Method, path: &str) -> reqwest::RequestBuilder {
        let request = self.http.request(method, self.url(path));
        match &self.key {
            Some(key) => request.header("x-api-key", key),
            None => request,
        }
    }
}

/// An HTTP client as every test uses it. It follows no redirect and uses no proxy.
pub fn http() -> reqwest::Client {
    static PROVIDER: Once = Once::new();
    PROVIDER.call_once(|| {
        // Another part of the process may have installed one: any will do.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
    let builder = reqwest::Client::builder().no_proxy().redirect(reqwest::redirect::Policy::none());
    builder.tcp_nodelay(true).build().expect("an HTTP client")
}

async fn send(request: reqwest::RequestBuilder) -> reqwest::Response {
    request.send().await.expect("the server answers")
}

/// An answer of the API.
#[derive(Clone, Debug)]
pub struct GraphqlResponse {
    /// The HTTP status.
    pub status: StatusCode,
    /// The HTTP headers.
    pub headers: HeaderMap,
    /// The JSON body; a string if it was none.
    pub body: Value,
}

impl GraphqlResponse {
    async fn read(response: reqwest::Response) -> GraphqlResponse {
        let (status, headers) = (response.status(), response.headers().clone());
        let text = response.text().await.expect("a readable body");
        let body = serde_json::from_str(&text).unwrap_or(Value::String(text));
        GraphqlResponse { status, headers, body }
    }

    /// The data.
    ///
    /// # Panics
    /// There are errors.
    pub fn data(&self) -> &Value {
        assert!(self.errors().is_empty() && self.status.is_success(), "{} {}", self.status, self.body);
        &self.body["data"]
    }

    /// The payload of the mutation `field`.
    ///
    /// # Panics
    /// There are errors, the payload's own included.
    pub fn payload(&self, field: &str) -> &Value {
        let payload = &self.data()[field];
        assert_eq!(payload["errors"], json!([]), "{field} is refused");
        payload
    }

    /// The GraphQL errors.
    pub fn errors(&self) -> &[Value] {
        self.body["errors"].as_array().map_or(&[], Vec::as_slice)
    }

    /// `extensions.code` of the first error.
    pub fn error_code(&self) -> Option<&str> {
        self.errors().first()?["extensions"]["code"].as_str()
    }

    /// A header's value, if it is there and text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

/// The results of a subscription over server-sent events (graphql-sse, distinct connections). The
/// stream ends with the `complete` event or with the connection.
pub struct SseStream {
    bytes: BoxStream<'static, reqwest::Result<Bytes>>,
    buffer: BytesMut,
    completed: bool,
    ended: bool,
}

impl SseStream {
    fn new(response: reqwest::Response) -> SseStream {
        let bytes = response.bytes_stream().boxed();
        SseStream { bytes, buffer: BytesMut::new(), completed: false, ended: false }
    }

    /// Whether the server said `complete`, rather than that the connection broke.
    pub fn completed(&self) -> bool {
        self.completed
    }

    /// The next result; none at the end.
    ///
    /// # Panics
    /// Nothing comes for longer than [`PATIENCE`].
    pub async fn next_result(&mut self) -> Option<Value> {
        tokio::time::timeout(PATIENCE, self.next()).await.expect("the subscription says nothing")
    }

    /// Takes the first whole event out of the buffer: its name and its data.
    fn take_event(&mut self) -> Option<(String, String)> {
        let end = self.buffer.windows(2).position(|pair| pair == b"\n\n")?;
        let block = self.buffer.split_to(end + 2);
        let (mut name, mut data) = (String::new(), Vec::new());
        for line in String::from_utf8_lossy(&block).lines() {
            let (field, value) = line.split_once(':').unwrap_or((line, ""));
            let value = value.strip_prefix(' ').unwrap_or(value);
            match field {
                "event" => name = value.to_owned(),
                "data" => data.push(value.to_owned()),
                // A line that begins with a colon is a comment that keeps the connection alive.
                _ => {}
            }
        }
        Some((name, data.join("\n")))
    }
}

impl Stream for SseStream {
    type Item = Value;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Value>> {
        loop {
            if self.ended {
                return Poll::Ready(None);
            }
            match self.take_event() {
                Some((name, data)) if name == "next" => {
                    return Poll::Ready(Some(serde_json::from_str(&data).expect("a result is JSON")));
                }
                Some((name, _)) if name == "complete" => {
                    self.completed = true;
                    self.ended = true;
                }
                Some(_) => {}
                None => match self.bytes.poll_next_unpin(context) {
                    Poll::Ready(Some(Ok(bytes))) => self.buffer.extend_from_slice(&bytes),
                    Poll::Ready(Some(Err(_)) | None) => self.ended = true,
                    Poll::Pending => return Poll::Pending,
                },
            }
        }
    }
}

/// A WebSocket under the test's control.
pub struct Ws {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
}

/// What comes over a WebSocket.
#[derive(Clone, Debug, PartialEq)]
pub enum WsEvent {
    /// A text frame with JSON.
    Message(Value),
    /// The server closed.
    Closed {
        /// The close code; 1005 without one, 1006 without a close frame.
        code: u16,
        /// The reason.
        reason: String,
    },
}

impl WsEvent {
    /// The message.
    ///
    /// # Panics
    /// The server closed instead.
    pub fn message(&self) -> &Value {
        match self {
            WsEvent::Message(message) => message,
            closed => panic!("not a message: {closed:?}"),
        }
    }

    /// The close code, if the server closed.
    pub fn close_code(&self) -> Option<u16> {
        match self {
            WsEvent::Closed { code, .. } => Some(*code),
            WsEvent::Message(_) => None,
        }
    }
}

impl Ws {
    /// Sends a message of the protocol.
    pub async fn send(&mut self, message: &Value) {
        self.send_raw(Message::text(message.to_string())).await;
    }

    /// Sends any frame, such as text that is no JSON.
    pub async fn send_raw(&mut self, message: Message) {
        self.socket.send(message).await.expect("the socket is open");
    }

    /// Begins an operation under `id`.
    pub async fn subscribe(&mut self, id: &str, query: &str, variables: Value) {
        let payload = json!({"query": query, "variables": variables});
        self.send(&json!({"type": "subscribe", "id": id, "payload": payload})).await;
    }

    /// What comes next. WebSocket pings are answered by the way.
    ///
    /// # Panics
    /// Nothing comes for longer than [`PATIENCE`].
    pub async fn next(&mut self) -> WsEvent {
        tokio::time::timeout(PATIENCE, self.receive()).await.expect("the socket says nothing")
    }

    async fn receive(&mut self) -> WsEvent {
        let closed = |code, reason: &str| WsEvent::Closed { code, reason: reason.to_owned() };
        loop {
            match self.socket.next().await {
                Some(Ok(Message::Text(text))) => {
                    return WsEvent::Message(serde_json::from_str(&text).expect("a message is JSON"));
                }
                Some(Ok(Message::Close(Some(frame)))) => return closed(frame.code.into(), &frame.reason),
                Some(Ok(Message::Close(None))) => return closed(1005, ""),
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return closed(1006, ""),
            }
        }
    }
}
