//! The journal in the database: the one place where a run's items are stored and its state moves.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use cloister_runtime::ids::run_id;
use cloister_runtime::item::{Body, Item, Role, RunStatus, Step};
use cloister_runtime::journal::{Journal, JournalError, Progress};
use cloister_runtime::spec::Lease;
use entity::runs::Status;
use entity::{TenantOwned, conversations, run_items, runs, tenants};
use sea_orm::ActiveValue::Set;
use sea_orm::sea_query::ArrayType;
use sea_orm::{
    ActiveEnum, ActiveModelTrait, ColumnTrait, ConnectionTrait, DatabaseTransaction, DbBackend, EntityTrait,
    IntoActiveModel, QueryFilter, QueryOrder, QuerySelect, Statement, Value,
};
use uuid::Uuid;

use super::status::{code_name, stored};
use super::{approvals, queue, record};
use crate::app::App;
use crate::db::{padded, values_list};
use crate::error::Error;
use crate::tenants::changes::Change;

/// Steps that a worker asks to have stored.
#[derive(Clone, Debug)]
pub struct Append {
    /// Its right to the run.
    pub lease: Lease,
    /// Whether the run is in a conversation, which its end has to do with.
    pub in_conversation: bool,
    /// The earliest sequence that the first step can have: behind what its author knew of. Others may have written in
    /// the meantime: nested runs, and who decides about calls.
    pub from_sequence: i64,
    /// What happened.
    pub steps: Vec<Step>,
}

/// What became of an append.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is stored.
    Stored,
    /// It was stored before, by the same holder: its answer had been lost.
    Repeated,
    /// The lease is lost, or the sequence is none yet (I3).
    Refused,
}

/// What was stored of a run, to be told to subscribers once it is committed. The run has no spec.
pub struct Appended {
    /// The run as it is now.
    pub run: runs::Model,
    /// The new items.
    pub items: Vec<Item>,
    /// Whether the run's state moved.
    pub moved: bool,
    /// The pool in which a run of the tenant was queued with that: this one again, or the next of its conversation.
    pub queued_in: Option<String>,
}

/// What workers ask to have stored, decided about: the caller's transaction holds the runs.
pub struct Held {
    verdicts: Vec<Verdict>,
    /// Runs that gain items.
    entries: Vec<Entry>,
    now: DateTime<Utc>,
}

/// Locks the runs that workers ask for, and decides about each append; one that is refused changes nothing of the
/// others. Leases are renewed once they have lost a third. [`Held::store`] is to follow in the same transaction.
pub async fn hold(app: &App, tx: &DatabaseTransaction, appends: Vec<&Append>) -> Result<Held, Error> {
    let now = app.clock.now();
    let mut held = Held { verdicts: Vec::with_capacity(appends.len()), entries: Vec::new(), now };
    if appends.is_empty() {
        return Ok(held);
    }
    let moves = |append: &Append| append.steps.iter().any(|step| matches!(step.body, Body::Status { .. }));
    // One that comes to wait for a decision may be queued again at once, which takes its tenant too.
    let waits = |append: &Append| append.steps.last().is_some_and(|step| is_of(step, RunStatus::WaitingApproval));
    let moving = |append: &&&Append| (append.in_conversation && moves(append)) || waits(append);
    lock_conversations(tx, appends.iter().filter(moving).map(|append| append.lease.run_id).collect()).await?;
    let until = queue::lease_from(app, now);
    let rows = runs::without_spec()
        .filter(runs::Column::Id.is_in(appends.iter().map(|append| append.lease.run_id).collect::<BTreeSet<_>>()))
        .order_by_asc(runs::Column::Id)
        .lock_exclusive()
        .all(tx)
        .await?;
    let mut entries: BTreeMap<Uuid, Entry> = rows.into_iter().map(|run| (run.id, Entry::of(run))).collect();
    for append in appends {
        let Some(entry) = entries.get_mut(&append.lease.run_id) else {
            held.verdicts.push(Verdict::Refused);
            continue;
        };
        let stored = entry.stored_since(tx, append.from_sequence).await?;
        held.verdicts.push(entry.take(app, append, &stored, now, until));
    }
    held.entries.extend(entries.into_values().filter(|entry| !entry.items.is_empty()));
    Ok(held)
}

impl Held {
    /// The queues in which places become free.
    pub fn queues(&self) -> impl Iterator<Item = (Uuid, String)> {
        let moved = self.entries.iter().filter(|entry| entry.run.status != entry.before.status);
        moved.map(|entry| (entry.run.tenant_id, entry.run.pool.clone()))
    }

    /// Stores the items, and those of `others` with them. Returns a verdict for each append, and what was stored of each
    /// run.
    pub async fn store<'a>(
        self,
        app: &App,
        tx: &DatabaseTransaction,
        others: impl Iterator<Item = (&'a runs::Model, &'a [Item])>,
    ) -> Result<(Vec<Verdict>, Vec<Appended>), Error> {
        Ok((self.verdicts, store(app, tx, self.entries, others, self.now).await?))
    }
}

/// Locks runs' tenants, and the conversations that they are in, before the runs: an end locks the conversation's next run, whose cancel or
/// end would otherwise wait for us while we wait for it. SQLite has one writer, and nothing to lock.
pub async fn lock_conversations(tx: &DatabaseTransaction, run_ids: Vec<Uuid>) -> Result<(), Error> {
    if run_ids.is_empty() || tx.get_database_backend() == DbBackend::Sqlite {
        return Ok(());
    }
    let ids: Vec<(Uuid, Option<Uuid>)> = runs::Entity::across_tenants()
        .filter(runs::Column::Id.is_in(run_ids))
        .select_only()
        .columns([runs::Column::TenantId, runs::Column::ConversationId])
        .into_tuple()
        .all(tx)
        .await?;
    if ids.is_empty() {
        return Ok(());
    }
    let (tenant_ids, conversation_ids): (Vec<Uuid>, Vec<Option<Uuid>>) = ids.into_iter().unzip();
    let conversation_ids: Vec<Uuid> = conversation_ids.into_iter().flatten().collect();
    tenants::Entity::across_tenants()
        .filter(tenants::Column::Id.is_in(tenant_ids))
        .order_by_asc(tenants::Column::Id)
        .lock_shared()
        .all(tx)
        .await?;
    if conversation_ids.is_empty() {
        return Ok(());
    }
    conversations::Entity::across_tenants()
        .filter(conversations::Column::Id.is_in(conversation_ids))
        .order_by_asc(conversations::Column::Id)
        .lock_exclusive()
        .all(tx)
        .await?;
    Ok(())
}

/// A run whose row a transaction holds, and what is added to its journal.
struct Entry {
    before: runs::Model,
    run: runs::Model,
    items: Vec<Item>,
}

impl Entry {
    fn of(run: runs::Model) -> Self {
        Self { before: run.clone(), run, items: Vec::new() }
    }

    /// What was stored before this transaction of what an append's author may not know of.
    async fn stored_since(&self, tx: &DatabaseTransaction, from_sequence: i64) -> Result<Vec<Item>, Error> {
        match from_sequence < self.before.next_sequence {
            true => items_since(tx, &self.run, from_sequence).await,
            false => Ok(Vec::new()),
        }
    }

    fn take(
        &mut self,
        app: &App,
        append: &Append,
        stored: &[Item],
        now: DateTime<Utc>,
        lease_until: DateTime<Utc>,
    ) -> Verdict {
        let Append { lease, from_sequence, steps, .. } = append;
        let from_sequence = *from_sequence;
        if self.run.fence != lease.fence || from_sequence > self.run.next_sequence {
            return Verdict::Refused;
        }
        let since = stored.iter().chain(&self.items).filter(|item| item.sequence >= from_sequence);
        let since: Vec<&Step> = since.map(|item| &item.step).collect();
        if since.windows(Ord::max(steps.len(), 1)).any(|window| window.iter().copied().eq(steps)) {
            return Verdict::Repeated;
        }
        if self.run.status != Status::Running {
            return Verdict::Refused;
        }
        let mut steps = steps.clone();
        // A worker that comes to wait has seen all of its own; what it has not seen are decisions.
        if from_sequence < self.run.next_sequence
            && let Some(waits) = steps.last().filter(|step| is_of(step, RunStatus::WaitingApproval)).cloned()
        {
            steps.push(Step { body: Body::status(RunStatus::Queued), ..waits });
        }
        // It is in an index, which makes a change of it the dearest part of an append.
        let held = self.run.lease_until.filter(|held| *held > queue::least_lease_from(app, now));
        self.add(app, steps, now, Some(held.unwrap_or(lease_until)));
        Verdict::Stored
    }

    /// Adds steps, and does what they mean for the run's row.
    fn add(&mut self, app: &App, steps: Vec<Step>, now: DateTime<Utc>, lease_until: Option<DateTime<Utc>>) {
        let held_ms = queue::held_ms(&self.run, now);
        let status = self.run.status;
        for step in steps {
            apply(&mut self.run, &step, now);
            self.items.push(Item { sequence: self.run.next_sequence, created_at: now, step });
            self.run.next_sequence += 1;
        }
        // Only a run that a worker goes on with has a lease.
        let goes_on = self.run.status == Status::Running;
        self.run.lease_until = lease_until.filter(|_| goes_on);
        if !goes_on {
            self.run.held_ms = held_ms;
        }
        if self.run.status != status {
            self.run.waits_until = (self.run.status == Status::WaitingApproval).then(|| approvals::expiry(app, now));
            self.run.paused_at = (self.run.status == Status::PausedQuota).then_some(now);
        }
    }
}

fn is_of(step: &Step, of: RunStatus) -> bool {
    matches!(&step.body, Body::Status { status, .. } if *status == of)
}

/// Stores items of a run whose row the caller's transaction holds, and does what they mean for the
/// run's row, its queue and its conversation.
pub async fn write(
    app: &App,
    tx: &DatabaseTransaction,
    run: runs::Model,
    steps: Vec<Step>,
    now: DateTime<Utc>,
) -> Result<Appended, Error> {
    let mut entry = Entry::of(run);
    let lease_until = entry.run.lease_until;
    entry.add(app, steps, now, lease_until);
    let appended = store(app, tx, vec![entry], std::iter::empty(), now).await?.into_iter().next();
    appended.ok_or_else(|| Error::internal("an append came to nothing"))
}

async fn store<'a>(
    app: &App,
    tx: &DatabaseTransaction,
    entries: Vec<Entry>,
    others: impl Iterator<Item = (&'a runs::Model, &'a [Item])>,
    now: DateTime<Utc>,
) -> Result<Vec<Appended>, Error> {
    update_rows(tx, &entries).await?;
    let mut rows = to_rows(others)?;
    rows.extend(to_rows(entries.iter().map(|entry| (&entry.run, entry.items.as_slice())))?);
    insert_rows(tx, rows).await?;
    let moved = |entry: &&Entry| entry.run.status != entry.before.status;
    // Runs are locked before the queue; see there.
    let mut next = Vec::new();
    for entry in entries.iter().filter(moved).filter(|entry| Status::TERMINAL.contains(&entry.run.status)) {
        next.extend(next_of_conversation(tx, &entry.run, now).await?);
    }
    let mut vacated: BTreeMap<(Uuid, &str), i32> = BTreeMap::new();
    let mut left: BTreeSet<(Uuid, &str)> = BTreeSet::new();
    for entry in entries.iter().filter(moved) {
        let queue = (entry.run.tenant_id, entry.run.pool.as_str());
        match entry.before.status {
            Status::Running => *vacated.entry(queue).or_default() += 1,
            Status::Queued => drop(left.insert(queue)),
            _ => {}
        }
    }
    for ((tenant_id, pool), places) in vacated {
        queue::vacate(tx, tenant_id, pool, places).await?;
    }
    for (tenant_id, pool) in left {
        queue::refresh_head(tx, tenant_id, pool).await?;
    }
    // One that waited goes on at once where a decision came while it was at work.
    let again =
        entries.iter().filter(|entry| entry.before.status == Status::Running && entry.run.status == Status::Queued);
    next.extend(again.map(|entry| entry.run.clone()));
    let mut queued: HashMap<Uuid, String> = HashMap::new();
    for run in next {
        let run = queue::enqueue(app, tx, run).await?;
        queued.insert(run.tenant_id, run.pool);
    }
    let appended = entries.into_iter().map(|Entry { before, run, items }| {
        let moved = run.status != before.status;
        let queued_in = queued.get(&run.tenant_id).cloned();
        Appended { run, items, moved, queued_in }
    });
    Ok(appended.collect())
}

/// Writes what appends may change of runs, in one statement.
async fn update_rows(tx: &DatabaseTransaction, entries: &[Entry]) -> Result<(), Error> {
    const COLUMNS: usize = 14;
    if entries.is_empty() {
        return Ok(());
    }
    let rows: Vec<&runs::Model> = padded(tx, entries.iter().map(|entry| &entry.run).collect());
    let sql = format!(
        "UPDATE runs SET status = v.column2, output = v.column3, error_code = v.column4, error_message = v.column5, \
         turns = v.column6, current_agent_id = v.column7, next_sequence = v.column8, lease_until = v.column9, \
         held_ms = v.column10, finished_at = v.column11, output_json = v.column12, waits_until = v.column13, \
         paused_at = v.column14 FROM ({}) AS v WHERE runs.id = v.column1",
        values_list(rows.len(), COLUMNS)
    );
    let values = rows.into_iter().flat_map(|run| -> [Value; COLUMNS] {
        [
            run.id.into(),
            run.status.to_value().into(),
            run.output.clone().into(),
            run.error_code.clone().into(),
            run.error_message.clone().into(),
            run.turns.into(),
            run.current_agent_id.into(),
            run.next_sequence.into(),
            run.lease_until.into(),
            run.held_ms.into(),
            run.finished_at.into(),
            run.output_json.clone().into(),
            run.waits_until.into(),
            run.paused_at.into(),
        ]
    });
    tx.execute_raw(Statement::from_sql_and_values(tx.get_database_backend(), sql, values)).await?;
    Ok(())
}

/// Stores runs' items.
pub async fn insert_items<'a>(
    tx: &DatabaseTransaction,
    items: impl Iterator<Item = (&'a runs::Model, &'a [Item])>,
) -> Result<(), Error> {
    insert_rows(tx, to_rows(items)?).await
}

async fn insert_rows(tx: &DatabaseTransaction, rows: Vec<run_items::Model>) -> Result<(), Error> {
    /// Rows a statement: SQLite takes 32,766 parameters.
    const ROWS: usize = 1_000;
    if tx.get_database_backend() == DbBackend::Postgres {
        return insert_columns(tx, rows).await;
    }
    for rows in rows.chunks(ROWS) {
        let rows = rows.iter().map(|row| row.clone().into_active_model().reset_all());
        run_items::Entity::insert_many(rows).exec_without_returning(tx).await?;
    }
    Ok(())
}

/// Stores items by a statement that is the same for however many: a parameter is a column. PostgreSQL only.
async fn insert_columns(tx: &DatabaseTransaction, rows: Vec<run_items::Model>) -> Result<(), Error> {
    if rows.is_empty() {
        return Ok(());
    }
    let sql = "INSERT INTO run_items (run_id, sequence, run_created_at, tenant_id, kind, agent_name, turn, scope, body, \
               created_at) \
               SELECT run_id, sequence, run_created_at, tenant_id, kind, agent_name, NULLIF(turn, 0), NULLIF(scope, ''), \
               body::json, created_at \
               FROM UNNEST($1::uuid[], $2::bigint[], $3::timestamptz[], $4::uuid[], $5::text[], $6::text[], $7::integer[], \
               $8::text[], $9::text[], $10::timestamptz[]) \
               AS item (run_id, sequence, run_created_at, tenant_id, kind, agent_name, turn, scope, body, created_at)";
    let column = |of: fn(&run_items::Model) -> Value| {
        let values: Vec<Value> = rows.iter().map(of).collect();
        let kind = values.first().map_or(ArrayType::String, Value::array_type);
        Value::Array(kind, Some(Box::new(values)))
    };
    let values = [
        column(|row| row.run_id.into()),
        column(|row| row.sequence.into()),
        column(|row| row.run_created_at.into()),
        column(|row| row.tenant_id.into()),
        column(|row| row.kind.as_str().into()),
        column(|row| row.agent_name.as_str().into()),
        // Turns count from 1, and no scope is empty: arrays here have no NULL.
        column(|row| row.turn.unwrap_or(0).into()),
        column(|row| row.scope.as_deref().unwrap_or_default().into()),
        column(|row| row.body.to_string().into()),
        column(|row| row.created_at.into()),
    ];
    tx.execute_raw(Statement::from_sql_and_values(DbBackend::Postgres, sql, values)).await?;
    Ok(())
}

/// What an item means for the run's row.
fn apply(run: &mut runs::Model, step: &Step, now: DateTime<Utc>) {
    if step.scope.is_some() {
        // A nested run has no row.
        return;
    }
    match &step.body {
        Body::Usage { .. } => run.turns = step.turn.and_then(|turn| i32::try_from(turn).ok()).unwrap_or(0),
        Body::Handoff { to_agent_id, .. } => run.current_agent_id = *to_agent_id,
        Body::Status { status, error, output, output_json } => {
            run.status = stored(*status);
            if let Some(error) = error {
                run.error_code = Some(code_name(error.code));
                run.error_message = Some(error.message.clone());
            }
            if *status == RunStatus::Succeeded {
                run.output = Some(output.clone().unwrap_or_default());
                run.output_json.clone_from(output_json);
            }
            if status.is_terminal() {
                run.finished_at = Some(now);
            }
        }
        Body::Message { .. }
        | Body::Reasoning { .. }
        | Body::ToolCall { .. }
        | Body::ToolOutput { .. }
        | Body::Approval { .. }
        | Body::Guardrail { .. } => {}
    }
}

/// The conversation's next run, which waited for this one to end. Not locked: one that is queued already is for claims to
/// lock, and one that waits is kept by the conversation's lock.
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
        .one(tx)
        .await?;
    Ok(next.filter(|next| next.status == Status::Queued && next.vtime.is_none()))
}

fn to_rows<'a>(items: impl Iterator<Item = (&'a runs::Model, &'a [Item])>) -> Result<Vec<run_items::Model>, Error> {
    let mut rows = Vec::new();
    for (run, items) in items {
        for item in items {
            rows.push(to_row(run, item)?);
        }
    }
    Ok(rows)
}

fn to_row(run: &runs::Model, item: &Item) -> Result<run_items::Model, Error> {
    let body = serde_json::to_value(&item.step.body)?;
    let kind = body.get("kind").and_then(|kind| kind.as_str()).unwrap_or_default().to_owned();
    Ok(run_items::Model {
        run_id: run.id,
        sequence: item.sequence,
        run_created_at: run.created_at,
        tenant_id: run.tenant_id,
        kind,
        agent_name: item.step.agent_name.clone(),
        turn: item.step.turn.and_then(|turn| i32::try_from(turn).ok()),
        scope: item.step.scope.clone(),
        body,
        created_at: item.created_at,
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
            scope: row.scope,
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

/// A run's first item: its input, stored with it. It is what a later run of the conversation goes on from.
pub fn input_item(run: &runs::Model, agent_name: &str) -> Item {
    let body = Body::Message { index: None, role: Role::User, text: run.input.clone(), raw: None };
    let step = Step { agent_name: agent_name.to_owned(), turn: None, scope: None, body };
    Item { sequence: 1, created_at: run.created_at, step }
}

/// All of a run's items, as the transaction sees them.
pub async fn items_in(tx: &DatabaseTransaction, run: &runs::Model) -> Result<Vec<Item>, Error> {
    items_since(tx, run, 1).await
}

async fn items_since(tx: &DatabaseTransaction, run: &runs::Model, from_sequence: i64) -> Result<Vec<Item>, Error> {
    let rows = run_items::Entity::in_tenant(run.tenant_id)
        .filter(run_items::Column::RunId.eq(run.id))
        .filter(run_items::Column::RunCreatedAt.eq(run.created_at))
        .filter(run_items::Column::Sequence.gte(from_sequence))
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
        match appended.queued_in {
            Some(pool) => app.wakes.wake(&pool),
            // A place may have become free.
            None => app.wakes.free(&run.pool),
        }
        app.changes.publish(run.tenant_id, Change::Run(run));
    }
}

/// The journal as a run's worker sees it.
pub struct DatabaseJournal {
    app: App,
    in_conversation: bool,
}

impl DatabaseJournal {
    /// For this run's items.
    pub fn new(app: &App, run: &runs::Model) -> Self {
        Self { app: app.clone(), in_conversation: run.conversation_id.is_some() }
    }
}

#[async_trait]
impl Journal for DatabaseJournal {
    async fn append(&self, lease: Lease, from_sequence: i64, steps: Vec<Step>) -> Result<(), JournalError> {
        let append = Append { lease, in_conversation: self.in_conversation, from_sequence, steps };
        match record::append(&self.app, append).await {
            Ok(Verdict::Stored | Verdict::Repeated) => Ok(()),
            Ok(Verdict::Refused) => Err(JournalError::LeaseLost),
            Err(error) => {
                tracing::warn!(run_id = %run_id(lease.run_id), inside = ?error, "an append failed");
                Err(JournalError::Unavailable(error.to_string()))
            }
        }
    }

    async fn progress(&self, lease: Lease, progress: Progress) {
        self.app.live.progress(lease, progress);
    }
}
