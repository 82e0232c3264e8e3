//! JSON Schemas as tenants write them.

use cloister_runtime::schema;
use serde_json::Value;

use crate::error::UserError;
use crate::input::Checks;

const MAX_BYTES: usize = 64 * 1024;

/// A JSON Schema: an object that compiles, its patterns in linear time.
pub fn check_schema(checks: &mut Checks, field: &str, value: &Value) {
    if !value.is_object() {
        checks.push(UserError::invalid(field, "This must be a JSON Schema: an object."));
    } else if check_size(checks, field, value)
        && let Err(error) = schema::compile(value)
    {
        checks.push(UserError::invalid(field, format!("This is not a JSON Schema: {error}.")));
    }
}

/// JSON of a tenant's as it may be stored; whether it may.
pub fn check_size(checks: &mut Checks, field: &str, value: &Value) -> bool {
    let problem = if value.to_string().len() > MAX_BYTES {
        format!("This may have {MAX_BYTES} bytes as JSON.")
    } else if holds_nul(value) {
        "This must not contain the NUL character.".to_owned()
    } else {
        return true;
    };
    checks.push(UserError::invalid(field, problem));
    false
}

/// Whether a text in it has the NUL character, which PostgreSQL can't store.
fn holds_nul(value: &Value) -> bool {
    match value {
        Value::String(text) => text.contains('\0'),
        Value::Array(values) => values.iter().any(holds_nul),
        Value::Object(fields) => fields.iter().any(|(name, value)| name.contains('\0') || holds_nul(value)),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}
