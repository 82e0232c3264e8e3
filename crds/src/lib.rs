//! The `Tenant` resource, and what the operator and the api say to each other about it.

pub mod protocol;
