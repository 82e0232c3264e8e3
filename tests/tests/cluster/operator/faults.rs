//! A fault at each write: whatever call of a tenant's creation, change or end fails, or is the operator's last, things are
//! in the end as they are without it.

use cloister_tests::{Fault, Watched};
use futures_util::future::join_all;
use serde_json::{Value, json};

use super::{Platform, namespace_path, platform, tenant_path, until};
use crate::support::name;

const BEGUN: fn() -> Value = || json!({"runtime": {"replicas": 1}});
const CHANGED: fn() -> Value = || {
    json!({
        "monthlyTokenLimit": 9_000,
        "runtime": {"replicas": 2, "concurrency": 9},
        "network": {"allowedEgress": [{"cidr": "203.0.113.0/24", "ports": [8443]}]},
    })
};

/// A part of a tenant's life, from one settled state to the next.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Part {
    Creation,
    Change,
    Suspension,
    /// To a plan without a namespace.
    PlanDown,
    End,
}

impl Part {
    /// Brings a tenant to where the part begins.
    async fn prepare(self, platform: &Platform, name: &str) {
        if self != Part::Creation {
            platform.ready(name, BEGUN()).await;
            settled(platform, name).await;
        }
    }

    async fn begin(self, platform: &Platform, name: &str) {
        match self {
            Part::Creation => platform.tenant(name, BEGUN()).await,
            Part::Change => platform.tenant(name, CHANGED()).await,
            Part::Suspension => platform.tenant(name, json!({"suspended": true, "runtime": {"replicas": 1}})).await,
            Part::PlanDown => platform.tenant(name, json!({"plan": "pro"})).await,
            Part::End => platform.delete(&tenant_path(name)).await,
        }
    }

    async fn ended(self, platform: &Platform, name: &str) {
        match self {
            Part::Creation | Part::Change => drop(platform.phase(name, "Ready").await),
            Part::Suspension => drop(platform.phase(name, "Suspended").await),
            Part::PlanDown => {
                platform.gone(&namespace_path(name)).await;
                platform.phase(name, "Ready").await;
            }
            Part::End => {
                platform.gone(&tenant_path(name)).await;
                platform.gone(&namespace_path(name)).await;
            }
        }
    }

    /// Waits for the part's end, and tells how things are then.
    async fn outcome(self, platform: &Platform, name: &str) -> Value {
        self.ended(platform, name).await;
        if self != Part::End {
            settled(platform, name).await;
        }
        let tenant = platform.get(&tenant_path(name)).await.unwrap_or_default();
        let conditions = tenant["status"]["conditions"].as_array().into_iter().flatten();
        let conditions: Vec<_> = conditions.map(|it| json!([it["type"], it["status"], it["reason"]])).collect();
        let email = format!("ops@{name}.example");
        json!({
            "state": platform.state(name).await,
            "conditions": conditions,
            "usage": tenant["status"]["usage"],
            "finalizers": tenant["metadata"]["finalizers"],
            "registered": registered(platform, &email).await,
        })
    }
}

/// Waits until nothing is written about a tenant for a while.
async fn settled(platform: &Platform, name: &str) {
    let quiet = async || {
        let watched = platform.gate.watch(name, None);
        tokio::time::sleep(std::time::Duration::from_millis(1_500)).await;
        watched.seen()
    };
    until("nothing is written any more", quiet, Vec::is_empty).await;
}

/// Waits until a fault strikes. The last writes are statuses, of which there may be fewer this time: then it doesn't.
async fn strikes(watched: &Watched) {
    let _ = tokio::time::timeout(std::time::Duration::from_secs(10), watched.struck()).await;
}

/// How many tenants the api has by an email, and whether they are served.
async fn registered(platform: &Platform, email: &str) -> Vec<Value> {
    let query = "query ($after: String) { tenants(first: 100, after: $after) {
        nodes { email status } pageInfo { hasNextPage endCursor } } }";
    let (mut found, mut after) = (Vec::new(), Value::Null);
    loop {
        let page = platform.app.admin().data(query, json!({"after": after})).await["tenants"].clone();
        let nodes = page["nodes"].as_array().unwrap().iter();
        found.extend(nodes.filter(|tenant| tenant["email"] == email).map(|tenant| tenant["status"].clone()));
        if page["pageInfo"]["hasNextPage"] != true {
            return found;
        }
        after = page["pageInfo"]["endCursor"].clone();
    }
}

/// A part without a fault: its writes, and how things are then.
async fn undisturbed(platform: &Platform, part: Part) -> (Vec<String>, Value) {
    let name = name("whole");
    part.prepare(platform, &name).await;
    let watched = platform.gate.watch(&name, None);
    part.begin(platform, &name).await;
    // The writes are those up to the settled state; looks for quiet count anew.
    part.ended(platform, &name).await;
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    let writes = watched.seen();
    let outcome = part.outcome(platform, &name).await;
    if part != Part::End {
        platform.end(&name).await;
    }
    (writes, outcome)
}

/// A write that fails, or whose answer is lost, each in a tenant of its own.
async fn each_write_fails(part: Part) {
    let platform = platform().await;
    let _shared = platform.undisturbed().await;
    let (writes, expected) = undisturbed(platform, part).await;
    assert!(writes.len() >= 2, "{writes:?}");
    let faults = (0..writes.len()).flat_map(|at| [(at, Fault::Refused), (at, Fault::Lost)]);
    let one = async |at: usize, fault: Fault| {
        let name = name("fault");
        part.prepare(platform, &name).await;
        let watched = platform.gate.watch(&name, Some((at, fault)));
        part.begin(platform, &name).await;
        strikes(&watched).await;
        let outcome = part.outcome(platform, &name).await;
        assert_eq!(outcome, expected, "{part:?}: {fault:?} at {at}, {}", writes[at]);
        if part != Part::End {
            platform.end(&name).await;
        }
    };
    let faults: Vec<_> = faults.collect();
    for some in faults.chunks(8) {
        join_all(some.iter().map(|(at, fault)| one(*at, *fault))).await;
    }
}

/// The operator dies at a write, before or after it takes effect, and another one takes its place.
async fn the_operator_dies_at_each_write(part: Part) {
    let platform = platform().await;
    let mut operator = platform.alone().await;
    let (writes, expected) = undisturbed(platform, part).await;
    for (at, write) in writes.iter().enumerate() {
        for fault in [Fault::Held, Fault::AnswerHeld] {
            let name = name("death");
            part.prepare(platform, &name).await;
            let watched = platform.gate.watch(&name, Some((at, fault)));
            part.begin(platform, &name).await;
            strikes(&watched).await;
            operator.restart().await;
            let outcome = part.outcome(platform, &name).await;
            assert_eq!(outcome, expected, "{part:?}: dead at {at}, {fault:?}, {write}");
            if part != Part::End {
                platform.delete(&tenant_path(&name)).await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_creation_survives_the_failure_of_each_write() {
    each_write_fails(Part::Creation).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_survives_the_failure_of_each_write() {
    each_write_fails(Part::Change).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_suspension_survives_the_failure_of_each_write() {
    each_write_fails(Part::Suspension).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_that_goes_down_survives_the_failure_of_each_write() {
    each_write_fails(Part::PlanDown).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_end_survives_the_failure_of_each_write() {
    each_write_fails(Part::End).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_creation_survives_the_operators_death_at_each_write() {
    the_operator_dies_at_each_write(Part::Creation).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_survives_the_operators_death_at_each_write() {
    the_operator_dies_at_each_write(Part::Change).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_end_survives_the_operators_death_at_each_write() {
    the_operator_dies_at_each_write(Part::End).await;
}
