//! The door for workers apart: `/runtime/v1`, on a port of its own. What they may do here is what the shared pool does in
//! process, through the same operations; nothing that they say is taken on trust.

mod checks;
pub mod graphql;
pub mod http;
mod model;
mod refused;
pub mod tokens;

use std::collections::BTreeMap;
use std::time::Duration;

use cloister_runtime::item::Step;
use cloister_runtime::journal::{Journal, JournalError, Progress};
use cloister_runtime::protocol::{
    AppendRequest, ClaimRequest, Claims, DeltasRequest, HeartbeatRequest, Heartbeats, MAX_CLAIMS, MAX_LEASES,
    MAX_WAIT_MS, RefusalCode, Standing,
};
use cloister_runtime::spec::{Claim, Lease, RunSpec};
use entity::runs::Status;
use entity::{TenantOwned, runs};
use sea_orm::{ColumnTrait, QueryFilter, QuerySelect};
use serde::Deserialize;
use tokio::sync::oneshot;
use tokio::time::Instant;
use uuid::Uuid;

pub use self::model::model;
use self::refused::Refused;
use self::tokens::Caller;
use crate::app::App;
use crate::runs::journal::{DatabaseJournal, items_after};
use crate::runs::queue::Claimed;
use crate::runs::{claimed, queue};

/// How often a long poll looks without being told of a change; also how long a token that was revoked may wait on.
const LOOK: Duration = Duration::from_millis(500);

/// Claims runs of the caller's pool, and waits a while if there are none. A caller that is gone by then has not claimed
/// anything.
pub async fn claim(app: &App, caller: Caller, request: ClaimRequest) -> Result<Claims, Refused> {
    checks::worker(request.worker.as_deref())?;
    let (answer, claims) = oneshot::channel();
    // In a task of its own: a claim that is dropped half way would be nobody's until its lease lapses.
    app.tasks.spawn(wait_and_claim(app.clone(), caller, request, answer));
    let claims =
        claims.await.map_err(|_| Refused::new(RefusalCode::Unavailable, "The claim broke off. Try again."))??;
    Ok(Claims { claims, lease_ms: app.config.runs.lease_seconds.saturating_mul(1_000) })
}

type Answer = oneshot::Sender<Result<Vec<Claim>, Refused>>;

async fn wait_and_claim(app: App, caller: Caller, request: ClaimRequest, mut answer: Answer) {
    let pool = queue::own_pool(caller.tenant.id);
    let max = request.max.clamp(1, MAX_CLAIMS) as usize;
    let worker = request.worker.as_deref();
    let deadline = Instant::now() + Duration::from_millis(request.wait_ms.min(MAX_WAIT_MS));
    let bell = app.wakes.bell(&pool);
    let claimed = loop {
        match try_claim(&app, &caller, &pool, max, worker).await {
            Ok(claims) if claims.is_empty() && Instant::now() < deadline && !app.stopping.is_cancelled() => {}
            settled => break settled,
        }
        tokio::select! {
            () = bell.rung() => {}
            () = tokio::time::sleep_until(deadline.min(Instant::now() + LOOK)) => {}
            () = app.stopping.cancelled() => {}
            // The next who waits is woken in its place.
            () = answer.closed() => return,
        }
    };
    if let Err(Ok(unheard)) = answer.send(claimed) {
        for claim in unheard {
            claimed::try_hand_back(&app, claim.lease).await;
        }
    }
}

async fn try_claim(
    app: &App,
    caller: &Caller,
    pool: &str,
    max: usize,
    worker: Option<&str>,
) -> Result<Vec<Claim>, Refused> {
    tokens::confirm(app, caller).await?;
    let runs = match queue::claim(app, pool, max, worker).await? {
        Claimed::Runs(runs) => runs,
        Claimed::NothingWaits => Vec::new(),
    };
    if runs.len() == max {
        // There may be more, for whoever else waits here.
        app.wakes.ring(pool);
    }
    let mut claims = Vec::with_capacity(runs.len());
    for run in runs {
        app.pool.tell_claimed(app, &run);
        match claimed::prepare(app, &run).await {
            Ok(claim) => claims.push(claim),
            Err(error) => claimed::retry_or_fail(app, &run, &error).await,
        }
    }
    Ok(claims)
}

/// Stores what a worker did. The same append again is answered as it was the first time; other items in the same place
/// are refused.
pub async fn append(app: &App, caller: &Caller, request: AppendRequest) -> Result<Standing, Refused> {
    let AppendRequest { lease, from_seq, items: steps } = request;
    let run = leased(app, caller, lease).await?;
    checks::size(&steps)?;
    if from_seq > run.next_sequence || from_seq < 1 {
        return Err(wrong_sequence(&run));
    }
    let spec = RunSpec::deserialize(&run.spec)?;
    if from_seq < run.next_sequence {
        let others = spec.has_other_authors();
        let count = if others { u64::MAX / 2 } else { steps.len() as u64 };
        let stored = items_after(app, &run, from_seq - 1, count).await?;
        let stored: Vec<&Step> = stored.iter().map(|item| &item.step).collect();
        if stored.windows(steps.len()).any(|window| window.iter().copied().eq(&steps)) {
            let lease_until = run.lease_until.unwrap_or_else(|| app.clock.now());
            return Ok(Standing { lease_until, ..standing(app, caller, &run.pool) });
        }
        if !others {
            return Err(wrong_sequence(&run));
        }
    }
    if run.status != Status::Running {
        return Err(Refused::lease_lost());
    }
    checks::steps(app, &run, &spec, &steps).await?;
    match DatabaseJournal::new(app, &run).append(lease, from_seq, steps).await {
        Ok(()) => {
            // An append leaves a lease as it is while most of it is left.
            let least = queue::least_lease_from(app, app.clock.now());
            let lease_until = run.lease_until.map_or(least, |held| Ord::max(held, least));
            Ok(Standing { lease_until, ..standing(app, caller, &run.pool) })
        }
        Err(JournalError::LeaseLost) => Err(Refused::lease_lost()),
        Err(JournalError::Unavailable(_)) => {
            Err(Refused::new(RefusalCode::Unavailable, "The journal can't be written now. Try again."))
        }
    }
}

/// Tells a run's subscribers that its turn begins anew.
pub async fn deltas(app: &App, caller: &Caller, request: DeltasRequest) -> Result<(), Refused> {
    let run = leased(app, caller, request.lease).await?;
    if run.status != Status::Running {
        return Err(Refused::lease_lost());
    }
    let next = next_turn(&run);
    for delta in request.deltas {
        match delta {
            Progress::Restarted { turn } if turn == next => app.live.progress(request.lease, delta),
            Progress::Restarted { .. } => return Err(Refused::invalid(format!("The run is at turn {next}."))),
            Progress::Text { .. } | Progress::Arguments { .. } => {
                return Err(Refused::invalid("What a model says is told as it comes, and not by workers."));
            }
        }
    }
    // The call that follows may come to another replica; whoever listens here has been told.
    if !app.pool.answers(request.lease) {
        app.live.forget(request.lease.run_id);
    }
    Ok(())
}

/// Renews leases, and tells of those that are lost. Leases of runs that aren't the tenant's count as lost.
pub async fn heartbeat(app: &App, caller: &Caller, request: HeartbeatRequest) -> Result<Heartbeats, Refused> {
    if request.leases.len() > MAX_LEASES {
        return Err(Refused::new(RefusalCode::TooLarge, format!("A heartbeat may have {MAX_LEASES} leases.")));
    }
    let own = queue::own_pool(caller.tenant.id);
    let found: Vec<(Uuid, i64)> = runs::Entity::in_tenant(caller.tenant.id)
        .filter(runs::Column::Id.is_in(request.leases.iter().map(|lease| lease.run_id)))
        .filter(runs::Column::Pool.eq(&own))
        .filter(runs::Column::Status.eq(Status::Running))
        .select_only()
        .columns([runs::Column::Id, runs::Column::Fence])
        .into_tuple()
        .all(app.db.read())
        .await?;
    let mut held: Vec<(Uuid, i64)> = request.leases.iter().map(|lease| (lease.run_id, lease.fence)).collect();
    held.retain(|lease| found.contains(lease));
    let lost = queue::renew(app, held.clone()).await?;
    let standings = request.leases.iter().map(|Lease { run_id, fence }| {
        let holds = |lease: &(Uuid, i64)| *lease == (*run_id, *fence);
        let cancel = !held.iter().any(holds) || lost.iter().any(holds);
        (*run_id, Standing { cancel, ..standing(app, caller, &own) })
    });
    Ok(Heartbeats { runs: standings.collect::<BTreeMap<_, _>>() })
}

/// Lets the next worker have a run at once.
pub async fn release(app: &App, caller: &Caller, lease: Lease) -> Result<(), Refused> {
    let run = leased(app, caller, lease).await?;
    if run.status != Status::Running {
        return Err(Refused::lease_lost());
    }
    claimed::hand_back(app, lease).await?;
    app.live.forget(lease.run_id);
    if queue::pool_of(&caller.tenant) != run.pool {
        queue::gather(app).await?;
    }
    Ok(())
}

/// The run that a lease is for, if it is the newest one. Another tenant's run, and one of another pool, is answered as
/// one that does not exist.
async fn leased(app: &App, caller: &Caller, lease: Lease) -> Result<runs::Model, Refused> {
    let run = runs::Entity::in_tenant(caller.tenant.id)
        .filter(runs::Column::Id.eq(lease.run_id))
        .filter(runs::Column::Pool.eq(queue::own_pool(caller.tenant.id)))
        .one(app.db.read())
        .await?;
    let run = run.ok_or_else(|| Refused::new(RefusalCode::NotFound, "There is no such run in this pool."))?;
    if run.fence == lease.fence { Ok(run) } else { Err(Refused::lease_lost()) }
}

/// Where a worker stands with a run that it holds.
fn standing(app: &App, caller: &Caller, pool: &str) -> Standing {
    Standing {
        lease_until: queue::lease_from(app, app.clock.now()),
        cancel: false,
        pause: queue::pool_of(&caller.tenant) != pool,
    }
}

/// The turn whose response is not stored yet.
fn next_turn(run: &runs::Model) -> u32 {
    u32::try_from(run.turns).unwrap_or(0) + 1
}

fn wrong_sequence(run: &runs::Model) -> Refused {
    let message = format!("The next item's sequence is {}.", run.next_sequence);
    Refused::new(RefusalCode::WrongSequence, message)
}
