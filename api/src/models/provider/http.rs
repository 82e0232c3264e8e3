//! Providers that speak OpenAI's API over HTTP: Chat Completions or the Responses API.
//!
//! async-openai's client forms the request and takes the event stream apart, into our own types (its `byot`
//! feature); the HTTP beneath it is ours (its `middleware` feature, see [`super::attempt`]).

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use async_openai::Client;
use async_openai::config::Config;
use async_openai::error::OpenAIError;
use cloister_runtime::model::ModelRequest;
use futures_util::StreamExt;
use http::header::{AUTHORIZATION, HeaderMap, HeaderValue, InvalidHeaderValue};
use secrecy::{ExposeSecret, SecretString};
use url::{Host, Url};

use super::assembly::assemble;
use super::attempt::{Attempt, CutReason, Limits};
use super::chunk::Frame;
use super::events::Event;
use super::output::assemble_output;
use super::redact::Redactor;
use super::{Answer, SendError};
use crate::config::ProviderApi;
use crate::models::{chat, responses};

/// Load balancers close idle connections after a minute or so; a request that meets the closing is lost.
const POOL_IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// How a provider is reached.
#[derive(Clone, Debug)]
pub struct HttpProviderConfig {
    /// Its name in the configuration, shown in messages.
    pub name: String,
    /// The API's root, such as `https://api.openai.com/v1`. A query is kept (Azure's `api-version`).
    pub base_url: Url,
    /// Sent as a bearer token; none for servers that want none.
    pub api_key: Option<SecretString>,
    /// For name resolution, TCP and TLS together; usually 5 s.
    pub connect_timeout: Duration,
    /// From the start of the call until the head of the response; usually 60 s.
    pub first_byte_timeout: Duration,
    /// Between two reads of the body; usually 60 s.
    pub idle_timeout: Duration,
    /// Bytes a response may have; usually 8 MiB.
    pub max_response_bytes: usize,
    /// Whether it takes a model's reasoning back over Chat Completions; none: as the Agents SDK decides, by the model.
    pub replay_reasoning: Option<bool>,
}

/// Why a provider can't be configured so.
#[derive(Debug, thiserror::Error)]
pub enum HttpProviderError {
    /// The base URL can't be one.
    #[error("base_url must be an http or https URL without user name and password")]
    BaseUrl,
    /// The API key can't be sent.
    #[error("api_key holds characters that an HTTP header can't")]
    ApiKey(#[source] InvalidHeaderValue),
    /// The HTTP client could not be made.
    #[error("the HTTP client could not be made")]
    Client(#[source] reqwest::Error),
}

/// A server that speaks OpenAI's API.
pub struct HttpProvider {
    name: Arc<str>,
    client: Client<Arc<dyn Config>>,
    http: reqwest::Client,
    limits: Limits,
    replay_reasoning: Option<bool>,
    redactor: Arc<Redactor>,
}

impl HttpProvider {
    /// Prepares a provider; nothing is sent.
    pub fn new(config: HttpProviderConfig) -> Result<Self, HttpProviderError> {
        let endpoint: Arc<dyn Config> = Arc::new(Endpoint::new(&config)?);
        // reqwest takes the process's TLS implementation. One that is installed already stays, which is no error.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut http = reqwest::Client::builder()
            .user_agent(concat!("cloister/", env!("CARGO_PKG_VERSION")))
            .tcp_nodelay(true)
            .connect_timeout(config.connect_timeout)
            .pool_idle_timeout(POOL_IDLE_TIMEOUT)
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never());
        // A proxy from the environment serves the way out, not a model server on this machine.
        if is_loopback(&config.base_url) {
            http = http.no_proxy();
        }
        let http = http.build().map_err(HttpProviderError::Client)?;
        Ok(Self {
            name: config.name.into(),
            client: Client::build(http.clone(), endpoint),
            http,
            limits: Limits {
                first_byte_timeout: config.first_byte_timeout,
                idle_timeout: config.idle_timeout,
                max_response_bytes: config.max_response_bytes,
            },
            replay_reasoning: config.replay_reasoning,
            redactor: Arc::new(Redactor::new(config.api_key)),
        })
    }

    /// Sends one request, once, and waits for the head of the response.
    pub async fn send(
        &self,
        api: ProviderApi,
        upstream_model: &str,
        request: &ModelRequest,
    ) -> Result<Answer, SendError> {
        let cut_reason = CutReason::default();
        let client = self.client.clone().with_http_service(Attempt {
            provider: self.name.clone(),
            http: self.http.clone(),
            limits: self.limits,
            redactor: self.redactor.clone(),
            cut_reason: cut_reason.clone(),
        });
        let redactor = self.redactor.clone();
        let events = match api {
            ProviderApi::Chat => {
                let body = chat::body(upstream_model, request, self.replay_reasoning)
                    .map_err(|unfit| SendError::Unfit { message: format!("{} can't be asked: {unfit}", self.name) })?;
                let frames = client.chat().create_stream_byot::<_, Frame>(body).await.map_err(send_error)?;
                assemble(frames, upstream_model.to_owned(), cut_reason, redactor).boxed()
            }
            ProviderApi::Responses => {
                let body = responses::body(upstream_model, request);
                let events = client.responses().create_stream_byot::<_, Event>(body).await.map_err(send_error)?;
                assemble_output(events, cut_reason, redactor).boxed()
            }
        };
        Ok(Answer { events })
    }
}

/// The attempt's own error, which async-openai hands through. It has others only for what happens before
/// anything is sent.
fn send_error(error: OpenAIError) -> SendError {
    let error = match error {
        OpenAIError::Boxed(error) => error,
        other => Box::new(other),
    };
    match error.downcast::<SendError>() {
        Ok(error) => *error,
        Err(error) => SendError::Retryable { message: error.to_string(), retry_after: None },
    }
}

fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(ip)) => IpAddr::V4(ip).is_loopback(),
        Some(Host::Ipv6(ip)) => IpAddr::V6(ip).is_loopback(),
        None => false,
    }
}

/// Where requests go and what they carry. async-openai's own configuration fills gaps from `OPENAI_…`
/// variables, which would send one provider's key to another.
struct Endpoint {
    base_url: Url,
    api_key: SecretString,
    headers: HeaderMap,
}

impl Endpoint {
    fn new(config: &HttpProviderConfig) -> Result<Self, HttpProviderError> {
        let base_url = &config.base_url;
        let has_credentials = !base_url.username().is_empty() || base_url.password().is_some();
        if !matches!(base_url.scheme(), "http" | "https") || !base_url.has_host() || has_credentials {
            return Err(HttpProviderError::BaseUrl);
        }
        let mut headers = HeaderMap::new();
        if let Some(key) = &config.api_key {
            let mut bearer =
                HeaderValue::from_str(&format!("Bearer {}", key.expose_secret())).map_err(HttpProviderError::ApiKey)?;
            bearer.set_sensitive(true);
            headers.insert(AUTHORIZATION, bearer);
        }
        let api_key = config.api_key.clone().unwrap_or_default();
        Ok(Self { base_url: base_url.clone(), api_key, headers })
    }
}

impl Config for Endpoint {
    fn headers(&self) -> HeaderMap {
        self.headers.clone()
    }

    fn url(&self, path: &str) -> String {
        let mut url = self.base_url.clone();
        url.set_path(&format!("{}{path}", self.base_url.path().trim_end_matches('/')));
        url.into()
    }

    fn query(&self) -> Vec<(&str, &str)> {
        Vec::new()
    }

    fn api_base(&self) -> &str {
        self.base_url.as_str()
    }

    fn api_key(&self) -> &SecretString {
        &self.api_key
    }
}

#[cfg(test)]
mod tests;
