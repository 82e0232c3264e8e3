//! A real Kubernetes cluster, started and removed in one line: kubelet, containerd, enforced NetworkPolicies, DNS, and a
//! world outside to reach or not. `scripts/cluster` is how it comes up, here and for people (`make cluster`).
//!
//! With `CLOISTER_TEST_KUBECONFIG` (an admin's) the cluster behind it is used as it is, and left as it is. One of
//! `make cluster` offers everything below; of another one, `CLOISTER_TEST_HOST` is the address at which its pods reach
//! this process, and the images must be there already.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::Ipv4Addr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::AsyncWriteExt;
use tokio::sync::OnceCell;

use crate::scope::Scope;

/// An image that is on every node: `serve ADDRESS…` answers HTTP (by default on port 8080), `tcp`, `get` and `lookup`
/// tell what can be reached; its head, `tests/cluster/programs/probe/main.go`, says more.
pub const PROBE_IMAGE: &str = "localhost/probe:test";

/// The API server's address as pods see it: it looks public.
pub const PUBLIC_API: &str = "198.51.100.6:6443";

/// A running cluster. One that was started here goes when it is dropped, at the latest with the process, in whatever way
/// that ends.
pub struct Cluster {
    kubeconfig: PathBuf,
    /// Its folder, if it is one of `scripts/cluster`.
    folder: Option<PathBuf>,
    credentials: TempDir,
    runner: Option<Child>,
}

impl Cluster {
    /// Starts a cluster of one node; returns when it is Ready and answers DNS. The first ever on a machine is built
    /// before that, for about ten minutes.
    ///
    /// # Panics
    /// It can't be had; the message says why, such as that only root can.
    pub async fn start() -> Cluster {
        if let Some(kubeconfig) = env::var_os("CLOISTER_TEST_KUBECONFIG") {
            return Cluster::at(kubeconfig.into(), None);
        }
        Cluster::run(&[]).await
    }

    /// The same where [`Cluster::start`] would use another: for what takes a cluster over, such as a release with an
    /// operator, of which there is one a cluster.
    ///
    /// # Panics
    /// As [`Cluster::start`] does.
    pub async fn own() -> Cluster {
        Cluster::run(&[]).await
    }

    /// Starts a cluster without a kubelet: its API server, controllers and scheduler are real, and what is placed on one
    /// of its ten nodes, with room for ten thousand pods each, is said to run (kwok).
    ///
    /// # Panics
    /// As [`Cluster::start`] does.
    pub async fn simulated() -> Cluster {
        Cluster::run(&["--simulated"]).await
    }

    /// The one cluster of this test process; tests keep to namespaces and names of their own.
    ///
    /// # Panics
    /// As [`Cluster::start`] does.
    pub async fn shared() -> &'static Cluster {
        static SHARED: OnceCell<Cluster> = OnceCell::const_new();
        SHARED.get_or_init(Cluster::start).await
    }

    async fn run(options: &[&str]) -> Cluster {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("test-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let options: Vec<String> = options.iter().map(|&option| option.to_owned()).collect();
        let start = move || {
            // In the foreground, so that Ctrl-C ends it.
            let built = script("build").status().expect("scripts/cluster runs");
            assert!(built.success(), "what clusters are made of does not build; the reason stands above");
            let mut runner = script("run");
            // It must outlive this process, to remove the cluster: the end of its standard input tells it.
            runner.args(options).arg(name).process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped());
            let mut runner = runner.spawn().expect("scripts/cluster runs");
            let mut said = BufReader::new(runner.stdout.take().expect("piped")).lines().map_while(Result::ok);
            let kubeconfig = said.find_map(|line| line.strip_prefix("export KUBECONFIG=").map(PathBuf::from));
            let kubeconfig = kubeconfig.expect("no cluster; the reason stands above");
            Cluster::at(kubeconfig, Some(runner))
        };
        tokio::task::spawn_blocking(start).await.expect("a cluster")
    }

    fn at(kubeconfig: PathBuf, runner: Option<Child>) -> Cluster {
        let folder = kubeconfig.parent().filter(|folder| folder.join("settings").is_file()).map(Path::to_owned);
        Cluster { kubeconfig, folder, credentials: Scope::current().directory(), runner }
    }

    /// The admin's kubeconfig.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// The address of this machine at which pods, the node and the API server reach a server of the test.
    ///
    /// # Panics
    /// It isn't known: the cluster is another one and `CLOISTER_TEST_HOST` is not set.
    pub fn host(&self) -> Ipv4Addr {
        self.setting("host", "CLOISTER_TEST_HOST")
    }

    /// The node's address: a service's NodePort is reached there.
    ///
    /// # Panics
    /// It isn't known: the cluster is another one and `CLOISTER_TEST_NODE` is not set.
    pub fn node(&self) -> Ipv4Addr {
        self.setting("node", "CLOISTER_TEST_NODE")
    }

    fn setting(&self, name: &str, variable: &str) -> Ipv4Addr {
        let settings = self.folder.as_ref().map(|folder| folder.join("settings"));
        let settings = settings.map(|path| fs::read_to_string(path).expect("the cluster is running"));
        let own = settings.iter().flat_map(|settings| settings.lines()).filter_map(|line| line.split_once('='));
        let own = own.filter(|(key, _)| *key == name).map(|(_, value)| value.to_owned()).next();
        let value = own.or_else(|| env::var(variable).ok());
        let value = value.unwrap_or_else(|| panic!("{variable} must say what the cluster's {name} address is"));
        value.parse().unwrap_or_else(|_| panic!("{value} is no IPv4 address"))
    }

    /// The API server's audit log: a JSON event a line, for every call but those of the cluster's own parts. None of a
    /// cluster that is another one.
    pub fn audit_log(&self) -> Option<PathBuf> {
        self.folder.as_ref().map(|folder| folder.join("audit.log"))
    }

    /// Runs kubectl as the admin and returns what it prints.
    ///
    /// # Panics
    /// It fails.
    pub async fn kubectl(&self, arguments: &[&str]) -> String {
        let done = self.try_kubectl(arguments).await;
        done.unwrap_or_else(|error| panic!("kubectl {}: {error}", arguments.join(" ")))
    }

    /// Runs kubectl as the admin.
    ///
    /// # Errors
    /// What kubectl said, where it failed.
    pub async fn try_kubectl(&self, arguments: &[&str]) -> Result<String, String> {
        self.kubectl_with(arguments, "").await
    }

    /// Applies a manifest, of as many documents as it has.
    ///
    /// # Errors
    /// What the API server said, where it refused one.
    pub async fn apply(&self, manifest: &str) -> Result<(), String> {
        self.kubectl_with(&["apply", "--server-side", "--filename", "-"], manifest).await.map(drop)
    }

    async fn kubectl_with(&self, arguments: &[&str], input: &str) -> Result<String, String> {
        let mut kubectl = tokio::process::Command::new(self.program("kubectl"));
        kubectl.arg("--kubeconfig").arg(&self.kubeconfig).args(arguments).kill_on_drop(true);
        kubectl.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut kubectl = kubectl.spawn().expect("kubectl must be on the path");
        let mut stdin = kubectl.stdin.take().expect("piped");
        // One that has failed already reads no more.
        let _ = stdin.write_all(input.as_bytes()).await;
        drop(stdin);
        said(&kubectl.wait_with_output().await.expect("kubectl ends"))
    }

    /// The path of one of the programs that the cluster is made of or checked by, such as `helm` or `kubeconform`; of
    /// another cluster, the name alone.
    pub fn program(&self, name: &str) -> PathBuf {
        let cache = self.folder.as_ref().and_then(|folder| folder.parent()?.parent());
        cache.map_or_else(|| name.into(), |cache| cache.join("bin").join(name))
    }

    /// Makes an image from the archive known to the node, by the names in it. Another cluster must have it already.
    ///
    /// # Panics
    /// It is no archive of an image.
    pub async fn load_image(&self, archive: &Path) {
        if let Some(name) = self.name() {
            run_script("load", [name, archive.as_os_str()]).await.expect("the image loads");
        }
    }

    /// Whether the network of a pod reaches something, and what is there: the arguments are the probe's, such as
    /// `["tcp", "203.0.113.1:443"]` or `["get", URL]`. The pod's own image needs to hold nothing for it.
    ///
    /// # Errors
    /// What the probe said, where it was not reached within two seconds.
    ///
    /// # Panics
    /// The cluster is another one, or has no kubelet.
    pub async fn probe_from(&self, namespace: &str, pod: &str, arguments: &[&str]) -> Result<String, String> {
        let name = self.name().expect("only into pods of its own clusters can the harness go");
        let rest = [namespace, pod].into_iter().chain(arguments.iter().copied()).map(OsStr::new);
        run_script("probe", std::iter::once(name).chain(rest)).await
    }

    /// Makes a kubeconfig that acts as a service account, for a day.
    ///
    /// # Panics
    /// There is no such service account.
    pub async fn kubeconfig_for(&self, namespace: &str, service_account: &str) -> PathBuf {
        let token = ["create", "token", service_account, "--namespace", namespace, "--duration", "24h"];
        let token = self.kubectl(&token).await;
        let own = self.kubectl(&["config", "view", "--raw", "--minify", "--flatten", "--output", "json"]).await;
        let own: Value = serde_json::from_str(&own).expect("kubectl prints JSON");
        let context = json!({"cluster": "test", "user": service_account, "namespace": namespace});
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": own["clusters"][0]["cluster"]}],
            "users": [{"name": service_account, "user": {"token": token.trim()}}],
            "contexts": [{"name": "test", "context": context}],
        });
        let path = self.credentials.path().join(format!("{namespace}.{service_account}"));
        fs::write(&path, config.to_string()).expect("a kubeconfig");
        path
    }

    fn name(&self) -> Option<&OsStr> {
        self.folder.as_ref().and_then(|folder| folder.file_name())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Some(mut runner) = self.runner.take() {
            drop(runner.stdin.take());
            let _ = runner.wait();
        }
    }
}

/// Builds an image from a Dockerfile (`Dockerfile` in the context, unless an option of `buildah build` names another)
/// and returns its archive, for [`Cluster::load_image`].
///
/// # Panics
/// It doesn't build.
pub async fn build_image(tag: &str, context: &Path, options: &[&str]) -> PathBuf {
    let arguments = [OsStr::new(tag), context.as_os_str()].into_iter().chain(options.iter().map(OsStr::new));
    let archive = run_script("image", arguments).await.expect("the image builds");
    archive.trim().into()
}

async fn run_script<'a>(command: &str, arguments: impl IntoIterator<Item = &'a OsStr>) -> Result<String, String> {
    let mut script = script(command);
    script.args(arguments).stdin(Stdio::null());
    said(&tokio::process::Command::from(script).output().await.expect("scripts/cluster runs"))
}

fn script(command: &str) -> Command {
    let mut script = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/cluster"));
    script.arg(command);
    script
}

fn said(output: &Output) -> Result<String, String> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}
