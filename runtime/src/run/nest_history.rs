//! Placeholder.
#![allow(missing_docs)]
use crate::item::InputItem;
pub fn nest(history: &[InputItem], items: &[InputItem]) -> Vec<InputItem> {
    history.iter().chain(items).cloned().collect()
}
pub fn remove_tools(items: &[InputItem]) -> Vec<InputItem> {
    items.to_vec()
}
pub fn last_n(items: &[InputItem], _count: usize) -> Vec<InputItem> {
    items.to_vec()
}
