//! An agent's definition as it comes in. What is in the schema but not built yet is refused with
//! NOT_SUPPORTED_YET, never ignored.
#![allow(missing_docs)] // fields and inputs are what the schema says they are

use async_graphql::{ID, InputObject, Json, MaybeUndefined, OneofObject};
use cloister_runtime::spec;
use serde_json::Value;

use super::AgentChange;
use super::definition::{Change, HandoffDraft, WebhookToolInput as ToolChange};
use super::definition_graphql::{GuardrailStage, HandoffFilter, ReasoningEffort, ToolUseBehavior};
use crate::error::UserError;
use crate::ids;
use crate::input::Patch;

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
    name: MaybeUndefined<String>,
    description: MaybeUndefined<String>,
    model: MaybeUndefined<String>,
    instructions: MaybeUndefined<String>,
    model_settings: MaybeUndefined<ModelSettingsInput>,
    tools: MaybeUndefined<Vec<ToolInput>>,
    handoffs: MaybeUndefined<Vec<HandoffInput>>,
    handoff_description: MaybeUndefined<String>,
    guardrails: MaybeUndefined<Vec<GuardrailInput>>,
    output_schema: MaybeUndefined<Json<Value>>,
    tool_use_behavior: MaybeUndefined<ToolUseBehavior>,
    stop_at_tools: MaybeUndefined<Vec<String>>,
    max_turns: MaybeUndefined<i32>,
    reset_tool_choice: MaybeUndefined<bool>,
    max_tool_concurrency: MaybeUndefined<i32>,
    fallback_models: MaybeUndefined<Vec<String>>,
}

#[derive(InputObject)]
pub struct ModelSettingsInput {
    temperature: Option<f64>,
    top_p: Option<f64>,
    max_output_tokens: Option<i32>,
    /// auto, required, none, or a tool's name
    tool_choice: Option<String>,
    parallel_tool_calls: Option<bool>,
    reasoning_effort: Option<ReasoningEffort>,
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
    name: String,
    description: String,
    /// JSON Schema of the arguments; default: an object with no properties.
    parameters: Option<Json<Value>>,
    url: String,
    /// Left out: kept from the tool of the same name and URL origin. Null: none.
    token: MaybeUndefined<String>,
    timeout_ms: Option<i32>,
    needs_approval: Option<bool>,
}

/// Not supported yet.
#[derive(InputObject)]
#[allow(dead_code)] // the schema is settled; what it holds is refused
pub struct AgentToolInput {
    name: String,
    description: String,
    agent_id: ID,
    max_turns: Option<i32>,
    needs_approval: Option<bool>,
}

/// Not supported yet.
#[derive(InputObject)]
#[allow(dead_code)] // the schema is settled; what it holds is refused
pub struct McpToolInput {
    name: String,
    url: String,
    token: Option<String>,
    allowed_tools: Option<Vec<String>>,
    needs_approval: Option<bool>,
}

/// Not supported yet.
#[derive(InputObject)]
#[allow(dead_code)] // the schema is settled; what it holds is refused
pub struct HostedToolInput {
    name: String,
    config: Option<Json<Value>>,
}

#[derive(InputObject)]
pub struct HandoffInput {
    agent_id: ID,
    tool_name: Option<String>,
    tool_description: Option<String>,
    input_filter: Option<HandoffFilter>,
    last_n: Option<i32>,
    nest_history: Option<bool>,
}

/// Not supported yet.
#[derive(InputObject)]
#[allow(dead_code)] // the schema is settled; what it holds is refused
pub struct GuardrailInput {
    name: String,
    stage: GuardrailStage,
    tool: Option<String>,
    parallel: Option<bool>,
    rule: GuardrailRuleInput,
}

/// Not supported yet.
#[derive(OneofObject)]
#[allow(dead_code)] // the schema is settled; what it holds is refused
pub enum GuardrailRuleInput {
    Regex(RegexRuleInput),
    MaxLength(i32),
    JsonSchema(Json<Value>),
    AgentId(ID),
}

/// Not supported yet.
#[derive(InputObject)]
#[allow(dead_code)] // the schema is settled; what it holds is refused
pub struct RegexRuleInput {
    pattern: String,
    trip_on_match: Option<bool>,
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

impl From<UpdateAgentInput> for AgentChange {
    fn from(input: UpdateAgentInput) -> Self {
        let mut problems = Vec::new();
        let mut refuse = |asked: bool, field: &str| {
            if asked {
                problems.push(UserError::not_supported(field));
            }
        };
        refuse(is_some_and(&input.guardrails, |guardrails| !guardrails.is_empty()), "guardrails");
        refuse(is_some_and(&input.fallback_models, |models| !models.is_empty()), "fallbackModels");
        refuse(is_some_and(&input.output_schema, |_| true), "outputSchema");
        let settings = input.model_settings.map_value(|settings| model_settings(settings, &mut problems));
        let tools = input.tools.map_value(|tools| {
            tools.into_iter().enumerate().filter_map(|(at, tool)| webhook(at, tool, &mut problems)).collect()
        });
        let handoffs = input.handoffs.map_value(|handoffs| {
            handoffs.into_iter().enumerate().map(|(at, input)| handoff(at, input, &mut problems)).collect()
        });
        AgentChange {
            name: input.name,
            description: input.description,
            definition: Change {
                model: input.model,
                instructions: input.instructions,
                settings,
                tools,
                handoffs,
                handoff_description: input.handoff_description,
                tool_use_behavior: input.tool_use_behavior.map_value(Into::into),
                stop_at_tools: input.stop_at_tools,
                max_turns: input.max_turns,
                reset_tool_choice: input.reset_tool_choice,
                max_tool_concurrency: input.max_tool_concurrency,
            },
            problems,
        }
    }
}

fn is_some_and<T>(patch: &Patch<T>, asks: impl Fn(&T) -> bool) -> bool {
    matches!(patch, Patch::Value(value) if asks(value))
}

fn model_settings(input: ModelSettingsInput, problems: &mut Vec<UserError>) -> spec::ModelSettings {
    let max_output_tokens = input.max_output_tokens.map(|tokens| {
        u32::try_from(tokens).unwrap_or_else(|_| {
            problems.push(UserError::invalid("modelSettings.maxOutputTokens", "This must be at least 1."));
            1
        })
    });
    spec::ModelSettings {
        temperature: input.temperature,
        top_p: input.top_p,
        max_output_tokens,
        tool_choice: input.tool_choice,
        parallel_tool_calls: input.parallel_tool_calls,
        reasoning_effort: input.reasoning_effort.map(Into::into),
    }
}

fn webhook(at: usize, tool: ToolInput, problems: &mut Vec<UserError>) -> Option<ToolChange> {
    let kind = match tool {
        ToolInput::Webhook(tool) => {
            if tool.needs_approval == Some(true) {
                problems.push(UserError::not_supported(&format!("tools.{at}.webhook.needsApproval")));
            }
            return Some(ToolChange {
                name: tool.name,
                description: tool.description,
                parameters: tool.parameters.map(|schema| schema.0),
                url: tool.url,
                token: tool.token,
                timeout_ms: tool.timeout_ms,
            });
        }
        ToolInput::Agent(_) => "agent",
        ToolInput::Mcp(_) => "mcp",
        ToolInput::Hosted(_) => "hosted",
    };
    problems.push(UserError::not_supported(&format!("tools.{at}.{kind}")));
    None
}

fn handoff(at: usize, input: HandoffInput, problems: &mut Vec<UserError>) -> HandoffDraft {
    let filtered = input.input_filter.is_some_and(|filter| filter != HandoffFilter::None);
    for (asked, name) in [
        (filtered, "inputFilter"),
        (input.last_n.is_some(), "lastN"),
        (input.nest_history == Some(true), "nestHistory"),
    ] {
        if asked {
            problems.push(UserError::not_supported(&format!("handoffs.{at}.{name}")));
        }
    }
    HandoffDraft {
        // An id that isn't an agent's finds none.
        agent_id: ids::decode(ids::Agent, &input.agent_id).unwrap_or_default(),
        tool_name: input.tool_name,
        tool_description: input.tool_description,
    }
}
