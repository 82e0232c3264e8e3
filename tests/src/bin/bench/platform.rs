//! Cloister as it is measured: the release binary with everything on, a fresh database, and limits that the load
//! does not reach.

use std::net::SocketAddr;

use cloister_tests::{Client, Tenant, TestApp};
use serde_json::{Value, json};

use crate::model::Model;
use crate::wire;

/// The database under a stack.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Database {
    /// A file.
    Sqlite,
    /// A database of its own on the measurement's one server.
    Postgres,
}

impl Database {
    /// Both.
    pub const ALL: [Database; 2] = [Database::Sqlite, Database::Postgres];

    /// As tables show it.
    pub fn name(self) -> &'static str {
        match self {
            Database::Sqlite => "SQLite",
            Database::Postgres => "PostgreSQL",
        }
    }
}

/// A plan's limits; all else is the same for every measurement.
pub struct Limits {
    /// Runs of a tenant at once.
    pub runs: u32,
}

/// A running server with a tenant that has a published agent.
pub struct Platform {
    /// The server.
    pub app: TestApp,
    /// The tenant, on the plan PRO.
    pub tenant: Tenant,
    /// Its agent.
    pub agent: String,
}

impl Platform {
    /// Starts the server on a fresh database, with limits out of the way.
    pub async fn start(database: Database, model: &Model) -> Platform {
        Platform::with(database, model, Limits { runs: 100_000 }).await
    }

    /// Starts the server on a fresh database.
    pub async fn with(database: Database, model: &Model, limits: Limits) -> Platform {
        let plan = |name: &str, isolation: &str| {
            let runs = limits.runs;
            format!(
                "[plans.{name}]\nbase_price = \"49\"\nincluded_tokens = 10000000\n\
                 monthly_token_limit = 1000000000000\nmax_concurrent_runs = {runs}\n\
                 requests_per_minute = 1000000000\nweight = 4\nisolation = \"{isolation}\""
            )
        };
        let mut builder = TestApp::builder()
            .model_url(&model.url())
            .env("CLOISTER_SERVER__RUNTIME_LISTEN", "127.0.0.1:0")
            .config(&plan("pro", "shared"))
            .config(&plan("enterprise", "dedicated"));
        if database == Database::Postgres {
            builder = builder.postgres();
        }
        let app = builder.start().await;
        let tenant = app.tenant("bench").await;
        let agent = agent(&tenant.client).await;
        Platform { app, tenant, agent }
    }

    /// A second tenant with an agent.
    pub async fn neighbour(&self) -> (Tenant, String) {
        let tenant = self.app.tenant("neighbour").await;
        let agent = agent(&tenant.client).await;
        (tenant, agent)
    }

    /// Where the server listens.
    pub fn address(&self) -> SocketAddr {
        self.app.address()
    }

    /// `POST /v1/run` by the tenant.
    pub fn run_request(&self, message: &str) -> Vec<u8> {
        run_request(&self.tenant.key, &self.agent, message)
    }

    /// Refuses to go on after a line in the server's log that says that a database was busy or that a fault occurred.
    ///
    /// # Panics
    /// There is one.
    pub fn check_log(&self) {
        let log = self.app.log();
        let is_bad = |line: &&str| line.contains("\"ERROR\"") || line.contains("database is locked");
        assert_eq!(log.lines().find(is_bad), None, "the server complains");
    }
}

/// `POST /v1/run`, which Cloister and its peer answer alike.
pub fn run_request(key: &str, agent: &str, message: &str) -> Vec<u8> {
    wire::post("/v1/run", &[("x-api-key", key)], &json!({"agent_id": agent, "message": message}).to_string())
}

/// A GraphQL operation.
pub fn graphql_request(key: &str, query: &str, variables: &Value) -> Vec<u8> {
    let body = json!({"query": query, "variables": variables}).to_string();
    wire::post("/graphql", &[("x-api-key", key), ("accept", "application/graphql-response+json")], &body)
}

/// `startRun`, answered with the run's id.
pub fn start_request(key: &str, agent: &str, message: &str) -> Vec<u8> {
    let query = "mutation ($input: StartRunInput!) { startRun(input: $input) { run { id } errors { code } } }";
    graphql_request(key, query, &json!({"input": {"agentId": agent, "input": message}}))
}

/// Makes and publishes an agent.
pub async fn agent(client: &Client) -> String {
    agent_with(client, json!({})).await
}

/// Makes and publishes an agent with more to it.
pub async fn agent_with(client: &Client, fields: Value) -> String {
    let mut input = json!({"name": "Agent", "model": "scripted", "instructions": "Be brief.", "publish": true});
    input.as_object_mut().expect("an object").extend(fields.as_object().expect("fields").clone());
    let mutation = "mutation ($input: CreateAgentInput!) {
        createAgent(input: $input) { agent { id } errors { code message } }
    }";
    let created = client.query(mutation, json!({"input": input})).await;
    created.payload("createAgent")["agent"]["id"].as_str().expect("the agent's id").to_owned()
}
