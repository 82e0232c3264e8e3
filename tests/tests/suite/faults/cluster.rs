//! The whole of it: PostgreSQL and Redis of the test's own, two replicas, and two workers of an enterprise tenant, each at
//! a replica of its own.

use cloister_tests::postgres::PostgresServer;
use cloister_tests::{Client, ModelServer, RedisServer, TestApp, Worker};
use sea_orm::DatabaseConnection;

use super::load::{Load, first};

/// A cluster and its load.
pub struct Cluster {
    // In this order: what uses another part goes before it.
    /// The tenant's own.
    pub workers: [Worker; 2],
    /// The first one's address is the tenant's client's.
    pub replicas: [TestApp; 2],
    /// The tenant's runs.
    pub load: Load,
    /// What replicas tell each other through.
    pub redis: RedisServer,
    _postgres: PostgresServer,
    /// The workers'.
    pub token: String,
}

impl Cluster {
    /// Starts all of it.
    pub async fn start() -> Cluster {
        let (postgres, redis) = (PostgresServer::start().await, RedisServer::start().await);
        let builder = TestApp::builder().database_url(postgres.url().as_str()).redis(&redis);
        let (app, model): (TestApp, ModelServer) = first(builder).await;
        let load = Load::prepare(&app, model, "ENTERPRISE").await;
        let token = Worker::token(&app, &load.tenant).await.1;
        let other = app.replica().await;
        let replicas = [app, other];
        let workers =
            [Worker::builder(&replicas[0], &token).start().await, Worker::builder(&replicas[1], &token).start().await];
        Cluster { workers, replicas, load, redis, _postgres: postgres, token }
    }

    /// The tenant's client of each replica.
    pub fn clients(&self) -> [Client; 2] {
        self.replicas.each_ref().map(|replica| replica.client(&self.load.tenant.key))
    }

    /// Looks at the database.
    pub async fn database(&self) -> DatabaseConnection {
        self.replicas[0].database().await
    }

    /// One more worker, which speaks to the api at another address.
    pub async fn worker(&self, api_url: &str) -> Worker {
        Worker::at(api_url, &self.token).start().await
    }
}
