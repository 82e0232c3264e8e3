//! What `helm uninstall` leaves can be deleted without an operator, and is taken up again by the next one.

use serde_json::json;

use super::life::{agent, succeed};
use super::platform::{NAME, Platform};

const KEPT: &str = "kept";

/// Each is a release's end.
#[derive(Clone, Copy)]
enum End {
    /// Its tenant's object goes, then the namespace.
    TenantThenNamespace,
    /// The namespace goes, then its tenant's object.
    NamespaceThenTenant,
    /// The definition goes with every object, then the namespaces.
    Definition,
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_uninstall_leaves_can_be_deleted() {
    // A cluster of its own, with the small default: SQLite, one replica, and two operators of which one leads.
    let platform = Platform::prepare(false).await;
    let cluster = &platform.cluster;
    for (round, end) in [End::TenantThenNamespace, End::NamespaceThenTenant, End::Definition].into_iter().enumerate() {
        let name = format!("gone-{round}");
        let namespace = format!("tenant-{name}");
        platform.upgrade(&json!({})).await;
        let (tenant, _) = tokio::join!(platform.tenant(&name, json!({})), platform.tenant(KEPT, json!({})));
        let run = succeed(&tenant.client, &agent(&tenant.client).await, "Who serves it?").await;
        assert_eq!(run["worker"], json!(platform.worker(&name).await.pod));

        platform.helm(&["uninstall", "cloister", "--wait", "--timeout", "3m"]).await.expect("the release goes");
        for tenant in [name.as_str(), KEPT] {
            assert_eq!(platform.field(&["tenant", tenant], "{.metadata.finalizers}").await, "");
            assert_eq!(platform.field(&["namespace", &format!("tenant-{tenant}")], "{.status.phase}").await, "Active");
            let replicas = ["deployment", NAME, "--namespace", &format!("tenant-{tenant}")];
            assert_eq!(platform.field(&replicas, "{.spec.replicas}").await, "1");
        }
        let delete = async |object: &[&str]| {
            cluster.kubectl(&[&["delete"], object, &["--wait", "--timeout=60s"]].concat()).await;
        };
        let namespaces = ["get", "namespaces", "--selector=cloister.dev/tenant", "--output=name"];
        match end {
            End::TenantThenNamespace => {
                delete(&["tenant", &name]).await;
                delete(&["namespace", &namespace]).await;
            }
            End::NamespaceThenTenant => {
                delete(&["namespace", &namespace]).await;
                delete(&["tenant", &name]).await;
            }
            End::Definition => {
                delete(&["crd", "tenants.cloister.dev"]).await;
                delete(&["namespace", "--selector=cloister.dev/tenant"]).await;
                assert_eq!(cluster.kubectl(&namespaces).await, "");
                continue;
            }
        }
        // The other stays, for the next release to take up.
        assert_eq!(cluster.kubectl(&namespaces).await.trim(), format!("namespace/tenant-{KEPT}"));
    }
}
