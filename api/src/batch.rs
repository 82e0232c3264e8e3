//! Work for the database that gathers: what arrives while the last round is under way goes into the next one together,
//! writes in one transaction, reads in one statement.
//!
//! For writes this is the group commit of SQLite's writer; on PostgreSQL it saves round trips and keeps the rows that
//! all of a tenant's calls count in from being locked once for each. What comes alone is not held up.

use std::marker::PhantomData;
use std::mem;
use std::slice;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

use crate::app::App;
use crate::error::Error;

/// The most that a round takes: well below what either database allows as parameters.
const MOST: usize = 128;

/// How long a round may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// A piece of work that may share a round with others of its kind.
pub trait Batched: Sized + Send + Sync + 'static {
    /// What the caller learns.
    type Done: Send + 'static;

    /// Where work of this kind gathers.
    fn batch(app: &App) -> &Batch<Self>;

    /// Does all of it or nothing, and returns an answer for each in their order.
    fn carry_out(app: &App, all: &[Self]) -> impl Future<Output = Result<Vec<Self::Done>, Error>> + Send;

    /// It failed for good, and yet may have been done: a commit's answer can get lost.
    fn given_up(&self, _app: &App) {}
}

/// The work of one kind that waits.
pub struct Batch<W: Batched>(Mutex<Waiting<W>>);

struct Waiting<W: Batched> {
    work: Vec<(W, Answer<W>)>,
    /// Whether a round is under way, after which what was added is seen.
    is_busy: bool,
}

type Answer<W> = oneshot::Sender<Result<<W as Batched>::Done, Error>>;

impl<W: Batched> Default for Batch<W> {
    fn default() -> Self {
        Self(Mutex::new(Waiting { work: Vec::new(), is_busy: false }))
    }
}

impl<W: Batched> Batch<W> {
    /// A panic while the lock was held can't leave the list half changed.
    fn lock(&self) -> MutexGuard<'_, Waiting<W>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next round; with nothing left, whoever comes next begins one.
    fn next(&self) -> Option<Vec<(W, Answer<W>)>> {
        let mut waiting = self.lock();
        if waiting.work.is_empty() {
            waiting.is_busy = false;
            return None;
        }
        let count = Ord::min(waiting.work.len(), MOST);
        let rest = waiting.work.split_off(count);
        Some(mem::replace(&mut waiting.work, rest))
    }
}

/// Has it done, together with what else is waiting. Once begun it is carried through, whatever becomes of the caller.
pub async fn join<W: Batched>(app: &App, work: W) -> Result<W::Done, Error> {
    let (answer, answered) = oneshot::channel();
    let begins = {
        let mut waiting = W::batch(app).lock();
        waiting.work.push((work, answer));
        !mem::replace(&mut waiting.is_busy, true)
    };
    if begins {
        app.tasks.spawn(carry_on::<W>(app.clone()));
    }
    answered.await.map_err(|_| Error::internal("a batch was given up"))?
}

async fn carry_on<W: Batched>(app: App) {
    let _reset = ResetOnPanic::<W>(&app, PhantomData);
    while let Some(gathered) = W::batch(&app).next() {
        let (all, answers): (Vec<W>, Vec<Answer<W>>) = gathered.into_iter().unzip();
        match in_time(W::carry_out(&app, &all)).await {
            Ok(done) => {
                for (answer, done) in answers.into_iter().zip(done) {
                    // Nobody waiting is no fault.
                    let _ = answer.send(Ok(done));
                }
            }
            Err(error) if all.len() == 1 => {
                for (answer, alone) in answers.into_iter().zip(&all) {
                    alone.given_up(&app);
                    let _ = answer.send(Err(error.clone()));
                }
            }
            // What the database refuses it refuses alone.
            Err(error) => {
                tracing::debug!(inside = ?error, size = all.len(), "a batch failed; going on one by one");
                let mut away = None;
                for (answer, alone) in answers.into_iter().zip(&all) {
                    let done = match &away {
                        // The others would only wait for the same.
                        Some(error) => Err(Error::clone(error)),
                        None => in_time(W::carry_out(&app, slice::from_ref(alone))).await.and_then(|done| {
                            done.into_iter()
                                .next()
                                .ok_or_else(|| Error::internal("a part of a batch without an answer"))
                        }),
                    };
                    if done.is_err() {
                        alone.given_up(&app);
                    }
                    away = done.as_ref().err().filter(|error| matches!(error, Error::Unavailable(_))).cloned();
                    let _ = answer.send(done);
                }
            }
        }
    }
}

/// A connection that swallows what is sent would hold up all work of a kind for good.
async fn in_time<T>(round: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let late = || Error::Unavailable(format!("a batch took longer than {} s", PATIENCE.as_secs()));
    tokio::time::timeout(PATIENCE, round).await.unwrap_or_else(|_| Err(late()))
}

/// Lets the next round begin, should one panic.
struct ResetOnPanic<'a, W: Batched>(&'a App, PhantomData<W>);

impl<W: Batched> Drop for ResetOnPanic<'_, W> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let mut waiting = W::batch(self.0).lock();
            waiting.is_busy = false;
            waiting.work.clear();
        }
    }
}
