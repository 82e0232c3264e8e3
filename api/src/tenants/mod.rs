//! Tenants: made, changed, suspended and deleted by the platform admin ([`admin`]), or as their objects say
//! ([`crate::cluster`]).

pub mod admin;
pub mod changes;
pub mod edit;
pub mod graphql;

use base64::Engine;
use chrono::TimeDelta;
use entity::{TenantOwned, tenants};
use rand::RngExt;
use sea_orm::ActiveValue::Set;
use sea_orm::{
    ActiveModelTrait, ColumnTrait, ConnectionTrait, DatabaseTransaction, IntoActiveModel, QueryFilter, QuerySelect,
};
use uuid::Uuid;

use self::edit::Edit;
use crate::app::App;
use crate::error::{Error, Outcome, Refusal, UserError, UserErrorCode};
use crate::input::{Checks, Patch, PatchExt};
use crate::runs;
use crate::viewer::{Scope, Viewer};

/// The longest name, in characters.
pub const MAX_NAME: usize = 200;
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
    insert(app, app.db.write(), new).await
}

/// Makes a tenant, in a transaction of the caller's.
pub async fn insert(app: &App, db: &impl ConnectionTrait, new: NewTenant) -> Outcome<tenants::Model> {
    let mut checks = Checks::default();
    checks.text("name", &new.name, 1, MAX_NAME);
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
        suspended_by_object: Set(false),
        suspended_by_admin: Set(false),
        suspended_by_billing: Set(false),
        suspended_by_absence: Set(false),
        is_leaving: Set(false),
    };
    Ok(row.insert(db).await?)
}

/// What is to change of a tenant; a cleared limit is the plan's again.
#[derive(Clone)]
pub struct TenantChange {
    /// For people.
    pub name: Patch<String>,
    /// Its own limit in tokens a month.
    pub monthly_token_limit: Patch<i64>,
}

impl TenantChange {
    /// Refuses what can't be.
    pub fn check(&self) -> Outcome<()> {
        let mut checks = Checks::default();
        if let Some(name) = checks.required("name", self.name.clone()) {
            checks.text("name", &name, 1, MAX_NAME);
        }
        checks.limit("monthlyTokenLimit", self.monthly_token_limit.into_option().flatten());
        checks.finish()
    }

    /// Changes it.
    pub fn apply(self, edit: &mut Edit) {
        if let Some(name) = self.name.into_option().flatten() {
            edit.rename(name);
        }
        if let Some(limit) = self.monthly_token_limit.into_option() {
            edit.limit(limit);
        }
    }
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
    monthly_limit_of(app, &tenant.plan, tenant.monthly_token_limit)
}

/// As [`monthly_limit`], of a tenant on this plan with this limit of its own.
pub fn monthly_limit_of(app: &App, plan: &str, own: Option<i64>) -> Result<i64, Error> {
    own.map_or_else(|| Ok(app.plans.get(plan)?.monthly_token_limit), Ok)
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

/// A tenant, its row locked.
async fn locked_in_any_state(tx: &DatabaseTransaction, id: Uuid) -> Outcome<tenants::Model> {
    let tenant = tenants::Entity::in_tenant(id).lock_exclusive().one(tx).await?;
    tenant.ok_or_else(|| UserError::not_found("tenantId", "tenant").into())
}

/// A tenant that isn't being deleted, its row locked.
async fn locked(tx: &DatabaseTransaction, id: Uuid) -> Outcome<tenants::Model> {
    let tenant = locked_in_any_state(tx, id).await?;
    if tenant.status == tenants::Status::Deleting {
        return Err(UserError::new(UserErrorCode::State, "tenantId", "This tenant is being deleted.").into());
    }
    Ok(tenant)
}

/// 24 random bytes in base64, as Standard Webhooks asks for.
fn webhook_secret() -> String {
    let mut bytes = [0_u8; 24];
    rand::rng().fill(&mut bytes);
    base64::engine::general_purpose::STANDARD.encode(bytes)
}
