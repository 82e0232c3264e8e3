//! The journal in the database: the one place where a run's items are stored and its state moves.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use cloister_runtime::item::{Body, Item, RunStatus, Step};
use cloister_runtime::journal::{Journal, JournalError, Progress};
use cloister_runtime::spec::Lease;
use entity::runs::Status;
use entity::{TenantOwned, conversations, run_items, runs, tenants};
use sea_orm::ActiveValue::{Set, Unchanged};
use sea_orm::{
    ActiveModelTrait, ColumnTrait, DatabaseTransaction, EntityTrait, IntoActiveModel, QueryFilter, QueryOrder,
    QuerySelect, Select,
};
use uuid::Uuid;

use super::queue;
use super::status::{code_name, stored};
use crate::app::App;
use crate::error::Error;
use crate::tenants::changes::Change;

/// What an append stored, to be told to subscribers once it is committed.
pub struct Appended {
    /// The run as it is now.
    pub run: runs::Model,
    /// The new items.
    pub items: Vec<Item>,
    /// Whether the run's state moved.
    pub moved: bool,
    /// The conversation's next run, if this one's end let it into the queue.
    pub next: Option<runs::Model>,
}

/// Stores `steps` from `from_sequence` on, in the caller's transaction, and renews the lease. None if
/// the lease is lost or the sequence is not the next one (I3).
pub async fn append_in(
    app: &App,
    tx: &DatabaseTransaction,
    lease: Lease,
    from_sequence: i64,
    steps: Vec<Step>,
    now: DateTime<Utc>,
) -> Result<Option<Appended>, Error> {
    if steps.iter().any(|step| matches!(step.body, Body::Status { .. })) {
        lock_conversation(tx, runs::Entity::across_tenants().filter(runs::Column::Id.eq(lease.run_id))).await?;
    }
    let run = runs::Entity::across_tenants()
        .filter(runs::Column::Id.eq(lease.run_id))
        .filter(runs::Column::Fence.eq(lease.fence))
        .filter(runs::Column::Status.eq(Status::Running))
        .filter(runs::Column::NextSequence.eq(from_sequence))
        .lock_exclusive()
        .one(tx)
        .await?;
    let Some(run) = run else {
        return Ok(None);
    };
    let until = queue::lease_from(app, now);
    write(app, tx, run, steps, now, Some(until)).await.map(Some)
}

/// Locks a run's tenant and conversation, before the run: its end locks the conversation's next run, whose cancel or
/// end would otherwise wait for us while we wait for it.
pub async fn lock_conversation(tx: &DatabaseTransaction, run: Select<runs::Entity>) -> Result<(), Error> {
    let ids: Option<(Uuid, Option<Uuid>)> =
        run.select_only().columns([runs::Column::TenantId, runs::Column::ConversationId]).into_tuple().one(tx).await?;
    if let Some((tenant_id, Some(id))) = ids {
        tenants::Entity::in_tenant(tenant_id).lock_shared().one(tx).await?;
        let conversation = conversations::Entity::across_tenants().filter(conversations::Column::Id.eq(id));
        conversation.lock_exclusive().one(tx).await?;
    }
    Ok(())
}

/// Stores items of a run whose row the caller's transaction holds, and does what they mean for the
/// run's row, its queue and its conversation.
pub async fn write(
    app: &App,
    tx: &DatabaseTransaction,
    run: runs::Model,
    steps: Vec<Step>,
    now: DateTime<Utc>,
    lease_until: Option<DateTime<Utc>>,
) -> Result<Appended, Error> {
    let before = run.clone();
    let held_ms = queue::held_ms(&run, now);
    let mut row = run.into_active_model();
    let mut items = Vec::with_capacity(steps.len());
    for (sequence, step) in (before.next_sequence..).zip(steps) {
        apply(&mut row, &step, now);
        items.push(Item { sequence, created_at: now, step });
    }
    row.next_sequence = Set(before.next_sequence + i64::try_from(items.len()).unwrap_or(0));
    // Only a run that a worker goes on with has a lease.
    let goes_on = matches!(&row.status, Set(Status::Running) | Unchanged(Status::Running));
    row.lease_until = Set(lease_until.filter(|_| goes_on));
    if !goes_on {
        row.held_ms = Set(held_ms);
    }
    let run = row.update(tx).await?;
    let rows = items.iter().map(|item| to_row(&before, item)).collect::<Result<Vec<_>, Error>>()?;
    run_items::Entity::insert_many(rows).exec_without_returning(tx).await?;

    let moved = run.status != before.status;
    // Runs are locked before the queue; see there.
    let next = match moved && Status::TERMINAL.contains(&run.status) {
        true => next_of_conversation(tx, &run, now).await?,
        false => None,
    };
    if moved && before.status == Status::Running {
        queue::vacate(tx, run.tenant_id, &run.pool).await?;
    } else if moved && before.status == Status::Queued {
        queue::refresh_head(tx, run.tenant_id, &run.pool).await?;
    }
    let next = match next {
        Some(next) => Some(queue::enqueue(app, tx, next).await?),
        None => None,
    };
    Ok(Appended { run, items, moved, next })
}

/// What an item means for the run's row.
fn apply(row: &mut runs::ActiveModel, step: &Step, now: DateTime<Utc>) {
    match &step.body {
        Body::Usage { .. } => row.turns = Set(step.turn.and_then(|turn| i32::try_from(turn).ok()).unwrap_or(0)),
        Body::Handoff { to_agent_id, .. } => row.current_agent_id = Set(*to_agent_id),
        Body::Status { status, error, output } => {
            row.status = Set(stored(*status));
            if let Some(error) = error {
                row.error_code = Set(Some(code_name(error.code)));
                row.error_message = Set(Some(error.message.clone()));
            }
            if *status == RunStatus::Succeeded {
                row.output = Set(Some(output.clone().unwrap_or_default()));
            }
            if status.is_terminal() {
                row.finished_at = Set(Some(now));
            }
        }
        Body::Message { .. } | Body::Reasoning { .. } | Body::ToolCall { .. } | Body::ToolOutput { .. } => {}
    }
}

/// The conversation's next run, which waited for this one to end; locked.
async fn next_of_conversation(
    tx: &DatabaseTransaction,
    run: &runs::Model,
    now: DateTime<Utc>,
) -> Result<Option<runs::Model>, Error> {
    let Some(conversation_id) = run.conversation_id else {
        return Ok(None);
    };
    conversations::Entity::update_many()
        .set(conversations::ActiveModel { updated_at: Set(now), ..Default::default() })
        .filter(conversations::Column::Id.eq(conversation_id))
        .exec(tx)
        .await?;
    let next = runs::Entity::in_tenant(run.tenant_id)
        .filter(runs::Column::ConversationId.eq(conversation_id))
        .filter(runs::Column::Status.is_in(Status::UNFINISHED))
        .order_by_asc(runs::Column::Id)
        .limit(1)
        .lock_exclusive()
        .one(tx)
        .await?;
    Ok(next.filter(|next| next.status == Status::Queued && next.vtime.is_none()))
}

fn to_row(run: &runs::Model, item: &Item) -> Result<run_items::ActiveModel, Error> {
    let body = serde_json::to_value(&item.step.body)?;
    let kind = body.get("kind").and_then(|kind| kind.as_str()).unwrap_or_default().to_owned();
    Ok(run_items::ActiveModel {
        run_id: Set(run.id),
        sequence: Set(item.sequence),
        run_created_at: Set(run.created_at),
        tenant_id: Set(run.tenant_id),
        kind: Set(kind),
        agent_name: Set(item.step.agent_name.clone()),
        turn: Set(item.step.turn.and_then(|turn| i32::try_from(turn).ok())),
        body: Set(body),
        created_at: Set(item.created_at),
    })
}

/// An item from its row.
pub fn from_row(row: run_items::Model) -> Result<Item, Error> {
    Ok(Item {
        sequence: row.sequence,
        created_at: row.created_at,
        step: Step {
            agent_name: row.agent_name,
            turn: row.turn.and_then(|turn| u32::try_from(turn).ok()),
            body: serde_json::from_value(row.body)?,
        },
    })
}

/// A run's items after `after`, at most `limit`, in their order.
pub async fn items_after(app: &App, run: &runs::Model, after: i64, limit: u64) -> Result<Vec<Item>, Error> {
    let rows = run_items::Entity::in_tenant(run.tenant_id)
        .filter(run_items::Column::RunId.eq(run.id))
        .filter(run_items::Column::RunCreatedAt.eq(run.created_at))
        .filter(run_items::Column::Sequence.gt(after))
        .order_by_asc(run_items::Column::Sequence)
        .limit(limit)
        .all(app.db.read())
        .await?;
    rows.into_iter().map(from_row).collect()
}

/// All items of some of a tenant's runs, in one statement.
pub async fn items_of(app: &App, tenant_id: Uuid, runs: &[runs::Model]) -> Result<HashMap<Uuid, Vec<Item>>, Error> {
    let mut items: HashMap<Uuid, Vec<Item>> = HashMap::new();
    let Some(oldest) = runs.iter().map(|run| run.created_at).min() else {
        return Ok(items);
    };
    let rows = run_items::Entity::in_tenant(tenant_id)
        .filter(run_items::Column::RunId.is_in(runs.iter().map(|run| run.id)))
        // Partitions before the oldest run's are not looked into.
        .filter(run_items::Column::RunCreatedAt.gte(oldest))
        .order_by_asc(run_items::Column::RunId)
        .order_by_asc(run_items::Column::Sequence)
        .all(app.db.read())
        .await?;
    for row in rows {
        items.entry(row.run_id).or_default().push(from_row(row)?);
    }
    Ok(items)
}

/// All of a run's items, as the transaction sees them.
pub async fn items_in(tx: &DatabaseTransaction, run: &runs::Model) -> Result<Vec<Item>, Error> {
    let rows = run_items::Entity::in_tenant(run.tenant_id)
        .filter(run_items::Column::RunId.eq(run.id))
        .filter(run_items::Column::RunCreatedAt.eq(run.created_at))
        .order_by_asc(run_items::Column::Sequence)
        .all(tx)
        .await?;
    rows.into_iter().map(from_row).collect()
}

/// Tells subscribers of an append that is committed (I4), and wakes the pool if it let a run in.
pub fn publish(app: &App, appended: Appended) {
    let run = Arc::new(appended.run);
    app.live.items(run.id, appended.items, Status::TERMINAL.contains(&run.status));
    if appended.moved {
        // A place may have become free.
        app.wakes.wake(&run.pool);
        app.changes.publish(run.tenant_id, Change::Run(run));
    }
}

/// The journal as the shared pool's runs see it.
pub struct DatabaseJournal(pub App);

#[async_trait]
impl Journal for DatabaseJournal {
    async fn append(&self, lease: Lease, from_sequence: i64, steps: Vec<Step>) -> Result<(), JournalError> {
        let app = &self.0;
        let unavailable = |error: Error| {
            tracing::warn!(run_id = %lease.run_id, inside = ?error, "an append failed");
            JournalError::Unavailable(error.to_string())
        };
        let until = from_sequence + i64::try_from(steps.len()).unwrap_or(0);
        match append(app, lease, from_sequence, steps).await.map_err(unavailable)? {
            Some(appended) => publish(app, appended),
            // A commit whose answer was lost: the same holder has written this before.
            None if holds_up_to(app, lease, until).await.map_err(unavailable)? => {}
            None => return Err(JournalError::LeaseLost),
        }
        Ok(())
    }

    async fn progress(&self, lease: Lease, progress: Progress) {
        self.0.live.progress(lease, progress);
    }
}

async fn append(app: &App, lease: Lease, from: i64, steps: Vec<Step>) -> Result<Option<Appended>, Error> {
    let tx = app.db.begin().await?;
    let appended = append_in(app, &tx, lease, from, steps, app.clock.now()).await?;
    tx.commit().await?;
    Ok(appended)
}

async fn holds_up_to(app: &App, lease: Lease, next_sequence: i64) -> Result<bool, Error> {
    let run = runs::Entity::across_tenants()
        .filter(runs::Column::Id.eq(lease.run_id))
        .filter(runs::Column::Fence.eq(lease.fence))
        .filter(runs::Column::NextSequence.eq(next_sequence))
        .one(app.db.read())
        .await?;
    Ok(run.is_some())
}
