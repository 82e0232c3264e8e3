//! Published versions of agents: frozen.

use sea_orm::entity::prelude::*;

/// A published version.
#[sea_orm::model]
#[derive(Clone, Debug, PartialEq, DeriveEntityModel)]
#[sea_orm(table_name = "agent_versions")]
pub struct Model {
    /// UUIDv7.
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: Uuid,
    /// Whose it is.
    pub tenant_id: Uuid,
    /// The agent.
    pub agent_id: Uuid,
    /// From 1 for each agent.
    pub version: i32,
    /// The agent's name when it was published.
    pub name: String,
    /// As the api's `agents::Definition`; tokens in it are sealed.
    pub definition: Json,
    /// The versions that its handoffs resolve to, itself included: a list of version ids.
    pub closure: Json,
    /// When it was published.
    pub published_at: DateTimeUtc,
}

impl ActiveModelBehavior for ActiveModel {}
