//! From a scripted completion to the bytes OpenAI would send for it; here over Chat Completions.

use axum::body::Bytes;
use serde_json::{Value, json};

use super::record::{Api, RecordedRequest, Usage};
use super::reply::Completion;
use super::responses;

/// When every completion was made, in seconds since 1970.
pub(super) const CREATED: u64 = 1_700_000_000;

/// The characters of a token, where lengths decide about usage.
const CHARS_PER_TOKEN: usize = 4;

/// An answer ready to be delivered.
pub(super) struct Rendered {
    pub(super) content_type: &'static str,
    pub(super) pieces: Pieces,
    pub(super) usage: Usage,
}

/// A body in the pieces it is sent in.
pub(super) struct Pieces {
    pub(super) bytes: Vec<Bytes>,
    /// How many pieces go out before a hold.
    pub(super) hold_at: usize,
}

/// Renders `completion` as an answer to `request`; `usage` is what the script says it is charged.
pub(super) fn render(completion: &Completion, usage: Option<Usage>, request: &RecordedRequest) -> Rendered {
    let mut completion = completion.clone();
    let mut usage = usage.unwrap_or_else(|| usage_by_length(&completion, request));
    if let Some(limit) =
        request.max_tokens().filter(|limit| completion.honours_max_tokens && usage.completion_tokens > *limit)
    {
        usage.completion_tokens = limit;
        let chars = usize::try_from(limit).unwrap_or(usize::MAX).saturating_mul(CHARS_PER_TOKEN);
        completion.text = completion.text.map(|text| text.chars().take(chars).collect());
        completion.finish_reason.get_or_insert_with(|| "length".to_owned());
    }
    usage.cached_tokens = completion.cached_tokens;
    usage.reasoning_tokens = completion.reasoning_tokens;
    let completion = &completion;
    let whole = |answer: Value| Pieces { bytes: vec![answer.to_string().into()], hold_at: 0 };
    let pieces = match request.api {
        Api::ChatCompletions => {
            let frame = Frame { completion, request, usage };
            if request.is_stream() { frame.stream() } else { whole(frame.whole()) }
        }
        Api::Responses => {
            let frame = responses::Frame { completion, request, usage };
            if request.is_stream() { frame.stream() } else { whole(frame.whole()) }
        }
    };
    let content_type = if request.is_stream() { "text/event-stream; charset=utf-8" } else { "application/json" };
    Rendered { content_type, pieces, usage }
}

fn usage_by_length(completion: &Completion, request: &RecordedRequest) -> Usage {
    let texts = [&completion.text, &completion.refusal, &completion.reasoning];
    let calls = completion.calls.iter().map(|call| tokens(&call.name) + tokens(&call.arguments));
    let input = ["messages", "instructions", "input", "tools"].map(|name| &request.body[name]);
    Usage {
        prompt_tokens: input.into_iter().filter(|part| !part.is_null()).map(|part| tokens(&part.to_string())).sum(),
        completion_tokens: texts.into_iter().flatten().map(|text| tokens(text)).sum::<u64>() + calls.sum::<u64>(),
        ..Usage::default()
    }
}

fn tokens(text: &str) -> u64 {
    text.chars().count().div_ceil(CHARS_PER_TOKEN) as u64
}

/// A completion, and what every object that is sent for it repeats.
struct Frame<'a> {
    completion: &'a Completion,
    request: &'a RecordedRequest,
    usage: Usage,
}

impl Frame<'_> {
    /// The answer in one object.
    fn whole(&self) -> Value {
        let completion = self.completion;
        let mut message = json!({
            "role": "assistant",
            "content": completion.text,
            "refusal": completion.refusal,
            "annotations": [],
        });
        if let Some(reasoning) = &completion.reasoning {
            message["reasoning_content"] = json!(reasoning);
        }
        if !completion.calls.is_empty() {
            let calls = (0..completion.calls.len()).map(|index| self.call(index, &completion.calls[index].arguments));
            message["tool_calls"] = calls.collect();
        }
        let choice = json!({"index": 0, "message": message, "logprobs": null, "finish_reason": self.finish_reason()});
        let mut whole = self.object("chat.completion", json!([choice]));
        if !completion.omits_usage {
            whole["usage"] = self.usage();
        }
        whole
    }

    /// The answer as server-sent events.
    fn stream(&self) -> Pieces {
        let deltas = self.deltas();
        // The first delta only says whose turn it is.
        let hold_at = deltas.len().min(2);
        let mut events: Vec<Value> = deltas.into_iter().map(|delta| self.chunk(delta, Value::Null)).collect();
        let failure = self.completion.failure.as_ref().map(|(_, message)| message);
        if let Some(message) = self.completion.stream_error.as_ref().or(failure) {
            events.push(json!({"error": {"message": message, "type": "server_error", "param": null, "code": null}}));
            return Pieces { bytes: events.iter().map(|event| data(&event.to_string())).collect(), hold_at };
        }
        if !self.completion.omits_finish_reason {
            events.push(self.chunk(json!({}), json!(self.finish_reason())));
        }
        if self.reports_usage() {
            let mut last = self.object("chat.completion.chunk", json!([]));
            last["usage"] = self.usage();
            events.push(last);
        }
        let mut bytes: Vec<Bytes> = events.iter().map(|event| data(&event.to_string())).collect();
        if !self.completion.omits_done {
            bytes.push(data("[DONE]"));
        }
        Pieces { bytes, hold_at }
    }

    /// What is new, chunk by chunk.
    fn deltas(&self) -> Vec<Value> {
        let completion = self.completion;
        let content = completion.text.as_ref().map(|_| "");
        let mut deltas = vec![json!({"role": "assistant", "content": content, "refusal": null})];
        let texts = [
            ("reasoning_content", &completion.reasoning),
            ("content", &completion.text),
            ("refusal", &completion.refusal),
        ];
        for (field, text) in texts {
            let pieces = text.iter().flat_map(|text| self.split(text));
            deltas.extend(pieces.map(|piece| json!({field: piece})));
        }
        for (index, call) in completion.calls.iter().enumerate() {
            let mut first = self.call(index, "");
            first["index"] = json!(index);
            deltas.push(json!({"tool_calls": [first]}));
            let pieces = self.split(&call.arguments);
            deltas.extend(
                pieces
                    .into_iter()
                    .map(|piece| json!({"tool_calls": [{"index": index, "function": {"arguments": piece}}]})),
            );
        }
        deltas
    }

    fn chunk(&self, delta: Value, finish_reason: Value) -> Value {
        let choice = json!({"index": 0, "delta": delta, "logprobs": null, "finish_reason": finish_reason});
        let mut chunk = self.object("chat.completion.chunk", json!([choice]));
        if self.reports_usage() {
            chunk["usage"] = Value::Null;
        }
        chunk
    }

    fn object(&self, kind: &str, choices: Value) -> Value {
        json!({
            "id": format!("chatcmpl-{:08}", self.request.number),
            "object": kind,
            "created": CREATED,
            "model": self.request.model(),
            "service_tier": "default",
            "system_fingerprint": "fp_scripted",
            "choices": choices,
        })
    }

    fn call(&self, index: usize, arguments: &str) -> Value {
        let call = &self.completion.calls[index];
        let id = call.id.clone().unwrap_or_else(|| format!("call_{:08}_{index}", self.request.number));
        json!({"id": id, "type": "function", "function": {"name": call.name, "arguments": arguments}})
    }

    fn usage(&self) -> Value {
        json!({
            "prompt_tokens": self.usage.prompt_tokens,
            "completion_tokens": self.usage.completion_tokens,
            "total_tokens": self.usage.total(),
            "prompt_tokens_details": {"cached_tokens": self.usage.cached_tokens, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": self.usage.reasoning_tokens,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        })
    }

    fn finish_reason(&self) -> &str {
        let own = if self.completion.calls.is_empty() { "stop" } else { "tool_calls" };
        self.completion.finish_reason.as_deref().unwrap_or(own)
    }

    fn reports_usage(&self) -> bool {
        self.request.includes_usage() && !self.completion.omits_usage
    }

    fn split(&self, text: &str) -> Vec<String> {
        split(self.completion, text)
    }
}

/// A text in the pieces it is streamed in.
pub(super) fn split(completion: &Completion, text: &str) -> Vec<String> {
    let size = completion.piece_chars.unwrap_or(CHARS_PER_TOKEN);
    let chars: Vec<char> = text.chars().collect();
    chars.chunks(size).map(|piece| piece.iter().collect()).collect()
}

fn data(payload: &str) -> Bytes {
    format!("data: {payload}\n\n").into()
}
