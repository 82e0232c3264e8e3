//! The real operator, `cloister-operator`, started in one line beside a cluster and an api.

use std::ops::{Deref, DerefMut};
use std::path::Path;

use tempfile::TempDir;

use crate::app::{TestApp, command};
use crate::process::Process;
use crate::scope::Scope;

/// The key that operators of tests have, for the api's `cluster.operator_key`.
pub const OPERATOR_KEY: &str = "an-operator-key-of-32-characters-or-more";

/// The namespace of its Lease.
pub const OPERATOR_NAMESPACE: &str = "cloister-system";

/// The `cloister-operator` binary, running. Dropping it kills it.
pub struct Operator {
    process: Process,
    builder: OperatorBuilder,
    // Dropped after the process, which has files open in it.
    _directory: TempDir,
}

/// What an [`Operator`] is started with.
#[derive(Clone)]
#[must_use]
pub struct OperatorBuilder {
    environment: Vec<(String, String)>,
}

impl OperatorBuilder {
    /// A variable of the operator's environment, such as `CLOISTER_OPERATOR__DRAIN_SECONDS`.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Starts it; returns once it listens, which is before it leads.
    ///
    /// # Panics
    /// It doesn't start; the message has its log.
    pub async fn start(self) -> Operator {
        let directory = Scope::current().directory();
        let key = directory.path().join("key");
        std::fs::write(&key, OPERATOR_KEY).expect("the key is written");
        let mut command = command("cloister-operator");
        command
            .arg("run")
            .env("CLOISTER_OPERATOR__API_TOKEN_FILE", key)
            .env("CLOISTER_OPERATOR__NAMESPACE", OPERATOR_NAMESPACE)
            .env("CLOISTER_OPERATOR__RUNTIME_IMAGE", "localhost/cloister-runtime:test")
            .env("CLOISTER_OPERATOR__LISTEN", "127.0.0.1:0")
            .env("CLOISTER_OPERATOR__LOG_FORMAT", "json")
            .envs(self.environment.iter().cloned())
            .current_dir(directory.path());
        let process = Process::start("cloister-operator", command).await;
        Operator { process, builder: self, _directory: directory }
    }
}

impl Operator {
    /// An operator that acts with the rights of `kubeconfig`, for the api at `api_url`.
    pub fn builder(kubeconfig: &Path, api_url: &str) -> OperatorBuilder {
        let url: reqwest::Url = api_url.parse().expect("a URL");
        let builder = OperatorBuilder { environment: Vec::new() };
        builder
            .env("KUBECONFIG", &kubeconfig.display().to_string())
            .env("CLOISTER_OPERATOR__API_URL", api_url)
            .env("CLOISTER_OPERATOR__API_CIDRS", &format!("{}/32", url.host_str().expect("an address")))
            .env("CLOISTER_OPERATOR__API_PORT", &url.port().expect("a port").to_string())
            // The replica of before has the Lease; so it need not run out first.
            .env("CLOISTER_OPERATOR__IDENTITY", "cloister-operator-0")
    }

    /// One for an app, without anything in between.
    pub fn of(app: &TestApp, kubeconfig: &Path) -> OperatorBuilder {
        Operator::builder(kubeconfig, &app.runtime_url())
    }

    /// Starts it again as it was. One that runs is killed first.
    ///
    /// # Panics
    /// It doesn't start; the message has its log.
    pub async fn restart(&mut self) {
        self.kill();
        *self = self.builder.clone().start().await;
    }
}

impl Deref for Operator {
    type Target = Process;

    fn deref(&self) -> &Process {
        &self.process
    }
}

impl DerefMut for Operator {
    fn deref_mut(&mut self) -> &mut Process {
        &mut self.process
    }
}
