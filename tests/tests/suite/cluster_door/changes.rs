//! Operators wait for what changes.

use std::time::{Duration, Instant};

use cloister_tests::TestApp;
use cloister_tests::app::TestAppBuilder;
use serde_json::json;

use super::{Operator, report, tenant, with_operator};
use crate::both::on_both;
use crate::calls::{done, eventually, finished_run, new_agent};

on_both!(changes_are_told_once, an_api_that_starts_anew_tells_all);

async fn changes_are_told_once(builder: TestAppBuilder) {
    let app = with_operator(builder).start().await;
    let operator = Operator::of(&app);
    let empty = operator.changes(None).await;
    assert!(empty.is_all && empty.tenants.is_empty());
    let acme = operator.report("acme", &report("acme", "pro")).await;
    let beta = operator.report("beta", &report("beta", "pro")).await;
    operator.in_cluster("another-cluster").report("gamma", &report("gamma", "pro")).await;

    let mut cursor = empty.cursor;
    let mut told = Vec::new();
    while told.len() < 2 {
        let changes = operator.changes(Some(&cursor)).await;
        assert!(!changes.is_all);
        cursor = changes.cursor;
        told.extend(changes.tenants);
    }
    told.sort_by(|a, b| a.name.cmp(&b.name));
    assert_eq!(told.iter().map(|changed| &changed.state).collect::<Vec<_>>(), [&acme, &beta]);
    // A poll waits for a change, and tells of nothing else.
    let waiting = operator.clone();
    let after = cursor.clone();
    let poll = tokio::spawn(async move { waiting.changes(Some(&after)).await });
    let acme = tenant(&app, &acme).await;
    let agent = new_agent(&acme.client, json!({})).await;
    finished_run(&acme.client, json!({"agentId": agent, "input": "Hi"})).await;
    let changes = poll.await.unwrap();
    assert_eq!(changes.tenants.iter().map(|changed| changed.name.as_str()).collect::<Vec<_>>(), ["acme"]);
    let mut state = changes.tenants[0].state.clone();
    cursor = changes.cursor;
    // The run may have been caught under way.
    while state.usage.tokens == 0 || state.runs.running > 0 {
        let changes = operator.changes(Some(&cursor)).await;
        (cursor, state) = (changes.cursor, changes.tenants.into_iter().next().expect("a change").state);
    }
    // Without a cursor, or with one that makes no sense, all are told at once.
    for cursor in [None, Some("nonsense"), Some("a:1:1")] {
        let begun = Instant::now();
        let all = operator.changes(cursor).await;
        assert_eq!((all.is_all, all.tenants.len()), (true, 2));
        assert!(begun.elapsed() < Duration::from_secs(5));
    }
}

async fn an_api_that_starts_anew_tells_all(builder: TestAppBuilder) {
    let mut app = with_operator(builder).env("CLOISTER_LOG__FILTER", "info,sqlx::query=debug").start().await;
    let operator = Operator::of(&app);
    operator.report("acme", &report("acme", "pro")).await;
    let cursor = operator.changes(None).await.cursor;
    let looks = || app.log().matches("cluster_tenants").count();
    let before = looks();
    // One that stops does not keep its operator waiting.
    let (waiting, after) = (operator.clone(), cursor.clone());
    let poll = tokio::spawn(async move { waiting.changes(Some(&after)).await });
    eventually("the poll looks", async || looks(), |looks| *looks > before).await;
    app.terminate().await;
    assert!(poll.await.unwrap().tenants.is_empty());
    app.restart().await;
    assert_eq!(operator.changes(Some(&cursor)).await.tenants.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn any_replica_goes_on_where_another_was() {
    let app = with_operator(TestApp::builder().postgres()).start().await;
    let replica = app.replica().await;
    let operators = [Operator::of(&app), Operator::of(&replica)];
    let acme = operators[0].report("acme", &report("acme", "pro")).await;
    assert_eq!(operators[1].report("acme", &report("acme", "pro")).await, acme);
    let [first, second] = [operators[0].changes(None).await, operators[1].changes(None).await];
    assert_eq!(first.tenants, second.tenants);
    // Polled by turns, they tell of a change between them, and then of nothing more.
    done(&app.admin(), "suspendTenant", json!({"tenantId": acme.tenant_id})).await;
    let mut cursor = second.cursor;
    let mut seen = false;
    for turn in 0..8 {
        let changes = operators[turn % 2].changes(Some(&cursor)).await;
        cursor = changes.cursor;
        seen |= changes.tenants.iter().any(|changed| changed.state.suspended.is_some());
        if seen {
            break;
        }
    }
    assert!(seen, "the suspension is not told");
}
