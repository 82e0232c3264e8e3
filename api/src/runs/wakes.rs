//! Wakes whoever waits for something to claim: the shared pool here, and long polls of workers apart.

use std::sync::Arc;

use dashmap::DashMap;
use tokio::sync::Notify;

/// A bell for each pool.
#[derive(Default)]
pub struct Wakes {
    pools: DashMap<String, Arc<Notify>>,
}

impl Wakes {
    /// Says that a pool's queue may hold something to claim. Kept for the next who waits, if nobody does.
    pub fn wake(&self, pool: &str) {
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
