//! `Agent`, `AgentVersion` and what is done with agents.
#![allow(missing_docs)] // fields and inputs are what the schema says they are

use async_graphql::connection::Connection;
use async_graphql::{Context, ID, InputObject, Json, Object, Result, SimpleObject};
use chrono::{DateTime, Utc};
use entity::{agent_versions, agents};
use futures_util::future::try_join_all;
use serde_json::Value;
use uuid::Uuid;

use super::definition::Definition;
use super::definition_graphql::{Handoff, ModelSettings, Tool, ToolUseBehavior};
use super::guardrails_graphql::Guardrail;
use super::input_graphql::{CreateAgentInput, UpdateAgentInput};
use crate::error::{Error, Outcome, UserError, payload};
use crate::graphql::limits::list_complexity;
use crate::graphql::loaders::{AgentId, AgentVersionId, AgentsOf, ReachesOf, VersionsOf, load};
use crate::graphql::page::{Cursor, PageArgs};
use crate::graphql::{app, viewer};
use crate::ids;
use crate::models::graphql::Model;
use crate::tenants::graphql::DeletePayload;
use crate::viewer::Scope;

/// An agent. Its definition is the draft; runs use the published version.
#[derive(Clone)]
pub struct Agent(pub agents::Model);

/// A published version of an agent: frozen.
#[derive(Clone)]
pub struct AgentVersion(pub agent_versions::Model);

impl Agent {
    /// The draft.
    pub fn definition(&self) -> Result<Definition, Error> {
        Ok(serde_json::from_value(self.0.definition.clone())?)
    }
}

impl AgentVersion {
    fn definition(&self) -> Result<Definition, Error> {
        Ok(serde_json::from_value(self.0.definition.clone())?)
    }
}

/// The two types of `AgentDefinition`: what is theirs alone, and the fields they share. `#[Object]` is
/// passed in, so that it finds the names in the attributes of their own fields.
macro_rules! agent_definition {
    ($hash:tt $object:tt impl $type:ty { $($own:tt)* }) => {
        $hash $object
        impl $type {
            $($own)*

            pub async fn model(&self, ctx: &Context<'_>) -> Result<Model> {
                Model::named(ctx, &self.definition()?.model).await
            }

            pub async fn instructions(&self) -> Result<String> {
                Ok(self.definition()?.instructions)
            }

            pub async fn model_settings(&self) -> Result<ModelSettings> {
                Ok(self.definition()?.settings.into())
            }

            pub async fn tools(&self) -> Result<Vec<Tool>> {
                Ok(self.definition()?.tools.into_iter().map(Into::into).collect())
            }

            pub async fn handoffs(&self) -> Result<Vec<Handoff>> {
                Ok(self.definition()?.handoffs.into_iter().map(Handoff).collect())
            }

            pub async fn handoff_description(&self) -> Result<Option<String>> {
                Ok(self.definition()?.handoff_description)
            }

            pub async fn guardrails(&self) -> Result<Vec<Guardrail>> {
                Ok(self.definition()?.guardrails.into_iter().map(Into::into).collect())
            }

            pub async fn output_schema(&self) -> Result<Option<Json<Value>>> {
                Ok(self.definition()?.output_schema.map(Json))
            }

            pub async fn tool_use_behavior(&self) -> Result<ToolUseBehavior> {
                Ok(self.definition()?.tool_use_behavior.into())
            }

            pub async fn stop_at_tools(&self) -> Result<Vec<String>> {
                Ok(self.definition()?.stop_at_tools)
            }

            pub async fn max_turns(&self) -> Result<i32> {
                Ok(i32::try_from(self.definition()?.max_turns).unwrap_or(i32::MAX))
            }

            /// Forget a forced toolChoice once the agent has used a tool.
            pub async fn reset_tool_choice(&self) -> Result<bool> {
                Ok(self.definition()?.reset_tool_choice)
            }

            pub async fn max_tool_concurrency(&self) -> Result<i32> {
                Ok(i32::try_from(self.definition()?.max_tool_concurrency).unwrap_or(i32::MAX))
            }

            /// Tried in order when the model is unavailable before its first byte.
            pub async fn fallback_models(&self, ctx: &Context<'_>) -> Result<Vec<Model>> {
                let names = self.definition()?.fallback_models;
                try_join_all(names.iter().map(|name| Model::named(ctx, name))).await
            }
        }
    };
}

agent_definition!(
    #[Object]
    impl Agent {
        pub async fn id(&self) -> ID {
            ids::encode(ids::Agent, self.0.id)
        }

        async fn name(&self) -> &str {
            &self.0.name
        }

        async fn description(&self) -> Option<&str> {
            self.0.description.as_deref()
        }

        async fn is_published(&self) -> bool {
            self.0.published_version_id.is_some()
        }

        async fn published(&self, ctx: &Context<'_>) -> Result<Option<AgentVersion>> {
            match self.0.published_version_id {
                Some(id) => Ok(load(ctx, AgentVersionId(id)).await?.map(AgentVersion)),
                None => Ok(None),
            }
        }

        /// Newest first.
        #[graphql(complexity = "list_complexity(first, last, child_complexity)")]
        async fn versions(
            &self,
            ctx: &Context<'_>,
            first: Option<i32>,
            after: Option<String>,
            last: Option<i32>,
            before: Option<String>,
        ) -> Result<Connection<Cursor, AgentVersion>> {
            let args = PageArgs::new(first, after, last, before)?;
            let page = load(ctx, VersionsOf(self.0.id, args)).await?.unwrap_or_default();
            Ok(page.connection(|version| (Cursor::Number(version.version.into()), AgentVersion(version))))
        }

        async fn created_at(&self) -> DateTime<Utc> {
            self.0.created_at
        }

        async fn updated_at(&self) -> DateTime<Utc> {
            self.0.updated_at
        }
    }
);

agent_definition!(
    #[Object]
    impl AgentVersion {
        pub async fn id(&self) -> ID {
            ids::encode(ids::AgentVersion, self.0.id)
        }

        async fn agent(&self, ctx: &Context<'_>) -> Result<Agent> {
            required_agent(ctx, self.0.agent_id).await
        }

        async fn version(&self) -> i32 {
            self.0.version
        }

        async fn published_at(&self) -> DateTime<Utc> {
            self.0.published_at
        }

        /// The versions that this one's handoffs, agent tools and guardrails resolve to, frozen with it.
        async fn reaches(&self, ctx: &Context<'_>) -> Result<Vec<AgentVersion>> {
            let reached = load(ctx, ReachesOf(self.0.id)).await?.unwrap_or_default();
            Ok(reached.into_iter().map(AgentVersion).collect())
        }
    }
);

/// An agent that something refers to.
pub async fn required_agent(ctx: &Context<'_>, id: Uuid) -> Result<Agent> {
    let agent = load(ctx, AgentId(id)).await?;
    Ok(Agent(agent.ok_or_else(|| Error::internal("an agent that is referred to is gone"))?))
}

#[derive(InputObject)]
pub struct AgentIdInput {
    agent_id: ID,
}

#[derive(InputObject)]
pub struct RollbackAgentInput {
    agent_id: ID,
    version: i32,
}

#[derive(SimpleObject)]
pub struct AgentPayload {
    agent: Option<Agent>,
    errors: Vec<UserError>,
}

fn agent_payload(outcome: Outcome<agents::Model>) -> Result<AgentPayload> {
    let (agent, errors) = payload(outcome.map(Agent))?;
    Ok(AgentPayload { agent, errors })
}

/// An id that isn't an agent's finds none.
pub fn agent_id(id: &ID) -> Uuid {
    ids::decode(ids::Agent, id).unwrap_or_default()
}

#[derive(Default)]
pub struct AgentQuery;

#[Object]
impl AgentQuery {
    /// [READ]
    #[graphql(complexity = "list_complexity(first, last, child_complexity)")]
    async fn agents(
        &self,
        ctx: &Context<'_>,
        first: Option<i32>,
        after: Option<String>,
        last: Option<i32>,
        before: Option<String>,
    ) -> Result<Connection<Cursor, Agent>> {
        let tenant_id = viewer(ctx)?.require(Scope::Read)?.tenant_id();
        let args = PageArgs::new(first, after, last, before)?;
        let page = load(ctx, AgentsOf(tenant_id, args)).await?.unwrap_or_default();
        Ok(page.connection(|agent| (Cursor::Id(agent.id), Agent(agent))))
    }

    /// [READ]
    async fn agent(&self, ctx: &Context<'_>, id: ID) -> Result<Option<Agent>> {
        viewer(ctx)?.require(Scope::Read)?;
        let agent = load(ctx, AgentId(agent_id(&id))).await?;
        Ok(agent.filter(|agent| agent.deleted_at.is_none()).map(Agent))
    }
}

#[derive(Default)]
pub struct AgentMutation;

#[Object]
impl AgentMutation {
    /// [MANAGE]
    async fn create_agent(&self, ctx: &Context<'_>, input: CreateAgentInput) -> Result<AgentPayload> {
        let tenant_id = viewer(ctx)?.require(Scope::Manage)?.tenant_id();
        let publish = input.publish;
        agent_payload(super::create(app(ctx)?, tenant_id, input.into(), publish).await)
    }

    /// [MANAGE] Fields left out stay.
    async fn update_agent(&self, ctx: &Context<'_>, input: UpdateAgentInput) -> Result<AgentPayload> {
        let tenant_id = viewer(ctx)?.require(Scope::Manage)?.tenant_id();
        let id = agent_id(&input.agent_id);
        agent_payload(super::update(app(ctx)?, tenant_id, id, input).await)
    }

    /// [MANAGE]
    async fn publish_agent(&self, ctx: &Context<'_>, input: AgentIdInput) -> Result<AgentPayload> {
        let tenant_id = viewer(ctx)?.require(Scope::Manage)?.tenant_id();
        agent_payload(super::publish(app(ctx)?, tenant_id, agent_id(&input.agent_id)).await)
    }

    /// [MANAGE] Publishes the named version again, as a new version.
    async fn rollback_agent(&self, ctx: &Context<'_>, input: RollbackAgentInput) -> Result<AgentPayload> {
        let tenant_id = viewer(ctx)?.require(Scope::Manage)?.tenant_id();
        agent_payload(super::rollback(app(ctx)?, tenant_id, agent_id(&input.agent_id), input.version).await)
    }

    /// [MANAGE]
    async fn delete_agent(&self, ctx: &Context<'_>, input: AgentIdInput) -> Result<DeletePayload> {
        let tenant_id = viewer(ctx)?.require(Scope::Manage)?.tenant_id();
        let (deleted, errors) = payload(super::delete(app(ctx)?, tenant_id, agent_id(&input.agent_id)).await)?;
        Ok(DeletePayload { deleted_id: deleted.map(|id| ids::encode(ids::Agent, id)), errors })
    }
}
