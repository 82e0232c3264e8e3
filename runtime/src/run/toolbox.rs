//! What an agent has to call: its offers to the model, and who answers a call.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, OnceLock};

use jsonschema::Validator;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::model::{Offer, ToolDefinition};
use crate::schema;
use crate::spec::{AgentSpec, AgentTool, HostedTool, McpServer, Tool, WebhookTool};

/// An agent's tools and handoffs. An MCP server's are part of it as they were listed.
#[derive(Debug)]
pub struct Toolbox {
    offers: Vec<Offer>,
    targets: HashMap<String, Target>,
}

/// Who answers a call.
#[derive(Clone, Debug)]
pub enum Target {
    /// A webhook.
    Webhook(Arc<Webhook>),
    /// An agent, in a run of its own.
    Agent(Arc<AgentTool>),
    /// A tool of an MCP server.
    Mcp(Arc<McpServer>),
    /// An agent that is to take over.
    Handoff(Arc<AgentSpec>),
    /// Nobody: the agent has no such tool.
    Missing,
}

/// A webhook with its schema compiled.
#[derive(Debug)]
pub struct Webhook {
    /// The tool.
    pub tool: WebhookTool,
    validator: OnceLock<Option<Validator>>,
}

impl Webhook {
    /// Whether arguments are a JSON object that fits the tool's schema. Nothing fits a schema that does not compile,
    /// one that refers to other documents among them: those are never fetched.
    pub fn fits(&self, arguments: &str) -> bool {
        let compile = || schema::compile(&self.tool.parameters).ok();
        match object(arguments) {
            Some(arguments) => {
                self.validator.get_or_init(compile).as_ref().is_some_and(|validator| validator.is_valid(&arguments))
            }
            None => false,
        }
    }
}

/// A call's arguments, if they are a JSON object; empty ones count as `{}`.
pub fn object(arguments: &str) -> Option<Value> {
    let arguments = if arguments.is_empty() { "{}" } else { arguments };
    serde_json::from_str::<Value>(arguments).ok().filter(Value::is_object)
}

impl Target {
    /// Whether it is a tool that is run here.
    pub fn is_tool(&self) -> bool {
        matches!(self, Target::Webhook(_) | Target::Agent(_) | Target::Mcp(_))
    }

    /// Whether somebody must agree to each call.
    pub fn needs_approval(&self) -> bool {
        match self {
            Target::Webhook(webhook) => webhook.tool.needs_approval,
            Target::Agent(tool) => tool.needs_approval,
            Target::Mcp(server) => server.needs_approval,
            Target::Handoff(_) | Target::Missing => false,
        }
    }
}

impl Toolbox {
    /// What an agent has: the tools of its MCP servers as `listed`, its own, its handoffs.
    ///
    /// # Errors
    /// Two of them have one name; that is refused when an agent is published, but what a server lists is not known
    /// then. The message is for people.
    pub fn new(
        agent: &AgentSpec,
        agents: &BTreeMap<Uuid, Arc<AgentSpec>>,
        listed: Vec<(Arc<McpServer>, Vec<ToolDefinition>)>,
    ) -> Result<Self, String> {
        let mut toolbox = Toolbox { offers: Vec::new(), targets: HashMap::new() };
        for (server, tools) in listed {
            for tool in tools {
                toolbox.add(tool, Target::Mcp(server.clone()))?;
            }
        }
        for tool in &agent.tools {
            match tool {
                Tool::Webhook(tool) => {
                    let webhook = Webhook { tool: tool.clone(), validator: OnceLock::new() };
                    toolbox.add(webhook_offer(tool), Target::Webhook(Arc::new(webhook)))?;
                }
                Tool::Agent(tool) => toolbox.add(agent_offer(tool), Target::Agent(Arc::new(tool.clone())))?,
                Tool::Hosted(HostedTool { name, config }) => {
                    toolbox.offers.push(Offer::Hosted(HostedTool { name: name.clone(), config: config.clone() }));
                }
                Tool::Mcp(_) => {}
            }
        }
        for handoff in &agent.handoffs {
            let Some(to) = agents.get(&handoff.agent_id) else { continue };
            let offer = ToolDefinition {
                name: handoff.tool_name.clone(),
                description: handoff.tool_description.clone(),
                parameters: json!({ "additionalProperties": false, "type": "object", "properties": {}, "required": [] }),
                strict: true,
            };
            toolbox.add(offer, Target::Handoff(to.clone()))?;
        }
        Ok(toolbox)
    }

    fn add(&mut self, offer: ToolDefinition, target: Target) -> Result<(), String> {
        let name = offer.name.clone();
        self.offers.push(Offer::Function(offer));
        match self.targets.insert(name.clone(), target) {
            Some(_) => Err(format!("Two tools have the name {name:?}.")),
            None => Ok(()),
        }
    }

    /// What the model is offered: MCP servers' tools, the agent's own, its handoffs.
    pub fn offers(&self) -> &[Offer] {
        &self.offers
    }

    /// Who answers a call of this name.
    pub fn target(&self, name: &str) -> &Target {
        self.targets.get(name).unwrap_or(&Target::Missing)
    }
}

/// The strict form of the tenant's schema; one that has none was refused when its agent was published, and is shown as
/// it is in a draft.
fn webhook_offer(tool: &WebhookTool) -> ToolDefinition {
    let strict = schema::strict(&tool.parameters);
    ToolDefinition {
        name: tool.name.clone(),
        description: tool.description.clone(),
        strict: strict.is_ok(),
        parameters: strict.unwrap_or_else(|_| tool.parameters.clone()),
    }
}

/// The Agents SDK's schema of an agent tool's arguments.
fn agent_offer(tool: &AgentTool) -> ToolDefinition {
    ToolDefinition {
        name: tool.name.clone(),
        description: tool.description.clone(),
        parameters: json!({
            "description": "Default input schema for agent-as-tool calls.",
            "properties": { "input": { "title": "Input", "type": "string" } },
            "required": ["input"],
            "title": "AgentAsToolInput",
            "type": "object",
            "additionalProperties": false,
        }),
        strict: true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fits(schema: &Value, arguments: &str) -> bool {
        let tool = WebhookTool {
            name: "t".into(),
            description: String::new(),
            parameters: schema.clone(),
            url: String::new(),
            token: None,
            timeout_ms: 1,
            needs_approval: false,
        };
        Webhook { tool, validator: OnceLock::new() }.fits(arguments)
    }

    #[test]
    fn arguments_must_be_an_object_that_fits() {
        let schema = json!({ "type": "object", "properties": { "city": { "type": "string" } }, "required": ["city"] });
        assert!(fits(&schema, r#"{"city": "Rome"}"#));
        for arguments in ["", "{}", r#"{"city": 1}"#, r#"{"city": "Rome""#, "[]", "null", "\"Rome\"", " "] {
            assert!(!fits(&schema, arguments), "{arguments}");
        }
        assert!(fits(&json!({ "type": "object" }), ""));
        assert!(fits(&json!({}), "{}"));
        assert!(!fits(&json!({}), "[]"));
    }

    #[test]
    fn nothing_fits_a_broken_schema() {
        assert!(!fits(&json!({ "type": "nonsense" }), "{}"));
        assert!(!fits(&json!({ "$ref": "https://example.com/schema.json" }), "{}"));
        assert!(!fits(&json!({ "$ref": "file:///etc/hostname" }), "{}"));
    }
}
