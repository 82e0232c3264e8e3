//! The api's database is restored from a backup that is older than what the cluster holds.

use serde_json::json;

use super::life::{agent, succeed};
use super::platform::{NAME, NAMESPACE, PODS, Platform, eventually};

const BEFORE: &str = "restore-before";
const AFTER: &str = "restore-after";
const HOBBY: &str = "restore-hobby";

#[tokio::test(flavor = "multi_thread")]
async fn what_a_restored_database_has_forgotten_is_told_to_it() {
    let platform = Platform::shared().await;
    let _pods = PODS.write().await;
    let cluster = &platform.cluster;
    let postgres = &platform.services.as_ref().expect("PostgreSQL").postgres;
    let tenant = platform.tenant(BEFORE, json!({})).await;
    let own = agent(&tenant.client).await;
    let backup = postgres.dump();

    // Since then: a token was rotated, and two tenants came.
    let secret = ["secret", NAME, "--namespace", "tenant-restore-before"];
    let token = async || platform.field(&secret, r"{.metadata.annotations.cloister\.dev/token-id}").await;
    let first = token().await;
    let foreign = [&["annotate"], &secret[..], &["somebody=else"], &super::platform::BREAK_GLASS].concat();
    cluster.kubectl(&foreign).await;
    eventually("the token is rotated", async || ![first.clone(), String::new()].contains(&token().await)).await;
    let second = token().await;
    let (after, hobby) =
        tokio::join!(platform.tenant(AFTER, json!({})), platform.tenant(HOBBY, json!({"plan": "pro"})));

    let api = ["deployment", "cloister-api", "--namespace", NAMESPACE];
    cluster.kubectl(&[&["scale"], &api[..], &["--replicas=0"]].concat()).await;
    let pods = ["pods", "--namespace", NAMESPACE, "--selector=app.kubernetes.io/component=api"];
    cluster.kubectl(&[&["wait", "--for=delete", "--timeout=90s"], &pods[..]].concat()).await;
    postgres.restore(&backup).await;
    cluster.kubectl(&[&["scale"], &api[..], &["--replicas=2"]].concat()).await;
    cluster.kubectl(&[&["rollout", "status", "--timeout=90s"], &api[..]].concat()).await;

    // Those that the database doesn't know are tenants anew; the workers of the one that it knows get a token that it
    // knows.
    for (name, known) in [(AFTER, &after.id), (HOBBY, &hobby.id)] {
        let id = async || platform.field(&["tenant", name], "{.status.tenantId}").await;
        eventually(&format!("{name} is registered again"), async || &id().await != known).await;
        platform.until_ready(name).await;
    }
    eventually("there is a token that works", async || token().await != second).await;
    eventually("the workers have it", async || {
        platform.field(&["tenant", BEFORE], "{.status.runtime.readyReplicas}").await == "1"
    })
    .await;
    let run = succeed(&tenant.client, &own, "Who serves restore-before?").await;
    assert_eq!(run["worker"], json!(platform.worker(BEFORE).await.pod));
    let again = platform.tenant(AFTER, json!({})).await;
    succeed(&again.client, &agent(&again.client).await, "Who serves restore-after?").await;
    for name in [BEFORE, AFTER, HOBBY] {
        platform.delete_tenant(name).await;
    }
}
