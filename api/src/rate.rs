//! Rate limits by plan: requests a minute a tenant, in process.

use std::num::NonZeroU32;
use std::sync::Arc;

use dashmap::DashMap;
use governor::clock::{Clock as _, DefaultClock};
use governor::middleware::StateInformationMiddleware;
use governor::state::{InMemoryState, NotKeyed};
use governor::{Quota, RateLimiter};
use http::{HeaderMap, HeaderValue};
use uuid::Uuid;

type Limiter = RateLimiter<NotKeyed, InMemoryState, DefaultClock, StateInformationMiddleware>;

/// What the limit says of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admission {
    /// Whether it may pass.
    pub allowed: bool,
    /// Requests a minute; 0 for a caller without a limit.
    pub limit: u32,
    /// Requests that may follow at once.
    pub remaining: u32,
    /// Seconds until `remaining` is `limit` again.
    pub reset_seconds: u64,
    /// Seconds until another request may pass, if this one may not.
    pub retry_after_seconds: u64,
}

impl Admission {
    /// For a caller without a limit.
    pub const UNLIMITED: Self =
        Self { allowed: true, limit: 0, remaining: 0, reset_seconds: 0, retry_after_seconds: 0 };

    /// Writes `RateLimit-*`, and `Retry-After` on a refusal.
    pub fn apply(&self, headers: &mut HeaderMap) {
        if self.limit == 0 {
            return;
        }
        headers.insert("ratelimit-limit", HeaderValue::from(self.limit));
        headers.insert("ratelimit-remaining", HeaderValue::from(self.remaining));
        headers.insert("ratelimit-reset", HeaderValue::from(self.reset_seconds));
        if !self.allowed {
            headers.insert(http::header::RETRY_AFTER, HeaderValue::from(self.retry_after_seconds));
        }
    }
}

/// A limiter a tenant, made when it is first asked for; a changed plan makes a new one.
#[derive(Default)]
pub struct RateLimits {
    tenants: DashMap<Uuid, (u32, Arc<Limiter>)>,
    streams: Arc<DashMap<Uuid, usize>>,
    clock: DefaultClock,
}

/// A connection that stays open; it counts until it is dropped.
pub struct OpenStream {
    streams: Arc<DashMap<Uuid, usize>>,
    tenant_id: Uuid,
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        if let Some(mut open) = self.streams.get_mut(&self.tenant_id) {
            *open = open.saturating_sub(1);
        }
        self.streams.remove_if(&self.tenant_id, |_, open| *open == 0);
    }
}

impl RateLimits {
    /// Counts a connection that stays open, unless the tenant has `most` of them.
    pub fn hold_stream(&self, tenant_id: Uuid, most: usize) -> Option<OpenStream> {
        let mut open = self.streams.entry(tenant_id).or_default();
        if *open >= most {
            return None;
        }
        *open += 1;
        Some(OpenStream { streams: self.streams.clone(), tenant_id })
    }

    /// Takes one request of the tenant's allowance.
    pub fn admit(&self, tenant_id: Uuid, per_minute: u32) -> Admission {
        let limit = NonZeroU32::new(per_minute).unwrap_or(NonZeroU32::MIN);
        let limiter = {
            let mut entry = self.tenants.entry(tenant_id).or_insert_with(|| (per_minute, limiter(limit)));
            if entry.0 != per_minute {
                *entry = (per_minute, limiter(limit));
            }
            entry.1.clone()
        };
        match limiter.check() {
            Ok(state) => {
                let remaining = state.remaining_burst_capacity();
                let missing = u64::from(per_minute.saturating_sub(remaining));
                Admission {
                    allowed: true,
                    limit: per_minute,
                    remaining,
                    reset_seconds: (missing * 60).div_ceil(u64::from(per_minute.max(1))),
                    retry_after_seconds: 0,
                }
            }
            Err(until) => {
                let wait = until.wait_time_from(self.clock.now()).as_secs_f64().ceil() as u64;
                Admission {
                    allowed: false,
                    limit: per_minute,
                    remaining: 0,
                    reset_seconds: 60,
                    retry_after_seconds: wait.max(1),
                }
            }
        }
    }
}

fn limiter(per_minute: NonZeroU32) -> Arc<Limiter> {
    Arc::new(RateLimiter::direct(Quota::per_minute(per_minute)).with_middleware::<StateInformationMiddleware>())
}
