//! What the ledger adds up to: a month's usage from its counter, the breakdowns from the totals.

use std::collections::{BTreeMap, HashMap};

use chrono::{DateTime, Datelike, NaiveDate, TimeDelta, Utc};
use cloister_runtime::item::TokenUsage;
use entity::{TenantOwned, quota_counters, quota_counters::Scope, runs, usage_totals};
use sea_orm::{ColumnTrait, DbBackend, FromQueryResult, QueryFilter, Statement, Value};
use uuid::Uuid;

use crate::app::App;
use crate::batch::{self, Batch, Batched};
use crate::error::Error;

/// A calendar month in UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Month {
    year: i32,
    month: u32,
}

impl Month {
    /// The month of a moment.
    pub fn of(time: DateTime<Utc>) -> Self {
        Self { year: time.year(), month: time.month() }
    }

    /// From `YYYY-MM`.
    pub fn parse(text: &str) -> Option<Self> {
        let (year, month) = text.split_once('-')?;
        let digits = |text: &str, count: usize| text.len() == count && text.bytes().all(|byte| byte.is_ascii_digit());
        if !digits(year, 4) || !digits(month, 2) {
            return None;
        }
        let (year, month) = (year.parse().ok()?, month.parse().ok()?);
        NaiveDate::from_ymd_opt(year, month, 1).map(|_| Self { year, month })
    }
}

impl std::fmt::Display for Month {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:04}-{:02}", self.year, self.month)
    }
}

/// Sums of model calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum {
    /// Calls.
    pub requests: i64,
    /// Their tokens and cost.
    pub usage: TokenUsage,
}

impl Sum {
    fn add(&mut self, row: &usage_totals::Model) {
        self.requests += row.requests;
        self.usage.input_tokens += row.input_tokens;
        self.usage.cache_read_tokens += row.cache_read_tokens;
        self.usage.cache_write_tokens += row.cache_write_tokens;
        self.usage.output_tokens += row.output_tokens;
        self.usage.reasoning_tokens += row.reasoning_tokens;
        self.usage.cost_nano_usd += row.cost;
        self.usage.estimated |= row.estimated_requests > 0;
    }
}

/// A tenant's month.
#[derive(Clone, Debug, Default)]
pub struct MonthUsage {
    /// Settled tokens.
    pub used: i64,
    /// Tokens held by calls under way.
    pub reserved: i64,
    /// The totals that make it up.
    pub totals: Vec<usage_totals::Model>,
}

impl MonthUsage {
    /// All of the month.
    pub fn sum(&self) -> Sum {
        let mut sum = Sum::default();
        self.totals.iter().for_each(|row| sum.add(row));
        sum
    }

    /// Sums by what `key` tells of a total.
    pub fn by<K: Ord>(&self, key: impl Fn(&usage_totals::Model) -> K) -> BTreeMap<K, Sum> {
        let mut sums = BTreeMap::new();
        for row in &self.totals {
            sums.entry(key(row)).or_insert_with(Sum::default).add(row);
        }
        sums
    }
}

/// The months of several tenants, in two statements.
pub async fn months(app: &App, tenants: &[Uuid], month: Month) -> Result<HashMap<Uuid, MonthUsage>, Error> {
    let db = app.db.read();
    let mut months: HashMap<Uuid, MonthUsage> = tenants.iter().map(|id| (*id, MonthUsage::default())).collect();
    let counters = quota_counters::Entity::across_tenants()
        .filter(quota_counters::Column::TenantId.is_in(tenants.iter().copied()))
        .filter(quota_counters::Column::Scope.eq(Scope::Tenant))
        .filter(quota_counters::Column::Period.eq(month.to_string()))
        .all(db)
        .await?;
    for counter in counters {
        let month = months.entry(counter.tenant_id).or_default();
        (month.used, month.reserved) = (counter.used, counter.reserved);
    }
    let totals = usage_totals::Entity::across_tenants()
        .filter(usage_totals::Column::TenantId.is_in(tenants.iter().copied()))
        .filter(usage_totals::Column::Day.between(format!("{month}-01"), format!("{month}-31")))
        .all(db)
        .await?;
    for row in totals {
        months.entry(row.tenant_id).or_default().totals.push(row);
    }
    Ok(months)
}

#[derive(FromQueryResult)]
struct RunSum {
    run_id: Uuid,
    requests: i64,
    estimated: i64,
    input_tokens: i64,
    cache_read_tokens: i64,
    cache_write_tokens: i64,
    output_tokens: i64,
    reasoning_tokens: i64,
    cost: i64,
}

/// A run whose usage is asked for.
pub struct UsedBy {
    run_id: Uuid,
    created_at: DateTime<Utc>,
}

impl Batched for UsedBy {
    type Done = Sum;

    fn batch(app: &App) -> &Batch<Self> {
        &app.batches.used_by
    }

    async fn carry_out(app: &App, all: &[Self]) -> Result<Vec<Sum>, Error> {
        let ids: Vec<Uuid> = all.iter().map(|asked| asked.run_id).collect();
        let oldest = all.iter().map(|asked| asked.created_at).min().unwrap_or_default();
        let sums = sums(app, &ids, oldest).await?;
        Ok(ids.iter().map(|run_id| sums.get(run_id).copied().unwrap_or_default()).collect())
    }
}

/// What a run has used so far, from the ledger.
pub async fn run(app: &App, run: &runs::Model) -> Result<Sum, Error> {
    batch::join(app, UsedBy { run_id: run.id, created_at: run.created_at }).await
}

/// What runs have used so far, from the ledger, in one statement.
pub async fn runs(app: &App, runs: &[Uuid]) -> Result<HashMap<Uuid, Sum>, Error> {
    sums(app, runs, DateTime::UNIX_EPOCH).await
}

/// As [`runs`], of runs that began at `since` at the earliest.
async fn sums(app: &App, runs: &[Uuid], since: DateTime<Utc>) -> Result<HashMap<Uuid, Sum>, Error> {
    const SLACK: TimeDelta = TimeDelta::hours(1);
    if runs.is_empty() {
        return Ok(HashMap::new());
    }
    let db = app.db.read();
    // PostgreSQL sums bigint to numeric: cast back.
    let sum = |column: &str| format!("CAST(SUM({column}) AS bigint) AS {column}");
    let sums = format!(
        "COUNT(*) AS requests, CAST(SUM(CASE WHEN estimated THEN 1 ELSE 0 END) AS bigint) AS estimated, {}, {}, {}, {}, \
         {}, {} FROM usage_records",
        sum("input_tokens"),
        sum("cache_read_tokens"),
        sum("cache_write_tokens"),
        sum("output_tokens"),
        sum("reasoning_tokens"),
        sum("cost"),
    );
    let (sql, values): (String, Vec<Value>) = match db.get_database_backend() {
        // The statement is the same for however many. Each is looked up by itself, in the partitions that can have it.
        DbBackend::Postgres => (
            format!(
                "SELECT sums.* FROM UNNEST($1::uuid[]) AS asked (id) CROSS JOIN LATERAL (SELECT run_id, {sums} \
                 WHERE run_id = asked.id AND created_at >= $2 AND created_at < $3 GROUP BY run_id) AS sums"
            ),
            // Replicas' clocks are a little apart.
            vec![runs.to_vec().into(), (since - SLACK).into(), (app.clock.now() + SLACK).into()],
        ),
        _ => {
            let marks: Vec<String> = (1..=runs.len()).map(|at| format!("${at}")).collect();
            let of_runs = marks.join(", ");
            let values = runs.iter().map(|id| (*id).into()).collect();
            (format!("SELECT run_id, {sums} WHERE run_id IN ({of_runs}) GROUP BY run_id"), values)
        }
    };
    let statement = Statement::from_sql_and_values(db.get_database_backend(), sql, values);
    let rows = RunSum::find_by_statement(statement).all(db).await?;
    let sums = rows.into_iter().map(|row| {
        let usage = TokenUsage {
            input_tokens: row.input_tokens,
            cache_read_tokens: row.cache_read_tokens,
            cache_write_tokens: row.cache_write_tokens,
            output_tokens: row.output_tokens,
            reasoning_tokens: row.reasoning_tokens,
            cost_nano_usd: row.cost,
            estimated: row.estimated > 0,
        };
        (row.run_id, Sum { requests: row.requests, usage })
    });
    Ok(sums.collect())
}
