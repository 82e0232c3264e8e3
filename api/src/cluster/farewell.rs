//! An object goes: its tenant drains, and is kept without it or deleted.

use std::collections::HashSet;

use chrono::TimeDelta;
use crds::protocol::{Departure, Farewell, Inventory};
use entity::runs::Status;
use entity::{TenantOwned, cluster_tenants, runs, tenants};
use sea_orm::ActiveValue::Set;
use sea_orm::{ActiveModelTrait, ColumnTrait, IntoActiveModel, PaginatorTrait, QueryFilter};
use uuid::Uuid;

use super::places::{Place, check_uid};
use super::refused::Refused;
use crate::app::App;
use crate::error::Error;
use crate::runs::cancel_all;
use crate::tenants::changes::Change;
use crate::tenants::edit::{Edit, SuspendedBy};

/// An object that was told of so lately is not missed in a list: the list may be older, and on its way since.
const FRESH: TimeDelta = TimeDelta::seconds(3);
/// The same for an object that the api made, of which its operator has not told yet.
const UNSEEN: TimeDelta = TimeDelta::minutes(5);

/// Goes on with a tenant's end: no new runs at once, then those that are left are ended, then the object is let go of.
pub async fn farewell(app: &App, place: &Place, said: Farewell) -> Result<Departure, Refused> {
    check_uid("An object", &said.uid)?;
    let gone = Departure { running: 0, is_gone: true };
    let Some(found) = place.row(app.db.read()).await? else { return Ok(gone) };
    let mut edit = Edit::begin_in_any_state(app, found.tenant_id).await?;
    let row = place.locked(edit.tx()).await?.filter(|row| row.tenant_id == found.tenant_id && row.is_live());
    // Another incarnation has the tenant: this one is let go of.
    let Some(row) = row.filter(|row| row.object_uid.as_deref().is_none_or(|uid| uid == said.uid)) else {
        return Ok(gone);
    };
    let is_deleting = edit.tenant().status == tenants::Status::Deleting;
    if said.deregister {
        let tenant_id = row.tenant_id;
        if said.retain && !is_deleting {
            release(&mut edit, row, app).await?;
            edit.commit(app).await?;
        } else {
            edit.delete();
            row.into_active_model().delete(edit.tx()).await?;
            edit.commit(app).await?;
        }
        app.changes.publish(tenant_id, Change::Provisioning);
        return Ok(gone);
    }
    if !is_deleting {
        edit.leave(true);
    }
    if said.cancel && said.retain {
        // Its runs are kept too, and go on once an object has taken it over again.
        edit.suspend(SuspendedBy::Absence, true);
    }
    edit.commit(app).await?;
    if said.cancel && !said.retain {
        cancel_all(app, row.tenant_id).await?;
    }
    Ok(Departure { running: running(app, row.tenant_id).await?, is_gone: false })
}

/// Keeps a tenant without its object, suspended until another one takes it over.
async fn release(edit: &mut Edit, row: cluster_tenants::Model, app: &App) -> Result<(), Error> {
    edit.leave(false);
    edit.suspend(SuspendedBy::Object, false);
    edit.suspend(SuspendedBy::Absence, true);
    let now = app.clock.now();
    let mut row = row.into_active_model();
    row.object_uid = Set(None);
    row.released_at = Set(Some(now));
    row.changed_at = Set(now);
    row.update(edit.tx()).await?;
    Ok(())
}

async fn running(app: &App, tenant_id: Uuid) -> Result<u64, Error> {
    let running = runs::Entity::in_tenant(tenant_id).filter(runs::Column::Status.eq(Status::Running));
    Ok(running.count(app.db.read()).await?)
}

/// Lets go of the tenants of a cluster whose objects went without a farewell. They are kept: nobody said otherwise.
pub async fn inventory(app: &App, cluster: &str, said: Inventory) -> Result<(), Refused> {
    check_uid("The cluster", cluster)?;
    let there: HashSet<&str> = said.objects.iter().map(|object| object.name.as_str()).collect();
    let rows = cluster_tenants::Entity::across_tenants()
        .filter(cluster_tenants::Column::Cluster.eq(cluster))
        .filter(cluster_tenants::Column::ReleasedAt.is_null())
        .all(app.db.read())
        .await?;
    let now = app.clock.now();
    let is_lost = |row: &cluster_tenants::Model| {
        let may_be_newer = row.last_seen_at.map_or(now - row.created_at < UNSEEN, |seen| now - seen < FRESH);
        !there.contains(row.name.as_str()) && !may_be_newer
    };
    for row in rows.into_iter().filter(is_lost) {
        let_go(app, row).await?;
    }
    Ok(())
}

async fn let_go(app: &App, found: cluster_tenants::Model) -> Result<(), Refused> {
    let place = Place { cluster: found.cluster.clone(), name: found.name.clone() };
    let mut edit = Edit::begin_in_any_state(app, found.tenant_id).await?;
    // Unless it was taken over anew meanwhile.
    let row = place.locked(edit.tx()).await?.filter(|row| *row == found);
    let Some(row) = row else { return Ok(()) };
    let tenant_id = row.tenant_id;
    let (cluster, name) = (&row.cluster, &row.name);
    tracing::warn!(cluster, name, %tenant_id, "an object went without a farewell: its tenant is kept, suspended");
    if edit.tenant().status == tenants::Status::Deleting {
        row.into_active_model().delete(edit.tx()).await?;
    } else {
        release(&mut edit, row, app).await?;
    }
    edit.commit(app).await?;
    app.changes.publish(tenant_id, Change::Provisioning);
    Ok(())
}
