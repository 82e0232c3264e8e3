//! Sends what was told: one task, which takes all that has gathered while the last was on its way.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use redis::{Pipeline, Script};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use uuid::Uuid;

use super::message::Told;
use super::{Outgoing, Shared, Topic, What};
use crate::runs::turn::Attempt;

/// Messages that go at once.
const BATCH: usize = 512;

/// How long Redis may take for a batch before the connection counts as broken.
const ANSWER: Duration = Duration::from_secs(1);

/// Bytes of items that are told rather than looked up.
const MAX_ITEMS: usize = 64 * 1_024;

/// Entries of a turn's stream; of a longer turn only the end is left, which is of no use to who joins then.
const MAX_ENTRIES: usize = 20_000;

/// How long a run's stream outlives what was last told, and what ended the run.
const LIFETIME: Duration = Duration::from_secs(600);
const LIFETIME_ENDED: Duration = Duration::from_secs(10);

/// Adds what is told of a run to its stream, and publishes it. Stored items begin the stream anew, and so does a new
/// attempt at a turn; an attempt that was overtaken is not told. So whoever joins reads the newest items and all that was
/// streamed since. Attempts are written so that their order is that of strings.
///
/// KEYS: the stream. ARGV: the delta's attempt, or nothing for items; the message; the most entries; milliseconds to
/// live; the channel.
pub static TELL: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        "local attempt, is_items = ARGV[1], ARGV[1] == ''
         local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
         if last then
           local before, after_items = last[2][2], last[2][6] == 'items'
           if is_items then
             attempt = before
           elseif attempt < before then
             return 0
           end
           if is_items or (attempt > before and not after_items) then redis.call('DEL', KEYS[1]) end
         end
         redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[3], '*',
           'attempt', attempt, 'told', ARGV[2], 'kind', is_items and 'items' or 'delta')
         redis.call('PEXPIRE', KEYS[1], ARGV[4])
         redis.call('PUBLISH', ARGV[5], ARGV[2])
         return 1",
    )
});

/// Sends for as long as the process lives.
pub async fn send(shared: &Shared, mut outgoing: mpsc::Receiver<Outgoing>) {
    let mut gathered = Vec::with_capacity(BATCH);
    while outgoing.recv_many(&mut gathered, BATCH).await > 0 {
        let mut batch = Batch::default();
        let mut flushed: Vec<oneshot::Sender<()>> = Vec::new();
        for message in gathered.drain(..) {
            match message {
                Outgoing::Tell(topic, what) => batch.add(topic, what),
                Outgoing::Flush(sent) => flushed.push(sent),
            }
        }
        // What can't be sent now is not kept: polling finds it sooner.
        if let Some(mut connection) = shared.sending() {
            let pipeline = batch.pipeline(shared);
            match timeout(ANSWER, pipeline.exec_async(&mut connection)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    tracing::debug!(%error, "messages to other replicas were not sent");
                    shared.broken.notify_one();
                }
                Err(_) => shared.broken.notify_one(),
            }
        }
        for sent in flushed {
            // Who waited may have given up.
            let _ = sent.send(());
        }
    }
}

/// Messages in their order, with what says the same told once.
#[derive(Default)]
struct Batch {
    messages: Vec<(Topic, What)>,
    /// Pools that are woken, tenants whose usage changed.
    woken: HashSet<String>,
    used: HashSet<Uuid>,
    /// Where a run's newest delta stands, if nothing else of the run came after it.
    deltas: HashMap<Uuid, usize>,
}

impl Batch {
    fn add(&mut self, topic: Topic, what: What) {
        match (topic, &what) {
            (_, What::Wake(pool)) if !self.woken.insert(pool.clone()) => return,
            (Topic::Tenant(id), What::Usage) if !self.used.insert(id) => return,
            (Topic::Run(id), What::Delta(delta)) => {
                if let Some(at) = self.deltas.get(&id)
                    && let Some((_, What::Delta(last))) = self.messages.get_mut(*at)
                    && Arc::make_mut(last).append(delta)
                {
                    return;
                }
                self.deltas.insert(id, self.messages.len());
            }
            (Topic::Run(id), _) => drop(self.deltas.remove(&id)),
            _ => {}
        }
        self.messages.push((topic, what));
    }

    fn pipeline(self, shared: &Shared) -> Pipeline {
        let mut pipeline = redis::pipe();
        for (topic, what) in self.messages {
            let attempt = match &what {
                What::Delta(delta) => order(delta.attempt),
                _ => String::new(),
            };
            let lifetime = match &what {
                What::Items { ended: true, .. } => LIFETIME_ENDED,
                _ => LIFETIME,
            };
            let Some(told) = encode(shared, what) else { continue };
            let channel = shared.channel(topic);
            match topic {
                Topic::Run(id) => {
                    let tell = pipeline.cmd("EVALSHA").arg(TELL.get_hash()).arg(1).arg(shared.stream(id));
                    tell.arg(attempt).arg(told).arg(MAX_ENTRIES).arg(lifetime.as_secs() * 1_000).arg(channel).ignore();
                }
                Topic::Everyone | Topic::Tenant(_) => drop(pipeline.cmd("PUBLISH").arg(channel).arg(told).ignore()),
            }
        }
        pipeline
    }
}

/// An attempt as a string, whose order is that of attempts.
fn order(attempt: Attempt) -> String {
    format!("{:020}.{:010}.{:010}", attempt.fence, attempt.turn, attempt.restarts)
}

/// The message as it travels. Items that are too large are to be looked up.
fn encode(shared: &Shared, what: What) -> Option<Vec<u8>> {
    let look = match &what {
        What::Items { items, ended } => {
            items.last().map(|last| What::Look { next_sequence: last.sequence + 1, ended: *ended })
        }
        _ => None,
    };
    let json = |what| serde_json::to_vec(&Told { from: shared.origin, what });
    let encoded = json(what).and_then(|told| match look {
        Some(look) if told.len() > MAX_ITEMS => json(look),
        _ => Ok(told),
    });
    encoded.inspect_err(|error| tracing::error!(%error, "a message to other replicas can't be written")).ok()
}

#[cfg(test)]
mod tests {
    use cloister_runtime::journal::Progress;

    use super::*;
    use crate::runs::turn::Delta;

    fn text(turn: u32, offset: u32, text: &str) -> What {
        let attempt = Attempt { fence: 1, turn, restarts: 0 };
        let progress = Progress::Text { turn, index: 0, offset, text: text.to_owned() };
        What::Delta(Arc::new(Delta { attempt, progress }))
    }

    #[test]
    fn what_gathered_is_told_as_one_and_never_out_of_order() {
        let (a, b, tenant) = (Uuid::now_v7(), Uuid::now_v7(), Uuid::now_v7());
        let mut batch = Batch::default();
        batch.add(Topic::Everyone, What::Wake("shared".to_owned()));
        batch.add(Topic::Run(a), text(1, 0, "Hé"));
        batch.add(Topic::Run(b), text(1, 0, "other"));
        batch.add(Topic::Everyone, What::Wake("shared".to_owned()));
        batch.add(Topic::Run(a), text(1, 3, "llo"));
        batch.add(Topic::Run(a), text(1, 9, "a gap"));
        batch.add(Topic::Run(a), What::Look { next_sequence: 4, ended: false });
        batch.add(Topic::Run(a), text(2, 0, "next"));
        batch.add(Topic::Tenant(tenant), What::Usage);
        batch.add(Topic::Tenant(tenant), What::Usage);
        let told: Vec<String> = batch
            .messages
            .iter()
            .map(|(_, what)| match what {
                What::Delta(delta) => match &delta.progress {
                    Progress::Text { turn, offset, text, .. } => format!("{turn}@{offset} {text}"),
                    other => format!("{other:?}"),
                },
                other => format!("{other:?}"),
            })
            .collect();
        let expected = [
            "Wake(\"shared\")",
            "1@0 Héllo",
            "1@0 other",
            "1@9 a gap",
            "Look { next_sequence: 4, ended: false }",
            "2@0 next",
            "Usage",
        ];
        assert_eq!(told, expected);
    }
}
