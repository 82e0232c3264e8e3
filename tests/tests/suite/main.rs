//! The tests against the real server, its clients and its databases; a module an area.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod agents;
mod auth;
mod bad_input;
mod bad_requests;
mod both;
mod calls;
mod config;
mod conversations;
mod crash;
mod events;
mod faults;
mod follow;
mod generated;
mod handoffs;
mod invoice;
mod ledger;
mod lies;
mod limits;
mod matrix;
mod metering;
mod model_server;
mod quota;
mod regressions;
mod replicas;
mod rest;
mod retention;
mod runs;
mod schema;
mod statements;
mod steps;
mod support;
mod tools;
mod transports;
mod workers;
