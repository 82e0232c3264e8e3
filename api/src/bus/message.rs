//! What is told, and in which channel.

use std::sync::Arc;

use cloister_runtime::item::Item;
use entity::runs;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::runs::turn::Delta;

/// Who is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Topic {
    /// Every replica.
    Everyone,
    /// Replicas where somebody listens to a tenant's changes.
    Tenant(Uuid),
    /// Replicas where somebody follows a run.
    Run(Uuid),
}

impl Topic {
    pub(super) fn channel(self, prefix: &str) -> String {
        match self {
            Topic::Everyone => format!("{prefix}everyone"),
            Topic::Tenant(id) => format!("{prefix}tenant:{id}"),
            Topic::Run(id) => format!("{prefix}run:{id}"),
        }
    }

    pub(super) fn of_channel(prefix: &str, channel: &str) -> Option<Self> {
        match channel.strip_prefix(prefix)?.split_once(':') {
            None => Some(Topic::Everyone),
            Some(("tenant", id)) => id.parse().ok().map(Topic::Tenant),
            Some(("run", id)) => id.parse().ok().map(Topic::Run),
            Some(_) => None,
        }
    }
}

/// What is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    /// A pool's queue may hold something to claim.
    Wake(String),
    /// Claims of a run up to this fencing token are void.
    Abandon {
        /// The run.
        run_id: Uuid,
        /// The newest claim that is void.
        fence: i64,
    },
    /// A tenant, or a key of it, may have lost a right.
    Authority {
        /// The tenant.
        tenant_id: Uuid,
        /// The epoch that the change began.
        epoch: i64,
    },
    /// A run of the tenant as it is now, without its `spec`.
    Run(Arc<runs::Model>),
    /// The tenant's usage of this month has changed.
    Usage,
    /// How far the tenant's cluster has come with it has changed.
    Provisioning,
    /// Progress within a turn of the run.
    Delta(Arc<Delta>),
    /// Items of the run that were stored.
    Items {
        /// In their order.
        items: Arc<Vec<Item>>,
        /// Whether the last of them ends the run.
        ended: bool,
    },
    /// Items of the run were stored, too large to be told.
    Look {
        /// The sequence that the next item will have.
        next_sequence: i64,
        /// Whether the last of them ends the run.
        ended: bool,
    },
}

/// A message in a channel.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Told {
    /// The replica that tells; it hears itself, and takes no notice.
    pub from: Uuid,
    pub what: What,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_channel_names_its_topic() {
        for topic in [Topic::Everyone, Topic::Tenant(Uuid::now_v7()), Topic::Run(Uuid::now_v7())] {
            assert_eq!(Topic::of_channel("cloister:a:b:", &topic.channel("cloister:a:b:")), Some(topic));
            assert_eq!(Topic::of_channel("cloister:c:", &topic.channel("cloister:a:b:")), None);
        }
    }
}
