//! Starting and stopping the server: what it refuses to start with, and how it ends.

use std::fs;
use std::process::{Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cloister_tests::app::TestAppBuilder;
use cloister_tests::postgres::PostgresDatabase;
use cloister_tests::{Client, PATIENCE, TestApp};
use sea_orm::ConnectionTrait;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::both::on_both;
use crate::calls::eventually;

on_both!(health_is_told_and_sigterm_ends_well, sigterm_lets_go_of_open_streams,);

/// The binary, serving under the test's own environment. It is killed when it is dropped.
pub struct Served {
    child: Child,
    address: String,
    stdout: Arc<Mutex<String>>,
    stderr: Arc<Mutex<String>>,
    stderr_read: JoinHandle<()>,
}

impl Served {
    /// Starts it and waits until it listens.
    pub async fn start(command: std::process::Command) -> Served {
        let mut command = Command::from(command);
        let mut child =
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true).spawn().expect("cloister runs");
        let (stdout, stderr) = (Arc::<Mutex<String>>::default(), Arc::<Mutex<String>>::default());
        let (listening, heard) = oneshot::channel();
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let log = stdout.clone();
        tokio::spawn(async move {
            let mut listening = Some(listening);
            while let Ok(Some(line)) = lines.next_line().await {
                let event: Value = serde_json::from_str(&line).unwrap_or_default();
                if let Some(address) = event["fields"]["address"].as_str()
                    && let Some(listening) = listening.take()
                {
                    let _ = listening.send(address.to_owned());
                }
                log.lock().unwrap().push_str(&(line + "\n"));
            }
        });
        let mut pipe = child.stderr.take().expect("piped");
        let shown = stderr.clone();
        let stderr_read = tokio::spawn(async move {
            let mut bytes = [0; 1024];
            while let Ok(count @ 1..) = pipe.read(&mut bytes).await {
                shown.lock().unwrap().push_str(&String::from_utf8_lossy(&bytes[..count]));
            }
        });
        let address = tokio::time::timeout(PATIENCE, heard).await.expect("it listens").expect("it listens");
        Served { child, address, stdout, stderr, stderr_read }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn stdout(&self) -> String {
        self.stdout.lock().unwrap().clone()
    }

    pub fn stderr(&self) -> String {
        self.stderr.lock().unwrap().clone()
    }

    /// The line of its stderr that holds `text`, once it has been read: the two pipes are read apart.
    pub async fn stderr_line(&self, text: &str) -> String {
        let line = async {
            loop {
                let shown = self.stderr();
                let whole = shown.split_inclusive('\n').find(|line| line.contains(text) && line.ends_with('\n'));
                if let Some(line) = whole {
                    return line.trim_end().to_owned();
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let line = tokio::time::timeout(PATIENCE, line).await;
        line.unwrap_or_else(|_| panic!("no line with {text:?} in {:?}", self.stderr()))
    }

    /// Kills it and waits until it is gone and all that it wrote to stderr is read, which is returned.
    pub async fn end(mut self) -> String {
        self.child.kill().await.expect("it is killed");
        tokio::time::timeout(PATIENCE, self.stderr_read).await.expect("its stderr ends").expect("it is read");
        let shown = self.stderr.lock().unwrap();
        shown.clone()
    }
}

/// Runs a command that ends by itself; `what` is told if it doesn't.
async fn output(command: std::process::Command, what: &str) -> Output {
    let mut command = Command::from(command);
    let ended = tokio::time::timeout(Duration::from_secs(15), command.kill_on_drop(true).output()).await;
    ended.unwrap_or_else(|_| panic!("it goes on: {what}")).expect("cloister runs")
}

fn printed(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_setting_stops_the_start_with_its_name_and_the_reason() {
    let mut app = TestApp::start().await;
    app.kill();
    let weak_key = "Zm9v";
    for (name, value, said) in [
        ("SERVER__LISTEN", "nonsense", &["server.listen", "socket address"][..]),
        ("SERVER__LISTEN", "127.0.0.1:99999", &["server.listen", "socket address"]),
        ("SERVER__LISTN", "127.0.0.1:1", &["server", "unknown field", "listn"]),
        ("SERVERS__LISTEN", "127.0.0.1:1", &["unknown field", "servers"]),
        ("SERVER__MAX_BODY_BYTES", "-1", &["server.max_body_bytes"]),
        ("SERVER__RUN_WAIT_SECONDS", "soon", &["server.run_wait_seconds"]),
        ("DATABASE__URL", "mysql://localhost/x", &["database.url", "sqlite: or postgres:"]),
        ("DATABASE__URL", "postgres://127.0.0.1:port/none", &["database.url", "port"]),
        ("DATABASE__URL", "sqlite:///proc/none/cloister.db", &["database.url", "/proc/none"]),
        ("DATABASE__MAX_CONNECTIONS", "0", &["database.max_connections", "at least 1"]),
        ("DATABASE__SYNCHRONOUS", "off", &["database.synchronous", "off"]),
        ("SECRETS__KEY", weak_key, &["secrets.key", "32 bytes", "it has 3"]),
        ("SECRETS__KEY", "not base64!", &["secrets.key", "base64"]),
        ("SECRETS__PREVIOUS_KEYS", weak_key, &["secrets.previous_keys", "32 bytes"]),
        ("ADMIN__KEY", "short", &["admin.key", "32 characters"]),
        ("ADMIN__KEY", "", &["admin.key", "32 characters"]),
        ("PROVIDERS__OTHER__API_KEY", "k", &["providers.other.base_url", "missing"]),
        ("PROVIDERS__OTHER__BASE_URL", "ftp://example.com", &["providers.other.base_url", "http"]),
        ("PROVIDERS__OTHER__BASE_URL", "nonsense", &["providers.other.base_url", "URL"]),
        ("PROVIDERS__DEMO__BASE_URL", "http://example.com", &["providers.demo", "built in"]),
        ("PROVIDERS__OPENAI__API", "soap", &["providers.openai.api", "soap"]),
        ("PROVIDERS__OPENAI__ATTEMPTS", "0", &["providers.openai.attempts", "at least 1"]),
        ("RUNS__CONCURRENCY", "0", &["runs.concurrency", "at least 1"]),
        ("RUNS__LEASE_SECONDS", "2", &["runs.lease_seconds", "at least 3"]),
        ("RUNS__LEASE_SECONDS", "9223372036854775807", &["runs.lease_seconds", "at most"]),
        ("RUNS__TIMEOUT_SECONDS", "86401", &["runs.timeout_seconds", "runs.max_timeout_seconds"]),
        ("PLANS__GOLD__WEIGHT", "1", &["plans.gold"]),
        ("GRAPHQL__MAX_DEPTH", "deep", &["graphql.max_depth"]),
        ("LOG__FORMAT", "xml", &["log.format", "xml"]),
        ("LOG__FILTER", "==", &["log.filter"]),
        ("CONFIG", "/nowhere/cloister.toml", &["/nowhere/cloister.toml"]),
    ] {
        let mut command = app.command(&["serve"]);
        command.env(format!("CLOISTER_{name}"), value);
        let ended = output(command, &format!("{name}={value}")).await;
        let printed = printed(&ended);
        assert_eq!(ended.status.code(), Some(1), "{name}={value}: {printed}");
        assert!(printed.starts_with("cloister: ") && printed.lines().count() <= 2, "{name}={value}: {printed}");
        for said in said {
            assert!(printed.contains(said), "{name}={value} says nothing of {said:?}: {printed}");
        }
        // A secret is never repeated, however wrong it is.
        if matches!(name, "SECRETS__KEY" | "SECRETS__PREVIOUS_KEYS") {
            assert!(!printed.contains(value), "{name}: {printed}");
        }
    }
    let mut command = app.command(&["serve"]);
    command.env_remove("CLOISTER_SECRETS__KEY");
    let ended = output(command, "no secrets.key").await;
    assert_eq!(ended.status.code(), Some(1));
    assert!(printed(&ended).contains("secrets.key is missing"), "{}", printed(&ended));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_file_stops_the_start_with_the_name_and_the_reason() {
    let mut app = TestApp::start().await;
    app.kill();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("wrong.toml");
    let price = "[models.price]\ninput = \"1\"\noutput = \"2\"\n";
    let model = |provider: &str, window: i64| {
        format!(
            "[[models]]\nname = \"m\"\nprovider = \"{provider}\"\ncontext_window = {window}\nmax_output_tokens = 10\n"
        )
    };
    let plan = |rate: i64, base: &str| {
        format!(
            "[plans.free]\nbase_price = \"{base}\"\nincluded_tokens = 1\nmonthly_token_limit = 1\n\
             max_concurrent_runs = 1\nrequests_per_minute = {rate}\nweight = 1\n"
        )
    };
    for (toml, said) in [
        ("[server".to_owned(), &["wrong.toml"][..]),
        ("nonsense = 1".to_owned(), &["unknown field", "nonsense"]),
        ("[server]\nport = 1".to_owned(), &["unknown field", "port"]),
        ("[server]\nmax_body_bytes = \"many\"".to_owned(), &["server.max_body_bytes", "many"]),
        (model("nobody", 100) + price, &["models[0].provider", "nobody"]),
        (model("demo", 0) + price, &["models[0]", "context_window"]),
        (model("demo", 100), &["price"]),
        (model("demo", 100) + &price.replace("\"1\"", "\"-1\""), &["models[0].price", "negative"]),
        (model("demo", 100) + &price.replace("\"1\"", "\"99999999999999\""), &["price", "m", "too large"]),
        (model("demo", 100) + price + &model("demo", 100) + price, &["models[1].name", "twice"]),
        (plan(0, "1"), &["plans.free", "positive"]),
        (plan(1, "-1"), &["plans.free", "negative"]),
        (plan(1, "1") + "overage_per_million = \"-1\"\n", &["plans.free", "negative"]),
        ("[plans.free]\nweight = 1".to_owned(), &["plans.free", "base_price"]),
    ] {
        fs::write(&path, &toml).unwrap();
        let mut command = app.command(&["serve"]);
        command.env("CLOISTER_CONFIG", &path);
        let ended = output(command, &toml).await;
        let printed = printed(&ended);
        assert_eq!(ended.status.code(), Some(1), "{toml}: {printed}");
        for said in said {
            assert!(printed.contains(said), "{toml}\nsays nothing of {said:?}: {printed}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_environment_goes_before_the_file_and_text_stays_text() {
    let mut app = TestApp::builder().config("[server]\nmax_body_bytes = 100\nrun_wait_seconds = 7").start().await;
    let body = json!({"query": format!("{{ viewer {{ scopes }} }} # {}", "x".repeat(200))});
    let post = async |app: &TestApp, key: &str| {
        let request = app.client(key).request(reqwest::Method::POST, "/graphql").json(&body);
        request.send().await.expect("an answer").status().as_u16()
    };
    assert_eq!(post(&app, &app.admin_key).await, 413);
    app.set_env("CLOISTER_SERVER__MAX_BODY_BYTES", "1000");
    // A key that looks like a number is a text all the same.
    let digits = "01234567890123456789012345678901234567890";
    app.set_env("CLOISTER_ADMIN__KEY", digits);
    app.restart().await;
    assert_eq!(post(&app, digits).await, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_fails_does_not_use_up_the_admin_key() {
    let mut app = TestApp::start().await;
    app.kill();
    // The port is taken, or there is no key for secrets: the admin's key would be made and never shown.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = taken.local_addr().unwrap().to_string();
    for (name, value, said) in [
        ("CLOISTER_SERVER__LISTEN", listen.as_str(), "server.listen"),
        ("CLOISTER_SECRETS__KEY", "Zm9v", "secrets.key"),
    ] {
        let mut command = app.command(&["serve"]);
        command.env_remove("CLOISTER_ADMIN__KEY").env(name, value);
        let ended = output(command, name).await;
        assert_eq!(ended.status.code(), Some(1));
        assert!(printed(&ended).contains(said), "{}", printed(&ended));
    }
    let mut command = app.command(&["serve"]);
    command.env_remove("CLOISTER_ADMIN__KEY");
    let served = Served::start(command).await;
    let is_shown = |printed: &String| printed.contains("shown this once: clo_");
    eventually("the key is shown", async || served.stderr(), is_shown).await;
    served.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schema_that_is_behind_is_refused_with_the_remedy() {
    let mut app = TestApp::start().await;
    app.kill();
    let folder = tempfile::tempdir().unwrap();
    let postgres = PostgresDatabase::create().await;
    let sqlite = format!("sqlite://{}", folder.path().join("new/cloister.db").display());
    for url in [sqlite.as_str(), postgres.url()] {
        let command = |arguments: &[&str]| {
            let mut command = app.command(arguments);
            command.env("CLOISTER_DATABASE__URL", url);
            command
        };
        let refused = output(command(&["serve"]), url).await;
        assert_eq!(refused.status.code(), Some(1));
        let printed = printed(&refused);
        assert!(printed.contains("behind") && printed.contains("run `cloister migrate`"), "{url}: {printed}");
        // Twice is as good as once.
        for _ in 0..2 {
            let migrated = output(command(&["migrate"]), url).await;
            assert!(migrated.status.success(), "{url}: {migrated:?}");
        }
        let served = Served::start(command(&["serve"])).await;
        assert_eq!(Client::anonymous(&served.url()).rest_get("/healthz").await.status, 200);
        served.end().await;
    }
}

/// During an upgrade the replicas of before go on with the schema of the release that comes, and after its rollback.
#[tokio::test(flavor = "multi_thread")]
async fn a_schema_of_a_later_release_is_served() {
    for builder in [TestApp::builder(), TestApp::builder().postgres()] {
        let mut app = builder.start().await;
        let later = "INSERT INTO seaql_migrations (version, applied_at) VALUES ('m20991231_000001_later', 0)";
        app.database().await.execute_unprepared(later).await.unwrap();
        assert_eq!(app.anonymous().rest_get("/readyz").await.status, 200);
        app.terminate().await;
        let migrated = output(app.command(&["migrate"]), "a later release's").await;
        assert!(migrated.status.success(), "{migrated:?}");
        app.restart().await;
        assert_eq!(app.anonymous().rest_get("/readyz").await.status, 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_sqlite_file_is_served_once() {
    let mut app = TestApp::start().await;
    let refused = output(app.command(&["serve"]), "a second server").await;
    assert_eq!(refused.status.code(), Some(1));
    let said = printed(&refused);
    assert!(said.contains("database.url") && said.contains("already served by another process"), "{said}");
    // The first one goes on, and leaves nothing in the way of the next, even when it is killed.
    assert_eq!(app.anonymous().rest_get("/readyz").await.status, 200);
    app.restart().await;
    assert_eq!(app.anonymous().rest_get("/readyz").await.status, 200);
}

async fn health_is_told_and_sigterm_ends_well(builder: TestAppBuilder) {
    let mut app = builder.start().await;
    let health = app.anonymous().rest_get("/healthz").await;
    assert_eq!((health.status.as_u16(), health.body), (200, json!("ok")));
    let ready = app.anonymous().rest_get("/readyz").await;
    assert_eq!(
        (ready.status.as_u16(), ready.body),
        (200, json!({"ready": true, "database": "ok", "redis": "off", "stopping": false}))
    );
    let nothing = app.anonymous().rest_get("/nothing").await;
    assert_eq!((nothing.status.as_u16(), nothing.body), (404, json!({"detail": "There is nothing here."})));
    let status = app.terminate().await;
    assert_eq!(status.code(), Some(0), "{}", app.log());
    // The pipe may be read a moment after the process has ended.
    eventually("the last line of the log", async || app.log(), |log| log.contains("\"stopped\"")).await;
    app.restart().await;
    assert_eq!(app.anonymous().rest_get("/healthz").await.status, 200);
}

async fn sigterm_lets_go_of_open_streams(builder: TestAppBuilder) {
    let mut app = builder.start().await;
    let tenant = app.tenant("alpha").await;
    let usage = "subscription { usage { totalTokens } }";
    let mut sse = tenant.client.subscribe_sse(usage, json!({})).await;
    assert!(sse.next_result().await.is_some());
    let mut ws = tenant.client.ws_ready().await;
    ws.subscribe("1", usage, json!({})).await;
    assert_eq!(ws.next().await.message()["type"], "next");
    assert_eq!(app.terminate().await.code(), Some(0), "{}", app.log());
    // Neither is told that it is complete: both are to connect again.
    assert_eq!((sse.next_result().await, sse.completed()), (None, false));
    assert_eq!(ws.next().await.close_code(), Some(1012));
    app.restart().await;
    let again = async || tenant.client.query("{ viewer { scopes } }", json!({})).await.status.as_u16();
    eventually("the next process", again, |status| *status == 200).await;
}
