//! The api as a worker apart reaches it: over HTTP, with a token that may change.

mod run;
mod token;

use std::sync::OnceLock;
use std::time::Duration;

use bytes::Bytes;
use cloister_runtime::protocol::{KEEP_ALIVE_MS, Refusal, RefusalCode, VERSION, VERSION_HEADER};
use http::StatusCode;
use http::header::CONTENT_TYPE;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;
use url::Url;

pub use self::run::RemoteRun;
pub use self::token::Token;

/// How long an answer may take that is there at once when all is well.
pub const PATIENCE: Duration = Duration::from_secs(10);
const CONNECT: Duration = Duration::from_secs(5);
/// Silence after which a stream counts as broken.
const SILENCE: Duration = Duration::from_millis(3 * KEEP_ALIVE_MS + 5_000);

/// Why a request came to nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ApiError {
    /// It did not reach the api.
    #[error("the api can't be reached: {0}")]
    Unreachable(String),
    /// It may have reached the api, and no answer came.
    #[error("the api does not answer: {0}")]
    Away(String),
    /// The api refuses it.
    #[error("the api refuses ({}): {}", .0.code.name(), .0.message)]
    Refused(Refusal),
}

impl ApiError {
    /// The code of a refusal.
    pub fn code(&self) -> Option<RefusalCode> {
        match self {
            ApiError::Refused(refusal) => Some(refusal.code),
            ApiError::Unreachable(_) | ApiError::Away(_) => None,
        }
    }
}

impl From<reqwest::Error> for ApiError {
    fn from(error: reqwest::Error) -> Self {
        let is_connect = error.is_connect();
        let reason = with_sources(&error.without_url());
        if is_connect { ApiError::Unreachable(reason) } else { ApiError::Away(reason) }
    }
}

/// reqwest's own words leave out the reason.
fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

/// The api.
pub struct Api {
    http: reqwest::Client,
    base: String,
    token: Token,
    /// Why this worker and the api can't work together.
    incompatible: OnceLock<String>,
    /// Cancelled once `incompatible` is known.
    unusable: CancellationToken,
}

impl Api {
    /// The api at this address.
    ///
    /// # Errors
    /// TLS can't be set up.
    pub fn new(url: &Url, token: Token) -> Result<Self, String> {
        let http = reqwest::Client::builder()
            .user_agent(concat!("cloister-runtime/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            // The api is a neighbour, in whatever cluster this is.
            .no_proxy()
            .tcp_nodelay(true)
            .connect_timeout(CONNECT)
            .read_timeout(SILENCE)
            .build()
            .map_err(|error| format!("no HTTP client: {}", with_sources(&error)))?;
        let base = format!("{}/runtime/v1/", url.as_str().trim_end_matches('/'));
        Ok(Self { http, base, token, incompatible: OnceLock::new(), unusable: CancellationToken::new() })
    }

    /// The token.
    pub fn token(&self) -> &Token {
        &self.token
    }

    /// Waits until the api has shown that it speaks another version of the protocol, and says how.
    pub async fn incompatible(&self) -> &str {
        self.unusable.cancelled().await;
        self.incompatible.get().map_or("", String::as_str)
    }

    /// Sends a request and reads the answer, all within `patience`.
    pub async fn post<T: Serialize, R: DeserializeOwned>(
        &self,
        path: &str,
        body: &T,
        patience: Duration,
    ) -> Result<R, ApiError> {
        let exchange = async {
            let answer = self.open(path, body).await?.bytes().await?;
            serde_json::from_slice(&answer).map_err(|error| self.malformed(&error))
        };
        let late = || ApiError::Away(format!("nothing within {} s", patience.as_secs()));
        tokio::time::timeout(patience, exchange).await.unwrap_or_else(|_| Err(late()))
    }

    /// Sends a request and waits for the answer's head.
    pub async fn open<T: Serialize>(&self, path: &str, body: &T) -> Result<reqwest::Response, ApiError> {
        let body = serde_json::to_vec(body).map_err(|error| ApiError::Unreachable(format!("no JSON: {error}")))?;
        let body = Bytes::from(body);
        let mut answer = self.send(path, body.clone()).await?;
        if answer.status() == StatusCode::UNAUTHORIZED && self.token.refresh().await {
            answer = self.send(path, body).await?;
        }
        if answer.status().is_success() {
            return Ok(answer);
        }
        let status = answer.status();
        let refusal: Refusal = serde_json::from_slice(&answer.bytes().await?)
            .map_err(|_| ApiError::Away(format!("it answers {status}; is this its address for workers?")))?;
        if refusal.code == RefusalCode::ProtocolVersion {
            self.give_up(refusal.message.clone());
        }
        Err(ApiError::Refused(refusal))
    }

    /// An answer in JSON that says something else than it should is another release's. Who goes on with that api would
    /// claim runs without end, and execute none.
    fn malformed(&self, error: &serde_json::Error) -> ApiError {
        if error.is_data() {
            self.give_up(format!("The api's answer can't be understood: {error}. Run a worker of the api's release."));
        }
        ApiError::Away(format!("a malformed answer: {error}"))
    }

    fn give_up(&self, reason: String) {
        // The first reason stands.
        let _ = self.incompatible.set(reason);
        self.unusable.cancel();
    }

    async fn send(&self, path: &str, body: Bytes) -> Result<reqwest::Response, ApiError> {
        let request = self
            .http
            .post(format!("{}{path}", self.base))
            .header(VERSION_HEADER, VERSION)
            .header(CONTENT_TYPE, "application/json")
            .bearer_auth(self.token.current())
            .body(body);
        Ok(request.send().await?)
    }
}
