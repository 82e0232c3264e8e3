//! What runs are doing right now, told to subscribers in this process. Nothing here is durable: what
//! is lost is made up for by the journal's items.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cloister_runtime::item::Item;
use cloister_runtime::journal::Progress;
use cloister_runtime::spec::Lease;
use dashmap::DashMap;
use tokio::sync::broadcast;
use uuid::Uuid;

/// Signals a subscriber may lag behind before deltas of the turn are dropped for it.
const BUFFER: usize = 1024;

/// What a subscriber is told.
#[derive(Clone, Debug)]
pub enum Signal {
    /// Items that were stored.
    Items(Arc<Vec<Item>>),
    /// Progress within a turn.
    Progress(Progress),
}

/// The runs that somebody watches or works on.
#[derive(Default)]
pub struct Live {
    runs: DashMap<Uuid, Arc<LiveRun>>,
}

struct LiveRun {
    signals: broadcast::Sender<Signal>,
    turn: Mutex<Turn>,
}

/// What has been streamed of the turn in progress.
#[derive(Clone, Debug, Default)]
pub struct Turn {
    /// The worker that streams it; an earlier one's progress is ignored.
    fence: i64,
    number: u32,
    restarted: bool,
    parts: BTreeMap<u32, Progress>,
}

impl Turn {
    /// The turn so far, as one delta a part; first of all whether it began anew.
    pub fn so_far(self) -> impl Iterator<Item = Progress> {
        let restarted = (self.restarted && self.number > 0).then_some(Progress::Restarted { turn: self.number });
        restarted.into_iter().chain(self.parts.into_values())
    }

    fn begin(&mut self, number: u32) {
        if self.number != number {
            *self = Turn { fence: self.fence, number, ..Turn::default() };
        }
    }

    fn add(&mut self, progress: &Progress) {
        match progress {
            Progress::Text { turn, index, text, .. } => {
                self.begin(*turn);
                match self.parts.get_mut(index) {
                    Some(Progress::Text { text: so_far, .. }) => so_far.push_str(text),
                    _ => drop(self.parts.insert(*index, progress.clone())),
                }
            }
            Progress::Arguments { turn, index, text, .. } => {
                self.begin(*turn);
                match self.parts.get_mut(index) {
                    Some(Progress::Arguments { text: so_far, .. }) => so_far.push_str(text),
                    _ => drop(self.parts.insert(*index, progress.clone())),
                }
            }
            Progress::Restarted { turn } => {
                *self = Turn { fence: self.fence, number: *turn, restarted: true, parts: BTreeMap::new() };
            }
        }
    }
}

/// A subscriber's place.
pub struct Subscription {
    /// What is told from now on.
    pub signals: broadcast::Receiver<Signal>,
    /// What had been streamed before.
    pub turn: Turn,
}

impl Live {
    /// Listens to a run.
    pub fn subscribe(&self, run_id: Uuid) -> Subscription {
        let run = self.run(run_id);
        // Under the lock, so that nothing is both in `turn` and in `signals`, or in neither.
        let turn = lock(&run.turn);
        Subscription { signals: run.signals.subscribe(), turn: turn.clone() }
    }

    /// Forgets a run that nobody watches any more, unless it is being worked on.
    pub fn unsubscribed(&self, run_id: Uuid) {
        self.runs.remove_if(&run_id, |_, run| run.signals.receiver_count() == 0 && lock(&run.turn).number == 0);
    }

    /// Tells of progress by the worker with this lease.
    pub fn progress(&self, lease: Lease, progress: Progress) {
        let run = self.run(lease.run_id);
        let mut turn = lock(&run.turn);
        if lease.fence < turn.fence {
            return;
        }
        turn.fence = lease.fence;
        turn.add(&progress);
        // Nobody listening is no fault.
        let _ = run.signals.send(Signal::Progress(progress));
    }

    /// Tells of stored items. With the run's end it is forgotten; subscribers see the channel close.
    pub fn items(&self, run_id: Uuid, items: Vec<Item>, ended: bool) {
        let run = if ended { self.runs.remove(&run_id).map(|(_, run)| run) } else { self.watched(run_id) };
        if let Some(run) = run {
            // Under the lock, so that a subscriber has the turn's text or its item.
            let _turn = lock(&run.turn);
            let _ = run.signals.send(Signal::Items(Arc::new(items)));
        }
    }

    /// Forgets a run that this process works on no longer.
    pub fn forget(&self, run_id: Uuid) {
        if let Some(run) = self.watched(run_id) {
            *lock(&run.turn) = Turn::default();
        }
        self.unsubscribed(run_id);
    }

    fn run(&self, run_id: Uuid) -> Arc<LiveRun> {
        let new = || Arc::new(LiveRun { signals: broadcast::Sender::new(BUFFER), turn: Mutex::default() });
        self.runs.entry(run_id).or_insert_with(new).clone()
    }

    fn watched(&self, run_id: Uuid) -> Option<Arc<LiveRun>> {
        self.runs.get(&run_id).map(|run| run.clone())
    }
}

/// A panic while the lock was held can't leave a turn half written.
fn lock(turn: &Mutex<Turn>) -> MutexGuard<'_, Turn> {
    turn.lock().unwrap_or_else(PoisonError::into_inner)
}
