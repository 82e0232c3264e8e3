//! A model call of a worker apart.
//!
//! The call is the shared pool's: metered, its items stored in the transaction that charges it. Its text is told to
//! subscribers from here, as it comes; the worker hears of the whole response.

use std::collections::HashSet;

use cloister_runtime::item::Body;
use cloister_runtime::model::{Model, ModelCall, ModelError, ModelEvent};
use cloister_runtime::protocol::{ModelMessage, ModelTurn, RefusalCode};
use cloister_runtime::recorder::TurnRecorder;
use cloister_runtime::run::deltas::Deltas;
use cloister_runtime::spec::{Lease, RunSpec};
use entity::runs::Status;
use entity::{TenantOwned, run_items, runs};
use futures_util::stream::BoxStream;
use futures_util::{Stream, StreamExt};
use sea_orm::{ColumnTrait, QueryFilter, QuerySelect};
use serde::Deserialize;

use super::refused::Refused;
use super::tokens::{self, Caller};
use super::{checks, leased, next_turn, wrong_sequence};
use crate::app::App;
use crate::runs::claimed::GatewayModel;
use crate::runs::journal::from_row;
use crate::runs::pool::{Answering, Pool};

/// The most turns of a nested run: what an agent, or a tool, may have at most.
const MAX_NESTED_TURNS: u32 = 1_000;

/// Calls the model for a run's next turn. The request must be within what the run's agent allows; whom it is charged
/// to, and with which limits, comes from the database.
pub async fn model(
    app: &App,
    caller: &Caller,
    turn: ModelTurn,
) -> Result<impl Stream<Item = ModelMessage> + Send + use<>, Refused> {
    let ModelTurn { lease, turn, scope, agent_id, is_final, from_seq, request } = turn;
    let run = ready(app, caller, lease).await?;
    let busy = || Refused::new(RefusalCode::Busy, "The model is being called for this run already.");
    let answering = Pool::answer(app, lease, scope.as_deref()).ok_or_else(busy)?;
    // Again: who took the run away before the line above told nobody.
    let run = runs::Model { spec: run.spec, ..ready(app, caller, lease).await? };
    let spec = RunSpec::deserialize(&run.spec)?;
    let may_lie_before = spec.has_other_authors() && (1..run.next_sequence).contains(&from_seq);
    if from_seq != run.next_sequence && !may_lie_before {
        return Err(wrong_sequence(&run));
    }
    let agent = match &scope {
        None => spec.agents.get(&run.current_agent_id),
        Some(scope) => agent_id.filter(|_| checks::is_scope(&spec, scope)).and_then(|id| spec.agents.get(&id)),
    };
    let agent = agent.ok_or_else(|| Refused::invalid("The agent is not part of the run, or has no nested runs."))?;
    let (next, most) = match &scope {
        None => (next_turn(&run), spec.agents.get(&spec.root).map_or(0, |root| root.max_turns)),
        Some(scope) => (next_nested_turn(app, &run, scope).await?, MAX_NESTED_TURNS),
    };
    if turn != next || turn > most {
        return Err(Refused::invalid(format!("The next turn is {next}, of {most}.")));
    }
    if request.model != agent.model || request.max_output_tokens != agent.settings.max_output_tokens {
        return Err(Refused::invalid("The run's agent has another model, or another maximum of output tokens."));
    }
    let recorder = TurnRecorder {
        turn,
        agent_name: agent.name.clone(),
        is_final: is_final && TurnRecorder::ends_with_text(agent),
        scope,
        from_sequence: from_seq,
        used_call_ids: used_call_ids(app, &run).await?,
    };
    // A nested run's text is no part of the run's.
    let deltas = recorder.scope.is_none().then(|| Deltas::new(&recorder));
    let call = ModelCall {
        lease,
        turn,
        agent_id: agent.id,
        agent_version: agent.version,
        first: None,
        request,
        fallback_models: agent.fallback_models.clone(),
        recorder,
    };
    let events = GatewayModel::new(app, &run).respond(call);
    Ok(messages(app.clone(), caller.clone(), lease, answering, deltas, events))
}

/// The run, if the worker holds it and it goes on.
async fn ready(app: &App, caller: &Caller, lease: Lease) -> Result<runs::Model, Refused> {
    let run = leased(app, caller, lease).await?;
    if run.status == Status::Running { Ok(run) } else { Err(Refused::lease_lost()) }
}

/// The turn of a nested run whose response is not stored yet.
async fn next_nested_turn(app: &App, run: &runs::Model, scope: &str) -> Result<u32, Refused> {
    let last: Option<Option<i32>> = run_items::Entity::in_tenant(run.tenant_id)
        .filter(run_items::Column::RunId.eq(run.id))
        .filter(run_items::Column::RunCreatedAt.eq(run.created_at))
        .filter(run_items::Column::Scope.eq(scope))
        .filter(run_items::Column::Kind.eq("usage"))
        .select_only()
        .column_as(run_items::Column::Turn.max(), "turn")
        .into_tuple()
        .one(app.db.read())
        .await?;
    Ok(u32::try_from(last.flatten().unwrap_or(0)).unwrap_or(0) + 1)
}

/// Call ids that the run has used, from the journal.
async fn used_call_ids(app: &App, run: &runs::Model) -> Result<HashSet<String>, Refused> {
    let calls = run_items::Entity::in_tenant(run.tenant_id)
        .filter(run_items::Column::RunId.eq(run.id))
        .filter(run_items::Column::RunCreatedAt.eq(run.created_at))
        .filter(run_items::Column::Kind.eq("tool_call"))
        .all(app.db.read())
        .await?;
    let mut used_call_ids = HashSet::new();
    for call in calls {
        if let Body::ToolCall { call_id, .. } = from_row(call)?.step.body {
            used_call_ids.insert(call_id);
        }
    }
    Ok(used_call_ids)
}

fn messages(
    app: App,
    caller: Caller,
    lease: Lease,
    answering: Answering,
    mut deltas: Option<Deltas>,
    mut events: BoxStream<'static, Result<ModelEvent, ModelError>>,
) -> impl Stream<Item = ModelMessage> + Send + use<> {
    async_stream::stream! {
        let mut lost = Box::pin(tokens::lost(&app, caller));
        loop {
            let event = tokio::select! {
                biased;
                () = answering.abandoned() => Some(Err(ModelError::LeaseLost)),
                error = &mut lost => Some(Err(ModelError::Unavailable { reason: error.to_string() })),
                event = events.next() => event,
            };
            match event {
                Some(Ok(event @ ModelEvent::Done { .. })) => {
                    yield ModelMessage::Event(event);
                    break;
                }
                Some(Ok(event)) => {
                    if let Some(progress) = deltas.as_mut().and_then(|deltas| deltas.of(event)) {
                        app.live.progress(lease, progress);
                    }
                }
                Some(Err(error)) => {
                    yield ModelMessage::Error(error);
                    break;
                }
                None => break,
            }
        }
    }
}
