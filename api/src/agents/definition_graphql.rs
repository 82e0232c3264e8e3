//! An agent's definition as it is read: `AgentDefinition` and the types below it.
#![allow(missing_docs)] // fields and inputs are what the schema says they are

use async_graphql::{Context, Enum, Interface, Json, Object, Result, SimpleObject, Union};
use cloister_runtime::spec::{self, Handoff as SpecHandoff};
use serde_json::Value;

use super::definition::HandoffDraft;
use super::graphql::{Agent, AgentVersion, required_agent};
use super::guardrails_graphql::Guardrail;
use crate::models::graphql::Model;

/// What an agent is. On Agent: the draft. On AgentVersion: frozen by a publish.
#[derive(Interface)]
#[allow(clippy::duplicated_attributes)] // two fields may have one type
#[graphql(
    field(name = "model", ty = "Model"),
    field(name = "instructions", ty = "String"),
    field(name = "model_settings", ty = "ModelSettings"),
    field(name = "tools", ty = "Vec<Tool>"),
    field(name = "handoffs", ty = "Vec<Handoff>"),
    field(name = "handoff_description", ty = "Option<String>"),
    field(name = "guardrails", ty = "Vec<Guardrail>"),
    field(name = "output_schema", ty = "Option<Json<Value>>"),
    field(name = "tool_use_behavior", ty = "ToolUseBehavior"),
    field(name = "stop_at_tools", ty = "Vec<String>"),
    field(name = "max_turns", ty = "i32"),
    field(
        name = "reset_tool_choice",
        ty = "bool",
        desc = "Forget a forced toolChoice once the agent has used a tool."
    ),
    field(name = "max_tool_concurrency", ty = "i32"),
    field(
        name = "fallback_models",
        ty = "Vec<Model>",
        desc = "Tried in order when the model is unavailable before its first byte."
    )
)]
pub enum AgentDefinition {
    Agent(Agent),
    AgentVersion(AgentVersion),
}

/// Sampling and tool choice.
#[derive(Clone, SimpleObject)]
pub struct ModelSettings {
    temperature: Option<f64>,
    top_p: Option<f64>,
    max_output_tokens: Option<i32>,
    /// auto, required, none, or a tool's name
    tool_choice: Option<String>,
    parallel_tool_calls: Option<bool>,
    reasoning_effort: Option<ReasoningEffort>,
}

impl From<spec::ModelSettings> for ModelSettings {
    fn from(settings: spec::ModelSettings) -> Self {
        Self {
            temperature: settings.temperature,
            top_p: settings.top_p,
            max_output_tokens: settings.max_output_tokens.and_then(|tokens| i32::try_from(tokens).ok()),
            tool_choice: settings.tool_choice,
            parallel_tool_calls: settings.parallel_tool_calls,
            reasoning_effort: settings.reasoning_effort.map(Into::into),
        }
    }
}

/// How much a reasoning model thinks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Enum)]
#[graphql(remote = "spec::ReasoningEffort")]
pub enum ReasoningEffort {
    Minimal,
    Low,
    Medium,
    High,
}

/// What becomes of a turn whose tools have run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Enum)]
#[graphql(remote = "spec::ToolUseBehavior")]
pub enum ToolUseBehavior {
    /// The model sees the outputs and goes on.
    RunLlmAgain,
    /// The first call's output is the run's output.
    StopOnFirstTool,
    /// The output of the first call to one of stopAtTools is the run's output.
    StopAtTools,
}

/// Something that the model may call.
#[derive(Union)]
pub enum Tool {
    /// The tenant's endpoint.
    Webhook(WebhookTool),
    /// Another agent, whose final output is the call's.
    Agent(AgentTool),
    /// An MCP server.
    Mcp(McpTool),
    /// The provider's own.
    Hosted(HostedTool),
}

impl From<spec::Tool> for Tool {
    fn from(tool: spec::Tool) -> Self {
        match tool {
            spec::Tool::Webhook(tool) => Self::Webhook(tool.into()),
            spec::Tool::Agent(tool) => Self::Agent(AgentTool(tool)),
            spec::Tool::Mcp(server) => Self::Mcp(server.into()),
            spec::Tool::Hosted(tool) => Self::Hosted(HostedTool { name: tool.name, config: Json(tool.config) }),
        }
    }
}

/// POSTs the arguments as JSON to the tenant's endpoint. The token is write-only.
#[derive(SimpleObject)]
pub struct WebhookTool {
    name: String,
    description: String,
    parameters: Json<Value>,
    url: String,
    has_token: bool,
    timeout_ms: i32,
    /// Each call waits for decideToolCall.
    needs_approval: bool,
}

impl From<spec::WebhookTool> for WebhookTool {
    fn from(tool: spec::WebhookTool) -> Self {
        Self {
            name: tool.name,
            description: tool.description,
            parameters: Json(tool.parameters),
            url: tool.url,
            has_token: tool.token.is_some(),
            timeout_ms: int(tool.timeout_ms),
            needs_approval: tool.needs_approval,
        }
    }
}

pub struct AgentTool(spec::AgentTool);

#[Object]
/// An agent that answers a call, with a history of its own: the call's output is its final output.
impl AgentTool {
    async fn name(&self) -> &str {
        &self.0.name
    }

    async fn description(&self) -> &str {
        &self.0.description
    }

    async fn agent(&self, ctx: &Context<'_>) -> Result<Agent> {
        required_agent(ctx, self.0.agent_id).await
    }

    /// Model calls that each of its runs may make.
    async fn max_turns(&self) -> i32 {
        int(self.0.max_turns)
    }

    /// Each call waits for decideToolCall.
    async fn needs_approval(&self) -> bool {
        self.0.needs_approval
    }
}

/// The tools of an MCP server, reached over streamable HTTP. The token is write-only.
#[derive(SimpleObject)]
pub struct McpTool {
    name: String,
    url: String,
    /// Null: all that the server has.
    allowed_tools: Option<Vec<String>>,
    has_token: bool,
    /// Each call waits for decideToolCall.
    needs_approval: bool,
}

impl From<spec::McpServer> for McpTool {
    fn from(server: spec::McpServer) -> Self {
        Self {
            name: server.name,
            url: server.url,
            allowed_tools: server.allowed_tools,
            has_token: server.token.is_some(),
            needs_approval: server.needs_approval,
        }
    }
}

/// A tool that the model's provider runs itself.
#[derive(SimpleObject)]
pub struct HostedTool {
    /// Its type in the provider's words, such as web_search.
    name: String,
    /// The rest of its definition.
    config: Json<Value>,
}

/// What the new agent sees of what went before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Enum)]
pub enum HandoffFilter {
    /// All of it.
    None,
    /// All but tools: calls, outputs, handoffs and reasoning are dropped.
    RemoveTools,
    /// The last items, so many as lastN says; a call never without its output.
    LastN,
}

/// A way to pass the conversation on to another agent.
pub struct Handoff(pub HandoffDraft);

#[Object]
impl Handoff {
    async fn agent(&self, ctx: &Context<'_>) -> Result<Agent> {
        required_agent(ctx, self.0.agent_id).await
    }

    async fn tool_name(&self, ctx: &Context<'_>) -> Result<String> {
        match &self.0.tool_name {
            Some(name) => Ok(name.clone()),
            None => Ok(SpecHandoff::default_tool_name(&required_agent(ctx, self.0.agent_id).await?.0.name)),
        }
    }

    async fn tool_description(&self, ctx: &Context<'_>) -> Result<String> {
        if let Some(description) = &self.0.tool_description {
            return Ok(description.clone());
        }
        let target = required_agent(ctx, self.0.agent_id).await?;
        let told = target.definition()?.handoff_description.unwrap_or_default();
        Ok(SpecHandoff::default_tool_description(&target.0.name, &told))
    }

    async fn input_filter(&self) -> HandoffFilter {
        match self.0.filter {
            spec::HandoffFilter::None => HandoffFilter::None,
            spec::HandoffFilter::RemoveTools => HandoffFilter::RemoveTools,
            spec::HandoffFilter::LastN(_) => HandoffFilter::LastN,
        }
    }

    /// With LAST_N.
    async fn last_n(&self) -> Option<i32> {
        match self.0.filter {
            spec::HandoffFilter::LastN(count) => Some(int(count)),
            spec::HandoffFilter::None | spec::HandoffFilter::RemoveTools => None,
        }
    }

    /// The history so far goes as one summary message, as in the SDK's nest_handoff_history.
    async fn nest_history(&self) -> bool {
        self.0.nest_history
    }
}

fn int(number: u32) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}
