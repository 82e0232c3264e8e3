//! The charts installed on a cluster of their own, and what a test does with them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use cloister_tests::app::{PROVIDER_KEY, scripted_model};
use cloister_tests::cluster::PROBE_IMAGE;
use cloister_tests::key::random_key;
use cloister_tests::postgres::PostgresServer;
use cloister_tests::{Client, Cluster, ModelServer, RedisServer, Reply, Tenant};
use serde_json::{Value, json};
use tokio::process::Command;
use tokio::runtime::Runtime;
use tokio::sync::{OnceCell, RwLock};

/// The namespace of the release, and the release.
pub const NAMESPACE: &str = "cloister";
/// The group that the admission policies let through.
pub const BREAK_GLASS: [&str; 3] = ["--as=alice", "--as-group=cloister:break-glass", "--as-group=system:masters"];
/// What every tenant's objects are called.
pub const NAME: &str = "cloister-runtime";
/// A namespace without policies, whose pods reach whatever is there to be reached.
pub const OUTSIDE: &str = "outside";
/// The pod in it, which serves HTTP on port 8080.
pub const OUTSIDER: &str = "outsider";

/// The volume that SQLite's claim finds.
const DISK: &str = "disk";
const NODE_PORT: u16 = 30_080;
/// How long pods may take to start, on a machine that does other things too.
const PATIENCE: Duration = Duration::from_secs(120);

/// Held to read by tests that need the pods to stay as they are, and to write by those that replace them.
pub static PODS: RwLock<()> = RwLock::const_new(());

/// A release on a cluster of its own.
pub struct Platform {
    pub cluster: Cluster,
    pub model: ModelServer,
    /// None on SQLite.
    pub services: Option<Services>,
    pub images: Images,
    admin_key: String,
    values: Value,
}

/// What a release with several replicas stands on, on this machine, where pods reach it.
pub struct Services {
    pub postgres: PostgresServer,
    pub redis: RedisServer,
}

/// The images that were built.
#[derive(Clone)]
pub struct Images {
    pub tag: String,
    pub archives: Vec<PathBuf>,
}

impl Platform {
    /// The one that tests share: PostgreSQL, Redis, two replicas. Tests keep to tenants of their own.
    pub async fn shared() -> &'static Platform {
        /// It lives longer than the test that happens to be the first, and so must what it runs on.
        static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().expect("a runtime"));
        static SHARED: OnceCell<Platform> = OnceCell::const_new();
        let start = async || {
            let start = async {
                let platform = Platform::prepare(true).await;
                platform.upgrade(&json!({})).await;
                platform
            };
            RUNTIME.spawn(start).await.expect("the platform is installed")
        };
        SHARED.get_or_init(start).await
    }

    /// A cluster with the images, the chart of the CRD, the Secrets and what they lead to; the platform is yet to be
    /// installed.
    pub async fn prepare(is_distributed: bool) -> Platform {
        let (cluster, images) = tokio::join!(Cluster::own(), images());
        let host = cluster.host();
        let model = ModelServer::listen((host, 0).into()).await.expect("a free port");
        model.always(|request| answer(&request.last_user_text()));
        let services = match is_distributed {
            true => {
                Some(Services { postgres: PostgresServer::listen(host).await, redis: RedisServer::listen(host).await })
            }
            false => None,
        };
        for archive in &images.archives {
            cluster.load_image(archive).await;
        }
        let admin_key = random_key();
        let mut platform =
            Platform { cluster, model, services, images: images.clone(), admin_key, values: Value::Null };
        platform.values = platform.values();
        let crds = ["install", "cloister-crds", &chart("cloister-crds"), "--create-namespace"];
        platform.helm(&crds).await.expect("the chart of the CRD is installed");
        platform.cluster.apply(&platform.preparations()).await.expect("namespaces, Secrets and the pod outside");
        platform
    }

    /// The release's namespace as restricted as it may be, the Secrets that the values name, and a pod to compare with.
    fn preparations(&self) -> String {
        let secret = |name: &str, data: BTreeMap<&str, String>| {
            json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": NAMESPACE},
                "stringData": data})
        };
        let restricted = json!({"pod-security.kubernetes.io/enforce": "restricted"});
        let key = BASE64_STANDARD.encode(rand::random::<[u8; 32]>());
        let mut objects = vec![
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": restricted}}),
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": OUTSIDE}}),
            json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": OUTSIDER, "namespace": OUTSIDE},
                "spec": confined_pod("10m")}),
            secret("cloister-keys", [("key", key), ("admin-key", self.admin_key.clone())].into()),
        ];
        match &self.services {
            Some(Services { postgres, redis }) => {
                objects.push(secret("cloister-postgres", [("url", postgres.url().to_string())].into()));
                objects.push(secret("cloister-redis", [("url", redis.url())].into()));
            }
            None => objects.push(disk()),
        }
        json!({"apiVersion": "v1", "kind": "List", "items": objects}).to_string()
    }

    fn values(&self) -> Value {
        let little = json!({"requests": {"cpu": "20m", "memory": "32Mi"}, "limits": {"memory": "1Gi"}});
        let mut values = json!({
            "image": {"registry": "localhost", "tag": self.images.tag, "pullPolicy": "Never"},
            "secrets": {"existingSecret": "cloister-keys"},
            "api": {
                "service": {"type": "NodePort", "nodePort": NODE_PORT},
                "config": scripted_model(),
                "env": [
                    {"name": "CLOISTER_PROVIDERS__SCRIPTED__BASE_URL", "value": self.model.url()},
                    {"name": "CLOISTER_PROVIDERS__SCRIPTED__API_KEY", "value": PROVIDER_KEY},
                ],
                "resources": little,
            },
            "operator": {"resources": little},
            "networkPolicy": {"operator": {"metricsFrom": [
                {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": OUTSIDE}}},
            ]}},
        });
        let more = match self.services {
            Some(_) => json!({
                "api": {"replicas": 2},
                "database": {"type": "postgres", "postgres": {"existingSecret": "cloister-postgres"}},
                "redis": {"existingSecret": "cloister-redis"},
            }),
            None => json!({"database": {"sqlite": {"persistence": {"storageClassName": DISK, "size": "1Gi"}}}}),
        };
        merge(&mut values, more);
        values
    }

    /// `helm upgrade --install`, with these values over those that it has, until it is ready.
    pub async fn upgrade(&self, changes: &Value) {
        let mut values = self.values.clone();
        merge(&mut values, changes.clone());
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), values.to_string()).expect("it is written");
        let values = file.path().to_str().expect("a path in UTF-8");
        let chart = chart("cloister");
        let arguments = ["upgrade", "--install", "cloister", &chart, "--values", values, "--wait", "--timeout", "3m"];
        self.helm(&arguments).await.unwrap_or_else(|error| panic!("the release is not installed: {error}"));
    }

    /// Runs Helm for the release's namespace.
    pub async fn helm(&self, arguments: &[&str]) -> Result<String, String> {
        let mut helm = Command::new(self.cluster.program("helm"));
        helm.arg("--kubeconfig").arg(self.cluster.kubeconfig()).args(["--namespace", NAMESPACE]).args(arguments);
        let output = helm.kill_on_drop(true).output().await.expect("helm runs");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    /// Applies an object as somebody else.
    pub async fn apply_as(&self, who: &[&str], object: &Value) -> Result<String, String> {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), object.to_string()).expect("it is written");
        let path = file.path().to_str().expect("a path in UTF-8");
        let apply = ["apply", "--server-side", "--force-conflicts", "--field-manager=test", "--filename", path];
        self.cluster.try_kubectl(&[who, &apply].concat()).await
    }

    /// The address of the api's clients' port.
    pub fn url(&self) -> String {
        format!("http://{}:{NODE_PORT}", self.cluster.node())
    }

    pub fn admin(&self) -> Client {
        Client::new(&self.url(), &self.admin_key)
    }

    /// Applies a `Tenant` with these fields of its spec, and returns once it is Ready, with a key of its own.
    pub async fn tenant(&self, name: &str, fields: Value) -> Tenant {
        self.apply_tenant(name, fields).await;
        self.until_ready(name).await;
        let id = self.field(&["tenant", name], "{.status.tenantId}").await;
        let create_key = "mutation ($input: CreateApiKeyInput!) {
            createApiKey(input: $input) { secret errors { code message field } }
        }";
        let input = json!({"tenantId": id, "name": "test", "scopes": ["READ", "RUN", "MANAGE", "BILLING"]});
        let made = self.admin().query(create_key, json!({"input": input})).await;
        let key = made.payload("createApiKey")["secret"].as_str().expect("a secret").to_owned();
        Tenant { id, client: Client::new(&self.url(), &key), key }
    }

    /// Applies a `Tenant`: of the enterprise plan with small workers, where its fields don't say otherwise.
    pub async fn apply_tenant(&self, name: &str, fields: Value) {
        let resources =
            json!({"requests": {"cpu": "20m", "memory": "32Mi"}, "limits": {"cpu": "1", "memory": "256Mi"}});
        let mut spec = json!({"displayName": name, "email": format!("ops@{name}.example"), "plan": "enterprise"});
        if fields["plan"].is_null() {
            spec["runtime"] = json!({"resources": resources});
        }
        merge(&mut spec, fields);
        let tenant =
            json!({"apiVersion": "cloister.dev/v1alpha1", "kind": "Tenant", "metadata": {"name": name}, "spec": spec});
        self.cluster.apply(&tenant.to_string()).await.unwrap_or_else(|error| panic!("{name} is refused: {error}"));
    }

    pub async fn until_ready(&self, name: &str) {
        let wait = ["wait", "--for=condition=Ready", "tenant", name, "--timeout=120s"];
        if let Err(error) = self.cluster.try_kubectl(&wait).await {
            let tenant = self.cluster.kubectl(&["get", "tenant", name, "--output=yaml"]).await;
            panic!("{name} does not become Ready: {error}\n{tenant}");
        }
    }

    /// Deletes a `Tenant` and waits until it is gone.
    pub async fn delete_tenant(&self, name: &str) {
        let delete = ["delete", "tenant", name, "--timeout=120s"];
        if let Err(error) = self.cluster.try_kubectl(&delete).await {
            let tenant = self.cluster.kubectl(&["get", "tenant", name, "--output=yaml"]).await;
            panic!("{name} does not go: {error}\n{tenant}");
        }
    }

    /// A field of an object, by a JSONPath.
    pub async fn field(&self, object: &[&str], path: &str) -> String {
        let path = format!("--output=jsonpath={path}");
        self.cluster.kubectl(&[&["get"], object, &[path.as_str()]].concat()).await
    }

    /// The worker's pod of a tenant that has one.
    pub async fn worker(&self, tenant: &str) -> Worker {
        self.try_worker(tenant).await.unwrap_or_else(|| panic!("{tenant} has none or several workers"))
    }

    /// The worker's pod of a tenant, unless there is none, or another is taking its place.
    pub async fn try_worker(&self, tenant: &str) -> Option<Worker> {
        let namespace = format!("tenant-{tenant}");
        let selector = format!("app.kubernetes.io/name={NAME}");
        let list = ["get", "pods", "--namespace", &namespace, "--selector", &selector, "--output=json"];
        let pods: Value = serde_json::from_str(&self.cluster.kubectl(&list).await).expect("kubectl prints JSON");
        let [pod] = &pods["items"].as_array()?[..] else { return None };
        let text = |pointer: &str| Some(pod.pointer(pointer)?.as_str()?.to_owned());
        Some(Worker {
            pod: text("/metadata/name")?,
            uid: text("/metadata/uid")?,
            ip: text("/status/podIP")?,
            restarts: pod["status"]["containerStatuses"][0]["restartCount"].as_i64()?,
            namespace,
        })
    }

    /// What the model server charged for requests whose last words from the user contain `mark`, in tokens.
    pub fn charged(&self, mark: &str) -> u64 {
        let requests = self.model.requests();
        let own = requests.iter().filter(|request| request.last_user_text().contains(mark));
        own.filter_map(|request| request.charged).map(|usage| usage.total()).sum()
    }
}

/// A tenant's worker.
#[derive(Clone, Debug, PartialEq)]
pub struct Worker {
    pub namespace: String,
    pub pod: String,
    pub uid: String,
    pub ip: String,
    pub restarts: i64,
}

/// A pod's spec that Pod Security's `restricted` admits, of the probe, serving on port 8080.
pub fn confined_pod(cpu: &str) -> Value {
    let security = json!({"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}});
    json!({
        "securityContext": {"runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}},
        "terminationGracePeriodSeconds": 1,
        "containers": [{
            "name": "probe", "image": PROBE_IMAGE, "imagePullPolicy": "Never", "securityContext": security,
            "resources": {"requests": {"cpu": cpu, "memory": "8Mi"}, "limits": {"cpu": cpu, "memory": "64Mi"}},
        }],
    })
}

/// A folder of the node as a volume: the cluster has nothing that makes volumes.
fn disk() -> Value {
    let node = json!([{"key": "kubernetes.io/os", "operator": "In", "values": ["linux"]}]);
    json!({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": DISK}, "spec": {
        "capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce"], "storageClassName": DISK,
        "persistentVolumeReclaimPolicy": "Retain", "local": {"path": "/var/tmp"},
        "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": node}]}},
    }})
}

/// Waits until `condition` holds.
pub async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !condition().await {
        assert!(Instant::now() < end, "it never comes true that {what}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// What the model says: at length to `slow`, at a price to `much`.
fn answer(asked: &str) -> Reply {
    let text = "Served.";
    match asked {
        _ if asked.contains("much") => Reply::text(text).usage(20_000, 1_234),
        _ if asked.contains("slow") => Reply::text(text).chunks_of(1).chunk_delay(200).usage(9, 2),
        _ => Reply::text(text).usage(9, 2),
    }
}

/// Lays the fields of one value over those of another.
pub fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (name, value) in from {
                merge(into.entry(name).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from,
    }
}

fn chart(name: &str) -> String {
    root().join("charts").join(name).to_str().expect("a path in UTF-8").to_owned()
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_owned()
}

/// The images of the programs that were built with this test.
async fn images() -> &'static Images {
    static IMAGES: OnceCell<Images> = OnceCell::const_new();
    let build = async || {
        let own = std::env::current_exe().expect("the test's own path");
        let compiled = own.ancestors().nth(2).expect("the folder of the programs");
        let mut script = Command::new(root().join("scripts/images"));
        script.env("COMPILED", compiled).stdin(Stdio::null()).stderr(Stdio::inherit());
        let built = script.output().await.expect("scripts/images runs");
        assert!(built.status.success(), "the images don't build; the reason stands above");
        let lines = String::from_utf8(built.stdout).expect("UTF-8");
        let mut images = Images { tag: String::new(), archives: Vec::new() };
        for (name, archive) in lines.lines().filter_map(|line| line.split_once(' ')) {
            images.tag = name.rsplit(':').next().expect("a tag").to_owned();
            images.archives.push(root().join(archive));
        }
        images
    };
    IMAGES.get_or_init(build).await
}
