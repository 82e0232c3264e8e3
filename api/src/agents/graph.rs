//! The graph of agents that a run can reach: proven and frozen by a publish, read back by a run.

mod frozen;
mod proof;

use std::collections::{BTreeMap, BTreeSet, HashMap};

use cloister_runtime::spec::Handoff;
use entity::{TenantOwned, agent_versions, agents};
use sea_orm::ActiveValue::Set;
use sea_orm::{
    ActiveModelTrait, ColumnTrait, ConnectionTrait, DatabaseTransaction, IntoActiveModel, QueryFilter, QuerySelect,
};
use uuid::Uuid;

pub use self::frozen::{Closures, Frozen, Published, freeze, open_tokens};
use super::definition::{Definition, HandoffDraft};
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
    /// Follows handoffs, agent tools and guardrails from an agent's draft.
    async fn of_draft(db: &impl ConnectionTrait, root: &agents::Model, checks: &mut Checks) -> Result<Self, Error> {
        let mut graph = Self { root: root.id, nodes: BTreeMap::new() };
        let definition: Definition = serde_json::from_value(root.definition.clone())?;
        graph.nodes.insert(root.id, Node { name: root.name.clone(), definition, version: None });
        let mut frontier = vec![root.id];
        while !frontier.is_empty() {
            let wanted: BTreeSet<Uuid> = frontier
                .iter()
                .filter_map(|id| graph.nodes.get(id))
                .flat_map(|node| node.definition.references().map(|(_, id)| id))
                .filter(|id| !graph.nodes.contains_key(id))
                .collect();
            let found = load(db, root.tenant_id, &wanted).await?;
            graph.report_missing(&frontier, &found, checks);
            frontier = found.keys().copied().collect();
            graph.nodes.extend(found);
            if graph.nodes.len() > MAX_AGENTS {
                let message = format!("An agent may reach {MAX_AGENTS} others.");
                checks.push(UserError::new(UserErrorCode::LimitExceeded, "", message));
                break;
            }
        }
        Ok(graph)
    }

    fn report_missing(&self, from: &[Uuid], found: &BTreeMap<Uuid, Node>, checks: &mut Checks) {
        for (id, node) in from.iter().filter_map(|id| self.nodes.get(id).map(|node| (id, node))) {
            for (field, target) in node.definition.references() {
                if !self.nodes.contains_key(&target) && !found.contains_key(&target) {
                    let field = self.path(*id, &field);
                    let message = format!("{:?} leads to an agent that does not exist.", node.name);
                    checks.push(UserError::new(UserErrorCode::NotFound, &field, message));
                }
            }
        }
    }

    /// The path of a field of the root; for another agent, that of the root's field that leads there.
    fn path(&self, id: Uuid, field: &str) -> String {
        if id == self.root {
            return field.to_owned();
        }
        let mut references = self.nodes.get(&self.root).into_iter().flat_map(|root| root.definition.references());
        let leads_there = references.find(|(_, target)| *target == id || self.reachable(*target).contains(&id));
        leads_there.map(|(field, _)| field).unwrap_or_default()
    }

    /// What an agent reaches, itself included.
    fn reachable(&self, from: Uuid) -> BTreeSet<Uuid> {
        let mut reached = BTreeSet::new();
        let mut frontier = vec![from];
        while let Some(id) = frontier.pop() {
            if let Some(node) = self.nodes.get(&id)
                && reached.insert(id)
            {
                frontier.extend(node.definition.references().map(|(_, id)| id));
            }
        }
        reached
    }

    fn handoff_name(&self, handoff: &HandoffDraft) -> Option<String> {
        let target = self.nodes.get(&handoff.agent_id)?;
        Some(handoff.tool_name.clone().unwrap_or_else(|| Handoff::default_tool_name(&target.name)))
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
    let mut checks = Checks::default();
    definition.check_known_models(app, |_, message| {
        checks.push(UserError::new(UserErrorCode::UnknownModel, "version", format!("In that version: {message}")));
    });
    checks.finish()?;
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
