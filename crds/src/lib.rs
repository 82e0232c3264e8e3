//! The `Tenant` resource, and what the operator and the api say to each other about it.

pub mod definition;
pub mod protocol;
mod rules;
pub mod runtime;
pub mod status;
pub mod tenant;

pub use definition::definition;
pub use status::{Phase, TenantStatus};
pub use tenant::{Tenant, TenantSpec};
