//! API keys: made, changed, rotated, revoked, and checked at the door.

pub mod authority;
pub mod graphql;
pub mod ring;
pub mod secret;

use std::sync::Arc;

use chrono::{DateTime, TimeDelta, Utc};
use entity::{Shared, TenantOwned, admin_keys, api_keys, tenants};
use sea_orm::ActiveValue::Set;
use sea_orm::{ActiveModelTrait, ColumnTrait, Condition, EntityTrait, IntoActiveModel, PaginatorTrait, QueryFilter};
use secrecy::ExposeSecret;
use uuid::Uuid;

use crate::app::App;
use crate::config::AdminConfig;
use crate::db::Db;
use crate::error::{Error, Outcome, UserError, UserErrorCode};
use crate::input::{self, Patch, PatchExt};
use crate::runs::paused::{self, Whose};
use crate::secrets::sha256_hex;
use crate::viewer::{Scope, TenantViewer, Viewer};

/// Keys a tenant may have that aren't revoked.
const MAX_KEYS: u64 = 1_000;
/// The longest grace of a rotation: 30 days.
const MAX_GRACE_SECONDS: i32 = 30 * 24 * 3_600;

/// Writes the uses noted since the last call.
pub async fn write_last_used(app: &App) -> Result<(), Error> {
    for (id, at) in app.keys.uses() {
        api_keys::Entity::update_many()
            .set(api_keys::ActiveModel { last_used_at: Set(Some(at)), ..Default::default() })
            .filter(api_keys::Column::Id.eq(id))
            .exec(app.db.write())
            .await?;
        app.keys.written(id);
    }
    Ok(())
}

/// Why a key is not taken; the same for every reason, so that nothing can be learned from it.
const BAD_KEY: Error = Error::Unauthenticated("This key is not valid: it is unknown, expired or revoked.");

/// Whom a secret lets in. A key that was used a moment ago asks no database; see [`ring`].
///
/// # Errors
/// The key is not valid now, or its tenant is not served.
pub async fn verify(app: &App, secret: &str) -> Result<Arc<TenantViewer>, Error> {
    if !secret::is_well_formed(secret) {
        return Err(BAD_KEY);
    }
    let hash = sha256_hex(secret);
    let now = app.clock.now();
    if let Some(known) = app.keys.known(&hash, now) {
        return Ok(known);
    }
    let loading = app.keys.loading();
    let viewer = Arc::new(load(app, &hash, now).await?);
    app.keys.keep(loading, hash, viewer.clone(), now);
    Ok(viewer)
}

async fn load(app: &App, hash: &str, now: DateTime<Utc>) -> Result<TenantViewer, Error> {
    let either =
        Condition::any().add(api_keys::Column::KeyHash.eq(hash)).add(api_keys::Column::PreviousKeyHash.eq(hash));
    let key = api_keys::Entity::across_tenants().filter(either).one(app.db.read()).await?.ok_or(BAD_KEY)?;
    let rotated = if key.key_hash == hash { None } else { key.previous_key_until };
    let expires_at = [key.expires_at, rotated].into_iter().flatten().min();
    let lapsed = expires_at.is_some_and(|until| until <= now) || (key.key_hash != hash && rotated.is_none());
    if lapsed || !key.is_active || key.revoked_at.is_some() {
        return Err(BAD_KEY);
    }
    let tenant = tenants::Entity::in_tenant(key.tenant_id).one(app.db.read()).await?.ok_or(BAD_KEY)?;
    if tenant.status != tenants::Status::Active {
        return Err(Error::Suspended);
    }
    let plan = app.plans.get(&tenant.plan)?;
    let scopes = Scope::split(&key.scopes);
    Ok(TenantViewer { tenant, plan, key, scopes, expires_at })
}

/// The hash of the platform admin's key: the configured one's, or the stored one's. At the very
/// first start one is made, and returned to be shown this once.
pub async fn admin_key(db: &Db, config: &AdminConfig, now: DateTime<Utc>) -> Result<(String, Option<String>), Error> {
    if let Some(key) = &config.key {
        return Ok((sha256_hex(key.expose_secret()), None));
    }
    if let Some(stored) = admin_keys::Entity::all().one(db.read()).await? {
        return Ok((stored.key_hash, None));
    }
    let key = secret::generate();
    let row =
        admin_keys::ActiveModel { id: Set(Uuid::now_v7()), key_hash: Set(key.hash.clone()), created_at: Set(now) };
    row.insert(db.write()).await?;
    Ok((key.hash, Some(key.secret)))
}

/// What a new key is given.
pub struct NewApiKey {
    /// For people.
    pub name: String,
    /// READ and RUN unless given.
    pub scopes: Option<Vec<Scope>>,
    /// When it stops working.
    pub expires_at: Option<DateTime<Utc>>,
    /// Tokens a month.
    pub monthly_token_limit: Option<i64>,
}

/// Makes a key for a tenant; the secret is returned this once.
pub async fn create(app: &App, viewer: &Viewer, tenant_id: Uuid, new: NewApiKey) -> Outcome<(api_keys::Model, String)> {
    let now = app.clock.now();
    let scopes = new.scopes.unwrap_or_else(|| Scope::DEFAULT.to_vec());
    let mut checks = input::Checks::default();
    checks.text("name", &new.name, 1, 200);
    checks.limit("monthlyTokenLimit", new.monthly_token_limit);
    check_scopes(&mut checks, viewer, &scopes);
    check_expiry(&mut checks, new.expires_at, now);
    checks.finish()?;
    let standing = api_keys::Entity::in_tenant(tenant_id).filter(api_keys::Column::RevokedAt.is_null());
    if standing.count(app.db.read()).await? >= MAX_KEYS {
        let message = format!("A tenant may have {MAX_KEYS} keys; revoke one first.");
        return Err(UserError::new(UserErrorCode::LimitExceeded, "", message).into());
    }
    let key = secret::generate();
    let row = api_keys::ActiveModel {
        id: Set(Uuid::now_v7()),
        tenant_id: Set(tenant_id),
        name: Set(new.name),
        prefix: Set(key.prefix),
        key_hash: Set(key.hash),
        previous_key_hash: Set(None),
        previous_key_until: Set(None),
        scopes: Set(Scope::join(&scopes)),
        is_active: Set(true),
        expires_at: Set(new.expires_at),
        revoked_at: Set(None),
        last_used_at: Set(None),
        monthly_token_limit: Set(new.monthly_token_limit),
        created_at: Set(now),
    };
    Ok((row.insert(app.db.write()).await?, key.secret))
}

/// What may be changed of a key; a field left out stays.
pub struct ApiKeyChange {
    /// For people.
    pub name: Patch<String>,
    /// False refuses it until it is made active again.
    pub is_active: Patch<bool>,
    /// Its rights.
    pub scopes: Patch<Vec<Scope>>,
    /// When it stops working.
    pub expires_at: Patch<DateTime<Utc>>,
    /// Tokens a month.
    pub monthly_token_limit: Patch<i64>,
}

/// Changes a key.
pub async fn update(app: &App, viewer: &Viewer, id: Uuid, change: ApiKeyChange) -> Outcome<api_keys::Model> {
    let key = own(app, viewer, id).await?;
    if key.revoked_at.is_some() {
        return Err(UserError::new(UserErrorCode::State, "apiKeyId", "This key is revoked, for good.").into());
    }
    let mut checks = input::Checks::default();
    let mut row = key.into_active_model();
    if let Some(name) = checks.required("name", change.name) {
        checks.text("name", &name, 1, 200);
        row.name = Set(name);
    }
    if let Some(is_active) = checks.required("isActive", change.is_active) {
        row.is_active = Set(is_active);
    }
    if let Some(scopes) = checks.required("scopes", change.scopes) {
        check_scopes(&mut checks, viewer, &scopes);
        row.scopes = Set(Scope::join(&scopes));
    }
    if let Some(expires_at) = change.expires_at.into_option() {
        check_expiry(&mut checks, expires_at, app.clock.now());
        row.expires_at = Set(expires_at);
    }
    if let Some(limit) = change.monthly_token_limit.into_option() {
        checks.limit("monthlyTokenLimit", limit);
        row.monthly_token_limit = Set(limit);
    }
    checks.finish()?;
    if !row.is_changed() {
        return Ok(row.try_into()?);
    }
    let tx = authority::begin(app, viewer.require_tenant()?.tenant_id()).await?;
    let key = row.update(&tx).await?;
    paused::reconsider(&tx, Whose::Key(key.id)).await?;
    authority::commit(app, tx, key.tenant_id).await?;
    Ok(key)
}

/// Gives a key a new secret at once; the old one works for `grace_seconds` more.
pub async fn rotate(app: &App, viewer: &Viewer, id: Uuid, grace_seconds: i32) -> Outcome<(api_keys::Model, String)> {
    let key = own(app, viewer, id).await?;
    if key.revoked_at.is_some() {
        return Err(UserError::new(UserErrorCode::State, "apiKeyId", "This key is revoked, for good.").into());
    }
    let mut checks = input::Checks::default();
    checks.range("graceSeconds", grace_seconds, 0, MAX_GRACE_SECONDS);
    let own = viewer.require_tenant()?;
    if Scope::split(&key.scopes).iter().any(|scope| !own.has(*scope)) {
        checks.push(UserError::invalid("apiKeyId", "This key has scopes that yours lacks, so you can't rotate it."));
    }
    checks.finish()?;
    let new = secret::generate();
    let old_hash = key.key_hash.clone();
    let mut row = key.into_active_model();
    row.key_hash = Set(new.hash);
    row.prefix = Set(new.prefix);
    row.previous_key_hash = Set((grace_seconds > 0).then_some(old_hash));
    row.previous_key_until =
        Set((grace_seconds > 0).then(|| app.clock.now() + TimeDelta::seconds(i64::from(grace_seconds))));
    let tx = authority::begin(app, viewer.require_tenant()?.tenant_id()).await?;
    let key = row.update(&tx).await?;
    authority::commit(app, tx, key.tenant_id).await?;
    Ok((key, new.secret))
}

/// Revokes a key, for good. Doing it again changes nothing.
pub async fn revoke(app: &App, viewer: &Viewer, id: Uuid) -> Outcome<api_keys::Model> {
    let key = own(app, viewer, id).await?;
    if key.revoked_at.is_some() {
        return Ok(key);
    }
    let mut row = key.into_active_model();
    row.revoked_at = Set(Some(app.clock.now()));
    row.is_active = Set(false);
    let tx = authority::begin(app, viewer.require_tenant()?.tenant_id()).await?;
    let key = row.update(&tx).await?;
    authority::commit(app, tx, key.tenant_id).await?;
    Ok(key)
}

async fn own(app: &App, viewer: &Viewer, id: Uuid) -> Outcome<api_keys::Model> {
    let tenant_id = viewer.require(Scope::Manage)?.tenant_id();
    let key = api_keys::Entity::in_tenant(tenant_id).filter(api_keys::Column::Id.eq(id)).one(app.db.read()).await?;
    key.ok_or_else(|| UserError::not_found("apiKeyId", "API key").into())
}

fn check_scopes(checks: &mut input::Checks, viewer: &Viewer, scopes: &[Scope]) {
    if scopes.is_empty() {
        checks.push(UserError::invalid("scopes", "Name at least one scope."));
    }
    if let Viewer::Tenant(own) = viewer
        && scopes.iter().any(|scope| !own.has(*scope))
    {
        checks.push(UserError::invalid("scopes", "Your key can't grant a scope that it lacks."));
    }
}

fn check_expiry(checks: &mut input::Checks, expires_at: Option<DateTime<Utc>>, now: DateTime<Utc>) {
    if expires_at.is_some_and(|at| at <= now) {
        checks.push(UserError::invalid("expiresAt", "This time has passed already."));
    }
}
