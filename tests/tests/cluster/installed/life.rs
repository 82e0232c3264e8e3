//! A tenant's life, from `kubectl apply` to `kubectl delete`, beside another one's that nothing of it touches.

use cloister_tests::postgres::connect;
use cloister_tests::{Client, Tenant};
use entity::{TenantOwned, usage_records};
use serde_json::{Value, json};

use super::platform::{NAME, PODS, Platform, Worker, eventually};

const ACME: &str = "life-acme";
const GLOBEX: &str = "life-globex";

/// Makes an agent of the scripted model.
pub async fn agent(client: &Client) -> String {
    let mutation = "mutation ($input: CreateAgentInput!) {
        createAgent(input: $input) { agent { id } errors { code message field } }
    }";
    let input = json!({"name": "Guide", "model": "scripted", "instructions": "Be brief.", "publish": true});
    let made = client.query(mutation, json!({"input": input})).await;
    made.payload("createAgent")["agent"]["id"].as_str().expect("an id").to_owned()
}

/// Starts a run and returns its id.
pub async fn start(client: &Client, agent: &str, text: &str) -> String {
    let mutation = "mutation ($input: StartRunInput!) {
        startRun(input: $input) { run { id } errors { code message field } }
    }";
    let started = client.query(mutation, json!({"input": {"agentId": agent, "input": text}})).await;
    started.payload("startRun")["run"]["id"].as_str().expect("an id").to_owned()
}

/// Starts a run and waits for its success: what the API says of it then.
pub async fn succeed(client: &Client, agent: &str, text: &str) -> Value {
    let run = start(client, agent, text).await;
    let query =
        "query ($run: ID!) { run(id: $run) { id status output worker error { message } usage { totalTokens } } }";
    let mut found = Value::Null;
    eventually(&format!("{text} has ended"), async || {
        found = client.data(query, json!({"run": run})).await["run"].clone();
        ["SUCCEEDED", "FAILED", "CANCELLED"].contains(&found["status"].as_str().expect("a status"))
    })
    .await;
    assert_eq!(found["status"], "SUCCEEDED", "{found}");
    found
}

/// What the ledger has of a tenant, in tokens.
async fn ledger(platform: &Platform, tenant: &Tenant) -> u64 {
    let services = platform.services.as_ref().expect("PostgreSQL");
    let db = connect(services.postgres.url().as_str()).await.unwrap();
    let rows = usage_records::Entity::across_tenants().all(&db).await.unwrap();
    let own = rows.iter().filter(|row| row.tenant_id == uuid(&tenant.id));
    let tokens = own.map(|row| row.input_tokens + row.cache_read_tokens + row.cache_write_tokens + row.output_tokens);
    u64::try_from(tokens.sum::<i64>()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_enterprise_tenant_is_served_by_its_own_pods_and_leaves_nothing() {
    let platform = Platform::shared().await;
    let _pods = PODS.read().await;
    let cluster = &platform.cluster;
    let (acme, globex) = tokio::join!(
        platform.tenant(ACME, json!({"monthlyTokenLimit": 1_000_000})),
        platform.tenant(GLOBEX, json!({}))
    );
    let (worker, neighbour) = (platform.worker(ACME).await, platform.worker(GLOBEX).await);
    let (own, others) = (agent(&acme.client).await, agent(&globex.client).await);

    // The pod in its namespace has it, and says so; nobody else's does.
    let run = succeed(&acme.client, &own, "Who serves life-acme?").await;
    let id = run["id"].as_str().unwrap();
    assert_eq!((&run["output"], &run["worker"]), (&json!("Served."), &json!(worker.pod)));
    let logs = async |worker: &Worker| cluster.kubectl(&["logs", "--namespace", &worker.namespace, &worker.pod]).await;
    assert!(logs(&worker).await.contains(id), "its worker's log: {}", logs(&worker).await);
    assert!(!logs(&neighbour).await.contains(id));

    // What the provider counted is what is charged, and shows on the object.
    succeed(&acme.client, &own, "Does life-acme use much?").await;
    let served = platform.charged(ACME);
    assert_eq!(served, 11 + 21_234);
    let usage = async |client: &Client| client.data("{ usage { totalTokens } }", json!({})).await["usage"].clone();
    eventually("all is charged", async || usage(&acme.client).await["totalTokens"] == served).await;
    assert_eq!(ledger(platform, &acme).await, served);
    let shown = "{.status.usage.tokens} of {.status.usage.limit}, {.status.usage.remaining} left";
    let expected = format!("{served} of 1000000, {} left", 1_000_000 - served);
    eventually("usage shows", async || platform.field(&["tenant", ACME], shown).await == expected).await;
    assert_eq!(usage(&globex.client).await["totalTokens"], 0);

    // Deleted with its object only, it is kept: a new object by its name takes it over, keys and all.
    platform.delete_tenant(ACME).await;
    gone(platform, &worker.namespace).await;
    let ask = "query ($id: ID!) { tenantById(id: $id) { status provisioning { objectName } } }";
    let told = async || platform.admin().data(ask, json!({"id": acme.id})).await["tenantById"].clone();
    assert_eq!(told().await, json!({"status": "SUSPENDED", "provisioning": null}));
    assert!(acme.client.query("{ viewer { __typename } }", json!({})).await.body["data"].is_null(), "its key works");
    platform.apply_tenant(ACME, json!({"deletionPolicy": "Delete"})).await;
    platform.until_ready(ACME).await;
    assert_eq!(platform.field(&["tenant", ACME], "{.status.tenantId}").await, acme.id);
    succeed(&acme.client, &own, "Again life-acme?").await;

    // Deleted with its data, its name is another tenant's.
    platform.delete_tenant(ACME).await;
    gone(platform, &worker.namespace).await;
    assert_eq!(told().await, json!({"status": "DELETING", "provisioning": null}));
    platform.apply_tenant(ACME, json!({"plan": "free"})).await;
    platform.until_ready(ACME).await;
    assert_ne!(platform.field(&["tenant", ACME], "{.status.tenantId}").await, acme.id);
    platform.delete_tenant(ACME).await;

    // The neighbour has not noticed.
    assert_eq!(platform.worker(GLOBEX).await, neighbour);
    let run = succeed(&globex.client, &others, "Who serves the neighbour?").await;
    assert_eq!(run["worker"], json!(neighbour.pod));
    platform.delete_tenant(GLOBEX).await;
}

/// Nothing of a tenant is left in the cluster.
async fn gone(platform: &Platform, namespace: &str) {
    let missing = platform.cluster.try_kubectl(&["get", "namespace", namespace]).await.unwrap_err();
    assert!(missing.contains("NotFound"), "{missing}");
    let tenant = namespace.strip_prefix("tenant-").unwrap();
    let selector = format!("cloister.dev/tenant={tenant}");
    let kinds = "pods,deployments,replicasets,secrets,serviceaccounts,networkpolicies,resourcequotas,limitranges,\
                 poddisruptionbudgets,namespaces";
    let left = ["get", kinds, "--all-namespaces", "--selector", &selector, "--output=name"];
    assert_eq!(platform.cluster.kubectl(&left).await, "");
    let named =
        ["get", "deployments,secrets", "--all-namespaces", "--field-selector", &format!("metadata.name={NAME}")];
    assert!(!platform.cluster.kubectl(&named).await.contains(namespace));
}

/// The id in the database behind one that a client is given.
fn uuid(id: &str) -> uuid::Uuid {
    const DIGITS: &str = "0123456789abcdefghjkmnpqrstvwxyz";
    let digits = id.rsplit('_').next().unwrap();
    let value = digits.chars().fold(0u128, |value, digit| (value << 5) | DIGITS.find(digit).unwrap() as u128);
    uuid::Uuid::from_u128(value)
}
