//! What a scenario says; README.md has it for people. The words for agents are those of the GraphQL API, except that
//! agents are named by their keys in place of ids.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// A scenario: agents, what the model says, what the tools answer, and what the user does.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Scenario {
    /// What it shows.
    pub about: String,
    /// The provider's API; none: it is played once over each.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api: Option<Api>,
    /// The SDK streams the model's answers, and what is streamed is compared.
    #[serde(default, skip_serializing_if = "is_default")]
    pub stream: bool,
    /// How often the SDK's client repeats a request that the provider could not answer; Cloister always does.
    #[serde(default, skip_serializing_if = "is_default")]
    pub retries: u32,
    /// Agents of it run at the same time, and ask the model in any order.
    #[serde(default, skip_serializing_if = "is_default")]
    pub concurrent: bool,
    /// Agents by key.
    pub agents: BTreeMap<String, Agent>,
    /// The key of the agent that is run.
    pub start: String,
    /// The model's replies: a request takes the first unused one that is for it.
    pub replies: Vec<Reply>,
    /// What each webhook answers, by the tool's name; others answer `ok`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub tools: BTreeMap<String, Answers>,
    /// The user's turns, all of one session.
    pub runs: Vec<Run>,
}

/// The provider's API.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Api {
    /// Chat Completions.
    Chat,
    /// Responses.
    Responses,
}

impl Api {
    /// Both.
    pub const ALL: [Api; 2] = [Api::Chat, Api::Responses];

    /// As scenarios write it.
    pub fn name(self) -> &'static str {
        match self {
            Api::Chat => "chat",
            Api::Responses => "responses",
        }
    }
}

/// An agent: fields of `CreateAgentInput`.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Agent {
    /// Its key unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// `You are KEY.` unless given; what tells an agent's requests from another's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instructions: Option<String>,
    /// `ModelSettingsInput`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub model_settings: Map<String, Value>,
    /// `ToolInput`s, a webhook without its `url`, an agent as `agent` in place of `agentId`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub tools: Vec<Map<String, Value>>,
    /// `HandoffInput`s, with `agent` in place of `agentId`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub handoffs: Vec<Map<String, Value>>,
    /// `GuardrailInput`s, with `agent` in place of `agentId`; those at a
    /// tool stage that reject say with which `message`: its default is Cloister's own.
    #[serde(default, skip_serializing_if = "is_default")]
    pub guardrails: Vec<Map<String, Value>>,
    /// What others are told of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handoff_description: Option<String>,
    /// JSON Schema of its final answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_schema: Option<Value>,
    /// `ToolUseBehavior`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_use_behavior: Option<String>,
    /// The tools that end the run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_at_tools: Option<Vec<String>>,
    /// Model calls a run may make.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_turns: Option<u32>,
    /// Whether a forced choice is forgotten.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reset_tool_choice: Option<bool>,
    /// Calls at the same time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_tool_concurrency: Option<u32>,
}

/// A reply of the model.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Reply {
    /// The key of the agent it is for; none: whoever asks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// The text of the user's last message that it is for, where an agent runs several times at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub about: Option<String>,
    /// A message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// Calls of tools.
    #[serde(default, skip_serializing_if = "is_default")]
    pub calls: Vec<Call>,
    /// A refusal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refusal: Option<String>,
    /// What it thought first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<String>,
    /// What it thought, as only the provider can read it (Responses).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encrypted: Option<String>,
    /// The type of a tool that the provider ran first, such as `web_search_call`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hosted: Option<String>,
    /// Another finish reason than its own, in the words of Chat Completions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finish: Option<String>,
    /// An error with this HTTP status.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// Tokens of the input that came from the cache.
    #[serde(default, skip_serializing_if = "is_default")]
    pub cached: u64,
    /// Tokens of the output that were reasoning.
    #[serde(default, skip_serializing_if = "is_default")]
    pub reasoning_tokens: u64,
}

/// A call in a reply. Its id is `call_REPLY_PLACE`, both from 0, unless given.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Call {
    /// The tool.
    pub name: String,
    /// An object, or the very text.
    #[serde(default)]
    pub arguments: Value,
    /// Another id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
}

impl Call {
    /// The arguments as the model writes them.
    pub fn text(&self) -> String {
        match &self.arguments {
            Value::String(text) => text.clone(),
            Value::Null => "{}".to_owned(),
            arguments => arguments.to_string(),
        }
    }
}

/// What a webhook answers.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq)]
#[serde(untagged)]
pub enum Answers {
    /// Each call alike, however many there are at once.
    Always(Answer),
    /// One call after another.
    InTurn(Vec<Answer>),
}

/// An answer of a webhook.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Answer {
    /// The text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// The text is `saw ` and the arguments.
    #[serde(default, skip_serializing_if = "is_default")]
    pub echo: bool,
    /// An error with this HTTP status.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// Waits so long first.
    #[serde(default, skip_serializing_if = "is_default")]
    pub delay_ms: u64,
}

/// A turn of the user.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Run {
    /// What the user says.
    pub input: String,
    /// Values for the variables in instructions.
    #[serde(default, skip_serializing_if = "is_default")]
    pub variables: Map<String, Value>,
    /// What is decided at each pause.
    #[serde(default, skip_serializing_if = "is_default")]
    pub decisions: Vec<Vec<Decision>>,
    /// What is decided about whatever waits, one after the other and again from the start, in place of `decisions`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub decide_in_turn: Vec<Decision>,
    /// At each pause the SDK's state goes through JSON, as over a restart.
    #[serde(default, skip_serializing_if = "is_default")]
    pub restart: bool,
}

/// A decision about a call that waits.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Decision {
    /// The call's id; empty in `decideInTurn`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub call: String,
    /// Yes or no.
    pub approve: bool,
    /// For all later calls of the tool too.
    #[serde(default, skip_serializing_if = "is_default")]
    pub always: bool,
    /// What the model is told in place of the output.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

impl Run {
    /// What is decided at a pause, the first being 0, about calls of these ids; none: nobody decides. `decided` is how
    /// many calls were decided before.
    pub fn decisions_at(&self, pause: usize, pending: &[String], decided: usize) -> Option<Vec<Decision>> {
        if self.decide_in_turn.is_empty() {
            return self.decisions.get(pause).cloned();
        }
        let mut calls = pending.to_vec();
        calls.sort();
        // A decision for all would settle the others that wait.
        let alone = calls.len() == 1;
        let decisions = self.decide_in_turn.iter().cycle().skip(decided % self.decide_in_turn.len());
        let of_call = |(call, decision): (String, &Decision)| Decision {
            call,
            always: decision.always && alone,
            ..decision.clone()
        };
        Some(calls.into_iter().zip(decisions).map(of_call).collect())
    }
}

impl Scenario {
    /// The instructions of an agent, its variables filled in.
    pub fn instructions(&self, key: &str, variables: &Map<String, Value>) -> String {
        let mut text = self.agents[key].instructions.clone().unwrap_or_else(|| format!("You are {key}."));
        for (name, value) in variables {
            let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            text = text.replace(&format!("{{{{{name}}}}}"), &value);
        }
        text
    }

    /// The APIs it is played over.
    pub fn apis(&self) -> Vec<Api> {
        self.api.map_or_else(|| Api::ALL.to_vec(), |api| vec![api])
    }
}

/// The scenarios of this directory, by name.
///
/// # Panics
/// One can't be read.
pub fn all() -> BTreeMap<String, Scenario> {
    let files = fs::read_dir(directory()).expect("scenarios").map(|entry| entry.expect("a file").path());
    let files = files.filter(|path| path.extension().is_some_and(|extension| extension == "json"));
    let read = |path: PathBuf| {
        let text = fs::read_to_string(&path).expect("a readable scenario");
        let scenario = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        (path.file_stem().expect("a name").to_string_lossy().into_owned(), scenario)
    };
    files.map(read).collect()
}

/// Where scenarios are kept.
pub fn directory() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("differential/scenarios")
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}
