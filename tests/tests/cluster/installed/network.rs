//! What a tenant's pod reaches and what it doesn't, asked from its own network. Whatever is refused to it is reached by a
//! pod that no policy holds, so that only a policy can have refused it.

use cloister_tests::cluster::PUBLIC_API;
use futures_util::future::join_all;
use serde_json::json;

use super::platform::{NAMESPACE, OUTSIDE, OUTSIDER, PODS, Platform, Worker, eventually};

const ACME: &str = "network-acme";
const GLOBEX: &str = "network-globex";

/// Where pods are asked from.
#[derive(Clone, Copy)]
struct From<'a> {
    platform: &'a Platform,
    namespace: &'a str,
    pod: &'a str,
}

impl<'a> From<'a> {
    fn worker(platform: &'a Platform, worker: &'a Worker) -> Self {
        Self { platform, namespace: &worker.namespace, pod: &worker.pod }
    }

    fn outside(platform: &'a Platform) -> Self {
        Self { platform, namespace: OUTSIDE, pod: OUTSIDER }
    }

    async fn reaches(self, address: &str) -> bool {
        self.platform.cluster.probe_from(self.namespace, self.pod, &["tcp", address]).await.is_ok()
    }

    /// Those of the addresses that are reached.
    async fn reached(self, addresses: &[String]) -> Vec<String> {
        let asked = addresses.iter().map(async |address| self.reaches(address).await.then(|| address.clone()));
        join_all(asked).await.into_iter().flatten().collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenants_pod_reaches_what_it_needs_and_nothing_else() {
    let platform = Platform::shared().await;
    let _pods = PODS.read().await;
    let cluster = &platform.cluster;
    tokio::join!(platform.tenant(ACME, json!({})), platform.tenant(GLOBEX, json!({})));
    let (worker, neighbour) = (platform.worker(ACME).await, platform.worker(GLOBEX).await);
    let (own, outside) = (From::worker(platform, &worker), From::outside(platform));

    // ── Needed ──
    let runtime = format!("cloister-runtime.{NAMESPACE}.svc:8081");
    for address in [runtime.as_str(), "10.96.0.10:53", "203.0.113.77:443", "198.51.100.7:443"] {
        assert!(own.reaches(address).await, "{address} is not reached");
    }
    let ask = async |arguments: &[&str]| cluster.probe_from(&worker.namespace, &worker.pod, arguments).await;
    assert_eq!(ask(&["lookup", "world.example"]).await.unwrap().trim(), "203.0.113.1");
    assert!(ask(&["get", "https://world.example"]).await.unwrap().contains(" 203.0.113.1:443 "));

    // ── Refused, though it is there ──
    let pod = async |namespace: &str, component: &str| {
        let selector = format!("app.kubernetes.io/component={component}");
        let pods = ["pods", "--namespace", namespace, "--selector", &selector];
        platform.field(&pods, "{.items[0].status.podIP}").await
    };
    let (api, operator) = (pod(NAMESPACE, "api").await, pod(NAMESPACE, "operator").await);
    let dns =
        platform.field(&["pods", "--namespace=kube-system", "--selector=k8s-app=kube-dns"], "{.items[0].status.podIP}");
    let outsider = platform.field(&["pod", "--namespace", OUTSIDE, OUTSIDER], "{.status.podIP}").await;
    let (node, services) = (cluster.node(), platform.services.as_ref().expect("PostgreSQL and Redis"));
    let on_the_host =
        |url: &str| url.split(['/', '@']).find(|part| part.contains(':') && part.contains('.')).map(str::to_owned);
    let mut refused: Vec<String> = [
        // The Kubernetes API: its Service, its node, and its address that looks public, of which 443 is another server's.
        "10.96.0.1:443",
        &format!("{node}:6443"),
        PUBLIC_API,
        "198.51.100.6:443",
        // The node: the kubelet, and the api's clients' port by the way of it.
        &format!("{node}:10250"),
        &format!("{node}:30080"),
        // The api's other port, by its pod and its Service; the operator.
        &format!("{api}:8080"),
        &format!("cloister.{NAMESPACE}.svc:8080"),
        &format!("{operator}:8083"),
        // Another pod, and the DNS pods' other ports.
        &format!("{outsider}:8080"),
        &format!("{}:8181", dns.await),
        // Metadata, and private ranges.
        "169.254.169.254:80",
        "169.254.169.254:443",
        "10.99.0.9:443",
        "172.16.99.9:443",
        "192.168.99.9:443",
        "100.64.99.9:443",
        // The world, but not by HTTPS.
        "203.0.113.77:80",
        "203.0.113.77:6443",
    ]
    .map(str::to_owned)
    .into();
    let urls = [platform.model.url(), services.postgres.url().to_string(), services.redis.url()];
    refused.extend(urls.iter().map(|url| on_the_host(url).expect("an address")));
    // So many at once may be too many for a busy machine: each is there in the end.
    eventually("all of them are there to be refused", async || outside.reached(&refused).await == refused).await;
    assert_eq!(own.reached(&refused).await, Vec::<String>::new(), "reached by a tenant's pod");

    // ── Nothing comes in, though the kubelet's probes say that somebody listens ──
    let ready =
        platform.field(&["pod", "--namespace", &neighbour.namespace, &neighbour.pod], "{.status.conditions}").await;
    assert!(ready.contains("Ready"), "{ready}");
    let neighbours = format!("{}:8082", neighbour.ip);
    for from in [own, outside] {
        assert!(!from.reaches(&neighbours).await, "{} reaches another tenant's pod", from.pod);
    }

    // ── What a Tenant opens, that and no more, and nothing before ──
    let opened = ["198.51.100.20:80", "10.99.0.7:443"].map(str::to_owned);
    let beside = ["198.51.100.20:6443", "198.51.100.21:80", "10.99.0.7:80", "10.99.0.8:443"].map(str::to_owned);
    let both = [&opened[..], &beside[..]].concat();
    eventually("those are there too", async || outside.reached(&both).await == both).await;
    assert_eq!(own.reached(&both).await, Vec::<String>::new());
    let egress = json!([{"cidr": "198.51.100.20/32", "ports": [80]}, {"cidr": "10.99.0.7/32", "ports": [443]}]);
    platform.apply_tenant(ACME, json!({"network": {"allowedEgress": egress}})).await;
    // The worker is told of the hosts, and so is another pod.
    eventually("what was opened is reached", async || {
        let Some(worker) = platform.try_worker(ACME).await.filter(|now| now.uid != worker.uid) else { return false };
        From::worker(platform, &worker).reached(&opened).await == opened
    })
    .await;
    let worker = platform.worker(ACME).await;
    let own = From::worker(platform, &worker);
    assert_eq!(own.reached(&beside).await, Vec::<String>::new(), "reached, and not opened");
    let neighbour = From::worker(platform, &neighbour);
    assert_eq!(neighbour.reached(&opened).await, Vec::<String>::new(), "opened for another tenant");
    platform.apply_tenant(ACME, json!({})).await;
    eventually("what was opened is closed", async || {
        let Some(worker) = platform.try_worker(ACME).await else { return false };
        From::worker(platform, &worker).reached(&opened).await.is_empty()
    })
    .await;
    tokio::join!(platform.delete_tenant(ACME), platform.delete_tenant(GLOBEX));
}
