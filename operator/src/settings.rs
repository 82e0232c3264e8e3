//! The operator's settings: `CLOISTER_OPERATOR__…` variables, and nothing else.
//!
//! | variable | what | unless set |
//! | --- | --- | --- |
//! | `API_URL` | the api's runtime port, such as `http://cloister-runtime:8081`; workers use it too | required |
//! | `API_TOKEN_FILE` | the file with the operator's credential, read anew for each request | required |
//! | `RUNTIME_IMAGE` | the image of the workers | required |
//! | `NAMESPACE` | the operator's own namespace: its Lease lives there | required |
//! | `IDENTITY` | this replica's name, the pod's | the host's name |
//! | `NAMESPACE_PREFIX` | what tenants' namespaces begin with, 9 characters at most | `tenant-` |
//! | `API_NAMESPACE`, `API_POD_LABELS`, `API_PORT` | the api's pods (`key=value,…`) and their container port | see below |
//! | `API_CIDRS` | the api's addresses, when it is outside the cluster; `API_PORT` goes with them | see below |
//! | `DNS_CIDRS` | addresses of DNS beyond the `kube-dns` pods (NodeLocal DNSCache) | none |
//! | `DENIED_CIDRS` | addresses that no tenant may reach | none |
//! | `RUNTIME_CLASSES` | runtime classes that a `Tenant` may name | none |
//! | `PRIORITY_CLASSES` | priority classes that a `Tenant` may name | none |
//! | `RUNTIME_IMAGE_PULL_POLICY` | `IfNotPresent`, `Always` or `Never` | `IfNotPresent` |
//! | `RUNTIME_SHUTDOWN_SECONDS` | how long a worker that is told to stop finishes turns | 120 |
//! | `DRAIN_SECONDS` | how long runs may go on before a namespace is removed | 600 |
//! | `SCALE_DOWN_SECONDS` | how long fewer runs must last before workers are taken away | 300 |
//! | `MAX_CONCURRENT_ROLLOUTS` | tenants that get a new runtime image at once | 10 |
//! | `CONCURRENCY` | tenants that are looked at at once | 32 |
//! | `LISTEN` | address and port of `/healthz`, `/readyz`, `/metrics` | `0.0.0.0:8083` |
//! | `LOG_FORMAT` | `text` or `json` | `text` |
//! | `LOG_FILTER` | a `tracing` filter | `info` |
//!
//! Lists are separated by commas. Either `API_NAMESPACE` with `API_POD_LABELS`, or `API_CIDRS` must be given.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use config::Environment;
use ipnet::IpNet;
use serde::Deserialize;
use url::Url;

const LISTS: [&str; 6] =
    ["api_cidrs", "api_pod_labels", "dns_cidrs", "denied_cidrs", "runtime_classes", "priority_classes"];

/// All of them.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The api's runtime port.
    pub api_url: Url,
    /// The file that holds the operator's credential.
    pub api_token_file: PathBuf,
    /// The image of the workers.
    pub runtime_image: String,
    /// Whether the image is pulled anew.
    #[serde(default)]
    pub runtime_image_pull_policy: PullPolicy,
    /// The operator's own namespace.
    pub namespace: String,
    /// This replica's name.
    #[serde(default)]
    pub identity: Option<String>,
    /// What tenants' namespaces begin with.
    #[serde(default = "defaults::namespace_prefix")]
    pub namespace_prefix: String,
    /// The namespace of the api's pods.
    #[serde(default)]
    pub api_namespace: Option<String>,
    /// Labels of the api's pods, each `key=value`.
    #[serde(default)]
    pub api_pod_labels: Vec<String>,
    /// The port that the api's pods, or its addresses, listen on for workers.
    #[serde(default = "defaults::api_port")]
    pub api_port: u16,
    /// The api's addresses, when it is outside the cluster.
    #[serde(default)]
    pub api_cidrs: Vec<IpNet>,
    /// Addresses of DNS beyond the cluster's own pods.
    #[serde(default)]
    pub dns_cidrs: Vec<IpNet>,
    /// Addresses that no tenant may reach.
    #[serde(default)]
    pub denied_cidrs: Vec<IpNet>,
    /// Runtime classes that a tenant may name.
    #[serde(default)]
    pub runtime_classes: Vec<String>,
    /// Priority classes that a tenant may name.
    #[serde(default)]
    pub priority_classes: Vec<String>,
    /// Seconds that a worker that is told to stop goes on with turns.
    #[serde(default = "defaults::runtime_shutdown_seconds")]
    pub runtime_shutdown_seconds: u32,
    /// Seconds that runs may go on before their namespace is removed.
    #[serde(default = "defaults::drain_seconds")]
    pub drain_seconds: u32,
    /// Seconds that fewer runs must last before workers are taken away.
    #[serde(default = "defaults::scale_down_seconds")]
    pub scale_down_seconds: u32,
    /// Tenants that get a new runtime image at once.
    #[serde(default = "defaults::max_concurrent_rollouts")]
    pub max_concurrent_rollouts: usize,
    /// Tenants that are looked at at once.
    #[serde(default = "defaults::concurrency")]
    pub concurrency: u16,
    /// Address and port for health and metrics.
    #[serde(default = "defaults::listen")]
    pub listen: SocketAddr,
    /// How a log line looks.
    #[serde(default)]
    pub log_format: LogFormat,
    /// A `tracing` filter, such as `info` or `cloister_operator=debug`.
    #[serde(default = "defaults::log_filter")]
    pub log_filter: String,
}

/// Whether an image is pulled anew, in Kubernetes' words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum PullPolicy {
    /// Unless the node has it.
    #[default]
    IfNotPresent,
    /// Each time.
    Always,
    /// It must be on the node.
    Never,
}

impl PullPolicy {
    /// As it is written.
    pub const fn as_str(self) -> &'static str {
        match self {
            PullPolicy::IfNotPresent => "IfNotPresent",
            PullPolicy::Always => "Always",
            PullPolicy::Never => "Never",
        }
    }
}

/// How a log line looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// An object a line.
    Json,
}

mod defaults {
    use std::net::SocketAddr;

    pub fn namespace_prefix() -> String {
        "tenant-".to_owned()
    }

    pub fn api_port() -> u16 {
        8081
    }

    pub fn runtime_shutdown_seconds() -> u32 {
        120
    }

    pub fn drain_seconds() -> u32 {
        600
    }

    pub fn scale_down_seconds() -> u32 {
        300
    }

    pub fn max_concurrent_rollouts() -> usize {
        10
    }

    pub fn concurrency() -> u16 {
        32
    }

    pub fn listen() -> SocketAddr {
        SocketAddr::from(([0, 0, 0, 0], 8083))
    }

    pub fn log_filter() -> String {
        "info".to_owned()
    }
}

impl Settings {
    /// Reads the variables among `env`.
    ///
    /// # Errors
    /// One is missing, unknown or wrong; the message names it.
    pub fn from_env(env: HashMap<String, String>) -> Result<Self, String> {
        // An empty variable is one that is not set: a chart can always write it.
        let env = env.into_iter().filter(|(name, value)| !value.is_empty() || !name.starts_with(PREFIX)).collect();
        let mut variables =
            Environment::with_prefix("CLOISTER_OPERATOR").prefix_separator("__").try_parsing(true).list_separator(",");
        for list in LISTS {
            variables = variables.with_list_parse_key(list);
        }
        let settings: Settings = config::Config::builder()
            .add_source(variables.source(Some(env)))
            .build()
            .and_then(config::Config::try_deserialize)
            .map_err(|error| format!("configuration ({PREFIX}… variables): {error}"))?;
        settings.validate()?;
        Ok(settings)
    }

    fn validate(&self) -> Result<(), String> {
        let wrong = |name: &str, what: &str| Err(format!("configuration: {PREFIX}{name} {what}"));
        if !matches!(self.api_url.scheme(), "http" | "https") || !self.api_url.has_host() {
            return wrong("API_URL", "must be an http or https URL");
        }
        let prefix = &self.namespace_prefix;
        let is_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if prefix.is_empty() || prefix.len() > 9 || !prefix.starts_with(|c: char| c.is_ascii_lowercase()) {
            return wrong("NAMESPACE_PREFIX", "must be 1 to 9 characters that begin with a letter");
        }
        if !prefix.chars().all(is_name) {
            return wrong("NAMESPACE_PREFIX", "must consist of lower-case letters, digits and hyphens");
        }
        let by_pods = self.api_namespace.is_some() && !self.api_pod_labels.is_empty();
        if by_pods != self.api_cidrs.is_empty() {
            return wrong(
                "API_NAMESPACE",
                "with API_POD_LABELS must be given, or API_CIDRS: where workers find the api",
            );
        }
        if self.api_pod_labels.iter().any(|label| label.split_once('=').is_none_or(|(key, _)| key.is_empty())) {
            return wrong(
                "API_POD_LABELS",
                "must be labels such as app.kubernetes.io/component=api, with commas between",
            );
        }
        if self.max_concurrent_rollouts == 0 {
            return wrong("MAX_CONCURRENT_ROLLOUTS", "must be 1 at least, or no tenant would ever get a new image");
        }
        if self.concurrency == 0 {
            return wrong("CONCURRENCY", "must be 1 at least");
        }
        Ok(())
    }

    /// Labels of the api's pods.
    pub fn api_pods(&self) -> BTreeMap<String, String> {
        let labels = self.api_pod_labels.iter().filter_map(|label| label.split_once('='));
        labels.map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
    }

    /// The name of a tenant's namespace.
    pub fn namespace_of(&self, tenant: &str) -> String {
        format!("{}{tenant}", self.namespace_prefix)
    }

    /// How long runs may go on before their namespace is removed.
    pub fn drain(&self) -> Duration {
        Duration::from_secs(self.drain_seconds.into())
    }

    /// How long fewer runs must last before workers are taken away.
    pub fn scale_down(&self) -> Duration {
        Duration::from_secs(self.scale_down_seconds.into())
    }
}

const PREFIX: &str = "CLOISTER_OPERATOR__";

#[cfg(test)]
impl Settings {
    /// Settings for tests of what is built.
    pub fn sample() -> Self {
        let variables = [
            ("API_URL", "http://cloister-runtime.cloister.svc:8081"),
            ("API_TOKEN_FILE", "/run/token"),
            ("RUNTIME_IMAGE", "example.com/cloister-runtime:1.2.3"),
            ("NAMESPACE", "cloister"),
            ("API_NAMESPACE", "cloister"),
            ("API_POD_LABELS", "app.kubernetes.io/name=cloister,app.kubernetes.io/component=api"),
        ];
        let env = variables.map(|(name, value)| (format!("{PREFIX}{name}"), value.to_owned()));
        Self::from_env(env.into()).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(more: &[(&str, &str)]) -> Result<Settings, String> {
        let mut env: HashMap<String, String> = [
            ("API_URL", "http://api:8081"),
            ("API_TOKEN_FILE", "/run/token"),
            ("RUNTIME_IMAGE", "runtime"),
            ("NAMESPACE", "cloister"),
            ("API_NAMESPACE", "cloister"),
            ("API_POD_LABELS", "app=api"),
        ]
        .map(|(name, value)| (format!("{PREFIX}{name}"), value.to_owned()))
        .into();
        env.extend(more.iter().map(|(name, value)| (format!("{PREFIX}{name}"), (*value).to_owned())));
        Settings::from_env(env)
    }

    #[test]
    fn few_variables_are_enough() {
        let settings = read(&[("DNS_CIDRS", "")]).unwrap();
        assert_eq!((settings.api_port, settings.max_concurrent_rollouts), (8081, 10));
        assert_eq!(settings.namespace_of("acme"), "tenant-acme");
        assert_eq!(settings.api_pods()["app"], "api");
    }

    #[test]
    fn each_list_may_be_set() {
        let settings = read(&[
            ("API_NAMESPACE", ""),
            ("API_POD_LABELS", ""),
            ("API_CIDRS", "192.0.2.7/32,2001:db8::/64"),
            ("DNS_CIDRS", "169.254.20.10/32"),
            ("DENIED_CIDRS", "198.51.100.0/24"),
            ("RUNTIME_CLASSES", "gvisor,kata"),
            ("PRIORITY_CLASSES", "tenants"),
        ])
        .unwrap();
        assert_eq!((settings.api_cidrs.len(), settings.dns_cidrs.len(), settings.denied_cidrs.len()), (2, 1, 1));
        assert_eq!(settings.runtime_classes, ["gvisor", "kata"]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (name, value, named) in [
            ("CONCURENCY", "7", "concurency"),
            ("CONCURRENCY", "0", "CONCURRENCY"),
            ("API_URL", "ftp://api", "API_URL"),
            ("API_CIDRS", "192.0.2.7/32", "API_NAMESPACE"),
            ("API_POD_LABELS", "api", "API_POD_LABELS"),
            ("NAMESPACE_PREFIX", "much-too-long-", "NAMESPACE_PREFIX"),
            ("NAMESPACE_PREFIX", "A-", "NAMESPACE_PREFIX"),
            ("MAX_CONCURRENT_ROLLOUTS", "0", "MAX_CONCURRENT_ROLLOUTS"),
            ("DENIED_CIDRS", "everything", "denied_cidrs"),
        ] {
            let error = read(&[(name, value)]).unwrap_err();
            assert!(error.contains(named), "{name}: {error}");
        }
    }
}
