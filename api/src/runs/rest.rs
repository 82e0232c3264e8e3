//! `POST /v1/run`, in the seed's shape: one run, awaited.

use std::time::Duration;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use cloister_runtime::item::{Body, RunStatus};
use cloister_runtime::spec::Agents;
use entity::runs;
use futures_util::StreamExt;
use http::StatusCode;
use serde::Deserialize;
use serde_json::json;
use uuid::Uuid;

use super::NewRun;
use super::events::{Event, events};
use crate::app::App;
use crate::error::{Error, Refusal, UserErrorCode};
use crate::graphql::post::read_body;
use crate::http::{RestError, admit};
use crate::ids;
use crate::usage::report;
use crate::viewer::Scope;

#[derive(Deserialize)]
struct RunRequest {
    agent_id: String,
    message: String,
}

/// `{agent_id, message}` → `{response, tokens_used, model}`. Waits for the run's end; a client that
/// leaves changes nothing. 422 malformed, 404, 409 not published, 429 quota or rate, 502 the run failed,
/// 504 it is still running.
pub async fn run(State(app): State<App>, request: Request) -> Result<Response, RestError> {
    let (viewer, carried) = admit(&app, request.headers()).await?;
    let viewer = viewer.require(Scope::Run)?;
    let body = read_body(&app, request).await?;
    let malformed = |detail: String| RestError::new(StatusCode::UNPROCESSABLE_ENTITY, detail);
    let asked: RunRequest =
        serde_json::from_slice(&body).map_err(|error| malformed(format!("The body is malformed: {error}.")))?;
    let agent_id = ids::decode(ids::Agent, &asked.agent_id)
        .or_else(|| Uuid::try_parse(&asked.agent_id).ok())
        .ok_or_else(|| malformed("agent_id is neither an agent's id nor a UUID.".to_owned()))?;
    let new = NewRun { agent_id, input: asked.message, ..NewRun::default() };
    let (run, agents) = super::start(&app, viewer, new).await.map_err(refused)?;
    let wait = Duration::from_secs(app.config.server.run_wait_seconds);
    let given_up = async {
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = handed_back(&app, run.id) => {}
        }
    };
    let output = tokio::select! {
        biased;
        ended = ended(&app, run.clone(), &agents) => ended?,
        () = given_up => {
            let id = ids::encode(ids::Run, run.id);
            let detail = format!("The run is still going on. Ask for it as {}.", id.as_str());
            return Err(RestError::new(StatusCode::GATEWAY_TIMEOUT, detail));
        }
    };
    let tokens = report::run(&app, &run).await?.usage.total_tokens();
    let (response, model) = output;
    Ok((carried, Json(json!({ "response": response, "tokens_used": tokens, "model": model }))).into_response())
}

/// Waits until the server stops and the run is no longer executed here: another server goes on with it.
async fn handed_back(app: &App, run_id: Uuid) {
    app.stopping.cancelled().await;
    while app.pool.executes(run_id) {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The run's output, and the model of the agent that gave it.
async fn ended(app: &App, run: runs::Model, agents: &Agents) -> Result<(String, String), RestError> {
    let mut agent = run.agent_id;
    // The first item, its input, is of no interest.
    let mut events = std::pin::pin!(events(app.clone(), run, 1));
    while let Some(event) = events.next().await {
        let Event::Item(item) = event? else { continue };
        match item.step.body {
            Body::Handoff { to_agent_id, .. } => agent = to_agent_id,
            Body::Status { status: RunStatus::Succeeded, output, .. } => {
                let model = agents.get(&agent).map(|agent| agent.model.clone()).unwrap_or_default();
                return Ok((output.unwrap_or_default(), model));
            }
            Body::Status { status: RunStatus::Failed, error, .. } => {
                let message = error.map(|error| error.message).unwrap_or_default();
                return Err(RestError::new(StatusCode::BAD_GATEWAY, format!("The run failed: {message}")));
            }
            Body::Status { status: RunStatus::Cancelled, .. } => {
                return Err(RestError::new(StatusCode::BAD_GATEWAY, "The run was cancelled."));
            }
            Body::Status { status: RunStatus::PausedQuota, .. } => {
                let detail = "The month's tokens are used up; the run is paused.";
                return Err(RestError::new(StatusCode::TOO_MANY_REQUESTS, detail));
            }
            _ => {}
        }
    }
    Err(Error::internal("a run's events ended without a status").into())
}

/// A refusal in HTTP's words.
fn refused(refusal: Refusal) -> RestError {
    let errors = match refusal {
        Refusal::Error(error) => return error.into(),
        Refusal::User(errors) => errors,
    };
    let status = match errors.first().map(|error| error.code) {
        Some(UserErrorCode::NotFound) => StatusCode::NOT_FOUND,
        Some(UserErrorCode::NotPublished) => StatusCode::CONFLICT,
        Some(UserErrorCode::QuotaExceeded | UserErrorCode::LimitExceeded) => StatusCode::TOO_MANY_REQUESTS,
        _ => StatusCode::UNPROCESSABLE_ENTITY,
    };
    let named = |error: &crate::error::UserError| match error.field.first().map(String::as_str) {
        // The field as this route calls it.
        Some("input") => format!("message: {}", error.message),
        _ => error.message.clone(),
    };
    RestError::new(status, errors.iter().map(named).collect::<Vec<_>>().join(" "))
}
