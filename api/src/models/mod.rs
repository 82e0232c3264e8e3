//! The model gateway: the only part that talks to providers, and so the meter.

pub mod catalog;
pub mod chat;
pub mod demo;
pub mod gateway;
pub mod graphql;
pub mod provider;
pub mod responses;
pub mod tokens;

use serde_json::Value;

/// The texts of one kind in the content of a message of the Responses API, such as those of its `output_text` parts.
fn output_texts<'a>(message: &'a Value, kind: &'a str, field: &'a str) -> impl Iterator<Item = &'a str> {
    let parts = message["content"].as_array().map_or(&[][..], Vec::as_slice);
    parts.iter().filter(move |part| part["type"] == kind).filter_map(move |part| part[field].as_str())
}
