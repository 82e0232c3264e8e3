//! Every reason to suspend a tenant stands by itself.

use cloister_tests::app::TestAppBuilder;
use cloister_tests::{ModelServer, Reply, Worker};
use crds::protocol::Suspension;
use entity::runs::Status;
use serde_json::{Value, json};

use super::{Operator, changed, is_served, report, seen, tenant, with_operator};
use crate::both::on_both;
use crate::calls::{done, mutate, strings};
use crate::ledger::{agent, start, stored_status, until};

on_both!(
    each_reason_stands_by_itself,
    runs_of_a_suspended_tenant_wait_and_go_on,
    a_tenant_that_changes_its_plan_takes_its_queue_along,
);

async fn each_reason_stands_by_itself(builder: TestAppBuilder) {
    let app = with_operator(builder).start().await;
    let (operator, admin) = (Operator::of(&app), app.admin());
    let first = report("acme", "pro");
    let acme = tenant(&app, &operator.report("acme", &first).await).await;
    let input = json!({"tenantId": acme.id});
    assert!(is_served(&acme).await);

    let requested = changed(&first, |said| said.suspended = true);
    assert_eq!(operator.report("acme", &requested).await.suspended, Some(Suspension::Requested));
    assert!(!is_served(&acme).await);
    // The admin's reason comes and goes beside it; that it does not end the suspension is said.
    done(&admin, "suspendTenant", input.clone()).await;
    let resumed = mutate(&admin, "resumeTenant", input.clone()).await.data()["resumeTenant"].clone();
    assert_eq!(
        (&resumed["tenant"]["status"], &resumed["errors"][0]["code"]),
        (&json!("SUSPENDED"), &json!("MANAGED_BY_CLUSTER"))
    );
    assert!(resumed["errors"][0]["message"].as_str().unwrap().contains("spec.suspended of the Tenant acme"));
    let back = changed(&requested, |said| said.suspended = false);
    assert_eq!(operator.report("acme", &back).await.suspended, None);
    assert!(is_served(&acme).await);

    // And the other way round.
    done(&admin, "suspendTenant", input.clone()).await;
    assert_eq!(operator.report("acme", &changed(&back, |_| {})).await.suspended, Some(Suspension::ByAdmin));
    assert!(!is_served(&acme).await);
    let db = app.database().await;
    strings(&db, "UPDATE tenants SET suspended_by_billing = true RETURNING plan AS t").await;
    let resumed = mutate(&admin, "resumeTenant", input.clone()).await.data()["resumeTenant"].clone();
    assert_eq!((&resumed["tenant"]["status"], &resumed["errors"][0]["code"]), (&json!("SUSPENDED"), &json!("STATE")));
    assert_eq!(operator.report("acme", &back).await.suspended, Some(Suspension::PaymentFailed));
    strings(&db, "UPDATE tenants SET suspended_by_billing = false RETURNING plan AS t").await;
    assert_eq!(done(&admin, "resumeTenant", input).await["tenant"]["status"], "ACTIVE");
    assert!(is_served(&acme).await);
}

async fn runs_of_a_suspended_tenant_wait_and_go_on(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    let app = with_operator(builder).model_server(&model).start().await;
    let operator = Operator::of(&app);
    let first = report("acme", "enterprise");
    let acme = tenant(&app, &operator.report("acme", &first).await).await;
    let agent = agent(&acme.client, "Agent", json!({})).await;
    let token = operator.token("acme", 1).await.unwrap();
    let _worker = Worker::builder(&app, &token.token).env("CLOISTER_RUNTIME__NAME", "acme-worker-0").start().await;
    model.script([Reply::text("never heard").hold(), Reply::text("Done.")]);
    let run = start(&acme.client, &agent, "Hi").await;
    model.wait_for_held(1).await;
    let runs = operator.report("acme", &first).await.runs;
    assert_eq!((runs.queued, runs.running, runs.running_dedicated), (0, 1, 1));

    let suspended = changed(&first, |said| said.suspended = true);
    operator.report("acme", &suspended).await;
    let db = app.database().await;
    stored_status(&db, &run, Status::Queued).await;
    assert!(model.release());
    let runs = operator.report("acme", &suspended).await.runs;
    assert_eq!((runs.queued, runs.running), (1, 0));
    let resumed = changed(&suspended, |said| said.suspended = false);
    operator.report("acme", &resumed).await;
    until(&acme.client, &run, "SUCCEEDED").await;
    // The run says where it ran.
    let worker: Value = acme.client.data("query ($id: ID!) { run(id: $id) { worker } }", json!({"id": run})).await;
    assert_eq!(worker["run"]["worker"], "acme-worker-0");
}

async fn a_tenant_that_changes_its_plan_takes_its_queue_along(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    let app = with_operator(builder).model_server(&model).start().await;
    let operator = Operator::of(&app);
    let first = report("acme", "pro");
    let acme = tenant(&app, &operator.report("acme", &first).await).await;
    let agent = agent(&acme.client, "Agent", json!({})).await;
    model.always(|_| Reply::text("Done."));
    // Up: what runs does so for workers of its own from now on.
    let up = changed(&first, |said| said.plan = "enterprise".to_owned());
    operator.report("acme", &up).await;
    assert_eq!(seen(&app.admin(), &acme.id).await["isolation"], "DEDICATED");
    let run = start(&acme.client, &agent, "Hi").await;
    assert_eq!(operator.report("acme", &up).await.runs.queued, 1);
    let token = operator.token("acme", 1).await.unwrap();
    let worker = Worker::builder(&app, &token.token).start().await;
    until(&acme.client, &run, "SUCCEEDED").await;
    drop(worker);
    // Down: what waits goes over to the shared pool.
    let run = start(&acme.client, &agent, "Hi").await;
    operator.report("acme", &changed(&up, |said| said.plan = "pro".to_owned())).await;
    until(&acme.client, &run, "SUCCEEDED").await;
    let worker: Value = acme.client.data("query ($id: ID!) { run(id: $id) { worker } }", json!({"id": run})).await;
    assert_eq!(worker["run"]["worker"], Value::Null);
}
