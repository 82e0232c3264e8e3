//! The processor time of what is measured: a figure that other work on the machine disturbs less than a rate.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::process;

/// Linux tells processor time in hundredths of a second, whatever its timer does: `proc(5)`, `sysconf(_SC_CLK_TCK)`.
const TICK_MS: u64 = 10;

/// A process's line in `/proc`.
struct Process {
    parent: u32,
    /// Of itself and of the children that it has waited for, in ticks.
    ticks: u64,
}

/// Processor time, in milliseconds, that the processes begun by this one have used, but for `apart` and its own: the
/// server or the peer with all its processes, and the database server.
pub fn of_stack(apart: u32) -> u64 {
    let processes = processes();
    let mut stack = HashSet::from([process::id()]);
    // A process may stand before its parent: grow until nothing is new.
    loop {
        let is_new = |(pid, process): &(&u32, &Process)| {
            stack.contains(&process.parent) && !stack.contains(*pid) && **pid != apart
        };
        let found: Vec<u32> = processes.iter().filter(is_new).map(|(pid, _)| *pid).collect();
        if found.is_empty() {
            break;
        }
        stack.extend(found);
    }
    stack.remove(&process::id());
    stack.iter().filter_map(|pid| processes.get(pid)).map(|process| process.ticks * TICK_MS).sum()
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
    let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split(' ').collect();
    let ticks = fields.get(11..15)?.iter().filter_map(|ticks| ticks.parse::<u64>().ok()).sum();
    Some(Process { parent: fields.get(1)?.parse().ok()?, ticks })
}
