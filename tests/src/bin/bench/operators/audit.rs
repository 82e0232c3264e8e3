//! What a client asked of the API server, from its audit log.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use chrono::{DateTime, Utc};
use serde::Deserialize;

/// Verbs that change something.
const WRITES: [&str; 5] = ["create", "update", "patch", "delete", "deletecollection"];

/// The log of a cluster, from some moment on.
pub struct Audit {
    file: PathBuf,
    from: u64,
}

/// A call that was answered.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Call {
    verb: String,
    user: User,
    object_ref: Option<Object>,
    response_status: Option<Response>,
    /// When it arrived.
    #[serde(rename = "requestReceivedTimestamp")]
    pub received: DateTime<Utc>,
    /// When it was answered.
    #[serde(rename = "stageTimestamp")]
    pub answered: DateTime<Utc>,
}

#[derive(Deserialize)]
struct User {
    username: String,
}

/// What a call was about.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Hash)]
#[serde(default)]
pub struct Object {
    /// The kind, in the plural.
    pub resource: String,
    /// The namespace; empty for a cluster-wide kind.
    pub namespace: String,
    name: String,
    subresource: String,
}

#[derive(Deserialize)]
struct Response {
    code: u16,
}

impl Audit {
    /// The log in `file`, from now on.
    ///
    /// # Panics
    /// There is none.
    pub fn from_now(file: &Path) -> Audit {
        let from = file.metadata().expect("the cluster has an audit log").len();
        Audit { file: file.to_owned(), from }
    }

    /// The calls until now.
    ///
    /// # Panics
    /// The log can't be read.
    pub fn calls(&self) -> Vec<Call> {
        let mut file = File::open(&self.file).expect("the audit log");
        file.seek(SeekFrom::Start(self.from)).expect("the audit log");
        let mut text = String::new();
        file.read_to_string(&mut text).expect("the audit log");
        // The last line may be half written.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().map(|line| serde_json::from_str(line).expect("an event of the audit log")).collect()
    }

    /// What `user` wrote until now, events and Leases aside: those of leader election come without anybody's doing.
    pub fn writes_of(&self, user: &str) -> Vec<Call> {
        let mut calls = self.calls();
        calls.retain(|call| call.user.username == user && call.is_write() && !call.is_of(&["events", "leases"]));
        calls
    }
}

impl Call {
    fn is_write(&self) -> bool {
        WRITES.contains(&self.verb.as_str())
    }

    /// Whether it made an object that was not there: an apply does, too.
    pub fn is_creation(&self) -> bool {
        self.code() == 201 && self.object().subresource.is_empty()
    }

    /// Whether it is about one of these kinds.
    pub fn is_of(&self, resources: &[&str]) -> bool {
        resources.contains(&self.object().resource.as_str())
    }

    /// The status of its answer.
    pub fn code(&self) -> u16 {
        self.response_status.as_ref().map_or(0, |response| response.code)
    }

    /// What it is about.
    pub fn object(&self) -> Object {
        self.object_ref.clone().unwrap_or_default()
    }
}
