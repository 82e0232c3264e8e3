//! How far a cluster has come with a tenant, in GraphQL; and what GraphQL may not change of a tenant that an object
//! rules.

use chrono::{DateTime, Utc};
use cloister_tests::app::TestAppBuilder;
use cloister_tests::{RedisServer, TestApp};
use crds::protocol::{Condition, Provisioning, Report};
use serde_json::{Value, json};

use super::{Operator, bye, report, seen, tenant, with_operator};
use crate::both::on_both;
use crate::calls::{done, missing, mutate, new_key};

on_both!(provisioning_is_shown_and_told, what_an_object_rules_is_changed_where_it_is);

const FIELDS: &str = "phase objectName namespace replicas readyReplicas
    conditions { type status reason message lastTransitionTime }";

fn provisioned(phase: &str, ready: i32) -> Provisioning {
    let at: DateTime<Utc> = "2026-11-25T10:00:00Z".parse().unwrap();
    let condition = Condition {
        r#type: "RuntimeAvailable".to_owned(),
        status: if ready > 0 { "True" } else { "False" }.to_owned(),
        reason: "Workers".to_owned(),
        message: format!("{ready} of 2 workers are ready."),
        last_transition_time: at,
    };
    Provisioning {
        phase: phase.to_owned(),
        namespace: Some("tenant-acme".to_owned()),
        replicas: 2,
        ready_replicas: ready,
        conditions: vec![condition],
    }
}

fn at(phase: &str, ready: i32) -> Report {
    Report { provisioning: provisioned(phase, ready), ..report("acme", "enterprise") }
}

fn shown(phase: &str, ready: i32) -> Value {
    json!({
        "phase": phase, "objectName": "acme", "namespace": "tenant-acme", "replicas": 2, "readyReplicas": ready,
        "conditions": [{
            "type": "RuntimeAvailable", "status": if ready > 0 { "TRUE" } else { "FALSE" }, "reason": "Workers",
            "message": format!("{ready} of 2 workers are ready."), "lastTransitionTime": "2026-11-25T10:00:00+00:00",
        }],
    })
}

async fn provisioning_is_shown_and_told(builder: TestAppBuilder) {
    let app = with_operator(builder).start().await;
    let operator = Operator::of(&app);
    let acme = tenant(&app, &operator.report("acme", &at("Provisioning", 0)).await).await;
    let query = format!("{{ tenant {{ provisioning {{ {FIELDS} }} }} }}");
    assert_eq!(acme.client.data(&query, json!({})).await["tenant"]["provisioning"], shown("PROVISIONING", 0));
    let subscription = format!("subscription ($id: ID) {{ provisioning(tenantId: $id) {{ {FIELDS} }} }}");
    let mut own = acme.client.subscribe_sse(&subscription, json!({})).await;
    let mut admins = app.admin().subscribe_sse(&subscription, json!({"id": acme.id})).await;
    for stream in [&mut own, &mut admins] {
        assert_eq!(stream.next_result().await.unwrap()["data"]["provisioning"], shown("PROVISIONING", 0));
    }
    operator.report("acme", &at("Provisioning", 0)).await;
    operator.report("acme", &at("Ready", 2)).await;
    operator.farewell("acme", crds::protocol::Farewell { deregister: true, ..bye("acme-1", true) }).await;
    // What stayed the same is not told; the key of a suspended tenant hears no more.
    assert_eq!(own.next_result().await.unwrap()["data"]["provisioning"], shown("READY", 2));
    assert_eq!(admins.next_result().await.unwrap()["data"]["provisioning"], shown("READY", 2));
    assert_eq!(admins.next_result().await.unwrap()["data"]["provisioning"], Value::Null);

    let shared = app.tenant("shared").await;
    assert_eq!(shared.client.data(&query, json!({})).await["tenant"]["provisioning"], Value::Null);
    let (_, reader) = new_key(&shared.client, json!({"name": "reader", "scopes": ["READ"]})).await;
    assert_eq!(app.client(&reader).query(&query, json!({})).await.error_code(), Some("FORBIDDEN"));
    for (client, id, code) in [
        (&shared.client, json!(acme.id), "FORBIDDEN"),
        (&app.admin(), Value::Null, "FORBIDDEN"),
        (&app.admin(), json!(missing("ten")), "NOT_FOUND"),
    ] {
        let mut refused = client.subscribe_sse(&subscription, json!({"id": id})).await;
        assert_eq!(refused.next_result().await.unwrap()["errors"][0]["extensions"]["code"], code);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_hear_of_it_from_each_other() {
    for with_redis in [true, false] {
        let redis = RedisServer::start().await;
        let builder = with_operator(TestApp::builder().postgres());
        let app = if with_redis { builder.redis(&redis) } else { builder }.start().await;
        let replica = app.replica().await;
        let operator = Operator::of(&app);
        let id = operator.report("acme", &at("Provisioning", 0)).await.tenant_id;
        let subscription = "subscription ($id: ID) { provisioning(tenantId: $id) { phase } }";
        let mut heard = replica.admin().subscribe_sse(subscription, json!({"id": id})).await;
        assert_eq!(heard.next_result().await.unwrap()["data"]["provisioning"]["phase"], "PROVISIONING");
        operator.report("acme", &at("Ready", 2)).await;
        assert_eq!(heard.next_result().await.unwrap()["data"]["provisioning"]["phase"], "READY");
        drop(replica);
    }
}

async fn what_an_object_rules_is_changed_where_it_is(builder: TestAppBuilder) {
    // The api writes no objects: this one is in a cluster that it can't reach.
    let app = with_operator(builder).start().await;
    let (operator, admin) = (Operator::of(&app), app.admin());
    let id = operator.report("acme", &report("acme", "pro")).await.tenant_id;
    for (mutation, input, field) in [
        ("updateTenant", json!({"tenantId": id, "name": "Mine"}), "name"),
        ("updateTenant", json!({"tenantId": id, "monthlyTokenLimit": null}), "monthlyTokenLimit"),
        ("setTenantPlan", json!({"tenantId": id, "plan": "FREE"}), "plan"),
    ] {
        let payload = mutate(&admin, mutation, input).await.data()[mutation].clone();
        let error = &payload["errors"][0];
        assert_eq!((&error["code"], &error["field"]), (&json!("MANAGED_BY_CLUSTER"), &json!([field])), "{payload}");
        assert!(payload["tenant"].is_null() && error["message"].as_str().unwrap().contains("Tenant acme"), "{payload}");
    }
    let tenant = seen(&admin, &id).await;
    assert_eq!((&tenant["name"], &tenant["plan"]["name"]), (&json!("acme Inc."), &json!("PRO")));
    // What has to hold at once holds.
    assert_eq!(done(&admin, "suspendTenant", json!({"tenantId": id})).await["tenant"]["status"], "SUSPENDED");
    assert_eq!(done(&admin, "resumeTenant", json!({"tenantId": id})).await["tenant"]["status"], "ACTIVE");
    done(&admin, "updateTenant", json!({"tenantId": id})).await;
}
