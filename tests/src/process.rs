//! A binary of ours, running: where it listens, what it says, and how it is ended.

use std::net::SocketAddr;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

use tokio::sync::watch;

use crate::PATIENCE;
use crate::app::{capture, listening, signal};
use crate::client::{self, Client};
use crate::scope::{EndBy, Scope};

/// A process that logs JSON lines, one of which says where it listens. Dropping it kills it.
pub struct Process {
    name: &'static str,
    child: Option<Child>,
    address: SocketAddr,
    log: Arc<Mutex<String>>,
}

impl Process {
    /// Starts a binary by this name; returns once it listens.
    ///
    /// # Panics
    /// It doesn't start; the message has its log.
    pub async fn start(name: &'static str, mut command: Command) -> Process {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary runs");
        Scope::current().adopt(child.id(), EndBy::Kill);
        let (stdout, stderr) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
        let mut process =
            Process { name, child: Some(child), address: ([127, 0, 0, 1], 0).into(), log: Arc::default() };
        let state = watch::Sender::new(None);
        let mut found = state.subscribe();
        capture(stderr, process.log.clone(), |_| {});
        // The sender goes with the thread: that is how the end of the process is told.
        capture(stdout, process.log.clone(), move |line| {
            if let Some(fields) = listening(line) {
                state.send_replace(fields["address"].as_str().and_then(|address| address.parse().ok()));
            }
        });
        let listens = async { found.wait_for(Option::is_some).await.ok().and_then(|address| *address) };
        match tokio::time::timeout(PATIENCE, listens).await {
            Ok(Some(address)) => process.address = address,
            _ => panic!("`{name}` does not listen; its log:\n{}", process.log()),
        }
        process
    }

    /// A client of its own address, for health and metrics.
    pub fn client(&self) -> Client {
        Client::anonymous(&format!("http://{}", self.address))
    }

    /// The body of its `/metrics`.
    ///
    /// # Panics
    /// It doesn't answer.
    pub async fn metrics(&self) -> String {
        let scraped = client::http().get(self.client().url("/metrics")).send().await.expect("the process answers");
        scraped.text().await.expect("a text")
    }

    /// Its id.
    ///
    /// # Panics
    /// It isn't running.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("the process is running").id()
    }

    /// Sends it a signal, such as `STOP`.
    pub fn signal(&self, name: &str) {
        signal(self.pid(), name);
    }

    /// Ends it as a crash would: SIGKILL, at once.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
            Scope::current().disown(child.id());
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
        let mut child = self.child.take().expect("the process is running");
        let pid = child.id();
        let ended = tokio::task::spawn_blocking(move || child.wait());
        match tokio::time::timeout(PATIENCE, ended).await {
            Ok(status) => {
                Scope::current().disown(pid);
                status.expect("the wait is not cancelled").expect("the process can be waited for")
            }
            Err(_) => {
                signal(pid, "KILL");
                panic!("`{}` does not end; its log:\n{}", self.name, self.log());
            }
        }
    }

    /// Everything that it has printed.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if thread::panicking() {
            let log = self.log.lock().map(|log| log.clone()).unwrap_or_default();
            eprintln!("── the log of {} ──\n{log}", self.name);
        }
    }
}
