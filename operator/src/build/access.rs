//! Who the tenant's workers are: nobody to Kubernetes, and the bearers of a token to the api.

use std::collections::BTreeMap;

use chrono::{DateTime, SecondsFormat, Utc};
use crds::protocol::Token;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{Secret, ServiceAccount};
use sha2::{Digest, Sha256};

use super::build_metadata;
use crate::wanted::Wanted;

/// The key of the Secret that holds the token.
pub const TOKEN_KEY: &str = "token";
/// Annotation of the Secret: the token's id.
pub const TOKEN_ID: &str = "cloister.dev/token-id";
/// Annotation of the Secret: the token's SHA-256, by which a person finds out which one a worker has.
pub const TOKEN_SHA256: &str = "cloister.dev/token-sha256";
/// Annotation of the Secret: when the token stops working.
pub const EXPIRES_AT: &str = "cloister.dev/expires-at";
/// Annotation of the Secret: which rotation made the token.
pub const ROTATION: &str = "cloister.dev/rotation";

/// An account without a token: workers have no business with the Kubernetes API.
pub fn build_service_account(wanted: &Wanted) -> ServiceAccount {
    ServiceAccount {
        metadata: build_metadata(wanted),
        automount_service_account_token: Some(false),
        ..ServiceAccount::default()
    }
}

/// The workers' token and nothing else; its annotations tell all that a rotation is decided by.
pub fn build_secret(wanted: &Wanted, token: &Token, rotation: i64) -> Secret {
    let digest = Sha256::digest(token.token.as_bytes());
    let annotations = BTreeMap::from([
        (TOKEN_ID.to_owned(), token.id.clone()),
        (TOKEN_SHA256.to_owned(), digest.iter().map(|byte| format!("{byte:02x}")).collect()),
        (EXPIRES_AT.to_owned(), token.expires_at.to_rfc3339_opts(SecondsFormat::Secs, true)),
        (ROTATION.to_owned(), rotation.to_string()),
    ]);
    let mut metadata = build_metadata(wanted);
    metadata.annotations = Some(annotations);
    Secret {
        metadata,
        type_: Some("Opaque".to_owned()),
        data: Some(BTreeMap::from([(TOKEN_KEY.to_owned(), ByteString(token.token.clone().into_bytes()))])),
        ..Secret::default()
    }
}

/// What the annotations of the Secret tell; none if they are not as we write them.
pub fn read_rotation(annotations: &BTreeMap<String, String>) -> Option<(i64, DateTime<Utc>)> {
    let ours = [TOKEN_ID, TOKEN_SHA256, EXPIRES_AT, ROTATION];
    if annotations.len() != ours.len() || !ours.iter().all(|key| annotations.contains_key(*key)) {
        return None;
    }
    let expires_at = DateTime::parse_from_rfc3339(annotations.get(EXPIRES_AT)?).ok()?;
    Some((annotations.get(ROTATION)?.parse().ok()?, expires_at.to_utc()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::wanted::samples::wanted;

    #[test]
    fn a_secret_tells_of_its_rotation() {
        let expires_at = DateTime::from_timestamp(1_800_000_000, 0).unwrap();
        let token = Token { id: "rtk_1".to_owned(), token: "clr_secret".to_owned(), expires_at };
        let secret = build_secret(&wanted(json!({})), &token, 7);
        let annotations = secret.metadata.annotations.unwrap();
        assert_eq!(read_rotation(&annotations), Some((7, expires_at)));
        assert!(!annotations.values().any(|value| value.contains("clr_secret")));
        let mut more = annotations.clone();
        more.insert("x".to_owned(), "y".to_owned());
        assert_eq!(read_rotation(&more), None);
        assert_eq!(read_rotation(&BTreeMap::new()), None);
    }
}
