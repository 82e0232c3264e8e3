//! sea-orm entities, a file per table.
//!
//! **I5** no query on a tenant's table starts unscoped: [`TenantOwned::in_tenant`] is where queries
//! begin. What the platform itself does across tenants (claims, sweeps, sign-in by key) says so with
//! [`TenantOwned::across_tenants`]. The bare finders are forbidden elsewhere by `clippy.toml`.
#![allow(clippy::disallowed_methods)]

use sea_orm::entity::prelude::*;

pub mod admin_keys;
pub mod agent_versions;
pub mod agents;
pub mod api_keys;
pub mod auth_epoch;
pub mod cluster_tenants;
pub mod conversations;
pub mod models;
pub mod object_writes;
pub mod plans;
pub mod prices;
pub mod quota_counters;
pub mod quota_reservations;
pub mod run_items;
pub mod runs;
pub mod runtime_tokens;
pub mod tenant_queues;
pub mod tenants;
pub mod usage_records;
pub mod usage_totals;

/// A table whose rows belong to a tenant.
pub trait TenantOwned: EntityTrait {
    /// The column that names the tenant.
    fn tenant_column() -> Self::Column;

    /// The tenant's rows: where every query of a caller begins.
    fn in_tenant(tenant_id: Uuid) -> Select<Self> {
        Self::find().filter(Self::tenant_column().eq(tenant_id))
    }

    /// Everyone's rows: for the platform's own work, never for a caller's query.
    fn across_tenants() -> Select<Self> {
        Self::find()
    }
}

/// A table that is the same for every tenant.
pub trait Shared: EntityTrait {
    /// All rows.
    fn all() -> Select<Self> {
        Self::find()
    }
}

macro_rules! tenant_owned {
    ($($table:ident by $column:ident),* $(,)?) => {$(
        impl TenantOwned for $table::Entity {
            fn tenant_column() -> $table::Column {
                $table::Column::$column
            }
        }
    )*};
}

tenant_owned! {
    agent_versions by TenantId,
    agents by TenantId,
    api_keys by TenantId,
    cluster_tenants by TenantId,
    conversations by TenantId,
    object_writes by TenantId,
    quota_counters by TenantId,
    quota_reservations by TenantId,
    run_items by TenantId,
    runs by TenantId,
    runtime_tokens by TenantId,
    tenant_queues by TenantId,
    tenants by Id,
    usage_records by TenantId,
    usage_totals by TenantId,
}

impl Shared for admin_keys::Entity {}
impl Shared for auth_epoch::Entity {}
impl Shared for models::Entity {}
impl Shared for plans::Entity {}
impl Shared for prices::Entity {}
