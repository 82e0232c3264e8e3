//! Provider's words made fit to be shown.

use secrecy::{ExposeSecret, SecretString};

/// The most characters of a provider's message that are passed on.
const MAX_CHARS: usize = 500;

/// Shorter keys are placeholders (`none`, `x`) of servers that check none; to take them out
/// would only garble messages.
const MIN_KEY_BYTES: usize = 8;

/// How much of our key's beginning gives a word away: providers echo keys abridged.
const KEY_HEAD_BYTES: usize = 6;

const REDACTED: &str = "[redacted]";

/// Takes out of a provider's messages what looks like our key to it.
#[derive(Debug)]
pub(super) struct Redactor {
    key: Option<SecretString>,
}

impl Redactor {
    /// Knows the key that must not show.
    pub(super) fn new(key: Option<SecretString>) -> Self {
        Self { key: key.filter(|key| key.expose_secret().len() >= MIN_KEY_BYTES) }
    }

    /// The message on one line, without keys, of at most 500 characters.
    pub(super) fn clean(&self, message: &str) -> String {
        let mut clean = String::new();
        for word in message.split_whitespace() {
            if !clean.is_empty() {
                clean.push(' ');
            }
            clean.push_str(if self.gives_away_a_key(word) { REDACTED } else { word });
        }
        match clean.char_indices().nth(MAX_CHARS) {
            Some((end, _)) => format!("{}…", &clean[..end]),
            None => clean,
        }
    }

    fn gives_away_a_key(&self, word: &str) -> bool {
        let key = self.key.as_ref().map(|key| key.expose_secret());
        key.is_some_and(|key| word.contains(key))
            || word.contains("**")
            || word.split(|c: char| !c.is_ascii_alphanumeric() && !"-_.".contains(c)).any(|piece| {
                piece.starts_with("sk-")
                    || key.is_some_and(|key| piece.get(..KEY_HEAD_BYTES).is_some_and(|head| key.starts_with(head)))
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn redactor() -> Redactor {
        Redactor::new(Some("gsk_0123456789abcdef".into()))
    }

    #[test]
    fn keys_are_taken_out_whole_and_abridged() {
        let clean = redactor().clean("Incorrect key: gsk_0123456789abcdef, (gsk_01...cdef)\n'sk-proj-1' sk-a****z ok");
        assert_eq!(clean, "Incorrect key: [redacted] [redacted] [redacted] [redacted] ok");
    }

    #[test]
    fn other_words_stay() {
        let message = "The disk-based task-list of gpt-4o is too long: 'messages[3]'.";
        assert_eq!(redactor().clean(message), message);
        assert_eq!(Redactor::new(Some("x".into())).clean("next x"), "next x");
    }

    #[test]
    fn long_messages_are_shortened_between_characters() {
        let clean = redactor().clean(&"é".repeat(600));
        assert_eq!(clean.chars().count(), MAX_CHARS + 1);
    }
}
