//! Amounts: nano-USD as integers inside, decimal US dollars at the edge.

use rust_decimal::Decimal;
use rust_decimal::prelude::ToPrimitive;

/// Nano-USD as US dollars, without trailing zeros.
pub fn dollars(nano: i64) -> Decimal {
    Decimal::new(nano, 9).normalize()
}

/// Nano-USD as US dollars in whole cents, rounded half to even.
pub fn cents(nano: Decimal) -> Decimal {
    let mut dollars = (nano / Decimal::from(1_000_000_000)).round_dp(2);
    dollars.rescale(2);
    dollars
}

/// US dollars as nano-USD; none if that doesn't fit.
pub fn nano(dollars: Decimal) -> Option<i64> {
    dollars.checked_mul(Decimal::from(1_000_000_000))?.round().to_i64()
}
