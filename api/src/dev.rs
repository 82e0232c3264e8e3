//! `cloister dev`: SQLite, a demo tenant with a published agent, and two commands to copy.
//!
//! What the first start makes is kept in a folder (`.cloister`) and used by the next.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use base64::Engine;
use rand::RngExt;
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::agents;
use crate::agents::input_graphql::CreateAgentInput;
use crate::app::App;
use crate::billing::plans;
use crate::config::{Config, PlanIsolation};
use crate::db::Db;
use crate::error::Refusal;
use crate::keys::{self, NewApiKey};
use crate::serve::Server;
use crate::tenants::{self, NewTenant};
use crate::viewer::{Scope, Viewer};
use crate::{ids, keys::secret};

const FOLDER: &str = ".cloister";
const FILE: &str = ".cloister/dev.json";
const DATABASE: &str = "sqlite://.cloister/cloister.db";

/// What the first start made.
#[derive(Serialize, Deserialize)]
struct Kept {
    secrets_key: String,
    admin_key: String,
    #[serde(default)]
    demo: Option<Demo>,
}

/// The demo tenant's.
#[derive(Clone, Serialize, Deserialize)]
struct Demo {
    key: String,
    agent_id: Uuid,
}

/// The configuration with all that `dev` makes by itself; what is configured goes first.
pub fn configure(mut config: Config) -> Result<Config, String> {
    let kept = kept()?;
    if config.database.url == Config::default().database.url {
        config.database.url = DATABASE.to_owned();
    }
    config.secrets.key.get_or_insert(SecretString::from(kept.secrets_key));
    config.admin.key.get_or_insert(SecretString::from(kept.admin_key));
    // There are no workers apart here: nobody would claim an enterprise tenant's runs.
    let enterprise = config.plans.entry("enterprise".to_owned()).or_insert_with(|| plans::built_in("enterprise"));
    enterprise.isolation.get_or_insert(PlanIsolation::Shared);
    if config.server.runtime_listen == Config::default().server.runtime_listen {
        // So it needs no port of its own that another server may have.
        config.server.runtime_listen.set_port(0);
    }
    if let Some(key) = openai_key() {
        let openai = config.providers.entry("openai".to_owned()).or_default();
        openai.api_key.get_or_insert(SecretString::from(key));
    }
    Ok(config)
}

/// Brings the schema up to date, makes the demo tenant if it isn't there, says how to try it, and serves.
pub async fn serve(config: Config) -> Result<(), String> {
    let db = Db::connect(&config).await.map_err(|error| format!("database.url: {error}"))?;
    db.migrate().await.map_err(|error| format!("the migration failed: {error}"))?;
    drop(db);
    let admin_key = config.admin.key.clone();
    let server = Server::start(config).await?;
    let demo = demo(&server.app).await?;
    let base = format!("http://{}", server.address);
    print_welcome(&base, &demo, admin_key.as_ref().map(|key| key.expose_secret()).unwrap_or_default());
    server.run().await
}

fn openai_key() -> Option<String> {
    std::env::var("OPENAI_API_KEY").ok().filter(|key| !key.trim().is_empty())
}

fn kept() -> Result<Kept, String> {
    let failed = |error: &dyn std::fmt::Display| format!("{FILE}: {error}");
    if let Ok(text) = fs::read_to_string(FILE) {
        return serde_json::from_str(&text).map_err(|error| failed(&error));
    }
    fs::DirBuilder::new().recursive(true).mode(0o700).create(FOLDER).map_err(|error| failed(&error))?;
    let mut bytes = [0_u8; 32];
    rand::rng().fill(&mut bytes);
    let kept = Kept {
        secrets_key: base64::engine::general_purpose::STANDARD.encode(bytes),
        admin_key: secret::generate().secret,
        demo: None,
    };
    keep(&kept)?;
    Ok(kept)
}

/// Readable by its owner only: it holds keys.
fn keep(kept: &Kept) -> Result<(), String> {
    let failed = |error: &dyn std::fmt::Display| format!("{FILE}: {error}");
    let text = serde_json::to_string_pretty(kept).map_err(|error| failed(&error))?;
    let mut file = fs::OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(Path::new(FILE))
        .map_err(|error| failed(&error))?;
    file.write_all(text.as_bytes()).map_err(|error| failed(&error))
}

async fn demo(app: &App) -> Result<Demo, String> {
    let mut kept = kept()?;
    if let Some(demo) = &kept.demo
        && app.authenticate(Some(&demo.key)).await.is_ok()
    {
        return Ok(demo.clone());
    }
    let demo = make_demo(app).await.map_err(|refusal| format!("the demo tenant could not be made: {refusal:?}"))?;
    kept.demo = Some(demo.clone());
    keep(&kept)?;
    Ok(demo)
}

async fn make_demo(app: &App) -> Result<Demo, Refusal> {
    let tenant = tenants::create(
        app,
        NewTenant {
            name: "Demo".to_owned(),
            email: "demo@example.com".to_owned(),
            plan: "pro".to_owned(),
            monthly_token_limit: None,
        },
    )
    .await?;
    let new = NewApiKey {
        name: "demo".to_owned(),
        scopes: Some(Scope::ALL.to_vec()),
        expires_at: None,
        monthly_token_limit: None,
    };
    let (_, key) = keys::create(app, &Viewer::PlatformAdmin, tenant.id, new).await?;
    let model = if openai_key().is_some() { "gpt-4o-mini" } else { "demo" };
    let guide = "You are the guide of Cloister, a platform for AI agents. Answer in two or three friendly sentences.";
    let agent = CreateAgentInput::new("Guide", model, guide);
    let agent = agents::create(app, tenant.id, agent.into(), true).await?;
    Ok(Demo { key, agent_id: agent.id })
}

fn print_welcome(base: &str, demo: &Demo, admin_key: &str) {
    let agent = ids::encode(ids::Agent, demo.agent_id);
    let (agent, key) = (agent.as_str(), &demo.key);
    println!(
        r#"
Cloister is up.

  GraphQL      {base}/graphql
  GraphiQL     {base}/graphiql
  tenant key   {key}
  admin key    {admin_key}
  agent        {agent}

Start a run (copy and paste):

  RUN=$(curl -s {base}/graphql -H 'X-API-Key: {key}' -H 'Content-Type: application/json' -d '{{"query":"mutation {{ startRun(input: {{agentId: \"{agent}\", input: \"Hello! What can you do?\"}}) {{ run {{ id status }} errors {{ code message }} }} }}"}}' | grep -o 'run_[0-9a-z]*' | head -n 1); echo "$RUN"

Watch it answer, token by token:

  curl -sN {base}/graphql -H 'X-API-Key: {key}' -H 'Content-Type: application/json' -H 'Accept: text/event-stream' -d '{{"query":"subscription {{ runEvents(runId: \"'"$RUN"'\") {{ __typename ... on TextDelta {{ text }} ... on RunItemAdded {{ item {{ __typename sequence ... on MessageItem {{ role text }} ... on StatusItem {{ status }} }} }} }} }}"}}'
"#
    );
}
