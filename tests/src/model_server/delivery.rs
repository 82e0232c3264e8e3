//! How an answer's bytes go out: in which pieces, with what pauses, and whether to the end.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::{Body, Bytes};
use futures_util::stream;
use tokio::sync::{oneshot, watch};

use super::completion::Pieces;
use super::record::{Ending, Ticket};
use crate::PATIENCE;

/// One step of a delivery.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    Send(Bytes),
    Hold,
    Cut,
}

/// Everything at once.
pub(super) fn whole(bytes: Bytes) -> Vec<Step> {
    vec![Step::Send(bytes)]
}

/// The pieces of a completion, with a hold where there is to be one.
pub(super) fn steps(pieces: Pieces, hold: bool) -> Vec<Step> {
    let mut steps: Vec<Step> = pieces.bytes.into_iter().map(Step::Send).collect();
    if hold {
        steps.insert(pieces.hold_at.min(steps.len()), Step::Hold);
    }
    steps
}

/// Cuts steps to writes of `wire_chunk` bytes, and off after `cut_after` bytes.
pub(super) fn shape(steps: Vec<Step>, wire_chunk: Option<usize>, cut_after: Option<usize>) -> Vec<Step> {
    let mut left = cut_after.unwrap_or(usize::MAX);
    let mut shaped = Vec::new();
    for step in steps {
        let Step::Send(bytes) = step else {
            shaped.push(step);
            continue;
        };
        let sent = bytes.slice(..bytes.len().min(left));
        left -= sent.len();
        let size = wire_chunk.unwrap_or(sent.len()).max(1);
        shaped.extend(sent.chunks(size).map(|chunk| Step::Send(sent.slice_ref(chunk))));
        if left == 0 {
            break;
        }
    }
    if cut_after.is_some() {
        shaped.push(Step::Cut);
    }
    shaped
}

/// A response body that takes the steps. If it is dropped before the last, the client is gone.
pub(super) fn body(steps: Vec<Step>, gap: Duration, gate: Arc<Gate>, ticket: Ticket) -> Body {
    let delivery = Delivery { steps: steps.into(), gap, begun: false, gate, ticket };
    Body::from_stream(stream::unfold(delivery, |mut delivery| async move {
        let sent = delivery.next().await?;
        Some((sent, delivery))
    }))
}

struct Delivery {
    steps: VecDeque<Step>,
    gap: Duration,
    begun: bool,
    gate: Arc<Gate>,
    ticket: Ticket,
}

impl Delivery {
    async fn next(&mut self) -> Option<io::Result<Bytes>> {
        loop {
            match self.steps.pop_front() {
                Some(Step::Send(bytes)) => {
                    if self.begun && !self.gap.is_zero() {
                        tokio::time::sleep(self.gap).await;
                    }
                    self.begun = true;
                    if self.steps.is_empty() {
                        self.ticket.end(Ending::Completed);
                    }
                    return Some(Ok(bytes));
                }
                Some(Step::Hold) => self.gate.pass().await,
                Some(Step::Cut) => {
                    // hyper writes out what it has when a body makes it wait, and forgets it when a body fails.
                    tokio::task::yield_now().await;
                    self.steps.clear();
                    self.ticket.end(Ending::Cut);
                    return Some(Err(io::Error::other("the script cuts here")));
                }
                None => {
                    self.ticket.end(Ending::Completed);
                    return None;
                }
            }
        }
    }
}

/// Where held replies stand, the longest held first.
pub(super) struct Gate {
    held: Mutex<VecDeque<oneshot::Sender<()>>>,
    changed: watch::Sender<()>,
}

impl Default for Gate {
    fn default() -> Self {
        Gate { held: Mutex::default(), changed: watch::Sender::new(()) }
    }
}

impl Gate {
    async fn pass(&self) {
        let (let_go, released) = oneshot::channel();
        self.held.lock().unwrap().push_back(let_go);
        self.changed.send_replace(());
        let _ = released.await;
    }

    /// Lets go the one held longest whose client is still there.
    pub(super) fn release(&self) -> bool {
        let mut held = self.held.lock().unwrap();
        std::iter::from_fn(|| held.pop_front()).any(|let_go| let_go.send(()).is_ok())
    }

    pub(super) async fn wait_for_held(&self, count: usize) {
        let mut changed = self.changed.subscribe();
        let reached = async {
            loop {
                changed.borrow_and_update();
                if self.held() >= count {
                    return;
                }
                let _ = changed.changed().await;
            }
        };
        if tokio::time::timeout(PATIENCE, reached).await.is_err() {
            panic!("{} replies are held, not {count}", self.held());
        }
    }

    fn held(&self) -> usize {
        self.held.lock().unwrap().iter().filter(|let_go| !let_go.is_closed()).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn send(text: &'static str) -> Step {
        Step::Send(Bytes::from_static(text.as_bytes()))
    }

    #[test]
    fn shape_cuts_at_any_byte() {
        let steps = || vec![send("abc"), Step::Hold, send("def")];
        assert_eq!(shape(steps(), None, None), steps());
        assert_eq!(shape(steps(), None, Some(0)), [Step::Cut]);
        assert_eq!(shape(steps(), None, Some(3)), [send("abc"), Step::Cut]);
        assert_eq!(shape(steps(), None, Some(4)), [send("abc"), Step::Hold, send("d"), Step::Cut]);
        assert_eq!(shape(steps(), None, Some(99)), [send("abc"), Step::Hold, send("def"), Step::Cut]);
        assert_eq!(shape(steps(), Some(2), None), [send("ab"), send("c"), Step::Hold, send("de"), send("f")]);
    }
}
