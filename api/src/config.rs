//! The configuration, a struct per section: defaults, then `cloister.toml` (or the file that
//! `CLOISTER_CONFIG` names), then `CLOISTER_SECTION__FIELD` variables.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::path::Path;

use config::{Environment, File, FileFormat};
use rust_decimal::Decimal;
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use url::Url;

/// Variables that hold several values, separated by commas.
const LISTS: [&str; 2] = ["CLOISTER_WEBHOOKS__ALLOWED_HOSTS", "CLOISTER_SECRETS__PREVIOUS_KEYS"];

/// All of it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where the server listens.
    pub server: ServerConfig,
    /// The database.
    pub database: DatabaseConfig,
    /// What replicas tell each other through.
    pub redis: RedisConfig,
    /// How long what grows for ever is kept.
    pub retention: RetentionConfig,
    /// The platform's own administrator.
    pub admin: AdminConfig,
    /// What seals secrets at rest.
    pub secrets: SecretsConfig,
    /// Providers of models, by name. `demo` is built in, `openai` needs only its key.
    pub providers: BTreeMap<String, ProviderConfig>,
    /// The built-in provider `demo`.
    pub demo: DemoConfig,
    /// Models beside, or in place of, the built-in ones.
    pub models: Vec<ModelConfig>,
    /// Plans in place of the built-in ones, by name.
    pub plans: BTreeMap<String, PlanConfig>,
    /// How runs are executed.
    pub runs: RunsConfig,
    /// Clusters with objects `Tenant`.
    pub cluster: ClusterConfig,
    /// How tenants' webhooks are called.
    pub webhooks: WebhooksConfig,
    /// Limits of GraphQL requests.
    pub graphql: GraphqlConfig,
    /// What is logged, and how.
    pub log: LogConfig,
}

/// `server`
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServerConfig {
    /// Address and port for clients.
    pub listen: SocketAddr,
    /// Address and port for workers and operators (`/runtime/v1`, `/operator/v1`): not for the public.
    pub runtime_listen: SocketAddr,
    /// Bytes of a request's body.
    pub max_body_bytes: usize,
    /// Seconds that SIGTERM waits for what is in flight.
    pub shutdown_seconds: u64,
    /// Seconds that `POST /v1/run` waits for the run's end before it answers 504.
    pub run_wait_seconds: u64,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            runtime_listen: SocketAddr::from(([127, 0, 0, 1], 8081)),
            max_body_bytes: 1024 * 1024,
            shutdown_seconds: 25,
            run_wait_seconds: 120,
        }
    }
}

/// `database`
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DatabaseConfig {
    /// `sqlite://path` or `postgres://…`.
    pub url: String,
    /// Connections: PostgreSQL's all, SQLite's for reading (it has one writer).
    pub max_connections: u32,
    /// SQLite only: whether each commit waits for the disk.
    pub synchronous: Synchronous,
}

impl Default for DatabaseConfig {
    fn default() -> Self {
        Self { url: "sqlite://cloister.db".to_owned(), max_connections: 16, synchronous: Synchronous::Normal }
    }
}

/// SQLite's `synchronous` pragma.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Synchronous {
    /// A power cut may lose the last commits, never break the file.
    Normal,
    /// Each commit is on the disk.
    Full,
}

/// `redis`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RedisConfig {
    /// `redis://…` or `rediss://…`. Needed where several replicas serve one PostgreSQL; without it a replica hears of
    /// the others by polling.
    pub url: Option<SecretString>,
}

/// `retention`: months that rows are kept beyond the month they are from; 0 keeps them for ever.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RetentionConfig {
    /// Runs' items.
    pub items_months: u32,
    /// Usage records. Totals, counters and invoices stay.
    pub usage_months: u32,
}

/// `admin`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdminConfig {
    /// The platform admin's key, 32 characters at least. Without it one is made at the first start.
    pub key: Option<SecretString>,
}

/// `secrets`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SecretsConfig {
    /// 32 bytes in base64: seals webhook secrets and tokens at rest.
    pub key: Option<SecretString>,
    /// Earlier keys, in base64: they open what they sealed.
    pub previous_keys: Vec<SecretString>,
}

/// `providers.NAME`
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ProviderConfig {
    /// Up to and including `/v1`. `openai` has OpenAI's.
    pub base_url: Option<Url>,
    /// Sent as a bearer token.
    pub api_key: Option<SecretString>,
    /// How it is spoken to; a model may say otherwise.
    pub api: ProviderApi,
    /// Whether it takes a model's reasoning back over Chat Completions. By default, models named after DeepSeek get their
    /// own.
    pub replay_reasoning: Option<bool>,
    /// Milliseconds until a connection must stand.
    pub connect_timeout_ms: u64,
    /// Milliseconds from the request until the answer's head.
    pub first_byte_timeout_ms: u64,
    /// Milliseconds between two parts of an answer.
    pub idle_timeout_ms: u64,
    /// Bytes of an answer.
    pub max_response_bytes: usize,
    /// How often one model call is tried.
    pub attempts: u32,
}

impl Default for ProviderConfig {
    fn default() -> Self {
        Self {
            base_url: None,
            api_key: None,
            api: ProviderApi::Chat,
            replay_reasoning: None,
            connect_timeout_ms: 5_000,
            first_byte_timeout_ms: 60_000,
            idle_timeout_ms: 60_000,
            max_response_bytes: 8 * 1024 * 1024,
            attempts: 3,
        }
    }
}

/// OpenAI's two APIs for models.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProviderApi {
    /// Chat Completions, which every compatible server speaks.
    #[default]
    Chat,
    /// The Responses API, which keeps reasoning between turns and has tools of its own.
    Responses,
}

/// `demo`
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DemoConfig {
    /// Milliseconds that its model takes for a word.
    pub word_ms: u64,
}

impl Default for DemoConfig {
    fn default() -> Self {
        Self { word_ms: 15 }
    }
}

/// `[[models]]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// The name agents use.
    pub name: String,
    /// One of `providers`.
    pub provider: String,
    /// The provider's name for it; `name` unless given.
    pub upstream: Option<String>,
    /// How it is spoken to; as its provider says unless given.
    pub api: Option<ProviderApi>,
    /// Tokens of input and output together.
    pub context_window: i32,
    /// Tokens of a response.
    pub max_output_tokens: i32,
    /// What it costs.
    pub price: PriceConfig,
}

/// `models.price`: US dollars for a million tokens.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PriceConfig {
    /// Uncached input.
    pub input: Decimal,
    /// Output, reasoning included.
    pub output: Decimal,
    /// Input read from the provider's cache; `input` unless given.
    pub cache_read: Option<Decimal>,
    /// Input written to the provider's cache; `input` unless given.
    pub cache_write: Option<Decimal>,
}

/// `plans.NAME`; amounts in US dollars.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanConfig {
    /// For a month.
    pub base_price: Decimal,
    /// Tokens a month in the base price.
    pub included_tokens: i64,
    /// For a million tokens beyond; left out: nothing is sold beyond.
    pub overage_per_million: Option<Decimal>,
    /// The hard limit in tokens a month.
    pub monthly_token_limit: i64,
    /// Runs at once.
    pub max_concurrent_runs: i32,
    /// Requests a minute.
    pub requests_per_minute: i32,
    /// Share of a busy pool.
    pub weight: i32,
    /// Where its tenants' runs execute: by default `dedicated` for enterprise, `shared` for the others.
    pub isolation: Option<PlanIsolation>,
}

/// Where a plan's runs execute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PlanIsolation {
    /// In the api's own pool.
    Shared,
    /// On the tenant's own workers.
    Dedicated,
}

/// `runs`
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RunsConfig {
    /// Runs that this process executes at once.
    pub concurrency: usize,
    /// Seconds a claim holds without renewal.
    pub lease_seconds: u64,
    /// Seconds a run may take, from its first claim, unless it says otherwise.
    pub timeout_seconds: u32,
    /// The most seconds a run may ask for.
    pub max_timeout_seconds: u32,
    /// Seconds that a run waits for a decision about a tool's call until it fails.
    pub approval_timeout_seconds: u32,
    /// Milliseconds a model call waits for others' reservations to be released.
    pub quota_wait_ms: u64,
}

impl Default for RunsConfig {
    fn default() -> Self {
        Self {
            concurrency: 256,
            lease_seconds: 30,
            timeout_seconds: 3_600,
            max_timeout_seconds: 86_400,
            approval_timeout_seconds: 604_800,
            quota_wait_ms: 60_000,
        }
    }
}

/// `cluster`
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ClusterConfig {
    /// Enterprise tenants get an object `Tenant` in the api's own cluster, and what GraphQL changes of a tenant is written
    /// to its object. Needs a way to the cluster: from within it, or by `KUBECONFIG`.
    pub enabled: bool,
    /// A key for operators, 32 characters at least: for a cluster that the api can't ask.
    pub operator_key: Option<SecretString>,
    /// The operator's ServiceAccount in the api's own cluster, as `namespace/name`.
    pub operator_service_account: Option<String>,
    /// The audience that the ServiceAccount's tokens must be for.
    pub audience: String,
}

impl Default for ClusterConfig {
    fn default() -> Self {
        Self { enabled: false, operator_key: None, operator_service_account: None, audience: "cloister-api".to_owned() }
    }
}

impl ClusterConfig {
    /// Whether the api has to ask its own cluster.
    pub fn needs_cluster(&self) -> bool {
        self.enabled || self.operator_service_account.is_some()
    }

    fn validate(&self) -> Result<(), ConfigError> {
        let refuse = |message: &str| Err(ConfigError(message.to_owned()));
        if self.operator_key.as_ref().is_some_and(|key| key.expose_secret().len() < 32) {
            return refuse("cluster.operator_key must have 32 characters at least");
        }
        let is_account = |account: &String| {
            account.split_once('/').is_some_and(|(namespace, name)| {
                !namespace.is_empty() && !name.is_empty() && !name.contains('/') && !account.contains(':')
            })
        };
        if !self.operator_service_account.as_ref().is_none_or(is_account) {
            return refuse("cluster.operator_service_account must be written as namespace/name");
        }
        if self.audience.is_empty() {
            return refuse("cluster.audience must not be empty");
        }
        Ok(())
    }
}

/// `webhooks`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WebhooksConfig {
    /// Hosts (`host` or `host:port`) that may have private addresses.
    pub allowed_hosts: Vec<String>,
}

/// `graphql`
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GraphqlConfig {
    /// Levels of selections.
    pub max_depth: usize,
    /// Levels of a query that only introspects.
    pub max_introspection_depth: usize,
    /// Cost of a query; a list costs its elements times `first`.
    pub max_complexity: usize,
    /// Aliased fields.
    pub max_aliases: usize,
    /// Directives.
    pub max_directives: usize,
    /// Lexical tokens.
    pub max_tokens: usize,
    /// Milliseconds of a query or mutation.
    pub timeout_ms: u64,
    /// Milliseconds until a WebSocket must have said `connection_init`.
    pub ws_init_timeout_ms: u64,
    /// Milliseconds between our pings.
    pub ws_ping_ms: u64,
    /// Operations under way on one WebSocket.
    pub max_subscriptions_per_socket: usize,
    /// WebSockets and event streams that a tenant may hold open at once, in this process.
    pub max_streams_per_tenant: usize,
}

impl Default for GraphqlConfig {
    fn default() -> Self {
        Self {
            max_depth: 12,
            max_introspection_depth: 20,
            max_complexity: 2_000,
            max_aliases: 30,
            max_directives: 20,
            max_tokens: 2_000,
            timeout_ms: 30_000,
            ws_init_timeout_ms: 3_000,
            ws_ping_ms: 20_000,
            max_subscriptions_per_socket: 100,
            max_streams_per_tenant: 5_000,
        }
    }
}

/// `log`
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// `text` for people, `json` for collectors.
    pub format: LogFormat,
    /// A `tracing` filter, such as `info` or `cloister_api=debug`.
    pub filter: String,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { format: LogFormat::Text, filter: "info,sea_orm_migration=warn,sqlx=warn".to_owned() }
    }
}

/// How a log line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// An object a line.
    Json,
}

/// Why the configuration is refused; names the field.
#[derive(Debug, thiserror::Error)]
#[error("configuration: {0}")]
pub struct ConfigError(pub String);

impl Config {
    /// Reads the file and the process's environment.
    pub fn load() -> Result<Self, ConfigError> {
        Self::from_sources(std::env::vars().collect())
    }

    /// Reads the file that `CLOISTER_CONFIG` names (or `cloister.toml`, if there is one), then the
    /// `CLOISTER_` variables among `env`.
    pub fn from_sources(env: HashMap<String, String>) -> Result<Self, ConfigError> {
        let file = match env.get("CLOISTER_CONFIG") {
            Some(path) => File::new(path, FileFormat::Toml).required(true),
            None => File::new("cloister.toml", FileFormat::Toml).required(false),
        };
        // Only lists are parsed: a key or a password that looks like a number must stay as it was written.
        let (lists, texts) = env
            .into_iter()
            .filter(|(name, _)| {
                name.starts_with("CLOISTER_") && name.contains("__") && !name.starts_with("CLOISTER_TEST_")
            })
            .partition(|(name, _)| LISTS.contains(&name.as_str()));
        let environment = |variables: HashMap<String, String>| {
            let environment = Environment::with_prefix("CLOISTER").prefix_separator("_").separator("__");
            environment.source(Some(variables))
        };
        let config: Config = config::Config::builder()
            .add_source(file)
            .add_source(environment(texts))
            .add_source(environment(lists).try_parsing(true).list_separator(","))
            .build()
            .and_then(config::Config::try_deserialize)
            .map_err(|error| ConfigError(error.to_string()))?;
        config.validate()?;
        Ok(config)
    }

    /// What no single field's type can say.
    fn validate(&self) -> Result<(), ConfigError> {
        let refuse = |message: String| Err(ConfigError(message));
        if !self.database.url.starts_with("sqlite:") && !self.database.url.starts_with("postgres") {
            return refuse("database.url must begin with sqlite: or postgres:".to_owned());
        }
        if self.database.url.contains(":memory:") || self.database.url.contains("mode=memory") {
            return refuse(
                "database.url must name a file: a database in memory is lost with its connection".to_owned(),
            );
        }
        if self.admin.key.as_ref().is_some_and(|key| key.expose_secret().len() < 32) {
            return refuse("admin.key must have 32 characters at least".to_owned());
        }
        if self.database.max_connections == 0 {
            return refuse("database.max_connections must be at least 1".to_owned());
        }
        if self.database.url.starts_with("postgres") && Url::parse(&self.database.url).is_err() {
            // Not shown: it may hold a password.
            return refuse("database.url is not a URL: write postgres://user:password@host:port/database".to_owned());
        }
        if let Some(url) = &self.redis.url
            && !Url::parse(url.expose_secret()).is_ok_and(|url| matches!(url.scheme(), "redis" | "rediss"))
        {
            // Not shown: it may hold a password.
            return refuse("redis.url must begin with redis:// or rediss://".to_owned());
        }
        if self.redis.url.is_some() && self.database.url.starts_with("sqlite:") {
            return refuse("redis.url joins the replicas of a PostgreSQL; SQLite is served by one process".to_owned());
        }
        self.validate_times()?;
        self.cluster.validate()?;
        for (name, provider) in &self.providers {
            if name == "demo" {
                return refuse("providers.demo is built in and can't be configured".to_owned());
            }
            if provider.base_url.is_none() && name != "openai" {
                return refuse(format!("providers.{name}.base_url is missing"));
            }
            if provider.base_url.as_ref().is_some_and(|url| !matches!(url.scheme(), "http" | "https")) {
                return refuse(format!("providers.{name}.base_url must be an http or https URL"));
            }
            if provider.attempts == 0 {
                return refuse(format!("providers.{name}.attempts must be at least 1"));
            }
        }
        for (at, model) in self.models.iter().enumerate() {
            let known =
                matches!(model.provider.as_str(), "demo" | "openai") || self.providers.contains_key(&model.provider);
            if !known {
                return refuse(format!("models[{at}].provider: no provider is named {:?}", model.provider));
            }
            if self.models[..at].iter().any(|other| other.name == model.name) {
                return refuse(format!("models[{at}].name: {:?} is there twice", model.name));
            }
            if model.name.is_empty() || model.context_window <= 0 || model.max_output_tokens <= 0 {
                return refuse(format!(
                    "models[{at}]: name, context_window and max_output_tokens must be given and positive"
                ));
            }
            let price = &model.price;
            let prices = [Some(price.input), Some(price.output), price.cache_read, price.cache_write];
            if prices.into_iter().flatten().any(|amount| amount.is_sign_negative()) {
                return refuse(format!("models[{at}].price must not be negative"));
            }
        }
        for (name, plan) in &self.plans {
            if !matches!(name.as_str(), "free" | "pro" | "enterprise") {
                return refuse(format!("plans.{name}: plans are named free, pro and enterprise"));
            }
            let positive = plan.weight > 0 && plan.requests_per_minute > 0 && plan.max_concurrent_runs > 0;
            if !positive
                || plan.monthly_token_limit < 0
                || plan.included_tokens < 0
                || plan.base_price.is_sign_negative()
                || plan.overage_per_million.is_some_and(|amount| amount.is_sign_negative())
            {
                return refuse(format!(
                    "plans.{name}: amounts must not be negative, weights and rates must be positive"
                ));
            }
        }
        if self.runs.concurrency == 0 || self.runs.lease_seconds < 3 || self.runs.approval_timeout_seconds == 0 {
            let fields = "runs.concurrency and runs.approval_timeout_seconds";
            return refuse(format!("{fields} must be at least 1, runs.lease_seconds at least 3"));
        }
        if self.runs.timeout_seconds == 0 || self.runs.timeout_seconds > self.runs.max_timeout_seconds {
            return refuse("runs.timeout_seconds must lie between 1 and runs.max_timeout_seconds".to_owned());
        }
        Ok(())
    }

    /// Times that fit every clock: a week at most.
    fn validate_times(&self) -> Result<(), ConfigError> {
        const WEEK: u64 = 7 * 24 * 3_600;
        let mut times = vec![
            ("server.shutdown_seconds".to_owned(), self.server.shutdown_seconds, WEEK),
            ("server.run_wait_seconds".to_owned(), self.server.run_wait_seconds, WEEK),
            ("runs.lease_seconds".to_owned(), self.runs.lease_seconds, WEEK),
            ("runs.max_timeout_seconds".to_owned(), self.runs.max_timeout_seconds.into(), WEEK),
            ("runs.quota_wait_ms".to_owned(), self.runs.quota_wait_ms, WEEK * 1_000),
            ("graphql.timeout_ms".to_owned(), self.graphql.timeout_ms, WEEK * 1_000),
            ("graphql.ws_init_timeout_ms".to_owned(), self.graphql.ws_init_timeout_ms, WEEK * 1_000),
            ("graphql.ws_ping_ms".to_owned(), self.graphql.ws_ping_ms, WEEK * 1_000),
        ];
        for (name, provider) in &self.providers {
            let field = |field: &str| format!("providers.{name}.{field}");
            times.push((field("connect_timeout_ms"), provider.connect_timeout_ms, WEEK * 1_000));
            times.push((field("first_byte_timeout_ms"), provider.first_byte_timeout_ms, WEEK * 1_000));
            times.push((field("idle_timeout_ms"), provider.idle_timeout_ms, WEEK * 1_000));
        }
        match times.into_iter().find(|(_, value, most)| value > most) {
            Some((field, _, most)) => Err(ConfigError(format!("{field} may be {most} at most"))),
            None => Ok(()),
        }
    }

    /// The file of an SQLite database; none for PostgreSQL.
    pub fn sqlite_path(&self) -> Option<&Path> {
        let rest = self.database.url.strip_prefix("sqlite:")?;
        let rest = rest.strip_prefix("//").unwrap_or(rest);
        Some(Path::new(rest.split('?').next().unwrap_or(rest)))
    }
}
