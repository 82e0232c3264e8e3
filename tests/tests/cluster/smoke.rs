//! The cluster itself is what it claims to be, so that a later test's refusal means what it says.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::time::Instant;

use cloister_tests::cluster::{PROBE_IMAGE, PUBLIC_API, build_image};
use cloister_tests::{Cluster, PATIENCE};

/// A pod that Pod Security's `restricted` admits, serving on port 8080.
fn restricted_pod(namespace: &str, name: &str, image: &str) -> String {
    format!(
        r#"{{
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {{"namespace": "{namespace}", "name": "{name}", "labels": {{"app": "{name}"}}}},
            "spec": {{
                "securityContext": {{"runAsNonRoot": true, "seccompProfile": {{"type": "RuntimeDefault"}}}},
                "containers": [{{
                    "name": "probe", "image": "{image}", "imagePullPolicy": "Never",
                    "securityContext": {{"allowPrivilegeEscalation": false, "capabilities": {{"drop": ["ALL"]}}}},
                    "readinessProbe": {{"httpGet": {{"path": "/", "port": 8080}}, "periodSeconds": 1}}
                }}]
            }}
        }}"#
    )
}

async fn restricted_namespace(cluster: &Cluster, name: &str) {
    cluster.kubectl(&["create", "namespace", name]).await;
    cluster.kubectl(&["label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted"]).await;
}

/// It takes a while, for which no test needs to wait.
async fn remove_namespace(cluster: &Cluster, name: &str) {
    cluster.kubectl(&["delete", "namespace", name, "--wait=false"]).await;
}

async fn ready(cluster: &Cluster, namespace: &str) {
    cluster
        .kubectl(&["wait", "--namespace", namespace, "--for=condition=Ready", "pod", "--all", "--timeout=60s"])
        .await;
}

async fn address_of(cluster: &Cluster, namespace: &str, pod: &str) -> String {
    cluster.kubectl(&["get", "pod", pod, "--namespace", namespace, "--output", "jsonpath={.status.podIP}"]).await
}

/// Asks until the answer is the one that is waited for: a policy takes a moment to be enforced.
async fn until_reached(cluster: &Cluster, namespace: &str, pod: &str, address: &str, reached: bool) {
    let begun = Instant::now();
    loop {
        let answer = cluster.probe_from(namespace, pod, &["tcp", address]).await;
        if answer.is_ok() == reached {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "{pod} reaches {address}: {answer:?}, and not {reached}");
    }
}

#[tokio::test]
async fn restricted_pods_run_and_a_policy_bites_both_ways() {
    let cluster = Cluster::shared().await;
    let (a, b) = ("smoke-a", "smoke-b");
    for (namespace, pod) in [(a, "alice"), (b, "bob")] {
        restricted_namespace(cluster, namespace).await;
        cluster.apply(&restricted_pod(namespace, pod, PROBE_IMAGE)).await.unwrap();
    }
    let privileged = restricted_pod(a, "mallory", PROBE_IMAGE).replace("\"runAsNonRoot\": true", "\"runAsUser\": 0");
    assert!(cluster.apply(&privileged).await.unwrap_err().contains("PodSecurity"));
    ready(cluster, a).await;
    ready(cluster, b).await;
    let alice = format!("{}:8080", address_of(cluster, a, "alice").await);
    let bob = format!("{}:8080", address_of(cluster, b, "bob").await);
    until_reached(cluster, a, "alice", &bob, true).await;
    until_reached(cluster, b, "bob", &alice, true).await;

    let deny_all = r#"{
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"namespace": "smoke-a", "name": "deny-all"},
        "spec": {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    }"#;
    cluster.apply(deny_all).await.unwrap();
    until_reached(cluster, a, "alice", &bob, false).await;
    until_reached(cluster, b, "bob", &alice, false).await;
    // Nor anything else: DNS, the world, the node, the API server at each of its addresses.
    let node = cluster.node();
    let kubelet = format!("{node}:10250");
    let api = format!("{node}:6443");
    for address in ["10.96.0.10:53", "10.96.0.1:443", "203.0.113.1:443", PUBLIC_API, &api, &kubelet] {
        let answer = cluster.probe_from(a, "alice", &["tcp", address]).await;
        assert!(answer.is_err(), "alice reaches {address}");
        cluster.probe_from(b, "bob", &["tcp", address]).await.unwrap();
    }
    for namespace in [a, b] {
        remove_namespace(cluster, namespace).await;
    }
}

#[tokio::test]
async fn pods_have_names_a_world_and_a_way_to_the_test() {
    let cluster = Cluster::shared().await;
    let namespace = "smoke-world";
    restricted_namespace(cluster, namespace).await;
    cluster.apply(&restricted_pod(namespace, "pod", PROBE_IMAGE)).await.unwrap();
    cluster.kubectl(&["expose", "pod", "pod", "--namespace", namespace, "--port=80", "--target-port=8080"]).await;
    ready(cluster, namespace).await;
    let probe = |arguments: &'static [&'static str]| cluster.probe_from(namespace, "pod", arguments);

    let host = cluster.host();
    assert_eq!(probe(&["lookup", "kubernetes.default"]).await.unwrap().trim(), "10.96.0.1");
    assert_eq!(probe(&["lookup", "203-0-113-77.ip.example"]).await.unwrap().trim(), "203.0.113.77");
    assert_eq!(probe(&["lookup", "host.example"]).await.unwrap().trim(), host.to_string());
    assert!(probe(&["lookup", "nowhere.invalid"]).await.is_err());

    // What stands at the other end says at which address it was called.
    for (url, address) in [
        ("https://world.example", " 203.0.113.1:443 "),
        ("https://198-51-100-20.ip.example", " 198.51.100.20:443 "),
        ("http://169.254.169.254/latest/meta-data", " 169.254.169.254:80 "),
        ("https://192.168.99.9", " 192.168.99.9:443 "),
    ] {
        let answer = cluster.probe_from(namespace, "pod", &["get", url]).await.unwrap();
        assert!(answer.contains(address), "{url}: {answer}");
    }
    assert!(probe(&["tcp", "192.0.2.1:80"]).await.is_err(), "there is no world but the cluster's own");

    // Services, from a pod and from here through the API server.
    assert!(probe(&["get", "http://pod"]).await.unwrap().starts_with("pod "));
    let proxied = format!("/api/v1/namespaces/{namespace}/services/pod:80/proxy/");
    assert!(cluster.kubectl(&["get", "--raw", &proxied]).await.starts_with("pod "));
    let run = ["exec", "--namespace", namespace, "pod", "--", "/probe", "lookup", "world.example"];
    assert_eq!(cluster.kubectl(&run).await.trim(), "203.0.113.1");

    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
    let here = format!("{host}:{}", listener.local_addr().unwrap().port());
    cluster.probe_from(namespace, "pod", &["tcp", &here]).await.unwrap();
    remove_namespace(cluster, namespace).await;
}

#[tokio::test]
async fn a_service_account_acts_as_itself_and_is_in_the_audit_log() {
    let cluster = Cluster::shared().await;
    let namespace = "smoke-account";
    cluster.kubectl(&["create", "namespace", namespace]).await;
    cluster.kubectl(&["create", "serviceaccount", "reader", "--namespace", namespace]).await;
    let kubeconfig = cluster.kubeconfig_for(namespace, "reader").await;
    let reader = ["--kubeconfig", kubeconfig.to_str().unwrap()];
    let whoami = cluster.kubectl(&[&["auth", "whoami"], &reader[..]].concat()).await;
    assert!(whoami.contains("system:serviceaccount:smoke-account:reader"), "{whoami}");
    let refused = cluster.try_kubectl(&[&["get", "secrets"], &reader[..]].concat()).await.unwrap_err();
    assert!(refused.contains("Forbidden"), "{refused}");
    let log = fs::read_to_string(cluster.audit_log().unwrap()).unwrap();
    let mut calls = log.lines().filter(|line| line.contains("serviceaccount:smoke-account:reader"));
    assert!(calls.any(|line| line.contains("\"resource\":\"secrets\"") && line.contains("\"code\":403")));
    remove_namespace(cluster, namespace).await;
}

#[tokio::test]
async fn an_image_is_built_from_a_dockerfile_and_runs() {
    let cluster = Cluster::shared().await;
    let context = tempfile::tempdir().unwrap();
    let dockerfile = format!("FROM {PROBE_IMAGE}\nCMD [\"serve\", \":8080\", \":8081\"]\n");
    fs::write(context.path().join("Dockerfile"), dockerfile).unwrap();
    let archive = build_image("localhost/smoke:test", context.path(), &[]).await;
    cluster.load_image(&archive).await;
    restricted_namespace(cluster, "smoke-image").await;
    cluster.apply(&restricted_pod("smoke-image", "built", "localhost/smoke:test")).await.unwrap();
    ready(cluster, "smoke-image").await;
    let second = format!("{}:8081", address_of(cluster, "smoke-image", "built").await);
    cluster.probe_from("smoke-image", "built", &["tcp", &second]).await.unwrap();
    remove_namespace(cluster, "smoke-image").await;
}

#[tokio::test]
async fn a_simulated_cluster_runs_a_hundred_pods_and_leaves_nothing() {
    let cluster = Cluster::simulated().await;
    cluster.kubectl(&["create", "deployment", "many", "--image=nothing", "--replicas=100"]).await;
    cluster.kubectl(&["wait", "--for=condition=Available", "deployment/many", "--timeout=60s"]).await;
    let ready = ["get", "deployment", "many", "--output", "jsonpath={.status.readyReplicas}"];
    assert_eq!(cluster.kubectl(&ready).await, "100");
    let link = link_with(cluster.host()).expect("a link of its own");
    let folder = cluster.kubeconfig().parent().unwrap().to_owned();
    drop(cluster);
    assert!(!folder.exists());
    assert!(!Path::new("/sys/class/net").join(link).exists());
}

/// The network link of this machine that has the address.
fn link_with(address: Ipv4Addr) -> Option<String> {
    let ip = std::process::Command::new("ip").args(["-json", "address"]).output().unwrap();
    let links: serde_json::Value = serde_json::from_slice(&ip.stdout).unwrap();
    let own = |link: &serde_json::Value| link["addr_info"].to_string().contains(&format!("\"{address}\""));
    let found = links.as_array()?.iter().find(|&link| own(link))?;
    Some(found["ifname"].as_str()?.to_owned())
}
