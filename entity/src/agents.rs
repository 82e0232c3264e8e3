//! Agents: their drafts.

use sea_orm::entity::prelude::*;

/// An agent. Its definition here is the draft.
#[sea_orm::model]
#[derive(Clone, Debug, PartialEq, DeriveEntityModel)]
#[sea_orm(table_name = "agents")]
pub struct Model {
    /// UUIDv7.
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: Uuid,
    /// Whose it is.
    pub tenant_id: Uuid,
    /// For people, and for the names of handoffs to it.
    pub name: String,
    /// For people.
    pub description: Option<String>,
    /// The draft, as the api's `agents::Definition`; tokens in it are sealed.
    pub definition: Json,
    /// The version that runs use.
    pub published_version_id: Option<Uuid>,
    /// When it was made.
    pub created_at: DateTimeUtc,
    /// When its draft last changed.
    pub updated_at: DateTimeUtc,
    /// When it was deleted; what refers to it goes on resolving.
    pub deleted_at: Option<DateTimeUtc>,
}

impl ActiveModelBehavior for ActiveModel {}
