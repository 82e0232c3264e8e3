//! The unmodified npm clients in `tests/clients`, driven from Rust: a script takes one JSON
//! argument and prints JSON lines.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::OnceLock;
use std::time::SystemTime;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use crate::PATIENCE;

/// A running script of `tests/clients`. It is killed when it is dropped, and ends by itself when
/// the test process does.
pub struct NodeScript {
    name: String,
    lines: Lines<BufReader<ChildStdout>>,
    _stdin: ChildStdin,
    _child: Child,
}

impl NodeScript {
    /// Starts a script, such as `ws.mjs`; its head says what its argument is.
    ///
    /// # Panics
    /// Node or the packages are not to be had.
    pub async fn start(name: &str, argument: &Value) -> NodeScript {
        tokio::task::spawn_blocking(|| INSTALLED.get_or_init(install)).await.expect("npm ci");
        let mut child = Command::new("node")
            .arg(name)
            .arg(argument.to_string())
            .current_dir(clients())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("node 20 or later must be installed");
        let stdin = child.stdin.take().expect("piped");
        let stdout = child.stdout.take().expect("piped");
        NodeScript { name: name.to_owned(), lines: BufReader::new(stdout).lines(), _stdin: stdin, _child: child }
    }

    /// The next line it prints; none when it has ended.
    ///
    /// # Panics
    /// It stays silent for longer than [`PATIENCE`], or prints what is no JSON.
    pub async fn next(&mut self) -> Option<Value> {
        let line = tokio::time::timeout(PATIENCE, self.lines.next_line()).await;
        let line = line.unwrap_or_else(|_| panic!("{} prints nothing", self.name)).expect("a readable pipe")?;
        Some(serde_json::from_str(&line).unwrap_or_else(|_| panic!("{} prints no JSON: {line}", self.name)))
    }

    /// All lines that are still to come.
    ///
    /// # Panics
    /// As [`NodeScript::next`] does.
    pub async fn rest(mut self) -> Vec<Value> {
        let mut lines = Vec::new();
        while let Some(line) = self.next().await {
            lines.push(line);
        }
        lines
    }
}

/// Runs a script to its end and returns what it printed.
///
/// # Panics
/// As [`NodeScript`] does.
pub async fn run(name: &str, argument: &Value) -> Vec<Value> {
    NodeScript::start(name, argument).await.rest().await
}

static INSTALLED: OnceLock<()> = OnceLock::new();

fn clients() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("clients")
}

/// Installs the locked packages unless they are there. Test processes take turns at it.
fn install() {
    let directory = clients();
    let lock = File::open(directory.join("package-lock.json")).expect("package-lock.json");
    lock.lock().expect("a lock on package-lock.json");
    if is_installed(&directory) {
        return;
    }
    let status = std::process::Command::new("npm")
        .args(["ci", "--no-audit", "--no-fund", "--loglevel=error"])
        .current_dir(&directory)
        .stdin(Stdio::null())
        .status()
        .expect("npm must be installed");
    assert!(status.success(), "`npm ci` failed in tests/clients: {status}");
}

/// npm writes its own record of `node_modules` last of all.
fn is_installed(directory: &Path) -> bool {
    let modified = |path: &str| -> Option<SystemTime> { fs::metadata(directory.join(path)).ok()?.modified().ok() };
    match (modified("node_modules/.package-lock.json"), modified("package-lock.json")) {
        (Some(installed), Some(locked)) => installed >= locked,
        _ => false,
    }
}
