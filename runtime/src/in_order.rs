//! JSON objects whose order counts, such as schemas, which a model reads as they were written: kept as text, since a
//! database may put an object's fields into an order of its own (PostgreSQL does). For `serde(with = …)`.

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serializer};
use serde_json::Value;

/// As text.
///
/// # Errors
/// The serializer's.
pub fn serialize<S: Serializer>(value: &Value, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&value.to_string())
}

/// From text, or from the object itself, as it was stored before there was an order.
///
/// # Errors
/// The text is no JSON.
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Value, D::Error> {
    match Value::deserialize(deserializer)? {
        Value::String(text) => serde_json::from_str(&text).map_err(D::Error::custom),
        value => Ok(value),
    }
}

/// The same for what may be absent.
pub mod option {
    use super::{Deserialize, Deserializer, Serializer, Value};

    #[derive(Deserialize)]
    struct InOrder(#[serde(with = "super")] Value);

    /// As [`super::serialize`].
    ///
    /// # Errors
    /// The serializer's.
    pub fn serialize<S: Serializer>(value: &Option<Value>, serializer: S) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => super::serialize(value, serializer),
            None => serializer.serialize_none(),
        }
    }

    /// As [`super::deserialize`].
    ///
    /// # Errors
    /// The text is no JSON.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
        Ok(Option::<InOrder>::deserialize(deserializer)?.map(|InOrder(value)| value))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::spec::{HostedTool, Tool};

    #[test]
    fn what_is_stored_has_no_order_to_lose() {
        let config = json!({"z": 1, "a": {"y": 2, "b": 3}});
        let tool = Tool::Hosted(HostedTool { name: "web_search".to_owned(), config: config.clone() });
        let stored = serde_json::to_value(&tool).unwrap();
        assert_eq!(stored, json!({"name": "web_search", "config": r#"{"z":1,"a":{"y":2,"b":3}}"#}));
        for stored in [stored, json!({"name": "web_search", "config": config})] {
            let Tool::Hosted(read) = serde_json::from_value(stored).unwrap() else { panic!("another kind") };
            assert_eq!(read.config.to_string(), config.to_string());
        }
        assert!(serde_json::from_value::<HostedTool>(json!({"name": "x", "config": "{"})).is_err());
    }
}
