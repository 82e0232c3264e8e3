//! What the whole agent loop needs: nested runs inside a run, values as outputs, approvals that expire, and a limit on
//! the history that a run is shown.

use sea_orm_migration::prelude::*;
use sea_orm_migration::sea_orm::ConnectionTrait;

use crate::for_backend;

#[derive(DeriveMigrationName)]
pub struct Migration;

const STATEMENTS: &[&str] = &[
    "ALTER TABLE run_items ADD COLUMN scope text",
    "ALTER TABLE runs ADD COLUMN output_json json",
    "ALTER TABLE runs ADD COLUMN waits_until timestamptz",
    "ALTER TABLE runs ADD COLUMN paused_at timestamptz",
    "ALTER TABLE runs ADD COLUMN history_limit integer",
    "CREATE INDEX runs_waiting ON runs (waits_until) WHERE waits_until IS NOT NULL",
    "CREATE INDEX runs_paused ON runs (paused_at) WHERE paused_at IS NOT NULL",
];

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let db = manager.get_connection();
        for statement in STATEMENTS {
            db.execute_unprepared(&for_backend(statement, db.get_database_backend())).await?;
        }
        Ok(())
    }
}
