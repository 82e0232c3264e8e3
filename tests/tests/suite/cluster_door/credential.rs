//! Who may speak as an operator, and in which version.

use cloister_tests::TestApp;
use cloister_tests::client::http;
use crds::protocol::{VERSION, VERSION_HEADER};
use reqwest::Method;
use serde_json::{Value, json};

use super::{KEY, Operator, report, with_operator};
use crate::calls::tenant_rows;

/// All routes.
fn routes() -> Vec<(Method, &'static str)> {
    vec![
        (Method::PUT, "tenants/c/acme"),
        (Method::DELETE, "tenants/c/acme"),
        (Method::POST, "tenants/c/acme/tokens"),
        (Method::GET, "changes/c"),
        (Method::PUT, "clusters/c"),
    ]
}

async fn answer(app: &TestApp, method: Method, path: &str, version: Option<&str>, key: Option<&str>) -> (u16, Value) {
    let mut request = http().request(method, format!("{}/operator/v1/{path}", app.runtime_url()));
    if let Some(version) = version {
        request = request.header(VERSION_HEADER, version);
    }
    if let Some(key) = key {
        request = request.bearer_auth(key);
    }
    let answer = request.json(&json!({})).send().await.unwrap();
    assert_eq!(answer.headers()[VERSION_HEADER], VERSION);
    let status = answer.status().as_u16();
    (status, answer.json().await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn only_an_operator_is_let_in() {
    let app = with_operator(TestApp::builder()).start().await;
    let tenant = app.tenant_with("acme", json!({"plan": "ENTERPRISE"})).await;
    let (_, worker) = cloister_tests::Worker::token(&app, &tenant).await;
    let rows = tenant_rows(&app, &tenant.id).await;
    let cut = &KEY[..KEY.len() - 1];
    for (method, path) in routes() {
        // Neither the admin, nor a tenant, nor its worker, nor who has nearly the key.
        for key in [None, Some(app.admin_key.as_str()), Some(&tenant.key), Some(&worker), Some(cut), Some("a.b.c")] {
            let (status, body) = answer(&app, method.clone(), path, Some(VERSION), key).await;
            assert_eq!((status, &body["code"]), (401, &json!("UNAUTHENTICATED")), "{method} {path}");
        }
        for version in [None, Some("0"), Some("2")] {
            let (status, body) = answer(&app, method.clone(), path, version, Some(KEY)).await;
            assert_eq!((status, &body["code"]), (426, &json!("PROTOCOL_VERSION")), "{method} {path}");
        }
    }
    assert_eq!(tenant_rows(&app, &tenant.id).await, rows);
    // The key opens nothing else, and the port for clients has none of it.
    assert_eq!(app.client(KEY).query("{ viewer { scopes } }", json!({})).await.status, 401);
    let claims = http().post(format!("{}/runtime/v1/claims", app.runtime_url())).header("cloister-protocol", "1");
    assert_eq!(claims.bearer_auth(KEY).json(&json!({"max": 1, "wait_ms": 0})).send().await.unwrap().status(), 401);
    let door = http().put(format!("{}/operator/v1/tenants/c/acme", app.url())).header(VERSION_HEADER, VERSION);
    assert_eq!(door.bearer_auth(KEY).json(&report("acme", "pro")).send().await.unwrap().status(), 404);
    let metrics = app.admin().request(Method::GET, "/metrics").send().await.unwrap().text().await.unwrap();
    assert!(metrics.contains("cloister_operator_refusals_total{code=\"unauthenticated\"} 30"), "{metrics}");
    assert!(!app.log().contains(KEY));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_without_operators_says_so() {
    let app = TestApp::start().await;
    for (method, path) in routes() {
        let (status, body) = answer(&app, method, path, Some(VERSION), Some(KEY)).await;
        assert_eq!((status, &body["code"]), (503, &json!("UNAVAILABLE")));
        assert!(body["message"].as_str().unwrap().contains("cluster.operator_key"), "{body}");
    }
    let refused = Operator::of(&app).try_report("acme", &report("acme", "pro")).await.unwrap_err();
    assert_eq!(refused.0, 503);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_that_can_not_be_reached_stops_the_start_or_the_operator() {
    let app = TestApp::start().await;
    for (name, value, named) in [
        ("CLOISTER_CLUSTER__OPERATOR_KEY", "short", "cluster.operator_key"),
        ("CLOISTER_CLUSTER__OPERATOR_SERVICE_ACCOUNT", "operator", "cluster.operator_service_account"),
        ("CLOISTER_CLUSTER__ENABLED", "true", "KUBECONFIG"),
        ("CLOISTER_CLUSTER__ENABLED", "perhaps", "enabled"),
    ] {
        let mut command = app.command(&["serve"]);
        let database = format!("sqlite://{}", "other.db");
        command.env("KUBECONFIG", "missing.yaml").env("CLOISTER_DATABASE__URL", database).env(name, value);
        assert!(
            app.command(&["migrate"]).env("CLOISTER_DATABASE__URL", "sqlite://other.db").status().unwrap().success()
        );
        let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(named), "{name}={value}: {said}");
    }
}
