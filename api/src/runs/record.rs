//! What is written down while runs execute, of many runs together: the tokens that model calls reserve, what they were
//! charged, and what runs' journals gain, in one transaction.

use std::collections::{HashMap, HashSet};

use entity::quota_reservations;
use uuid::Uuid;

use crate::app::App;
use crate::batch::{self, Batch, Batched};
use crate::db::Gathered;
use crate::error::Error;
use crate::runs::journal::{self, Append, Verdict};
use crate::usage::ledger::{self, Settlement};
use crate::usage::quota::{self, Reserve};

/// Something to be written down: any of these, or several.
#[derive(Clone, Default)]
pub struct Record {
    reserve: Option<Reserve>,
    release: Option<quota_reservations::Model>,
    settlement: Option<Settlement>,
    append: Option<Append>,
}

/// What became of each.
pub struct Recorded {
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

    async fn write(app: &App, records: &[Self]) -> Result<Vec<Recorded>, Error> {
        let settlements: Vec<&Settlement> = records.iter().filter_map(|record| record.settlement.as_ref()).collect();
        let released: Vec<_> = records.iter().filter_map(|record| record.release.as_ref()).collect();
        let asked = records.iter().filter_map(|record| record.reserve.as_ref());
        // Who has left in the meantime needs none any more.
        let is_released = |asked: &Reserve| released.iter().any(|left| left.call_id == asked.reservation.call_id);
        let asked: Vec<&Reserve> = asked.filter(|asked| !is_released(asked)).collect();
        let appends: Vec<&Append> = records.iter().filter_map(|record| record.append.as_ref()).collect();
        let tx = app.db.begin_gathered(Gathered::Records).await?;
        // Counters are locked before runs, everywhere. What is freed here is there for who asks.
        let mut moves = ledger::settle(&tx, &settlements).await?;
        let released = ledger::release(&tx, &released, &mut moves).await?;
        let reserved = quota::reserve_in(app, &tx, moves, &asked).await?;
        let (verdicts, appended) = journal::append_all(app, &tx, appends).await?;
        tx.commit().await?;
        for appended in appended {
            journal::publish(app, appended);
        }
        Ok(told(records, reserved, &released, verdicts))
    }
}

/// Gives each record what is its own.
fn told(
    records: &[Record],
    mut reserved: HashMap<Uuid, quota_reservations::Model>,
    released: &HashSet<Uuid>,
    verdicts: Vec<Verdict>,
) -> Vec<Recorded> {
    let mut verdicts = verdicts.into_iter();
    let told = records.iter().map(|record| Recorded {
        reservation: record.reserve.as_ref().and_then(|asked| reserved.remove(&asked.reservation.call_id)),
        is_released: record.release.as_ref().is_some_and(|reservation| released.contains(&reservation.call_id)),
        verdict: record.append.as_ref().and_then(|_| verdicts.next()),
    });
    told.collect()
}

/// Reserves a call's tokens, and stores items of its run besides. Returns the reservation, none if it doesn't fit now,
/// and what became of the items.
pub async fn reserve(
    app: &App,
    reserve: Reserve,
    append: Option<Append>,
) -> Result<(Option<quota_reservations::Model>, Option<Verdict>), Error> {
    let recorded = batch::write(app, Record { reserve: Some(reserve), append, ..Record::default() }).await?;
    Ok((recorded.reservation, recorded.verdict))
}

/// Gives back what a call reserved that nobody is charged for. False if there was nothing.
pub async fn release(app: &App, reservation: quota_reservations::Model) -> Result<bool, Error> {
    Ok(batch::write(app, Record { release: Some(reservation), ..Record::default() }).await?.is_released)
}

/// Records what a call was charged, and stores the items of its response if it is a run's. Returns what became of the
/// items.
pub async fn settle(app: &App, settlement: Settlement, append: Option<Append>) -> Result<Option<Verdict>, Error> {
    let record = Record { settlement: Some(settlement), append, ..Record::default() };
    Ok(batch::write(app, record).await?.verdict)
}

/// Stores items of a run.
pub async fn append(app: &App, append: Append) -> Result<Verdict, Error> {
    let record = Record { append: Some(append), ..Record::default() };
    batch::write(app, record).await?.verdict.ok_or_else(|| Error::internal("an append without a verdict"))
}
