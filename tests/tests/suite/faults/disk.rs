//! The disk under SQLite is full: a clear error, nothing corrupt, and it goes on when there is space again.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use cloister_tests::app::SCRIPTED_MODEL;
use cloister_tests::scope::Scope;
use cloister_tests::{Client, GraphqlResponse, TestApp};
use sea_orm::{ConnectionTrait, DatabaseConnection, DbBackend, Statement};
use serde_json::json;

use super::load::{Load, Orphans, first};

/// Leaves no byte free beside the filler itself.
fn fill(filler: &Path) {
    let mut file = File::create(filler).unwrap();
    for size in [64 * 1024, 4096, 1] {
        while file.write_all(&vec![1; size]).is_ok() {}
    }
}

/// Writes until that fails. The log of what was written before may have had room left.
async fn write_until_refused(client: &Client) -> GraphqlResponse {
    let mutation = "mutation ($input: CreateAgentInput!) { createAgent(input: $input) { agent { id } } }";
    let input = json!({"name": "Large", "model": SCRIPTED_MODEL, "instructions": "x".repeat(50_000)});
    loop {
        let response = client.query(mutation, json!({"input": input})).await;
        if response.error_code().is_some() {
            return response;
        }
    }
}

async fn integrity(db: &DatabaseConnection) -> String {
    let sql = Statement::from_string(DbBackend::Sqlite, "PRAGMA integrity_check");
    db.query_one_raw(sql).await.unwrap().unwrap().try_get("", "integrity_check").unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn full_under_sqlite() {
    let Some(disk) = Scope::current().small_disk(48) else {
        eprintln!("skipped: mounting a file system of 48 MiB needs root");
        return;
    };
    let url = format!("sqlite://{}", disk.path().join("cloister.db").display());
    let (app, model) = first(TestApp::builder().database_url(&url)).await;
    let load = Load::prepare(&app, model, "PRO").await;
    let clients = [load.tenant.client.clone()];
    load.start(&clients, 50).await;
    let filler = disk.path().join("filler");
    for round in 1..=2 {
        // In the middle of runs, and of clients that start more.
        let full = async {
            load.calls(round * 60).await;
            fill(&filler);
            let refused = write_until_refused(&load.tenant.client).await;
            assert_eq!(refused.error_code(), Some("UNAVAILABLE"), "{}", refused.body);
            assert_eq!(app.anonymous().rest_get("/healthz").await.status, 200);
            fs::remove_file(&filler).unwrap();
        };
        tokio::join!(load.start(&clients, 100), full);
    }
    load.check(&app, &Orphans::default()).await;
    let db = app.database().await;
    assert_eq!(integrity(&db).await, "ok");
}
