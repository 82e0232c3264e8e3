//! What is known of keys in this process.
//!
//! A key that was checked is kept, so that the next request asks no database. It is forgotten when its tenant's authority
//! changes, and trusted only while the last look at the epoch ([`super::authority`]) is less than a second old. What was
//! refused is not kept.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use dashmap::DashMap;
use subtle::ConstantTimeEq;
use tokio::sync::broadcast;
use tokio::time::Instant;
use uuid::Uuid;

use crate::secrets::sha256_hex;
use crate::viewer::TenantViewer;

/// Keys that are kept. Past it all are forgotten, and those in use come back.
const MAX_KEPT: usize = 50_000;

/// How long what is kept can be trusted after a look at the epoch.
const TRUST: Duration = Duration::from_secs(1);

/// How often a key's use is written at most.
const USES: TimeDelta = TimeDelta::seconds(60);

/// Keys: the admin's, those in use, their uses to be written, changes of authority.
pub struct KeyRing {
    admin_hash: String,
    /// By the hash of the secret.
    kept: DashMap<String, Kept>,
    /// Rises whenever keys are forgotten: what was being loaded then is not kept.
    forgotten: AtomicU64,
    /// Keys used since the last write, and when.
    used: DashMap<Uuid, DateTime<Utc>>,
    changes: broadcast::Sender<Uuid>,
    epoch: AtomicI64,
    /// The last look at the epoch; none where nobody else can raise it.
    confirmed: Option<RwLock<Option<Instant>>>,
}

struct Kept {
    viewer: Arc<TenantViewer>,
    /// The last use that was noted to be written, in microseconds.
    noted: AtomicI64,
}

/// What had been forgotten when a key began to be loaded.
pub struct Loading(u64);

impl KeyRing {
    /// A ring for the admin key with this hash, at this epoch. An embedded server is alone: what it keeps is always
    /// good.
    pub fn new(admin_hash: String, epoch: i64, embedded: bool) -> Self {
        Self {
            admin_hash,
            kept: DashMap::new(),
            forgotten: AtomicU64::new(0),
            used: DashMap::new(),
            changes: broadcast::Sender::new(256),
            epoch: AtomicI64::new(epoch),
            confirmed: (!embedded).then(RwLock::default),
        }
    }

    /// Whether this is the platform admin's key.
    pub fn is_admin(&self, key: &str) -> bool {
        sha256_hex(key).as_bytes().ct_eq(self.admin_hash.as_bytes()).into()
    }

    /// Whom a secret with this hash lets in, if that is known for certain. Notes the use.
    pub fn known(&self, hash: &str, now: DateTime<Utc>) -> Option<Arc<TenantViewer>> {
        if !self.is_trusted() {
            return None;
        }
        let kept = self.kept.get(hash)?;
        if kept.viewer.expires_at.is_some_and(|until| until <= now) {
            return None;
        }
        let micros = now.timestamp_micros();
        if micros - kept.noted.load(Ordering::Relaxed) >= USES.num_microseconds().unwrap_or(i64::MAX) {
            kept.noted.store(micros, Ordering::Relaxed);
            self.used.entry(kept.viewer.key.id).or_insert(now);
        }
        Some(kept.viewer.clone())
    }

    /// To be asked for before a key is loaded, for [`KeyRing::keep`].
    pub fn loading(&self) -> Loading {
        Loading(self.forgotten.load(Ordering::SeqCst))
    }

    /// Keeps a key that was loaded, unless something was forgotten since it began to be. Notes the use.
    pub fn keep(&self, loading: Loading, hash: String, viewer: Arc<TenantViewer>, now: DateTime<Utc>) {
        let mut noted = viewer.key.last_used_at;
        if noted.is_none_or(|last| now - last >= USES) {
            self.used.entry(viewer.key.id).or_insert(now);
            noted = Some(now);
        }
        if self.kept.len() >= MAX_KEPT {
            self.kept.clear();
        }
        let noted = AtomicI64::new(noted.map_or(0, |at| at.timestamp_micros()));
        self.kept.insert(hash.clone(), Kept { viewer, noted });
        // Only now: whoever forgets raises the number first, and so one of the two finds the other's doing.
        if self.forgotten.load(Ordering::SeqCst) != loading.0 {
            self.kept.remove(&hash);
        }
    }

    /// Forgets a tenant's keys, and tells its open connections that a right may have been lost.
    pub fn authority_changed(&self, tenant_id: Uuid) {
        self.forgotten.fetch_add(1, Ordering::SeqCst);
        self.kept.retain(|_, kept| kept.viewer.tenant_id() != tenant_id);
        // Nobody listening is no fault.
        let _ = self.changes.send(tenant_id);
    }

    /// See [`crate::app::App::authority_changes`].
    pub fn changes(&self) -> broadcast::Receiver<Uuid> {
        self.changes.subscribe()
    }

    /// The newest epoch whose changes are known here.
    pub fn epoch(&self) -> i64 {
        self.epoch.load(Ordering::SeqCst)
    }

    /// Says that the changes up to an epoch are known.
    pub fn saw_epoch(&self, epoch: i64) {
        self.epoch.fetch_max(epoch, Ordering::SeqCst);
    }

    /// Says that a change is known beforehand: it need not be found again, if it is the next.
    pub fn followed_by(&self, epoch: i64) {
        // Otherwise others lie between, and the next look finds all.
        let _ = self.epoch.compare_exchange(epoch - 1, epoch, Ordering::SeqCst, Ordering::SeqCst);
    }

    /// Says that nothing had changed that wasn't known, when the database was asked at `asked`.
    pub fn confirmed(&self, asked: Instant) {
        if let Some(confirmed) = &self.confirmed {
            *confirmed.write().unwrap_or_else(PoisonError::into_inner) = Some(asked);
        }
    }

    fn is_trusted(&self) -> bool {
        let Some(confirmed) = &self.confirmed else { return true };
        confirmed.read().unwrap_or_else(PoisonError::into_inner).is_some_and(|asked| asked.elapsed() < TRUST)
    }

    /// The uses noted that are not written yet.
    pub(super) fn uses(&self) -> Vec<(Uuid, DateTime<Utc>)> {
        self.used.iter().map(|entry| (*entry.key(), *entry.value())).collect()
    }

    /// Says that a key's use was written.
    pub(super) fn written(&self, key_id: Uuid) {
        self.used.remove(&key_id);
    }
}
