//! The tests against the real server, its clients and its databases; a module an area.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod both;
mod crash;
mod invoice;
mod ledger;
mod metering;
mod model_server;
mod quota;
mod support;
