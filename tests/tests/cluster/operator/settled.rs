//! Nothing is written for tenants that are as they should be.

use std::time::Duration;

use futures_util::future::join_all;
use serde_json::json;
use tokio::time::sleep;

use super::{child_path, platform, until};
use crate::support::name;

#[tokio::test(flavor = "multi_thread")]
async fn settled_tenants_cause_no_write_and_one_change_causes_one() {
    let platform = platform().await;
    let mut operator = platform.operator.write().await;
    let specs = [
        json!({"plan": "free"}),
        json!({"plan": "pro", "monthlyTokenLimit": 1_000_000}),
        json!({}),
        json!({"runtime": {"replicas": 2, "resources": {"requests": {"cpu": "0.25", "memory": "0.125Gi"}}}}),
        json!({"runtime": {"autoscaling": {"minReplicas": 1, "maxReplicas": 3, "targetRunsPerReplica": 5}}}),
        json!({"quota": {"requests.cpu": "4000m", "limits.memory": "1024Mi"}}),
        json!({
            "runtime": {
                "replicas": 1, "nodeSelector": {"kubernetes.io/os": "linux"},
                "tolerations": [{"key": "a", "operator": "Exists"}, {"key": "b", "value": "c", "effect": "NoSchedule"}],
            },
            "network": {"allowedEgress": [{"cidr": "203.0.113.0/24", "ports": [8443, 443]},
                {"cidr": "2001:db8::/32", "ports": [443]}]},
        }),
    ];
    let names: Vec<String> = specs.iter().map(|_| name("settled")).collect();
    join_all(names.iter().zip(specs).map(|(name, spec)| platform.ready(name, spec))).await;

    let watch = || names.iter().map(|name| platform.gate.watch(name, None)).collect::<Vec<_>>();
    // Usage and what the watches bring late may take another look.
    let quiet = async || {
        let watched = watch();
        sleep(Duration::from_secs(2)).await;
        watched.iter().all(|watched| watched.seen().is_empty())
    };
    until("all is settled", quiet, |quiet| *quiet).await;
    let watched = watch();
    operator.terminate().await;
    operator.restart().await;
    platform.leads(&operator).await;
    sleep(Duration::from_secs(3)).await;
    for (name, watched) in names.iter().zip(&watched) {
        assert_eq!(watched.seen(), Vec::<String>::new(), "{name}");
    }

    let before = platform.state(&names[3]).await;
    let path = child_path(&names[3], "networkpolicies");
    platform.merge(&path, json!({"spec": {"egress": []}})).await.unwrap();
    until("it is put right", async || platform.state(&names[3]).await, |state| *state == before).await;
    sleep(Duration::from_secs(1)).await;
    let writes: Vec<_> = watched.iter().flat_map(|watched| watched.seen()).collect();
    assert_eq!(writes, [format!("PATCH {path}")]);
    join_all(names.iter().map(|name| platform.end(name))).await;
}
