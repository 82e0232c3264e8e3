//! Guardrails as they are saved.

use std::collections::HashSet;

use cloister_runtime::run::guardrails;
use cloister_runtime::spec::{Guardrail, GuardrailRule, GuardrailStage};

use super::check_name;
use super::schema::check_schema;
use crate::agents::graphql::agent_id;
use crate::agents::guardrails_graphql::OnTrip;
use crate::agents::input_graphql::{GuardrailInput, GuardrailRuleInput};
use crate::error::{UserError, UserErrorCode};
use crate::input::Checks;

const MAX_GUARDRAILS: usize = 64;
/// The longest text that a rule may allow: beyond any input, output or tool's answer.
const MAX_LENGTH: i32 = 10_000_000;
const MAX_PATTERN: usize = 4_096;

/// Guardrails from what came in; whether their agents exist is the database's to say.
pub fn checked(guardrails: Vec<GuardrailInput>, checks: &mut Checks) -> Vec<Guardrail> {
    checks.count("guardrails", guardrails.len(), MAX_GUARDRAILS);
    let mut names = HashSet::new();
    for (at, guardrail) in guardrails.iter().enumerate() {
        if !names.insert(guardrail.name.as_str()) {
            let message = format!("An earlier guardrail is named {:?} too.", guardrail.name);
            checks.push(UserError::new(UserErrorCode::Duplicate, &format!("guardrails.{at}.name"), message));
        }
    }
    guardrails.into_iter().enumerate().map(|(at, guardrail)| check(at, guardrail, checks)).collect()
}

fn check(at: usize, guardrail: GuardrailInput, checks: &mut Checks) -> Guardrail {
    let field = |name: &str| format!("guardrails.{at}.{name}");
    let stage: GuardrailStage = guardrail.stage.into();
    checks.text(&field("name"), &guardrail.name, 1, 100);
    // NUL is refused already.
    if guardrail.name.chars().any(|c| c.is_control() && c != '\0') {
        checks.push(UserError::invalid(&field("name"), "A name has no control characters."));
    }
    if let Some(tool) = &guardrail.tool {
        if matches!(stage, GuardrailStage::ToolInput | GuardrailStage::ToolOutput) {
            check_name(checks, &field("tool"), tool);
        } else {
            let message = "This goes with the stages TOOL_INPUT and TOOL_OUTPUT only.";
            checks.push(UserError::invalid(&field("tool"), message));
        }
    }
    let parallel = guardrail.parallel.unwrap_or(false);
    if parallel && stage != GuardrailStage::Input {
        checks.push(UserError::invalid(&field("parallel"), "This goes with the stage INPUT only."));
    }
    let is_of_tools = matches!(stage, GuardrailStage::ToolInput | GuardrailStage::ToolOutput);
    if !is_of_tools && guardrail.on_trip == Some(OnTrip::Reject) {
        let message = "This goes with the stages TOOL_INPUT and TOOL_OUTPUT only: elsewhere a trip ends the run.";
        checks.push(UserError::invalid(&field("onTrip"), message));
    }
    let ends_run = !is_of_tools || guardrail.on_trip == Some(OnTrip::Fail);
    if let Some(message) = &guardrail.message {
        checks.text(&field("message"), message, 1, 10_000);
        if ends_run {
            let message = "A message is told to the model on a REJECT at the stages TOOL_INPUT and TOOL_OUTPUT only.";
            checks.push(UserError::invalid(&field("message"), message));
        }
    }
    let rule = match guardrail.rule {
        GuardrailRuleInput::Regex(regex) => {
            check_pattern(checks, &field("rule.regex.pattern"), &regex.pattern);
            GuardrailRule::Regex { pattern: regex.pattern, trip_on_match: regex.trip_on_match.unwrap_or(true) }
        }
        GuardrailRuleInput::MaxLength(characters) => {
            checks.range(&field("rule.maxLength"), characters, 1, MAX_LENGTH);
            GuardrailRule::MaxLength { characters: characters.unsigned_abs() }
        }
        GuardrailRuleInput::JsonSchema(schema) => {
            check_schema(checks, &field("rule.jsonSchema"), &schema.0);
            GuardrailRule::JsonSchema { schema: schema.0 }
        }
        GuardrailRuleInput::AgentId(id) => GuardrailRule::Agent { agent_id: agent_id(&id) },
    };
    Guardrail {
        name: guardrail.name,
        stage,
        tool: guardrail.tool,
        parallel,
        rule,
        ends_run,
        message: guardrail.message,
    }
}

fn check_pattern(checks: &mut Checks, field: &str, pattern: &str) {
    if pattern.is_empty() || pattern.chars().count() > MAX_PATTERN || pattern.contains('\0') {
        let message = format!("A pattern has 1 to {MAX_PATTERN} characters, and no NUL.");
        checks.push(UserError::invalid(field, message));
    } else if let Err(error) = guardrails::check_pattern(pattern) {
        checks.push(UserError::invalid(field, format!("This is not a pattern: {error}")));
    }
}
