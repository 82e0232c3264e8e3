//! All replicas are restarted under load, one after the other: no run fails, and no subscriber misses anything.

use cloister_tests::TestApp;
use tokio::sync::watch;

use super::load::{Load, Orphans, first};
use crate::follow::follow;

#[tokio::test(flavor = "multi_thread")]
async fn replicas_one_after_the_other() {
    let (first_app, model) = first(TestApp::builder().postgres()).await;
    let load = Load::prepare(&first_app, model, "PRO").await;
    let second = first_app.replica().await;
    let clients = [&first_app, &second].map(|replica| replica.client(&load.tenant.key));
    load.start(&clients, 40).await;
    let count = watch::Sender::new(0);
    let following: Vec<_> = load.runs()[20..]
        .iter()
        .map(|run| tokio::spawn(follow(clients.to_vec(), run.clone(), count.clone())))
        .collect();
    let mut replicas = [first_app, second];
    let restarts = async {
        for round in 1..=3 {
            for (at, replica) in replicas.iter_mut().enumerate() {
                load.calls(round * 100 + at * 50).await;
                assert!(replica.terminate().await.success());
                replica.restart().await;
            }
        }
    };
    tokio::join!(load.start(&clients, 400), restarts);
    let mut connections = 0;
    for followed in following {
        connections += followed.await.unwrap().connections;
    }
    load.check(&replicas[0], &Orphans::default()).await;
    eprintln!("20 subscribers took {connections} connections");
}
