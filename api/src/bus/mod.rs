//! What replicas on one database tell each other, through Redis. Nothing here is durable, and nothing waits for it:
//! with Redis away whoever would have been told finds out by polling the database.
//!
//! * Pub/sub carries what is true now: a pool to be woken, a run to be dropped, a right that was lost, a run's new
//!   state. A replica subscribes to a tenant's or a run's channel only while somebody here listens.
//! * A stream a run keeps what has been streamed of the turn in progress, for whoever joins in the middle of it. It is
//!   begun anew with each turn, bounded, and expires.
//!
//! [`link`] keeps the connection, [`outbox`] sends, [`receive`] takes in.

pub mod link;
mod message;
mod outbox;
mod receive;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, RedisError};
use sea_orm::{ConnectionTrait, DbBackend, Statement};
use secrecy::ExposeSecret;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use uuid::Uuid;

pub use self::message::{Topic, What};
use crate::config::RedisConfig;
use crate::db::Db;
use crate::error::Error;

/// What may wait to be sent. Past it the newest is dropped: a run never waits for Redis.
const OUTBOX: usize = 8_192;

/// How long a connection attempt may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// Whether replicas hear of each other at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// No Redis is configured: this is the only replica, or it hears of others by polling.
    Off,
    /// The first connection is being made.
    Connecting,
    /// Connected.
    Up,
    /// Redis can't be reached; a new connection is tried again and again.
    Away,
}

impl State {
    /// What `/readyz` says of it.
    pub fn detail(self) -> &'static str {
        match self {
            State::Off => "off",
            State::Up => "ok",
            State::Connecting | State::Away => "away: wake-ups by polling",
        }
    }
}

/// The way to the other replicas. Cheap to clone.
#[derive(Clone)]
pub struct Bus(Option<Arc<Shared>>);

struct Shared {
    client: Client,
    prefix: String,
    /// Names this process.
    origin: Uuid,
    outbox: mpsc::Sender<Outgoing>,
    /// The other end of `outbox`, until somebody sends.
    outgoing: Mutex<Option<mpsc::Receiver<Outgoing>>>,
    state: watch::Sender<State>,
    connection: RwLock<Option<Connection>>,
    topics: Mutex<Topics>,
    topics_changed: Notify,
    /// The newest topic that is subscribed to.
    subscribed: watch::Sender<u64>,
    broken: Notify,
}

/// The connection for commands.
struct Connection {
    commands: MultiplexedConnection,
    /// It has answered a caller too late; nobody waits for it until it has answered in time again.
    slow: bool,
}

enum Outgoing {
    Tell(Topic, What),
    /// Answered once all before it is sent.
    Flush(oneshot::Sender<()>),
}

/// The channels that somebody here listens to. A topic that is wanted anew has a new number, so that what it holds is
/// read again even if it was never left.
#[derive(Default)]
struct Topics {
    wanted: HashMap<Topic, u64>,
    touched: HashSet<Topic>,
    last: u64,
}

impl Bus {
    /// A bus; off unless `redis.url` is set. Connects only when [`link::keep`] runs. Deployments that share a Redis
    /// are told apart by their databases' names.
    pub async fn new(config: &RedisConfig, db: &Db) -> Result<Self, Error> {
        let Some(url) = &config.url else { return Ok(Self(None)) };
        // Not shown: it may hold a password.
        let wrong = |_| Error::internal("redis.url can't be used: write redis://user:password@host:port");
        let client = Client::open(url.expose_secret()).map_err(wrong)?;
        let name = Statement::from_string(DbBackend::Postgres, "SELECT current_database()::text AS name");
        let row = db.read().query_one_raw(name).await?.ok_or_else(|| Error::internal("the database has no name"))?;
        let name: String = row.try_get("", "name")?;
        let (outbox, outgoing) = mpsc::channel(OUTBOX);
        Ok(Self(Some(Arc::new(Shared {
            client,
            prefix: format!("cloister:{name}:"),
            origin: Uuid::new_v4(),
            outbox,
            outgoing: Mutex::new(Some(outgoing)),
            state: watch::Sender::new(State::Connecting),
            connection: RwLock::default(),
            topics: Mutex::default(),
            topics_changed: Notify::new(),
            subscribed: watch::Sender::new(0),
            broken: Notify::new(),
        }))))
    }

    /// Whether replicas hear of each other at once.
    pub fn state(&self) -> State {
        self.0.as_ref().map_or(State::Off, |shared| *shared.state.borrow())
    }

    /// Tells other replicas, if Redis is there. Never waits.
    pub fn tell(&self, topic: Topic, what: What) {
        if let Some(shared) = &self.0
            && self.state() == State::Up
        {
            // A full outbox: polling makes up for it.
            let _ = shared.outbox.try_send(Outgoing::Tell(topic, what));
        }
    }

    /// Waits until what was told is sent; a moment at most.
    pub async fn flush(&self) {
        const PATIENCE: Duration = Duration::from_millis(500);
        let Some(shared) = self.0.as_ref().filter(|_| self.state() == State::Up) else { return };
        let (sent, all_sent) = oneshot::channel();
        if shared.outbox.try_send(Outgoing::Flush(sent)).is_ok() {
            let _ = tokio::time::timeout(PATIENCE, all_sent).await;
        }
    }

    /// Listens to a topic, until [`Bus::leave`].
    pub fn listen(&self, topic: Topic) {
        self.touch(|topics| {
            topics.last += 1;
            topics.wanted.insert(topic, topics.last);
            topics.touched.insert(topic);
        });
    }

    /// Listens to a topic no longer.
    pub fn leave(&self, topic: Topic) {
        self.touch(|topics| {
            topics.wanted.remove(&topic);
            topics.touched.insert(topic);
        });
    }

    /// Waits until all topics that are listened to are heard, so that what is told from now on is not missed; a moment at
    /// most.
    pub async fn settle(&self) {
        const PATIENCE: Duration = Duration::from_millis(250);
        let Some(shared) = self.0.as_ref().filter(|_| self.state() == State::Up) else { return };
        let last = shared.topics().last;
        let mut subscribed = shared.subscribed.subscribe();
        let _ = tokio::time::timeout(PATIENCE, subscribed.wait_for(|newest| *newest >= last)).await;
    }

    fn touch(&self, change: impl FnOnce(&mut Topics)) {
        if let Some(shared) = &self.0 {
            change(&mut shared.topics());
            shared.topics_changed.notify_one();
        }
    }

    /// A connection for a command that a caller waits for; none while Redis is away or slow. The key is `key` in this
    /// deployment's part of Redis.
    pub fn commands(&self, key: &str) -> Option<(MultiplexedConnection, String)> {
        let shared = self.0.as_ref()?;
        let commands = shared.commands()?;
        Some((commands, format!("{}{key}", shared.prefix)))
    }

    /// Says that a command of a caller failed: nobody waits for Redis until it has answered in time again.
    pub fn failed(&self, error: Option<&RedisError>) {
        let Some(shared) = &self.0 else { return };
        if let Some(connection) = shared.connection.write().unwrap_or_else(PoisonError::into_inner).as_mut() {
            connection.slow = true;
        }
        if error.is_some_and(RedisError::is_unrecoverable_error) {
            shared.broken.notify_one();
        }
    }
}

impl Shared {
    fn topics(&self) -> MutexGuard<'_, Topics> {
        self.topics.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn commands(&self) -> Option<MultiplexedConnection> {
        let connection = self.connection.read().unwrap_or_else(PoisonError::into_inner);
        connection.as_ref().filter(|connection| !connection.slow).map(|connection| connection.commands.clone())
    }

    /// For sending, which nobody waits for: slow or not.
    fn sending(&self) -> Option<MultiplexedConnection> {
        let connection = self.connection.read().unwrap_or_else(PoisonError::into_inner);
        connection.as_ref().map(|connection| connection.commands.clone())
    }

    fn set_connection(&self, commands: Option<MultiplexedConnection>) {
        let mut connection = self.connection.write().unwrap_or_else(PoisonError::into_inner);
        *connection = commands.map(|commands| Connection { commands, slow: false });
    }

    /// A new connection for commands.
    async fn connect(&self) -> Result<MultiplexedConnection, RedisError> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(CONNECT_TIMEOUT))
            // Each command has a timeout of its own.
            .set_response_timeout(None);
        self.client.get_multiplexed_async_connection_with_config(&config).await
    }

    fn channel(&self, topic: Topic) -> String {
        topic.channel(&self.prefix)
    }

    /// The stream of a run's turn in progress.
    fn stream(&self, run_id: Uuid) -> String {
        format!("{}turn:{run_id}", self.prefix)
    }
}
