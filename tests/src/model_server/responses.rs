//! From a scripted completion to what OpenAI's Responses API would send for it. Sources: its API reference, and the
//! streams of the service itself.

use axum::body::Bytes;
use serde_json::{Map, Value, json};

use super::completion::{CREATED, Pieces, split};
use super::record::{RecordedRequest, Usage};
use super::reply::{Completion, HostedCall};

/// Settings that a response repeats from its request, and what stands there if the request says nothing.
const ECHOED: [(&str, Value); 10] = [
    ("instructions", Value::Null),
    ("max_output_tokens", Value::Null),
    ("max_tool_calls", Value::Null),
    ("previous_response_id", Value::Null),
    ("prompt_cache_key", Value::Null),
    ("safety_identifier", Value::Null),
    ("user", Value::Null),
    ("parallel_tool_calls", Value::Bool(true)),
    ("store", Value::Bool(true)),
    ("background", Value::Bool(false)),
];

/// A completion as a response, and what it repeats.
pub(super) struct Frame<'a> {
    pub(super) completion: &'a Completion,
    pub(super) request: &'a RecordedRequest,
    pub(super) usage: Usage,
}

/// A part of the output, with the events that stand between its beginning and its end.
struct Item {
    /// As it begins.
    begun: Value,
    /// As it ends.
    done: Value,
    /// Their places are filled in by [`Events::push`].
    events: Vec<Value>,
}

impl Frame<'_> {
    /// The answer in one object.
    pub(super) fn whole(&self) -> Value {
        self.response(self.outcome(), self.items().into_iter().map(|item| item.done).collect())
    }

    /// The answer as server-sent events.
    pub(super) fn stream(&self) -> Pieces {
        let mut events = Events::default();
        for kind in ["response.created", "response.in_progress"] {
            events.push(json!({"type": kind, "response": self.response("in_progress", json!([]))}));
        }
        let mut output = Vec::new();
        for (index, item) in self.items().into_iter().enumerate() {
            let place = json!({"output_index": index, "item_id": item.done["id"]});
            events.push(json!({"type": "response.output_item.added", "output_index": index, "item": item.begun}));
            for event in item.events {
                events.push_at(&place, event);
            }
            events.push(json!({"type": "response.output_item.done", "output_index": index, "item": item.done}));
            output.push(item.done);
        }
        if let Some(message) = &self.completion.stream_error {
            events.push(json!({"type": "error", "code": "server_error", "message": message, "param": null}));
        } else if !self.completion.omits_finish_reason {
            let outcome = self.outcome();
            let response = self.response(outcome, output.into());
            events.push(json!({"type": format!("response.{outcome}"), "response": response}));
        }
        events.pieces()
    }

    fn response(&self, status: &str, output: Value) -> Value {
        let completion = self.completion;
        let body = &self.request.body;
        let is_over = status != "in_progress";
        let mut response = json!({
            "id": format!("resp_{:08}", self.request.number),
            "object": "response",
            "created_at": CREATED,
            "status": status,
            "error": match &completion.failure {
                Some((code, message)) if is_over => json!({"code": code, "message": message}),
                _ => Value::Null,
            },
            "incomplete_details": match status {
                "incomplete" => json!({"reason": self.incomplete_reason()}),
                _ => Value::Null,
            },
            "model": self.request.model(),
            "output": output,
            "reasoning": {"effort": body["reasoning"]["effort"], "summary": body["reasoning"]["summary"]},
            "service_tier": "default",
            "temperature": or(&body["temperature"], json!(1.0)),
            "text": or(&body["text"], json!({"format": {"type": "text"}, "verbosity": "medium"})),
            "tool_choice": or(&body["tool_choice"], json!("auto")),
            "tools": or(&body["tools"], json!([])),
            "top_logprobs": 0,
            "top_p": or(&body["top_p"], json!(1.0)),
            "truncation": or(&body["truncation"], json!("disabled")),
            "usage": if is_over && !completion.omits_usage { self.usage() } else { Value::Null },
            "metadata": or(&body["metadata"], json!({})),
        });
        for (name, default) in ECHOED {
            response[name] = or(&body[name], default);
        }
        response
    }

    fn outcome(&self) -> &'static str {
        match self.completion.finish_reason.as_deref() {
            _ if self.completion.failure.is_some() => "failed",
            Some("length" | "content_filter") => "incomplete",
            _ => "completed",
        }
    }

    fn incomplete_reason(&self) -> &'static str {
        match self.completion.finish_reason.as_deref() {
            Some("content_filter") => "content_filter",
            _ => "max_output_tokens",
        }
    }

    fn usage(&self) -> Value {
        json!({
            "input_tokens": self.usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": self.usage.cached_tokens},
            "output_tokens": self.usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self.usage.reasoning_tokens},
            "total_tokens": self.usage.total(),
        })
    }

    /// Reasoning, the calls that OpenAI made itself, the message, the calls.
    fn items(&self) -> Vec<Item> {
        let completion = self.completion;
        let mut items = Vec::new();
        if completion.reasoning.is_some() || completion.encrypted_reasoning.is_some() {
            items.push(self.reasoning());
        }
        items.extend(completion.hosted_calls.iter().enumerate().map(|(index, call)| self.hosted_call(index, call)));
        if completion.text.is_some() || completion.refusal.is_some() {
            items.push(self.message());
        }
        items.extend((0..completion.calls.len()).map(|index| self.call(index)));
        items
    }

    fn reasoning(&self) -> Item {
        let id = self.id("rs");
        let mut begun = json!({"id": id, "type": "reasoning", "summary": []});
        let mut done = begun.clone();
        let mut events = Vec::new();
        if let Some(text) = self.completion.reasoning.as_deref().filter(|text| !text.is_empty()) {
            let part = |text: &str| json!({"type": "summary_text", "text": text});
            done["summary"] = json!([part(text)]);
            let kind = |rest: &str| format!("response.reasoning_summary_{rest}");
            events.push(json!({"type": kind("part.added"), "summary_index": 0, "part": part("")}));
            for piece in self.split(text) {
                events.push(json!({"type": kind("text.delta"), "summary_index": 0, "delta": piece}));
            }
            events.push(json!({"type": kind("text.done"), "summary_index": 0, "text": text}));
            events.push(json!({"type": kind("part.done"), "summary_index": 0, "part": part(text)}));
        }
        if let Some(encrypted) = &self.completion.encrypted_reasoning {
            begun["encrypted_content"] = json!("");
            done["encrypted_content"] = json!(encrypted);
        }
        Item { begun, done, events }
    }

    fn message(&self) -> Item {
        let message = |status: &str, content: Value| json!({"id": self.id("msg"), "type": "message", "status": status, "content": content, "role": "assistant"});
        let texts = [("output_text", "text", &self.completion.text), ("refusal", "refusal", &self.completion.refusal)];
        let mut content = Vec::new();
        let mut events = Vec::new();
        for (kind, field, text) in texts {
            let Some(text) = text else { continue };
            let part = |text: &str| match kind {
                "output_text" => json!({"type": kind, "annotations": [], "logprobs": [], "text": text}),
                _ => json!({"type": kind, field: text}),
            };
            let with_logprobs = |mut event: Value| {
                if kind == "output_text" {
                    event["logprobs"] = json!([]);
                }
                event
            };
            let index = content.len();
            events.push(json!({"type": "response.content_part.added", "content_index": index, "part": part("")}));
            for piece in self.split(text) {
                let delta = json!({"type": format!("response.{kind}.delta"), "content_index": index, "delta": piece});
                events.push(with_logprobs(delta));
            }
            let done = json!({"type": format!("response.{kind}.done"), "content_index": index, field: text});
            events.push(with_logprobs(done));
            events.push(json!({"type": "response.content_part.done", "content_index": index, "part": part(text)}));
            content.push(part(text));
        }
        let status = if self.outcome() == "completed" { "completed" } else { "incomplete" };
        Item { begun: message("in_progress", json!([])), done: message(status, content.into()), events }
    }

    fn call(&self, index: usize) -> Item {
        let call = &self.completion.calls[index];
        let call_id = call.id.clone().unwrap_or_else(|| format!("call_{:08}_{index}", self.request.number));
        let item = |status: &str, arguments: &str| {
            json!({
                "id": self.id(&format!("fc_{index}")),
                "type": "function_call",
                "status": status,
                "arguments": arguments,
                "call_id": call_id,
                "name": call.name,
            })
        };
        let kind = |rest: &str| format!("response.function_call_arguments.{rest}");
        let mut events: Vec<Value> = self
            .split(&call.arguments)
            .into_iter()
            .map(|piece| json!({"type": kind("delta"), "delta": piece}))
            .collect();
        events.push(json!({"type": kind("done"), "arguments": call.arguments, "name": call.name}));
        Item { begun: item("in_progress", ""), done: item("completed", &call.arguments), events }
    }

    fn hosted_call(&self, index: usize, call: &HostedCall) -> Item {
        let item = |status: &str, fields: &Map<String, Value>| {
            let id = self.id(&format!("{}_{index}", hosted_prefix(&call.kind)));
            let mut item = json!({"id": id, "type": call.kind, "status": status});
            item.as_object_mut().expect("an object").extend(fields.clone());
            item
        };
        let events = ["in_progress", "completed"].map(|step| json!({"type": format!("response.{}.{step}", call.kind)}));
        Item { begun: item("in_progress", &Map::new()), done: item("completed", &call.fields), events: events.into() }
    }

    fn id(&self, prefix: &str) -> String {
        format!("{prefix}_{:08}", self.request.number)
    }

    fn split(&self, text: &str) -> Vec<String> {
        split(self.completion, text)
    }
}

/// The letters that the ids of a hosted tool's calls begin with.
fn hosted_prefix(kind: &str) -> &str {
    match kind {
        "web_search_call" => "ws",
        "file_search_call" => "fs",
        "code_interpreter_call" => "ci",
        "image_generation_call" => "ig",
        "mcp_call" => "mcp",
        "mcp_list_tools" => "mcpl",
        other => other,
    }
}

fn or(value: &Value, default: Value) -> Value {
    if value.is_null() { default } else { value.clone() }
}

/// The stream's events, numbered.
#[derive(Default)]
struct Events {
    events: Vec<Value>,
    /// How many there are up to the first that brings content, itself included.
    first_content: Option<usize>,
}

impl Events {
    fn push(&mut self, mut event: Value) {
        event["sequence_number"] = json!(self.events.len());
        self.events.push(event);
        if self.first_content.is_none() && self.events.last().is_some_and(|event| event["delta"].is_string()) {
            self.first_content = Some(self.events.len());
        }
    }

    /// An event of an item, with the item's place.
    fn push_at(&mut self, place: &Value, mut event: Value) {
        for name in ["output_index", "item_id"] {
            event[name] = place[name].clone();
        }
        self.push(event);
    }

    fn pieces(self) -> Pieces {
        let hold_at = self.first_content.unwrap_or(2);
        Pieces { bytes: self.events.iter().map(event).collect(), hold_at }
    }
}

fn event(event: &Value) -> Bytes {
    format!("event: {}\ndata: {event}\n\n", event["type"].as_str().unwrap_or_default()).into()
}
