//! The token, from a file that may be replaced while the worker runs.

use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};
use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};

/// How often the file is looked into.
const LOOK: Duration = Duration::from_secs(2);

/// The token as the file last had it.
pub struct Token {
    file: PathBuf,
    current: RwLock<SecretString>,
}

impl Token {
    /// Reads the file.
    ///
    /// # Errors
    /// It can't be read, or holds nothing.
    pub async fn read(file: &Path) -> Result<Self, String> {
        let named = |reason: String| format!("CLOISTER_RUNTIME__TOKEN_FILE ({}): {reason}", file.display());
        let token = tokio::fs::read_to_string(file).await.map_err(|error| named(error.to_string()))?;
        if token.trim().is_empty() {
            return Err(named("it is empty".to_owned()));
        }
        Ok(Self { file: file.to_owned(), current: RwLock::new(token.trim().into()) })
    }

    /// The token.
    pub fn current(&self) -> String {
        self.current.read().unwrap_or_else(PoisonError::into_inner).expose_secret().to_owned()
    }

    /// Reads the file again; whether the token is another one now. One that can't be read, as in the midst of being
    /// replaced, changes nothing.
    pub async fn refresh(&self) -> bool {
        let Ok(text) = tokio::fs::read_to_string(&self.file).await else { return false };
        let token = text.trim();
        if token.is_empty() || token == self.current() {
            return false;
        }
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = token.into();
        tracing::info!("the token was replaced");
        true
    }

    /// Follows the file for as long as it is polled.
    pub async fn follow(&self) {
        loop {
            tokio::time::sleep(LOOK).await;
            self.refresh().await;
        }
    }
}
