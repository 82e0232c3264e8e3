//! The one way a run writes down what it did.

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::item::Step;
use crate::spec::Lease;

/// A run's journal. In the api process it is the database; in a worker apart it is the api over HTTP.
#[async_trait]
pub trait Journal: Send + Sync {
    /// Stores `steps` as the next items, not before `from_sequence`, all or none, and renews the lease once it
    /// has lost a third. The same again is
    /// stored once.
    /// A [`crate::item::Body::Status`] moves the run's state in the same transaction.
    async fn append(&self, lease: Lease, from_sequence: i64, steps: Vec<Step>) -> Result<(), JournalError>;

    /// Tells subscribers of progress. It is never stored, and never fails a run.
    async fn progress(&self, lease: Lease, progress: Progress);
}

/// What a run's journal gains.
#[derive(Clone, Debug)]
pub struct Addition {
    /// As for [`Journal::append`].
    pub from_sequence: i64,
    /// The items.
    pub steps: Vec<Step>,
}

/// Progress within a turn, between items. Offsets are bytes of UTF-8.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Progress {
    /// More text of a message.
    Text {
        /// The turn, from 1.
        turn: u32,
        /// The part of the response.
        index: u32,
        /// Where the text stands in the part.
        offset: u32,
        /// The new text.
        text: String,
    },
    /// More of a call's arguments.
    Arguments {
        /// The turn, from 1.
        turn: u32,
        /// The part of the response.
        index: u32,
        /// The call's id as the journal will have it.
        call_id: String,
        /// The tool's name.
        name: String,
        /// Where the text stands in the arguments.
        offset: u32,
        /// The new text.
        text: String,
    },
    /// What was streamed of this turn is void; it begins again.
    Restarted {
        /// The turn, from 1.
        turn: u32,
    },
}

/// Why an append was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JournalError {
    /// Another worker has the run, or it has ended: drop it.
    #[error("the lease on the run was lost")]
    LeaseLost,
    /// The journal can't be reached now; the run is taken up again by whoever claims it next.
    #[error("the journal is unavailable: {0}")]
    Unavailable(String),
}
