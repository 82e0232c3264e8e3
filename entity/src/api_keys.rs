//! API keys: only their SHA-256 is stored.

use sea_orm::entity::prelude::*;

/// An API key.
#[sea_orm::model]
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "api_keys")]
pub struct Model {
    /// UUIDv7.
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: Uuid,
    /// Whose it is.
    pub tenant_id: Uuid,
    /// For people.
    pub name: String,
    /// First characters of the key (`clo_` and its public id), to recognise it by.
    pub prefix: String,
    /// SHA-256 of the whole key, lower-case hex.
    #[sea_orm(unique)]
    pub key_hash: String,
    /// Hash of the secret before the last rotation.
    pub previous_key_hash: Option<String>,
    /// Until when the previous secret works too.
    pub previous_key_until: Option<DateTimeUtc>,
    /// Names of scopes, separated by spaces.
    pub scopes: String,
    /// False: refused until made active again.
    pub is_active: bool,
    /// When it stops working.
    pub expires_at: Option<DateTimeUtc>,
    /// When it was revoked, for good.
    pub revoked_at: Option<DateTimeUtc>,
    /// When it was last used, to the minute.
    pub last_used_at: Option<DateTimeUtc>,
    /// The key's own limit in tokens a month.
    pub monthly_token_limit: Option<i64>,
    /// When it was made.
    pub created_at: DateTimeUtc,
}

impl ActiveModelBehavior for ActiveModel {}
