//! The worker's own address: whether it lives, whether it can work, and what it counts.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::routing::get;
use http::StatusCode;
use metrics::{describe_counter, describe_gauge, gauge};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};

use crate::worker::Worker;

#[derive(Clone)]
struct Health {
    worker: Arc<Worker>,
    metrics: PrometheusHandle,
}

/// The routes. Begins to count.
pub fn router(worker: Arc<Worker>) -> Router {
    Router::new()
        .route("/healthz", get(|| async { "ok" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(scrape))
        .with_state(Health { worker, metrics: install() })
}

fn install() -> PrometheusHandle {
    let recorder = PrometheusBuilder::new().build_recorder();
    let handle = recorder.handle();
    // Fails only if somebody else counts already; then these stay at zero.
    let _ = metrics::set_global_recorder(recorder);
    describe_counter!("cloister_runtime_claims_total", "Runs that were claimed.");
    describe_counter!("cloister_runtime_runs_total", "Claimed runs by how this worker's part in them ended.");
    describe_counter!("cloister_runtime_api_errors_total", "Claims and heartbeats that the api did not answer.");
    describe_gauge!("cloister_runtime_runs_active", "Runs executed now.");
    handle
}

/// The api answers, and the worker isn't stopping.
async fn readyz(State(health): State<Health>) -> (StatusCode, &'static str) {
    match health.worker.is_ready() {
        true => (StatusCode::OK, "ok"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "the api does not answer, or the worker is stopping"),
    }
}

async fn scrape(State(health): State<Health>) -> String {
    gauge!("cloister_runtime_runs_active").set(health.worker.active() as f64);
    health.metrics.render()
}
