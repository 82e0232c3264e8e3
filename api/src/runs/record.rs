//! What is written down of runs, of many together: that they start, the tokens that model calls reserve, what they were
//! charged, and what runs' journals gain, in one transaction.

use std::collections::{HashMap, HashSet};

use entity::quota_reservations;
use uuid::Uuid;

use crate::app::App;
use crate::batch::{self, Batch, Batched};
use crate::error::Error;
use crate::runs::journal::{self, Append, Verdict};
use crate::runs::queue;
use crate::runs::start::{Start, Started, Starting};
use crate::usage::counters::{Counter, Counters};
use crate::usage::ledger::{self, Settlement};
use crate::usage::quota::{self, Reserve};

/// Something to be written down: any of these, or several.
#[derive(Clone, Default)]
pub struct Record {
    start: Option<Box<Start>>,
    reserve: Option<Reserve>,
    release: Option<quota_reservations::Model>,
    settlement: Option<Settlement>,
    append: Option<Append>,
}

/// What became of each.
pub struct Recorded {
    started: Option<Started>,
    /// None if it does not fit now.
    reservation: Option<quota_reservations::Model>,
    /// Whether there was anything to give back.
    is_released: bool,
    /// Subscribers have been told.
    verdict: Option<Verdict>,
}

impl Batched for Record {
    type Done = Recorded;

    fn batch(app: &App) -> &Batch<Self> {
        &app.batches.record
    }

    async fn carry_out(app: &App, records: &[Self]) -> Result<Vec<Recorded>, Error> {
        let starts = records.iter().filter_map(|record| record.start.as_deref()).collect();
        let settlements: Vec<&Settlement> = records.iter().filter_map(|record| record.settlement.as_ref()).collect();
        let released: Vec<_> = records.iter().filter_map(|record| record.release.as_ref()).collect();
        let asked = records.iter().filter_map(|record| record.reserve.as_ref());
        // Who has left in the meantime needs none any more.
        let is_released = |asked: &Reserve| released.iter().any(|left| left.call_id == asked.reservation.call_id);
        let mut asked: Vec<&Reserve> = asked.filter(|asked| !is_released(asked)).collect();
        let appends = records.iter().filter_map(|record| record.append.as_ref()).collect();

        // The starts' tenants, totals, counters, conversations, runs, queues: in this order they are locked, everywhere.
        let tx = app.db.begin_gathered().await?;
        let mut starting = Starting::lock(&tx, starts).await?;
        let mut moves = ledger::settle(&tx, &settlements).await?;
        let released = ledger::release(&tx, &released, &mut moves).await?;
        let of_calls = asked.iter().flat_map(|asked| Counter::of(&asked.reservation));
        let counters = Counters::lock(app, &tx, moves, of_calls.chain(starting.counters())).await?;
        let held = journal::hold(app, &tx, appends).await?;
        queue::lock(&tx, &held.queues().chain(starting.queues()).collect()).await?;
        let mut begun = starting.insert(app, &tx, &counters).await?;
        let first_calls: HashSet<Uuid> =
            starting.first_calls(&begun).map(|reserve| reserve.reservation.call_id).collect();
        asked.extend(starting.first_calls(&begun));
        // What is freed by this transaction is there for who asks.
        let mut reserved = quota::grant(app, &tx, counters, &asked).await?;
        for (_, reserved) in reserved.extract_if(|call_id, _| first_calls.contains(call_id)) {
            begun.hand(reserved);
        }
        let (verdicts, appended) = held.store(app, &tx, begun.inputs()).await?;
        let others = starting.not_executed(&begun);
        let started = begun.commit(app, tx).await?;
        others.into_iter().for_each(|start| start.forget_first_call(app));
        for appended in appended {
            journal::publish(app, appended);
        }
        Ok(told(records, starting.told(started), reserved, &released, verdicts))
    }

    fn given_up(&self, app: &App) {
        if let Some(start) = &self.start {
            start.forget_first_call(app);
        }
    }
}

/// Gives each record what is its own.
fn told(
    records: &[Record],
    started: Vec<Started>,
    mut reserved: HashMap<Uuid, quota_reservations::Model>,
    released: &HashSet<Uuid>,
    verdicts: Vec<Verdict>,
) -> Vec<Recorded> {
    let (mut started, mut verdicts) = (started.into_iter(), verdicts.into_iter());
    let told = records.iter().map(|record| Recorded {
        started: record.start.as_ref().and_then(|_| started.next()),
        reservation: record.reserve.as_ref().and_then(|asked| reserved.remove(&asked.reservation.call_id)),
        is_released: record.release.as_ref().is_some_and(|reservation| released.contains(&reservation.call_id)),
        verdict: record.append.as_ref().and_then(|_| verdicts.next()),
    });
    told.collect()
}

/// Starts a run.
pub async fn start(app: &App, start: Start) -> Result<Started, Error> {
    let record = Record { start: Some(Box::new(start)), ..Record::default() };
    batch::join(app, record).await?.started.ok_or_else(|| Error::internal("a start that came to nothing"))
}

/// Reserves a call's tokens, and stores items of its run besides. Returns the reservation, none if it doesn't fit now,
/// and what became of the items.
pub async fn reserve(
    app: &App,
    reserve: Reserve,
    append: Option<Append>,
) -> Result<(Option<quota_reservations::Model>, Option<Verdict>), Error> {
    let recorded = batch::join(app, Record { reserve: Some(reserve), append, ..Record::default() }).await?;
    Ok((recorded.reservation, recorded.verdict))
}

/// Gives back what a call reserved that nobody is charged for. False if there was nothing.
pub async fn release(app: &App, reservation: quota_reservations::Model) -> Result<bool, Error> {
    Ok(batch::join(app, Record { release: Some(reservation), ..Record::default() }).await?.is_released)
}

/// Records what a call was charged, and stores the items of its response if it is a run's. Returns what became of the
/// items.
pub async fn settle(app: &App, settlement: Settlement, append: Option<Append>) -> Result<Option<Verdict>, Error> {
    let record = Record { settlement: Some(settlement), append, ..Record::default() };
    Ok(batch::join(app, record).await?.verdict)
}

/// Stores items of a run.
pub async fn append(app: &App, append: Append) -> Result<Verdict, Error> {
    let record = Record { append: Some(append), ..Record::default() };
    batch::join(app, record).await?.verdict.ok_or_else(|| Error::internal("an append without a verdict"))
}
