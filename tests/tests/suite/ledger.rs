//! What the tests of metering, quota and crashes share: agents and runs in a line, and the ledger seen from
//! all its sides.

use std::collections::BTreeMap;
use std::time::Duration;

use cloister_tests::{Client, ModelServer, PATIENCE, Tenant, TestApp};
use entity::runs::Status;
use entity::{TenantOwned, quota_counters, quota_reservations, run_items, runs, usage_records, usage_totals};
use sea_orm::{ColumnTrait, DatabaseConnection, QueryFilter, QueryOrder};
use serde_json::{Value, json};
use uuid::Uuid;

/// `TokenUsage` with all its fields, as the fragment `U`.
const TOKENS: &str = "fragment U on TokenUsage {
    requests inputTokens outputTokens cacheReadTokens cacheWriteTokens reasoningTokens totalTokens cost estimated
}";

/// The events of a run with all that tells them apart.
pub const EVENTS: &str = "subscription ($run: ID!, $after: Int!) {
    runEvents(runId: $run, after: $after) {
        __typename
        ... on RunItemAdded { item {
            __typename sequence turn
            ... on MessageItem { index role text }
            ... on ToolCallItem { index callId name arguments }
            ... on ToolOutputItem { callId output }
            ... on HandoffItem { callId toAgentName }
            ... on UsageItem { usage { totalTokens } }
            ... on StatusItem { status error { code message } }
        } }
        ... on TextDelta { turn index offset text }
        ... on ArgumentsDelta { turn index offset text callId }
        ... on TurnRestarted { turn }
    }
}";

/// Makes an agent of the scripted model and publishes it; `more` goes over its other fields.
pub async fn agent(client: &Client, name: &str, more: Value) -> String {
    let mut input = json!({"name": name, "model": "scripted", "instructions": "Be brief.", "publish": true});
    input.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let mutation = "mutation ($input: CreateAgentInput!) {
        createAgent(input: $input) { agent { id } errors { code message field } }
    }";
    let response = client.query(mutation, json!({"input": input})).await;
    response.payload("createAgent")["agent"]["id"].as_str().unwrap().to_owned()
}

/// `startRun` with these fields; the payload as it comes, refusals included.
pub async fn try_start(client: &Client, input: Value) -> Value {
    let mutation = "mutation ($input: StartRunInput!) {
        startRun(input: $input) { run { id } errors { code message field } }
    }";
    client.data(mutation, json!({"input": input})).await["startRun"].clone()
}

/// Starts a run and returns its id.
pub async fn start(client: &Client, agent: &str, text: &str) -> String {
    let payload = try_start(client, json!({"agentId": agent, "input": text})).await;
    payload["run"]["id"].as_str().unwrap_or_else(|| panic!("startRun is refused: {payload}")).to_owned()
}

/// A mutation on a run, such as `cancelRun`; the payload as it comes.
pub async fn on_run(client: &Client, mutation: &str, run: &str) -> Value {
    let query = format!(
        "mutation ($input: RunIdInput!) {{ {mutation}(input: $input) {{ run {{ status }} errors {{ code message }} }} }}"
    );
    client.data(&query, json!({"input": {"runId": run}})).await[mutation].clone()
}

/// Follows a run until it has this status, ended or not, and returns what the API says of it.
pub async fn until(client: &Client, run: &str, status: &str) -> Value {
    let mut events = client.subscribe_sse(EVENTS, json!({"run": run, "after": 0})).await;
    while let Some(result) = events.next_result().await {
        let event = &result["data"]["runEvents"];
        if event["item"]["status"] == status {
            break;
        }
        if ["SUCCEEDED", "FAILED", "CANCELLED"].iter().any(|end| event["item"]["status"] == *end) {
            panic!("the run ends otherwise than {status}: {event}");
        }
    }
    let found = look(client, run).await;
    assert_eq!(found["status"], status, "{found}");
    found
}

/// Starts a run and waits for its success.
pub async fn succeed(client: &Client, agent: &str, text: &str) -> Value {
    let run = start(client, agent, text).await;
    until(client, &run, "SUCCEEDED").await
}

/// What the API says of a run.
pub async fn look(client: &Client, run: &str) -> Value {
    let query = format!(
        "query ($run: ID!) {{ run(id: $run) {{ id status output turns error {{ code message }} usage {{ ...U }} }} }} {TOKENS}"
    );
    client.data(&query, json!({"run": run})).await["run"].clone()
}

/// The id in the database behind one that a client is given.
pub fn uuid(id: &str) -> Uuid {
    const DIGITS: &str = "0123456789abcdefghjkmnpqrstvwxyz";
    let digits = id.rsplit('_').next().unwrap();
    let value = digits.chars().fold(0u128, |value, digit| (value << 5) | DIGITS.find(digit).unwrap() as u128);
    Uuid::from_u128(value)
}

/// Tokens and cost of some calls, each bucket by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum {
    pub requests: i64,
    pub input: i64,
    pub cache_read: i64,
    pub cache_write: i64,
    pub output: i64,
    pub reasoning: i64,
    /// Nano-USD.
    pub cost: i64,
    pub estimated: bool,
}

impl Sum {
    pub fn total(&self) -> i64 {
        self.input + self.cache_read + self.cache_write + self.output
    }

    /// What the tokens cost at the scripted model's prices, in nano-USD.
    pub fn price(&self) -> i64 {
        1_000 * self.input + 2_000 * self.output + 500 * self.cache_read + 1_250 * self.cache_write
    }

    fn add(mut self, other: Sum) -> Sum {
        self.requests += other.requests;
        self.input += other.input;
        self.cache_read += other.cache_read;
        self.cache_write += other.cache_write;
        self.output += other.output;
        self.reasoning += other.reasoning;
        self.cost += other.cost;
        self.estimated |= other.estimated;
        self
    }
}

/// A row of the ledger as a sum of one.
pub fn of_row(row: &usage_records::Model) -> Sum {
    Sum {
        requests: 1,
        input: row.input_tokens,
        cache_read: row.cache_read_tokens,
        cache_write: row.cache_write_tokens,
        output: row.output_tokens,
        reasoning: row.reasoning_tokens,
        cost: row.cost,
        estimated: row.estimated,
    }
}

/// A `TokenUsage` of the API.
pub fn of_json(usage: &Value) -> Sum {
    let field = |name: &str| usage[name].as_i64().unwrap_or_else(|| panic!("no {name}: {usage}"));
    let sum = Sum {
        requests: field("requests"),
        input: field("inputTokens"),
        cache_read: field("cacheReadTokens"),
        cache_write: field("cacheWriteTokens"),
        output: field("outputTokens"),
        reasoning: field("reasoningTokens"),
        cost: nano(&usage["cost"]),
        estimated: usage["estimated"].as_bool().unwrap(),
    };
    assert_eq!(field("totalTokens"), sum.total());
    sum
}

/// Nano-USD of an exact amount of dollars.
pub fn nano(amount: &Value) -> i64 {
    let text = amount.as_str().unwrap_or_else(|| panic!("no Decimal: {amount}"));
    let (whole, part) = text.split_once('.').unwrap_or((text, ""));
    assert!(part.len() <= 9, "{text} is finer than a nano-dollar");
    format!("{whole}{part:0<9}").parse().unwrap()
}

fn sum(all: impl IntoIterator<Item = Sum>) -> Sum {
    all.into_iter().fold(Sum::default(), Sum::add)
}

/// All rows of the ledger, the oldest call first.
pub async fn rows(db: &DatabaseConnection) -> Vec<usage_records::Model> {
    let rows = usage_records::Entity::across_tenants().order_by_asc(usage_records::Column::CallId);
    rows.all(db).await.unwrap()
}

/// The rows of one run, the oldest first.
pub async fn rows_of(db: &DatabaseConnection, run: &str) -> Vec<usage_records::Model> {
    rows(db).await.into_iter().filter(|row| row.run_id == Some(uuid(run))).collect()
}

/// The reservations that stand.
pub async fn reservations(db: &DatabaseConnection) -> Vec<quota_reservations::Model> {
    quota_reservations::Entity::across_tenants().all(db).await.unwrap()
}

/// A counter's `(used, reserved)`.
pub async fn counter(db: &DatabaseConnection, scope: quota_counters::Scope, id: Uuid) -> (i64, i64) {
    let counters = quota_counters::Entity::across_tenants()
        .filter(quota_counters::Column::Scope.eq(scope))
        .filter(quota_counters::Column::ScopeId.eq(id));
    counters.one(db).await.unwrap().map_or((0, 0), |counter| (counter.used, counter.reserved))
}

/// A run's row.
pub async fn run_row(db: &DatabaseConnection, run: &str) -> runs::Model {
    let row = runs::Entity::across_tenants().filter(runs::Column::Id.eq(uuid(run))).one(db).await.unwrap();
    row.expect("the run is stored")
}

/// A run's journal: kind, turn and body of each item.
pub async fn journal(db: &DatabaseConnection, run: &str) -> Vec<run_items::Model> {
    run_items::Entity::across_tenants()
        .filter(run_items::Column::RunId.eq(uuid(run)))
        .order_by_asc(run_items::Column::Sequence)
        .all(db)
        .await
        .unwrap()
}

/// Waits until `condition` holds of the database.
pub async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, waiting).await.is_ok(), "it never comes true that {what}");
}

/// Waits until a run has this status in the database, however it came to it.
pub async fn stored_status(db: &DatabaseConnection, run: &str, status: Status) {
    eventually(&format!("{run} is {status:?}"), async || run_row(db, run).await.status == status).await;
}

/// Waits until no model call is under way.
pub async fn settled(db: &DatabaseConnection) {
    eventually("no reservation is left", async || reservations(db).await.is_empty()).await;
}

/// The ledger of the app's only tenant, once no call is under way: its rows, totals and counters, `usage` with its
/// breakdowns, `GET /v1/usage` and the runs' usage say the same to the token and the nano-dollar. Returns it.
pub async fn agreed(app: &TestApp, tenant: &Tenant) -> Sum {
    let db = app.database().await;
    settled(&db).await;
    let rows = rows(&db).await;
    let ledger = sum(rows.iter().map(of_row));
    assert_eq!(ledger.price(), ledger.cost);

    let totals = usage_totals::Entity::across_tenants().all(&db).await.unwrap();
    let totals = sum(totals.iter().map(|row| Sum {
        requests: row.requests,
        input: row.input_tokens,
        cache_read: row.cache_read_tokens,
        cache_write: row.cache_write_tokens,
        output: row.output_tokens,
        reasoning: row.reasoning_tokens,
        cost: row.cost,
        estimated: row.estimated_requests > 0,
    }));
    assert_eq!(totals, ledger, "usage_totals");

    let mut used: BTreeMap<quota_counters::Scope, i64> = BTreeMap::new();
    for counter in quota_counters::Entity::across_tenants().all(&db).await.unwrap() {
        assert_eq!(counter.reserved, 0, "{counter:?}");
        *used.entry(counter.scope).or_default() += counter.used;
    }
    // A tenant that called nothing has no counter.
    assert_eq!(used.get(&quota_counters::Scope::Tenant).copied().unwrap_or(0), ledger.total(), "the tenant's counter");
    assert_eq!(used.get(&quota_counters::Scope::Key).copied().unwrap_or(0), ledger.total(), "the keys' counters");

    let query = format!(
        "query {{
            usage {{
                totalTokens reservedTokens totalCost requestCount
                byDay {{ usage {{ ...U }} }} byModel {{ usage {{ ...U }} }}
                byAgent {{ usage {{ ...U }} }} byKey {{ usage {{ ...U }} }}
            }}
            runs(first: 100) {{ nodes {{ id usage {{ ...U }} }} }}
        }} {TOKENS}"
    );
    let data = tenant.client.data(&query, json!({})).await;
    let usage = &data["usage"];
    let told = (&usage["totalTokens"], &usage["reservedTokens"], nano(&usage["totalCost"]), &usage["requestCount"]);
    assert_eq!(told, (&json!(ledger.total()), &json!(0), ledger.cost, &json!(ledger.requests)));
    for breakdown in ["byDay", "byModel", "byAgent", "byKey"] {
        let lines = usage[breakdown].as_array().unwrap().iter();
        assert_eq!(sum(lines.map(|line| of_json(&line["usage"]))), ledger, "{breakdown}");
    }
    for run in data["runs"]["nodes"].as_array().unwrap() {
        let id = uuid(run["id"].as_str().unwrap());
        let own = sum(rows.iter().filter(|row| row.run_id == Some(id)).map(of_row));
        assert_eq!(of_json(&run["usage"]), own, "Run.usage of {run}");
    }

    let rest = tenant.client.rest_get("/v1/usage").await.body["monthly_usage"].clone();
    assert_eq!((&rest["total_tokens"], &rest["request_count"]), (&json!(ledger.total()), &json!(ledger.requests)));
    #[allow(clippy::cast_precision_loss)] // the seed's shape is a float
    let dollars = ledger.cost as f64 / 1e9;
    assert!((rest["total_cost"].as_f64().unwrap() - dollars).abs() < 1e-9, "{rest}");
    ledger
}

/// The ledger agrees with itself and with what the provider says it served, with nothing estimated.
pub async fn exact(app: &TestApp, tenant: &Tenant, model: &ModelServer) -> Sum {
    let ledger = agreed(app, tenant).await;
    let served = model.served();
    let told = (ledger.requests, ledger.input + ledger.cache_read + ledger.cache_write, ledger.output, ledger.total());
    let counted = [served.requests, served.prompt_tokens, served.completion_tokens, served.total];
    let [requests, prompt, completion, total] = counted.map(|count| i64::try_from(count).unwrap());
    assert_eq!(told, (requests, prompt, completion, total), "the ledger against {served:?}");
    assert!(!ledger.estimated);
    ledger
}
