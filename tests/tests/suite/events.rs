//! What subscribers are told of runs.

use cloister_tests::app::TestAppBuilder;
use cloister_tests::{Client, Reply};
use serde_json::{Value, json};

use crate::both::on_both;
use crate::steps::{
    Stage, create_agent, ended, events, events_query, granted, items_of, next_event, rest, start, text, try_cancel,
    try_start,
};

on_both!(
    events_begin_after_any_item_and_end_with_the_run,
    deltas_add_up_to_the_stored_text_byte_for_byte,
    deltas_of_arguments_add_up_to_the_call,
    a_late_subscriber_gets_the_text_so_far_as_one_delta,
    all_subscribers_are_told_the_same,
    changes_of_status_are_told_in_their_order,
    runs_that_are_not_the_callers_do_not_exist,
);

async fn events_begin_after_any_item_and_end_with_the_run(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    stage.model.script([
        Reply::text("Wait.").reasoning("hm").and_tool_call("look", json!({})).and_tool_call("nope", json!({})),
        Reply::tool_call("transfer_to_b", json!({})),
        Reply::text("Done"),
    ]);
    let b = stage.agent(json!({"name": "B"})).await;
    let agent = stage.agent(json!({"tools": [stage.tool("look")], "handoffs": [{"agentId": b}]})).await;
    let all = stage.run(&agent, "Go").await;
    let count = all.items.len();
    let kinds: Vec<&str> = all.items.iter().map(|item| item["__typename"].as_str().unwrap()).collect();
    let call = "ToolCallItem";
    let first = ["MessageItem", "ReasoningItem", "MessageItem", call, call, "UsageItem"];
    let next = ["ToolOutputItem", "ToolOutputItem", call, "UsageItem", "HandoffItem", "MessageItem"];
    assert_eq!(kinds, [&first[..], &next[..], &["UsageItem", "StatusItem"]].concat());
    let sequences: Vec<i64> = all.items.iter().map(|item| item["sequence"].as_i64().unwrap()).collect();
    assert_eq!(sequences, (1..=count as i64).collect::<Vec<_>>());
    for after in 0..=count + 1 {
        let told = rest(&mut events(stage.client(), &all.id(), after as i64).await).await;
        assert_eq!(told.len(), count.saturating_sub(after), "nothing but items");
        assert_eq!(items_of(&told), all.items[after.min(count)..]);
    }
    // They are what `Run.items` has.
    let look = format!(
        "query ($id: ID!) {{ run(id: $id) {{ items(first: 30) {{ nodes {{ ...Item }} }} }} }} {}",
        crate::steps::ITEM
    );
    let stored = stage.client().data(&look, json!({"id": all.id()})).await;
    assert_eq!(stored["run"]["items"]["nodes"], json!(all.items));
    let negative =
        stage.client().subscribe_sse(&events_query(), json!({"id": all.id(), "after": -1})).await.next_result().await;
    assert_eq!(negative.unwrap()["errors"][0]["extensions"]["code"], "BAD_REQUEST");
}

/// The deltas of one part of a turn, which must follow on one another: the text, and how many there were.
fn joined(events: &[Value], kind: &str, turn: i64) -> (String, usize) {
    let deltas = events.iter().filter(|event| event["__typename"] == kind && event["turn"] == turn);
    let mut whole = String::new();
    let mut count = 0;
    for delta in deltas {
        assert_eq!(delta["offset"], whole.len(), "an offset in bytes, where the last one ended");
        assert_ne!(delta["text"], "", "a delta says something");
        whole.push_str(delta["text"].as_str().unwrap());
        count += 1;
    }
    (whole, count)
}

async fn deltas_add_up_to_the_stored_text_byte_for_byte(app: TestAppBuilder) {
    const TEXT: &str = "Grüße aus 東京 😀👩‍👩‍👧 und «Zürich»\n\tz̈ – ﷽ 🇩🇪 \u{2028} \r\n\\\" end";
    let stage = Stage::set(app).await;
    let agent = stage.agent(json!({})).await;
    let replies = [Reply::text(TEXT).chunks_of(1).wire_chunks_of(1), Reply::text(TEXT).chunks_of(3)];
    for (reply, characters) in replies.into_iter().zip([1, 3]) {
        stage.model.script([reply.hold()]);
        let id = start(stage.client(), json!({"agentId": agent, "input": "Go"})).await;
        stage.model.wait_for_held(1).await;
        let mut stream = events(stage.client(), &id, 0).await;
        let mut told = vec![next_event(&mut stream).await.unwrap(), next_event(&mut stream).await.unwrap()];
        stage.model.release();
        told.extend(rest(&mut stream).await);
        let (whole, count) = joined(&told, "TextDelta", 1);
        assert_eq!((whole.as_str(), count), (TEXT, TEXT.chars().count().div_ceil(characters)));
        let stored = items_of(&told).into_iter().find(|item| item["part"] == 1).unwrap();
        assert_eq!((&stored["text"], &stored["turn"]), (&json!(TEXT), &json!(1)));
        assert!(told.iter().filter(|event| event["__typename"] == "TextDelta").all(|delta| delta["index"] == 1));
        assert_eq!(ended(stage.client(), &id).await.output(), TEXT);
    }
}

async fn deltas_of_arguments_add_up_to_the_call(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let arguments = json!({"city": "Zürich", "days": [1, 2, 3]});
    stage.model.script([
        Reply::text("Hm.").and_tool_call("look", arguments.clone()).chunks_of(2).hold(),
        Reply::text("Done").hold(),
    ]);
    let agent = stage.agent(json!({"tools": [stage.tool("look")]})).await;
    let id = start(stage.client(), json!({"agentId": agent, "input": "Go"})).await;
    let mut stream = events(stage.client(), &id, 0).await;
    let mut told = vec![next_event(&mut stream).await.unwrap(), next_event(&mut stream).await.unwrap()];
    assert_eq!((&told[1]["text"], &told[1]["offset"]), (&json!("Hm"), &json!(0)));
    stage.model.wait_for_held(1).await;
    stage.model.release();
    stage.model.wait_for_requests(2).await;
    stage.model.wait_for_held(1).await;
    stage.model.release();
    told.extend(rest(&mut stream).await);
    let (whole, count) = joined(&told, "ArgumentsDelta", 1);
    let call = items_of(&told).into_iter().find(|item| item["__typename"] == "ToolCallItem").unwrap();
    assert_eq!((json!(whole), count > 3), (call["arguments"].clone(), true));
    assert_eq!(whole, arguments.to_string());
    for delta in told.iter().filter(|event| event["__typename"] == "ArgumentsDelta") {
        assert_eq!(
            [&delta["callId"], &delta["name"], &delta["index"]],
            [&call["callId"], &json!("look"), &call["index"]]
        );
    }
    assert_eq!(joined(&told, "TextDelta", 1).0, "Hm.");
    assert_eq!(joined(&told, "TextDelta", 2).0, "Done");
    // No delta of a turn comes after the items of its response.
    let place = |found: &dyn Fn(&Value) -> bool| told.iter().position(found).unwrap();
    let last_delta = told.iter().rposition(|event| event["__typename"] == "ArgumentsDelta").unwrap();
    assert!(last_delta < place(&|event| event["item"]["__typename"] == "ToolCallItem"));
}

async fn a_late_subscriber_gets_the_text_so_far_as_one_delta(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let long: String = (0..100).map(|number| format!("{number} × ")).collect();
    stage.model.script([Reply::text(long.clone()).chunks_of(6).chunk_delay(15)]);
    let agent = stage.agent(json!({})).await;
    let id = start(stage.client(), json!({"agentId": agent, "input": "Go"})).await;
    let mut early = events(stage.client(), &id, 0).await;
    let mut told_early = Vec::new();
    while told_early.len() < 10 {
        told_early.push(next_event(&mut early).await.unwrap());
    }
    let had = joined(&told_early, "TextDelta", 1).0.len();
    let mut late = events(stage.client(), &id, 0).await;
    let told_late = rest(&mut late).await;
    told_early.extend(rest(&mut early).await);

    assert_eq!(told_late[0]["item"]["role"], "USER");
    let so_far = &told_late[1];
    assert_eq!((&so_far["__typename"], &so_far["offset"]), (&json!("TextDelta"), &json!(0)));
    assert!(text(&so_far["text"]).len() >= had, "all that had been told so far");
    assert!(told_late[2]["__typename"] == "TextDelta", "and then it goes on");
    for told in [&told_early, &told_late] {
        assert_eq!(joined(told, "TextDelta", 1).0, long);
    }
    assert!(joined(&told_late, "TextDelta", 1).1 < joined(&told_early, "TextDelta", 1).1);
    assert_eq!(items_of(&told_early), items_of(&told_late));
    // After the user's item, the text is told alone.
    let after = rest(&mut events(stage.client(), &id, 1).await).await;
    assert_eq!(items_of(&after), items_of(&told_early)[1..]);
}

async fn all_subscribers_are_told_the_same(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    stage.model.script([
        Reply::text("A text of several pieces").and_tool_call("look", json!({"a": "b"})).hold(),
        Reply::text("And another one").hold(),
    ]);
    let agent = stage.agent(json!({"tools": [stage.tool("look")]})).await;
    let id = start(stage.client(), json!({"agentId": agent, "input": "Go"})).await;
    stage.model.wait_for_held(1).await;
    let mut streams = Vec::new();
    for _ in 0..3 {
        let mut stream = events(stage.client(), &id, 0).await;
        let first = [next_event(&mut stream).await.unwrap(), next_event(&mut stream).await.unwrap()];
        assert_eq!((&first[0]["item"]["text"], &first[1]["text"]), (&json!("Go"), &json!("A te")));
        streams.push(stream);
    }
    // One that leaves in the midst changes nothing for the others.
    drop(streams.pop());
    stage.model.release();
    stage.model.wait_for_requests(2).await;
    stage.model.wait_for_held(1).await;
    stage.model.release();
    let told = [rest(&mut streams[0]).await, rest(&mut streams[1]).await];
    assert_eq!(told[0], told[1]);
    assert_eq!(joined(&told[0], "TextDelta", 2).0, "And another one");
    assert_eq!(told[0].last().unwrap()["item"]["status"], "SUCCEEDED");
}

async fn changes_of_status_are_told_in_their_order(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    stage.model.always(|request| match request.last_user_text().as_str() {
        "hold" => Reply::text("Held").hold(),
        "fail" => Reply::status(400),
        _ => Reply::text("Done"),
    });
    let agent = stage.agent(json!({})).await;
    let other = stage.app.tenant("other").await;
    let its_agent = create_agent(&other.client, json!({})).await;
    // Over a WebSocket: what is answered there after the subscription began is told by it.
    let mut changes = stage.client().ws_ready().await;
    changes.subscribe("1", "subscription { runs { id status output error { code } } }", json!({})).await;
    changes.subscribe("2", "{ viewer { isPlatformAdmin } }", json!({})).await;
    while changes.next().await.message()["type"] != "complete" {}

    let go = |client: &Client, agent: &str, input: &str| {
        let (client, input) = (client.clone(), json!({"agentId": agent, "input": input}));
        async move { start(&client, input).await }
    };
    go(&other.client, &its_agent, "not ours").await;
    let held = go(stage.client(), &agent, "hold").await;
    stage.model.wait_for_held(1).await;
    granted(try_cancel(stage.client(), &held).await);
    let mut expected = vec![(held, vec!["QUEUED", "RUNNING", "CANCELLED"])];
    for _ in 0..20 {
        expected.push((go(stage.client(), &agent, "go").await, vec!["QUEUED", "RUNNING", "SUCCEEDED"]));
    }
    expected.push((go(stage.client(), &agent, "fail").await, vec!["QUEUED", "RUNNING", "FAILED"]));
    let mut told: Vec<Value> = Vec::new();
    while told.len() < 3 * expected.len() {
        told.push(changes.next().await.message()["payload"]["data"]["runs"].clone());
    }
    for (id, statuses) in &expected {
        let own: Vec<&Value> = told.iter().filter(|run| run["id"] == id.as_str()).collect();
        assert_eq!(own.iter().map(|run| run["status"].as_str().unwrap()).collect::<Vec<_>>(), *statuses);
        let output = if statuses[2] == "SUCCEEDED" { json!("Done") } else { Value::Null };
        assert_eq!((&own[1]["output"], &own[2]["output"]), (&Value::Null, &output));
    }
    // Runs end in any order among each other.
    let failed: Vec<&Value> = told.iter().filter(|run| run["status"] == "FAILED").collect();
    assert_eq!(failed.iter().map(|run| &run["error"]["code"]).collect::<Vec<_>>(), ["MODEL_REJECTED"]);
}

async fn runs_that_are_not_the_callers_do_not_exist(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    stage.model.script([Reply::text("Done")]);
    let agent = stage.agent(json!({})).await;
    let started = granted(try_start(stage.client(), json!({"agentId": agent, "input": "Go"})).await)["run"].clone();
    let id = text(&started["id"]);
    ended(stage.client(), &id).await.output();
    let other = stage.app.tenant("other").await;
    let mut answers = Vec::new();
    for (client, id) in [(&other.client, id.as_str()), (stage.client(), agent.as_str()), (stage.client(), "")] {
        let mut stream = client.subscribe_sse(&events_query(), json!({"id": id, "after": 0})).await;
        let mut result = stream.next_result().await.unwrap();
        assert_eq!(result["errors"][0]["extensions"]["code"], "NOT_FOUND");
        result["errors"][0]["extensions"]["traceId"].take();
        answers.push(result);
        assert_eq!((stream.next_result().await, stream.completed()), (None, true));
    }
    assert_eq!(answers[0], answers[1], "nothing tells another tenant's run from none");
    assert_eq!(answers[1], answers[2]);
}
