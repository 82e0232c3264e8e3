//! What a call's result becomes for the model, as the Agents SDK hands it on (`MCPUtil.invoke_mcp_tool`).

use rmcp::model::{Annotations, CallToolResult, ContentBlock, Icon, MetaObject, ResourceContents, Role};
use serde::Serialize;
use serde_json::{Value, json};

/// What the SDK tells a Chat Completions model of an output that has no text.
const NO_TEXT: &str = "[tool output omitted]";

/// A call's result.
#[derive(Clone, Debug, PartialEq)]
pub struct McpOutput {
    /// Its texts, a line each: for people.
    pub text: String,
    /// What the model is shown: `input_text` and `input_image` parts, as the Responses API takes them in an output.
    /// Empty where it is shown the text alone.
    pub parts: Vec<Value>,
    /// Whether the server says that the call failed. The model is shown the same either way.
    pub is_error: bool,
}

impl McpOutput {
    /// Structured content is left aside, as the SDK does unless it is told otherwise.
    pub(super) fn of(result: CallToolResult) -> Self {
        let is_error = result.is_error.unwrap_or_default();
        if result.content.is_empty() {
            // The SDK's `str([])`.
            return Self { text: "[]".to_owned(), parts: Vec::new(), is_error };
        }
        let parts: Vec<Value> = result.content.iter().map(part).collect();
        let texts: Vec<&str> = parts.iter().filter_map(|part| part["text"].as_str()).collect();
        let text = if texts.is_empty() { NO_TEXT.to_owned() } else { texts.join("\n") };
        Self { text, parts, is_error }
    }
}

fn part(block: &ContentBlock) -> Value {
    let text = match block {
        ContentBlock::Image(image) => {
            let url = format!("data:{};base64,{}", image.mime_type, image.data);
            return json!({ "type": "input_image", "image_url": url });
        }
        ContentBlock::Text(text) => text.text.clone(),
        ContentBlock::Audio(audio) => dump(&AudioDump {
            r#type: "audio",
            data: &audio.data,
            mime_type: &audio.mime_type,
            annotations: audio.annotations.as_ref().map(annotations),
            meta: audio.meta.as_ref(),
        }),
        ContentBlock::Resource(embedded) => dump(&EmbeddedDump {
            r#type: "resource",
            resource: contents(&embedded.resource),
            annotations: embedded.annotations.as_ref().map(annotations),
            meta: embedded.meta.as_ref(),
        }),
        ContentBlock::ResourceLink(link) => dump(&LinkDump {
            name: &link.name,
            title: link.title.as_deref(),
            uri: &link.uri,
            description: link.description.as_deref(),
            mime_type: link.mime_type.as_deref(),
            size: link.size,
            icons: link.icons.as_ref().map(|icons| icons.iter().map(icon).collect()),
            annotations: link.annotations.as_ref().map(annotations),
            meta: link.meta.as_ref(),
            r#type: "resource_link",
        }),
        other => dump(other),
    };
    json!({ "type": "input_text", "text": text })
}

/// Blocks that are no text are shown as pydantic's `model_dump_json` writes the mcp package's models: all fields in its
/// order, null where nothing is given.
fn dump(block: &impl Serialize) -> String {
    serde_json::to_string(block).unwrap_or_default()
}

#[derive(Serialize)]
struct AudioDump<'a> {
    r#type: &'static str,
    data: &'a str,
    mime_type: &'a str,
    annotations: Option<AnnotationsDump<'a>>,
    meta: Option<&'a MetaObject>,
}

#[derive(Serialize)]
struct EmbeddedDump<'a> {
    r#type: &'static str,
    resource: ContentsDump<'a>,
    annotations: Option<AnnotationsDump<'a>>,
    meta: Option<&'a MetaObject>,
}

#[derive(Default, Serialize)]
struct ContentsDump<'a> {
    uri: &'a str,
    mime_type: Option<&'a str>,
    meta: Option<&'a MetaObject>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    blob: Option<&'a str>,
}

#[derive(Serialize)]
struct LinkDump<'a> {
    name: &'a str,
    title: Option<&'a str>,
    uri: &'a str,
    description: Option<&'a str>,
    mime_type: Option<&'a str>,
    size: Option<u64>,
    icons: Option<Vec<IconDump<'a>>>,
    annotations: Option<AnnotationsDump<'a>>,
    meta: Option<&'a MetaObject>,
    r#type: &'static str,
}

#[derive(Serialize)]
struct IconDump<'a> {
    src: &'a str,
    mime_type: Option<&'a str>,
    sizes: Option<&'a [String]>,
    theme: Option<Value>,
}

#[derive(Serialize)]
struct AnnotationsDump<'a> {
    audience: Option<&'a [Role]>,
    priority: Option<f32>,
    last_modified: Option<&'a str>,
}

fn contents(contents: &ResourceContents) -> ContentsDump<'_> {
    match contents {
        ResourceContents::TextResourceContents { uri, mime_type, text, meta } => {
            ContentsDump { uri, mime_type: mime_type.as_deref(), meta: meta.as_ref(), text: Some(text), blob: None }
        }
        ResourceContents::BlobResourceContents { uri, mime_type, blob, meta } => {
            ContentsDump { uri, mime_type: mime_type.as_deref(), meta: meta.as_ref(), text: None, blob: Some(blob) }
        }
        _ => ContentsDump::default(),
    }
}

fn icon(icon: &Icon) -> IconDump<'_> {
    IconDump {
        src: &icon.src,
        mime_type: icon.mime_type.as_deref(),
        sizes: icon.sizes.as_deref(),
        theme: icon.theme.as_ref().and_then(|theme| serde_json::to_value(theme).ok()),
    }
}

fn annotations(annotations: &Annotations) -> AnnotationsDump<'_> {
    AnnotationsDump {
        audience: annotations.audience.as_deref(),
        priority: annotations.priority,
        last_modified: annotations.last_modified.as_deref(),
    }
}
