//! A provider against a server that answers each connection with given bytes.

use cloister_runtime::item::{InputItem, RunErrorCode};
use cloister_runtime::model::{Finish, Part};
use futures_util::StreamExt;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use super::*;
use crate::models::provider::{AnswerEvent, Completion, Cut};

const KEY: &str = "sk-test-0123456789abcdef";
const SSE: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n";

/// A server of one connection; its handle gives the request it got.
struct Server {
    url: Url,
    request: JoinHandle<String>,
}

/// What the server does after it has sent its bytes.
#[derive(Clone, Copy, PartialEq)]
enum Then {
    Close,
    Stay,
}

async fn serve(response: impl Into<Vec<u8>>, then: Then) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = Url::parse(&format!("http://{}/v1/", listener.local_addr().unwrap())).unwrap();
    let response = response.into();
    let request = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let request = read_request(&mut stream).await;
        stream.write_all(&response).await.unwrap();
        if then == Then::Stay {
            let mut rest = Vec::new();
            let _ = stream.read_to_end(&mut rest).await;
        }
        request
    });
    Server { url, request }
}

async fn read_request(stream: &mut TcpStream) -> String {
    let mut request = Vec::new();
    loop {
        let mut buffer = [0; 4096];
        let read = stream.read(&mut buffer).await.unwrap();
        request.extend_from_slice(&buffer[..read]);
        let text = String::from_utf8_lossy(&request);
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let length =
            head.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok());
        if read == 0 || body.len() >= length.unwrap_or(0) {
            return text.into_owned();
        }
    }
}

fn provider(base_url: Url) -> HttpProvider {
    HttpProvider::new(config(base_url)).unwrap()
}

fn config(base_url: Url) -> HttpProviderConfig {
    HttpProviderConfig {
        name: "acme".to_owned(),
        base_url,
        api_key: Some(KEY.into()),
        connect_timeout: Duration::from_secs(5),
        first_byte_timeout: Duration::from_secs(5),
        idle_timeout: Duration::from_secs(5),
        max_response_bytes: 64 * 1024,
        replay_reasoning: None,
    }
}

fn request() -> ModelRequest {
    ModelRequest {
        model: "m".to_owned(),
        instructions: String::new(),
        input: vec![InputItem::User { text: "hi".to_owned() }],
        tools: Vec::new(),
        output: None,
        temperature: None,
        top_p: None,
        max_output_tokens: None,
        tool_choice: None,
        parallel_tool_calls: None,
        reasoning_effort: None,
    }
}

async fn ask(provider: &HttpProvider) -> (Vec<AnswerEvent>, Option<Cut>) {
    let answer = provider.send(ProviderApi::Chat, "upstream", &request()).await.unwrap();
    let mut events = Vec::new();
    let mut cut = None;
    for event in answer.events.collect::<Vec<_>>().await {
        match event {
            Ok(event) => events.push(event),
            Err(error) => cut = Some(error),
        }
    }
    (events, cut)
}

/// What becomes of a stream of these events.
async fn answer_to(events: &str, then: Then) -> (Vec<AnswerEvent>, Option<Cut>) {
    let server = serve(format!("{SSE}\r\n{events}"), then).await;
    ask(&provider(server.url)).await
}

async fn refusal(response: &str) -> SendError {
    let server = serve(response, Then::Close).await;
    provider(server.url).send(ProviderApi::Chat, "upstream", &request()).await.err().unwrap()
}

fn text(text: &str) -> AnswerEvent {
    AnswerEvent::Text { index: 1, text: text.to_owned() }
}

fn message(text: &str) -> Vec<Part> {
    vec![Part::Message { index: 1, text: text.to_owned(), raw: None }]
}

fn completion(events: &[AnswerEvent]) -> Completion {
    match events.last() {
        Some(AnswerEvent::Complete(completion)) => completion.clone(),
        other => panic!("not complete: {other:?}"),
    }
}

const HELLO: &str = "data: {\"choices\":[{\"delta\":{\"content\":\"hel\"}}]}\n\n\
    : keepalive\n\n\
    data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"lo\"},\"finish_reason\":null}],\"usage\":null}\n\n";
const STOP: &str = "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n";
const USAGE: &str = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":2}}\n\n";
const DONE: &str = "data: [DONE]\n\n";

#[tokio::test]
async fn an_answer_streams_and_completes() {
    let server = serve(format!("{SSE}\r\n{HELLO}{STOP}{USAGE}{DONE}"), Then::Stay).await;
    let (events, cut) = ask(&provider(server.url)).await;
    assert_eq!(cut, None);
    assert_eq!(events[..2], [text("hel"), text("lo")]);
    let completion = completion(&events);
    assert_eq!(completion.parts, message("hello"));
    assert_eq!(completion.finish, Finish::Stop);
    let usage = completion.usage.unwrap();
    assert_eq!((usage.input_tokens, usage.output_tokens, usage.estimated), (7, 2, false));

    let request = server.request.await.unwrap();
    let (head, body) = request.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("POST /v1/chat/completions HTTP/1.1\r\n"), "{head}");
    let head = head.to_ascii_lowercase();
    assert!(head.contains(&format!("\r\nauthorization: bearer {KEY}")), "{head}");
    assert!(head.contains("\r\nuser-agent: cloister/"), "{head}");
    let body: Value = serde_json::from_str(body).unwrap();
    assert_eq!(body, chat::body("upstream", &self::request(), None).unwrap());
}

#[tokio::test]
async fn a_response_streams_and_completes() {
    let item = r#"{"id":"msg_1","type":"message","role":"assistant","content":[{"type":"output_text","text":"Hi"}]}"#;
    let events = format!(
        "event: response.output_text.delta\ndata: {{\"type\":\"response.output_text.delta\",\"output_index\":0,\"delta\":\"Hi\"}}\n\n\
         data: {{\"type\":\"response.completed\",\"response\":{{\"output\":[{item}]}}}}\n\n"
    );
    let server = serve(format!("{SSE}\r\n{events}"), Then::Close).await;
    let answer = provider(server.url).send(ProviderApi::Responses, "upstream", &request()).await.unwrap();
    let events: Vec<_> = answer.events.map(Result::unwrap).collect().await;
    let raw = serde_json::from_str::<Value>(item).ok();
    let parts = vec![Part::Message { index: 0, text: "Hi".to_owned(), raw }];
    let completion = Completion { parts, finish: Finish::Stop, usage: None };
    let text = AnswerEvent::Text { index: 0, text: "Hi".to_owned() };
    assert_eq!(events, [text, AnswerEvent::Complete(completion)]);
    let request = server.request.await.unwrap();
    let (head, body) = request.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("POST /v1/responses HTTP/1.1\r\n"), "{head}");
    let body: Value = serde_json::from_str(body).unwrap();
    assert_eq!(body, responses::body("upstream", &self::request()));
}

#[tokio::test]
async fn the_end_of_the_stream_completes_what_was_finished() {
    let (events, cut) = answer_to(&format!("{HELLO}{STOP}"), Then::Close).await;
    assert_eq!((cut, completion(&events).usage), (None, None));
}

#[tokio::test]
async fn an_end_before_a_finish_reason_is_a_cut() {
    for end in [HELLO.to_owned(), format!("{HELLO}{USAGE}{DONE}")] {
        let (events, cut) = answer_to(&end, Then::Close).await;
        let cut = cut.unwrap();
        assert_eq!(events, [text("hel"), text("lo")]);
        assert_eq!(cut.partial, message("hello"));
        assert_eq!(cut.usage.is_some(), end.contains("usage\":{"));
    }
    let (_, cut) = answer_to(&format!("{USAGE}{DONE}"), Then::Close).await;
    assert_eq!(cut.unwrap().partial, []);
}

#[tokio::test]
async fn an_answer_without_choices_is_the_models_failure() {
    let usage = r#"{"prompt_tokens":3,"completion_tokens":0}"#;
    let events = format!("data: {{\"choices\":[],\"usage\":{usage}}}\n\ndata: [DONE]\n\n");
    let (events, cut) = answer_to(&events, Then::Close).await;
    let cut = cut.unwrap();
    assert_eq!((events, cut.code), (Vec::new(), RunErrorCode::ModelBehavior));
    assert_eq!(cut.usage.unwrap().input_tokens, 3);
}

#[tokio::test]
async fn a_broken_connection_is_a_cut() {
    let response = format!("{SSE}content-length: 5000\r\n\r\n{HELLO}");
    let server = serve(response, Then::Close).await;
    let (_, cut) = ask(&provider(server.url)).await;
    let cut = cut.unwrap();
    assert!(cut.reason.contains("connection"), "{}", cut.reason);
    assert_eq!(cut.partial, message("hello"));
}

#[tokio::test]
async fn an_error_in_the_stream_is_a_cut() {
    let error = format!("data: {{\"error\":{{\"message\":\"overloaded {KEY}\"}}}}\n\n");
    let (_, cut) = answer_to(&format!("{HELLO}{error}{STOP}{DONE}"), Then::Close).await;
    let cut = cut.unwrap();
    assert!(cut.reason.ends_with("overloaded [redacted]"), "{}", cut.reason);
    assert_eq!(cut.partial, message("hello"));
}

#[tokio::test]
async fn what_cannot_be_parsed_is_a_cut() {
    for garbage in ["data: {\"choices\": [\n\n", "data: {\"x\": \"\\ud800\"}\n\n", "data: 1e999\n\n"] {
        let (_, cut) = answer_to(&format!("{HELLO}{garbage}{STOP}{DONE}"), Then::Close).await;
        assert_eq!(cut.unwrap().reason, Cut::broken("the provider sent an event that is no JSON", Vec::new()).reason);
    }
    let (_, cut) = answer_to("{\"choices\": []}", Then::Close).await;
    assert_eq!(
        cut.unwrap().reason,
        Cut::broken("the provider ended its answer before it was complete", Vec::new()).reason
    );
}

#[tokio::test]
async fn events_may_span_lines_and_be_any_json() {
    let events =
        "data: {\"choices\":\ndata: [{\"delta\":{\"content\":\"x\"},\"finish_reason\":\"length\"}]}\n\ndata: 5\n\n";
    let (events, cut) = answer_to(&format!("event: keepalive\ndata: zzz\n\n{events}{DONE}"), Then::Close).await;
    assert_eq!(cut, None);
    assert_eq!(completion(&events).finish, Finish::Length);
}

#[tokio::test]
async fn bytes_and_silence_are_bounded() {
    let long = format!("data: {{\"choices\":[{{\"delta\":{{\"content\":\"{}\"}}}}]}}\n\n", "x".repeat(1000));
    let (events, cut) = answer_to(&long.repeat(100), Then::Stay).await;
    assert_eq!(cut.unwrap().reason, Cut::broken("the answer is larger than 65536 bytes", Vec::new()).reason);
    assert!(events.len() < 66);

    let server = serve(format!("{SSE}\r\n{HELLO}"), Then::Stay).await;
    let silent = HttpProviderConfig { idle_timeout: Duration::from_millis(50), ..config(server.url) };
    let (_, cut) = ask(&HttpProvider::new(silent).unwrap()).await;
    assert_eq!(cut.unwrap().reason, Cut::broken("the provider sent nothing for 0.05 s", Vec::new()).reason);
}

#[tokio::test]
async fn dropping_the_answer_hangs_up() {
    let server = serve(format!("{SSE}\r\n{HELLO}"), Then::Stay).await;
    let mut answer = provider(server.url).send(ProviderApi::Chat, "upstream", &request()).await.unwrap();
    answer.events.next().await.unwrap().unwrap();
    drop(answer);
    // The server's task ends when the connection does.
    server.request.await.unwrap();
}

#[tokio::test]
async fn statuses_worth_a_retry_say_when() {
    let error = refusal("HTTP/1.1 429 Too Many Requests\r\nretry-after: 3\r\ncontent-length: 0\r\n\r\n").await;
    let message = "acme answered 429 Too Many Requests".to_owned();
    assert_eq!(error, SendError::Retryable { message, retry_after: Some(Duration::from_secs(3)) });
    for status in ["408 Request Timeout", "409 Conflict", "500 Internal Server Error", "529 Overloaded"] {
        let error = refusal(&format!("HTTP/1.1 {status}\r\ncontent-length: 6\r\n\r\n<html>")).await;
        assert!(matches!(error, SendError::Retryable { retry_after: None, .. }), "{error:?}");
    }
}

#[tokio::test]
async fn other_statuses_are_refusals_with_the_providers_reason() {
    let body = format!("{{\"error\":{{\"message\":\"no model {KEY}\",\"type\":\"x\"}}}}");
    let error = refusal(&format!("HTTP/1.1 404 Not Found\r\ncontent-length: {}\r\n\r\n{body}", body.len())).await;
    let message = "acme answered 404: no model [redacted]".to_owned();
    assert_eq!(error, SendError::Rejected { status: 404, message });

    let error = refusal("HTTP/1.1 302 Found\r\nlocation: /elsewhere\r\ncontent-length: 0\r\n\r\n").await;
    assert_eq!(error, SendError::Rejected { status: 302, message: "acme answered 302 Found".to_owned() });

    let error = refusal("HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n").await;
    let SendError::Rejected { status: 401, message } = error else { panic!("{error:?}") };
    assert!(message.contains("API key"), "{message}");
}

#[tokio::test]
async fn error_bodies_are_read_within_bounds() {
    let huge = format!("HTTP/1.1 400 Bad Request\r\n\r\n\"{}\"", "x".repeat(1024 * 1024));
    let server = serve(huge.into_bytes(), Then::Stay).await;
    let error = provider(server.url).send(ProviderApi::Chat, "upstream", &request()).await.err().unwrap();
    assert_eq!(error, SendError::Rejected { status: 400, message: "acme answered 400 Bad Request".to_owned() });
}

#[tokio::test]
async fn without_a_connection_nothing_was_charged() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = Url::parse(&format!("http://{}", listener.local_addr().unwrap())).unwrap();
    drop(listener);
    let error = provider(url).send(ProviderApi::Chat, "upstream", &request()).await.err().unwrap();
    assert!(matches!(error, SendError::Retryable { retry_after: None, .. }), "{error:?}");
}

#[tokio::test]
async fn a_request_without_a_status_may_have_been_charged() {
    let error = refusal("").await;
    assert!(matches!(error, SendError::Unknown { .. }), "{error:?}");

    let server = serve("", Then::Stay).await;
    let slow = HttpProviderConfig { first_byte_timeout: Duration::from_millis(50), ..config(server.url) };
    let error = HttpProvider::new(slow).unwrap().send(ProviderApi::Chat, "upstream", &request()).await.err().unwrap();
    assert_eq!(error, SendError::Unknown { message: "acme did not answer within 0.05 s".to_owned() });
}

#[test]
fn wrong_configurations_are_refused() {
    for url in ["ftp://example.com", "http://user:secret@example.com/v1", "data:text/plain,x"] {
        let error = HttpProvider::new(config(Url::parse(url).unwrap())).err().unwrap();
        assert!(matches!(error, HttpProviderError::BaseUrl), "{error}");
    }
    let url = Url::parse("https://example.com").unwrap();
    let key = HttpProviderConfig { api_key: Some("line\nbreak".into()), ..config(url) };
    assert!(matches!(HttpProvider::new(key).err().unwrap(), HttpProviderError::ApiKey(_)));
}

#[test]
fn paths_join_and_queries_stay() {
    let url = |base: &str| Endpoint::new(&config(Url::parse(base).unwrap())).unwrap().url("/chat/completions");
    assert_eq!(url("https://example.com/v1"), "https://example.com/v1/chat/completions");
    assert_eq!(url("https://example.com/v1/?api-version=2"), "https://example.com/v1/chat/completions?api-version=2");
    assert_eq!(url("https://example.com"), "https://example.com/chat/completions");
}
