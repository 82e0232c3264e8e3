//! The real server, started in one line, on a database and a port of its own.

use std::env;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use sea_orm::DatabaseConnection;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::watch;

use crate::PATIENCE;
use crate::client::{Client, GraphqlResponse};
use crate::key::random_key;
use crate::model_server::ModelServer;
use crate::postgres::{self, PostgresDatabase};
use crate::redis::RedisServer;
use crate::scope::{EndBy, Scope};

/// The key that the server has for the scripted provider.
pub const PROVIDER_KEY: &str = "test-key";

/// The catalogue's name of the scripted server's model. It costs, per million tokens, 1 USD of input,
/// 2 of output, 0.50 read from the cache and 1.25 written to it.
pub const SCRIPTED_MODEL: &str = "scripted";

/// The `cloister` binary, running. Dropping it kills the server and removes its database.
pub struct TestApp {
    /// The platform admin's key.
    pub admin_key: String,
    environment: Vec<(String, String)>,
    address: SocketAddr,
    runtime_address: SocketAddr,
    server: Option<Child>,
    log: Arc<Mutex<String>>,
    database_url: String,
    // Dropped after the server, which has files and connections open in them.
    _database: Option<PostgresDatabase>,
    directory: TempDir,
}

/// A tenant of a [`TestApp`] with one key that may do everything.
#[derive(Clone)]
pub struct Tenant {
    /// Its id.
    pub id: String,
    /// The key, with all scopes.
    pub key: String,
    /// A client that has the key.
    pub client: Client,
}

/// What a [`TestApp`] is started with.
#[derive(Default)]
#[must_use]
pub struct TestAppBuilder {
    uses_postgres: bool,
    database_url: Option<String>,
    model_url: Option<String>,
    environment: Vec<(String, String)>,
    config: String,
}

impl TestAppBuilder {
    /// A database in PostgreSQL in place of an SQLite file.
    pub fn postgres(mut self) -> Self {
        self.uses_postgres = true;
        self
    }

    /// A database that the test has: PostgreSQL's, or an SQLite file in a place of its choice.
    pub fn database_url(mut self, url: &str) -> Self {
        self.database_url = Some(url.to_owned());
        self
    }

    /// The provider `scripted` and its model [`SCRIPTED_MODEL`], answered by `model`.
    pub fn model_server(self, model: &ModelServer) -> Self {
        self.model_url(&model.url())
    }

    /// The same, answered by whatever speaks OpenAI's API at the base URL `url`.
    pub fn model_url(mut self, url: &str) -> Self {
        self.model_url = Some(url.to_owned());
        self
    }

    /// Replicas tell each other through `redis`.
    pub fn redis(self, redis: &RedisServer) -> Self {
        self.env("CLOISTER_REDIS__URL", &redis.url())
    }

    /// A variable of the server's environment, over what the app sets itself.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Lines of TOML for the server's configuration file, after the app's own.
    pub fn config(mut self, toml: &str) -> Self {
        self.config.push_str(toml);
        self.config.push('\n');
        self
    }

    /// Migrates the database and starts the server; returns once it listens.
    ///
    /// # Panics
    /// It doesn't start; the message has its log.
    pub async fn start(self) -> TestApp {
        let directory = Scope::current().directory();
        let database = if self.uses_postgres { Some(PostgresDatabase::create().await) } else { None };
        let database_url = match (&database, self.database_url.clone()) {
            (_, Some(url)) => url,
            (Some(database), None) => database.url().to_owned(),
            (None, None) => format!("sqlite://{}", directory.path().join("cloister.db").display()),
        };
        let config_path = directory.path().join("cloister.toml");
        fs::write(&config_path, self.config_file()).expect("the configuration file is written");
        let admin_key = random_key();
        let set = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let mut environment = vec![
            set("CLOISTER_CONFIG", &config_path.display().to_string()),
            set("CLOISTER_SERVER__LISTEN", "127.0.0.1:0"),
            set("CLOISTER_SERVER__RUNTIME_LISTEN", "127.0.0.1:0"),
            set("CLOISTER_DATABASE__URL", &database_url),
            set("CLOISTER_ADMIN__KEY", &admin_key),
            set("CLOISTER_SECRETS__KEY", &BASE64_STANDARD.encode(rand::random::<[u8; 32]>())),
            set("CLOISTER_LOG__FORMAT", "json"),
            set("CLOISTER_WEBHOOKS__ALLOWED_HOSTS", "127.0.0.1"),
        ];
        if let Some(url) = &self.model_url {
            environment.push(set("CLOISTER_PROVIDERS__SCRIPTED__BASE_URL", url));
            environment.push(set("CLOISTER_PROVIDERS__SCRIPTED__API_KEY", PROVIDER_KEY));
        }
        environment.extend(self.environment);
        let mut app = TestApp {
            admin_key,
            environment,
            address: ([127, 0, 0, 1], 0).into(),
            runtime_address: ([127, 0, 0, 1], 0).into(),
            server: None,
            log: Arc::default(),
            database_url,
            _database: database,
            directory,
        };
        app.migrate();
        app.serve().await;
        app
    }

    fn config_file(&self) -> String {
        let model = if self.model_url.is_some() { scripted_model() } else { String::new() };
        format!("{model}\n{}", self.config)
    }
}

/// [`SCRIPTED_MODEL`] as a configuration file has it.
pub fn scripted_model() -> String {
    format!(
        r#"
[[models]]
name = "{SCRIPTED_MODEL}"
provider = "scripted"
upstream = "scripted-1"
context_window = 128000
max_output_tokens = 16384
[models.price]
input = "1.00"
output = "2.00"
cache_read = "0.50"
cache_write = "1.25"
"#
    )
}

impl TestApp {
    /// A server on SQLite with nothing but the built-in models.
    pub async fn start() -> TestApp {
        TestApp::builder().start().await
    }

    /// A server with more to it.
    pub fn builder() -> TestAppBuilder {
        TestAppBuilder::default()
    }

    /// Starts another replica: on this one's database, with its configuration, keys and Redis, on a port of its own.
    /// It is to be dropped before this one.
    ///
    /// # Panics
    /// It doesn't start; the message has its log.
    pub async fn replica(&self) -> TestApp {
        let mut replica = TestApp {
            admin_key: self.admin_key.clone(),
            environment: self.environment.clone(),
            address: ([127, 0, 0, 1], 0).into(),
            runtime_address: ([127, 0, 0, 1], 0).into(),
            server: None,
            log: Arc::default(),
            database_url: self.database_url.clone(),
            _database: None,
            directory: Scope::current().directory(),
        };
        replica.serve().await;
        replica
    }

    /// The server's base URL, `http://127.0.0.1:PORT`. It stays the same over restarts.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The server's base URL for workers apart. It stays the same over restarts.
    pub fn runtime_url(&self) -> String {
        format!("http://{}", self.runtime_address)
    }

    /// The server's WebSocket URL for GraphQL.
    pub fn ws_url(&self) -> String {
        format!("ws://{}/graphql", self.address)
    }

    /// Where the server listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The server's process id; none while it isn't running.
    pub fn pid(&self) -> Option<u32> {
        self.server.as_ref().map(Child::id)
    }

    /// A client that has the platform admin's key.
    pub fn admin(&self) -> Client {
        Client::new(&self.url(), &self.admin_key)
    }

    /// A client that has this key.
    pub fn client(&self, key: &str) -> Client {
        Client::new(&self.url(), key)
    }

    /// A client that has no key.
    pub fn anonymous(&self) -> Client {
        Client::anonymous(&self.url())
    }

    /// A new tenant on the plan PRO, whose rate limit leaves a test room, with a key that has every scope.
    pub async fn tenant(&self, name: &str) -> Tenant {
        self.tenant_with(name, json!({"plan": "PRO"})).await
    }

    /// A new tenant with these fields of `CreateTenantInput`, with a key that has every scope.
    pub async fn tenant_with(&self, name: &str, fields: Value) -> Tenant {
        let admin = self.admin();
        let mut input = json!({"name": name, "email": format!("{name}@example.test").replace(' ', "-")});
        let overrides = fields.as_object().expect("fields of CreateTenantInput").clone();
        input.as_object_mut().expect("an object").extend(overrides);
        let create_tenant = "mutation ($input: CreateTenantInput!) {
            createTenant(input: $input) { tenant { id } errors { code message field } }
        }";
        let created = admin.query(create_tenant, json!({"input": input})).await;
        let id = text(&created, "createTenant", "/tenant/id");
        let create_key = "mutation ($input: CreateApiKeyInput!) {
            createApiKey(input: $input) { secret errors { code message field } }
        }";
        let input = json!({"tenantId": id, "name": "test", "scopes": ["READ", "RUN", "MANAGE", "BILLING"]});
        let created = admin.query(create_key, json!({"input": input})).await;
        let key = text(&created, "createApiKey", "/secret");
        Tenant { id, client: self.client(&key), key }
    }

    /// Ends the server as a crash would: SIGKILL, at once.
    pub fn kill(&mut self) {
        if let Some(mut server) = self.server.take() {
            let _ = server.kill();
            let _ = server.wait();
            Scope::current().disown(server.id());
        }
    }

    /// Has the server's process stand still, as a machine would that does: connections stay, and nothing answers.
    pub fn pause(&self) {
        self.signal("STOP");
    }

    /// Lets a paused server go on.
    pub fn resume(&self) {
        self.signal("CONT");
    }

    fn signal(&self, name: &str) {
        signal(self.server.as_ref().expect("the server is running").id(), name);
    }

    /// Asks the server to end with SIGTERM, and waits until it has.
    ///
    /// # Panics
    /// It isn't running, or doesn't end within [`PATIENCE`].
    pub async fn terminate(&mut self) -> ExitStatus {
        let mut server = self.server.take().expect("the server is running");
        let pid = server.id();
        signal(pid, "TERM");
        let ended = tokio::task::spawn_blocking(move || server.wait());
        match tokio::time::timeout(PATIENCE, ended).await {
            Ok(status) => {
                Scope::current().disown(pid);
                status.expect("the wait is not cancelled").expect("the server can be waited for")
            }
            Err(_) => {
                signal(pid, "KILL");
                panic!("the server does not end on SIGTERM; its log:\n{}", self.log());
            }
        }
    }

    /// Starts the server again, on the same database and port. One that runs is killed first.
    ///
    /// # Panics
    /// It doesn't start; the message has its log.
    pub async fn restart(&mut self) {
        self.kill();
        self.serve().await;
    }

    /// Changes a variable of the environment for the next [`TestApp::restart`].
    pub fn set_env(&mut self, name: &str, value: &str) {
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    /// Everything that the server has printed, over all restarts.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// The database's URL.
    pub fn database_url(&self) -> &str {
        &self.database_url
    }

    /// A connection to the server's database, to look at the tables.
    ///
    /// # Panics
    /// It can't be reached.
    pub async fn database(&self) -> DatabaseConnection {
        postgres::connect(&self.database_url).await.expect("the server's database")
    }

    /// Runs a subcommand of the binary, such as `["schema"]`, with the server's environment.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = command("cloister");
        // In its own directory, it finds no configuration file but the one it is given.
        command.args(arguments).envs(self.environment.iter().cloned()).current_dir(self.directory.path());
        command
    }

    fn migrate(&self) {
        let output = self.command(&["migrate"]).output().expect("cloister runs");
        let printed = [output.stdout, output.stderr].concat();
        self.log.lock().unwrap().push_str(&String::from_utf8_lossy(&printed));
        assert!(output.status.success(), "`cloister migrate` failed ({}):\n{}", output.status, self.log());
    }

    async fn serve(&mut self) {
        let mut command = self.command(&["serve"]);
        // The first start chooses the port, later ones keep it.
        if self.address.port() != 0 {
            command.env("CLOISTER_SERVER__LISTEN", self.address.to_string());
            command.env("CLOISTER_SERVER__RUNTIME_LISTEN", self.runtime_address.to_string());
        }
        let mut server = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("cloister runs");
        Scope::current().adopt(server.id(), EndBy::Kill);
        let state = watch::Sender::new(ServerState::Starting);
        let mut listening = state.subscribe();
        let stdout = server.stdout.take().expect("piped");
        let stderr = server.stderr.take().expect("piped");
        self.server = Some(server);
        capture(stderr, self.log.clone(), |_| {});
        // The sender goes with the thread: that is how the end of the server is told.
        capture(stdout, self.log.clone(), move |line| {
            if let Some((address, runtime_address)) = listening_addresses(line) {
                state.send_replace(ServerState::Listening(address, runtime_address));
            }
        });
        let is_listening = listening.wait_for(|state| matches!(state, ServerState::Listening(..)));
        let found = match tokio::time::timeout(PATIENCE, is_listening).await {
            Ok(Ok(state)) => *state,
            Ok(Err(_)) | Err(_) => ServerState::Starting,
        };
        match found {
            ServerState::Listening(address, runtime_address) => {
                self.address = address;
                self.runtime_address = runtime_address;
            }
            ServerState::Starting => {
                self.kill();
                panic!("`cloister serve` does not listen; its log:\n{}", self.log());
            }
        }
    }
}

impl Drop for TestApp {
    fn drop(&mut self) {
        self.kill();
        if thread::panicking() {
            eprintln!("── the server's log ──\n{}", self.log.lock().map(|log| log.clone()).unwrap_or_default());
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum ServerState {
    Starting,
    Listening(SocketAddr, SocketAddr),
}

/// The addresses in the log line that says that the server listens: for clients, and for workers.
fn listening_addresses(line: &str) -> Option<(SocketAddr, SocketAddr)> {
    let fields = listening(line)?;
    let address = |name: &str| fields[name].as_str()?.parse().ok();
    Some((address("address")?, address("runtime_address")?))
}

/// The fields of the log line in which a process says that it listens.
pub(crate) fn listening(line: &str) -> Option<Value> {
    let event: Value = serde_json::from_str(line).ok()?;
    // tracing's JSON puts an event's fields under `fields` unless it is told to flatten them.
    let fields = if event["fields"].is_object() { event["fields"].clone() } else { event };
    (fields["message"] == "listening").then_some(fields)
}

/// Reads a pipe to its end, line by line, whatever the test does meanwhile.
pub(crate) fn capture(
    pipe: impl Read + Send + 'static,
    log: Arc<Mutex<String>>,
    mut seen: impl FnMut(&str) + Send + 'static,
) {
    thread::spawn(move || {
        for line in BufReader::new(pipe).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line);
            {
                let mut log = log.lock().unwrap();
                log.push_str(&line);
                log.push('\n');
            }
            seen(&line);
        }
    });
}

/// Sends a signal; the shell has the call built in.
pub(crate) fn signal(pid: u32, name: &str) {
    let _ = Command::new("sh").args(["-c", r#"kill -"$1" "$2""#, "signal", name, &pid.to_string()]).status();
}

/// A binary of the workspace, which lies beside the directory of the test's own.
pub(crate) fn binary(name: &str) -> PathBuf {
    let own = env::current_exe().expect("the test's own path");
    let mut candidates = own.ancestors().skip(1).take(2).map(|directory| directory.join(name));
    let found = candidates.find(|path| path.is_file());
    found.unwrap_or_else(|| panic!("`{name}` is not built: run `cargo build` first, with the profile of the tests"))
}

/// A command of a binary of the workspace that inherits none of our variables.
pub(crate) fn command(name: &str) -> Command {
    let mut command = Command::new(binary(name));
    let inherited = env::vars_os().map(|(name, _)| name);
    for name in inherited.filter(|name| {
        let name = name.to_string_lossy();
        name.starts_with("CLOISTER_") || name.starts_with("OPENAI_") || name == "RUST_LOG"
    }) {
        command.env_remove(name);
    }
    // In its own process group, Ctrl-C does not reach it before the test.
    command.process_group(0).stdin(Stdio::null());
    command
}

fn text(response: &GraphqlResponse, mutation: &str, pointer: &str) -> String {
    let value = response.payload(mutation).pointer(pointer).and_then(Value::as_str);
    value.unwrap_or_else(|| panic!("{mutation} lacks {pointer}: {}", response.body)).to_owned()
}
