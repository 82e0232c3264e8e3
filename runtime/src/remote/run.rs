//! The journal and the model of one run, over HTTP.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use backon::{BackoffBuilder, ExponentialBuilder};
use cloister_runtime::item::Step;
use cloister_runtime::journal::{Journal, JournalError, Progress};
use cloister_runtime::model::{Model, ModelCall, ModelError, ModelEvent};
use cloister_runtime::protocol::{
    Accepted, AppendRequest, DeltasRequest, MAX_BODY_BYTES, MAX_ITEMS, ModelMessage, ModelTurn, RefusalCode, Standing,
};
use cloister_runtime::spec::Lease;
use eventsource_stream::Eventsource;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use tokio_util::sync::CancellationToken;

use super::{Api, ApiError, PATIENCE};

/// Bytes of an append's items, as JSON: well within what a body may have.
const APPEND_BYTES: usize = MAX_BODY_BYTES / 2;
/// How long a model call is asked for again that did not reach the api: less than a lease lasts (30 s).
const CALL_PATIENCE: Duration = Duration::from_secs(20);

/// A run as its worker reaches it.
pub struct RemoteRun {
    api: Arc<Api>,
    /// Cancelled when the api wants the run back.
    hand_back: CancellationToken,
}

impl RemoteRun {
    /// A run that was claimed; `hand_back` is cancelled when the api wants it back.
    pub fn new(api: Arc<Api>, hand_back: CancellationToken) -> Self {
        Self { api, hand_back }
    }
}

#[async_trait]
impl Journal for RemoteRun {
    async fn append(&self, lease: Lease, from_sequence: i64, steps: Vec<Step>) -> Result<(), JournalError> {
        let path = format!("runs/{}/items", lease.run_id);
        for (from_seq, items) in batches(from_sequence, steps, APPEND_BYTES) {
            // The whole is tried again when a part of it could not be stored; the api knows what it has.
            let request = AppendRequest { lease, from_seq, items };
            let standing: Standing = self.api.post(&path, &request, PATIENCE).await.map_err(|error| refused(&error))?;
            if standing.pause {
                self.hand_back.cancel();
            }
        }
        Ok(())
    }

    /// Only of a turn that begins anew: text is told by the api as it passes by.
    async fn progress(&self, lease: Lease, progress: Progress) {
        if !matches!(progress, Progress::Restarted { .. }) {
            return;
        }
        let path = format!("runs/{}/deltas", lease.run_id);
        let request = DeltasRequest { lease, deltas: vec![progress] };
        let told: Result<Accepted, ApiError> = self.api.post(&path, &request, PATIENCE).await;
        if let Err(error) = told {
            tracing::debug!(%error, "subscribers were not told that a turn begins anew");
        }
    }
}

/// Steps in appends that are small enough, each with its first sequence.
fn batches(from_sequence: i64, steps: Vec<Step>, most_bytes: usize) -> Vec<(i64, Vec<Step>)> {
    let mut batches: Vec<(i64, Vec<Step>)> = Vec::new();
    let mut bytes = 0;
    for (sequence, step) in (from_sequence..).zip(steps) {
        let size = serde_json::to_vec(&step).map_or(0, |json| json.len());
        match batches.last_mut() {
            Some((_, batch)) if bytes + size <= most_bytes && batch.len() < MAX_ITEMS => {
                batch.push(step);
                bytes += size;
            }
            _ => {
                batches.push((sequence, vec![step]));
                bytes = size;
            }
        }
    }
    batches
}

/// What an append's failure means for the run.
fn refused(error: &ApiError) -> JournalError {
    match error.code() {
        // A token may be about to be replaced.
        None | Some(RefusalCode::Unavailable | RefusalCode::Unauthenticated | RefusalCode::ProtocolVersion) => {
            JournalError::Unavailable(error.to_string())
        }
        Some(RefusalCode::LeaseLost | RefusalCode::NotFound | RefusalCode::TenantSuspended) => JournalError::LeaseLost,
        Some(RefusalCode::Invalid | RefusalCode::TooLarge | RefusalCode::WrongSequence | RefusalCode::Busy) => {
            tracing::error!(%error, "the api does not take what the run came to");
            JournalError::LeaseLost
        }
    }
}

impl Model for RemoteRun {
    fn respond(&self, call: ModelCall) -> BoxStream<'static, Result<ModelEvent, ModelError>> {
        let api = self.api.clone();
        let path = format!("runs/{}/model", call.lease.run_id);
        let turn = ModelTurn {
            lease: call.lease,
            turn: call.turn,
            agent_id: call.recorder.scope.is_some().then_some(call.agent_id),
            scope: call.recorder.scope,
            is_final: call.recorder.is_final,
            from_seq: call.recorder.from_sequence,
            request: call.request,
        };
        let stream = async_stream::stream! {
            let answer = match ask(&api, &path, &turn).await {
                Ok(answer) => answer,
                Err(error) => {
                    yield Err(error);
                    return;
                }
            };
            let mut messages = answer.bytes_stream().eventsource();
            while let Some(message) = messages.next().await {
                let message = match message {
                    Ok(message) => serde_json::from_str(&message.data).map_err(|error| error.to_string()),
                    Err(error) => Err(error.to_string()),
                };
                match message {
                    Ok(ModelMessage::Event(event)) => yield Ok(event),
                    Ok(ModelMessage::Error(error)) => yield Err(error),
                    Err(reason) => {
                        yield Err(ModelError::Unavailable { reason });
                        return;
                    }
                }
            }
            // Reached only without an end: whoever listens stops there.
            yield Err(ModelError::Unavailable { reason: "the answer broke off".to_owned() });
        };
        stream.boxed()
    }
}

/// Asks for a model call, and again where that did not begin one.
async fn ask(api: &Api, path: &str, turn: &ModelTurn) -> Result<reqwest::Response, ModelError> {
    let mut pauses = ExponentialBuilder::default()
        .with_jitter()
        .with_min_delay(Duration::from_millis(100))
        .with_max_delay(Duration::from_secs(2))
        .with_total_delay(Some(CALL_PATIENCE))
        .without_max_times()
        .build();
    loop {
        let error = match api.open(path, turn).await {
            Ok(answer) => return Ok(answer),
            Err(error) => error,
        };
        let never_began = match &error {
            ApiError::Unreachable(_) => true,
            ApiError::Away(_) => false,
            ApiError::Refused(refusal) => match refusal.code {
                RefusalCode::LeaseLost | RefusalCode::NotFound | RefusalCode::TenantSuspended => {
                    return Err(ModelError::LeaseLost);
                }
                RefusalCode::Unavailable | RefusalCode::Unauthenticated => true,
                _ => false,
            },
        };
        match pauses.next() {
            Some(pause) if never_began => tokio::time::sleep(pause).await,
            _ => return Err(ModelError::Unavailable { reason: error.to_string() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use cloister_runtime::item::Body;

    use super::*;

    #[test]
    fn appends_are_cut_where_they_grow_too_large() {
        let step = |length: usize| Step {
            scope: None,
            agent_name: "A".into(),
            turn: Some(1),
            body: Body::output("c", "x".repeat(length), false),
        };
        let cut = |lengths: &[usize]| -> Vec<(i64, usize)> {
            let steps = lengths.iter().map(|length| step(*length)).collect();
            batches(5, steps, 1_000).into_iter().map(|(from, steps)| (from, steps.len())).collect()
        };
        assert_eq!(cut(&[]), []);
        assert_eq!(cut(&[10, 10]), [(5, 2)]);
        assert_eq!(cut(&[10, 900, 10, 2_000, 10]), [(5, 1), (6, 1), (7, 1), (8, 1), (9, 1)]);
        assert_eq!(cut(&[300, 300, 300]), [(5, 2), (7, 1)]);
        assert_eq!(batches(1, vec![step(0); 1_500], usize::MAX).len(), 2);
    }
}
