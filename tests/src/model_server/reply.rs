//! A line of the script: what a request is answered, and how the answer is delivered.

use std::time::Duration;

use axum::body::Bytes;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};

use super::record::Usage;

/// The answer to one model request, over whichever API it came. Begin with one of the functions that take no `self`.
///
/// Where nothing else is said, it is what OpenAI would send: streamed in pieces of one token if the
/// request asks for a stream, with usage if it asks for that. A token is four characters here.
#[derive(Clone, Debug)]
#[must_use]
pub struct Reply {
    pub(super) answer: Answer,
    pub(super) usage: Option<Usage>,
    pub(super) headers: HeaderMap,
    pub(super) head_delay: Duration,
    pub(super) gap: Duration,
    pub(super) hold: bool,
    pub(super) cut_after: Option<usize>,
    pub(super) wire_chunk: Option<usize>,
    pub(super) number: Option<u64>,
}

#[derive(Clone, Debug)]
pub(super) enum Answer {
    Completion(Completion),
    Refused(Refusal),
    Raw(Bytes),
    Hang,
    DropConnection,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Completion {
    pub(super) text: Option<String>,
    pub(super) refusal: Option<String>,
    pub(super) reasoning: Option<String>,
    pub(super) encrypted_reasoning: Option<String>,
    pub(super) hosted_calls: Vec<HostedCall>,
    pub(super) calls: Vec<Call>,
    pub(super) finish_reason: Option<String>,
    pub(super) piece_chars: Option<usize>,
    pub(super) stream_error: Option<String>,
    /// Code and message.
    pub(super) failure: Option<(String, String)>,
    pub(super) cached_tokens: u64,
    pub(super) reasoning_tokens: u64,
    pub(super) honours_max_tokens: bool,
    pub(super) omits_usage: bool,
    pub(super) omits_finish_reason: bool,
    pub(super) omits_done: bool,
}

#[derive(Clone, Debug)]
pub(super) struct Call {
    /// None: one that no other call has.
    pub(super) id: Option<String>,
    pub(super) name: String,
    pub(super) arguments: String,
}

/// A call of a tool that OpenAI runs itself.
#[derive(Clone, Debug)]
pub(super) struct HostedCall {
    pub(super) kind: String,
    pub(super) fields: Map<String, Value>,
}

impl Reply {
    /// An assistant's message.
    pub fn text(text: impl Into<String>) -> Reply {
        Reply::completion(Completion { text: Some(text.into()), ..Completion::default() })
    }

    /// A call of a tool.
    pub fn tool_call(name: &str, arguments: Value) -> Reply {
        Reply::completion(Completion::default()).and_tool_call(name, arguments)
    }

    /// A call whose arguments are exactly `arguments`, JSON or not.
    pub fn tool_call_raw(name: &str, arguments: &str) -> Reply {
        Reply::completion(Completion::default()).and_tool_call_raw(name, arguments)
    }

    /// A message that refuses.
    pub fn refusal(text: impl Into<String>) -> Reply {
        Reply::completion(Completion { refusal: Some(text.into()), ..Completion::default() })
    }

    /// A call of a tool that OpenAI ran itself, such as `web_search_call`, with what else its item says. Chat
    /// Completions has no such thing: there it is left out.
    pub fn hosted_call(kind: &str, fields: Value) -> Reply {
        Reply::completion(Completion::default()).and_hosted_call(kind, fields)
    }

    /// An answer that is its text so far and no more, for this `reason`: `max_output_tokens` or `content_filter`. Over
    /// Chat Completions it is the finish reason `length` or `content_filter`.
    pub fn incomplete(text: impl Into<String>, reason: &str) -> Reply {
        Reply::text(text).finish_reason(if reason == "content_filter" { reason } else { "length" })
    }

    /// An answer that failed before it said anything: `response.failed`, or an error in a Chat Completions stream.
    pub fn failed(code: &str, message: &str) -> Reply {
        Reply::completion(Completion { failure: Some((code.to_owned(), message.to_owned())), ..Completion::default() })
    }

    /// An error with this HTTP status, its body in OpenAI's shape with what goes with the status.
    pub fn status(status: u16) -> Reply {
        Reply::refused(Refusal::of_status(status))
    }

    /// 200 and exactly these bytes. It is charged what [`Reply::usage`] says, nothing by default.
    pub fn raw(bytes: impl Into<Bytes>) -> Reply {
        Reply::new(Answer::Raw(bytes.into()))
    }

    /// No answer ever: the head never comes.
    pub fn hang() -> Reply {
        Reply::new(Answer::Hang)
    }

    /// The request is read and the connection closed, without a byte of an answer.
    pub fn drop_connection() -> Reply {
        Reply::new(Answer::DropConnection)
    }

    /// One more tool call.
    pub fn and_tool_call(self, name: &str, arguments: Value) -> Reply {
        self.and_tool_call_raw(name, &arguments.to_string())
    }

    /// One more tool call, its arguments exactly `arguments`.
    pub fn and_tool_call_raw(mut self, name: &str, arguments: &str) -> Reply {
        let call = Call { id: None, name: name.to_owned(), arguments: arguments.to_owned() };
        self.completion_mut().calls.push(call);
        self
    }

    /// The id of the last tool call, such as an empty one; unique by default.
    pub fn call_id(mut self, id: &str) -> Reply {
        self.completion_mut().calls.last_mut().expect("a tool call comes first").id = Some(id.to_owned());
        self
    }

    /// Text beside calls.
    pub fn and_text(mut self, text: impl Into<String>) -> Reply {
        self.completion_mut().text = Some(text.into());
        self
    }

    /// A refusal beside text or calls.
    pub fn and_refusal(mut self, text: impl Into<String>) -> Reply {
        self.completion_mut().refusal = Some(text.into());
        self
    }

    /// One more call of a tool that OpenAI ran itself, see [`Reply::hosted_call`].
    pub fn and_hosted_call(mut self, kind: &str, fields: Value) -> Reply {
        let Value::Object(fields) = fields else { panic!("the fields of an item are an object, not {fields}") };
        self.completion_mut().hosted_calls.push(HostedCall { kind: kind.to_owned(), fields });
        self
    }

    /// The `encrypted_content` of the reasoning, which comes before the message. Chat Completions has none.
    pub fn encrypted_reasoning(mut self, content: impl Into<String>) -> Reply {
        self.completion_mut().encrypted_reasoning = Some(content.into());
        self
    }

    /// Reasoning before the message: over Chat Completions `reasoning_content`, as DeepSeek and vLLM send it; over the
    /// Responses API a summary.
    pub fn reasoning(mut self, text: impl Into<String>) -> Reply {
        self.completion_mut().reasoning = Some(text.into());
        self
    }

    /// What the call is charged. By default it follows from the lengths of request and answer.
    pub fn usage(mut self, prompt_tokens: u64, completion_tokens: u64) -> Reply {
        self.usage = Some(Usage { prompt_tokens, completion_tokens, ..Usage::default() });
        self
    }

    /// How many of the prompt's tokens came from the cache.
    pub fn cached(mut self, tokens: u64) -> Reply {
        self.completion_mut().cached_tokens = tokens;
        self
    }

    /// How many of the completion's tokens were reasoning.
    pub fn reasoning_tokens(mut self, tokens: u64) -> Reply {
        self.completion_mut().reasoning_tokens = tokens;
        self
    }

    /// Charges the call but never says so, as a server that doesn't report usage.
    pub fn no_usage(mut self) -> Reply {
        self.completion_mut().omits_usage = true;
        self
    }

    /// Stops at the request's maximum of output tokens, with finish reason `length`: the text is cut
    /// and the charge limited. Tool calls stay whole.
    pub fn honour_max_tokens(mut self) -> Reply {
        self.completion_mut().honours_max_tokens = true;
        self
    }

    /// Another finish reason than the answer's own. Over the Responses API, `length` and `content_filter` are an
    /// incomplete response.
    pub fn finish_reason(mut self, reason: &str) -> Reply {
        self.completion_mut().finish_reason = Some(reason.to_owned());
        self
    }

    /// A stream that ends in order, but never says why the model stopped; over the Responses API without its last event.
    pub fn without_finish_reason(mut self) -> Reply {
        self.completion_mut().omits_finish_reason = true;
        self
    }

    /// A stream that ends in order, but without `[DONE]`, which the Responses API never has.
    pub fn without_done(mut self) -> Reply {
        self.completion_mut().omits_done = true;
        self
    }

    /// A stream that, once the content was sent, goes on with an error in place of its end.
    pub fn fail_in_stream(mut self, message: &str) -> Reply {
        self.completion_mut().stream_error = Some(message.to_owned());
        self
    }

    /// Streams text and arguments in pieces of `characters`.
    pub fn chunks_of(mut self, characters: usize) -> Reply {
        self.completion_mut().piece_chars = Some(characters.max(1));
        self
    }

    /// Sends the body in writes of `bytes`, wherever that falls in an event or a character.
    pub fn wire_chunks_of(mut self, bytes: usize) -> Reply {
        self.wire_chunk = Some(bytes.max(1));
        self
    }

    /// The number that the answer's ids are made of, where it has no other; by default the request's.
    pub fn number(mut self, number: u64) -> Reply {
        self.number = Some(number);
        self
    }

    /// Waits before the head is sent, in milliseconds.
    pub fn delay(mut self, milliseconds: u64) -> Reply {
        self.head_delay = Duration::from_millis(milliseconds);
        self
    }

    /// Waits between the pieces of the body, in milliseconds.
    pub fn chunk_delay(mut self, milliseconds: u64) -> Reply {
        self.gap = Duration::from_millis(milliseconds);
        self
    }

    /// Stands still after the first piece of content until
    /// [`release`](super::ModelServer::release); an answer that is not streamed, after its head.
    pub fn hold(mut self) -> Reply {
        self.hold = true;
        self
    }

    /// Breaks the connection after so many bytes of the body, or after all of them if it has fewer;
    /// the client sees a body that was not ended.
    pub fn cut_after_bytes(mut self, bytes: usize) -> Reply {
        self.cut_after = Some(bytes);
        self
    }

    /// `Retry-After`, in seconds.
    pub fn retry_after(self, seconds: u64) -> Reply {
        self.header("retry-after", &seconds.to_string())
    }

    /// Any response header.
    pub fn header(mut self, name: &str, value: &str) -> Reply {
        let name: HeaderName = name.parse().expect("a header's name");
        self.headers.insert(name, HeaderValue::from_str(value).expect("a header's value"));
        self
    }

    /// The error's `code`, such as `insufficient_quota`.
    pub fn error_code(mut self, code: &str) -> Reply {
        let refusal = self.refusal_mut();
        *refusal = refusal.clone().code(code);
        self
    }

    /// The error's `message`.
    pub fn error_message(mut self, message: &str) -> Reply {
        self.refusal_mut().message = message.to_owned();
        self
    }

    pub(super) fn refused(refusal: Refusal) -> Reply {
        Reply::new(Answer::Refused(refusal))
    }

    fn completion(completion: Completion) -> Reply {
        Reply::new(Answer::Completion(completion))
    }

    fn new(answer: Answer) -> Reply {
        Reply {
            answer,
            usage: None,
            headers: HeaderMap::new(),
            head_delay: Duration::ZERO,
            gap: Duration::ZERO,
            hold: false,
            cut_after: None,
            wire_chunk: None,
            number: None,
        }
    }

    fn completion_mut(&mut self) -> &mut Completion {
        match &mut self.answer {
            Answer::Completion(completion) => completion,
            other => panic!("only a completion has this, not {other:?}"),
        }
    }

    fn refusal_mut(&mut self) -> &mut Refusal {
        match &mut self.answer {
            Answer::Refused(refusal) => refusal,
            other => panic!("only an error status has this, not {other:?}"),
        }
    }
}

/// An error status with OpenAI's error object.
#[derive(Clone, Debug)]
pub(super) struct Refusal {
    pub(super) status: StatusCode,
    message: String,
    kind: &'static str,
    param: Option<&'static str>,
    code: Option<String>,
}

impl Refusal {
    /// A request that can't be taken as it is.
    pub(super) fn new(status: u16, message: &str) -> Refusal {
        Refusal {
            status: StatusCode::from_u16(status).expect("an HTTP status"),
            message: message.to_owned(),
            kind: "invalid_request_error",
            param: None,
            code: None,
        }
    }

    /// What OpenAI says with a status. Sources: its API reference's error codes.
    fn of_status(status: u16) -> Refusal {
        let (kind, code, message) = match status {
            401 => ("invalid_request_error", Some("invalid_api_key"), "Incorrect API key provided."),
            403 => ("invalid_request_error", None, "This key may not do that."),
            404 => ("invalid_request_error", Some("model_not_found"), "The model does not exist."),
            429 => ("requests", Some("rate_limit_exceeded"), "Rate limit reached for requests."),
            500.. => ("server_error", None, "The server had an error while processing the request."),
            _ => ("invalid_request_error", None, "The request is invalid."),
        };
        Refusal { kind, code: code.map(str::to_owned), ..Refusal::new(status, message) }
    }

    /// With this `code`.
    pub(super) fn code(mut self, code: &str) -> Refusal {
        // OpenAI repeats this one code as the type.
        if code == "insufficient_quota" {
            self.kind = "insufficient_quota";
        }
        self.code = Some(code.to_owned());
        self
    }

    /// With the `param` at fault.
    pub(super) fn param(mut self, param: &'static str) -> Refusal {
        self.param = Some(param);
        self
    }

    /// The JSON body.
    pub(super) fn body(&self) -> Bytes {
        let error = json!({"message": self.message, "type": self.kind, "param": self.param, "code": self.code});
        json!({"error": error}).to_string().into()
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.status, [("content-type", "application/json")], self.body()).into_response()
    }
}
