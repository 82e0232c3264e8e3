//! GraphQL over WebSocket: the subprotocol graphql-transport-ws.
//! Source: <https://github.com/enisdenjo/graphql-ws/blob/master/PROTOCOL.md>.
//!
//! A connection is one task that reads, and polls its operations, and one that writes. Between them is a
//! short queue. When it is full, nothing more is read or polled: a slow peer holds up its own operations,
//! and costs no memory.

use std::collections::HashMap;
use std::pin::Pin;
use std::time::Duration;

use async_graphql::{Response as GraphqlResponse, ServerError};
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code};
use axum::response::Response;
use futures_util::stream::{AbortHandle, Abortable, BoxStream, SelectAll, SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use http::{HeaderMap, HeaderName, HeaderValue, header};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use super::limits::{Delivery, Refused};
use super::operation::{ExecutionResult, Parameters, Session, execute, json};
use crate::app::App;
use crate::error::Error;
use crate::http::TraceId;
use crate::rate::{Admission, OpenStream};
use crate::viewer::{Viewer, credential};

const PROTOCOL: &str = "graphql-transport-ws";
/// Bytes of a message, as of a request's body.
const MAX_MESSAGE_BYTES: usize = 1024 * 1024;
/// Messages that wait for the writer.
const QUEUE: usize = 16;
/// Bytes set aside for reading, for every open connection.
const READ_BUFFER_BYTES: usize = 8 * 1024;
/// Our pings that may pass without any message from the peer.
const SILENT_PINGS: u32 = 2;
/// How long the peer has to answer our close frame.
const CLOSE_GRACE: Duration = Duration::from_secs(2);

/// Opens a WebSocket. A key in the headers must be good; without one, `connection_init` must bring it.
///
/// # Errors
/// The key in the headers is refused.
pub async fn upgrade(
    app: App,
    trace: TraceId,
    upgrade: WebSocketUpgrade,
    headers: &HeaderMap,
) -> Result<Response, Error> {
    let session = match credential(headers) {
        Some(key) => Some(Session::open(app.clone(), Some(key)).await?),
        None => None,
    };
    let upgrade = upgrade
        .protocols([PROTOCOL])
        .read_buffer_size(READ_BUFFER_BYTES)
        .max_message_size(MAX_MESSAGE_BYTES)
        .max_frame_size(MAX_MESSAGE_BYTES);
    Ok(upgrade.on_upgrade(move |socket| serve(app, trace, session, socket)))
}

/// Why a connection ends.
enum End {
    /// The peer is gone.
    Left,
    /// We close it.
    Closed(CloseFrame),
    /// We close it, and can read nothing more of it.
    Failed(CloseFrame),
}

impl End {
    fn close(code: u16, reason: impl Into<String>) -> Self {
        Self::Closed(close_frame(code, reason))
    }

    fn invalid(reason: impl Into<String>) -> Self {
        Self::close(4400, reason)
    }

    /// The caller may not be here, or we can't tell for the moment; then it may try again.
    fn refused(error: &Error) -> Self {
        if error.status().is_server_error() {
            return Self::close(close_code::AGAIN, "Try again later");
        }
        Self::close(4403, format!("Forbidden: {error}"))
    }

    /// The socket failed. axum doesn't say how in a type, only in tungstenite's words.
    fn failed(error: &axum::Error) -> Self {
        let words = error.to_string();
        Self::Failed(if words.starts_with("Space limit exceeded") {
            close_frame(close_code::SIZE, format!("A message may have {MAX_MESSAGE_BYTES} bytes"))
        } else if words.starts_with("UTF-8") {
            close_frame(close_code::INVALID, "Text must be UTF-8")
        } else {
            close_frame(close_code::PROTOCOL, "WebSocket protocol error")
        })
    }
}

/// The frame has room for 123 bytes of reason.
fn close_frame(code: u16, reason: impl Into<String>) -> CloseFrame {
    let mut reason = reason.into();
    reason.truncate(reason.floor_char_boundary(123));
    CloseFrame { code, reason: reason.into() }
}

#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum ClientMessage {
    ConnectionInit { payload: Option<Map<String, Value>> },
    Ping { payload: Option<Map<String, Value>> },
    Pong {},
    Subscribe { id: String, payload: Value },
    Complete { id: String },
}

#[derive(Debug, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum ServerMessage<'a> {
    ConnectionAck,
    Ping,
    Pong {
        #[serde(skip_serializing_if = "Option::is_none")]
        payload: Option<Map<String, Value>>,
    },
    Next {
        id: &'a str,
        payload: ExecutionResult<'a>,
    },
    Error {
        id: &'a str,
        payload: &'a [ServerError],
    },
    Complete {
        id: &'a str,
    },
}

impl From<ServerMessage<'_>> for Message {
    fn from(message: ServerMessage<'_>) -> Self {
        Self::text(json(&message))
    }
}

/// From the handshake to the end.
async fn serve(app: App, trace: TraceId, session: Option<Session>, socket: WebSocket) {
    let speaks_protocol = socket.protocol().is_some();
    let (sink, mut source) = socket.split();
    let (outgoing, queue) = mpsc::channel(QUEUE);
    let (closing, close) = oneshot::channel();
    let writer = tokio::spawn(write(sink, queue, close));
    let end = if speaks_protocol {
        converse(app, trace, session, &mut source, outgoing).await
    } else {
        End::close(4406, "Subprotocol not acceptable")
    };
    // Dropping a socket with unread input resets the connection, and the close frame could be lost with it: so
    // wait for the peer's answer, or where it can't be read, long enough for the peer to have read ours.
    match end {
        End::Left => {}
        End::Closed(frame) => {
            let _ = closing.send(frame);
            let _ = timeout(CLOSE_GRACE, async { while let Some(Ok(_)) = source.next().await {} }).await;
        }
        End::Failed(frame) => {
            let _ = closing.send(frame);
            sleep(CLOSE_GRACE).await;
        }
    }
    writer.abort();
}

/// Writes what is queued until told to close; then nothing but the close frame, since a caller who has lost
/// the right to be here must not get the rest.
async fn write(
    mut sink: SplitSink<WebSocket, Message>,
    mut queue: mpsc::Receiver<Message>,
    mut close: oneshot::Receiver<CloseFrame>,
) {
    let into_sink = &mut sink;
    // It owns the queue: when the socket fails, whoever sends learns of it.
    let pump = async move {
        while let Some(message) = queue.recv().await {
            if into_sink.send(message).await.is_err() {
                break;
            }
        }
    };
    let frame = tokio::select! {
        biased;
        frame = &mut close => frame.ok(),
        () = pump => close.await.ok(),
    };
    if let Some(frame) = frame {
        let _ = sink.send(Message::Close(Some(frame))).await;
    }
}

async fn converse(
    app: App,
    trace: TraceId,
    session: Option<Session>,
    source: &mut SplitStream<WebSocket>,
    outgoing: mpsc::Sender<Message>,
) -> End {
    match initialise(&app, session, source, &outgoing).await {
        Ok((session, _held)) => Connection::new(app, trace, session, outgoing).run(source).await,
        Err(end) => end,
    }
}

/// The next message of the protocol; `None` for a sign of life that is not one. Safe to cancel.
async fn read(source: &mut SplitStream<WebSocket>) -> Result<Option<ClientMessage>, End> {
    match source.next().await {
        None => Err(End::Left),
        Some(Ok(Message::Text(text))) => {
            serde_json::from_str(&text).map(Some).map_err(|error| End::invalid(format!("Invalid message: {error}")))
        }
        Some(Ok(Message::Binary(_))) => Err(End::invalid("Invalid message: send text, not binary")),
        // After a close frame the next read answers it and ends.
        Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Close(_))) => Ok(None),
        Some(Err(error)) => Err(End::failed(&error)),
    }
}

/// Waits for `connection_init` and acknowledges it. A key in its payload goes before the one in the headers.
async fn initialise(
    app: &App,
    session: Option<Session>,
    source: &mut SplitStream<WebSocket>,
    outgoing: &mpsc::Sender<Message>,
) -> Result<(Session, Option<OpenStream>), End> {
    let payload = async {
        loop {
            match read(source).await? {
                Some(ClientMessage::ConnectionInit { payload }) => return Ok(payload.unwrap_or_default()),
                Some(ClientMessage::Subscribe { .. }) => return Err(End::close(4401, "Unauthorized")),
                Some(ClientMessage::Ping { payload }) => send(outgoing, ServerMessage::Pong { payload }).await?,
                Some(ClientMessage::Pong {} | ClientMessage::Complete { .. }) | None => {}
            }
        }
    };
    let patience = Duration::from_millis(app.config.graphql.ws_init_timeout_ms);
    let late = |_| End::close(4408, "Connection initialisation timeout");
    let payload = payload_headers(&timeout(patience, payload).await.map_err(late)??);
    let session = match (credential(&payload), session) {
        (None, Some(session)) => session,
        (key, _) => Session::open(app.clone(), key).await.map_err(|error| End::refused(&error))?,
    };
    let held = session.hold_open().await.map_err(|error| End::close(4429, error.to_string()))?;
    send(outgoing, ServerMessage::ConnectionAck).await?;
    Ok((session, held))
}

async fn send(outgoing: &mpsc::Sender<Message>, message: ServerMessage<'_>) -> Result<(), End> {
    outgoing.send(message.into()).await.map_err(|_| End::Left)
}

/// The payload's key as the header that it stands for, so that one rule reads both.
fn payload_headers(payload: &Map<String, Value>) -> HeaderMap {
    let header = |(name, value): (&String, &Value)| {
        let name = match name.to_ascii_lowercase().as_str() {
            "x-api-key" | "apikey" => HeaderName::from_static("x-api-key"),
            "authorization" => header::AUTHORIZATION,
            _ => return None,
        };
        Some((name, HeaderValue::from_str(value.as_str()?).ok()?))
    };
    payload.iter().filter_map(header).collect()
}

/// What an operation sends.
struct Event {
    id: String,
    message: Message,
    /// Nothing follows; the id is free again.
    last: bool,
}

/// The operation's messages. An error before execution is its last one, and no `complete` follows.
fn events(id: String, mut results: BoxStream<'static, GraphqlResponse>) -> BoxStream<'static, Event> {
    let stream = async_stream::stream! {
        while let Some(result) = results.next().await {
            if Refused::of(&result).is_some() {
                let message = ServerMessage::Error { id: &id, payload: &result.errors }.into();
                yield Event { id, message, last: true };
                return;
            }
            let message = ServerMessage::Next { id: &id, payload: ExecutionResult::from(&result) }.into();
            yield Event { id: id.clone(), message, last: false };
        }
        let message = ServerMessage::Complete { id: &id }.into();
        yield Event { id, message, last: true };
    };
    stream.boxed()
}

type Confirmed = Pin<Box<dyn Future<Output = Result<Session, Error>> + Send>>;

/// An acknowledged connection.
struct Connection {
    app: App,
    trace: TraceId,
    viewer: Viewer,
    confirmed: Confirmed,
    operations: SelectAll<Abortable<BoxStream<'static, Event>>>,
    /// The operations under way, by the client's ids.
    active: HashMap<String, AbortHandle>,
    outgoing: mpsc::Sender<Message>,
    /// What the queue had no room for. Until it has, nothing is read or polled.
    pending: Option<Message>,
}

impl Connection {
    fn new(app: App, trace: TraceId, session: Session, outgoing: mpsc::Sender<Message>) -> Self {
        Self {
            app,
            trace,
            viewer: session.viewer().clone(),
            confirmed: Box::pin(session.confirmed()),
            operations: SelectAll::new(),
            active: HashMap::new(),
            outgoing,
            pending: None,
        }
    }

    async fn run(mut self, source: &mut SplitStream<WebSocket>) -> End {
        let mut pings = interval(Duration::from_millis(self.app.config.graphql.ws_ping_ms.max(1)));
        pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
        pings.reset();
        let mut silent_pings = 0;
        let outgoing = self.outgoing.clone();
        loop {
            let free = self.pending.is_none();
            let step = tokio::select! {
                biased;
                session = &mut self.confirmed => self.confirm(session),
                // Clients connect again after this code, to another replica or to the next process.
                () = self.app.stopping.cancelled() => Err(End::close(close_code::RESTART, "Service restart")),
                _ = pings.tick() => {
                    silent_pings += 1;
                    self.ping(silent_pings)
                }
                permit = outgoing.reserve(), if !free => match permit {
                    Ok(permit) => {
                        if let Some(message) = self.pending.take() {
                            permit.send(message);
                        }
                        Ok(())
                    }
                    Err(_) => Err(End::Left),
                },
                message = read(source), if free => {
                    silent_pings = 0;
                    match message {
                        Ok(Some(message)) => self.receive(message).await,
                        Ok(None) => Ok(()),
                        Err(end) => Err(end),
                    }
                }
                Some(event) = self.operations.next(), if free && !self.operations.is_empty() => self.emit(event),
            };
            if let Err(end) = step {
                return end;
            }
        }
    }

    /// Takes the session as it was found now.
    fn confirm(&mut self, session: Result<Session, Error>) -> Result<(), End> {
        let session = session.map_err(|error| End::refused(&error))?;
        self.viewer = session.viewer().clone();
        self.confirmed = Box::pin(session.confirmed());
        Ok(())
    }

    fn ping(&self, silent_pings: u32) -> Result<(), End> {
        if silent_pings > SILENT_PINGS {
            return Err(End::close(close_code::AWAY, "No answer to pings"));
        }
        // Where the queue is full there is no need of one: what is written tells as much.
        let _ = self.outgoing.try_send(ServerMessage::Ping.into());
        Ok(())
    }

    async fn receive(&mut self, message: ClientMessage) -> Result<(), End> {
        match message {
            ClientMessage::ConnectionInit { .. } => Err(End::close(4429, "Too many initialisation requests")),
            ClientMessage::Ping { payload } => self.queue(ServerMessage::Pong { payload }.into()),
            ClientMessage::Pong {} => Ok(()),
            ClientMessage::Subscribe { id, payload } => self.subscribe(id, payload).await,
            ClientMessage::Complete { id } => {
                if let Some(operation) = self.active.remove(&id) {
                    operation.abort();
                }
                Ok(())
            }
        }
    }

    async fn subscribe(&mut self, id: String, payload: Value) -> Result<(), End> {
        if id.is_empty() {
            return Err(End::invalid("Invalid message: the id is empty"));
        }
        if self.active.contains_key(&id) {
            return Err(End::close(4409, format!("Subscriber for {id} already exists")));
        }
        let parameters = Parameters::from_json(payload).map_err(End::invalid)?;
        let admission = self.app.admit(&self.viewer).await;
        if let Err(error) = self.check(admission) {
            let errors = [error.to_graphql(&self.trace.0)];
            return self.queue(ServerMessage::Error { id: &id, payload: &errors }.into());
        }
        let results = execute(&self.app, self.viewer.clone(), &self.trace, Delivery::Stream, parameters);
        let (events, handle) = futures_util::stream::abortable(events(id.clone(), results));
        self.operations.push(events);
        self.active.insert(id, handle);
        Ok(())
    }

    /// Whether another operation may begin. Each counts as a request.
    fn check(&self, admission: Admission) -> Result<(), Error> {
        if !admission.allowed {
            return Err(Error::RateLimited(admission));
        }
        let max = self.app.config.graphql.max_subscriptions_per_socket;
        if self.active.len() >= max {
            return Err(Error::Limit(format!("A WebSocket carries at most {max} operations at once.")));
        }
        Ok(())
    }

    fn emit(&mut self, event: Event) -> Result<(), End> {
        if event.last {
            self.active.remove(&event.id);
        }
        self.queue(event.message)
    }

    fn queue(&mut self, message: Message) -> Result<(), End> {
        match self.outgoing.try_send(message) {
            Ok(()) => Ok(()),
            Err(mpsc::error::TrySendError::Full(message)) => {
                self.pending = Some(message);
                Ok(())
            }
            Err(mpsc::error::TrySendError::Closed(_)) => Err(End::Left),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn messages_of_the_protocol_are_read() {
        for message in [
            json!({ "type": "connection_init" }),
            json!({ "type": "connection_init", "payload": null }),
            json!({ "type": "ping", "payload": { "a": 1 } }),
            json!({ "type": "pong", "payload": {} }),
            json!({ "type": "subscribe", "id": "1", "payload": { "query": "{ a }" } }),
            json!({ "type": "complete", "id": "1" }),
        ] {
            assert!(serde_json::from_value::<ClientMessage>(message.clone()).is_ok(), "{message}");
        }
        for message in [
            json!({}),
            json!({ "type": "start", "id": "1" }),
            json!({ "type": "subscribe", "payload": {} }),
            json!({ "type": "subscribe", "id": 1, "payload": {} }),
            json!({ "type": "connection_init", "payload": "key" }),
            json!([]),
        ] {
            assert!(serde_json::from_value::<ClientMessage>(message.clone()).is_err(), "{message}");
        }
    }

    #[test]
    fn payload_names_are_read_in_any_case() {
        let headers = |payload: Value| payload_headers(payload.as_object().expect("an object"));
        assert_eq!(headers(json!({ "X-Api-Key": "k" }))["x-api-key"], "k");
        assert_eq!(headers(json!({ "apiKey": "k" }))["x-api-key"], "k");
        assert_eq!(headers(json!({ "AUTHORIZATION": "Bearer k" }))[header::AUTHORIZATION], "Bearer k");
        assert!(headers(json!({ "other": "k", "apikey": 1 })).is_empty());
    }

    #[test]
    fn close_reasons_fit_their_frame() {
        assert_eq!(close_frame(4400, "ä".repeat(100)).reason.len(), 122);
    }
}
