//! The binary `cloister-operator`: makes of each `Tenant` object a tenant of the platform, and for the enterprise plan a
//! namespace with a runtime of its own.

mod api;
mod build;
mod clock;
mod cluster;
mod error;
mod health;
mod leader;
mod memory;
mod operator;
mod quantity;
mod reconcile;
mod release;
mod rollout;
mod run;
mod scaling;
mod settings;
mod wanted;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use kube::Client;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

use crate::settings::{LogFormat, Settings};

/// Makes of each Tenant object a tenant of the platform. Configured by CLOISTER_OPERATOR__ variables.
#[derive(Parser)]
#[command(name = "cloister-operator", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Looks after the cluster's Tenants.
    Run,
    /// Lets every Tenant go, before the operator is uninstalled. Namespaces stay.
    Release,
    /// Prints the definition of the Tenant resource.
    Crd,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let ended = match arguments.command {
        Command::Crd => crds::definition::definition_yaml().map(|yaml| print!("{yaml}")),
        command => tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .map_err(|error| error.to_string())
            .and_then(|runtime| runtime.block_on(connected(command))),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("cloister-operator: {message}");
            ExitCode::FAILURE
        }
    }
}

async fn connected(command: Command) -> Result<(), String> {
    // Fails only if one is installed already, which is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let settings = Settings::from_env(std::env::vars().collect())?;
    log(&settings)?;
    let client = Client::try_default().await.map_err(|error| format!("no way to the Kubernetes API: {error}"))?;
    let ended = match command {
        Command::Release => release::release(&client, &settings).await,
        _ => run::run(client, settings, asked_to_stop()?).await,
    };
    if let Err(reason) = &ended {
        tracing::error!(%reason, "stopping");
    }
    ended
}

/// Cancelled by SIGTERM or SIGINT.
fn asked_to_stop() -> Result<CancellationToken, String> {
    let told = |kind| signal(kind).map_err(|error| format!("signals can't be received: {error}"));
    let (mut terminate, mut interrupt) = (told(SignalKind::terminate())?, told(SignalKind::interrupt())?);
    let stopping = CancellationToken::new();
    let told = stopping.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping: finishing looks that are under way");
        told.cancel();
    });
    Ok(stopping)
}

/// Starts logging to standard output.
fn log(settings: &Settings) -> Result<(), String> {
    let filter = EnvFilter::try_new(&settings.log_filter)
        .map_err(|error| format!("configuration: CLOISTER_OPERATOR__LOG_FILTER: {error}"))?;
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter);
    let installed = match settings.log_format {
        LogFormat::Text => subscriber.with_target(false).try_init(),
        LogFormat::Json => subscriber.json().try_init(),
    };
    installed.map_err(|error| format!("logging could not start: {error}"))
}
