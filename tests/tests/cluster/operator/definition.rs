//! The resource's definition on a real API server: what can't work is refused with a sentence that names the field and the
//! remedy.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::{platform, tenant_path};
use crate::support::name;

#[tokio::test(flavor = "multi_thread")]
async fn the_examples_are_taken_as_they_stand() {
    let platform = platform().await;
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crds/examples");
    let mut count = 0;
    for example in fs::read_dir(folder).unwrap() {
        let path = example.unwrap().path();
        let path = path.to_str().unwrap();
        platform.cluster.kubectl(&["apply", "--server-side", "--dry-run=server", "--filename", path]).await;
        count += 1;
    }
    assert_eq!(count, 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_spec_that_can_not_work_is_refused_with_the_field_and_the_remedy() {
    let platform = platform().await;
    let pro = |more: Value| {
        let mut spec = json!({"plan": "pro"});
        spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        spec
    };
    let runtime = |runtime: Value| json!({"runtime": runtime});
    let quota = |quota: Value| json!({"quota": quota});
    let egress = |cidr: &str| json!({"network": {"allowedEgress": [{"cidr": cidr, "ports": [443]}]}});
    let metadata = ["spec.network.allowedEgress", "without them"];
    for (spec, words) in [
        (json!({"plan": "gold"}), vec!["spec.plan", "\"free\", \"pro\", \"enterprise\""]),
        (json!({"email": "nobody"}), vec!["spec.email"]),
        (json!({"displayName": "  "}), vec!["spec.displayName"]),
        (json!({"monthlyTokenLimit": -1}), vec!["spec.monthlyTokenLimit", "greater than or equal to 0"]),
        (json!({"tenantId": "acme"}), vec!["spec.tenantId"]),
        (pro(runtime(json!({"replicas": 2}))), vec!["spec.runtime is for spec.plan enterprise only", "Remove it"]),
        (pro(quota(json!({"pods": "4"}))), vec!["spec.quota is for spec.plan enterprise only"]),
        (pro(egress("203.0.113.0/24")), vec!["spec.network is for spec.plan enterprise only"]),
        (
            runtime(json!({"replicas": 2, "autoscaling":
                {"minReplicas": 1, "maxReplicas": 2, "targetRunsPerReplica": 5}})),
            vec!["spec.runtime.replicas and spec.runtime.autoscaling exclude each other", "Remove one"],
        ),
        (
            runtime(json!({"autoscaling": {"minReplicas": 3, "maxReplicas": 2, "targetRunsPerReplica": 5}})),
            vec!["minReplicas must not exceed maxReplicas"],
        ),
        (runtime(json!({"replicas": 0})), vec!["spec.runtime.replicas", "greater than or equal to 1"]),
        (
            runtime(json!({"resources": {"requests": {"cpu": "2"}}})),
            vec!["spec.runtime.resources.requests.cpu", "must not exceed limits.cpu", "raise the limit"],
        ),
        (
            runtime(json!({"resources": {"requests": {"memory": "8Mi"}, "limits": {"memory": "8Mi"}}})),
            vec!["limits.memory is too little for a worker to start", "32Mi"],
        ),
        (runtime(json!({"tolerations": [{"key": "a", "operator": "Exists", "value": "b"}]})), vec!["Equal only"]),
        (runtime(json!({"nodeSelector": {"a/b/c": "d"}})), vec!["each key must be a label's"]),
        (
            json!({"runtime": {"replicas": 3}, "quota": {"requests.cpu": "900m"}}),
            vec!["spec.quota['requests.cpu'] must hold the runtime's replicas", "Raise the quota"],
        ),
        (json!({"runtime": {"replicas": 3}, "quota": {"pods": "3"}}), vec!["spec.quota.pods", "Raise it"]),
        (quota(json!({"limits.memory": "lots"})), vec!["limits.memory"]),
        (quota(json!({"requests.cpu": "0"})), vec!["must be a quantity above 0"]),
        (egress("203.0.113.1/24"), vec!["cidr must be a network in CIDR notation"]),
        (egress("example.com"), vec!["cidr must be a network in CIDR notation"]),
        (egress("169.254.169.254/32"), metadata.to_vec()),
        (egress("0.0.0.0/0"), metadata.to_vec()),
        (egress("169.254.1.0/24"), metadata.to_vec()),
        (egress("fd00:ec2::/32"), metadata.to_vec()),
        (egress("64:ff9b::a9fe:a9fe/128"), metadata.to_vec()),
        (
            json!({"network": {"allowedEgress": [{"cidr": "203.0.113.0/24", "ports": [0]}]}}),
            vec!["ports", "greater than or equal to 1"],
        ),
    ] {
        let refused = platform.try_tenant(&name("bad"), spec.clone()).await.expect_err(&spec.to_string());
        for word in words {
            let word = word.replace('"', "\\\"");
            assert!(refused.contains(&word), "{spec}: {word:?} is not in {refused}");
        }
    }
    for bad in ["Upper", "1st", "dot.ted", &"a".repeat(55)] {
        let refused = platform.try_tenant(bad, json!({"email": "a@b.example"})).await.expect_err(bad);
        assert!(refused.contains("metadata.name") || refused.contains("Invalid value"), "{refused}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_registered_keeps_email_and_id() {
    let platform = platform().await;
    let _shared = platform.undisturbed().await;
    let name = name("fixed");
    let tenant = platform.ready(&name, json!({"plan": "free"})).await;
    let id = tenant["status"]["tenantId"].as_str().unwrap();
    for (spec, words) in [
        (json!({"plan": "free", "email": "b@b.example"}), "spec.email is fixed once the tenant is registered"),
        (json!({"plan": "free", "tenantId": "ten_00000000000000000000000000"}), "spec.tenantId is fixed once"),
    ] {
        let refused = platform.try_tenant(&name, spec).await.unwrap_err();
        assert!(refused.contains(words) && refused.contains("Set it back"), "{refused}");
    }
    // What the status says may be written down, and stays then.
    platform.tenant(&name, json!({"plan": "free", "tenantId": id})).await;
    let refused = platform.try_tenant(&name, json!({"plan": "free"})).await.unwrap_err();
    assert!(refused.contains("spec.tenantId is fixed"), "{refused}");
    platform.end(&name).await;
    assert_eq!(platform.get(&tenant_path(&name)).await, None);
}
