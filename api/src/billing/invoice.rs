//! The draft invoice of a month: exact, rounded half to even to cents at the end only.

use entity::plans;
use rust_decimal::Decimal;

use crate::money::{cents, dollars};
use crate::usage::report::Month;

/// What a line is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LineKind {
    /// The plan's price.
    Base,
    /// Tokens beyond those included.
    Overage,
}

/// A line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// What it is for.
    pub kind: LineKind,
    /// For people.
    pub description: String,
    /// Tokens that it covers.
    pub tokens: i64,
    /// US dollars, in cents.
    pub amount: Decimal,
}

/// A month's invoice. Amounts are US dollars in cents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Draft {
    /// Tokens beyond those included.
    pub overage_tokens: i64,
    /// What they cost.
    pub overage_cost: Decimal,
    /// All of it.
    pub total: Decimal,
    /// What it is made of.
    pub lines: Vec<Line>,
}

/// Prices a month's tokens by a plan. A plan that sells nothing beyond what is included has no overage
/// to pay.
pub fn draft(plan: &plans::Model, month: Month, used: i64) -> Draft {
    let overage_tokens = (used - plan.included_tokens).max(0);
    let base = Decimal::from(plan.base_price);
    let per_million = Decimal::from(plan.overage_per_million.unwrap_or(0));
    let overage = Decimal::from(overage_tokens) * per_million / Decimal::from(1_000_000);
    let mut lines = vec![Line {
        kind: LineKind::Base,
        description: format!("Plan {}, {month}", plan.name),
        tokens: plan.included_tokens.min(used),
        amount: cents(base),
    }];
    if let (Some(price), true) = (plan.overage_per_million, overage_tokens > 0) {
        lines.push(Line {
            kind: LineKind::Overage,
            description: format!("Tokens beyond {}, at {} USD a million", plan.included_tokens, dollars(price)),
            tokens: overage_tokens,
            amount: cents(overage),
        });
    }
    Draft { overage_tokens, overage_cost: cents(overage), total: cents(base + overage), lines }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;
    use entity::tenants::Isolation;

    use super::*;

    fn plan(base: i64, included: i64, overage: Option<i64>) -> plans::Model {
        plans::Model {
            id: uuid::Uuid::nil(),
            name: "pro".to_owned(),
            version: 1,
            base_price: base,
            included_tokens: included,
            overage_per_million: overage,
            monthly_token_limit: 100,
            max_concurrent_runs: 1,
            requests_per_minute: 1,
            weight: 1,
            isolation: Isolation::Shared,
            valid_from: DateTime::UNIX_EPOCH,
        }
    }

    fn month() -> Month {
        Month::parse("2026-11").unwrap()
    }

    #[test]
    fn overage_is_rounded_half_to_even_once() {
        let pro = plan(49_000_000_000, 10_000_000, Some(5_000_000_000));
        // 1,000 tokens cost half a cent, 3,000 one and a half.
        for (tokens, cost, total) in [(0, "0.00", "49.00"), (1_000, "0.00", "49.00"), (3_000, "0.02", "49.02")] {
            let invoice = draft(&pro, month(), 10_000_000 + tokens);
            assert_eq!((invoice.overage_cost.to_string(), invoice.total.to_string()), (cost.into(), total.into()));
            assert_eq!(invoice.overage_tokens, tokens);
        }
    }

    #[test]
    fn nothing_is_sold_beyond_a_plan_without_overage() {
        let invoice = draft(&plan(0, 1_000_000, None), month(), 1_500_000);
        assert_eq!(invoice.overage_tokens, 500_000);
        assert_eq!(invoice.total.to_string(), "0.00");
        assert_eq!(invoice.lines.len(), 1);
    }
}
