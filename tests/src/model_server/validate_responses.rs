//! What OpenAI's Responses API refuses. Sources: its API reference and the refusals of the service itself.

use std::collections::HashSet;

use serde_json::Value;

use super::reply::Refusal;
use super::validate::{check_function, invalid, is_strict, missing};

const ROLES: [&str; 4] = ["user", "assistant", "system", "developer"];

/// Every parameter of `POST /v1/responses`; any other is refused.
const PARAMETERS: [&str; 29] = [
    "background",
    "context_management",
    "conversation",
    "include",
    "input",
    "instructions",
    "max_output_tokens",
    "max_tool_calls",
    "metadata",
    "model",
    "parallel_tool_calls",
    "previous_response_id",
    "prompt",
    "prompt_cache_key",
    "prompt_cache_retention",
    "reasoning",
    "safety_identifier",
    "service_tier",
    "store",
    "stream",
    "stream_options",
    "temperature",
    "text",
    "tool_choice",
    "tools",
    "top_logprobs",
    "top_p",
    "truncation",
    "user",
];

/// Calls that OpenAI runs itself, as items of the input.
const HOSTED_CALLS: [&str; 6] = [
    "web_search_call",
    "file_search_call",
    "code_interpreter_call",
    "image_generation_call",
    "mcp_call",
    "mcp_list_tools",
];

/// Checks the body of a request that has a model.
pub(super) fn check(body: &Value) -> Result<(), Refusal> {
    let names = body.as_object().into_iter().flat_map(|body| body.keys());
    if let Some(unknown) = names.into_iter().find(|name| !PARAMETERS.contains(&name.as_str())) {
        return Err(Refusal::new(400, &format!("Unknown parameter: '{unknown}'.")).code("unknown_parameter"));
    }
    check_tools(body)?;
    check_text(&body["text"])?;
    match &body["input"] {
        Value::String(text) if !text.is_empty() => Ok(()),
        Value::Array(items) if !items.is_empty() => check_items(items),
        _ => Err(missing("input")),
    }
}

fn check_tools(body: &Value) -> Result<(), Refusal> {
    let tools = match &body["tools"] {
        Value::Null => &[][..],
        Value::Array(tools) => tools,
        _ => return Err(invalid("tools", "'tools' must be an array.")),
    };
    for tool in tools {
        match tool["type"].as_str() {
            Some("function") => check_function(tool)?,
            Some(hosted) if !hosted.is_empty() => {}
            _ => return Err(invalid("tools", "A tool must have a 'type'.")),
        }
    }
    let has = |field: &str, value: &Value| tools.iter().any(|tool| &tool[field] == value);
    match &body["tool_choice"] {
        Value::Null => Ok(()),
        Value::String(word) if word == "auto" || word == "none" => Ok(()),
        Value::String(word) if word == "required" && !tools.is_empty() => Ok(()),
        choice if choice["type"] == "function" && has("name", &choice["name"]) => Ok(()),
        choice if choice["type"] != "function" && choice.is_object() && has("type", &choice["type"]) => Ok(()),
        _ => Err(invalid("tool_choice", "The tool choice is not among the 'tools' parameter.")),
    }
}

fn check_text(text: &Value) -> Result<(), Refusal> {
    let format = &text["format"];
    match format["type"].as_str() {
        None if format.is_null() => Ok(()),
        Some("text" | "json_object") => Ok(()),
        Some("json_schema") if !format["name"].is_string() || !format["schema"].is_object() => {
            Err(missing("text.format"))
        }
        Some("json_schema") if format["strict"] == true && !is_strict(&format["schema"]) => {
            Err(invalid("text.format.schema", "Invalid schema for response_format: it does not do for 'strict'."))
        }
        Some("json_schema") => Ok(()),
        _ => Err(invalid("text.format", "The type of 'text.format' is unknown.")),
    }
}

/// Each item by itself; each call has its output and each output its call; reasoning comes with what it led to.
fn check_items(items: &[Value]) -> Result<(), Refusal> {
    let ids = |kind: &str| -> HashSet<&str> {
        items.iter().filter(|item| item["type"] == kind).filter_map(|item| item["call_id"].as_str()).collect()
    };
    let (calls, outputs) = (ids("function_call"), ids("function_call_output"));
    for (index, item) in items.iter().enumerate() {
        check_item(item)?;
        let call_id = item["call_id"].as_str().unwrap_or_default();
        match item["type"].as_str() {
            Some("function_call") if !outputs.contains(call_id) => {
                return Err(invalid("input", &format!("No tool output found for function call {call_id}.")));
            }
            Some("function_call_output") if !calls.contains(call_id) => {
                return Err(invalid(
                    "input",
                    &format!("No tool call found for function call output with call_id {call_id}."),
                ));
            }
            Some("reasoning") if !items.get(index + 1).is_some_and(follows_reasoning) => {
                let id = item["id"].as_str().unwrap_or_default();
                let message =
                    format!("Item '{id}' of type 'reasoning' was provided without its required following item.");
                return Err(invalid("input", &message));
            }
            _ => {}
        }
    }
    Ok(())
}

fn follows_reasoning(item: &Value) -> bool {
    match item["type"].as_str() {
        Some("function_call" | "reasoning") => true,
        Some("message") => item["role"] == "assistant",
        Some(kind) => HOSTED_CALLS.contains(&kind),
        None => false,
    }
}

fn check_item(item: &Value) -> Result<(), Refusal> {
    if item.get("provider_data").is_some() {
        return Err(invalid("input", "Unknown parameter: 'input[].provider_data'.").code("unknown_parameter"));
    }
    if !item["status"].is_null()
        && !["in_progress", "completed", "incomplete", "failed"].iter().any(|s| item["status"] == *s)
    {
        return Err(invalid("input", "An item's status is unknown."));
    }
    let has_texts = |names: &[&str]| names.iter().all(|name| item[*name].is_string());
    let (prefix, is_complete) = match item["type"].as_str() {
        None | Some("message") => {
            let has_role = ROLES.iter().any(|role| item["role"] == *role);
            ("msg", has_role && (item["content"].is_string() || item["content"].is_array()))
        }
        Some("function_call") => ("fc", has_texts(&["call_id", "name", "arguments"])),
        Some("function_call_output") => {
            let is_part = |part: &Value| part["text"].is_string() || part["image_url"].is_string();
            let has_parts = item["output"].as_array().is_some_and(|parts| parts.iter().all(is_part));
            ("fc", has_texts(&["call_id"]) && (item["output"].is_string() || has_parts))
        }
        Some("reasoning") => ("rs", has_texts(&["id"]) && item["summary"].is_array()),
        Some(kind) if HOSTED_CALLS.contains(&kind) => ("", has_texts(&["id"])),
        _ => return Err(invalid("input", "An item's type is unknown.")),
    };
    if !is_complete {
        return Err(invalid("input", "An item lacks what its type requires."));
    }
    match &item["id"] {
        Value::Null => Ok(()),
        Value::String(id) if id.starts_with(prefix) => Ok(()),
        id => {
            Err(invalid("input", &format!("Invalid 'input[].id': {id}. Expected an ID that begins with '{prefix}'.")))
        }
    }
}
