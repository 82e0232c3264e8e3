//! `cloister serve`: from the configuration to a server that stops in good order.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::serve::ListenerExt;
use cloister_runtime::signals::asked_to_stop;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::app::App;
use crate::cluster::owed;
use crate::config::Config;
use crate::db::{Db, ServeLock};
use crate::error::Error;
use crate::keys::authority;
use crate::runs::{announce, approvals, live, paused, pool, queue};
use crate::tenants::changes;
use crate::usage::ledger;
use crate::{bus, http, keys, models, retention, tenants};

/// How long work that is done again and again may take, at least.
const LEAST_PATIENCE: Duration = Duration::from_secs(10);

/// A server that is up.
pub struct Server {
    /// The application.
    pub app: App,
    /// Where it listens for clients.
    pub address: SocketAddr,
    /// Where it listens for workers apart.
    pub runtime_address: SocketAddr,
    /// The platform admin's key, if it was made just now.
    pub new_admin_key: Option<String>,
    listener: TcpListener,
    runtime_listener: TcpListener,
    _lock: ServeLock,
}

impl Server {
    /// Connects, checks the schema, takes over what a server before this one left behind, and listens.
    pub async fn start(config: Config) -> Result<Self, String> {
        let lock = ServeLock::take(&config)?;
        let database = |error: &dyn std::fmt::Display| format!("database.url: {error}");
        let db = Db::connect(&config).await.map_err(|error| database(&error))?;
        let pending = db.pending_migrations().await.map_err(|error| database(&error))?;
        if !pending.is_empty() {
            return Err(format!(
                "The database's schema is behind by {}: run `cloister migrate` first.",
                pending.join(", ")
            ));
        }
        // Before the rest: a start that can't listen must leave nothing behind. Who connects already waits.
        let (listener, address) = listen("server.listen", config.server.listen).await?;
        let (runtime_listener, runtime_address) = listen("server.runtime_listen", config.server.runtime_listen).await?;
        let (app, new_admin_key) = App::new(config, db).await.map_err(inside)?;
        if app.db.is_embedded() {
            take_over(&app).await.map_err(inside)?;
        }
        Ok(Self { app, address, runtime_address, new_admin_key, listener, runtime_listener, _lock: lock })
    }

    /// Serves until SIGTERM or SIGINT; then finishes what is in flight, hands runs back, and returns.
    pub async fn run(self) -> Result<(), String> {
        let app = self.app;
        // The first count in a process builds the tokenizer's tables; that must not wait for a caller.
        tokio::task::spawn_blocking(|| models::tokens::count_text(""));
        let failed = supervise(&app, background(&app));
        let stopping = app.stopping.clone();
        tokio::spawn(async move {
            asked_to_stop().await;
            tracing::info!("stopping: finishing what is in flight");
            stopping.cancel();
        });
        let grace = Duration::from_secs(app.config.server.shutdown_seconds);
        let serving = async {
            let clients = accept(self.listener, http::router(app.clone()), &app);
            let workers = accept(self.runtime_listener, http::runtime_router(app.clone()), &app);
            tokio::try_join!(clients, workers).map(|_| ())
        };
        let drained = async {
            app.stopping.cancelled().await;
            app.tasks.close();
            // Runs end at their turn's end; calls that nobody waits for are drained.
            if tokio::time::timeout(grace, app.tasks.wait()).await.is_err() {
                tracing::warn!("handing back what is still running");
                pool::hand_back_all(&app).await;
            }
        };
        let serving = async {
            let until = async {
                app.stopping.cancelled().await;
                tokio::time::sleep(grace).await;
            };
            tokio::select! {
                result = serving => result.map_err(|error| format!("the server failed: {error}")),
                () = until => Ok(()),
            }
        };
        let ((), served) = tokio::join!(drained, serving);
        app.bus.flush().await;
        if let Err(error) = keys::write_last_used(&app).await {
            tracing::warn!(inside = ?error, "last uses of keys were not written");
        }
        tracing::info!("stopped");
        match failed.load(Ordering::SeqCst) {
            true => Err("a background task failed; see the log".to_owned()),
            false => served,
        }
    }
}

async fn listen(field: &str, at: SocketAddr) -> Result<(TcpListener, SocketAddr), String> {
    let refused = |error: std::io::Error| format!("{field} {at}: {error}");
    let listener = TcpListener::bind(at).await.map_err(refused)?;
    let address = listener.local_addr().map_err(refused)?;
    Ok((listener, address))
}

/// Answers until the server is to stop, and what is in flight then.
async fn accept(listener: TcpListener, router: Router, app: &App) -> std::io::Result<()> {
    let listener = listener.tap_io(|connection| {
        if let Err(error) = connection.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY was not set");
        }
    });
    axum::serve(listener, router).with_graceful_shutdown(app.stopping.clone().cancelled_owned()).await
}

fn inside(error: Error) -> String {
    error.inside().map_or_else(|| error.to_string(), str::to_owned)
}

/// Nobody else serves an embedded database: its leases and reservations were the last server's.
async fn take_over(app: &App) -> Result<(), Error> {
    let tx = app.db.begin().await?;
    let waiting = queue::take_back(&tx, queue::Whose::Everyone, app.clock.now()).await?;
    tx.commit().await?;
    if !waiting.is_empty() {
        tracing::info!(runs = waiting.len(), "taking up runs that the last server left unfinished");
    }
    ledger::sweep(app, true).await
}

/// Stops the server when a background task fails: without claims or leases it would only seem to be well. Tells
/// whether one did.
fn supervise(app: &App, mut tasks: JoinSet<()>) -> Arc<AtomicBool> {
    let failed = Arc::new(AtomicBool::new(false));
    let (flag, stopping) = (failed.clone(), app.stopping.clone());
    tokio::spawn(async move {
        while let Some(ended) = tasks.join_next().await {
            if let Err(error) = ended {
                tracing::error!(%error, "a background task failed; stopping");
                flag.store(true, Ordering::SeqCst);
                stopping.cancel();
            }
        }
    });
    failed
}

/// What is done beside answering requests.
fn background(app: &App) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    // Tracked besides: a claim that is under way when the process is to stop is handed back.
    tasks.spawn(app.tasks.track_future(pool::work(app.clone())));
    tasks.spawn(bus::link::keep(app.clone()));
    tasks.spawn(authority::watch(app.clone()));
    tasks.spawn(owed::keep(app.clone()));
    if app.db.is_embedded() {
        every(&mut tasks, app, Duration::from_millis(250), "moving SQLite's log into its file", |app| async move {
            Ok(app.db.tidy().await?)
        });
    } else {
        tasks.spawn(changes::poll(app.clone()));
        every(&mut tasks, app, Duration::from_secs(1), "following other replicas' runs", |app| async move {
            live::follow_journals(&app).await
        });
    }
    let plans = app.clone();
    tasks.spawn(async move {
        // The configuration may allow more than before.
        if let Err(error) = paused::reconsider(plans.db.write(), paused::Whose::All).await {
            tracing::warn!(inside = ?error, "paused runs were not looked at again; the next start does so");
        }
    });
    let deletions = app.clone();
    tasks.spawn(async move {
        if let Err(error) = tenants::finish_deletions(&deletions).await {
            tracing::warn!(inside = ?error, "a tenant's deletion was not finished; the next start tries again");
        }
    });
    let lease = Duration::from_secs(app.config.runs.lease_seconds);
    every(&mut tasks, app, lease / 3, "renewing leases", |app| async move { pool::renew_leases(&app).await });
    every(&mut tasks, app, lease / 6, "sweeping orphans", |app| async move { sweep(&app).await });
    every(&mut tasks, app, Duration::from_secs(5), "writing last uses of keys", |app| async move {
        keys::write_last_used(&app).await
    });
    every(&mut tasks, app, Duration::from_secs(30), "following the database's clock", |app| async move {
        Ok(app.clock.follow(app.db.read()).await?)
    });
    every(&mut tasks, app, Duration::from_secs(6 * 3_600), "keeping partitions", |app| async move {
        retention::keep(&app).await
    });
    tasks
}

/// Takes back the runs whose workers are gone, and settles the calls whose process is.
async fn sweep(app: &App) -> Result<(), Error> {
    let tx = app.db.begin().await?;
    let mut waiting = queue::take_back(&tx, queue::Whose::Lapsed, app.clock.now()).await?;
    waiting.extend(queue::take_back(&tx, queue::Whose::Inactive, app.clock.now()).await?);
    tx.commit().await?;
    if !waiting.is_empty() {
        announce(app, &waiting);
    }
    queue::gather(app).await?;
    approvals::expire(app).await?;
    paused::resume_due(app).await?;
    ledger::sweep(app, false).await
}

fn every<F, Fut>(tasks: &mut JoinSet<()>, app: &App, pause: Duration, what: &'static str, work: F)
where
    F: Fn(App) -> Fut + Send + 'static,
    Fut: Future<Output = Result<(), Error>> + Send,
{
    let app = app.clone();
    tasks.spawn(async move {
        let mut ticks = tokio::time::interval(pause);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            // A connection that swallows what is sent must not end it for good.
            match tokio::time::timeout(Ord::max(pause, LEAST_PATIENCE), work(app.clone())).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(inside = ?error, "{what} failed; trying again"),
                Err(_) => tracing::warn!("{what} took too long; trying again"),
            }
        }
    });
}
