//! The catalogue of models, as configured.

use sea_orm::entity::prelude::*;

/// A model.
#[sea_orm::model]
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "models")]
pub struct Model {
    /// The name agents use.
    #[sea_orm(primary_key, auto_increment = false)]
    pub name: String,
    /// The configured provider.
    pub provider: String,
    /// The provider's name for it.
    pub upstream: String,
    /// Tokens of input and output together.
    pub context_window: i32,
    /// Tokens of a response.
    pub max_output_tokens: i32,
    /// False once it is no longer configured: runs that use it fail, nothing new may.
    pub is_active: bool,
}

impl ActiveModelBehavior for ActiveModel {}
