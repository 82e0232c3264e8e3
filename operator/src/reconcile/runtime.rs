//! The tenant's workers: how many, of which image, with which token.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crds::Tenant;
use k8s_openapi::api::apps::v1::Deployment;

use super::apply::{Applied, Step};
use super::course::{Course, Facts, Standing};
use super::token;
use super::write::{is_foreign, settle};
use crate::build::access::build_service_account;
use crate::build::workload::{build_deployment, build_pod_disruption_budget};
use crate::error::Error;
use crate::operator::Operator;
use crate::rollout::image;
use crate::scaling::recommend;
use crate::wanted::{Scale, Wanted};

/// A tenant that waits for its turn with a new image asks again after this long.
const ROLLOUT_AGAIN: Duration = Duration::from_secs(5);
/// The api is asked for a token again after this long.
const TOKEN_AGAIN: Duration = Duration::from_secs(10);

/// Makes the workers as they are to be.
///
/// # Errors
/// Something can't be written.
pub async fn settle_runtime(
    operator: &Operator,
    tenant: &Tenant,
    facts: &Facts,
    course: Course,
    wanted: &Wanted,
    applied: &mut Applied,
) -> Result<(), Error> {
    settle(operator, &operator.cluster.accounts, &build_service_account(wanted)).await?;
    let rotation = token::settle(operator, wanted).await?;
    applied.look_again(rotation.due_in.or(Some(TOKEN_AGAIN)));
    if let Some(trouble) = &rotation.trouble
        && !rotation.is_there
    {
        applied.runtime = Step::Waiting(trouble.reason(), "Workers wait for a token, which the api makes.".to_owned());
        if facts.deployment.is_none() {
            return Ok(());
        }
    }

    let (replicas, look_again) = replicas(operator, tenant, facts, course, wanted);
    applied.look_again(look_again);
    applied.replicas = replicas;
    // A class that isn't allowed must neither be used nor quietly left out.
    if wanted.refused_classes.is_empty() {
        let mut desired = build_deployment(wanted, &operator.settings, replicas);
        if let Some(live) = &facts.deployment
            && must_wait(operator, live, &desired, &wanted.namespace)
        {
            keep_template(&mut desired, live);
            applied.look_again(Some(ROLLOUT_AGAIN));
        }
        applied.deployment = Some(settle(operator, &operator.cluster.deployments, &desired).await?);
    } else {
        applied.deployment = facts.deployment.clone();
    }
    settle(operator, &operator.cluster.budgets, &build_pod_disruption_budget(wanted)).await?;
    if matches!(applied.runtime, Step::NotReached) {
        applied.runtime = Step::Done;
    }
    Ok(())
}

/// How many workers there are to be, and when to look again.
fn replicas(
    operator: &Operator,
    tenant: &Tenant,
    facts: &Facts,
    course: Course,
    wanted: &Wanted,
) -> (i32, Option<Duration>) {
    let live = facts.deployment.as_ref().and_then(|deployment| deployment.spec.as_ref()?.replicas);
    if facts.suspension(tenant).is_some() {
        return (0, None);
    }
    // Workers finish what they have.
    if matches!(course, Course::Draining { .. })
        && let Some(live) = live
    {
        return (live, None);
    }
    let autoscaling = match wanted.scale {
        Scale::Fixed(replicas) => return (replicas, None),
        Scale::Runs(autoscaling) => autoscaling,
    };
    // None after a suspension is no measure of what was needed.
    let within = |replicas: i32| replicas.min(autoscaling.max_replicas).max(autoscaling.min_replicas);
    let live = live.filter(|live| *live > 0).map(within);
    let Standing::Held(state) = &facts.standing else {
        return (live.unwrap_or(autoscaling.min_replicas), None);
    };
    let (now, period) = (Instant::now(), operator.settings.scale_down());
    operator.memory.with(&wanted.tenant, |entry| {
        if entry.window.is_empty()
            && let Some(live) = live
        {
            // What there was before this operator started was recommended by somebody.
            entry.window.settle(now, live, period);
        }
        let (replicas, look_again) = entry.window.settle(now, recommend(&autoscaling, &state.runs), period);
        (within(replicas), look_again)
    })
}

/// Whether a new image has to wait for others' rollouts. Workers that somebody else changed do not: what they run is not
/// known to be ours.
fn must_wait(operator: &Operator, live: &Arc<Deployment>, desired: &Deployment, namespace: &str) -> bool {
    let replicas = live.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or_default();
    if image(live) == image(desired) || replicas == 0 || is_foreign(&live.metadata) {
        return false;
    }
    !operator.rollouts.admits(namespace, &operator.settings.runtime_image, &operator.cluster.deployments.summaries())
}

fn keep_template(desired: &mut Deployment, live: &Deployment) {
    if let (Some(desired), Some(live)) = (&mut desired.spec, &live.spec) {
        desired.template = live.template.clone();
    }
}
