//! Items as the SDK's dictionaries, their keys in its order: what its summaries are written from.

use serde_json::{Map, Value, json};

use crate::item::InputItem;

/// The id that the SDK gives to what came over Chat Completions.
const FAKE_ID: &str = "__fake_id__";

/// Fields by an object's `type`, in the order of the openai package's models; others follow as they came.
const FIELDS: [(&str, &[&str]); 21] = [
    ("message", &["id", "content", "role", "status", "type", "phase"]),
    ("output_text", &["annotations", "text", "type", "logprobs"]),
    ("refusal", &["refusal", "type"]),
    ("file_citation", &["file_id", "filename", "index", "type"]),
    ("url_citation", &["end_index", "start_index", "title", "type", "url"]),
    ("container_file_citation", &["container_id", "end_index", "file_id", "filename", "start_index", "type"]),
    ("file_path", &["file_id", "index", "type"]),
    ("function_call", &["arguments", "call_id", "name", "type", "id", "async", "caller", "namespace", "status"]),
    ("reasoning", &["id", "summary", "type", "content", "encrypted_content", "status"]),
    ("summary_text", &["text", "type"]),
    ("reasoning_text", &["text", "type"]),
    ("web_search_call", &["id", "action", "status", "type"]),
    ("search", &["type", "queries", "query", "sources"]),
    ("find_in_page", &["pattern", "type", "url"]),
    ("file_search_call", &["id", "queries", "status", "type", "results"]),
    ("code_interpreter_call", &["id", "code", "container_id", "outputs", "status", "type"]),
    ("logs", &["logs", "type"]),
    (
        "image_generation_call",
        &[
            "id",
            "result",
            "status",
            "type",
            "action",
            "background",
            "error",
            "output_format",
            "quality",
            "revised_prompt",
        ],
    ),
    (
        "mcp_call",
        &["id", "arguments", "name", "server_label", "type", "approval_request_id", "error", "output", "status"],
    ),
    ("mcp_list_tools", &["id", "server_label", "tools", "type", "error"]),
    ("custom_tool_call", &["call_id", "input", "name", "type", "id"]),
];

/// Fields of objects that have no `type`, by the list they stand in.
const UNTYPED_FIELDS: [(&str, &[&str]); 2] = [
    ("results", &["attributes", "file_id", "filename", "score", "text"]),
    ("tools", &["input_schema", "name", "annotations", "description"]),
];

/// `type`, where it comes first: pages and pictures.
const TYPE_FIRST: &[&str] = &["type"];

/// Keys under which an item holds objects that are models of their own.
const NESTED: [&str; 8] = ["content", "summary", "annotations", "action", "sources", "outputs", "results", "tools"];

/// The dictionary that the SDK has for an item.
pub fn of(item: &InputItem) -> Map<String, Value> {
    let value = match item {
        InputItem::Assistant { raw: Some(raw), .. }
        | InputItem::ToolCall { raw: Some(raw), .. }
        | InputItem::HostedCall { raw } => return of_raw(raw),
        InputItem::Reasoning { raw: Some(raw), .. } if raw.get("type").is_some() => return of_raw(raw),
        InputItem::User { text } => json!({ "content": text, "role": "user" }),
        InputItem::Assistant { text, raw: None } => json!({
            "id": FAKE_ID,
            "content": [{ "annotations": [], "text": text, "type": "output_text", "logprobs": [] }],
            "role": "assistant",
            "status": "completed",
            "type": "message",
        }),
        // One of Chat Completions has nothing but where it came from.
        InputItem::Reasoning { text, .. } => {
            json!({ "id": FAKE_ID, "summary": [{ "text": text, "type": "summary_text" }], "type": "reasoning" })
        }
        InputItem::ToolCall { call_id, name, arguments, raw: None } => json!({
            "arguments": arguments,
            "call_id": call_id,
            "name": name,
            "type": "function_call",
            "id": FAKE_ID,
        }),
        InputItem::ToolOutput { call_id, output, parts } if parts.is_empty() => {
            json!({ "call_id": call_id, "output": output, "type": "function_call_output" })
        }
        InputItem::ToolOutput { call_id, parts, .. } => {
            json!({ "call_id": call_id, "output": parts, "type": "function_call_output" })
        }
        InputItem::Summary { text } => json!({ "role": "assistant", "content": text }),
    };
    match value {
        Value::Object(dict) => dict,
        _ => Map::new(),
    }
}

/// A provider's item without what is only its answer's.
fn of_raw(raw: &Value) -> Map<String, Value> {
    let Value::Object(raw) = raw else { return Map::new() };
    let mut dict = in_order(raw, "");
    dict.shift_remove("created_by");
    if dict.get("status").is_some_and(Value::is_null) {
        dict.shift_remove("status");
    }
    dict
}

fn in_order(object: &Map<String, Value>, list: &str) -> Map<String, Value> {
    let kind = object.get("type").and_then(Value::as_str);
    let by_kind = FIELDS.iter().find(|(name, _)| Some(*name) == kind);
    let by_list = UNTYPED_FIELDS.iter().find(|(name, _)| *name == list);
    let first = by_kind.or(by_list).map_or(TYPE_FIRST, |(_, fields)| fields);
    let known = first.iter().filter_map(|key| object.get_key_value(*key));
    let others = object.iter().filter(|(key, _)| !first.contains(&key.as_str()));
    known.chain(others).map(|(key, value)| (key.clone(), nested_in_order(key, value))).collect()
}

fn nested_in_order(key: &str, value: &Value) -> Value {
    match value {
        Value::Object(object) if NESTED.contains(&key) => in_order(object, "").into(),
        Value::Array(list) if NESTED.contains(&key) => list
            .iter()
            .map(|entry| match entry {
                Value::Object(object) => in_order(object, key).into(),
                other => other.clone(),
            })
            .collect(),
        other => other.clone(),
    }
}
