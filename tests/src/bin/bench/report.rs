//! The tables of `docs/benchmarks.md`, between the markers `<!-- table: NAME -->` and `<!-- end -->`.

use std::fs;
use std::io;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::results::{last_rows, read};

const BEGIN: &str = "<!-- table: ";
const END: &str = "<!-- end -->";

/// Writes the last results of each table, and with `with_machine` what they were measured on, into `document`.
///
/// # Errors
/// The document can't be read or written, or a marker has no end.
pub fn write(results: &Path, document: &Path, with_machine: bool) -> io::Result<()> {
    let lines = read(results);
    let text = fs::read_to_string(document)?;
    let mut written = String::new();
    let mut rest = text.as_str();
    while let Some(at) = rest.find(BEGIN) {
        let (before, marked) = rest.split_at(at);
        let unended = || io::Error::other("a table's marker has no end");
        let name = marked[BEGIN.len()..].split(" -->").next().ok_or_else(unended)?;
        let end = marked.find(END).ok_or_else(unended)?;
        let table = match name {
            "machine" => with_machine.then(machine),
            _ => table(&last_rows(&lines, name)),
        };
        written.push_str(before);
        match table {
            Some(table) => written.push_str(&format!("{BEGIN}{name} -->\n{table}")),
            // Not measured: what is there stays.
            None => written.push_str(&marked[..end]),
        }
        written.push_str(END);
        rest = &marked[end + END.len()..];
    }
    written.push_str(rest);
    fs::write(document, written)
}

/// A Markdown table; none without rows.
fn table(rows: &[Value]) -> Option<String> {
    let columns: Vec<&String> = rows.first()?["cells"].as_object()?.keys().collect();
    let line = |cells: Vec<&str>| format!("| {} |\n", cells.join(" | "));
    let mut table = line(columns.iter().map(|column| column.as_str()).collect());
    table.push_str(&line(columns.iter().map(|_| "---").collect()));
    for row in rows {
        table.push_str(&line(columns.iter().map(|column| row["cells"][*column].as_str().unwrap_or("")).collect()));
    }
    if rows.iter().any(|row| row["quick"] == true) {
        table.push_str("\nMeasured in the quick mode: too short to mean much.\n");
    }
    Some(table)
}

/// What it was measured on.
fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let memory = field("/proc/meminfo", "MemTotal").trim_end_matches("kB").trim().parse().unwrap_or(0) / (1024 * 1024);
    let facts = [
        ("Processor", format!("{}, {cores} cores, {memory} GiB of memory", field("/proc/cpuinfo", "model name"))),
        ("Kernel", printed("uname", &["-sr"])),
        ("PostgreSQL", printed("psql", &["--version"])),
        ("Redis", printed("redis-server", &["--version"])),
        ("Rust", printed("rustc", &["--version"])),
        ("Python", printed("python3", &["--version"])),
        ("Cloister", printed("git", &["describe", "--always", "--dirty"])),
        ("Day", printed("date", &["-u", "+%Y-%m-%d"])),
    ];
    let lines = facts.iter().filter(|(_, fact)| !fact.is_empty()).map(|(name, fact)| format!("| {name} | {fact} |\n"));
    format!("| | |\n| --- | --- |\n{}", lines.collect::<String>())
}

/// A field of a file of the kernel's, `name : value`.
fn field(file: &str, name: &str) -> String {
    let text = fs::read_to_string(file).unwrap_or_default();
    let found = text.lines().filter_map(|line| line.split_once(':')).find(|(field, _)| field.trim() == name);
    found.map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
}

/// The first line that a program prints; nothing if it isn't there.
pub fn printed(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    text.lines().next().unwrap_or_default().to_owned()
}
