//! Placeholder.
#![allow(missing_docs)]
use crate::spec::GuardrailRule;
use uuid::Uuid;
pub enum Verdict {
    Passes,
    Trips { reason: String },
    Asks { agent_id: Uuid },
}
pub fn judge(rule: &GuardrailRule, _text: &str) -> Verdict {
    match rule {
        GuardrailRule::Agent { agent_id } => Verdict::Asks { agent_id: *agent_id },
        GuardrailRule::MaxLength { characters: 0 } => Verdict::Trips { reason: String::new() },
        _ => Verdict::Passes,
    }
}
pub fn read_verdict(_text: &str) -> Result<Option<String>, String> {
    Ok(None)
}
