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
                PERFORM set_config('lock_timeout', '2s', true);
                FOR n IN 0..{ahead} LOOP
                    month := first + make_interval(months => n);
                    IF to_regclass('{table}_' || to_char(month, 'YYYY_MM')) IS NULL THEN
                        BEGIN
                            EXECUTE format(
                                'CREATE TABLE %I PARTITION OF {table} FOR VALUES FROM (%L) TO (%L)',
                                '{table}_' || to_char(month, 'YYYY_MM'),
                                to_char(month, 'YYYY-MM-DD') || ' 00:00:00+00',
                                to_char(month + make_interval(months => 1), 'YYYY-MM-DD') || ' 00:00:00+00'
                            );
                        EXCEPTION
                            -- Another replica was faster.
                            WHEN duplicate_table THEN NULL;
                            -- Something reads the table for long, as a dump does; what waits for us would wait with us.
                            WHEN lock_not_available THEN RAISE WARNING 'a partition of {table} is made later';
                        END;
                    END IF;
                END LOOP;
            END $$"#
        );
        db.execute_unprepared(&sql).await?;
    }
    Ok(())
}

/// Drops the partitions of `table` for months that lie more than `months` before this one, by the database's clock; on
/// SQLite the rows whose `column` does, some thousands at a time. Both names are ours, never a caller's.
///
/// # Errors
/// The database's; among them that a partition was in use for 5 s, which is no fault: the next call tries again.
pub async fn drop_old<C: ConnectionTrait>(db: &C, table: &str, column: &str, months: u32) -> Result<(), DbErr> {
    if db.get_database_backend() == DbBackend::Postgres {
        let sql = format!(
            r#"DO $$
            DECLARE
                first text := to_char(
                    date_trunc('month', now() AT TIME ZONE 'UTC') - make_interval(months => {months}), 'YYYY_MM');
                partition text;
            BEGIN
                PERFORM set_config('lock_timeout', '5s', true);
                FOR partition IN
                    SELECT child.relname FROM pg_inherits
                    JOIN pg_class child ON child.oid = inhrelid
                    WHERE inhparent = '{table}'::regclass AND right(child.relname, 7) < first
                LOOP
                    EXECUTE format('DROP TABLE %I', partition);
                END LOOP;
            END $$"#
        );
        return db.execute_unprepared(&sql).await.map(drop);
    }
    let sql = format!(
        "DELETE FROM {table} WHERE rowid IN (SELECT rowid FROM {table} \
         WHERE {column} < strftime('%Y-%m-01 00:00:00', 'now', 'start of month', '-{months} months') LIMIT 5000)"
    );
    while db.execute_unprepared(&sql).await?.rows_affected() > 0 {}
    Ok(())
}
