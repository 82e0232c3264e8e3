//! The fair queue: who is claimed next, and by which right a worker holds a run.
//!
//! Start-time fair queueing. At its enqueue a run gets the virtual time
//! `max(the pool's, the tenant's last) + 1 / weight`, and the least virtual time is claimed first. A claim
//! locks the row that a tenant has in the pool before it takes its runs, so that caps never overshoot, and a
//! capped tenant's backlog is never looked at.
//!
//! Whoever else needs both locks a run's row before its queue's, and before either the run's conversation, which
//! ends and starts of its runs have to do with ([`super::journal::lock_conversations`]). A claim does not wait for runs that are
//! locked, so the two orders can't block each other.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use chrono::{DateTime, TimeDelta, Utc};
use entity::runs::Status;
use entity::{TenantOwned, runs, tenant_queues, tenants};
use sea_orm::ActiveValue::Set;
use sea_orm::sea_query::{Expr, LockBehavior, LockType, OnConflict};
use sea_orm::{
    ActiveModelTrait, ColumnTrait, ConnectionTrait, DatabaseTransaction, DbBackend, EntityTrait, ExprTrait,
    FromQueryResult, IntoActiveModel, QueryFilter, QueryOrder, QuerySelect, QueryTrait, Select, Statement, Value,
};
use uuid::Uuid;

use crate::app::App;
use crate::db::values_list;
use crate::error::Error;

/// The pool that the api's own workers claim from.
pub const SHARED: &str = "shared";

/// The pool whose workers execute a tenant's runs: the one place that decides it. A dedicated tenant's runs wait for
/// workers of its own, whose pool is named after it.
pub fn pool_of(tenant: &tenants::Model) -> Cow<'static, str> {
    match tenant.isolation {
        tenants::Isolation::Shared => SHARED.into(),
        tenants::Isolation::Dedicated => own_pool(tenant.id).into(),
    }
}

/// The pool of a tenant's own workers.
pub fn own_pool(tenant_id: Uuid) -> String {
    tenant_id.to_string()
}

/// Puts a run into its pool's queue.
pub async fn enqueue(app: &App, tx: &DatabaseTransaction, run: runs::Model) -> Result<runs::Model, Error> {
    // Locked, so that a suspension or a change of plan comes before or after, and never gets lost.
    let tenant = tenants::Entity::in_tenant(run.tenant_id).lock_shared().one(tx).await?;
    let tenant = tenant.ok_or_else(|| Error::internal("a run of a tenant that is gone"))?;
    let vtime = next_vtimes(app, tx, &tenant, 1).await?.into_iter().next();
    let mut row = run.into_active_model();
    row.status = Set(Status::Queued);
    row.pool = Set(pool_of(&tenant).into_owned());
    row.vtime = Set(vtime);
    row.lease_until = Set(None);
    Ok(row.update(tx).await?)
}

/// The next `count` virtual times of a tenant's queue, now taken. The caller's transaction holds the tenant.
pub async fn next_vtimes(
    app: &App,
    tx: &DatabaseTransaction,
    tenant: &tenants::Model,
    count: u32,
) -> Result<Vec<f64>, Error> {
    let pool = pool_of(tenant);
    let step = 1.0 / weight(app, tenant)?;
    let last = match take_vtimes(tx, tenant.id, &pool, step, count).await? {
        Some(last) => last,
        None => {
            make_queue(app, tx, tenant, &pool).await?;
            let last = take_vtimes(tx, tenant.id, &pool, step, count).await?;
            last.ok_or_else(|| Error::internal("a tenant's queue is gone"))?
        }
    };
    Ok(vtimes_up_to(last, step, count))
}

/// Locks queues in their order, where a transaction comes to several of them by different ways. On SQLite there is one
/// writer.
pub async fn lock(tx: &DatabaseTransaction, queues: &BTreeSet<(Uuid, String)>) -> Result<(), Error> {
    if queues.len() < 2 || tx.get_database_backend() == DbBackend::Sqlite {
        return Ok(());
    }
    let one = |(tenant_id, pool): &(Uuid, String)| {
        sea_orm::Condition::all()
            .add(tenant_queues::Column::TenantId.eq(*tenant_id))
            .add(tenant_queues::Column::Pool.eq(pool.as_str()))
    };
    let any = queues.iter().map(one).fold(sea_orm::Condition::any(), sea_orm::Condition::add);
    tenant_queues::Entity::across_tenants()
        .filter(any)
        .order_by_asc(tenant_queues::Column::TenantId)
        .order_by_asc(tenant_queues::Column::Pool)
        .lock_exclusive()
        .all(tx)
        .await?;
    Ok(())
}

/// Virtual times of `count` runs of a tenant that are claimed as soon as they are there, as if they had been queued: their
/// places are taken. None if something could be claimed before them, or the tenant's cap leaves less room. The caller's
/// transaction holds the tenant, and stores them with [`claimed_at_once`].
pub async fn pass(
    app: &App,
    tx: &DatabaseTransaction,
    tenant: &tenants::Model,
    count: u32,
) -> Result<Option<Vec<f64>>, Error> {
    let sql = "UPDATE tenant_queues SET \
               last_vtime = (CASE WHEN last_vtime > shared.vtime THEN last_vtime ELSE shared.vtime END) + $3 * $4, \
               claimed_vtime = (CASE WHEN last_vtime > shared.vtime THEN last_vtime ELSE shared.vtime END) + $3 * $4, \
               running = running + $5 \
               FROM (SELECT MAX(claimed_vtime) AS vtime, \
                     COUNT(CASE WHEN next_vtime IS NOT NULL AND running < max_running THEN 1 END) AS waiting \
                     FROM tenant_queues WHERE pool = $2) AS shared \
               WHERE tenant_id = $1 AND pool = $2 AND next_vtime IS NULL AND running + $5 <= max_running \
               AND shared.waiting = 0 RETURNING last_vtime";
    let step = 1.0 / weight(app, tenant)?;
    let running = i32::try_from(count).unwrap_or(i32::MAX);
    let values = [tenant.id.into(), SHARED.into(), step.into(), f64::from(count).into(), running.into()];
    let statement = Statement::from_sql_and_values(tx.get_database_backend(), sql, values);
    let last = LastVtime::find_by_statement(statement).one(tx).await?;
    Ok(last.map(|LastVtime { last_vtime }| vtimes_up_to(last_vtime, step, count)))
}

/// A run that is about to be stored, as its first claim leaves it.
pub fn claimed_at_once(app: &App, run: runs::Model, vtime: f64) -> runs::Model {
    let now = app.clock.now();
    runs::Model {
        status: Status::Running,
        vtime: Some(vtime),
        fence: run.fence + 1,
        lease_until: Some(lease_from(app, now)),
        claimed_at: Some(run.created_at),
        started_at: Some(now),
        ..run
    }
}

/// Whether that claim is the only one that a run has had: one from the queue is later than the run.
pub fn was_claimed_at_once(run: &runs::Model) -> bool {
    run.status == Status::Running && run.fence == 1 && run.claimed_at == Some(run.created_at)
}

/// A run that was claimed at once, as it would have been queued.
pub fn before_claim(run: runs::Model) -> runs::Model {
    runs::Model { status: Status::Queued, fence: 0, lease_until: None, claimed_at: None, started_at: None, ..run }
}

/// Virtual times up to the last.
fn vtimes_up_to(last: f64, step: f64, count: u32) -> Vec<f64> {
    (0..count).rev().map(|before_last| last - step * f64::from(before_last)).collect()
}

#[derive(FromQueryResult)]
struct LastVtime {
    last_vtime: f64,
}

/// The last of the virtual times that were taken; none if the tenant has no queue in the pool.
async fn take_vtimes(
    tx: &DatabaseTransaction,
    tenant_id: Uuid,
    pool: &str,
    step: f64,
    count: u32,
) -> Result<Option<f64>, Error> {
    // The pool's own time is the greatest virtual time that was claimed.
    let sql = "UPDATE tenant_queues SET \
               last_vtime = (CASE WHEN last_vtime > pool_time.vtime THEN last_vtime ELSE pool_time.vtime END) + $3 * $4, \
               next_vtime = COALESCE(next_vtime, \
                   (CASE WHEN last_vtime > pool_time.vtime THEN last_vtime ELSE pool_time.vtime END) + $3) \
               FROM (SELECT MAX(claimed_vtime) AS vtime FROM tenant_queues WHERE pool = $2) AS pool_time \
               WHERE tenant_id = $1 AND pool = $2 RETURNING last_vtime";
    let values = [tenant_id.into(), pool.into(), step.into(), f64::from(count).into()];
    let statement = Statement::from_sql_and_values(tx.get_database_backend(), sql, values);
    Ok(LastVtime::find_by_statement(statement).one(tx).await?.map(|row| row.last_vtime))
}

fn weight(app: &App, tenant: &tenants::Model) -> Result<f64, Error> {
    Ok(f64::from(Ord::max(app.plans.get(&tenant.plan)?.weight, 1)))
}

/// Makes a tenant's queue in a pool, if it isn't there.
async fn make_queue(app: &App, tx: &DatabaseTransaction, tenant: &tenants::Model, pool: &str) -> Result<(), Error> {
    let plan = app.plans.get(&tenant.plan)?;
    let max_running = if tenant.takes_runs() { plan.max_concurrent_runs } else { 0 };
    let queue = tenant_queues::ActiveModel {
        tenant_id: Set(tenant.id),
        pool: Set(pool.to_owned()),
        running: Set(0),
        max_running: Set(max_running),
        last_vtime: Set(0.0),
        next_vtime: Set(None),
        claimed_vtime: Set(0.0),
    };
    tenant_queues::Entity::insert(queue)
        .on_conflict(OnConflict::new().do_nothing().to_owned())
        .exec_without_returning(tx)
        .await?;
    Ok(())
}

/// Moves what a tenant has queued to the pool that it has now, in the same order. What workers of the old pool hold
/// they finish. The caller's transaction holds the tenant.
pub async fn change_pool(app: &App, tx: &DatabaseTransaction, tenant: &tenants::Model) -> Result<(), Error> {
    let pool = pool_of(tenant);
    let left = runs::Entity::in_tenant(tenant.id)
        .filter(runs::Column::Status.eq(Status::Queued))
        .filter(runs::Column::Pool.ne(pool.as_ref()));
    let left: Vec<(Uuid, String)> = left
        .select_only()
        .columns([runs::Column::Id, runs::Column::Pool])
        .lock_exclusive()
        .into_tuple()
        .all(tx)
        .await?;
    let Some((_, old)) = left.into_iter().next() else { return Ok(()) };
    make_queue(app, tx, tenant, &pool).await?;
    let start = pool_vtime(tx, &pool).await?;
    // Runs that wait for their conversation have no virtual time yet; they get one at their enqueue.
    let sql = "UPDATE runs SET pool = $2, vtime = CASE WHEN runs.vtime IS NULL THEN NULL ELSE $3 + moved.place * $4 END \
               FROM (SELECT id, row_number() OVER (ORDER BY vtime, id) AS place FROM runs \
                     WHERE tenant_id = $1 AND status = 'queued' AND pool <> $2) AS moved \
               WHERE runs.id = moved.id";
    let values = [tenant.id.into(), pool.to_string().into(), start.into(), (1.0 / weight(app, tenant)?).into()];
    tx.execute_raw(Statement::from_sql_and_values(tx.get_database_backend(), sql, values)).await?;
    for pool in [old.as_str(), pool.as_ref()] {
        refresh_head(tx, tenant.id, pool).await?;
    }
    tenant_queues::Entity::update_many()
        .col_expr(
            tenant_queues::Column::LastVtime,
            Expr::cust(
                "COALESCE((SELECT max(vtime) FROM runs WHERE runs.tenant_id = tenant_queues.tenant_id \
                        AND runs.pool = tenant_queues.pool AND runs.status = 'queued'), last_vtime)",
            ),
        )
        .filter(tenant_queues::Column::TenantId.eq(tenant.id))
        .filter(tenant_queues::Column::Pool.eq(pool.as_ref()))
        .exec(tx)
        .await?;
    Ok(())
}

/// Moves what lies in the queue of a pool that its tenant has left: runs that workers of that pool still held when it
/// left, and that they have given back or lost since.
pub async fn gather(app: &App) -> Result<(), Error> {
    // A tenant has had the shared pool and its own, so it has left the one that it isn't in ([`pool_of`]).
    let left = "EXISTS (SELECT 1 FROM tenant_queues WHERE tenant_queues.tenant_id = tenants.id \
                AND tenant_queues.next_vtime IS NOT NULL \
                AND (tenant_queues.pool = 'shared') <> (tenants.isolation = 'shared'))";
    let tenants = tenants::Entity::across_tenants().filter(Expr::cust(left)).all(app.db.read()).await?;
    for tenant in tenants {
        gather_of(app, tenant.id).await?;
    }
    Ok(())
}

async fn gather_of(app: &App, tenant_id: Uuid) -> Result<(), Error> {
    let tx = app.db.begin().await?;
    let tenant = tenants::Entity::in_tenant(tenant_id).lock_exclusive().one(&tx).await?;
    let Some(tenant) = tenant else { return Ok(()) };
    change_pool(app, &tx, &tenant).await?;
    tx.commit().await?;
    app.wakes.wake(&pool_of(&tenant));
    Ok(())
}

/// The pool's own time: the greatest virtual time that was claimed.
async fn pool_vtime(tx: &DatabaseTransaction, pool: &str) -> Result<f64, Error> {
    let claimed: Option<Option<f64>> = tenant_queues::Entity::across_tenants()
        .filter(tenant_queues::Column::Pool.eq(pool))
        .select_only()
        .column_as(tenant_queues::Column::ClaimedVtime.max(), "vtime")
        .into_tuple()
        .one(tx)
        .await?;
    Ok(claimed.flatten().unwrap_or(0.0))
}

/// What a claim came to.
pub enum Claimed {
    /// These; none if those that wait may not be claimed now.
    Runs(Vec<runs::Model>),
    /// Nothing waits in the pool, not even for a tenant's cap.
    NothingWaits,
}

/// Claims up to `max` runs of a pool, the next in fair order first. Each has a new fencing token and
/// a lease from now. `worker` names the worker apart that asks.
pub async fn claim(app: &App, pool: &str, max: usize, worker: Option<&str>) -> Result<Claimed, Error> {
    let next = tenant_queues::Entity::across_tenants()
        .filter(waiting(pool))
        .order_by_desc(Expr::expr(has_room()))
        .limit(1)
        .one(app.db.read())
        .await?;
    match next {
        None => return Ok(Claimed::NothingWaits),
        Some(queue) if max == 0 || free_places(&queue) == 0 => return Ok(Claimed::Runs(Vec::new())),
        Some(_) => {}
    }
    let now = app.clock.now();
    let tx = app.db.begin().await?;
    // The least virtual times belong to as many tenants at most.
    let least = tenant_queues::Entity::across_tenants()
        .filter(waiting(pool))
        .filter(has_room())
        .order_by_asc(tenant_queues::Column::NextVtime)
        .limit(max as u64);
    let queues = skip_locked(&tx, least).all(&tx).await?;
    let mut heads = Vec::new();
    for queue in &queues {
        heads.extend(head_of(&tx, queue, max).await?);
    }
    let chosen = choose(&queues, heads, max);
    for queue in queues {
        advance(&tx, queue, &chosen).await?;
    }
    let ids = chosen.iter().filter(|head| head.is_claimed).map(|head| head.id);
    let mut claimed = runs::Entity::update_many()
        .set(runs::ActiveModel {
            status: Set(Status::Running),
            lease_until: Set(Some(lease_from(app, now))),
            claimed_at: Set(Some(now)),
            worker: Set(worker.map(str::to_owned)),
            ..Default::default()
        })
        .col_expr(runs::Column::Fence, Expr::col(runs::Column::Fence).add(1))
        .col_expr(runs::Column::StartedAt, Expr::col(runs::Column::StartedAt).if_null(now))
        .filter(runs::Column::Id.is_in(ids))
        .exec_with_returning(&tx)
        .await?;
    tx.commit().await?;
    claimed.sort_by(|a, b| f64::total_cmp(&a.vtime.unwrap_or(0.0), &b.vtime.unwrap_or(0.0)));
    Ok(Claimed::Runs(claimed))
}

/// A run at the head of its tenant's queue.
#[derive(FromQueryResult)]
struct Head {
    id: Uuid,
    tenant_id: Uuid,
    vtime: f64,
    #[sea_orm(skip)]
    is_claimed: bool,
}

/// A tenant's next runs, as many as it may have claimed, and one more.
async fn head_of(tx: &DatabaseTransaction, queue: &tenant_queues::Model, max: usize) -> Result<Vec<Head>, Error> {
    let head = runs::Entity::in_tenant(queue.tenant_id)
        .filter(runs::Column::Pool.eq(queue.pool.as_str()))
        .filter(runs::Column::Status.eq(Status::Queued))
        .filter(runs::Column::Vtime.is_not_null())
        .order_by_asc(runs::Column::Vtime)
        .select_only()
        .columns([runs::Column::Id, runs::Column::TenantId, runs::Column::Vtime])
        .limit(Ord::min(free_places(queue), max) as u64 + 1);
    // A run that somebody else holds is passed over for now.
    Ok(skip_locked(tx, head).into_model().all(tx).await?)
}

fn free_places(queue: &tenant_queues::Model) -> usize {
    usize::try_from(queue.max_running - queue.running).unwrap_or(0)
}

/// Marks the `max` runs that come first, within each tenant's cap.
fn choose(queues: &[tenant_queues::Model], mut waiting: Vec<Head>, max: usize) -> Vec<Head> {
    waiting.sort_by(|a, b| f64::total_cmp(&a.vtime, &b.vtime));
    let mut free: HashMap<Uuid, usize> = queues.iter().map(|queue| (queue.tenant_id, free_places(queue))).collect();
    let mut left = max;
    for head in &mut waiting {
        let Some(free) = free.get_mut(&head.tenant_id).filter(|free| **free > 0 && left > 0) else { continue };
        *free -= 1;
        left -= 1;
        head.is_claimed = true;
    }
    waiting
}

/// Notes in a tenant's queue what was claimed of it, and what comes next.
async fn advance(tx: &DatabaseTransaction, queue: tenant_queues::Model, heads: &[Head]) -> Result<(), Error> {
    let own = || heads.iter().filter(|head| head.tenant_id == queue.tenant_id);
    let claimed = || own().filter(|head| head.is_claimed);
    let running = queue.running + i32::try_from(claimed().count()).unwrap_or(0);
    let last = claimed().map(|head| head.vtime).fold(queue.claimed_vtime, f64::max);
    let next = match own().find(|head| !head.is_claimed) {
        Some(head) => Some(head.vtime),
        // Perhaps one that is held by somebody: it must not be forgotten.
        None => {
            let ids = claimed().map(|head| head.id).collect();
            least_vtime(tx, queue.tenant_id, &queue.pool, ids).await?
        }
    };
    let mut row = queue.into_active_model();
    row.running = Set(running);
    row.claimed_vtime = Set(last);
    row.next_vtime = Set(next);
    row.update(tx).await?;
    Ok(())
}

/// The least virtual time that a tenant has queued in a pool, but for these runs. Its queue is locked.
async fn least_vtime(
    tx: &DatabaseTransaction,
    tenant_id: Uuid,
    pool: &str,
    but_for: Vec<Uuid>,
) -> Result<Option<f64>, Error> {
    let least: Option<Option<f64>> = runs::Entity::in_tenant(tenant_id)
        .filter(runs::Column::Pool.eq(pool))
        .filter(runs::Column::Status.eq(Status::Queued))
        .filter(runs::Column::Id.is_not_in(but_for))
        .select_only()
        .column_as(runs::Column::Vtime.min(), "vtime")
        .into_tuple()
        .one(tx)
        .await?;
    Ok(least.flatten())
}

/// On SQLite there is one writer, and nothing to skip.
fn skip_locked<E: EntityTrait>(tx: &DatabaseTransaction, rows: Select<E>) -> Select<E> {
    match tx.get_database_backend() {
        DbBackend::Postgres => rows.lock_with_behavior(LockType::Update, LockBehavior::SkipLocked),
        _ => rows,
    }
}

/// Whether a tenant has something queued in the pool.
fn waiting(pool: &str) -> sea_orm::Condition {
    sea_orm::Condition::all()
        .add(tenant_queues::Column::Pool.eq(pool))
        .add(tenant_queues::Column::NextVtime.is_not_null())
}

/// Whether its cap leaves room for more.
fn has_room() -> Expr {
    Expr::col(tenant_queues::Column::Running).lt(Expr::col(tenant_queues::Column::MaxRunning))
}

/// When a lease that is taken or renewed at `now` lapses.
pub fn lease_from(app: &App, now: DateTime<Utc>) -> DateTime<Utc> {
    now + TimeDelta::seconds(i64::try_from(app.config.runs.lease_seconds).unwrap_or(30))
}

/// When a lease of which an append was made at `now` lapses at the earliest: most of it is left, or it is renewed.
pub fn least_lease_from(app: &App, now: DateTime<Utc>) -> DateTime<Utc> {
    now + (lease_from(app, now) - now) * 2 / 3
}

/// Frees the places of runs that workers held and that aren't theirs any more.
pub async fn vacate(tx: &DatabaseTransaction, tenant_id: Uuid, pool: &str, places: i32) -> Result<(), Error> {
    tenant_queues::Entity::update_many()
        .col_expr(tenant_queues::Column::Running, Expr::col(tenant_queues::Column::Running).sub(places))
        .filter(tenant_queues::Column::TenantId.eq(tenant_id))
        .filter(tenant_queues::Column::Pool.eq(pool))
        .exec(tx)
        .await?;
    Ok(())
}

/// Notes a tenant's next run anew, after one was put back or taken out.
pub async fn refresh_head(tx: &DatabaseTransaction, tenant_id: Uuid, pool: &str) -> Result<(), Error> {
    // Locked before the runs are read: a run that is enqueued meanwhile must not be overlooked.
    tenant_queues::Entity::in_tenant(tenant_id)
        .filter(tenant_queues::Column::Pool.eq(pool))
        .lock_exclusive()
        .one(tx)
        .await?;
    let next = least_vtime(tx, tenant_id, pool, Vec::new()).await?;
    tenant_queues::Entity::update_many()
        .col_expr(tenant_queues::Column::NextVtime, Expr::value(next))
        .filter(tenant_queues::Column::TenantId.eq(tenant_id))
        .filter(tenant_queues::Column::Pool.eq(pool))
        .exec(tx)
        .await?;
    Ok(())
}

/// Which runs are taken back from their workers.
#[derive(Clone, Copy, Debug)]
pub enum Whose {
    /// Those whose lease has lapsed.
    Lapsed,
    /// Every one: an embedded server's at its start, whose workers died with the one before.
    Everyone,
    /// A tenant's.
    Tenant(Uuid),
    /// Those of tenants that aren't served: a suspension that was cut off half way.
    Inactive,
    /// One run, from the worker with this fencing token.
    Held(Uuid, i64),
}

/// Puts runs that workers hold back into the queue, in their old place. The fence rises, so that
/// whatever the worker still sends is refused.
pub async fn take_back(tx: &DatabaseTransaction, whose: Whose, now: DateTime<Utc>) -> Result<Vec<runs::Model>, Error> {
    let mut held = runs::Entity::across_tenants().filter(runs::Column::Status.eq(Status::Running));
    held = match whose {
        Whose::Lapsed => held.filter(runs::Column::LeaseUntil.lt(now)),
        Whose::Everyone => held,
        Whose::Tenant(id) => held.filter(runs::Column::TenantId.eq(id)),
        Whose::Inactive => {
            let inactive = tenants::Entity::across_tenants()
                .filter(tenants::Column::Status.ne(tenants::Status::Active))
                .select_only()
                .column(tenants::Column::Id);
            held.filter(runs::Column::TenantId.in_subquery(inactive.into_query()))
        }
        Whose::Held(id, fence) => held.filter(runs::Column::Id.eq(id)).filter(runs::Column::Fence.eq(fence)),
    };
    held = match whose {
        // A lapsed run whose row is held is being renewed or swept elsewhere.
        Whose::Lapsed | Whose::Inactive => skip_locked(tx, held),
        Whose::Everyone | Whose::Tenant(_) | Whose::Held(..) => held.lock_exclusive(),
    };
    let mut waiting = Vec::new();
    let mut vacated: BTreeMap<(Uuid, String), i32> = BTreeMap::new();
    for run in held.order_by_asc(runs::Column::Id).all(tx).await? {
        *vacated.entry((run.tenant_id, run.pool.clone())).or_default() += 1;
        let (fence, held_ms) = (run.fence + 1, held_ms(&run, now));
        let mut row = run.into_active_model();
        row.held_ms = Set(held_ms);
        row.status = Set(Status::Queued);
        row.fence = Set(fence);
        row.lease_until = Set(None);
        waiting.push(row.update(tx).await?);
    }
    // Queues after the runs, in their order, as everywhere.
    for ((tenant_id, pool), places) in vacated {
        vacate(tx, tenant_id, &pool, places).await?;
        refresh_head(tx, tenant_id, &pool).await?;
    }
    Ok(waiting)
}

/// Milliseconds that workers have held a run, the present one until `now`. A worker that is gone counts until its
/// lease lapsed.
pub fn held_ms(run: &runs::Model, now: DateTime<Utc>) -> i64 {
    let until = run.lease_until.map_or(now, |lapses| Ord::min(lapses, now));
    let present = run.claimed_at.filter(|_| run.status == Status::Running).map_or(TimeDelta::zero(), |at| until - at);
    run.held_ms + Ord::max(present.num_milliseconds(), 0)
}

/// Renews leases; those that were lost are returned.
pub async fn renew(app: &App, held: Vec<(Uuid, i64)>) -> Result<Vec<(Uuid, i64)>, Error> {
    /// Leases a statement.
    const MOST: usize = 500;
    let until = lease_from(app, app.clock.now());
    let mut lost = Vec::new();
    for held in held.chunks(MOST) {
        let sql = format!(
            "UPDATE runs SET lease_until = ${} FROM ({}) AS held \
             WHERE runs.id = held.column1 AND runs.fence = held.column2 AND runs.status = 'running' RETURNING runs.id",
            held.len() * 2 + 1,
            values_list(held.len(), 2)
        );
        let values = held.iter().flat_map(|(id, fence)| -> [Value; 2] { [(*id).into(), (*fence).into()] });
        let values: Vec<Value> = values.chain([until.into()]).collect();
        let tx = app.db.begin().await?;
        // Locked in their order, as appends lock them.
        runs::Entity::across_tenants()
            .filter(runs::Column::Id.is_in(held.iter().map(|(id, _)| *id)))
            .order_by_asc(runs::Column::Id)
            .select_only()
            .column(runs::Column::Id)
            .lock_exclusive()
            .into_tuple::<Uuid>()
            .all(&tx)
            .await?;
        let statement = Statement::from_sql_and_values(tx.get_database_backend(), sql, values);
        let renewed: HashSet<Uuid> =
            tx.query_all_raw(statement).await?.iter().map(|row| row.try_get("", "id")).collect::<Result<_, _>>()?;
        tx.commit().await?;
        lost.extend(held.iter().filter(|(id, _)| !renewed.contains(id)));
    }
    Ok(lost)
}
