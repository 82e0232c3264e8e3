//! Sessions with MCP servers. A run has one with each server it uses, from its first request to the run's end.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use rmcp::model::{
    CallToolRequestParams, CallToolResponse, ClientCapabilities, ClientConfig, ErrorCode, Implementation,
    ProtocolVersion,
};
use rmcp::service::{
    ClientInitializeError, ClientLifecycleMode, NotificationContext, RunningService, ServiceError,
    serve_client_with_lifecycle,
};
use rmcp::transport::StreamableHttpClientTransport;
use rmcp::transport::common::client_side_sse::ExponentialBackoff;
use rmcp::transport::streamable_http_client::StreamableHttpClientTransportConfig;
use rmcp::{ClientHandler, RoleClient};
use serde_json::Value;
use tokio::sync::Mutex;
use tokio::time::timeout;

use super::{LIST_PATIENCE, Lists, McpClient, McpError, McpFault, McpOutput, ServerKey, key};
use crate::model::ToolDefinition;
use crate::spec::McpServer;
use crate::webhook::MAX_ANSWER_BYTES;

/// A session that is open.
pub(super) type Session = RunningService<RoleClient, Listener>;

/// How often a stream that broke off is taken up again.
const RECONNECTS: usize = 3;

/// A run's sessions with MCP servers; they end when it is dropped.
pub struct McpSessions {
    client: McpClient,
    /// A lock for each server, so that calls that start together share the session that the first one opens.
    open: std::sync::Mutex<HashMap<ServerKey, Arc<Slot>>>,
}

type Slot = Mutex<Option<Arc<Session>>>;

impl McpSessions {
    pub(super) fn new(client: McpClient) -> Self {
        Self { client, open: std::sync::Mutex::default() }
    }

    /// The tools that a server offers an agent, as the model is told of them. May be up to a minute old.
    ///
    /// # Errors
    /// What keeps the server from listing them.
    pub async fn list(&self, server: &McpServer) -> Result<Vec<ToolDefinition>, McpError> {
        if let Some(list) = self.client.listed(server) {
            return Ok(list.allowed(server));
        }
        let asked = async {
            let session = self.session(server).await?;
            let list = self.client.ask_for_list(server, &session).await;
            self.close_unless_usable(server, list).await
        };
        Ok(in_time(server, LIST_PATIENCE, asked).await?.allowed(server))
    }

    /// Calls a tool.
    ///
    /// # Errors
    /// Whatever keeps the server's result from coming in time; the tool may have been called even so. A result that
    /// says that the call failed is no error.
    pub async fn call(
        &self,
        server: &McpServer,
        tool: &str,
        arguments: Value,
        patience: Duration,
    ) -> Result<McpOutput, McpError> {
        let Value::Object(arguments) = arguments else { return Err(McpError::new(server, McpFault::Arguments)) };
        if self.client.required(server, tool).iter().any(|name| !arguments.contains_key(name)) {
            return Err(McpError::new(server, McpFault::Arguments));
        }
        let request = CallToolRequestParams::new(tool.to_owned()).with_arguments(arguments);
        let called = async {
            let session = self.session(server).await?;
            let answer = match session.call_tool_once(request).await {
                Ok(CallToolResponse::Complete(result)) => Ok(McpOutput::of(result)),
                Ok(_) => Err(McpError::new(server, McpFault::NotMcp)),
                Err(error) => {
                    if is_about_the_tool(&error) {
                        self.client.forget(server);
                    }
                    Err(McpError::of_request(server, error))
                }
            };
            self.close_unless_usable(server, answer).await
        };
        in_time(server, patience, called).await
    }

    /// The session with a server; opened if there is none, or if it ended.
    async fn session(&self, server: &McpServer) -> Result<Arc<Session>, McpError> {
        let slot = self.slot(server);
        let mut open = slot.lock().await;
        if let Some(session) = open.as_ref().filter(|session| !session.is_transport_closed()) {
            return Ok(session.clone());
        }
        let session = Arc::new(self.client.connect(server).await?);
        *open = Some(session.clone());
        Ok(session)
    }

    /// Lets a session go that broke, so that what is asked next begins another.
    async fn close_unless_usable<T>(&self, server: &McpServer, answer: Result<T, McpError>) -> Result<T, McpError> {
        if matches!(&answer, Err(error) if !matches!(error.fault, McpFault::Refused(_))) {
            self.slot(server).lock().await.take();
        }
        answer
    }

    fn slot(&self, server: &McpServer) -> Arc<Slot> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.entry(key(server)).or_default().clone()
    }
}

impl McpClient {
    /// Opens a session: with the handshake that all servers know, and without one where that is refused.
    async fn connect(&self, server: &McpServer) -> Result<Session, McpError> {
        match self.greet(server, ClientLifecycleMode::Initialize).await? {
            Err(ClientInitializeError::JsonRpcError(_)) => {
                let preferred_versions = vec![ProtocolVersion::LATEST];
                self.greet(server, ClientLifecycleMode::Discover { preferred_versions }).await?
            }
            greeted => greeted,
        }
        .map_err(|error| McpError::of_handshake(server, error))
    }

    async fn greet(
        &self,
        server: &McpServer,
        lifecycle: ClientLifecycleMode,
    ) -> Result<Result<Session, ClientInitializeError>, McpError> {
        let (client, url) =
            self.outbound.to(&server.url).map_err(|error| McpError::new(server, McpFault::Url(error)))?;
        let mut config = StreamableHttpClientTransportConfig::with_uri(url.as_str())
            .max_json_response_size(MAX_ANSWER_BYTES)
            .max_sse_event_size(MAX_ANSWER_BYTES)
            .max_error_response_size(0);
        let mut backoff = ExponentialBackoff::default();
        backoff.max_times = Some(RECONNECTS);
        config.retry_config = Arc::new(backoff);
        config.auth_header = server.token.clone();
        let transport = StreamableHttpClientTransport::with_client(client.clone(), config);
        let listener = Listener { lists: self.lists.clone(), server: key(server) };
        Ok(serve_client_with_lifecycle(listener, transport, lifecycle).await)
    }
}

/// Our side of a session: a client that offers nothing, and hears when the list of tools changed.
pub(super) struct Listener {
    lists: Arc<Lists>,
    server: ServerKey,
}

impl ClientHandler for Listener {
    fn get_info(&self) -> ClientConfig {
        ClientConfig::new(ClientCapabilities::default(), Implementation::new("cloister", env!("CARGO_PKG_VERSION")))
    }

    async fn on_tool_list_changed(&self, _: NotificationContext<RoleClient>) {
        self.lists.remove(&self.server);
    }
}

async fn in_time<T>(
    server: &McpServer,
    patience: Duration,
    work: impl Future<Output = Result<T, McpError>>,
) -> Result<T, McpError> {
    timeout(patience, work).await.unwrap_or_else(|_| Err(McpError::new(server, McpFault::TimedOut)))
}

/// Whether a server no longer knows what it listed.
fn is_about_the_tool(error: &ServiceError) -> bool {
    let codes = [ErrorCode::METHOD_NOT_FOUND, ErrorCode::INVALID_PARAMS];
    matches!(error, ServiceError::McpError(error) if codes.contains(&error.code))
}
