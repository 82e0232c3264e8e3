//! `RunItem` and its kinds, and the events of `runEvents`.
#![allow(missing_docs)] // fields and inputs are what the schema says they are

use async_graphql::connection::Connection;
use async_graphql::{Enum, Interface, Result, SimpleObject, Union};
use chrono::{DateTime, Utc};
use cloister_runtime::item::{self, Body, Item};
use cloister_runtime::journal::Progress;
use entity::run_items;

use super::events::Event;
use super::graphql::RunError;
use super::journal::from_row;
use super::status::RunStatus;
use crate::agents::guardrails_graphql::GuardrailStage;
use crate::error::Error;
use crate::graphql::page::{Cursor, Page};
use crate::usage::graphql::TokenUsage;

/// A durable step of a run. `sequence` starts at 1 and has no gaps. `turn` is null outside a turn.
#[derive(Interface)]
#[graphql(
    field(name = "sequence", ty = "&i32"),
    field(name = "created_at", ty = "&DateTime<Utc>"),
    field(name = "agent_name", ty = "&String"),
    field(name = "turn", ty = "&Option<i32>"),
    field(
        name = "scope",
        ty = "&Option<String>",
        desc = "The nested run it belongs to, by the calls that lead there; null: the run itself."
    )
)]
pub enum RunItem {
    Message(MessageItem),
    Reasoning(ReasoningItem),
    ToolCall(ToolCallItem),
    ToolOutput(ToolOutputItem),
    Approval(ApprovalItem),
    Handoff(HandoffItem),
    Guardrail(GuardrailItem),
    Usage(UsageItem),
    Status(StatusItem),
}

/// Who said a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Enum)]
#[graphql(remote = "item::Role")]
pub enum Role {
    User,
    Assistant,
}

#[derive(SimpleObject)]
pub struct MessageItem {
    sequence: i32,
    created_at: DateTime<Utc>,
    agent_name: String,
    turn: Option<i32>,
    /// The nested run it belongs to, by the calls that lead there; null: the run itself.
    scope: Option<String>,
    /// Joins it with its deltas.
    index: Option<i32>,
    role: Role,
    text: String,
}

#[derive(SimpleObject)]
pub struct ReasoningItem {
    sequence: i32,
    created_at: DateTime<Utc>,
    agent_name: String,
    turn: Option<i32>,
    /// The nested run it belongs to, by the calls that lead there; null: the run itself.
    scope: Option<String>,
    index: i32,
    text: String,
}

/// Handoffs are asked for by a tool call too.
#[derive(SimpleObject)]
pub struct ToolCallItem {
    sequence: i32,
    created_at: DateTime<Utc>,
    agent_name: String,
    turn: Option<i32>,
    /// The nested run it belongs to, by the calls that lead there; null: the run itself.
    scope: Option<String>,
    index: i32,
    call_id: String,
    name: String,
    arguments: String,
    arguments_hash: String,
}

#[derive(SimpleObject)]
pub struct ToolOutputItem {
    sequence: i32,
    created_at: DateTime<Utc>,
    agent_name: String,
    turn: Option<i32>,
    /// The nested run it belongs to, by the calls that lead there; null: the run itself.
    scope: Option<String>,
    call_id: String,
    output: String,
    is_error: bool,
}

#[derive(SimpleObject)]
pub struct ApprovalItem {
    sequence: i32,
    created_at: DateTime<Utc>,
    agent_name: String,
    turn: Option<i32>,
    /// The nested run it belongs to, by the calls that lead there; null: the run itself.
    scope: Option<String>,
    call_id: String,
    /// Null: asked, not decided.
    approved: Option<bool>,
}

/// The handoff took place: the output of its call.
#[derive(SimpleObject)]
pub struct HandoffItem {
    sequence: i32,
    created_at: DateTime<Utc>,
    agent_name: String,
    turn: Option<i32>,
    /// The nested run it belongs to, by the calls that lead there; null: the run itself.
    scope: Option<String>,
    call_id: String,
    to_agent_name: String,
}

#[derive(SimpleObject)]
pub struct GuardrailItem {
    sequence: i32,
    created_at: DateTime<Utc>,
    agent_name: String,
    turn: Option<i32>,
    /// The nested run it belongs to, by the calls that lead there; null: the run itself.
    scope: Option<String>,
    name: String,
    stage: GuardrailStage,
    reason: String,
}

#[derive(SimpleObject)]
pub struct UsageItem {
    sequence: i32,
    created_at: DateTime<Utc>,
    agent_name: String,
    turn: Option<i32>,
    /// The nested run it belongs to, by the calls that lead there; null: the run itself.
    scope: Option<String>,
    model: String,
    usage: TokenUsage,
}

#[derive(SimpleObject)]
pub struct StatusItem {
    sequence: i32,
    created_at: DateTime<Utc>,
    agent_name: String,
    turn: Option<i32>,
    /// The nested run it belongs to, by the calls that lead there; null: the run itself.
    scope: Option<String>,
    status: RunStatus,
    error: Option<RunError>,
}

fn int(number: impl TryInto<i32>) -> i32 {
    number.try_into().unwrap_or(i32::MAX)
}

impl From<Item> for RunItem {
    fn from(item: Item) -> Self {
        let (sequence, created_at) = (int(item.sequence), item.created_at);
        let (agent_name, turn, scope) = (item.step.agent_name, item.step.turn.map(int), item.step.scope);
        match item.step.body {
            Body::Message { index, role, text, .. } => RunItem::Message(MessageItem {
                sequence,
                created_at,
                agent_name,
                turn,
                scope,
                index: index.map(int),
                role: role.into(),
                text,
            }),
            Body::Reasoning { index, text, .. } => RunItem::Reasoning(ReasoningItem {
                sequence,
                created_at,
                agent_name,
                turn,
                scope,
                index: int(index),
                text,
            }),
            Body::ToolCall { index, call_id, name, arguments, arguments_hash, .. } => RunItem::ToolCall(ToolCallItem {
                sequence,
                created_at,
                agent_name,
                turn,
                scope,
                index: int(index),
                call_id,
                name,
                arguments,
                arguments_hash,
            }),
            Body::ToolOutput { call_id, output, is_error, .. } => RunItem::ToolOutput(ToolOutputItem {
                sequence,
                created_at,
                agent_name,
                turn,
                scope,
                call_id,
                output,
                is_error,
            }),
            Body::Handoff { call_id, to_agent_name, .. } => {
                RunItem::Handoff(HandoffItem { sequence, created_at, agent_name, turn, scope, call_id, to_agent_name })
            }
            Body::Usage { model, usage, .. } => {
                RunItem::Usage(UsageItem { sequence, created_at, agent_name, turn, scope, model, usage: usage.into() })
            }
            Body::Approval { call_id, approved, .. } => {
                RunItem::Approval(ApprovalItem { sequence, created_at, agent_name, turn, scope, call_id, approved })
            }
            Body::Guardrail { name, stage, reason, .. } => RunItem::Guardrail(GuardrailItem {
                sequence,
                created_at,
                agent_name,
                turn,
                scope,
                name,
                stage: stage.into(),
                reason,
            }),
            Body::Status { status, error, .. } => RunItem::Status(StatusItem {
                sequence,
                created_at,
                agent_name,
                turn,
                scope,
                status: status.into(),
                error: error.map(Into::into),
            }),
        }
    }
}

impl ToolCallItem {
    /// The item of a call.
    pub fn of(item: Item) -> Option<Self> {
        match RunItem::from(item) {
            RunItem::ToolCall(call) => Some(call),
            _ => None,
        }
    }
}

impl RunItem {
    /// A page of a run's items.
    pub fn page(page: Page<run_items::Model>) -> Result<Connection<Cursor, RunItem>> {
        Self::connection(page, |row| Cursor::Number(row.sequence))
    }

    /// A page of a conversation's messages, which lie in several runs.
    pub fn messages(page: Page<run_items::Model>) -> Result<Connection<Cursor, RunItem>> {
        Self::connection(page, |row| Cursor::Item(row.run_id, row.sequence))
    }

    fn connection(
        page: Page<run_items::Model>,
        cursor: impl Fn(&run_items::Model) -> Cursor,
    ) -> Result<Connection<Cursor, RunItem>> {
        let page = page.try_map(|row| Ok::<_, Error>((cursor(&row), from_row(row)?)))?;
        Ok(page.connection(|(cursor, item)| (cursor, item.into())))
    }
}

/// What `runEvents` tells.
#[derive(Union)]
pub enum RunEvent {
    Item(RunItemAdded),
    Text(TextDelta),
    Arguments(ArgumentsDelta),
    Restarted(TurnRestarted),
}

#[derive(SimpleObject)]
pub struct RunItemAdded {
    item: RunItem,
}

/// Text of the message in progress: it stands at `offset` (bytes of UTF-8). Below the length you have it
/// overlaps; above it, wait for the item. The stored item with the same `turn` and `index` replaces its
/// deltas.
#[derive(SimpleObject)]
pub struct TextDelta {
    turn: i32,
    index: i32,
    offset: i32,
    text: String,
}

#[derive(SimpleObject)]
pub struct ArgumentsDelta {
    turn: i32,
    index: i32,
    call_id: String,
    name: String,
    offset: i32,
    text: String,
}

/// The worker that ran this turn died: forget the turn's deltas.
#[derive(SimpleObject)]
pub struct TurnRestarted {
    turn: i32,
}

impl From<Event> for RunEvent {
    fn from(event: Event) -> Self {
        match event {
            Event::Item(item) => RunEvent::Item(RunItemAdded { item: item.into() }),
            Event::Progress(Progress::Text { turn, index, offset, text }) => {
                RunEvent::Text(TextDelta { turn: int(turn), index: int(index), offset: int(offset), text })
            }
            Event::Progress(Progress::Arguments { turn, index, call_id, name, offset, text }) => {
                RunEvent::Arguments(ArgumentsDelta {
                    turn: int(turn),
                    index: int(index),
                    call_id,
                    name,
                    offset: int(offset),
                    text,
                })
            }
            Event::Progress(Progress::Restarted { turn }) => RunEvent::Restarted(TurnRestarted { turn: int(turn) }),
        }
    }
}
