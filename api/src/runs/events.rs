//! A run's events for one subscriber: stored items after a cursor, what is in progress, then life.

use std::collections::BTreeMap;
use std::time::Duration;

use cloister_runtime::item::{Body, Item};
use cloister_runtime::journal::Progress;
use entity::runs::Status;
use entity::{TenantOwned, run_items, runs};
use futures_util::Stream;
use sea_orm::{ColumnTrait, PaginatorTrait, QueryFilter, QuerySelect};
use tokio::sync::broadcast::error::RecvError;
use uuid::Uuid;

use super::agent_name;
use super::journal::{input_item, items_after};
use super::live::Signal;
use super::turn::{Attempt, Delta, beyond, span};
use crate::app::App;
use crate::error::Error;

/// Items read from the journal at a time.
const PAGE: u64 = 200;

/// How long a subscriber waits for a signal before it looks into the journal by itself, for safety's sake: who watches
/// runs of other replicas is told of what they store once a second at the latest (`live::follow_journals`).
const PATIENCE: Duration = Duration::from_secs(15);

/// An event.
#[derive(Clone, Debug)]
pub enum Event {
    /// An item was stored.
    Item(Item),
    /// Progress within a turn.
    Progress(Progress),
}

/// The run's events: every item after `after` once, in order, without a gap; between them the text
/// in progress. Ends with the run.
pub fn events(app: App, run: runs::Model, after: i64) -> impl Stream<Item = Result<Event, Error>> + Send {
    async_stream::try_stream! {
        let _unsubscribe = Unsubscribe { app: app.clone(), run_id: run.id };
        // The first item is the input.
        let answered = if after > 1 { answered_before(&app, &run, after).await? } else { 0 };
        let mut seen = Seen { cursor: after, answered, ..Seen::default() };
        let mut was_over = false;
        // What is told, to be all there is; not after a silence.
        let mut trusts_live = true;
        'subscribed: loop {
            let cursor = seen.cursor;
            let mut subscription = app.live.subscribe(run.id);
            // The input is in the run's row: if it is all that was stored, the journal need not be read.
            let root = agent_name(&run, run.agent_id);
            if let (0, Some(_), Some(agent_name)) = (seen.cursor, subscription.next_sequence, root) {
                let input = input_item(&run, agent_name);
                seen.take(&input);
                yield Event::Item(input);
            }
            let knows_all = trusts_live && subscription.next_sequence == Some(seen.cursor + 1);
            trusts_live = true;
            let mut may_be_more = !knows_all;
            while may_be_more {
                let stored = items_after(&app, &run, seen.cursor, PAGE).await?;
                may_be_more = stored.len() == PAGE as usize;
                for item in stored {
                    if seen.take(&item) {
                        yield Event::Item(item);
                    }
                }
            }
            if seen.ended || was_over {
                break;
            }
            // The journal tells of the end, unless the cursor lies behind it, or the items have had their time. What
            // may have been stored just before the end is looked for once more.
            was_over = !knows_all && seen.cursor == cursor && is_over(&app, &run).await?;
            if was_over {
                continue;
            }
            for delta in subscription.turn.so_far() {
                for progress in seen.progress(&delta) {
                    yield Event::Progress(progress);
                }
            }
            loop {
                match tokio::time::timeout(PATIENCE, subscription.signals.recv()).await {
                    Ok(Ok(Signal::Delta(delta))) => {
                        if seen.lacks_items_before(&delta) {
                            continue 'subscribed;
                        }
                        for progress in seen.progress(&delta) {
                            yield Event::Progress(progress);
                        }
                    }
                    Ok(Ok(Signal::Items(items))) => {
                        if items.first().is_some_and(|item| item.sequence > seen.cursor + 1) {
                            continue 'subscribed;
                        }
                        for item in items.iter() {
                            if seen.take(item) {
                                yield Event::Item(item.clone());
                            }
                        }
                    }
                    Ok(Ok(Signal::Look(next_sequence))) if next_sequence <= seen.cursor + 1 => {}
                    // More was stored, this subscriber was too slow, the run is over, or nothing was heard for long:
                    // the journal has the items, and the turn so far what was missed of it.
                    Ok(Ok(Signal::Look(_)) | Err(RecvError::Lagged(_) | RecvError::Closed)) => continue 'subscribed,
                    Err(_) => {
                        trusts_live = false;
                        continue 'subscribed;
                    }
                }
                if seen.ended {
                    break 'subscribed;
                }
            }
        }
    }
}

/// Tells the live part when a subscriber is gone, however it went.
struct Unsubscribe {
    app: App,
    run_id: Uuid,
}

impl Drop for Unsubscribe {
    fn drop(&mut self) {
        self.app.live.unsubscribed(self.run_id);
    }
}

/// What a subscriber has been given.
#[derive(Default)]
struct Seen {
    /// The sequence of the newest item.
    cursor: i64,
    /// The newest turn whose response is stored: its deltas are void.
    answered: u32,
    /// The turn that items were looked for before, because a delta of it came first.
    looked_before: u32,
    /// The attempt at the turn in progress, and the bytes given of each part of it.
    attempt: Attempt,
    parts: BTreeMap<u32, u32>,
    /// The run's last item was given.
    ended: bool,
}

impl Seen {
    /// Whether an item is new to the subscriber; if so it counts as given.
    fn take(&mut self, item: &Item) -> bool {
        if item.sequence <= self.cursor {
            return false;
        }
        self.cursor = item.sequence;
        if let (Body::Usage { .. }, Some(turn)) = (&item.step.body, item.step.turn) {
            self.answered = turn;
        }
        self.ended = matches!(&item.step.body, Body::Status { status, .. } if status.is_terminal());
        true
    }

    /// Whether a turn goes on while the one before it is not answered yet as far as this subscriber knows. Told once a
    /// turn.
    fn lacks_items_before(&mut self, delta: &Delta) -> bool {
        let turn = delta.attempt.turn;
        let lacks = turn > self.answered.saturating_add(1) && turn > self.looked_before;
        if lacks {
            self.looked_before = turn;
        }
        lacks
    }

    /// What of a delta is new to the subscriber, and whether what it had of the turn is void. Nothing, if text before
    /// it is missing: then the stored item brings the whole.
    fn progress(&mut self, delta: &Delta) -> impl Iterator<Item = Progress> + use<> {
        let attempt = delta.attempt;
        let begins_anew = matches!(delta.progress, Progress::Restarted { .. });
        let (mut restarted, mut fresh) = (None, None);
        if attempt.turn > self.answered && attempt >= self.attempt {
            if attempt > self.attempt {
                let torn = attempt.turn == self.attempt.turn && !self.parts.is_empty();
                restarted = (begins_anew || torn).then_some(Progress::Restarted { turn: attempt.turn });
                self.attempt = attempt;
                self.parts.clear();
            }
            if let Some((index, _, end)) = span(&delta.progress) {
                let given = self.parts.get(&index).copied().unwrap_or(0);
                fresh = beyond(&delta.progress, given);
                if fresh.is_some() {
                    self.parts.insert(index, end);
                }
            }
        }
        restarted.into_iter().chain(fresh)
    }
}

/// Whether the run has ended.
async fn is_over(app: &App, run: &runs::Model) -> Result<bool, Error> {
    let ended = runs::Entity::in_tenant(run.tenant_id)
        .filter(runs::Column::Id.eq(run.id))
        .filter(runs::Column::Status.is_in(Status::TERMINAL));
    Ok(ended.count(app.db.read()).await? > 0)
}

/// The newest turn whose response lies at or before the cursor.
async fn answered_before(app: &App, run: &runs::Model, cursor: i64) -> Result<u32, Error> {
    let turn: Option<Option<i32>> = run_items::Entity::in_tenant(run.tenant_id)
        .filter(run_items::Column::RunId.eq(run.id))
        .filter(run_items::Column::Kind.eq("usage"))
        .filter(run_items::Column::Sequence.lte(cursor))
        .select_only()
        .column_as(run_items::Column::Turn.max(), "turn")
        .into_tuple()
        .one(app.db.read())
        .await?;
    Ok(turn.flatten().and_then(|turn| u32::try_from(turn).ok()).unwrap_or(0))
}
