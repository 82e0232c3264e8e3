//! `cloister-operator release`: lets every Tenant go before the operator is uninstalled. Namespaces stay, for whoever
//! uninstalls to delete or to keep.

use std::time::Duration;

use crds::Tenant;
use crds::tenant::FINALIZER;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt};
use serde_json::json;

use crate::leader::LEASE;
use crate::reconcile::write::remove_finalizer;
use crate::settings::Settings;

/// Who holds the Lease meanwhile.
const HOLDER: &str = "cloister-operator-release";
/// Seconds that it is held: no operator begins anew before the operators are uninstalled.
const HELD: i32 = 120;
/// How long a leader has to see that it leads no more.
const NOTICE: Duration = Duration::from_secs(3);
const ATTEMPTS: usize = 5;

/// Takes the Lease and removes the finalizer of every Tenant.
///
/// # Errors
/// The Kubernetes API did not let it; the message says what.
pub async fn release(client: &Client, settings: &Settings) -> Result<(), String> {
    take_lease(client, &settings.namespace).await.map_err(|error| format!("Lease {LEASE}: {error}"))?;
    tokio::time::sleep(NOTICE).await;
    let tenants: Api<Tenant> = Api::all(client.clone());
    for attempt in 1.. {
        let list = match tenants.list(&ListParams::default()).await {
            Ok(list) => list,
            // Without the definition there are no Tenants.
            Err(kube::Error::Api(status)) if status.code == 404 => break,
            Err(error) => return Err(format!("Tenants: {error}")),
        };
        let held: Vec<_> =
            list.items.iter().filter(|tenant| tenant.finalizers().iter().any(|it| it == FINALIZER)).collect();
        let mut failed = None;
        for tenant in &held {
            match remove_finalizer(client, tenant).await {
                Ok(()) => tracing::info!(tenant = %tenant.name_any(), "released"),
                Err(error) => failed = Some(error),
            }
        }
        match failed {
            None => break,
            Some(error) if attempt >= ATTEMPTS => return Err(error.to_string()),
            Some(error) => tracing::warn!(%error, "again"),
        }
    }
    Ok(())
}

async fn take_lease(client: &Client, namespace: &str) -> kube::Result<()> {
    let leases: Api<Lease> = Api::namespaced(client.clone(), namespace);
    let now = MicroTime(Timestamp::now());
    let spec = json!({
        "holderIdentity": HOLDER,
        "acquireTime": now,
        "renewTime": now,
        "leaseDurationSeconds": HELD,
    });
    let patched = leases.patch(LEASE, &PatchParams::default(), &Patch::Merge(json!({"spec": spec}))).await;
    match patched {
        // No operator ever led here, and none is to begin now.
        Err(kube::Error::Api(status)) if status.code == 404 => {
            let mut lease = Lease::default();
            lease.metadata.name = Some(LEASE.to_owned());
            lease.spec = serde_json::from_value(spec).ok();
            leases.create(&PostParams::default(), &lease).await.map(drop)
        }
        result => result.map(drop),
    }
}
