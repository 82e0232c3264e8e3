//! Who may speak as an operator: whoever has the configured key, or the operator's ServiceAccount, whose tokens the
//! cluster reviews.

use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use dashmap::DashMap;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use kube::Api;
use kube::api::PostParams;
use secrecy::ExposeSecret;
use serde::Deserialize;
use subtle::ConstantTimeEq;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};

use super::refused::Refused;
use crate::app::App;
use crate::secrets::sha256_hex;
use crds::protocol::RefusalCode;

/// How long a token that the cluster knows is let in without asking again.
const TRUST: Duration = Duration::from_secs(10);
/// How long one that was let in still is while the cluster can't be asked.
const GRACE: Duration = Duration::from_secs(120);
/// Reviews at once: tenants' workers reach this door, too, and must not make the api flood the cluster.
const MAX_REVIEWS: usize = 4;
/// How long the cluster may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// The longest token that is worth asking for, in bytes.
const MAX_TOKEN: usize = 8 * 1024;
/// Tokens that are remembered. Past it all are forgotten.
const MAX_KEPT: usize = 1_000;

/// Tokens that the cluster knew a moment ago, by their SHA-256, and the reviews under way.
pub struct Reviews {
    known: DashMap<String, Instant>,
    places: Semaphore,
}

impl Default for Reviews {
    fn default() -> Self {
        Self { known: DashMap::new(), places: Semaphore::new(MAX_REVIEWS) }
    }
}

impl Reviews {
    fn knows(&self, hash: &str, lately: Duration) -> bool {
        self.known.get(hash).is_some_and(|reviewed| reviewed.elapsed() < lately)
    }

    fn keep(&self, hash: String) {
        if self.known.len() >= MAX_KEPT {
            self.known.clear();
        }
        self.known.insert(hash, Instant::now());
    }
}

/// Lets an operator in that speaks for a cluster. A ServiceAccount speaks for the cluster that it is of.
///
/// # Errors
/// The credential is not an operator's, or not that cluster's, or nobody can tell now.
pub async fn verify(app: &App, credential: Option<&str>, cluster: &str) -> Result<(), Refused> {
    let config = &app.config.cluster;
    if config.operator_key.is_none() && config.operator_service_account.is_none() {
        return Err(Refused::unavailable(
            "This api has no operators: configure cluster.operator_service_account or cluster.operator_key.",
        ));
    }
    let token = credential.ok_or_else(|| refused("Send the operator's credential as `Authorization: Bearer`."))?;
    let hash = sha256_hex(token);
    if let Some(key) = &config.operator_key
        && bool::from(sha256_hex(key.expose_secret()).as_bytes().ct_eq(hash.as_bytes()))
    {
        return Ok(());
    }
    let Some(account) = &config.operator_service_account else { return Err(refused(UNKNOWN)) };
    verify_account(app, token, hash, account).await?;
    let own = app.cluster.id().await.map_err(|problem| {
        tracing::warn!(?problem, "the cluster's own UID can't be read");
        Refused::unavailable("The api can't tell now which cluster it is in. Try again.")
    })?;
    if own == cluster { Ok(()) } else { Err(refused("This credential speaks for another cluster.")) }
}

async fn verify_account(app: &App, token: &str, hash: String, account: &str) -> Result<(), Refused> {
    let config = &app.config.cluster;
    let reviews = &app.cluster.reviews;
    if reviews.knows(&hash, TRUST) {
        return Ok(());
    }
    if token.len() > MAX_TOKEN || !claims_to_be(token, account, &config.audience) {
        return Err(refused(UNKNOWN));
    }
    let status = match review(app, token).await {
        Ok(status) => status,
        Err(_) if reviews.knows(&hash, GRACE) => return Ok(()),
        Err(away) => return Err(away),
    };
    if !is_account(&status, account, &config.audience) {
        reviews.known.remove(&hash);
        return Err(refused(UNKNOWN));
    }
    reviews.keep(hash);
    Ok(())
}

/// Whether a token says of itself what the review would have to confirm: others need none.
fn claims_to_be(token: &str, account: &str, audience: &str) -> bool {
    let mut parts = token.split('.');
    let (Some(_), Some(claims), Some(_), None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
        return false;
    };
    let Some(claims) = BASE64_URL_SAFE_NO_PAD.decode(claims).ok() else { return false };
    let Some(claims) = serde_json::from_slice::<Claims>(&claims).ok() else { return false };
    claims.aud.iter().any(|own| own == audience) && user_of(account).as_deref() == Some(claims.sub.as_str())
}

/// Of a ServiceAccount's token, which names a list of audiences.
#[derive(Deserialize)]
struct Claims {
    sub: String,
    aud: Vec<String>,
}

/// The user that a ServiceAccount (`namespace/name`) is.
fn user_of(account: &str) -> Option<String> {
    let (namespace, name) = account.split_once('/')?;
    Some(format!("system:serviceaccount:{namespace}:{name}"))
}

const UNKNOWN: &str = "This credential is not the operator's, or not for this api.";

fn refused(message: &str) -> Refused {
    Refused::new(RefusalCode::Unauthenticated, message)
}

async fn review(app: &App, token: &str) -> Result<TokenReviewStatus, Refused> {
    let away = |reason: String| {
        tracing::warn!(reason, "an operator's token can't be reviewed");
        Refused::unavailable("The cluster can't be asked now whether this credential is the operator's. Try again.")
    };
    let client = app.cluster.client.clone().ok_or_else(|| away("there is no way to a cluster".to_owned()))?;
    let spec = TokenReviewSpec { token: token.to_owned(), audiences: Some(vec![app.config.cluster.audience.clone()]) };
    let asked = TokenReview { spec, ..Default::default() };
    let api: Api<TokenReview> = Api::all(client);
    let parameters = PostParams::default();
    let _place =
        app.cluster.reviews.places.try_acquire().map_err(|_| away("too many reviews are under way".to_owned()))?;
    let answered = timeout(PATIENCE, api.create(&parameters, &asked)).await;
    let answered = answered.map_err(|_| away(format!("no answer within {} s", PATIENCE.as_secs())))?;
    Ok(answered.map_err(|error| away(error.to_string()))?.status.unwrap_or_default())
}

/// Whether the cluster says that the token is the ServiceAccount's (`namespace/name`), and for this audience. An API
/// server that doesn't know audiences names none, and its answer is not taken.
/// Source: <https://kubernetes.io/docs/reference/kubernetes-api/authentication-resources/token-review-v1/>.
fn is_account(status: &TokenReviewStatus, account: &str, audience: &str) -> bool {
    let user = status.user.as_ref().and_then(|user| user.username.as_deref());
    let named = user_of(account);
    status.authenticated == Some(true)
        && named.is_some()
        && user == named.as_deref()
        && status.audiences.iter().flatten().any(|own| own == audience)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::authentication::v1::UserInfo;

    use super::*;

    #[test]
    fn a_token_that_claims_nothing_of_the_kind_is_not_worth_a_review() {
        let token = |claims: &str| format!("e30.{}.c2ln", BASE64_URL_SAFE_NO_PAD.encode(claims));
        let is_worth = |token: &str| claims_to_be(token, "cloister/operator", "cloister-api");
        let sub = "system:serviceaccount:cloister:operator";
        assert!(is_worth(&token(&format!(r#"{{"sub": "{sub}", "aud": ["cloister-api"]}}"#))));
        for claims in [
            format!(r#"{{"sub": "{sub}", "aud": ["another"]}}"#),
            r#"{"sub": "system:serviceaccount:tenant-a:operator", "aud": ["cloister-api"]}"#.to_owned(),
            r#"{"aud": ["cloister-api"]}"#.to_owned(),
            "[]".to_owned(),
        ] {
            assert!(!is_worth(&token(&claims)), "{claims}");
        }
        assert!(!is_worth("a.b.c") && !is_worth("clr_x") && !is_worth(&format!("{}.x", token("{}"))));
    }

    #[test]
    fn only_the_account_for_the_audience_is_taken() {
        let status = |authenticated: bool, user: &str, audiences: &[&str]| TokenReviewStatus {
            authenticated: Some(authenticated),
            audiences: Some(audiences.iter().map(|&audience| audience.to_owned()).collect()),
            user: Some(UserInfo { username: Some(user.to_owned()), ..Default::default() }),
            error: None,
        };
        let operator = "system:serviceaccount:cloister:operator";
        let is_taken = |status| is_account(&status, "cloister/operator", "cloister-api");
        assert!(is_taken(status(true, operator, &["cloister-api"])));
        assert!(!is_taken(status(false, operator, &["cloister-api"])));
        assert!(!is_taken(status(true, "system:serviceaccount:tenant-a:operator", &["cloister-api"])));
        assert!(!is_taken(status(true, operator, &["https://kubernetes.default.svc"])));
        assert!(!is_taken(status(true, operator, &[])));
        assert!(!is_account(&status(true, "", &["cloister-api"]), "malformed", "cloister-api"));
    }
}
