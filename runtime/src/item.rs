//! The journal's items: what a run did, in the order it became durable.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::spec::GuardrailStage;

/// A durable step of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Item {
    /// From 1, without gaps.
    pub sequence: i64,
    /// When it was stored.
    pub created_at: DateTime<Utc>,
    /// What happened.
    #[serde(flatten)]
    pub step: Step,
}

/// An item before it has its place in the journal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// The agent at work.
    pub agent_name: String,
    /// The turn it belongs to, from 1; none outside a turn.
    pub turn: Option<u32>,
    /// The nested run it belongs to, by the way that leads there (see [`crate::run`]); none for the run itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<String>,
    /// What happened.
    #[serde(flatten)]
    pub body: Body,
}

/// Who said a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The run's input.
    User,
    /// An agent.
    Assistant,
}

/// What an item says, by kind. `index` is the place of the part in the model's response
/// (see [`crate::model::Part`]) and joins an item with its deltas.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Body {
    /// Text from the user or the model.
    Message {
        /// Its place in the response; none for the user's input.
        index: Option<u32>,
        /// Who said it.
        role: Role,
        /// The whole text.
        text: String,
        /// The provider's own item, where it must be sent back as it came (Responses API).
        #[serde(default, skip_serializing_if = "Option::is_none")]
        raw: Option<Value>,
    },
    /// What a reasoning model thought.
    Reasoning {
        /// Its place in the response.
        index: u32,
        /// The whole text.
        text: String,
        /// The provider's own item, where it must be sent back as it came.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        raw: Option<Value>,
    },
    /// The model asked for a tool or a handoff.
    ToolCall {
        /// Its place in the response.
        index: u32,
        /// Unique in the run.
        call_id: String,
        /// The tool's name.
        name: String,
        /// The arguments as the model wrote them.
        arguments: String,
        /// [`arguments_hash`] of them.
        arguments_hash: String,
        /// Whether the provider ran the tool itself: nobody else answers the call.
        #[serde(default, skip_serializing_if = "is_false")]
        is_hosted: bool,
        /// The provider's own item, where it must be sent back as it came.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        raw: Option<Value>,
    },
    /// A call waits for a decision, or was decided.
    Approval {
        /// The call.
        call_id: String,
        /// None: asked, not decided.
        approved: Option<bool>,
        /// Whether later calls of this tool by this agent are decided alike.
        #[serde(default, skip_serializing_if = "is_false")]
        always: bool,
        /// What the model is told in place of the tool's output when it was rejected.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        message: Option<String>,
    },
    /// A guardrail tripped.
    Guardrail {
        /// Its name.
        name: String,
        /// What it looked at.
        stage: GuardrailStage,
        /// Why it tripped.
        reason: String,
        /// At the tool stages: the call.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        call_id: Option<String>,
    },
    /// A tool's answer, as the model is told it.
    ToolOutput {
        /// The call it answers.
        call_id: String,
        /// The text.
        output: String,
        /// Whether the text is ours, in place of an answer.
        is_error: bool,
        /// What the model is shown in place of the text: `input_text` and `input_image` parts, as an MCP server's output
        /// has them.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        parts: Vec<Value>,
    },
    /// The handoff took place; the output of its call.
    Handoff {
        /// The call it answers.
        call_id: String,
        /// The text the model is told.
        output: String,
        /// Who goes on.
        to_agent_id: Uuid,
        /// Its name.
        to_agent_name: String,
    },
    /// What the provider charged for the turn's response.
    Usage {
        /// The catalogue's name of the model.
        model: String,
        /// The tokens.
        usage: TokenUsage,
        /// In a nested run, which has no status of its own: why its response can't be used.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        failure: Option<RunError>,
    },
    /// The run changed its state.
    Status {
        /// The new state.
        status: RunStatus,
        /// Why it failed.
        error: Option<RunError>,
        /// The final text, with SUCCEEDED.
        output: Option<String>,
        /// The final value of an agent with an output schema, with SUCCEEDED.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        output_json: Option<Value>,
    },
}

impl Body {
    /// A tool's answer.
    pub fn output(call_id: impl Into<String>, output: impl Into<String>, is_error: bool) -> Self {
        Body::ToolOutput { call_id: call_id.into(), output: storable(output.into()), is_error, parts: Vec::new() }
    }

    /// A tool's answer with the parts that the model is shown in place of its text.
    pub fn with_parts(mut self, shown: Vec<Value>) -> Self {
        if let Body::ToolOutput { parts, .. } = &mut self {
            *parts = shown.into_iter().map(storable_json).collect();
        }
        self
    }

    /// A change of state with nothing more to say.
    pub fn status(status: RunStatus) -> Self {
        Body::Status { status, error: None, output: None, output_json: None }
    }

    /// The end of a run that failed.
    pub fn failed(code: RunErrorCode, message: impl Into<String>) -> Self {
        Body::Status {
            status: RunStatus::Failed,
            error: Some(RunError { code, message: storable(message.into()) }),
            output: None,
            output_json: None,
        }
    }
}

fn is_false(value: &bool) -> bool {
    !value
}

/// A text that came from outside, as a journal can hold it: PostgreSQL has no NUL.
pub fn storable(text: String) -> String {
    if text.contains('\0') { text.replace('\0', "\u{fffd}") } else { text }
}

/// As [`storable`], for all texts in a value.
pub fn storable_json(value: Value) -> Value {
    match value {
        Value::String(text) => Value::String(storable(text)),
        Value::Array(values) => values.into_iter().map(storable_json).collect(),
        Value::Object(fields) => {
            fields.into_iter().map(|(name, value)| (storable(name), storable_json(value))).collect()
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => value,
    }
}

/// Where a run stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunStatus {
    /// Waits for a worker, or for the conversation's earlier run.
    Queued,
    /// A worker holds it.
    Running,
    /// Waits for a decision about a tool call.
    WaitingApproval,
    /// The month's tokens ran out; `resumeRun` goes on.
    PausedQuota,
    /// Ended with an output.
    Succeeded,
    /// Ended with an error.
    Failed,
    /// Ended by `cancelRun`.
    Cancelled,
}

impl RunStatus {
    /// Whether the run has ended: there is one such transition, ever.
    pub fn is_terminal(self) -> bool {
        matches!(self, RunStatus::Succeeded | RunStatus::Failed | RunStatus::Cancelled)
    }
}

/// Why a run failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunError {
    /// The kind, stable.
    pub code: RunErrorCode,
    /// For people.
    pub message: String,
}

/// The kinds of failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum RunErrorCode {
    /// One more model call than allowed was needed.
    MaxTurns,
    /// The model's response can't be used.
    ModelBehavior,
    /// The model refused.
    ModelRefusal,
    /// The provider answered 4xx.
    ModelRejected,
    /// The provider could not be reached, or kept failing.
    ModelUnavailable,
    /// A guardrail tripped.
    Guardrail,
    /// A tool ended the run.
    Tool,
    /// The run's own `maxTokens` is used up.
    TokenLimit,
    /// The run took longer than it may.
    Timeout,
    /// Our fault.
    Internal,
}

/// Tokens of one or many model calls. The buckets are disjoint; reasoning is part of output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenUsage {
    /// Input tokens, uncached.
    pub input_tokens: i64,
    /// Input tokens read from the provider's cache.
    pub cache_read_tokens: i64,
    /// Input tokens written to the provider's cache.
    pub cache_write_tokens: i64,
    /// Output tokens.
    pub output_tokens: i64,
    /// The part of `output_tokens` spent on reasoning.
    pub reasoning_tokens: i64,
    /// Nano-USD.
    pub cost_nano_usd: i64,
    /// Whether we counted because the provider sent no usage.
    pub estimated: bool,
}

impl TokenUsage {
    /// The buckets' sum.
    pub fn total_tokens(&self) -> i64 {
        self.input_tokens + self.cache_read_tokens + self.cache_write_tokens + self.output_tokens
    }
}

/// What a model call is given of what went before: the transcript without our bookkeeping. `raw` is the provider's own
/// item, as it came over the Responses API; an item without one was made by Chat Completions, or by us.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum InputItem {
    /// The user's text.
    User {
        /// The text.
        text: String,
    },
    /// An agent's text.
    Assistant {
        /// The text.
        text: String,
        /// See [`InputItem`].
        #[serde(default, skip_serializing_if = "Option::is_none")]
        raw: Option<Value>,
    },
    /// What a reasoning model thought.
    Reasoning {
        /// The text.
        text: String,
        /// See [`InputItem`].
        #[serde(default, skip_serializing_if = "Option::is_none")]
        raw: Option<Value>,
    },
    /// A call the model made.
    ToolCall {
        /// Joins it with its output.
        call_id: String,
        /// The tool's name.
        name: String,
        /// The arguments as the model wrote them.
        arguments: String,
        /// See [`InputItem`].
        #[serde(default, skip_serializing_if = "Option::is_none")]
        raw: Option<Value>,
    },
    /// A call of a tool that the provider ran itself.
    HostedCall {
        /// See [`InputItem`].
        raw: Value,
    },
    /// The answer to a call, a handoff's included.
    ToolOutput {
        /// The call it answers.
        call_id: String,
        /// The text.
        output: String,
        /// Shown in place of the text, as in [`Body::ToolOutput`].
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        parts: Vec<Value>,
    },
    /// What was said before a handoff, in one message of an assistant (`nestHistory`).
    Summary {
        /// The text.
        text: String,
    },
}

/// The transcript of a journal: what the model is shown of its items. A call without an output
/// (its run was cut) is left out, so that no provider refuses the history.
pub fn transcript<'a>(steps: impl IntoIterator<Item = &'a Step> + Clone) -> Vec<InputItem> {
    let answered: std::collections::HashSet<&str> = steps
        .clone()
        .into_iter()
        .filter_map(|step| match &step.body {
            Body::ToolOutput { call_id, .. } | Body::Handoff { call_id, .. } => Some(call_id.as_str()),
            _ => None,
        })
        .collect();
    steps
        .into_iter()
        .filter_map(|step| match &step.body {
            Body::Message { role: Role::User, text, .. } => Some(InputItem::User { text: text.clone() }),
            Body::Message { role: Role::Assistant, text, raw, .. } => {
                Some(InputItem::Assistant { text: text.clone(), raw: raw.clone() })
            }
            Body::ToolCall { is_hosted: true, raw, .. } => Some(InputItem::HostedCall { raw: raw.clone()? }),
            Body::ToolCall { call_id, name, arguments, raw, .. } => {
                answered.contains(call_id.as_str()).then(|| InputItem::ToolCall {
                    call_id: call_id.clone(),
                    name: name.clone(),
                    arguments: arguments.clone(),
                    raw: raw.clone(),
                })
            }
            Body::ToolOutput { call_id, output, parts, .. } => {
                Some(InputItem::ToolOutput { call_id: call_id.clone(), output: output.clone(), parts: parts.clone() })
            }
            Body::Handoff { call_id, output, .. } => {
                Some(InputItem::ToolOutput { call_id: call_id.clone(), output: output.clone(), parts: Vec::new() })
            }
            Body::Reasoning { text, raw, .. } => Some(InputItem::Reasoning { text: text.clone(), raw: raw.clone() }),
            Body::Approval { .. } | Body::Guardrail { .. } | Body::Usage { .. } | Body::Status { .. } => None,
        })
        .collect()
}

/// SHA-256 of a call's arguments, as lower-case hex: what an approval is bound to.
pub fn arguments_hash(arguments: &str) -> String {
    Sha256::digest(arguments.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}
