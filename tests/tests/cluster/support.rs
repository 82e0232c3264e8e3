//! What the tests on a cluster have in common: names, and what the platform's admin does.

use cloister_tests::TestApp;
use serde_json::{Value, json};
use uuid::Uuid;

/// A name that no other test has.
pub fn name(prefix: &str) -> String {
    format!("{prefix}-{}", &Uuid::new_v4().simple().to_string()[..8])
}

/// A mutation of the admin's on a tenant: its payload.
pub async fn mutate(app: &TestApp, name: &str, input: Value) -> Value {
    let of = match name {
        "suspendTenant" | "resumeTenant" | "deleteTenant" => "TenantIdInput".to_owned(),
        _ => format!("{}{}Input", name[..1].to_uppercase(), &name[1..]),
    };
    let selection = if name == "deleteTenant" { "deletedId" } else { "tenant { id name status plan { name } }" };
    let mutation = format!(
        "mutation ($input: {of}!) {{ {name}(input: $input) {{ {selection} errors {{ code message field }} }} }}"
    );
    app.admin().data(&mutation, json!({"input": input})).await[name].clone()
}

/// The same, without an error.
pub async fn done(app: &TestApp, name: &str, input: Value) -> Value {
    let payload = mutate(app, name, input).await;
    assert_eq!(payload["errors"], json!([]), "{name}");
    payload
}
