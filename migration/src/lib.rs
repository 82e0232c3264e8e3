//! The database's schema, one migration after another, for SQLite and PostgreSQL alike.
//!
//! A migration is frozen once it has landed; a change of the schema is a new one.

use sea_orm_migration::prelude::*;
pub use sea_orm_migration::prelude::{DbErr, MigratorTrait};
use sea_orm_migration::sea_orm::{ColumnTrait, ConnectionTrait, DbBackend, EntityTrait, QueryFilter};
use sea_orm_migration::seaql_migrations;

mod m20261124_000001_foundation;
mod m20261125_000002_distributed;
mod m20261126_000003_cluster;
mod m20261129_000004_agents;
pub mod partitions;

/// All migrations in their order.
pub struct Migrator;

#[async_trait::async_trait]
impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        vec![
            Box::new(m20261124_000001_foundation::Migration),
            Box::new(m20261125_000002_distributed::Migration),
            Box::new(m20261126_000003_cluster::Migration),
            Box::new(m20261129_000004_agents::Migration),
        ]
    }

    /// Those that ran, as far as this release knows them. One of a later release, under which this one goes on during an
    /// upgrade and after its rollback, is none of its business: migrations expand first, and contract a release later.
    #[expect(clippy::disallowed_methods, reason = "migrations are no tenant's")]
    async fn get_migration_models<C>(db: &C) -> Result<Vec<seaql_migrations::Model>, DbErr>
    where
        C: ConnectionTrait,
    {
        Self::install(db).await?;
        let known: Vec<String> = Self::migrations().iter().map(|migration| migration.name().to_owned()).collect();
        seaql_migrations::Entity::find().filter(seaql_migrations::Column::Version.is_in(known)).all(db).await
    }
}

/// A statement in PostgreSQL's words, as the database in use has it. SQLite takes the same statements without partitions. Its types are the names that sea-query gives
/// them there, since sqlx reads a column's type by its name.
fn for_backend(statement: &str, backend: DbBackend) -> String {
    if backend == DbBackend::Postgres {
        return statement.to_owned();
    }
    let statement = statement.split(" PARTITION BY").next().unwrap_or(statement);
    statement
        .replace(" uuid", " uuid_text")
        .replace(" timestamptz", " timestamp_with_timezone_text")
        .replace(" json", " json_text")
        .replace(" double precision", " double")
        .replace(" numeric", " real")
}
