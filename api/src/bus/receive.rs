//! What other replicas tell, passed on to whom it concerns here.

use super::{Topic, What};
use crate::app::App;
use crate::tenants::changes::Change;

/// Passes on what was told under a topic. What doesn't belong there is ignored.
pub fn receive(app: &App, topic: Topic, what: What) {
    match (topic, what) {
        (Topic::Everyone, What::Wake(pool)) => app.wakes.ring(&pool),
        (Topic::Everyone, What::Abandon { run_id, fence }) => app.pool.abandon(run_id, fence),
        (Topic::Everyone, What::Authority { tenant_id, epoch }) => {
            app.keys.authority_changed(tenant_id);
            app.keys.followed_by(epoch);
        }
        (Topic::Tenant(id), What::Run(run)) if run.tenant_id == id => app.changes.hear(id, Change::Run(run)),
        (Topic::Tenant(id), What::Usage) => app.changes.hear(id, Change::Usage),
        (Topic::Tenant(id), What::Provisioning) => app.changes.hear(id, Change::Provisioning),
        (Topic::Run(id), What::Delta(delta)) => app.live.hear(id, &delta),
        (Topic::Run(id), What::Items { items, ended }) => app.live.hear_items(id, items, ended),
        (Topic::Run(id), What::Look { next_sequence, ended }) => app.live.look(id, next_sequence, ended),
        (topic, what) => tracing::debug!(?topic, ?what, "a message in a channel where it doesn't belong"),
    }
}
