//! The routes, top to bottom, and what every request passes.

use axum::extract::{DefaultBodyLimit, Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use http::{HeaderMap, HeaderValue, StatusCode};
use serde_json::json;
use tracing::Instrument;
use uuid::Uuid;

use crate::app::App;
use crate::error::Error;
use crate::viewer::{Viewer, credential};
use crate::{cluster, drain, graphql, metrics, runs, runtime, usage};

/// Identifies a request in answers and in the log.
#[derive(Clone, Debug)]
pub struct TraceId(pub String);

/// All routes for clients.
pub fn router(app: App) -> Router {
    Router::new()
        .merge(graphql::post::routes())
        .route("/v1/run", post(runs::rest::run))
        .route("/v1/usage", get(usage::rest::usage))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics::scrape))
        .fallback(not_found)
        .layer(DefaultBodyLimit::max(app.config.server.max_body_bytes))
        .layer(middleware::from_fn(drain::rest_of_body))
        .layer(middleware::from_fn(trace))
        .with_state(app)
}

/// The routes for workers apart and for operators, on a port of their own.
pub fn runtime_router(app: App) -> Router {
    Router::new()
        .nest("/runtime/v1", runtime::http::routes(&app))
        .nest("/operator/v1", cluster::http::routes(&app))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .fallback(not_found)
        .layer(middleware::from_fn(drain::rest_of_body))
        .layer(middleware::from_fn(trace))
        .with_state(app)
}

/// Gives the request its trace id: its W3C trace context's, or a new one.
async fn trace(mut request: Request, next: Next) -> Response {
    let id = traced(request.headers()).unwrap_or_else(|| Uuid::new_v4().simple().to_string());
    request.extensions_mut().insert(TraceId(id.clone()));
    // The path only: a query string may hold anything.
    let span = tracing::info_span!("request", method = %request.method(), path = request.uri().path(), trace_id = id);
    let mut response = next.run(request).instrument(span.clone()).await;
    tracing::debug!(parent: &span, status = response.status().as_u16(), "answered");
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert("x-trace-id", value);
    }
    response
}

/// The trace id of `traceparent`; see <https://www.w3.org/TR/trace-context/>.
fn traced(headers: &HeaderMap) -> Option<String> {
    let id = headers.get("traceparent")?.to_str().ok()?.split('-').nth(1)?;
    let is_valid = id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit()) && id.bytes().any(|b| b != b'0');
    is_valid.then(|| id.to_ascii_lowercase())
}

/// The process is alive.
async fn healthz() -> &'static str {
    "ok"
}

/// The process can do its work: the database answers, and its schema is up to date. Redis it can do without.
async fn readyz(State(app): State<App>) -> Response {
    let (status, database) = match app.db.pending_migrations().await {
        Ok(pending) if pending.is_empty() => (StatusCode::OK, "ok".to_owned()),
        Ok(_) => (StatusCode::SERVICE_UNAVAILABLE, "the schema is behind: run `cloister migrate`".to_owned()),
        Err(error) => {
            tracing::warn!(%error, "not ready");
            (StatusCode::SERVICE_UNAVAILABLE, "unreachable".to_owned())
        }
    };
    let status = if app.stopping.is_cancelled() { StatusCode::SERVICE_UNAVAILABLE } else { status };
    let detail = json!({
        "ready": status.is_success(),
        "database": database,
        "redis": app.bus.state().detail(),
        "stopping": app.stopping.is_cancelled(),
    });
    (status, Json(detail)).into_response()
}

async fn not_found() -> RestError {
    RestError::new(StatusCode::NOT_FOUND, "There is nothing here.")
}

/// An error of the REST routes: `{detail}`, as the seed has it.
pub struct RestError {
    status: StatusCode,
    detail: String,
    headers: HeaderMap,
}

impl RestError {
    /// An error with a status of its own.
    pub fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        Self { status, detail: detail.into(), headers: HeaderMap::new() }
    }
}

impl From<Error> for RestError {
    fn from(error: Error) -> Self {
        if let Some(inside) = error.inside() {
            tracing::error!(error = inside, "internal error");
        }
        let mut rest = Self::new(error.status(), error.to_string());
        if let Error::RateLimited(admission) = &error {
            admission.apply(&mut rest.headers);
        }
        rest
    }
}

impl IntoResponse for RestError {
    fn into_response(self) -> Response {
        (self.status, self.headers, Json(json!({ "detail": self.detail }))).into_response()
    }
}

/// Lets a caller of a REST route in: its key, then its rate. Returns the headers that every answer carries.
pub async fn admit(app: &App, headers: &HeaderMap) -> Result<(Viewer, HeaderMap), RestError> {
    let viewer = app.authenticate(credential(headers)).await?;
    let admission = app.admit(&viewer).await;
    if !admission.allowed {
        return Err(Error::RateLimited(admission).into());
    }
    let mut carried = HeaderMap::new();
    admission.apply(&mut carried);
    Ok((viewer, carried))
}
