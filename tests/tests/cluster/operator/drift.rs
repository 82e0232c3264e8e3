//! Whatever somebody does to what the operator made is put right, soon, and whether the api is there or not.

use std::time::Duration;

use futures_util::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{KINDS, Platform, child_path, condition, is, kind_path, message, namespace_path, platform};
use crate::support::name;

/// The design's promise, and what a machine that does much else at the same time adds.
const SOON: Duration = Duration::from_secs(5);

/// What is done to a tenant's objects: by merging, or under a field manager of its own.
enum Spoil {
    Merge(&'static str, Value),
    Apply(&'static str, Value),
    Delete(&'static str),
}

/// Each kind is deleted, changed, and added to.
fn spoils() -> Vec<Spoil> {
    let mut all: Vec<_> = KINDS.iter().map(|(kind, _)| Spoil::Delete(kind)).collect();
    let label = || json!({"metadata": {"labels": {"somebody": "else"}}});
    all.extend(KINDS.iter().map(|(kind, _)| Spoil::Merge(kind, label())));
    all.extend(KINDS.iter().map(|(kind, _)| Spoil::Apply(kind, json!({"metadata": {"annotations": {"a": "b"}}}))));
    let none = |kind: &'static str| Spoil::Merge(kind, json!({"metadata": {"labels": null}}));
    all.extend(KINDS.iter().map(|(kind, _)| none(kind)));
    let pod = |pod: Value| json!({"spec": {"template": {"spec": pod}}});
    let extra = json!({"name": "miner", "image": "localhost/miner:1"});
    all.extend([
        Spoil::Merge("resourcequotas", json!({"spec": {"hard": {"pods": "1000"}}})),
        Spoil::Apply("resourcequotas", json!({"spec": {"hard": {"count/ingresses.networking.k8s.io": "9"}}})),
        Spoil::Merge("limitranges", json!({"spec": {"limits": []}})),
        Spoil::Merge("serviceaccounts", json!({"automountServiceAccountToken": true})),
        Spoil::Apply("serviceaccounts", json!({"imagePullSecrets": [{"name": "mine"}]})),
        Spoil::Merge("networkpolicies", json!({"spec": {"egress": [{}]}})),
        Spoil::Merge("networkpolicies", json!({"spec": {"ingress": [{}]}})),
        Spoil::Merge("networkpolicies", json!({"spec": {"podSelector": {"matchLabels": {"no": "pod"}}}})),
        Spoil::Merge("poddisruptionbudgets", json!({"spec": {"maxUnavailable": 0}})),
        Spoil::Merge("deployments", json!({"spec": {"replicas": 0}})),
        Spoil::Merge("deployments", json!({"spec": {"paused": true}})),
        Spoil::Merge("deployments", pod(json!({"containers": [{"name": "runtime", "image": "localhost/other:1"}]}))),
        Spoil::Apply("deployments", pod(json!({"hostNetwork": true, "hostPID": true}))),
        Spoil::Apply("deployments", pod(json!({"containers": [extra]}))),
        Spoil::Apply("deployments", pod(json!({"automountServiceAccountToken": true}))),
        Spoil::Merge("secrets", json!({"data": {"more": "bW9yZQ=="}})),
        Spoil::Merge("secrets", json!({"metadata": {"annotations": {"cloister.dev/rotation": null}}})),
    ]);
    all
}

async fn spoil(platform: &Platform, name: &str, spoil: &Spoil) {
    match spoil {
        Spoil::Delete(kind) => platform.delete(&child_path(name, kind)).await,
        Spoil::Merge(kind, patch) => drop(platform.merge(&child_path(name, kind), patch.clone()).await.unwrap()),
        Spoil::Apply(kind, fields) => {
            let path = child_path(name, kind);
            let object = platform.get(&path).await.expect("the object");
            let mut applied = fields.clone();
            for field in ["apiVersion", "kind"] {
                applied[field] = object[field].clone();
            }
            applied["metadata"]["name"] = json!("cloister-runtime");
            let path = format!("{path}?fieldManager=intruder&force=true");
            platform.send(Method::PATCH, &path, Some(("application/apply-patch+yaml", applied))).await.unwrap();
        }
    }
}

/// Spoils a tenant in one way after the other; each is put right in time.
async fn put_right(platform: &Platform, spoils: &[Spoil]) {
    let name = name("drift");
    platform.ready(&name, json!({"runtime": {"replicas": 1}})).await;
    let before = platform.state(&name).await;
    for each in spoils {
        let version = async || match each {
            Spoil::Delete(kind) | Spoil::Merge(kind, _) | Spoil::Apply(kind, _) => {
                platform.get(&child_path(&name, kind)).await.map(|object| object["metadata"]["resourceVersion"].clone())
            }
        };
        let first = version().await;
        spoil(platform, &name, each).await;
        let begun = Instant::now();
        let after = loop {
            let after = platform.state(&name).await;
            if after == before && version().await != first {
                break None;
            }
            if begun.elapsed() >= SOON {
                break Some(after);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        };
        if let Some(after) = after {
            let what = match each {
                Spoil::Delete(kind) => format!("{kind} deleted"),
                Spoil::Merge(kind, patch) => format!("{kind} merged {patch}"),
                Spoil::Apply(kind, fields) => format!("{kind} applied {fields}"),
            };
            panic!("{what}: not put right in {SOON:?}:\n{after:#}\nshould be\n{before:#}");
        }
    }
    platform.end(&name).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_change_to_a_child_is_put_right() {
    let platform = platform().await;
    let _shared = platform.undisturbed().await;
    let spoils = spoils();
    join_all(spoils.chunks(spoils.len().div_ceil(3)).map(|some| put_right(platform, some))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_the_api_away_too() {
    let platform = platform().await;
    let _alone = platform.operator.write().await;
    let name = name("away");
    platform.ready(&name, json!({})).await;
    platform.way.refuse();
    platform.until(&name, "the api is missed", |tenant| condition(tenant, "Registered").0 == "True").await;
    // What needs the api is the token: a new one can't be had.
    let spoils: Vec<_> = spoils()
        .into_iter()
        .filter(|spoil| {
            !matches!(spoil, Spoil::Delete("secrets") | Spoil::Merge("secrets", _) | Spoil::Apply("secrets", _))
        })
        .filter(|spoil| !matches!(spoil, Spoil::Apply(_, fields) if fields["metadata"].is_object()))
        .collect();
    let before = platform.state(&name).await;
    for each in &spoils {
        spoil(platform, &name, each).await;
    }
    let begun = Instant::now();
    while platform.state(&name).await != before {
        assert!(begun.elapsed() < 2 * SOON, "{:#}\nshould be\n{before:#}", platform.state(&name).await);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    platform.way.restore();
    platform.phase(&name, "Ready").await;
    platform.end(&name).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_namespaces_labels_come_back_and_others_stay() {
    let platform = platform().await;
    let _shared = platform.undisturbed().await;
    let name = name("labels");
    platform.ready(&name, json!({})).await;
    let path = namespace_path(&name);
    let before = platform.get(&path).await.unwrap()["metadata"]["labels"].clone();
    for labels in [
        json!({"pod-security.kubernetes.io/enforce": "privileged"}),
        json!({"pod-security.kubernetes.io/enforce": null, "pod-security.kubernetes.io/warn-version": "v1.20"}),
        json!({"cloister.dev/tenant": "another"}),
        json!({"cloister.dev/more": "x", "app.kubernetes.io/managed-by": null}),
    ] {
        platform.merge(&path, json!({"metadata": {"labels": labels}})).await.unwrap();
        let look = async || platform.get(&path).await.unwrap()["metadata"]["labels"].clone();
        super::until("the labels are back", look, |labels| *labels == before).await;
    }
    // A cluster's own tools label namespaces, too.
    platform.merge(&path, json!({"metadata": {"labels": {"cost-centre": "42"}}})).await.unwrap();
    platform.merge(&path, json!({"metadata": {"labels": {"cloister.dev/tenant": null}}})).await.unwrap();
    let look = async || platform.get(&path).await.unwrap()["metadata"]["labels"].clone();
    let back = super::until("the label is back", look, |labels| labels["cloister.dev/tenant"] == name).await;
    assert_eq!(back["cost-centre"], "42");
    platform.end(&name).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_is_not_ours_shows_and_stays() {
    let platform = platform().await;
    let _shared = platform.undisturbed().await;
    let name = name("policy");
    platform.ready(&name, json!({})).await;
    let policies = kind_path(&name, "networkpolicies");
    let open = json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "allow-all"},
        "spec": {"podSelector": {}, "policyTypes": ["Egress"], "egress": [{}]}});
    platform.create(&policies, open).await.unwrap();
    let tenant =
        platform.until(&name, "shown", |tenant| is(tenant, "NetworkPoliciesApplied", "False", "ForeignPolicy")).await;
    assert_eq!((&tenant["status"]["phase"], condition(&tenant, "Ready").0.as_str()), (&json!("Degraded"), "False"));
    let said = message(&tenant, "NetworkPoliciesApplied");
    assert!(said.contains("allow-all") && said.contains("Delete it"), "{said}");
    platform.delete(&format!("{policies}/allow-all")).await;
    platform.phase(&name, "Ready").await;
    platform.end(&name).await;
}
