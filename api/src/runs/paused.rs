//! Runs whose tokens ran out go on by themselves when there may be tokens again: in the new month, and when a limit was
//! raised.

use chrono::{DateTime, Datelike, TimeZone, Utc};
use cloister_runtime::ids::run_id;
use entity::runs::Status;
use entity::{TenantOwned, runs};
use sea_orm::ActiveValue::Set;
use sea_orm::{ColumnTrait, ConnectionTrait, EntityTrait, QueryFilter, QueryOrder, QuerySelect};
use uuid::Uuid;

use crate::app::App;
use crate::error::{Error, Refusal};

/// Runs that one look takes.
const BATCH: u64 = 100;

/// Whose paused runs are looked at again.
#[derive(Clone, Copy, Debug)]
pub enum Whose {
    /// A tenant's, since its limit was changed.
    Tenant(Uuid),
    /// Those that a key started, since the key's limit was changed.
    Key(Uuid),
    /// All: plans may have changed.
    All,
}

/// Has paused runs looked at again soon. The caller's transaction raises the limit.
pub async fn reconsider(db: &impl ConnectionTrait, whose: Whose) -> Result<(), Error> {
    let paused = runs::ActiveModel { paused_at: Set(Some(DateTime::UNIX_EPOCH)), ..Default::default() };
    let rows = runs::Entity::update_many().set(paused).filter(runs::Column::Status.eq(Status::PausedQuota));
    let rows = match whose {
        Whose::Tenant(id) => rows.filter(runs::Column::TenantId.eq(id)),
        Whose::Key(id) => rows.filter(runs::Column::ApiKeyId.eq(id)),
        Whose::All => rows,
    };
    rows.exec(db).await?;
    Ok(())
}

/// Resumes runs that were paused in an earlier month, or before a limit was changed. One for which too little is left
/// stays paused, and is not looked at again before the next change.
pub async fn resume_due(app: &App) -> Result<(), Error> {
    let due: Vec<(Uuid, Uuid)> = runs::Entity::across_tenants()
        .filter(runs::Column::PausedAt.lt(begin_of_month(app.clock.now())))
        .filter(runs::Column::Status.eq(Status::PausedQuota))
        .order_by_asc(runs::Column::PausedAt)
        .limit(BATCH)
        .select_only()
        .columns([runs::Column::TenantId, runs::Column::Id])
        .into_tuple()
        .all(app.db.read())
        .await?;
    for (tenant_id, id) in due {
        match super::resume(app, tenant_id, id).await {
            Ok(_) => {}
            Err(Refusal::User(_)) => stay(app, tenant_id, id).await?,
            // It keeps no other one waiting.
            Err(Refusal::Error(error)) => {
                tracing::error!(run_id = %run_id(id), inside = ?error, "a paused run did not go on");
            }
        }
    }
    Ok(())
}

/// A run that can't go on stays paused, from now.
async fn stay(app: &App, tenant_id: Uuid, id: Uuid) -> Result<(), Error> {
    runs::Entity::update_many()
        .set(runs::ActiveModel { paused_at: Set(Some(app.clock.now())), ..Default::default() })
        .filter(runs::Column::TenantId.eq(tenant_id))
        .filter(runs::Column::Id.eq(id))
        .filter(runs::Column::Status.eq(Status::PausedQuota))
        .exec(app.db.write())
        .await?;
    Ok(())
}

fn begin_of_month(now: DateTime<Utc>) -> DateTime<Utc> {
    Utc.with_ymd_and_hms(now.year(), now.month(), 1, 0, 0, 0).single().unwrap_or(now)
}
