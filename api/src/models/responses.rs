//! A model request in the words of OpenAI's Responses API.
//!
//! The oracle is the OpenAI Agents SDK 0.24.0 (`agents/models/openai_responses.py`, `agents/items.py`): what it sends
//! is sent here, apart from the order of keys. Nothing is left to the provider's memory: each request holds the whole
//! conversation.

use cloister_runtime::item::InputItem;
use cloister_runtime::model::{ModelRequest, Offer, ToolDefinition};
use cloister_runtime::spec::{HostedTool, OutputSchema};
use serde_json::{Map, Value, json};

use super::chat::reasoning_effort;

/// Tool choices that name a tool of the provider's, whatever is on offer.
const HOSTED_CHOICES: [&str; 8] = [
    "code_interpreter",
    "computer_use_preview",
    "file_search",
    "image_generation",
    "mcp",
    "programmatic_tool_calling",
    "web_search",
    "web_search_preview",
];

/// The body of `POST /responses` for a streamed answer. What the request leaves open is left out.
pub fn body(upstream_model: &str, request: &ModelRequest) -> Value {
    let has_tools = !request.tools.is_empty();
    let instructions = Some(&request.instructions).filter(|instructions| !instructions.is_empty());
    let choice = |choice| tool_choice(choice, &request.tools);
    let fields = [
        ("model", Some(json!(upstream_model))),
        ("instructions", instructions.map(|instructions| json!(instructions))),
        ("input", Some(request.input.iter().filter_map(input_item).collect())),
        ("include", Some(json!([]))),
        ("tools", Some(request.tools.iter().map(offer).collect())),
        ("temperature", request.temperature.map(Value::from)),
        ("top_p", request.top_p.map(Value::from)),
        ("max_output_tokens", request.max_output_tokens.map(Value::from)),
        ("tool_choice", request.tool_choice.as_deref().map(choice)),
        ("parallel_tool_calls", request.parallel_tool_calls.filter(|_| has_tools).map(Value::from)),
        ("text", request.output.as_ref().map(text)),
        ("reasoning", request.reasoning_effort.map(|effort| json!({"effort": reasoning_effort(effort)}))),
        ("stream", Some(json!(true))),
    ];
    fields.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect::<Map<_, _>>().into()
}

/// An item as it came from the provider, or as the SDK writes one that Chat Completions or we made. Reasoning that did
/// not come over this API is not taken by it.
fn input_item(item: &InputItem) -> Option<Value> {
    Some(match item {
        InputItem::User { text } => json!({"role": "user", "content": text}),
        InputItem::Summary { text } => json!({"role": "assistant", "content": text}),
        InputItem::Assistant { raw: Some(raw), .. } | InputItem::HostedCall { raw } => replayed(raw.clone()),
        InputItem::Assistant { text, raw: None } => json!({
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}],
        }),
        InputItem::Reasoning { raw, .. } => replayed(raw.clone().filter(|raw| raw.get("provider_data").is_none())?),
        InputItem::ToolCall { call_id, raw: Some(raw), .. } => {
            let mut call = replayed(raw.clone());
            // A repeated id was replaced by ours.
            call["call_id"] = json!(call_id);
            call
        }
        InputItem::ToolCall { call_id, name, arguments, raw: None } => {
            json!({"type": "function_call", "call_id": call_id, "name": name, "arguments": arguments})
        }
        InputItem::ToolOutput { call_id, output } => {
            json!({"type": "function_call_output", "call_id": call_id, "output": output})
        }
    })
}

/// An output item as an input item: without what the API gives but doesn't take.
fn replayed(mut item: Value) -> Value {
    if let Some(fields) = item.as_object_mut() {
        fields.remove("created_by");
        if fields.get("status").is_some_and(Value::is_null) {
            fields.remove("status");
        }
    }
    item
}

fn offer(offer: &Offer) -> Value {
    match offer {
        Offer::Function(definition) => tool(definition),
        Offer::Hosted(hosted) => hosted_tool(hosted),
    }
}

fn tool(tool: &ToolDefinition) -> Value {
    json!({
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": tool.strict,
    })
}

fn hosted_tool(hosted: &HostedTool) -> Value {
    let mut tool = Map::from_iter([("type".to_owned(), json!(hosted.name))]);
    let config = hosted.config.as_object().into_iter().flatten();
    tool.extend(config.filter(|(name, _)| *name != "type").map(|(name, value)| (name.clone(), value.clone())));
    tool.into()
}

fn tool_choice(choice: &str, tools: &[Offer]) -> Value {
    let is_offered = |offer: &Offer| matches!(offer, Offer::Hosted(hosted) if hosted.name == choice);
    match choice {
        "auto" | "required" | "none" => json!(choice),
        hosted if HOSTED_CHOICES.contains(&hosted) || tools.iter().any(is_offered) => json!({"type": hosted}),
        name => json!({"type": "function", "name": name}),
    }
}

fn text(output: &OutputSchema) -> Value {
    json!({"format": {"type": "json_schema", "name": "final_output", "schema": output.schema, "strict": true}})
}
