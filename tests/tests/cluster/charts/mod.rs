//! The charts: what they render holds before a real API server and before those who look for faults in manifests, what
//! can't work is refused with a sentence, and nobody but the operator writes in a tenant's namespace.

mod admission;
mod findings;
mod rendered;
mod schemas;
mod values;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use cloister_tests::cluster::Cluster;
use serde_json::Value;

/// The sets of values in `charts/cloister/ci`.
const SETS: [&str; 4] = ["embedded", "distributed", "operator-only", "api-only"];
/// Of the clusters that the tests start. Helm asks no cluster when it renders.
const KUBERNETES: &str = "1.36.3";
const RELEASE: &str = "cloister";
const NAMESPACE: &str = "cloister-system";

fn chart(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts").join(name)
}

fn set(name: &str) -> PathBuf {
    chart("cloister").join(format!("ci/{name}-values.yaml"))
}

/// Runs a program to its end.
fn run<A: AsRef<OsStr>>(program: &Path, arguments: impl IntoIterator<Item = A>) -> Result<String, String> {
    let Output { status, stdout, stderr } = Command::new(program).args(arguments).output().expect("the program runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("it prints UTF-8");
    match status.success() {
        true => Ok(text(stdout)),
        false => Err(text(stdout) + &text(stderr)),
    }
}

/// What `helm template` makes of a chart.
fn render(cluster: &Cluster, name: &str, more: &[&str]) -> Result<String, String> {
    let chart = chart(name);
    let chart = chart.to_str().expect("a path in UTF-8");
    let fixed = ["template", RELEASE, chart, "--namespace", NAMESPACE, "--kube-version", KUBERNETES];
    run(&cluster.program("helm"), fixed.iter().chain(more))
}

/// What a set of values makes of the chart.
pub fn render_set(cluster: &Cluster, name: &str) -> String {
    let values = set(name);
    render(cluster, "cloister", &["--values", values.to_str().expect("a path in UTF-8")]).expect("the set renders")
}

/// The objects of a manifest.
pub fn objects(manifest: &str) -> Vec<Value> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(manifest).expect("YAML");
    documents.into_iter().filter(|document| !document.is_null()).collect()
}

/// `kubectl` as the cluster's admin, with arguments.
fn kubectl(cluster: &Cluster, arguments: &[&str]) -> Result<String, String> {
    let kubeconfig = format!("--kubeconfig={}", cluster.kubeconfig().display());
    run(&cluster.program("kubectl"), std::iter::once(kubeconfig.as_str()).chain(arguments.iter().copied()))
}

/// A manifest in a file, for as long as this lives.
fn file(manifest: &str) -> tempfile::NamedTempFile {
    let file = tempfile::Builder::new().suffix(".yaml").tempfile().expect("a file");
    std::fs::write(file.path(), manifest).expect("it is written");
    file
}
