//! Changes of what keys may do, which stop at once what they forbid, on every replica (I7): the epoch in the database
//! rises in the same transaction, every replica looks at it twice a second, and Redis tells at once besides.

use std::time::Duration;

use entity::{Shared, TenantOwned, auth_epoch, tenants};
use sea_orm::ActiveValue::Set;
use sea_orm::sea_query::Expr;
use sea_orm::{ColumnTrait, ConnectionTrait, DatabaseTransaction, EntityTrait, ExprTrait, QueryFilter, QuerySelect};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use uuid::Uuid;

use crate::app::App;
use crate::bus::{Topic, What};
use crate::error::Error;

/// How often the epoch is looked at.
const POLL: Duration = Duration::from_millis(500);

/// Opens a transaction that changes what a tenant's keys may do. The tenant's row is locked first, as everywhere.
pub async fn begin(app: &App, tenant_id: Uuid) -> Result<DatabaseTransaction, Error> {
    let tx = app.db.begin().await?;
    tenants::Entity::in_tenant(tenant_id).lock_exclusive().one(&tx).await?;
    Ok(tx)
}

/// Raises the epoch, commits, and has every replica look again at what the tenant's keys may do. The transaction holds
/// the tenant's row.
pub async fn commit(app: &App, tx: DatabaseTransaction, tenant_id: Uuid) -> Result<(), Error> {
    // In a task of its own: a caller that leaves in the middle must not keep anybody from being told.
    let committing = app.tasks.spawn(commit_and_tell(app.clone(), tx, tenant_id));
    committing.await.map_err(|error| Error::internal(format!("a change of authority: {error}")))?
}

async fn commit_and_tell(app: App, tx: DatabaseTransaction, tenant_id: Uuid) -> Result<(), Error> {
    // The epoch's row is held until the commit: epochs become visible in their order.
    auth_epoch::Entity::update_many()
        .col_expr(auth_epoch::Column::Epoch, Expr::col(auth_epoch::Column::Epoch).add(1))
        .exec(&tx)
        .await?;
    let epoch = self::epoch(&tx).await?;
    tenants::Entity::update_many()
        .set(tenants::ActiveModel { auth_epoch: Set(epoch), ..Default::default() })
        .filter(tenants::Column::Id.eq(tenant_id))
        .exec(&tx)
        .await?;
    tx.commit().await?;
    app.keys.authority_changed(tenant_id);
    app.keys.followed_by(epoch);
    app.bus.tell(Topic::Everyone, What::Authority { tenant_id, epoch });
    Ok(())
}

/// The epoch as it is now.
pub async fn epoch(db: &impl ConnectionTrait) -> Result<i64, Error> {
    let row = auth_epoch::Entity::all().one(db).await?;
    Ok(row.ok_or_else(|| Error::internal("the row of auth_epoch is gone"))?.epoch)
}

/// Looks for changes that other replicas made, for as long as the process lives. An embedded server is alone.
pub async fn watch(app: App) {
    if app.db.is_embedded() {
        return;
    }
    let mut ticks = interval(POLL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut failing = false;
    loop {
        ticks.tick().await;
        let asked = Instant::now();
        let looked = timeout(2 * POLL, look(&app)).await;
        let looked = looked.unwrap_or_else(|_| Err(Error::internal("the database did not answer in time")));
        match &looked {
            Ok(()) => app.keys.confirmed(asked),
            Err(error) if !failing => {
                tracing::warn!(inside = ?error, "changes of authority can't be looked for: each key is asked for anew");
            }
            Err(_) => {}
        }
        if looked.is_ok() && failing {
            tracing::info!("changes of authority are looked for again");
        }
        failing = looked.is_err();
    }
}

async fn look(app: &App) -> Result<(), Error> {
    let seen = app.keys.epoch();
    let now = epoch(app.db.read()).await?;
    if now > seen {
        let changed: Vec<Uuid> = tenants::Entity::across_tenants()
            .filter(tenants::Column::AuthEpoch.gt(seen))
            .select_only()
            .column(tenants::Column::Id)
            .into_tuple()
            .all(app.db.read())
            .await?;
        changed.into_iter().for_each(|tenant_id| app.keys.authority_changed(tenant_id));
        app.keys.saw_epoch(now);
    }
    Ok(())
}
