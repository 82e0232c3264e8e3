//! What a publish proves of the graph that an agent reaches, and what it freezes.

use cloister_tests::Client;
use cloister_tests::app::TestAppBuilder;
use serde_json::{Value, json};

use crate::both::on_both;
use crate::steps::{
    Stage, granted, mutate, publish, refusal, refusals, text, tool, try_create_agent, try_publish, try_start,
    update_agent, with,
};

on_both!(
    each_problem_is_told_with_its_path,
    the_problems_of_a_whole_graph_are_told_together,
    what_can_be_proven_is_published,
    agent_tools_and_guardrails_are_reached_too,
    a_rollback_brings_back_what_was_frozen,
);

/// A model of a provider that runs tools itself.
const RESPONDING: &str = r#"
[[models]]
name = "responding"
provider = "scripted"
api = "responses"
context_window = 128000
max_output_tokens = 16384
[models.price]
input = "1.00"
output = "2.00"
"#;

fn at(code: &str, field: &str) -> (String, String) {
    (code.to_owned(), field.to_owned())
}

fn agent_tool(name: &str, id: &str) -> Value {
    json!({"agent": {"name": name, "description": format!("Asks {name}."), "agentId": id}})
}

fn mcp(name: &str, allowed: &[&str]) -> Value {
    json!({"mcp": {"name": name, "url": "https://example.com/mcp", "allowedTools": allowed}})
}

fn hosted(config: Value) -> Value {
    json!({"hosted": {"name": "web_search", "config": config}})
}

fn judged_by(name: &str, id: &str) -> Value {
    json!({"name": name, "stage": "OUTPUT", "rule": {"agentId": id}})
}

fn object(properties: Value) -> Value {
    json!({"type": "object", "properties": properties})
}

/// The output schema of an agent that judges.
fn verdict() -> Value {
    object(json!({"tripped": {"type": "boolean"}, "reason": {"type": "string"}}))
}

async fn each_problem_is_told_with_its_path(app: TestAppBuilder) {
    let stage = Stage::set(app.config(RESPONDING)).await;
    let client = stage.client();
    let b = stage.agent(json!({"name": "B"})).await;
    let webhook = |name: &str| tool(name, "https://example.com/", json!({}));
    let taking =
        |parameters: Value| json!({"tools": [tool("x", "https://example.com/", json!({"parameters": parameters}))]});
    let guarding = |tool: &str, fields: Value| {
        let guardrail = json!({"name": "g", "stage": "TOOL_INPUT", "tool": tool, "rule": {"maxLength": 5}});
        with(json!({"guardrails": [guardrail]}), fields)
    };
    let open = json!({"type": "object", "additionalProperties": true});
    let mut cases = vec![
        ("NAME_COLLISION", "tools.1.agent.name", json!({"tools": [webhook("x"), agent_tool("x", &b)]})),
        ("NAME_COLLISION", "tools.1.webhook.name", json!({"tools": [agent_tool("x", &b), webhook("x")]})),
        ("NAME_COLLISION", "tools.1.mcp.allowedTools.1", json!({"tools": [webhook("x"), mcp("M", &["y", "x"])]})),
        ("NAME_COLLISION", "tools.1.mcp.allowedTools.0", json!({"tools": [mcp("M", &["x"]), mcp("N", &["x"])]})),
        ("NAME_COLLISION", "tools.1.mcp.name", json!({"tools": [mcp("M", &["x"]), mcp("M", &["y"])]})),
        (
            "NAME_COLLISION",
            "handoffs.0.toolName",
            json!({"tools": [mcp("M", &["transfer_to_b"])], "handoffs": [{"agentId": b}]}),
        ),
        (
            "NAME_COLLISION",
            "handoffs.0.toolName",
            json!({"tools": [agent_tool("x", &b)], "handoffs": [{"agentId": b, "toolName": "x"}]}),
        ),
        ("INVALID", "tools.0.hosted", json!({"tools": [hosted(json!({}))]})),
        ("INVALID", "tools.0.hosted", json!({"model": "demo", "tools": [hosted(json!({}))]})),
        (
            "INVALID",
            "tools.0.hosted",
            json!({"model": "responding", "fallbackModels": ["scripted"], "tools": [hosted(json!({}))]}),
        ),
        (
            "NAME_COLLISION",
            "tools.1.hosted.name",
            json!({"model": "responding", "tools": [webhook("web_search"), hosted(json!({}))]}),
        ),
        (
            "NAME_COLLISION",
            "tools.1.hosted.name",
            json!({"model": "responding", "tools": [hosted(json!({"a": 1})), hosted(json!({"a": 1}))]}),
        ),
        (
            "INVALID",
            "stopAtTools.0",
            json!({"model": "responding", "tools": [hosted(json!({}))], "stopAtTools": ["web_search"]}),
        ),
        ("INVALID", "tools.0.webhook.parameters", taking(open.clone())),
        ("INVALID", "tools.0.webhook.parameters", taking(object(json!({"a": {"items": open}})))),
        ("INVALID", "tools.0.webhook.parameters", taking(json!({"anyOf": [object(json!({})), object(json!({}))]}))),
        ("INVALID", "outputSchema", json!({"outputSchema": open})),
        ("INVALID", "outputSchema", json!({"outputSchema": {"type": "array", "items": open}})),
        ("INVALID", "stopAtTools.1", json!({"tools": [mcp("M", &["y"])], "stopAtTools": ["y", "x"]})),
        ("INVALID", "stopAtTools.0", json!({"handoffs": [{"agentId": b}], "stopAtTools": ["transfer_to_b"]})),
        ("INVALID", "modelSettings.toolChoice", json!({"modelSettings": {"toolChoice": "x"}})),
        ("INVALID", "guardrails.0.tool", guarding("x", json!({}))),
        ("INVALID", "guardrails.0.tool", guarding("x", json!({"tools": [mcp("M", &["y"])]}))),
        ("INVALID", "guardrails.0.tool", guarding("transfer_to_b", json!({"handoffs": [{"agentId": b}]}))),
        ("INVALID", "guardrails.0.rule.agentId", json!({"guardrails": [judged_by("g", &b)]})),
        ("INVALID", "instructions", json!({"instructions": "Hello {{first name}}"})),
        ("INVALID", "instructions", json!({"instructions": "{{"})),
    ];
    for output in [
        object(json!({"tripped": {"type": "boolean"}})),
        object(json!({"tripped": {"type": "string"}, "reason": {"type": "string"}})),
        object(json!({"tripped": {"type": "boolean"}, "reason": {"type": ["string", "null"]}})),
        json!({"type": "array", "items": verdict()}),
    ] {
        let judge = stage.agent(json!({"outputSchema": output})).await;
        cases.push(("INVALID", "guardrails.0.rule.agentId", json!({"guardrails": [judged_by("g", &judge)]})));
    }
    for (code, field, fields) in cases {
        let refused = try_create_agent(client, fields.clone()).await;
        assert_eq!(refusal(&refused), at(code, field), "{fields}");
        // A draft may be saved so; it is the publish that proves it, and the start of a run of the draft.
        let draft = stage.agent(with(fields, json!({"publish": false}))).await;
        assert_eq!(refusal(&try_publish(client, &draft).await), at(code, field));
        let started = try_start(client, json!({"agentId": draft, "input": "Go", "draft": true})).await;
        assert_eq!(refusal(&started), at(code, field));
    }
    // What is wrong within a schema is told by its place in it.
    let refused = try_create_agent(client, taking(object(json!({"deep": open})))).await;
    assert!(text(&refused["errors"][0]["message"]).contains("/properties/deep"), "{refused}");
}

async fn the_problems_of_a_whole_graph_are_told_together(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let client = stage.client();
    let draft = async |fields: Value| stage.agent(with(fields, json!({"publish": false}))).await;
    let webhook = tool("same", "https://example.com/", json!({}));
    let colliding = draft(json!({"name": "Colliding", "tools": [webhook, webhook]})).await;
    let between = draft(json!({"name": "Between", "handoffs": [{"agentId": colliding}]})).await;
    let malformed = draft(json!({"name": "Malformed", "instructions": "{{ }}"})).await;
    let gone = draft(json!({"name": "Gone"})).await;
    let lost = draft(json!({"name": "Lost", "tools": [agent_tool("ask", &gone)]})).await;
    let root = json!({
        "tools": [agent_tool("between", &between), agent_tool("gone", &gone)],
        "handoffs": [{"agentId": lost}],
        "guardrails": [judged_by("malformed", &malformed)],
        "instructions": "{{1}}", "stopAtTools": ["gone", "never"], "outputSchema": {"type": "object",
            "additionalProperties": {"type": "string"}},
    });
    let root = draft(root).await;
    granted(mutate(client, "deleteAgent", "AgentIdInput", "deletedId", json!({"agentId": gone})).await);
    let refused = try_publish(client, &root).await;
    let mut told = refusals(&refused);
    told.sort();
    let mut expected = [
        // The root's own.
        at("NOT_FOUND", "tools.1.agent.agentId"),
        at("INVALID", "stopAtTools.1"),
        at("INVALID", "outputSchema"),
        at("INVALID", "guardrails.0.rule.agentId"),
        at("INVALID", "instructions"),
        // Others', told where the root leads to them.
        at("NOT_FOUND", "handoffs.0.agentId"),
        at("NAME_COLLISION", "tools.0.agent.agentId"),
        at("INVALID", "guardrails.0.rule.agentId"),
    ];
    expected.sort();
    assert_eq!(told, expected);
    let messages = refused["errors"].to_string();
    for name in ["Colliding", "Malformed", "Lost"] {
        assert!(messages.contains(name), "{name} is not in {messages}");
    }
    // Nothing of it was frozen.
    let published = client.data("{ agents { nodes { isPublished } } }", json!({})).await;
    assert!(!published.to_string().contains("true"), "{published}");
}

async fn what_can_be_proven_is_published(app: TestAppBuilder) {
    let stage = Stage::set(app.config(RESPONDING)).await;
    let b = stage.agent(json!({"name": "B", "outputSchema": verdict()})).await;
    let nullable = json!({"anyOf": [{"type": "string"}, {"type": "null"}]});
    let by_reference = json!({
        "$ref": "#/$defs/Verdict", "$defs": {"Verdict": verdict()},
    });
    let referring = stage.agent(json!({"name": "C", "outputSchema": by_reference})).await;
    let open_server = json!({"mcp": {"name": "All", "url": "https://example.com/mcp"}});
    let any = |tool: Value| json!({"name": "g", "stage": "TOOL_OUTPUT", "tool": tool, "rule": {"maxLength": 5}});
    for fields in [
        // A name that only the server knows may be any.
        json!({"tools": [open_server], "stopAtTools": ["x"], "guardrails": [any(json!("x"))],
               "modelSettings": {"toolChoice": "x"}}),
        json!({"tools": [mcp("M", &["x"])], "stopAtTools": ["x"], "modelSettings": {"toolChoice": "x"}}),
        json!({"tools": [agent_tool("ask", &b)], "guardrails": [any(json!("ask"))], "stopAtTools": ["ask"]}),
        json!({"tools": [mcp("M", &["x"]), mcp("N", &[])], "guardrails": [any(Value::Null)]}),
        json!({"handoffs": [{"agentId": b}], "modelSettings": {"toolChoice": "transfer_to_b"}}),
        json!({"guardrails": [judged_by("g", &b), judged_by("h", &referring)]}),
        json!({"model": "responding", "tools": [hosted(json!({"a": 1})), hosted(json!({"a": 2}))],
               "modelSettings": {"toolChoice": "web_search"}}),
        json!({"outputSchema": {"type": "array", "items": {"type": "integer"}}}),
        json!({"outputSchema": object(json!({"name": nullable, "again": {"$ref": "#"}}))}),
        json!({"instructions": r#"{{ name }} \{{not}} {"a": {"b": 1}} }}"#, "fallbackModels": ["demo", "gpt-4o"]}),
    ] {
        stage.agent(fields).await;
    }
}

const VERSIONS: &str = "query ($id: ID!) { agent(id: $id) {
    published { version reaches { agent { name } version } } versions { nodes { version reaches { version } } }
} }";

async fn agent(client: &Client, id: &str) -> Value {
    client.data(VERSIONS, json!({"id": id})).await["agent"].clone()
}

/// What an agent's published version reaches, by name.
async fn reaches(client: &Client, id: &str) -> Vec<(String, i64)> {
    let shown = agent(client, id).await;
    let reached = shown["published"]["reaches"].as_array().unwrap().iter();
    let mut reached: Vec<_> =
        reached.map(|other| (text(&other["agent"]["name"]), other["version"].as_i64().unwrap())).collect();
    reached.sort();
    reached
}

async fn agent_tools_and_guardrails_are_reached_too(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let client = stage.client();
    let judge = stage.agent(json!({"name": "Judge", "outputSchema": verdict()})).await;
    let deep = stage.agent(json!({"name": "Deep", "publish": false})).await;
    let helper = json!({"name": "Helper", "tools": [agent_tool("deep", &deep)], "publish": false});
    let helper = stage.agent(helper).await;
    let root = json!({
        "name": "Root", "tools": [agent_tool("help", &helper)], "guardrails": [judged_by("judge", &judge)],
        "publish": false,
    });
    let root = stage.agent(root).await;
    // A circle through a tool closes too; so does an agent that is its own tool.
    let circle = json!([agent_tool("root", &root), agent_tool("again", &deep)]);
    update_agent(client, &deep, json!({"tools": circle})).await;
    assert_eq!(publish(client, &root).await, 1);
    let named = |names: &[(&str, i64)]| -> Vec<(String, i64)> {
        names.iter().map(|(name, version)| ((*name).to_owned(), *version)).collect()
    };
    assert_eq!(reaches(client, &root).await, named(&[("Deep", 1), ("Helper", 1), ("Judge", 1)]));
    assert_eq!(reaches(client, &deep).await, named(&[("Helper", 1), ("Judge", 1), ("Root", 1)]));
    assert_eq!(reaches(client, &judge).await, []);
    // Published anew, a judge is seen by whoever is published after it.
    update_agent(client, &judge, json!({"instructions": "Judge well."})).await;
    assert_eq!(publish(client, &judge).await, 2);
    assert_eq!(reaches(client, &root).await, named(&[("Deep", 1), ("Helper", 1), ("Judge", 1)]));
    assert_eq!(publish(client, &root).await, 2);
    assert_eq!(reaches(client, &root).await, named(&[("Deep", 1), ("Helper", 1), ("Judge", 2)]));
    // One that can't judge any more spoils no version, only the next publish.
    update_agent(client, &judge, json!({"outputSchema": null})).await;
    assert_eq!(publish(client, &judge).await, 3);
    assert_eq!(refusal(&try_publish(client, &root).await), at("INVALID", "guardrails.0.rule.agentId"));
    assert_eq!(agent(client, &root).await["published"]["version"], 2);
}

async fn a_rollback_brings_back_what_was_frozen(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let client = stage.client();
    let judge = stage.agent(json!({"name": "Judge", "outputSchema": verdict()})).await;
    let helper = stage.agent(json!({"name": "Helper"})).await;
    let root = json!({
        "name": "Root", "tools": [agent_tool("help", &helper)], "guardrails": [judged_by("judge", &judge)],
    });
    let root = stage.agent(root).await;
    for id in [&judge, &helper] {
        assert_eq!(publish(client, id).await, 2);
    }
    update_agent(client, &root, json!({"guardrails": null})).await;
    assert_eq!(publish(client, &root).await, 2);
    assert_eq!(reaches(client, &root).await, [("Helper".to_owned(), 2)]);
    let input = json!({"agentId": root, "version": 1});
    let selection = "agent { guardrails { name } published { version guardrails { name } } }";
    let rolled = granted(mutate(client, "rollbackAgent", "RollbackAgentInput", selection, input).await);
    let expected = json!({"guardrails": [], "published": {"version": 3, "guardrails": [{"name": "judge"}]}});
    assert_eq!(rolled["agent"], expected);
    assert_eq!(reaches(client, &root).await, [("Helper".to_owned(), 1), ("Judge".to_owned(), 1)]);
    let versions = agent(client, &root).await["versions"].clone();
    let listed = |version: i64, reached: &[i64]| {
        let reached: Vec<Value> = reached.iter().map(|version| json!({"version": version})).collect();
        json!({"version": version, "reaches": reached})
    };
    assert_eq!(versions, json!({"nodes": [listed(3, &[1, 1]), listed(2, &[2]), listed(1, &[1, 1])]}));
}
