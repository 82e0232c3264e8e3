//! What a run is given of the graph.

use std::collections::BTreeMap;
use std::sync::Arc;

use cloister_runtime::schema;
use cloister_runtime::spec::{AgentSpec, Handoff, RunSpec};
use entity::{TenantOwned, agent_versions, agents};
use sea_orm::{ColumnTrait, QueryFilter, QuerySelect};
use uuid::Uuid;

use super::{Graph, Node, numbered, versions};
use crate::agents::variables::Variables;
use crate::app::App;
use crate::error::{Error, Outcome, UserError, UserErrorCode};
use crate::input::Checks;

impl Graph {
    fn specs(&self) -> Result<BTreeMap<Uuid, AgentSpec>, Error> {
        self.nodes.iter().map(|(id, node)| Ok((*id, self.spec(*id, node)?))).collect()
    }

    fn spec(&self, id: Uuid, node: &Node) -> Result<AgentSpec, Error> {
        let definition = node.definition.clone();
        let handoffs = definition.handoffs.iter().filter_map(|handoff| {
            let target = self.nodes.get(&handoff.agent_id)?;
            let told = target.definition.handoff_description.as_deref().unwrap_or_default();
            let description = handoff.tool_description.clone();
            Some(Handoff {
                agent_id: handoff.agent_id,
                tool_name: self.handoff_name(handoff)?,
                tool_description: description.unwrap_or_else(|| Handoff::default_tool_description(&target.name, told)),
                filter: handoff.filter,
                nest_history: handoff.nest_history,
            })
        });
        Ok(AgentSpec {
            id,
            version: node.version.as_ref().map(|version| version.version),
            name: node.name.clone(),
            handoffs: handoffs.collect(),
            model: definition.model,
            fallback_models: definition.fallback_models,
            instructions: definition.instructions,
            settings: definition.settings,
            tools: definition.tools,
            guardrails: definition.guardrails,
            // A publish has proven that there is one.
            output: definition
                .output_schema
                .as_ref()
                .map(schema::output_schema)
                .transpose()
                .map_err(Error::internal)?,
            tool_use_behavior: definition.tool_use_behavior,
            stop_at_tools: definition.stop_at_tools,
            max_turns: definition.max_turns,
            reset_tool_choice: definition.reset_tool_choice,
            max_tool_concurrency: definition.max_tool_concurrency,
        })
    }
}

/// The graph of a run, frozen.
pub struct Frozen {
    root: Uuid,
    /// The version that runs; none for the draft.
    pub version_id: Option<Uuid>,
    /// Every agent of the closure. Tokens are sealed.
    pub agents: Arc<BTreeMap<Uuid, AgentSpec>>,
}

impl Frozen {
    /// The name of the agent that answers first.
    pub fn root_name(&self) -> &str {
        self.agents.get(&self.root).map(|agent| agent.name.as_str()).unwrap_or_default()
    }

    /// The same with the variables in all instructions filled in.
    pub fn filled(self, variables: &Variables) -> Outcome<Self> {
        Ok(Self { agents: variables.fill(self.agents)?, ..self })
    }
}

/// What a run of an agent is given: its published version, the one asked for, or its draft.
pub async fn freeze(app: &App, tenant_id: Uuid, agent_id: Uuid, version: Option<i32>, draft: bool) -> Outcome<Frozen> {
    let db = app.db.read();
    let agents = || {
        agents::Entity::in_tenant(tenant_id)
            .filter(agents::Column::Id.eq(agent_id))
            .filter(agents::Column::DeletedAt.is_null())
    };
    let missing = || UserError::not_found("agentId", "agent");
    if draft {
        let agent = agents().one(db).await?.ok_or_else(missing)?;
        let mut checks = Checks::default();
        let graph = Graph::of_draft(db, &agent, &mut checks).await?;
        graph.prove(app, &mut checks);
        checks.finish()?;
        return Ok(Frozen { root: agent_id, version_id: None, agents: Arc::new(graph.specs()?) });
    }
    if let Some(number) = version {
        let agent = agents().one(db).await?.ok_or_else(missing)?;
        let root = numbered(db, &agent, number).await?;
        let root = root.ok_or_else(|| UserError::not_found("version", "version of this agent"))?;
        let agents = closure(app, tenant_id, &root).await?;
        return Ok(Frozen { root: agent_id, version_id: Some(root.id), agents });
    }
    let published: Option<Option<Uuid>> =
        agents().select_only().column(agents::Column::PublishedVersionId).into_tuple().one(db).await?;
    let Some(version_id) = published.ok_or_else(missing)? else {
        let message = "This agent was never published. Call publishAgent, or run its draft with draft: true.";
        return Err(UserError::new(UserErrorCode::NotPublished, "agentId", message).into());
    };
    let agents = match app.closures.get(&version_id) {
        Some(agents) => agents,
        None => {
            let root = versions(db, tenant_id, std::iter::once(version_id)).await?.remove(&version_id);
            closure(app, tenant_id, &root.ok_or_else(|| Error::internal("a published version is gone"))?).await?
        }
    };
    Ok(Frozen { root: agent_id, version_id: Some(version_id), agents })
}

/// The agents of published versions' closures, by the version's id. They never change.
pub type Closures = quick_cache::sync::Cache<Uuid, Arc<BTreeMap<Uuid, AgentSpec>>>;

/// The agents of a version's closure, now at hand for later runs.
async fn closure(
    app: &App,
    tenant_id: Uuid,
    root: &agent_versions::Model,
) -> Result<Arc<BTreeMap<Uuid, AgentSpec>>, Error> {
    let ids: Vec<Uuid> = serde_json::from_value(root.closure.clone())?;
    let mut nodes = BTreeMap::new();
    for (_, version) in versions(app.db.read(), tenant_id, ids.into_iter()).await? {
        let definition = serde_json::from_value(version.definition.clone())?;
        nodes.insert(version.agent_id, Node { name: version.name.clone(), definition, version: Some(version) });
    }
    let agents = Arc::new(Graph { root: root.agent_id, nodes }.specs()?);
    app.closures.insert(root.id, agents.clone());
    Ok(agents)
}

/// Opens the tools' tokens of a run that is about to be executed.
pub fn open_tokens(app: &App, tenant_id: Uuid, spec: &mut RunSpec) -> Result<(), Error> {
    for tool in spec.agents.values_mut().flat_map(|agent| agent.tools.iter_mut()) {
        if let Some(token) = tool.token_mut()
            && let Some(sealed) = token
        {
            *token = Some(app.vault.open(tenant_id, sealed)?);
        }
    }
    Ok(())
}
