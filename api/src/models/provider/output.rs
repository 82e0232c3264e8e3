//! From the events of a Responses API stream to an answer's parts. Its last event holds the whole output; what came
//! before is for those who watch, and for what is left of an answer that breaks off.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_openai::types::stream::StreamResponse;
use async_stream::stream;
use cloister_runtime::item::{RunErrorCode, TokenUsage};
use cloister_runtime::model::{Finish, Part};
use futures_util::{Stream, StreamExt};
use serde_json::{Value, json};

use super::assembly::{LAST_WORD, MAX_CALLS};
use super::attempt::CutReason;
use super::chunk::{error_message, usage};
use super::events::Event;
use super::redact::Redactor;
use super::{AnswerEvent, Completion, Cut};
use crate::models::output_texts;

/// The most items an output may have.
const MAX_ITEMS: usize = 512;

/// Items of tools that the provider runs itself, as the Agents SDK knows them.
const HOSTED: [&str; 13] = [
    "code_interpreter_call",
    "compaction",
    "file_search_call",
    "image_generation_call",
    "mcp_call",
    "mcp_list_tools",
    "program",
    "program_output",
    "shell_call",
    "shell_call_output",
    "tool_search_call",
    "tool_search_output",
    "web_search_call",
];

/// Items that ask whoever called for what nobody here does. The Agents SDK ends a run on them too, where the agent has no
/// such tool.
const UNSERVED: [&str; 5] =
    ["apply_patch_call", "computer_call", "custom_tool_call", "local_shell_call", "mcp_approval_request"];

/// An answer's events, from those of the API.
pub(super) fn assemble_output(
    mut events: StreamResponse<Event>,
    cut_reason: CutReason,
    redactor: Arc<Redactor>,
) -> impl Stream<Item = Result<AnswerEvent, Cut>> + Send + 'static {
    stream! {
        let mut assembly = Assembly::default();
        while let Some(Ok(event)) = events.next().await {
            match assembly.add(event, &redactor) {
                Ok(None) => {}
                Ok(Some(last @ AnswerEvent::Complete(_))) => {
                    // A stream that is read to its end keeps its connection.
                    let _ = tokio::time::timeout(LAST_WORD, events.next()).await;
                    yield Ok(last);
                    return;
                }
                Ok(Some(event)) => yield Ok(event),
                Err(cut) => {
                    yield Err(cut);
                    return;
                }
            }
        }
        yield Err(Cut::broken(cut_reason.get(), assembly.partial()));
    }
}

/// An answer as far as it has arrived, by place.
#[derive(Debug, Default)]
struct Assembly {
    items: BTreeMap<u32, Item>,
}

/// An item as far as it has arrived.
#[derive(Debug, Default)]
struct Item {
    /// As it began.
    begun: Value,
    /// Text, arguments or thoughts.
    text: String,
    /// As it ended.
    done: Option<Value>,
}

impl Assembly {
    /// Takes an event in and tells what is new; an error is the end.
    fn add(&mut self, mut event: Event, redactor: &Redactor) -> Result<Option<AnswerEvent>, Cut> {
        match event.kind() {
            "response.completed" => self.complete(event).map(Some),
            "response.incomplete" => {
                let reason = event.response()["incomplete_details"]["reason"].as_str().unwrap_or("no reason given");
                let reason = format!("The model's response is incomplete: {}.", redactor.clean(reason));
                Err(self.unusable(reason, counted(&event)))
            }
            "response.failed" | "error" | "response.error" => {
                let error = if event.kind() == "response.failed" { &event.response()["error"] } else { event.error() };
                let reason = error_message(error).or_else(|| error["code"].as_str().map(str::to_owned));
                let reason = redactor.clean(reason.as_deref().unwrap_or("no reason given"));
                Err(self.unusable(format!("The model's response failed: {reason}"), counted(&event)))
            }
            _ => self.progress(&mut event),
        }
    }

    fn progress(&mut self, event: &mut Event) -> Result<Option<AnswerEvent>, Cut> {
        let Some(index) = event.index() else { return Ok(None) };
        if self.items.len() >= MAX_ITEMS && !self.items.contains_key(&index) {
            return Err(Cut::broken(format!("the answer has more than {MAX_ITEMS} items"), self.partial()));
        }
        let item = self.items.entry(index).or_default();
        match event.kind() {
            "response.output_item.added" => item.begun = event.item(),
            "response.output_item.done" => item.done = Some(event.item()),
            "response.output_text.delta" => {
                let text = event.delta();
                item.text.push_str(&text);
                return Ok((!text.is_empty()).then_some(AnswerEvent::Text { index, text }));
            }
            "response.function_call_arguments.delta" => {
                let text = event.delta();
                item.text.push_str(&text);
                // What a client is shown of a call carries its id and name.
                let is_known = item.begun["call_id"].is_string() && item.begun["name"].is_string();
                return Ok((is_known && !text.is_empty()).then(|| AnswerEvent::Arguments {
                    index,
                    call_id: text_of(&item.begun, "call_id"),
                    name: text_of(&item.begun, "name"),
                    text,
                }));
            }
            "response.refusal.delta" | "response.reasoning_summary_text.delta" | "response.reasoning_text.delta" => {
                item.text.push_str(&event.delta());
            }
            _ => {}
        }
        Ok(None)
    }

    fn complete(&mut self, mut event: Event) -> Result<AnswerEvent, Cut> {
        let usage = counted(&event);
        let mut output = event.take_output();
        if output.is_empty() {
            // Some compatible servers leave the items out of the last event.
            output = std::mem::take(&mut self.items).into_values().filter_map(|item| item.done).collect();
        }
        let calls = output.iter().filter(|item| item["type"] == "function_call").count();
        let too_many = (calls > MAX_CALLS)
            .then(|| format!("the answer has more than {MAX_CALLS} tool calls"))
            .or_else(|| (output.len() > MAX_ITEMS).then(|| format!("the answer has more than {MAX_ITEMS} items")));
        if let Some(reason) = too_many {
            return Err(Cut { usage, ..Cut::broken(reason, parts(output)) });
        }
        if let Some(item) = output.iter().find(|item| UNSERVED.iter().any(|kind| item["type"] == *kind)) {
            let reason = format!("The model asks for a {:?}, which nobody here can answer.", text_of(item, "type"));
            return Err(Cut { code: RunErrorCode::ModelBehavior, reason, partial: parts(output), usage });
        }
        Ok(AnswerEvent::Complete(Completion { parts: parts(output), finish: Finish::Stop, usage }))
    }

    /// A response that the provider ended itself, and that the Agents SDK doesn't use.
    fn unusable(&mut self, reason: String, usage: Option<TokenUsage>) -> Cut {
        Cut { code: RunErrorCode::ModelBehavior, reason, partial: self.partial(), usage }
    }

    /// What has arrived, to count it by.
    fn partial(&mut self) -> Vec<Part> {
        let items = std::mem::take(&mut self.items).into_values();
        parts(items.map(Item::into_output).collect())
    }
}

impl Item {
    /// The item as if it had ended with what has arrived.
    fn into_output(self) -> Value {
        let Item { begun, text, done } = self;
        done.unwrap_or_else(|| match begun["type"].as_str() {
            Some("function_call") => {
                json!({"type": "function_call", "call_id": begun["call_id"], "name": begun["name"], "arguments": text})
            }
            Some("message") | None => {
                json!({"type": "message", "content": [{"type": "output_text", "text": text}]})
            }
            Some("reasoning") => json!({"type": "reasoning", "summary": [{"text": text}]}),
            Some(_) => begun,
        })
    }
}

/// The output's parts, each at its place.
fn parts(output: Vec<Value>) -> Vec<Part> {
    let has_calls = output.iter().any(|item| item["type"] == "function_call");
    let mut parts = Vec::new();
    for (index, item) in (0..).zip(output) {
        match item["type"].as_str() {
            Some("message") => {
                let text: String = output_texts(&item, "output_text", "text").collect();
                let refusal: String = output_texts(&item, "refusal", "refusal").collect();
                // A refusal by itself is the end; one beside calls is sent back with them.
                if !text.is_empty() || refusal.is_empty() || has_calls {
                    parts.push(Part::Message { index, text, raw: Some(item) });
                }
                if !refusal.is_empty() {
                    parts.push(Part::Refusal { text: refusal });
                }
            }
            Some("reasoning") => parts.push(Part::Reasoning { index, text: thoughts(&item), raw: Some(item) }),
            Some("function_call") => parts.push(function_call(index, item)),
            Some(kind) if HOSTED.contains(&kind) => {
                let name = kind.to_owned();
                parts.push(Part::HostedCall { index, id: text_of(&item, "id"), name, raw: item });
            }
            kind => tracing::debug!(kind, "an output item of an unknown kind is left out"),
        }
    }
    parts
}

fn function_call(index: u32, mut item: Value) -> Part {
    // Servers that parse the model's JSON give the arguments as an object.
    let arguments = match &item["arguments"] {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        parsed => parsed.to_string(),
    };
    item["arguments"] = json!(arguments);
    Part::ToolCall {
        index,
        call_id: text_of(&item, "call_id"),
        name: text_of(&item, "name"),
        arguments,
        raw: Some(item),
    }
}

/// What a model thought: the summary, or the thoughts themselves from models that show them.
fn thoughts(item: &Value) -> String {
    let texts = |field: &str| -> Vec<&str> {
        item[field].as_array().into_iter().flatten().filter_map(|part| part["text"].as_str()).collect()
    };
    let summary = texts("summary");
    if summary.is_empty() { texts("content").join("\n") } else { summary.join("\n") }
}

fn text_of(item: &Value, field: &str) -> String {
    item[field].as_str().unwrap_or_default().to_owned()
}

/// What the provider counted, if the event says so.
fn counted(event: &Event) -> Option<TokenUsage> {
    usage(&event.response()["usage"], "input_tokens", "output_tokens")
}

#[cfg(test)]
mod tests;
