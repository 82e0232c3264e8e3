//! kubeconform's schemas, made from what a cluster's API server publishes of its kinds.

use std::fs;

use cloister_tests::cluster::Cluster;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use super::kubectl;

/// A folder with a schema a kind, by the names that kubeconform asks for (`deployment-apps-v1.json`).
pub fn of(cluster: &Cluster) -> TempDir {
    let published = kubectl(cluster, &["get", "--raw", "/openapi/v2"]).expect("the API server tells its kinds");
    let published: Value = serde_json::from_str(&published).expect("JSON");
    let folder = tempfile::tempdir().expect("a folder");
    let mut definitions = published["definitions"].as_object().expect("definitions").clone();
    for (name, definition) in &mut definitions {
        tighten(name, definition);
    }
    for (name, definition) in &definitions {
        for kind in definition["x-kubernetes-group-version-kind"].as_array().into_iter().flatten() {
            let text = |field: &str| kind[field].as_str().expect("a text").to_lowercase();
            // Of the group, only what stands before the first dot is asked for.
            let group = text("group").split('.').next().unwrap_or_default().to_owned();
            let group = if group.is_empty() { group } else { format!("-{group}") };
            let schema = json!({"$ref": format!("definitions.json#/definitions/{name}")});
            let path = folder.path().join(format!("{}{group}-{}.json", text("kind"), text("version")));
            fs::write(path, schema.to_string()).expect("it is written");
        }
    }
    let all =
        json!({"definitions": definitions}).to_string().replace("\"#/definitions/", "\"definitions.json#/definitions/");
    fs::write(folder.path().join("definitions.json"), all).expect("it is written");
    folder
}

/// What is published lets unknown fields pass, and has two types that are written in more than one way.
fn tighten(name: &str, definition: &mut Value) {
    let Some(fields) = definition.as_object_mut() else { return };
    match name.rsplit('.').next() {
        Some("Quantity") => *fields = any_of(["string", "number"]),
        Some("IntOrString") => *fields = any_of(["string", "integer"]),
        // These may hold anything.
        Some("JSON" | "JSONSchemaPropsOrArray" | "JSONSchemaPropsOrBool" | "JSONSchemaPropsOrStringArray") => {
            fields.clear()
        }
        _ => close(definition),
    }
}

fn any_of(types: [&str; 2]) -> Map<String, Value> {
    Map::from_iter([("type".to_owned(), json!(types))])
}

fn close(schema: &mut Value) {
    let Some(fields) = schema.as_object_mut() else { return };
    if fields.get("format").is_some_and(|format| format == "int-or-string") {
        *fields = any_of(["string", "integer"]);
        return;
    }
    if fields.contains_key("properties") && !fields.contains_key("x-kubernetes-preserve-unknown-fields") {
        fields.entry("additionalProperties").or_insert(json!(false));
    }
    if let Some(properties) = fields.get_mut("properties").and_then(Value::as_object_mut) {
        properties.values_mut().for_each(close);
    }
    for inner in ["items", "additionalProperties"] {
        if let Some(inner) = fields.get_mut(inner) {
            close(inner);
        }
    }
}
