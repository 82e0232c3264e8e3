//! GraphQL over server-sent events: the distinct connections mode of graphql-sse.
//! Source: <https://github.com/enisdenjo/graphql-sse/blob/master/PROTOCOL.md>. Of that protocol: what
//! validation refuses is reported in the stream too, since the client asked for nothing but events.

use std::convert::Infallible;
use std::pin::pin;
use std::time::Duration;

use async_graphql::Response as GraphqlResponse;
use axum::body::Body;
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use futures_util::stream::{BoxStream, Stream};
use http::{HeaderName, header};
use tokio_util::sync::CancellationToken;

use super::operation::{ExecutionResult, Session, json};
use crate::app::App;
use crate::error::Error;
use crate::http::TraceId;
use crate::rate::OpenStream;

/// Silence after which a comment is sent, so that no proxy closes a quiet stream.
const KEEP_ALIVE: Duration = Duration::from_secs(12);
/// nginx holds answers back unless told not to.
const ACCEL_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");

const COMMENT: &str = ":\n\n";
/// The empty data is part of the protocol: event sources pass over an event that has none.
const COMPLETE: &str = "event: complete\ndata:\n\n";

/// Answers with the operation's results as they come, for as long as the session is good. The operation ends
/// when the client closes the connection.
pub fn respond(
    app: &App,
    session: Session,
    held: Option<OpenStream>,
    trace: TraceId,
    results: BoxStream<'static, GraphqlResponse>,
) -> Response {
    let headers =
        [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-cache"), (ACCEL_BUFFERING, "no")];
    let events = events(session, held, trace, app.stopping.clone(), results).map(Ok::<_, Infallible>);
    (headers, Body::from_stream(events)).into_response()
}

enum Step {
    Confirmed(Session),
    Refused(Error),
    Result(GraphqlResponse),
    Quiet,
    Done,
    Stopping,
}

fn events(
    session: Session,
    held: Option<OpenStream>,
    trace: TraceId,
    stopping: CancellationToken,
    mut results: BoxStream<'static, GraphqlResponse>,
) -> impl Stream<Item = String> {
    async_stream::stream! {
        let _held = held;
        let mut confirmed = pin!(session.confirmed());
        loop {
            let step = tokio::select! {
                biased;
                session = &mut confirmed => session.map_or_else(Step::Refused, Step::Confirmed),
                () = stopping.cancelled() => Step::Stopping,
                result = results.next() => result.map_or(Step::Done, Step::Result),
                () = tokio::time::sleep(KEEP_ALIVE) => Step::Quiet,
            };
            match step {
                Step::Confirmed(session) => confirmed.set(session.confirmed()),
                Step::Result(result) => yield next(&ExecutionResult::from(&result)),
                Step::Quiet => yield COMMENT.to_owned(),
                Step::Refused(error) => {
                    yield next(&ExecutionResult::refusal(&error.to_graphql(&trace.0)));
                    break;
                }
                Step::Done => break,
                // Not complete: the client is to ask again, of another replica or of the next process.
                Step::Stopping => return,
            }
        }
        yield COMPLETE.to_owned();
    }
}

/// JSON without line breaks is one line of data.
fn next(result: &ExecutionResult<'_>) -> String {
    format!("event: next\ndata: {}\n\n", json(result))
}
