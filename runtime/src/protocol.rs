//! What workers apart and the api say to each other: JSON over HTTP under `/runtime/v1`.
//!
//! A request carries [`VERSION_HEADER`] and, as a bearer, a token that opens one tenant's pool. The model's text does
//! not pass a worker: the api makes the call, tells subscribers of the text as it comes, stores the response's items
//! together with what they cost, and tells the worker of the whole response. So a worker that is slow, stopped or
//! untruthful holds up no subscriber and forges no charge.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::item::Step;
use crate::journal::Progress;
use crate::model::{ModelError, ModelEvent, ModelRequest};
use crate::spec::{Claim, Lease};
use crate::webhook::MAX_ANSWER_BYTES;

/// The version that this build speaks.
pub const VERSION: &str = "1";
/// The header that says which version a request is written in, and in answers which one the api speaks.
pub const VERSION_HEADER: &str = "cloister-protocol";
/// Bytes of a request's body.
pub const MAX_BODY_BYTES: usize = 8 * 1024 * 1024;
/// Bytes of an item's texts: a webhook's answer of bytes that are no UTF-8 becomes three times as long.
pub const MAX_ITEM_BYTES: usize = 3 * MAX_ANSWER_BYTES + 1024;
/// Items of an append.
pub const MAX_ITEMS: usize = 1_000;
/// Runs of a claim.
pub const MAX_CLAIMS: u32 = 64;
/// Leases of a heartbeat.
pub const MAX_LEASES: usize = 10_000;
/// Characters of a worker's name.
pub const MAX_WORKER_NAME: usize = 253;
/// The longest wait for something to claim, in milliseconds.
pub const MAX_WAIT_MS: u64 = 30_000;
/// While a model answers, the api says something at least as often as this, in milliseconds.
pub const KEEP_ALIVE_MS: u64 = 10_000;

/// `POST claims`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ClaimRequest {
    /// The most runs to be given: from 1 to [`MAX_CLAIMS`].
    pub max: u32,
    /// Milliseconds to wait while there are none; [`MAX_WAIT_MS`] at most.
    pub wait_ms: u64,
    /// Who asks, so that its runs say where they ran: a host's name ([`is_worker_name`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<String>,
}

/// Whether a worker may be named so.
pub fn is_worker_name(name: &str) -> bool {
    (1..=MAX_WORKER_NAME).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_graphic())
}

/// The answer to [`ClaimRequest`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Claims {
    /// Runs that are the worker's now; maybe none.
    pub claims: Vec<Claim>,
    /// Milliseconds that a lease lasts unless an append or a heartbeat renews it.
    pub lease_ms: u64,
}

/// `POST runs/{id}/items`. The same append may be sent again: it is stored once.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AppendRequest {
    /// The right to write.
    pub lease: Lease,
    /// The sequence that the first item is to have. Where nested runs or decisions about calls may come between, the
    /// earliest that it can have.
    pub from_seq: i64,
    /// What the worker did: outputs of tools, a handoff, calls that need approval, guardrails that tripped, the run's end
    /// or pause. What the model answered is stored by the api itself.
    pub items: Vec<Step>,
}

/// Where a worker stands with a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    /// When the lease lapses unless it is renewed.
    pub lease_until: DateTime<Utc>,
    /// The run is not the worker's any more: it is to be dropped.
    pub cancel: bool,
    /// The run is to be handed back after the turn in progress: other workers are to go on with it.
    pub pause: bool,
}

/// `POST runs/{id}/deltas`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DeltasRequest {
    /// The right to write.
    pub lease: Lease,
    /// What subscribers are to be told: of a turn that begins anew. Text is told by the api itself.
    pub deltas: Vec<Progress>,
}

/// `POST heartbeats`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HeartbeatRequest {
    /// The leases to be renewed; [`MAX_LEASES`] at most.
    pub leases: Vec<Lease>,
}

/// The answer to [`HeartbeatRequest`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Heartbeats {
    /// Where the worker stands with each of the runs.
    pub runs: BTreeMap<Uuid, Standing>,
}

/// `POST runs/{id}/model`. The answer is a stream of server-sent events, each a [`ModelMessage`], of which the last one
/// is [`ModelEvent::Done`] or an error.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ModelTurn {
    /// The right to write.
    pub lease: Lease,
    /// The turn, from 1.
    pub turn: u32,
    /// The nested run that asks; none for the run itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<String>,
    /// The agent that asks, in a nested run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_id: Option<Uuid>,
    /// Whether a text that is the last thing to handle is the run's output, if its agent is one whose text can be.
    #[serde(default = "yes")]
    pub is_final: bool,
    /// The sequence that the response's first item is to have, as in [`AppendRequest`].
    pub from_seq: i64,
    /// What the model is asked, within what the run's agent allows.
    pub request: ModelRequest,
}

fn yes() -> bool {
    true
}

/// An event of a model's answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModelMessage {
    /// It goes on, or is complete.
    Event(ModelEvent),
    /// It came to nothing.
    Error(ModelError),
}

/// `POST runs/{id}/release`
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct ReleaseRequest {
    /// The right that is given up.
    pub lease: Lease,
}

/// The answer where there is nothing to say.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Accepted {}

/// The body of an answer with an error status.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// The kind, stable.
    pub code: RefusalCode,
    /// For people.
    pub message: String,
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalCode {
    /// 426: the api speaks another version.
    ProtocolVersion,
    /// 401: no token, or one that isn't valid now.
    Unauthenticated,
    /// 403: the tenant is suspended or being deleted.
    TenantSuspended,
    /// 400: it makes no sense, or says what a worker has no business to say.
    Invalid,
    /// 413: the body, or an item, is too large.
    TooLarge,
    /// 404: there is no such run in the tenant's pool.
    NotFound,
    /// 409: another worker has the run, or it is over.
    LeaseLost,
    /// 409: the sequence is not the next one.
    WrongSequence,
    /// 409: the run's model is being called already.
    Busy,
    /// 503: not now; try again.
    Unavailable,
}

impl RefusalCode {
    /// The code as it is on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::ProtocolVersion => "protocol_version",
            Self::Unauthenticated => "unauthenticated",
            Self::TenantSuspended => "tenant_suspended",
            Self::Invalid => "invalid",
            Self::TooLarge => "too_large",
            Self::NotFound => "not_found",
            Self::LeaseLost => "lease_lost",
            Self::WrongSequence => "wrong_sequence",
            Self::Busy => "busy",
            Self::Unavailable => "unavailable",
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::item::{Body, Item, RunErrorCode, RunStatus, TokenUsage};
    use crate::model::{Finish, ModelResponse, Part};

    #[test]
    fn what_is_written_is_read() {
        let step = Step { agent_name: "A".into(), turn: Some(1), scope: None, body: Body::output("c", "text", false) };
        let item = Item { sequence: 4, created_at: DateTime::UNIX_EPOCH, step: step.clone() };
        let read: Item = serde_json::from_value(serde_json::to_value(&item).unwrap()).unwrap();
        assert_eq!(read, item);
        let end = Step { agent_name: "A".into(), turn: None, scope: None, body: Body::status(RunStatus::PausedQuota) };
        for step in [step, end] {
            let read: Step = serde_json::from_str(&serde_json::to_string(&step).unwrap()).unwrap();
            assert_eq!(read, step);
        }
        let response = ModelResponse {
            model: "m".into(),
            parts: vec![Part::Message { index: 1, text: "Hi".into(), raw: None }],
            finish: Finish::Stop,
            usage: TokenUsage::default(),
        };
        for message in [
            ModelMessage::Event(ModelEvent::Done { response, journaled: true }),
            ModelMessage::Error(ModelError::Failed { code: RunErrorCode::Internal, message: "No.".into() }),
            ModelMessage::Error(ModelError::Unavailable { reason: "No.".into() }),
            ModelMessage::Error(ModelError::LeaseLost),
        ] {
            let read: ModelMessage = serde_json::from_str(&serde_json::to_string(&message).unwrap()).unwrap();
            assert_eq!(read, message);
        }
    }

    #[test]
    fn codes_have_their_wire_names() {
        for code in [RefusalCode::ProtocolVersion, RefusalCode::LeaseLost, RefusalCode::TooLarge] {
            assert_eq!(serde_json::to_value(code).unwrap(), json!(code.name()));
        }
    }
}
