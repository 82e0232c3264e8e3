//! What holds for a tenant, and what that means for its namespace. Pure, but for looking into the mirrors.

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use crds::Tenant;
use crds::protocol::{State, Suspension};
use crds::status::{ConditionStatus, Isolation};
use crds::tenant::Plan;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Namespace;
use kube::ResourceExt;

use crate::api::ApiError;
use crate::build::NAME;
use crate::cluster::owns;
use crate::operator::Operator;

/// What was found out about a tenant.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Where it stands with the api.
    pub standing: Standing,
    /// Why the api does not know the spec as it is.
    pub trouble: Option<ApiError>,
    /// The namespace by its name, whoever's it is.
    pub namespace: Option<Arc<Namespace>>,
    /// Whose it is.
    pub ownership: Ownership,
    /// Its workers.
    pub deployment: Option<Arc<Deployment>>,
    /// Network policies in its namespace that are not ours.
    pub foreign_policies: Vec<String>,
}

/// Where a tenant stands with the api.
#[derive(Clone, Debug, PartialEq)]
pub enum Standing {
    /// It was never registered.
    Unregistered,
    /// It was registered, and the api has not told what holds since the operator started: what is there stays.
    Remembered,
    /// The api told what holds.
    Held(State),
}

/// Whose a namespace is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ownership {
    /// There is none by the name.
    Absent,
    /// The tenant's.
    Ours,
    /// Somebody else's: it is never touched.
    Foreign,
}

impl Facts {
    /// Looks at what is there.
    pub fn observe(tenant: &Tenant, operator: &Operator, standing: Standing, trouble: Option<ApiError>) -> Self {
        let namespaces = &operator.cluster.namespaces;
        let own_name = operator.settings.namespace_of(&tenant.name_any());
        // One that was made under another prefix stays where it is.
        let known = tenant.status.as_ref().and_then(|status| status.namespace.as_ref());
        let known = known.and_then(|known| namespaces.get(None, &known.name));
        let namespace =
            known.filter(|known| owns(tenant, known, &own_name)).or_else(|| namespaces.get(None, &own_name));
        let ownership = ownership(tenant, namespace.as_deref(), &own_name);
        let name = namespace.as_ref().map_or(own_name, |namespace| namespace.name_any());
        let is_ours = ownership == Ownership::Ours;
        Self {
            standing,
            trouble,
            ownership,
            deployment: operator.cluster.deployments.get(Some(&name), NAME).filter(|_| is_ours),
            foreign_policies: if is_ours { operator.cluster.foreign_policies(&name) } else { Vec::new() },
            namespace,
        }
    }

    /// The name of the tenant's namespace, if it has one.
    pub fn namespace_name(&self) -> Option<&str> {
        self.own_namespace().and_then(|namespace| namespace.metadata.name.as_deref())
    }

    /// The tenant's namespace, if it has one.
    pub fn own_namespace(&self) -> Option<&Arc<Namespace>> {
        self.namespace.as_ref().filter(|_| self.ownership == Ownership::Ours)
    }

    /// Why the tenant is not served, if it isn't. What the spec says holds at once; what billing says, until billing says
    /// otherwise.
    pub fn suspension(&self, tenant: &Tenant) -> Option<Suspension> {
        let told = match &self.standing {
            Standing::Held(state) => state.suspended,
            Standing::Remembered => remembered_suspension(tenant),
            Standing::Unregistered => None,
        };
        if tenant.spec.suspended { Some(Suspension::Requested) } else { told }
    }
}

/// Whose a namespace by the tenant's name is.
pub fn ownership(tenant: &Tenant, namespace: Option<&Namespace>, own_name: &str) -> Ownership {
    match namespace {
        None => Ownership::Absent,
        Some(namespace) if owns(tenant, namespace, own_name) => Ownership::Ours,
        Some(_) => Ownership::Foreign,
    }
}

fn remembered_suspension(tenant: &Tenant) -> Option<Suspension> {
    let condition = tenant.status.as_ref()?.condition("Suspended")?;
    if condition.status != ConditionStatus::True {
        return None;
    }
    match condition.reason.as_str() {
        "PaymentFailed" => Some(Suspension::PaymentFailed),
        "ByAdmin" => Some(Suspension::ByAdmin),
        // The spec said so, and tells itself whether it still does.
        _ => None,
    }
}

/// What is to become of a tenant's namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Course {
    /// The tenant is not registered: nothing yet.
    Unregistered,
    /// The shared pool serves the tenant: there is to be none.
    Shared,
    /// It is to be there.
    Dedicated,
    /// It is to go once its runs have ended.
    Draining {
        /// Since when it waits for that.
        since: DateTime<Utc>,
        /// Whether they have, or had the time to.
        is_over: bool,
    },
}

impl Course {
    /// Whether the tenant has a namespace of its own, if perhaps not for long.
    pub fn has_namespace(self) -> bool {
        matches!(self, Course::Dedicated | Course::Draining { .. })
    }
}

/// What the plan that holds means.
pub fn chart(tenant: &Tenant, facts: &Facts, now: DateTime<Utc>, drain: Duration) -> Course {
    let status = tenant.status.as_ref();
    let (is_dedicated, running) = match &facts.standing {
        Standing::Unregistered => return Course::Unregistered,
        Standing::Remembered => (status.is_some_and(|status| status.isolation == Some(Isolation::Namespace)), None),
        Standing::Held(state) => {
            let is_dedicated = state.is_dedicated.unwrap_or(state.plan == Plan::Enterprise.as_str());
            (is_dedicated, Some(state.runs.running_dedicated))
        }
    };
    if is_dedicated {
        return Course::Dedicated;
    }
    if facts.ownership != Ownership::Ours {
        return Course::Shared;
    }
    let since = status.and_then(|status| status.runtime.as_ref()?.draining_since).unwrap_or(now);
    let is_late = (now - since).to_std().is_ok_and(|waited| waited >= drain);
    Course::Draining { since, is_over: is_late || running == Some(0) }
}

#[cfg(test)]
mod tests {
    use crds::protocol::{Runs, Usage};
    use crds::status::{NamespaceStatus, RuntimeStatus, TenantStatus};
    use crds::tenant::TENANT_UID_ANNOTATION;
    use kube::api::ObjectMeta;
    use serde_json::json;

    use super::*;
    use crate::wanted::samples::tenant;

    fn held(plan: &str, running_dedicated: u64) -> Standing {
        Standing::Held(State {
            tenant_id: "ten_1".to_owned(),
            plan: plan.to_owned(),
            suspended: None,
            usage: Usage { period: "2026-11".to_owned(), tokens: 0, limit: 10 },
            runs: Runs { running_dedicated, ..Runs::default() },
            is_dedicated: None,
            generation: None,
            rotation: None,
        })
    }

    fn facts(standing: Standing, ownership: Ownership) -> Facts {
        Facts { standing, trouble: None, namespace: None, ownership, deployment: None, foreign_policies: Vec::new() }
    }

    fn namespace(uid: &str, tenant_uid: Option<&str>) -> Namespace {
        let annotations = tenant_uid.map(|uid| [(TENANT_UID_ANNOTATION.to_owned(), uid.to_owned())].into());
        let (name, uid) = (Some("tenant-acme".to_owned()), Some(uid.to_owned()));
        let metadata = ObjectMeta { name, uid, annotations, ..ObjectMeta::default() };
        Namespace { metadata, ..Namespace::default() }
    }

    #[test]
    fn whose_a_namespace_is() {
        let mut tenant = tenant(json!({}));
        let ownership = |tenant: &Tenant, namespace: Option<&Namespace>| ownership(tenant, namespace, "tenant-acme");
        assert_eq!(ownership(&tenant, None), Ownership::Absent);
        assert_eq!(ownership(&tenant, Some(&namespace("n1", Some("9f0c")))), Ownership::Ours);
        assert_eq!(ownership(&tenant, Some(&namespace("n1", Some("other")))), Ownership::Foreign);
        assert_eq!(ownership(&tenant, Some(&namespace("n1", None))), Ownership::Foreign);
        let known = NamespaceStatus { name: "tenant-acme".to_owned(), uid: "n1".to_owned() };
        tenant.status = Some(TenantStatus { namespace: Some(known), ..TenantStatus::default() });
        assert_eq!(ownership(&tenant, Some(&namespace("n1", None))), Ownership::Ours, "it lost its mark");
        assert_eq!(ownership(&tenant, Some(&namespace("n2", None))), Ownership::Foreign, "another by the same name");
        let mut others = namespace("n1", Some("other"));
        others.metadata.name = Some("tenant-globex".to_owned());
        assert_eq!(ownership(&tenant, Some(&others)), Ownership::Foreign, "a forged status");
        tenant.metadata.uid = None;
        assert_eq!(ownership(&tenant, Some(&namespace("n2", None))), Ownership::Foreign);
    }

    #[test]
    fn the_plan_that_holds_decides() {
        let (tenant, now, drain) = (tenant(json!({})), clock(0), Duration::from_secs(600));
        let chart = |facts| chart(&tenant, &facts, now, drain);
        assert_eq!(chart(facts(Standing::Unregistered, Ownership::Absent)), Course::Unregistered);
        assert_eq!(chart(facts(held("enterprise", 0), Ownership::Absent)), Course::Dedicated);
        assert_eq!(chart(facts(held("enterprise", 0), Ownership::Foreign)), Course::Dedicated);
        assert_eq!(chart(facts(held("pro", 0), Ownership::Absent)), Course::Shared);
        assert_eq!(chart(facts(held("pro", 0), Ownership::Foreign)), Course::Shared);
        assert_eq!(chart(facts(held("pro", 2), Ownership::Ours)), Course::Draining { since: now, is_over: false });
        assert_eq!(chart(facts(held("pro", 0), Ownership::Ours)), Course::Draining { since: now, is_over: true });
    }

    #[test]
    fn a_drain_ends_in_time() {
        let mut tenant = tenant(json!({}));
        let runtime = RuntimeStatus { draining_since: Some(clock(0)), ..RuntimeStatus::default() };
        tenant.status = Some(TenantStatus { runtime: Some(runtime), ..TenantStatus::default() });
        let facts = facts(held("pro", 2), Ownership::Ours);
        let is_over = |at| match chart(&tenant, &facts, clock(at), Duration::from_secs(600)) {
            Course::Draining { is_over, .. } => is_over,
            other => panic!("{other:?}"),
        };
        assert!(!is_over(599) && is_over(600));
    }

    #[test]
    fn without_the_api_what_is_there_stays() {
        let mut tenant = tenant(json!({"plan": "pro"}));
        let isolation = Some(Isolation::Namespace);
        tenant.status = Some(TenantStatus { isolation, ..TenantStatus::default() });
        let facts = facts(Standing::Remembered, Ownership::Ours);
        assert_eq!(chart(&tenant, &facts, clock(0), Duration::ZERO), Course::Dedicated);
    }

    fn clock(seconds: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(1_800_000_000 + seconds, 0).unwrap()
    }
}
