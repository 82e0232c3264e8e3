//! What the other tests stand on, where nothing else would show that it is broken.

use std::time::Duration;

use cloister_tests::client::http;
use cloister_tests::postgres::{PostgresDatabase, connect};
use cloister_tests::{ToolAnswer, ToolServer};
use sea_orm::ConnectionTrait;
use serde_json::json;

#[tokio::test]
async fn each_postgres_database_is_its_own_and_goes_with_its_test() {
    let first = PostgresDatabase::create().await;
    let second = PostgresDatabase::create().await;
    assert_ne!(first.url(), second.url());
    let connection = connect(first.url()).await.unwrap();
    connection.execute_unprepared("CREATE TABLE only_here (id INT)").await.unwrap();
    let other = connect(second.url()).await.unwrap();
    assert!(other.execute_unprepared("SELECT id FROM only_here").await.is_err());
    let url = first.url().to_owned();
    drop(first);
    assert!(connect(&url).await.is_err());
}

#[tokio::test]
async fn the_tool_server_records_and_answers_as_told() {
    let tools = ToolServer::start().await;
    tools.script([
        ToolAnswer::json(&json!({"sunny": true})),
        ToolAnswer::redirect("http://127.0.0.1:1/"),
        ToolAnswer::status(503).retry_after(1).delay(1),
        ToolAnswer::hang(),
    ]);
    let call = || http().post(tools.url("/weather?x=1")).header("idempotency-key", "k").json(&json!({"city": "Rome"}));
    assert_eq!(call().send().await.unwrap().text().await.unwrap(), r#"{"sunny":true}"#);
    let redirect = call().send().await.unwrap();
    assert_eq!(
        (redirect.status().as_u16(), &redirect.headers()["location"]),
        (307, &"http://127.0.0.1:1/".parse().unwrap())
    );
    assert_eq!(call().send().await.unwrap().status(), 503);
    assert!(call().timeout(Duration::from_millis(50)).send().await.unwrap_err().is_timeout());
    assert_eq!(call().send().await.unwrap().text().await.unwrap(), "ok");
    let requests = tools.wait_for_requests(5).await;
    assert_eq!(requests[0].json(), json!({"city": "Rome"}));
    assert_eq!((requests[0].path.as_str(), requests[0].header("idempotency-key")), ("/weather?x=1", Some("k")));
}
