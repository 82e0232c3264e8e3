//! Runs: started, cancelled, resumed; queued, executed, journaled, watched.

pub mod events;
pub mod graphql;
pub mod items_graphql;
pub mod journal;
pub mod live;
pub mod pool;
pub mod queue;
pub mod rest;
pub mod status;
pub mod wakes;

use cloister_runtime::item::{Body, Role, RunStatus, Step};
use cloister_runtime::spec::RunSpec;
use entity::runs::Status;
use entity::{TenantOwned, conversations, runs, tenants};
use sea_orm::ActiveValue::Set;
use sea_orm::{ActiveModelTrait, ColumnTrait, DatabaseTransaction, PaginatorTrait, QueryFilter, QuerySelect, SqlErr};
use std::sync::Arc;
use uuid::Uuid;

use crate::agents::graph;
use crate::app::App;
use crate::error::{Error, Outcome, Refusal, UserError, UserErrorCode};
use crate::input::Checks;
use crate::secrets::sha256_hex;
use crate::tenants::changes::Change;
use crate::usage::quota;
use crate::viewer::TenantViewer;

/// The longest input, in characters.
const MAX_INPUT: usize = 200_000;

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
    /// A published version in place of the newest.
    pub version: Option<i32>,
    /// Run the draft.
    pub draft: bool,
    /// The most tokens the run may use.
    pub max_tokens: Option<i64>,
    /// Seconds it may take.
    pub timeout_seconds: Option<i32>,
    /// Against starting twice.
    pub idempotency_key: Option<String>,
}

impl NewRun {
    /// Tells inputs apart that come with the same idempotency key.
    fn fingerprint(&self) -> String {
        sha256_hex(&format!(
            "{:?}",
            (
                self.agent_id,
                &self.input,
                self.conversation_id,
                self.new_conversation,
                self.version,
                self.draft,
                self.max_tokens,
                self.timeout_seconds
            )
        ))
    }
}

/// Starts a run: all that it needs is frozen, and it waits to be claimed.
pub async fn start(app: &App, viewer: &TenantViewer, new: NewRun) -> Outcome<runs::Model> {
    check(app, &new)?;
    let tenant_id = viewer.tenant_id();
    let fingerprint = new.fingerprint();
    if let Some(run) = repeated(app, tenant_id, new.idempotency_key.as_deref(), &fingerprint).await? {
        return Ok(run);
    }
    let frozen = graph::freeze(app, tenant_id, new.agent_id, new.version, new.draft).await?;
    if quota::unused(app, tenant_id, Some(viewer.key.id)).await? <= 0 {
        let message = "Nothing is left of this month's tokens. Raise the limit, or wait for the new month.";
        return Err(UserError::new(UserErrorCode::QuotaExceeded, "", message).into());
    }
    let key = new.idempotency_key.clone();
    match insert(app, viewer, new, frozen, &fingerprint).await {
        // Another request with the same key was faster.
        Err(Refusal::Error(Error::Conflict)) => repeated(app, tenant_id, key.as_deref(), &fingerprint)
            .await?
            .ok_or_else(|| Error::internal("an idempotency key conflicts with no run").into()),
        other => other,
    }
}

fn check(app: &App, new: &NewRun) -> Outcome<()> {
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
    checks.finish()
}

/// The run that was started with this idempotency key before.
async fn repeated(app: &App, tenant_id: Uuid, key: Option<&str>, fingerprint: &str) -> Outcome<Option<runs::Model>> {
    let Some(key) = key else { return Ok(None) };
    let run =
        runs::Entity::in_tenant(tenant_id).filter(runs::Column::IdempotencyKey.eq(key)).one(app.db.read()).await?;
    match run {
        Some(run) if run.idempotency_hash.as_deref() != Some(fingerprint) => {
            let message = "This idempotency key was used with other input. Use a new one.";
            Err(UserError::new(UserErrorCode::IdempotencyMismatch, "idempotencyKey", message).into())
        }
        run => Ok(run),
    }
}

async fn insert(
    app: &App,
    viewer: &TenantViewer,
    new: NewRun,
    frozen: graph::Frozen,
    fingerprint: &str,
) -> Outcome<runs::Model> {
    let tenant_id = viewer.tenant_id();
    let tx = app.db.begin().await?;
    // Locked before all else, and looked at again: it may have been suspended since the key was checked.
    let tenant = tenants::Entity::in_tenant(tenant_id).lock_shared().one(&tx).await?;
    if tenant.is_none_or(|tenant| tenant.status != tenants::Status::Active) {
        return Err(Error::Suspended.into());
    }
    let (conversation_id, waits) = conversation(app, &tx, tenant_id, &new).await?;
    // Made while the conversation is locked: its runs are ordered by their ids.
    let id = Uuid::now_v7();
    let now = app.clock.now();
    let agent_name = frozen.root_name().to_owned();
    let spec = RunSpec { run_id: id, root: new.agent_id, agents: frozen.agents, input: new.input.clone() };
    let row = runs::ActiveModel {
        id: Set(id),
        tenant_id: Set(tenant_id),
        api_key_id: Set(Some(viewer.key.id)),
        agent_id: Set(new.agent_id),
        agent_version_id: Set(frozen.version_id),
        current_agent_id: Set(new.agent_id),
        conversation_id: Set(conversation_id),
        status: Set(Status::Queued),
        input: Set(new.input.clone()),
        output: Set(None),
        error_code: Set(None),
        error_message: Set(None),
        turns: Set(0),
        max_tokens: Set(new.max_tokens),
        timeout_seconds: Set(new.timeout_seconds.unwrap_or(app.config.runs.timeout_seconds.cast_signed())),
        spec: Set(serde_json::to_value(&spec).map_err(Error::from)?),
        idempotency_hash: Set(new.idempotency_key.is_some().then(|| fingerprint.to_owned())),
        idempotency_key: Set(new.idempotency_key),
        pool: Set(queue::pool_of(&viewer.tenant).into_owned()),
        vtime: Set(None),
        fence: Set(0),
        lease_until: Set(None),
        claimed_at: Set(None),
        held_ms: Set(0),
        next_sequence: Set(1),
        created_at: Set(now),
        started_at: Set(None),
        finished_at: Set(None),
    };
    let run = row.insert(&tx).await.map_err(|error| match error.sql_err() {
        Some(SqlErr::UniqueConstraintViolation(_)) => Error::Conflict,
        _ => error.into(),
    })?;
    // An input that is stored with its run is what a later run of the conversation goes on from.
    let input = Body::Message { index: None, role: Role::User, text: new.input };
    let step = Step { agent_name, turn: None, body: input };
    let mut run = journal::write(app, &tx, run, vec![step], now, None).await?.run;
    if !waits {
        run = queue::enqueue(app, &tx, run).await?;
    }
    app.pool.commit_queued(app, tx, &run).await?;
    Ok(run)
}

/// The conversation of a new run, and whether an unfinished run of it goes first.
async fn conversation(
    app: &App,
    tx: &DatabaseTransaction,
    tenant_id: Uuid,
    new: &NewRun,
) -> Outcome<(Option<Uuid>, bool)> {
    let now = app.clock.now();
    if new.new_conversation {
        let id = Uuid::now_v7();
        let row = conversations::ActiveModel {
            id: Set(id),
            tenant_id: Set(tenant_id),
            created_at: Set(now),
            updated_at: Set(now),
            deleted_at: Set(None),
        };
        row.insert(tx).await?;
        return Ok((Some(id), false));
    }
    let Some(id) = new.conversation_id else {
        return Ok((None, false));
    };
    // Locked, so that of two runs started at once one sees the other.
    let conversation = conversations::Entity::in_tenant(tenant_id)
        .filter(conversations::Column::Id.eq(id))
        .filter(conversations::Column::DeletedAt.is_null())
        .lock_exclusive()
        .one(tx)
        .await?;
    if conversation.is_none() {
        return Err(UserError::not_found("conversationId", "conversation").into());
    }
    let unfinished = runs::Entity::in_tenant(tenant_id)
        .filter(runs::Column::ConversationId.eq(id))
        .filter(runs::Column::Status.is_in(Status::UNFINISHED));
    Ok((Some(id), unfinished.count(tx).await? > 0))
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
    let mut steps: Vec<Step> = Vec::new();
    for item in &items {
        if let Body::ToolCall { call_id, .. } = &item.step.body {
            let output = Body::output(call_id, "The run was cancelled.", true);
            steps.push(Step { agent_name: item.step.agent_name.clone(), turn: item.step.turn, body: output });
        }
    }
    let answered = |id: &str| {
        items.iter().any(|item| match &item.step.body {
            Body::ToolOutput { call_id, .. } | Body::Handoff { call_id, .. } => call_id == id,
            _ => false,
        })
    };
    steps.retain(|step| !matches!(&step.body, Body::ToolOutput { call_id, .. } if answered(call_id)));
    steps.push(Step { agent_name, turn: None, body: Body::status(RunStatus::Cancelled) });
    run.fence = raise_fence(tx, &run).await?;
    Ok(journal::write(app, tx, run, steps, app.clock.now(), None).await?)
}

async fn raise_fence(tx: &DatabaseTransaction, run: &runs::Model) -> Result<i64, Error> {
    let row = runs::ActiveModel { id: Set(run.id), fence: Set(run.fence + 1), ..Default::default() };
    Ok(row.update(tx).await?.fence)
}

/// Lets a run go on that is PAUSED_QUOTA.
pub async fn resume(app: &App, viewer: &TenantViewer, id: Uuid) -> Outcome<runs::Model> {
    let tenant_id = viewer.tenant_id();
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
    let agent_name = run_agent_name(&run)?;
    let step = Step { agent_name, turn: None, body: Body::status(RunStatus::Queued) };
    let mut appended = journal::write(app, &tx, run, vec![step], app.clock.now(), None).await?;
    appended.run = queue::enqueue(app, &tx, appended.run).await?;
    let run = appended.run.clone();
    app.pool.commit_queued(app, tx, &run).await?;
    app.live.items(run.id, appended.items, false);
    Ok(run)
}

fn run_agent_name(run: &runs::Model) -> Result<String, Error> {
    let spec: RunSpec = serde_json::from_value(run.spec.clone())?;
    Ok(spec.agents.get(&run.current_agent_id).map(|agent| agent.name.clone()).unwrap_or_default())
}

/// A tenant's run, its row locked. A run's row is locked before its queue's, everywhere.
async fn locked(tx: &DatabaseTransaction, tenant_id: Uuid, id: Uuid) -> Outcome<runs::Model> {
    let run = || runs::Entity::in_tenant(tenant_id).filter(runs::Column::Id.eq(id));
    journal::lock_conversation(tx, run()).await?;
    let run = run().lock_exclusive().one(tx).await?;
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
