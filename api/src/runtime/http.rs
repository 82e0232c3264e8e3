//! The routes of `/runtime/v1`: who comes in, and how answers look.

use std::convert::Infallible;
use std::time::Duration;

use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, Path, Request, State};
use axum::middleware::{self, Next};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Extension, Json, Router};
use bytes::Bytes;
use cloister_runtime::ids;
use cloister_runtime::protocol::{
    Accepted, AppendRequest, Claims, DeltasRequest, Heartbeats, KEEP_ALIVE_MS, MAX_BODY_BYTES, ModelTurn, RefusalCode,
    ReleaseRequest, Standing, VERSION, VERSION_HEADER,
};
use cloister_runtime::spec::Lease;
use futures_util::{Stream, StreamExt};
use http::HeaderValue;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use super::refused::Refused;
use super::tokens::{self, Caller};
use crate::app::App;
use crate::door::Protocol;
use crate::metrics;
use crate::viewer::bearer;

const PROTOCOL: Protocol = Protocol { name: "runtime", peer: "worker", header: VERSION_HEADER, version: VERSION };

/// The routes, to be nested under `/runtime/v1`.
pub fn routes(app: &App) -> Router<App> {
    Router::new()
        .route("/claims", post(claims))
        .route("/heartbeats", post(heartbeats))
        .route("/runs/{id}/items", post(items))
        .route("/runs/{id}/deltas", post(deltas))
        .route("/runs/{id}/model", post(model))
        .route("/runs/{id}/release", post(release))
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .layer(middleware::from_fn_with_state(app.clone(), admit))
}

/// Lets a worker in that speaks our version and has a token, and notes what it is refused.
async fn admit(State(app): State<App>, mut request: Request, next: Next) -> Response {
    let path = request.uri().path().to_owned();
    let admitted = match PROTOCOL.check(request.headers()) {
        Ok(()) => tokens::verify(&app, bearer(request.headers())).await.map_err(Refused::from),
        Err(message) => Err(Refused::new(RefusalCode::ProtocolVersion, message)),
    };
    let (mut response, caller) = match admitted {
        Ok(caller) => {
            request.extensions_mut().insert(caller.clone());
            (next.run(request).await, Some(caller))
        }
        Err(refused) => (refused.into_response(), None),
    };
    if let Some(refused) = response.extensions().get::<Refused>() {
        note(refused, caller.as_ref(), &path);
    }
    response.headers_mut().insert(VERSION_HEADER, HeaderValue::from_static(VERSION));
    response
}

/// Counts a refusal, and logs the one of a worker that was let in. Who was not could fill the log.
fn note(refused: &Refused, caller: Option<&Caller>, path: &str) {
    metrics::runtime_refusal(refused.code);
    let (code, message) = (refused.code.name(), &refused.message);
    match caller {
        Some(caller) => {
            let run_id = path.split('/').find_map(|part| part.parse::<Uuid>().ok());
            let run_id = run_id.map(|id| tracing::field::display(ids::run_id(id)));
            let (token_id, tenant_id) = (caller.token_id, caller.tenant.id);
            tracing::warn!(%token_id, %tenant_id, run_id, code, reason = message, "a worker's request was refused");
        }
        None => tracing::debug!(code, message, "a worker was not let in"),
    }
}

type Body = Result<Bytes, BytesRejection>;

fn read<T: DeserializeOwned>(body: Body) -> Result<T, Refused> {
    let body = body.map_err(|rejection| match rejection {
        BytesRejection::FailedToBufferBody(failed) if failed.status() == http::StatusCode::PAYLOAD_TOO_LARGE => {
            Refused::new(RefusalCode::TooLarge, format!("A request may have {MAX_BODY_BYTES} bytes."))
        }
        other => Refused::invalid(other.body_text()),
    })?;
    serde_json::from_slice(&body).map_err(|error| Refused::invalid(format!("The body is malformed: {error}")))
}

/// The path's run is the lease's.
fn check_run(path: &str, lease: Lease) -> Result<(), Refused> {
    match path.parse() == Ok(lease.run_id) {
        true => Ok(()),
        false => Err(Refused::invalid("The lease is for another run than the path.")),
    }
}

async fn claims(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    body: Body,
) -> Result<Json<Claims>, Refused> {
    Ok(Json(super::claim(&app, caller, read(body)?).await?))
}

async fn heartbeats(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    body: Body,
) -> Result<Json<Heartbeats>, Refused> {
    Ok(Json(super::heartbeat(&app, &caller, read(body)?).await?))
}

async fn items(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Path(run): Path<String>,
    body: Body,
) -> Result<Json<Standing>, Refused> {
    let request: AppendRequest = read(body)?;
    check_run(&run, request.lease)?;
    Ok(Json(super::append(&app, &caller, request).await?))
}

async fn deltas(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Path(run): Path<String>,
    body: Body,
) -> Result<Json<Accepted>, Refused> {
    let request: DeltasRequest = read(body)?;
    check_run(&run, request.lease)?;
    super::deltas(&app, &caller, request).await?;
    Ok(Json(Accepted {}))
}

async fn model(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Path(run): Path<String>,
    body: Body,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Refused> {
    let turn: ModelTurn = read(body)?;
    check_run(&run, turn.lease)?;
    let messages = super::model(&app, &caller, turn).await?;
    // A message that can't be written is left out: the stream ends without one, which tells the worker as much.
    let events = messages.filter_map(|message| async { Event::default().json_data(message).ok().map(Ok) });
    Ok(Sse::new(events).keep_alive(KeepAlive::new().interval(Duration::from_millis(KEEP_ALIVE_MS))))
}

async fn release(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Path(run): Path<String>,
    body: Body,
) -> Result<Json<Accepted>, Refused> {
    let ReleaseRequest { lease } = read(body)?;
    check_run(&run, lease)?;
    super::release(&app, &caller, lease).await?;
    Ok(Json(Accepted {}))
}
