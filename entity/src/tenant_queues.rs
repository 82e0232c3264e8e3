//! A row per tenant and pool: the tenant's place in the fair queue.

use sea_orm::entity::prelude::*;

/// A tenant's queue in a pool. Claims lock this row, so caps never overshoot.
#[sea_orm::model]
#[derive(Clone, Debug, PartialEq, DeriveEntityModel)]
#[sea_orm(table_name = "tenant_queues")]
pub struct Model {
    /// The tenant.
    #[sea_orm(primary_key, auto_increment = false)]
    pub tenant_id: Uuid,
    /// The pool.
    #[sea_orm(primary_key, auto_increment = false)]
    pub pool: String,
    /// Runs that workers hold.
    pub running: i32,
    /// The plan's cap on `running`.
    pub max_running: i32,
    /// The virtual time of the tenant's newest run.
    pub last_vtime: f64,
    /// The virtual time of its oldest waiting run; none when nothing waits.
    pub next_vtime: Option<f64>,
    /// The virtual time of its newest claimed run; the pool's own time is the greatest of these.
    pub claimed_vtime: f64,
}

impl ActiveModelBehavior for ActiveModel {}
