use serde_json::{Value, json};

use super::{output_schema, strict};

/// Schemas and what the Agents SDK 0.24.0 makes of them; null where it refuses.
const VECTORS: &str = include_str!("vectors.json");

#[test]
fn schemas_become_strict_as_the_sdk_makes_them() {
    let vectors: Vec<(Value, Value)> = serde_json::from_str(VECTORS).unwrap();
    assert!(vectors.len() > 100);
    for (schema, expected) in vectors {
        match strict(&schema) {
            // As texts: the order of keys, and of what is required, is the SDK's too.
            Ok(strict) => assert_eq!(strict.to_string(), expected.to_string(), "{schema}"),
            Err(error) => assert!(expected.is_null(), "{schema}: {error}"),
        }
    }
}

#[test]
fn what_is_strict_already_stays_as_it_is() {
    let vectors: Vec<(Value, Value)> = serde_json::from_str(VECTORS).unwrap();
    for (_, expected) in vectors.into_iter().filter(|(_, expected)| !expected.is_null()) {
        assert_eq!(strict(&expected), Ok(expected));
    }
}

#[test]
fn a_refusal_names_the_place() {
    for (schema, path, word) in [
        (json!({ "type": "object", "additionalProperties": true }), "", "additionalProperties"),
        (
            json!({ "type": "object", "properties": {
                "a/b": { "type": "array", "items": { "type": "object", "additionalProperties": {} } },
            } }),
            "/properties/a~1b/items",
            "additionalProperties",
        ),
        (json!({ "type": "object", "properties": { "a": true } }), "/properties/a", "must be an object"),
        (json!({ "anyOf": [{ "type": "object" }] }), "", "anyOf"),
        (json!({ "type": ["object", "null"] }), "", "anything else"),
        (
            json!({
                "type": "object", "properties": { "a": { "$ref": "#/$defs/A", "minimum": 1 } }, "$defs": { "A": {} },
            }),
            "/properties/a",
            "minimum",
        ),
        (
            json!({ "type": "object", "properties": { "a": { "$ref": "#/$defs/B", "title": "b" } } }),
            "/properties/a",
            "#/$defs/B",
        ),
        (
            json!({ "type": "object", "properties": { "a": { "type": "string", "allOf": [{ "type": "integer" }] } } }),
            "/properties/a",
            "type",
        ),
    ] {
        let error = strict(&schema).unwrap_err();
        assert_eq!(error.path, path, "{schema}");
        assert!(error.message.contains(word), "{schema}: {error}");
    }
}

#[test]
fn references_can_not_blow_a_schema_up() {
    let twice = |name: String| {
        json!({ "type": "object", "properties": {
        "a": { "$ref": name, "title": "a" }, "b": { "$ref": name, "title": "b" },
    } })
    };
    let mut schema = json!({ "type": "object", "$defs": { "D0": { "type": "string" } } });
    for level in 1..30 {
        schema["$defs"][format!("D{level}")] = twice(format!("#/$defs/D{}", level - 1));
    }
    assert!(strict(&schema).unwrap_err().message.contains("too large"));
    let mut schema = json!({ "type": "object", "$defs": { "A": { "enum": ["x".repeat(100_000)] } }, "properties": {} });
    for field in 0..100 {
        schema["properties"][format!("p{field}")] = json!({ "$ref": "#/$defs/A", "title": "a" });
    }
    assert!(strict(&schema).unwrap_err().message.contains("too large"));
    let deep = (0..200).fold(json!({}), |inner, _| json!({ "items": inner }));
    assert!(strict(&deep).unwrap_err().message.contains("too deeply"));
}

/// Types as pydantic writes their schema, and as the SDK's `AgentOutputSchema` sends them.
#[test]
fn outputs_are_wrapped_as_the_sdk_wraps_them() {
    let wrapped = |response: Value| {
        json!({
            "properties": { "response": response }, "required": ["response"], "title": "OutputType", "type": "object",
            "additionalProperties": false,
        })
    };
    for (schema, response) in [
        (json!({ "type": "integer" }), json!({ "title": "Response", "type": "integer" })),
        (
            json!({ "items": { "type": "integer" }, "type": "array" }),
            json!({ "items": { "type": "integer" }, "title": "Response", "type": "array" }),
        ),
        (
            json!({ "enum": ["a", "b"], "type": "string" }),
            json!({ "enum": ["a", "b"], "title": "Response", "type": "string" }),
        ),
        (
            json!({ "description": "d", "title": "T", "type": "integer" }),
            json!({ "description": "d", "title": "T", "type": "integer" }),
        ),
        (
            json!({ "anyOf": [{ "type": "integer" }, { "type": "null" }] }),
            json!({ "anyOf": [{ "type": "integer" }, { "type": "null" }], "title": "Response" }),
        ),
    ] {
        let output = output_schema(&schema).unwrap();
        assert!(output.is_wrapped);
        assert_eq!(output.schema, wrapped(response));
    }
    let x = json!({ "title": "X", "type": "integer" });
    let a = json!({ "properties": { "x": x }, "required": ["x"], "title": "A", "type": "object" });
    let mut closed = a.clone();
    closed["additionalProperties"] = false.into();
    let either = json!([{ "$ref": "#/$defs/A" }, { "type": "null" }]);
    let output = output_schema(&json!({ "$defs": { "A": a }, "anyOf": either })).unwrap();
    let mut expected = wrapped(json!({ "anyOf": either }));
    expected["$defs"] = json!({ "A": closed });
    assert_eq!(output.schema, expected);
    let output = output_schema(&json!({ "$defs": { "A": a }, "$ref": "#/$defs/A" })).unwrap();
    assert!(!output.is_wrapped);
    closed["$defs"] = json!({ "A": closed });
    assert_eq!(output.schema, closed);
}

#[test]
fn references_follow_what_wrapping_moves() {
    let properties = json!({ "more": { "$ref": "#" }, "same": { "$ref": "#/items" } });
    let schema = json!({ "type": "array", "items": { "type": "object", "properties": properties } });
    let output = output_schema(&schema).unwrap();
    let nested = r#"{"response": [{"more": [], "same": {"more": [], "same": null}}]}"#;
    assert!(output.read(nested).is_err());
    assert_eq!(output.read(r#"{"response": []}"#), Ok(json!([])));
    let properties = &output.schema["properties"]["response"]["items"]["properties"];
    assert_eq!(properties["more"]["$ref"], "#/properties/response");
    assert_eq!(properties["same"]["$ref"], "#/properties/response/items");
    let error = output_schema(&json!({ "type": "array", "items": { "type": "object", "additionalProperties": true } }))
        .unwrap_err();
    assert_eq!(error.path, "/items");
}

#[test]
fn answers_are_read_against_the_schema() {
    let list = output_schema(&json!({ "type": "array", "items": { "type": "integer" } })).unwrap();
    assert_eq!(list.read(r#" {"response": [1, 2]}"#), Ok(json!([1, 2])));
    let object = output_schema(&json!({ "type": "object", "properties": { "secret": { "type": "string" } } })).unwrap();
    assert_eq!(object.read(r#"{"secret": "x"}"#), Ok(json!({ "secret": "x" })));
    for text in [
        "",
        "hello",
        "[1]",
        r#"{"response": ["hush"]}"#,
        r#"{"response": [1], "more": 1}"#,
        "{}",
        "null",
        r#"{"response": [1]} x"#,
    ] {
        let error = list.read(text).unwrap_err();
        assert!(!error.contains("hush"), "{error}");
    }
}
