//! The shared pool: claims runs of the queue and executes them in this process.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use chrono::TimeDelta;
use cloister_runtime::item::{Body, Item, RunErrorCode, Step};
use cloister_runtime::journal::Journal;
use cloister_runtime::model::{Model, ModelCall, ModelError, ModelEvent};
use cloister_runtime::run::{Outcome, Ports, Stop, run, transcript};
use cloister_runtime::spec::{Claim, Lease, RunSpec};
use dashmap::DashMap;
use entity::{TenantOwned, runs, tenants};
use futures_util::stream::BoxStream;
use sea_orm::{ColumnTrait, DatabaseTransaction, DbErr, QueryFilter, QueryOrder};
use uuid::Uuid;

use super::journal::{DatabaseJournal, items_after, items_of};
use super::{announce, queue};
use crate::agents::graph;
use crate::app::App;
use crate::error::Error;
use crate::models::gateway::{self, JournalWrite};
use crate::tenants::changes::Change;
use crate::tenants::signing_secrets;
use crate::usage::quota::CallOrigin;

/// How often the queue is looked into without being told of a change.
const POLL: Duration = Duration::from_millis(500);

/// The runs that this process executes.
pub struct Pool {
    concurrency: usize,
    active: DashMap<Uuid, (Lease, Stop)>,
    /// Runs on their way into the queue, of which nobody was told yet.
    entering: DashMap<Uuid, runs::Model>,
}

impl Pool {
    /// A pool that executes `concurrency` runs at once.
    pub fn new(concurrency: usize) -> Self {
        Self { concurrency, active: DashMap::new(), entering: DashMap::new() }
    }

    /// Runs executed now.
    pub fn active(&self) -> usize {
        self.active.len()
    }

    /// Whether a run is executed here.
    pub fn executes(&self, run_id: Uuid) -> bool {
        self.active.contains_key(&run_id)
    }

    /// Drops a run at once, if it is executed here by a claim no newer than `fence`: that lease is gone. A
    /// newer claim may have taken its place already.
    pub fn abandon(&self, run_id: Uuid, fence: i64) {
        if let Some(entry) = self.active.get(&run_id)
            && entry.0.fence <= fence
        {
            entry.1.abandon.cancel();
        }
    }

    /// Commits what lets runs into the queue, and tells of them. Whoever claims a run before that tells in our
    /// place ([`Pool::tell_queued`]), so that no subscriber hears RUNNING before QUEUED.
    pub async fn commit_queued(&self, app: &App, tx: DatabaseTransaction, runs: &[runs::Model]) -> Result<(), DbErr> {
        let _entering: Vec<Entering<'_>> = runs.iter().map(|run| Entering::new(self, run)).collect();
        tx.commit().await?;
        for run in runs {
            self.tell_queued(app, run.id);
        }
        for pool in runs.iter().map(|run| run.pool.as_str()).collect::<BTreeSet<_>>() {
            app.wakes.wake(pool);
        }
        Ok(())
    }

    /// Tells that a run is queued, unless that was told. Under the entry's lock, so that it is told when this returns.
    fn tell_queued(&self, app: &App, run_id: Uuid) {
        self.entering.remove_if(&run_id, |_, run| {
            app.changes.publish(run.tenant_id, Change::Run(Arc::new(run.clone())));
            true
        });
    }
}

/// A run's entry in [`Pool::entering`]; it goes with this, also when the commit fails.
struct Entering<'a>(&'a Pool, Uuid);

impl<'a> Entering<'a> {
    fn new(pool: &'a Pool, run: &runs::Model) -> Self {
        pool.entering.insert(run.id, run.clone());
        Self(pool, run.id)
    }
}

impl Drop for Entering<'_> {
    fn drop(&mut self) {
        self.0.entering.remove(&self.1);
    }
}

/// Claims and executes until the process is asked to stop.
pub async fn work(app: App) {
    let bell = app.wakes.bell(queue::SHARED);
    while !app.stopping.is_cancelled() {
        let free = app.pool.concurrency.saturating_sub(app.pool.active());
        match queue::claim(&app, queue::SHARED, free.min(32)).await {
            Ok(claimed) if !claimed.is_empty() => {
                for run in claimed {
                    begin(&app, run);
                }
                continue;
            }
            Ok(_) => {}
            Err(error) => tracing::error!(inside = ?error, "runs could not be claimed"),
        }
        tokio::select! {
            () = bell.notified() => {}
            () = tokio::time::sleep(POLL) => {}
            () = app.stopping.cancelled() => {}
        }
    }
}

fn begin(app: &App, claimed: runs::Model) {
    let lease = Lease { run_id: claimed.id, fence: claimed.fence };
    let (next_sequence, agent_name) = (claimed.next_sequence, super::run_agent_name(&claimed).unwrap_or_default());
    let stop = Stop { abandon: Default::default(), hand_back: app.stopping.child_token() };
    app.pool.active.insert(lease.run_id, (lease, stop.clone()));
    app.pool.tell_queued(app, lease.run_id);
    announce(app, std::slice::from_ref(&claimed));
    let app = app.clone();
    app.clone().tasks.spawn(async move {
        let outcome = execute(&app, claimed, &stop).await;
        // Only this claim's entry: a later claim of the same run may have taken its place.
        app.pool.active.remove_if(&lease.run_id, |_, (held, _)| *held == lease);
        app.live.forget(lease.run_id);
        match outcome {
            Ok(Outcome::Ended | Outcome::Paused | Outcome::LeaseLost | Outcome::JournalUnavailable) => {}
            Ok(Outcome::HandedBack) => hand_back(&app, lease).await,
            Err(error) => {
                tracing::error!(run_id = %lease.run_id, inside = ?error, "a run could not be prepared");
                retry_or_fail(&app, lease, next_sequence, agent_name).await;
            }
        }
        app.wakes.wake(queue::SHARED);
    });
}

async fn execute(app: &App, claimed: runs::Model, stop: &Stop) -> Result<Outcome, Error> {
    let (claim, origin) = prepare(app, claimed).await?;
    let ports = Ports {
        model: Arc::new(GatewayModel { app: app.clone(), origin }),
        journal: Arc::new(DatabaseJournal(app.clone())),
        webhooks: app.webhooks.clone(),
    };
    Ok(run(claim, &ports, stop).await)
}

/// What keeps a run from being prepared may pass, as a database that is away does: its lease lapses, and
/// it is claimed again. What has not passed after several claims won't: the run ends.
async fn retry_or_fail(app: &App, lease: Lease, next_sequence: i64, agent_name: String) {
    const CLAIMS: i64 = 5;
    if lease.fence < CLAIMS {
        return;
    }
    let body = Body::failed(RunErrorCode::Internal, "The run could not be executed. Tell us its id.");
    let step = Step { agent_name, turn: None, body };
    if let Err(error) = DatabaseJournal(app.clone()).append(lease, next_sequence, vec![step]).await {
        tracing::error!(run_id = %lease.run_id, %error, "a run that can't be executed could not be ended");
    }
}

/// Lets the next worker have a run at once.
async fn hand_back(app: &App, lease: Lease) {
    let back = async {
        let tx = app.db.begin().await?;
        let waiting = queue::take_back(&tx, queue::Whose::Held(lease.run_id, lease.fence), app.clock.now()).await?;
        tx.commit().await?;
        Ok::<_, Error>(waiting)
    };
    match back.await {
        Ok(waiting) => announce(app, &waiting),
        Err(error) => {
            tracing::warn!(run_id = %lease.run_id, inside = ?error, "a run was not handed back; its lease will lapse")
        }
    }
}

/// Hands back what is still executed, without waiting for it.
pub async fn hand_back_all(app: &App) {
    let held: Vec<Lease> = app.pool.active.iter().map(|entry| entry.0).collect();
    for lease in held {
        app.pool.abandon(lease.run_id, lease.fence);
        hand_back(app, lease).await;
    }
}

/// Renews the leases of the runs executed here, and drops those that were lost.
pub async fn renew_leases(app: &App) -> Result<(), Error> {
    let held = app.pool.active.iter().map(|entry| (entry.0.run_id, entry.0.fence)).collect();
    for (lost, fence) in queue::renew(app, held).await? {
        app.pool.abandon(lost, fence);
    }
    Ok(())
}

/// All that the loop needs to begin or to go on, and what its model calls are charged to.
async fn prepare(app: &App, run: runs::Model) -> Result<(Claim, Origin), Error> {
    let tenant = tenants::Entity::in_tenant(run.tenant_id).one(app.db.read()).await?;
    let tenant = tenant.ok_or_else(|| Error::internal("a run of a tenant that is gone"))?;
    let mut spec: RunSpec = serde_json::from_value(run.spec.clone())?;
    graph::open_tokens(app, tenant.id, &mut spec)?;
    let items = items_after(app, &run, 0, u64::MAX / 2).await?;
    let mut history = Vec::new();
    for (earlier, items) in earlier_runs(app, &run).await? {
        history.extend(transcript(&serde_json::from_value(earlier.spec)?, items));
    }
    let left = TimeDelta::seconds(i64::from(run.timeout_seconds)) - TimeDelta::milliseconds(run.held_ms);
    let claim = Claim {
        lease: Lease { run_id: run.id, fence: run.fence },
        spec,
        history,
        items,
        deadline: run.claimed_at.unwrap_or(run.created_at) + left,
        webhook_secrets: signing_secrets(app, &tenant)?,
    };
    let origin =
        Origin { tenant_id: run.tenant_id, key_id: run.api_key_id, run_limit: run.max_tokens, root: run.agent_id };
    Ok((claim, origin))
}

/// The runs of the conversation that ended before this one began, with their items.
async fn earlier_runs(app: &App, run: &runs::Model) -> Result<Vec<(runs::Model, Vec<Item>)>, Error> {
    let Some(conversation_id) = run.conversation_id else {
        return Ok(Vec::new());
    };
    let earlier = runs::Entity::in_tenant(run.tenant_id)
        .filter(runs::Column::ConversationId.eq(conversation_id))
        .filter(runs::Column::Id.lt(run.id))
        .order_by_asc(runs::Column::Id)
        .all(app.db.read())
        .await?;
    let mut items = items_of(app, run.tenant_id, &earlier).await?;
    let with_items = earlier.into_iter().map(|run| {
        let items = items.remove(&run.id).unwrap_or_default();
        (run, items)
    });
    Ok(with_items.collect())
}

/// Whom a run's model calls are charged to.
struct Origin {
    tenant_id: Uuid,
    key_id: Option<Uuid>,
    run_limit: Option<i64>,
    root: Uuid,
}

/// The gateway as the shared pool's runs see it.
struct GatewayModel {
    app: App,
    origin: Origin,
}

impl Model for GatewayModel {
    fn respond(&self, call: ModelCall) -> BoxStream<'static, Result<ModelEvent, ModelError>> {
        let Some(model) = self.app.catalog.get(&call.request.model) else {
            let message = format!("The model {:?} is no longer in the catalogue.", call.request.model);
            let code = RunErrorCode::ModelUnavailable;
            return Box::pin(futures_util::stream::iter([Err(ModelError::Failed { code, message })]));
        };
        let (root, agent) = (self.origin.root, call.agent_id);
        let path = if root == agent { root.to_string() } else { format!("{root}/{agent}") };
        let origin = CallOrigin {
            tenant_id: self.origin.tenant_id,
            key_id: self.origin.key_id,
            run_id: Some(call.lease.run_id),
            run_limit: self.origin.run_limit,
            turn: i32::try_from(call.turn).ok(),
            agent_id: Some(agent),
            agent_version: call.agent_version,
            agent_path: Some(path),
            model,
        };
        let journal = JournalWrite { lease: call.lease, recorder: call.recorder };
        gateway::call(&self.app, origin, call.request, Some(journal))
    }
}
