//! Ids as clients see them: TypeIDs, a prefix and the base32 of the UUIDv7 in the database.

use async_graphql::ID;
use type_safe_id::{StaticType, TypeSafeId};
use uuid::Uuid;

macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident = $prefix:literal),* $(,)?) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default)]
        pub struct $kind;

        impl StaticType for $kind {
            const TYPE: &'static str = $prefix;
        }
    )*};
}

kinds! {
    /// `ten_…`
    Tenant = "ten",
    /// `key_…`
    ApiKey = "key",
    /// `agt_…`
    Agent = "agt",
    /// `agv_…`
    AgentVersion = "agv",
    /// `cnv_…`
    Conversation = "cnv",
    /// `run_…`
    Run = "run",
    /// `rtk_…`
    RuntimeToken = "rtk",
}

/// The id that a client is given.
pub fn encode<K: StaticType>(_kind: K, id: Uuid) -> ID {
    ID(TypeSafeId::<K>::from_uuid(id).to_string())
}

/// The id that a client gave; none if it isn't one of this kind.
pub fn decode<K: StaticType>(_kind: K, id: &str) -> Option<Uuid> {
    id.parse::<TypeSafeId<K>>().ok().map(|id| id.uuid())
}
