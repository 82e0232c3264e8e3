//! Objects go: tenants drain, and are kept or deleted.

use cloister_tests::app::TestAppBuilder;
use cloister_tests::{ModelServer, Reply, Worker};
use crds::protocol::{Departure, Farewell};
use entity::runs::Status;
use serde_json::json;

use super::{Operator, bye, is_served, report, seen, tenant, with_operator};
use crate::both::on_both;
use crate::calls::eventually;
use crate::ledger::{agent, look, start, stored_status, try_start, until};

on_both!(
    a_tenant_that_is_kept_waits_for_another_object,
    runs_drain_before_the_end,
    a_tenant_that_is_not_kept_is_deleted,
    a_late_farewell_of_an_earlier_object_changes_nothing,
    an_inventory_lets_go_of_what_is_not_in_it,
);

async fn a_tenant_that_is_kept_waits_for_another_object(builder: TestAppBuilder) {
    let app = with_operator(builder).start().await;
    let (operator, admin) = (Operator::of(&app), app.admin());
    let first = report("acme", "pro");
    let acme = tenant(&app, &operator.report("acme", &first).await).await;
    let gone = Farewell { deregister: true, ..bye("acme-1", true) };
    // As often as it takes.
    for _ in 0..3 {
        assert_eq!(operator.farewell("acme", gone.clone()).await, Departure { running: 0, is_gone: true });
    }
    assert!(!is_served(&acme).await);
    let kept = seen(&admin, &acme.id).await;
    assert_eq!((&kept["status"], kept["provisioning"].is_null()), (&json!("SUSPENDED"), true));
    assert!(operator.farewell("never-there", gone.clone()).await.is_gone);
    assert!(operator.changes(None).await.tenants.is_empty());

    // An object by the same name finds it again, keys, data and all.
    let mut again = first.clone();
    again.uid = "acme-2".to_owned();
    let state = operator.report("acme", &again).await;
    assert_eq!((&state.tenant_id, state.suspended), (&acme.id, None));
    assert!(is_served(&acme).await);
    // With another address it does not.
    let gone = Farewell { uid: "acme-2".to_owned(), ..gone };
    operator.farewell("acme", gone).await;
    let mut stranger = report("acme", "pro");
    (stranger.uid, stranger.tenant.email) = ("acme-3".to_owned(), "mallory@evil.example".to_owned());
    assert_eq!(operator.try_report("acme", &stranger).await.unwrap_err().0, 409);
    assert!(!is_served(&acme).await);
}

async fn runs_drain_before_the_end(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    let app = with_operator(builder).model_server(&model).start().await;
    let operator = Operator::of(&app);
    let acme = tenant(&app, &operator.report("acme", &report("acme", "enterprise")).await).await;
    let agent = agent(&acme.client, "Agent", json!({})).await;
    let token = operator.token("acme", 1).await.unwrap();
    let _worker = Worker::builder(&app, &token.token).start().await;
    model.script([Reply::text("Done.").hold(), Reply::text("held").hold()]);
    let run = start(&acme.client, &agent, "Hi").await;
    model.wait_for_held(1).await;
    assert_eq!(operator.farewell("acme", bye("acme-1", true)).await, Departure { running: 1, is_gone: false });
    // Nothing new begins, and what runs goes on.
    let refused = acme.client.query(
        "mutation ($input: StartRunInput!) { startRun(input: $input) { run { id } errors { code } } }",
        json!({"input": {"agentId": agent, "input": "More"}}),
    );
    assert_eq!(refused.await.error_code(), Some("TENANT_SUSPENDED"));
    assert!(model.release());
    until(&acme.client, &run, "SUCCEEDED").await;
    assert_eq!(operator.farewell("acme", bye("acme-1", true)).await, Departure { running: 0, is_gone: false });
    // A report that overtakes it does not open it again.
    operator.report("acme", &report("acme", "enterprise")).await;
    assert_eq!(operator.farewell("acme", bye("acme-1", true)).await.running, 0);

    // Another object takes over before the end: all goes on.
    let mut again = report("acme", "enterprise");
    again.uid = "acme-2".to_owned();
    operator.report("acme", &again).await;
    let run = start(&acme.client, &agent, "Hi").await;
    let token = operator.token("acme", 1).await.unwrap();
    let _worker = Worker::builder(&app, &token.token).start().await;
    model.wait_for_held(1).await;
    // The time to drain is over: what runs is kept for who takes it over.
    let over = Farewell { cancel: true, ..bye("acme-2", true) };
    assert_eq!(operator.farewell("acme", over).await, Departure { running: 0, is_gone: false });
    stored_status(&app.database().await, &run, Status::Queued).await;
    assert!(model.release());
}

async fn a_tenant_that_is_not_kept_is_deleted(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    let app = with_operator(builder).model_server(&model).start().await;
    let (operator, admin) = (Operator::of(&app), app.admin());
    let acme = tenant(&app, &operator.report("acme", &report("acme", "pro")).await).await;
    let agent = agent(&acme.client, "Agent", json!({})).await;
    model.script([Reply::text("held").hold()]);
    let run = start(&acme.client, &agent, "Hi").await;
    model.wait_for_held(1).await;
    assert_eq!(operator.farewell("acme", bye("acme-1", false)).await, Departure { running: 1, is_gone: false });
    let over = Farewell { cancel: true, ..bye("acme-1", false) };
    assert_eq!(operator.farewell("acme", over).await, Departure { running: 0, is_gone: false });
    assert_eq!(look(&acme.client, &run).await["status"], "CANCELLED");
    assert!(model.release());
    let gone = Farewell { deregister: true, ..bye("acme-1", false) };
    assert!(operator.farewell("acme", gone.clone()).await.is_gone);
    assert!(operator.farewell("acme", gone).await.is_gone);
    assert_eq!(seen(&admin, &acme.id).await["status"], "DELETING");
    assert!(!is_served(&acme).await);
    let mut again = report("acme", "pro");
    again.uid = "acme-2".to_owned();
    assert_ne!(operator.report("acme", &again).await.tenant_id, acme.id);
}

async fn a_late_farewell_of_an_earlier_object_changes_nothing(builder: TestAppBuilder) {
    let app = with_operator(builder).start().await;
    let operator = Operator::of(&app);
    let mut second = report("acme", "pro");
    second.uid = "acme-2".to_owned();
    let acme = tenant(&app, &operator.report("acme", &second).await).await;
    for retain in [true, false] {
        let late = Farewell { uid: "acme-1".to_owned(), retain, cancel: true, deregister: true };
        assert_eq!(operator.farewell("acme", late).await, Departure { running: 0, is_gone: true });
    }
    assert!(is_served(&acme).await);
    let agent = crate::calls::new_agent(&acme.client, json!({})).await;
    assert_eq!(try_start(&acme.client, json!({"agentId": agent, "input": "Hi"})).await["errors"], json!([]));
}

async fn an_inventory_lets_go_of_what_is_not_in_it(builder: TestAppBuilder) {
    let app = with_operator(builder).start().await;
    let operator = Operator::of(&app);
    let elsewhere = operator.in_cluster("another-cluster");
    let (alpha, beta) = (report("alpha", "pro"), report("beta", "pro"));
    let there = tenant(&app, &operator.report("alpha", &alpha).await).await;
    let lost = tenant(&app, &operator.report("beta", &beta).await).await;
    let others = tenant(&app, &elsewhere.report("gamma", &report("gamma", "pro")).await).await;
    // A list that may be older than what was told a moment ago lets go of nothing.
    operator.inventory(&[("alpha", "alpha-1")]).await;
    assert!(is_served(&lost).await);
    let listed = async || {
        operator.inventory(&[("alpha", "alpha-1"), ("unknown", "unknown-1")]).await;
        is_served(&lost).await
    };
    eventually("its object went without a farewell", listed, |is_served| !is_served).await;
    assert!(is_served(&there).await && is_served(&others).await);
    // It comes back with the same object: that was restored, or the list was old.
    assert_eq!(operator.report("beta", &beta).await.suspended, None);
    assert!(is_served(&lost).await);
}
