//! The committed definition and examples are what the types say.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use crds::Tenant;

fn read(path: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

#[test]
fn tenants_yaml_is_fresh() {
    let fresh = crds::definition::definition_yaml().unwrap();
    assert!(
        fresh == read("tenants.yaml"),
        "crds/tenants.yaml is stale: cargo run -p crds --bin tenants-yaml > crds/tenants.yaml"
    );
}

#[test]
fn examples_are_tenants() {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let mut count = 0;
    for entry in std::fs::read_dir(examples).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let tenant: Tenant =
            serde_saphyr::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let written: serde_json::Value = serde_saphyr::from_str(&text).unwrap();
        let read = serde_json::to_value(&tenant).unwrap();
        for field in written["spec"].as_object().unwrap().keys() {
            assert_eq!(read["spec"][field], written["spec"][field], "{}: spec.{field}", path.display());
        }
        count += 1;
    }
    assert!(count >= 4);
}

/// The API server's cost limit for rules counts on bounds.
#[test]
fn everything_is_bounded() {
    fn walk(at: &str, schema: &serde_json::Value) {
        let bounded = |bound: &str| assert!(schema.get(bound).is_some(), "{at} has no {bound}");
        match schema["type"].as_str() {
            Some("string") if schema.get("enum").is_none() && schema["format"] != "date-time" => bounded("maxLength"),
            Some("array") => bounded("maxItems"),
            Some("object") if schema.get("additionalProperties").is_some() => bounded("maxProperties"),
            _ => {}
        }
        for (name, property) in schema["properties"].as_object().into_iter().flatten() {
            walk(&format!("{at}.{name}"), property);
        }
        for inner in ["items", "additionalProperties"] {
            if let Some(inner) = schema.get(inner) {
                walk(&format!("{at}[]"), inner);
            }
        }
    }
    let definition = serde_json::to_value(crds::definition()).unwrap();
    walk("", &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]);
}
