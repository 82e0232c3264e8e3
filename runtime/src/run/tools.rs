//! A response's webhook calls, side by side.

use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, StreamExt, stream};
use serde_json::Value;
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use super::state::{Call, Target};
use super::texts;
use crate::ids::run_id;
use crate::spec::WebhookTool;
use crate::webhook::{WebhookCall, WebhookClient, WebhookError};

/// What the webhook calls of a run share.
#[derive(Clone)]
pub struct Tools {
    client: WebhookClient,
    run_id: Uuid,
    secrets: Arc<[String]>,
}

/// What the model is told of a call.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// The call it answers.
    pub call_id: String,
    /// The text.
    pub output: String,
    /// Whether the text is ours.
    pub is_error: bool,
}

/// A call with all it needs, apart from the run's state.
struct Invocation {
    call_id: String,
    arguments: String,
    turn: u32,
    position: usize,
    tool: WebhookTool,
}

impl Tools {
    /// The tools of one run; each of `secrets` signs.
    pub fn new(client: WebhookClient, run_id: Uuid, secrets: Vec<String>) -> Self {
        Self { client, run_id, secrets: secrets.into() }
    }

    /// Makes the calls, at most `at_once` at a time, and yields the answers as they come, those that came together in
    /// one batch. Dropping the stream cuts the calls that are under way.
    pub fn call_all(
        &self,
        turn: u32,
        calls: Vec<Call<'_>>,
        at_once: u32,
    ) -> impl Stream<Item = Vec<Answer>> + Send + use<> {
        let at_once = usize::try_from(at_once).unwrap_or(usize::MAX).max(1);
        let tools = self.clone();
        let invocations: Vec<Invocation> = calls
            .into_iter()
            .filter_map(|call| match call.target {
                Target::Tool(tool) => Some(Invocation {
                    call_id: call.id,
                    arguments: call.arguments,
                    turn,
                    position: call.position,
                    tool: tool.clone(),
                }),
                Target::Handoff(_) | Target::Missing => None,
            })
            .collect();
        stream::iter(invocations)
            .map(move |invocation| tools.clone().answer(invocation))
            .buffer_unordered(at_once)
            .ready_chunks(at_once)
    }

    /// Calls in a task of its own, so that calls go on while answers are being stored, and one that panics is one that
    /// failed.
    async fn answer(self, invocation: Invocation) -> Answer {
        let call_id = invocation.call_id.clone();
        let call = tokio::spawn(async move { self.invoke(&invocation).await });
        let (output, is_error) = match AbortOnDropHandle::new(call).await {
            Ok(Ok(output)) => (output, false),
            Ok(Err(text)) => (text, true),
            Err(_) => (texts::TOOL_FAILED.to_owned(), true),
        };
        Answer { call_id, output, is_error }
    }

    /// The answer, or what the model is told instead.
    async fn invoke(&self, invocation: &Invocation) -> Result<String, String> {
        let Invocation { arguments, turn, position, tool, .. } = invocation;
        if !fits(&tool.parameters, arguments) {
            return Err(texts::TOOL_FAILED.to_owned());
        }
        let call = WebhookCall {
            url: &tool.url,
            token: tool.token.as_deref(),
            arguments,
            timeout: Duration::from_millis(tool.timeout_ms.into()),
            run_id: self.run_id,
            turn: *turn,
            index: *position,
            secrets: &self.secrets,
        };
        self.client.call(call).await.map_err(|error| {
            tracing::debug!(run = %run_id(self.run_id), turn, index = position, %error, "a webhook call failed");
            match error {
                WebhookError::TimedOut => texts::timed_out(&tool.name, tool.timeout_ms),
                _ => texts::TOOL_FAILED.to_owned(),
            }
        })
    }
}

/// Whether arguments are a JSON object that fits the tool's schema. Nothing fits a schema that does not compile, one
/// that refers to other documents among them: those are never fetched.
fn fits(schema: &Value, arguments: &str) -> bool {
    let arguments = if arguments.is_empty() { "{}" } else { arguments };
    match serde_json::from_str::<Value>(arguments) {
        Ok(arguments) if arguments.is_object() => {
            jsonschema::validator_for(schema).is_ok_and(|validator| validator.is_valid(&arguments))
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn arguments_must_be_an_object_that_fits() {
        let schema = json!({ "type": "object", "properties": { "city": { "type": "string" } }, "required": ["city"] });
        assert!(fits(&schema, r#"{"city": "Rome"}"#));
        for arguments in ["", "{}", r#"{"city": 1}"#, r#"{"city": "Rome""#, "[]", "null", "\"Rome\"", " "] {
            assert!(!fits(&schema, arguments), "{arguments}");
        }
        assert!(fits(&json!({ "type": "object" }), ""));
        assert!(fits(&json!({}), "{}"));
        assert!(!fits(&json!({}), "[]"));
    }

    #[test]
    fn nothing_fits_a_broken_schema() {
        assert!(!fits(&json!({ "type": "nonsense" }), "{}"));
        assert!(!fits(&json!({ "$ref": "https://example.com/schema.json" }), "{}"));
        assert!(!fits(&json!({ "$ref": "file:///etc/hostname" }), "{}"));
    }
}
