//! What holds for tenants, as their operators are told.

use std::collections::HashMap;

use crds::protocol::{Runs, State, Suspension, Usage};
use entity::quota_counters::Scope;
use entity::runs::Status;
use entity::tenants::Isolation;
use entity::{TenantOwned, cluster_tenants, quota_counters, runs, runtime_tokens, tenants};
use sea_orm::{ColumnTrait, Condition, QueryFilter, QuerySelect};
use uuid::Uuid;

use super::refused::Refused;
use crate::app::App;
use crate::clock::month_of;
use crate::error::Error;
use crate::runs::queue;
use crate::{ids, tenants as operations};

/// Tenants a statement.
const MOST: usize = 500;

/// What holds for the tenant of an object.
pub async fn of(app: &App, row: cluster_tenants::Model) -> Result<State, Refused> {
    let states = of_all(app, vec![row]).await?;
    let state = states.into_iter().next().map(|(_, state)| state);
    Ok(state.ok_or_else(|| Error::internal("an object of a tenant that is gone"))?)
}

/// What holds for the tenants of objects, by the objects' names: four statements for 500 of them.
pub async fn of_all(app: &App, rows: Vec<cluster_tenants::Model>) -> Result<Vec<(String, State)>, Error> {
    let mut states = Vec::with_capacity(rows.len());
    for rows in rows.chunks(MOST) {
        let ids: Vec<Uuid> = rows.iter().map(|row| row.tenant_id).collect();
        let period = month_of(app.clock.now());
        let tenants = tenants(app, &ids).await?;
        let used = used(app, &ids, &period).await?;
        let runs = runs(app, &ids).await?;
        let rotations = rotations(app, &ids).await?;
        for row in rows {
            let Some(tenant) = tenants.get(&row.tenant_id) else { continue };
            let usage = Usage {
                period: period.clone(),
                tokens: used.get(&tenant.id).copied().unwrap_or(0),
                limit: operations::monthly_limit(app, tenant)?,
            };
            let state = State {
                tenant_id: ids::encode(ids::Tenant, tenant.id).to_string(),
                plan: tenant.plan.clone(),
                is_dedicated: Some(tenant.isolation == Isolation::Dedicated),
                generation: Some(row.generation),
                suspended: suspension(tenant),
                usage,
                runs: runs.get(&tenant.id).copied().unwrap_or_default(),
                rotation: Some(rotations.get(&tenant.id).copied().unwrap_or(0)),
            };
            states.push((row.name.clone(), state));
        }
    }
    Ok(states)
}

/// Why a tenant is not served. One that was deleted through the API is an admin's doing.
fn suspension(tenant: &tenants::Model) -> Option<Suspension> {
    let is_deleting = tenant.status == tenants::Status::Deleting;
    [
        (tenant.suspended_by_object, Suspension::Requested),
        (tenant.suspended_by_admin || is_deleting, Suspension::ByAdmin),
        (tenant.suspended_by_billing, Suspension::PaymentFailed),
    ]
    .into_iter()
    .find_map(|(holds, why)| holds.then_some(why))
}

async fn tenants(app: &App, ids: &[Uuid]) -> Result<HashMap<Uuid, tenants::Model>, Error> {
    let found = tenants::Entity::across_tenants().filter(tenants::Column::Id.is_in(ids.iter().copied()));
    Ok(found.all(app.db.read()).await?.into_iter().map(|tenant| (tenant.id, tenant)).collect())
}

async fn used(app: &App, ids: &[Uuid], period: &str) -> Result<HashMap<Uuid, i64>, Error> {
    let counters: Vec<(Uuid, i64)> = quota_counters::Entity::across_tenants()
        .filter(quota_counters::Column::TenantId.is_in(ids.iter().copied()))
        .filter(quota_counters::Column::Scope.eq(Scope::Tenant))
        .filter(quota_counters::Column::Period.eq(period))
        .select_only()
        .columns([quota_counters::Column::TenantId, quota_counters::Column::Used])
        .into_tuple()
        .all(app.db.read())
        .await?;
    Ok(counters.into_iter().collect())
}

/// The last rotation of each tenant of which a token works.
async fn rotations(app: &App, ids: &[Uuid]) -> Result<HashMap<Uuid, i64>, Error> {
    let expires_at = runtime_tokens::Column::ExpiresAt;
    let rotations: Vec<(Uuid, i64)> = runtime_tokens::Entity::across_tenants()
        .filter(runtime_tokens::Column::TenantId.is_in(ids.iter().copied()))
        .filter(runtime_tokens::Column::Rotation.is_not_null())
        .filter(runtime_tokens::Column::RevokedAt.is_null())
        .filter(Condition::any().add(expires_at.is_null()).add(expires_at.gt(app.clock.now())))
        .select_only()
        .column(runtime_tokens::Column::TenantId)
        .column_as(runtime_tokens::Column::Rotation.max(), "rotation")
        .group_by(runtime_tokens::Column::TenantId)
        .into_tuple()
        .all(app.db.read())
        .await?;
    Ok(rotations.into_iter().collect())
}

/// Runs by tenant. Those that wait for their conversation's turn can't be claimed yet, and don't count as queued.
async fn runs(app: &App, ids: &[Uuid]) -> Result<HashMap<Uuid, Runs>, Error> {
    let waiting = Condition::all().add(runs::Column::Status.eq(Status::Queued)).add(runs::Column::Vtime.is_not_null());
    let counts: Vec<(Uuid, String, Status, i64)> = runs::Entity::across_tenants()
        .filter(runs::Column::TenantId.is_in(ids.iter().copied()))
        .filter(Condition::any().add(waiting).add(runs::Column::Status.eq(Status::Running)))
        .select_only()
        .columns([runs::Column::TenantId, runs::Column::Pool, runs::Column::Status])
        .column_as(runs::Column::Id.count(), "count")
        .group_by(runs::Column::TenantId)
        .group_by(runs::Column::Pool)
        .group_by(runs::Column::Status)
        .into_tuple()
        .all(app.db.read())
        .await?;
    let mut all: HashMap<Uuid, Runs> = HashMap::new();
    for (tenant_id, pool, status, count) in counts {
        let (runs, count) = (all.entry(tenant_id).or_default(), count.unsigned_abs());
        if status == Status::Queued {
            runs.queued += count;
            continue;
        }
        runs.running += count;
        if pool == queue::own_pool(tenant_id) {
            runs.running_dedicated += count;
        }
    }
    Ok(all)
}
