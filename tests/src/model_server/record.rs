//! What the server remembers: each request, what was charged for it, and how it ended.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use axum::http::HeaderMap;
use serde::Serialize;
use serde_json::Value;
use tokio::sync::watch;

use crate::PATIENCE;

/// A model request as it came.
#[derive(Clone, Debug)]
pub struct RecordedRequest {
    /// Its place among all model requests, from 1.
    pub number: u64,
    /// The API it came over.
    pub api: Api,
    /// The HTTP headers.
    pub headers: HeaderMap,
    /// The JSON body; null if it was none.
    pub body: Value,
    /// What it was charged; none unless it was answered with 2xx.
    pub charged: Option<Usage>,
    /// How it ended, if it has.
    pub ending: Ending,
}

/// The two APIs a model can be asked over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Api {
    /// `POST /v1/chat/completions`
    ChatCompletions,
    /// `POST /v1/responses`
    Responses,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It has not ended.
    Open,
    /// The last byte of the answer was handed over, an error's included.
    Completed,
    /// The script cut the connection.
    Cut,
    /// The client went away before the last byte.
    ClientGone,
}

/// Tokens of one call, in OpenAI's words: cached tokens are part of the prompt's, reasoning tokens
/// part of the completion's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// All tokens of the input.
    pub prompt_tokens: u64,
    /// All tokens of the output.
    pub completion_tokens: u64,
    /// The part of the input that was read from the cache.
    pub cached_tokens: u64,
    /// The part of the output that was spent on reasoning.
    pub reasoning_tokens: u64,
}

impl Usage {
    /// Input and output.
    pub fn total(&self) -> u64 {
        self.prompt_tokens + self.completion_tokens
    }
}

/// Everything that was charged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Served {
    /// Calls that were charged.
    pub requests: u64,
    /// Tokens of their inputs.
    pub prompt_tokens: u64,
    /// Tokens of their outputs.
    pub completion_tokens: u64,
    /// Both.
    pub total: u64,
}

impl RecordedRequest {
    /// A header's value, if it is there and text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// The model asked for.
    pub fn model(&self) -> &str {
        self.body["model"].as_str().unwrap_or_default()
    }

    /// The messages of a chat request, oldest first.
    pub fn messages(&self) -> &[Value] {
        self.body["messages"].as_array().map_or(&[], Vec::as_slice)
    }

    /// The input items of a request over the Responses API, oldest first; none if its input is a string.
    pub fn input(&self) -> &[Value] {
        self.body["input"].as_array().map_or(&[], Vec::as_slice)
    }

    /// The functions on offer, by name.
    pub fn tool_names(&self) -> Vec<&str> {
        let tools = self.body["tools"].as_array().map_or(&[][..], Vec::as_slice);
        let functions = tools.iter().map(|tool| match self.api {
            Api::ChatCompletions => &tool["function"],
            Api::Responses => tool,
        });
        functions.filter_map(|function| function["name"].as_str()).collect()
    }

    /// The text of the user's last message.
    pub fn last_user_text(&self) -> String {
        let messages = match self.api {
            Api::ChatCompletions => self.messages(),
            Api::Responses => self.input(),
        };
        let message = messages.iter().rfind(|message| message["role"] == "user");
        match message.map(|message| &message["content"]) {
            Some(Value::String(text)) => text.clone(),
            Some(Value::Array(parts)) => parts.iter().filter_map(|part| part["text"].as_str()).collect(),
            _ => self.body["input"].as_str().unwrap_or_default().to_owned(),
        }
    }

    /// Whether the answer is to be streamed.
    pub fn is_stream(&self) -> bool {
        self.body["stream"] == true
    }

    /// Whether a streamed answer is to end with its usage.
    pub fn includes_usage(&self) -> bool {
        self.body["stream_options"]["include_usage"] == true
    }

    /// The most output tokens asked for, under any of the names it has.
    pub fn max_tokens(&self) -> Option<u64> {
        ["max_output_tokens", "max_completion_tokens", "max_tokens"].iter().find_map(|name| self.body[*name].as_u64())
    }
}

/// All requests and the counters.
pub(super) struct Book {
    pages: Mutex<Pages>,
    changed: watch::Sender<()>,
}

struct Pages {
    requests: BTreeMap<u64, RecordedRequest>,
    served: Served,
    last_number: u64,
    keep: usize,
}

impl Default for Book {
    fn default() -> Self {
        let pages = Pages { requests: BTreeMap::new(), served: Served::default(), last_number: 0, keep: usize::MAX };
        Book { pages: Mutex::new(pages), changed: watch::Sender::new(()) }
    }
}

impl Book {
    /// Writes down a request. Dropping its ticket says that the client went away.
    pub(super) fn open(self: &Arc<Self>, api: Api, headers: HeaderMap, body: Value) -> (RecordedRequest, Ticket) {
        let mut pages = self.pages();
        pages.last_number += 1;
        let number = pages.last_number;
        let request = RecordedRequest { number, api, headers, body, charged: None, ending: Ending::Open };
        pages.requests.insert(number, request.clone());
        if pages.requests.len() > pages.keep {
            pages.requests.pop_first();
        }
        drop(pages);
        self.changed.send_replace(());
        (request, Ticket { book: self.clone(), number, open: true })
    }

    pub(super) fn served(&self) -> Served {
        self.pages().served
    }

    pub(super) fn requests(&self) -> Vec<RecordedRequest> {
        self.pages().requests.values().cloned().collect()
    }

    pub(super) fn keep_last(&self, count: usize) {
        self.pages().keep = count;
    }

    pub(super) async fn wait_for(
        &self,
        what: &str,
        condition: impl Fn(&[RecordedRequest]) -> bool,
    ) -> Vec<RecordedRequest> {
        let mut changed = self.changed.subscribe();
        let satisfied = async {
            loop {
                changed.borrow_and_update();
                let requests = self.requests();
                if condition(&requests) {
                    return requests;
                }
                let _ = changed.changed().await;
            }
        };
        match tokio::time::timeout(PATIENCE, satisfied).await {
            Ok(requests) => requests,
            Err(_) => {
                let endings: Vec<Ending> = self.requests().iter().map(|request| request.ending).collect();
                panic!("the model server waited in vain for {what}; it has {} requests: {endings:?}", endings.len());
            }
        }
    }

    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap()
    }

    fn change(&self, number: u64, change: impl FnOnce(&mut RecordedRequest)) {
        if let Some(request) = self.pages().requests.get_mut(&number) {
            change(request);
        }
        self.changed.send_replace(());
    }
}

/// The right to say what becomes of a request.
pub(super) struct Ticket {
    book: Arc<Book>,
    number: u64,
    open: bool,
}

impl Ticket {
    /// Charges the call.
    pub(super) fn charge(&mut self, usage: Usage) {
        let mut pages = self.book.pages();
        pages.served.requests += 1;
        pages.served.prompt_tokens += usage.prompt_tokens;
        pages.served.completion_tokens += usage.completion_tokens;
        pages.served.total += usage.total();
        drop(pages);
        self.book.change(self.number, |request| request.charged = Some(usage));
    }

    /// Ends the request, once; what is said later has no effect.
    pub(super) fn end(&mut self, ending: Ending) {
        if std::mem::take(&mut self.open) {
            self.book.change(self.number, |request| request.ending = ending);
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.end(Ending::ClientGone);
    }
}
