//! `Tenant` and what the platform admin does with tenants.
#![allow(missing_docs)] // fields and inputs are what the schema says they are

use async_graphql::connection::Connection;
use async_graphql::{Context, Enum, ID, InputObject, MaybeUndefined, Object, Result, SimpleObject};
use chrono::{DateTime, Utc};
use entity::{TenantOwned, tenants};
use sea_orm::sea_query::Order;
use uuid::Uuid;

use super::admin::{self, Done};
use super::{NewTenant, TenantChange};
use crate::agents::graphql::Agent;
use crate::app::App;
use crate::billing::graphql::{Invoice, Plan, PlanName};
use crate::cluster::graphql::Provisioning;
use crate::error::{UserError, payload};
use crate::graphql::limits::list_complexity;
use crate::graphql::loaders::{AgentsOf, ApiKeysOf, RuntimeTokensOf, load};
use crate::graphql::page::{Cursor, List, PageArgs};
use crate::graphql::scalars::{Long, Month};
use crate::graphql::{app, viewer};
use crate::ids;
use crate::keys::graphql::ApiKey;
use crate::runtime::graphql::RuntimeToken;
use crate::usage::graphql::Usage;
use crate::viewer::Scope;

/// Whether a tenant is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Enum)]
#[graphql(remote = "tenants::Status")]
pub enum TenantStatus {
    /// Served.
    Active,
    /// Refused with 403 until resumed.
    Suspended,
    /// Refused for good.
    Deleting,
}

/// Where a tenant's runs execute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Enum)]
#[graphql(remote = "tenants::Isolation")]
pub enum Isolation {
    /// In the api's own pool.
    Shared,
    /// In the tenant's namespace.
    Dedicated,
}

/// A tenant: who is served, metered and billed.
#[derive(Clone)]
pub struct Tenant(pub tenants::Model);

#[Object]
impl Tenant {
    pub async fn id(&self) -> ID {
        ids::encode(ids::Tenant, self.0.id)
    }

    async fn name(&self) -> &str {
        &self.0.name
    }

    async fn email(&self) -> &str {
        &self.0.email
    }

    async fn plan(&self, ctx: &Context<'_>) -> Result<Plan> {
        Ok(Plan(app(ctx)?.plans.get(&self.0.plan)?))
    }

    /// The hard limit in tokens a month: the tenant's own, or its plan's.
    async fn monthly_token_limit(&self, ctx: &Context<'_>) -> Result<Long> {
        Ok(Long(super::monthly_limit(app(ctx)?, &self.0)?))
    }

    async fn status(&self) -> TenantStatus {
        self.0.status.into()
    }

    async fn is_active(&self) -> bool {
        self.0.status == tenants::Status::Active
    }

    async fn isolation(&self) -> Isolation {
        self.0.isolation.into()
    }

    async fn created_at(&self) -> DateTime<Utc> {
        self.0.created_at
    }

    async fn updated_at(&self) -> DateTime<Utc> {
        self.0.updated_at
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
        viewer(ctx)?.may_see(self.0.id, Scope::Manage)?;
        let args = PageArgs::new(first, after, last, before)?;
        let page = load(ctx, ApiKeysOf(self.0.id, args)).await?.unwrap_or_default();
        Ok(page.connection(|key| (Cursor::Id(key.id), ApiKey(key))))
    }

    /// Tokens of the tenant's own workers. [MANAGE]
    #[graphql(complexity = "list_complexity(first, last, child_complexity)")]
    async fn runtime_tokens(
        &self,
        ctx: &Context<'_>,
        first: Option<i32>,
        after: Option<String>,
        last: Option<i32>,
        before: Option<String>,
    ) -> Result<Connection<Cursor, RuntimeToken>> {
        viewer(ctx)?.may_see(self.0.id, Scope::Manage)?;
        let args = PageArgs::new(first, after, last, before)?;
        let page = load(ctx, RuntimeTokensOf(self.0.id, args)).await?.unwrap_or_default();
        Ok(page.connection(|token| (Cursor::Id(token.id), RuntimeToken(token))))
    }

    /// [READ]
    #[graphql(complexity = "list_complexity(first, last, child_complexity)")]
    async fn agents(
        &self,
        ctx: &Context<'_>,
        first: Option<i32>,
        after: Option<String>,
        last: Option<i32>,
        before: Option<String>,
    ) -> Result<Connection<Cursor, Agent>> {
        viewer(ctx)?.may_see(self.0.id, Scope::Read)?;
        let args = PageArgs::new(first, after, last, before)?;
        let page = load(ctx, AgentsOf(self.0.id, args)).await?.unwrap_or_default();
        Ok(page.connection(|agent| (Cursor::Id(agent.id), Agent(agent))))
    }

    /// [READ]
    async fn usage(&self, ctx: &Context<'_>, period: Option<Month>) -> Result<Usage> {
        viewer(ctx)?.may_see(self.0.id, Scope::Read)?;
        Usage::load(ctx, self.0.clone(), period).await
    }

    /// What the tenant has in a cluster; null where no object `Tenant` rules it. [MANAGE]
    async fn provisioning(&self, ctx: &Context<'_>) -> Result<Option<Provisioning>> {
        viewer(ctx)?.may_see(self.0.id, Scope::Manage)?;
        Provisioning::load(ctx, self.0.id).await
    }

    /// [BILLING]
    async fn invoice(&self, ctx: &Context<'_>, period: Option<Month>) -> Result<Invoice> {
        viewer(ctx)?.may_see(self.0.id, Scope::Billing)?;
        Invoice::load(ctx, self.0.clone(), period).await
    }
}

#[derive(InputObject)]
pub struct TenantIdInput {
    tenant_id: ID,
}

#[derive(InputObject)]
pub struct CreateTenantInput {
    name: String,
    email: String,
    #[graphql(default_with = "PlanName::Free")]
    plan: PlanName,
    monthly_token_limit: Option<Long>,
}

#[derive(InputObject)]
pub struct UpdateTenantInput {
    tenant_id: ID,
    name: MaybeUndefined<String>,
    /// Null: the plan's limit again.
    monthly_token_limit: MaybeUndefined<Long>,
}

#[derive(InputObject)]
pub struct SetTenantPlanInput {
    tenant_id: ID,
    plan: PlanName,
}

#[derive(InputObject)]
pub struct RotateWebhookSecretInput {
    #[graphql(default = 0)]
    grace_seconds: i32,
}

#[derive(SimpleObject)]
pub struct TenantPayload {
    tenant: Option<Tenant>,
    errors: Vec<UserError>,
}

#[derive(SimpleObject)]
pub struct WebhookSecretPayload {
    secret: Option<String>,
    errors: Vec<UserError>,
}

/// What a deletion comes to.
#[derive(SimpleObject)]
pub struct DeletePayload {
    /// The id that was deleted.
    pub deleted_id: Option<ID>,
    /// Why nothing was.
    pub errors: Vec<UserError>,
}

/// What was done, beside what of it did not get to the tenant's object.
fn tenant_payload(done: Done<tenants::Model>) -> Result<TenantPayload> {
    let (tenant, errors) = done_payload(done)?;
    Ok(TenantPayload { tenant: tenant.map(Tenant), errors })
}

fn done_payload<T>(done: Done<T>) -> Result<(Option<T>, Vec<UserError>)> {
    let (done, mut errors) = payload(done)?;
    let (done, problems) = done.unzip();
    errors.extend(problems.into_iter().flatten());
    Ok((done, errors))
}

/// An id that isn't a tenant's finds none.
fn tenant_id(id: &ID) -> Uuid {
    ids::decode(ids::Tenant, id).unwrap_or_default()
}

#[derive(Default)]
pub struct TenantQuery;

#[Object]
impl TenantQuery {
    /// The caller's tenant. [READ]
    async fn tenant(&self, ctx: &Context<'_>) -> Result<Tenant> {
        Ok(Tenant(viewer(ctx)?.require(Scope::Read)?.tenant.clone()))
    }

    /// [platform admin]
    #[graphql(complexity = "list_complexity(first, last, child_complexity)")]
    async fn tenants(
        &self,
        ctx: &Context<'_>,
        first: Option<i32>,
        after: Option<String>,
        last: Option<i32>,
        before: Option<String>,
    ) -> Result<Connection<Cursor, Tenant>> {
        viewer(ctx)?.require_admin()?;
        let args = PageArgs::new(first, after, last, before)?;
        let list =
            List { rows: tenants::Entity::across_tenants(), sort: tenants::Column::Id, then: None, order: Order::Asc };
        let page = list.page(app(ctx)?.db.read(), args).await?;
        Ok(page.connection(|tenant| (Cursor::Id(tenant.id), Tenant(tenant))))
    }

    /// [platform admin]
    async fn tenant_by_id(&self, ctx: &Context<'_>, id: ID) -> Result<Option<Tenant>> {
        viewer(ctx)?.require_admin()?;
        by_id(app(ctx)?, tenant_id(&id)).await
    }
}

/// A tenant, for whoever may see it.
pub async fn by_id(app: &App, id: Uuid) -> Result<Option<Tenant>> {
    let tenant = tenants::Entity::in_tenant(id).one(app.db.read()).await.map_err(crate::error::Error::from)?;
    Ok(tenant.map(Tenant))
}

#[derive(Default)]
pub struct TenantMutation;

#[Object]
impl TenantMutation {
    /// [platform admin]
    async fn create_tenant(&self, ctx: &Context<'_>, input: CreateTenantInput) -> Result<TenantPayload> {
        viewer(ctx)?.require_admin()?;
        let new = NewTenant {
            name: input.name,
            email: input.email,
            plan: input.plan.key().to_owned(),
            monthly_token_limit: input.monthly_token_limit.map(|limit| limit.0),
        };
        tenant_payload(admin::create(app(ctx)?, new).await)
    }

    /// [platform admin]
    async fn update_tenant(&self, ctx: &Context<'_>, input: UpdateTenantInput) -> Result<TenantPayload> {
        viewer(ctx)?.require_admin()?;
        let monthly_token_limit = input.monthly_token_limit.map_value(|limit| limit.0);
        let change = TenantChange { name: input.name, monthly_token_limit };
        tenant_payload(admin::update(app(ctx)?, tenant_id(&input.tenant_id), change).await)
    }

    /// [platform admin]
    async fn set_tenant_plan(&self, ctx: &Context<'_>, input: SetTenantPlanInput) -> Result<TenantPayload> {
        viewer(ctx)?.require_admin()?;
        tenant_payload(admin::set_plan(app(ctx)?, tenant_id(&input.tenant_id), input.plan.key()).await)
    }

    /// [platform admin]
    async fn suspend_tenant(&self, ctx: &Context<'_>, input: TenantIdInput) -> Result<TenantPayload> {
        viewer(ctx)?.require_admin()?;
        tenant_payload(admin::suspend(app(ctx)?, tenant_id(&input.tenant_id)).await)
    }

    /// [platform admin]
    async fn resume_tenant(&self, ctx: &Context<'_>, input: TenantIdInput) -> Result<TenantPayload> {
        viewer(ctx)?.require_admin()?;
        tenant_payload(admin::resume(app(ctx)?, tenant_id(&input.tenant_id)).await)
    }

    /// [platform admin]
    async fn delete_tenant(&self, ctx: &Context<'_>, input: TenantIdInput) -> Result<DeletePayload> {
        viewer(ctx)?.require_admin()?;
        let (deleted, errors) = done_payload(admin::delete(app(ctx)?, tenant_id(&input.tenant_id)).await)?;
        Ok(DeletePayload { deleted_id: deleted.map(|id| ids::encode(ids::Tenant, id)), errors })
    }

    /// [MANAGE] The secret that signs webhook tools' requests; the old one signs too for graceSeconds.
    async fn rotate_webhook_secret(
        &self,
        ctx: &Context<'_>,
        input: RotateWebhookSecretInput,
    ) -> Result<WebhookSecretPayload> {
        let outcome = super::rotate_webhook_secret(app(ctx)?, viewer(ctx)?, input.grace_seconds).await;
        let (secret, errors) = payload(outcome)?;
        Ok(WebhookSecretPayload { secret, errors })
    }
}
