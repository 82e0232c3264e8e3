//! One replica leads, by a Lease. One that loses it ends: its successor is at work already.

use std::pin::pin;
use std::time::Duration;

use futures_util::StreamExt;
use k8s_openapi::api::coordination::v1::Lease;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::watch_object;
use kube::{Api, Client};
use kube_lease_manager::{LeaseManager, LeaseManagerBuilder, LeaseParams};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::settings::Settings;

/// The Lease's name.
pub const LEASE: &str = "cloister-operator";
/// Seconds that a Lease holds without being renewed.
const DURATION: u64 = 15;
/// Seconds before its end that it is renewed.
const RENEW_BEFORE: u64 = 10;
const AGAIN: Duration = Duration::from_secs(2);
const RELEASE: Duration = Duration::from_secs(5);

/// That this replica leads.
pub struct Leadership {
    leases: Api<Lease>,
    identity: String,
    holds: watch::Receiver<bool>,
    task: JoinHandle<kube_lease_manager::Result<LeaseManager>>,
}

/// Waits until this replica leads.
pub async fn lead(client: &Client, settings: &Settings) -> Leadership {
    let identity = settings.identity.clone().unwrap_or_else(host);
    let leases: Api<Lease> = Api::namespaced(client.clone(), &settings.namespace);
    loop {
        let built = LeaseManagerBuilder::new(client.clone(), LEASE)
            .with_namespace(&settings.namespace)
            .with_parameters(LeaseParams::new(&identity, DURATION, RENEW_BEFORE))
            .build();
        let manager = match built.await {
            Ok(manager) => manager,
            Err(error) => {
                tracing::warn!(%error, "the Lease can't be had yet");
                tokio::time::sleep(AGAIN).await;
                continue;
            }
        };
        let (mut holds, task) = manager.watch().await;
        let is_leading = tokio::select! {
            // The other end only goes with the process.
            _ = holds.wait_for(|holds| *holds) => true,
            () = handed_over(&leases) => false,
        };
        if is_leading {
            tracing::info!(%identity, "this replica leads");
            return Leadership { leases, identity, holds, task };
        }
        // It sleeps until the Lease of before would have run out.
        task.abort();
    }
}

/// Waits until a Lease that somebody holds is nobody's.
async fn handed_over(leases: &Api<Lease>) {
    let mut lease = pin!(watch_object(leases.clone(), LEASE).default_backoff());
    let mut was_held = false;
    while let Some(seen) = lease.next().await {
        let Ok(Some(lease)) = seen else { continue };
        let is_held = lease.spec.and_then(|spec| spec.holder_identity).is_some_and(|holder| !holder.is_empty());
        if was_held && !is_held {
            return;
        }
        was_held = is_held;
    }
}

impl Leadership {
    /// Waits until this replica no longer leads, and says why. Trusts the Lease itself more than whoever renews it: one
    /// that was not seen renewed in time may be another's by now.
    pub async fn lost(&mut self) -> String {
        let mut lease = pin!(watch_object(self.leases.clone(), LEASE));
        let mut holds = self.holds.clone();
        let (mut renewed, mut expires) = (None, Instant::now() + Duration::from_secs(DURATION));
        loop {
            tokio::select! {
                biased;
                () = tokio::time::sleep_until(expires) => {
                    return format!("the Lease was not renewed for {DURATION} s");
                }
                changed = holds.changed() => if changed.is_err() || !*holds.borrow_and_update() {
                    return "the Lease was lost".to_owned();
                },
                seen = lease.next() => match seen {
                    Some(Ok(Some(lease))) => {
                        let spec = lease.spec.unwrap_or_default();
                        if let Some(holder) = spec.holder_identity.filter(|holder| *holder != self.identity) {
                            return format!("{holder} took the Lease");
                        }
                        if spec.renew_time != renewed {
                            renewed = spec.renew_time;
                            expires = Instant::now() + Duration::from_secs(DURATION);
                        }
                    }
                    Some(Ok(None)) => return "the Lease is gone".to_owned(),
                    // The watch begins again by itself; not too often.
                    Some(Err(_)) => tokio::time::sleep(Duration::from_millis(500)).await,
                    None => return "the Lease can't be watched".to_owned(),
                },
            }
        }
    }

    /// Leaves the Lease to whoever has it now. Releasing it, as letting go of `holds` does, would take it from them: it is
    /// written without looking who holds it.
    pub async fn leave(self) {
        self.task.abort();
        let _ = self.task.await;
    }

    /// Hands the Lease over, so that another needs not wait for its end.
    pub async fn release(self) {
        drop(self.holds);
        if tokio::time::timeout(RELEASE, self.task).await.is_err() {
            tracing::warn!("the Lease could not be released; it ends by itself");
        }
    }
}

fn host() -> String {
    let name = std::env::var("HOSTNAME").ok().or_else(|| std::fs::read_to_string("/etc/hostname").ok());
    let name = name.unwrap_or_default().trim().to_owned();
    // Two on one machine are two.
    format!("{name}-{:08x}", rand::random::<u32>())
}
