//! Tells a tenant's subscribers what changed, on whichever replica. What no message told of (Redis is away, or a replica
//! could not reach it) is found by polling the database.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use dashmap::DashMap;
use entity::quota_counters::Scope;
use entity::runs::Status;
use entity::{TenantOwned, cluster_tenants, quota_counters, runs};
use sea_orm::{ColumnTrait, Condition, FromQueryResult, QueryFilter, QueryOrder, QuerySelect};
use tokio::sync::broadcast;
use uuid::Uuid;

use crate::app::App;
use crate::bus::{Bus, State, Topic, What};
use crate::clock::month_of;
use crate::error::Error;

/// Changes a subscriber may lag behind before it misses some.
const BUFFER: usize = 256;

/// How often the database is polled while Redis is away; and every how many times while it is there.
const POLL: Duration = Duration::from_secs(1);
const SELDOM: u32 = 10;

/// Runs of a tenant that are looked at in a poll, the newest first.
const MAX_RUNS: u64 = 10_000;

/// How far back a poll looks for ends of runs that committed late.
const MARGIN: TimeDelta = TimeDelta::seconds(5);

/// What changed.
#[derive(Clone, Debug)]
pub enum Change {
    /// A run's state; the run as it was then. Without its `spec` if another replica moved it.
    Run(Arc<runs::Model>),
    /// The month's usage.
    Usage,
    /// How far its cluster has come with it.
    Provisioning,
}

/// A channel for each tenant that somebody here listens to.
pub struct Changes {
    bus: Bus,
    tenants: DashMap<Uuid, Arc<Channel>>,
}

struct Channel {
    changes: broadcast::Sender<Change>,
    told: Mutex<Told>,
    /// To be polled at the next opportunity: changes may have been missed.
    due: AtomicBool,
}

/// What subscribers know.
struct Told {
    /// Of runs that have not ended, or did a moment ago: how far they had come, and when they ended.
    runs: HashMap<Uuid, (Progress, Option<DateTime<Utc>>)>,
    /// Tokens used this month, when they were last looked at.
    used: Option<(String, i64)>,
    /// When what its clusters say of it had last changed, when that was last looked at.
    provisioned: Option<Option<DateTime<Utc>>>,
    /// Changes before this were told, or came before anybody listened.
    until: DateTime<Utc>,
    /// How many runs may gather before those that have ended are forgotten.
    most: usize,
}

/// Rises with each change of a run's state: its fence with each claim, the sequence of its next item with the others.
type Progress = (i64, i64);

impl Told {
    /// Runs that are remembered at least.
    const LEAST: usize = 1_024;

    fn since(now: DateTime<Utc>) -> Self {
        Self { runs: HashMap::new(), used: None, provisioned: None, until: now, most: Self::LEAST }
    }

    /// Whether a run's state is news; if so it counts as told.
    fn take(&mut self, run: &runs::Model) -> bool {
        let progress = (run.fence, run.next_sequence);
        if self.runs.get(&run.id).is_some_and(|(told, _)| *told >= progress) {
            return false;
        }
        self.runs.insert(run.id, (progress, run.finished_at));
        if let Some(now) = run.finished_at
            && self.runs.len() > self.most
        {
            self.forget_ended(now);
        }
        true
    }

    /// Forgets runs that ended so long ago that nobody tells of them any more.
    fn forget_ended(&mut self, now: DateTime<Utc>) {
        self.runs.retain(|_, (_, finished_at)| finished_at.is_none_or(|at| at >= now - MARGIN));
        self.most = Ord::max(self.runs.len() * 2, Self::LEAST);
    }
}

impl Changes {
    /// Changes here and on the replicas that the bus reaches.
    pub fn new(bus: Bus) -> Self {
        Self { bus, tenants: DashMap::new() }
    }

    /// Listens to a tenant's changes from `now` on. What other replicas tell is heard once this returns.
    pub async fn subscribe(&self, tenant_id: Uuid, now: DateTime<Utc>) -> broadcast::Receiver<Change> {
        let changes = self.subscribe_here(tenant_id, now);
        self.bus.settle().await;
        changes
    }

    fn subscribe_here(&self, tenant_id: Uuid, now: DateTime<Utc>) -> broadcast::Receiver<Change> {
        let channel = self.tenants.entry(tenant_id).or_insert_with(|| {
            self.bus.listen(Topic::Tenant(tenant_id));
            let told = Mutex::new(Told::since(now));
            Arc::new(Channel { changes: broadcast::Sender::new(BUFFER), told, due: true.into() })
        });
        channel.changes.subscribe()
    }

    /// Tells whoever listens, on every replica. A run that is no longer a worker's is dropped by it, wherever it is.
    pub fn publish(&self, tenant_id: Uuid, change: Change) {
        match &change {
            Change::Run(run) => {
                if run.status != Status::Running && run.fence > 0 {
                    self.bus.tell(Topic::Everyone, What::Abandon { run_id: run.id, fence: run.fence });
                }
                self.bus.tell(Topic::Tenant(tenant_id), What::Run(run.clone()));
            }
            Change::Usage => self.bus.tell(Topic::Tenant(tenant_id), What::Usage),
            Change::Provisioning => self.bus.tell(Topic::Tenant(tenant_id), What::Provisioning),
        }
        self.hear(tenant_id, change);
    }

    /// Tells whoever listens here. A channel that nobody listens to any more goes away.
    pub fn hear(&self, tenant_id: Uuid, change: Change) {
        let Some(channel) = self.tenants.get(&tenant_id).map(|channel| channel.clone()) else { return };
        if !channel.tell(change) {
            self.close_unheard(tenant_id);
        }
    }

    /// Has all tenants polled soon: Redis was away.
    pub fn look_again(&self) {
        self.tenants.iter().for_each(|channel| channel.due.store(true, Ordering::Relaxed));
    }

    /// Has a tenant polled soon: its changes are heard only from now on.
    pub fn look_again_at(&self, tenant_id: Uuid) {
        if let Some(channel) = self.tenants.get(&tenant_id) {
            channel.due.store(true, Ordering::Relaxed);
        }
    }

    fn close_unheard(&self, tenant_id: Uuid) {
        // Under the entry's lock: whoever leaves last and whoever comes first must not cross.
        self.tenants.remove_if(&tenant_id, |_, channel| {
            let unheard = channel.changes.receiver_count() == 0;
            if unheard {
                self.bus.leave(Topic::Tenant(tenant_id));
            }
            unheard
        });
    }
}

impl Channel {
    /// Tells of a change, unless it is no news. False if nobody listens.
    fn tell(&self, change: Change) -> bool {
        let mut told = self.told();
        match &change {
            // Told late, after what followed it.
            Change::Run(run) if !told.take(run) => true,
            // Under the lock, so that changes of a run are told in their order.
            _ => self.changes.send(change).is_ok(),
        }
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Polls the database for changes that no message told of, for as long as the process lives.
pub async fn poll(app: App) {
    let mut ticks = tokio::time::interval(POLL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut count = 0_u32;
    let mut failing = false;
    loop {
        ticks.tick().await;
        count = count.wrapping_add(1);
        let all = app.bus.state() != State::Up || count.is_multiple_of(SELDOM);
        let tenants: Vec<(Uuid, Arc<Channel>)> =
            app.changes.tenants.iter().map(|entry| (*entry.key(), entry.value().clone())).collect();
        for (tenant_id, channel) in tenants {
            if channel.changes.receiver_count() == 0 {
                app.changes.close_unheard(tenant_id);
            } else if channel.due.swap(false, Ordering::Relaxed) || all {
                let looked = look(&app, tenant_id, &channel).await;
                if let Err(error) = &looked {
                    channel.due.store(true, Ordering::Relaxed);
                    if !failing {
                        tracing::warn!(inside = ?error, "changes of tenants can't be polled; trying again");
                    }
                }
                failing = looked.is_err();
            }
        }
    }
}

/// Where a run stands, without what makes it large.
#[derive(FromQueryResult)]
struct Standing {
    id: Uuid,
    fence: i64,
    next_sequence: i64,
    created_at: DateTime<Utc>,
    claimed_at: Option<DateTime<Utc>>,
    finished_at: Option<DateTime<Utc>>,
}

impl Standing {
    /// Whether subscribers don't know of it. Of a run never told of they know if it last moved before they listened.
    fn is_news(&self, told: &Told) -> bool {
        match told.runs.get(&self.id) {
            Some((progress, _)) => (self.fence, self.next_sequence) > *progress,
            None => {
                [Some(self.created_at), self.claimed_at, self.finished_at].into_iter().flatten().max()
                    >= Some(told.until)
            }
        }
    }
}

async fn look(app: &App, tenant_id: Uuid, channel: &Channel) -> Result<(), Error> {
    let now = app.clock.now();
    let since = channel.told().until - MARGIN;
    let standings: Vec<Standing> = runs::Entity::in_tenant(tenant_id)
        .filter(
            Condition::any()
                .add(runs::Column::Status.is_in(Status::UNFINISHED))
                .add(runs::Column::FinishedAt.gte(since)),
        )
        .select_only()
        .columns([runs::Column::Id, runs::Column::Fence, runs::Column::NextSequence])
        .columns([runs::Column::CreatedAt, runs::Column::ClaimedAt, runs::Column::FinishedAt])
        .order_by_desc(runs::Column::Id)
        .limit(MAX_RUNS)
        .into_model()
        .all(app.db.read())
        .await?;
    let news: Vec<Uuid> = {
        let mut told = channel.told();
        let (news, known): (Vec<&Standing>, Vec<&Standing>) = standings.iter().partition(|run| run.is_news(&told));
        for run in known {
            told.runs.entry(run.id).or_insert(((run.fence, run.next_sequence), run.finished_at));
        }
        news.into_iter().map(|run| run.id).collect()
    };
    for ids in news.chunks(500) {
        let runs = runs::without_spec()
            .filter(runs::Column::TenantId.eq(tenant_id))
            .filter(runs::Column::Id.is_in(ids.iter().copied()));
        for run in runs.order_by_asc(runs::Column::Id).all(app.db.read()).await? {
            channel.tell(Change::Run(Arc::new(run)));
        }
    }
    let month = month_of(now);
    let used: Option<i64> = quota_counters::Entity::in_tenant(tenant_id)
        .filter(quota_counters::Column::Scope.eq(Scope::Tenant))
        .filter(quota_counters::Column::Period.eq(&month))
        .select_only()
        .column(quota_counters::Column::Used)
        .into_tuple()
        .one(app.db.read())
        .await?;
    let used = (month, used.unwrap_or(0));
    let provisioned: Option<Option<DateTime<Utc>>> = cluster_tenants::Entity::in_tenant(tenant_id)
        .select_only()
        .column_as(cluster_tenants::Column::ChangedAt.max(), "changed_at")
        .into_tuple()
        .one(app.db.read())
        .await?;
    let (has_used, has_progressed) = {
        let mut told = channel.told();
        // What ended before that is never looked at again.
        let before = std::mem::replace(&mut told.until, now);
        told.forget_ended(before);
        let provisioned = provisioned.flatten();
        (told.used.replace(used.clone()) != Some(used), told.provisioned.replace(provisioned) != Some(provisioned))
    };
    if has_used {
        channel.tell(Change::Usage);
    }
    if has_progressed {
        channel.tell(Change::Provisioning);
    }
    Ok(())
}
