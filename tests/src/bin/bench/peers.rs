//! What Cloister is measured against; the programs are in `tests/bench/peers/`.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use cloister_tests::postgres::PostgresDatabase;
use cloister_tests::scope::{EndBy, Scope};
use serde::Deserialize;
use tempfile::TempDir;

use crate::model::Model;
use crate::platform::{Database, run_request};
use crate::wire::Connection;

/// How long the peer may take to start.
const START: Duration = Duration::from_secs(60);

const KEY: &str = "peer-key";

/// Where a peer is.
pub fn directory(peer: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("bench/peers").join(peer)
}

/// The article's stack, running on a fresh database.
pub struct Article {
    server: Child,
    address: SocketAddr,
    agent: String,
    // Dropped after the server, which has files and connections open in them.
    _database: Option<PostgresDatabase>,
    _directory: TempDir,
}

impl Article {
    /// Starts it with a uvicorn process a core, as it would be deployed.
    ///
    /// # Panics
    /// It isn't installed (`make bench` does that), or doesn't start.
    pub async fn start(database: Database, model: &Model) -> Article {
        let files = Scope::current().directory();
        let postgres = match database {
            Database::Postgres => Some(PostgresDatabase::create().await),
            Database::Sqlite => None,
        };
        let url = match &postgres {
            Some(database) => database.url().replacen("postgres:", "postgresql+asyncpg:", 1),
            None => format!("sqlite+aiosqlite:///{}", files.path().join("peer.db").display()),
        };
        let home = directory("article");
        let python = |arguments: &[&str]| {
            let mut command = Command::new(home.join(".venv/bin/python"));
            command.args(arguments).current_dir(&home).stdin(Stdio::null()).process_group(0);
            command.envs([("DATABASE_URL", url.as_str()), ("OPENAI_BASE_URL", &model.url()), ("OPENAI_API_KEY", "-")]);
            command
        };
        let prepared = python(&["app.py", KEY]).output().expect("the peer is installed: run `make bench`");
        assert!(prepared.status.success(), "{}", String::from_utf8_lossy(&prepared.stderr));
        let agent = String::from_utf8_lossy(&prepared.stdout).trim().to_owned();
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|free| free.local_addr()).expect("a free port");
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let server = python(&["-m", "uvicorn", "app:app", "--no-access-log", "--log-level", "warning"])
            .args(["--port", &free.port().to_string(), "--workers", &cores.to_string()])
            .spawn()
            .expect("uvicorn");
        Scope::current().adopt(server.id(), EndBy::Term);
        let article = Article { server, address: free, agent, _database: postgres, _directory: files };
        article.wait_until_ready().await;
        article
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// `POST /v1/run`.
    pub fn run_request(&self, message: &str) -> Vec<u8> {
        run_request(KEY, &self.agent, message)
    }

    /// Each of its processes must have answered: they start one after the other, and share the port.
    async fn wait_until_ready(&self) {
        let deadline = Instant::now() + START;
        let request = self.run_request("Hello");
        let mut answered = 0;
        while answered < 20 {
            let answer = match Connection::open(self.address).await {
                Ok(mut connection) => connection.exchange(&request).await,
                Err(error) => Err(error),
            };
            answered += usize::from(answer.is_ok_and(|answer| answer.status == 200));
            assert!(Instant::now() < deadline, "the peer does not start");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

impl Drop for Article {
    fn drop(&mut self) {
        // uvicorn ends its workers on SIGTERM; the shell has the call built in.
        let pid = self.server.id();
        let _ = Command::new("sh").args(["-c", r#"kill -TERM "$1""#, "signal", &pid.to_string()]).status();
        let _ = self.server.wait();
        Scope::current().disown(pid);
    }
}

/// What graphile-worker did.
#[derive(Deserialize)]
pub struct Claims {
    /// Jobs claimed and finished.
    pub jobs: u64,
    /// In so many seconds.
    pub seconds: f64,
}

/// Has graphile-worker claim and finish `jobs` no-op jobs, unbatched, on a fresh database.
///
/// # Panics
/// It isn't installed (`make bench` does that), or fails.
pub async fn graphile_worker(jobs: usize, concurrency: usize) -> Claims {
    let database = PostgresDatabase::create().await;
    let home = directory("graphile-worker");
    let output = Command::new(home.join("node_modules/.bin/node"))
        .args(["claims.mjs", database.url(), &jobs.to_string(), &concurrency.to_string()])
        .current_dir(&home)
        .stdin(Stdio::null())
        .output()
        .expect("graphile-worker is installed: run `make bench`");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("what claims.mjs prints")
}
