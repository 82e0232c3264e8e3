//! What an object says is taken over: a tenant is made, adopted or changed.

use chrono::{DateTime, Utc};
use crds::protocol::{Registration, Report, State};
use entity::tenants::{self, Status};
use entity::{TenantOwned, cluster_tenants};
use sea_orm::ActiveValue::Set;
use sea_orm::sea_query::OnConflict;
use sea_orm::{
    ActiveModelTrait, ColumnTrait, DatabaseTransaction, EntityTrait, IntoActiveModel, QueryFilter, QuerySelect,
};
use uuid::Uuid;

use super::places::{self, Place, check_uid};
use super::refused::Refused;
use super::{state, tokens};
use crate::app::App;
use crate::error::{Error, Refusal};
use crate::ids;
use crate::input::Checks;
use crate::tenants::changes::Change;
use crate::tenants::edit::{Edit, SuspendedBy};
use crate::tenants::{MAX_NAME, NewTenant};

/// Takes over what an object says, and answers what holds then. The same report again changes nothing; one of an
/// earlier generation is ignored.
///
/// # Errors
/// The spec can't hold, or the tenant is another object's.
pub async fn report(app: &App, place: &Place, report: Report) -> Result<State, Refused> {
    /// Each attempt but the last finds that something was made or let go of meanwhile, by itself or by another.
    const ATTEMPTS: usize = 4;
    check(app, &report)?;
    for _ in 0..ATTEMPTS {
        if let Some(row) = take(app, place, &report).await? {
            return state::of(app, row).await;
        }
    }
    Err(Refused::unavailable("The tenant is being registered by others at the same time. Try again."))
}

/// Refuses what no tenant can be, in the words of the spec.
fn check(app: &App, report: &Report) -> Result<(), Refused> {
    check_uid("An object", &report.uid)?;
    let said = &report.tenant;
    let mut checks = Checks::default();
    checks.text("spec.displayName", &said.display_name, 1, MAX_NAME);
    checks.email("spec.email", &said.email);
    checks.limit("spec.monthlyTokenLimit", said.monthly_token_limit);
    if let Err(Refusal::User(errors)) = checks.finish() {
        let told = errors.iter().map(|error| format!("{}: {}", error.field.join("."), error.message));
        return Err(Refused::invalid(told.collect::<Vec<_>>().join(" ")));
    }
    if !app.plans.all().any(|plan| plan.name == said.plan) {
        return Err(Refused::invalid(format!(
            "spec.plan: no plan is named {:?}: write free, pro or enterprise.",
            said.plan
        )));
    }
    adopts(said).map(|_| ())
}

/// The tenant that the object names.
fn adopts(said: &Registration) -> Result<Option<Uuid>, Refused> {
    let Some(id) = &said.tenant_id else { return Ok(None) };
    let named = ids::decode(ids::Tenant, id);
    let wrong = || Refused::invalid(format!("spec.tenantId: {id:?} is not a tenant's id: they begin with ten_."));
    named.map(Some).ok_or_else(wrong)
}

/// Takes a report over. None: something had to be made, or let go of, first; or somebody else was faster.
async fn take(app: &App, place: &Place, report: &Report) -> Result<Option<cluster_tenants::Model>, Refused> {
    let Some(found) = place.row(app.db.read()).await? else {
        register(app, place, report).await?;
        return Ok(None);
    };
    let mut edit = Edit::begin_in_any_state(app, found.tenant_id).await?;
    let Some(row) = place.locked(edit.tx()).await?.filter(|row| row.tenant_id == found.tenant_id) else {
        return Ok(None);
    };
    let is_same = row.is_live() && row.object_uid.as_ref() == Some(&report.uid);
    let named = adopts(&report.tenant)?.filter(|named| *named != row.tenant_id);
    if edit.tenant().status == Status::Deleting && is_same {
        return Err(Refused::conflict(format!(
            "The tenant {} was deleted through the API. Delete this Tenant; made anew, it is a new tenant's.",
            ids::encode(ids::Tenant, row.tenant_id).as_str()
        )));
    }
    if named.is_some() && is_same && row.registration.is_some() {
        let own = ids::encode(ids::Tenant, row.tenant_id);
        return Err(Refused::conflict(format!(
            "spec.tenantId: this Tenant is {}, and can't become another one. Set it back, or delete this Tenant and make \
             it anew.",
            own.as_str()
        )));
    }
    if edit.tenant().status == Status::Deleting || named.is_some() {
        // Another incarnation: the name is free for another tenant, and who had it waits for an object.
        edit.suspend(SuspendedBy::Absence, true);
        row.into_active_model().delete(edit.tx()).await?;
        edit.commit(app).await?;
        return Ok(None);
    }
    if is_same && report.generation < row.generation {
        return Ok(Some(row));
    }
    check_email(edit.tenant(), &report.tenant)?;
    if !is_same {
        tokens::begin_anew(app, edit.tx(), row.tenant_id).await?;
        edit.suspend(SuspendedBy::Absence, false);
        edit.leave(false);
    }
    let known = if is_same { registration(&row)? } else { None };
    apply(app, &mut edit, known.as_ref(), &report.tenant)?;
    let (row, has_progressed) = note(edit.tx(), row, report, app.clock.now()).await?;
    edit.commit(app).await?;
    if has_progressed {
        app.changes.publish(row.tenant_id, Change::Provisioning);
    }
    Ok(Some(row))
}

/// What the object last said.
pub fn registration(row: &cluster_tenants::Model) -> Result<Option<Registration>, Error> {
    Ok(row.registration.clone().map(serde_json::from_value).transpose()?)
}

fn check_email(tenant: &tenants::Model, said: &Registration) -> Result<(), Refused> {
    if tenant.email == said.email {
        return Ok(());
    }
    Err(Refused::conflict(format!(
        "spec.email: this tenant's address is {}, and fixed. Set it back, or use another name for another tenant.",
        tenant.email
    )))
}

/// Changes what the object says otherwise than it did before. What it says as before may have been changed since, by
/// billing, and stays.
fn apply(app: &App, edit: &mut Edit, known: Option<&Registration>, said: &Registration) -> Result<(), Refused> {
    if known.is_none_or(|known| known.display_name != said.display_name) {
        edit.rename(said.display_name.clone());
    }
    if known.is_none_or(|known| known.monthly_token_limit != said.monthly_token_limit) {
        edit.limit(said.monthly_token_limit);
    }
    if known.is_none_or(|known| known.plan != said.plan) {
        let plan = app.plans.get(&said.plan)?;
        edit.set_plan(&plan);
    }
    edit.suspend(SuspendedBy::Object, said.suspended);
    Ok(())
}

/// Notes what was taken over. Tells whether `Tenant.provisioning` has changed.
async fn note(
    tx: &DatabaseTransaction,
    row: cluster_tenants::Model,
    report: &Report,
    now: DateTime<Utc>,
) -> Result<(cluster_tenants::Model, bool), Error> {
    let provisioning = serde_json::to_value(&report.provisioning)?;
    let has_progressed = !row.is_live() || row.provisioning.as_ref() != Some(&provisioning);
    let mut new = row.into_active_model();
    if has_progressed {
        new.provisioning = Set(Some(provisioning));
        new.changed_at = Set(now);
    }
    new.object_uid = Set(Some(report.uid.clone()));
    new.generation = Set(report.generation);
    new.registration = Set(Some(serde_json::to_value(&report.tenant)?));
    new.last_seen_at = Set(Some(now));
    new.released_at = Set(None);
    Ok((new.update(tx).await?, has_progressed))
}

/// Makes a tenant for an object that has none, or adopts the one that it names. What the object says of it is taken
/// over after that.
async fn register(app: &App, place: &Place, report: &Report) -> Result<(), Refused> {
    let tx = app.db.begin().await?;
    let tenant_id = match adopts(&report.tenant)? {
        Some(id) => adopt(&tx, id, report).await?,
        None => {
            let said = report.tenant.clone();
            let new = NewTenant {
                name: said.display_name,
                email: said.email,
                plan: said.plan,
                monthly_token_limit: said.monthly_token_limit,
            };
            crate::tenants::insert(app, &tx, new).await?.id
        }
    };
    if insert(&tx, place, tenant_id, app.clock.now()).await? {
        tx.commit().await?;
    }
    Ok(())
}

/// A row for an object of which nothing was taken over yet. False if its place is taken.
pub async fn insert(
    tx: &DatabaseTransaction,
    place: &Place,
    tenant_id: Uuid,
    now: DateTime<Utc>,
) -> Result<bool, Error> {
    let row = cluster_tenants::ActiveModel {
        cluster: Set(place.cluster.clone()),
        name: Set(place.name.clone()),
        tenant_id: Set(tenant_id),
        object_uid: Set(None),
        generation: Set(0),
        registration: Set(None),
        provisioning: Set(None),
        created_at: Set(now),
        changed_at: Set(now),
        last_seen_at: Set(None),
        released_at: Set(None),
    };
    let place = [cluster_tenants::Column::Cluster, cluster_tenants::Column::Name];
    let inserted = cluster_tenants::Entity::insert(row)
        .on_conflict(OnConflict::columns(place).do_nothing().to_owned())
        .exec_without_returning(tx)
        .await?;
    Ok(inserted > 0)
}

/// Lets an object have a tenant that exists, unless another object that is there has it.
async fn adopt(tx: &DatabaseTransaction, id: Uuid, report: &Report) -> Result<Uuid, Refused> {
    let tenant = tenants::Entity::in_tenant(id).lock_exclusive().one(tx).await?;
    let tenant = tenant.filter(|tenant| tenant.status != Status::Deleting).ok_or_else(|| {
        Refused::invalid(
            "spec.tenantId: there is no such tenant. Leave it out, and a new tenant is made; a Tenant that was registered \
             before has to be deleted and made anew for that.",
        )
    })?;
    check_email(&tenant, &report.tenant)?;
    if let Some(ruler) = places::ruler(tx, id).await? {
        return Err(Refused::conflict(format!(
            "spec.tenantId: this tenant is ruled by the Tenant {} of the cluster {}. Delete that one first, with \
             deletionPolicy Retain.",
            ruler.name, ruler.cluster
        )));
    }
    release_all(tx, id).await?;
    Ok(id)
}

/// Forgets where a tenant's earlier objects were.
pub async fn release_all(tx: &DatabaseTransaction, tenant_id: Uuid) -> Result<(), Error> {
    cluster_tenants::Entity::delete_many()
        .filter(cluster_tenants::Column::TenantId.eq(tenant_id))
        .filter(cluster_tenants::Column::ReleasedAt.is_not_null())
        .exec(tx)
        .await?;
    Ok(())
}
