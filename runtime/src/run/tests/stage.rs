//! A run with all around it: a scripted model, a journal in memory, endpoints on this machine.

use std::collections::VecDeque;
use std::sync::Mutex;

use async_trait::async_trait;
use chrono::DateTime;
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::time::sleep;
use uuid::Uuid;

use super::super::*;
use crate::item::{Role, RunError, RunStatus, TokenUsage};
use crate::journal::Progress;
use crate::model::{Finish, ModelCall, ModelError, ModelEvent, ModelRequest, ModelResponse, Part};
use crate::spec::{AgentSpec, Handoff, HandoffFilter, Lease, ModelSettings, Tool, ToolUseBehavior, WebhookTool};
use crate::webhook::AddressPolicy;

pub type Script = Vec<Result<ModelEvent, ModelError>>;

/// Plays one script a call; out of scripts, it never answers.
#[derive(Default)]
pub struct ScriptedModel {
    pub scripts: Mutex<VecDeque<Script>>,
    pub requests: Mutex<Vec<ModelRequest>>,
}

impl Model for ScriptedModel {
    fn respond(&self, call: ModelCall) -> BoxStream<'static, Result<ModelEvent, ModelError>> {
        self.requests.lock().unwrap().push(call.request);
        match self.scripts.lock().unwrap().pop_front() {
            Some(script) => stream::iter(script).boxed(),
            None => stream::pending().boxed(),
        }
    }
}

#[derive(Default)]
pub struct MemoryJournal {
    pub items: Mutex<Vec<Item>>,
    pub appends: Mutex<Vec<usize>>,
    pub progress: Mutex<Vec<Progress>>,
    pub refusals: Mutex<Vec<JournalError>>,
}

#[async_trait]
impl Journal for MemoryJournal {
    async fn append(&self, _: Lease, from_sequence: i64, steps: Vec<Step>) -> Result<(), JournalError> {
        if let Some(refusal) = self.refusals.lock().unwrap().pop() {
            return Err(refusal);
        }
        let mut items = self.items.lock().unwrap();
        assert_eq!(from_sequence, items.len() as i64 + 1);
        self.appends.lock().unwrap().push(steps.len());
        for step in steps {
            let sequence = items.len() as i64 + 1;
            items.push(Item { sequence, created_at: DateTime::UNIX_EPOCH, step });
        }
        Ok(())
    }

    async fn progress(&self, _: Lease, progress: Progress) {
        self.progress.lock().unwrap().push(progress);
    }
}

/// A run with all around it.
pub struct Stage {
    pub model: Arc<ScriptedModel>,
    pub journal: Arc<MemoryJournal>,
    pub stop: Stop,
    pub spec: RunSpec,
    pub fence: i64,
    pub time_left_ms: u64,
}

impl Stage {
    /// The first of `agents` is the root.
    pub fn new(agents: Vec<AgentSpec>) -> Self {
        let stage = Stage {
            model: Arc::default(),
            journal: Arc::default(),
            stop: Stop::default(),
            spec: RunSpec {
                run_id: Uuid::nil(),
                root: agents[0].id,
                agents: Arc::new(agents.into_iter().map(|agent| (agent.id, Arc::new(agent))).collect()),
                input: "Hi".into(),
            },
            fence: 1,
            time_left_ms: 60_000,
        };
        stage.store(None, Body::Message { index: None, role: Role::User, text: "Hi".into(), raw: None });
        stage
    }

    /// The model's next response.
    pub fn responds(self, parts: Vec<Part>) -> Self {
        self.plays(vec![Ok(done(parts, Finish::Stop))])
    }

    pub fn plays(self, script: Script) -> Self {
        self.model.scripts.lock().unwrap().push_back(script);
        self
    }

    pub fn store(&self, turn: Option<u32>, body: Body) {
        let mut items = self.journal.items.lock().unwrap();
        let sequence = items.len() as i64 + 1;
        let step = Step { agent_name: "A".into(), turn, scope: None, body };
        items.push(Item { sequence, created_at: DateTime::UNIX_EPOCH, step });
    }

    pub fn claim(&self) -> Claim {
        Claim {
            lease: Lease { run_id: self.spec.run_id, fence: self.fence },
            spec: self.spec.clone(),
            history: vec![InputItem::Assistant { text: "Earlier".into(), raw: None }],
            items: self.journal.items.lock().unwrap().clone(),
            time_left_ms: self.time_left_ms,
            webhook_secrets: vec![],
        }
    }

    pub async fn run(&self) -> Outcome {
        self.run_claim(self.claim()).await
    }

    pub async fn run_claim(&self, claim: Claim) -> Outcome {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let policy = AddressPolicy { allowed_hosts: vec!["127.0.0.1".into()], ..Default::default() };
        let ports = Ports {
            model: self.model.clone(),
            journal: self.journal.clone(),
            webhooks: WebhookClient::new(policy).unwrap(),
            mcp: McpClient::new(AddressPolicy::default()).unwrap(),
        };
        let stop = self.stop.clone();
        // In a task, as workers do it.
        tokio::spawn(async move { run(claim, &ports, &stop).await }).await.unwrap()
    }

    pub fn bodies(&self) -> Vec<Body> {
        self.journal.items.lock().unwrap().iter().map(|item| item.step.body.clone()).collect()
    }

    /// Call ids and outputs, as they were stored.
    pub fn outputs(&self) -> Vec<(String, String)> {
        let output = |body| match body {
            Body::ToolOutput { call_id, output, .. } | Body::Handoff { call_id, output, .. } => Some((call_id, output)),
            _ => None,
        };
        self.bodies().into_iter().filter_map(output).collect()
    }

    pub fn end(&self) -> (RunStatus, Option<RunErrorCode>, Option<String>) {
        match self.bodies().pop() {
            Some(Body::Status { status, error, output, .. }) => {
                (status, error.map(|RunError { code, .. }| code), output)
            }
            other => panic!("ends with {other:?}"),
        }
    }

    pub fn assert_succeeded(&self, output: &str) {
        assert_eq!(self.end(), (RunStatus::Succeeded, None, Some(output.to_owned())));
    }

    pub fn assert_failed(&self, code: RunErrorCode) {
        assert_eq!(self.end(), (RunStatus::Failed, Some(code), None));
    }

    pub fn request(&self, index: usize) -> ModelRequest {
        self.model.requests.lock().unwrap()[index].clone()
    }

    pub fn request_count(&self) -> usize {
        self.model.requests.lock().unwrap().len()
    }

    /// The outputs that a request shows, by call id.
    pub fn shown(&self, request: usize) -> Vec<String> {
        let call_id = |item| match item {
            InputItem::ToolOutput { call_id, .. } => Some(call_id),
            _ => None,
        };
        self.request(request).input.into_iter().filter_map(call_id).collect()
    }
}

pub fn agent(name: &str) -> AgentSpec {
    AgentSpec {
        id: id_of(name),
        version: Some(1),
        name: name.into(),
        model: "m".into(),
        instructions: format!("You are {name}."),
        settings: ModelSettings::default(),
        tools: vec![],
        handoffs: vec![],
        tool_use_behavior: ToolUseBehavior::RunLlmAgain,
        stop_at_tools: vec![],
        max_turns: 10,
        reset_tool_choice: true,
        max_tool_concurrency: 8,
        fallback_models: vec![],
        guardrails: vec![],
        output: None,
    }
}

/// An agent's id follows from its name.
pub fn id_of(name: &str) -> Uuid {
    Uuid::from_u128(name.bytes().fold(0, |sum, byte| sum * 256 + u128::from(byte)))
}

pub fn with_handoffs(mut agent: AgentSpec, to: &[&str]) -> AgentSpec {
    agent.handoffs = to
        .iter()
        .map(|name| Handoff {
            agent_id: id_of(name),
            tool_name: Handoff::default_tool_name(name),
            tool_description: Handoff::default_tool_description(name, ""),
            filter: HandoffFilter::None,
            nest_history: false,
        })
        .collect();
    agent
}

pub fn with_tools(mut agent: AgentSpec, tools: Vec<WebhookTool>) -> AgentSpec {
    agent.tools = tools.into_iter().map(Tool::Webhook).collect();
    agent
}

pub fn tool(name: &str, url: &str) -> WebhookTool {
    WebhookTool {
        name: name.into(),
        description: String::new(),
        parameters: json!({ "type": "object" }),
        url: url.into(),
        token: None,
        timeout_ms: 5_000,
        needs_approval: false,
    }
}

pub fn text(text: &str) -> Part {
    Part::Message { index: 1, text: text.into(), raw: None }
}

pub fn call(index: u32, name: &str) -> Part {
    Part::ToolCall { index, call_id: format!("{name}{index}"), name: name.into(), arguments: String::new(), raw: None }
}

pub fn done(parts: Vec<Part>, finish: Finish) -> ModelEvent {
    ModelEvent::Done {
        response: ModelResponse { model: "m".into(), parts, finish, usage: TokenUsage::default() },
        journaled: false,
    }
}

/// Answers every POST with `output`, after `delay`, and remembers the idempotency keys.
pub async fn endpoint(output: &'static str, delay: Duration) -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let keys = Arc::new(Mutex::new(Vec::new()));
    let seen = keys.clone();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let seen = seen.clone();
            tokio::spawn(async move {
                let mut request = Vec::new();
                while !request.ends_with(b"}") {
                    let mut buffer = [0; 1024];
                    let read = socket.read(&mut buffer).await.unwrap();
                    request.extend_from_slice(&buffer[..read]);
                }
                let request = String::from_utf8(request).unwrap();
                let key = request.lines().find_map(|line| line.strip_prefix("idempotency-key: ")).unwrap();
                seen.lock().unwrap().push(key.to_owned());
                sleep(delay).await;
                let answer =
                    format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{output}", output.len());
                let _ = socket.write_all(answer.as_bytes()).await;
            });
        }
    });
    (url, keys)
}
