//! Sealing secrets at rest: AES-256-GCM under a key from the configuration, bound to their tenant.
//!
//! A sealed text is `v1.KEYID.BASE64(nonce, ciphertext)`; the key id lets keys be rotated.

use aes_gcm::aead::{Aead, Generate, KeyInit, Payload};
use aes_gcm::{Aes256Gcm, Key, Nonce};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use secrecy::ExposeSecret;
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::config::{ConfigError, SecretsConfig};
use crate::error::Error;

/// Seals and opens. The newest key seals; every configured one opens.
pub struct Vault {
    keys: Vec<(String, Aes256Gcm)>,
}

impl Vault {
    /// Reads the keys; `secrets.key` must be there.
    pub fn new(config: &SecretsConfig) -> Result<Self, ConfigError> {
        let first = config.key.as_ref().ok_or_else(|| {
            ConfigError(
                "secrets.key is missing: set CLOISTER_SECRETS__KEY to 32 random bytes in base64 (`openssl rand -base64 32`)"
                    .to_owned(),
            )
        })?;
        let keys = std::iter::once(("secrets.key", first))
            .chain(config.previous_keys.iter().map(|key| ("secrets.previous_keys", key)))
            .map(|(field, key)| {
                let bytes = BASE64
                    .decode(key.expose_secret().trim())
                    .map_err(|_| ConfigError(format!("{field} is not base64")))?;
                let key = Key::<Aes256Gcm>::try_from(bytes.as_slice())
                    .map_err(|_| ConfigError(format!("{field} must be 32 bytes in base64, it has {}", bytes.len())))?;
                Ok((hex(&Sha256::digest(&bytes)[..4]), Aes256Gcm::new(&key)))
            })
            .collect::<Result<_, ConfigError>>()?;
        Ok(Self { keys })
    }

    /// Seals a tenant's secret.
    pub fn seal(&self, tenant_id: Uuid, secret: &str) -> Result<String, Error> {
        let (id, cipher) = self.keys.first().ok_or_else(|| Error::internal("no key to seal with"))?;
        let nonce = Nonce::generate();
        let payload = Payload { msg: secret.as_bytes(), aad: tenant_id.as_bytes() };
        let sealed = cipher.encrypt(&nonce, payload).map_err(|_| Error::internal("sealing failed"))?;
        let mut bytes = nonce.to_vec();
        bytes.extend(sealed);
        Ok(format!("v1.{id}.{}", BASE64.encode(bytes)))
    }

    /// Opens what [`Vault::seal`] sealed for the same tenant.
    pub fn open(&self, tenant_id: Uuid, sealed: &str) -> Result<String, Error> {
        let mut fields = sealed.splitn(3, '.');
        let (Some("v1"), Some(id), Some(text)) = (fields.next(), fields.next(), fields.next()) else {
            return Err(Error::internal("a sealed secret is malformed"));
        };
        let (_, cipher) = self.keys.iter().find(|(key, _)| key == id).ok_or_else(|| {
            Error::internal(format!("no configured key has the id {id}: add it to secrets.previous_keys"))
        })?;
        let bytes = BASE64.decode(text).map_err(|_| Error::internal("a sealed secret is malformed"))?;
        let (nonce, message) =
            bytes.split_at_checked(12).ok_or_else(|| Error::internal("a sealed secret is malformed"))?;
        let nonce = Nonce::try_from(nonce).map_err(|_| Error::internal("a sealed secret is malformed"))?;
        let opened = cipher
            .decrypt(&nonce, Payload { msg: message, aad: tenant_id.as_bytes() })
            .map_err(|_| Error::internal("a sealed secret does not open"))?;
        String::from_utf8(opened).map_err(|_| Error::internal("a sealed secret is not text"))
    }
}

/// Lower-case hex.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// SHA-256 of a text, as lower-case hex.
pub fn sha256_hex(text: &str) -> String {
    hex(&Sha256::digest(text.as_bytes()))
}
