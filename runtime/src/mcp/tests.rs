use rmcp::model::CallToolResult;
use serde_json::json;

use super::*;

fn output(result: Value) -> McpOutput {
    McpOutput::of(serde_json::from_value::<CallToolResult>(result).unwrap())
}

/// Results and what the Agents SDK 0.24.0 with mcp 2.3.0 makes of them.
#[test]
fn results_are_shown_as_the_sdk_shows_them() {
    let text = |text: &str| json!({ "type": "input_text", "text": text });
    for (content, parts) in [
        (json!([{ "type": "text", "text": "hi" }]), json!([text("hi")])),
        (
            json!([{ "type": "text", "text": "a" }, { "type": "image", "data": "QUJD", "mimeType": "image/png" }]),
            json!([text("a"), { "type": "input_image", "image_url": "data:image/png;base64,QUJD" }]),
        ),
        (
            json!([{ "type": "audio", "data": "QUJD", "mimeType": "audio/wav" }]),
            json!([text(r#"{"type":"audio","data":"QUJD","mime_type":"audio/wav","annotations":null,"meta":null}"#)]),
        ),
        (
            json!([{ "type": "resource", "resource": { "uri": "file:///x", "text": "T é", "mimeType": "text/plain" } }]),
            json!([text(concat!(
                r#"{"type":"resource","resource":{"uri":"file:///x","mime_type":"text/plain","meta":null,"#,
                r#""text":"T é"},"annotations":null,"meta":null}"#
            ))]),
        ),
        (
            json!([{ "type": "resource", "resource": { "uri": "file:///x", "blob": "QUJD" } }]),
            json!([text(concat!(
                r#"{"type":"resource","resource":{"uri":"file:///x","mime_type":null,"meta":null,"blob":"QUJD"},"#,
                r#""annotations":null,"meta":null}"#
            ))]),
        ),
        (
            json!([{ "type": "resource_link", "uri": "file:///x", "name": "x", "description": "d", "size": 3,
                "mimeType": "t/p", "title": "t", "icons": [{ "src": "s" }], "_meta": { "a": 1 },
                "annotations": { "priority": 0.5, "audience": ["user"] } }]),
            json!([text(concat!(
                r#"{"name":"x","title":"t","uri":"file:///x","description":"d","mime_type":"t/p","size":3,"#,
                r#""icons":[{"src":"s","mime_type":null,"sizes":null,"theme":null}],"annotations":{"audience":["user"],"#,
                r#""priority":0.5,"last_modified":null},"meta":{"a":1},"type":"resource_link"}"#
            ))]),
        ),
        (json!([]), json!([])),
    ] {
        assert_eq!(json!(output(json!({ "content": content })).parts), parts);
    }
}

#[test]
fn people_are_shown_the_texts() {
    let two = output(
        json!({ "isError": true, "content": [{ "type": "text", "text": "a" }, { "type": "text", "text": "b" }] }),
    );
    assert_eq!((two.text.as_str(), two.is_error), ("a\nb", true));
    let image = output(json!({ "content": [{ "type": "image", "data": "QUJD", "mimeType": "image/png" }] }));
    assert_eq!(image.text, "[tool output omitted]");
    // Structured content is left aside.
    let nothing = output(json!({ "content": [], "structuredContent": { "a": 1 } }));
    assert_eq!((nothing.text.as_str(), nothing.parts.len(), nothing.is_error), ("[]", 0, false));
}

#[test]
fn tools_are_described_as_the_sdk_describes_them() {
    let schema = json!({ "type": "object" });
    for (tool, description) in [
        (json!({ "description": "d", "title": "t" }), "d"),
        (json!({ "description": "", "title": "t" }), "t"),
        (json!({ "annotations": { "title": "a" } }), "a"),
        (json!({}), ""),
    ] {
        let mut tool = tool;
        tool["name"] = "x".into();
        tool["inputSchema"] = schema.clone();
        let definition = definition(serde_json::from_value(tool).unwrap());
        let parameters = json!({ "type": "object", "properties": {} });
        let expected = ToolDefinition { name: "x".into(), description: description.into(), parameters, strict: false };
        assert_eq!(definition, expected);
    }
}
