//! One operation, whichever way it comes in: its parameters, its caller, its results.

use std::future::pending;
use std::time::Duration;

use async_graphql::{ErrorExtensionValues, Request, Response, ServerError, Value, Variables};
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use secrecy::{ExposeSecret, SecretString};
use serde::Serialize;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;
use uuid::Uuid;

use super::limits::{Delivery, Refused};
use super::loaders::{Loads, loader};
use crate::app::App;
use crate::error::Error;
use crate::http::TraceId;
use crate::rate::OpenStream;
use crate::viewer::Viewer;

/// The code of errors that async-graphql raises by itself while executing: a scalar that doesn't parse.
const BAD_USER_INPUT: &str = "BAD_USER_INPUT";

/// The parameters of a GraphQL request.
/// Source: <https://graphql.github.io/graphql-over-http/draft/#sec-Request-Parameters>.
#[derive(Debug)]
pub struct Parameters {
    query: String,
    operation_name: Option<String>,
    variables: Variables,
}

impl Parameters {
    /// Reads them from a decoded JSON body, or says which is at fault. `extensions` must be an object, and
    /// has no meaning here.
    pub fn from_json(body: serde_json::Value) -> Result<Self, &'static str> {
        use serde_json::Value as Json;
        let mut body = match body {
            Json::Object(body) => body,
            Json::Array(_) => return Err("Batches are not supported: send each operation as a request of its own."),
            _ => return Err("The request must be a JSON object with a query."),
        };
        let query = match body.remove("query") {
            Some(Json::String(query)) => query,
            None | Some(Json::Null) => return Err("The query is missing: send it as the string \"query\"."),
            Some(_) => return Err("\"query\" must be a string."),
        };
        let operation_name = match body.remove("operationName") {
            // Some clients send an empty name for none.
            Some(Json::String(name)) => Some(name).filter(|name| !name.is_empty()),
            None | Some(Json::Null) => None,
            Some(_) => return Err("\"operationName\" must be a string or null."),
        };
        let variables = match body.remove("variables") {
            Some(variables @ Json::Object(_)) => Variables::from_json(variables),
            None | Some(Json::Null) => Variables::default(),
            Some(_) => return Err("\"variables\" must be an object or null."),
        };
        match body.remove("extensions") {
            None | Some(Json::Null | Json::Object(_)) => Ok(Self { query, operation_name, variables }),
            Some(_) => Err("\"extensions\" must be an object or null."),
        }
    }
}

/// Starts the operation. Its results come as they are polled for; every error carries a code and the trace id.
/// Dropping the stream ends it. A query or mutation has exactly one result.
pub fn execute(
    app: &App,
    viewer: Viewer,
    trace: &TraceId,
    delivery: Delivery,
    parameters: Parameters,
) -> BoxStream<'static, Response> {
    let loads = Loads::default();
    let mut request = Request::new(parameters.query)
        .variables(parameters.variables)
        .data(app.clone())
        .data(loader(app, &viewer, &loads))
        .data(viewer)
        .data(trace.clone())
        .data(delivery);
    request.operation_name = parameters.operation_name;
    let trace = trace.clone();
    let label = move |mut response: Response| {
        response.errors.iter_mut().for_each(|error| label(error, &trace));
        response
    };
    loads.drive(app.schema.execute_stream(request).map(label)).boxed()
}

/// Gives an error its code, from the [`Error`] that a resolver returned where there is one, and the trace id.
/// A fault is logged here, under the trace id that the client is told.
fn label(error: &mut ServerError, trace: &TraceId) {
    let raised = error.source::<Error>().map(|raised| raised.to_graphql(&trace.0).extensions);
    let extensions = error.extensions.get_or_insert_with(ErrorExtensionValues::default);
    if extensions.get("code").is_none() {
        match raised.flatten() {
            Some(raised) => *extensions = raised,
            None => extensions.set("code", BAD_USER_INPUT),
        }
    }
    extensions.set("traceId", trace.0.as_str());
}

/// A response as it goes over the wire. What was never executed has no `data`, not even null.
/// Source: <https://spec.graphql.org/September2025/#sec-Response-Format>.
#[derive(Debug, Serialize)]
pub struct ExecutionResult<'a> {
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    errors: &'a [ServerError],
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<&'a Value>,
}

impl<'a> ExecutionResult<'a> {
    /// Of an error that is the whole answer.
    pub fn refusal(error: &'a ServerError) -> Self {
        Self { errors: std::slice::from_ref(error), data: None }
    }
}

impl<'a> From<&'a Response> for ExecutionResult<'a> {
    fn from(response: &'a Response) -> Self {
        let data = Refused::of(response).is_none().then_some(&response.data);
        Self { errors: &response.errors, data }
    }
}

/// JSON of what we made ourselves. That it fails can't be told to anybody but the log.
pub fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_else(|error| {
        tracing::error!(%error, "an answer can't be written as JSON");
        r#"{"errors":[{"message":"The answer can't be written as JSON.","extensions":{"code":"INTERNAL"}}]}"#.to_owned()
    })
}

/// A caller whose connection outlives one request, and who may lose the right to it meanwhile (I7).
pub struct Session {
    app: App,
    credential: Option<SecretString>,
    authority: broadcast::Receiver<Uuid>,
    viewer: Viewer,
}

impl Session {
    /// Authenticates the caller; refused as [`App::authenticate`] does.
    pub async fn open(app: App, credential: Option<&str>) -> Result<Self, Error> {
        // Watched from before the check, so that no change falls between the two.
        let authority = app.authority_changes();
        let viewer = app.authenticate(credential).await?;
        Ok(Self { app, credential: credential.map(SecretString::from), authority, viewer })
    }

    /// Counts one request, as [`App::admit`] does, and the connection that stays open for it.
    ///
    /// # Errors
    /// Too many requests a minute, or too many connections at once.
    pub async fn hold_open(&self) -> Result<Option<OpenStream>, Error> {
        let admission = self.app.admit(&self.viewer).await;
        if !admission.allowed {
            return Err(Error::RateLimited(admission));
        }
        self.hold_stream()
    }

    /// Counts a connection that stays open, against the most that a tenant may have at once.
    pub fn hold_stream(&self) -> Result<Option<OpenStream>, Error> {
        let Ok(viewer) = self.viewer.require_tenant() else { return Ok(None) };
        let most = self.app.config.graphql.max_streams_per_tenant;
        let held = self.app.rates.hold_stream(viewer.tenant_id(), most);
        let too_many = || Error::Limit(format!("A tenant may hold {most} streams and sockets open at once."));
        held.map(Some).ok_or_else(too_many)
    }

    /// Who calls, as last confirmed.
    pub fn viewer(&self) -> &Viewer {
        &self.viewer
    }

    /// Waits until the caller's rights may have changed (a key or tenant was revoked or suspended, or the
    /// key expires), and authenticates again. Whoever has fewer rights than before is refused too, since
    /// operations under way began with all of them. Keep polling one such future: what it has seen and not
    /// yet acted on is lost when it is dropped.
    pub async fn confirmed(mut self) -> Result<Self, Error> {
        tokio::select! {
            () = lost(&mut self.authority, &self.viewer) => {}
            () = expiry(&self.app, &self.viewer) => {}
        }
        let credential = self.credential.as_ref().map(ExposeSecret::expose_secret);
        let viewer = self.app.authenticate(credential).await?;
        if has_lost_scopes(&self.viewer, &viewer) {
            return Err(Error::Forbidden("This key has fewer scopes than before: connect again.".to_owned()));
        }
        self.viewer = viewer;
        Ok(self)
    }
}

/// Waits until the caller's tenant, or a key of it, may have lost a right.
async fn lost(authority: &mut broadcast::Receiver<Uuid>, viewer: &Viewer) {
    let own = viewer.require_tenant().ok().map(|viewer| viewer.tenant_id());
    loop {
        match authority.recv().await {
            Ok(tenant_id) if own == Some(tenant_id) => return,
            Ok(_) => {}
            // It may have been among those that were missed.
            Err(RecvError::Lagged(_)) => return,
            Err(RecvError::Closed) => pending().await,
        }
    }
}

fn has_lost_scopes(before: &Viewer, now: &Viewer) -> bool {
    match (before, now) {
        (Viewer::Tenant(before), Viewer::Tenant(now)) => before.scopes.iter().any(|scope| !now.has(*scope)),
        _ => false,
    }
}

async fn expiry(app: &App, viewer: &Viewer) {
    /// The clock is finer than a timer: without a pause the check could come just too early, over and over.
    const MARGIN: Duration = Duration::from_millis(5);
    match viewer.expires_at() {
        Some(at) => tokio::time::sleep((at - app.clock.now()).to_std().unwrap_or_default() + MARGIN).await,
        None => pending().await,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn parameters_may_be_null_but_not_of_another_type() {
        let parameters = Parameters::from_json(json!({
            "query": "{ a }", "operationName": null, "variables": null, "extensions": null
        }))
        .expect("nulls are as good as nothing");
        assert!(parameters.operation_name.is_none() && parameters.variables.is_empty());
        for (body, fault) in [
            (json!([{ "query": "{ a }" }]), "Batches"),
            (json!("{ a }"), "JSON object"),
            (json!({}), "missing"),
            (json!({ "query": null }), "missing"),
            (json!({ "query": 1 }), "\"query\""),
            (json!({ "query": "{ a }", "operationName": 1 }), "\"operationName\""),
            (json!({ "query": "{ a }", "variables": [] }), "\"variables\""),
            (json!({ "query": "{ a }", "variables": "{}" }), "\"variables\""),
            (json!({ "query": "{ a }", "extensions": 1 }), "\"extensions\""),
        ] {
            let message = Parameters::from_json(body).expect_err("it is refused");
            assert!(message.contains(fault), "{message}");
        }
    }

    #[test]
    fn data_is_null_only_if_executed() {
        let executed = Response::new(Value::Null);
        assert_eq!(json(&ExecutionResult::from(&executed)), r#"{"data":null}"#);
        let error = ServerError::new("no", None);
        assert_eq!(json(&ExecutionResult::refusal(&error)), r#"{"errors":[{"message":"no"}]}"#);
    }
}
