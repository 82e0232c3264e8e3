//! Wakes whoever waits for something to claim: the shared pool here and on other replicas, and long polls of workers
//! apart.

use std::sync::Arc;

use dashmap::DashMap;
use tokio::sync::Notify;

use crate::bus::{Bus, Topic, What};

/// A bell for each pool.
pub struct Wakes {
    bus: Bus,
    pools: DashMap<String, Arc<Notify>>,
}

impl Wakes {
    /// Bells that other replicas' ring too.
    pub fn new(bus: Bus) -> Self {
        Self { bus, pools: DashMap::new() }
    }

    /// Says, on every replica, that a pool's queue may hold something to claim. Kept for the next who waits, if nobody
    /// does.
    pub fn wake(&self, pool: &str) {
        self.ring(pool);
        self.bus.tell(Topic::Everyone, What::Wake(pool.to_owned()));
    }

    /// As [`Wakes::wake`], in this process only.
    pub fn ring(&self, pool: &str) {
        self.bell(pool).notify_one();
    }

    /// A pool's bell: `notified()` on it returns when the pool is woken.
    pub fn bell(&self, pool: &str) -> Arc<Notify> {
        if let Some(bell) = self.pools.get(pool) {
            return bell.clone();
        }
        self.pools.entry(pool.to_owned()).or_default().clone()
    }
}
