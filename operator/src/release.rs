//! `cloister-operator release`: lets every Tenant go before the operator is uninstalled. Namespaces stay, for whoever
//! uninstalls to delete or to keep.

use std::time::{Duration, Instant};

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
/// How long Tenants that are being deleted are waited for.
const ENDS: Duration = Duration::from_secs(120);
const ATTEMPTS: usize = 5;

/// Takes the Lease and removes the finalizer of every Tenant.
///
/// # Errors
/// The Kubernetes API did not let it; the message says what.
pub async fn release(client: &Client, settings: &Settings) -> Result<(), String> {
    wait_for_ends(client).await;
    for attempt in 1.. {
        match let_go(client, settings).await {
            Ok(true) => break,
            Ok(false) if attempt >= ATTEMPTS => return Err("an operator is leading all the time".to_owned()),
            Err(error) if attempt >= ATTEMPTS => return Err(error),
            Ok(false) => tracing::warn!("an operator was leading still; again"),
            Err(error) => tracing::warn!(%error, "again"),
        }
    }
    Ok(())
}

/// Gives the operator time for Tenants that are being deleted: without it their namespaces stay, and the api is not told
/// what becomes of their data.
async fn wait_for_ends(client: &Client) {
    let tenants: Api<Tenant> = Api::all(client.clone());
    let end = Instant::now() + ENDS;
    loop {
        let Ok(list) = tenants.list(&ListParams::default()).await else { return };
        let is_ending = |tenant: &&Tenant| tenant.metadata.deletion_timestamp.is_some();
        let ending: Vec<_> = list.items.iter().filter(is_ending).map(|tenant| tenant.name_any()).collect();
        if ending.is_empty() {
            return;
        }
        if Instant::now() >= end {
            tracing::warn!(
                tenants = ending.join(", "),
                "Tenants are still being deleted; they are let go of, their namespaces and data stay"
            );
            return;
        }
        tracing::info!(tenants = ending.join(", "), "waiting for Tenants that are being deleted");
        tokio::time::sleep(NOTICE).await;
    }
}

/// One attempt; whether no operator led while the finalizers were removed, so that none is back.
async fn let_go(client: &Client, settings: &Settings) -> Result<bool, String> {
    let failed = |error: kube::Error| format!("Lease {LEASE}: {error}");
    let leases: Api<Lease> = Api::namespaced(client.clone(), &settings.namespace);
    take_lease(&leases).await.map_err(failed)?;
    tokio::time::sleep(NOTICE).await;
    remove_finalizers(client).await?;
    // A leader that was just renewing the Lease may have taken it back.
    let lease = leases.get(LEASE).await.map_err(failed)?;
    Ok(lease.spec.and_then(|spec| spec.holder_identity).as_deref() == Some(HOLDER))
}

async fn remove_finalizers(client: &Client) -> Result<(), String> {
    let tenants: Api<Tenant> = Api::all(client.clone());
    let list = match tenants.list(&ListParams::default()).await {
        Ok(list) => list,
        // Without the definition there are no Tenants.
        Err(kube::Error::Api(status)) if status.code == 404 => return Ok(()),
        Err(error) => return Err(format!("Tenants: {error}")),
    };
    for tenant in list.items.iter().filter(|tenant| tenant.finalizers().iter().any(|it| it == FINALIZER)) {
        let name = tenant.name_any();
        remove_finalizer(client, tenant).await.map_err(|error| format!("Tenant {name}: {error}"))?;
        tracing::info!(tenant = name, "released");
    }
    Ok(())
}

async fn take_lease(leases: &Api<Lease>) -> kube::Result<()> {
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
