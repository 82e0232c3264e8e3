//! The tenant's side of MCP tools: a server of the official crate that records what it is asked and answers as told.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use rmcp::model::{
    CallToolRequestParams, CallToolResponse, CallToolResult, ErrorCode, ErrorData, ListToolsResult,
    PaginatedRequestParams, ServerCapabilities, ServerConfig, Tool,
};
use rmcp::service::{NotificationContext, Peer, RequestContext};
use rmcp::transport::streamable_http_server::session::local::LocalSessionManager;
use rmcp::transport::streamable_http_server::{StreamableHttpServerConfig, StreamableHttpService};
use rmcp::{RoleServer, ServerHandler};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::task::AbortOnDropHandle;

/// What a server is asked over HTTP.
#[derive(Clone, Debug)]
pub struct McpRequest {
    /// The HTTP method.
    pub method: Method,
    /// The method of the JSON-RPC message; empty where there is none.
    pub rpc: String,
    /// The HTTP headers.
    pub headers: HeaderMap,
}

/// A call of a tool.
#[derive(Clone, Debug)]
pub struct McpCall {
    /// The tool's name.
    pub tool: String,
    /// Its arguments.
    pub arguments: Value,
}

/// What a call comes to.
#[derive(Clone, Debug)]
#[must_use]
pub enum McpAnswer {
    /// A `CallToolResult`.
    Result(Value),
    /// An error of the protocol.
    Error(i32, String),
    /// Nothing, ever.
    Hang,
}

impl McpAnswer {
    /// A result that is a text.
    pub fn text(text: &str) -> McpAnswer {
        McpAnswer::Result(json!({ "content": [{ "type": "text", "text": text }] }))
    }
}

/// What a server answers over HTTP, in place of MCP.
#[derive(Clone, Debug)]
#[must_use]
pub struct McpFault {
    /// The status; none for no answer at all.
    pub status: Option<u16>,
    /// Headers.
    pub headers: Vec<(&'static str, String)>,
    /// The body.
    pub body: Bytes,
}

impl McpFault {
    /// This status, with an empty body.
    pub fn status(status: u16) -> McpFault {
        McpFault { status: Some(status), headers: Vec::new(), body: Bytes::new() }
    }

    /// No answer ever.
    pub fn hang() -> McpFault {
        McpFault { status: None, ..McpFault::status(200) }
    }

    /// 200 with this body.
    pub fn body(content_type: &str, body: impl Into<Bytes>) -> McpFault {
        let headers = vec![("content-type", content_type.to_owned())];
        McpFault { headers, body: body.into(), ..McpFault::status(200) }
    }
}

type Script = Arc<dyn Fn(&McpCall) -> McpAnswer + Send + Sync>;
type Sabotage = Arc<dyn Fn(&McpRequest) -> Option<McpFault> + Send + Sync>;

#[derive(Default)]
struct Told {
    tools: Vec<Tool>,
    page: Option<usize>,
    token: Option<String>,
    script: Option<Script>,
    sabotage: Option<Sabotage>,
    calls: Vec<McpCall>,
    requests: Vec<McpRequest>,
    peers: Vec<Peer<RoleServer>>,
}

/// An MCP server over streamable HTTP. It stops when it is dropped.
pub struct McpServer {
    address: SocketAddr,
    told: Arc<Mutex<Told>>,
    _serving: AbortOnDropHandle<()>,
}

impl McpServer {
    /// Starts a server with these tools, each with its name and its input schema, on a free port of the loopback
    /// interface. Calls are answered with the text `ok` until it is told otherwise.
    pub async fn start(tools: &[(&str, Value)]) -> McpServer {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let told = Arc::new(Mutex::new(Told { tools: tools.iter().map(tool).collect(), ..Told::default() }));
        let handler = Handler { told: told.clone() };
        let service = StreamableHttpService::new(
            move || Ok(handler.clone()),
            Arc::new(LocalSessionManager::default()),
            StreamableHttpServerConfig::default(),
        );
        let router =
            Router::new().fallback_service(service).layer(from_fn_with_state(told.clone(), record)).with_state(());
        let serving = AbortOnDropHandle::new(tokio::spawn(async move {
            let _ = axum::serve(listener, router).await;
        }));
        McpServer { address, told, _serving: serving }
    }

    /// Its endpoint.
    pub fn url(&self) -> String {
        format!("http://{}/mcp", self.address)
    }

    /// Refuses whoever does not bring this token.
    pub fn require_token(&self, token: &str) {
        self.told.lock().unwrap().token = Some(token.to_owned());
    }

    /// Lists so many tools a page.
    pub fn page_size(&self, size: usize) {
        self.told.lock().unwrap().page = Some(size);
    }

    /// Answers calls.
    pub fn answer(&self, script: impl Fn(&McpCall) -> McpAnswer + Send + Sync + 'static) {
        self.told.lock().unwrap().script = Some(Arc::new(script));
    }

    /// Answers requests that it says something about in place of the server.
    pub fn sabotage(&self, sabotage: impl Fn(&McpRequest) -> Option<McpFault> + Send + Sync + 'static) {
        self.told.lock().unwrap().sabotage = Some(Arc::new(sabotage));
    }

    /// Offers other tools from now on, and tells whoever has a session.
    pub async fn change_tools(&self, tools: &[(&str, Value)]) {
        let peers = {
            let mut told = self.told.lock().unwrap();
            told.tools = tools.iter().map(tool).collect();
            told.peers.clone()
        };
        for peer in peers {
            // Whoever left needs no word.
            let _ = peer.notify_tool_list_changed().await;
        }
    }

    /// The calls so far, in the order they came.
    pub fn calls(&self) -> Vec<McpCall> {
        self.told.lock().unwrap().calls.clone()
    }

    /// The requests so far, in the order they came.
    pub fn requests(&self) -> Vec<McpRequest> {
        self.told.lock().unwrap().requests.clone()
    }

    /// How many of the requests so far were of this JSON-RPC method.
    pub fn count(&self, rpc: &str) -> usize {
        self.requests().iter().filter(|request| request.rpc == rpc).count()
    }
}

fn tool((name, schema): &(&str, Value)) -> Tool {
    let definition = json!({ "name": name, "description": format!("Does {name}."), "inputSchema": schema });
    serde_json::from_value(definition).expect("a tool")
}

/// Notes each request, and stands in the way of those it was told to.
async fn record(State(told): State<Arc<Mutex<Told>>>, request: Request, next: Next) -> Response {
    let (parts, body) = request.into_parts();
    let body = axum::body::to_bytes(body, usize::MAX).await.unwrap_or_default();
    let message: Value = serde_json::from_slice(&body).unwrap_or_default();
    let rpc = message["method"].as_str().unwrap_or_default().to_owned();
    let seen = McpRequest { method: parts.method.clone(), rpc, headers: parts.headers.clone() };
    let (sabotage, token) = {
        let mut told = told.lock().unwrap();
        told.requests.push(seen.clone());
        (told.sabotage.clone(), told.token.clone())
    };
    if let Some(fault) = sabotage.and_then(|sabotage| sabotage(&seen)) {
        return broken(fault).await;
    }
    let bearer = token.map(|token| format!("Bearer {token}"));
    if bearer.is_some_and(|bearer| parts.headers.get("authorization").is_none_or(|value| *value != bearer)) {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    next.run(Request::from_parts(parts, Body::from(body))).await
}

async fn broken(fault: McpFault) -> Response {
    let Some(status) = fault.status else { std::future::pending().await };
    let mut response = fault.body.into_response();
    *response.status_mut() = StatusCode::from_u16(status).expect("an HTTP status");
    for (name, value) in fault.headers {
        response.headers_mut().insert(name, HeaderValue::from_str(&value).expect("a header's value"));
    }
    response
}

#[derive(Clone)]
struct Handler {
    told: Arc<Mutex<Told>>,
}

impl ServerHandler for Handler {
    fn get_info(&self) -> ServerConfig {
        ServerConfig::new(ServerCapabilities::builder().enable_tools().enable_tool_list_changed().build())
    }

    async fn on_initialized(&self, context: NotificationContext<RoleServer>) {
        self.told.lock().unwrap().peers.push(context.peer);
    }

    async fn list_tools(
        &self,
        request: Option<PaginatedRequestParams>,
        _: RequestContext<RoleServer>,
    ) -> Result<ListToolsResult, ErrorData> {
        let told = self.told.lock().unwrap();
        let start: usize = request.and_then(|request| request.cursor?.parse().ok()).unwrap_or_default();
        let end = told.page.map_or(told.tools.len(), |page| (start + page).min(told.tools.len()));
        let mut result = ListToolsResult::with_all_items(told.tools[start..end].to_vec());
        result.next_cursor = (end < told.tools.len()).then(|| end.to_string());
        Ok(result)
    }

    async fn call_tool(
        &self,
        request: CallToolRequestParams,
        _: RequestContext<RoleServer>,
    ) -> Result<CallToolResponse, ErrorData> {
        let call = McpCall { tool: request.name.into(), arguments: request.arguments.map_or(Value::Null, Value::from) };
        let script = {
            let mut told = self.told.lock().unwrap();
            told.calls.push(call.clone());
            told.script.clone()
        };
        match script.map_or_else(|| McpAnswer::text("ok"), |script| script(&call)) {
            McpAnswer::Result(result) => {
                let result: CallToolResult = serde_json::from_value(result).expect("a result");
                Ok(CallToolResponse::Complete(result))
            }
            McpAnswer::Error(code, message) => Err(ErrorData::new(ErrorCode(code), message, None)),
            McpAnswer::Hang => std::future::pending().await,
        }
    }
}
