//! The api as the operator reaches it: `/operator/v1`, as `crds::protocol` describes it.

pub mod changes;

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crds::protocol::{
    Changes, Departure, Farewell, Inventory, MAX_WAIT_MS, RefusalCode, Refused, Report, State, Token, TokenRequest,
    VERSION, VERSION_HEADER,
};
use http::Method;
use metrics::{counter, gauge};
use reqwest::Response;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::RwLock;

use crate::settings::Settings;

/// How long an answer may take that is there at once when all is well. Together with what else a look at a tenant takes
/// it stays below the five seconds in which drift is to be right.
const PATIENCE: Duration = Duration::from_secs(3);
const CONNECT: Duration = Duration::from_secs(2);
/// How long an api that was away is not asked again, but by [`changes::follow`].
const PAUSE: Duration = Duration::from_secs(5);
/// How long the list of all objects may take. Nothing is reported meanwhile.
const LONG_PATIENCE: Duration = Duration::from_secs(10);

/// Why a request came to nothing.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ApiError {
    /// No answer, or none that is the api's.
    #[error("the api can't be reached: {0}")]
    Unreachable(String),
    /// The api refuses it.
    #[error("the api refuses: {}", .0.message)]
    Refused(Refused),
}

impl ApiError {
    /// In one CamelCase word, for conditions and metrics.
    pub fn reason(&self) -> &'static str {
        match self {
            ApiError::Unreachable(_) => "ApiUnreachable",
            ApiError::Refused(refused) => match refused.code {
                RefusalCode::Unauthenticated => "Unauthenticated",
                RefusalCode::ProtocolVersion => "ProtocolVersion",
                RefusalCode::Invalid => "Invalid",
                RefusalCode::Conflict => "Conflict",
                RefusalCode::NotFound => "NotFound",
                RefusalCode::Unavailable => "ApiUnavailable",
            },
        }
    }

    /// Whether the api does not serve anybody at present, whatever is asked.
    pub fn is_away(&self) -> bool {
        match self {
            ApiError::Unreachable(_) => true,
            ApiError::Refused(refused) => matches!(
                refused.code,
                RefusalCode::Unavailable | RefusalCode::Unauthenticated | RefusalCode::ProtocolVersion
            ),
        }
    }

    /// Whether the api has no such tenant.
    pub fn is_not_found(&self) -> bool {
        matches!(self, ApiError::Refused(refused) if refused.code == RefusalCode::NotFound)
    }
}

impl From<reqwest::Error> for ApiError {
    fn from(error: reqwest::Error) -> Self {
        // reqwest's own words leave out the reason.
        let error = error.without_url();
        let mut text = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(error) = source {
            text = format!("{text}: {error}");
            source = error.source();
        }
        ApiError::Unreachable(text)
    }
}

/// The api.
pub struct Api {
    http: reqwest::Client,
    base: String,
    cluster: String,
    token_file: PathBuf,
    /// Until when it isn't asked, and why.
    away: Mutex<Option<(Instant, ApiError)>>,
    /// Held by whoever reports a tenant, alone by whoever lists all of them: a tenant that is registered while a list
    /// without it is under way would be let go by it.
    listing: RwLock<()>,
}

impl Api {
    /// The api of these settings, spoken to for the cluster with this UID.
    ///
    /// # Errors
    /// TLS can't be set up.
    pub fn new(settings: &Settings, cluster: &str) -> Result<Self, String> {
        let http = reqwest::Client::builder()
            .user_agent(concat!("cloister-operator/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            // The api is a neighbour, in whatever cluster this is.
            .no_proxy()
            .tcp_nodelay(true)
            .connect_timeout(CONNECT)
            .build()
            .map_err(|error| format!("no HTTP client: {error}"))?;
        Ok(Self {
            http,
            base: format!("{}/operator/v1", settings.api_url.as_str().trim_end_matches('/')),
            cluster: cluster.to_owned(),
            token_file: settings.api_token_file.clone(),
            away: Mutex::new(None),
            listing: RwLock::default(),
        })
    }

    /// Says what a tenant's object says.
    pub async fn report(&self, tenant: &str, report: &Report) -> Result<State, ApiError> {
        // Before the object was seen it can't be reported: a list that is made later has it.
        let Ok(_unlisted) = tokio::time::timeout(PATIENCE, self.listing.read()).await else {
            return Err(ApiError::Unreachable("it is taking in the list of all objects".to_owned()));
        };
        self.call(Method::PUT, &self.tenant(tenant), Some(report), PATIENCE).await
    }

    /// Says that a tenant's object goes.
    pub async fn farewell(&self, tenant: &str, farewell: &Farewell) -> Result<Departure, ApiError> {
        self.call(Method::DELETE, &self.tenant(tenant), Some(farewell), PATIENCE).await
    }

    /// Makes a token for a tenant's workers.
    pub async fn token(&self, tenant: &str, request: TokenRequest) -> Result<Token, ApiError> {
        self.call(Method::POST, &format!("{}/tokens", self.tenant(tenant)), Some(&request), PATIENCE).await
    }

    /// Waits for what changes after this cursor. Asks even while the api counts as away.
    pub async fn changes(&self, after: Option<&str>) -> Result<Changes, ApiError> {
        let after: String = match after {
            Some(after) => url::form_urlencoded::Serializer::new("?".to_owned()).append_pair("after", after).finish(),
            None => String::new(),
        };
        let path = format!("changes/{}{after}", self.cluster);
        let patience = Duration::from_millis(MAX_WAIT_MS) + 2 * PATIENCE;
        let result = self.send::<(), Changes>(Method::GET, &path, None, patience).await;
        self.note(&result);
        result
    }

    /// Says which objects there are, as `list` has them once no report is under way.
    pub async fn inventory(&self, list: impl FnOnce() -> Inventory) -> Result<(), ApiError> {
        let _unreported = self.listing.write().await;
        let path = format!("clusters/{}", self.cluster);
        self.exchange(Method::PUT, &path, Some(&list()), LONG_PATIENCE).await.map(drop)
    }

    fn tenant(&self, name: &str) -> String {
        format!("tenants/{}/{name}", self.cluster)
    }

    /// Asks, unless the api was away a moment ago: many tenants must not each wait for it.
    async fn call<T: Serialize, R: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&T>,
        patience: Duration,
    ) -> Result<R, ApiError> {
        if let Some((until, error)) = &*self.away.lock().unwrap_or_else(PoisonError::into_inner)
            && Instant::now() < *until
        {
            return Err(error.clone());
        }
        let result = self.send(method, path, body, patience).await;
        self.note(&result);
        result
    }

    fn note<R>(&self, result: &Result<R, ApiError>) {
        let mut away = self.away.lock().unwrap_or_else(PoisonError::into_inner);
        *away = match result {
            Err(error) if error.is_away() => Some((Instant::now() + PAUSE, error.clone())),
            _ => None,
        };
        gauge!("cloister_operator_api_up").set(if away.is_none() { 1.0 } else { 0.0 });
    }

    async fn send<T: Serialize, R: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&T>,
        patience: Duration,
    ) -> Result<R, ApiError> {
        let answer = async { Ok(self.exchange(method, path, body, patience).await?.bytes().await?) };
        let answer = tokio::time::timeout(patience, answer).await.unwrap_or_else(|_| Err(too_late(patience)))?;
        serde_json::from_slice(&answer)
            .map_err(|error| ApiError::Unreachable(format!("its answer is not one: {error}")))
    }

    async fn exchange<T: Serialize>(
        &self,
        method: Method,
        path: &str,
        body: Option<&T>,
        patience: Duration,
    ) -> Result<Response, ApiError> {
        counter!("cloister_operator_api_requests_total", "method" => method.to_string()).increment(1);
        let token = tokio::fs::read_to_string(&self.token_file).await.map_err(|error| {
            ApiError::Unreachable(format!("no credential in CLOISTER_OPERATOR__API_TOKEN_FILE: {error}"))
        })?;
        let mut request = self
            .http
            .request(method, format!("{}/{path}", self.base))
            .bearer_auth(token.trim())
            .header(VERSION_HEADER, VERSION)
            .timeout(patience);
        if let Some(body) = body {
            request = request.json(body);
        }
        let response = request.send().await?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = response.bytes().await?;
        Err(match serde_json::from_slice(&body) {
            Ok(refused) => ApiError::Refused(refused),
            Err(_) => ApiError::Unreachable(format!("something that is not the api answers {status}")),
        })
    }
}

fn too_late(patience: Duration) -> ApiError {
    ApiError::Unreachable(format!("no answer within {} s", patience.as_secs()))
}
