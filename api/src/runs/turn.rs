//! What is being streamed of a turn.
//!
//! A delta says which attempt at which turn it belongs to and where its text stands, so whoever takes it knows whether
//! it continues what he has, repeats it, or leaves a gap, whichever way it came.

use std::collections::BTreeMap;

use cloister_runtime::journal::Progress;
use serde::{Deserialize, Serialize};

/// Which attempt at a turn: a later one, by whichever worker, makes the text of those before it void.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Attempt {
    /// The worker's fencing token.
    pub fence: i64,
    /// The turn, from 1.
    pub turn: u32,
    /// How often this worker began the turn anew.
    pub restarts: u32,
}

/// Progress within an attempt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Delta {
    /// The attempt it belongs to.
    pub attempt: Attempt,
    /// What is new.
    pub progress: Progress,
}

impl Delta {
    /// Takes in what follows directly on this text. False if it doesn't.
    pub fn append(&mut self, next: &Delta) -> bool {
        self.attempt == next.attempt && append(&mut self.progress, &next.progress)
    }
}

/// A text delta's part of the response, and where its text begins and ends, in bytes. None for a new beginning.
pub fn span(progress: &Progress) -> Option<(u32, u32, u32)> {
    match progress {
        Progress::Text { index, offset, text, .. } | Progress::Arguments { index, offset, text, .. } => {
            Some((*index, *offset, offset.saturating_add(u32::try_from(text.len()).unwrap_or(u32::MAX))))
        }
        Progress::Restarted { .. } => None,
    }
}

/// What of a text lies beyond the first `have` bytes of its part. None if nothing does, or if it would leave a gap.
pub fn beyond(progress: &Progress, have: u32) -> Option<Progress> {
    let (_, begin, end) = span(progress)?;
    if begin > have || end <= have {
        return None;
    }
    let mut rest = progress.clone();
    if let Progress::Text { offset, text, .. } | Progress::Arguments { offset, text, .. } = &mut rest {
        *text = text.get((have - begin) as usize..)?.to_owned();
        *offset = have;
    }
    Some(rest)
}

fn append(whole: &mut Progress, next: &Progress) -> bool {
    let follows = match (span(whole), span(next)) {
        (Some((part, _, end)), Some((next_part, begin, _))) => part == next_part && end == begin,
        _ => false,
    };
    match (whole, next) {
        (Progress::Text { text, .. }, Progress::Text { text: more, .. })
        | (Progress::Arguments { text, .. }, Progress::Arguments { text: more, .. })
            if follows =>
        {
            text.push_str(more);
            true
        }
        _ => false,
    }
}

/// What has been streamed of the turn in progress.
#[derive(Clone, Debug, Default)]
pub struct Turn {
    attempt: Attempt,
    restarted: bool,
    parts: BTreeMap<u32, Progress>,
}

impl Turn {
    /// The turn so far, as one delta a part; first of all whether it began anew.
    pub fn so_far(self) -> impl Iterator<Item = Delta> {
        let Turn { attempt, restarted, parts } = self;
        let restarted = restarted.then_some(Progress::Restarted { turn: attempt.turn });
        restarted.into_iter().chain(parts.into_values()).map(move |progress| Delta { attempt, progress })
    }

    /// The attempt that progress by this worker belongs to. None if another has overtaken it.
    pub fn attempt_of(&self, fence: i64, progress: &Progress) -> Option<Attempt> {
        let (turn, begins_anew) = match progress {
            Progress::Text { turn, .. } | Progress::Arguments { turn, .. } => (*turn, false),
            Progress::Restarted { turn } => (*turn, true),
        };
        let now = self.attempt;
        match (fence, turn) == (now.fence, now.turn) {
            true => Some(Attempt { restarts: now.restarts + u32::from(begins_anew), ..now }),
            false => Some(Attempt { fence, turn, restarts: 0 }).filter(|attempt| *attempt > now),
        }
    }

    /// Keeps nothing but the attempt: what a worker that was overtaken may still say stays void.
    pub fn clear(&mut self) {
        self.restarted = false;
        self.parts.clear();
    }

    /// Takes a delta in; returns what of it is new.
    pub fn take(&mut self, delta: &Delta) -> Option<Delta> {
        let begins_anew = matches!(delta.progress, Progress::Restarted { .. });
        if delta.attempt < self.attempt || (begins_anew && delta.attempt == self.attempt) {
            return None;
        }
        if delta.attempt > self.attempt {
            *self = Turn { attempt: delta.attempt, restarted: begins_anew, parts: BTreeMap::new() };
        }
        if begins_anew {
            return Some(delta.clone());
        }
        let (index, ..) = span(&delta.progress)?;
        let have = self.parts.get(&index).and_then(span).map_or(0, |(_, _, end)| end);
        let fresh = beyond(&delta.progress, have)?;
        match self.parts.get_mut(&index) {
            Some(part) => drop(append(part, &fresh)),
            None => drop(self.parts.insert(index, fresh.clone())),
        }
        Some(Delta { attempt: delta.attempt, progress: fresh })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delta(fence: i64, turn: u32, restarts: u32, offset: u32, text: &str) -> Delta {
        let progress = Progress::Text { turn, index: 0, offset, text: text.to_owned() };
        Delta { attempt: Attempt { fence, turn, restarts }, progress }
    }

    fn told(turn: Turn) -> Vec<Delta> {
        turn.so_far().collect()
    }

    #[test]
    fn a_turn_takes_what_continues_it_and_nothing_else() {
        let mut turn = Turn::default();
        assert_eq!(turn.take(&delta(1, 1, 0, 0, "Grü")), Some(delta(1, 1, 0, 0, "Grü")));
        assert_eq!(turn.take(&delta(1, 1, 0, 0, "Grüße")), Some(delta(1, 1, 0, 4, "ße")), "what is known is left out");
        assert_eq!(turn.take(&delta(1, 1, 0, 0, "Grü")), None, "a repeat");
        assert_eq!(turn.take(&delta(1, 1, 0, 9, "?")), None, "a gap");
        assert_eq!(told(turn.clone()), [delta(1, 1, 0, 0, "Grüße")]);
        assert_eq!(turn.take(&delta(2, 1, 0, 0, "New")), Some(delta(2, 1, 0, 0, "New")));
        assert_eq!(turn.take(&delta(1, 1, 0, 7, "old")), None, "a worker that was overtaken");
        assert_eq!(turn.take(&delta(2, 2, 0, 5, "late")), None, "the beginning was missed");
        assert_eq!(told(turn), []);
    }

    #[test]
    fn a_new_beginning_is_an_attempt_of_its_own() {
        let mut turn = Turn::default();
        let anew = Progress::Restarted { turn: 3 };
        let attempt = turn.attempt_of(2, &anew).expect("nobody has overtaken it");
        assert_eq!(attempt, Attempt { fence: 2, turn: 3, restarts: 0 });
        let first = Delta { attempt, progress: anew.clone() };
        assert_eq!((turn.take(&first), turn.take(&first)), (Some(first.clone()), None));
        turn.take(&delta(2, 3, 0, 0, "one"));
        let second = Delta { attempt: turn.attempt_of(2, &anew).expect("the same worker"), progress: anew };
        assert_eq!(second.attempt.restarts, 1);
        turn.take(&second);
        turn.take(&delta(2, 3, 1, 0, "two"));
        assert_eq!(told(turn.clone()), [second, delta(2, 3, 1, 0, "two")]);
        assert_eq!(turn.attempt_of(1, &Progress::Restarted { turn: 4 }), None);
        assert_eq!(turn.attempt_of(2, &Progress::Restarted { turn: 2 }), None);
    }
}
