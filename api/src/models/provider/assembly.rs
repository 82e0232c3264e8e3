//! From the chunks of a Chat Completions stream to an answer's parts.

use std::sync::Arc;
use std::time::Duration;

use async_openai::types::stream::StreamResponse;
use async_stream::stream;
use cloister_runtime::item::{RunErrorCode, TokenUsage};
use cloister_runtime::model::{Finish, Part};
use futures_util::{Stream, StreamExt};
use serde_json::{Value, json};

use super::attempt::CutReason;
use super::chunk::{CallDelta, Chunk, Frame};
use super::redact::Redactor;
use super::{AnswerEvent, Completion, Cut};

/// Chat Completions has no places for parts; these are the ones [`Part`] fixes.
const REASONING_INDEX: u32 = 0;
const MESSAGE_INDEX: u32 = 1;
const FIRST_CALL_INDEX: u32 = 2;

/// How long the usage is waited for once an answer is complete.
const USAGE_PATIENCE: Duration = Duration::from_secs(10);
/// How long `[DONE]` is waited for once the usage is known: a stream that is read to its end keeps its connection.
pub(super) const LAST_WORD: Duration = Duration::from_millis(250);

/// The most calls a response may have.
pub(super) const MAX_CALLS: usize = 128;

/// An answer's events, from its chunks. Once the provider has said why it stopped, the answer is
/// complete however the stream ends: what may still follow is only the usage.
pub(super) fn assemble(
    mut frames: StreamResponse<Frame>,
    upstream_model: String,
    cut_reason: CutReason,
    redactor: Arc<Redactor>,
) -> impl Stream<Item = Result<AnswerEvent, Cut>> + Send + 'static {
    stream! {
        let mut assembly = Assembly { upstream_model, ..Assembly::default() };
        while let Some(Frame(chunk)) = assembly.next_of(&mut frames).await {
            match assembly.add(&chunk) {
                Ok(events) => {
                    for event in events {
                        yield Ok(event);
                    }
                }
                Err(reason) => {
                    yield Err(assembly.cut(redactor.clean(&reason)));
                    return;
                }
            }
        }
        for event in assembly.held_back() {
            yield Ok(event);
        }
        match assembly.finish {
            Some(finish) => yield Ok(AnswerEvent::Complete(assembly.completion(finish))),
            None if assembly.has_no_choices() && !cut_reason.is_known() => yield Err(assembly.without_choices()),
            None => yield Err(assembly.cut(cut_reason.get())),
        }
    }
}

/// An answer as far as it has arrived.
#[derive(Debug, Default)]
struct Assembly {
    /// The provider's name of the model.
    upstream_model: String,
    reasoning: String,
    /// Under the name that DeepSeek gave it.
    has_reasoning_content: bool,
    has_choices: bool,
    message: String,
    refusal: String,
    calls: Vec<Call>,
    finish: Option<Finish>,
    usage: Option<TokenUsage>,
}

/// A tool call as far as it has arrived.
#[derive(Debug, Default)]
struct Call {
    /// The provider's place for it, if it gives places.
    place: Option<u64>,
    id: String,
    name: String,
    arguments: String,
    /// Bytes of `arguments` that have been passed on.
    passed_on: usize,
}

impl Assembly {
    /// The next chunk, as long as one is worth waiting for. After the reason to stop only the usage is, and not for
    /// long: some servers leave the stream open.
    async fn next_of(&self, frames: &mut StreamResponse<Frame>) -> Option<Frame> {
        let frame = match (self.finish, self.usage) {
            (None, _) => frames.next().await,
            (Some(_), None) => tokio::time::timeout(USAGE_PATIENCE, frames.next()).await.ok().flatten(),
            (Some(_), Some(_)) => tokio::time::timeout(LAST_WORD, frames.next()).await.ok().flatten(),
        };
        frame?.ok()
    }

    /// Takes a chunk in and tells what is new; an error is the reason to end here.
    fn add(&mut self, chunk: &Chunk) -> Result<Vec<AnswerEvent>, String> {
        // Usage first: a provider that reports an error may say what it charged in the same chunk.
        if let Some(usage) = chunk.usage() {
            self.usage = Some(usage);
        }
        if let Some(error) = chunk.error() {
            return Err(match error.as_str() {
                "" => "the provider reported an error in the midst of its answer".to_owned(),
                message => format!("the provider reported an error in the midst of its answer: {message}"),
            });
        }
        let mut events = Vec::new();
        for choice in chunk.choices.iter().filter(|choice| choice.index == 0) {
            self.has_choices = true;
            self.reasoning.push_str(choice.delta.reasoning());
            self.has_reasoning_content |= choice.delta.has_reasoning_content();
            self.refusal.push_str(&choice.delta.refusal);
            if !choice.delta.content.is_empty() {
                self.message.push_str(&choice.delta.content);
                events.push(AnswerEvent::Text { index: MESSAGE_INDEX, text: choice.delta.content.clone() });
            }
            for delta in &choice.delta.tool_calls {
                events.extend(self.add_call(delta)?);
            }
            match choice.finish_reason.as_str() {
                "" => {}
                "length" => self.finish = Some(Finish::Length),
                "content_filter" => self.finish = Some(Finish::ContentFilter),
                _ => self.finish = Some(Finish::Stop),
            }
        }
        Ok(events)
    }

    fn add_call(&mut self, delta: &CallDelta) -> Result<Option<AnswerEvent>, String> {
        let position = match self.position(delta) {
            Some(position) => position,
            None if self.calls.len() == MAX_CALLS => {
                return Err(format!("the answer has more than {MAX_CALLS} tool calls"));
            }
            None => {
                self.calls.push(Call { place: delta.index, ..Call::default() });
                self.calls.len() - 1
            }
        };
        let Some(call) = self.calls.get_mut(position) else { return Ok(None) };
        if call.id.is_empty() {
            call.id.clone_from(&delta.id);
        }
        if call.name.is_empty() {
            call.name.clone_from(&delta.function.name);
        }
        call.arguments.push_str(&delta.function.arguments());
        // What a client is shown of a call carries its id and name, so it waits for both.
        if call.id.is_empty() || call.name.is_empty() { Ok(None) } else { Ok(call.pass_on(call_index(position))) }
    }

    /// The call that a delta continues; none if it begins one. OpenAI gives each call a place. Some servers give
    /// every call place 0, and begin each with a new id and a name; some give no places at all.
    fn position(&self, delta: &CallDelta) -> Option<usize> {
        let begins = !delta.function.name.is_empty();
        match delta.index {
            Some(place) => {
                let position = self.calls.iter().rposition(|call| call.place == Some(place))?;
                let known_id = &self.calls.get(position)?.id;
                let other_id = !delta.id.is_empty() && !known_id.is_empty() && *known_id != delta.id;
                (!begins || !other_id).then_some(position)
            }
            None => {
                let same_id = |call: &Call| !delta.id.is_empty() && call.id == delta.id;
                let last = if begins { None } else { self.calls.len().checked_sub(1) };
                self.calls.iter().rposition(same_id).or(last)
            }
        }
    }

    /// Arguments of calls that never got an id: they were waiting for one.
    fn held_back(&mut self) -> Vec<AnswerEvent> {
        (0..).zip(&mut self.calls).filter_map(|(position, call)| call.pass_on(call_index(position))).collect()
    }

    fn completion(self, finish: Finish) -> Completion {
        let usage = self.usage;
        Completion { parts: self.into_parts(), finish, usage }
    }

    fn cut(&mut self, reason: String) -> Cut {
        let arrived = std::mem::take(self);
        Cut { usage: arrived.usage, ..Cut::broken(reason, arrived.into_parts()) }
    }

    /// Whether the provider charged for an answer and gave none.
    fn has_no_choices(&self) -> bool {
        !self.has_choices && self.usage.is_some()
    }

    fn without_choices(&self) -> Cut {
        let reason = "The model's answer has no choices.".to_owned();
        Cut { code: RunErrorCode::ModelBehavior, reason, partial: Vec::new(), usage: self.usage }
    }

    fn into_parts(self) -> Vec<Part> {
        let mut parts = Vec::new();
        if !self.reasoning.is_empty() {
            // Where it came from decides who may be sent it again (see `chat`).
            let field = if self.has_reasoning_content { "reasoning_content" } else { "reasoning" };
            let raw = json!({"provider_data": {"model": self.upstream_model, "field": field}});
            parts.push(Part::Reasoning { index: REASONING_INDEX, text: self.reasoning, raw: Some(raw) });
        }
        // A refusal beside calls ends nothing, and is sent back with them.
        let is_replayed = !self.refusal.is_empty() && !self.calls.is_empty();
        let raw = is_replayed.then(|| message_item(&self.message, &self.refusal));
        if !self.message.is_empty() || is_replayed {
            parts.push(Part::Message { index: MESSAGE_INDEX, text: self.message, raw });
        }
        if !self.refusal.is_empty() {
            parts.push(Part::Refusal { text: self.refusal });
        }
        parts.extend((0..).zip(self.calls).map(|(position, call)| Part::ToolCall {
            index: call_index(position),
            call_id: call.id,
            name: call.name,
            arguments: call.arguments,
            raw: None,
        }));
        parts
    }
}

impl Call {
    /// The arguments that were not passed on yet.
    fn pass_on(&mut self, index: u32) -> Option<AnswerEvent> {
        let text = self.arguments.get(self.passed_on..).filter(|text| !text.is_empty())?.to_owned();
        self.passed_on = self.arguments.len();
        Some(AnswerEvent::Arguments { index, call_id: self.id.clone(), name: self.name.clone(), text })
    }
}

/// A message that refuses, as the Agents SDK keeps it: in the words of the Responses API.
fn message_item(text: &str, refusal: &str) -> Value {
    let text =
        (!text.is_empty()).then(|| json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []}));
    let content: Vec<_> = text.into_iter().chain([json!({"type": "refusal", "refusal": refusal})]).collect();
    json!({"type": "message", "role": "assistant", "status": "completed", "content": content})
}

/// The place of the call that came `position`th, from 0; [`MAX_CALLS`] keeps it far from the type's end.
fn call_index(position: usize) -> u32 {
    u32::try_from(position).map_or(u32::MAX, |position| FIRST_CALL_INDEX.saturating_add(position))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(json: Value) -> Chunk {
        serde_json::from_value::<Frame>(json).unwrap().0
    }

    fn delta(delta: Value) -> Chunk {
        chunk(json!({"choices": [{"delta": delta}]}))
    }

    fn calls(deltas: &[Value]) -> Vec<(u32, String, String, String)> {
        let mut assembly = Assembly::default();
        for tool_calls in deltas {
            assembly.add(&delta(json!({"tool_calls": tool_calls}))).unwrap();
        }
        assembly
            .into_parts()
            .into_iter()
            .map(|part| match part {
                Part::ToolCall { index, call_id, name, arguments, .. } => (index, call_id, name, arguments),
                other => panic!("not a call: {other:?}"),
            })
            .collect()
    }

    fn call(index: u32, id: &str, name: &str, arguments: &str) -> (u32, String, String, String) {
        (index, id.to_owned(), name.to_owned(), arguments.to_owned())
    }

    #[test]
    fn parts_have_their_places() {
        let mut assembly = Assembly { upstream_model: "m".to_owned(), ..Assembly::default() };
        let calls = json!([{"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}]);
        assembly.add(&delta(json!({"tool_calls": calls, "refusal": "no"}))).unwrap();
        assembly.add(&delta(json!({"content": "hi", "reasoning": "hm"}))).unwrap();
        assembly.add(&delta(json!({"reasoning_content": "m", "reasoning": "m"}))).unwrap();
        assert_eq!(
            assembly.into_parts(),
            [
                Part::Reasoning {
                    index: 0,
                    text: "hmm".to_owned(),
                    raw: Some(json!({"provider_data": {"model": "m", "field": "reasoning_content"}})),
                },
                Part::Message { index: 1, text: "hi".to_owned(), raw: Some(message_item("hi", "no")) },
                Part::Refusal { text: "no".to_owned() },
                Part::ToolCall {
                    index: 2,
                    call_id: "c".to_owned(),
                    name: "f".to_owned(),
                    arguments: "{}".to_owned(),
                    raw: None
                },
            ]
        );
    }

    #[test]
    fn calls_stream_interleaved_by_place() {
        let deltas = [
            json!([{"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": ""}}]),
            json!([{"index": 1, "id": "b", "function": {"name": "g"}}]),
            json!([{"index": 0, "function": {"arguments": "{\"x\""}}, {"index": 1, "function": {"arguments": "{}"}}]),
            json!([{"index": 0, "function": {"arguments": ":1}"}}]),
        ];
        assert_eq!(calls(&deltas), [call(2, "a", "f", "{\"x\":1}"), call(3, "b", "g", "{}")]);
    }

    #[test]
    fn calls_without_places_are_told_apart() {
        let whole = json!([
            {"function": {"name": "f", "arguments": {"x": 1}}},
            {"function": {"name": "g", "arguments": "{}"}},
        ]);
        assert_eq!(calls(&[whole]), [call(2, "", "f", "{\"x\":1}"), call(3, "", "g", "{}")]);
        let by_id = [
            json!([{"id": "a", "function": {"name": "f", "arguments": "{"}}]),
            json!([{"id": "a", "function": {"name": "f", "arguments": "}"}}]),
            json!([{"id": "b", "function": {"name": "f", "arguments": "{"}}]),
            json!([{"function": {"arguments": "}"}}]),
        ];
        assert_eq!(calls(&by_id), [call(2, "a", "f", "{}"), call(3, "b", "f", "{}")]);
    }

    #[test]
    fn calls_that_share_place_zero_are_told_apart() {
        let deltas = [
            json!([{"index": 0, "id": "a", "function": {"name": "f", "arguments": "{}"}}]),
            json!([{"index": 0, "id": "b", "function": {"name": "f", "arguments": "{"}}]),
            json!([{"index": 0, "id": "", "function": {"arguments": "}"}}]),
        ];
        assert_eq!(calls(&deltas), [call(2, "a", "f", "{}"), call(3, "b", "f", "{}")]);
    }

    #[test]
    fn arguments_are_shown_once_id_and_name_are_known() {
        let mut assembly = Assembly::default();
        let mut add = |call: Value| assembly.add(&delta(json!({"tool_calls": [call]}))).unwrap();
        assert_eq!(add(json!({"index": 0, "function": {"name": "f", "arguments": "{"}})), []);
        let shown = |text: &str| {
            [AnswerEvent::Arguments { index: 2, call_id: "a".to_owned(), name: "f".to_owned(), text: text.to_owned() }]
        };
        assert_eq!(add(json!({"index": 0, "id": "a", "function": {"arguments": "\"x\""}})), shown("{\"x\""));
        assert_eq!(add(json!({"index": 0, "function": {"arguments": "}"}})), shown("}"));
        assert_eq!(assembly.held_back(), []);
    }

    #[test]
    fn calls_are_bounded() {
        let mut assembly = Assembly::default();
        for place in 0..MAX_CALLS {
            assembly.add(&delta(json!({"tool_calls": [{"index": place, "id": place.to_string()}]}))).unwrap();
        }
        assembly.add(&delta(json!({"tool_calls": [{"index": MAX_CALLS}]}))).unwrap_err();
    }

    #[test]
    fn finish_reasons_and_other_choices() {
        let finish = |reason: &str| {
            let mut assembly = Assembly::default();
            assembly.add(&chunk(json!({"choices": [{"delta": {}, "finish_reason": reason}]}))).unwrap();
            assembly.finish
        };
        assert_eq!(finish(""), None);
        assert_eq!(finish("stop"), Some(Finish::Stop));
        assert_eq!(finish("tool_calls"), Some(Finish::Stop));
        assert_eq!(finish("length"), Some(Finish::Length));
        assert_eq!(finish("content_filter"), Some(Finish::ContentFilter));

        let mut assembly = Assembly::default();
        let other = json!({"choices": [{"index": 1, "delta": {"content": "x"}, "finish_reason": "stop"}]});
        assert_eq!(assembly.add(&chunk(other)).unwrap(), []);
        assert_eq!(assembly.finish, None);
    }
}
