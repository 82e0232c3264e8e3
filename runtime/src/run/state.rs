//! Where a run stands, folded from its items: the same for a run that lives and for one that is taken up again, and for
//! a nested run as for the run itself.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use uuid::Uuid;

use super::checks::Tripped;
use super::nest_history::{last_n, nest, remove_tools};
use super::texts;
use super::toolbox::{Target, Toolbox};
use super::turn::{Call, Output, Turn};
use crate::item::{Body, InputItem, Role, RunError, RunErrorCode, RunStatus, Step};
use crate::spec::{AgentSpec, Agents, Guardrail, GuardrailStage, HandoffFilter};

/// A run, or a nested run, between two steps.
#[derive(Debug)]
pub struct State {
    agents: Arc<Agents>,
    /// None for the run itself.
    scope: Option<String>,
    /// Who is at work.
    agent: Arc<AgentSpec>,
    /// What was there before: the history and the input, or what a handoff's filter made of all there was.
    before: Vec<InputItem>,
    /// What a handoff's filter left of the turns until then.
    left: Vec<InputItem>,
    /// What the user said in the run.
    input: Vec<InputItem>,
    turns: Vec<Turn>,
    /// The first turn that no handoff has filtered.
    unfiltered: usize,
    /// Agents that have called any tool or handoff.
    tool_users: HashSet<Uuid>,
    /// Calls whose approval was asked for.
    asked: HashSet<String>,
    decisions: HashMap<String, Decision>,
    /// How often the run has waited for decisions.
    pauses: usize,
    /// Decisions about all calls of an agent's tool.
    standing: HashMap<(Uuid, String), Decision>,
    /// The limit is the first agent's, whoever works now.
    max_turns: u32,
    /// The guardrail that ended the run.
    trip: Option<Tripped>,
    /// What later runs are shown of a turn whose output was withheld.
    withheld: Vec<InputItem>,
    failure: Option<RunError>,
    ended: bool,
}

/// What somebody decided about a call.
#[derive(Clone, Debug)]
pub struct Decision {
    approved: bool,
    message: Option<String>,
}

/// Whether a call may be made.
enum Permission {
    Granted,
    /// With what the model is told.
    Denied(String),
    /// Somebody is to be asked.
    Unasked,
    /// Somebody was asked.
    Pending,
}

/// What a run needs next.
#[derive(Debug)]
pub enum Next {
    /// Tools of this turn are to be called.
    CallTools(u32, Vec<Call>),
    /// Items are to be stored that need no work: one append.
    Append(Vec<Step>),
    /// The model is to be asked for this turn.
    AskModel(u32),
    /// This is the output, if it is what the agent's must be.
    Finish(Candidate),
    /// The run fails.
    Fail(RunError),
    /// Calls wait for a decision.
    Wait,
    /// Nothing: the run has ended.
    Nothing,
}

/// An output that was not looked at yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The agent whose output it is.
    pub agent_id: Uuid,
    /// The text.
    pub text: String,
    /// Whether it is a tool's output, by the agent's tool-use behaviour.
    pub is_from_tool: bool,
}

impl State {
    /// A run in which nothing has happened. None if `root` is none of the agents.
    pub fn new(
        agents: Arc<Agents>,
        root: Uuid,
        scope: Option<String>,
        max_turns: Option<u32>,
        before: Vec<InputItem>,
    ) -> Option<Self> {
        let agent = agents.get(&root)?.clone();
        Some(State {
            max_turns: max_turns.unwrap_or(agent.max_turns),
            agents,
            scope,
            agent,
            before,
            left: Vec::new(),
            input: Vec::new(),
            withheld: Vec::new(),
            turns: Vec::new(),
            unfiltered: 0,
            tool_users: HashSet::new(),
            asked: HashSet::new(),
            decisions: HashMap::new(),
            pauses: 0,
            standing: HashMap::new(),
            trip: None,
            failure: None,
            ended: false,
        })
    }

    /// Says how often the run has waited, which only its own items tell.
    pub fn waited(&mut self, pauses: usize) {
        self.pauses = pauses;
    }

    /// Takes in the next item of its scope.
    pub fn fold(&mut self, step: Step) {
        match &step.body {
            Body::Message { role: Role::User, text, .. } => {
                self.before.push(InputItem::User { text: text.clone() });
                self.input.push(InputItem::User { text: text.clone() });
            }
            Body::Message { role: Role::Assistant, .. } | Body::Reasoning { .. } => drop(self.fold_response(step)),
            Body::Usage { failure, .. } => {
                if failure.is_some() {
                    self.failure.clone_from(failure);
                }
                self.fold_response(step);
            }
            Body::ToolCall { is_hosted: true, .. } => {
                self.tool_users.insert(self.agent.id);
                if let Some(turn) = self.fold_response(step) {
                    turn.has_hosted_calls = true;
                }
            }
            Body::ToolCall { call_id, name, arguments, .. } => {
                let (id, name, arguments) = (call_id.clone(), name.clone(), arguments.clone());
                self.tool_users.insert(self.agent.id);
                if let Some(turn) = self.fold_response(step) {
                    let position = turn.calls.len();
                    turn.calls.push(Call { id, name, arguments, position });
                }
            }
            Body::ToolOutput { call_id, .. } => {
                let call_id = call_id.clone();
                self.fold_output(call_id, step);
            }
            Body::Handoff { call_id, to_agent_id, .. } => {
                let (call_id, to) = (call_id.clone(), *to_agent_id);
                self.fold_output(call_id.clone(), step);
                self.hand_off(&call_id, to);
            }
            Body::Approval { call_id, approved, always, message } => match approved {
                None => drop(self.asked.insert(call_id.clone())),
                Some(approved) => {
                    self.decide(call_id.clone(), Decision { approved: *approved, message: message.clone() }, *always);
                }
            },
            Body::Guardrail { name, stage, .. } if !self.ends_run(name, *stage) => {}
            Body::Guardrail { name, stage, reason, .. } => {
                self.trip = Some(Tripped { name: name.clone(), stage: *stage, reason: reason.clone() });
            }
            // A pause or a resumption changes nothing here: the run goes on where it was.
            Body::Status { status, error, .. } => {
                self.ended |= status.is_terminal();
                self.pauses += usize::from(*status == RunStatus::WaitingApproval);
                if error.as_ref().is_some_and(|error| is_of_response(error.code)) {
                    self.forget_failed_response();
                }
            }
        }
    }

    /// Whether a guardrail's trip ends the run. At the tool stages that is the agent's to say.
    fn ends_run(&self, name: &str, stage: GuardrailStage) -> bool {
        let is_meant = |guardrail: &&Guardrail| guardrail.name == name && guardrail.stage == stage;
        match stage {
            GuardrailStage::Input | GuardrailStage::Output => true,
            GuardrailStage::ToolInput | GuardrailStage::ToolOutput => {
                self.caller().guardrails.iter().find(is_meant).is_none_or(|guardrail| guardrail.ends_run)
            }
        }
    }

    /// Adds to the response of the item's turn, and gives that turn.
    fn fold_response(&mut self, step: Step) -> Option<&mut Turn> {
        let number = step.turn?;
        if self.turns.last().is_none_or(|turn| turn.number != number) {
            self.turns.push(Turn::new(number, self.agent.clone()));
        }
        let turn = self.turns.last_mut()?;
        turn.response.push(step);
        Some(turn)
    }

    fn fold_output(&mut self, call_id: String, step: Step) {
        let pass = self.pauses;
        if let Some(turn) = self.turns.last_mut() {
            turn.outputs.insert(call_id, Output { pass, step });
        }
    }

    fn hand_off(&mut self, call_id: &str, to: Uuid) {
        let called = self.turns.last().and_then(|turn| turn.calls.iter().find(|call| call.id == call_id));
        let handoff = called.and_then(|call| {
            self.agent.handoffs.iter().find(|handoff| handoff.tool_name == call.name && handoff.agent_id == to)
        });
        let (filter, nests) =
            handoff.map_or((HandoffFilter::None, false), |handoff| (handoff.filter, handoff.nest_history));
        match filter {
            HandoffFilter::None if nests => {
                let earlier = self.turns.len().saturating_sub(1);
                let turn = self.turns.last().map(Turn::transcript).unwrap_or_default();
                self.before = nest(&self.before, &self.since(earlier), &turn);
                self.left.clear();
            }
            HandoffFilter::None => {}
            HandoffFilter::RemoveTools => {
                self.left = remove_tools(&self.since(self.turns.len()));
                self.before = remove_tools(&self.before);
                if let Some(turn) = self.turns.last_mut() {
                    turn.is_filtered = true;
                }
            }
            HandoffFilter::LastN(count) => {
                self.before = last_n(&self.view(), usize::try_from(count).unwrap_or(usize::MAX));
                self.left.clear();
            }
        }
        if nests || filter != HandoffFilter::None {
            self.unfiltered = self.turns.len();
        }
        if let Some(agent) = self.agents.get(&to) {
            self.agent = agent.clone();
        }
    }

    fn decide(&mut self, call_id: String, decision: Decision, always: bool) {
        let called = self
            .turns
            .last()
            .and_then(|turn| Some((turn.agent.id, turn.calls.iter().find(|call| call.id == call_id)?)));
        if always && let Some((agent_id, call)) = called {
            self.standing.insert((agent_id, call.name.clone()), decision.clone());
        }
        self.decisions.insert(call_id, decision);
    }

    /// A response that ended the run as failed is no part of what later runs are shown.
    fn forget_failed_response(&mut self) {
        match &self.trip {
            Some(Tripped { stage: GuardrailStage::Input, .. }) => self.turns.clear(),
            Some(Tripped { stage: GuardrailStage::Output, .. }) => {
                self.withheld = self.turns.pop().map(|mut turn| turn.withheld()).unwrap_or_default();
            }
            Some(_) => {
                if let Some(turn) = self.turns.last_mut() {
                    turn.keep_what_tools_did();
                }
            }
            // Beside calls none fails.
            None if self.turns.last().is_some_and(|turn| turn.calls.is_empty()) => drop(self.turns.pop()),
            None => {}
        }
    }

    /// Who is at work.
    pub fn agent(&self) -> &Arc<AgentSpec> {
        &self.agent
    }

    /// Whose tools the calls of the last response are.
    pub fn caller(&self) -> &Arc<AgentSpec> {
        self.turns.last().map_or(&self.agent, |turn| &turn.agent)
    }

    /// Whether the agent at work has called any tool or handoff in this run.
    pub fn has_used_tools(&self) -> bool {
        self.tool_users.contains(&self.agent.id)
    }

    /// Whether nothing was done yet about the first response: what runs beside it has to be waited for.
    pub fn is_at_first_response(&self) -> bool {
        let untouched =
            |turn: &Turn| turn.outputs.is_empty() && turn.calls.iter().all(|call| !self.asked.contains(&call.id));
        matches!(self.turns.as_slice(), [turn] if turn.number == 1 && untouched(turn))
    }

    /// Whether no response is stored.
    pub fn is_new(&self) -> bool {
        self.turns.is_empty()
    }

    /// Whether the run has ended.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// What the turns before `end` added.
    fn since(&self, end: usize) -> Vec<InputItem> {
        let turns = self.turns.iter().take(end).skip(self.unfiltered).flat_map(Turn::transcript);
        self.left.iter().cloned().chain(turns).collect()
    }

    /// What the model is shown.
    pub fn view(&self) -> Vec<InputItem> {
        let mut view = self.before.clone();
        view.extend(self.since(self.turns.len()));
        view
    }

    /// What a run that goes on from this one is shown of it, the handoffs' filters apart, which are for one agent: each
    /// turn for itself, after the input.
    pub fn transcript(self) -> Vec<Vec<InputItem>> {
        let turns = self.turns.iter().map(|turn| match turn.is_filtered {
            true => remove_tools(&turn.transcript()),
            false => turn.transcript(),
        });
        let parts = std::iter::once(self.input.clone()).chain(turns).chain([self.withheld.clone()]);
        parts.filter(|part| !part.is_empty()).collect()
    }

    /// What the run needs next. `toolbox` is [`State::caller`]'s; `waiting` are agent tools whose runs wait for a
    /// decision.
    pub fn next(&self, toolbox: &Toolbox, waiting: &HashSet<String>) -> Next {
        if self.ended {
            return Next::Nothing;
        }
        if let Some(trip) = &self.trip {
            return Next::Fail(trip.error());
        }
        if let Some(failure) = &self.failure {
            return Next::Fail(failure.clone());
        }
        let Some(turn) = self.turns.last() else { return self.ask(1) };
        let mut granted = Vec::new();
        let mut denied = Vec::new();
        let mut unasked = Vec::new();
        let mut is_waiting = false;
        for call in turn.open_calls() {
            let target = toolbox.target(&call.name);
            if !target.is_tool() {
                continue;
            }
            match self.permission(turn, call, target) {
                Permission::Granted if waiting.contains(&call.id) => is_waiting = true,
                Permission::Granted => granted.push(call.clone()),
                Permission::Denied(message) => denied.push(Body::output(&call.id, message, true)),
                Permission::Unasked => unasked.push(ask_for(&call.id)),
                Permission::Pending => is_waiting = true,
            }
        }
        if !denied.is_empty() {
            return Next::Append(self.steps_of(turn, denied));
        }
        if !granted.is_empty() {
            return Next::CallTools(turn.number, granted);
        }
        let mut owed = turn.missing(toolbox);
        is_waiting |= !unasked.is_empty();
        match is_waiting {
            true => owed.extend(unasked),
            false => owed.extend(turn.handoffs(toolbox)),
        }
        if !owed.is_empty() {
            return Next::Append(self.steps_of(turn, owed));
        }
        if is_waiting {
            return Next::Wait;
        }
        self.after_tools(turn, toolbox)
    }

    fn after_tools(&self, turn: &Turn, toolbox: &Toolbox) -> Next {
        if turn.was_handed_off() {
            return self.ask(turn.number + 1);
        }
        let candidate =
            |text: String, is_from_tool| Next::Finish(Candidate { agent_id: turn.agent.id, text, is_from_tool });
        if let Some(output) = turn.output_of_tools(toolbox) {
            return candidate(output, true);
        }
        let text = turn.text();
        let must_go_on = !turn.calls.is_empty()
            // Hosted calls alone are no answer; nor is no text where a value is due.
            || (turn.has_hosted_calls && text.is_none())
            || (turn.agent.output.is_some() && text.is_none_or(str::is_empty));
        if must_go_on {
            return self.ask(turn.number + 1);
        }
        candidate(text.unwrap_or_default().to_owned(), false)
    }

    fn permission(&self, turn: &Turn, call: &Call, target: &Target) -> Permission {
        if !target.needs_approval() {
            return Permission::Granted;
        }
        let standing = || self.standing.get(&(turn.agent.id, call.name.clone()));
        match self.decisions.get(&call.id).or_else(standing) {
            Some(Decision { approved: true, .. }) => Permission::Granted,
            Some(Decision { message, .. }) => {
                Permission::Denied(message.clone().unwrap_or_else(|| texts::NOT_APPROVED.to_owned()))
            }
            None if self.asked.contains(&call.id) => Permission::Pending,
            None => Permission::Unasked,
        }
    }

    /// The calls that wait for a decision, in their order.
    pub fn pending(&self) -> impl Iterator<Item = &str> {
        let has_ended = self.ended || self.trip.is_some() || self.failure.is_some();
        let turn = self.turns.last().filter(|_| !has_ended);
        turn.into_iter().flat_map(|turn| {
            let undecided = |call: &&Call| {
                self.asked.contains(&call.id)
                    && !self.decisions.contains_key(&call.id)
                    && !self.standing.contains_key(&(turn.agent.id, call.name.clone()))
            };
            turn.open_calls().filter(undecided).map(|call| call.id.as_str())
        })
    }

    fn ask(&self, turn: u32) -> Next {
        if turn > self.max_turns {
            let message = format!("Max turns ({}) exceeded", self.max_turns);
            return Next::Fail(RunError { code: RunErrorCode::MaxTurns, message });
        }
        Next::AskModel(turn)
    }

    /// The last items of a run that is cut: each open call is answered, so that the history has no orphan.
    pub fn cut(&self, error: RunError) -> Vec<Step> {
        let cut_off = self.turns.last().into_iter().flat_map(|turn| {
            let is_over = error.code == RunErrorCode::Timeout;
            let outputs =
                turn.open_calls().map(|call| Body::output(&call.id, texts::cut_off(&call.name, is_over), true));
            self.steps_of(turn, outputs.collect())
        });
        cut_off.chain([self.step(Body::failed(error.code, error.message))]).collect()
    }

    /// The last text that was said in the run.
    pub fn last_words(&self) -> Option<String> {
        self.turns.iter().rev().find_map(Turn::last_words)
    }

    /// An item outside a turn.
    pub fn step(&self, body: Body) -> Step {
        Step { agent_name: self.agent.name.clone(), turn: None, scope: self.scope.clone(), body }
    }

    /// Items of the last turn.
    pub fn steps_of_last(&self, bodies: Vec<Body>) -> Vec<Step> {
        match self.turns.last() {
            Some(turn) => self.steps_of(turn, bodies),
            None => bodies.into_iter().map(|body| self.step(body)).collect(),
        }
    }

    fn steps_of(&self, turn: &Turn, bodies: Vec<Body>) -> Vec<Step> {
        let step = |body| Step {
            agent_name: turn.agent.name.clone(),
            turn: Some(turn.number),
            scope: self.scope.clone(),
            body,
        };
        bodies.into_iter().map(step).collect()
    }
}

fn ask_for(call_id: &str) -> Body {
    Body::Approval { call_id: call_id.to_owned(), approved: None, always: false, message: None }
}

/// Whether a failure is that of the last response.
fn is_of_response(code: RunErrorCode) -> bool {
    matches!(code, RunErrorCode::ModelBehavior | RunErrorCode::ModelRefusal | RunErrorCode::Guardrail)
}
