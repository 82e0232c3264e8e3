//! Defects that were mended, one test each, so that they stay mended.

use std::process::Output;
use std::time::{Duration, Instant};

use cloister_tests::app::TestAppBuilder;
use cloister_tests::client::Ws;
use cloister_tests::postgres::PostgresDatabase;
use cloister_tests::{Client, GraphqlResponse, PATIENCE, Reply, TestApp};
use entity::runs::Status;
use entity::{TenantOwned, tenant_queues};
use futures_util::future::join_all;
use sea_orm::{ColumnTrait, DatabaseConnection, QueryFilter};
use serde_json::{Value, json};

use crate::both::on_both;
use crate::calls::{done, new_key, uuid_of};
use crate::ledger::{exact, journal, run_row, settled, stored_status};
use crate::steps::{Stage, ended, granted, run, start, text, try_cancel, until};

on_both!(
    a_run_paused_for_longer_than_its_timeout_can_be_resumed,
    a_suspension_does_not_use_up_the_time_of_a_run,
    cancelling_queued_runs_while_others_start_loses_none,
    a_changed_cap_holds_for_tenants_that_exist,
    deleting_a_tenant_may_be_repeated_and_cancels_what_waits,
    a_tenant_holds_no_more_streams_than_it_may,
    a_provider_that_leaves_its_stream_open_does_not_stall_the_run,
    a_provider_that_asks_for_a_day_alone_is_unavailable_at_once,
    sigterm_answers_a_waiting_request_whose_run_is_handed_back,
);

/// The timeout of runs that are kept waiting, in seconds.
const TIMEOUT: i32 = 2;

/// Lets more time pass than a run with [`TIMEOUT`] has. Time itself is what these tests are about.
async fn let_the_timeout_pass() {
    tokio::time::sleep(Duration::from_millis(2_200)).await;
}

/// The plan PRO with this cap on runs at once, and room for a test's requests.
fn pro_plan(max_concurrent_runs: i32) -> Vec<(String, String)> {
    let cap = max_concurrent_runs.to_string();
    let fields = [
        ("BASE_PRICE", "49"),
        ("INCLUDED_TOKENS", "10000000"),
        ("OVERAGE_PER_MILLION", "5"),
        ("MONTHLY_TOKEN_LIMIT", "100000000"),
        ("MAX_CONCURRENT_RUNS", &cap),
        ("REQUESTS_PER_MINUTE", "6000"),
        ("WEIGHT", "4"),
    ];
    fields.map(|(name, value)| (format!("CLOISTER_PLANS__PRO__{name}"), value.to_owned())).into()
}

/// A stage whose tenants on the plan PRO have this cap.
async fn capped(app: TestAppBuilder, max_concurrent_runs: i32) -> Stage {
    let plan = pro_plan(max_concurrent_runs);
    Stage::set(plan.iter().fold(app, |app, (name, value)| app.env(name, value))).await
}

/// The one place that a tenant has in a queue.
async fn queue(db: &DatabaseConnection, tenant_id: &str) -> tenant_queues::Model {
    let own = tenant_queues::Entity::across_tenants().filter(tenant_queues::Column::TenantId.eq(uuid_of(tenant_id)));
    let [queue] = &own.all(db).await.unwrap()[..] else { panic!("a tenant has one queue") };
    queue.clone()
}

/// The changes of a run's status in its journal.
async fn statuses(db: &DatabaseConnection, run: &str) -> Vec<String> {
    let items = journal(db, run).await.into_iter().filter(|item| item.kind == "status");
    items.map(|item| text(&item.body["status"])).collect()
}

async fn set_limit(app: &TestApp, tenant_id: &str, limit: i64) {
    done(&app.admin(), "updateTenant", json!({"tenantId": tenant_id, "monthlyTokenLimit": limit})).await;
}

async fn a_run_paused_for_longer_than_its_timeout_can_be_resumed(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    set_limit(&stage.app, &stage.tenant.id, 6_000).await;
    // What the first turn leaves is too little for a second.
    stage.model.script([Reply::tool_call("look", json!({})).usage(5_000, 900), Reply::text("Done").usage(6_000, 10)]);
    let agent = stage.agent(json!({"tools": [stage.tool("look")]})).await;
    let input = json!({"agentId": agent, "input": "Go", "timeoutSeconds": TIMEOUT});
    let id = start(stage.client(), input).await;
    let db = stage.app.database().await;
    stored_status(&db, &id, Status::PausedQuota).await;
    let_the_timeout_pass().await;
    assert_eq!(run(stage.client(), &id).await["status"], "PAUSED_QUOTA");

    set_limit(&stage.app, &stage.tenant.id, 100_000).await;
    crate::quota::resume(stage.client(), &id).await;
    let ended = ended(stage.client(), &id).await;
    assert_eq!((ended.output().as_str(), &ended.run["turns"]), ("Done", &json!(2)));
    assert_eq!(statuses(&db, &id).await, ["paused_quota", "queued", "succeeded"]);
    assert_eq!((stage.model.requests().len(), stage.tools.requests().len()), (2, 1));
}

async fn a_suspension_does_not_use_up_the_time_of_a_run(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    stage.model.script([Reply::text("Unheard").hold(), Reply::text("Done").hold()]);
    let agent = stage.agent(json!({})).await;
    let input = json!({"agentId": agent, "input": "Go", "timeoutSeconds": TIMEOUT});
    let id = start(stage.client(), input).await;
    stage.model.wait_for_held(1).await;
    let tenant = json!({"tenantId": stage.tenant.id});
    let suspended = done(&stage.app.admin(), "suspendTenant", tenant.clone()).await;
    assert_eq!(suspended["tenant"]["status"], "SUSPENDED");
    let db = stage.app.database().await;
    stored_status(&db, &id, Status::Queued).await;
    let_the_timeout_pass().await;
    assert_eq!((run_row(&db, &id).await.status, stage.model.requests().len()), (Status::Queued, 1));

    done(&stage.app.admin(), "resumeTenant", tenant).await;
    // The call that the suspension cut short is read to its end too, for the books.
    stage.model.wait_for_held(2).await;
    assert_eq!(stage.model.release_all(), 2);
    assert_eq!(ended(stage.client(), &id).await.output(), "Done");
    assert_eq!(statuses(&db, &id).await, ["succeeded"]);
    assert_eq!(exact(&stage.app, &stage.tenant, &stage.model).await.requests, 2);
}

/// A start that a cancellation overlooks waits for ever: nothing claims from a queue that seems to be empty. Each
/// round ends with the run that it started being executed, since the next start would mend the queue.
async fn cancelling_queued_runs_while_others_start_loses_none(app: TestAppBuilder) {
    const ROUNDS: usize = 30;
    let stage = capped(app, 1).await;
    stage.model.always(|_| Reply::text("Done").hold());
    let agent = stage.agent(json!({})).await;
    let client = stage.client();
    let go = || start(client, json!({"agentId": agent, "input": "Go"}));
    let mut kept = vec![go().await];
    let mut cancelled = Vec::new();
    stage.model.wait_for_held(1).await;
    for round in 0..ROUNDS {
        let queued = go().await;
        // In either order, since the one that is sent first may always win.
        let (payload, started) = if round % 2 == 0 {
            tokio::join!(try_cancel(client, &queued), go())
        } else {
            let (started, payload) = tokio::join!(go(), try_cancel(client, &queued));
            (payload, started)
        };
        assert_eq!(granted(payload)["run"]["status"], "CANCELLED");
        cancelled.push(queued);
        kept.push(started);
        // The one that was held makes room for the one that was started.
        assert!(stage.model.release());
        stage.model.wait_for_held(1).await;
        assert_eq!(stage.model.requests().len(), kept.len());
    }
    assert_eq!(stage.model.release_all(), 1);
    let outputs = join_all(kept.iter().map(async |id| ended(client, id).await.output())).await;
    assert_eq!(outputs, vec!["Done"; ROUNDS + 1]);
    let db = stage.app.database().await;
    for id in &cancelled {
        let row = run_row(&db, id).await;
        assert_eq!((row.status, row.turns, row.started_at), (Status::Cancelled, 0, None));
    }
    let queue = queue(&db, &stage.tenant.id).await;
    assert_eq!((queue.running, queue.next_vtime), (0, None));
    assert_eq!(stage.model.requests().len(), ROUNDS + 1);
}

async fn a_changed_cap_holds_for_tenants_that_exist(app: TestAppBuilder) {
    let mut stage = capped(app, 1).await;
    stage.model.always(|_| Reply::text("Done").hold());
    let agent = stage.agent(json!({})).await;
    let client = stage.tenant.client.clone();
    let input = json!({"agentId": agent, "input": "Go"});
    let go = |count: usize| join_all((0..count).map(|_| start(&client, input.clone())));
    let db = stage.app.database().await;
    let before = go(2).await;
    for requests in [1, 2] {
        stage.model.wait_for_held(1).await;
        let queue = queue(&db, &stage.tenant.id).await;
        assert_eq!((queue.max_running, queue.running, stage.model.requests().len()), (1, 1, requests));
        assert!(stage.model.release());
    }
    for id in before {
        assert_eq!(ended(&client, &id).await.output(), "Done");
    }
    // SQLite's file must be the next server's alone.
    db.close().await.unwrap();

    for (name, value) in pro_plan(3) {
        stage.app.set_env(&name, &value);
    }
    stage.app.restart().await;
    let ids = go(4).await;
    stage.model.wait_for_held(3).await;
    let queue = queue(&stage.app.database().await, &stage.tenant.id).await;
    assert_eq!((queue.max_running, queue.running), (3, 3));
    assert_eq!((stage.model.requests().len(), stage.model.release_all()), (2 + 3, 3));
    stage.model.wait_for_held(1).await;
    assert!(stage.model.release());
    for id in ids {
        assert_eq!(ended(&client, &id).await.output(), "Done");
    }
}

async fn deleting_a_tenant_may_be_repeated_and_cancels_what_waits(app: TestAppBuilder) {
    let stage = capped(app, 1).await;
    stage.model.script([Reply::text("Unheard").hold()]);
    let agent = stage.agent(json!({})).await;
    // Its key has too little for a call.
    let input = json!({"name": "small", "scopes": ["READ", "RUN"], "monthlyTokenLimit": 100});
    let (_, key) = new_key(stage.client(), input).await;
    let small = stage.app.client(&key);
    let paused = start(&small, json!({"agentId": agent, "input": "Go", "newConversation": true})).await;
    let db = stage.app.database().await;
    stored_status(&db, &paused, Status::PausedQuota).await;
    let conversation = run(stage.client(), &paused).await["conversation"]["id"].clone();
    let running = start(stage.client(), json!({"agentId": agent, "input": "Go"})).await;
    stage.model.wait_for_held(1).await;
    let queued = start(stage.client(), json!({"agentId": agent, "input": "Go"})).await;
    let next = json!({"agentId": agent, "input": "Go", "conversationId": conversation});
    let waiting = start(stage.client(), next).await;
    for id in [&queued, &waiting] {
        assert_eq!(run_row(&db, id).await.status, Status::Queued);
    }

    let delete = async || done(&stage.app.admin(), "deleteTenant", json!({"tenantId": stage.tenant.id})).await;
    let deleted = json!({"deletedId": stage.tenant.id, "errors": []});
    assert_eq!(delete().await, deleted);
    let mut rows = Vec::new();
    for (id, told) in [
        (&paused, &["paused_quota", "cancelled"][..]),
        (&running, &["cancelled"]),
        (&queued, &["cancelled"]),
        (&waiting, &["cancelled"]),
    ] {
        let row = run_row(&db, id).await;
        assert_eq!((row.status, row.finished_at.is_some()), (Status::Cancelled, true));
        assert_eq!(statuses(&db, id).await, told);
        rows.push((id, row));
    }
    assert_eq!(queue(&db, &stage.tenant.id).await.max_running, 0);

    assert_eq!(delete().await, deleted);
    for (id, row) in rows {
        assert_eq!(run_row(&db, id).await, row, "the second deletion finds nothing to cancel");
    }
    assert!(stage.model.release());
    settled(&db).await;
    assert_eq!(stage.model.requests().len(), 1);
}

/// Opens a socket and says who it is; the code that it is closed with instead of being acknowledged.
async fn try_ws_ready(client: &Client, key: &str) -> Result<Ws, u16> {
    let mut ws = client.ws().await;
    let payload = json!({"Authorization": format!("Bearer {key}")});
    ws.send(&json!({"type": "connection_init", "payload": payload})).await;
    let answer = ws.next().await;
    match answer.close_code() {
        Some(code) => Err(code),
        None => {
            assert_eq!(answer.message()["type"], "connection_ack");
            Ok(ws)
        }
    }
}

async fn a_tenant_holds_no_more_streams_than_it_may(app: TestAppBuilder) {
    let app = app.env("CLOISTER_GRAPHQL__MAX_STREAMS_PER_TENANT", "2").start().await;
    let (tenant, other) = (app.tenant("acme").await, app.tenant("other").await);
    let client = &tenant.client;
    let sse = || client.try_subscribe_sse("subscription { usage { totalTokens } }", json!({}));
    let ws = || try_ws_ready(client, &tenant.key);
    let mut first = sse().await.expect("the first");
    assert_eq!(first.next_result().await.unwrap()["data"]["usage"]["totalTokens"], 0);
    let second = ws().await.expect("the second");

    let limited = |refused: GraphqlResponse| {
        assert_eq!((refused.status.as_u16(), refused.error_code()), (400, Some("LIMIT_EXCEEDED")), "{}", refused.body);
    };
    limited(sse().await.err().expect("a third stream"));
    assert_eq!(ws().await.err(), Some(4429));
    // What is no stream goes on, and so do others' streams.
    assert_eq!(client.query("{ usage { totalTokens } }", json!({})).await.status, 200);
    other.client.ws_ready().await;

    // One that is closed makes room for one, of either kind.
    drop(first);
    let third = until("room for a socket", ws, Result::is_ok).await.expect("room");
    limited(sse().await.err().expect("the room is taken"));
    assert_eq!(ws().await.err(), Some(4429));
    drop(second);
    let mut fourth = until("room for a stream", sse, Result::is_ok).await.expect("room");
    assert_eq!(fourth.next_result().await.unwrap()["data"]["usage"]["totalTokens"], 0);
    assert_eq!(ws().await.err(), Some(4429));
    drop((third, fourth));
    until("room again", ws, Result::is_ok).await.expect("room");
}

async fn a_provider_that_leaves_its_stream_open_does_not_stall_the_run(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let chunk = |fields: Value| {
        let mut chunk = json!({"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "scripted-1"});
        chunk.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        format!("data: {chunk}\n\n")
    };
    let usage = json!({"prompt_tokens": 12, "completion_tokens": 4, "total_tokens": 16});
    let said = [
        chunk(json!({"choices": [{"index": 0, "delta": {"content": "Done"}, "finish_reason": null}]})),
        chunk(json!({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})),
        chunk(json!({"choices": [], "usage": usage})),
    ]
    .concat();
    // The rest would come a minute later.
    let reply = Reply::raw(format!("{said}data: [DONE]\n\n")).wire_chunks_of(said.len()).chunk_delay(60_000);
    stage.model.script([reply.usage(12, 4)]);
    let agent = stage.agent(json!({})).await;
    let begun = Instant::now();
    assert_eq!(stage.run(&agent, "Go").await.output(), "Done");
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    let ledger = exact(&stage.app, &stage.tenant, &stage.model).await;
    assert_eq!((ledger.requests, ledger.input, ledger.output), (1, 12, 4));
}

async fn a_provider_that_asks_for_a_day_alone_is_unavailable_at_once(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    stage.model.script([Reply::status(429).retry_after(100_000), Reply::text("Too late")]);
    let agent = stage.agent(json!({})).await;
    let begun = Instant::now();
    let ended = stage.run(&agent, "Go").await;
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_eq!(ended.error(), "MODEL_UNAVAILABLE");
    let message = text(&ended.run["error"]["message"]);
    assert!(message.contains("429") && message.contains("100000 s"), "{message}");
    assert_eq!((stage.model.requests().len(), stage.model.unused()), (1, 1));
    settled(&stage.app.database().await).await;
}

async fn sigterm_answers_a_waiting_request_whose_run_is_handed_back(app: TestAppBuilder) {
    let mut stage = Stage::set(app).await;
    stage.model.script([Reply::tool_call("look", json!({})).hold(), Reply::text("Done")]);
    let agent = stage.agent(json!({"tools": [stage.tool("look")]})).await;
    let client = stage.tenant.client.clone();
    let waiting = tokio::spawn({
        let (client, body) = (client.clone(), json!({"agent_id": agent, "message": "Go"}));
        async move { (client.rest_post("/v1/run", &body).await, Instant::now()) }
    });
    stage.model.wait_for_held(1).await;
    let runs = client.data("{ runs { nodes { id } } }", json!({})).await["runs"]["nodes"].clone();
    let id = text(&runs[0]["id"]);
    assert_eq!(runs, json!([{"id": id}]));
    let mut changes = client.subscribe_sse("subscription { usage { totalTokens } }", json!({})).await;

    let asked = Instant::now();
    let (status, ()) = tokio::join!(stage.app.terminate(), async {
        // The subscription ends as soon as the server knows; the turn is still open.
        while changes.next_result().await.is_some() {}
        assert!(!waiting.is_finished(), "the run may still end here");
        assert!(stage.model.release());
    });
    assert!(status.success(), "{status}");
    let (answer, answered) = waiting.await.unwrap();
    let detail = format!("The run is still going on. Ask for it as {id}.");
    assert_eq!((answer.status.as_u16(), answer.body), (504, json!({"detail": detail})));
    // The grace period is 25 s.
    let took = answered - asked;
    assert!(took < Duration::from_secs(8), "{took:?}");
    let db = stage.app.database().await;
    let row = run_row(&db, &id).await;
    assert_eq!((row.status, row.turns, row.lease_until), (Status::Queued, 1, None));
    // SQLite's file must be the next server's alone.
    db.close().await.unwrap();

    stage.app.restart().await;
    assert_eq!(ended(&client, &id).await.output(), "Done");
    assert_eq!((stage.model.requests().len(), stage.tools.requests().len()), (2, 1));
}

/// Runs a subcommand that must fail, with one variable over the app's own; what it printed.
async fn failing(app: &TestApp, subcommand: &str, name: &str, value: &str) -> String {
    let mut command = tokio::process::Command::from(app.command(&[subcommand]));
    let ended = tokio::time::timeout(PATIENCE, command.env(name, value).kill_on_drop(true).output()).await;
    let Output { status, stdout, stderr } = ended.expect("it ends by itself").expect("cloister runs");
    let printed = String::from_utf8([stdout, stderr].concat()).expect("UTF-8");
    assert_eq!(status.code(), Some(1), "{subcommand} {value}: {printed}");
    printed
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_database_url_never_shows_its_password() {
    const PASSWORD: &str = "hunter2secret";
    let mut app = TestApp::start().await;
    app.kill();
    let postgres = PostgresDatabase::create().await;
    let (_, server) = postgres.url().rsplit_once('@').expect("a URL with a user");
    let (server, _) = server.rsplit_once('/').expect("a URL with a database");
    for url in [
        // No such database, no such option, and what is no URL in many ways.
        format!("postgres://postgres:{PASSWORD}@{server}/none"),
        format!("postgres://postgres:{PASSWORD}@{server}/none?sslmode=nonsense"),
        format!("postgres://cloister:{PASSWORD}@127.0.0.1:port/none"),
        format!("postgres://cloister:{PASSWORD}#@127.0.0.1/none"),
        format!("postgres://cloister:{PASSWORD}@[::1/none"),
        format!("postgres//cloister:{PASSWORD}@127.0.0.1/none"),
        format!("mysql://cloister:{PASSWORD}@127.0.0.1/none"),
    ] {
        for subcommand in ["serve", "migrate"] {
            let printed = failing(&app, subcommand, "CLOISTER_DATABASE__URL", &url).await;
            assert!(printed.contains("database.url"), "{subcommand} {url}: {printed}");
            assert!(!printed.contains(PASSWORD), "{subcommand} {url}: {printed}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_time_that_no_clock_can_hold_stops_the_start_with_its_name() {
    let mut app = TestApp::start().await;
    app.kill();
    let printed = failing(&app, "serve", "CLOISTER_RUNS__LEASE_SECONDS", "9223372036854775807").await;
    assert_eq!(printed, "cloister: configuration: runs.lease_seconds may be 604800 at most\n");
}
