//! What the flows of one run share: its agents, its journal, what it reaches of the world, and how long it may take.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::try_join_all;
use tokio::sync::{OnceCell, Semaphore, SemaphorePermit};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::toolbox::Toolbox;
use super::{Outcome, Ports};
use crate::item::{Body, RunError, RunStatus, Step};
use crate::journal::{Addition, JournalError, Progress};
use crate::mcp::McpSessions;
use crate::spec::{AgentSpec, Agents, Lease, Tool};

/// How long an append is tried again while the journal can't be reached: less than a lease lasts (30 s), after which
/// the run is another worker's.
const JOURNAL_PATIENCE: Duration = Duration::from_secs(20);
/// Nested runs of a run, in all: agents that are each other's tools could go on for ever.
const NESTED_RUNS: usize = 500;
/// Model calls of a run at once.
const MODEL_CALLS: usize = 16;
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(3);

/// What the flows of a run share.
pub struct World {
    /// The right to write the run's journal.
    pub lease: Lease,
    /// The run's agents.
    pub agents: Arc<Agents>,
    /// What the run reaches.
    pub ports: Ports,
    /// Its sessions with MCP servers.
    pub mcp: McpSessions,
    /// Standard-Webhooks secrets; each one signs.
    pub secrets: Vec<String>,
    /// Cancelled when the run is to be handed back after the turn in progress.
    pub hand_back: CancellationToken,
    /// When the run's time is over.
    pub deadline: Instant,
    /// Items of the journal that flows have taken in. What a flow appends stands behind them.
    seen: AtomicI64,
    used_call_ids: Mutex<HashSet<String>>,
    /// Items of nested runs that were stored before this claim, each with how often the run had waited by then.
    nested: Mutex<HashMap<String, Vec<(usize, Step)>>>,
    /// How often the run has waited for decisions before this claim.
    pub pauses: usize,
    toolboxes: Mutex<HashMap<Uuid, Arc<OnceCell<Arc<Toolbox>>>>>,
    /// Nested runs that have begun, in this claim and before.
    nested_count: AtomicUsize,
    calls: Semaphore,
}

/// Why a flow does not go on.
#[derive(Clone, Debug)]
pub enum Halt {
    /// The worker is done with the run.
    With(Outcome),
    /// The tokens of the month are used up.
    QuotaExhausted,
    /// The whole run fails, from whatever depth.
    Fails(RunError),
    /// The run's time is over.
    TimeOver,
}

impl From<JournalError> for Halt {
    fn from(error: JournalError) -> Self {
        Halt::With(error.into())
    }
}

impl World {
    /// A world in which `stored` is in the journal. The items of nested runs are kept for when they go on; the others
    /// are returned.
    pub fn new(
        lease: Lease,
        agents: Arc<Agents>,
        ports: Ports,
        secrets: Vec<String>,
        hand_back: CancellationToken,
        deadline: Instant,
        stored: Vec<Step>,
    ) -> (Self, Vec<Step>) {
        let seen = AtomicI64::new(i64::try_from(stored.len()).unwrap_or(i64::MAX));
        let used_call_ids = stored.iter().filter_map(called).collect();
        let mut nested: HashMap<String, Vec<(usize, Step)>> = HashMap::new();
        let mut own = Vec::new();
        let mut pauses = 0;
        for step in stored {
            pauses += usize::from(matches!(&step.body, Body::Status { status: RunStatus::WaitingApproval, .. }));
            match &step.scope {
                Some(scope) => nested.entry(scope.clone()).or_default().push((pauses, step)),
                None => own.push(step),
            }
        }
        let nested_count = AtomicUsize::new(nested.len());
        let world = Self {
            lease,
            agents,
            mcp: ports.mcp.sessions(),
            ports,
            secrets,
            hand_back,
            deadline,
            seen,
            used_call_ids: Mutex::new(used_call_ids),
            nested: Mutex::new(nested),
            pauses,
            toolboxes: Mutex::default(),
            nested_count,
            calls: Semaphore::new(MODEL_CALLS),
        };
        (world, own)
    }

    /// The earliest sequence that an item appended now can have.
    pub fn next_sequence(&self) -> i64 {
        self.seen.load(Ordering::SeqCst) + 1
    }

    /// Call ids that the run has used, in whatever scope.
    pub fn used_call_ids(&self) -> HashSet<String> {
        locked(&self.used_call_ids).clone()
    }

    /// Notes that an item is stored.
    pub fn see(&self, step: &Step) {
        self.seen.fetch_add(1, Ordering::SeqCst);
        locked(&self.used_call_ids).extend(called(step));
    }

    /// Whether one more nested run may begin, or go on that was stored: a run has so many at most, however they nest.
    pub fn may_nest(&self, scope: &str) -> bool {
        if locked(&self.nested).contains_key(scope) {
            return true;
        }
        self.nested_count.fetch_add(1, Ordering::SeqCst) < NESTED_RUNS
    }

    /// A place for one more model call, if there is one: the run's flows share so many.
    pub fn free_place_for_call(&self) -> Option<SemaphorePermit<'_>> {
        self.calls.try_acquire().ok()
    }

    /// Waits for a place.
    pub async fn place_for_call(&self) -> Option<SemaphorePermit<'_>> {
        // It is never closed.
        self.calls.acquire().await.ok()
    }

    /// The items of a nested run that were stored before this claim, each with how often the run had waited by then.
    pub fn stored(&self, scope: &str) -> Vec<(usize, Step)> {
        locked(&self.nested).get(scope).cloned().unwrap_or_default()
    }

    /// Stores items, again and again while the journal can't be reached.
    ///
    /// # Errors
    /// The lease is lost, or the journal could not be reached for too long.
    pub async fn append(&self, Addition { from_sequence, steps }: &Addition) -> Result<(), JournalError> {
        let give_up = Instant::now() + JOURNAL_PATIENCE;
        let mut pause = FIRST_PAUSE;
        // The same for each attempt: a repetition is known by it.
        loop {
            match self.ports.journal.append(self.lease, *from_sequence, steps.clone()).await {
                Err(JournalError::Unavailable(reason)) if Instant::now() + pause < give_up => {
                    tracing::warn!(%reason, "the journal can't be reached; trying again");
                    sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
                settled => return settled,
            }
        }
    }

    /// Tells subscribers of progress.
    pub async fn progress(&self, progress: Progress) {
        self.ports.journal.progress(self.lease, progress).await;
    }

    /// What an agent has to call, the same for the whole claim.
    ///
    /// # Errors
    /// A server could not be asked for its tools, or two tools have one name; for people.
    pub async fn toolbox(&self, agent: &AgentSpec) -> Result<Arc<Toolbox>, String> {
        // A cell an agent: no flow waits for another agent's servers.
        let cell = locked(&self.toolboxes).entry(agent.id).or_default().clone();
        cell.get_or_try_init(|| self.filled(agent)).await.cloned()
    }

    async fn filled(&self, agent: &AgentSpec) -> Result<Arc<Toolbox>, String> {
        let servers = agent.tools.iter().filter_map(|tool| match tool {
            Tool::Mcp(server) => Some(server),
            _ => None,
        });
        let listed = try_join_all(servers.map(async |server| {
            let tools = self.mcp.list(server).await.map_err(|error| error.to_string())?;
            Ok::<_, String>((Arc::new(server.clone()), tools))
        }));
        Ok(Arc::new(Toolbox::new(agent, &self.agents, listed.await?)?))
    }

    /// Waits no longer than the run may take. Appends are never waited for this way: one that is cut may or may not
    /// have been stored.
    ///
    /// # Errors
    /// The time is over.
    pub async fn in_time<T>(&self, work: impl Future<Output = T>) -> Result<T, Halt> {
        tokio::select! {
            biased;
            () = sleep_until(self.deadline) => Err(Halt::TimeOver),
            done = work => Ok(done),
        }
    }
}

fn called(step: &Step) -> Option<String> {
    match &step.body {
        Body::ToolCall { call_id, .. } => Some(call_id.clone()),
        _ => None,
    }
}

/// A panic in between leaves nothing half done in what is locked here.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
