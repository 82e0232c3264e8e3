//! What the charts render.

use std::fs;
use std::path::Path;

use cloister_tests::cluster::Cluster;
use serde_json::{Value, json};

use super::{KUBERNETES, SETS, chart, file, kubectl, objects, render, render_set, run, schemas, set};

/// The pod templates among objects.
fn pods(objects: &[Value]) -> impl Iterator<Item = (&Value, &Value)> {
    objects.iter().filter_map(|object| Some((object, object.pointer("/spec/template/spec")?)))
}

#[tokio::test]
async fn the_linter_and_the_clusters_own_schemas_find_nothing() {
    let cluster = Cluster::shared().await;
    let schemas = schemas::of(cluster);
    let mut manifests: Vec<String> = SETS.iter().map(|set| render_set(cluster, set)).collect();
    manifests.push(render(cluster, "cloister-crds", &[]).expect("the chart renders"));
    for name in SETS {
        let (chart, values) = (chart("cloister"), set(name));
        let arguments = ["lint".as_ref(), chart.as_os_str(), "--strict".as_ref(), "--kube-version".as_ref()];
        let more = [KUBERNETES.as_ref(), "--values".as_ref(), values.as_os_str()];
        run(&cluster.program("helm"), arguments.into_iter().chain(more)).expect("the linter finds nothing");
    }
    for manifest in manifests {
        let manifest = file(&manifest);
        let location = format!("{}/{{{{.ResourceKind}}}}{{{{.KindSuffix}}}}.json", schemas.path().display());
        // Its definition is the Prometheus operator's.
        let arguments = ["-strict", "-summary", "-skip", "ServiceMonitor", "-schema-location", location.as_str()];
        let path = manifest.path().to_str().expect("a path in UTF-8");
        let said = run(&cluster.program("kubeconform"), arguments.into_iter().chain([path]));
        let said = said.unwrap_or_else(|error| panic!("{error}"));
        assert!(said.contains("Invalid: 0, Errors: 0"), "{said}");
    }
}

#[tokio::test]
async fn the_api_server_takes_every_object() {
    let cluster = Cluster::shared().await;
    let namespace = "charts-dry-run";
    let made = file(
        &json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace,
            "labels": {"pod-security.kubernetes.io/warn": "restricted"}}})
        .to_string(),
    );
    let path = |file: &tempfile::NamedTempFile| file.path().to_str().expect("a path in UTF-8").to_owned();
    kubectl(cluster, &["apply", "--filename", &path(&made)]).expect("the namespace is made");
    for set in SETS {
        let manifest = render_set(cluster, set).replace(super::NAMESPACE, namespace);
        let objects = objects(&manifest).into_iter().filter(|object| object["kind"] != "ServiceMonitor");
        let list = json!({"apiVersion": "v1", "kind": "List", "items": objects.collect::<Vec<_>>()}).to_string();
        let list = file(&list);
        let arguments = ["apply", "--server-side", "--force-conflicts", "--dry-run=server", "--warnings-as-errors"];
        let said = kubectl(cluster, &[&arguments[..], &["--filename", &path(&list)]].concat());
        // A warning, such as Pod Security's, is an error here.
        said.unwrap_or_else(|error| panic!("{set}: {error}"));
    }
    kubectl(cluster, &["delete", "namespace", namespace]).expect("the namespace goes");
}

#[tokio::test]
async fn the_definition_is_the_generated_one_and_stays_when_the_release_goes() {
    let cluster = Cluster::shared().await;
    let mut rendered = objects(&render(cluster, "cloister-crds", &[]).expect("the chart renders")).remove(0);
    let generated = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crds/tenants.yaml");
    let generated: Value = serde_saphyr::from_str(&fs::read_to_string(generated).expect("it is there")).expect("YAML");
    assert_eq!(rendered["metadata"]["annotations"]["helm.sh/resource-policy"], "keep");
    rendered["metadata"] = json!({"name": rendered["metadata"]["name"]});
    assert_eq!(numbers_alike(rendered), numbers_alike(generated));
}

/// `1` and `1.0` are one number in YAML, and two to an equality.
fn numbers_alike(value: Value) -> Value {
    match value {
        Value::Number(number) => json!(number.as_f64()),
        Value::Array(items) => items.into_iter().map(numbers_alike).collect(),
        Value::Object(fields) => fields.into_iter().map(|(name, value)| (name, numbers_alike(value))).collect(),
        other => other,
    }
}

#[tokio::test]
async fn rendered_twice_it_is_the_same() {
    let cluster = Cluster::shared().await;
    for set in SETS {
        assert_eq!(render_set(cluster, set), render_set(cluster, set), "{set}: GitOps would apply it for ever");
    }
}

#[tokio::test]
async fn a_configuration_arrives_as_it_was_written() {
    let cluster = Cluster::shared().await;
    let embedded = set("embedded");
    for config in
        ["[log]\nformat = \"text\"\n", "\n[log]\n", "  [log]\n\n  a = 1 # {{ no template }}\n", "a = 1\n\n\nb = 2\n"]
    {
        let values = file(&json!({"api": {"config": config}}).to_string());
        let values =
            ["--values", embedded.to_str().expect("UTF-8"), "--values", values.path().to_str().expect("UTF-8")];
        let objects = objects(&render(cluster, "cloister", &values).expect("the chart renders"));
        let map = objects.iter().find(|object| object["kind"] == "ConfigMap").expect("a ConfigMap");
        assert_eq!(map["data"]["cloister.toml"], config);
    }
}

#[tokio::test]
async fn every_pod_is_confined() {
    let cluster = Cluster::shared().await;
    for set in SETS {
        let objects = objects(&render_set(cluster, set));
        for (object, pod) in pods(&objects) {
            let name = format!("{set}: {}", object["metadata"]["name"]);
            assert_eq!(pod["securityContext"]["runAsNonRoot"], true, "{name}");
            assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault", "{name}");
            assert_eq!(pod["enableServiceLinks"], false, "{name}");
            assert!(pod["automountServiceAccountToken"].is_boolean(), "{name}: says nothing of its token");
            let kinds = ["containers", "initContainers"].into_iter();
            for container in kinds.flat_map(|kind| pod[kind].as_array().into_iter().flatten()) {
                let security = &container["securityContext"];
                assert_eq!(security["readOnlyRootFilesystem"], true, "{name}");
                assert_eq!(security["allowPrivilegeEscalation"], false, "{name}");
                assert_eq!(security["capabilities"]["drop"], json!(["ALL"]), "{name}");
                for amount in ["/requests/cpu", "/requests/memory", "/limits/memory"] {
                    assert!(container["resources"].pointer(amount).is_some(), "{name}: no {amount}");
                }
            }
        }
    }
}

#[tokio::test]
async fn nothing_grants_more_than_it_names() {
    let cluster = Cluster::shared().await;
    for set in SETS {
        let objects = objects(&render_set(cluster, set));
        let rules = objects.iter().filter(|object| object["kind"] == "ClusterRole" || object["kind"] == "Role");
        for rule in rules.flat_map(|role| role["rules"].as_array().expect("rules")) {
            let lists = |value: &str| {
                ["apiGroups", "resources", "verbs"]
                    .iter()
                    .any(|field| rule[field].as_array().is_some_and(|list| list.iter().any(|entry| entry == value)))
            };
            for forbidden in ["*", "escalate", "bind", "impersonate", "clusterroles", "pods/exec"] {
                assert!(!lists(forbidden), "{set}: {forbidden} in {rule}");
            }
            if lists("secrets") {
                assert_eq!(rule["resourceNames"], json!(["cloister-runtime"]), "{set}: {rule}");
                assert!(!lists("get"), "{set}: {rule}");
            }
        }
    }
}

#[tokio::test]
async fn only_what_must_is_in_a_release_of_the_operator_alone() {
    let cluster = Cluster::shared().await;
    let objects = objects(&render_set(cluster, "operator-only"));
    let names: Vec<&str> = objects.iter().filter_map(|object| object["metadata"]["name"].as_str()).collect();
    assert!(!names.iter().any(|name| name.ends_with("-api") || name.ends_with("-migrate")), "{names:?}");
}
