//! One attempt at a provider, as the HTTP service beneath async-openai's client.
//!
//! async-openai's own transport repeats requests, hides headers, reads error bodies whole and logs tenants'
//! content where it can't parse it. So it is given this one, made anew for each call: it sends exactly once, tells
//! by the error whether the call can have been charged, and lets only what is within bounds and can be parsed through.

use std::error::Error;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use async_openai::error::OpenAIError;
use async_openai::middleware::HttpRequestFactory;
use async_stream::stream;
use bytes::Bytes;
use chrono::DateTime;
use eventsource_stream::{EventStream, EventStreamError};
use futures_util::future::BoxFuture;
use futures_util::{Stream, StreamExt};
use http::header::{DATE, RETRY_AFTER};
use http::{HeaderMap, StatusCode};
use serde_json::Value;
use tokio::time::timeout;

use super::SendError;
use super::chunk::error_message;
use super::redact::Redactor;

/// Bytes of an error's body that are read.
const MAX_ERROR_BYTES: usize = 64 * 1024;

/// How long an error's body may take: what it says is worth no more.
const ERROR_BODY_TIMEOUT: Duration = Duration::from_secs(5);

/// What a provider may take and send.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Until the head of the response.
    pub(super) first_byte_timeout: Duration,
    /// Between two reads of its body.
    pub(super) idle_timeout: Duration,
    /// Bytes of its body.
    pub(super) max_response_bytes: usize,
}

/// Why an answer was cut. async-openai passes on only the text of an outer error, hence this way past it.
#[derive(Clone, Debug, Default)]
pub(super) struct CutReason(Arc<OnceLock<String>>);

impl CutReason {
    /// The reason; without one, the stream simply ended.
    pub(super) fn get(&self) -> String {
        self.0.get().cloned().unwrap_or_else(|| "the provider ended its answer before it was complete".to_owned())
    }

    /// Whether there is a reason other than that.
    pub(super) fn is_known(&self) -> bool {
        self.0.get().is_some()
    }

    /// Keeps the first reason, and gives the error that ends the stream.
    fn set(&self, reason: String) -> std::io::Error {
        let error = std::io::Error::other(reason.clone());
        // Already set: the first reason is the cause of the later ones.
        let _ = self.0.set(reason);
        error
    }
}

/// Sends one request, once.
#[derive(Clone)]
pub(super) struct Attempt {
    pub(super) provider: Arc<str>,
    pub(super) http: reqwest::Client,
    pub(super) limits: Limits,
    pub(super) redactor: Arc<Redactor>,
    pub(super) cut_reason: CutReason,
}

impl tower::Service<HttpRequestFactory> for Attempt {
    type Response = reqwest::Response;
    type Error = OpenAIError;
    type Future = BoxFuture<'static, Result<reqwest::Response, OpenAIError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), OpenAIError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: HttpRequestFactory) -> Self::Future {
        let attempt = self.clone();
        Box::pin(async move { attempt.send(request).await.map_err(|error| OpenAIError::Boxed(Box::new(error))) })
    }
}

impl Attempt {
    async fn send(self, request: HttpRequestFactory) -> Result<reqwest::Response, SendError> {
        let provider = &self.provider;
        let unsent = |reason: String| SendError::Retryable {
            message: format!("{provider} could not be reached: {reason}"),
            retry_after: None,
        };
        let request = request.build().await.map_err(|error| unsent(root_cause(&error)))?;
        let response = match timeout(self.limits.first_byte_timeout, self.http.execute(request)).await {
            Ok(Ok(response)) => response,
            Ok(Err(error)) if error.is_connect() || error.is_builder() => return Err(unsent(root_cause(&error))),
            Ok(Err(error)) => {
                let message = format!("the connection to {provider} broke before it answered: {}", root_cause(&error));
                return Err(SendError::Unknown { message });
            }
            Err(_) => {
                let seconds = self.limits.first_byte_timeout.as_secs_f64();
                return Err(SendError::Unknown { message: format!("{provider} did not answer within {seconds} s") });
            }
        };
        if !response.status().is_success() {
            return Err(self.refusal(response).await);
        }
        let events = parsable_events(response.bytes_stream(), self.limits, self.cut_reason);
        Ok(http::Response::new(reqwest::Body::wrap_stream(events)).into())
    }

    /// What a status other than success means. The statuses worth a retry are those of OpenAI's own SDKs, and 425.
    async fn refusal(&self, response: reqwest::Response) -> SendError {
        let status = response.status();
        let retry_after = retry_after(response.headers());
        let reason = match status {
            // The body speaks of the platform's key, which is none of the tenant's business.
            StatusCode::UNAUTHORIZED => Some("the API key configured for it is not accepted".to_owned()),
            _ => error_body(response).await.map(|reason| self.redactor.clean(&reason)),
        };
        let message = match reason {
            Some(reason) => format!("{} answered {}: {reason}", self.provider, status.as_u16()),
            None => format!("{} answered {status}", self.provider),
        };
        match status {
            StatusCode::REQUEST_TIMEOUT
            | StatusCode::CONFLICT
            | StatusCode::TOO_EARLY
            | StatusCode::TOO_MANY_REQUESTS => SendError::Retryable { message, retry_after },
            _ if status.is_server_error() => SendError::Retryable { message, retry_after },
            _ => SendError::Rejected { status: status.as_u16(), message },
        }
    }
}

/// The stream's events again, one by one, as long as they are within bounds and hold what async-openai can
/// parse: it writes anything else to the log, and that is tenants' content.
fn parsable_events(
    body: impl Stream<Item = reqwest::Result<Bytes>> + Send + 'static,
    limits: Limits,
    cut_reason: CutReason,
) -> impl Stream<Item = std::io::Result<String>> + Send + 'static {
    let mut events = Box::pin(EventStream::new(bounded(body, limits, cut_reason.clone())));
    stream! {
        while let Some(event) = events.next().await {
            let data = match event {
                Ok(event) if event.event == "keepalive" || event.data.trim().is_empty() => continue,
                Ok(event) => event.data,
                Err(EventStreamError::Transport(error)) => {
                    yield Err(error);
                    return;
                }
                Err(EventStreamError::Utf8(_) | EventStreamError::Parser(_)) => {
                    yield Err(cut_reason.set("the provider sent what is no event stream".to_owned()));
                    return;
                }
            };
            match data.trim() {
                "[DONE]" => yield Ok("data: [DONE]\n\n".to_owned()),
                data if serde_json::from_str::<Value>(data).is_ok() => {
                    yield Ok(format!("data: {}\n\n", data.replace('\n', "\ndata: ")));
                }
                _ => {
                    yield Err(cut_reason.set("the provider sent an event that is no JSON".to_owned()));
                    return;
                }
            }
        }
    }
}

/// The body's bytes, as long as they keep coming and are not too many.
fn bounded(
    body: impl Stream<Item = reqwest::Result<Bytes>> + Send + 'static,
    limits: Limits,
    cut_reason: CutReason,
) -> impl Stream<Item = std::io::Result<Bytes>> + Send + 'static {
    let mut body = Box::pin(body);
    let mut left = limits.max_response_bytes;
    stream! {
        loop {
            let reason = match timeout(limits.idle_timeout, body.next()).await {
                Ok(None) => return,
                Ok(Some(Ok(bytes))) => match left.checked_sub(bytes.len()) {
                    Some(rest) => {
                        left = rest;
                        yield Ok(bytes);
                        continue;
                    }
                    None => format!("the answer is larger than {} bytes", limits.max_response_bytes),
                },
                Ok(Some(Err(error))) => format!("the connection to the provider broke: {}", root_cause(&error)),
                Err(_) => format!("the provider sent nothing for {} s", limits.idle_timeout.as_secs_f64()),
            };
            yield Err(cut_reason.set(reason));
            return;
        }
    }
}

/// The reason in an error's body, if it holds one in any of the usual shapes.
async fn error_body(response: reqwest::Response) -> Option<String> {
    let mut body = Vec::new();
    let mut chunks = response.bytes_stream();
    let read = async {
        while let Some(Ok(chunk)) = chunks.next().await {
            body.extend_from_slice(&chunk[..chunk.len().min(MAX_ERROR_BYTES - body.len())]);
            if body.len() == MAX_ERROR_BYTES {
                break;
            }
        }
    };
    // Whatever has arrived by then either is the whole of it or is no JSON.
    let _ = timeout(ERROR_BODY_TIMEOUT, read).await;
    let json: Value = serde_json::from_slice(&body).ok()?;
    error_message(&json["error"]).or_else(|| error_message(&json)).or_else(|| error_message(&json["detail"]))
}

/// How long a provider asks to be left alone (RFC 9110, section 10.2.3). A date is reckoned from the response's own
/// `Date`, so that neither clock needs to be right.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = |name| headers.get(name)?.to_str().ok().map(str::trim);
    let value = text(RETRY_AFTER)?;
    if let Ok(seconds) = value.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let until = DateTime::parse_from_rfc2822(value).ok()?;
    let now = DateTime::parse_from_rfc2822(text(DATE)?).ok()?;
    Some((until - now).to_std().unwrap_or_default())
}

/// The innermost error's text: it says what happened, while the outer ones name the URL.
fn root_cause(error: &(dyn Error + 'static)) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let headers = |retry_after: &str, date: &str| {
            HeaderMap::from_iter([(RETRY_AFTER, retry_after.parse().unwrap()), (DATE, date.parse().unwrap())])
        };
        let now = "Sun, 06 Nov 1994 08:49:37 GMT";
        assert_eq!(retry_after(&headers("7", now)), Some(Duration::from_secs(7)));
        assert_eq!(retry_after(&headers("Sun, 06 Nov 1994 08:50:07 GMT", now)), Some(Duration::from_secs(30)));
        assert_eq!(retry_after(&headers("Sun, 06 Nov 1994 08:00:00 GMT", now)), Some(Duration::ZERO));
        assert_eq!(retry_after(&headers("soon", now)), None);
        assert_eq!(retry_after(&headers("-1", now)), None);
        assert_eq!(retry_after(&HeaderMap::new()), None);
    }
}
