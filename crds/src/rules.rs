//! What the API server itself checks of an object: CEL rules, each with a message that names the field and the remedy,
//! and schemas that several fields share. Each rule was tried on a 1.36 API server.

use kube::core::Rule;
use schemars::{Schema, SchemaGenerator, json_schema};

use crate::runtime::{DEFAULT_LIMITS, DEFAULT_REPLICAS, DEFAULT_REQUESTS};

/// 54 characters and a prefix of `tenant-` fit into a namespace's name.
pub fn name() -> Rule {
    Rule::new("size(self.metadata.name) <= 54 && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')").message(
        "metadata.name must be at most 54 lower-case letters, digits and hyphens, begin with a letter and end with a \
         letter or digit: it becomes part of a namespace's name. Choose a shorter or simpler name and put the full one \
         into spec.displayName.",
    )
}

/// Who is registered is told by the status. A rule at the field itself would miss its removal.
pub fn email_is_fixed() -> Rule {
    Rule::new("!has(oldSelf.status) || !has(oldSelf.status.tenantId) || self.spec.email == oldSelf.spec.email")
        .message(
            "spec.email is fixed once the tenant is registered. Set it back; another address needs another Tenant.",
        )
        .field_path(".spec.email")
}

/// The same for the tenant's id, which may still be written down once it is known.
pub fn tenant_id_is_fixed() -> Rule {
    Rule::new(
        "!has(oldSelf.status) || !has(oldSelf.status.tenantId) || (has(self.spec.tenantId) ? self.spec.tenantId == \
         (has(oldSelf.spec.tenantId) ? oldSelf.spec.tenantId : oldSelf.status.tenantId) : !has(oldSelf.spec.tenantId))",
    )
    .message(
        "spec.tenantId is fixed once the tenant is registered. Set it back; another tenant is taken over by another Tenant.",
    )
}

/// A field that the shared pool has no use for.
pub fn enterprise_only(field: &str) -> Rule {
    Rule::new(format!("self.plan == 'enterprise' || !has(self.{field})"))
        .message(&*format!("spec.{field} is for spec.plan enterprise only. Remove it, or change the plan."))
        .field_path(format!(".{field}"))
}

/// The value of a field that may be missing at any level, or else `default`. Not in CEL's words for optional values:
/// their cost is estimated as if they had no bound, and the API server refuses the definition.
fn or_else(path: &str, default: &str) -> String {
    let fields = path.split('.').scan("self".to_owned(), |at, field| {
        *at = format!("{at}.{field}");
        Some(at.clone())
    });
    let there: Vec<String> = fields.map(|field| format!("has({field})")).collect();
    format!("({} ? self.{path} : {default})", there.join(" && "))
}

fn max_replicas() -> String {
    or_else("runtime.autoscaling.maxReplicas", &or_else("runtime.replicas", &DEFAULT_REPLICAS.to_string()))
}

/// The quota holds every worker that is wanted, and the one more that takes another's place in a rollout.
pub fn quota_holds(resource: &str) -> Rule {
    let (kind, of) = resource.split_once('.').unwrap_or((resource, ""));
    let [cpu, memory] = if kind == "requests" { DEFAULT_REQUESTS } else { DEFAULT_LIMITS };
    let default = if of == "cpu" { cpu } else { memory };
    let field = format!("{kind}__dot__{of}");
    let replicas = max_replicas();
    let each = or_else(&format!("runtime.resources.{kind}.{of}"), &format!("'{default}'"));
    // The factor forgives what floating point makes of 3 * 0.1.
    let rule = format!(
        "!has(self.quota) || !has(self.quota.{field}) || quantity(self.quota.{field}).asApproximateFloat() >= \
         double({replicas} + 1) * quantity({each}).asApproximateFloat() * 0.999999"
    );
    Rule::new(rule)
        .message(&*format!(
            "spec.quota['{resource}'] must hold the runtime's replicas (autoscaling: maxReplicas) and one more, for a \
             rollout, times its resources.{kind}.{of} ({default} unless set). Raise the quota, or lower the others."
        ))
        .field_path(".quota")
}

/// The same for the number of pods.
pub fn quota_holds_pods() -> Rule {
    let replicas = max_replicas();
    let rule = format!("!has(self.quota) || !has(self.quota.pods) || int(self.quota.pods) > {replicas}");
    Rule::new(rule)
        .message(
            "spec.quota.pods must hold the runtime's replicas (autoscaling: maxReplicas) and one more, for a rollout. \
             Raise it, or lower the replicas.",
        )
        .field_path(".quota")
}

/// Replicas are set, or follow the runs.
pub fn one_way_to_scale() -> Rule {
    Rule::new("!(has(self.replicas) && has(self.autoscaling))")
        .message("spec.runtime.replicas and spec.runtime.autoscaling exclude each other. Remove one of them.")
}

/// There is a number between the smallest and the largest.
pub fn min_up_to_max() -> Rule {
    Rule::new("self.minReplicas <= self.maxReplicas").message(
        "spec.runtime.autoscaling.minReplicas must not exceed maxReplicas. Lower minReplicas, or raise maxReplicas.",
    )
}

/// Kubernetes refuses pods that request more than they may use.
pub fn limit_covers_request(of: &str) -> Rule {
    let index = usize::from(of == "memory");
    let request = or_else(&format!("requests.{of}"), &format!("'{}'", DEFAULT_REQUESTS[index]));
    let limit = or_else(&format!("limits.{of}"), &format!("'{}'", DEFAULT_LIMITS[index]));
    Rule::new(format!("quantity({request}).compareTo(quantity({limit})) <= 0")).message(&*format!(
        "spec.runtime.resources.requests.{of} ({} unless set) must not exceed limits.{of} ({} unless set). Lower the \
         request, or raise the limit.",
        DEFAULT_REQUESTS[index], DEFAULT_LIMITS[index]
    ))
}

/// Less is not enough for a worker to start, or to answer its probes.
pub fn limit_suffices(of: &str) -> Rule {
    let (least, index) = if of == "memory" { ("32Mi", 1) } else { ("10m", 0) };
    let limit = or_else(&format!("limits.{of}"), &format!("'{}'", DEFAULT_LIMITS[index]));
    Rule::new(format!("quantity({limit}).compareTo(quantity('{least}')) >= 0")).message(&*format!(
        "spec.runtime.resources.limits.{of} is too little for a worker to start. Make it {least} at least."
    ))
}

/// A value is compared by `Equal` only.
pub fn toleration() -> Rule {
    Rule::new("!has(self.value) || self.value == '' || !has(self.operator) || self.operator == 'Equal'").message(
        "spec.runtime.tolerations: a value goes with the operator Equal only. Remove the value, or set operator: Equal.",
    )
}

/// The API server's own notion of a CIDR.
pub fn is_cidr() -> Rule {
    Rule::new("isCIDR(self.cidr) && cidr(self.cidr) == cidr(self.cidr).masked()")
        .message(
            "spec.network.allowedEgress: cidr must be a network in CIDR notation, such as 203.0.113.0/24, with no bits set \
             beyond its length.",
        )
        .field_path(".cidr")
}

/// Addresses on which clouds answer with a node's credentials, link-local as a whole among them.
pub fn no_metadata() -> Rule {
    let contains = ["169.254.169.254", "168.63.129.16", "100.100.100.200", "fd00:ec2::254", "fd20:ce::254", "fe80::1"]
        .map(|address| format!("!cidr(self.cidr).containsIP('{address}')"))
        .join(" && ");
    let lies_in = ["169.254.0.0/16", "fe80::/10", "64:ff9b::/96", "2002::/16"]
        .map(|net| format!("!cidr('{net}').containsCIDR(self.cidr)"))
        .join(" && ");
    Rule::new(format!("!isCIDR(self.cidr) || ({contains} && {lies_in})"))
        .message(
            "spec.network.allowedEgress: cidr must not hold the addresses of cloud metadata (169.254.169.254 and its like), \
             link-local or translated ones. Name the networks that the tenant needs, without them.",
        )
        .field_path(".cidr")
}

/// A positive quantity, as Kubernetes writes it: thousandths at the finest.
pub fn quantity(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "string",
        "minLength": 1,
        "maxLength": 20,
        "pattern": r"^([0-9]{1,15}m|[0-9]{1,15}(\.[0-9]{1,3})?(k|M|G|T|Ki|Mi|Gi|Ti)?)$",
        "x-kubernetes-validations": [{
            "rule": "!isQuantity(self) || (quantity(self).isGreaterThan(quantity('0')) && \
                     quantity(self).compareTo(quantity('1Pi')) <= 0)",
            "message": "must be a quantity above 0 and up to 1Pi, such as 250m or 128Mi",
        }],
    })
}

/// A count, as Kubernetes writes it in quotas.
pub fn count(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "string", "minLength": 1, "maxLength": 6, "pattern": "^[0-9]+$" })
}

/// The name of a cluster-wide object.
pub fn name_of_object(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "string", "minLength": 1, "maxLength": 253, "pattern": "^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$" })
}

/// Labels of nodes.
pub fn labels(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "maxProperties": 16,
        "additionalProperties": {
            "type": "string",
            "maxLength": 63,
            "pattern": r"^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$",
        },
        "x-kubernetes-validations": [{
            "rule": "self.all(key, size(key) <= 317 && \
                     key.matches('^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$'))",
            "message": "each key must be a label's: letters, digits, '-', '_' and '.', with an optional DNS prefix and '/'",
        }],
    })
}
