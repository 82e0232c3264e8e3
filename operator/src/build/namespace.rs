//! The namespace: Pod Security at its strictest, and whose it is.

use std::collections::BTreeMap;

use crds::tenant::TENANT_UID_ANNOTATION;
use k8s_openapi::api::core::v1::Namespace;
use kube::api::ObjectMeta;

use super::build_labels;

/// Prefixes of the keys that are ours alone, in labels and annotations: one more key under them is as wrong as one less.
pub const RESERVED: [&str; 3] = ["pod-security.kubernetes.io/", "cloister.dev/", "app.kubernetes.io/"];

/// The namespace of a tenant.
pub fn build_namespace(name: &str, tenant: &str, tenant_uid: &str) -> Namespace {
    let mut labels = build_labels(tenant);
    for mode in ["enforce", "audit", "warn"] {
        labels.insert(format!("pod-security.kubernetes.io/{mode}"), "restricted".to_owned());
        labels.insert(format!("pod-security.kubernetes.io/{mode}-version"), "latest".to_owned());
    }
    Namespace {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            labels: Some(labels),
            annotations: Some(BTreeMap::from([(TENANT_UID_ANNOTATION.to_owned(), tenant_uid.to_owned())])),
            ..ObjectMeta::default()
        },
        ..Namespace::default()
    }
}

/// Whether `live` holds `wanted`, and nothing else under a reserved prefix.
pub fn holds(live: Option<&BTreeMap<String, String>>, wanted: Option<&BTreeMap<String, String>>) -> bool {
    let empty = BTreeMap::new();
    let (live, wanted) = (live.unwrap_or(&empty), wanted.unwrap_or(&empty));
    wanted.iter().all(|(key, value)| live.get(key) == Some(value))
        && live.keys().all(|key| wanted.contains_key(key) || !is_reserved(key))
}

/// `live` without reserved keys, and `wanted`.
pub fn merged(
    live: Option<BTreeMap<String, String>>,
    wanted: Option<BTreeMap<String, String>>,
) -> BTreeMap<String, String> {
    let mut merged = live.unwrap_or_default();
    merged.retain(|key, _| !is_reserved(key));
    merged.extend(wanted.unwrap_or_default());
    merged
}

fn is_reserved(key: &str) -> bool {
    RESERVED.iter().any(|prefix| key.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_are_restricted_in_every_mode() {
        let labels = build_namespace("tenant-acme", "acme", "9f0c").metadata.labels.unwrap();
        let security: Vec<_> = labels.iter().filter(|(key, _)| key.starts_with("pod-security")).collect();
        assert_eq!(security.len(), 6);
        assert!(security.iter().all(|(_, value)| matches!(value.as_str(), "restricted" | "latest")));
        assert_eq!(labels["cloister.dev/tenant"], "acme");
    }

    #[test]
    fn others_may_label_a_namespace_but_not_with_our_keys() {
        let wanted = build_namespace("tenant-acme", "acme", "9f0c").metadata.labels;
        let mut live = wanted.clone().unwrap();
        live.insert("kubernetes.io/metadata.name".to_owned(), "tenant-acme".to_owned());
        live.insert("team".to_owned(), "x".to_owned());
        assert!(holds(Some(&live), wanted.as_ref()));
        live.insert("pod-security.kubernetes.io/exempt".to_owned(), "x".to_owned());
        assert!(!holds(Some(&live), wanted.as_ref()));
        let merged = merged(Some(live), wanted.clone());
        assert!(holds(Some(&merged), wanted.as_ref()));
        assert_eq!(merged["team"], "x");
        assert!(!holds(None, wanted.as_ref()));
    }
}
