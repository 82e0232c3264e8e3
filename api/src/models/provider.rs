//! Providers: one model call, sent once, and its answer as it arrives.
//!
//! A provider neither retries nor counts: whoever calls it decides what an error is worth and what an
//! answer costs. Hence the errors tell what matters for that: whether the call can have been charged.

mod assembly;
mod attempt;
mod chunk;
mod events;
mod http;
mod output;
mod redact;

use std::time::Duration;

use cloister_runtime::item::{RunErrorCode, TokenUsage};
use cloister_runtime::model::{Finish, ModelRequest, Part};
use futures_util::stream::BoxStream;

pub use self::http::{HttpProvider, HttpProviderConfig, HttpProviderError};
use super::demo::DemoProvider;
use crate::config::ProviderApi;

/// One configured provider.
pub enum Provider {
    /// A server that speaks OpenAI's API.
    Http(HttpProvider),
    /// The built-in model for trying things out.
    Demo(DemoProvider),
}

impl Provider {
    /// Sends one request, once, and waits until the answer begins.
    pub async fn send(
        &self,
        api: ProviderApi,
        upstream_model: &str,
        request: &ModelRequest,
    ) -> Result<Answer, SendError> {
        match self {
            Provider::Http(provider) => provider.send(api, upstream_model, request).await,
            Provider::Demo(provider) => Ok(provider.answer(request)),
        }
    }
}

/// An answer with a 2xx status, still arriving. Dropping it hangs up on the provider.
pub struct Answer {
    /// Ends with [`AnswerEvent::Complete`] or with a [`Cut`].
    pub events: BoxStream<'static, Result<AnswerEvent, Cut>>,
}

/// What arrives of an answer. Reasoning and refusals have no events of their own: they are in the
/// [`Completion`].
#[derive(Clone, Debug, PartialEq)]
pub enum AnswerEvent {
    /// More of the message.
    Text {
        /// The part it belongs to.
        index: u32,
        /// The new text.
        text: String,
    },
    /// More of a call's arguments.
    Arguments {
        /// The part it belongs to.
        index: u32,
        /// The provider's id of the call; may be empty or repeated.
        call_id: String,
        /// The tool's name.
        name: String,
        /// The new text.
        text: String,
    },
    /// The whole answer; nothing follows.
    Complete(Completion),
}

/// A complete answer: the provider said why it stopped.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// By index. Over Chat Completions that is in the order reasoning, message, refusal, calls; empty parts are left out.
    pub parts: Vec<Part>,
    /// Why the model stopped.
    pub finish: Finish,
    /// What the provider counted, unpriced; none if it sent no usage.
    pub usage: Option<TokenUsage>,
}

/// An answer that ended early, or that can't be used.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{reason}")]
pub struct Cut {
    /// As what the run ends.
    pub code: RunErrorCode,
    /// For people; holds nothing of the provider's credentials.
    pub reason: String,
    /// What had arrived.
    pub partial: Vec<Part>,
    /// What the provider had counted, if it said so before the cut.
    pub usage: Option<TokenUsage>,
}

impl Cut {
    /// An answer that broke off.
    pub fn broken(reason: impl std::fmt::Display, partial: Vec<Part>) -> Self {
        let reason = format!("The model's answer was cut off: {reason}");
        Cut { code: RunErrorCode::ModelUnavailable, reason, partial, usage: None }
    }
}

/// Why no answer began. Messages hold nothing of the provider's credentials.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SendError {
    /// Nothing was charged, and trying again may help: there was no connection, or the status was
    /// 408, 409, 425, 429 or 5xx.
    #[error("{message}")]
    Retryable {
        /// For people.
        message: String,
        /// How long the provider asks to be left alone.
        retry_after: Option<Duration>,
    },
    /// The provider refuses this request: any other status that is no success.
    #[error("{message}")]
    Rejected {
        /// The HTTP status.
        status: u16,
        /// The provider's reason, shortened; may be shown to the tenant.
        message: String,
    },
    /// Nothing was sent: the request has what the provider's API has no words for.
    #[error("{message}")]
    Unfit {
        /// For people.
        message: String,
    },
    /// The request went out and no status came back: it may have been charged.
    #[error("{message}")]
    Unknown {
        /// For people.
        message: String,
    },
}
