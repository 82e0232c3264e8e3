//! Tokens counted here: to reserve quota before a call, and where a provider sends no usage.
//!
//! The tokenizer is OpenAI's `o200k_base`; other models' differ, and none publishes exactly how it lays out a
//! conversation. So a count is an estimate, meant to be at or slightly above what a provider counts. It is linear in
//! the text's length; the first one in a process loads the tokenizer's tables.

use cloister_runtime::item::InputItem;
use cloister_runtime::model::{ModelRequest, Offer, Part, ToolDefinition};

/// Tokens that frame a message (`<|start|>role<|message|>…<|end|>`), after OpenAI's cookbook, "How to count tokens
/// with tiktoken".
const PER_MESSAGE: i64 = 4;

/// Tokens that open the answer (same source: 3), and the list of tools, if there is one (12).
const PER_REQUEST: i64 = 3;
const PER_TOOL_LIST: i64 = 12;

/// Tokens that frame a tool's definition (same source: 7 for gpt-4o, 10 for earlier models). Its schema is counted as
/// JSON, which is longer than the form that OpenAI gives it.
const PER_TOOL: i64 = 10;

/// Tokens that frame a call beside its name and arguments; measured rather than documented.
const PER_CALL: i64 = 8;

/// Counts a text.
pub fn count_text(text: &str) -> i64 {
    let count = bpe_openai::o200k_base().count(text);
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// Counts a request: what a provider will count as input.
pub fn count_request(request: &ModelRequest) -> i64 {
    let instructions = match request.instructions.as_str() {
        "" => 0,
        text => PER_MESSAGE + count_text(text),
    };
    let input: i64 = request.input.iter().map(count_input).sum();
    let tools = match request.tools.as_slice() {
        [] => 0,
        tools => PER_TOOL_LIST + tools.iter().map(count_offer).sum::<i64>(),
    };
    let output = request.output.as_ref().map_or(0, |output| count_text(&output.schema.to_string()));
    PER_REQUEST + instructions + input + tools + output
}

/// Counts an answer's parts: what a provider will count as output. The count of several is the sum of theirs.
pub fn count_parts(parts: &[Part]) -> i64 {
    parts
        .iter()
        .map(|part| match part {
            Part::Reasoning { text, .. } | Part::Message { text, .. } | Part::Refusal { text } => count_text(text),
            Part::ToolCall { name, arguments, .. } => PER_CALL + count_text(name) + count_text(arguments),
            Part::HostedCall { raw, .. } => count_text(&raw.to_string()),
        })
        .sum()
}

fn count_input(item: &InputItem) -> i64 {
    PER_MESSAGE
        + match item {
            InputItem::User { text }
            | InputItem::Assistant { text, .. }
            | InputItem::Reasoning { text, .. }
            | InputItem::Summary { text } => count_text(text),
            InputItem::HostedCall { raw } => count_text(&raw.to_string()),
            InputItem::ToolCall { name, arguments, .. } => PER_CALL + count_text(name) + count_text(arguments),
            InputItem::ToolOutput { output, parts, .. } if parts.is_empty() => count_text(output),
            InputItem::ToolOutput { parts, .. } => {
                parts.iter().map(|part| count_text(part["text"].as_str().unwrap_or_default())).sum()
            }
        }
}

fn count_offer(offer: &Offer) -> i64 {
    match offer {
        Offer::Function(tool) => count_tool(tool),
        Offer::Hosted(tool) => PER_TOOL + count_text(&tool.name) + count_text(&tool.config.to_string()),
    }
}

fn count_tool(tool: &ToolDefinition) -> i64 {
    PER_TOOL + count_text(&tool.name) + count_text(&tool.description) + count_text(&tool.parameters.to_string())
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use serde_json::json;

    use super::*;

    fn request(input: Vec<InputItem>, tools: Vec<ToolDefinition>) -> ModelRequest {
        ModelRequest {
            model: "m".to_owned(),
            instructions: "You are a helpful assistant.".to_owned(),
            input,
            tools: tools.into_iter().map(Offer::Function).collect(),
            output: None,
            temperature: None,
            top_p: None,
            max_output_tokens: None,
            tool_choice: None,
            parallel_tool_calls: None,
            reasoning_effort: None,
        }
    }

    #[test]
    fn texts_are_counted_as_o200k_base_does() {
        assert_eq!(count_text(""), 0);
        assert_eq!(count_text("hello world"), 2);
        assert_eq!(count_text("<|endoftext|>"), 7);
    }

    #[test]
    fn a_request_is_at_or_slightly_above_its_texts_and_frames() {
        let user = InputItem::User { text: "hello world".to_owned() };
        let plain = count_request(&request(vec![user.clone()], Vec::new()));
        assert_eq!(plain, 3 + (4 + 6) + (4 + 2));

        let tool = ToolDefinition {
            name: "weather".to_owned(),
            description: "Tells the weather.".to_owned(),
            parameters: json!({"type": "object", "properties": {"city": {"type": "string"}}}),
            strict: true,
        };
        let with_tool = count_request(&request(vec![user], vec![tool]));
        assert!((20..60).contains(&(with_tool - plain)), "{}", with_tool - plain);
    }

    #[test]
    fn parts_add_up() {
        let parts = [
            Part::Message { index: 1, text: "hello world".to_owned(), raw: None },
            Part::ToolCall {
                index: 2,
                call_id: "c".to_owned(),
                name: "f".to_owned(),
                arguments: "{}".to_owned(),
                raw: None,
            },
        ];
        assert_eq!(count_parts(&parts), count_parts(&parts[..1]) + count_parts(&parts[1..]));
        assert_eq!(count_parts(&parts), 2 + 8 + 1 + 1);
    }

    #[test]
    fn no_text_is_slow() {
        let started = Instant::now();
        for unit in ["a", " ", "\n", "?", "7", "ab ", "字", "\u{301}", "[]"] {
            count_text(&unit.repeat(200_000 / unit.len()));
        }
        assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
    }
}
