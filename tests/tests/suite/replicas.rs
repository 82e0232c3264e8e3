//! Two replicas on one PostgreSQL and one Redis, and what is left of it when Redis is away.

use std::time::{Duration, Instant};

use cloister_tests::client::{SseStream, Ws};
use cloister_tests::{Client, RedisServer, Reply, TestApp};
use reqwest::Method;
use serde_json::{Value, json};

use crate::steps::{
    Stage, ended, events, events_query, granted, items_of, mutate, next_event, rest, start, text, try_cancel, until,
};

/// What I7 allows, and what a busy machine adds.
const AT_ONCE: Duration = Duration::from_millis(1_500);

/// Bytes and characters differ in it, and no chunk ends where a byte's count would.
const TEXT: &str = "Grüße aus 東京 😀👩‍👩‍👧 und «Zürich» – z̈, 🇩🇪, and then some more words until the very end of it.";

/// Two replicas, and what they share.
struct Cluster {
    // In this order: the replica goes before the database does.
    other: TestApp,
    stage: Stage,
    redis: RedisServer,
}

impl Cluster {
    async fn start() -> Cluster {
        let redis = RedisServer::start().await;
        let filter = "info,sqlx::query=debug,cloister_api::http=debug";
        let app = TestApp::builder().postgres().redis(&redis).env("CLOISTER_LOG__FILTER", filter);
        let stage = Stage::set(app).await;
        let other = stage.app.replica().await;
        let cluster = Cluster { other, stage, redis };
        cluster.until_redis_is("ok").await;
        cluster
    }

    fn replicas(&self) -> [&TestApp; 2] {
        [&self.stage.app, &self.other]
    }

    /// The tenant's client on each replica.
    fn clients(&self) -> [Client; 2] {
        self.clients_with(&self.stage.tenant.key)
    }

    fn clients_with(&self, key: &str) -> [Client; 2] {
        self.replicas().map(|replica| replica.client(key))
    }

    async fn until_redis_is(&self, state: &str) {
        for replica in self.replicas() {
            let ask = async || replica.anonymous().rest_get("/readyz").await;
            let ready = until(state, ask, |ready| ready.body["redis"] == state).await;
            assert_eq!((ready.status.as_u16(), &ready.body["ready"]), (200, &json!(true)), "{}", ready.body);
        }
    }

    /// A new key of the tenant: its id, and a client on each replica.
    async fn key(&self) -> (String, [Client; 2]) {
        let input = json!({"name": "k", "scopes": ["READ", "RUN"]});
        let selection = "secret apiKey { id }";
        let created = mutate(self.stage.client(), "createApiKey", "CreateApiKeyInput", selection, input).await;
        let created = granted(created);
        (text(&created["apiKey"]["id"]), self.clients_with(&text(&created["secret"])))
    }
}

/// The text that deltas of the first turn tell; each must begin where the one before it ended.
fn told(events: &[Value]) -> String {
    let mut whole = String::new();
    for delta in events.iter().filter(|event| event["__typename"] == "TextDelta") {
        assert_eq!((&delta["turn"], &delta["offset"]), (&json!(1), &json!(whole.len())), "neither gap nor repeat");
        whole.push_str(delta["text"].as_str().unwrap());
    }
    whole
}

/// Events up to the first delta.
async fn until_delta(stream: &mut SseStream) -> Vec<Value> {
    let mut told = Vec::new();
    while told.last().is_none_or(|event: &Value| event["__typename"] != "TextDelta") {
        told.push(next_event(stream).await.expect("the run goes on"));
    }
    told
}

async fn follow_ws(client: &Client, id: &str) -> Ws {
    let mut ws = client.ws_ready().await;
    ws.subscribe("1", &events_query(), json!({"id": id, "after": 0})).await;
    ws
}

async fn rest_of_ws(mut ws: Ws) -> Vec<Value> {
    let mut told = Vec::new();
    loop {
        let event = ws.next().await;
        match event.message() {
            next if next["type"] == "next" => told.push(next["payload"]["data"]["runEvents"].clone()),
            last => {
                assert_eq!(last["type"], "complete", "{last}");
                return told;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_is_followed_through_any_replica() {
    let cluster = Cluster::start().await;
    let stage = &cluster.stage;
    let agent = stage.agent(json!({"tools": [stage.tool("look")]})).await;
    let [here, there] = cluster.clients();
    for number in 0..4 {
        let reply = Reply::text(TEXT).chunks_of(1 + number).hold();
        let tools = Reply::text("First.").and_tool_call("look", json!({"a": 1}));
        stage.model.script([reply.and_tool_call("look", json!({"number": number})), tools, Reply::text("Done.")]);
        let id = start([&here, &there][number % 2], json!({"agentId": agent, "input": "Go"})).await;
        let from_start = follow_ws(&there, &id).await;
        stage.model.wait_for_held(1).await;
        // In the middle of the turn, over both transports, on the replica that has it and on the other.
        let mut streams = [events(&here, &id, 0).await, events(&there, &id, 0).await];
        let sockets = [follow_ws(&here, &id).await, follow_ws(&there, &id).await];
        let mut followed = Vec::new();
        for stream in &mut streams {
            let begun = until_delta(stream).await;
            assert_eq!(told(&begun), TEXT.chars().take(1 + number).collect::<String>());
            followed.push(begun);
        }
        stage.model.release();
        for (events, stream) in followed.iter_mut().zip(&mut streams) {
            events.extend(rest(stream).await);
        }
        followed.push(rest_of_ws(from_start).await);
        for socket in sockets {
            followed.push(rest_of_ws(socket).await);
        }
        let items = ended(&here, &id).await.items;
        let mut whole = 0;
        for events in &followed {
            assert_eq!(items_of(events), items);
            let first: Vec<Value> = events.iter().filter(|event| event["turn"] == 1).cloned().collect();
            let first = told(&first);
            // A socket may have begun to listen only after the turn had ended; then the item alone brings its text.
            assert!(first == TEXT || first.is_empty(), "{first}");
            whole += usize::from(first == TEXT);
        }
        assert!(whole >= streams.len(), "those that were seen to listen were told all of it");
        for after in 0..items.len() {
            let later = rest(&mut events(&there, &id, after as i64).await).await;
            assert_eq!(items_of(&later), items[after..]);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_are_told_on_every_replica_with_redis_and_without() {
    let mut cluster = Cluster::start().await;
    let agent = cluster.stage.agent(json!({})).await;
    cluster.stage.model.always(|_| Reply::text("Done").usage(7, 3));
    let mut tokens = 0;
    for redis in ["up", "away", "back"] {
        match redis {
            "away" => {
                cluster.redis.kill();
                cluster.until_redis_is("away: wake-ups by polling").await;
            }
            "back" => {
                cluster.redis.restart().await;
                cluster.until_redis_is("ok").await;
            }
            _ => {}
        }
        let clients = cluster.clients();
        let mut sockets = Vec::new();
        for client in &clients {
            let mut ws = client.ws_ready().await;
            ws.subscribe("runs", "subscription { runs { id status output } }", json!({})).await;
            ws.subscribe("usage", "subscription { usage { totalTokens reservedTokens } }", json!({})).await;
            assert_eq!(ws.next().await.message()["payload"]["data"]["usage"]["totalTokens"], json!(tokens));
            // What is answered after the subscriptions began is told by them.
            ws.subscribe("wait", "{ viewer { isPlatformAdmin } }", json!({})).await;
            while ws.next().await.message()["type"] != "complete" {}
            sockets.push(ws);
        }
        let mut ids = Vec::new();
        for number in 0..6 {
            ids.push(start(&clients[number % 2], json!({"agentId": agent, "input": "Go"})).await);
            tokens += 10;
        }
        for mut ws in sockets {
            let mut runs: Vec<(String, String)> = Vec::new();
            let mut used = 0;
            while used != tokens || runs.iter().filter(|(_, status)| status == "SUCCEEDED").count() < 6 {
                let message = ws.next().await.message()["payload"]["data"].clone();
                if message["runs"].is_object() {
                    runs.push((text(&message["runs"]["id"]), text(&message["runs"]["status"])));
                } else {
                    used = message["usage"]["totalTokens"].as_i64().expect("a number");
                }
            }
            for id in &ids {
                let order = ["QUEUED", "RUNNING", "SUCCEEDED"];
                let own: Vec<usize> = runs
                    .iter()
                    .filter(|(run, _)| run == id)
                    .map(|(_, status)| order.iter().position(|known| known == status).expect("a status"))
                    .collect();
                assert!(own.is_sorted_by(|a, b| a < b) && own.last() == Some(&2), "with Redis {redis}: {runs:?}");
            }
        }
    }
}

/// Waits until every client is refused and its socket closed, which must be soon.
async fn assert_cut(what: &str, clients: &[Client], sockets: Vec<Ws>, code: &str) {
    let begun = Instant::now();
    for mut ws in sockets {
        assert_eq!(ws.next().await.close_code(), Some(4403), "{what}");
    }
    for client in clients {
        let ask = async || client.query("{ usage { totalTokens } }", json!({})).await;
        until(what, ask, |answer| answer.error_code() == Some(code)).await;
    }
    assert!(begun.elapsed() < AT_ONCE, "{what}: only after {:?}", begun.elapsed());
}

/// Sockets of clients whose keys are known on their replicas.
async fn warm(clients: &[Client]) -> Vec<Ws> {
    let mut sockets = Vec::new();
    for client in clients {
        client.data("{ usage { totalTokens } }", json!({})).await;
        sockets.push(client.ws_ready().await);
    }
    sockets
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_right_is_lost_at_once_on_every_replica() {
    let mut cluster = Cluster::start().await;
    for redis in ["up", "away"] {
        if redis == "away" {
            cluster.redis.kill();
            cluster.until_redis_is("away: wake-ups by polling").await;
        }
        let stage = &cluster.stage;
        let (id, clients) = cluster.key().await;
        let sockets = warm(&clients).await;
        granted(
            mutate(stage.client(), "revokeApiKey", "ApiKeyIdInput", "apiKey { id }", json!({"apiKeyId": id})).await,
        );
        assert_cut(&format!("a revoked key, Redis {redis}"), &clients, sockets, "UNAUTHENTICATED").await;

        let (id, clients) = cluster.key().await;
        let sockets = warm(&clients).await;
        let narrowed = json!({"apiKeyId": id, "scopes": ["RUN"]});
        granted(mutate(stage.client(), "updateApiKey", "UpdateApiKeyInput", "apiKey { id }", narrowed).await);
        assert_cut(&format!("a lost scope, Redis {redis}"), &clients, sockets, "FORBIDDEN").await;

        let tenant = stage.app.tenant("beta").await;
        let clients = cluster.clients_with(&tenant.key);
        let sockets = warm(&clients).await;
        let admin = stage.app.admin();
        let input = json!({"tenantId": tenant.id});
        granted(mutate(&admin, "suspendTenant", "TenantIdInput", "tenant { id }", input.clone()).await);
        assert_cut(&format!("a suspended tenant, Redis {redis}"), &clients, sockets, "TENANT_SUSPENDED").await;
        granted(mutate(&cluster.other.admin(), "resumeTenant", "TenantIdInput", "tenant { id }", input).await);
        for client in &clients {
            let ask = async || client.query("{ usage { totalTokens } }", json!({})).await;
            until("it is served again", ask, |answer| answer.errors().is_empty()).await;
        }
    }
}

/// The statements of one request.
async fn statements(app: &TestApp, client: &Client, number: u64) -> usize {
    let trace = format!("{number:032x}");
    let request = client.request(Method::POST, "/graphql");
    let request = request.header("traceparent", format!("00-{trace}-{number:016x}-01"));
    let answer: Value =
        request.json(&json!({"query": "{ viewer { scopes } }"})).send().await.unwrap().json().await.unwrap();
    assert!(answer["errors"].is_null(), "{answer}");
    let log = async || app.log();
    let has_answered = |log: &String| log.lines().any(|line| line.contains(&trace) && line.contains("\"answered\""));
    let log = until("the request's log", log, has_answered).await;
    log.lines().filter(|line| line.contains(&trace) && line.contains("sqlx::query")).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_in_use_asks_no_database() {
    let mut cluster = Cluster::start().await;
    let (_, clients) = cluster.key().await;
    for (at, client) in clients.iter().enumerate() {
        let replica = cluster.replicas()[at];
        let first = statements(replica, client, 1).await;
        assert!((1..=2).contains(&first), "{first} statements: the log has those of the first use");
        for number in 2..20 {
            assert_eq!(statements(replica, client, number).await, 0);
        }
    }
    cluster.redis.kill();
    cluster.until_redis_is("away: wake-ups by polling").await;
    assert_eq!(statements(&cluster.other, &clients[1], 20).await, 0, "Redis is not needed for it");
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_share_a_tenants_rate() {
    let mut cluster = Cluster::start().await;
    let tenant = cluster.stage.app.tenant_with("free", json!({"plan": "FREE"})).await;
    let clients = cluster.clients_with(&tenant.key);
    let begun = Instant::now();
    let mut passed = 0;
    let refused = loop {
        let answer = clients[passed % 2].query("{ viewer { scopes } }", json!({})).await;
        if answer.status != 200 {
            break answer;
        }
        let remaining: usize = answer.header("ratelimit-remaining").unwrap().parse().unwrap();
        assert!(remaining + passed >= 59 && remaining < 60, "{remaining} after {passed}");
        passed += 1;
    };
    assert!(passed >= 60 && passed as u64 <= 61 + begun.elapsed().as_secs(), "{passed} requests passed");
    assert_eq!((refused.status.as_u16(), refused.error_code()), (429, Some("RATE_LIMITED")), "{}", refused.body);
    assert_eq!((refused.header("ratelimit-remaining"), refused.header("retry-after")), (Some("0"), Some("1")));
    assert_eq!(clients[passed % 2].query("{ viewer { scopes } }", json!({})).await.status, 429);
    // A Redis that stands still delays one request, and no other: each replica limits by itself.
    cluster.redis.pause();
    let begun = Instant::now();
    for client in &clients {
        let answer = client.query("{ viewer { scopes } }", json!({})).await;
        assert_eq!((answer.status.as_u16(), answer.header("ratelimit-remaining")), (200, Some("59")));
    }
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    cluster.until_redis_is("away: wake-ups by polling").await;
    cluster.redis.resume();
    cluster.until_redis_is("ok").await;
    cluster.redis.kill();
    cluster.until_redis_is("away: wake-ups by polling").await;
    assert_eq!(clients[0].query("{ viewer { scopes } }", json!({})).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flushed_redis_costs_no_text() {
    let cluster = Cluster::start().await;
    let stage = &cluster.stage;
    let agent = stage.agent(json!({})).await;
    stage.model.script([Reply::text(TEXT).chunks_of(2).hold()]);
    let id = start(stage.client(), json!({"agentId": agent, "input": "Go"})).await;
    stage.model.wait_for_held(1).await;
    let clients = cluster.clients();
    let mut before = Vec::new();
    for client in &clients {
        let mut stream = events(client, &id, 0).await;
        before.push((until_delta(&mut stream).await, stream));
    }
    let (): () = cluster.redis.command(&["FLUSHALL"]).await;
    let after = [follow_ws(&clients[0], &id).await, follow_ws(&clients[1], &id).await];
    stage.model.release();
    let mut whole = 0;
    for (mut events, mut stream) in before {
        events.extend(rest(&mut stream).await);
        assert_eq!(told(&events), TEXT, "who was there before misses nothing");
        assert_eq!(items_of(&events), ended(&clients[0], &id).await.items);
    }
    for socket in after {
        let events = rest_of_ws(socket).await;
        let told = told(&events);
        assert!(told.is_empty() || told == TEXT, "{told:?}");
        whole += usize::from(told == TEXT);
        assert_eq!(items_of(&events), ended(&clients[0], &id).await.items);
    }
    assert!(whole >= 1, "the worker's own replica has it all");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_goes_and_comes_back_costs_no_text() {
    let mut cluster = Cluster::start().await;
    let agent = cluster.stage.agent(json!({})).await;
    let clients = cluster.clients();
    cluster.stage.model.script([Reply::text(TEXT).chunks_of(3).hold(), Reply::text(TEXT).chunks_of(3).hold()]);
    let go = json!({"agentId": agent, "input": "Go"});
    let id = start(&clients[0], go.clone()).await;
    cluster.stage.model.wait_for_held(1).await;
    let mut followed = Vec::new();
    for client in &clients {
        let mut stream = events(client, &id, 0).await;
        followed.push((until_delta(&mut stream).await, stream));
    }
    cluster.redis.kill();
    cluster.until_redis_is("away: wake-ups by polling").await;
    cluster.redis.restart().await;
    cluster.until_redis_is("ok").await;
    for client in &clients {
        let mut stream = events(client, &id, 0).await;
        followed.push((until_delta(&mut stream).await, stream));
    }
    cluster.stage.model.release();
    for (mut events, mut stream) in followed {
        events.extend(rest(&mut stream).await);
        assert_eq!(told(&events), TEXT);
        assert_eq!(items_of(&events), ended(&clients[0], &id).await.items);
    }
    for replica in cluster.replicas() {
        let log = replica.log();
        let count = |what: &str| log.lines().filter(|line| line.contains(what)).count();
        assert_eq!((count("Redis is away"), count("Redis is connected")), (1, 2), "one line a change");
    }
    // Without it: items come by polling, whoever has the run.
    cluster.redis.kill();
    cluster.until_redis_is("away: wake-ups by polling").await;
    let id = start(&clients[0], go).await;
    cluster.stage.model.wait_for_held(1).await;
    let sockets = [follow_ws(&clients[0], &id).await, follow_ws(&clients[1], &id).await];
    cluster.stage.model.release();
    for socket in sockets {
        let events = rest_of_ws(socket).await;
        let told = told(&events);
        assert!(told.is_empty() || told == TEXT, "{told:?}");
        assert_eq!(items_of(&events), ended(&clients[1], &id).await.items);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_run_is_dropped_by_whichever_replica_has_it() {
    let cluster = Cluster::start().await;
    let stage = &cluster.stage;
    stage.model.always(|_| Reply::text("Held").hold());
    let agent = stage.agent(json!({})).await;
    let mut ids = Vec::new();
    for client in cluster.clients().iter().cycle().take(6) {
        ids.push(start(client, json!({"agentId": agent, "input": "Go"})).await);
    }
    stage.model.wait_for_held(6).await;
    let active = async || {
        let mut active = 0;
        for replica in cluster.replicas() {
            let scraped = replica.admin().request(Method::GET, "/metrics").send().await.unwrap().text().await.unwrap();
            let gauge = |name: &str| -> Option<f64> {
                scraped.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
            };
            assert_eq!(gauge("cloister_redis_up "), Some(1.0), "{scraped}");
            active += gauge("cloister_runs_active ").expect("the gauge") as usize;
        }
        active
    };
    assert_eq!(active().await, 6);
    for id in &ids {
        granted(try_cancel(&cluster.clients()[1], id).await);
    }
    let begun = Instant::now();
    until("all are dropped", active, |active| *active == 0).await;
    assert!(begun.elapsed() < Duration::from_secs(5), "long before leases are renewed: {:?}", begun.elapsed());
    stage.model.release_all();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_starts_without_its_redis() {
    let mut redis = RedisServer::start().await;
    redis.kill();
    let stage = Stage::set(TestApp::builder().postgres().redis(&redis)).await;
    let redis_is = async || stage.app.anonymous().rest_get("/readyz").await.body["redis"].clone();
    until("it is known to be away", redis_is, |state| state == "away: wake-ups by polling").await;
    let agent = stage.agent(json!({})).await;
    stage.model.always(|_| Reply::text("Done"));
    assert_eq!(stage.run(&agent, "Go").await.output(), "Done");
    redis.restart().await;
    until("it is found", redis_is, |state| state == "ok").await;
    assert_eq!(stage.run(&agent, "Go").await.output(), "Done");
    let log = stage.app.log();
    assert_eq!(log.lines().filter(|line| line.contains("Redis is away")).count(), 1, "told once");
}
