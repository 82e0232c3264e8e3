//! What can go wrong, and what a client learns of it.
//!
//! * What a caller can mend is a [`UserError`]: a value in a mutation's payload, with a stable code, a
//!   message that names the remedy and the path of the field at fault.
//! * Authentication, rights, limits and faults are an [`Error`]: a GraphQL error with `extensions.code`
//!   and `extensions.traceId`, or an HTTP status.
//! * The inside of a fault is logged with its trace id and never reaches a client.

use async_graphql::{Enum, ErrorExtensionValues, ServerError, SimpleObject};
use http::StatusCode;
use sea_orm::sqlx;
use sea_orm::{DbErr, RuntimeErr};

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
    /// The database can't be used now: it is away, starting, or its disk is full. The message is for the log only.
    #[error("The database can't be used just now. Nothing is lost; try again in a moment.")]
    Unavailable(String),
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
            Self::Unavailable(_) => "UNAVAILABLE",
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
            Self::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// What the log has of a fault, and its client hasn't.
    pub fn inside(&self) -> Option<&str> {
        match self {
            Self::Internal(inside) | Self::Unavailable(inside) => Some(inside),
            _ => None,
        }
    }

    /// As a GraphQL error. A fault is logged here, under the trace id that the client is told.
    pub fn to_graphql(&self, trace_id: &str) -> ServerError {
        if let Some(inside) = self.inside() {
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
        let inside = format!("database: {error}");
        if is_passing(&error) { Self::Unavailable(inside) } else { Self::Internal(inside) }
    }
}

/// Whether the same may well succeed a little later: it is the database's state that is at fault, not the statement.
fn is_passing(error: &DbErr) -> bool {
    let (DbErr::Conn(RuntimeErr::SqlxError(error))
    | DbErr::Exec(RuntimeErr::SqlxError(error))
    | DbErr::Query(RuntimeErr::SqlxError(error))) = error
    else {
        return matches!(error, DbErr::ConnectionAcquire(_));
    };
    match error.as_ref() {
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::Protocol(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::WorkerCrashed
        | sqlx::Error::BeginFailed => true,
        sqlx::Error::Database(error) => {
            let code = error.code().unwrap_or_default();
            match error.kind() {
                sqlx::error::ErrorKind::Other if code.len() == 5 => is_passing_sqlstate(&code),
                sqlx::error::ErrorKind::Other => code.parse().is_ok_and(is_passing_sqlite),
                _ => false,
            }
        }
        _ => false,
    }
}

/// PostgreSQL's appendix "Error Codes": connection, rolled back, insufficient resources, shut down or starting, system
/// error; and a server that is a standby by now.
fn is_passing_sqlstate(code: &str) -> bool {
    const CLASSES: [&str; 5] = ["08", "40", "53", "57", "58"];
    const QUERY_CANCELED: &str = "57014";
    const READ_ONLY: &str = "25006";
    (CLASSES.contains(&&code[..2]) && code != QUERY_CANCELED) || code == READ_ONLY
}

/// SQLite's "Result and Error Codes": busy, locked, read-only, input/output, full, can't open. An extended code has the
/// primary one in its low byte.
fn is_passing_sqlite(code: i32) -> bool {
    matches!(code & 0xff, 5 | 6 | 8 | 10 | 13 | 14)
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
    /// The cluster that the tenant's resource is in can't be reached, or can't take it now.
    ClusterUnavailable,
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
