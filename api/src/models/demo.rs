//! The built-in provider `demo`: lets everything be tried without a key.
//!
//! Its model understands nothing and says so. The same request always gets the same answer. It calls a tool when
//! the user's text names one (`use weather`, `call weather {"city": "Oslo"}`), and quotes what the tool answered.

use std::time::Duration;

use async_stream::stream;
use cloister_runtime::item::{InputItem, TokenUsage};
use cloister_runtime::model::{Finish, ModelRequest, Part, ToolDefinition};
use futures_util::StreamExt;
use serde_json::{Map, Value, json};

use super::provider::{Answer, AnswerEvent, Completion};
use super::tokens;

const MESSAGE_INDEX: u32 = 1;
const FIRST_CALL_INDEX: u32 = 2;

/// The most characters of others' texts that are quoted.
const MAX_QUOTE_CHARS: usize = 300;

/// How deep arguments are made up from a schema.
const MAX_SCHEMA_DEPTH: usize = 8;

/// A model without a model.
#[derive(Clone, Copy, Debug)]
pub struct DemoProvider {
    delay: Duration,
}

impl DemoProvider {
    /// A provider that takes `delay` for each word; about 15 ms look like a real model.
    pub fn new(delay: Duration) -> Self {
        Self { delay }
    }

    /// Answers; the answer is always complete, and its usage counted with our tokenizer.
    pub fn answer(&self, request: &ModelRequest) -> Answer {
        let completion = complete(request);
        let delay = self.delay;
        let events = stream! {
            for event in completion.parts.iter().flat_map(deltas) {
                tokio::time::sleep(delay).await;
                yield Ok(event);
            }
            yield Ok(AnswerEvent::Complete(completion));
        };
        Answer { events: events.boxed() }
    }
}

fn complete(request: &ModelRequest) -> Completion {
    let turn = Turn::of(request);
    let calls = turn.calls();
    let parts = if calls.is_empty() {
        let text =
            request.output.as_ref().map_or_else(|| turn.reply(), |output| example(&output.schema, 0).to_string());
        vec![Part::Message { index: MESSAGE_INDEX, text, raw: None }]
    } else {
        calls
    };
    let (parts, finish) = within(parts, request.max_output_tokens);
    let usage = TokenUsage {
        input_tokens: tokens::count_request(request),
        output_tokens: tokens::count_parts(&parts),
        ..TokenUsage::default()
    };
    Completion { parts, finish, usage: Some(usage) }
}

/// What has happened since the user spoke last.
struct Turn<'a> {
    request: &'a ModelRequest,
    user_text: &'a str,
    since: &'a [InputItem],
}

impl<'a> Turn<'a> {
    fn of(request: &'a ModelRequest) -> Self {
        let last_user = request.input.iter().enumerate().rev().find_map(|(at, item)| match item {
            InputItem::User { text } => Some((at, text.as_str())),
            _ => None,
        });
        let (user_text, since) = match last_user {
            Some((at, text)) => (text, &request.input[at + 1..]),
            None => ("", request.input.as_slice()),
        };
        Self { request, user_text, since }
    }

    /// The tools to call now, as the tool choice and the user's text ask for them.
    fn calls(&self) -> Vec<Part> {
        let tools = self.request.functions();
        let mut chosen: Vec<(&ToolDefinition, String)> = match self.request.tool_choice.as_deref() {
            Some("none") => Vec::new(),
            Some("required") => {
                let named = self.named();
                let all: Vec<_> = tools.collect();
                let any = || all.iter().find(|tool| !self.has_called(&tool.name)).or(all.first()).copied();
                if named.is_empty() {
                    any().map(|tool| (tool, self.arguments(tool))).into_iter().collect()
                } else {
                    named
                }
            }
            None | Some("auto") => self.named(),
            Some(name) => tools.filter(|tool| tool.name == name).map(|tool| (tool, self.arguments(tool))).collect(),
        };
        if self.request.parallel_tool_calls == Some(false) {
            chosen.truncate(1);
        }
        let earlier = self.request.input.iter().filter(|item| matches!(item, InputItem::ToolCall { .. })).count();
        (FIRST_CALL_INDEX..)
            .zip(earlier + 1..)
            .zip(chosen)
            .map(|((index, number), (tool, arguments))| Part::ToolCall {
                index,
                call_id: format!("call_demo_{number}"),
                name: tool.name.clone(),
                arguments,
                raw: None,
            })
            .collect()
    }

    /// The tools that the user names and that were not called yet, in the order of the text.
    fn named(&self) -> Vec<(&'a ToolDefinition, String)> {
        let mut named: Vec<_> = self
            .request
            .functions()
            .filter(|tool| !self.has_called(&tool.name))
            .filter_map(|tool| Some((mention(self.user_text, &tool.name)?, tool)))
            .collect();
        named.sort_by_key(|(at, _)| *at);
        named.into_iter().map(|(_, tool)| (tool, self.arguments(tool))).collect()
    }

    fn has_called(&self, name: &str) -> bool {
        self.since.iter().any(|item| matches!(item, InputItem::ToolCall { name: called, .. } if called == name))
    }

    /// The arguments that the user wrote after the tool's name, or some that fit its schema.
    fn arguments(&self, tool: &ToolDefinition) -> String {
        let written = mention(self.user_text, &tool.name).and_then(|end| leading_object(&self.user_text[end..]));
        match written {
            Some(json) => json.to_owned(),
            None => example(&tool.parameters, 0).to_string(),
        }
    }

    fn reply(&self) -> String {
        let answers: Vec<String> = self.since.iter().filter_map(|item| self.quote_output(item)).collect();
        if !answers.is_empty() {
            return format!("{} (Cloister's demo model passes this on; no real model has read it.)", answers.join(" "));
        }
        let mut reply =
            "Hello! I am Cloister's demo model: I stream words and call tools, but there is no real model behind me."
                .to_owned();
        if !self.request.instructions.trim().is_empty() {
            reply += &format!(" I was told: {}.", quote(&self.request.instructions));
        }
        match self.user_text.trim() {
            "" => reply += " You have said nothing yet.",
            text => reply += &format!(" You said: {}.", quote(text)),
        }
        if let Some(first) = self.request.functions().next() {
            let names: Vec<&str> = self.request.functions().map(|tool| tool.name.as_str()).collect();
            reply += &format!(" I can call {}: just say “use {}”.", names.join(", "), first.name);
        }
        reply
    }

    fn quote_output(&self, item: &InputItem) -> Option<String> {
        let InputItem::ToolOutput { call_id: answered, output, .. } = item else { return None };
        let name = self.since.iter().rev().find_map(|item| match item {
            InputItem::ToolCall { call_id, name, .. } if call_id == answered => Some(name.as_str()),
            _ => None,
        });
        Some(format!("The tool {} answered: {}.", name.unwrap_or("without a name"), quote(output)))
    }
}

/// Where the text's first mention of a tool ends. Names are whole words, in any case.
fn mention(text: &str, name: &str) -> Option<usize> {
    if name.is_empty() {
        return None;
    }
    let in_word = |c: char| c.is_alphanumeric() || c == '_' || c == '-';
    // Lowering ASCII leaves every byte in its place.
    let lower = text.to_ascii_lowercase();
    lower.match_indices(&name.to_ascii_lowercase()).map(|(start, found)| (start, start + found.len())).find_map(
        |(start, end)| {
            let apart = !lower[..start].ends_with(in_word) && !lower[end..].starts_with(in_word);
            apart.then_some(end)
        },
    )
}

/// The JSON object that a text begins with, after a word or sign that leads up to it.
fn leading_object(text: &str) -> Option<&str> {
    let text = text.trim_start();
    let text = text.strip_prefix("with").unwrap_or(text).trim_start_matches(|c: char| c != '{' && !c.is_alphanumeric());
    let mut values = serde_json::Deserializer::from_str(text).into_iter::<Map<String, Value>>();
    values.next()?.ok()?;
    text.get(..values.byte_offset())
}

/// A value that fits the usual schemas: given ones where there are any, else the plainest of its type.
fn example(schema: &Value, depth: usize) -> Value {
    let given = [&schema["default"], &schema["const"], &schema["examples"][0], &schema["enum"][0]];
    if let Some(value) = given.into_iter().find(|value| !value.is_null()) {
        return value.clone();
    }
    if let Some(first) = ["anyOf", "oneOf"].into_iter().find_map(|key| schema[key].get(0)) {
        return if depth < MAX_SCHEMA_DEPTH { example(first, depth + 1) } else { Value::Null };
    }
    let kind = schema["type"].as_str().or_else(|| schema["type"][0].as_str());
    match kind {
        Some("string") => json!("demo"),
        Some("integer" | "number") => schema.get("minimum").cloned().unwrap_or(json!(1)),
        // An agent that a guardrail asks lets everything pass.
        Some("boolean") => json!(false),
        Some("array") => json!([]),
        Some("null") => Value::Null,
        // The arguments as a whole are an object even where the schema doesn't say so.
        _ if depth > 0 && kind != Some("object") => Value::Null,
        _ if depth < MAX_SCHEMA_DEPTH => {
            let required = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
            required.map(|name| (name.to_owned(), example(&schema["properties"][name], depth + 1))).collect()
        }
        _ => json!({}),
    }
}

/// A text on one line, in quotation marks, shortened.
fn quote(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(MAX_QUOTE_CHARS) {
        Some((end, _)) => format!("“{}…”", &line[..end]),
        None => format!("“{line}”"),
    }
}

/// The parts, cut at a word where they have more tokens than a maximum.
fn within(parts: Vec<Part>, max_tokens: Option<u32>) -> (Vec<Part>, Finish) {
    let Some(max_tokens) = max_tokens else { return (parts, Finish::Stop) };
    let mut left = i64::from(max_tokens);
    let mut kept = Vec::new();
    for part in parts {
        let count = tokens::count_parts(std::slice::from_ref(&part));
        if count > left {
            kept.extend(shortened(&part, left));
            return (kept, Finish::Length);
        }
        left -= count;
        kept.push(part);
    }
    (kept, Finish::Stop)
}

/// The longest beginning of a part that has no more tokens than a maximum.
fn shortened(part: &Part, max_tokens: i64) -> Option<Part> {
    let (Part::Reasoning { text, .. }
    | Part::Message { text, .. }
    | Part::Refusal { text }
    | Part::ToolCall { arguments: text, .. }) = part
    else {
        return None;
    };
    let beginning = |end: usize| {
        let mut part = part.clone();
        if let Part::Reasoning { text, .. }
        | Part::Message { text, .. }
        | Part::Refusal { text }
        | Part::ToolCall { arguments: text, .. } = &mut part
        {
            text.truncate(end);
        }
        part
    };
    let ends = words(text).scan(0, |end, word| {
        *end += word.len();
        Some(*end)
    });
    ends.map(beginning).take_while(|part| tokens::count_parts(std::slice::from_ref(part)) <= max_tokens).last()
}

/// A part word by word, as it streams.
fn deltas(part: &Part) -> Vec<AnswerEvent> {
    match part {
        Part::Message { index, text, .. } => {
            words(text).map(|word| AnswerEvent::Text { index: *index, text: word.to_owned() }).collect()
        }
        Part::ToolCall { index, call_id, name, arguments, .. } => words(arguments)
            .map(|word| AnswerEvent::Arguments {
                index: *index,
                call_id: call_id.clone(),
                name: name.clone(),
                text: word.to_owned(),
            })
            .collect(),
        Part::Reasoning { .. } | Part::Refusal { .. } | Part::HostedCall { .. } => Vec::new(),
    }
}

/// The words of a text, each with the space after it.
fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split_inclusive(char::is_whitespace)
}

#[cfg(test)]
mod tests {
    use cloister_runtime::model::Offer;

    use super::*;

    fn request(text: &str) -> ModelRequest {
        ModelRequest {
            model: "demo".to_owned(),
            instructions: "You are a pirate.".to_owned(),
            input: vec![InputItem::User { text: text.to_owned() }],
            tools: vec![Offer::Function(tool("weather")), Offer::Function(tool("clock"))],
            output: None,
            temperature: None,
            top_p: None,
            max_output_tokens: None,
            tool_choice: None,
            parallel_tool_calls: None,
            reasoning_effort: None,
        }
    }

    fn tool(name: &str) -> ToolDefinition {
        ToolDefinition {
            name: name.to_owned(),
            description: String::new(),
            parameters: json!({
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": ["integer", "null"], "minimum": 3},
                    "unit": {"enum": ["C", "F"]},
                    "place": {"type": "object", "properties": {"lat": {"type": "number"}}, "required": ["lat"]},
                    "more": {"type": "string"},
                },
                "required": ["city", "days", "unit", "place"],
            }),
            strict: false,
        }
    }

    fn calls(request: &ModelRequest) -> Vec<(String, String)> {
        let calls = complete(request).parts.into_iter().filter_map(|part| match part {
            Part::ToolCall { name, arguments, .. } => Some((name, arguments)),
            _ => None,
        });
        calls.collect()
    }

    fn names(request: &ModelRequest) -> Vec<String> {
        calls(request).into_iter().map(|(name, _)| name).collect()
    }

    fn text(request: &ModelRequest) -> String {
        match complete(request).parts.as_slice() {
            [Part::Message { index: 1, text, .. }] => text.clone(),
            parts => panic!("not one message: {parts:?}"),
        }
    }

    fn with_output(text: &str) -> ModelRequest {
        let mut request = request(text);
        let id = || "call_demo_1".to_owned();
        request.input.push(InputItem::ToolCall {
            call_id: id(),
            name: "weather".to_owned(),
            arguments: "{}".to_owned(),
            raw: None,
        });
        request.input.push(InputItem::ToolOutput { call_id: id(), output: "12 °C\nrain".to_owned(), parts: vec![] });
        request
    }

    #[test]
    fn it_says_what_it_is_was_told_and_heard() {
        let text = text(&request("Good morning"));
        for expected in ["demo model", "“You are a pirate.”", "“Good morning”", "use weather"] {
            assert!(text.contains(expected), "{text}");
        }
    }

    #[test]
    fn it_calls_a_named_tool_with_the_arguments_given() {
        let request = request("please call Weather with {\"city\": \"Os{lo\", \"n\": [1]} now");
        assert_eq!(calls(&request), [("weather".to_owned(), "{\"city\": \"Os{lo\", \"n\": [1]}".to_owned())]);
    }

    #[test]
    fn it_makes_arguments_up_from_the_schema() {
        let made_up = "{\"city\":\"demo\",\"days\":3,\"unit\":\"C\",\"place\":{\"lat\":1}}";
        assert_eq!(calls(&request("use weather")), [("weather".to_owned(), made_up.to_owned())]);
        assert_eq!(calls(&request("use weather {broken")), [("weather".to_owned(), made_up.to_owned())]);
        assert_eq!(example(&json!({}), 0), json!({}));
        let mut nested = json!({"type": "string"});
        for _ in 0..50 {
            nested = json!({"type": "object", "properties": {"x": nested}, "required": ["x"]});
        }
        assert!(example(&nested, 0).is_object());
    }

    #[test]
    fn names_are_whole_words() {
        assert!(names(&request("the weathercock, clock-wise, my_clock")).is_empty());
        assert_eq!(names(&request("İ weather.")), ["weather"]);
    }

    #[test]
    fn several_named_tools_are_called_in_the_texts_order_unless_one_is_asked_for() {
        let mut request = request("use clock and weather");
        assert_eq!(names(&request), ["clock", "weather"]);
        request.parallel_tool_calls = Some(false);
        assert_eq!(names(&request), ["clock"]);
    }

    #[test]
    fn it_quotes_what_a_tool_answered_and_does_not_call_it_again() {
        let text = text(&with_output("use weather"));
        assert!(text.starts_with("The tool weather answered: “12 °C rain”."), "{text}");
        assert_eq!(names(&with_output("use weather, then clock")), ["clock"]);
    }

    #[test]
    fn it_calls_again_when_the_user_asks_again_under_another_id() {
        let mut request = with_output("use weather");
        request.input.push(InputItem::User { text: "use weather".to_owned() });
        let parts = complete(&request).parts;
        assert!(
            matches!(&parts[..], [Part::ToolCall { index: 2, call_id, .. }] if call_id == "call_demo_2"),
            "{parts:?}"
        );
    }

    #[test]
    fn tool_choice_is_respected() {
        let choose =
            |text: &str, choice: &str| names(&ModelRequest { tool_choice: Some(choice.to_owned()), ..request(text) });
        assert!(choose("use weather", "none").is_empty());
        assert_eq!(choose("hi", "required"), ["weather"]);
        assert_eq!(choose("use clock", "required"), ["clock"]);
        assert_eq!(choose("hi", "clock"), ["clock"]);
        assert!(choose("hi", "auto").is_empty());
        let answered = ModelRequest { tool_choice: Some("required".to_owned()), ..with_output("hi") };
        assert_eq!(names(&answered), ["clock"]);
    }

    #[test]
    fn it_keeps_to_the_maximum_of_tokens() {
        for text in ["Good morning", "use weather {\"city\": \"Oslo\"}"] {
            let whole = tokens::count_parts(&complete(&request(text)).parts);
            for max in 0..40 {
                let completion = complete(&ModelRequest { max_output_tokens: Some(max), ..request(text) });
                let output = completion.usage.unwrap().output_tokens;
                assert!(output <= i64::from(max));
                assert_eq!(completion.finish == Finish::Length, i64::from(max) < whole);
            }
        }
    }

    #[tokio::test]
    async fn it_streams_what_it_completes() {
        let request = request("Good morning, use clock");
        for request in [ModelRequest { tools: Vec::new(), ..request.clone() }, request] {
            let mut streamed = String::new();
            let mut events = DemoProvider::new(Duration::ZERO).answer(&request).events;
            let completion = loop {
                match events.next().await.unwrap().unwrap() {
                    AnswerEvent::Text { text, .. } | AnswerEvent::Arguments { text, .. } => streamed += &text,
                    AnswerEvent::Complete(completion) => break completion,
                }
            };
            assert!(events.next().await.is_none());
            assert_eq!(completion.usage.unwrap().input_tokens, tokens::count_request(&request));
            let (Part::Message { text, .. } | Part::ToolCall { arguments: text, .. }) = &completion.parts[0] else {
                panic!("{completion:?}")
            };
            assert_eq!(streamed, *text);
        }
    }
}
