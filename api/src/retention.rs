//! What grows for ever: its partitions are made ahead, and dropped when the configuration says so.

use chrono::Months;
use cloister_runtime::ids::run_id;
use entity::runs::Status;
use entity::{TenantOwned, runs};
use migration::partitions;
use sea_orm::{ColumnTrait, QueryFilter};

use crate::app::App;
use crate::clock;
use crate::error::Error;

/// Months whose partitions are made ahead: nobody looks after them for so long, and writes still find theirs.
pub const AHEAD: u32 = 2;

/// Makes the partitions that are to come, and drops those that have had their time.
pub async fn keep(app: &App) -> Result<(), Error> {
    partitions::ensure(app.db.write(), AHEAD).await?;
    let retention = &app.config.retention;
    if retention.items_months > 0 {
        drop_items(app, retention.items_months).await?;
    }
    if retention.usage_months > 0 {
        partitions::drop_old(app.db.write(), "usage_records", "created_at", retention.usage_months).await?;
    }
    Ok(())
}

/// A run that is paused may go on whenever its tenant likes: as long as there is one, what it goes on from is kept.
async fn drop_items(app: &App, months: u32) -> Result<(), Error> {
    let start = clock::start_of_month(app.clock.now());
    let first = start.checked_sub_months(Months::new(months)).unwrap_or(start);
    let unfinished = runs::Entity::across_tenants()
        .filter(runs::Column::Status.is_in(Status::UNFINISHED))
        .filter(runs::Column::CreatedAt.lt(first))
        .one(app.db.read())
        .await?;
    if let Some(run) = unfinished {
        tracing::warn!(run_id = %run_id(run.id), "items older than retention.items_months are kept: a run of that time is unfinished");
        return Ok(());
    }
    Ok(partitions::drop_old(app.db.write(), "run_items", "run_created_at", months).await?)
}
