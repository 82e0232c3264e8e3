//! What is used and reserved of a limit, in tokens.

use sea_orm::entity::prelude::*;

/// Whose limit a counter counts against. They are taken in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, EnumIter, DeriveActiveEnum)]
#[sea_orm(rs_type = "String", db_type = "Text", rename_all = "snake_case")]
pub enum Scope {
    /// The tenant's month.
    Tenant,
    /// A key's month.
    Key,
    /// A run's `maxTokens`.
    Run,
}

/// A counter.
#[sea_orm::model]
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "quota_counters")]
pub struct Model {
    /// The tenant.
    #[sea_orm(primary_key, auto_increment = false)]
    pub tenant_id: Uuid,
    /// Whose limit.
    #[sea_orm(primary_key, auto_increment = false)]
    pub scope: Scope,
    /// The tenant's, key's or run's id.
    #[sea_orm(primary_key, auto_increment = false)]
    pub scope_id: Uuid,
    /// `YYYY-MM`, UTC; `run` for a run, which has no month.
    #[sea_orm(primary_key, auto_increment = false)]
    pub period: String,
    /// Settled.
    pub used: i64,
    /// Held by calls under way.
    pub reserved: i64,
}

impl ActiveModelBehavior for ActiveModel {}
