//! The operator's own address: whether it lives, whether it can work, and what it counts.

use std::fmt::Write;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};

use axum::Router;
use axum::extract::State;
use axum::routing::get;
use crds::status::Phase;
use http::StatusCode;
use metrics::{describe_counter, describe_gauge, describe_histogram, gauge};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};

use crate::operator::Operator;

/// What the operator is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Stage {
    /// It waits for the Kubernetes API or the resource's definition.
    Starting,
    /// Another one leads.
    Standby,
    /// It leads, and lists what is there.
    Listing,
    /// It leads.
    Leading,
}

/// What is told about the operator.
pub struct Health {
    stage: AtomicU8,
    operator: OnceLock<Arc<Operator>>,
    metrics: PrometheusHandle,
}

impl Health {
    /// Begins to count.
    pub fn new() -> Arc<Self> {
        Arc::new(Self { stage: AtomicU8::new(Stage::Starting as u8), operator: OnceLock::new(), metrics: install() })
    }

    /// Tells what the operator is doing now.
    pub fn is(&self, stage: Stage) {
        self.stage.store(stage as u8, Ordering::Relaxed);
        gauge!("cloister_operator_leader").set(f64::from(u8::from(stage as u8 >= Stage::Listing as u8)));
    }

    /// Whose tenants are counted.
    pub fn leads(&self, operator: Arc<Operator>) {
        // It leads once.
        let _ = self.operator.set(operator);
    }

    /// The routes.
    pub fn router(self: Arc<Self>) -> Router {
        Router::new()
            .route("/healthz", get(|| async { "ok" }))
            .route("/readyz", get(readyz))
            .route("/metrics", get(scrape))
            .with_state(self)
    }
}

/// It leads, or stands by for that. Whether the platform's api answers is no matter: a second operator would not do better.
async fn readyz(State(health): State<Arc<Health>>) -> (StatusCode, &'static str) {
    let stage = health.stage.load(Ordering::Relaxed);
    match stage {
        _ if stage == Stage::Starting as u8 => (StatusCode::SERVICE_UNAVAILABLE, "starting"),
        _ if stage == Stage::Listing as u8 => (StatusCode::SERVICE_UNAVAILABLE, "listing what is there"),
        _ => (StatusCode::OK, "ok"),
    }
}

async fn scrape(State(health): State<Arc<Health>>) -> String {
    let Some(operator) = health.operator.get() else { return health.metrics.render() };
    let tenants = operator.cluster.tenants.state();
    for phase in Phase::ALL {
        let of = |status: &crds::TenantStatus| status.phase == phase;
        let count = tenants.iter().filter(|tenant| tenant.status.as_ref().map_or(phase == Phase::Pending, of)).count();
        gauge!("cloister_operator_tenants", "phase" => phase.as_str()).set(count as f64);
    }
    gauge!("cloister_operator_retries_pending").set(operator.memory.failing() as f64);
    gauge!("cloister_operator_orphan_namespaces").set(operator.cluster.orphans().len() as f64);
    let mut text = health.metrics.render();
    usage(&mut text, operator);
    text
}

/// Live usage, written by hand: a tenant that goes takes its series along.
fn usage(text: &mut String, operator: &Operator) {
    let mut usage = operator.memory.usage();
    usage.sort();
    for (name, help, is_limit) in [
        ("cloister_operator_tenant_tokens", "Tokens that a tenant used this month.", false),
        ("cloister_operator_tenant_token_limit", "Tokens that a tenant may use a month.", true),
    ] {
        // Writing to a string can't fail.
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} gauge");
        for (tenant, tokens, limit) in &usage {
            let value = if is_limit { limit } else { tokens };
            let _ = writeln!(text, "{name}{{tenant=\"{tenant}\"}} {value}");
        }
    }
}

fn install() -> PrometheusHandle {
    let recorder = PrometheusBuilder::new().build_recorder();
    let handle = recorder.handle();
    // Fails only if somebody else counts already; then these stay at zero.
    let _ = metrics::set_global_recorder(recorder);
    describe_counter!("cloister_operator_reconciles_total", "Looks at tenants by outcome.");
    describe_counter!("cloister_operator_reconcile_errors_total", "Looks at tenants that failed, by reason.");
    describe_histogram!("cloister_operator_reconcile_duration_seconds", "How long a look at a tenant took.");
    describe_gauge!("cloister_operator_reconciles_in_flight", "Tenants that are looked at now.");
    describe_gauge!("cloister_operator_retries_pending", "Tenants whose last look failed.");
    describe_gauge!("cloister_operator_tenants", "Tenants by phase.");
    describe_gauge!("cloister_operator_orphan_namespaces", "Namespaces with our label that belong to no Tenant.");
    describe_gauge!("cloister_operator_leader", "Whether this replica leads.");
    describe_gauge!("cloister_operator_api_up", "Whether the platform's api answered last.");
    describe_counter!("cloister_operator_api_requests_total", "Requests to the platform's api.");
    describe_counter!("cloister_operator_writes_total", "Writes to the Kubernetes API by verb and kind.");
    describe_counter!("cloister_operator_watch_errors_total", "Watches that were interrupted, by kind.");
    handle
}
