//! Tools as they are saved.

use std::collections::HashSet;

use cloister_runtime::spec::{AgentTool, HostedTool, McpServer, Tool, WebhookTool};
use cloister_runtime::webhook::{AddressPolicy, check_form, check_url};
use entity::tenants::{self, Isolation};
use serde_json::{Value, json};
use url::Url;

use super::schema::{check_schema, check_size};
use super::{DEFAULT_MAX_TURNS, MAX_MAX_TURNS, check_name, positive};
use crate::agents::graphql::agent_id;
use crate::agents::input_graphql::{AgentToolInput, HostedToolInput, McpToolInput, ToolInput, WebhookToolInput};
use crate::app::App;
use crate::error::{Outcome, UserError, UserErrorCode};
use crate::input::{Checks, Patch};

/// What OpenAI takes at most.
pub const MAX_TOOLS: usize = 128;
/// Milliseconds until a tool's call counts as timed out, unless the tool says otherwise.
const DEFAULT_TIMEOUT_MS: i32 = 30_000;
const MAX_DESCRIPTION: usize = 1_024;
/// Types of tools that the one who calls the model has to run, whatever the provider's name for them.
const NOT_HOSTED: [&str; 6] = ["function", "custom", "computer", "computer_use_preview", "local_shell", "apply_patch"];

/// The tools of one agent of a tenant, as they are being saved.
pub struct Tools<'a> {
    /// Seals tokens, and knows which hosts the operator allows.
    pub app: &'a App,
    /// Whose they are.
    pub tenant: &'a tenants::Model,
    /// What the agent has so far: tokens left out are kept from it.
    pub before: &'a [Tool],
}

impl Tools<'_> {
    /// Tools from what came in, their tokens sealed; whether agents exist is the database's to say.
    pub fn checked(&self, tools: Vec<ToolInput>, checks: &mut Checks) -> Outcome<Vec<Tool>> {
        checks.count("tools", tools.len(), MAX_TOOLS);
        let checked = tools.into_iter().enumerate().map(|(at, tool)| match tool {
            ToolInput::Webhook(tool) => self.webhook(&format!("tools.{at}.webhook"), tool, checks).map(Tool::Webhook),
            ToolInput::Agent(tool) => Ok(Tool::Agent(agent(&format!("tools.{at}.agent"), tool, checks))),
            ToolInput::Mcp(server) => self.mcp(&format!("tools.{at}.mcp"), server, checks).map(Tool::Mcp),
            ToolInput::Hosted(tool) => Ok(Tool::Hosted(hosted(&format!("tools.{at}.hosted"), tool, checks))),
        });
        checked.collect()
    }

    fn webhook(&self, path: &str, tool: WebhookToolInput, checks: &mut Checks) -> Outcome<WebhookTool> {
        let field = |name: &str| format!("{path}.{name}");
        check_name(checks, &field("name"), &tool.name);
        checks.text(&field("description"), &tool.description, 0, MAX_DESCRIPTION);
        self.check_url(&field("url"), &tool.url, checks);
        let parameters = tool.parameters.map_or_else(no_parameters, |schema| schema.0);
        check_schema(checks, &field("parameters"), &parameters);
        let timeout_ms = tool.timeout_ms.unwrap_or(DEFAULT_TIMEOUT_MS);
        checks.range(&field("timeoutMs"), timeout_ms, 1, 300_000);
        let before = self.before.iter().filter_map(|tool| match tool {
            Tool::Webhook(tool) => Some((&tool.name, &tool.url, &tool.token)),
            _ => None,
        });
        let kept = || kept_token(before, &tool.name, &tool.url);
        Ok(WebhookTool {
            token: self.token(&field("token"), tool.token, kept, checks)?,
            name: tool.name,
            description: tool.description,
            parameters,
            url: tool.url,
            timeout_ms: timeout_ms.unsigned_abs(),
            needs_approval: tool.needs_approval.unwrap_or(false),
        })
    }

    fn mcp(&self, path: &str, server: McpToolInput, checks: &mut Checks) -> Outcome<McpServer> {
        let field = |name: &str| format!("{path}.{name}");
        checks.text(&field("name"), &server.name, 1, 100);
        self.check_url(&field("url"), &server.url, checks);
        if let Some(tools) = &server.allowed_tools {
            checks.count(&field("allowedTools"), tools.len(), MAX_TOOLS);
            let mut seen = HashSet::new();
            for (at, tool) in tools.iter().enumerate() {
                let field = field(&format!("allowedTools.{at}"));
                check_name(checks, &field, tool);
                if !seen.insert(tool) {
                    let message = format!("{tool:?} stands here a second time.");
                    checks.push(UserError::new(UserErrorCode::Duplicate, &field, message));
                }
            }
        }
        let before = self.before.iter().filter_map(|tool| match tool {
            Tool::Mcp(server) => Some((&server.name, &server.url, &server.token)),
            _ => None,
        });
        let kept = || kept_token(before, &server.name, &server.url);
        Ok(McpServer {
            token: self.token(&field("token"), server.token, kept, checks)?,
            name: server.name,
            url: server.url,
            allowed_tools: server.allowed_tools,
            needs_approval: server.needs_approval.unwrap_or(false),
        })
    }

    fn check_url(&self, field: &str, url: &str, checks: &mut Checks) {
        checks.text(field, url, 1, 2_048);
        let checked = match self.tenant.isolation {
            // Its own workers call, from a network that only they know: they check where the URL leads.
            Isolation::Dedicated => check_form(url),
            Isolation::Shared => {
                let allowed_hosts = self.app.config.webhooks.allowed_hosts.clone();
                check_url(url, &AddressPolicy { allowed_hosts, ..AddressPolicy::default() })
            }
        };
        if let Err(error) = checked {
            checks.push(UserError::invalid(field, format!("The URL {error}")));
        }
    }

    fn token(
        &self,
        field: &str,
        token: Patch<String>,
        kept: impl FnOnce() -> Option<String>,
        checks: &mut Checks,
    ) -> Outcome<Option<String>> {
        match token {
            Patch::Value(token) => {
                checks.text(field, &token, 1, 4_096);
                if token.chars().any(|c| !c.is_ascii_graphic()) {
                    checks.push(UserError::invalid(field, "A token has visible ASCII characters only."));
                }
                Ok(Some(self.app.vault.seal(self.tenant.id, &token)?))
            }
            Patch::Null => Ok(None),
            Patch::Undefined => Ok(kept()),
        }
    }
}

/// A token is kept only for the name and the origin that it was given for.
fn kept_token<'a>(
    mut before: impl Iterator<Item = (&'a String, &'a String, &'a Option<String>)>,
    name: &str,
    url: &str,
) -> Option<String> {
    let origin = |url: &str| Url::parse(url).ok().map(|url| url.origin());
    before.find(|(known, at, _)| *known == name && origin(at) == origin(url))?.2.clone()
}

fn agent(path: &str, tool: AgentToolInput, checks: &mut Checks) -> AgentTool {
    let field = |name: &str| format!("{path}.{name}");
    check_name(checks, &field("name"), &tool.name);
    checks.text(&field("description"), &tool.description, 0, MAX_DESCRIPTION);
    AgentTool {
        max_turns: positive(checks, &field("maxTurns"), tool.max_turns, DEFAULT_MAX_TURNS, MAX_MAX_TURNS),
        agent_id: agent_id(&tool.agent_id),
        name: tool.name,
        description: tool.description,
        needs_approval: tool.needs_approval.unwrap_or(false),
    }
}

fn hosted(path: &str, tool: HostedToolInput, checks: &mut Checks) -> HostedTool {
    let field = |name: &str| format!("{path}.{name}");
    check_name(checks, &field("name"), &tool.name);
    if NOT_HOSTED.contains(&tool.name.as_str()) {
        let message = format!("No provider runs tools of the type {:?} itself.", tool.name);
        checks.push(UserError::invalid(&field("name"), message));
    }
    let config = tool.config.map_or_else(|| json!({}), |config| config.0);
    match config.as_object() {
        None => checks.push(UserError::invalid(&field("config"), "This must be an object.")),
        Some(fields) if fields.contains_key("type") => {
            checks.push(UserError::invalid(&field("config.type"), "The type is the tool's name. Leave it out here."));
        }
        Some(_) => {
            check_size(checks, &field("config"), &config);
        }
    }
    HostedTool { name: tool.name, config }
}

fn no_parameters() -> Value {
    json!({ "type": "object", "properties": {} })
}
