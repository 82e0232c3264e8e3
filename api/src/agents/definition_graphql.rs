//! An agent's definition as it is read: `AgentDefinition` and the types below it.
#![allow(missing_docs)] // fields and inputs are what the schema says they are

use async_graphql::{Context, Enum, Interface, Json, Object, Result, SimpleObject, Union};
use cloister_runtime::spec::{self, Handoff as SpecHandoff};
use serde_json::Value;

use super::definition::{Definition, HandoffDraft};
use super::graphql::{Agent, AgentVersion};
use crate::error::Error;
use crate::graphql::loaders::{AgentId, load};
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
    /// Another agent.
    Agent(AgentTool),
    /// An MCP server.
    Mcp(McpTool),
    /// The provider's own.
    Hosted(HostedTool),
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
    needs_approval: bool,
}

impl From<&spec::WebhookTool> for WebhookTool {
    fn from(tool: &spec::WebhookTool) -> Self {
        Self {
            name: tool.name.clone(),
            description: tool.description.clone(),
            parameters: Json(tool.parameters.clone()),
            url: tool.url.clone(),
            has_token: tool.token.is_some(),
            timeout_ms: i32::try_from(tool.timeout_ms).unwrap_or(i32::MAX),
            needs_approval: false,
        }
    }
}

/// An agent that answers a call; not supported yet.
#[derive(SimpleObject)]
pub struct AgentTool {
    name: String,
    description: String,
    agent: Agent,
    max_turns: i32,
    needs_approval: bool,
}

/// An MCP server's tools; not supported yet.
#[derive(SimpleObject)]
pub struct McpTool {
    name: String,
    url: String,
    allowed_tools: Option<Vec<String>>,
    has_token: bool,
    needs_approval: bool,
}

/// A tool of the provider's own; not supported yet.
#[derive(SimpleObject)]
pub struct HostedTool {
    name: String,
    config: Json<Value>,
}

/// What the new agent sees of what went before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Enum)]
pub enum HandoffFilter {
    /// All of it.
    None,
    /// All but tools.
    RemoveTools,
    /// The last items.
    LastN,
}

/// A way to pass the conversation on to another agent.
pub struct Handoff(HandoffDraft);

impl Handoff {
    async fn target(&self, ctx: &Context<'_>) -> Result<Agent> {
        let target = load(ctx, AgentId(self.0.agent_id)).await?;
        Ok(Agent(target.ok_or_else(|| Error::internal("a handoff's agent is gone"))?))
    }
}

#[Object]
impl Handoff {
    async fn agent(&self, ctx: &Context<'_>) -> Result<Agent> {
        self.target(ctx).await
    }

    async fn tool_name(&self, ctx: &Context<'_>) -> Result<String> {
        match &self.0.tool_name {
            Some(name) => Ok(name.clone()),
            None => Ok(SpecHandoff::default_tool_name(&self.target(ctx).await?.0.name)),
        }
    }

    async fn tool_description(&self, ctx: &Context<'_>) -> Result<String> {
        if let Some(description) = &self.0.tool_description {
            return Ok(description.clone());
        }
        let target = self.target(ctx).await?;
        let told = target.definition()?.handoff_description.unwrap_or_default();
        Ok(SpecHandoff::default_tool_description(&target.0.name, &told))
    }

    async fn input_filter(&self) -> HandoffFilter {
        HandoffFilter::None
    }

    async fn last_n(&self) -> Option<i32> {
        None
    }

    /// The history so far goes as one summary message, as in the SDK's nest_handoff_history.
    async fn nest_history(&self) -> bool {
        false
    }
}

/// A check on what goes in or comes out; not supported yet.
#[derive(SimpleObject)]
pub struct Guardrail {
    name: String,
    stage: GuardrailStage,
    /// Tool stages: the tool; null: every tool.
    tool: Option<String>,
    parallel: bool,
    rule: GuardrailRule,
}

/// What a guardrail looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Enum)]
#[graphql(remote = "spec::GuardrailStage")]
pub enum GuardrailStage {
    Input,
    Output,
    ToolInput,
    ToolOutput,
}

/// How a guardrail decides.
#[derive(Union)]
pub enum GuardrailRule {
    Regex(RegexRule),
    MaxLength(MaxLengthRule),
    JsonSchema(JsonSchemaRule),
    Agent(AgentRule),
}

/// By a pattern.
#[derive(SimpleObject)]
pub struct RegexRule {
    pattern: String,
    /// True: a match trips. False: no match trips.
    trip_on_match: bool,
}

/// By length.
#[derive(SimpleObject)]
pub struct MaxLengthRule {
    characters: i32,
}

/// By a JSON Schema.
#[derive(SimpleObject)]
pub struct JsonSchemaRule {
    schema: Json<Value>,
}

/// An agent whose structured output is {tripped: boolean, reason: string}.
#[derive(SimpleObject)]
pub struct AgentRule {
    agent: Agent,
}

impl Definition {
    /// As the API shows it.
    pub fn tools_graphql(&self) -> Vec<Tool> {
        self.tools.iter().map(|tool| Tool::Webhook(tool.into())).collect()
    }

    /// As the API shows it.
    pub fn handoffs_graphql(&self) -> Vec<Handoff> {
        self.handoffs.iter().cloned().map(Handoff).collect()
    }
}
