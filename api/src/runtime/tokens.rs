//! Workers' tokens, each for one tenant's pool: made, rotated and revoked by the platform admin, or made by the tenant's
//! operator in rotations that count up.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use crds::protocol::TOKEN_SEEN_SECONDS;
use entity::{TenantOwned, runtime_tokens, tenants};
use sea_orm::ActiveValue::Set;
use sea_orm::{
    ActiveModelTrait, ColumnTrait, Condition, ConnectionTrait, DatabaseTransaction, EntityTrait, IntoActiveModel,
    PaginatorTrait, QueryFilter, QuerySelect,
};
use tokio::sync::broadcast::error::RecvError;
use uuid::Uuid;

use crate::app::App;
use crate::error::{Error, Outcome, UserError, UserErrorCode};
use crate::input::Checks;
use crate::keys::{authority, secret};
use crate::secrets::sha256_hex;

/// Tokens a tenant may have that work.
const MAX_TOKENS: u64 = 100;
/// The longest grace of a rotation: 30 days.
const MAX_GRACE_SECONDS: i32 = 30 * 24 * 3_600;
/// How often a token's last use is noted.
const USE: TimeDelta = TimeDelta::seconds(60);

/// Why a token is not taken; the same for every reason, so that nothing can be learned from it.
const BAD_TOKEN: Error = Error::Unauthenticated("This token is not valid: it is unknown, expired or revoked.");

/// A worker that was let in.
#[derive(Clone, Debug)]
pub struct Caller {
    /// The token's row.
    pub token_id: Uuid,
    /// Whose pool it opens.
    pub tenant: tenants::Model,
    /// When the token stops working.
    expires_at: Option<DateTime<Utc>>,
}

/// Whom a token lets in. The database is asked each time, so that what was revoked or suspended elsewhere holds at once.
///
/// # Errors
/// The token is not valid now, or its tenant is not served.
pub async fn verify(app: &App, token: Option<&str>) -> Result<Caller, Error> {
    let token = token.ok_or(Error::Unauthenticated("Send the runtime's token as `Authorization: Bearer`."))?;
    if !secret::is_well_formed_runtime_token(token) {
        return Err(BAD_TOKEN);
    }
    let by_hash =
        runtime_tokens::Entity::across_tenants().filter(runtime_tokens::Column::TokenHash.eq(sha256_hex(token)));
    let token = by_hash.one(app.db.read()).await?.ok_or(BAD_TOKEN)?;
    let caller = caller(app, token.clone()).await?;
    let now = app.clock.now();
    if token.last_used_at.is_none_or(|last| now - last >= USE) {
        let first_of = token.rotation.filter(|_| token.last_used_at.is_none());
        let mut row = token.clone().into_active_model();
        row.last_used_at = Set(Some(now));
        match first_of {
            None => drop(row.update(app.db.write()).await?),
            Some(rotation) => {
                let tx = authority::begin(app, token.tenant_id).await?;
                row.update(&tx).await?;
                end_replaced(app, tx, &token, rotation).await?;
            }
        }
    }
    Ok(caller)
}

/// A rotation's token has arrived where it is used: those whose place it takes end soon, once all of the tenant's workers
/// must have it. Commits.
async fn end_replaced(
    app: &App,
    tx: DatabaseTransaction,
    token: &runtime_tokens::Model,
    rotation: i64,
) -> Result<(), Error> {
    let before = Condition::any().add(runtime_tokens::Column::Rotation.lt(rotation)).add(
        Condition::all()
            .add(runtime_tokens::Column::Rotation.eq(rotation))
            .add(runtime_tokens::Column::Id.lt(token.id)),
    );
    let until = app.clock.now() + TimeDelta::seconds(TOKEN_SEEN_SECONDS);
    let ended = runtime_tokens::Entity::update_many()
        .set(runtime_tokens::ActiveModel { expires_at: Set(Some(until)), ..Default::default() })
        .filter(runtime_tokens::Column::TenantId.eq(token.tenant_id))
        .filter(runtime_tokens::Column::ExpiresAt.gt(until))
        .filter(before)
        .exec(&tx)
        .await?;
    match ended.rows_affected {
        0 => Ok(tx.commit().await?),
        _ => authority::commit(app, tx, token.tenant_id).await,
    }
}

async fn caller(app: &App, token: runtime_tokens::Model) -> Result<Caller, Error> {
    if token.revoked_at.is_some() || token.expires_at.is_some_and(|at| at <= app.clock.now()) {
        return Err(BAD_TOKEN);
    }
    let tenant = tenants::Entity::in_tenant(token.tenant_id).one(app.db.read()).await?.ok_or(BAD_TOKEN)?;
    if tenant.status != tenants::Status::Active {
        return Err(Error::Suspended);
    }
    Ok(Caller { token_id: token.id, tenant, expires_at: token.expires_at })
}

/// Looks again whether a worker is to be let in.
pub async fn confirm(app: &App, known: &Caller) -> Result<Caller, Error> {
    let token =
        runtime_tokens::Entity::in_tenant(known.tenant.id).filter(runtime_tokens::Column::Id.eq(known.token_id));
    let token = token.one(app.db.read()).await?.ok_or(BAD_TOKEN)?;
    caller(app, token).await
}

/// Waits until a worker that was let in is not to be let in any more.
pub async fn lost(app: &App, mut known: Caller) -> Error {
    /// The clock is finer than a timer: without a pause the check could come just too early, over and over.
    const MARGIN: Duration = Duration::from_millis(5);
    let mut changes = app.authority_changes();
    loop {
        let expiry = async {
            match known.expires_at {
                Some(at) => tokio::time::sleep((at - app.clock.now()).to_std().unwrap_or_default() + MARGIN).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            change = changes.recv() => match change {
                Ok(tenant_id) if tenant_id != known.tenant.id => continue,
                // It may have been among those that were missed.
                Ok(_) | Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => std::future::pending().await,
            },
            () = expiry => {}
        }
        match confirm(app, &known).await {
            Ok(still) => known = still,
            Err(error) => return error,
        }
    }
}

/// Makes a token for a tenant's workers; the secret is returned this once.
pub async fn create(app: &App, tenant_id: Uuid) -> Outcome<(runtime_tokens::Model, String)> {
    if !crate::tenants::exists(app, tenant_id).await? {
        return Err(UserError::not_found("tenantId", "tenant").into());
    }
    insert(app, app.db.write(), tenant_id, Lasting::default()).await
}

/// Makes a token in another's place, which works for `grace_seconds` more.
pub async fn rotate(app: &App, id: Uuid, grace_seconds: i32) -> Outcome<(runtime_tokens::Model, String)> {
    let mut checks = Checks::default();
    checks.range("graceSeconds", grace_seconds, 0, MAX_GRACE_SECONDS);
    checks.finish()?;
    let (tx, old) = locked(app, id).await?;
    let now = app.clock.now();
    if old.revoked_at.is_some() || old.expires_at.is_some_and(|at| at <= now) {
        let message = "This token works no longer: make a new one.";
        return Err(UserError::new(UserErrorCode::State, "runtimeTokenId", message).into());
    }
    let tenant_id = old.tenant_id;
    let until = now + TimeDelta::seconds(i64::from(grace_seconds));
    let until = old.expires_at.map_or(until, |earlier| Ord::min(earlier, until));
    let mut row = old.into_active_model();
    row.expires_at = Set(Some(until));
    row.update(&tx).await?;
    let made = insert(app, &tx, tenant_id, Lasting::default()).await?;
    authority::commit(app, tx, tenant_id).await?;
    Ok(made)
}

/// Revokes a token, for good. Doing it again changes nothing.
pub async fn revoke(app: &App, id: Uuid) -> Outcome<runtime_tokens::Model> {
    let (tx, token) = locked(app, id).await?;
    if token.revoked_at.is_some() {
        return Ok(token);
    }
    let mut row = token.into_active_model();
    row.revoked_at = Set(Some(app.clock.now()));
    let token = row.update(&tx).await?;
    authority::commit(app, tx, token.tenant_id).await?;
    Ok(token)
}

/// How long a token works, and how it is replaced.
#[derive(Clone, Copy, Debug, Default)]
pub struct Lasting {
    /// When it stops working by itself.
    pub expires_at: Option<DateTime<Utc>>,
    /// Which of its operator's rotations it is of; none: it is replaced by [`rotate`].
    pub rotation: Option<i64>,
}

/// Makes a token in a transaction of the caller's; the secret is returned this once.
pub async fn insert(
    app: &App,
    db: &impl ConnectionTrait,
    tenant_id: Uuid,
    lasting: Lasting,
) -> Outcome<(runtime_tokens::Model, String)> {
    let now = app.clock.now();
    let unexpired = Condition::any()
        .add(runtime_tokens::Column::ExpiresAt.is_null())
        .add(runtime_tokens::Column::ExpiresAt.gt(now));
    let working = runtime_tokens::Entity::in_tenant(tenant_id)
        .filter(runtime_tokens::Column::RevokedAt.is_null())
        .filter(unexpired);
    if working.count(db).await? >= MAX_TOKENS {
        let message = format!("A tenant may have {MAX_TOKENS} tokens that work; revoke one first.");
        return Err(UserError::new(UserErrorCode::LimitExceeded, "", message).into());
    }
    let token = secret::generate_runtime_token();
    let row = runtime_tokens::ActiveModel {
        id: Set(app.clock.new_id()),
        tenant_id: Set(tenant_id),
        prefix: Set(token.prefix),
        token_hash: Set(token.hash),
        expires_at: Set(lasting.expires_at),
        revoked_at: Set(None),
        last_used_at: Set(None),
        created_at: Set(now),
        rotation: Set(lasting.rotation),
    };
    Ok((row.insert(db).await?, token.secret))
}

/// Opens a transaction that holds a token and its tenant.
async fn locked(app: &App, id: Uuid) -> Outcome<(DatabaseTransaction, runtime_tokens::Model)> {
    let missing = || UserError::not_found("runtimeTokenId", "runtime token");
    let token = || runtime_tokens::Entity::across_tenants().filter(runtime_tokens::Column::Id.eq(id));
    let found = token().one(app.db.read()).await?.ok_or_else(missing)?;
    let tx = authority::begin(app, found.tenant_id).await?;
    let token = token().lock_exclusive().one(&tx).await?.ok_or_else(missing)?;
    Ok((tx, token))
}
