//! What an attacker tries through objects that he can write, and what becomes of it. Those that need a pod or a user of the
//! cluster are tried where the charts are.

use reqwest::Method;
use serde_json::{Value, json};

use super::{child_path, condition, is, kind_path, message, namespace_path, plain, platform, tenant_path, until};
use crate::support::name;

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_that_is_somebody_elses_is_never_touched() {
    let platform = platform().await;
    let _shared = platform.undisturbed().await;
    let name = name("squat");
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": format!("tenant-{name}"),
        "labels": {"cloister.dev/tenant": name}, "annotations": {"cloister.dev/tenant-uid": "somebody-elses"}}});
    platform.create("/api/v1/namespaces", namespace).await.unwrap();
    let before = platform.get(&namespace_path(&name)).await.unwrap()["metadata"]["resourceVersion"].clone();
    platform.tenant(&name, json!({})).await;
    let tenant =
        platform.until(&name, "told", |tenant| is(tenant, "NamespaceReady", "False", "NamespaceForeign")).await;
    let said = message(&tenant, "NamespaceReady");
    let uid = tenant["metadata"]["uid"].as_str().unwrap();
    assert!(said.contains("Delete it") && said.contains(uid), "{said}");
    assert_eq!(tenant["status"]["namespace"], Value::Null);
    assert_eq!(platform.get(&child_path(&name, "secrets")).await, None);
    // The Tenant's end is not the namespace's.
    platform.end(&name).await;
    let after = platform.get(&namespace_path(&name)).await.expect("the namespace is there still");
    assert_eq!(
        (&after["metadata"]["resourceVersion"], &after["metadata"]["deletionTimestamp"]),
        (&before, &Value::Null)
    );
    platform.delete(&namespace_path(&name)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_is_not_moved_to_another_tenant() {
    let platform = platform().await;
    let _shared = platform.undisturbed().await;
    let (victim, thief) = (name("victim"), name("thief"));
    let before = platform.ready(&victim, json!({})).await;
    let other = platform.ready(&thief, json!({"plan": "pro"})).await;
    let path = namespace_path(&victim);
    let uid = |annotation: Value| json!({"metadata": {"annotations": {"cloister.dev/tenant-uid": annotation}}});
    for annotation in [other["metadata"]["uid"].clone(), json!("nobody"), Value::Null] {
        platform.merge(&path, uid(annotation)).await.unwrap();
        let look = async || platform.get(&path).await.unwrap()["metadata"]["annotations"].clone();
        let is_back = |it: &Value| it["cloister.dev/tenant-uid"] == before["metadata"]["uid"];
        until("the namespace is the victim's again", look, is_back).await;
    }
    platform.merge(&path, json!({"metadata": {"labels": {"cloister.dev/tenant": thief}}})).await.unwrap();
    let look = async || platform.get(&path).await.unwrap()["metadata"]["labels"]["cloister.dev/tenant"].clone();
    until("the label is the victim's again", look, |label| *label == victim).await;
    let thiefs = platform.get(&tenant_path(&thief)).await.unwrap();
    assert_eq!(thiefs["status"]["namespace"], Value::Null);
    let kept = platform.get(&tenant_path(&victim)).await.unwrap();
    assert_eq!(kept["status"]["namespace"], before["status"]["namespace"]);
    platform.end(&thief).await;
    assert!(platform.get(&path).await.is_some(), "the thief's end took the victim's namespace");
    platform.end(&victim).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_lies_in_wait_under_our_names_is_replaced_whole() {
    let platform = platform().await;
    let _shared = platform.undisturbed().await;
    let (name, clean) = (name("trap"), name("clean"));
    platform.ready(&clean, json!({})).await;
    let expected = platform.state(&clean).await;
    let namespace = |uid: &str| {
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": format!("tenant-{name}"),
            "annotations": {"cloister.dev/tenant-uid": uid}}})
    };
    platform.create("/api/v1/namespaces", namespace("nobody")).await.unwrap();
    let meta = json!({"name": "cloister-runtime", "labels": {"mine": "yes"}, "annotations": {"mine": "yes"},
        "finalizers": ["example.com/mine"]});
    let pod = json!({"hostNetwork": true, "containers": [{"name": "mine", "image": "localhost/mine:1"}]});
    let labels = json!({"app.kubernetes.io/name": "cloister-runtime", "cloister.dev/tenant": name});
    for (kind, object) in [
        ("secrets", json!({"apiVersion": "v1", "kind": "Secret", "data": {"token": "bWluZQ==", "more": "bWluZQ=="}})),
        (
            "serviceaccounts",
            json!({"apiVersion": "v1", "kind": "ServiceAccount", "imagePullSecrets": [{"name": "mine"}],
                "automountServiceAccountToken": true}),
        ),
        (
            "deployments",
            json!({"apiVersion": "apps/v1", "kind": "Deployment", "spec": {"replicas": 0,
                "selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}, "spec": pod}}}),
        ),
        (
            "networkpolicies",
            json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
                "spec": {"podSelector": {}, "policyTypes": ["Egress"], "egress": [{}]}}),
        ),
    ] {
        let mut object = object;
        object["metadata"] = meta.clone();
        platform.create(&kind_path(&name, kind), object).await.unwrap();
    }
    platform.tenant(&name, json!({})).await;
    let tenant =
        platform.until(&name, "told", |tenant| is(tenant, "NamespaceReady", "False", "NamespaceForeign")).await;
    // Its owner hands it over, as the message says.
    let uid = tenant["metadata"]["uid"].as_str().unwrap();
    let hand_over = json!({"metadata": {"annotations": {"cloister.dev/tenant-uid": uid}}});
    platform.merge(&namespace_path(&name), hand_over).await.unwrap();
    platform.phase(&name, "Ready").await;
    assert_eq!(platform.state(&name).await, expected);
    platform.end(&name).await;
    platform.end(&clean).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_in_a_spec_becomes_a_label_or_opens_more_than_it_says() {
    let platform = platform().await;
    let _shared = platform.undisturbed().await;
    let (name, clean) = (name("inject"), name("clean"));
    platform.ready(&clean, json!({})).await;
    let odd = "x\", \"pod-security.kubernetes.io/enforce\": \"privileged\n---\nkind: Namespace";
    platform.ready(&name, json!({"displayName": odd})).await;
    assert_eq!(platform.state(&name).await, platform.state(&clean).await);

    // The API server, which looks public; and a class that the platform doesn't allow.
    let endpoints =
        platform.get("/apis/discovery.k8s.io/v1/namespaces/default/endpointslices/kubernetes").await.unwrap();
    let address = endpoints["endpoints"][0]["addresses"][0].as_str().unwrap().to_owned();
    let egress = json!({"network": {"allowedEgress": [{"cidr": format!("{address}/32"), "ports": [6443]}]}});
    platform.tenant(&name, egress).await;
    let tenant =
        platform.until(&name, "refused", |tenant| is(tenant, "NetworkPoliciesApplied", "False", "EgressDenied")).await;
    assert!(message(&tenant, "NetworkPoliciesApplied").contains(&address), "{tenant}");
    let policy = platform.get(&child_path(&name, "networkpolicies")).await;
    assert_eq!(plain(&name, policy), platform.state(&clean).await["networkpolicies"]);
    platform.tenant(&name, json!({"runtime": {"priorityClassName": "system-node-critical"}})).await;
    let tenant = platform.until(&name, "refused", |tenant| is(tenant, "RuntimeAvailable", "False", "NotAllowed")).await;
    assert!(message(&tenant, "RuntimeAvailable").contains("system-node-critical"), "{tenant}");
    let pod = platform.get(&child_path(&name, "deployments")).await.unwrap()["spec"]["template"]["spec"].clone();
    assert_eq!(pod["priorityClassName"], Value::Null);
    platform.end(&name).await;
    platform.end(&clean).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pod_security_and_the_quota_refuse_pods() {
    let platform = platform().await;
    let _shared = platform.undisturbed().await;
    let name = name("pods");
    platform.ready(&name, json!({})).await;
    let pods = format!("{}/pods", namespace_path(&name));
    let pod = |name: &str, security: Value| {
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": {
            "securityContext": {"runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{"name": "a", "image": "localhost/a:1", "securityContext": security}]}})
    };
    let confined = || json!({"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}});
    for security in [json!({"privileged": true}), json!({"capabilities": {"add": ["NET_ADMIN"]}}), Value::Null] {
        let refused = platform.create(&pods, pod("privileged", security)).await.unwrap_err();
        assert!(refused.contains("violates PodSecurity \\\"restricted"), "{refused}");
    }
    // Room for the worker and one more.
    platform.create(&pods, pod("second", confined())).await.unwrap();
    let refused = platform.create(&pods, pod("third", confined())).await.unwrap_err();
    assert!(refused.contains("exceeded quota: cloister-runtime"), "{refused}");
    let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "open"},
        "spec": {"type": "NodePort", "ports": [{"port": 80}]}});
    let refused = platform.create(&format!("{}/services", namespace_path(&name)), service).await.unwrap_err();
    assert!(refused.contains("exceeded quota"), "{refused}");
    platform.end(&name).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_status_that_somebody_forges_moves_nothing() {
    let platform = platform().await;
    let _shared = platform.undisturbed().await;
    let (name, victim) = (name("forger"), name("victim"));
    let tenant = platform.ready(&name, json!({})).await;
    let other = platform.ready(&victim, json!({})).await;
    // Its own namespace forgotten, another's in its place: what is deleted then is neither.
    let status =
        json!({"status": {"namespace": other["status"]["namespace"], "tenantId": other["status"]["tenantId"]}});
    let path = format!("{}/status", tenant_path(&name));
    platform.merge(&path, status).await.unwrap();
    let same = |it: &Value| it["status"]["namespace"] == tenant["status"]["namespace"];
    let back = platform.until(&name, "the status is right again", same).await;
    assert_eq!(back["status"]["tenantId"], tenant["status"]["tenantId"]);
    platform.end(&name).await;
    platform.phase(&victim, "Ready").await;
    let kept = platform.get(&namespace_path(&victim)).await.unwrap();
    assert_eq!(kept["metadata"]["deletionTimestamp"], Value::Null);
    assert_eq!(condition(&platform.get(&tenant_path(&victim)).await.unwrap(), "Ready").0, "True");
    let gone = platform.send(Method::GET, &namespace_path(&name), None).await;
    assert!(gone.is_err(), "{gone:?}");
    platform.end(&victim).await;
}
