//! The API as its own schema describes it: every root field with arguments made for it, so that a test
//! over all of them can't forget one.

use std::collections::BTreeMap;

use cloister_tests::Client;
use serde_json::{Map, Value, json};

const INTROSPECTION: &str = "{ __schema { types { kind name isOneOf
    fields { name type { ...T } args { name defaultValue type { ...T } } }
    inputFields { name defaultValue type { ...T } } enumValues { name } possibleTypes { name } } } }
fragment T on __Type { kind name ofType { kind name ofType { kind name ofType { kind name } } } }";

/// Where a root field is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Query,
    Mutation,
    Subscription,
}

/// A field of Query, Mutation or Subscription.
#[derive(Clone, Debug)]
pub struct Root {
    pub kind: Kind,
    pub name: String,
    args: Vec<Value>,
    of: Value,
}

impl Root {
    /// `Mutation.createAgent`
    pub fn path(&self) -> String {
        format!("{:?}.{}", self.kind, self.name)
    }
}

/// The path of an argument or input field; lists leave no trace in it.
pub type Slot = Vec<String>;

/// What an argument is made of where the test has no say.
pub trait Values {
    /// An id for this slot.
    fn id(&self, slot: &[String]) -> String;
}

/// The schema.
pub struct Api {
    types: BTreeMap<String, Value>,
}

impl Api {
    /// Asks the server.
    pub async fn read(client: &Client) -> Api {
        let schema = client.data(INTROSPECTION, json!({})).await;
        let types = schema["__schema"]["types"].as_array().expect("types").iter();
        Api { types: types.map(|of| (of["name"].as_str().expect("a name").to_owned(), of.clone())).collect() }
    }

    /// Every root field.
    pub fn roots(&self) -> Vec<Root> {
        let roots = [Kind::Query, Kind::Mutation, Kind::Subscription].into_iter().flat_map(|kind| {
            let fields = self.types[&format!("{kind:?}")]["fields"].as_array().expect("fields");
            fields.iter().map(move |field| Root {
                kind,
                name: field["name"].as_str().expect("a name").to_owned(),
                args: field["args"].as_array().expect("arguments").clone(),
                of: field["type"].clone(),
            })
        });
        roots.collect()
    }

    /// Every place of a root field's arguments that takes an id.
    pub fn id_slots(&self, root: &Root) -> Vec<Slot> {
        let mut slots = Vec::new();
        self.find(&root.args, "ID", &mut Vec::new(), &mut slots);
        slots
    }

    fn find(&self, inputs: &[Value], scalar: &str, path: &mut Slot, slots: &mut Vec<Slot>) {
        assert!(path.len() < 12, "an input contains itself: {path:?}");
        for input in inputs {
            path.push(input["name"].as_str().expect("a name").to_owned());
            let name = named(&input["type"]);
            if name == scalar {
                slots.push(path.clone());
            } else if let Some(fields) = self.types[name]["inputFields"].as_array() {
                self.find(fields, scalar, path, slots);
            }
            path.pop();
        }
    }

    /// Required places of a root field's arguments, of any type, whose parents are required too.
    pub fn required_slots(&self, root: &Root) -> Vec<Slot> {
        let mut slots = Vec::new();
        for arg in root.args.iter().filter(|arg| is_required(arg)) {
            let name = arg["name"].as_str().expect("a name").to_owned();
            let fields = self.types[named(&arg["type"])]["inputFields"].as_array().cloned().unwrap_or_default();
            for field in fields.iter().filter(|field| is_required(field)) {
                slots.push(vec![name.clone(), field["name"].as_str().expect("a name").to_owned()]);
            }
            slots.push(vec![name]);
        }
        slots
    }

    /// A document and its variables that call a root field with the least that it needs, and with `id` in
    /// `slot` where one is given. `levels` of objects are selected below the field.
    pub fn call(
        &self,
        root: &Root,
        slot: Option<(&[String], &str)>,
        values: &dyn Values,
        levels: usize,
    ) -> (String, Value) {
        let mut variables = Map::new();
        let mut declared = Vec::new();
        let mut passed = Vec::new();
        for arg in &root.args {
            let name = arg["name"].as_str().expect("a name");
            let wanted = slot.is_some_and(|(path, _)| path[0] == name);
            if !wanted && !is_required(arg) {
                continue;
            }
            let value = self.value(&arg["type"], &mut vec![name.to_owned()], slot, values);
            variables.insert(name.to_owned(), value);
            declared.push(format!("${name}: {}", written(&arg["type"])));
            passed.push(format!("{name}: ${name}"));
        }
        let brackets = |list: &[String]| if list.is_empty() { String::new() } else { format!("({})", list.join(", ")) };
        let selection = self.selection(&root.of, levels);
        let kind = format!("{:?}", root.kind).to_lowercase();
        let (declared, passed) = (brackets(&declared), brackets(&passed));
        (format!("{kind} {declared} {{ {}{passed} {selection} }}", root.name), Value::Object(variables))
    }

    fn value(&self, of: &Value, path: &mut Slot, slot: Option<(&[String], &str)>, values: &dyn Values) -> Value {
        match of["kind"].as_str().expect("a kind") {
            "NON_NULL" => return self.value(&of["ofType"], path, slot, values),
            "LIST" => return json!([self.value(&of["ofType"], path, slot, values)]),
            _ => {}
        }
        let name = of["name"].as_str().expect("a named type");
        let of = &self.types[name];
        if let Some(fields) = of["inputFields"].as_array() {
            let on_the_way = |field: &Value| {
                slot.is_some_and(|(slot, _)| {
                    slot.len() > path.len() && slot.starts_with(path) && field["name"] == slot[path.len()].as_str()
                })
            };
            let one_of = of["isOneOf"] == true;
            let any = fields.iter().any(on_the_way);
            let chosen: Vec<&Value> = match (one_of, any) {
                (true, false) => fields.iter().take(1).collect(),
                (true, true) => fields.iter().filter(|field| on_the_way(field)).collect(),
                (false, _) => fields.iter().filter(|field| is_required(field) || on_the_way(field)).collect(),
            };
            let mut object = Map::new();
            for field in chosen {
                let name = field["name"].as_str().expect("a name").to_owned();
                path.push(name.clone());
                object.insert(name, self.value(&field["type"], path, slot, values));
                path.pop();
            }
            return Value::Object(object);
        }
        if let Some(variants) = of["enumValues"].as_array() {
            return variants[0]["name"].clone();
        }
        match (name, path.last().expect("a path").as_str()) {
            ("ID", _) => match slot {
                Some((slot, id)) if slot == path.as_slice() => json!(id),
                _ => json!(values.id(path)),
            },
            ("String", "email") => json!("someone@example.test"),
            ("String", "model") => json!("demo"),
            ("String", "url") => json!("https://example.com/hook"),
            ("String", "name") => json!("named"),
            ("String", _) => json!("text"),
            ("Int", "graceSeconds") => json!(0),
            ("Int", _) => json!(1),
            ("Float", _) => json!(1.0),
            ("Boolean", _) => json!(false),
            ("Long", _) => json!(1_000),
            ("JSON", _) => json!({}),
            ("DateTime", _) => json!("2099-01-01T00:00:00Z"),
            ("Month", _) => json!("2026-01"),
            (other, _) => panic!("say in generated.rs what a {other} looks like"),
        }
    }

    /// Every field of a type that needs no argument, with `levels` of objects below it.
    fn selection(&self, of: &Value, levels: usize) -> String {
        let of = &self.types[named(of)];
        let kind = of["kind"].as_str().expect("a kind");
        if matches!(kind, "SCALAR" | "ENUM") {
            return String::new();
        }
        let mut selected = vec!["__typename".to_owned()];
        let mut seen = BTreeMap::new();
        self.select(of, levels, &mut seen, &mut selected);
        for possible in of["possibleTypes"].as_array().into_iter().flatten() {
            let possible = &self.types[possible["name"].as_str().expect("a name")];
            let mut own = Vec::new();
            self.select(possible, levels, &mut seen, &mut own);
            if !own.is_empty() {
                selected.push(format!("... on {} {{ {} }}", possible["name"].as_str().expect("a name"), own.join(" ")));
            }
        }
        format!("{{ {} }}", selected.join(" "))
    }

    /// A name that stands for another type elsewhere in the same selection is passed over: the two would
    /// not merge.
    fn select(&self, of: &Value, levels: usize, seen: &mut BTreeMap<String, String>, selected: &mut Vec<String>) {
        if of["kind"] == "UNION" {
            return;
        }
        let fields = of["fields"].as_array().expect("fields");
        let has_nodes = fields.iter().any(|field| field["name"] == "nodes");
        for field in fields {
            let name = field["name"].as_str().expect("a name");
            let args = field["args"].as_array().expect("arguments");
            if args.iter().any(is_required) || (has_nodes && matches!(name, "edges" | "pageInfo")) {
                continue;
            }
            let as_written = written(&field["type"]);
            if seen.get(name).is_some_and(|known| *known != as_written) {
                continue;
            }
            let is_leaf = matches!(self.types[named(&field["type"])]["kind"].as_str(), Some("SCALAR" | "ENUM"));
            if !is_leaf && levels == 0 {
                continue;
            }
            seen.insert(name.to_owned(), as_written);
            let first = if args.iter().any(|arg| arg["name"] == "first") { "(first: 2)" } else { "" };
            let below = self.selection(&field["type"], levels.saturating_sub(1));
            selected.push(format!("{name}{first} {below}"));
        }
    }
}

/// Whether an argument or input field must be given.
fn is_required(input: &Value) -> bool {
    input["type"]["kind"] == "NON_NULL" && input["defaultValue"].is_null()
}

/// The name of the type within lists and non-nulls.
fn named(of: &Value) -> &str {
    match of["name"].as_str() {
        Some(name) => name,
        None => named(&of["ofType"]),
    }
}

/// A type as a document writes it.
fn written(of: &Value) -> String {
    match of["kind"].as_str() {
        Some("NON_NULL") => format!("{}!", written(&of["ofType"])),
        Some("LIST") => format!("[{}]", written(&of["ofType"])),
        _ => of["name"].as_str().expect("a name").to_owned(),
    }
}
