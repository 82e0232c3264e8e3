//! One row that rises with each change of authority, so that every replica finds it by polling.

use sea_orm::entity::prelude::*;

/// The epoch.
#[sea_orm::model]
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "auth_epoch")]
pub struct Model {
    /// 1: there is one row.
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: i32,
    /// Risen by one with each change; the tenants it concerned have it in `tenants.auth_epoch`.
    pub epoch: i64,
}

impl ActiveModelBehavior for ActiveModel {}
