//! What the platform admin does with tenants. A tenant that has an object in a cluster is changed together with it;
//! each action returns what of it did not get to the object.

use entity::object_writes::Wish;
use entity::tenants::Isolation;
use entity::{TenantOwned, tenants};
use uuid::Uuid;

use super::edit::{Edit, SuspendedBy};
use super::{NewTenant, TenantChange};
use crate::app::App;
use crate::cluster::objects::SpecChange;
use crate::cluster::{asked, owed};
use crate::error::{Error, Outcome, UserError, UserErrorCode};
use crate::input::PatchExt;

/// What an action comes to: the tenant, and what of it did not get to the tenant's object.
pub type Done<T> = Outcome<(T, Vec<UserError>)>;

/// Makes a tenant, and its object where it is to have one.
pub async fn create(app: &App, new: NewTenant) -> Done<tenants::Model> {
    let tx = app.db.begin().await?;
    let tenant = super::insert(app, &tx, new).await?;
    if tenant.isolation == Isolation::Dedicated {
        owed::owe(app, &tx, tenant.id, Wish::Make).await?;
    }
    tx.commit().await?;
    let problems = owed::write(app, tenant.id).await;
    Ok((tenant, problems))
}

/// Changes a tenant's name or limit.
pub async fn update(app: &App, id: Uuid, change: TenantChange) -> Done<tenants::Model> {
    change.check()?;
    let said = SpecChange {
        display_name: change.name.clone().into_option().flatten(),
        monthly_token_limit: change.monthly_token_limit.into_option(),
        ..Default::default()
    };
    let said = asked::change_object(app, id, said).await?;
    let mut edit = Edit::begin(app, id).await?;
    asked::note(&edit, said.as_ref()).await?;
    change.apply(&mut edit);
    owed::renew(app, edit.tx(), id).await?;
    let tenant = edit.commit(app).await?;
    let problems = owed::write(app, id).await;
    Ok((tenant, problems))
}

/// Moves a tenant to a plan. One that is to have an object, and has none, gets it.
pub async fn set_plan(app: &App, id: Uuid, plan: &str) -> Done<tenants::Model> {
    let plan = app.plans.get(plan)?;
    let said = SpecChange { plan: Some(plan.name.clone()), ..Default::default() };
    let said = asked::change_object(app, id, said).await?;
    let mut edit = Edit::begin(app, id).await?;
    asked::note(&edit, said.as_ref()).await?;
    edit.set_plan(&plan);
    if said.is_none() && plan.isolation == Isolation::Dedicated {
        owed::owe(app, edit.tx(), id, Wish::Make).await?;
    }
    let tenant = edit.commit(app).await?;
    let problems = owed::write(app, id).await;
    Ok((tenant, problems))
}

/// Stops serving a tenant at once: its keys answer 403, its runs go back to the queue and wait there.
pub async fn suspend(app: &App, id: Uuid) -> Done<tenants::Model> {
    let mut edit = Edit::begin(app, id).await?;
    edit.suspend(SuspendedBy::Admin, true);
    owed::owe(app, edit.tx(), id, Wish::Suspension).await?;
    let tenant = edit.commit(app).await?;
    let problems = owed::write(app, id).await;
    Ok((tenant, problems))
}

/// Takes the admin's reason away not to serve a tenant, and has its object do so too. Where no other is left its runs
/// go on.
pub async fn resume(app: &App, id: Uuid) -> Done<tenants::Model> {
    let mut edit = Edit::begin(app, id).await?;
    edit.suspend(SuspendedBy::Admin, false);
    owed::owe(app, edit.tx(), id, Wish::Suspension).await?;
    edit.commit(app).await?;
    let mut problems = owed::write(app, id).await;
    let tenant = tenants::Entity::in_tenant(id).one(app.db.read()).await?;
    let tenant = tenant.ok_or_else(|| Error::internal("a tenant that was resumed is gone"))?;
    if problems.is_empty() {
        problems.extend(what_suspends_still(app, &tenant).await?);
    }
    Ok((tenant, problems))
}

async fn what_suspends_still(app: &App, tenant: &tenants::Model) -> Outcome<Option<UserError>> {
    if tenant.suspended_by_object {
        return Ok(asked::beyond_reach(app, tenant.id, "suspended").await?);
    }
    let state = |message: &str| Some(UserError::new(UserErrorCode::State, "tenantId", message));
    Ok(if tenant.suspended_by_billing {
        state("This tenant stays suspended: an invoice is not paid.")
    } else if tenant.suspended_by_absence {
        state("This tenant stays suspended: its object Tenant is gone. Make one with its id as spec.tenantId.")
    } else {
        None
    })
}

/// Stops serving a tenant for good and cancels its runs. Its rows are kept for the books. A deletion that was
/// interrupted may be asked for again, and goes on by itself at the next start.
pub async fn delete(app: &App, id: Uuid) -> Done<Uuid> {
    let mut edit = Edit::begin_in_any_state(app, id).await?;
    edit.delete();
    owed::owe(app, edit.tx(), id, Wish::Remove).await?;
    edit.commit(app).await?;
    let mut problems = owed::write(app, id).await;
    if problems.is_empty() {
        problems.extend(asked::beyond_reach(app, id, "").await?);
    }
    Ok((id, problems))
}
