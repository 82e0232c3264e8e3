//! How an operator's request is refused.

use axum::Json;
use axum::response::{IntoResponse, Response};
use crds::protocol::{self, RefusalCode};
use http::StatusCode;

use crate::error::{Error, Refusal};

/// A refusal. Its message names the field of the spec and the remedy: it ends in a condition of the object.
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

    /// The spec can't hold.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(RefusalCode::Invalid, message)
    }

    /// Something that is there stands in the way.
    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new(RefusalCode::Conflict, message)
    }

    /// The api can't now.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(RefusalCode::Unavailable, message)
    }

    /// The HTTP status.
    pub fn status(&self) -> StatusCode {
        match self.code {
            RefusalCode::Unauthenticated => StatusCode::UNAUTHORIZED,
            RefusalCode::ProtocolVersion => StatusCode::UPGRADE_REQUIRED,
            RefusalCode::Invalid => StatusCode::UNPROCESSABLE_ENTITY,
            RefusalCode::Conflict => StatusCode::CONFLICT,
            RefusalCode::NotFound => StatusCode::NOT_FOUND,
            RefusalCode::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    /// The code as a metric's label has it.
    pub fn label(&self) -> &'static str {
        match self.code {
            RefusalCode::Unauthenticated => "unauthenticated",
            RefusalCode::ProtocolVersion => "protocol_version",
            RefusalCode::Invalid => "invalid",
            RefusalCode::Conflict => "conflict",
            RefusalCode::NotFound => "not_found",
            RefusalCode::Unavailable => "unavailable",
        }
    }
}

/// A fault on our side may pass: the operator is to try again.
impl<E: Into<Error>> From<E> for Refused {
    fn from(error: E) -> Self {
        match error.into() {
            Error::Unauthenticated(message) => Self::new(RefusalCode::Unauthenticated, message),
            error => {
                tracing::error!(inside = ?error, "an operator's request failed on our side");
                Self::unavailable("The platform can't do this now. Try again.")
            }
        }
    }
}

/// What an operation refuses is told in the words of the spec by who calls it ([`super::report`] checks beforehand);
/// this is for what is left.
impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Error(error) => error.into(),
            Refusal::User(errors) => {
                Self::invalid(errors.into_iter().map(|error| error.message).collect::<Vec<_>>().join(" "))
            }
        }
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let body = protocol::Refused { code: self.code, message: self.message.clone() };
        let mut response = (self.status(), Json(body)).into_response();
        // For the log; see `http.rs`.
        response.extensions_mut().insert(self);
        response
    }
}
