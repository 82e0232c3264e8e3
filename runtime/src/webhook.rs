//! Calls to the tenants' endpoints: signed, idempotent, bounded, and kept out of our own network.

pub mod address;
mod outbound;

use std::net::IpAddr;
use std::time::Duration;

use chrono::Utc;
use http::header::CONTENT_TYPE;
use ipnet::IpNet;
use serde::Deserialize;
use standardwebhooks::{HEADER_WEBHOOK_ID, HEADER_WEBHOOK_SIGNATURE, HEADER_WEBHOOK_TIMESTAMP, Webhook};
use url::{Host, Url};
use uuid::Uuid;

use self::address::is_public;
pub use self::outbound::Outbound;

/// The longest answer that is taken, in bytes.
pub const MAX_ANSWER_BYTES: usize = 1024 * 1024;

/// Header by which an endpoint recognises a call that is repeated after a worker was lost.
const IDEMPOTENCY_KEY: &str = "idempotency-key";

/// Names that mean a machine's own network, whatever they resolve to (RFC 6761, RFC 6762, ICANN's `.internal`).
const INSIDE_NAMES: [&str; 3] = ["localhost", "internal", "local"];

/// Where webhooks may go.
#[derive(Clone, Debug, Default)]
pub struct AddressPolicy {
    /// Hosts that may be private, each as `host` (any port) or `host:port`; IPv6 addresses in brackets.
    pub allowed_hosts: Vec<String>,
    /// Networks that may be private: whatever resolves into one of them is reached on its port.
    pub allowed_nets: Vec<AllowedNet>,
}

/// A network and a port of it, as `10.1.0.0/16:8443`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct AllowedNet {
    /// The network.
    pub net: IpNet,
    /// The port.
    pub port: u16,
}

impl TryFrom<String> for AllowedNet {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let parse = || {
            let (net, port) = text.rsplit_once(':')?;
            Some(Self { net: net.parse().ok()?, port: port.parse().ok()? })
        };
        parse().ok_or_else(|| format!("{text:?} is not a network and a port, such as 10.1.0.0/16:8443"))
    }
}

impl AddressPolicy {
    /// Whether the operator vouches for this URL's host, so that its addresses are not checked.
    fn allows(&self, url: &Url) -> bool {
        let Some(host) = url.host_str() else { return false };
        let host = host.strip_suffix('.').unwrap_or(host);
        let with_port = url.port_or_known_default().map(|port| format!("{host}:{port}"));
        self.allowed_hosts.iter().any(|allowed| {
            allowed.eq_ignore_ascii_case(host)
                || with_port.as_deref().is_some_and(|with_port| allowed.eq_ignore_ascii_case(with_port))
        })
    }

    /// The networks that are reached on the URL's port though they may be private.
    fn nets(&self, url: &Url) -> Vec<IpNet> {
        let port = url.port_or_known_default();
        self.allowed_nets.iter().filter(|allowed| Some(allowed.port) == port).map(|allowed| allowed.net).collect()
    }
}

/// Why a URL is no place for a webhook.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// It can't be parsed.
    #[error("is not a URL: {0}")]
    Malformed(url::ParseError),
    /// Its scheme is another one.
    #[error("has the scheme {0}; it must be https or http")]
    Scheme(String),
    /// It has a user name or a password.
    #[error("must not hold a user name or a password; use the tool's token")]
    Credentials,
    /// It names no host.
    #[error("has no host")]
    NoHost,
    /// Its host is an address inside a network, or a special one.
    #[error("points to {0}, which is not an address of the public internet")]
    InsideAddress(IpAddr),
    /// Its host is a name inside a network.
    #[error("points to {0}, which is a name inside a private network")]
    InsideName(String),
}

/// Checks a URL as far as that goes without resolving its name: what is asked when an agent is saved, and again
/// before each call.
///
/// # Errors
/// What is wrong with it; the message goes on from the name of the field.
pub fn check_url(url: &str, policy: &AddressPolicy) -> Result<Url, UrlError> {
    let url = check_form(url)?;
    let nets = policy.nets(&url);
    match url.host().ok_or(UrlError::NoHost)? {
        _ if policy.allows(&url) => {}
        Host::Ipv4(ip) => check_address(ip.into(), &nets)?,
        Host::Ipv6(ip) => check_address(ip.into(), &nets)?,
        // Where its addresses have to lie is checked once they are known.
        Host::Domain(_) if !nets.is_empty() => {}
        Host::Domain(name) => check_name(name)?,
    }
    Ok(url)
}

/// Checks a URL's form alone: all that can be said of a call that is made from a network of the tenant's own.
///
/// # Errors
/// As [`check_url`], but for addresses.
pub fn check_form(url: &str) -> Result<Url, UrlError> {
    let url = Url::parse(url).map_err(UrlError::Malformed)?;
    if !matches!(url.scheme(), "https" | "http") {
        return Err(UrlError::Scheme(url.scheme().to_owned()));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(UrlError::Credentials);
    }
    if !url.has_host() {
        return Err(UrlError::NoHost);
    }
    Ok(url)
}

fn check_address(ip: IpAddr, nets: &[IpNet]) -> Result<(), UrlError> {
    if is_public(ip) || nets.iter().any(|net| net.contains(&ip)) { Ok(()) } else { Err(UrlError::InsideAddress(ip)) }
}

fn check_name(name: &str) -> Result<(), UrlError> {
    let last_label = name.strip_suffix('.').unwrap_or(name).rsplit('.').next().unwrap_or_default();
    if INSIDE_NAMES.iter().any(|inside| last_label.eq_ignore_ascii_case(inside)) {
        return Err(UrlError::InsideName(name.to_owned()));
    }
    Ok(())
}

/// One call of a webhook tool. It has no `Debug`, as it holds secrets.
#[derive(Clone, Copy)]
pub struct WebhookCall<'a> {
    /// The tool's endpoint.
    pub url: &'a str,
    /// Sent as a bearer token.
    pub token: Option<&'a str>,
    /// The arguments, a JSON object as the model wrote it; empty counts as `{}`.
    pub arguments: &'a str,
    /// Until the call counts as timed out, from the look-up of the name to the answer's last byte.
    pub timeout: Duration,
    /// The run.
    pub run_id: Uuid,
    /// The call's place in the run: the turn, from 1, and the place among the calls of its response, from 0, as `3.0`;
    /// in a nested run after the place of the agent tool's call, as `3.0/1.2`.
    pub place: &'a str,
    /// Standard-Webhooks secrets (base64), each of which signs.
    pub secrets: &'a [String],
}

impl WebhookCall<'_> {
    /// The same for each repetition of the call, and for no other call.
    fn idempotency_key(&self) -> String {
        format!("{}:{}", self.run_id, self.place)
    }

    /// The message's id as Standard Webhooks wants it: the idempotency key without the full stop, which separates the
    /// parts of what is signed.
    fn message_id(&self) -> String {
        format!("msg_{}_{}", self.run_id.simple(), self.place.replace(['.', '/'], "_"))
    }

    fn body(&self) -> &str {
        if self.arguments.is_empty() { "{}" } else { self.arguments }
    }

    /// The value of `webhook-signature`: one signature a secret, so that secrets can be rotated.
    fn signatures(&self, timestamp: i64) -> Result<String, WebhookError> {
        let sign = |secret: &String| {
            Webhook::new(secret)
                .and_then(|key| key.sign(&self.message_id(), timestamp, self.body().as_bytes()))
                .map_err(|_| WebhookError::Secret)
        };
        Ok(self.secrets.iter().map(sign).collect::<Result<Vec<_>, _>>()?.join(" "))
    }
}

/// Why a webhook call gave no output. No message holds the URL, the token or the answer.
#[derive(Debug, thiserror::Error)]
pub enum WebhookError {
    /// The tool's time ran out.
    #[error("the endpoint did not answer in time")]
    TimedOut,
    /// The URL may not be called.
    #[error("the URL {0}")]
    Url(#[from] UrlError),
    /// It could not be reached, or the answer broke off.
    #[error("the endpoint could not be reached: {0}")]
    Unreachable(reqwest::Error),
    /// It answered with another status than 2xx.
    #[error("the endpoint answered with status {0}")]
    Status(u16),
    /// Its answer is longer than [`MAX_ANSWER_BYTES`].
    #[error("the endpoint's answer is longer than {MAX_ANSWER_BYTES} bytes")]
    TooLong,
    /// A signing secret is not base64.
    #[error("a signing secret is malformed")]
    Secret,
}

impl From<reqwest::Error> for WebhookError {
    fn from(error: reqwest::Error) -> Self {
        // Paths and queries of tenants' URLs often hold secrets.
        WebhookError::Unreachable(error.without_url())
    }
}

/// Calls webhooks. Clones share their connections.
#[derive(Clone, Debug)]
pub struct WebhookClient {
    outbound: Outbound,
}

impl WebhookClient {
    /// A client under a policy.
    ///
    /// # Errors
    /// If TLS can't be set up.
    ///
    /// # Panics
    /// Unless the process has installed a default crypto provider for rustls (reqwest's rule).
    pub fn new(policy: AddressPolicy) -> Result<Self, reqwest::Error> {
        Ok(Self { outbound: Outbound::new(policy)? })
    }

    /// The connections that its calls are made over: for whatever else goes where tenants say.
    pub fn outbound(&self) -> &Outbound {
        &self.outbound
    }

    /// POSTs the arguments and gives back the answer's text.
    ///
    /// # Errors
    /// Whatever keeps a 2xx answer from coming whole and in time. The endpoint may have been called even so.
    pub async fn call(&self, call: WebhookCall<'_>) -> Result<String, WebhookError> {
        tokio::time::timeout(call.timeout, self.exchange(call)).await.unwrap_or(Err(WebhookError::TimedOut))
    }

    async fn exchange(&self, call: WebhookCall<'_>) -> Result<String, WebhookError> {
        let (client, url) = self.outbound.to(call.url)?;
        #[expect(clippy::disallowed_methods, reason = "the endpoint compares it with its own wall clock")]
        let timestamp = Utc::now().timestamp();
        let mut request = client
            .post(url)
            .header(CONTENT_TYPE, "application/json")
            .header(IDEMPOTENCY_KEY, call.idempotency_key())
            .header(HEADER_WEBHOOK_ID, call.message_id())
            .header(HEADER_WEBHOOK_TIMESTAMP, timestamp)
            .body(call.body().to_owned());
        if !call.secrets.is_empty() {
            request = request.header(HEADER_WEBHOOK_SIGNATURE, call.signatures(timestamp)?);
        }
        if let Some(token) = call.token {
            request = request.bearer_auth(token);
        }
        let answer = request.send().await?;
        if !answer.status().is_success() {
            return Err(WebhookError::Status(answer.status().as_u16()));
        }
        read_bounded(answer).await
    }
}

/// The answer's text; reading stops where it is too long.
async fn read_bounded(mut answer: reqwest::Response) -> Result<String, WebhookError> {
    let mut bytes = Vec::new();
    while let Some(chunk) = answer.chunk().await? {
        if bytes.len() + chunk.len() > MAX_ANSWER_BYTES {
            return Err(WebhookError::TooLong);
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests;
