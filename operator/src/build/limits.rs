//! What a tenant's namespace may use.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{LimitRange, LimitRangeItem, LimitRangeSpec, ResourceQuota, ResourceQuotaSpec};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::build_metadata;
use crate::wanted::{Amount, Wanted};

/// Objects that a tenant's namespace has no use for, and few of those that it has.
const OBJECTS: [(&str, &str); 9] = [
    // The runtime's own, and room for what others must put in every namespace.
    ("secrets", "5"),
    // kube-root-ca.crt, and room for the like.
    ("configmaps", "5"),
    ("services", "0"),
    ("services.nodeports", "0"),
    ("services.loadbalancers", "0"),
    ("persistentvolumeclaims", "0"),
    ("replicationcontrollers", "0"),
    ("count/statefulsets.apps", "0"),
    ("count/jobs.batch", "0"),
];

/// The sum of what may be there.
pub fn build_resource_quota(wanted: &Wanted) -> ResourceQuota {
    let mut hard: BTreeMap<String, Quantity> =
        OBJECTS.iter().map(|(name, count)| ((*name).to_owned(), Quantity((*count).to_owned()))).collect();
    hard.extend(wanted.quota.iter().map(|(name, amount)| ((*name).to_owned(), (*amount).into())));
    ResourceQuota {
        metadata: build_metadata(wanted),
        spec: Some(ResourceQuotaSpec { hard: Some(hard), ..ResourceQuotaSpec::default() }),
        ..ResourceQuota::default()
    }
}

/// What a container gets that doesn't say: as much as a worker.
pub fn build_limit_range(wanted: &Wanted) -> LimitRange {
    let item = LimitRangeItem {
        type_: "Container".to_owned(),
        default: Some(build_amount(wanted.limits)),
        default_request: Some(build_amount(wanted.requests)),
        ..LimitRangeItem::default()
    };
    LimitRange { metadata: build_metadata(wanted), spec: Some(LimitRangeSpec { limits: vec![item] }) }
}

/// CPU time and memory as a resource list.
pub fn build_amount(amount: Amount) -> BTreeMap<String, Quantity> {
    BTreeMap::from([("cpu".to_owned(), amount.cpu.into()), ("memory".to_owned(), amount.memory.into())])
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::wanted::samples::wanted;

    #[test]
    fn a_quota_opens_no_port_of_a_node() {
        let hard = build_resource_quota(&wanted(json!({}))).spec.unwrap().hard.unwrap();
        assert_eq!(hard["services.nodeports"].0, "0");
        assert_eq!(hard["services.loadbalancers"].0, "0");
        assert_eq!(hard["pods"].0, "2");
        assert_eq!(hard["requests.cpu"].0, "500m");
    }
}
