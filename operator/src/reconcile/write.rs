//! Writes to the Kubernetes API: the only place where there are any, and each only where something differs.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crds::Tenant;
use crds::status::TenantStatus;
use crds::tenant::{FINALIZER, TENANT_LABEL};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{LimitRange, Namespace, ResourceQuota, Secret, ServiceAccount};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::{NamespaceResourceScope, Resource as HasKind};
use kube::api::{DeleteParams, ObjectMeta, PartialObjectMeta, Patch, PatchParams, PostParams, Preconditions};
use kube::{Api, Resource, ResourceExt};
use metrics::counter;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use crate::build::FIELD_MANAGER;
use crate::cluster::mirror::{Kept, Mirror};
use crate::error::Error;
use crate::operator::Operator;

/// How long the Kubernetes API has for a write.
const PATIENCE: Duration = Duration::from_secs(15);

/// What is written whole.
pub trait Written: Resource<DynamicType = ()> + HasKind + Clone + Debug + Serialize + DeserializeOwned {}

impl<K: Resource<DynamicType = ()> + HasKind + Clone + Debug + Serialize + DeserializeOwned> Written for K {}

/// What the cluster makes something else of is written again after this long.
const CONTESTED_AGAIN: Duration = Duration::from_secs(60);

/// A kind of object in a tenant's namespace.
pub trait Child: Kept + Resource<Scope = NamespaceResourceScope> + Written + Send + Sync + 'static {
    /// Whether, metadata and status aside, this is as `wanted`: no field less and none more.
    fn is_as(&self, wanted: &Self) -> bool;
}

macro_rules! child {
    ($($kind:ident: $($field:ident)+;)+) => {$(
        impl Child for $kind {
            fn is_as(&self, wanted: &Self) -> bool {
                $(self.$field == wanted.$field)&&+
            }
        }
    )+};
}

child! {
    ResourceQuota: spec;
    LimitRange: spec;
    NetworkPolicy: spec;
    ServiceAccount: automount_service_account_token image_pull_secrets secrets;
    Deployment: spec;
    PodDisruptionBudget: spec;
}

/// Annotations that Kubernetes' own controllers write into objects of ours.
const CONTROLLERS_ANNOTATIONS: &str = "deployment.kubernetes.io/";

/// Makes an object as `wanted`, if it isn't, and answers how it is then.
///
/// # Errors
/// It can't be written.
pub async fn settle<K: Child>(operator: &Operator, mirror: &Mirror<K>, wanted: &K) -> Result<Arc<K>, Error> {
    let (namespace, name) = (wanted.namespace().unwrap_or_default(), wanted.name_any());
    let live = mirror.get(Some(&namespace), &name);
    if let Some(live) = &live {
        // One that is being deleted is made anew once it is gone.
        if is_settled(live.as_ref(), wanted) || live.meta().deletion_timestamp.is_some() {
            return Ok(live.clone());
        }
    }
    let tenant = wanted.labels().get(TENANT_LABEL).cloned().unwrap_or_default();
    if let Some(live) = &live
        && let Some(difference) = difference(live.as_ref(), wanted)
    {
        // Its own writes' events must not have it write for ever.
        let is_contested = operator.memory.with(&tenant, |entry| {
            entry.contested.retain(|_, seen| seen.elapsed() < CONTESTED_AGAIN);
            entry.contested.contains_key(K::KIND)
        });
        if is_contested {
            return Err(Error::Contested { kind: K::KIND, name: format!("{namespace}/{name}"), difference });
        }
    }
    let api: Api<K> = Api::namespaced(operator.client.clone(), &namespace);
    let mut written = match &live {
        Some(live) if is_shared(live.meta()) => replace(&api, live.as_ref(), wanted).await?,
        _ => apply(&api, wanted).await?,
    };
    // An apply leaves standing what others own.
    if !is_settled(&written, wanted) {
        written = replace(&api, &written, wanted).await?;
    }
    let difference = difference(&written, wanted);
    mirror.wrote(written.clone());
    let Some(difference) = difference else { return Ok(Arc::new(written)) };
    operator.memory.with(&tenant, |entry| entry.contested.insert(K::KIND, Instant::now()));
    Err(Error::Contested { kind: K::KIND, name: format!("{namespace}/{name}"), difference })
}

fn is_settled<K: Child>(live: &K, wanted: &K) -> bool {
    difference(live, wanted).is_none()
}

/// In which part an object is not as wanted, if it isn't.
fn difference<K: Child>(live: &K, wanted: &K) -> Option<&'static str> {
    let (live_meta, wanted_meta) = (live.meta(), wanted.meta());
    let own = |annotations: &Option<BTreeMap<String, String>>| -> BTreeMap<String, String> {
        let annotations = annotations.iter().flatten();
        annotations
            .filter(|(key, _)| !key.starts_with(CONTROLLERS_ANNOTATIONS))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect()
    };
    let parts = [
        ("metadata.labels", live_meta.labels == wanted_meta.labels),
        ("metadata.annotations", own(&live_meta.annotations) == own(&wanted_meta.annotations)),
        ("metadata.ownerReferences", live_meta.owner_references.as_ref().is_none_or(Vec::is_empty)),
        ("metadata.finalizers", live_meta.finalizers.as_ref().is_none_or(Vec::is_empty)),
        ("spec", live.is_as(wanted)),
    ];
    parts.into_iter().find_map(|(part, is_as_wanted)| (!is_as_wanted).then_some(part))
}

/// Whether others than this operator, and the writers of status and scale, own fields.
pub fn is_shared(meta: &ObjectMeta) -> bool {
    meta.managed_fields.iter().flatten().any(|entry| {
        let is_ours = entry.manager.as_deref() == Some(FIELD_MANAGER) && entry.operation.as_deref() == Some("Apply");
        !is_ours && !matches!(entry.subresource.as_deref(), Some("status" | "scale"))
    })
}

/// Whether others than this operator own fields, whatever way it wrote its own.
pub fn is_foreign(meta: &ObjectMeta) -> bool {
    let managers = meta.managed_fields.iter().flatten().filter(|entry| entry.manager.as_deref() != Some(FIELD_MANAGER));
    managers.into_iter().any(|entry| !matches!(entry.subresource.as_deref(), Some("status" | "scale")))
}

async fn apply<K: Written>(api: &Api<K>, wanted: &K) -> Result<K, Error> {
    let name = wanted.name_any();
    let parameters = PatchParams::apply(FIELD_MANAGER).force();
    let patch = Patch::Apply(wanted);
    let write = api.patch(&name, &parameters, &patch);
    written("apply", K::KIND, wanted.meta(), write).await
}

async fn replace<K: Child>(api: &Api<K>, live: &K, wanted: &K) -> Result<K, Error> {
    let mut wanted = wanted.clone();
    wanted.meta_mut().resource_version = live.resource_version();
    // Without these, controllers would write them again.
    let controllers = live.annotations().iter().filter(|(key, _)| key.starts_with(CONTROLLERS_ANNOTATIONS));
    for (key, value) in controllers {
        wanted.annotations_mut().insert(key.clone(), value.clone());
    }
    put(api, &wanted).await
}

/// Replaces an object whole; with a resource version, only the one that was seen.
async fn put<K: Written>(api: &Api<K>, wanted: &K) -> Result<K, Error> {
    written("replace", K::KIND, wanted.meta(), api.replace(&wanted.name_any(), &ours(), wanted)).await
}

fn ours() -> PostParams {
    PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() }
}

/// Writes the workers' token. It is compared by metadata only, as nobody reads what secrets hold.
///
/// # Errors
/// It can't be written.
pub async fn secret(operator: &Operator, mut wanted: Secret) -> Result<(), Error> {
    let namespace = wanted.namespace().unwrap_or_default();
    let api: Api<Secret> = Api::namespaced(operator.client.clone(), &namespace);
    let live = operator.cluster.secrets.get(Some(&namespace), &wanted.name_any());
    let Secret { metadata, .. } = match live.filter(|live| is_shared(&live.metadata)) {
        Some(live) => {
            wanted.metadata.resource_version = live.metadata.resource_version.clone();
            put(&api, &wanted).await?
        }
        None => apply(&api, &wanted).await?,
    };
    let _phantom = PhantomData;
    operator.cluster.secrets.wrote(PartialObjectMeta { types: None, metadata, _phantom });
    Ok(())
}

/// Makes the namespace. Somebody else may have made one by the name: that is a conflict.
///
/// # Errors
/// It can't be made.
pub async fn create_namespace(operator: &Operator, wanted: &Namespace) -> Result<Namespace, Error> {
    let api: Api<Namespace> = Api::all(operator.client.clone());
    let made = written("create", Namespace::KIND, &wanted.metadata, api.create(&ours(), wanted)).await?;
    operator.cluster.namespaces.wrote(made.clone());
    Ok(made)
}

/// Replaces the namespace, which must still be the one that was seen.
///
/// # Errors
/// It can't be replaced.
pub async fn replace_namespace(operator: &Operator, wanted: &Namespace) -> Result<Namespace, Error> {
    let made = put(&Api::all(operator.client.clone()), wanted).await?;
    operator.cluster.namespaces.wrote(made.clone());
    Ok(made)
}

/// Deletes the namespace with this UID and no other. One that is gone is fine.
///
/// # Errors
/// It can't be deleted.
pub async fn delete_namespace(operator: &Operator, name: &str, uid: &str) -> Result<(), Error> {
    let api: Api<Namespace> = Api::all(operator.client.clone());
    let parameters = DeleteParams {
        preconditions: Some(Preconditions { uid: Some(uid.to_owned()), resource_version: None }),
        ..DeleteParams::background()
    };
    let metadata = ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() };
    match written("delete", Namespace::KIND, &metadata, api.delete(name, &parameters)).await {
        Err(error) if error.is_not_found() => Ok(()),
        result => result.map(drop),
    }
}

/// Writes the whole status.
///
/// # Errors
/// It can't be written.
pub async fn status(operator: &Operator, tenant: &Tenant, status: &TenantStatus) -> Result<(), Error> {
    let api: Api<Tenant> = Api::all(operator.client.clone());
    let body = Patch::Apply(json!({
        "apiVersion": Tenant::api_version(&()),
        "kind": Tenant::kind(&()),
        "metadata": {"name": tenant.metadata.name, "uid": tenant.metadata.uid},
        "status": status,
    }));
    let name = tenant.name_any();
    let parameters = PatchParams::apply(FIELD_MANAGER).force();
    let write = api.patch_status(&name, &parameters, &body);
    written("apply", "TenantStatus", &tenant.metadata, write).await.map(drop)
}

/// Keeps the object until nothing of the tenant is left.
///
/// # Errors
/// It can't be written.
pub async fn add_finalizer(operator: &Operator, tenant: &Tenant) -> Result<Tenant, Error> {
    let mut finalizers = tenant.finalizers().to_vec();
    finalizers.push(FINALIZER.to_owned());
    set_finalizers(&operator.client, tenant, &finalizers).await
}

/// Lets the object go.
///
/// # Errors
/// It can't be written. One that is gone is fine.
pub async fn remove_finalizer(client: &kube::Client, tenant: &Tenant) -> Result<(), Error> {
    let finalizers: Vec<_> = tenant.finalizers().iter().filter(|it| *it != FINALIZER).cloned().collect();
    match set_finalizers(client, tenant, &finalizers).await {
        Err(error) if error.is_not_found() => Ok(()),
        result => result.map(drop),
    }
}

async fn set_finalizers(client: &kube::Client, tenant: &Tenant, finalizers: &[String]) -> Result<Tenant, Error> {
    let api: Api<Tenant> = Api::all(client.clone());
    // With the version, so that another's finalizer is not lost.
    let body = json!({
        "metadata": {
            "finalizers": finalizers,
            "uid": tenant.metadata.uid,
            "resourceVersion": tenant.metadata.resource_version,
        },
    });
    let name = tenant.name_any();
    let parameters = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
    written("patch", "Tenant", &tenant.metadata, api.patch(&name, &parameters, &Patch::Merge(body))).await
}

/// Counts a write, waits for it, and says what it was if it fails.
async fn written<T>(
    verb: &'static str,
    kind: &'static str,
    object: &ObjectMeta,
    write: impl Future<Output = kube::Result<T>>,
) -> Result<T, Error> {
    counter!("cloister_operator_writes_total", "verb" => verb, "kind" => kind).increment(1);
    let result = match tokio::time::timeout(PATIENCE, write).await {
        Ok(result) => result,
        Err(_) => Err(kube::Error::Service("no answer in time".into())),
    };
    result.map_err(|source| {
        let name = object.name.as_deref().unwrap_or_default();
        let name = match &object.namespace {
            Some(namespace) => format!("{namespace}/{name}"),
            None => name.to_owned(),
        };
        Error::Write { verb, kind, name, source: Box::new(source) }
    })
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::ManagedFieldsEntry;
    use serde_json::json;

    use super::*;
    use crate::build::limits::build_resource_quota;
    use crate::build::workload::build_deployment;
    use crate::settings::Settings;
    use crate::wanted::samples::wanted;

    fn entry(manager: &str, operation: &str, subresource: Option<&str>) -> ManagedFieldsEntry {
        ManagedFieldsEntry {
            manager: Some(manager.to_owned()),
            operation: Some(operation.to_owned()),
            subresource: subresource.map(str::to_owned),
            ..ManagedFieldsEntry::default()
        }
    }

    #[test]
    fn who_owns_fields() {
        let shared = |entries: Vec<ManagedFieldsEntry>| {
            is_shared(&ObjectMeta { managed_fields: Some(entries), ..ObjectMeta::default() })
        };
        let ours = || entry(FIELD_MANAGER, "Apply", None);
        assert!(!shared(vec![ours(), entry("kube-controller-manager", "Update", Some("status"))]));
        assert!(!shared(vec![ours(), entry("kubectl", "Update", Some("scale"))]));
        assert!(shared(vec![ours(), entry("kubectl-edit", "Update", None)]));
        assert!(shared(vec![ours(), entry(FIELD_MANAGER, "Update", None)]), "somebody by our name, or an own replace");
        let foreign = |entries: Vec<ManagedFieldsEntry>| {
            is_foreign(&ObjectMeta { managed_fields: Some(entries), ..ObjectMeta::default() })
        };
        assert!(!foreign(vec![ours(), entry(FIELD_MANAGER, "Update", None)]), "an own replace");
        assert!(!foreign(vec![ours(), entry("kube-controller-manager", "Update", Some("status"))]));
        assert!(foreign(vec![ours(), entry("kubectl-edit", "Update", None)]));
    }

    #[test]
    fn one_field_more_is_a_difference() {
        let wanted = wanted(json!({}));
        let deployment = build_deployment(&wanted, &Settings::sample(), 1);
        let mut live = deployment.clone();
        live.annotations_mut().insert("deployment.kubernetes.io/revision".to_owned(), "1".to_owned());
        assert!(is_settled(&live, &deployment));
        live.spec.as_mut().unwrap().template.spec.as_mut().unwrap().host_network = Some(true);
        assert!(!is_settled(&live, &deployment));

        let quota = build_resource_quota(&wanted);
        let mut live = quota.clone();
        assert!(is_settled(&live, &quota));
        live.labels_mut().insert("x".to_owned(), "y".to_owned());
        assert!(!is_settled(&live, &quota));
        live = quota.clone();
        live.metadata.finalizers = Some(vec!["example.com/stay".to_owned()]);
        assert!(!is_settled(&live, &quota));
    }
}
