//! One changed child of a tenant: what it costs to put it right.

use std::time::{Duration, Instant};

use kube::api::{Api, DynamicObject, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use serde_json::{Value, json};

use super::audit::Call;
use super::ground::{ADMIN, Ground, name};

/// How long a repair may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long nothing more must follow.
const QUIET: Duration = Duration::from_secs(2);

/// How a child was put right.
pub struct Repair {
    kind: &'static str,
    /// The operator's writes.
    pub writes: usize,
    /// How each was answered.
    answers: Vec<u16>,
    /// From the answer to the change to the answer to the operator's write.
    pub milliseconds: f64,
}

impl Repair {
    /// For the record.
    pub fn figures(&self) -> Value {
        json!({"kind": self.kind, "writes": self.writes, "answers": self.answers, "ms": self.milliseconds})
    }
}

/// Changes one child of each kind, each of another tenant, one after the other.
///
/// # Panics
/// One is not put right.
pub async fn measure(ground: &Ground) -> Vec<Repair> {
    let changes = [
        ("", "v1", "Namespace", json!({"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "privileged"}}})),
        ("networking.k8s.io", "v1", "NetworkPolicy", json!({"spec": {"egress": [{}]}})),
        ("", "v1", "ResourceQuota", json!({"spec": {"hard": {"pods": "99"}}})),
        ("", "v1", "LimitRange", json!({"spec": {"limits": [{"type": "Container", "default": {"cpu": "9"}}]}})),
        ("", "v1", "ServiceAccount", json!({"automountServiceAccountToken": true})),
        ("apps", "v1", "Deployment", json!({"spec": {"revisionHistoryLimit": 9}})),
        ("policy", "v1", "PodDisruptionBudget", json!({"spec": {"maxUnavailable": 9}})),
    ];
    let mut repairs = Vec::new();
    for (number, (group, version, kind, change)) in changes.into_iter().enumerate() {
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind));
        let namespace = format!("tenant-{}", name(number));
        let (api, object): (Api<DynamicObject>, _) = match kind {
            "Namespace" => (Api::all_with(ground.client.clone(), &resource), namespace.as_str()),
            _ => (Api::namespaced_with(ground.client.clone(), &namespace, &resource), "cloister-runtime"),
        };
        repairs.push(repair(ground, kind, &api, object, &change).await);
    }
    repairs
}

async fn repair(ground: &Ground, kind: &'static str, api: &Api<DynamicObject>, name: &str, change: &Value) -> Repair {
    let before = content(api, name).await;
    let audit = ground.audit();
    api.patch(name, &PatchParams::default(), &Patch::Merge(change)).await.expect("the admin may change it");
    let deadline = Instant::now() + PATIENCE;
    while content(api, name).await != before {
        assert!(Instant::now() < deadline, "{kind} is not put right");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    tokio::time::sleep(QUIET).await;
    let own = audit.writes_of(&ground.account());
    let changed = audit.writes_of(ADMIN).first().map(|call| call.answered).expect("the change");
    let righted = own.first().map(|call| call.answered).expect("the repair");
    let answers = own.iter().map(Call::code).collect();
    Repair { kind, writes: own.len(), answers, milliseconds: (righted - changed).as_seconds_f64() * 1000.0 }
}

/// What an object says, without what each write changes.
async fn content(api: &Api<DynamicObject>, name: &str) -> Value {
    let object = api.get(name).await.expect("the object is there");
    let mut data = object.data;
    data.as_object_mut().map(|data| data.remove("status"));
    json!({"data": data, "labels": object.metadata.labels, "annotations": object.metadata.annotations})
}
