//! An agent's definition as it comes in.
#![allow(missing_docs)] // fields and inputs are what the schema says they are

use async_graphql::{ID, InputObject, Json, MaybeUndefined, OneofObject};
use serde_json::Value;

use super::definition_graphql::{HandoffFilter, ReasoningEffort, ToolUseBehavior};
use super::guardrails_graphql::{GuardrailStage, OnTrip};

#[derive(InputObject)]
pub struct CreateAgentInput {
    name: String,
    description: Option<String>,
    model: String,
    instructions: String,
    model_settings: Option<ModelSettingsInput>,
    tools: Option<Vec<ToolInput>>,
    handoffs: Option<Vec<HandoffInput>>,
    handoff_description: Option<String>,
    guardrails: Option<Vec<GuardrailInput>>,
    output_schema: Option<Json<Value>>,
    tool_use_behavior: Option<ToolUseBehavior>,
    stop_at_tools: Option<Vec<String>>,
    max_turns: Option<i32>,
    reset_tool_choice: Option<bool>,
    max_tool_concurrency: Option<i32>,
    fallback_models: Option<Vec<String>>,
    /// Publish in the same step.
    #[graphql(default = false)]
    pub publish: bool,
}

#[derive(InputObject)]
pub struct UpdateAgentInput {
    pub agent_id: ID,
    pub name: MaybeUndefined<String>,
    pub description: MaybeUndefined<String>,
    pub model: MaybeUndefined<String>,
    pub instructions: MaybeUndefined<String>,
    pub model_settings: MaybeUndefined<ModelSettingsInput>,
    pub tools: MaybeUndefined<Vec<ToolInput>>,
    pub handoffs: MaybeUndefined<Vec<HandoffInput>>,
    pub handoff_description: MaybeUndefined<String>,
    pub guardrails: MaybeUndefined<Vec<GuardrailInput>>,
    pub output_schema: MaybeUndefined<Json<Value>>,
    pub tool_use_behavior: MaybeUndefined<ToolUseBehavior>,
    pub stop_at_tools: MaybeUndefined<Vec<String>>,
    pub max_turns: MaybeUndefined<i32>,
    pub reset_tool_choice: MaybeUndefined<bool>,
    pub max_tool_concurrency: MaybeUndefined<i32>,
    pub fallback_models: MaybeUndefined<Vec<String>>,
}

#[derive(InputObject)]
pub struct ModelSettingsInput {
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    pub max_output_tokens: Option<i32>,
    /// auto, required, none, or a tool's name
    pub tool_choice: Option<String>,
    pub parallel_tool_calls: Option<bool>,
    pub reasoning_effort: Option<ReasoningEffort>,
}

#[derive(OneofObject)]
pub enum ToolInput {
    Webhook(WebhookToolInput),
    Agent(AgentToolInput),
    Mcp(McpToolInput),
    Hosted(HostedToolInput),
}

#[derive(InputObject)]
pub struct WebhookToolInput {
    pub name: String,
    pub description: String,
    /// JSON Schema of the arguments; default: an object with no properties.
    pub parameters: Option<Json<Value>>,
    pub url: String,
    /// Left out: kept from the tool of the same name and URL origin. Null: none.
    pub token: MaybeUndefined<String>,
    /// Until a call counts as timed out; default: 30000.
    pub timeout_ms: Option<i32>,
    /// Each call waits for decideToolCall.
    pub needs_approval: Option<bool>,
}

#[derive(InputObject)]
pub struct AgentToolInput {
    pub name: String,
    pub description: String,
    pub agent_id: ID,
    /// Model calls that each of its runs may make; default: 10.
    pub max_turns: Option<i32>,
    /// Each call waits for decideToolCall.
    pub needs_approval: Option<bool>,
}

#[derive(InputObject)]
pub struct McpToolInput {
    pub name: String,
    pub url: String,
    /// Left out: kept from the tool of the same name and URL origin. Null: none.
    pub token: MaybeUndefined<String>,
    /// Default: all that the server has.
    pub allowed_tools: Option<Vec<String>>,
    /// Each call waits for decideToolCall.
    pub needs_approval: Option<bool>,
}

#[derive(InputObject)]
pub struct HostedToolInput {
    /// Its type in the provider's words, such as web_search.
    pub name: String,
    /// The rest of its definition: an object.
    pub config: Option<Json<Value>>,
}

#[derive(InputObject)]
pub struct HandoffInput {
    pub agent_id: ID,
    pub tool_name: Option<String>,
    pub tool_description: Option<String>,
    pub input_filter: Option<HandoffFilter>,
    /// With LAST_N: how many items are kept.
    pub last_n: Option<i32>,
    /// The history so far goes as one summary message, as in the SDK's nest_handoff_history.
    pub nest_history: Option<bool>,
}

#[derive(InputObject)]
pub struct GuardrailInput {
    /// Unique in the agent.
    pub name: String,
    pub stage: GuardrailStage,
    /// Tool stages: the one tool that it looks at; default: every tool.
    pub tool: Option<String>,
    /// INPUT: run beside the first model call; no tool runs before the verdict.
    pub parallel: Option<bool>,
    /// Tool stages; default: REJECT. At the other stages a trip always ends the run.
    pub on_trip: Option<OnTrip>,
    /// Tool stages with REJECT: what the model is told in place of the tool's output. Default: that the guardrail
    /// rejected it, and why.
    pub message: Option<String>,
    pub rule: GuardrailRuleInput,
}

#[derive(OneofObject)]
pub enum GuardrailRuleInput {
    Regex(RegexRuleInput),
    /// Characters; what is longer trips.
    MaxLength(i32),
    /// What is no JSON or does not fit trips.
    JsonSchema(Json<Value>),
    /// An agent whose outputSchema has tripped: boolean and reason: string.
    AgentId(ID),
}

#[derive(InputObject)]
pub struct RegexRuleInput {
    /// In the syntax of Rust's regex, which is matched in linear time: no look-around, no back references.
    pub pattern: String,
    /// Default: true, a match trips. False: no match trips.
    pub trip_on_match: Option<bool>,
}

impl CreateAgentInput {
    /// An agent with nothing but what it must have.
    pub fn new(name: &str, model: &str, instructions: &str) -> Self {
        Self {
            name: name.to_owned(),
            description: None,
            model: model.to_owned(),
            instructions: instructions.to_owned(),
            model_settings: None,
            tools: None,
            handoffs: None,
            handoff_description: None,
            guardrails: None,
            output_schema: None,
            tool_use_behavior: None,
            stop_at_tools: None,
            max_turns: None,
            reset_tool_choice: None,
            max_tool_concurrency: None,
            fallback_models: None,
            publish: true,
        }
    }
}

impl From<CreateAgentInput> for UpdateAgentInput {
    /// A new agent is an empty one with everything changed that was given.
    fn from(input: CreateAgentInput) -> Self {
        fn given<T>(value: Option<T>) -> MaybeUndefined<T> {
            value.map_or(MaybeUndefined::Undefined, MaybeUndefined::Value)
        }
        Self {
            agent_id: ID::default(),
            name: MaybeUndefined::Value(input.name),
            description: given(input.description),
            model: MaybeUndefined::Value(input.model),
            instructions: MaybeUndefined::Value(input.instructions),
            model_settings: given(input.model_settings),
            tools: given(input.tools),
            handoffs: given(input.handoffs),
            handoff_description: given(input.handoff_description),
            guardrails: given(input.guardrails),
            output_schema: given(input.output_schema),
            tool_use_behavior: given(input.tool_use_behavior),
            stop_at_tools: given(input.stop_at_tools),
            max_turns: given(input.max_turns),
            reset_tool_choice: given(input.reset_tool_choice),
            max_tool_concurrency: given(input.max_tool_concurrency),
            fallback_models: given(input.fallback_models),
        }
    }
}
