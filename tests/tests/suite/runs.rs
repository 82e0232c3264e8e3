//! Runs from their start to each of their ends.

use cloister_tests::app::TestAppBuilder;
use cloister_tests::model_server::RecordedRequest;
use cloister_tests::{Client, Reply, Tenant, ToolAnswer};
use entity::runs::Status;
use entity::{TenantOwned, runs, tenant_queues};
use futures_util::future::join_all;
use sea_orm::{ColumnTrait, DatabaseConnection, PaginatorTrait, QueryFilter};
use serde_json::{Value, json};

use crate::both::on_both;
use crate::steps::{
    Stage, create_agent, ended, granted, refusal, run, start, text, tool, try_cancel, try_start, until, wait_for_item,
    with,
};

on_both!(
    a_first_session_leads_from_an_agent_to_its_output,
    max_turns_is_the_exact_number_of_model_calls,
    the_first_tool_in_call_order_may_end_the_run,
    only_named_tools_may_end_the_run,
    a_forced_tool_choice_is_forgotten_once_a_tool_was_used,
    settings_go_over_the_wire_as_they_are,
    nothing_goes_over_the_wire_that_was_left_out,
    the_model_is_told_of_tools_that_are_not_there_and_arguments_that_do_not_fit,
    a_response_that_cannot_be_used_fails_the_run,
    a_run_fails_when_its_time_is_over,
    a_cancelled_run_answers_its_open_calls_and_stays_cancelled,
    a_queued_run_is_cancelled_before_it_begins,
    an_idempotency_key_starts_one_run,
    twenty_starts_with_one_key_are_one_run,
    runs_at_once_never_pass_the_plans_cap,
    two_tenants_take_turns_in_a_busy_pool,
    every_start_under_load_is_run_at_once,
    a_text_that_no_column_can_hold_does_not_stall_the_run,
);

async fn a_first_session_leads_from_an_agent_to_its_output(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    stage.model.script([Reply::text("Hello, world!").usage(12, 4).chunks_of(5)]);
    let agent = stage.agent(json!({"name": "Greeter"})).await;

    let started = granted(try_start(stage.client(), json!({"agentId": agent, "input": "Hi"})).await)["run"].clone();
    assert_eq!(started["input"], "Hi");
    let ended = ended(stage.client(), &text(&started["id"])).await;
    let expected = json!({
        "id": started["id"], "status": "SUCCEEDED", "input": "Hi", "output": "Hello, world!", "outputJson": null,
        "turns": 1, "error": null, "pendingApprovals": [], "agent": {"id": agent, "name": "Greeter"}, "agentVersion": {"version": 1},
        "currentAgent": {"name": "Greeter"}, "conversation": null, "usage": {"requests": 1, "totalTokens": 16},
        "startedAt": ended.run["startedAt"], "finishedAt": ended.run["finishedAt"],
    });
    assert_eq!(ended.run, expected);
    assert!(text(&ended.run["startedAt"]) <= text(&ended.run["finishedAt"]));
    let item = |kind: &str, sequence: i64, turn: Value, fields: Value| {
        with(
            json!({"__typename": kind, "sequence": sequence, "agentName": "Greeter", "turn": turn, "scope": null}),
            fields,
        )
    };
    let user = json!({"part": null, "role": "USER", "text": "Hi"});
    let assistant = json!({"part": 1, "role": "ASSISTANT", "text": "Hello, world!"});
    let usage = json!({"model": "scripted", "usage": {"totalTokens": 16}});
    assert_eq!(
        ended.items,
        [
            item("MessageItem", 1, Value::Null, user),
            item("MessageItem", 2, json!(1), assistant),
            item("UsageItem", 3, json!(1), usage),
            item("StatusItem", 4, Value::Null, json!({"status": "SUCCEEDED", "error": null})),
        ]
    );
    let requests = stage.model.requests();
    assert_eq!(requests.len(), 1);
    assert_eq!(requests[0].header("authorization"), Some("Bearer test-key"));
    assert_eq!(
        requests[0].body,
        json!({
            "model": "scripted-1",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
            "stream": true,
            "stream_options": {"include_usage": true},
        })
    );
}

async fn max_turns_is_the_exact_number_of_model_calls(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    stage.model.always(|_| Reply::tool_call("look", json!({})));
    let agent = stage.agent(json!({"maxTurns": 3, "tools": [stage.tool("look")]})).await;
    let ended = stage.run(&agent, "Go on").await;

    assert_eq!(ended.error(), "MAX_TURNS");
    assert_eq!(ended.run["error"]["message"], "Max turns (3) exceeded");
    assert_eq!(ended.run["turns"], 3);
    assert_eq!(stage.model.requests().len(), 3);
    assert_eq!(stage.tools.requests().len(), 3, "turn 3's tools ran");
    let turns: Vec<&Value> = ended.of_type("ToolOutputItem").iter().map(|item| &item["turn"]).collect();
    assert_eq!(turns, [1, 2, 3]);

    // One turn less of it, and the run would have succeeded.
    stage.model.script([Reply::tool_call("look", json!({})), Reply::tool_call("look", json!({})), Reply::text("Done")]);
    assert_eq!(stage.run(&agent, "Once more").await.output(), "Done");
}

async fn the_first_tool_in_call_order_may_end_the_run(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    stage.tools.always(|request| match request.path.as_str() {
        "/slow" => ToolAnswer::text("from slow").delay(200),
        _ => ToolAnswer::text("from fast"),
    });
    stage.model.script([Reply::tool_call("slow", json!({})).and_tool_call("fast", json!({}))]);
    let tools = [stage.tool("fast"), stage.tool("slow")];
    let agent = stage.agent(json!({"tools": tools, "toolUseBehavior": "STOP_ON_FIRST_TOOL"})).await;
    let ended = stage.run(&agent, "Go").await;
    assert_eq!(ended.output(), "from slow");
    assert_eq!(ended.of_type("ToolOutputItem").len(), 2, "both calls have run");
    assert_eq!(stage.model.requests().len(), 1);
}

async fn only_named_tools_may_end_the_run(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    stage.tools.always(|request| ToolAnswer::text(format!("from {}", request.path)));
    stage.model.script([
        Reply::tool_call("note", json!({})),
        Reply::tool_call("note", json!({})).and_tool_call("finish", json!({})),
    ]);
    let tools = [stage.tool("note"), stage.tool("finish")];
    let behavior = json!({"tools": tools, "toolUseBehavior": "STOP_AT_TOOLS", "stopAtTools": ["finish"]});
    let agent = stage.agent(behavior).await;
    let ended = stage.run(&agent, "Go").await;
    assert_eq!(ended.output(), "from /finish");
    assert_eq!(stage.model.requests().len(), 2);
}

async fn a_forced_tool_choice_is_forgotten_once_a_tool_was_used(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let script = || [Reply::tool_call("look", json!({})), Reply::text("Done")];
    let choices = |from: usize| -> Vec<Value> {
        let requests: Vec<RecordedRequest> = stage.model.requests();
        requests[from..].iter().map(|request| request.body.get("tool_choice").cloned().unwrap_or_default()).collect()
    };
    let fields = json!({"tools": [stage.tool("look")], "modelSettings": {"toolChoice": "required"}});
    let agent = stage.agent(fields.clone()).await;
    stage.model.script(script());
    stage.run(&agent, "Go").await.output();
    assert_eq!(choices(0), [json!("required"), Value::Null]);

    let keeps = stage.agent(with(fields, json!({"resetToolChoice": false}))).await;
    stage.model.script(script());
    stage.run(&keeps, "Go").await.output();
    assert_eq!(choices(2), ["required", "required"]);

    let named = json!({"tools": [stage.tool("look")], "modelSettings": {"toolChoice": "look"}});
    let named = stage.agent(named).await;
    stage.model.script(script());
    stage.run(&named, "Go").await.output();
    assert_eq!(choices(4), [json!({"type": "function", "function": {"name": "look"}}), Value::Null]);
}

async fn settings_go_over_the_wire_as_they_are(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    stage.model.script([Reply::text("Done")]);
    let parameters = json!({"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]});
    let mut strict = parameters.clone();
    strict["additionalProperties"] = json!(false);
    let settings = json!({
        "temperature": 0.25, "topP": 0.5, "maxOutputTokens": 77, "toolChoice": "auto", "parallelToolCalls": false,
        "reasoningEffort": "LOW",
    });
    let tools = [tool("weather", &stage.tools.url("/"), json!({"parameters": parameters}))];
    let agent = stage.agent(json!({"modelSettings": settings, "tools": tools})).await;
    stage.run(&agent, "Go").await.output();
    assert_eq!(
        stage.model.requests()[0].body,
        json!({
            "model": "scripted-1",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Go"}],
            "tools": [{"type": "function", "function": {
                "name": "weather", "description": "Does weather.", "parameters": strict, "strict": true,
            }}],
            "temperature": 0.25,
            "top_p": 0.5,
            "max_tokens": 77,
            "tool_choice": "auto",
            "parallel_tool_calls": false,
            "reasoning_effort": "low",
            "stream": true,
            "stream_options": {"include_usage": true},
        })
    );
}

async fn nothing_goes_over_the_wire_that_was_left_out(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    stage.model.script([Reply::text("Done")]);
    let agent = stage.agent(json!({"instructions": "", "modelSettings": {"parallelToolCalls": true}})).await;
    stage.run(&agent, "Go").await.output();
    assert_eq!(
        stage.model.requests()[0].body,
        json!({
            "model": "scripted-1",
            "messages": [{"role": "user", "content": "Go"}],
            "stream": true,
            "stream_options": {"include_usage": true},
        })
    );
}

async fn the_model_is_told_of_tools_that_are_not_there_and_arguments_that_do_not_fit(app: TestAppBuilder) {
    const FAILED: &str = "An error occurred while running the tool. Please try again.";
    let stage = Stage::set(app).await;
    stage.tools.always(|_| ToolAnswer::text("sunny"));
    let schema = json!({"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]});
    let tools = [tool("weather", &stage.tools.url("/"), json!({"parameters": schema})), stage.tool("free")];
    let agent = stage.agent(json!({"tools": tools})).await;
    stage.model.script([
        Reply::tool_call("nope", json!({})).and_tool_call("weather", json!({"city": "Rome"})),
        Reply::tool_call_raw("weather", "{\"city\":")
            .and_tool_call("weather", json!({"city": 1}))
            .and_tool_call_raw("weather", "[]")
            .and_tool_call_raw("weather", "")
            .and_tool_call_raw("free", ""),
        Reply::text("Done"),
    ]);
    let ended = stage.run(&agent, "Go").await;
    assert_eq!(ended.output(), "Done");

    let requests = stage.model.requests();
    let told = |request: usize, from: usize| -> Vec<(String, String)> {
        let tools = requests[request].messages()[from..].iter().filter(|message| message["role"] == "tool");
        tools.map(|message| (text(&message["tool_call_id"]), text(&message["content"]))).collect()
    };
    let pair = |id: &str, text: &str| (id.to_owned(), text.to_owned());
    // The real tool's output stands first, though its call came second.
    assert_eq!(told(1, 0), [pair("call_00000001_1", "sunny"), pair("call_00000001_0", "Tool 'nope' not found.")]);
    let second: Vec<_> = (0..4).map(|at| pair(&format!("call_00000002_{at}"), FAILED)).collect();
    assert_eq!(told(2, 5), [second, vec![pair("call_00000002_4", "sunny")]].concat());
    let replayed = &requests[2].messages()[5]["tool_calls"];
    assert_eq!(replayed[3]["function"]["arguments"], "{}");
    assert_eq!(replayed[0]["function"]["arguments"], "{\"city\":");
    let called: Vec<Value> = stage.tools.requests().iter().map(|request| request.json()).collect();
    assert_eq!(called, [json!({"city": "Rome"}), json!({})], "what doesn't fit is not sent");
    let ours: Vec<bool> = ended.outputs().into_iter().map(|(_, is_error)| is_error).collect();
    assert_eq!(ours.iter().filter(|ours| **ours).count(), 5);
}

async fn a_response_that_cannot_be_used_fails_the_run(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let agent = stage.agent(json!({"tools": [stage.tool("look")]})).await;
    let cases = [
        (Reply::refusal("I won't."), "MODEL_REFUSAL"),
        (Reply::text("").finish_reason("length"), "MODEL_BEHAVIOR"),
        (Reply::text("").finish_reason("content_filter"), "MODEL_REFUSAL"),
        (Reply::status(400), "MODEL_REJECTED"),
    ];
    for (reply, code) in cases {
        stage.model.script([reply]);
        assert_eq!(stage.run(&agent, "Go").await.error(), code);
    }
    // What is said before the limit counts; an empty message that ends in order is an answer; beside tool calls a
    // refusal is ignored.
    stage.model.script([Reply::text("Half").finish_reason("length"), Reply::text("")]);
    assert_eq!(stage.run(&agent, "Go").await.output(), "Half");
    assert_eq!(stage.run(&agent, "Go").await.output(), "");
    stage.model.script([Reply::refusal("No.").and_tool_call("look", json!({})), Reply::text("Looked")]);
    assert_eq!(stage.run(&agent, "Go").await.output(), "Looked");
}

async fn a_run_fails_when_its_time_is_over(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    let agent = stage.agent(json!({"tools": [stage.tool("look")]})).await;
    let input = json!({"agentId": agent, "input": "Go", "timeoutSeconds": 1});
    stage.model.script([Reply::text("Too late").hold(), Reply::tool_call("look", json!({}))]);
    let in_model = start(stage.client(), input.clone()).await;
    stage.model.wait_for_held(1).await;
    stage.tools.script([ToolAnswer::hang()]);
    let in_tool = start(stage.client(), input).await;

    let in_model = ended(stage.client(), &in_model).await;
    assert_eq!(in_model.error(), "TIMEOUT");
    assert_eq!(in_model.items.len(), 2, "{:?}", in_model.items);
    let in_tool = ended(stage.client(), &in_tool).await;
    assert_eq!(in_tool.error(), "TIMEOUT");
    assert_eq!(in_tool.outputs(), [("Tool 'look' was cut off: the run's time is over.".to_owned(), true)]);
}

async fn a_cancelled_run_answers_its_open_calls_and_stays_cancelled(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    stage.tools.always(|request| match request.path.as_str() {
        "/quick" => ToolAnswer::text("done"),
        _ => ToolAnswer::hang(),
    });
    stage.model.script([Reply::tool_call("stuck", json!({})).and_tool_call("quick", json!({}))]);
    let agent = stage.agent(json!({"tools": [stage.tool("stuck"), stage.tool("quick")]})).await;
    let id = start(stage.client(), json!({"agentId": agent, "input": "Go"})).await;
    wait_for_item(stage.client(), &id, |item| item["output"] == "done").await;
    stage.tools.wait_for_requests(2).await;

    let cancelled = granted(try_cancel(stage.client(), &id).await);
    assert_eq!(cancelled["run"]["status"], "CANCELLED");
    let ended = ended(stage.client(), &id).await;
    assert_eq!((&ended.run["status"], &ended.run["error"]), (&json!("CANCELLED"), &Value::Null));
    assert_eq!(ended.outputs(), [("done".to_owned(), false), ("The run was cancelled.".to_owned(), true)]);
    let calls: Vec<&Value> = ended.of_type("ToolCallItem").iter().map(|item| &item["callId"]).collect();
    let answered: Vec<&Value> = ended.of_type("ToolOutputItem").iter().map(|item| &item["callId"]).collect();
    assert_eq!(answered, [calls[1], calls[0]]);
    assert_eq!(ended.items.last().unwrap()["status"], "CANCELLED");

    assert_eq!(refusal(&try_cancel(stage.client(), &id).await), ("STATE".to_owned(), "runId".to_owned()));
    assert_eq!(refusal(&try_cancel(stage.client(), &agent).await), ("NOT_FOUND".to_owned(), "runId".to_owned()));
    assert_eq!(stage.model.requests().len(), 1);
}

async fn a_queued_run_is_cancelled_before_it_begins(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    stage.model.script([Reply::text("First").hold(), Reply::text("Third")]);
    let agent = stage.agent(json!({})).await;
    let first = json!({"agentId": agent, "input": "one", "newConversation": true});
    let first = granted(try_start(stage.client(), first).await)["run"].clone();
    let conversation = first["conversation"]["id"].clone();
    let next = |input: &str| json!({"agentId": agent, "input": input, "conversationId": conversation});
    let second = start(stage.client(), next("two")).await;
    let third = start(stage.client(), next("three")).await;
    stage.model.wait_for_held(1).await;
    assert_eq!(run(stage.client(), &second).await["status"], "QUEUED");

    assert_eq!(granted(try_cancel(stage.client(), &second).await)["run"]["status"], "CANCELLED");
    let cancelled = ended(stage.client(), &second).await;
    assert_eq!(cancelled.items.len(), 2);
    assert_eq!((&cancelled.run["startedAt"], &cancelled.run["turns"]), (&Value::Null, &json!(0)));
    stage.model.release();
    assert_eq!(ended(stage.client(), &text(&first["id"])).await.output(), "First");
    assert_eq!(ended(stage.client(), &third).await.output(), "Third");
    assert_eq!(stage.model.requests().len(), 2);
}

async fn an_idempotency_key_starts_one_run(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    stage.model.always(|_| Reply::text("Done"));
    let agent = stage.agent(json!({})).await;
    let input = json!({"agentId": agent, "input": "Go", "idempotencyKey": "order-1"});
    let first = start(stage.client(), input.clone()).await;
    assert_eq!(start(stage.client(), input.clone()).await, first);
    ended(stage.client(), &first).await.output();
    let again = granted(try_start(stage.client(), input.clone()).await);
    assert_eq!((&again["run"]["id"], &again["run"]["status"]), (&json!(first), &json!("SUCCEEDED")));

    let changes = [json!({"input": "Stop"}), json!({"draft": true}), json!({"maxTokens": 100_000})];
    for change in changes {
        let refused = refusal(&try_start(stage.client(), with(input.clone(), change)).await);
        assert_eq!(refused, ("IDEMPOTENCY_MISMATCH".to_owned(), "idempotencyKey".to_owned()));
    }
    // A key is the tenant's own.
    let other = stage.app.tenant("other").await;
    let its_agent = create_agent(&other.client, json!({})).await;
    let its_run = start(&other.client, with(input, json!({"agentId": its_agent}))).await;
    assert_ne!(its_run, first);
    ended(&other.client, &its_run).await.output();
    assert_eq!(stage.model.requests().len(), 2);
}

async fn twenty_starts_with_one_key_are_one_run(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    stage.model.always(|_| Reply::text("Done"));
    let agent = stage.agent(json!({})).await;
    let input = json!({"agentId": agent, "input": "Go", "newConversation": true, "idempotencyKey": "k"});
    let starts = join_all((0..20).map(|_| start(stage.client(), input.clone()))).await;
    assert!(starts.iter().all(|id| *id == starts[0]), "{starts:?}");
    ended(stage.client(), &starts[0]).await.output();
    let counted = "{ runs { nodes { id } } conversations { nodes { id } } }";
    let data = stage.client().data(counted, json!({})).await;
    assert_eq!(data["runs"]["nodes"], json!([{"id": starts[0]}]));
    assert_eq!(data["conversations"]["nodes"].as_array().unwrap().len(), 1);
    assert_eq!(stage.model.requests().len(), 1);
}

async fn running(database: &DatabaseConnection) -> u64 {
    let running = runs::Entity::across_tenants().filter(runs::Column::Status.eq(Status::Running));
    running.count(database).await.unwrap()
}

async fn runs_at_once_never_pass_the_plans_cap(app: TestAppBuilder) {
    const CAP: usize = 5;
    const RUNS: usize = 14;
    let stage = Stage::set(app).await;
    stage.model.always(|_| Reply::text("Done").hold());
    let tenant = stage.app.tenant_with("small", json!({"plan": "FREE"})).await;
    let agent = create_agent(&tenant.client, json!({})).await;
    let input = json!({"agentId": agent, "input": "Go"});
    let ids = join_all((0..RUNS).map(|_| start(&tenant.client, input.clone()))).await;
    let database = stage.app.database().await;
    for finished in 0..RUNS {
        let held = CAP.min(RUNS - finished);
        stage.model.wait_for_held(held).await;
        assert_eq!(running(&database).await, held as u64);
        let requests = stage.model.requests().len();
        assert_eq!(requests, finished + held, "after {finished} runs have ended");
        stage.model.release();
        let ended = |finished: usize| {
            let runs = runs::Entity::across_tenants().filter(runs::Column::Status.eq(Status::Succeeded));
            let database = &database;
            async move { runs.count(database).await.unwrap() as usize > finished }
        };
        until("a run that ends", || ended(finished), |ended| *ended).await;
    }
    for id in ids {
        ended(&tenant.client, &id).await.output();
    }
    let queues = tenant_queues::Entity::across_tenants().all(&database).await.unwrap();
    assert_eq!(queues.iter().map(|queue| (queue.running, queue.max_running)).collect::<Vec<_>>(), [(0, 5)]);
}

async fn two_tenants_take_turns_in_a_busy_pool(app: TestAppBuilder) {
    let stage = Stage::set(app.env("CLOISTER_RUNS__CONCURRENCY", "1")).await;
    let first = Tenant::clone(&stage.tenant);
    let second = stage.app.tenant("second").await;
    stage.model.script([Reply::text("Done").hold()]);
    stage.model.always(|_| Reply::text("Done"));
    let queue = async |client: &Client, name: &str, count: usize| {
        let agent = create_agent(client, json!({})).await;
        let mut ids = Vec::new();
        for _ in 0..count {
            ids.push(start(client, json!({"agentId": agent, "input": name})).await);
        }
        ids
    };
    let of_first = queue(&first.client, "A", 6).await;
    stage.model.wait_for_held(1).await;
    let of_second = queue(&second.client, "B", 3).await;
    stage.model.release();
    for id in of_first {
        ended(&first.client, &id).await.output();
    }
    for id in of_second {
        ended(&second.client, &id).await.output();
    }
    let order: String = stage.model.requests().iter().map(RecordedRequest::last_user_text).collect();
    // The second tenant came late, and is owed nothing for that: from then on each is served in its turn.
    let turns: Vec<&str> = [&order[1..3], &order[3..5], &order[5..7]].into();
    assert!(order.starts_with('A') && turns.iter().all(|turn| ["AB", "BA"].contains(turn)), "{order}");
    assert_eq!(&order[7..], "AA");
}

/// A worker may claim a run before the request that started it is answered; it must not lose it by that.
async fn every_start_under_load_is_run_at_once(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    stage.model.always(|_| Reply::text("Done"));
    let agent = stage.agent(json!({})).await;
    let input = json!({"agentId": agent, "input": "Go"});
    let ids = join_all((0..100).map(|_| start(stage.client(), input.clone()))).await;
    join_all(ids.iter().map(async |id| ended(stage.client(), id).await.output())).await;
    let database = stage.app.database().await;
    let fences = runs::Entity::across_tenants().all(&database).await.unwrap();
    assert!(fences.iter().all(|run| run.fence == 1), "a run was claimed twice");
}

/// PostgreSQL's text has no NUL.
async fn a_text_that_no_column_can_hold_does_not_stall_the_run(app: TestAppBuilder) {
    let stage = Stage::set(app).await;
    stage.tools.script([ToolAnswer::text("t\0t")]);
    stage.model.script([Reply::tool_call("look", json!({"x": "\0"})), Reply::text("a\0b"), Reply::refusal("n\0")]);
    let agent = stage.agent(json!({"tools": [stage.tool("look")]})).await;
    assert_eq!(stage.run(&agent, "Go").await.output(), "a\u{fffd}b");
    assert_eq!(stage.run(&agent, "Go").await.error(), "MODEL_REFUSAL");
}
