//! A platform with clusters: what their operators tell of the objects `Tenant` and are told in return (`/operator/v1`),
//! and what the api itself writes to the objects of its own cluster.
//!
//! The object rules, the database acts. An operator tells what its objects say ([`report`]), and each field that an
//! object changes is taken over, once; what billing or an admin changed since stays. Every reason to suspend a tenant
//! stands by itself. What an admin changes through GraphQL is written to the object too ([`objects`]): refused where
//! somebody else holds the field ([`asked`]), and owed where it takes effect before the cluster can be asked
//! ([`owed`]).

pub mod asked;
mod changes;
mod credential;
mod farewell;
mod fulfil;
pub mod graphql;
pub mod http;
pub mod objects;
pub mod owed;
pub mod places;
mod refused;
mod report;
mod state;
mod tokens;
pub mod wording;

use kube::{Client, Config as KubeConfig};
use tokio::sync::OnceCell;

use self::changes::Boards;
use self::credential::Reviews;
use crate::config::ClusterConfig;
use crate::error::Error;

/// The cluster that the api itself is in, and what it remembers of all.
pub struct Cluster {
    client: Option<Client>,
    writes: bool,
    id: OnceCell<String>,
    reviews: Reviews,
    boards: Boards,
}

impl Cluster {
    /// As configured. The cluster is not asked yet: it may be away.
    ///
    /// # Errors
    /// The configuration needs a cluster, and there is no way to one.
    pub async fn new(config: &ClusterConfig) -> Result<Self, Error> {
        let client = if config.needs_cluster() { Some(connect().await?) } else { None };
        let (id, reviews, boards) = (OnceCell::new(), Reviews::default(), Boards::default());
        Ok(Self { client, writes: config.enabled, id, reviews, boards })
    }

    /// Whether the api writes objects.
    pub fn writes_objects(&self) -> bool {
        self.writes
    }
}

async fn connect() -> Result<Client, Error> {
    let no_way = |error: &dyn std::fmt::Display| {
        Error::internal(format!(
            "cluster: no way to a Kubernetes cluster: {error}. Run the api in one, or set KUBECONFIG to a file."
        ))
    };
    let config = KubeConfig::infer().await.map_err(|error| no_way(&error))?;
    Client::try_from(config).map_err(|error| no_way(&error))
}
