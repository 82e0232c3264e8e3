//! Bad input, field by field: a clear error that names the field, nothing stored, nothing secret logged.

use cloister_tests::app::TestAppBuilder;
use cloister_tests::{Client, GraphqlResponse, Tenant};
use serde_json::{Value, json};

use crate::both::on_both;
use crate::calls::{done, finished_run, missing, mutate, new_agent, new_key, refusals, stored, text};

on_both!(
    an_agents_fields_are_checked,
    no_tool_points_inside,
    a_runs_fields_are_checked,
    a_keys_fields_are_checked,
    a_tenants_fields_are_checked,
);

/// `base` with one field more, or in place of its own.
fn with(base: &Value, field: &str, value: Value) -> Value {
    let mut input = base.clone();
    input[field] = value;
    input
}

/// Asserts that a mutation is refused for exactly this.
async fn assert_refused(client: &Client, name: &str, input: Value, code: &str, field: &str) -> GraphqlResponse {
    let answer = mutate(client, name, input.clone()).await;
    let shown: String = input.to_string().chars().take(200).collect();
    assert_eq!(refusals(&answer, name), [(code.to_owned(), field.to_owned())], "{name} {shown}");
    let payload = &answer.data()[name];
    let others = payload.as_object().expect("a payload").iter().filter(|(part, _)| *part != "errors");
    assert!(others.clone().count() > 0 && others.clone().all(|(_, part)| part.is_null()), "{payload}");
    assert!(!text(payload, "/errors/0/message").is_empty());
    answer
}

fn long(characters: usize) -> String {
    // Counted in characters, not in bytes.
    "ä".repeat(characters)
}

async fn an_agents_fields_are_checked(builder: TestAppBuilder) {
    let app = builder.env("CLOISTER_LOG__FILTER", "info,cloister_api=trace,cloister_runtime=trace").start().await;
    let (tenant, other) = (app.tenant("alpha").await, app.tenant("beta").await);
    let own = new_agent(&tenant.client, json!({"name": "own"})).await;
    let foreign = new_agent(&other.client, json!({})).await;
    let deleted = new_agent(&tenant.client, json!({})).await;
    done(&tenant.client, "deleteAgent", json!({"agentId": deleted})).await;
    let before = stored(&app, &tenant).await;

    let webhook = |field: &str, value: Value| {
        let base = json!({"name": "look_up", "description": "Looks up.", "url": "https://example.com/hook"});
        json!([{"webhook": with(&base, field, value)}])
    };
    let agent_tool = |field: &str, value: Value| {
        let base = json!({"name": "ask", "description": "Asks.", "agentId": own});
        json!([{"agent": with(&base, field, value)}])
    };
    let mcp = |field: &str, value: Value| {
        let base = json!({"name": "Server", "url": "https://example.com/mcp"});
        json!([{"mcp": with(&base, field, value)}])
    };
    let hosted = |field: &str, value: Value| json!([{"hosted": with(&json!({"name": "web_search"}), field, value)}]);
    let guardrail = |field: &str, value: Value| {
        let base = json!({"name": "Guard", "stage": "INPUT", "rule": {"maxLength": 5}});
        json!([with(&base, field, value)])
    };
    let with_stage = |stage: &str, fields: Value| {
        let mut guardrail = json!({"name": "Guard", "stage": stage, "rule": {"maxLength": 5}});
        guardrail.as_object_mut().expect("an object").extend(fields.as_object().expect("fields").clone());
        json!([guardrail])
    };
    let rule = |kind: &str, value: Value| guardrail("rule", json!({ kind: value }));
    let many_guardrails: Vec<Value> =
        (0..65).map(|at| json!({"name": format!("g{at}"), "stage": "INPUT", "rule": {"maxLength": 5}})).collect();
    let settings = |field: &str, value: Value| json!({ field: value });
    let handoff = |field: &str, value: Value| json!([with(&json!({"agentId": own}), field, value)]);
    let filtered = |fields: Value| {
        let mut handoff = json!({"agentId": own});
        handoff.as_object_mut().expect("an object").extend(fields.as_object().expect("fields").clone());
        json!([handoff])
    };
    let token = "tok-2c8e4fb7 with a space";
    let many_tools: Vec<Value> = (0..129)
        .map(|at| json!({"webhook": {"name": format!("t{at}"), "description": "", "url": "https://example.com/"}}))
        .collect();
    let many_handoffs = vec![json!({"agentId": own}); 65];
    let fields = vec![
        ("name", json!(""), "INVALID", "name"),
        ("name", json!(" \t\n"), "INVALID", "name"),
        ("name", json!(long(101)), "INVALID", "name"),
        ("name", json!("a\u{0}b"), "INVALID", "name"),
        ("description", json!(long(2_001)), "INVALID", "description"),
        ("description", json!("\u{0}"), "INVALID", "description"),
        ("model", json!(""), "UNKNOWN_MODEL", "model"),
        ("model", json!("gpt-99"), "UNKNOWN_MODEL", "model"),
        ("model", json!("demo\u{0}"), "UNKNOWN_MODEL", "model"),
        ("instructions", json!(long(100_001)), "INVALID", "instructions"),
        ("instructions", json!("a\u{0}b"), "INVALID", "instructions"),
        ("modelSettings", settings("temperature", json!(-0.1)), "INVALID", "modelSettings.temperature"),
        ("modelSettings", settings("temperature", json!(2.01)), "INVALID", "modelSettings.temperature"),
        ("modelSettings", settings("topP", json!(1.01)), "INVALID", "modelSettings.topP"),
        ("modelSettings", settings("topP", json!(-1e300)), "INVALID", "modelSettings.topP"),
        ("modelSettings", settings("maxOutputTokens", json!(0)), "INVALID", "modelSettings.maxOutputTokens"),
        ("modelSettings", settings("maxOutputTokens", json!(-1)), "INVALID", "modelSettings.maxOutputTokens"),
        (
            "modelSettings",
            settings("maxOutputTokens", json!(2_147_483_647)),
            "INVALID",
            "modelSettings.maxOutputTokens",
        ),
        ("modelSettings", settings("toolChoice", json!("")), "INVALID", "modelSettings.toolChoice"),
        ("modelSettings", settings("toolChoice", json!("no spaces")), "INVALID", "modelSettings.toolChoice"),
        ("tools", json!(many_tools), "LIMIT_EXCEEDED", "tools"),
        ("tools", webhook("name", json!("")), "INVALID", "tools.0.webhook.name"),
        ("tools", webhook("name", json!("no spaces")), "INVALID", "tools.0.webhook.name"),
        ("tools", webhook("name", json!("x".repeat(65))), "INVALID", "tools.0.webhook.name"),
        ("tools", webhook("name", json!("nul\u{0}")), "INVALID", "tools.0.webhook.name"),
        ("tools", webhook("description", json!(long(1_025))), "INVALID", "tools.0.webhook.description"),
        ("tools", webhook("description", json!("\u{0}")), "INVALID", "tools.0.webhook.description"),
        ("tools", webhook("parameters", json!([])), "INVALID", "tools.0.webhook.parameters"),
        ("tools", webhook("parameters", json!("object")), "INVALID", "tools.0.webhook.parameters"),
        ("tools", webhook("parameters", json!(true)), "INVALID", "tools.0.webhook.parameters"),
        ("tools", webhook("parameters", json!({"type": 5})), "INVALID", "tools.0.webhook.parameters"),
        ("tools", webhook("parameters", json!({"type": "objekt"})), "INVALID", "tools.0.webhook.parameters"),
        ("tools", webhook("parameters", json!({"required": "x"})), "INVALID", "tools.0.webhook.parameters"),
        (
            "tools",
            webhook("parameters", json!({"properties": {"a": {"pattern": "("}}})),
            "INVALID",
            "tools.0.webhook.parameters",
        ),
        ("tools", webhook("parameters", json!({"$ref": "#/nowhere"})), "INVALID", "tools.0.webhook.parameters"),
        (
            "tools",
            webhook("parameters", json!({"$ref": "https://example.com/s.json"})),
            "INVALID",
            "tools.0.webhook.parameters",
        ),
        (
            "tools",
            webhook("parameters", json!({"$ref": "file:///etc/passwd"})),
            "INVALID",
            "tools.0.webhook.parameters",
        ),
        (
            "tools",
            webhook("parameters", json!({"description": "x".repeat(65_536)})),
            "INVALID",
            "tools.0.webhook.parameters",
        ),
        ("tools", webhook("parameters", json!({"description": "a\u{0}b"})), "INVALID", "tools.0.webhook.parameters"),
        ("tools", webhook("timeoutMs", json!(0)), "INVALID", "tools.0.webhook.timeoutMs"),
        ("tools", webhook("timeoutMs", json!(-1)), "INVALID", "tools.0.webhook.timeoutMs"),
        ("tools", webhook("timeoutMs", json!(300_001)), "INVALID", "tools.0.webhook.timeoutMs"),
        ("tools", webhook("token", json!(token)), "INVALID", "tools.0.webhook.token"),
        ("tools", webhook("token", json!("line\r\nbreak")), "INVALID", "tools.0.webhook.token"),
        ("tools", webhook("token", json!("")), "INVALID", "tools.0.webhook.token"),
        ("tools", webhook("token", json!("x".repeat(4_097))), "INVALID", "tools.0.webhook.token"),
        ("tools", webhook("parameters", json!({"pattern": "(?=a)"})), "INVALID", "tools.0.webhook.parameters"),
        ("tools", agent_tool("name", json!("")), "INVALID", "tools.0.agent.name"),
        ("tools", agent_tool("name", json!("no spaces")), "INVALID", "tools.0.agent.name"),
        ("tools", agent_tool("description", json!(long(1_025))), "INVALID", "tools.0.agent.description"),
        ("tools", agent_tool("agentId", json!("")), "NOT_FOUND", "tools.0.agent.agentId"),
        ("tools", agent_tool("agentId", json!("nonsense\u{0}")), "NOT_FOUND", "tools.0.agent.agentId"),
        ("tools", agent_tool("agentId", json!(missing("agt"))), "NOT_FOUND", "tools.0.agent.agentId"),
        ("tools", agent_tool("agentId", json!(foreign)), "NOT_FOUND", "tools.0.agent.agentId"),
        ("tools", agent_tool("agentId", json!(deleted)), "NOT_FOUND", "tools.0.agent.agentId"),
        ("tools", agent_tool("maxTurns", json!(0)), "INVALID", "tools.0.agent.maxTurns"),
        ("tools", agent_tool("maxTurns", json!(-1)), "INVALID", "tools.0.agent.maxTurns"),
        ("tools", agent_tool("maxTurns", json!(1_001)), "INVALID", "tools.0.agent.maxTurns"),
        ("tools", mcp("name", json!("")), "INVALID", "tools.0.mcp.name"),
        ("tools", mcp("name", json!(long(101))), "INVALID", "tools.0.mcp.name"),
        ("tools", mcp("name", json!("a\u{0}b")), "INVALID", "tools.0.mcp.name"),
        ("tools", mcp("token", json!(token)), "INVALID", "tools.0.mcp.token"),
        ("tools", mcp("token", json!("")), "INVALID", "tools.0.mcp.token"),
        ("tools", mcp("allowedTools", json!(["fine", "no spaces"])), "INVALID", "tools.0.mcp.allowedTools.1"),
        ("tools", mcp("allowedTools", json!(["a", "b", "a"])), "DUPLICATE", "tools.0.mcp.allowedTools.2"),
        (
            "tools",
            mcp("allowedTools", (0..129).map(|at| json!(format!("t{at}"))).collect()),
            "LIMIT_EXCEEDED",
            "tools.0.mcp.allowedTools",
        ),
        ("tools", hosted("name", json!("")), "INVALID", "tools.0.hosted.name"),
        ("tools", hosted("name", json!("web search")), "INVALID", "tools.0.hosted.name"),
        ("tools", hosted("name", json!("function")), "INVALID", "tools.0.hosted.name"),
        ("tools", hosted("name", json!("local_shell")), "INVALID", "tools.0.hosted.name"),
        ("tools", hosted("config", json!([])), "INVALID", "tools.0.hosted.config"),
        ("tools", hosted("config", json!("web_search")), "INVALID", "tools.0.hosted.config"),
        ("tools", hosted("config", json!({"type": "function"})), "INVALID", "tools.0.hosted.config.type"),
        ("tools", hosted("config", json!({"a": ["b\u{0}"]})), "INVALID", "tools.0.hosted.config"),
        ("tools", hosted("config", json!({"a": "x".repeat(65_536)})), "INVALID", "tools.0.hosted.config"),
        ("handoffs", json!(many_handoffs), "LIMIT_EXCEEDED", "handoffs"),
        ("handoffs", handoff("agentId", json!("")), "NOT_FOUND", "handoffs.0.agentId"),
        ("handoffs", handoff("agentId", json!("nonsense\u{0}")), "NOT_FOUND", "handoffs.0.agentId"),
        ("handoffs", handoff("agentId", json!(missing("agt"))), "NOT_FOUND", "handoffs.0.agentId"),
        ("handoffs", handoff("agentId", json!(own.replace("agt", "run"))), "NOT_FOUND", "handoffs.0.agentId"),
        ("handoffs", handoff("agentId", json!(foreign)), "NOT_FOUND", "handoffs.0.agentId"),
        ("handoffs", handoff("agentId", json!(deleted)), "NOT_FOUND", "handoffs.0.agentId"),
        ("handoffs", handoff("toolName", json!("no spaces")), "INVALID", "handoffs.0.toolName"),
        ("handoffs", handoff("toolDescription", json!(long(1_025))), "INVALID", "handoffs.0.toolDescription"),
        ("handoffs", handoff("inputFilter", json!("LAST_N")), "INVALID", "handoffs.0.lastN"),
        ("handoffs", handoff("lastN", json!(2)), "INVALID", "handoffs.0.lastN"),
        ("handoffs", filtered(json!({"inputFilter": "REMOVE_TOOLS", "lastN": 2})), "INVALID", "handoffs.0.lastN"),
        ("handoffs", filtered(json!({"inputFilter": "LAST_N", "lastN": 0})), "INVALID", "handoffs.0.lastN"),
        ("handoffs", filtered(json!({"inputFilter": "LAST_N", "lastN": -1})), "INVALID", "handoffs.0.lastN"),
        ("handoffs", filtered(json!({"inputFilter": "LAST_N", "lastN": 1_001})), "INVALID", "handoffs.0.lastN"),
        (
            "handoffs",
            filtered(json!({"inputFilter": "REMOVE_TOOLS", "nestHistory": true})),
            "INVALID",
            "handoffs.0.nestHistory",
        ),
        ("handoffDescription", json!(long(1_025)), "INVALID", "handoffDescription"),
        ("handoffDescription", json!("\u{0}"), "INVALID", "handoffDescription"),
        ("guardrails", json!(many_guardrails), "LIMIT_EXCEEDED", "guardrails"),
        ("guardrails", guardrail("name", json!("")), "INVALID", "guardrails.0.name"),
        ("guardrails", guardrail("name", json!(long(101))), "INVALID", "guardrails.0.name"),
        ("guardrails", guardrail("name", json!("a\u{0}b")), "INVALID", "guardrails.0.name"),
        ("guardrails", json!([many_guardrails[1], many_guardrails[1]]), "DUPLICATE", "guardrails.1.name"),
        ("guardrails", guardrail("tool", json!("look_up")), "INVALID", "guardrails.0.tool"),
        ("guardrails", with_stage("TOOL_INPUT", json!({"tool": "no spaces"})), "INVALID", "guardrails.0.tool"),
        ("guardrails", with_stage("OUTPUT", json!({"parallel": true})), "INVALID", "guardrails.0.parallel"),
        ("guardrails", with_stage("TOOL_INPUT", json!({"parallel": true})), "INVALID", "guardrails.0.parallel"),
        ("guardrails", with_stage("INPUT", json!({"onTrip": "REJECT"})), "INVALID", "guardrails.0.onTrip"),
        ("guardrails", with_stage("OUTPUT", json!({"message": "No."})), "INVALID", "guardrails.0.message"),
        (
            "guardrails",
            with_stage("TOOL_INPUT", json!({"onTrip": "FAIL", "message": "No."})),
            "INVALID",
            "guardrails.0.message",
        ),
        ("guardrails", with_stage("TOOL_OUTPUT", json!({"message": ""})), "INVALID", "guardrails.0.message"),
        ("guardrails", with_stage("TOOL_OUTPUT", json!({"message": long(10_001)})), "INVALID", "guardrails.0.message"),
        ("guardrails", rule("maxLength", json!(0)), "INVALID", "guardrails.0.rule.maxLength"),
        ("guardrails", rule("maxLength", json!(-5)), "INVALID", "guardrails.0.rule.maxLength"),
        ("guardrails", rule("maxLength", json!(10_000_001)), "INVALID", "guardrails.0.rule.maxLength"),
        ("guardrails", rule("regex", json!({"pattern": ""})), "INVALID", "guardrails.0.rule.regex.pattern"),
        ("guardrails", rule("regex", json!({"pattern": "("})), "INVALID", "guardrails.0.rule.regex.pattern"),
        ("guardrails", rule("regex", json!({"pattern": "a\u{0}"})), "INVALID", "guardrails.0.rule.regex.pattern"),
        // What no engine matches in linear time, or in bounded memory.
        ("guardrails", rule("regex", json!({"pattern": "(?=a)b"})), "INVALID", "guardrails.0.rule.regex.pattern"),
        ("guardrails", rule("regex", json!({"pattern": r"(a)\1"})), "INVALID", "guardrails.0.rule.regex.pattern"),
        (
            "guardrails",
            rule("regex", json!({"pattern": "((a{1000}){1000}){1000}"})),
            "INVALID",
            "guardrails.0.rule.regex.pattern",
        ),
        (
            "guardrails",
            rule("regex", json!({"pattern": "a".repeat(4_097)})),
            "INVALID",
            "guardrails.0.rule.regex.pattern",
        ),
        ("guardrails", rule("jsonSchema", json!([])), "INVALID", "guardrails.0.rule.jsonSchema"),
        ("guardrails", rule("jsonSchema", json!({"type": "objekt"})), "INVALID", "guardrails.0.rule.jsonSchema"),
        ("guardrails", rule("agentId", json!("")), "NOT_FOUND", "guardrails.0.rule.agentId"),
        ("guardrails", rule("agentId", json!(missing("agt"))), "NOT_FOUND", "guardrails.0.rule.agentId"),
        ("guardrails", rule("agentId", json!(foreign)), "NOT_FOUND", "guardrails.0.rule.agentId"),
        ("guardrails", rule("agentId", json!(deleted)), "NOT_FOUND", "guardrails.0.rule.agentId"),
        ("outputSchema", json!([]), "INVALID", "outputSchema"),
        ("outputSchema", json!(true), "INVALID", "outputSchema"),
        ("outputSchema", json!({"type": "objekt"}), "INVALID", "outputSchema"),
        ("outputSchema", json!({"$ref": "#/nowhere"}), "INVALID", "outputSchema"),
        ("outputSchema", json!({"$ref": "https://example.com/s.json"}), "INVALID", "outputSchema"),
        ("outputSchema", json!({"pattern": "(?<!a)b"}), "INVALID", "outputSchema"),
        ("outputSchema", json!({"title": "a\u{0}b"}), "INVALID", "outputSchema"),
        ("outputSchema", json!({"title": "x".repeat(65_536)}), "INVALID", "outputSchema"),
        ("fallbackModels", json!(["gpt-99"]), "UNKNOWN_MODEL", "fallbackModels.0"),
        ("fallbackModels", json!(["gpt-4o", ""]), "UNKNOWN_MODEL", "fallbackModels.1"),
        ("fallbackModels", json!(["demo"]), "DUPLICATE", "fallbackModels.0"),
        ("fallbackModels", json!(["gpt-4o", "gpt-4.1", "gpt-4o"]), "DUPLICATE", "fallbackModels.2"),
        ("stopAtTools", json!(["no spaces"]), "INVALID", "stopAtTools.0"),
        ("stopAtTools", json!(["good", ""]), "INVALID", "stopAtTools.1"),
        ("stopAtTools", json!(vec!["t"; 129]), "LIMIT_EXCEEDED", "stopAtTools"),
        ("maxTurns", json!(0), "INVALID", "maxTurns"),
        ("maxTurns", json!(-3), "INVALID", "maxTurns"),
        ("maxTurns", json!(1_001), "INVALID", "maxTurns"),
        ("maxToolConcurrency", json!(0), "INVALID", "maxToolConcurrency"),
        ("maxToolConcurrency", json!(129), "INVALID", "maxToolConcurrency"),
    ];
    let create = json!({"name": "Agent", "model": "demo", "instructions": "Be brief."});
    let update = json!({"agentId": own});
    for (field, value, code, path) in fields {
        let refused =
            assert_refused(&tenant.client, "createAgent", with(&create, field, value.clone()), code, path).await;
        if code == "UNKNOWN_MODEL" {
            let message = text(&refused.data()["createAgent"], "/errors/0/message");
            assert!(message.contains("demo") && message.contains("gpt-4o-mini"), "{message}");
        }
        assert_refused(&tenant.client, "updateAgent", with(&update, field, value), code, path).await;
    }
    for field in ["name", "model", "instructions"] {
        assert_refused(&tenant.client, "updateAgent", with(&update, field, Value::Null), "INVALID", field).await;
    }
    for id in [
        "",
        "nonsense",
        "agt_",
        "\u{0}",
        &missing("agt"),
        &own.replace("agt", "key"),
        &foreign,
        &deleted,
        &own.to_uppercase(),
    ] {
        for name in ["updateAgent", "publishAgent", "rollbackAgent", "deleteAgent"] {
            let input = json!({"agentId": id});
            let input = if name == "rollbackAgent" { with(&input, "version", json!(1)) } else { input };
            assert_refused(&tenant.client, name, input, "NOT_FOUND", "agentId").await;
        }
    }
    for version in [0, -1, 2, i32::MAX] {
        let input = json!({"agentId": own, "version": version});
        assert_refused(&tenant.client, "rollbackAgent", input, "NOT_FOUND", "version").await;
    }
    // Several problems come together, each with its path; and of a graph at its publish.
    let several = json!({"name": "", "model": "none", "instructions": "", "maxTurns": 0, "guardrails": [{
        "name": "g", "stage": "INPUT", "rule": {"maxLength": 0}}]});
    let several = mutate(&tenant.client, "createAgent", several).await;
    let mut found: Vec<String> = refusals(&several, "createAgent").into_iter().map(|(_, field)| field).collect();
    found.sort();
    assert_eq!(found, ["guardrails.0.rule.maxLength", "maxTurns", "model", "name"]);
    let tool = json!({"webhook": {"name": "same", "description": "", "url": "https://example.com/"}});
    let collision = with(&with(&create, "tools", json!([tool, tool])), "publish", json!(true));
    let collision = mutate(&tenant.client, "createAgent", collision).await;
    assert_eq!(refusals(&collision, "createAgent")[0].0, "NAME_COLLISION", "{}", collision.body);
    let fallbacks = with(&create, "fallbackModels", json!(vec!["demo"; 9]));
    let fallbacks = mutate(&tenant.client, "createAgent", fallbacks).await;
    let too_many = ("LIMIT_EXCEEDED".to_owned(), "fallbackModels".to_owned());
    assert!(refusals(&fallbacks, "createAgent").contains(&too_many), "{}", fallbacks.body);
    // So far nothing was stored.
    assert_eq!(stored(&app, &tenant).await, before);
    let empty = json!({"agentId": own, "guardrails": [], "fallbackModels": [], "outputSchema": null, "tools": [], "handoffs": []});
    done(&tenant.client, "updateAgent", empty).await;
    assert!(!app.log().contains("tok-2c8e4fb7"), "a token is in the log");
}

async fn no_tool_points_inside(builder: TestAppBuilder) {
    let app = builder.env("CLOISTER_WEBHOOKS__ALLOWED_HOSTS", "hooks.internal,10.9.8.7:8443").start().await;
    let tenant = app.tenant("alpha").await;
    let create = |kind: &str, url: &str| {
        let tool = match kind {
            "webhook" => json!({"webhook": {"name": "t", "description": "", "url": url}}),
            _ => json!({"mcp": {"name": "Server", "url": url}}),
        };
        json!({"name": "Agent", "model": "demo", "instructions": "", "tools": [tool]})
    };
    let kinds = [("webhook", "tools.0.webhook.url"), ("mcp", "tools.0.mcp.url")];
    let before = stored(&app, &tenant).await;
    let too_long = format!("https://example.com/{}", "x".repeat(2_048));
    for url in [
        "http://127.0.0.1/",
        "http://127.0.0.1:8080/graphql",
        "http://127.1/",
        "http://2130706433/",
        "http://0x7f.0.0.1/",
        "http://0177.0.0.1/",
        "http://127。0。0。1/",
        "http://0.0.0.0/",
        "http://localhost/",
        "http://LOCALHOST./",
        "http://a.localhost/",
        "http://printer.local/",
        "http://metadata.google.internal/computeMetadata/v1/",
        "http://169.254.169.254/latest/meta-data/",
        "http://10.0.0.1/",
        "http://172.16.0.1/",
        "http://192.168.1.1/",
        "http://100.64.0.1/",
        "http://192.0.0.1/",
        "http://198.18.0.1/",
        "http://224.0.0.1/",
        "http://255.255.255.255/",
        "http://[::]/",
        "http://[::1]/",
        "http://[fe80::1]/",
        "http://[fd00:ec2::254]/",
        "http://[ff02::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[64:ff9b::7f00:1]/",
        "http://[2002:7f00:1::1]/",
        "http://[2001:0:7f00:1::1]/",
        // Allowed at another port only.
        "https://10.9.8.7/",
        "https://10.9.8.7:8444/",
        "https://user:secret-pass@example.com/",
        "https://user@example.com/",
        "ftp://example.com/",
        "file:///etc/passwd",
        "gopher://example.com/",
        "javascript:alert(1)",
        "data:text/plain,x",
        "//example.com/",
        "example.com",
        "https://",
        "not a URL",
        &too_long,
    ] {
        for (kind, field) in kinds {
            assert_refused(&tenant.client, "createAgent", create(kind, url), "INVALID", field).await;
        }
    }
    // An empty one, or one with NUL, is wrong in more than one way.
    for url in ["", " ", "https://\u{0}.example.com/", "https://example.com/\u{0}"] {
        for (kind, field) in kinds {
            let refused = mutate(&tenant.client, "createAgent", create(kind, url)).await;
            let found = refusals(&refused, "createAgent");
            let named = ("INVALID".to_owned(), field.to_owned());
            assert!(!found.is_empty() && found.iter().all(|refusal| *refusal == named), "{url:?}: {found:?}");
        }
    }
    assert_eq!(stored(&app, &tenant).await, before);
    assert!(!app.log().contains("secret-pass"), "a password is in the log");
    for url in
        ["https://example.com/hook", "http://8.8.8.8:81/x?y=z", "http://hooks.internal/", "https://10.9.8.7:8443/x"]
    {
        for (kind, _) in kinds {
            done(&tenant.client, "createAgent", create(kind, url)).await;
        }
    }
}

async fn a_runs_fields_are_checked(builder: TestAppBuilder) {
    let app = builder.start().await;
    let (tenant, other) = (app.tenant("alpha").await, app.tenant("beta").await);
    let agent = new_agent(&tenant.client, json!({})).await;
    let draft = new_agent(&tenant.client, json!({"publish": false})).await;
    let foreign = new_agent(&other.client, json!({})).await;
    let conversation = async |tenant: &Tenant, agent: &str| {
        let run = finished_run(&tenant.client, json!({"agentId": agent, "input": "Hi", "newConversation": true})).await;
        let document = "query ($id: ID!) { run(id: $id) { conversation { id } } }";
        let conversation = tenant.client.data(document, json!({"id": run})).await;
        (text(&conversation, "/run/conversation/id"), run)
    };
    let (own_conversation, own_run) = conversation(&tenant, &agent).await;
    let (foreign_conversation, foreign_run) = conversation(&other, &foreign).await;
    let before = stored(&app, &tenant).await;
    let start = json!({"agentId": agent, "input": "Hi"});
    for (field, value, code, path) in [
        ("input", json!(""), "INVALID", "input"),
        ("input", json!(" \n"), "INVALID", "input"),
        ("input", json!(long(200_001)), "INVALID", "input"),
        ("input", json!("a\u{0}b"), "INVALID", "input"),
        ("agentId", json!(""), "NOT_FOUND", "agentId"),
        ("agentId", json!("nonsense\u{0}"), "NOT_FOUND", "agentId"),
        ("agentId", json!(missing("agt")), "NOT_FOUND", "agentId"),
        ("agentId", json!(own_run), "NOT_FOUND", "agentId"),
        ("agentId", json!(foreign), "NOT_FOUND", "agentId"),
        ("agentId", json!(draft), "NOT_PUBLISHED", "agentId"),
        ("conversationId", json!(""), "NOT_FOUND", "conversationId"),
        ("conversationId", json!(missing("cnv")), "NOT_FOUND", "conversationId"),
        ("conversationId", json!(agent), "NOT_FOUND", "conversationId"),
        ("conversationId", json!(foreign_conversation), "NOT_FOUND", "conversationId"),
        ("version", json!(0), "INVALID", "version"),
        ("version", json!(-1), "INVALID", "version"),
        ("version", json!(2), "NOT_FOUND", "version"),
        ("maxTokens", json!(0), "INVALID", "maxTokens"),
        ("maxTokens", json!(-5), "INVALID", "maxTokens"),
        ("maxTokens", json!(i64::MAX), "INVALID", "maxTokens"),
        ("timeoutSeconds", json!(0), "INVALID", "timeoutSeconds"),
        ("timeoutSeconds", json!(-1), "INVALID", "timeoutSeconds"),
        ("timeoutSeconds", json!(86_401), "INVALID", "timeoutSeconds"),
        ("idempotencyKey", json!(""), "INVALID", "idempotencyKey"),
        ("idempotencyKey", json!(long(256)), "INVALID", "idempotencyKey"),
        ("idempotencyKey", json!("\u{0}"), "INVALID", "idempotencyKey"),
        ("historyLimit", json!(-1), "INVALID", "historyLimit"),
        ("historyLimit", json!(100_001), "INVALID", "historyLimit"),
        ("variables", json!([]), "INVALID", "variables"),
        ("variables", json!("a"), "INVALID", "variables"),
        ("variables", json!({"": "x"}), "INVALID", "variables"),
        ("variables", json!({"1a": "x"}), "INVALID", "variables"),
        ("variables", json!({"a.b": "x"}), "INVALID", "variables"),
        ("variables", json!({"a": null}), "INVALID", "variables.a"),
        ("variables", json!({"a": ["x"]}), "INVALID", "variables.a"),
        ("variables", json!({"a": {"b": "x"}}), "INVALID", "variables.a"),
        ("variables", json!({"a": "\u{0}"}), "INVALID", "variables.a"),
        ("variables", json!({"a": long(20_001)}), "INVALID", "variables.a"),
        ("variables", (0..101).map(|at| (format!("v{at}"), json!(at))).collect(), "LIMIT_EXCEEDED", "variables"),
        // The instructions have none.
        ("variables", json!({"a": "x"}), "INVALID", "variables.a"),
    ] {
        assert_refused(&tenant.client, "startRun", with(&start, field, value), code, path).await;
    }
    let both = with(&with(&start, "conversationId", json!(own_conversation)), "newConversation", json!(true));
    assert_refused(&tenant.client, "startRun", both, "INVALID", "newConversation").await;
    let both = with(&with(&start, "version", json!(1)), "draft", json!(true));
    assert_refused(&tenant.client, "startRun", both, "INVALID", "draft").await;
    for id in ["", "nonsense", "\u{0}", &missing("run"), &agent, &foreign_run] {
        for name in ["cancelRun", "resumeRun"] {
            assert_refused(&tenant.client, name, json!({"runId": id}), "NOT_FOUND", "runId").await;
        }
    }
    for id in ["", "nonsense", "\u{0}", &missing("cnv"), &own_run, &foreign_conversation] {
        let input = json!({"conversationId": id});
        assert_refused(&tenant.client, "deleteConversation", input, "NOT_FOUND", "conversationId").await;
    }
    // A run that has ended is neither cancelled nor resumed.
    for name in ["cancelRun", "resumeRun"] {
        assert_refused(&tenant.client, name, json!({"runId": own_run}), "STATE", "runId").await;
    }
    let decision = json!({"runId": own_run, "callId": "c", "approve": true, "argumentsHash": "h"});
    assert_refused(&tenant.client, "decideToolCall", decision.clone(), "STATE", "runId").await;
    for (field, value) in [("runId", ""), ("runId", "\u{0}"), ("runId", &missing("run")), ("runId", &foreign_run)] {
        let decision = with(&decision, field, json!(value));
        assert_refused(&tenant.client, "decideToolCall", decision, "NOT_FOUND", "runId").await;
    }
    for (approve, message) in [(true, json!("Yes")), (false, json!("")), (false, json!(long(10_001)))] {
        let decision = with(&with(&decision, "approve", json!(approve)), "message", message);
        assert_refused(&tenant.client, "decideToolCall", decision, "INVALID", "message").await;
    }
    assert_eq!(stored(&app, &tenant).await, before);
}

async fn a_keys_fields_are_checked(builder: TestAppBuilder) {
    let app = builder.start().await;
    let (tenant, other) = (app.tenant("alpha").await, app.tenant("beta").await);
    let (own, _) = new_key(&tenant.client, json!({"name": "own"})).await;
    let (foreign, _) = new_key(&other.client, json!({"name": "foreign"})).await;
    let before = stored(&app, &tenant).await;
    let most: i64 = 1_000_000_000_000_000;
    let fields = [
        ("name", json!(""), "name"),
        ("name", json!("  "), "name"),
        ("name", json!(long(201)), "name"),
        ("name", json!("a\u{0}b"), "name"),
        ("scopes", json!([]), "scopes"),
        ("expiresAt", json!("2001-01-01T00:00:00Z"), "expiresAt"),
        ("monthlyTokenLimit", json!(-1), "monthlyTokenLimit"),
        ("monthlyTokenLimit", json!(most + 1), "monthlyTokenLimit"),
        ("monthlyTokenLimit", json!(i64::MIN), "monthlyTokenLimit"),
    ];
    for (field, value, path) in fields {
        let create = with(&json!({"name": "key"}), field, value.clone());
        assert_refused(&tenant.client, "createApiKey", create, "INVALID", path).await;
        let update = with(&json!({"apiKeyId": own}), field, value);
        assert_refused(&tenant.client, "updateApiKey", update, "INVALID", path).await;
    }
    for field in ["name", "isActive", "scopes"] {
        let update = with(&json!({"apiKeyId": own}), field, Value::Null);
        assert_refused(&tenant.client, "updateApiKey", update, "INVALID", field).await;
    }
    for seconds in [-1, 2_592_001, i32::MIN] {
        let input = json!({"apiKeyId": own, "graceSeconds": seconds});
        assert_refused(&tenant.client, "rotateApiKey", input, "INVALID", "graceSeconds").await;
        let input = json!({"graceSeconds": seconds});
        assert_refused(&tenant.client, "rotateWebhookSecret", input, "INVALID", "graceSeconds").await;
    }
    for id in ["", "nonsense", "\u{0}", &missing("key"), &tenant.id, &foreign] {
        for name in ["updateApiKey", "rotateApiKey", "revokeApiKey"] {
            assert_refused(&tenant.client, name, json!({"apiKeyId": id}), "NOT_FOUND", "apiKeyId").await;
        }
    }
    for id in ["", "nonsense", "\u{0}", &missing("ten"), &own, &other.id] {
        let input = json!({"name": "key", "tenantId": id});
        assert_refused(&tenant.client, "createApiKey", input.clone(), "NOT_FOUND", "tenantId").await;
        if *id != other.id {
            assert_refused(&app.admin(), "createApiKey", input, "NOT_FOUND", "tenantId").await;
        }
    }
    assert_eq!(stored(&app, &tenant).await, before);
    // What is just within the limits is taken.
    let widest = json!({"name": long(200), "monthlyTokenLimit": most, "expiresAt": "9999-12-31T23:59:59Z"});
    new_key(&tenant.client, widest).await;
    new_key(&tenant.client, json!({"name": "none", "monthlyTokenLimit": 0, "tenantId": tenant.id})).await;
}

async fn a_tenants_fields_are_checked(builder: TestAppBuilder) {
    let app = builder.start().await;
    let (tenant, admin) = (app.tenant("alpha").await, app.admin());
    let before = stored(&app, &tenant).await;
    let create = json!({"name": "New", "email": "new@example.test"});
    let update = json!({"tenantId": tenant.id});
    for (field, value) in [
        ("name", json!("")),
        ("name", json!(" ")),
        ("name", json!(long(201))),
        ("name", json!("a\u{0}b")),
        ("monthlyTokenLimit", json!(-1)),
        ("monthlyTokenLimit", json!(1_000_000_000_000_001_i64)),
    ] {
        assert_refused(&admin, "createTenant", with(&create, field, value.clone()), "INVALID", field).await;
        assert_refused(&admin, "updateTenant", with(&update, field, value), "INVALID", field).await;
    }
    let too_long = format!("{}@example.test", "x".repeat(250));
    for email in [
        "",
        "x",
        "@",
        "a@",
        "@b.test",
        "a@@b.test",
        "a@b@c.test",
        "a b@c.test",
        "a@.test",
        "a@b.",
        "a@b\u{0}.test",
        "a@b.test\n",
        &too_long,
    ] {
        assert_refused(&admin, "createTenant", with(&create, "email", json!(email)), "INVALID", "email").await;
    }
    assert_refused(&admin, "updateTenant", with(&update, "name", Value::Null), "INVALID", "name").await;
    for id in ["", "nonsense", "\u{0}", &missing("ten"), &tenant.id.replace("ten", "agt")] {
        for name in ["updateTenant", "setTenantPlan", "suspendTenant", "resumeTenant", "deleteTenant"] {
            let input = json!({"tenantId": id});
            let input = if name == "setTenantPlan" { with(&input, "plan", json!("PRO")) } else { input };
            assert_refused(&admin, name, input, "NOT_FOUND", "tenantId").await;
        }
    }
    assert_eq!(stored(&app, &tenant).await, before);
}
