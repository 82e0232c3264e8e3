//! What a Tenant becomes.

use serde_json::{Value, json};

use super::{KINDS, child_path, condition, kind_path, namespace_path, platform};
use crate::support::name;

#[tokio::test(flavor = "multi_thread")]
async fn an_enterprise_tenant_has_a_namespace_with_everything_in_it() {
    let platform = platform().await;
    let _shared = platform.undisturbed().await;
    let name = name("whole");
    let spec = json!({
        "monthlyTokenLimit": 5_000,
        "runtime": {"replicas": 2, "concurrency": 7, "resources": {"requests": {"cpu": "100m"}}},
        "network": {"allowedEgress": [{"cidr": "203.0.113.7/32", "ports": [8443]}]},
    });
    let tenant = platform.ready(&name, spec).await;
    let status = &tenant["status"];
    assert_eq!((&status["isolation"], &status["runtime"]["readyReplicas"]), (&json!("Namespace"), &json!(2)));
    assert_eq!(status["namespace"]["name"], format!("tenant-{name}"));
    assert_eq!((&status["usage"]["limit"], &status["usage"]["remaining"]), (&json!(5_000), &json!(5_000)));
    for r#type in [
        "Ready",
        "Registered",
        "BillingInSync",
        "NamespaceReady",
        "QuotaApplied",
        "NetworkPoliciesApplied",
        "RuntimeAvailable",
    ] {
        assert_eq!(condition(&tenant, r#type).0, "True", "{type}: {status}");
    }
    assert_eq!(condition(&tenant, "Suspended").0, "False");

    let namespace = platform.get(&namespace_path(&name)).await.unwrap();
    assert_eq!(status["namespace"]["uid"], namespace["metadata"]["uid"]);
    assert_eq!(namespace["metadata"]["annotations"]["cloister.dev/tenant-uid"], tenant["metadata"]["uid"]);
    for mode in ["enforce", "audit", "warn"] {
        let label =
            |key: &str| namespace["metadata"]["labels"][format!("pod-security.kubernetes.io/{mode}{key}")].clone();
        assert_eq!((label(""), label("-version")), (json!("restricted"), json!("latest")));
    }
    let child = async |kind: &str| platform.get(&child_path(&name, kind)).await.unwrap_or_else(|| panic!("no {kind}"));
    for (kind, _) in KINDS {
        let object = child(kind).await;
        assert_eq!(object["metadata"]["labels"]["cloister.dev/tenant"], name, "{kind}");
        assert_eq!(object["metadata"]["ownerReferences"], Value::Null, "{kind}");
        let list = platform.get(&kind_path(&name, kind)).await.unwrap();
        // Kubernetes puts an account of its own into every namespace.
        let expected = if kind == "serviceaccounts" { 2 } else { 1 };
        assert_eq!(list["items"].as_array().unwrap().len(), expected, "{kind}");
    }
    let hard = child("resourcequotas").await["spec"]["hard"].clone();
    assert_eq!((&hard["pods"], &hard["requests.cpu"], &hard["services"]), (&json!("3"), &json!("300m"), &json!("0")));
    let secret = child("secrets").await;
    assert_eq!(secret["data"].as_object().unwrap().keys().collect::<Vec<_>>(), ["token"]);
    assert_eq!(child("serviceaccounts").await["automountServiceAccountToken"], false);
    assert_eq!(child("poddisruptionbudgets").await["spec"]["maxUnavailable"], 1);

    let pod = child("deployments").await["spec"]["template"]["spec"].clone();
    let container = &pod["containers"][0];
    assert_eq!(pod["automountServiceAccountToken"], false);
    assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
    let confined = &container["securityContext"];
    assert_eq!((&confined["readOnlyRootFilesystem"], &confined["runAsNonRoot"]), (&json!(true), &json!(true)));
    assert_eq!(confined["capabilities"], json!({"drop": ["ALL"]}));
    let variable = |name: &str| {
        let all = container["env"].as_array().unwrap();
        all.iter().find(|variable| variable["name"] == name).map(|variable| variable["value"].clone())
    };
    assert_eq!(variable("CLOISTER_RUNTIME__CONCURRENCY"), Some(json!("7")));
    assert_eq!(variable("CLOISTER_RUNTIME__ALLOWED_NETS"), Some(json!("203.0.113.7/32:8443")));

    let policy = child("networkpolicies").await["spec"].clone();
    assert_eq!((&policy["podSelector"], &policy["policyTypes"]), (&json!({}), &json!(["Ingress", "Egress"])));
    assert!(policy["ingress"].as_array().is_none_or(Vec::is_empty), "nobody is let in: {policy}");
    let rules = policy["egress"].to_string();
    assert!(rules.contains("203.0.113.7/32") && rules.contains("k8s-app"), "{rules}");
    let public = policy["egress"].as_array().unwrap().iter().flat_map(|rule| rule["to"].as_array().unwrap());
    let public: Vec<_> = public.filter(|to| to["ipBlock"]["cidr"] == "0.0.0.0/0").collect();
    assert_eq!(public.len(), 1);
    for denied in ["10.0.0.0/8", "169.254.0.0/16"] {
        assert!(public[0]["ipBlock"]["except"].as_array().unwrap().contains(&json!(denied)), "{denied}: {public:?}");
    }
    let printed = platform.cluster.kubectl(&["get", "cten", &name]).await;
    let columns: Vec<_> = printed.lines().next().unwrap().split_whitespace().collect();
    assert_eq!(columns, ["NAME", "PLAN", "ISOLATION", "NAMESPACE", "READY", "AGE"]);
    platform.end(&name).await;
    assert_eq!(platform.get(&namespace_path(&name)).await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_of_the_shared_pool_has_no_objects() {
    let platform = platform().await;
    let _shared = platform.undisturbed().await;
    for plan in ["free", "pro"] {
        let name = name(plan);
        let tenant = platform.ready(&name, json!({"plan": plan})).await;
        assert_eq!(tenant["status"]["isolation"], "Shared");
        assert_eq!(tenant["status"]["namespace"], Value::Null);
        assert_eq!(platform.get(&namespace_path(&name)).await, None);
        platform.end(&name).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_made_over_graphql_has_its_namespace_and_is_seen_coming_up() {
    let platform = platform().await;
    let _shared = platform.undisturbed().await;
    let email = format!("ops@{}.example", name("graph"));
    let input = json!({"name": "Graph", "email": email, "plan": "ENTERPRISE"});
    let made = crate::support::done(&platform.app, "createTenant", input).await;
    let id = made["tenant"]["id"].as_str().unwrap();
    let name = id.replace('_', "-");
    platform.phase(&name, "Ready").await;
    let seen = "query ($id: ID!) { tenantById(id: $id) { provisioning { phase objectName namespace } } }";
    let look = async || platform.app.admin().data(seen, json!({"id": id})).await["tenantById"]["provisioning"].clone();
    let shown = super::until("GraphQL shows it Ready", look, |shown| shown["phase"] == "READY").await;
    assert_eq!((&shown["objectName"], &shown["namespace"]), (&json!(name), &json!(format!("tenant-{name}"))));
    crate::support::done(&platform.app, "suspendTenant", json!({"tenantId": id})).await;
    platform.phase(&name, "Suspended").await;
    let scaled = async || platform.get(&child_path(&name, "deployments")).await.unwrap()["spec"]["replicas"].clone();
    super::until("no workers", scaled, |replicas| *replicas == 0).await;
    crate::support::done(&platform.app, "resumeTenant", json!({"tenantId": id})).await;
    platform.phase(&name, "Ready").await;
    crate::support::done(&platform.app, "deleteTenant", json!({"tenantId": id})).await;
    platform.gone(&super::tenant_path(&name)).await;
    platform.gone(&namespace_path(&name)).await;
}
