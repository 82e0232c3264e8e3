//! What the tests stand on: the real server started in one line, a scripted model provider that
//! counts what it served, a webhook receiver, a database server of their own, and clients.
//!
//! A test process cleans up after itself however it ends (see [`scope`]).

#![allow(clippy::unwrap_used, clippy::expect_used)]

pub mod app;
pub mod client;
pub mod cluster;
pub mod gate;
pub mod ids;
pub mod key;
pub mod mcp_server;
pub mod model_server;
pub mod node;
pub mod operator;
pub mod postgres;
pub mod process;
pub mod proxy;
pub mod redis;
pub mod scope;
pub mod tool_server;
pub mod worker;

use std::time::Duration;

/// How long anything here waits for something that should come at once, before the test fails.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub use app::{Tenant, TestApp};
pub use client::{Client, GraphqlResponse};
pub use cluster::Cluster;
pub use gate::{Fault, Gate, Watched};
pub use mcp_server::{McpAnswer, McpFault, McpServer};
pub use model_server::{ModelServer, Reply};
pub use operator::{Operator, OperatorBuilder};
pub use process::Process;
pub use proxy::Proxy;
pub use redis::RedisServer;
pub use tool_server::{ToolAnswer, ToolServer};
pub use worker::{Worker, WorkerBuilder};
