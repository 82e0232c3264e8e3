//! The desired state: pure functions from what is wanted to Kubernetes objects. Each emits every field that the API
//! server would fill in by default, and quantities in canonical form, so that an object that is as wanted compares
//! equal.

pub mod access;
pub mod limits;
pub mod namespace;
pub mod network;
pub mod workload;

use std::collections::BTreeMap;

use crds::tenant::TENANT_LABEL;
use kube::api::ObjectMeta;

use crate::wanted::Wanted;

/// The name of everything in a tenant's namespace.
pub const NAME: &str = "cloister-runtime";
/// Whose fields they are.
pub const FIELD_MANAGER: &str = "cloister-operator";

/// Labels of the namespace and of everything in it.
pub fn build_labels(tenant: &str) -> BTreeMap<String, String> {
    let labels = [
        ("app.kubernetes.io/name", NAME),
        ("app.kubernetes.io/instance", tenant),
        ("app.kubernetes.io/component", "runtime"),
        ("app.kubernetes.io/part-of", "cloister"),
        ("app.kubernetes.io/managed-by", FIELD_MANAGER),
        (TENANT_LABEL, tenant),
    ];
    labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into()
}

/// What selects the tenant's workers; fixed for a Deployment's life.
fn build_selector(tenant: &str) -> BTreeMap<String, String> {
    [("app.kubernetes.io/name", NAME), (TENANT_LABEL, tenant)]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into()
}

/// Metadata of an object in a tenant's namespace.
fn build_metadata(wanted: &Wanted) -> ObjectMeta {
    ObjectMeta {
        name: Some(NAME.to_owned()),
        namespace: Some(wanted.namespace.clone()),
        labels: Some(build_labels(&wanted.tenant)),
        ..ObjectMeta::default()
    }
}
