//! Metering: reservations before a model call, the ledger after it, and what they add up to.

pub mod counters;
pub mod graphql;
pub mod ledger;
pub mod quota;
pub mod report;
pub mod rest;
