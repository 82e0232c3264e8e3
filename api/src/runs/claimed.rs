//! What is done with a claimed run, whichever worker executes it: one of this process's pool, or one apart.

use std::sync::{Arc, Mutex, PoisonError};

use cloister_runtime::ids::run_id;
use cloister_runtime::item::{Body, InputItem, Item, RunErrorCode, Step};
use cloister_runtime::journal::{Addition, Journal};
use cloister_runtime::model::{Model, ModelCall, ModelError, ModelEvent};
use cloister_runtime::run::{first_request, transcript};
use cloister_runtime::spec::{Claim, Lease, RunSpec};
use entity::{TenantOwned, quota_reservations, runs, tenants};
use futures_util::stream::BoxStream;
use sea_orm::{ColumnTrait, QueryFilter, QueryOrder};
use serde::Deserialize;
use uuid::Uuid;

use super::journal::{Append, DatabaseJournal, input_item, items_after, items_of};
use super::{announce, queue, run_agent_name};
use crate::agents::graph;
use crate::app::App;
use crate::error::Error;
use crate::models::catalog::CatalogModel;
use crate::models::gateway::{self, JournalWrite};
use crate::tenants::signing_secrets;
use crate::usage::quota::{CallOrigin, Reserve};

/// The right to write that a claim gave.
pub fn lease_of(run: &runs::Model) -> Lease {
    Lease { run_id: run.id, fence: run.fence }
}

/// All that the loop needs to begin or to go on.
pub async fn prepare(app: &App, run: &runs::Model) -> Result<Claim, Error> {
    prepare_with(app, run, RunSpec::deserialize(&run.spec)?).await
}

/// As [`prepare`], where the run's spec is at hand.
pub async fn prepare_with(app: &App, run: &runs::Model, mut spec: RunSpec) -> Result<Claim, Error> {
    graph::open_tokens(app, run.tenant_id, &mut spec)?;
    let items = match run.next_sequence {
        // Nothing has been done yet: what it has is its input.
        2 => vec![input_item(run, spec.agents.get(&spec.root).map_or("", |agent| &agent.name))],
        _ => items_after(app, run, 0, u64::MAX / 2).await?,
    };
    let mut history = Vec::new();
    for (earlier, items) in earlier_runs(app, run).await? {
        history.extend(transcript(&serde_json::from_value(earlier.spec)?, items));
    }
    let history = limited(history, run.history_limit);
    let left = i64::from(run.timeout_seconds) * 1_000 - queue::held_ms(run, app.clock.now());
    let calls_webhooks = spec.agents.values().any(|agent| !agent.tools.is_empty());
    let webhook_secrets = if calls_webhooks { webhook_secrets(app, run.tenant_id).await? } else { Vec::new() };
    Ok(Claim {
        lease: lease_of(run),
        spec,
        history,
        items,
        time_left_ms: u64::try_from(left).unwrap_or(0),
        webhook_secrets,
    })
}

/// The last items of a history, at most so many: turns stay whole, so that no call is without its output.
fn limited(parts: Vec<Vec<InputItem>>, limit: Option<i32>) -> Vec<InputItem> {
    let limit = limit.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(0));
    let mut count = 0;
    let first = parts.iter().rposition(|part| {
        count += part.len();
        count > limit
    });
    parts.into_iter().skip(first.map_or(0, |at| at + 1)).flatten().collect()
}

async fn webhook_secrets(app: &App, tenant_id: Uuid) -> Result<Vec<String>, Error> {
    let tenant = tenants::Entity::in_tenant(tenant_id).one(app.db.read()).await?;
    signing_secrets(app, &tenant.ok_or_else(|| Error::internal("a run of a tenant that is gone"))?)
}

/// The runs of the conversation that ended before this one began, with their items.
async fn earlier_runs(app: &App, run: &runs::Model) -> Result<Vec<(runs::Model, Vec<Item>)>, Error> {
    let Some(conversation_id) = run.conversation_id else {
        return Ok(Vec::new());
    };
    let earlier = runs::Entity::in_tenant(run.tenant_id)
        .filter(runs::Column::ConversationId.eq(conversation_id))
        .filter(runs::Column::Id.lt(run.id))
        .order_by_asc(runs::Column::Id)
        .all(app.db.read())
        .await?;
    let mut items = items_of(app, run.tenant_id, &earlier).await?;
    let with_items = earlier.into_iter().map(|run| {
        let items = items.remove(&run.id).unwrap_or_default();
        (run, items)
    });
    Ok(with_items.collect())
}

/// What keeps a run from being prepared may pass: its lease lapses, and it is claimed again. What has not passed after
/// several claims won't, unless it is only that the database is away: the run ends.
pub async fn retry_or_fail(app: &App, run: &runs::Model, error: &Error) {
    const CLAIMS: i64 = 5;
    tracing::error!(run_id = %run_id(run.id), inside = ?error, "a run could not be prepared");
    if run.fence < CLAIMS || matches!(error, Error::Unavailable(_)) {
        return;
    }
    let body = Body::failed(RunErrorCode::Internal, "The run could not be executed. Tell us its id.");
    let step = Step { agent_name: run_agent_name(run), turn: None, scope: None, body };
    if let Err(error) = DatabaseJournal::new(app, run).append(lease_of(run), run.next_sequence, vec![step]).await {
        tracing::error!(run_id = %run_id(run.id), %error, "a run that can't be executed could not be ended");
    }
}

/// Lets the next worker have a run at once, unless the lease is lost already.
pub async fn hand_back(app: &App, lease: Lease) -> Result<(), Error> {
    let tx = app.db.begin().await?;
    let waiting = queue::take_back(&tx, queue::Whose::Held(lease.run_id, lease.fence), app.clock.now()).await?;
    tx.commit().await?;
    announce(app, &waiting);
    Ok(())
}

/// As [`hand_back`], where nobody is to be told of a failure.
pub async fn try_hand_back(app: &App, lease: Lease) {
    if let Err(error) = hand_back(app, lease).await {
        tracing::warn!(run_id = %run_id(lease.run_id), inside = ?error, "a run was not handed back; its lease will lapse");
    }
}

/// The gateway as one run sees it, and whom the run's calls are charged to: that comes from the run's row, never from
/// its worker.
pub struct GatewayModel {
    app: App,
    run_id: Uuid,
    tenant_id: Uuid,
    key_id: Option<Uuid>,
    run_limit: Option<i64>,
    root: Uuid,
    in_conversation: bool,
    /// What was reserved for the first call when the run was stored.
    reserved: Mutex<Option<quota_reservations::Model>>,
}

impl GatewayModel {
    /// For this run's calls.
    pub fn new(app: &App, run: &runs::Model) -> Self {
        Self {
            app: app.clone(),
            run_id: run.id,
            tenant_id: run.tenant_id,
            key_id: run.api_key_id,
            run_limit: run.max_tokens,
            root: run.agent_id,
            in_conversation: run.conversation_id.is_some(),
            reserved: Mutex::default(),
        }
    }

    /// For the calls of a run whose first one may have its reservation.
    pub fn with(app: &App, run: &runs::Model, reserved: Option<quota_reservations::Model>) -> Self {
        Self { reserved: Mutex::new(reserved), ..Self::new(app, run) }
    }

    /// What the first call of a run is to reserve, where it's certain what that asks. None for a run with a limit of its
    /// own, whose counter is made when it is under way.
    pub fn first_call(app: &App, run: &runs::Model, spec: &RunSpec) -> Option<Reserve> {
        if run.max_tokens.is_some() {
            return None;
        }
        let request = first_request(spec)?;
        let root = spec.agents.get(&spec.root)?;
        let model = models(app, &root.model, &root.fallback_models).next()?;
        model.provider.as_ref()?;
        let ask = gateway::first_ask(&model, &request);
        let origin = Self::new(app, run).origin(1, root.id, root.version, model);
        Some(Reserve::new(app, &origin, ask))
    }

    /// What was reserved and not used.
    pub fn take_reserved(&self) -> Option<quota_reservations::Model> {
        self.reserved.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn origin(&self, turn: u32, agent: Uuid, agent_version: Option<i32>, model: Arc<CatalogModel>) -> CallOrigin {
        let root = self.root;
        CallOrigin {
            tenant_id: self.tenant_id,
            key_id: self.key_id,
            run_id: Some(self.run_id),
            run_limit: self.run_limit,
            turn: i32::try_from(turn).ok(),
            agent_id: Some(agent),
            agent_version,
            agent_path: Some(if root == agent { root.to_string() } else { format!("{root}/{agent}") }),
            model,
        }
    }
}

/// The models of a call that are in the catalogue, in the order in which they are tried.
fn models<'a>(
    app: &'a App,
    first: &'a str,
    fallbacks: &'a [String],
) -> impl Iterator<Item = Arc<CatalogModel>> + use<'a> {
    let names = std::iter::once(first).chain(fallbacks.iter().map(String::as_str));
    names.filter_map(|name| app.catalog.get(name))
}

impl Model for GatewayModel {
    fn stores_first(&self) -> bool {
        true
    }

    fn respond(&self, call: ModelCall) -> BoxStream<'static, Result<ModelEvent, ModelError>> {
        let mut models = models(&self.app, &call.request.model, &call.fallback_models);
        let Some(model) = models.next() else {
            let message = format!("The model {:?} is no longer in the catalogue.", call.request.model);
            let code = RunErrorCode::ModelUnavailable;
            return Box::pin(futures_util::stream::iter([Err(ModelError::Failed { code, message })]));
        };
        let origin = self.origin(call.turn, call.agent_id, call.agent_version, model);
        let (lease, in_conversation) = (call.lease, self.in_conversation);
        let append = |Addition { from_sequence, steps }| Append { lease, in_conversation, from_sequence, steps };
        let journal = JournalWrite { lease, in_conversation, first: call.first.map(append), recorder: call.recorder };
        gateway::call(&self.app, origin, models.collect(), call.request, Some(journal), self.take_reserved())
    }
}
