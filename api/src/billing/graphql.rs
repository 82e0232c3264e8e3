//! `Plan` and `Invoice`.
#![allow(missing_docs)] // fields and inputs are what the schema says they are

use std::sync::Arc;

use async_graphql::{Context, Enum, Object, Result, SimpleObject};
use chrono::{DateTime, Utc};
use entity::{plans, tenants};
use rust_decimal::Decimal;

use super::invoice::{self, Draft, LineKind};
use crate::error::Error;
use crate::graphql::loaders::{TenantMonth, load};
use crate::graphql::scalars::{Long, Month};
use crate::graphql::{app, viewer};
use crate::money::{cents, dollars};
use crate::tenants::graphql::Isolation;
use crate::usage::report;
use crate::viewer::Scope;

/// The plans' names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Enum)]
pub enum PlanName {
    Free,
    Pro,
    Enterprise,
}

impl PlanName {
    /// As stored.
    pub fn key(self) -> &'static str {
        match self {
            PlanName::Free => "free",
            PlanName::Pro => "pro",
            PlanName::Enterprise => "enterprise",
        }
    }

    fn from_key(key: &str) -> Result<Self, Error> {
        [PlanName::Free, PlanName::Pro, PlanName::Enterprise]
            .into_iter()
            .find(|name| name.key() == key)
            .ok_or_else(|| Error::internal(format!("no plan is named {key:?}")))
    }
}

/// A plan.
#[derive(Clone)]
pub struct Plan(pub Arc<plans::Model>);

#[Object]
impl Plan {
    async fn name(&self) -> Result<PlanName> {
        Ok(PlanName::from_key(&self.0.name)?)
    }

    async fn base_price(&self) -> Decimal {
        dollars(self.0.base_price)
    }

    async fn included_tokens(&self) -> Long {
        Long(self.0.included_tokens)
    }

    /// Null: nothing is sold beyond what is included.
    async fn overage_per_million(&self) -> Option<Decimal> {
        self.0.overage_per_million.map(dollars)
    }

    /// The hard limit of a month, unless the tenant has its own.
    async fn monthly_token_limit(&self) -> Long {
        Long(self.0.monthly_token_limit)
    }

    async fn max_concurrent_runs(&self) -> i32 {
        self.0.max_concurrent_runs
    }

    async fn requests_per_minute(&self) -> i32 {
        self.0.requests_per_minute
    }

    async fn isolation(&self) -> Isolation {
        self.0.isolation.into()
    }
}

/// Where an invoice stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Enum)]
pub enum InvoiceStatus {
    /// The month may still change it.
    Draft,
    /// Immutable.
    Final,
}

/// What a line is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Enum)]
pub enum InvoiceLineKind {
    /// The plan's price.
    Base,
    /// Tokens beyond those included.
    Overage,
    /// Usage of an earlier month that came after its invoice.
    LateUsage,
}

/// A line of an invoice.
#[derive(SimpleObject)]
struct InvoiceLine {
    kind: InvoiceLineKind,
    description: String,
    tokens: Long,
    amount: Decimal,
}

/// A month's invoice.
pub struct Invoice {
    plan: Arc<plans::Model>,
    period: report::Month,
    tokens_used: i64,
    draft: Draft,
}

impl Invoice {
    /// A tenant's invoice for a month; this one unless said otherwise.
    pub async fn load(ctx: &Context<'_>, tenant: tenants::Model, period: Option<Month>) -> Result<Self> {
        let app = app(ctx)?;
        let period = period.map_or_else(|| report::Month::of(app.clock.now()), |period| period.0);
        let usage = load(ctx, TenantMonth(tenant.id, period)).await?.unwrap_or_default();
        let plan = app.plans.get(&tenant.plan)?;
        let draft = invoice::draft(&plan, period, usage.used);
        Ok(Self { plan, period, tokens_used: usage.used, draft })
    }
}

#[Object]
impl Invoice {
    /// The plan at the month's end; no proration.
    async fn plan(&self) -> Plan {
        Plan(self.plan.clone())
    }

    async fn period(&self) -> Month {
        Month(self.period)
    }

    async fn status(&self) -> InvoiceStatus {
        InvoiceStatus::Draft
    }

    async fn base_price(&self) -> Decimal {
        cents(Decimal::from(self.plan.base_price))
    }

    async fn included_tokens(&self) -> Long {
        Long(self.plan.included_tokens)
    }

    async fn tokens_used(&self) -> Long {
        Long(self.tokens_used)
    }

    async fn overage_tokens(&self) -> Long {
        Long(self.draft.overage_tokens)
    }

    async fn overage_cost(&self) -> Decimal {
        self.draft.overage_cost
    }

    async fn total(&self) -> Decimal {
        self.draft.total
    }

    async fn lines(&self) -> Vec<InvoiceLine> {
        let line = |line: &invoice::Line| InvoiceLine {
            kind: match line.kind {
                LineKind::Base => InvoiceLineKind::Base,
                LineKind::Overage => InvoiceLineKind::Overage,
            },
            description: line.description.clone(),
            tokens: Long(line.tokens),
            amount: line.amount,
        };
        self.draft.lines.iter().map(line).collect()
    }

    /// Null until it is final.
    async fn finalized_at(&self) -> Option<DateTime<Utc>> {
        None
    }
}

#[derive(Default)]
pub struct BillingQuery;

#[Object]
impl BillingQuery {
    /// [BILLING]
    async fn invoice(&self, ctx: &Context<'_>, period: Option<Month>) -> Result<Invoice> {
        let tenant = viewer(ctx)?.require(Scope::Billing)?.tenant.clone();
        Invoice::load(ctx, tenant, period).await
    }

    /// What tenants may be on.
    async fn plans(&self, ctx: &Context<'_>) -> Result<Vec<Plan>> {
        Ok(app(ctx)?.plans.all().map(Plan).collect())
    }
}
