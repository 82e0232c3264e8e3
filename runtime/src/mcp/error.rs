//! What goes wrong with an MCP server, in words that name it and say what helps.

use std::error::Error;

use reqwest::StatusCode;
use rmcp::service::{ClientInitializeError, ServiceError};
use rmcp::transport::DynamicTransportError;
use rmcp::transport::streamable_http_client::StreamableHttpError;

use crate::spec::McpServer;
use crate::webhook::{MAX_ANSWER_BYTES, UrlError};

/// The longest word of a server's own that a message repeats, in characters.
const MAX_QUOTE: usize = 300;

/// Why an MCP server was of no use. No message holds its URL or its token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the MCP server {server:?} {fault}")]
pub struct McpError {
    /// The server's name.
    pub server: String,
    /// What is wrong.
    pub fault: McpFault,
}

/// What is wrong with an MCP server, or with what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum McpFault {
    /// It may not be called.
    #[error("can't be called: its URL {0}")]
    Url(UrlError),
    /// Its time ran out.
    #[error("did not answer in time: see whether it is up, or give the tool more time")]
    TimedOut,
    /// It could not be reached, or the connection broke.
    #[error("could not be reached ({0}): see whether its URL is right and it is up")]
    Unreachable(String),
    /// It refused whoever asked.
    #[error("refused access with status {0}: check its token")]
    Unauthorized(u16),
    /// It answered with another status than 2xx.
    #[error("answered with status {0}: check its URL; redirects are not followed")]
    Status(u16),
    /// One of its answers is longer than is taken.
    #[error("answered with more than {MAX_ANSWER_BYTES} bytes: let it answer more briefly")]
    TooLong,
    /// It has more tools than are taken.
    #[error("lists more tools than {MAX_ANSWER_BYTES} bytes hold: let it offer fewer")]
    ListTooLong,
    /// What it answered is no MCP.
    #[error("does not speak MCP over streamable HTTP: check its URL")]
    NotMcp,
    /// It answered with an error of the protocol.
    #[error("answered with an error: {0}")]
    Refused(String),
    /// The arguments are no JSON object, or lack what the tool requires.
    #[error("was not called: the arguments are no JSON object, or lack what the tool requires")]
    Arguments,
}

impl McpError {
    pub(super) fn new(server: &McpServer, fault: McpFault) -> Self {
        Self { server: server.name.clone(), fault }
    }

    /// Whether the server's time ran out.
    pub fn is_time_out(&self) -> bool {
        self.fault == McpFault::TimedOut
    }

    pub(super) fn of_handshake(server: &McpServer, error: ClientInitializeError) -> Self {
        let fault = match error {
            ClientInitializeError::TransportError { error, .. } => of_transport(error),
            ClientInitializeError::JsonRpcError(error) => McpFault::Refused(quote(server, &error.message)),
            ClientInitializeError::ConnectionClosed(_) => McpFault::Unreachable("the connection was closed".to_owned()),
            _ => McpFault::NotMcp,
        };
        Self::new(server, fault)
    }

    pub(super) fn of_request(server: &McpServer, error: ServiceError) -> Self {
        let fault = match error {
            ServiceError::McpError(error) => McpFault::Refused(quote(server, &error.message)),
            ServiceError::TransportSend(error) => of_transport(error),
            ServiceError::TransportClosed | ServiceError::Cancelled { .. } => {
                McpFault::Unreachable("the connection was closed".to_owned())
            }
            ServiceError::Timeout { .. } => McpFault::TimedOut,
            _ => McpFault::NotMcp,
        };
        Self::new(server, fault)
    }
}

fn of_transport(error: DynamicTransportError) -> McpFault {
    match error.error.downcast::<StreamableHttpError<reqwest::Error>>() {
        Ok(error) => of_http(*error),
        Err(error) => McpFault::Unreachable(innermost(error.as_ref())),
    }
}

fn of_http(error: StreamableHttpError<reqwest::Error>) -> McpFault {
    match error {
        StreamableHttpError::Client(error) => of_connection(error),
        StreamableHttpError::HttpStatus(error) => McpFault::Status(error.status),
        StreamableHttpError::ResponseBodyTooLarge { .. } => McpFault::TooLong,
        StreamableHttpError::AuthRequired(_) => McpFault::Unauthorized(StatusCode::UNAUTHORIZED.as_u16()),
        StreamableHttpError::InsufficientScope(_) => McpFault::Unauthorized(StatusCode::FORBIDDEN.as_u16()),
        StreamableHttpError::SessionExpired => McpFault::Status(StatusCode::NOT_FOUND.as_u16()),
        StreamableHttpError::SessionRecoveryTimeout | StreamableHttpError::ControlRequestTimeout => McpFault::TimedOut,
        // Other statuses than success, with a piece of the answer behind them.
        StreamableHttpError::UnexpectedServerResponse(text) => match status(&text) {
            Some(status @ (401 | 403)) => McpFault::Unauthorized(status),
            Some(status) => McpFault::Status(status),
            None => McpFault::NotMcp,
        },
        // The parser's errors among them, and those of a stream that is too long.
        StreamableHttpError::Sse(error) if error.to_string().contains("maximum size") => McpFault::TooLong,
        StreamableHttpError::TransportChannelClosed | StreamableHttpError::UnexpectedEndOfStream => {
            McpFault::Unreachable("the connection was closed".to_owned())
        }
        _ => McpFault::NotMcp,
    }
}

fn of_connection(error: reqwest::Error) -> McpFault {
    let mut source = error.source();
    while let Some(cause) = source {
        if let Some(error) = cause.downcast_ref::<UrlError>() {
            return McpFault::Url(error.clone());
        }
        source = cause.source();
    }
    match error.status() {
        Some(status) => McpFault::Status(status.as_u16()),
        None => McpFault::Unreachable(innermost(&error.without_url())),
    }
}

/// The last cause: the system's or the resolver's word, which holds no URL.
fn innermost(error: &(dyn Error + 'static)) -> String {
    let mut innermost = error;
    while let Some(cause) = innermost.source() {
        innermost = cause;
    }
    innermost.to_string()
}

/// The status of rmcp's `HTTP 404 Not Found: …`.
fn status(text: &str) -> Option<u16> {
    text.strip_prefix("HTTP ")?.get(..3)?.parse().ok()
}

/// A server's own words, without the token if it repeats that.
fn quote(server: &McpServer, text: &str) -> String {
    let text = match server.token.as_deref().filter(|token| !token.is_empty()) {
        Some(token) => text.replace(token, "…"),
        None => text.to_owned(),
    };
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_QUOTE).collect()
}
