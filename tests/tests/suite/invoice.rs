//! Draft invoices, against values worked out by hand.

use cloister_tests::app::TestAppBuilder;
use cloister_tests::{Client, ModelServer, Reply, TestApp};
use entity::quota_counters;
use sea_orm::ActiveValue::Set;
use sea_orm::EntityTrait;
use serde_json::{Value, json};

use super::both::on_both;
use super::ledger::{agent, start, succeed, uuid};

on_both!(
    drafts_are_what_the_plans_say,
    amounts_are_rounded_half_to_even_at_the_end_only,
    each_month_has_its_own_invoice,
);

const INVOICE: &str = "query ($period: Month) { invoice(period: $period) {
    plan { name } period status basePrice includedTokens tokensUsed overageTokens overageCost total finalizedAt
    lines { kind tokens amount }
} }";

/// The built-in plan, but for where its runs execute.
const ENTERPRISE_IN_SHARED_POOL: &str = r#"
[plans.enterprise]
base_price = "299"
included_tokens = 100000000
overage_per_million = "3"
monthly_token_limit = 1000000000
max_concurrent_runs = 500
requests_per_minute = 6000
weight = 16
isolation = "shared"
"#;

async fn invoice(client: &Client, period: Option<&str>) -> Value {
    client.data(INVOICE, json!({"period": period})).await["invoice"].clone()
}

/// The numbers of an invoice: used, overage, its cost, the total, and the lines.
fn numbers(invoice: &Value) -> Value {
    let lines = invoice["lines"].as_array().unwrap().iter();
    let lines: Vec<Value> = lines.map(|line| json!([line["kind"], line["tokens"], line["amount"]])).collect();
    json!([invoice["tokensUsed"], invoice["overageTokens"], invoice["overageCost"], invoice["total"], lines])
}

/// A client that has used so many tokens, in calls of the scripted model.
struct Spender {
    client: Client,
    agent: String,
}

impl Spender {
    async fn new(app: &TestApp, plan: &str) -> Spender {
        let tenant = app.tenant_with(&plan.to_lowercase(), json!({"plan": plan})).await;
        let agent = agent(&tenant.client, "Spender", json!({})).await;
        Spender { client: tenant.client, agent }
    }

    async fn spend(&self, model: &ModelServer, tokens: u64) -> Value {
        model.script([Reply::text("Spent.").usage(tokens - 1, 1)]);
        succeed(&self.client, &self.agent, "Spend").await;
        invoice(&self.client, None).await
    }
}

async fn drafts_are_what_the_plans_say(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    // Nobody else's workers are here to run what an enterprise starts.
    let app = builder.model_server(&model).config(ENTERPRISE_IN_SHARED_POOL).start().await;

    let free = Spender::new(&app, "FREE").await;
    let draft = invoice(&free.client, None).await;
    assert_eq!(numbers(&draft), json!([0, 0, "0.00", "0.00", [["BASE", 0, "0.00"]]]));
    let told = (&draft["plan"]["name"], &draft["status"], &draft["basePrice"], &draft["includedTokens"]);
    assert_eq!(told, (&json!("FREE"), &json!("DRAFT"), &json!("0.00"), &json!(1_000_000)));
    assert_eq!(draft["finalizedAt"], Value::Null);
    // Nothing is sold beyond what is included, even if a call has gone beyond it.
    let draft = free.spend(&model, 1_200_000).await;
    assert_eq!(numbers(&draft), json!([1_200_000, 200_000, "0.00", "0.00", [["BASE", 1_000_000, "0.00"]]]));
    let refused = super::ledger::try_start(&free.client, json!({"agentId": free.agent, "input": "More"})).await;
    assert_eq!(refused["errors"][0]["code"], "QUOTA_EXCEEDED");

    let pro = Spender::new(&app, "PRO").await;
    let draft = invoice(&pro.client, None).await;
    assert_eq!(numbers(&draft), json!([0, 0, "0.00", "49.00", [["BASE", 0, "49.00"]]]));
    let draft = pro.spend(&model, 9_999_999).await;
    assert_eq!(numbers(&draft), json!([9_999_999, 0, "0.00", "49.00", [["BASE", 9_999_999, "49.00"]]]));
    let draft = pro.spend(&model, 1).await;
    assert_eq!(numbers(&draft), json!([10_000_000, 0, "0.00", "49.00", [["BASE", 10_000_000, "49.00"]]]));
    // 2,345,679 tokens at 5 USD a million: 11.728395 USD.
    let draft = pro.spend(&model, 2_345_679).await;
    let lines = json!([["BASE", 10_000_000, "49.00"], ["OVERAGE", 2_345_679, "11.73"]]);
    assert_eq!(numbers(&draft), json!([12_345_679, 2_345_679, "11.73", "60.73", lines]));

    let enterprise = Spender::new(&app, "ENTERPRISE").await;
    let draft = enterprise.spend(&model, 100_000_000).await;
    assert_eq!(numbers(&draft), json!([100_000_000, 0, "0.00", "299.00", [["BASE", 100_000_000, "299.00"]]]));
    // 23,456,789 tokens at 3 USD a million: 70.370367 USD.
    let draft = enterprise.spend(&model, 23_456_789).await;
    let lines = json!([["BASE", 100_000_000, "299.00"], ["OVERAGE", 23_456_789, "70.37"]]);
    assert_eq!(numbers(&draft), json!([123_456_789, 23_456_789, "70.37", "369.37", lines]));

    // The plan that holds now prices the whole month: 122,345,679 tokens of an enterprise, none beyond.
    let mutation = "mutation ($input: SetTenantPlanInput!) { setTenantPlan(input: $input) { errors { code } } }";
    let tenant = pro.client.data("{ tenant { id } }", json!({})).await["tenant"]["id"].clone();
    let set = app.admin().query(mutation, json!({"input": {"tenantId": tenant, "plan": "ENTERPRISE"}})).await;
    set.payload("setTenantPlan");
    let draft = invoice(&pro.client, None).await;
    assert_eq!(numbers(&draft), json!([12_345_679, 0, "0.00", "299.00", [["BASE", 12_345_679, "299.00"]]]));
    assert_eq!(draft["plan"]["name"], "ENTERPRISE");
}

async fn amounts_are_rounded_half_to_even_at_the_end_only(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    let builder = [
        ("FREE__BASE_PRICE", "0.004"),
        ("FREE__INCLUDED_TOKENS", "0"),
        ("FREE__OVERAGE_PER_MILLION", "4.00"),
        ("FREE__MONTHLY_TOKEN_LIMIT", "1000000"),
        ("FREE__MAX_CONCURRENT_RUNS", "5"),
        ("FREE__REQUESTS_PER_MINUTE", "600"),
        ("FREE__WEIGHT", "1"),
    ]
    .into_iter()
    .fold(builder, |builder, (name, value)| builder.env(&format!("CLOISTER_PLANS__{name}"), value));
    let app = builder.model_server(&model).start().await;

    let pro = Spender::new(&app, "PRO").await;
    // Beyond the included tokens, in all; half a cent is a thousand tokens.
    let cases = [
        (10_000_999, "0.00", "49.00"),
        (1, "0.00", "49.00"),
        (1, "0.01", "49.01"),
        (1_998, "0.01", "49.01"),
        (1, "0.02", "49.02"),
        (2_000, "0.02", "49.02"),
        (1, "0.03", "49.03"),
    ];
    for (tokens, cost, total) in cases {
        let draft = pro.spend(&model, tokens).await;
        assert_eq!((&draft["overageCost"], &draft["total"]), (&json!(cost), &json!(total)), "{draft}");
    }

    // Each line is less than half a cent, their sum is not.
    let tiny = Spender::new(&app, "FREE").await;
    let draft = tiny.spend(&model, 1_000).await;
    let lines = json!([["BASE", 0, "0.00"], ["OVERAGE", 1_000, "0.00"]]);
    assert_eq!(numbers(&draft), json!([1_000, 1_000, "0.00", "0.01", lines]));
}

async fn each_month_has_its_own_invoice(builder: TestAppBuilder) {
    let model = ModelServer::start().await;
    let app = builder.model_server(&model).start().await;
    let tenant = app.tenant("acme").await;
    let client = &tenant.client;
    let agent = agent(client, "Agent", json!({})).await;
    model.script([Reply::text("Hello.").usage(40, 2)]);
    let run = start(client, &agent, "Hi").await;
    super::ledger::until(client, &run, "SUCCEEDED").await;

    let now = invoice(client, None).await;
    let month = now["period"].as_str().unwrap().to_owned();
    assert_eq!(invoice(client, Some(&month)).await, now);
    assert_eq!(now["tokensUsed"], 42);
    let (year, number) = month.split_once('-').unwrap();
    let (year, number): (i32, i32) = (year.parse().unwrap(), number.parse().unwrap());
    let before = if number == 1 { format!("{}-12", year - 1) } else { format!("{year}-{:02}", number - 1) };
    let empty = json!([0, 0, "0.00", "49.00", [["BASE", 0, "49.00"]]]);
    for period in [before.as_str(), "1999-12", "9999-01"] {
        let other = invoice(client, Some(period)).await;
        assert_eq!((&numbers(&other), &other["period"]), (&empty, &json!(period)));
    }

    // What was used in the month before is on its invoice alone.
    let used = quota_counters::ActiveModel {
        tenant_id: Set(uuid(&tenant.id)),
        scope: Set(quota_counters::Scope::Tenant),
        scope_id: Set(uuid(&tenant.id)),
        period: Set(before.clone()),
        used: Set(10_200_000),
        reserved: Set(0),
    };
    quota_counters::Entity::insert(used).exec_without_returning(&app.database().await).await.unwrap();
    let lines = json!([["BASE", 10_000_000, "49.00"], ["OVERAGE", 200_000, "1.00"]]);
    let expected = json!([10_200_000, 200_000, "1.00", "50.00", lines]);
    assert_eq!(numbers(&invoice(client, Some(&before)).await), expected);
    assert_eq!(invoice(client, None).await, now);

    // The platform's admin sees the same.
    let query = "query ($id: ID!, $period: Month) { tenantById(id: $id) { invoice(period: $period) { total } } }";
    let seen = app.admin().data(query, json!({"id": tenant.id, "period": before})).await;
    assert_eq!(seen["tenantById"]["invoice"]["total"], "50.00");

    for period in ["2026-13", "2026-00", "2026-1", "26-01", "2026-01-01", "", "now"] {
        let refused = client.query(INVOICE, json!({"period": period})).await;
        assert!(!refused.errors().is_empty(), "{period:?}: {}", refused.body);
    }
}
