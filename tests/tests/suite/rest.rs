//! The seed's two routes, `POST /v1/run` and `GET /v1/usage`: their exact shapes and statuses.

use cloister_tests::app::{SCRIPTED_MODEL, TestAppBuilder};
use cloister_tests::client::http;
use cloister_tests::{GraphqlResponse, ModelServer, Reply, Tenant};
use serde_json::{Value, json};

use crate::both::on_both;
use crate::calls::{done, ended, eventually, missing, new_agent, new_key, text, uuid_of};

on_both!(
    a_run_is_answered_and_its_usage_told_in_the_seeds_shape,
    what_is_wrong_has_its_status,
    a_run_that_fails_is_a_bad_gateway,
    a_run_that_goes_on_is_a_gateway_timeout,
    a_client_that_leaves_changes_nothing,
    a_quota_used_up_is_too_many_requests,
);

/// An agent on the scripted model.
async fn scripted(tenant: &Tenant) -> String {
    new_agent(&tenant.client, json!({"model": SCRIPTED_MODEL})).await
}

async fn run(tenant: &Tenant, agent: &str, message: &str) -> GraphqlResponse {
    tenant.client.rest_post("/v1/run", &json!({"agent_id": agent, "message": message})).await
}

/// Asserts an error's status and that it is `{detail}` and no more; its text.
fn detail(answer: &GraphqlResponse, status: u16) -> String {
    assert_eq!(answer.status.as_u16(), status, "{}", answer.body);
    assert_eq!(answer.body.as_object().map(|body| body.len()), Some(1), "{}", answer.body);
    text(&answer.body, "/detail")
}

async fn a_run_is_answered_and_its_usage_told_in_the_seeds_shape(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    let app = builder.model_server(&model).start().await;
    let tenant = app.tenant("alpha").await;
    let agent = scripted(&tenant).await;
    let usage = tenant.client.rest_get("/v1/usage").await;
    let nothing = json!({
        "monthly_usage": {"total_tokens": 0, "total_cost": 0.0, "request_count": 0},
        "monthly_limit": 100_000_000, "plan": "pro"
    });
    assert_eq!((usage.status.as_u16(), usage.body), (200, nothing));

    model.script([Reply::text("Hello there.").usage(11, 4), Reply::text("Again.").usage(20, 5).cached(10)]);
    let first = run(&tenant, &agent, "Hi").await;
    let expected = json!({"response": "Hello there.", "tokens_used": 15, "model": SCRIPTED_MODEL});
    assert_eq!((first.status.as_u16(), &first.body), (200, &expected));
    assert_eq!(first.header("ratelimit-limit"), Some("600"));
    assert_eq!(first.header("content-type"), Some("application/json"));
    // The seed's ids are UUIDs; and a bearer token is as good.
    let bearer = tenant.client.request(reqwest::Method::POST, "/v1/run");
    let body = json!({"agent_id": uuid_of(&agent).to_string(), "message": "Hi"});
    let second = bearer.json(&body).send().await.unwrap();
    assert_eq!(second.status(), 200);
    let second: Value = serde_json::from_str(&second.text().await.unwrap()).unwrap();
    assert_eq!(second, json!({"response": "Again.", "tokens_used": 25, "model": SCRIPTED_MODEL}));

    // 21 uncached input tokens at 1 USD per million, 10 from the cache at 0.50, 9 of output at 2.
    let usage = tenant.client.rest_get("/v1/usage").await;
    let spent = json!({
        "monthly_usage": {"total_tokens": 40, "total_cost": 0.000044, "request_count": 2},
        "monthly_limit": 100_000_000, "plan": "pro"
    });
    assert_eq!((usage.status.as_u16(), usage.body), (200, spent));
    // A tenant's own limit goes before its plan's; another tenant's usage is its own.
    done(&app.admin(), "updateTenant", json!({"tenantId": tenant.id, "monthlyTokenLimit": 77})).await;
    assert_eq!(tenant.client.rest_get("/v1/usage").await.body["monthly_limit"], 77);
    let other = app.tenant_with("beta", json!({"plan": "FREE"})).await;
    let usage = other.client.rest_get("/v1/usage").await.body;
    assert_eq!(
        (&usage["monthly_usage"]["total_tokens"], &usage["monthly_limit"], &usage["plan"]),
        (&json!(0), &json!(1_000_000), &json!("free"))
    );
}

async fn what_is_wrong_has_its_status(builder: TestAppBuilder) {
    let app = builder.start().await;
    let (tenant, other) = (app.tenant("alpha").await, app.tenant("beta").await);
    let agent = new_agent(&tenant.client, json!({})).await;
    let draft = new_agent(&tenant.client, json!({"publish": false})).await;
    let deleted = new_agent(&tenant.client, json!({})).await;
    done(&tenant.client, "deleteAgent", json!({"agentId": deleted})).await;
    let foreign = new_agent(&other.client, json!({})).await;
    let (_, reader) = new_key(&tenant.client, json!({"name": "r", "scopes": ["READ"]})).await;
    let (_, runner) = new_key(&tenant.client, json!({"name": "r", "scopes": ["RUN"]})).await;
    let body = json!({"agent_id": agent, "message": "Hi"});

    assert!(!detail(&app.anonymous().rest_post("/v1/run", &body).await, 401).is_empty());
    assert!(!detail(&app.anonymous().rest_get("/v1/usage").await, 401).is_empty());
    assert!(detail(&app.client(&reader).rest_post("/v1/run", &body).await, 403).contains("RUN"));
    assert!(detail(&app.client(&runner).rest_get("/v1/usage").await, 403).contains("READ"));
    assert!(detail(&app.admin().rest_post("/v1/run", &body).await, 403).contains("admin"));

    // Another tenant's agent answers as one that nobody has, to the letter.
    let nobody = detail(&run(&tenant, &missing("agt"), "Hi").await, 404);
    for id in [foreign.clone(), uuid_of(&foreign).to_string(), deleted.clone(), uuid::Uuid::now_v7().to_string()] {
        assert_eq!(detail(&run(&tenant, &id, "Hi").await, 404), nobody, "{id}");
    }
    assert!(detail(&run(&tenant, &draft, "Hi").await, 409).contains("publish"));

    let raw = async |body: &str| {
        let request = tenant.client.request(reqwest::Method::POST, "/v1/run");
        let response = request.header("content-type", "application/json").body(body.to_owned()).send().await.unwrap();
        let status = response.status().as_u16();
        let body: Value = serde_json::from_str(&response.text().await.unwrap()).unwrap();
        assert_eq!(body.as_object().map(|body| body.len()), Some(1), "{body}");
        (status, text(&body, "/detail"))
    };
    let object = |agent: Value, message: Value| json!({"agent_id": agent, "message": message}).to_string();
    for (body, said) in [
        (String::new(), "malformed"),
        ("{".to_owned(), "malformed"),
        ("[]".to_owned(), "malformed"),
        ("null".to_owned(), "malformed"),
        ("\"text\"".to_owned(), "malformed"),
        (json!({"message": "Hi"}).to_string(), "agent_id"),
        (json!({"agent_id": agent}).to_string(), "message"),
        (object(json!(5), json!("Hi")), "malformed"),
        (object(Value::Null, json!("Hi")), "malformed"),
        (object(json!(agent), json!(["Hi"])), "malformed"),
        (object(json!(agent), Value::Null), "malformed"),
        (object(json!(""), json!("Hi")), "agent_id"),
        (object(json!("nonsense"), json!("Hi")), "agent_id"),
        (object(json!(missing("run")), json!("Hi")), "agent_id"),
        (object(json!(format!("{agent}\u{0}")), json!("Hi")), "agent_id"),
        (object(json!(agent), json!("")), "message: This must not be empty."),
        (object(json!(agent), json!(" \n ")), "message: This must not be empty."),
        (object(json!(agent), json!("a\u{0}b")), "message: This must not contain the NUL character."),
        (object(json!(agent), json!("x".repeat(200_001))), "message: This may have 200000 characters; it has 200001."),
    ] {
        let (status, answered) = raw(&body).await;
        let shown: String = body.chars().take(80).collect();
        assert_eq!(status, 422, "{shown}: {answered}");
        assert!(answered.contains(said), "{shown}: {answered}");
    }
    let (status, answered) = raw(&object(json!(agent), json!("x".repeat(2 * 1024 * 1024)))).await;
    assert_eq!(status, 413, "{answered}");
    assert!(answered.contains("1048576 bytes"), "{answered}");
    // Nothing of all this was started.
    let runs = tenant.client.data("{ runs { nodes { id } } }", json!({})).await;
    assert_eq!(runs["runs"]["nodes"], json!([]));
}

async fn a_run_that_fails_is_a_bad_gateway(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    let app = builder.model_server(&model).start().await;
    let tenant = app.tenant("alpha").await;
    let agent = scripted(&tenant).await;
    model.script([Reply::status(400).error_message("secret-inside-text")]);
    let failed = run(&tenant, &agent, "Hi").await;
    assert!(detail(&failed, 502).starts_with("The run failed: "), "{}", failed.body);
    assert!(!app.log().contains("secret-inside-text"), "what a provider says of a tenant's call is not logged");
    let usage = tenant.client.rest_get("/v1/usage").await;
    assert_eq!(usage.body["monthly_usage"]["total_tokens"], 0);
    model.script([Reply::refusal("I will not.").usage(5, 3)]);
    assert!(detail(&run(&tenant, &agent, "Hi").await, 502).starts_with("The run failed: "));
    assert_eq!(tenant.client.rest_get("/v1/usage").await.body["monthly_usage"]["total_tokens"], 8);
}

async fn a_run_that_goes_on_is_a_gateway_timeout(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    let app = builder.model_server(&model).env("CLOISTER_SERVER__RUN_WAIT_SECONDS", "1").start().await;
    let tenant = app.tenant("alpha").await;
    let agent = scripted(&tenant).await;
    model.script([Reply::text("Late.").usage(3, 2).hold()]);
    let said = detail(&run(&tenant, &agent, "Hi").await, 504);
    let id = said.trim_end_matches('.').rsplit(' ').next().unwrap().to_owned();
    assert!(id.starts_with("run_"), "{said}");
    // It goes on all the same, and can be asked for.
    assert!(model.release());
    assert_eq!(ended(&tenant.client, &id).await, "SUCCEEDED");
    assert_eq!(tenant.client.rest_get("/v1/usage").await.body["monthly_usage"]["total_tokens"], 5);
}

async fn a_client_that_leaves_changes_nothing(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    let app = builder.model_server(&model).start().await;
    let tenant = app.tenant("alpha").await;
    let agent = scripted(&tenant).await;
    model.script([Reply::text("Nobody hears this.").usage(7, 4).hold()]);
    let request = http().post(format!("{}/v1/run", app.url())).header("x-api-key", &tenant.key);
    let waiting = tokio::spawn(request.json(&json!({"agent_id": agent, "message": "Hi"})).send());
    model.wait_for_held(1).await;
    waiting.abort();
    assert!(waiting.await.unwrap_err().is_cancelled());
    assert!(model.release());
    let runs = async || {
        let runs = tenant.client.data("{ runs { nodes { id status output usage { totalTokens } } } }", json!({})).await;
        runs["runs"]["nodes"].clone()
    };
    let runs = eventually("the run's end", runs, |runs| runs[0]["status"] == "SUCCEEDED").await;
    assert_eq!(runs.as_array().map(Vec::len), Some(1));
    assert_eq!((&runs[0]["output"], &runs[0]["usage"]["totalTokens"]), (&json!("Nobody hears this."), &json!(11)));
    assert_eq!(tenant.client.rest_get("/v1/usage").await.body["monthly_usage"]["request_count"], 1);
}

async fn a_quota_used_up_is_too_many_requests(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    let app = builder.model_server(&model).start().await;
    let none = app.tenant_with("none", json!({"plan": "PRO", "monthlyTokenLimit": 0})).await;
    let agent = scripted(&none).await;
    let refused = run(&none, &agent, "Hi").await;
    assert!(detail(&refused, 429).contains("this month's tokens"), "{}", refused.body);
    assert_eq!(none.client.data("{ runs { nodes { id } } }", json!({})).await["runs"]["nodes"], json!([]));
    // One whose tokens run out on the way is paused, and says so.
    let little = app.tenant_with("little", json!({"plan": "PRO", "monthlyTokenLimit": 100})).await;
    let agent = scripted(&little).await;
    let refused = run(&little, &agent, "Hi").await;
    assert!(detail(&refused, 429).contains("paused"), "{}", refused.body);
    let runs = little.client.data("{ runs { nodes { status } } }", json!({})).await;
    assert_eq!(runs["runs"]["nodes"], json!([{"status": "PAUSED_QUOTA"}]));
    assert_eq!(model.served().requests, 0);
}
