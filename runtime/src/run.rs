//! The agent loop.
//!
//! A [`flow`] is the loop of one run: [`state`] says what it needs next, from its items alone, and the flow does that
//! and writes it down. Agents that are tools, and those that guardrails ask, run in flows of their own inside the run,
//! side by side. Their items lie in the run's journal too, in a *scope*: the id of the call that the agent answers, or
//! `guardrail:STAGE:NAME`, after the scope around it and a `/`.

mod checks;
pub mod deltas;
mod flow;
pub mod guardrails;
pub mod nest_history;
mod request;
mod state;
mod texts;
mod toolbox;
mod tools;
mod turn;
mod world;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use self::flow::{End, Flow, Place};
use self::state::State;
use self::toolbox::Toolbox;
use self::world::{Halt, World};
use crate::ids::run_id;
use crate::item::{Body, InputItem, Item, RunError, RunErrorCode, Step};
use crate::journal::{Addition, Journal, JournalError};
use crate::mcp::McpClient;
use crate::model::{Model, ModelRequest};
use crate::spec::{Claim, GuardrailStage, RunSpec, Tool};
use crate::webhook::WebhookClient;

/// All that a run reaches of the world.
#[derive(Clone)]
pub struct Ports {
    /// Answers its model calls.
    pub model: Arc<dyn Model>,
    /// Keeps its items.
    pub journal: Arc<dyn Journal>,
    /// Calls its webhooks.
    pub webhooks: WebhookClient,
    /// Calls its MCP servers.
    pub mcp: McpClient,
}

/// How a run is told to stop.
#[derive(Clone, Debug, Default)]
pub struct Stop {
    /// At once, and nothing more is written: the run was cancelled, or the lease is lost.
    pub abandon: CancellationToken,
    /// After the turn in progress, its tools included.
    pub hand_back: CancellationToken,
}

/// How a worker's part in a run came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A terminal status is stored.
    Ended,
    /// PAUSED_QUOTA is stored.
    Paused,
    /// WAITING_APPROVAL is stored.
    Waiting,
    /// It stands between two turns; the lease is to be released.
    HandedBack,
    /// Another worker has it, or it was cancelled.
    LeaseLost,
    /// The journal could not be reached for too long.
    JournalUnavailable,
}

/// Runs a claimed run as far as it goes.
///
/// Dropping the future abandons the run just as [`Stop::abandon`] does. The lease must be kept alive from elsewhere
/// while a model or a tool takes its time.
#[tracing::instrument(name = "run", skip_all, fields(run = %run_id(claim.lease.run_id)))]
pub async fn run(claim: Claim, ports: &Ports, stop: &Stop) -> Outcome {
    tokio::select! {
        biased;
        () = stop.abandon.cancelled() => Outcome::LeaseLost,
        outcome = take_up(claim, ports, &stop.hand_back) => outcome,
    }
}

/// What a run without a history asks its model first, where that is certain before it begins: no server has its tools
/// listed, and no guardrail looks at the input.
pub fn first_request(spec: &RunSpec) -> Option<ModelRequest> {
    let agents = spec.agents.clone();
    let root = agents.get(&spec.root)?.clone();
    let looks_at_input = root.guardrails.iter().any(|guardrail| guardrail.stage == GuardrailStage::Input);
    if looks_at_input || root.tools.iter().any(|tool| matches!(tool, Tool::Mcp(_))) {
        return None;
    }
    let toolbox = Toolbox::new(&root, &agents, Vec::new()).ok()?;
    let input = InputItem::User { text: spec.input.clone() };
    let state = State::new(agents, spec.root, None, None, vec![input])?;
    Some(request::build(&state, &toolbox))
}

/// What a later run of the conversation is shown of a run that has ended: its input and its turns, each for itself.
pub fn transcript(spec: &RunSpec, items: Vec<Item>) -> Vec<Vec<InputItem>> {
    let own = items.into_iter().map(|item| item.step).filter(|step| step.scope.is_none());
    rebuilt(spec, spec.root, own).map(State::transcript).unwrap_or_default()
}

/// Calls of a run that wait for a decision, nested runs' included: each with its scope and its id, in their order.
pub fn pending_approvals(spec: &RunSpec, items: &[Item]) -> Vec<(Option<String>, String)> {
    let mut scopes: Vec<Option<&str>> = Vec::new();
    for item in items {
        if matches!(item.step.body, Body::Approval { .. }) && !scopes.contains(&item.step.scope.as_deref()) {
            scopes.push(item.step.scope.as_deref());
        }
    }
    let answered: HashSet<(Option<&str>, &str)> = items.iter().filter_map(answered).collect();
    let pending = scopes.into_iter().filter(|scope| is_alive(*scope, &answered)).flat_map(|scope| {
        let own = || items.iter().map(|item| &item.step).filter(|step| step.scope.as_deref() == scope);
        // A nested run begins with the agent whose items come first.
        let first = own().next().map(|step| step.agent_name.as_str()).filter(|_| scope.is_some());
        let named = first.and_then(|name| spec.agents.values().find(|agent| agent.name == name));
        let state = rebuilt(spec, named.map_or(spec.root, |agent| agent.id), own().cloned());
        let pending: Vec<String> = state.iter().flat_map(State::pending).map(str::to_owned).collect();
        pending.into_iter().map(move |call_id| (scope.map(str::to_owned), call_id))
    });
    pending.collect()
}

/// The call that an item answers, with its scope.
fn answered(item: &Item) -> Option<(Option<&str>, &str)> {
    match &item.step.body {
        Body::ToolOutput { call_id, .. } | Body::Handoff { call_id, .. } => {
            Some((item.step.scope.as_deref(), call_id.as_str()))
        }
        _ => None,
    }
}

/// Whether a nested run may go on: every call on the way to it is open. One that a guardrail asks waits for nobody.
fn is_alive(scope: Option<&str>, answered: &HashSet<(Option<&str>, &str)>) -> bool {
    let Some(path) = scope else { return true };
    let mut ends = path.match_indices('/').map(|(at, _)| at).chain([path.len()]);
    ends.try_fold(None, |around: Option<&str>, end| {
        let call = &path[around.map_or(0, |around| around.len() + 1)..end];
        let is_open = !call.starts_with("guardrail:") && !answered.contains(&(around, call));
        is_open.then(|| Some(&path[..end]))
    })
    .is_some()
}

/// Where a scope stands that began with an agent, from its items.
fn rebuilt(spec: &RunSpec, first: Uuid, steps: impl Iterator<Item = Step>) -> Option<State> {
    let mut state = State::new(spec.agents.clone(), first, None, None, Vec::new())?;
    steps.for_each(|step| state.fold(step));
    Some(state)
}

async fn take_up(claim: Claim, ports: &Ports, hand_back: &CancellationToken) -> Outcome {
    let Claim { lease, spec, history, items, time_left_ms, webhook_secrets } = claim;
    let deadline = Instant::now() + Duration::from_millis(time_left_ms);
    let stored = items.into_iter().map(|item| item.step).collect();
    let RunSpec { root, agents, .. } = spec;
    let (world, own) =
        World::new(lease, agents.clone(), ports.clone(), webhook_secrets, hand_back.clone(), deadline, stored);
    let Some(mut state) = State::new(agents, root, None, None, history) else {
        let body = Body::failed(RunErrorCode::Internal, "The run's first agent is not part of it.");
        let step = Step { agent_name: String::new(), turn: None, scope: None, body };
        let end = Addition { from_sequence: world.next_sequence(), steps: vec![step] };
        return world.append(&end).await.map_or_else(Outcome::from, |()| Outcome::Ended);
    };
    own.into_iter().for_each(|step| state.fold(step));
    let mut flow = Flow::new(Arc::new(world), Place::default(), state);
    let halt = match flow.drive().await {
        Ok(End::Output(_) | End::Failed(_)) => return Outcome::Ended,
        Ok(End::Waits) => return Outcome::Waiting,
        Err(halt) => halt,
    };
    let (written, outcome) = match halt {
        Halt::With(outcome) => return outcome,
        Halt::QuotaExhausted => (flow.pause().await, Outcome::Paused),
        Halt::Fails(error) => (flow.cut(error).await, Outcome::Ended),
        Halt::TimeOver => {
            let message = "The run took longer than it may.".to_owned();
            (flow.cut(RunError { code: RunErrorCode::Timeout, message }).await, Outcome::Ended)
        }
    };
    match written {
        Err(Halt::With(outcome)) => outcome,
        _ => outcome,
    }
}

impl From<JournalError> for Outcome {
    fn from(error: JournalError) -> Self {
        match error {
            JournalError::LeaseLost => Outcome::LeaseLost,
            JournalError::Unavailable(_) => Outcome::JournalUnavailable,
        }
    }
}

#[cfg(test)]
mod tests;
