//! A response's calls, side by side.

use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, StreamExt, stream};
use serde_json::Value;
use tokio_util::task::AbortOnDropHandle;

use super::checks::{self, Tripped};
use super::flow::{End, Place};
use super::texts;
use super::toolbox::{Target, Toolbox, Webhook, object};
use super::turn::Call;
use super::world::{Halt, World};
use crate::ids::run_id;
use crate::mcp::McpFault;
use crate::spec::{AgentSpec, AgentTool, Guardrail, GuardrailStage, McpServer};
use crate::webhook::{WebhookCall, WebhookError};

/// Until a call of an MCP server's tool counts as timed out, in milliseconds.
const MCP_TIMEOUT_MS: u32 = 30_000;

/// What became of a call.
#[derive(Debug)]
pub enum Answer {
    /// The model is told something.
    Output {
        /// The call it answers.
        call_id: String,
        /// The text.
        output: String,
        /// Shown to the model in place of the text.
        parts: Vec<Value>,
        /// Whether the text is ours.
        is_error: bool,
        /// The guardrail in whose place the text stands.
        trip: Option<Tripped>,
    },
    /// Its nested run waits for a decision.
    Waits {
        /// The call.
        call_id: String,
    },
    /// A guardrail ends the run by it.
    Trips {
        /// The call.
        call_id: String,
        /// The guardrail.
        trip: Tripped,
    },
    /// The run does not go on.
    Halts(Halt),
}

/// An output and its parts, or what the model is told instead.
type Told = Result<(String, Vec<Value>), String>;

/// A call with all it needs, apart from the run's state.
struct Invocation {
    world: Arc<World>,
    place: Place,
    agent: Arc<AgentSpec>,
    turn: u32,
    call: Call,
}

/// Makes calls of an agent, at most as many at a time as it allows, and yields what becomes of them as it comes, what
/// came together in one batch. Dropping the stream cuts the calls that are under way.
pub fn call_all(
    world: &Arc<World>,
    place: &Place,
    agent: &Arc<AgentSpec>,
    turn: u32,
    calls: Vec<Call>,
) -> impl Stream<Item = Vec<Answer>> + Send + use<> {
    let at_once = usize::try_from(agent.max_tool_concurrency).unwrap_or(usize::MAX).max(1);
    let invocations: Vec<Invocation> = calls
        .into_iter()
        .map(|call| Invocation { world: world.clone(), place: place.clone(), agent: agent.clone(), turn, call })
        .collect();
    stream::iter(invocations).map(Invocation::answer).buffer_unordered(at_once).ready_chunks(at_once)
}

impl Invocation {
    /// Calls in a task of its own, so that calls go on while answers are being stored, and one that panics is one that
    /// failed.
    async fn answer(self) -> Answer {
        let call_id = self.call.id.clone();
        let call = tokio::spawn(self.guarded());
        AbortOnDropHandle::new(call).await.unwrap_or_else(|_| failed(call_id))
    }

    /// The call between its guardrails: in order, the first that trips decides.
    async fn guarded(self) -> Answer {
        if let Some(answer) = self.check(GuardrailStage::ToolInput, &self.call.arguments).await {
            return answer;
        }
        let told = match self.invoke().await {
            Ok(Some(told)) => told,
            Ok(None) => return Answer::Waits { call_id: self.call.id },
            Err(halt) => return Answer::Halts(halt),
        };
        let (output, parts, is_error) = match told {
            Ok((output, parts)) => (output, parts, false),
            Err(text) => (text, Vec::new(), true),
        };
        match self.check(GuardrailStage::ToolOutput, &output).await {
            Some(answer) => answer,
            None => Answer::Output { call_id: self.call.id, output, parts, is_error, trip: None },
        }
    }

    /// What a guardrail of the call makes of it, if one trips.
    async fn check(&self, stage: GuardrailStage, text: &str) -> Option<Answer> {
        let is_about = |guardrail: &&Guardrail| {
            guardrail.stage == stage && guardrail.tool.as_ref().is_none_or(|tool| *tool == self.call.name)
        };
        let place = self.place.of_call(self.turn, &self.call);
        for guardrail in self.agent.guardrails.iter().filter(is_about) {
            let checked = checks::check(self.world.clone(), place.clone(), guardrail.clone(), text.to_owned()).await;
            let trip = match checked {
                Ok(None) => continue,
                Ok(Some(trip)) => trip,
                Err(halt) => return Some(Answer::Halts(halt)),
            };
            let call_id = self.call.id.clone();
            if guardrail.ends_run {
                return Some(Answer::Trips { call_id, trip });
            }
            let message = guardrail.message.clone();
            let output = message.unwrap_or_else(|| texts::rejected(&guardrail.name, &trip.reason));
            return Some(Answer::Output { call_id, output, parts: Vec::new(), is_error: true, trip: Some(trip) });
        }
        None
    }

    /// Makes the call. None if it waits for a decision.
    async fn invoke(&self) -> Result<Option<Told>, Halt> {
        let toolbox: Arc<Toolbox> = match self.world.toolbox(&self.agent).await {
            Ok(toolbox) => toolbox,
            Err(_) => return Ok(Some(Err(texts::TOOL_FAILED.to_owned()))),
        };
        match toolbox.target(&self.call.name) {
            Target::Webhook(webhook) => Ok(Some(self.webhook(webhook).await)),
            Target::Mcp(server) => Ok(Some(self.mcp(server).await)),
            Target::Agent(tool) => self.agent(tool).await,
            Target::Handoff(_) | Target::Missing => Ok(Some(Err(texts::not_found(&self.call.name)))),
        }
    }

    async fn webhook(&self, webhook: &Webhook) -> Told {
        let Self { world, place, turn, call, .. } = self;
        let tool = &webhook.tool;
        if !webhook.fits(&call.arguments) {
            return Err(texts::TOOL_FAILED.to_owned());
        }
        let request = WebhookCall {
            url: &tool.url,
            token: tool.token.as_deref(),
            arguments: &call.arguments,
            timeout: Duration::from_millis(tool.timeout_ms.into()),
            run_id: world.lease.run_id,
            place: &format!("{}{turn}.{}", place.prefix, call.position),
            secrets: &world.secrets,
        };
        let answer = world.ports.webhooks.call(request).await;
        answer.map(|output| (output, Vec::new())).map_err(|error| {
            let run = run_id(world.lease.run_id);
            tracing::debug!(%run, turn, index = call.position, %error, "a webhook call failed");
            match error {
                WebhookError::TimedOut => texts::timed_out(&tool.name, tool.timeout_ms),
                _ => texts::TOOL_FAILED.to_owned(),
            }
        })
    }

    async fn mcp(&self, server: &McpServer) -> Told {
        let Self { world, turn, call, .. } = self;
        let Some(arguments) = object(&call.arguments) else { return Err(texts::TOOL_FAILED.to_owned()) };
        let timeout = Duration::from_millis(MCP_TIMEOUT_MS.into());
        let output = world.mcp.call(server, &call.name, arguments, timeout).await;
        output.map(|output| (output.text, output.parts)).map_err(|error| {
            let run = run_id(world.lease.run_id);
            tracing::debug!(%run, turn, index = call.position, %error, "a call of an MCP server's tool failed");
            match error.fault {
                McpFault::TimedOut => texts::timed_out(&call.name, MCP_TIMEOUT_MS),
                _ => texts::TOOL_FAILED.to_owned(),
            }
        })
    }

    /// Another agent's final output, from a run of its own.
    async fn agent(&self, tool: &AgentTool) -> Result<Option<Told>, Halt> {
        let input =
            object(&self.call.arguments).and_then(|arguments| Some(arguments.get("input")?.as_str()?.to_owned()));
        let Some(input) = input else { return Ok(Some(Err(texts::TOOL_FAILED.to_owned()))) };
        let place = self.place.of_call(self.turn, &self.call);
        let end = checks::nested(&self.world, place, tool.agent_id, Some(tool.max_turns), input).await?;
        Ok(match end {
            Some(End::Output(text)) => Some(Ok((text, Vec::new()))),
            Some(End::Waits) => None,
            Some(End::Failed(_)) | None => Some(Err(texts::TOOL_FAILED.to_owned())),
        })
    }
}

fn failed(call_id: String) -> Answer {
    Answer::Output { call_id, output: texts::TOOL_FAILED.to_owned(), parts: Vec::new(), is_error: true, trip: None }
}
