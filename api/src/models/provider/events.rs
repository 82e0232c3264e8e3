//! The events of a Responses API stream, read tolerantly: a field that can't be read counts as absent.

use serde::Deserialize;
use serde_json::Value;

use super::chunk::without_nul;

/// An event, read from any JSON at all.
#[derive(Debug, Deserialize)]
#[serde(transparent)]
pub(super) struct Event(Value);

impl Event {
    /// What kind it is, such as `response.output_text.delta`.
    pub(super) fn kind(&self) -> &str {
        self.0["type"].as_str().unwrap_or_default()
    }

    /// The place in the output that it is about.
    pub(super) fn index(&self) -> Option<u32> {
        self.0["output_index"].as_u64().and_then(|index| u32::try_from(index).ok())
    }

    /// What is new of a text.
    pub(super) fn delta(&self) -> String {
        without_nul(self.0["delta"].as_str().unwrap_or_default())
    }

    /// The item that begins or ends.
    pub(super) fn item(&mut self) -> Value {
        storable(self.0["item"].take())
    }

    /// The response so far, or as it ended.
    pub(super) fn response(&self) -> &Value {
        &self.0["response"]
    }

    /// The output of a response that ended.
    pub(super) fn take_output(&mut self) -> Vec<Value> {
        match self.0.pointer_mut("/response/output").map(Value::take) {
            Some(Value::Array(items)) => items.into_iter().map(storable).collect(),
            _ => Vec::new(),
        }
    }

    /// An error in place of the rest: the event itself, or what it holds.
    pub(super) fn error(&self) -> &Value {
        if self.0["error"].is_null() { &self.0 } else { &self.0["error"] }
    }
}

/// A value as everybody can hold it: PostgreSQL has no NUL.
fn storable(value: Value) -> Value {
    match value {
        Value::String(text) if text.contains('\0') => Value::String(without_nul(&text)),
        Value::Array(values) => values.into_iter().map(storable).collect(),
        Value::Object(fields) => {
            fields.into_iter().map(|(name, value)| (without_nul(&name), storable(value))).collect()
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn event(json: Value) -> Event {
        serde_json::from_str(&json.to_string()).unwrap()
    }

    #[test]
    fn any_json_is_an_event() {
        for json in [json!(null), json!("text"), json!(7), json!([1, {}]), json!({"type": 5, "output_index": -1})] {
            let mut event = event(json);
            assert_eq!((event.kind(), event.index(), event.delta()), ("", None, String::new()));
            assert_eq!(event.take_output(), Vec::<Value>::new());
        }
    }

    #[test]
    fn nul_is_replaced_wherever_it_stands() {
        let mut event = event(json!({"item": {"a\0": ["\0", {"b": "x\0y"}], "c": 1}, "delta": "\0"}));
        assert_eq!(event.delta(), "\u{fffd}");
        assert_eq!(event.item(), json!({"a\u{fffd}": ["\u{fffd}", {"b": "x\u{fffd}y"}], "c": 1}));
    }
}
