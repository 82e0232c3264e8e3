//! Quotas: a model call reserves its tokens before it is made, so that no number of calls at once
//! passes a limit (I8).
//!
//! A reservation holds our count of the input plus the most output the call may have, in every
//! scope that counts it: the tenant's month, the key's month, the run's own maximum. It belongs to the
//! process that makes the call, which extends it while the provider's answer is open. Whoever deletes
//! it moves the counters, nobody else.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use entity::{TenantOwned, api_keys, quota_counters, quota_counters::Scope, quota_reservations, tenants};
use sea_orm::ActiveValue::Set;
use sea_orm::sea_query::{Expr, OnConflict};
use sea_orm::{
    ActiveModelTrait, ColumnTrait, Condition, ConnectionTrait, DatabaseTransaction, EntityTrait, ExprTrait,
    IntoActiveModel, QueryFilter, QueryOrder, QuerySelect,
};
use tokio::sync::Notify;
use tokio::time::Instant;
use uuid::Uuid;

use crate::app::App;
use crate::batch::{self, Batch, Batched};
use crate::clock::month_of;
use crate::error::Error;
use crate::models::catalog::CatalogModel;
use crate::tenants::monthly_limit;
use crate::viewer::TenantViewer;

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
#[derive(Clone, Debug)]
struct Limit {
    counter: Counter,
    tokens: i64,
}

/// A row of `quota_counters`. In their order they are locked: a tenant's, its keys', its runs'.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Counter {
    tenant_id: Uuid,
    scope: Scope,
    scope_id: Uuid,
    period: String,
}

impl Counter {
    fn condition(&self) -> Condition {
        Condition::all()
            .add(quota_counters::Column::TenantId.eq(self.tenant_id))
            .add(quota_counters::Column::Scope.eq(self.scope))
            .add(quota_counters::Column::ScopeId.eq(self.scope_id))
            .add(quota_counters::Column::Period.eq(self.period.as_str()))
    }

    fn zero(&self) -> quota_counters::ActiveModel {
        quota_counters::ActiveModel {
            tenant_id: Set(self.tenant_id),
            scope: Set(self.scope),
            scope_id: Set(self.scope_id),
            period: Set(self.period.clone()),
            used: Set(0),
            reserved: Set(0),
        }
    }
}

/// Reserves a call's tokens. Waits, bounded, while only others' reservations are in the way; asks
/// for less output when a limit leaves too little.
pub async fn reserve(app: &App, origin: &CallOrigin, ask: Ask) -> Result<Reserved, Denied> {
    let deadline = Instant::now() + Duration::from_millis(app.config.runs.quota_wait_ms);
    let mut max_output = ask.max_output;
    loop {
        let asked = Reserve { origin: origin.clone(), ask, max_output };
        if let Some(reservation) = batch::write(app, asked).await? {
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

/// A call that asks for a reservation; many are decided in one transaction.
#[derive(Clone)]
pub struct Reserve {
    origin: CallOrigin,
    ask: Ask,
    max_output: i64,
}

impl Batched for Reserve {
    /// None: it does not fit now.
    type Done = Option<quota_reservations::Model>;

    fn batch(app: &App) -> &Batch<Self> {
        &app.batches.reserve
    }

    async fn write(app: &App, asked: Vec<Self>) -> Result<Vec<Self::Done>, Error> {
        let now = app.clock.now();
        let period = month_of(now);
        let tx = app.db.begin().await?;
        let limits = limits_of(app, &tx, &asked, &period).await?;
        let mut counters = lock_counters(&tx, limits.iter().flatten()).await?;
        let mut granted = Vec::new();
        let mut reserved = Vec::with_capacity(asked.len());
        for (asked, limits) in asked.iter().zip(limits) {
            let tokens = asked.ask.input_tokens + asked.max_output;
            let fits = limits.iter().all(|limit| {
                let counted = counters.get(&limit.counter).map_or(0, |counted| counted.used + counted.reserved);
                counted + tokens <= limit.tokens
            });
            if !fits {
                reserved.push(None);
                continue;
            }
            for limit in limits {
                let counted = counters.entry(limit.counter).or_default();
                counted.reserved += tokens;
                counted.added += tokens;
            }
            let reservation = asked.reservation(app.clock.new_id(), &period, now);
            granted.push(reservation.clone().into_active_model().reset_all());
            reserved.push(Some(reservation));
        }
        for (counter, counted) in counters.iter().filter(|(_, counted)| counted.added > 0) {
            move_counter(&tx, counter, 0, counted.added).await?;
        }
        if !granted.is_empty() {
            quota_reservations::Entity::insert_many(granted).exec_without_returning(&tx).await?;
        }
        tx.commit().await?;
        Ok(reserved)
    }
}

impl Reserve {
    fn reservation(&self, call_id: Uuid, period: &str, now: DateTime<Utc>) -> quota_reservations::Model {
        let origin = &self.origin;
        quota_reservations::Model {
            call_id,
            tenant_id: origin.tenant_id,
            run_id: origin.run_id,
            run_limited: origin.run_limit.is_some(),
            turn: origin.turn,
            attempt: self.ask.attempt,
            agent_id: origin.agent_id,
            agent_version: origin.agent_version,
            agent_path: origin.agent_path.clone(),
            key_id: origin.key_id,
            model: origin.model.model.name.clone(),
            price_id: origin.model.price.id,
            period: period.to_owned(),
            tokens: self.ask.input_tokens + self.max_output,
            input_tokens: self.ask.input_tokens,
            output_tokens: 0,
            sent: false,
            created_at: now,
            expires_at: now + LIFETIME,
        }
    }
}

/// What a counter holds, and what a transaction adds to its `reserved`.
#[derive(Default)]
struct Counted {
    used: i64,
    reserved: i64,
    added: i64,
}

/// Locks counters in their order, which is everybody's, and makes those that are missing.
async fn lock_counters(
    tx: &DatabaseTransaction,
    limits: impl Iterator<Item = &Limit>,
) -> Result<BTreeMap<Counter, Counted>, Error> {
    let asked: BTreeSet<&Counter> = limits.map(|limit| &limit.counter).collect();
    let mut counters = BTreeMap::new();
    // Those that are missing are made in the first pass, and locked in the second.
    while counters.len() < asked.len() {
        let missing: Vec<&Counter> = asked.iter().copied().filter(|counter| !counters.contains_key(*counter)).collect();
        let any = missing.iter().fold(Condition::any(), |any, counter| any.add(counter.condition()));
        let rows = quota_counters::Entity::across_tenants()
            .filter(any)
            .order_by_asc(quota_counters::Column::TenantId)
            .order_by_desc(Expr::col(quota_counters::Column::Scope).eq(Scope::Tenant))
            .order_by_asc(quota_counters::Column::Scope)
            .order_by_asc(quota_counters::Column::ScopeId)
            .order_by_asc(quota_counters::Column::Period)
            .lock_exclusive()
            .all(tx)
            .await?;
        for row in rows {
            let counter =
                Counter { tenant_id: row.tenant_id, scope: row.scope, scope_id: row.scope_id, period: row.period };
            counters.insert(counter, Counted { used: row.used, reserved: row.reserved, added: 0 });
        }
        let new: Vec<_> =
            asked.iter().filter(|counter| !counters.contains_key(**counter)).map(|new| new.zero()).collect();
        if !new.is_empty() {
            quota_counters::Entity::insert_many(new)
                .on_conflict(OnConflict::new().do_nothing().to_owned())
                .exec_without_returning(tx)
                .await?;
        }
    }
    Ok(counters)
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
    let asked =
        Reserve { origin: origin.clone(), ask: Ask { attempt: 0, input_tokens: input, max_output }, max_output };
    let limits = limits_of(app, db, std::slice::from_ref(&asked), &month_of(app.clock.now())).await?;
    let mut unused = i64::MAX;
    let mut free = i64::MAX;
    let mut narrowest = Scope::Tenant;
    for limit in limits.into_iter().flatten() {
        let counter = quota_counters::Entity::across_tenants().filter(limit.counter.condition()).one(db).await?;
        let (used, reserved) = counter.map_or((0, 0), |counter| (counter.used, counter.reserved));
        if limit.tokens - used < unused {
            unused = limit.tokens - used;
            narrowest = limit.counter.scope;
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

/// Tokens of the month that a caller may still use: the least of its key's and its tenant's, with their limits as they
/// were when the key was checked.
pub async fn unused_by(app: &App, viewer: &TenantViewer) -> Result<i64, Error> {
    let limits = Limits {
        tenants: HashMap::from([(viewer.tenant_id(), monthly_limit(app, &viewer.tenant)?)]),
        keys: viewer.key.monthly_token_limit.map(|tokens| (viewer.key.id, tokens)).into_iter().collect(),
    };
    limits.unused(app, viewer.tenant_id(), Some(viewer.key.id)).await
}

/// Tokens of the month that a key may still use: the least of its own and its tenant's.
pub async fn unused(app: &App, tenant_id: Uuid, key_id: Option<Uuid>) -> Result<i64, Error> {
    let limits = Limits::read(app, app.db.read(), std::iter::once((tenant_id, key_id))).await?;
    limits.unused(app, tenant_id, key_id).await
}

/// The limits that count each call, in the order in which they are taken.
async fn limits_of(
    app: &App,
    db: &impl ConnectionTrait,
    asked: &[Reserve],
    period: &str,
) -> Result<Vec<Vec<Limit>>, Error> {
    let callers = asked.iter().map(|asked| (asked.origin.tenant_id, asked.origin.key_id));
    let own = Limits::read(app, db, callers).await?;
    let all = asked.iter().map(|Reserve { origin, .. }| {
        let mut limits = own.of_month(origin.tenant_id, origin.key_id, period)?;
        if let (Some(run_id), Some(tokens)) = (origin.run_id, origin.run_limit) {
            let (tenant_id, period) = (origin.tenant_id, RUN_PERIOD.to_owned());
            limits.push(Limit { counter: Counter { tenant_id, scope: Scope::Run, scope_id: run_id, period }, tokens });
        }
        Ok(limits)
    });
    all.collect()
}

/// The monthly limits of some tenants and keys.
struct Limits {
    tenants: HashMap<Uuid, i64>,
    keys: HashMap<Uuid, i64>,
}

impl Limits {
    async fn read(
        app: &App,
        db: &impl ConnectionTrait,
        callers: impl Iterator<Item = (Uuid, Option<Uuid>)>,
    ) -> Result<Self, Error> {
        let (tenant_ids, key_ids): (BTreeSet<Uuid>, BTreeSet<Option<Uuid>>) = callers.unzip();
        let rows = tenants::Entity::across_tenants().filter(tenants::Column::Id.is_in(tenant_ids)).all(db).await?;
        let mut tenants = HashMap::new();
        for tenant in rows {
            tenants.insert(tenant.id, monthly_limit(app, &tenant)?);
        }
        let keys: Vec<(Uuid, Option<i64>)> = api_keys::Entity::across_tenants()
            .filter(api_keys::Column::Id.is_in(key_ids.into_iter().flatten()))
            .select_only()
            .columns([api_keys::Column::Id, api_keys::Column::MonthlyTokenLimit])
            .into_tuple()
            .all(db)
            .await?;
        let keys = keys.into_iter().filter_map(|(id, tokens)| Some((id, tokens?))).collect();
        Ok(Self { tenants, keys })
    }

    fn of_month(&self, tenant_id: Uuid, key_id: Option<Uuid>, period: &str) -> Result<Vec<Limit>, Error> {
        let tokens = self.tenants.get(&tenant_id).copied();
        let tokens = tokens.ok_or_else(|| Error::internal("a model call of a tenant that is gone"))?;
        let counter = |scope, scope_id| Counter { tenant_id, scope, scope_id, period: period.to_owned() };
        let mut limits = vec![Limit { counter: counter(Scope::Tenant, tenant_id), tokens }];
        if let Some(key_id) = key_id {
            // A key without a limit is counted too: it may be given one in mid-month.
            let tokens = self.keys.get(&key_id).copied().unwrap_or(i64::MAX / 2);
            limits.push(Limit { counter: counter(Scope::Key, key_id), tokens });
        }
        Ok(limits)
    }
}

impl Limits {
    async fn unused(&self, app: &App, tenant_id: Uuid, key_id: Option<Uuid>) -> Result<i64, Error> {
        let limits = self.of_month(tenant_id, key_id, &month_of(app.clock.now()))?;
        let any = limits.iter().fold(Condition::any(), |any, limit| any.add(limit.counter.condition()));
        let counters = quota_counters::Entity::across_tenants().filter(any).all(app.db.read()).await?;
        let unused = limits.iter().map(|limit| {
            let counter = counters.iter().find(|counter| counter.scope == limit.counter.scope);
            limit.tokens - counter.map_or(0, |counter| counter.used)
        });
        Ok(unused.min().unwrap_or(0))
    }
}

async fn move_counter(tx: &DatabaseTransaction, counter: &Counter, used: i64, reserved: i64) -> Result<(), Error> {
    quota_counters::Entity::update_many()
        .col_expr(quota_counters::Column::Used, Expr::col(quota_counters::Column::Used).add(used))
        .col_expr(quota_counters::Column::Reserved, Expr::col(quota_counters::Column::Reserved).add(reserved))
        .filter(counter.condition())
        .exec(tx)
        .await?;
    Ok(())
}

/// A reservation that is about to be sent.
#[derive(Clone)]
pub struct Send(Uuid);

impl Batched for Send {
    /// Whether the reservation stands.
    type Done = bool;

    fn batch(app: &App) -> &Batch<Self> {
        &app.batches.send
    }

    async fn write(app: &App, calls: Vec<Self>) -> Result<Vec<bool>, Error> {
        let sent = quota_reservations::ActiveModel { sent: Set(true), ..Default::default() };
        let standing = touch(app, calls.iter().map(|call| call.0), sent).await?;
        Ok(calls.iter().map(|call| standing.contains(&call.0)).collect())
    }
}

/// Marks a reservation before the request's first byte goes out: from now on its call may be charged. False if it was
/// given back: this process stood still for so long that it was taken for dead.
pub async fn mark_sent(app: &App, call_id: Uuid) -> Result<bool, Error> {
    batch::write(app, Send(call_id)).await
}

/// Extends a reservation whose answer is open, and notes how much output has arrived.
pub async fn checkpoint(app: &App, call_id: Uuid, output_tokens: i64) -> Result<(), Error> {
    let row = quota_reservations::ActiveModel { output_tokens: Set(output_tokens), ..Default::default() };
    touch(app, std::iter::once(call_id), row).await?;
    Ok(())
}

async fn touch(
    app: &App,
    call_ids: impl Iterator<Item = Uuid>,
    mut row: quota_reservations::ActiveModel,
) -> Result<BTreeSet<Uuid>, Error> {
    row.expires_at = Set(app.clock.now() + LIFETIME);
    let touched = quota_reservations::Entity::update_many()
        .set(row)
        .filter(quota_reservations::Column::CallId.is_in(call_ids))
        .exec_with_returning(app.db.write())
        .await?;
    Ok(touched.into_iter().map(|reservation| reservation.call_id).collect())
}

/// Gives back a reservation whose call came to nothing.
pub async fn release(app: &App, call_id: Uuid) -> Result<(), Error> {
    let tx = app.db.begin().await?;
    take(&tx, BTreeMap::from([(call_id, 0)])).await?;
    tx.commit().await?;
    app.releases.wake();
    Ok(())
}

/// Deletes reservations and moves their counters: what each held is freed, what it used is added. Those that somebody
/// else deleted before are left out.
pub async fn take(tx: &DatabaseTransaction, used: BTreeMap<Uuid, i64>) -> Result<(), Error> {
    let deleted = quota_reservations::Entity::delete_many()
        .filter(quota_reservations::Column::CallId.is_in(used.keys().copied()))
        .exec_with_returning(tx)
        .await?;
    let mut moves: BTreeMap<Counter, (i64, i64)> = BTreeMap::new();
    for reservation in &deleted {
        for counter in counters_of(reservation) {
            let (add_used, add_reserved) = moves.entry(counter).or_default();
            *add_used += used.get(&reservation.call_id).copied().unwrap_or(0);
            *add_reserved -= reservation.tokens;
        }
    }
    for (counter, (used, reserved)) in moves {
        move_counter(tx, &counter, used, reserved).await?;
    }
    Ok(())
}

/// Adds to what a call used whose reservation is gone; the amount may be negative.
pub async fn add_used(
    tx: &DatabaseTransaction,
    reservation: &quota_reservations::Model,
    tokens: i64,
) -> Result<(), Error> {
    for counter in counters_of(reservation) {
        move_counter(tx, &counter, tokens, 0).await?;
    }
    Ok(())
}

fn counters_of(reservation: &quota_reservations::Model) -> impl Iterator<Item = Counter> {
    let tenant_id = reservation.tenant_id;
    let counter =
        move |scope, scope_id, period: &str| Counter { tenant_id, scope, scope_id, period: period.to_owned() };
    let key = reservation.key_id.map(|id| counter(Scope::Key, id, &reservation.period));
    let run = reservation.run_id.filter(|_| reservation.run_limited).map(|id| counter(Scope::Run, id, RUN_PERIOD));
    std::iter::once(counter(Scope::Tenant, tenant_id, &reservation.period)).chain(key).chain(run)
}
