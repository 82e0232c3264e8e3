//! How a run comes into being: its row, its input as the journal's first item, its place in the queue.

use std::collections::{BTreeMap, HashMap, HashSet};

use cloister_runtime::item::Item;
use cloister_runtime::spec::RunSpec;
use entity::runs::Status;
use entity::{TenantOwned, conversations, runs, tenants};
use sea_orm::ActiveValue::Set;
use sea_orm::sea_query::OnConflict;
use sea_orm::{
    ActiveModelTrait, ColumnTrait, DatabaseTransaction, EntityTrait, IntoActiveModel, PaginatorTrait, QueryFilter,
    QueryOrder, QuerySelect,
};
use uuid::Uuid;

use super::pool::{self, Place};
use super::{NewRun, OnBusy, cancel_in, journal, queue};
use crate::agents::graph::Frozen;
use crate::app::App;
use crate::batch::{self, Batch, Batched};
use crate::db::Gathered;
use crate::error::{Error, Outcome, Refusal, UserError, UserErrorCode};
use crate::viewer::TenantViewer;

/// A run that is to start, in no conversation that exists already; many are started in one transaction.
#[derive(Clone)]
pub struct Start {
    run: runs::Model,
    /// The agent that answers first.
    agent_name: String,
    begins_conversation: bool,
    entry: Entry,
}

/// How a run comes to its worker.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Entry {
    /// By a claim in the transaction that stores it, where nothing is to be claimed before it; else by the queue.
    AtOnce,
    /// By the queue.
    Queue,
    /// An unfinished run of its conversation goes first.
    Waits,
}

/// What became of it.
pub enum Started {
    /// It is stored, and queued or under way; subscribers have been told.
    Run(Box<runs::Model>),
    /// The tenant is no longer active.
    Suspended,
    /// A run with its idempotency key exists.
    Repeated,
}

impl Batched for Start {
    type Done = Started;

    fn batch(app: &App) -> &Batch<Self> {
        &app.batches.start
    }

    async fn write(app: &App, starts: &[Self]) -> Result<Vec<Started>, Error> {
        let tx = app.db.begin_gathered(Gathered::Starts).await?;
        // Locked before all else, and looked at again: it may have been suspended since the key was checked.
        let tenants = tenants::Entity::across_tenants()
            .filter(tenants::Column::Id.is_in(starts.iter().map(|start| start.run.tenant_id)))
            .order_by_asc(tenants::Column::Id)
            .lock_shared()
            .all(&tx)
            .await?;
        let tenants: HashMap<Uuid, tenants::Model> = tenants.into_iter().map(|tenant| (tenant.id, tenant)).collect();
        let is_active = |id: &Uuid| tenants.get(id).is_some_and(tenants::Model::takes_runs);
        let active = starts.iter().filter(|start| is_active(&start.run.tenant_id)).cloned().collect();
        let begun = insert(app, &tx, &tenants, active).await?;
        let started = begun.commit(app, tx).await?;
        let mut started: HashMap<Uuid, runs::Model> = started.into_iter().map(|run| (run.id, run)).collect();
        let answers = starts.iter().map(|start| match started.remove(&start.run.id) {
            Some(run) => Started::Run(Box::new(run)),
            None if is_active(&start.run.tenant_id) => Started::Repeated,
            None => Started::Suspended,
        });
        Ok(answers.collect())
    }
}

/// Starts a run without a conversation, or with one that begins with it.
pub async fn alone(
    app: &App,
    viewer: &TenantViewer,
    new: &NewRun,
    frozen: Frozen,
    fingerprint: &str,
    begins_conversation: bool,
) -> Outcome<runs::Model> {
    let conversation_id = begins_conversation.then(|| app.clock.new_id());
    let start = Start::new(app, viewer, new, frozen, fingerprint, conversation_id)?;
    match batch::write(app, Start { begins_conversation, ..start }).await? {
        Started::Run(run) => Ok(*run),
        Started::Suspended => Err(Error::Suspended.into()),
        Started::Repeated => Err(Error::Conflict.into()),
    }
}

/// Starts a run in a conversation that exists, and does what `onBusy` asks for.
pub async fn in_conversation(
    app: &App,
    viewer: &TenantViewer,
    new: &NewRun,
    frozen: Frozen,
    fingerprint: &str,
    conversation_id: Uuid,
) -> Outcome<runs::Model> {
    let tenant_id = viewer.tenant_id();
    let tx = app.db.begin().await?;
    let tenant = tenants::Entity::in_tenant(tenant_id).lock_shared().one(&tx).await?;
    let tenant = tenant.filter(tenants::Model::takes_runs).ok_or(Error::Suspended)?;
    // Locked, so that of two runs started at once one sees the other.
    let conversation = conversations::Entity::in_tenant(tenant_id)
        .filter(conversations::Column::Id.eq(conversation_id))
        .filter(conversations::Column::DeletedAt.is_null())
        .lock_exclusive()
        .one(&tx)
        .await?;
    if conversation.is_none() {
        return Err(UserError::not_found("conversationId", "conversation").into());
    }
    let unfinished = || {
        runs::Entity::in_tenant(tenant_id)
            .filter(runs::Column::ConversationId.eq(conversation_id))
            .filter(runs::Column::Status.is_in(Status::UNFINISHED))
    };
    // Counted without a lock: claims pass over runs that are locked.
    let is_busy = unfinished().count(&tx).await? > 0;
    let mut cancelled = Vec::new();
    match new.on_busy {
        OnBusy::Reject if is_busy => {
            let message =
                "This conversation has an unfinished run. Wait for its end, or start with onBusy ENQUEUE or INTERRUPT.";
            return Err(UserError::new(UserErrorCode::Conflict, "conversationId", message).into());
        }
        OnBusy::Interrupt if is_busy => {
            // Newest first: a run that waits is cancelled before the one whose end would let it into the queue.
            for run in unfinished().order_by_desc(runs::Column::Id).lock_exclusive().all(&tx).await? {
                cancelled.push(cancel_in(app, &tx, run).await?);
            }
        }
        OnBusy::Enqueue | OnBusy::Reject | OnBusy::Interrupt => {}
    }
    // Its caller may leave before the commit: nobody else would begin a run that is claimed already.
    let entry = if is_busy && new.on_busy == OnBusy::Enqueue { Entry::Waits } else { Entry::Queue };
    // The id is made while the conversation is locked: its runs are ordered by their ids.
    let start = Start::new(app, viewer, new, frozen, fingerprint, Some(conversation_id))?;
    let tenants = HashMap::from([(tenant_id, tenant)]);
    let begun = insert(app, &tx, &tenants, vec![Start { entry, ..start }]).await?;
    let run = begun.commit(app, tx).await?.pop().ok_or(Refusal::Error(Error::Conflict))?;
    for appended in cancelled {
        app.pool.abandon(appended.run.id, appended.run.fence);
        journal::publish(app, appended);
    }
    Ok(run)
}

impl Start {
    fn new(
        app: &App,
        viewer: &TenantViewer,
        new: &NewRun,
        frozen: Frozen,
        fingerprint: &str,
        conversation_id: Option<Uuid>,
    ) -> Result<Self, Error> {
        let id = app.clock.new_id();
        let agent_name = frozen.root_name().to_owned();
        let spec = RunSpec {
            run_id: id,
            root: new.agent_id,
            agents: frozen.agents.as_ref().clone(),
            input: new.input.clone(),
        };
        let run = runs::Model {
            id,
            tenant_id: viewer.tenant_id(),
            api_key_id: Some(viewer.key.id),
            agent_id: new.agent_id,
            agent_version_id: frozen.version_id,
            current_agent_id: new.agent_id,
            conversation_id,
            status: Status::Queued,
            input: new.input.clone(),
            output: None,
            error_code: None,
            error_message: None,
            turns: 0,
            max_tokens: new.max_tokens,
            timeout_seconds: new.timeout_seconds.unwrap_or(app.config.runs.timeout_seconds.cast_signed()),
            spec: serde_json::to_value(&spec)?,
            idempotency_hash: new.idempotency_key.is_some().then(|| fingerprint.to_owned()),
            idempotency_key: new.idempotency_key.clone(),
            pool: String::new(),
            vtime: None,
            fence: 0,
            lease_until: None,
            claimed_at: None,
            held_ms: 0,
            next_sequence: 2,
            created_at: app.clock.now(),
            started_at: None,
            finished_at: None,
            worker: None,
            output_json: None,
            waits_until: None,
            paused_at: None,
            history_limit: new.history_limit,
        };
        Ok(Self { run, agent_name, begins_conversation: false, entry: Entry::AtOnce })
    }

    /// The conversation that begins with the run.
    fn conversation(&self) -> Option<conversations::ActiveModel> {
        let id = self.run.conversation_id.filter(|_| self.begins_conversation)?;
        Some(conversations::ActiveModel {
            id: Set(id),
            tenant_id: Set(self.run.tenant_id),
            created_at: Set(self.run.created_at),
            updated_at: Set(self.run.created_at),
            deleted_at: Set(None),
        })
    }
}

/// Runs as a transaction has stored them.
struct Begun {
    runs: Vec<runs::Model>,
    /// Where those are executed that are claimed already.
    places: HashMap<Uuid, Place>,
}

impl Begun {
    /// Commits, tells of the runs, and begins those that are claimed. Returns them as they were before that.
    async fn commit(mut self, app: &App, tx: DatabaseTransaction) -> Result<Vec<runs::Model>, Error> {
        let before = |run: &runs::Model| match self.places.contains_key(&run.id) {
            true => queue::before_claim(run.clone()),
            false => run.clone(),
        };
        let told: Vec<runs::Model> = self.runs.iter().map(before).collect();
        app.pool.commit_queued(app, tx, &told, |run| !self.places.contains_key(&run.id)).await?;
        for run in self.runs {
            if let Some(place) = self.places.remove(&run.id) {
                pool::begin(app, run, place);
            }
        }
        Ok(told)
    }
}

/// Stores runs with their first items. Those that wait for nothing are claimed for this process where nothing could be
/// claimed before them and there is room, or queued. Those whose idempotency key exists are left out. The caller's
/// transaction holds the tenants.
async fn insert(
    app: &App,
    tx: &DatabaseTransaction,
    tenants: &HashMap<Uuid, tenants::Model>,
    mut starts: Vec<Start>,
) -> Result<Begun, Error> {
    let conversations: Vec<conversations::ActiveModel> = starts.iter().filter_map(Start::conversation).collect();
    if !conversations.is_empty() {
        conversations::Entity::insert_many(conversations)
            .on_conflict(OnConflict::new().do_nothing().to_owned())
            .exec_without_returning(tx)
            .await?;
    }
    let mut by_tenant: BTreeMap<Uuid, Vec<&mut Start>> = BTreeMap::new();
    for start in &mut starts {
        by_tenant.entry(start.run.tenant_id).or_default().push(start);
    }
    let mut places = HashMap::new();
    for (tenant_id, starts) in by_tenant {
        let tenant = tenants.get(&tenant_id).ok_or_else(|| Error::internal("a start of a tenant that is gone"))?;
        places.extend(enter(app, tx, tenant, starts).await?);
    }
    let rows = starts.iter().map(|start| start.run.clone().into_active_model().reset_all());
    let inserted = runs::Entity::insert_many(rows)
        .on_conflict(OnConflict::new().do_nothing().to_owned())
        .exec_with_returning_keys(tx)
        .await?;
    let inserted: HashSet<Uuid> = inserted.into_iter().collect();
    let (starts, repeated): (Vec<Start>, Vec<Start>) =
        starts.into_iter().partition(|start| inserted.contains(&start.run.id));
    // Places that were taken for them are free again; those stored before have theirs.
    for start in repeated.iter().filter(|start| places.contains_key(&start.run.id)) {
        queue::vacate(tx, start.run.tenant_id, &start.run.pool, 1).await?;
    }
    let stored = stored_before(tx, repeated).await?;
    let input = |start: &Start| journal::input_item(&start.run, &start.agent_name);
    let inputs: Vec<Item> = starts.iter().map(input).collect();
    journal::insert_items(tx, starts.iter().map(|start| &start.run).zip(inputs.chunks(1))).await?;
    let runs: Vec<runs::Model> = starts.into_iter().map(|start| start.run).chain(stored).collect();
    // One stored before is ours if it was claimed then, and by nobody since. If no answer ever comes, its lease lapses.
    places.retain(|id, _| runs.iter().any(|run| run.id == *id && queue::was_claimed_at_once(run)));
    Ok(Begun { runs, places })
}

/// Gives a tenant's runs their pool and their place in it. Returns the places of those that are claimed at once.
async fn enter(
    app: &App,
    tx: &DatabaseTransaction,
    tenant: &tenants::Model,
    starts: Vec<&mut Start>,
) -> Result<HashMap<Uuid, Place>, Error> {
    let mut claimed = HashMap::new();
    let count = starts.iter().filter(|start| start.entry != Entry::Waits).count();
    let pool = queue::pool_of(tenant);
    let at_once = pool == queue::SHARED && starts.iter().all(|start| start.entry == Entry::AtOnce);
    let places = if at_once { app.pool.take_places(app, count) } else { None };
    let mut places = places.filter(|places| places.num_permits() == count);
    let count = u32::try_from(count).unwrap_or(u32::MAX);
    let passed = if places.is_some() { queue::pass(app, tx, tenant, count).await? } else { None };
    let is_passed = passed.is_some();
    let vtimes = match passed {
        Some(vtimes) => vtimes,
        None if count > 0 => queue::next_vtimes(app, tx, tenant, count).await?,
        None => Vec::new(),
    };
    let mut vtimes = vtimes.into_iter().peekable();
    for start in starts {
        start.run.pool = pool.to_string();
        let Some(vtime) = vtimes.next_if(|_| start.entry != Entry::Waits) else { continue };
        start.run.vtime = Some(vtime);
        if is_passed && let Some(place) = places.as_mut().and_then(|places| places.split(1)) {
            start.run = queue::claimed_at_once(app, start.run.clone(), vtime);
            claimed.insert(start.run.id, place);
        }
    }
    Ok(claimed)
}

/// Of starts that met a row of theirs: the runs that a commit stored whose answer was lost. The others' idempotency keys
/// are taken, and a conversation that was to begin with them doesn't.
async fn stored_before(tx: &DatabaseTransaction, starts: Vec<Start>) -> Result<Vec<runs::Model>, Error> {
    if starts.is_empty() {
        return Ok(Vec::new());
    }
    let ids = starts.iter().map(|start| start.run.id);
    let stored = runs::Entity::across_tenants().filter(runs::Column::Id.is_in(ids)).all(tx).await?;
    let is_stored = |start: &Start| stored.iter().any(|run| run.id == start.run.id);
    let unused = starts.iter().filter(|start| start.begins_conversation && !is_stored(start));
    let unused: Vec<Uuid> = unused.filter_map(|start| start.run.conversation_id).collect();
    if !unused.is_empty() {
        conversations::Entity::delete_many().filter(conversations::Column::Id.is_in(unused)).exec(tx).await?;
    }
    Ok(stored)
}
