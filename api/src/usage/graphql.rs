//! `Usage`, its breakdowns and its subscription.
#![allow(missing_docs)] // fields and inputs are what the schema says they are

use std::sync::Arc;
use std::time::Duration;

use async_graphql::{Context, Object, Result, SimpleObject, Subscription};
use cloister_runtime::item;
use entity::{TenantOwned, plans, tenants};
use futures_util::Stream;
use rust_decimal::Decimal;
use tokio::sync::broadcast::error::RecvError;
use uuid::Uuid;

use super::report::{self, MonthUsage, Sum};
use crate::agents::graphql::Agent;
use crate::billing::graphql::Plan;
use crate::error::Error;
use crate::graphql::loaders::{AgentId, ApiKeyId, TenantMonth, load};
use crate::graphql::scalars::{Long, Month};
use crate::graphql::{app, viewer};
use crate::keys::graphql::ApiKey;
use crate::money::dollars;
use crate::tenants::changes::Change;
use crate::viewer::Scope;

/// Changes of usage that come faster than this are told as one.
const PACE: Duration = Duration::from_millis(100);

/// Buckets are disjoint: total = input + cacheRead + cacheWrite + output; reasoning is part of output.
pub struct TokenUsage(pub Sum);

impl From<item::TokenUsage> for TokenUsage {
    fn from(usage: item::TokenUsage) -> Self {
        Self(Sum { requests: 1, usage })
    }
}

#[Object]
impl TokenUsage {
    async fn requests(&self) -> i32 {
        i32::try_from(self.0.requests).unwrap_or(i32::MAX)
    }

    async fn input_tokens(&self) -> Long {
        Long(self.0.usage.input_tokens)
    }

    async fn output_tokens(&self) -> Long {
        Long(self.0.usage.output_tokens)
    }

    async fn cache_read_tokens(&self) -> Long {
        Long(self.0.usage.cache_read_tokens)
    }

    async fn cache_write_tokens(&self) -> Long {
        Long(self.0.usage.cache_write_tokens)
    }

    async fn reasoning_tokens(&self) -> Long {
        Long(self.0.usage.reasoning_tokens)
    }

    async fn total_tokens(&self) -> Long {
        Long(self.0.usage.total_tokens())
    }

    async fn cost(&self) -> Decimal {
        dollars(self.0.usage.cost_nano_usd)
    }

    /// True if any part was counted by us because the provider sent no usage.
    async fn estimated(&self) -> bool {
        self.0.usage.estimated
    }
}

/// A tenant's month.
pub struct Usage {
    plan: Arc<plans::Model>,
    limit: i64,
    period: report::Month,
    month: MonthUsage,
}

impl Usage {
    /// What tells two states of a tenant's usage apart.
    fn gist(&self) -> (report::Month, String, i64, i64, i64, i64) {
        (
            self.period,
            self.plan.name.clone(),
            self.limit,
            self.month.used,
            self.month.reserved,
            self.month.sum().requests,
        )
    }

    /// A tenant's usage in a month; this one unless said otherwise.
    pub async fn load(ctx: &Context<'_>, tenant: tenants::Model, period: Option<Month>) -> Result<Self> {
        let app = app(ctx)?;
        let period = period.map_or_else(|| report::Month::of(app.clock.now()), |period| period.0);
        let month = load(ctx, TenantMonth(tenant.id, period)).await?.unwrap_or_default();
        let limit = crate::tenants::monthly_limit(app, &tenant)?;
        Ok(Self { plan: app.plans.get(&tenant.plan)?, limit, period, month })
    }
}

#[derive(SimpleObject)]
struct UsageByDay {
    /// YYYY-MM-DD, UTC.
    date: String,
    usage: TokenUsage,
}

#[derive(SimpleObject)]
struct UsageByModel {
    model: String,
    usage: TokenUsage,
}

#[derive(SimpleObject)]
struct UsageByAgent {
    /// Null: direct model calls.
    agent: Option<Agent>,
    /// Null: a draft.
    version: Option<i32>,
    usage: TokenUsage,
}

#[derive(SimpleObject)]
struct UsageByKey {
    /// Null: not by a key.
    api_key: Option<ApiKey>,
    usage: TokenUsage,
}

#[Object]
impl Usage {
    async fn period(&self) -> Month {
        Month(self.period)
    }

    async fn plan(&self) -> Plan {
        Plan(self.plan.clone())
    }

    async fn monthly_limit(&self) -> Long {
        Long(self.limit)
    }

    async fn total_tokens(&self) -> Long {
        Long(self.month.used)
    }

    /// Held by model calls under way.
    async fn reserved_tokens(&self) -> Long {
        Long(self.month.reserved)
    }

    async fn remaining_tokens(&self) -> Long {
        Long((self.limit - self.month.used - self.month.reserved).max(0))
    }

    async fn total_cost(&self) -> Decimal {
        dollars(self.month.sum().usage.cost_nano_usd)
    }

    async fn request_count(&self) -> Long {
        Long(self.month.sum().requests)
    }

    async fn by_day(&self) -> Vec<UsageByDay> {
        let days = self.month.by(|row| row.day.clone());
        days.into_iter().map(|(date, sum)| UsageByDay { date, usage: TokenUsage(sum) }).collect()
    }

    async fn by_model(&self) -> Vec<UsageByModel> {
        let models = self.month.by(|row| row.model.clone());
        models.into_iter().map(|(model, sum)| UsageByModel { model, usage: TokenUsage(sum) }).collect()
    }

    async fn by_agent(&self, ctx: &Context<'_>) -> Result<Vec<UsageByAgent>> {
        let agents = self.month.by(|row| (row.agent_id, row.agent_version));
        let lines = agents.into_iter().map(|((id, version), sum)| async move {
            let agent = if id.is_nil() { None } else { load(ctx, AgentId(id)).await? };
            let version = (version > 0).then_some(version);
            Ok(UsageByAgent { agent: agent.map(Agent), version, usage: TokenUsage(sum) })
        });
        futures_util::future::try_join_all(lines).await
    }

    async fn by_key(&self, ctx: &Context<'_>) -> Result<Vec<UsageByKey>> {
        let keys = self.month.by(|row| row.key_id);
        let lines = keys.into_iter().map(|(id, sum)| async move {
            let key = if id.is_nil() { None } else { load(ctx, ApiKeyId(id)).await? };
            Ok(UsageByKey { api_key: key.map(ApiKey), usage: TokenUsage(sum) })
        });
        futures_util::future::try_join_all(lines).await
    }
}

#[derive(Default)]
pub struct UsageQuery;

#[Object]
impl UsageQuery {
    /// [READ]
    async fn usage(&self, ctx: &Context<'_>, period: Option<Month>) -> Result<Usage> {
        let tenant = viewer(ctx)?.require(Scope::Read)?.tenant.clone();
        Usage::load(ctx, tenant, period).await
    }
}

#[derive(Default)]
pub struct UsageSubscription;

#[Subscription]
impl UsageSubscription {
    /// [READ] This month's usage, now and after each change.
    async fn usage<'ctx>(&self, ctx: &Context<'ctx>) -> Result<impl Stream<Item = Result<Usage>> + use<'ctx>> {
        let tenant_id = viewer(ctx)?.require(Scope::Read)?.tenant_id();
        let app = app(ctx)?.clone();
        let mut changes = app.changes.subscribe(tenant_id, app.clock.now()).await;
        Ok(async_stream::try_stream! {
            let mut told = None;
            loop {
                let usage = now(&app, tenant_id).await?;
                // A change may be told more than once: by who made it, and by who found it.
                if told != Some(usage.gist()) {
                    told = Some(usage.gist());
                    yield usage;
                }
                loop {
                    match changes.recv().await {
                        Ok(Change::Usage) | Err(RecvError::Lagged(_)) => break,
                        Ok(Change::Run(_) | Change::Provisioning) => {}
                        Err(RecvError::Closed) => return,
                    }
                }
                tokio::time::sleep(PACE).await;
                // What came meanwhile is told by the next reading too.
                while !changes.is_empty() {
                    let _ = changes.try_recv();
                }
            }
        })
    }
}

async fn now(app: &crate::app::App, tenant_id: Uuid) -> Result<Usage, Error> {
    let tenant = tenants::Entity::in_tenant(tenant_id).one(app.db.read()).await?;
    let tenant = tenant.ok_or_else(|| Error::NotFound("This tenant is gone.".to_owned()))?;
    let period = report::Month::of(app.clock.now());
    let month = report::months(app, &[tenant_id], period).await?.remove(&tenant_id).unwrap_or_default();
    let limit = crate::tenants::monthly_limit(app, &tenant)?;
    Ok(Usage { plan: app.plans.get(&tenant.plan)?, limit, period, month })
}
