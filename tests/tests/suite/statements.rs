//! Lists: how many statements they take, and whether their pages have every row once.

use std::collections::HashSet;

use cloister_tests::app::TestAppBuilder;
use cloister_tests::{Client, Reply};
use futures_util::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};

use crate::both::on_both;
use crate::steps::{Stage, create_agent, ended, granted, mutate, publish, start, text, try_start, until, update_agent};

on_both!(
    the_number_of_statements_does_not_depend_on_the_number_of_rows,
    pages_of_every_list_have_each_row_once_forward_and_backward,
);

/// The statements that the server has logged within the request with this trace id.
fn statements(log: &str, trace_id: &str) -> Option<Vec<String>> {
    let events = log
        .lines()
        .filter(|line| line.contains(trace_id))
        .map(|line| -> Value { serde_json::from_str(line).expect("a line of the log is JSON") });
    let mut statements = Vec::new();
    for event in events {
        match event["target"].as_str() {
            Some("sqlx::query") => statements.push(event["fields"].to_string()),
            // It stands behind all that the request did.
            Some("cloister_api::http") if event["fields"]["message"] == "answered" => return Some(statements),
            _ => {}
        }
    }
    None
}

/// Runs a query, and counts its statements.
async fn counted(stage: &Stage, client: &Client, query: &str, number: usize) -> (Value, Vec<String>) {
    let trace_id = format!("{number:032x}");
    let request =
        client.request(Method::POST, "/graphql").header("traceparent", format!("00-{trace_id}-{number:016x}-01"));
    let response = request.json(&json!({"query": query})).send().await.unwrap();
    let body: Value = response.json().await.unwrap();
    assert!(body["errors"].is_null(), "{body}");
    let found = until("the log", async || statements(&stage.app.log(), &trace_id), Option::is_some).await;
    (body["data"].clone(), found.expect("found"))
}

async fn the_number_of_statements_does_not_depend_on_the_number_of_rows(app: TestAppBuilder) {
    const ROWS: usize = 100;
    let app = app
        .env("CLOISTER_LOG__FILTER", "info,sqlx::query=debug,cloister_api::http=debug")
        .env("CLOISTER_GRAPHQL__MAX_COMPLEXITY", "10000000");
    let stage = Stage::set(app).await;
    stage.model.always(|_| Reply::text("Done"));
    let client = stage.client();
    let target = stage.agent(json!({"name": "Target"})).await;
    let made = (0..ROWS - 1).map(async |number| {
        let fields = json!({"name": format!("A{number}"), "handoffs": [{"agentId": target}]});
        create_agent(client, fields).await
    });
    let agents = join_all(made).await;
    // So that the first of them hands off as well as all others.
    update_agent(client, &target, json!({"handoffs": [{"agentId": agents[0]}]})).await;
    publish(client, &target).await;
    let runs = agents.iter().chain([&target]).map(async |agent| {
        let input = json!({"agentId": agent, "input": "Go", "newConversation": true});
        ended(client, &start(client, input).await).await.output()
    });
    join_all(runs).await;
    let other = stage.app.tenant("other").await;
    let agent = create_agent(&other.client, json!({})).await;
    ended(&other.client, &start(&other.client, json!({"agentId": agent, "input": "Go"})).await).await.output();
    let admin = stage.app.admin();
    let tenants = (2..ROWS).map(async |number| {
        let input = json!({"name": format!("t{number}"), "email": "t@example.test"});
        granted(mutate(&admin, "createTenant", "CreateTenantInput", "tenant { id }", input).await)
    });
    join_all(tenants).await;
    // Drafts that lead to others in every way.
    let drafts = agents.iter().chain([&target]).map(async |agent| {
        let fields = json!({
            "tools": [{"agent": {"name": "ask", "description": "", "agentId": target}}],
            "guardrails": [{"name": "judge", "stage": "INPUT", "rule": {"agentId": target}}],
            "fallbackModels": ["gpt-4o", "demo"],
        });
        update_agent(client, agent, fields).await;
    });
    join_all(drafts).await;
    let cases: [(&Client, &str, &str); 5] = [
        (
            client,
            "runs",
            "agent { name } agentVersion { version } conversation { id } usage { totalTokens }
             items(first: 3) { nodes { sequence } }",
        ),
        (client, "agents", "versions { nodes { reaches { id } } } handoffs { agent { name } toolName }"),
        (
            client,
            "agents",
            "fallbackModels { name } tools { ... on AgentTool { agent { name } } }
             guardrails { rule { ... on AgentRule { agent { name } } } }",
        ),
        (client, "conversations", "messages { nodes { agentName } } runs { nodes { id } }"),
        (
            &admin,
            "tenants",
            "apiKeys { nodes { id } } agents { nodes { id } } invoice { total }
             usage { totalTokens byAgent { agent { name } } byKey { apiKey { name } } }",
        ),
    ];
    let mut number = 1;
    for (client, list, selection) in cases {
        let mut counts = Vec::new();
        for first in [1, 10, ROWS] {
            let query = format!("{{ {list}(first: {first}) {{ nodes {{ {selection} }} }} }}");
            number += 1;
            let (data, statements) = counted(&stage, client, &query, number).await;
            assert_eq!(data[list]["nodes"].as_array().unwrap().len(), first, "{list}");
            counts.push(statements);
        }
        let numbers: Vec<usize> = counts.iter().map(Vec::len).collect();
        assert!(numbers[0] > 1, "the log has no statements: {counts:?}");
        assert!(numbers.iter().all(|count| *count == numbers[0]), "{list}: {numbers:?} {counts:#?}");
    }
}

/// A list, how it is asked for, and the ids that it must have, in its order.
struct Listed<'a> {
    client: &'a Client,
    name: &'static str,
    /// The query, with `ARGS` in the place of the connection's arguments.
    query: String,
    /// Where the connection stands in the data.
    pointer: &'static str,
    expected: Vec<Value>,
}

impl Listed<'_> {
    async fn page(&self, arguments: &str) -> (Vec<Value>, Value) {
        let query = self.query.replace("ARGS", arguments);
        let data = self.client.data(&query, json!({})).await;
        let connection = data.pointer(self.pointer).unwrap_or_else(|| panic!("{}: {data}", self.name));
        let edges = connection["edges"].as_array().unwrap();
        let keys: Vec<Value> = edges.iter().map(|edge| edge["node"].clone()).collect();
        let page_info = connection["pageInfo"].clone();
        let cursor = |edge: Option<&Value>| edge.map_or(Value::Null, |edge| edge["cursor"].clone());
        assert_eq!(page_info["startCursor"], cursor(edges.first()), "{}", self.name);
        assert_eq!(page_info["endCursor"], cursor(edges.last()), "{}", self.name);
        (keys, page_info)
    }

    async fn check(&self) {
        let name = self.name;
        let distinct: HashSet<String> = self.expected.iter().map(Value::to_string).collect();
        assert_eq!(distinct.len(), self.expected.len());
        for size in [10, 25] {
            let mut forward = Vec::new();
            let mut cursor = String::new();
            loop {
                let (keys, info) = self.page(&format!("first: {size}{cursor}")).await;
                assert_eq!(info["hasPreviousPage"], !forward.is_empty(), "{name}, forward at {}", forward.len());
                forward.extend(keys);
                assert_eq!(
                    info["hasNextPage"],
                    forward.len() < self.expected.len(),
                    "{name}, forward at {}",
                    forward.len()
                );
                if info["hasNextPage"] == false {
                    break;
                }
                cursor = format!(", after: {}", info["endCursor"]);
            }
            assert_eq!(forward, self.expected, "{name}, forward");
            let mut backward: Vec<Value> = Vec::new();
            let mut cursor = String::new();
            loop {
                let (keys, info) = self.page(&format!("last: {size}{cursor}")).await;
                assert_eq!(info["hasNextPage"], !backward.is_empty(), "{name}, backward at {}", backward.len());
                backward.splice(0..0, keys);
                assert_eq!(
                    info["hasPreviousPage"],
                    backward.len() < self.expected.len(),
                    "{name}, backward at {}",
                    backward.len()
                );
                if info["hasPreviousPage"] == false {
                    break;
                }
                cursor = format!(", before: {}", info["startCursor"]);
            }
            assert_eq!(backward, self.expected, "{name}, backward");
        }
        // Between two cursors, and none at all.
        let (_, first) = self.page("first: 3").await;
        let (_, last) = self.page("last: 2").await;
        let between = format!("first: 100, after: {}, before: {}", first["endCursor"], last["startCursor"]);
        let (keys, _) = self.page(&between).await;
        assert_eq!(keys, self.expected[3..self.expected.len() - 2], "{name}, between");
        let (keys, info) = self.page("first: 0").await;
        assert_eq!((keys.len(), &info["hasNextPage"]), (0, &json!(true)), "{name}, none");
    }
}

async fn pages_of_every_list_have_each_row_once_forward_and_backward(app: TestAppBuilder) {
    const ROWS: usize = 25;
    const PAGE: &str = "edges { cursor node { NODE } } pageInfo { hasNextPage hasPreviousPage startCursor endCursor }";
    let stage = Stage::set(app.env("CLOISTER_GRAPHQL__MAX_COMPLEXITY", "100000")).await;
    let client = stage.client();
    let admin = stage.app.admin();
    stage.model.always(|_| Reply::text("Done"));
    let ids = |ids: &[String]| -> Vec<Value> { ids.iter().map(|id| json!({"id": id})).collect() };
    let newest_first = |all: &[String]| ids(&all.iter().rev().cloned().collect::<Vec<_>>());

    let mut agents = Vec::new();
    for _ in 0..ROWS {
        agents.push(create_agent(client, json!({"publish": false})).await);
    }
    let mut versions = Vec::new();
    for version in 1..=ROWS {
        update_agent(client, &agents[0], json!({"instructions": format!("{version}")})).await;
        versions.push(json!({"version": publish(client, &agents[0]).await}));
    }
    versions.reverse();
    let (mut runs, mut conversations) = (Vec::new(), Vec::new());
    for _ in 0..ROWS {
        let input = json!({"agentId": agents[0], "input": "Go", "newConversation": true});
        let run = granted(try_start(client, input).await)["run"].clone();
        runs.push(text(&run["id"]));
        conversations.push(text(&run["conversation"]["id"]));
    }
    // A conversation of many runs, its messages over all of them, and a run of many items.
    let mut of_one = vec![runs[0].clone()];
    for _ in 1..ROWS {
        let input = json!({"agentId": agents[0], "input": "Go", "conversationId": conversations[0]});
        let id = start(client, input).await;
        runs.push(id.clone());
        of_one.push(id);
    }
    for id in &runs {
        ended(client, id).await.output();
    }
    let messages: Vec<Value> = of_one.iter().flat_map(|_| [json!({"sequence": 1}), json!({"sequence": 2})]).collect();
    stage.model.script((0..6).map(|_| Reply::tool_call("nope", json!({})).and_tool_call("nope", json!({}))));
    let long = stage.run(&agents[0], "Go on").await;
    runs.push(long.id());
    let items: Vec<Value> = (1..=long.items.len()).map(|sequence| json!({"sequence": sequence})).collect();
    assert!(items.len() > ROWS);

    let mut keys: Vec<String> = Vec::new();
    let first = client.data("{ apiKeys { nodes { id } } }", json!({})).await;
    keys.push(text(&first["apiKeys"]["nodes"][0]["id"]));
    let mut tenants = vec![stage.tenant.id.clone()];
    for number in 1..ROWS {
        let key = mutate(client, "createApiKey", "CreateApiKeyInput", "apiKey { id }", json!({"name": "k"})).await;
        keys.push(text(&granted(key)["apiKey"]["id"]));
        let input = json!({"name": format!("t{number}"), "email": "t@example.test"});
        let tenant = mutate(&admin, "createTenant", "CreateTenantInput", "tenant { id }", input).await;
        tenants.push(text(&granted(tenant)["tenant"]["id"]));
    }

    let list = |client, name, parts: (&str, &str), node: &str, pointer, expected| {
        let page = PAGE.replace("NODE", node);
        let query = format!("{{ {} (ARGS) {{ {page} }} {} }}", parts.0, parts.1);
        Listed { client, name, query, pointer, expected }
    };
    let conversation = format!("conversation(id: \"{}\") {{", conversations[0]);
    let of_conversation = |field: &str| format!("{conversation} {field}");
    let agent = format!("agent(id: \"{}\") {{ versions", agents[0]);
    let run = format!("run(id: \"{}\") {{ items", long.id());
    let lists = [
        list(client, "agents", ("agents", ""), "id", "/agents", ids(&agents)),
        list(client, "runs", ("runs", ""), "id", "/runs", newest_first(&runs)),
        list(client, "conversations", ("conversations", ""), "id", "/conversations", newest_first(&conversations)),
        list(client, "apiKeys", ("apiKeys", ""), "id", "/apiKeys", ids(&keys)),
        list(&admin, "tenants", ("tenants", ""), "id", "/tenants", ids(&tenants)),
        list(client, "Tenant.apiKeys", ("tenant { apiKeys", "}"), "id", "/tenant/apiKeys", ids(&keys)),
        list(client, "Tenant.agents", ("tenant { agents", "}"), "id", "/tenant/agents", ids(&agents)),
        list(client, "Agent.versions", (&agent, "}"), "version", "/agent/versions", versions),
        list(client, "Run.items", (&run, "}"), "sequence", "/run/items", items),
        list(
            client,
            "Conversation.runs",
            (&of_conversation("runs"), "}"),
            "id",
            "/conversation/runs",
            newest_first(&of_one),
        ),
    ];
    for list in lists {
        list.check().await;
    }
    let list = list(
        client,
        "Conversation.messages",
        (&of_conversation("messages"), "}"),
        "sequence",
        "/conversation/messages",
        messages,
    );
    check_messages(&list).await;
}

/// Messages of several runs have no id of their own: their cursors tell them apart.
async fn check_messages(list: &Listed<'_>) {
    let (all, info) = list.page("first: 100").await;
    assert_eq!((&all, &info["hasNextPage"]), (&list.expected, &json!(false)));
    let mut cursors = HashSet::new();
    for (size, place) in [("first: 7", "after"), ("last: 7", "before")] {
        let mut seen = Vec::new();
        let mut at = String::new();
        loop {
            let (keys, info) = list.page(&format!("{size}{at}")).await;
            let forward = place == "after";
            let more = if forward { &info["hasNextPage"] } else { &info["hasPreviousPage"] };
            if forward {
                seen.extend(keys);
            } else {
                seen.splice(0..0, keys);
            }
            assert_eq!(*more, seen.len() < list.expected.len());
            let cursor = if forward { &info["endCursor"] } else { &info["startCursor"] };
            assert!(cursors.insert(format!("{place} {cursor}")), "a cursor came twice");
            if *more == false {
                break;
            }
            at = format!(", {place}: {cursor}");
        }
        assert_eq!(seen, list.expected);
    }
}
