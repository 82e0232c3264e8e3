//! The worker's settings: `CLOISTER_RUNTIME__…` variables, and nothing else.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use cloister_runtime::protocol::{MAX_WORKER_NAME, is_worker_name};
use cloister_runtime::webhook::AllowedNet;
use config::Environment;
use serde::Deserialize;
use url::Url;

/// All of them.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The api's address for workers, such as `http://cloister:8081`.
    pub api_url: Url,
    /// The file that holds the token. It may be replaced at any time.
    pub token_file: PathBuf,
    /// The name that its runs are noted under; the host's unless given.
    #[serde(default)]
    pub name: Option<String>,
    /// Runs executed at once.
    #[serde(default = "defaults::concurrency")]
    pub concurrency: u32,
    /// Address and port for health and metrics.
    #[serde(default = "defaults::listen")]
    pub listen: SocketAddr,
    /// Hosts (`host` or `host:port`) of webhooks that may have private addresses.
    #[serde(default)]
    pub allowed_hosts: Vec<String>,
    /// Networks of webhooks that may be private, each with the port that is reached there (`10.1.0.0/16:8443`).
    #[serde(default)]
    pub allowed_nets: Vec<AllowedNet>,
    /// Seconds that SIGTERM waits for turns in progress.
    #[serde(default = "defaults::shutdown_seconds")]
    pub shutdown_seconds: u64,
    /// How a log line looks.
    #[serde(default)]
    pub log_format: LogFormat,
    /// A `tracing` filter, such as `info` or `cloister_runtime=debug`.
    #[serde(default = "defaults::log_filter")]
    pub log_filter: String,
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

    pub fn concurrency() -> u32 {
        50
    }

    pub fn listen() -> SocketAddr {
        SocketAddr::from(([0, 0, 0, 0], 8082))
    }

    pub fn shutdown_seconds() -> u64 {
        25
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
        let variables = Environment::with_prefix("CLOISTER_RUNTIME")
            .prefix_separator("__")
            .try_parsing(true)
            .list_separator(",")
            .with_list_parse_key("allowed_hosts")
            .with_list_parse_key("allowed_nets")
            .source(Some(env));
        let settings: Settings = config::Config::builder()
            .add_source(variables)
            .build()
            .and_then(config::Config::try_deserialize)
            .map_err(|error| format!("configuration (CLOISTER_RUNTIME__… variables): {error}"))?;
        settings.validate()?;
        Ok(settings)
    }

    fn validate(&self) -> Result<(), String> {
        if !matches!(self.api_url.scheme(), "http" | "https") || !self.api_url.has_host() {
            return Err("configuration: CLOISTER_RUNTIME__API_URL must be an http or https URL".to_owned());
        }
        if !self.name.as_deref().is_none_or(is_worker_name) {
            return Err(format!(
                "configuration: CLOISTER_RUNTIME__NAME must have 1 to {MAX_WORKER_NAME} visible ASCII characters"
            ));
        }
        if self.concurrency == 0 || self.concurrency > 10_000 {
            return Err("configuration: CLOISTER_RUNTIME__CONCURRENCY must lie between 1 and 10000".to_owned());
        }
        if self.shutdown_seconds > 7 * 24 * 3_600 {
            return Err("configuration: CLOISTER_RUNTIME__SHUTDOWN_SECONDS may be a week at most".to_owned());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(more: &[(&str, &str)]) -> Result<Settings, String> {
        let least = [("API_URL", "http://api:8081"), ("TOKEN_FILE", "/run/token"), ("OTHER", "")];
        let mut env: HashMap<String, String> =
            least[..2].iter().map(|(name, value)| (format!("CLOISTER_RUNTIME__{name}"), (*value).to_owned())).collect();
        env.extend(more.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        Settings::from_env(env)
    }

    #[test]
    fn two_variables_are_enough() {
        let settings = read(&[("CLOISTER_SERVER__LISTEN", "not ours"), ("PATH", "/bin")]).unwrap();
        assert_eq!((settings.concurrency, settings.shutdown_seconds), (50, 25));
        assert_eq!(settings.listen.to_string(), "0.0.0.0:8082");
        assert!(settings.allowed_hosts.is_empty() && settings.log_format == LogFormat::Text);
    }

    #[test]
    fn each_may_be_set() {
        let settings = read(&[
            ("CLOISTER_RUNTIME__CONCURRENCY", "7"),
            ("CLOISTER_RUNTIME__LISTEN", "127.0.0.1:0"),
            ("CLOISTER_RUNTIME__ALLOWED_HOSTS", "tools.internal,10.0.0.5:8443"),
            ("CLOISTER_RUNTIME__ALLOWED_NETS", "10.1.0.0/16:8443,fd00::/8:443"),
            ("CLOISTER_RUNTIME__SHUTDOWN_SECONDS", "3"),
            ("CLOISTER_RUNTIME__LOG_FORMAT", "json"),
            ("CLOISTER_RUNTIME__LOG_FILTER", "debug"),
        ]);
        let settings = settings.unwrap();
        assert_eq!((settings.concurrency, settings.shutdown_seconds), (7, 3));
        assert_eq!(settings.allowed_hosts, ["tools.internal", "10.0.0.5:8443"]);
        let nets: Vec<_> = settings.allowed_nets.iter().map(|it| (it.net.to_string(), it.port)).collect();
        assert_eq!(nets, [("10.1.0.0/16".to_owned(), 8443), ("fd00::/8".to_owned(), 443)]);
        assert_eq!((settings.log_format, settings.log_filter.as_str()), (LogFormat::Json, "debug"));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (name, value, named) in [
            ("CLOISTER_RUNTIME__CONCURENCY", "7", "concurency"),
            ("CLOISTER_RUNTIME__CONCURRENCY", "0", "CONCURRENCY"),
            ("CLOISTER_RUNTIME__CONCURRENCY", "many", "concurrency"),
            ("CLOISTER_RUNTIME__API_URL", "ftp://api", "API_URL"),
            ("CLOISTER_RUNTIME__ALLOWED_NETS", "10.1.0.0/16", "a network and a port"),
            ("CLOISTER_RUNTIME__LISTEN", "here", "listen"),
        ] {
            let error = read(&[(name, value)]).unwrap_err();
            assert!(error.contains(named), "{name}: {error}");
        }
        assert!(Settings::from_env(HashMap::new()).unwrap_err().contains("api_url"));
    }
}
