//! What OpenAI refuses, so that a request that would fail there fails here too; here over Chat Completions. Sources:
//! the API reference and the refusals of the service itself.

use std::collections::HashSet;

use axum::http::HeaderMap;
use serde_json::Value;

use super::record::{Api, RecordedRequest};
use super::reply::Refusal;
use super::validate_responses;

const ROLES: [&str; 6] = ["system", "developer", "user", "assistant", "tool", "function"];

/// Checks a request as a whole.
pub(super) fn check(request: &RecordedRequest, is_json: bool) -> Result<(), Refusal> {
    authorised(&request.headers)?;
    if !is_json {
        return Err(Refusal::new(400, "The body of the request is not valid JSON."));
    }
    if request.model().is_empty() {
        return Err(missing("model"));
    }
    if request.api == Api::Responses {
        return validate_responses::check(&request.body);
    }
    if !request.body["stream_options"].is_null() && !request.is_stream() {
        return Err(invalid("stream_options", "'stream_options' goes only with 'stream'."));
    }
    check_tools(&request.body)?;
    if request.messages().is_empty() {
        return Err(missing("messages"));
    }
    check_messages(request.messages())
}

/// Refuses a request without a bearer token; any token will do.
pub(super) fn authorised(headers: &HeaderMap) -> Result<(), Refusal> {
    let value = headers.get("authorization").and_then(|value| value.to_str().ok());
    match value.and_then(|value| value.strip_prefix("Bearer ")) {
        Some(token) if !token.is_empty() => Ok(()),
        _ => Err(Refusal::new(401, "An API key must come in the Authorization header.").code("invalid_api_key")),
    }
}

fn check_tools(body: &Value) -> Result<(), Refusal> {
    let Some(tools) = body.get("tools") else {
        for field in ["tool_choice", "parallel_tool_calls"] {
            if !body[field].is_null() {
                return Err(invalid(field, &format!("'{field}' goes only with 'tools'.")));
            }
        }
        return Ok(());
    };
    let tools = tools.as_array().filter(|tools| !tools.is_empty());
    let tools = tools.ok_or_else(|| invalid("tools", "'tools' must be an array of one tool or more."))?;
    for tool in tools {
        if tool["type"] != "function" {
            return Err(invalid("tools", "A tool's type must be 'function'."));
        }
        check_function(&tool["function"])?;
    }
    Ok(())
}

/// Checks the definition of a function, which is the same over either API.
pub(super) fn check_function(function: &Value) -> Result<(), Refusal> {
    let name = function["name"].as_str().unwrap_or_default();
    let fits = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if name.is_empty() || name.len() > 64 || !name.chars().all(fits) {
        return Err(invalid("tools", "A tool's name must match '^[a-zA-Z0-9_-]{1,64}$'."));
    }
    if function["strict"] == true && !is_strict(&function["parameters"]) {
        let message = format!("Invalid schema for function '{name}': it does not do for 'strict'.");
        return Err(invalid("tools", &message).code("invalid_function_parameters"));
    }
    Ok(())
}

/// Whether OpenAI takes a schema in strict mode: every object says all its properties, and requires them.
pub(super) fn is_strict(schema: &Value) -> bool {
    let is_closed = schema["type"] != "object" || {
        let required = schema["required"].as_array().map_or(&[][..], Vec::as_slice);
        let mut names = schema["properties"].as_object().into_iter().flat_map(|properties| properties.keys());
        schema["additionalProperties"] == false && names.all(|name| required.iter().any(|required| required == name))
    };
    let named = ["properties", "$defs", "definitions"].into_iter().filter_map(|name| schema[name].as_object());
    let listed = ["anyOf", "allOf"].into_iter().filter_map(|name| schema[name].as_array());
    is_closed
        && schema.get("oneOf").is_none()
        && named.flat_map(|schemas| schemas.values()).all(is_strict)
        && listed.flatten().all(is_strict)
        && (!schema["items"].is_object() || is_strict(&schema["items"]))
}

/// Each tool call is answered by the messages right after it, and no answer comes without its call.
fn check_messages(messages: &[Value]) -> Result<(), Refusal> {
    let mut open: HashSet<&str> = HashSet::new();
    for message in messages {
        let role = message["role"].as_str().unwrap_or_default();
        if !ROLES.contains(&role) {
            return Err(invalid("messages", "A message's role is unknown."));
        }
        if role == "tool" {
            if !open.remove(message["tool_call_id"].as_str().unwrap_or_default()) {
                return Err(invalid("messages", "A message of role 'tool' must answer a call of the message before."));
            }
            continue;
        }
        if !open.is_empty() {
            break;
        }
        let calls = message["tool_calls"].as_array().map_or(&[][..], Vec::as_slice);
        open.extend(calls.iter().filter_map(|call| call["id"].as_str()));
        if message["content"].is_null() && (role != "assistant" || calls.is_empty()) {
            return Err(invalid("messages", "A message without tool calls must have content."));
        }
    }
    if open.is_empty() {
        Ok(())
    } else {
        Err(invalid("messages", "Every tool call of an assistant message must be answered by a tool message."))
    }
}

pub(super) fn missing(param: &'static str) -> Refusal {
    invalid(param, &format!("The parameter '{param}' is required.")).code("missing_required_parameter")
}

pub(super) fn invalid(param: &'static str, message: &str) -> Refusal {
    Refusal::new(400, message).param(param)
}
