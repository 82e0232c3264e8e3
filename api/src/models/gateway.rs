//! A metered model call: reserve, send, stream, settle. A model that is unavailable before its first byte gives way to
//! the next of the call's.
//!
//! The call runs in a task of its own. Once the request may have reached the provider the task goes
//! on without its caller, to the provider's account of what it charged (60 s at most).

use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use cloister_runtime::ids::run_id;
use cloister_runtime::item::{RunErrorCode, TokenUsage};
use cloister_runtime::model::{ModelError, ModelEvent, ModelRequest, ModelResponse, Part};
use cloister_runtime::recorder::TurnRecorder;
use cloister_runtime::spec::Lease;
use entity::quota_reservations;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;

use super::catalog::{self, CatalogModel};
use super::provider::{Answer, AnswerEvent, Completion, Cut, Provider, SendError};
use super::tokens;
use crate::app::App;
use crate::error::Error;
use crate::metrics::{self, CallOutcome};
use crate::runs::journal::{Append, Verdict};
use crate::runs::record;
use crate::tenants::changes::Change;
use crate::usage::ledger::Settlement;
use crate::usage::quota::{self, Ask, CallOrigin, DEFAULT_MAX_OUTPUT, Denied, Reserve};

/// How long a call goes on that nobody waits for any more.
const DRAIN: Duration = Duration::from_secs(60);
/// How often an open answer's reservation is extended and its output noted.
const CHECKPOINT: Duration = Duration::from_secs(1);
/// The longest `Retry-After` that is waited for; a provider that asks for more counts as unavailable.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// When what nobody heard of has become an orphan, and been swept.
const FORGOTTEN: Duration = Duration::from_secs(40);
/// How long a complete answer waits for its caller to take what was streamed of it.
const CATCH_UP: Duration = Duration::from_millis(50);
/// Pauses while the database can't be used.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Events that may wait for the caller before the provider is read no further.
const BUFFER: usize = 64;

/// Where a response's items go, in the transaction that settles its call.
pub struct JournalWrite {
    /// The right to write.
    pub lease: Lease,
    /// Whether the run is in a conversation.
    pub in_conversation: bool,
    /// What is stored before the call, together with its reservation.
    pub first: Option<Append>,
    /// Turns the response into items.
    pub recorder: TurnRecorder,
}

/// Makes a call to the origin's model, or to the first of `fallbacks` that is there. What was `reserved` for it is used
/// if it is what would be asked for ([`first_ask`]). The stream ends with [`ModelEvent::Done`] or an error.
pub fn call(
    app: &App,
    origin: CallOrigin,
    fallbacks: Vec<Arc<CatalogModel>>,
    request: ModelRequest,
    journal: Option<JournalWrite>,
    reserved: Option<quota_reservations::Model>,
) -> BoxStream<'static, Result<ModelEvent, ModelError>> {
    let (events, receiver) = mpsc::channel(BUFFER);
    let call = Call { app: app.clone(), origin, attempt: 0, request, journal, reserved, events };
    app.tasks.spawn(call.run(fallbacks));
    ReceiverStream::new(receiver).boxed()
}

/// What the first attempt at a model asks to hold.
pub fn first_ask(model: &CatalogModel, request: &ModelRequest) -> Ask {
    Ask { attempt: 1, input_tokens: tokens::count_request(request), max_output: most_output(model, request) }
}

/// Output tokens that a model may give: what is asked for, and no more than it can.
fn most_output(model: &CatalogModel, request: &ModelRequest) -> i64 {
    Ord::min(wanted_output(request), i64::from(model.model.max_output_tokens))
}

fn wanted_output(request: &ModelRequest) -> i64 {
    request.max_output_tokens.map_or(DEFAULT_MAX_OUTPUT, i64::from)
}

/// Gives back what may have been reserved for a call that isn't made. A commit that is on its way while nobody waits
/// for it any more may be later than we are: so once more, when it would have been taken for an orphan.
pub fn forget(app: &App, reservation: quota_reservations::Model) {
    let app = app.clone();
    app.clone().tasks.spawn(async move {
        let release = || insist("giving back a reservation", || quota::release(&app, &reservation));
        if let Ok(false) = release().await {
            tokio::select! {
                () = tokio::time::sleep(FORGOTTEN) => {}
                () = app.stopping.cancelled() => {}
            }
            let _ = release().await;
        }
    });
}

struct Call {
    app: App,
    /// With the model that is asked now.
    origin: CallOrigin,
    /// How often any model was asked.
    attempt: i32,
    request: ModelRequest,
    journal: Option<JournalWrite>,
    /// For the first attempt.
    reserved: Option<quota_reservations::Model>,
    events: mpsc::Sender<Result<ModelEvent, ModelError>>,
}

/// What an attempt came to.
enum Attempt {
    /// The call is over.
    Over(Result<ModelEvent, ModelError>),
    /// Worth another attempt, after the wait that the provider asked for.
    Again { message: String, wait: Option<Duration> },
}

/// What asking one model came to.
enum Asked {
    /// The call is over.
    Over(Result<ModelEvent, ModelError>),
    /// The model is not to be had; another may be.
    Unavailable(String),
}

impl Call {
    async fn run(mut self, fallbacks: Vec<Arc<CatalogModel>>) {
        // Until something is sent there is nothing to meter, so the call ends with its caller.
        let events = self.events.clone();
        let last = match self.first_available(fallbacks).await {
            Ok(last) => last,
            Err(error) => {
                let run_id = self.origin.run_id.map(|id| tracing::field::display(run_id(id)));
                tracing::error!(%error, inside = ?error, run_id, "a model call failed on our side");
                failed(RunErrorCode::Internal, error.to_string())
            }
        };
        if let Some(unused) = self.reserved.take() {
            forget(&self.app, unused);
        }
        // The receiver may be gone; what had to be stored is stored.
        let _ = events.send(last).await;
    }

    /// Asks the models one by one until one is there.
    async fn first_available(
        &mut self,
        fallbacks: Vec<Arc<CatalogModel>>,
    ) -> Result<Result<ModelEvent, ModelError>, Error> {
        // What was reserved for was counted for it.
        let counted = self.reserved.as_ref().map(|reserved| reserved.input_tokens);
        let input_tokens = counted.unwrap_or_else(|| tokens::count_request(&self.request));
        let mut fallbacks = fallbacks.into_iter();
        let mut reasons = Vec::new();
        loop {
            let reason = match self.ask(input_tokens).await? {
                Asked::Over(last) => return Ok(last),
                Asked::Unavailable(reason) => reason,
            };
            let name = self.origin.model.model.name.clone();
            let Some(next) = fallbacks.next() else {
                let message = match reasons.is_empty() {
                    true => reason,
                    false => format!("No model is available: {}{name}: {reason}", reasons.concat()),
                };
                return Ok(failed(RunErrorCode::ModelUnavailable, message));
            };
            tracing::info!(model = name, next = next.model.name, "a model is unavailable; the next one is asked");
            reasons.push(format!("{name}: {reason}; "));
            self.origin.model = next;
        }
    }

    /// Asks the origin's model, as often as it is worth.
    async fn ask(&mut self, input_tokens: i64) -> Result<Asked, Error> {
        let model = self.origin.model.clone();
        let Some(provider) = model.provider.clone() else {
            let name = &model.model.provider;
            let message = format!("The provider {name:?} of the model {:?} is not configured.", model.model.name);
            return Ok(Asked::Unavailable(message));
        };
        let (wanted, max_output) = (wanted_output(&self.request), most_output(&model, &self.request));
        let mut backoff = ExponentialBuilder::default()
            .with_jitter()
            .with_min_delay(Duration::from_millis(250))
            .with_max_delay(Duration::from_secs(8))
            .with_max_times(model.attempts.saturating_sub(1) as usize)
            .build();
        loop {
            self.attempt += 1;
            let ask = Ask { attempt: self.attempt, input_tokens, max_output };
            let reservation = match self.reserve(ask).await? {
                Ok(reservation) => reservation,
                Err(denied) => return Ok(Asked::Over(denied)),
            };
            let given = reservation.tokens - reservation.input_tokens;
            // Less is left than was asked for, or this model gives less than the one that it stands in for.
            let is_less = given < max_output || (self.request.max_output_tokens.is_some() && max_output < wanted);
            let max_output_tokens = u32::try_from(given).ok();
            let less = is_less.then(|| ModelRequest { max_output_tokens, ..self.request.clone() });
            let request = less.as_ref().unwrap_or(&self.request);
            let (message, wait) = match self.attempt(&provider, request, &reservation).await? {
                Attempt::Over(last) => return Ok(Asked::Over(last)),
                Attempt::Again { message, wait } => (message, wait),
            };
            let Some(pause) = backoff.next() else { return Ok(Asked::Unavailable(message)) };
            let pause = wait.map_or(pause, |wait| Ord::max(wait, pause));
            if pause > LONGEST_WAIT {
                let message = format!("{message} (it asks to be left alone for {} s)", pause.as_secs());
                return Ok(Asked::Unavailable(message));
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.events.closed() => return Ok(Asked::Over(Err(ModelError::LeaseLost))),
            }
        }
    }

    /// A reservation, or what the call comes to without one. What is to be stored before the call is stored with it.
    async fn reserve(
        &mut self,
        ask: Ask,
    ) -> Result<Result<quota_reservations::Model, Result<ModelEvent, ModelError>>, Error> {
        let first = self.journal.as_mut().and_then(|journal| journal.first.take());
        let mut reserve = Reserve::new(&self.app, &self.origin, ask);
        if let Some(reserved) = self.reserved.take() {
            if first.is_none() && reserve.is_made_by(&reserved) {
                return Ok(Ok(reserved));
            }
            forget(&self.app, reserved);
        }
        let mut pause = FIRST_PAUSE;
        let mut may_stand = false;
        loop {
            let made = tokio::select! {
                made = reserve.made(&self.app, first.clone()) => made,
                () = self.events.closed() => Err(Denied::LeaseLost),
            };
            match made {
                Ok(reservation) => return Ok(Ok(reservation)),
                Err(denied @ (Denied::Exhausted | Denied::Busy | Denied::RunLimit)) => {
                    if may_stand {
                        forget(&self.app, reserve.reservation);
                    }
                    return Ok(Err(match denied {
                        Denied::RunLimit => failed(RunErrorCode::TokenLimit, "The run's maxTokens are used up."),
                        // Others' calls hold what is left: the run waits as if it were used up.
                        _ => Err(ModelError::QuotaExhausted),
                    }));
                }
                Err(Denied::LeaseLost) => {
                    forget(&self.app, reserve.reservation);
                    return Ok(Err(Err(ModelError::LeaseLost)));
                }
                Err(Denied::Fault(Error::Unavailable(inside))) => {
                    tracing::warn!(inside, "a reservation waits for the database");
                    may_stand = true;
                }
                Err(Denied::Fault(error)) => {
                    forget(&self.app, reserve.reservation);
                    return Err(error);
                }
            }
            tokio::time::sleep(pause).await;
            pause = Ord::min(pause * 2, LONGEST_PAUSE);
            // What may stand of it is soon taken for an orphan, if it isn't yet.
            if self.app.clock.now() - reserve.reservation.created_at > quota::LIFETIME / 2 {
                forget(&self.app, reserve.reservation);
                reserve = Reserve::new(&self.app, &self.origin, ask);
                may_stand = false;
            }
        }
    }

    /// One attempt: from its reservation to its settlement or release.
    async fn attempt(
        &self,
        provider: &Provider,
        request: &ModelRequest,
        reservation: &quota_reservations::Model,
    ) -> Result<Attempt, Error> {
        // Its caller may be gone by now; or this process stood still for so long that it was taken for dead.
        if self.events.is_closed() {
            self.release(reservation).await?;
            return Ok(Attempt::Over(Err(ModelError::LeaseLost)));
        }
        if self.app.clock.now() >= reservation.expires_at {
            self.release(reservation).await?;
            return Ok(Attempt::Again { message: "The call's reservation had lapsed.".to_owned(), wait: None });
        }
        let model = &self.origin.model;
        let sending = provider.send(model.api, &model.model.upstream, request);
        match self.while_open(reservation, sending).await {
            Ok(answer) => self.stream(answer, reservation).await.map(Attempt::Over),
            Err(SendError::Retryable { message, retry_after }) => {
                metrics::model_call(CallOutcome::Refused, None);
                self.release(reservation).await?;
                Ok(Attempt::Again { message, wait: retry_after })
            }
            Err(SendError::Rejected { status, message }) => {
                metrics::model_call(CallOutcome::Refused, None);
                self.release(reservation).await?;
                let message = format!("The provider refused the request ({status}): {message}");
                Ok(Attempt::Over(failed(RunErrorCode::ModelRejected, message)))
            }
            Err(SendError::Unfit { message }) => {
                self.release(reservation).await?;
                Ok(Attempt::Over(failed(RunErrorCode::ModelRejected, message)))
            }
            Err(SendError::Unknown { message }) => {
                let usage = self.estimate(reservation, &[]);
                self.settle(reservation, usage, None).await?;
                Ok(Attempt::Again { message, wait: None })
            }
        }
    }

    /// Gives back what a call reserved that nobody is charged for.
    async fn release(&self, reservation: &quota_reservations::Model) -> Result<(), Error> {
        insist("giving back a reservation", || quota::release(&self.app, reservation)).await?;
        Ok(())
    }

    /// Passes an answer on to the caller, and settles what it cost whatever becomes of either.
    async fn stream(
        &self,
        answer: Answer,
        reservation: &quota_reservations::Model,
    ) -> Result<Result<ModelEvent, ModelError>, Error> {
        let mut parts = PartialParts::default();
        let mut answer = answer.events;
        let mut abandoned_at: Option<Instant> = None;
        let mut checkpoint = tokio::time::interval_at(Instant::now() + CHECKPOINT, CHECKPOINT);
        checkpoint.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let drain_ends = abandoned_at.map(|since| since + DRAIN);
            let event = tokio::select! {
                event = answer.next() => event,
                _ = checkpoint.tick() => {
                    self.checkpoint(reservation, parts.count()).await;
                    continue;
                }
                () = self.events.closed(), if abandoned_at.is_none() => {
                    abandoned_at = Some(Instant::now());
                    continue;
                }
                () = sleep_until(drain_ends) => {
                    Some(Err(Cut::broken("given up", parts.parts.clone())))
                }
            };
            let progress = match event {
                Some(Ok(AnswerEvent::Complete(completion))) => return self.complete(completion, reservation).await,
                Some(Ok(AnswerEvent::Text { index, text })) => {
                    parts.text(index, &text);
                    ModelEvent::Text { index, text }
                }
                Some(Ok(AnswerEvent::Arguments { index, call_id, name, text })) => {
                    parts.arguments(index, &name, &text);
                    ModelEvent::Arguments { index, call_id, name, text }
                }
                Some(Err(cut)) => return self.cut(cut, reservation).await,
                None => return self.cut(Cut::broken("the answer ended", parts.parts), reservation).await,
            };
            if abandoned_at.is_none() && self.events.send(Ok(progress)).await.is_err() {
                abandoned_at = Some(Instant::now());
            }
        }
    }

    async fn complete(
        &self,
        completion: Completion,
        reservation: &quota_reservations::Model,
    ) -> Result<Result<ModelEvent, ModelError>, Error> {
        let mut usage = completion.usage.unwrap_or_else(|| self.estimate(reservation, &completion.parts));
        usage.cost_nano_usd = catalog::cost(&self.origin.model.price, &usage);
        let response = ModelResponse {
            model: self.origin.model.model.name.clone(),
            parts: completion.parts,
            finish: completion.finish,
            usage,
        };
        self.let_caller_catch_up().await;
        let journaled = self.settle(reservation, usage, Some(&response)).await?;
        Ok(match (&self.journal, journaled) {
            (Some(_), false) => Err(ModelError::LeaseLost),
            _ => Ok(ModelEvent::Done { response, journaled }),
        })
    }

    /// Waits a little while the caller has deltas to take: subscribers are to be told them before the items that replace
    /// them. One that is slower than that loses deltas, never text.
    async fn let_caller_catch_up(&self) {
        // All of the channel's room is there once all that was sent has been taken.
        let all_taken = self.events.reserve_many(self.events.max_capacity());
        let _ = tokio::time::timeout(CATCH_UP, all_taken).await;
    }

    async fn cut(
        &self,
        cut: Cut,
        reservation: &quota_reservations::Model,
    ) -> Result<Result<ModelEvent, ModelError>, Error> {
        let usage = cut.usage.unwrap_or_else(|| self.estimate(reservation, &cut.partial));
        self.settle(reservation, usage, None).await?;
        Ok(failed(cut.code, cut.reason))
    }

    fn estimate(&self, reservation: &quota_reservations::Model, parts: &[Part]) -> TokenUsage {
        TokenUsage {
            input_tokens: reservation.input_tokens,
            output_tokens: tokens::count_parts(parts),
            estimated: true,
            ..TokenUsage::default()
        }
    }

    /// One transaction: the ledger, the reservation and, where there is a journal, the response's
    /// items. Tries until the database takes it: what was charged must be recorded. Tells whether the
    /// items were stored.
    async fn settle(
        &self,
        reservation: &quota_reservations::Model,
        mut usage: TokenUsage,
        response: Option<&ModelResponse>,
    ) -> Result<bool, Error> {
        usage.cost_nano_usd = catalog::cost(&self.origin.model.price, &usage);
        let append = self.journal.as_ref().zip(response).map(|(journal, response)| Append {
            lease: journal.lease,
            in_conversation: journal.in_conversation,
            from_sequence: journal.recorder.from_sequence,
            steps: journal.recorder.steps(response),
        });
        let settlement = Settlement { reservation: reservation.clone(), usage };
        let mut pause = FIRST_PAUSE;
        let verdict = loop {
            match record::settle(&self.app, settlement.clone(), append.clone()).await {
                Ok(verdict) => break verdict,
                Err(error) => {
                    tracing::error!(%error, inside = ?error, call_id = %reservation.call_id, "a call could not be settled yet");
                    tokio::time::sleep(pause).await;
                    pause = Ord::min(pause * 2, LONGEST_PAUSE);
                }
            }
        };
        let excess = usage.total_tokens() - reservation.tokens;
        let outcome = if usage.estimated { CallOutcome::Estimated } else { CallOutcome::Settled };
        metrics::model_call(outcome, Some(&usage));
        if excess > 0 {
            metrics::quota_excess(excess);
            tracing::warn!(call_id = %reservation.call_id, excess, "a provider charged more than was reserved");
        }
        self.app.releases.wake();
        self.app.changes.publish(reservation.tenant_id, Change::Usage);
        Ok(matches!(verdict, Some(Verdict::Stored | Verdict::Repeated)))
    }

    /// Awaits the head of an answer, which may take longer than a reservation stands by itself.
    async fn while_open<T>(&self, reservation: &quota_reservations::Model, future: impl Future<Output = T>) -> T {
        // From then on: an interval's tick at once would take as long as the timer's step, a millisecond.
        let mut extend = tokio::time::interval_at(Instant::now() + CHECKPOINT * 10, CHECKPOINT * 10);
        tokio::pin!(future);
        loop {
            tokio::select! {
                result = &mut future => return result,
                _ = extend.tick() => self.checkpoint(reservation, 0).await,
            }
        }
    }

    async fn checkpoint(&self, reservation: &quota_reservations::Model, output: i64) {
        if let Err(error) = quota::checkpoint(&self.app, reservation.call_id, output).await {
            tracing::warn!(inside = ?error, call_id = %reservation.call_id, "a reservation was not extended");
        }
    }
}

/// What has arrived of an answer, to count it by.
#[derive(Default)]
struct PartialParts {
    parts: Vec<Part>,
    /// Text that [`PartialParts::count`] hasn't seen.
    uncounted: String,
    counted: i64,
}

impl PartialParts {
    /// Tokens so far, near enough for a checkpoint: each text is counted once, as it came.
    fn count(&mut self) -> i64 {
        self.counted += tokens::count_text(&std::mem::take(&mut self.uncounted));
        self.counted
    }

    fn text(&mut self, index: u32, more: &str) {
        self.uncounted.push_str(more);
        match self.parts.iter_mut().find(|part| matches!(part, Part::Message { index: at, .. } if *at == index)) {
            Some(Part::Message { text, .. }) => text.push_str(more),
            _ => self.parts.push(Part::Message { index, text: more.to_owned(), raw: None }),
        }
    }

    fn arguments(&mut self, index: u32, called: &str, more: &str) {
        self.uncounted.push_str(more);
        match self.parts.iter_mut().find(|part| matches!(part, Part::ToolCall { index: at, .. } if *at == index)) {
            Some(Part::ToolCall { arguments, .. }) => arguments.push_str(more),
            _ => self.parts.push(Part::ToolCall {
                index,
                call_id: String::new(),
                name: called.to_owned(),
                arguments: more.to_owned(),
                raw: None,
            }),
        }
    }
}

fn failed(code: RunErrorCode, message: impl Into<String>) -> Result<ModelEvent, ModelError> {
    Err(ModelError::Failed { code, message: message.into() })
}

/// Does something again and again while the database can't be used. It must bear repeating: an answer may have been
/// lost of what was done.
async fn insist<T, F>(what: &str, work: impl Fn() -> F) -> Result<T, Error>
where
    F: Future<Output = Result<T, Error>>,
{
    let mut pause = FIRST_PAUSE;
    loop {
        match work().await {
            Err(Error::Unavailable(inside)) => tracing::warn!(inside, "{what} waits for the database"),
            done => return done,
        }
        tokio::time::sleep(pause).await;
        pause = Ord::min(pause * 2, LONGEST_PAUSE);
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
