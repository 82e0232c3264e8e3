//! From what a model streams to what subscribers see: offsets, and the ids that the journal will have.

use std::collections::HashMap;

use crate::journal::Progress;
use crate::model::ModelEvent;
use crate::recorder::{CallIds, TurnRecorder};

/// The deltas of a response, over all attempts at it.
#[derive(Debug)]
pub struct Deltas {
    turn: u32,
    /// The ids as they are before an attempt.
    unassigned: CallIds,
    ids: CallIds,
    /// Bytes seen, by part.
    seen: HashMap<u32, usize>,
}

impl Deltas {
    /// None seen yet.
    pub fn new(recorder: &TurnRecorder) -> Self {
        let ids = recorder.call_ids();
        Self { turn: recorder.turn, unassigned: ids.clone(), ids, seen: HashMap::new() }
    }

    /// What subscribers are told of an event; nothing of the response's end, which its items tell.
    pub fn of(&mut self, event: ModelEvent) -> Option<Progress> {
        let turn = self.turn;
        match event {
            ModelEvent::Text { index, text } => {
                Some(Progress::Text { turn, index, offset: self.advance(index, &text), text })
            }
            ModelEvent::Arguments { index, call_id, name, text } => {
                let call_id = self.ids.assign(index, &call_id);
                Some(Progress::Arguments { turn, index, call_id, name, offset: self.advance(index, &text), text })
            }
            ModelEvent::Restarted => {
                self.ids = self.unassigned.clone();
                self.seen.clear();
                Some(Progress::Restarted { turn })
            }
            ModelEvent::Done { .. } => None,
        }
    }

    /// Where `text` stands in its part.
    fn advance(&mut self, index: u32, text: &str) -> u32 {
        let seen = self.seen.entry(index).or_default();
        let offset = *seen;
        *seen += text.len();
        // A response is bounded far below that.
        u32::try_from(offset).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_are_bytes_and_ids_the_journals() {
        let recorder = TurnRecorder {
            turn: 3,
            agent_name: "A".into(),
            scope: None,
            is_final: true,
            from_sequence: 7,
            used_call_ids: ["call_0".to_owned()].into(),
        };
        let mut deltas = Deltas::new(&recorder);
        let said = |text: &str| ModelEvent::Text { index: 1, text: text.into() };
        let text = |offset, text: &str| Some(Progress::Text { turn: 3, index: 1, offset, text: text.into() });
        assert_eq!(deltas.of(said("né")), text(0, "né"));
        assert_eq!(deltas.of(said("e")), text(3, "e"));
        let called = |call_id: &str, text: &str| ModelEvent::Arguments {
            index: 2,
            call_id: call_id.into(),
            name: "t".into(),
            text: text.into(),
        };
        let arguments = |offset, text: &str| {
            let (call_id, name) = ("call_3_2".to_owned(), "t".to_owned());
            Some(Progress::Arguments { turn: 3, index: 2, call_id, name, offset, text: text.into() })
        };
        assert_eq!(deltas.of(called("call_0", "{")), arguments(0, "{"));
        assert_eq!(deltas.of(called("", "}")), arguments(1, "}"));
        assert_eq!(deltas.of(ModelEvent::Restarted), Some(Progress::Restarted { turn: 3 }));
        assert_eq!(deltas.of(said("n")), text(0, "n"));
        assert_eq!(deltas.of(called("call_0", "{}")), arguments(0, "{}"));
    }
}
