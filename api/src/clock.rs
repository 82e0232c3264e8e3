//! The one clock: the process's for SQLite, the database's for PostgreSQL, so that leases, expiries
//! and months are the same on every replica whatever its own clock says.

use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use chrono::{DateTime, Datelike, Days, NaiveTime, SubsecRound, TimeDelta, Utc};
use sea_orm::{ConnectionTrait, DatabaseConnection, DbBackend, DbErr, Statement};
use uuid::{ContextV7, Timestamp, Uuid};

/// Tells the time. Cheap to clone; clones share what they learned of the database's clock.
#[derive(Clone, Debug)]
pub struct Clock {
    /// Microseconds that the database is ahead of this process.
    ahead: Arc<AtomicI64>,
    ids: Arc<Mutex<ContextV7>>,
}

impl Default for Clock {
    fn default() -> Self {
        Self { ahead: Arc::default(), ids: Arc::new(Mutex::new(ContextV7::new())) }
    }
}

impl Clock {
    /// Now, to the microsecond (what both databases store).
    pub fn now(&self) -> DateTime<Utc> {
        (process_now() + TimeDelta::microseconds(self.ahead.load(Ordering::Relaxed))).trunc_subsecs(6)
    }

    /// A new UUIDv7 of now. Where the order of ids matters it must not be the process's own clock that decides it.
    pub fn new_id(&self) -> Uuid {
        let now = self.now();
        let seconds = u64::try_from(now.timestamp()).unwrap_or(0);
        let ids = self.ids.lock().unwrap_or_else(PoisonError::into_inner);
        Uuid::new_v7(Timestamp::from_unix(&*ids, seconds, now.timestamp_subsec_nanos()))
    }

    /// Compares with the database's clock. SQLite has none of its own.
    pub async fn follow(&self, db: &DatabaseConnection) -> Result<(), DbErr> {
        if db.get_database_backend() != DbBackend::Postgres {
            return Ok(());
        }
        let before = process_now();
        let row = db
            .query_one_raw(Statement::from_string(DbBackend::Postgres, "SELECT clock_timestamp() AS now"))
            .await?
            .ok_or_else(|| DbErr::RecordNotFound("the database's clock".to_owned()))?;
        let database: DateTime<Utc> = row.try_get("", "now")?;
        let after = process_now();
        let ahead = database - (before + (after - before) / 2);
        self.ahead.store(ahead.num_microseconds().unwrap_or(0), Ordering::Relaxed);
        Ok(())
    }
}

#[allow(clippy::disallowed_methods)] // the one place
fn process_now() -> DateTime<Utc> {
    Utc::now()
}

/// `YYYY-MM`, UTC: the period of quotas and invoices.
pub fn month_of(time: DateTime<Utc>) -> String {
    time.format("%Y-%m").to_string()
}

/// Midnight of the month's first day, UTC.
pub fn start_of_month(time: DateTime<Utc>) -> DateTime<Utc> {
    let midnight = time.date_naive().and_time(NaiveTime::MIN).and_utc();
    midnight - Days::new(u64::from(time.day0()))
}

/// `YYYY-MM-DD`, UTC.
pub fn day_of(time: DateTime<Utc>) -> String {
    time.format("%Y-%m-%d").to_string()
}
