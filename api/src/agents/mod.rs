//! Agents: drafts, published versions, and the graphs they form.

pub mod definition;
pub mod definition_graphql;
pub mod graph;
pub mod graphql;
pub mod guardrails_graphql;
pub mod input_graphql;
pub mod variables;

use std::collections::BTreeSet;
use std::mem::take;

use entity::{TenantOwned, agents, tenants};
use sea_orm::ActiveValue::Set;
use sea_orm::{
    ActiveModelTrait, ColumnTrait, ConnectionTrait, DatabaseTransaction, IntoActiveModel, PaginatorTrait, QueryFilter,
    QuerySelect,
};
use uuid::Uuid;

use self::definition::Definition;
use self::input_graphql::UpdateAgentInput;
use crate::app::App;
use crate::error::{Error, Outcome, UserError, UserErrorCode};
use crate::input::{Checks, PatchExt};

/// Agents a tenant may have that aren't deleted.
const MAX_AGENTS: u64 = 10_000;

/// Makes an agent, and publishes it if asked to; if that is refused, nothing is made.
pub async fn create(app: &App, tenant_id: Uuid, new: UpdateAgentInput, publish: bool) -> Outcome<agents::Model> {
    let standing = agents::Entity::in_tenant(tenant_id).filter(agents::Column::DeletedAt.is_null());
    if standing.count(app.db.read()).await? >= MAX_AGENTS {
        let message = format!("A tenant may have {MAX_AGENTS} agents; delete one first.");
        return Err(UserError::new(UserErrorCode::LimitExceeded, "", message).into());
    }
    let now = app.clock.now();
    let empty = agents::Model {
        id: Uuid::now_v7(),
        tenant_id,
        name: String::new(),
        description: None,
        definition: serde_json::to_value(Definition::default()).map_err(Error::from)?,
        published_version_id: None,
        created_at: now,
        updated_at: now,
        deleted_at: None,
    };
    let tx = app.db.begin().await?;
    let row = changed(app, &tx, empty, new).await?;
    let mut agent = row.reset_all().insert(&tx).await?;
    if publish {
        agent = graph::publish(app, &tx, agent).await?;
    }
    tx.commit().await?;
    Ok(agent)
}

/// Changes an agent's draft.
pub async fn update(app: &App, tenant_id: Uuid, id: Uuid, change: UpdateAgentInput) -> Outcome<agents::Model> {
    let tx = app.db.begin().await?;
    let agent = standing(&tx, tenant_id, id).await?;
    let agent = changed(app, &tx, agent, change).await?.update(&tx).await?;
    tx.commit().await?;
    Ok(agent)
}

async fn changed(
    app: &App,
    tx: &DatabaseTransaction,
    agent: agents::Model,
    mut change: UpdateAgentInput,
) -> Outcome<agents::ActiveModel> {
    let mut checks = Checks::default();
    let tenant_id = agent.tenant_id;
    let before: Definition = serde_json::from_value(agent.definition.clone()).map_err(Error::from)?;
    let mut row = agent.into_active_model();
    if let Some(name) = checks.required("name", take(&mut change.name)) {
        checks.text("name", &name, 1, 100);
        row.name = Set(name);
    }
    if let Some(description) = take(&mut change.description).into_option() {
        checks.text("description", description.as_deref().unwrap_or_default(), 0, 2_000);
        row.description = Set(description);
    }
    let tenant = tenants::Entity::in_tenant(tenant_id).one(tx).await?;
    let tenant = tenant.ok_or_else(|| Error::internal("an agent of a tenant that is gone"))?;
    let definition = before.changed(app, &tenant, change, &mut checks)?;
    check_targets(tx, tenant_id, &definition, &mut checks).await?;
    checks.finish()?;
    row.definition = Set(serde_json::to_value(&definition).map_err(Error::from)?);
    row.updated_at = Set(app.clock.now());
    Ok(row)
}

/// Handoffs, agent tools and guardrails must lead to agents that exist.
async fn check_targets(
    db: &impl ConnectionTrait,
    tenant_id: Uuid,
    definition: &Definition,
    checks: &mut Checks,
) -> Result<(), Error> {
    let wanted: BTreeSet<Uuid> = definition.references().map(|(_, id)| id).collect();
    if wanted.is_empty() {
        return Ok(());
    }
    let found: Vec<Uuid> = agents::Entity::in_tenant(tenant_id)
        .filter(agents::Column::Id.is_in(wanted))
        .filter(agents::Column::DeletedAt.is_null())
        .select_only()
        .column(agents::Column::Id)
        .into_tuple()
        .all(db)
        .await?;
    for (field, id) in definition.references() {
        if !found.contains(&id) {
            checks.push(UserError::not_found(&field, "agent"));
        }
    }
    Ok(())
}

/// Proves and freezes the draft as the version that runs use.
pub async fn publish(app: &App, tenant_id: Uuid, id: Uuid) -> Outcome<agents::Model> {
    let tx = app.db.begin().await?;
    let agent = standing(&tx, tenant_id, id).await?;
    let agent = graph::publish(app, &tx, agent).await?;
    tx.commit().await?;
    Ok(agent)
}

/// Publishes an earlier version again. The draft stays as it is.
pub async fn rollback(app: &App, tenant_id: Uuid, id: Uuid, version: i32) -> Outcome<agents::Model> {
    let tx = app.db.begin().await?;
    let agent = standing(&tx, tenant_id, id).await?;
    let agent = graph::rollback(app, &tx, agent, version).await?;
    tx.commit().await?;
    Ok(agent)
}

/// Deletes an agent. Versions that others have frozen go on running.
pub async fn delete(app: &App, tenant_id: Uuid, id: Uuid) -> Outcome<Uuid> {
    let tx = app.db.begin().await?;
    let mut row = standing(&tx, tenant_id, id).await?.into_active_model();
    row.deleted_at = Set(Some(app.clock.now()));
    row.update(&tx).await?;
    tx.commit().await?;
    Ok(id)
}

async fn standing(tx: &DatabaseTransaction, tenant_id: Uuid, id: Uuid) -> Outcome<agents::Model> {
    let agent = agents::Entity::in_tenant(tenant_id)
        .filter(agents::Column::Id.eq(id))
        .filter(agents::Column::DeletedAt.is_null())
        .lock_exclusive()
        .one(tx)
        .await?;
    agent.ok_or_else(|| UserError::not_found("agentId", "agent").into())
}
