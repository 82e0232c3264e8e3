//! How a tenant's own runtime is wanted.

use std::collections::BTreeMap;

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::rules;

/// Workers, unless the object says otherwise.
pub const DEFAULT_REPLICAS: i32 = 1;
/// Runs that a worker executes at once, unless the object says otherwise.
pub const DEFAULT_CONCURRENCY: i32 = 50;

/// How a tenant's own runtime is wanted.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[x_kube(validation = rules::one_way_to_scale())]
#[serde(rename_all = "camelCase")]
pub struct RuntimeSpec {
    /// The number of workers; 1 unless set. Not together with `autoscaling`.
    #[schemars(range(min = 1, max = 100))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<i32>,
    /// Lets the number of workers follow the number of runs. Not together with `replicas`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autoscaling: Option<Autoscaling>,
    /// Runs that a worker executes at once; 50 unless set.
    #[schemars(range(min = 1, max = 10_000))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub concurrency: Option<i32>,
    /// What a worker requests and is limited to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<Resources>,
    /// A runtime class that the platform allows, such as `gvisor`.
    #[schemars(schema_with = "rules::name_of_object")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime_class_name: Option<String>,
    /// A priority class that the platform allows.
    #[schemars(schema_with = "rules::name_of_object")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority_class_name: Option<String>,
    /// Labels of the nodes that workers run on.
    #[schemars(schema_with = "rules::labels")]
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selector: BTreeMap<String, String>,
    /// Taints of nodes that workers tolerate.
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "atomic"))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tolerations: Vec<Toleration>,
}

impl RuntimeSpec {
    /// The largest number of workers there may be, but for one that takes another's place.
    pub fn max_replicas(&self) -> i32 {
        match (&self.autoscaling, self.replicas) {
            (Some(autoscaling), _) => autoscaling.max_replicas,
            (None, replicas) => replicas.unwrap_or(DEFAULT_REPLICAS),
        }
    }
}

/// The number of workers follows the number of runs.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
#[x_kube(validation = rules::min_up_to_max())]
#[serde(rename_all = "camelCase")]
pub struct Autoscaling {
    /// The smallest number of workers.
    #[schemars(range(min = 1, max = 100))]
    pub min_replicas: i32,
    /// The largest number of workers.
    #[schemars(range(min = 1, max = 100))]
    pub max_replicas: i32,
    /// Running and queued runs for each worker.
    #[schemars(range(min = 1, max = 10_000))]
    pub target_runs_per_replica: i32,
}

/// What a worker requests and is limited to.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[x_kube(
    validation = rules::limit_covers_request("cpu"),
    validation = rules::limit_covers_request("memory"),
    validation = rules::limit_suffices("cpu"),
    validation = rules::limit_suffices("memory")
)]
pub struct Resources {
    /// What the scheduler sets aside: 250m and 128Mi unless set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests: Option<Amounts>,
    /// What it may use at most: 1 and 256Mi unless set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<Amounts>,
}

/// Amounts of CPU time and memory.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
pub struct Amounts {
    /// CPU time, such as `250m`.
    #[schemars(schema_with = "rules::quantity")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<String>,
    /// Memory, such as `128Mi`.
    #[schemars(schema_with = "rules::quantity")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<String>,
}

/// Requests of a worker whose object doesn't say: CPU time and memory.
pub const DEFAULT_REQUESTS: [&str; 2] = ["250m", "128Mi"];
/// Limits of a worker whose object doesn't say: CPU time and memory.
pub const DEFAULT_LIMITS: [&str; 2] = ["1", "256Mi"];

/// A taint that workers tolerate, in the words of a pod's tolerations.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[x_kube(validation = rules::toleration())]
#[serde(rename_all = "camelCase")]
pub struct Toleration {
    /// The taint's key.
    #[schemars(length(min = 1, max = 317))]
    pub key: String,
    /// How its value is compared.
    #[serde(default)]
    pub operator: TolerationOperator,
    /// Its value; with the operator `Equal` only.
    #[schemars(length(max = 63))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
    /// Its effect; every effect unless set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub effect: Option<TaintEffect>,
}

/// How a toleration is compared with a taint.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[schemars(inline)]
pub enum TolerationOperator {
    /// The value is the same.
    #[default]
    Equal,
    /// Any value.
    Exists,
}

/// What a taint does to pods that don't tolerate it.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq)]
#[schemars(inline)]
pub enum TaintEffect {
    /// They are not scheduled.
    NoSchedule,
    /// They are scheduled elsewhere if possible.
    PreferNoSchedule,
    /// They are evicted.
    NoExecute,
}
