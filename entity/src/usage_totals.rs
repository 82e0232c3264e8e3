//! The ledger's sums by UTC day, agent, version, model and key; a zero id stands for none.

use sea_orm::entity::prelude::*;

/// A day's sums.
#[sea_orm::model]
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "usage_totals")]
pub struct Model {
    /// Who pays.
    #[sea_orm(primary_key, auto_increment = false)]
    pub tenant_id: Uuid,
    /// `YYYY-MM-DD`, UTC.
    #[sea_orm(primary_key, auto_increment = false)]
    pub day: String,
    /// The agent; zero for direct calls.
    #[sea_orm(primary_key, auto_increment = false)]
    pub agent_id: Uuid,
    /// Its version; 0 for a draft.
    #[sea_orm(primary_key, auto_increment = false)]
    pub agent_version: i32,
    /// The catalogue's name of the model.
    #[sea_orm(primary_key, auto_increment = false)]
    pub model: String,
    /// The key; zero for none.
    #[sea_orm(primary_key, auto_increment = false)]
    pub key_id: Uuid,
    /// Calls.
    pub requests: i64,
    /// Calls whose tokens we counted.
    pub estimated_requests: i64,
    /// Uncached input.
    pub input_tokens: i64,
    /// Input read from the provider's cache.
    pub cache_read_tokens: i64,
    /// Input written to the provider's cache.
    pub cache_write_tokens: i64,
    /// Output, reasoning included.
    pub output_tokens: i64,
    /// The part of the output spent on reasoning.
    pub reasoning_tokens: i64,
    /// Nano-USD.
    pub cost: i64,
}

impl ActiveModelBehavior for ActiveModel {}
