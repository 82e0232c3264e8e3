//! Plans: rows seeded from the configuration, versioned. The newest version of a name holds.

use std::collections::HashMap;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use entity::{Shared, plans, tenant_queues, tenants, tenants::Isolation};
use rust_decimal::Decimal;
use sea_orm::sea_query::{Expr, OnConflict, Query};
use sea_orm::{ActiveModelTrait, ColumnTrait, ConnectionTrait, EntityTrait, IntoActiveModel, QueryFilter, QueryOrder};
use uuid::Uuid;

use crate::config::{Config, PlanConfig, PlanIsolation};
use crate::error::Error;
use crate::money;

/// The plans in their order, as they hold now.
pub struct Plans {
    by_name: HashMap<String, Arc<plans::Model>>,
}

/// Names, in the order in which they are shown.
const NAMES: [&str; 3] = ["free", "pro", "enterprise"];

impl Plans {
    /// The plan of this name.
    pub fn get(&self, name: &str) -> Result<Arc<plans::Model>, Error> {
        self.by_name.get(name).cloned().ok_or_else(|| Error::internal(format!("no plan is named {name:?}")))
    }

    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = Arc<plans::Model>> {
        NAMES.iter().filter_map(|name| self.by_name.get(*name).cloned())
    }
}

/// Adds a version of each plan whose configuration has changed, and returns those that hold.
pub async fn sync(db: &impl ConnectionTrait, config: &Config, now: DateTime<Utc>) -> Result<Plans, Error> {
    let mut by_name = HashMap::new();
    for name in NAMES {
        let plan = config.plans.get(name).cloned().unwrap_or_else(|| built_in(name));
        let plan = newest(db, name, &plan, now).await?;
        cap_queues(db, &plan).await?;
        by_name.insert(name.to_owned(), Arc::new(plan));
    }
    Ok(Plans { by_name })
}

/// The newest version of a plan, which is as configured.
async fn newest(
    db: &impl ConnectionTrait,
    name: &str,
    plan: &PlanConfig,
    now: DateTime<Utc>,
) -> Result<plans::Model, Error> {
    loop {
        let stored = plans::Entity::all()
            .filter(plans::Column::Name.eq(name))
            .order_by_desc(plans::Column::Version)
            .one(db)
            .await?;
        let wanted = row(name, plan, stored.as_ref().map_or(1, |newest| newest.version + 1), now)?;
        if let Some(stored) = stored.filter(|stored| same(stored, &wanted)) {
            return Ok(stored);
        }
        let inserted = plans::Entity::insert(wanted.clone().into_active_model().reset_all())
            .on_conflict(OnConflict::columns([plans::Column::Name, plans::Column::Version]).do_nothing().to_owned())
            .exec_without_returning(db)
            .await?;
        if inserted > 0 {
            return Ok(wanted);
        }
        // A replica that starts at the same time was faster: its version may be the one that is wanted.
    }
}

/// Tenants that are on the plan already have its cap from now on.
async fn cap_queues(db: &impl ConnectionTrait, plan: &plans::Model) -> Result<(), Error> {
    let on_plan = Query::select()
        .column(tenants::Column::Id)
        .from(tenants::Entity)
        .and_where(tenants::Column::Plan.eq(&plan.name))
        .and_where(tenants::Column::Status.eq(tenants::Status::Active))
        .and_where(tenants::Column::IsLeaving.eq(false))
        .to_owned();
    tenant_queues::Entity::update_many()
        .col_expr(tenant_queues::Column::MaxRunning, Expr::value(plan.max_concurrent_runs))
        .filter(tenant_queues::Column::TenantId.in_subquery(on_plan))
        .filter(tenant_queues::Column::MaxRunning.ne(plan.max_concurrent_runs))
        .exec(db)
        .await?;
    Ok(())
}

fn same(a: &plans::Model, b: &plans::Model) -> bool {
    plans::Model { id: b.id, version: b.version, valid_from: b.valid_from, ..a.clone() } == *b
}

fn row(name: &str, plan: &PlanConfig, version: i32, now: DateTime<Utc>) -> Result<plans::Model, Error> {
    let nano = |field: &str, amount: Decimal| {
        money::nano(amount).ok_or_else(|| Error::internal(format!("plans.{name}.{field} is too large")))
    };
    Ok(plans::Model {
        id: Uuid::now_v7(),
        name: name.to_owned(),
        version,
        base_price: nano("base_price", plan.base_price)?,
        included_tokens: plan.included_tokens,
        overage_per_million: plan.overage_per_million.map(|amount| nano("overage_per_million", amount)).transpose()?,
        monthly_token_limit: plan.monthly_token_limit,
        max_concurrent_runs: plan.max_concurrent_runs,
        requests_per_minute: plan.requests_per_minute,
        weight: plan.weight,
        isolation: isolation(name, plan),
        valid_from: now,
    })
}

fn isolation(name: &str, plan: &PlanConfig) -> Isolation {
    match plan.isolation {
        Some(PlanIsolation::Dedicated) => Isolation::Dedicated,
        Some(PlanIsolation::Shared) => Isolation::Shared,
        None if name == "enterprise" => Isolation::Dedicated,
        None => Isolation::Shared,
    }
}

/// The table of the design's `metering.md`.
pub fn built_in(name: &str) -> PlanConfig {
    match name {
        "pro" => PlanConfig {
            base_price: Decimal::from(49),
            included_tokens: 10_000_000,
            overage_per_million: Some(Decimal::from(5)),
            monthly_token_limit: 100_000_000,
            max_concurrent_runs: 50,
            requests_per_minute: 600,
            weight: 4,
            isolation: None,
        },
        "enterprise" => PlanConfig {
            base_price: Decimal::from(299),
            included_tokens: 100_000_000,
            overage_per_million: Some(Decimal::from(3)),
            monthly_token_limit: 1_000_000_000,
            max_concurrent_runs: 500,
            requests_per_minute: 6_000,
            weight: 16,
            isolation: None,
        },
        _ => PlanConfig {
            base_price: Decimal::ZERO,
            included_tokens: 1_000_000,
            overage_per_million: None,
            monthly_token_limit: 1_000_000,
            max_concurrent_runs: 5,
            requests_per_minute: 60,
            weight: 1,
            isolation: None,
        },
    }
}
