//! Handoffs as they are saved.

use cloister_runtime::spec::HandoffFilter;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::check_name;
use crate::agents::definition_graphql::HandoffFilter as Filter;
use crate::agents::graphql::agent_id;
use crate::agents::input_graphql::HandoffInput;
use crate::error::UserError;
use crate::input::Checks;

const MAX_HANDOFFS: usize = 64;
/// The most items that LAST_N may leave.
const MAX_LAST_N: i32 = 1_000;

/// A handoff as it was saved; names left out follow the target.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HandoffDraft {
    /// The target.
    pub agent_id: Uuid,
    /// The name of its tool.
    pub tool_name: Option<String>,
    /// What the model is told of it.
    pub tool_description: Option<String>,
    /// What of the history the target is shown.
    #[serde(default)]
    pub filter: HandoffFilter,
    /// Whether the history goes as one summary.
    #[serde(default)]
    pub nest_history: bool,
}

/// Handoffs from what came in; whether their targets exist is the database's to say.
pub fn checked(handoffs: Vec<HandoffInput>, checks: &mut Checks) -> Vec<HandoffDraft> {
    checks.count("handoffs", handoffs.len(), MAX_HANDOFFS);
    handoffs.into_iter().enumerate().map(|(at, handoff)| draft(at, handoff, checks)).collect()
}

fn draft(at: usize, handoff: HandoffInput, checks: &mut Checks) -> HandoffDraft {
    let field = |name: &str| format!("handoffs.{at}.{name}");
    if let Some(name) = &handoff.tool_name {
        check_name(checks, &field("toolName"), name);
    }
    if let Some(description) = &handoff.tool_description {
        checks.text(&field("toolDescription"), description, 0, 1_024);
    }
    let filter = match (handoff.input_filter.unwrap_or(Filter::None), handoff.last_n) {
        (Filter::LastN, Some(count)) => {
            checks.range(&field("lastN"), count, 1, MAX_LAST_N);
            HandoffFilter::LastN(count.unsigned_abs())
        }
        (Filter::LastN, None) => {
            checks.push(UserError::invalid(&field("lastN"), "LAST_N needs lastN: how many items are kept."));
            HandoffFilter::None
        }
        (filter, last_n) => {
            if last_n.is_some() {
                checks.push(UserError::invalid(&field("lastN"), "This goes with the inputFilter LAST_N only."));
            }
            if filter == Filter::RemoveTools { HandoffFilter::RemoveTools } else { HandoffFilter::None }
        }
    };
    let nest_history = handoff.nest_history.unwrap_or(false);
    if nest_history && handoff.input_filter.is_some_and(|filter| filter != Filter::None) {
        let message = "Give inputFilter or nestHistory, not both: a summary is made of all the history.";
        checks.push(UserError::invalid(&field("nestHistory"), message));
    }
    HandoffDraft {
        agent_id: agent_id(&handoff.agent_id),
        tool_name: handoff.tool_name,
        tool_description: handoff.tool_description,
        filter,
        nest_history,
    }
}
