//! A model request in the words of OpenAI's Chat Completions API.
//!
//! The oracle is the OpenAI Agents SDK 0.24.0 (`agents/models/chatcmpl_converter.py`, `openai_chatcompletions.py`):
//! what it sends is sent here, apart from the order of keys. Differences: `stream_options` is always there, since
//! the ledger needs the usage, and `store` never is.

use cloister_runtime::item::InputItem;
use cloister_runtime::model::{ModelRequest, Offer, ToolDefinition};
use cloister_runtime::spec::ReasoningEffort;
use serde_json::{Map, Value, json};

/// The body of `POST /chat/completions` for a streamed answer. What the request leaves open is left out.
pub fn body(upstream_model: &str, request: &ModelRequest) -> Value {
    let has_tools = !request.tools.is_empty();
    let fields = [
        ("model", Some(json!(upstream_model))),
        ("messages", Some(messages(request))),
        ("tools", has_tools.then(|| request.tools.iter().filter_map(offer).collect())),
        ("temperature", request.temperature.map(Value::from)),
        ("top_p", request.top_p.map(Value::from)),
        ("max_tokens", request.max_output_tokens.map(Value::from)),
        ("tool_choice", request.tool_choice.as_deref().map(tool_choice)),
        // OpenAI refuses it where there are no tools.
        ("parallel_tool_calls", request.parallel_tool_calls.filter(|_| has_tools).map(Value::from)),
        ("reasoning_effort", request.reasoning_effort.map(reasoning_effort)),
        ("stream", Some(json!(true))),
        ("stream_options", Some(json!({"include_usage": true}))),
    ];
    fields.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect::<Map<_, _>>().into()
}

fn messages(request: &ModelRequest) -> Value {
    let mut messages = Vec::new();
    if !request.instructions.is_empty() {
        messages.push(json!({"role": "system", "content": request.instructions}));
    }
    let mut turn = AssistantTurn::default();
    for item in &request.input {
        match item {
            InputItem::User { text } => {
                messages.extend(turn.take_message());
                messages.push(json!({"role": "user", "content": text}));
            }
            InputItem::Assistant { text, .. } | InputItem::Summary { text } => {
                if turn.text.is_some() {
                    messages.extend(turn.take_message());
                }
                turn.text = Some(text);
            }
            InputItem::ToolCall { call_id, name, arguments, .. } => {
                turn.calls.push(tool_call(call_id, name, arguments))
            }
            InputItem::ToolOutput { call_id, output } => {
                messages.extend(turn.take_message());
                messages.push(json!({"role": "tool", "tool_call_id": call_id, "content": output}));
            }
            InputItem::Reasoning { .. } | InputItem::HostedCall { .. } => {}
        }
    }
    messages.extend(turn.take_message());
    messages.into()
}

/// What a model said and called in one response, which is one message.
#[derive(Default)]
struct AssistantTurn<'a> {
    text: Option<&'a str>,
    calls: Vec<Value>,
}

impl AssistantTurn<'_> {
    /// The message, if there is one; the next item begins another.
    fn take_message(&mut self) -> Option<Value> {
        let Self { text, calls } = std::mem::take(self);
        match (text, calls.is_empty()) {
            (None, true) => None,
            (text, true) => Some(json!({"role": "assistant", "content": text})),
            // Content is null where there are only calls.
            (text, false) => Some(json!({"role": "assistant", "content": text, "tool_calls": calls})),
        }
    }
}

fn tool_call(call_id: &str, name: &str, arguments: &str) -> Value {
    let arguments = if arguments.is_empty() { "{}" } else { arguments };
    json!({"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}})
}

fn offer(offer: &Offer) -> Option<Value> {
    match offer {
        Offer::Function(definition) => Some(tool(definition)),
        Offer::Hosted(_) => None,
    }
}

fn tool(tool: &ToolDefinition) -> Value {
    json!({
        "type": "function",
        "function": {
            "name": tool.name,
            "description": tool.description,
            "parameters": tool.parameters,
            "strict": tool.strict,
        },
    })
}

fn tool_choice(choice: &str) -> Value {
    match choice {
        "auto" | "required" | "none" => json!(choice),
        name => json!({"type": "function", "function": {"name": name}}),
    }
}

fn reasoning_effort(effort: ReasoningEffort) -> Value {
    json!(match effort {
        ReasoningEffort::Minimal => "minimal",
        ReasoningEffort::Low => "low",
        ReasoningEffort::Medium => "medium",
        ReasoningEffort::High => "high",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(input: Vec<InputItem>) -> ModelRequest {
        ModelRequest {
            model: "catalogue-name".to_owned(),
            instructions: String::new(),
            input,
            tools: Vec::new(),
            output: None,
            temperature: None,
            top_p: None,
            max_output_tokens: None,
            tool_choice: None,
            parallel_tool_calls: None,
            reasoning_effort: None,
        }
    }

    fn user(text: &str) -> InputItem {
        InputItem::User { text: text.to_owned() }
    }

    fn assistant(text: &str) -> InputItem {
        InputItem::Assistant { text: text.to_owned(), raw: None }
    }

    fn call(id: &str, arguments: &str) -> InputItem {
        InputItem::ToolCall { call_id: id.to_owned(), name: "f".to_owned(), arguments: arguments.to_owned(), raw: None }
    }

    fn output(id: &str, output: &str) -> InputItem {
        InputItem::ToolOutput { call_id: id.to_owned(), output: output.to_owned() }
    }

    #[test]
    fn what_is_open_is_left_out() {
        let request = ModelRequest { parallel_tool_calls: Some(true), ..request(vec![user("hi")]) };
        assert_eq!(
            body("upstream", &request),
            json!({
                "model": "upstream",
                "messages": [{"role": "user", "content": "hi"}],
                "stream": true,
                "stream_options": {"include_usage": true},
            })
        );
    }

    #[test]
    fn what_is_set_is_sent() {
        let request = ModelRequest {
            instructions: "Be kind.".to_owned(),
            tools: vec![Offer::Function(ToolDefinition {
                name: "f".to_owned(),
                description: String::new(),
                parameters: json!({"type": "object", "properties": {}}),
                strict: true,
            })],
            temperature: Some(0.5),
            top_p: Some(1.0),
            max_output_tokens: Some(7),
            tool_choice: Some("f".to_owned()),
            parallel_tool_calls: Some(false),
            reasoning_effort: Some(ReasoningEffort::Low),
            ..request(vec![user("hi")])
        };
        assert_eq!(
            body("upstream", &request),
            json!({
                "model": "upstream",
                "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}],
                "tools": [{"type": "function", "function": {
                    "name": "f", "description": "", "parameters": {"type": "object", "properties": {}}, "strict": true,
                }}],
                "temperature": 0.5,
                "top_p": 1.0,
                "max_tokens": 7,
                "tool_choice": {"type": "function", "function": {"name": "f"}},
                "parallel_tool_calls": false,
                "reasoning_effort": "low",
                "stream": true,
                "stream_options": {"include_usage": true},
            })
        );
    }

    #[test]
    fn tool_choices_by_word_are_words() {
        for word in ["auto", "required", "none"] {
            assert_eq!(tool_choice(word), json!(word));
        }
    }

    #[test]
    fn text_and_calls_of_a_turn_are_one_message() {
        let items = vec![
            user("hi"),
            assistant("let me see"),
            call("a", ""),
            call("b", "{\"x\":1}"),
            output("a", "1"),
            output("b", "2"),
            call("c", "{}"),
            output("c", "3"),
            assistant("done"),
            user("thanks"),
        ];
        let function = |arguments: &str| json!({"name": "f", "arguments": arguments});
        assert_eq!(
            messages(&request(items)),
            json!([
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "let me see", "tool_calls": [
                    {"id": "a", "type": "function", "function": function("{}")},
                    {"id": "b", "type": "function", "function": function("{\"x\":1}")},
                ]},
                {"role": "tool", "tool_call_id": "a", "content": "1"},
                {"role": "tool", "tool_call_id": "b", "content": "2"},
                {"role": "assistant", "content": null, "tool_calls": [
                    {"id": "c", "type": "function", "function": function("{}")},
                ]},
                {"role": "tool", "tool_call_id": "c", "content": "3"},
                {"role": "assistant", "content": "done"},
                {"role": "user", "content": "thanks"},
            ])
        );
    }

    #[test]
    fn a_text_after_calls_joins_them_and_a_second_text_begins_a_message() {
        let merged = messages(&request(vec![call("a", "{}"), assistant("so"), output("a", "1")]));
        assert_eq!(merged[0]["content"], "so");
        assert_eq!(merged[0]["tool_calls"][0]["id"], "a");
        assert_eq!(merged[1]["role"], "tool");
        let apart = messages(&request(vec![assistant("one"), assistant("two")]));
        assert_eq!(apart, json!([{"role": "assistant", "content": "one"}, {"role": "assistant", "content": "two"}]));
    }
}
