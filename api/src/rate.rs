//! Rate limits by plan: requests a minute a tenant, by the generic cell rate algorithm. Over all replicas where Redis
//! keeps the state; in this process alone where there is none, or while it is away or slow.

use std::num::NonZeroU32;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use dashmap::DashMap;
use governor::clock::{Clock as _, DefaultClock};
use governor::middleware::StateInformationMiddleware;
use governor::state::{InMemoryState, NotKeyed};
use governor::{Quota, RateLimiter};
use http::{HeaderMap, HeaderValue};
use redis::Script;
use uuid::Uuid;

use crate::bus::Bus;

/// How long a request waits for Redis before it is counted here.
const PATIENCE: Duration = Duration::from_millis(100);

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
    tenants: DashMap<Uuid, (NonZeroU32, Arc<Limiter>)>,
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
    pub async fn admit(&self, bus: &Bus, tenant_id: Uuid, per_minute: u32) -> Admission {
        let limit = NonZeroU32::new(per_minute).unwrap_or(NonZeroU32::MIN);
        if let Some((mut redis, key)) = bus.commands(&format!("rate:{tenant_id}:{limit}")) {
            let mut take = TAKE.key(key);
            match tokio::time::timeout(PATIENCE, take.arg(limit.get()).invoke_async::<(bool, u64)>(&mut redis)).await {
                Ok(Ok(taken)) => return Taken::from(taken).admission(limit),
                Ok(Err(error)) => bus.failed(Some(&error)),
                Err(_) => bus.failed(None),
            }
        }
        self.take_here(tenant_id, limit).admission(limit)
    }

    fn take_here(&self, tenant_id: Uuid, limit: NonZeroU32) -> Taken {
        let limiter = {
            let mut entry = self.tenants.entry(tenant_id).or_insert_with(|| (limit, limiter(limit)));
            if entry.0 != limit {
                *entry = (limit, limiter(limit));
            }
            entry.1.clone()
        };
        match limiter.check() {
            Ok(state) => Taken::Passed { remaining: state.remaining_burst_capacity() },
            Err(until) => Taken::Refused { wait: until.wait_time_from(self.clock.now()) },
        }
    }
}

/// What became of a request.
enum Taken {
    Passed { remaining: u32 },
    Refused { wait: Duration },
}

impl From<(bool, u64)> for Taken {
    /// As [`TAKE`] has it.
    fn from((passed, value): (bool, u64)) -> Self {
        match passed {
            true => Taken::Passed { remaining: u32::try_from(value).unwrap_or(u32::MAX) },
            false => Taken::Refused { wait: Duration::from_micros(value) },
        }
    }
}

impl Taken {
    fn admission(self, limit: NonZeroU32) -> Admission {
        let limit = limit.get();
        match self {
            Taken::Passed { remaining } => {
                let missing = u64::from(limit.saturating_sub(remaining));
                let reset_seconds = (missing * 60).div_ceil(u64::from(limit));
                Admission { allowed: true, limit, remaining, reset_seconds, retry_after_seconds: 0 }
            }
            Taken::Refused { wait } => {
                let wait = wait.as_secs_f64().ceil() as u64;
                Admission { allowed: false, limit, remaining: 0, reset_seconds: 60, retry_after_seconds: wait.max(1) }
            }
        }
    }
}

/// Takes one request, by Redis' clock, as `governor` does in process: a request moves the theoretical arrival time on by a
/// minute's share, and is refused while that time is further ahead than the rest of the burst. A clock that was set
/// back counts as an allowance that is used up, and no more.
///
/// KEYS: the tenant's theoretical arrival time, in microseconds. ARGV: requests a minute, which is the burst too.
/// Returns whether it passes, and how many may follow at once, or the microseconds to wait.
static TAKE: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        "local time = redis.call('TIME')
         local now, limit = time[1] * 1000000 + time[2], tonumber(ARGV[1])
         local share = math.floor(60000000 / limit)
         local burst = share * limit
         local arrival = math.min(tonumber(redis.call('GET', KEYS[1]) or now), now + burst)
         local earliest = arrival - (burst - share)
         if now < earliest then return {0, earliest - now} end
         local next = math.max(arrival, now) + share
         redis.call('SET', KEYS[1], string.format('%.0f', next), 'PX', math.ceil((next - now) / 1000))
         return {1, math.floor((now + burst - next) / share)}",
    )
});

fn limiter(per_minute: NonZeroU32) -> Arc<Limiter> {
    Arc::new(RateLimiter::direct(Quota::per_minute(per_minute)).with_middleware::<StateInformationMiddleware>())
}
