//! What an admin is told of a tenant's object.

use entity::cluster_tenants;

use super::objects::{HeldField, Problem};
use crate::error::{UserError, UserErrorCode};

/// The object was asked first, and nothing has changed.
pub fn unchanged(name: &str, problem: &Problem) -> Vec<UserError> {
    match problem {
        Problem::Held(held) => held
            .iter()
            .map(|held| {
                let (what, manager) = (part(name, &held.field), &held.manager);
                let message =
                    format!("{what} is held by {manager}: nothing was changed. Change it where that object is kept.");
                managed(&held.field, message)
            })
            .collect(),
        Problem::Refused(reason) => {
            vec![UserError::invalid("", format!("The cluster does not take the Tenant {name} so: {reason}"))]
        }
        Problem::Away(reason) => {
            let message = format!(
                "The Tenant {name} rules this, and can't be changed now: {reason}. Nothing was changed, unless the \
                 cluster has taken it and could not say so; try again."
            );
            vec![UserError::new(UserErrorCode::ClusterUnavailable, "", message)]
        }
    }
}

/// It holds in the database, and somebody else holds the object to something else.
pub fn kept(name: &str, held: &HeldField) -> UserError {
    let (what, manager) = (part(name, &held.field), &held.manager);
    let message = format!(
        "This holds here. But {what} is held by {manager}, and was left as it is: change it where that object is kept."
    );
    managed(&held.field, message)
}

/// It holds in the database, and the object will be written.
pub fn owed(name: &str, problem: &Problem) -> UserError {
    let message = format!(
        "This holds here. The Tenant {name} does not say so yet ({}); that is tried again until it does.",
        reason(problem)
    );
    UserError::new(UserErrorCode::ClusterUnavailable, "", message)
}

/// The object is in a cluster that the api does not write to.
pub fn elsewhere(row: &cluster_tenants::Model, field: &str) -> UserError {
    let what = part(&row.name, field);
    let message =
        format!("{what} rules this, in the cluster {}, where the api does not write. Change it there.", row.cluster);
    managed(field, message)
}

/// Why an object was not written.
pub fn reason(problem: &Problem) -> String {
    match problem {
        Problem::Away(reason) | Problem::Refused(reason) => reason.clone(),
        Problem::Held(held) => {
            let held = held.iter().map(|held| format!("{} is held by {}", held.field, held.manager));
            held.collect::<Vec<_>>().join(", ")
        }
    }
}

fn managed(field: &str, message: String) -> UserError {
    UserError::new(UserErrorCode::ManagedByCluster, input_field(field), message)
}

fn part(name: &str, field: &str) -> String {
    if field.is_empty() { format!("the Tenant {name}") } else { format!("spec.{field} of the Tenant {name}") }
}

/// The input field of a mutation that a field of the spec follows from.
fn input_field(field: &str) -> &str {
    match field {
        "displayName" => "name",
        "plan" | "monthlyTokenLimit" | "email" => field,
        _ => "",
    }
}
