//! A load of runs, and what must hold of it in the end whatever happened meanwhile.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use cloister_tests::app::TestAppBuilder;
use cloister_tests::model_server::Ending;
use cloister_tests::{Client, ModelServer, Reply, Tenant, TestApp, ToolAnswer, ToolServer};
use entity::runs::Status;
use entity::{TenantOwned, run_items, runs};
use futures_util::{StreamExt, stream};
use sea_orm::{ColumnTrait, DatabaseConnection, PaginatorTrait, QueryFilter, QueryOrder};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::crash::let_reservations_lapse;
use crate::follow::turn_of;
use crate::ledger::{agent, agreed, eventually, reservations, rows, uuid};

/// Requests to start runs that are under way at once.
const STARTERS: usize = 16;

/// How long a client tries to have a run accepted, and how long runs may stand still: a fault may last a while.
const PATIENCE: Duration = Duration::from_secs(150);

/// The scripted model's input tokens of its first request; each request has one more, which tells them apart.
const INPUT: u64 = 1_000;

/// Plans as wide as a test needs: a thousand runs a minute, fifty at once.
const PLANS: &str = r#"
[plans.pro]
base_price = "49"
included_tokens = 10000000
overage_per_million = "5"
monthly_token_limit = 1000000000
max_concurrent_runs = 50
requests_per_minute = 1000000
weight = 4

[plans.enterprise]
base_price = "299"
included_tokens = 100000000
overage_per_million = "3"
monthly_token_limit = 1000000000
max_concurrent_runs = 50
requests_per_minute = 1000000
weight = 16
"#;

/// Runs of one tenant: two thirds have one turn, the others a tool call and two. Each answer streams for some 20 ms.
pub struct Load {
    /// Answers them.
    pub model: ModelServer,
    /// Whose they are.
    pub tenant: Tenant,
    agent: String,
    /// Ids of the runs that a client was told of, by number.
    acknowledged: Mutex<BTreeMap<usize, String>>,
    asked: AtomicUsize,
    // Its address is the agent's.
    _tools: ToolServer,
}

/// The first server of a load, and its model server.
pub async fn first(builder: TestAppBuilder) -> (TestApp, ModelServer) {
    let model = ModelServer::start().await;
    let builder = builder.env("CLOISTER_RUNS__LEASE_SECONDS", "3").config(PLANS);
    (builder.model_server(&model).start().await, model)
}

/// Which rows of the ledger may be estimates.
#[derive(Clone, Debug, Default)]
pub struct Orphans(BTreeSet<Uuid>);

impl Orphans {
    /// Notes the calls that are under way now: a process was killed, and some of them were its.
    pub async fn note(&mut self, db: &DatabaseConnection) {
        self.0.extend(reservations(db).await.iter().filter(|call| call.sent).map(|call| call.call_id));
    }
}

impl Load {
    /// A tenant with this plan and its agent; no run yet.
    pub async fn prepare(app: &TestApp, model: ModelServer, plan: &str) -> Load {
        let tenant = app.tenant_with("acme", json!({"plan": plan})).await;
        let tools = ToolServer::start().await;
        tools.always(|_| ToolAnswer::text("seen").delay(5));
        let tool = json!({"webhook": {"name": "look", "description": "Looks.", "url": tools.url("/look")}});
        let agent = agent(&tenant.client, "Agent", json!({"tools": [tool]})).await;
        model.always(|request| {
            let (turn, text) = (turn_of(request), request.last_user_text());
            let reply = Reply::text(format!("Zug {turn} für {text}: grün, rot und blau."));
            let reply = reply.usage(INPUT + request.number, 100 + turn).chunk_delay(2);
            match turns(&text) > turn {
                true => reply.and_tool_call("look", json!({"at": turn})),
                false => reply,
            }
        });
        let (acknowledged, asked) = (Mutex::default(), AtomicUsize::new(0));
        Load { model, tenant, agent, acknowledged, asked, _tools: tools }
    }

    /// Starts `count` more runs, at one server or another, as fast as they are accepted. A request that fails is
    /// repeated under its idempotency key.
    pub async fn start(&self, clients: &[Client], count: usize) {
        let first = self.asked.fetch_add(count, Ordering::Relaxed);
        stream::iter(first..first + count)
            .for_each_concurrent(STARTERS, async |number| {
                let run = self.ask(clients, number).await;
                self.acknowledged.lock().unwrap().insert(number, run);
            })
            .await;
    }

    async fn ask(&self, clients: &[Client], number: usize) -> String {
        let query = "mutation ($input: StartRunInput!) {
            startRun(input: $input) { run { id } errors { code message field } }
        }";
        let input = json!({
            "agentId": self.agent, "input": format!("Lauf {number}"), "idempotencyKey": format!("run-{number}"),
        });
        let body = json!({"query": query, "variables": {"input": input}});
        let give_up = Instant::now() + PATIENCE;
        let mut last;
        for client in clients.iter().cycle().skip(number) {
            let request = client.request(reqwest::Method::POST, "/graphql").timeout(Duration::from_secs(5));
            match request.json(&body).send().await {
                Ok(response) => {
                    last = response.text().await.unwrap_or_default();
                    let answer: Value = serde_json::from_str(&last).unwrap_or_default();
                    let payload = &answer["data"]["startRun"];
                    if let Some(id) = payload["run"]["id"].as_str() {
                        return id.to_owned();
                    }
                    assert!(payload["errors"].as_array().is_none_or(Vec::is_empty), "a run is refused: {payload}");
                }
                Err(error) => last = error.to_string(),
            }
            assert!(Instant::now() < give_up, "run {number} is never accepted: {last}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        unreachable!("there are clients");
    }

    /// The runs that were acknowledged.
    pub fn runs(&self) -> Vec<String> {
        self.acknowledged.lock().unwrap().values().cloned().collect()
    }

    /// Waits until the model was called so many times in all.
    pub async fn calls(&self, count: usize) {
        let give_up = Instant::now() + PATIENCE;
        while self.model.requests().len() < count {
            assert!(Instant::now() < give_up, "{} calls, not {count}", self.model.requests().len());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Waits until all runs have ended. Once none does for [`PATIENCE`], the test fails.
    pub async fn ended(&self, db: &DatabaseConnection) {
        let mut left = u64::MAX;
        let mut moved = Instant::now();
        loop {
            let unfinished = runs::Entity::across_tenants().filter(runs::Column::Status.is_in(Status::UNFINISHED));
            // The database may be away.
            if let Ok(count) = unfinished.count(db).await {
                if count == 0 {
                    return;
                }
                if count < left {
                    (left, moved) = (count, Instant::now());
                }
            }
            assert!(moved.elapsed() < PATIENCE, "{left} runs don't end");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Waits for the end, and checks everything: runs, journals, ledger, counters. `orphans` are the calls whose
    /// process may have been killed; they alone may be estimated.
    pub async fn check(&self, app: &TestApp, orphans: &Orphans) {
        let db = app.database().await;
        self.ended(&db).await;
        self.drained().await;
        let_orphans_lapse(&db, orphans).await;
        let ids = self.check_runs(&db).await;
        self.check_ledger(app, &db, &ids, orphans).await;
    }

    /// Waits until the model server has no request open: a call that nobody waits for is drained.
    async fn drained(&self) {
        let is_over = |ending| ending != Ending::Open;
        self.model.wait_for("the end of all calls", |seen| seen.iter().all(|call| is_over(call.ending))).await;
    }

    /// Every run that was acknowledged, and no other, has ended once and well. Returns their numbers.
    async fn check_runs(&self, db: &DatabaseConnection) -> BTreeMap<Uuid, usize> {
        let acknowledged = self.acknowledged.lock().unwrap().clone();
        let numbers: BTreeMap<Uuid, usize> = acknowledged.iter().map(|(number, run)| (uuid(run), *number)).collect();
        let stored = runs::Entity::across_tenants().all(db).await.unwrap();
        let ids: BTreeSet<Uuid> = stored.iter().map(|run| run.id).collect();
        let lost: Vec<_> = numbers.iter().filter(|(run, _)| !ids.contains(run)).collect();
        let unasked: Vec<_> = stored.iter().filter(|run| !numbers.contains_key(&run.id)).collect();
        assert!(lost.is_empty() && unasked.is_empty(), "lost: {lost:?}; nobody was told of: {unasked:?}");
        assert_eq!(stored.len(), self.asked.load(Ordering::Relaxed));

        let items = run_items::Entity::across_tenants()
            .order_by_asc(run_items::Column::RunId)
            .order_by_asc(run_items::Column::Sequence);
        let mut journals: BTreeMap<Uuid, Vec<run_items::Model>> = BTreeMap::new();
        for item in items.all(db).await.unwrap() {
            journals.entry(item.run_id).or_default().push(item);
        }
        for run in stored {
            let text = format!("Lauf {}", numbers[&run.id]);
            assert_eq!(run.status, Status::Succeeded, "{text}: {:?}, fence {}", run.error_message, run.fence);
            let items = &journals[&run.id];
            let sequences: Vec<i64> = items.iter().map(|item| item.sequence).collect();
            assert_eq!(sequences, (1..run.next_sequence).collect::<Vec<_>>(), "{text}");
            let kinds: Vec<_> = items.iter().map(|item| item.kind.as_str()).collect();
            let expected = match turns(&text) {
                1 => vec!["message", "message", "usage", "status"],
                _ => vec!["message", "message", "tool_call", "usage", "tool_output", "message", "usage", "status"],
            };
            assert_eq!(kinds, expected, "{text}");
            let output = format!("Zug {} für {text}: grün, rot und blau.", turns(&text));
            assert_eq!(run.output.as_deref(), Some(&output[..]));
        }
        numbers
    }

    /// A row for each call: to the token where its process lived, an estimate of a known orphan where it didn't.
    async fn check_ledger(
        &self,
        app: &TestApp,
        db: &DatabaseConnection,
        numbers: &BTreeMap<Uuid, usize>,
        orphans: &Orphans,
    ) {
        let ledger = agreed(app, &self.tenant).await;
        let rows = rows(db).await;
        // By run and turn: how many estimates may yet stand for a call.
        let mut estimates: BTreeMap<(Uuid, i32), usize> = BTreeMap::new();
        let mut exact: BTreeMap<i64, (Uuid, i32, i64)> = BTreeMap::new();
        for row in &rows {
            let (run, turn) = (row.run_id.unwrap(), row.turn.unwrap());
            if row.estimated {
                assert!(orphans.0.contains(&row.call_id), "an estimate of a call whose process lived: {row:?}");
                *estimates.entry((run, turn)).or_default() += 1;
            } else {
                let twice = exact.insert(row.input_tokens, (run, turn, row.output_tokens));
                assert_eq!(twice, None, "two rows of one call: {row:?}");
            }
        }
        let runs: BTreeMap<usize, Uuid> = numbers.iter().map(|(run, number)| (*number, *run)).collect();
        for request in self.model.requests() {
            let turn = i32::try_from(turn_of(&request)).unwrap();
            let number: usize = request.last_user_text().strip_prefix("Lauf ").unwrap().parse().unwrap();
            let run = runs[&number];
            let told = exact.remove(&i64::try_from(INPUT + request.number).unwrap());
            match told {
                Some(told) => assert_eq!(told, (run, turn, 100 + i64::from(turn)), "{}", request.number),
                None => {
                    let left = estimates.get_mut(&(run, turn)).filter(|left| **left > 0);
                    let left = left.unwrap_or_else(|| panic!("a call has no row: turn {turn} of run {number}"));
                    *left -= 1;
                }
            }
        }
        assert_eq!(exact, BTreeMap::new(), "rows of calls that were never made");
        eprintln!("{} runs, {} calls, {} of them estimated", numbers.len(), ledger.requests, {
            rows.iter().filter(|row| row.estimated).count()
        });
    }
}

/// Turns of a run, by its input `Lauf N`.
fn turns(text: &str) -> u64 {
    let number: u64 = text.strip_prefix("Lauf ").and_then(|number| number.parse().ok()).unwrap_or_default();
    if number.is_multiple_of(3) { 2 } else { 1 }
}

/// What 30 seconds would do: nobody extends the reservations of the killed, and those whose making was not heard of.
/// Again and again: a commit that stood still on its way may make one only now.
async fn let_orphans_lapse(db: &DatabaseConnection, orphans: &Orphans) {
    eventually("no call is left that somebody is to settle", async || {
        let standing = reservations(db).await;
        if standing.iter().all(|call| orphans.0.contains(&call.call_id) || !call.sent) {
            let_reservations_lapse(db).await;
        }
        standing.is_empty()
    })
    .await;
}
