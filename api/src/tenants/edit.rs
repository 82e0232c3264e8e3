//! A change of a tenant's row, and all that follows from it: the one way to suspend a tenant, move it to a plan, end
//! it.

use entity::tenants::{self, Status};
use entity::{plans, tenant_queues};
use sea_orm::sea_query::Expr;
use sea_orm::{ActiveModelTrait, ColumnTrait, DatabaseTransaction, EntityTrait, IntoActiveModel, QueryFilter};
use uuid::Uuid;

use super::changes::Change;
use crate::app::App;
use crate::error::{Error, Outcome};
use crate::keys::authority;
use crate::runs::paused::{self, Whose};
use crate::runs::{self, queue};

/// Why a tenant is not served. Each reason stands by itself: to take one away leaves the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SuspendedBy {
    /// Its object says so.
    Object,
    /// An admin said so.
    Admin,
    /// An invoice was not paid.
    Billing,
    /// Its object is gone, and it waits for another one.
    Absence,
}

/// A tenant that is being changed. Its row is held; what changes is committed, and told, by [`Edit::commit`].
pub struct Edit {
    tx: DatabaseTransaction,
    before: tenants::Model,
    after: tenants::Model,
    suspends: bool,
}

impl Edit {
    /// Of a tenant that isn't being deleted.
    pub async fn begin(app: &App, id: Uuid) -> Outcome<Self> {
        let tx = app.db.begin().await?;
        let before = super::locked(&tx, id).await?;
        Ok(Self { tx, after: before.clone(), before, suspends: false })
    }

    /// Of a tenant that may be being deleted.
    pub async fn begin_in_any_state(app: &App, id: Uuid) -> Outcome<Self> {
        let tx = app.db.begin().await?;
        let before = super::locked_in_any_state(&tx, id).await?;
        Ok(Self { tx, after: before.clone(), before, suspends: false })
    }

    /// The tenant as it will be; its status follows at the commit.
    pub fn tenant(&self) -> &tenants::Model {
        &self.after
    }

    /// The transaction, for what is to be committed together with the change.
    pub fn tx(&self) -> &DatabaseTransaction {
        &self.tx
    }

    /// Gives it another name.
    pub fn rename(&mut self, name: String) {
        self.after.name = name;
    }

    /// Gives it a limit of its own in tokens a month, or its plan's again.
    pub fn limit(&mut self, limit: Option<i64>) {
        self.after.monthly_token_limit = limit;
    }

    /// Moves it to a plan: its limit (unless it has its own), weight, caps and isolation.
    pub fn set_plan(&mut self, plan: &plans::Model) {
        self.after.plan.clone_from(&plan.name);
        self.after.isolation = plan.isolation;
    }

    /// Adds a reason not to serve it, or takes one away.
    pub fn suspend(&mut self, by: SuspendedBy, is_suspended: bool) {
        self.suspends |= is_suspended;
        let reason = match by {
            SuspendedBy::Object => &mut self.after.suspended_by_object,
            SuspendedBy::Admin => &mut self.after.suspended_by_admin,
            SuspendedBy::Billing => &mut self.after.suspended_by_billing,
            SuspendedBy::Absence => &mut self.after.suspended_by_absence,
        };
        *reason = is_suspended;
    }

    /// Lets no run start and none be claimed while it is leaving; those that workers have go on.
    pub fn leave(&mut self, is_leaving: bool) {
        self.after.is_leaving = is_leaving;
    }

    /// Ends it for good.
    pub fn delete(&mut self) {
        self.after.status = Status::Deleting;
    }

    /// Commits, and has all that follows done: keys are looked at anew, runs change their pool or go back to the queue,
    /// those of a deleted tenant are cancelled. What is cut off half way is done by the next sweep or start.
    pub async fn commit(self, app: &App) -> Outcome<tenants::Model> {
        let Self { tx, before, mut after, suspends } = self;
        if after.status != Status::Deleting {
            after.status = if after.is_suspended() { Status::Suspended } else { Status::Active };
        }
        if after == before {
            tx.commit().await?;
        } else {
            after.updated_at = app.clock.now();
            after = after.into_active_model().reset_all().update(&tx).await?;
            let has_moved = (&after.plan, after.isolation) != (&before.plan, before.isolation);
            if has_moved || after.takes_runs() != before.takes_runs() {
                cap_queues(app, &tx, &after).await?;
            }
            if has_moved {
                queue::change_pool(app, &tx, &after).await?;
            }
            if (&after.plan, after.monthly_token_limit) != (&before.plan, before.monthly_token_limit) {
                paused::reconsider(&tx, Whose::Tenant(after.id)).await?;
            }
            authority::commit(app, tx, after.id).await?;
            tell(app, &before, &after);
        }
        match after.status {
            Status::Suspended if suspends => take_back(app, after.id).await?,
            Status::Deleting => runs::cancel_all(app, after.id).await?,
            Status::Active | Status::Suspended => {}
        }
        Ok(after)
    }
}

/// Tells whoever waits for what has changed.
fn tell(app: &App, before: &tenants::Model, after: &tenants::Model) {
    let may_have_more = (&after.plan, after.monthly_token_limit) != (&before.plan, before.monthly_token_limit);
    if may_have_more {
        app.changes.publish(after.id, Change::Usage);
        app.releases.wake();
    }
    if after.takes_runs() {
        app.wakes.wake(&queue::pool_of(after));
    }
}

/// Lets as many of the tenant's runs be claimed as may be now.
async fn cap_queues(app: &App, tx: &DatabaseTransaction, tenant: &tenants::Model) -> Result<(), Error> {
    let max_running = if tenant.takes_runs() { app.plans.get(&tenant.plan)?.max_concurrent_runs } else { 0 };
    tenant_queues::Entity::update_many()
        .col_expr(tenant_queues::Column::MaxRunning, Expr::value(max_running))
        .filter(tenant_queues::Column::TenantId.eq(tenant.id))
        .exec(tx)
        .await?;
    Ok(())
}

/// Puts the runs that workers hold back into the queue. In a transaction apart: here runs are locked before the queue.
/// Nothing is claimed any more, so none is overlooked.
async fn take_back(app: &App, tenant_id: Uuid) -> Result<(), Error> {
    let tx = app.db.begin().await?;
    let stopped = queue::take_back(&tx, queue::Whose::Tenant(tenant_id), app.clock.now()).await?;
    tx.commit().await?;
    runs::announce(app, &stopped);
    Ok(())
}
