//! The rows of `cluster_tenants`: which object rules which tenant.

use entity::{TenantOwned, cluster_tenants};
use sea_orm::{ColumnTrait, ConnectionTrait, DatabaseTransaction, QueryFilter, QuerySelect, Select};
use uuid::Uuid;

use super::refused::Refused;
use crate::error::Error;

/// The longest UID, of a cluster or an object.
const MAX_UID: usize = 64;
/// The longest name of an object.
/// Source: <https://kubernetes.io/docs/concepts/overview/working-with-objects/names/#dns-subdomain-names>.
const MAX_NAME: usize = 253;

/// An object's place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The UID of the cluster's namespace `kube-system`.
    pub cluster: String,
    /// The object's name.
    pub name: String,
}

impl Place {
    /// From a request's path.
    pub fn new(cluster: String, name: String) -> Result<Self, Refused> {
        check_uid("The cluster", &cluster)?;
        let is_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.');
        if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(is_name) {
            return Err(Refused::invalid("This is not an object's name."));
        }
        Ok(Self { cluster, name })
    }

    fn rows(&self) -> Select<cluster_tenants::Entity> {
        cluster_tenants::Entity::across_tenants()
            .filter(cluster_tenants::Column::Cluster.eq(&self.cluster))
            .filter(cluster_tenants::Column::Name.eq(&self.name))
    }

    /// Its row, released or not.
    pub async fn row(&self, db: &impl ConnectionTrait) -> Result<Option<cluster_tenants::Model>, Error> {
        Ok(self.rows().one(db).await?)
    }

    /// Its row, locked. A tenant's row is locked before it.
    pub async fn locked(&self, tx: &DatabaseTransaction) -> Result<Option<cluster_tenants::Model>, Error> {
        Ok(self.rows().lock_exclusive().one(tx).await?)
    }
}

/// Refuses what can't be a UID.
pub fn check_uid(what: &str, uid: &str) -> Result<(), Refused> {
    let is_uid = !uid.is_empty() && uid.len() <= MAX_UID && uid.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
    if is_uid { Ok(()) } else { Err(Refused::invalid(format!("{what} must be named by a UID."))) }
}

/// The object that rules a tenant, if one does.
pub async fn ruler(db: &impl ConnectionTrait, tenant_id: Uuid) -> Result<Option<cluster_tenants::Model>, Error> {
    let live = cluster_tenants::Column::ReleasedAt.is_null();
    Ok(cluster_tenants::Entity::in_tenant(tenant_id).filter(live).one(db).await?)
}
