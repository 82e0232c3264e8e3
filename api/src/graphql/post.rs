//! GraphQL over HTTP, and the routes of this module.
//! Source: <https://graphql.github.io/graphql-over-http/draft/>.
//!
//! A request is authenticated, then counted against the rate, and only then read. Only `application/json` is
//! taken, which no page of another origin can send without asking first (CSRF), and only by POST.

use std::time::Duration;

use axum::extract::ws::WebSocketUpgrade;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::{FromRequest, Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get};
use axum::{Extension, Router};
use bytes::Bytes;
use futures_util::StreamExt;
use http::{HeaderMap, HeaderValue, StatusCode, header};

use super::accept::Accept;
use super::limits::{Delivery, Refused};
use super::operation::{ExecutionResult, Parameters, Session, execute, json};
use super::{graphiql, sse, ws};
use crate::app::App;
use crate::error::Error;
use crate::http::TraceId;
use crate::viewer::credential;

/// Where the API is, for every transport.
pub const ENDPOINT: &str = "/graphql";

/// `/graphql` by POST and WebSocket, and `/graphiql`.
pub fn routes() -> Router<App> {
    let endpoint = MethodRouter::new().post(post_graphql).get(get_graphql).fallback(method_not_allowed);
    Router::new().route(ENDPOINT, endpoint).route("/graphiql", get(graphiql::page))
}

async fn post_graphql(State(app): State<App>, Extension(trace): Extension<TraceId>, request: Request) -> Response {
    let mut headers = HeaderMap::new();
    let accept = Accept::negotiate(request.headers());
    let mut response = match answer(app, &trace, accept, request, &mut headers).await {
        Ok(response) => response,
        Err(error) => refusal(&error, &trace, accept),
    };
    response.headers_mut().extend(headers);
    response
}

/// The answer. `headers` is for what every answer carries once it is known, refusals included.
async fn answer(
    app: App,
    trace: &TraceId,
    accept: Option<Accept>,
    request: Request,
    headers: &mut HeaderMap,
) -> Result<Response, Error> {
    let session = Session::open(app.clone(), credential(request.headers())).await?;
    let admission = app.admit(session.viewer()).await;
    admission.apply(headers);
    if !admission.allowed {
        return Err(Error::RateLimited(admission));
    }
    let accept = accept.ok_or_else(|| Error::NotAcceptable(Accept::REMEDY.to_owned()))?;
    let parameters = read(&app, request).await?;
    let viewer = session.viewer().clone();
    if accept == Accept::EventStream {
        let results = execute(&app, viewer, trace, Delivery::Stream, parameters);
        let held = session.hold_stream()?;
        return Ok(sse::respond(&app, session, held, trace.clone(), results));
    }
    let mut results = execute(&app, viewer, trace, Delivery::Single, parameters);
    Ok(respond(&results.next().await.unwrap_or_default(), accept))
}

/// Reads a whole body, bounded in size and time.
pub async fn read_body(app: &App, request: Request) -> Result<Bytes, Error> {
    let limit = Duration::from_millis(app.config.graphql.timeout_ms);
    let body = tokio::time::timeout(limit, Bytes::from_request(request, app)).await;
    let body = body.map_err(|_| Error::BadRequest("The request body took too long to arrive.".to_owned()))?;
    body.map_err(|rejection| match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => Error::PayloadTooLarge(app.config.server.max_body_bytes),
        _ => Error::BadRequest("The request body ended early.".to_owned()),
    })
}

/// Reads the parameters from the body.
async fn read(app: &App, request: Request) -> Result<Parameters, Error> {
    if !is_json(request.headers()) {
        let remedy = "The body must be JSON: send `Content-Type: application/json`.";
        return Err(Error::UnsupportedMediaType(remedy.to_owned()));
    }
    let body = read_body(app, request).await?;
    let body = serde_json::from_slice(&body)
        .map_err(|error| Error::BadRequest(format!("The request body is not valid JSON: {error}.")))?;
    Parameters::from_json(body).map_err(|fault| Error::BadRequest(fault.to_owned()))
}

/// Whether the body is said to be JSON in UTF-8.
fn is_json(headers: &HeaderMap) -> bool {
    let content_type = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let mut parts = content_type.split(';').map(str::trim);
    parts.next().is_some_and(|essence| essence.eq_ignore_ascii_case("application/json"))
        && parts.all(|parameter| match parameter.split_once('=') {
            Some((name, value)) if name.eq_ignore_ascii_case("charset") => {
                value.trim_matches('"').eq_ignore_ascii_case("utf-8")
            }
            _ => true,
        })
}

/// The status follows the media type: `application/json` has 200 for every well-formed request.
fn respond(result: &async_graphql::Response, accept: Accept) -> Response {
    let status = match (Refused::of(result), accept) {
        (Some(Refused::Request), _) | (Some(Refused::Document), Accept::GraphqlResponse) => StatusCode::BAD_REQUEST,
        _ => StatusCode::OK,
    };
    let mut response = body(status, accept, &ExecutionResult::from(result));
    response.headers_mut().extend(result.http_headers.clone());
    response
}

/// A refusal of the whole request.
pub fn refusal(error: &Error, trace: &TraceId, accept: Option<Accept>) -> Response {
    let accept = accept.unwrap_or(Accept::Json);
    body(error.status(), accept, &ExecutionResult::refusal(&error.to_graphql(&trace.0)))
}

fn body(status: StatusCode, accept: Accept, result: &ExecutionResult<'_>) -> Response {
    let content_type = HeaderValue::from_static(accept.content_type());
    (status, [(header::CONTENT_TYPE, content_type)], json(result)).into_response()
}

async fn get_graphql(
    State(app): State<App>,
    Extension(trace): Extension<TraceId>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
    headers: HeaderMap,
) -> Response {
    match upgrade {
        Ok(upgrade) => match ws::upgrade(app, trace.clone(), upgrade, &headers).await {
            Ok(response) => response,
            Err(error) => refusal(&error, &trace, Accept::negotiate(&headers)),
        },
        Err(rejection) if headers.contains_key(header::UPGRADE) => {
            refusal(&Error::BadRequest(rejection.body_text()), &trace, Accept::negotiate(&headers))
        }
        Err(_) => method_not_allowed(Extension(trace), headers).await,
    }
}

async fn method_not_allowed(Extension(trace): Extension<TraceId>, headers: HeaderMap) -> Response {
    let error = Error::BadRequest("Send operations by POST, or open a WebSocket here.".to_owned());
    let mut response = refusal(&error, &trace, Accept::negotiate(&headers));
    *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
    response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("POST"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_json_in_utf8_is_taken() {
        let with = |value: &'static str| {
            is_json(&HeaderMap::from_iter([(header::CONTENT_TYPE, HeaderValue::from_static(value))]))
        };
        for value in ["application/json", "Application/JSON; charset=UTF-8", "application/json;charset=\"utf-8\""] {
            assert!(with(value), "{value}");
        }
        for value in ["", "text/plain", "application/x-www-form-urlencoded", "application/json; charset=utf-16"] {
            assert!(!with(value), "{value}");
        }
        assert!(!is_json(&HeaderMap::new()));
    }
}
