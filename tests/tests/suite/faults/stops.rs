//! A process stands still for longer than its leases last, and then goes on as if nothing had happened.

use std::time::Duration;

use cloister_tests::{ModelServer, Reply, TestApp};
use serde_json::json;

use super::cluster::Cluster;
use super::load::{Load, Orphans, first};
use crate::crash::let_reservations_lapse;
use crate::ledger::{agent, agreed, eventually, exact, rows_of, start, until};

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_past_its_leases() {
    let (app, model) = first(TestApp::builder().postgres()).await;
    let load = Load::prepare(&app, model, "PRO").await;
    let other = app.replica().await;
    let clients = [&app, &other].map(|replica| replica.client(&load.tenant.key));
    let stops = async {
        for point in [20, 120] {
            load.calls(point).await;
            app.pause();
            // Leases last 3 s. What it holds is taken from it meanwhile.
            tokio::time::sleep(Duration::from_secs(6)).await;
            app.resume();
        }
    };
    tokio::join!(load.start(&clients, 250), stops);
    load.check(&other, &Orphans::default()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_past_its_leases() {
    let cluster = Cluster::start().await;
    let (clients, load) = (cluster.clients(), &cluster.load);
    let stops = async {
        for (worker, point) in cluster.workers.iter().zip([20, 120]) {
            load.calls(point).await;
            worker.signal("STOP");
            tokio::time::sleep(Duration::from_secs(6)).await;
            worker.signal("CONT");
        }
    };
    tokio::join!(load.start(&clients, 250), stops);
    load.check(&cluster.replicas[0], &Orphans::default()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_was_taken_for_dead_has_the_last_word_on_its_calls() {
    let model = ModelServer::start().await;
    let app = TestApp::builder().postgres().model_server(&model).start().await;
    let tenant = app.tenant("acme").await;
    let agent = agent(&tenant.client, "Agent", json!({})).await;
    model.script([Reply::text("hello world").usage(90, 40).hold()]);
    let run = start(&tenant.client, &agent, "Hi").await;
    model.wait_for_held(1).await;
    let db = app.database().await;
    // What 30 seconds do while nobody extends it; the sweeper comes before the answer.
    eventually("the call is taken for an orphan", async || {
        let_reservations_lapse(&db).await;
        rows_of(&db, &run).await.first().is_some_and(|row| row.estimated)
    })
    .await;
    assert!(model.release());
    until(&tenant.client, &run, "SUCCEEDED").await;
    assert_eq!(exact(&app, &tenant, &model).await.total(), 130);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_was_taken_for_an_orphan_and_is_refused_after_all_costs_nothing() {
    let model = ModelServer::start().await;
    // The sweeper comes twice a second.
    let builder = TestApp::builder().postgres().env("CLOISTER_RUNS__LEASE_SECONDS", "3");
    let app = builder.model_server(&model).start().await;
    let tenant = app.tenant("acme").await;
    let agent = agent(&tenant.client, "Agent", json!({})).await;
    model.script([Reply::status(400).delay(3_000)]);
    let run = start(&tenant.client, &agent, "Hi").await;
    model.wait_for("the call", |seen| seen.len() == 1).await;
    let db = app.database().await;
    eventually("the call is taken for an orphan", async || {
        let_reservations_lapse(&db).await;
        rows_of(&db, &run).await.first().is_some_and(|row| row.estimated)
    })
    .await;
    until(&tenant.client, &run, "FAILED").await;
    assert_eq!(agreed(&app, &tenant).await.requests, 0);
}
