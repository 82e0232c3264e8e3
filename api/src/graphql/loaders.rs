//! Loading related objects together: the number of statements of a query does not depend on the
//! number of rows.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context as TaskContext, Poll, Wake, Waker};
use std::time::Duration;

use async_graphql::dataloader::{DataLoader, Loader};
use async_graphql::{Context, Result};
use cloister_runtime::item::{Item, RunErrorCode};
use entity::{
    Shared, TenantOwned, agent_versions, agents, api_keys, cluster_tenants, conversations, models, prices, run_items,
    runs, runtime_tokens,
};
use futures_util::future::BoxFuture;
use futures_util::stream::{self, FuturesUnordered, Stream, StreamExt};
use futures_util::task::AtomicWaker;
use sea_orm::sea_query::{Expr, Order, Query, SelectStatement};
use sea_orm::{ColumnTrait, DbErr, ExprTrait, QueryFilter, QueryOrder, QuerySelect, Select};
use uuid::Uuid;

use super::page::{List, Page, PageArgs, pages};
use crate::app::App;
use crate::error::Error;
use crate::runs::approvals;
use crate::runs::journal::items_of;
use crate::runs::status::code_name;
use crate::usage::report::{self, Month, MonthUsage, Sum};
use crate::viewer::Viewer;

/// Loads for one request, as its caller may see.
pub struct Batch {
    app: App,
    /// The caller's tenant; none for the platform admin.
    tenant_id: Option<Uuid>,
}

/// Loads that a request has asked for, driven by the request's own task: whenever all of its resolvers wait, and so
/// have asked for all that they can, what they asked for is loaded. A batch that a timer began would hold whatever
/// had been asked for by then, and the number of statements would depend on the time that resolvers take.
#[derive(Clone, Default)]
pub struct Loads(Arc<Mutex<Vec<BoxFuture<'static, ()>>>>);

impl Loads {
    fn push(&self, load: BoxFuture<'static, ()>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(load);
    }

    fn take(&self) -> Vec<BoxFuture<'static, ()>> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The results, with what they wait for loaded as they are polled for.
    pub fn drive<T>(self, mut results: impl Stream<Item = T> + Unpin) -> impl Stream<Item = T> {
        let mut under_way = FuturesUnordered::new();
        let wakes = Arc::new(Wakes::default());
        let waker = Waker::from(wakes.clone());
        stream::poll_fn(move |context| {
            wakes.task.register(context.waker());
            loop {
                wakes.any.store(false, Ordering::SeqCst);
                if let Poll::Ready(result) = results.poll_next_unpin(&mut TaskContext::from_waker(&waker)) {
                    return Poll::Ready(result);
                }
                // Of a long list a few resolvers are polled at a time. Who wants to be polled again at once has more.
                if wakes.any.load(Ordering::SeqCst) {
                    return Poll::Pending;
                }
                under_way.extend(self.take());
                match under_way.poll_next_unpin(context) {
                    // What it brought may let resolvers go on.
                    Poll::Ready(Some(())) => {}
                    Poll::Ready(None) | Poll::Pending => return Poll::Pending,
                }
            }
        })
    }
}

/// Passes wakes on to the task, and remembers that there were any.
#[derive(Default)]
struct Wakes {
    any: AtomicBool,
    task: AtomicWaker,
}

impl Wake for Wakes {
    fn wake(self: Arc<Self>) {
        self.any.store(true, Ordering::SeqCst);
        self.task.wake();
    }
}

/// A loader for one request.
pub fn loader(app: &App, viewer: &Viewer, loads: &Loads) -> DataLoader<Batch> {
    let tenant_id = viewer.require_tenant().ok().map(|viewer| viewer.tenant_id());
    let loads = loads.clone();
    DataLoader::new(Batch { app: app.clone(), tenant_id }, move |load| loads.push(load)).delay(Duration::ZERO)
}

/// Loads one thing, together with whatever else the query asks for at the same time.
pub async fn load<K>(ctx: &Context<'_>, key: K) -> Result<Option<<Batch as Loader<K>>::Value>>
where
    K: Send + Sync + Hash + Eq + Clone + 'static,
    Batch: Loader<K, Error = Arc<Error>>,
{
    let loader = ctx.data::<DataLoader<Batch>>()?;
    loader.load_one(key).await.map_err(|error| Error::clone(&error).into())
}

impl Batch {
    fn own<E: TenantOwned>(&self) -> Select<E> {
        match self.tenant_id {
            Some(id) => E::in_tenant(id),
            None => E::across_tenants(),
        }
    }
}

macro_rules! load_by_id {
    ($($(#[$doc:meta])* $key:ident: $table:ident),* $(,)?) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub struct $key(pub Uuid);

        impl Loader<$key> for Batch {
            type Value = $table::Model;
            type Error = Arc<Error>;

            async fn load(&self, keys: &[$key]) -> Result<HashMap<$key, $table::Model>, Arc<Error>> {
                let rows = self
                    .own::<$table::Entity>()
                    .filter($table::Column::Id.is_in(keys.iter().map(|key| key.0)))
                    .all(self.app.db.read())
                    .await
                    .map_err(|error| Arc::new(error.into()))?;
                Ok(rows.into_iter().map(|row| ($key(row.id), row)).collect())
            }
        }
    )*};
}

load_by_id! {
    /// An agent; deleted ones too, since what refers to them goes on resolving.
    AgentId: agents,
    /// A published version.
    AgentVersionId: agent_versions,
    /// An API key; revoked ones too.
    ApiKeyId: api_keys,
    /// A conversation.
    ConversationId: conversations,
    /// A run.
    RunId: runs,
    /// A worker's token; revoked ones too.
    RuntimeTokenId: runtime_tokens,
}

/// What a run has used, by its id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RunUsage(pub Uuid);

impl Loader<RunUsage> for Batch {
    type Value = Sum;
    type Error = Arc<Error>;

    async fn load(&self, keys: &[RunUsage]) -> Result<HashMap<RunUsage, Sum>, Arc<Error>> {
        let ids: Vec<Uuid> = keys.iter().map(|key| key.0).collect();
        let sums = report::runs(&self.app, &ids).await.map_err(Arc::new)?;
        Ok(sums.into_iter().map(|(id, sum)| (RunUsage(id), sum)).collect())
    }
}

/// The calls of a run that wait for a decision, by the run's id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PendingOf(pub Uuid);

impl Loader<PendingOf> for Batch {
    type Value = Vec<Item>;
    type Error = Arc<Error>;

    async fn load(&self, keys: &[PendingOf]) -> Result<HashMap<PendingOf, Self::Value>, Arc<Error>> {
        let asked = self
            .own::<run_items::Entity>()
            .filter(run_items::Column::RunId.is_in(keys.iter().map(|key| key.0)))
            .filter(run_items::Column::Kind.eq("approval"))
            .select_only()
            .column(run_items::Column::RunId)
            .distinct()
            .into_tuple::<Uuid>()
            .all(self.app.db.read());
        let fault = |error: DbErr| Arc::new(Error::from(error));
        let asked = asked.await.map_err(fault)?;
        if asked.is_empty() {
            return Ok(HashMap::new());
        }
        let rows = self.own::<runs::Entity>().filter(runs::Column::Id.is_in(asked)).all(self.app.db.read());
        let rows = rows.await.map_err(fault)?;
        let mut pending = HashMap::new();
        for (tenant_id, runs) in by_tenant(rows) {
            let mut items = items_of(&self.app, tenant_id, &runs).await.map_err(Arc::new)?;
            for run in runs {
                let calls = approvals::pending(&run, items.remove(&run.id).unwrap_or_default()).map_err(Arc::new)?;
                pending.insert(PendingOf(run.id), calls);
            }
        }
        Ok(pending)
    }
}

fn by_tenant(rows: Vec<runs::Model>) -> HashMap<Uuid, Vec<runs::Model>> {
    let mut by_tenant: HashMap<Uuid, Vec<runs::Model>> = HashMap::new();
    for run in rows {
        by_tenant.entry(run.tenant_id).or_default().push(run);
    }
    by_tenant
}

/// A tenant's month.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TenantMonth(pub Uuid, pub Month);

impl Loader<TenantMonth> for Batch {
    type Value = MonthUsage;
    type Error = Arc<Error>;

    async fn load(&self, keys: &[TenantMonth]) -> Result<HashMap<TenantMonth, MonthUsage>, Arc<Error>> {
        let mut by_month: HashMap<Month, Vec<Uuid>> = HashMap::new();
        for TenantMonth(tenant_id, month) in keys {
            by_month.entry(*month).or_default().push(*tenant_id);
        }
        let mut loaded = HashMap::new();
        for (month, tenants) in by_month {
            let months = report::months(&self.app, &tenants, month).await.map_err(Arc::new)?;
            loaded.extend(months.into_iter().map(|(tenant_id, usage)| (TenantMonth(tenant_id, month), usage)));
        }
        Ok(loaded)
    }
}

/// The object that rules a tenant, by the tenant's id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RulerOf(pub Uuid);

impl Loader<RulerOf> for Batch {
    type Value = cluster_tenants::Model;
    type Error = Arc<Error>;

    async fn load(&self, keys: &[RulerOf]) -> Result<HashMap<RulerOf, cluster_tenants::Model>, Arc<Error>> {
        let rows = self
            .own::<cluster_tenants::Entity>()
            .filter(cluster_tenants::Column::TenantId.is_in(keys.iter().map(|key| key.0)))
            .filter(cluster_tenants::Column::ReleasedAt.is_null())
            .all(self.app.db.read())
            .await
            .map_err(|error| Arc::new(error.into()))?;
        Ok(rows.into_iter().map(|row| (RulerOf(row.tenant_id), row)).collect())
    }
}

/// A model that is no longer configured, by its name, and its last price.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FormerModel(pub String);

impl Loader<FormerModel> for Batch {
    type Value = (models::Model, prices::Model);
    type Error = Arc<Error>;

    async fn load(&self, keys: &[FormerModel]) -> Result<HashMap<FormerModel, Self::Value>, Arc<Error>> {
        let names = || keys.iter().map(|key| key.0.clone());
        let fault = |error: sea_orm::DbErr| Arc::new(Error::from(error));
        let db = self.app.db.read();
        let rows = models::Entity::all().filter(models::Column::Name.is_in(names())).all(db).await.map_err(fault)?;
        let prices = prices::Entity::all()
            .filter(prices::Column::Model.is_in(names()))
            .order_by_asc(prices::Column::ValidFrom)
            .all(db)
            .await
            .map_err(fault)?;
        let newest: HashMap<String, prices::Model> =
            prices.into_iter().map(|price| (price.model.clone(), price)).collect();
        let found = rows.into_iter().filter_map(|model| {
            let price = newest.get(&model.name)?.clone();
            Some((FormerModel(model.name.clone()), (model, price)))
        });
        Ok(found.collect())
    }
}

macro_rules! load_pages {
    ($($(#[$doc:meta])* $key:ident: $table:ident by $parent:ident, $sort:ident $order:ident $(, $only:expr)?);* $(;)?) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub struct $key(pub Uuid, pub PageArgs);

        impl Loader<$key> for Batch {
            type Value = Page<$table::Model>;
            type Error = Arc<Error>;

            async fn load(&self, keys: &[$key]) -> Result<HashMap<$key, Self::Value>, Arc<Error>> {
                let lists = keys.iter().map(|key| {
                    let rows = self.own::<$table::Entity>().filter($table::Column::$parent.eq(key.0));
                    $(let rows = rows.filter($only);)?
                    (key.0, key.1, List { rows, sort: $table::Column::$sort, then: None, order: Order::$order })
                });
                let pages = pages(self.app.db.read(), lists.collect()).await.map_err(Arc::new)?;
                Ok(pages.into_iter().map(|((parent, args), page)| ($key(parent, args), page)).collect())
            }
        }
    )*};
}

load_pages! {
    /// A tenant's keys.
    ApiKeysOf: api_keys by TenantId, Id Asc;
    /// A tenant's workers' tokens.
    RuntimeTokensOf: runtime_tokens by TenantId, Id Asc;
    /// A tenant's agents.
    AgentsOf: agents by TenantId, Id Asc, agents::Column::DeletedAt.is_null();
    /// An agent's versions, newest first.
    VersionsOf: agent_versions by AgentId, Version Desc;
    /// A conversation's runs.
    RunsOf: runs by ConversationId, Id Desc;
    /// A run's items.
    ItemsOf: run_items by RunId, Sequence Asc;
}

/// What a version's handoffs, agent tools and guardrails resolve to: other versions, by its id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ReachesOf(pub Uuid);

impl Loader<ReachesOf> for Batch {
    type Value = Vec<agent_versions::Model>;
    type Error = Arc<Error>;

    async fn load(&self, keys: &[ReachesOf]) -> Result<HashMap<ReachesOf, Self::Value>, Arc<Error>> {
        let fault = |error: sea_orm::DbErr| Arc::new(Error::from(error));
        let db = self.app.db.read();
        let of = |ids: Vec<Uuid>| self.own::<agent_versions::Entity>().filter(agent_versions::Column::Id.is_in(ids));
        let roots = of(keys.iter().map(|key| key.0).collect()).all(db).await.map_err(fault)?;
        let closures: Vec<(Uuid, Vec<Uuid>)> = roots
            .into_iter()
            .map(|root| Ok((root.id, serde_json::from_value(root.closure)?)))
            .collect::<Result<_, serde_json::Error>>()
            .map_err(|error| Arc::new(error.into()))?;
        let members = of(closures.iter().flat_map(|(_, ids)| ids.iter().copied()).collect());
        let rows = members.all(db).await.map_err(fault)?;
        let by_id: HashMap<Uuid, agent_versions::Model> = rows.into_iter().map(|row| (row.id, row)).collect();
        let reached = closures.into_iter().map(|(root, ids)| {
            let others = ids.iter().filter(|id| **id != root).filter_map(|id| by_id.get(id).cloned());
            (ReachesOf(root), others.collect())
        });
        Ok(reached.collect())
    }
}

/// That an item is of a response which ended its run as failed: no part of the conversation, as no later run is shown it.
fn withheld() -> SelectStatement {
    const CODES: [RunErrorCode; 3] = [RunErrorCode::Guardrail, RunErrorCode::ModelBehavior, RunErrorCode::ModelRefusal];
    let of_item =
        |column: runs::Column, of: run_items::Column| Expr::col((runs::Entity, column)).equals((run_items::Entity, of));
    Query::select()
        .expr(Expr::val(1))
        .from(runs::Entity)
        .and_where(of_item(runs::Column::Id, run_items::Column::RunId))
        .and_where(of_item(runs::Column::Turns, run_items::Column::Turn))
        .and_where(Expr::col((runs::Entity, runs::Column::ErrorCode)).is_in(CODES.map(code_name)))
        .to_owned()
}

/// A conversation's messages, oldest first, by its id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MessagesOf(pub Uuid, pub PageArgs);

impl Loader<MessagesOf> for Batch {
    type Value = Page<run_items::Model>;
    type Error = Arc<Error>;

    async fn load(&self, keys: &[MessagesOf]) -> Result<HashMap<MessagesOf, Self::Value>, Arc<Error>> {
        let lists = keys.iter().map(|MessagesOf(conversation_id, args)| {
            let runs = Query::select()
                .column(runs::Column::Id)
                .from(runs::Entity)
                .and_where(runs::Column::ConversationId.eq(*conversation_id))
                .to_owned();
            let rows = self
                .own::<run_items::Entity>()
                .filter(run_items::Column::RunId.in_subquery(runs))
                .filter(run_items::Column::Kind.eq("message"))
                .filter(run_items::Column::Scope.is_null())
                .filter(Expr::exists(withheld()).not());
            let then = Some(run_items::Column::Sequence);
            (*conversation_id, *args, List { rows, sort: run_items::Column::RunId, then, order: Order::Asc })
        });
        let pages = pages(self.app.db.read(), lists.collect()).await.map_err(Arc::new)?;
        Ok(pages.into_iter().map(|((id, args), page)| (MessagesOf(id, args), page)).collect())
    }
}
