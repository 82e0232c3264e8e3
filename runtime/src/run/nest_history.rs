//! What of a conversation an agent is shown that takes over: the SDK's `nest_handoff_history` byte for byte
//! (`handoffs/history.py`), its `remove_all_tools`, and our last-n filter.

mod dict;
mod summary;

use std::collections::HashSet;

use serde_json::Value;

use crate::item::InputItem;

/// The SDK's nested history: what the next agent is shown in place of all that went before.
///
/// `history` is what the run began with, its input included, or what the last nested handoff made of it; `earlier` is
/// what the run's turns added since, and `turn` what the turn of the handoff added, the handoff's own pair included.
pub fn nest(history: &[InputItem], earlier: &[InputItem], turn: &[InputItem]) -> Vec<InputItem> {
    let mut nested = Vec::new();
    let mut pending = summary::flatten(history.iter().map(dict::of));
    let earlier = earlier.iter().map(|item| (item, is_shown_of_earlier(item)));
    for (item, is_shown) in earlier.chain(turn.iter().map(|item| (item, is_shown_of_turn(item)))) {
        if !is_shown {
            pending.push(dict::of(item));
            continue;
        }
        if !pending.is_empty() || nested.is_empty() {
            nested.push(summary::of(&std::mem::take(&mut pending)));
        }
        nested.push(item.clone());
    }
    if !pending.is_empty() || nested.is_empty() {
        nested.push(summary::of(&pending));
    }
    nested
}

/// Whether an item of an earlier turn stays beside the summary.
fn is_shown_of_earlier(item: &InputItem) -> bool {
    match item {
        InputItem::User { .. } => true,
        InputItem::HostedCall { raw } => !is_of_a_program(raw),
        _ => false,
    }
}

/// Whether an item of the handoff's own turn stays beside the summary.
fn is_shown_of_turn(item: &InputItem) -> bool {
    is_shown_of_earlier(item) || matches!(item, InputItem::Assistant { .. } | InputItem::Summary { .. })
}

/// Hosted programs are summarised whole.
fn is_of_a_program(raw: &Value) -> bool {
    matches!(raw["type"].as_str(), Some("program" | "program_output")) || raw["caller"]["type"] == "program"
}

/// All but tools: the SDK's `remove_all_tools`.
pub fn remove_tools(items: &[InputItem]) -> Vec<InputItem> {
    let stays = |item: &&InputItem| {
        matches!(item, InputItem::User { .. } | InputItem::Assistant { .. } | InputItem::Summary { .. })
    };
    items.iter().filter(stays).cloned().collect()
}

/// At most the last `n` items. Nothing is torn apart that providers want whole: an output is dropped without its call,
/// a call without its output, and what a response said or called without the reasoning before it.
pub fn last_n(items: &[InputItem], n: usize) -> Vec<InputItem> {
    let mut start = items.len().saturating_sub(n);
    let response_start = items[..start].iter().rposition(|item| !is_of_response(item)).map_or(0, |last| last + 1);
    if items[response_start..start].iter().any(|item| matches!(item, InputItem::Reasoning { .. })) {
        start += items[start..].iter().take_while(|item| is_of_response(item)).count();
    }
    let kept = &items[start..];
    let calls: HashSet<&str> = kept.iter().filter_map(called).collect();
    let outputs: HashSet<&str> = kept.iter().filter_map(answered).collect();
    let mut whole: Vec<InputItem> = Vec::with_capacity(kept.len());
    for item in kept {
        let is_torn = called(item).is_some_and(|id| !outputs.contains(id))
            || answered(item).is_some_and(|id| !calls.contains(id));
        if !is_torn {
            whole.push(item.clone());
        } else if called(item).is_some() {
            while matches!(whole.last(), Some(InputItem::Reasoning { .. })) {
                whole.pop();
            }
        }
    }
    whole
}

fn is_of_response(item: &InputItem) -> bool {
    matches!(
        item,
        InputItem::Reasoning { .. }
            | InputItem::Assistant { .. }
            | InputItem::ToolCall { .. }
            | InputItem::HostedCall { .. }
    )
}

fn called(item: &InputItem) -> Option<&str> {
    match item {
        InputItem::ToolCall { call_id, .. } => Some(call_id),
        _ => None,
    }
}

fn answered(item: &InputItem) -> Option<&str> {
    match item {
        InputItem::ToolOutput { call_id, .. } => Some(call_id),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
