//! SIGKILL at seeded points of a thousand runs.

use cloister_tests::{TestApp, Worker};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::cluster::Cluster;
use super::load::{Load, Orphans, first};

const RUNS: usize = 1_000;

/// Calls of the model that [`RUNS`] runs make at least.
const CALLS: usize = RUNS * 4 / 3;

/// Points at which something is killed: so many calls of the model have been made.
fn points() -> Vec<usize> {
    let mut random = StdRng::seed_from_u64(0xFA17);
    let mut points = Vec::new();
    let mut at = random.random_range(20..60);
    while at < CALLS - 40 {
        points.push(at);
        at += random.random_range(60..140);
    }
    points
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_on_sqlite() {
    let (mut app, model) = first(TestApp::builder()).await;
    let load = Load::prepare(&app, model, "PRO").await;
    let clients = [load.tenant.client.clone()];
    let mut orphans = Orphans::default();
    let kills = async {
        for point in points() {
            load.calls(point).await;
            app.kill();
            let db = app.database().await;
            orphans.note(&db).await;
            // The file must be the next server's alone.
            db.close().await.unwrap();
            app.restart().await;
        }
    };
    tokio::join!(load.start(&clients, RUNS), kills);
    load.check(&app, &orphans).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_and_workers() {
    let mut cluster = Cluster::start().await;
    let clients = cluster.clients();
    let mut orphans = Orphans::default();
    let mut random = StdRng::seed_from_u64(0x5EED);
    let db = cluster.database().await;
    let Cluster { workers, replicas, load, token, .. } = &mut cluster;
    let kills = async {
        for point in points() {
            load.calls(point).await;
            let at = random.random_range(0..2);
            if random.random() {
                workers[at].kill();
                workers[at] = Worker::builder(&replicas[at], token).start().await;
            } else {
                replicas[at].kill();
                replicas[at].restart().await;
                // By now the database has heard its last word.
                orphans.note(&db).await;
            }
        }
    };
    tokio::join!(load.start(&clients, RUNS), kills);
    load.check(&replicas[0], &orphans).await;
}
