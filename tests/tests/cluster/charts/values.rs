//! `values.yaml` and `values.schema.json` say the same, and what can't work is refused.

use std::fs;

use cloister_tests::cluster::Cluster;
use serde_json::Value;

use super::{chart, render, set};

/// What a schema says once its reference is followed; the chart's own add a description to one by `allOf`.
fn resolved<'a>(schema: &'a Value, root: &'a Value) -> &'a Value {
    let reference = schema.get("$ref").or_else(|| schema["allOf"][0].get("$ref"));
    match reference.and_then(Value::as_str) {
        Some(reference) => root.pointer(reference.trim_start_matches('#')).expect("the definition is there"),
        None => schema,
    }
}

/// Holds values and schema against each other, field by field.
fn compare(path: &str, value: &Value, schema: &Value, root: &Value) {
    let schema = resolved(schema, root);
    let Some(properties) = schema["properties"].as_object() else {
        assert!(schema.get("type").or(schema.get("enum")).is_some(), "{path}: the schema lets anything be it");
        return;
    };
    assert_eq!(schema["additionalProperties"], false, "{path}: the schema lets unknown fields pass");
    let fields = value.as_object().unwrap_or_else(|| panic!("{path}: an object in the schema, not in values.yaml"));
    for name in fields.keys() {
        assert!(properties.contains_key(name), "{path}/{name} is in values.yaml, not in the schema");
    }
    for (name, schema) in properties {
        // Helm's own, which a parent chart hands down.
        if path.is_empty() && name == "global" {
            continue;
        }
        let value = fields.get(name).unwrap_or_else(|| panic!("{path}/{name} is in the schema, not in values.yaml"));
        compare(&format!("{path}/{name}"), value, schema, root);
    }
}

#[test]
fn the_schema_knows_every_value_and_no_other() {
    let read = |name: &str| fs::read_to_string(chart("cloister").join(name)).expect("the file is there");
    let values: Value = serde_saphyr::from_str(&read("values.yaml")).expect("YAML");
    let schema: Value = serde_json::from_str(&read("values.schema.json")).expect("JSON");
    compare("", &values, &schema, &schema);
}

#[tokio::test]
async fn what_cannot_work_is_refused_with_a_sentence() {
    let cluster = Cluster::shared().await;
    // A set of values, what is changed of it, and what the refusal must say.
    let refused = [
        ("embedded", "api.replicas=2", "api.replicas is 2, but database.type is sqlite, which serves one process"),
        ("embedded", "api.autoscaling.enabled=true", "api.autoscaling.enabled needs database.type: postgres"),
        ("embedded", "redis.existingSecret=redis", "remove it, or set database.type to postgres"),
        ("embedded", "database.type=postgres", "database.postgres.existingSecret is empty: name a Secret"),
        ("embedded", "secrets.existingSecret=", "secrets.existingSecret is empty: name a Secret that has `key`"),
        ("embedded", "secrets.adminKey=0123456789abcdef0123456789abcdef", "are both set"),
        ("embedded", "api.ingress.enabled=true", "api.ingress.host is empty"),
        ("embedded", "operator.api.url=http://elsewhere", "set api.enabled to false, or remove operator.api.url"),
        ("distributed", "api.autoscaling.minReplicas=9", "api.autoscaling.minReplicas is above"),
        ("operator-only", "operator.api.url=", "operator.api.url is empty"),
        ("operator-only", "operator.api.existingSecret=", "operator.api.existingSecret is empty"),
        ("operator-only", "runtime.apiCidrs=null", "runtime.apiCidrs is empty"),
        ("operator-only", "operator.enabled=false", "there is nothing to install"),
        // By the schema, which names the field.
        ("embedded", "api.replica=2", "'/api': additional properties 'replica' not allowed"),
        ("embedded", "api.replicas=0", "'/api/replicas': minimum: got 0, want 1"),
        ("embedded", "api.replicas=many", "'/api/replicas'"),
        ("embedded", "api.service.type=Public", "'/api/service/type': value must be one of"),
        ("embedded", "api.service.port=123456", "'/api/service/port'"),
        ("embedded", "api.resources.limit.cpu=1", "'/api/resources': additional properties 'limit' not allowed"),
        ("embedded", "api.image.digest=sha256:1", "'/api/image/digest'"),
        ("embedded", "secrets.existingSecret=Not A Name", "'/secrets/existingSecret'"),
        ("embedded", "database.type=mysql", "'/database/type': value must be one of"),
        ("embedded", "database.sqlite.persistence.size=much", "'/database/sqlite/persistence/size'"),
        ("embedded", "operator.namespacePrefix=Tenant", "'/operator/namespacePrefix'"),
        ("embedded", "runtime.maxConcurrentRollouts=0", "'/runtime/maxConcurrentRollouts': minimum"),
        ("embedded", "network.deniedCidrs={everything}", "'/network/deniedCidrs/0'"),
        ("embedded", "log.format=xml", "'/log/format': value must be one of"),
    ];
    for (values, change, sentence) in refused {
        let values = set(values);
        let arguments = ["--values", values.to_str().expect("a path in UTF-8"), "--set", change];
        let error = render(cluster, "cloister", &arguments).expect_err(change);
        assert!(error.contains(sentence), "{change}: {error}");
    }
}
