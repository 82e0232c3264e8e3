//! Whatever becomes of a model call, the ledger has what the provider charged for it, once.

use std::net::{Ipv4Addr, TcpListener};
use std::time::{Duration, Instant};

use cloister_tests::app::TestAppBuilder;
use cloister_tests::client::http;
use cloister_tests::model_server::Ending;
use cloister_tests::{ModelServer, Reply, Tenant, TestApp, ToolAnswer, ToolServer};
use entity::runs::Status;
use serde_json::{Value, json};

use super::both::on_both;
use super::ledger::{
    Sum, agent, agreed, exact, journal, look, of_json, of_row, on_run, reservations, rows, rows_of, run_row, settled,
    start, stored_status, succeed, try_start, until, uuid,
};

on_both!(
    what_runs_use_is_what_the_provider_served,
    error_statuses_leave_no_row_and_are_tried_again,
    a_provider_that_is_not_there_yet_is_tried_again,
    whoever_leaves_the_call_goes_on_and_is_metered,
    an_answer_cut_at_any_byte_is_one_row,
    silence_is_one_estimated_row_an_attempt,
    a_cancelled_call_is_drained_to_its_usage,
    what_the_provider_does_not_say_is_estimated,
    usage_is_broken_down_without_a_rest,
    subscribers_are_told_of_each_change_of_usage,
);

/// A server, a provider and a tenant that has an agent.
async fn set_up(builder: TestAppBuilder) -> (TestApp, ModelServer, Tenant, String) {
    let model = ModelServer::start().await;
    let app = builder.model_server(&model).start().await;
    let tenant = app.tenant("acme").await;
    let agent = agent(&tenant.client, "Agent", json!({})).await;
    (app, model, tenant, agent)
}

fn code(run: &Value) -> &str {
    run["error"]["code"].as_str().unwrap_or_default()
}

async fn what_runs_use_is_what_the_provider_served(builder: TestAppBuilder) {
    let (app, model, tenant, plain) = set_up(builder).await;
    let client = &tenant.client;

    model.script([Reply::text("Hello there.").usage(1_000, 50).cached(400).reasoning_tokens(20)]);
    let run = succeed(client, &plain, "Hi").await;
    let charged = Sum {
        requests: 1,
        input: 600,
        cache_read: 400,
        output: 50,
        reasoning: 20,
        cost: 600 * 1_000 + 400 * 500 + 50 * 2_000,
        ..Sum::default()
    };
    assert_eq!(of_json(&run["usage"]), charged);
    assert_eq!((run["usage"]["cost"].as_str(), exact(&app, &tenant, &model).await), (Some("0.0009"), charged));

    // An explicit zero stays zero, and one token costs what one token costs.
    model.script([Reply::text("Free.").usage(0, 0), Reply::text("Cheap.").usage(1, 0)]);
    let free = succeed(client, &plain, "Hi").await;
    assert_eq!(of_json(&free["usage"]), Sum { requests: 1, ..Sum::default() });
    let cheap = succeed(client, &plain, "Hi").await;
    assert_eq!(cheap["usage"]["cost"], "0.000001");
    exact(&app, &tenant, &model).await;

    // What was written to the provider's cache has a price of its own.
    let content = json!({"choices": [{"index": 0, "delta": {"content": "Kept."}, "finish_reason": "stop"}]});
    let details = json!({"cached_tokens": 30, "cache_creation_tokens": 20});
    let usage = json!({"prompt_tokens": 100, "completion_tokens": 10, "prompt_tokens_details": details});
    let usage = json!({"choices": [], "usage": usage});
    model.script([Reply::raw(format!("data: {content}\n\ndata: {usage}\n\ndata: [DONE]\n\n")).usage(100, 10)]);
    let run = succeed(client, &plain, "Hi").await;
    let charged = Sum { requests: 1, input: 50, cache_read: 30, cache_write: 20, output: 10, ..Sum::default() };
    assert_eq!(of_json(&run["usage"]), Sum { cost: 50_000 + 15_000 + 25_000 + 20_000, ..charged });
    exact(&app, &tenant, &model).await;

    // Tools over several turns: a call of the model for each turn, none for a tool.
    let tools = ToolServer::start().await;
    let tool = json!({"webhook": {"name": "weather", "description": "Tells it.", "url": tools.url("/weather")}});
    let with_tool = agent(client, "Tooled", json!({"tools": [tool]})).await;
    model.script([
        Reply::text("Wait.").and_tool_call("weather", json!({})).and_tool_call("weather", json!({})).usage(100, 7),
        Reply::tool_call("weather", json!({})).usage(140, 5).cached(100),
        Reply::text("Sunny.").usage(180, 3).cached(140),
    ]);
    let run = succeed(client, &with_tool, "Weather?").await;
    assert_eq!((of_json(&run["usage"]).total(), run["turns"].as_i64()), (107 + 145 + 183, Some(3)));
    assert_eq!(tools.requests().len(), 3);
    exact(&app, &tenant, &model).await;

    // A handoff is charged to the agent that answers, and leads back to the first.
    let second = agent(client, "Second", json!({})).await;
    let first = agent(client, "First", json!({"handoffs": [{"agentId": second}]})).await;
    model.script([Reply::tool_call("transfer_to_second", json!({})).usage(60, 6), Reply::text("Here.").usage(70, 2)]);
    let run = succeed(client, &first, "Anyone?").await;
    exact(&app, &tenant, &model).await;
    let rows = rows_of(&app.database().await, run["id"].as_str().unwrap()).await;
    let (first, second) = (uuid(&first), uuid(&second));
    let told: Vec<_> = rows.iter().map(|row| (row.turn, row.attempt, row.agent_id, row.agent_version)).collect();
    assert_eq!(told, [(Some(1), 1, Some(first), Some(1)), (Some(2), 1, Some(second), Some(1))]);
    let paths: Vec<_> = rows.iter().filter_map(|row| row.agent_path.clone()).collect();
    assert_eq!(paths, [first.to_string(), format!("{first}/{second}")]);
    let ids: Vec<_> = rows.iter().map(|row| (row.tenant_id, row.key_id.is_some(), row.model.as_str())).collect();
    assert_eq!(ids, [(uuid(&tenant.id), true, "scripted"); 2]);

    // What the lengths of the texts decide, the seed's door and a refusal.
    model.always(|_| Reply::text("As long as it is."));
    let answer = client.rest_post("/v1/run", &json!({"agent_id": plain, "message": "Hi"})).await;
    let charged = model.requests().last().unwrap().charged.unwrap();
    assert_eq!((answer.status.as_u16(), &answer.body["tokens_used"]), (200, &json!(charged.total())));
    exact(&app, &tenant, &model).await;
    model.script([Reply::refusal("No.").usage(9, 4)]);
    let run = start(client, &plain, "Do it").await;
    assert_eq!(code(&until(client, &run, "FAILED").await), "MODEL_REFUSAL");
    exact(&app, &tenant, &model).await;
    assert_eq!(model.unused(), 0);
}

async fn error_statuses_leave_no_row_and_are_tried_again(builder: TestAppBuilder) {
    let (app, model, tenant, agent) = set_up(builder).await;
    let client = &tenant.client;
    let db = app.database().await;

    model.script([Reply::status(429).retry_after(1), Reply::status(500), Reply::text("Third.").usage(30, 3)]);
    let begun = Instant::now();
    let run = succeed(client, &agent, "Hi").await;
    // Our own pause would be half of it at most.
    assert!(begun.elapsed() >= Duration::from_secs(1), "Retry-After: {:?}", begun.elapsed());
    assert_eq!((run["turns"].as_i64(), run["output"].as_str()), (Some(1), Some("Third.")));
    assert_eq!(rows(&db).await.iter().map(|row| row.attempt).collect::<Vec<_>>(), [3]);
    assert_eq!((exact(&app, &tenant, &model).await.total(), model.requests().len()), (33, 3));

    // Three attempts are all there are.
    model.script([Reply::status(503), Reply::status(500), Reply::status(502)]);
    let run = start(client, &agent, "Hi").await;
    assert_eq!(code(&until(client, &run, "FAILED").await), "MODEL_UNAVAILABLE");
    assert_eq!((exact(&app, &tenant, &model).await.total(), model.requests().len()), (33, 6));

    // What is refused is not tried again.
    for (number, status) in [400, 401, 403, 404, 422].into_iter().enumerate() {
        model.script([Reply::status(status)]);
        let run = start(client, &agent, "Hi").await;
        assert_eq!(code(&until(client, &run, "FAILED").await), "MODEL_REJECTED", "{status}");
        assert_eq!((exact(&app, &tenant, &model).await.total(), model.requests().len()), (33, 7 + number));
    }

    // A connection that breaks after the request was sent may have been charged.
    model.script([Reply::drop_connection(), Reply::text("Second.").usage(20, 2)]);
    let run = succeed(client, &agent, "Hi").await;
    let rows = rows_of(&db, run["id"].as_str().unwrap()).await;
    let told: Vec<_> = rows.iter().map(|row| (row.attempt, row.estimated, row.output_tokens)).collect();
    assert_eq!(told, [(1, true, 0), (2, false, 2)]);
    assert!(rows[0].input_tokens > 0);
    assert_eq!(agreed(&app, &tenant).await.requests, 3);
}

async fn a_provider_that_is_not_there_yet_is_tried_again(builder: TestAppBuilder) {
    let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
    let config = r#"
[[models]]
name = "late"
provider = "late"
context_window = 128000
max_output_tokens = 16384
[models.price]
input = "1.00"
output = "2.00"
"#;
    let builder = builder
        .config(config)
        .env("CLOISTER_PROVIDERS__LATE__BASE_URL", &format!("http://{address}/v1"))
        .env("CLOISTER_PROVIDERS__LATE__API_KEY", "late-key")
        .env("CLOISTER_PROVIDERS__LATE__ATTEMPTS", "8");
    let app = builder.start().await;
    let tenant = app.tenant("acme").await;
    let agent = agent(&tenant.client, "Late", json!({"model": "late"})).await;
    let run = start(&tenant.client, &agent, "Hi").await;
    let db = app.database().await;
    stored_status(&db, &run, Status::Running).await;
    // An attempt after the first says that the first was refused. One lasts a moment, so that all may be missed:
    // the first is long over by then.
    let refused = async {
        while !reservations(&db).await.iter().any(|reservation| reservation.attempt > 1) {
            tokio::task::yield_now().await;
        }
    };
    let _ = tokio::time::timeout(Duration::from_secs(3), refused).await;
    let model = ModelServer::listen(address).await.unwrap();
    model.script([Reply::text("At last.").usage(12, 4)]);
    until(&tenant.client, &run, "SUCCEEDED").await;
    assert_eq!((exact(&app, &tenant, &model).await.total(), model.requests().len()), (16, 1));
    assert!(rows(&db).await[0].attempt > 1);
}

async fn whoever_leaves_the_call_goes_on_and_is_metered(builder: TestAppBuilder) {
    let (app, model, tenant, agent) = set_up(builder).await;
    let client = &tenant.client;
    let db = app.database().await;

    // A subscriber that leaves after so many events of a run that stands still in mid-answer.
    for events in 0..4 {
        model.script([Reply::text("An answer of a few tokens.").usage(40 + events, 8).hold()]);
        let run = start(client, &agent, "Hi").await;
        model.wait_for_held(1).await;
        let variables = json!({"run": run, "after": 0});
        let mut subscription = client.subscribe_sse(super::ledger::EVENTS, variables).await;
        for _ in 0..events.min(2) {
            subscription.next_result().await.unwrap();
        }
        if events == 3 {
            assert!(model.release());
            while subscription.next_result().await.unwrap()["data"]["runEvents"]["item"]["__typename"] != "UsageItem" {}
        }
        drop(subscription);
        model.release();
        stored_status(&db, &run, Status::Succeeded).await;
        assert_eq!(of_json(&look(client, &run).await["usage"]).total(), i64::try_from(48 + events).unwrap());
        exact(&app, &tenant, &model).await;
    }

    // A client of the seed's door, gone while the provider answers.
    model.script([Reply::text("For nobody.").usage(90, 9).hold()]);
    let waiting = tokio::spawn({
        let client = client.clone();
        let body = json!({"agent_id": agent, "message": "Hi"});
        async move { client.rest_post("/v1/run", &body).await }
    });
    model.wait_for_held(1).await;
    let run = client.data("{ runs(first: 1) { nodes { id status } } }", json!({})).await["runs"]["nodes"][0].clone();
    assert_eq!(run["status"], "RUNNING");
    waiting.abort();
    assert!(waiting.await.unwrap_err().is_cancelled());
    assert!(model.release());
    stored_status(&db, run["id"].as_str().unwrap(), Status::Succeeded).await;
    exact(&app, &tenant, &model).await;
    assert!(model.requests().iter().all(|request| request.ending == Ending::Completed));
}

async fn an_answer_cut_at_any_byte_is_one_row(builder: TestAppBuilder) {
    let (app, model, tenant, agent) = set_up(builder).await;
    let client = &tenant.client;
    let db = app.database().await;
    let answer = || Reply::text("Grüße aus Köln, wo der Text zerschnitten wird.").usage(37, 11);

    // The whole answer: its bytes, and what we would count of it.
    model.script([answer().no_usage(), answer()]);
    let whole = of_json(&succeed(client, &agent, "Hi").await["usage"]);
    let request = http().post(format!("{}/chat/completions", model.url())).bearer_auth("k");
    let stream = request.json(&model.requests()[0].body).send().await.unwrap().text().await.unwrap();
    let end_of = |what: &str| {
        let at = stream.find(what).unwrap();
        at + stream[at..].find("\n\n").unwrap() + 2
    };
    let (finish, usage) = (end_of(r#""finish_reason":"stop""#), end_of(r#""prompt_tokens":37"#));

    let mut cuts: Vec<usize> = (0..16).map(|step| step * stream.len() / 16).collect();
    cuts.extend([1, finish - 1, finish, finish + 1, usage - 1, usage, usage + 1, stream.len() - 1, stream.len()]);
    cuts.sort_unstable();
    cuts.dedup();
    assert!(cuts.len() >= 24);
    let mut counted = 0;
    for cut in cuts {
        model.script([answer().cut_after_bytes(cut)]);
        let run = start(client, &agent, "Hi").await;
        let run = until(client, &run, if cut < finish { "FAILED" } else { "SUCCEEDED" }).await;
        assert_eq!(code(&run), if cut < finish { "MODEL_UNAVAILABLE" } else { "" }, "cut after {cut}");
        let rows = rows_of(&db, run["id"].as_str().unwrap()).await;
        assert_eq!(rows.len(), 1, "cut after {cut}");
        let row = of_row(&rows[0]);
        assert_eq!((row, rows[0].attempt), (of_json(&run["usage"]), 1), "cut after {cut}");
        if cut < usage {
            assert_eq!((row.estimated, row.input), (true, whole.input), "cut after {cut}");
            assert!((counted..=whole.output).contains(&row.output), "cut after {cut}: {row:?} after {counted}");
            assert!(cut < finish || row.output == whole.output, "cut after {cut}: {row:?}");
            counted = row.output;
        } else {
            assert_eq!((row.estimated, row.input, row.output), (false, 37, 11), "cut after {cut}");
        }
    }
    agreed(&app, &tenant).await;
}

async fn silence_is_one_estimated_row_an_attempt(builder: TestAppBuilder) {
    let builder = builder
        .env("CLOISTER_PROVIDERS__SCRIPTED__ATTEMPTS", "2")
        .env("CLOISTER_PROVIDERS__SCRIPTED__FIRST_BYTE_TIMEOUT_MS", "800")
        .env("CLOISTER_PROVIDERS__SCRIPTED__IDLE_TIMEOUT_MS", "800");
    let (app, model, tenant, agent) = set_up(builder).await;
    let client = &tenant.client;
    let db = app.database().await;

    model.script([Reply::hang(), Reply::hang()]);
    let run = start(client, &agent, "Hi").await;
    assert_eq!(code(&until(client, &run, "FAILED").await), "MODEL_UNAVAILABLE");
    let rows = rows_of(&db, &run).await;
    let told: Vec<_> = rows.iter().map(|row| (row.attempt, row.estimated, row.output_tokens)).collect();
    assert_eq!(told, [(1, true, 0), (2, true, 0)]);
    let input = rows[0].input_tokens;
    assert!(input > 0 && rows[1].input_tokens == input);

    // The second attempt answers: what it charged, beside the estimate of the first.
    model.script([Reply::hang(), Reply::text("Now.").usage(25, 5)]);
    let run = succeed(client, &agent, "Hi").await;
    let rows = rows_of(&db, run["id"].as_str().unwrap()).await;
    assert_eq!(of_json(&run["usage"]).total(), input + 30);
    assert_eq!(rows.iter().map(|row| row.estimated).collect::<Vec<_>>(), [true, false]);

    // An answer that stands still is cut, and not tried again: some of it was shown.
    model.script([Reply::text("hello world").chunks_of(5).hold()]);
    let run = start(client, &agent, "Hi").await;
    let run = until(client, &run, "FAILED").await;
    let usage = of_json(&run["usage"]);
    assert_eq!((code(&run), usage.requests, usage.input, usage.output), ("MODEL_UNAVAILABLE", 1, input, 1));
    assert!(usage.estimated);
    assert_eq!((agreed(&app, &tenant).await.requests, model.served().requests), (5, 2));
}

async fn a_cancelled_call_is_drained_to_its_usage(builder: TestAppBuilder) {
    let (app, model, tenant, plain) = set_up(builder).await;
    let client = &tenant.client;
    let db = app.database().await;
    let cancel = async |run: &str| {
        let payload = on_run(client, "cancelRun", run).await;
        assert_eq!(payload, json!({"run": {"status": "CANCELLED"}, "errors": []}));
    };

    // In mid-answer: the call stays reserved until the provider has said what it charges.
    model.script([Reply::text("Nobody hears the end of this.").usage(210, 17).hold()]);
    let run = start(client, &plain, "Hi").await;
    model.wait_for_held(1).await;
    cancel(&run).await;
    assert_eq!((reservations(&db).await.len(), rows(&db).await.len()), (1, 0));
    assert!(model.release());
    settled(&db).await;
    assert_eq!((exact(&app, &tenant, &model).await.total(), model.requests()[0].ending), (227, Ending::Completed));
    let kinds: Vec<_> = journal(&db, &run).await.into_iter().map(|item| item.kind).collect();
    assert_eq!(kinds, ["message", "status"]);
    assert_eq!(run_row(&db, &run).await.status, Status::Cancelled);

    // Before the head has come.
    model.script([Reply::text("Late.").usage(31, 2).delay(300)]);
    let run = start(client, &plain, "Hi").await;
    model.wait_for_requests(2).await;
    cancel(&run).await;
    settled(&db).await;
    assert_eq!(exact(&app, &tenant, &model).await.total(), 227 + 33);

    // A run whose time is over leaves its call just so.
    model.script([Reply::text("Too late for the run.").usage(45, 8).hold()]);
    let input = json!({"agentId": plain, "input": "Hi", "timeoutSeconds": 1});
    let run = try_start(client, input).await["run"]["id"].as_str().unwrap().to_owned();
    model.wait_for_held(1).await;
    assert_eq!(code(&until(client, &run, "FAILED").await), "TIMEOUT");
    assert_eq!((reservations(&db).await.len(), rows(&db).await.len()), (1, 2));
    assert!(model.release());
    settled(&db).await;
    assert_eq!(exact(&app, &tenant, &model).await.total(), 227 + 33 + 53);

    // Between two attempts nothing is under way, and nothing follows.
    model.script([Reply::status(429).retry_after(30)]);
    let run = start(client, &plain, "Hi").await;
    model.wait_for("the refusal", |requests| requests.len() == 4 && requests[3].ending == Ending::Completed).await;
    settled(&db).await;
    cancel(&run).await;
    assert_eq!(exact(&app, &tenant, &model).await.requests, 3);

    // While a tool works: the answer that called it is paid for, and every call has its output.
    let tools = ToolServer::start().await;
    tools.script([ToolAnswer::hang()]);
    let tool = json!({"webhook": {"name": "slow", "description": "Takes long.", "url": tools.url("/")}});
    let tooled = agent(client, "Tooled", json!({"tools": [tool]})).await;
    model.script([Reply::tool_call("slow", json!({})).usage(50, 5)]);
    let run = start(client, &tooled, "Hi").await;
    tools.wait_for_requests(1).await;
    cancel(&run).await;
    let kinds: Vec<_> = journal(&db, &run).await.into_iter().map(|item| item.kind).collect();
    assert_eq!(kinds, ["message", "tool_call", "usage", "tool_output", "status"]);
    assert_eq!(exact(&app, &tenant, &model).await.total(), 227 + 33 + 53 + 55);
    assert_eq!((model.requests().len(), model.unused()), (5, 0));
}

async fn what_the_provider_does_not_say_is_estimated(builder: TestAppBuilder) {
    let (app, model, tenant, agent) = set_up(builder).await;
    let client = &tenant.client;
    let db = app.database().await;

    model.script([Reply::text("hello world").no_usage().hold()]);
    let run = start(client, &agent, "hello world").await;
    model.wait_for_held(1).await;
    let reserved = reservations(&db).await.remove(0);
    assert!(model.release());
    let usage = of_json(&until(client, &run, "SUCCEEDED").await["usage"]);
    // Two tokens of o200k_base, whatever the provider charged in silence.
    assert_eq!((usage.estimated, usage.requests, usage.input, usage.output), (true, 1, reserved.input_tokens, 2));
    assert_eq!(reserved.tokens, reserved.input_tokens + 4_096);
    let items = journal(&db, &run).await;
    let usage_item = items.iter().find(|item| item.kind == "usage").unwrap();
    assert_eq!(usage_item.body["usage"]["estimated"], true);
    assert!(agreed(&app, &tenant).await.estimated);

    // An error in place of the rest: what had come is counted.
    model.script([Reply::text("hello world").fail_in_stream("overloaded")]);
    let run = start(client, &agent, "hello world").await;
    let run = until(client, &run, "FAILED").await;
    let usage = of_json(&run["usage"]);
    assert_eq!((code(&run), usage.estimated, usage.requests, usage.output), ("MODEL_UNAVAILABLE", true, 1, 2));
    assert!(run["error"]["message"].as_str().unwrap().contains("overloaded"), "{run}");

    // A stream that never says why it stopped is no answer, but its usage counts.
    model.script([Reply::text("hello world").usage(15, 6).without_finish_reason()]);
    let run = start(client, &agent, "hello world").await;
    let run = until(client, &run, "FAILED").await;
    let usage = of_json(&run["usage"]);
    assert_eq!((code(&run), usage.estimated, usage.input, usage.output), ("MODEL_UNAVAILABLE", false, 15, 6));

    // One without `[DONE]` is whole.
    model.script([Reply::text("hello world").usage(16, 7).without_done()]);
    let usage = of_json(&succeed(client, &agent, "hello world").await["usage"]);
    assert_eq!((usage.estimated, usage.input, usage.output), (false, 16, 7));

    // More than was reserved is recorded as it was charged.
    model.script([Reply::text("Much.").usage(9_000, 5_000)]);
    let usage = of_json(&succeed(client, &agent, "hello world").await["usage"]);
    assert_eq!((usage.estimated, usage.total()), (false, 14_000));
    assert_eq!(agreed(&app, &tenant).await.requests, 5);
}

async fn usage_is_broken_down_without_a_rest(builder: TestAppBuilder) {
    let second_model = r#"
[[models]]
name = "scripted-two"
provider = "scripted"
upstream = "scripted-2"
context_window = 128000
max_output_tokens = 16384
[models.price]
input = "1.00"
output = "2.00"
"#;
    let (app, model, tenant, first) = set_up(builder.config(second_model)).await;
    let client = &tenant.client;
    model.always(|request| match request.last_user_text().as_str() {
        "one" => Reply::text("1").usage(100, 1),
        "two" => Reply::text("2").usage(200, 2),
        "draft" => Reply::text("3").usage(400, 4),
        "key" => Reply::text("4").usage(800, 8),
        _ => Reply::text("5").usage(1_600, 16),
    });
    let mutation = "mutation ($input: CreateApiKeyInput!) {
        createApiKey(input: $input) { apiKey { id } secret errors { code } }
    }";
    let created = client.query(mutation, json!({"input": {"name": "second", "scopes": ["RUN"]}})).await;
    let second_key = app.client(created.payload("createApiKey")["secret"].as_str().unwrap());
    let other = agent(client, "Other", json!({"model": "scripted-two"})).await;

    succeed(client, &first, "one").await;
    let publish = "mutation ($input: AgentIdInput!) { publishAgent(input: $input) { errors { code } } }";
    client.query(publish, json!({"input": {"agentId": first}})).await.payload("publishAgent");
    succeed(client, &first, "two").await;
    let draft = try_start(client, json!({"agentId": first, "input": "draft", "draft": true})).await;
    until(client, draft["run"]["id"].as_str().unwrap(), "SUCCEEDED").await;
    succeed(&second_key, &first, "key").await;
    succeed(client, &other, "other").await;

    let query = "{ viewer { apiKey { id } } usage {
        byDay { usage { totalTokens } } byModel { model usage { totalTokens requests } }
        byAgent { agent { id } version usage { totalTokens } } byKey { apiKey { id } usage { totalTokens } }
    } }";
    let data = client.data(query, json!({})).await;
    let lines = |breakdown: &str, key: &dyn Fn(&Value) -> Value| {
        let lines = data["usage"][breakdown].as_array().unwrap().iter();
        let mut lines: Vec<(String, i64)> =
            lines.map(|line| (key(line).to_string(), line["usage"]["totalTokens"].as_i64().unwrap())).collect();
        lines.sort();
        lines
    };
    let expect = |lines: &[(Value, i64)]| {
        let mut lines: Vec<_> = lines.iter().map(|(key, tokens)| (key.to_string(), *tokens)).collect();
        lines.sort();
        lines
    };
    let by_model = lines("byModel", &|line| line["model"].clone());
    assert_eq!(by_model, expect(&[(json!("scripted"), 1_515), (json!("scripted-two"), 1_616)]));
    let by_agent = lines("byAgent", &|line| json!([line["agent"]["id"], line["version"]]));
    let of_first = |version: Value| json!([first, version]);
    let expected = [(of_first(json!(1)), 101), (of_first(json!(2)), 202 + 808), (of_first(Value::Null), 404)];
    assert_eq!(by_agent, expect(&[&expected[..], &[(json!([other, 1]), 1_616)]].concat()));
    let (own, second) = (&data["viewer"]["apiKey"]["id"], &created.body["data"]["createApiKey"]["apiKey"]["id"]);
    let by_key = lines("byKey", &|line| line["apiKey"]["id"].clone());
    assert_eq!(by_key, expect(&[(own.clone(), 3_131 - 808), (second.clone(), 808)]));
    let days: i64 = lines("byDay", &|_| Value::Null).iter().map(|(_, tokens)| tokens).sum();
    assert_eq!(days, 3_131);
    exact(&app, &tenant, &model).await;
}

async fn subscribers_are_told_of_each_change_of_usage(builder: TestAppBuilder) {
    let (app, model, tenant, agent) = set_up(builder).await;
    let client = &tenant.client;
    let query = "subscription { usage { totalTokens totalCost requestCount remainingTokens monthlyLimit } }";
    let mut usage = client.subscribe_sse(query, json!({})).await;
    let first = usage.next_result().await.unwrap()["data"]["usage"].clone();
    let limit = 100_000_000;
    let expected = |tokens: i64, cost: &str, requests: i64| {
        json!({"totalTokens": tokens, "totalCost": cost, "requestCount": requests,
               "remainingTokens": limit - tokens, "monthlyLimit": limit})
    };
    assert_eq!(first, expected(0, "0", 0));
    // Another tenant's changes are none of this one's.
    let stranger = app.tenant("stranger").await;
    let strange = super::ledger::agent(&stranger.client, "Strange", json!({})).await;
    for (number, cost) in [(1, "0.000016"), (2, "0.000032"), (3, "0.000048")] {
        model.script([Reply::text("Strange.").usage(5, 5), Reply::text("Yes.").usage(10, 3)]);
        succeed(&stranger.client, &strange, "Hi").await;
        succeed(client, &agent, "Hi").await;
        assert_eq!(usage.next_result().await.unwrap()["data"]["usage"], expected(13 * number, cost, number));
    }
}
