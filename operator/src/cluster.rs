//! The cluster as the operator sees it: one watch a kind, slimmed, and what was written since. Nothing is read from the
//! API server object by object.

pub mod definition;
pub mod mirror;

use std::sync::Arc;

use crds::Tenant;
use crds::tenant::{TENANT_LABEL, TENANT_UID_ANNOTATION};
use futures_util::StreamExt;
use ipnet::IpNet;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{LimitRange, Namespace, ResourceQuota, Secret, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::api::PartialObjectMeta;
use kube::runtime::WatchStreamExt;
use kube::runtime::reflector::{self, ObjectRef, Store};
use kube::runtime::watcher::{Config, Event, watcher};
use kube::{Api, Client, ResourceExt};
use metrics::counter;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use self::mirror::{Kept, Mirror, slim};
use crate::build::NAME;
use crate::settings::Settings;

/// Objects that one answer lists at most.
const PAGE: u32 = 100;

/// Tenants that are to be looked at.
#[derive(Clone)]
pub struct Triggers(mpsc::UnboundedSender<ObjectRef<Tenant>>);

impl Triggers {
    /// Triggers, and where they arrive.
    pub fn new() -> (Self, mpsc::UnboundedReceiver<ObjectRef<Tenant>>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Self(sender), receiver)
    }

    /// Has a tenant looked at. Nobody listening means that the operator stops.
    pub fn tenant(&self, name: &str) {
        let _ = self.0.send(ObjectRef::new(name));
    }
}

/// The cluster.
pub struct Cluster {
    /// Every tenant.
    pub tenants: Store<Tenant>,
    /// Every namespace: a tenant's may have lost its label, and a foreign one may bear its name.
    pub namespaces: Mirror<Namespace>,
    /// Tenants' quotas.
    pub quotas: Mirror<ResourceQuota>,
    /// Tenants' limit ranges.
    pub limits: Mirror<LimitRange>,
    /// Every network policy: a foreign one opens what ours closes.
    pub policies: Mirror<NetworkPolicy>,
    /// Tenants' service accounts.
    pub accounts: Mirror<ServiceAccount>,
    /// Tenants' secrets, without what they hold.
    pub secrets: Mirror<PartialObjectMeta<Secret>>,
    /// Tenants' workers.
    pub deployments: Mirror<Deployment>,
    /// Tenants' disruption budgets.
    pub budgets: Mirror<PodDisruptionBudget>,
    /// Where the Kubernetes API listens.
    pub endpoints: Mirror<EndpointSlice>,
    /// Whom to look at.
    pub triggers: Triggers,
    namespace_prefix: String,
}

impl Cluster {
    /// Begins to watch, until `stopping`. `forget` is told of tenants whose object is gone.
    pub fn watch(
        client: &Client,
        settings: &Settings,
        triggers: Triggers,
        forget: impl Fn(&str) + Send + Sync + 'static,
        stopping: &CancellationToken,
    ) -> Arc<Self> {
        let (tenants, tenants_writer) = reflector::store();
        let cluster = Arc::new(Self {
            tenants,
            namespaces: Mirror::default(),
            quotas: Mirror::default(),
            limits: Mirror::default(),
            policies: Mirror::default(),
            accounts: Mirror::default(),
            secrets: Mirror::default(),
            deployments: Mirror::default(),
            budgets: Mirror::default(),
            endpoints: Mirror::default(),
            triggers,
            namespace_prefix: settings.namespace_prefix.clone(),
        });

        let watch = Watch { cluster: cluster.clone(), client: client.clone(), stopping: stopping.clone() };
        let all = paged();
        let ours = all.clone().fields(&format!("metadata.name={NAME}"));
        watch.tenants(tenants_writer, forget);
        watch.children(Api::all(client.clone()), all.clone(), |it| &it.namespaces);
        watch.children(Api::all(client.clone()), ours.clone(), |it| &it.quotas);
        watch.children(Api::all(client.clone()), ours.clone(), |it| &it.limits);
        watch.children(Api::all(client.clone()), all, |it| &it.policies);
        watch.children(Api::all(client.clone()), ours.clone(), |it| &it.accounts);
        watch.children(Api::all(client.clone()), ours.clone(), |it| &it.secrets);
        watch.children(Api::all(client.clone()), ours.clone(), |it| &it.deployments);
        watch.children(Api::all(client.clone()), ours, |it| &it.budgets);
        let kubernetes = paged().fields("metadata.name=kubernetes");
        let default = Api::namespaced(client.clone(), "default");
        watch.children(default, kubernetes, |it| &it.endpoints);
        cluster
    }

    /// Waits until each kind was listed once.
    pub async fn wait_until_listed(&self) {
        // A watch that is gone means that the operator stops.
        let _ = tokio::join!(
            self.tenants.wait_until_ready(),
            self.namespaces.wait_until_listed(),
            self.quotas.wait_until_listed(),
            self.limits.wait_until_listed(),
            self.policies.wait_until_listed(),
            self.accounts.wait_until_listed(),
            self.secrets.wait_until_listed(),
            self.deployments.wait_until_listed(),
            self.budgets.wait_until_listed(),
            self.endpoints.wait_until_listed(),
        );
    }

    /// Has every tenant looked at.
    pub fn trigger_all(&self) {
        for tenant in self.tenants.state() {
            self.triggers.tenant(&tenant.name_any());
        }
    }

    /// The Kubernetes API's own addresses.
    pub fn api_server(&self) -> Vec<IpNet> {
        let slices = self.endpoints.all();
        let addresses = slices.iter().flat_map(|slice| slice.endpoints.iter().flatten()).flat_map(|it| &it.addresses);
        let mut nets: Vec<IpNet> =
            addresses.filter_map(|address| address.parse().ok().map(|ip: std::net::IpAddr| IpNet::from(ip))).collect();
        nets.sort();
        nets.dedup();
        nets
    }

    /// Names of network policies in this namespace that are not ours.
    pub fn foreign_policies(&self, namespace: &str) -> Vec<String> {
        self.policies.names_in(namespace).into_iter().filter(|name| name != NAME).collect()
    }

    /// Namespaces that bear our label and belong to no tenant that there is.
    pub fn orphans(&self) -> Vec<String> {
        let namespaces = self.namespaces.all();
        let mut orphans: Vec<String> = namespaces
            .iter()
            .filter(|namespace| namespace.labels().contains_key(TENANT_LABEL) && !self.has_tenant(namespace))
            .map(|namespace| namespace.name_any())
            .collect();
        orphans.sort();
        orphans
    }

    fn has_tenant(&self, namespace: &Namespace) -> bool {
        self.tenant_of(&namespace.name_any())
            .and_then(|name| self.tenants.get(&ObjectRef::new(&name)))
            .is_some_and(|tenant| owns(&tenant, namespace, &format!("{}{}", self.namespace_prefix, tenant.name_any())))
    }

    /// The tenant that a namespace by this name belongs, or would belong, to.
    fn tenant_of(&self, namespace: &str) -> Option<String> {
        let by_name = namespace.strip_prefix(&self.namespace_prefix);
        if let Some(name) = by_name
            && self.tenants.get(&ObjectRef::new(name)).is_some()
        {
            return Some(name.to_owned());
        }
        // One that was made under another prefix.
        let has = |tenant: &Tenant| {
            let status = tenant.status.as_ref().and_then(|status| status.namespace.as_ref());
            status.is_some_and(|status| status.name == namespace)
        };
        self.tenants.find(has).map(|tenant| tenant.name_any())
    }
}

/// Whether a namespace is the tenant's. The annotation decides; where somebody took it away, the UID in the status does,
/// for a namespace of the tenant's own name: a status that somebody forged must not hand over anybody else's.
pub fn owns(tenant: &Tenant, namespace: &Namespace, own_name: &str) -> bool {
    let annotation = namespace.annotations().get(TENANT_UID_ANNOTATION);
    let is_marked = annotation.is_some() && annotation == tenant.metadata.uid.as_ref();
    is_marked || (namespace.name_any() == own_name && is_in_status(tenant, namespace))
}

/// Whether the tenant's status names this very namespace.
pub fn is_in_status(tenant: &Tenant, namespace: &Namespace) -> bool {
    let status = tenant.status.as_ref().and_then(|status| status.namespace.as_ref());
    status.is_some_and(|status| Some(&status.uid) == namespace.metadata.uid.as_ref())
}

/// All objects, listed in pages that take little memory: ten kinds are listed at once.
fn paged() -> Config {
    Config::default().page_size(PAGE)
}

struct Watch {
    cluster: Arc<Cluster>,
    client: Client,
    stopping: CancellationToken,
}

impl Watch {
    fn tenants(&self, writer: reflector::store::Writer<Tenant>, forget: impl Fn(&str) + Send + Sync + 'static) {
        let stream = watcher(Api::<Tenant>::all(self.client.clone()), paged()).modify(slim).reflect(writer);
        let cluster = self.cluster.clone();
        self.run("Tenant", stream.default_backoff(), move |event| match event {
            Event::Apply(tenant) => cluster.triggers.tenant(&tenant.name_any()),
            Event::Delete(tenant) => forget(&tenant.name_any()),
            Event::InitDone => cluster.trigger_all(),
            Event::Init | Event::InitApply(_) => {}
        });
    }

    fn children<K>(&self, api: Api<K>, config: Config, mirror: impl Fn(&Cluster) -> &Mirror<K> + Send + Sync + 'static)
    where
        K: Kept,
    {
        let stream = watcher(api, config).modify(slim);
        let cluster = self.cluster.clone();
        self.run(&K::kind(&()), stream.default_backoff(), move |event| {
            mirror(&cluster).saw(&event);
            match event {
                Event::Apply(object) | Event::Delete(object) => {
                    let namespace = object.namespace().unwrap_or_else(|| object.name_any());
                    if let Some(tenant) = cluster.tenant_of(&namespace) {
                        cluster.triggers.tenant(&tenant);
                    } else if K::kind(&()) == "EndpointSlice" {
                        // The Kubernetes API moved: every tenant's policy names its addresses.
                        cluster.trigger_all();
                    }
                }
                // What went while nobody watched left no event.
                Event::InitDone => cluster.trigger_all(),
                Event::Init | Event::InitApply(_) => {}
            }
        });
    }

    fn run<K, S>(&self, kind: &str, stream: S, mut on: impl FnMut(Event<K>) + Send + 'static)
    where
        K: Send + 'static,
        S: futures_util::Stream<Item = Result<Event<K>, kube::runtime::watcher::Error>> + Send + 'static,
    {
        let kind = kind.to_owned();
        let stopping = self.stopping.clone();
        tokio::spawn(async move {
            let mut stream = std::pin::pin!(stream);
            while let Some(Some(event)) = stopping.run_until_cancelled(stream.next()).await {
                match event {
                    Ok(event) => on(event),
                    Err(error) => {
                        counter!("cloister_operator_watch_errors_total", "kind" => kind.clone()).increment(1);
                        tracing::warn!(%kind, %error, "a watch was interrupted and begins again");
                    }
                }
            }
        });
    }
}
