//! Agents: drafts, versions, and the graphs that a publish freezes.

use cloister_tests::app::TestAppBuilder;
use cloister_tests::{Client, Reply};
use serde_json::{Value, json};

use crate::both::on_both;
use crate::steps::{
    Stage, ended, granted, mutate, publish, refusal, refusals, start, text, tool, try_create_agent, try_publish,
    try_start, try_update_agent, update_agent,
};

on_both!(
    runs_use_the_published_version_until_another_is_published,
    a_version_keeps_what_it_reached_when_it_was_published,
    a_publish_closes_cycles_by_publishing_along,
    a_rollback_publishes_an_earlier_version_anew,
    a_deleted_agent_is_gone_but_what_froze_it_goes_on,
    names_of_tools_may_not_collide,
    models_must_be_in_the_catalogue,
    every_problem_is_told_at_once,
    an_update_changes_what_it_names_and_null_clears,
);

const AGENT: &str = "query ($id: ID!) { agent(id: $id) {
    name isPublished instructions published { version instructions }
    versions { nodes { version instructions reaches { agent { name } version } } }
} }";

async fn agent(client: &Client, id: &str) -> Value {
    client.data(AGENT, json!({"id": id})).await["agent"].clone()
}

/// Who answers with which instructions: they are the system message of each request since the last time.
fn instructions(stage: &Stage, from: usize) -> Vec<String> {
    stage.model.requests()[from..].iter().map(|request| text(&request.messages()[0]["content"])).collect()
}

fn at(code: &str, field: &str) -> (String, String) {
    (code.to_owned(), field.to_owned())
}

async fn runs_use_the_published_version_until_another_is_published(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    stage.model.always(|_| Reply::text("Done"));
    let id = stage.agent(json!({"instructions": "First", "publish": false})).await;
    let input = |fields: Value| crate::steps::with(json!({"agentId": id, "input": "Go"}), fields);
    let run = async |fields: Value| {
        let id = start(stage.client(), input(fields)).await;
        let ended = ended(stage.client(), &id).await;
        ended.output();
        ended.run["agentVersion"].clone()
    };
    let unpublished = agent(stage.client(), &id).await;
    assert_eq!((&unpublished["isPublished"], &unpublished["published"]), (&json!(false), &Value::Null));
    let refused = try_start(stage.client(), input(json!({}))).await;
    assert_eq!(refusal(&refused), at("NOT_PUBLISHED", "agentId"));
    assert!(text(&refused["errors"][0]["message"]).contains("publishAgent"), "the remedy is named");
    assert_eq!(run(json!({"draft": true})).await, Value::Null);

    assert_eq!(publish(stage.client(), &id).await, 1);
    update_agent(stage.client(), &id, json!({"instructions": "Second"})).await;
    assert_eq!(run(json!({})).await, json!({"version": 1}));
    assert_eq!(run(json!({"draft": true})).await, Value::Null);
    assert_eq!(publish(stage.client(), &id).await, 2);
    assert_eq!(run(json!({})).await, json!({"version": 2}));
    assert_eq!(run(json!({"version": 1})).await, json!({"version": 1}));
    assert_eq!(instructions(&stage, 0), ["First", "First", "Second", "Second", "First"]);

    let version =
        |version: i64, instructions: &str| json!({"version": version, "instructions": instructions, "reaches": []});
    assert_eq!(
        agent(stage.client(), &id).await,
        json!({
            "name": "Ada", "isPublished": true, "instructions": "Second",
            "published": {"version": 2, "instructions": "Second"},
            "versions": {"nodes": [version(2, "Second"), version(1, "First")]},
        })
    );
    let cases =
        [(json!({"version": 3}), at("NOT_FOUND", "version")), (json!({"version": 0}), at("INVALID", "version"))];
    for (fields, expected) in cases {
        assert_eq!(refusal(&try_start(stage.client(), input(fields)).await), expected);
    }
    let both = try_start(stage.client(), input(json!({"version": 1, "draft": true}))).await;
    assert_eq!(refusal(&both), at("INVALID", "draft"));
}

async fn a_version_keeps_what_it_reached_when_it_was_published(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    stage.model.always(|request| match request.tool_names().first() {
        Some(handoff) => Reply::tool_call(handoff, json!({})),
        None => Reply::text("Done"),
    });
    let b = stage.agent(json!({"name": "B", "instructions": "B one"})).await;
    let a = stage.agent(json!({"name": "A", "instructions": "A one", "handoffs": [{"agentId": b}]})).await;
    update_agent(stage.client(), &b, json!({"instructions": "B two", "name": "Bee"})).await;
    assert_eq!(publish(stage.client(), &b).await, 2);
    stage.run(&a, "Go").await.output();
    assert_eq!(instructions(&stage, 0), ["A one", "B one"]);
    assert_eq!(stage.model.requests()[0].tool_names(), ["transfer_to_b"], "the name is frozen too");
    assert_eq!(publish(stage.client(), &a).await, 2);
    stage.run(&a, "Go").await.output();
    assert_eq!(instructions(&stage, 2), ["A one", "B two"]);
    // A draft that is run resolves its handoffs to what is published now.
    let draft = json!({"agentId": a, "input": "Go", "draft": true});
    update_agent(stage.client(), &a, json!({"instructions": "A draft"})).await;
    update_agent(stage.client(), &b, json!({"instructions": "B draft"})).await;
    ended(stage.client(), &start(stage.client(), draft).await).await.output();
    assert_eq!(instructions(&stage, 4), ["A draft", "B two"]);
    let reaches = |at: usize, shown: &Value| shown["versions"]["nodes"][at]["reaches"].clone();
    let shown = agent(stage.client(), &a).await;
    assert_eq!(reaches(0, &shown), json!([{"agent": {"name": "Bee"}, "version": 2}]));
    assert_eq!(reaches(1, &shown), json!([{"agent": {"name": "Bee"}, "version": 1}]));
}

async fn a_publish_closes_cycles_by_publishing_along(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let b = stage.agent(json!({"name": "B", "instructions": "B", "publish": false})).await;
    let a = json!({"name": "A", "instructions": "A", "handoffs": [{"agentId": b}], "publish": false});
    let a = stage.agent(a).await;
    update_agent(stage.client(), &b, json!({"handoffs": [{"agentId": a}]})).await;
    assert_eq!(publish(stage.client(), &a).await, 1);
    for (id, other) in [(&a, "B"), (&b, "A")] {
        let shown = agent(stage.client(), id).await;
        assert_eq!(shown["published"]["version"], 1);
        assert_eq!(shown["versions"]["nodes"][0]["reaches"], json!([{"agent": {"name": other}, "version": 1}]));
    }
    // Either may be run, and leads back to itself.
    let there = |name: &str| Reply::tool_call(name, json!({}));
    stage.model.script([there("transfer_to_a"), there("transfer_to_b"), Reply::text("Done")]);
    stage.run(&b, "Go").await.output();
    assert_eq!(instructions(&stage, 0), ["B", "A", "B"]);
    // The next publish of one leaves the other's version as it is.
    assert_eq!(publish(stage.client(), &a).await, 2);
    assert_eq!(agent(stage.client(), &b).await["published"]["version"], 1);
}

async fn a_rollback_publishes_an_earlier_version_anew(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    stage.model.always(|_| Reply::text("Done"));
    let id = stage.agent(json!({"instructions": "One"})).await;
    update_agent(stage.client(), &id, json!({"instructions": "Two"})).await;
    publish(stage.client(), &id).await;
    update_agent(stage.client(), &id, json!({"instructions": "Draft"})).await;
    let rollback = async |version: i64| {
        let input = json!({"agentId": id, "version": version});
        let selection = "agent { published { version instructions } instructions }";
        mutate(stage.client(), "rollbackAgent", "RollbackAgentInput", selection, input).await
    };
    let expected = json!({"published": {"version": 3, "instructions": "One"}, "instructions": "Draft"});
    assert_eq!(granted(rollback(1).await)["agent"], expected);
    stage.run(&id, "Go").await.output();
    assert_eq!(instructions(&stage, 0), ["One"]);
    assert_eq!(refusal(&rollback(9).await), at("NOT_FOUND", "version"));
    assert_eq!(publish(stage.client(), &id).await, 4);
}

async fn a_deleted_agent_is_gone_but_what_froze_it_goes_on(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    stage.model.script([Reply::tool_call("transfer_to_b", json!({})), Reply::text("Still here")]);
    let b = stage.agent(json!({"name": "B"})).await;
    let a = stage.agent(json!({"name": "A", "handoffs": [{"agentId": b}]})).await;
    let delete =
        async || mutate(stage.client(), "deleteAgent", "AgentIdInput", "deletedId", json!({"agentId": b})).await;
    assert_eq!(granted(delete().await)["deletedId"], b.as_str());
    assert_eq!(refusal(&delete().await), at("NOT_FOUND", "agentId"));
    let look = "query ($a: ID!, $b: ID!) {
        agent(id: $b) { id } node(id: $b) { id } agents { nodes { id } }
        other: agent(id: $a) { handoffs { agent { name } } }
    }";
    let shown = stage.client().data(look, json!({"a": a, "b": b})).await;
    let handoffs = json!([{"agent": {"name": "B"}}]);
    let gone = json!({"agent": null, "node": null, "agents": {"nodes": [{"id": a}]}, "other": {"handoffs": handoffs}});
    assert_eq!(shown, gone);

    let ended = stage.run(&a, "Go").await;
    assert_eq!((ended.output(), &ended.run["currentAgent"]["name"]), ("Still here".to_owned(), &json!("B")));
    assert_eq!(
        refusal(&try_start(stage.client(), json!({"agentId": b, "input": "Go"})).await),
        at("NOT_FOUND", "agentId")
    );
    assert_eq!(refusal(&try_publish(stage.client(), &b).await), at("NOT_FOUND", "agentId"));
    assert_eq!(refusal(&try_publish(stage.client(), &a).await), at("NOT_FOUND", "handoffs.0.agentId"));
    let draft = json!({"agentId": a, "input": "Go", "draft": true});
    assert_eq!(refusal(&try_start(stage.client(), draft).await), at("NOT_FOUND", "handoffs.0.agentId"));
    let again = try_update_agent(stage.client(), &a, json!({"handoffs": [{"agentId": b}]})).await;
    assert_eq!(refusal(&again), at("NOT_FOUND", "handoffs.0.agentId"));
}

async fn names_of_tools_may_not_collide(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let b = stage.agent(json!({"name": "B"})).await;
    let also_b = stage.agent(json!({"name": "b"})).await;
    let taken = |name: &str| tool(name, "https://example.com/", json!({}));
    let cases = [
        (json!({"tools": [taken("x"), taken("y"), taken("x")]}), "tools.2.webhook.name"),
        (json!({"tools": [taken("transfer_to_b")], "handoffs": [{"agentId": b}]}), "handoffs.0.toolName"),
        (json!({"handoffs": [{"agentId": b}, {"agentId": also_b}]}), "handoffs.1.toolName"),
        (json!({"tools": [taken("x")], "handoffs": [{"agentId": b, "toolName": "x"}]}), "handoffs.0.toolName"),
    ];
    for (fields, field) in cases {
        let refused = try_create_agent(stage.client(), fields.clone()).await;
        assert_eq!(refusal(&refused), at("NAME_COLLISION", field));
        // A draft may be saved so; it is the publish that proves it.
        let draft = stage.agent(crate::steps::with(fields, json!({"publish": false}))).await;
        assert_eq!(refusal(&try_publish(stage.client(), &draft).await), at("NAME_COLLISION", field));
    }
    // One that an unpublished agent brings in is told at the handoff that leads there.
    let deep = stage.agent(json!({"name": "Deep", "tools": [taken("x"), taken("x")], "publish": false})).await;
    let between = json!({"name": "Between", "handoffs": [{"agentId": deep}], "publish": false});
    let between = stage.agent(between).await;
    let refused = try_create_agent(stage.client(), json!({"handoffs": [{"agentId": b}, {"agentId": between}]})).await;
    assert_eq!(refusal(&refused), at("NAME_COLLISION", "handoffs.1.agentId"));
    assert!(text(&refused["errors"][0]["message"]).contains("\"Deep\""), "{refused}");
    // Names that differ in case are different to a provider; handoffs to one agent under two names are fine.
    let handoffs = json!([{"agentId": b}, {"agentId": b, "toolName": "other"}]);
    stage.agent(json!({"tools": [taken("x"), taken("X")], "handoffs": handoffs})).await;
}

async fn models_must_be_in_the_catalogue(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let refused = try_create_agent(stage.client(), json!({"model": "gpt-99", "publish": false})).await;
    assert_eq!(refusal(&refused), at("UNKNOWN_MODEL", "model"));
    let message = text(&refused["errors"][0]["message"]);
    let models = stage.client().data("{ models { name } }", json!({})).await;
    let names: Vec<String> = models["models"].as_array().unwrap().iter().map(|model| text(&model["name"])).collect();
    assert!(names.len() >= 5 && names.contains(&"scripted".to_owned()), "{names:?}");
    for name in names {
        assert!(message.contains(&name), "{name} is not in {message:?}");
    }
    let id = stage.agent(json!({})).await;
    let updated = try_update_agent(stage.client(), &id, json!({"model": ""})).await;
    assert_eq!(refusal(&updated), at("UNKNOWN_MODEL", "model"));
}

async fn every_problem_is_told_at_once(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let fields = json!({
        "name": " ", "description": "x".repeat(2_001), "model": "none",
        "modelSettings": {"temperature": 3.0, "topP": -0.5, "toolChoice": "not a name"},
        "tools": [
            tool("bad name", "https://example.com/", json!({"timeoutMs": 0})),
            tool("ok", "http://10.0.0.1/", json!({"parameters": [], "needsApproval": true})),
            {"hosted": {"name": "web_search", "config": []}},
            {"mcp": {"name": "Server", "url": "http://localhost/"}},
            {"agent": {"name": "ask", "description": "", "agentId": "agt_nonsense", "maxTurns": 0}},
        ],
        "handoffs": [{"agentId": "agt_nonsense"}, {"agentId": "agt_nonsense", "toolName": "ä", "lastN": 3}],
        "guardrails": [
            {"name": "", "stage": "OUTPUT", "parallel": true, "rule": {"regex": {"pattern": "("}}},
            {"name": "g", "stage": "INPUT", "tool": "x", "rule": {"agentId": "agt_nonsense"}},
        ],
        "maxTurns": 0, "maxToolConcurrency": 1_000, "outputSchema": [], "fallbackModels": ["nobody"],
        "stopAtTools": [""],
    });
    let mut told = refusals(&try_create_agent(stage.client(), fields).await);
    told.sort();
    let mut expected = [
        at("INVALID", "name"),
        at("INVALID", "description"),
        at("UNKNOWN_MODEL", "model"),
        at("INVALID", "modelSettings.temperature"),
        at("INVALID", "modelSettings.topP"),
        at("INVALID", "modelSettings.toolChoice"),
        at("INVALID", "tools.0.webhook.name"),
        at("INVALID", "tools.0.webhook.timeoutMs"),
        at("INVALID", "tools.1.webhook.url"),
        at("INVALID", "tools.1.webhook.parameters"),
        at("INVALID", "tools.2.hosted.config"),
        at("INVALID", "tools.3.mcp.url"),
        at("NOT_FOUND", "tools.4.agent.agentId"),
        at("INVALID", "tools.4.agent.maxTurns"),
        at("NOT_FOUND", "handoffs.0.agentId"),
        at("NOT_FOUND", "handoffs.1.agentId"),
        at("INVALID", "handoffs.1.toolName"),
        at("INVALID", "handoffs.1.lastN"),
        at("INVALID", "guardrails.0.name"),
        at("INVALID", "guardrails.0.parallel"),
        at("INVALID", "guardrails.0.rule.regex.pattern"),
        at("INVALID", "guardrails.1.tool"),
        at("NOT_FOUND", "guardrails.1.rule.agentId"),
        at("INVALID", "maxTurns"),
        at("INVALID", "maxToolConcurrency"),
        at("INVALID", "outputSchema"),
        at("UNKNOWN_MODEL", "fallbackModels.0"),
        at("INVALID", "stopAtTools.0"),
    ];
    expected.sort();
    assert_eq!(told, expected);
    let count = stage.client().data("{ agents { nodes { id } } }", json!({})).await;
    assert_eq!(count["agents"]["nodes"], json!([]));
    // What a publish proves is told together as well.
    let draft = json!({
        "tools": [stage.tool("x"), stage.tool("x")], "stopAtTools": ["gone"], "modelSettings": {"toolChoice": "gone"},
        "publish": false,
    });
    let draft = stage.agent(draft).await;
    let told = refusals(&try_publish(stage.client(), &draft).await);
    let collision = at("NAME_COLLISION", "tools.1.webhook.name");
    assert_eq!(told, [collision, at("INVALID", "stopAtTools.0"), at("INVALID", "modelSettings.toolChoice")]);
}

async fn an_update_changes_what_it_names_and_null_clears(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let full = json!({
        "name": "Full", "description": "Does it all.", "handoffDescription": "For all.", "maxTurns": 3,
        "maxToolConcurrency": 2, "resetToolChoice": false, "toolUseBehavior": "STOP_AT_TOOLS", "stopAtTools": ["x"],
        "modelSettings": {"temperature": 1.0, "maxOutputTokens": 9}, "tools": [stage.tool("x")],
    });
    let id = stage.agent(full).await;
    let look = "query ($id: ID!) { agent(id: $id) {
        name description instructions handoffDescription maxTurns maxToolConcurrency resetToolChoice toolUseBehavior
        stopAtTools modelSettings { temperature maxOutputTokens } tools { ... on WebhookTool { name } }
        updatedAt published { version }
    } }";
    let shown = async || stage.client().data(look, json!({"id": id})).await["agent"].clone();
    let before = shown().await;
    let expected = json!({
        "name": "Full", "description": "Does it all.", "instructions": "Be brief.", "handoffDescription": "For all.",
        "maxTurns": 3, "maxToolConcurrency": 2, "resetToolChoice": false, "toolUseBehavior": "STOP_AT_TOOLS",
        "stopAtTools": ["x"], "modelSettings": {"temperature": 1.0, "maxOutputTokens": 9}, "tools": [{"name": "x"}],
        "updatedAt": before["updatedAt"], "published": {"version": 1},
    });
    assert_eq!(before, expected);
    update_agent(stage.client(), &id, json!({"instructions": "Be long."})).await;
    let after = shown().await;
    assert!(text(&after["updatedAt"]) > text(&before["updatedAt"]));
    let changed = json!({"instructions": "Be long.", "updatedAt": after["updatedAt"]});
    assert_eq!(after, crate::steps::with(before, changed));

    let nulls = ["description", "handoffDescription", "maxTurns", "maxToolConcurrency", "resetToolChoice"];
    let more = ["toolUseBehavior", "stopAtTools", "modelSettings", "tools"];
    let cleared: Value = nulls.iter().chain(&more).map(|name| ((*name).to_owned(), Value::Null)).collect();
    update_agent(stage.client(), &id, cleared).await;
    let cleared = shown().await;
    let expected = json!({
        "name": "Full", "description": null, "instructions": "Be long.", "handoffDescription": null,
        "maxTurns": 10, "maxToolConcurrency": 8, "resetToolChoice": true, "toolUseBehavior": "RUN_LLM_AGAIN",
        "stopAtTools": [], "modelSettings": {"temperature": null, "maxOutputTokens": null}, "tools": [],
        "updatedAt": cleared["updatedAt"], "published": {"version": 1},
    });
    assert_eq!(cleared, expected);
    for field in ["name", "model", "instructions"] {
        let refused = try_update_agent(stage.client(), &id, json!({field: null})).await;
        assert_eq!(refusal(&refused), at("INVALID", field));
    }
}
