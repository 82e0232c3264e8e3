//! The model gateway: the only part that talks to providers, and so the meter.

pub mod catalog;
pub mod chat;
pub mod demo;
pub mod gateway;
pub mod graphql;
pub mod provider;
pub mod tokens;
