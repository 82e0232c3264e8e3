//! The time, in one place. What decides by it is handed the time.

use chrono::{DateTime, SubsecRound, Utc};

/// Now, to the second, as objects hold it.
#[expect(
    clippy::disallowed_methods,
    reason = "the one place; the operator has no database whose clock it could follow"
)]
pub fn now() -> DateTime<Utc> {
    Utc::now().trunc_subsecs(0)
}
