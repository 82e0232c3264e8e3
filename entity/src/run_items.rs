//! The journal: what runs did, in order. Partitioned by month on PostgreSQL.

use sea_orm::entity::prelude::*;

/// An item of a run's journal.
#[sea_orm::model]
#[derive(Clone, Debug, PartialEq, DeriveEntityModel)]
#[sea_orm(table_name = "run_items")]
pub struct Model {
    /// The run.
    #[sea_orm(primary_key, auto_increment = false)]
    pub run_id: Uuid,
    /// From 1 without gaps.
    #[sea_orm(primary_key, auto_increment = false)]
    pub sequence: i64,
    /// The run's `created_at`: the partition it lies in.
    #[sea_orm(primary_key, auto_increment = false)]
    pub run_created_at: DateTimeUtc,
    /// Whose it is.
    pub tenant_id: Uuid,
    /// The kind of `body`.
    pub kind: String,
    /// The agent at work.
    pub agent_name: String,
    /// The turn; none outside one.
    pub turn: Option<i32>,
    /// The nested run it belongs to; none for the run itself.
    pub scope: Option<String>,
    /// The runtime's `Body`.
    pub body: Json,
    /// When it was stored.
    pub created_at: DateTimeUtc,
}

impl ActiveModelBehavior for ActiveModel {}
