//! The chunks of a Chat Completions stream, read tolerantly.
//!
//! "OpenAI-compatible" servers leave fields out, send null for them or give them another type. A field that
//! can't be read counts as absent; what an answer lacks then shows when it is assembled.

use cloister_runtime::item::TokenUsage;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

/// More tokens than any call can have: a count above is a mistake of the provider's.
const MAX_TOKENS: i64 = 1_000_000_000;

/// A chunk, read from any JSON at all.
#[derive(Debug, Deserialize)]
#[serde(transparent)]
pub(super) struct Frame(#[serde(deserialize_with = "lenient")] pub(super) Chunk);

/// A chunk of the stream.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Chunk {
    #[serde(default, deserialize_with = "lenient_list")]
    pub(super) choices: Vec<Choice>,
    #[serde(default, deserialize_with = "lenient")]
    usage: Value,
    #[serde(default, deserialize_with = "lenient")]
    error: Value,
    #[serde(default, deserialize_with = "lenient")]
    object: String,
    #[serde(default, deserialize_with = "lenient")]
    message: String,
}

/// An alternative of the answer; we ask for one.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Choice {
    #[serde(default, deserialize_with = "lenient")]
    pub(super) index: i64,
    #[serde(default, deserialize_with = "lenient")]
    pub(super) delta: Delta,
    #[serde(default, deserialize_with = "lenient")]
    pub(super) finish_reason: String,
}

/// What is new.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Delta {
    #[serde(default, deserialize_with = "lenient_text")]
    pub(super) content: String,
    #[serde(default, deserialize_with = "lenient_text")]
    pub(super) refusal: String,
    #[serde(default, deserialize_with = "lenient_text")]
    reasoning_content: String,
    #[serde(default, deserialize_with = "lenient_text")]
    reasoning: String,
    #[serde(default, deserialize_with = "lenient_list")]
    pub(super) tool_calls: Vec<CallDelta>,
}

/// What is new of a tool call.
#[derive(Debug, Default, Deserialize)]
pub(super) struct CallDelta {
    #[serde(default, deserialize_with = "lenient")]
    pub(super) index: Option<u64>,
    #[serde(default, deserialize_with = "lenient_text")]
    pub(super) id: String,
    #[serde(default, deserialize_with = "lenient")]
    pub(super) function: FunctionDelta,
}

/// What is new of the function that a call names.
#[derive(Debug, Default, Deserialize)]
pub(super) struct FunctionDelta {
    #[serde(default, deserialize_with = "lenient_text")]
    pub(super) name: String,
    #[serde(default, deserialize_with = "lenient")]
    arguments: Value,
}

impl Chunk {
    /// The error a provider reports in place of the rest of its answer.
    pub(super) fn error(&self) -> Option<String> {
        if self.object == "error" {
            return Some(self.message.clone());
        }
        match &self.error {
            Value::Null | Value::Bool(false) => None,
            error => Some(error_message(error).unwrap_or_default()),
        }
    }

    /// What the provider counted. The buckets are disjoint, as the ledger wants them, while OpenAI's prompt
    /// tokens include the cached ones; an explicit zero stays zero; counts that can't be are no usage.
    pub(super) fn usage(&self) -> Option<TokenUsage> {
        usage(&self.usage, "prompt_tokens", "completion_tokens")
    }
}

/// What a provider counted, by the names that its API has for input and output.
pub(super) fn usage(usage: &Value, input: &str, output: &str) -> Option<TokenUsage> {
    let all_input = tokens(&usage[input])?;
    let output_tokens = tokens(&usage[output])?;
    let detail = |whole: &str, names: &[&str]| {
        let details = &usage[format!("{whole}_details")];
        match names.iter().map(|name| &details[name]).find(|value| !value.is_null()) {
            Some(value) => tokens(value),
            None => Some(0),
        }
    };
    // A part can't be more than its whole: the sum stays what the provider charges.
    let cache_read_tokens = detail(input, &["cached_tokens"])?.min(all_input);
    let uncached = all_input - cache_read_tokens;
    let cache_write_tokens = detail(input, &["cache_creation_tokens", "cache_write_tokens"])?.min(uncached);
    let reasoning_tokens = detail(output, &["reasoning_tokens"])?.min(output_tokens);
    Some(TokenUsage {
        input_tokens: uncached - cache_write_tokens,
        cache_read_tokens,
        cache_write_tokens,
        output_tokens,
        reasoning_tokens,
        cost_nano_usd: 0,
        estimated: false,
    })
}

impl Delta {
    /// What the model thinks, under either of the two names in use; both together say the same.
    pub(super) fn reasoning(&self) -> &str {
        if self.reasoning_content.is_empty() { &self.reasoning } else { &self.reasoning_content }
    }

    /// Whether the reasoning stands under the name that DeepSeek gave it, rather than OpenRouter's.
    pub(super) fn has_reasoning_content(&self) -> bool {
        !self.reasoning_content.is_empty()
    }
}

impl FunctionDelta {
    /// More of the arguments' text; servers that parse the model's JSON give them as an object.
    pub(super) fn arguments(&self) -> String {
        match &self.arguments {
            Value::Null => String::new(),
            Value::String(text) => without_nul(text),
            parsed => parsed.to_string(),
        }
    }
}

/// A text as everybody can hold it: PostgreSQL has no NUL. It is replaced right here, so that deltas and items agree.
pub(super) fn without_nul(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}

fn lenient_text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    Ok(without_nul(&lenient::<String, D>(deserializer)?))
}

/// The text of an error as providers report it: a string, or an object with a `message`.
pub(super) fn error_message(error: &Value) -> Option<String> {
    error.as_str().or_else(|| error["message"].as_str()).filter(|text| !text.is_empty()).map(str::to_owned)
}

/// A count that can be one: a whole number, not negative, not absurd.
fn tokens(value: &Value) -> Option<i64> {
    value.as_i64().filter(|count| (0..=MAX_TOKENS).contains(count))
}

/// A value, or the default where it is missing, null or of another type.
fn lenient<'de, T, D>(deserializer: D) -> Result<T, D::Error>
where
    T: DeserializeOwned + Default,
    D: Deserializer<'de>,
{
    Ok(serde_json::from_value(Value::deserialize(deserializer)?).unwrap_or_default())
}

/// The elements of a list that can be read.
fn lenient_list<'de, T, D>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    T: DeserializeOwned,
    D: Deserializer<'de>,
{
    let elements: Vec<Value> = lenient(deserializer)?;
    Ok(elements.into_iter().filter_map(|element| serde_json::from_value(element).ok()).collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn chunk(json: Value) -> Chunk {
        serde_json::from_str::<Frame>(&json.to_string()).unwrap().0
    }

    fn usage(json: Value) -> Option<TokenUsage> {
        chunk(json!({ "usage": json })).usage()
    }

    #[test]
    fn any_json_is_a_chunk() {
        for json in [json!(null), json!("text"), json!(7), json!([1, {}]), json!({"choices": "none"}), json!({})] {
            let chunk = chunk(json);
            assert!(chunk.choices.is_empty());
            assert_eq!(chunk.error(), None);
            assert_eq!(chunk.usage(), None);
        }
    }

    #[test]
    fn what_cannot_be_read_is_absent_and_the_rest_is_kept() {
        let chunk = chunk(json!({
            "choices": [null, {"index": "0", "delta": {"content": "hi", "tool_calls": [5]}, "finish_reason": null}],
            "usage": null,
            "error": null,
        }));
        assert_eq!(chunk.choices.len(), 1);
        assert_eq!(chunk.choices[0].delta.content, "hi");
        assert!(chunk.choices[0].delta.tool_calls.is_empty());
    }

    #[test]
    fn usage_buckets_are_disjoint() {
        let usage = usage(json!({
            "prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120,
            "prompt_tokens_details": {"cached_tokens": 60, "cache_creation_tokens": 10, "audio_tokens": null},
            "completion_tokens_details": {"reasoning_tokens": 5},
        }))
        .unwrap();
        assert_eq!(
            usage,
            TokenUsage {
                input_tokens: 30,
                cache_read_tokens: 60,
                cache_write_tokens: 10,
                output_tokens: 20,
                reasoning_tokens: 5,
                ..TokenUsage::default()
            }
        );
        assert_eq!(usage.total_tokens(), 120);
    }

    #[test]
    fn a_zero_is_a_count_and_nothing_is_none() {
        assert_eq!(usage(json!({"prompt_tokens": 0, "completion_tokens": 0})), Some(TokenUsage::default()));
        let details = json!({"prompt_tokens": 1, "completion_tokens": 2, "prompt_tokens_details": null});
        assert_eq!(usage(details).unwrap().total_tokens(), 3);
        assert_eq!(usage(json!({"prompt_tokens": null, "completion_tokens": null})), None);
        assert_eq!(usage(json!({"prompt_tokens": -1, "completion_tokens": 2})), None);
        assert_eq!(usage(json!({"prompt_tokens": 1, "completion_tokens": 10_000_000_000_i64})), None);
        assert_eq!(usage(json!({"prompt_tokens": 1.5, "completion_tokens": 2})), None);
    }

    #[test]
    fn more_cached_than_sent_never_makes_the_input_negative() {
        let usage = usage(json!({
            "prompt_tokens": 5, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 9},
        }))
        .unwrap();
        assert_eq!((usage.input_tokens, usage.cache_read_tokens, usage.total_tokens()), (0, 5, 6));
    }

    #[test]
    fn errors_have_several_shapes() {
        assert_eq!(chunk(json!({"error": {"message": "overloaded"}})).error().as_deref(), Some("overloaded"));
        assert_eq!(chunk(json!({"error": "overloaded"})).error().as_deref(), Some("overloaded"));
        assert_eq!(chunk(json!({"object": "error", "message": "bad"})).error().as_deref(), Some("bad"));
        assert_eq!(chunk(json!({"error": {"code": 5}})).error().as_deref(), Some(""));
    }
}
