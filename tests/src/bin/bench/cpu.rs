//! The processor time of what is measured: a figure that other work on the machine disturbs less than a rate.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::process;
use std::time::Duration;

/// Linux tells processor time in hundredths of a second, whatever its timer does: `proc(5)`, `sysconf(_SC_CLK_TCK)`.
const TICK_MS: u64 = 10;

/// A process's line in `/proc`.
struct Process {
    name: String,
    parent: u32,
    /// Of itself and of the children that it has waited for, in ticks.
    ticks: u64,
}

/// Processor time, in milliseconds, that the processes begun by this one have used, but for `apart` and its own: the
/// server or the peer with all its processes, and the database server.
pub fn of_stack(apart: u32) -> u64 {
    let processes = processes();
    let mut stack = below(process::id(), &processes, apart);
    stack.remove(&process::id());
    stack.iter().filter_map(|pid| processes.get(pid)).map(|process| process.ticks * TICK_MS).sum()
}

/// Processor time, in milliseconds, that a process and those begun by it have used, by their names, of which the kernel
/// keeps 15 characters.
pub fn by_name(root: u32) -> BTreeMap<String, u64> {
    let processes = processes();
    let mut used = BTreeMap::new();
    for process in below(root, &processes, 0).iter().filter_map(|pid| processes.get(pid)) {
        *used.entry(process.name.clone()).or_default() += process.ticks * TICK_MS;
    }
    used
}

/// Processor time, in milliseconds, that one process has used.
pub fn of(pid: u32) -> u64 {
    read(pid).map_or(0, |process| process.ticks * TICK_MS)
}

/// Waits until a process has used less than a twentieth of a core for three seconds.
pub async fn wait_until_idle(pid: u32) {
    let mut idle = 0;
    while idle < 3 {
        let before = of(pid);
        tokio::time::sleep(Duration::from_secs(1)).await;
        idle = if of(pid) - before < 50 { idle + 1 } else { 0 };
    }
}

/// A process and all that descend from it, but for `apart` and its own.
fn below(root: u32, processes: &HashMap<u32, Process>, apart: u32) -> HashSet<u32> {
    let mut stack = HashSet::from([root]);
    // A process may stand before its parent: grow until nothing is new.
    loop {
        let is_new = |(pid, process): &(&u32, &Process)| {
            stack.contains(&process.parent) && !stack.contains(*pid) && **pid != apart
        };
        let found: Vec<u32> = processes.iter().filter(is_new).map(|(pid, _)| *pid).collect();
        if found.is_empty() {
            return stack;
        }
        stack.extend(found);
    }
}

fn processes() -> HashMap<u32, Process> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_string_lossy().parse::<u32>().ok());
    pids.filter_map(|pid| Some((pid, read(pid)?))).collect()
}

/// None if it has ended meanwhile.
fn read(pid: u32) -> Option<Process> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, its name, is in parentheses and may hold anything; what follows begins with the state.
    let (head, fields) = stat.rsplit_once(") ")?;
    let name = head.split_once('(')?.1.to_owned();
    let fields: Vec<&str> = fields.split(' ').collect();
    let ticks = fields.get(11..15)?.iter().filter_map(|ticks| ticks.parse::<u64>().ok()).sum();
    Some(Process { name, parent: fields.get(1)?.parse().ok()?, ticks })
}
