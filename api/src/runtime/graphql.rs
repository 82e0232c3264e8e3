//! `RuntimeToken` and what the platform admin does with workers' tokens.
#![allow(missing_docs)] // fields and inputs are what the schema says they are

use async_graphql::{Context, ID, InputObject, Object, Result, SimpleObject};
use chrono::{DateTime, Utc};
use entity::runtime_tokens;
use uuid::Uuid;

use super::tokens;
use crate::error::{Outcome, UserError, payload};
use crate::graphql::{app, viewer};
use crate::ids;

/// A token that a tenant's own workers authenticate with. It is shown when it is made, never again.
#[derive(Clone)]
pub struct RuntimeToken(pub runtime_tokens::Model);

#[Object]
impl RuntimeToken {
    pub async fn id(&self) -> ID {
        ids::encode(ids::RuntimeToken, self.0.id)
    }

    /// First characters of the token, to recognise it by.
    async fn prefix(&self) -> &str {
        &self.0.prefix
    }

    /// When it stops working; set when it is rotated.
    async fn expires_at(&self) -> Option<DateTime<Utc>> {
        self.0.expires_at
    }

    async fn revoked_at(&self) -> Option<DateTime<Utc>> {
        self.0.revoked_at
    }

    /// To the minute.
    async fn last_used_at(&self) -> Option<DateTime<Utc>> {
        self.0.last_used_at
    }

    async fn created_at(&self) -> DateTime<Utc> {
        self.0.created_at
    }
}

#[derive(InputObject)]
pub struct CreateRuntimeTokenInput {
    /// Whose pool it opens.
    tenant_id: ID,
}

#[derive(InputObject)]
pub struct RotateRuntimeTokenInput {
    runtime_token_id: ID,
    /// Seconds that the old token works for.
    #[graphql(default = 0)]
    grace_seconds: i32,
}

#[derive(InputObject)]
pub struct RuntimeTokenIdInput {
    runtime_token_id: ID,
}

#[derive(SimpleObject)]
pub struct RuntimeTokenPayload {
    runtime_token: Option<RuntimeToken>,
    errors: Vec<UserError>,
}

#[derive(SimpleObject)]
pub struct RuntimeTokenSecretPayload {
    runtime_token: Option<RuntimeToken>,
    secret: Option<String>,
    errors: Vec<UserError>,
}

fn secret_payload(outcome: Outcome<(runtime_tokens::Model, String)>) -> Result<RuntimeTokenSecretPayload> {
    let (made, errors) = payload(outcome)?;
    let (runtime_token, secret) = made.map(|(token, secret)| (RuntimeToken(token), secret)).unzip();
    Ok(RuntimeTokenSecretPayload { runtime_token, secret, errors })
}

/// An id that isn't a token's finds none.
fn token_id(id: &ID) -> Uuid {
    ids::decode(ids::RuntimeToken, id).unwrap_or_default()
}

#[derive(Default)]
pub struct RuntimeMutation;

#[Object]
impl RuntimeMutation {
    /// [platform admin] The secret is shown this once.
    async fn create_runtime_token(
        &self,
        ctx: &Context<'_>,
        input: CreateRuntimeTokenInput,
    ) -> Result<RuntimeTokenSecretPayload> {
        viewer(ctx)?.require_admin()?;
        let tenant_id = ids::decode(ids::Tenant, &input.tenant_id).unwrap_or_default();
        secret_payload(tokens::create(app(ctx)?, tenant_id).await)
    }

    /// [platform admin] A new token at once; the old one works for graceSeconds more.
    async fn rotate_runtime_token(
        &self,
        ctx: &Context<'_>,
        input: RotateRuntimeTokenInput,
    ) -> Result<RuntimeTokenSecretPayload> {
        viewer(ctx)?.require_admin()?;
        secret_payload(tokens::rotate(app(ctx)?, token_id(&input.runtime_token_id), input.grace_seconds).await)
    }

    /// [platform admin]
    async fn revoke_runtime_token(&self, ctx: &Context<'_>, input: RuntimeTokenIdInput) -> Result<RuntimeTokenPayload> {
        viewer(ctx)?.require_admin()?;
        let outcome = tokens::revoke(app(ctx)?, token_id(&input.runtime_token_id)).await;
        let (runtime_token, errors) = payload(outcome.map(RuntimeToken))?;
        Ok(RuntimeTokenPayload { runtime_token, errors })
    }
}
