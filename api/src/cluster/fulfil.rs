//! One write to an object: what it is to say, and what is noted of it.

use crds::protocol::Registration;
use entity::object_writes::Wish;
use entity::tenants::{self, Isolation, Status};
use sea_orm::ActiveValue::Set;
use sea_orm::{ActiveModelTrait, IntoActiveModel};
use uuid::Uuid;

use super::asked::{is_here, note_written};
use super::objects::{Problem, SpecChange, Written, stated_tenant, states_suspension};
use super::owed::object_name;
use super::places::{Place, ruler};
use super::{report, tokens};
use crate::app::App;
use crate::error::{Error, Refusal};
use crate::ids;
use crate::tenants::changes::Change;
use crate::tenants::edit::{Edit, SuspendedBy};

/// Why a wish was not fulfilled.
pub enum Failure {
    /// The object is in the way, or its cluster.
    Problem(Problem),
    /// A fault of ours.
    Error(Error),
}

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        Self::Problem(problem)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

/// Writes what is wished for, as the tenant is now.
pub async fn fulfil(app: &App, tenant: &tenants::Model, wish: Wish) -> Result<(), Failure> {
    match wish {
        Wish::Make => make(app, tenant).await,
        Wish::Suspension => state_suspension(app, tenant).await,
        Wish::Remove => remove(app, tenant).await,
    }
}

/// A tenant of which something is written down; it may be being deleted by now.
async fn edit(app: &App, tenant_id: Uuid) -> Result<Edit, Error> {
    Edit::begin_in_any_state(app, tenant_id).await.map_err(fault)
}

fn fault(refusal: Refusal) -> Error {
    match refusal {
        Refusal::Error(error) => error,
        Refusal::User(errors) => Error::internal(format!("the tenant of an object: {errors:?}")),
    }
}

/// Makes the object of a tenant that has none, and notes that it rules the tenant.
async fn make(app: &App, tenant: &tenants::Model) -> Result<(), Failure> {
    if ruler(app.db.read(), tenant.id).await?.is_some() {
        return state_suspension(app, tenant).await;
    }
    if tenant.status == Status::Deleting {
        return Ok(());
    }
    let id = ids::encode(ids::Tenant, tenant.id).to_string();
    let place = Place { cluster: app.cluster.id().await?.to_owned(), name: object_name(tenant.id) };
    match app.cluster.find(&place.name).await? {
        Some(live) if stated_tenant(&live) != Some(&id) => {
            return Err(Problem::Refused(format!("the Tenant {} is there, and not this tenant's", place.name)).into());
        }
        // It needs none any more.
        None if tenant.isolation != Isolation::Dedicated => return Ok(()),
        _ => {}
    }
    let said = saying(tenant);
    let written = app.cluster.write(&place.name, &SpecChange::all(said.clone()), true).await?;
    if let Some(written) = written {
        note_made(app, tenant.id, &place, &written, &said).await?;
    }
    Ok(())
}

/// What an object says of a tenant that an admin made.
fn saying(tenant: &tenants::Model) -> Registration {
    Registration {
        tenant_id: Some(ids::encode(ids::Tenant, tenant.id).to_string()),
        display_name: tenant.name.clone(),
        email: tenant.email.clone(),
        plan: tenant.plan.clone(),
        monthly_token_limit: tenant.monthly_token_limit,
        suspended: tenant.suspended_by_admin,
    }
}

async fn note_made(
    app: &App,
    tenant_id: Uuid,
    place: &Place,
    written: &Written,
    said: &Registration,
) -> Result<(), Error> {
    let mut edit = edit(app, tenant_id).await?;
    // Its operator may have been faster; and what has changed meanwhile is written in the next round.
    if ruler(edit.tx(), tenant_id).await?.is_some() || saying(edit.tenant()) != *said {
        return Ok(());
    }
    report::release_all(edit.tx(), tenant_id).await?;
    if report::insert(edit.tx(), place, tenant_id, app.clock.now()).await?
        && let Some(row) = place.locked(edit.tx()).await?
    {
        let mut row = row.into_active_model();
        row.object_uid = Set(Some(written.uid.clone()));
        row.generation = Set(written.generation);
        row.registration = Set(Some(serde_json::to_value(said)?));
        row.update(edit.tx()).await?;
        tokens::begin_anew(app, edit.tx(), tenant_id).await?;
        edit.suspend(SuspendedBy::Absence, false);
        edit.leave(false);
        edit.suspend(SuspendedBy::Object, said.suspended);
    }
    edit.commit(app).await.map_err(fault)?;
    app.changes.publish(tenant_id, Change::Provisioning);
    Ok(())
}

/// Has the object say whether an admin has suspended its tenant.
async fn state_suspension(app: &App, tenant: &tenants::Model) -> Result<(), Failure> {
    let Some(row) = ruler(app.db.read(), tenant.id).await? else { return Ok(()) };
    if !is_here(app, &row).await? {
        return Ok(());
    }
    let Some(live) = app.cluster.find(&row.name).await? else { return Ok(()) };
    let wanted = tenant.suspended_by_admin;
    let change = SpecChange { suspended: Some(wanted), ..Default::default() };
    let written = match states_suspension(&live) == wanted {
        true => Some(Written::of(&live)),
        false => app.cluster.write(&row.name, &change, false).await?,
    };
    let Some(written) = written else { return Ok(()) };
    let mut edit = edit(app, tenant.id).await?;
    if let Some(row) = ruler(edit.tx(), tenant.id).await?
        && note_written(edit.tx(), row, &written, &change).await?
    {
        edit.suspend(SuspendedBy::Object, wanted);
    }
    edit.commit(app).await.map_err(fault)?;
    Ok(())
}

/// Deletes the object of a deleted tenant. What its operator has to clean up it does then.
async fn remove(app: &App, tenant: &tenants::Model) -> Result<(), Failure> {
    let id = ids::encode(ids::Tenant, tenant.id);
    let name = match ruler(app.db.read(), tenant.id).await? {
        Some(row) if !is_here(app, &row).await? => return Ok(()),
        Some(row) => row.name,
        // It may have been made, and nobody could note it.
        None => object_name(tenant.id),
    };
    Ok(app.cluster.remove(&name, &id).await?)
}
