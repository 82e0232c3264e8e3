//! What `helm uninstall` leaves can be deleted without an operator, and goes on with the next release.

use std::time::{Duration, Instant};

use serde_json::json;

use super::life::{agent, succeed};
use super::platform::{NAME, Platform};

const KEPT: &str = "kept";

/// In which a tenant is Ready, if its operator leads from the start.
const SOON: Duration = Duration::from_secs(60);

/// What becomes of what a release left.
#[derive(Clone, Copy)]
enum End {
    /// A tenant's object goes, then its namespace.
    TenantThenNamespace,
    /// A tenant's namespace goes, then its object.
    NamespaceThenTenant,
    /// The definition goes and with it every object, then the namespaces.
    Everything,
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_uninstall_leaves_goes_on_or_can_be_deleted() {
    // A cluster of its own, with the small default: SQLite, one replica, and two operators of which one leads.
    let platform = Platform::prepare(false).await;
    let cluster = &platform.cluster;
    platform.upgrade(&json!({})).await;
    let kept = platform.tenant(KEPT, json!({})).await;
    let others = agent(&kept.client).await;
    let worker = platform.worker(KEPT).await;
    for (round, end) in [End::TenantThenNamespace, End::NamespaceThenTenant, End::Everything].into_iter().enumerate() {
        let name = format!("gone-{round}");
        let namespace = format!("tenant-{name}");
        let begun = Instant::now();
        let tenant = platform.tenant(&name, json!({})).await;
        assert!(
            begun.elapsed() < SOON,
            "{round}: the operators waited for the Lease that the release before had taken"
        );
        let run = succeed(&tenant.client, &agent(&tenant.client).await, "Who serves it?").await;
        assert_eq!(run["worker"], json!(platform.worker(&name).await.pod));

        platform.helm(&["uninstall", "cloister", "--wait", "--timeout", "3m"]).await.expect("the release goes");
        for tenant in [name.as_str(), KEPT] {
            assert_eq!(platform.field(&["tenant", tenant], "{.metadata.finalizers}").await, "", "{round}: {tenant}");
            assert_eq!(platform.field(&["namespace", &format!("tenant-{tenant}")], "{.status.phase}").await, "Active");
            let workers = ["deployment", NAME, "--namespace", &format!("tenant-{tenant}")];
            assert_eq!(platform.field(&workers, "{.spec.replicas}").await, "1");
        }
        let delete = async |object: &[&str]| {
            cluster.kubectl(&[&["delete"], object, &["--wait", "--timeout=60s"]].concat()).await;
        };
        let left = async || {
            let list = ["get", "namespaces", "--selector=cloister.dev/tenant", "--output=name"];
            cluster.kubectl(&list).await.trim().to_owned()
        };
        match end {
            End::TenantThenNamespace => {
                delete(&["tenant", &name]).await;
                delete(&["namespace", &namespace]).await;
            }
            End::NamespaceThenTenant => {
                delete(&["namespace", &namespace]).await;
                delete(&["tenant", &name]).await;
            }
            End::Everything => {
                delete(&["crd", "tenants.cloister.dev"]).await;
                delete(&["namespace", "--selector=cloister.dev/tenant"]).await;
                assert_eq!(left().await, "");
                break;
            }
        }
        assert_eq!(left().await, format!("namespace/tenant-{KEPT}"));

        // The other goes on with the next release: its key, its agent, its pod.
        platform.upgrade(&json!({})).await;
        let run = succeed(&kept.client, &others, "Who serves what was kept?").await;
        assert_eq!(run["worker"], json!(worker.pod));
        assert_eq!(platform.worker(KEPT).await, worker);
    }
}
