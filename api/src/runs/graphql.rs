//! `Run`, what is done with runs, and their subscriptions.
#![allow(missing_docs)] // fields and inputs are what the schema says they are

use async_graphql::connection::Connection;
use async_graphql::{Context, ID, InputObject, Json, Object, Result, SimpleObject, Subscription};
use chrono::{DateTime, Utc};
use cloister_runtime::item;
use entity::runs::Status;
use entity::{TenantOwned, runs};
use futures_util::{Stream, StreamExt};
use sea_orm::sea_query::Order;
use sea_orm::{ColumnTrait, Condition, QueryFilter, Select};
use serde_json::Value;
use tokio::sync::broadcast::error::RecvError;
use uuid::Uuid;

use super::approvals::{self, Decision};
use super::events::events;
use super::items_graphql::{RunEvent, RunItem, ToolCallItem};
use super::status::{RunErrorCode, RunStatus, code_from_name};
use super::{NewRun, OnBusy};
use crate::agents::graphql::{Agent, AgentVersion, agent_id, required_agent};
use crate::conversations::graphql::{Conversation, conversation_id};
use crate::error::{Error, Outcome, UserError, payload};
use crate::graphql::limits::list_complexity;
use crate::graphql::loaders::{AgentVersionId, ConversationId, ItemsOf, PendingOf, RunId, RunUsage, load};
use crate::graphql::page::{Cursor, List, PageArgs};
use crate::graphql::scalars::Long;
use crate::graphql::{app, viewer};
use crate::ids;
use crate::tenants::changes::Change;
use crate::usage::graphql::TokenUsage;
use crate::viewer::Scope;

/// Why a run failed.
#[derive(SimpleObject)]
pub struct RunError {
    code: RunErrorCode,
    message: String,
}

impl From<item::RunError> for RunError {
    fn from(error: item::RunError) -> Self {
        Self { code: error.code.into(), message: error.message }
    }
}

/// A run of an agent.
#[derive(Clone)]
pub struct Run(pub runs::Model);

#[Object]
impl Run {
    pub async fn id(&self) -> ID {
        ids::encode(ids::Run, self.0.id)
    }

    async fn status(&self) -> RunStatus {
        self.0.status.into()
    }

    /// The agent that answers first.
    async fn agent(&self, ctx: &Context<'_>) -> Result<Agent> {
        required_agent(ctx, self.0.agent_id).await
    }

    /// Null when the draft runs.
    async fn agent_version(&self, ctx: &Context<'_>) -> Result<Option<AgentVersion>> {
        match self.0.agent_version_id {
            Some(id) => Ok(load(ctx, AgentVersionId(id)).await?.map(AgentVersion)),
            None => Ok(None),
        }
    }

    /// The agent that answers now.
    async fn current_agent(&self, ctx: &Context<'_>) -> Result<Agent> {
        required_agent(ctx, self.0.current_agent_id).await
    }

    async fn conversation(&self, ctx: &Context<'_>) -> Result<Option<Conversation>> {
        match self.0.conversation_id {
            Some(id) => Ok(load(ctx, ConversationId(id)).await?.map(Conversation)),
            None => Ok(None),
        }
    }

    async fn input(&self) -> &str {
        &self.0.input
    }

    /// The final text; null until SUCCEEDED.
    async fn output(&self) -> Option<&str> {
        self.0.output.as_deref()
    }

    /// The final value of an agent with an outputSchema.
    async fn output_json(&self) -> Option<Json<&Value>> {
        self.0.output_json.as_ref().map(Json)
    }

    async fn error(&self) -> Option<RunError> {
        let code = code_from_name(self.0.error_code.as_deref()?);
        Some(RunError { code, message: self.0.error_message.clone().unwrap_or_default() })
    }

    /// Model responses stored so far.
    async fn turns(&self) -> i32 {
        self.0.turns
    }

    /// What the ledger has of it so far.
    async fn usage(&self, ctx: &Context<'_>) -> Result<TokenUsage> {
        Ok(TokenUsage(load(ctx, RunUsage(self.0.id)).await?.unwrap_or_default()))
    }

    /// The journal.
    #[graphql(complexity = "list_complexity(first, last, child_complexity)")]
    async fn items(
        &self,
        ctx: &Context<'_>,
        first: Option<i32>,
        after: Option<String>,
        last: Option<i32>,
        before: Option<String>,
    ) -> Result<Connection<Cursor, RunItem>> {
        let args = PageArgs::new(first, after, last, before)?;
        RunItem::page(load(ctx, ItemsOf(self.0.id, args)).await?.unwrap_or_default())
    }

    /// Calls that wait for a decision, nested agents' included.
    async fn pending_approvals(&self, ctx: &Context<'_>) -> Result<Vec<ToolCallItem>> {
        if Status::TERMINAL.contains(&self.0.status) {
            return Ok(Vec::new());
        }
        let pending = load(ctx, PendingOf(self.0.id)).await?.unwrap_or_default();
        Ok(pending.into_iter().filter_map(ToolCallItem::of).collect())
    }

    async fn created_at(&self) -> DateTime<Utc> {
        self.0.created_at
    }

    /// When a worker first had it.
    async fn started_at(&self) -> Option<DateTime<Utc>> {
        self.0.started_at
    }

    async fn finished_at(&self) -> Option<DateTime<Utc>> {
        self.0.finished_at
    }

    /// The tenant's own worker that has it, or had it last: its host, such as a pod. Null where the platform's shared pool
    /// has it, and before the first claim. [READ]
    async fn worker(&self, ctx: &Context<'_>) -> Result<Option<&str>> {
        viewer(ctx)?.may_see(self.0.tenant_id, Scope::Read)?;
        Ok(self.0.worker.as_deref())
    }
}

/// Which runs.
#[derive(InputObject)]
pub struct RunFilter {
    status: Option<Vec<RunStatus>>,
    agent_id: Option<ID>,
    conversation_id: Option<ID>,
    created_after: Option<DateTime<Utc>>,
    created_before: Option<DateTime<Utc>>,
}

impl RunFilter {
    fn apply(self, rows: Select<runs::Entity>) -> Select<runs::Entity> {
        let status = self.status.map(|all| runs::Column::Status.is_in(all.into_iter().map(Status::from)));
        let agent = self.agent_id.map(|id| runs::Column::AgentId.eq(agent_id(&id)));
        let conversation = self.conversation_id.map(|id| runs::Column::ConversationId.eq(conversation_id(&id)));
        let after = self.created_after.map(|time| runs::Column::CreatedAt.gt(time));
        let before = self.created_before.map(|time| runs::Column::CreatedAt.lt(time));
        let all = Condition::all()
            .add_option(status)
            .add_option(agent)
            .add_option(conversation)
            .add_option(after)
            .add_option(before);
        rows.filter(all)
    }
}

#[derive(InputObject)]
pub struct StartRunInput {
    agent_id: ID,
    input: String,
    conversation_id: Option<ID>,
    /// Begin a new conversation with this run.
    new_conversation: Option<bool>,
    /// The most items of the conversation that the run is shown, in whole turns. Default: all.
    history_limit: Option<i32>,
    /// Values for {{variables}} in the instructions: an object of strings, numbers and booleans.
    variables: Option<Json<Value>>,
    /// Default: the published version.
    version: Option<i32>,
    draft: Option<bool>,
    /// The most tokens the run may use.
    max_tokens: Option<Long>,
    timeout_seconds: Option<i32>,
    on_busy: Option<OnBusy>,
    idempotency_key: Option<String>,
}

impl StartRunInput {
    fn into_new(self) -> NewRun {
        NewRun {
            agent_id: agent_id(&self.agent_id),
            input: self.input,
            conversation_id: self.conversation_id.map(|id| conversation_id(&id)),
            new_conversation: self.new_conversation.unwrap_or(false),
            history_limit: self.history_limit,
            variables: self.variables.map(|variables| variables.0),
            version: self.version,
            draft: self.draft.unwrap_or(false),
            max_tokens: self.max_tokens.map(|tokens| tokens.0),
            timeout_seconds: self.timeout_seconds,
            on_busy: self.on_busy.unwrap_or_default(),
            idempotency_key: self.idempotency_key,
        }
    }
}

#[derive(InputObject)]
pub struct RunIdInput {
    run_id: ID,
}

#[derive(InputObject)]
pub struct DecideToolCallInput {
    run_id: ID,
    call_id: String,
    approve: bool,
    /// Of the arguments that were seen; refused if they differ.
    arguments_hash: String,
    /// Told to the model in place of the tool's output when rejecting.
    message: Option<String>,
    /// Decide all later calls of this tool in this run alike.
    always: Option<bool>,
}

#[derive(SimpleObject)]
pub struct RunPayload {
    run: Option<Run>,
    errors: Vec<UserError>,
}

fn run_payload(outcome: Outcome<runs::Model>) -> Result<RunPayload> {
    let (run, errors) = payload(outcome.map(Run))?;
    Ok(RunPayload { run, errors })
}

/// An id that isn't a run's finds none.
fn run_id(id: &ID) -> Uuid {
    ids::decode(ids::Run, id).unwrap_or_default()
}

#[derive(Default)]
pub struct RunQuery;

#[Object]
impl RunQuery {
    /// [READ or RUN] newest first
    #[graphql(complexity = "list_complexity(first, last, child_complexity)")]
    async fn runs(
        &self,
        ctx: &Context<'_>,
        filter: Option<RunFilter>,
        first: Option<i32>,
        after: Option<String>,
        last: Option<i32>,
        before: Option<String>,
    ) -> Result<Connection<Cursor, Run>> {
        let tenant_id = viewer(ctx)?.require_any(&[Scope::Read, Scope::Run])?.tenant_id();
        let args = PageArgs::new(first, after, last, before)?;
        let mut rows = runs::Entity::in_tenant(tenant_id);
        if let Some(filter) = filter {
            rows = filter.apply(rows);
        }
        let page = List { rows, sort: runs::Column::Id, then: None, order: Order::Desc }
            .page(app(ctx)?.db.read(), args)
            .await?;
        Ok(page.connection(|run| (Cursor::Id(run.id), Run(run))))
    }

    /// [READ or RUN]
    async fn run(&self, ctx: &Context<'_>, id: ID) -> Result<Option<Run>> {
        viewer(ctx)?.require_any(&[Scope::Read, Scope::Run])?;
        Ok(load(ctx, RunId(run_id(&id))).await?.map(Run))
    }
}

#[derive(Default)]
pub struct RunMutation;

#[Object]
impl RunMutation {
    /// [RUN]
    async fn start_run(&self, ctx: &Context<'_>, input: StartRunInput) -> Result<RunPayload> {
        let viewer = viewer(ctx)?.require(Scope::Run)?;
        let started = super::start(app(ctx)?, viewer, input.into_new()).await;
        run_payload(started.map(|(run, _)| run))
    }

    /// [RUN]
    async fn cancel_run(&self, ctx: &Context<'_>, input: RunIdInput) -> Result<RunPayload> {
        let tenant_id = viewer(ctx)?.require(Scope::Run)?.tenant_id();
        run_payload(super::cancel(app(ctx)?, tenant_id, run_id(&input.run_id)).await)
    }

    /// [RUN] From PAUSED_QUOTA.
    async fn resume_run(&self, ctx: &Context<'_>, input: RunIdInput) -> Result<RunPayload> {
        let tenant_id = viewer(ctx)?.require(Scope::Run)?.tenant_id();
        run_payload(super::resume(app(ctx)?, tenant_id, run_id(&input.run_id)).await)
    }

    /// [RUN] About a call that waits. The run goes on with it; others may still wait.
    async fn decide_tool_call(&self, ctx: &Context<'_>, input: DecideToolCallInput) -> Result<RunPayload> {
        let tenant_id = viewer(ctx)?.require(Scope::Run)?.tenant_id();
        let DecideToolCallInput { run_id: id, call_id, approve, arguments_hash, message, always } = input;
        let decision = Decision { call_id, approve, arguments_hash, message, always: always.unwrap_or(false) };
        run_payload(approvals::decide(app(ctx)?, tenant_id, run_id(&id), decision).await)
    }
}

#[derive(Default)]
pub struct RunSubscription;

#[Subscription]
impl RunSubscription {
    /// [READ or RUN] Items after `after`, then live; ends with the run.
    async fn run_events<'ctx>(
        &self,
        ctx: &Context<'ctx>,
        #[graphql(name = "runId")] id: ID,
        #[graphql(default_with = "Some(0)")] after: Option<i32>,
    ) -> Result<impl Stream<Item = Result<RunEvent>> + use<'ctx>> {
        let tenant_id = viewer(ctx)?.require_any(&[Scope::Read, Scope::Run])?.tenant_id();
        let app = app(ctx)?.clone();
        let run = runs::Entity::in_tenant(tenant_id)
            .filter(runs::Column::Id.eq(run_id(&id)))
            .one(app.db.read())
            .await
            .map_err(Error::from)?
            .ok_or_else(|| Error::NotFound("runId: there is no run with this id.".to_owned()))?;
        let after = after.unwrap_or(0);
        if after < 0 {
            return Err(Error::BadRequest("after: a sequence is never negative.".to_owned()).into());
        }
        Ok(events(app, run, i64::from(after)).map(|event| Ok(event?.into())))
    }

    /// [READ or RUN] Each change of status of the tenant's runs.
    async fn runs<'ctx>(&self, ctx: &Context<'ctx>) -> Result<impl Stream<Item = Run> + use<'ctx>> {
        let tenant_id = viewer(ctx)?.require_any(&[Scope::Read, Scope::Run])?.tenant_id();
        let app = app(ctx)?;
        let mut changes = app.changes.subscribe(tenant_id, app.clock.now()).await;
        Ok(async_stream::stream! {
            loop {
                match changes.recv().await {
                    Ok(Change::Run(run)) => yield Run((*run).clone()),
                    // A subscriber that is too slow misses changes, never others' time.
                    Ok(Change::Usage | Change::Provisioning) | Err(RecvError::Lagged(_)) => {}
                    Err(RecvError::Closed) => return,
                }
            }
        })
    }
}
