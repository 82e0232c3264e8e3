//! Scalars of the schema that no library brings.

use async_graphql::{InputValueError, InputValueResult, Scalar, ScalarType, Value};

use crate::usage::report;

/// A 64-bit integer as a JSON number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Long(pub i64);

#[Scalar]
impl ScalarType for Long {
    fn parse(value: Value) -> InputValueResult<Self> {
        match &value {
            Value::Number(number) => {
                number.as_i64().map(Long).ok_or_else(|| InputValueError::custom("Not a whole number of 64 bits."))
            }
            _ => Err(InputValueError::expected_type(value)),
        }
    }

    fn to_value(&self) -> Value {
        Value::Number(self.0.into())
    }
}

/// A calendar month in UTC, `2026-11`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Month(pub report::Month);

#[Scalar]
impl ScalarType for Month {
    fn parse(value: Value) -> InputValueResult<Self> {
        match &value {
            Value::String(text) => report::Month::parse(text)
                .map(Month)
                .ok_or_else(|| InputValueError::custom("A month is written as 2026-11.")),
            _ => Err(InputValueError::expected_type(value)),
        }
    }

    fn to_value(&self) -> Value {
        Value::String(self.0.to_string())
    }
}
