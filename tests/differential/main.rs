//! Cloister beside the OpenAI Agents SDK: the same agents, the same scripted model, the same tools; the same requests
//! on the wire and the same result. A test is a scenario over one of the provider's APIs, or a random one by its seed.
//! See README.md.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod compare;
mod ours;
mod random;
mod scenario;
mod script;
mod sdk;
mod theatre;

use libtest_mimic::{Arguments, Trial};

use crate::theatre::Theatre;

fn main() {
    let mut arguments = Arguments::from_args();
    // A test waits more than it works.
    arguments.test_threads.get_or_insert(theatre::STAGES);
    let mut trials = Vec::new();
    for (name, scenario) in scenario::all() {
        for api in scenario.apis() {
            let scenario = scenario.clone();
            let play = move || Theatre::current().compare(&scenario, api).map_err(Into::into);
            trials.push(Trial::test(format!("scenarios::{name}::{}", api.name()), play));
        }
    }
    let number = |name: &str, default: u64| {
        let value = std::env::var(name).ok().filter(|value| !value.is_empty());
        value
            .map_or(default, |value| value.parse().unwrap_or_else(|_| panic!("{name} must be a number, not {value:?}")))
    };
    let first = number("FIRST", 1);
    for seed in first..first + number("SEEDS", 50) {
        let compare = |scenario: &_, api| Theatre::current().compare(scenario, api);
        let play = move || random::play_seed(seed, compare).map_err(Into::into);
        trials.push(Trial::test(format!("seeds::{seed}"), play));
    }
    libtest_mimic::run(&arguments, trials).exit();
}
