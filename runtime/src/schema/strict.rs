//! The conversion itself, a port of the SDK's `_ensure_strict_json_schema`: depth first, in place, references resolved
//! against the root as it is by then.

use std::collections::HashSet;

use serde_json::{Map, Number, Value, json};

use super::NotStrict;

/// The SDK's bounds: nodes that are looked at, and nesting.
const MAX_NODES: usize = 100_000;
const MAX_DEPTH: usize = 100;

/// Bytes that references may add in all: what they lead to is copied here, where Python's dictionaries share it.
const MAX_INLINED_BYTES: usize = 1024 * 1024;

/// What may stand beside a `$ref` without constraining anything.
const NOT_CONSTRAINING: [&str; 15] = [
    "$anchor",
    "$comment",
    "$defs",
    "$schema",
    "contentEncoding",
    "contentMediaType",
    "contentSchema",
    "default",
    "definitions",
    "deprecated",
    "description",
    "examples",
    "readOnly",
    "title",
    "writeOnly",
];

const OPEN_OBJECT: &str =
    "an object that takes properties beyond those declared can't be strict: set additionalProperties to false";
const NESTED_RESOURCE: &str = "a $ref inside a schema with an $id of its own, or into one, can't be resolved";
const TOO_DEEP: &str = "the schema is nested too deeply";
const TOO_LARGE: &str = "the schema, its references expanded, is too large";

type Outcome<T> = Result<T, NotStrict>;

fn refuse<T>(path: &str, message: impl Into<String>) -> Outcome<T> {
    Err(NotStrict { path: path.to_owned(), message: message.into() })
}

/// The schema with all of it strict but for the rules about its root.
pub fn close(schema: &Value) -> Outcome<Value> {
    if depth(schema) > MAX_DEPTH {
        return refuse("", TOO_DEEP);
    }
    if schema.as_object().is_some_and(Map::is_empty) {
        return Ok(json!({ "additionalProperties": false, "type": "object", "properties": {}, "required": [] }));
    }
    let mut conversion = Conversion { root: schema.clone(), nodes_left: MAX_NODES, bytes_left: MAX_INLINED_BYTES };
    conversion.close("", 1, false)?;
    Ok(conversion.root)
}

/// Holds a strict schema to the rules about its root.
pub fn root(mut schema: Value) -> Outcome<Value> {
    if schema["anyOf"].is_array() {
        return refuse("", "the root of a strict schema must not use anyOf or oneOf");
    }
    if let Some(types) = schema["type"].as_array() {
        if *types == [json!("object")] {
            schema["type"] = "object".into();
        } else if types.contains(&json!("object")) {
            return refuse("", "the root of a strict schema must be an object that can't be anything else");
        }
    }
    Ok(schema)
}

struct Conversion {
    root: Value,
    nodes_left: usize,
    bytes_left: usize,
}

impl Conversion {
    /// Makes the schema at `path`, a JSON Pointer, strict.
    fn close(&mut self, path: &str, depth: usize, nested: bool) -> Outcome<()> {
        if depth > MAX_DEPTH {
            return refuse(path, TOO_DEEP);
        }
        let Some(Value::Object(schema)) = self.root.pointer(path) else {
            return refuse(path, "a schema must be an object");
        };
        let nested = nested || (!path.is_empty() && has_own_id(schema));
        let was_closed = schema.get("additionalProperties") == Some(&Value::Bool(false));
        check_reference(schema, path, nested)?;
        self.spend(path)?;
        let depth = depth + 1;
        self.close_map(path, "$defs", depth, nested)?;
        self.close_map(path, "definitions", depth, nested)?;
        self.close_object(path)?;
        self.close_map(path, "properties", depth, nested)?;
        if self.at(path)?.get("items").is_some_and(Value::is_object) {
            self.close(&format!("{path}/items"), depth, nested)?;
        }
        self.close_list(path, "anyOf", depth, nested)?;
        self.close_list(path, "oneOf", depth, nested)?;
        let schema = self.at(path)?;
        if let Some(Value::Array(variants)) = schema.get_mut("oneOf").map(Value::take) {
            schema.shift_remove("oneOf");
            match schema.get_mut("anyOf") {
                Some(Value::Array(any_of)) => any_of.extend(variants),
                _ => drop(schema.insert("anyOf".to_owned(), variants.into())),
            }
        }
        match self.at(path)?.get("allOf").and_then(Value::as_array).map(Vec::len) {
            Some(1) => {
                self.merge_all_of(path, depth, nested, was_closed)?;
                return self.close(path, depth, nested);
            }
            _ => self.close_list(path, "allOf", depth, nested)?,
        }
        let schema = self.at(path)?;
        if schema.get("default") == Some(&Value::Null) {
            schema.shift_remove("default");
        }
        if schema.len() > 1
            && let Some(reference) = schema.shift_remove("$ref")
        {
            let (target_path, target) = self.resolve(path, &reference)?;
            if path.starts_with(&format!("{target_path}/")) {
                return refuse(path, "a $ref to a schema around it can't be merged with what stands beside it");
            }
            let schema = self.at(path)?;
            for (key, value) in target {
                schema.entry(key).or_insert(value);
            }
            return self.close(path, depth, nested);
        }
        Ok(())
    }

    /// Closes an object, and requires all its properties.
    fn close_object(&mut self, path: &str) -> Outcome<()> {
        let schema = self.at(path)?;
        let names = schema.get("properties").and_then(Value::as_object).map(|map| map.keys().cloned().collect());
        let names: Option<Vec<String>> = names;
        let is_untyped = schema.get("type").is_none_or(Value::is_null);
        if is_untyped && names.is_some() {
            schema.insert("type".to_owned(), "object".into());
        }
        let is_object = match schema.get("type") {
            Some(Value::String(kind)) => kind == "object",
            Some(Value::Array(kinds)) => kinds.contains(&json!("object")),
            _ => false,
        };
        match schema.get("additionalProperties") {
            None if is_object => drop(schema.insert("additionalProperties".to_owned(), false.into())),
            None | Some(Value::Bool(false)) => {}
            Some(_) if is_object || is_untyped => return refuse(path, OPEN_OBJECT),
            Some(_) => {}
        }
        if let Some(names) = names {
            schema.insert("required".to_owned(), names.into());
        }
        Ok(())
    }

    fn close_map(&mut self, path: &str, keyword: &str, depth: usize, nested: bool) -> Outcome<()> {
        let Some(Value::Object(map)) = self.at(path)?.get(keyword) else { return Ok(()) };
        let names: Vec<String> = map.keys().map(|name| name.replace('~', "~0").replace('/', "~1")).collect();
        names.iter().try_for_each(|name| self.close(&format!("{path}/{keyword}/{name}"), depth, nested))
    }

    fn close_list(&mut self, path: &str, keyword: &str, depth: usize, nested: bool) -> Outcome<()> {
        let Some(Value::Array(list)) = self.at(path)?.get(keyword) else { return Ok(()) };
        (0..list.len()).try_for_each(|index| self.close(&format!("{path}/{keyword}/{index}"), depth, nested))
    }

    /// Puts the one entry of `allOf` and what stands beside it into one schema.
    fn merge_all_of(&mut self, path: &str, depth: usize, nested: bool, was_closed: bool) -> Outcome<()> {
        let entry_path = format!("{path}/allOf/0");
        let mut entry = match self.root.pointer(&entry_path) {
            Some(Value::Object(entry)) if is_bare_reference(entry) => {
                let entry = entry.clone();
                if nested {
                    return refuse(&entry_path, NESTED_RESOURCE);
                }
                self.spend(path)?;
                self.follow(&entry_path, entry)?
            }
            _ => {
                self.close(&entry_path, depth, nested)?;
                self.at(&entry_path)?.clone()
            }
        };
        let schema = self.at(path)?;
        schema.shift_remove("allOf");
        if !was_closed {
            // The merged object is closed once all its properties are known.
            schema.shift_remove("additionalProperties");
        }
        let mut clashes = Vec::new();
        let is_empty = |schema: &Map<String, Value>| schema.get("properties").is_none_or(|all| *all == json!({}));
        if schema.get("additionalProperties") == Some(&Value::Bool(false)) && is_empty(schema) && !is_empty(&entry) {
            clashes.push("properties".to_owned());
        }
        for (key, value) in std::mem::take(schema) {
            match entry.get(&key) {
                Some(_) if is_not_constraining(&key) => drop(entry.insert(key, value)),
                Some(other) if are_equal(other, &value) => {}
                Some(_) if (key == "properties" && value == json!({})) || (key == "required" && value == json!([])) => {
                }
                Some(_) => clashes.push(key),
                None => drop(entry.insert(key, value)),
            }
        }
        if !clashes.is_empty() {
            clashes.sort();
            return refuse(path, format!("allOf and what stands beside it disagree about {}", clashes.join(", ")));
        }
        *schema = entry;
        Ok(())
    }

    /// What a chain of references leads to, with what stands beside them: the nearest wins.
    fn follow(&mut self, path: &str, entry: Map<String, Value>) -> Outcome<Map<String, Value>> {
        let mut target = entry;
        let mut seen = HashSet::new();
        let mut beside = Map::new();
        while is_bare_reference(&target) {
            let Some(reference) = target.shift_remove("$ref") else { break };
            if !seen.insert(reference.to_string()) {
                return refuse(path, "a chain of $refs leads back to itself");
            }
            beside = overlay(target, beside);
            self.spend(path)?;
            target = self.resolve(path, &reference)?.1;
        }
        Ok(overlay(target, beside))
    }

    /// Where a reference leads, and a copy of the schema there.
    fn resolve(&mut self, path: &str, reference: &Value) -> Outcome<(String, Map<String, Value>)> {
        let unresolved = || NotStrict { path: path.to_owned(), message: format!("the $ref {reference} leads nowhere") };
        let pointer = reference.as_str().and_then(|text| text.strip_prefix("#/")).ok_or_else(unresolved)?;
        let pointer = percent_encoding::percent_decode_str(pointer).decode_utf8().map_err(|_| unresolved())?;
        let mut target = self.root.as_object().ok_or_else(unresolved)?;
        for key in pointer.split('/') {
            let key = key.replace("~1", "/").replace("~0", "~");
            target = target.get(&key).and_then(Value::as_object).ok_or_else(unresolved)?;
            if has_own_id(target) {
                return refuse(path, NESTED_RESOURCE);
            }
        }
        let target = target.clone();
        let size = target.iter().map(|(key, value)| key.len() + size(value)).sum();
        match self.bytes_left.checked_sub(size) {
            Some(left) => self.bytes_left = left,
            None => return refuse(path, TOO_LARGE),
        }
        Ok((format!("/{pointer}"), target))
    }

    fn spend(&mut self, path: &str) -> Outcome<()> {
        match self.nodes_left.checked_sub(1) {
            Some(left) => self.nodes_left = left,
            None => return refuse(path, TOO_LARGE),
        }
        Ok(())
    }

    fn at(&mut self, path: &str) -> Outcome<&mut Map<String, Value>> {
        let schema = self.root.pointer_mut(path).and_then(Value::as_object_mut);
        schema.ok_or_else(|| NotStrict { path: path.to_owned(), message: "a schema must be an object".to_owned() })
    }
}

/// Refuses a `$ref` that something beside it constrains, or that is of another document.
fn check_reference(schema: &Map<String, Value>, path: &str, nested: bool) -> Outcome<()> {
    let Some(reference) = schema.get("$ref") else { return Ok(()) };
    if nested {
        return refuse(path, NESTED_RESOURCE);
    }
    if !reference.is_string() {
        return refuse(path, "a $ref must be a string");
    }
    let stays = |key: &str| key == "$ref" || is_not_constraining(key) || (path.is_empty() && key == "$id");
    let mut clashes: Vec<&str> = schema.keys().map(String::as_str).filter(|key| !stays(key)).collect();
    clashes.sort_unstable();
    if clashes.is_empty() {
        return Ok(());
    }
    refuse(path, format!("a $ref can't be merged with what stands beside it: {}", clashes.join(", ")))
}

fn is_bare_reference(schema: &Map<String, Value>) -> bool {
    schema.contains_key("$ref") && schema.keys().all(|key| key == "$ref" || is_not_constraining(key))
}

fn is_not_constraining(key: &str) -> bool {
    NOT_CONSTRAINING.contains(&key)
}

fn has_own_id(schema: &Map<String, Value>) -> bool {
    schema.get("$id").is_some_and(Value::is_string)
}

/// `below` with what `above` says of the same keys.
fn overlay(mut below: Map<String, Value>, above: Map<String, Value>) -> Map<String, Value> {
    below.extend(above);
    below
}

/// Equal as Python's SDK compares: numbers by value, but never with a boolean.
fn are_equal(one: &Value, other: &Value) -> bool {
    let same_number = |one: &Number, other: &Number| one == other || one.as_f64() == other.as_f64();
    match (one, other) {
        (Value::Number(one), Value::Number(other)) => same_number(one, other),
        (Value::Array(one), Value::Array(other)) => {
            one.len() == other.len() && one.iter().zip(other).all(|(one, other)| are_equal(one, other))
        }
        (Value::Object(one), Value::Object(other)) => {
            one.len() == other.len()
                && one.iter().all(|(key, one)| other.get(key).is_some_and(|other| are_equal(one, other)))
        }
        _ => one == other,
    }
}

/// Nested objects and lists, the value itself among them.
fn depth(value: &Value) -> usize {
    match value {
        Value::Array(list) => 1 + list.iter().map(depth).max().unwrap_or(0),
        Value::Object(map) => 1 + map.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

/// About as many bytes as the value takes when it is written.
fn size(value: &Value) -> usize {
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => 4,
        Value::String(text) => text.len() + 2,
        Value::Array(list) => 2 + list.iter().map(|value| 1 + size(value)).sum::<usize>(),
        Value::Object(map) => 2 + map.iter().map(|(key, value)| key.len() + 4 + size(value)).sum::<usize>(),
    }
}
