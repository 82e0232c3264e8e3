//! Where an operator is measured: a fresh simulated cluster, a fresh api, and tenants to come.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::time::{Duration, Instant};

use cloister_tests::operator::{OPERATOR_KEY, OPERATOR_NAMESPACE};
use cloister_tests::{Cluster, TestApp};
use crds::status::Phase;
use crds::{Tenant, TenantSpec};
use futures_util::{StreamExt, TryStreamExt, stream};
use kube::api::PostParams;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Config};
use serde_json::json;
use tokio::task::JoinHandle;

use super::audit::Audit;

/// How the API server knows the operator, whichever it is.
const ACCOUNT: &str = "operator";

/// How the API server knows the admin.
pub const ADMIN: &str = "admin";

/// How many requests for new tenants are under way at once.
const CREATIONS: usize = 16;

/// How long all tenants may take.
const PATIENCE: Duration = Duration::from_secs(1_800);

/// What every side may do here: what is compared is not the rights.
const RIGHTS: &str = "
{apiVersion: v1, kind: Namespace, metadata: {name: cloister-system}}
---
{apiVersion: v1, kind: ServiceAccount, metadata: {name: operator, namespace: cloister-system}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: operator}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: cluster-admin}
subjects: [{kind: ServiceAccount, name: operator, namespace: cloister-system}]
";

/// A cluster and an api.
pub struct Ground {
    /// The api, on SQLite.
    pub app: TestApp,
    /// The API server as the operator is let in.
    pub kubeconfig: PathBuf,
    /// The API server as the admin.
    pub client: Client,
    cluster: Cluster,
}

impl Ground {
    /// Starts both, empty.
    pub async fn prepare() -> Ground {
        let cluster = Cluster::simulated().await;
        cluster.apply(include_str!("../../../../../crds/tenants.yaml")).await.expect("the definition");
        cluster.kubectl(&["wait", "--for=condition=Established", "crd/tenants.cloister.dev", "--timeout=30s"]).await;
        // Its storage comes a moment later.
        let deadline = Instant::now() + PATIENCE;
        while cluster.try_kubectl(&["get", "tenants"]).await.is_err() {
            assert!(Instant::now() < deadline, "tenants can't be listed");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        cluster.apply(RIGHTS).await.expect("the operator's rights");
        let kubeconfig = cluster.kubeconfig_for(OPERATOR_NAMESPACE, ACCOUNT).await;
        let client = admin(cluster.kubeconfig()).await;
        let app = TestApp::builder().env("CLOISTER_CLUSTER__OPERATOR_KEY", OPERATOR_KEY).start().await;
        Ground { app, kubeconfig, client, cluster }
    }

    /// The operator's name in the audit log.
    pub fn account(&self) -> String {
        format!("system:serviceaccount:{OPERATOR_NAMESPACE}:{ACCOUNT}")
    }

    /// The API server's audit log from now on.
    pub fn audit(&self) -> Audit {
        Audit::from_now(&self.cluster.audit_log().expect("a cluster of the harness"))
    }

    /// The first process of the cluster's parts.
    pub fn first_process(&self) -> u32 {
        let file = self.cluster.kubeconfig().with_file_name("first-process");
        let text = std::fs::read_to_string(file).expect("the cluster is running");
        text.split(' ').next().and_then(|pid| pid.parse().ok()).expect("a process id")
    }

    /// Makes `count` enterprise tenants, one request after another from each of [`CREATIONS`] clients.
    pub async fn create_tenants(&self, count: usize) {
        let api: Api<Tenant> = Api::all(self.client.clone());
        let make = |number| {
            let api = api.clone();
            async move { api.create(&PostParams::default(), &tenant(number)).await }
        };
        let made = stream::iter(0..count).map(make).buffer_unordered(CREATIONS).try_for_each(async |_| Ok(()));
        made.await.expect("the tenants are accepted");
    }

    /// Waits, from now on, until `count` tenants are Ready; answers when they were.
    pub fn until_ready(&self, count: usize) -> JoinHandle<Instant> {
        let api: Api<Tenant> = Api::all(self.client.clone());
        tokio::spawn(async move {
            let ready = async {
                let mut seen = HashSet::new();
                let mut tenants = pin!(watcher(api, watcher::Config::default()).default_backoff().applied_objects());
                while let Some(Ok(tenant)) = tenants.next().await {
                    if tenant.status.is_some_and(|status| status.phase == Phase::Ready) {
                        seen.insert(tenant.metadata.name);
                    }
                    if seen.len() == count {
                        return;
                    }
                }
            };
            tokio::time::timeout(PATIENCE, ready).await.expect("every tenant becomes Ready");
            Instant::now()
        })
    }
}

/// The name of a tenant.
pub fn name(number: usize) -> String {
    format!("tenant-{number:04}")
}

/// As small as an enterprise tenant is: one worker, everything else derived.
fn tenant(number: usize) -> Tenant {
    let spec = json!({
        "displayName": format!("Tenant {number}"),
        "email": format!("ops@tenant-{number}.example"),
        "plan": "enterprise",
    });
    let spec: TenantSpec = serde_json::from_value(spec).expect("a spec");
    Tenant::new(&name(number), spec)
}

async fn admin(kubeconfig: &Path) -> Client {
    // Fails only if one is installed already, which is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let kubeconfig = Kubeconfig::read_from(kubeconfig).expect("a kubeconfig");
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await;
    Client::try_from(config.expect("a cluster")).expect("a client")
}
