//! Calls that wait until somebody has agreed to them.

use std::collections::HashSet;

use chrono::{DateTime, TimeDelta, Utc};
use cloister_runtime::ids::run_id;
use cloister_runtime::item::{Body, Item, RunErrorCode, Step};
use cloister_runtime::run::pending_approvals;
use cloister_runtime::spec::RunSpec;
use entity::runs::Status;
use entity::{TenantOwned, runs};
use sea_orm::{ColumnTrait, QueryFilter, QueryOrder, QuerySelect};
use serde::Deserialize;
use uuid::Uuid;

use super::journal::{self, items_in};
use super::{go_on, locked, open_calls};
use crate::app::App;
use crate::error::{Error, Outcome, Refusal, UserError, UserErrorCode};
use crate::input::Checks;

/// The longest message that a rejection may have, in characters.
const MAX_MESSAGE: usize = 10_000;
/// Runs that one look for expired ones takes.
const BATCH: u64 = 100;

/// What somebody decides about a call.
pub struct Decision {
    /// The call.
    pub call_id: String,
    /// Whether it may be made.
    pub approve: bool,
    /// Of the arguments that were seen.
    pub arguments_hash: String,
    /// Told to the model in place of the tool's output when rejecting.
    pub message: Option<String>,
    /// Whether all later calls of this tool by this agent are decided alike.
    pub always: bool,
}

/// Decides about a call of a run. A run that waits goes on; one that is at work already takes it up when it comes to
/// wait.
pub async fn decide(app: &App, tenant_id: Uuid, id: Uuid, decision: Decision) -> Outcome<runs::Model> {
    check(&decision)?;
    let tx = app.db.begin().await?;
    let run = locked(&tx, tenant_id, id).await?;
    let items = items_in(&tx, &run).await?;
    let call = pending_call(&run, &items, &decision)?.clone();
    let Decision { call_id, approve, message, always, .. } = decision;
    let body = Body::Approval { call_id, approved: Some(approve), always, message };
    let steps = vec![Step { body, ..call }];
    if run.status == Status::WaitingApproval {
        return go_on(app, tx, run, steps).await;
    }
    let appended = journal::write(app, &tx, run, steps, app.clock.now()).await?;
    tx.commit().await?;
    let run = appended.run.clone();
    journal::publish(app, appended);
    Ok(run)
}

fn check(decision: &Decision) -> Outcome<()> {
    let mut checks = Checks::default();
    if let Some(message) = &decision.message {
        checks.text("message", message, 0, MAX_MESSAGE);
        if message.is_empty() {
            checks.push(UserError::invalid("message", "A message has a character at least. Leave it out for ours."));
        }
        if decision.approve {
            checks.push(UserError::invalid("message", "A message is told to the model in place of the output of a call that was rejected. Leave it out, or reject."));
        }
    }
    checks.finish()
}

/// The call that a decision is about.
fn pending_call<'a>(run: &runs::Model, items: &'a [Item], decision: &Decision) -> Outcome<&'a Step> {
    let state = |message: &str| Refusal::from(UserError::new(UserErrorCode::State, "callId", message));
    if Status::TERMINAL.contains(&run.status) {
        return Err(UserError::new(UserErrorCode::State, "runId", "This run has ended already.").into());
    }
    let spec = RunSpec::deserialize(&run.spec).map_err(Error::from)?;
    let pending = pending_approvals(&spec, items);
    let calls = items.iter().filter_map(|item| match &item.step.body {
        Body::ToolCall { call_id, arguments_hash, .. } if *call_id == decision.call_id => {
            Some((&item.step, arguments_hash))
        }
        _ => None,
    });
    let calls: Vec<(&Step, &String)> = calls.collect();
    if calls.is_empty() {
        return Err(UserError::not_found("callId", "call of this run").into());
    }
    let is_pending = |step: &Step| pending.iter().any(|(scope, id)| *scope == step.scope && *id == decision.call_id);
    let waiting: Vec<(&Step, &String)> = calls.into_iter().filter(|(step, _)| is_pending(step)).collect();
    if waiting.is_empty() {
        return Err(state("This call does not wait for a decision: it was decided already, or needs none."));
    }
    // Nested runs may have calls of one id; the hash tells them apart as far as it matters.
    let seen = waiting.into_iter().find(|(_, hash)| **hash == decision.arguments_hash);
    seen.map(|(step, _)| step).ok_or_else(|| {
        let message = "The call's arguments are others than those that were seen. Read argumentsHash again.";
        UserError::new(UserErrorCode::Conflict, "argumentsHash", message).into()
    })
}

/// The calls of a run that wait for a decision, in their order.
pub fn pending(run: &runs::Model, items: Vec<Item>) -> Result<Vec<Item>, Error> {
    if Status::TERMINAL.contains(&run.status) {
        return Ok(Vec::new());
    }
    let spec = RunSpec::deserialize(&run.spec)?;
    let pending: HashSet<(Option<String>, String)> = pending_approvals(&spec, &items).into_iter().collect();
    let is_pending = |item: &Item| match &item.step.body {
        Body::ToolCall { call_id, .. } => pending.contains(&(item.step.scope.clone(), call_id.clone())),
        _ => false,
    };
    Ok(items.into_iter().filter(is_pending).collect())
}

/// When a run that comes to wait now fails unless somebody decides.
pub fn expiry(app: &App, now: DateTime<Utc>) -> DateTime<Utc> {
    now + TimeDelta::seconds(i64::from(app.config.runs.approval_timeout_seconds))
}

/// Fails runs that nobody has decided about for too long.
pub async fn expire(app: &App) -> Result<(), Error> {
    let expired: Vec<(Uuid, Uuid)> = runs::Entity::across_tenants()
        .filter(runs::Column::WaitsUntil.lt(app.clock.now()))
        .filter(runs::Column::Status.eq(Status::WaitingApproval))
        .order_by_asc(runs::Column::WaitsUntil)
        .limit(BATCH)
        .select_only()
        .columns([runs::Column::TenantId, runs::Column::Id])
        .into_tuple()
        .all(app.db.read())
        .await?;
    for (tenant_id, id) in expired {
        match expire_one(app, tenant_id, id).await {
            // Somebody decided in the meantime, or it is gone.
            Ok(()) | Err(Refusal::User(_)) => {}
            // It keeps no other one waiting.
            Err(Refusal::Error(error)) => {
                tracing::error!(run_id = %run_id(id), inside = ?error, "a run did not expire")
            }
        }
    }
    Ok(())
}

async fn expire_one(app: &App, tenant_id: Uuid, id: Uuid) -> Outcome<()> {
    let tx = app.db.begin().await?;
    let run = locked(&tx, tenant_id, id).await?;
    let now = app.clock.now();
    if run.status != Status::WaitingApproval || run.waits_until.is_none_or(|until| until >= now) {
        return Ok(());
    }
    let items = items_in(&tx, &run).await?;
    let mut steps = open_calls(&items, "Nobody decided about this call in time.");
    let agent_name = super::run_agent_name(&run);
    let body = Body::failed(RunErrorCode::Timeout, "Nobody decided in time about a call that needs approval.");
    steps.push(Step { agent_name, turn: None, scope: None, body });
    let appended = journal::write(app, &tx, run, steps, now).await?;
    tx.commit().await?;
    journal::publish(app, appended);
    Ok(())
}
