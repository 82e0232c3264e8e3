//! PostgreSQL goes away under load, and comes back; so does the way to it.

use std::time::Duration;

use cloister_tests::postgres::{PostgresServer, Shutdown};
use cloister_tests::{Proxy, TestApp};

use super::load::{Load, Orphans, first};

#[tokio::test(flavor = "multi_thread")]
async fn postgres_is_restarted_and_crashes() {
    let mut postgres = PostgresServer::start().await;
    let (app, model) = first(TestApp::builder().database_url(postgres.url().as_str())).await;
    let load = Load::prepare(&app, model, "PRO").await;
    let other = app.replica().await;
    let clients = [&app, &other].map(|replica| replica.client(&load.tenant.key));
    let restarts = async {
        for (point, how, away) in [
            (30, Shutdown::Fast, Duration::ZERO),
            (120, Shutdown::Immediate, Duration::ZERO),
            (220, Shutdown::Fast, Duration::from_secs(8)),
            (300, Shutdown::Immediate, Duration::from_secs(1)),
        ] {
            load.calls(point).await;
            postgres.stop(how);
            tokio::time::sleep(away).await;
            postgres.start_again();
        }
    };
    tokio::join!(load.start(&clients, 400), restarts);
    load.check(&app, &Orphans::default()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_way_to_postgres_is_cut_and_stands_still() {
    let postgres = PostgresServer::start().await;
    let url = postgres.url();
    let proxy = Proxy::start(([127, 0, 0, 1], url.port().unwrap()).into()).await;
    let (app, model) = first(TestApp::builder().database_url(url.as_str())).await;
    let load = Load::prepare(&app, model, "PRO").await;
    let mut far = app.replica().await;
    far.set_env("CLOISTER_DATABASE__URL", &proxy.in_place_of(url.as_str()));
    far.restart().await;
    let clients = [&app, &far].map(|replica| replica.client(&load.tenant.key));
    let faults = async {
        load.calls(20).await;
        proxy.cut();
        load.calls(80).await;
        proxy.delay(Duration::from_millis(100));
        load.calls(140).await;
        proxy.restore();
        proxy.refuse();
        tokio::time::sleep(Duration::from_secs(5)).await;
        proxy.restore();
        load.calls(200).await;
        proxy.stall();
        tokio::time::sleep(Duration::from_secs(5)).await;
        proxy.restore();
    };
    tokio::join!(load.start(&clients, 300), faults);
    load.check(&app, &Orphans::default()).await;
}
