//! What has become of a `Tenant`.

use chrono::{DateTime, Utc};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use crate::protocol;

/// What has become of a tenant. Written whole, by the operator alone.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct TenantStatus {
    /// The generation of the spec that this tells of.
    #[serde(default)]
    pub observed_generation: i64,
    /// Where the tenant stands, in one word.
    #[serde(default)]
    pub phase: Phase,
    /// Whether its runs are executed in the shared pool or in a namespace of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub isolation: Option<Isolation>,
    /// The tenant's id, once registered.
    #[schemars(length(max = 30))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant_id: Option<String>,
    /// The namespace of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<NamespaceStatus>,
    /// The runtime of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime: Option<RuntimeStatus>,
    /// This month's usage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<UsageStatus>,
    /// What holds of it, each with a reason.
    #[schemars(
        length(max = 16),
        extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"])
    )]
    #[serde(default)]
    pub conditions: Vec<Condition>,
}

impl TenantStatus {
    /// The condition of this type.
    pub fn condition(&self, r#type: &str) -> Option<&Condition> {
        self.conditions.iter().find(|condition| condition.r#type == r#type)
    }
}

/// Where a tenant stands.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[schemars(inline)]
pub enum Phase {
    /// Not registered yet.
    #[default]
    Pending,
    /// Its namespace or runtime is not there yet.
    Provisioning,
    /// All is as wanted.
    Ready,
    /// Something that was there, or that is wanted, can't be had; the conditions say what.
    Degraded,
    /// It is not served.
    Suspended,
    /// Its object is being deleted.
    Deleting,
}

impl Phase {
    /// Every phase.
    pub const ALL: [Phase; 6] =
        [Phase::Pending, Phase::Provisioning, Phase::Ready, Phase::Degraded, Phase::Suspended, Phase::Deleting];

    /// As it is written.
    pub const fn as_str(self) -> &'static str {
        match self {
            Phase::Pending => "Pending",
            Phase::Provisioning => "Provisioning",
            Phase::Ready => "Ready",
            Phase::Degraded => "Degraded",
            Phase::Suspended => "Suspended",
            Phase::Deleting => "Deleting",
        }
    }
}

/// Where a tenant's runs are executed.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq)]
#[schemars(inline)]
pub enum Isolation {
    /// In the shared pool.
    Shared,
    /// In a namespace of its own.
    Namespace,
}

/// A tenant's namespace.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct NamespaceStatus {
    /// Its name.
    #[schemars(length(max = 63))]
    pub name: String,
    /// Its UID: another namespace by this name is not the tenant's.
    #[schemars(length(max = 64))]
    pub uid: String,
}

/// A tenant's own runtime.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct RuntimeStatus {
    /// Workers wanted.
    pub replicas: i32,
    /// Workers that are ready.
    pub ready_replicas: i32,
    /// The image that they run.
    #[schemars(length(max = 512))]
    pub version: String,
    /// Since when it waits for runs to end, so that it can go.
    #[schemars(schema_with = "optional_time")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub draining_since: Option<DateTime<Utc>>,
}

/// A month's usage, in tokens. Exact at most every 30 s and to 1 % of the limit; the operator's metrics have it live.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct UsageStatus {
    /// The month, `2026-11`.
    #[schemars(length(max = 16))]
    pub period: String,
    /// Used.
    pub tokens: i64,
    /// The hard limit.
    pub limit: i64,
    /// What is left.
    pub remaining: i64,
    /// How near the limit is.
    pub state: UsageState,
}

/// How near a tenant is to its limit.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq)]
#[schemars(inline)]
pub enum UsageState {
    /// Less than 80 % are used.
    Ok,
    /// At least 80 % are used.
    NearLimit,
    /// Nothing is left.
    Exhausted,
}

impl UsageState {
    /// How near this many tokens are to this limit.
    pub const fn of(tokens: i64, limit: i64) -> Self {
        match limit.saturating_sub(tokens) {
            ..=0 => UsageState::Exhausted,
            left if left <= limit / 5 => UsageState::NearLimit,
            _ => UsageState::Ok,
        }
    }
}

/// Something that holds of a tenant, does not, or is not known.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// `Ready`, `Registered`, …
    #[schemars(length(max = 64))]
    pub r#type: String,
    /// Whether it holds.
    pub status: ConditionStatus,
    /// Why, in one CamelCase word.
    #[schemars(length(max = 128))]
    pub reason: String,
    /// Why, for people.
    #[schemars(length(max = 1024))]
    pub message: String,
    /// When the status last changed.
    #[schemars(schema_with = "time")]
    pub last_transition_time: DateTime<Utc>,
    /// The generation of the spec that this tells of.
    #[serde(default)]
    pub observed_generation: i64,
}

impl From<&Condition> for protocol::Condition {
    fn from(condition: &Condition) -> Self {
        Self {
            r#type: condition.r#type.clone(),
            status: condition.status.as_str().to_owned(),
            reason: condition.reason.clone(),
            message: condition.message.clone(),
            last_transition_time: condition.last_transition_time,
        }
    }
}

/// Whether a condition holds.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq)]
#[schemars(inline)]
pub enum ConditionStatus {
    /// It holds.
    True,
    /// It does not.
    False,
    /// Nobody knows.
    Unknown,
}

impl ConditionStatus {
    /// As it is written.
    pub const fn as_str(self) -> &'static str {
        match self {
            ConditionStatus::True => "True",
            ConditionStatus::False => "False",
            ConditionStatus::Unknown => "Unknown",
        }
    }
}

fn time(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "string", "format": "date-time" })
}

fn optional_time(generator: &mut SchemaGenerator) -> Schema {
    time(generator)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_near_from_four_fifths_on() {
        assert_eq!(UsageState::of(0, 100), UsageState::Ok);
        assert_eq!(UsageState::of(79, 100), UsageState::Ok);
        assert_eq!(UsageState::of(80, 100), UsageState::NearLimit);
        assert_eq!(UsageState::of(100, 100), UsageState::Exhausted);
        assert_eq!(UsageState::of(0, 0), UsageState::Exhausted);
    }
}
