//! `ApiKey` and what is done with keys; `viewer`.
#![allow(missing_docs)] // fields and inputs are what the schema says they are

use async_graphql::connection::Connection;
use async_graphql::{Context, ID, InputObject, MaybeUndefined, Object, Result, SimpleObject};
use chrono::{DateTime, Utc};
use entity::api_keys;
use uuid::Uuid;

use super::{ApiKeyChange, NewApiKey};
use crate::error::{Error, Outcome, UserError, payload};
use crate::graphql::limits::list_complexity;
use crate::graphql::loaders::{ApiKeysOf, load};
use crate::graphql::page::{Cursor, PageArgs};
use crate::graphql::scalars::Long;
use crate::graphql::{app, viewer};
use crate::ids;
use crate::tenants::graphql::Tenant;
use crate::viewer::{Scope, Viewer};

/// An API key. Its secret is shown when it is made, never again.
#[derive(Clone)]
pub struct ApiKey(pub api_keys::Model);

#[Object]
impl ApiKey {
    pub async fn id(&self) -> ID {
        ids::encode(ids::ApiKey, self.0.id)
    }

    async fn name(&self) -> &str {
        &self.0.name
    }

    /// First characters of the key, to recognise it by.
    async fn prefix(&self) -> &str {
        &self.0.prefix
    }

    async fn scopes(&self) -> Vec<Scope> {
        Scope::split(&self.0.scopes)
    }

    async fn is_active(&self) -> bool {
        self.0.is_active
    }

    async fn last_used_at(&self) -> Option<DateTime<Utc>> {
        self.0.last_used_at
    }

    async fn expires_at(&self) -> Option<DateTime<Utc>> {
        self.0.expires_at
    }

    async fn revoked_at(&self) -> Option<DateTime<Utc>> {
        self.0.revoked_at
    }

    async fn monthly_token_limit(&self) -> Option<Long> {
        self.0.monthly_token_limit.map(Long)
    }

    async fn created_at(&self) -> DateTime<Utc> {
        self.0.created_at
    }
}

/// Who calls.
#[derive(SimpleObject)]
#[graphql(name = "Viewer")]
struct ViewerObject {
    scopes: Vec<Scope>,
    is_platform_admin: bool,
    tenant: Option<Tenant>,
    api_key: Option<ApiKey>,
}

#[derive(InputObject)]
pub struct ApiKeyIdInput {
    api_key_id: ID,
}

#[derive(InputObject)]
pub struct CreateApiKeyInput {
    name: String,
    /// READ and RUN unless given.
    scopes: Option<Vec<Scope>>,
    expires_at: Option<DateTime<Utc>>,
    monthly_token_limit: Option<Long>,
    /// Whose key it is; only a platform admin needs to say.
    tenant_id: Option<ID>,
}

#[derive(InputObject)]
pub struct UpdateApiKeyInput {
    api_key_id: ID,
    name: MaybeUndefined<String>,
    is_active: MaybeUndefined<bool>,
    scopes: MaybeUndefined<Vec<Scope>>,
    expires_at: MaybeUndefined<DateTime<Utc>>,
    monthly_token_limit: MaybeUndefined<Long>,
}

#[derive(InputObject)]
pub struct RotateApiKeyInput {
    api_key_id: ID,
    #[graphql(default = 0)]
    grace_seconds: i32,
}

#[derive(SimpleObject)]
pub struct ApiKeyPayload {
    api_key: Option<ApiKey>,
    errors: Vec<UserError>,
}

#[derive(SimpleObject)]
pub struct ApiKeySecretPayload {
    api_key: Option<ApiKey>,
    secret: Option<String>,
    errors: Vec<UserError>,
}

fn key_payload(outcome: Outcome<api_keys::Model>) -> Result<ApiKeyPayload> {
    let (api_key, errors) = payload(outcome.map(ApiKey))?;
    Ok(ApiKeyPayload { api_key, errors })
}

fn secret_payload(outcome: Outcome<(api_keys::Model, String)>) -> Result<ApiKeySecretPayload> {
    let (made, errors) = payload(outcome)?;
    let (api_key, secret) = made.map(|(key, secret)| (ApiKey(key), secret)).unzip();
    Ok(ApiKeySecretPayload { api_key, secret, errors })
}

/// An id that isn't a key's finds none.
fn key_id(id: &ID) -> Uuid {
    ids::decode(ids::ApiKey, id).unwrap_or_default()
}

#[derive(Default)]
pub struct KeyQuery;

#[Object]
impl KeyQuery {
    /// Who calls, and what they may do.
    async fn viewer(&self, ctx: &Context<'_>) -> Result<ViewerObject> {
        Ok(match viewer(ctx)? {
            Viewer::PlatformAdmin => {
                ViewerObject { scopes: Vec::new(), is_platform_admin: true, tenant: None, api_key: None }
            }
            Viewer::Tenant(own) => ViewerObject {
                scopes: own.scopes.clone(),
                is_platform_admin: false,
                tenant: Some(Tenant(own.tenant.clone())),
                api_key: Some(ApiKey(own.key.clone())),
            },
        })
    }

    /// [MANAGE]
    #[graphql(complexity = "list_complexity(first, last, child_complexity)")]
    async fn api_keys(
        &self,
        ctx: &Context<'_>,
        first: Option<i32>,
        after: Option<String>,
        last: Option<i32>,
        before: Option<String>,
    ) -> Result<Connection<Cursor, ApiKey>> {
        let tenant_id = viewer(ctx)?.require(Scope::Manage)?.tenant_id();
        let args = PageArgs::new(first, after, last, before)?;
        let page = load(ctx, ApiKeysOf(tenant_id, args)).await?.unwrap_or_default();
        Ok(page.connection(|key| (Cursor::Id(key.id), ApiKey(key))))
    }
}

#[derive(Default)]
pub struct KeyMutation;

#[Object]
impl KeyMutation {
    /// [MANAGE; a platform admin names the tenant] The secret is shown this once.
    async fn create_api_key(&self, ctx: &Context<'_>, input: CreateApiKeyInput) -> Result<ApiKeySecretPayload> {
        let (app, viewer) = (app(ctx)?, viewer(ctx)?);
        let outcome = match owner(app, viewer, input.tenant_id.as_ref()).await? {
            Ok(tenant_id) => {
                let new = NewApiKey {
                    name: input.name,
                    scopes: input.scopes,
                    expires_at: input.expires_at,
                    monthly_token_limit: input.monthly_token_limit.map(|limit| limit.0),
                };
                super::create(app, viewer, tenant_id, new).await
            }
            Err(refused) => Err(refused.into()),
        };
        secret_payload(outcome)
    }

    /// [MANAGE]
    async fn update_api_key(&self, ctx: &Context<'_>, input: UpdateApiKeyInput) -> Result<ApiKeyPayload> {
        let change = ApiKeyChange {
            name: input.name,
            is_active: input.is_active,
            scopes: input.scopes,
            expires_at: input.expires_at,
            monthly_token_limit: input.monthly_token_limit.map_value(|limit| limit.0),
        };
        key_payload(super::update(app(ctx)?, viewer(ctx)?, key_id(&input.api_key_id), change).await)
    }

    /// [MANAGE] A new secret at once; the old one works for graceSeconds more.
    async fn rotate_api_key(&self, ctx: &Context<'_>, input: RotateApiKeyInput) -> Result<ApiKeySecretPayload> {
        let id = key_id(&input.api_key_id);
        secret_payload(super::rotate(app(ctx)?, viewer(ctx)?, id, input.grace_seconds).await)
    }

    /// [MANAGE]
    async fn revoke_api_key(&self, ctx: &Context<'_>, input: ApiKeyIdInput) -> Result<ApiKeyPayload> {
        key_payload(super::revoke(app(ctx)?, viewer(ctx)?, key_id(&input.api_key_id)).await)
    }
}

/// Whose key is made: the caller's tenant, or the one that the platform admin names.
async fn owner(
    app: &crate::app::App,
    viewer: &Viewer,
    named: Option<&ID>,
) -> Result<std::result::Result<Uuid, UserError>, Error> {
    let named_id = named.map(|id| ids::decode(ids::Tenant, id).unwrap_or_default());
    let missing = || UserError::not_found("tenantId", "tenant");
    Ok(match viewer {
        Viewer::Tenant(_) => {
            let own = viewer.require(Scope::Manage)?.tenant_id();
            if named_id.is_none_or(|id| id == own) { Ok(own) } else { Err(missing()) }
        }
        Viewer::PlatformAdmin => match named_id {
            Some(id) if crate::tenants::exists(app, id).await? => Ok(id),
            Some(_) => Err(missing()),
            None => Err(UserError::invalid("tenantId", "Name the tenant: a platform admin has none of its own.")),
        },
    })
}
