//! The workers' token: made through the api, changed every day, told from the Secret's annotations.

use std::time::Instant;

use chrono::{DateTime, TimeDelta, Utc};
use crds::protocol::{TOKEN_SECONDS, TokenRequest};
use k8s_openapi::api::core::v1::Secret;
use kube::ResourceExt;
use kube::api::PartialObjectMeta;

use super::write::{self, is_foreign};
use crate::api::ApiError;
use crate::build::access::{build_secret, read_rotation};
use crate::build::{NAME, build_labels};
use crate::clock;
use crate::error::Error;
use crate::operator::Operator;
use crate::wanted::Wanted;

/// How long a token is used.
const LIFE: TimeDelta = TimeDelta::hours(24);

/// What has become of the token.
#[derive(Debug)]
pub struct Rotation {
    /// Why there is none, or none anew.
    pub trouble: Option<ApiError>,
    /// Whether workers have one.
    pub is_there: bool,
    /// When the next one is due; none if it is due now.
    pub due_in: Option<std::time::Duration>,
}

/// Sees to it that the Secret holds a token that is not too old.
///
/// # Errors
/// The Secret can't be written. That the api is away is no error: workers go on with the token that they have.
pub async fn settle(operator: &Operator, wanted: &Wanted) -> Result<Rotation, Error> {
    let live = operator.cluster.secrets.get(Some(&wanted.namespace), NAME);
    let now = clock::now();
    let current = live.as_deref().and_then(|live| current(live, wanted, now));
    // An api that was restored from a backup may have forgotten it; an admin may have revoked it.
    let working = operator.memory.with(&wanted.tenant, |entry| entry.working_rotation);
    let works = |current: &Current| working.is_none_or(|working| current.rotation <= working);
    if let Some(Current { due_in: Some(due_in), .. }) = current.filter(works) {
        return Ok(Rotation { trouble: None, is_there: true, due_in: Some(due_in) });
    }
    let is_there = live.is_some();
    if live.is_some_and(|live| live.metadata.deletion_timestamp.is_some()) {
        return Ok(Rotation { trouble: None, is_there, due_in: None });
    }
    // Counted by the clock, so that it rises even when the Secret and what it told are lost.
    let rotation = operator.memory.with(&wanted.tenant, |entry| {
        let after = current.map_or(0, |current| current.rotation + 1);
        if entry.rotation == 0 || entry.rotation < after {
            entry.rotation = after.max(now.timestamp());
        }
        entry.rotation
    });
    let token = match operator.api.token(&wanted.tenant, TokenRequest { rotation }).await {
        Ok(token) => token,
        Err(error) => {
            // The answer may have been lost: the same one again takes the lost one's place. One that is refused is not.
            if !error.is_away() {
                operator.memory.with(&wanted.tenant, |entry| entry.rotation = 0);
            }
            return Ok(Rotation { trouble: Some(error), is_there, due_in: None });
        }
    };
    operator.memory.with(&wanted.tenant, |entry| {
        (entry.rotated, entry.working_rotation) = (Some(Instant::now()), Some(rotation));
    });
    write::secret(operator, build_secret(wanted, &token, rotation)).await?;
    // The next one is another one, even if this Secret is lost at once.
    operator.memory.with(&wanted.tenant, |entry| entry.rotation = rotation + 1);
    tracing::info!(tenant = %wanted.tenant, token = %token.id, rotation, "workers have a new token");
    Ok(Rotation { trouble: None, is_there: true, due_in: due_in(token.expires_at, now) })
}

/// When a token is to be replaced; none: now.
fn due_in(expires_at: DateTime<Utc>, now: DateTime<Utc>) -> Option<std::time::Duration> {
    let due_at = expires_at - TimeDelta::seconds(TOKEN_SECONDS) + LIFE;
    (due_at - now).to_std().ok().filter(|due_in| !due_in.is_zero())
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Current {
    rotation: i64,
    due_in: Option<std::time::Duration>,
}

/// What the Secret tells of its token. One that others wrote to is due at once: nobody reads whether its token is still
/// ours.
fn current(live: &PartialObjectMeta<Secret>, wanted: &Wanted, now: DateTime<Utc>) -> Option<Current> {
    let (rotation, expires_at) = read_rotation(live.annotations())?;
    let meta = &live.metadata;
    let is_ours = !is_foreign(meta)
        && meta.labels.as_ref() == Some(&build_labels(&wanted.tenant))
        && meta.owner_references.as_ref().is_none_or(Vec::is_empty)
        && meta.finalizers.as_ref().is_none_or(Vec::is_empty);
    Some(Current { rotation, due_in: due_in(expires_at, now).filter(|_| is_ours) })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use crds::protocol::Token;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::ManagedFieldsEntry;
    use serde_json::json;

    use super::*;
    use crate::build::FIELD_MANAGER;
    use crate::wanted::samples::wanted;

    fn time(hours: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(1_800_000_000, 0).unwrap() + TimeDelta::hours(hours)
    }

    #[test]
    fn a_token_is_due_after_a_day_or_when_others_wrote() {
        let wanted = wanted(json!({}));
        let expires_at = time(0) + TimeDelta::seconds(TOKEN_SECONDS);
        let token = Token { id: "rtk_1".to_owned(), token: "clr_1".to_owned(), expires_at };
        let metadata = build_secret(&wanted, &token, 5).metadata;
        let mut live = PartialObjectMeta { types: None, metadata, _phantom: std::marker::PhantomData };
        let hour = Duration::from_secs(3_600);
        assert_eq!(current(&live, &wanted, time(0)).unwrap(), Current { rotation: 5, due_in: Some(24 * hour) });
        assert_eq!(current(&live, &wanted, time(23)).unwrap().due_in, Some(hour));
        assert_eq!(current(&live, &wanted, time(24)).unwrap().due_in, None);
        let by = |manager: &str| {
            Some(vec![ManagedFieldsEntry {
                manager: Some(manager.to_owned()),
                operation: Some("Update".to_owned()),
                ..ManagedFieldsEntry::default()
            }])
        };
        live.metadata.managed_fields = by(FIELD_MANAGER);
        assert!(current(&live, &wanted, time(0)).unwrap().due_in.is_some());
        live.metadata.managed_fields = by("kubectl-edit");
        assert_eq!(current(&live, &wanted, time(0)).unwrap().due_in, None);
        live.metadata.managed_fields = None;
        live.metadata.labels = None;
        assert_eq!(current(&live, &wanted, time(0)).unwrap().due_in, None);
        live.metadata.annotations = None;
        assert_eq!(current(&live, &wanted, time(0)), None);
    }
}
