//! What can go wrong, and what a client learns of it.
//!
//! * What a caller can mend is a [`UserError`]: a value in a mutation's payload, with a stable code, a
//!   message that names the remedy and the path of the field at fault.
//! * Authentication, rights, limits and faults are an [`Error`]: a GraphQL error with `extensions.code`
//!   and `extensions.traceId`, or an HTTP status.
//! * The inside of a fault is logged with its trace id and never reaches a client.

use async_graphql::{Enum, ErrorExtensionValues, ServerError, SimpleObject};
use http::StatusCode;
use sea_orm::DbErr;

use crate::rate::Admission;

/// Everything but what a caller can mend by other input.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// No key, or one that isn't valid now.
    #[error("{0}")]
    Unauthenticated(&'static str),
    /// The tenant is suspended or being deleted.
    #[error("This tenant is suspended. Ask the platform's operator to resume it.")]
    Suspended,
    /// The caller may not do this.
    #[error("{0}")]
    Forbidden(String),
    /// There is no such thing, or it is another tenant's.
    #[error("{0}")]
    NotFound(String),
    /// The request makes no sense.
    #[error("{0}")]
    BadRequest(String),
    /// The body is of a kind that isn't taken.
    #[error("{0}")]
    UnsupportedMediaType(String),
    /// The client accepts nothing that could be answered.
    #[error("{0}")]
    NotAcceptable(String),
    /// The body is too large.
    #[error("The request body is larger than {0} bytes.")]
    PayloadTooLarge(usize),
    /// Too many requests.
    #[error("Too many requests: the plan allows {} a minute. Try again in {} s.", .0.limit, .0.retry_after_seconds)]
    RateLimited(Admission),
    /// The request took too long.
    #[error("The request took longer than it may.")]
    Timeout,
    /// A limit of the API.
    #[error("{0}")]
    Limit(String),
    /// Two requests wanted the same thing at once; the loser is answered by what the winner made.
    #[error("Another request did this at the same time. Try again.")]
    Conflict,
    /// Our fault. The message is for the log only.
    #[error("Something went wrong on our side. Tell us the trace id.")]
    Internal(String),
}

impl Error {
    /// Our fault; `inside` goes to the log and nowhere else.
    pub fn internal(inside: impl std::fmt::Display) -> Self {
        Self::Internal(inside.to_string())
    }

    /// `extensions.code`.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Unauthenticated(_) => "UNAUTHENTICATED",
            Self::Suspended => "TENANT_SUSPENDED",
            Self::Forbidden(_) => "FORBIDDEN",
            Self::NotFound(_) => "NOT_FOUND",
            Self::BadRequest(_) => "BAD_REQUEST",
            Self::UnsupportedMediaType(_) => "UNSUPPORTED_MEDIA_TYPE",
            Self::NotAcceptable(_) => "NOT_ACCEPTABLE",
            Self::PayloadTooLarge(_) => "PAYLOAD_TOO_LARGE",
            Self::RateLimited(_) => "RATE_LIMITED",
            Self::Timeout => "TIMEOUT",
            Self::Limit(_) => "LIMIT_EXCEEDED",
            Self::Conflict => "CONFLICT",
            Self::Internal(_) => "INTERNAL",
        }
    }

    /// The HTTP status, where the error is the whole answer.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Unauthenticated(_) => StatusCode::UNAUTHORIZED,
            Self::Suspended | Self::Forbidden(_) => StatusCode::FORBIDDEN,
            Self::NotFound(_) => StatusCode::NOT_FOUND,
            Self::BadRequest(_) | Self::Limit(_) => StatusCode::BAD_REQUEST,
            Self::UnsupportedMediaType(_) => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::NotAcceptable(_) => StatusCode::NOT_ACCEPTABLE,
            Self::PayloadTooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::RateLimited(_) => StatusCode::TOO_MANY_REQUESTS,
            Self::Conflict => StatusCode::CONFLICT,
            Self::Timeout => StatusCode::GATEWAY_TIMEOUT,
            Self::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// As a GraphQL error. A fault is logged here, under the trace id that the client is told.
    pub fn to_graphql(&self, trace_id: &str) -> ServerError {
        if let Self::Internal(inside) = self {
            tracing::error!(trace_id, error = inside, "internal error");
        }
        let mut error = ServerError::new(self.to_string(), None);
        let mut extensions = ErrorExtensionValues::default();
        extensions.set("code", self.code());
        extensions.set("traceId", trace_id);
        error.extensions = Some(extensions);
        error
    }
}

impl From<DbErr> for Error {
    fn from(error: DbErr) -> Self {
        Self::Internal(format!("database: {error}"))
    }
}

impl From<serde_json::Error> for Error {
    fn from(error: serde_json::Error) -> Self {
        Self::Internal(format!("json: {error}"))
    }
}

/// A refusal that the caller can do something about.
#[derive(Clone, Debug, SimpleObject)]
pub struct UserError {
    /// The kind, stable.
    pub code: UserErrorCode,
    /// What is wrong and how to mend it.
    pub message: String,
    /// Path of the input field at fault, outermost first.
    pub field: Vec<String>,
}

/// The kinds of refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Enum)]
pub enum UserErrorCode {
    /// A value that isn't taken.
    Invalid,
    /// Known, but not built yet.
    NotSupportedYet,
    /// No such thing, or another tenant's.
    NotFound,
    /// Something else is in the way.
    Conflict,
    /// It exists already.
    Duplicate,
    /// Nothing is left of the month's tokens.
    QuotaExceeded,
    /// More than may be.
    LimitExceeded,
    /// The agent has no published version.
    NotPublished,
    /// The catalogue has no such model.
    UnknownModel,
    /// Two tools have the same name.
    NameCollision,
    /// The idempotency key was used with other input.
    IdempotencyMismatch,
    /// Not in this state.
    State,
    /// The tenant is suspended.
    TenantSuspended,
    /// The tenant is managed by a cluster's resource.
    ManagedByCluster,
    /// Billing is off.
    BillingDisabled,
}

impl UserError {
    /// A refusal; `field` is a path with dots, as `modelSettings.topP`.
    pub fn new(code: UserErrorCode, field: &str, message: impl Into<String>) -> Self {
        let field = field.split('.').filter(|part| !part.is_empty()).map(str::to_owned).collect();
        Self { code, message: message.into(), field }
    }

    /// A value that isn't taken.
    pub fn invalid(field: &str, message: impl Into<String>) -> Self {
        Self::new(UserErrorCode::Invalid, field, message)
    }

    /// No such thing, or another tenant's.
    pub fn not_found(field: &str, what: &str) -> Self {
        Self::new(UserErrorCode::NotFound, field, format!("There is no {what} with this id."))
    }

    /// Known, but not built yet.
    pub fn not_supported(field: &str) -> Self {
        Self::new(UserErrorCode::NotSupportedYet, field, format!("{field} is not supported yet. Leave it out."))
    }
}

/// How an operation is refused: by values for the payload, or by an error.
#[derive(Clone, Debug)]
pub enum Refusal {
    /// The caller can mend it.
    User(Vec<UserError>),
    /// The caller can't.
    Error(Error),
}

impl<E: Into<Error>> From<E> for Refusal {
    fn from(error: E) -> Self {
        Self::Error(error.into())
    }
}

impl From<UserError> for Refusal {
    fn from(error: UserError) -> Self {
        Self::User(vec![error])
    }
}

/// What an operation that a caller asks for comes to.
pub type Outcome<T> = Result<T, Refusal>;

/// For a payload: the object or the refusals; a fault stays an error.
pub fn payload<T>(outcome: Outcome<T>) -> async_graphql::Result<(Option<T>, Vec<UserError>)> {
    match outcome {
        Ok(object) => Ok((Some(object), Vec::new())),
        Err(Refusal::User(errors)) => Ok((None, errors)),
        Err(Refusal::Error(error)) => Err(error.into()),
    }
}
