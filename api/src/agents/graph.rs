//! The graph of agents that a run can reach: proven and frozen by a publish, read back by a run.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use cloister_runtime::spec::{AgentSpec, Handoff, HandoffFilter, RunSpec, Tool};
use entity::{TenantOwned, agent_versions, agents};
use sea_orm::ActiveValue::Set;
use sea_orm::{
    ActiveModelTrait, ColumnTrait, ConnectionTrait, DatabaseTransaction, IntoActiveModel, QueryFilter, QuerySelect,
};
use uuid::Uuid;

use super::definition::Definition;
use crate::app::App;
use crate::error::{Error, Outcome, UserError, UserErrorCode};
use crate::input::Checks;

/// Agents that one may reach.
const MAX_AGENTS: usize = 200;

/// An agent of the graph, in the version that the graph resolves it to.
struct Node {
    name: String,
    definition: Definition,
    /// None: its draft, to be published along.
    version: Option<agent_versions::Model>,
}

/// A root's draft, and every agent it reaches: in its published version, or its draft where it has none.
struct Graph {
    root: Uuid,
    nodes: BTreeMap<Uuid, Node>,
}

impl Graph {
    /// Follows the handoffs from an agent's draft.
    async fn of_draft(db: &impl ConnectionTrait, root: &agents::Model, checks: &mut Checks) -> Result<Self, Error> {
        let mut graph = Self { root: root.id, nodes: BTreeMap::new() };
        let definition: Definition = serde_json::from_value(root.definition.clone())?;
        graph.nodes.insert(root.id, Node { name: root.name.clone(), definition, version: None });
        let mut frontier = vec![root.id];
        while !frontier.is_empty() {
            let wanted: BTreeSet<Uuid> = frontier
                .iter()
                .filter_map(|id| graph.nodes.get(id))
                .flat_map(|node| node.definition.handoffs.iter().map(|handoff| handoff.agent_id))
                .filter(|id| !graph.nodes.contains_key(id))
                .collect();
            let found = load(db, root.tenant_id, &wanted).await?;
            graph.report_missing(&frontier, &found, checks);
            frontier = found.keys().copied().collect();
            graph.nodes.extend(found);
            if graph.nodes.len() > MAX_AGENTS {
                let message = format!("An agent may reach {MAX_AGENTS} others.");
                checks.push(UserError::new(UserErrorCode::LimitExceeded, "handoffs", message));
                break;
            }
        }
        Ok(graph)
    }

    fn report_missing(&self, from: &[Uuid], found: &BTreeMap<Uuid, Node>, checks: &mut Checks) {
        for (id, node) in from.iter().filter_map(|id| self.nodes.get(id).map(|node| (id, node))) {
            for (at, handoff) in node.definition.handoffs.iter().enumerate() {
                let target = handoff.agent_id;
                if !self.nodes.contains_key(&target) && !found.contains_key(&target) {
                    let field = self.path(*id, &format!("handoffs.{at}.agentId"));
                    let message = format!("{:?} hands off to an agent that does not exist.", node.name);
                    checks.push(UserError::new(UserErrorCode::NotFound, &field, message));
                }
            }
        }
    }

    /// The path of a field of the root; for another agent, that of the handoff that leads there.
    fn path(&self, id: Uuid, field: &str) -> String {
        if id == self.root {
            return field.to_owned();
        }
        let handoffs = self.nodes.get(&self.root).map(|root| root.definition.handoffs.as_slice()).unwrap_or_default();
        match handoffs
            .iter()
            .position(|handoff| handoff.agent_id == id || self.reachable(handoff.agent_id).contains(&id))
        {
            Some(at) => format!("handoffs.{at}.agentId"),
            None => "handoffs".to_owned(),
        }
    }

    /// What an agent reaches, itself included.
    fn reachable(&self, from: Uuid) -> BTreeSet<Uuid> {
        let mut reached = BTreeSet::new();
        let mut frontier = vec![from];
        while let Some(id) = frontier.pop() {
            if let Some(node) = self.nodes.get(&id)
                && reached.insert(id)
            {
                frontier.extend(node.definition.handoffs.iter().map(|handoff| handoff.agent_id));
            }
        }
        reached
    }

    /// Proves every agent: its model, the names of its tools, and what refers to them.
    fn prove(&self, app: &App, checks: &mut Checks) {
        for (id, node) in &self.nodes {
            let refuse = |checks: &mut Checks, code, field: &str, message: String| {
                let whose = if *id == self.root { String::new() } else { format!("In {:?}: ", node.name) };
                checks.push(UserError::new(code, &self.path(*id, field), format!("{whose}{message}")));
            };
            let definition = &node.definition;
            if app.catalog.get(&definition.model).is_none() {
                let message = format!("There is no model {:?}. There are: {}.", definition.model, app.catalog.names());
                refuse(checks, UserErrorCode::UnknownModel, "model", message);
            }
            let tools = definition.tools.iter().enumerate();
            let mut names: Vec<(String, String)> =
                tools.map(|(at, tool)| (tool.name.clone(), format!("tools.{at}.webhook.name"))).collect();
            for (at, handoff) in definition.handoffs.iter().enumerate() {
                if let Some(name) = self.handoff_name(handoff) {
                    names.push((name, format!("handoffs.{at}.toolName")));
                }
            }
            let mut seen: HashMap<&str, &str> = HashMap::new();
            for (name, field) in &names {
                if let Some(first) = seen.insert(name, field) {
                    let message = format!("The tool name {name:?} is taken already, by {first}.");
                    refuse(checks, UserErrorCode::NameCollision, field, message);
                }
            }
            for (at, name) in definition.stop_at_tools.iter().enumerate() {
                if !definition.tools.iter().any(|tool| tool.name == *name) {
                    let message = format!("There is no tool {name:?} to stop at.");
                    refuse(checks, UserErrorCode::Invalid, &format!("stopAtTools.{at}"), message);
                }
            }
            if let Some(choice) = &definition.settings.tool_choice
                && !matches!(choice.as_str(), "auto" | "required" | "none")
                && !seen.contains_key(choice.as_str())
            {
                let message = format!("There is no tool {choice:?}. Use auto, required, none or a tool's name.");
                refuse(checks, UserErrorCode::Invalid, "modelSettings.toolChoice", message);
            }
        }
    }

    fn handoff_name(&self, handoff: &super::definition::HandoffDraft) -> Option<String> {
        let target = self.nodes.get(&handoff.agent_id)?;
        Some(handoff.tool_name.clone().unwrap_or_else(|| Handoff::default_tool_name(&target.name)))
    }

    fn specs(&self) -> BTreeMap<Uuid, AgentSpec> {
        self.nodes.iter().map(|(id, node)| (*id, self.spec(*id, node))).collect()
    }

    fn spec(&self, id: Uuid, node: &Node) -> AgentSpec {
        let definition = node.definition.clone();
        let handoffs = definition.handoffs.iter().filter_map(|handoff| {
            let target = self.nodes.get(&handoff.agent_id)?;
            let told = target.definition.handoff_description.as_deref().unwrap_or_default();
            let description = handoff.tool_description.clone();
            Some(Handoff {
                agent_id: handoff.agent_id,
                tool_name: self.handoff_name(handoff)?,
                tool_description: description.unwrap_or_else(|| Handoff::default_tool_description(&target.name, told)),
                filter: HandoffFilter::None,
                nest_history: false,
            })
        });
        AgentSpec {
            id,
            version: node.version.as_ref().map(|version| version.version),
            name: node.name.clone(),
            handoffs: handoffs.collect(),
            model: definition.model,
            instructions: definition.instructions,
            settings: definition.settings,
            tools: definition.tools.into_iter().map(Tool::Webhook).collect(),
            fallback_models: Vec::new(),
            guardrails: Vec::new(),
            output: None,
            tool_use_behavior: definition.tool_use_behavior,
            stop_at_tools: definition.stop_at_tools,
            max_turns: definition.max_turns,
            reset_tool_choice: definition.reset_tool_choice,
            max_tool_concurrency: definition.max_tool_concurrency,
        }
    }
}

/// Agents that exist, each in its published version or else its draft.
async fn load(db: &impl ConnectionTrait, tenant_id: Uuid, ids: &BTreeSet<Uuid>) -> Result<BTreeMap<Uuid, Node>, Error> {
    if ids.is_empty() {
        return Ok(BTreeMap::new());
    }
    let rows = agents::Entity::in_tenant(tenant_id)
        .filter(agents::Column::Id.is_in(ids.iter().copied()))
        .filter(agents::Column::DeletedAt.is_null())
        .all(db)
        .await?;
    let published = versions(db, tenant_id, rows.iter().filter_map(|agent| agent.published_version_id)).await?;
    let nodes = rows.into_iter().map(|agent| {
        let version = agent.published_version_id.and_then(|id| published.get(&id)).cloned();
        let (name, definition) = match &version {
            Some(version) => (version.name.clone(), version.definition.clone()),
            None => (agent.name, agent.definition),
        };
        Ok((agent.id, Node { name, definition: serde_json::from_value(definition)?, version }))
    });
    nodes.collect()
}

async fn versions(
    db: &impl ConnectionTrait,
    tenant_id: Uuid,
    ids: impl Iterator<Item = Uuid>,
) -> Result<HashMap<Uuid, agent_versions::Model>, Error> {
    let rows =
        agent_versions::Entity::in_tenant(tenant_id).filter(agent_versions::Column::Id.is_in(ids)).all(db).await?;
    Ok(rows.into_iter().map(|row| (row.id, row)).collect())
}

/// Proves an agent's draft with all it reaches, and freezes it as its next version. Agents that it
/// reaches and that were never published are published along, so that cycles close.
pub async fn publish(app: &App, tx: &DatabaseTransaction, agent: agents::Model) -> Outcome<agents::Model> {
    let mut checks = Checks::default();
    let graph = Graph::of_draft(tx, &agent, &mut checks).await?;
    graph.prove(app, &mut checks);
    checks.finish()?;
    let ids: BTreeMap<Uuid, Uuid> = graph
        .nodes
        .iter()
        .map(|(id, node)| (*id, node.version.as_ref().map_or_else(Uuid::now_v7, |version| version.id)))
        .collect();
    let drafts: Vec<Uuid> = graph.nodes.iter().filter(|(_, node)| node.version.is_none()).map(|(id, _)| *id).collect();
    for id in drafts {
        let closure = graph.reachable(id).iter().filter_map(|id| ids.get(id).copied()).collect();
        let definition =
            serde_json::to_value(graph.nodes.get(&id).map(|node| &node.definition)).map_err(Error::from)?;
        let row = agents::Entity::in_tenant(agent.tenant_id).filter(agents::Column::Id.eq(id)).one(tx).await?;
        let row = row.ok_or_else(|| Error::internal("an agent is gone in mid-publish"))?;
        let version_id = ids.get(&id).copied().unwrap_or_else(Uuid::now_v7);
        insert_version(app, tx, row, version_id, definition, closure).await?;
    }
    let published = agents::Entity::in_tenant(agent.tenant_id).filter(agents::Column::Id.eq(agent.id)).one(tx).await?;
    published.ok_or_else(|| Error::internal("an agent is gone in mid-publish").into())
}

/// Publishes an earlier version again, with the closure that was frozen with it, as a new version.
pub async fn rollback(
    app: &App,
    tx: &DatabaseTransaction,
    agent: agents::Model,
    version: i32,
) -> Outcome<agents::Model> {
    let found = numbered(tx, &agent, version).await?;
    let found = found.ok_or_else(|| UserError::not_found("version", "version of this agent"))?;
    let definition: Definition = serde_json::from_value(found.definition.clone()).map_err(Error::from)?;
    if app.catalog.get(&definition.model).is_none() {
        let message = format!("That version's model {:?} is no longer in the catalogue.", definition.model);
        return Err(UserError::new(UserErrorCode::UnknownModel, "version", message).into());
    }
    let id = Uuid::now_v7();
    let old: Vec<Uuid> = serde_json::from_value(found.closure).map_err(Error::from)?;
    let closure = old.into_iter().map(|member| if member == found.id { id } else { member }).collect();
    insert_version(app, tx, agent, id, found.definition, closure).await
}

async fn insert_version(
    app: &App,
    tx: &DatabaseTransaction,
    agent: agents::Model,
    id: Uuid,
    definition: serde_json::Value,
    closure: Vec<Uuid>,
) -> Outcome<agents::Model> {
    let newest: Option<Option<i32>> = agent_versions::Entity::in_tenant(agent.tenant_id)
        .filter(agent_versions::Column::AgentId.eq(agent.id))
        .select_only()
        .column_as(agent_versions::Column::Version.max(), "version")
        .into_tuple()
        .one(tx)
        .await?;
    let row = agent_versions::ActiveModel {
        id: Set(id),
        tenant_id: Set(agent.tenant_id),
        agent_id: Set(agent.id),
        version: Set(newest.flatten().unwrap_or(0) + 1),
        name: Set(agent.name.clone()),
        definition: Set(definition),
        closure: Set(serde_json::to_value(closure).map_err(Error::from)?),
        published_at: Set(app.clock.now()),
    };
    row.insert(tx).await?;
    let mut agent = agent.into_active_model();
    agent.published_version_id = Set(Some(id));
    Ok(agent.update(tx).await?)
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
        return Ok(Frozen { root: agent_id, version_id: None, agents: Arc::new(graph.specs()) });
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
    let agents = Arc::new(Graph { root: root.agent_id, nodes }.specs());
    app.closures.insert(root.id, agents.clone());
    Ok(agents)
}

async fn numbered(
    db: &impl ConnectionTrait,
    agent: &agents::Model,
    version: i32,
) -> Result<Option<agent_versions::Model>, Error> {
    let found = agent_versions::Entity::in_tenant(agent.tenant_id)
        .filter(agent_versions::Column::AgentId.eq(agent.id))
        .filter(agent_versions::Column::Version.eq(version))
        .one(db)
        .await?;
    Ok(found)
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
