//! A Redis of its own for a test, from the machine's own binary, on a free port, that keeps nothing.

use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::thread;

use redis::{Client, FromRedisValue, RedisError};
use tempfile::TempDir;

use crate::app::signal;
use crate::scope::{EndBy, Scope};

/// Times a server is started before the machine's ports are given up on.
const ATTEMPTS: usize = 5;

/// A Redis server, running unless it was killed. Dropping it kills it.
pub struct RedisServer {
    address: SocketAddrV4,
    server: Option<Child>,
    directory: TempDir,
}

impl RedisServer {
    /// Starts a server; returns once it takes connections.
    ///
    /// # Panics
    /// There is no `redis-server` to be had.
    pub async fn start() -> RedisServer {
        Self::listen(Ipv4Addr::LOCALHOST).await
    }

    /// The same on another address of this machine. Whoever reaches it is let in.
    ///
    /// # Panics
    /// There is no `redis-server` to be had.
    pub async fn listen(ip: Ipv4Addr) -> RedisServer {
        let directory = Scope::current().directory();
        let mut redis = RedisServer { address: SocketAddrV4::new(ip, 0), server: None, directory };
        for _ in 0..ATTEMPTS {
            let free = TcpListener::bind((ip, 0)).and_then(|free| free.local_addr());
            redis.address.set_port(free.expect("a free port").port());
            if redis.serve() {
                return redis;
            }
        }
        panic!("redis-server does not start on a free port");
    }

    /// Its URL, `redis://…`. It stays the same over restarts.
    pub fn url(&self) -> String {
        format!("redis://{}/", self.address)
    }

    /// Ends the server with SIGKILL; what it held is lost.
    pub fn kill(&mut self) {
        if let Some(mut server) = self.server.take() {
            let _ = server.kill();
            let _ = server.wait();
            Scope::current().disown(server.id());
        }
    }

    /// Starts the server again, empty, on the same port. One that runs is killed first.
    ///
    /// # Panics
    /// It doesn't start.
    pub async fn restart(&mut self) {
        self.kill();
        assert!(self.serve(), "redis-server does not start on {}", self.address);
    }

    /// Stops the server's process as a machine that stands still would: connections stay, and nothing answers.
    pub fn pause(&self) {
        self.signal("STOP");
    }

    /// Lets a paused server go on.
    pub fn resume(&self) {
        self.signal("CONT");
    }

    /// Runs a command, such as `["FLUSHALL"]`.
    ///
    /// # Panics
    /// It fails.
    pub async fn command<T: FromRedisValue>(&self, command: &[&str]) -> T {
        let run = async {
            let mut connection = Client::open(self.url())?.get_multiplexed_async_connection().await?;
            let (name, arguments) = command.split_first().expect("a command");
            redis::cmd(name).arg(arguments).query_async(&mut connection).await
        };
        run.await.unwrap_or_else(|error: RedisError| panic!("{command:?}: {error}"))
    }

    fn signal(&self, name: &str) {
        signal(self.server.as_ref().expect("the server is running").id(), name);
    }

    /// Whether it came up: another process may have taken the port.
    fn serve(&mut self) -> bool {
        let mut server = Command::new("redis-server")
            .args(["--port", &self.address.port().to_string(), "--bind", &self.address.ip().to_string()])
            .args(["--protected-mode", "no", "--save", "", "--appendonly", "no"])
            .current_dir(self.directory.path())
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("no Redis: install the package `redis-server`");
        Scope::current().adopt(server.id(), EndBy::Kill);
        let mut log = BufReader::new(server.stdout.take().expect("piped")).lines().map_while(Result::ok);
        if log.any(|line| line.contains("Ready to accept connections")) {
            // Its log must be read on, or the server stands still once the pipe is full.
            thread::spawn(move || log.for_each(drop));
            self.server = Some(server);
            return true;
        }
        let _ = server.wait();
        Scope::current().disown(server.id());
        false
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        self.kill();
    }
}
