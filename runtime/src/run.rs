//! The agent loop.
//!
//! [`state`] says what a run needs next, from its items alone; here that is done and written down, until nothing is
//! left to do. A run that another worker left off is no special case: its items are folded, and the loop goes on.

pub mod deltas;
pub mod nest_history;
mod request;
mod state;
mod texts;
mod tools;

use std::mem;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use self::deltas::Deltas;
use self::state::{Call, Next, State};
use self::tools::Tools;
use crate::ids::run_id;
use crate::item::{Body, InputItem, Item, RunErrorCode, RunStatus, Step};
use crate::journal::{Journal, JournalError, Progress};
use crate::model::{Model, ModelCall, ModelError, ModelEvent, ModelResponse};
use crate::recorder::TurnRecorder;
use crate::spec::{Claim, Lease, RunSpec};
use crate::webhook::WebhookClient;

/// How long an append is tried again while the journal can't be reached: less than a lease lasts (30 s), after which
/// the run is another worker's.
const JOURNAL_PATIENCE: Duration = Duration::from_secs(20);
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(3);

/// All that a run reaches of the world.
pub struct Ports {
    /// Answers its model calls.
    pub model: Arc<dyn Model>,
    /// Keeps its items.
    pub journal: Arc<dyn Journal>,
    /// Calls its tools.
    pub webhooks: WebhookClient,
}

/// How a run is told to stop.
#[derive(Clone, Debug, Default)]
pub struct Stop {
    /// At once, and nothing more is written: the run was cancelled, or the lease is lost.
    pub abandon: CancellationToken,
    /// After the turn in progress, its tools included.
    pub hand_back: CancellationToken,
}

/// How a worker's part in a run came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A terminal status is stored.
    Ended,
    /// PAUSED_QUOTA is stored.
    Paused,
    /// It stands between two turns; the lease is to be released.
    HandedBack,
    /// Another worker has it, or it was cancelled.
    LeaseLost,
    /// The journal could not be reached for too long.
    JournalUnavailable,
}

/// Runs a claimed run as far as it goes.
///
/// Dropping the future abandons the run just as [`Stop::abandon`] does. The lease must be kept alive from elsewhere
/// while a model or a tool takes its time.
#[tracing::instrument(name = "run", skip_all, fields(run = %run_id(claim.lease.run_id)))]
pub async fn run(claim: Claim, ports: &Ports, stop: &Stop) -> Outcome {
    tokio::select! {
        biased;
        () = stop.abandon.cancelled() => Outcome::LeaseLost,
        outcome = take_up(claim, ports, &stop.hand_back) => outcome,
    }
}

/// What a model is shown of a run's items: outputs in call order, whichever was stored first. Calls without an output
/// are left out. For the history of later runs.
pub fn transcript(spec: &RunSpec, items: Vec<Item>) -> Vec<InputItem> {
    State::rebuild(spec, items).map(|state| state.transcript()).unwrap_or_default()
}

async fn take_up(claim: Claim, ports: &Ports, hand_back: &CancellationToken) -> Outcome {
    let Claim { lease, spec, history, items, time_left_ms, webhook_secrets } = claim;
    let journal = ports.journal.as_ref();
    let next_sequence = items.last().map_or(1, |item| item.sequence + 1);
    let Some(state) = State::rebuild(&spec, items) else {
        let body = Body::failed(RunErrorCode::Internal, "The run's first agent is not part of it.");
        let step = Step { agent_name: String::new(), turn: None, scope: None, body };
        return append(journal, lease, next_sequence, &[step]).await.map_or_else(Outcome::from, |()| Outcome::Ended);
    };
    let in_progress = InProgress {
        lease,
        spec: &spec,
        history: &history,
        model: ports.model.as_ref(),
        journal,
        tools: Tools::new(ports.webhooks.clone(), spec.run_id, webhook_secrets),
        hand_back,
        deadline: Instant::now() + Duration::from_millis(time_left_ms),
        taken_over: lease.fence > 1,
        state,
    };
    in_progress.drive().await
}

/// Why the loop does not go on.
enum Halt {
    /// The worker is done with the run.
    With(Outcome),
    /// The run's time is over.
    TimeOver,
}

impl From<JournalError> for Outcome {
    fn from(error: JournalError) -> Self {
        match error {
            JournalError::LeaseLost => Outcome::LeaseLost,
            JournalError::Unavailable(_) => Outcome::JournalUnavailable,
        }
    }
}

impl From<JournalError> for Halt {
    fn from(error: JournalError) -> Self {
        Halt::With(error.into())
    }
}

/// A run and all that its loop works with.
struct InProgress<'a> {
    lease: Lease,
    spec: &'a RunSpec,
    history: &'a [InputItem],
    model: &'a dyn Model,
    journal: &'a dyn Journal,
    tools: Tools,
    hand_back: &'a CancellationToken,
    deadline: Instant,
    /// Another worker may have been at the next step before us.
    taken_over: bool,
    state: State<'a>,
}

impl InProgress<'_> {
    async fn drive(mut self) -> Outcome {
        loop {
            match self.take_step().await {
                Ok(()) => {}
                Err(Halt::With(outcome)) => return outcome,
                Err(Halt::TimeOver) => {
                    let last_steps = self.state.time_out();
                    if let Err(Halt::With(outcome)) = self.append(last_steps).await {
                        return outcome;
                    }
                }
            }
        }
    }

    async fn take_step(&mut self) -> Result<(), Halt> {
        let taken_over = mem::take(&mut self.taken_over);
        match self.state.next() {
            Next::CallTools(turn, calls) => self.call_tools(turn, calls).await,
            Next::Append(steps) => self.append(steps).await,
            Next::AskModel(turn) => self.ask_model(turn, taken_over).await,
            Next::Succeed(output) => {
                self.end(Body::Status {
                    status: RunStatus::Succeeded,
                    error: None,
                    output: Some(output),
                    output_json: None,
                })
                .await
            }
            Next::Fail(code, message) => self.end(Body::failed(code, message)).await,
            Next::Nothing => Err(Halt::With(Outcome::Ended)),
        }
    }

    async fn call_tools(&mut self, turn: u32, calls: Vec<Call<'_>>) -> Result<(), Halt> {
        let mut answers = pin!(self.tools.call_all(turn, calls, self.state.agent().max_tool_concurrency));
        while let Some(batch) = self.in_time(answers.next()).await? {
            let outputs = batch
                .into_iter()
                .map(|answer| self.state.tool_output(turn, &answer.call_id, answer.output, answer.is_error))
                .collect();
            self.append(outputs).await?;
        }
        Ok(())
    }

    async fn ask_model(&mut self, turn: u32, taken_over: bool) -> Result<(), Halt> {
        if Instant::now() >= self.deadline {
            return Err(Halt::TimeOver);
        }
        if self.hand_back.is_cancelled() {
            return Err(Halt::With(Outcome::HandedBack));
        }
        if taken_over {
            self.progress(Progress::Restarted { turn }).await;
        }
        let call = self.model_call(turn);
        let recorder = call.recorder.clone();
        match self.listen(call).await? {
            Ok((response, journaled)) => self.take_response(&recorder, &response, journaled).await,
            Err(ModelError::QuotaExhausted) => {
                self.end(Body::status(RunStatus::PausedQuota)).await?;
                Err(Halt::With(Outcome::Paused))
            }
            Err(ModelError::Failed { code, message }) => self.end(Body::failed(code, message)).await,
            Err(ModelError::LeaseLost) => Err(Halt::With(Outcome::LeaseLost)),
            Err(ModelError::Unavailable { reason }) => {
                tracing::warn!(turn, %reason, "the model gateway can't be reached; handing the run back");
                Err(Halt::With(Outcome::HandedBack))
            }
        }
    }

    fn model_call(&self, turn: u32) -> ModelCall {
        let agent = self.state.agent();
        ModelCall {
            lease: self.lease,
            turn,
            agent_id: agent.id,
            agent_version: agent.version,
            request: request::build(self.spec, self.history, &self.state),
            fallback_models: agent.fallback_models.clone(),
            recorder: TurnRecorder {
                turn,
                agent_name: agent.name.clone(),
                from_sequence: self.state.next_sequence(),
                used_call_ids: self.state.used_call_ids().clone(),
            },
        }
    }

    /// Passes on what the model streams, up to the whole response and whether it is stored already.
    async fn listen(&self, call: ModelCall) -> Result<Result<(ModelResponse, bool), ModelError>, Halt> {
        let mut deltas = Deltas::new(&call.recorder);
        let mut events = self.model.respond(call);
        while let Some(event) = self.in_time(events.next()).await? {
            match event {
                Ok(ModelEvent::Done { response, journaled }) => return Ok(Ok((response, journaled))),
                Ok(event) => {
                    if let Some(progress) = deltas.of(event) {
                        self.progress(progress).await;
                    }
                }
                Err(error) => return Ok(Err(error)),
            }
        }
        let message = "The model's answer broke off without an end.".to_owned();
        Ok(Err(ModelError::Failed { code: RunErrorCode::Internal, message }))
    }

    async fn take_response(
        &mut self,
        recorder: &TurnRecorder,
        response: &ModelResponse,
        journaled: bool,
    ) -> Result<(), Halt> {
        let steps = recorder.steps(response);
        if !journaled {
            return self.append(steps).await;
        }
        for step in steps {
            self.state.fold(step);
        }
        Ok(())
    }

    /// Writes a change of the run's state.
    async fn end(&mut self, body: Body) -> Result<(), Halt> {
        let step = self.state.step(body);
        self.append(vec![step]).await
    }

    /// Writes steps down and takes them in.
    async fn append(&mut self, steps: Vec<Step>) -> Result<(), Halt> {
        if steps.is_empty() {
            return Ok(());
        }
        append(self.journal, self.lease, self.state.next_sequence(), &steps).await?;
        for step in steps {
            self.state.fold(step);
        }
        Ok(())
    }

    async fn progress(&self, progress: Progress) {
        self.journal.progress(self.lease, progress).await;
    }

    /// Waits no longer than the run may take. Appends are never waited for this way: one that is cut may or may not
    /// have been stored.
    async fn in_time<T>(&self, work: impl Future<Output = T>) -> Result<T, Halt> {
        tokio::select! {
            biased;
            () = sleep_until(self.deadline) => Err(Halt::TimeOver),
            done = work => Ok(done),
        }
    }
}

/// Appends, again and again while the journal can't be reached.
async fn append(journal: &dyn Journal, lease: Lease, from_sequence: i64, steps: &[Step]) -> Result<(), JournalError> {
    let give_up = Instant::now() + JOURNAL_PATIENCE;
    let mut pause = FIRST_PAUSE;
    loop {
        match journal.append(lease, from_sequence, steps.to_vec()).await {
            Err(JournalError::Unavailable(reason)) if Instant::now() + pause < give_up => {
                tracing::warn!(%reason, "the journal can't be reached; trying again");
                sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
            settled => return settled,
        }
    }
}

#[cfg(test)]
mod tests;
