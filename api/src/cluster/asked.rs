//! A change that a tenant's object decides: the object is asked first, and the database follows.

use entity::cluster_tenants;
use sea_orm::ActiveValue::Set;
use sea_orm::{ActiveModelTrait, DatabaseTransaction, IntoActiveModel};
use uuid::Uuid;

use super::objects::{Problem, SpecChange, Written};
use super::places::ruler;
use super::{report, wording};
use crate::app::App;
use crate::error::{Error, Outcome, Refusal, UserError};
use crate::tenants::edit::Edit;

/// Says a change to the object that rules a tenant, before it is made in the database. None: no object rules it.
///
/// # Errors
/// Somebody else holds a field, or the cluster can't be asked; then nothing is to be changed.
pub async fn change_object(app: &App, tenant_id: Uuid, change: SpecChange) -> Outcome<Option<ObjectChange>> {
    // Of another tenant its change is refused in a moment.
    let exists = crate::tenants::exists(app, tenant_id).await?;
    let Some(row) = ruler(app.db.read(), tenant_id).await?.filter(|_| exists) else { return Ok(None) };
    if change.is_empty() {
        return Ok(Some(ObjectChange { row, change, written: None }));
    }
    if !is_here(app, &row).await.map_err(|problem| Refusal::User(wording::unchanged(&row.name, &problem)))? {
        let held = change.fields().into_iter().map(|(field, _)| wording::elsewhere(&row, field));
        return Err(Refusal::User(held.collect()));
    }
    match app.cluster.write(&row.name, &change, false).await {
        Ok(written) => Ok(Some(ObjectChange { row, change, written })),
        Err(problem) => Err(Refusal::User(wording::unchanged(&row.name, &problem))),
    }
}

/// Whether an object is in the cluster that the api writes to.
pub async fn is_here(app: &App, row: &cluster_tenants::Model) -> Result<bool, Problem> {
    Ok(app.cluster.writes_objects() && app.cluster.id().await? == row.cluster)
}

/// Says which object rules a tenant where the api can't write it.
pub async fn beyond_reach(app: &App, tenant_id: Uuid, field: &str) -> Result<Option<UserError>, Error> {
    let Some(row) = ruler(app.db.read(), tenant_id).await? else { return Ok(None) };
    // Whoever can't tell has been told so before.
    let is_here = is_here(app, &row).await.unwrap_or(true);
    Ok((!is_here).then(|| wording::elsewhere(&row, field)))
}

/// What was said to an object.
pub struct ObjectChange {
    row: cluster_tenants::Model,
    change: SpecChange,
    written: Option<Written>,
}

/// Notes, with the change in the database, what was said to the object, so that its operator's reports of earlier
/// generations don't undo it.
///
/// # Errors
/// Another object rules the tenant by now, or none did before.
pub async fn note(edit: &Edit, said: Option<&ObjectChange>) -> Result<(), Error> {
    let now = ruler(edit.tx(), edit.tenant().id).await?;
    let place = |row: &cluster_tenants::Model| (row.cluster.clone(), row.name.clone());
    if now.as_ref().map(place) != said.map(|said| place(&said.row)) {
        return Err(Error::Conflict);
    }
    if let Some((row, said)) = now.zip(said)
        && let Some(written) = &said.written
    {
        note_written(edit.tx(), row, written, &said.change).await?;
    }
    Ok(())
}

/// Notes what was written to the object that a row is of, as if its operator had told it. False: the operator
/// has told newer things meanwhile.
pub async fn note_written(
    tx: &DatabaseTransaction,
    row: cluster_tenants::Model,
    written: &Written,
    change: &SpecChange,
) -> Result<bool, Error> {
    let is_same = row.object_uid.as_ref().is_none_or(|uid| *uid == written.uid);
    // What the operator told meanwhile is newer, or of another object.
    if !is_same || written.generation < row.generation {
        return Ok(false);
    }
    let Some(mut known) = report::registration(&row)? else { return Ok(false) };
    change.note(&mut known);
    let mut row = row.into_active_model();
    row.generation = Set(written.generation);
    row.registration = Set(Some(serde_json::to_value(&known)?));
    row.update(tx).await?;
    Ok(true)
}
