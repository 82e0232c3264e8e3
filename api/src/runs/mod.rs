//! Runs: started, cancelled, resumed; queued, executed, journaled, watched.

pub mod approvals;
pub mod claimed;
pub mod events;
pub mod graphql;
pub mod items_graphql;
pub mod journal;
pub mod live;
pub mod paused;
pub mod pool;
pub mod queue;
pub mod record;
pub mod rest;
pub mod start;
pub mod status;
pub mod turn;
pub mod wakes;

use async_graphql::Enum;
use cloister_runtime::item::{Body, Item, RunStatus, Step};
use cloister_runtime::spec::{Agents, RunSpec};
use entity::runs::Status;
use entity::{TenantOwned, runs};
use sea_orm::ActiveValue::Set;
use sea_orm::{ActiveModelTrait, ColumnTrait, DatabaseTransaction, QueryFilter, QuerySelect};
use serde::Deserialize;
use serde_json::Value;
use std::collections::HashSet;
use std::sync::Arc;
use uuid::Uuid;

use crate::agents::graph;
use crate::agents::variables::Variables;
use crate::app::App;
use crate::error::{Error, Outcome, Refusal, UserError, UserErrorCode};
use crate::input::Checks;
use crate::secrets::sha256_hex;
use crate::tenants::changes::Change;
use crate::usage::quota;
use crate::viewer::TenantViewer;

/// The longest input, in characters.
const MAX_INPUT: usize = 200_000;
/// The highest limit on the items of a conversation that a run is shown.
const MAX_HISTORY: i32 = 100_000;

/// What a run is started with.
#[derive(Default)]
pub struct NewRun {
    /// The agent that answers first.
    pub agent_id: Uuid,
    /// The user's text.
    pub input: String,
    /// The conversation it goes on from.
    pub conversation_id: Option<Uuid>,
    /// Begin a conversation with this run.
    pub new_conversation: bool,
    /// The most items of the conversation that it is shown, in whole turns.
    pub history_limit: Option<i32>,
    /// Values for the variables in the instructions, as they came in.
    pub variables: Option<Value>,
    /// A published version in place of the newest.
    pub version: Option<i32>,
    /// Run the draft.
    pub draft: bool,
    /// The most tokens the run may use.
    pub max_tokens: Option<i64>,
    /// Seconds it may take.
    pub timeout_seconds: Option<i32>,
    /// What happens while the conversation has an unfinished run.
    pub on_busy: OnBusy,
    /// Against starting twice.
    pub idempotency_key: Option<String>,
}

/// What happens to a new run while its conversation has an unfinished one; paused and waiting ones count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Enum)]
pub enum OnBusy {
    /// This run waits for it.
    #[default]
    Enqueue,
    /// This run is refused with CONFLICT.
    Reject,
    /// The unfinished run is cancelled, and so are those that wait for it.
    Interrupt,
}

impl NewRun {
    /// Tells inputs apart that come with the same idempotency key.
    fn fingerprint(&self, variables: &Variables) -> String {
        let mut input = format!(
            "{:?}",
            (
                self.agent_id,
                &self.input,
                self.conversation_id,
                self.new_conversation,
                self.version,
                self.draft,
                self.max_tokens,
                self.timeout_seconds,
                self.on_busy
            )
        );
        // Only where they are given: keys are still in use from when there were none.
        if !variables.is_empty() {
            input += &format!("{variables:?}");
        }
        if let Some(limit) = self.history_limit {
            input += &format!("history {limit}");
        }
        sha256_hex(&input)
    }
}

/// What keeps a start from being done twice.
pub struct Idempotency<'a> {
    /// The client's key.
    pub key: &'a str,
    /// Tells apart the inputs that come with it.
    pub fingerprint: String,
}

/// Starts a run: all that it needs is frozen, and it is claimed at once or waits to be. Returns it without its spec, and
/// the agents that it may reach.
pub async fn start(app: &App, viewer: &TenantViewer, new: NewRun) -> Outcome<(runs::Model, Arc<Agents>)> {
    let variables = check(app, &new)?;
    let tenant_id = viewer.tenant_id();
    let key = new.idempotency_key.as_deref();
    let idempotency = key.map(|key| Idempotency { key, fingerprint: new.fingerprint(&variables) });
    let idempotency = idempotency.as_ref();
    if let Some(repeated) = repeated(app, tenant_id, idempotency).await? {
        return Ok(repeated);
    }
    let frozen = graph::freeze(app, tenant_id, new.agent_id, new.version, new.draft).await?.filled(&variables)?;
    let agents = frozen.agents.clone();
    let started = match (new.conversation_id, new.new_conversation) {
        (Some(id), _) => start::in_conversation(app, viewer, &new, frozen, idempotency, id).await,
        (None, begins) => start::alone(app, viewer, &new, frozen, idempotency, begins).await,
    };
    match started {
        // Another request with the same key was faster.
        Err(Refusal::Error(Error::Conflict)) => repeated(app, tenant_id, idempotency)
            .await?
            .ok_or_else(|| Error::internal("an idempotency key conflicts with no run").into()),
        started => Ok((started?, agents)),
    }
}

/// Checks what a run is started with; the values of its variables.
fn check(app: &App, new: &NewRun) -> Outcome<Variables> {
    let mut checks = Checks::default();
    checks.text("input", &new.input, 1, MAX_INPUT);
    if new.conversation_id.is_some() && new.new_conversation {
        checks.push(UserError::invalid("newConversation", "Give conversationId or newConversation, not both."));
    }
    if new.version.is_some() && new.draft {
        checks.push(UserError::invalid("draft", "Give version or draft, not both."));
    }
    if let Some(version) = new.version {
        checks.range("version", version, 1, i32::MAX);
    }
    if let Some(max_tokens) = new.max_tokens {
        checks.range("maxTokens", max_tokens, 1, crate::input::MAX_TOKEN_LIMIT);
    }
    if let Some(seconds) = new.timeout_seconds {
        let longest = i32::try_from(app.config.runs.max_timeout_seconds).unwrap_or(i32::MAX);
        checks.range("timeoutSeconds", seconds, 1, longest);
    }
    if let Some(key) = &new.idempotency_key {
        checks.text("idempotencyKey", key, 1, 255);
    }
    if let Some(limit) = new.history_limit {
        checks.range("historyLimit", limit, 0, MAX_HISTORY);
    }
    let variables = Variables::read(new.variables.as_ref(), &mut checks);
    checks.finish()?;
    Ok(variables)
}

/// The run that was started with this idempotency key before, and its agents.
async fn repeated(
    app: &App,
    tenant_id: Uuid,
    idempotency: Option<&Idempotency<'_>>,
) -> Outcome<Option<(runs::Model, Arc<Agents>)>> {
    let Some(Idempotency { key, fingerprint }) = idempotency else { return Ok(None) };
    let run =
        runs::Entity::in_tenant(tenant_id).filter(runs::Column::IdempotencyKey.eq(*key)).one(app.db.read()).await?;
    let Some(run) = run else { return Ok(None) };
    if run.idempotency_hash.as_ref() != Some(fingerprint) {
        let message = "This idempotency key was used with other input. Use a new one.";
        return Err(UserError::new(UserErrorCode::IdempotencyMismatch, "idempotencyKey", message).into());
    }
    let spec = RunSpec::deserialize(&run.spec).map_err(Error::from)?;
    Ok(Some((run, spec.agents)))
}

/// Ends a run as CANCELLED: its state, its fence, and an output for every open call, in one
/// transaction. A run that has ended stays as it is.
pub async fn cancel(app: &App, tenant_id: Uuid, id: Uuid) -> Outcome<runs::Model> {
    let tx = app.db.begin().await?;
    let run = locked(&tx, tenant_id, id).await?;
    if Status::TERMINAL.contains(&run.status) {
        let message = "This run has ended already.";
        return Err(UserError::new(UserErrorCode::State, "runId", message).into());
    }
    let appended = cancel_in(app, &tx, run).await?;
    tx.commit().await?;
    let run = appended.run.clone();
    app.pool.abandon(id, run.fence);
    journal::publish(app, appended);
    Ok(run)
}

/// Cancels all of a tenant's runs.
pub async fn cancel_all(app: &App, tenant_id: Uuid) -> Outcome<()> {
    loop {
        let unfinished: Vec<Uuid> = runs::Entity::in_tenant(tenant_id)
            .filter(runs::Column::Status.is_in(Status::UNFINISHED))
            .select_only()
            .column(runs::Column::Id)
            .limit(500)
            .into_tuple()
            .all(app.db.read())
            .await?;
        if unfinished.is_empty() {
            return Ok(());
        }
        for id in unfinished {
            match cancel(app, tenant_id, id).await {
                // It ended by itself in the meantime.
                Ok(_) | Err(Refusal::User(_)) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

async fn cancel_in(app: &App, tx: &DatabaseTransaction, mut run: runs::Model) -> Outcome<journal::Appended> {
    let items = journal::items_in(tx, &run).await?;
    let agent_name = items.last().map(|item| item.step.agent_name.clone()).unwrap_or_default();
    let mut steps = open_calls(&items, "The run was cancelled.");
    steps.push(Step { agent_name, turn: None, scope: None, body: Body::status(RunStatus::Cancelled) });
    run.fence = raise_fence(tx, &run).await?;
    Ok(journal::write(app, tx, run, steps, app.clock.now()).await?)
}

/// An output for every call that has none, so that the history has no orphan.
fn open_calls(items: &[Item], output: &str) -> Vec<Step> {
    let answered: HashSet<(Option<&str>, &str)> = items
        .iter()
        .filter_map(|item| match &item.step.body {
            Body::ToolOutput { call_id, .. } | Body::Handoff { call_id, .. } => {
                Some((item.step.scope.as_deref(), call_id.as_str()))
            }
            _ => None,
        })
        .collect();
    let open = items.iter().filter_map(|item| match &item.step.body {
        Body::ToolCall { call_id, is_hosted: false, .. }
            if !answered.contains(&(item.step.scope.as_deref(), call_id.as_str())) =>
        {
            Some(Step { body: Body::output(call_id, output, true), ..item.step.clone() })
        }
        _ => None,
    });
    open.collect()
}

async fn raise_fence(tx: &DatabaseTransaction, run: &runs::Model) -> Result<i64, Error> {
    let row = runs::ActiveModel { id: Set(run.id), fence: Set(run.fence + 1), ..Default::default() };
    Ok(row.update(tx).await?.fence)
}

/// Lets a run go on that is PAUSED_QUOTA.
pub async fn resume(app: &App, tenant_id: Uuid, id: Uuid) -> Outcome<runs::Model> {
    let run = runs::Entity::in_tenant(tenant_id).filter(runs::Column::Id.eq(id)).one(app.db.read()).await?;
    let run = run.ok_or_else(|| UserError::not_found("runId", "run"))?;
    let unused = quota::unused(app, tenant_id, run.api_key_id).await?;
    let tx = app.db.begin().await?;
    let run = locked(&tx, tenant_id, id).await?;
    if run.status != Status::PausedQuota {
        let message = "Only a run that is PAUSED_QUOTA can be resumed.";
        return Err(UserError::new(UserErrorCode::State, "runId", message).into());
    }
    if unused < quota::LEAST_OUTPUT {
        let message = "Too little is left of this month's tokens. Raise the limit, or wait for the new month.";
        return Err(UserError::new(UserErrorCode::QuotaExceeded, "", message).into());
    }
    go_on(app, tx, run, Vec::new()).await
}

/// Queues a run that stood still, after these steps, and commits.
async fn go_on(app: &App, tx: DatabaseTransaction, run: runs::Model, mut steps: Vec<Step>) -> Outcome<runs::Model> {
    let agent_name = run_agent_name(&run);
    steps.push(Step { agent_name, turn: None, scope: None, body: Body::status(RunStatus::Queued) });
    let mut appended = journal::write(app, &tx, run, steps, app.clock.now()).await?;
    appended.run = queue::enqueue(app, &tx, appended.run).await?;
    let run = appended.run.clone();
    app.pool.commit_queued(app, tx, std::slice::from_ref(&run), |_| true).await?;
    app.live.items(run.id, appended.items, false);
    Ok(run)
}

/// An agent's name by a run's spec; none without the spec.
fn agent_name(run: &runs::Model, agent_id: Uuid) -> Option<&str> {
    run.spec["agents"][agent_id.to_string()]["name"].as_str()
}

fn run_agent_name(run: &runs::Model) -> String {
    agent_name(run, run.current_agent_id).unwrap_or_default().to_owned()
}

/// A tenant's run, its row locked. A run's row is locked before its queue's, everywhere.
async fn locked(tx: &DatabaseTransaction, tenant_id: Uuid, id: Uuid) -> Outcome<runs::Model> {
    journal::lock_conversations(tx, vec![id]).await?;
    let run = runs::Entity::in_tenant(tenant_id).filter(runs::Column::Id.eq(id)).lock_exclusive().one(tx).await?;
    run.ok_or_else(|| UserError::not_found("runId", "run").into())
}

/// Tells a tenant's subscribers that runs have moved; a run that was taken from its worker is
/// dropped there.
pub fn announce(app: &App, moved: &[runs::Model]) {
    for run in moved {
        if run.status != Status::Running {
            app.pool.abandon(run.id, run.fence);
            app.wakes.wake(&run.pool);
        }
        app.changes.publish(run.tenant_id, Change::Run(Arc::new(run.clone())));
    }
}
