//! What an agent is: checked when it is saved, stored as JSON, frozen by a publish.

use cloister_runtime::spec::{ModelSettings, ToolUseBehavior, WebhookTool};
use cloister_runtime::webhook::{AddressPolicy, check_form, check_url};
use entity::tenants::{self, Isolation};
use serde::{Deserialize, Serialize};
use url::Url;
use uuid::Uuid;

use crate::app::App;
use crate::error::{Outcome, UserError, UserErrorCode};
use crate::input::{Checks, Patch, PatchExt};

/// Model calls of a run unless the agent says otherwise; the Agents SDK's default.
pub const DEFAULT_MAX_TURNS: u32 = 10;
/// Calls of one response that run at once, unless the agent says otherwise.
pub const DEFAULT_TOOL_CONCURRENCY: u32 = 8;
/// Milliseconds until a tool's call counts as timed out, unless the tool says otherwise.
const DEFAULT_TOOL_TIMEOUT_MS: i32 = 30_000;
/// What OpenAI takes at most.
const MAX_TOOLS: usize = 128;
const MAX_HANDOFFS: usize = 64;
const MAX_SCHEMA_BYTES: usize = 64 * 1024;

/// A draft's or a version's definition.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Definition {
    /// The catalogue's name of the model.
    pub model: String,
    /// The system prompt.
    pub instructions: String,
    /// Sampling and tool choice.
    pub settings: ModelSettings,
    /// Tools; their tokens sealed.
    pub tools: Vec<WebhookTool>,
    /// Whom it may hand off to.
    pub handoffs: Vec<HandoffDraft>,
    /// What others are told of a handoff to it.
    pub handoff_description: Option<String>,
    /// What becomes of a turn whose tools have run.
    pub tool_use_behavior: ToolUseBehavior,
    /// With STOP_AT_TOOLS.
    pub stop_at_tools: Vec<String>,
    /// Model calls of a run.
    pub max_turns: u32,
    /// Forget a forced tool choice once a tool was used.
    pub reset_tool_choice: bool,
    /// Calls of one response that run at once.
    pub max_tool_concurrency: u32,
}

/// A handoff as it was saved; names left out follow the target.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HandoffDraft {
    /// The target.
    pub agent_id: Uuid,
    /// The name of its tool.
    pub tool_name: Option<String>,
    /// What the model is told of it.
    pub tool_description: Option<String>,
}

/// A webhook tool as it comes in.
pub struct WebhookToolInput {
    /// The name the model calls it by.
    pub name: String,
    /// What the model is told of it.
    pub description: String,
    /// JSON Schema of the arguments.
    pub parameters: Option<serde_json::Value>,
    /// Where it is POSTed.
    pub url: String,
    /// Left out: kept from the tool of the same name and URL origin. Null: none.
    pub token: Patch<String>,
    /// Milliseconds.
    pub timeout_ms: Option<i32>,
}

/// What is changed of a definition: a field left out stays, null is the default again.
pub struct Change {
    /// See [`Definition`].
    pub model: Patch<String>,
    /// See [`Definition`].
    pub instructions: Patch<String>,
    /// See [`Definition`].
    pub settings: Patch<ModelSettings>,
    /// See [`Definition`].
    pub tools: Patch<Vec<WebhookToolInput>>,
    /// See [`Definition`].
    pub handoffs: Patch<Vec<HandoffDraft>>,
    /// See [`Definition`].
    pub handoff_description: Patch<String>,
    /// See [`Definition`].
    pub tool_use_behavior: Patch<ToolUseBehavior>,
    /// See [`Definition`].
    pub stop_at_tools: Patch<Vec<String>>,
    /// See [`Definition`].
    pub max_turns: Patch<i32>,
    /// See [`Definition`].
    pub reset_tool_choice: Patch<bool>,
    /// See [`Definition`].
    pub max_tool_concurrency: Patch<i32>,
}

impl Default for Definition {
    fn default() -> Self {
        Self {
            model: String::new(),
            instructions: String::new(),
            settings: ModelSettings::default(),
            tools: Vec::new(),
            handoffs: Vec::new(),
            handoff_description: None,
            tool_use_behavior: ToolUseBehavior::default(),
            stop_at_tools: Vec::new(),
            max_turns: DEFAULT_MAX_TURNS,
            reset_tool_choice: true,
            max_tool_concurrency: DEFAULT_TOOL_CONCURRENCY,
        }
    }
}

impl Definition {
    /// The definition with a change made; every problem is added to `checks` with its path.
    pub fn changed(&self, app: &App, tenant: &tenants::Model, change: Change, checks: &mut Checks) -> Outcome<Self> {
        let mut new = self.clone();
        if let Some(model) = checks.required("model", change.model) {
            new.model = model;
        }
        if let Some(instructions) = checks.required("instructions", change.instructions) {
            checks.text("instructions", &instructions, 0, 100_000);
            new.instructions = instructions;
        }
        if let Some(settings) = change.settings.into_option() {
            new.settings = settings.unwrap_or_default();
        }
        new.check_model(app, checks);
        if let Some(tools) = change.tools.into_option() {
            new.tools = self.with_tools(app, tenant, tools.unwrap_or_default(), checks)?;
        }
        if let Some(handoffs) = change.handoffs.into_option() {
            new.handoffs = handoffs.unwrap_or_default();
            new.check_handoffs(checks);
        }
        if let Some(description) = change.handoff_description.into_option() {
            checks.text("handoffDescription", description.as_deref().unwrap_or_default(), 0, 1_024);
            new.handoff_description = description;
        }
        if let Some(behavior) = change.tool_use_behavior.into_option() {
            new.tool_use_behavior = behavior.unwrap_or_default();
        }
        if let Some(names) = change.stop_at_tools.into_option() {
            new.stop_at_tools = names.unwrap_or_default();
            checks.count("stopAtTools", new.stop_at_tools.len(), MAX_TOOLS);
            for (at, name) in new.stop_at_tools.iter().enumerate() {
                check_name(checks, &format!("stopAtTools.{at}"), name);
            }
        }
        if let Some(max_turns) = change.max_turns.into_option() {
            new.max_turns = positive(checks, "maxTurns", max_turns, DEFAULT_MAX_TURNS, 1_000);
        }
        if let Some(reset) = change.reset_tool_choice.into_option() {
            new.reset_tool_choice = reset.unwrap_or(true);
        }
        if let Some(calls) = change.max_tool_concurrency.into_option() {
            new.max_tool_concurrency = positive(checks, "maxToolConcurrency", calls, DEFAULT_TOOL_CONCURRENCY, 128);
        }
        Ok(new)
    }

    fn check_model(&self, app: &App, checks: &mut Checks) {
        let settings = &self.settings;
        let mut most_output = u32::MAX;
        match app.catalog.get(&self.model) {
            Some(model) => most_output = model.model.max_output_tokens.unsigned_abs(),
            None => {
                let message = format!("There is no model {:?}. There are: {}.", self.model, app.catalog.names());
                checks.push(UserError::new(UserErrorCode::UnknownModel, "model", message));
            }
        }
        if let Some(temperature) = settings.temperature {
            checks.range("modelSettings.temperature", temperature, 0.0, 2.0);
        }
        if let Some(top_p) = settings.top_p {
            checks.range("modelSettings.topP", top_p, 0.0, 1.0);
        }
        if let Some(tokens) = settings.max_output_tokens {
            checks.range("modelSettings.maxOutputTokens", tokens, 1, most_output);
        }
        if let Some(choice) = &settings.tool_choice {
            check_name(checks, "modelSettings.toolChoice", choice);
        }
    }

    fn with_tools(
        &self,
        app: &App,
        tenant: &tenants::Model,
        tools: Vec<WebhookToolInput>,
        checks: &mut Checks,
    ) -> Outcome<Vec<WebhookTool>> {
        checks.count("tools", tools.len(), MAX_TOOLS);
        let allowed_hosts = app.config.webhooks.allowed_hosts.clone();
        let policy = AddressPolicy { allowed_hosts, ..AddressPolicy::default() };
        let check = |url: &str| match tenant.isolation {
            // Its own workers call, from a network that only they know: they check where the URL leads.
            Isolation::Dedicated => check_form(url),
            Isolation::Shared => check_url(url, &policy),
        };
        let mut checked = Vec::with_capacity(tools.len());
        for (at, tool) in tools.into_iter().enumerate() {
            let field = |name: &str| format!("tools.{at}.webhook.{name}");
            check_name(checks, &field("name"), &tool.name);
            checks.text(&field("description"), &tool.description, 0, 1_024);
            checks.text(&field("url"), &tool.url, 1, 2_048);
            if let Err(error) = check(&tool.url) {
                checks.push(UserError::invalid(&field("url"), format!("The URL {error}")));
            }
            let parameters = tool.parameters.unwrap_or_else(no_parameters);
            check_schema(checks, &field("parameters"), &parameters);
            let timeout_ms = tool.timeout_ms.unwrap_or(DEFAULT_TOOL_TIMEOUT_MS);
            checks.range(&field("timeoutMs"), timeout_ms, 1, 300_000);
            let token = match tool.token {
                Patch::Value(token) => {
                    checks.text(&field("token"), &token, 1, 4_096);
                    if token.chars().any(|c| !c.is_ascii_graphic()) {
                        checks.push(UserError::invalid(&field("token"), "A token has visible ASCII characters only."));
                    }
                    Some(app.vault.seal(tenant.id, &token)?)
                }
                Patch::Null => None,
                Patch::Undefined => self.kept_token(&tool.name, &tool.url),
            };
            checked.push(WebhookTool {
                name: tool.name,
                description: tool.description,
                parameters,
                url: tool.url,
                token,
                timeout_ms: timeout_ms.unsigned_abs(),
                needs_approval: false,
            });
        }
        Ok(checked)
    }

    /// A token is kept only for the origin that it was given for.
    fn kept_token(&self, name: &str, url: &str) -> Option<String> {
        let origin = |url: &str| Url::parse(url).ok().map(|url| url.origin());
        let kept = self.tools.iter().find(|tool| tool.name == name && origin(&tool.url) == origin(url))?;
        kept.token.clone()
    }

    fn check_handoffs(&self, checks: &mut Checks) {
        checks.count("handoffs", self.handoffs.len(), MAX_HANDOFFS);
        for (at, handoff) in self.handoffs.iter().enumerate() {
            if let Some(name) = &handoff.tool_name {
                check_name(checks, &format!("handoffs.{at}.toolName"), name);
            }
            if let Some(description) = &handoff.tool_description {
                checks.text(&format!("handoffs.{at}.toolDescription"), description, 0, 1_024);
            }
        }
    }
}

fn positive(checks: &mut Checks, field: &str, value: Option<i32>, default: u32, max: i32) -> u32 {
    let Some(value) = value else { return default };
    checks.range(field, value, 1, max);
    value.unsigned_abs()
}

/// OpenAI's rule for the names of functions.
fn check_name(checks: &mut Checks, field: &str, name: &str) {
    let taken = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if name.is_empty() || name.len() > 64 || !name.chars().all(taken) {
        let message = format!("A tool's name has 1 to 64 of a-z, A-Z, 0-9, _ and -; this is {name:?}.");
        checks.push(UserError::invalid(field, message));
    }
}

fn check_schema(checks: &mut Checks, field: &str, schema: &serde_json::Value) {
    if !schema.is_object() {
        checks.push(UserError::invalid(field, "This must be a JSON Schema: an object."));
    } else if schema.to_string().len() > MAX_SCHEMA_BYTES {
        checks.push(UserError::invalid(field, format!("This may have {MAX_SCHEMA_BYTES} bytes as JSON.")));
    } else if holds_nul(schema) {
        checks.push(UserError::invalid(field, "This must not contain the NUL character."));
    } else if let Err(error) = jsonschema::validator_for(schema) {
        checks.push(UserError::invalid(field, format!("This is not a JSON Schema: {error}.")));
    }
}

/// Whether a text in it has the NUL character, which PostgreSQL can't store.
fn holds_nul(value: &serde_json::Value) -> bool {
    use serde_json::Value;
    match value {
        Value::String(text) => text.contains('\0'),
        Value::Array(values) => values.iter().any(holds_nul),
        Value::Object(fields) => fields.iter().any(|(name, value)| name.contains('\0') || holds_nul(value)),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

fn no_parameters() -> serde_json::Value {
    serde_json::json!({ "type": "object", "properties": {} })
}
