//! Wakes whoever waits for something to claim: the shared pool here and on other replicas, and long polls of workers
//! apart.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use dashmap::DashMap;
use tokio::sync::Notify;

use crate::bus::{Bus, Topic, What};

/// A bell for each pool.
pub struct Wakes {
    bus: Bus,
    pools: DashMap<String, Arc<Bell>>,
}

/// What whoever claims from a pool listens to.
#[derive(Default)]
pub struct Bell {
    rung: Notify,
    /// [`LOUD`], [`LOOKING`] or [`SILENT`].
    state: AtomicU8,
}

/// Something may be queued: places that become free are told.
const LOUD: u8 = 0;
/// As [`LOUD`]; the queue is being looked into, and nobody has rung since.
const LOOKING: u8 = 1;
/// When the queue was last looked into nothing was there, and nobody has rung since: what becomes free is of no use.
const SILENT: u8 = 2;

impl Bell {
    /// Returns when the pool is woken.
    pub async fn rung(&self) {
        self.rung.notified().await;
    }

    /// To be said before the queue is looked into.
    pub fn look(&self) {
        self.state.store(LOOKING, Ordering::SeqCst);
    }

    /// Nothing waits in the queue, not even for a place: those that become free wake nobody until the bell is rung. If it
    /// was rung since the look, it is as if this had not been said.
    pub fn nothing_waits(&self) {
        let _ = self.state.compare_exchange(LOOKING, SILENT, Ordering::SeqCst, Ordering::SeqCst);
    }

    fn is_silent(&self) -> bool {
        self.state.load(Ordering::SeqCst) == SILENT
    }

    fn ring(&self) {
        self.state.store(LOUD, Ordering::SeqCst);
        self.rung.notify_one();
    }
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

    /// As [`Wakes::wake`], where a place has become free: nobody needs to know of it if nothing waits for one.
    pub fn free(&self, pool: &str) {
        if !self.bell(pool).is_silent() {
            self.wake(pool);
        }
    }

    /// As [`Wakes::wake`], in this process only.
    pub fn ring(&self, pool: &str) {
        self.bell(pool).ring();
    }

    /// A pool's bell.
    pub fn bell(&self, pool: &str) -> Arc<Bell> {
        if let Some(bell) = self.pools.get(pool) {
            return bell.clone();
        }
        self.pools.entry(pool.to_owned()).or_default().clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_bell_is_silent_only_where_nothing_was_queued_since_the_look() {
        let bell = Bell::default();
        bell.nothing_waits();
        assert!(!bell.is_silent(), "nobody has looked");
        bell.look();
        assert!(!bell.is_silent(), "a place that becomes free during the look may be what the look misses");
        bell.nothing_waits();
        assert!(bell.is_silent());
        bell.look();
        bell.ring();
        bell.nothing_waits();
        assert!(!bell.is_silent(), "something was queued during the look");
        bell.rung().await;
    }
}
