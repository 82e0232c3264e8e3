//! What a platform with a cluster needs: which object rules a tenant, what is to be written to objects yet, why a
//! tenant is suspended, which rotation a worker's token is of, and which worker has a run.

use sea_orm_migration::prelude::*;
use sea_orm_migration::sea_orm::ConnectionTrait;

use crate::for_backend;

#[derive(DeriveMigrationName)]
pub struct Migration;

const STATEMENTS: &[&str] = &[
    "ALTER TABLE tenants ADD COLUMN suspended_by_object boolean NOT NULL DEFAULT false",
    "ALTER TABLE tenants ADD COLUMN suspended_by_admin boolean NOT NULL DEFAULT false",
    "ALTER TABLE tenants ADD COLUMN suspended_by_billing boolean NOT NULL DEFAULT false",
    "ALTER TABLE tenants ADD COLUMN suspended_by_absence boolean NOT NULL DEFAULT false",
    "ALTER TABLE tenants ADD COLUMN is_leaving boolean NOT NULL DEFAULT false",
    // Until now only the admin could.
    "UPDATE tenants SET suspended_by_admin = true WHERE status = 'suspended'",
    "CREATE TABLE cluster_tenants (
        cluster text NOT NULL,
        name text NOT NULL,
        tenant_id uuid NOT NULL REFERENCES tenants (id),
        object_uid text,
        generation bigint NOT NULL,
        registration json,
        provisioning json,
        created_at timestamptz NOT NULL,
        changed_at timestamptz NOT NULL,
        last_seen_at timestamptz,
        released_at timestamptz,
        PRIMARY KEY (cluster, name)
    )",
    "CREATE UNIQUE INDEX cluster_tenants_live ON cluster_tenants (tenant_id) WHERE released_at IS NULL",
    "CREATE INDEX cluster_tenants_tenant ON cluster_tenants (tenant_id)",
    "CREATE TABLE object_writes (
        tenant_id uuid NOT NULL PRIMARY KEY REFERENCES tenants (id),
        wish text NOT NULL,
        number bigint NOT NULL,
        attempts integer NOT NULL,
        due_at timestamptz NOT NULL,
        claimed_until timestamptz,
        problem text,
        created_at timestamptz NOT NULL
    )",
    "CREATE INDEX object_writes_due ON object_writes (due_at)",
    "ALTER TABLE runtime_tokens ADD COLUMN rotation bigint",
    "ALTER TABLE runs ADD COLUMN worker text",
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
