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

use super::journal::items_after;
use super::live::Signal;
use crate::app::App;
use crate::error::Error;

/// Items read from the journal at a time.
const PAGE: u64 = 200;

/// How long a subscriber waits for a signal before it looks into the journal by itself: another replica
/// may be at work on the run. An embedded server is alone, and looks only for safety's sake.
fn patience(app: &App) -> Duration {
    Duration::from_secs(if app.db.is_embedded() { 15 } else { 1 })
}

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
        let mut seen = Seen { cursor: after, answered: answered_before(&app, &run, after).await?, ..Seen::default() };
        'subscribed: loop {
            let mut subscription = app.live.subscribe(run.id);
            loop {
                let stored = items_after(&app, &run, seen.cursor, PAGE).await?;
                let last_page = stored.len() < PAGE as usize;
                for item in stored {
                    if seen.take(&item) {
                        yield Event::Item(item);
                    }
                }
                if last_page {
                    break;
                }
            }
            if seen.ended || is_over(&app, &run, seen.cursor).await? {
                break;
            }
            for progress in subscription.turn.so_far() {
                if seen.wants_anew(&progress) {
                    yield Event::Progress(progress);
                }
            }
            loop {
                match tokio::time::timeout(patience(&app), subscription.signals.recv()).await {
                    Ok(Ok(Signal::Progress(progress))) => {
                        if seen.wants(&progress) {
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
                    // The channel lost something: the stored items bring the whole of this turn.
                    Ok(Err(RecvError::Lagged(_))) => seen.muted = true,
                    // The run is over, or another process is at work on it: look into the journal.
                    Ok(Err(RecvError::Closed)) | Err(_) => continue 'subscribed,
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
    /// Bytes given of each part of the turn in progress.
    turn: u32,
    parts: BTreeMap<u32, u32>,
    /// Deltas were lost: no more until the turn is answered or begins anew.
    muted: bool,
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
            self.muted = false;
        }
        self.ended = matches!(&item.step.body, Body::Status { status, .. } if status.is_terminal());
        true
    }

    /// Whether progress continues what the subscriber has.
    fn wants(&mut self, progress: &Progress) -> bool {
        let (turn, index, offset, text) = match progress {
            Progress::Text { turn, index, offset, text } => (*turn, *index, *offset, text),
            Progress::Arguments { turn, index, offset, text, .. } => (*turn, *index, *offset, text),
            Progress::Restarted { turn } => {
                self.begin(*turn);
                self.muted = false;
                return *turn > self.answered;
            }
        };
        if turn != self.turn {
            self.begin(turn);
        }
        if turn <= self.answered || self.muted {
            return false;
        }
        let given = self.parts.entry(index).or_default();
        if offset != *given {
            // A gap, or text that was given with the turn so far.
            self.muted |= offset > *given;
            return false;
        }
        *given += u32::try_from(text.len()).unwrap_or(0);
        true
    }

    /// Like [`Seen::wants`] for a turn so far, of which the subscriber may have a part: it is given
    /// only if there is more of it, and may then overlap.
    fn wants_anew(&mut self, progress: &Progress) -> bool {
        let (turn, index, length) = match progress {
            Progress::Text { turn, index, text, .. } => (*turn, *index, text.len()),
            Progress::Arguments { turn, index, text, .. } => (*turn, *index, text.len()),
            Progress::Restarted { turn } if *turn == self.turn && !self.parts.is_empty() => return false,
            Progress::Restarted { .. } => return self.wants(progress),
        };
        if turn != self.turn {
            self.begin(turn);
        }
        if turn <= self.answered {
            return false;
        }
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        let given = self.parts.entry(index).or_default();
        self.muted = false;
        if length <= *given {
            return false;
        }
        *given = length;
        true
    }

    fn begin(&mut self, turn: u32) {
        self.turn = turn;
        self.parts.clear();
    }
}

/// Whether the run has ended, and nothing of it lies behind the cursor: then no item tells of the end.
async fn is_over(app: &App, run: &runs::Model, cursor: i64) -> Result<bool, Error> {
    let ended = runs::Entity::in_tenant(run.tenant_id)
        .filter(runs::Column::Id.eq(run.id))
        .filter(runs::Column::Status.is_in(Status::TERMINAL))
        .filter(runs::Column::NextSequence.lte(cursor.saturating_add(1)));
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
