//! What an agent is: checked when it is saved, stored as JSON, frozen by a publish.

mod guardrails;
mod handoffs;
mod schema;
mod tools;

use std::collections::HashSet;

use cloister_runtime::spec::{Guardrail, GuardrailRule, ModelSettings, Tool, ToolUseBehavior};
use entity::tenants;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

pub use self::handoffs::HandoffDraft;
use self::tools::{MAX_TOOLS, Tools};
use super::input_graphql::{ModelSettingsInput, UpdateAgentInput};
use crate::app::App;
use crate::error::{Outcome, UserError, UserErrorCode};
use crate::input::{Checks, PatchExt};

/// Model calls of a run unless the agent says otherwise; the Agents SDK's default.
pub const DEFAULT_MAX_TURNS: u32 = 10;
const MAX_MAX_TURNS: i32 = 1_000;
/// Calls of one response that run at once, unless the agent says otherwise.
pub const DEFAULT_TOOL_CONCURRENCY: u32 = 8;
const MAX_FALLBACKS: usize = 8;

/// A draft's or a version's definition. What a field's absence means is said for those that came later.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Definition {
    /// The catalogue's name of the model.
    pub model: String,
    /// Models in place of one that is unavailable, in order.
    #[serde(default)]
    pub fallback_models: Vec<String>,
    /// The system prompt, its variables in braces.
    pub instructions: String,
    /// Sampling and tool choice.
    pub settings: ModelSettings,
    /// Tools; their tokens sealed.
    pub tools: Vec<Tool>,
    /// Whom it may hand off to.
    pub handoffs: Vec<HandoffDraft>,
    /// What others are told of a handoff to it.
    pub handoff_description: Option<String>,
    /// Checks on what goes in and comes out.
    #[serde(default)]
    pub guardrails: Vec<Guardrail>,
    /// JSON Schema of its final answer, as its tenant wrote it.
    #[serde(default, with = "cloister_runtime::in_order::option")]
    pub output_schema: Option<Value>,
    /// What becomes of a turn whose tools have run.
    pub tool_use_behavior: ToolUseBehavior,
    /// With STOP_AT_TOOLS.
    pub stop_at_tools: Vec<String>,
    /// Model calls of a run.
    pub max_turns: u32,
    /// Forget a forced tool choice once a tool was used.
    pub reset_tool_choice: bool,
    /// Calls of one response that run at once.
    pub max_tool_concurrency: u32,
}

impl Default for Definition {
    fn default() -> Self {
        Self {
            model: String::new(),
            fallback_models: Vec::new(),
            instructions: String::new(),
            settings: ModelSettings::default(),
            tools: Vec::new(),
            handoffs: Vec::new(),
            handoff_description: None,
            guardrails: Vec::new(),
            output_schema: None,
            tool_use_behavior: ToolUseBehavior::default(),
            stop_at_tools: Vec::new(),
            max_turns: DEFAULT_MAX_TURNS,
            reset_tool_choice: true,
            max_tool_concurrency: DEFAULT_TOOL_CONCURRENCY,
        }
    }
}

impl Definition {
    /// The definition with a change made: a field left out stays, null is the default again. Every problem is added to
    /// `checks` with its path.
    pub fn changed(
        &self,
        app: &App,
        tenant: &tenants::Model,
        change: UpdateAgentInput,
        checks: &mut Checks,
    ) -> Outcome<Self> {
        let mut new = self.clone();
        if let Some(model) = checks.required("model", change.model) {
            new.model = model;
        }
        if let Some(models) = change.fallback_models.into_option() {
            new.fallback_models = models.unwrap_or_default();
        }
        if let Some(instructions) = checks.required("instructions", change.instructions) {
            checks.text("instructions", &instructions, 0, 100_000);
            new.instructions = instructions;
        }
        if let Some(settings) = change.model_settings.into_option() {
            new.settings = settings.map(|settings| model_settings(settings, checks)).unwrap_or_default();
        }
        new.check_models(app, checks);
        if let Some(tools) = change.tools.into_option() {
            let saved = Tools { app, tenant, before: &self.tools };
            new.tools = saved.checked(tools.unwrap_or_default(), checks)?;
        }
        if let Some(handoffs) = change.handoffs.into_option() {
            new.handoffs = handoffs::checked(handoffs.unwrap_or_default(), checks);
        }
        if let Some(description) = change.handoff_description.into_option() {
            checks.text("handoffDescription", description.as_deref().unwrap_or_default(), 0, 1_024);
            new.handoff_description = description;
        }
        if let Some(guardrails) = change.guardrails.into_option() {
            new.guardrails = guardrails::checked(guardrails.unwrap_or_default(), checks);
        }
        if let Some(schema) = change.output_schema.into_option() {
            new.output_schema = schema.map(|schema| schema.0);
            if let Some(schema) = &new.output_schema {
                schema::check_schema(checks, "outputSchema", schema);
            }
        }
        if let Some(behavior) = change.tool_use_behavior.into_option() {
            new.tool_use_behavior = behavior.map(Into::into).unwrap_or_default();
        }
        if let Some(names) = change.stop_at_tools.into_option() {
            new.stop_at_tools = names.unwrap_or_default();
            checks.count("stopAtTools", new.stop_at_tools.len(), MAX_TOOLS);
            for (at, name) in new.stop_at_tools.iter().enumerate() {
                check_name(checks, &format!("stopAtTools.{at}"), name);
            }
        }
        if let Some(max_turns) = change.max_turns.into_option() {
            new.max_turns = positive(checks, "maxTurns", max_turns, DEFAULT_MAX_TURNS, MAX_MAX_TURNS);
        }
        if let Some(reset) = change.reset_tool_choice.into_option() {
            new.reset_tool_choice = reset.unwrap_or(true);
        }
        if let Some(calls) = change.max_tool_concurrency.into_option() {
            new.max_tool_concurrency = positive(checks, "maxToolConcurrency", calls, DEFAULT_TOOL_CONCURRENCY, 128);
        }
        Ok(new)
    }

    fn check_models(&self, app: &App, checks: &mut Checks) {
        self.check_known_models(app, |field, message| {
            checks.push(UserError::new(UserErrorCode::UnknownModel, field, message));
        });
        checks.count("fallbackModels", self.fallback_models.len(), MAX_FALLBACKS);
        let mut seen = HashSet::from([&self.model]);
        for (at, model) in self.fallback_models.iter().enumerate() {
            if !seen.insert(model) {
                let message = format!("The model {model:?} is tried before already.");
                checks.push(UserError::new(UserErrorCode::Duplicate, &format!("fallbackModels.{at}"), message));
            }
        }
        let settings = &self.settings;
        let most_output =
            app.catalog.get(&self.model).map_or(u32::MAX, |known| known.model.max_output_tokens.unsigned_abs());
        if let Some(temperature) = settings.temperature {
            checks.range("modelSettings.temperature", temperature, 0.0, 2.0);
        }
        if let Some(top_p) = settings.top_p {
            checks.range("modelSettings.topP", top_p, 0.0, 1.0);
        }
        if let Some(tokens) = settings.max_output_tokens {
            checks.range("modelSettings.maxOutputTokens", tokens, 1, most_output);
        }
        if let Some(choice) = &settings.tool_choice {
            check_name(checks, "modelSettings.toolChoice", choice);
        }
    }

    /// Refuses models that the catalogue doesn't have, with the field's path and a message.
    pub fn check_known_models(&self, app: &App, mut refuse: impl FnMut(&str, String)) {
        for (field, model) in self.models() {
            if app.catalog.get(model).is_none() {
                refuse(&field, format!("There is no model {model:?}. There are: {}.", app.catalog.names()));
            }
        }
    }

    /// The models it may use, each with its field's path.
    pub fn models(&self) -> impl Iterator<Item = (String, &str)> {
        let fallbacks = self.fallback_models.iter().enumerate();
        let fallbacks = fallbacks.map(|(at, model)| (format!("fallbackModels.{at}"), model.as_str()));
        std::iter::once(("model".to_owned(), self.model.as_str())).chain(fallbacks)
    }

    /// The agents it leads to by handoffs, agent tools and guardrails, each with its field's path.
    pub fn references(&self) -> impl Iterator<Item = (String, Uuid)> {
        let handoffs = self.handoffs.iter().enumerate();
        let handoffs = handoffs.map(|(at, handoff)| (format!("handoffs.{at}.agentId"), handoff.agent_id));
        let tools = self.tools.iter().enumerate().filter_map(|(at, tool)| match tool {
            Tool::Agent(tool) => Some((format!("tools.{at}.agent.agentId"), tool.agent_id)),
            Tool::Webhook(_) | Tool::Mcp(_) | Tool::Hosted(_) => None,
        });
        let guardrails = self.guardrails.iter().enumerate().filter_map(|(at, guardrail)| match guardrail.rule {
            GuardrailRule::Agent { agent_id } => Some((format!("guardrails.{at}.rule.agentId"), agent_id)),
            GuardrailRule::Regex { .. } | GuardrailRule::MaxLength { .. } | GuardrailRule::JsonSchema { .. } => None,
        });
        handoffs.chain(tools).chain(guardrails)
    }
}

fn model_settings(input: ModelSettingsInput, checks: &mut Checks) -> ModelSettings {
    ModelSettings {
        temperature: input.temperature,
        top_p: input.top_p,
        max_output_tokens: input.max_output_tokens.map(|tokens| {
            u32::try_from(tokens).unwrap_or_else(|_| {
                checks.push(UserError::invalid("modelSettings.maxOutputTokens", "This must be at least 1."));
                1
            })
        }),
        tool_choice: input.tool_choice,
        parallel_tool_calls: input.parallel_tool_calls,
        reasoning_effort: input.reasoning_effort.map(Into::into),
    }
}

fn positive(checks: &mut Checks, field: &str, value: Option<i32>, default: u32, max: i32) -> u32 {
    let Some(value) = value else { return default };
    checks.range(field, value, 1, max);
    value.unsigned_abs()
}

/// OpenAI's rule for the names of functions.
fn check_name(checks: &mut Checks, field: &str, name: &str) {
    let taken = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if name.is_empty() || name.len() > 64 || !name.chars().all(taken) {
        let message = format!("A tool's name has 1 to 64 of a-z, A-Z, 0-9, _ and -; this is {name:?}.");
        checks.push(UserError::invalid(field, message));
    }
}
