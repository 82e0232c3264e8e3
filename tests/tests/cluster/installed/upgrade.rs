//! `helm upgrade` while clients start runs without a pause: of tenants with workers of their own, and of the shared pool.

use std::fs;
use std::time::Duration;

use cloister_tests::cluster::build_image;
use cloister_tests::{Client, Tenant};
use serde_json::{Value, json};
use tokio::sync::watch;
use uuid::Uuid;

use super::life::agent;
use super::platform::{NAMESPACE, PODS, Platform, eventually};

/// A tenant of each kind: its name, fields of its spec, clients.
const TENANTS: [(&str, Option<&str>, usize); 2] = [("upgrade-acme", None, 2), ("upgrade-hobby", Some("pro"), 2)];
/// Between two runs of a client.
const PAUSE: Duration = Duration::from_millis(150);

/// The next version's tag.
const NEXT: &str = "next";

/// Makes the next version: the same programs in other images.
async fn make_next(platform: &Platform) {
    for component in ["api", "operator", "runtime"] {
        let context = tempfile::tempdir().unwrap();
        let dockerfile = format!("FROM localhost/cloister-{component}:{}\nLABEL version={NEXT}\n", platform.images.tag);
        fs::write(context.path().join("Dockerfile"), dockerfile).unwrap();
        let archive = build_image(&format!("localhost/cloister-{component}:{NEXT}"), context.path(), &[]).await;
        platform.cluster.load_image(&archive).await;
    }
}

/// Starts runs until told to stop: their ids. A connection may end with its pod while a request is on its way: then the
/// same is sent again, with the same idempotency key, as any client does.
async fn load(client: Client, agent: String, name: &str, stop: watch::Receiver<bool>) -> Vec<String> {
    const START: &str =
        "mutation ($input: StartRunInput!) { startRun(input: $input) { run { id } errors { code message field } } }";
    let mut runs: Vec<String> = Vec::new();
    while !*stop.borrow() {
        let input = json!({
            "agentId": agent, "input": format!("Be slow with {name} number {}.", runs.len()),
            "idempotencyKey": Uuid::now_v7(),
        });
        let started = match client.try_query(START, json!({"input": input})).await {
            Ok(started) => started,
            Err(_) => client.query(START, json!({"input": input})).await,
        };
        let id = started.payload("startRun")["run"]["id"].as_str().expect("a run's id").to_owned();
        runs.push(id);
        tokio::time::sleep(PAUSE).await;
    }
    runs
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upgrade_under_load_fails_no_run() {
    let platform = Platform::shared().await;
    let _pods = PODS.write().await;
    make_next(platform).await;
    let (stop, stopped) = watch::channel(false);
    let mut tenants: Vec<Tenant> = Vec::new();
    let mut clients = Vec::new();
    for (name, plan, count) in TENANTS {
        let fields = plan.map_or(json!({}), |plan| json!({"plan": plan}));
        let tenant = platform.tenant(name, fields).await;
        let own = agent(&tenant.client).await;
        for _ in 0..count {
            // Each has connections of its own.
            let client = Client::new(&platform.url(), &tenant.key);
            clients.push((tenants.len(), tokio::spawn(load(client, own.clone(), name, stopped.clone()))));
        }
        tenants.push(tenant);
    }
    let images = async |namespace: &str| {
        let images = "{.items[*].spec.template.spec.containers[0].image}";
        platform.field(&["deployments", "--namespace", namespace], images).await
    };

    // Another version of all three, and then other pods of the same.
    platform.upgrade(&json!({"image": {"tag": NEXT}})).await;
    eventually("the workers are of the next version", async || {
        images("tenant-upgrade-acme").await.ends_with(NEXT) && platform.try_worker("upgrade-acme").await.is_some()
    })
    .await;
    assert_eq!(images(NAMESPACE).await.matches(&format!(":{NEXT}")).count(), 2);
    let annotations = json!({"podAnnotations": {"example.com/upgrade": "again"}});
    platform.upgrade(&json!({"image": {"tag": NEXT}, "api": annotations, "operator": annotations})).await;
    stop.send_replace(true);

    let mut runs: Vec<Vec<String>> = vec![Vec::new(); tenants.len()];
    for (tenant, client) in clients {
        runs[tenant].extend(client.await.expect("every run was started"));
    }
    for ((tenant, runs), (name, ..)) in tenants.iter().zip(&runs).zip(TENANTS) {
        assert!(runs.len() > 50, "there were {} runs of {name} to speak of", runs.len());
        for run in runs {
            succeeded(&tenant.client, run).await;
        }
        // Calls that were under way when their pod went are charged too, once each.
        let usage = tenant.client.data("{ usage { totalTokens requestCount } }", json!({})).await["usage"].clone();
        assert_eq!(usage["totalTokens"], platform.charged(name), "{name}: {usage}");
    }
    for (name, ..) in TENANTS {
        platform.delete_tenant(name).await;
    }
}

async fn succeeded(client: &Client, run: &str) {
    let query = "query ($run: ID!) { run(id: $run) { status output error { code message } } }";
    let mut found = Value::Null;
    eventually(&format!("{run} has ended"), async || {
        found = client.data(query, json!({"run": run})).await["run"].clone();
        !["QUEUED", "RUNNING"].contains(&found["status"].as_str().expect("a status"))
    })
    .await;
    assert_eq!(found, json!({"status": "SUCCEEDED", "output": "Served.", "error": null}), "{run}");
}
