//! From a model's response to the journal's items: the one place that decides what a response leaves behind.

use std::collections::HashSet;

use crate::item::{Body, Role, RunError, RunErrorCode, RunStatus, Step, arguments_hash};
use crate::model::{Finish, ModelResponse, Part};
use crate::spec::{AgentSpec, GuardrailStage};

/// What is known of a turn before its response arrives. It owns all it needs, since the
/// response may be recorded after the loop that asked for it is gone.
#[derive(Clone, Debug)]
pub struct TurnRecorder {
    /// The turn, from 1.
    pub turn: u32,
    /// The agent at work.
    pub agent_name: String,
    /// The nested run; none for the run itself.
    pub scope: Option<String>,
    /// Whether a text that is the last thing to handle is the run's output ([`TurnRecorder::ends_with_text`]).
    pub is_final: bool,
    /// The earliest sequence that the response's first item can have.
    pub from_sequence: i64,
    /// Call ids the run has used.
    pub used_call_ids: HashSet<String>,
}

impl TurnRecorder {
    /// The response's items in their order: parts by index, then what it cost, then the run's end if nothing is
    /// left to do after it: it is the final answer, or can't be used. They are one append, made before any tool starts.
    pub fn steps(&self, response: &ModelResponse) -> Vec<Step> {
        let mut ids = self.call_ids();
        let mut bodies: Vec<Body> = response
            .parts
            .iter()
            .filter_map(|part| match part {
                Part::Reasoning { index, text, raw } => {
                    Some(Body::Reasoning { index: *index, text: text.clone(), raw: raw.clone() })
                }
                Part::Message { index, text, raw } => Some(Body::Message {
                    index: Some(*index),
                    role: Role::Assistant,
                    text: text.clone(),
                    raw: raw.clone(),
                }),
                Part::Refusal { .. } => None,
                Part::ToolCall { index, call_id, name, arguments, raw } => Some(Body::ToolCall {
                    index: *index,
                    call_id: ids.assign(*index, call_id),
                    name: name.clone(),
                    arguments: arguments.clone(),
                    arguments_hash: arguments_hash(arguments),
                    is_hosted: false,
                    raw: raw.clone(),
                }),
                Part::HostedCall { index, id, name, raw } => Some(Body::ToolCall {
                    index: *index,
                    call_id: ids.assign(*index, id),
                    name: name.clone(),
                    arguments: String::new(),
                    arguments_hash: arguments_hash(""),
                    is_hosted: true,
                    raw: Some(raw.clone()),
                }),
            })
            .collect();
        let failure = unusable(response);
        let end = match &self.scope {
            // A nested run has no state of its own.
            Some(_) => None,
            None => failure.clone().map(|error| Body::failed(error.code, error.message)).or_else(|| self.end(response)),
        };
        let failure = failure.filter(|_| self.scope.is_some());
        bodies.push(Body::Usage { model: response.model.clone(), usage: response.usage, failure });
        let mut steps: Vec<Step> = bodies.into_iter().map(|body| self.step(body)).collect();
        // A change of state stands outside the turn, like every other.
        steps.extend(end.map(|body| Step { turn: None, ..self.step(body) }));
        steps
    }

    /// Whether an agent's text is its final output as it is, without anything to be made sure of.
    pub fn ends_with_text(agent: &AgentSpec) -> bool {
        agent.output.is_none() && !agent.guardrails.iter().any(|guardrail| guardrail.stage == GuardrailStage::Output)
    }

    /// How a response ends the run, if it does. One with calls never does, nor do calls of the provider's own alone.
    fn end(&self, response: &ModelResponse) -> Option<Body> {
        let has_calls = response.parts.iter().any(|part| matches!(part, Part::ToolCall { .. }));
        let has_hosted_calls = response.parts.iter().any(|part| matches!(part, Part::HostedCall { .. }));
        let last = response.parts.iter().rev().find_map(|part| match part {
            Part::Message { text, .. } => Some(text.clone()),
            _ => None,
        });
        if !self.is_final || has_calls || (has_hosted_calls && last.is_none()) {
            return None;
        }
        let output = Some(last.unwrap_or_default());
        Some(Body::Status { status: RunStatus::Succeeded, error: None, output, output_json: None })
    }

    /// An item of this turn.
    pub fn step(&self, body: Body) -> Step {
        Step { agent_name: self.agent_name.clone(), turn: Some(self.turn), scope: self.scope.clone(), body }
    }

    /// Gives the response's calls their ids, in order.
    pub fn call_ids(&self) -> CallIds {
        CallIds { turn: self.turn, used: self.used_call_ids.clone(), assigned: Vec::new() }
    }
}

/// The longest id of a provider's that is kept.
const MAX_CALL_ID_BYTES: usize = 128;

/// Gives each call of a response the id it has in the journal: the provider's, or ours where
/// that is empty or was used before in the run (compatible servers repeat them).
#[derive(Clone, Debug)]
pub struct CallIds {
    turn: u32,
    used: HashSet<String>,
    assigned: Vec<(u32, String)>,
}

impl CallIds {
    /// The id of the call at `index`; the same for each delta of it.
    pub fn assign(&mut self, index: u32, provider_id: &str) -> String {
        if let Some((_, id)) = self.assigned.iter().find(|(at, _)| *at == index) {
            return id.clone();
        }
        let mut id = provider_id.to_owned();
        // Scopes are made of ids, with a `/` between.
        let is_of_scopes = id.contains('/') || id.starts_with("guardrail:");
        let is_unfit = is_of_scopes || id.len() > MAX_CALL_ID_BYTES || id.chars().any(char::is_control);
        if id.is_empty() || is_unfit || self.used.contains(&id) {
            id = format!("call_{}_{index}", self.turn);
            while self.used.contains(&id) {
                id.push('x');
            }
        }
        self.used.insert(id.clone());
        self.assigned.push((index, id.clone()));
        id
    }
}

/// Why a response ends the run as failed, if it does. Beside calls nothing does: they are handled, and the model
/// goes on.
fn unusable(response: &ModelResponse) -> Option<RunError> {
    let error = |code, message: String| Some(RunError { code, message });
    if response.parts.iter().any(|part| matches!(part, Part::ToolCall { .. })) {
        return None;
    }
    let refusal: String = response
        .parts
        .iter()
        .filter_map(|part| match part {
            Part::Refusal { text } => Some(text.as_str()),
            _ => None,
        })
        .collect();
    if !refusal.is_empty() {
        return error(RunErrorCode::ModelRefusal, format!("The model refused to answer: {refusal}"));
    }
    if response.parts.iter().any(|part| matches!(part, Part::Message { text, .. } if !text.is_empty())) {
        return None;
    }
    match response.finish {
        Finish::Stop => None,
        Finish::Length => {
            error(RunErrorCode::ModelBehavior, "The model used up its output tokens before it said anything.".into())
        }
        Finish::ContentFilter => {
            error(RunErrorCode::ModelRefusal, "The provider's content filter withheld the answer.".into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::item::TokenUsage;

    fn response(parts: Vec<Part>, finish: Finish) -> ModelResponse {
        ModelResponse { model: "m".into(), parts, finish, usage: TokenUsage::default() }
    }

    fn text(text: &str) -> Part {
        Part::Message { index: 1, text: text.into(), raw: None }
    }

    fn refusal() -> Part {
        Part::Refusal { text: "No.".into() }
    }

    fn tool_call() -> Part {
        Part::ToolCall { index: 2, call_id: "c".into(), name: "t".into(), arguments: "{}".into(), raw: None }
    }

    #[test]
    fn refusals_count_unless_there_are_calls() {
        let code = |parts, finish| unusable(&response(parts, finish)).map(|error| error.code);
        let refused = Some(RunErrorCode::ModelRefusal);
        assert_eq!(code(vec![refusal()], Finish::Stop), refused);
        assert_eq!(code(vec![text("But"), refusal()], Finish::Stop), refused);
        assert_eq!(code(vec![refusal(), tool_call()], Finish::Stop), None);
    }

    #[test]
    fn an_empty_message_fails_by_its_finish() {
        let code = |parts, finish| unusable(&response(parts, finish)).map(|error| error.code);
        assert_eq!(code(vec![], Finish::Stop), None);
        assert_eq!(code(vec![text("")], Finish::Length), Some(RunErrorCode::ModelBehavior));
        assert_eq!(code(vec![], Finish::ContentFilter), Some(RunErrorCode::ModelRefusal));
        assert_eq!(code(vec![text("Half")], Finish::Length), None);
        assert_eq!(code(vec![text("Half")], Finish::ContentFilter), None);
        assert_eq!(code(vec![tool_call()], Finish::Length), None);
    }
}
