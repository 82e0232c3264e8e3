//! Keys at every door: who is let in, what they may do, and for how long.

use std::time::{Duration, Instant};

use cloister_tests::app::TestAppBuilder;
use cloister_tests::client::{WsEvent, http};
use cloister_tests::key::{checksum, random_key};
use cloister_tests::{Client, GraphqlResponse, TestApp};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Error as WsError;

use crate::both::on_both;
use crate::calls::{done, eventually, from_now, missing, mutate, new_agent, new_key, refusals, strings, text};
use crate::generated::{Api, Kind, Root, Values};

on_both!(
    only_a_good_key_opens_a_door,
    a_suspended_tenant_is_refused_until_it_is_resumed,
    a_deleted_tenant_is_refused_for_good,
    each_field_asks_for_its_scope,
    a_key_grants_and_rotates_no_scope_that_it_lacks,
    a_rotated_key_works_on_only_for_its_grace,
    a_key_expires_and_its_last_use_is_written,
    a_revoked_key_ends_what_it_has_opened,
    a_free_tenant_is_held_to_its_rate,
    the_admin_key_is_made_once_and_only_its_hash_is_kept,
    no_key_is_ever_logged,
);

const WHO: &str = "{ viewer { isPlatformAdmin tenant { id } apiKey { id } scopes } }";

/// What each door answers to a caller, with a body that would be refused by itself: the key comes first.
async fn knock(app: &TestApp, key: Option<&str>) -> Vec<(&'static str, u16, Value)> {
    let send = |method: reqwest::Method, path: &str| {
        let request = http().request(method, format!("{}{path}", app.url()));
        match key {
            Some(key) => request.header("x-api-key", key),
            None => request,
        }
    };
    let post = |path: &str| send(reqwest::Method::POST, path).header("content-type", "application/json");
    let mut answers = Vec::new();
    for (door, request) in [
        ("graphql", post("/graphql").body(json!({"query": WHO}).to_string())),
        ("graphql, no JSON", post("/graphql").body("{")),
        ("graphql, another type", send(reqwest::Method::POST, "/graphql").body("x")),
        ("graphql, nothing acceptable", post("/graphql").header("accept", "image/png").body("{")),
        ("sse", post("/graphql").header("accept", "text/event-stream").body("{")),
        ("run", post("/v1/run").body("{")),
        ("usage", send(reqwest::Method::GET, "/v1/usage")),
    ] {
        let response = request.send().await.expect("an answer");
        let status = response.status().as_u16();
        let body = response.text().await.expect("a body");
        answers.push((door, status, serde_json::from_str(&body).unwrap_or(Value::String(body))));
    }
    if let Some(key) = key {
        let opened = app.anonymous().try_ws("graphql-transport-ws", &[("x-api-key", key)]).await;
        let (status, body) = match opened {
            Ok(_) => (101, Value::Null),
            Err(WsError::Http(response)) => {
                let body = response.body().clone().unwrap_or_default();
                (response.status().as_u16(), serde_json::from_slice(&body).unwrap_or_default())
            }
            Err(other) => panic!("the upgrade fails: {other}"),
        };
        answers.push(("ws", status, body));
    }
    answers
}

/// Asserts that every door refuses alike.
async fn assert_shut(app: &TestApp, what: &str, key: Option<&str>, status: u16, code: &str) {
    for (door, answered, body) in knock(app, key).await {
        assert_eq!(answered, status, "{what}, {door}: {body}");
        if matches!(door, "run" | "usage") {
            assert_eq!(body.as_object().map(|body| body.len()), Some(1), "{what}, {door}: {body}");
            assert!(body["detail"].is_string(), "{what}, {door}: {body}");
        } else {
            assert_eq!(body["errors"][0]["extensions"]["code"], code, "{what}, {door}: {body}");
            assert!(body["errors"][0]["extensions"]["traceId"].is_string(), "{what}, {door}: {body}");
            assert!(body.get("data").is_none(), "{what}, {door}: {body}");
        }
    }
    // Without a key in the headers a socket opens, and `connection_init` must bring it.
    let mut ws = app.anonymous().ws().await;
    let payload = key.map_or(json!({}), |key| json!({"X-API-Key": key}));
    ws.send(&json!({"type": "connection_init", "payload": payload})).await;
    assert_eq!(ws.next().await.close_code(), Some(4403), "{what}");
}

async fn only_a_good_key_opens_a_door(builder: TestAppBuilder) {
    let app = builder.start().await;
    let tenant = app.tenant("alpha").await;
    let (revoked_id, revoked) = new_key(&tenant.client, json!({"name": "revoked"})).await;
    done(&tenant.client, "revokeApiKey", json!({"apiKeyId": revoked_id})).await;
    let (inactive_id, inactive) = new_key(&tenant.client, json!({"name": "inactive"})).await;
    done(&tenant.client, "updateApiKey", json!({"apiKeyId": inactive_id, "isActive": false})).await;
    let (rotated_id, rotated) = new_key(&tenant.client, json!({"name": "rotated"})).await;
    done(&tenant.client, "rotateApiKey", json!({"apiKeyId": rotated_id})).await;
    let mut typo = tenant.key.clone().into_bytes();
    typo[20] = if typo[20] == b'a' { b'b' } else { b'a' };
    let typo = String::from_utf8(typo).unwrap();
    // The right public id and checksum, the wrong secret.
    let guessed = format!("{}_{}", &tenant.key[..16], "0".repeat(32));
    let guessed = format!("{guessed}{}", checksum(&guessed));
    for (what, key) in [
        ("no key", None),
        ("an empty key", Some("")),
        ("nonsense", Some("nonsense")),
        ("an unknown key", Some(random_key().as_str())),
        ("a bad checksum", Some(typo.as_str())),
        ("a guessed secret", Some(guessed.as_str())),
        ("a revoked key", Some(revoked.as_str())),
        ("an inactive key", Some(inactive.as_str())),
        ("a rotated key", Some(rotated.as_str())),
    ] {
        assert_shut(&app, what, key, 401, "UNAUTHENTICATED").await;
    }
    // An operation before `connection_init` is told apart.
    let mut ws = app.anonymous().ws().await;
    ws.subscribe("1", WHO, json!({})).await;
    assert_eq!(ws.next().await.close_code(), Some(4401));
    // The good key opens them all; only what it asks for is wrong then.
    let statuses: Vec<(&str, u16)> =
        knock(&app, Some(&tenant.key)).await.into_iter().map(|(door, status, _)| (door, status)).collect();
    assert_eq!(
        statuses,
        [
            ("graphql", 200),
            ("graphql, no JSON", 400),
            ("graphql, another type", 415),
            ("graphql, nothing acceptable", 406),
            ("sse", 400),
            ("run", 422),
            ("usage", 200),
            ("ws", 101)
        ]
    );
    // In either header, and made active again.
    done(&tenant.client, "updateApiKey", json!({"apiKeyId": inactive_id, "isActive": true})).await;
    let viewer = app.client(&inactive).data(WHO, json!({})).await;
    assert_eq!(
        viewer["viewer"],
        json!({"isPlatformAdmin": false, "tenant": {"id": tenant.id}, "apiKey": {"id": inactive_id}, "scopes": ["READ", "RUN"]})
    );
    let viewer = app.admin().data(WHO, json!({})).await;
    assert_eq!(viewer["viewer"], json!({"isPlatformAdmin": true, "tenant": null, "apiKey": null, "scopes": []}));
}

async fn a_suspended_tenant_is_refused_until_it_is_resumed(builder: TestAppBuilder) {
    let app = builder.start().await;
    let (tenant, other) = (app.tenant("alpha").await, app.tenant("beta").await);
    let mut ws = tenant.client.ws_ready().await;
    ws.subscribe("1", "subscription { usage { totalTokens } }", json!({})).await;
    assert_eq!(ws.next().await.message()["payload"]["data"]["usage"]["totalTokens"], 0);
    let mut sse = tenant.client.subscribe_sse("subscription { usage { totalTokens } }", json!({})).await;
    assert_eq!(sse.next_result().await.unwrap()["data"]["usage"]["totalTokens"], 0);

    let suspended = done(&app.admin(), "suspendTenant", json!({"tenantId": tenant.id})).await;
    assert_eq!(suspended["tenant"]["status"], "SUSPENDED");
    assert_shut(&app, "a suspended tenant", Some(&tenant.key), 403, "TENANT_SUSPENDED").await;
    assert_eq!(ws.next().await.close_code(), Some(4403));
    let last = sse.next_result().await.expect("the refusal");
    assert_eq!(last["errors"][0]["extensions"]["code"], "TENANT_SUSPENDED");
    assert_eq!((sse.next_result().await, sse.completed()), (None, true));
    assert_eq!(other.client.query(WHO, json!({})).await.status, 200);

    let resumed = done(&app.admin(), "resumeTenant", json!({"tenantId": tenant.id})).await;
    assert_eq!(resumed["tenant"]["status"], "ACTIVE");
    assert_eq!(tenant.client.data(WHO, json!({})).await["viewer"]["tenant"]["id"], tenant.id.as_str());
    tenant.client.ws_ready().await;
}

async fn a_deleted_tenant_is_refused_for_good(builder: TestAppBuilder) {
    let app = builder.start().await;
    let tenant = app.tenant("alpha").await;
    let mut ws = tenant.client.ws_ready().await;
    let deleted = done(&app.admin(), "deleteTenant", json!({"tenantId": tenant.id})).await;
    assert_eq!(deleted["deletedId"], tenant.id.as_str());
    assert_eq!(ws.next().await.close_code(), Some(4403));
    assert_shut(&app, "a deleted tenant", Some(&tenant.key), 403, "TENANT_SUSPENDED").await;
    let resumed = mutate(&app.admin(), "resumeTenant", json!({"tenantId": tenant.id})).await;
    assert_eq!(refusals(&resumed, "resumeTenant"), [("STATE".to_owned(), "tenantId".to_owned())]);
    let key = mutate(&app.admin(), "createApiKey", json!({"tenantId": tenant.id, "name": "new"})).await;
    assert_eq!(refusals(&key, "createApiKey"), [("NOT_FOUND".to_owned(), "tenantId".to_owned())]);
    assert_eq!(tenant.client.query(WHO, json!({})).await.status, 403);
}

/// What a root field asks for: one of these scopes, the platform admin, or no more than a key.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Asks {
    Any,
    OneOf(&'static [&'static str]),
    Admin,
}

/// The brackets of the settled schema. A new root field must be added here, or the test fails.
fn asks(root: &Root) -> Asks {
    use Asks::{Admin, Any, OneOf};
    match (root.kind, root.name.as_str()) {
        (Kind::Query, "viewer" | "models" | "plans") => Any,
        // By the kind of the id, which is asked for on its own.
        (Kind::Query, "node") => Any,
        (Kind::Query, "tenant" | "agents" | "agent" | "usage") => OneOf(&["READ"]),
        // RUN includes reading runs and conversations.
        (Kind::Query, "runs" | "run" | "conversation" | "conversations") => OneOf(&["READ", "RUN"]),
        (Kind::Query, "apiKeys") => OneOf(&["MANAGE"]),
        (Kind::Query, "invoice") => OneOf(&["BILLING"]),
        (Kind::Query, "tenants" | "tenantById") => Admin,
        (
            Kind::Mutation,
            "createTenant" | "updateTenant" | "setTenantPlan" | "suspendTenant" | "resumeTenant" | "deleteTenant"
            | "createRuntimeToken" | "rotateRuntimeToken" | "revokeRuntimeToken",
        ) => Admin,
        (
            Kind::Mutation,
            "createApiKey"
            | "updateApiKey"
            | "rotateApiKey"
            | "revokeApiKey"
            | "rotateWebhookSecret"
            | "createAgent"
            | "updateAgent"
            | "publishAgent"
            | "rollbackAgent"
            | "deleteAgent",
        ) => OneOf(&["MANAGE"]),
        (Kind::Mutation, "startRun" | "cancelRun" | "resumeRun" | "decideToolCall" | "deleteConversation") => {
            OneOf(&["RUN"])
        }
        (Kind::Subscription, "runEvents" | "runs") => OneOf(&["READ", "RUN"]),
        (Kind::Subscription, "usage") => OneOf(&["READ"]),
        (Kind::Subscription, "provisioning") => OneOf(&["MANAGE"]),
        _ => panic!("{} is new: say in asks() which scope it asks for", root.path()),
    }
}

/// Ids that nobody has: whether a caller may ask is decided before whether there is anything.
struct Nobody;

impl Values for Nobody {
    fn id(&self, slot: &[String]) -> String {
        let name = slot.last().map(String::as_str).unwrap_or_default();
        let prefixes =
            [("agent", "agt"), ("run", "run"), ("conversation", "cnv"), ("apiKey", "key"), ("tenant", "ten")];
        let prefix = prefixes.iter().find(|(start, _)| name.starts_with(start));
        missing(prefix.map_or("agt", |(_, prefix)| prefix))
    }
}

/// The code of the first error, if the call has any. `may`: whether the caller is expected to have the right.
async fn code(client: &Client, root: &Root, document: &str, variables: Value, may: bool) -> Option<String> {
    let code = |body: &Value| body["errors"][0]["extensions"]["code"].as_str().map(str::to_owned);
    if root.kind != Kind::Subscription {
        return code(&client.query(document, variables).await.body);
    }
    let mut results = client.subscribe_sse(document, variables).await;
    if !may {
        return code(&results.next_result().await.expect("a refusal"));
    }
    // One with the right may say nothing for ever: `runs`, where nothing runs.
    let first = tokio::time::timeout(Duration::from_millis(200), results.next_result()).await;
    first.ok().flatten().and_then(|first| code(&first))
}

async fn each_field_asks_for_its_scope(builder: TestAppBuilder) {
    let app = builder.start().await;
    let tenant = app.tenant("alpha").await;
    let api = Api::read(&tenant.client).await;
    let scopes = ["READ", "RUN", "MANAGE", "BILLING"];
    for scope in scopes {
        let (_, key) = new_key(&tenant.client, json!({"name": scope, "scopes": [scope]})).await;
        let client = app.client(&key);
        for root in api.roots().into_iter().filter(|root| root.name != "node") {
            let may = match asks(&root) {
                Asks::Any => true,
                Asks::OneOf(scopes) => scopes.contains(&scope),
                Asks::Admin => false,
            };
            let (document, variables) = api.call(&root, None, &Nobody, 0);
            let code = code(&client, &root, &document, variables, may).await;
            assert_eq!(code.as_deref() == Some("FORBIDDEN"), !may, "{} with {scope}: {code:?}", root.path());
        }
        // `node` needs what the type's own root field needs.
        let run_reads = matches!(scope, "READ" | "RUN");
        for (id, may) in [
            (tenant.id.clone(), scope == "READ"),
            (missing("key"), scope == "MANAGE"),
            (missing("agt"), scope == "READ"),
            (missing("agv"), scope == "READ"),
            (missing("cnv"), run_reads),
            (missing("run"), run_reads),
        ] {
            let node = client.query("query ($id: ID!) { node(id: $id) { id } }", json!({"id": id})).await;
            assert_eq!(node.error_code() == Some("FORBIDDEN"), !may, "{id} with {scope}: {}", node.body);
        }
        // The parts of a tenant ask for their own.
        for (part, needed) in [
            ("apiKeys { nodes { id } }", "MANAGE"),
            ("provisioning { phase }", "MANAGE"),
            ("agents { nodes { id } }", "READ"),
            ("usage { totalTokens }", "READ"),
            ("invoice { total }", "BILLING"),
        ] {
            let part = client.query(&format!("{{ viewer {{ tenant {{ {part} }} }} }}"), json!({})).await;
            assert_eq!(part.error_code() == Some("FORBIDDEN"), scope != needed, "{needed} with {scope}: {}", part.body);
        }
        // The seed's routes.
        let run = client.rest_post("/v1/run", &json!({"agent_id": missing("agt"), "message": "Hi"})).await;
        assert_eq!(run.status.as_u16(), if scope == "RUN" { 404 } else { 403 }, "{scope}: {}", run.body);
        let usage = client.rest_get("/v1/usage").await;
        assert_eq!(usage.status.as_u16(), if scope == "READ" { 200 } else { 403 }, "{scope}: {}", usage.body);
    }
    // The platform admin may do what is the admin's, and has no tenant to do the rest with.
    for root in api.roots().into_iter().filter(|root| root.name != "node") {
        let (document, variables) = api.call(&root, None, &Nobody, 0);
        let may = matches!(asks(&root), Asks::Any | Asks::Admin) || root.name == "createApiKey";
        let code = code(&app.admin(), &root, &document, variables, may).await;
        assert_eq!(code.as_deref() == Some("FORBIDDEN"), !may, "{} by the admin: {code:?}", root.path());
    }
}

async fn a_key_grants_and_rotates_no_scope_that_it_lacks(builder: TestAppBuilder) {
    let app = builder.start().await;
    let tenant = app.tenant("alpha").await;
    let (_, manager) = new_key(&tenant.client, json!({"name": "manager", "scopes": ["MANAGE", "READ"]})).await;
    let manager = app.client(&manager);
    let refused = |field: &str| vec![("INVALID".to_owned(), field.to_owned())];
    for scopes in [json!(["BILLING"]), json!(["READ", "RUN"]), json!(["READ", "RUN", "MANAGE", "BILLING"])] {
        let made = mutate(&manager, "createApiKey", json!({"name": "more", "scopes": scopes})).await;
        assert_eq!(refusals(&made, "createApiKey"), refused("scopes"), "{scopes}");
    }
    // What a key has unless said otherwise is READ and RUN, and RUN it lacks.
    let made = mutate(&manager, "createApiKey", json!({"name": "default"})).await;
    assert_eq!(refusals(&made, "createApiKey"), refused("scopes"));
    let (own_id, own) = new_key(&manager, json!({"name": "less", "scopes": ["READ"]})).await;
    let grown = mutate(&manager, "updateApiKey", json!({"apiKeyId": own_id, "scopes": ["READ", "BILLING"]})).await;
    assert_eq!(refusals(&grown, "updateApiKey"), refused("scopes"));
    let emptied = mutate(&manager, "updateApiKey", json!({"apiKeyId": own_id, "scopes": []})).await;
    assert_eq!(refusals(&emptied, "updateApiKey"), refused("scopes"));

    // Rotating would hand over a secret with the key's scopes.
    let (strong_id, strong) = new_key(&tenant.client, json!({"name": "strong", "scopes": ["BILLING"]})).await;
    let rotated = mutate(&manager, "rotateApiKey", json!({"apiKeyId": strong_id})).await;
    assert_eq!(refusals(&rotated, "rotateApiKey"), refused("apiKeyId"));
    assert_eq!(rotated.data()["rotateApiKey"]["secret"], Value::Null);
    assert_eq!(app.client(&strong).query(WHO, json!({})).await.status, 200);
    assert_eq!(app.client(&own).data(WHO, json!({})).await["viewer"]["scopes"], json!(["READ"]));
    done(&manager, "rotateApiKey", json!({"apiKeyId": own_id})).await;
    // The admin may give any, and must name the tenant.
    let made =
        done(&app.admin(), "createApiKey", json!({"tenantId": tenant.id, "name": "n", "scopes": ["BILLING"]})).await;
    assert_eq!(made["apiKey"]["scopes"], json!(["BILLING"]));
    let nameless = mutate(&app.admin(), "createApiKey", json!({"name": "n"})).await;
    assert_eq!(refusals(&nameless, "createApiKey"), refused("tenantId"));
}

async fn a_rotated_key_works_on_only_for_its_grace(builder: TestAppBuilder) {
    let app = builder.start().await;
    let tenant = app.tenant("alpha").await;
    let status = async |key: &str| app.client(key).query(WHO, json!({})).await.status.as_u16();
    let (id, first) = new_key(&tenant.client, json!({"name": "k"})).await;
    let rotated = done(&tenant.client, "rotateApiKey", json!({"apiKeyId": id, "graceSeconds": 3})).await;
    let second = text(&rotated, "/secret");
    assert_eq!(text(&rotated, "/apiKey/id"), id);
    assert_eq!(text(&rotated, "/apiKey/prefix"), second[..16]);
    assert_ne!(first, second);
    assert_eq!((status(&first).await, status(&second).await), (200, 200));
    // A socket that the old secret opened ends with it.
    let mut ws = app.client(&first).ws_ready().await;
    assert_eq!(ws.next().await.close_code(), Some(4403));
    assert_eq!((status(&first).await, status(&second).await), (401, 200));
    // Without grace the old one ends at once, and a former one stays dead.
    let third = text(&done(&tenant.client, "rotateApiKey", json!({"apiKeyId": id})).await, "/secret");
    assert_eq!((status(&first).await, status(&second).await, status(&third).await), (401, 401, 200));
    // A grace does not outlive a revocation.
    let fourth = done(&tenant.client, "rotateApiKey", json!({"apiKeyId": id, "graceSeconds": 600})).await;
    let fourth = text(&fourth, "/secret");
    done(&tenant.client, "revokeApiKey", json!({"apiKeyId": id})).await;
    assert_eq!((status(&third).await, status(&fourth).await), (401, 401));
    for name in ["rotateApiKey", "updateApiKey"] {
        let refused = mutate(&tenant.client, name, json!({"apiKeyId": id})).await;
        assert_eq!(refusals(&refused, name), [("STATE".to_owned(), "apiKeyId".to_owned())]);
    }
}

async fn a_key_expires_and_its_last_use_is_written(builder: TestAppBuilder) {
    let app = builder.start().await;
    let tenant = app.tenant("alpha").await;
    let input = json!({"name": "short", "expiresAt": from_now(1_500)});
    let (id, key) = new_key(&tenant.client, input).await;
    let one =
        "query ($id: ID!) { node(id: $id) { ... on ApiKey { lastUsedAt createdAt expiresAt revokedAt isActive } } }";
    let read = async || tenant.client.data(one, json!({"id": id})).await["node"].clone();
    assert_eq!(read().await["lastUsedAt"], Value::Null);
    let mut ws = app.client(&key).ws_ready().await;
    assert_eq!(ws.next().await.close_code(), Some(4403));
    assert_shut(&app, "an expired key", Some(&key), 401, "UNAUTHENTICATED").await;
    let row = eventually("the last use", read, |key| key["lastUsedAt"].is_string()).await;
    let (used, made) = (text(&row, "/lastUsedAt"), text(&row, "/createdAt"));
    assert!(made < used && used < text(&row, "/expiresAt"), "{row}");
    assert_eq!((&row["revokedAt"], &row["isActive"]), (&Value::Null, &json!(true)));
}

async fn a_revoked_key_ends_what_it_has_opened(builder: TestAppBuilder) {
    let app = builder.start().await;
    let tenant = app.tenant("alpha").await;
    let (id, key) = new_key(&tenant.client, json!({"name": "k"})).await;
    let client = app.client(&key);
    let usage = "subscription { usage { totalTokens } }";
    let mut ws = client.ws_ready().await;
    ws.subscribe("1", usage, json!({})).await;
    assert_eq!(ws.next().await.message()["type"], "next");
    let mut sse = client.subscribe_sse(usage, json!({})).await;
    assert!(sse.next_result().await.unwrap()["data"]["usage"].is_object());
    let mut others = tenant.client.ws_ready().await;

    let revoked = done(&tenant.client, "revokeApiKey", json!({"apiKeyId": id})).await;
    let at = text(&revoked, "/apiKey/revokedAt");
    assert_eq!(revoked["apiKey"]["isActive"], false);
    let closed = ws.next().await;
    assert!(matches!(&closed, WsEvent::Closed { code: 4403, reason } if reason.starts_with("Forbidden")), "{closed:?}");
    let last = sse.next_result().await.expect("the refusal");
    assert_eq!(last["errors"][0]["extensions"]["code"], "UNAUTHENTICATED");
    assert_eq!((sse.next_result().await, sse.completed()), (None, true));
    assert_shut(&app, "a revoked key", Some(&key), 401, "UNAUTHENTICATED").await;
    // Doing it again changes nothing, and another key's socket stays open.
    let again = done(&tenant.client, "revokeApiKey", json!({"apiKeyId": id})).await;
    assert_eq!(text(&again, "/apiKey/revokedAt"), at);
    others.send(&json!({"type": "ping"})).await;
    assert_eq!(others.next().await.message()["type"], "pong");
}

/// Asks until the rate is reached: how often that went well, and the refusal.
async fn until_refused(ask: impl AsyncFn() -> GraphqlResponse) -> (u64, GraphqlResponse) {
    let start = Instant::now();
    for count in 0.. {
        let response = ask().await;
        assert_eq!(response.header("ratelimit-limit"), Some("60"), "{}", response.body);
        if response.status != 200 {
            // One more for each second that passes.
            assert!(count <= 60 + start.elapsed().as_secs() + 1, "{count} requests passed");
            return (count, response);
        }
        let remaining: u64 = response.header("ratelimit-remaining").unwrap().parse().unwrap();
        assert!(remaining + count >= 59 && remaining < 60, "{remaining} after {count}");
    }
    unreachable!("the rate is reached")
}

async fn a_free_tenant_is_held_to_its_rate(builder: TestAppBuilder) {
    let app = builder.start().await;
    let first = app.tenant_with("alpha", json!({"plan": "FREE"})).await;
    let (passed, refused) = until_refused(async || first.client.query("{ viewer { scopes } }", json!({})).await).await;
    assert!(passed >= 60, "only {passed} requests passed");
    assert_eq!((refused.status.as_u16(), refused.error_code()), (429, Some("RATE_LIMITED")), "{}", refused.body);
    assert_eq!(refused.header("ratelimit-remaining"), Some("0"));
    assert_eq!(refused.header("retry-after"), Some("1"));
    assert!(refused.header("ratelimit-reset").is_some());
    // The seed's routes share the allowance with GraphQL.
    let second = app.tenant_with("beta", json!({"plan": "FREE"})).await;
    let (passed, refused) = until_refused(async || second.client.rest_get("/v1/usage").await).await;
    assert!(passed >= 60, "only {passed} requests passed");
    assert_eq!(refused.status, 429);
    assert_eq!(refused.body.as_object().map(|body| body.len()), Some(1));
    assert!(text(&refused.body, "/detail").contains("60 a minute"), "{}", refused.body);
    assert_eq!(refused.header("retry-after"), Some("1"));
    // One tenant's rate is not another's, and the admin has none.
    let third = app.tenant_with("gamma", json!({"plan": "FREE"})).await;
    assert_eq!(third.client.query(WHO, json!({})).await.status, 200);
    let admin = app.admin().query(WHO, json!({})).await;
    assert_eq!((admin.status.as_u16(), admin.header("ratelimit-limit")), (200, None));
}

async fn the_admin_key_is_made_once_and_only_its_hash_is_kept(builder: TestAppBuilder) {
    let mut app = builder.start().await;
    assert_eq!(app.admin().query(WHO, json!({})).await.status, 200);
    assert!(strings(&app.database().await, "SELECT key_hash AS t FROM admin_keys").await.is_empty());
    app.kill();
    let serve = async || {
        let mut command = app.command(&["serve"]);
        command.env_remove("CLOISTER_ADMIN__KEY");
        crate::config::Served::start(command).await
    };
    let first = serve().await;
    let line = first.stderr_line("admin's key").await;
    let key = line.rsplit(' ').next().unwrap().to_owned();
    assert!(key.starts_with("clo_") && key.len() == 55, "{line}");
    assert!(!first.stdout().contains(&key));
    let who = Client::new(&first.url(), &key).data(WHO, json!({})).await;
    assert_eq!(who["viewer"]["isPlatformAdmin"], true);
    // The one from before was the configuration's, and is gone with it.
    assert_eq!(Client::new(&first.url(), &app.admin_key).query(WHO, json!({})).await.status, 401);
    first.end().await;
    let second = serve().await;
    assert_eq!(Client::new(&second.url(), &key).query(WHO, json!({})).await.status, 200);
    assert_eq!(second.end().await, "", "the key is shown once");
    let kept = strings(&app.database().await, "SELECT key_hash AS t FROM admin_keys").await;
    assert_eq!(kept.len(), 1);
    assert!(kept[0].len() == 64 && kept[0].bytes().all(|byte| byte.is_ascii_hexdigit()), "{kept:?}");
}

async fn no_key_is_ever_logged(builder: TestAppBuilder) {
    let app = builder.env("CLOISTER_LOG__FILTER", "info,cloister_api=trace,cloister_runtime=trace").start().await;
    let tenant = app.tenant("alpha").await;
    let (id, key) = new_key(&tenant.client, json!({"name": "k"})).await;
    let rotated = text(&done(&tenant.client, "rotateApiKey", json!({"apiKeyId": id})).await, "/secret");
    let webhook = text(&done(&tenant.client, "rotateWebhookSecret", json!({})).await, "/secret");
    let token = "tok-9f3b1c55a7";
    let tool = json!({"webhook": {"name": "t", "description": "", "url": "https://example.com/", "token": token}});
    new_agent(&tenant.client, json!({"tools": [tool]})).await;
    let unknown = random_key();
    for key in [&key, &rotated, &unknown] {
        knock(&app, Some(key)).await;
    }
    app.client(&rotated).ws_ready().await;
    let secret = webhook.trim_start_matches("whsec_");
    let rows = [
        "SELECT key_hash || coalesce(previous_key_hash, '') AS t FROM api_keys",
        "SELECT webhook_secret || coalesce(previous_webhook_secret, '') AS t FROM tenants",
        "SELECT CAST(definition AS text) AS t FROM agents",
    ];
    let mut kept = String::new();
    for sql in rows {
        kept += &strings(&app.database().await, sql).await.concat();
    }
    for (what, secret) in [
        ("the admin's key", app.admin_key.as_str()),
        ("a key", &tenant.key),
        ("a revoked key", &key),
        ("a rotated key", &rotated),
        ("an unknown key", &unknown),
        ("a webhook secret", secret),
        ("a tool's token", token),
    ] {
        assert!(!app.log().contains(secret), "{what} is in the log");
        assert!(!kept.contains(secret), "{what} is in the database");
    }
    assert!(app.log().contains("listening"));
}
