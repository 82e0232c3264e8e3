//! Calls that many tests make, ids, and looking at the tables.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, SecondsFormat, Utc};
pub use cloister_tests::ids::{type_id, uuid_of};
use cloister_tests::{Client, GraphqlResponse, PATIENCE, Tenant, TestApp};
use sea_orm::{ConnectionTrait, DatabaseConnection, DbBackend, Statement};
use serde_json::{Value, json};
use tokio::time::Instant;
use uuid::Uuid;

/// An id of this kind that nobody has.
pub fn missing(prefix: &str) -> String {
    type_id(prefix, Uuid::now_v7())
}

/// A moment from now, as the API writes it.
#[allow(clippy::disallowed_methods)] // the test's own clock
pub fn from_now(milliseconds: i64) -> String {
    let at: DateTime<Utc> = Utc::now() + chrono::TimeDelta::milliseconds(milliseconds);
    at.to_rfc3339_opts(SecondsFormat::Micros, true)
}

/// A mutation's document that asks for the object's id, a secret where there is one, and the errors.
pub fn mutation(name: &str) -> String {
    let mut input = name[..1].to_uppercase() + &name[1..] + "Input";
    let selection = match name {
        "createTenant" | "updateTenant" | "setTenantPlan" => "tenant { id status }",
        "suspendTenant" | "resumeTenant" => {
            input = "TenantIdInput".to_owned();
            "tenant { id status }"
        }
        "createApiKey" | "rotateApiKey" => "apiKey { id prefix scopes } secret",
        "updateApiKey" => "apiKey { id isActive }",
        "revokeApiKey" => {
            input = "ApiKeyIdInput".to_owned();
            "apiKey { id isActive revokedAt }"
        }
        "createRuntimeToken" | "rotateRuntimeToken" => "runtimeToken { id prefix expiresAt } secret",
        "revokeRuntimeToken" => {
            input = "RuntimeTokenIdInput".to_owned();
            "runtimeToken { id revokedAt }"
        }
        "rotateWebhookSecret" => "secret",
        "createAgent" | "updateAgent" | "rollbackAgent" => "agent { id }",
        "publishAgent" => {
            input = "AgentIdInput".to_owned();
            "agent { id }"
        }
        "startRun" | "decideToolCall" => "run { id }",
        "cancelRun" | "resumeRun" => {
            input = "RunIdInput".to_owned();
            "run { id }"
        }
        _ => {
            let of = name.strip_prefix("delete").unwrap_or_else(|| panic!("{name} is not known here"));
            input = format!("{of}IdInput");
            "deletedId"
        }
    };
    format!("mutation ($input: {input}!) {{ {name}(input: $input) {{ {selection} errors {{ code message field }} }} }}")
}

/// Sends a mutation with this input.
pub async fn mutate(client: &Client, name: &str, input: Value) -> GraphqlResponse {
    client.query(&mutation(name), json!({"input": input})).await
}

/// Sends a mutation that must succeed; its payload.
pub async fn done(client: &Client, name: &str, input: Value) -> Value {
    mutate(client, name, input).await.payload(name).clone()
}

/// A new key of the client's tenant: its id and its secret.
pub async fn new_key(client: &Client, input: Value) -> (String, String) {
    let payload = done(client, "createApiKey", input).await;
    (text(&payload, "/apiKey/id"), text(&payload, "/secret"))
}

/// A new agent of the client's tenant, from these fields over the least that it needs.
pub async fn new_agent(client: &Client, fields: Value) -> String {
    let mut input = json!({"name": "Agent", "model": "demo", "instructions": "Be brief.", "publish": true});
    input.as_object_mut().unwrap().extend(fields.as_object().expect("fields").clone());
    text(&done(client, "createAgent", input).await, "/agent/id")
}

/// Starts a run and waits until it has ended; the run's id.
pub async fn finished_run(client: &Client, input: Value) -> String {
    let id = text(&done(client, "startRun", input).await, "/run/id");
    ended(client, &id).await;
    id
}

/// Waits until a run has ended; its status.
pub async fn ended(client: &Client, run: &str) -> String {
    let subscription = "subscription ($run: ID!) { runEvents(runId: $run) { __typename } }";
    let mut events = client.subscribe_sse(subscription, json!({"run": run})).await;
    while events.next_result().await.is_some() {}
    let run = client.data("query ($run: ID!) { run(id: $run) { status } }", json!({"run": run})).await;
    text(&run, "/run/status")
}

/// The text at a pointer.
pub fn text(value: &Value, pointer: &str) -> String {
    let found = value.pointer(pointer).and_then(Value::as_str);
    found.unwrap_or_else(|| panic!("no text at {pointer} in {value}")).to_owned()
}

/// The refusals of a payload, each as its code and the dotted path of its field.
pub fn refusals(response: &GraphqlResponse, name: &str) -> Vec<(String, String)> {
    let errors = response.data()[name]["errors"].as_array().unwrap_or_else(|| panic!("{}", response.body)).clone();
    let path = |error: &Value| {
        let parts = error["field"].as_array().expect("a path").iter().map(|part| part.as_str().expect("a name"));
        parts.collect::<Vec<_>>().join(".")
    };
    errors.iter().map(|error| (text(error, "/code"), path(error))).collect()
}

/// Asks again and again until the answer satisfies `enough`.
///
/// # Panics
/// It doesn't within [`PATIENCE`].
pub async fn eventually<T, F>(what: &str, mut ask: impl FnMut() -> F, enough: impl Fn(&T) -> bool) -> T
where
    T: std::fmt::Debug,
    F: Future<Output = T>,
{
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = ask().await;
        if enough(&answer) {
            return answer;
        }
        assert!(Instant::now() < deadline, "{what}: still {answer:?}");
        // A pause between two questions, not a way to synchronise.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// How many rows each table has.
pub async fn row_counts(app: &TestApp) -> BTreeMap<String, i64> {
    let db = app.database().await;
    let mut counts = BTreeMap::new();
    for table in tables(&db).await {
        let rows = strings(&db, &format!("SELECT CAST(count(*) AS text) AS t FROM \"{table}\"")).await;
        counts.insert(table, rows[0].parse().expect("a count"));
    }
    counts
}

/// What the tables hold: how many rows of all, and every row of the tenant's. To see that nothing was stored.
pub async fn stored(app: &TestApp, tenant: &Tenant) -> (BTreeMap<String, i64>, BTreeMap<String, Vec<String>>) {
    (row_counts(app).await, tenant_rows(app, &tenant.id).await)
}

/// Every row that belongs to a tenant, by table, as text. Of keys without their last use, which is
/// written behind.
pub async fn tenant_rows(app: &TestApp, tenant: &str) -> BTreeMap<String, Vec<String>> {
    let db = app.database().await;
    let id = uuid_of(tenant);
    let mut rows = BTreeMap::new();
    for table in tables(&db).await {
        let columns = columns(&db, &table).await;
        let owner = if table == "tenants" { "id" } else { "tenant_id" };
        if !columns.iter().any(|column| column == owner) {
            continue;
        }
        let shown = columns.iter().filter(|column| *column != "last_used_at");
        let is_sqlite = db.get_database_backend() == DbBackend::Sqlite;
        let cells = shown.map(|column| match is_sqlite {
            true => format!("quote(\"{column}\")"),
            false => format!("coalesce(\"{column}\"::text, 'NULL')"),
        });
        let cells = cells.collect::<Vec<_>>().join(" || '|' || ");
        let value = if is_sqlite { format!("X'{}'", id.simple()) } else { format!("'{id}'") };
        let sql = format!("SELECT {cells} AS t FROM \"{table}\" WHERE \"{owner}\" = {value} ORDER BY 1");
        rows.insert(table, strings(&db, &sql).await);
    }
    rows
}

async fn tables(db: &DatabaseConnection) -> Vec<String> {
    let sql = match db.get_database_backend() {
        DbBackend::Sqlite => "SELECT name AS t FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'",
        _ => "SELECT tablename::text AS t FROM pg_tables WHERE schemaname = 'public'",
    };
    strings(db, sql).await
}

async fn columns(db: &DatabaseConnection, table: &str) -> Vec<String> {
    let sql = match db.get_database_backend() {
        DbBackend::Sqlite => format!("SELECT name AS t FROM pragma_table_xinfo('{table}')"),
        _ => format!("SELECT column_name::text AS t FROM information_schema.columns WHERE table_name = '{table}'"),
    };
    strings(db, &sql).await
}

/// The column `t` of a query's rows.
pub async fn strings(db: &DatabaseConnection, sql: &str) -> Vec<String> {
    let rows = db.query_all_raw(Statement::from_string(db.get_database_backend(), sql)).await.expect(sql);
    rows.iter().map(|row| row.try_get("", "t").expect(sql)).collect()
}
