//! `Conversation` and what is done with conversations.
#![allow(missing_docs)] // fields and inputs are what the schema says they are

use async_graphql::connection::Connection;
use async_graphql::{Context, ID, InputObject, Object, Result};
use chrono::{DateTime, Utc};
use entity::{TenantOwned, conversations};
use sea_orm::sea_query::Order;
use sea_orm::{ColumnTrait, QueryFilter};
use uuid::Uuid;

use crate::error::payload;
use crate::graphql::limits::list_complexity;
use crate::graphql::loaders::{ConversationId, MessagesOf, RunsOf, load};
use crate::graphql::page::{Cursor, List, PageArgs};
use crate::graphql::{app, viewer};
use crate::ids;
use crate::runs::graphql::Run;
use crate::runs::items_graphql::RunItem;
use crate::tenants::graphql::DeletePayload;
use crate::viewer::Scope;

/// A conversation: runs that share a history.
#[derive(Clone)]
pub struct Conversation(pub conversations::Model);

#[Object]
impl Conversation {
    pub async fn id(&self) -> ID {
        ids::encode(ids::Conversation, self.0.id)
    }

    async fn created_at(&self) -> DateTime<Utc> {
        self.0.created_at
    }

    async fn updated_at(&self) -> DateTime<Utc> {
        self.0.updated_at
    }

    /// Newest first.
    #[graphql(complexity = "list_complexity(first, last, child_complexity)")]
    async fn runs(
        &self,
        ctx: &Context<'_>,
        first: Option<i32>,
        after: Option<String>,
        last: Option<i32>,
        before: Option<String>,
    ) -> Result<Connection<Cursor, Run>> {
        let args = PageArgs::new(first, after, last, before)?;
        let page = load(ctx, RunsOf(self.0.id, args)).await?.unwrap_or_default();
        Ok(page.connection(|run| (Cursor::Id(run.id), Run(run))))
    }

    /// What was said, oldest first.
    #[graphql(complexity = "list_complexity(first, last, child_complexity)")]
    async fn messages(
        &self,
        ctx: &Context<'_>,
        first: Option<i32>,
        after: Option<String>,
        last: Option<i32>,
        before: Option<String>,
    ) -> Result<Connection<Cursor, RunItem>> {
        let args = PageArgs::new(first, after, last, before)?;
        let page = load(ctx, MessagesOf(self.0.id, args)).await?.unwrap_or_default();
        RunItem::messages(page)
    }
}

#[derive(InputObject)]
pub struct ConversationIdInput {
    conversation_id: ID,
}

/// An id that isn't a conversation's finds none.
pub fn conversation_id(id: &ID) -> Uuid {
    ids::decode(ids::Conversation, id).unwrap_or_default()
}

#[derive(Default)]
pub struct ConversationQuery;

#[Object]
impl ConversationQuery {
    /// [READ or RUN]
    async fn conversation(&self, ctx: &Context<'_>, id: ID) -> Result<Option<Conversation>> {
        viewer(ctx)?.require_any(&[Scope::Read, Scope::Run])?;
        let conversation = load(ctx, ConversationId(conversation_id(&id))).await?;
        Ok(conversation.filter(|conversation| conversation.deleted_at.is_none()).map(Conversation))
    }

    /// [READ or RUN] Newest first.
    #[graphql(complexity = "list_complexity(first, last, child_complexity)")]
    async fn conversations(
        &self,
        ctx: &Context<'_>,
        first: Option<i32>,
        after: Option<String>,
        last: Option<i32>,
        before: Option<String>,
    ) -> Result<Connection<Cursor, Conversation>> {
        let tenant_id = viewer(ctx)?.require_any(&[Scope::Read, Scope::Run])?.tenant_id();
        let args = PageArgs::new(first, after, last, before)?;
        let rows = conversations::Entity::in_tenant(tenant_id).filter(conversations::Column::DeletedAt.is_null());
        let list = List { rows, sort: conversations::Column::Id, then: None, order: Order::Desc };
        let page = list.page(app(ctx)?.db.read(), args).await?;
        Ok(page.connection(|conversation| (Cursor::Id(conversation.id), Conversation(conversation))))
    }
}

#[derive(Default)]
pub struct ConversationMutation;

#[Object]
impl ConversationMutation {
    /// [RUN]
    async fn delete_conversation(&self, ctx: &Context<'_>, input: ConversationIdInput) -> Result<DeletePayload> {
        let tenant_id = viewer(ctx)?.require(Scope::Run)?.tenant_id();
        let outcome = super::delete(app(ctx)?, tenant_id, conversation_id(&input.conversation_id)).await;
        let (deleted, errors) = payload(outcome)?;
        Ok(DeletePayload { deleted_id: deleted.map(|id| ids::encode(ids::Conversation, id)), errors })
    }
}
