//! Quotas: what is reserved, what is refused, and what goes on.

use chrono::{DateTime, Utc};
use cloister_tests::app::TestAppBuilder;
use cloister_tests::{Client, ModelServer, Reply, Tenant, TestApp, ToolServer};
use entity::quota_counters::Scope;
use entity::runs::Status;
use entity::{TenantOwned, runs};
use futures_util::future::join_all;
use sea_orm::{ColumnTrait, PaginatorTrait, QueryFilter};
use serde_json::{Value, json};

use super::both::on_both;
use super::ledger::{
    agent, counter, eventually, exact, journal, look, of_json, on_run, reservations, rows, run_row, settled, start,
    stored_status, succeed, try_start, until, uuid,
};

on_both!(
    a_call_is_reserved_while_it_is_open,
    a_start_reserves_for_its_first_call,
    runs_that_are_cancelled_as_they_begin_leave_nothing_reserved,
    the_last_tokens_clamp_a_call_and_too_few_pause_the_run,
    others_reservations_are_waited_for,
    a_run_pauses_between_turns_and_goes_on_once_the_limit_is_raised,
    a_key_has_a_limit_of_its_own,
    a_run_has_a_limit_of_its_own,
    two_hundred_runs_at_once_never_pass_a_quota_of_fifty,
);

/// Output that is reserved for an agent without a maximum.
const OUTPUT: i64 = 4_096;

/// A tenant with this limit, and an agent.
/// Resumes a run whose limit was raised, unless it goes on by itself already.
pub async fn resume(client: &Client, run: &str) {
    let answer = on_run(client, "resumeRun", run).await;
    let code = &answer["errors"][0]["code"];
    assert!(code.is_null() || code == "STATE", "{answer}");
}

async fn limited(app: &TestApp, name: &str, limit: i64) -> (Tenant, String) {
    let tenant = app.tenant_with(name, json!({"plan": "PRO", "monthlyTokenLimit": limit})).await;
    let agent = agent(&tenant.client, "Agent", json!({})).await;
    (tenant, agent)
}

/// What we count of the input of an agent's first turn with the text "Hi", learned from a call of another tenant.
async fn input_tokens(app: &TestApp, model: &ModelServer) -> i64 {
    let tenant = app.tenant("scout").await;
    let agent = agent(&tenant.client, "Agent", json!({})).await;
    model.script([Reply::text("Yes.").hold()]);
    let run = start(&tenant.client, &agent, "Hi").await;
    model.wait_for_held(1).await;
    let reserved = reservations(&app.database().await).await.remove(0);
    assert_eq!(reserved.tokens, reserved.input_tokens + OUTPUT);
    assert!(model.release());
    until(&tenant.client, &run, "SUCCEEDED").await;
    reserved.input_tokens
}

async fn set_limit(app: &TestApp, tenant: &Tenant, limit: i64) {
    let mutation = "mutation ($input: UpdateTenantInput!) { updateTenant(input: $input) { errors { code } } }";
    let input = json!({"tenantId": tenant.id, "monthlyTokenLimit": limit});
    app.admin().query(mutation, json!({"input": input})).await.payload("updateTenant");
}

async fn a_call_is_reserved_while_it_is_open(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    let app = builder.model_server(&model).start().await;
    let (tenant, plain) = limited(&app, "acme", 50_000).await;
    let client = &tenant.client;
    let db = app.database().await;
    let usage = async || {
        let query = "{ usage { totalTokens reservedTokens remainingTokens monthlyLimit } }";
        let usage = client.data(query, json!({})).await["usage"].clone();
        ["totalTokens", "reservedTokens", "remainingTokens", "monthlyLimit"].map(|field| usage[field].as_i64().unwrap())
    };
    assert_eq!(usage().await, [0, 0, 50_000, 50_000]);

    model.script([Reply::text("Held.").usage(20, 5).hold()]);
    let run = start(client, &plain, "Hi").await;
    model.wait_for_held(1).await;
    let held = reservations(&db).await;
    let [one] = &held[..] else { panic!("{held:?}") };
    assert!(one.sent && one.tokens == one.input_tokens + OUTPUT && one.input_tokens > 5, "{one:?}");
    assert_eq!((one.run_id, one.turn, one.attempt, one.run_limited), (Some(uuid(&run)), Some(1), 1, false));
    assert_eq!(usage().await, [0, one.tokens, 50_000 - one.tokens, 50_000]);
    assert_eq!(counter(&db, Scope::Tenant, uuid(&tenant.id)).await, (0, one.tokens));
    assert_eq!(counter(&db, Scope::Key, one.key_id.unwrap()).await, (0, one.tokens));
    // A model without a maximum is not sent one.
    assert_eq!(model.requests()[0].max_tokens(), None);

    // An agent's own maximum is what is reserved and sent, beside what the other holds.
    let short = agent(client, "Agent", json!({"modelSettings": {"maxOutputTokens": 700}})).await;
    model.script([Reply::text("Held too.").usage(21, 6).hold()]);
    let second = try_start(client, json!({"agentId": short, "input": "Hi", "maxTokens": 9_000})).await;
    let second = second["run"]["id"].as_str().unwrap();
    model.wait_for_held(2).await;
    let expected = one.tokens + one.input_tokens + 700;
    assert_eq!(usage().await, [0, expected, 50_000 - expected, 50_000]);
    assert_eq!(model.requests()[1].max_tokens(), Some(700));
    assert_eq!(counter(&db, Scope::Run, uuid(second)).await, (0, one.input_tokens + 700));

    assert_eq!(model.release_all(), 2);
    until(client, &run, "SUCCEEDED").await;
    until(client, second, "SUCCEEDED").await;
    assert_eq!(usage().await, [52, 0, 50_000 - 52, 50_000]);
    assert_eq!(counter(&db, Scope::Run, uuid(second)).await, (27, 0));
    exact(&app, &tenant, &model).await;
}

async fn a_start_reserves_for_its_first_call(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    let app = builder.model_server(&model).start().await;
    let (tenant, plain) = limited(&app, "acme", 50_000).await;
    let client = &tenant.client;
    let db = app.database().await;
    // A tenant's first run makes its queue, and goes through it.
    model.script([Reply::text("Yes.").usage(20, 5)]);
    succeed(client, &plain, "Hi").await;
    settled(&db).await;

    model.script([Reply::text("Held.").usage(20, 5).hold()]);
    let run = start(client, &plain, "Hi").await;
    // The run is stored together with it: there is nothing to wait for.
    let held = reservations(&db).await;
    let [one] = &held[..] else { panic!("{held:?}") };
    assert_eq!((one.run_id, one.turn, one.attempt), (Some(uuid(&run)), Some(1), 1));
    let was_made_with = async |run: &str, of: DateTime<Utc>| run_row(&db, run).await.started_at.unwrap() >= of;
    assert!(was_made_with(&run, one.created_at).await, "{one:?}");
    model.wait_for_held(1).await;
    assert_eq!(reservations(&db).await.len(), 1);
    assert!(model.release());
    until(client, &run, "SUCCEEDED").await;
    settled(&db).await;
    assert_eq!(rows(&db).await[1].call_id, one.call_id);

    // What an input guardrail looks at first may never be sent, and a run's own limit has its counter once it is under way.
    let guardrail = json!({"name": "polite", "stage": "INPUT", "parallel": false, "rule": {"maxLength": 9}});
    let guarded = agent(client, "Guarded", json!({"guardrails": [guardrail]})).await;
    for input in
        [json!({"agentId": guarded, "input": "Hi"}), json!({"agentId": plain, "input": "Hi", "maxTokens": 9_000})]
    {
        model.script([Reply::text("Yes.").usage(20, 5)]);
        let run = try_start(client, input).await["run"]["id"].as_str().unwrap().to_owned();
        until(client, &run, "SUCCEEDED").await;
        settled(&db).await;
        let call = rows(&db).await.pop().unwrap();
        assert!(!was_made_with(&run, call.created_at).await, "{call:?}");
    }
    exact(&app, &tenant, &model).await;
    assert_eq!(counter(&db, Scope::Tenant, uuid(&tenant.id)).await, (100, 0));
}

async fn runs_that_are_cancelled_as_they_begin_leave_nothing_reserved(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    let app = builder.model_server(&model).start().await;
    let (tenant, agent) = limited(&app, "acme", 10_000_000).await;
    let client = &tenant.client;
    model.script((0..60).map(|_| Reply::text("Yes.").usage(20, 5)));
    let cancelled = (0..60).map(|_| async {
        let run = start(client, &agent, "Hi").await;
        on_run(client, "cancelRun", &run).await;
    });
    join_all(cancelled).await;
    // Calls that were sent are charged, whatever became of their runs; the others are given back, and not by the sweep.
    exact(&app, &tenant, &model).await;
    assert_eq!(counter(&app.database().await, Scope::Tenant, uuid(&tenant.id)).await.1, 0);
}

async fn the_last_tokens_clamp_a_call_and_too_few_pause_the_run(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    let app = builder.model_server(&model).start().await;
    let input = input_tokens(&app, &model).await;
    let asked = || model.requests().last().unwrap().max_tokens();

    // What is left, and the most output that the provider is asked for.
    let cases = [(OUTPUT, None), (OUTPUT - 1, Some(4_095)), (1_000, Some(1_000)), (256, Some(256))];
    for (left, most) in cases {
        let (tenant, agent) = limited(&app, &format!("left {left}"), input + left).await;
        model.script([Reply::text("A text that is longer than what is left.").usage(20, 9_999).honour_max_tokens()]);
        let run = start(&tenant.client, &agent, "Hi").await;
        let run = until(&tenant.client, &run, "SUCCEEDED").await;
        assert_eq!(asked(), most, "{left} left");
        if let Some(most) = most {
            assert_eq!(of_json(&run["usage"]).output, i64::try_from(most).unwrap());
        }
    }

    // One token fewer, and the provider is not called at all.
    let before = model.requests().len();
    let (tenant, agent) = limited(&app, "too little", input + 255).await;
    let run = start(&tenant.client, &agent, "Hi").await;
    let run = until(&tenant.client, &run, "PAUSED_QUOTA").await;
    assert_eq!((run["turns"].as_i64(), of_json(&run["usage"]).requests), (Some(0), 0));
    let answer = tenant.client.rest_post("/v1/run", &json!({"agent_id": agent, "message": "Hi"})).await;
    assert_eq!(answer.status.as_u16(), 429, "{}", answer.body);
    assert!(answer.body["detail"].is_string());

    // With nothing left, no run is started.
    let (tenant, agent) = limited(&app, "spent", input + 300).await;
    model.script([Reply::text("All of it.").usage(u64::try_from(input).unwrap(), 300)]);
    succeed(&tenant.client, &agent, "Hi").await;
    let refused = try_start(&tenant.client, json!({"agentId": agent, "input": "Hi"})).await;
    assert_eq!((&refused["run"], &refused["errors"][0]["code"]), (&Value::Null, &json!("QUOTA_EXCEEDED")));
    let answer = tenant.client.rest_post("/v1/run", &json!({"agent_id": agent, "message": "Hi"})).await;
    assert_eq!(answer.status.as_u16(), 429, "{}", answer.body);
    assert_eq!(model.requests().len(), before + 1);
    settled(&app.database().await).await;
}

async fn others_reservations_are_waited_for(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    let mut app = builder.model_server(&model).start().await;
    let input = input_tokens(&app, &model).await;
    let db = app.database().await;
    let (tenant, agent) = limited(&app, "acme", (input + OUTPUT) * 3 / 2).await;
    let client = &tenant.client;

    model.script([Reply::text("First.").usage(20, 5).hold(), Reply::text("Second.").usage(20, 6)]);
    let first = start(client, &agent, "Hi").await;
    model.wait_for_held(1).await;
    let second = start(client, &agent, "Hi").await;
    stored_status(&db, &second, Status::Running).await;
    assert_eq!((reservations(&db).await.len(), model.requests().len()), (1, 2));
    assert!(model.release());
    until(client, &first, "SUCCEEDED").await;
    until(client, &second, "SUCCEEDED").await;
    // It was not clamped to what the first had left of the limit.
    assert_eq!(model.requests()[2].max_tokens(), None);
    settled(&db).await;

    // The wait is bounded.
    app.set_env("CLOISTER_RUNS__QUOTA_WAIT_MS", "200");
    drop(db);
    app.restart().await;
    let db = app.database().await;
    model.script([Reply::text("First.").usage(20, 5).hold(), Reply::text("Second.").usage(20, 6)]);
    let first = start(client, &agent, "Hi").await;
    model.wait_for_held(1).await;
    let second = start(client, &agent, "Hi").await;
    until(client, &second, "PAUSED_QUOTA").await;
    assert_eq!((reservations(&db).await.len(), model.requests().len()), (1, 4));
    assert!(model.release());
    until(client, &first, "SUCCEEDED").await;
    resume(client, &second).await;
    stored_status(&db, &second, Status::Succeeded).await;
    assert_eq!(counter(&db, Scope::Tenant, uuid(&tenant.id)).await, (2 * (25 + 26), 0));
    settled(&db).await;
}

async fn a_run_pauses_between_turns_and_goes_on_once_the_limit_is_raised(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    let tools = ToolServer::start().await;
    let app = builder.model_server(&model).start().await;
    let tenant = app.tenant_with("acme", json!({"plan": "PRO", "monthlyTokenLimit": 6_000})).await;
    let client = &tenant.client;
    let db = app.database().await;
    let tool = json!({"webhook": {"name": "weather", "description": "Tells it.", "url": tools.url("/")}});
    let agent = agent(client, "Agent", json!({"tools": [tool]})).await;
    model.script([
        Reply::tool_call("weather", json!({})).usage(5_000, 900),
        Reply::tool_call("weather", json!({})).usage(400, 40),
        Reply::text("Sunny.").usage(500, 50),
    ]);
    let run = start(client, &agent, "Weather?").await;
    let paused = until(client, &run, "PAUSED_QUOTA").await;
    assert_eq!((paused["turns"].as_i64(), of_json(&paused["usage"]).total()), (Some(1), 5_900));
    assert_eq!((tools.requests().len(), model.requests().len()), (1, 1));
    let row = run_row(&db, &run).await;
    assert_eq!((row.lease_until, row.finished_at, reservations(&db).await.len()), (None, None, 0));

    // Too little is left, and a refusal changes nothing.
    let refused = on_run(client, "resumeRun", &run).await;
    assert_eq!((&refused["run"], &refused["errors"][0]["code"]), (&Value::Null, &json!("QUOTA_EXCEEDED")));
    assert_eq!(run_row(&db, &run).await.status, Status::PausedQuota);

    // Enough for a turn that is clamped, then not for another.
    set_limit(&app, &tenant, 6_600).await;
    resume(client, &run).await;
    eventually("the second turn is paid", async || rows(&db).await.len() == 2).await;
    stored_status(&db, &run, Status::PausedQuota).await;
    assert_eq!((tools.requests().len(), model.requests().len()), (2, 2));
    let clamped = model.requests()[1].max_tokens().expect("less is left than the default");
    assert!((256..700).contains(&clamped), "{clamped}");

    set_limit(&app, &tenant, 50_000).await;
    resume(client, &run).await;
    stored_status(&db, &run, Status::Succeeded).await;
    let run_now = look(client, &run).await;
    assert_eq!((run_now["output"].as_str(), run_now["turns"].as_i64()), (Some("Sunny."), Some(3)));
    // Each turn was asked for and paid once, each tool called once.
    assert_eq!((tools.requests().len(), model.requests().len(), model.unused()), (2, 3, 0));
    assert_eq!(exact(&app, &tenant, &model).await.total(), 5_900 + 440 + 550);
    let statuses: Vec<_> = journal(&db, &run)
        .await
        .into_iter()
        .filter(|item| item.kind == "status")
        .map(|item| item.body["status"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(statuses, ["paused_quota", "queued", "paused_quota", "queued", "succeeded"]);

    let refused = on_run(client, "resumeRun", &run).await;
    assert_eq!(refused["errors"][0]["code"], "STATE");
    // One that is paused can be cancelled too.
    set_limit(&app, &tenant, 7_000).await;
    let run = start(client, &agent, "Weather?").await;
    until(client, &run, "PAUSED_QUOTA").await;
    assert_eq!(on_run(client, "cancelRun", &run).await["run"]["status"], "CANCELLED");
}

async fn a_key_has_a_limit_of_its_own(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    let app = builder.model_server(&model).start().await;
    let tenant = app.tenant("acme").await;
    let client = &tenant.client;
    let agent = agent(client, "Agent", json!({})).await;
    let mutation = "mutation ($input: CreateApiKeyInput!) {
        createApiKey(input: $input) { apiKey { id } secret errors { code } }
    }";
    let input = json!({"name": "limited", "scopes": ["READ", "RUN"], "monthlyTokenLimit": 1_000});
    let created = client.query(mutation, json!({"input": input})).await;
    let created = created.payload("createApiKey");
    let key = app.client(created["secret"].as_str().unwrap());
    let key_id = created["apiKey"]["id"].as_str().unwrap();
    let db = app.database().await;

    model.script([Reply::text("Some.").usage(700, 100)]);
    succeed(&key, &agent, "Hi").await;
    let clamped = model.requests()[0].max_tokens().unwrap();
    assert!(clamped < 1_000, "{clamped}");
    assert_eq!(counter(&db, Scope::Key, uuid(key_id)).await, (800, 0));
    // 200 are left, too few for a call.
    let paused = start(&key, &agent, "Hi").await;
    until(&key, &paused, "PAUSED_QUOTA").await;
    assert_eq!(on_run(&key, "resumeRun", &paused).await["errors"][0]["code"], "QUOTA_EXCEEDED");
    // It is the key that started the run that counts, not the one that resumes it.
    assert_eq!(on_run(client, "resumeRun", &paused).await["errors"][0]["code"], "QUOTA_EXCEEDED");
    // Other keys have all of the tenant's month.
    model.script([Reply::text("More.").usage(2_000, 100)]);
    succeed(client, &agent, "Hi").await;
    assert_eq!(model.requests()[1].max_tokens(), None);
    assert_eq!(counter(&db, Scope::Key, uuid(key_id)).await, (800, 0));

    let mutation = "mutation ($input: UpdateApiKeyInput!) { updateApiKey(input: $input) { errors { code } } }";
    let update = async |limit: Value| {
        let input = json!({"apiKeyId": key_id, "monthlyTokenLimit": limit});
        client.query(mutation, json!({"input": input})).await.payload("updateApiKey");
    };
    update(json!(800)).await;
    let refused = try_start(&key, json!({"agentId": agent, "input": "Hi"})).await;
    assert_eq!(refused["errors"][0]["code"], "QUOTA_EXCEEDED");
    update(Value::Null).await;
    model.script([Reply::text("Free again.").usage(30, 3)]);
    resume(&key, &paused).await;
    stored_status(&db, &paused, Status::Succeeded).await;
    assert_eq!(exact(&app, &tenant, &model).await.total(), 800 + 2_100 + 33);
}

async fn a_run_has_a_limit_of_its_own(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    let tools = ToolServer::start().await;
    let app = builder.model_server(&model).start().await;
    let tenant = app.tenant("acme").await;
    let client = &tenant.client;
    let db = app.database().await;
    let tool = json!({"webhook": {"name": "weather", "description": "Tells it.", "url": tools.url("/")}});
    let agent = agent(client, "Agent", json!({"tools": [tool]})).await;
    let start = async |most: i64| {
        let input = json!({"agentId": agent, "input": "Weather?", "maxTokens": most});
        try_start(client, input).await["run"]["id"].as_str().unwrap().to_owned()
    };

    // Too little for the first call: the provider is not asked.
    let run = start(200).await;
    let run = until(client, &run, "FAILED").await;
    assert_eq!((&run["error"]["code"], model.requests().len()), (&json!("TOKEN_LIMIT"), 0));

    // Used up by the first turn, whose tool still ran.
    model.script([Reply::tool_call("weather", json!({})).usage(800, 150)]);
    let run = start(1_000).await;
    let ended = until(client, &run, "FAILED").await;
    assert_eq!((&ended["error"]["code"], ended["turns"].as_i64()), (&json!("TOKEN_LIMIT"), Some(1)));
    assert_eq!((tools.requests().len(), of_json(&ended["usage"]).total()), (1, 950));
    assert_eq!(counter(&db, Scope::Run, uuid(&run)).await, (950, 0));
    let sent = model.requests()[0].max_tokens().unwrap();
    assert!((256..1_000).contains(&sent), "{sent}");

    // Enough for both; the second is clamped to what the first has left.
    model.script([
        Reply::tool_call("weather", json!({})).usage(800, 150),
        Reply::text("Much more than is left.").usage(100, 9_999).honour_max_tokens(),
    ]);
    let run = start(1_500).await;
    let ended = until(client, &run, "SUCCEEDED").await;
    let clamped = i64::try_from(model.requests()[2].max_tokens().unwrap()).unwrap();
    assert!((256..550).contains(&clamped), "{clamped}");
    assert_eq!(of_json(&ended["usage"]).total(), 950 + 100 + clamped);
    exact(&app, &tenant, &model).await;
}

async fn two_hundred_runs_at_once_never_pass_a_quota_of_fifty(builder: TestAppBuilder) {
    const RUNS: usize = 200;
    const FIT: usize = 50;
    let model = ModelServer::start().await;
    let plan = [
        ("BASE_PRICE", "49"),
        ("INCLUDED_TOKENS", "10000000"),
        ("OVERAGE_PER_MILLION", "5"),
        ("MONTHLY_TOKEN_LIMIT", "100000000"),
        ("MAX_CONCURRENT_RUNS", "200"),
        ("REQUESTS_PER_MINUTE", "6000"),
        ("WEIGHT", "4"),
    ];
    let builder = plan
        .into_iter()
        .fold(builder, |builder, (name, value)| builder.env(&format!("CLOISTER_PLANS__PRO__{name}"), value));
    let app = builder.model_server(&model).start().await;
    let input = input_tokens(&app, &model).await;
    let scouted = model.served();
    let each = input + OUTPUT;
    let limit = each * i64::try_from(FIT).unwrap();
    let (tenant, agent) = limited(&app, "acme", limit).await;
    let db = app.database().await;
    let used = u64::try_from(input).unwrap();
    model.always(move |_| Reply::text("All that was reserved.").usage(used, OUTPUT.unsigned_abs()).hold());

    let started = join_all((0..RUNS).map(|_| start(&tenant.client, &agent, "Hi"))).await;
    let with_status = async |status: Status| {
        let found = runs::Entity::in_tenant(uuid(&tenant.id)).filter(runs::Column::Status.eq(status));
        usize::try_from(found.count(&db).await.unwrap()).unwrap()
    };
    model.wait_for_held(FIT).await;
    eventually("all runs are claimed", async || with_status(Status::Running).await == RUNS).await;
    assert_eq!(reservations(&db).await.len(), FIT);
    assert_eq!(counter(&db, Scope::Tenant, uuid(&tenant.id)).await, (0, limit));
    assert_eq!(model.requests().len(), 1 + FIT);

    assert_eq!(model.release_all(), FIT);
    eventually("the admitted have ended", async || with_status(Status::Succeeded).await == FIT).await;
    eventually("the others are paused", async || with_status(Status::PausedQuota).await == RUNS - FIT).await;
    assert_eq!(started.len(), RUNS);
    assert_eq!(model.requests().len(), 1 + FIT);
    assert_eq!(counter(&db, Scope::Tenant, uuid(&tenant.id)).await, (limit, 0));
    assert_eq!(reservations(&db).await.len(), 0);
    let rows = rows(&db).await;
    assert_eq!(rows.iter().filter(|row| row.tenant_id == uuid(&tenant.id) && !row.estimated).count(), FIT);
    let served = i64::try_from(model.served().total - scouted.total).unwrap();
    let usage = tenant.client.data("{ usage { totalTokens reservedTokens remainingTokens } }", json!({})).await;
    assert_eq!(usage["usage"], json!({"totalTokens": served, "reservedTokens": 0, "remainingTokens": 0}));
    assert_eq!(served, limit);
}
