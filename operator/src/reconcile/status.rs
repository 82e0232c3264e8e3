//! Step five: the status, from all that was found out and done. Pure.

use std::time::Duration;

use chrono::{DateTime, Utc};
use crds::Tenant;
use crds::protocol::{Suspension, Usage};
use crds::status::{
    Condition, ConditionStatus, Isolation, NamespaceStatus, Phase, RuntimeStatus, TenantStatus, UsageState, UsageStatus,
};
use k8s_openapi::api::apps::v1::Deployment;
use kube::ResourceExt;

use super::apply::{Applied, Step};
use super::course::{Course, Facts, Standing};
use crate::rollout::image;
use crate::wanted::Wanted;

/// How often usage is written into a status at most.
pub const USAGE_EVERY: Duration = Duration::from_secs(30);
/// What the schema allows a message.
const MAX_MESSAGE: usize = 1_000;

/// Reasons for which something is not as wanted yet and will be, without anybody's doing.
const ON_THE_WAY: [&str; 6] = ["Starting", "Pending", "Removing", "Terminating", "NamespaceExists", "Registering"];

/// Everything that a status is made from.
pub struct Look<'a> {
    /// The object.
    pub tenant: &'a Tenant,
    /// What was found out.
    pub facts: &'a Facts,
    /// What is to become of its namespace.
    pub course: Course,
    /// What the namespace is to hold.
    pub wanted: &'a Wanted,
    /// How far that was applied.
    pub applied: &'a Applied,
    /// How long ago usage was last written, if it was since the operator started.
    pub usage_age: Option<Duration>,
    /// Now.
    pub now: DateTime<Utc>,
}

/// A condition without its times.
struct Verdict {
    r#type: &'static str,
    status: ConditionStatus,
    reason: String,
    message: String,
}

impl Verdict {
    fn new(r#type: &'static str, status: ConditionStatus, reason: &str, message: impl Into<String>) -> Self {
        Self { r#type, status, reason: reason.to_owned(), message: message.into() }
    }

    fn holds(&self) -> bool {
        self.status == ConditionStatus::True
    }
}

/// The status.
pub fn build_status(look: &Look<'_>) -> TenantStatus {
    let before = look.tenant.status.clone().unwrap_or_default();
    let suspension = look.facts.suspension(look.tenant);
    let mut verdicts = vec![registered(look), suspended(look, suspension), billing(look, &before)];
    if look.course.has_namespace() {
        verdicts.extend([
            namespace_ready(look),
            quota_applied(look),
            network_applied(look),
            runtime_available(look, suspension),
        ]);
    }
    let ready = ready(look, suspension, &verdicts);
    let phase = phase(look, suspension, &ready, before.phase);
    verdicts.insert(0, ready);

    let live = look.applied.live_namespace.as_ref().or_else(|| look.facts.own_namespace());
    TenantStatus {
        observed_generation: look.tenant.metadata.generation.unwrap_or_default(),
        phase,
        isolation: match look.course {
            Course::Unregistered => before.isolation,
            Course::Shared => Some(Isolation::Shared),
            Course::Dedicated | Course::Draining { .. } => Some(Isolation::Namespace),
        },
        tenant_id: match &look.facts.standing {
            Standing::Held(state) => Some(state.tenant_id.clone()),
            _ => before.tenant_id.clone(),
        },
        namespace: live
            .filter(|_| look.course.has_namespace())
            .map(|live| NamespaceStatus { name: live.name_any(), uid: live.uid().unwrap_or_default() }),
        runtime: look.course.has_namespace().then(|| runtime(look)).flatten(),
        usage: usage(look, before.usage.clone()),
        conditions: conditions(verdicts, &before, look.tenant.metadata.generation.unwrap_or_default(), look.now),
    }
}

/// Conditions with their times: the time of one whose status is as before stays.
fn conditions(verdicts: Vec<Verdict>, before: &TenantStatus, generation: i64, now: DateTime<Utc>) -> Vec<Condition> {
    let timed = verdicts.into_iter().map(|verdict| {
        let before = before.condition(verdict.r#type).filter(|before| before.status == verdict.status);
        Condition {
            r#type: verdict.r#type.to_owned(),
            status: verdict.status,
            reason: verdict.reason,
            message: shorten(verdict.message),
            last_transition_time: before.map_or(now, |before| before.last_transition_time),
            observed_generation: generation,
        }
    });
    timed.collect()
}

fn shorten(mut message: String) -> String {
    if let Some((at, _)) = message.char_indices().nth(MAX_MESSAGE) {
        message.truncate(at);
        message.push('…');
    }
    message
}

/// The status of an object that is being deleted: as it was, but for what tells how far that has come.
pub fn build_departure(tenant: &Tenant, reason: &str, message: &str, now: DateTime<Utc>) -> TenantStatus {
    let before = tenant.status.clone().unwrap_or_default();
    let generation = tenant.metadata.generation.unwrap_or_default();
    let verdicts = vec![
        Verdict::new("Ready", ConditionStatus::False, "Deleting", "The Tenant is being deleted."),
        Verdict::new("Deregistered", ConditionStatus::False, reason, message),
    ];
    let mut new = conditions(verdicts, &before, generation, now);
    let deregistered = new.pop();
    let rest = before.conditions.iter().filter(|it| !matches!(it.r#type.as_str(), "Ready" | "Deregistered"));
    new.extend(rest.cloned().map(|it| Condition { observed_generation: generation, ..it }));
    new.extend(deregistered);
    TenantStatus { observed_generation: generation, phase: Phase::Deleting, conditions: new, ..before }
}

fn registered(look: &Look<'_>) -> Verdict {
    let (status, reason, message) = match (&look.facts.trouble, &look.facts.standing) {
        (Some(trouble), _) if trouble.is_away() => {
            let message = "The api can't be asked; what is there stays as it is. See the operator's log.".to_owned();
            (ConditionStatus::Unknown, trouble.reason(), message)
        }
        (Some(trouble), _) => (ConditionStatus::False, trouble.reason(), trouble.to_string()),
        (None, Standing::Held(state)) => {
            (ConditionStatus::True, "Registered", format!("Registered as {}.", state.tenant_id))
        }
        (None, _) => (ConditionStatus::Unknown, "Registering", "The api has not answered yet.".to_owned()),
    };
    Verdict::new("Registered", status, reason, message)
}

fn suspended(look: &Look<'_>, suspension: Option<Suspension>) -> Verdict {
    let (status, reason, message) = match suspension {
        None if look.course == Course::Unregistered => {
            (ConditionStatus::Unknown, "NotRegistered", "The tenant is not registered yet.")
        }
        None => (ConditionStatus::False, "Active", "The tenant is served."),
        Some(suspension) => (ConditionStatus::True, suspension_reason(suspension), suspension_message(suspension)),
    };
    Verdict::new("Suspended", status, reason, message)
}

fn suspension_reason(suspension: Suspension) -> &'static str {
    match suspension {
        Suspension::Requested => "Requested",
        Suspension::ByAdmin => "ByAdmin",
        Suspension::PaymentFailed => "PaymentFailed",
    }
}

fn suspension_message(suspension: Suspension) -> &'static str {
    match suspension {
        Suspension::Requested => "spec.suspended is set.",
        Suspension::ByAdmin => "An administrator suspended the tenant; resumeTenant ends that.",
        Suspension::PaymentFailed => "An invoice was not paid; its payment ends the suspension.",
    }
}

fn billing(look: &Look<'_>, before: &TenantStatus) -> Verdict {
    const TYPE: &str = "BillingInSync";
    let wanted = look.tenant.spec.plan.as_str();
    match (&look.facts.standing, before.condition(TYPE)) {
        (Standing::Held(state), _) if state.plan == wanted => {
            Verdict::new(TYPE, ConditionStatus::True, "InSync", format!("The plan is {wanted}."))
        }
        (Standing::Held(state), _) => Verdict::new(
            TYPE,
            ConditionStatus::False,
            "PlanDiffers",
            format!(
                "The plan that holds is {}, and spec.plan says {wanted}. Set spec.plan to {}, or change the subscription.",
                state.plan, state.plan
            ),
        ),
        (Standing::Remembered, Some(before)) => {
            Verdict::new(TYPE, before.status, &before.reason, before.message.clone())
        }
        _ => Verdict::new(TYPE, ConditionStatus::Unknown, "NotRegistered", "The tenant is not registered yet."),
    }
}

fn step(r#type: &'static str, step: &Step, done: &str) -> Verdict {
    match step {
        Step::Done => Verdict::new(r#type, ConditionStatus::True, "Applied", done),
        Step::NotReached => {
            Verdict::new(r#type, ConditionStatus::False, "Pending", "What has to be there before it is not yet.")
        }
        Step::Waiting(reason, message) => Verdict::new(r#type, ConditionStatus::False, reason, message.clone()),
        Step::Failed(reason, message) => Verdict::new(r#type, ConditionStatus::False, reason, message.clone()),
    }
}

fn namespace_ready(look: &Look<'_>) -> Verdict {
    let done = format!("Namespace {} is the tenant's.", look.wanted.namespace);
    step("NamespaceReady", &look.applied.namespace, &done)
}

fn quota_applied(look: &Look<'_>) -> Verdict {
    step("QuotaApplied", &look.applied.quota, "Quota and limits are as wanted.")
}

fn network_applied(look: &Look<'_>) -> Verdict {
    const TYPE: &str = "NetworkPoliciesApplied";
    let foreign = &look.facts.foreign_policies;
    if look.applied.network == Step::Done && !foreign.is_empty() {
        let message = format!(
            "NetworkPolicy {} in namespace {} is not the operator's and may open what is to be closed. Delete it.",
            foreign.join(", "),
            look.wanted.namespace
        );
        return Verdict::new(TYPE, ConditionStatus::False, "ForeignPolicy", message);
    }
    if look.applied.network == Step::Done && !look.wanted.refused_openings.is_empty() {
        return Verdict::new(TYPE, ConditionStatus::False, "EgressDenied", look.wanted.refused_openings.join(" "));
    }
    step(TYPE, &look.applied.network, "Network policies are as wanted.")
}

fn runtime_available(look: &Look<'_>, suspension: Option<Suspension>) -> Verdict {
    const TYPE: &str = "RuntimeAvailable";
    if !look.wanted.refused_classes.is_empty() {
        return Verdict::new(TYPE, ConditionStatus::False, "NotAllowed", look.wanted.refused_classes.join(" "));
    }
    if look.applied.runtime != Step::Done {
        return step(TYPE, &look.applied.runtime, "");
    }
    if let Some(suspension) = suspension {
        let message = "Workers are scaled to 0 while the tenant is suspended.";
        return Verdict::new(TYPE, ConditionStatus::False, suspension_reason(suspension), message);
    }
    let (ready, replicas) = (ready_replicas(look.applied.deployment.as_deref()), look.applied.replicas);
    let of = format!("{ready} of {replicas} workers are ready.");
    if ready > 0 {
        let reason = match look.course {
            Course::Draining { .. } => "Draining",
            _ if ready >= replicas => "Available",
            _ => "PartlyAvailable",
        };
        return Verdict::new(TYPE, ConditionStatus::True, reason, of);
    }
    let failure = |r#type: &str, status: &str| {
        let conditions = look.applied.deployment.as_ref()?.status.as_ref()?.conditions.as_ref()?;
        conditions.iter().find(|it| it.type_ == r#type && it.status == status)?.message.clone()
    };
    if let Some(message) = failure("ReplicaFailure", "True") {
        return Verdict::new(TYPE, ConditionStatus::False, "ReplicaFailure", message);
    }
    if let Some(message) = failure("Progressing", "False") {
        return Verdict::new(TYPE, ConditionStatus::False, "ProgressDeadlineExceeded", message);
    }
    Verdict::new(TYPE, ConditionStatus::False, "Starting", of)
}

fn ready_replicas(deployment: Option<&Deployment>) -> i32 {
    deployment.and_then(|deployment| deployment.status.as_ref()?.ready_replicas).unwrap_or(0)
}

fn ready(look: &Look<'_>, suspension: Option<Suspension>, verdicts: &[Verdict]) -> Verdict {
    const TYPE: &str = "Ready";
    if let Some(suspension) = suspension {
        return Verdict::new(TYPE, ConditionStatus::False, "Suspended", suspension_message(suspension));
    }
    // That the api is away for a moment takes nothing from a tenant that was ready.
    let unregistered = verdicts.iter().find(|verdict| {
        let is_wrong = verdict.status == ConditionStatus::False || look.course == Course::Unregistered;
        verdict.r#type == "Registered" && is_wrong
    });
    let parts = ["NamespaceReady", "QuotaApplied", "NetworkPoliciesApplied", "RuntimeAvailable"];
    let missing = verdicts.iter().find(|verdict| parts.contains(&verdict.r#type) && !verdict.holds());
    match unregistered.or(missing) {
        Some(verdict) => Verdict::new(TYPE, ConditionStatus::False, &verdict.reason, verdict.message.clone()),
        None => Verdict::new(TYPE, ConditionStatus::True, "Ready", "The tenant is served."),
    }
}

fn phase(look: &Look<'_>, suspension: Option<Suspension>, ready: &Verdict, before: Phase) -> Phase {
    if suspension.is_some() {
        return Phase::Suspended;
    }
    if ready.holds() {
        return Phase::Ready;
    }
    let is_on_the_way = ON_THE_WAY.contains(&ready.reason.as_str());
    match look.course {
        Course::Unregistered => Phase::Pending,
        _ if matches!(before, Phase::Ready | Phase::Degraded) || !is_on_the_way => Phase::Degraded,
        _ => Phase::Provisioning,
    }
}

fn runtime(look: &Look<'_>) -> Option<RuntimeStatus> {
    let deployment = look.applied.deployment.as_deref().or(look.facts.deployment.as_deref());
    let draining_since = match look.course {
        Course::Draining { since, .. } => Some(since),
        _ => None,
    };
    if deployment.is_none() && draining_since.is_none() {
        return None;
    }
    let live = deployment.and_then(|deployment| deployment.spec.as_ref()?.replicas).unwrap_or_default();
    Some(RuntimeStatus {
        replicas: if look.applied.runtime == Step::Done { look.applied.replicas } else { live },
        ready_replicas: ready_replicas(deployment),
        version: deployment.and_then(image).map(version).unwrap_or_default().to_owned(),
        draining_since,
    })
}

/// An image's tag, or its digest, or the whole of one that has neither.
fn version(image: &str) -> &str {
    let name = image.rsplit('/').next().unwrap_or(image);
    let (name, otherwise) = name.split_once('@').unwrap_or((name, image));
    name.split_once(':').map_or(otherwise, |(_, tag)| tag)
}

/// Usage as the status is to show it: the api's figures when they are news and the last were written long enough ago.
/// Another limit is somebody's doing, who looks for it now.
fn usage(look: &Look<'_>, before: Option<UsageStatus>) -> Option<UsageStatus> {
    let Standing::Held(state) = &look.facts.standing else { return before };
    let is_old = look.usage_age.is_none_or(|age| age >= USAGE_EVERY);
    let may_write = is_old || before.as_ref().is_some_and(|before| before.limit != state.usage.limit);
    match before {
        Some(before) if !may_write || !is_news(&before, &state.usage) => Some(before),
        _ => Some(UsageStatus {
            period: state.usage.period.clone(),
            tokens: state.usage.tokens,
            limit: state.usage.limit,
            remaining: state.usage.limit.saturating_sub(state.usage.tokens).max(0),
            state: UsageState::of(state.usage.tokens, state.usage.limit),
        }),
    }
}

/// Whether usage differs enough to be shown: another month, limit or state, or a hundredth of the limit.
pub fn is_news(shown: &UsageStatus, usage: &Usage) -> bool {
    shown.period != usage.period
        || shown.limit != usage.limit
        || shown.state != UsageState::of(usage.tokens, usage.limit)
        || usage.tokens.abs_diff(shown.tokens) >= (usage.limit.unsigned_abs() / 100).max(1)
}

#[cfg(test)]
#[path = "status_tests.rs"]
mod tests;
