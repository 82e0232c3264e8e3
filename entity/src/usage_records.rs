//! The ledger: a row per model call that a provider charged (I1). Partitioned by month on PostgreSQL.

use sea_orm::entity::prelude::*;

/// A charged model call. The database adds `total_tokens` and `cost_usd`, computed from these.
#[sea_orm::model]
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "usage_records")]
pub struct Model {
    /// UUIDv7, minted with the reservation.
    #[sea_orm(primary_key, auto_increment = false)]
    pub call_id: Uuid,
    /// When the call was reserved: it decides the month.
    #[sea_orm(primary_key, auto_increment = false)]
    pub created_at: DateTimeUtc,
    /// Who pays.
    pub tenant_id: Uuid,
    /// The run; none for direct calls.
    pub run_id: Option<Uuid>,
    /// The run's turn.
    pub turn: Option<i32>,
    /// From 1 for each turn.
    pub attempt: i32,
    /// The agent that asked.
    pub agent_id: Option<Uuid>,
    /// Its version; none for a draft.
    pub agent_version: Option<i32>,
    /// Agents from the run's root to the one that asked, by id, separated by `/`.
    pub agent_path: Option<String>,
    /// The key that started the run, or made the call.
    pub key_id: Option<Uuid>,
    /// The catalogue's name of the model.
    pub model: String,
    /// The price it was charged at.
    pub price_id: Uuid,
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
    /// Whether we counted because the provider sent no usage.
    pub estimated: bool,
}

impl ActiveModelBehavior for ActiveModel {}
