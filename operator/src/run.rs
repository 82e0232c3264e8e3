//! `cloister-operator run`: stand by, lead, and end in good order.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use crds::Tenant;
use futures_util::StreamExt;
use k8s_openapi::api::core::v1::Namespace;
use kube::runtime::controller::{self, Action, applier};
use kube::runtime::events::{Recorder, Reporter};
use kube::{Api as Kubernetes, Client, ResourceExt};
use tokio::net::TcpListener;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::api::{Api, changes};
use crate::build::FIELD_MANAGER;
use crate::cluster::definition::wait_for_definition;
use crate::cluster::{Cluster, Triggers};
use crate::error::Error;
use crate::health::{Health, Stage};
use crate::leader::{self, Leadership};
use crate::memory::Memory;
use crate::operator::Operator;
use crate::reconcile::{back_off, reconcile};
use crate::rollout::Rollouts;
use crate::settings::Settings;

/// Events of a tenant that come one upon the other are one look.
const DEBOUNCE: Duration = Duration::from_millis(20);
/// How long the first looks wait for what the api has to say of all tenants.
const FIRST_WORD: Duration = Duration::from_secs(5);
const AGAIN: Duration = Duration::from_secs(2);
const ORPHANS: Duration = Duration::from_secs(60);

/// Runs until told to stop.
///
/// # Errors
/// What ended it otherwise: above all that it leads no more.
pub async fn run(client: Client, settings: Settings, stopping: CancellationToken) -> Result<(), String> {
    let listen = settings.listen;
    let refused = |error: std::io::Error| format!("CLOISTER_OPERATOR__LISTEN {listen}: {error}");
    let listener = TcpListener::bind(listen).await.map_err(refused)?;
    let address = listener.local_addr().map_err(refused)?;
    let health = Health::new();
    let mut serving = tokio::spawn(axum::serve(listener, health.clone().router()).into_future());
    tracing::info!(%address, api = %settings.api_url, "listening");

    let operating = async {
        if stopping.run_until_cancelled(wait_for_definition(&client)).await.is_none() {
            return Ok(());
        }
        health.is(Stage::Standby);
        let Some(mut leadership) = stopping.run_until_cancelled(leader::lead(&client, &settings)).await else {
            return Ok(());
        };
        health.is(Stage::Listing);
        let ended = tokio::select! {
            reason = leadership.lost() => Err(reason),
            ended = operate(&client, settings, &health, &stopping) => ended,
        };
        hand_over(leadership, &ended).await;
        ended
    };
    tokio::select! {
        ended = operating => ended,
        _ = &mut serving => Err("the listener for health and metrics failed".to_owned()),
    }
}

/// A Lease that was lost is not this replica's to release.
async fn hand_over(leadership: Leadership, ended: &Result<(), String>) {
    match ended {
        Ok(()) => leadership.release().await,
        Err(_) => leadership.leave().await,
    }
}

/// Looks after tenants until told to stop; then finishes the looks that are under way.
async fn operate(
    client: &Client,
    settings: Settings,
    health: &Arc<Health>,
    stopping: &CancellationToken,
) -> Result<(), String> {
    let Some(uid) = stopping.run_until_cancelled(cluster_uid(client)).await else { return Ok(()) };
    let api = Api::new(&settings, &uid)?;
    let memory = Arc::new(Memory::default());
    let (triggers, triggered) = Triggers::new();
    let forget = {
        let memory = memory.clone();
        move |name: &str| memory.forget(name)
    };
    let cluster = Cluster::watch(client, &settings, triggers, forget, stopping);
    let reporter = Reporter { controller: FIELD_MANAGER.to_owned(), instance: settings.identity.clone() };
    let concurrency = settings.concurrency;
    let operator = Arc::new(Operator {
        client: client.clone(),
        cluster: cluster.clone(),
        api,
        memory,
        rollouts: Rollouts::new(settings.max_concurrent_rollouts),
        events: Recorder::new(client.clone(), reporter),
        settings,
    });
    health.leads(operator.clone());

    let told = CancellationToken::new();
    tokio::spawn(changes::follow(operator.clone(), told.clone(), stopping.clone()));
    let first_word = async {
        cluster.wait_until_listed().await;
        // Without it, each tenant's first look asks the api by itself.
        let _ = tokio::time::timeout(FIRST_WORD, told.cancelled()).await;
    };
    if stopping.run_until_cancelled(first_word).await.is_none() {
        return Ok(());
    }
    tokio::spawn(changes::take_inventory(operator.clone(), stopping.clone()));
    tokio::spawn(report_orphans(operator.clone(), stopping.clone()));
    health.is(Stage::Leading);
    tracing::info!(tenants = cluster.tenants.len(), "looking after tenants");

    let queue = UnboundedReceiverStream::new(triggered)
        .map(Ok::<_, Infallible>)
        .take_until(Box::pin(stopping.clone().cancelled_owned()));
    let looks = applier(
        |tenant, operator| Box::pin(in_a_task(tenant, operator)),
        |tenant, error, operator| back_off(&tenant, error, &operator),
        operator,
        cluster.tenants.clone(),
        queue,
        controller::Config::default().concurrency(concurrency).debounce(DEBOUNCE),
    );
    // Failures are told where the next look is decided; a tenant that went meanwhile needs none.
    looks.for_each(|_| std::future::ready(())).await;
    tracing::info!("stopped: looks that were under way are finished");
    Ok(())
}

/// A look in a task of its own, so that looks share the processors, and none goes on once this replica leads no more.
async fn in_a_task(tenant: Arc<Tenant>, operator: Arc<Operator>) -> Result<Action, Error> {
    match AbortOnDropHandle::new(tokio::spawn(reconcile(tenant, operator))).await {
        Ok(result) => result,
        Err(broken) => Err(Error::Broken(broken.to_string())),
    }
}

/// The cluster's identity: the UID of the namespace that is never deleted.
async fn cluster_uid(client: &Client) -> String {
    let namespaces: Kubernetes<Namespace> = Kubernetes::all(client.clone());
    loop {
        match namespaces.get("kube-system").await.map(|namespace| namespace.uid()) {
            Ok(Some(uid)) => return uid,
            Ok(None) => tracing::warn!("namespace kube-system has no UID"),
            Err(error) => tracing::warn!(%error, "namespace kube-system can't be read yet"),
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// Says which namespaces belong to no tenant. They are never deleted: what made them so may be a mistake.
async fn report_orphans(operator: Arc<Operator>, stopping: CancellationToken) {
    let mut said = Vec::new();
    loop {
        let orphans = operator.cluster.orphans();
        if orphans != said {
            if !orphans.is_empty() {
                tracing::warn!(namespaces = orphans.join(", "), "namespaces of no Tenant; they are left alone");
            }
            said = orphans;
        }
        if stopping.run_until_cancelled(tokio::time::sleep(ORPHANS)).await.is_none() {
            return;
        }
    }
}
