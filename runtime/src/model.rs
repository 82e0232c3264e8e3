//! The one way a run reaches a model: the [`Model`] trait, its requests and its responses.
//!
//! In the api process it is the model gateway itself; in a worker apart it is the gateway over HTTP.

use futures_util::stream::BoxStream;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::item::{InputItem, RunErrorCode, TokenUsage};
use crate::journal::Addition;
use crate::recorder::TurnRecorder;
use crate::spec::{HostedTool, Lease, OutputSchema, ReasoningEffort};

/// Answers model calls, metered.
pub trait Model: Send + Sync {
    /// Makes one call. The stream ends with [`ModelEvent::Done`] or an error; what was streamed
    /// before an error is void. Dropping the stream does not stop the metering of what was sent.
    fn respond(&self, call: ModelCall) -> BoxStream<'static, Result<ModelEvent, ModelError>>;

    /// Whether it shares a database with the journal, and stores [`ModelCall::first`] together with the call's
    /// reservation. Otherwise there is none.
    fn stores_first(&self) -> bool {
        false
    }
}

/// A model call of a run.
#[derive(Clone, Debug)]
pub struct ModelCall {
    /// The run, and the right to write its journal.
    pub lease: Lease,
    /// The turn, from 1.
    pub turn: u32,
    /// The agent that asks.
    pub agent_id: uuid::Uuid,
    /// Its version; none for a draft.
    pub agent_version: Option<i32>,
    /// The outputs that the request answers, to be stored before it is sent. After an error they may not have been.
    pub first: Option<Addition>,
    /// What the model is asked.
    pub request: ModelRequest,
    /// Models tried in order, each with the same request, when the one before is unavailable before its first byte.
    pub fallback_models: Vec<String>,
    /// Turns the response into the journal's items. Where the gateway and the journal share a
    /// database, it stores them in the ledger's own transaction.
    pub recorder: TurnRecorder,
}

/// What a model is asked, in no provider's words.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelRequest {
    /// The catalogue's name of the model.
    pub model: String,
    /// The system prompt; empty means none is sent.
    pub instructions: String,
    /// The conversation so far.
    pub input: Vec<InputItem>,
    /// Tools on offer, handoffs last.
    pub tools: Vec<Offer>,
    /// What the final answer must be.
    #[serde(default)]
    pub output: Option<OutputSchema>,
    /// Sampling temperature.
    pub temperature: Option<f64>,
    /// Nucleus sampling.
    pub top_p: Option<f64>,
    /// The most tokens the response may have.
    pub max_output_tokens: Option<u32>,
    /// `auto`, `required`, `none`, or a tool's name.
    pub tool_choice: Option<String>,
    /// Whether the response may hold several calls; left out when there are no tools.
    pub parallel_tool_calls: Option<bool>,
    /// How much a reasoning model thinks.
    pub reasoning_effort: Option<ReasoningEffort>,
}

impl ModelRequest {
    /// The tools on offer that are run here, and the handoffs.
    pub fn functions(&self) -> impl Iterator<Item = &ToolDefinition> {
        self.tools.iter().filter_map(|offer| match offer {
            Offer::Function(definition) => Some(definition),
            Offer::Hosted(_) => None,
        })
    }
}

/// A tool on offer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Offer {
    /// One that is run here, or a handoff.
    Function(ToolDefinition),
    /// One that the provider runs.
    Hosted(HostedTool),
}

/// A tool as the model is told of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ToolDefinition {
    /// The name the model calls it by.
    pub name: String,
    /// What it does; `""` if nothing is said.
    pub description: String,
    /// JSON Schema of the arguments.
    pub parameters: serde_json::Value,
    /// Whether the provider holds the model to the schema.
    pub strict: bool,
}

/// What comes while a model answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ModelEvent {
    /// More text of a message.
    Text {
        /// The part it belongs to.
        index: u32,
        /// The new text.
        text: String,
    },
    /// More of a call's arguments.
    Arguments {
        /// The part it belongs to.
        index: u32,
        /// The provider's id of the call; may be empty or repeated.
        call_id: String,
        /// The tool's name.
        name: String,
        /// The new text.
        text: String,
    },
    /// An attempt was cut after it had streamed and another begins: what was streamed is void.
    Restarted,
    /// The response is complete.
    Done {
        /// The whole of it.
        response: ModelResponse,
        /// Whether the journal already holds its items; if not, the loop appends them.
        journaled: bool,
    },
}

/// A complete response.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelResponse {
    /// The catalogue's name of the model that answered.
    pub model: String,
    /// Its parts, by index.
    pub parts: Vec<Part>,
    /// Why the model stopped.
    pub finish: Finish,
    /// What the provider charged.
    pub usage: TokenUsage,
}

/// A part of a response, with its place: over the Responses API that of its output item. Chat Completions has no
/// places of its own, so they are fixed: reasoning 0, the message 1, calls from 2. `raw` is the provider's own item,
/// where it must be sent back as it came.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Part {
    /// What the model thought.
    Reasoning {
        /// Its place.
        index: u32,
        /// The whole text.
        text: String,
        /// See [`Part`].
        #[serde(default, skip_serializing_if = "Option::is_none")]
        raw: Option<Value>,
    },
    /// What the model said.
    Message {
        /// Its place.
        index: u32,
        /// The whole text.
        text: String,
        /// See [`Part`].
        #[serde(default, skip_serializing_if = "Option::is_none")]
        raw: Option<Value>,
    },
    /// What the model said in refusing.
    Refusal {
        /// The whole text.
        text: String,
    },
    /// A tool or a handoff that the model asks for.
    ToolCall {
        /// Its place.
        index: u32,
        /// The provider's id of the call; may be empty or repeated.
        call_id: String,
        /// The tool's name.
        name: String,
        /// The arguments as the model wrote them.
        arguments: String,
        /// See [`Part`].
        #[serde(default, skip_serializing_if = "Option::is_none")]
        raw: Option<Value>,
    },
    /// A call of a tool that the provider ran itself.
    HostedCall {
        /// Its place.
        index: u32,
        /// The provider's id of the item.
        id: String,
        /// Its type, such as `web_search_call`.
        name: String,
        /// See [`Part`].
        raw: Value,
    },
}

/// Why a model stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// It had said all, or asks for tools.
    Stop,
    /// The maximum of output tokens was reached.
    Length,
    /// The provider withheld the rest.
    ContentFilter,
}

/// Why a model call came to nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ModelError {
    /// Nothing is left of the month (or of the key's month): the run pauses.
    #[error("the token quota is used up")]
    QuotaExhausted,
    /// The run must end.
    #[error("{message}")]
    Failed {
        /// As what it ends.
        code: RunErrorCode,
        /// For people; holds nothing of the provider's credentials.
        message: String,
    },
    /// The lease was lost: another worker has the run, or it was cancelled.
    #[error("the lease on the run was lost")]
    LeaseLost,
    /// The gateway can't be reached, or its answer broke off. The run goes on with whoever claims it next.
    #[error("the model gateway is unavailable: {reason}")]
    Unavailable {
        /// For the log.
        reason: String,
    },
}
