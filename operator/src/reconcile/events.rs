//! Events on the object: what changed, once, and not what is.

use crds::Tenant;
use crds::status::{Condition, ConditionStatus, TenantStatus};
use kube::runtime::events::{Event, EventType};
use kube::{Resource, ResourceExt};

use crate::operator::Operator;

/// Tells of each condition that is another one than before. An event that can't be told is lost.
pub async fn tell(operator: &Operator, tenant: &Tenant, status: &TenantStatus) {
    for condition in transitions(tenant.status.as_ref(), status) {
        let is_good = is_good(condition);
        let event = Event {
            type_: if is_good { EventType::Normal } else { EventType::Warning },
            reason: format!("{}{}", condition.r#type, if is_good { "" } else { "Changed" }),
            note: Some(format!("{}={}: {}", condition.r#type, condition.status.as_str(), condition.message)),
            action: condition.reason.clone(),
            secondary: None,
        };
        if let Err(error) = operator.events.publish(&event, &tenant.object_ref(&())).await {
            tracing::debug!(tenant = %tenant.name_any(), %error, "an event was lost");
        }
    }
}

/// Conditions whose status changed, or that now fail for another reason; not what is only on its way.
fn transitions<'a>(before: Option<&TenantStatus>, status: &'a TenantStatus) -> Vec<&'a Condition> {
    let changed = status.conditions.iter().filter(|condition| {
        let before = before.and_then(|before| before.condition(&condition.r#type));
        match (condition.r#type.as_str(), before) {
            ("Ready", None) => condition.status == ConditionStatus::True,
            ("Ready" | "Suspended" | "BillingInSync", Some(before)) => {
                before.status != condition.status && before.status != ConditionStatus::Unknown
                    || (condition.r#type == "Ready" && condition.reason != before.reason && !is_good(condition))
            }
            ("Registered", Some(before)) => before.status != condition.status,
            ("Deregistered", before) => before.is_none_or(|before| before.reason != condition.reason),
            _ => false,
        }
    });
    changed.collect()
}

fn is_good(condition: &Condition) -> bool {
    let wanted = if condition.r#type == "Suspended" { ConditionStatus::False } else { ConditionStatus::True };
    condition.status == wanted || condition.r#type == "Deregistered"
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;

    fn status(r#type: &str, holds: ConditionStatus, reason: &str) -> TenantStatus {
        let condition = Condition {
            r#type: r#type.to_owned(),
            status: holds,
            reason: reason.to_owned(),
            message: String::new(),
            last_transition_time: DateTime::UNIX_EPOCH,
            observed_generation: 1,
        };
        TenantStatus { conditions: vec![condition], ..TenantStatus::default() }
    }

    #[test]
    fn only_transitions_are_told() {
        use ConditionStatus::{False, True, Unknown};
        let told = |before: Option<TenantStatus>, now: TenantStatus| transitions(before.as_ref(), &now).len();
        assert_eq!(told(None, status("Ready", False, "Starting")), 0);
        assert_eq!(told(Some(status("Ready", False, "Starting")), status("Ready", True, "Ready")), 1);
        assert_eq!(told(Some(status("Ready", True, "Ready")), status("Ready", True, "Ready")), 0);
        assert_eq!(told(Some(status("Ready", True, "Ready")), status("Ready", False, "Starting")), 1);
        assert_eq!(told(Some(status("Suspended", Unknown, "NotRegistered")), status("Suspended", False, "Active")), 0);
        assert_eq!(told(Some(status("Suspended", False, "Active")), status("Suspended", True, "Requested")), 1);
    }
}
