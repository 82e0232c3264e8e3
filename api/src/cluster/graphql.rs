//! `Provisioning`: how far a cluster has come with a tenant.
#![allow(missing_docs)] // fields and inputs are what the schema says they are

use async_graphql::{Context, Enum, ID, Result, SimpleObject, Subscription};
use chrono::{DateTime, Utc};
use crds::protocol;
use entity::{TenantOwned, cluster_tenants, tenants};
use futures_util::Stream;
use tokio::sync::broadcast::error::RecvError;
use uuid::Uuid;

use super::places::ruler;
use crate::app::App;
use crate::error::Error;
use crate::graphql::loaders::{RulerOf, load};
use crate::graphql::{app, viewer};
use crate::ids;
use crate::tenants::changes::Change;
use crate::viewer::{Scope, Viewer};

/// How far a cluster has come with a tenant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Enum)]
pub enum ProvisioningPhase {
    /// Nobody has looked at it yet.
    Pending,
    /// What it needs is being made.
    Provisioning,
    /// All that it needs is there.
    Ready,
    /// Something that it needs is not as it should be; the conditions say what.
    Degraded,
    /// Its runtime is scaled to zero.
    Suspended,
    /// What it has is being removed.
    Deleting,
}

impl ProvisioningPhase {
    /// A phase that a later operator may know is one that we can't tell: something is under way.
    fn named(name: &str) -> Self {
        match name {
            "Pending" | "" => Self::Pending,
            "Ready" => Self::Ready,
            "Degraded" => Self::Degraded,
            "Suspended" => Self::Suspended,
            "Deleting" => Self::Deleting,
            _ => Self::Provisioning,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Enum)]
pub enum ConditionStatus {
    True,
    False,
    Unknown,
}

/// A condition of the tenant's object, such as NamespaceReady.
#[derive(Clone, Debug, PartialEq, SimpleObject)]
pub struct ProvisioningCondition {
    #[graphql(name = "type")]
    kind: String,
    status: ConditionStatus,
    /// In one CamelCase word.
    reason: String,
    message: String,
    last_transition_time: DateTime<Utc>,
}

impl From<protocol::Condition> for ProvisioningCondition {
    fn from(condition: protocol::Condition) -> Self {
        let status = match condition.status.as_str() {
            "True" => ConditionStatus::True,
            "False" => ConditionStatus::False,
            _ => ConditionStatus::Unknown,
        };
        Self {
            kind: condition.r#type,
            status,
            reason: condition.reason,
            message: condition.message,
            last_transition_time: condition.last_transition_time,
        }
    }
}

/// What a tenant has in a cluster, as its operator last told.
#[derive(Clone, Debug, PartialEq, SimpleObject)]
pub struct Provisioning {
    phase: ProvisioningPhase,
    /// The name of the object `Tenant` that rules the tenant.
    object_name: String,
    /// The tenant's namespace; null where its plan gives it none.
    namespace: Option<String>,
    /// Workers wanted.
    replicas: i32,
    /// Workers that are ready.
    ready_replicas: i32,
    conditions: Vec<ProvisioningCondition>,
}

impl Provisioning {
    fn of(row: cluster_tenants::Model) -> Result<Self, Error> {
        let told: Option<protocol::Provisioning> = row.provisioning.map(serde_json::from_value).transpose()?;
        let told = told.unwrap_or_default();
        Ok(Self {
            phase: ProvisioningPhase::named(&told.phase),
            object_name: row.name,
            namespace: told.namespace,
            replicas: told.replicas,
            ready_replicas: told.ready_replicas,
            conditions: told.conditions.into_iter().map(ProvisioningCondition::from).collect(),
        })
    }

    /// A tenant's; none where no object rules it.
    pub async fn load(ctx: &Context<'_>, tenant_id: Uuid) -> Result<Option<Self>> {
        Ok(load(ctx, RulerOf(tenant_id)).await?.map(Self::of).transpose()?)
    }
}

#[derive(Default)]
pub struct ClusterSubscription;

#[Subscription]
impl ClusterSubscription {
    /// [MANAGE] How far its cluster has come with a tenant, now and after each change; null while no object rules it.
    /// The caller's tenant, or for the platform admin the one that is named.
    async fn provisioning<'ctx>(
        &self,
        ctx: &Context<'ctx>,
        tenant_id: Option<ID>,
    ) -> Result<impl Stream<Item = Result<Option<Provisioning>>> + use<'ctx>> {
        let app = app(ctx)?.clone();
        let tenant_id = watched(&app, viewer(ctx)?, tenant_id).await?;
        let mut changes = app.changes.subscribe(tenant_id, app.clock.now()).await;
        Ok(async_stream::try_stream! {
            let mut told = None;
            loop {
                let now = ruler(app.db.read(), tenant_id).await?.map(Provisioning::of).transpose()?;
                // A change may be told more than once: by who made it, and by who found it.
                if told.as_ref() != Some(&now) {
                    told = Some(now.clone());
                    yield now;
                }
                loop {
                    match changes.recv().await {
                        Ok(Change::Provisioning) | Err(RecvError::Lagged(_)) => break,
                        Ok(Change::Run(_) | Change::Usage) => {}
                        Err(RecvError::Closed) => return,
                    }
                }
            }
        })
    }
}

/// The tenant that a caller may watch.
async fn watched(app: &App, viewer: &Viewer, named: Option<ID>) -> Result<Uuid> {
    let Some(named) = named else { return Ok(viewer.require(Scope::Manage)?.tenant_id()) };
    let id = ids::decode(ids::Tenant, &named).unwrap_or_default();
    viewer.may_see(id, Scope::Manage)?;
    let tenant = tenants::Entity::in_tenant(id).one(app.db.read()).await.map_err(Error::from)?;
    tenant.ok_or_else(|| Error::NotFound("tenantId: there is no tenant with this id.".to_owned()))?;
    Ok(id)
}
