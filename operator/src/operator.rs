//! What every look at a tenant has at hand.

use std::sync::Arc;

use kube::Client;
use kube::runtime::events::Recorder;

use crate::api::Api;
use crate::cluster::Cluster;
use crate::memory::Memory;
use crate::rollout::Rollouts;
use crate::settings::Settings;

/// What every look at a tenant has at hand.
pub struct Operator {
    /// The settings.
    pub settings: Settings,
    /// The Kubernetes API, for writes.
    pub client: Client,
    /// The cluster as it was watched.
    pub cluster: Arc<Cluster>,
    /// The platform's api.
    pub api: Api,
    /// What is remembered of each tenant.
    pub memory: Arc<Memory>,
    /// Who is getting a new image.
    pub rollouts: Rollouts,
    /// Where events are told.
    pub events: Recorder,
}
