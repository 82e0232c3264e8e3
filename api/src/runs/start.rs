//! How a run comes into being: its row, its input as the journal's first item, its place in the queue.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use cloister_runtime::item::Item;
use cloister_runtime::spec::RunSpec;
use entity::runs::Status;
use entity::{TenantOwned, conversations, quota_reservations, runs, tenants};
use sea_orm::ActiveValue::Set;
use sea_orm::sea_query::OnConflict;
use sea_orm::{
    ActiveModelTrait, ColumnTrait, DatabaseTransaction, EntityTrait, IntoActiveModel, PaginatorTrait, QueryFilter,
    QueryOrder, QuerySelect,
};
use uuid::Uuid;

use super::claimed::GatewayModel;
use super::pool::{self, AtHand, Place};
use super::{Idempotency, NewRun, OnBusy, cancel_in, journal, queue, record};
use crate::agents::graph::Frozen;
use crate::app::App;
use crate::clock::month_of;
use crate::db::padded;
use crate::error::{Error, Outcome, Refusal, UserError, UserErrorCode};
use crate::models::gateway;
use crate::usage::counters::{Counter, Counters};
use crate::usage::quota::{self, Reserve};
use crate::viewer::TenantViewer;

/// A run that is to start, in no conversation that exists already; many are started in one transaction.
#[derive(Clone)]
pub struct Start {
    /// Its row, but for the spec.
    run: runs::Model,
    spec: RunSpec,
    begins_conversation: bool,
    entry: Entry,
    /// What its first model call is to hold, if the run is claimed at once.
    first_call: Option<Reserve>,
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
    /// Nothing is left of the month's tokens, the tenant's or the key's.
    Exhausted,
    /// A run with its idempotency key exists.
    Repeated,
}

/// Starts of a transaction that holds their tenants.
pub struct Starting<'a> {
    starts: Vec<&'a Start>,
    tenants: HashMap<Uuid, tenants::Model>,
    /// Runs whose tenant or key has used up its month.
    exhausted: HashSet<Uuid>,
}

impl<'a> Starting<'a> {
    /// Locks the tenants, before all else, and looks at them again: one may have been suspended since its key was checked.
    pub async fn lock(tx: &DatabaseTransaction, starts: Vec<&'a Start>) -> Result<Self, Error> {
        if starts.is_empty() {
            return Ok(Self { starts, tenants: HashMap::new(), exhausted: HashSet::new() });
        }
        let tenants = tenants::Entity::across_tenants()
            .filter(tenants::Column::Id.is_in(starts.iter().map(|start| start.run.tenant_id).collect::<BTreeSet<_>>()))
            .order_by_asc(tenants::Column::Id)
            .lock_shared()
            .all(tx)
            .await?;
        let tenants = tenants.into_iter().map(|tenant| (tenant.id, tenant)).collect();
        Ok(Self { starts, tenants, exhausted: HashSet::new() })
    }

    fn is_active(&self, start: &Start) -> bool {
        self.tenants.get(&start.run.tenant_id).is_some_and(tenants::Model::takes_runs)
    }

    fn active(&self) -> impl Iterator<Item = &'a Start> {
        self.starts.iter().copied().filter(|start| self.is_active(start))
    }

    /// The counters that decide about them, and those that their first calls count in.
    pub fn counters(&self) -> impl Iterator<Item = Counter> {
        self.active().flat_map(Start::counters)
    }

    /// The queues in which they take places.
    pub fn queues(&self) -> impl Iterator<Item = (Uuid, String)> {
        self.tenants.values().map(|tenant| (tenant.id, queue::pool_of(tenant).into_owned()))
    }

    /// Stores those that may start. The caller's transaction holds the counters, and stores the inputs
    /// ([`Begun::inputs`]).
    pub async fn insert(&mut self, app: &App, tx: &DatabaseTransaction, counters: &Counters) -> Result<Begun, Error> {
        let is_exhausted = |start: &&Start| start.caller().any(|counter| counters.is_used_up(&counter));
        let (exhausted, served): (Vec<&Start>, Vec<&Start>) = self.active().partition(is_exhausted);
        self.exhausted = exhausted.into_iter().map(|start| start.run.id).collect();
        let mut begun = insert(app, tx, &self.tenants, served.into_iter().cloned().collect()).await?;
        // One that is refused now may be stored by an earlier commit, whose answer was lost.
        let is_refused = |start: &&Start| !self.is_active(start) || self.exhausted.contains(&start.run.id);
        let refused = self.starts.iter().copied().filter(is_refused).map(|start| start.run.id);
        begun.runs.extend(stored(tx, refused.collect()).await?);
        Ok(begun)
    }

    /// Those that an earlier commit stored, whose answer was lost, and that are not executed here: nobody here makes
    /// their first calls.
    pub fn not_executed(&self, begun: &Begun) -> Vec<&'a Start> {
        let stored = begun.runs.iter().skip(begun.inputs.len()).map(|run| run.id);
        let others: HashSet<Uuid> = stored.filter(|id| !begun.places.contains_key(id)).collect();
        self.starts.iter().copied().filter(|start| others.contains(&start.run.id)).collect()
    }

    /// What the first calls of those runs are to hold that are claimed already.
    pub fn first_calls(&self, begun: &Begun) -> impl Iterator<Item = &'a Reserve> {
        let claimed = self.starts.iter().copied().filter(|start| begun.places.contains_key(&start.run.id));
        claimed.filter_map(|start| start.first_call.as_ref())
    }

    /// What became of each, in their order, from the runs that were begun.
    pub fn told(&self, begun: Vec<runs::Model>) -> Vec<Started> {
        let mut started: HashMap<Uuid, runs::Model> = begun.into_iter().map(|run| (run.id, run)).collect();
        let told = self.starts.iter().map(|start| match started.remove(&start.run.id) {
            Some(run) => Started::Run(Box::new(run)),
            None if !self.is_active(start) => Started::Suspended,
            None if self.exhausted.contains(&start.run.id) => Started::Exhausted,
            None => Started::Repeated,
        });
        told.collect()
    }
}

/// Starts a run without a conversation, or with one that begins with it. Returns it without its spec.
pub async fn alone(
    app: &App,
    viewer: &TenantViewer,
    new: &NewRun,
    frozen: Frozen,
    idempotency: Option<&Idempotency<'_>>,
    begins_conversation: bool,
) -> Outcome<runs::Model> {
    let conversation_id = begins_conversation.then(|| app.clock.new_id());
    let start = Start::new(app, viewer, new, frozen, idempotency, conversation_id);
    let first_call = match queue::pool_of(&viewer.tenant).as_ref() {
        queue::SHARED => GatewayModel::first_call(app, &start.run, &start.spec),
        // Its own workers claim it.
        _ => None,
    };
    match record::start(app, Start { begins_conversation, first_call, ..start }).await? {
        Started::Run(run) => Ok(*run),
        Started::Suspended => Err(Error::Suspended.into()),
        Started::Exhausted => Err(exhausted().into()),
        Started::Repeated => Err(Error::Conflict.into()),
    }
}

fn exhausted() -> UserError {
    let message = "Nothing is left of this month's tokens. Raise the limit, or wait for the new month.";
    UserError::new(UserErrorCode::QuotaExceeded, "", message)
}

/// Starts a run in a conversation that exists, and does what `onBusy` asks for. Returns it without its spec.
pub async fn in_conversation(
    app: &App,
    viewer: &TenantViewer,
    new: &NewRun,
    frozen: Frozen,
    idempotency: Option<&Idempotency<'_>>,
    conversation_id: Uuid,
) -> Outcome<runs::Model> {
    let tenant_id = viewer.tenant_id();
    if quota::unused_by(app, viewer).await? <= 0 {
        return Err(exhausted().into());
    }
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
    // A repetition that was as fast must not interrupt the run that it repeats.
    if let Some(Idempotency { key, .. }) = idempotency {
        let same = runs::Entity::in_tenant(tenant_id).filter(runs::Column::IdempotencyKey.eq(*key));
        if same.count(&tx).await? > 0 {
            return Err(Error::Conflict.into());
        }
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
    let start = Start::new(app, viewer, new, frozen, idempotency, Some(conversation_id));
    let tenants = HashMap::from([(tenant_id, tenant)]);
    let begun = insert(app, &tx, &tenants, vec![Start { entry, ..start }]).await?;
    journal::insert_items(&tx, begun.inputs()).await?;
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
        idempotency: Option<&Idempotency<'_>>,
        conversation_id: Option<Uuid>,
    ) -> Self {
        let id = app.clock.new_id();
        let spec = RunSpec { run_id: id, root: new.agent_id, agents: frozen.agents, input: new.input.clone() };
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
            spec: serde_json::Value::Null,
            idempotency_key: idempotency.map(|idempotency| idempotency.key.to_owned()),
            idempotency_hash: idempotency.map(|idempotency| idempotency.fingerprint.clone()),
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
        Self { run, spec, begins_conversation: false, entry: Entry::AtOnce, first_call: None }
    }

    /// Gives back what may have been reserved for its first call.
    pub fn forget_first_call(&self, app: &App) {
        if let Some(first_call) = &self.first_call {
            gateway::forget(app, first_call.reservation.clone());
        }
    }

    /// The agent that answers first.
    fn agent_name(&self) -> &str {
        self.spec.agents.get(&self.spec.root).map_or("", |agent| &agent.name)
    }

    /// The months that the run's calls count in.
    fn caller(&self) -> impl Iterator<Item = Counter> {
        Counter::of_caller(self.run.tenant_id, self.run.api_key_id, &month_of(self.run.created_at))
    }

    /// Those, and what else its first call counts in.
    fn counters(&self) -> impl Iterator<Item = Counter> {
        let of_call = self.first_call.iter().flat_map(|reserve| Counter::of(&reserve.reservation));
        self.caller().chain(of_call)
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

/// Runs as a transaction has stored them. Those that are new are without their specs.
#[derive(Default)]
pub struct Begun {
    /// Those that are new, then those that an earlier commit stored whose answer was lost.
    runs: Vec<runs::Model>,
    /// The first items of those that are new.
    inputs: Vec<Item>,
    /// Where those are executed that are claimed already.
    places: HashMap<Uuid, Place>,
    /// What is known of those.
    at_hand: HashMap<Uuid, AtHand>,
}

impl Begun {
    /// The first items of the runs that are new.
    pub fn inputs(&self) -> impl Iterator<Item = (&runs::Model, &[Item])> {
        self.runs.iter().zip(self.inputs.chunks(1))
    }

    /// Hands a run's first call what was reserved for it.
    pub fn hand(&mut self, reserved: quota_reservations::Model) {
        if let Some(at_hand) = reserved.run_id.and_then(|run_id| self.at_hand.get_mut(&run_id)) {
            at_hand.reserved = Some(reserved);
        }
    }

    /// Commits, tells of the runs, and begins those that are claimed. Returns them as they were before that.
    pub async fn commit(mut self, app: &App, tx: DatabaseTransaction) -> Result<Vec<runs::Model>, Error> {
        let before = |run: &runs::Model| match self.places.contains_key(&run.id) {
            true => queue::before_claim(run.clone()),
            false => run.clone(),
        };
        let told: Vec<runs::Model> = self.runs.iter().map(before).collect();
        app.pool.commit_queued(app, tx, &told, |run| !self.places.contains_key(&run.id)).await?;
        for run in self.runs {
            if let Some(place) = self.places.remove(&run.id) {
                let at_hand = self.at_hand.remove(&run.id).unwrap_or_default();
                pool::begin(app, run, place, at_hand);
            }
        }
        Ok(told)
    }
}

/// Stores runs, but for their first items. Those that wait for nothing are claimed for this process where nothing could be
/// claimed before them and there is room, or queued. Those whose idempotency key exists are left out. The caller's
/// transaction holds the tenants.
async fn insert(
    app: &App,
    tx: &DatabaseTransaction,
    tenants: &HashMap<Uuid, tenants::Model>,
    mut starts: Vec<Start>,
) -> Result<Begun, Error> {
    if starts.is_empty() {
        return Ok(Begun::default());
    }
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
    let row = |start: &Start| {
        let spec = serde_json::to_value(&start.spec)?;
        Ok(runs::Model { spec, ..start.run.clone() }.into_active_model().reset_all())
    };
    let rows = starts.iter().map(row).collect::<Result<Vec<_>, Error>>()?;
    let inserted = runs::Entity::insert_many(padded(tx, rows))
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
    let stored = stored_before(tx, &repeated).await?;
    let input = |start: &Start| journal::input_item(&start.run, start.agent_name());
    let inputs: Vec<Item> = starts.iter().map(input).collect();
    let (mut runs, mut at_hand) = (Vec::new(), HashMap::new());
    for start in starts {
        at_hand.insert(start.run.id, AtHand { spec: Some(start.spec), reserved: None });
        runs.push(start.run);
    }
    runs.extend(stored);
    for start in repeated {
        at_hand.insert(start.run.id, AtHand { spec: Some(start.spec), reserved: None });
    }
    // One stored before is ours if it was claimed then, and by nobody since. If no answer ever comes, its lease lapses.
    places.retain(|id, _| runs.iter().any(|run| run.id == *id && queue::was_claimed_at_once(run)));
    Ok(Begun { runs, inputs, places, at_hand })
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
async fn stored_before(tx: &DatabaseTransaction, starts: &[Start]) -> Result<Vec<runs::Model>, Error> {
    let stored = stored(tx, starts.iter().map(|start| start.run.id).collect()).await?;
    let is_stored = |start: &Start| stored.iter().any(|run| run.id == start.run.id);
    let unused = starts.iter().filter(|start| start.begins_conversation && !is_stored(start));
    let unused: Vec<Uuid> = unused.filter_map(|start| start.run.conversation_id).collect();
    if !unused.is_empty() {
        conversations::Entity::delete_many().filter(conversations::Column::Id.is_in(unused)).exec(tx).await?;
    }
    Ok(stored)
}

async fn stored(tx: &DatabaseTransaction, ids: Vec<Uuid>) -> Result<Vec<runs::Model>, Error> {
    if ids.is_empty() {
        return Ok(Vec::new());
    }
    Ok(runs::Entity::across_tenants().filter(runs::Column::Id.is_in(ids)).all(tx).await?)
}
