//! The operator at work: on a real API server with real controllers, where pods are said to run, with the rights that the
//! chart gives it and a real api beside it. What a `Tenant` becomes, that it stays so, and how it ends.

mod attacks;
mod definition;
mod drift;
mod faults;
mod life;
mod objects;
mod rights;
mod settled;

use std::sync::LazyLock;
use std::time::Duration;

use cloister_tests::client::http;
use cloister_tests::operator::{OPERATOR_KEY, OPERATOR_NAMESPACE};
use cloister_tests::{Client, Cluster, Gate, ModelServer, Operator, Proxy, Tenant, TestApp};
use reqwest::Method;
use serde_json::{Map, Value, json};
use tokio::runtime::Runtime;
use tokio::sync::{OnceCell, RwLock};
use tokio::time::Instant;

use crate::charts::{objects, render_set};

/// How long anything takes at most that the operator is to bring about, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// What the operator does with everything in a tenant's namespace.
const MANAGER: &str = "cloister-operator";
/// Seconds that runs may go on before a namespace is removed.
const DRAIN_SECONDS: &str = "20";

/// The kinds in a tenant's namespace, each with the path of its group.
const KINDS: [(&str, &str); 7] = [
    ("resourcequotas", "/api/v1"),
    ("limitranges", "/api/v1"),
    ("serviceaccounts", "/api/v1"),
    ("secrets", "/api/v1"),
    ("networkpolicies", "/apis/networking.k8s.io/v1"),
    ("deployments", "/apis/apps/v1"),
    ("poddisruptionbudgets", "/apis/policy/v1"),
];

/// A cluster with an api and an operator.
struct Platform {
    cluster: Cluster,
    /// The API server, with an admin's rights.
    admin: Gate,
    /// The API server as the operator reaches it.
    gate: Gate,
    /// The operator's way to the api.
    way: Proxy,
    model: ModelServer,
    app: TestApp,
    /// Locked alone by tests that end it, or that take the api away from it.
    operator: RwLock<Operator>,
}

/// Serves the platform's own parts for as long as the process lives; each test has a runtime of its own.
static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().expect("a runtime"));

/// The platform that tests share, each with tenants of its own.
async fn platform() -> &'static Platform {
    static PLATFORM: OnceCell<Platform> = OnceCell::const_new();
    let start = async || RUNTIME.spawn(Platform::start()).await.expect("the platform starts");
    PLATFORM.get_or_init(start).await
}

impl Platform {
    async fn start() -> Platform {
        let cluster = Cluster::simulated().await;
        cluster.apply(include_str!("../../../../crds/tenants.yaml")).await.expect("the definition is applied");
        cluster.kubectl(&["wait", "--for=condition=Established", "crd/tenants.cloister.dev", "--timeout=30s"]).await;
        cluster.kubectl(&["create", "namespace", OPERATOR_NAMESPACE]).await;
        let rights = ["ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"];
        let rendered = objects(&render_set(&cluster, "embedded"));
        let rights = rendered.iter().filter(|object| rights.iter().any(|kind| object["kind"] == *kind));
        let rights: Vec<_> = rights.map(Value::to_string).collect();
        cluster.apply(&rights.join("\n---\n")).await.expect("the chart's rights");
        cluster.kubectl(&["create", "serviceaccount", "admin", "--namespace", OPERATOR_NAMESPACE]).await;
        let admin = format!("--serviceaccount={OPERATOR_NAMESPACE}:admin");
        cluster.kubectl(&["create", "clusterrolebinding", "admin", "--clusterrole=cluster-admin", &admin]).await;
        let account = async |name: &str| cluster.kubeconfig_for(OPERATOR_NAMESPACE, name).await;
        let (admin, gate) = (Gate::open(&account("admin").await).await, Gate::open(&account(MANAGER).await).await);

        let model = ModelServer::start().await;
        let app = TestApp::builder()
            .model_server(&model)
            .env("KUBECONFIG", &account("cloister-api").await.display().to_string())
            .env("CLOISTER_CLUSTER__ENABLED", "true")
            .env("CLOISTER_CLUSTER__OPERATOR_KEY", OPERATOR_KEY)
            .start()
            .await;
        let way = Proxy::start(app.runtime_url().trim_start_matches("http://").parse().expect("an address")).await;
        let operator = Operator::builder(&gate.kubeconfig(), &way.in_place_of(&app.runtime_url()))
            .env("CLOISTER_OPERATOR__DRAIN_SECONDS", DRAIN_SECONDS)
            .env("CLOISTER_OPERATOR__SCALE_DOWN_SECONDS", "2")
            .env("CLOISTER_OPERATOR__RUNTIME_CLASSES", "gvisor")
            .start()
            .await;
        let platform = Platform { cluster, admin, gate, way, model, app, operator: RwLock::new(operator) };
        platform.leads(&*platform.operator.read().await).await;
        platform
    }

    /// Waits until the operator looks after tenants.
    async fn leads(&self, operator: &Operator) {
        let leads = async || operator.log().contains("looking after tenants");
        until("the operator leads", leads, |leads| *leads).await;
    }

    /// Asks the API server as an admin.
    async fn send(&self, method: Method, path: &str, body: Option<(&str, Value)>) -> Result<Value, String> {
        let mut request = http().request(method.clone(), self.admin.url(path));
        if let Some((kind, body)) = body {
            request = request.header("content-type", kind).body(body.to_string());
        }
        let answer = request.send().await.expect("the API server answers");
        let status = answer.status();
        let body = answer.text().await.expect("a text");
        match status.is_success() {
            true => Ok(serde_json::from_str(&body).expect("JSON")),
            false => Err(format!("{method} {path}: {status}: {body}")),
        }
    }

    /// An object; none if it isn't there.
    async fn get(&self, path: &str) -> Option<Value> {
        match self.send(Method::GET, path, None).await {
            Ok(object) => Some(object),
            Err(error) if error.contains("\"code\":404") => None,
            Err(error) => panic!("{error}"),
        }
    }

    /// Merges into an object, as somebody other than the operator.
    async fn merge(&self, path: &str, patch: Value) -> Result<Value, String> {
        let path = format!("{path}?fieldManager=intruder");
        self.send(Method::PATCH, &path, Some(("application/merge-patch+json", patch))).await
    }

    async fn create(&self, path: &str, object: Value) -> Result<Value, String> {
        self.send(Method::POST, &format!("{path}?fieldManager=intruder"), Some(("application/json", object))).await
    }

    async fn delete(&self, path: &str) {
        self.send(Method::DELETE, path, None).await.expect("it is deleted");
    }

    /// Applies a Tenant with this spec, as `kubectl apply --server-side` does.
    async fn try_tenant(&self, name: &str, spec: Value) -> Result<Value, String> {
        let mut whole = json!({"displayName": name, "email": format!("ops@{name}.example"), "plan": "enterprise"});
        whole.as_object_mut().unwrap().extend(spec.as_object().expect("a spec").clone());
        let body = json!({"apiVersion": "cloister.dev/v1alpha1", "kind": "Tenant", "metadata": {"name": name},
            "spec": whole});
        let path = format!("{}?fieldManager=gitops&force=true", tenant_path(name));
        self.send(Method::PATCH, &path, Some(("application/apply-patch+yaml", body))).await
    }

    async fn tenant(&self, name: &str, spec: Value) {
        self.try_tenant(name, spec).await.expect("the Tenant is applied");
    }

    /// Applies a Tenant and waits until it is Ready.
    async fn ready(&self, name: &str, spec: Value) -> Value {
        self.tenant(name, spec).await;
        self.phase(name, "Ready").await
    }

    /// Waits until a Tenant is in a phase that its operator found for the spec as it is.
    async fn phase(&self, name: &str, phase: &str) -> Value {
        self.until(name, phase, |tenant| {
            tenant["status"]["phase"] == phase
                && tenant["status"]["observedGeneration"] == tenant["metadata"]["generation"]
        })
        .await
    }

    /// Waits until a Tenant is as it should be.
    async fn until(&self, name: &str, what: &str, is: impl Fn(&Value) -> bool) -> Value {
        let path = tenant_path(name);
        let look = async || self.get(&path).await.unwrap_or_default();
        until(&format!("{name}: {what}"), look, is).await
    }

    /// Waits until there is no object at a path.
    async fn gone(&self, path: &str) {
        until(&format!("{path} is gone"), async || self.get(path).await, Option::is_none).await;
    }

    async fn end(&self, name: &str) {
        self.delete(&tenant_path(name)).await;
        self.gone(&tenant_path(name)).await;
    }

    /// Everything of a tenant's in the cluster, without what differs from one time to the next.
    async fn state(&self, name: &str) -> Value {
        let mut state = Map::new();
        state.insert("namespace".into(), plain(name, self.get(&namespace_path(name)).await));
        for (kind, _) in KINDS {
            state.insert(kind.into(), plain(name, self.get(&child_path(name, kind)).await));
        }
        Value::Object(state)
    }

    /// A client for a tenant that an object made, and its id.
    async fn client(&self, name: &str) -> Tenant {
        let tenant = self.until(name, "registered", |tenant| tenant["status"]["tenantId"].is_string()).await;
        let id = tenant["status"]["tenantId"].as_str().expect("an id").to_owned();
        let create =
            "mutation ($input: CreateApiKeyInput!) { createApiKey(input: $input) { secret errors { message } } }";
        let input = json!({"tenantId": id, "name": "test", "scopes": ["READ", "RUN", "MANAGE", "BILLING"]});
        let made = self.app.admin().data(create, json!({"input": input})).await["createApiKey"].clone();
        let key = made["secret"].as_str().expect("a key").to_owned();
        Tenant { id, client: self.app.client(&key), key }
    }

    /// The operator, which no other test disturbs for so long.
    async fn undisturbed(&self) -> tokio::sync::RwLockReadGuard<'_, Operator> {
        self.operator.read().await
    }
}

fn tenant_path(name: &str) -> String {
    format!("/apis/cloister.dev/v1alpha1/tenants/{name}")
}

fn namespace_path(name: &str) -> String {
    format!("/api/v1/namespaces/tenant-{name}")
}

/// The path of the operator's object of a kind.
fn child_path(name: &str, kind: &str) -> String {
    format!("{}/cloister-runtime", kind_path(name, kind))
}

fn kind_path(name: &str, kind: &str) -> String {
    let (_, group) = KINDS.iter().find(|(known, _)| *known == kind).expect("a kind");
    format!("{group}/namespaces/tenant-{name}/{kind}")
}

/// An object without what differs from one time to the next, under a name that all share.
fn plain(name: &str, object: Option<Value>) -> Value {
    let Some(mut object) = object else { return Value::Null };
    let is_secret = object["kind"] == "Secret";
    let fields = object.as_object_mut().expect("an object");
    fields.remove("status");
    if is_secret {
        // Which token it is.
        let keys: Vec<_> = fields["data"].as_object().expect("data").keys().cloned().collect();
        fields.insert("data".into(), json!(keys));
        let annotations: Vec<_> = fields["metadata"]["annotations"].as_object().into_iter().flatten().collect();
        fields["metadata"]["annotations"] = annotations.into_iter().map(|(key, _)| json!(key)).collect();
    }
    let metadata = fields["metadata"].as_object_mut().expect("metadata");
    for varying in ["uid", "resourceVersion", "creationTimestamp", "managedFields", "generation"] {
        metadata.remove(varying);
    }
    if let Some(annotations) = metadata.get_mut("annotations").and_then(Value::as_object_mut) {
        annotations.remove("deployment.kubernetes.io/revision");
        annotations.remove("cloister.dev/tenant-uid");
    }
    let text = object.to_string().replace(name, "NAME");
    serde_json::from_str(&text).expect("JSON")
}

/// The status and reason of a condition.
fn condition(tenant: &Value, r#type: &str) -> (String, String) {
    let conditions = tenant["status"]["conditions"].as_array().into_iter().flatten();
    let found = conditions.into_iter().find(|condition| condition["type"] == r#type).cloned().unwrap_or_default();
    let text = |field: &str| found[field].as_str().unwrap_or_default().to_owned();
    (text("status"), text("reason"))
}

fn message(tenant: &Value, r#type: &str) -> String {
    let conditions = tenant["status"]["conditions"].as_array().into_iter().flatten();
    let found = conditions.into_iter().find(|condition| condition["type"] == r#type);
    found.and_then(|condition| condition["message"].as_str()).unwrap_or_default().to_owned()
}

fn is(tenant: &Value, r#type: &str, status: &str, reason: &str) -> bool {
    condition(tenant, r#type) == (status.to_owned(), reason.to_owned())
}

/// Asks until the answer is as it should be.
async fn until<T: std::fmt::Debug, F: Future<Output = T>>(
    what: &str,
    ask: impl Fn() -> F,
    is: impl Fn(&T) -> bool,
) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = ask().await;
        if is(&answer) {
            return answer;
        }
        assert!(Instant::now() < deadline, "not in time: {what}; it is {answer:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// An agent of the scripted model's.
async fn agent(client: &Client) -> String {
    let create =
        "mutation ($input: CreateAgentInput!) { createAgent(input: $input) { agent { id } errors { message } } }";
    let input = json!({"name": "Agent", "model": "scripted", "instructions": "Answer.", "publish": true});
    let made = client.data(create, json!({"input": input})).await["createAgent"].clone();
    made["agent"]["id"].as_str().unwrap_or_else(|| panic!("{made}")).to_owned()
}

async fn start(client: &Client, agent: &str) -> String {
    let start = "mutation ($input: StartRunInput!) { startRun(input: $input) { run { id } errors { code message } } }";
    let made = client.data(start, json!({"input": {"agentId": agent, "input": "Hi"}})).await["startRun"].clone();
    made["run"]["id"].as_str().unwrap_or_else(|| panic!("{made}")).to_owned()
}

async fn run(client: &Client, id: &str) -> Value {
    client.data("query ($id: ID!) { run(id: $id) { status worker } }", json!({"id": id})).await["run"].clone()
}

async fn run_is(client: &Client, id: &str, status: &str) -> Value {
    until(&format!("the run is {status}"), async || run(client, id).await, |run| run["status"] == status).await
}
