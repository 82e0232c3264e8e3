//! Step four: what was built is applied, in an order in which nothing runs unconfined.

use std::sync::Arc;
use std::time::Duration;

use crds::Tenant;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Namespace;
use kube::ResourceExt;

use super::course::{Course, Facts};
use super::write::{self, settle};
use super::{namespace, runtime};
use crate::build::limits::{build_limit_range, build_resource_quota};
use crate::build::network::build_network_policy;
use crate::clock;
use crate::cluster::is_in_status;
use crate::error::Error;
use crate::operator::Operator;
use crate::wanted::{Addresses, Wanted};

/// A namespace that somebody else just made is looked at again after this long.
const NAMESPACE_AGAIN: Duration = Duration::from_secs(1);

/// How far a step of applying came.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Step {
    /// One before it failed, or there is nothing to do.
    #[default]
    NotReached,
    /// It is as wanted.
    Done,
    /// It is not yet, and will be without anybody's doing: why, in one word and for people.
    Waiting(&'static str, String),
    /// It is not: why, in one word and for people.
    Failed(String, String),
}

/// How far applying came.
#[derive(Debug, Default)]
pub struct Applied {
    /// The namespace.
    pub namespace: Step,
    /// Network policies.
    pub network: Step,
    /// Quota and limits.
    pub quota: Step,
    /// The workers.
    pub runtime: Step,
    /// The namespace as it is now.
    pub live_namespace: Option<Arc<Namespace>>,
    /// The workers as they are now.
    pub deployment: Option<Arc<Deployment>>,
    /// How many workers there are to be.
    pub replicas: i32,
    /// When to look again.
    pub again: Option<Duration>,
    /// Why it went no further.
    pub error: Option<Error>,
}

impl Applied {
    /// Looks again after this long, or sooner.
    pub fn look_again(&mut self, after: Option<Duration>) {
        self.again = [self.again, after].into_iter().flatten().min();
    }

    fn fail(&mut self, error: Error) {
        let failed = Step::Failed(error.reason(), error.to_string());
        let step = [&mut self.namespace, &mut self.network, &mut self.quota, &mut self.runtime]
            .into_iter()
            .find(|step| !matches!(step, Step::Done));
        if let Some(step) = step {
            *step = failed;
        }
        self.error = Some(error);
    }
}

/// Applies what the course wants.
pub async fn apply(
    operator: &Operator,
    tenant: &Tenant,
    facts: &Facts,
    course: Course,
    wanted: &Wanted,
    addresses: &Addresses,
) -> Applied {
    let mut applied = Applied::default();
    if !course.has_namespace() {
        return applied;
    }
    if let Course::Draining { since, is_over: false } = course {
        // Nothing else happens when the time is over.
        let waited = (clock::now() - since).to_std().unwrap_or_default();
        applied.look_again(Some(operator.settings.drain().saturating_sub(waited)));
    }
    let result = match course {
        Course::Draining { is_over: true, .. } => remove(operator, tenant, facts, &mut applied).await,
        _ => apply_all(operator, tenant, facts, course, wanted, addresses, &mut applied).await,
    };
    if let Err(error) = result {
        applied.fail(error);
    }
    applied
}

async fn apply_all(
    operator: &Operator,
    tenant: &Tenant,
    facts: &Facts,
    course: Course,
    wanted: &Wanted,
    addresses: &Addresses,
    applied: &mut Applied,
) -> Result<(), Error> {
    let (step, live) = namespace::settle(operator, tenant, facts, wanted).await?;
    applied.namespace = step;
    applied.live_namespace = live;
    if applied.live_namespace.is_none() {
        if matches!(applied.namespace, Step::Waiting("NamespaceExists", _)) {
            applied.look_again(Some(NAMESPACE_AGAIN));
        }
        return Ok(());
    }
    let cluster = &operator.cluster;
    settle(operator, &cluster.policies, &build_network_policy(wanted, &operator.settings, addresses)).await?;
    applied.network = Step::Done;
    settle(operator, &cluster.quotas, &build_resource_quota(wanted)).await?;
    settle(operator, &cluster.limits, &build_limit_range(wanted)).await?;
    applied.quota = Step::Done;
    runtime::settle_runtime(operator, tenant, facts, course, wanted, applied).await
}

/// Removes a namespace whose runs have ended: the one that the status names.
async fn remove(operator: &Operator, tenant: &Tenant, facts: &Facts, applied: &mut Applied) -> Result<(), Error> {
    let Some(live) = facts.own_namespace() else { return Ok(()) };
    applied.deployment = facts.deployment.clone();
    applied.live_namespace = Some(live.clone());
    if is_in_status(tenant, live) && live.metadata.deletion_timestamp.is_none() {
        write::delete_namespace(operator, &live.name_any(), &live.uid().unwrap_or_default()).await?;
    }
    let message = namespace::terminating(live);
    applied.namespace = Step::Waiting("Removing", message);
    // The status names it by the next look, should it not yet.
    applied.look_again(Some(NAMESPACE_AGAIN));
    Ok(())
}
