//! The ledger: a row for each model call that a provider charged, exactly once (I1).

use std::collections::{BTreeMap, HashSet};

use cloister_runtime::item::TokenUsage;
use entity::{Shared, TenantOwned, prices, quota_reservations, usage_records};
use sea_orm::sea_query::OnConflict;
use sea_orm::{
    ActiveModelTrait, ColumnTrait, ConnectionTrait, DatabaseTransaction, EntityTrait, IntoActiveModel, QueryFilter,
    QuerySelect, Statement,
};
use uuid::Uuid;

use super::counters::Moves;
use super::quota;
use crate::app::App;
use crate::clock::day_of;
use crate::db::padded;
use crate::error::Error;
use crate::metrics::{self, CallOutcome};
use crate::models::catalog;
use crate::tenants::changes::Change;

/// What a call was charged.
#[derive(Clone, Debug)]
pub struct Settlement {
    /// The call. Its time decides the day and the month.
    pub reservation: quota_reservations::Model,
    /// What the provider counted, or we did in its place.
    pub usage: TokenUsage,
}

/// Records what calls were charged, in the caller's transaction: the rows, the days' totals and the reservations. For
/// a call that is recorded already nothing happens, unless it was an estimate and the provider's count comes after all.
/// The caller's transaction is to apply the moves.
pub async fn settle(tx: &DatabaseTransaction, settlements: &[&Settlement]) -> Result<Moves, Error> {
    if settlements.is_empty() {
        return Ok(Moves::default());
    }
    let rows = settlements.iter().map(|settlement| record(settlement).into_active_model().reset_all()).collect();
    let inserted = usage_records::Entity::insert_many(padded(tx, rows))
        .on_conflict(OnConflict::new().do_nothing().to_owned())
        .exec_with_returning_keys(tx)
        .await?;
    let new_ids: HashSet<Uuid> = inserted.into_iter().map(|(call_id, _)| call_id).collect();
    let is_new = |settlement: &Settlement| new_ids.contains(&settlement.reservation.call_id);
    let mut totals: BTreeMap<TotalsKey, Totals> = BTreeMap::new();
    for settlement in settlements.iter().filter(|settlement| is_new(settlement)) {
        totals.entry(TotalsKey::of(&settlement.reservation)).or_default().add(&settlement.usage);
    }
    // In the keys' order, as the counters are after them: two transactions can't wait for each other.
    for (key, totals) in totals {
        add_to_totals(tx, key, totals).await?;
    }
    let deleted = quota::delete(tx, settlements.iter().map(|settlement| settlement.reservation.call_id)).await?;
    let mut moves = Moves::default();
    for settlement in settlements {
        let Settlement { reservation, usage } = settlement;
        if let Some(tokens) = deleted.get(&reservation.call_id) {
            moves.add(reservation, if is_new(settlement) { usage.total_tokens() } else { 0 }, -tokens);
        }
        if !usage.estimated && !is_new(settlement) {
            correct(tx, settlement, &mut moves).await?;
        }
    }
    Ok(moves)
}

/// Gives back what calls reserved that nobody is charged for. One that was taken for an orphan in the meantime is struck
/// out of the ledger. Returns those of which there was anything; the caller's transaction is to apply the moves.
pub async fn release(
    tx: &DatabaseTransaction,
    reservations: &[&quota_reservations::Model],
    moves: &mut Moves,
) -> Result<HashSet<Uuid>, Error> {
    if reservations.is_empty() {
        return Ok(HashSet::new());
    }
    let deleted = quota::delete(tx, reservations.iter().map(|reservation| reservation.call_id)).await?;
    let mut released: HashSet<Uuid> = deleted.keys().copied().collect();
    for reservation in reservations {
        if let Some(tokens) = deleted.get(&reservation.call_id) {
            moves.add(reservation, 0, -tokens);
        } else if let Some(estimate) = estimate_of(tx, reservation).await? {
            let tokens = difference(&TokenUsage::default(), &usage_of(&estimate));
            estimate.into_active_model().delete(tx).await?;
            let totals = Totals { requests: -1, estimated_requests: -1, tokens };
            add_to_totals(tx, TotalsKey::of(reservation), totals).await?;
            moves.add(reservation, tokens.total_tokens(), 0);
            released.insert(reservation.call_id);
        }
    }
    Ok(released)
}

/// The row of a call that was taken for an orphan, locked.
async fn estimate_of(
    tx: &DatabaseTransaction,
    reservation: &quota_reservations::Model,
) -> Result<Option<usage_records::Model>, Error> {
    let estimate = usage_records::Entity::in_tenant(reservation.tenant_id)
        .filter(usage_records::Column::CallId.eq(reservation.call_id))
        .filter(usage_records::Column::CreatedAt.eq(reservation.created_at))
        .filter(usage_records::Column::Estimated.eq(true))
        .lock_exclusive();
    Ok(estimate.one(tx).await?)
}

/// Puts the provider's count in an estimate's place: the call's process stood still, or could not reach the database,
/// for so long that the call was taken for an orphan, but it lived.
async fn correct(tx: &DatabaseTransaction, settlement: &Settlement, moves: &mut Moves) -> Result<(), Error> {
    let Settlement { reservation, usage } = settlement;
    let Some(estimate) = estimate_of(tx, reservation).await? else { return Ok(()) };
    let tokens = difference(usage, &usage_of(&estimate));
    record(settlement).into_active_model().reset_all().update(tx).await?;
    let totals = Totals { requests: 0, estimated_requests: -1, tokens };
    add_to_totals(tx, TotalsKey::of(reservation), totals).await?;
    moves.add(reservation, tokens.total_tokens(), 0);
    Ok(())
}

fn record(Settlement { reservation, usage }: &Settlement) -> usage_records::Model {
    usage_records::Model {
        call_id: reservation.call_id,
        created_at: reservation.created_at,
        tenant_id: reservation.tenant_id,
        run_id: reservation.run_id,
        turn: reservation.turn,
        attempt: reservation.attempt,
        agent_id: reservation.agent_id,
        agent_version: reservation.agent_version,
        agent_path: reservation.agent_path.clone(),
        key_id: reservation.key_id,
        model: reservation.model.clone(),
        price_id: reservation.price_id,
        input_tokens: usage.input_tokens,
        cache_read_tokens: usage.cache_read_tokens,
        cache_write_tokens: usage.cache_write_tokens,
        output_tokens: usage.output_tokens,
        reasoning_tokens: usage.reasoning_tokens,
        cost: usage.cost_nano_usd,
        estimated: usage.estimated,
    }
}

/// What a row counts.
fn usage_of(row: &usage_records::Model) -> TokenUsage {
    TokenUsage {
        input_tokens: row.input_tokens,
        cache_read_tokens: row.cache_read_tokens,
        cache_write_tokens: row.cache_write_tokens,
        output_tokens: row.output_tokens,
        reasoning_tokens: row.reasoning_tokens,
        cost_nano_usd: row.cost,
        estimated: row.estimated,
    }
}

fn difference(usage: &TokenUsage, less: &TokenUsage) -> TokenUsage {
    TokenUsage {
        input_tokens: usage.input_tokens - less.input_tokens,
        cache_read_tokens: usage.cache_read_tokens - less.cache_read_tokens,
        cache_write_tokens: usage.cache_write_tokens - less.cache_write_tokens,
        output_tokens: usage.output_tokens - less.output_tokens,
        reasoning_tokens: usage.reasoning_tokens - less.reasoning_tokens,
        cost_nano_usd: usage.cost_nano_usd - less.cost_nano_usd,
        estimated: false,
    }
}

/// A row of `usage_totals`.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct TotalsKey {
    tenant_id: Uuid,
    day: String,
    agent_id: Uuid,
    agent_version: i32,
    model: String,
    key_id: Uuid,
}

impl TotalsKey {
    fn of(reservation: &quota_reservations::Model) -> Self {
        Self {
            tenant_id: reservation.tenant_id,
            day: day_of(reservation.created_at),
            agent_id: reservation.agent_id.unwrap_or(Uuid::nil()),
            agent_version: reservation.agent_version.unwrap_or(0),
            model: reservation.model.clone(),
            key_id: reservation.key_id.unwrap_or(Uuid::nil()),
        }
    }
}

/// What is added to it.
#[derive(Default)]
struct Totals {
    requests: i64,
    estimated_requests: i64,
    tokens: TokenUsage,
}

impl Totals {
    fn add(&mut self, usage: &TokenUsage) {
        self.requests += 1;
        self.estimated_requests += i64::from(usage.estimated);
        self.tokens.input_tokens += usage.input_tokens;
        self.tokens.cache_read_tokens += usage.cache_read_tokens;
        self.tokens.cache_write_tokens += usage.cache_write_tokens;
        self.tokens.output_tokens += usage.output_tokens;
        self.tokens.reasoning_tokens += usage.reasoning_tokens;
        self.tokens.cost_nano_usd += usage.cost_nano_usd;
    }
}

async fn add_to_totals(tx: &DatabaseTransaction, key: TotalsKey, totals: Totals) -> Result<(), Error> {
    let sql = "INSERT INTO usage_totals (tenant_id, day, agent_id, agent_version, model, key_id, requests, \
               estimated_requests, input_tokens, cache_read_tokens, cache_write_tokens, output_tokens, \
               reasoning_tokens, cost) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14) \
               ON CONFLICT (tenant_id, day, agent_id, agent_version, model, key_id) DO UPDATE SET \
               requests = usage_totals.requests + excluded.requests, \
               estimated_requests = usage_totals.estimated_requests + excluded.estimated_requests, \
               input_tokens = usage_totals.input_tokens + excluded.input_tokens, \
               cache_read_tokens = usage_totals.cache_read_tokens + excluded.cache_read_tokens, \
               cache_write_tokens = usage_totals.cache_write_tokens + excluded.cache_write_tokens, \
               output_tokens = usage_totals.output_tokens + excluded.output_tokens, \
               reasoning_tokens = usage_totals.reasoning_tokens + excluded.reasoning_tokens, \
               cost = usage_totals.cost + excluded.cost";
    let values = [
        key.tenant_id.into(),
        key.day.into(),
        key.agent_id.into(),
        key.agent_version.into(),
        key.model.into(),
        key.key_id.into(),
        totals.requests.into(),
        totals.estimated_requests.into(),
        totals.tokens.input_tokens.into(),
        totals.tokens.cache_read_tokens.into(),
        totals.tokens.cache_write_tokens.into(),
        totals.tokens.output_tokens.into(),
        totals.tokens.reasoning_tokens.into(),
        totals.tokens.cost_nano_usd.into(),
    ];
    tx.execute_raw(Statement::from_sql_and_values(tx.get_database_backend(), sql, values)).await?;
    Ok(())
}

/// Ends the reservations that no process holds any more. One that was never sent is given back; one
/// that was sent becomes an estimated row: our count of the input and the output last noted, never
/// above what was reserved. With `all`, every reservation counts as an orphan: an embedded server's
/// at its start.
pub async fn sweep(app: &App, all: bool) -> Result<(), Error> {
    let orphaned = || {
        let orphans = quota_reservations::Entity::across_tenants();
        if all { orphans } else { orphans.filter(quota_reservations::Column::ExpiresAt.lt(app.clock.now())) }
    };
    for found in orphaned().all(app.db.read()).await? {
        let price = prices::Entity::all().filter(prices::Column::Id.eq(found.price_id)).one(app.db.read()).await?;
        let price = price.ok_or_else(|| Error::internal("a reservation's price is gone"))?;
        let tx = app.db.begin().await?;
        // Looked at again: its process may live after all, and go on with it.
        let orphan =
            orphaned().filter(quota_reservations::Column::CallId.eq(found.call_id)).lock_exclusive().one(&tx).await?;
        let Some(orphan) = orphan else { continue };
        let (tenant_id, call_id) = (orphan.tenant_id, orphan.call_id);
        // Replicas of before made a reservation first, and marked it when its call went out.
        if orphan.sent {
            let usage = estimate(&orphan, &price);
            settle(&tx, &[&Settlement { reservation: orphan, usage }]).await?.apply(app, &tx).await?;
            tx.commit().await?;
            metrics::model_call(CallOutcome::Orphaned, Some(&usage));
            tracing::warn!(%call_id, tokens = usage.total_tokens(), "settled an orphaned model call by estimate");
        } else {
            let mut moves = Moves::default();
            release(&tx, &[&orphan], &mut moves).await?;
            moves.apply(app, &tx).await?;
            tx.commit().await?;
        }
        app.releases.wake();
        app.changes.publish(tenant_id, Change::Usage);
    }
    Ok(())
}

/// What an orphan is charged: our count of its input and of the output last noted, never above what was reserved.
fn estimate(orphan: &quota_reservations::Model, price: &prices::Model) -> TokenUsage {
    let input_tokens = orphan.input_tokens.min(orphan.tokens);
    let mut usage = TokenUsage {
        input_tokens,
        output_tokens: orphan.output_tokens.min(orphan.tokens - input_tokens),
        estimated: true,
        ..TokenUsage::default()
    };
    usage.cost_nano_usd = catalog::cost(price, &usage);
    usage
}
