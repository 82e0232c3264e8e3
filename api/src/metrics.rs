//! What the platform counts, for Prometheus. No label names a tenant, and nothing of theirs is in it.

use axum::extract::State;
use http::HeaderMap;
use metrics::{counter, describe_counter, describe_gauge, gauge};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};

use cloister_runtime::item::TokenUsage;
use cloister_runtime::protocol::RefusalCode;

use crate::app::App;
use crate::bus;
use crate::http::RestError;
use crate::viewer::credential;

/// What a model call came to.
#[derive(Clone, Copy, Debug)]
pub enum CallOutcome {
    /// It was charged.
    Settled,
    /// It was charged, and its tokens were counted by us.
    Estimated,
    /// The provider answered with an error status; nothing was charged.
    Refused,
    /// Its process died; it was settled by estimate.
    Orphaned,
}

impl CallOutcome {
    fn label(self) -> &'static str {
        match self {
            CallOutcome::Settled => "settled",
            CallOutcome::Estimated => "estimated",
            CallOutcome::Refused => "refused",
            CallOutcome::Orphaned => "orphaned",
        }
    }
}

/// Starts counting in this process. A second call shares the first one's counts.
pub fn install() -> PrometheusHandle {
    static HANDLE: std::sync::OnceLock<PrometheusHandle> = std::sync::OnceLock::new();
    let handle = HANDLE.get_or_init(|| {
        let recorder = PrometheusBuilder::new().build_recorder();
        let handle = recorder.handle();
        // Fails only if somebody else counts already; then these stay at zero.
        let _ = metrics::set_global_recorder(recorder);
        describe_counter!("cloister_model_calls_total", "Model calls by what they came to.");
        describe_counter!("cloister_tokens_total", "Tokens charged, by bucket.");
        describe_counter!("cloister_quota_excess_tokens_total", "Tokens charged beyond what their calls had reserved.");
        describe_counter!("cloister_runtime_refusals_total", "Requests of workers apart that were refused, by code.");
        describe_counter!("cloister_operator_refusals_total", "Requests of operators that were refused, by code.");
        describe_gauge!("cloister_runs_active", "Runs that this process executes.");
        describe_gauge!(
            "cloister_object_writes_owed",
            "Tenants whose object the cluster has not taken a write for yet."
        );
        describe_gauge!("cloister_redis_up", "1 while Redis is connected, 0 while it is away; absent without one.");
        handle
    });
    handle.clone()
}

/// Tells how many tenants' objects are still to be written.
pub fn object_writes_owed(count: u64) {
    gauge!("cloister_object_writes_owed").set(count as f64);
}

/// Counts a model call, and what it was charged if it was.
pub fn model_call(outcome: CallOutcome, usage: Option<&TokenUsage>) {
    counter!("cloister_model_calls_total", "outcome" => outcome.label()).increment(1);
    let Some(usage) = usage else { return };
    for (bucket, tokens) in [
        ("input", usage.input_tokens),
        ("cache_read", usage.cache_read_tokens),
        ("cache_write", usage.cache_write_tokens),
        ("output", usage.output_tokens),
    ] {
        counter!("cloister_tokens_total", "bucket" => bucket).increment(tokens.unsigned_abs());
    }
}

/// Counts tokens that were charged beyond a call's reservation.
pub fn quota_excess(tokens: i64) {
    counter!("cloister_quota_excess_tokens_total").increment(tokens.unsigned_abs());
}

/// Counts a request of a worker apart that was refused.
pub fn runtime_refusal(code: RefusalCode) {
    counter!("cloister_runtime_refusals_total", "code" => code.name()).increment(1);
}

/// Counts a request of an operator that was refused.
pub fn operator_refusal(code: &'static str) {
    counter!("cloister_operator_refusals_total", "code" => code).increment(1);
}

/// `GET /metrics`, for the platform admin's key: the platform's volume is nobody else's business.
pub async fn scrape(State(app): State<App>, headers: HeaderMap) -> Result<String, RestError> {
    app.authenticate(credential(&headers)).await?.require_admin()?;
    gauge!("cloister_runs_active").set(app.pool.active() as f64);
    match app.bus.state() {
        bus::State::Off => {}
        state => gauge!("cloister_redis_up").set(f64::from(u8::from(state == bus::State::Up))),
    }
    Ok(app.metrics.render())
}
