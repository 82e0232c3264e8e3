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
        InputItem::ToolOutput { call_id, output, parts } if parts.is_empty() => {
            json!({"type": "function_call_output", "call_id": call_id, "output": output})
        }
        InputItem::ToolOutput { call_id, parts, .. } => {
            json!({"type": "function_call_output", "call_id": call_id, "output": parts})
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The body of a request with these fields.
    fn sent(fields: Value) -> Value {
        let mut request = json!({"model": "catalogue-name", "instructions": "", "input": [], "tools": []});
        request.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        body("upstream", &serde_json::from_value(request).unwrap())
    }

    fn input(item: Value) -> Value {
        sent(json!({"input": [item]}))["input"].clone()
    }

    #[test]
    fn what_is_open_is_left_out() {
        let body = sent(json!({"input": [{"type": "user", "text": "hi"}], "parallel_tool_calls": true}));
        assert_eq!(
            body,
            json!({
                "model": "upstream",
                "input": [{"role": "user", "content": "hi"}],
                "include": [],
                "tools": [],
                "stream": true,
            })
        );
    }

    #[test]
    fn what_is_set_is_sent() {
        let schema = json!({"type": "object", "properties": {}});
        let body = sent(json!({
            "instructions": "Be kind.",
            "tools": [
                {"hosted": {"name": "web_search", "config": {"search_context_size": "low", "type": "x"}}},
                {"function": {"name": "f", "description": "", "parameters": schema, "strict": true}},
            ],
            "temperature": 0.5,
            "top_p": 1.0,
            "max_output_tokens": 7,
            "tool_choice": "f",
            "parallel_tool_calls": false,
            "reasoning_effort": "low",
            "output": {"schema": schema, "is_wrapped": false},
        }));
        assert_eq!(
            body,
            json!({
                "model": "upstream",
                "instructions": "Be kind.",
                "input": [],
                "include": [],
                "tools": [
                    {"type": "web_search", "search_context_size": "low"},
                    {"type": "function", "name": "f", "description": "", "parameters": schema, "strict": true},
                ],
                "temperature": 0.5,
                "top_p": 1.0,
                "max_output_tokens": 7,
                "tool_choice": {"type": "function", "name": "f"},
                "parallel_tool_calls": false,
                "reasoning": {"effort": "low"},
                "text": {"format": {"type": "json_schema", "name": "final_output", "schema": schema, "strict": true}},
                "stream": true,
            })
        );
    }

    #[test]
    fn tool_choices_are_words_hosted_tools_or_functions() {
        let tools = json!([{"hosted": {"name": "web_search_2025_08_26", "config": {}}}]);
        let choice = |choice: &str| sent(json!({"tools": tools, "tool_choice": choice}))["tool_choice"].clone();
        for word in ["auto", "required", "none"] {
            assert_eq!(choice(word), json!(word));
        }
        for hosted in ["web_search", "file_search", "code_interpreter", "web_search_2025_08_26"] {
            assert_eq!(choice(hosted), json!({"type": hosted}));
        }
        assert_eq!(choice("weather"), json!({"type": "function", "name": "weather"}));
    }

    #[test]
    fn the_providers_own_items_go_back_as_they_came() {
        let reasoning = json!({"id": "rs_1", "type": "reasoning", "summary": [], "encrypted_content": "gAAA"});
        assert_eq!(input(json!({"type": "reasoning", "text": "", "raw": reasoning})), json!([reasoning]));
        let search = json!({"id": "ws_1", "type": "web_search_call", "status": "completed", "action": {"query": null}});
        assert_eq!(input(json!({"type": "hosted_call", "raw": search})), json!([search]));
        let raw = json!({"id": "msg_1", "type": "message", "content": [], "status": null, "created_by": "x"});
        let message = json!({"id": "msg_1", "type": "message", "content": []});
        assert_eq!(input(json!({"type": "assistant", "text": "", "raw": raw})), json!([message]));
        let raw = json!({"id": "fc_1", "type": "function_call", "call_id": "again", "name": "f", "arguments": ""});
        let call = json!({"type": "tool_call", "call_id": "ours", "name": "f", "arguments": "", "raw": raw});
        assert_eq!(input(call)[0]["call_id"], "ours");
    }

    #[test]
    fn items_of_chat_completions_are_put_into_its_words() {
        let text = json!({"type": "output_text", "text": "Hi", "annotations": [], "logprobs": []});
        let message = json!({"type": "message", "role": "assistant", "status": "completed", "content": [text]});
        assert_eq!(input(json!({"type": "assistant", "text": "Hi"})), json!([message]));
        let call = json!({"type": "tool_call", "call_id": "c", "name": "f", "arguments": ""});
        let expected = json!([{"type": "function_call", "call_id": "c", "name": "f", "arguments": ""}]);
        assert_eq!(input(call), expected);
        let output = json!({"type": "tool_output", "call_id": "c", "output": "1"});
        let expected = json!([{"type": "function_call_output", "call_id": "c", "output": "1"}]);
        assert_eq!(input(output), expected);
        let summary = json!({"type": "summary", "text": "Before."});
        assert_eq!(input(summary), json!([{"role": "assistant", "content": "Before."}]));
        let origin = json!({"provider_data": {"model": "deepseek", "field": "reasoning_content"}});
        assert_eq!(input(json!({"type": "reasoning", "text": "hm", "raw": origin})), json!([]));
        assert_eq!(input(json!({"type": "reasoning", "text": "hm"})), json!([]));
    }
}
