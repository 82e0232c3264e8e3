//! What a run is given: everything the loop needs, frozen when the run was started.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use crate::item::{InputItem, Item};

/// Agents by their ids. They never change, so runs share them.
pub type Agents = BTreeMap<Uuid, Arc<AgentSpec>>;

/// A run as `startRun` froze it: the closure of agents it may reach, and its input.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunSpec {
    /// The run's id, also the first half of its webhook calls' idempotency keys.
    pub run_id: Uuid,
    /// The agent that answers first.
    pub root: Uuid,
    /// Every agent that handoffs, agent tools and guardrails can lead to, `root` included.
    pub agents: Arc<Agents>,
    /// The user's text.
    pub input: String,
}

impl RunSpec {
    /// Whether others than the run's own flow may write its journal: nested runs, and who decides about calls.
    pub fn has_other_authors(&self) -> bool {
        let nests = |tool: &Tool| matches!(tool, Tool::Agent(_)) || tool.needs_approval();
        let asks = |guardrail: &Guardrail| matches!(guardrail.rule, GuardrailRule::Agent { .. });
        self.agents.values().any(|agent| agent.tools.iter().any(nests) || agent.guardrails.iter().any(asks))
    }
}

/// An agent, in one published version or as a draft.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AgentSpec {
    /// The agent's id.
    pub id: Uuid,
    /// The published version; none when the draft runs.
    pub version: Option<i32>,
    /// The agent's name, unique enough to be shown.
    pub name: String,
    /// The name of a model in the catalogue.
    pub model: String,
    /// Models tried in order when the one before is unavailable before its first byte.
    #[serde(default)]
    pub fallback_models: Vec<String>,
    /// The system prompt, its variables filled in; empty means none is sent.
    pub instructions: String,
    /// Sampling and tool choice.
    pub settings: ModelSettings,
    /// Tools in the order they are offered.
    pub tools: Vec<Tool>,
    /// Handoffs in the order they are offered, after the tools.
    pub handoffs: Vec<Handoff>,
    /// Checks on what goes in and comes out, in the order they are made.
    #[serde(default)]
    pub guardrails: Vec<Guardrail>,
    /// What its final answer must be; none for plain text.
    #[serde(default)]
    pub output: Option<OutputSchema>,
    /// What becomes of a turn whose tools have run.
    pub tool_use_behavior: ToolUseBehavior,
    /// The tools that end the run, with [`ToolUseBehavior::StopAtTools`].
    pub stop_at_tools: Vec<String>,
    /// Model calls a run may make that starts with this agent.
    pub max_turns: u32,
    /// Leave `tool_choice` out once this agent has used a tool.
    pub reset_tool_choice: bool,
    /// Calls of one response that run at the same time.
    pub max_tool_concurrency: u32,
}

/// Settings of a model call; what is `None` is left to the provider.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ModelSettings {
    /// Sampling temperature.
    pub temperature: Option<f64>,
    /// Nucleus sampling.
    pub top_p: Option<f64>,
    /// The most tokens a response may have.
    pub max_output_tokens: Option<u32>,
    /// `auto`, `required`, `none`, or a tool's name.
    pub tool_choice: Option<String>,
    /// Whether a response may hold several calls.
    pub parallel_tool_calls: Option<bool>,
    /// How much a reasoning model thinks.
    pub reasoning_effort: Option<ReasoningEffort>,
}

/// How much a reasoning model thinks, in OpenAI's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReasoningEffort {
    /// `minimal`
    Minimal,
    /// `low`
    Low,
    /// `medium`
    Medium,
    /// `high`
    High,
}

/// What becomes of a turn whose tools have run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToolUseBehavior {
    /// The model sees the outputs and goes on.
    #[default]
    RunLlmAgain,
    /// The first call's output is the run's output.
    StopOnFirstTool,
    /// The output of the first call to one of `stop_at_tools` is the run's output.
    StopAtTools,
}

/// Something that an agent may call. Stored without a tag: each kind has fields that the others lack, and what was
/// stored before there was more than one kind is a webhook.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Tool {
    /// The tenant's endpoint.
    Webhook(WebhookTool),
    /// Another agent, whose final output is the call's.
    Agent(AgentTool),
    /// The tools of an MCP server.
    Mcp(McpServer),
    /// A tool that the model's provider runs.
    Hosted(HostedTool),
}

/// A tool that is a POST to the tenant's endpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WebhookTool {
    /// The name the model calls it by.
    pub name: String,
    /// What the model is told of it.
    pub description: String,
    /// JSON Schema of its arguments, as its tenant wrote it; the model is shown its strict form.
    #[serde(with = "crate::in_order")]
    pub parameters: Value,
    /// Where it is POSTed.
    pub url: String,
    /// Sent as a bearer token. Sealed while at rest; open in a [`Claim`].
    pub token: Option<String>,
    /// Milliseconds until the call counts as timed out.
    pub timeout_ms: u32,
    /// Whether somebody must agree to each call.
    #[serde(default)]
    pub needs_approval: bool,
}

/// An agent as a tool: a run of its own inside the run, with a fresh history.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AgentTool {
    /// The name the model calls it by.
    pub name: String,
    /// What the model is told of it.
    pub description: String,
    /// The agent that answers; a key of [`RunSpec::agents`].
    pub agent_id: Uuid,
    /// Model calls that each of its runs may make.
    pub max_turns: u32,
    /// Whether somebody must agree to each call.
    pub needs_approval: bool,
}

/// An MCP server, reached over streamable HTTP; its tools are offered before the agent's own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct McpServer {
    /// For people, and for messages about it.
    pub name: String,
    /// Its endpoint.
    pub url: String,
    /// Sent as a bearer token. Sealed while at rest; open in a [`Claim`].
    pub token: Option<String>,
    /// The tools that are offered; none: all of them.
    pub allowed_tools: Option<Vec<String>>,
    /// Whether somebody must agree to each call.
    pub needs_approval: bool,
}

/// A tool that the model's provider runs itself, such as `web_search`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostedTool {
    /// Its type in the provider's words.
    pub name: String,
    /// The rest of its definition: an object.
    #[serde(with = "crate::in_order")]
    pub config: Value,
}

impl Tool {
    /// Whether somebody must agree to each call.
    pub fn needs_approval(&self) -> bool {
        match self {
            Tool::Webhook(tool) => tool.needs_approval,
            Tool::Agent(tool) => tool.needs_approval,
            Tool::Mcp(server) => server.needs_approval,
            Tool::Hosted(_) => false,
        }
    }

    /// Its bearer token.
    pub fn token(&self) -> Option<&str> {
        match self {
            Tool::Webhook(tool) => tool.token.as_deref(),
            Tool::Mcp(server) => server.token.as_deref(),
            Tool::Agent(_) | Tool::Hosted(_) => None,
        }
    }

    /// Its bearer token, if it is of a kind that has one.
    pub fn token_mut(&mut self) -> Option<&mut Option<String>> {
        match self {
            Tool::Webhook(tool) => Some(&mut tool.token),
            Tool::Mcp(server) => Some(&mut server.token),
            Tool::Agent(_) | Tool::Hosted(_) => None,
        }
    }
}

/// A check on what goes in or comes out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Guardrail {
    /// What a trip is reported under.
    pub name: String,
    /// What it looks at.
    pub stage: GuardrailStage,
    /// At the tool stages: the one tool it looks at; none: every tool.
    pub tool: Option<String>,
    /// Input stage: run beside the first model call. No tool runs before the verdict.
    pub parallel: bool,
    /// How it decides.
    pub rule: GuardrailRule,
    /// Tool stages: a trip ends the run, instead of being told to the model in place of the tool's output.
    #[serde(default)]
    pub ends_run: bool,
    /// Tool stages: what the model is told on a trip; none: our own words.
    #[serde(default)]
    pub message: Option<String>,
}

/// What a guardrail looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
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

/// How a guardrail decides.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum GuardrailRule {
    /// By a pattern, matched in linear time.
    Regex {
        /// In the syntax of the `regex` crate.
        pattern: String,
        /// True: a match trips. False: no match trips.
        trip_on_match: bool,
    },
    /// Trips on a text that is longer.
    MaxLength {
        /// Unicode code points.
        characters: u32,
    },
    /// Trips on what is no JSON or does not fit.
    JsonSchema {
        /// The schema.
        #[serde(with = "crate::in_order")]
        schema: Value,
    },
    /// Asks an agent whose structured output is `{tripped: boolean, reason: string}`.
    Agent {
        /// A key of [`RunSpec::agents`].
        agent_id: Uuid,
    },
}

/// What an agent's final answer must be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OutputSchema {
    /// Strict JSON Schema with an object at its root, as the provider is sent it.
    #[serde(with = "crate::in_order")]
    pub schema: Value,
    /// Whether the tenant's schema had no object at its root and stands under the property `response`.
    pub is_wrapped: bool,
}

/// A way to pass the conversation on to another agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Handoff {
    /// The agent that takes over; a key of [`RunSpec::agents`].
    pub agent_id: Uuid,
    /// The name of the tool that the model calls.
    pub tool_name: String,
    /// What the model is told of it.
    pub tool_description: String,
    /// What of the history the new agent is shown.
    #[serde(default)]
    pub filter: HandoffFilter,
    /// The history so far goes as one summary message, as the Agents SDK's `nest_handoff_history` writes it.
    #[serde(default)]
    pub nest_history: bool,
}

/// What of the history the agent that takes over is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HandoffFilter {
    /// All of it.
    #[default]
    None,
    /// All but tools: calls, outputs, handoffs and reasoning are dropped.
    RemoveTools,
    /// The last items, so many; a call never without its output.
    LastN(u32),
}

impl Handoff {
    /// The tool name a handoff has unless it is given one: `transfer_to_` and the agent's name,
    /// every code point outside `[a-zA-Z0-9_]` as `_`, then lower case (the Agents SDK's rule).
    pub fn default_tool_name(agent_name: &str) -> String {
        format!("transfer_to_{agent_name}")
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '_' })
            .collect()
    }

    /// The description a handoff has unless it is given one (the Agents SDK's text; its space
    /// stays when there is no description).
    pub fn default_tool_description(agent_name: &str, handoff_description: &str) -> String {
        format!("Handoff to the {agent_name} agent to handle the request. {handoff_description}")
    }
}

/// The right to write one run's journal: a later claim raises `fence`, and what an earlier
/// holder still sends is refused (I3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// The run.
    pub run_id: Uuid,
    /// Rises with each claim of the run.
    pub fence: i64,
}

/// A run handed to a worker, with all that it needs to begin or to go on.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Claim {
    /// The right to write.
    pub lease: Lease,
    /// The run, its secrets open.
    pub spec: RunSpec,
    /// What the conversation held before this run.
    pub history: Vec<InputItem>,
    /// The run's own journal so far, from sequence 1, without gaps.
    pub items: Vec<Item>,
    /// Milliseconds until the run fails as TIMEOUT. No moment: a worker's clock may be wrong.
    pub time_left_ms: u64,
    /// Standard-Webhooks secrets (base64, without prefix), newest first; each one signs.
    pub webhook_secrets: Vec<String>,
}
