//! The loop of one run, or of one nested in it: what [`State`] says is needed next is done and written down, until
//! nothing is left to do. One that another worker left off is no special case: its items are folded, and the loop goes
//! on.

use std::collections::HashSet;
use std::mem;
use std::pin::pin;
use std::sync::Arc;

use futures_util::StreamExt;
use serde_json::Value;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::Outcome;
use super::checks::{self, Tripped};
use super::deltas::Deltas;
use super::request;
use super::state::{Candidate, Next, State};
use super::tools::{self, Answer};
use super::turn::Call;
use super::world::{Halt, World};
use crate::item::{Body, InputItem, RunError, RunErrorCode, RunStatus, Step, arguments_hash, storable_json};
use crate::journal::{Addition, Progress};
use crate::model::{ModelCall, ModelError, ModelEvent, ModelResponse};
use crate::recorder::TurnRecorder;
use crate::spec::GuardrailStage;

/// How deep nested runs may lie: an agent may be its own tool.
const MAX_DEPTH: usize = 8;

/// Where a flow belongs.
#[derive(Clone, Debug, Default)]
pub struct Place {
    /// The path of its items; none for the run itself.
    pub scope: Option<String>,
    /// What the places of its tools' calls begin with, as `3.0/`.
    pub prefix: String,
    /// Nested runs around it.
    pub depth: usize,
}

impl Place {
    /// The place of what a call does, by a way of its own.
    pub fn of_call(&self, turn: u32, call: &Call) -> Self {
        let place = format!("{}{turn}.{}/", self.prefix, call.position);
        Self { scope: Some(self.scoped(&call.id)), prefix: place, depth: self.depth + 1 }
    }

    /// The place of an agent that a guardrail asks.
    pub fn of_guardrail(&self, stage: &str, name: &str, of_text: &str) -> Self {
        let way = format!("guardrail:{stage}:{}:{of_text}", name.replace('/', "_"));
        // It goes into headers: no name does.
        let place = format!("{}{}/", self.prefix, &arguments_hash(&way)[..16]);
        Self { prefix: place, scope: Some(self.scoped(&way)), depth: self.depth + 1 }
    }

    /// Whether nothing may be nested here any more.
    pub fn is_too_deep(&self) -> bool {
        self.depth > MAX_DEPTH
    }

    fn scoped(&self, way: &str) -> String {
        self.scope.as_ref().map_or_else(|| way.to_owned(), |scope| format!("{scope}/{way}"))
    }
}

/// How a flow came to its end.
#[derive(Clone, Debug)]
pub enum End {
    /// With an output, as text.
    Output(String),
    /// As failed.
    Failed(RunError),
    /// Calls wait for a decision.
    Waits,
}

/// A verdict that is awaited beside the first response.
type Verdict = AbortOnDropHandle<Result<Option<Tripped>, Halt>>;

/// A run, or a nested run, and all that its loop works with.
pub struct Flow {
    world: Arc<World>,
    place: Place,
    state: State,
    /// Another worker may have been at the next step before us.
    taken_over: bool,
    /// Agent tools of the last response whose runs wait for a decision.
    waiting: HashSet<String>,
    /// Of the input guardrails that run beside the first model call.
    beside: Option<Verdict>,
    /// The last outputs: taken in, and to be stored with the next model call's reservation.
    deferred: Option<Addition>,
}

impl Flow {
    /// A flow that stands where `state` does.
    pub fn new(world: Arc<World>, place: Place, state: State) -> Self {
        let taken_over = world.lease.fence > 1;
        Self { world, place, state, taken_over, waiting: HashSet::new(), beside: None, deferred: None }
    }

    /// Goes on to the end. A nested run's end is what this returns; the run's own is written down besides.
    ///
    /// # Errors
    /// The run does not go on, whatever the flow is.
    pub async fn drive(&mut self) -> Result<End, Halt> {
        let end = self.go_on().await;
        // What tools did is kept, however it ends; but for one that can't write.
        let writes = !matches!(end, Err(Halt::With(Outcome::LeaseLost | Outcome::JournalUnavailable)));
        if writes {
            self.store_deferred().await?;
        }
        end
    }

    async fn go_on(&mut self) -> Result<End, Halt> {
        if let Some(tripped) = self.check_input().await? {
            return self.trip(tripped).await;
        }
        loop {
            if let Some(end) = self.take_step().await? {
                return Ok(end);
            }
        }
    }

    /// Whether it is the run itself.
    fn is_root(&self) -> bool {
        self.place.scope.is_none()
    }

    async fn take_step(&mut self) -> Result<Option<End>, Halt> {
        let toolbox = match self.world.in_time(self.world.toolbox(self.state.caller())).await? {
            Ok(toolbox) => toolbox,
            Err(message) => return self.fail(RunError { code: RunErrorCode::Tool, message }).await,
        };
        let taken_over = mem::take(&mut self.taken_over);
        let next = self.state.next(&toolbox, &self.waiting);
        if !matches!(next, Next::AskModel(_)) {
            self.store_deferred().await?;
        }
        if !matches!(next, Next::AskModel(_) | Next::Nothing)
            && let Some(tripped) = self.verdict_beside().await?
        {
            return self.trip(tripped).await.map(Some);
        }
        match next {
            Next::CallTools(turn, calls) => self.call_tools(turn, calls).await,
            Next::Append(steps) => self.append(steps).await.map(|()| None),
            Next::AskModel(turn) => self.ask_model(turn, taken_over).await,
            Next::Finish(candidate) => self.finish(candidate).await,
            Next::Fail(error) => self.fail(error).await,
            Next::Wait => self.wait().await.map(Some),
            Next::Nothing => Err(Halt::With(Outcome::Ended)),
        }
    }

    async fn call_tools(&mut self, turn: u32, calls: Vec<Call>) -> Result<Option<End>, Halt> {
        let caller = self.state.caller().clone();
        let world = self.world.clone();
        let mut open = calls.len();
        let mut answers = pin!(tools::call_all(&self.world, &self.place, &caller, turn, calls));
        let mut halt = None;
        while let Some(batch) = world.in_time(answers.next()).await? {
            open -= Ord::min(open, batch.len());
            let mut bodies = Vec::new();
            let mut has_tripped = false;
            for answer in batch {
                match answer {
                    Answer::Output { call_id, output, parts, is_error, trip } => {
                        bodies.extend(trip.map(|trip| trip.into_body(Some(call_id.clone()))));
                        bodies.push(Body::output(call_id, output, is_error).with_parts(parts));
                    }
                    Answer::Waits { call_id } => drop(self.waiting.insert(call_id)),
                    // The others' calls are finished first: their outputs are paid for.
                    Answer::Halts(reason) => halt = halt.or(Some(reason)),
                    Answer::Trips { .. } if has_tripped => {}
                    Answer::Trips { call_id, trip } => {
                        has_tripped = true;
                        bodies.push(trip.into_body(Some(call_id)));
                    }
                }
            }
            let steps = self.state.steps_of_last(bodies);
            if open == 0 && !has_tripped && halt.is_none() && world.ports.model.stores_first() {
                self.defer(steps);
                break;
            }
            self.append(steps).await?;
            if has_tripped {
                return Ok(None);
            }
        }
        halt.map_or(Ok(None), Err)
    }

    async fn ask_model(&mut self, turn: u32, taken_over: bool) -> Result<Option<End>, Halt> {
        if Instant::now() >= self.world.deadline {
            return Err(Halt::TimeOver);
        }
        if self.world.hand_back.is_cancelled() {
            return Err(Halt::With(Outcome::HandedBack));
        }
        if taken_over && self.is_root() {
            self.world.progress(Progress::Restarted { turn }).await;
        }
        let world = self.world.clone();
        let mut place = world.free_place_for_call();
        if place.is_none() {
            self.store_deferred().await?;
            place = world.in_time(world.place_for_call()).await?;
        }
        let call = match self.model_call(turn).await? {
            Ok(call) => call,
            Err(error) => return self.fail(error).await,
        };
        let recorder = call.recorder.clone();
        let heard = self.listen(call).await?;
        drop(place);
        match heard {
            Heard::Response(..) => self.deferred_is_stored(),
            Heard::Error(ModelError::LeaseLost) => {}
            Heard::Error(_) | Heard::Trip(_) => self.store_deferred().await?,
        }
        match heard {
            Heard::Response(response, journaled) => {
                self.take_response(&recorder, &response, journaled).await?;
                Ok(None)
            }
            Heard::Trip(tripped) => self.trip(tripped).await.map(Some),
            Heard::Error(ModelError::QuotaExhausted) => Err(Halt::QuotaExhausted),
            Heard::Error(ModelError::Failed { code: code @ RunErrorCode::TokenLimit, message }) => {
                Err(Halt::Fails(RunError { code, message }))
            }
            Heard::Error(ModelError::Failed { code, message }) => self.fail(RunError { code, message }).await,
            Heard::Error(ModelError::LeaseLost) => Err(Halt::With(Outcome::LeaseLost)),
            Heard::Error(ModelError::Unavailable { reason }) => {
                tracing::warn!(turn, %reason, "the model gateway can't be reached; handing the run back");
                Err(Halt::With(Outcome::HandedBack))
            }
        }
    }

    async fn model_call(&self, turn: u32) -> Result<Result<ModelCall, RunError>, Halt> {
        let agent = self.state.agent();
        let toolbox = match self.world.in_time(self.world.toolbox(agent)).await? {
            Ok(toolbox) => toolbox,
            Err(message) => return Ok(Err(RunError { code: RunErrorCode::Tool, message })),
        };
        Ok(Ok(ModelCall {
            lease: self.world.lease,
            turn,
            agent_id: agent.id,
            agent_version: agent.version,
            first: self.deferred.clone(),
            request: request::build(&self.state, &toolbox),
            fallback_models: agent.fallback_models.clone(),
            recorder: TurnRecorder {
                turn,
                agent_name: agent.name.clone(),
                scope: self.place.scope.clone(),
                is_final: self.beside.is_none() && TurnRecorder::ends_with_text(agent),
                from_sequence: self.next_sequence(),
                used_call_ids: self.world.used_call_ids(),
            },
        }))
    }

    /// Passes on what the model streams, up to the whole response and whether it is stored already.
    async fn listen(&mut self, call: ModelCall) -> Result<Heard, Halt> {
        let is_root = self.is_root();
        let world = self.world.clone();
        let mut deltas = Deltas::new(&call.recorder);
        let mut events = world.ports.model.respond(call);
        loop {
            let event = tokio::select! {
                biased;
                tripped = verdict(&mut self.beside) => {
                    self.beside = None;
                    match tripped? {
                        Some(tripped) => return Ok(Heard::Trip(tripped)),
                        None => continue,
                    }
                }
                event = world.in_time(events.next()) => event?,
            };
            match event {
                Some(Ok(ModelEvent::Done { response, journaled })) => return Ok(Heard::Response(response, journaled)),
                Some(Ok(event)) => {
                    if is_root && let Some(progress) = deltas.of(event) {
                        world.progress(progress).await;
                    }
                }
                Some(Err(error)) => return Ok(Heard::Error(error)),
                None => {
                    let message = "The model's answer broke off without an end.".to_owned();
                    return Ok(Heard::Error(ModelError::Failed { code: RunErrorCode::Internal, message }));
                }
            }
        }
    }

    async fn take_response(
        &mut self,
        recorder: &TurnRecorder,
        response: &ModelResponse,
        journaled: bool,
    ) -> Result<(), Halt> {
        self.waiting.clear();
        let steps = recorder.steps(response);
        if !journaled {
            return self.append(steps).await;
        }
        self.fold(steps);
        Ok(())
    }

    /// What an output comes to: it must be what the agent's has to be, and pass the agent's guardrails.
    async fn finish(&mut self, candidate: Candidate) -> Result<Option<End>, Halt> {
        let Some(agent) = self.world.agents.get(&candidate.agent_id).cloned() else {
            return Err(Halt::With(Outcome::Ended));
        };
        let value = match &agent.output {
            Some(schema) if !candidate.is_from_tool => match schema.read(&candidate.text) {
                Ok(value) => Some(value),
                Err(message) => return self.fail(RunError { code: RunErrorCode::ModelBehavior, message }).await,
            },
            // The Agents SDK does not look at it either.
            Some(_) => {
                Some(serde_json::from_str(&candidate.text).unwrap_or_else(|_| Value::String(candidate.text.clone())))
            }
            None => None,
        };
        let checks = checks::together(&self.world, &self.place, &agent, GuardrailStage::Output, None, &candidate.text);
        if let Some(tripped) = self.world.in_time(checks).await?? {
            return self.trip(tripped).await.map(Some);
        }
        if !self.is_root() {
            return Ok(Some(End::Output(self.told(candidate.text, value))));
        }
        let (error, output) = (None, Some(candidate.text.clone()));
        let output_json = value.map(storable_json);
        let end = Body::Status { status: RunStatus::Succeeded, error, output, output_json };
        self.append(vec![self.state.step(end)]).await?;
        Ok(Some(End::Output(candidate.text)))
    }

    /// What a nested run's output is to whoever called it. One that ends without a word says the last that was said in
    /// it, as in the Agents SDK, unless that would go around its output guardrails.
    fn told(&self, text: String, value: Option<Value>) -> String {
        let agent = self.state.agent();
        let is_guarded = || agent.guardrails.iter().any(|guardrail| guardrail.stage == GuardrailStage::Output);
        match value {
            Some(Value::String(text)) => text,
            Some(value) if agent.output.as_ref().is_some_and(|schema| schema.is_wrapped) => value.to_string(),
            _ if text.is_empty() && !is_guarded() => self.state.last_words().unwrap_or_default(),
            _ => text,
        }
    }

    async fn fail(&mut self, error: RunError) -> Result<Option<End>, Halt> {
        if self.is_root() {
            let failed = Body::failed(error.code, error.message.clone());
            self.append(vec![self.state.step(failed)]).await?;
        }
        Ok(Some(End::Failed(error)))
    }

    async fn trip(&mut self, tripped: Tripped) -> Result<End, Halt> {
        let error = tripped.error();
        let mut steps = vec![self.state.step(tripped.into_body(None))];
        if self.is_root() {
            steps.push(self.state.step(Body::failed(error.code, error.message.clone())));
        }
        self.append(steps).await?;
        Ok(End::Failed(error))
    }

    async fn wait(&mut self) -> Result<End, Halt> {
        if self.is_root() {
            self.append(vec![self.state.step(Body::status(RunStatus::WaitingApproval))]).await?;
        }
        Ok(End::Waits)
    }

    /// Ends the run itself, which was cut: by its time, or by what happened in a nested run.
    ///
    /// # Errors
    /// That can't be written down.
    pub async fn cut(&mut self, error: RunError) -> Result<(), Halt> {
        let last_steps = self.state.cut(error);
        self.append(last_steps).await
    }

    /// Pauses the run itself.
    ///
    /// # Errors
    /// That can't be written down.
    pub async fn pause(&mut self) -> Result<(), Halt> {
        self.append(vec![self.state.step(Body::status(RunStatus::PausedQuota))]).await
    }

    /// Runs the first agent's input guardrails that block, and starts those that run beside the first model call.
    async fn check_input(&mut self) -> Result<Option<Tripped>, Halt> {
        if self.state.has_ended() || !(self.state.is_new() || self.state.is_at_first_response()) {
            return Ok(None);
        }
        let agent = self.state.agent().clone();
        let of_input = |parallel| {
            agent
                .guardrails
                .iter()
                .any(|guardrail| guardrail.stage == GuardrailStage::Input && guardrail.parallel == parallel)
        };
        let text = self.state.view().into_iter().rev().find_map(|item| match item {
            InputItem::User { text } => Some(text),
            _ => None,
        });
        let text = text.unwrap_or_default();
        let check =
            |parallel| checks::together(&self.world, &self.place, &agent, GuardrailStage::Input, Some(parallel), &text);
        if self.state.is_new()
            && of_input(false)
            && let Some(tripped) = self.world.in_time(check(false)).await??
        {
            return Ok(Some(tripped));
        }
        if of_input(true) {
            self.beside = Some(AbortOnDropHandle::new(tokio::spawn(check(true))));
        }
        Ok(None)
    }

    /// Waits for the guardrails that run beside the first model call.
    async fn verdict_beside(&mut self) -> Result<Option<Tripped>, Halt> {
        if self.beside.is_none() {
            return Ok(None);
        }
        let world = self.world.clone();
        let tripped = world.in_time(verdict(&mut self.beside)).await??;
        self.beside = None;
        Ok(tripped)
    }

    /// Writes steps down and takes them in.
    async fn append(&mut self, steps: Vec<Step>) -> Result<(), Halt> {
        self.store_deferred().await?;
        if steps.is_empty() {
            return Ok(());
        }
        let append = Addition { from_sequence: self.world.next_sequence(), steps };
        self.world.append(&append).await?;
        self.fold(append.steps);
        Ok(())
    }

    fn fold(&mut self, steps: Vec<Step>) {
        for step in steps {
            self.world.see(&step);
            self.state.fold(step);
        }
    }

    /// Takes steps in that are written down with what comes next.
    fn defer(&mut self, steps: Vec<Step>) {
        if steps.is_empty() {
            return;
        }
        self.deferred = Some(Addition { from_sequence: self.world.next_sequence(), steps: steps.clone() });
        for step in steps {
            self.state.fold(step);
        }
    }

    /// Writes down what was deferred. If a model call has done that already, it is known by its sequence.
    async fn store_deferred(&mut self) -> Result<(), Halt> {
        if let Some(deferred) = &self.deferred {
            self.world.append(deferred).await?;
            self.deferred_is_stored();
        }
        Ok(())
    }

    fn deferred_is_stored(&mut self) {
        for step in self.deferred.take().into_iter().flat_map(|deferred| deferred.steps) {
            self.world.see(&step);
        }
    }

    /// The earliest sequence that an item can have behind what was deferred.
    fn next_sequence(&self) -> i64 {
        let deferred = self.deferred.as_ref().map_or(0, |deferred| deferred.steps.len());
        self.world.next_sequence() + i64::try_from(deferred).unwrap_or(i64::MAX)
    }
}

/// What a model call came to.
enum Heard {
    /// A whole response, and whether it is stored.
    Response(ModelResponse, bool),
    /// Nothing.
    Error(ModelError),
    /// A guardrail that ran beside it tripped.
    Trip(Tripped),
}

/// Waits for a verdict; for ever if none is awaited.
async fn verdict(beside: &mut Option<Verdict>) -> Result<Option<Tripped>, Halt> {
    match beside {
        None => std::future::pending().await,
        Some(verdict) => verdict.await.unwrap_or_else(|_| {
            let message = "A guardrail could not be run.".to_owned();
            Err(Halt::Fails(RunError { code: RunErrorCode::Internal, message }))
        }),
    }
}
