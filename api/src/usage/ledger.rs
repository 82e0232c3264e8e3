//! The ledger: a row for each model call that a provider charged, exactly once (I1).

use cloister_runtime::item::TokenUsage;
use entity::{Shared, TenantOwned, prices, quota_reservations, usage_records};
use sea_orm::sea_query::OnConflict;
use sea_orm::{
    ActiveModelTrait, ColumnTrait, ConnectionTrait, DatabaseTransaction, EntityTrait, IntoActiveModel, QueryFilter,
    Statement,
};
use uuid::Uuid;

use super::quota;
use crate::app::App;
use crate::clock::day_of;
use crate::error::Error;
use crate::metrics::{self, CallOutcome};
use crate::models::catalog;
use crate::tenants::changes::Change;

/// Records what a call was charged, in the caller's transaction: the row, the day's totals and the
/// reservation. The reservation's time decides the day and the month. Done a second time, nothing
/// happens.
pub async fn settle(
    tx: &DatabaseTransaction,
    reservation: &quota_reservations::Model,
    usage: &TokenUsage,
) -> Result<(), Error> {
    let row = usage_records::Model {
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
    };
    let inserted = usage_records::Entity::insert(row.into_active_model().reset_all())
        .on_conflict(OnConflict::new().do_nothing().to_owned())
        .exec_without_returning(tx)
        .await?;
    if inserted == 0 {
        return Ok(());
    }
    add_to_totals(tx, reservation, usage).await?;
    quota::take(tx, reservation.call_id, usage.total_tokens()).await?;
    Ok(())
}

async fn add_to_totals(
    tx: &DatabaseTransaction,
    reservation: &quota_reservations::Model,
    usage: &TokenUsage,
) -> Result<(), Error> {
    let sql = "INSERT INTO usage_totals (tenant_id, day, agent_id, agent_version, model, key_id, requests, \
               estimated_requests, input_tokens, cache_read_tokens, cache_write_tokens, output_tokens, \
               reasoning_tokens, cost) VALUES ($1, $2, $3, $4, $5, $6, 1, $7, $8, $9, $10, $11, $12, $13) \
               ON CONFLICT (tenant_id, day, agent_id, agent_version, model, key_id) DO UPDATE SET \
               requests = usage_totals.requests + 1, \
               estimated_requests = usage_totals.estimated_requests + excluded.estimated_requests, \
               input_tokens = usage_totals.input_tokens + excluded.input_tokens, \
               cache_read_tokens = usage_totals.cache_read_tokens + excluded.cache_read_tokens, \
               cache_write_tokens = usage_totals.cache_write_tokens + excluded.cache_write_tokens, \
               output_tokens = usage_totals.output_tokens + excluded.output_tokens, \
               reasoning_tokens = usage_totals.reasoning_tokens + excluded.reasoning_tokens, \
               cost = usage_totals.cost + excluded.cost";
    let values = [
        reservation.tenant_id.into(),
        day_of(reservation.created_at).into(),
        reservation.agent_id.unwrap_or(Uuid::nil()).into(),
        reservation.agent_version.unwrap_or(0).into(),
        reservation.model.clone().into(),
        reservation.key_id.unwrap_or(Uuid::nil()).into(),
        i64::from(usage.estimated).into(),
        usage.input_tokens.into(),
        usage.cache_read_tokens.into(),
        usage.cache_write_tokens.into(),
        usage.output_tokens.into(),
        usage.reasoning_tokens.into(),
        usage.cost_nano_usd.into(),
    ];
    tx.execute_raw(Statement::from_sql_and_values(tx.get_database_backend(), sql, values)).await?;
    Ok(())
}

/// Ends the reservations that no process holds any more. One that was never sent is given back; one
/// that was sent becomes an estimated row: our count of the input and the output last noted, never
/// above what was reserved. With `all`, every reservation counts as an orphan: an embedded server's
/// at its start.
pub async fn sweep(app: &App, all: bool) -> Result<(), Error> {
    let mut orphans = quota_reservations::Entity::across_tenants();
    if !all {
        orphans = orphans.filter(quota_reservations::Column::ExpiresAt.lt(app.clock.now()));
    }
    for orphan in orphans.all(app.db.read()).await? {
        if !orphan.sent {
            quota::release(app, orphan.call_id).await?;
            continue;
        }
        let price = prices::Entity::all().filter(prices::Column::Id.eq(orphan.price_id)).one(app.db.read()).await?;
        let price = price.ok_or_else(|| Error::internal("a reservation's price is gone"))?;
        let input_tokens = orphan.input_tokens.min(orphan.tokens);
        let mut usage = TokenUsage {
            input_tokens,
            output_tokens: orphan.output_tokens.min(orphan.tokens - input_tokens),
            estimated: true,
            ..TokenUsage::default()
        };
        usage.cost_nano_usd = catalog::cost(&price, &usage);
        let tx = app.db.begin().await?;
        settle(&tx, &orphan, &usage).await?;
        tx.commit().await?;
        metrics::model_call(CallOutcome::Orphaned, Some(&usage));
        tracing::warn!(call_id = %orphan.call_id, tokens = usage.total_tokens(), "settled an orphaned model call by estimate");
        app.releases.wake();
        app.changes.publish(orphan.tenant_id, Change::Usage);
    }
    Ok(())
}
