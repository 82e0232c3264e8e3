//! Agents as tools: runs inside runs.

use std::collections::BTreeMap;

use cloister_tests::app::TestAppBuilder;
use cloister_tests::{ModelServer, Reply, TestApp, ToolServer, Worker};
use serde_json::{Value, json};

use super::both::on_both;
use super::calls::done;
use super::ledger;
use super::steps::{Stage, create_agent, ended, start, tool, try_publish, until, update_agent};
use super::workers::dedicated;

on_both!(
    an_agent_answers_a_call_in_a_run_of_its_own,
    nested_runs_go_side_by_side,
    a_nested_run_that_fails_is_a_tool_that_fails,
    nesting_without_end_is_bounded,
    nested_turns_are_not_paid_for_twice_after_a_kill,
    a_worker_apart_nests_as_well,
);

fn agent_tool(name: &str, agent_id: &str, fields: Value) -> Value {
    let tool = json!({"name": name, "description": format!("Asks {name}."), "agentId": agent_id});
    json!({"agent": super::steps::with(tool, fields)})
}

/// A reply that depends on whose instructions a request has and on how many of its tools have answered.
fn scripted(model: &ModelServer, script: impl Fn(&str, usize) -> Reply + Send + Sync + 'static) {
    model.always(move |request| {
        let messages = request.messages();
        let instructions = messages[0]["content"].as_str().unwrap_or_default().to_owned();
        let answered = messages.iter().filter(|message| message["role"] == "tool").count();
        script(&instructions, answered)
    });
}

async fn an_agent_answers_a_call_in_a_run_of_its_own(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let inner = stage.agent(json!({"name": "Inner", "instructions": "inner", "tools": [stage.tool("look")]})).await;
    let middle = stage
        .agent(json!({"name": "Middle", "instructions": "middle", "tools": [agent_tool("inner", &inner, json!({}))]}))
        .await;
    let outer = stage
        .agent(json!({"name": "Outer", "instructions": "outer", "tools": [agent_tool("middle", &middle, json!({}))]}))
        .await;
    stage.model.script([
        Reply::tool_call("middle", json!({"input": "What is it?"})).call_id("call_o").usage(10, 1),
        Reply::tool_call("inner", json!({"input": "Look."})).call_id("call_m").usage(20, 2),
        Reply::tool_call("look", json!({})).call_id("call_i").usage(30, 3),
        Reply::text("Seen.").usage(40, 4),
        Reply::text("It is seen.").usage(50, 5),
        Reply::text("Done.").usage(60, 6),
    ]);
    let run = stage.run(&outer, "Go").await;
    assert_eq!(run.output(), "Done.");
    assert_eq!((&run.run["turns"], &run.run["usage"]["requests"]), (&json!(2), &json!(6)));
    assert_eq!(run.run["usage"]["totalTokens"], 231);
    let places: Vec<_> = run
        .items
        .iter()
        .map(|item| {
            let kind = item["__typename"].as_str().unwrap().trim_end_matches("Item").to_owned();
            (kind, item["agentName"].as_str().unwrap().to_owned(), item["scope"].as_str().map(str::to_owned))
        })
        .collect();
    let place = |kind: &str, agent: &str, scope: &str| {
        (kind.to_owned(), agent.to_owned(), (!scope.is_empty()).then(|| scope.to_owned()))
    };
    assert_eq!(
        places,
        [
            place("Message", "Outer", ""),
            place("ToolCall", "Outer", ""),
            place("Usage", "Outer", ""),
            place("ToolCall", "Middle", "call_o"),
            place("Usage", "Middle", "call_o"),
            place("ToolCall", "Inner", "call_o/call_m"),
            place("Usage", "Inner", "call_o/call_m"),
            place("ToolOutput", "Inner", "call_o/call_m"),
            place("Message", "Inner", "call_o/call_m"),
            place("Usage", "Inner", "call_o/call_m"),
            place("ToolOutput", "Middle", "call_o"),
            place("Message", "Middle", "call_o"),
            place("Usage", "Middle", "call_o"),
            place("ToolOutput", "Outer", ""),
            place("Message", "Outer", ""),
            place("Usage", "Outer", ""),
            place("Status", "Outer", ""),
        ]
    );
    assert_eq!(run.outputs().last().unwrap(), &("It is seen.".to_owned(), false));
    let requests = stage.model.requests();
    // A fresh history: nothing of the outer conversation.
    assert_eq!(requests[1].messages()[1..], [json!({"role": "user", "content": "What is it?"})]);
    assert_eq!(requests[2].messages()[1..], [json!({"role": "user", "content": "Look."})]);
    let [call] = &stage.tools.requests()[..] else { panic!("not one call") };
    let run_id = super::calls::uuid_of(&run.id());
    assert_eq!(call.header("idempotency-key"), Some(format!("{run_id}:1.0/1.0/1.0").as_str()));

    let usage =
        stage.client().data("{ usage { byAgent { agent { name } version usage { requests } } } }", json!({})).await;
    let lines: BTreeMap<String, i64> = usage["usage"]["byAgent"]
        .as_array()
        .unwrap()
        .iter()
        .map(|line| (line["agent"]["name"].as_str().unwrap().to_owned(), line["usage"]["requests"].as_i64().unwrap()))
        .collect();
    let lines: Vec<_> = lines.iter().map(|(name, requests)| (name.as_str(), *requests)).collect();
    assert_eq!(lines, [("Inner", 2), ("Middle", 2), ("Outer", 2)]);
}

async fn nested_runs_go_side_by_side(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let mut tools = Vec::new();
    for name in ["one", "two", "three"] {
        let agent = stage.agent(json!({"name": name, "instructions": name, "tools": [stage.tool("look")]})).await;
        tools.push(agent_tool(name, &agent, json!({})));
    }
    let outer = stage.agent(json!({"name": "Outer", "instructions": "outer", "tools": tools})).await;
    scripted(&stage.model, |instructions, answered| match (instructions, answered) {
        ("outer", 0) => Reply::tool_call("one", json!({"input": "1"}))
            .and_tool_call("two", json!({"input": "2"}))
            .and_tool_call("three", json!({"input": "3"})),
        ("outer", _) => Reply::text("All."),
        // One id in all of them, as compatible servers have it.
        (_, 0) => Reply::tool_call("look", json!({})).call_id("call_0").hold(),
        (name, _) => Reply::text(name.to_uppercase()),
    });
    let id = start(stage.client(), json!({"agentId": outer, "input": "Go"})).await;
    // None answers before all have asked.
    stage.model.wait_for_held(3).await;
    stage.model.release_all();
    let run = ended(stage.client(), &id).await;
    assert_eq!(run.output(), "All.");
    let last = stage.model.requests().pop().unwrap();
    let told: Vec<_> = last.messages().iter().filter(|m| m["role"] == "tool").map(|m| m["content"].clone()).collect();
    assert_eq!(told, ["ONE", "TWO", "THREE"], "in call order");
    let sequences: Vec<_> = run.items.iter().map(|item| item["sequence"].as_i64().unwrap()).collect();
    assert_eq!(sequences, (1..=sequences.len() as i64).collect::<Vec<_>>());
    let mut keys: Vec<_> =
        stage.tools.requests().iter().map(|r| r.header("idempotency-key").unwrap().to_owned()).collect();
    keys.sort();
    keys.dedup();
    assert_eq!(keys.len(), 3, "each call has a key of its own: {keys:?}");
}

async fn a_nested_run_that_fails_is_a_tool_that_fails(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let inner = stage.agent(json!({"name": "Inner", "instructions": "inner", "tools": [stage.tool("look")]})).await;
    let brief = agent_tool("brief", &inner, json!({"maxTurns": 1}));
    let outer = stage.agent(json!({"name": "Outer", "instructions": "outer", "tools": [brief]})).await;
    let failed = ("An error occurred while running the tool. Please try again.".to_owned(), true);
    let asks = |input: Value| Reply::tool_call("brief", input).call_id("call_o");
    for (what, replies) in [
        ("max turns", vec![asks(json!({"input": "?"})), Reply::tool_call("look", json!({})), Reply::text("Ok.")]),
        ("a refusal", vec![asks(json!({"input": "?"})), Reply::refusal("No."), Reply::text("Ok.")]),
        ("a provider's error", vec![asks(json!({"input": "?"})), Reply::status(400), Reply::text("Ok.")]),
        ("no input", vec![asks(json!({"text": "?"})), Reply::text("Ok.")]),
        ("no text", vec![asks(json!({"input": 7})), Reply::text("Ok.")]),
    ] {
        stage.model.script(replies);
        let run = stage.run(&outer, "Go").await;
        assert_eq!((run.output().as_str(), run.outputs().last()), ("Ok.", Some(&failed)), "{what}");
        assert_eq!(stage.model.unused(), 0, "{what}");
    }
    // One that ends without a word says the last that was said in it.
    stage.model.script([asks(json!({"input": "?"})), Reply::text("").usage(5, 0), Reply::text("Ok.")]);
    let run = stage.run(&outer, "Go").await;
    assert_eq!((run.output().as_str(), run.outputs().last().unwrap().0.as_str()), ("Ok.", ""));
    update_agent(stage.client(), &outer, json!({"tools": [agent_tool("brief", &inner, json!({}))]})).await;
    super::steps::publish(stage.client(), &outer).await;
    let looks = Reply::text("Let me see.").and_tool_call("look", json!({})).call_id("call_l");
    stage.model.script([asks(json!({"input": "?"})), looks, Reply::text(""), Reply::text("Ok.")]);
    stage.tools.script([cloister_tests::ToolAnswer::text("Green.")]);
    let run = stage.run(&outer, "Go").await;
    assert_eq!((run.output().as_str(), run.outputs().last().unwrap().0.as_str()), ("Ok.", "Green."));
}

async fn nesting_without_end_is_bounded(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let own = stage.agent(json!({"name": "Own", "instructions": "own", "publish": false})).await;
    update_agent(stage.client(), &own, json!({"tools": [agent_tool("again", &own, json!({}))]})).await;
    assert_eq!(try_publish(stage.client(), &own).await["errors"], json!([]));
    scripted(&stage.model, |_, answered| match answered {
        0 => Reply::tool_call("again", json!({"input": "Deeper."})).call_id(""),
        _ => Reply::text("Enough."),
    });
    let run = stage.run(&own, "Go").await;
    assert_eq!(run.output(), "Enough.");
    let deepest = run.items.iter().filter_map(|item| item["scope"].as_str()).map(|s| s.split('/').count()).max();
    assert_eq!(deepest, Some(8));
}

async fn nested_turns_are_not_paid_for_twice_after_a_kill(app: TestAppBuilder) {
    let model = ModelServer::start().await;
    let tools = ToolServer::start().await;
    let mut app = app.env("CLOISTER_RUNS__LEASE_SECONDS", "3").model_server(&model).start().await;
    let client = app.tenant("acme").await.client;
    let look = tool("look", &tools.url("/look"), json!({}));
    let inner = create_agent(&client, json!({"name": "Inner", "instructions": "inner", "tools": [look]})).await;
    let ask = agent_tool("ask", &inner, json!({}));
    let outer = create_agent(&client, json!({"name": "Outer", "instructions": "outer", "tools": [ask]})).await;
    scripted(&model, |instructions, answered| match (instructions, answered) {
        ("outer", 0) => Reply::tool_call("ask", json!({"input": "?"})).call_id("call_o"),
        ("outer", _) => Reply::text("Done."),
        (_, 0) => Reply::tool_call("look", json!({})).call_id("call_i"),
        _ => Reply::text("Seen.").hold(),
    });
    let id = start(&client, json!({"agentId": outer, "input": "Go"})).await;
    model.wait_for_held(1).await;
    app.kill();
    model.release_all();
    let db = app.database().await;
    super::crash::silent(&db).await;
    super::crash::let_reservations_lapse(&db).await;
    app.restart().await;
    model.wait_for_held(1).await;
    model.release_all();
    let run = ended(&client, &id).await;
    assert_eq!(run.output(), "Done.");
    let requests = model.requests();
    let of = |instructions: &str, answered: usize| {
        let is = |r: &&cloister_tests::model_server::RecordedRequest| {
            r.messages()[0]["content"] == instructions
                && r.messages().iter().filter(|message| message["role"] == "tool").count() == answered
        };
        requests.iter().filter(is).count()
    };
    // Only the turn that was under way is asked again.
    assert_eq!((of("outer", 0), of("inner", 0), of("inner", 1), of("outer", 1)), (1, 1, 2, 1));
    assert_eq!(tools.requests().len(), 1);
    ledger::settled(&db).await;
}

async fn a_worker_apart_nests_as_well(app: TestAppBuilder) {
    let model = ModelServer::start().await;
    let tools = ToolServer::start().await;
    let app: TestApp = app.model_server(&model).start().await;
    let tenant = dedicated(&app, "acme").await;
    let client = &tenant.client;
    let _worker = Worker::start(&app, &tenant).await;
    let look = tool("look", &tools.url("/look"), json!({"needsApproval": true}));
    let mut asks = Vec::new();
    for name in ["one", "two"] {
        let agent = create_agent(client, json!({"name": name, "instructions": name, "tools": [look]})).await;
        asks.push(agent_tool(name, &agent, json!({})));
    }
    let outer = create_agent(client, json!({"name": "Outer", "instructions": "outer", "tools": asks})).await;
    scripted(&model, |instructions, answered| match (instructions, answered) {
        ("outer", 0) => Reply::tool_call("one", json!({"input": "1"})).and_tool_call("two", json!({"input": "2"})),
        ("outer", _) => Reply::text("All."),
        (name, 0) => Reply::tool_call("look", json!({})).call_id(&format!("call_{name}")),
        (name, _) => Reply::text(name.to_uppercase()),
    });
    let id = start(client, json!({"agentId": outer, "input": "Go"})).await;
    let waits = |run: &Value| run["status"] == "WAITING_APPROVAL";
    let run = until("it waits", || super::steps::run(client, &id), waits).await;
    let pending = run["pendingApprovals"].as_array().unwrap().clone();
    assert_eq!(pending.len(), 2, "{run}");
    for call in pending.iter().rev() {
        let decision = json!({
            "runId": id, "callId": call["callId"], "argumentsHash": call["argumentsHash"], "approve": true,
        });
        done(client, "decideToolCall", decision).await;
    }
    let run = ended(client, &id).await;
    assert_eq!(run.output(), "All.");
    assert_eq!(tools.requests().len(), 2);
    assert_eq!(run.run["usage"]["requests"], 6);
}
