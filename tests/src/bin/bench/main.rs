//! The benchmark suite: `make bench`, or one measurement of it by name. What is measured, how, and what came of it
//! is in `docs/benchmarks.md`, whose tables `bench report` writes.
//!
//! Build it with `--release`, the server too: it is looked for beside this program.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod cpu;
mod first_token;
mod load;
mod loops;
mod model;
mod operators;
mod peers;
mod platform;
mod queue;
mod report;
mod results;
mod runs;
mod start;
mod subscribers;
mod usage;
mod wire;

use std::path::{Path, PathBuf};

use clap::{Parser, Subcommand};

use self::results::Results;

/// Measures Cloister.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// Fewer and shorter measurements, to see that they work.
    #[arg(long, global = true)]
    quick: bool,
    /// The file that results are appended to.
    #[arg(long, global = true, default_value = "target/bench.jsonl")]
    results: PathBuf,
}

#[derive(Clone, Copy, Subcommand)]
enum Command {
    /// All of them, then the report.
    All,
    /// Whole runs a second, against the article's stack.
    Runs,
    /// Whole runs a second, SQLite against PostgreSQL.
    Writers,
    /// Tool loops of twenty turns a second, against the Agents SDK's own.
    Loop,
    /// What is added to the time until the first token.
    FirstToken,
    /// Claim and finish a second, against graphile-worker.
    Queue,
    /// How soon idle workers start a run.
    Pickup,
    /// A tenant's starts beside one with a backlog.
    Neighbour,
    /// A month's usage with few and with many records.
    Usage,
    /// Two thousand subscribers of one run.
    Subscribers,
    /// A thousand idle subscriptions.
    Idle,
    /// A thousand tenants by the operator, against one written with kopf, then their report. Not one of all: it needs
    /// root, for a Kubernetes cluster.
    Operator,
    /// Writes the tables of `docs/benchmarks.md` from the results.
    Report,
    /// The instant model server, which the measurements start.
    #[command(hide = true)]
    Model,
}

// One thread for the generator: the cores are for what is measured.
#[tokio::main(flavor = "current_thread")]
async fn main() -> std::io::Result<()> {
    let arguments = Arguments::parse();
    let file = arguments.results.clone();
    let results = Results::new(arguments.results, arguments.quick);
    if !matches!(arguments.command, Command::Model | Command::Report) {
        warn_of_other_work();
    }
    match arguments.command {
        Command::Model => model::serve().await?,
        Command::Report => report(&file, true)?,
        Command::All => {
            runs::measure(&results).await;
            runs::writers(&results).await;
            loops::measure(&results).await;
            first_token::measure(&results).await;
            queue::measure(&results).await;
            start::pickup(&results).await;
            start::neighbour(&results).await;
            usage::measure(&results).await;
            subscribers::watch(&results).await;
            subscribers::idle(&results).await;
            report(&file, true)?;
        }
        Command::Runs => runs::measure(&results).await,
        Command::Writers => runs::writers(&results).await,
        Command::Loop => loops::measure(&results).await,
        Command::FirstToken => first_token::measure(&results).await,
        Command::Queue => queue::measure(&results).await,
        Command::Pickup => start::pickup(&results).await,
        Command::Neighbour => start::neighbour(&results).await,
        Command::Usage => usage::measure(&results).await,
        Command::Subscribers => subscribers::watch(&results).await,
        Command::Idle => subscribers::idle(&results).await,
        Command::Operator => {
            operators::measure(&results).await;
            // On whatever machine the other tables are from.
            report(&file, false)?;
        }
    }
    Ok(())
}

/// Figures of a busy machine are not worth much.
fn warn_of_other_work() {
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load: f64 = load.split(' ').next().and_then(|load| load.parse().ok()).unwrap_or(0.0);
    if load > 1.0 {
        eprintln!(
            "bench: the machine has other work to do (load {load}): wait until it is quiet for figures that hold"
        );
    }
}

fn report(results: &Path, with_machine: bool) -> std::io::Result<()> {
    let document = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/benchmarks.md");
    report::write(results, &document, with_machine)
}
