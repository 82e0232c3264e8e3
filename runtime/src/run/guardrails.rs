//! The rules of guardrails: what they make of a text. No reason quotes the text, which may have to be withheld.

use regex::{Regex, RegexBuilder};
use serde::Deserialize;
use serde_json::Value;
use uuid::Uuid;

use crate::schema;
use crate::spec::GuardrailRule;

/// The most bytes that a compiled pattern may take: what a match costs grows with it.
const MAX_PATTERN_BYTES: usize = 10 * 1024 * 1024;

/// The longest reason of an agent that is kept, in characters.
const MAX_REASON: usize = 1_000;

/// What a rule makes of a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing is wrong with it.
    Passes,
    /// It is not to go on.
    Trips {
        /// Why.
        reason: String,
    },
    /// An agent is to say.
    Asks {
        /// The agent.
        agent_id: Uuid,
    },
}

/// Judges a text. Matching takes time in proportion to its length, and to the size of the pattern: see that it keeps nobody waiting.
pub fn judge(rule: &GuardrailRule, text: &str) -> Verdict {
    let problem = match rule {
        GuardrailRule::Agent { agent_id } => return Verdict::Asks { agent_id: *agent_id },
        GuardrailRule::Regex { pattern, trip_on_match } => by_pattern(pattern, *trip_on_match, text),
        GuardrailRule::MaxLength { characters } => by_length(*characters, text),
        GuardrailRule::JsonSchema { schema } => by_schema(schema, text),
    };
    problem.map_or(Verdict::Passes, |reason| Verdict::Trips { reason })
}

/// Whether a pattern can be used.
///
/// # Errors
/// What is wrong with it, for whoever wrote it.
pub fn check_pattern(pattern: &str) -> Result<(), String> {
    compile(pattern).map(drop).map_err(|error| match error {
        regex::Error::CompiledTooBig(_) => "it is too large: its repetitions multiply".to_owned(),
        error => error.to_string(),
    })
}

fn compile(pattern: &str) -> Result<Regex, regex::Error> {
    RegexBuilder::new(pattern).size_limit(MAX_PATTERN_BYTES).build()
}

fn by_pattern(pattern: &str, trip_on_match: bool, text: &str) -> Option<String> {
    let Ok(pattern) = compile(pattern) else { return Some("its pattern can't be used".to_owned()) };
    match (pattern.is_match(text), trip_on_match) {
        (true, true) => Some("the text matches its pattern".to_owned()),
        (false, false) => Some("the text does not match its pattern".to_owned()),
        _ => None,
    }
}

fn by_length(most: u32, text: &str) -> Option<String> {
    let characters = text.chars().count();
    let is_longer = u32::try_from(characters).map_or(true, |characters| characters > most);
    is_longer.then(|| format!("the text has {characters} characters, more than {most}"))
}

fn by_schema(schema: &Value, text: &str) -> Option<String> {
    match serde_json::from_str(text) {
        Ok(value) => {
            schema::misfit(schema, &value).map(|keyword| format!("the text does not fit its schema, by {keyword:?}"))
        }
        Err(_) => Some("the text is not JSON".to_owned()),
    }
}

/// What a guardrail's agent answers.
#[derive(Deserialize)]
struct Answer {
    tripped: bool,
    reason: String,
}

/// Why an agent says that a text trips; none if it says that it doesn't.
///
/// # Errors
/// Its answer is no verdict; what is wrong with it.
pub fn read_verdict(answer: &str) -> Result<Option<String>, String> {
    let answer: Answer = serde_json::from_str(answer)
        .map_err(|_| "its answer is no object with tripped, a boolean, and reason, a string".to_owned())?;
    let reason = || if answer.reason.trim().is_empty() { "its agent gave no reason" } else { &answer.reason };
    Ok(answer.tripped.then(|| reason().chars().take(MAX_REASON).collect()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn trips(rule: &GuardrailRule, text: &str) -> bool {
        match judge(rule, text) {
            Verdict::Passes => false,
            Verdict::Trips { reason } => {
                assert!(!text.contains("hush") || !reason.contains("hush"), "{reason}");
                true
            }
            Verdict::Asks { .. } => panic!("asks"),
        }
    }

    fn pattern(pattern: &str, trip_on_match: bool) -> GuardrailRule {
        GuardrailRule::Regex { pattern: pattern.into(), trip_on_match }
    }

    #[test]
    fn patterns_trip_on_a_match_or_on_none() {
        for (rule, text, expected) in [
            (pattern("secret", true), "a secret, hush", true),
            (pattern("secret", true), "nothing", false),
            (pattern("^yes$", false), "hush: no", true),
            (pattern("^yes$", false), "yes", false),
            (pattern(r"(?i)\bpässword\b", true), "Mein PÄSSWORD", true),
            (pattern(r"^\d{3}$", false), "123\n", true),
            (pattern("", true), "", true),
            (pattern("(", true), "hush", true),
            (pattern("(", false), "hush", true),
        ] {
            assert_eq!(trips(&rule, text), expected, "{rule:?} on {text:?}");
        }
    }

    #[test]
    fn patterns_are_linear_and_bounded() {
        assert_eq!(check_pattern(r"(?i)[\w.]{1,64}@\w+"), Ok(()));
        for bad in ["(", r"(a)\1", "(?=a)", "[z-a]", "(?:a{999}){999}", r"(?:\w{999}){9}"] {
            assert!(check_pattern(bad).is_err(), "{bad}");
        }
        // Backtracking would take longer than the universe lasts.
        assert!(!trips(&pattern("^(a+)+$", true), &format!("{}!", "a".repeat(100_000))));
    }

    #[test]
    fn length_is_counted_in_code_points() {
        let rule = GuardrailRule::MaxLength { characters: 3 };
        for (text, expected) in
            [("", false), ("abc", false), ("äöü", false), ("😀😀😀", false), ("abcd", true), ("e\u{301}e\u{301}", true)]
        {
            assert_eq!(trips(&rule, text), expected, "{text:?}");
        }
    }

    #[test]
    fn what_is_no_json_or_does_not_fit_trips() {
        let schema = json!({ "type": "object", "required": ["a"], "additionalProperties": { "type": "integer" } });
        let rule = GuardrailRule::JsonSchema { schema };
        for (text, expected) in [
            (r#"{"a": 1}"#, false),
            (r#"{"a": 1, "b": 2}"#, false),
            ("hush", true),
            (r#"{"a": 1} hush"#, true),
            (r#"{"a": "hush"}"#, true),
            (r#"{"hush": 1}"#, true),
            (r#"{"a": 1, "hush": "x"}"#, true),
            ("[]", true),
        ] {
            assert_eq!(trips(&rule, text), expected, "{text}");
        }
        let broken = GuardrailRule::JsonSchema { schema: json!({ "type": "nonsense" }) };
        assert!(trips(&broken, "{}"));
    }

    #[test]
    fn an_agent_is_asked_and_its_answer_read() {
        let agent_id = Uuid::now_v7();
        assert_eq!(judge(&GuardrailRule::Agent { agent_id }, "text"), Verdict::Asks { agent_id });
        assert_eq!(read_verdict(r#"{"tripped": false, "reason": "fine"}"#), Ok(None));
        assert_eq!(read_verdict(r#" {"reason": "rude", "tripped": true} "#), Ok(Some("rude".into())));
        assert_eq!(read_verdict(r#"{"tripped": true, "reason": " "}"#), Ok(Some("its agent gave no reason".into())));
        let long = json!({ "tripped": true, "reason": "ä".repeat(2_000) }).to_string();
        assert_eq!(read_verdict(&long), Ok(Some("ä".repeat(1_000))));
        for answer in
            ["", "yes", "{}", r#"{"tripped": "true", "reason": "r"}"#, r#"{"tripped": true}"#, "[true, \"r\"]x"]
        {
            assert!(read_verdict(answer).is_err(), "{answer}");
        }
    }
}
