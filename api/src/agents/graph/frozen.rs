//! What a run is given of the graph.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use cloister_runtime::schema;
use cloister_runtime::spec::{AgentSpec, Agents, Handoff, RunSpec};
use entity::{TenantOwned, agent_versions, agents};
use sea_orm::{ColumnTrait, QueryFilter, QuerySelect};
use uuid::Uuid;

use super::{Graph, Node, numbered, versions};
use crate::agents::variables::Variables;
use crate::app::App;
use crate::batch::{self, Batch, Batched};
use crate::error::{Error, Outcome, UserError, UserErrorCode};
use crate::input::Checks;

impl Graph {
    fn specs(&self) -> Result<Agents, Error> {
        self.nodes.iter().map(|(id, node)| Ok((*id, Arc::new(self.spec(*id, node)?)))).collect()
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
    /// The version that runs; none for the draft.
    pub version_id: Option<Uuid>,
    /// Every agent of the closure. Tokens are sealed.
    pub agents: Arc<Agents>,
}

impl Frozen {
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
        return Ok(Frozen { version_id: None, agents: Arc::new(graph.specs()?) });
    }
    if let Some(number) = version {
        let agent = agents().one(db).await?.ok_or_else(missing)?;
        let root = numbered(db, &agent, number).await?;
        let root = root.ok_or_else(|| UserError::not_found("version", "version of this agent"))?;
        let agents = closure(app, tenant_id, &root).await?;
        return Ok(Frozen { version_id: Some(root.id), agents });
    }
    let published = batch::join(app, Published { tenant_id, agent_id }).await?;
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
    Ok(Frozen { version_id: Some(version_id), agents })
}

/// An agent whose published version is asked for.
pub struct Published {
    tenant_id: Uuid,
    agent_id: Uuid,
}

impl Batched for Published {
    /// None without the agent; none within for one that was never published.
    type Done = Option<Option<Uuid>>;

    fn batch(app: &App) -> &Batch<Self> {
        &app.batches.published
    }

    async fn carry_out(app: &App, all: &[Self]) -> Result<Vec<Self::Done>, Error> {
        let db = app.db.read();
        let ids: BTreeSet<Uuid> = all.iter().map(|asked| asked.agent_id).collect();
        let found: Vec<(Uuid, Uuid, Option<Uuid>)> = agents::Entity::across_tenants()
            .filter(agents::Column::Id.is_in(ids))
            .filter(agents::Column::DeletedAt.is_null())
            .select_only()
            .columns([agents::Column::TenantId, agents::Column::Id, agents::Column::PublishedVersionId])
            .into_tuple()
            .all(db)
            .await?;
        let found: HashMap<(Uuid, Uuid), Option<Uuid>> =
            found.into_iter().map(|(tenant_id, id, version_id)| ((tenant_id, id), version_id)).collect();
        Ok(all.iter().map(|asked| found.get(&(asked.tenant_id, asked.agent_id)).copied()).collect())
    }
}

/// The agents of published versions' closures, by the version's id. They never change.
pub type Closures = quick_cache::sync::Cache<Uuid, Arc<Agents>>;

/// The agents of a version's closure, now at hand for later runs.
async fn closure(app: &App, tenant_id: Uuid, root: &agent_versions::Model) -> Result<Arc<Agents>, Error> {
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
    let mut tools = spec.agents.values().flat_map(|agent| &agent.tools);
    if !tools.any(|tool| tool.token().is_some()) {
        return Ok(());
    }
    let agents = Arc::make_mut(&mut spec.agents).values_mut().map(Arc::make_mut);
    for tool in agents.flat_map(|agent| agent.tools.iter_mut()) {
        if let Some(token) = tool.token_mut()
            && let Some(sealed) = token
        {
            *token = Some(app.vault.open(tenant_id, sealed)?);
        }
    }
    Ok(())
}
