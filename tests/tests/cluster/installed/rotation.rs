//! Workers get a new token while they work.

use serde_json::json;

use super::life::{agent, succeed};
use super::platform::{BREAK_GLASS, NAME, PODS, Platform, eventually};

const ACME: &str = "rotation-acme";

#[expect(clippy::disallowed_methods, reason = "there is no App here")]
#[tokio::test(flavor = "multi_thread")]
async fn a_new_token_reaches_the_workers_without_a_restart() {
    let platform = Platform::shared().await;
    let _pods = PODS.read().await;
    let tenant = platform.tenant(ACME, json!({})).await;
    let worker = platform.worker(ACME).await;
    let own = agent(&tenant.client).await;
    succeed(&tenant.client, &own, "Who serves rotation-acme?").await;
    let secret = ["secret", NAME, "--namespace", &worker.namespace];
    let token = async || platform.field(&secret, r"{.metadata.annotations.cloister\.dev/token-id}").await;
    let first = token().await;

    // A Secret that somebody else wrote to is not trusted any more: its token is due.
    let foreign = [&["annotate"], &secret[..], &["somebody=else"], &BREAK_GLASS].concat();
    platform.cluster.kubectl(&foreign).await;
    eventually("another token is in the Secret", async || ![first.clone(), String::new()].contains(&token().await))
        .await;
    let second = token().await;
    let annotations = platform.field(&secret, "{.metadata.annotations}").await;
    assert!(!annotations.contains("somebody"), "{annotations}");

    // The workers take it up, and from then on the first one's days are numbered.
    let query = "{ tenant { runtimeTokens(first: 10) { nodes { id lastUsedAt expiresAt revokedAt } } } }";
    let tokens = async || tenant.client.data(query, json!({})).await["tenant"]["runtimeTokens"]["nodes"].clone();
    let of = async |id: &str| {
        let all = tokens().await;
        let found = all.as_array().expect("a list").iter().find(|token| token["id"] == id).cloned();
        found.unwrap_or_else(|| panic!("no {id} among {all}"))
    };
    eventually("the new token is in use", async || {
        // While it is on its way, runs are executed as before.
        succeed(&tenant.client, &own, "Who serves rotation-acme now?").await;
        of(&second).await["lastUsedAt"].is_string()
    })
    .await;
    let time =
        |value: &serde_json::Value| value.as_str().expect("a time").parse::<chrono::DateTime<chrono::Utc>>().unwrap();
    let ends = time(&of(&first).await["expiresAt"]);
    assert!(ends <= chrono::Utc::now() + chrono::TimeDelta::minutes(3), "it works until {ends}");
    let run = succeed(&tenant.client, &own, "And rotation-acme after that?").await;
    assert_eq!(run["worker"], json!(worker.pod));
    assert_eq!(platform.worker(ACME).await, worker, "the pod is another, or was restarted");
    platform.delete_tenant(ACME).await;
}
