//! What is owed to the objects of the api's own cluster.
//!
//! What has to hold at once (a suspension, a deletion, a new tenant) holds in the database first, and is owed to the
//! object in the same transaction ([`owe`]); it is written at once ([`write`]), or tried again until it is ([`keep`]).
//! What is written is taken from the tenant's row then, so that only the last state counts.

use std::time::Duration;

use chrono::TimeDelta;
use entity::object_writes::{self, Wish};
use entity::{TenantOwned, tenants};
use sea_orm::ActiveValue::Set;
use sea_orm::{
    ActiveModelTrait, ColumnTrait, Condition, DatabaseTransaction, EntityTrait, IntoActiveModel, PaginatorTrait,
    QueryFilter, QueryOrder, QuerySelect,
};
use uuid::Uuid;

use super::fulfil::{self, Failure};
use super::objects::Problem;
use super::places::ruler;
use super::wording;
use crate::app::App;
use crate::error::{Error, UserError, UserErrorCode};
use crate::ids;
use crate::metrics;

/// How long a write may take until another may try: longer than it can.
const CLAIM: TimeDelta = TimeDelta::seconds(300);
/// The longest pause between two attempts.
const LONGEST_PAUSE: TimeDelta = TimeDelta::minutes(5);
/// How often what is due is looked for.
const LOOK: Duration = Duration::from_secs(5);
/// Writes that are tried one after another.
const MOST: u64 = 50;

/// The name of the object that the api makes for a tenant.
pub fn object_name(tenant_id: Uuid) -> String {
    ids::encode(ids::Tenant, tenant_id).replace('_', "-")
}

/// Owes a write to a tenant's object. The tenant's row is held. A tenant that has no object, and is to have none, is
/// owed nothing.
pub async fn owe(app: &App, tx: &DatabaseTransaction, tenant_id: Uuid, wish: Wish) -> Result<(), Error> {
    if !app.cluster.writes_objects() {
        return Ok(());
    }
    let now = app.clock.now();
    let owed = object_writes::Entity::in_tenant(tenant_id).lock_exclusive().one(tx).await?;
    if let Some(owed) = owed {
        let number = owed.number + 1;
        // An object that is not made yet will say what holds then.
        let wish = if wish == Wish::Suspension { owed.wish } else { wish };
        let mut row = owed.into_active_model();
        (row.wish, row.number, row.attempts, row.due_at) = (Set(wish), Set(number), Set(0), Set(now));
        row.update(tx).await?;
        return Ok(());
    }
    if wish != Wish::Make && ruler(tx, tenant_id).await?.is_none() {
        return Ok(());
    }
    let row = object_writes::ActiveModel {
        tenant_id: Set(tenant_id),
        wish: Set(wish),
        number: Set(0),
        attempts: Set(0),
        due_at: Set(now),
        claimed_until: Set(None),
        problem: Set(None),
        created_at: Set(now),
    };
    row.insert(tx).await?;
    Ok(())
}

/// Has an object that is still to be made say what holds now. The tenant's row is held.
pub async fn renew(app: &App, tx: &DatabaseTransaction, tenant_id: Uuid) -> Result<(), Error> {
    let owed = object_writes::Entity::in_tenant(tenant_id).one(tx).await?;
    if owed.is_some() { owe(app, tx, tenant_id, Wish::Suspension).await } else { Ok(()) }
}

/// Writes what is owed to a tenant's object, unless somebody does already. Returns what of it did not get there.
pub async fn write(app: &App, tenant_id: Uuid) -> Vec<UserError> {
    if !app.cluster.writes_objects() {
        return Vec::new();
    }
    // In a task of its own: a write that its caller leaves in the middle would hold up the next.
    let writing = app.tasks.spawn(write_all(app.clone(), tenant_id));
    writing.await.unwrap_or_else(|error| {
        tracing::error!(%tenant_id, %error, "a write to a tenant's object failed; it is tried again");
        Vec::new()
    })
}

async fn write_all(app: App, tenant_id: Uuid) -> Vec<UserError> {
    /// What is wished for during a write is written too.
    const ROUNDS: usize = 3;
    let mut problems = Vec::new();
    for _ in 0..ROUNDS {
        match write_once(&app, tenant_id).await {
            Ok(None) => break,
            Ok(Some(found)) => problems = found,
            Err(error) => {
                tracing::warn!(%tenant_id, inside = ?error, "a write to a tenant's object failed; it is tried again");
                break;
            }
        }
    }
    problems
}

/// Writes what is due, for as long as the process lives.
pub async fn keep(app: App) {
    if !app.cluster.writes_objects() {
        return;
    }
    let mut ticks = tokio::time::interval(LOOK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if let Err(error) = write_due(&app).await {
            tracing::warn!(inside = ?error, "what is owed to tenants' objects can't be looked for; trying again");
        }
    }
}

async fn write_due(app: &App) -> Result<(), Error> {
    let due: Vec<Uuid> = object_writes::Entity::across_tenants()
        .filter(is_free(app))
        .order_by_asc(object_writes::Column::DueAt)
        .limit(MOST)
        .select_only()
        .column(object_writes::Column::TenantId)
        .into_tuple()
        .all(app.db.read())
        .await?;
    for tenant_id in due {
        let problems = write_once(app, tenant_id).await?.unwrap_or_default();
        if problems.iter().any(|problem| problem.code == UserErrorCode::ClusterUnavailable) {
            // The others would only wait for the same.
            break;
        }
    }
    let owed = object_writes::Entity::across_tenants().count(app.db.read()).await?;
    metrics::object_writes_owed(owed);
    Ok(())
}

fn is_free(app: &App) -> Condition {
    let now = app.clock.now();
    let unclaimed = Condition::any()
        .add(object_writes::Column::ClaimedUntil.is_null())
        .add(object_writes::Column::ClaimedUntil.lt(now));
    Condition::all().add(object_writes::Column::DueAt.lte(now)).add(unclaimed)
}

/// None: nothing was due.
async fn write_once(app: &App, tenant_id: Uuid) -> Result<Option<Vec<UserError>>, Error> {
    let claimed = object_writes::Entity::update_many()
        .set(object_writes::ActiveModel { claimed_until: Set(Some(app.clock.now() + CLAIM)), ..Default::default() })
        .filter(object_writes::Column::TenantId.eq(tenant_id))
        .filter(is_free(app))
        .exec_with_returning(app.db.write())
        .await?;
    let Some(owed) = claimed.into_iter().next() else { return Ok(None) };
    let tenant = tenants::Entity::in_tenant(tenant_id).one(app.db.read()).await?;
    let tenant = tenant.ok_or_else(|| Error::internal("a write to the object of a tenant that is gone"))?;
    match fulfil::fulfil(app, &tenant, owed.wish).await {
        Ok(()) => {
            settle(app, &owed).await?;
            Ok(Some(Vec::new()))
        }
        Err(Failure::Error(error)) => {
            postpone(app, &owed, "the database can't be used").await?;
            Err(error)
        }
        // Whoever holds it has the last word; what is in the database holds all the same.
        Err(Failure::Problem(Problem::Held(held))) => {
            tracing::warn!(%tenant_id, ?held, "a tenant's object is held by others, and was left as it is");
            settle(app, &owed).await?;
            let name = object_of(app, tenant_id).await?;
            Ok(Some(held.iter().map(|held| wording::kept(&name, held)).collect()))
        }
        Err(Failure::Problem(problem)) => {
            postpone(app, &owed, &wording::reason(&problem)).await?;
            Ok(Some(vec![wording::owed(&object_of(app, tenant_id).await?, &problem)]))
        }
    }
}

async fn object_of(app: &App, tenant_id: Uuid) -> Result<String, Error> {
    Ok(ruler(app.db.read(), tenant_id).await?.map_or_else(|| object_name(tenant_id), |row| row.name))
}

/// It is done; what was wished for meanwhile is due at once.
async fn settle(app: &App, owed: &object_writes::Model) -> Result<(), Error> {
    let deleted = object_writes::Entity::delete_many()
        .filter(object_writes::Column::TenantId.eq(owed.tenant_id))
        .filter(object_writes::Column::Number.eq(owed.number))
        .exec(app.db.write())
        .await?;
    if deleted.rows_affected == 0 {
        let free = object_writes::ActiveModel { claimed_until: Set(None), ..Default::default() };
        object_writes::Entity::update_many()
            .set(free)
            .filter(object_writes::Column::TenantId.eq(owed.tenant_id))
            .exec(app.db.write())
            .await?;
    }
    Ok(())
}

/// It is tried again later. What was wished for meanwhile is due at once.
async fn postpone(app: &App, owed: &object_writes::Model, why: &str) -> Result<(), Error> {
    let pause = TimeDelta::seconds(1 << owed.attempts.clamp(0, 8));
    let now = app.clock.now();
    if owed.attempts == 0 {
        tracing::warn!(tenant_id = %owed.tenant_id, why, "a tenant's object can't be written; trying until it can");
    }
    let later = object_writes::ActiveModel {
        attempts: Set(owed.attempts + 1),
        due_at: Set(now + Ord::min(pause, LONGEST_PAUSE)),
        problem: Set(Some(why.to_owned())),
        ..Default::default()
    };
    let own = || object_writes::Entity::update_many().filter(object_writes::Column::TenantId.eq(owed.tenant_id));
    own().set(later).filter(object_writes::Column::Number.eq(owed.number)).exec(app.db.write()).await?;
    let free = object_writes::ActiveModel { claimed_until: Set(None), ..Default::default() };
    own().set(free).exec(app.db.write()).await?;
    Ok(())
}
