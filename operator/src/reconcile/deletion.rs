//! The end of a tenant: no new runs, time for those that are going, then the namespace, then its place with the api, and
//! only then the object.

use std::time::Duration;

use chrono::{DateTime, Utc};
use crds::Tenant;
use crds::protocol::{Departure, Farewell};
use crds::status::{Isolation, NamespaceStatus, TenantStatus};
use crds::tenant::{ABANDON_ANNOTATION, DeletionPolicy, FINALIZER};
use kube::ResourceExt;

use super::course::{Facts, Standing};
use super::status::build_departure;
use super::{namespace, publish, write};
use crate::api::ApiError;
use crate::clock;
use crate::cluster::is_in_status;
use crate::error::Error;
use crate::operator::Operator;

/// How often the api is asked how far the end has come.
const LOOK: Duration = Duration::from_secs(1);
/// How often an api that is away is asked again; it tells when it is back, too.
const API_AGAIN: Duration = Duration::from_secs(5);
/// How long a namespace that was to be drained stays although the api can't say whether it is.
const API_PATIENCE: Duration = Duration::from_secs(30);

/// Takes the end of a tenant as far as it goes now. Answers when to look again.
///
/// # Errors
/// Something can't be written.
pub async fn depart(tenant: &Tenant, operator: &Operator) -> Result<Duration, Error> {
    if !tenant.finalizers().iter().any(|finalizer| finalizer == FINALIZER) {
        return Ok(Duration::MAX);
    }
    let facts = Facts::observe(tenant, operator, Standing::Remembered, None);
    let end = End { tenant, operator, now: clock::now() };
    if let Some(live) = facts.own_namespace() {
        // Only the namespace that the status names is ever deleted.
        if !is_in_status(tenant, live) {
            let known = NamespaceStatus { name: live.name_any(), uid: live.uid().unwrap_or_default() };
            let status = TenantStatus { namespace: Some(known), ..tenant.status.clone().unwrap_or_default() };
            write::status(operator, tenant, &status).await?;
            return Ok(LOOK);
        }
        if live.metadata.deletion_timestamp.is_none() {
            if let Some(again) = end.drain().await? {
                return Ok(again);
            }
            write::delete_namespace(operator, &live.name_any(), &live.uid().unwrap_or_default()).await?;
        }
        end.say("RemovingNamespace", &namespace::terminating(live)).await?;
        return Ok(API_AGAIN);
    }
    let had_namespace = tenant.status.as_ref().is_some_and(|status| status.isolation == Some(Isolation::Namespace));
    if !had_namespace && let Some(again) = end.drain().await? {
        return Ok(again);
    }
    end.deregister().await
}

struct End<'a> {
    tenant: &'a Tenant,
    operator: &'a Operator,
    now: DateTime<Utc>,
}

impl End<'_> {
    /// Stops new runs and waits for those that are going, up to the grace period. None when there is no more to wait for.
    async fn drain(&self) -> Result<Option<Duration>, Error> {
        let waited = self.waited();
        let is_late = waited >= self.operator.settings.drain();
        match self.farewell(is_late, false).await {
            Ok(departure) if departure.running > 0 && !is_late => {
                let left = self.operator.settings.drain().saturating_sub(waited).as_secs();
                tracing::debug!(tenant = %self.tenant.name_any(), left, "runs are still going");
                self.say("Draining", "No new runs start; those that are going have the grace period to end.").await?;
                Ok(Some(LOOK))
            }
            Err(error) if error.is_away() && !self.is_abandoned() && !is_late && waited < API_PATIENCE => {
                self.say(error.reason(), "The api can't say whether runs are still going.").await?;
                Ok(Some(LOOK))
            }
            _ => Ok(None),
        }
    }

    /// Has the api let go of the object, then lets go of it.
    async fn deregister(&self) -> Result<Duration, Error> {
        match self.farewell(true, true).await {
            Ok(departure) if !departure.is_gone => {
                self.say("Deregistering", "The api is ending what is left of the tenant.").await?;
                return Ok(LOOK);
            }
            Err(error) if !self.is_abandoned() && !error.is_not_found() => {
                let message = match error.is_away() {
                    true => format!(
                        "Nothing of the tenant is left in the cluster, and the api can't be told. It is tried again; \
                         the annotation {ABANDON_ANNOTATION}=true ends the wait."
                    ),
                    false => format!("{error} The annotation {ABANDON_ANNOTATION}=true ends the wait."),
                };
                self.say(error.reason(), &message).await?;
                return Ok(API_AGAIN);
            }
            _ => {}
        }
        write::remove_finalizer(&self.operator.client, self.tenant).await?;
        tracing::info!(tenant = %self.tenant.name_any(), "the tenant is gone");
        Ok(Duration::MAX)
    }

    async fn farewell(&self, cancel: bool, deregister: bool) -> Result<Departure, ApiError> {
        let farewell = Farewell {
            uid: self.tenant.uid().unwrap_or_default(),
            retain: self.tenant.spec.deletion_policy == DeletionPolicy::Retain,
            cancel,
            deregister,
        };
        self.operator.api.farewell(&self.tenant.name_any(), &farewell).await
    }

    async fn say(&self, reason: &str, message: &str) -> Result<(), Error> {
        let mut status = build_departure(self.tenant, reason, message, self.now);
        let facts = Facts::observe(self.tenant, self.operator, Standing::Remembered, None);
        if facts.own_namespace().is_none() {
            status.namespace = None;
            status.runtime = None;
        }
        publish(self.operator, self.tenant, &status).await
    }

    fn is_abandoned(&self) -> bool {
        self.tenant.annotations().get(ABANDON_ANNOTATION).is_some_and(|value| value == "true")
    }

    /// How long ago the object was deleted.
    fn waited(&self) -> Duration {
        let deleted = self.tenant.metadata.deletion_timestamp.as_ref();
        let deleted = deleted.map_or(self.now.timestamp(), |time| time.0.as_second());
        Duration::from_secs(u64::try_from(self.now.timestamp() - deleted).unwrap_or_default())
    }
}
