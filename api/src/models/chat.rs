//! A model request in the words of OpenAI's Chat Completions API.
//!
//! The oracle is the OpenAI Agents SDK 0.24.0 (`agents/models/chatcmpl_converter.py`, `openai_chatcompletions.py`):
//! what it sends is sent here, apart from the order of keys. Differences: `stream_options` is always there, since
//! the ledger needs the usage, and `store` never is.

use cloister_runtime::item::InputItem;
use cloister_runtime::model::{ModelRequest, Offer, ToolDefinition};
use cloister_runtime::spec::{OutputSchema, ReasoningEffort};
use serde_json::{Map, Value, json};

use super::output_texts;

/// What of a request Chat Completions has no words for.
#[derive(Debug, thiserror::Error)]
pub enum Unfit {
    /// A tool that the provider would run.
    #[error("the tool {0:?} is run by providers over the Responses API only")]
    HostedTool(String),
    /// A call of such a tool, in the history.
    #[error("the conversation holds a {0:?}, which goes to providers over the Responses API only")]
    HostedCall(String),
}

/// The body of `POST /chat/completions` for a streamed answer. What the request leaves open is left out. `replay` is
/// whether the provider takes a model's reasoning back; none: as the Agents SDK decides.
pub fn body(upstream_model: &str, request: &ModelRequest, replay: Option<bool>) -> Result<Value, Unfit> {
    let has_tools = !request.tools.is_empty();
    let tools: Vec<Value> = request.tools.iter().map(offer).collect::<Result<_, _>>()?;
    let fields = [
        ("model", Some(json!(upstream_model))),
        ("messages", Some(messages(upstream_model, request, replay)?)),
        ("tools", has_tools.then(|| tools.into())),
        ("temperature", request.temperature.map(Value::from)),
        ("top_p", request.top_p.map(Value::from)),
        ("max_tokens", request.max_output_tokens.map(Value::from)),
        ("tool_choice", request.tool_choice.as_deref().map(tool_choice)),
        ("response_format", request.output.as_ref().map(response_format)),
        // OpenAI refuses it where there are no tools.
        ("parallel_tool_calls", request.parallel_tool_calls.filter(|_| has_tools).map(Value::from)),
        ("reasoning_effort", request.reasoning_effort.map(reasoning_effort)),
        ("stream", Some(json!(true))),
        ("stream_options", Some(json!({"include_usage": true}))),
    ];
    Ok(fields.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect::<Map<_, _>>().into())
}

fn messages(upstream_model: &str, request: &ModelRequest, replay: Option<bool>) -> Result<Value, Unfit> {
    let mut messages = Messages::default();
    if !request.instructions.is_empty() {
        messages.push(json!({"role": "system", "content": request.instructions}));
    }
    for item in &request.input {
        match item {
            InputItem::User { text } => messages.push(json!({"role": "user", "content": text})),
            InputItem::Summary { text } => messages.push(json!({"role": "assistant", "content": text})),
            InputItem::Assistant { text, raw: None } => messages.say(Some(text.clone()), None),
            InputItem::Assistant { raw: Some(raw), .. } => {
                let texts = output_texts(raw, "output_text", "text").collect::<Vec<_>>();
                let refusal = output_texts(raw, "refusal", "refusal").last().map(str::to_owned);
                messages.say((!texts.is_empty()).then(|| texts.join("\n")), refusal);
            }
            InputItem::ToolCall { call_id, name, arguments, .. } => messages.call(tool_call(call_id, name, arguments)),
            InputItem::ToolOutput { call_id, output, parts } => {
                // Chat Completions takes no images here.
                let texts: Vec<Value> = parts
                    .iter()
                    .filter(|part| part["type"] == "input_text")
                    .map(|part| json!({"type": "text", "text": part["text"]}))
                    .collect();
                let content = if texts.is_empty() { json!(output) } else { json!(texts) };
                messages.push(json!({"role": "tool", "tool_call_id": call_id, "content": content}));
            }
            InputItem::Reasoning { text, raw } => {
                messages.thought = Thought::of(text, raw.as_ref(), upstream_model, replay)
            }
            InputItem::HostedCall { raw } => {
                return Err(Unfit::HostedCall(raw["type"].as_str().unwrap_or_default().to_owned()));
            }
        }
    }
    messages.end_turn();
    Ok(messages.done.into())
}

/// The messages so far, and the one that a model's items of one response are gathered in.
#[derive(Default)]
struct Messages {
    done: Vec<Value>,
    turn: Option<AssistantTurn>,
    /// Goes with the model's next words or calls.
    thought: Option<Thought>,
}

/// What a model said and called in one response, which is one message.
#[derive(Default)]
struct AssistantTurn {
    /// Null where there are only calls; left out where a message says nothing.
    content: Option<Value>,
    refusal: Option<String>,
    calls: Vec<Value>,
    thought: Option<Thought>,
}

/// What a model thought, and the field that its provider takes it back in.
struct Thought {
    field: &'static str,
    text: String,
}

impl Messages {
    /// A message that is no part of a model's response.
    fn push(&mut self, message: Value) {
        self.end_turn();
        self.thought = None;
        self.done.push(message);
    }

    /// A model's message. It joins calls that stand before it, since their outputs must follow them at once.
    fn say(&mut self, text: Option<String>, refusal: Option<String>) {
        match &mut self.turn {
            Some(turn)
                if !turn.calls.is_empty()
                    && turn.refusal.is_none()
                    && turn.content.as_ref().is_none_or(Value::is_null) =>
            {
                if let Some(text) = text {
                    turn.content = Some(text.into());
                }
                turn.refusal = refusal;
            }
            _ => {
                self.end_turn();
                self.turn = Some(AssistantTurn { content: text.map(Value::from), refusal, ..AssistantTurn::default() });
            }
        }
        self.apply_thought();
    }

    fn call(&mut self, call: Value) {
        self.turn.get_or_insert_with(|| AssistantTurn { content: Some(Value::Null), ..AssistantTurn::default() });
        self.apply_thought();
        if let Some(turn) = &mut self.turn {
            turn.calls.push(call);
        }
    }

    fn apply_thought(&mut self) {
        if let (Some(turn), Some(thought)) = (&mut self.turn, self.thought.take()) {
            turn.thought = Some(thought);
        }
    }

    /// Ends the response's message; the next item begins another.
    fn end_turn(&mut self) {
        let Some(turn) = self.turn.take() else { return };
        if turn.calls.is_empty() {
            self.thought = None;
        }
        let fields = [
            ("role", Some(json!("assistant"))),
            ("content", turn.content),
            ("refusal", turn.refusal.map(Value::from)),
            ("tool_calls", (!turn.calls.is_empty()).then(|| turn.calls.into())),
        ];
        let thought = turn.thought.map(|thought| (thought.field, Some(thought.text.into())));
        let fields = fields.into_iter().chain(thought);
        self.done
            .push(fields.filter_map(|(name, value)| Some((name.to_owned(), value?))).collect::<Map<_, _>>().into());
    }
}

impl Thought {
    /// What is sent back of a model's reasoning, if anything is. Source: `reasoning_content_replay.py`.
    fn of(text: &str, raw: Option<&Value>, upstream_model: &str, replay: Option<bool>) -> Option<Thought> {
        // Where the reasoning came from, as the assembly of a Chat Completions answer writes it down.
        let origin = raw.and_then(|raw| raw.get("provider_data"));
        let origin_model = origin.and_then(|origin| origin["model"].as_str());
        let field = match origin.and_then(|origin| origin["field"].as_str()) {
            Some("reasoning") => "reasoning",
            _ => "reasoning_content",
        };
        let is_deepseek = |model: &str| model.to_lowercase().contains("deepseek");
        let takes_back = match (replay, field) {
            (Some(replay), "reasoning_content") => replay,
            (None, "reasoning_content") => is_deepseek(upstream_model) && origin_model.is_none_or(is_deepseek),
            // OpenRouter's and vLLM's field goes back to the model it came from.
            (replay, _) => replay != Some(false) && origin_model == Some(upstream_model),
        };
        (takes_back && !text.is_empty()).then(|| Thought { field, text: text.to_owned() })
    }
}

fn tool_call(call_id: &str, name: &str, arguments: &str) -> Value {
    let arguments = if arguments.is_empty() { "{}" } else { arguments };
    json!({"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}})
}

fn offer(offer: &Offer) -> Result<Value, Unfit> {
    match offer {
        Offer::Function(definition) => Ok(tool(definition)),
        Offer::Hosted(hosted) => Err(Unfit::HostedTool(hosted.name.clone())),
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

fn response_format(output: &OutputSchema) -> Value {
    json!({
        "type": "json_schema",
        "json_schema": {"name": "final_output", "strict": true, "schema": output.schema},
    })
}

/// OpenAI's word.
pub(super) fn reasoning_effort(effort: ReasoningEffort) -> Value {
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

    fn item(json: Value) -> InputItem {
        serde_json::from_value(json).unwrap()
    }

    fn thought(field: &str, model: &str) -> InputItem {
        item(json!({"type": "reasoning", "text": "hm", "raw": {"provider_data": {"model": model, "field": field}}}))
    }

    fn output(id: &str, output: &str) -> InputItem {
        InputItem::ToolOutput { call_id: id.to_owned(), output: output.to_owned(), parts: Vec::new() }
    }

    #[test]
    fn what_is_open_is_left_out() {
        let request = ModelRequest { parallel_tool_calls: Some(true), ..request(vec![user("hi")]) };
        assert_eq!(
            body("upstream", &request, None).unwrap(),
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
            output: Some(OutputSchema { schema: json!({"type": "object"}), is_wrapped: false }),
            ..request(vec![user("hi")])
        };
        assert_eq!(
            body("upstream", &request, None).unwrap(),
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
                "response_format": {"type": "json_schema", "json_schema": {
                    "name": "final_output", "strict": true, "schema": {"type": "object"},
                }},
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
            messages("m", &request(items), None).unwrap(),
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
        let merged = messages("m", &request(vec![call("a", "{}"), assistant("so"), output("a", "1")]), None).unwrap();
        assert_eq!(merged[0]["content"], "so");
        assert_eq!(merged[0]["tool_calls"][0]["id"], "a");
        assert_eq!(merged[1]["role"], "tool");
        let apart = messages("m", &request(vec![assistant("one"), assistant("two")]), None).unwrap();
        assert_eq!(apart, json!([{"role": "assistant", "content": "one"}, {"role": "assistant", "content": "two"}]));
    }

    #[test]
    fn a_summary_is_a_message_of_its_own() {
        let items = vec![item(json!({"type": "summary", "text": "Before."})), call("a", "{}"), output("a", "1")];
        let messages = messages("m", &request(items), None).unwrap();
        assert_eq!(messages[0], json!({"role": "assistant", "content": "Before."}));
        assert_eq!((&messages[1]["content"], &messages[1]["tool_calls"][0]["id"]), (&Value::Null, &json!("a")));
    }

    #[test]
    fn messages_of_the_responses_api_are_taken_apart() {
        let message = |content: Value| item(json!({"type": "assistant", "text": "", "raw": {"content": content}}));
        let text = |text: &str| json!({"type": "output_text", "text": text});
        let refusal = json!({"type": "refusal", "refusal": "No."});
        let sent = |items: Vec<InputItem>| messages("m", &request(items), None).unwrap();
        assert_eq!(
            sent(vec![message(json!([text("a"), text("b")]))]),
            json!([{"role": "assistant", "content": "a\nb"}])
        );
        let refused = sent(vec![message(json!([refusal])), call("a", "{}"), output("a", "1")]);
        assert_eq!(refused[0].as_object().unwrap().keys().collect::<Vec<_>>(), ["role", "refusal", "tool_calls"]);
        let both = sent(vec![message(json!([text("a"), refusal])), call("a", "{}"), output("a", "1")]);
        assert_eq!((&both[0]["content"], &both[0]["refusal"]), (&json!("a"), &json!("No.")));
    }

    #[test]
    fn reasoning_goes_back_to_where_it_is_taken() {
        let field = |upstream: &str, thought: InputItem, replay: Option<bool>| {
            let items = vec![thought, assistant("so"), call("a", "{}"), output("a", "1")];
            let sent = messages(upstream, &request(items), replay).unwrap();
            let names = ["reasoning_content", "reasoning"].into_iter();
            names.filter(|name| sent[0][name] == "hm").collect::<Vec<_>>()
        };
        let none: Vec<&str> = Vec::new();
        assert_eq!(field("gpt", thought("reasoning_content", "gpt"), None), none);
        assert_eq!(field("gpt", thought("reasoning_content", "gpt"), Some(true)), ["reasoning_content"]);
        assert_eq!(field("DeepSeek-v3", thought("reasoning_content", "deepseek-r1"), None), ["reasoning_content"]);
        assert_eq!(field("deepseek", thought("reasoning_content", "gpt"), None), none);
        assert_eq!(field("deepseek", thought("reasoning_content", "deepseek"), Some(false)), none);
        let plain = item(json!({"type": "reasoning", "text": "hm"}));
        assert_eq!(field("deepseek", plain, None), ["reasoning_content"]);
        assert_eq!(field("gpt-oss", thought("reasoning", "gpt-oss"), None), ["reasoning"]);
        assert_eq!(field("gpt-oss", thought("reasoning", "other"), None), none);
        assert_eq!(field("gpt-oss", thought("reasoning", "gpt-oss"), Some(false)), none);
    }

    #[test]
    fn reasoning_stays_with_its_own_turn() {
        let items = vec![
            thought("reasoning_content", "deepseek"),
            user("hi"),
            assistant("yes"),
            user("really?"),
            thought("reasoning_content", "deepseek"),
            assistant("one"),
            assistant("two"),
        ];
        let sent = messages("deepseek", &request(items), None).unwrap();
        let thoughts: Vec<bool> =
            sent.as_array().unwrap().iter().map(|m| m.get("reasoning_content").is_some()).collect();
        assert_eq!(thoughts, [false, false, false, true, false]);
    }

    #[test]
    fn what_providers_run_themselves_is_not_asked_of_chat_completions() {
        let hosted: Offer = serde_json::from_value(json!({"hosted": {"name": "web_search", "config": {}}})).unwrap();
        let offering = ModelRequest { tools: vec![hosted], ..request(vec![user("hi")]) };
        assert!(matches!(body("m", &offering, None), Err(Unfit::HostedTool(name)) if name == "web_search"));
        let call = item(json!({"type": "hosted_call", "raw": {"type": "web_search_call", "id": "ws_1"}}));
        let error = body("m", &request(vec![call]), None).unwrap_err();
        assert!(matches!(&error, Unfit::HostedCall(name) if name == "web_search_call"), "{error}");
    }
}
