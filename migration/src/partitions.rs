//! Monthly partitions of the two tables that grow for ever, on PostgreSQL. SQLite has none.

use sea_orm_migration::prelude::*;
use sea_orm_migration::sea_orm::{ConnectionTrait, DbBackend};

/// The partitioned tables and the column whose month decides.
pub const PARTITIONED: [&str; 2] = ["run_items", "usage_records"];

/// Makes the partitions of this month (by the database's clock) and of the `ahead` months after it.
/// Those that exist stay as they are.
pub async fn ensure<C: ConnectionTrait>(db: &C, ahead: u32) -> Result<(), DbErr> {
    if db.get_database_backend() != DbBackend::Postgres {
        return Ok(());
    }
    for table in PARTITIONED {
        // The bounds are written with +00, so that the session's time zone can't move them.
        let sql = format!(
            r#"DO $$
            DECLARE
                first timestamp := date_trunc('month', now() AT TIME ZONE 'UTC');
                month timestamp;
            BEGIN
                FOR n IN 0..{ahead} LOOP
                    month := first + make_interval(months => n);
                    EXECUTE format(
                        'CREATE TABLE IF NOT EXISTS %I PARTITION OF {table} FOR VALUES FROM (%L) TO (%L)',
                        '{table}_' || to_char(month, 'YYYY_MM'),
                        to_char(month, 'YYYY-MM-DD') || ' 00:00:00+00',
                        to_char(month + make_interval(months => 1), 'YYYY-MM-DD') || ' 00:00:00+00'
                    );
                END LOOP;
            END $$"#
        );
        db.execute_unprepared(&sql).await?;
    }
    Ok(())
}
