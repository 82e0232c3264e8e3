//! The shared pool: claims runs of the queue and executes them in this process.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use cloister_runtime::run::{Outcome, Ports, Stop, run};
use cloister_runtime::spec::{Lease, RunSpec};
use dashmap::DashMap;
use entity::{quota_reservations, runs};
use futures_util::FutureExt;
use futures_util::future::join_all;
use sea_orm::{DatabaseTransaction, DbErr};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::claimed::{GatewayModel, lease_of, prepare, prepare_with, retry_or_fail, try_hand_back};
use super::journal::DatabaseJournal;
use super::queue::Claimed;
use super::wakes::Bell;
use super::{announce, queue};
use crate::app::App;
use crate::error::Error;
use crate::models::gateway;
use crate::tenants::changes::Change;

/// How often the queue is looked into without being told of a change.
const POLL: Duration = Duration::from_millis(500);

/// Runs claimed at once.
const CLAIMS: usize = 32;

/// How long a claim, or handing back at the end, may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Places to execute runs in, free again when it is dropped.
pub type Place = OwnedSemaphorePermit;

/// The runs that this process executes, and those whose workers apart have it call a model.
pub struct Pool {
    /// One for each run that may be executed at once.
    places: Arc<Semaphore>,
    active: DashMap<Uuid, (Lease, Stop)>,
    /// By run and nested run.
    answering: DashMap<Uuid, BTreeMap<Option<String>, (Lease, CancellationToken)>>,
    /// Runs that are about to be stored or queued again, of which nobody was told yet.
    entering: DashMap<Uuid, runs::Model>,
}

impl Pool {
    /// A pool that executes `concurrency` runs at once.
    pub fn new(concurrency: usize) -> Self {
        let places = Arc::new(Semaphore::new(concurrency));
        Self { places, active: DashMap::new(), answering: DashMap::new(), entering: DashMap::new() }
    }

    /// Free places, at most so many, to execute runs in. None if there is none, or the process is about to stop.
    pub fn take_places(&self, app: &App, most: usize) -> Option<Place> {
        loop {
            let free = Ord::min(self.places.available_permits(), most);
            if free == 0 || app.stopping.is_cancelled() {
                return None;
            }
            // Somebody may have been faster.
            let free = u32::try_from(free).unwrap_or(u32::MAX);
            if let Ok(places) = self.places.clone().try_acquire_many_owned(free) {
                return Some(places);
            }
        }
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
        if let Some(calls) = self.answering.get(&run_id) {
            for (lease, abandoned) in calls.values() {
                if lease.fence <= fence {
                    abandoned.cancel();
                }
            }
        }
    }

    /// Notes that a worker apart waits here for a model's answer to a run, or to one nested in it, until what is returned
    /// is dropped. None if it does so already. An older claim's call gives way.
    pub fn answer(app: &App, lease: Lease, scope: Option<&str>) -> Option<Answering> {
        let scope = scope.map(str::to_owned);
        let answering =
            Answering { app: app.clone(), lease, scope: scope.clone(), abandoned: CancellationToken::new() };
        let mut calls = app.pool.answering.entry(lease.run_id).or_default();
        if calls.get(&scope).is_some_and(|(held, _)| held.fence >= lease.fence) {
            return None;
        }
        if let Some((_, older)) = calls.insert(scope, (lease, answering.abandoned.clone())) {
            older.cancel();
        }
        drop(calls);
        Some(answering)
    }

    /// Tells that a run was claimed.
    pub fn tell_claimed(&self, app: &App, run: &runs::Model) {
        self.tell_queued(app, run.id);
        announce(app, std::slice::from_ref(run));
    }

    /// Whether a worker apart waits here for a model's answer by this lease.
    pub fn answers(&self, lease: Lease) -> bool {
        self.answering.get(&lease.run_id).is_some_and(|calls| calls.values().any(|(held, _)| *held == lease))
    }

    /// Commits what lets runs into the queue, or claims them for this pool at once, and tells that they are queued; those
    /// that are, are for others to claim. Whoever claims a run before that tells in our place ([`Pool::tell_queued`]), so
    /// that no subscriber hears RUNNING before QUEUED.
    pub async fn commit_queued(
        &self,
        app: &App,
        tx: DatabaseTransaction,
        runs: &[runs::Model],
        is_queued: impl Fn(&runs::Model) -> bool,
    ) -> Result<(), DbErr> {
        let _entering: Vec<Entering<'_>> = runs.iter().map(|run| Entering::new(self, run)).collect();
        tx.commit().await?;
        for run in runs {
            self.tell_queued(app, run.id);
        }
        for pool in runs.iter().filter(|run| is_queued(run)).map(|run| run.pool.as_str()).collect::<BTreeSet<_>>() {
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

/// A worker apart that waits here for a model's answer.
pub struct Answering {
    app: App,
    lease: Lease,
    scope: Option<String>,
    abandoned: CancellationToken,
}

impl Answering {
    /// Waits until the run is not the worker's any more: it was cancelled, or taken from it.
    pub async fn abandoned(&self) {
        self.abandoned.cancelled().await;
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        let answering = &self.app.pool.answering;
        answering.alter(&self.lease.run_id, |_, mut calls| {
            if calls.get(&self.scope).is_some_and(|(held, _)| *held == self.lease) {
                calls.remove(&self.scope);
            }
            calls
        });
        answering.remove_if(&self.lease.run_id, |_, calls| calls.is_empty());
        if self.scope.is_none() {
            self.app.live.forget(self.lease.run_id);
        }
    }
}

/// Claims and executes until the process is asked to stop.
pub async fn work(app: App) {
    let bell = app.wakes.bell(queue::SHARED);
    while !app.stopping.is_cancelled() {
        if claim(&app, &bell).await {
            continue;
        }
        tokio::select! {
            () = bell.rung() => {}
            () = tokio::time::sleep(POLL) => {}
            () = app.stopping.cancelled() => {}
        }
    }
}

/// Claims what there is room for. Whether there may be more.
async fn claim(app: &App, bell: &Bell) -> bool {
    let Some(mut places) = app.pool.take_places(app, CLAIMS) else { return false };
    bell.look();
    let claim = tokio::time::timeout(PATIENCE, queue::claim(app, queue::SHARED, places.num_permits(), None));
    // Should a claim succeed whose answer never came, its leases lapse.
    let late = || Error::Unavailable(format!("a claim took longer than {} s", PATIENCE.as_secs()));
    let claimed = match claim.await.unwrap_or_else(|_| Err(late())) {
        Ok(Claimed::NothingWaits) => {
            bell.nothing_waits();
            return false;
        }
        Ok(Claimed::Runs(runs)) => runs,
        Err(error) => {
            tracing::error!(inside = ?error, "runs could not be claimed");
            Vec::new()
        }
    };
    let any = !claimed.is_empty();
    for run in claimed {
        if let Some(place) = places.split(1) {
            begin(app, run, place, AtHand::default());
        }
    }
    any
}

/// What its start has at hand of a run that was claimed with it.
#[derive(Default)]
pub struct AtHand {
    /// Its spec, with which it was stored.
    pub spec: Option<RunSpec>,
    /// What is reserved for its first model call.
    pub reserved: Option<quota_reservations::Model>,
}

/// Executes a run that was claimed.
pub fn begin(app: &App, claimed: runs::Model, place: Place, at_hand: AtHand) {
    let lease = lease_of(&claimed);
    let stop = Stop { abandon: Default::default(), hand_back: app.stopping.child_token() };
    app.pool.active.insert(lease.run_id, (lease, stop.clone()));
    app.live.begin(lease.run_id, claimed.next_sequence);
    app.pool.tell_claimed(app, &claimed);
    let app = app.clone();
    app.clone().tasks.spawn(async move {
        let AtHand { spec, reserved } = at_hand;
        let model = Arc::new(GatewayModel::with(&app, &claimed, reserved));
        let execution = execute(&app, &claimed, spec, model.clone(), &stop);
        let outcome = AssertUnwindSafe(execution).catch_unwind().await;
        let outcome = outcome.unwrap_or_else(|_| Err(Error::internal("its execution panicked")));
        if let Some(unused) = model.take_reserved() {
            gateway::forget(&app, unused);
        }
        // Only this claim's entry: a later claim of the same run may have taken its place.
        app.pool.active.remove_if(&lease.run_id, |_, (held, _)| *held == lease);
        app.live.forget(lease.run_id);
        match outcome {
            Ok(
                Outcome::Ended | Outcome::Paused | Outcome::Waiting | Outcome::LeaseLost | Outcome::JournalUnavailable,
            ) => {}
            Ok(Outcome::HandedBack) => try_hand_back(&app, lease).await,
            Err(error) => retry_or_fail(&app, &claimed, &error).await,
        }
        drop(place);
        app.wakes.free(queue::SHARED);
    });
}

async fn execute(
    app: &App,
    claimed: &runs::Model,
    spec: Option<RunSpec>,
    model: Arc<GatewayModel>,
    stop: &Stop,
) -> Result<Outcome, Error> {
    let claim = match spec {
        Some(spec) => prepare_with(app, claimed, spec).await?,
        None => prepare(app, claimed).await?,
    };
    let ports = Ports {
        model,
        journal: Arc::new(DatabaseJournal::new(app, claimed)),
        webhooks: app.webhooks.clone(),
        mcp: app.mcp.clone(),
    };
    Ok(run(claim, &ports, stop).await)
}

/// Hands back what is still executed, without waiting for it.
pub async fn hand_back_all(app: &App) {
    let held: Vec<Lease> = app.pool.active.iter().map(|entry| entry.0).collect();
    let back = held.into_iter().map(|lease| {
        app.pool.abandon(lease.run_id, lease.fence);
        try_hand_back(app, lease)
    });
    if tokio::time::timeout(PATIENCE, join_all(back)).await.is_err() {
        tracing::warn!("not all runs were handed back; their leases will lapse");
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
