//! Load in a closed loop: each client sends its next request when the last one is answered.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use tokio::task::JoinSet;

use crate::cpu;
use crate::wire::{Answer, Connection};

/// What a measured stretch of load gave.
pub struct Load {
    /// Answers a second.
    pub rate: f64,
    /// Their times, in microseconds.
    pub latency: Histogram<u64>,
    /// Processor time of all that was measured for each, in milliseconds.
    pub cpu: f64,
}

/// An empty histogram of microseconds, to three digits.
pub fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 600_000_000, 3).expect("bounds of a histogram")
}

/// Notes a time of so many nanoseconds.
pub fn note(histogram: &mut Histogram<u64>, nanoseconds: u64) {
    histogram.saturating_record((nanoseconds / 1000).max(1));
}

/// The value at `quantile`, in milliseconds.
pub fn milliseconds(histogram: &Histogram<u64>, quantile: f64) -> f64 {
    histogram.value_at_quantile(quantile) as f64 / 1000.0
}

/// Sends `request` from `clients` connections for `warm_up` and then, measured, for `duration`. The processor time of
/// the process `apart` does not count.
///
/// # Panics
/// An answer is other than 200: there is nothing to measure then.
pub async fn closed_loop(
    address: SocketAddr,
    request: &[u8],
    clients: usize,
    (warm_up, duration): (Duration, Duration),
    apart: u32,
) -> Load {
    let begin = Instant::now() + warm_up;
    let end = begin + duration;
    let mut tasks = JoinSet::new();
    for _ in 0..clients {
        let request = request.to_vec();
        tasks.spawn(async move {
            let mut connection = Connection::open(address).await.expect("the server listens");
            let mut latency = histogram();
            loop {
                let sent = Instant::now();
                if sent >= end {
                    return latency;
                }
                ok(connection.exchange(&request).await);
                let answered = Instant::now();
                if answered >= begin && answered < end {
                    latency.saturating_record(u64::try_from((answered - sent).as_micros()).unwrap_or(u64::MAX).max(1));
                }
            }
        });
    }
    tokio::time::sleep_until(begin.into()).await;
    let used = cpu::of_stack(apart);
    tokio::time::sleep_until(end.into()).await;
    let used = cpu::of_stack(apart).saturating_sub(used);
    let mut latency = histogram();
    while let Some(part) = tasks.join_next().await {
        latency.add(part.expect("a client does not panic")).expect("histograms of the same bounds");
    }
    let answers = latency.len() as f64;
    Load { rate: answers / duration.as_secs_f64(), latency, cpu: used as f64 / answers }
}

/// The body of an answer that must be 200.
///
/// # Panics
/// It is not.
pub fn ok(answer: std::io::Result<Answer>) -> String {
    let answer = answer.expect("the server answers");
    assert_eq!(answer.status, 200, "the server refuses: {}", answer.body);
    answer.body
}

/// The middle of some figures.
pub fn median(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}

/// The least and the greatest of some figures.
pub fn range(figures: &[f64]) -> (f64, f64) {
    figures.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), &x| (f64::min(low, x), f64::max(high, x)))
}
