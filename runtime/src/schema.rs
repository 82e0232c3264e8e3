//! JSON Schemas as providers hold a model to them: strict, word for word as the Agents SDK makes them
//! (`strict_schema.py`, `agent_output.py`).

mod strict;

use jsonschema::{PatternOptions, Validator};
use serde_json::{Map, Value, json};

use crate::spec::OutputSchema;

/// The property under which an output stands whose schema has no object at its root.
const WRAPPER: &str = "response";

/// The most bytes that one compiled pattern may take.
const MAX_PATTERN_BYTES: usize = 1024 * 1024;

/// Keywords whose value is a map from names to schemas.
const SCHEMA_MAPS: [&str; 5] = ["properties", "patternProperties", "$defs", "definitions", "dependentSchemas"];

/// Keywords whose value is a schema, or a list of them.
const SCHEMAS: [&str; 16] = [
    "items",
    "prefixItems",
    "additionalItems",
    "unevaluatedItems",
    "contains",
    "additionalProperties",
    "unevaluatedProperties",
    "propertyNames",
    "anyOf",
    "oneOf",
    "allOf",
    "not",
    "if",
    "then",
    "else",
    "contentSchema",
];

/// What of a schema's root belongs to the document, and stays at its root when the schema is wrapped.
const OF_THE_DOCUMENT: [&str; 4] = ["$schema", "$id", "$defs", "definitions"];

/// Why a schema has no strict form.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message} (at {path:?})")]
pub struct NotStrict {
    /// Where, as a JSON Pointer into the schema; empty for its root.
    pub path: String,
    /// For whoever wrote the schema.
    pub message: String,
}

/// The strict form of a tool's parameters: every property required, every object closed, `oneOf` as `anyOf`, defaults
/// that are null dropped, a single `allOf` merged, a `$ref` beside other keywords inlined.
///
/// # Errors
/// The first place that can't be strict without meaning something else, such as an object that takes any property.
pub fn strict(schema: &Value) -> Result<Value, NotStrict> {
    strict::root(strict::close(schema)?)
}

/// The strict form of what an agent's final answer must be. What is no object stands under the property `response`.
///
/// # Errors
/// As [`strict`].
pub fn output_schema(schema: &Value) -> Result<OutputSchema, NotStrict> {
    let closed = strict::close(schema)?;
    if is_object(&closed) && !closed["anyOf"].is_array() && *schema != json!({}) {
        return Ok(OutputSchema { schema: strict::root(closed)?, is_wrapped: false });
    }
    let wrapped = strict::close(&wrap(schema)).map_err(|error| NotStrict {
        path: error.path.strip_prefix("/properties/response").unwrap_or(&error.path).to_owned(),
        ..error
    })?;
    Ok(OutputSchema { schema: strict::root(wrapped)?, is_wrapped: true })
}

impl OutputSchema {
    /// The value that a model's answer holds, without the wrapping.
    ///
    /// # Errors
    /// What is wrong with the answer, without a word of it.
    pub fn read(&self, text: &str) -> Result<Value, String> {
        let mut value: Value = serde_json::from_str(text)
            .map_err(|error| format!("the output is not JSON (line {}, column {})", error.line(), error.column()))?;
        if let Some(keyword) = misfit(&self.schema, &value) {
            return Err(format!("the output does not fit its schema, by {keyword:?}"));
        }
        if !self.is_wrapped {
            return Ok(value);
        }
        value.get_mut(WRAPPER).map(Value::take).ok_or_else(|| format!("the output has no property {WRAPPER:?}"))
    }
}

/// A schema's validator. Its patterns are matched in linear time, and have bounded sizes; documents that it refers to are
/// never fetched.
///
/// # Errors
/// What is wrong with the schema, for whoever wrote it.
pub fn compile(schema: &Value) -> Result<Validator, String> {
    let patterns = PatternOptions::regex().size_limit(MAX_PATTERN_BYTES);
    jsonschema::options().with_pattern_options(patterns).build(schema).map_err(|error| error.to_string())
}

/// By which keyword, as a path into the schema, a value does not fit. Where in the value is not said: its keys may be
/// as secret as the rest of it. Nothing fits a schema that does not compile.
pub fn misfit(schema: &Value, value: &Value) -> Option<String> {
    let Ok(validator) = compile(schema) else { return Some(String::new()) };
    validator.iter_errors(value).next().map(|error| error.schema_path().as_str().to_owned())
}

fn is_object(schema: &Value) -> bool {
    schema["type"] == "object" || schema["type"] == json!(["object"])
}

/// The schema as the one property of an object, as pydantic writes the SDK's `TypedDict`.
fn wrap(schema: &Value) -> Value {
    let mut inner = schema.as_object().cloned().unwrap_or_default();
    let mut wrapped: Map<String, Value> =
        OF_THE_DOCUMENT.iter().filter_map(|key| inner.shift_remove_entry(*key)).collect();
    if wants_title(&inner) {
        inner.insert("title".to_owned(), "Response".into());
    }
    wrapped.insert("properties".to_owned(), json!({ WRAPPER: inner }));
    wrapped.insert("required".to_owned(), json!([WRAPPER]));
    wrapped.insert("title".to_owned(), "OutputType".into());
    wrapped.insert("type".to_owned(), "object".into());
    let mut wrapped = Value::Object(wrapped);
    move_refs(&mut wrapped);
    wrapped
}

/// Pydantic's rule: whatever has no title gets one, but for references, nullable ones among them.
fn wants_title(schema: &Map<String, Value>) -> bool {
    let is_null = |variant: &Value| *variant == json!({ "type": "null" });
    let is_nullable_reference = match schema.get("anyOf").and_then(Value::as_array).map(Vec::as_slice) {
        Some([one, other]) => is_null(other) && one.get("$ref").is_some(),
        _ => false,
    };
    !schema.contains_key("title") && !schema.contains_key("$ref") && !is_nullable_reference
}

/// Leads references to where the wrapping has moved their target.
fn move_refs(schema: &mut Value) {
    let Value::Object(schema) = schema else { return };
    if let Some(Value::String(reference)) = schema.get_mut("$ref") {
        match reference.strip_prefix('#') {
            Some("") => *reference = format!("#/properties/{WRAPPER}"),
            Some(path)
                if path.starts_with('/') && !path.starts_with("/$defs/") && !path.starts_with("/definitions/") =>
            {
                *reference = format!("#/properties/{WRAPPER}{path}");
            }
            _ => {}
        }
    }
    for keyword in SCHEMA_MAPS {
        if let Some(Value::Object(map)) = schema.get_mut(keyword) {
            map.values_mut().for_each(move_refs);
        }
    }
    for keyword in SCHEMAS {
        match schema.get_mut(keyword) {
            Some(Value::Array(list)) => list.iter_mut().for_each(move_refs),
            Some(one) => move_refs(one),
            None => {}
        }
    }
}

#[cfg(test)]
mod tests;
