//! An agent's guardrails at work.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use uuid::Uuid;

use super::flow::{End, Flow, Place};
use super::guardrails::{Verdict, judge, read_verdict};
use super::state::State;
use super::world::{Halt, World};
use crate::item::{Body, InputItem, RunError, RunErrorCode, arguments_hash, storable};
use crate::spec::{AgentSpec, Guardrail, GuardrailRule, GuardrailStage};

/// A guardrail that tripped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tripped {
    /// Its name.
    pub name: String,
    /// What it looked at.
    pub stage: GuardrailStage,
    /// Why; never the text that it looked at.
    pub reason: String,
}

impl Tripped {
    /// How a run fails by it.
    pub fn error(&self) -> RunError {
        let Self { name, reason, .. } = self;
        RunError { code: RunErrorCode::Guardrail, message: format!("The guardrail {name:?} tripped: {reason}") }
    }

    /// As an item; with the call that it was about.
    pub fn into_body(self, call_id: Option<String>) -> Body {
        Body::Guardrail { name: self.name, stage: self.stage, reason: storable(self.reason), call_id }
    }
}

/// What guardrails came to: the one that tripped, if any.
pub type Checked = Result<Option<Tripped>, Halt>;

/// Runs an agent's guardrails of a stage side by side; the first one that trips decides, and the others are dropped.
/// `parallel` chooses among those of the input.
pub fn together(
    world: &Arc<World>,
    place: &Place,
    agent: &Arc<AgentSpec>,
    stage: GuardrailStage,
    parallel: Option<bool>,
    text: &str,
) -> BoxFuture<'static, Checked> {
    let chosen = agent
        .guardrails
        .iter()
        .filter(|guardrail| guardrail.stage == stage && parallel.is_none_or(|parallel| guardrail.parallel == parallel));
    let (asking, judging): (Vec<&Guardrail>, Vec<&Guardrail>) =
        chosen.partition(|guardrail| matches!(guardrail.rule, GuardrailRule::Agent { .. }));
    let check = |guardrail: &Guardrail| check(world.clone(), place.clone(), guardrail.clone(), text.to_owned());
    let mut running: FuturesUnordered<BoxFuture<'static, Checked>> = asking.into_iter().map(check).collect();
    // Which of two rules trips is not to be chance: they are judged in order.
    let judging: Vec<_> = judging.into_iter().map(check).collect();
    running.push(first_trip(judging).boxed());
    async move {
        while let Some(checked) = running.next().await {
            if let Some(tripped) = checked? {
                return Ok(Some(tripped));
            }
        }
        Ok(None)
    }
    .boxed()
}

async fn first_trip(checks: Vec<BoxFuture<'static, Checked>>) -> Checked {
    for check in checks {
        if let Some(tripped) = check.await? {
            return Ok(Some(tripped));
        }
    }
    Ok(None)
}

/// Runs one guardrail.
pub fn check(world: Arc<World>, place: Place, guardrail: Guardrail, text: String) -> BoxFuture<'static, Checked> {
    async move {
        let reason = match judge_apart(&guardrail, &text).await {
            Verdict::Passes => None,
            Verdict::Trips { reason } => Some(reason),
            Verdict::Asks { agent_id } => {
                // What was decided about one text says nothing of another.
                let of_text = &arguments_hash(&text)[..16];
                let place = place.of_guardrail(stage_name(guardrail.stage), &guardrail.name, of_text);
                ask(world, place, agent_id, text).await?
            }
        };
        Ok(reason.map(|reason| Tripped { name: guardrail.name, stage: guardrail.stage, reason }))
    }
    .boxed()
}

/// Judges where it keeps no other run waiting: a large pattern takes its time over a long text.
async fn judge_apart(guardrail: &Guardrail, text: &str) -> Verdict {
    let (rule, text) = (guardrail.rule.clone(), text.to_owned());
    let judged = tokio::task::spawn_blocking(move || judge(&rule, &text)).await;
    judged.unwrap_or_else(|_| Verdict::Trips { reason: "its rule could not be applied".to_owned() })
}

/// Why an agent trips; none if it doesn't. One that comes to no verdict trips.
async fn ask(world: Arc<World>, place: Place, agent_id: Uuid, text: String) -> Result<Option<String>, Halt> {
    match nested(&world, place, agent_id, None, text).await? {
        Some(End::Output(verdict)) => match read_verdict(&verdict) {
            Ok(tripped) => Ok(tripped),
            Err(problem) => Ok(Some(format!("Its agent came to no verdict: {problem}"))),
        },
        Some(End::Failed(error)) => Ok(Some(format!("Its agent came to no verdict: {}", error.message))),
        Some(End::Waits) => Ok(Some("Its agent waits for an approval, which no guardrail may.".to_owned())),
        None => Ok(Some("It lies too deep in nested runs, or there are too many.".to_owned())),
    }
}

/// Runs an agent in a run of its own inside this one, from where it stands. None where that lies too deep.
///
/// # Errors
/// The whole run does not go on.
pub async fn nested(
    world: &Arc<World>,
    place: Place,
    agent_id: Uuid,
    max_turns: Option<u32>,
    input: String,
) -> Result<Option<End>, Halt> {
    let scope = place.scope.clone().unwrap_or_default();
    if place.is_too_deep() || !world.may_nest(&scope) {
        return Ok(None);
    }
    let before = vec![InputItem::User { text: input }];
    let state = State::new(world.agents.clone(), agent_id, place.scope.clone(), max_turns, before);
    let Some(mut state) = state else {
        let message = "An agent of the run is not part of it.".to_owned();
        return Err(Halt::Fails(RunError { code: RunErrorCode::Internal, message }));
    };
    for (pauses, step) in world.stored(&scope) {
        state.waited(pauses);
        state.fold(step);
    }
    state.waited(world.pauses);
    let mut flow = Flow::new(world.clone(), place, state);
    // Boxed: a nested run may nest further.
    let driven: BoxFuture<'_, Result<End, Halt>> = flow.drive().boxed();
    driven.await.map(Some)
}

fn stage_name(stage: GuardrailStage) -> &'static str {
    match stage {
        GuardrailStage::Input => "input",
        GuardrailStage::Output => "output",
        GuardrailStage::ToolInput => "tool_input",
        GuardrailStage::ToolOutput => "tool_output",
    }
}
