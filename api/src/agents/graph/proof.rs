//! What a publish proves of every agent of the graph.

use std::collections::HashMap;

use cloister_runtime::schema::{self, NotStrict};
use cloister_runtime::spec::{GuardrailRule, GuardrailStage, Tool};
use serde_json::Value;
use uuid::Uuid;

use super::{Graph, Node};
use crate::agents::variables;
use crate::app::App;
use crate::error::{UserError, UserErrorCode};
use crate::input::Checks;

/// The names that an agent's model may call, or be told to call.
struct Names {
    /// Each with the path of its field, in the order in which they are offered.
    known: Vec<(String, String)>,
    /// What its own tools are named, without handoffs and what the provider runs.
    tools: Vec<String>,
    /// Whether an MCP server brings all the tools that it has.
    is_open: bool,
}

impl Names {
    fn has(&self, name: &str) -> bool {
        self.is_open || self.known.iter().any(|(known, _)| known == name)
    }

    fn has_tool(&self, name: &str) -> bool {
        self.is_open || self.tools.iter().any(|known| known == name)
    }
}

/// Adds problems of one agent.
struct Refusals<'a> {
    graph: &'a Graph,
    id: Uuid,
    node: &'a Node,
    checks: &'a mut Checks,
}

impl Refusals<'_> {
    fn push(&mut self, code: UserErrorCode, field: &str, message: String) {
        let whose = if self.id == self.graph.root { String::new() } else { format!("In {:?}: ", self.node.name) };
        self.checks.push(UserError::new(code, &self.graph.path(self.id, field), format!("{whose}{message}")));
    }

    fn invalid(&mut self, field: &str, message: impl Into<String>) {
        self.push(UserErrorCode::Invalid, field, message.into());
    }

    fn not_strict(&mut self, field: &str, error: &NotStrict) {
        let place = if error.path.is_empty() { String::new() } else { format!(" (at {})", error.path) };
        self.invalid(field, format!("This schema has no strict form: {}{place}", error.message));
    }
}

impl Graph {
    /// Proves every agent: its models, the names of its tools and what refers to them, its schemas, its guardrails and
    /// its instructions.
    pub(super) fn prove(&self, app: &App, checks: &mut Checks) {
        for (id, node) in &self.nodes {
            let mut refusals = Refusals { graph: self, id: *id, node, checks };
            prove_models(app, &mut refusals);
            let names = self.names(node);
            prove_names(&names, &mut refusals);
            prove_schemas(&mut refusals);
            self.prove_guardrails(&names, &mut refusals);
            if let Some(problem) = variables::problem(&node.definition.instructions) {
                refusals.invalid("instructions", problem);
            }
        }
    }

    fn names(&self, node: &Node) -> Names {
        let mut names = Names { known: Vec::new(), tools: Vec::new(), is_open: false };
        for (at, tool) in node.definition.tools.iter().enumerate() {
            let own = match tool {
                Tool::Webhook(tool) => vec![(tool.name.clone(), format!("tools.{at}.webhook.name"))],
                Tool::Agent(tool) => vec![(tool.name.clone(), format!("tools.{at}.agent.name"))],
                Tool::Mcp(server) => {
                    names.is_open |= server.allowed_tools.is_none();
                    let allowed = server.allowed_tools.iter().flatten().enumerate();
                    let field = |place| format!("tools.{at}.mcp.allowedTools.{place}");
                    allowed.map(|(place, name)| (name.clone(), field(place))).collect()
                }
                Tool::Hosted(tool) => {
                    // A provider may run several of one type, such as two MCP servers.
                    let is_another = |earlier: &Tool| matches!(earlier, Tool::Hosted(other) if other.name == tool.name && other.config != tool.config);
                    if !node.definition.tools.iter().take(at).any(is_another) {
                        names.known.push((tool.name.clone(), format!("tools.{at}.hosted.name")));
                    }
                    continue;
                }
            };
            names.tools.extend(own.iter().map(|(name, _)| name.clone()));
            names.known.extend(own);
        }
        for (at, handoff) in node.definition.handoffs.iter().enumerate() {
            if let Some(name) = self.handoff_name(handoff) {
                names.known.push((name, format!("handoffs.{at}.toolName")));
            }
        }
        names
    }

    fn prove_guardrails(&self, names: &Names, refusals: &mut Refusals<'_>) {
        for (at, guardrail) in refusals.node.definition.guardrails.iter().enumerate() {
            let is_of_tools = matches!(guardrail.stage, GuardrailStage::ToolInput | GuardrailStage::ToolOutput);
            if let Some(tool) = guardrail.tool.as_ref().filter(|tool| is_of_tools && !names.has_tool(tool)) {
                refusals.invalid(&format!("guardrails.{at}.tool"), format!("There is no tool {tool:?} to guard."));
            }
            // One that is missing is told already.
            if let GuardrailRule::Agent { agent_id } = guardrail.rule
                && let Some(judge) = self.nodes.get(&agent_id)
                && !gives_verdicts(judge)
            {
                let message = format!(
                    "{:?} can't judge: its outputSchema must be an object with tripped: boolean and reason: string.",
                    judge.name
                );
                refusals.invalid(&format!("guardrails.{at}.rule.agentId"), message);
            }
        }
    }
}

fn prove_models(app: &App, refusals: &mut Refusals<'_>) {
    let definition = &refusals.node.definition;
    definition.check_known_models(app, |field, message| refusals.push(UserErrorCode::UnknownModel, field, message));
    for (at, tool) in definition.tools.iter().enumerate() {
        let Tool::Hosted(tool) = tool else { continue };
        // One that is unknown is told already.
        let lacks = |model: &str| app.catalog.get(model).is_some_and(|known| !known.has_hosted_tools());
        if let Some((_, model)) = definition.models().find(|(_, model)| lacks(model)) {
            let message = format!(
                "{:?} is a tool that the provider runs, and the provider of {model:?} runs none: that takes the \
                 Responses API.",
                tool.name
            );
            refusals.invalid(&format!("tools.{at}.hosted"), message);
        }
    }
}

fn prove_names(names: &Names, refusals: &mut Refusals<'_>) {
    let definition = &refusals.node.definition;
    let mut seen: HashMap<&str, &str> = HashMap::new();
    for (name, field) in &names.known {
        if let Some(first) = seen.insert(name, field) {
            let message = format!("The tool name {name:?} is taken already, by {first}.");
            refusals.push(UserErrorCode::NameCollision, field, message);
        }
    }
    let mut servers: HashMap<&str, usize> = HashMap::new();
    for (at, tool) in definition.tools.iter().enumerate() {
        if let Tool::Mcp(server) = tool
            && let Some(first) = servers.insert(&server.name, at)
        {
            let message = format!("The server name {:?} is taken already, by tools.{first}.mcp.name.", server.name);
            refusals.push(UserErrorCode::NameCollision, &format!("tools.{at}.mcp.name"), message);
        }
    }
    for (at, name) in definition.stop_at_tools.iter().enumerate() {
        if !names.has_tool(name) {
            refusals.invalid(&format!("stopAtTools.{at}"), format!("There is no tool {name:?} to stop at."));
        }
    }
    if let Some(choice) = &definition.settings.tool_choice
        && !matches!(choice.as_str(), "auto" | "required" | "none")
        && !names.has(choice)
    {
        let message = format!("There is no tool {choice:?}. Use auto, required, none or a tool's name.");
        refusals.invalid("modelSettings.toolChoice", message);
    }
}

fn prove_schemas(refusals: &mut Refusals<'_>) {
    let definition = &refusals.node.definition;
    for (at, tool) in definition.tools.iter().enumerate() {
        if let Tool::Webhook(tool) = tool
            && let Err(error) = schema::strict(&tool.parameters)
        {
            refusals.not_strict(&format!("tools.{at}.webhook.parameters"), &error);
        }
    }
    if let Some(Err(error)) = definition.output_schema.as_ref().map(schema::output_schema) {
        refusals.not_strict("outputSchema", &error);
    }
}

/// Whether an agent's final answer is an object with `tripped: boolean` and `reason: string`.
fn gives_verdicts(judge: &Node) -> bool {
    let Some(Ok(output)) = judge.definition.output_schema.as_ref().map(schema::output_schema) else { return false };
    let is = |property: &str, wanted: &str| {
        let root = resolved(&output.schema, &output.schema);
        root.get("properties")
            .and_then(|properties| properties.get(property))
            .map(|schema| resolved(&output.schema, schema))
            .and_then(|schema| schema.get("type"))
            .is_some_and(|found| found == wanted || *found == Value::from(vec![wanted]))
    };
    !output.is_wrapped && is("tripped", "boolean") && is("reason", "string")
}

/// What a schema's `$ref` leads to within its document.
fn resolved<'a>(document: &'a Value, mut schema: &'a Value) -> &'a Value {
    // References may go round in a circle.
    for _ in 0..8 {
        let target = schema.get("$ref").and_then(Value::as_str).and_then(|reference| reference.strip_prefix('#'));
        match target.and_then(|pointer| document.pointer(pointer)) {
            Some(found) => schema = found,
            None => break,
        }
    }
    schema
}
