//! The database's schema, one migration after another, for SQLite and PostgreSQL alike.
//!
//! A migration is frozen once it has landed; a change of the schema is a new one.

use sea_orm_migration::prelude::*;
pub use sea_orm_migration::prelude::{DbErr, MigratorTrait};
use sea_orm_migration::sea_orm::DbBackend;

mod m20261124_000001_foundation;
mod m20261125_000002_distributed;
mod m20261126_000003_cluster;
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
        ]
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
