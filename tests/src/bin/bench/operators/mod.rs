//! A thousand enterprise tenants, by our operator and by the same written with kopf: how fast they come, what that
//! costs, and what a restart and a changed child cost.

mod audit;
mod contestant;
mod drift;
mod ground;

use std::collections::{BTreeMap, HashSet};
use std::time::Instant;

use chrono::{DateTime, Utc};
use serde_json::{Value, json};

use self::audit::{Audit, Object};
use self::contestant::{Contestant, Kopf, Side};
use self::ground::Ground;
use crate::cpu;
use crate::load::{median, range};
use crate::report::printed;
use crate::results::{Results, Row, shown};

/// Everything that a tenant is made of: its namespace and what is in it.
const OBJECTS: [&str; 8] = [
    "namespaces",
    "networkpolicies",
    "resourcequotas",
    "limitranges",
    "serviceaccounts",
    "secrets",
    "deployments",
    "poddisruptionbudgets",
];

/// What was measured of one operator on one ground.
struct Measured {
    /// Tenants a second until the last object was applied.
    applied: f64,
    /// Tenants a second until the last was Ready.
    ready: f64,
    /// Peak resident memory, in MiB.
    memory: f64,
    /// Its writes for each tenant, without events.
    writes_each: f64,
    /// Processor time for each tenant, in milliseconds, by what used it.
    cpu: BTreeMap<&'static str, f64>,
    restart: Restart,
    drift: Vec<drift::Repair>,
}

/// A restart with all tenants settled.
struct Restart {
    /// Seconds until it was ready.
    ready: f64,
    /// Peak resident memory, in MiB.
    memory: f64,
    /// What it wrote.
    writes: usize,
}

/// Both operators, by turns.
pub async fn measure(results: &Results) {
    let count = results.pick(1_000, 100);
    let (mut ours, mut peers) = (Vec::new(), Vec::new());
    for pair in 0..results.pick(2, 1) {
        let order = if pair % 2 == 0 { [Side::Cloister, Side::Kopf] } else { [Side::Kopf, Side::Cloister] };
        for side in order {
            let measured = one(side, count).await;
            eprintln!("bench: {side:?} {}", measured.figures());
            let of_side = if side == Side::Cloister { &mut ours } else { &mut peers };
            of_side.push(measured);
        }
    }
    setting(results);
    compare(results, &ours, &peers);
    let restarts = [("cloister-operator", &ours), ("kopf", &peers)];
    for (name, measured) in restarts {
        restart(results, name, measured, count);
    }
    for (name, measured) in restarts {
        costs(results, name, measured);
    }
}

async fn one(side: Side, count: usize) -> Measured {
    let ground = Ground::prepare().await;
    let operator = Contestant::start(side, &ground).await;
    let audit = ground.audit();
    let before = used(&ground, operator.pid());
    let ready = ground.until_ready(count);
    let begun = Instant::now();
    ground.create_tenants(count).await;
    let ready = ready.await.expect("the wait is not cancelled") - begun;
    operator.wait_until_settled(count).await;

    let applied = until_applied(&audit, &ground.account(), count);
    let cpu = used(&ground, operator.pid()).into_iter().map(|(name, used)| {
        let used = used.saturating_sub(before.get(name).copied().unwrap_or_default());
        (name, used as f64 / count as f64)
    });
    let cpu = cpu.collect();
    let writes_each = audit.writes_of(&ground.account()).len() as f64 / count as f64;
    let memory = peak_memory(operator.pid());
    let (restart, operator) = restarted(side, operator, &ground, count).await;
    let drift = drift::measure(&ground).await;
    assert!(!operator.complains(), "the operator complains:\n{}", operator.log());
    operator.end().await;
    let (applied, ready) = (count as f64 / applied, count as f64 / ready.as_secs_f64());
    Measured { applied, ready, memory, writes_each, cpu, restart, drift }
}

/// Seconds from the first tenant's arrival to the last object's answer.
///
/// # Panics
/// An object of a tenant was not made.
fn until_applied(audit: &Audit, account: &str, count: usize) -> f64 {
    let calls = audit.calls();
    let first =
        calls.iter().filter(|call| call.is_of(&["tenants"]) && call.is_creation()).map(|call| call.received).min();
    let mut made: HashSet<Object> = HashSet::new();
    let mut last: Option<DateTime<Utc>> = None;
    let own = audit.writes_of(account);
    for call in own.iter().filter(|call| call.is_creation() && call.is_of(&OBJECTS)) {
        made.insert(call.object());
        last = last.max(Some(call.answered));
    }
    assert_eq!(made.len(), OBJECTS.len() * count, "every object of every tenant");
    let (first, last) = (first.expect("a tenant was made"), last.expect("an object was made"));
    (last - first).as_seconds_f64()
}

/// Ends the operator and starts it again.
async fn restarted(side: Side, operator: Contestant, ground: &Ground, count: usize) -> (Restart, Contestant) {
    operator.end().await;
    let audit = ground.audit();
    let begun = Instant::now();
    let operator = Contestant::start(side, ground).await;
    let ready = begun.elapsed().as_secs_f64();
    operator.wait_until_settled(count).await;
    let writes = audit.writes_of(&ground.account()).len();
    (Restart { ready, memory: peak_memory(operator.pid()), writes }, operator)
}

/// Processor time so far, in milliseconds, by what used it.
fn used(ground: &Ground, operator: u32) -> BTreeMap<&'static str, u64> {
    let cluster = cpu::by_name(ground.first_process());
    let part = |names: &[&str]| names.iter().filter_map(|name| cluster.get(*name)).sum();
    BTreeMap::from([
        ("operator", cpu::of(operator)),
        ("api", ground.app.pid().map_or(0, cpu::of)),
        ("API server", part(&["kube-apiserver"])),
        ("etcd", part(&["etcd"])),
        // The kernel keeps 15 characters.
        ("controllers", part(&["kube-controller", "kube-scheduler", "kwok"])),
    ])
}

/// A process's greatest resident memory, in MiB.
fn peak_memory(pid: u32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kibibytes = line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<f64>().ok());
    kibibytes.expect("the operator is running") / 1024.0
}

impl Measured {
    fn figures(&self) -> Value {
        let Restart { ready, memory, writes } = self.restart;
        json!({
            "applied": self.applied, "ready": self.ready, "memory": self.memory,
            "writes_each": self.writes_each, "cpu": self.cpu,
            "restart": {"ready": ready, "memory": memory, "writes": writes},
            "drift": self.drift.iter().map(drift::Repair::figures).collect::<Vec<_>>(),
        })
    }
}

/// What was compared, beside the machine.
fn setting(results: &Results) {
    let kubernetes = include_str!("../../../../cluster/build.sh").lines();
    let kubernetes = kubernetes.filter_map(|line| line.strip_prefix("kubernetes_version=")).next().unwrap_or_default();
    for (what, which) in [
        ("Kubernetes", format!("{kubernetes}, simulated nodes (kwok)")),
        ("kopf", format!("{}, {}", Kopf::version(), printed("python3", &["--version"]))),
        ("Cloister", printed("git", &["describe", "--always", "--dirty"])),
        ("Day", printed("date", &["-u", "+%Y-%m-%d"])),
    ] {
        results.add(Row::new("operator-of").cell("Of", what).cell("Which", which));
    }
}

fn compare(results: &Results, ours: &[Measured], peers: &[Measured]) {
    let add = |what: &str, of: fn(&Measured) -> f64, goal: &str| {
        let ratios: Vec<f64> = ours.iter().zip(peers).map(|(ours, peer)| of(ours) / of(peer)).collect();
        let (low, high) = range(&ratios);
        let middle = |part: &[Measured]| median(&part.iter().map(of).collect::<Vec<_>>());
        results.add(
            Row::new("operator")
                .cell("Of an operator", what)
                .cell("cloister-operator", shown(middle(ours)))
                .cell("kopf", shown(middle(peers)))
                .cell("Ratio", format!("{}× ({} to {})", shown(median(&ratios)), shown(low), shown(high)))
                .cell("Goal", goal)
                .figures(json!({
                    "ours": ours.iter().map(of).collect::<Vec<_>>(),
                    "peers": peers.iter().map(of).collect::<Vec<_>>(),
                    "ratios": ratios,
                })),
        );
    };
    add("Tenants a second, to all objects applied", |it| it.applied, "5×");
    add("Tenants a second, to Ready", |it| it.ready, "5×");
    add("Peak memory while they come, MiB", |it| it.memory, "0.3×");
    add("Peak memory of a restart with them, MiB", |it| it.restart.memory, "0.3×");
    add("Its processor time a tenant, ms", |it| it.cpu["operator"], "");
    add("Its writes a tenant", |it| it.writes_each, "");
}

fn costs(results: &Results, name: &str, measured: &[Measured]) {
    let middle = |of: &dyn Fn(&Measured) -> f64| shown(median(&measured.iter().map(of).collect::<Vec<_>>()));
    let mut row = Row::new("operator-cpu").cell("Milliseconds a tenant", name);
    for part in ["operator", "api", "API server", "etcd", "controllers"] {
        row = row.cell(part, middle(&|it| it.cpu[part]));
    }
    results.add(row.cell("all", middle(&|it| it.cpu.values().sum())));
}

fn restart(results: &Results, name: &str, measured: &[Measured], count: usize) {
    let most = |of: &dyn Fn(&Measured) -> f64| measured.iter().map(of).fold(0.0, f64::max);
    let repairs = || measured.iter().flat_map(|it| &it.drift);
    results.add(
        Row::new("operator-restart")
            .cell("With so many settled tenants", name)
            .cell("Tenants", count.to_string())
            .cell("Ready again after, s", shown(most(&|it| it.restart.ready)))
            .cell("Writes of the restart", format!("{}", most(&|it| it.restart.writes as f64)))
            .cell("Writes for a changed child", repairs().map(|it| it.writes).max().unwrap_or_default().to_string())
            .cell("Right again after, ms", shown(repairs().map(|it| it.milliseconds).fold(0.0, f64::max)))
            .cell("Goals", "30 s, 0, 1")
            .figures(measured.iter().map(Measured::figures).collect()),
    );
}
