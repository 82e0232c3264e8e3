//! How many workers a tenant's runs need. Pure.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crds::protocol::Runs;
use crds::runtime::Autoscaling;

/// Workers for this many runs, none of them idle and none with more than its share.
pub fn recommend(autoscaling: &Autoscaling, runs: &Runs) -> i32 {
    let runs = runs.queued.saturating_add(runs.running);
    let target = u64::try_from(autoscaling.target_runs_per_replica).unwrap_or(1).max(1);
    let replicas = i32::try_from(runs.div_ceil(target)).unwrap_or(i32::MAX);
    // `clamp` would panic with a minimum above the maximum, which the schema refuses.
    replicas.min(autoscaling.max_replicas).max(autoscaling.min_replicas)
}

/// What was recommended lately: more workers come at once, and go only when fewer were enough for a while.
#[derive(Debug, Default)]
pub struct Window(VecDeque<(Instant, i32)>);

impl Window {
    /// The number of workers now, and when a smaller one may be right.
    pub fn settle(&mut self, now: Instant, recommended: i32, period: Duration) -> (i32, Option<Duration>) {
        while self.0.front().is_some_and(|(at, _)| now.duration_since(*at) >= period) {
            self.0.pop_front();
        }
        // What is not larger than the latest can never be the largest again.
        while self.0.back().is_some_and(|(_, before)| *before <= recommended) {
            self.0.pop_back();
        }
        self.0.push_back((now, recommended));
        let (at, largest) = self.0.front().copied().unwrap_or((now, recommended));
        let look_again = (largest > recommended).then(|| period.saturating_sub(now.duration_since(at)));
        (largest, look_again)
    }

    /// Whether nothing was recommended yet.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_follow_runs_within_bounds() {
        let autoscaling = Autoscaling { min_replicas: 1, max_replicas: 4, target_runs_per_replica: 10 };
        let replicas = |queued, running| recommend(&autoscaling, &Runs { queued, running, running_dedicated: running });
        assert_eq!(replicas(0, 0), 1);
        assert_eq!(replicas(0, 10), 1);
        assert_eq!(replicas(1, 10), 2);
        assert_eq!(replicas(20, 20), 4);
        assert_eq!(replicas(1_000, 0), 4);
        assert_eq!(replicas(u64::MAX, 1), 4);
    }

    #[test]
    fn workers_come_at_once_and_go_slowly() {
        let (start, period) = (Instant::now(), Duration::from_secs(300));
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut window = Window::default();
        assert!(window.is_empty());
        assert_eq!(window.settle(at(0), 1, period), (1, None));
        assert_eq!(window.settle(at(10), 4, period), (4, None));
        assert_eq!(window.settle(at(20), 2, period), (4, Some(Duration::from_secs(290))));
        assert_eq!(window.settle(at(100), 1, period), (4, Some(Duration::from_secs(210))));
        assert_eq!(window.settle(at(310), 1, period), (2, Some(Duration::from_secs(10))));
        assert_eq!(window.settle(at(320), 1, period), (1, None));
    }
}
