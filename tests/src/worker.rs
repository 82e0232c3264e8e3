//! The real worker, `cloister-runtime`, started in one line for a tenant of a [`TestApp`].

use std::fs;
use std::net::SocketAddr;
use std::process::{Child, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::watch;

use crate::app::{Tenant, TestApp, capture, command, listening, signal};
use crate::client::Client;
use crate::scope::{EndBy, Scope};
use crate::{PATIENCE, client};

/// The `cloister-runtime` binary, running. Dropping it kills it.
pub struct Worker {
    process: Option<Child>,
    address: SocketAddr,
    log: Arc<Mutex<String>>,
    directory: TempDir,
}

/// What a [`Worker`] is started with.
#[must_use]
pub struct WorkerBuilder {
    api_url: String,
    token: String,
    environment: Vec<(String, String)>,
}

impl WorkerBuilder {
    /// A variable of the worker's environment, such as `CLOISTER_RUNTIME__CONCURRENCY`.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Starts it; returns once it listens.
    ///
    /// # Panics
    /// It doesn't start; the message has its log.
    pub async fn start(self) -> Worker {
        let directory = Scope::current().directory();
        let mut worker = Worker { process: None, address: ([127, 0, 0, 1], 0).into(), log: Arc::default(), directory };
        worker.set_token(&self.token);
        let mut process = command("cloister-runtime")
            .env("CLOISTER_RUNTIME__API_URL", &self.api_url)
            .env("CLOISTER_RUNTIME__TOKEN_FILE", worker.token_file())
            .env("CLOISTER_RUNTIME__LISTEN", "127.0.0.1:0")
            .env("CLOISTER_RUNTIME__ALLOWED_HOSTS", "127.0.0.1")
            .env("CLOISTER_RUNTIME__LOG_FORMAT", "json")
            .envs(self.environment)
            .current_dir(worker.directory.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("cloister-runtime runs");
        Scope::current().adopt(process.id(), EndBy::Kill);
        let (stdout, stderr) = (process.stdout.take().expect("piped"), process.stderr.take().expect("piped"));
        worker.process = Some(process);
        let state = watch::Sender::new(None);
        let mut found = state.subscribe();
        capture(stderr, worker.log.clone(), |_| {});
        // The sender goes with the thread: that is how the end of the worker is told.
        capture(stdout, worker.log.clone(), move |line| {
            if let Some(fields) = listening(line) {
                state.send_replace(fields["address"].as_str().and_then(|address| address.parse().ok()));
            }
        });
        let listens = async { found.wait_for(Option::is_some).await.ok().and_then(|address| *address) };
        match tokio::time::timeout(PATIENCE, listens).await {
            Ok(Some(address)) => worker.address = address,
            _ => panic!("`cloister-runtime` does not listen; its log:\n{}", worker.log()),
        }
        worker
    }
}

impl Worker {
    /// A worker of the tenant, with a token made for it.
    pub async fn start(app: &TestApp, tenant: &Tenant) -> Worker {
        Worker::builder(app, &Worker::token(app, tenant).await.1).start().await
    }

    /// A worker with this token, and more to it.
    pub fn builder(app: &TestApp, token: &str) -> WorkerBuilder {
        Worker::at(&app.runtime_url(), token)
    }

    /// A worker that speaks to another address.
    pub fn at(api_url: &str, token: &str) -> WorkerBuilder {
        WorkerBuilder { api_url: api_url.to_owned(), token: token.to_owned(), environment: Vec::new() }
    }

    /// A new token of the tenant's: its id and its secret.
    pub async fn token(app: &TestApp, tenant: &Tenant) -> (String, String) {
        let create = "mutation ($input: CreateRuntimeTokenInput!) {
            createRuntimeToken(input: $input) { runtimeToken { id } secret errors { code message field } }
        }";
        let created = app.admin().query(create, json!({"input": {"tenantId": tenant.id}})).await;
        let payload = created.payload("createRuntimeToken");
        let text = |value: &Value| value.as_str().expect("a text").to_owned();
        (text(&payload["runtimeToken"]["id"]), text(&payload["secret"]))
    }

    /// Replaces the file that holds the token.
    pub fn set_token(&self, token: &str) {
        let new = self.directory.path().join("new");
        fs::write(&new, format!("{token}\n")).expect("the token is written");
        fs::rename(new, self.token_file()).expect("the token is replaced");
    }

    fn token_file(&self) -> std::path::PathBuf {
        self.directory.path().join("token")
    }

    /// A client of the worker's own address, for health and metrics.
    pub fn client(&self) -> Client {
        Client::anonymous(&format!("http://{}", self.address))
    }

    /// The body of its `/metrics`.
    pub async fn metrics(&self) -> String {
        let scraped = client::http().get(self.client().url("/metrics")).send().await.expect("the worker answers");
        scraped.text().await.expect("a text")
    }

    /// The id of its process.
    ///
    /// # Panics
    /// It isn't running.
    pub fn pid(&self) -> u32 {
        self.process.as_ref().expect("the worker is running").id()
    }

    /// Sends it a signal, such as `STOP`.
    pub fn signal(&self, name: &str) {
        signal(self.pid(), name);
    }

    /// Ends it as a crash would: SIGKILL, at once.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
            Scope::current().disown(process.id());
        }
    }

    /// Asks it to end with SIGTERM, and waits until it has.
    ///
    /// # Panics
    /// It isn't running, or doesn't end within [`PATIENCE`].
    pub async fn terminate(&mut self) -> ExitStatus {
        self.signal("TERM");
        self.ended().await
    }

    /// Waits until it has ended.
    ///
    /// # Panics
    /// It doesn't within [`PATIENCE`].
    pub async fn ended(&mut self) -> ExitStatus {
        let mut process = self.process.take().expect("the worker is running");
        let pid = process.id();
        let ended = tokio::task::spawn_blocking(move || process.wait());
        match tokio::time::timeout(PATIENCE, ended).await {
            Ok(status) => {
                Scope::current().disown(pid);
                status.expect("the wait is not cancelled").expect("the worker can be waited for")
            }
            Err(_) => {
                signal(pid, "KILL");
                panic!("the worker does not end; its log:\n{}", self.log());
            }
        }
    }

    /// Everything that it has printed.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.kill();
        if thread::panicking() {
            eprintln!("── the worker's log ──\n{}", self.log.lock().map(|log| log.clone()).unwrap_or_default());
        }
    }
}
