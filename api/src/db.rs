//! The database: where connections come from, and the one way to open a transaction.

use std::fs::{File, OpenOptions};
use std::path::Path;
use std::time::Duration;

use log::LevelFilter;
use migration::{Migrator, MigratorTrait};
use sea_orm::sqlx::Connection;
use sea_orm::sqlx::sqlite::{SqliteConnection, SqliteJournalMode, SqliteSynchronous};
use sea_orm::{
    ConnectOptions, ConnectionTrait, Database, DatabaseConnection, DatabaseTransaction, DbBackend, DbErr,
    SqliteTransactionMode, Statement, TransactionOptions, TransactionTrait,
};

use crate::config::{Config, Synchronous};

/// The level of statements in the log (target `sqlx::query`), which has their text and never their values.
const STATEMENTS: LevelFilter = LevelFilter::Debug;

/// Connections for what gathers. One does: the others are for when it stands still.
const GATHERED: u32 = 3;

/// Pages of SQLite's log at which a commit itself moves them into the file, and waits for the disk: [`Db::tidy`] does so
/// long before, unless it can't keep up.
const LONG_LOG: &str = "8192";

/// Statements that a connection for gathered writes keeps prepared: a statement's text depends on how much it gathered.
const GATHERED_STATEMENTS: usize = 512;

/// Connections. On SQLite reading has a pool of its own beside the one writer. On PostgreSQL both are the same pool, and
/// what gathers has connections of its own, which keep its statements prepared.
#[derive(Clone, Debug)]
pub struct Db {
    read: DatabaseConnection,
    write: DatabaseConnection,
    gathered: DatabaseConnection,
}

impl Db {
    /// Connects; an SQLite file is made if it is missing.
    pub async fn connect(config: &Config) -> Result<Self, DbErr> {
        if let Some(path) = config.sqlite_path() {
            make_folder(path).map_err(DbErr::Custom)?;
            let write = Database::connect(sqlite_options(config, 1)).await?;
            let read = Database::connect(sqlite_options(config, config.database.max_connections)).await?;
            return Ok(Self { read, gathered: write.clone(), write });
        }
        let most = config.database.max_connections;
        if most <= 2 * GATHERED {
            let pool = Database::connect(postgres_options(config, most)).await?;
            return Ok(Self { read: pool.clone(), gathered: pool.clone(), write: pool });
        }
        let mut alone = postgres_options(config, GATHERED);
        alone.map_sqlx_postgres_opts(|postgres| postgres.statement_cache_capacity(GATHERED_STATEMENTS));
        let gathered = Database::connect(alone).await?;
        let pool = Database::connect(postgres_options(config, most - GATHERED)).await?;
        Ok(Self { read: pool.clone(), gathered, write: pool })
    }

    /// For reading: sees all that is committed.
    pub fn read(&self) -> &DatabaseConnection {
        &self.read
    }

    /// For single statements that write.
    pub fn write(&self) -> &DatabaseConnection {
        &self.write
    }

    /// Opens a transaction for writing. Dropped without `commit`, it never happened.
    pub async fn begin(&self) -> Result<DatabaseTransaction, DbErr> {
        begin(&self.write).await
    }

    /// As [`Db::begin`], for what gathers.
    pub async fn begin_gathered(&self) -> Result<DatabaseTransaction, DbErr> {
        begin(&self.gathered).await
    }

    /// Moves what is committed from SQLite's log into the file, beside the writer, which would otherwise do so in the
    /// middle of its work.
    pub async fn tidy(&self) -> Result<(), DbErr> {
        self.read.query_one_raw(Statement::from_string(DbBackend::Sqlite, "PRAGMA wal_checkpoint(PASSIVE)")).await?;
        Ok(())
    }

    /// Whether this is SQLite, and so the only process on this database.
    pub fn is_embedded(&self) -> bool {
        self.read.get_database_backend() == DbBackend::Sqlite
    }

    /// Names of the migrations that are yet to run.
    pub async fn pending_migrations(&self) -> Result<Vec<String>, DbErr> {
        let pending = Migrator::get_pending_migrations(&self.write).await?;
        Ok(pending.iter().map(|migration| migration.name().to_owned()).collect())
    }

    /// Brings the schema up to date.
    pub async fn migrate(&self) -> Result<(), DbErr> {
        Migrator::up(&self.write, None).await
    }
}

async fn begin(connection: &DatabaseConnection) -> Result<DatabaseTransaction, DbErr> {
    let sqlite_transaction_mode = Some(SqliteTransactionMode::Immediate);
    connection.begin_with_options(TransactionOptions { sqlite_transaction_mode, ..Default::default() }).await
}

/// Rows for a statement that bears rows that come twice: on PostgreSQL the last one is repeated, so that statements come
/// in few sizes and are soon all prepared.
pub fn padded<T: Clone>(db: &impl ConnectionTrait, mut rows: Vec<T>) -> Vec<T> {
    if let (DbBackend::Postgres, Some(last)) = (db.get_database_backend(), rows.last().cloned()) {
        // Each power of two, and one between it and the next.
        let most = rows.len().next_power_of_two();
        let size = if rows.len() <= most / 4 * 3 { most / 4 * 3 } else { most };
        rows.resize(size, last);
    }
    rows
}

/// `VALUES ($1, $2), ($3, $4), …`: as a table, its columns are `column1`, `column2`, … on both databases.
pub fn values_list(rows: usize, columns: usize) -> String {
    let row = |row: usize| {
        let parameters: Vec<String> = (1..=columns).map(|column| format!("${}", row * columns + column)).collect();
        format!("({})", parameters.join(", "))
    };
    format!("VALUES {}", (0..rows).map(row).collect::<Vec<_>>().join(", "))
}

/// The folder that a database file is to be in.
fn make_folder(path: &Path) -> Result<(), String> {
    let Some(folder) = path.parent() else { return Ok(()) };
    std::fs::create_dir_all(folder).map_err(|error| format!("can't make the folder {}: {error}", folder.display()))
}

fn postgres_options(config: &Config, connections: u32) -> ConnectOptions {
    let mut options = ConnectOptions::new(&config.database.url);
    options
        .max_connections(connections)
        .acquire_timeout(Duration::from_secs(10))
        // A connection that was just used is taken to stand: asking first would double every statement's way.
        .test_before_acquire_if_idle_for(Duration::from_secs(1))
        .set_application_name("cloister")
        .record_stmt_in_spans(false)
        .sqlx_logging_level(STATEMENTS);
    options
}

fn sqlite_options(config: &Config, connections: u32) -> ConnectOptions {
    let synchronous = match config.database.synchronous {
        Synchronous::Normal => SqliteSynchronous::Normal,
        Synchronous::Full => SqliteSynchronous::Full,
    };
    let mut options = ConnectOptions::new(&config.database.url);
    options
        .min_connections(1)
        .max_connections(connections)
        .acquire_timeout(Duration::from_secs(30))
        .record_stmt_in_spans(false)
        .sqlx_logging_level(STATEMENTS)
        .map_sqlx_sqlite_opts(move |sqlite| {
            sqlite
                .create_if_missing(true)
                .statement_cache_capacity(GATHERED_STATEMENTS)
                .journal_mode(SqliteJournalMode::Wal)
                .synchronous(synchronous)
                .pragma("wal_autocheckpoint", LONG_LOG)
                .foreign_keys(true)
                .busy_timeout(Duration::from_secs(10))
        })
        .map_sqlx_sqlite_before_acquire(|connection, _| Box::pin(async { Ok(is_between_transactions(connection)) }));
    options
}

/// Whether the driver has the connection outside of any transaction. A full disk makes SQLite roll back by itself; the
/// driver's own rollback then fails, and it takes what comes later for parts of a transaction that nobody will commit.
/// Such a connection is closed, and another opened in its place.
fn is_between_transactions(connection: &SqliteConnection) -> bool {
    !connection.is_in_transaction()
}

/// The exclusive right to serve an SQLite database, held as long as this value lives. A second
/// `serve` on the same file would void the first one's leases.
#[derive(Debug)]
pub struct ServeLock(#[allow(dead_code)] Option<File>);

impl ServeLock {
    /// Takes the lock beside the database file; PostgreSQL needs none.
    pub fn take(config: &Config) -> Result<Self, String> {
        let Some(path) = config.sqlite_path() else {
            return Ok(Self(None));
        };
        make_folder(path).map_err(|error| format!("database.url: {error}"))?;
        // A file of its own: closing any handle of the database's file would drop SQLite's locks.
        let mut name = path.as_os_str().to_owned();
        name.push(".lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&name)
            .map_err(|error| format!("database.url: can't open {}: {error}", name.display()))?;
        file.try_lock().map_err(|_| {
            format!("database.url: {} is already served by another process; stop that one first", path.display())
        })?;
        Ok(Self(Some(file)))
    }
}
