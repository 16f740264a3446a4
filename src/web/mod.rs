//! The web server: metrics, health, readiness and the results as JSON.
//!
//! Input: HTTP/1.1 requests. Output: `/metrics`, `/healthz`, `/readyz`, `/api/results`, `/api/results/{uid}`, and what a
//! caller adds as a router (the place of the dashboard). It has one thread with its own single-threaded runtime and a
//! reading connection to the store; no stage of the pipeline waits for it.
//!
//! Invariants: bound to loopback unless a token is set. With a token every route but `/healthz` asks for it, compared in
//! constant time. Without one, requests whose Host is no loopback name are refused, so that a page elsewhere cannot
//! read results through a name that resolves to this machine. At most [`MAX_CONNECTIONS`] connections; one silent for
//! [`IDLE_TIMEOUT`] is closed.
//!
//! Deliberately absent: any way to change something, and UIDs or names of patients: documents carry keyed hashes.

mod listener;

use std::io::Read as _;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use axum::{Json, Router};
use hmac::{Hmac, KeyInit as _, Mac as _};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::Sha256;
use tokio::sync::oneshot;

use crate::store::{ListResults, MAX_LIST, ResultRecord, Store, StoreError, StoreHandle};
use crate::telemetry::events::{RequestAnswered, WebStarted};
use crate::telemetry::{MetricsHandle, StudyHash};

/// Most connections at once: a few scrapers and browsers with six each. 64 x about 20 KiB of buffers = 1.3 MiB.
pub const MAX_CONNECTIONS: usize = 64;

/// A connection on which nothing moves for so long is closed; longer than the scrape interval of most Prometheus set-ups.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(75);

/// Shortest token, bytes.
pub const MIN_TOKEN_BYTES: usize = 16;

/// Largest token file, bytes.
const MAX_TOKEN_FILE_BYTES: u64 = 4096;

/// Results in one answer unless asked otherwise.
const DEFAULT_LIST: u32 = 100;

/// The `[web]` table of the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WebConfig {
    /// Address and port; port 0 picks a free one.
    pub bind: String,
    /// File whose trimmed content is the bearer token.
    pub token_file: Option<PathBuf>,
}

impl Default for WebConfig {
    fn default() -> Self {
        Self { bind: "127.0.0.1:8470".into(), token_file: None }
    }
}

impl WebConfig {
    /// Every fault of the values. Reads no file and binds nothing.
    pub fn validate(&self) -> Vec<String> {
        match self.bind.parse::<SocketAddr>() {
            Err(_) => vec!["bind: expected ADDRESS:PORT, e.g. 127.0.0.1:8470".into()],
            Ok(a) if !a.ip().is_loopback() && self.token_file.is_none() => {
                vec!["bind: the address is not loopback and token_file is not set; set token_file".into()]
            }
            Ok(_) => Vec::new(),
        }
    }
}

/// Why the web server cannot start.
#[derive(Debug, thiserror::Error)]
pub enum WebError {
    /// The address is malformed.
    #[error("start the web server: bind: expected ADDRESS:PORT")]
    Address,
    /// Others could read results.
    #[error("start the web server: the address is not loopback and there is no token; set token_file")]
    TokenRequired,
    /// The token file cannot be read.
    #[error("start the web server: read token_file: {0}")]
    TokenFile(std::io::Error),
    /// The token is too easy.
    #[error(
        "start the web server: the token has fewer than {MIN_TOKEN_BYTES} bytes or characters other than visible ASCII"
    )]
    BadToken,
    /// The address cannot be bound.
    #[error("start the web server: bind: {0}")]
    Bind(std::io::Error),
    /// No thread or no runtime.
    #[error("start the web server: {0}")]
    Thread(std::io::Error),
    /// The store.
    #[error("start the web server: {0}")]
    Store(#[from] StoreError),
}

/// One named condition of readiness.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Its name.
    pub name: &'static str,
    /// Whether it holds.
    pub ok: bool,
    /// For people, without patient data.
    pub detail: String,
}

impl Check {
    /// A check.
    pub fn new(name: &'static str, ok: bool, detail: impl Into<String>) -> Self {
        Self { name, ok, detail: detail.into() }
    }
}

/// Says whether the daemon can take slices. Called on the server's thread: it must return at once.
pub trait Readiness: Send + Sync {
    /// Every check.
    fn checks(&self) -> Vec<Check>;
}

impl<F: Fn() -> Vec<Check> + Send + Sync> Readiness for F {
    fn checks(&self) -> Vec<Check> {
        self()
    }
}

/// What the server shows.
#[derive(Clone)]
pub struct WebState {
    /// For `/metrics`.
    pub metrics: MetricsHandle,
    /// For `/readyz`; a check of the store is added.
    pub readiness: Arc<dyn Readiness>,
    /// For `/api/results`.
    pub store: Store,
    /// More routes, behind the same rules of access; `None` for none.
    pub extra: Option<Router>,
}

struct Shared {
    metrics: MetricsHandle,
    readiness: Arc<dyn Readiness>,
    store: Mutex<StoreHandle>,
    /// HMAC of the token under a random key, ready to check another one.
    token: Option<Token>,
}

#[derive(Clone)]
struct Token {
    mac: Hmac<Sha256>,
    tag: Vec<u8>,
}

impl Token {
    fn new(token: &[u8]) -> Result<Self, WebError> {
        let mut key = [0u8; 32];
        getrandom::fill(&mut key)
            .map_err(|_| WebError::Thread(std::io::Error::other("the system gave no random bytes")))?;
        let mac: Hmac<Sha256> =
            Hmac::new_from_slice(&key).unwrap_or_else(|_| unreachable!("HMAC takes keys of any length"));
        let tag = mac.clone().chain_update(token).finalize().into_bytes().to_vec();
        Ok(Self { mac, tag })
    }

    /// Constant time in where the tokens differ: what is compared are tags under a random key.
    fn matches(&self, token: &[u8]) -> bool {
        self.mac.clone().chain_update(token).verify_slice(&self.tag).is_ok()
    }
}

fn read_token(path: &std::path::Path) -> Result<Token, WebError> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)
        .and_then(|f| f.take(MAX_TOKEN_FILE_BYTES).read_to_end(&mut bytes))
        .map_err(WebError::TokenFile)?;
    let token = bytes.trim_ascii();
    if token.len() < MIN_TOKEN_BYTES || !token.iter().all(u8::is_ascii_graphic) {
        return Err(WebError::BadToken);
    }
    Token::new(token)
}

/// The running server.
pub struct WebServer {
    local_addr: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for WebServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WebServer").field("local_addr", &self.local_addr).finish_non_exhaustive()
    }
}

impl WebServer {
    /// Binds and starts to answer.
    pub fn start(config: &WebConfig, state: WebState) -> Result<Self, WebError> {
        let address: SocketAddr = config.bind.parse().map_err(|_| WebError::Address)?;
        let token = config.token_file.as_deref().map(read_token).transpose()?;
        if !address.ip().is_loopback() && token.is_none() {
            return Err(WebError::TokenRequired);
        }
        let socket = TcpListener::bind(address).map_err(WebError::Bind)?;
        socket.set_nonblocking(true).map_err(WebError::Bind)?;
        let local_addr = socket.local_addr().map_err(WebError::Bind)?;
        let has_token = token.is_some();
        let shared = Arc::new(Shared {
            metrics: state.metrics,
            readiness: state.readiness,
            store: Mutex::new(state.store.reader()?),
            token,
        });
        let app = router(shared, state.extra);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()
            .map_err(WebError::Thread)?;
        let listener = {
            let _context = runtime.enter();
            let socket = tokio::net::TcpListener::from_std(socket).map_err(WebError::Bind)?;
            listener::Bounded::new(socket, MAX_CONNECTIONS, IDLE_TIMEOUT)
        };
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = std::thread::Builder::new()
            .name("web".into())
            .spawn(move || {
                runtime.block_on(async move {
                    let serve = axum::serve(listener, app).into_future();
                    tokio::select! {
                        _ = serve => {}
                        _ = stopped => {}
                    }
                });
                // Answers are made at once and whole: none is being worked on when the loop has ended.
                runtime.shutdown_background();
            })
            .map_err(WebError::Thread)?;
        WebStarted { port: local_addr.port(), token: has_token }.emit();
        Ok(Self { local_addr, stop: Some(stop), thread: Some(thread) })
    }

    /// The bound address.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Stops and waits for the thread. Open connections are closed.
    pub fn shutdown(mut self) {
        self.end();
    }

    fn end(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for WebServer {
    fn drop(&mut self) {
        self.end();
    }
}

fn router(shared: Arc<Shared>, extra: Option<Router>) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/readyz", get(readyz))
        .route("/api/results", get(results))
        .route("/api/results/{uid}", get(result))
        .with_state(Arc::clone(&shared))
        .merge(extra.unwrap_or_default())
        .fallback(|| async { StatusCode::NOT_FOUND })
        .layer(middleware::from_fn_with_state(shared, guard))
        // Outside the guard: liveness must not depend on a secret.
        .route("/healthz", get(|| async { "ok\n" }))
        .layer(middleware::from_fn(finish))
}

/// Lets through who may read.
async fn guard(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    match refusal(&shared, request.headers()) {
        Some(response) => response,
        None => next.run(request).await,
    }
}

fn refusal(shared: &Shared, headers: &HeaderMap) -> Option<Response> {
    let value = |name: HeaderName| headers.get(name).map(HeaderValue::as_bytes);
    match &shared.token {
        Some(token) => {
            let given = value(header::AUTHORIZATION).and_then(|v| v.strip_prefix(b"Bearer ")).unwrap_or_default();
            let challenge = [(header::WWW_AUTHENTICATE, "Bearer")];
            (!token.matches(given.trim_ascii()))
                .then(|| (StatusCode::UNAUTHORIZED, challenge, "token required\n").into_response())
        }
        None => (!is_loopback_host(value(header::HOST).unwrap_or_default()))
            .then(|| (StatusCode::FORBIDDEN, "use the address of this machine, or set a token\n").into_response()),
    }
}

/// Whether a Host header names this machine's loopback.
fn is_loopback_host(host: &[u8]) -> bool {
    let Ok(host) = std::str::from_utf8(host) else { return false };
    if let Ok(address) = host.parse::<SocketAddr>() {
        return address.ip().is_loopback();
    }
    let name = host.rsplit_once(':').filter(|(_, port)| port.parse::<u16>().is_ok()).map_or(host, |(name, _)| name);
    name.eq_ignore_ascii_case("localhost")
        || host.trim_matches(['[', ']']).parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Headers of every answer, and the event.
async fn finish(request: Request, next: Next) -> Response {
    let route = match request.uri().path() {
        "/metrics" => "/metrics",
        "/healthz" => "/healthz",
        "/readyz" => "/readyz",
        "/api/results" => "/api/results",
        p if p.starts_with("/api/results/") => "/api/results/{uid}",
        _ => "other",
    };
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    RequestAnswered { route, status: response.status().as_u16() }.emit();
    response
}

async fn metrics(State(shared): State<Arc<Shared>>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], shared.metrics.render()).into_response()
}

async fn readyz(State(shared): State<Arc<Shared>>) -> Response {
    let began = Instant::now();
    let store = shared.store.lock().unwrap_or_else(PoisonError::into_inner).ping();
    let detail = match &store {
        Ok(()) => format!("answered in {} us", began.elapsed().as_micros()),
        Err(e) => e.to_string(),
    };
    let mut checks = vec![Check::new("store", store.is_ok(), detail)];
    checks.extend(shared.readiness.checks());
    let ready = checks.iter().all(|c| c.ok);
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(json!({ "ready": ready, "checks": checks }))).into_response()
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct ResultsQuery {
    limit: u32,
    live: bool,
    study: Option<String>,
    before_ms: Option<i64>,
}

impl Default for ResultsQuery {
    fn default() -> Self {
        Self { limit: DEFAULT_LIST, live: false, study: None, before_ms: None }
    }
}

fn problem(status: StatusCode, text: &str) -> Response {
    (status, Json(json!({ "error": text }))).into_response()
}

/// The stored document, with `live` as it is now.
fn document(record: &ResultRecord) -> Value {
    let mut value: Value = serde_json::from_str(&record.document).unwrap_or_else(|_| json!({}));
    if let Some(members) = value.as_object_mut() {
        members.insert("live".into(), record.live.into());
    }
    value
}

async fn results(State(shared): State<Arc<Shared>>, query: Result<Query<ResultsQuery>, QueryRejection>) -> Response {
    let Ok(Query(query)) = query else {
        return problem(StatusCode::BAD_REQUEST, "expected limit, live, study, before_ms");
    };
    let study = match query.study.as_deref().map(StudyHash::parse).transpose() {
        Ok(study) => study,
        Err(e) => return problem(StatusCode::BAD_REQUEST, &e.to_string()),
    };
    if !(1..=MAX_LIST).contains(&query.limit) {
        return problem(StatusCode::BAD_REQUEST, &format!("limit: expected 1 to {MAX_LIST}"));
    }
    let which = ListResults { limit: query.limit, only_live: query.live, study, before_ms: query.before_ms };
    match shared.store.lock().unwrap_or_else(PoisonError::into_inner).results(&which) {
        Ok(found) => {
            let found: Vec<Value> = found.iter().map(document).collect();
            Json(json!({ "schema": "darnet.results/1", "results": found })).into_response()
        }
        Err(e) => problem(StatusCode::SERVICE_UNAVAILABLE, &e.to_string()),
    }
}

async fn result(State(shared): State<Arc<Shared>>, Path(uid): Path<String>) -> Response {
    match shared.store.lock().unwrap_or_else(PoisonError::into_inner).result(&uid) {
        Ok(Some(record)) => Json(document(&record)).into_response(),
        Ok(None) => problem(StatusCode::NOT_FOUND, "no such result"),
        Err(e) => problem(StatusCode::SERVICE_UNAVAILABLE, &e.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_told_apart() {
        for good in ["localhost", "LOCALHOST:8470", "127.0.0.1", "127.0.0.1:8470", "[::1]", "[::1]:8470", "127.9.9.9:1"]
        {
            assert!(is_loopback_host(good.as_bytes()), "{good}");
        }
        for bad in [
            "",
            "evil.example",
            "evil.example:8470",
            "localhost.evil.example",
            "10.0.0.1:8470",
            "localhost:x",
            "\u{fe}",
        ] {
            assert!(!is_loopback_host(bad.as_bytes()), "{bad}");
        }
    }

    #[test]
    fn other_addresses_need_a_token() {
        let config =
            |bind: &str, token: bool| WebConfig { bind: bind.into(), token_file: token.then(|| "token".into()) };
        assert!(WebConfig::default().validate().is_empty());
        assert!(config("[::1]:0", false).validate().is_empty());
        assert!(config("0.0.0.0:8470", true).validate().is_empty());
        assert_eq!(config("0.0.0.0:8470", false).validate().len(), 1);
        assert_eq!(config("localhost", false).validate().len(), 1);
        assert!(toml::from_str::<WebConfig>("port = 1").is_err());
    }

    #[test]
    fn tokens_match_only_themselves() {
        let token = Token::new(b"0123456789abcdef").unwrap();
        assert!(token.matches(b"0123456789abcdef"));
        for other in [&b""[..], b"0123456789abcde", b"0123456789abcdeg", b"0123456789abcdef0"] {
            assert!(!token.matches(other));
        }
    }
}
