//! Claims a tenant's runs and executes them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use cloister_runtime::ids;
use cloister_runtime::mcp::McpClient;
use cloister_runtime::protocol::{
    Accepted, ClaimRequest, Claims, HeartbeatRequest, Heartbeats, MAX_CLAIMS, ReleaseRequest, Standing,
};
use cloister_runtime::run::{Outcome, Ports, Stop, run};
use cloister_runtime::spec::{Claim, Lease};
use cloister_runtime::webhook::WebhookClient;
use futures_util::future::join_all;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::remote::{Api, ApiError, PATIENCE, RemoteRun};

/// How long a claim waits at the api while there is nothing.
const WAIT: Duration = Duration::from_secs(20);
/// How long leases last until the api has said it.
const LEASE: Duration = Duration::from_secs(30);
/// A run whose turn came to nothing for want of the api is given back after this, so that it isn't tried without end.
const BREATH: Duration = Duration::from_millis(500);
/// How long giving a run back may take when the worker goes.
const FAREWELL: Duration = Duration::from_secs(3);

/// A worker.
pub struct Worker {
    api: Arc<Api>,
    webhooks: WebhookClient,
    mcp: McpClient,
    /// The name that its runs are noted under.
    name: Option<String>,
    places: Arc<Semaphore>,
    held: Mutex<HashMap<Uuid, Held>>,
    /// Told whenever a run is held no longer.
    freed: Notify,
    lease_ms: AtomicU64,
    in_touch: AtomicBool,
    /// No more claims; runs are given back after their turn.
    stopping: CancellationToken,
}

/// A run that is executed here.
struct Held {
    lease: Lease,
    stop: Stop,
    /// When the lease was last known to hold.
    renewed: Instant,
}

impl Worker {
    /// A worker that executes up to `concurrency` runs at once.
    pub fn new(
        api: Arc<Api>,
        webhooks: WebhookClient,
        mcp: McpClient,
        name: Option<String>,
        concurrency: u32,
        stopping: CancellationToken,
    ) -> Self {
        Self {
            api,
            webhooks,
            mcp,
            name,
            places: Arc::new(Semaphore::new(concurrency as usize)),
            held: Mutex::default(),
            freed: Notify::new(),
            lease_ms: AtomicU64::new(LEASE.as_millis() as u64),
            in_touch: AtomicBool::new(false),
            stopping,
        }
    }

    /// Whether the api answered the last claim.
    pub fn is_ready(&self) -> bool {
        self.in_touch.load(Ordering::Relaxed) && !self.stopping.is_cancelled()
    }

    /// Runs executed now.
    pub fn active(&self) -> usize {
        self.held().len()
    }

    /// Claims runs and begins them, until the worker is to stop.
    pub async fn claim(self: &Arc<Self>) {
        let mut pauses = backoff();
        loop {
            let places = tokio::select! {
                biased;
                () = self.stopping.cancelled() => return,
                places = self.free_places() => places,
            };
            let Some(mut places) = places else { return };
            let max = u32::try_from(places.num_permits()).unwrap_or(1);
            // Out of touch, it asks for an answer at once: until there is one, it isn't ready.
            let wait = if self.is_ready() { WAIT } else { Duration::ZERO };
            let request = ClaimRequest { max, wait_ms: wait.as_millis() as u64, worker: self.name.clone() };
            let claimed: Result<Claims, ApiError> = tokio::select! {
                biased;
                // The api takes back what it would have answered.
                () = self.stopping.cancelled() => return,
                claimed = self.api.post("claims", &request, WAIT + PATIENCE) => claimed,
            };
            self.in_touch.store(claimed.is_ok(), Ordering::Relaxed);
            match claimed {
                Ok(Claims { claims, lease_ms }) => {
                    pauses = backoff();
                    self.lease_ms.store(lease_ms.max(1), Ordering::Relaxed);
                    for claim in claims {
                        let place = places.split(1);
                        self.begin(claim, place);
                    }
                }
                Err(error) => {
                    metrics::counter!("cloister_runtime_api_errors_total").increment(1);
                    tracing::warn!(%error, "runs could not be claimed; trying again");
                    tokio::select! {
                        () = sleep(pauses.next().unwrap_or(LONGEST_PAUSE)) => {}
                        () = self.stopping.cancelled() => return,
                    }
                }
            }
        }
    }

    /// Waits for a free place, and takes as many as a claim may fill.
    async fn free_places(&self) -> Option<OwnedSemaphorePermit> {
        let mut places = self.places.clone().acquire_owned().await.ok()?;
        let more = self.places.available_permits().min(MAX_CLAIMS as usize - 1);
        if let Ok(more) = self.places.clone().try_acquire_many_owned(u32::try_from(more).unwrap_or(0)) {
            places.merge(more);
        }
        Some(places)
    }

    fn begin(self: &Arc<Self>, claim: Claim, place: Option<OwnedSemaphorePermit>) {
        let lease = claim.lease;
        let stop = Stop { abandon: CancellationToken::new(), hand_back: self.stopping.child_token() };
        let held = Held { lease, stop: stop.clone(), renewed: Instant::now() };
        if let Some(older) = self.held().insert(lease.run_id, held) {
            older.stop.abandon.cancel();
        }
        metrics::counter!("cloister_runtime_claims_total").increment(1);
        let worker = self.clone();
        tokio::spawn(async move {
            let _place = place;
            let outcome = worker.execute(claim, &stop).await;
            metrics::counter!("cloister_runtime_runs_total", "outcome" => label(outcome)).increment(1);
            tracing::info!(run_id = %ids::run_id(lease.run_id), outcome = label(outcome), "a run was executed");
            if matches!(outcome, Outcome::HandedBack | Outcome::JournalUnavailable) {
                worker.give_back(lease).await;
            }
            worker.forget(lease);
        });
    }

    /// A run that panics is given back: another worker may do better.
    async fn execute(&self, claim: Claim, stop: &Stop) -> Outcome {
        let remote = Arc::new(RemoteRun::new(self.api.clone(), stop.hand_back.clone()));
        let ports =
            Ports { model: remote.clone(), journal: remote, webhooks: self.webhooks.clone(), mcp: self.mcp.clone() };
        let (run_id, stop) = (claim.lease.run_id, stop.clone());
        let running = tokio::spawn(async move { run(claim, &ports, &stop).await });
        running.await.unwrap_or_else(|error| {
            tracing::error!(run_id = %ids::run_id(run_id), %error, "a run failed on our side");
            Outcome::HandedBack
        })
    }

    async fn give_back(&self, lease: Lease) {
        if !self.stopping.is_cancelled() {
            sleep(BREATH).await;
        }
        let mut pauses = backoff();
        let until = Instant::now() + self.lease();
        loop {
            let Err(error) = self.release(lease).await else { return };
            let pause = pauses.next().unwrap_or(LONGEST_PAUSE);
            // Refused, the run is not ours; after its lease it is anyone's.
            if matches!(error, ApiError::Refused(_)) || Instant::now() + pause > until {
                tracing::debug!(run_id = %ids::run_id(lease.run_id), %error, "a run was not given back");
                return;
            }
            sleep(pause).await;
        }
    }

    async fn release(&self, lease: Lease) -> Result<(), ApiError> {
        let path = format!("runs/{}/release", lease.run_id);
        let _: Accepted = self.api.post(&path, &ReleaseRequest { lease }, FAREWELL).await?;
        Ok(())
    }

    /// Keeps the leases of the runs executed here, and drops those that are lost.
    pub async fn keep_leases(&self) {
        loop {
            let renewed = Instant::now();
            // In steps: the first claim tells how long a lease is.
            while renewed.elapsed() < self.lease() / 3 {
                sleep((self.lease() / 3).min(Duration::from_secs(1))).await;
            }
            while !self.renew_leases().await {
                self.drop_lapsed();
                sleep((self.lease() / 10).min(LONGEST_PAUSE)).await;
            }
        }
    }

    async fn renew_leases(&self) -> bool {
        let leases: Vec<Lease> = self.held().values().map(|held| held.lease).collect();
        if leases.is_empty() {
            return true;
        }
        let asked = Instant::now();
        match self.api.post("heartbeats", &HeartbeatRequest { leases }, PATIENCE).await {
            Ok(Heartbeats { runs }) => {
                self.take(&runs.into_iter().collect(), asked);
                true
            }
            Err(error) => {
                metrics::counter!("cloister_runtime_api_errors_total").increment(1);
                tracing::warn!(%error, "leases could not be renewed; trying again");
                false
            }
        }
    }

    /// Does what the api says of runs that were held when it was asked.
    fn take(&self, standings: &HashMap<Uuid, Standing>, asked: Instant) {
        for (run_id, held) in self.held().iter_mut().filter(|(_, held)| held.renewed <= asked) {
            let Some(standing) = standings.get(run_id) else { continue };
            if standing.cancel {
                held.stop.abandon.cancel();
                continue;
            }
            held.renewed = asked;
            if standing.pause {
                held.stop.hand_back.cancel();
            }
        }
    }

    /// A run whose lease can't hold any more may be another worker's by now.
    fn drop_lapsed(&self) {
        let lease = self.lease();
        for held in self.held().values().filter(|held| held.renewed.elapsed() > lease) {
            held.stop.abandon.cancel();
        }
    }

    /// Waits until no run is executed any more, `grace` at most; then drops the rest, and gives them back.
    pub async fn finish(&self, grace: Duration) {
        if timeout(grace, self.idle()).await.is_ok() {
            return;
        }
        let left: Vec<Lease> = self.held().values().map(|held| held.lease).collect();
        tracing::warn!(runs = left.len(), "giving back what is still running");
        for held in self.held().values() {
            held.stop.abandon.cancel();
        }
        for (released, lease) in join_all(left.iter().map(|lease| self.release(*lease))).await.into_iter().zip(&left) {
            if let Err(error) = released {
                tracing::warn!(run_id = %ids::run_id(lease.run_id), %error, "a run was not given back; its lease will lapse");
            }
        }
    }

    async fn idle(&self) {
        loop {
            let freed = self.freed.notified();
            if self.active() == 0 {
                return;
            }
            freed.await;
        }
    }

    /// Forgets this claim of a run; a later one may have taken its place.
    fn forget(&self, lease: Lease) {
        let mut held = self.held();
        if held.get(&lease.run_id).is_some_and(|held| held.lease == lease) {
            held.remove(&lease.run_id);
        }
        self.freed.notify_waiters();
    }

    fn lease(&self) -> Duration {
        Duration::from_millis(self.lease_ms.load(Ordering::Relaxed))
    }

    fn held(&self) -> MutexGuard<'_, HashMap<Uuid, Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const LONGEST_PAUSE: Duration = Duration::from_secs(5);

fn backoff() -> impl Iterator<Item = Duration> {
    ExponentialBuilder::default()
        .with_jitter()
        .with_min_delay(Duration::from_millis(200))
        .with_max_delay(LONGEST_PAUSE)
        .without_max_times()
        .build()
}

fn label(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Ended => "ended",
        Outcome::Paused => "paused",
        Outcome::Waiting => "waiting",
        Outcome::HandedBack => "handed_back",
        Outcome::LeaseLost => "lease_lost",
        Outcome::JournalUnavailable => "journal_unavailable",
    }
}
