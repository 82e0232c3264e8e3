//! The SDK's side: its Python environment, made once, and `sdk.py`, which plays scenarios as they come.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::{Mutex as AsyncMutex, oneshot};

use crate::scenario::{Api, Scenario};
use crate::script::Servers;

type Waiting = Arc<Mutex<HashMap<u64, oneshot::Sender<Value>>>>;

/// The SDK, running.
pub struct Sdk {
    stdin: AsyncMutex<ChildStdin>,
    waiting: Waiting,
    next_id: AtomicU64,
    _child: Child,
}

impl Sdk {
    /// Starts it, in a virtual environment that is made unless it is there.
    ///
    /// # Panics
    /// Python or the packages are not to be had.
    pub async fn start() -> Sdk {
        let home = tokio::task::spawn_blocking(install).await.expect("an environment");
        let mut child = Command::new(home.join("bin/python"))
            .arg(directory().join("sdk.py"))
            .env("OPENAI_API_KEY", "none")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("Python starts");
        let stdin = AsyncMutex::new(child.stdin.take().expect("piped"));
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let waiting = Waiting::default();
        let told = waiting.clone();
        tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                let answer: Value = serde_json::from_str(&line).expect("a line of sdk.py is JSON");
                let id = answer["id"].as_u64().expect("an id");
                if let Some(waiting) = told.lock().unwrap().remove(&id) {
                    let _ = waiting.send(answer);
                }
            }
            // It has ended: whoever waits is told by the end of the channel.
            told.lock().unwrap().clear();
        });
        Sdk { stdin, waiting, next_id: AtomicU64::new(0), _child: child }
    }

    /// Plays a scenario; the outcome of each run.
    ///
    /// # Panics
    /// The scenario makes no sense to the SDK.
    pub async fn play(&self, scenario: &Scenario, api: Api, servers: &Servers) -> Vec<Value> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let tools_url = servers.tools.url("");
        let request = json!({
            "id": id, "scenario": scenario, "api": api, "model_url": servers.model.url(), "tools_url": tools_url,
        });
        let (sender, answer) = oneshot::channel();
        self.waiting.lock().unwrap().insert(id, sender);
        self.stdin.lock().await.write_all(format!("{request}\n").as_bytes()).await.expect("sdk.py reads");
        let answer = answer.await.expect("sdk.py goes on");
        if let Some(error) = answer["error"].as_str() {
            panic!("the SDK can't play this:\n{error}");
        }
        answer["runs"].as_array().expect("runs").clone()
    }
}

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("differential")
}

/// Makes the environment unless it is there. Test processes take turns at it.
fn install() -> PathBuf {
    let home = Path::new(env!("CARGO_TARGET_TMPDIR")).join("agents-sdk");
    let lock = File::create(home.with_extension("lock")).expect("a lock");
    lock.lock().expect("a lock on the environment");
    let requirements = directory().join("requirements.txt");
    let installed = home.join("installed.txt");
    let wanted = fs::read(&requirements).expect("requirements.txt");
    if fs::read(&installed).is_ok_and(|installed| installed == wanted) {
        return home;
    }
    let _ = fs::remove_dir_all(&home);
    let run = |command: &mut std::process::Command| {
        let status = command.stdin(Stdio::null()).status().expect("python3 must be installed");
        assert!(status.success(), "{command:?}: {status}");
    };
    run(std::process::Command::new("python3").args(["-m", "venv"]).arg(&home));
    let pip = ["install", "--quiet", "--disable-pip-version-check", "--requirement"];
    run(std::process::Command::new(home.join("bin/pip")).args(pip).arg(&requirements));
    fs::write(&installed, wanted).expect("the environment is writable");
    home
}
