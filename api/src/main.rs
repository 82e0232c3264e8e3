//! The binary `cloister`.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use cloister_api::config::{Config, LogConfig, LogFormat};
use cloister_api::db::Db;
use cloister_api::serve::Server;
use cloister_api::{dev, graphql};
use tracing_subscriber::EnvFilter;

/// Many small and short-lived allocations on many threads: the system's allocator takes a sixth of a run's time for them.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Parser)]
#[command(name = "cloister", version, about = "The multi-tenant AI agent platform.")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve the API. The database's schema must be up to date.
    Serve,
    /// Bring the database's schema up to date.
    Migrate,
    /// Print the GraphQL schema.
    Schema,
    /// Serve on SQLite with a demo tenant, for trying things out.
    Dev,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments.command).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("cloister: {message}");
            ExitCode::FAILURE
        }
    }
}

async fn run(command: Command) -> Result<(), String> {
    // Fails only if one is installed already, which is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    match command {
        Command::Schema => {
            print!("{}", graphql::schema(&Config::default().graphql).sdl());
            Ok(())
        }
        Command::Migrate => {
            let config = load()?;
            let db = Db::connect(&config).await.map_err(|error| format!("database.url: {error}"))?;
            db.migrate().await.map_err(|error| format!("the migration failed: {error}"))?;
            tracing::info!("the schema is up to date");
            Ok(())
        }
        Command::Serve => {
            let server = Server::start(load()?).await?;
            if let Some(key) = &server.new_admin_key {
                // Not through the log: logs are kept, and this is shown once.
                eprintln!("The platform admin's key, shown this once: {key}");
            }
            tracing::info!(address = %server.address, runtime_address = %server.runtime_address, "listening");
            server.run().await
        }
        Command::Dev => {
            let config = dev::configure(load_unlogged()?)?;
            log(&config.log)?;
            dev::serve(config).await
        }
    }
}

fn load() -> Result<Config, String> {
    let config = load_unlogged()?;
    log(&config.log)?;
    Ok(config)
}

fn load_unlogged() -> Result<Config, String> {
    Config::load().map_err(|error| error.to_string())
}

/// Starts logging to standard output. The model client's own log is off: it holds tenants' content.
fn log(config: &LogConfig) -> Result<(), String> {
    let filter = format!("{},async_openai=off", config.filter);
    let filter = EnvFilter::try_new(filter).map_err(|error| format!("configuration: log.filter: {error}"))?;
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter);
    let installed = match config.format {
        LogFormat::Text => subscriber.with_target(false).try_init(),
        LogFormat::Json => subscriber.json().try_init(),
    };
    installed.map_err(|error| format!("logging could not start: {error}"))
}
