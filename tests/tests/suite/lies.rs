//! A worker that lies, or is merely clumsy: each thing that it should not say is refused, and noted.

use std::time::{Duration, Instant};

use cloister_tests::app::TestAppBuilder;
use cloister_tests::client::http;
use cloister_tests::{ModelServer, Reply, Tenant, TestApp, Worker};
use entity::runs::Status;
use serde_json::{Value, json};

use super::both::on_both;
use super::calls::{done, tenant_rows};
use super::ledger::{agent, eventually, journal, look, run_row, settled, start, stored_status, uuid};
use super::workers::dedicated;

on_both!(
    what_a_worker_has_no_business_to_say_is_refused,
    a_repeated_append_is_stored_once,
    a_model_is_asked_within_what_the_agent_allows,
    long_polls_share_what_there_is,
);

/// What may stand in place of the real worker.
struct Door<'a> {
    app: &'a TestApp,
    token: String,
}

impl<'a> Door<'a> {
    async fn new(app: &'a TestApp, tenant: &Tenant) -> Door<'a> {
        Door { app, token: Worker::token(app, tenant).await.1 }
    }

    fn request(&self, path: &str, body: impl Into<String>) -> reqwest::RequestBuilder {
        let request = http().post(format!("{}/runtime/v1/{path}", self.app.runtime_url()));
        request.header("cloister-protocol", "1").bearer_auth(&self.token).body(body.into())
    }

    /// The status and, of a refusal, the code; else the body.
    async fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let answer = self.request(path, body.to_string()).send().await.unwrap();
        let (status, body) = (answer.status().as_u16(), answer.text().await.unwrap());
        let body: Value = serde_json::from_str(&body).unwrap_or(Value::String(body));
        (status, if status < 400 { body } else { body["code"].clone() })
    }

    async fn refused(&self, path: &str, body: &Value, status: u16, code: &str) {
        assert_eq!(self.post(path, body).await, (status, json!(code)), "{path} {body}");
    }

    async fn claim(&self) -> Value {
        let (status, body) = self.post("claims", &json!({"max": 1, "wait_ms": 20_000})).await;
        assert_eq!((status, body["claims"].as_array().map(Vec::len)), (200, Some(1)), "{body}");
        body["claims"][0].clone()
    }
}

fn request_of(claim: &Value) -> Value {
    let spec = &claim["spec"];
    let agent = &spec["agents"][spec["root"].as_str().unwrap()];
    json!({
        "model": agent["model"], "instructions": "Be brief.", "input": [{"type": "user", "text": "Hi"}], "tools": [],
        "max_output_tokens": agent["settings"]["max_output_tokens"],
    })
}

fn items(run: &Value, lease: &Value, from: i64, items: Value) -> (String, Value) {
    (format!("runs/{}/items", run.as_str().unwrap()), json!({"lease": lease, "from_seq": from, "items": items}))
}

async fn what_a_worker_has_no_business_to_say_is_refused(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    let app = builder.model_server(&model).start().await;
    let (alpha, beta) = (dedicated(&app, "alpha").await, dedicated(&app, "beta").await);
    let hook = json!({"webhook": {"name": "look", "description": "Looks.", "url": "https://example.com/"}});
    let agent = agent(&alpha.client, "Agent", json!({"tools": [hook]})).await;
    let (door, foreign) = (Door::new(&app, &alpha).await, Door::new(&app, &beta).await);
    let run = start(&alpha.client, &agent, "Hi").await;

    // Another tenant's worker neither gets the run nor learns that there is one.
    assert_eq!(foreign.post("claims", &json!({"max": 10, "wait_ms": 0})).await.1["claims"], json!([]));
    let claim = door.claim().await;
    let (lease, id) = (claim["lease"].clone(), claim["lease"]["run_id"].clone());
    assert_eq!((uuid(&run).to_string(), &lease["fence"]), (id.as_str().unwrap().to_owned(), &json!(1)));
    let end = json!([{"agent_name": "Agent", "turn": null, "kind": "status", "status": "succeeded", "error": null,
                      "output": "forged"}]);
    let nobody = json!("0190a1b2-0000-7000-8000-000000000000");
    for run in [&id, &nobody] {
        let (path, body) = items(run, &json!({"run_id": run, "fence": 1}), 2, end.clone());
        foreign.refused(&path, &body, 404, "not_found").await;
    }
    for path in ["release", "deltas", "model"] {
        let body = json!({"lease": lease, "deltas": [{"type": "restarted", "turn": 1}], "turn": 1, "from_seq": 2,
                          "request": request_of(&claim)});
        foreign.refused(&format!("runs/{}/{path}", id.as_str().unwrap()), &body, 404, "not_found").await;
    }
    let beat = foreign.post("heartbeats", &json!({"leases": [lease]})).await;
    assert_eq!(beat.1["runs"][id.as_str().unwrap()]["cancel"], true);

    // A model's answer, so that there is a call to be answered.
    model.script([Reply::text("Let me look.").and_tool_call("look", json!({})).call_id("call_a").usage(50, 5)]);
    let turn = json!({"lease": lease, "turn": 1, "from_seq": 2, "request": request_of(&claim)});
    let (status, events) = door.post(&format!("runs/{}/model", id.as_str().unwrap()), &turn).await;
    assert!(status == 200 && events.as_str().unwrap().contains("\"journaled\":true"), "{events}");
    let db = app.database().await;
    let before = journal(&db, &run).await.len();
    let next = i64::try_from(before).unwrap() + 1;
    let rows = tenant_rows(&app, &alpha.id).await;

    let step = |turn: Value, body: Value| {
        let mut step = json!({"agent_name": "Agent", "turn": turn});
        step.as_object_mut().unwrap().extend(body.as_object().unwrap().clone());
        step
    };
    let output = |call: &str, text: &str| {
        step(json!(1), json!({"kind": "tool_output", "call_id": call, "output": text, "is_error": false}))
    };
    let status = |status: &str| {
        let error = (status == "failed").then(|| json!({"code": "INTERNAL", "message": "No."}));
        step(Value::Null, json!({"kind": "status", "status": status, "error": error, "output": null}))
    };
    let usage = json!({"kind": "usage", "model": "scripted", "usage": {
        "input_tokens": 1, "cache_read_tokens": 0, "cache_write_tokens": 0, "output_tokens": 1, "reasoning_tokens": 0,
        "cost_nano_usd": 0, "estimated": false}});
    let message = json!({"kind": "message", "index": 1, "role": "assistant", "text": "forged"});
    let call = json!({"kind": "tool_call", "index": 2, "call_id": "x", "name": "look", "arguments": "{}",
                      "arguments_hash": ""});
    let handoff = json!({"kind": "handoff", "call_id": "call_a", "output": "", "to_agent_id": nobody,
                         "to_agent_name": "Agent"});
    for (what, refused) in [
        ("nothing", json!([])),
        ("a usage of its own", json!([step(json!(1), usage)])),
        ("a message", json!([step(json!(1), message)])),
        ("a call", json!([step(json!(1), call)])),
        ("a handoff to nobody", json!([step(json!(1), handoff)])),
        ("an output of no call", json!([output("call_b", "forged")])),
        ("an output twice", json!([output("call_a", "one"), output("call_a", "two")])),
        (
            "an output of another turn",
            json!([step(
                json!(2),
                json!({"kind": "tool_output", "call_id": "call_a", "output": "", "is_error": false})
            )]),
        ),
        ("NUL", json!([output("call_a", "\0")])),
        (
            "another agent",
            json!([{"agent_name": "Somebody", "turn": 1, "kind": "tool_output", "call_id": "call_a",
                                  "output": "", "is_error": false}]),
        ),
        ("queued", json!([status("queued")])),
        ("running", json!([status("running")])),
        ("cancelled", json!([status("cancelled")])),
        ("waiting for approval", json!([status("waiting_approval")])),
        ("an end without an output", json!([status("succeeded")])),
        ("something after the end", json!([status("failed"), output("call_a", "late")])),
        ("no kind at all", json!([{"agent_name": "Agent", "turn": 1}])),
    ] {
        let (path, body) = items(&id, &lease, next, refused);
        assert_eq!(door.post(&path, &body).await, (400, json!("invalid")), "{what}");
    }

    // Sequences and fences that are not the run's.
    let seen = json!([output("call_a", "seen")]);
    for from in [0, -1, 1, next - 1, next + 1, i64::MAX] {
        let (path, body) = items(&id, &lease, from, seen.clone());
        door.refused(&path, &body, 409, "wrong_sequence").await;
    }
    for fence in [0, 2, i64::MAX] {
        let stale = json!({"run_id": id, "fence": fence});
        let (path, body) = items(&id, &stale, next, seen.clone());
        door.refused(&path, &body, 409, "lease_lost").await;
        for path in ["release", "deltas", "model"] {
            let body = json!({"lease": stale, "deltas": [{"type": "restarted", "turn": 2}], "turn": 2, "from_seq": next,
                              "request": request_of(&claim)});
            door.refused(&format!("runs/{}/{path}", id.as_str().unwrap()), &body, 409, "lease_lost").await;
        }
        let beat = door.post("heartbeats", &json!({"leases": [stale]})).await;
        assert_eq!(beat.1["runs"][id.as_str().unwrap()]["cancel"], true);
    }
    let (_, body) = items(&id, &lease, next, seen.clone());
    door.refused(&format!("runs/{}/items", nobody.as_str().unwrap()), &body, 400, "invalid").await;

    // Too much: an item, and a body, which is not read to its end.
    let (path, body) = items(&id, &lease, next, json!([output("call_a", &"x".repeat(4 << 20))]));
    door.refused(&path, &body, 413, "too_large").await;
    let (path, body) = items(&id, &lease, next, json!([output("call_a", &"x".repeat(10 << 20))]));
    door.refused(&path, &body, 413, "too_large").await;
    door.refused(&path, &json!("no append"), 400, "invalid").await;

    // Text that no model has said, and turns that are not next.
    let path = format!("runs/{}/deltas", id.as_str().unwrap());
    let text = json!({"type": "text", "turn": 2, "index": 1, "offset": 0, "text": "forged"});
    for delta in [text, json!({"type": "restarted", "turn": 1}), json!({"type": "restarted", "turn": 3})] {
        door.refused(&path, &json!({"lease": lease, "deltas": [delta]}), 400, "invalid").await;
    }

    // Nothing of it was stored; each was counted and logged; and the run goes on.
    let mut now = tenant_rows(&app, &alpha.id).await;
    now.insert("runs".to_owned(), rows["runs"].clone());
    assert_eq!(now, rows);
    assert_eq!(journal(&db, &run).await.len(), before);
    let log = app.log();
    let noted = log.lines().filter(|line| line.contains("a worker's request was refused")).count();
    assert!(noted > 40, "{noted} refusals in the log");
    assert!(log.contains(&uuid(&beta.id).to_string()) && !log.contains("forged"));
    let metrics = app.admin().request(reqwest::Method::GET, "/metrics").send().await.unwrap().text().await.unwrap();
    for code in ["not_found", "invalid", "lease_lost", "wrong_sequence", "too_large"] {
        assert!(metrics.contains(&format!("cloister_runtime_refusals_total{{code=\"{code}\"}}")), "{code}: {metrics}");
    }
    let (path, body) = items(&id, &lease, next, seen);
    assert_eq!(door.post(&path, &body).await.0, 200);
    let (path, body) = items(&id, &lease, next + 1, json!([status("failed")]));
    assert_eq!(door.post(&path, &body).await.0, 200);
    assert_eq!(look(&alpha.client, &run).await["status"], "FAILED");
    let (path, body) = items(&id, &lease, next + 2, end);
    door.refused(&path, &body, 409, "lease_lost").await;
}

async fn a_repeated_append_is_stored_once(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    let app = builder.model_server(&model).start().await;
    let tenant = dedicated(&app, "acme").await;
    let agent = agent(&tenant.client, "Agent", json!({})).await;
    let door = Door::new(&app, &tenant).await;
    let run = start(&tenant.client, &agent, "Hi").await;
    let claim = door.claim().await;
    let (lease, id) = (&claim["lease"], &claim["lease"]["run_id"]);
    let end = |message: &str| {
        json!([{"agent_name": "Agent", "turn": null, "kind": "status", "status": "failed", "output": null,
                "error": {"code": "TOOL", "message": message}}])
    };
    let (path, body) = items(id, lease, 2, end("Nö."));
    for _ in 0..3 {
        let (status, standing) = door.post(&path, &body).await;
        assert_eq!((status, &standing["cancel"], &standing["pause"]), (200, &json!(false), &json!(false)));
    }
    let (path, other) = items(id, lease, 2, end("Something else."));
    door.refused(&path, &other, 409, "wrong_sequence").await;
    let db = app.database().await;
    assert_eq!(journal(&db, &run).await.len(), 2);
    assert_eq!(look(&tenant.client, &run).await["error"]["message"], "Nö.");
}

async fn a_model_is_asked_within_what_the_agent_allows(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    let app = builder.model_server(&model).start().await;
    let tenant = dedicated(&app, "acme").await;
    let settings = json!({"maxTurns": 1, "modelSettings": {"maxOutputTokens": 300}});
    let agent = agent(&tenant.client, "Agent", settings).await;
    let door = Door::new(&app, &tenant).await;
    let run = start(&tenant.client, &agent, "Hi").await;
    let claim = door.claim().await;
    let path = format!("runs/{}/model", claim["lease"]["run_id"].as_str().unwrap());
    let turn = |turn: u32, from: i64, change: Value| {
        let mut request = request_of(&claim);
        request.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        json!({"lease": claim["lease"], "turn": turn, "from_seq": from, "request": request})
    };
    for (wrong, status, code) in [
        (turn(1, 2, json!({"model": "demo"})), 400, "invalid"),
        (turn(1, 2, json!({"max_output_tokens": 100_000})), 400, "invalid"),
        (turn(1, 2, json!({"max_output_tokens": null})), 400, "invalid"),
        (turn(0, 2, json!({})), 400, "invalid"),
        (turn(2, 2, json!({})), 400, "invalid"),
        (turn(1, 3, json!({})), 409, "wrong_sequence"),
        (turn(1, 1, json!({})), 409, "wrong_sequence"),
    ] {
        door.refused(&path, &wrong, status, code).await;
    }
    assert!(model.requests().is_empty());

    // One call at a time. Who goes away leaves it to be charged, and its answer to the run.
    model.script([Reply::text("Hello.").usage(50, 5).hold()]);
    let call = door.request(&path, turn(1, 2, json!({})).to_string()).send().await.unwrap();
    model.wait_for_held(1).await;
    door.refused(&path, &turn(1, 2, json!({})), 409, "busy").await;
    drop(call);
    assert!(model.release());
    let db = app.database().await;
    stored_status(&db, &run, Status::Succeeded).await;
    settled(&db).await;
    assert_eq!(model.requests().len(), 1);
    assert_eq!(look(&tenant.client, &run).await["output"], "Hello.");
    door.refused(&path, &turn(2, 5, json!({})), 409, "lease_lost").await;
}

async fn long_polls_share_what_there_is(builder: TestAppBuilder) {
    let app = builder.start().await;
    let tenant = dedicated(&app, "acme").await;
    let agent = super::calls::new_agent(&tenant.client, json!({})).await;
    let door = Door::new(&app, &tenant).await;
    let poll = |max: u32| door.request("claims", json!({"max": max, "wait_ms": 25_000}).to_string()).send();
    // One that goes away while it waits claims nothing.
    let gone = tokio::time::timeout(Duration::from_millis(300), poll(5)).await;
    assert!(gone.is_err());
    let polls = futures_util::future::join_all((0..3).map(|_| async {
        let claims: Value = poll(1).await.unwrap().json().await.unwrap();
        assert_eq!(claims["claims"].as_array().unwrap().len(), 1, "{claims}");
        claims["claims"][0]["lease"]["run_id"].as_str().unwrap().to_owned()
    }));
    let begun = Instant::now();
    let (mut claimed, mut started) = tokio::join!(polls, async {
        let mut started = Vec::new();
        for _ in 0..3 {
            started.push(uuid(&start(&tenant.client, &agent, "Hi").await).to_string());
        }
        started
    });
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    claimed.sort();
    started.sort();
    assert_eq!(claimed, started, "each run once");

    // Suspended, the tenant's workers are told; its runs are theirs no longer.
    let waiting = tokio::spawn(poll(1));
    let suspended = Instant::now();
    done(&app.admin(), "suspendTenant", json!({"tenantId": tenant.id})).await;
    let answer = waiting.await.unwrap().unwrap();
    assert_eq!(answer.status().as_u16(), 403);
    assert!(suspended.elapsed() < Duration::from_secs(2), "{:?}", suspended.elapsed());
    let lease = json!({"run_id": claimed[0], "fence": 1});
    door.refused("heartbeats", &json!({"leases": [lease]}), 403, "tenant_suspended").await;
    done(&app.admin(), "resumeTenant", json!({"tenantId": tenant.id})).await;
    let (_, beat) = door.post("heartbeats", &json!({"leases": [lease]})).await;
    assert_eq!(beat["runs"][&claimed[0]]["cancel"], true);
    let worker = Worker::start(&app, &tenant).await;
    let db = app.database().await;
    eventually("the runs go on", async || {
        let mut all = true;
        for run in &started {
            let id = super::calls::type_id("run", run.parse().unwrap());
            all &= run_row(&db, &id).await.status == Status::Succeeded;
        }
        all
    })
    .await;
    drop(worker);
    let run = start(&tenant.client, &agent, "Hi").await;
    assert!(app.log().contains("tenant_suspended"));
    done(&app.admin(), "deleteTenant", json!({"tenantId": tenant.id})).await;
    door.refused("claims", &json!({"max": 1, "wait_ms": 0}), 403, "tenant_suspended").await;
    stored_status(&db, &run, Status::Cancelled).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_speaks_another_version_is_told_which() {
    let app = TestApp::start().await;
    let tenant = dedicated(&app, "acme").await;
    let door = Door::new(&app, &tenant).await;
    for version in [None, Some("2"), Some("")] {
        let mut request = http().post(format!("{}/runtime/v1/claims", app.runtime_url())).bearer_auth(&door.token);
        if let Some(version) = version {
            request = request.header("cloister-protocol", version);
        }
        let answer = request.json(&json!({"max": 1, "wait_ms": 0})).send().await.unwrap();
        assert_eq!((answer.status().as_u16(), &answer.headers()["cloister-protocol"]), (426, &"1".parse().unwrap()));
        let body: Value = answer.json().await.unwrap();
        let message = body["message"].as_str().unwrap();
        assert!(message.contains("version 1") && version.is_none_or(|spoken| message.contains(spoken)), "{message}");
    }
    for token in ["", "clr_nonsense", &tenant.key, &app.admin_key] {
        let stranger = Door { app: &app, token: token.to_owned() };
        stranger.refused("claims", &json!({"max": 1, "wait_ms": 0}), 401, "unauthenticated").await;
    }
    // Nor is a worker's token a key.
    let as_key = app.client(&door.token).query("{ viewer { scopes } }", json!({})).await;
    assert_eq!((as_key.status.as_u16(), as_key.error_code()), (401, Some("UNAUTHENTICATED")));
}
