//! A tenant's life: plans up and down, suspension, its end; each also with the api away, the operator down, or things gone
//! before their time.

use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use cloister_tests::ids::uuid_of;
use cloister_tests::{Reply, ToolServer, Worker, WorkerBuilder};
use entity::{TenantOwned, cluster_tenants, tenants};
use sea_orm::ActiveValue::Set;
use sea_orm::{ActiveModelTrait, DatabaseConnection, IntoActiveModel};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{
    Platform, agent, child_path, condition, is, kind_path, namespace_path, platform, run, run_is, start, tenant_path,
    until,
};
use crate::support::{mutate, name};

/// A worker as it would run in the tenant's namespace: with the token of its Secret.
async fn worker(platform: &Platform, name: &str) -> Worker {
    worker_builder(platform, name).await.start().await
}

async fn worker_builder(platform: &Platform, name: &str) -> WorkerBuilder {
    let secret = platform.get(&child_path(name, "secrets")).await.expect("the Secret");
    let token = BASE64_STANDARD.decode(secret["data"]["token"].as_str().unwrap()).unwrap();
    Worker::builder(&platform.app, &String::from_utf8(token).unwrap())
}

async fn replicas(platform: &Platform, name: &str) -> Value {
    platform.get(&child_path(name, "deployments")).await.unwrap_or_default()["spec"]["replicas"].clone()
}

/// What the platform's admin sees of a tenant.
async fn seen(platform: &Platform, id: &str) -> Value {
    let query = "query ($id: ID!) { tenantById(id: $id) { status plan { name } name } }";
    platform.app.admin().data(query, json!({"id": id})).await["tenantById"].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_goes_down_when_its_runs_have_ended_and_up_again() {
    let platform = platform().await;
    // The model's answers are this test's alone.
    let _alone = platform.alone().await;
    let name = name("plans");
    platform.ready(&name, json!({})).await;
    let tenant = platform.client(&name).await;
    let agent = agent(&tenant.client).await;
    let own = worker(platform, &name).await;
    platform.model.always(|_| Reply::text("Done.").usage(5, 2).hold());
    let held = start(&tenant.client, &agent).await;
    platform.model.wait_for_held(1).await;

    platform.tenant(&name, json!({"plan": "pro"})).await;
    let look = |it: &Value| is(it, "RuntimeAvailable", "True", "Draining");
    let draining = platform.until(&name, "draining", look).await;
    assert!(draining["status"]["runtime"]["drainingSince"].is_string(), "{draining}");
    assert_eq!(run(&tenant.client, &held).await["status"], "RUNNING");
    // What comes now is the shared pool's.
    let shared = start(&tenant.client, &agent).await;
    platform.model.wait_for_held(2).await;
    platform.model.always(|_| Reply::text("Done.").usage(5, 2));
    platform.model.release_all();
    for run in [&held, &shared] {
        run_is(&tenant.client, run, "SUCCEEDED").await;
    }
    platform.gone(&namespace_path(&name)).await;
    let small = platform.phase(&name, "Ready").await;
    assert_eq!((&small["status"]["isolation"], &small["status"]["runtime"]), (&json!("Shared"), &Value::Null));
    drop(own);

    platform.tenant(&name, json!({"plan": "enterprise"})).await;
    platform.phase(&name, "Ready").await;
    // It has workers, as Kubernetes sees it; none of them is a process, so that the run has to wait.
    let waits = start(&tenant.client, &agent).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(run(&tenant.client, &waits).await["status"], "QUEUED", "the shared pool took it");
    let _own = worker(platform, &name).await;
    run_is(&tenant.client, &waits, "SUCCEEDED").await;
    platform.end(&name).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_suspended_tenant_is_refused_and_its_runs_wait() {
    let platform = platform().await;
    let _alone = platform.alone().await;
    let name = name("suspend");
    platform.ready(&name, json!({"runtime": {"replicas": 2}})).await;
    let tenant = platform.client(&name).await;
    let agent = agent(&tenant.client).await;
    let own = worker(platform, &name).await;
    platform.model.always(|_| Reply::text("Done.").usage(5, 2).hold());
    let held = start(&tenant.client, &agent).await;
    platform.model.wait_for_held(1).await;

    platform.tenant(&name, json!({"suspended": true, "runtime": {"replicas": 2}})).await;
    let suspended = platform.phase(&name, "Suspended").await;
    assert_eq!(condition(&suspended, "Suspended"), ("True".to_owned(), "Requested".to_owned()));
    assert_eq!(replicas(platform, &name).await, 0);
    assert!(platform.get(&namespace_path(&name)).await.is_some());
    let refused = tenant.client.query("{ viewer { scopes } }", json!({})).await;
    assert_eq!(refused.error_code(), Some("TENANT_SUSPENDED"), "{}", refused.body);
    platform.model.always(|_| Reply::text("Done.").usage(5, 2));
    platform.model.release_all();
    drop(own);

    platform.tenant(&name, json!({"suspended": false, "runtime": {"replicas": 2}})).await;
    platform.phase(&name, "Ready").await;
    assert_eq!(replicas(platform, &name).await, 2);
    let _own = worker(platform, &name).await;
    run_is(&tenant.client, &held, "SUCCEEDED").await;
    platform.end(&name).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_webhook_in_a_network_that_is_opened_is_called_by_the_tenants_workers() {
    let platform = platform().await;
    let _alone = platform.alone().await;
    let tools = ToolServer::start().await;
    let url: reqwest::Url = tools.url("/look").parse().unwrap();
    let (name, shared) = (name("hook"), name("shared"));
    let egress = json!([{"cidr": "127.0.0.0/30", "ports": [url.port().unwrap()]}]);
    platform.ready(&name, json!({"network": {"allowedEgress": egress}})).await;
    platform.ready(&shared, json!({"plan": "pro"})).await;
    let create =
        "mutation ($input: CreateAgentInput!) { createAgent(input: $input) { agent { id } errors { message } } }";
    let with_tool = |url: &str| {
        let webhook = json!({"name": "look", "description": "Looks.", "url": url, "parameters": {"type": "object"}});
        json!({"input": {"name": "Agent", "model": "scripted", "instructions": "Look.", "publish": true,
            "tools": [{"webhook": webhook}]}})
    };
    // Where an address leads, the tenant's own network decides; the shared pool has none.
    let (own, others) = (platform.client(&name).await, platform.client(&shared).await);
    let refused = others.client.data(create, with_tool("https://10.9.8.7/look")).await["createAgent"].clone();
    assert!(refused["errors"][0]["message"].as_str().unwrap().contains("10.9.8.7"), "{refused}");
    let taken = own.client.data(create, with_tool("https://10.9.8.7/look")).await["createAgent"].clone();
    assert_eq!(taken["errors"], json!([]));

    let made = own.client.data(create, with_tool(url.as_str())).await["createAgent"].clone();
    let agent = made["agent"]["id"].as_str().unwrap_or_else(|| panic!("{made}"));
    let pod = platform.get(&child_path(&name, "deployments")).await.unwrap()["spec"]["template"]["spec"].clone();
    let variables = pod["containers"][0]["env"].as_array().unwrap();
    let nets = variables.iter().find(|it| it["name"] == "CLOISTER_RUNTIME__ALLOWED_NETS").unwrap();
    let _worker = worker_builder(platform, &name)
        .await
        .env("CLOISTER_RUNTIME__ALLOWED_HOSTS", "nobody.example")
        .env("CLOISTER_RUNTIME__ALLOWED_NETS", nets["value"].as_str().unwrap())
        .start()
        .await;
    platform.model.always(|request| match request.messages().iter().any(|message| message["role"] == "tool") {
        true => Reply::text("Done.").usage(6, 2),
        false => Reply::tool_call("look", json!({})).usage(5, 2),
    });
    let run = start(&own.client, agent).await;
    run_is(&own.client, &run, "SUCCEEDED").await;
    assert_eq!(tools.requests().len(), 1);
    for name in [&name, &shared] {
        platform.end(name).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_follow_the_runs() {
    let platform = platform().await;
    let _alone = platform.alone().await;
    let name = name("scale");
    let autoscaling = json!({"minReplicas": 1, "maxReplicas": 3, "targetRunsPerReplica": 2});
    platform.ready(&name, json!({"runtime": {"autoscaling": autoscaling}})).await;
    let tenant = platform.client(&name).await;
    let agent = agent(&tenant.client).await;
    assert_eq!(replicas(platform, &name).await, 1);
    platform.model.always(|_| Reply::text("Done.").usage(5, 2));
    // Nobody runs in the namespace: they wait, and four need two workers, nine as many as there may be.
    let mut runs = Vec::new();
    for (count, workers) in [(4, 2), (9, 3)] {
        while runs.len() < count {
            runs.push(start(&tenant.client, &agent).await);
        }
        until("workers for the runs", async || replicas(platform, &name).await, |it| *it == workers).await;
    }
    let _own = worker(platform, &name).await;
    for run in &runs {
        run_is(&tenant.client, run, "SUCCEEDED").await;
    }
    until("one worker again", async || replicas(platform, &name).await, |it| *it == 1).await;
    platform.end(&name).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn data_is_kept_for_another_object_or_goes_as_the_policy_says() {
    let platform = platform().await;
    let _shared = platform.undisturbed().await;
    let (first, second) = (name("kept"), name("heir"));
    platform.ready(&first, json!({})).await;
    let tenant = platform.client(&first).await;
    let agent = agent(&tenant.client).await;
    platform.end(&first).await;
    let refused = tenant.client.query("{ viewer { scopes } }", json!({})).await;
    assert!(!refused.status.is_success(), "keys of a tenant without an object are refused: {}", refused.body);
    assert_ne!(seen(platform, &tenant.id).await, Value::Null);

    // Another object by another name takes the tenant over, with everything it has.
    let email = format!("ops@{first}.example");
    let adopted =
        platform.ready(&second, json!({"tenantId": tenant.id, "email": email, "deletionPolicy": "Delete"})).await;
    assert_eq!(adopted["status"]["tenantId"], tenant.id);
    let agents = tenant.client.data("{ agents(first: 5) { nodes { id } } }", json!({})).await;
    assert_eq!(agents["agents"]["nodes"][0]["id"], agent);
    // While it is ruled, no third one has it.
    let third = name("thief");
    platform.tenant(&third, json!({"tenantId": tenant.id, "email": email})).await;
    let told = platform.until(&third, "refused", |it| condition(it, "Registered").0 == "False").await;
    assert!(super::message(&told, "Registered").contains(&second), "{told}");
    platform.end(&third).await;
    platform.end(&second).await;
    assert_eq!(seen(platform, &tenant.id).await["status"], "DELETING");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_that_is_gone_comes_back_or_is_not_missed() {
    let platform = platform().await;
    let _shared = platform.undisturbed().await;
    let name = name("gone");
    let before = platform.ready(&name, json!({})).await;
    platform.delete(&namespace_path(&name)).await;
    let another = |it: &Value| {
        it["status"]["phase"] == "Ready" && it["status"]["namespace"]["uid"] != before["status"]["namespace"]["uid"]
    };
    platform.until(&name, "another namespace", another).await;
    platform.delete(&namespace_path(&name)).await;
    platform.delete(&tenant_path(&name)).await;
    platform.gone(&tenant_path(&name)).await;
    platform.gone(&namespace_path(&name)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_the_api_away_the_cluster_does_what_it_can() {
    let platform = platform().await;
    let _alone = platform.alone().await;
    let [kept, ends, abandoned, late] = ["kept", "ends", "abandoned", "late"].map(name);
    for name in [&kept, &ends, &abandoned] {
        platform.ready(name, json!({})).await;
    }
    platform.way.refuse();
    // A suspension needs no api, nor does an end up to the last step; a new tenant waits, and says for what.
    platform.tenant(&kept, json!({"suspended": true})).await;
    until("no workers", async || replicas(platform, &kept).await, |it| *it == 0).await;
    platform.tenant(&late, json!({})).await;
    let waits = |it: &Value| is(it, "Registered", "Unknown", "ApiUnreachable");
    let told = platform.until(&late, "waiting", waits).await;
    assert_eq!(told["status"]["phase"], "Pending");
    assert_eq!(platform.get(&namespace_path(&late)).await, None);
    for name in [&ends, &abandoned] {
        platform.delete(&tenant_path(name)).await;
    }
    for name in [&ends, &abandoned] {
        platform.gone(&namespace_path(name)).await;
        platform.until(name, "waiting", |it| is(it, "Deregistered", "False", "ApiUnreachable")).await;
    }
    let annotation = json!({"metadata": {"annotations": {"cloister.dev/abandon": "true"}}});
    platform.merge(&tenant_path(&abandoned), annotation).await.unwrap();
    platform.gone(&tenant_path(&abandoned)).await;
    assert!(platform.get(&tenant_path(&ends)).await.is_some());

    platform.way.restore();
    platform.gone(&tenant_path(&ends)).await;
    platform.phase(&late, "Ready").await;
    platform.phase(&kept, "Suspended").await;
    for name in [&kept, &late] {
        platform.end(name).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_happens_while_the_operator_is_down_is_made_up_for() {
    let platform = platform().await;
    let mut operator = platform.alone().await;
    let [ends, changes, moved, fresh, forgotten] = ["ends", "changes", "moved", "fresh", "forgotten"].map(name);
    for name in [&ends, &changes, &moved, &forgotten] {
        platform.ready(name, json!({})).await;
    }
    let before = platform.state(&changes).await;
    let tenant = platform.client(&forgotten).await;
    operator.terminate().await;
    platform.delete(&tenant_path(&ends)).await;
    platform.delete(&child_path(&changes, "networkpolicies")).await;
    platform.merge(&child_path(&changes, "deployments"), json!({"spec": {"paused": true}})).await.unwrap();
    platform.tenant(&moved, json!({"plan": "free"})).await;
    platform.tenant(&fresh, json!({})).await;
    // One whose finalizer somebody took away: the api learns of its end from the list of all.
    platform.merge(&tenant_path(&forgotten), json!({"metadata": {"finalizers": null}})).await.unwrap();
    platform.delete(&tenant_path(&forgotten)).await;
    platform.gone(&tenant_path(&forgotten)).await;
    // An object that was told of in this moment would not be missed in the list.
    tokio::time::sleep(Duration::from_secs(3)).await;
    operator.restart().await;

    platform.gone(&tenant_path(&ends)).await;
    platform.gone(&namespace_path(&ends)).await;
    until("it is put right", async || platform.state(&changes).await, |state| *state == before).await;
    platform.gone(&namespace_path(&moved)).await;
    platform.phase(&fresh, "Ready").await;
    let refused = async || tenant.client.query("{ viewer { scopes } }", json!({})).await.status.is_success();
    until("the forgotten tenant's keys are refused", refused, |is_served| !is_served).await;
    // Its namespace is told of, and left alone.
    let orphans = async || operator.metrics().await.contains("cloister_operator_orphan_namespaces 1");
    until("an orphan is counted", orphans, |is_counted| *is_counted).await;
    assert!(platform.get(&namespace_path(&forgotten)).await.is_some());
    platform.delete(&namespace_path(&forgotten)).await;
    platform.gone(&namespace_path(&forgotten)).await;
    for name in [&changes, &moved, &fresh] {
        platform.end(name).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_definition_that_is_deleted_first_takes_its_tenants_in_good_order() {
    // Every Tenant of the cluster goes: it is this test's own.
    let platform = super::RUNTIME.spawn(Platform::start()).await.unwrap();
    let (own, shared) = (name("own"), name("shared"));
    platform.ready(&own, json!({})).await;
    platform.ready(&shared, json!({"plan": "free"})).await;
    let tenant = platform.client(&own).await;
    let definition = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/tenants.cloister.dev";
    platform.delete(definition).await;
    platform.gone(definition).await;
    platform.gone(&namespace_path(&own)).await;
    assert!(!tenant.client.query("{ viewer { scopes } }", json!({})).await.status.is_success());
    // The operator lives, and goes on when the definition is back.
    platform.cluster.apply(include_str!("../../../../crds/tenants.yaml")).await.unwrap();
    let wait = ["wait", "--for=condition=Established", "crd/tenants.cloister.dev", "--timeout=30s"];
    platform.cluster.kubectl(&wait).await;
    let again = name("again");
    let made = async || platform.try_tenant(&again, json!({})).await;
    until("a Tenant can be made", made, Result::is_ok).await.unwrap();
    platform.phase(&again, "Ready").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_admins_suspension_holds_whatever_the_object_says() {
    let platform = platform().await;
    let _shared = platform.undisturbed().await;
    let name = name("admin");
    platform.ready(&name, json!({"suspended": false})).await;
    let tenant = platform.client(&name).await;
    // GitOps holds the field; the admin's suspension takes effect all the same, and shows as whose it is.
    let payload = mutate(&platform.app, "suspendTenant", json!({"tenantId": tenant.id})).await;
    assert_eq!(payload["errors"][0]["code"], "MANAGED_BY_CLUSTER", "{payload}");
    let suspended = platform.phase(&name, "Suspended").await;
    assert_eq!(condition(&suspended, "Suspended"), ("True".to_owned(), "ByAdmin".to_owned()));
    until("no workers", async || replicas(platform, &name).await, |it| *it == 0).await;
    let resumed = mutate(&platform.app, "resumeTenant", json!({"tenantId": tenant.id})).await;
    assert_eq!(resumed["tenant"]["status"], "ACTIVE", "{resumed}");
    platform.phase(&name, "Ready").await;
    platform.end(&name).await;
}

/// What the api knows of a tenant is set back, as by a restore from a backup.
async fn set_back(platform: &Platform, id: &str, change: impl FnOnce(&mut tenants::ActiveModel)) {
    let db = platform.app.database().await;
    set(&db, id, change).await;
    let row = cluster_tenants::Entity::in_tenant(uuid_of(id)).one(&db).await.unwrap().unwrap();
    let mut row = row.into_active_model();
    (row.generation, row.registration) = (Set(0), Set(None));
    row.update(&db).await.unwrap();
}

/// Changes a tenant's row, as something else than the tests' calls would.
async fn set(db: &DatabaseConnection, id: &str, change: impl FnOnce(&mut tenants::ActiveModel)) {
    let mut row = tenants::ActiveModel { id: Set(uuid_of(id)), ..Default::default() };
    change(&mut row);
    row.update(db).await.unwrap();
}

/// Another plan, as billing moves a tenant to it.
fn pro(row: &mut tenants::ActiveModel) {
    (row.plan, row.isolation) = (Set("pro".to_owned()), Set(tenants::Isolation::Shared));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_that_was_set_back_is_told_the_spec_again_and_takes_nothing_from_the_tenant() {
    let platform = platform().await;
    let _alone = platform.alone().await;
    let (name, other) = (name("setback"), name("limit"));
    platform.ready(&name, json!({})).await;
    platform.ready(&other, json!({"plan": "free", "monthlyTokenLimit": 7_000})).await;
    let (tenant, limited) = (platform.client(&name).await, platform.client(&other).await);
    let namespace = platform.get(&namespace_path(&name)).await.unwrap()["metadata"]["uid"].clone();
    // The registration that the api noted went with it, and so would the plan.
    set_back(platform, &tenant.id, pro).await;
    set_back(platform, &limited.id, |row| row.monthly_token_limit = Set(Some(5))).await;
    let plan = async || seen(platform, &tenant.id).await["plan"]["name"].clone();
    until("the plan is told again", plan, |plan| plan == "ENTERPRISE").await;
    let query = "query ($id: ID!) { tenantById(id: $id) { monthlyTokenLimit } }";
    let limit = async || {
        platform.app.admin().data(query, json!({"id": limited.id})).await["tenantById"]["monthlyTokenLimit"].clone()
    };
    until("the limit is told again", limit, |limit| *limit == json!(7_000) || *limit == json!("7000")).await;
    platform.phase(&name, "Ready").await;
    assert_eq!(platform.get(&namespace_path(&name)).await.unwrap()["metadata"]["uid"], namespace);
    for name in [&name, &other] {
        platform.end(name).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn billing_suspends_and_moves_plans_and_the_object_shows_it() {
    let platform = platform().await;
    let _shared = platform.undisturbed().await;
    let name = name("billing");
    platform.ready(&name, json!({})).await;
    let tenant = platform.client(&name).await;
    let db = platform.app.database().await;
    set(&db, &tenant.id, |row| row.suspended_by_billing = Set(true)).await;
    let suspended = platform.phase(&name, "Suspended").await;
    assert_eq!(condition(&suspended, "Suspended"), ("True".to_owned(), "PaymentFailed".to_owned()));
    until("no workers", async || replicas(platform, &name).await, |it| *it == 0).await;
    set(&db, &tenant.id, |row| row.suspended_by_billing = Set(false)).await;
    platform.phase(&name, "Ready").await;
    // A plan that billing moved; the object holds the other one.
    set(&db, &tenant.id, pro).await;
    let moved = platform.until(&name, "told", |it| is(it, "BillingInSync", "False", "PlanDiffers")).await;
    assert!(super::message(&moved, "BillingInSync").contains("pro"), "{moved}");
    platform.gone(&namespace_path(&name)).await;
    platform.end(&name).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_of_the_cluster_that_changes_what_is_written_is_told_of_and_not_fought() {
    let platform = platform().await;
    let _shared = platform.undisturbed().await;
    let name = name("contested");
    let policy = json!({"apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingAdmissionPolicy",
        "metadata": {"name": name}, "spec": {
            "failurePolicy": "Fail", "reinvocationPolicy": "Never",
            "matchConstraints": {"resourceRules": [{"apiGroups": ["policy"], "apiVersions": ["v1"],
                "resources": ["poddisruptionbudgets"], "operations": ["CREATE", "UPDATE"]}],
                "namespaceSelector": {"matchLabels": {"cloister.dev/tenant": name}}},
            "mutations": [{"patchType": "ApplyConfiguration", "applyConfiguration": {"expression":
                "Object{metadata: Object.metadata{labels: {\"cost-centre\": \"42\"}}}"}}]}});
    let binding = json!({"apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingAdmissionPolicyBinding",
        "metadata": {"name": name}, "spec": {"policyName": name}});
    let group = "/apis/admissionregistration.k8s.io/v1";
    platform.create(&format!("{group}/mutatingadmissionpolicies"), policy).await.unwrap();
    platform.create(&format!("{group}/mutatingadmissionpolicybindings"), binding).await.unwrap();
    // It holds once the API server has heard of it.
    tokio::time::sleep(Duration::from_secs(2)).await;
    platform.tenant(&name, json!({})).await;
    let told = platform.until(&name, "told", |it| is(it, "RuntimeAvailable", "False", "Contested")).await;
    let said = super::message(&told, "RuntimeAvailable");
    assert!(said.contains("PodDisruptionBudget") && said.contains("metadata.labels"), "{said}");
    let watched = platform.gate.watch(&name, None);
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(watched.seen().len() <= 2, "it is fought over: {:?}", watched.seen());
    for kind in ["mutatingadmissionpolicybindings", "mutatingadmissionpolicies"] {
        platform.delete(&format!("{group}/{kind}/{name}")).await;
    }
    platform.end(&name).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_operator_stands_by_and_takes_over() {
    let platform = platform().await;
    let mut first = platform.alone().await;
    let name = name("leader");
    platform.ready(&name, json!({})).await;
    let url = platform.way.in_place_of(&platform.app.runtime_url());
    let second = cloister_tests::Operator::builder(&platform.gate.kubeconfig(), &url)
        .env("CLOISTER_OPERATOR__IDENTITY", "cloister-operator-1")
        .env("CLOISTER_OPERATOR__RUNTIME_CLASSES", "gvisor")
        .start()
        .await;
    let ready = async || {
        let answer = cloister_tests::client::http().get(second.client().url("/readyz")).send().await;
        answer.is_ok_and(|answer| answer.status().is_success())
    };
    until("the second one stands by, and is ready", ready, |ready| *ready).await;
    assert!(second.metrics().await.contains("cloister_operator_leader 0"));
    // A signal hands over at once, not when the Lease has run out.
    let status = first.terminate().await;
    assert!(status.success(), "{status}");
    let begun = Instant::now();
    platform.leads(&second).await;
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    platform.delete(&child_path(&name, "poddisruptionbudgets")).await;
    let back = async || platform.get(&child_path(&name, "poddisruptionbudgets")).await.is_some();
    until("the second one puts right", back, |is_back| *is_back).await;
    drop(second);
    first.restart().await;
    platform.leads(&first).await;
    platform.end(&name).await;
    assert_eq!(platform.get(&kind_path(&name, "secrets")).await.unwrap()["items"], json!([]));
}
