//! What a tenant's namespace is to hold: a spec with every default filled in and every rule checked that only the
//! operator can check. Pure.

use std::collections::BTreeMap;

use crds::Tenant;
use crds::runtime::{
    Amounts, Autoscaling, DEFAULT_CONCURRENCY, DEFAULT_LIMITS, DEFAULT_REPLICAS, DEFAULT_REQUESTS, RuntimeSpec,
    Toleration,
};
use ipnet::IpNet;
use kube::ResourceExt;

use crate::build::network::{self, Opening};
use crate::quantity::{NotAQuantity, Quantity};
use crate::settings::Settings;

/// What a tenant's namespace is to hold.
#[derive(Clone, Debug, PartialEq)]
pub struct Wanted {
    /// The object's name.
    pub tenant: String,
    /// The object's UID.
    pub uid: String,
    /// The namespace's name.
    pub namespace: String,
    /// How many workers there may be, but for one that takes another's place.
    pub max_replicas: i32,
    /// How their number is found.
    pub scale: Scale,
    /// Runs that a worker executes at once.
    pub concurrency: i32,
    /// What a worker requests.
    pub requests: Amount,
    /// What a worker is limited to.
    pub limits: Amount,
    /// What the namespace may use.
    pub quota: BTreeMap<&'static str, Quantity>,
    /// Labels of the nodes that workers run on.
    pub node_selector: BTreeMap<String, String>,
    /// Taints that workers tolerate.
    pub tolerations: Vec<Toleration>,
    /// The workers' runtime class.
    pub runtime_class: Option<String>,
    /// The workers' priority class.
    pub priority_class: Option<String>,
    /// What workers reach beyond public HTTPS.
    pub openings: Vec<Opening>,
    /// Classes that the platform does not allow, each with the field and the remedy. Workers are left as they are then.
    pub refused_classes: Vec<String>,
    /// Openings that the platform does not allow, each with the field and the remedy. They are left out.
    pub refused_openings: Vec<String>,
}

/// How the number of workers is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// It is set.
    Fixed(i32),
    /// It follows the runs.
    Runs(Autoscaling),
}

/// CPU time and memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Amount {
    /// CPU time.
    pub cpu: Quantity,
    /// Memory.
    pub memory: Quantity,
}

impl Amount {
    fn of(given: Option<&Amounts>, default: [&str; 2]) -> Result<Self, NotAQuantity> {
        let cpu = given.and_then(|given| given.cpu.as_deref()).unwrap_or(default[0]);
        let memory = given.and_then(|given| given.memory.as_deref()).unwrap_or(default[1]);
        Ok(Self { cpu: cpu.parse()?, memory: memory.parse()? })
    }
}

/// Addresses that the cluster itself says.
#[derive(Clone, Debug, Default)]
pub struct Addresses {
    /// Of the Kubernetes API's own endpoints.
    pub api_server: Vec<IpNet>,
}

/// What the spec of `tenant` comes to. `namespace` is the one that it has, if it has one.
///
/// # Errors
/// A quantity can't be read, which the schema refuses.
pub fn validate(
    tenant: &Tenant,
    namespace: Option<&str>,
    settings: &Settings,
    addresses: &Addresses,
) -> Result<Wanted, NotAQuantity> {
    let none = RuntimeSpec::default();
    let runtime = tenant.spec.runtime.as_ref().unwrap_or(&none);
    let resources = runtime.resources.as_ref();
    let requests = Amount::of(resources.and_then(|resources| resources.requests.as_ref()), DEFAULT_REQUESTS)?;
    let limits = Amount::of(resources.and_then(|resources| resources.limits.as_ref()), DEFAULT_LIMITS)?;
    let classes = [
        ("runtimeClassName", &runtime.runtime_class_name, &settings.runtime_classes),
        ("priorityClassName", &runtime.priority_class_name, &settings.priority_classes),
    ];
    let refused_classes =
        classes.into_iter().filter_map(|(field, class, allowed)| refused_class(field, class.as_deref()?, allowed));
    let (openings, refused_openings) = openings(tenant, settings, addresses);
    Ok(Wanted {
        tenant: tenant.name_any(),
        uid: tenant.uid().unwrap_or_default(),
        namespace: namespace.map_or_else(|| settings.namespace_of(&tenant.name_any()), str::to_owned),
        max_replicas: runtime.max_replicas(),
        scale: match runtime.autoscaling {
            Some(autoscaling) => Scale::Runs(autoscaling),
            None => Scale::Fixed(runtime.replicas.unwrap_or(DEFAULT_REPLICAS)),
        },
        concurrency: runtime.concurrency.unwrap_or(DEFAULT_CONCURRENCY),
        quota: quota(tenant, runtime, requests, limits)?,
        requests,
        limits,
        node_selector: runtime.node_selector.clone(),
        tolerations: runtime.tolerations.clone(),
        runtime_class: runtime.runtime_class_name.clone(),
        priority_class: runtime.priority_class_name.clone(),
        openings,
        refused_classes: refused_classes.collect(),
        refused_openings,
    })
}

fn refused_class(field: &str, class: &str, allowed: &[String]) -> Option<String> {
    if allowed.iter().any(|allowed| allowed == class) {
        return None;
    }
    let allowed = if allowed.is_empty() { "none".to_owned() } else { allowed.join(", ") };
    Some(format!(
        "spec.runtime.{field} {class} is not among those that the platform allows ({allowed}). Choose one of them, or \
         remove the field."
    ))
}

fn openings(tenant: &Tenant, settings: &Settings, addresses: &Addresses) -> (Vec<Opening>, Vec<String>) {
    let (mut openings, mut refused) = (Vec::new(), Vec::new());
    for egress in tenant.spec.network.iter().flat_map(|network| &network.allowed_egress) {
        let Ok(cidr) = egress.cidr.parse::<IpNet>() else {
            refused.push(format!("spec.network.allowedEgress: {} is not a network in CIDR notation.", egress.cidr));
            continue;
        };
        match network::open(cidr.trunc(), &egress.ports, settings, addresses) {
            Some(opening) => openings.push(opening),
            None => refused.push(format!(
                "spec.network.allowedEgress: {} lies within addresses that the platform denies to tenants. Remove it.",
                egress.cidr
            )),
        }
    }
    (openings, refused)
}

/// What the spec does not say holds every worker there may be, and one more for a rollout.
fn quota(
    tenant: &Tenant,
    runtime: &RuntimeSpec,
    requests: Amount,
    limits: Amount,
) -> Result<BTreeMap<&'static str, Quantity>, NotAQuantity> {
    let pods = runtime.max_replicas() + 1;
    let given = tenant.spec.quota.clone().unwrap_or_default();
    let or = |given: Option<String>, derived: Quantity| given.map_or(Ok(derived), |given| given.parse());
    Ok(BTreeMap::from([
        ("requests.cpu", or(given.requests_cpu, requests.cpu * pods)?),
        ("requests.memory", or(given.requests_memory, requests.memory * pods)?),
        ("limits.cpu", or(given.limits_cpu, limits.cpu * pods)?),
        ("limits.memory", or(given.limits_memory, limits.memory * pods)?),
        ("pods", or(given.pods, pods.to_string().parse()?)?),
    ]))
}

/// Tenants for tests of what is built.
#[cfg(test)]
pub mod samples {
    use crds::Tenant;

    use super::{Addresses, Wanted, validate};
    use crate::settings::Settings;

    /// A tenant whose spec has these fields beyond those that it must have.
    pub fn tenant(spec: serde_json::Value) -> Tenant {
        let mut whole = serde_json::json!({"displayName": "Acme", "email": "ops@acme.example", "plan": "enterprise"});
        whole.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
        let spec = serde_json::from_value(whole).unwrap();
        let mut tenant = Tenant::new("acme", spec);
        tenant.metadata.uid = Some("9f0c".to_owned());
        tenant.metadata.generation = Some(3);
        tenant
    }

    /// What such a tenant's namespace is to hold.
    pub fn wanted(spec: serde_json::Value) -> Wanted {
        let addresses = Addresses { api_server: vec!["198.51.100.7/32".parse().unwrap()] };
        validate(&tenant(spec), None, &Settings::sample(), &addresses).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::samples::{tenant, wanted};
    use super::*;

    #[test]
    fn a_quota_that_is_not_given_holds_the_workers_and_one_more() {
        let quota = |spec| -> Vec<String> { wanted(spec).quota.values().map(ToString::to_string).collect() };
        assert_eq!(quota(json!({})), ["2", "512Mi", "2", "500m", "256Mi"]);
        let autoscaling = json!({"minReplicas": 1, "maxReplicas": 3, "targetRunsPerReplica": 20});
        let spec = json!({"runtime": {"autoscaling": autoscaling}, "quota": {"requests.cpu": "4000m"}});
        assert_eq!(quota(spec), ["4", "1Gi", "4", "4", "512Mi"]);
    }

    #[test]
    fn classes_must_be_allowed() {
        let spec = json!({"runtime": {"runtimeClassName": "gvisor", "priorityClassName": "high"}});
        assert_eq!(wanted(spec.clone()).refused_classes.len(), 2);
        let settings = Settings {
            runtime_classes: vec!["gvisor".to_owned()],
            priority_classes: vec!["low".to_owned()],
            ..Settings::sample()
        };
        let refused = validate(&tenant(spec), None, &settings, &Addresses::default()).unwrap().refused_classes;
        assert_eq!(refused.len(), 1);
        assert!(refused[0].contains("priorityClassName high") && refused[0].contains("low"), "{refused:?}");
    }

    #[test]
    fn an_opening_to_what_is_denied_is_refused() {
        let egress =
            json!([{"cidr": "198.51.100.7/32", "ports": [6443]}, {"cidr": "198.51.100.0/24", "ports": [6443]}]);
        let wanted = wanted(json!({"network": {"allowedEgress": egress}}));
        assert_eq!((wanted.openings.len(), wanted.refused_openings.len()), (1, 1));
        assert_eq!(wanted.openings[0].except, ["198.51.100.7/32".parse::<IpNet>().unwrap()]);
    }
}
