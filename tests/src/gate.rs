//! A gate before a cluster's API server: speaks plain HTTP, acts with one account's rights, and spoils the writes that it
//! is told to, so that a test decides at which of them something fails or its author dies.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio_util::task::AbortOnDropHandle;

use crate::client::http;
use crate::scope::Scope;

/// What becomes of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is answered with an error and does nothing.
    Refused,
    /// It does what it should, and its answer is lost.
    Lost,
    /// It stays on its way, and does nothing.
    Held,
    /// It does what it should, and its answer stays on its way.
    AnswerHeld,
}

/// A gate. It closes, and breaks its connections, when it is dropped.
pub struct Gate {
    address: SocketAddr,
    shared: Arc<Shared>,
    directory: TempDir,
    _serving: AbortOnDropHandle<()>,
}

struct Shared {
    server: String,
    token: String,
    client: reqwest::Client,
    watched: Mutex<Vec<Arc<Watched>>>,
}

/// The writes about one tenant, counted, and which of them is spoilt.
pub struct Watched {
    tenant: String,
    at: Option<(usize, Fault)>,
    seen: Mutex<Vec<String>>,
    struck: Notify,
}

impl Watched {
    /// The writes so far, each as its method and path.
    pub fn seen(&self) -> Vec<String> {
        self.seen.lock().unwrap().clone()
    }

    /// Waits until the fault has happened.
    pub async fn struck(&self) {
        self.struck.notified().await;
    }

    /// Counts a write if it is about the tenant; what is to become of it.
    fn count(&self, method: &Method, path: &str, body: &[u8]) -> Option<Fault> {
        let namespace = format!("tenant-{}", self.tenant);
        let names_it = |text: &str| text.split('/').any(|part| part == self.tenant || part == namespace);
        let makes_it = || path == "/api/v1/namespaces" && name_of(body).is_some_and(|name| name == namespace);
        if !names_it(path) && !makes_it() {
            return None;
        }
        let mut seen = self.seen.lock().unwrap();
        seen.push(format!("{method} {path}"));
        let (at, fault) = self.at?;
        (seen.len() == at + 1).then_some(fault)
    }
}

fn name_of(body: &[u8]) -> Option<String> {
    let body: Value = serde_json::from_slice(body).ok()?;
    body["metadata"]["name"].as_str().map(str::to_owned)
}

impl Gate {
    /// Opens a gate for the account of a kubeconfig that has a token.
    ///
    /// # Panics
    /// The kubeconfig is none of the harness's.
    pub async fn open(kubeconfig: &Path) -> Gate {
        let config = std::fs::read(kubeconfig).expect("a kubeconfig");
        let config: Value = serde_json::from_slice(&config).expect("a kubeconfig of the harness is JSON");
        let text = |pointer: &str| config.pointer(pointer).and_then(Value::as_str).expect("a text").to_owned();
        let ca = BASE64_STANDARD.decode(text("/clusters/0/cluster/certificate-authority-data")).expect("base64");
        let ca = reqwest::Certificate::from_pem(&ca).expect("a certificate");
        // The provider of TLS is set by the first client of all.
        drop(http());
        let shared = Arc::new(Shared {
            server: text("/clusters/0/cluster/server"),
            token: text("/users/0/user/token"),
            client: reqwest::Client::builder().tls_certs_only([ca]).no_proxy().build().expect("a client"),
            watched: Mutex::default(),
        });
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a free port");
        let address = listener.local_addr().expect("a bound address");
        let router = Router::new().fallback(pass).with_state(shared.clone());
        let serving = tokio::spawn(async move { axum::serve(listener, router).await.expect("the gate serves") });
        let directory = Scope::current().directory();
        Gate { address, shared, directory, _serving: AbortOnDropHandle::new(serving) }
    }

    /// A kubeconfig that goes through the gate.
    ///
    /// # Panics
    /// It can't be written.
    pub fn kubeconfig(&self) -> PathBuf {
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "gate",
            "clusters": [{"name": "gate", "cluster": {"server": self.url("")}}],
            "users": [{"name": "gate", "user": {}}],
            "contexts": [{"name": "gate", "context": {"cluster": "gate", "user": "gate"}}],
        });
        let path = self.directory.path().join("kubeconfig");
        std::fs::write(&path, config.to_string()).expect("a kubeconfig");
        path
    }

    /// The URL of a path of the API server.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// Counts the writes about a tenant from now on, and spoils one of them: the first is number 0.
    pub fn watch(&self, tenant: &str, at: Option<(usize, Fault)>) -> Arc<Watched> {
        let (tenant, seen, struck) = (tenant.to_owned(), Mutex::default(), Notify::new());
        let watched = Arc::new(Watched { tenant, at, seen, struck });
        let mut all = self.shared.watched.lock().unwrap();
        all.retain(|other| other.tenant != watched.tenant);
        all.push(watched.clone());
        watched
    }
}

async fn pass(State(gate): State<Arc<Shared>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let Ok(body) = axum::body::to_bytes(body, usize::MAX).await else {
        return StatusCode::BAD_REQUEST.into_response();
    };
    let is_write = [Method::POST, Method::PUT, Method::PATCH, Method::DELETE].contains(&parts.method);
    let path = parts.uri.path();
    let watched = gate.watched.lock().unwrap().clone();
    let struck = watched
        .iter()
        .filter(|_| is_write)
        .find_map(|watched| watched.count(&parts.method, path, &body).map(|fault| (watched, fault)));
    let Some((watched, fault)) = struck else { return gate.forward(parts, body).await };
    if matches!(fault, Fault::Lost | Fault::AnswerHeld) {
        gate.forward(parts, body).await;
    }
    watched.struck.notify_one();
    match fault {
        Fault::Refused => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
        Fault::Lost => StatusCode::BAD_GATEWAY.into_response(),
        Fault::Held | Fault::AnswerHeld => std::future::pending().await,
    }
}

impl Shared {
    async fn forward(&self, parts: axum::http::request::Parts, body: Bytes) -> Response {
        let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
        let mut headers = parts.headers;
        for own in [header::HOST, header::CONTENT_LENGTH, header::AUTHORIZATION, header::ACCEPT_ENCODING] {
            headers.remove(own);
        }
        let request = self.client.request(parts.method, format!("{}{path}", self.server)).headers(headers);
        match request.bearer_auth(&self.token).body(body).send().await {
            Ok(answer) => {
                let mut response = Response::new(Body::empty());
                *response.status_mut() = answer.status();
                if let Some(kind) = answer.headers().get(header::CONTENT_TYPE) {
                    response.headers_mut().insert(header::CONTENT_TYPE, kind.clone());
                }
                *response.body_mut() = Body::from_stream(answer.bytes_stream());
                response
            }
            Err(error) => (StatusCode::BAD_GATEWAY, error.to_string()).into_response(),
        }
    }
}
