use std::sync::Arc;

use crds::protocol::{RefusalCode, Refused, Runs, State};
use k8s_openapi::api::core::v1::Namespace;
use kube::api::ObjectMeta;
use serde_json::json;

use super::super::course::Ownership;
use super::*;
use crate::api::ApiError;
use crate::wanted::samples::{tenant, wanted};

fn time(seconds: i64) -> DateTime<Utc> {
    DateTime::from_timestamp(1_800_000_000 + seconds, 0).unwrap()
}

fn state(plan: &str, tokens: i64) -> State {
    State {
        tenant_id: "ten_1".to_owned(),
        plan: plan.to_owned(),
        suspended: None,
        usage: Usage { period: "2026-11".to_owned(), tokens, limit: 10_000 },
        runs: Runs::default(),
        is_dedicated: None,
        generation: None,
        rotation: None,
    }
}

fn facts(standing: Standing) -> Facts {
    Facts {
        standing,
        trouble: None,
        namespace: None,
        ownership: Ownership::Absent,
        deployment: None,
        foreign_policies: Vec::new(),
    }
}

fn applied(ready: i32) -> Applied {
    let deployment = json!({
        "metadata": {"name": "cloister-runtime"},
        "spec": {
            "replicas": 1,
            "selector": {},
            "template": {"spec": {"containers": [{"name": "runtime", "image": "example.com:5000/runtime:1.2.3"}]}},
        },
        "status": {"readyReplicas": ready},
    });
    let metadata =
        ObjectMeta { name: Some("tenant-acme".to_owned()), uid: Some("n1".to_owned()), ..ObjectMeta::default() };
    Applied {
        namespace: Step::Done,
        network: Step::Done,
        quota: Step::Done,
        runtime: Step::Done,
        live_namespace: Some(Arc::new(Namespace { metadata, ..Namespace::default() })),
        deployment: Some(Arc::new(serde_json::from_value(deployment).unwrap())),
        replicas: 1,
        ..Applied::default()
    }
}

fn status(tenant: &Tenant, facts: &Facts, course: Course, applied: &Applied, now: i64) -> TenantStatus {
    let wanted = wanted(json!({}));
    build_status(&Look { tenant, facts, course, wanted: &wanted, applied, usage_age: None, now: time(now) })
}

fn is(status: &TenantStatus, r#type: &str) -> String {
    let condition = status.condition(r#type).unwrap();
    format!("{}/{}", condition.status.as_str(), condition.reason)
}

#[test]
fn a_tenant_of_the_pool_is_ready_once_registered() {
    let tenant = tenant(json!({"plan": "pro"}));
    let held = facts(Standing::Held(state("pro", 0)));
    let status = status(&tenant, &held, Course::Shared, &Applied::default(), 0);
    assert_eq!((status.phase, status.isolation), (Phase::Ready, Some(Isolation::Shared)));
    assert_eq!(is(&status, "Ready"), "True/Ready");
    assert_eq!(status.conditions.len(), 4);
    assert!(status.namespace.is_none() && status.runtime.is_none());
    assert_eq!(status.usage.unwrap().remaining, 10_000);
}

#[test]
fn an_enterprise_tenant_is_ready_with_its_workers() {
    let mut tenant = tenant(json!({}));
    let held = facts(Standing::Held(state("enterprise", 0)));
    let first = status(&tenant, &held, Course::Dedicated, &applied(0), 0);
    assert_eq!(first.phase, Phase::Provisioning);
    assert_eq!(is(&first, "Ready"), "False/Starting");
    assert_eq!(first.runtime.as_ref().unwrap().version, "1.2.3");
    tenant.status = Some(first.clone());
    let second = status(&tenant, &held, Course::Dedicated, &applied(1), 60);
    assert_eq!(second.phase, Phase::Ready);
    assert_eq!(second.condition("Ready").unwrap().last_transition_time, time(60));
    assert_eq!(second.condition("Registered").unwrap().last_transition_time, time(0));
    tenant.status = Some(second.clone());
    let third = status(&tenant, &held, Course::Dedicated, &applied(1), 120);
    assert_eq!(third, second, "nothing changed, and nothing is to be written");
    let fourth = status(&tenant, &held, Course::Dedicated, &applied(0), 180);
    assert_eq!(fourth.phase, Phase::Degraded);
}

#[test]
fn an_api_that_is_away_takes_nothing() {
    let mut tenant = tenant(json!({}));
    let held = facts(Standing::Held(state("enterprise", 5_000)));
    tenant.status = Some(status(&tenant, &held, Course::Dedicated, &applied(1), 0));
    let away = Some(ApiError::Unreachable("refused".to_owned()));
    let facts = Facts { trouble: away, ..facts(Standing::Remembered) };
    let status = status(&tenant, &facts, Course::Dedicated, &applied(1), 60);
    assert_eq!(is(&status, "Registered"), "Unknown/ApiUnreachable");
    assert_eq!(is(&status, "BillingInSync"), "True/InSync");
    assert_eq!(status.phase, Phase::Ready);
    assert_eq!(status.tenant_id.as_deref(), Some("ten_1"));
    assert_eq!(status.usage.unwrap().tokens, 5_000);
}

#[test]
fn what_is_wrong_shows_with_its_reason() {
    let tenant = tenant(json!({}));
    let held = || facts(Standing::Held(state("enterprise", 0)));
    let refused =
        ApiError::Refused(Refused { code: RefusalCode::Conflict, message: "spec.tenantId is ruled".to_owned() });
    let facts = Facts { trouble: Some(refused), ..facts(Standing::Unregistered) };
    let status_of = |facts: &Facts, course, applied: &Applied| status(&tenant, facts, course, applied, 0);
    let refused = status_of(&facts, Course::Unregistered, &Applied::default());
    assert_eq!(is(&refused, "Ready"), "False/Conflict");
    assert_eq!(refused.phase, Phase::Pending);

    let foreign = Facts { foreign_policies: vec!["allow-all".to_owned()], ..held() };
    let foreign = status_of(&foreign, Course::Dedicated, &applied(1));
    assert_eq!(is(&foreign, "NetworkPoliciesApplied"), "False/ForeignPolicy");
    assert_eq!(foreign.phase, Phase::Degraded);

    let taken =
        Applied { namespace: Step::Failed("NamespaceForeign".to_owned(), "…".to_owned()), ..Applied::default() };
    let taken = status_of(&held(), Course::Dedicated, &taken);
    assert_eq!(is(&taken, "Ready"), "False/NamespaceForeign");
    assert_eq!(is(&taken, "RuntimeAvailable"), "False/Pending");
    assert_eq!(taken.phase, Phase::Degraded);

    let moved = facts_with_plan("pro");
    let moved = status_of(&moved, Course::Shared, &Applied::default());
    assert_eq!(is(&moved, "BillingInSync"), "False/PlanDiffers");
}

fn facts_with_plan(plan: &str) -> Facts {
    facts(Standing::Held(state(plan, 0)))
}

#[test]
fn a_suspended_tenant_says_why() {
    let tenant = tenant(json!({"suspended": true}));
    let held = facts(Standing::Held(state("enterprise", 0)));
    let requested = status(&tenant, &held, Course::Dedicated, &applied(0), 0);
    assert_eq!(is(&requested, "Suspended"), "True/Requested");
    assert_eq!((is(&requested, "Ready").as_str(), requested.phase), ("False/Suspended", Phase::Suspended));
    let failed = State { suspended: Some(Suspension::PaymentFailed), ..state("enterprise", 0) };
    let tenant = super::super::status::tests::tenant(json!({}));
    let failed = status(&tenant, &facts(Standing::Held(failed)), Course::Dedicated, &applied(0), 0);
    assert_eq!(is(&failed, "RuntimeAvailable"), "False/PaymentFailed");
}

#[test]
fn usage_is_written_when_it_is_news() {
    let shown = UsageStatus {
        period: "2026-11".to_owned(),
        tokens: 1_000,
        limit: 10_000,
        remaining: 9_000,
        state: UsageState::Ok,
    };
    let usage = |tokens| Usage { period: "2026-11".to_owned(), tokens, limit: 10_000 };
    assert!(!is_news(&shown, &usage(1_099)) && is_news(&shown, &usage(1_100)));
    assert!(is_news(&shown, &Usage { limit: 20_000, ..usage(1_000) }));
    let mut tenant = tenant(json!({"plan": "pro"}));
    tenant.status = Some(TenantStatus { usage: Some(shown), ..TenantStatus::default() });
    let mut held = facts(Standing::Held(state("pro", 9_000)));
    let (wanted, applied) = (wanted(json!({})), Applied::default());
    let tokens = |held: &Facts, usage_age| {
        let look = Look {
            tenant: &tenant,
            facts: held,
            course: Course::Shared,
            wanted: &wanted,
            applied: &applied,
            usage_age,
            now: time(0),
        };
        build_status(&look).usage.unwrap().tokens
    };
    assert_eq!(tokens(&held, Some(Duration::from_secs(29))), 1_000);
    assert_eq!((tokens(&held, Some(Duration::from_secs(30))), tokens(&held, None)), (9_000, 9_000));
    if let Standing::Held(state) = &mut held.standing {
        state.usage.limit = 20_000;
    }
    assert_eq!(tokens(&held, Some(Duration::from_secs(1))), 9_000, "the limit is another one");
}

#[test]
fn a_departure_keeps_what_was_known() {
    let mut tenant = tenant(json!({}));
    let held = facts(Standing::Held(state("enterprise", 0)));
    tenant.status = Some(status(&tenant, &held, Course::Dedicated, &applied(1), 0));
    let status = build_departure(&tenant, "ApiUnreachable", "away", time(60));
    assert_eq!(status.phase, Phase::Deleting);
    assert_eq!(is(&status, "Deregistered"), "False/ApiUnreachable");
    assert_eq!(is(&status, "Registered"), "True/Registered");
    assert_eq!(status.namespace.as_ref().unwrap().uid, "n1");
    tenant.status = Some(status.clone());
    assert_eq!(build_departure(&tenant, "ApiUnreachable", "away", time(120)), status);
}

#[test]
fn a_version_is_the_tag_or_the_digest() {
    assert_eq!(version("example.com:5000/a/runtime:1.2"), "1.2");
    assert_eq!(version("example.com:5000/runtime@sha256:ab"), "sha256:ab");
    assert_eq!(version("runtime:1.2@sha256:ab"), "1.2");
    assert_eq!(version("runtime"), "runtime");
}
