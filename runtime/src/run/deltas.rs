//! From what a model streams to what subscribers see: offsets, and the ids that the journal will have.

use std::collections::HashMap;

use crate::journal::Progress;
use crate::recorder::{CallIds, TurnRecorder};

/// The deltas of one attempt at a response.
#[derive(Debug)]
pub struct Deltas {
    turn: u32,
    ids: CallIds,
    /// Bytes seen, by part.
    seen: HashMap<u32, usize>,
}

impl Deltas {
    /// None seen yet.
    pub fn new(recorder: &TurnRecorder) -> Self {
        Self { turn: recorder.turn, ids: recorder.call_ids(), seen: HashMap::new() }
    }

    /// More text of a message.
    pub fn text(&mut self, index: u32, text: String) -> Progress {
        Progress::Text { turn: self.turn, index, offset: self.advance(index, &text), text }
    }

    /// More of a call's arguments.
    pub fn arguments(&mut self, index: u32, provider_id: &str, name: String, text: String) -> Progress {
        let call_id = self.ids.assign(index, provider_id);
        Progress::Arguments { turn: self.turn, index, call_id, name, offset: self.advance(index, &text), text }
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
            model: "m".into(),
            from_sequence: 7,
            used_call_ids: ["call_0".to_owned()].into(),
        };
        let mut deltas = Deltas::new(&recorder);
        let text = |offset, text: &str| Progress::Text { turn: 3, index: 1, offset, text: text.into() };
        assert_eq!(deltas.text(1, "né".into()), text(0, "né"));
        assert_eq!(deltas.text(1, "e".into()), text(3, "e"));
        let arguments = |offset, text: &str| Progress::Arguments {
            turn: 3,
            index: 2,
            call_id: "call_3_2".into(),
            name: "t".into(),
            offset,
            text: text.into(),
        };
        assert_eq!(deltas.arguments(2, "call_0", "t".into(), "{".into()), arguments(0, "{"));
        assert_eq!(deltas.arguments(2, "", "t".into(), "}".into()), arguments(1, "}"));
    }
}
