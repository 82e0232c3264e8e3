//! What Pod Security, the quota and the admission policies refuse in a tenant's namespace, in that order from within:
//! each attack is made by whoever the others let through.

use serde_json::{Value, json};

use super::platform::{BREAK_GLASS, NAME, PODS, Platform, confined_pod, eventually, merge};

const ACME: &str = "confined-acme";
const NAMESPACE: &str = "tenant-confined-acme";
const CONTROLLER: [&str; 2] =
    ["--as=system:serviceaccount:kube-system:replicaset-controller", "--as-group=system:masters"];
const ADMIN: [&str; 2] = ["--as=mallory", "--as-group=system:masters"];

fn pod(name: &str, more: Value) -> Value {
    let mut pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": confined_pod("10m")});
    merge(&mut pod["spec"], more);
    pod
}

fn container(more: Value) -> Value {
    let mut container = confined_pod("10m")["containers"][0].clone();
    merge(&mut container, more);
    json!({"containers": [container]})
}

fn open_policy() -> Value {
    json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "open", "namespace": NAMESPACE},
        "spec": {"podSelector": {}, "ingress": [{}], "egress": [{}]}})
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_adds_to_a_tenants_namespace_and_what_is_forced_in_is_confined() {
    let platform = Platform::shared().await;
    let _pods = PODS.read().await;
    let cluster = &platform.cluster;
    platform.tenant(ACME, json!({})).await;
    let refused =
        async |who: &[&str], object: &Value| platform.apply_as(who, object).await.expect_err("it is let through");
    let kubectl = async |who: &[&str], command: &str| {
        let words: Vec<&str> = ["--namespace", NAMESPACE].into_iter().chain(command.split(' ')).collect();
        cluster.try_kubectl(&[who, &words].concat()).await
    };

    // ── Pod Security, for those whom the admission policies let through ──
    let host_path = json!({"volumes": [{"name": "host", "hostPath": {"path": "/"}}]});
    for (more, what) in [
        (container(json!({"securityContext": {"privileged": true, "allowPrivilegeEscalation": true}})), "privileged"),
        (container(json!({"securityContext": {"capabilities": {"add": ["SYS_ADMIN"]}}})), "unrestricted capabilities"),
        (json!({"securityContext": {"runAsNonRoot": null, "runAsUser": 0}}), "runAsNonRoot"),
        (json!({"hostNetwork": true}), "host namespaces"),
        (json!({"hostPID": true}), "host namespaces"),
        (host_path, "hostPath"),
    ] {
        for who in [&BREAK_GLASS[..], &CONTROLLER] {
            let error = refused(who, &pod("eve", more.clone())).await;
            assert!(error.contains("violates PodSecurity") && error.contains(what), "{what}: {error}");
        }
    }

    // ── The quota, which has room for one worker and another that takes its place ──
    let error = refused(&BREAK_GLASS, &pod("big", confined_pod("500m"))).await;
    assert!(error.contains(&format!("exceeded quota: {NAME}")) && error.contains("requests.cpu"), "{error}");
    platform.apply_as(&BREAK_GLASS, &pod("small", json!({}))).await.expect("the quota has room for a second pod");
    let error = refused(&CONTROLLER, &pod("third", json!({}))).await;
    assert!(error.contains(&format!("exceeded quota: {NAME}")) && error.contains("pods=1"), "{error}");
    kubectl(&ADMIN, "delete pod small").await.expect("pods may be deleted");

    // ── The admission policies, for a cluster's admin ──
    let by_policy = |what: &str, result: Result<String, String>| {
        let error = result.err().unwrap_or_else(|| panic!("{what}: it is let through"));
        assert!(error.contains("ValidatingAdmissionPolicy") && error.contains("mallory"), "{what}: {error}");
    };
    by_policy("a pod of his own", platform.apply_as(&ADMIN, &pod("own", json!({}))).await);
    by_policy("a second policy", platform.apply_as(&ADMIN, &open_policy()).await);
    for attack in [
        "label namespace tenant-confined-acme pod-security.kubernetes.io/enforce=privileged --overwrite",
        "label namespace tenant-confined-acme cloister.dev/tenant-",
        "annotate namespace tenant-confined-acme cloister.dev/tenant-uid=another --overwrite",
        "delete namespace tenant-confined-acme",
        "patch resourcequota cloister-runtime --type=merge --patch {\"spec\":{\"hard\":{\"pods\":\"99\"}}}",
        "delete resourcequota cloister-runtime",
        "delete networkpolicy cloister-runtime",
        "set env deployment/cloister-runtime CLOISTER_RUNTIME__API_URL=http://elsewhere",
        "scale deployment cloister-runtime --replicas=0",
        "create rolebinding eve --clusterrole=admin --user=eve",
        "patch secret cloister-runtime --type=merge --patch {\"data\":{\"token\":\"\"}}",
        "create serviceaccount eve",
    ] {
        by_policy(attack, kubectl(&ADMIN, attack).await);
    }

    // ── The break-glass group may, is told of, and is put right where the object is the operator's ──
    platform.apply_as(&BREAK_GLASS, &open_policy()).await.expect("in an emergency");
    let condition = r#"{.status.conditions[?(@.type=="NetworkPoliciesApplied")].reason}"#;
    let reason = async || platform.field(&["tenant", ACME], condition).await;
    eventually("the foreign policy shows", async || reason().await == "ForeignPolicy").await;
    kubectl(&BREAK_GLASS, "delete networkpolicy open").await.expect("in an emergency");
    eventually("it shows no more", async || reason().await == "Applied").await;
    let pods = async || platform.field(&["resourcequota", NAME, "--namespace", NAMESPACE], "{.spec.hard.pods}").await;
    let before = pods().await;
    let raise = "patch resourcequota cloister-runtime --type=merge --patch {\"spec\":{\"hard\":{\"pods\":\"99\"}}}";
    kubectl(&BREAK_GLASS, raise).await.expect("in an emergency");
    eventually("the quota is as it was", async || pods().await == before).await;
    platform.delete_tenant(ACME).await;
}
