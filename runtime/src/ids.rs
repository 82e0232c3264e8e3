//! A run's id as clients see it: a TypeID, a prefix and the base32 of the UUID. Logs say it, for whoever looks there for a
//! run.

use std::fmt::Display;

use type_safe_id::{StaticType, TypeSafeId};
use uuid::Uuid;

#[derive(Default)]
struct Run;

impl StaticType for Run {
    const TYPE: &'static str = "run";
}

/// `run_…`
pub fn run_id(id: Uuid) -> impl Display {
    TypeSafeId::<Run>::from_uuid(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_one_that_clients_have() {
        let id = Uuid::from_u128(0x01a2_2774_ce65_757c_a986_0f4f_91e6_078f);
        assert_eq!(run_id(id).to_string(), "run_01m8kq9kk5enyak1gf9y8yc1wf");
    }
}
