//! Workers apart: the real binary claims a dedicated tenant's runs, executes them, dies, and is replaced.

use std::time::{Duration, Instant};

use axum::Router;
use axum::http::StatusCode;
use cloister_tests::app::TestAppBuilder;
use cloister_tests::client::http;
use cloister_tests::{ModelServer, Reply, Tenant, TestApp, ToolAnswer, ToolServer, Worker};
use entity::runs::Status;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::both::on_both;
use super::calls::{self, done};
use super::follow::follow;
use super::ledger::{
    EVENTS, agent, agreed, eventually, exact, journal, look, on_run, rows_of, run_row, settled, start, stored_status,
    until,
};

on_both!(
    a_dedicated_tenants_runs_wait_for_its_own_worker,
    a_killed_workers_run_goes_on_with_the_next_one,
    a_stopped_worker_that_wakes_up_is_too_late,
    sigterm_hands_runs_back_between_two_turns,
    sigterm_does_not_wait_longer_than_its_grace,
    a_cancelled_run_is_dropped_by_its_worker,
    a_worker_outlives_the_api,
    tokens_are_rotated_and_revoked_under_way,
    a_tenant_that_leaves_its_workers_takes_its_queue_along,
);

/// A tenant whose runs are its own workers' to execute.
pub async fn dedicated(app: &TestApp, name: &str) -> Tenant {
    app.tenant_with(name, json!({"plan": "ENTERPRISE"})).await
}

fn look_tool(tools: &ToolServer) -> Value {
    json!({"tools": [{"webhook": {
        "name": "look", "description": "Looks.", "url": tools.url("/look"), "token": "tool-secret",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
    }}]})
}

async fn a_dedicated_tenants_runs_wait_for_its_own_worker(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    let tools = ToolServer::start().await;
    let app = builder.model_server(&model).start().await;
    let (tenant, shared) = (dedicated(&app, "acme").await, app.tenant("beta").await);
    let own = agent(&tenant.client, "Agent", look_tool(&tools)).await;
    let others = agent(&shared.client, "Agent", json!({})).await;
    model.always(|request| match request.last_user_text().as_str() {
        "Shared" => Reply::text("Done.").usage(9, 2),
        _ if request.messages().iter().any(|message| message["role"] == "tool") => {
            Reply::text("Die Straße ist grün.").chunks_of(3).chunk_delay(2).usage(60, 6)
        }
        _ => Reply::text("Mal sehen.").and_tool_call("look", json!({"at": "Straße"})).chunks_of(3).usage(50, 5),
    });
    let run = start(&tenant.client, &own, "Dedicated").await;
    until(&shared.client, &start(&shared.client, &others, "Shared").await, "SUCCEEDED").await;
    assert_eq!(look(&tenant.client, &run).await["status"], "QUEUED", "the shared pool has taken it");

    let following = tokio::spawn(follow(vec![tenant.client.clone()], run.clone(), watch::Sender::new(0)));
    let worker = Worker::start(&app, &tenant).await;
    let followed = following.await.unwrap();
    assert_eq!(followed.told_whole, 3, "two messages and a call by their deltas: {:?}", followed.items);
    let ended = until(&tenant.client, &run, "SUCCEEDED").await;
    assert_eq!((&ended["output"], &ended["turns"]), (&json!("Die Straße ist grün."), &json!(2)));
    let db = app.database().await;
    let kinds: Vec<_> = journal(&db, &run).await.into_iter().map(|item| item.kind).collect();
    assert_eq!(kinds, ["message", "message", "tool_call", "usage", "tool_output", "message", "usage", "status"]);
    assert_eq!(run_row(&db, &run).await.lease_until, None);
    let [call] = &tools.requests()[..] else { panic!("not one call") };
    assert_eq!(call.header("authorization"), Some("Bearer tool-secret"));
    assert!(call.header("webhook-signature").is_some());
    settled(&db).await;
    assert_eq!(rows_of(&db, &run).await.iter().map(|row| row.input_tokens + row.output_tokens).sum::<i64>(), 121);

    // Another run without a wait, and what the worker says of itself.
    until(&tenant.client, &start(&tenant.client, &own, "Again").await, "SUCCEEDED").await;
    let ready = http().get(worker.client().url("/readyz")).send().await.unwrap();
    assert_eq!(ready.status(), StatusCode::OK);
    assert!(worker.metrics().await.contains("cloister_runtime_runs_total{outcome=\"ended\"} 2"));
    let log = worker.log();
    assert!(!log.contains("clr_") && !log.contains("tool-secret") && !log.contains("Straße"), "{log}");
}

async fn a_killed_workers_run_goes_on_with_the_next_one(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    let tools = ToolServer::start().await;
    let app = builder.env("CLOISTER_RUNS__LEASE_SECONDS", "3").model_server(&model).start().await;
    let tenant = dedicated(&app, "acme").await;
    let agent = agent(&tenant.client, "Agent", look_tool(&tools)).await;
    let (_, token) = Worker::token(&app, &tenant).await;
    model.script([
        Reply::text("Mal sehen.").and_tool_call("look", json!({})).usage(50, 5),
        Reply::text("Grüße aus der Ferne, nie gehört.").chunks_of(4).usage(60, 9).hold(),
        Reply::text("Grüße aus der Nähe: ß, ö und ü.").chunks_of(3).usage(61, 10),
    ]);
    let mut first = Worker::builder(&app, &token).start().await;
    let run = start(&tenant.client, &agent, "Hi").await;
    let mut events = tenant.client.subscribe_sse(EVENTS, json!({"run": run, "after": 0})).await;
    let following = tokio::spawn(follow(vec![tenant.client.clone()], run.clone(), watch::Sender::new(0)));
    // Into the second turn, of which something has been told.
    loop {
        let event = events.next_result().await.expect("an event")["data"]["runEvents"].clone();
        if event["__typename"] == "TextDelta" && event["turn"] == 2 {
            break;
        }
    }
    first.kill();
    // Meanwhile the answer goes on to be read, and charged; nobody takes the run but a worker of the tenant.
    let db = app.database().await;
    stored_status(&db, &run, Status::Queued).await;
    let second = Worker::builder(&app, &token).start().await;
    let mut restarted = false;
    while let Some(result) = events.next_result().await {
        let event = &result["data"]["runEvents"];
        restarted |= event["__typename"] == "TurnRestarted" && event["turn"] == 2;
    }
    assert!(restarted, "nobody said that the turn begins anew");
    let followed = following.await.unwrap();
    assert_eq!(followed.told_whole, 3);
    assert_eq!(look(&tenant.client, &run).await["output"], "Grüße aus der Nähe: ß, ö und ü.");
    assert_eq!(tools.requests().len(), 1, "a finished turn's tool was called again");
    assert!(model.release());
    settled(&db).await;
    let charged: Vec<_> = rows_of(&db, &run).await.iter().map(|row| (row.turn, row.input_tokens)).collect();
    assert_eq!(charged, [(Some(1), 50), (Some(2), 60), (Some(2), 61)]);
    exact(&app, &tenant, &model).await;
    drop(second);
}

async fn a_stopped_worker_that_wakes_up_is_too_late(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    let tools = ToolServer::start().await;
    let app = builder.env("CLOISTER_RUNS__LEASE_SECONDS", "3").model_server(&model).start().await;
    let tenant = dedicated(&app, "acme").await;
    let agent = agent(&tenant.client, "Agent", look_tool(&tools)).await;
    let (_, token) = Worker::token(&app, &tenant).await;
    model.script([
        Reply::text("Mal sehen.").and_tool_call("look", json!({})).usage(50, 5),
        Reply::text("Fertig.").usage(60, 6),
    ]);
    tools.script([ToolAnswer::text("too late").delay(300), ToolAnswer::text("in time")]);
    let first = Worker::builder(&app, &token).start().await;
    let run = start(&tenant.client, &agent, "Hi").await;
    tools.wait_for_requests(1).await;
    first.signal("STOP");
    let db = app.database().await;
    stored_status(&db, &run, Status::Queued).await;
    let _second = Worker::builder(&app, &token).start().await;
    until(&tenant.client, &run, "SUCCEEDED").await;
    first.signal("CONT");
    eventually("the late worker has dropped the run", async || {
        first.metrics().await.contains("cloister_runtime_runs_total{outcome=\"lease_lost\"}")
    })
    .await;
    let outputs: Vec<_> =
        journal(&db, &run).await.into_iter().filter(|item| item.kind == "tool_output").map(|item| item.body).collect();
    assert_eq!((outputs.len(), &outputs[0]["output"]), (1, &json!("in time")));
    exact(&app, &tenant, &model).await;
}

async fn sigterm_hands_runs_back_between_two_turns(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    let tools = ToolServer::start().await;
    // Leases of the usual 30 s: nobody waits for one to lapse.
    let app = builder.model_server(&model).start().await;
    let tenant = dedicated(&app, "acme").await;
    let agent = agent(&tenant.client, "Agent", look_tool(&tools)).await;
    let (_, token) = Worker::token(&app, &tenant).await;
    model.script([
        Reply::text("Let me look.").and_tool_call("look", json!({})).usage(50, 5).hold(),
        Reply::text("Done.").usage(60, 6),
    ]);
    let mut first = Worker::builder(&app, &token).start().await;
    let run = start(&tenant.client, &agent, "Hi").await;
    model.wait_for_held(1).await;
    let begun = Instant::now();
    first.signal("TERM");
    eventually("the worker knows that it is to go", async || first.log().contains("finishing turns")).await;
    assert!(model.release());
    assert!(first.ended().await.success());
    let db = app.database().await;
    let row = run_row(&db, &run).await;
    assert_eq!((row.status, row.turns, row.lease_until), (Status::Queued, 1, None));
    let kinds: Vec<_> = journal(&db, &run).await.into_iter().map(|item| item.kind).collect();
    assert_eq!(kinds, ["message", "message", "tool_call", "usage", "tool_output"]);
    let _second = Worker::builder(&app, &token).start().await;
    until(&tenant.client, &run, "SUCCEEDED").await;
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    assert_eq!((model.requests().len(), tools.requests().len()), (2, 1));
    exact(&app, &tenant, &model).await;
}

async fn sigterm_does_not_wait_longer_than_its_grace(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    let app = builder.model_server(&model).start().await;
    let tenant = dedicated(&app, "acme").await;
    let agent = agent(&tenant.client, "Agent", json!({})).await;
    let (_, token) = Worker::token(&app, &tenant).await;
    model.script([Reply::text("hello world").usage(90, 40).hold(), Reply::text("Done.").usage(91, 6)]);
    let worker = Worker::builder(&app, &token).env("CLOISTER_RUNTIME__SHUTDOWN_SECONDS", "1");
    let mut first = worker.start().await;
    let run = start(&tenant.client, &agent, "Hi").await;
    model.wait_for_held(1).await;
    assert!(first.terminate().await.success());
    let db = app.database().await;
    let row = run_row(&db, &run).await;
    assert_eq!((row.status, row.turns, row.lease_until), (Status::Queued, 0, None));
    let _second = Worker::builder(&app, &token).start().await;
    until(&tenant.client, &run, "SUCCEEDED").await;
    assert!(model.release());
    settled(&db).await;
    let charged: Vec<_> = rows_of(&db, &run).await.iter().map(|row| (row.input_tokens, row.output_tokens)).collect();
    assert_eq!(charged, [(90, 40), (91, 6)]);
    exact(&app, &tenant, &model).await;
}

async fn a_cancelled_run_is_dropped_by_its_worker(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    let app = builder.model_server(&model).start().await;
    let tenant = dedicated(&app, "acme").await;
    let agent = agent(&tenant.client, "Agent", json!({})).await;
    let worker = Worker::start(&app, &tenant).await;
    model.script([Reply::text("hello world").usage(90, 40).hold()]);
    let run = start(&tenant.client, &agent, "Hi").await;
    model.wait_for_held(1).await;
    assert_eq!(on_run(&tenant.client, "cancelRun", &run).await["run"]["status"], "CANCELLED");
    // At once, and not with the next heartbeat in ten seconds.
    let cancelled = Instant::now();
    eventually("the worker has dropped the run", async || {
        worker.metrics().await.contains("cloister_runtime_runs_total{outcome=\"lease_lost\"} 1")
    })
    .await;
    assert!(cancelled.elapsed() < Duration::from_secs(5), "{:?}", cancelled.elapsed());
    assert!(model.release());
    exact(&app, &tenant, &model).await;
}

async fn a_worker_outlives_the_api(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    let tools = ToolServer::start().await;
    let mut app = builder.model_server(&model).start().await;
    let tenant = dedicated(&app, "acme").await;
    let agent = agent(&tenant.client, "Agent", look_tool(&tools)).await;
    let _worker = Worker::start(&app, &tenant).await;
    model.script([
        Reply::text("Mal sehen.").and_tool_call("look", json!({})).usage(50, 5),
        Reply::text("Fertig.").usage(60, 6),
    ]);
    tools.script([ToolAnswer::text("seen").delay(1_500)]);
    let run = start(&tenant.client, &agent, "Hi").await;
    tools.wait_for_requests(1).await;
    // In the midst of a tool call; its output is appended to the next one. An embedded server that starts voids all
    // leases, so there the run is claimed again.
    app.kill();
    app.restart().await;
    until(&tenant.client, &run, "SUCCEEDED").await;
    settled(&app.database().await).await;
    assert_eq!(model.requests().len(), 2, "a finished turn is paid again");
    exact(&app, &tenant, &model).await;
}

async fn tokens_are_rotated_and_revoked_under_way(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    let app = builder.env("CLOISTER_RUNS__LEASE_SECONDS", "3").model_server(&model).start().await;
    let tenant = dedicated(&app, "acme").await;
    let agent = agent(&tenant.client, "Agent", json!({})).await;
    model.always(|_| Reply::text("Done.").usage(9, 2));
    let succeeds = async || until(&tenant.client, &start(&tenant.client, &agent, "Hi").await, "SUCCEEDED").await;
    let (old_id, old) = Worker::token(&app, &tenant).await;
    let worker = Worker::builder(&app, &old).start().await;
    succeeds().await;

    let admin = app.admin();
    let rotated = done(&admin, "rotateRuntimeToken", json!({"runtimeTokenId": old_id, "graceSeconds": 600})).await;
    let (new_id, new) = (calls::text(&rotated, "/runtimeToken/id"), calls::text(&rotated, "/secret"));
    assert!(new_id != old_id && new != old);
    succeeds().await;
    assert!(!worker.log().contains("the token was replaced"));
    worker.set_token(&new);
    eventually("the worker has seen its new token", async || worker.log().contains("the token was replaced")).await;
    done(&admin, "revokeRuntimeToken", json!({"runtimeTokenId": old_id})).await;
    succeeds().await;
    assert_eq!(claim(&app, &old).await, 401);

    // Revoked in the midst of an answer: the worker gets none of it, and nothing more.
    model.script([Reply::text("held").usage(50, 5).hold()]);
    let run = start(&tenant.client, &agent, "Hi").await;
    model.wait_for_held(1).await;
    done(&admin, "revokeRuntimeToken", json!({"runtimeTokenId": new_id})).await;
    let revoked = Instant::now();
    assert_eq!(claim(&app, &new).await, 401);
    eventually("the worker was told", async || worker.log().contains("handing the run back")).await;
    assert!(revoked.elapsed() < Duration::from_secs(2), "{:?}", revoked.elapsed());
    stored_status(&app.database().await, &run, Status::Queued).await;
    let (_, third) = Worker::token(&app, &tenant).await;
    worker.set_token(&third);
    until(&tenant.client, &run, "SUCCEEDED").await;
    assert!(model.release());
    agreed(&app, &tenant).await;

    // What the tables hold is no token; what lists show is not enough to be one.
    let rows = calls::tenant_rows(&app, &tenant.id).await;
    assert_eq!(rows["runtime_tokens"].len(), 3);
    assert!(![&old, &new, &third].iter().any(|token| format!("{rows:?}").contains(&token[17..])));
    let list = "query ($id: ID!) { tenantById(id: $id) {
        runtimeTokens { nodes { id prefix revokedAt expiresAt lastUsedAt } } } }";
    let listed = admin.data(list, json!({"id": tenant.id})).await;
    let nodes = listed["tenantById"]["runtimeTokens"]["nodes"].as_array().unwrap().clone();
    assert_eq!(nodes.iter().map(|node| node["revokedAt"].is_null()).collect::<Vec<_>>(), [false, false, true]);
    assert!(nodes.iter().all(|node| node["prefix"].as_str().unwrap().len() == 16 && !node["lastUsedAt"].is_null()));
}

/// The status that a claim is answered with.
async fn claim(app: &TestApp, token: &str) -> u16 {
    let request = http().post(format!("{}/runtime/v1/claims", app.runtime_url())).header("cloister-protocol", "1");
    request.bearer_auth(token).json(&json!({"max": 1, "wait_ms": 0})).send().await.unwrap().status().as_u16()
}

async fn a_tenant_that_leaves_its_workers_takes_its_queue_along(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    let tools = ToolServer::start().await;
    let app = builder.env("CLOISTER_RUNS__LEASE_SECONDS", "3").model_server(&model).start().await;
    let tenant = dedicated(&app, "acme").await;
    let agent = agent(&tenant.client, "Agent", look_tool(&tools)).await;
    model.always(|request| match request.messages().iter().any(|message| message["role"] == "tool") {
        true => Reply::text("Done.").usage(60, 6),
        false => Reply::text("Let me look.").and_tool_call("look", json!({})).usage(50, 5),
    });
    tools.script([ToolAnswer::hang(), ToolAnswer::hang()]);
    let worker = |token: &str| Worker::builder(&app, token).env("CLOISTER_RUNTIME__CONCURRENCY", "1");
    let (_, token) = Worker::token(&app, &tenant).await;
    let (mut dies, lives) = (worker(&token).start().await, worker(&token).start().await);
    let held = [start(&tenant.client, &agent, "1").await, start(&tenant.client, &agent, "2").await];
    tools.wait_for_requests(2).await;
    let waiting = start(&tenant.client, &agent, "3").await;
    assert_eq!(look(&tenant.client, &waiting).await["status"], "QUEUED");
    done(&app.admin(), "setTenantPlan", json!({"tenantId": tenant.id, "plan": "PRO"})).await;
    until(&tenant.client, &waiting, "SUCCEEDED").await;
    // What the workers hold they may finish; what one leaves behind is the shared pool's.
    dies.kill();
    let db = app.database().await;
    eventually("the dead worker's run goes on in the shared pool", async || {
        let mut pools = Vec::new();
        for run in &held {
            pools.push(run_row(&db, run).await.pool);
        }
        pools.contains(&"shared".to_owned())
    })
    .await;
    drop(lives);
    for run in &held {
        until(&tenant.client, run, "SUCCEEDED").await;
    }
    exact(&app, &tenant, &model).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_of_another_version_ends_the_worker() {
    let refusal = json!({"code": "protocol_version", "message": "This api speaks version 2, the worker version 1."});
    let claims = json!({"claims": [{"lease": {"run_id": "7", "fence": "first"}}], "lease_ms": 30_000});
    for (status, body, said) in [
        (StatusCode::UPGRADE_REQUIRED, refusal, "This api speaks version 2, the worker version 1."),
        (StatusCode::OK, claims, "Run a worker of the api's release."),
    ] {
        let answer = (status, [("content-type", "application/json")], body.to_string());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let serving = tokio::spawn(async move {
            axum::serve(listener, Router::new().fallback(move || async move { answer })).await.unwrap();
        });
        let mut worker = Worker::at(&url, "clr_any").start().await;
        assert!(!worker.ended().await.success());
        eventually("it says why", async || worker.log().contains(said)).await;
        serving.abort();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_door_opens_on_its_own_port() {
    let app = TestApp::start().await;
    let status = async |url: String| http().post(url).send().await.unwrap().status().as_u16();
    for path in ["/runtime/v1/claims", "/runtime/v1/heartbeats", "/runtime/v1/runs/1/items"] {
        assert_eq!(status(format!("{}{path}", app.url())).await, 404, "{path} for clients");
        assert_eq!(status(format!("{}{path}", app.runtime_url())).await, 426, "{path} for workers");
    }
    for path in ["/graphql", "/v1/run", "/metrics", "/graphiql"] {
        assert_eq!(status(format!("{}{path}", app.runtime_url())).await, 404, "{path} for workers");
    }
    for url in [app.url(), app.runtime_url()] {
        for path in ["/healthz", "/readyz"] {
            assert_eq!(http().get(format!("{url}{path}")).send().await.unwrap().status(), StatusCode::OK);
        }
    }
}
