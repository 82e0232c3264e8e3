//! Keeps the connection to Redis: connects, listens, finds out that it broke, and connects again.

use std::collections::{HashMap, HashSet};
use std::pin::pin;
use std::time::Duration;

use futures_util::{FutureExt, StreamExt};
use redis::aio::{MultiplexedConnection, PubSub, PubSubSink};
use redis::streams::StreamRangeReply;
use redis::{Msg, RedisError};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use super::message::Told;
use super::{CONNECT_TIMEOUT, Shared, State, Topic, outbox, receive};
use crate::app::App;

/// Pauses between attempts to connect.
const LEAST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// A connection that lasted this long was a good one: the next attempt comes at once again.
const LASTED: Duration = Duration::from_secs(5);

/// How often the connections are tried.
const BEAT: Duration = Duration::from_millis(500);

/// How long an answer may take before the connection counts as broken.
const ANSWER: Duration = Duration::from_secs(1);

/// Keeps the bus connected for as long as the process lives. With no Redis configured it does nothing.
pub async fn keep(app: App) {
    let Some(shared) = app.bus.0.clone() else { return };
    let outgoing = shared.outgoing.lock().ok().and_then(|mut outgoing| outgoing.take());
    let Some(outgoing) = outgoing else { return };
    tokio::join!(outbox::send(&shared, outgoing), stay_connected(&app, &shared));
}

async fn stay_connected(app: &App, shared: &Shared) {
    let mut pause = LEAST_PAUSE;
    loop {
        let reason = match timeout(2 * CONNECT_TIMEOUT, Link::connect(shared)).await {
            Ok(Ok(mut link)) => {
                let since = Instant::now();
                let reason = link.serve(app, shared).await;
                if since.elapsed() >= LASTED {
                    pause = LEAST_PAUSE;
                }
                reason
            }
            Ok(Err(error)) => reason(&error),
            Err(_) => "it did not answer in time".to_owned(),
        };
        shared.set_connection(None);
        if shared.state.send_replace(State::Away) != State::Away {
            tracing::warn!(
                reason,
                "Redis is away: replicas hear of each other by polling, and limit rates each by itself"
            );
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// An error without what it was about: the client's own words hold no key of ours, but the server's may.
fn reason(error: &RedisError) -> String {
    error.category().to_owned() + error.code().map(|code| format!(" ({code})")).as_deref().unwrap_or_default()
}

/// Two connections: one for commands, one that listens.
struct Link {
    commands: MultiplexedConnection,
    sink: PubSubSink,
    messages: redis::aio::PubSubStream,
    /// What is subscribed to, and the number of the topic when it was.
    subscribed: HashMap<Topic, u64>,
}

impl Link {
    /// Connects, and proves that Redis takes writes: one that is full, or a replica, is as good as away.
    async fn connect(shared: &Shared) -> Result<Self, RedisError> {
        let mut commands = shared.connect().await?;
        outbox::TELL.load_async(&mut commands).await?;
        let probe = format!("{}probe", shared.prefix);
        redis::cmd("SET").arg(probe).arg(1).arg("PX").arg(1_000).exec_async(&mut commands).await?;
        let listening: PubSub = shared.client.get_async_pubsub().await?;
        let (mut sink, messages) = listening.split();
        sink.subscribe(shared.channel(Topic::Everyone)).await?;
        Ok(Self { commands, sink, messages, subscribed: HashMap::new() })
    }

    /// Serves until the connection breaks; tells why it did.
    async fn serve(&mut self, app: &App, shared: &Shared) -> String {
        {
            let mut topics = shared.topics();
            topics.touched = topics.wanted.keys().copied().collect();
        }
        if let Err(reason) = self.follow_topics(app, shared).await {
            return reason;
        }
        shared.set_connection(Some(self.commands.clone()));
        shared.state.send_replace(State::Up);
        tracing::info!("Redis is connected: replicas hear of each other at once");
        // Told while nobody heard it.
        app.live.tell_again();
        app.changes.look_again();
        // What was said of the connection before this one.
        let _ = shared.broken.notified().now_or_never();
        let mut beats = interval(BEAT);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let step = tokio::select! {
                message = self.messages.next() => match message {
                    Some(message) => {
                        hear(app, shared, &message);
                        Ok(())
                    }
                    None => Err("the connection was closed".to_owned()),
                },
                () = shared.topics_changed.notified() => self.follow_topics(app, shared).await,
                () = shared.broken.notified() => Err("a command failed".to_owned()),
                _ = beats.tick() => self.beat(shared).await,
            };
            if let Err(reason) = step {
                return reason;
            }
        }
    }

    /// Whether both connections answer.
    async fn beat(&mut self, shared: &Shared) -> Result<(), String> {
        let mut commands = self.commands.clone();
        let ping = redis::cmd("PING");
        let asked = Instant::now();
        let both = pin!(async { tokio::try_join!(ping.exec_async(&mut commands), self.sink.ping::<redis::Value>()) });
        answered(both).await?;
        if asked.elapsed() < BEAT / 5 {
            shared.set_connection(Some(self.commands.clone()));
        }
        Ok(())
    }

    /// Subscribes to what is wanted and no more, and reads what the streams of runs hold that are new here. Messages
    /// that come meanwhile are heard after that.
    async fn follow_topics(&mut self, app: &App, shared: &Shared) -> Result<(), String> {
        let (newest, fresh, left) = self.changed_topics(shared);
        let channels = |topics: &[Topic]| topics.iter().map(|topic| shared.channel(*topic)).collect::<Vec<_>>();
        let left = channels(&left);
        if !left.is_empty() {
            answered(self.sink.unsubscribe(left)).await?;
        }
        if !fresh.is_empty() {
            answered(self.sink.subscribe(channels(&fresh))).await?;
        }
        shared.subscribed.send_replace(newest);
        let mut runs = Vec::new();
        let mut ranges = redis::pipe();
        for topic in fresh {
            match topic {
                Topic::Run(id) => {
                    runs.push(id);
                    ranges.cmd("XRANGE").arg(shared.stream(id)).arg("-").arg("+");
                }
                Topic::Tenant(id) => app.changes.look_again_at(id),
                Topic::Everyone => {}
            }
        }
        if runs.is_empty() {
            return Ok(());
        }
        let streams: Vec<StreamRangeReply> = answered(ranges.query_async(&mut self.commands)).await?;
        for (run_id, stream) in runs.into_iter().zip(streams) {
            let told = stream.ids.iter().filter_map(|entry| entry.get::<Vec<u8>>("told"));
            let told = told.filter_map(|told| serde_json::from_slice::<Told>(&told).ok());
            app.live.catch_up(run_id, told.map(|told| told.what));
        }
        Ok(())
    }

    /// The newest topic's number, the topics that are new, and those that nobody wants any more.
    fn changed_topics(&mut self, shared: &Shared) -> (u64, Vec<Topic>, Vec<Topic>) {
        let mut topics = shared.topics();
        let touched: HashSet<Topic> = std::mem::take(&mut topics.touched);
        let (mut fresh, mut left) = (Vec::new(), Vec::new());
        for topic in touched {
            match topics.wanted.get(&topic) {
                Some(number) if self.subscribed.insert(topic, *number) != Some(*number) => fresh.push(topic),
                Some(_) => {}
                None if self.subscribed.remove(&topic).is_some() => left.push(topic),
                None => {}
            }
        }
        (topics.last, fresh, left)
    }
}

/// Waits for an answer, but not for ever.
async fn answered<T>(asked: impl Future<Output = Result<T, RedisError>>) -> Result<T, String> {
    match timeout(ANSWER, asked).await {
        Ok(answer) => answer.map_err(|error| reason(&error)),
        Err(_) => Err("it did not answer in time".to_owned()),
    }
}

fn hear(app: &App, shared: &Shared, message: &Msg) {
    let Some(topic) = Topic::of_channel(&shared.prefix, message.get_channel_name()) else { return };
    match serde_json::from_slice::<Told>(message.get_payload_bytes()) {
        Ok(told) if told.from == shared.origin => {}
        Ok(told) => receive::receive(app, topic, told.what),
        // Of another version, perhaps: polling finds what it was about.
        Err(error) => tracing::debug!(%error, "a message of another replica was not understood"),
    }
}
