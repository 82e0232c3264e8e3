//! MCP servers over streamable HTTP: their tools as the model is told of them, and calls of these.
//!
//! Tenants say where the servers are, so they are reached as webhooks are: over [`Outbound`], each connection to an
//! address that was checked, answers bounded in bytes and time.

mod error;
mod output;
mod session;

use std::sync::Arc;
use std::time::Duration;

use quick_cache::Weighter;
use quick_cache::sync::Cache;
use rmcp::model::{PaginatedRequestParams, Tool};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use tokio::time::Instant;

pub use self::error::{McpError, McpFault};
pub use self::output::McpOutput;
pub use self::session::McpSessions;
use self::session::Session;
use crate::model::ToolDefinition;
use crate::spec::McpServer;
use crate::webhook::{AddressPolicy, MAX_ANSWER_BYTES, Outbound};

/// How long a list is good for, unless its server says earlier that it changed.
const LISTED_FOR: Duration = Duration::from_secs(60);

/// How long a server may take to list its tools.
const LIST_PATIENCE: Duration = Duration::from_secs(30);

/// The most pages of one list.
const MAX_PAGES: usize = 100;

/// Bytes that the lists take in all; of those that were not asked for lately the server is asked again.
const CACHE_BYTES: u64 = 64 * 1024 * 1024;

/// As many lists as the cache is laid out for.
const USUAL_LISTS: usize = 1024;

/// Reaches MCP servers: one for the whole process. Clones share what they know.
#[derive(Clone, Debug)]
pub struct McpClient {
    outbound: Outbound,
    lists: Arc<Lists>,
}

/// Lists by server.
type Lists = Cache<ServerKey, Arc<List>, BySize>;

/// A server and who asks it: its URL and token, hashed.
type ServerKey = [u8; 32];

/// A server's tools, all of them.
#[derive(Debug)]
struct List {
    tools: Vec<ToolDefinition>,
    bytes: usize,
    good_until: Instant,
}

#[derive(Clone, Debug)]
struct BySize;

impl Weighter<ServerKey, Arc<List>> for BySize {
    fn weight(&self, _: &ServerKey, list: &Arc<List>) -> u64 {
        // Never 0: what weighs nothing is never dropped.
        u64::try_from(list.bytes).unwrap_or(u64::MAX).saturating_add(256)
    }
}

impl McpClient {
    /// A client under a policy.
    ///
    /// # Errors
    /// If TLS can't be set up.
    ///
    /// # Panics
    /// Unless the process has installed a default crypto provider for rustls (reqwest's rule).
    pub fn new(policy: AddressPolicy) -> Result<Self, reqwest::Error> {
        let lists = Arc::new(Cache::with_weighter(USUAL_LISTS, CACHE_BYTES, BySize));
        Ok(Self { outbound: Outbound::new(policy)?, lists })
    }

    /// Sessions of a run: what is asked through them reaches each server in one session.
    pub fn sessions(&self) -> McpSessions {
        McpSessions::new(self.clone())
    }

    /// The tools that a server offers an agent, as the model is told of them. May be up to a minute old.
    ///
    /// # Errors
    /// What keeps the server from listing them.
    pub async fn list(&self, server: &McpServer) -> Result<Vec<ToolDefinition>, McpError> {
        self.sessions().list(server).await
    }

    /// The names that a tool can't be called without, as far as its server's list is known.
    fn required(&self, server: &McpServer, tool: &str) -> Vec<String> {
        let Some(list) = self.lists.get(&key(server)) else { return Vec::new() };
        let tool = list.tools.iter().find(|definition| definition.name == tool);
        let required = tool.and_then(|definition| definition.parameters.get("required")?.as_array());
        required.into_iter().flatten().filter_map(|name| name.as_str().map(str::to_owned)).collect()
    }

    fn listed(&self, server: &McpServer) -> Option<Arc<List>> {
        self.lists.get(&key(server)).filter(|list| Instant::now() < list.good_until)
    }

    fn forget(&self, server: &McpServer) {
        self.lists.remove(&key(server));
    }

    /// Asks for the list, page by page.
    async fn ask_for_list(&self, server: &McpServer, session: &Session) -> Result<Arc<List>, McpError> {
        let too_long = || McpError::new(server, McpFault::ListTooLong);
        let mut tools = Vec::new();
        let mut bytes = 0;
        let mut cursor = None;
        for _ in 0..MAX_PAGES {
            let request = cursor.map(|cursor| PaginatedRequestParams::default().with_cursor(Some(cursor)));
            let page = session.list_tools(request).await.map_err(|error| McpError::of_request(server, error))?;
            for tool in page.tools {
                let definition = definition(tool);
                bytes += definition.parameters.to_string().len() + definition.name.len() + definition.description.len();
                if bytes > MAX_ANSWER_BYTES {
                    return Err(too_long());
                }
                tools.push(definition);
            }
            cursor = page.next_cursor.filter(|cursor| !cursor.is_empty());
            if cursor.is_none() {
                let list = Arc::new(List { tools, bytes, good_until: Instant::now() + LISTED_FOR });
                self.lists.insert(key(server), list.clone());
                return Ok(list);
            }
        }
        Err(too_long())
    }
}

impl List {
    /// Those of its tools that an agent is offered.
    fn allowed(&self, server: &McpServer) -> Vec<ToolDefinition> {
        let is_allowed = |tool: &&ToolDefinition| match &server.allowed_tools {
            Some(names) => names.contains(&tool.name),
            None => true,
        };
        self.tools.iter().filter(is_allowed).cloned().collect()
    }
}

/// A tool as the Agents SDK tells a model of it (`MCPUtil.to_function_tool`).
fn definition(tool: Tool) -> ToolDefinition {
    let mut parameters: Map<String, Value> = Arc::unwrap_or_clone(tool.input_schema);
    parameters.entry("properties").or_insert_with(|| Map::new().into());
    let annotated = tool.annotations.and_then(|annotations| annotations.title);
    let said = [tool.description.map(String::from), tool.title, annotated];
    ToolDefinition {
        name: tool.name.into(),
        description: said.into_iter().flatten().find(|text| !text.is_empty()).unwrap_or_default(),
        parameters: parameters.into(),
        strict: false,
    }
}

fn key(server: &McpServer) -> ServerKey {
    let mut hash = Sha256::new();
    hash.update(&server.url);
    hash.update([0, u8::from(server.token.is_some())]);
    hash.update(server.token.as_deref().unwrap_or_default());
    hash.finalize().into()
}

#[cfg(test)]
mod tests;
