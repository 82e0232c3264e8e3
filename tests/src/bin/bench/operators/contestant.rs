//! The operators that are compared, each run as it would be deployed.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use cloister_tests::Operator;
use cloister_tests::client::http;
use cloister_tests::operator::OPERATOR_KEY;
use cloister_tests::scope::{EndBy, Scope};
use tempfile::TempDir;

use super::ground::Ground;
use crate::peers::directory;

/// How long an operator may take to start or to end.
const PATIENCE: Duration = Duration::from_secs(120);

/// The image of the workers, which nobody runs.
const IMAGE: &str = "registry.example/cloister-runtime:0.1.0";

/// One of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// `cloister-operator`.
    Cloister,
    /// The same written with kopf, `tests/bench/peers/kopf/`.
    Kopf,
}

/// An operator that runs.
pub enum Contestant {
    /// Ours.
    Cloister(Box<Operator>),
    /// The peer.
    Kopf(Kopf),
}

/// The peer, which is one process.
pub struct Kopf {
    process: Child,
    port: u16,
    files: TempDir,
}

impl Contestant {
    /// Starts it; returns once it is ready.
    pub async fn start(side: Side, ground: &Ground) -> Contestant {
        let contestant = match side {
            Side::Cloister => {
                let operator = Operator::of(&ground.app, &ground.kubeconfig);
                let operator = operator.env("CLOISTER_OPERATOR__RUNTIME_IMAGE", IMAGE).start().await;
                Contestant::Cloister(Box::new(operator))
            }
            Side::Kopf => Contestant::Kopf(Kopf::start(ground)),
        };
        contestant.wait_until_ready().await;
        contestant
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        match self {
            Contestant::Cloister(operator) => operator.pid(),
            Contestant::Kopf(kopf) => kopf.process.id(),
        }
    }

    async fn wait_until_ready(&self) {
        let url = match self {
            Contestant::Cloister(operator) => operator.client().url("/readyz"),
            Contestant::Kopf(kopf) => format!("http://127.0.0.1:{}/healthz", kopf.port),
        };
        let deadline = Instant::now() + PATIENCE;
        while !http().get(&url).send().await.is_ok_and(|answer| answer.status().is_success()) {
            assert!(Instant::now() < deadline, "the operator does not become ready:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until it has looked at each of `count` tenants and is idle.
    pub async fn wait_until_settled(&self, count: usize) {
        if let Contestant::Cloister(operator) = self {
            let deadline = Instant::now() + PATIENCE;
            while looks(&operator.metrics().await) < count as f64 {
                assert!(Instant::now() < deadline, "the operator has not looked at every tenant:\n{}", self.log());
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        crate::cpu::wait_until_idle(self.pid()).await;
    }

    /// Ends it as a rollout does.
    pub async fn end(self) {
        match self {
            Contestant::Cloister(mut operator) => {
                assert!(operator.terminate().await.success(), "it ends in good order")
            }
            Contestant::Kopf(kopf) => drop(kopf),
        }
    }

    /// Whether it printed that something went wrong.
    pub fn complains(&self) -> bool {
        match self {
            Contestant::Cloister(operator) => operator.log().contains(r#""level":"ERROR""#),
            // kopf calls an error what it tries again.
            Contestant::Kopf(_) => self.log().contains("Traceback"),
        }
    }

    /// What it printed.
    pub fn log(&self) -> String {
        match self {
            Contestant::Cloister(operator) => operator.log(),
            Contestant::Kopf(kopf) => fs::read_to_string(kopf.files.path().join("log")).unwrap_or_default(),
        }
    }
}

/// Looks at tenants, as the operator counts them.
fn looks(metrics: &str) -> f64 {
    let lines = metrics.lines().filter(|line| line.starts_with("cloister_operator_reconciles_total"));
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

impl Kopf {
    fn start(ground: &Ground) -> Kopf {
        let files = Scope::current().directory();
        let key = files.path().join("key");
        fs::write(&key, OPERATOR_KEY).expect("the key is written");
        let log = fs::File::create(files.path().join("log")).expect("a log");
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|free| free.local_addr()).expect("a free port");
        let home = directory("kopf");
        let process = kopf(&home)
            .args(["run", "--all-namespaces", "--standalone", "--quiet", "handlers.py"])
            .arg(format!("--liveness=http://127.0.0.1:{}/healthz", free.port()))
            .env("KUBECONFIG", &ground.kubeconfig)
            .env("CLOISTER_OPERATOR__API_URL", ground.app.runtime_url())
            .env("CLOISTER_OPERATOR__API_TOKEN_FILE", key)
            .env("CLOISTER_OPERATOR__API_CIDRS", "127.0.0.1/32")
            .env("CLOISTER_OPERATOR__API_PORT", ground.app.runtime_url().rsplit(':').next().expect("a port"))
            .env("CLOISTER_OPERATOR__RUNTIME_IMAGE", IMAGE)
            .stdout(log.try_clone().expect("a log"))
            .stderr(log)
            .spawn()
            .expect("the peer is installed: run `make bench-operator`");
        Scope::current().adopt(process.id(), EndBy::Kill);
        Kopf { process, port: free.port(), files }
    }

    /// Its version, as it says it.
    pub fn version() -> String {
        let output = kopf(&directory("kopf")).arg("--version").output().expect("the peer is installed");
        String::from_utf8_lossy(&output.stdout).trim().rsplit(' ').next().unwrap_or_default().to_owned()
    }
}

fn kopf(home: &Path) -> Command {
    let mut command = Command::new(home.join(".venv/bin/kopf"));
    command.current_dir(home).stdin(Stdio::null()).process_group(0);
    command
}

impl Drop for Kopf {
    fn drop(&mut self) {
        let pid = self.process.id();
        let _ = Command::new("sh").args(["-c", r#"kill -TERM "$1""#, "signal", &pid.to_string()]).status();
        let _ = self.process.wait();
        Scope::current().disown(pid);
    }
}
