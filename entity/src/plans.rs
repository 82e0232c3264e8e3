//! Plans, versioned: a row is never changed.

use sea_orm::entity::prelude::*;

/// A version of a plan. Amounts are nano-USD.
#[sea_orm::model]
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "plans")]
pub struct Model {
    /// UUIDv7.
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: Uuid,
    /// `free`, `pro` or `enterprise`.
    pub name: String,
    /// From 1 for each name; the greatest holds.
    pub version: i32,
    /// For a month.
    pub base_price: i64,
    /// Tokens a month in the base price.
    pub included_tokens: i64,
    /// For a million tokens beyond; none: nothing is sold beyond.
    pub overage_per_million: Option<i64>,
    /// The hard limit in tokens a month.
    pub monthly_token_limit: i64,
    /// Runs at once.
    pub max_concurrent_runs: i32,
    /// Requests a minute.
    pub requests_per_minute: i32,
    /// Share of a busy pool.
    pub weight: i32,
    /// Where runs execute.
    pub isolation: super::tenants::Isolation,
    /// From when it holds.
    pub valid_from: DateTimeUtc,
}

impl ActiveModelBehavior for ActiveModel {}
