//! `Guardrail` and its rules.
#![allow(missing_docs)] // fields and inputs are what the schema says they are

use async_graphql::{Context, Enum, Json, Object, Result, SimpleObject, Union};
use cloister_runtime::spec;
use serde_json::Value;
use uuid::Uuid;

use super::graphql::{Agent, required_agent};

/// A check on what goes in or comes out.
#[derive(SimpleObject)]
pub struct Guardrail {
    name: String,
    stage: GuardrailStage,
    /// Tool stages: the tool; null: every tool.
    tool: Option<String>,
    parallel: bool,
    on_trip: OnTrip,
    /// What the model is told on REJECT; null: that the guardrail rejected it, and why.
    message: Option<String>,
    rule: GuardrailRule,
}

impl From<spec::Guardrail> for Guardrail {
    fn from(guardrail: spec::Guardrail) -> Self {
        Self {
            name: guardrail.name,
            stage: guardrail.stage.into(),
            tool: guardrail.tool,
            parallel: guardrail.parallel,
            on_trip: if guardrail.ends_run { OnTrip::Fail } else { OnTrip::Reject },
            message: guardrail.message,
            rule: guardrail.rule.into(),
        }
    }
}

/// What a guardrail looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Enum)]
#[graphql(remote = "spec::GuardrailStage")]
pub enum GuardrailStage {
    /// The run's input, before the first agent's first turn.
    Input,
    /// The final output.
    Output,
    /// A call's arguments, before the tool runs.
    ToolInput,
    /// A tool's output, before the model sees it.
    ToolOutput,
}

/// What a trip leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Enum)]
pub enum OnTrip {
    /// The run ends as FAILED with GUARDRAIL.
    Fail,
    /// Tool stages: the model is told, in place of the tool's output, and goes on.
    Reject,
}

/// How a guardrail decides.
#[derive(Union)]
pub enum GuardrailRule {
    Regex(RegexRule),
    MaxLength(MaxLengthRule),
    JsonSchema(JsonSchemaRule),
    Agent(AgentRule),
}

impl From<spec::GuardrailRule> for GuardrailRule {
    fn from(rule: spec::GuardrailRule) -> Self {
        match rule {
            spec::GuardrailRule::Regex { pattern, trip_on_match } => Self::Regex(RegexRule { pattern, trip_on_match }),
            spec::GuardrailRule::MaxLength { characters } => {
                Self::MaxLength(MaxLengthRule { characters: i32::try_from(characters).unwrap_or(i32::MAX) })
            }
            spec::GuardrailRule::JsonSchema { schema } => Self::JsonSchema(JsonSchemaRule { schema: Json(schema) }),
            spec::GuardrailRule::Agent { agent_id } => Self::Agent(AgentRule(agent_id)),
        }
    }
}

/// By a pattern, matched in linear time.
#[derive(SimpleObject)]
pub struct RegexRule {
    pattern: String,
    /// True: a match trips. False: no match trips.
    trip_on_match: bool,
}

/// By length: what is longer trips.
#[derive(SimpleObject)]
pub struct MaxLengthRule {
    characters: i32,
}

/// By a JSON Schema: what is no JSON or does not fit trips.
#[derive(SimpleObject)]
pub struct JsonSchemaRule {
    schema: Json<Value>,
}

pub struct AgentRule(Uuid);

#[Object]
/// An agent whose structured output is {tripped: boolean, reason: string}.
impl AgentRule {
    async fn agent(&self, ctx: &Context<'_>) -> Result<Agent> {
        required_agent(ctx, self.0).await
    }
}
