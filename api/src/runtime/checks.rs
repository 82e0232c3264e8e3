//! What a worker may have written down: the outputs of its tools, a handoff that its agent has, and the run's end.

use std::collections::HashSet;

use cloister_runtime::item::{Body, RunStatus, Step};
use cloister_runtime::protocol::{MAX_ITEM_BYTES, MAX_ITEMS, MAX_WORKER_NAME, RefusalCode, is_worker_name};
use cloister_runtime::spec::RunSpec;
use entity::{TenantOwned, run_items, runs};
use sea_orm::{ColumnTrait, QueryFilter, QueryOrder, QuerySelect};

use super::refused::Refused;
use crate::app::App;
use crate::runs::journal::from_row;

/// Bytes of a nested run's name.
const MAX_SCOPE_BYTES: usize = 4_096;

/// Refuses what no host is named.
pub fn worker(name: Option<&str>) -> Result<(), Refused> {
    match name.is_none_or(is_worker_name) {
        true => Ok(()),
        false => {
            Err(Refused::invalid(format!("A worker's name has {MAX_WORKER_NAME} visible ASCII characters at most.")))
        }
    }
}

/// Refuses what is too much, before anything of it is looked at.
pub fn size(steps: &[Step]) -> Result<(), Refused> {
    if steps.is_empty() {
        return Err(Refused::invalid("An append needs an item."));
    }
    let is_too_large = |step: &Step| texts(step).map(str::len).sum::<usize>() + parts_bytes(step) > MAX_ITEM_BYTES;
    if steps.len() > MAX_ITEMS || steps.iter().any(is_too_large) {
        let message = format!("An append may have {MAX_ITEMS} items, an item {MAX_ITEM_BYTES} bytes of text.");
        return Err(Refused::new(RefusalCode::TooLarge, message));
    }
    // PostgreSQL can't store it.
    if steps.iter().flat_map(texts).any(|text| text.contains('\0')) {
        return Err(Refused::invalid("An item must not contain the NUL character."));
    }
    Ok(())
}

/// Bytes of what a model is shown in place of an output's text.
fn parts_bytes(step: &Step) -> usize {
    match &step.body {
        Body::ToolOutput { parts, .. } => parts.iter().map(|part| part.to_string().len()).sum(),
        _ => 0,
    }
}

fn texts(step: &Step) -> impl Iterator<Item = &str> {
    let [a, b] = match &step.body {
        Body::ToolOutput { call_id, output, .. } => [Some(call_id), Some(output)],
        Body::Handoff { call_id, output, .. } => [Some(call_id), Some(output)],
        Body::Status { error, output, .. } => [error.as_ref().map(|error| &error.message), output.as_ref()],
        Body::Message { text, .. } | Body::Reasoning { text, .. } => [Some(text), None],
        Body::ToolCall { name, arguments, .. } => [Some(name), Some(arguments)],
        Body::Usage { model, .. } => [Some(model), None],
        Body::Approval { call_id, message, .. } => [Some(call_id), message.as_ref()],
        Body::Guardrail { name, reason, .. } => [Some(name), Some(reason)],
    };
    [Some(&step.agent_name), a, b].into_iter().flatten().map(String::as_str)
}

/// Refuses items that a worker's run can't have come to.
pub async fn steps(app: &App, run: &runs::Model, spec: &RunSpec, steps: &[Step]) -> Result<(), Refused> {
    let answers =
        |step: &Step| matches!(step.body, Body::ToolOutput { .. } | Body::Handoff { .. } | Body::Approval { .. });
    let asks = steps.iter().any(|step| matches!(step.body, Body::Approval { approved: None, .. }));
    let mut open = if steps.iter().any(answers) { open_calls(app, run).await? } else { HashSet::new() };
    for (at, step) in steps.iter().enumerate() {
        let is_last = at + 1 == steps.len();
        if !spec.agents.values().any(|agent| agent.name == step.agent_name) {
            return Err(Refused::invalid("An item's agent is none of the run's."));
        }
        if step.scope.as_ref().is_some_and(|scope| !is_scope(spec, scope)) {
            return Err(Refused::invalid("The run has no such nested run."));
        }
        match &step.body {
            Body::ToolOutput { call_id, .. } => answer(run, step, &mut open, call_id)?,
            Body::Handoff { call_id, to_agent_id, to_agent_name, .. } => {
                answer(run, step, &mut open, call_id)?;
                let mut agents = spec.agents.values();
                let offered = agents.any(|agent| {
                    agent.name == step.agent_name
                        && (step.scope.is_some() || agent.id == run.current_agent_id)
                        && agent.handoffs.iter().any(|to| to.agent_id == *to_agent_id)
                });
                let to = spec.agents.get(to_agent_id).filter(|to| offered && to.name == *to_agent_name);
                if to.is_none() || !is_last {
                    return Err(Refused::invalid("The agent has no such handoff."));
                }
            }
            Body::Status { status: RunStatus::WaitingApproval, .. } if !asks && !has_asked(app, run).await? => {
                return Err(Refused::invalid("The run has no call that waits for approval."));
            }
            Body::Status { .. } if is_last && step.turn.is_none() && step.scope.is_none() => status(&step.body)?,
            Body::Status { .. } => return Err(Refused::invalid("A change of state comes last, outside a turn.")),
            Body::Approval { call_id, approved: None, .. } => {
                if !open.contains(&(step.scope.clone(), call_id.clone())) {
                    return Err(Refused::invalid("An approval is asked for no open call."));
                }
            }
            Body::Approval { .. } => return Err(Refused::invalid("A worker decides about no call.")),
            Body::Guardrail { name, stage, .. } => {
                let mut guardrails = spec.agents.values().flat_map(|agent| &agent.guardrails);
                if !guardrails.any(|guardrail| guardrail.name == *name && guardrail.stage == *stage) {
                    return Err(Refused::invalid("The run has no such guardrail."));
                }
            }
            Body::Message { .. } | Body::Reasoning { .. } | Body::ToolCall { .. } | Body::Usage { .. } => {
                return Err(Refused::invalid("What a model answered is stored with its charge, and not by workers."));
            }
        }
    }
    Ok(())
}

/// An output answers an open call of the turn whose response is stored, once.
fn answer(run: &runs::Model, step: &Step, open: &mut OpenCalls, call_id: &str) -> Result<(), Refused> {
    if step.scope.is_none() && step.turn.and_then(|turn| i32::try_from(turn).ok()) != Some(run.turns) {
        return Err(Refused::invalid(format!("The run's calls are of turn {}.", run.turns)));
    }
    if !open.remove(&(step.scope.clone(), call_id.to_owned())) {
        return Err(Refused::invalid("An output answers no open call."));
    }
    Ok(())
}

/// Whether the run has asked for an approval.
async fn has_asked(app: &App, run: &runs::Model) -> Result<bool, Refused> {
    let asked = run_items::Entity::in_tenant(run.tenant_id)
        .filter(run_items::Column::RunId.eq(run.id))
        .filter(run_items::Column::RunCreatedAt.eq(run.created_at))
        .filter(run_items::Column::Kind.eq("approval"))
        .limit(1)
        .one(app.db.read())
        .await?;
    Ok(asked.is_some())
}

/// The states into which a worker moves its run.
fn status(body: &Body) -> Result<(), Refused> {
    let Body::Status { status, error, output, output_json } = body else { return Ok(()) };
    if output_json.is_some() && *status != RunStatus::Succeeded {
        return Err(Refused::invalid("Only a run that succeeds has an output."));
    }
    let fits = match status {
        RunStatus::Succeeded => error.is_none() && output.is_some(),
        RunStatus::Failed => error.is_some() && output.is_none(),
        RunStatus::PausedQuota | RunStatus::WaitingApproval => error.is_none() && output.is_none(),
        RunStatus::Queued | RunStatus::Running | RunStatus::Cancelled => false,
    };
    if fits { Ok(()) } else { Err(Refused::invalid("This change of state is not a worker's to make.")) }
}

/// Whether a run can have a nested run of this name.
pub fn is_scope(spec: &RunSpec, scope: &str) -> bool {
    spec.has_other_authors() && (1..=MAX_SCOPE_BYTES).contains(&scope.len()) && !scope.contains('\0')
}

/// Calls by the nested run that they belong to and their id.
type OpenCalls = HashSet<(Option<String>, String)>;

/// The calls of the run that have no output.
async fn open_calls(app: &App, run: &runs::Model) -> Result<OpenCalls, Refused> {
    let rows = run_items::Entity::in_tenant(run.tenant_id)
        .filter(run_items::Column::RunId.eq(run.id))
        .filter(run_items::Column::RunCreatedAt.eq(run.created_at))
        .filter(run_items::Column::Kind.is_in(["tool_call", "tool_output", "handoff"]))
        .order_by_asc(run_items::Column::Sequence)
        .all(app.db.read())
        .await?;
    let mut open = HashSet::new();
    for row in rows {
        let Step { scope, body, .. } = from_row(row)?.step;
        match body {
            Body::ToolCall { is_hosted: true, .. } => {}
            Body::ToolCall { call_id, .. } => drop(open.insert((scope, call_id))),
            Body::ToolOutput { call_id, .. } | Body::Handoff { call_id, .. } => drop(open.remove(&(scope, call_id))),
            _ => {}
        }
    }
    Ok(open)
}
