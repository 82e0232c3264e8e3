//! Quotas: a model call reserves its tokens before it is made, so that no number of calls at once
//! passes a limit (I8).
//!
//! A reservation holds our count of the input plus the most output the call may have, in every
//! scope that counts it: the tenant's month, the key's month, the run's own maximum. It belongs to the
//! process that makes the call, which extends it while the provider's answer is open. Whoever deletes
//! it moves the counters, nobody else.

use std::sync::Arc;
use std::time::Duration;

use chrono::TimeDelta;
use entity::{TenantOwned, api_keys, quota_counters, quota_counters::Scope, quota_reservations, tenants};
use sea_orm::ActiveValue::Set;
use sea_orm::sea_query::{Expr, OnConflict};
use sea_orm::{
    ActiveModelTrait, ColumnTrait, ConnectionTrait, DatabaseTransaction, EntityTrait, ExprTrait, IntoActiveModel,
    QueryFilter, QuerySelect,
};
use tokio::sync::Notify;
use tokio::time::Instant;
use uuid::Uuid;

use crate::app::App;
use crate::clock::month_of;
use crate::error::Error;
use crate::models::catalog::CatalogModel;
use crate::tenants::monthly_limit;

/// Output that a call with no maximum of its own is expected to stay within.
pub const DEFAULT_MAX_OUTPUT: i64 = 4_096;
/// A call is not clamped below this; what is left then is too little to be of use.
pub const LEAST_OUTPUT: i64 = 256;
/// How long a reservation stands unless its process extends it.
pub const LIFETIME: TimeDelta = TimeDelta::seconds(30);
/// A run's counter has no month.
const RUN_PERIOD: &str = "run";

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

/// A reservation, and the most output it allows.
pub struct Reserved {
    /// The row.
    pub reservation: quota_reservations::Model,
    /// Smaller than was asked for if little is left of a limit.
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
    /// Our fault.
    Fault(Error),
}

impl<E: Into<Error>> From<E> for Denied {
    fn from(error: E) -> Self {
        Self::Fault(error.into())
    }
}

/// A limit that counts a call.
struct Limit {
    scope: Scope,
    scope_id: Uuid,
    period: String,
    tokens: i64,
}

/// Reserves a call's tokens. Waits, bounded, while only others' reservations are in the way; asks
/// for less output when a limit leaves too little.
pub async fn reserve(app: &App, origin: &CallOrigin, ask: Ask) -> Result<Reserved, Denied> {
    let deadline = Instant::now() + Duration::from_millis(app.config.runs.quota_wait_ms);
    let mut max_output = ask.max_output;
    loop {
        if let Some(reservation) = try_reserve(app, origin, ask, max_output).await? {
            return Ok(Reserved { reservation, max_output });
        }
        // Many may wait for the same room: they look, and only who sees room writes.
        loop {
            // Registered before the counters are read, so that a release in between is not missed.
            let released = app.releases.0.notified();
            match look(app, origin, ask.input_tokens, max_output).await? {
                Room::Now => break,
                Room::Clamped(to) => {
                    max_output = to;
                    break;
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
}

/// One transaction: raises `reserved` in every scope, or in none.
async fn try_reserve(
    app: &App,
    origin: &CallOrigin,
    ask: Ask,
    max_output: i64,
) -> Result<Option<quota_reservations::Model>, Denied> {
    let now = app.clock.now();
    let period = month_of(now);
    let tokens = ask.input_tokens + max_output;
    let tx = app.db.begin().await?;
    for limit in limits(app, &tx, origin, &period).await? {
        let counter = Expr::col(quota_counters::Column::Used).add(Expr::col(quota_counters::Column::Reserved));
        let raise = quota_counters::Entity::update_many()
            .col_expr(quota_counters::Column::Reserved, Expr::col(quota_counters::Column::Reserved).add(tokens))
            .filter(of(origin.tenant_id, &limit))
            .filter(counter.add(tokens).lte(limit.tokens));
        if raise.clone().exec(&tx).await?.rows_affected == 0 {
            if tokens > limit.tokens || !make_counter(&tx, origin.tenant_id, &limit).await? {
                return Ok(None);
            }
            if raise.exec(&tx).await?.rows_affected == 0 {
                return Ok(None);
            }
        }
    }
    let row = quota_reservations::Model {
        call_id: Uuid::now_v7(),
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
        period,
        tokens,
        input_tokens: ask.input_tokens,
        output_tokens: 0,
        sent: false,
        created_at: now,
        expires_at: now + LIFETIME,
    };
    let reservation = row.into_active_model().reset_all().insert(&tx).await?;
    tx.commit().await?;
    Ok(Some(reservation))
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

async fn look(app: &App, origin: &CallOrigin, input: i64, max_output: i64) -> Result<Room, Denied> {
    let db = app.db.read();
    let mut unused = i64::MAX;
    let mut free = i64::MAX;
    let mut narrowest = Scope::Tenant;
    for limit in limits(app, db, origin, &month_of(app.clock.now())).await? {
        let counter = quota_counters::Entity::across_tenants().filter(of(origin.tenant_id, &limit)).one(db).await?;
        let (used, reserved) = counter.map_or((0, 0), |counter| (counter.used, counter.reserved));
        if limit.tokens - used < unused {
            unused = limit.tokens - used;
            narrowest = limit.scope;
        }
        free = Ord::min(free, limit.tokens - used - reserved);
    }
    Ok(if input + max_output <= free {
        Room::Now
    } else if input + max_output <= unused {
        Room::Later
    } else if unused - input >= LEAST_OUTPUT {
        Room::Clamped(unused - input)
    } else {
        Room::Never(narrowest)
    })
}

/// Tokens of the month that a key may still use: the least of its own and its tenant's.
pub async fn unused(app: &App, tenant_id: Uuid, key_id: Option<Uuid>) -> Result<i64, Error> {
    let db = app.db.read();
    let period = month_of(app.clock.now());
    let mut unused = i64::MAX;
    for limit in month_limits(app, db, tenant_id, key_id, &period).await? {
        let counter = quota_counters::Entity::across_tenants().filter(of(tenant_id, &limit)).one(db).await?;
        unused = Ord::min(unused, limit.tokens - counter.map_or(0, |counter| counter.used));
    }
    Ok(unused)
}

/// The limits that count a call, in the order in which they are taken.
async fn limits(app: &App, db: &impl ConnectionTrait, origin: &CallOrigin, period: &str) -> Result<Vec<Limit>, Error> {
    let mut limits = month_limits(app, db, origin.tenant_id, origin.key_id, period).await?;
    if let (Some(run_id), Some(tokens)) = (origin.run_id, origin.run_limit) {
        limits.push(Limit { scope: Scope::Run, scope_id: run_id, period: RUN_PERIOD.to_owned(), tokens });
    }
    Ok(limits)
}

async fn month_limits(
    app: &App,
    db: &impl ConnectionTrait,
    tenant_id: Uuid,
    key_id: Option<Uuid>,
    period: &str,
) -> Result<Vec<Limit>, Error> {
    let tenant = tenants::Entity::in_tenant(tenant_id).one(db).await?;
    let tenant = tenant.ok_or_else(|| Error::internal("a model call of a tenant that is gone"))?;
    let tokens = monthly_limit(app, &tenant)?;
    let period = period.to_owned();
    let mut limits = vec![Limit { scope: Scope::Tenant, scope_id: tenant_id, period: period.clone(), tokens }];
    if let Some(key_id) = key_id {
        let own: Option<Option<i64>> = api_keys::Entity::in_tenant(tenant_id)
            .filter(api_keys::Column::Id.eq(key_id))
            .select_only()
            .column(api_keys::Column::MonthlyTokenLimit)
            .into_tuple()
            .one(db)
            .await?;
        // A key without a limit is counted too: it may be given one in mid-month.
        let tokens = own.flatten().unwrap_or(i64::MAX / 2);
        limits.push(Limit { scope: Scope::Key, scope_id: key_id, period, tokens });
    }
    Ok(limits)
}

fn of(tenant_id: Uuid, limit: &Limit) -> sea_orm::Condition {
    counter(tenant_id, limit.scope, limit.scope_id, &limit.period)
}

fn counter(tenant_id: Uuid, scope: Scope, scope_id: Uuid, period: &str) -> sea_orm::Condition {
    sea_orm::Condition::all()
        .add(quota_counters::Column::TenantId.eq(tenant_id))
        .add(quota_counters::Column::Scope.eq(scope))
        .add(quota_counters::Column::ScopeId.eq(scope_id))
        .add(quota_counters::Column::Period.eq(period))
}

/// Makes a counter at zero; false if it was there.
async fn make_counter(tx: &DatabaseTransaction, tenant_id: Uuid, limit: &Limit) -> Result<bool, Error> {
    let row = quota_counters::ActiveModel {
        tenant_id: Set(tenant_id),
        scope: Set(limit.scope),
        scope_id: Set(limit.scope_id),
        period: Set(limit.period.clone()),
        used: Set(0),
        reserved: Set(0),
    };
    let inserted = quota_counters::Entity::insert(row)
        .on_conflict(OnConflict::new().do_nothing().to_owned())
        .exec_without_returning(tx)
        .await?;
    Ok(inserted > 0)
}

/// Marks a reservation before the request's first byte goes out: from now on its call may be charged.
pub async fn mark_sent(app: &App, call_id: Uuid) -> Result<(), Error> {
    touch(app, call_id, quota_reservations::ActiveModel { sent: Set(true), ..Default::default() }).await
}

/// Extends a reservation whose answer is open, and notes how much output has arrived.
pub async fn checkpoint(app: &App, call_id: Uuid, output_tokens: i64) -> Result<(), Error> {
    let row = quota_reservations::ActiveModel { output_tokens: Set(output_tokens), ..Default::default() };
    touch(app, call_id, row).await
}

async fn touch(app: &App, call_id: Uuid, mut row: quota_reservations::ActiveModel) -> Result<(), Error> {
    row.expires_at = Set(app.clock.now() + LIFETIME);
    quota_reservations::Entity::update_many()
        .set(row)
        .filter(quota_reservations::Column::CallId.eq(call_id))
        .exec(app.db.write())
        .await?;
    Ok(())
}

/// Gives back a reservation whose call came to nothing.
pub async fn release(app: &App, call_id: Uuid) -> Result<(), Error> {
    let tx = app.db.begin().await?;
    take(&tx, call_id, 0).await?;
    tx.commit().await?;
    app.releases.wake();
    Ok(())
}

/// Deletes a reservation and moves its counters: what it held is freed, `used` is added. None if
/// somebody else deleted it before.
pub async fn take(
    tx: &DatabaseTransaction,
    call_id: Uuid,
    used: i64,
) -> Result<Option<quota_reservations::Model>, Error> {
    let deleted = quota_reservations::Entity::delete_many()
        .filter(quota_reservations::Column::CallId.eq(call_id))
        .exec_with_returning(tx)
        .await?;
    let Some(reservation) = deleted.into_iter().next() else {
        return Ok(None);
    };
    let tenant_id = reservation.tenant_id;
    let mut counters = vec![(Scope::Tenant, tenant_id, reservation.period.as_str())];
    counters.extend(reservation.key_id.map(|key_id| (Scope::Key, key_id, reservation.period.as_str())));
    let run = reservation.run_id.filter(|_| reservation.run_limited);
    counters.extend(run.map(|run_id| (Scope::Run, run_id, RUN_PERIOD)));
    for (scope, scope_id, period) in counters {
        quota_counters::Entity::update_many()
            .col_expr(quota_counters::Column::Used, Expr::col(quota_counters::Column::Used).add(used))
            .col_expr(
                quota_counters::Column::Reserved,
                Expr::col(quota_counters::Column::Reserved).sub(reservation.tokens),
            )
            .filter(counter(tenant_id, scope, scope_id, period))
            .exec(tx)
            .await?;
    }
    Ok(Some(reservation))
}
