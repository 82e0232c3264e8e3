//! A tool loop of twenty turns: Cloister's against the Agents SDK's own, by turns, a process of each.

use std::process::{Command, Stdio};
use std::time::Duration;

use serde::Deserialize;
use serde_json::json;

use crate::load::{closed_loop, median, range};
use crate::model::Model;
use crate::peers::directory;
use crate::platform::{Database, Platform, agent_with, run_request};
use crate::results::{Results, Row, shown};

const CLIENTS: usize = 16;

/// What the scripted model is asked for: nineteen calls of the tool, then a text.
const MESSAGE: &str = "Hello turns=20";

/// Runs a second, and the processor time of each in milliseconds.
type Loop = (f64, f64);

/// Cloister against the SDK, on both databases.
pub async fn measure(results: &Results) {
    for database in Database::ALL {
        let (mut ours, mut theirs): (Vec<Loop>, Vec<Loop>) = (Vec::new(), Vec::new());
        for pair in 0..results.pairs() {
            if pair % 2 == 0 {
                ours.push(platform(results, database).await);
                theirs.push(sdk(results));
            } else {
                theirs.push(sdk(results));
                ours.push(platform(results, database).await);
            }
        }
        let middle =
            |loops: &[Loop], figure: fn(&Loop) -> f64| shown(median(&loops.iter().map(figure).collect::<Vec<_>>()));
        let ratios: Vec<f64> = ours.iter().zip(&theirs).map(|(ours, theirs)| ours.0 / theirs.0).collect();
        let per_cpu: Vec<f64> = ours.iter().zip(&theirs).map(|(ours, theirs)| theirs.1 / ours.1).collect();
        let (low, high) = range(&ratios);
        results.add(
            Row::new("loop")
                .cell("Database", database.name())
                .cell("Cloister, runs/s", middle(&ours, |ours| ours.0))
                .cell("Processor a run, ms", middle(&ours, |ours| ours.1))
                .cell("SDK, runs/s", middle(&theirs, |theirs| theirs.0))
                .cell("Its processor a run, ms", middle(&theirs, |theirs| theirs.1))
                .cell("Ratio", format!("{}× ({} to {})", shown(median(&ratios)), shown(low), shown(high)))
                .cell("Ratio of processor time", format!("{}×", shown(median(&per_cpu))))
                .cell("Goal", "10×")
                .figures(json!({"cloister": ours, "sdk": theirs, "ratios": ratios})),
        );
    }
}

async fn platform(results: &Results, database: Database) -> Loop {
    let model = Model::start();
    let platform = Platform::start(database, &model).await;
    let look = json!({"webhook": {"name": "look", "description": "Looks.", "url": model.tool_url()}});
    let agent = agent_with(&platform.tenant.client, json!({"tools": [look], "maxTurns": 100})).await;
    let request = run_request(&platform.tenant.key, &agent, MESSAGE);
    let load = closed_loop(platform.address(), &request, CLIENTS, stretch(results), model.pid()).await;
    platform.check_log();
    (load.rate, load.cpu)
}

/// What `loop.py` tells.
#[derive(Deserialize)]
struct Told {
    runs: f64,
    seconds: f64,
    cpu_ms: f64,
}

fn sdk(results: &Results) -> Loop {
    let model = Model::start();
    let home = directory("article");
    let (warm_up, measured) = stretch(results);
    let output = Command::new(home.join(".venv/bin/python"))
        .args(["loop.py", MESSAGE, &CLIENTS.to_string()])
        .args([warm_up, measured].map(|time| time.as_secs_f64().to_string()))
        .env("OPENAI_BASE_URL", model.url())
        .current_dir(&home)
        .stdin(Stdio::null())
        .output()
        .expect("the peer is installed: run `make bench`");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let told: Told = serde_json::from_slice(&output.stdout).expect("what loop.py prints");
    assert!(told.runs > 0.0, "the SDK has ended no run");
    (told.runs / told.seconds, told.cpu_ms / told.runs)
}

/// Warm-up and measured time.
fn stretch(results: &Results) -> (Duration, Duration) {
    (Duration::from_secs(2), Duration::from_secs(results.pick(10, 5)))
}
