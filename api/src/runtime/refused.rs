//! How a worker's request is refused: a typed body, a metric, and one line in the log.

use axum::Json;
use axum::response::{IntoResponse, Response};
use cloister_runtime::protocol::{Refusal, RefusalCode};
use http::StatusCode;

use crate::error::Error;

/// A refusal. Each tells the worker what it did wrong; none tells of another tenant.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct Refused {
    /// The kind.
    pub code: RefusalCode,
    /// For people.
    pub message: String,
}

impl Refused {
    /// A refusal of this kind.
    pub fn new(code: RefusalCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// The request says what a worker has no business to say.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(RefusalCode::Invalid, message)
    }

    /// Another worker has the run, or it is over.
    pub fn lease_lost() -> Self {
        Self::new(RefusalCode::LeaseLost, "The lease is lost: another worker has the run, or it is over. Drop it.")
    }

    /// The HTTP status.
    pub fn status(&self) -> StatusCode {
        match self.code {
            RefusalCode::ProtocolVersion => StatusCode::UPGRADE_REQUIRED,
            RefusalCode::Unauthenticated => StatusCode::UNAUTHORIZED,
            RefusalCode::TenantSuspended => StatusCode::FORBIDDEN,
            RefusalCode::Invalid => StatusCode::BAD_REQUEST,
            RefusalCode::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            RefusalCode::NotFound => StatusCode::NOT_FOUND,
            RefusalCode::LeaseLost | RefusalCode::WrongSequence | RefusalCode::Busy => StatusCode::CONFLICT,
            RefusalCode::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

/// A fault on our side may pass: the worker is to try again.
impl<E: Into<Error>> From<E> for Refused {
    fn from(error: E) -> Self {
        match error.into() {
            Error::Unauthenticated(message) => Self::new(RefusalCode::Unauthenticated, message),
            error @ Error::Suspended => Self::new(RefusalCode::TenantSuspended, error.to_string()),
            error => {
                tracing::error!(inside = ?error, "a worker's request failed on our side");
                Self::new(RefusalCode::Unavailable, "The platform can't do this now. Try again.")
            }
        }
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let body = Refusal { code: self.code, message: self.message.clone() };
        let mut response = (self.status(), Json(body)).into_response();
        // For the log; see `http.rs`.
        response.extensions_mut().insert(self);
        response
    }
}
