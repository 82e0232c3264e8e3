//! Quotas: a model call reserves its tokens before it is made, so that no number of calls at once
//! passes a limit (I8).
//!
//! A reservation holds our count of the input plus the most output the call may have, in every
//! scope that counts it: the tenant's month, the key's month, the run's own maximum. It belongs to the
//! process that makes the call, which extends it while the provider's answer is open. Whoever deletes
//! it moves the counters, nobody else.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use chrono::TimeDelta;
use entity::{TenantOwned, api_keys, quota_counters::Scope, quota_reservations, tenants};
use sea_orm::ActiveValue::Set;
use sea_orm::sea_query::{OnConflict, Query};
use sea_orm::{
    ActiveModelTrait, ColumnTrait, ConnectionTrait, DatabaseTransaction, DbErr, EntityTrait, IntoActiveModel,
    QueryFilter,
};
use tokio::sync::Notify;
use tokio::time::Instant;
use uuid::Uuid;

use super::counters::{self, Counter, Counters};
use crate::app::App;
use crate::clock::month_of;
use crate::db::padded;
use crate::error::Error;
use crate::models::catalog::CatalogModel;
use crate::runs::journal::{Append, Verdict};
use crate::runs::record;
use crate::tenants::monthly_limit;
use crate::viewer::TenantViewer;

/// Output that a call with no maximum of its own is expected to stay within.
pub const DEFAULT_MAX_OUTPUT: i64 = 4_096;
/// A call is not clamped below this; what is left then is too little to be of use.
pub const LEAST_OUTPUT: i64 = 256;
/// How long a reservation stands unless its process extends it.
pub const LIFETIME: TimeDelta = TimeDelta::seconds(30);

/// Tells model calls that wait for room that some was made, in this process.
#[derive(Default)]
pub struct Releases(Notify);

impl Releases {
    /// Lets the waiting calls look again.
    pub fn wake(&self) {
        self.0.notify_waiters();
    }
}

/// Whose model call it is.
#[derive(Clone)]
pub struct CallOrigin {
    /// Who pays.
    pub tenant_id: Uuid,
    /// The key that started the run, or makes the call.
    pub key_id: Option<Uuid>,
    /// The run.
    pub run_id: Option<Uuid>,
    /// The run's own maximum of tokens.
    pub run_limit: Option<i64>,
    /// The run's turn.
    pub turn: Option<i32>,
    /// The agent that asks.
    pub agent_id: Option<Uuid>,
    /// Its version; none for a draft.
    pub agent_version: Option<i32>,
    /// Agents from the run's root to this one.
    pub agent_path: Option<String>,
    /// What is called.
    pub model: Arc<CatalogModel>,
}

/// What a call asks to hold.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    /// From 1 for each turn.
    pub attempt: i32,
    /// Our count of the input.
    pub input_tokens: i64,
    /// The most output.
    pub max_output: i64,
}

/// Why nothing was reserved.
#[derive(Debug)]
pub enum Denied {
    /// A month's tokens are used up, the tenant's or the key's.
    Exhausted,
    /// The run's own maximum is used up.
    RunLimit,
    /// Others' reservations were in the way for too long.
    Busy,
    /// The run is another worker's.
    LeaseLost,
    /// Our fault.
    Fault(Error),
}

impl<E: Into<Error>> From<E> for Denied {
    fn from(error: E) -> Self {
        Self::Fault(error.into())
    }
}

/// A call that asks for a reservation; many are decided in one transaction.
#[derive(Clone)]
pub struct Reserve {
    /// What is to be stored. Asked for again it is the same: what a lost answer has stored is found by its call id.
    pub reservation: quota_reservations::Model,
    /// The run's own maximum of tokens.
    pub run_limit: Option<i64>,
}

impl Reserve {
    /// For a call that is made as soon as it has its reservation.
    pub fn new(app: &App, origin: &CallOrigin, ask: Ask) -> Self {
        let now = app.clock.now();
        let reservation = quota_reservations::Model {
            call_id: app.clock.new_id(),
            tenant_id: origin.tenant_id,
            run_id: origin.run_id,
            run_limited: origin.run_limit.is_some(),
            turn: origin.turn,
            attempt: ask.attempt,
            agent_id: origin.agent_id,
            agent_version: origin.agent_version,
            agent_path: origin.agent_path.clone(),
            key_id: origin.key_id,
            model: origin.model.model.name.clone(),
            price_id: origin.model.price.id,
            period: month_of(now),
            tokens: ask.input_tokens + ask.max_output,
            input_tokens: ask.input_tokens,
            output_tokens: 0,
            // It goes out at once: nothing is written down in between.
            sent: true,
            created_at: now,
            expires_at: now + LIFETIME,
        };
        Self { reservation, run_limit: origin.run_limit }
    }

    /// Whether a reservation is what is asked for here, made earlier.
    pub fn is_made_by(&self, earlier: &quota_reservations::Model) -> bool {
        let quota_reservations::Model { call_id, period, created_at, expires_at, .. } = earlier;
        let (call_id, created_at, expires_at, period) = (*call_id, *created_at, *expires_at, period.clone());
        let this = self.reservation.clone();
        *earlier == quota_reservations::Model { call_id, created_at, expires_at, period, ..this }
    }

    /// Waits, bounded, while only others' reservations are in the way; asks for less output when a limit leaves too
    /// little. `append` is stored with it, whether or not there is room; not where the run's own limit is too low at all.
    ///
    /// # Errors
    /// Nothing was reserved; after [`Denied::Fault`] and [`Denied::LeaseLost`] it may have been: ask again,
    /// or [`release`] it.
    pub async fn made(&mut self, app: &App, mut append: Option<Append>) -> Result<quota_reservations::Model, Denied> {
        // However little the run has used.
        if self.run_limit.is_some_and(|limit| self.reservation.tokens > limit && !self.leaves_output(limit)) {
            return Err(Denied::RunLimit);
        }
        let deadline = Instant::now() + Duration::from_millis(app.config.runs.quota_wait_ms);
        loop {
            let (reservation, verdict) = record::reserve(app, self.clone(), append.take()).await?;
            if verdict == Some(Verdict::Refused) {
                return Err(Denied::LeaseLost);
            }
            if let Some(reservation) = reservation {
                return Ok(reservation);
            }
            self.wait_for_room(app, deadline).await?;
        }
    }

    /// Many may wait for the same room: they look, and only who sees room writes.
    async fn wait_for_room(&mut self, app: &App, deadline: Instant) -> Result<(), Denied> {
        loop {
            // Registered before the counters are read, so that a release in between is not missed.
            let released = app.releases.0.notified();
            match self.look(app).await? {
                Room::Now => return Ok(()),
                Room::Clamped(to) => {
                    self.reservation.tokens = to;
                    return Ok(());
                }
                Room::Later => {}
                Room::Never(Scope::Run) => return Err(Denied::RunLimit),
                Room::Never(Scope::Tenant | Scope::Key) => return Err(Denied::Exhausted),
            }
            if Instant::now() >= deadline {
                return Err(Denied::Busy);
            }
            // Other replicas' releases are found by looking again.
            let again = Instant::now() + Duration::from_millis(500);
            tokio::select! {
                () = released => {}
                () = tokio::time::sleep_until(again.min(deadline)) => {}
            }
        }
    }

    /// Whether so many tokens, beside the input, leave an output that is of use.
    fn leaves_output(&self, tokens: i64) -> bool {
        tokens - self.reservation.input_tokens >= LEAST_OUTPUT
    }

    async fn look(&self, app: &App) -> Result<Room, Denied> {
        let Self { reservation, run_limit } = self;
        let tokens = reservation.tokens;
        let mut unused = i64::MAX;
        let mut free = i64::MAX;
        let mut narrowest = Scope::Tenant;
        for (counter, count) in counters::read(app, Counter::of(reservation)).await? {
            let Some(limit) = count.limit.or(run_limit.filter(|_| counter.scope() == Scope::Run)) else { continue };
            if limit - count.used < unused {
                unused = limit - count.used;
                narrowest = counter.scope();
            }
            free = Ord::min(free, limit - count.used - count.reserved);
        }
        Ok(if tokens <= free {
            Room::Now
        } else if tokens <= unused {
            Room::Later
        } else if self.leaves_output(unused) {
            Room::Clamped(unused)
        } else {
            Room::Never(narrowest)
        })
    }
}

/// Reserves what fits, and stores the counters, among which those of the calls are. Returns the reservations by call.
pub async fn grant(
    app: &App,
    tx: &DatabaseTransaction,
    mut counters: Counters,
    asked: &[&Reserve],
) -> Result<HashMap<Uuid, quota_reservations::Model>, Error> {
    let mut granted = HashMap::new();
    for Reserve { reservation, run_limit } in asked {
        let tokens = reservation.tokens;
        if Counter::of(reservation).all(|counter| counters.has_room(&counter, tokens, *run_limit)) {
            counters.moves().add(reservation, 0, tokens);
            let expires_at = app.clock.now() + LIFETIME;
            granted.insert(reservation.call_id, quota_reservations::Model { expires_at, ..reservation.clone() });
        }
    }
    if !granted.is_empty() {
        let rows = granted.values().map(|reservation| reservation.clone().into_active_model().reset_all()).collect();
        let new = quota_reservations::Entity::insert_many(padded(tx, rows))
            .on_conflict(OnConflict::new().do_nothing().to_owned())
            .exec_with_returning_keys(tx)
            .await?;
        let new: HashSet<Uuid> = new.into_iter().collect();
        for (_, reserved) in granted.extract_if(|call_id, _| !new.contains(call_id)) {
            counters.moves().add(&reserved, 0, -reserved.tokens);
        }
    }
    counters.store(tx).await?;
    let others = asked.iter().map(|asked| asked.reservation.call_id).filter(|call_id| !granted.contains_key(call_id));
    let others: Vec<Uuid> = others.collect();
    if !others.is_empty() {
        // Those whose first answer was lost.
        let made = quota_reservations::Entity::across_tenants()
            .filter(quota_reservations::Column::CallId.is_in(others))
            .all(tx)
            .await?;
        granted.extend(made.into_iter().map(|reservation| (reservation.call_id, reservation)));
    }
    Ok(granted)
}

/// What stands between a call and its reservation.
enum Room {
    /// Nothing: it was made in the meantime.
    Now,
    /// Others' reservations.
    Later,
    /// The limit itself; this much output fits.
    Clamped(i64),
    /// The limit itself, for good.
    Never(Scope),
}

/// Tokens of the month that a caller may still use: the least of its key's and its tenant's, with their limits as they
/// were when the key was checked.
pub async fn unused_by(app: &App, viewer: &TenantViewer) -> Result<i64, Error> {
    least_unused(app, &viewer.tenant, Some(&viewer.key)).await
}

/// Tokens of the month that a key may still use: the least of its own and its tenant's.
pub async fn unused(app: &App, tenant_id: Uuid, key_id: Option<Uuid>) -> Result<i64, Error> {
    let tenant = tenants::Entity::in_tenant(tenant_id).one(app.db.read()).await?;
    let tenant = tenant.ok_or_else(|| Error::internal("a run of a tenant that is gone"))?;
    let key = match key_id {
        Some(id) => {
            let key = api_keys::Entity::in_tenant(tenant_id).filter(api_keys::Column::Id.eq(id));
            key.one(app.db.read()).await?
        }
        None => None,
    };
    least_unused(app, &tenant, key.as_ref()).await
}

async fn least_unused(app: &App, tenant: &tenants::Model, key: Option<&api_keys::Model>) -> Result<i64, Error> {
    let period = month_of(app.clock.now());
    let of_tenant = (Counter::of_tenant(tenant.id, &period), monthly_limit(app, tenant)?);
    let of_key = key.and_then(|key| Some((Counter::of_key(tenant.id, key.id, &period), key.monthly_token_limit?)));
    let limits: Vec<(Counter, i64)> = std::iter::once(of_tenant).chain(of_key).collect();
    let counts = counters::read(app, limits.iter().map(|(counter, _)| counter.clone())).await?;
    let unused = limits.iter().map(|(counter, limit)| limit - counts.get(counter).map_or(0, |count| count.used));
    Ok(unused.min().unwrap_or(0))
}

/// Extends a reservation whose answer is open, and notes how much output has arrived.
pub async fn checkpoint(app: &App, call_id: Uuid, output_tokens: i64) -> Result<(), Error> {
    let now = quota_reservations::ActiveModel {
        output_tokens: Set(output_tokens),
        expires_at: Set(app.clock.now() + LIFETIME),
        ..Default::default()
    };
    quota_reservations::Entity::update_many()
        .set(now)
        .filter(quota_reservations::Column::CallId.eq(call_id))
        .exec(app.db.write())
        .await?;
    Ok(())
}

/// Gives back a reservation whose call came to nothing. False if there was nothing to give back.
pub async fn release(app: &App, reservation: &quota_reservations::Model) -> Result<bool, Error> {
    let is_released = record::release(app, reservation.clone()).await?;
    app.releases.wake();
    Ok(is_released)
}

/// Deletes reservations, whose counters the caller's transaction is to move. Returns the tokens of those that were there.
pub async fn delete(
    tx: &DatabaseTransaction,
    call_ids: impl IntoIterator<Item = Uuid>,
) -> Result<HashMap<Uuid, i64>, Error> {
    let delete = Query::delete()
        .from_table(quota_reservations::Entity)
        .and_where(quota_reservations::Column::CallId.is_in(call_ids))
        .returning(Query::returning().columns([quota_reservations::Column::CallId, quota_reservations::Column::Tokens]))
        .to_owned();
    let deleted = tx.query_all(&delete).await?;
    let deleted = deleted.iter().map(|row| Ok((row.try_get("", "call_id")?, row.try_get("", "tokens")?)));
    Ok(deleted.collect::<Result<_, DbErr>>()?)
}
