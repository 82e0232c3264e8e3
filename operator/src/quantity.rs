//! Kubernetes quantities, written as the API server writes them: an object that is compared with what the API server
//! has must not differ by `1000m` for `1`.

use std::fmt;
use std::ops::Mul;
use std::str::FromStr;

use k8s_openapi::apimachinery::pkg::api::resource;

const DECIMAL: [&str; 7] = ["m", "", "k", "M", "G", "T", "P"];
const BINARY: [&str; 6] = ["", "Ki", "Mi", "Gi", "Ti", "Pi"];

/// An amount in thousandths, and which kind of suffix it was written with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quantity {
    thousandths: i128,
    is_binary: bool,
}

/// Not a quantity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a quantity such as 250m, 2 or 128Mi")]
pub struct NotAQuantity(String);

impl FromStr for Quantity {
    type Err = NotAQuantity;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse(text).ok_or_else(|| NotAQuantity(text.to_owned()))
    }
}

fn parse(text: &str) -> Option<Quantity> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || whole.len() > 15 || fraction.len() > 3 || (suffix == "m" && !fraction.is_empty()) {
        return None;
    }
    let thousandths = format!("{whole}{fraction:0<3}").parse::<i128>().ok()?;
    let (scale, is_binary) = match suffix {
        "m" => return Some(Quantity { thousandths: thousandths / 1000, is_binary: false }),
        _ => match (DECIMAL.iter().position(|s| *s == suffix), BINARY.iter().position(|s| *s == suffix)) {
            (Some(power), _) => (1000_i128.pow(u32::try_from(power).ok()? - 1), false),
            (None, Some(power)) => (1024_i128.pow(u32::try_from(power).ok()?), true),
            (None, None) => return None,
        },
    };
    Some(Quantity { thousandths: thousandths * scale, is_binary })
}

impl fmt::Display for Quantity {
    /// The largest suffix that leaves a whole number; an amount below 1Ki has no binary suffix, and a part of a byte
    /// counts as one.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (mut number, suffixes, base) = if self.is_binary && self.thousandths >= 1_024_000 {
            ((self.thousandths + 999) / 1000, &BINARY[..], 1024)
        } else {
            (self.thousandths, &DECIMAL[..], 1000)
        };
        let mut power = 0;
        while number != 0 && number % base == 0 && power + 1 < suffixes.len() {
            number /= base;
            power += 1;
        }
        match number {
            0 => f.write_str("0"),
            _ => write!(f, "{number}{}", suffixes[power]),
        }
    }
}

impl Mul<i32> for Quantity {
    type Output = Quantity;

    fn mul(self, times: i32) -> Quantity {
        Quantity { thousandths: self.thousandths * i128::from(times), ..self }
    }
}

impl From<Quantity> for resource::Quantity {
    fn from(quantity: Quantity) -> Self {
        resource::Quantity(quantity.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn canonical(text: &str) -> String {
        text.parse::<Quantity>().unwrap().to_string()
    }

    #[test]
    fn they_are_written_as_the_api_server_writes_them() {
        for (given, canon) in [
            ("1000m", "1"),
            ("250m", "250m"),
            ("0.5", "500m"),
            ("1.5", "1500m"),
            ("2000", "2k"),
            ("20", "20"),
            ("1024Mi", "1Gi"),
            ("1.5Gi", "1536Mi"),
            ("0.5Ki", "512"),
            ("134217728", "134217728"),
            ("128M", "128M"),
            ("1000M", "1G"),
            ("0", "0"),
            ("1.2Ki", "1229"),
            ("1024Ti", "1Pi"),
        ] {
            assert_eq!(canonical(given), canon, "{given}");
        }
    }

    #[test]
    fn what_is_none_is_refused() {
        for text in ["", "m", "Mi", "1.2345", "1Zi", "-1", "1e3", "1 Gi", "1.5m"] {
            assert!(text.parse::<Quantity>().is_err(), "{text}");
        }
    }

    #[test]
    fn they_multiply() {
        assert_eq!(("250m".parse::<Quantity>().unwrap() * 4).to_string(), "1");
        assert_eq!(("128Mi".parse::<Quantity>().unwrap() * 3).to_string(), "384Mi");
    }
}
