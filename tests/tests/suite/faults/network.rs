//! The network between a worker and the api is slow, throttled, cut, refuses, and stands still.

use std::time::Duration;

use cloister_tests::Proxy;
use tokio::sync::watch;

use super::cluster::Cluster;
use super::load::Orphans;
use crate::follow::follow;

#[tokio::test(flavor = "multi_thread")]
async fn between_a_worker_and_the_api() {
    let mut cluster = Cluster::start().await;
    let near = cluster.replicas[0].runtime_url();
    let proxy = Proxy::start(near.strip_prefix("http://").unwrap().parse().unwrap()).await;
    // Both of them: whatever a run's worker, it is behind the bad network.
    for at in 0..2 {
        cluster.workers[at] = cluster.worker(&proxy.in_place_of(&near)).await;
    }
    let clients = cluster.clients();
    cluster.load.start(&clients, 20).await;
    let count = watch::Sender::new(0);
    let runs = cluster.load.runs();
    let following: Vec<_> =
        runs.iter().map(|run| tokio::spawn(follow(clients.to_vec(), run.clone(), count.clone()))).collect();
    let load = &cluster.load;
    let faults = async {
        load.calls(40).await;
        proxy.cut();
        load.calls(80).await;
        proxy.delay(Duration::from_millis(100));
        load.calls(120).await;
        proxy.restore();
        proxy.throttle(20_000);
        load.calls(160).await;
        proxy.restore();
        proxy.refuse();
        // Longer than leases last.
        tokio::time::sleep(Duration::from_secs(5)).await;
        proxy.restore();
        load.calls(200).await;
        proxy.stall();
        tokio::time::sleep(Duration::from_secs(5)).await;
        proxy.restore();
    };
    tokio::join!(load.start(&clients, 230), faults);
    for followed in following {
        followed.await.unwrap();
    }
    cluster.load.check(&cluster.replicas[0], &Orphans::default()).await;
}
