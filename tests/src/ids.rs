//! The API's ids, made and read by the rule in their specification and not by the server's code.

use uuid::Uuid;

/// The alphabet of a TypeID, Crockford's base32 in lower case.
const BASE32: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";

/// The TypeID of a UUID.
pub fn type_id(prefix: &str, id: Uuid) -> String {
    let bits = id.as_u128();
    let digits = (0..26).map(|place| char::from(BASE32[(bits >> (5 * (25 - place)) & 31) as usize]));
    format!("{prefix}_{}", digits.collect::<String>())
}

/// The UUID in a TypeID.
///
/// # Panics
/// It is none.
pub fn uuid_of(type_id: &str) -> Uuid {
    let (_, digits) = type_id.rsplit_once('_').expect("a TypeID");
    let digit = |byte: u8| BASE32.iter().position(|known| *known == byte).expect("base32") as u128;
    Uuid::from_u128(digits.bytes().fold(0, |bits, byte| bits << 5 | digit(byte)))
}
