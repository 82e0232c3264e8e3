//! Workers' tokens, rotated by their operator.

use chrono::{DateTime, TimeDelta, Utc};
use cloister_tests::TestApp;
use cloister_tests::app::TestAppBuilder;
use cloister_tests::client::http;
use crds::protocol::{Farewell, TOKEN_OVERLAP_SECONDS, TOKEN_SECONDS, TOKEN_SEEN_SECONDS};
use entity::{TenantOwned, runtime_tokens};
use sea_orm::ActiveValue::Set;
use sea_orm::{ActiveModelTrait, QueryOrder};
use serde_json::json;
use uuid::Uuid;

use super::{Operator, bye, report, with_operator};
use crate::both::on_both;
use crate::calls::from_now;

on_both!(
    rotations_overlap_until_the_new_token_is_seen,
    the_same_rotation_again_makes_another_token,
    another_object_counts_anew,
    the_operator_is_told_which_rotation_works,
);

/// The status that a claim with a token is answered with.
async fn claim(app: &TestApp, token: &str) -> u16 {
    let request = http().post(format!("{}/runtime/v1/claims", app.runtime_url())).header("cloister-protocol", "1");
    request.bearer_auth(token).json(&json!({"max": 1, "wait_ms": 0})).send().await.unwrap().status().as_u16()
}

/// The tokens as they are stored, oldest first.
async fn stored(app: &TestApp) -> Vec<runtime_tokens::Model> {
    let rows = runtime_tokens::Entity::across_tenants().order_by_asc(runtime_tokens::Column::Id);
    rows.all(&app.database().await).await.unwrap()
}

/// Has a token's time end.
async fn expire(app: &TestApp, id: Uuid) {
    let past = from_now(-1_000).parse().unwrap();
    let row = runtime_tokens::ActiveModel { id: Set(id), expires_at: Set(Some(past)), ..Default::default() };
    row.update(&app.database().await).await.unwrap();
}

/// Whether a moment lies this many seconds from now, give or take a minute.
fn is_in(at: Option<DateTime<Utc>>, seconds: i64) -> bool {
    let expected: DateTime<Utc> = from_now(seconds * 1_000).parse().unwrap();
    at.is_some_and(|at| (at - expected).abs() < TimeDelta::seconds(60))
}

async fn rotations_overlap_until_the_new_token_is_seen(builder: TestAppBuilder) {
    let app = with_operator(builder).start().await;
    let operator = Operator::of(&app);
    assert_eq!(operator.token("acme", 1).await.err().unwrap().0, 404);
    operator.report("acme", &report("acme", "enterprise")).await;
    let first = operator.token("acme", 1).await.unwrap();
    assert!(first.id.starts_with("rtk_") && first.token.starts_with("clr_"));
    assert!(is_in(Some(first.expires_at), TOKEN_SECONDS));
    assert_eq!(claim(&app, &first.token).await, 200);

    let second = operator.token("acme", 2).await.unwrap();
    // The old one works on, for the overlap; the new one from now on.
    assert_eq!(claim(&app, &first.token).await, 200);
    assert!(is_in(stored(&app).await[0].expires_at, TOKEN_OVERLAP_SECONDS));
    assert_eq!(claim(&app, &second.token).await, 200);
    // The new one has been seen in use: the old one has a little time left, until the last worker has the new one.
    assert!(is_in(stored(&app).await[0].expires_at, TOKEN_SEEN_SECONDS));
    assert_eq!(claim(&app, &first.token).await, 200);
    assert_eq!(claim(&app, &second.token).await, 200);

    // Backwards it does not go, and the last one is named.
    let (status, code, message) = operator.token("acme", 1).await.err().unwrap();
    assert_eq!((status, code.as_str()), (409, "CONFLICT"));
    assert!(message.contains('2'), "{message}");
    assert_eq!(operator.token("acme", -1).await.err().unwrap().0, 422);
    // One that an admin made is none of the operator's.
    let admins = crate::calls::done(
        &app.admin(),
        "createRuntimeToken",
        json!({"tenantId": operator.report("acme", &report("acme", "enterprise")).await.tenant_id}),
    )
    .await;
    let third = operator.token("acme", 10).await.unwrap();
    assert_eq!(claim(&app, &third.token).await, 200);
    for rotated in [0, 1] {
        assert!(is_in(stored(&app).await[rotated].expires_at, TOKEN_SEEN_SECONDS));
    }
    // Its time over, it is refused, and what it is used for meanwhile ends.
    expire(&app, stored(&app).await[0].id).await;
    assert_eq!(claim(&app, &first.token).await, 401);
    assert_eq!(claim(&app, admins["secret"].as_str().unwrap()).await, 200);
}

async fn the_same_rotation_again_makes_another_token(builder: TestAppBuilder) {
    let app = with_operator(builder).start().await;
    let operator = Operator::of(&app);
    operator.report("acme", &report("acme", "enterprise")).await;
    let old = operator.token("acme", 1).await.unwrap();
    assert_eq!(claim(&app, &old.token).await, 200);
    // The answers got lost, over and over: they don't gather.
    let mut made = Vec::new();
    for _ in 0..5 {
        made.push(operator.token("acme", 2).await.unwrap());
    }
    let working = stored(&app).await.iter().filter(|token| token.revoked_at.is_none()).count();
    assert_eq!(working, 3, "the one in use, the last one and the one before");
    assert_eq!(claim(&app, &old.token).await, 200);
    let last = made.pop().unwrap();
    assert_eq!(claim(&app, &last.token).await, 200);
    // Those that were lost for good are revoked, and the two others have a little time left.
    for token in &made[..3] {
        assert_eq!(claim(&app, &token.token).await, 401);
    }
    let ends = |token: &runtime_tokens::Model| is_in(token.expires_at, TOKEN_SEEN_SECONDS);
    let working: Vec<_> = stored(&app).await.into_iter().filter(|token| token.revoked_at.is_none()).collect();
    assert_eq!(working.iter().filter(|token| ends(token)).count(), 2);
    assert_eq!(claim(&app, &last.token).await, 200);
}

async fn the_operator_is_told_which_rotation_works(builder: TestAppBuilder) {
    let app = with_operator(builder).start().await;
    let operator = Operator::of(&app);
    let rotation = async || operator.report("acme", &report("acme", "enterprise")).await.rotation;
    assert_eq!(rotation().await, Some(0));
    operator.token("acme", 1).await.unwrap();
    assert_eq!(rotation().await, Some(1));
    let second = operator.token("acme", 2).await.unwrap();
    assert_eq!(rotation().await, Some(2));
    // One that is revoked works no more, and neither does one whose time is over.
    crate::calls::done(&app.admin(), "revokeRuntimeToken", json!({"runtimeTokenId": second.id})).await;
    assert_eq!(rotation().await, Some(1));
    expire(&app, stored(&app).await[0].id).await;
    assert_eq!(rotation().await, Some(0));
}

async fn another_object_counts_anew(builder: TestAppBuilder) {
    let app = with_operator(builder).start().await;
    let operator = Operator::of(&app);
    operator.report("acme", &report("acme", "enterprise")).await;
    let old = operator.token("acme", 41).await.unwrap();
    operator.farewell("acme", Farewell { deregister: true, ..bye("acme-1", true) }).await;
    assert_eq!(operator.token("acme", 42).await.err().unwrap().0, 404);
    let mut again = report("acme", "enterprise");
    again.uid = "acme-2".to_owned();
    operator.report("acme", &again).await;
    let new = operator.token("acme", 1).await.unwrap();
    assert_eq!(claim(&app, &new.token).await, 200);
    // The old one ends with the overlap: workers of the object before may be going still.
    assert!(is_in(stored(&app).await[0].expires_at, TOKEN_OVERLAP_SECONDS));
    assert_eq!(claim(&app, &old.token).await, 200);
}
