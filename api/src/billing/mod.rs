//! Billing: plans and what a month costs.

pub mod graphql;
pub mod invoice;
pub mod plans;
