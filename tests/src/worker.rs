//! The real worker, `cloister-runtime`, started in one line for a tenant of a [`TestApp`].

use std::fs;
use std::ops::{Deref, DerefMut};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::app::{Tenant, TestApp, command};
use crate::process::Process;
use crate::scope::Scope;

/// The `cloister-runtime` binary, running. Dropping it kills it.
pub struct Worker {
    process: Process,
    // Dropped after the process, which has files open in it.
    directory: TempDir,
}

/// The file that holds the token.
const TOKEN: &str = "token";

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
        let token_file = directory.path().join(TOKEN);
        write_token(&directory, &self.token);
        let mut command = command("cloister-runtime");
        command
            .env("CLOISTER_RUNTIME__API_URL", &self.api_url)
            .env("CLOISTER_RUNTIME__TOKEN_FILE", token_file)
            .env("CLOISTER_RUNTIME__LISTEN", "127.0.0.1:0")
            .env("CLOISTER_RUNTIME__ALLOWED_HOSTS", "127.0.0.1")
            .env("CLOISTER_RUNTIME__LOG_FORMAT", "json")
            .envs(self.environment)
            .current_dir(directory.path());
        Worker { process: Process::start("cloister-runtime", command).await, directory }
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
        write_token(&self.directory, token);
    }
}

fn write_token(directory: &TempDir, token: &str) {
    let new = directory.path().join("new");
    fs::write(&new, format!("{token}\n")).expect("the token is written");
    fs::rename(new, directory.path().join(TOKEN)).expect("the token is replaced");
}

impl Deref for Worker {
    type Target = Process;

    fn deref(&self) -> &Process {
        &self.process
    }
}

impl DerefMut for Worker {
    fn deref_mut(&mut self) -> &mut Process {
        &mut self.process
    }
}
