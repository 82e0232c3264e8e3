//! Tells a tenant's subscribers what changed, in this process.

use std::sync::Arc;

use dashmap::DashMap;
use entity::runs;
use tokio::sync::broadcast;
use uuid::Uuid;

/// Changes a subscriber may lag behind before it misses some.
const BUFFER: usize = 256;

/// What changed.
#[derive(Clone, Debug)]
pub enum Change {
    /// A run's state; the run as it was then.
    Run(Arc<runs::Model>),
    /// The month's usage.
    Usage,
}

/// A channel for each tenant that somebody listens to.
#[derive(Default)]
pub struct Changes {
    tenants: DashMap<Uuid, broadcast::Sender<Change>>,
}

impl Changes {
    /// Listens to a tenant's changes.
    pub fn subscribe(&self, tenant_id: Uuid) -> broadcast::Receiver<Change> {
        self.tenants.entry(tenant_id).or_insert_with(|| broadcast::Sender::new(BUFFER)).subscribe()
    }

    /// Tells whoever listens. A channel that nobody listens to any more goes away.
    pub fn publish(&self, tenant_id: Uuid, change: Change) {
        let unheard = self.tenants.get(&tenant_id).is_some_and(|channel| channel.send(change).is_err());
        if unheard {
            self.tenants.remove_if(&tenant_id, |_, channel| channel.receiver_count() == 0);
        }
    }
}
