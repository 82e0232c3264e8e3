//! What is written down while runs execute: what a model call was charged, and what the run's journal gains by it, in
//! one transaction; and those of many runs together.

use crate::app::App;
use crate::batch::{self, Batch, Batched};
use crate::error::Error;
use crate::runs::journal::{self, Append, Verdict};
use crate::usage::ledger::{self, Settlement};

/// Something to be written down: either, or both.
#[derive(Clone, Debug)]
pub struct Record {
    settlement: Option<Settlement>,
    append: Option<Append>,
}

impl Batched for Record {
    /// What became of the append, if there is one; subscribers have been told.
    type Done = Option<Verdict>;

    fn batch(app: &App) -> &Batch<Self> {
        &app.batches.record
    }

    async fn write(app: &App, records: Vec<Self>) -> Result<Vec<Self::Done>, Error> {
        let mut settlements = Vec::new();
        let mut appends = Vec::new();
        let mut appending = Vec::with_capacity(records.len());
        for record in records {
            settlements.extend(record.settlement);
            appending.push(record.append.is_some());
            appends.extend(record.append);
        }
        let tx = app.db.begin().await?;
        // Counters are locked before runs, everywhere.
        ledger::settle(&tx, &settlements).await?;
        let (verdicts, appended) = journal::append_all(app, &tx, appends).await?;
        tx.commit().await?;
        for appended in appended {
            journal::publish(app, appended);
        }
        let mut verdicts = verdicts.into_iter();
        Ok(appending.into_iter().map(|appends| if appends { verdicts.next() } else { None }).collect())
    }
}

/// Records what a call was charged, and stores the items of its response if it is a run's. Returns what became of the
/// items.
pub async fn settle(app: &App, settlement: Settlement, append: Option<Append>) -> Result<Option<Verdict>, Error> {
    batch::write(app, Record { settlement: Some(settlement), append }).await
}

/// Stores items of a run.
pub async fn append(app: &App, append: Append) -> Result<Verdict, Error> {
    let verdict = batch::write(app, Record { settlement: None, append: Some(append) }).await?;
    verdict.ok_or_else(|| Error::internal("an append without a verdict"))
}
