//! What the model is asked.

use super::state::State;
use super::toolbox::Toolbox;
use crate::model::ModelRequest;

/// The request of the run's next turn.
pub fn build(state: &State, toolbox: &Toolbox) -> ModelRequest {
    let agent = state.agent();
    let settings = &agent.settings;
    let tools = toolbox.offers().to_vec();
    let forced_once = agent.reset_tool_choice && state.has_used_tools();
    ModelRequest {
        model: agent.model.clone(),
        instructions: agent.instructions.clone(),
        input: state.view(),
        output: agent.output.clone(),
        temperature: settings.temperature,
        top_p: settings.top_p,
        max_output_tokens: settings.max_output_tokens,
        tool_choice: settings.tool_choice.clone().filter(|_| !forced_once),
        parallel_tool_calls: settings.parallel_tool_calls.filter(|_| !tools.is_empty()),
        reasoning_effort: settings.reasoning_effort,
        tools,
    }
}
