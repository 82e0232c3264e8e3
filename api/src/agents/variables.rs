//! `{{variables}}` in instructions: proven by a publish, filled in when a run starts. What is filled in is not looked
//! at again, and nothing of a run's input ever is.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cloister_runtime::spec::Agents;
use serde_json::Value;
use uuid::Uuid;

use crate::error::{Outcome, Refusal, UserError, UserErrorCode};
use crate::input::Checks;

const OPEN: &str = "{{";
const CLOSE: &str = "}}";
const MAX_VARIABLES: usize = 100;
const MAX_NAME: usize = 64;
/// Characters of one value.
const MAX_VALUE: usize = 20_000;
/// Bytes that the values may add to the instructions of all the agents that a run can reach.
const MAX_ADDED: usize = 1_000_000;

/// A part of instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Piece<'a> {
    Text(&'a str),
    Variable(&'a str),
}

/// Takes instructions apart, and says in which lines braces begin no variable; there they are text. `\{{` is `{{`.
fn pieces(instructions: &str) -> (Vec<Piece<'_>>, Vec<usize>) {
    let (mut pieces, mut malformed) = (Vec::new(), Vec::new());
    let mut rest = instructions;
    while let Some(at) = rest.find(OPEN) {
        let (before, open) = rest.split_at(at);
        let after = &open[OPEN.len()..];
        let (before, piece, after) = match (before.strip_suffix('\\'), variable(after)) {
            (Some(before), _) => (before, Piece::Text(OPEN), after),
            (None, Some((name, after))) => (before, Piece::Variable(name), after),
            (None, None) => {
                let read = instructions.len() - open.len();
                malformed.push(instructions[..read].matches('\n').count() + 1);
                (before, Piece::Text(OPEN), after)
            }
        };
        pieces.extend([Piece::Text(before), piece]);
        rest = after;
    }
    pieces.push(Piece::Text(rest));
    (pieces, malformed)
}

/// The name of the variable whose opening braces were just read, and what follows its closing ones.
fn variable(after: &str) -> Option<(&str, &str)> {
    let inner = after.trim_start_matches(' ');
    let end = inner.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(inner.len());
    let (name, rest) = inner.split_at(end);
    let rest = rest.trim_start_matches(' ').strip_prefix(CLOSE)?;
    is_name(name).then_some((name, rest))
}

fn is_name(name: &str) -> bool {
    name.len() <= MAX_NAME
        && name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// What is wrong with an agent's instructions, for people.
pub fn problem(instructions: &str) -> Option<String> {
    let line = *pieces(instructions).1.first()?;
    Some(format!(
        "The braces in line {line} begin no variable. A variable is written {{{{name}}}}, its name of at most \
         {MAX_NAME} a-z, A-Z, 0-9 and _; for the braces themselves write \\{{{{."
    ))
}

/// The values that a run is started with, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Variables(BTreeMap<String, String>);

impl Variables {
    /// From what a caller gave: a JSON object of strings, numbers and booleans.
    pub fn read(given: Option<&Value>, checks: &mut Checks) -> Self {
        let given = match given {
            None | Some(Value::Null) => return Self::default(),
            Some(Value::Object(given)) => given,
            Some(_) => {
                let message = "This must be an object of strings, numbers and booleans.";
                checks.push(UserError::invalid("variables", message));
                return Self::default();
            }
        };
        checks.count("variables", given.len(), MAX_VARIABLES);
        let mut values = BTreeMap::new();
        for (name, value) in given.iter().take(MAX_VARIABLES) {
            let field = format!("variables.{name}");
            let text = match value {
                _ if !is_name(name) => {
                    let message = format!("A variable's name has at most {MAX_NAME} of a-z, A-Z, 0-9 and _.");
                    checks.push(UserError::invalid("variables", message));
                    continue;
                }
                Value::String(text) => text.clone(),
                Value::Number(number) => number.to_string(),
                Value::Bool(value) => value.to_string(),
                Value::Null | Value::Array(_) | Value::Object(_) => {
                    checks.push(UserError::invalid(&field, "This must be a string, a number or a boolean."));
                    continue;
                }
            };
            checks.text(&field, &text, 0, MAX_VALUE);
            values.insert(name.clone(), text);
        }
        Self(values)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The agents that a run can reach, their instructions filled in. Refused, all at once: values that are missing,
    /// and values for no variable.
    pub fn fill(&self, agents: Arc<Agents>) -> Outcome<Arc<Agents>> {
        if self.is_empty() && !agents.values().any(|agent| agent.instructions.contains(OPEN)) {
            return Ok(agents);
        }
        let templates: BTreeMap<Uuid, Vec<Piece<'_>>> =
            agents.iter().map(|(id, agent)| (*id, pieces(&agent.instructions).0)).collect();
        let wanted = || {
            templates.values().flatten().filter_map(|piece| match piece {
                Piece::Variable(name) => Some(*name),
                Piece::Text(_) => None,
            })
        };
        self.check(&wanted().collect())?;
        let added: usize = wanted().filter_map(|name| self.0.get(name)).map(String::len).sum();
        if added > MAX_ADDED {
            let message = format!("The values add {added} bytes to the instructions; {MAX_ADDED} are allowed.");
            return Err(UserError::new(UserErrorCode::LimitExceeded, "variables", message).into());
        }
        let mut filled = agents.as_ref().clone();
        for (id, template) in templates {
            if let Some(agent) = filled.get_mut(&id) {
                let text = |piece: &Piece<'_>| match *piece {
                    Piece::Text(text) => text.to_owned(),
                    Piece::Variable(name) => self.0.get(name).cloned().unwrap_or_default(),
                };
                Arc::make_mut(agent).instructions = template.iter().map(text).collect();
            }
        }
        Ok(Arc::new(filled))
    }

    fn check(&self, wanted: &BTreeSet<&str>) -> Outcome<()> {
        let mut problems = Vec::new();
        let missing: Vec<&str> = wanted.iter().copied().filter(|name| !self.0.contains_key(*name)).collect();
        if !missing.is_empty() {
            let message = format!("The instructions need values for: {}.", missing.join(", "));
            problems.push(UserError::invalid("variables", message));
        }
        for name in self.0.keys().filter(|name| !wanted.contains(name.as_str())) {
            let message = format!("No instructions of the agents that this run can reach have {{{{{name}}}}}.");
            problems.push(UserError::invalid(&format!("variables.{name}"), message));
        }
        if problems.is_empty() { Ok(()) } else { Err(Refusal::User(problems)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(instructions: &str) -> String {
        let shown = pieces(instructions).0.into_iter().map(|piece| match piece {
            Piece::Text(text) => text.to_owned(),
            Piece::Variable(name) => format!("<{name}>"),
        });
        shown.collect()
    }

    #[test]
    fn instructions_are_taken_apart() {
        for (instructions, expected) in [
            ("", ""),
            ("Hello", "Hello"),
            ("{{a}}", "<a>"),
            ("{{ a }}{{_b1}}", "<a><_b1>"),
            ("Hi {{name}}, {{ name}}!", "Hi <name>, <name>!"),
            (r"\{{a}}", "{{a}}"),
            (r"\\{{a}}", r"\{{a}}"),
            (r"a\b {{c}} \", r"a\b <c> \"),
            ("{a} }} {\"x\": {\"y\": 1}}", "{a} }} {\"x\": {\"y\": 1}}"),
            ("ä{{ü_}}{{a}}", "ä{{ü_}}<a>"),
        ] {
            assert_eq!(read(instructions), expected, "{instructions:?}");
        }
    }

    #[test]
    fn braces_that_begin_no_variable_are_told_by_their_line() {
        for instructions in
            ["{{", "{{}}", "{{ }}", "{{1a}}", "{{a b}}", "{{a}", "{{a-b}}", "{{{a}}}", "{{ä}}", "{{\na\n}}", "{{a}}{{"]
        {
            assert!(problem(instructions).unwrap().contains("line 1 "), "{instructions:?}");
        }
        assert!(problem("one\ntwo {{a}}\nthree {{a").unwrap().contains("line 3 "));
        assert!(problem(&format!("{{{{{}}}}}", "x".repeat(64))).is_none());
        assert!(problem(&format!("{{{{{}}}}}", "x".repeat(65))).is_some());
        for instructions in ["", "}} {a}", r"\{{", r"\{{a b}}", "{{a}} {{ _ }}"] {
            assert_eq!(problem(instructions), None, "{instructions:?}");
        }
    }
}
