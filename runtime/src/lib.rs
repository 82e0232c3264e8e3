//! The agent loop, as a library without a database.
//!
//! [`run::run`] takes a [`spec::Claim`], asks a [`model::Model`], calls the tenant's webhooks and writes
//! what happens to a [`journal::Journal`]. Who implements the two traits decides where it runs: the
//! api process (shared pool) or a worker in the tenant's own namespace.

pub mod ids;
pub mod in_order;
pub mod item;
pub mod journal;
pub mod mcp;
pub mod model;
pub mod protocol;
pub mod recorder;
pub mod run;
pub mod schema;
pub mod signals;
pub mod spec;
pub mod webhook;
