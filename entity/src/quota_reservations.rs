//! Reservations: model calls that are under way.

use sea_orm::entity::prelude::*;

/// A reservation. Whoever deletes it moves the counters, nobody else.
#[sea_orm::model]
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "quota_reservations")]
pub struct Model {
    /// The call, as in the ledger.
    #[sea_orm(primary_key, auto_increment = false)]
    pub call_id: Uuid,
    /// Who pays.
    pub tenant_id: Uuid,
    /// The run; none for direct calls.
    pub run_id: Option<Uuid>,
    /// Whether the run has a limit of its own, and so a counter.
    pub run_limited: bool,
    /// The run's turn.
    pub turn: Option<i32>,
    /// From 1 for each turn.
    pub attempt: i32,
    /// The agent that asks.
    pub agent_id: Option<Uuid>,
    /// Its version; none for a draft.
    pub agent_version: Option<i32>,
    /// Agents from the run's root to the one that asks.
    pub agent_path: Option<String>,
    /// The key, and so a counter.
    pub key_id: Option<Uuid>,
    /// The catalogue's name of the model.
    pub model: String,
    /// The price it will be charged at.
    pub price_id: Uuid,
    /// `YYYY-MM` of `created_at`.
    pub period: String,
    /// Tokens held.
    pub tokens: i64,
    /// Our count of the input.
    pub input_tokens: i64,
    /// Output that had arrived when last looked at.
    pub output_tokens: i64,
    /// Whether the request may have reached the provider: always, but for a replica of an older release, which marked it later.
    pub sent: bool,
    /// When it was made.
    pub created_at: DateTimeUtc,
    /// When it is an orphan, unless its process extends it.
    pub expires_at: DateTimeUtc,
}

impl ActiveModelBehavior for ActiveModel {}
