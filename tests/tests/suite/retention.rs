//! What grows for ever is dropped when the configuration says so, and nothing else is.

use cloister_tests::Reply;
use cloister_tests::app::TestAppBuilder;
use sea_orm::{ConnectionTrait, DatabaseConnection, DbBackend};
use serde_json::json;

use crate::both::on_both;
use crate::steps::{Stage, events, rest, run, until};

on_both!(old_items_and_records_go_and_totals_stay);

async fn old_items_and_records_go_and_totals_stay(app: TestAppBuilder) {
    let app = app.env("CLOISTER_RETENTION__ITEMS_MONTHS", "1").env("CLOISTER_RETENTION__USAGE_MONTHS", "2");
    let mut stage = Stage::set(app).await;
    stage.model.always(|_| Reply::text("Done").usage(10, 5));
    let agent = stage.agent(json!({})).await;
    let old = stage.run(&agent, "Old").await;
    let young = stage.run(&agent, "Young").await;
    let database = stage.app.database().await;
    let total = "{ usage { totalTokens } }";
    let before = stage.client().data(total, json!({})).await;
    // Both of the old run's rows become of a time that is past its keep, and of a partition of that time.
    let made_old = "(SELECT id FROM runs ORDER BY id LIMIT 1)";
    if database.get_database_backend() == DbBackend::Postgres {
        for table in ["run_items", "usage_records"] {
            let sql = format!(
                "CREATE TABLE {table}_2025_03 PARTITION OF {table} \
                 FOR VALUES FROM ('2025-03-01 00:00:00+00') TO ('2025-04-01 00:00:00+00')"
            );
            database.execute_unprepared(&sql).await.unwrap();
        }
    }
    for sql in [
        format!("UPDATE run_items SET run_created_at = '2025-03-05 00:00:00+00:00' WHERE run_id = {made_old}"),
        format!("UPDATE usage_records SET created_at = '2025-03-05 00:00:00+00:00' WHERE run_id = {made_old}"),
    ] {
        assert!(database.execute_unprepared(&sql).await.unwrap().rows_affected() > 0);
    }
    let (items, records) = (count(&database, "run_items").await, count(&database, "usage_records").await);
    stage.app.restart().await;
    let left = async || (count(&database, "run_items").await, count(&database, "usage_records").await);
    let gone = i64::try_from(old.items.len()).unwrap();
    until("old rows to go", left, |left| *left == (items - gone, records - 1)).await;
    assert_eq!(stage.client().data(total, json!({})).await, before);
    assert_eq!(run(stage.client(), &old.id()).await["status"], "SUCCEEDED");
    // Nothing is left to tell of the old run, and nothing to wait for.
    let mut events = events(stage.client(), &old.id(), 0).await;
    assert!(rest(&mut events).await.is_empty());
    let items = "query ($id: ID!) { run(id: $id) { items { nodes { sequence } } } }";
    let kept = stage.client().data(items, json!({"id": young.id()})).await;
    assert_eq!(kept["run"]["items"]["nodes"].as_array().unwrap().len(), young.items.len());
}

async fn count(database: &DatabaseConnection, table: &str) -> i64 {
    let sql = sea_orm::Statement::from_string(
        database.get_database_backend(),
        format!("SELECT COUNT(*) AS rows FROM {table}"),
    );
    database.query_one_raw(sql).await.unwrap().unwrap().try_get("", "rows").unwrap()
}
