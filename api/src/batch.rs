//! Writes that gather: what arrives while the last transaction is being committed goes into the next one together.
//!
//! On SQLite this is the writer's group commit; on PostgreSQL it saves round trips and keeps the rows that all of a
//! tenant's calls count in from being locked once for each. A write that comes alone is not held up.

use std::marker::PhantomData;
use std::mem;
use std::slice;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

use crate::app::App;
use crate::error::Error;

/// Writes in one transaction at most: well below what either database allows as parameters.
const MOST: usize = 64;

/// How long a transaction may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// A write that may share a transaction with others of its kind.
pub trait Batched: Sized + Send + Sync + 'static {
    /// What the caller learns.
    type Done: Send + 'static;

    /// Where writes of this kind gather.
    fn batch(app: &App) -> &Batch<Self>;

    /// Writes them in one transaction, and returns an answer for each in their order.
    fn write(app: &App, writes: &[Self]) -> impl Future<Output = Result<Vec<Self::Done>, Error>> + Send;
}

/// The writes of one kind that wait.
pub struct Batch<W: Batched>(Mutex<Waiting<W>>);

struct Waiting<W: Batched> {
    writes: Vec<(W, Answer<W>)>,
    /// Whether somebody is writing, who will see what is added.
    is_writing: bool,
}

type Answer<W> = oneshot::Sender<Result<<W as Batched>::Done, Error>>;

impl<W: Batched> Default for Batch<W> {
    fn default() -> Self {
        Self(Mutex::new(Waiting { writes: Vec::new(), is_writing: false }))
    }
}

impl<W: Batched> Batch<W> {
    /// A panic while the lock was held can't leave the list half changed.
    fn lock(&self) -> MutexGuard<'_, Waiting<W>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next writes; with none left, whoever comes next begins to write.
    fn next(&self) -> Option<Vec<(W, Answer<W>)>> {
        let mut waiting = self.lock();
        if waiting.writes.is_empty() {
            waiting.is_writing = false;
            return None;
        }
        let count = Ord::min(waiting.writes.len(), MOST);
        let rest = waiting.writes.split_off(count);
        Some(mem::replace(&mut waiting.writes, rest))
    }
}

/// Writes, together with what else is waiting. Once begun it is carried through, whatever becomes of the caller.
pub async fn write<W: Batched>(app: &App, write: W) -> Result<W::Done, Error> {
    let (answer, answered) = oneshot::channel();
    let begins = {
        let mut waiting = W::batch(app).lock();
        waiting.writes.push((write, answer));
        !mem::replace(&mut waiting.is_writing, true)
    };
    if begins {
        app.tasks.spawn(write_all::<W>(app.clone()));
    }
    answered.await.map_err(|_| Error::internal("a write was given up"))?
}

async fn write_all<W: Batched>(app: App) {
    let _reset = ResetOnPanic::<W>(&app, PhantomData);
    while let Some(gathered) = W::batch(&app).next() {
        let (writes, answers): (Vec<W>, Vec<Answer<W>>) = gathered.into_iter().unzip();
        match in_time(W::write(&app, &writes)).await {
            Ok(done) => {
                for (answer, done) in answers.into_iter().zip(done) {
                    // Nobody waiting is no fault.
                    let _ = answer.send(Ok(done));
                }
            }
            Err(error) if writes.len() == 1 => {
                for answer in answers {
                    let _ = answer.send(Err(error.clone()));
                }
            }
            // What the database refuses it refuses alone.
            Err(error) => {
                tracing::debug!(inside = ?error, writes = writes.len(), "a batch failed; writing one by one");
                let mut away = None;
                for (answer, alone) in answers.into_iter().zip(&writes) {
                    let done = match &away {
                        // The others would only wait for the same.
                        Some(error) => Err(Error::clone(error)),
                        None => in_time(W::write(&app, slice::from_ref(alone))).await.and_then(|done| {
                            done.into_iter().next().ok_or_else(|| Error::internal("a write without an answer"))
                        }),
                    };
                    away = done.as_ref().err().filter(|error| matches!(error, Error::Unavailable(_))).cloned();
                    let _ = answer.send(done);
                }
            }
        }
    }
}

/// A connection that swallows what is sent would hold up all writes of a kind for good.
async fn in_time<T>(writing: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let late = || Error::Unavailable(format!("a write took longer than {} s", PATIENCE.as_secs()));
    tokio::time::timeout(PATIENCE, writing).await.unwrap_or_else(|_| Err(late()))
}

/// Lets the next write begin anew, should a batch panic.
struct ResetOnPanic<'a, W: Batched>(&'a App, PhantomData<W>);

impl<W: Batched> Drop for ResetOnPanic<'_, W> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let mut waiting = W::batch(self.0).lock();
            waiting.is_writing = false;
            waiting.writes.clear();
        }
    }
}
