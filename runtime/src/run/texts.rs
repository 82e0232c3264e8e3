//! What the model is told in place of an answer, word for word as the Agents SDK tells it.

use std::fmt::Write;

/// A tool failed, or its arguments can't be used.
pub const TOOL_FAILED: &str = "An error occurred while running the tool. Please try again.";

/// A handoff that came second.
pub const HANDOFF_IGNORED: &str = "Multiple handoffs detected, ignoring this one.";

/// A call that somebody did not approve, without saying why.
pub const NOT_APPROVED: &str = "Tool execution was not approved.";

/// In the history: an output that an output guardrail withheld.
pub const WITHHELD: &str = "Output withheld by an output guardrail.";

/// A tool guardrail tripped, and has no words of its own.
pub fn rejected(guardrail: &str, reason: &str) -> String {
    format!("Rejected by the guardrail '{guardrail}': {reason}")
}

/// A tool's time ran out.
pub fn timed_out(tool: &str, timeout_ms: u32) -> String {
    format!("Tool '{tool}' timed out after {} seconds.", seconds(timeout_ms))
}

/// The agent has no such tool.
pub fn not_found(tool: &str) -> String {
    format!("Tool '{tool}' not found.")
}

/// The run ended while the tool was at work; its time ran out, or something else did.
pub fn cut_off(tool: &str, is_of_time: bool) -> String {
    let reason = if is_of_time { "the run's time is over" } else { "the run has ended" };
    format!("Tool '{tool}' was cut off: {reason}.")
}

/// The output of a handoff: `{"assistant": "…"}` as Python's `json.dumps` writes it.
pub fn handoff(agent_name: &str) -> String {
    let mut text = String::from(r#"{"assistant": ""#);
    for c in agent_name.chars() {
        match c {
            '"' => text.push_str("\\\""),
            '\\' => text.push_str("\\\\"),
            '\n' => text.push_str("\\n"),
            '\r' => text.push_str("\\r"),
            '\t' => text.push_str("\\t"),
            '\u{8}' => text.push_str("\\b"),
            '\u{c}' => text.push_str("\\f"),
            ' '..='~' => text.push(c),
            _ => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    // Writing to a String can't fail.
                    let _ = write!(text, "\\u{unit:04x}");
                }
            }
        }
    }
    text.push_str("\"}");
    text
}

/// Milliseconds as seconds, the way Python's `:g` writes them: six significant digits, no trailing zeros.
fn seconds(milliseconds: u32) -> String {
    let rounded = format!("{:.5e}", f64::from(milliseconds) / 1000.0);
    let Some((digits, exponent)) = rounded.split_once('e') else { return rounded };
    let exponent: i32 = exponent.parse().unwrap_or_default();
    let trim = |number: &str| number.trim_end_matches('0').trim_end_matches('.').to_owned();
    match usize::try_from(5 - exponent) {
        Ok(decimals) => trim(&format!("{:.decimals$}", f64::from(milliseconds) / 1000.0)),
        Err(_) => format!("{}e+{exponent:02}", trim(digits)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_are_written_as_python_does() {
        for (milliseconds, text) in [
            (0, "0"),
            (1, "0.001"),
            (10, "0.01"),
            (500, "0.5"),
            (1_000, "1"),
            (1_500, "1.5"),
            (30_000, "30"),
            (100_000, "100"),
            (123_456, "123.456"),
            (1_234_567, "1234.57"),
            (600_000, "600"),
            (999_999_400, "999999"),
            (999_999_900, "1e+06"),
            (u32::MAX, "4.29497e+06"),
        ] {
            assert_eq!(seconds(milliseconds), text, "{milliseconds}");
        }
        assert_eq!(timed_out("weather", 30_000), "Tool 'weather' timed out after 30 seconds.");
    }

    #[test]
    fn handoffs_are_written_as_python_does() {
        assert_eq!(handoff("Billing agent"), r#"{"assistant": "Billing agent"}"#);
        assert_eq!(
            handoff("a\"b\\c/\n\r\t\u{8}\u{c}\u{1}\u{7f}~"),
            r#"{"assistant": "a\"b\\c/\n\r\t\b\f\u0001\u007f~"}"#
        );
        assert_eq!(handoff("Zoë 日 😀"), r#"{"assistant": "Zo\u00eb \u65e5 \ud83d\ude00"}"#);
    }
}
