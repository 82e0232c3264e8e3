//! Which object of which cluster rules a tenant.

use sea_orm::entity::prelude::*;

/// An object `Tenant` by its place: its cluster and its name. The row outlives the object when the tenant is kept, so
/// that an object by the same name finds it again.
#[sea_orm::model]
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "cluster_tenants")]
pub struct Model {
    /// The UID of the cluster's namespace `kube-system`.
    #[sea_orm(primary_key, auto_increment = false)]
    pub cluster: String,
    /// The object's name.
    #[sea_orm(primary_key, auto_increment = false)]
    pub name: String,
    /// The tenant that it rules; ruled by one object that isn't released at most.
    pub tenant_id: Uuid,
    /// The object's UID; none while no object has been taken over.
    pub object_uid: Option<String>,
    /// The newest generation of the object that was taken over.
    pub generation: i64,
    /// What it said then: `crds::protocol::Registration`.
    pub registration: Option<Json>,
    /// How far the cluster has come with it: `crds::protocol::Provisioning`.
    pub provisioning: Option<Json>,
    /// When it was first heard of.
    pub created_at: DateTimeUtc,
    /// When `provisioning` or `released_at` last changed.
    pub changed_at: DateTimeUtc,
    /// When its operator last told of it; none: the api made the object, and its operator has not told of it yet.
    pub last_seen_at: Option<DateTimeUtc>,
    /// When the object went; none: it is there.
    pub released_at: Option<DateTimeUtc>,
}

impl Model {
    /// Whether the object is there.
    pub fn is_live(&self) -> bool {
        self.released_at.is_none()
    }
}

impl ActiveModelBehavior for ActiveModel {}
