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
use cloister_runtime::spec::{AgentSpec, Lease, RunSpec};
use entity::runs::Status;
use entity::{TenantOwned, run_items, runs};
use futures_util::stream::BoxStream;
use futures_util::{Stream, StreamExt};
use sea_orm::{ColumnTrait, QueryFilter};

use super::refused::Refused;
use super::tokens::{self, Caller};
use super::{leased, next_turn, wrong_sequence};
use crate::app::App;
use crate::runs::claimed::GatewayModel;
use crate::runs::journal::from_row;
use crate::runs::pool::{Answering, Pool};

/// Calls the model for a run's next turn. The request must be within what the run's agent allows; whom it is charged
/// to, and with which limits, comes from the database.
pub async fn model(
    app: &App,
    caller: &Caller,
    turn: ModelTurn,
) -> Result<impl Stream<Item = ModelMessage> + Send + use<>, Refused> {
    let ModelTurn { lease, turn, from_seq, request } = turn;
    let run = ready(app, caller, lease).await?;
    let busy = || Refused::new(RefusalCode::Busy, "The model is being called for this run already.");
    let answering = Pool::answer(app, lease).ok_or_else(busy)?;
    // Again: who took the run away before the line above told nobody.
    let run = runs::Model { spec: run.spec, ..ready(app, caller, lease).await? };
    if from_seq != run.next_sequence {
        return Err(wrong_sequence(&run));
    }
    let spec: RunSpec = serde_json::from_value(run.spec.clone())?;
    let agent = spec.agents.get(&run.current_agent_id);
    let agent = agent.ok_or_else(|| Refused::invalid("The run's agent is not part of it."))?;
    let most = spec.agents.get(&spec.root).map_or(0, |root| root.max_turns);
    if turn != next_turn(&run) || turn > most {
        return Err(Refused::invalid(format!("The run's next turn is {}, of {most}.", next_turn(&run))));
    }
    if request.model != agent.model || request.max_output_tokens != agent.settings.max_output_tokens {
        return Err(Refused::invalid("The run's agent has another model, or another maximum of output tokens."));
    }
    let recorder = recorder(app, &run, agent, turn).await?;
    let deltas = Deltas::new(&recorder);
    let call = ModelCall {
        lease,
        turn,
        agent_id: agent.id,
        agent_version: agent.version,
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

/// What is known of the turn before its response arrives, from the journal.
async fn recorder(app: &App, run: &runs::Model, agent: &AgentSpec, turn: u32) -> Result<TurnRecorder, Refused> {
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
    Ok(TurnRecorder { turn, agent_name: agent.name.clone(), from_sequence: run.next_sequence, used_call_ids })
}

fn messages(
    app: App,
    caller: Caller,
    lease: Lease,
    answering: Answering,
    mut deltas: Deltas,
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
                    if let Some(progress) = deltas.of(event) {
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
