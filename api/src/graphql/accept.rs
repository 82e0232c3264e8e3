//! Which of our media types a client wants.
//! Source: <https://www.rfc-editor.org/rfc/rfc9110#name-accept>.

use http::{HeaderMap, header};

/// A media type that an operation can be answered in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accept {
    /// `application/graphql-response+json`: the status tells refused and executed requests apart.
    GraphqlResponse,
    /// `application/json`, for clients older than the other one.
    Json,
    /// `text/event-stream`: results as they come.
    EventStream,
}

impl Accept {
    /// What to accept, for a client that accepts nothing of ours.
    pub const REMEDY: &str = "Accept application/graphql-response+json, application/json or text/event-stream.";

    /// In the order in which equals are chosen.
    const ALL: [Self; 3] = [Self::GraphqlResponse, Self::Json, Self::EventStream];

    fn essence(self) -> &'static str {
        match self {
            Self::GraphqlResponse => "application/graphql-response+json",
            Self::Json => "application/json",
            Self::EventStream => "text/event-stream",
        }
    }

    /// For an answer that is one JSON document. A refusal of an event stream is one too, since no stream was opened.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::GraphqlResponse => "application/graphql-response+json; charset=utf-8",
            Self::Json | Self::EventStream => "application/json; charset=utf-8",
        }
    }

    /// The type with the highest weight; of equals the one that the client names first. `None` if it takes
    /// none of ours.
    pub fn negotiate(headers: &HeaderMap) -> Option<Self> {
        let values: Vec<&str> =
            headers.get_all(header::ACCEPT).iter().map(|value| value.to_str().unwrap_or_default()).collect();
        let ranges: Vec<Range> = values.iter().flat_map(|value| value.split(',')).filter_map(Range::parse).collect();
        if ranges.is_empty() && values.iter().all(|value| value.trim().is_empty()) {
            return Some(Self::GraphqlResponse);
        }
        let offers = Self::ALL.into_iter().filter_map(|accept| {
            let fitting = ranges.iter().enumerate().filter(|(_, range)| range.specificity(accept).is_some());
            // The most specific range decides, wherever it stands.
            let (place, range) =
                fitting.max_by_key(|(place, range)| (range.specificity(accept), usize::MAX - place))?;
            (range.weight > 0).then_some((range.weight, place, accept))
        });
        // min_by_key takes the first of equals.
        offers.min_by_key(|(weight, place, _)| (u16::MAX - weight, *place)).map(|(_, _, accept)| accept)
    }
}

/// One media range, such as `application/*;q=0.8`.
struct Range<'a> {
    kind: &'a str,
    subtype: &'a str,
    /// Thousandths.
    weight: u16,
}

impl<'a> Range<'a> {
    fn parse(text: &'a str) -> Option<Self> {
        let mut parts = text.split(';').map(str::trim);
        let (kind, subtype) = parts.next()?.split_once('/')?;
        let weight = parts.find_map(|parameter| {
            let (name, value) = parameter.split_once('=')?;
            name.trim().eq_ignore_ascii_case("q").then(|| value.trim().parse::<f32>().unwrap_or(1.0))
        });
        // NaN becomes 0.
        let weight = (weight.unwrap_or(1.0).clamp(0.0, 1.0) * 1000.0) as u16;
        Some(Self { kind, subtype, weight })
    }

    /// How closely the range names the type; `None` if it doesn't cover it.
    fn specificity(&self, accept: Accept) -> Option<u8> {
        let (kind, subtype) = accept.essence().split_once('/')?;
        match (self.kind, self.subtype) {
            ("*", "*") => Some(0),
            (range, "*") if range.eq_ignore_ascii_case(kind) => Some(1),
            (range, exact) if range.eq_ignore_ascii_case(kind) && exact.eq_ignore_ascii_case(subtype) => Some(2),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn accepted(value: &'static str) -> Option<Accept> {
        Accept::negotiate(&HeaderMap::from_iter([(header::ACCEPT, HeaderValue::from_static(value))]))
    }

    #[test]
    fn a_client_without_wishes_gets_the_newer_json() {
        assert_eq!(Accept::negotiate(&HeaderMap::new()), Some(Accept::GraphqlResponse));
        for value in ["", "*/*", "application/*", "text/html, */*;q=0.1"] {
            assert_eq!(accepted(value), Some(Accept::GraphqlResponse), "{value:?}");
        }
    }

    #[test]
    fn the_highest_weight_wins_then_the_first_named() {
        for (value, accept) in [
            ("application/json", Accept::Json),
            ("Application/JSON; charset=utf-8", Accept::Json),
            ("application/json, application/graphql-response+json", Accept::Json),
            ("application/json;q=0.9, application/graphql-response+json", Accept::GraphqlResponse),
            ("application/graphql-response+json, application/json, text/event-stream", Accept::GraphqlResponse),
            ("text/event-stream", Accept::EventStream),
            ("text/event-stream, multipart/mixed", Accept::EventStream),
            ("text/*", Accept::EventStream),
            ("*/*;q=0.5, application/json", Accept::Json),
            ("*/*, application/graphql-response+json;q=0", Accept::Json),
        ] {
            assert_eq!(accepted(value), Some(accept), "{value}");
        }
    }

    #[test]
    fn nothing_of_ours_is_not_acceptable() {
        for value in ["text/html", "image/*", "application/json;q=0", "nonsense"] {
            assert_eq!(accepted(value), None, "{value}");
        }
    }
}
