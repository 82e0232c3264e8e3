//! What is saved of an agent is what is read of it.

use cloister_tests::app::TestAppBuilder;
use serde_json::{Value, json};

use crate::both::on_both;
use crate::steps::{Stage, publish, update_agent};

on_both!(all_of_a_definition_is_read_as_it_was_saved, tokens_are_kept_for_the_name_and_the_origin_they_were_given_for,);

const DEFINITION: &str = "fragment D on AgentDefinition {
    model { name } fallbackModels { name provider } outputSchema
    tools {
        __typename
        ... on WebhookTool { name parameters hasToken timeoutMs needsApproval }
        ... on AgentTool { name description agent { name } maxTurns needsApproval }
        ... on McpTool { name url allowedTools hasToken needsApproval }
        ... on HostedTool { name config }
    }
    handoffs { agent { name } toolName inputFilter lastN nestHistory }
    guardrails { name stage tool parallel onTrip message rule {
        __typename
        ... on RegexRule { pattern tripOnMatch } ... on MaxLengthRule { characters }
        ... on JsonSchemaRule { schema } ... on AgentRule { agent { name } }
    } }
}";

async fn read(stage: &Stage, id: &str) -> Value {
    let query = format!("query ($id: ID!) {{ agent(id: $id) {{ ...D published {{ ...D }} }} }} {DEFINITION}");
    stage.client().data(&query, json!({"id": id})).await["agent"].clone()
}

async fn all_of_a_definition_is_read_as_it_was_saved(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let verdict =
        json!({"type": "object", "properties": {"tripped": {"type": "boolean"}, "reason": {"type": "string"}}});
    let other = stage.agent(json!({"name": "Other", "outputSchema": verdict})).await;
    let parameters = json!({"type": "object", "properties": {"z": {"type": "string"}, "a": {"enum": ["b", "a"]}}});
    let url = stage.tools.url("/hook");
    let id = json!({
        "fallbackModels": ["gpt-4o", "demo"], "outputSchema": {"type": "array", "items": {"type": "string"}},
        "tools": [
            {"webhook": {"name": "hook", "description": "", "url": url, "parameters": parameters, "token": "secret",
                         "needsApproval": true}},
            {"agent": {"name": "ask", "description": "Asks.", "agentId": other, "maxTurns": 3, "needsApproval": true}},
            {"agent": {"name": "plain", "description": "", "agentId": other}},
            {"mcp": {"name": "One", "url": "https://mcp.example/a", "token": "secret", "allowedTools": ["x", "y"],
                     "needsApproval": true}},
            {"mcp": {"name": "Two", "url": "https://mcp.example/b"}},
        ],
        "handoffs": [
            {"agentId": other, "inputFilter": "REMOVE_TOOLS"},
            {"agentId": other, "toolName": "two", "inputFilter": "LAST_N", "lastN": 4},
            {"agentId": other, "toolName": "three", "nestHistory": true},
            {"agentId": other, "toolName": "four", "inputFilter": "NONE", "nestHistory": false},
        ],
        "guardrails": [
            {"name": "words", "stage": "INPUT", "parallel": true, "rule": {"regex": {"pattern": "(?i)bad"}}},
            {"name": "must", "stage": "OUTPUT", "rule": {"regex": {"pattern": "good", "tripOnMatch": false}}},
            {"name": "long", "stage": "TOOL_OUTPUT", "onTrip": "FAIL", "rule": {"maxLength": 100}},
            {"name": "fits", "stage": "TOOL_INPUT", "tool": "hook", "message": "No.", "rule": {"jsonSchema": parameters}},
            {"name": "judge", "stage": "OUTPUT", "rule": {"agentId": other}},
        ],
    });
    let id = stage.agent(id).await;
    let agent = json!({"name": "Other"});
    let ask = |name: &str, description: &str, max_turns: i64, needs_approval: bool| {
        json!({"__typename": "AgentTool", "name": name, "description": description, "agent": agent,
               "maxTurns": max_turns, "needsApproval": needs_approval})
    };
    let handoff = |name: &str, filter: &str, last: Value, nest: bool| json!({"agent": agent, "toolName": name, "inputFilter": filter, "lastN": last, "nestHistory": nest});
    let guardrail = |name: &str, stage: &str, tool: Value, parallel: bool, rule: Value| json!({"name": name, "stage": stage, "tool": tool, "parallel": parallel, "rule": rule});
    let expected = json!({
        "model": {"name": "scripted"},
        "fallbackModels": [{"name": "gpt-4o", "provider": "openai"}, {"name": "demo", "provider": "demo"}],
        "outputSchema": {"type": "array", "items": {"type": "string"}},
        "tools": [
            {"__typename": "WebhookTool", "name": "hook", "parameters": parameters, "hasToken": true,
             "timeoutMs": 30_000, "needsApproval": true},
            ask("ask", "Asks.", 3, true), ask("plain", "", 10, false),
            {"__typename": "McpTool", "name": "One", "url": "https://mcp.example/a", "allowedTools": ["x", "y"],
             "hasToken": true, "needsApproval": true},
            {"__typename": "McpTool", "name": "Two", "url": "https://mcp.example/b", "allowedTools": null,
             "hasToken": false, "needsApproval": false},
        ],
        "handoffs": [
            handoff("transfer_to_other", "REMOVE_TOOLS", Value::Null, false),
            handoff("two", "LAST_N", json!(4), false),
            handoff("three", "NONE", Value::Null, true),
            handoff("four", "NONE", Value::Null, false),
        ],
        "guardrails": [
            guardrail("words", "INPUT", Value::Null, true,
                      json!({"__typename": "RegexRule", "pattern": "(?i)bad", "tripOnMatch": true})),
            guardrail("must", "OUTPUT", Value::Null, false,
                      json!({"__typename": "RegexRule", "pattern": "good", "tripOnMatch": false})),
            guardrail("long", "TOOL_OUTPUT", Value::Null, false,
                      json!({"__typename": "MaxLengthRule", "characters": 100})),
            guardrail("fits", "TOOL_INPUT", json!("hook"), false,
                      json!({"__typename": "JsonSchemaRule", "schema": parameters})),
            guardrail("judge", "OUTPUT", Value::Null, false, json!({"__typename": "AgentRule", "agent": agent})),
        ],
    });
    let shown = read(&stage, &id).await;
    assert_eq!(shown, crate::steps::with(expected.clone(), json!({"published": expected})));
    // As text too: a schema's order is what a model reads.
    assert_eq!(shown["tools"][0]["parameters"].to_string(), parameters.to_string());

    // A field left out stays, null clears; the version is as it was.
    update_agent(stage.client(), &id, json!({"guardrails": null, "outputSchema": null})).await;
    let changed = json!({"guardrails": [], "outputSchema": null, "published": expected});
    assert_eq!(read(&stage, &id).await, crate::steps::with(expected.clone(), changed));
    let cleared = json!({"fallbackModels": null, "tools": [{"hosted": {"name": "web_search", "config": {"a": [1]}}}],
                         "handoffs": []});
    update_agent(stage.client(), &id, cleared).await;
    let shown = read(&stage, &id).await;
    assert_eq!((&shown["fallbackModels"], &shown["handoffs"]), (&json!([]), &json!([])));
    let hosted = json!([{"__typename": "HostedTool", "name": "web_search", "config": {"a": [1]}}]);
    assert_eq!((&shown["tools"], &shown["published"]), (&hosted, &expected));
    // A hosted tool without a configuration has an empty one.
    update_agent(stage.client(), &id, json!({"tools": [{"hosted": {"name": "web_search"}}]})).await;
    assert_eq!(read(&stage, &id).await["tools"][0]["config"], json!({}));
}

async fn tokens_are_kept_for_the_name_and_the_origin_they_were_given_for(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let server = |name: &str, url: &str| json!({"name": name, "url": url});
    let with_token = |server: Value, token: Value| crate::steps::with(server, json!({"token": token}));
    let one = server("One", "https://mcp.example/a");
    let id = stage.agent(json!({"tools": [{"mcp": with_token(one.clone(), json!("secret"))}]})).await;
    let webhook = json!({"webhook": {"name": "One", "description": "", "url": "https://mcp.example/"}});
    let cases = [
        (json!({"mcp": one}), true),
        (json!({"mcp": server("One", "https://mcp.example/b")}), true),
        (json!({"mcp": server("Two", "https://mcp.example/a")}), false),
        (json!({"mcp": server("One", "https://mcp.example:444/a")}), false),
        (json!({"mcp": server("One", "http://mcp.example/a")}), false),
        (json!({"mcp": with_token(one.clone(), Value::Null)}), false),
        (json!({"mcp": with_token(server("Two", "https://else.example/"), json!("other"))}), true),
        // Of a tool of another kind it is another token.
        (webhook, false),
    ];
    for (tool, expected) in cases {
        update_agent(stage.client(), &id, json!({"tools": [{"mcp": with_token(one.clone(), json!("secret"))}]})).await;
        update_agent(stage.client(), &id, json!({"tools": [tool]})).await;
        assert_eq!(read(&stage, &id).await["tools"][0]["hasToken"], expected, "{tool}");
    }
    publish(stage.client(), &id).await;
    let shown = read(&stage, &id).await.to_string();
    assert!(!shown.contains("secret") && !stage.app.log().contains("secret"), "a token is shown: {shown}");
}
