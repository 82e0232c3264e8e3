//! What the operator remembers of each tenant between two looks. All of it may be lost: it saves questions, and is found
//! again from the object and the api.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crds::protocol::{Provisioning, State};

use crate::api::ApiError;
use crate::scaling::Window;

/// What the api told within this long of a new token may be older than it.
const FRESH: Duration = Duration::from_secs(5);

/// What is remembered of all tenants, by their objects' names.
#[derive(Default)]
pub struct Memory(Mutex<HashMap<String, Entry>>);

/// What is remembered of a tenant.
#[derive(Default)]
pub struct Entry {
    /// The UID of the object that this is of; empty before it was looked at.
    uid: String,
    /// What holds, as the api last told.
    pub state: Option<State>,
    /// The generation of the spec that the api knows.
    pub acknowledged: Option<i64>,
    /// A generation that the api refused, why, and when.
    pub refused: Option<(i64, ApiError, Instant)>,
    /// What the api was last told of the cluster's side.
    pub reported: Option<Provisioning>,
    /// When the status' usage was last written.
    pub usage_written: Option<Instant>,
    /// How many workers were recommended lately.
    pub window: Window,
    /// The last rotation of the workers' token that was asked for.
    pub rotation: i64,
    /// When that was answered.
    pub rotated: Option<Instant>,
    /// The last rotation that works, as the api told.
    pub working_rotation: Option<i64>,
    /// Kinds that the cluster makes something else of as they are written, and when that was last seen.
    pub contested: HashMap<&'static str, Instant>,
    /// Looks that failed, one after the other.
    pub failures: u32,
}

impl Memory {
    /// Begins a look at the object with this UID. Another object by the same name is another story.
    pub fn meet(&self, name: &str, uid: &str) {
        self.with(name, |entry| {
            if entry.uid != uid {
                // What the api told of it before it was first looked at is of it.
                let state = entry.state.take().filter(|_| entry.uid.is_empty());
                *entry = Entry { uid: uid.to_owned(), state, ..Entry::default() };
            }
        });
    }

    /// Takes in what the api tells; whether that is news.
    pub fn told(&self, name: &str, mut state: State) -> bool {
        self.with(name, |entry| {
            let told = state.rotation.take().filter(|_| entry.rotated.is_none_or(|at| at.elapsed() > FRESH));
            let known = entry.working_rotation;
            entry.working_rotation = told.or(known);
            // That a newer one works is none: this operator made it.
            let is_lost = told.zip(known).is_some_and(|(told, known)| told < known);
            entry.state.replace(state.clone()) != Some(state) || is_lost
        })
    }

    /// The api doesn't know the object, or doesn't any more: it is to be told all.
    pub fn is_unknown(&self, name: &str) {
        self.with(name, |entry| {
            (entry.state, entry.acknowledged, entry.reported) = (None, None, None);
        });
    }

    /// Looks at, or changes, what is remembered of a tenant.
    pub fn with<R>(&self, name: &str, look: impl FnOnce(&mut Entry) -> R) -> R {
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        look(entries.entry(name.to_owned()).or_default())
    }

    /// Forgets a tenant.
    pub fn forget(&self, name: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
    }

    /// Tenants whose last look failed.
    pub fn failing(&self) -> usize {
        let entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        entries.values().filter(|entry| entry.failures > 0).count()
    }

    /// The usage of every tenant, as the api last told: name, tokens, limit.
    pub fn usage(&self) -> Vec<(String, i64, i64)> {
        let entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let usage = |(name, entry): (&String, &Entry)| {
            entry.state.as_ref().map(|state| (name.clone(), state.usage.tokens, state.usage.limit))
        };
        entries.iter().filter_map(usage).collect()
    }
}

#[cfg(test)]
mod tests {
    use crds::protocol::{Runs, Usage};

    use super::*;

    fn state(rotation: Option<i64>) -> State {
        State {
            tenant_id: "ten_1".to_owned(),
            plan: "enterprise".to_owned(),
            suspended: None,
            usage: Usage { period: "2026-11".to_owned(), tokens: 0, limit: 10 },
            runs: Runs::default(),
            is_dedicated: None,
            generation: None,
            rotation,
        }
    }

    #[test]
    fn a_rotation_is_news_when_it_is_lost() {
        let memory = Memory::default();
        let working = || memory.with("acme", |entry| entry.working_rotation);
        assert!(memory.told("acme", state(Some(7))), "the first word is news");
        assert!(!memory.told("acme", state(Some(8))) && working() == Some(8));
        assert!(!memory.told("acme", state(None)) && working() == Some(8), "an api that doesn't tell");
        assert!(memory.told("acme", state(Some(0))) && working() == Some(0));
        assert!(!memory.told("acme", state(Some(0))), "it is known");
        // What was on its way while a token was made is older than it.
        memory.with("acme", |entry| (entry.rotated, entry.working_rotation) = (Some(Instant::now()), Some(9)));
        assert!(!memory.told("acme", state(Some(0))) && working() == Some(9));
    }

    #[test]
    fn what_the_api_forgot_is_told_again() {
        let memory = Memory::default();
        memory.told("acme", state(Some(7)));
        memory.with("acme", |entry| entry.acknowledged = Some(3));
        memory.is_unknown("acme");
        assert!(memory.with("acme", |entry| entry.state.is_none() && entry.acknowledged.is_none()));
    }
}
