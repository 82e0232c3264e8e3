//! Tenants: made, changed, suspended and deleted by the platform admin.

pub mod changes;
pub mod graphql;

use base64::Engine;
use chrono::TimeDelta;
use entity::{TenantOwned, tenant_queues, tenants};
use rand::RngExt;
use sea_orm::ActiveValue::Set;
use sea_orm::sea_query::Expr;
use sea_orm::{
    ActiveModelTrait, ColumnTrait, DatabaseTransaction, EntityTrait, IntoActiveModel, QueryFilter, QuerySelect,
};
use uuid::Uuid;

use crate::app::App;
use crate::error::{Error, Outcome, Refusal, UserError, UserErrorCode};
use crate::input::{Checks, Patch, PatchExt};
use crate::keys::authority;
use crate::runs;
use crate::viewer::{Scope, Viewer};

/// The longest grace of a rotated webhook secret: 30 days.
const MAX_GRACE_SECONDS: i32 = 30 * 24 * 3_600;

/// What a new tenant is given.
pub struct NewTenant {
    /// For people.
    pub name: String,
    /// Where invoices go.
    pub email: String,
    /// The plan's name.
    pub plan: String,
    /// Its own limit in tokens a month; none: the plan's.
    pub monthly_token_limit: Option<i64>,
}

/// Makes a tenant.
pub async fn create(app: &App, new: NewTenant) -> Outcome<tenants::Model> {
    let mut checks = Checks::default();
    checks.text("name", &new.name, 1, 200);
    checks.email("email", &new.email);
    checks.limit("monthlyTokenLimit", new.monthly_token_limit);
    checks.finish()?;
    let plan = app.plans.get(&new.plan)?;
    let id = Uuid::now_v7();
    let now = app.clock.now();
    let row = tenants::ActiveModel {
        id: Set(id),
        name: Set(new.name),
        email: Set(new.email),
        plan: Set(new.plan),
        monthly_token_limit: Set(new.monthly_token_limit),
        status: Set(tenants::Status::Active),
        isolation: Set(plan.isolation),
        webhook_secret: Set(app.vault.seal(id, &webhook_secret())?),
        previous_webhook_secret: Set(None),
        previous_webhook_secret_until: Set(None),
        created_at: Set(now),
        updated_at: Set(now),
        auth_epoch: Set(0),
    };
    Ok(row.insert(app.db.write()).await?)
}

/// Changes a tenant's name or limit. A cleared limit is the plan's again.
pub async fn update(app: &App, id: Uuid, name: Patch<String>, limit: Patch<i64>) -> Outcome<tenants::Model> {
    let tx = app.db.begin().await?;
    let mut row = locked(&tx, id).await?.into_active_model();
    let mut checks = Checks::default();
    if let Some(name) = checks.required("name", name) {
        checks.text("name", &name, 1, 200);
        row.name = Set(name);
    }
    if let Some(limit) = limit.into_option() {
        checks.limit("monthlyTokenLimit", limit);
        row.monthly_token_limit = Set(limit);
    }
    checks.finish()?;
    row.updated_at = Set(app.clock.now());
    let tenant = row.update(&tx).await?;
    authority::commit(app, tx, id).await?;
    app.changes.publish(id, changes::Change::Usage);
    app.releases.wake();
    Ok(tenant)
}

/// Moves a tenant to a plan: its limit (unless it has its own), weight, caps and isolation.
pub async fn set_plan(app: &App, id: Uuid, plan: &str) -> Outcome<tenants::Model> {
    let plan = app.plans.get(plan)?;
    let tx = app.db.begin().await?;
    let tenant = locked(&tx, id).await?;
    let suspended = tenant.status != tenants::Status::Active;
    let mut row = tenant.into_active_model();
    row.plan = Set(plan.name.clone());
    row.isolation = Set(plan.isolation);
    row.updated_at = Set(app.clock.now());
    let tenant = row.update(&tx).await?;
    if !suspended {
        set_max_running(&tx, id, plan.max_concurrent_runs).await?;
    }
    runs::queue::change_pool(app, &tx, &tenant).await?;
    authority::commit(app, tx, id).await?;
    app.wakes.wake(&runs::queue::pool_of(&tenant));
    app.releases.wake();
    app.changes.publish(id, changes::Change::Usage);
    Ok(tenant)
}

/// Stops serving a tenant at once: its keys answer 403, its runs go back to the queue and wait there.
pub async fn suspend(app: &App, id: Uuid) -> Outcome<tenants::Model> {
    let tx = app.db.begin().await?;
    let mut row = locked(&tx, id).await?.into_active_model();
    row.status = Set(tenants::Status::Suspended);
    row.updated_at = Set(app.clock.now());
    let tenant = row.update(&tx).await?;
    set_max_running(&tx, id, 0).await?;
    authority::commit(app, tx, id).await?;
    // Apart: here runs are locked before the queue. Nothing is claimed any more, so none is overlooked.
    let tx = app.db.begin().await?;
    let stopped = runs::queue::take_back(&tx, runs::queue::Whose::Tenant(id), app.clock.now()).await?;
    tx.commit().await?;
    runs::announce(app, &stopped);
    Ok(tenant)
}

/// Serves a suspended tenant again; its runs go on.
pub async fn resume(app: &App, id: Uuid) -> Outcome<tenants::Model> {
    let tx = app.db.begin().await?;
    let tenant = locked(&tx, id).await?;
    if tenant.status == tenants::Status::Active {
        return Ok(tenant);
    }
    let plan = app.plans.get(&tenant.plan)?;
    let mut row = tenant.into_active_model();
    row.status = Set(tenants::Status::Active);
    row.updated_at = Set(app.clock.now());
    let tenant = row.update(&tx).await?;
    set_max_running(&tx, id, plan.max_concurrent_runs).await?;
    authority::commit(app, tx, id).await?;
    app.wakes.wake(&runs::queue::pool_of(&tenant));
    Ok(tenant)
}

/// Stops serving a tenant for good and cancels its runs. Its rows are kept for the books. A deletion that was
/// interrupted may be asked for again, and goes on by itself at the next start.
pub async fn delete(app: &App, id: Uuid) -> Outcome<Uuid> {
    let tx = app.db.begin().await?;
    let mut row = locked_in_any_state(&tx, id).await?.into_active_model();
    row.status = Set(tenants::Status::Deleting);
    row.updated_at = Set(app.clock.now());
    row.update(&tx).await?;
    set_max_running(&tx, id, 0).await?;
    authority::commit(app, tx, id).await?;
    runs::cancel_all(app, id).await?;
    Ok(id)
}

/// Gives a tenant a new webhook secret; the old one signs too for `grace_seconds`. Returns the new
/// one in Standard Webhooks' form, `whsec_…`.
pub async fn rotate_webhook_secret(app: &App, viewer: &Viewer, grace_seconds: i32) -> Outcome<String> {
    let tenant_id = viewer.require(Scope::Manage)?.tenant_id();
    let mut checks = Checks::default();
    checks.range("graceSeconds", grace_seconds, 0, MAX_GRACE_SECONDS);
    checks.finish()?;
    let now = app.clock.now();
    let secret = webhook_secret();
    let tx = app.db.begin().await?;
    let tenant = locked(&tx, tenant_id).await?;
    let old = (grace_seconds > 0).then(|| tenant.webhook_secret.clone());
    let mut row = tenant.into_active_model();
    row.webhook_secret = Set(app.vault.seal(tenant_id, &secret)?);
    row.previous_webhook_secret_until = Set(old.is_some().then(|| now + TimeDelta::seconds(i64::from(grace_seconds))));
    row.previous_webhook_secret = Set(old);
    row.updated_at = Set(now);
    row.update(&tx).await?;
    tx.commit().await?;
    Ok(format!("whsec_{secret}"))
}

/// The secrets that sign a tenant's webhooks now, newest first, as base64.
pub fn signing_secrets(app: &App, tenant: &tenants::Model) -> Result<Vec<String>, Error> {
    let now = app.clock.now();
    let previous = tenant
        .previous_webhook_secret
        .as_ref()
        .filter(|_| tenant.previous_webhook_secret_until.is_some_and(|until| until > now));
    std::iter::once(&tenant.webhook_secret).chain(previous).map(|sealed| app.vault.open(tenant.id, sealed)).collect()
}

/// The tenant's limit in tokens a month: its own, or its plan's.
pub fn monthly_limit(app: &App, tenant: &tenants::Model) -> Result<i64, Error> {
    match tenant.monthly_token_limit {
        Some(limit) => Ok(limit),
        None => Ok(app.plans.get(&tenant.plan)?.monthly_token_limit),
    }
}

/// Whether there is such a tenant that isn't being deleted.
pub async fn exists(app: &App, id: Uuid) -> Result<bool, Error> {
    let standing = tenants::Entity::in_tenant(id).filter(tenants::Column::Status.ne(tenants::Status::Deleting));
    Ok(standing.one(app.db.read()).await?.is_some())
}

/// Cancels what deletions that were interrupted have left of their tenants' runs.
pub async fn finish_deletions(app: &App) -> Result<(), Error> {
    let deleting = tenants::Entity::across_tenants()
        .filter(tenants::Column::Status.eq(tenants::Status::Deleting))
        .all(app.db.read())
        .await?;
    for tenant in deleting {
        if let Err(Refusal::Error(error)) = runs::cancel_all(app, tenant.id).await {
            return Err(error);
        }
    }
    Ok(())
}

async fn locked_in_any_state(tx: &DatabaseTransaction, id: Uuid) -> Outcome<tenants::Model> {
    let tenant = tenants::Entity::in_tenant(id).lock_exclusive().one(tx).await?;
    tenant.ok_or_else(|| UserError::not_found("tenantId", "tenant").into())
}

async fn locked(tx: &DatabaseTransaction, id: Uuid) -> Outcome<tenants::Model> {
    let tenant = locked_in_any_state(tx, id).await?;
    if tenant.status == tenants::Status::Deleting {
        return Err(UserError::new(UserErrorCode::State, "tenantId", "This tenant is being deleted.").into());
    }
    Ok(tenant)
}

async fn set_max_running(tx: &DatabaseTransaction, tenant_id: Uuid, max_running: i32) -> Result<(), Error> {
    tenant_queues::Entity::update_many()
        .col_expr(tenant_queues::Column::MaxRunning, Expr::value(max_running))
        .filter(tenant_queues::Column::TenantId.eq(tenant_id))
        .exec(tx)
        .await?;
    Ok(())
}

/// 24 random bytes in base64, as Standard Webhooks asks for.
fn webhook_secret() -> String {
    let mut bytes = [0_u8; 24];
    rand::rng().fill(&mut bytes);
    base64::engine::general_purpose::STANDARD.encode(bytes)
}
