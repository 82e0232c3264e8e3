//! A database of its own for each test, on PostgreSQL.
//!
//! With `CLOISTER_TEST_POSTGRES_URL` (a role that may create databases) they are made on that server.
//! Otherwise one is started for the test process from the machine's own binaries, on a free port,
//! without durability against the machine's crash, and stopped with the process. A test that shuts a server down
//! starts one of its own ([`PostgresServer`]).

use std::env;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use reqwest::Url;
use sea_orm::{ConnectOptions, ConnectionTrait, Database, DatabaseConnection, DbErr};
use tempfile::TempDir;
use tokio::sync::OnceCell;
use uuid::Uuid;

use crate::app::signal;
use crate::scope::{EndBy, Scope};

/// Times a server is started before the machine's ports are given up on.
const ATTEMPTS: usize = 5;

/// A database, dropped with the value.
pub struct PostgresDatabase {
    url: Url,
    admin: Url,
    name: String,
}

impl PostgresDatabase {
    /// Makes an empty database.
    ///
    /// # Panics
    /// There is no PostgreSQL to be had; the message says what to do.
    pub async fn create() -> PostgresDatabase {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let admin = server().await;
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        // The time's part of a UUID tells runs on a shared server apart, the process and number the rest.
        let name = format!("cloister_test_{}_{}_{number}", Uuid::now_v7().simple(), std::process::id());
        execute(&admin, &format!("CREATE DATABASE {name}")).await.expect("the database is created");
        let mut url = admin.clone();
        url.set_path(&name);
        PostgresDatabase { url, admin, name }
    }

    /// Its URL, `postgres://…`.
    pub fn url(&self) -> &str {
        self.url.as_str()
    }
}

impl Drop for PostgresDatabase {
    fn drop(&mut self) {
        let sql = format!("DROP DATABASE IF EXISTS {} WITH (FORCE)", self.name);
        let admin = self.admin.clone();
        // A destructor may run inside a runtime and can't wait for a future there.
        let _ = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            if let Err(error) = runtime.map(|runtime| runtime.block_on(execute(&admin, &sql))) {
                eprintln!("a test database stays behind: {error}");
            }
        })
        .join();
    }
}

/// Runs one statement over a connection of its own.
async fn execute(url: &Url, sql: &str) -> Result<(), DbErr> {
    let connection = connect(url.as_str()).await?;
    connection.execute_unprepared(sql).await?;
    connection.close().await
}

/// Opens a database for looking at it: few connections, nothing logged.
///
/// # Errors
/// It can't be reached.
pub async fn connect(url: &str) -> Result<DatabaseConnection, DbErr> {
    let mut options = ConnectOptions::new(url);
    options.max_connections(4).sqlx_logging(false);
    Database::connect(options).await
}

/// The URL under which databases are made.
async fn server() -> Url {
    static SERVER: OnceCell<Url> = OnceCell::const_new();
    let start = || async {
        match env::var("CLOISTER_TEST_POSTGRES_URL") {
            Ok(url) => url.parse().expect("CLOISTER_TEST_POSTGRES_URL must be a postgres:// URL"),
            Err(_) => {
                let server = PostgresServer::start().await;
                let url = server.url();
                // It serves as long as the process lives; the scope ends it.
                std::mem::forget(server);
                url
            }
        }
    };
    SERVER.get_or_init(start).await.clone()
}

/// A server from the machine's own binaries. It ends, and its data go, when it is dropped.
pub struct PostgresServer {
    directory: TempDir,
    address: SocketAddrV4,
    process: Option<Child>,
}

/// How a server is shut down.
#[derive(Clone, Copy, Debug)]
pub enum Shutdown {
    /// Ends connections in order and writes everything out.
    Fast,
    /// Ends at once, as a crash does; the next start recovers.
    Immediate,
}

impl PostgresServer {
    /// Makes a cluster of databases and starts a server on it, on a free port of the loopback interface.
    ///
    /// # Panics
    /// There is no PostgreSQL to be had; the message says what to do.
    pub async fn start() -> PostgresServer {
        Self::listen(Ipv4Addr::LOCALHOST).await
    }

    /// The same on a free port of another address of this machine. Whoever reaches it is let in.
    ///
    /// # Panics
    /// There is no PostgreSQL to be had; the message says what to do.
    pub async fn listen(ip: Ipv4Addr) -> PostgresServer {
        let start = move || {
            let directory = Scope::current().directory();
            let mut initdb = as_database_user(directory.path(), &binaries().join("initdb"));
            initdb.arg("--pgdata").arg(data(&directory));
            initdb.args(["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]);
            let output = initdb.output().expect("initdb runs");
            assert!(output.status.success(), "initdb failed: {}", String::from_utf8_lossy(&output.stderr));
            let everybody = "host all all all trust\n";
            let access = fs::OpenOptions::new().append(true).open(data(&directory).join("pg_hba.conf"));
            access.and_then(|mut access| access.write_all(everybody.as_bytes())).expect("who is let in is written");
            let started = (0..ATTEMPTS).find_map(|_| {
                let free = TcpListener::bind((ip, 0)).and_then(|free| free.local_addr());
                let address = SocketAddrV4::new(ip, free.ok()?.port());
                Some((address, serve(&directory, address)?))
            });
            let (address, process) = started.expect("PostgreSQL starts on a free port");
            PostgresServer { directory, address, process: Some(process) }
        };
        tokio::task::spawn_blocking(start).await.expect("PostgreSQL starts")
    }

    /// The URL of its database `postgres`.
    pub fn url(&self) -> Url {
        format!("postgres://postgres@{}/postgres", self.address).parse().expect("a URL")
    }

    /// What is in its database `postgres`, for [`PostgresServer::restore`].
    ///
    /// # Panics
    /// `pg_dump` fails.
    pub fn dump(&self) -> Vec<u8> {
        let dump = self.client("pg_dump").args(["--format=custom", "--dbname"]).arg(self.url().as_str()).output();
        let dump = dump.expect("pg_dump runs");
        assert!(dump.status.success(), "pg_dump: {}", String::from_utf8_lossy(&dump.stderr));
        dump.stdout
    }

    /// Has it hold what was dumped, and nothing else.
    ///
    /// # Panics
    /// `pg_restore` fails.
    pub async fn restore(&self, dump: &[u8]) {
        execute(&self.url(), "DROP SCHEMA public CASCADE; CREATE SCHEMA public").await.expect("it is emptied");
        let file = self.directory.path().join("dump");
        fs::write(&file, dump).expect("the dump is written");
        let mut restore = self.client("pg_restore");
        restore.args(["--exit-on-error", "--dbname"]).arg(self.url().as_str()).arg(&file);
        let restored = restore.output().expect("pg_restore runs");
        assert!(restored.status.success(), "pg_restore: {}", String::from_utf8_lossy(&restored.stderr));
    }

    fn client(&self, name: &str) -> Command {
        let mut client = Command::new(binaries().join(name));
        client.stdin(Stdio::null()).env("LC_ALL", "C");
        client
    }

    /// Shuts it down and waits until it has ended.
    pub fn stop(&mut self, how: Shutdown) {
        let Some(mut process) = self.process.take() else { return };
        let name = match how {
            Shutdown::Fast => "INT",
            Shutdown::Immediate => "QUIT",
        };
        signal(process.id(), name);
        let _ = process.wait();
        Scope::current().disown(process.id());
    }

    /// Starts it again, on its data and port, and returns once it takes connections.
    ///
    /// # Panics
    /// It doesn't start.
    pub fn start_again(&mut self) {
        self.stop(Shutdown::Fast);
        self.process = Some(serve(&self.directory, self.address).expect("PostgreSQL starts again"));
    }
}

impl Drop for PostgresServer {
    fn drop(&mut self) {
        self.stop(Shutdown::Immediate);
    }
}

fn data(directory: &TempDir) -> PathBuf {
    directory.path().join("data")
}

/// Starts the server; none if it ended, such as when another process took the port.
fn serve(directory: &TempDir, address: SocketAddrV4) -> Option<Child> {
    let mut postgres = as_database_user(directory.path(), &binaries().join("postgres"));
    postgres.arg("-D").arg(data(directory)).args(["-p", &address.port().to_string()]);
    postgres.arg("-c").arg(format!("listen_addresses={}", address.ip()));
    for setting in [
        "unix_socket_directories=",
        "max_connections=400",
        // The machine doesn't crash; the server may, and then must lose no commit.
        "fsync=off",
        "full_page_writes=off",
    ] {
        postgres.args(["-c", setting]);
    }
    let mut server = postgres.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("postgres runs");
    Scope::current().adopt(server.id(), EndBy::Quit);
    let mut log = BufReader::new(server.stderr.take().expect("piped")).lines().map_while(Result::ok);
    if log.any(|line| line.contains("ready to accept connections")) {
        // Its log must be read on, or the server stands still once the pipe is full.
        thread::spawn(move || log.for_each(drop));
        return Some(server);
    }
    let _ = server.wait();
    Scope::current().disown(server.id());
    None
}

/// A command that runs as the owner of `directory`. PostgreSQL refuses to run as root, so there the
/// directory is given to the user `postgres`.
fn as_database_user(directory: &Path, program: &Path) -> Command {
    let is_root = fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0);
    let mut command = if is_root {
        let given = Command::new("chown").arg("postgres").arg(directory).status();
        assert!(given.is_ok_and(|status| status.success()), "as root, PostgreSQL needs a user `postgres`");
        let mut command = Command::new("setpriv");
        command.args(["--reuid=postgres", "--regid=postgres", "--init-groups", "--"]).arg(program);
        command
    } else {
        Command::new(program)
    };
    // A process group of its own keeps Ctrl-C from reaching it before the scope does.
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    command.current_dir(directory).stdin(Stdio::null()).env("LC_ALL", "C");
    command
}

/// The directory of the newest PostgreSQL: Debian's, or the one on the path.
fn binaries() -> PathBuf {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let debian = versions.map(|version| version.path().join("bin")).max_by_key(|bin| {
        let version = bin.parent().and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
        version.and_then(|version| version.parse::<u32>().ok())
    });
    let path = env::var_os("PATH").unwrap_or_default();
    let found = debian.into_iter().chain(env::split_paths(&path)).find(|bin| bin.join("initdb").is_file());
    found.expect("no PostgreSQL: install the package `postgresql`, or set CLOISTER_TEST_POSTGRES_URL")
}
