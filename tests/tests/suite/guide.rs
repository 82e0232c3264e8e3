//! `docs/agents.md`, run as it stands there: each example is sent to the server, and each run comes to what is shown.

use std::collections::HashMap;

use cloister_tests::app::TestApp;
use cloister_tests::{Client, McpAnswer, McpServer, ModelServer, Reply, ToolAnswer, ToolServer};
use serde_json::{Value, json};

use super::steps::until;

const GUIDE: &str = include_str!("../../../docs/agents.md");

const RUN: &str = "query ($id: ID!) { run(id: $id) { status output outputJson turns error { code message }
    currentAgent { name } agentVersion { version } usage { requests }
    pendingApprovals { callId argumentsHash name arguments } } }";

/// What the model says in each section, in order.
fn scripts() -> HashMap<&'static str, Vec<Reply>> {
    let call = Reply::tool_call;
    HashMap::from([
        (
            "Functions",
            vec![
                call("get_weather", json!({"city": "Tokyo"})),
                Reply::text("The weather in Tokyo is sunny."),
                call("get_weather", json!({"city": "Rome"})),
            ],
        ),
        (
            "Handoffs",
            vec![
                call("transfer_to_spanish_agent", json!({})),
                Reply::text("¡Hola! Estoy bien, gracias por preguntar. ¿Y tú, cómo estás?"),
                call("transfer_to_spanish_agent", json!({})),
                Reply::text("¡Hola!"),
            ],
        ),
        (
            "Agents as tools",
            vec![
                call("translate_to_spanish", json!({"input": "Hello"})),
                Reply::text("Hola"),
                Reply::text("In Spanish it is “Hola”."),
            ],
        ),
        ("MCP servers", vec![call("find_order", json!({"number": 7})), Reply::text("Order 7 is on its way.")]),
        (
            "Hosted tools",
            vec![
                Reply::hosted_call("web_search_call", json!({"action": {"type": "search", "query": "Who won?"}}))
                    .and_text("Team A won."),
            ],
        ),
        (
            "Guardrails",
            vec![
                Reply::text(r#"{"tripped": true, "reason": "It is homework."}"#),
                call("get_weather", json!({"city": "Secretville"})),
                Reply::text("Which city do you mean?"),
            ],
        ),
        (
            "Structured output",
            vec![Reply::text(r#"{"name": "Meeting", "date": "Friday", "participants": ["Ada", "Bob"]}"#)],
        ),
        ("Human in the loop", vec![call("refund", json!({"order": 7})), Reply::text("Order 7 is refunded.")]),
        ("Sessions", vec![Reply::text("San Francisco"), Reply::text("California"), Reply::text("About 39 million")]),
        ("Models that stand in", vec![Reply::status(503), Reply::text("I am.")]),
        ("Variables", vec![Reply::text("Hello, Ada!")]),
        (
            "Versions",
            vec![call("get_weather", json!({"city": "Tokyo"})), Reply::text("The weather in Tokyo is sunny.")],
        ),
        ("Where a run ends", vec![call("get_weather", json!({"city": "Oslo"}))]),
    ])
}

/// A fenced block: its language and its text.
fn blocks(section: &str) -> Vec<(&str, &str)> {
    let parts: Vec<&str> = section.split("```").collect();
    parts.iter().skip(1).step_by(2).filter_map(|block| block.split_once('\n')).collect()
}

/// What earlier examples have made.
struct Reader {
    client: Client,
    agents: HashMap<String, String>,
    run: String,
    conversation: String,
    pending: Value,
}

impl Reader {
    /// Sends an example, its ids filled in; the data that came back, without a refusal in it.
    async fn send(&mut self, example: &str) -> Value {
        let mut document = example.to_owned();
        let mut names: Vec<(&String, &String)> = self.agents.iter().collect();
        names.sort_by_key(|(name, _)| std::cmp::Reverse(name.len()));
        for (name, id) in names {
            document = document.replace(&format!("\"agt_{name}\""), &format!("\"{id}\""));
        }
        for (shown, meant) in [
            ("run_…", self.run.as_str()),
            ("cnv_…", self.conversation.as_str()),
            ("call_…", self.pending["callId"].as_str().unwrap_or_default()),
            ("sha256…", self.pending["argumentsHash"].as_str().unwrap_or_default()),
        ] {
            document = document.replace(shown, meant);
        }
        let data = self.client.data(&document, json!({})).await;
        for payload in data.as_object().expect("data").values() {
            assert!(payload["errors"].is_null() || payload["errors"] == json!([]), "{example}\n{payload}");
            if let Some(id) = payload["agent"]["id"].as_str()
                && let Some(name) = example.split("name: \"").nth(1).and_then(|rest| rest.split('"').next())
                && example.contains("createAgent")
            {
                self.agents.insert(name.to_lowercase().replace(' ', "_"), id.to_owned());
            }
            if let Some(id) = payload["run"]["id"].as_str() {
                self.run = id.to_owned();
            }
            if let Some(id) = payload["run"]["conversation"]["id"].as_str() {
                self.conversation = id.to_owned();
            }
        }
        data
    }

    /// The run once it stands still, of which the guide shows a part.
    async fn shows(&mut self, shown: &Value) {
        let (client, id) = (self.client.clone(), self.run.clone());
        let rests = |run: &Value| !["QUEUED", "RUNNING"].contains(&run["status"].as_str().unwrap_or_default());
        let ask = async || client.data(RUN, json!({"id": id})).await["run"].clone();
        let run = until("the run stands still", ask, rests).await;
        self.pending = run["pendingApprovals"][0].clone();
        for (field, value) in shown.as_object().expect("a run") {
            assert!(is_within(value, &run[field]), "{field}: {value} is not in {run}");
        }
    }
}

/// Whether what is shown is there; objects may have more fields.
fn is_within(shown: &Value, found: &Value) -> bool {
    match (shown, found) {
        (Value::Object(shown), Value::Object(found)) => {
            shown.iter().all(|(name, value)| found.get(name).is_some_and(|found| is_within(value, found)))
        }
        (Value::Array(shown), Value::Array(found)) => {
            shown.len() == found.len() && shown.iter().zip(found).all(|(shown, found)| is_within(shown, found))
        }
        (shown, found) => shown == found,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_guide_to_agents_is_true() {
    let model = ModelServer::start().await;
    let tools = ToolServer::start().await;
    tools.always(|_| ToolAnswer::text("sunny"));
    let order = json!({"type": "object", "properties": {"number": {"type": "integer"}}, "required": ["number"]});
    let mcp = McpServer::start(&[("find_order", order), ("delete_order", json!({"type": "object"}))]).await;
    mcp.require_token("t0ken");
    mcp.answer(|call| McpAnswer::text(&format!("Order {} left on Monday.", call.arguments["number"])));
    let app = TestApp::builder()
        .env("CLOISTER_PROVIDERS__OPENAI__BASE_URL", &model.url())
        .env("CLOISTER_PROVIDERS__OPENAI__API_KEY", "sk-guide")
        .env("CLOISTER_PROVIDERS__OPENAI__API", "responses")
        .env("CLOISTER_PROVIDERS__OPENAI__ATTEMPTS", "1")
        .start()
        .await;
    let client = app.tenant("acme").await.client;
    let mut reader = Reader {
        client,
        agents: HashMap::new(),
        run: String::new(),
        conversation: String::new(),
        pending: Value::Null,
    };
    let mut scripts = scripts();
    let mut shown = 0;
    for section in GUIDE.split("\n## ").skip(1) {
        let (title, text) = section.split_once('\n').expect("a title");
        model.script(scripts.remove(title).unwrap_or_default());
        for (language, block) in blocks(text) {
            let block = block
                .replace("https://api.acme.example", tools.url("").trim_end_matches('/'))
                .replace("https://mcp.acme.example/", &mcp.url());
            match language {
                "graphql" => drop(reader.send(&block).await),
                "json" => {
                    shown += 1;
                    reader.shows(&serde_json::from_str(&block).expect("JSON")).await;
                }
                other => panic!("{title}: nobody runs a block of {other}"),
            }
        }
        assert_eq!(model.unused(), 0, "{title}: the model was not asked as often as it would have been");
    }
    assert!(scripts.is_empty() && shown >= 18, "{shown} runs are shown; not in the guide: {:?}", scripts.keys());
    let first = &model.requests()[0].body;
    assert_eq!(first["instructions"], "You are a helpful agent.");
    let greeted = model.requests().into_iter().find(|request| request.body["instructions"] == "You greet Ada.");
    assert_eq!(greeted.expect("filled in").last_user_text(), "Hello from {{me}}");
}
