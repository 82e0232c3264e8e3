//! checkov and kubernetes-validate find nothing; where checkov is to look away, the object says why.

use std::fs;
use std::path::{Path, PathBuf};

use cloister_tests::cluster::Cluster;

use super::{SETS, file, render, render_set, run};

/// Both, installed once from PyPI, and anew when the requirements change.
fn programs() -> PathBuf {
    let requirements = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cluster/charts/requirements.txt");
    let wanted = fs::read_to_string(&requirements).expect("the requirements");
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("manifest-checks");
    let installed = folder.join("installed.txt");
    if fs::read_to_string(&installed).ok().as_deref() != Some(&wanted) {
        let _ = fs::remove_dir_all(&folder);
        run(Path::new("python3"), ["-m".as_ref(), "venv".as_ref(), folder.as_os_str()]).expect("python3-venv is there");
        let pip = ["install", "--quiet", "--disable-pip-version-check", "--requirement"];
        let requirements = requirements.to_str().expect("a path in UTF-8");
        run(&folder.join("bin/pip"), pip.into_iter().chain([requirements])).expect("they are installed");
        fs::write(installed, wanted).expect("it is written");
    }
    folder.join("bin")
}

#[tokio::test]
async fn who_looks_for_faults_in_manifests_finds_none() {
    let cluster = Cluster::shared().await;
    let programs = programs();
    let mut manifests: Vec<String> = SETS.iter().map(|set| render_set(cluster, set)).collect();
    manifests.push(render(cluster, "cloister-crds", &[]).expect("the chart renders"));
    let manifests: Vec<_> = manifests.iter().map(|manifest| file(manifest)).collect();
    let paths = || manifests.iter().map(|manifest| manifest.path().to_str().expect("a path in UTF-8"));
    for path in paths() {
        let validate = ["--strict", "--quiet", "--kubernetes-version", "1.36.0", path];
        run(&programs.join("kubernetes-validate"), validate).unwrap_or_else(|error| panic!("{error}"));
    }
    let dockerfile = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Dockerfile");
    let dockerfile = dockerfile.to_str().expect("a path in UTF-8");
    // All at once: it takes long to start.
    let checkov = ["--framework", "kubernetes", "dockerfile", "--compact", "--quiet", "--skip-download", "--file"];
    let arguments = checkov.into_iter().chain(paths()).chain([dockerfile]);
    let said = run(&programs.join("checkov"), arguments).unwrap_or_else(|error| panic!("{error}"));
    for framework in ["kubernetes", "dockerfile"] {
        assert!(said.contains(&format!("{framework} scan results")), "{framework} was not looked at: {said}");
    }
}
