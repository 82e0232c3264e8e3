//! `node(id)`: any object by its id. It needs what the type's own root field needs.
#![allow(missing_docs)] // fields and inputs are what the schema says they are

use async_graphql::{Context, ID, Interface, Object, Result};

use super::loaders::{AgentId, AgentVersionId, ApiKeyId, ConversationId, RunId, RuntimeTokenId, load};
use super::{app, viewer};
use crate::agents::graphql::{Agent, AgentVersion};
use crate::conversations::graphql::Conversation;
use crate::ids;
use crate::keys::graphql::ApiKey;
use crate::runs::graphql::Run;
use crate::runtime::graphql::RuntimeToken;
use crate::tenants;
use crate::tenants::graphql::Tenant;
use crate::viewer::{Scope, Viewer};

/// An object with an id.
#[derive(Interface)]
#[allow(clippy::large_enum_variant)] // one at a time, never in a collection
#[graphql(field(name = "id", ty = "ID"))]
pub enum Node {
    Tenant(Tenant),
    ApiKey(ApiKey),
    Agent(Agent),
    AgentVersion(AgentVersion),
    Conversation(Conversation),
    Run(Run),
    RuntimeToken(RuntimeToken),
}

#[derive(Default)]
pub struct NodeQuery;

#[Object]
impl NodeQuery {
    /// Null if there is no such object, or it is another tenant's.
    async fn node(&self, ctx: &Context<'_>, id: ID) -> Result<Option<Node>> {
        let viewer = viewer(ctx)?;
        if let Some(id) = ids::decode(ids::Tenant, &id) {
            if let Viewer::Tenant(_) = viewer
                && viewer.require(Scope::Read)?.tenant_id() != id
            {
                return Ok(None);
            }
            return Ok(tenants::graphql::by_id(app(ctx)?, id).await?.map(Node::Tenant));
        }
        if let Some(id) = ids::decode(ids::ApiKey, &id) {
            viewer.require(Scope::Manage)?;
            return Ok(load(ctx, ApiKeyId(id)).await?.map(|key| Node::ApiKey(ApiKey(key))));
        }
        if let Some(id) = ids::decode(ids::Agent, &id) {
            viewer.require(Scope::Read)?;
            let agent = load(ctx, AgentId(id)).await?.filter(|agent| agent.deleted_at.is_none());
            return Ok(agent.map(|agent| Node::Agent(Agent(agent))));
        }
        if let Some(id) = ids::decode(ids::AgentVersion, &id) {
            viewer.require(Scope::Read)?;
            return Ok(load(ctx, AgentVersionId(id)).await?.map(|row| Node::AgentVersion(AgentVersion(row))));
        }
        if let Some(id) = ids::decode(ids::Conversation, &id) {
            viewer.require_any(&[Scope::Read, Scope::Run])?;
            let found = load(ctx, ConversationId(id)).await?.filter(|found| found.deleted_at.is_none());
            return Ok(found.map(|found| Node::Conversation(Conversation(found))));
        }
        if let Some(id) = ids::decode(ids::Run, &id) {
            viewer.require_any(&[Scope::Read, Scope::Run])?;
            return Ok(load(ctx, RunId(id)).await?.map(|run| Node::Run(Run(run))));
        }
        if let Some(id) = ids::decode(ids::RuntimeToken, &id) {
            if let Viewer::Tenant(_) = viewer {
                viewer.require(Scope::Manage)?;
            }
            return Ok(load(ctx, RuntimeTokenId(id)).await?.map(|token| Node::RuntimeToken(RuntimeToken(token))));
        }
        Ok(None)
    }
}
