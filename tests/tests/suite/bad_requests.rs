//! Bad requests: arguments of queries, input of the wrong type, bodies that are no GraphQL request; each
//! with a clear error and nothing stored.

use cloister_tests::app::TestAppBuilder;
use serde_json::{Value, json};

use crate::both::on_both;
use crate::calls::{finished_run, missing, new_agent, stored, text};
use crate::generated::{Api, Kind, Values};

on_both!(
    queries_check_their_arguments,
    what_is_missing_or_of_the_wrong_type_is_named,
    a_request_that_is_no_request_is_told_so,
);

async fn queries_check_their_arguments(builder: TestAppBuilder) {
    let app = builder.start().await;
    let tenant = app.tenant("alpha").await;
    let agent = new_agent(&tenant.client, json!({})).await;
    // An id of another kind, or of none, finds nothing.
    for id in [
        "",
        "nonsense",
        "\u{0}",
        "agt_",
        "agt_zzzzzzzzzzzzzzzzzzzzzzzzzz",
        &agent.to_uppercase(),
        &missing("run"),
        &missing("xyz"),
    ] {
        let all = "query ($id: ID!) { node(id: $id) { id } agent(id: $id) { id } run(id: $id) { id } conversation(id: $id) { id } }";
        let found = tenant.client.data(all, json!({"id": id})).await;
        assert_eq!(found, json!({"node": null, "agent": null, "run": null, "conversation": null}), "{id:?}");
        let filter = "query ($id: ID!) { a: runs(filter: {agentId: $id}) { nodes { id } } b: runs(filter: {conversationId: $id}) { nodes { id } } }";
        let found = tenant.client.data(filter, json!({"id": id})).await;
        assert_eq!(found, json!({"a": {"nodes": []}, "b": {"nodes": []}}), "{id:?}");
        let subscription = "subscription ($id: ID!) { runEvents(runId: $id) { __typename } }";
        let mut events = tenant.client.subscribe_sse(subscription, json!({"id": id})).await;
        let refused = events.next_result().await.expect("a refusal");
        assert_eq!(refused["errors"][0]["extensions"]["code"], "NOT_FOUND", "{id:?}");
        assert!(text(&refused, "/errors/0/message").contains("runId"), "{refused}");
    }
    for month in
        ["2026-13", "2026-00", "2026-1", "26-01", "2026", "", "nonsense", "2026-01-01", "+026-01", "2026-0\u{0}"]
    {
        for document in [
            "query ($m: Month) { usage(period: $m) { period } }",
            "query ($m: Month) { invoice(period: $m) { period } }",
            "query ($m: Month) { tenant { usage(period: $m) { period } invoice(period: $m) { period } } }",
        ] {
            let refused = tenant.client.query(document, json!({"m": month})).await;
            assert!(!refused.errors().is_empty(), "{month:?}: {}", refused.body);
            assert_ne!(refused.error_code(), Some("INTERNAL"), "{month:?}: {}", refused.body);
            assert!(text(&refused.errors()[0], "/message").contains("2026-11"), "{month:?}: {}", refused.body);
        }
    }
    for month in ["0000-01", "0001-01", "1970-01", "9999-12"] {
        let empty =
            "query ($m: Month) { usage(period: $m) { period totalTokens } invoice(period: $m) { period tokensUsed } }";
        let empty = tenant.client.data(empty, json!({"m": month})).await;
        assert_eq!(empty["usage"], json!({"period": month, "totalTokens": 0}));
        assert_eq!(empty["invoice"], json!({"period": month, "tokensUsed": 0}));
    }
    for (filter, valid) in [
        (json!({"createdAfter": "2001-01-01T00:00:00Z", "status": ["QUEUED", "FAILED"]}), true),
        (json!({"status": []}), true),
        (json!({"createdBefore": "9999-12-31T23:59:59Z"}), true),
        (json!({"createdAfter": "0000-01-01T00:00:00Z"}), true),
        (json!({"createdAfter": "yesterday"}), false),
        (json!({"createdAfter": 5}), false),
        (json!({"status": ["DONE"]}), false),
        (json!({"status": "QUEUED\u{0}"}), false),
        (json!({"unknown": 1}), false),
    ] {
        let document = "query ($f: RunFilter) { runs(filter: $f) { nodes { id } } }";
        let answer = tenant.client.query(document, json!({"f": filter})).await;
        assert_eq!(answer.errors().is_empty(), valid, "{filter}: {}", answer.body);
        assert_ne!(answer.error_code(), Some("INTERNAL"), "{filter}: {}", answer.body);
    }
    let run = finished_run(&tenant.client, json!({"agentId": agent, "input": "Hi"})).await;
    let negative = "subscription ($id: ID!) { runEvents(runId: $id, after: -1) { __typename } }";
    let mut events = tenant.client.subscribe_sse(negative, json!({"id": run})).await;
    let refused = events.next_result().await.expect("a refusal");
    assert_eq!(refused["errors"][0]["extensions"]["code"], "BAD_REQUEST");
    assert!(text(&refused, "/errors/0/message").contains("after"), "{refused}");
}

/// Ids that nobody has.
struct Nobody;

impl Values for Nobody {
    fn id(&self, _: &[String]) -> String {
        missing("agt")
    }
}

async fn what_is_missing_or_of_the_wrong_type_is_named(builder: TestAppBuilder) {
    let app = builder.start().await;
    let tenant = app.tenant("alpha").await;
    let api = Api::read(&tenant.client).await;
    let before = stored(&app, &tenant).await;
    let mut tried = 0;
    for root in api.roots().into_iter().filter(|root| root.kind == Kind::Mutation) {
        let (document, variables) = api.call(&root, None, &Nobody, 0);
        for slot in api.required_slots(&root) {
            let pointer = format!("/{}", slot.join("/"));
            let name = slot.last().expect("a slot");
            let mut tries =
                vec![("missing", None), ("null", Some(Value::Null)), ("an object", Some(json!({"no": "such"})))];
            tries.push(("a list in a list", Some(json!([[{}]]))));
            for (what, value) in tries {
                let mut variables = variables.clone();
                match value {
                    Some(value) => *variables.pointer_mut(&pointer).expect("a value") = value,
                    None => {
                        let parent = pointer.rsplit_once('/').expect("a pointer").0;
                        variables.pointer_mut(parent).and_then(Value::as_object_mut).expect("an object").remove(name);
                    }
                }
                // The admin may call the admin's; whether input is read before rights is not what this asks.
                for client in [&tenant.client, &app.admin()] {
                    let answer = client.query(&document, variables.clone()).await;
                    let code = answer
                        .error_code()
                        .unwrap_or_else(|| panic!("{} took {what} {pointer}: {}", root.path(), answer.body));
                    assert!(
                        matches!(code, "BAD_USER_INPUT" | "GRAPHQL_VALIDATION_FAILED"),
                        "{} {what} {pointer}: {}",
                        root.path(),
                        answer.body
                    );
                    let message = text(&answer.errors()[0], "/message");
                    assert!(message.contains(name.as_str()), "{} {what} {pointer}: {message}", root.path());
                    assert!(message.len() < 400, "{message}");
                    tried += 1;
                }
            }
        }
    }
    assert!(tried > 200, "only {tried} tries");
    assert_eq!(stored(&app, &tenant).await, before);
}

async fn a_request_that_is_no_request_is_told_so(builder: TestAppBuilder) {
    let app = builder.env("CLOISTER_LOG__FILTER", "info,cloister_api=trace").start().await;
    let tenant = app.tenant("alpha").await;
    let before = stored(&app, &tenant).await;
    let post = async |body: Vec<u8>| {
        let request =
            tenant.client.request(reqwest::Method::POST, "/graphql").header("content-type", "application/json");
        let response =
            request.header("accept", "application/graphql-response+json").body(body).send().await.expect("an answer");
        let status = response.status().as_u16();
        let content_type = response.headers()["content-type"].to_str().unwrap().to_owned();
        let body = response.text().await.unwrap();
        let body: Value = serde_json::from_str(&body).unwrap_or_else(|_| panic!("no JSON: {body}"));
        assert!(content_type.starts_with("application/graphql-response+json"), "{content_type}");
        assert!(body.get("data").is_none(), "{body}");
        assert_eq!(body["errors"].as_array().map(Vec::len), Some(1), "{body}");
        assert!(text(&body, "/errors/0/extensions/traceId").len() == 32, "{body}");
        (status, text(&body, "/errors/0/extensions/code"), text(&body, "/errors/0/message"))
    };
    let mutation = "mutation { createApiKey(input: {name: \"batched\"}) { secret } }";
    let batch = json!([{"query": mutation}, {"query": mutation}]);
    let marked = "hidden-text-5f1d";
    for (body, code, said) in [
        ("".to_owned(), "BAD_REQUEST", "not valid JSON"),
        ("{".to_owned(), "BAD_REQUEST", "not valid JSON"),
        (format!("{{\"query\": \"{marked}"), "BAD_REQUEST", "not valid JSON"),
        ("{\"query\": \"{ viewer { scopes } }\"} trailing".to_owned(), "BAD_REQUEST", "not valid JSON"),
        ("[".repeat(100_000), "BAD_REQUEST", "not valid JSON"),
        ("{\"query\": \"{ a }\", \"variables\": {\"x\": 1e999}}".to_owned(), "BAD_REQUEST", "not valid JSON"),
        ("null".to_owned(), "BAD_REQUEST", "JSON object"),
        ("\"{ viewer { scopes } }\"".to_owned(), "BAD_REQUEST", "JSON object"),
        ("{}".to_owned(), "BAD_REQUEST", "query is missing"),
        (json!({"query": null}).to_string(), "BAD_REQUEST", "query is missing"),
        (json!({"query": 5}).to_string(), "BAD_REQUEST", "\"query\" must be a string"),
        (json!({"query": ""}).to_string(), "BAD_REQUEST", "query is empty"),
        (json!({"query": " # only a comment"}).to_string(), "BAD_REQUEST", "query is empty"),
        (json!({"query": "{ viewer { scopes } }", "variables": []}).to_string(), "BAD_REQUEST", "\"variables\""),
        (
            json!({"query": "{ viewer { scopes } }", "operationName": {}}).to_string(),
            "BAD_REQUEST",
            "\"operationName\"",
        ),
        (
            json!({"query": "{ viewer { scopes } }", "operationName": "X"}).to_string(),
            "OPERATION_RESOLUTION_FAILURE",
            "\"X\"",
        ),
        (
            json!({"query": "query A { viewer { scopes } } query B { viewer { scopes } }"}).to_string(),
            "OPERATION_RESOLUTION_FAILURE",
            "operationName",
        ),
        (json!({"query": "{ viewer { scopes }"}).to_string(), "GRAPHQL_PARSE_FAILED", "Syntax error"),
        (json!({"query": "{ viewer \u{0} }"}).to_string(), "GRAPHQL_PARSE_FAILED", "Syntax error"),
        (json!({"query": "type T { a: Int }"}).to_string(), "GRAPHQL_PARSE_FAILED", "Syntax error"),
        (json!({"query": "{ nonsense }"}).to_string(), "GRAPHQL_VALIDATION_FAILED", "nonsense"),
        (json!({"query": "subscription { usage { totalTokens } }"}).to_string(), "BAD_REQUEST", "text/event-stream"),
        (batch.to_string(), "BAD_REQUEST", "Batches are not supported"),
        ("[]".to_owned(), "BAD_REQUEST", "Batches are not supported"),
    ] {
        let shown: String = body.chars().take(80).collect();
        let (status, answered, message) = post(body.into_bytes()).await;
        assert_eq!((status, answered.as_str()), (400, code), "{shown}: {message}");
        assert!(message.contains(said), "{shown}: {message}");
    }
    let (status, code, _) = post(b"{\"query\": \"\xff\xfe\"}".to_vec()).await;
    assert_eq!((status, code.as_str()), (400, "BAD_REQUEST"));
    // 2 MiB, however it is said to come, and whatever is in it.
    for _ in 0..5 {
        let (status, code, message) =
            post(json!({"query": "x".repeat(2 * 1024 * 1024)}).to_string().into_bytes()).await;
        assert_eq!((status, code.as_str()), (413, "PAYLOAD_TOO_LARGE"));
        assert!(message.contains("1048576 bytes"), "{message}");
    }
    let chunks = futures_util::stream::repeat_with(|| Ok::<_, std::io::Error>(vec![b' '; 64 * 1024]));
    let chunks = futures_util::StreamExt::take(chunks, 32);
    let request = tenant.client.request(reqwest::Method::POST, "/graphql").header("content-type", "application/json");
    let response = request.body(reqwest::Body::wrap_stream(chunks)).send().await.expect("an answer");
    assert_eq!(response.status(), 413);
    // A literal that no double can hold is no number.
    let infinite = "mutation { createAgent(input: {name: \"a\", model: \"demo\", instructions: \"\", modelSettings: {temperature: 1e999}}) { errors { code field } } }";
    let infinite = tenant.client.query(infinite, json!({})).await;
    let refused =
        !infinite.errors().is_empty() || infinite.body["data"]["createAgent"]["errors"][0]["code"] == "INVALID";
    assert!(refused, "{}", infinite.body);
    assert_eq!(stored(&app, &tenant).await, before);
    assert!(!app.log().contains(marked), "a request's text is in the log");
}
