//! A turn whose response is stored: its calls, who answers them, and the order in which the model is shown the outputs.

use std::collections::HashMap;
use std::sync::Arc;

use super::texts;
use super::toolbox::{Target, Toolbox};
use crate::item::{self, Body, InputItem, Step};
use crate::spec::{AgentSpec, ToolUseBehavior};

/// A turn whose response is stored.
#[derive(Debug)]
pub struct Turn {
    /// From 1.
    pub number: u32,
    /// Whose turn it was.
    pub agent: Arc<AgentSpec>,
    /// The response's items.
    pub response: Vec<Step>,
    /// Its calls, in its order, without those that the provider answered itself.
    pub calls: Vec<Call>,
    /// Whether the provider ran tools of its own.
    pub has_hosted_calls: bool,
    /// Outputs by call id, however they came.
    pub outputs: HashMap<String, Output>,
    /// Whether a handoff of it filtered what there was, this turn's items included.
    pub is_filtered: bool,
}

/// An answer to a call.
#[derive(Debug)]
pub struct Output {
    /// How often the run had waited for decisions before.
    pub pass: usize,
    /// The item.
    pub step: Step,
}

/// A call of a response.
#[derive(Clone, Debug)]
pub struct Call {
    /// Unique in the run.
    pub id: String,
    /// The name the model called.
    pub name: String,
    /// The arguments as the model wrote them.
    pub arguments: String,
    /// Its place among the response's calls, from 0.
    pub position: usize,
}

impl Turn {
    /// A turn of which nothing is stored yet.
    pub fn new(number: u32, agent: Arc<AgentSpec>) -> Self {
        Self {
            number,
            agent,
            response: Vec::new(),
            calls: Vec::new(),
            has_hosted_calls: false,
            outputs: HashMap::new(),
            is_filtered: false,
        }
    }

    /// The turn's items as the model is shown them: the response, the tools' outputs in call order, those of missing
    /// tools, the ignored handoffs, the one that happened. Outputs that waited for a decision stand behind those that
    /// didn't.
    pub fn steps(&self) -> impl Iterator<Item = &Step> + Clone {
        let mut outputs: Vec<(usize, u8, usize, &Step)> = self
            .calls
            .iter()
            .filter_map(|call| {
                let Output { pass, step } = self.outputs.get(&call.id)?;
                Some((*pass, self.rank(call, step), call.position, step))
            })
            .collect();
        outputs.sort_by_key(|(pass, rank, position, _)| (*pass, *rank, *position));
        self.response.iter().chain(outputs.into_iter().map(|(_, _, _, output)| output))
    }

    /// Told from what is stored, since a server's list of tools may have changed since.
    fn rank(&self, call: &Call, output: &Step) -> u8 {
        match &output.body {
            Body::Handoff { .. } => 3,
            _ if self.agent.handoffs.iter().any(|handoff| handoff.tool_name == call.name) => 2,
            Body::ToolOutput { output, is_error: true, .. } if *output == texts::not_found(&call.name) => 1,
            _ => 0,
        }
    }

    /// What the model is shown of the turn.
    pub fn transcript(&self) -> Vec<InputItem> {
        item::transcript(self.steps())
    }

    /// What a later run is shown of it when an output guardrail withheld its output: the calls that tools answered,
    /// their outputs replaced; nothing where that can't be told without what was withheld.
    pub fn withheld(&mut self) -> Vec<InputItem> {
        if self.outputs.is_empty() || self.response.iter().any(|step| matches!(step.body, Body::Reasoning { .. })) {
            return Vec::new();
        }
        self.response.retain(|step| !matches!(step.body, Body::Message { .. }));
        for Output { step, .. } in self.outputs.values_mut() {
            if let Body::ToolOutput { output, parts, .. } = &mut step.body {
                parts.clear();
                *output = texts::WITHHELD.to_owned();
            }
        }
        self.transcript()
    }

    /// Drops from the response of a run that a tool's guardrail ended all but the calls that have an output, with the
    /// reasoning before them.
    pub fn keep_what_tools_did(&mut self) {
        let mut kept = Vec::new();
        let mut reasoning = Vec::new();
        for step in std::mem::take(&mut self.response) {
            match &step.body {
                Body::Reasoning { .. } => reasoning.push(step),
                Body::ToolCall { call_id, is_hosted, .. } if *is_hosted || self.outputs.contains_key(call_id) => {
                    kept.append(&mut reasoning);
                    kept.push(step);
                }
                _ => reasoning.clear(),
            }
        }
        self.response = kept;
    }

    /// Calls without an output.
    pub fn open_calls(&self) -> impl Iterator<Item = &Call> {
        self.calls.iter().filter(|call| !self.outputs.contains_key(&call.id))
    }

    /// The outputs owed to calls of tools that the agent doesn't have.
    pub fn missing(&self, toolbox: &Toolbox) -> Vec<Body> {
        let missing = self.open_calls().filter(|call| matches!(toolbox.target(&call.name), Target::Missing));
        missing.map(|call| Body::output(&call.id, texts::not_found(&call.name), true)).collect()
    }

    /// The outputs owed to handoffs. The first one happens, and stands last.
    pub fn handoffs(&self, toolbox: &Toolbox) -> Vec<Body> {
        let mut ignored = Vec::new();
        let mut happening = None;
        for call in self.open_calls() {
            let Target::Handoff(to) = toolbox.target(&call.name) else { continue };
            if self.was_handed_off() || happening.is_some() {
                ignored.push(Body::output(&call.id, texts::HANDOFF_IGNORED, true));
            } else {
                happening = Some(Body::Handoff {
                    call_id: call.id.clone(),
                    output: texts::handoff(&to.name),
                    to_agent_id: to.id,
                    to_agent_name: to.name.clone(),
                });
            }
        }
        ignored.into_iter().chain(happening).collect()
    }

    /// Whether another agent goes on.
    pub fn was_handed_off(&self) -> bool {
        self.outputs.values().any(|output| matches!(output.step.body, Body::Handoff { .. }))
    }

    /// The output that ends the run by the agent's tool-use behaviour. Only real tools count.
    pub fn output_of_tools(&self, toolbox: &Toolbox) -> Option<String> {
        let stops = |call: &&Call| match self.agent.tool_use_behavior {
            ToolUseBehavior::RunLlmAgain => false,
            ToolUseBehavior::StopOnFirstTool => true,
            ToolUseBehavior::StopAtTools => self.agent.stop_at_tools.contains(&call.name),
        };
        let call = self.calls.iter().filter(|call| toolbox.target(&call.name).is_tool()).find(stops)?;
        match &self.outputs.get(&call.id)?.step.body {
            Body::ToolOutput { output, .. } => Some(output.clone()),
            _ => None,
        }
    }

    /// The last message's text; none if there is no message.
    pub fn text(&self) -> Option<&str> {
        self.response.iter().rev().find_map(|step| match &step.body {
            Body::Message { text, .. } => Some(text.as_str()),
            _ => None,
        })
    }

    /// The last text that the model or a tool said in it.
    pub fn last_words(&self) -> Option<String> {
        let steps: Vec<&Step> = self.steps().collect();
        steps.into_iter().rev().find_map(|step| match &step.body {
            Body::Message { text, .. } | Body::ToolOutput { output: text, .. } if !text.is_empty() => {
                Some(text.clone())
            }
            _ => None,
        })
    }
}
