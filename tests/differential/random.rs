//! Random scenarios: agents that know each other, and a model that says whatever comes to its mind.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use proptest::{collection, option, sample};
use serde_json::{Map, Value, json};

use crate::scenario::{Agent, Answer, Answers, Api, Call, Decision, Reply, Run, Scenario};

/// Shrinking goes on no longer than this.
const SHRINKING: Duration = Duration::from_secs(60);

/// The agents' keys, and the names of some that need to be made fit for tools.
const AGENTS: [(&str, Option<&str>); 3] = [("ada", None), ("bob", Some("Böb 2")), ("eve", Some("EVE"))];

/// What the user and the model say.
const WORDS: [&str; 8] =
    ["Hi", "It is sunny.", "secret", "Grüße 🎉", "a \"b\" \\ c\nd", "{\"n\": 1}", "{\"n\": \"x\"}", " "];

const TOOLS: [&str; 3] = ["look", "add", "send"];

/// Plays the scenario of a seed with `compare`; where it fails, the smallest like it that fails too.
///
/// # Errors
/// What differs, and where the scenario is written to be kept.
pub fn play_seed(seed: u64, compare: impl Fn(&Scenario, Api) -> Result<(), String>) -> Result<(), String> {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    let mut tree = scenario().new_tree(&mut runner).expect("a scenario");
    let fails = |scenario: &Scenario| compare(scenario, scenario.apis()[0]).err();
    let mut smallest = tree.current();
    let Some(mut difference) = fails(&smallest) else { return Ok(()) };
    let begun = Instant::now();
    let mut is_changed = tree.simplify();
    while is_changed && begun.elapsed() < SHRINKING {
        let current = tree.current();
        is_changed = match fails(&current) {
            Some(found) => {
                (smallest, difference) = (current, found);
                tree.simplify()
            }
            None => tree.complicate(),
        };
    }
    smallest.about = format!("Found by seed {seed}.");
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("seed_{seed}.json"));
    let text = serde_json::to_string_pretty(&smallest).expect("JSON");
    fs::write(&path, format!("{text}\n")).expect("a writable directory");
    Err(format!("seed {seed}: {difference}\nTo keep it, move {} to tests/differential/scenarios/.", path.display()))
}

fn scenario() -> impl Strategy<Value = Scenario> {
    let api = prop_oneof![Just(Api::Chat), Just(Api::Responses)];
    let agents = (1..=AGENTS.len()).prop_flat_map(|count| {
        let of_agent = move |at: usize| agent(at, count);
        (0..count).map(of_agent).collect::<Vec<_>>()
    });
    let answers = collection::btree_map(sample::select(&TOOLS[..]).prop_map(str::to_owned), answer(), 0..=3);
    let runs = collection::vec(run(), 1..=3);
    (api, any::<bool>(), agents, collection::vec(reply(), 0..=9), answers, runs).prop_map(
        |(api, stream, agents, mut replies, tools, runs)| {
            // Whoever asks when nothing is left is answered, so that most runs come to an end of their own.
            replies.extend((0..5).map(|at| Reply { text: Some(format!("Done {at}.")), ..Reply::default() }));
            let keys = AGENTS.iter().map(|(key, _)| (*key).to_owned());
            let agents: BTreeMap<String, Agent> = keys.zip(agents).collect();
            Scenario {
                about: "Random.".to_owned(),
                api: Some(api),
                stream,
                retries: 0,
                concurrent: false,
                agents,
                start: AGENTS[0].0.to_owned(),
                replies,
                tools,
                runs,
            }
        },
    )
}

/// The agent of this place among so many.
fn agent(at: usize, count: usize) -> impl Strategy<Value = Agent> {
    let others: Vec<usize> = (0..count).filter(|other| *other != at).collect();
    let some_of = |most: usize| sample::subsequence(others.clone(), 0..=most.min(others.len()));
    let handoffs = some_of(2).prop_flat_map(|others| others.into_iter().map(handoff).collect::<Vec<_>>());
    let behaviour = prop_oneof![
        4 => Just((None, None)),
        1 => Just((Some("STOP_ON_FIRST_TOOL".to_owned()), None)),
        1 => Just((Some("STOP_AT_TOOLS".to_owned()), Some(vec!["look".to_owned()]))),
    ];
    let what_it_knows = (collection::vec(any::<[bool; 2]>(), TOOLS.len()), handoffs, some_of(1), guardrails());
    let others =
        (settings(), behaviour, option::weighted(0.3, 1_u32..=5), any::<bool>(), option::weighted(0.2, schema()));
    (what_it_knows, others).prop_map(move |((tools, handoffs, asked, guardrails), others)| {
        let (model_settings, (tool_use_behavior, stop_at_tools), max_turns, resets, output_schema) = others;
        let mut offered: Vec<Map<String, Value>> = Vec::new();
        for (name, [is_offered, needs_approval]) in TOOLS.iter().zip(tools) {
            // The tool that stops must be there.
            if is_offered || *name == "look" && stop_at_tools.is_some() {
                offered.push(webhook(name, needs_approval && *name == "send"));
            }
        }
        for other in asked {
            let (key, _) = AGENTS[other];
            let tool =
                json!({"agent": {"name": format!("ask_{key}"), "description": "Asks.", "agent": key, "maxTurns": 3}});
            offered.push(object(tool));
        }
        Agent {
            name: AGENTS[at].1.map(str::to_owned),
            model_settings,
            tools: offered,
            handoffs,
            guardrails,
            tool_use_behavior,
            stop_at_tools,
            max_turns,
            reset_tool_choice: (!resets).then_some(false),
            output_schema,
            ..Agent::default()
        }
    })
}

fn webhook(name: &str, needs_approval: bool) -> Map<String, Value> {
    let parameters = match name {
        "look" => json!({"type": "object", "properties": {}}),
        "add" => json!({
            "type": "object", "properties": {"n": {"type": "integer"}, "note": {"type": ["string", "null"]}},
            "required": ["n"],
        }),
        _ => json!({"type": "object", "properties": {"to": {"type": "string"}}, "required": ["to"]}),
    };
    let webhook = json!({
        "name": name, "description": format!("Does {name}."), "parameters": parameters, "needsApproval": needs_approval,
    });
    object(json!({"webhook": webhook}))
}

fn handoff(to: usize) -> impl Strategy<Value = Map<String, Value>> {
    let kinds = prop_oneof![
        3 => Just(json!({})),
        1 => Just(json!({"inputFilter": "REMOVE_TOOLS"})),
        1 => Just(json!({"nestHistory": true})),
    ];
    kinds.prop_map(move |mut handoff| {
        handoff["agent"] = json!(AGENTS[to].0);
        object(handoff)
    })
}

fn settings() -> impl Strategy<Value = Map<String, Value>> {
    let choice = option::weighted(0.3, sample::select(vec!["auto", "required", "none"]));
    let fields = (option::weighted(0.3, 0_u8..=4), choice, option::weighted(0.3, any::<bool>()));
    fields.prop_map(|(temperature, choice, parallel)| {
        let mut settings = Map::new();
        // Quarters are the same number to everyone.
        settings.extend(temperature.map(|quarters| ("temperature".to_owned(), json!(f64::from(quarters) / 4.0))));
        settings.extend(choice.map(|choice| ("toolChoice".to_owned(), json!(choice))));
        settings.extend(parallel.map(|parallel| ("parallelToolCalls".to_owned(), json!(parallel))));
        settings
    })
}

/// None that ends the run at a tool: what has begun beside the call then is the scheduler's to say.
fn guardrails() -> impl Strategy<Value = Vec<Map<String, Value>>> {
    let stage = prop_oneof![
        Just(json!({"stage": "INPUT"})),
        Just(json!({"stage": "OUTPUT"})),
        Just(json!({"stage": "TOOL_INPUT", "message": "Not so."})),
        Just(json!({"stage": "TOOL_OUTPUT", "message": "Withheld."})),
    ];
    let rule = prop_oneof![
        Just(json!({"regex": {"pattern": "secret"}})),
        Just(json!({"regex": {"pattern": ".", "tripOnMatch": false}})),
        Just(json!({"maxLength": 12})),
    ];
    let guardrail = (stage, rule).prop_map(|(mut guardrail, rule)| {
        guardrail["rule"] = rule;
        object(guardrail)
    });
    let named = |guardrails: Vec<Map<String, Value>>| {
        let mut seen = Vec::new();
        // Of several at a stage that trip at once, which one is told is the scheduler's to say.
        let first_of_stage = |guardrail: &Map<String, Value>| {
            let is_new = !seen.contains(&guardrail["stage"]);
            seen.push(guardrail["stage"].clone());
            is_new
        };
        let mut kept: Vec<Map<String, Value>> = guardrails.into_iter().filter(first_of_stage).collect();
        for (at, guardrail) in kept.iter_mut().enumerate() {
            guardrail.insert("name".to_owned(), json!(format!("guard_{at}")));
        }
        kept
    };
    prop_oneof![3 => Just(Vec::new()), 1 => collection::vec(guardrail, 1..=2)].prop_map(named)
}

fn schema() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(json!({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]})),
        Just(json!({"type": "array", "items": {"type": "integer"}})),
    ]
}

fn word() -> impl Strategy<Value = String> {
    sample::select(&WORDS[..]).prop_map(str::to_owned)
}

fn reply() -> impl Strategy<Value = Reply> {
    let said = (option::weighted(0.6, word()), option::weighted(0.05, word()), option::weighted(0.2, word()));
    let counted = (0_u64..=2, 0_u64..=2);
    let calls = prop_oneof![1 => Just(Vec::new()), 2 => collection::vec(call(), 1..=3)];
    (said, calls, counted).prop_map(|((text, refusal, reasoning), mut calls, (cached, reasoning_tokens))| {
        // Agents that run at the same time would ask for replies in any order.
        let mut asks = calls.iter().filter(|call: &&Call| call.name.starts_with("ask_")).map(|call| call.name.clone());
        if let Some(first) = asks.next() {
            let mut is_there = false;
            calls.retain(|call| {
                !call.name.starts_with("ask_") || call.name == first && !std::mem::replace(&mut is_there, true)
            });
        }
        Reply { text, refusal, reasoning, calls, cached: cached * 8, reasoning_tokens, ..Reply::default() }
    })
}

fn call() -> impl Strategy<Value = Call> {
    let names = &["look", "add", "send", "nope", "ask_ada", "ask_bob", "ask_eve"];
    let handoffs = &["transfer_to_ada", "transfer_to_b_b_2", "transfer_to_eve"];
    let name = prop_oneof![3 => sample::select(&names[..]), 1 => sample::select(&handoffs[..])];
    (name, 0_u8..8, word()).prop_map(|(name, kind, word)| {
        let fitting = match name {
            "add" => json!({"n": 1, "note": word}),
            "send" => json!({"to": word}),
            "look" | "nope" => json!({}),
            name if name.starts_with("ask_") => json!({"input": word}),
            _ => json!({}),
        };
        let arguments = match kind {
            0 => json!("{\"n\": "),
            1 => json!(""),
            2 => json!("[1]"),
            3 => json!({"n": "x", "to": 1, "input": null}),
            _ => fitting,
        };
        Call { name: name.to_owned(), arguments, id: None }
    })
}

fn answer() -> impl Strategy<Value = Answers> {
    let answer = prop_oneof![
        3 => word().prop_map(|text| Answer { text: Some(text), ..Answer::default() }),
        2 => Just(Answer { echo: true, ..Answer::default() }),
        1 => Just(Answer { status: Some(500), ..Answer::default() }),
    ];
    answer.prop_map(Answers::Always)
}

fn run() -> impl Strategy<Value = Run> {
    let message = option::weighted(0.3, word());
    let decision = (any::<bool>(), prop::bool::weighted(0.2), message).prop_map(|(approve, always, message)| {
        let message = message.filter(|_| !approve);
        Decision { call: String::new(), approve, always, message }
    });
    let decisions = collection::vec(decision, 1..=3);
    // An empty input is refused.
    let input = word().prop_filter("blank", |word| !word.trim().is_empty());
    (input, decisions).prop_map(|(input, decide_in_turn)| Run { input, decide_in_turn, ..Run::default() })
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(object) => object,
        other => unreachable!("no object: {other}"),
    }
}
