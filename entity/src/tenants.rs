//! Tenants: who is served, metered and billed.

use sea_orm::entity::prelude::*;

/// Whether a tenant is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, EnumIter, DeriveActiveEnum)]
#[sea_orm(rs_type = "String", db_type = "Text", rename_all = "snake_case")]
pub enum Status {
    /// Served.
    Active,
    /// Refused with 403 until resumed.
    Suspended,
    /// Refused for good; its rows are kept for the books.
    Deleting,
}

/// Where a tenant's runs execute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, EnumIter, DeriveActiveEnum)]
#[sea_orm(rs_type = "String", db_type = "Text", rename_all = "snake_case")]
pub enum Isolation {
    /// In the api's own pool.
    Shared,
    /// In the tenant's namespace.
    Dedicated,
}

/// A tenant.
#[sea_orm::model]
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "tenants")]
pub struct Model {
    /// UUIDv7.
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: Uuid,
    /// For people.
    pub name: String,
    /// Where invoices go.
    pub email: String,
    /// The plan's name; the newest version of it holds.
    pub plan: String,
    /// The tenant's own limit in tokens a month, in place of the plan's.
    pub monthly_token_limit: Option<i64>,
    /// Whether it is served.
    pub status: Status,
    /// Where its runs execute.
    pub isolation: Isolation,
    /// Signs webhook tools' requests; sealed.
    pub webhook_secret: String,
    /// The secret before the last rotation; sealed.
    pub previous_webhook_secret: Option<String>,
    /// Until when the previous secret signs too.
    pub previous_webhook_secret_until: Option<DateTimeUtc>,
    /// When it was made.
    pub created_at: DateTimeUtc,
    /// When it last changed.
    pub updated_at: DateTimeUtc,
    /// The [`crate::auth_epoch`] in which it, or a key of it, last lost or gained a right.
    pub auth_epoch: i64,
    /// Its object says that it is not to be served.
    pub suspended_by_object: bool,
    /// An admin said so.
    pub suspended_by_admin: bool,
    /// An invoice was not paid.
    pub suspended_by_billing: bool,
    /// Its object is gone, and it waits for another one.
    pub suspended_by_absence: bool,
    /// Its object is going: no run starts or is claimed any more, those that workers have go on.
    pub is_leaving: bool,
}

impl Model {
    /// Whether there is a reason, one at least, not to serve it.
    pub fn is_suspended(&self) -> bool {
        self.suspended_by_object || self.suspended_by_admin || self.suspended_by_billing || self.suspended_by_absence
    }

    /// Whether runs of it may start and be claimed.
    pub fn takes_runs(&self) -> bool {
        self.status == Status::Active && !self.is_leaving
    }
}

impl ActiveModelBehavior for ActiveModel {}
