//! The database's schema, one migration after another, for SQLite and PostgreSQL alike.
//!
//! A migration is frozen once it has landed; a change of the schema is a new one.

use sea_orm_migration::prelude::*;
pub use sea_orm_migration::prelude::{DbErr, MigratorTrait};

mod m20261124_000001_foundation;
pub mod partitions;

/// All migrations in their order.
pub struct Migrator;

#[async_trait::async_trait]
impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        vec![Box::new(m20261124_000001_foundation::Migration)]
    }
}
