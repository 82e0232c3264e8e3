//! Two tenants: whatever one's key calls, it neither reads nor changes what is the other's. The calls come
//! from the schema, so that a new field can't be forgotten.

use std::collections::BTreeMap;

use cloister_tests::app::TestAppBuilder;
use cloister_tests::{Client, Tenant, TestApp};
use serde_json::{Value, json};

use crate::both::on_both;
use crate::calls::{done, finished_run, missing, new_agent, new_key, tenant_rows, text};
use crate::generated::{Api, Kind, Root, Slot, Values};

on_both!(
    no_id_of_another_tenant_is_any_better_than_a_missing_one,
    no_list_shows_what_is_another_tenants,
    no_subscription_tells_what_another_tenant_does,
);

/// What the other tenant's texts all hold.
const MARK: &str = "ALPHA";

/// Root fields that take no id: what they show or change is the caller's own, everybody's, or the admin's.
const WITHOUT_ID: [&str; 14] = [
    "Mutation.createTenant",
    "Mutation.rotateWebhookSecret",
    "Query.agents",
    "Query.apiKeys",
    "Query.conversations",
    "Query.invoice",
    "Query.models",
    "Query.plans",
    "Query.tenant",
    "Query.tenants",
    "Query.usage",
    "Query.viewer",
    "Subscription.runs",
    "Subscription.usage",
];

/// One object of each kind, by the prefix of its id.
struct Objects {
    ids: BTreeMap<&'static str, String>,
}

impl Objects {
    async fn of(app: &TestApp, tenant: &Tenant, mark: &str) -> Objects {
        let client = &tenant.client;
        let webhook =
            json!({"webhook": {"name": "look_up", "description": mark, "url": format!("https://{mark}.example/")}});
        let other = new_agent(client, json!({"name": format!("{mark} other")})).await;
        let agent = json!({
            "name": mark, "instructions": mark, "description": mark, "tools": [webhook], "handoffs": [{"agentId": other}]
        });
        let agent = new_agent(client, agent).await;
        let version = "query ($id: ID!) { agent(id: $id) { published { id } } }";
        let version = text(&client.data(version, json!({"id": agent})).await, "/agent/published/id");
        let input = json!({"agentId": agent, "input": mark, "newConversation": true});
        let run = finished_run(client, input).await;
        let conversation = "query ($id: ID!) { run(id: $id) { conversation { id } } }";
        let conversation = text(&client.data(conversation, json!({"id": run})).await, "/run/conversation/id");
        let (key, _) = new_key(client, json!({"name": mark})).await;
        let token = done(&app.admin(), "createRuntimeToken", json!({"tenantId": tenant.id})).await;
        let ids = [
            ("ten", tenant.id.clone()),
            ("key", key),
            ("agt", agent),
            ("agv", version),
            ("cnv", conversation),
            ("run", run),
            ("rtk", text(&token, "/runtimeToken/id")),
        ];
        Objects { ids: ids.into() }
    }
}

impl Values for Objects {
    fn id(&self, slot: &[String]) -> String {
        let name = slot.last().expect("a slot");
        let prefix = kinds(name, "")[0];
        self.ids[prefix].clone()
    }
}

/// The kinds of id that an argument takes. A new name must be added here, or the test fails.
fn kinds(name: &str, root: &str) -> Vec<&'static str> {
    match (name, root) {
        ("id", "Query.node") => vec!["ten", "key", "agt", "agv", "cnv", "run", "rtk"],
        ("id", "Query.tenantById") | ("tenantId", _) => vec!["ten"],
        ("id", "Query.agent") | ("agentId", _) => vec!["agt"],
        ("id", "Query.run") | ("runId", _) => vec!["run"],
        ("id", "Query.conversation") | ("conversationId", _) => vec!["cnv"],
        ("apiKeyId", _) => vec!["key"],
        ("runtimeTokenId", _) => vec!["rtk"],
        _ => panic!("{root} has the new id {name}: say in kinds() whose it is"),
    }
}

/// A call with one id at stake.
struct Case {
    root: Root,
    slot: Slot,
    kind: &'static str,
}

impl Case {
    fn name(&self) -> String {
        format!("{} {}", self.root.path(), self.slot.join("."))
    }
}

fn cases(api: &Api) -> Vec<Case> {
    let mut cases = Vec::new();
    let mut without = Vec::new();
    for root in api.roots() {
        let slots = api.id_slots(&root);
        if slots.is_empty() {
            without.push(root.path());
        }
        for slot in slots {
            for kind in kinds(slot.last().expect("a slot"), &root.path()) {
                cases.push(Case { root: root.clone(), slot: slot.clone(), kind });
            }
        }
    }
    without.sort();
    assert_eq!(without, WITHOUT_ID, "say in WITHOUT_ID whose objects a new field shows");
    cases
}

/// The whole answer to a call, with `id` written as `<id>` and without what differs each time.
async fn answer(client: &Client, api: &Api, case: &Case, id: &str, own: &Objects) -> Value {
    let (document, variables) = api.call(&case.root, Some((&case.slot, id)), own, 2);
    let mut body = match case.root.kind {
        Kind::Subscription => {
            let mut results = client.subscribe_sse(&document, variables).await;
            results.next_result().await.expect("a result")
        }
        _ => client.query(&document, variables).await.body,
    };
    for error in body.get_mut("errors").and_then(Value::as_array_mut).into_iter().flatten() {
        let code = &error["extensions"]["code"];
        assert!(code != "GRAPHQL_VALIDATION_FAILED" && code != "LIMIT_EXCEEDED", "{document}: {error}");
        error["extensions"].as_object_mut().expect("extensions").remove("traceId");
    }
    serde_json::from_str(&body.to_string().replace(id, "<id>")).expect("JSON")
}

/// Objects that are made and ended come last, tenants after all.
fn order(case: &Case) -> (bool, bool, bool) {
    let name = &case.root.name;
    let ends = ["delete", "revoke", "suspend"].iter().any(|verb| name.starts_with(verb));
    (case.root.kind != Kind::Query, ends, ends && name.ends_with("Tenant"))
}

async fn two(app: &TestApp) -> (Tenant, Objects, Tenant, Objects) {
    let alpha =
        app.tenant_with(&format!("{MARK} Inc"), json!({"plan": "PRO", "email": format!("{MARK}@example.test")})).await;
    let beta = app.tenant("beta").await;
    let (of_alpha, of_beta) = (Objects::of(app, &alpha, MARK).await, Objects::of(app, &beta, "beta").await);
    (alpha, of_alpha, beta, of_beta)
}

async fn no_id_of_another_tenant_is_any_better_than_a_missing_one(builder: TestAppBuilder) {
    let app = builder.start().await;
    let (alpha, of_alpha, beta, of_beta) = two(&app).await;
    let api = Api::read(&beta.client).await;
    let mut cases = cases(&api);
    cases.sort_by_key(order);
    assert!(cases.len() > 30, "only {} cases", cases.len());
    let before = tenant_rows(&app, &alpha.id).await;
    for table in [
        "tenants",
        "api_keys",
        "agents",
        "agent_versions",
        "conversations",
        "runs",
        "run_items",
        "usage_totals",
        "runtime_tokens",
    ] {
        assert!(!before[table].is_empty(), "{table} has nothing to lose");
    }

    let mut answers = BTreeMap::new();
    for case in &cases {
        let foreign = answer(&beta.client, &api, case, &of_alpha.ids[case.kind], &of_beta).await;
        let nobody = answer(&beta.client, &api, case, &missing(case.kind), &of_beta).await;
        assert_eq!(foreign, nobody, "{} tells whether another tenant's {} exists", case.name(), case.kind);
        assert!(!foreign.to_string().contains(MARK), "{} shows what is another tenant's: {foreign}", case.name());
        answers.insert((case.name(), case.kind), foreign);
    }
    for id in [&of_alpha.ids["agt"], &missing("agt")] {
        let run = beta.client.rest_post("/v1/run", &json!({"agent_id": id, "message": "Hi"})).await;
        assert_eq!((run.status.as_u16(), run.body), (404, json!({"detail": "There is no agent with this id."})));
    }
    assert_eq!(tenant_rows(&app, &alpha.id).await, before, "another tenant's rows have changed");

    // That each call could have succeeded: the owner, or the admin, is answered otherwise.
    for case in &cases {
        let refused = &answers[&(case.name(), case.kind)];
        let forbidden = refused["errors"][0]["extensions"]["code"] == "FORBIDDEN";
        let client = if forbidden { app.admin() } else { alpha.client.clone() };
        let id = &of_alpha.ids[case.kind];
        let own = answer(&client, &api, case, id, &of_alpha).await;
        assert_ne!(&own, refused, "{} by its owner", case.name());
    }
}

async fn no_list_shows_what_is_another_tenants(builder: TestAppBuilder) {
    let app = builder.start().await;
    let (_, of_alpha, beta, of_beta) = two(&app).await;
    let api = Api::read(&beta.client).await;
    let assert_own = |what: &str, body: &Value| {
        let shown = body.to_string();
        assert!(!shown.contains(MARK), "{what} shows another tenant's: {shown}");
        for id in of_alpha.ids.values() {
            assert!(!shown.contains(id), "{what} shows another tenant's {id}: {shown}");
        }
    };
    let mut lists = 0;
    for root in api.roots().into_iter().filter(|root| root.kind == Kind::Query) {
        // Everything that can be reached from the caller's own, three objects deep.
        let kinds = match api.id_slots(&root).iter().find(|slot| slot.len() == 1) {
            Some(slot) => kinds(slot[0].as_str(), &root.path()),
            None => vec![""],
        };
        for kind in kinds {
            let own = of_beta.ids.get(kind).cloned().unwrap_or_default();
            let slot = vec!["id".to_owned()];
            let at = (!kind.is_empty()).then_some((slot.as_slice(), own.as_str()));
            let levels = match root.name.as_str() {
                // Of every kind of object at once.
                "node" => 1,
                "agents" | "runs" | "conversations" | "tenants" => 2,
                _ => 3,
            };
            let (document, variables) = api.call(&root, at, &of_beta, levels);
            let answer = beta.client.query(&document, variables).await;
            assert_own(&root.path(), &answer.body);
            if matches!(root.name.as_str(), "tenants" | "tenantById") {
                assert_eq!(answer.error_code(), Some("FORBIDDEN"), "{}", answer.body);
                continue;
            }
            assert!(answer.errors().is_empty(), "{}: {:?}", root.path(), answer.errors());
            assert!(!answer.data()[&root.name].is_null(), "{document}: {}", answer.body);
            lists += answer.body.to_string().matches("\"nodes\":[{").count();
        }
    }
    assert!(lists >= 15, "only {lists} lists had something in them");
    // Another tenant's places in a list are no way in.
    let cursor = format!("i{}", crate::calls::uuid_of(&of_alpha.ids["agt"]).simple());
    for arguments in ["after", "before"] {
        let list = format!("query ($c: String) {{ agents({arguments}: $c) {{ nodes {{ id name }} }} }}");
        assert_own(arguments, &beta.client.data(&list, json!({"c": cursor})).await);
    }
    // The admin sees both, so what is missing above was there to be seen.
    let all = app.admin().data("{ tenants { nodes { id name agents { nodes { name } } } } }", json!({})).await;
    assert!(all.to_string().contains(MARK) && all.to_string().contains("beta"), "{all}");
}

async fn no_subscription_tells_what_another_tenant_does(builder: TestAppBuilder) {
    let app = builder.start().await;
    let (alpha, of_alpha, beta, of_beta) = two(&app).await;
    let mut runs = beta.client.ws_ready().await;
    runs.subscribe("runs", "subscription { runs { id input } }", json!({})).await;
    let mut usage = beta.client.ws_ready().await;
    usage.subscribe("usage", "subscription { usage { totalTokens requestCount } }", json!({})).await;
    let first = usage.next().await.message()["payload"]["data"]["usage"].clone();
    assert_eq!(first["requestCount"], 1);
    // The socket's operations are polled in the order of its messages: a second one is answered, so the first stands.
    runs.subscribe("viewer", "{ viewer { scopes } }", json!({})).await;
    assert_eq!(runs.next().await.message()["id"], "viewer");
    assert_eq!(runs.next().await.message()["type"], "complete");

    finished_run(&alpha.client, json!({"agentId": of_alpha.ids["agt"], "input": MARK})).await;
    done(&alpha.client, "updateAgent", json!({"agentId": of_alpha.ids["agt"], "description": MARK})).await;
    let own = finished_run(&beta.client, json!({"agentId": of_beta.ids["agt"], "input": "own"})).await;
    for _ in 0..2 {
        let told = runs.next().await.message()["payload"]["data"]["runs"].clone();
        assert_eq!(told, json!({"id": own, "input": "own"}));
    }
    // What the own call reserves may be told before what it used.
    let mut second = first;
    while second["requestCount"] == 1 {
        second = usage.next().await.message()["payload"]["data"]["usage"].clone();
    }
    assert_eq!(second["requestCount"], 2, "{second}");
}
