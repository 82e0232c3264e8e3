//! The wire of `/operator/v1`, on the api's runtime port: the operator tells what the `Tenant` objects of its cluster
//! say, the api answers with what holds. Every call says all there is to say, so that each may be repeated, lost or
//! overtaken: only the last one counts.
//!
//! | route | what |
//! | --- | --- |
//! | `PUT tenants/{cluster}/{name}` | [`Report`] → [`State`]: registers the tenant, or changes it to what the object says |
//! | `DELETE tenants/{cluster}/{name}` | [`Farewell`] → [`Departure`]: repeated until [`Departure::is_gone`] |
//! | `POST tenants/{cluster}/{name}/tokens` | [`TokenRequest`] → [`Token`] for the tenant's own workers |
//! | `GET changes/{cluster}?after=…` | long poll → [`Changes`] |
//! | `PUT clusters/{cluster}` | [`Inventory`] → 204: every object there is; tenants whose object is gone are let go |
//!
//! `{cluster}` is the UID of the namespace `kube-system`, `{name}` the object's. An answer that is no success is a
//! [`Refused`].

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

/// The version of this protocol, sent with each request and answer in [`VERSION_HEADER`].
pub const VERSION: &str = "1";
/// The header that carries [`VERSION`].
pub const VERSION_HEADER: &str = "cloister-operator-protocol";
/// Milliseconds that `GET changes` waits at most for something to tell.
pub const MAX_WAIT_MS: u64 = 25_000;
/// Seconds that a worker's token still works once another has taken its place, at most.
pub const TOKEN_OVERLAP_SECONDS: i64 = 3_600;
/// Seconds that it still works once the new one was seen in use: a kubelet brings a changed Secret to its pods more than a
/// minute later than another may.
pub const TOKEN_SEEN_SECONDS: i64 = 180;
/// Seconds that a worker's token works: a week, so that an operator that is away for days stops nobody.
pub const TOKEN_SECONDS: i64 = 7 * 24 * 3_600;

/// What an object says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// The object's UID: its incarnation. A tenant outlives it.
    pub uid: String,
    /// The generation of the spec that this is taken from; one that is older than the last is ignored.
    pub generation: i64,
    /// The tenant itself.
    pub tenant: Registration,
    /// How far the cluster has come with it, for `Tenant.provisioning`.
    pub provisioning: Provisioning,
}

/// A tenant as its object describes it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Registration {
    /// An existing tenant (`ten_…`) to take over; it must not be ruled by another live object.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenant_id: Option<String>,
    /// For people.
    pub display_name: String,
    /// Where invoices go; fixed once registered.
    pub email: String,
    /// The plan's name: `free`, `pro` or `enterprise`.
    pub plan: String,
    /// Its own limit in tokens a month; none: the plan's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub monthly_token_limit: Option<i64>,
    /// Whether it is not to be served.
    #[serde(default)]
    pub suspended: bool,
}

/// How far the cluster has come with a tenant, as the object's status says it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Provisioning {
    /// `Pending`, `Provisioning`, `Ready`, `Degraded`, `Suspended` or `Deleting`.
    pub phase: String,
    /// The namespace, if the plan gives it one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Workers wanted.
    pub replicas: i32,
    /// Workers that are ready.
    pub ready_replicas: i32,
    /// The object's conditions.
    pub conditions: Vec<Condition>,
}

/// A condition of the object.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// `Ready`, `Registered`, …
    pub r#type: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
    /// In one CamelCase word.
    pub reason: String,
    /// For people.
    pub message: String,
    /// When the status last changed.
    pub last_transition_time: DateTime<Utc>,
}

/// What holds for a tenant.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    /// `ten_…`.
    pub tenant_id: String,
    /// The plan that holds. Another than the object's was set by billing, or the object has not taken it over yet.
    pub plan: String,
    /// Why it is not served, if it isn't.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub suspended: Option<Suspension>,
    /// This month's usage.
    pub usage: Usage,
    /// Its runs.
    pub runs: Runs,
    /// Whether it is to have a namespace with workers of its own, as its plan says. Absent: the plan enterprise is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub is_dedicated: Option<bool>,
    /// The generation of the object that was last taken over: an older one than the object's, as after a restore from a
    /// backup, is to be told again. Absent: it is not told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<i64>,
    /// The last rotation of its workers' token that works; 0: none does, as after a restore from a backup. Absent: it is
    /// not told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotation: Option<i64>,
}

/// Why a tenant is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Suspension {
    /// The object says so.
    Requested,
    /// An admin said so through GraphQL.
    ByAdmin,
    /// An invoice was not paid.
    PaymentFailed,
}

/// A tenant's usage of a month, in tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Usage {
    /// The month, `2026-11`.
    pub period: String,
    /// Used.
    pub tokens: i64,
    /// The hard limit.
    pub limit: i64,
}

/// A tenant's runs that have not ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Runs {
    /// Waiting to be claimed.
    pub queued: u64,
    /// Claimed, by whatever pool.
    pub running: u64,
    /// Claimed by the tenant's own workers. Above 0 after the plan gave them up: they are to be drained before they go.
    pub running_dedicated: u64,
}

/// What is to become of a tenant whose object goes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Farewell {
    /// The object's UID. Another object by the same name may have taken over already; then this changes nothing.
    pub uid: String,
    /// Keeps the tenant's rows, keys refused, so that an object may take it over again; else it is deleted for good.
    pub retain: bool,
    /// Ends the runs that are still going: the time to drain is over.
    pub cancel: bool,
    /// Nothing of it is left in the cluster: let go of the object too.
    pub deregister: bool,
}

/// How far a tenant's end has come.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Departure {
    /// Runs that are still claimed.
    pub running: u64,
    /// The object is let go of; nothing more to do.
    pub is_gone: bool,
}

/// Asks for a worker's token.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TokenRequest {
    /// Counts up with each rotation. The same one again takes the place of the token that the first made and that may
    /// never have arrived; those of lower rotations go on working for
    /// [`TOKEN_SEEN_SECONDS`] once the new one is seen in use, and for [`TOKEN_OVERLAP_SECONDS`] at most. A lower one than the last is refused.
    pub rotation: i64,
}

/// A worker's token; its secret is told this once.
#[derive(Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Token {
    /// `rtk_…`.
    pub id: String,
    /// `clr_…`.
    pub token: String,
    /// When it stops working.
    pub expires_at: DateTime<Utc>,
}

/// Tenants of a cluster whose [`State`] changed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Changes {
    /// To be sent as `after` next time. Without it, or with one that the api doesn't know (it was started anew), all of
    /// the cluster's tenants are told of.
    pub cursor: String,
    /// Whether all were told of: an object that is not among them is not registered.
    #[serde(default)]
    pub is_all: bool,
    /// The objects' names with what holds for them now.
    pub tenants: Vec<Changed>,
}

/// A tenant whose state changed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Changed {
    /// The object's name.
    pub name: String,
    /// What holds.
    pub state: State,
}

/// Every object of a cluster.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Inventory {
    /// The objects' names and UIDs.
    pub objects: Vec<Object>,
}

/// An object of a cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Object {
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
}

/// Why the api refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Refused {
    /// What kind of refusal.
    pub code: RefusalCode,
    /// For people: names the field of the spec and the remedy.
    pub message: String,
}

/// What kind of refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum RefusalCode {
    /// The credential is missing or not the operator's. 401.
    Unauthenticated,
    /// Another protocol version. 426.
    ProtocolVersion,
    /// The spec can't hold; it has to be changed. 422.
    Invalid,
    /// The tenant is ruled by another object, or its e-mail address is fixed. 409.
    Conflict,
    /// No such tenant in this cluster. 404.
    NotFound,
    /// The api can't now. 503.
    Unavailable,
}
