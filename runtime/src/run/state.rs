//! Where a run stands, folded from its items: the same for a run that lives and for one that is taken up again.

use std::collections::{HashMap, HashSet};

use uuid::Uuid;

use super::texts;
use crate::item::{self, Body, InputItem, Item, Role, RunErrorCode, Step};
use crate::spec::{AgentSpec, Handoff, RunSpec, Tool, ToolUseBehavior, WebhookTool};

/// A run between two steps.
#[derive(Debug)]
pub struct State<'a> {
    spec: &'a RunSpec,
    /// Who is at work.
    agent: &'a AgentSpec,
    /// The user's message.
    input: Vec<Step>,
    turns: Vec<Turn<'a>>,
    /// Agents that have called any tool or handoff.
    tool_users: HashSet<Uuid>,
    used_call_ids: HashSet<String>,
    next_sequence: i64,
    /// The limit is the first agent's, whoever works now.
    max_turns: u32,
    ended: bool,
}

/// A turn whose response is stored.
#[derive(Debug)]
struct Turn<'a> {
    number: u32,
    agent: &'a AgentSpec,
    /// The response's items.
    response: Vec<Step>,
    /// Its calls, in its order.
    calls: Vec<Call<'a>>,
    /// Outputs by call id, however they came.
    outputs: HashMap<String, Step>,
}

/// A call of a response.
#[derive(Clone, Debug)]
pub struct Call<'a> {
    /// Unique in the run.
    pub id: String,
    /// The name the model called.
    pub name: String,
    /// The arguments as the model wrote them.
    pub arguments: String,
    /// Its place among the response's calls, from 0.
    pub position: usize,
    /// What answers it.
    pub target: Target<'a>,
}

/// What answers a call.
#[derive(Clone, Copy, Debug)]
pub enum Target<'a> {
    /// A webhook.
    Tool(&'a WebhookTool),
    /// An agent that is to take over.
    Handoff(&'a AgentSpec),
    /// Nothing: the agent has no such tool.
    Missing,
}

/// What a run needs next.
#[derive(Debug)]
pub enum Next<'a> {
    /// Webhooks of this turn are to be called.
    CallTools(u32, Vec<Call<'a>>),
    /// Calls are to be answered that need no webhook: one append.
    Append(Vec<Step>),
    /// The model is to be asked for this turn.
    AskModel(u32),
    /// The run succeeds with this output.
    Succeed(String),
    /// The run fails.
    Fail(RunErrorCode, String),
    /// Nothing: the run has ended.
    Nothing,
}

impl<'a> State<'a> {
    /// The state that a journal tells of; none when the spec has no root agent.
    pub fn rebuild(spec: &'a RunSpec, items: Vec<Item>) -> Option<Self> {
        let root = spec.agents.get(&spec.root)?;
        let mut state = State {
            spec,
            agent: root,
            input: Vec::new(),
            turns: Vec::new(),
            tool_users: HashSet::new(),
            used_call_ids: HashSet::new(),
            next_sequence: 1,
            max_turns: root.max_turns,
            ended: false,
        };
        for item in items {
            state.fold(item.step);
        }
        Some(state)
    }

    /// Takes in the journal's next item.
    pub fn fold(&mut self, step: Step) {
        self.next_sequence += 1;
        match &step.body {
            Body::Message { role: Role::User, .. } => self.input.push(step),
            Body::Message { role: Role::Assistant, .. } | Body::Reasoning { .. } | Body::Usage { .. } => {
                self.fold_response(step);
            }
            Body::ToolCall { call_id, name, arguments, .. } => {
                let (id, name, arguments) = (call_id.clone(), name.clone(), arguments.clone());
                self.tool_users.insert(self.agent.id);
                self.used_call_ids.insert(id.clone());
                let target = target(self.spec, self.agent, &name);
                if let Some(turn) = self.fold_response(step) {
                    let position = turn.calls.len();
                    turn.calls.push(Call { id, name, arguments, position, target });
                }
            }
            Body::ToolOutput { call_id, .. } => {
                let call_id = call_id.clone();
                self.fold_output(call_id, step);
            }
            Body::Handoff { call_id, to_agent_id, .. } => {
                let call_id = call_id.clone();
                self.agent = self.spec.agents.get(to_agent_id).unwrap_or(self.agent);
                self.fold_output(call_id, step);
            }
            Body::Approval { .. } | Body::Guardrail { .. } => {}
            // A pause or a resumption changes nothing here: the run goes on where it was.
            Body::Status { status, error, .. } => {
                self.ended |= status.is_terminal();
                if error.as_ref().is_some_and(|error| is_of_response(error.code)) {
                    self.forget_failed_response();
                }
            }
        }
    }

    /// Adds to the response of the item's turn, and gives that turn.
    fn fold_response(&mut self, step: Step) -> Option<&mut Turn<'a>> {
        let number = step.turn?;
        if self.turns.last().is_none_or(|turn| turn.number != number) {
            self.turns.push(Turn {
                number,
                agent: self.agent,
                response: Vec::new(),
                calls: Vec::new(),
                outputs: HashMap::new(),
            });
        }
        let turn = self.turns.last_mut()?;
        turn.response.push(step);
        Some(turn)
    }

    fn fold_output(&mut self, call_id: String, step: Step) {
        if let Some(turn) = self.turns.last_mut() {
            turn.outputs.insert(call_id, step);
        }
    }

    /// A response that ended the run as failed is no part of what later runs are shown. Beside calls none does.
    fn forget_failed_response(&mut self) {
        if self.turns.last().is_some_and(|turn| turn.calls.is_empty()) {
            self.turns.pop();
        }
    }

    /// Who is at work.
    pub fn agent(&self) -> &'a AgentSpec {
        self.agent
    }

    /// Whether the agent has called any tool or handoff in this run.
    pub fn has_used_tools(&self, agent: &AgentSpec) -> bool {
        self.tool_users.contains(&agent.id)
    }

    /// Call ids the run has used.
    pub fn used_call_ids(&self) -> &HashSet<String> {
        &self.used_call_ids
    }

    /// The sequence that the next item will have.
    pub fn next_sequence(&self) -> i64 {
        self.next_sequence
    }

    /// What the model is shown of this run.
    pub fn transcript(&self) -> Vec<InputItem> {
        let steps: Vec<&Step> = self.input.iter().chain(self.turns.iter().flat_map(Turn::steps)).collect();
        item::transcript(steps.iter().copied())
    }

    /// What the run needs next.
    pub fn next(&self) -> Next<'a> {
        if self.ended {
            return Next::Nothing;
        }
        let Some(turn) = self.turns.last() else { return self.ask(1) };
        let tools: Vec<Call<'a>> = turn.open_calls().filter(|call| call.is_tool()).cloned().collect();
        if !tools.is_empty() {
            return Next::CallTools(turn.number, tools);
        }
        let answers = turn.answers();
        if !answers.is_empty() {
            return Next::Append(answers);
        }
        if turn.was_handed_off() {
            return self.ask(turn.number + 1);
        }
        match turn.output_of_tools().or_else(|| turn.calls.is_empty().then(|| turn.text())) {
            Some(output) => Next::Succeed(output),
            None => self.ask(turn.number + 1),
        }
    }

    fn ask(&self, turn: u32) -> Next<'a> {
        if turn > self.max_turns {
            return Next::Fail(RunErrorCode::MaxTurns, format!("Max turns ({}) exceeded", self.max_turns));
        }
        Next::AskModel(turn)
    }

    /// The last items of a run whose time is over: each open call is answered, so that the history has no orphan.
    pub fn time_out(&self) -> Vec<Step> {
        let cut_off = self.turns.last().into_iter().flat_map(|turn| {
            turn.open_calls().map(|call| turn.step(Body::output(&call.id, texts::cut_off(&call.name), true)))
        });
        let failed = Body::failed(RunErrorCode::Timeout, "The run took longer than it may.");
        cut_off.chain([self.step(failed)]).collect()
    }

    /// An item outside a turn.
    pub fn step(&self, body: Body) -> Step {
        Step { agent_name: self.agent.name.clone(), turn: None, scope: None, body }
    }

    /// A webhook's output, in the turn that called it.
    pub fn tool_output(&self, turn: u32, call_id: &str, output: String, is_error: bool) -> Step {
        Step {
            agent_name: self.agent.name.clone(),
            turn: Some(turn),
            scope: None,
            body: Body::output(call_id, output, is_error),
        }
    }
}

impl<'a> Turn<'a> {
    /// The turn's items as the model is shown them: the response, the tools' outputs in call order, those of missing
    /// tools, the ignored handoffs, the one that happened.
    fn steps(&self) -> impl Iterator<Item = &Step> {
        let mut outputs: Vec<(u8, usize, &Step)> = self
            .calls
            .iter()
            .filter_map(|call| {
                let output = self.outputs.get(&call.id)?;
                let rank = match (&output.body, call.target) {
                    (Body::Handoff { .. }, _) => 3,
                    (_, Target::Tool(_)) => 0,
                    (_, Target::Missing) => 1,
                    (_, Target::Handoff(_)) => 2,
                };
                Some((rank, call.position, output))
            })
            .collect();
        outputs.sort_by_key(|(rank, position, _)| (*rank, *position));
        self.response.iter().chain(outputs.into_iter().map(|(_, _, output)| output))
    }

    /// Calls without an output.
    fn open_calls(&self) -> impl Iterator<Item = &Call<'a>> {
        self.calls.iter().filter(|call| !self.outputs.contains_key(&call.id))
    }

    /// The answers still owed to calls that no webhook answers. The first handoff happens, and stands last.
    fn answers(&self) -> Vec<Step> {
        let mut missing = Vec::new();
        let mut ignored = Vec::new();
        let mut happening = None;
        let mut taken = self.was_handed_off();
        for call in self.open_calls() {
            match call.target {
                Target::Tool(_) => {}
                Target::Missing => missing.push(Body::output(&call.id, texts::not_found(&call.name), true)),
                Target::Handoff(_) if taken => ignored.push(Body::output(&call.id, texts::HANDOFF_IGNORED, true)),
                Target::Handoff(to) => {
                    taken = true;
                    happening = Some(Body::Handoff {
                        call_id: call.id.clone(),
                        output: texts::handoff(&to.name),
                        to_agent_id: to.id,
                        to_agent_name: to.name.clone(),
                    });
                }
            }
        }
        missing.into_iter().chain(ignored).chain(happening).map(|body| self.step(body)).collect()
    }

    fn was_handed_off(&self) -> bool {
        self.outputs.values().any(|output| matches!(output.body, Body::Handoff { .. }))
    }

    /// The output that ends the run by the agent's tool-use behaviour. Only real tools count.
    fn output_of_tools(&self) -> Option<String> {
        let stops = |call: &&Call<'_>| match self.agent.tool_use_behavior {
            ToolUseBehavior::RunLlmAgain => false,
            ToolUseBehavior::StopOnFirstTool => true,
            ToolUseBehavior::StopAtTools => self.agent.stop_at_tools.contains(&call.name),
        };
        let call = self.calls.iter().filter(|call| call.is_tool()).find(stops)?;
        match &self.outputs.get(&call.id)?.body {
            Body::ToolOutput { output, .. } => Some(output.clone()),
            _ => None,
        }
    }

    /// The last message's text; empty if there is none.
    fn text(&self) -> String {
        let mut texts = self.response.iter().rev().filter_map(|step| match &step.body {
            Body::Message { text, .. } => Some(text),
            _ => None,
        });
        texts.next().cloned().unwrap_or_default()
    }

    fn step(&self, body: Body) -> Step {
        Step { agent_name: self.agent.name.clone(), turn: Some(self.number), scope: None, body }
    }
}

impl Call<'_> {
    fn is_tool(&self) -> bool {
        matches!(self.target, Target::Tool(_))
    }
}

/// The agent's handoffs with the agents they lead to, in the order they are offered.
pub fn handoffs<'a>(spec: &'a RunSpec, agent: &'a AgentSpec) -> impl Iterator<Item = (&'a Handoff, &'a AgentSpec)> {
    agent.handoffs.iter().filter_map(|handoff| Some((handoff, spec.agents.get(&handoff.agent_id)?)))
}

/// Whether a failure is that of the last response.
fn is_of_response(code: RunErrorCode) -> bool {
    matches!(code, RunErrorCode::ModelBehavior | RunErrorCode::ModelRefusal)
}

fn target<'a>(spec: &'a RunSpec, agent: &'a AgentSpec, name: &str) -> Target<'a> {
    if let Some((_, to)) = handoffs(spec, agent).find(|(handoff, _)| handoff.tool_name == name) {
        return Target::Handoff(to);
    }
    let tools = agent.tools.iter().filter_map(|tool| match tool {
        Tool::Webhook(tool) => Some(tool),
        _ => None,
    });
    tools.into_iter().find(|tool| tool.name == name).map_or(Target::Missing, Target::Tool)
}
