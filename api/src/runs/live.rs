//! What runs are doing right now, told to subscribers here and on other replicas. Nothing here is durable: what is
//! lost is made up for by the journal's items.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cloister_runtime::item::Item;
use cloister_runtime::journal::Progress;
use cloister_runtime::spec::Lease;
use dashmap::DashMap;
use entity::runs::Status;
use entity::{TenantOwned, runs};
use sea_orm::{ColumnTrait, QueryFilter, QuerySelect};
use tokio::sync::broadcast;
use uuid::Uuid;

use super::turn::{Delta, Turn};
use crate::app::App;
use crate::bus::{Bus, Topic, What};
use crate::error::Error;

/// Signals a subscriber may lag behind before it must read the journal again.
const BUFFER: usize = 256;

/// What a subscriber is told.
#[derive(Clone, Debug)]
pub enum Signal {
    /// Items that were stored.
    Items(Arc<Vec<Item>>),
    /// Progress within a turn.
    Delta(Arc<Delta>),
    /// Items were stored that are not told, up to before this sequence: they are in the journal.
    Look(i64),
}

/// A subscriber's place.
pub struct Subscription {
    /// What is told from now on.
    pub signals: broadcast::Receiver<Signal>,
    /// What had been streamed before.
    pub turn: Turn,
    /// The sequence after the newest item that was told, where the run is executed here: nothing else is stored of it but
    /// what other replicas add (a decision, a cancel), of which this one hears as of what is stored from now on.
    pub next_sequence: Option<i64>,
}

/// The runs that somebody watches or works on.
pub struct Live {
    bus: Bus,
    runs: DashMap<Uuid, Arc<LiveRun>>,
}

struct LiveRun {
    signals: broadcast::Sender<Signal>,
    progress: Mutex<InProgress>,
}

#[derive(Default)]
struct InProgress {
    turn: Turn,
    /// A worker here is at it, or one that speaks to this replica.
    worked_on: bool,
    /// That worker is this process's own.
    executed: bool,
    /// The sequence after the newest item that was told.
    next_sequence: i64,
}

impl Live {
    /// Runs that are watched here and on the replicas that the bus reaches.
    pub fn new(bus: Bus) -> Self {
        Self { bus, runs: DashMap::new() }
    }

    /// Listens to a run, wherever it is worked on. What another replica streamed of the turn in progress comes as
    /// signals, once its stream was read.
    pub fn subscribe(&self, run_id: Uuid) -> Subscription {
        // Under the entry's lock: whoever leaves last and whoever comes first must not cross.
        let run = self.runs.entry(run_id).or_insert_with(new_run);
        if run.signals.receiver_count() == 0 {
            self.bus.listen(Topic::Run(run_id));
        }
        // Under this lock, so that nothing is both in `turn` and in `signals`, or in neither.
        let progress = lock(&run.progress);
        Subscription {
            signals: run.signals.subscribe(),
            turn: progress.turn.clone(),
            next_sequence: progress.executed.then_some(progress.next_sequence),
        }
    }

    /// Notes that a run is executed here from now on, and the sequence after the newest item that it has.
    pub fn begin(&self, run_id: Uuid, next_sequence: i64) {
        let run = self.runs.entry(run_id).or_insert_with(new_run).clone();
        let mut state = lock(&run.progress);
        state.worked_on = true;
        state.executed = true;
        state.next_sequence = Ord::max(state.next_sequence, next_sequence);
    }

    /// Forgets a run that nobody watches any more, unless it is being worked on.
    pub fn unsubscribed(&self, run_id: Uuid) {
        self.runs.remove_if(&run_id, |_, run| {
            let unwatched = run.signals.receiver_count() == 0;
            if unwatched {
                self.bus.leave(Topic::Run(run_id));
            }
            unwatched && !lock(&run.progress).worked_on
        });
    }

    /// Tells of progress by the worker with this lease.
    pub fn progress(&self, lease: Lease, progress: Progress) {
        let run = self.runs.entry(lease.run_id).or_insert_with(new_run).clone();
        let mut state = lock(&run.progress);
        let Some(attempt) = state.turn.attempt_of(lease.fence, &progress) else { return };
        state.worked_on = true;
        if let Some(fresh) = state.turn.take(&Delta { attempt, progress }) {
            let fresh = Arc::new(fresh);
            // Nobody listening is no fault.
            let _ = run.signals.send(Signal::Delta(fresh.clone()));
            self.bus.tell(Topic::Run(lease.run_id), What::Delta(fresh));
        }
    }

    /// Tells of stored items. With the run's end it is forgotten; subscribers see the channel close.
    pub fn items(&self, run_id: Uuid, items: Vec<Item>, ended: bool) {
        let items = Arc::new(items);
        self.bus.tell(Topic::Run(run_id), What::Items { items: items.clone(), ended });
        self.hear_items(run_id, items, ended);
    }

    /// Forgets a run that this process works on no longer.
    pub fn forget(&self, run_id: Uuid) {
        if let Some(run) = self.watched(run_id) {
            let mut state = lock(&run.progress);
            state.worked_on = false;
            state.executed = false;
            state.turn.clear();
        }
        self.unsubscribed(run_id);
    }

    /// Tells subscribers here of progress on another replica.
    pub fn hear(&self, run_id: Uuid, delta: &Delta) {
        if let Some(run) = self.watched(run_id)
            && let Some(fresh) = lock(&run.progress).turn.take(delta)
        {
            let _ = run.signals.send(Signal::Delta(Arc::new(fresh)));
        }
    }

    /// Takes in what a run's stream holds: the items that were told last, and the turn since then, of which subscribers
    /// are told what is new as one delta a part.
    pub fn catch_up(&self, run_id: Uuid, told: impl Iterator<Item = What>) {
        let mut turn = Turn::default();
        for what in told {
            match what {
                What::Delta(delta) => drop(turn.take(&delta)),
                What::Items { items, ended } => self.hear_items(run_id, items, ended),
                What::Look { next_sequence, ended } => self.look(run_id, next_sequence, ended),
                What::Wake(_)
                | What::Abandon { .. }
                | What::Authority { .. }
                | What::Run(_)
                | What::Usage
                | What::Provisioning => {}
            }
        }
        turn.so_far().for_each(|delta| self.hear(run_id, &delta));
    }

    /// Tells subscribers here of items that were stored, by this or another replica.
    pub fn hear_items(&self, run_id: Uuid, items: Arc<Vec<Item>>, ended: bool) {
        let next_sequence = items.last().map_or(0, |item| item.sequence + 1);
        self.stored(run_id, next_sequence, ended, Signal::Items(items));
    }

    /// Has subscribers here look into the journal for the items before `next_sequence`, if nobody told of them.
    pub fn look(&self, run_id: Uuid, next_sequence: i64, ended: bool) {
        self.stored(run_id, next_sequence, ended, Signal::Look(next_sequence));
    }

    /// Tells the other replicas what has been streamed here so far: Redis was away, or is empty.
    pub fn tell_again(&self) {
        for run in &self.runs {
            let state = lock(&run.progress);
            if state.worked_on {
                let so_far = state.turn.clone().so_far();
                so_far.for_each(|delta| self.bus.tell(Topic::Run(*run.key()), What::Delta(Arc::new(delta))));
            }
        }
    }

    fn stored(&self, run_id: Uuid, next_sequence: i64, ended: bool, signal: Signal) {
        let run = match ended {
            true => self.runs.remove_if(&run_id, |_, _| {
                self.bus.leave(Topic::Run(run_id));
                true
            }),
            false => None,
        };
        if let Some(run) = run.map(|(_, run)| run).or_else(|| self.watched(run_id)) {
            // Under the lock, so that a subscriber has the turn's text or its item.
            let mut state = lock(&run.progress);
            if next_sequence > state.next_sequence {
                state.next_sequence = next_sequence;
                let _ = run.signals.send(signal);
            }
        }
    }

    fn watched(&self, run_id: Uuid) -> Option<Arc<LiveRun>> {
        self.runs.get(&run_id).map(|run| run.clone())
    }
}

fn new_run() -> Arc<LiveRun> {
    Arc::new(LiveRun { signals: broadcast::Sender::new(BUFFER), progress: Mutex::default() })
}

/// A panic while the lock was held can't leave a turn half written.
fn lock(progress: &Mutex<InProgress>) -> MutexGuard<'_, InProgress> {
    progress.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Looks, in one statement, whether more was stored of the runs that are watched here than was told, as where Redis
/// lost a message or is away: then subscribers look into the journal.
pub async fn follow_journals(app: &App) -> Result<(), Error> {
    /// Runs in one statement, within what PostgreSQL takes as parameters.
    const CHUNK: usize = 10_000;
    let watched = app.live.runs.iter().filter(|run| run.signals.receiver_count() > 0);
    let watched: Vec<Uuid> = watched.map(|run| *run.key()).collect();
    for ids in watched.chunks(CHUNK) {
        let stored: Vec<(Uuid, i64, Status)> = runs::Entity::across_tenants()
            .filter(runs::Column::Id.is_in(ids.iter().copied()))
            .select_only()
            .columns([runs::Column::Id, runs::Column::NextSequence, runs::Column::Status])
            .into_tuple()
            .all(app.db.read())
            .await?;
        for (id, next_sequence, status) in stored {
            app.live.look(id, next_sequence, Status::TERMINAL.contains(&status));
        }
    }
    Ok(())
}
