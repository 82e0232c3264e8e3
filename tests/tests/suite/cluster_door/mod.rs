//! `/operator/v1`: what operators tell of their objects and are told, played by the test. The real operator and a real
//! cluster have tests of their own.

mod changes;
mod credential;
mod farewell;
mod provisioning;
mod registration;
mod suspension;
mod tokens;

use cloister_tests::app::TestAppBuilder;
use cloister_tests::client::http;
use cloister_tests::{Client, Tenant, TestApp};
use crds::protocol::{
    Changes, Departure, Farewell, Inventory, Object, Provisioning, Registration, Report, State, Token, VERSION,
    VERSION_HEADER,
};
use reqwest::Method;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::calls::new_key;

/// The operator's key.
const KEY: &str = cloister_tests::operator::OPERATOR_KEY;
/// The UID of a cluster.
const CLUSTER: &str = "6f2c1a52-9f1e-4c57-8f0f-0d9b4c3e7a10";

/// An api that has an operator.
fn with_operator(builder: TestAppBuilder) -> TestAppBuilder {
    builder.env("CLOISTER_CLUSTER__OPERATOR_KEY", KEY)
}

/// What stands in place of an operator.
#[derive(Clone)]
struct Operator {
    base: String,
    cluster: String,
}

/// A refusal's status and code, and its message.
type Refused = (u16, String, String);

impl Operator {
    fn of(app: &TestApp) -> Operator {
        Operator { base: format!("{}/operator/v1", app.runtime_url()), cluster: CLUSTER.to_owned() }
    }

    fn in_cluster(&self, cluster: &str) -> Operator {
        Operator { cluster: cluster.to_owned(), ..self.clone() }
    }

    fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        http().request(method, format!("{}/{path}", self.base)).header(VERSION_HEADER, VERSION).bearer_auth(KEY)
    }

    async fn send<T: DeserializeOwned>(&self, request: reqwest::RequestBuilder) -> Result<T, Refused> {
        let answer = request.send().await.unwrap();
        let (status, body) = (answer.status(), answer.text().await.unwrap());
        let body: Value = serde_json::from_str(&body).unwrap_or(Value::Null);
        if status.is_success() {
            return Ok(serde_json::from_value(body).unwrap());
        }
        let text = |name: &str| body[name].as_str().unwrap_or_default().to_owned();
        Err((status.as_u16(), text("code"), text("message")))
    }

    async fn put<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, Refused> {
        self.send(self.request(Method::PUT, path).json(body)).await
    }

    fn path(&self, name: &str) -> String {
        format!("tenants/{}/{name}", self.cluster)
    }

    async fn try_report(&self, name: &str, report: &Report) -> Result<State, Refused> {
        self.put(&self.path(name), report).await
    }

    async fn report(&self, name: &str, report: &Report) -> State {
        self.try_report(name, report).await.unwrap()
    }

    async fn farewell(&self, name: &str, said: Farewell) -> Departure {
        self.send(self.request(Method::DELETE, &self.path(name)).json(&said)).await.unwrap()
    }

    async fn token(&self, name: &str, rotation: i64) -> Result<Token, Refused> {
        let path = format!("{}/tokens", self.path(name));
        self.send(self.request(Method::POST, &path).json(&json!({"rotation": rotation}))).await
    }

    async fn changes(&self, after: Option<&str>) -> Changes {
        let after = after.map(|after| format!("?after={after}")).unwrap_or_default();
        self.send(self.request(Method::GET, &format!("changes/{}{after}", self.cluster))).await.unwrap()
    }

    async fn inventory(&self, objects: &[(&str, &str)]) {
        let objects = objects.iter().map(|(name, uid)| Object { name: (*name).into(), uid: (*uid).into() });
        let inventory = Inventory { objects: objects.collect() };
        let _: Value = self.put(&format!("clusters/{}", self.cluster), &inventory).await.unwrap();
    }
}

/// What a new object on a plan says.
fn report(name: &str, plan: &str) -> Report {
    Report {
        uid: format!("{name}-1"),
        generation: 1,
        tenant: Registration {
            tenant_id: None,
            display_name: format!("{name} Inc."),
            email: format!("ops@{name}.example"),
            plan: plan.to_owned(),
            monthly_token_limit: None,
            suspended: false,
        },
        provisioning: Provisioning::default(),
    }
}

/// The same object, changed.
fn changed(report: &Report, change: impl FnOnce(&mut Registration)) -> Report {
    let mut report = report.clone();
    report.generation += 1;
    change(&mut report.tenant);
    report
}

fn bye(uid: &str, retain: bool) -> Farewell {
    Farewell { uid: uid.to_owned(), retain, cancel: false, deregister: false }
}

/// A client for a tenant that an object made.
async fn tenant(app: &TestApp, state: &State) -> Tenant {
    let scopes = ["READ", "RUN", "MANAGE", "BILLING"];
    let input = json!({"tenantId": state.tenant_id, "name": "test", "scopes": scopes});
    let (_, key) = new_key(&app.admin(), input).await;
    Tenant { id: state.tenant_id.clone(), client: app.client(&key), key }
}

/// What the admin sees of a tenant.
async fn seen(admin: &Client, id: &str) -> Value {
    let query = "query ($id: ID!) { tenantById(id: $id) {
        name email status monthlyTokenLimit plan { name } isolation provisioning { objectName phase }
    } }";
    admin.data(query, json!({"id": id})).await["tenantById"].clone()
}

/// Whether a tenant's key is let in.
async fn is_served(tenant: &Tenant) -> bool {
    let answer = tenant.client.query("{ viewer { scopes } }", json!({})).await;
    if answer.status.is_success() {
        return true;
    }
    assert_eq!(answer.error_code(), Some("TENANT_SUSPENDED"), "{}", answer.body);
    false
}
