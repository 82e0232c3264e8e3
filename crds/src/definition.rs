//! The resource's definition, as it is installed.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSONSchemaProps, JSONSchemaPropsOrArray,
};
use kube::CustomResourceExt;

use crate::Tenant;

const HEADER: &str = "\
# Generated from crds/src by `cargo run -p crds --bin tenants-yaml > crds/tenants.yaml`; a test fails when it is stale.
";

/// The definition of `tenants.cloister.dev`.
pub fn definition() -> CustomResourceDefinition {
    let mut definition = Tenant::crd();
    let schemas = definition.spec.versions.iter_mut().filter_map(|version| version.schema.as_mut());
    for schema in schemas.filter_map(|schema| schema.open_api_v3_schema.as_mut()) {
        simplify(schema);
    }
    definition
}

/// The definition as YAML.
///
/// # Errors
/// It can't be written, which no definition was seen to do.
pub fn definition_yaml() -> Result<String, String> {
    // By way of a JSON value, which keeps the order of fields and leaves out what is not set.
    let value = serde_json::to_value(definition()).map_err(|error| error.to_string())?;
    let yaml = serde_saphyr::to_string(&value).map_err(|error| error.to_string())?;
    Ok(format!("{HEADER}{yaml}"))
}

/// Takes out what is Rust's: an optional field is one that is left out (the API server removes a `null` then), and
/// integers have one format.
fn simplify(schema: &mut JSONSchemaProps) {
    schema.nullable = None;
    for property in schema.properties.iter_mut().flat_map(|properties| properties.values_mut()) {
        simplify(property);
    }
    if let Some(JSONSchemaPropsOrArray::Schema(items)) = schema.items.as_mut() {
        simplify(items);
    }
}
