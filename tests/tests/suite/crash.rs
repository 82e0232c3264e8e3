//! The server dies, or is asked to go, in the middle of runs; the next one goes on with them.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use cloister_tests::app::TestAppBuilder;
use cloister_tests::model_server::RecordedRequest;
use cloister_tests::{ModelServer, Reply, Tenant, TestApp, ToolAnswer, ToolServer};
use entity::quota_reservations;
use entity::runs::Status;
use futures_util::future::join_all;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use sea_orm::{ConnectionTrait, DatabaseConnection, DbBackend, Statement};
use serde_json::json;
use tokio::sync::watch;
use uuid::Uuid;

use super::both::on_both;
use super::follow::{Followed, follow, turn_of};
use super::ledger::{
    EVENTS, agent, agreed, eventually, exact, journal, on_run, reservations, rows, rows_of, run_row, settled, start,
    stored_status, until, uuid,
};

on_both!(
    runs_survive_kills_at_twenty_points,
    a_call_in_the_midst_of_its_answer_is_estimated_and_repeated,
    a_cancelled_call_that_dies_while_it_is_drained_is_estimated,
    a_webhook_without_a_stored_output_is_called_again_with_the_same_key,
    sigterm_hands_runs_back_between_two_turns,
    sigterm_does_not_wait_longer_than_its_grace,
    who_has_seen_the_end_is_told_so,
);

/// Turns of a talkative run.
const TURNS: u64 = 5;

/// Waits until the dead server's last word to the database is done. PostgreSQL may still be at it.
pub async fn silent(db: &DatabaseConnection) {
    if db.get_database_backend() != DbBackend::Postgres {
        return;
    }
    let others = "SELECT count(*) AS others FROM pg_stat_activity
                  WHERE datname = current_database() AND application_name = 'cloister'";
    eventually("the dead server's connections are closed", async || {
        let row = db.query_one_raw(Statement::from_string(DbBackend::Postgres, others)).await.unwrap().unwrap();
        row.try_get::<i64>("", "others").unwrap() == 0
    })
    .await;
}

/// On PostgreSQL a dead server's reservations stand until they lapse; this is what time does.
pub async fn let_reservations_lapse(db: &DatabaseConnection) {
    if db.get_database_backend() == DbBackend::Postgres {
        let sql = "UPDATE quota_reservations SET expires_at = now() - interval '1 second'";
        db.execute_unprepared(sql).await.unwrap();
    }
}

/// What a kill left behind.
struct Wreck {
    reservations: Vec<quota_reservations::Model>,
    /// Finished turns, by run.
    turns: BTreeMap<Uuid, i32>,
    /// Requests that the provider had seen.
    requests: usize,
}

async fn kill(app: &mut TestApp, model: &ModelServer, runs: &[String]) -> Wreck {
    app.kill();
    let db = app.database().await;
    silent(&db).await;
    let reservations = reservations(&db).await;
    let mut turns = BTreeMap::new();
    for run in runs {
        turns.insert(uuid(run), run_row(&db, run).await.turns);
    }
    let_reservations_lapse(&db).await;
    // SQLite's file must be the next server's alone.
    db.close().await.unwrap();
    Wreck { reservations, turns, requests: model.requests().len() }
}

/// An agent with a slow webhook, and a model that calls it in every turn but the last.
async fn talkative(app: &TestApp, model: &ModelServer, tools: &ToolServer) -> (Tenant, String) {
    let tenant = app.tenant("acme").await;
    let tool = json!({"webhook": {
        "name": "look", "description": "Looks.", "url": tools.url("/look"),
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
    }});
    let agent = agent(&tenant.client, "Agent", json!({"tools": [tool]})).await;
    tools.always(|_| ToolAnswer::text("seen").delay(15));
    model.always(|request| {
        let turn = turn_of(request);
        let text = format!("Zug {turn} für {}: grün, rot und blau.", request.last_user_text());
        let reply = Reply::text(text).usage(10_000 + request.number, 100 + turn).chunk_delay(4);
        if turn < TURNS { reply.and_tool_call("look", json!({"at": format!("Straße {turn}")})) } else { reply }
    });
    (tenant, agent)
}

async fn runs_survive_kills_at_twenty_points(builder: TestAppBuilder) {
    let mut random = StdRng::seed_from_u64(0xC101_57E5);
    let model = ModelServer::start().await;
    let tools = ToolServer::start().await;
    let mut app = builder.env("CLOISTER_RUNS__LEASE_SECONDS", "3").model_server(&model).start().await;
    let (tenant, agent) = talkative(&app, &model, &tools).await;
    let client = &tenant.client;
    // Each kill meets each run at a point of its own. On PostgreSQL leases must lapse after it, which takes 3 s.
    let (count_of_runs, kills) = if app.database_url().starts_with("postgres") { (11, 2) } else { (6, 4) };

    let mut runs = Vec::new();
    for number in 0..count_of_runs {
        runs.push(start(client, &agent, &format!("Lauf {number}")).await);
    }
    let count = watch::Sender::new(0);
    let following = runs.iter().map(|run| tokio::spawn(follow(vec![client.clone()], run.clone(), count.clone())));
    let following: Vec<_> = following.collect();

    let mut wrecks = Vec::new();
    let mut seen = count.subscribe();
    for _ in 0..kills {
        // Some events on, and a moment more, so that any step of a turn may be the one that is cut.
        let until = *seen.borrow() + random.random_range(40..90);
        seen.wait_for(|count| *count >= until).await.unwrap();
        tokio::time::sleep(Duration::from_micros(random.random_range(0..5_000))).await;
        wrecks.push(kill(&mut app, &model, &runs).await);
        app.restart().await;
    }
    let followed: Vec<Followed> = join_all(following).await.into_iter().map(Result::unwrap).collect();
    let unfinished: usize = wrecks.iter().map(|wreck| wreck.turns.values().filter(|turns| **turns < 5).count()).sum();
    assert!(unfinished >= 20, "only {unfinished} runs were killed");

    // Each run ended well, and its subscriber has all of its journal.
    let db = app.database().await;
    for (run, followed) in runs.iter().zip(&followed) {
        let row = run_row(&db, run).await;
        assert_eq!((row.status, row.turns), (Status::Succeeded, 5), "{:?}", row.error_message);
        let items = journal(&db, run).await;
        let told: Vec<_> = followed.items.iter().map(|item| item["sequence"].as_i64().unwrap()).collect();
        assert_eq!(told, items.iter().map(|item| item.sequence).collect::<Vec<_>>());
        for (told, stored) in followed.items.iter().zip(&items) {
            let kind = told["__typename"].as_str().unwrap().trim_end_matches("Item").to_lowercase();
            assert_eq!(kind, stored.kind.replace('_', ""));
            for field in ["text", "callId", "arguments", "output"].iter().filter(|field| !told[**field].is_null()) {
                let stored = &stored.body[if *field == "callId" { "call_id" } else { *field }];
                assert_eq!(&told[*field], stored);
            }
        }
        let kinds: Vec<_> = items.iter().map(|item| item.kind.as_str()).collect();
        let mut expected = vec!["message"];
        for _ in 1..TURNS {
            expected.extend(["message", "tool_call", "usage", "tool_output"]);
        }
        expected.extend(["message", "usage", "status"]);
        assert_eq!(kinds, expected);
    }
    let told_whole: usize = followed.iter().map(|followed| followed.told_whole).sum();
    assert!(told_whole > runs.len() * 3, "only {told_whole} parts were told whole by their deltas");

    check_ledger(&app, &tenant, &model, &runs, &wrecks).await;

    // Each tool call was made, some again, always under its own key.
    let mut keys: BTreeMap<String, String> = BTreeMap::new();
    for request in tools.requests() {
        let key = request.header("idempotency-key").unwrap().to_owned();
        let body = String::from_utf8(request.body.to_vec()).unwrap();
        assert_eq!(keys.entry(key).or_insert_with(|| body.clone()), &body);
    }
    assert_eq!(keys.len(), runs.len() * (usize::try_from(TURNS).unwrap() - 1));
}

/// Every call has one row: to the token if its process survived it, else an estimate within its reservation.
async fn check_ledger(app: &TestApp, tenant: &Tenant, model: &ModelServer, runs: &[String], wrecks: &[Wreck]) {
    let db = app.database().await;
    settled(&db).await;
    let rows = rows(&db).await;
    let mut orphans = BTreeMap::new();
    for orphan in wrecks.iter().flat_map(|wreck| &wreck.reservations) {
        let own: Vec<_> = rows.iter().filter(|row| row.call_id == orphan.call_id).collect();
        if orphan.sent {
            let [row] = own[..] else { panic!("{} rows of {orphan:?}", own.len()) };
            assert!(row.estimated && row.input_tokens == orphan.input_tokens, "{row:?}");
            assert!(row.input_tokens + row.output_tokens <= orphan.tokens, "{row:?} of {orphan:?}");
            *orphans.entry((orphan.run_id.unwrap(), orphan.turn.unwrap())).or_insert(0) += 1;
        } else {
            assert!(own.is_empty(), "{own:?} of {orphan:?}");
        }
    }
    let survived: Vec<_> = rows.iter().filter(|row| !row.estimated).collect();
    let estimated = rows.len() - survived.len();
    assert_eq!(estimated, orphans.values().sum::<usize>(), "an estimate without an orphan");
    assert!(estimated >= wrecks.len(), "hardly a call was under way when the server died");
    assert_eq!(survived.len(), runs.len() * usize::try_from(TURNS).unwrap(), "one exact row for each turn");

    let run_of = |request: &RecordedRequest| {
        let text = request.last_user_text();
        uuid(&runs[text.strip_prefix("Lauf ").unwrap().parse::<usize>().unwrap()])
    };
    let requests = model.requests();
    for request in &requests {
        let (run, turn) = (run_of(request), i32::try_from(turn_of(request)).unwrap());
        let exact: Vec<_> =
            survived.iter().filter(|row| row.input_tokens == 10_000 + i64::try_from(request.number).unwrap()).collect();
        match exact[..] {
            [row] => {
                let told = (row.run_id, row.turn, row.output_tokens);
                assert_eq!(told, (Some(run), Some(turn), 100 + i64::from(turn)));
            }
            [] => {
                let left = orphans.get_mut(&(run, turn)).filter(|left| **left > 0);
                *left.unwrap_or_else(|| panic!("request {} of turn {turn} has no row", request.number)) -= 1;
            }
            _ => panic!("request {} has {} rows", request.number, exact.len()),
        }
    }
    for wreck in wrecks {
        for request in &requests[wreck.requests..] {
            let (run, turn) = (run_of(request), i32::try_from(turn_of(request)).unwrap());
            assert!(turn > wreck.turns[&run], "a finished turn is paid again: turn {turn} of {run}");
        }
    }
    agreed(app, tenant).await;
}

async fn a_call_in_the_midst_of_its_answer_is_estimated_and_repeated(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    let mut app = builder.env("CLOISTER_RUNS__LEASE_SECONDS", "3").model_server(&model).start().await;
    let tenant = app.tenant("acme").await;
    let agent = agent(&tenant.client, "Agent", json!({})).await;
    model.script([Reply::text("hello world, again").chunks_of(11).usage(90, 40).hold()]);
    let run = start(&tenant.client, &agent, "Hi").await;
    model.wait_for_held(1).await;
    let db = app.database().await;
    eventually("what has arrived is noted", async || reservations(&db).await[0].output_tokens == 2).await;
    db.close().await.unwrap();
    let wreck = kill(&mut app, &model, std::slice::from_ref(&run)).await;
    let [orphan] = &wreck.reservations[..] else { panic!("{:?}", wreck.reservations) };
    model.script([Reply::text("hello again").usage(91, 41)]);
    app.restart().await;
    until(&tenant.client, &run, "SUCCEEDED").await;
    settled(&app.database().await).await;
    let rows = rows_of(&app.database().await, &run).await;
    let told: Vec<_> = rows.iter().map(|row| (row.input_tokens, row.output_tokens, row.estimated)).collect();
    assert_eq!(told, [(orphan.input_tokens, 2, true), (91, 41, false)]);
    assert_eq!((rows[0].call_id, rows[0].created_at), (orphan.call_id, orphan.created_at));
    agreed(&app, &tenant).await;
}

async fn a_cancelled_call_that_dies_while_it_is_drained_is_estimated(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    let mut app = builder.model_server(&model).start().await;
    let tenant = app.tenant("acme").await;
    let agent = agent(&tenant.client, "Agent", json!({})).await;
    model.script([Reply::text("hello world").usage(90, 40).hold()]);
    let run = start(&tenant.client, &agent, "Hi").await;
    model.wait_for_held(1).await;
    assert_eq!(on_run(&tenant.client, "cancelRun", &run).await["run"]["status"], "CANCELLED");
    let wreck = kill(&mut app, &model, std::slice::from_ref(&run)).await;
    let [orphan] = &wreck.reservations[..] else { panic!("{:?}", wreck.reservations) };
    app.restart().await;
    let db = app.database().await;
    settled(&db).await;
    let [row] = &rows(&db).await[..] else { panic!("not one row") };
    assert!(row.call_id == orphan.call_id && row.estimated, "{row:?}");
    assert!((orphan.input_tokens..=orphan.tokens).contains(&(row.input_tokens + row.output_tokens)), "{row:?}");
    assert_eq!((run_row(&db, &run).await.status, model.requests().len()), (Status::Cancelled, 1));
    agreed(&app, &tenant).await;
}

async fn a_webhook_without_a_stored_output_is_called_again_with_the_same_key(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    let tools = ToolServer::start().await;
    let mut app = builder.env("CLOISTER_RUNS__LEASE_SECONDS", "3").model_server(&model).start().await;
    let tenant = app.tenant("acme").await;
    let tool =
        |name: &str| json!({"webhook": {"name": name, "description": "Works.", "url": tools.url(&format!("/{name}"))}});
    let agent = agent(&tenant.client, "Agent", json!({"tools": [tool("fast"), tool("slow")]})).await;
    model.script([
        Reply::tool_call("fast", json!({})).and_tool_call("slow", json!({})).usage(50, 5),
        Reply::text("Done.").usage(60, 6),
    ]);
    tools.always(|request| if request.path == "/slow" { ToolAnswer::hang() } else { ToolAnswer::text("quick") });
    let run = start(&tenant.client, &agent, "Hi").await;
    tools.wait_for_requests(2).await;
    let db = app.database().await;
    let outputs = async || journal(&db, &run).await.iter().filter(|item| item.kind == "tool_output").count();
    eventually("the fast tool's output is stored", async || outputs().await == 1).await;
    drop(db);
    app.kill();
    tools.always(|request| ToolAnswer::text(format!("{} at last", request.path)));
    app.restart().await;
    until(&tenant.client, &run, "SUCCEEDED").await;

    let requests = tools.requests();
    let mut keys: Vec<_> =
        requests.iter().map(|request| (&request.path[..], request.header("idempotency-key"))).collect();
    // The first two were made side by side.
    keys[..2].sort_unstable();
    let id = uuid(&run);
    let (fast, slow) = (format!("{id}:1.0"), format!("{id}:1.1"));
    assert_eq!(keys, [("/fast", Some(&fast[..])), ("/slow", Some(&slow)), ("/slow", Some(&slow))]);
    assert_eq!(model.requests().len(), 2);
    let told: Vec<_> =
        model.requests()[1].messages().iter().filter(|message| message["role"] == "tool").cloned().collect();
    assert_eq!((&told[0]["content"], &told[1]["content"]), (&json!("quick"), &json!("/slow at last")));
    exact(&app, &tenant, &model).await;
}

async fn sigterm_hands_runs_back_between_two_turns(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    let tools = ToolServer::start().await;
    // Leases of the usual 30 s: nobody waits for one to lapse.
    let mut app = builder.model_server(&model).start().await;
    let tenant = app.tenant("acme").await;
    let tool = json!({"webhook": {"name": "look", "description": "Looks.", "url": tools.url("/")}});
    let agent = agent(&tenant.client, "Agent", json!({"tools": [tool]})).await;
    model.script([
        Reply::text("Let me look.").and_tool_call("look", json!({})).usage(50, 5).hold(),
        Reply::text("Done.").usage(60, 6),
    ]);
    let run = start(&tenant.client, &agent, "Hi").await;
    model.wait_for_held(1).await;
    let mut events = tenant.client.subscribe_sse(EVENTS, json!({"run": run, "after": 0})).await;
    let begun = Instant::now();
    let (status, ()) = tokio::join!(app.terminate(), async {
        // The subscription ends, not completed, as soon as the server knows; the turn is still open.
        while events.next_result().await.is_some() {}
        assert!(!events.completed());
        assert!(model.release());
    });
    assert!(status.success());
    let db = app.database().await;
    let row = run_row(&db, &run).await;
    assert_eq!((row.status, row.turns, row.lease_until), (Status::Queued, 1, None));
    let kinds: Vec<_> = journal(&db, &run).await.into_iter().map(|item| item.kind).collect();
    assert_eq!(kinds, ["message", "message", "tool_call", "usage", "tool_output"]);
    assert_eq!((model.requests().len(), tools.requests().len(), reservations(&db).await.len()), (1, 1, 0));
    db.close().await.unwrap();

    app.restart().await;
    until(&tenant.client, &run, "SUCCEEDED").await;
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    assert_eq!((model.requests().len(), tools.requests().len()), (2, 1));
    assert_eq!(exact(&app, &tenant, &model).await.total(), 55 + 66);
}

async fn sigterm_does_not_wait_longer_than_its_grace(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    let mut app = builder.env("CLOISTER_SERVER__SHUTDOWN_SECONDS", "1").model_server(&model).start().await;
    let tenant = app.tenant("acme").await;
    let agent = agent(&tenant.client, "Agent", json!({})).await;
    model.script([Reply::text("hello world").usage(90, 40).hold(), Reply::text("Done.").usage(91, 6)]);
    let run = start(&tenant.client, &agent, "Hi").await;
    model.wait_for_held(1).await;
    assert!(app.terminate().await.success());
    let db = app.database().await;
    silent(&db).await;
    let row = run_row(&db, &run).await;
    assert_eq!((row.status, row.turns, row.lease_until), (Status::Queued, 0, None));
    let [orphan] = &reservations(&db).await[..] else { panic!("the call is still open") };
    let_reservations_lapse(&db).await;
    db.close().await.unwrap();

    app.restart().await;
    until(&tenant.client, &run, "SUCCEEDED").await;
    let db = app.database().await;
    settled(&db).await;
    let rows = rows_of(&db, &run).await;
    let told: Vec<_> = rows.iter().map(|row| (row.call_id == orphan.call_id, row.estimated)).collect();
    assert_eq!(told, [(true, true), (false, false)]);
    agreed(&app, &tenant).await;
}

async fn who_has_seen_the_end_is_told_so(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    let mut app = builder.model_server(&model).start().await;
    let tenant = app.tenant("acme").await;
    let agent = agent(&tenant.client, "Agent", json!({})).await;
    model.script([Reply::text("Over.").usage(9, 2)]);
    let run = start(&tenant.client, &agent, "Hi").await;
    stored_status(&app.database().await, &run, Status::Succeeded).await;
    app.restart().await;
    // message, message, usage, status
    for (after, left) in [(0, 4), (2, 2), (3, 1), (4, 0), (99, 0)] {
        let mut events = tenant.client.subscribe_sse(EVENTS, json!({"run": run, "after": after})).await;
        let mut sequences = Vec::new();
        while let Some(result) = events.next_result().await {
            sequences.push(result["data"]["runEvents"]["item"]["sequence"].as_i64().unwrap());
        }
        assert!(events.completed());
        assert_eq!(sequences, (5 - left..5).collect::<Vec<_>>(), "after {after}");
    }
}
