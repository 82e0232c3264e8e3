//! What a `Tenant` object asks for. Every string, list and map is bounded: the API server refuses a schema whose rules
//! could cost too much otherwise.

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::rules;
use crate::runtime::RuntimeSpec;
use crate::status::TenantStatus;

/// The label of everything that belongs to a tenant; its value is the object's name.
pub const TENANT_LABEL: &str = "cloister.dev/tenant";
/// The annotation of a tenant's namespace that holds the UID of the object that rules it.
pub const TENANT_UID_ANNOTATION: &str = "cloister.dev/tenant-uid";
/// The finalizer that keeps an object until nothing of it is left.
pub const FINALIZER: &str = "cloister.dev/tenant";
/// The annotation that, set to `true`, lets an object go although the api can't be told.
pub const ABANDON_ANNOTATION: &str = "cloister.dev/abandon";

/// A tenant of the platform as it is wanted.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[kube(
    group = "cloister.dev",
    version = "v1alpha1",
    kind = "Tenant",
    plural = "tenants",
    shortname = "cten",
    doc = "A tenant of Cloister: its plan, and for an enterprise tenant the namespace, quota, network and runtime of its own.",
    status = "TenantStatus",
    derive = "PartialEq",
    printcolumn(name = "Plan", type_ = "string", json_path = ".spec.plan"),
    printcolumn(name = "Isolation", type_ = "string", json_path = ".status.isolation"),
    printcolumn(name = "Namespace", type_ = "string", json_path = ".status.namespace.name"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type=='Ready')].status"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = rules::name(),
    validation = rules::email_is_fixed(),
    validation = rules::tenant_id_is_fixed()
)]
#[x_kube(
    validation = rules::enterprise_only("runtime"),
    validation = rules::enterprise_only("quota"),
    validation = rules::enterprise_only("network"),
    validation = rules::quota_holds("requests.cpu"),
    validation = rules::quota_holds("requests.memory"),
    validation = rules::quota_holds("limits.cpu"),
    validation = rules::quota_holds("limits.memory"),
    validation = rules::quota_holds_pods()
)]
#[serde(rename_all = "camelCase")]
pub struct TenantSpec {
    /// An existing tenant (`ten_…`) to take over. It must not be ruled by another object. Fixed once registered.
    #[schemars(length(max = 30), regex(pattern = r"^ten_[0-7][0-9a-hjkmnp-tv-z]{25}$"))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant_id: Option<String>,
    /// The tenant's name, for people.
    #[schemars(length(min = 1, max = 200), regex(pattern = r"\S"))]
    pub display_name: String,
    /// Where invoices go. Fixed once registered.
    #[schemars(length(min = 3, max = 254), regex(pattern = r"^[^@\s]+@[^@\s.]+(\.[^@\s.]+)*$"))]
    pub email: String,
    /// The plan. An enterprise tenant gets a namespace with a runtime of its own; others share the pool.
    pub plan: Plan,
    /// The tenant's own limit in tokens a month instead of the plan's.
    #[schemars(range(min = 0, max = 1_000_000_000_000_000_i64))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub monthly_token_limit: Option<i64>,
    /// Stops serving the tenant: its keys are refused, its runs wait, its runtime is scaled to zero.
    #[serde(default)]
    pub suspended: bool,
    /// What becomes of the tenant's data and usage when this object is deleted.
    #[serde(default)]
    pub deletion_policy: DeletionPolicy,
    /// The tenant's own runtime. Enterprise only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime: Option<RuntimeSpec>,
    /// What the tenant's namespace may use. What is not said is derived from `runtime`. Enterprise only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quota: Option<Quota>,
    /// What the tenant's runtime may reach. Enterprise only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<Network>,
}

/// A plan's name.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
pub enum Plan {
    /// The shared pool, with the smallest limits.
    Free,
    /// The shared pool.
    Pro,
    /// A namespace of its own.
    Enterprise,
}

impl Plan {
    /// As it is written.
    pub const fn as_str(self) -> &'static str {
        match self {
            Plan::Free => "free",
            Plan::Pro => "pro",
            Plan::Enterprise => "enterprise",
        }
    }
}

/// What becomes of a tenant's data and usage when its object is deleted.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[schemars(inline)]
pub enum DeletionPolicy {
    /// They stay, keys refused, so that another object may take the tenant over.
    #[default]
    Retain,
    /// They are deleted.
    Delete,
}

/// What a tenant's namespace may use, as Kubernetes quantities.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Quota {
    /// The sum of what pods request of CPU time.
    #[schemars(schema_with = "rules::quantity")]
    #[serde(rename = "requests.cpu", default, skip_serializing_if = "Option::is_none")]
    pub requests_cpu: Option<String>,
    /// The sum of what pods request of memory.
    #[schemars(schema_with = "rules::quantity")]
    #[serde(rename = "requests.memory", default, skip_serializing_if = "Option::is_none")]
    pub requests_memory: Option<String>,
    /// The sum of the pods' limits of CPU time.
    #[schemars(schema_with = "rules::quantity")]
    #[serde(rename = "limits.cpu", default, skip_serializing_if = "Option::is_none")]
    pub limits_cpu: Option<String>,
    /// The sum of the pods' limits of memory.
    #[schemars(schema_with = "rules::quantity")]
    #[serde(rename = "limits.memory", default, skip_serializing_if = "Option::is_none")]
    pub limits_memory: Option<String>,
    /// The number of pods.
    #[schemars(schema_with = "rules::count")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pods: Option<String>,
}

/// What a tenant's runtime may reach.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Network {
    /// Beyond the public internet's HTTPS.
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "atomic"))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allowed_egress: Vec<Egress>,
}

/// Addresses and TCP ports that a tenant's runtime may reach.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[x_kube(validation = rules::is_cidr(), validation = rules::no_metadata())]
#[serde(rename_all = "camelCase")]
pub struct Egress {
    /// The addresses, such as `203.0.113.0/24`.
    #[schemars(length(min = 1, max = 43))]
    pub cidr: String,
    /// The ports.
    #[schemars(
        length(min = 1, max = 16),
        extend("x-kubernetes-list-type" = "set"),
        inner(range(min = 1, max = 65_535))
    )]
    pub ports: Vec<i32>,
}
