//! The api's side of a cluster: whom its API server vouches for, and what the api writes to its objects. No operator
//! runs here; where one would tell something, the test does.

use std::path::PathBuf;
use std::time::Duration;

use cloister_tests::app::TestAppBuilder;
use cloister_tests::client::http;
use cloister_tests::operator::OPERATOR_KEY;
use cloister_tests::{Cluster, PATIENCE, Proxy, TestApp};
use crds::protocol::{Registration, Report, State, VERSION, VERSION_HEADER};
use serde_json::{Value, json};
use tokio::sync::OnceCell;
use tokio::time::Instant;

use crate::support::{done, mutate, name};

/// What the api may do in its cluster, and nothing more; the chart grants the same.
const RIGHTS: &str = r#"
{apiVersion: v1, kind: Namespace, metadata: {name: doors}}
---
{apiVersion: v1, kind: ServiceAccount, metadata: {name: api, namespace: doors}}
---
{apiVersion: v1, kind: ServiceAccount, metadata: {name: operator, namespace: doors}}
---
{apiVersion: v1, kind: ServiceAccount, metadata: {name: stranger, namespace: doors}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: doors-api}
rules:
  - {apiGroups: [cloister.dev], resources: [tenants], verbs: [get, create, patch, delete]}
  - {apiGroups: [""], resources: [namespaces], resourceNames: [kube-system], verbs: [get]}
  - {apiGroups: [authentication.k8s.io], resources: [tokenreviews], verbs: [create]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: doors-api}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: doors-api}
subjects: [{kind: ServiceAccount, name: api, namespace: doors}]
"#;

/// A cluster of these tests' own: an operator of other tests would take their objects for its own. It needs no kubelet.
async fn cluster() -> &'static Cluster {
    static CLUSTER: OnceCell<Cluster> = OnceCell::const_new();
    let start = || async {
        let cluster = Cluster::simulated().await;
        cluster.apply(include_str!("../../../crds/tenants.yaml")).await.expect("the CRD is applied");
        cluster.kubectl(&["wait", "--for=condition=Established", "crd/tenants.cloister.dev", "--timeout=30s"]).await;
        cluster.apply(RIGHTS).await.expect("the api's rights");
        cluster
    };
    CLUSTER.get_or_init(start).await
}

/// An api with the rights of its ServiceAccount in the cluster.
fn inside(builder: TestAppBuilder, kubeconfig: &std::path::Path) -> TestAppBuilder {
    builder
        .env("KUBECONFIG", &kubeconfig.display().to_string())
        .env("CLOISTER_CLUSTER__ENABLED", "true")
        .env("CLOISTER_CLUSTER__OPERATOR_KEY", OPERATOR_KEY)
}

async fn api(cluster: &Cluster) -> TestApp {
    let kubeconfig = cluster.kubeconfig_for("doors", "api").await;
    inside(TestApp::builder(), &kubeconfig).start().await
}

/// The API server through a proxy, as a kubeconfig.
async fn through_proxy(cluster: &Cluster, directory: &std::path::Path) -> (Proxy, PathBuf) {
    let config = std::fs::read_to_string(cluster.kubeconfig_for("doors", "api").await).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    let server = config["clusters"][0]["cluster"]["server"].as_str().unwrap().to_owned();
    let proxy = Proxy::start(server.strip_prefix("https://").unwrap().parse().unwrap()).await;
    config["clusters"][0]["cluster"]["server"] = json!(proxy.in_place_of(&server));
    config["clusters"][0]["cluster"]["tls-server-name"] = json!("kubernetes.default.svc");
    let path = directory.join("kubeconfig");
    std::fs::write(&path, config.to_string()).unwrap();
    (proxy, path)
}

async fn object(cluster: &Cluster, name: &str) -> Option<Value> {
    let found = cluster.kubectl(&["get", "tenant", name, "--output=json", "--ignore-not-found"]).await;
    (!found.is_empty()).then(|| serde_json::from_str(&found).unwrap())
}

/// Waits until an object is as it should be.
async fn until_object(cluster: &Cluster, name: &str, is: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let found = object(cluster, name).await.unwrap_or_default();
        if is(&found) {
            return found;
        }
        assert!(Instant::now() < deadline, "{name} is still {found}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Tells what an object says, as its operator would.
async fn report(app: &TestApp, cluster: &Cluster, name: &str) -> State {
    let object = object(cluster, name).await.expect("the object");
    let spec = &object["spec"];
    let text = |field: &str| spec[field].as_str().map(str::to_owned);
    let report = Report {
        uid: object["metadata"]["uid"].as_str().unwrap().to_owned(),
        generation: object["metadata"]["generation"].as_i64().unwrap(),
        tenant: Registration {
            tenant_id: text("tenantId"),
            display_name: text("displayName").unwrap(),
            email: text("email").unwrap(),
            plan: text("plan").unwrap(),
            monthly_token_limit: spec["monthlyTokenLimit"].as_i64(),
            suspended: spec["suspended"].as_bool().unwrap_or(false),
        },
        provisioning: Default::default(),
    };
    let uid = cluster.kubectl(&["get", "namespace", "kube-system", "--output=jsonpath={.metadata.uid}"]).await;
    let request = http().put(format!("{}/operator/v1/tenants/{uid}/{name}", app.runtime_url()));
    let answer = request.header(VERSION_HEADER, VERSION).bearer_auth(OPERATOR_KEY).json(&report).send().await.unwrap();
    assert_eq!(answer.status(), 200, "{report:?}");
    answer.json().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_operators_service_account_is_let_in_and_nobody_else() {
    let cluster = cluster().await;
    let kubeconfig = cluster.kubeconfig_for("doors", "api").await;
    let app = TestApp::builder()
        .env("KUBECONFIG", &kubeconfig.display().to_string())
        .env("CLOISTER_CLUSTER__OPERATOR_SERVICE_ACCOUNT", "doors/operator")
        .start()
        .await;
    let token = async |account: &str, audience: &[&str]| {
        let make = ["create", "token", account, "--namespace", "doors"];
        cluster.kubectl(&[&make[..], audience].concat()).await.trim().to_owned()
    };
    let own = cluster.kubectl(&["get", "namespace", "kube-system", "--output=jsonpath={.metadata.uid}"]).await;
    let ask_of = async |token: &str, of: &str| {
        let request = http().put(format!("{}/operator/v1/clusters/{of}", app.runtime_url()));
        let request = request.header(VERSION_HEADER, VERSION).bearer_auth(token).json(&json!({"objects": []}));
        request.send().await.unwrap().status().as_u16()
    };
    let ask = async |token: &str| ask_of(token, &own).await;
    let ours = ["--audience=cloister-api"];
    let good = token("operator", &ours).await;
    for _ in 0..3 {
        assert_eq!(ask(&good).await, 204);
    }
    assert_eq!(ask_of(&good, "6f2c1a52-9f1e-4c57-8f0f-0d9b4c3e7a10").await, 401, "another cluster");
    for (bad, why) in [
        (token("operator", &[]).await, "a token for the API server"),
        (token("operator", &["--audience=other"]).await, "a token for somebody else"),
        (token("stranger", &ours).await, "another ServiceAccount"),
        (format!("{}x", good), "a forged one"),
        ("a.b.c".to_owned(), "nonsense"),
    ] {
        assert_eq!(ask(&bad).await, 401, "{why}");
    }
    assert!(!app.log().contains(&good));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_can_not_be_asked_about_is_told_to_come_again() {
    let cluster = cluster().await;
    let directory = tempfile::tempdir().unwrap();
    let (proxy, kubeconfig) = through_proxy(cluster, directory.path()).await;
    let app = TestApp::builder()
        .env("KUBECONFIG", &kubeconfig.display().to_string())
        .env("CLOISTER_CLUSTER__OPERATOR_SERVICE_ACCOUNT", "doors/operator")
        .start()
        .await;
    let make = ["create", "token", "operator", "--namespace", "doors", "--audience=cloister-api"];
    let token = cluster.kubectl(&make).await.trim().to_owned();
    let own = cluster.kubectl(&["get", "namespace", "kube-system", "--output=jsonpath={.metadata.uid}"]).await;
    let ask = async || {
        let request = http().put(format!("{}/operator/v1/clusters/{own}", app.runtime_url()));
        let request = request.header(VERSION_HEADER, VERSION).bearer_auth(&token).json(&json!({"objects": []}));
        request.send().await.unwrap().status().as_u16()
    };
    proxy.refuse();
    assert_eq!(ask().await, 503);
    proxy.restore();
    assert_eq!(ask().await, 204);
    // A token that was reviewed a moment ago needs no other review.
    proxy.refuse();
    assert_eq!(ask().await, 204);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_admin_does_is_written_to_the_object() {
    let cluster = cluster().await;
    let app = api(cluster).await;
    let input = json!({"name": "Acme", "email": "ops@acme.example", "plan": "ENTERPRISE", "monthlyTokenLimit": 5000});
    let id = done(&app, "createTenant", input).await["tenant"]["id"].as_str().unwrap().to_owned();
    let own = id.replace('_', "-");
    let made = object(cluster, &own).await.expect("the tenant's object");
    let said = |field: &str| made["spec"][field].clone();
    assert_eq!((said("tenantId"), said("displayName")), (json!(id), json!("Acme")));
    assert_eq!((said("plan"), said("monthlyTokenLimit")), (json!("enterprise"), json!(5000)));
    assert_eq!(said("suspended"), false);
    // Its operator is told what it knows.
    let state = report(&app, cluster, &own).await;
    assert_eq!((&state.tenant_id, state.suspended, state.usage.limit), (&id, None, 5000));

    done(&app, "updateTenant", json!({"tenantId": id, "name": "Acme Inc.", "monthlyTokenLimit": null})).await;
    let changed = object(cluster, &own).await.unwrap();
    assert_eq!(changed["spec"]["displayName"], "Acme Inc.");
    assert_eq!(changed["spec"].get("monthlyTokenLimit"), None);
    let suspended = done(&app, "suspendTenant", json!({"tenantId": id})).await;
    assert_eq!(suspended["tenant"]["status"], "SUSPENDED");
    assert_eq!(object(cluster, &own).await.unwrap()["spec"]["suspended"], true);
    // Both say so now, and one resume ends both; a report that is older than it changes nothing.
    assert_eq!(done(&app, "resumeTenant", json!({"tenantId": id})).await["tenant"]["status"], "ACTIVE");
    assert_eq!(object(cluster, &own).await.unwrap()["spec"]["suspended"], false);
    assert_eq!(report(&app, cluster, &own).await.suspended, None);
    let moved = done(&app, "setTenantPlan", json!({"tenantId": id, "plan": "PRO"})).await;
    assert_eq!(moved["tenant"]["plan"]["name"], "PRO");
    let changed = object(cluster, &own).await.unwrap();
    assert_eq!((&changed["spec"]["plan"], &changed["spec"]["email"]), (&json!("pro"), &json!("ops@acme.example")));

    assert_eq!(done(&app, "deleteTenant", json!({"tenantId": id})).await["deletedId"], json!(id));
    until_object(cluster, &own, Value::is_null).await;

    // One without an object gets it with the plan.
    let small = done(&app, "createTenant", json!({"name": "Small", "email": "a@small.example", "plan": "PRO"})).await;
    let id = small["tenant"]["id"].as_str().unwrap().to_owned();
    let own = id.replace('_', "-");
    assert_eq!(object(cluster, &own).await, None);
    done(&app, "setTenantPlan", json!({"tenantId": id, "plan": "ENTERPRISE"})).await;
    assert_eq!(object(cluster, &own).await.unwrap()["spec"]["plan"], "enterprise");
    done(&app, "deleteTenant", json!({"tenantId": id})).await;
    until_object(cluster, &own, Value::is_null).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_somebody_else_holds_is_theirs() {
    let cluster = cluster().await;
    let app = api(cluster).await;
    let own = name("held");
    let manifest = format!(
        "{{apiVersion: cloister.dev/v1alpha1, kind: Tenant, metadata: {{name: {own}}}, spec: {{displayName: Held, \
         email: ops@held.example, plan: enterprise, monthlyTokenLimit: 7, suspended: false}}}}"
    );
    cluster.apply(&manifest).await.unwrap();
    let id = report(&app, cluster, &own).await.tenant_id;
    for (mutation, input, field) in [
        ("updateTenant", json!({"tenantId": id, "name": "Mine"}), "name"),
        ("updateTenant", json!({"tenantId": id, "monthlyTokenLimit": null}), "monthlyTokenLimit"),
        ("setTenantPlan", json!({"tenantId": id, "plan": "PRO"}), "plan"),
    ] {
        let payload = mutate(&app, mutation, input).await;
        let error = &payload["errors"][0];
        assert_eq!((&error["code"], &error["field"]), (&json!("MANAGED_BY_CLUSTER"), &json!([field])), "{payload}");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains("kubectl") && message.contains(&own) && payload["tenant"].is_null(), "{payload}");
    }
    let before = object(cluster, &own).await.unwrap()["spec"].clone();
    assert_eq!(before["displayName"], "Held");
    // A suspension holds all the same, and so does a deletion; the object is left as it is, which is said.
    let suspended = ("suspendTenant", "SUSPENDED");
    for (mutation, status) in [suspended, ("resumeTenant", "ACTIVE"), suspended] {
        let payload = mutate(&app, mutation, json!({"tenantId": id})).await;
        assert_eq!(payload["tenant"]["status"], status, "{payload}");
        let is_said = payload["errors"][0]["code"] == "MANAGED_BY_CLUSTER";
        assert_eq!(is_said, status == "SUSPENDED", "{payload}");
    }
    let payload = mutate(&app, "deleteTenant", json!({"tenantId": id})).await;
    assert_eq!((&payload["deletedId"], &payload["errors"][0]["code"]), (&json!(id), &json!("MANAGED_BY_CLUSTER")));
    assert_eq!(object(cluster, &own).await.unwrap()["spec"], before);
    cluster.kubectl(&["delete", "tenant", &own]).await;

    // A field that nobody holds the api takes, and what it holds it keeps beside others' changes.
    let own = name("shared");
    let manifest = |name: &str| {
        format!(
            "{{apiVersion: cloister.dev/v1alpha1, kind: Tenant, metadata: {{name: {own}}}, \
             spec: {{displayName: {name}, email: ops@shared.example, plan: enterprise}}}}"
        )
    };
    cluster.apply(&manifest("First")).await.unwrap();
    let id = report(&app, cluster, &own).await.tenant_id;
    done(&app, "updateTenant", json!({"tenantId": id, "monthlyTokenLimit": 9})).await;
    done(&app, "suspendTenant", json!({"tenantId": id})).await;
    cluster.apply(&manifest("Second")).await.unwrap();
    let spec = object(cluster, &own).await.unwrap()["spec"].clone();
    assert_eq!((&spec["displayName"], &spec["monthlyTokenLimit"]), (&json!("Second"), &json!(9)));
    assert_eq!(spec["suspended"], true);
    let state = report(&app, cluster, &own).await;
    assert_eq!((state.usage.limit, state.suspended), (9, Some(crds::protocol::Suspension::Requested)));
    cluster.kubectl(&["delete", "tenant", &own]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_cluster_was_away_for_is_written_later() {
    let cluster = cluster().await;
    let directory = tempfile::tempdir().unwrap();
    let (proxy, kubeconfig) = through_proxy(cluster, directory.path()).await;
    let mut app = inside(TestApp::builder(), &kubeconfig).start().await;
    proxy.refuse();
    let input = json!({"name": "Away", "email": "ops@away.example", "plan": "ENTERPRISE"});
    let payload = mutate(&app, "createTenant", input).await;
    // It is there, and it is said that its object isn't yet.
    let id = payload["tenant"]["id"].as_str().unwrap().to_owned();
    assert_eq!(payload["errors"][0]["code"], "CLUSTER_UNAVAILABLE", "{payload}");
    let own = id.replace('_', "-");
    let payload = mutate(&app, "suspendTenant", json!({"tenantId": id})).await;
    assert_eq!(payload["tenant"]["status"], "SUSPENDED", "{payload}");
    assert_eq!(payload["errors"][0]["code"], "CLUSTER_UNAVAILABLE", "{payload}");
    // While nothing rules it, it may be changed; and what is owed outlives the process.
    let payload = mutate(&app, "updateTenant", json!({"tenantId": id, "name": "Still away"})).await;
    assert_eq!(payload["tenant"]["name"], "Still away", "{payload}");
    app.terminate().await;
    app.restart().await;
    assert_eq!(object(cluster, &own).await, None);
    proxy.restore();
    let made = until_object(cluster, &own, |object| !object.is_null()).await;
    assert_eq!((&made["spec"]["displayName"], &made["spec"]["suspended"]), (&json!("Still away"), &json!(true)));

    // What the object decides can't be changed without it.
    proxy.refuse();
    let payload = mutate(&app, "updateTenant", json!({"tenantId": id, "name": "Never"})).await;
    assert_eq!(payload["errors"][0]["code"], "CLUSTER_UNAVAILABLE", "{payload}");
    assert!(payload["tenant"].is_null(), "{payload}");
    // Its end holds at once.
    let payload = mutate(&app, "deleteTenant", json!({"tenantId": id})).await;
    assert_eq!((&payload["deletedId"], &payload["errors"][0]["code"]), (&json!(id), &json!("CLUSTER_UNAVAILABLE")));
    assert_eq!(object(cluster, &own).await.unwrap()["spec"]["displayName"], "Still away");
    proxy.restore();
    until_object(cluster, &own, Value::is_null).await;
}
