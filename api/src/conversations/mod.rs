//! Conversations: runs that share a history.

pub mod graphql;

use entity::runs::Status;
use entity::{TenantOwned, conversations, runs};
use sea_orm::ActiveValue::Set;
use sea_orm::{ActiveModelTrait, ColumnTrait, IntoActiveModel, PaginatorTrait, QueryFilter, QuerySelect};
use uuid::Uuid;

use crate::app::App;
use crate::error::{Outcome, UserError, UserErrorCode};

/// Deletes a conversation. Its runs stay, for the books, and go on resolving it.
pub async fn delete(app: &App, tenant_id: Uuid, id: Uuid) -> Outcome<Uuid> {
    let tx = app.db.begin().await?;
    let conversation = conversations::Entity::in_tenant(tenant_id)
        .filter(conversations::Column::Id.eq(id))
        .filter(conversations::Column::DeletedAt.is_null())
        .lock_exclusive()
        .one(&tx)
        .await?
        .ok_or_else(|| UserError::not_found("conversationId", "conversation"))?;
    let unfinished = runs::Entity::in_tenant(tenant_id)
        .filter(runs::Column::ConversationId.eq(id))
        .filter(runs::Column::Status.is_in(Status::UNFINISHED));
    if unfinished.count(&tx).await? > 0 {
        let message = "A run of this conversation is unfinished. Wait for it, or cancel it.";
        return Err(UserError::new(UserErrorCode::Conflict, "conversationId", message).into());
    }
    let mut row = conversation.into_active_model();
    row.deleted_at = Set(Some(app.clock.now()));
    row.update(&tx).await?;
    tx.commit().await?;
    Ok(id)
}
