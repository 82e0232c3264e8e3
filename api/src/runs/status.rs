//! The run's state in the words of the journal, the table and the API.
#![allow(missing_docs)] // fields and inputs are what the schema says they are

use async_graphql::Enum;
use cloister_runtime::item::{RunErrorCode as JournalCode, RunStatus as JournalStatus};
use entity::runs::Status;

/// Where a run stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Enum)]
pub enum RunStatus {
    /// Waits for a worker, or for the conversation's earlier run.
    Queued,
    /// A worker holds it.
    Running,
    /// Waits for a decision about a tool call.
    WaitingApproval,
    /// The month's tokens ran out; `resumeRun` goes on.
    PausedQuota,
    /// Ended with an output.
    Succeeded,
    /// Ended with an error.
    Failed,
    /// Ended by `cancelRun`.
    Cancelled,
}

/// The same seven words, one enum to another.
macro_rules! same_words {
    ($($from:ty => $to:ty),* $(,)?) => {$(
        impl From<$from> for $to {
            fn from(status: $from) -> Self {
                match status {
                    <$from>::Queued => Self::Queued,
                    <$from>::Running => Self::Running,
                    <$from>::WaitingApproval => Self::WaitingApproval,
                    <$from>::PausedQuota => Self::PausedQuota,
                    <$from>::Succeeded => Self::Succeeded,
                    <$from>::Failed => Self::Failed,
                    <$from>::Cancelled => Self::Cancelled,
                }
            }
        }
    )*};
}

same_words!(Status => RunStatus, RunStatus => Status, JournalStatus => RunStatus);

/// The table's word for a state of the journal.
pub fn stored(status: JournalStatus) -> Status {
    RunStatus::from(status).into()
}

/// Why a run failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Enum)]
#[graphql(remote = "JournalCode")]
pub enum RunErrorCode {
    /// One more model call than allowed was needed.
    MaxTurns,
    /// The model's response can't be used.
    ModelBehavior,
    /// The model refused.
    ModelRefusal,
    /// The provider answered 4xx.
    ModelRejected,
    /// The provider could not be reached, or kept failing.
    ModelUnavailable,
    /// A guardrail tripped.
    Guardrail,
    /// A tool ended the run.
    Tool,
    /// The run's own `maxTokens` is used up.
    TokenLimit,
    /// The run took longer than it may.
    Timeout,
    /// Our fault.
    Internal,
}

/// A code as the table has it: its name in the API.
pub fn code_name(code: JournalCode) -> String {
    serde_json::to_value(code).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

/// A code from the table.
pub fn code_from_name(name: &str) -> RunErrorCode {
    serde_json::from_value::<JournalCode>(name.into()).map_or(RunErrorCode::Internal, RunErrorCode::from)
}
