//! The clock of one replica is off by a minute.

use std::path::{Path, PathBuf};

use cloister_tests::{ModelServer, Reply, TestApp};
use serde_json::json;

use super::load::{Load, Orphans, first};
use crate::ledger::{agent, try_start, until};

/// The library that shifts the clock of a process (Debian's package `faketime`).
fn libfaketime() -> PathBuf {
    let found = std::fs::read_dir("/usr/lib").into_iter().flatten().flatten().map(|entry| entry.path());
    let candidates = found.chain([PathBuf::from("/usr/lib")]);
    let library = candidates.map(|folder| folder.join("faketime/libfaketimeMT.so.1")).find(|path| path.is_file());
    library.expect("the package `faketime` is not installed: run scripts/setup test")
}

/// Restarts a server with a clock that is off by so many seconds.
async fn shift(app: &mut TestApp, library: &Path, seconds: i32) {
    app.set_env("LD_PRELOAD", &library.display().to_string());
    app.set_env("FAKETIME", &format!("{seconds:+}s"));
    // Only the time of day is wrong; time still passes as it does.
    app.set_env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
    app.restart().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_is_fast_or_slow_executes_like_the_others() {
    let library = libfaketime();
    let (app, model) = first(TestApp::builder().postgres()).await;
    let load = Load::prepare(&app, model, "PRO").await;
    let mut wrong = app.replica().await;
    for seconds in [60, -60] {
        shift(&mut wrong, &library, seconds).await;
        let clients = [&app, &wrong].map(|replica| replica.client(&load.tenant.key));
        load.start(&clients, 100).await;
        load.check(&app, &Orphans::default()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_has_its_time_and_a_conversation_its_order() {
    let library = libfaketime();
    let model = ModelServer::start().await;
    let mut fast = TestApp::builder().postgres().model_server(&model).start().await;
    let right = fast.replica().await;
    shift(&mut fast, &library, 60).await;
    let tenant = fast.tenant("acme").await;
    let agent = agent(&tenant.client, "Agent", json!({})).await;
    model.always(|request| Reply::text(format!("{} heard", request.last_user_text())));

    let input = json!({"agentId": agent, "input": "First", "newConversation": true, "timeoutSeconds": 30});
    let begun = try_start(&tenant.client, input).await;
    let run = begun["run"]["id"].as_str().unwrap().to_owned();
    until(&tenant.client, &run, "SUCCEEDED").await;
    let query = "query ($run: ID!) { run(id: $run) { conversation { id } } }";
    let conversation = tenant.client.data(query, json!({"run": run})).await["run"]["conversation"]["id"].clone();

    // Started by the replica whose clock is a minute behind the other's.
    let client = right.client(&tenant.key);
    let input = json!({"agentId": agent, "input": "Second", "conversationId": conversation, "timeoutSeconds": 30});
    let second = try_start(&client, input).await["run"]["id"].as_str().unwrap().to_owned();
    until(&client, &second, "SUCCEEDED").await;
    let requests = model.requests();
    let heard: Vec<_> = requests[1].messages().iter().map(|message| message["content"].clone()).collect();
    assert_eq!(heard, ["Be brief.", "First", "First heard", "Second"]);
}
