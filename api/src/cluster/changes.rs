//! Tells operators which tenants' states have changed: a board a cluster, looked at while somebody asks.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crds::protocol::{Changed, Changes, MAX_WAIT_MS, State};
use dashmap::DashMap;
use entity::{TenantOwned, cluster_tenants};
use sea_orm::{ColumnTrait, QueryFilter};
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep_until};
use uuid::Uuid;

use super::places::check_uid;
use super::refused::Refused;
use super::state;
use crate::app::App;
use crate::error::Error;

/// How often the database is looked at, at most.
const LOOK: Duration = Duration::from_secs(1);

/// What another replica has told up to a moment may lack what was committed this many microseconds before.
const MARGIN: i64 = 2_000_000;

/// The boards of this process.
pub struct Boards {
    instance: String,
    clusters: DashMap<String, Arc<Mutex<Board>>>,
}

impl Default for Boards {
    fn default() -> Self {
        Self { instance: Uuid::new_v4().simple().to_string(), clusters: DashMap::new() }
    }
}

/// The states of a cluster's tenants, and when they were found to have changed.
#[derive(Default)]
struct Board {
    looked: Option<Instant>,
    /// Counts the looks.
    number: i64,
    /// The database's time, in microseconds: before the first look, and before the last one.
    first: i64,
    last: i64,
    states: BTreeMap<String, Entry>,
}

struct Entry {
    state: State,
    /// The look that found it, and the time after that.
    number: i64,
    found: i64,
}

/// Up to where an operator was told: by which process, at which of its looks, and when that was.
struct Cursor {
    instance: String,
    number: i64,
    time: i64,
}

impl Cursor {
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(':');
        let (instance, number, time) = (parts.next()?, parts.next()?, parts.next()?);
        Some(Self { instance: instance.to_owned(), number: number.parse().ok()?, time: time.parse().ok()? })
    }
}

impl std::fmt::Display for Cursor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}:{}", self.instance, self.number, self.time)
    }
}

impl Board {
    async fn look(&mut self, app: &App, cluster: &str) -> Result<(), Error> {
        let before = app.clock.now().timestamp_micros();
        let rows = cluster_tenants::Entity::across_tenants()
            .filter(cluster_tenants::Column::Cluster.eq(cluster))
            .filter(cluster_tenants::Column::ReleasedAt.is_null())
            .all(app.db.read())
            .await?;
        let states = state::of_all(app, rows).await?;
        let found = app.clock.now().timestamp_micros();
        if self.looked.is_none() {
            self.first = before;
        }
        (self.looked, self.last, self.number) = (Some(Instant::now()), before, self.number + 1);
        let mut known = std::mem::take(&mut self.states);
        for (name, state) in states {
            let entry = match known.remove(&name) {
                Some(entry) if entry.state == state => entry,
                _ => Entry { state, number: self.number, found },
            };
            self.states.insert(name, entry);
        }
        Ok(())
    }

    /// What is not told yet; none: nothing is known of what was told, so all is.
    fn since(&self, instance: &str, cursor: Option<&Cursor>) -> Option<Vec<Changed>> {
        let cursor = cursor?;
        let is_own = cursor.instance == instance;
        if !is_own && cursor.time < self.first {
            return None;
        }
        Some(self.changed(|entry| match is_own {
            true => entry.number > cursor.number,
            false => entry.found > cursor.time - MARGIN,
        }))
    }

    fn changed(&self, is_news: impl Fn(&Entry) -> bool) -> Vec<Changed> {
        let news = self.states.iter().filter(|(_, entry)| is_news(entry));
        news.map(|(name, entry)| Changed { name: name.clone(), state: entry.state.clone() }).collect()
    }
}

/// Waits until the state of a tenant of the cluster has changed since `after`, and a while at most. Any replica may be
/// asked next: it tells what the one before has not, and maybe a little again.
pub async fn changes(app: &App, cluster: &str, after: Option<&str>) -> Result<Changes, Refused> {
    check_uid("The cluster", cluster)?;
    let boards = &app.cluster.boards;
    let board = boards.clusters.entry(cluster.to_owned()).or_default().clone();
    let cursor = after.and_then(Cursor::parse);
    let is_strange = cursor.as_ref().is_some_and(|cursor| cursor.instance != boards.instance);
    let begun = Instant::now();
    let deadline = begun + Duration::from_millis(MAX_WAIT_MS);
    loop {
        let next = {
            let mut board = board.lock().await;
            if board.looked.is_none_or(|looked| looked.elapsed() >= LOOK) {
                board.look(app, cluster).await?;
            }
            let news = board.since(&boards.instance, cursor.as_ref());
            let is_over = Instant::now() >= deadline || app.stopping.is_cancelled();
            // Whoever comes from another replica may be told the same again, so at most once a look.
            let is_early = is_strange && board.looked.is_none_or(|looked| looked < begun);
            let has_news = news.as_ref().is_none_or(|news| !news.is_empty());
            if is_over || (has_news && !is_early) {
                let told = Cursor { instance: boards.instance.clone(), number: board.number, time: board.last };
                let is_all = news.is_none();
                let tenants = news.unwrap_or_else(|| board.changed(|_| true));
                return Ok(Changes { cursor: told.to_string(), is_all, tenants });
            }
            board.looked.map_or(deadline, |looked| looked + LOOK)
        };
        tokio::select! {
            () = sleep_until(Ord::min(next, deadline)) => {}
            () = app.stopping.cancelled() => {}
        }
    }
}
