//! Tokens of a tenant's own workers: only their SHA-256 is stored.

use sea_orm::entity::prelude::*;

/// A worker's token.
#[sea_orm::model]
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "runtime_tokens")]
pub struct Model {
    /// UUIDv7.
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: Uuid,
    /// Whose pool it opens.
    pub tenant_id: Uuid,
    /// First characters of the token, to recognise it by.
    pub prefix: String,
    /// SHA-256 of the whole token, lower-case hex.
    #[sea_orm(unique)]
    pub token_hash: String,
    /// When it stops working; set when it is rotated.
    pub expires_at: Option<DateTimeUtc>,
    /// When it was revoked, for good.
    pub revoked_at: Option<DateTimeUtc>,
    /// When it was last used, to the minute.
    pub last_used_at: Option<DateTimeUtc>,
    /// When it was made.
    pub created_at: DateTimeUtc,
    /// Which rotation of the tenant's operator it is of; none: an admin made it.
    pub rotation: Option<i64>,
}

impl ActiveModelBehavior for ActiveModel {}
