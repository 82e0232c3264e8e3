//! Conversations: what later runs are shown, and what one run at a time means.

use cloister_tests::app::TestAppBuilder;
use cloister_tests::{Reply, ToolAnswer};
use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::both::on_both;
use crate::steps::{
    Stage, create_agent, ended, granted, mutate, refusal, run, start, text, try_cancel, try_start, wait_for_item,
};

on_both!(
    three_runs_share_their_history_on_the_wire,
    one_run_at_a_time_goes_on_in_a_conversation,
    a_busy_conversation_rejects_or_is_interrupted_as_asked,
    a_start_that_is_repeated_at_once_does_not_interrupt_itself,
    a_cancelled_run_leaves_no_orphan_call,
    a_failed_response_leaves_only_the_input,
    a_conversation_is_deleted_once_its_runs_have_ended,
    messages_lie_in_order_over_the_runs,
    starts_cancels_and_ends_in_one_conversation_do_not_block_each_other,
);

fn message(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

async fn three_runs_share_their_history_on_the_wire(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    stage.tools.script([ToolAnswer::text("sunny")]);
    stage.model.script([
        Reply::text("Let me look.").and_tool_call("weather", json!({"city": "Köln"})).and_tool_call_raw("nope", ""),
        Reply::text("It is sunny.").reasoning("hm"),
        Reply::text("You're welcome."),
        Reply::text("Bye!"),
    ]);
    let agent = stage.agent(json!({"tools": [stage.tool("weather")]})).await;
    let (conversation, first) = stage.open_conversation(&agent, "Weather?").await;
    assert_eq!(first.output(), "It is sunny.");
    assert_eq!(stage.say(&agent, &conversation, "Thanks").await.output(), "You're welcome.");
    assert_eq!(stage.say(&agent, &conversation, "Bye").await.output(), "Bye!");

    let call = |at: usize, name: &str, arguments: &str| {
        let function = json!({"name": name, "arguments": arguments});
        json!({"id": format!("call_00000001_{at}"), "type": "function", "function": function})
    };
    let calls = [call(0, "weather", "{\"city\":\"Köln\"}"), call(1, "nope", "{}")];
    let output =
        |at: usize, text: &str| json!({"role": "tool", "tool_call_id": format!("call_00000001_{at}"), "content": text});
    let history = [
        message("system", "Be brief."),
        message("user", "Weather?"),
        json!({"role": "assistant", "content": "Let me look.", "tool_calls": calls}),
        output(0, "sunny"),
        output(1, "Tool 'nope' not found."),
        message("assistant", "It is sunny."),
        message("user", "Thanks"),
        message("assistant", "You're welcome."),
        message("user", "Bye"),
    ];
    let requests = stage.model.requests();
    assert_eq!(requests[1].messages(), &history[..5]);
    assert_eq!(requests[2].messages(), &history[..7]);
    assert_eq!(requests[3].messages(), &history);
}

async fn one_run_at_a_time_goes_on_in_a_conversation(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    stage.model.script([Reply::text("One.").hold()]);
    stage.model.always(|request| Reply::text(format!("After {}.", request.last_user_text())));
    let agent = stage.agent(json!({})).await;
    let first = json!({"agentId": agent, "newConversation": true, "input": "1"});
    let first = granted(try_start(stage.client(), first).await)["run"].clone();
    let conversation = first["conversation"]["id"].clone();
    let next = |input: &str| json!({"agentId": agent, "conversationId": conversation, "input": input});
    let second = start(stage.client(), next("2")).await;
    let third = start(stage.client(), next("3")).await;
    stage.model.wait_for_held(1).await;
    // Another conversation is not held up, and by its end the waiting ones would have been begun too.
    let elsewhere = stage.run(&agent, "elsewhere").await;
    assert_eq!(elsewhere.output(), "After elsewhere.");
    assert_eq!(run(stage.client(), &second).await["status"], "QUEUED");
    assert_eq!(stage.model.requests().len(), 2);

    stage.model.release();
    assert_eq!(ended(stage.client(), &third).await.output(), "After 3.");
    assert_eq!(ended(stage.client(), &second).await.output(), "After 2.");
    let requests = stage.model.requests();
    assert_eq!(requests.len(), 4);
    let said = |request: usize| -> Vec<&str> {
        requests[request].messages().iter().filter_map(|message| message["content"].as_str()).collect()
    };
    assert_eq!(said(2), ["Be brief.", "1", "One.", "2"]);
    assert_eq!(said(3), ["Be brief.", "1", "One.", "2", "After 2.", "3"]);
}

async fn a_busy_conversation_rejects_or_is_interrupted_as_asked(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let client = stage.client();
    stage.model.script([Reply::text("Never heard.").hold()]);
    stage.model.always(|request| Reply::text(format!("After {}.", request.last_user_text())));
    let agent = stage.agent(json!({})).await;
    let first = json!({"agentId": agent, "newConversation": true, "input": "1"});
    let first = granted(try_start(client, first).await)["run"].clone();
    let conversation = first["conversation"]["id"].clone();
    let next = |input: &str, on_busy: &str| json!({"agentId": agent, "conversationId": conversation, "input": input, "onBusy": on_busy});
    stage.model.wait_for_held(1).await;
    let refused = try_start(client, next("refused", "REJECT")).await;
    assert_eq!(refusal(&refused), ("CONFLICT".to_owned(), "conversationId".to_owned()));
    let waiting = start(client, next("2", "ENQUEUE")).await;
    let third = start(client, next("3", "INTERRUPT")).await;
    for cancelled in [text(&first["id"]), waiting] {
        assert_eq!(run(client, &cancelled).await["status"], "CANCELLED");
    }
    assert_eq!(ended(client, &third).await.output(), "After 3.");
    // Nothing is in the way any more.
    let fourth = start(client, next("4", "REJECT")).await;
    assert_eq!(ended(client, &fourth).await.output(), "After 4.");
    let users = |request: &cloister_tests::model_server::RecordedRequest| -> Vec<Value> {
        request.messages().iter().filter(|said| said["role"] == "user").map(|said| said["content"].clone()).collect()
    };
    let last = stage.model.requests().pop().expect("requests");
    assert_eq!(users(&last), ["1", "2", "3", "4"], "what was said stays, the refused one was never said");
    // Twenty at once that reject: one is let in.
    stage.model.script([Reply::text("Held.").hold()]);
    let all = join_all((0..20).map(|_| try_start(client, next("5", "REJECT")))).await;
    let (started, refused): (Vec<Value>, Vec<Value>) = all.into_iter().partition(|payload| payload["run"].is_object());
    assert_eq!((started.len(), refused.len()), (1, 19));
    stage.model.release();
}

async fn a_start_that_is_repeated_at_once_does_not_interrupt_itself(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let client = stage.client();
    stage.model.always(|request| Reply::text(format!("After {}.", request.last_user_text())));
    let agent = stage.agent(json!({})).await;
    let first = json!({"agentId": agent, "newConversation": true, "input": "0"});
    let first = granted(try_start(client, first).await)["run"].clone();
    ended(client, &text(&first["id"])).await;
    for round in 0..10 {
        let start = json!({"agentId": agent, "conversationId": first["conversation"]["id"], "input": round.to_string(),
            "onBusy": "INTERRUPT", "idempotencyKey": format!("round {round}")});
        let started = join_all((0..4).map(|_| try_start(client, start.clone()))).await;
        let ids: Vec<String> = started.into_iter().map(|payload| text(&granted(payload)["run"]["id"])).collect();
        assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
        assert_eq!(ended(client, &ids[0]).await.output(), format!("After {round}."));
    }
}

async fn a_cancelled_run_leaves_no_orphan_call(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    stage.tools.script([ToolAnswer::hang()]);
    stage.model.script([Reply::tool_call("stuck", json!({})), Reply::text("Moving on.")]);
    let agent = stage.agent(json!({"tools": [stage.tool("stuck")]})).await;
    let first = json!({"agentId": agent, "newConversation": true, "input": "Try"});
    let first = granted(try_start(stage.client(), first).await)["run"].clone();
    stage.tools.wait_for_requests(1).await;
    granted(try_cancel(stage.client(), &text(&first["id"])).await);
    let conversation = text(&first["conversation"]["id"]);
    assert_eq!(stage.say(&agent, &conversation, "And now?").await.output(), "Moving on.");
    let function = json!({"name": "stuck", "arguments": "{}"});
    let call = json!({"id": "call_00000001_0", "type": "function", "function": function});
    assert_eq!(
        stage.model.requests()[1].messages(),
        [
            message("system", "Be brief."),
            message("user", "Try"),
            json!({"role": "assistant", "content": null, "tool_calls": [call]}),
            json!({"role": "tool", "tool_call_id": "call_00000001_0", "content": "The run was cancelled."}),
            message("user", "And now?"),
        ]
    );
}

async fn a_failed_response_leaves_only_the_input(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let chunk = |delta: Value, reason: Value| {
        format!("data: {}\n\n", json!({"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}))
    };
    // Text, and then a refusal of it.
    let refused = [
        chunk(json!({"role": "assistant", "content": "Well, "}), Value::Null),
        chunk(json!({"refusal": "no."}), json!("stop")),
        "data: [DONE]\n\n".to_owned(),
    ];
    stage.model.script([Reply::text("One."), Reply::raw(refused.concat()).usage(1, 1), Reply::text("Three.")]);
    let agent = stage.agent(json!({})).await;
    let (conversation, _) = stage.open_conversation(&agent, "1").await;
    assert_eq!(stage.say(&agent, &conversation, "2").await.error(), "MODEL_REFUSAL");
    assert_eq!(stage.say(&agent, &conversation, "3").await.output(), "Three.");
    let requests = stage.model.requests();
    let said = [("system", "Be brief."), ("user", "1"), ("assistant", "One."), ("user", "2"), ("user", "3")];
    assert_eq!(requests[2].messages(), said.map(|(role, text)| message(role, text)));
}

async fn a_conversation_is_deleted_once_its_runs_have_ended(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    stage.model.script([Reply::text("Done").hold()]);
    let agent = stage.agent(json!({})).await;
    let input = json!({"agentId": agent, "newConversation": true, "input": "Go"});
    let first = granted(try_start(stage.client(), input).await)["run"].clone();
    let (id, conversation) = (text(&first["id"]), text(&first["conversation"]["id"]));
    let delete = async || {
        let input = json!({"conversationId": conversation});
        mutate(stage.client(), "deleteConversation", "ConversationIdInput", "deletedId", input).await
    };
    let at = |code: &str| (code.to_owned(), "conversationId".to_owned());
    stage.model.wait_for_held(1).await;
    assert_eq!(refusal(&delete().await), at("CONFLICT"));
    let look = "query ($id: ID!) {
        conversation(id: $id) { id } node(id: $id) { id } conversations { nodes { id } }
    }";
    let there = json!({"id": conversation});
    let expected = json!({"conversation": there, "node": there, "conversations": {"nodes": [there]}});
    assert_eq!(stage.client().data(look, json!({"id": conversation})).await, expected);

    stage.model.release();
    ended(stage.client(), &id).await.output();
    assert_eq!(granted(delete().await)["deletedId"], conversation.as_str());
    let gone = json!({"conversation": null, "node": null, "conversations": {"nodes": []}});
    assert_eq!(stage.client().data(look, json!({"id": conversation})).await, gone);
    assert_eq!(refusal(&delete().await), at("NOT_FOUND"));
    let again = json!({"agentId": agent, "conversationId": conversation, "input": "Go"});
    assert_eq!(refusal(&try_start(stage.client(), again).await), at("NOT_FOUND"));
    // Its runs stay for the books, and go on resolving it.
    assert_eq!(run(stage.client(), &id).await["conversation"]["id"], conversation.as_str());
}

async fn messages_lie_in_order_over_the_runs(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    stage.model.script([Reply::tool_call("look", json!({})), Reply::text("One."), Reply::text("Two.")]);
    let agent = stage.agent(json!({"tools": [stage.tool("look")]})).await;
    let (conversation, first) = stage.open_conversation(&agent, "1").await;
    let second = stage.say(&agent, &conversation, "2").await;
    let look = "query ($id: ID!) { conversation(id: $id) {
        runs { nodes { id } }
        messages { nodes { agentName ... on MessageItem { role text } } }
    } }";
    let message = |role: &str, text: &str| json!({"agentName": "Ada", "role": role, "text": text});
    let messages = [message("USER", "1"), message("ASSISTANT", "One."), message("USER", "2")];
    let messages = [messages.to_vec(), vec![message("ASSISTANT", "Two.")]].concat();
    assert_eq!(
        stage.client().data(look, json!({"id": conversation})).await["conversation"],
        json!({
            "runs": {"nodes": [{"id": second.id()}, {"id": first.id()}]},
            "messages": {"nodes": messages},
        })
    );
    let other = stage.app.tenant("other").await;
    assert_eq!(other.client.data(look, json!({"id": conversation})).await["conversation"], Value::Null);
    let its_agent = create_agent(&other.client, json!({})).await;
    let foreign = json!({"agentId": its_agent, "conversationId": conversation, "input": "Go"});
    let not_found = ("NOT_FOUND".to_owned(), "conversationId".to_owned());
    assert_eq!(refusal(&try_start(&other.client, foreign).await), not_found);
}

/// They take locks on the conversation, its runs and the tenant's queue; in a bad order they would wait for each
/// other, and the database would break one off.
async fn starts_cancels_and_ends_in_one_conversation_do_not_block_each_other(app: TestAppBuilder) {
    const ROUNDS: usize = 6;
    let stage = Stage::set(app).await;
    stage.model.always(|_| Reply::text("Done"));
    let agent = stage.agent(json!({})).await;
    let (conversation, _) = stage.open_conversation(&agent, "0").await;
    let rounds = (0..4).map(async |_| {
        for _ in 0..ROUNDS {
            let input = json!({"agentId": agent, "conversationId": conversation, "input": "Go"});
            let first = start(stage.client(), input.clone()).await;
            let second = start(stage.client(), input).await;
            // It may have ended by itself.
            try_cancel(stage.client(), &second).await;
            wait_for_item(stage.client(), &first, |item| item["status"] == "SUCCEEDED").await;
        }
    });
    join_all(rounds).await;
    assert!(!stage.app.log().contains("deadlock"), "the database broke off a deadlock");
}
