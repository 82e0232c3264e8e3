//! The operator's rights: what the chart grants is what it uses, by the API server's audit log. What it is not granted
//! fails every other test here.

use std::collections::BTreeSet;
use std::fs;

use futures_util::future::join_all;
use serde_json::{Value, json};

use super::{KINDS, MANAGER, child_path, namespace_path, platform};
use crate::charts::{objects, render_set};
use crate::support::name;

/// `verb group/resource`, and the name that it is held to, if it is.
type Right = (String, String, Option<String>);

fn granted(cluster: &cloister_tests::Cluster) -> BTreeSet<Right> {
    let rendered = objects(&render_set(cluster, "embedded"));
    let roles = rendered.iter().filter(|object| {
        let is_role = object["kind"] == "ClusterRole" || object["kind"] == "Role";
        is_role && object["metadata"]["name"].as_str().is_some_and(|name| name.contains("operator"))
    });
    let mut rights = BTreeSet::new();
    for rule in roles.flat_map(|role| role["rules"].as_array().unwrap()) {
        let texts = |field: &str| -> Vec<String> {
            let all = rule[field].as_array().into_iter().flatten();
            all.map(|text| text.as_str().unwrap().to_owned()).collect()
        };
        let names = texts("resourceNames");
        let names: Vec<Option<String>> =
            if names.is_empty() { vec![None] } else { names.into_iter().map(Some).collect() };
        for verb in texts("verbs") {
            for group in texts("apiGroups") {
                for resource in texts("resources") {
                    for name in &names {
                        rights.insert((verb.clone(), format!("{group}/{resource}"), name.clone()));
                    }
                }
            }
        }
    }
    rights
}

/// What the operator's account was let do: each with the name it was about.
fn used(audit: &str) -> BTreeSet<Right> {
    let mut rights = BTreeSet::new();
    let events = audit.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    for event in events.filter(|event| event["user"]["username"].as_str().is_some_and(|name| name.ends_with(MANAGER))) {
        let code = event["responseStatus"]["code"].as_i64().unwrap_or_default();
        if code == 403 {
            continue;
        }
        let object = &event["objectRef"];
        let text = |field: &str| object[field].as_str().unwrap_or_default().to_owned();
        let mut resource = format!("{}/{}", text("apiGroup"), text("resource"));
        if !text("subresource").is_empty() {
            resource = format!("{resource}/{}", text("subresource"));
        }
        let name = Some(text("name")).filter(|name| !name.is_empty());
        let verb = event["verb"].as_str().unwrap_or_default().to_owned();
        // An apply that makes an object is authorized as both.
        if verb == "patch" && code == 201 {
            rights.insert(("create".to_owned(), resource.clone(), name.clone()));
        }
        rights.insert((verb, resource, name));
    }
    rights
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_granted_is_used() {
    let platform = platform().await;
    let mut operator = platform.operator.write().await;
    // From a start to a hand-over, with one tenant whose every object is made, changed, and replaced.
    operator.restart().await;
    let name = name("rights");
    platform.ready(&name, json!({})).await;
    platform
        .tenant(
            &name,
            json!({"runtime": {"replicas": 2, "resources": {"limits": {"memory": "300Mi"}}},
        "network": {"allowedEgress": [{"cidr": "203.0.113.0/24", "ports": [8443]}]}}),
        )
        .await;
    platform.phase(&name, "Ready").await;
    let before = platform.state(&name).await;
    join_all(KINDS.iter().map(async |(kind, _)| {
        platform.merge(&child_path(&name, kind), json!({"metadata": {"labels": {"x": "y"}}})).await.unwrap();
    }))
    .await;
    let namespace = json!({"metadata": {"labels": {"cloister.dev/tenant": "x"}}});
    platform.merge(&namespace_path(&name), namespace).await.unwrap();
    super::until("it is put right", async || platform.state(&name).await, |state| *state == before).await;
    platform.end(&name).await;
    operator.terminate().await;
    operator.restart().await;
    platform.leads(&operator).await;

    let Some(log) = platform.cluster.audit_log() else { return };
    let (granted, used) = (granted(&platform.cluster), used(&fs::read_to_string(log).unwrap()));
    assert!(granted.len() > 30 && used.len() > 20, "{granted:?} {used:?}");
    let covers = |(verb, resource, name): &Right, used: &Right| {
        let is_named = name.is_none() || name == &used.2 || used.2.is_none();
        (verb, resource) == (&used.0, &used.1) && is_named
    };
    let unused: Vec<_> = granted.iter().filter(|right| !used.iter().any(|used| covers(right, used))).collect();
    assert_eq!(unused, Vec::<&Right>::new(), "granted and not used");
    let ungranted: Vec<_> = used.iter().filter(|used| !granted.iter().any(|right| covers(right, used))).collect();
    assert_eq!(ungranted, Vec::<&Right>::new(), "used and not granted");
}
