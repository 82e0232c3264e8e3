//! Checking input: every problem of a request at once, each naming its field.

use async_graphql::MaybeUndefined;

use crate::error::{Refusal, UserError, UserErrorCode};

/// The longest monthly limit that may be set: far beyond any use, far below an overflow.
pub const MAX_TOKEN_LIMIT: i64 = 1_000_000_000_000_000;

/// A field of an update: left out it stays, null clears it.
pub type Patch<T> = MaybeUndefined<T>;

/// `into_option` of a [`Patch`]: none when left out, `Some(None)` when cleared.
pub trait PatchExt<T> {
    /// What the field becomes, if it changes.
    fn into_option(self) -> Option<Option<T>>;
}

impl<T> PatchExt<T> for Patch<T> {
    fn into_option(self) -> Option<Option<T>> {
        match self {
            MaybeUndefined::Undefined => None,
            MaybeUndefined::Null => Some(None),
            MaybeUndefined::Value(value) => Some(Some(value)),
        }
    }
}

/// The problems found so far.
#[derive(Debug, Default)]
pub struct Checks(Vec<UserError>);

impl Checks {
    /// Adds a problem.
    pub fn push(&mut self, error: UserError) {
        self.0.push(error);
    }

    /// Whether something was found.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Refuses if something was found.
    pub fn finish(self) -> Result<(), Refusal> {
        if self.0.is_empty() { Ok(()) } else { Err(Refusal::User(self.0)) }
    }

    /// A text's length in characters. A text of blanks counts as empty; the NUL character, which
    /// PostgreSQL can't store, is refused.
    pub fn text(&mut self, field: &str, value: &str, min: usize, max: usize) {
        let length = value.chars().count();
        if min > 0 && value.trim().is_empty() {
            self.push(UserError::invalid(field, "This must not be empty."));
        } else if length < min || length > max {
            self.push(UserError::invalid(field, format!("This may have {max} characters; it has {length}.")));
        } else if value.contains('\0') {
            self.push(UserError::invalid(field, "This must not contain the NUL character."));
        }
    }

    /// A number between two others.
    pub fn range<T: PartialOrd + std::fmt::Display>(&mut self, field: &str, value: T, min: T, max: T) {
        // The negated form refuses NaN too.
        if !(value >= min && value <= max) {
            self.push(UserError::invalid(field, format!("This must lie between {min} and {max}; it is {value}.")));
        }
    }

    /// A limit in tokens.
    pub fn limit(&mut self, field: &str, value: Option<i64>) {
        if let Some(value) = value {
            self.range(field, value, 0, MAX_TOKEN_LIMIT);
        }
    }

    /// A list's length.
    pub fn count(&mut self, field: &str, count: usize, max: usize) {
        if count > max {
            let message = format!("This may have {max} entries; it has {count}.");
            self.push(UserError::new(UserErrorCode::LimitExceeded, field, message));
        }
    }

    /// A field that can't be cleared.
    pub fn required<T>(&mut self, field: &str, patch: Patch<T>) -> Option<T> {
        match patch {
            MaybeUndefined::Undefined => None,
            MaybeUndefined::Value(value) => Some(value),
            MaybeUndefined::Null => {
                self.push(UserError::invalid(field, "This can't be cleared. Leave it out to keep it as it is."));
                None
            }
        }
    }

    /// An e-mail address, as far as its form tells.
    pub fn email(&mut self, field: &str, value: &str) {
        let well_formed = value.split_once('@').is_some_and(|(local, domain)| {
            !local.is_empty()
                && !domain.is_empty()
                && !domain.contains('@')
                && !domain.starts_with('.')
                && !domain.ends_with('.')
        });
        if !well_formed || value.chars().count() > 254 || value.chars().any(|c| c.is_whitespace() || c.is_control()) {
            self.push(UserError::invalid(field, "This is not an e-mail address."));
        }
    }
}
