//! What a review showed once, and must not come back.

use std::time::Duration;

use cloister_tests::app::TestAppBuilder;
use cloister_tests::{ModelServer, Reply, TestApp};
use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio::time::sleep;

use super::both::on_both;
use super::ledger::{agent, look, on_run, start, try_start, until};

on_both!(
    a_run_may_be_paused_for_longer_than_its_timeout,
    a_suspension_uses_none_of_a_runs_time,
    no_queued_run_is_lost_when_others_are_cancelled,
    a_changed_plan_holds_for_tenants_that_exist,
    a_deletion_may_be_repeated,
    a_tenant_holds_a_bounded_number_of_streams,
    a_provider_that_asks_for_a_day_is_unavailable,
);

/// All fields of the plan PRO, with this cap.
fn pro(builder: TestAppBuilder, max_concurrent_runs: &str) -> TestAppBuilder {
    [
        ("BASE_PRICE", "49"),
        ("INCLUDED_TOKENS", "10000000"),
        ("OVERAGE_PER_MILLION", "5"),
        ("MONTHLY_TOKEN_LIMIT", "100000000"),
        ("MAX_CONCURRENT_RUNS", max_concurrent_runs),
        ("REQUESTS_PER_MINUTE", "100000"),
        ("WEIGHT", "4"),
    ]
    .into_iter()
    .fold(builder, |builder, (name, value)| builder.env(&format!("CLOISTER_PLANS__PRO__{name}"), value))
}

/// A mutation of the platform admin's that takes a tenant's id; the payload as it comes.
async fn on_tenant(app: &TestApp, mutation: &str, more: Value) -> Value {
    let input_type = match mutation {
        "updateTenant" => "UpdateTenantInput",
        _ => "TenantIdInput",
    };
    let object = if mutation == "deleteTenant" { "deletedId" } else { "tenant { id }" };
    let text =
        format!("mutation ($input: {input_type}!) {{ {mutation}(input: $input) {{ {object} errors {{ code }} }} }}");
    let payload = app.admin().data(&text, json!({"input": more})).await[mutation].clone();
    assert_eq!(payload["errors"], json!([]), "{mutation}");
    payload
}

async fn a_run_may_be_paused_for_longer_than_its_timeout(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    model.always(|_| Reply::text("Done").usage(10, 5));
    let app = builder.model_server(&model).start().await;
    let tenant = app.tenant_with("paused", json!({"plan": "PRO", "monthlyTokenLimit": 100})).await;
    let agent = agent(&tenant.client, "Agent", json!({})).await;
    let input = json!({"agentId": agent, "input": "Hi", "timeoutSeconds": 1});
    let run = try_start(&tenant.client, input).await["run"]["id"].as_str().unwrap().to_owned();
    until(&tenant.client, &run, "PAUSED_QUOTA").await;
    // The subject is time itself.
    sleep(Duration::from_millis(1_300)).await;
    on_tenant(&app, "updateTenant", json!({"tenantId": tenant.id, "monthlyTokenLimit": 100_000})).await;
    on_run(&tenant.client, "resumeRun", &run).await;
    until(&tenant.client, &run, "SUCCEEDED").await;
    assert_eq!(look(&tenant.client, &run).await["status"], "SUCCEEDED");
}

async fn a_suspension_uses_none_of_a_runs_time(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    model.script([Reply::text("Cut off by the suspension").hold(), Reply::text("Done").usage(10, 5)]);
    let app = builder.model_server(&model).start().await;
    let tenant = app.tenant("suspended").await;
    let agent = agent(&tenant.client, "Agent", json!({})).await;
    let input = json!({"agentId": agent, "input": "Hi", "timeoutSeconds": 2});
    let run = try_start(&tenant.client, input).await["run"]["id"].as_str().unwrap().to_owned();
    model.wait_for_held(1).await;
    on_tenant(&app, "suspendTenant", json!({"tenantId": tenant.id})).await;
    sleep(Duration::from_millis(2_300)).await;
    on_tenant(&app, "resumeTenant", json!({"tenantId": tenant.id})).await;
    until(&tenant.client, &run, "SUCCEEDED").await;
    assert_eq!(look(&tenant.client, &run).await["status"], "SUCCEEDED");
    model.release_all();
}

async fn no_queued_run_is_lost_when_others_are_cancelled(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    model.script([Reply::text("First").usage(10, 5).hold()]);
    model.always(|_| Reply::text("Done").usage(10, 5));
    let app = pro(builder, "1").model_server(&model).start().await;
    let tenant = app.tenant("queue").await;
    let client = &tenant.client;
    let agent = agent(client, "Agent", json!({})).await;
    let mut kept = vec![start(client, &agent, "Hi").await];
    model.wait_for_held(1).await;
    for _ in 0..25 {
        let doomed = start(client, &agent, "Hi").await;
        let (cancelled, started) = tokio::join!(on_run(client, "cancelRun", &doomed), start(client, &agent, "Hi"));
        assert_eq!(cancelled["errors"], json!([]));
        kept.push(started);
    }
    model.release_all();
    join_all(kept.iter().map(|run| until(client, run, "SUCCEEDED"))).await;
    for run in &kept {
        assert_eq!(look(client, run).await["status"], "SUCCEEDED");
    }
}

async fn a_changed_plan_holds_for_tenants_that_exist(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    model.always(|_| Reply::text("Held").usage(10, 5).hold());
    let builder = pro(builder, "1").env("CLOISTER_RUNS__LEASE_SECONDS", "3");
    let mut app = builder.model_server(&model).start().await;
    let tenant = app.tenant("grown").await;
    let agent = agent(&tenant.client, "Agent", json!({})).await;
    for _ in 0..3 {
        start(&tenant.client, &agent, "Hi").await;
    }
    model.wait_for_held(1).await;
    app.set_env("CLOISTER_PLANS__PRO__MAX_CONCURRENT_RUNS", "3");
    app.kill();
    app.restart().await;
    // The one that was cut off, and all three at once: none is let go.
    model.wait_for_requests(4).await;
    model.release_all();
}

async fn a_deletion_may_be_repeated(builder: TestAppBuilder) {
    let app = builder.start().await;
    let tenant = app.tenant("gone").await;
    for _ in 0..2 {
        let payload = on_tenant(&app, "deleteTenant", json!({"tenantId": tenant.id})).await;
        assert_eq!(payload["deletedId"], tenant.id.as_str());
    }
}

async fn a_tenant_holds_a_bounded_number_of_streams(builder: TestAppBuilder) {
    let app = builder.env("CLOISTER_GRAPHQL__MAX_STREAMS_PER_TENANT", "2").start().await;
    let (tenant, other) = (app.tenant("greedy").await, app.tenant("other").await);
    let query = "subscription { usage { totalTokens } }";
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut stream = tenant.client.subscribe_sse(query, json!({})).await;
        assert_eq!(stream.next_result().await.unwrap()["data"]["usage"]["totalTokens"], 0);
        held.push(stream);
    }
    let Err(refused) = tenant.client.try_subscribe_sse(query, json!({})).await else {
        panic!("a third stream is held")
    };
    assert_eq!((refused.status.as_u16(), refused.error_code()), (400, Some("LIMIT_EXCEEDED")));
    // Others have their own, and a stream that ends makes room.
    other.client.subscribe_sse(query, json!({})).await.next_result().await.unwrap();
    drop(held.pop());
    while tenant.client.try_subscribe_sse(query, json!({})).await.is_err() {
        tokio::task::yield_now().await;
    }
}

async fn a_provider_that_asks_for_a_day_is_unavailable(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    model.script([Reply::status(429).retry_after(86_400)]);
    let app = builder.model_server(&model).start().await;
    let tenant = app.tenant("patient").await;
    let agent = agent(&tenant.client, "Agent", json!({})).await;
    let run = start(&tenant.client, &agent, "Hi").await;
    until(&tenant.client, &run, "FAILED").await;
    assert_eq!(look(&tenant.client, &run).await["error"]["code"], "MODEL_UNAVAILABLE");
    assert_eq!(model.requests().len(), 1);
}
