//! The shape of a key: `clo_` + public id (12) + `_` + secret (32) + checksum (6), in base62. A worker's token has
//! the same one behind `clr_`.
//!
//! The checksum lets a typo, or a scanner for leaked secrets, be told without a database.

use rand::RngExt;

use crate::secrets::sha256_hex;

const BASE62: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
const KEY: &str = "clo_";
const RUNTIME_TOKEN: &str = "clr_";
const PUBLIC_ID: usize = 12;
const SECRET: usize = 32;
const CHECKSUM: usize = 6;

/// A new key, whole. It is shown once; only its hash is kept.
pub struct NewKey {
    /// The whole key.
    pub secret: String,
    /// What people see of it in lists.
    pub prefix: String,
    /// SHA-256, lower-case hex.
    pub hash: String,
}

/// Makes a key.
pub fn generate() -> NewKey {
    generate_as(KEY)
}

/// Makes a worker's token.
pub fn generate_runtime_token() -> NewKey {
    generate_as(RUNTIME_TOKEN)
}

fn generate_as(kind: &str) -> NewKey {
    let mut random = rand::rng();
    let mut characters = |count: usize| -> String {
        (0..count).map(|_| char::from(BASE62[random.random_range(0..BASE62.len())])).collect()
    };
    let prefix = format!("{kind}{}", characters(PUBLIC_ID));
    let body = format!("{prefix}_{}", characters(SECRET));
    let secret = format!("{body}{}", checksum(&body));
    NewKey { hash: sha256_hex(&secret), prefix, secret }
}

/// Whether a text has a key's shape and its checksum is right.
pub fn is_well_formed(key: &str) -> bool {
    is_well_formed_as(KEY, key)
}

/// Whether a text has a worker's token's shape and its checksum is right.
pub fn is_well_formed_runtime_token(token: &str) -> bool {
    is_well_formed_as(RUNTIME_TOKEN, token)
}

fn is_well_formed_as(kind: &str, key: &str) -> bool {
    let length = kind.len() + PUBLIC_ID + 1 + SECRET + CHECKSUM;
    if key.len() != length || !key.is_ascii() || !key.starts_with(kind) {
        return false;
    }
    let (body, sum) = key.split_at(length - CHECKSUM);
    body.as_bytes()[kind.len() + PUBLIC_ID] == b'_' && checksum(body) == sum
}

/// CRC-32 (IEEE) of the bytes before it, in base62, padded with `0`.
fn checksum(body: &str) -> String {
    let mut rest = crc32fast::hash(body.as_bytes()) as usize;
    let mut digits = [b'0'; CHECKSUM];
    for digit in digits.iter_mut().rev() {
        *digit = BASE62[rest % 62];
        rest /= 62;
    }
    digits.iter().map(|digit| char::from(*digit)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_key_is_well_formed_and_any_changed_character_is_noticed() {
        let key = generate();
        assert_eq!(key.secret.len(), 55);
        assert!(is_well_formed(&key.secret));
        for at in 0..key.secret.len() {
            let mut bytes = key.secret.clone().into_bytes();
            bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
            assert!(!is_well_formed(&String::from_utf8(bytes).unwrap()), "position {at}");
        }
        assert!(!is_well_formed(""));
        assert!(!is_well_formed(&key.secret[1..]));
    }

    #[test]
    fn a_key_is_no_token_and_a_token_is_no_key() {
        let (key, token) = (generate().secret, generate_runtime_token().secret);
        assert!(token.starts_with("clr_") && is_well_formed_runtime_token(&token));
        assert!(!is_well_formed(&token) && !is_well_formed_runtime_token(&key));
    }
}
