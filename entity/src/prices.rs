//! Prices of models, versioned: a row is never changed.

use sea_orm::entity::prelude::*;

/// A price, in nano-USD for a million tokens.
#[sea_orm::model]
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "prices")]
pub struct Model {
    /// UUIDv7.
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: Uuid,
    /// The model's name.
    pub model: String,
    /// Uncached input.
    pub input: i64,
    /// Input read from the provider's cache.
    pub cache_read: i64,
    /// Input written to the provider's cache.
    pub cache_write: i64,
    /// Output, reasoning included.
    pub output: i64,
    /// From when it holds.
    pub valid_from: DateTimeUtc,
}

impl ActiveModelBehavior for ActiveModel {}
