//! The summary message: how the SDK writes it, and how it reads its own.

use std::io;

use serde::Serialize;
use serde_json::{Map, Serializer, Value, json};

use crate::item::InputItem;

const PREAMBLE: &str = "For context, here is the conversation so far between the user and the previous agent:";
const OLD_PREAMBLE: &str = "For context, here is the conversation so far:";
const START: &str = "<CONVERSATION HISTORY>";
const END: &str = "</CONVERSATION HISTORY>";

/// Roles that a record may consist of alone.
const ROLES: [&str; 4] = ["user", "assistant", "system", "developer"];

/// What only the SDK's own sessions hold, and what only answers do.
const NOT_SHOWN: [&str; 3] = ["_agents_tool_description", "_agents_tool_title", "created_by"];

type Dict = Map<String, Value>;

/// One message that tells of all the items.
pub fn of(items: &[Dict]) -> InputItem {
    let mut lines = vec![PREAMBLE.to_owned(), START.to_owned()];
    lines.extend(items.iter().enumerate().map(|(index, item)| format!("{}. {}", index + 1, written(item))));
    if items.is_empty() {
        lines.push("(no previous turns recorded)".to_owned());
    }
    lines.push(END.to_owned());
    InputItem::Summary { text: lines.join("\n") }
}

/// The items, with those that earlier summaries tell of in their place.
pub fn flatten(items: impl IntoIterator<Item = Dict>) -> Vec<Dict> {
    let mut flat = Vec::new();
    for item in items {
        match told_of(&item) {
            Some(told) => flat.extend(told),
            None => flat.push(shown(item)),
        }
    }
    flat
}

fn shown(mut item: Dict) -> Dict {
    NOT_SHOWN.iter().for_each(|key| drop(item.shift_remove(*key)));
    item
}

fn written(item: &Dict) -> String {
    let Some(role) = item.get("role").and_then(Value::as_str) else { return as_json(item) };
    let content = match item.get("content") {
        None | Some(Value::Null) => "",
        Some(Value::String(content)) if !content.contains(['\n', '\r']) => content,
        Some(_) => return as_json(item),
    };
    match item.get("name").and_then(Value::as_str).filter(|name| !name.is_empty()) {
        Some(name) => format!("{role} ({name}): {content}"),
        None => format!("{role}: {content}"),
    }
}

/// The items that a summary tells of; none if the item is no summary.
fn told_of(item: &Dict) -> Option<Vec<Dict>> {
    if item.get("role")?.as_str()? != "assistant" {
        return None;
    }
    let (preamble, wrapped) = item.get("content")?.as_str()?.split_once('\n')?;
    if ![PREAMBLE, OLD_PREAMBLE].contains(&preamble) {
        return None;
    }
    let is_wrapped = wrapped.strip_prefix(START)?.starts_with('\n') && wrapped.strip_suffix(END)?.ends_with('\n');
    let body = is_wrapped.then(|| wrapped.get(START.len() + 1..wrapped.len() - END.len() - 1).unwrap_or_default())?;
    Some(records(body).iter().filter_map(|record| read(record)).collect())
}

/// A numbered line begins a record, and lines without a number go on with it.
fn records(body: &str) -> Vec<String> {
    let mut records: Vec<(bool, String)> = Vec::new();
    for line in lines(body).filter(|line| !strip(line).is_empty()) {
        let is_numbered = without_number(lstrip(line)).is_some();
        match records.last_mut() {
            Some((true, record)) if !is_numbered => {
                record.push('\n');
                record.push_str(rstrip(line));
            }
            _ => records.push((is_numbered, strip(line).to_owned())),
        }
    }
    records.into_iter().map(|(_, record)| record).collect()
}

fn read(record: &str) -> Option<Dict> {
    let record = strip(record);
    let record = without_number(record).map_or(record, lstrip);
    if let Some(item) = read_json(record) {
        return Some(item);
    }
    let Some((role, content)) = record.split_once(':') else {
        return is_role_alone(record).then(|| message(record, ""));
    };
    let (role, content) = (strip(role), strip(content));
    if role.is_empty() {
        return None;
    }
    let kind = split_name(role).0;
    if !ROLES.contains(&kind)
        && let Some(mut item) = read_json(content)
    {
        item.insert("type".to_owned(), kind.into());
        return Some(item);
    }
    Some(message(role, content))
}

fn message(role: &str, content: &str) -> Dict {
    let (role, name) = split_name(role);
    let mut item = Dict::new();
    item.insert("role".to_owned(), role.into());
    if let Some(name) = name {
        item.insert("name".to_owned(), name.into());
    }
    item.insert("content".to_owned(), content.into());
    item
}

fn read_json(text: &str) -> Option<Dict> {
    let mut item: Dict = serde_json::from_str(text).ok()?;
    item.shift_remove("provider_data");
    Some(shown(item))
}

/// What follows a record's number and its full stop; none if it has no number.
fn without_number(record: &str) -> Option<&str> {
    let (number, rest) = record.split_once('.')?;
    (!number.is_empty() && number.chars().all(char::is_numeric)).then_some(rest)
}

fn is_role_alone(record: &str) -> bool {
    let role = match record.rfind('(') {
        Some(open) if record.ends_with(')') => strip(&record[..open]),
        _ => record,
    };
    ROLES.contains(&role)
}

/// The SDK's word for who said what has no role.
fn or_developer(role: &str) -> &str {
    if role.is_empty() { "developer" } else { role }
}

/// `role (name)` taken apart.
fn split_name(role: &str) -> (&str, Option<&str>) {
    if let Some(open) = role.rfind('(').filter(|_| role.ends_with(')')) {
        let name = strip(&role[open + 1..role.len() - 1]);
        if !name.is_empty() {
            return (or_developer(strip(&role[..open])), Some(name));
        }
    }
    (or_developer(role), None)
}

/// Python's `str.isspace`.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

fn strip(text: &str) -> &str {
    text.trim_matches(is_space)
}

fn lstrip(text: &str) -> &str {
    text.trim_start_matches(is_space)
}

fn rstrip(text: &str) -> &str {
    text.trim_end_matches(is_space)
}

/// Python's `str.splitlines`, but that an empty line stands between the parts of `\r\n`.
fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.split(['\n', '\r', '\u{b}', '\u{c}', '\u{1c}', '\u{1d}', '\u{1e}', '\u{85}', '\u{2028}', '\u{2029}'])
}

/// As Python's `json.dumps(item, ensure_ascii=False)` writes it.
fn as_json(item: &Dict) -> String {
    let mut item = item.clone();
    item.shift_remove("provider_data");
    let mut bytes = Vec::new();
    // Writing JSON to memory can't fail: all keys are strings.
    let _ = item.serialize(&mut Serializer::with_formatter(&mut bytes, PythonFormatter));
    String::from_utf8(bytes).unwrap_or_else(|_| json!(item).to_string())
}

struct PythonFormatter;

impl serde_json::ser::Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }

    /// Exponents as Python's `repr` has them: from 1e16 and below 1e-4, with a sign and two digits.
    fn write_f64<W: ?Sized + io::Write>(&mut self, writer: &mut W, value: f64) -> io::Result<()> {
        let short = format!("{value:e}");
        let (digits, exponent) = short.split_once('e').unwrap_or((&short, "0"));
        match exponent.parse::<i32>().unwrap_or_default() {
            -4..16 => write!(writer, "{value:?}"),
            exponent if exponent < 0 => write!(writer, "{digits}e-{:02}", -exponent),
            exponent => write!(writer, "{digits}e+{exponent:02}"),
        }
    }
}
