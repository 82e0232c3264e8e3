//! Who writes tenants' namespaces and in them: the chart's admission policies on a real API server, against a cluster's
//! admin and against whoever has the operator's credential.

use std::time::{Duration, Instant};

use cloister_tests::PATIENCE;
use cloister_tests::cluster::Cluster;
use serde_json::{Value, json};

use super::{file, kubectl, objects, render_set};

/// Whom the policies are asked about. Each may do everything by RBAC, so that only they can refuse.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Who {
    Admin,
    Operator,
    Controller,
    Scheduler,
    BreakGlass,
}

impl Who {
    fn impersonation(self) -> &'static [&'static str] {
        match self {
            Who::Admin => &["--as=mallory", "--as-group=system:masters"],
            Who::Operator => {
                &["--as=system:serviceaccount:cloister-system:cloister-operator", "--as-group=system:masters"]
            }
            Who::Controller => {
                &["--as=system:serviceaccount:kube-system:deployment-controller", "--as-group=system:masters"]
            }
            Who::Scheduler => &["--as=system:kube-scheduler", "--as-group=system:masters"],
            Who::BreakGlass => &["--as=alice", "--as-group=cloister:break-glass", "--as-group=system:masters"],
        }
    }
}

/// The chart's policies, for namespaces with this test's label alone and by names of their own: other tests' tenants, and a
/// release that is there, stay as they are.
struct Policies {
    cluster: &'static Cluster,
}

const MARK: &str = "charts-admission";
const TENANT: &str = "tenant-admission";
const PLAIN: &str = "charts-admission-plain";

impl Policies {
    async fn install() -> Self {
        let policies = Self { cluster: Cluster::shared().await };
        policies.remove();
        let mut rendered = objects(&render_set(policies.cluster, "embedded"));
        rendered.retain(|object| object["apiVersion"] == "admissionregistration.k8s.io/v1");
        assert_eq!(rendered.len(), 6, "three policies and their bindings");
        for object in &mut rendered {
            let renamed = |name: &Value| json!(format!("{MARK}-{}", name.as_str().expect("a name")));
            object["metadata"]["name"] = renamed(&object["metadata"]["name"]);
            object["metadata"]["labels"] = json!({MARK: "yes"});
            if object["kind"] == "ValidatingAdmissionPolicyBinding" {
                object["spec"]["policyName"] = renamed(&object["spec"]["policyName"]);
                object["spec"]["matchResources"] = json!({"namespaceSelector": {"matchLabels": {MARK: "yes"}}});
            }
        }
        for object in rendered {
            policies.apply(Who::Admin, &object).expect("the API server takes the policy");
        }
        policies.apply(Who::Admin, &namespace(PLAIN, &json!({}), &json!({}))).expect("a namespace");
        policies
    }

    fn kubectl(&self, who: Who, arguments: &[&str]) -> Result<String, String> {
        kubectl(self.cluster, &[who.impersonation(), arguments].concat())
    }

    fn apply(&self, who: Who, object: &Value) -> Result<String, String> {
        let file = file(&object.to_string());
        let path = file.path().to_str().expect("a path in UTF-8");
        self.kubectl(who, &["apply", "--server-side", "--field-manager=test", "--filename", path])
    }

    /// Posts what is no object of its own, such as a pod's binding.
    fn post(&self, who: Who, path: &str, body: &Value) -> Result<String, String> {
        let file = file(&body.to_string());
        self.kubectl(who, &["create", "--raw", path, "--filename", file.path().to_str().expect("a path in UTF-8")])
    }

    fn remove(&self) {
        let selector = format!("{MARK}=yes");
        let kinds = "validatingadmissionpolicybindings,validatingadmissionpolicies";
        let delete = ["delete", kinds, "--selector", &selector, "--ignore-not-found"];
        kubectl(self.cluster, &delete).expect("the policies go");
        // The policies hold for a moment longer than they are there.
        let delete = ["delete", "namespace", "--selector", &selector, "--ignore-not-found", "--wait=false"];
        wait("the namespaces go", || kubectl(self.cluster, &delete).is_ok());
        wait("the namespaces are gone", || {
            kubectl(self.cluster, &["get", "namespaces", "--selector", &selector, "--output", "name"])
                .is_ok_and(|names| names.is_empty())
        });
    }
}

impl Drop for Policies {
    fn drop(&mut self) {
        // A failed test leaves them to be looked at; they hold for its namespaces alone.
        if !std::thread::panicking() {
            self.remove();
        }
    }
}

/// Looks again until it is so.
fn wait(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < end, "{what}: not in time");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn namespace(name: &str, labels: &Value, annotations: &Value) -> Value {
    let mut labels = labels.clone();
    labels[MARK] = json!("yes");
    json!({"apiVersion": "v1", "kind": "Namespace",
        "metadata": {"name": name, "labels": labels, "annotations": annotations}})
}

fn tenant(name: &str) -> Value {
    let labels = json!({"cloister.dev/tenant": "admission", "pod-security.kubernetes.io/enforce": "restricted"});
    namespace(name, &labels, &json!({"cloister.dev/tenant-uid": "u"}))
}

fn deployment(namespace: &str) -> Value {
    let container = json!({"name": "runtime", "image": "localhost/probe:test", "securityContext": {
        "allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}}});
    json!({"apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": "cloister-runtime", "namespace": namespace},
        "spec": {"replicas": 1, "selector": {"matchLabels": {"app": "x"}}, "template": {
            "metadata": {"labels": {"app": "x"}},
            "spec": {"containers": [container], "terminationGracePeriodSeconds": 0, "securityContext": {
                "runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}}}}}})
}

fn refused(what: &str, result: Result<String, String>) {
    let error = result.err().unwrap_or_else(|| panic!("{what}: was let through"));
    assert!(error.contains("ValidatingAdmissionPolicy"), "{what}: refused, but not by a policy: {error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn tenants_namespaces_are_written_by_the_operator_alone() {
    let policies = Policies::install().await;
    let admin = |arguments: &[&str]| policies.kubectl(Who::Admin, arguments);

    // ── Namespaces ──
    wait("the policies are in force", || policies.apply(Who::Admin, &tenant("tenant-probe")).is_err());
    refused("a tenant's namespace of an admin's", policies.apply(Who::Admin, &tenant(TENANT)));
    let prepared = namespace(TENANT, &json!({}), &json!({"cloister.dev/tenant-uid": "u"}));
    refused("one prepared to be taken over", policies.apply(Who::Admin, &prepared));
    refused("another's namespace made a tenant's", admin(&["label", "namespace", PLAIN, "cloister.dev/tenant=x"]));
    refused("the operator's without the prefix", policies.apply(Who::Operator, &tenant("charts-admission-other")));
    refused(
        "the operator's hand on another's",
        policies.apply(Who::Operator, &namespace(PLAIN, &json!({"a": "b"}), &json!({}))),
    );
    policies.apply(Who::Operator, &tenant(TENANT)).expect("the operator makes it");
    admin(&["label", "namespace", PLAIN, "colour=blue"]).expect("another's namespace is its owner's");
    let labelled = |label: &str| admin(&["label", "--overwrite", "namespace", TENANT, label]);
    refused("the label taken away", labelled("cloister.dev/tenant-"));
    refused("the label of another tenant", labelled("cloister.dev/tenant=other"));
    refused("a privileged pod prepared", labelled("pod-security.kubernetes.io/enforce=privileged"));
    refused("a foreign annotation", admin(&["annotate", "namespace", TENANT, "colour=blue"]));
    let error = admin(&["delete", "namespace", TENANT, "--wait=false"]).expect_err("the deletion is refused");
    for part in [
        "the namespace tenant-admission is a Cloister tenant's",
        "mallory",
        "change its Tenant instead",
        "cloister:break-glass",
    ] {
        assert!(error.contains(part), "no {part:?} in {error}");
    }

    // ── What is in them ──
    policies.apply(Who::Operator, &deployment(TENANT)).expect("the operator applies a Deployment");
    let pod = || {
        let names = admin(&["get", "pods", "--namespace", TENANT, "--output", "name"]).expect("pods are listed");
        names.lines().next().map(|name| name.trim_start_matches("pod/").to_owned())
    };
    // Made by the controllers: the ReplicaSet and its pod, the default ServiceAccount, the authority's ConfigMap.
    wait("the Deployment's pod is there", || pod().is_some());
    for made in ["serviceaccount/default", "configmap/kube-root-ca.crt"] {
        wait(made, || admin(&["get", "--namespace", TENANT, made]).is_ok());
    }
    let open = json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "open", "namespace": TENANT},
        "spec": {"podSelector": {}, "ingress": [{}], "egress": [{}]}});
    refused("a second policy, of a cluster's admin", policies.apply(Who::Admin, &open));
    let own = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "own", "namespace": TENANT},
        "spec": deployment(TENANT)["spec"]["template"]["spec"]});
    refused("a pod of his own, as confined as need be", policies.apply(Who::Admin, &own));
    let name = pod().expect("a pod");
    for attack in [
        "create quota more --hard=pods=100",
        "create rolebinding eve --clusterrole=admin --user=eve",
        "create role eve --verb=get --resource=secrets",
        "create serviceaccount eve",
        "create secret generic eve --from-literal=a=b",
        "create service clusterip eve --tcp=80",
        "create deployment eve --image=eve",
        "create job eve --image=eve",
        "create poddisruptionbudget eve --selector=app=x --min-available=1",
        "scale deployment cloister-runtime --replicas=5",
        "set image deployment/cloister-runtime runtime=eve",
        "delete deployment cloister-runtime",
        &format!("label pod {name} app=y --overwrite"),
        &format!("debug {name} --image=eve --quiet --profile=restricted"),
    ] {
        let arguments: Vec<&str> = ["--namespace", TENANT].into_iter().chain(attack.split(' ')).collect();
        refused(attack, admin(&arguments));
    }

    // ── What passes ──
    admin(&["create", "configmap", "mesh-root", "--namespace", TENANT, "--from-literal=a=b"]).expect("a mesh's roots");
    let scale = ["scale", "deployment", "cloister-runtime", "--namespace", TENANT, "--replicas=2"];
    policies.kubectl(Who::Controller, &scale).expect("the cluster's controllers write");
    let pods = format!("/api/v1/namespaces/{TENANT}/pods");
    let bound = json!({"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name},
        "target": {"apiVersion": "v1", "kind": "Node", "name": "nowhere"}});
    refused("a pod placed by hand", policies.post(Who::Admin, &format!("{pods}/{name}/binding"), &bound));
    // Bound already, it is a conflict; refused by a policy it is not.
    let placed = policies.post(Who::Scheduler, &format!("{pods}/{name}/binding"), &bound);
    assert!(placed.as_ref().err().is_none_or(|error| !error.contains("ValidatingAdmissionPolicy")), "{placed:?}");
    let eviction = json!({"apiVersion": "policy/v1", "kind": "Eviction",
        "metadata": {"name": name, "namespace": TENANT}});
    policies.post(Who::Admin, &format!("{pods}/{name}/eviction"), &eviction).expect("a node is drained");
    let gone = ["delete", "pods", "--all", "--namespace", TENANT, "--wait=false", "--grace-period=0", "--force"];
    admin(&gone).expect("pods may be deleted: there will be others");
    policies.apply(Who::BreakGlass, &open).expect("in an emergency");
    let relabel = ["label", "namespace", TENANT, "seen=yes"];
    policies.kubectl(Who::BreakGlass, &relabel).expect("in an emergency");

    // ── The operator elsewhere ──
    refused("the operator's Deployment elsewhere", policies.apply(Who::Operator, &deployment(PLAIN)));
    let secret =
        json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "cloister-runtime", "namespace": PLAIN}});
    refused("the operator's Secret elsewhere", policies.apply(Who::Operator, &secret));
    let lease = json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
        "metadata": {"name": "cloister-operator", "namespace": PLAIN}});
    policies.apply(Who::Operator, &lease).expect("its Lease");

    let delete = ["delete", "namespace", TENANT, "--wait=false"];
    policies.kubectl(Who::Operator, &delete).expect("the operator deletes it");
    wait("its namespace goes", || admin(&["get", "namespace", TENANT]).is_err());
}
