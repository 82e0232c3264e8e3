//! A look at a tenant, in five steps: find out what holds, check what is wanted, build it, apply it, write the status.

pub mod apply;
pub mod course;
pub mod deletion;
pub mod events;
pub mod namespace;
pub mod runtime;
pub mod status;
pub mod token;
pub mod write;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crds::Tenant;
use crds::protocol::{Provisioning, Registration, Report, State};
use crds::status::{ConditionStatus, TenantStatus};
use crds::tenant::FINALIZER;
use kube::ResourceExt;
use kube::runtime::controller::Action;
use metrics::{counter, gauge, histogram};

use self::course::{Facts, Standing};
use crate::api::ApiError;
use crate::clock;
use crate::error::Error;
use crate::operator::Operator;
use crate::wanted::{Addresses, validate};

/// A tenant is looked at that often at least, whatever happens.
const RESYNC: Duration = Duration::from_secs(1_800);
/// An api that was away is asked again after this long; it tells when it is back, too.
const API_AGAIN: Duration = Duration::from_secs(10);
/// A generation that the api refused is told again after this long.
const REFUSED_AGAIN: Duration = Duration::from_secs(60);
const FIRST_BACKOFF: Duration = Duration::from_millis(250);
const LONGEST_BACKOFF: Duration = Duration::from_secs(60);

/// A look at a tenant.
///
/// # Errors
/// Something could not be written; the look is to be taken again.
pub async fn reconcile(tenant: Arc<Tenant>, operator: Arc<Operator>) -> Result<Action, Error> {
    let begun = Instant::now();
    gauge!("cloister_operator_reconciles_in_flight").increment(1);
    let name = tenant.name_any();
    operator.memory.meet(&name, &tenant.uid().unwrap_or_default());
    let result = match tenant.metadata.deletion_timestamp {
        Some(_) => deletion::depart(&tenant, &operator).await,
        None => keep(&tenant, &operator).await,
    };
    gauge!("cloister_operator_reconciles_in_flight").decrement(1);
    histogram!("cloister_operator_reconcile_duration_seconds").record(begun.elapsed());
    let outcome = if result.is_ok() { "ok" } else { "error" };
    counter!("cloister_operator_reconciles_total", "outcome" => outcome).increment(1);
    match result {
        Ok(again) => {
            operator.memory.with(&name, |entry| entry.failures = 0);
            Ok(Action::requeue(again.min(RESYNC).mul_f64(rand::random_range(0.9..1.0))))
        }
        Err(error) => Err(error),
    }
}

/// When to look again after a failure: later each time, and not all at once.
pub fn back_off(tenant: &Tenant, error: &Error, operator: &Operator) -> Action {
    let name = tenant.name_any();
    counter!("cloister_operator_reconcile_errors_total", "reason" => error.reason()).increment(1);
    let failures = operator.memory.with(&name, |entry| {
        entry.failures = entry.failures.saturating_add(1);
        entry.failures
    });
    // Somebody else wrote in between: that is everyday life.
    if error.is_conflict() && failures < 3 {
        tracing::debug!(tenant = %name, %error, "looking again");
    } else {
        tracing::warn!(tenant = %name, failures, %error, "a tenant could not be put right; looking again");
    }
    let pause = FIRST_BACKOFF.saturating_mul(1 << (failures - 1).min(16)).min(LONGEST_BACKOFF);
    Action::requeue(pause.mul_f64(rand::random_range(0.5..1.0)))
}

/// Keeps a tenant as its spec wants it. Answers when to look again at the latest.
async fn keep(tenant: &Arc<Tenant>, operator: &Operator) -> Result<Duration, Error> {
    let with_finalizer;
    let tenant = if tenant.finalizers().iter().any(|finalizer| finalizer == FINALIZER) {
        tenant.as_ref()
    } else {
        with_finalizer = write::add_finalizer(operator, tenant).await?;
        &with_finalizer
    };
    let now = clock::now();
    let facts = dereference(tenant, operator).await;
    let course = course::chart(tenant, &facts, now, operator.settings.drain());
    let addresses = Addresses { api_server: operator.cluster.api_server() };
    let wanted = validate(tenant, facts.namespace_name(), &operator.settings, &addresses)?;
    let mut applied = apply::apply(operator, tenant, &facts, course, &wanted, &addresses).await;

    // Somebody else wrote in between: there is nothing to tell of before another look.
    if let Some(error) = applied.error.take_if(|error| error.is_conflict()) {
        return Err(error);
    }

    let name = tenant.name_any();
    let usage_age = operator.memory.with(&name, |entry| entry.usage_written.map(|at| at.elapsed()));
    let look = status::Look { tenant, facts: &facts, course, wanted: &wanted, applied: &applied, usage_age, now };
    let status = status::build_status(&look);
    publish(operator, tenant, &status).await?;
    let told = tell(operator, tenant, &status, &facts).await;

    if let Some(error) = applied.error {
        return Err(error);
    }
    let again = [applied.again, look_for_usage(&facts, &status, usage_age), told];
    Ok(again.into_iter().flatten().min().unwrap_or(RESYNC))
}

/// Step one: what the api says, and what is there.
async fn dereference(tenant: &Tenant, operator: &Operator) -> Facts {
    let trouble = register(tenant, operator).await.err();
    let state = operator.memory.with(&tenant.name_any(), |entry| entry.state.clone());
    let is_registered = tenant.status.as_ref().is_some_and(|status| status.tenant_id.is_some());
    let is_away = trouble.as_ref().is_some_and(ApiError::is_away);
    let generation = tenant.metadata.generation;
    let standing = match state {
        // An api that knows an older spec, and can't be told of this one now, decides nothing: it may have been restored.
        Some(state) if is_away && is_registered && state.generation.is_some() && state.generation != generation => {
            Standing::Remembered
        }
        // Told by name; that it is this object's only a registration tells.
        Some(state) if trouble.is_none() || is_registered => Standing::Held(state),
        _ if is_registered => Standing::Remembered,
        _ => Standing::Unregistered,
    };
    Facts::observe(tenant, operator, standing, trouble)
}

/// Tells the api what the object says, unless it knows.
async fn register(tenant: &Tenant, operator: &Operator) -> Result<(), ApiError> {
    let name = tenant.name_any();
    let generation = tenant.metadata.generation.unwrap_or_default();
    let status = tenant.status.as_ref();
    let is_known = operator.memory.with(&name, |entry| {
        // After a start the status tells what the api acknowledged before, and the api what holds now.
        let told_before = status.is_some_and(|status| {
            let registered = status.condition("Registered");
            registered.is_some_and(|it| it.status == ConditionStatus::True && it.observed_generation == generation)
        });
        let holds_it = |state: &State| state.generation.is_none_or(|held| held == generation);
        entry.state.as_ref().is_some_and(holds_it) && (entry.acknowledged == Some(generation) || told_before)
    });
    if is_known {
        return Ok(());
    }
    let refused = operator.memory.with(&name, |entry| entry.refused.clone());
    if let Some((_, error, _)) = refused.filter(|(of, _, at)| *of == generation && at.elapsed() < REFUSED_AGAIN) {
        return Err(error);
    }
    let provisioning = status.map(provisioning).unwrap_or_default();
    match operator.api.report(&name, &report(tenant, provisioning)).await {
        Ok(state) => {
            operator.memory.told(&name, state);
            operator.memory.with(&name, |entry| {
                entry.acknowledged = Some(generation);
                entry.refused = None;
            });
            Ok(())
        }
        Err(error) => {
            if !error.is_away() {
                operator.memory.with(&name, |entry| entry.refused = Some((generation, error.clone(), Instant::now())));
            }
            Err(error)
        }
    }
}

fn report(tenant: &Tenant, provisioning: Provisioning) -> Report {
    let spec = &tenant.spec;
    Report {
        uid: tenant.uid().unwrap_or_default(),
        generation: tenant.metadata.generation.unwrap_or_default(),
        tenant: Registration {
            tenant_id: spec.tenant_id.clone(),
            display_name: spec.display_name.clone(),
            email: spec.email.clone(),
            plan: spec.plan.as_str().to_owned(),
            monthly_token_limit: spec.monthly_token_limit,
            suspended: spec.suspended,
        },
        provisioning,
    }
}

fn provisioning(status: &TenantStatus) -> Provisioning {
    let runtime = status.runtime.as_ref();
    Provisioning {
        phase: status.phase.as_str().to_owned(),
        namespace: status.namespace.as_ref().map(|namespace| namespace.name.clone()),
        replicas: runtime.map_or(0, |runtime| runtime.replicas),
        ready_replicas: runtime.map_or(0, |runtime| runtime.ready_replicas),
        conditions: status.conditions.iter().map(Into::into).collect(),
    }
}

/// Writes the status if it is another one, and tells of what changed.
async fn publish(operator: &Operator, tenant: &Tenant, status: &TenantStatus) -> Result<(), Error> {
    if tenant.status.as_ref() == Some(status) {
        return Ok(());
    }
    write::status(operator, tenant, status).await?;
    if tenant.status.as_ref().and_then(|before| before.usage.as_ref()) != status.usage.as_ref() {
        operator.memory.with(&tenant.name_any(), |entry| entry.usage_written = Some(Instant::now()));
    }
    events::tell(operator, tenant, status).await;
    Ok(())
}

/// Tells the api how far the cluster has come. An api that is away is told when it is back. Answers when to look again.
async fn tell(operator: &Operator, tenant: &Tenant, status: &TenantStatus, facts: &Facts) -> Option<Duration> {
    if let Some(trouble) = &facts.trouble {
        return Some(if trouble.is_away() { API_AGAIN } else { REFUSED_AGAIN });
    }
    let name = tenant.name_any();
    let provisioning = provisioning(status);
    if operator.memory.with(&name, |entry| entry.reported.as_ref() == Some(&provisioning)) {
        return None;
    }
    match operator.api.report(&name, &report(tenant, provisioning.clone())).await {
        Ok(state) => {
            operator.memory.with(&name, |entry| entry.reported = Some(provisioning));
            // What holds may have changed since it was asked for.
            operator.memory.told(&name, state).then_some(Duration::ZERO)
        }
        Err(error) => {
            tracing::debug!(tenant = %name, %error, "the api was not told how far the cluster has come");
            Some(API_AGAIN)
        }
    }
}

/// When usage that the status doesn't show yet may be written.
fn look_for_usage(facts: &Facts, status: &TenantStatus, age: Option<Duration>) -> Option<Duration> {
    let Standing::Held(state) = &facts.standing else { return None };
    let is_shown = status.usage.as_ref().is_some_and(|usage| !status::is_news(usage, &state.usage));
    (!is_shown).then(|| status::USAGE_EVERY.saturating_sub(age.unwrap_or_default()))
}
