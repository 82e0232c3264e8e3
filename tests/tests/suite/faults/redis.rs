//! Redis is flushed, restarted, stands still and is away, under load.

use std::env;
use std::time::Duration;

use tokio::sync::watch;

use super::cluster::Cluster;
use super::load::Orphans;
use crate::follow::follow;

/// How long Redis is away: `CLOISTER_TEST_REDIS_AWAY_SECONDS`, 20 unless given.
fn away() -> Duration {
    let seconds = env::var("CLOISTER_TEST_REDIS_AWAY_SECONDS").ok().and_then(|seconds| seconds.parse().ok());
    Duration::from_secs(seconds.unwrap_or(20))
}

#[tokio::test(flavor = "multi_thread")]
async fn flushed_restarted_paused_and_away() {
    let mut cluster = Cluster::start().await;
    let clients = cluster.clients();
    cluster.load.start(&clients, 20).await;
    let count = watch::Sender::new(0);
    let runs = cluster.load.runs();
    let following: Vec<_> =
        runs.iter().map(|run| tokio::spawn(follow(clients.to_vec(), run.clone(), count.clone()))).collect();
    let (load, redis) = (&cluster.load, &mut cluster.redis);
    let faults = async {
        load.calls(40).await;
        let _: String = redis.command(&["FLUSHALL"]).await;
        load.calls(80).await;
        redis.restart().await;
        load.calls(120).await;
        redis.pause();
        tokio::time::sleep(Duration::from_secs(3)).await;
        redis.resume();
        load.calls(160).await;
        redis.kill();
        // Runs go on without it.
        load.calls(240).await;
        tokio::time::sleep(away()).await;
        redis.restart().await;
    };
    tokio::join!(load.start(&clients, 280), faults);
    for followed in following {
        followed.await.unwrap();
    }
    // And with it again.
    cluster.load.start(&clients, 20).await;
    cluster.load.check(&cluster.replicas[0], &Orphans::default()).await;
}
