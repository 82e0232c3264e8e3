//! Whether the cluster has the resource's definition with the fields that this operator knows.

use std::time::Duration;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::{Api, Client, CustomResourceExt};
use serde_json::Value;

use crds::Tenant;

const PAUSE: Duration = Duration::from_secs(2);

/// Waits until the cluster has the definition, and says what it waits for.
pub async fn wait_for_definition(client: &Client) {
    let definitions: Api<CustomResourceDefinition> = Api::all(client.clone());
    let mut said = None;
    loop {
        let missing = match definitions.get_opt(Tenant::crd_name()).await {
            Ok(Some(live)) => match missing_field(&live) {
                None => return,
                Some(field) => format!("{} lacks the field {field}: install a newer cloister-crds", Tenant::crd_name()),
            },
            Ok(None) => format!("{} is not installed: install cloister-crds", Tenant::crd_name()),
            Err(error) => format!("{} can't be read: {error}", Tenant::crd_name()),
        };
        if said.as_ref() != Some(&missing) {
            tracing::warn!("waiting: {missing}");
            said = Some(missing);
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// The first field of ours that the live definition doesn't have.
fn missing_field(live: &CustomResourceDefinition) -> Option<String> {
    let schema = |definition: &CustomResourceDefinition| -> Option<Value> {
        let version = definition.spec.versions.iter().find(|version| version.name == "v1alpha1")?;
        serde_json::to_value(version.schema.as_ref()?.open_api_v3_schema.as_ref()?).ok()
    };
    let ours = schema(&crds::definition())?;
    match schema(live) {
        Some(live) => missing_property("", &ours, &live),
        None => Some("v1alpha1".to_owned()),
    }
}

fn missing_property(at: &str, ours: &Value, live: &Value) -> Option<String> {
    if let Some(properties) = ours["properties"].as_object() {
        for (name, ours) in properties {
            let at = if at.is_empty() { name.clone() } else { format!("{at}.{name}") };
            match live["properties"].get(name) {
                None => return Some(at),
                Some(live) => {
                    if let Some(missing) = missing_property(&at, ours, live) {
                        return Some(missing);
                    }
                }
            }
        }
    }
    ours.get("items").and_then(|items| missing_property(at, items, &live["items"]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_definition_that_lacks_a_field_is_told_apart() {
        let mut live = crds::definition();
        assert_eq!(missing_field(&live), None);
        let schema = live.spec.versions[0].schema.as_mut().unwrap().open_api_v3_schema.as_mut().unwrap();
        let spec = schema.properties.as_mut().unwrap().get_mut("spec").unwrap();
        let runtime = spec.properties.as_mut().unwrap().get_mut("runtime").unwrap();
        runtime.properties.as_mut().unwrap().remove("tolerations");
        assert_eq!(missing_field(&live).as_deref(), Some("spec.runtime.tolerations"));
    }
}
