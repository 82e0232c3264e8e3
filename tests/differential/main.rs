//! Cloister beside the OpenAI Agents SDK: the same agents, the same scripted model, the same tools; the same requests
//! on the wire and the same result. A test is a scenario over one of the provider's APIs, or a random one by its seed.
//! See README.md.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod compare;
mod ours;
mod scenario;
mod script;
mod sdk;
mod theatre;

use libtest_mimic::{Arguments, Trial};

use crate::theatre::Theatre;

fn main() {
    let arguments = Arguments::from_args();
    let mut trials = Vec::new();
    for (name, scenario) in scenario::all() {
        for api in scenario.apis() {
            let scenario = scenario.clone();
            let play = move || Theatre::current().compare(&scenario, api).map_err(Into::into);
            trials.push(Trial::test(format!("scenarios::{name}::{}", api.name()), play));
        }
    }
    libtest_mimic::run(&arguments, trials).exit();
}
