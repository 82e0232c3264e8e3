//! A scenario's model and tools, as the servers of both sides play them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use cloister_tests::model_server::RecordedRequest;
use cloister_tests::tool_server::ToolRequest;
use cloister_tests::{ModelServer, Reply, ToolAnswer, ToolServer};
use serde_json::{Value, json};

use crate::scenario::{self, Answer, Answers, Scenario};

/// What one side asked of the model and of the tools.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Each request to the model: the number of the reply that it was given, if there was one for it, and its body.
    pub requests: Vec<(Option<usize>, Value)>,
    /// Tokens that the model charged.
    pub charged: u64,
    /// Each call of a webhook: the tool's name and the arguments.
    pub calls: Vec<(String, String)>,
}

/// Servers that play one scenario after another.
pub struct Servers {
    pub model: ModelServer,
    pub tools: ToolServer,
}

/// A scenario in play on [`Servers`].
#[derive(Default)]
pub struct Playing {
    /// The last request before it.
    after: u64,
    /// The replies that were taken, by the request's number.
    taken: Arc<Mutex<BTreeMap<u64, usize>>>,
    calls: Arc<Mutex<Vec<(String, String)>>>,
}

impl Servers {
    /// Starts them.
    pub async fn start() -> Servers {
        let servers = Servers { model: ModelServer::start().await, tools: ToolServer::start().await };
        servers.model.keep_last(1_000);
        servers
    }

    /// What was asked since a scenario began.
    pub fn asked(&self, playing: &Playing) -> Asked {
        let taken = playing.taken.lock().unwrap();
        let requests = self.model.requests().into_iter().filter(|request| request.number > playing.after);
        let requests: Vec<RecordedRequest> = requests.collect();
        Asked {
            charged: requests.iter().filter_map(|request| request.charged).map(|usage| usage.total()).sum(),
            requests: requests.into_iter().map(|it| (taken.get(&it.number).copied(), it.body)).collect(),
            calls: playing.calls.lock().unwrap().clone(),
        }
    }

    /// Begins a scenario.
    pub fn play(&self, scenario: &Scenario) -> Playing {
        let after = self.model.requests().last().map_or(0, |request| request.number);
        let playing = Playing { after, ..Playing::default() };
        let script = Mutex::new(Script::new(scenario));
        let taken = playing.taken.clone();
        self.model.always(move |request| match script.lock().unwrap().take(request) {
            Some((number, reply)) => {
                taken.lock().unwrap().insert(request.number, number);
                render(number, &reply)
            }
            None => Reply::status(400).error_message("The script has no reply for this."),
        });
        let answers = scenario.tools.clone();
        let count = Mutex::new(BTreeMap::<String, usize>::new());
        let calls = playing.calls.clone();
        self.tools.always(move |request| {
            let name = request.path[1..].to_owned();
            let arguments = String::from_utf8_lossy(&request.body).into_owned();
            let mut count = count.lock().unwrap();
            let at = count.entry(name.clone()).or_default();
            *at += 1;
            let answer = match answers.get(&name) {
                Some(Answers::Always(answer)) => answer.clone(),
                Some(Answers::InTurn(answers)) => answers.get(*at - 1).cloned().unwrap_or_default(),
                None => Answer::default(),
            };
            calls.lock().unwrap().push((name, arguments));
            answer_of(&answer, request)
        });
        playing
    }
}

struct Script {
    /// Instructions of every agent, as any of the runs has them.
    agents: Vec<(String, String)>,
    replies: Vec<Option<scenario::Reply>>,
}

impl Script {
    fn new(scenario: &Scenario) -> Script {
        let of_run = |run: &scenario::Run| -> Vec<(String, String)> {
            let filled_in = |key: &String| (key.clone(), scenario.instructions(key, &run.variables));
            scenario.agents.keys().map(filled_in).collect()
        };
        let replies = scenario.replies.iter().cloned().map(Some).collect();
        Script { agents: scenario.runs.iter().flat_map(of_run).collect(), replies }
    }

    /// The first unused reply that is for this request.
    fn take(&mut self, request: &RecordedRequest) -> Option<(usize, scenario::Reply)> {
        let instructions = instructions(request);
        let about = about(request);
        let is_it = |key: &str| self.agents.iter().any(|(agent, text)| agent == key && *text == instructions);
        let fits = |reply: &scenario::Reply| {
            reply.to.as_deref().is_none_or(is_it) && reply.about.as_ref().is_none_or(|text| *text == about)
        };
        let at = self.replies.iter().position(|reply| reply.as_ref().is_some_and(fits))?;
        self.replies[at].take().map(|reply| (at, reply))
    }
}

fn instructions(request: &RecordedRequest) -> String {
    let of_chat = request.messages().first().filter(|message| message["role"] == "system");
    let text = of_chat.map_or(&request.body["instructions"], |message| &message["content"]);
    text.as_str().unwrap_or_default().to_owned()
}

fn about(request: &RecordedRequest) -> String {
    let input = request.body["input"].as_array().map_or(&[][..], Vec::as_slice);
    let message = request.messages().iter().chain(input).rfind(|message| message["role"] == "user");
    let text = message.map_or(&request.body["input"], |message| &message["content"]);
    text.as_str().unwrap_or_default().to_owned()
}

/// What a reply costs: tokens of input and of output, for each another number.
fn charge(number: usize) -> (u64, u64) {
    (1_000 + 10 * number as u64, 100 + number as u64)
}

fn render(number: usize, reply: &scenario::Reply) -> Reply {
    if let Some(status) = reply.status {
        return Reply::status(status);
    }
    let (input, output) = charge(number);
    let mut made = match (&reply.text, &reply.refusal, &reply.hosted) {
        (Some(text), ..) => Reply::text(text),
        (None, Some(refusal), _) => Reply::refusal(refusal),
        (None, None, Some(kind)) => Reply::hosted_call(kind, hosted_fields(kind)),
        (None, None, None) => match &reply.calls[..] {
            [] => Reply::text(""),
            [call, ..] => Reply::tool_call_raw(&call.name, &call.text()).call_id(&call_id(number, 0, call)),
        },
    };
    if let (Some(_), Some(refusal)) = (&reply.text, &reply.refusal) {
        made = made.and_refusal(refusal);
    }
    if let (true, Some(kind)) = (reply.text.is_some() || reply.refusal.is_some(), &reply.hosted) {
        made = made.and_hosted_call(kind, hosted_fields(kind));
    }
    let is_begun = reply.text.is_some() || reply.refusal.is_some() || reply.hosted.is_some();
    for (at, call) in reply.calls.iter().enumerate().skip(usize::from(!is_begun)) {
        made = made.and_tool_call_raw(&call.name, &call.text()).call_id(&call_id(number, at, call));
    }
    if let Some(reasoning) = &reply.reasoning {
        made = made.reasoning(reasoning);
    }
    if let Some(content) = &reply.encrypted {
        made = made.encrypted_reasoning(content);
    }
    if let Some(finish) = &reply.finish {
        made = made.finish_reason(finish);
    }
    made.number(number as u64).usage(input, output).cached(reply.cached).reasoning_tokens(reply.reasoning_tokens)
}

fn call_id(number: usize, at: usize, call: &scenario::Call) -> String {
    call.id.clone().unwrap_or_else(|| format!("call_{number}_{at}"))
}

/// What a call has, beside its type, that the provider made itself.
fn hosted_fields(kind: &str) -> Value {
    match kind {
        "web_search_call" => json!({"action": {"type": "search", "query": "cloister", "queries": ["cloister"]}}),
        _ => json!({}),
    }
}

fn answer_of(answer: &Answer, request: &ToolRequest) -> ToolAnswer {
    let made = match (answer.status, &answer.text) {
        (Some(status), _) => ToolAnswer::status(status),
        (None, Some(text)) => ToolAnswer::text(text),
        (None, None) if answer.echo => ToolAnswer::text(format!("saw {}", String::from_utf8_lossy(&request.body))),
        (None, None) => ToolAnswer::text("ok"),
    };
    made.delay(answer.delay_ms)
}
