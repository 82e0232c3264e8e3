//! The server: everything a client talks to, the shared pool, the model gateway, metering, billing.

pub mod agents;
pub mod app;
pub mod billing;
pub mod bus;
pub mod clock;
pub mod config;
pub mod conversations;
pub mod db;
pub mod dev;
mod drain;
pub mod error;
pub mod graphql;
pub mod http;
pub mod ids;
pub mod input;
pub mod keys;
pub mod metrics;
pub mod models;
pub mod money;
pub mod rate;
pub mod runs;
pub mod secrets;
pub mod serve;
pub mod tenants;
pub mod usage;
pub mod viewer;
