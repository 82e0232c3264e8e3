//! Runs: state, lease and place in the queue.

use sea_orm::entity::prelude::*;
use sea_orm::{Iterable, QuerySelect};
use serde::{Deserialize, Serialize};

/// Where a run stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EnumIter, DeriveActiveEnum, Serialize, Deserialize)]
#[sea_orm(rs_type = "String", db_type = "Text", rename_all = "snake_case")]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Waits for a worker, or for the conversation's earlier run.
    Queued,
    /// A worker holds it.
    Running,
    /// Waits for a decision about a tool call.
    WaitingApproval,
    /// The month's tokens ran out.
    PausedQuota,
    /// Ended with an output.
    Succeeded,
    /// Ended with an error.
    Failed,
    /// Ended by its tenant.
    Cancelled,
}

impl Status {
    /// The states that end a run.
    pub const TERMINAL: [Status; 3] = [Status::Succeeded, Status::Failed, Status::Cancelled];
    /// The states in which a run holds its conversation.
    pub const UNFINISHED: [Status; 4] = [Status::Queued, Status::Running, Status::WaitingApproval, Status::PausedQuota];
}

/// A run. As JSON, which replicas tell each other of its changes in, it has no `spec`.
#[sea_orm::model]
#[derive(Clone, Debug, PartialEq, DeriveEntityModel, Serialize, Deserialize)]
#[sea_orm(table_name = "runs")]
pub struct Model {
    /// UUIDv7.
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: Uuid,
    /// Whose it is.
    pub tenant_id: Uuid,
    /// The key that started it.
    pub api_key_id: Option<Uuid>,
    /// The agent that answers first.
    pub agent_id: Uuid,
    /// The version of it; none when the draft runs.
    pub agent_version_id: Option<Uuid>,
    /// The agent that answers now.
    pub current_agent_id: Uuid,
    /// What history it goes on from.
    pub conversation_id: Option<Uuid>,
    /// Where it stands.
    pub status: Status,
    /// The user's text.
    pub input: String,
    /// The final text.
    pub output: Option<String>,
    /// The final value of an agent with an output schema.
    pub output_json: Option<Json>,
    /// Why it failed, as the runtime's `RunErrorCode`.
    pub error_code: Option<String>,
    /// Why it failed, for people.
    pub error_message: Option<String>,
    /// Model responses stored so far.
    pub turns: i32,
    /// The most tokens the run may use.
    pub max_tokens: Option<i64>,
    /// Seconds that workers may hold it until it fails as TIMEOUT.
    pub timeout_seconds: i32,
    /// The runtime's `RunSpec`, frozen at the start; tokens in it are sealed.
    #[serde(skip)]
    pub spec: Json,
    /// The caller's key against starting twice, unique in the tenant.
    pub idempotency_key: Option<String>,
    /// SHA-256 of the input that the key was first used with.
    pub idempotency_hash: Option<String>,
    /// Whose workers may claim it.
    pub pool: String,
    /// Its place in the pool's queue; none while it isn't in it.
    pub vtime: Option<f64>,
    /// Rises with each claim and with a cancel; an append must carry it (I3).
    pub fence: i64,
    /// When its claim lapses unless renewed.
    pub lease_until: Option<DateTimeUtc>,
    /// When it was last claimed.
    pub claimed_at: Option<DateTimeUtc>,
    /// Milliseconds that earlier claims held it: what it has used of its timeout.
    pub held_ms: i64,
    /// The sequence that the next item will have.
    pub next_sequence: i64,
    /// When it was started by its tenant.
    pub created_at: DateTimeUtc,
    /// When it was first claimed.
    pub started_at: Option<DateTimeUtc>,
    /// When it ended.
    pub finished_at: Option<DateTimeUtc>,
    /// The worker apart that claimed it last, by the name that it gave; none: the api's own pool.
    pub worker: Option<String>,
    /// When it fails unless somebody has decided; none unless it waits for an approval.
    pub waits_until: Option<DateTimeUtc>,
    /// When its tokens ran out; none unless it is paused.
    pub paused_at: Option<DateTimeUtc>,
    /// The most items of its conversation that it is shown, in whole turns; none: all.
    pub history_limit: Option<i32>,
}

impl ActiveModelBehavior for ActiveModel {}

/// Everyone's runs without their spec, which is large and which few need: it is null in what is found. For the
/// platform's own work, as [`crate::TenantOwned::across_tenants`].
pub fn without_spec() -> Select<Entity> {
    let columns = Column::iter().filter(|column| !matches!(column, Column::Spec));
    Entity::find().select_only().columns(columns).expr_as(Expr::value(Json::Null), "spec")
}
