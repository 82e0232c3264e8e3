//! Tenants come from objects, and change with them.

use cloister_tests::app::TestAppBuilder;
use entity::{TenantOwned, tenants};
use sea_orm::PaginatorTrait;
use serde_json::json;

use super::{Operator, changed, report, seen, with_operator};
use crate::both::on_both;
use crate::calls::done;

on_both!(
    an_object_makes_its_tenant_once,
    what_an_object_says_is_taken_over_once,
    an_object_adopts_a_tenant_that_no_other_rules,
    what_can_not_hold_is_refused_in_the_words_of_the_spec,
    a_deleted_tenants_object_is_told_so,
);

async fn an_object_makes_its_tenant_once(builder: TestAppBuilder) {
    let app = with_operator(builder).start().await;
    let operator = Operator::of(&app);
    let acme = report("acme", "enterprise");
    // By many at once, as replicas of an operator might that change places.
    let at_once = (0..8).map(|_| operator.report("acme", &acme));
    let states = futures_util::future::join_all(at_once).await;
    assert!(states.iter().all(|state| *state == states[0]), "{states:?}");
    let state = &states[0];
    assert_eq!((state.plan.as_str(), state.suspended, state.usage.tokens), ("enterprise", None, 0));
    assert_eq!(state.runs, crds::protocol::Runs::default());
    let tenant = seen(&app.admin(), &state.tenant_id).await;
    assert_eq!((&tenant["name"], &tenant["email"]), (&json!("acme Inc."), &json!("ops@acme.example")));
    assert_eq!((&tenant["status"], &tenant["isolation"]), (&json!("ACTIVE"), &json!("DEDICATED")));
    assert_eq!(tenant["monthlyTokenLimit"], state.usage.limit);
    assert_eq!(tenants::Entity::across_tenants().count(&app.database().await).await.unwrap(), 1);
    // By the same name in another cluster it is another tenant.
    let other = operator.in_cluster("another-cluster").report("acme", &acme).await;
    assert_ne!(other.tenant_id, state.tenant_id);
}

async fn what_an_object_says_is_taken_over_once(builder: TestAppBuilder) {
    let app = with_operator(builder).start().await;
    let (operator, admin) = (Operator::of(&app), app.admin());
    let first = report("acme", "pro");
    let id = operator.report("acme", &first).await.tenant_id;
    let second = changed(&first, |said| {
        said.display_name = "Acme".to_owned();
        said.monthly_token_limit = Some(77);
        said.plan = "enterprise".to_owned();
    });
    let state = operator.report("acme", &second).await;
    assert_eq!((state.plan.as_str(), state.usage.limit), ("enterprise", 77));
    // An earlier one that comes late changes nothing, and is answered what holds.
    assert_eq!(operator.report("acme", &first).await, state);
    let tenant = seen(&admin, &id).await;
    assert_eq!((&tenant["name"], &tenant["isolation"]), (&json!("Acme"), &json!("DEDICATED")));

    // Billing has moved the plan: the object, which says as before, does not move it back; nor does a change of another
    // field.
    let db = app.database().await;
    crate::calls::strings(&db, "UPDATE tenants SET plan = 'pro', isolation = 'shared' RETURNING plan AS t").await;
    assert_eq!(operator.report("acme", &second).await.plan, "pro");
    let third = changed(&second, |said| said.monthly_token_limit = None);
    let state = operator.report("acme", &third).await;
    assert_eq!(state.plan, "pro");
    assert_ne!(state.usage.limit, 77, "the plan's limit again");
    // Another incarnation by the same name has the same tenant, and says all of it anew.
    let mut again = third.clone();
    (again.uid, again.generation) = ("acme-2".to_owned(), 1);
    let state = operator.report("acme", &again).await;
    assert_eq!((state.plan.as_str(), state.tenant_id), ("enterprise", id));
}

async fn an_object_adopts_a_tenant_that_no_other_rules(builder: TestAppBuilder) {
    let app = with_operator(builder).start().await;
    let (operator, admin) = (Operator::of(&app), app.admin());
    let made = app.tenant_with("acme", json!({"plan": "PRO", "email": "ops@acme.example"})).await;
    let mut adopting = report("acme", "enterprise");
    adopting.tenant.tenant_id = Some(made.id.clone());
    let state = operator.report("acme", &adopting).await;
    assert_eq!((&state.tenant_id, state.plan.as_str()), (&made.id, "enterprise"));
    assert_eq!(seen(&admin, &made.id).await["name"], "acme Inc.");

    // No other object gets it, of this cluster or another one, while this one is there.
    let refused = operator.try_report("rival", &adopting).await.unwrap_err();
    assert_eq!((refused.0, refused.1.as_str()), (409, "CONFLICT"));
    assert!(refused.2.contains("spec.tenantId") && refused.2.contains("acme"), "{}", refused.2);
    let elsewhere = operator.in_cluster("another-cluster");
    assert_eq!(elsewhere.try_report("acme", &adopting).await.unwrap_err().0, 409);
    // Nor becomes this one another tenant's.
    let other = app.tenant_with("other", json!({"email": "ops@acme.example"})).await;
    let strays = changed(&adopting, |said| said.tenant_id = Some(other.id.clone()));
    let refused = operator.try_report("acme", &strays).await.unwrap_err();
    assert!(refused.0 == 409 && refused.2.contains(&made.id), "{refused:?}");

    // Once it is gone, another one in another cluster has it: it has moved.
    let gone = crds::protocol::Farewell { deregister: true, ..super::bye("acme-1", true) };
    assert!(operator.farewell("acme", gone).await.is_gone);
    let mut moved = adopting.clone();
    moved.uid = "moved-1".to_owned();
    let state = elsewhere.report("acme-moved", &moved).await;
    assert_eq!((&state.tenant_id, state.suspended), (&made.id, None));
    // And the first name is free for another tenant.
    let fresh = operator.report("acme", &report("acme", "free")).await;
    assert!(fresh.tenant_id != made.id && fresh.tenant_id != other.id);
}

async fn what_can_not_hold_is_refused_in_the_words_of_the_spec(builder: TestAppBuilder) {
    let app = with_operator(builder).start().await;
    let operator = Operator::of(&app);
    let good = report("acme", "pro");
    for (change, field) in [
        (changed(&good, |said| said.display_name = " ".to_owned()), "spec.displayName"),
        (changed(&good, |said| said.display_name = "\0".to_owned()), "spec.displayName"),
        (changed(&good, |said| said.email = "nobody".to_owned()), "spec.email"),
        (changed(&good, |said| said.plan = "gold".to_owned()), "spec.plan"),
        (changed(&good, |said| said.monthly_token_limit = Some(-1)), "spec.monthlyTokenLimit"),
        (changed(&good, |said| said.tenant_id = Some("acme".to_owned())), "spec.tenantId"),
        (changed(&good, |said| said.tenant_id = Some(crate::calls::missing("ten"))), "spec.tenantId"),
    ] {
        let (status, code, message) = operator.try_report("acme", &change).await.unwrap_err();
        assert_eq!((status, code.as_str()), (422, "INVALID"), "{message}");
        assert!(message.contains(field), "{field}: {message}");
    }
    assert_eq!(operator.try_report("Acme_", &good).await.unwrap_err().0, 422);
    assert_eq!(operator.in_cluster("no%20uid").try_report("acme", &good).await.unwrap_err().0, 422);
    let body = operator.request(reqwest::Method::PUT, &operator.path("acme")).body("{");
    assert_eq!(operator.send::<serde_json::Value>(body).await.unwrap_err().0, 422);
    assert_eq!(tenants::Entity::across_tenants().count(&app.database().await).await.unwrap(), 0);

    // The address is fixed once there is a tenant, for whoever takes it over.
    let id = operator.report("acme", &good).await.tenant_id;
    let moved = changed(&good, |said| said.email = "new@acme.example".to_owned());
    let (status, code, message) = operator.try_report("acme", &moved).await.unwrap_err();
    assert_eq!((status, code.as_str()), (409, "CONFLICT"));
    assert!(message.contains("spec.email") && message.contains("ops@acme.example"), "{message}");
    assert_eq!(seen(&app.admin(), &id).await["email"], "ops@acme.example");
}

async fn a_deleted_tenants_object_is_told_so(builder: TestAppBuilder) {
    let app = with_operator(builder).start().await;
    let operator = Operator::of(&app);
    let acme = report("acme", "pro");
    let id = operator.report("acme", &acme).await.tenant_id;
    let payload = crate::calls::mutate(&app.admin(), "deleteTenant", json!({"tenantId": id})).await.data().clone();
    // The api writes no objects here: it says where the object is.
    assert_eq!(payload["deleteTenant"]["deletedId"], json!(id));
    assert_eq!(payload["deleteTenant"]["errors"][0]["code"], "MANAGED_BY_CLUSTER");
    let refused = operator.try_report("acme", &changed(&acme, |_| {})).await.unwrap_err();
    assert!(refused.0 == 409 && refused.2.contains(&id) && refused.2.contains("deleted"), "{refused:?}");
    // Its end is an end all the same, and the name is free.
    let gone = crds::protocol::Farewell { deregister: true, ..super::bye("acme-1", true) };
    assert!(operator.farewell("acme", gone).await.is_gone);
    let mut again = acme.clone();
    again.uid = "acme-2".to_owned();
    assert_ne!(operator.report("acme", &again).await.tenant_id, id);
    assert_eq!(seen(&app.admin(), &id).await["status"], "DELETING");
    done(&app.admin(), "deleteTenant", json!({"tenantId": id})).await;
}
