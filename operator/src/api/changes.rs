//! What the api tells of its own accord: usage, billing and drains, by one long poll for all tenants; and what it is told
//! now and then: which objects there are.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use crds::Tenant;
use crds::protocol::{Changed, Inventory, Object};
use kube::ResourceExt;
use tokio_util::sync::CancellationToken;

use crate::operator::Operator;

const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How often the api is told of every object.
const INVENTORY: Duration = Duration::from_secs(300);
const INVENTORY_AGAIN: Duration = Duration::from_secs(10);

/// Follows the api's changes until told to stop. `told` is cancelled once it has told of every tenant, or proved away.
pub async fn follow(operator: Arc<Operator>, told: CancellationToken, stopping: CancellationToken) {
    let mut cursor: Option<String> = None;
    let mut pause = FIRST_PAUSE;
    let mut is_up = true;
    while let Some(answer) = stopping.run_until_cancelled(operator.api.changes(cursor.as_deref())).await {
        match answer {
            Ok(changes) => {
                if changes.is_all {
                    register_again(&operator, &changes.tenants);
                }
                for changed in changes.tenants {
                    if operator.memory.told(&changed.name, changed.state) {
                        operator.cluster.triggers.tenant(&changed.name);
                    }
                }
                cursor = Some(changes.cursor);
                pause = FIRST_PAUSE;
                if !is_up {
                    tracing::info!("the api answers again");
                    is_up = true;
                    operator.cluster.trigger_all();
                }
                told.cancel();
            }
            Err(error) => {
                if is_up {
                    tracing::warn!(%error, "tenants stay as they are until the api answers");
                    is_up = false;
                }
                told.cancel();
                let jitter = rand::random_range(0.5..1.0);
                if stopping.run_until_cancelled(tokio::time::sleep(pause.mul_f64(jitter))).await.is_none() {
                    return;
                }
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
    }
}

/// Objects that the api no longer knows, as after a restore from a backup, are told to it.
fn register_again(operator: &Operator, known: &[Changed]) {
    let known: HashSet<&str> = known.iter().map(|changed| changed.name.as_str()).collect();
    for tenant in operator.cluster.tenants.state() {
        let name = tenant.name_any();
        if !known.contains(name.as_str()) {
            operator.memory.is_unknown(&name);
            operator.cluster.triggers.tenant(&name);
        }
    }
}

/// Tells the api of every object, at once and every few minutes: it lets tenants go whose object is gone without a farewell.
pub async fn take_inventory(operator: Arc<Operator>, stopping: CancellationToken) {
    loop {
        let list = || {
            let tenants = operator.cluster.tenants.state();
            let object = |tenant: &Tenant| Object { name: tenant.name_any(), uid: tenant.uid().unwrap_or_default() };
            Inventory { objects: tenants.iter().map(|tenant| object(tenant.as_ref())).collect() }
        };
        let pause = match operator.api.inventory(list).await {
            Ok(()) => INVENTORY,
            Err(error) => {
                tracing::debug!(%error, "the api was not told which objects there are");
                INVENTORY_AGAIN
            }
        };
        if stopping.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
            return;
        }
    }
}
