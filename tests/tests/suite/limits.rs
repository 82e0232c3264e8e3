//! Attacks on GraphQL: documents that cost too much, requests that come the wrong way, pages too large.

use std::time::{Duration, Instant};

use cloister_tests::app::TestAppBuilder;
use cloister_tests::{Client, GraphqlResponse, TestApp};
use serde_json::{Value, json};

use crate::both::on_both;
use crate::calls::{new_agent, row_counts, text};

on_both!(pages_and_cursors_are_checked, lists_are_costed_by_what_they_read,);

/// Asserts that a document was refused before it ran, for this limit.
fn assert_limited(answer: &GraphqlResponse, message: &str) {
    assert_eq!(answer.status, 400, "{}", answer.body);
    assert_eq!(answer.error_code(), Some("LIMIT_EXCEEDED"), "{}", answer.body);
    assert_eq!(answer.errors()[0]["message"], message);
    assert_eq!(answer.errors().len(), 1, "{}", answer.body);
    assert!(answer.body.get("data").is_none(), "{}", answer.body);
}

async fn ask(client: &Client, document: &str) -> GraphqlResponse {
    client.query(document, json!({})).await
}

/// `levels` fields within one another, the last of them a scalar.
fn deep(levels: usize) -> String {
    let mut path = vec!["tenant", "agents(first: 1)", "nodes"];
    let steps = ["published", "agent"].iter().cycle();
    path.extend(steps.take(levels - path.len() - 1));
    path.push("id");
    format!("{{ {} {}", path.join(" { "), "}".repeat(levels))
}

fn introspects(levels: usize) -> String {
    format!("{{ __type(name: \"Query\") {{ {}name {}", "ofType { ".repeat(levels - 2), "}".repeat(levels))
}

#[tokio::test(flavor = "multi_thread")]
async fn each_limit_holds_to_the_last_one() {
    let app = TestApp::start().await;
    let client = app.tenant("alpha").await.client;
    let ok = async |document: String| {
        let answer = ask(&client, &document).await;
        assert!(answer.status == 200 && answer.errors().is_empty(), "{document}: {}", answer.body);
    };
    let limited = async |document: String, message: &str| assert_limited(&ask(&client, &document).await, message);

    ok(deep(12)).await;
    limited(deep(13), "The query's depth is 13; the maximum is 12.").await;
    let spread = deep(13).replacen("published {", "...F } } } } fragment F on Agent { published {", 1);
    let spread = spread.trim_end_matches('}').trim_end().to_owned() + &"}".repeat(10);
    limited(spread, "The query's depth is 13; the maximum is 12.").await;
    ok(introspects(20)).await;
    limited(introspects(21), "The query's depth is 21; the maximum is 20.").await;
    // Beside another field, introspection is a query like any other.
    let mixed = introspects(13).replacen('{', "{ viewer { scopes } ", 1);
    limited(mixed, "The query's depth is 13; the maximum is 12.").await;

    let aliases = |count: usize| {
        let fields: String = (0..count).map(|at| format!("a{at}: isPlatformAdmin ")).collect();
        format!("{{ viewer {{ {fields} }} }}")
    };
    ok(aliases(30)).await;
    limited(aliases(31), "The query's number of aliases is 31; the maximum is 30.").await;
    let directives =
        |count: usize| format!("{{ viewer {{ {} }} }}", "isPlatformAdmin @include(if: true) ".repeat(count));
    ok(directives(20)).await;
    limited(directives(21), "The query's number of directives is 21; the maximum is 20.").await;
    // Five tokens around them.
    let tokens = |count: usize| format!("{{ viewer {{ {} }} }}", "isPlatformAdmin ".repeat(count - 5));
    ok(tokens(2_000)).await;
    limited(tokens(2_001), "The query's number of tokens is 2001; the maximum is 2000.").await;
    let nested = format!("{{ viewer(a: {}{}) }}", "[".repeat(500), "]".repeat(500));
    limited(nested, "The query's nesting of brackets is 502; the maximum is 64.").await;
    limited(format!("{{ {} }}", "a".repeat(300)), "The query's number of bytes of a name is 300; the maximum is 256.")
        .await;
    // Comments, commas and strings are no way around it.
    let strings = format!("{{ agent(id: \"{}\") {{ id }} }}", "{ a } ".repeat(3_000));
    ok(strings).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fragment_bomb_is_defused_at_once() {
    let app = TestApp::start().await;
    let client = app.tenant("alpha").await.client;
    let bomb = |end: &str| {
        let fragment = |at: usize| match at {
            31 => format!("fragment F31 on Query {{ {end} }}"),
            _ => format!("fragment F{at} on Query {{ ...F{} ...F{} }}", at + 1, at + 1),
        };
        format!("{{ ...F0 }} {}", (0..32).map(fragment).collect::<Vec<_>>().join(" "))
    };
    for (what, document, code) in [
        ("the bomb", bomb("viewer { scopes }"), "LIMIT_EXCEEDED"),
        ("in introspection", bomb("__schema { types { name } }"), "LIMIT_EXCEEDED"),
        ("in a circle", bomb("...F0"), "GRAPHQL_VALIDATION_FAILED"),
        ("never spread", bomb("viewer { scopes }").replacen("...F0", "viewer { scopes }", 1), "LIMIT_EXCEEDED"),
        ("spreads itself", "{ ...F } fragment F on Query { ...F }".to_owned(), "GRAPHQL_VALIDATION_FAILED"),
    ] {
        let start = Instant::now();
        let answer = ask(&client, &document).await;
        let took = start.elapsed();
        assert!(took < Duration::from_secs(1), "{what} took {took:?}");
        assert_eq!((answer.status.as_u16(), answer.error_code()), (400, Some(code)), "{what}: {}", answer.body);
        assert!(answer.body.get("data").is_none(), "{what}: {}", answer.body);
        // The other doors know it too.
        let mut sse = client.subscribe_sse(&document, json!({})).await;
        assert_eq!(sse.next_result().await.unwrap()["errors"][0]["extensions"]["code"], code, "{what}");
        let mut ws = client.ws_ready().await;
        ws.subscribe("1", &document, json!({})).await;
        let message = ws.next().await;
        assert_eq!(message.message()["type"], "error", "{what}");
        assert_eq!(message.message()["payload"][0]["extensions"]["code"], code, "{what}");
    }
    assert_eq!(ask(&client, "{ viewer { scopes } }").await.status, 200);
}

async fn lists_are_costed_by_what_they_read(builder: TestAppBuilder) {
    let app = builder.start().await;
    let client = app.tenant("alpha").await.client;
    new_agent(&client, json!({})).await;
    // 19 fields of an agent, so that an element costs 20 and 99 of them, with the list, 1,981.
    let agent = "id name description isPublished createdAt updatedAt instructions toolUseBehavior stopAtTools maxTurns
        resetToolChoice maxToolConcurrency handoffDescription outputSchema
        modelSettings { temperature topP } model { name }";
    let rest =
        "models { name provider contextWindow maxOutputTokens price { input output cacheRead cacheWrite validFrom } }";
    let plans =
        "plans { name basePrice includedTokens monthlyTokenLimit maxConcurrentRuns requestsPerMinute isolation }";
    let all = format!("{{ agents(first: 99) {{ nodes {{ {agent} }} }} {rest} {plans} }}");
    let answer = ask(&client, &all).await;
    assert!(answer.errors().is_empty(), "{}", answer.body);
    let one_more = all.replace("isolation }", "isolation overagePerMillion }");
    assert_limited(&ask(&client, &one_more).await, "The query's complexity is 2001; the maximum is 2000.");
    // What a list costs follows `first` and `last`, 20 unless said otherwise, in variables too.
    let versions = "versions(SIZE) { nodes { id } }";
    for (declared, size) in [
        ("{", "first: 100"),
        ("{", "last: 100"),
        ("query ($n: Int = 100) {", "first: $n"),
        ("query ($n: Int! = 100) {", "last: $n"),
    ] {
        let document = format!("{declared} agents(SIZE) {{ nodes {{ {versions} }} }} }}").replace("SIZE", size);
        // A version is 2 with its `nodes`, so an agent 202 with its own.
        assert_limited(&ask(&client, &document).await, "The query's complexity is 20201; the maximum is 2000.");
    }
    let nested = "{ agents { nodes { versions { nodes { reaches { agent { versions { nodes { id } } } } } } } } }";
    assert_eq!(ask(&client, nested).await.error_code(), Some("LIMIT_EXCEEDED"));
    for list in ["apiKeys", "agents"] {
        let nested = format!(
            "{{ tenant {{ {list}(first: 100) {{ nodes {{ a: id b: id c: id d: id e: id f: id g: id h: id i: id j: id k: id l: id
            m: id n: id o: id p: id q: id r: id s: id t: id }} }} }} }}"
        );
        assert_eq!(ask(&client, &nested).await.error_code(), Some("LIMIT_EXCEEDED"), "{list}");
    }
    let widest = "{ agents(first: 2147483647) { nodes { versions(first: 2147483647) { nodes { id } } } } }";
    assert_eq!(ask(&client, widest).await.error_code(), Some("LIMIT_EXCEEDED"));
}

async fn pages_and_cursors_are_checked(builder: TestAppBuilder) {
    let app = builder.start().await;
    let client = app.tenant("alpha").await.client;
    let mut made = Vec::new();
    for at in 0..3 {
        made.push(new_agent(&client, json!({"name": format!("Agent {at}"), "publish": false})).await);
    }
    let list = async |arguments: Value| {
        let document = "query ($first: Int, $after: String, $last: Int, $before: String) {
            agents(first: $first, after: $after, last: $last, before: $before) {
                edges { cursor node { id } } pageInfo { hasNextPage hasPreviousPage startCursor endCursor } } }";
        client.query(document, arguments).await
    };
    let all = list(json!({})).await.data()["agents"].clone();
    let cursor = |at: usize| text(&all, &format!("/edges/{at}/cursor"));
    let ids = |page: &Value| {
        let edges = page["edges"].as_array().unwrap().iter();
        edges.map(|edge| edge["node"]["id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(ids(&all), made);
    assert_eq!(
        all["pageInfo"],
        json!({"hasNextPage": false, "hasPreviousPage": false, "startCursor": cursor(0), "endCursor": cursor(2)})
    );
    for (arguments, expected, previous, next) in [
        (json!({"first": 2}), &made[..2], false, true),
        (json!({"first": 2, "after": cursor(1)}), &made[2..], true, false),
        (json!({"last": 2}), &made[1..], true, false),
        (json!({"last": 1, "before": cursor(2)}), &made[1..2], true, true),
        (json!({"after": cursor(0), "before": cursor(2)}), &made[1..2], true, false),
        (json!({"first": 0}), &made[..0], false, true),
        (json!({"first": 100}), &made[..], false, false),
        (json!({"after": cursor(2)}), &made[..0], true, false),
    ] {
        let page = list(arguments.clone()).await.data()["agents"].clone();
        assert_eq!(ids(&page), expected, "{arguments}");
        let told = (page["pageInfo"]["hasPreviousPage"] == true, page["pageInfo"]["hasNextPage"] == true);
        assert_eq!(told, (previous, next), "{arguments}");
    }
    for (arguments, message) in [
        (json!({"first": 101}), "first must lie between 0 and 100; it is 101."),
        (json!({"last": 101}), "last must lie between 0 and 100; it is 101."),
        (json!({"first": -1}), "first must lie between 0 and 100; it is -1."),
        (json!({"last": -2147483648_i64}), "last must lie between 0 and 100; it is -2147483648."),
        (json!({"first": 1, "last": 1}), "Give first or last, not both."),
        (json!({"after": ""}), "\"\" is not a cursor of this list."),
        (json!({"after": "nonsense"}), "\"nonsense\" is not a cursor of this list."),
        (json!({"before": "i\u{0}"}), "\"i\\0\" is not a cursor of this list."),
        (json!({"after": "n99999999999999999999"}), "\"n99999999999999999999\" is not a cursor of this list."),
        (json!({"after": made[0]}), &format!("{:?} is not a cursor of this list.", made[0])),
        (json!({"before": "' OR 1=1 --"}), "\"' OR 1=1 --\" is not a cursor of this list."),
    ] {
        let refused = list(arguments.clone()).await;
        assert_eq!(refused.error_code(), Some("BAD_REQUEST"), "{arguments}: {}", refused.body);
        assert_eq!(refused.errors()[0]["message"], message, "{arguments}");
        assert_eq!(refused.errors()[0]["path"], json!(["agents"]), "{arguments}");
    }
    // Well-formed, but of another list: beyond every element.
    for foreign in ["n1", "m0190a0a0a0a07000800000000000000a.1"] {
        let page = list(json!({"after": foreign})).await.data()["agents"].clone();
        assert_eq!(ids(&page), Vec::<String>::new(), "{foreign}");
    }
    // Every list checks alike, the nested ones too.
    for document in [
        "{ apiKeys(first: 101) { nodes { id } } }",
        "{ runs(first: 101) { nodes { id } } }",
        "{ conversations(first: 101) { nodes { id } } }",
        "{ tenant { apiKeys(first: 101) { nodes { id } } } }",
        "{ tenant { agents(first: 101) { nodes { id } } } }",
        "{ agents(first: 1) { nodes { versions(first: 101) { nodes { id } } } } }",
    ] {
        let refused = ask(&client, document).await;
        assert_eq!(refused.error_code(), Some("BAD_REQUEST"), "{document}: {}", refused.body);
        assert_eq!(refused.errors()[0]["message"], "first must lie between 0 and 100; it is 101.", "{document}");
    }
    let refused = ask(&app.admin(), "{ tenants(last: 101) { nodes { id } } }").await;
    assert_eq!(refused.error_code(), Some("BAD_REQUEST"), "{}", refused.body);
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_suggest_nothing_of_the_schema() {
    let app = TestApp::start().await;
    let client = app.tenant("alpha").await.client;
    for (document, variables, hidden) in [
        ("{ viewr { scopes } }", json!({}), "viewer"),
        ("{ agnets { nodes { id } } }", json!({}), "agents"),
        ("{ viewer { scope } }", json!({}), "scopes"),
        ("{ tenant { emial } }", json!({}), "email"),
        ("{ agents(frist: 1) { nodes { id } } }", json!({}), "\"first\""),
        ("{ viewer { ...F } } fragment F on Viewr { scopes }", json!({}), "\"Viewer\""),
        ("query ($x: Lnog) { viewer { scopes } }", json!({}), "\"Long\""),
        ("mutation { createAgent(input: {nmae: \"x\"}) { errors { code } } }", json!({}), "Did you mean"),
        ("{ runs(filter: {status: [SUCEEDED]}) { nodes { id } } }", json!({}), "SUCCEEDED"),
        (
            "query ($f: RunFilter) { runs(filter: $f) { nodes { id } } }",
            json!({"f": {"status": ["SUCEEDED"]}}),
            "SUCCEEDED",
        ),
        ("{ viewer @inclde(if: true) { scopes } }", json!({}), "\"include\""),
    ] {
        let refused = client.query(document, variables).await;
        assert!(!refused.errors().is_empty(), "{document}");
        for error in refused.errors() {
            let message = text(error, "/message");
            assert!(!message.contains("Did you mean") && !message.contains(hidden), "{document}: {message}");
        }
    }
    // Nobody sees the schema without a key.
    let introspection = app.anonymous().query("{ __schema { types { name } } }", json!({})).await;
    assert_eq!((introspection.status.as_u16(), introspection.error_code()), (401, Some("UNAUTHENTICATED")));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_foreign_page_could_send_is_refused() {
    let app = TestApp::start().await;
    let tenant = app.tenant("alpha").await;
    let before = row_counts(&app).await;
    let mutation = "mutation { createApiKey(input: {name: \"forged\"}) { secret } }";
    let body = json!({"query": mutation}).to_string();
    let form =
        "query=mutation%20%7B%20createApiKey(input%3A%20%7Bname%3A%20%22forged%22%7D)%20%7B%20secret%20%7D%20%7D";
    let multipart = format!("--x\r\nContent-Disposition: form-data; name=\"operations\"\r\n\r\n{body}\r\n--x--\r\n");
    for (content_type, body) in [
        (Some("text/plain"), body.clone()),
        (Some("text/plain; charset=utf-8"), body.clone()),
        (Some("application/x-www-form-urlencoded"), form.to_owned()),
        (Some("multipart/form-data; boundary=x"), multipart),
        (Some("application/graphql"), mutation.to_owned()),
        (Some("application/json; charset=utf-16"), body.clone()),
        (None, body.clone()),
    ] {
        let request = tenant.client.request(reqwest::Method::POST, "/graphql").body(body);
        let request = match content_type {
            Some(content_type) => request.header("content-type", content_type),
            None => request,
        };
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 415, "{content_type:?}");
        let answer: Value = serde_json::from_str(&response.text().await.unwrap()).unwrap();
        assert_eq!(answer["errors"][0]["extensions"]["code"], "UNSUPPORTED_MEDIA_TYPE", "{content_type:?}");
    }
    for method in [reqwest::Method::GET, reqwest::Method::PUT, reqwest::Method::DELETE, reqwest::Method::HEAD] {
        for query in [mutation, "{ viewer { scopes } }"] {
            let request = tenant.client.request(method.clone(), "/graphql").query(&[("query", query)]);
            let response = request.header("content-type", "application/json").send().await.unwrap();
            assert_eq!(response.status(), 405, "{method} {query}");
            assert_eq!(response.headers()["allow"], "POST", "{method} {query}");
        }
    }
    assert_eq!(row_counts(&app).await, before);
}
