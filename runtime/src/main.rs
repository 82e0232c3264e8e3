//! The binary `cloister-runtime`: a worker for one tenant's runs, apart from the api and its database.

mod health;
mod remote;
mod settings;
mod worker;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use cloister_runtime::mcp::McpClient;
use cloister_runtime::protocol::is_worker_name;
use cloister_runtime::signals::asked_to_stop;
use cloister_runtime::webhook::{AddressPolicy, WebhookClient};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

use crate::remote::{Api, Token};
use crate::settings::{LogFormat, Settings};
use crate::worker::Worker;

/// Executes the runs of a tenant whose runs are not the api's own to execute. Configured by CLOISTER_RUNTIME__ variables.
#[derive(Parser)]
#[command(name = "cloister-runtime", version)]
struct Arguments {}

fn main() -> ExitCode {
    Arguments::parse();
    // A worker waits, for models and tools: two threads are plenty, and each one has a heap of its own.
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).max_blocking_threads(8).enable_all().build();
    let ended = runtime.map_err(|error| error.to_string()).and_then(|runtime| runtime.block_on(run()));
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("cloister-runtime: {message}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> Result<(), String> {
    // Fails only if one is installed already, which is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let settings = Settings::from_env(std::env::vars().collect())?;
    log(&settings)?;
    let api = Arc::new(Api::new(&settings.api_url, Token::read(&settings.token_file).await?)?);
    let (allowed_hosts, allowed_nets) = (settings.allowed_hosts.clone(), settings.allowed_nets.clone());
    let policy = AddressPolicy { allowed_hosts, allowed_nets };
    let mcp = McpClient::new(policy.clone()).map_err(|error| format!("no HTTP client: {error}"))?;
    let webhooks = WebhookClient::new(policy).map_err(|error| format!("no HTTP client: {error}"))?;
    let stopping = CancellationToken::new();
    let name = settings.name.clone().or_else(host_name);
    let worker = Arc::new(Worker::new(api.clone(), webhooks, mcp, name, settings.concurrency, stopping.clone()));

    let listen = settings.listen;
    let refused = |error: std::io::Error| format!("CLOISTER_RUNTIME__LISTEN {listen}: {error}");
    let listener = TcpListener::bind(listen).await.map_err(refused)?;
    let address = listener.local_addr().map_err(refused)?;
    let mut health = tokio::spawn(axum::serve(listener, health::router(worker.clone())).into_future());
    let mut claiming = tokio::spawn({
        let worker = worker.clone();
        async move { worker.claim().await }
    });
    let mut leases = tokio::spawn({
        let worker = worker.clone();
        async move { worker.keep_leases().await }
    });
    let token = tokio::spawn({
        let api = api.clone();
        async move { api.token().follow().await }
    });
    tracing::info!(%address, api = %settings.api_url, concurrency = settings.concurrency, "listening");

    let grace = Duration::from_secs(settings.shutdown_seconds);
    let ended = tokio::select! {
        () = asked_to_stop() => {
            tracing::info!("stopping: finishing turns in progress");
            stopping.cancel();
            worker.finish(grace).await;
            Ok(())
        }
        reason = api.incompatible() => {
            // Nothing that it holds can be given back either.
            stopping.cancel();
            Err(reason.to_owned())
        }
        _ = &mut health => Err("the listener for health and metrics failed".to_owned()),
        _ = &mut claiming => Err("the task that claims failed".to_owned()),
        _ = &mut leases => Err("the task that keeps leases failed".to_owned()),
    };
    token.abort();
    match &ended {
        Ok(()) => tracing::info!("stopped"),
        Err(reason) => tracing::error!(%reason, "stopping"),
    }
    ended
}

/// In a pod it is the pod's name.
fn host_name() -> Option<String> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").ok()?;
    Some(name.trim().to_owned()).filter(|name| is_worker_name(name))
}

/// Starts logging to standard output.
fn log(settings: &Settings) -> Result<(), String> {
    let filter = EnvFilter::try_new(&settings.log_filter)
        .map_err(|error| format!("configuration: CLOISTER_RUNTIME__LOG_FILTER: {error}"))?;
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter);
    let installed = match settings.log_format {
        LogFormat::Text => subscriber.with_target(false).try_init(),
        LogFormat::Json => subscriber.json().try_init(),
    };
    installed.map_err(|error| format!("logging could not start: {error}"))
}
