//! The routes of `/operator/v1`: who comes in, and how answers look.

use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, Path, Query, Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use bytes::Bytes;
use crds::protocol::{self, Changes, Departure, RefusalCode, Token, VERSION, VERSION_HEADER};
use http::{HeaderValue, StatusCode};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::places::Place;
use super::refused::Refused;
use super::{changes, credential, farewell, report, tokens};
use crate::app::App;
use crate::door::Protocol;
use crate::metrics;
use crate::viewer::bearer;

/// Bytes of a request's body: an inventory of 50,000 objects.
const MAX_BODY_BYTES: usize = 16 * 1024 * 1024;

const PROTOCOL: Protocol = Protocol { name: "operator", peer: "operator", header: VERSION_HEADER, version: VERSION };

/// The routes, to be nested under `/operator/v1`.
pub fn routes(app: &App) -> Router<App> {
    Router::new()
        .route("/tenants/{cluster}/{name}", put(report_tenant).delete(farewell_tenant))
        .route("/tenants/{cluster}/{name}/tokens", post(mint_token))
        .route("/changes/{cluster}", get(wait_for_changes))
        .route("/clusters/{cluster}", put(take_inventory))
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .layer(middleware::from_fn_with_state(app.clone(), admit))
}

/// Lets an operator in that speaks our version and has a credential, and notes what it is refused.
async fn admit(State(app): State<App>, request: Request, next: Next) -> Response {
    let path = request.uri().path().to_owned();
    let admitted = match PROTOCOL.check(request.headers()) {
        Ok(()) => {
            // Every route names its cluster second.
            let cluster = path.split('/').nth(2).unwrap_or_default();
            credential::verify(&app, bearer(request.headers()), cluster).await
        }
        Err(message) => Err(Refused::new(RefusalCode::ProtocolVersion, message)),
    };
    let is_in = admitted.is_ok();
    let mut response = match admitted {
        Ok(()) => next.run(request).await,
        Err(refused) => refused.into_response(),
    };
    if let Some(refused) = response.extensions().get::<Refused>() {
        metrics::operator_refusal(refused.label());
        // Who was not let in could fill the log.
        match is_in {
            true => tracing::warn!(path, code = refused.label(), reason = refused.message, "an operator was refused"),
            false => tracing::debug!(code = refused.label(), reason = refused.message, "an operator was not let in"),
        }
    }
    response.headers_mut().insert(VERSION_HEADER, HeaderValue::from_static(VERSION));
    response
}

type Body = Result<Bytes, BytesRejection>;

fn read<T: DeserializeOwned>(body: Body) -> Result<T, Refused> {
    let body = body.map_err(|rejection| Refused::invalid(rejection.body_text()))?;
    serde_json::from_slice(&body).map_err(|error| Refused::invalid(format!("The body is malformed: {error}")))
}

async fn report_tenant(
    State(app): State<App>,
    Path((cluster, name)): Path<(String, String)>,
    body: Body,
) -> Result<Json<protocol::State>, Refused> {
    let place = Place::new(cluster, name)?;
    Ok(Json(report::report(&app, &place, read(body)?).await?))
}

async fn farewell_tenant(
    State(app): State<App>,
    Path((cluster, name)): Path<(String, String)>,
    body: Body,
) -> Result<Json<Departure>, Refused> {
    let place = Place::new(cluster, name)?;
    Ok(Json(farewell::farewell(&app, &place, read(body)?).await?))
}

async fn mint_token(
    State(app): State<App>,
    Path((cluster, name)): Path<(String, String)>,
    body: Body,
) -> Result<Json<Token>, Refused> {
    let place = Place::new(cluster, name)?;
    Ok(Json(tokens::mint(&app, &place, read(body)?).await?))
}

/// The query of `GET changes`.
#[derive(Deserialize)]
struct After {
    after: Option<String>,
}

async fn wait_for_changes(
    State(app): State<App>,
    Path(cluster): Path<String>,
    Query(After { after }): Query<After>,
) -> Result<Json<Changes>, Refused> {
    Ok(Json(changes::changes(&app, &cluster, after.as_deref()).await?))
}

async fn take_inventory(
    State(app): State<App>,
    Path(cluster): Path<String>,
    body: Body,
) -> Result<StatusCode, Refused> {
    farewell::inventory(&app, &cluster, read(body)?).await?;
    Ok(StatusCode::NO_CONTENT)
}
