//! Counters of what is used and reserved of a limit. They move only here.

use std::collections::{BTreeMap, BTreeSet};

use entity::quota_counters::{self, Scope};
use entity::{api_keys, quota_reservations, tenants};
use sea_orm::ActiveValue::Set;
use sea_orm::sea_query::{Expr, LockType, OnConflict, Query, SelectStatement};
use sea_orm::{
    ActiveEnum, ColumnTrait, Condition, ConnectionTrait, DatabaseTransaction, DbBackend, EntityTrait, ExprTrait,
    FromQueryResult, Iterable, Order, Statement, Value,
};
use uuid::Uuid;

use crate::app::App;
use crate::db::values_list;
use crate::error::Error;
use crate::tenants::monthly_limit_of;

/// A run's counter has no month.
const RUN_PERIOD: &str = "run";

/// A row of `quota_counters`. In their order they are locked: a tenant's, its keys', its runs'.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Counter {
    tenant_id: Uuid,
    scope: Scope,
    scope_id: Uuid,
    period: String,
}

impl Counter {
    /// A tenant's month.
    pub fn of_tenant(tenant_id: Uuid, period: &str) -> Self {
        Self { tenant_id, scope: Scope::Tenant, scope_id: tenant_id, period: period.to_owned() }
    }

    /// A key's month.
    pub fn of_key(tenant_id: Uuid, key_id: Uuid, period: &str) -> Self {
        Self { tenant_id, scope: Scope::Key, scope_id: key_id, period: period.to_owned() }
    }

    /// A run's own.
    pub fn of_run(tenant_id: Uuid, run_id: Uuid) -> Self {
        Self { tenant_id, scope: Scope::Run, scope_id: run_id, period: RUN_PERIOD.to_owned() }
    }

    /// All months that a caller's calls count in.
    pub fn of_caller(tenant_id: Uuid, key_id: Option<Uuid>, period: &str) -> impl Iterator<Item = Self> + use<> {
        let key = key_id.map(|id| Self::of_key(tenant_id, id, period));
        std::iter::once(Self::of_tenant(tenant_id, period)).chain(key)
    }

    /// All that a reservation counts in.
    pub fn of(reservation: &quota_reservations::Model) -> impl Iterator<Item = Self> {
        let (tenant_id, period) = (reservation.tenant_id, reservation.period.as_str());
        let run = reservation.run_id.filter(|_| reservation.run_limited).map(|id| Self::of_run(tenant_id, id));
        Self::of_caller(tenant_id, reservation.key_id, period).chain(run)
    }

    /// Whose limit it counts against.
    pub fn scope(&self) -> Scope {
        self.scope
    }

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

/// Tokens that counters gain, or lose.
#[derive(Debug, Default)]
#[must_use = "counters move when it is applied"]
pub struct Moves(BTreeMap<Counter, (i64, i64)>);

impl Moves {
    /// For all counters of a reservation: so much to `used`, so much to `reserved`.
    pub fn add(&mut self, reservation: &quota_reservations::Model, used: i64, reserved: i64) {
        for counter in Counter::of(reservation) {
            self.add_to(counter, used, reserved);
        }
    }

    fn add_to(&mut self, counter: Counter, used: i64, reserved: i64) {
        let (add_used, add_reserved) = self.0.entry(counter).or_default();
        *add_used += used;
        *add_reserved += reserved;
    }

    /// Moves them, in the caller's transaction.
    pub async fn apply(self, app: &App, tx: &DatabaseTransaction) -> Result<(), Error> {
        Counters::lock(app, tx, self, std::iter::empty()).await?.store(tx).await
    }
}

/// What a counter counts, and against which limit, in tokens.
#[derive(Clone, Copy, Debug)]
pub struct Count {
    /// Settled.
    pub used: i64,
    /// Held by calls under way.
    pub reserved: i64,
    /// The tenant's or the key's, of a month. None for a key without one, and for a run, whose own is in its row.
    pub limit: Option<i64>,
}

/// Counters that a transaction holds, and how it moves them.
pub struct Counters {
    rows: BTreeMap<Counter, Count>,
    moves: Moves,
}

impl Counters {
    /// Locks counters in their order, which is everybody's: those that move, and those that are `asked` for, which are
    /// made if they are missing.
    pub async fn lock(
        app: &App,
        tx: &DatabaseTransaction,
        moves: Moves,
        asked: impl Iterator<Item = Counter>,
    ) -> Result<Self, Error> {
        let asked: BTreeSet<Counter> = asked.collect();
        let mut rows = BTreeMap::new();
        if asked.is_empty() && tx.get_database_backend() == DbBackend::Sqlite {
            // It has one writer, and nothing to lock.
            return Ok(Self { rows, moves });
        }
        let all: BTreeSet<&Counter> = moves.0.keys().chain(&asked).collect();
        let mut wanted: Vec<&Counter> = all.into_iter().collect();
        while !wanted.is_empty() {
            let mut locked = select(wanted.iter().copied());
            locked.lock_with_tables(LockType::Update, [quota_counters::Entity]);
            rows.extend(with_limits(app, tx, &locked).await?);
            // Those that are missing are made now, and locked in the next pass.
            wanted = asked.iter().filter(|counter| !rows.contains_key(*counter)).collect();
            if !wanted.is_empty() {
                quota_counters::Entity::insert_many(wanted.iter().map(|counter| counter.zero()))
                    .on_conflict(OnConflict::new().do_nothing().to_owned())
                    .exec_without_returning(tx)
                    .await?;
            }
        }
        Ok(Self { rows, moves })
    }

    /// Whether so many tokens more are within a counter's limit, with what has moved. `of_run` is a run's own limit.
    pub fn has_room(&self, counter: &Counter, tokens: i64, of_run: Option<i64>) -> bool {
        let Some(row) = self.rows.get(counter) else { return false };
        let limit = if counter.scope == Scope::Run { of_run } else { row.limit };
        let (used, reserved) = self.moves.0.get(counter).copied().unwrap_or_default();
        limit.is_none_or(|limit| row.used + row.reserved + used + reserved + tokens <= limit)
    }

    /// Whether all that a counter's limit allows is used, with what has moved, and whatever is reserved.
    pub fn is_used_up(&self, counter: &Counter) -> bool {
        let (used, _) = self.moves.0.get(counter).copied().unwrap_or_default();
        self.rows.get(counter).is_some_and(|row| row.limit.is_some_and(|limit| limit <= row.used + used))
    }

    /// Moves them further.
    pub fn moves(&mut self) -> &mut Moves {
        &mut self.moves
    }

    /// Writes what has moved, in one statement.
    pub async fn store(self, tx: &DatabaseTransaction) -> Result<(), Error> {
        const COLUMNS: usize = 6;
        let moved: Vec<_> = self.moves.0.into_iter().filter(|(_, moved)| *moved != (0, 0)).collect();
        if moved.is_empty() {
            return Ok(());
        }
        let sql = format!(
            "UPDATE quota_counters SET used = used + v.column5, reserved = reserved + v.column6 FROM ({}) AS v \
             WHERE tenant_id = v.column1 AND scope = v.column2 AND scope_id = v.column3 AND period = v.column4",
            values_list(moved.len(), COLUMNS)
        );
        let values = moved.into_iter().flat_map(|(counter, (used, reserved))| -> [Value; COLUMNS] {
            let Counter { tenant_id, scope, scope_id, period } = counter;
            [tenant_id.into(), scope.to_value().into(), scope_id.into(), period.into(), used.into(), reserved.into()]
        });
        tx.execute_raw(Statement::from_sql_and_values(tx.get_database_backend(), sql, values)).await?;
        Ok(())
    }
}

/// What counters count. Those that are missing are left out.
pub async fn read(app: &App, counters: impl Iterator<Item = Counter>) -> Result<BTreeMap<Counter, Count>, Error> {
    let counters: Vec<Counter> = counters.collect();
    with_limits(app, app.db.read(), &select(counters.iter())).await
}

/// A counter's row, and where its limit is to be found.
#[derive(FromQueryResult)]
struct Row {
    tenant_id: Uuid,
    scope: Scope,
    scope_id: Uuid,
    period: String,
    used: i64,
    reserved: i64,
    plan: Option<String>,
    tenant_limit: Option<i64>,
    key_limit: Option<i64>,
}

/// Counters in the order in which they are locked, with the limits that they count against as they are now.
fn select<'a>(counters: impl Iterator<Item = &'a Counter>) -> SelectStatement {
    let any = counters.fold(Condition::any(), |any, counter| any.add(counter.condition()));
    let column = |column: quota_counters::Column| (quota_counters::Entity, column);
    let of_key = Condition::all()
        .add(Expr::col(column(quota_counters::Column::Scope)).eq(Scope::Key))
        .add(Expr::col((api_keys::Entity, api_keys::Column::Id)).equals(column(quota_counters::Column::ScopeId)));
    let of_tenant = Expr::col((tenants::Entity, tenants::Column::Id)).equals(column(quota_counters::Column::TenantId));
    Query::select()
        .columns(quota_counters::Column::iter().map(column))
        .column((tenants::Entity, tenants::Column::Plan))
        .expr_as(Expr::col((tenants::Entity, tenants::Column::MonthlyTokenLimit)), "tenant_limit")
        .expr_as(Expr::col((api_keys::Entity, api_keys::Column::MonthlyTokenLimit)), "key_limit")
        .from(quota_counters::Entity)
        .left_join(tenants::Entity, of_tenant)
        .left_join(api_keys::Entity, of_key)
        .cond_where(any)
        .order_by(column(quota_counters::Column::TenantId), Order::Asc)
        .order_by_expr(Expr::col(column(quota_counters::Column::Scope)).eq(Scope::Tenant), Order::Desc)
        .order_by(column(quota_counters::Column::Scope), Order::Asc)
        .order_by(column(quota_counters::Column::ScopeId), Order::Asc)
        .order_by(column(quota_counters::Column::Period), Order::Asc)
        .to_owned()
}

async fn with_limits(
    app: &App,
    db: &impl ConnectionTrait,
    select: &SelectStatement,
) -> Result<BTreeMap<Counter, Count>, Error> {
    let mut counts = BTreeMap::new();
    for row in db.query_all(select).await? {
        let row = Row::from_query_result(&row, "")?;
        let limit = match row.scope {
            // Of a tenant that is gone nothing is left.
            Scope::Tenant => match &row.plan {
                Some(plan) => Some(monthly_limit_of(app, plan, row.tenant_limit)?),
                None => Some(0),
            },
            Scope::Key => row.key_limit,
            Scope::Run => None,
        };
        let Row { tenant_id, scope, scope_id, period, used, reserved, .. } = row;
        counts.insert(Counter { tenant_id, scope, scope_id, period }, Count { used, reserved, limit });
    }
    Ok(counts)
}
