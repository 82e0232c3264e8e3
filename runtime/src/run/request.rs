//! What the model is asked.

use serde_json::json;

use super::state::{State, handoffs};
use crate::item::InputItem;
use crate::model::{ModelRequest, Offer, ToolDefinition};
use crate::spec::{AgentSpec, RunSpec, Tool};

/// The request of the run's next turn.
pub fn build(spec: &RunSpec, history: &[InputItem], state: &State<'_>) -> ModelRequest {
    let agent = state.agent();
    let settings = &agent.settings;
    let tools = offer(spec, agent);
    let forced_once = agent.reset_tool_choice && state.has_used_tools(agent);
    ModelRequest {
        model: agent.model.clone(),
        instructions: agent.instructions.clone(),
        input: history.iter().cloned().chain(state.transcript()).collect(),
        temperature: settings.temperature,
        top_p: settings.top_p,
        max_output_tokens: settings.max_output_tokens,
        tool_choice: settings.tool_choice.clone().filter(|_| !forced_once),
        parallel_tool_calls: settings.parallel_tool_calls.filter(|_| !tools.is_empty()),
        reasoning_effort: settings.reasoning_effort,
        tools,
        output: agent.output.clone(),
    }
}

/// The agent's own tools, then its handoffs.
fn offer(spec: &RunSpec, agent: &AgentSpec) -> Vec<Offer> {
    let tools = agent.tools.iter().filter_map(|tool| match tool {
        Tool::Webhook(tool) => Some(ToolDefinition {
            name: tool.name.clone(),
            description: tool.description.clone(),
            parameters: tool.parameters.clone(),
            // The schema is the tenant's own, which need not be within what strict mode can express.
            strict: false,
        }),
        _ => None,
    });
    let handoffs = handoffs(spec, agent).map(|(handoff, _)| ToolDefinition {
        name: handoff.tool_name.clone(),
        description: handoff.tool_description.clone(),
        parameters: json!({ "additionalProperties": false, "type": "object", "properties": {}, "required": [] }),
        strict: true,
    });
    tools.chain(handoffs).map(Offer::Function).collect()
}
