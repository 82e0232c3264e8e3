//! A model that does its worst: every run ends with the right code, what was charged is in the ledger, and the server
//! stays small.

use std::fs;

use cloister_tests::{Reply, TestApp};
use serde_json::{Value, json};

use crate::steps::{Ended, Stage, tool};

const FAILED: &str = "An error occurred while running the tool. Please try again.";

/// The most memory that the server may ever have taken, in MiB. At rest it takes about a fifth of that.
const MAX_MEMORY: u64 = 400;

async fn stage() -> Stage {
    Stage::set(TestApp::builder().env("CLOISTER_PROVIDERS__SCRIPTED__ATTEMPTS", "2")).await
}

/// What the server says it charged is what the run's ledger says, to the token, and it did not need much memory.
fn accounted(stage: &Stage, run: &Ended) {
    let served = stage.model.served();
    let usage = &run.run["usage"];
    assert_eq!((&usage["requests"], &usage["totalTokens"]), (&json!(served.requests), &json!(served.total)));
    stays_small(stage);
}

fn stays_small(stage: &Stage) {
    let status = fs::read_to_string(format!("/proc/{}/status", stage.app.pid().unwrap())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let kib: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(kib / 1024 < MAX_MEMORY, "{} MiB", kib / 1024);
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_without_end_run_out_of_turns() {
    let stage = stage().await;
    stage.model.always(|_| Reply::tool_call("look", json!({})));
    let agent = stage.agent(json!({"tools": [stage.tool("look")], "maxTurns": 7})).await;
    let run = stage.run(&agent, "Go").await;
    assert_eq!(run.error(), "MAX_TURNS");
    assert_eq!((stage.model.requests().len(), stage.tools.requests().len()), (7, 7), "the last turn's tools run");
    accounted(&stage, &run);
}

#[tokio::test(flavor = "multi_thread")]
async fn handoffs_in_a_circle_run_out_of_turns() {
    let stage = stage().await;
    let first = stage.agent(json!({"name": "Ping", "maxTurns": 6})).await;
    let second = stage.agent(json!({"name": "Pong", "handoffs": [{"agentId": first}]})).await;
    crate::steps::update_agent(stage.client(), &first, json!({"handoffs": [{"agentId": second}]})).await;
    crate::steps::publish(stage.client(), &first).await;
    stage.model.always(|request| {
        let names = request.tool_names();
        Reply::tool_call(names.first().expect("a handoff"), json!({}))
    });
    let run = stage.run(&first, "Go").await;
    assert_eq!(run.error(), "MAX_TURNS");
    assert_eq!(stage.model.requests().len(), 6);
    accounted(&stage, &run);
}

#[tokio::test(flavor = "multi_thread")]
async fn arguments_of_ten_mebibytes_are_cut() {
    let stage = stage().await;
    let huge = format!("{{\"x\": \"{}\"}}", "a".repeat(10 * 1024 * 1024));
    stage.model.script([Reply::tool_call_raw("look", &huge).chunks_of(64 * 1024)]);
    let agent = stage.agent(json!({"tools": [stage.tool("look")]})).await;
    let run = stage.run(&agent, "Go").await;
    assert_eq!(run.error(), "MODEL_UNAVAILABLE");
    assert!(run.run["error"]["message"].as_str().unwrap().contains("larger than"), "{}", run.run);
    assert!(stage.tools.requests().is_empty());
    assert_eq!((stage.model.requests().len(), &run.run["usage"]["requests"]), (1, &json!(1)), "it was paid for once");
    stays_small(&stage);
}

#[tokio::test(flavor = "multi_thread")]
async fn arguments_that_are_no_object_never_reach_a_tool() {
    let stage = stage().await;
    let broken = ["{\"x\": ", "[]", "null", "1e999", "{\"x\": \"\\ud800\"}", "{} {}", "{'x': 1}", "\u{0}", " "];
    let reply = broken[1..]
        .iter()
        .fold(Reply::tool_call_raw("look", broken[0]), |reply, arguments| reply.and_tool_call_raw("look", arguments));
    stage.model.script([reply, Reply::text("Done")]);
    let agent = stage.agent(json!({"tools": [stage.tool("look")]})).await;
    let run = stage.run(&agent, "Go").await;
    assert_eq!(run.output(), "Done");
    assert_eq!(run.outputs(), vec![(FAILED.to_owned(), true); broken.len()]);
    assert!(stage.tools.requests().is_empty());
    accounted(&stage, &run);
}

#[tokio::test(flavor = "multi_thread")]
async fn names_of_others_tools_are_no_tools() {
    let stage = stage().await;
    let secret = tool("secret", &stage.tools.url("/secret"), json!({}));
    let other = stage.agent(json!({"name": "Other", "tools": [secret]})).await;
    let names = ["secret", "transfer_to_nobody", "look\0", "LOOK", "../look", "__proto__", "function"];
    let reply = names[1..]
        .iter()
        .fold(Reply::tool_call(names[0], json!({})), |reply, name| reply.and_tool_call(name, json!({})));
    stage.model.script([reply, Reply::text("Done")]);
    let agent = stage.agent(json!({"tools": [stage.tool("look")], "handoffs": [{"agentId": other}]})).await;
    let run = stage.run(&agent, "Go").await;
    assert_eq!(run.output(), "Done");
    let outputs = run.outputs();
    assert_eq!(outputs.len(), names.len());
    assert!(outputs.iter().all(|(text, is_error)| text.ends_with("' not found.") && *is_error), "{outputs:?}");
    assert!(stage.tools.requests().is_empty());
    accounted(&stage, &run);
}

fn calls(count: usize) -> Reply {
    let first = Reply::tool_call("look", json!({"at": 0}));
    (1..count).fold(first, |reply, at| reply.and_tool_call("look", json!({"at": at})))
}

#[tokio::test(flavor = "multi_thread")]
async fn many_calls_of_a_turn_are_all_answered_and_more_are_cut() {
    let stage = stage().await;
    stage.model.script([calls(128), Reply::text("Done")]);
    let agent = stage.agent(json!({"tools": [stage.tool("look")], "maxToolConcurrency": 8})).await;
    let run = stage.run(&agent, "Go").await;
    assert_eq!(run.output(), "Done");
    assert_eq!((run.outputs().len(), stage.tools.requests().len()), (128, 128));
    let messages = stage.model.requests()[1].messages().to_vec();
    let calls_of = |message: &Value| message["tool_calls"].as_array().cloned().unwrap_or_default();
    let asked: Vec<Value> = messages.iter().flat_map(calls_of).map(|call| call["id"].clone()).collect();
    let answers = messages.iter().filter(|message| message["role"] == "tool");
    let answered: Vec<Value> = answers.map(|message| message["tool_call_id"].clone()).collect();
    assert_eq!((asked.len(), &asked), (128, &answered), "in call order");
    accounted(&stage, &run);

    stage.model.script([calls(1000)]);
    let run = stage.run(&agent, "Go").await;
    assert_eq!(run.error(), "MODEL_UNAVAILABLE");
    assert!(run.run["error"]["message"].as_str().unwrap().contains("more than 128 tool calls"), "{}", run.run);
    assert_eq!((stage.tools.requests().len(), &run.run["usage"]["requests"]), (128, &json!(1)), "none was made");
    stays_small(&stage);
}

#[tokio::test(flavor = "multi_thread")]
async fn deltas_of_one_byte_come_to_the_same() {
    let stage = stage().await;
    let text = "Grüße 日本 😀 ".repeat(100);
    stage.model.script([
        Reply::tool_call("look", json!({"city": text})).chunks_of(1).wire_chunks_of(1),
        Reply::text(text.clone()).chunks_of(1).wire_chunks_of(1),
    ]);
    let agent = stage.agent(json!({"tools": [stage.tool("look")]})).await;
    let run = stage.run(&agent, "Go").await;
    assert_eq!(run.output(), text);
    assert_eq!(stage.tools.requests()[0].json(), json!({"city": text}));
    accounted(&stage, &run);
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_are_no_answers_end_the_run() {
    let chunk = |delta: &str| format!("data: {{\"choices\":[{{\"index\":0,\"delta\":{delta}}}]}}\n\n").into_bytes();
    let invalid =
        [b"data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"".as_slice(), b"\xff\xfe\"}}]}\n\n"].concat();
    for (name, bytes) in [
        ("invalid UTF-8", invalid),
        ("no JSON", b"data: {\"choices\": [\n\n".to_vec()),
        ("another shape", b"data: [1, 2, 3]\n\n".to_vec()),
        ("a number for a text", chunk("{\"content\": 7}")),
        ("no choices", b"data: {\"choices\": []}\n\ndata: [DONE]\n\n".to_vec()),
        ("nothing", Vec::new()),
        ("a page", b"<html>".to_vec()),
    ] {
        let stage = stage().await;
        stage.model.always(move |_| Reply::raw(bytes.clone()));
        let agent = stage.agent(json!({})).await;
        let run = stage.run(&agent, "Go").await;
        let code = run.error();
        assert!(["MODEL_BEHAVIOR", "MODEL_UNAVAILABLE"].contains(&code.as_str()), "{name}: {code}");
        let calls = stage.model.requests().len();
        assert!(calls <= 2, "{name}: {calls} calls");
        assert_eq!(run.run["usage"]["requests"], json!(calls), "{name}: each call has its row");
        stays_small(&stage);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_ends_the_run() {
    let impatient = TestApp::builder()
        .env("CLOISTER_PROVIDERS__SCRIPTED__ATTEMPTS", "2")
        .env("CLOISTER_PROVIDERS__SCRIPTED__FIRST_BYTE_TIMEOUT_MS", "1000")
        .env("CLOISTER_PROVIDERS__SCRIPTED__IDLE_TIMEOUT_MS", "1000");
    let stage = Stage::set(impatient).await;
    stage.model.script([Reply::hang(), Reply::hang()]);
    let agent = stage.agent(json!({})).await;
    let run = stage.run(&agent, "Go").await;
    assert_eq!(run.error(), "MODEL_UNAVAILABLE");
    assert_eq!(run.run["usage"]["requests"], 2);
    // Silence in the midst of an answer.
    stage.model.script([Reply::text("Hello world").chunks_of(5).hold()]);
    let run = stage.run(&agent, "Go").await;
    assert_eq!((run.error().as_str(), &run.run["usage"]["requests"]), ("MODEL_UNAVAILABLE", &json!(1)));
    stays_small(&stage);
}
