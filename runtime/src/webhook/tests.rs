use reqwest::dns::Resolve;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::outbound::CheckedResolver;
use super::*;

const SECRET: &str = "C2FVsBQIhrscChlQIMV+b5sSYspob7oD";

fn allowing(hosts: &[&str]) -> AddressPolicy {
    AddressPolicy { allowed_hosts: hosts.iter().map(|&host| host.to_owned()).collect(), ..Default::default() }
}

fn client(policy: AddressPolicy) -> WebhookClient {
    // Fails when another test was first, which is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    WebhookClient::new(policy).unwrap()
}

fn call<'a>(url: &'a str, arguments: &'a str, secrets: &'a [String]) -> WebhookCall<'a> {
    WebhookCall {
        url,
        token: Some("s3cret"),
        arguments,
        timeout: Duration::from_secs(5),
        run_id: Uuid::nil(),
        place: "2.1",
        secrets,
    }
}

/// Serves one connection with `answer` and gives the URL and what was received.
async fn endpoint(answer: Vec<u8>) -> (String, tokio::task::JoinHandle<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/hook", listener.local_addr().unwrap());
    let received = tokio::spawn(async move {
        let (mut socket, _) = listener.accept().await.unwrap();
        let mut received = Vec::new();
        while !received.ends_with(b"}") {
            let mut buffer = [0; 4096];
            let read = socket.read(&mut buffer).await.unwrap();
            received.extend_from_slice(&buffer[..read]);
        }
        // The client may hang up before it has all.
        let _ = socket.write_all(&answer).await;
        String::from_utf8(received).unwrap()
    });
    (url, received)
}

fn http_answer(status: &str, body: &[u8]) -> Vec<u8> {
    let mut answer =
        format!("HTTP/1.1 {status}\r\nlocation: /x\r\ncontent-length: {}\r\n\r\n", body.len()).into_bytes();
    answer.extend_from_slice(body);
    answer
}

fn header<'a>(request: &'a str, name: &str) -> Option<&'a str> {
    request.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
}

#[test]
fn urls_are_checked() {
    let policy = AddressPolicy::default();
    for url in
        ["https://example.com/hook?a=b", "http://example.com:8080", "https://8.8.8.8/", "https://local.example.com"]
    {
        assert!(check_url(url, &policy).is_ok(), "{url}");
    }
    for (url, reason) in [
        ("", "is not a URL"),
        ("example.com", "is not a URL"),
        ("https://", "is not a URL"),
        ("ftp://example.com", "the scheme ftp"),
        ("file:///etc/passwd", "the scheme file"),
        ("https://user@example.com", "user name"),
        ("https://:pass@example.com", "user name"),
        ("http://127.0.0.1/", "127.0.0.1"),
        ("http://2130706433/", "127.0.0.1"),
        ("http://0x7f.1/", "127.0.0.1"),
        ("http://0177.0.0.1/", "127.0.0.1"),
        ("http://127.1/", "127.0.0.1"),
        ("http://0/", "0.0.0.0"),
        ("http://169.254.169.254/latest/meta-data", "169.254.169.254"),
        ("http://１２７.0.0.1/", "127.0.0.1"),
        ("http://[::1]/", "::1"),
        ("http://[::ffff:10.0.0.1]/", "::ffff:10.0.0.1"),
        ("http://[fd00:ec2::254]/", "fd00:ec2::254"),
        ("http://localhost:8080/", "a name inside"),
        ("http://LOCALHOST./", "a name inside"),
        ("http://a.localhost/", "a name inside"),
        ("http://metadata.google.internal/", "a name inside"),
        ("http://printer.local./", "a name inside"),
    ] {
        let message = check_url(url, &policy).unwrap_err().to_string();
        assert!(message.contains(reason), "{url}: {message}");
    }
}

#[test]
fn operators_may_allow_hosts() {
    let policy = allowing(&["10.0.0.5:9000", "Tools.Internal", "[::1]:80"]);
    for url in ["http://10.0.0.5:9000/", "http://tools.internal:1/", "https://TOOLS.internal./", "http://[::1]/"] {
        assert!(check_url(url, &policy).is_ok(), "{url}");
    }
    for url in ["http://10.0.0.5/", "http://10.0.0.5:9001/", "http://x.tools.internal/", "http://[::1]:81/"] {
        assert!(check_url(url, &policy).is_err(), "{url}");
    }
    assert_eq!(check_url("ftp://tools.internal/", &policy), Err(UrlError::Scheme("ftp".to_owned())));
}

#[tokio::test]
async fn a_call_is_signed_and_carries_its_key() {
    let (url, received) = endpoint(http_answer("200 OK", b"21 degrees \xff")).await;
    let secrets = [SECRET.to_owned(), "AAAA".to_owned()];
    let client = client(allowing(&["127.0.0.1"]));
    let output = client.call(call(&url, r#"{"city": "Rome"}"#, &secrets)).await.unwrap();
    assert_eq!(output, "21 degrees \u{fffd}");

    let request = received.await.unwrap();
    assert!(request.starts_with("POST /hook HTTP/1.1\r\n"));
    assert!(request.ends_with("\r\n\r\n{\"city\": \"Rome\"}"));
    assert_eq!(header(&request, "content-type"), Some("application/json"));
    assert_eq!(header(&request, "authorization"), Some("Bearer s3cret"));
    assert_eq!(header(&request, "idempotency-key"), Some("00000000-0000-0000-0000-000000000000:2.1"));
    assert_eq!(header(&request, HEADER_WEBHOOK_ID), Some("msg_00000000000000000000000000000000_2_1"));
    assert_eq!(header(&request, HEADER_WEBHOOK_SIGNATURE).unwrap().split(' ').count(), 2);

    let mut headers = http::HeaderMap::new();
    for name in [HEADER_WEBHOOK_ID, HEADER_WEBHOOK_TIMESTAMP, HEADER_WEBHOOK_SIGNATURE] {
        headers.insert(name, header(&request, name).unwrap().parse().unwrap());
    }
    for secret in &secrets {
        Webhook::new(secret).unwrap().verify(br#"{"city": "Rome"}"#, &headers).unwrap();
    }
}

#[tokio::test]
async fn empty_arguments_are_sent_as_an_empty_object() {
    let (url, received) = endpoint(http_answer("204 No Content", b"")).await;
    assert_eq!(client(allowing(&["127.0.0.1"])).call(call(&url, "", &[])).await.unwrap(), "");
    let request = received.await.unwrap();
    assert!(request.ends_with("\r\n\r\n{}"));
    assert_eq!(header(&request, HEADER_WEBHOOK_SIGNATURE), None);
}

#[tokio::test]
async fn only_a_whole_2xx_answer_is_an_output() {
    let client = client(allowing(&["127.0.0.1"]));
    let (url, _) = endpoint(http_answer("500 Oops", b"secret")).await;
    assert!(matches!(client.call(call(&url, "{}", &[])).await, Err(WebhookError::Status(500))));
    let (url, _) = endpoint(http_answer("302 Found", b"")).await;
    assert!(matches!(client.call(call(&url, "{}", &[])).await, Err(WebhookError::Status(302))));
    let (url, _) = endpoint(http_answer("200 OK", &vec![b'a'; MAX_ANSWER_BYTES])).await;
    assert_eq!(client.call(call(&url, "{}", &[])).await.unwrap().len(), MAX_ANSWER_BYTES);
    let (url, _) = endpoint(http_answer("200 OK", &vec![b'a'; MAX_ANSWER_BYTES + 1])).await;
    assert!(matches!(client.call(call(&url, "{}", &[])).await, Err(WebhookError::TooLong)));
    let (url, _) = endpoint(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf".to_vec()).await;
    let error = client.call(call(&url, "{}", &[])).await.unwrap_err();
    assert!(matches!(error, WebhookError::Unreachable(_)) && !error.to_string().contains("127.0.0.1"));
}

#[tokio::test]
async fn a_call_has_its_time() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let slow = WebhookCall { timeout: Duration::from_millis(50), ..call(&url, "{}", &[]) };
    assert!(matches!(client(allowing(&["127.0.0.1"])).call(slow).await, Err(WebhookError::TimedOut)));
}

#[tokio::test]
async fn inside_addresses_are_not_called() {
    let client = client(AddressPolicy::default());
    assert!(matches!(client.call(call("http://127.0.0.1:1/", "{}", &[])).await, Err(WebhookError::Url(_))));
    // The resolver's own check, for names whose address is inside.
    let resolved = CheckedResolver { nets: Vec::new() }.resolve("localhost".parse().unwrap()).await;
    assert!(resolved.is_err_and(|error| error.downcast_ref::<UrlError>().is_some()));
}

#[tokio::test]
async fn an_allowed_network_is_reached_on_its_port_and_nothing_else_inside() {
    let (url, received) = endpoint(http_answer("200 OK", b"inside")).await;
    let port = Url::parse(&url).unwrap().port().unwrap();
    let net = |net: &str| AllowedNet::try_from(net.to_owned()).unwrap();
    let allowed = vec![net(&format!("127.0.0.0/30:{port}")), net(&format!("::1/128:{port}")), net("10.1.0.0/16:8443")];
    let client = client(AddressPolicy { allowed_nets: allowed.clone(), ..AddressPolicy::default() });
    // A name that leads there, whatever it is called.
    let named = url.replace("127.0.0.1", "localhost");
    let answer = client.call(call(&named, "{}", &[])).await;
    assert_eq!(answer.unwrap(), "inside");
    received.await.unwrap();
    let policy = AddressPolicy { allowed_nets: allowed, ..AddressPolicy::default() };
    for (url, is_taken) in [
        ("https://10.1.2.3:8443/", true),
        ("https://10.1.2.3/", false),
        ("https://10.2.2.3:8443/", false),
        ("https://tools.internal:8443/", true),
        ("https://tools.internal/", false),
        ("https://8.8.8.8/", true),
    ] {
        assert_eq!(check_url(url, &policy).is_ok(), is_taken, "{url}");
    }
    // A name is judged by where it leads: not into the network of another port.
    let elsewhere = client.call(call("http://localhost:8443/", "{}", &[])).await;
    assert!(matches!(elsewhere, Err(WebhookError::Unreachable(_))), "{elsewhere:?}");
    for wrong in ["10.1.0.0/16", "10.1.0.0:8443", "tools.internal:443", "10.1.0.0/16:https"] {
        assert!(AllowedNet::try_from(wrong.to_owned()).is_err(), "{wrong}");
    }
}
