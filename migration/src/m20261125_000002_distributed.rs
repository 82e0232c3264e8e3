//! What many replicas and workers apart need: changes of authority that every replica finds by polling, and workers'
//! tokens.

use sea_orm_migration::prelude::*;
use sea_orm_migration::sea_orm::ConnectionTrait;

use crate::for_backend;

#[derive(DeriveMigrationName)]
pub struct Migration;

const STATEMENTS: &[&str] = &[
    // One row, raised with each change of authority. A replica that sees it risen asks which tenants have changed.
    "CREATE TABLE auth_epoch (
        id integer NOT NULL PRIMARY KEY,
        epoch bigint NOT NULL
    )",
    "INSERT INTO auth_epoch (id, epoch) VALUES (1, 0)",
    "ALTER TABLE tenants ADD COLUMN auth_epoch bigint NOT NULL DEFAULT 0",
    "CREATE INDEX tenants_auth_epoch ON tenants (auth_epoch)",
    "CREATE TABLE runtime_tokens (
        id uuid NOT NULL PRIMARY KEY,
        tenant_id uuid NOT NULL REFERENCES tenants (id),
        prefix text NOT NULL,
        token_hash text NOT NULL UNIQUE,
        expires_at timestamptz,
        revoked_at timestamptz,
        last_used_at timestamptz,
        created_at timestamptz NOT NULL
    )",
    "CREATE INDEX runtime_tokens_tenant ON runtime_tokens (tenant_id, id)",
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
