//! The state that every handler is given.

use std::ops::Deref;
use std::sync::Arc;

use cloister_runtime::mcp::McpClient;
use cloister_runtime::webhook::{AddressPolicy, WebhookClient};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::agents::graph::{self, Closures};
use crate::batch::Batch;
use crate::billing::plans::{self, Plans};
use crate::bus::Bus;
use crate::clock::Clock;
use crate::cluster::Cluster;
use crate::config::Config;
use crate::db::Db;
use crate::error::Error;
use crate::graphql::Schema;
use crate::keys::ring::KeyRing;
use crate::keys::{self, authority};
use crate::metrics;
use crate::models::catalog::{self, Catalog};
use crate::rate::RateLimits;
use crate::retention;
use crate::runs::pool::Pool;
use crate::runs::wakes::Wakes;
use crate::runs::{self, live::Live};
use crate::secrets::Vault;
use crate::tenants::changes::Changes;
use crate::usage::quota::Releases;
use crate::usage::report;

/// Closures of published agents kept at hand.
const CLOSURES: usize = 10_000;

/// The application: concrete parts, shared by every request. Cheap to clone.
#[derive(Clone)]
pub struct App(Arc<Parts>);

/// What an [`App`] is made of.
pub struct Parts {
    /// The configuration as it was at the start.
    pub config: Config,
    /// The one clock.
    pub clock: Clock,
    /// The database.
    pub db: Db,
    /// Writes that gather.
    pub batches: Batches,
    /// Seals secrets.
    pub vault: Vault,
    /// The plans as configured.
    pub plans: Plans,
    /// The models as configured, and their providers.
    pub catalog: Catalog,
    /// What published agents reach.
    pub closures: Closures,
    /// The way to other replicas.
    pub bus: Bus,
    /// Keys: the admin's, those in use, uses to be written, changes of authority.
    pub keys: KeyRing,
    /// Rate limits.
    pub rates: RateLimits,
    /// Tells waiting model calls that a reservation was released.
    pub releases: Releases,
    /// Tells subscribers what runs do.
    pub live: Live,
    /// Tells subscribers what changed in a tenant.
    pub changes: Changes,
    /// Wakes whoever waits for something to claim.
    pub wakes: Wakes,
    /// The shared pool of workers.
    pub pool: Pool,
    /// The cluster, and what its operators are told.
    pub cluster: Cluster,
    /// Calls tenants' webhooks.
    pub webhooks: WebhookClient,
    /// Calls tenants' MCP servers.
    pub mcp: McpClient,
    /// The GraphQL schema.
    pub schema: Schema,
    /// What is counted, for Prometheus.
    pub metrics: PrometheusHandle,
    /// Tasks that outlive their request, such as model calls being drained.
    pub tasks: TaskTracker,
    /// Cancelled when the process is asked to stop.
    pub stopping: CancellationToken,
}

/// Where work for the database gathers, by kind.
#[derive(Default)]
pub struct Batches {
    /// What is written down of runs.
    pub record: Batch<runs::record::Record>,
    /// Agents whose published version is asked for.
    pub published: Batch<graph::Published>,
    /// Runs whose usage is asked for.
    pub used_by: Batch<report::UsedBy>,
}

impl Deref for App {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.0
    }
}

impl App {
    /// Puts the parts together on a database whose schema is up to date, and brings the rows that
    /// mirror the configuration (plans, models, prices) up to date. Returns the platform admin's key
    /// if it was made just now.
    pub async fn new(config: Config, db: Db) -> Result<(Self, Option<String>), Error> {
        let vault = Vault::new(&config.secrets).map_err(Error::internal)?;
        let policy = AddressPolicy { allowed_hosts: config.webhooks.allowed_hosts.clone(), ..Default::default() };
        let mcp = McpClient::new(policy.clone()).map_err(Error::internal)?;
        let webhooks = WebhookClient::new(policy).map_err(Error::internal)?;
        let cluster = Cluster::new(&config.cluster).await?;
        let clock = Clock::default();
        clock.follow(db.read()).await?;
        let now = clock.now();
        migration::partitions::ensure(db.write(), retention::AHEAD).await?;
        let tx = db.begin().await?;
        let plans = plans::sync(&tx, &config, now).await?;
        let catalog = catalog::sync(&tx, &config, now).await?;
        tx.commit().await?;
        let epoch = authority::epoch(db.read()).await?;
        let bus = Bus::new(&config.redis, &db).await?;
        // Last of all that may fail: a key that was made must be shown.
        let (admin_hash, new_admin_key) = keys::admin_key(&db, &config.admin, now).await?;
        let parts = Parts {
            vault,
            plans,
            catalog,
            closures: Closures::new(CLOSURES),
            keys: KeyRing::new(admin_hash, epoch, db.is_embedded()),
            rates: RateLimits::default(),
            releases: Releases::default(),
            live: Live::new(bus.clone()),
            changes: Changes::new(bus.clone()),
            wakes: Wakes::new(bus.clone()),
            bus,
            pool: Pool::new(config.runs.concurrency),
            cluster,
            webhooks,
            mcp,
            schema: crate::graphql::schema(&config.graphql),
            metrics: metrics::install(),
            tasks: TaskTracker::new(),
            stopping: CancellationToken::new(),
            batches: Batches::default(),
            config,
            clock,
            db,
        };
        Ok((Self(Arc::new(parts)), new_admin_key))
    }
}
