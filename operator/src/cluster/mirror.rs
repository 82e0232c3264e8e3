//! A kind's objects as they are: as last watched, or as last written where the watch hasn't caught up.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crds::Tenant;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{LimitRange, Namespace, ResourceQuota, Secret, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::api::PartialObjectMeta;
use kube::runtime::reflector::store::Writer;
use kube::runtime::reflector::{self, ObjectRef, Store};
use kube::runtime::watcher::Event;
use kube::{Resource, ResourceExt};

/// Namespace (empty for a cluster-wide kind) and name.
type Key = (String, String);

/// A kind's objects.
pub struct Mirror<K: Resource<DynamicType = ()> + Clone + 'static> {
    store: Store<K>,
    /// What was written since and hasn't come back.
    written: Mutex<HashMap<Key, Arc<K>>>,
}

/// A mirror, and what fills it.
pub fn mirror<K: Resource<DynamicType = ()> + Clone + 'static>() -> (Mirror<K>, Writer<K>) {
    let (store, writer) = reflector::store();
    (Mirror { store, written: Mutex::default() }, writer)
}

impl<K: Kept<DynamicType = ()> + Clone + Debug + 'static> Mirror<K> {
    /// Waits until the kind was listed once.
    pub async fn wait_until_listed(&self) {
        // Only fails when the watch is gone, which is when the operator stops.
        let _ = self.store.wait_until_ready().await;
    }

    /// The object.
    pub fn get(&self, namespace: Option<&str>, name: &str) -> Option<Arc<K>> {
        let reference = ObjectRef::new(name);
        let reference = match namespace {
            Some(namespace) => reference.within(namespace),
            None => reference,
        };
        let watched = self.store.get(&reference);
        let key = (namespace.unwrap_or_default().to_owned(), name.to_owned());
        match self.written().get(&key) {
            Some(written) if watched.as_deref().is_none_or(|it| version(it) < version(written.as_ref())) => {
                Some(written.clone())
            }
            _ => watched,
        }
    }

    /// Every object that was watched.
    pub fn all(&self) -> Vec<Arc<K>> {
        self.store.state()
    }

    /// The objects in a namespace that were watched.
    pub fn in_namespace(&self, namespace: &str) -> Vec<Arc<K>> {
        self.store.state_filter(|object| object.meta().namespace.as_deref() == Some(namespace))
    }

    /// Keeps what the API server answered to a write, until the watch tells of it or of something later.
    pub fn wrote(&self, mut object: K) {
        slim(&mut object);
        self.written().insert(key(&object), Arc::new(object));
    }

    /// Lets go of what was written and has come back.
    pub fn saw(&self, event: &Event<K>) {
        match event {
            Event::Apply(object) | Event::Delete(object) => {
                let mut written = self.written();
                let key = key(object);
                // A deletion has a version of its own, later than each write before it.
                if written.get(&key).is_some_and(|it| version(it.as_ref()) <= version(object)) {
                    written.remove(&key);
                }
            }
            Event::InitDone => self.written().clear(),
            Event::Init | Event::InitApply(_) => {}
        }
    }

    fn written(&self) -> MutexGuard<'_, HashMap<Key, Arc<K>>> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn key<K: Resource>(object: &K) -> Key {
    (object.meta().namespace.clone().unwrap_or_default(), object.meta().name.clone().unwrap_or_default())
}

/// Resource versions of a kind may be compared as numbers (KEP-5504). One that can't be read counts as the oldest.
fn version<K: Resource>(object: &K) -> u128 {
    object.meta().resource_version.as_deref().and_then(|version| version.parse().ok()).unwrap_or_default()
}

/// A kind of which is kept what a look at a tenant needs.
pub trait Kept: Resource {
    /// Leaves out a status that nobody here looks at.
    fn forget_status(&mut self) {}
}

macro_rules! kept {
    ($($kind:ty),+) => {$(impl Kept for $kind {})+};
}

kept!(
    Tenant,
    Namespace,
    LimitRange,
    NetworkPolicy,
    ServiceAccount,
    PartialObjectMeta<Secret>,
    Deployment,
    EndpointSlice
);

impl Kept for ResourceQuota {
    fn forget_status(&mut self) {
        self.status = None;
    }
}

impl Kept for PodDisruptionBudget {
    fn forget_status(&mut self) {
        self.status = None;
    }
}

/// Leaves out what nobody here looks at: of managed fields only whose they are is of interest.
pub fn slim<K: Kept>(object: &mut K) {
    for entry in object.managed_fields_mut() {
        entry.fields_v1 = None;
        entry.time = None;
        entry.fields_type = None;
        entry.api_version = None;
    }
    object.forget_status();
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{ResourceQuotaStatus, ServiceAccount};
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::{FieldsV1, ManagedFieldsEntry};
    use kube::api::ObjectMeta;

    use super::*;

    fn account(version: &str) -> ServiceAccount {
        ServiceAccount {
            metadata: ObjectMeta {
                name: Some("a".to_owned()),
                namespace: Some("n".to_owned()),
                resource_version: Some(version.to_owned()),
                ..ObjectMeta::default()
            },
            ..ServiceAccount::default()
        }
    }

    fn version_of(mirror: &Mirror<ServiceAccount>) -> Option<String> {
        mirror.get(Some("n"), "a").and_then(|object| object.resource_version())
    }

    fn see(mirror: &Mirror<ServiceAccount>, writer: &mut Writer<ServiceAccount>, event: Event<ServiceAccount>) {
        writer.apply_watcher_event(&event);
        mirror.saw(&event);
    }

    #[test]
    fn what_was_written_counts_until_the_watch_has_it() {
        let (mirror, mut writer) = mirror();
        see(&mirror, &mut writer, Event::Apply(account("9")));
        mirror.wrote(account("10"));
        assert_eq!(version_of(&mirror).as_deref(), Some("10"));
        see(&mirror, &mut writer, Event::Apply(account("9")));
        assert_eq!(version_of(&mirror).as_deref(), Some("10"));
        see(&mirror, &mut writer, Event::Apply(account("12")));
        assert_eq!(version_of(&mirror).as_deref(), Some("12"));
        assert!(mirror.written().is_empty());
    }

    #[test]
    fn nothing_is_kept_that_nobody_looks_at() {
        let mut quota = ResourceQuota { status: Some(ResourceQuotaStatus::default()), ..ResourceQuota::default() };
        quota.metadata.managed_fields = Some(vec![ManagedFieldsEntry {
            manager: Some("cloister-operator".to_owned()),
            fields_v1: Some(FieldsV1::default()),
            ..ManagedFieldsEntry::default()
        }]);
        slim(&mut quota);
        assert_eq!(quota.status, None);
        let entry = &quota.managed_fields()[0];
        assert_eq!((entry.manager.as_deref(), &entry.fields_v1), (Some("cloister-operator"), &None));
    }

    #[test]
    fn what_was_deleted_since_is_gone() {
        let (mirror, mut writer) = mirror();
        mirror.wrote(account("10"));
        see(&mirror, &mut writer, Event::Apply(account("10")));
        mirror.wrote(account("11"));
        see(&mirror, &mut writer, Event::Delete(account("12")));
        assert_eq!(version_of(&mirror), None);
        mirror.wrote(account("13"));
        see(&mirror, &mut writer, Event::InitDone);
        assert_eq!(version_of(&mirror), None);
    }
}
