//! A kind's objects as they are: as last watched, or as last written where the watch hasn't caught up.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

use crds::Tenant;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{LimitRange, Namespace, ResourceQuota, Secret, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::api::PartialObjectMeta;
use kube::runtime::watcher::Event;
use kube::{Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use crate::rollout::Progress;

/// Namespace (empty for a cluster-wide kind) and name.
type Key = (String, String);

/// A kind's objects, each packed: there are ten for every tenant, few are looked at at once, and unpacked they take five
/// times the memory.
pub struct Mirror<K: Kept> {
    watched: RwLock<Watched<K>>,
    is_listed: watch::Sender<bool>,
    /// What was written since and hasn't come back.
    written: Mutex<HashMap<Key, Arc<K>>>,
}

struct Watched<K: Kept> {
    objects: BTreeMap<Key, Packed<K>>,
    /// Those of a list that isn't complete yet.
    listing: BTreeMap<Key, Packed<K>>,
}

/// An object as JSON.
struct Packed<K: Kept> {
    version: u128,
    json: Box<[u8]>,
    summary: K::Summary,
}

impl<K: Kept> Packed<K> {
    fn of(object: &K) -> Self {
        let json = serde_json::to_vec(object).unwrap_or_else(|error| {
            tracing::error!(kind = %K::kind(&()), %error, "an object can't be kept");
            Vec::new()
        });
        Self { version: version(object), json: json.into_boxed_slice(), summary: object.summary() }
    }

    fn unpack(&self) -> Option<Arc<K>> {
        serde_json::from_slice(&self.json).ok().map(Arc::new)
    }
}

impl<K: Kept> Default for Mirror<K> {
    fn default() -> Self {
        let watched = Watched { objects: BTreeMap::new(), listing: BTreeMap::new() };
        Self { watched: RwLock::new(watched), is_listed: watch::Sender::new(false), written: Mutex::default() }
    }
}

impl<K: Kept> Mirror<K> {
    /// Waits until the kind was listed once.
    pub async fn wait_until_listed(&self) {
        // The other end is here.
        let _ = self.is_listed.subscribe().wait_for(|is_listed| *is_listed).await;
    }

    /// The object.
    pub fn get(&self, namespace: Option<&str>, name: &str) -> Option<Arc<K>> {
        let key = (namespace.unwrap_or_default().to_owned(), name.to_owned());
        let watched = self.watched();
        let watched = watched.objects.get(&key);
        // Unpacked below without the lock, which all looks share.
        let written = self.written().get(&key).cloned();
        match written {
            Some(written) if watched.is_none_or(|it| it.version < version(written.as_ref())) => Some(written),
            _ => watched.and_then(Packed::unpack),
        }
    }

    /// Every object that was watched.
    pub fn all(&self) -> Vec<Arc<K>> {
        self.watched().objects.values().filter_map(Packed::unpack).collect()
    }

    /// The namespace and the summary of every object that was watched.
    pub fn summaries(&self) -> Vec<(String, K::Summary)> {
        let watched = self.watched();
        watched.objects.iter().map(|((namespace, _), packed)| (namespace.clone(), packed.summary.clone())).collect()
    }

    /// The names of the objects in a namespace that were watched, in order.
    pub fn names_in(&self, namespace: &str) -> Vec<String> {
        let watched = self.watched();
        let from = watched.objects.range((namespace.to_owned(), String::new())..);
        from.map(|(key, _)| key).take_while(|key| key.0 == namespace).map(|key| key.1.clone()).collect()
    }

    /// Keeps what the API server answered to a write, until the watch tells of it or of something later.
    pub fn wrote(&self, mut object: K) {
        slim(&mut object);
        self.written().insert(key(&object), Arc::new(object));
    }

    /// Takes in what the watch tells, and lets go of what was written and has come back.
    pub fn saw(&self, event: &Event<K>) {
        // Packed before the lock is taken: looks go on meanwhile.
        let packed = match event {
            Event::Apply(object) | Event::InitApply(object) => Some((key(object), Packed::of(object))),
            Event::Delete(_) | Event::Init | Event::InitDone => None,
        };
        let mut watched = self.watched.write().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Apply(object) => {
                watched.objects.extend(packed);
                self.came_back(object);
            }
            Event::Delete(object) => {
                watched.objects.remove(&key(object));
                // A deletion has a version of its own, later than each write before it.
                self.came_back(object);
            }
            Event::Init => watched.listing.clear(),
            Event::InitApply(_) => watched.listing.extend(packed),
            Event::InitDone => {
                watched.objects = std::mem::take(&mut watched.listing);
                self.written().clear();
                self.is_listed.send_replace(true);
            }
        }
    }

    fn came_back(&self, object: &K) {
        let mut written = self.written();
        let key = key(object);
        if written.get(&key).is_some_and(|it| version(it.as_ref()) <= version(object)) {
            written.remove(&key);
        }
    }

    fn watched(&self) -> RwLockReadGuard<'_, Watched<K>> {
        self.watched.read().unwrap_or_else(PoisonError::into_inner)
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
pub trait Kept:
    Resource<DynamicType = ()> + Clone + Debug + Serialize + DeserializeOwned + Send + Sync + 'static
{
    /// What is looked at of all objects at once.
    type Summary: Clone + Send + Sync;

    /// Sums the object up.
    fn summary(&self) -> Self::Summary;

    /// Leaves out a status that nobody here looks at.
    fn forget_status(&mut self) {}
}

macro_rules! kept {
    ($($kind:ty $(: without $status:ident)?),+) => {$(
        impl Kept for $kind {
            type Summary = ();

            fn summary(&self) {}

            $(fn forget_status(&mut self) {
                self.$status = None;
            })?
        }
    )+};
}

kept!(
    Tenant,
    Namespace,
    ResourceQuota: without status,
    LimitRange,
    NetworkPolicy,
    ServiceAccount,
    PartialObjectMeta<Secret>,
    PodDisruptionBudget: without status,
    EndpointSlice
);

impl Kept for Deployment {
    type Summary = Progress;

    fn summary(&self) -> Progress {
        Progress::of(self)
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
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::{FieldsV1, ManagedFieldsEntry, Time};
    use k8s_openapi::jiff::Timestamp;
    use kube::api::ObjectMeta;
    use serde_json::json;

    use super::*;
    use crate::build::NAME;
    use crate::build::network::build_network_policy;
    use crate::build::workload::build_deployment;
    use crate::settings::Settings;
    use crate::wanted::Addresses;
    use crate::wanted::samples::wanted;

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

    #[test]
    fn what_was_written_counts_until_the_watch_has_it() {
        let mirror = Mirror::default();
        mirror.saw(&Event::Apply(account("9")));
        mirror.wrote(account("10"));
        assert_eq!(version_of(&mirror).as_deref(), Some("10"));
        mirror.saw(&Event::Apply(account("9")));
        assert_eq!(version_of(&mirror).as_deref(), Some("10"));
        mirror.saw(&Event::Apply(account("12")));
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
        let mirror = Mirror::default();
        mirror.wrote(account("10"));
        mirror.saw(&Event::Apply(account("10")));
        mirror.wrote(account("11"));
        mirror.saw(&Event::Delete(account("12")));
        assert_eq!(version_of(&mirror), None);
        mirror.wrote(account("13"));
        mirror.saw(&Event::InitDone);
        assert_eq!(version_of(&mirror), None);
    }

    #[test]
    fn an_object_comes_out_as_it_went_in() {
        let wanted = wanted(json!({"runtime": {"nodeSelector": {"a": "b"}, "resources": {"limits": {"cpu": "2"}}}}));
        let mut deployment = build_deployment(&wanted, &Settings::sample(), 3);
        deployment.metadata.creation_timestamp = Some(Time(Timestamp::from_second(1_800_000_000).unwrap()));
        let mirror = Mirror::default();
        mirror.saw(&Event::Apply(deployment.clone()));
        assert_eq!(mirror.get(Some(&wanted.namespace), NAME).as_deref(), Some(&deployment));
        let policy = build_network_policy(&wanted, &Settings::sample(), &Addresses::default());
        let mirror = Mirror::default();
        mirror.saw(&Event::Apply(policy.clone()));
        assert_eq!(mirror.get(Some(&wanted.namespace), NAME).as_deref(), Some(&policy));
        assert_eq!(mirror.names_in(&wanted.namespace), [NAME]);
        assert_eq!(mirror.names_in("tenant"), Vec::<String>::new());
    }

    #[test]
    fn a_list_counts_once_it_is_complete() {
        let mirror = Mirror::default();
        mirror.saw(&Event::Apply(account("1")));
        mirror.saw(&Event::Init);
        assert_eq!(version_of(&mirror).as_deref(), Some("1"));
        mirror.saw(&Event::InitApply(account("2")));
        assert_eq!(version_of(&mirror).as_deref(), Some("1"));
        mirror.saw(&Event::InitDone);
        assert_eq!(version_of(&mirror).as_deref(), Some("2"));
        // What is in no list any more is gone.
        mirror.saw(&Event::Init);
        mirror.saw(&Event::InitDone);
        assert_eq!(version_of(&mirror), None);
        assert!(mirror.all().is_empty() && *mirror.is_listed.borrow());
    }
}
