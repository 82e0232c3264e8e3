//! Tokens of tenants' workers, made and rotated for their operators.

use chrono::TimeDelta;
use crds::protocol::{RefusalCode, TOKEN_OVERLAP_SECONDS, TOKEN_SECONDS, Token, TokenRequest};
use entity::{TenantOwned, runtime_tokens, tenants};
use sea_orm::ActiveValue::Set;
use sea_orm::sea_query::Expr;
use sea_orm::{
    ActiveModelTrait, ColumnTrait, DatabaseTransaction, EntityTrait, IntoActiveModel, QueryFilter, QuerySelect,
};
use uuid::Uuid;

use super::places::Place;
use super::refused::Refused;
use crate::app::App;
use crate::error::Error;
use crate::ids;
use crate::keys::authority;
use crate::runtime::tokens;

/// Makes the token of a rotation. Those that it takes the place of end soon after it is seen in use
/// ([`tokens::verify`]), and with the overlap at the latest.
pub async fn mint(app: &App, place: &Place, request: TokenRequest) -> Result<Token, Refused> {
    let missing = || Refused::new(RefusalCode::NotFound, "There is no tenant of this object. Report it first.");
    if request.rotation < 0 {
        return Err(Refused::invalid("A rotation counts up from 0."));
    }
    let found = place.row(app.db.read()).await?.filter(|row| row.is_live()).ok_or_else(missing)?;
    let tx = app.db.begin().await?;
    let tenant = tenants::Entity::in_tenant(found.tenant_id).lock_exclusive().one(&tx).await?;
    let tenant = tenant.filter(|tenant| tenant.status != tenants::Status::Deleting).ok_or_else(missing)?;
    let row = place.locked(&tx).await?.filter(|row| row.is_live() && row.tenant_id == tenant.id);
    row.ok_or_else(missing)?;
    give_way(app, &tx, tenant.id, request.rotation).await?;
    let now = app.clock.now();
    let expires_at = now + TimeDelta::seconds(TOKEN_SECONDS);
    let lasting = tokens::Lasting { expires_at: Some(expires_at), rotation: Some(request.rotation) };
    let (token, secret) = tokens::insert(app, &tx, tenant.id, lasting).await?;
    authority::commit(app, tx, tenant.id).await?;
    Ok(Token { id: ids::encode(ids::RuntimeToken, token.id).to_string(), token: secret, expires_at })
}

/// Has the tokens of earlier rotations expire after the overlap, and those that the same rotation made before, of which
/// the newest may be on its way still; others that were never used are revoked, so that they don't gather.
async fn give_way(app: &App, tx: &DatabaseTransaction, tenant_id: Uuid, rotation: i64) -> Result<(), Refused> {
    let now = app.clock.now();
    let rotated = runtime_tokens::Entity::in_tenant(tenant_id)
        .filter(runtime_tokens::Column::Rotation.is_not_null())
        .all(tx)
        .await?;
    let last = rotated.iter().filter_map(|token| token.rotation).max();
    if let Some(last) = last.filter(|last| *last > rotation) {
        return Err(Refused::conflict(format!(
            "The last rotation of this tenant's token was {last}: go on from there."
        )));
    }
    let until = now + TimeDelta::seconds(TOKEN_OVERLAP_SECONDS);
    let newest = rotated.iter().filter(|token| token.rotation == Some(rotation)).map(|token| token.id).max();
    let works = |token: &runtime_tokens::Model| {
        token.revoked_at.is_none() && token.expires_at.is_none_or(|expires_at| expires_at > now)
    };
    for token in rotated.into_iter().filter(works) {
        let is_unused = token.rotation == Some(rotation) && Some(token.id) != newest && token.last_used_at.is_none();
        let expires_at = token.expires_at.map_or(until, |earlier| Ord::min(earlier, until));
        let mut row = token.into_active_model();
        if is_unused {
            row.revoked_at = Set(Some(now));
        }
        row.expires_at = Set(Some(expires_at));
        row.update(tx).await?;
    }
    Ok(())
}

/// Another object has the tenant, whose operator counts its rotations anew: the tokens of the one before work for the
/// overlap. The caller commits.
pub async fn begin_anew(app: &App, tx: &DatabaseTransaction, tenant_id: Uuid) -> Result<(), Error> {
    let until = app.clock.now() + TimeDelta::seconds(TOKEN_OVERLAP_SECONDS);
    let expires_at = runtime_tokens::Column::ExpiresAt;
    let rotated = || {
        runtime_tokens::Entity::update_many()
            .filter(runtime_tokens::Column::TenantId.eq(tenant_id))
            .filter(runtime_tokens::Column::Rotation.is_not_null())
    };
    rotated().col_expr(expires_at, Expr::value(until)).filter(expires_at.gt(until)).exec(tx).await?;
    rotated().col_expr(runtime_tokens::Column::Rotation, Expr::value(None::<i64>)).exec(tx).await?;
    Ok(())
}
