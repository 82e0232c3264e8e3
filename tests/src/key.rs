//! Well-formed API keys, made by the rule in the design and not by the server's code.

use std::iter;

use rand::RngExt;

const BASE62: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

/// A new key: `clo_`, 12 characters of public id, `_`, 32 base62 characters, [`checksum`].
pub fn random_key() -> String {
    let body = format!("clo_{}_{}", random_base62(12), random_base62(32));
    let checksum = checksum(&body);
    body + &checksum
}

/// CRC-32 (IEEE) of everything before it, as six base62 digits (`0-9A-Za-z`), padded with `0`.
pub fn checksum(body: &str) -> String {
    let mut rest = crc32fast::hash(body.as_bytes());
    let mut digits = [b'0'; 6];
    for digit in digits.iter_mut().rev() {
        *digit = BASE62[(rest % 62) as usize];
        rest /= 62;
    }
    digits.iter().map(|&digit| char::from(digit)).collect()
}

fn random_base62(length: usize) -> String {
    let mut random = rand::rng();
    iter::repeat_with(|| char::from(BASE62[random.random_range(0..BASE62.len())])).take(length).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_is_six_padded_base62_digits() {
        // CRC-32 of "123456789" is 0xCBF43926 = 3421780262, the algorithm's own check value.
        assert_eq!(checksum("123456789"), "3jZRME");
        assert_eq!(checksum(""), "000000");
    }

    #[test]
    fn keys_have_their_shape() {
        let key = random_key();
        assert_eq!(key.len(), 4 + 12 + 1 + 32 + 6);
        assert!(key.starts_with("clo_") && key.as_bytes()[16] == b'_');
        assert_eq!(checksum(&key[..49]), key[49..]);
    }
}
