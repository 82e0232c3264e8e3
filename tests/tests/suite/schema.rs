//! The schema: the committed file is what the binary prints, and holds all of the settled surface.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use async_graphql_parser::Positioned;
use async_graphql_parser::parse_schema;
use async_graphql_parser::types::{
    ConstDirective, FieldDefinition, InputValueDefinition, TypeDefinition, TypeKind, TypeSystemDefinition,
};
use cloister_tests::TestApp;

fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_committed_schema_is_what_the_binary_prints() {
    let app = TestApp::start().await;
    let output = app.command(&["schema"]).output().expect("cloister runs");
    assert!(output.status.success(), "{output:?}");
    let printed = String::from_utf8(output.stdout).expect("text");
    let committed = fs::read_to_string(workspace().join("schema.graphql")).expect("schema.graphql is committed");
    assert!(committed == printed, "schema.graphql is stale: run `cloister schema > schema.graphql`");
}

#[test]
fn the_committed_schema_contains_the_settled_surface() {
    let read =
        |path: &str| fs::read_to_string(workspace().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
    let settled = statements(&read("tests/fixtures/surface.graphql"));
    let committed = statements(&read("schema.graphql"));
    assert!(settled.len() > 700, "the settled surface has only {} statements", settled.len());
    let missing: Vec<String> = settled
        .iter()
        .filter(|(place, is)| committed.get(*place) != Some(is))
        .map(|(place, is)| {
            format!("{place} is {:?}, not {is:?}", committed.get(place).map_or("missing", String::as_str))
        })
        .collect();
    assert!(missing.is_empty(), "schema.graphql has left the settled surface:\n{}", missing.join("\n"));
}

/// What a schema says, each thing under its place: what there is, of which type, with which default.
fn statements(schema: &str) -> BTreeMap<String, String> {
    let mut said = BTreeMap::new();
    for definition in parse_schema(schema).expect("a schema").definitions {
        if let TypeSystemDefinition::Type(of) = definition {
            describe(&of.node, &mut said);
        }
    }
    said
}

fn describe(of: &TypeDefinition, said: &mut BTreeMap<String, String>) {
    let name = &of.name.node;
    let mut say = |place: String, what: String| {
        said.insert(place, what);
    };
    let kind = match &of.kind {
        TypeKind::Scalar => "scalar",
        TypeKind::Object(object) => {
            for interface in &object.implements {
                say(format!("{name} implements {}", interface.node), "yes".to_owned());
            }
            fields(name, &object.fields, &mut say);
            "type"
        }
        TypeKind::Interface(interface) => {
            for implemented in &interface.implements {
                say(format!("{name} implements {}", implemented.node), "yes".to_owned());
            }
            fields(name, &interface.fields, &mut say);
            "interface"
        }
        TypeKind::Union(union) => {
            for member in &union.members {
                say(format!("{name} holds {}", member.node), "yes".to_owned());
            }
            "union"
        }
        TypeKind::Enum(values) => {
            for value in &values.values {
                say(format!("{name}.{}", value.node.value.node), "a value".to_owned());
            }
            "enum"
        }
        TypeKind::InputObject(input) => {
            for field in &input.fields {
                say(format!("{name}.{}", field.node.name.node), typed(&field.node));
            }
            "input"
        }
    };
    let one_of = if has(&of.directives, "oneOf") { " @oneOf" } else { "" };
    say(name.to_string(), format!("{kind}{one_of}"));
}

fn fields(of: &str, fields: &[Positioned<FieldDefinition>], say: &mut impl FnMut(String, String)) {
    for field in fields {
        let field = &field.node;
        let place = format!("{of}.{}", field.name.node);
        for argument in &field.arguments {
            say(format!("{place}({})", argument.node.name.node), typed(&argument.node));
        }
        say(place, field.ty.node.to_string());
    }
}

/// The type of an argument or input field, and its default.
fn typed(input: &InputValueDefinition) -> String {
    let default = input.default_value.as_ref().map(|default| format!(" = {}", default.node)).unwrap_or_default();
    format!("{}{default}", input.ty.node)
}

fn has(directives: &[Positioned<ConstDirective>], name: &str) -> bool {
    directives.iter().any(|directive| directive.node.name.node == name)
}

#[test]
fn a_changed_surface_would_be_noticed() {
    let settled =
        statements("type T implements N { a(x: Int! = 1): [String!]! } input I @oneOf { b: Int } enum E { C }");
    for changed in [
        "type T implements N { a(x: Int! = 2): [String!]! } input I @oneOf { b: Int } enum E { C }",
        "type T implements N { a(x: Int = 1): [String!]! } input I @oneOf { b: Int } enum E { C }",
        "type T implements N { a(x: Int! = 1): [String]! } input I @oneOf { b: Int } enum E { C }",
        "type T { a(x: Int! = 1): [String!]! } input I @oneOf { b: Int } enum E { C }",
        "type T implements N { a(x: Int! = 1): [String!]! } input I { b: Int } enum E { C }",
        "type T implements N { a(x: Int! = 1): [String!]! } input I @oneOf { b: Int! } enum E { C }",
        "type T implements N { a(x: Int! = 1): [String!]! } input I @oneOf { b: Int } enum E { D }",
    ] {
        let changed = statements(changed);
        assert!(settled.iter().any(|(place, is)| changed.get(place) != Some(is)), "{changed:?}");
    }
}
