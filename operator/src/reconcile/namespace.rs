//! The namespace: made once, kept ours, and never taken from anybody.

use std::sync::Arc;

use crds::Tenant;
use k8s_openapi::api::core::v1::Namespace;
use kube::ResourceExt;

use super::apply::Step;
use super::course::{Facts, Ownership};
use super::write;
use crate::build::namespace::{build_namespace, holds, merged};
use crate::error::Error;
use crate::operator::Operator;
use crate::wanted::Wanted;

/// Makes the tenant's namespace as it is to be. Without one there is nothing to apply anything to.
///
/// # Errors
/// It can't be written.
pub async fn settle(
    operator: &Operator,
    tenant: &Tenant,
    facts: &Facts,
    wanted: &Wanted,
) -> Result<(Step, Option<Arc<Namespace>>), Error> {
    let desired = build_namespace(&wanted.namespace, &wanted.tenant, &wanted.uid);
    let live = match (facts.ownership, &facts.namespace) {
        (Ownership::Foreign, _) => return Ok((foreign(tenant, &wanted.namespace), None)),
        (Ownership::Ours, Some(live)) => live.clone(),
        _ => {
            return match write::create_namespace(operator, &desired).await {
                Ok(made) => Ok((Step::Done, Some(Arc::new(made)))),
                // The watch is about to tell whose it is.
                Err(error) if error.is_conflict() => {
                    Ok((Step::Waiting("NamespaceExists", "A namespace by this name was just made.".to_owned()), None))
                }
                Err(error) => Err(error),
            };
        }
    };
    if live.metadata.deletion_timestamp.is_some() {
        return Ok((Step::Waiting("Terminating", terminating(&live)), None));
    }
    let (has, wants) = (&live.metadata, &desired.metadata);
    if holds(has.labels.as_ref(), wants.labels.as_ref()) && holds(has.annotations.as_ref(), wants.annotations.as_ref())
    {
        return Ok((Step::Done, Some(live)));
    }
    // What others wrote under keys of theirs stays; uid and version say which namespace is meant.
    let mut replaced = live.as_ref().clone();
    replaced.metadata.labels = Some(merged(replaced.metadata.labels, desired.metadata.labels));
    replaced.metadata.annotations = Some(merged(replaced.metadata.annotations, desired.metadata.annotations));
    replaced.metadata.managed_fields = None;
    let replaced = write::replace_namespace(operator, &replaced).await?;
    Ok((Step::Done, Some(Arc::new(replaced))))
}

fn foreign(tenant: &Tenant, name: &str) -> Step {
    let uid = tenant.uid().unwrap_or_default();
    Step::Failed(
        "NamespaceForeign".to_owned(),
        format!(
            "Namespace {name} exists and is not this Tenant's; it is left alone. Delete it, or, to hand it over, set its \
             annotation cloister.dev/tenant-uid to {uid}."
        ),
    )
}

/// Why a namespace that is being deleted is still there, as far as Kubernetes says.
pub fn terminating(namespace: &Namespace) -> String {
    let conditions = namespace.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let reasons: Vec<&str> = conditions
        .filter(|condition| condition.status == "True")
        .filter_map(|condition| condition.message.as_deref())
        .collect();
    let name = namespace.name_any();
    match reasons.is_empty() {
        true => format!("Namespace {name} is being deleted."),
        false => format!("Namespace {name} is being deleted: {}", reasons.join(" ")),
    }
}
