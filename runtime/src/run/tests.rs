//! The loop against a scripted model, a journal in memory and endpoints on this machine.

mod stage;

use serde_json::json;
use uuid::Uuid;

use self::stage::*;
use super::*;
use crate::item::{Role, RunStatus, TokenUsage};
use crate::journal::Progress;
use crate::model::{Finish, ModelError, ModelEvent, ModelResponse};
use crate::spec::{AgentSpec, Guardrail, GuardrailRule, GuardrailStage, McpServer, Tool, ToolUseBehavior};

#[tokio::test]
async fn a_text_is_the_output() {
    let stage = Stage::new(vec![agent("A")]).plays(vec![
        Ok(ModelEvent::Text { index: 1, text: "Hal".into() }),
        Ok(ModelEvent::Restarted),
        Ok(ModelEvent::Text { index: 1, text: "Hé".into() }),
        Ok(ModelEvent::Text { index: 1, text: "llo".into() }),
        Ok(done(vec![text("Héllo")], Finish::Stop)),
    ]);
    assert_eq!(stage.run().await, Outcome::Ended);
    stage.assert_succeeded("Héllo");
    assert_eq!(*stage.journal.appends.lock().unwrap(), [3]);
    let delta = |offset, text: &str| Progress::Text { turn: 1, index: 1, offset, text: text.into() };
    let progress = [delta(0, "Hal"), Progress::Restarted { turn: 1 }, delta(0, "Hé"), delta(3, "llo")];
    assert_eq!(*stage.journal.progress.lock().unwrap(), progress);
    let request = stage.request(0);
    assert_eq!(request.instructions, "You are A.");
    assert_eq!(
        request.input,
        [InputItem::Assistant { text: "Earlier".into(), raw: None }, InputItem::User { text: "Hi".into() }]
    );
}

#[tokio::test]
async fn the_first_request_is_known_before_the_run_begins() {
    let hook = || tool("look", "http://127.0.0.1:1");
    let root = with_handoffs(with_tools(agent("A"), vec![hook()]), &["B"]);
    let stage = Stage::new(vec![root.clone(), agent("B")]).responds(vec![text("Yes.")]);
    stage.run_claim(Claim { history: vec![], ..stage.claim() }).await;
    assert_eq!(first_request(&stage.spec), Some(stage.request(0)));

    // Where something is asked before, nothing is certain.
    let rule = GuardrailRule::MaxLength { characters: 9 };
    let guardrail = Guardrail {
        name: "g".into(),
        stage: GuardrailStage::Input,
        tool: None,
        parallel: true,
        rule,
        ends_run: false,
        message: None,
    };
    let guarded = Stage::new(vec![AgentSpec { guardrails: vec![guardrail], ..agent("A") }]);
    assert_eq!(first_request(&guarded.spec), None);
    let server = McpServer {
        name: "s".into(),
        url: "http://127.0.0.1:1".into(),
        token: None,
        allowed_tools: None,
        needs_approval: false,
    };
    let served = Stage::new(vec![AgentSpec { tools: vec![Tool::Mcp(server)], ..agent("A") }]);
    assert_eq!(first_request(&served.spec), None);
}

#[tokio::test]
async fn what_the_gateway_stored_is_not_appended_again() {
    let stage = Stage::new(vec![agent("A")]);
    let response =
        ModelResponse { model: "m".into(), parts: vec![text("X")], finish: Finish::Stop, usage: TokenUsage::default() };
    let stage = stage.plays(vec![Ok(ModelEvent::Done { response, journaled: true })]);
    let claim = stage.claim();
    // The gateway's own append, which it makes before it says that it is done.
    stage.store(Some(1), Body::Message { index: Some(1), role: Role::Assistant, text: "X".into(), raw: None });
    stage.store(Some(1), Body::Usage { model: "m".into(), usage: TokenUsage::default(), failure: None });
    stage.store(
        None,
        Body::Status { status: RunStatus::Succeeded, error: None, output: Some("X".into()), output_json: None },
    );
    assert_eq!(stage.run_claim(claim).await, Outcome::Ended);
    assert!(stage.journal.appends.lock().unwrap().is_empty());
}

#[tokio::test]
async fn outputs_stand_in_call_order_fresh_and_resumed() {
    let (slow, _) = endpoint("slow", Duration::from_millis(200)).await;
    let (fast, _) = endpoint("fast", Duration::ZERO).await;
    let root = with_handoffs(agent("A"), &["B", "C"]);
    let root = with_tools(root, vec![tool("slow", &slow), tool("fast", &fast)]);
    let calls =
        vec![call(2, "transfer_to_c"), call(3, "nope"), call(4, "transfer_to_b"), call(5, "slow"), call(6, "fast")];
    let stage = Stage::new(vec![root, agent("B"), agent("C")]).responds(calls).responds(vec![text("Bye")]);
    assert_eq!(stage.run().await, Outcome::Ended);
    stage.assert_succeeded("Bye");
    let stored = [
        ("fast6", "fast"),
        ("slow5", "slow"),
        ("nope3", "Tool 'nope' not found."),
        ("transfer_to_b4", "Multiple handoffs detected, ignoring this one."),
        ("transfer_to_c2", r#"{"assistant": "C"}"#),
    ];
    assert_eq!(stage.outputs(), stored.map(|(id, output)| (id.to_owned(), output.to_owned())));
    let shown = ["slow5", "fast6", "nope3", "transfer_to_b4", "transfer_to_c2"];
    assert_eq!(stage.shown(1), shown);
    assert_eq!(stage.request(1).instructions, "You are C.");

    // The same from the journal alone.
    stage.journal.items.lock().unwrap().truncate(12);
    let resumed = stage.responds(vec![text("Bye")]);
    assert_eq!(resumed.run().await, Outcome::Ended);
    assert_eq!(resumed.shown(2), shown);
    assert_eq!(resumed.request(2), resumed.request(1));
}

#[tokio::test]
async fn handoffs_are_offered_after_the_tools() {
    let root = with_tools(with_handoffs(agent("A"), &["Bö B"]), vec![tool("t", "http://127.0.0.1:1/")]);
    let stage = Stage::new(vec![root, agent("Bö B")]).responds(vec![text("X")]);
    stage.run().await;
    let request = stage.request(0);
    let tools: Vec<_> = request.functions().collect();
    assert_eq!(
        tools.iter().map(|tool| (tool.name.as_str(), tool.strict)).collect::<Vec<_>>(),
        [("t", true), ("transfer_to_b__b", true)]
    );
    assert_eq!(tools[1].description, "Handoff to the Bö B agent to handle the request. ");
    let schema = json!({ "additionalProperties": false, "type": "object", "properties": {}, "required": [] });
    assert_eq!(tools[1].parameters, schema);
}

#[tokio::test]
async fn max_turns_calls_are_made_and_the_last_ones_tools_run() {
    let (url, keys) = endpoint("ok", Duration::ZERO).await;
    let mut root = with_tools(agent("A"), vec![tool("t", &url)]);
    root.max_turns = 2;
    let stage = Stage::new(vec![root]).responds(vec![call(2, "t")]).responds(vec![call(2, "t")]);
    assert_eq!(stage.run().await, Outcome::Ended);
    stage.assert_failed(RunErrorCode::MaxTurns);
    assert_eq!(stage.request_count(), 2);
    assert_eq!(stage.outputs().len(), 2);
    // The id of the second call was used before.
    assert_eq!(stage.outputs()[1].0, "call_2_2");
    let id = Uuid::nil();
    assert_eq!(*keys.lock().unwrap(), [format!("{id}:1.0"), format!("{id}:2.0")]);
}

#[tokio::test]
async fn tools_can_end_the_run() {
    let (url, _) = endpoint("sunny", Duration::ZERO).await;
    for (behavior, called, requests) in [
        (ToolUseBehavior::StopOnFirstTool, vec![call(2, "nope"), call(3, "a"), call(4, "b")], 1),
        (ToolUseBehavior::StopAtTools, vec![call(2, "a"), call(3, "b")], 1),
        (ToolUseBehavior::StopAtTools, vec![call(2, "a")], 2),
        (ToolUseBehavior::StopOnFirstTool, vec![call(2, "nope")], 2),
    ] {
        let mut root = with_tools(agent("A"), vec![tool("a", &url), tool("b", &url)]);
        root.tool_use_behavior = behavior;
        root.stop_at_tools = vec!["b".into()];
        let stage = Stage::new(vec![root]).responds(called).responds(vec![text("sunny")]);
        assert_eq!(stage.run().await, Outcome::Ended);
        stage.assert_succeeded("sunny");
        assert_eq!(stage.request_count(), requests, "{behavior:?}");
    }
}

#[tokio::test]
async fn tool_choice_is_dropped_for_an_agent_that_has_used_a_tool() {
    let forcing = |name, to: &str| {
        let mut agent = with_handoffs(agent(name), &[to]);
        agent.settings.tool_choice = Some("required".into());
        agent
    };
    let mut stubborn = forcing("B", "A");
    stubborn.reset_tool_choice = false;
    let stage = Stage::new(vec![forcing("A", "B"), stubborn])
        .responds(vec![call(2, "transfer_to_b")])
        .responds(vec![call(2, "transfer_to_a")])
        .responds(vec![call(3, "transfer_to_b")])
        .responds(vec![text("X")]);
    assert_eq!(stage.run().await, Outcome::Ended);
    let choices: Vec<bool> = (0..4).map(|turn| stage.request(turn).tool_choice.is_some()).collect();
    assert_eq!(choices, [true, true, false, true]);
}

#[tokio::test]
async fn failures_of_tools_are_told_to_the_model() {
    let (url, keys) = endpoint("late", Duration::from_secs(60)).await;
    let mut late = tool("late", &url);
    late.timeout_ms = 150;
    let mut picky = tool("picky", &url);
    picky.parameters = json!({ "type": "object", "required": ["city"] });
    let gone = tool("gone", "http://127.0.0.1:1/");
    let stage = Stage::new(vec![with_tools(agent("A"), vec![late, picky, gone])])
        .responds(vec![call(2, "late"), call(3, "picky"), call(4, "gone")])
        .responds(vec![text("X")]);
    assert_eq!(stage.run().await, Outcome::Ended);
    let mut outputs = stage.outputs();
    outputs.sort();
    let failed = "An error occurred while running the tool. Please try again.";
    assert_eq!(
        outputs.iter().map(|(_, output)| output.as_str()).collect::<Vec<_>>(),
        [failed, "Tool 'late' timed out after 0.15 seconds.", failed]
    );
    assert_eq!(keys.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn open_calls_are_made_again_with_the_same_key() {
    let (url, keys) = endpoint("ok", Duration::ZERO).await;
    let mut stage = Stage::new(vec![with_tools(agent("A"), vec![tool("t", &url)])]).responds(vec![text("X")]);
    for (index, call_id) in [(2, "c0"), (3, "c1")] {
        let (name, arguments) = ("t".to_owned(), String::new());
        let call_id = call_id.to_owned();
        stage.store(
            Some(1),
            Body::ToolCall {
                index,
                call_id,
                name,
                arguments,
                arguments_hash: String::new(),
                is_hosted: false,
                raw: None,
            },
        );
    }
    stage.store(Some(1), Body::Usage { model: "m".into(), usage: TokenUsage::default(), failure: None });
    stage.store(Some(1), Body::output("c0", "ok", false));
    stage.store(None, Body::status(RunStatus::Queued));
    stage.fence = 2;
    assert_eq!(stage.run().await, Outcome::Ended);
    stage.assert_succeeded("X");
    assert_eq!(*keys.lock().unwrap(), [format!("{}:1.1", Uuid::nil())]);
    assert_eq!(stage.request_count(), 1);
    // Nobody can have been at turn 2.
    assert!(stage.journal.progress.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_response_that_was_not_acted_on_is() {
    let stage = Stage::new(vec![agent("A")]);
    stage.store(Some(1), Body::Message { index: Some(1), role: Role::Assistant, text: "Done".into(), raw: None });
    stage.store(Some(1), Body::Usage { model: "m".into(), usage: TokenUsage::default(), failure: None });
    assert_eq!(stage.run().await, Outcome::Ended);
    stage.assert_succeeded("Done");
    assert_eq!(stage.request_count(), 0);
    // An ended run is left as it is.
    let stored = stage.bodies();
    assert_eq!(stage.run().await, Outcome::Ended);
    assert_eq!(stage.bodies(), stored);
}

#[tokio::test]
async fn a_turn_taken_over_begins_again() {
    let mut stage = Stage::new(vec![agent("A")]).responds(vec![text("X")]);
    stage.fence = 2;
    assert_eq!(stage.run().await, Outcome::Ended);
    assert_eq!(*stage.journal.progress.lock().unwrap(), [Progress::Restarted { turn: 1 }]);
}

#[tokio::test]
async fn model_errors_end_or_pause_the_run() {
    let failed = ModelError::Failed { code: RunErrorCode::ModelRejected, message: "400".into() };
    let stage = Stage::new(vec![agent("A")]).plays(vec![Err(failed)]);
    assert_eq!(stage.run().await, Outcome::Ended);
    stage.assert_failed(RunErrorCode::ModelRejected);

    let stage = Stage::new(vec![agent("A")]).plays(vec![Err(ModelError::LeaseLost)]);
    assert_eq!(stage.run().await, Outcome::LeaseLost);
    assert_eq!(stage.bodies().len(), 1);

    let stage = Stage::new(vec![agent("A")]).plays(vec![Err(ModelError::QuotaExhausted)]);
    assert_eq!(stage.run().await, Outcome::Paused);
    assert_eq!(stage.end(), (RunStatus::PausedQuota, None, None));
    let resumed = stage.responds(vec![text("X")]);
    assert_eq!(resumed.run().await, Outcome::Ended);
    resumed.assert_succeeded("X");

    let stage = Stage::new(vec![agent("A")]).plays(vec![Ok(done(vec![], Finish::Length))]);
    assert_eq!(stage.run().await, Outcome::Ended);
    stage.assert_failed(RunErrorCode::ModelBehavior);
    assert_eq!(*stage.journal.appends.lock().unwrap(), [2]);

    let stage = Stage::new(vec![agent("A")]).plays(vec![]);
    assert_eq!(stage.run().await, Outcome::Ended);
    stage.assert_failed(RunErrorCode::Internal);
}

#[tokio::test]
async fn time_over_answers_open_calls() {
    let (slow, _) = endpoint("slow", Duration::from_secs(60)).await;
    let (fast, _) = endpoint("fast", Duration::ZERO).await;
    let root = with_tools(with_handoffs(agent("A"), &["A"]), vec![tool("slow", &slow), tool("fast", &fast)]);
    let mut stage = Stage::new(vec![root]).responds(vec![call(2, "slow"), call(3, "fast"), call(4, "transfer_to_a")]);
    stage.time_left_ms = 400;
    assert_eq!(stage.run().await, Outcome::Ended);
    stage.assert_failed(RunErrorCode::Timeout);
    let stored = [
        ("fast3", "fast"),
        ("slow2", "Tool 'slow' was cut off: the run's time is over."),
        ("transfer_to_a4", "Tool 'transfer_to_a' was cut off: the run's time is over."),
    ];
    assert_eq!(stage.outputs(), stored.map(|(id, output)| (id.to_owned(), output.to_owned())));
    assert_eq!(*stage.journal.appends.lock().unwrap(), [4, 1, 3]);

    // Over before it began: no model call is made.
    let mut stage = Stage::new(vec![agent("A")]).responds(vec![text("X")]);
    stage.time_left_ms = 0;
    assert_eq!(stage.run().await, Outcome::Ended);
    stage.assert_failed(RunErrorCode::Timeout);
    assert_eq!(stage.request_count(), 0);
}

#[tokio::test]
async fn a_run_can_be_stopped() {
    let stage = Stage::new(vec![agent("A")]);
    let abandon = async {
        while stage.request_count() == 0 {
            tokio::task::yield_now().await;
        }
        stage.stop.abandon.cancel();
    };
    let (outcome, ()) = tokio::join!(stage.run(), abandon);
    assert_eq!(outcome, Outcome::LeaseLost);
    assert_eq!(stage.bodies().len(), 1);

    let (url, _) = endpoint("ok", Duration::ZERO).await;
    let stage = Stage::new(vec![with_tools(agent("A"), vec![tool("t", &url)])]).responds(vec![text("X")]);
    let (call_id, name, arguments) = ("c".to_owned(), "t".to_owned(), String::new());
    stage.store(
        Some(1),
        Body::ToolCall {
            index: 2,
            call_id,
            name,
            arguments,
            arguments_hash: String::new(),
            is_hosted: false,
            raw: None,
        },
    );
    stage.store(Some(1), Body::Usage { model: "m".into(), usage: TokenUsage::default(), failure: None });
    stage.stop.hand_back.cancel();
    assert_eq!(stage.run().await, Outcome::HandedBack);
    assert_eq!((stage.outputs().len(), stage.request_count()), (1, 0));
}

#[tokio::test]
async fn the_journal_is_waited_for() {
    let stage = Stage::new(vec![agent("A")]).responds(vec![text("X")]);
    *stage.journal.refusals.lock().unwrap() = vec![JournalError::Unavailable("away".into()); 2];
    assert_eq!(stage.run().await, Outcome::Ended);
    stage.assert_succeeded("X");

    let stage = Stage::new(vec![agent("A")]).responds(vec![text("X")]);
    *stage.journal.refusals.lock().unwrap() = vec![JournalError::LeaseLost];
    assert_eq!(stage.run().await, Outcome::LeaseLost);
}

#[tokio::test]
async fn a_spec_without_its_root_fails() {
    let mut stage = Stage::new(vec![agent("A")]);
    stage.spec.root = Uuid::max();
    assert_eq!(stage.run().await, Outcome::Ended);
    stage.assert_failed(RunErrorCode::Internal);
}
