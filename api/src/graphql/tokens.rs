//! Measures a GraphQL text in one pass, before any parser recurses over it.
//!
//! The bounds drawn from it hold only if it sees the same tokens as async-graphql's parser, so it follows
//! that grammar where it departs from the specification: numbers and keywords may stand side by side
//! without a space (`[00true]` has three values), and an unclosed block string is an empty string and an
//! opening quote.

/// What a text has, up to the first byte that no token begins with; there the parser fails too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Measure {
    /// Names, punctuators, numbers and strings. Comments and commas count for nothing.
    pub tokens: usize,
    /// Brackets of any kind that are open at once.
    pub nesting: usize,
    /// Bytes of the longest name.
    pub longest_name: usize,
}

/// Measures a text, in time linear in its length.
pub fn measure(text: &str) -> Measure {
    let mut measure = Measure::default();
    let mut open = 0_usize;
    let mut rest = text.as_bytes();
    while let Some(&first) = rest.first() {
        let length = match first {
            b' ' | b'\t' | b'\n' | b'\r' | b',' => {
                rest = &rest[1..];
                continue;
            }
            0xEF if rest.starts_with(BYTE_ORDER_MARK) => {
                rest = &rest[BYTE_ORDER_MARK.len()..];
                continue;
            }
            b'#' => {
                rest = &rest[rest.iter().position(|byte| matches!(byte, b'\n' | b'\r')).unwrap_or(rest.len())..];
                continue;
            }
            b'{' | b'[' | b'(' => {
                open += 1;
                measure.nesting = measure.nesting.max(open);
                1
            }
            b'}' | b']' | b')' => {
                open = open.saturating_sub(1);
                1
            }
            b'!' | b'$' | b'&' | b':' | b'=' | b'@' | b'|' => 1,
            b'.' if rest.starts_with(b"...") => 3,
            b'"' => match string_length(rest) {
                Some(length) => length,
                None => return measure,
            },
            b'-' | b'0'..=b'9' => number_length(rest),
            b'a'..=b'z' | b'A'..=b'Z' | b'_' => {
                let length = name_length(rest);
                measure.longest_name = measure.longest_name.max(length);
                // The last of its names is counted below, as any token is.
                measure.tokens += leading_keywords(&rest[..length]);
                length
            }
            _ => return measure,
        };
        measure.tokens += 1;
        rest = &rest[length..];
    }
    measure
}

const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();
const BLOCK_QUOTE: &[u8] = b"\"\"\"";
const ESCAPED_BLOCK_QUOTE: &[u8] = b"\\\"\"\"";

fn name_length(text: &[u8]) -> usize {
    text.iter().position(|byte| !(byte.is_ascii_alphanumeric() || *byte == b'_')).unwrap_or(text.len())
}

/// Keywords that begin the name and are not all of it: among values the parser reads `truefalse` as two.
fn leading_keywords(mut name: &[u8]) -> usize {
    let keywords: [&[u8]; 3] = [b"true", b"false", b"null"];
    let mut count = 0;
    while let Some(rest) =
        keywords.iter().find_map(|keyword| name.strip_prefix(*keyword)).filter(|rest| !rest.is_empty())
    {
        name = rest;
        count += 1;
    }
    count
}

/// Length of the number's longest valid prefix: a leading zero stands alone. A lone `-` counts as one byte.
fn number_length(text: &[u8]) -> usize {
    let digits = |from: usize| text[from..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    let mut length = usize::from(text[0] == b'-');
    length += if text.get(length) == Some(&b'0') { 1 } else { digits(length) };
    if text.get(length) == Some(&b'.') && digits(length + 1) > 0 {
        length += 1 + digits(length + 1);
    }
    if matches!(text.get(length), Some(b'e' | b'E')) {
        let sign = usize::from(matches!(text.get(length + 1), Some(b'+' | b'-')));
        let exponent = digits(length + 1 + sign);
        if exponent > 0 {
            length += 1 + sign + exponent;
        }
    }
    length.max(1)
}

/// Length of the string that begins the text, quotes included; `None` if it isn't closed.
fn string_length(text: &[u8]) -> Option<usize> {
    if text.starts_with(BLOCK_QUOTE) {
        let mut at = BLOCK_QUOTE.len();
        while at < text.len() {
            if text[at..].starts_with(BLOCK_QUOTE) {
                return Some(at + BLOCK_QUOTE.len());
            }
            at += if text[at..].starts_with(ESCAPED_BLOCK_QUOTE) { ESCAPED_BLOCK_QUOTE.len() } else { 1 };
        }
        // The parser falls back to an empty string, and takes the third quote for another one's first.
        return Some(2);
    }
    let mut at = 1;
    loop {
        match text.get(at)? {
            b'"' => return Some(at + 1),
            b'\n' | b'\r' => return None,
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(text: &str) -> usize {
        measure(text).tokens
    }

    #[test]
    fn counts_what_the_specification_calls_a_token() {
        assert_eq!(tokens("query Q($id: ID! = \"x\") @d { a(id: $id) ...F }"), 24);
        assert_eq!(tokens("\u{feff}{ a, b # c d e\n c }"), 5);
        assert_eq!(tokens("[1 -2 3.5 -4.5e+10 0.1E3]"), 7);
        assert_eq!(tokens(""), 0);
    }

    #[test]
    fn strings_are_one_token_whatever_is_in_them() {
        assert_eq!(tokens(r#"("a { b \" c" "" """d " \""" e""")"#), 5);
        assert_eq!(measure(r#"("[[[[" """{{{{""")"#).nesting, 1);
    }

    #[test]
    fn values_without_spaces_are_counted_as_the_parser_reads_them() {
        assert_eq!(tokens("[000]"), 5);
        assert_eq!(tokens("[-1-1-1]"), 5);
        assert_eq!(tokens("[truefalsenullish]"), 6);
        let query = |list: &str| format!("{{ a(x: [{list}]) }}");
        for list in ["000", "-1-1-1", "truefalsenullish"] {
            assert!(async_graphql::parser::parse_query(query(list)).is_ok(), "the parser takes {list}");
        }
    }

    #[test]
    fn an_unclosed_block_string_hides_nothing() {
        let query = r#"{ a(x: [""" [[[ "]) }"#;
        assert!(async_graphql::parser::parse_query(query).is_ok(), "the parser takes it for two strings");
        assert_eq!(tokens(query), 11);
        assert_eq!(measure(r#"{ a(x: """ " [[[["#).nesting, 6);
    }

    #[test]
    fn stops_where_the_parser_stops() {
        for text in ["{ a ; b", "{ a \"x\n b", "{ a \\ b", "{ a \u{e9} b"] {
            assert_eq!(tokens(text), 2, "{text:?}");
        }
    }

    #[test]
    fn measures_nesting_and_names() {
        let measure = measure("{ alpha(x: [[1]]) { b } }");
        assert_eq!((measure.nesting, measure.longest_name), (4, 5));
    }
}
