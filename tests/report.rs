//! Results leave: signed, at least once under one idempotency key, through restarts; the web server shows them.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use darnet::report::calibration::Calibration;
use darnet::report::outbox::{Clock, Outbox, OutboxConfig, OutboxError, SystemClock};
use darnet::report::outcome::{ModelInfo, ResultDocument, ResultLatency, SeriesReport};
use darnet::report::policy::{AlertPolicy, SinkKind};
use darnet::report::sink::{Delivery, Sink, SinkError};
use darnet::report::webhook::{IDEMPOTENCY_HEADER, SIGNATURE_HEADER, Webhook, WebhookConfig, verify_signature};
use darnet::store::{NewOutcome, OutboxCounts, OutboxDraft, Store, unix_ms};
use darnet::telemetry::{LogConfig, LogFormat, MetricsHandle, Redacted, StudyHasher, init_logging};
use darnet::web::{Check, WebConfig, WebError, WebServer, WebState};

const SECRET: &str = "planted-secret-0123456789";
const STUDY_UID: &str = "1.2.826.0.1.777777.1";
const SERIES_UID: &str = "1.2.826.0.1.777777.1.1";

#[derive(Clone, Debug)]
struct Received {
    headers: BTreeMap<String, String>,
    body: Vec<u8>,
}

/// What the receiver does with a request.
#[derive(Clone)]
enum Answer {
    Status(u16, &'static str),
    Raw(&'static str),
    Hang,
}

/// A real HTTP server on a thread.
struct Receiver {
    address: SocketAddr,
    received: Arc<Mutex<Vec<Received>>>,
    answer: Arc<Mutex<Answer>>,
}

impl Receiver {
    fn start(answer: Answer) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let received = Arc::new(Mutex::new(Vec::new()));
        let answer = Arc::new(Mutex::new(answer));
        let (r, a) = (Arc::clone(&received), Arc::clone(&answer));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (r, a) = (Arc::clone(&r), Arc::clone(&a));
                std::thread::spawn(move || serve_one(stream.unwrap(), &r, &a));
            }
        });
        Self { address, received, answer }
    }

    fn config(&self) -> WebhookConfig {
        WebhookConfig {
            url: format!("http://{}/hook", self.address),
            secret: Some(Redacted::new(SECRET.into())),
            allow_plaintext_secret: true,
            timeout_ms: 3_000,
            connect_timeout_ms: 1_000,
            ..WebhookConfig::default()
        }
    }

    fn webhook(&self) -> Box<dyn Sink> {
        Box::new(Webhook::new(&self.config()).unwrap())
    }

    fn all(&self) -> Vec<Received> {
        self.received.lock().unwrap().clone()
    }

    fn set(&self, answer: Answer) {
        *self.answer.lock().unwrap() = answer;
    }
}

fn serve_one(stream: TcpStream, received: &Mutex<Vec<Received>>, answer: &Mutex<Answer>) {
    let mut reader = BufReader::new(stream);
    let mut headers = BTreeMap::new();
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    assert!(line.starts_with("POST /hook HTTP/1.1"), "{line}");
    loop {
        line.clear();
        if reader.read_line(&mut line).unwrap() == 0 || line.trim().is_empty() {
            break;
        }
        let (name, value) = line.trim().split_once(':').unwrap();
        headers.insert(name.to_lowercase(), value.trim().to_owned());
    }
    let mut body = vec![0; headers["content-length"].parse().unwrap()];
    reader.read_exact(&mut body).unwrap();
    received.lock().unwrap().push(Received { headers, body });
    let answer = answer.lock().unwrap().clone();
    let mut stream = reader.into_inner();
    let _ = match answer {
        Answer::Status(status, more) => {
            write!(stream, "HTTP/1.1 {status} X\r\nContent-Length: 3\r\nConnection: close\r\n{more}\r\nyes")
        }
        Answer::Raw(text) => stream.write_all(text.as_bytes()),
        Answer::Hang => {
            std::thread::sleep(Duration::from_secs(10));
            Ok(())
        }
    };
}

fn outcome(revision: u32) -> NewOutcome {
    let hasher = StudyHasher::new([4; 32]);
    let (study, series) = (hasher.hash(STUDY_UID), hasher.hash(SERIES_UID));
    let model = ModelInfo {
        id: "demo".into(),
        sha256: "0".repeat(64),
        intended_use: "demo".into(),
        trained_on: "nothing".into(),
    };
    let report = SeriesReport::result(series.to_string(), &[0.1, 2.5, -0.3], 120).unwrap();
    let alert = AlertPolicy::default().decide(&report, &Calibration::none(), true);
    let latency = ResultLatency {
        last_slice_to_alert_ms: Some(2_345.678),
        completion_wait_ms: Some(2_000.0),
        reused_share: None,
    };
    let document = ResultDocument::new(&study, model, "cpu", "released", alert.clone(), latency, report, unix_ms());
    NewOutcome {
        study,
        study_instance_uid: STUDY_UID.into(),
        series,
        series_instance_uid: SERIES_UID.into(),
        revision,
        slices: 120,
        reason: None,
        document: serde_json::to_value(document).unwrap(),
        live: true,
        alerted: alert.alert,
        created_at_ms: unix_ms(),
    }
}

fn quick() -> OutboxConfig {
    OutboxConfig { max_attempts: 4, backoff_first_ms: 5, backoff_max_ms: 20, jitter_seed: 1 }
}

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < end, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn counts(store: &Store) -> OutboxCounts {
    store.handle().unwrap().outbox_counts().unwrap()
}

fn store_in(dir: &Path) -> Store {
    Store::open(&dir.join("darnet.sqlite")).unwrap()
}

const STOP: Duration = Duration::from_secs(10);

#[test]
fn webhook_gets_the_stored_document_signed_once() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_in(dir.path());
    let receiver = Receiver::start(Answer::Status(204, ""));
    let outbox = Outbox::start(&store, vec![receiver.webhook()], &quick(), Arc::new(SystemClock)).unwrap();
    assert_eq!(outbox.sinks(), ["webhook"]);
    let mut handle = store.handle().unwrap();
    let committed = handle.commit_outcome(&outcome(1), &[OutboxDraft::document("webhook")]).unwrap();
    outbox.kick();
    until("delivery", || counts(&store).delivered == 1);
    assert!(outbox.shutdown(STOP));

    let got = receiver.all();
    assert_eq!(got.len(), 1);
    let headers = &got[0].headers;
    assert_eq!(headers[&IDEMPOTENCY_HEADER.to_lowercase()], committed.ids.result_uid);
    assert_eq!(headers["content-type"], "application/json");
    let signature = &headers[&SIGNATURE_HEADER.to_lowercase()];
    assert!(verify_signature(SECRET.as_bytes(), signature, &got[0].body, unix_ms() / 1000, 60), "{signature}");
    assert!(!verify_signature(b"another secret 0123", signature, &got[0].body, unix_ms() / 1000, 60));
    let document: ResultDocument = serde_json::from_slice(&got[0].body).unwrap();
    assert_eq!(document.result_uid, committed.ids.result_uid);
    assert_eq!((document.revision, document.live, document.alert.alert), (1, true, true));
    assert!(document.notice.unwrap().contains("not for diagnosis"));
    assert_eq!(document.report.logits.unwrap(), [0.1f32, 2.5, -0.3].map(f64::from));
    assert_eq!(got[0].body, handle.result(&committed.ids.result_uid).unwrap().unwrap().document.as_bytes());
}

#[test]
fn answers_are_told_apart() {
    let receiver = Receiver::start(Answer::Hang);
    let hook = Webhook::new(&WebhookConfig { timeout_ms: 1_000, ..receiver.config() }).unwrap();
    let deliver = |answer: Answer| {
        receiver.set(answer);
        hook.deliver(&Delivery { result_uid: "2.25.1", edition: 1, payload: b"{}", attempt: 1, now_ms: unix_ms() })
    };
    for status in [200, 201, 202, 204] {
        assert_eq!(deliver(Answer::Status(status, "")), Ok(()), "{status}");
    }
    for status in [400, 401, 403, 404, 409, 410, 413, 422] {
        let e = deliver(Answer::Status(status, "")).unwrap_err();
        assert!(!e.retryable && e.detail.contains(&status.to_string()), "{e:?}");
    }
    for status in [302, 307, 408, 425, 429, 500, 502, 503] {
        let e = deliver(Answer::Status(status, "Location: /elsewhere\r\n")).unwrap_err();
        assert!(e.retryable && e.detail.contains(&status.to_string()), "{e:?}");
    }
    let e = deliver(Answer::Status(503, "Retry-After: 7\r\n")).unwrap_err();
    assert_eq!(e.retry_after_ms, Some(7_000));
    let e = deliver(Answer::Status(429, "Retry-After: 99999999\r\n")).unwrap_err();
    assert_eq!(e.retry_after_ms, Some(3_600_000), "bounded");
    for raw in ["", "garbage\r\n\r\n", "HTTP/1.1 200", "HTTP/1.1 999999 X\r\n\r\n"] {
        assert!(deliver(Answer::Raw(raw)).unwrap_err().retryable, "{raw}");
    }
    // The status is enough, whatever the body does.
    assert_eq!(deliver(Answer::Raw("HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\nshort")), Ok(()));
    let began = Instant::now();
    let e = deliver(Answer::Hang).unwrap_err();
    assert!(e.retryable && e.detail == "timed out" && began.elapsed() < Duration::from_secs(5), "{e:?}");
}

#[test]
fn restart_between_commit_and_delivery_delivers_once() {
    let dir = tempfile::tempdir().unwrap();
    let receiver = Receiver::start(Answer::Status(200, ""));
    let uid = {
        // Committed, and the process ends before anything is sent.
        let mut handle = store_in(dir.path()).handle().unwrap();
        handle.commit_outcome(&outcome(1), &[OutboxDraft::document("webhook")]).unwrap().ids.result_uid
    };
    let store = store_in(dir.path());
    // The pipeline repeats its commit after the restart.
    let again = store.handle().unwrap().commit_outcome(&outcome(1), &[OutboxDraft::document("webhook")]).unwrap();
    assert_eq!((again.fresh, &again.ids.result_uid), (false, &uid));
    for _ in 0..3 {
        let outbox = Outbox::start(&store, vec![receiver.webhook()], &quick(), Arc::new(SystemClock)).unwrap();
        until("delivery", || counts(&store).delivered == 1);
        assert!(outbox.shutdown(STOP));
    }
    let keys: Vec<_> = receiver.all().iter().map(|r| r.headers["idempotency-key"].clone()).collect();
    assert_eq!(keys, [uid]);
}

/// Body of the processes started by the tests below; does nothing in an ordinary run.
#[test]
fn child_process() {
    let Ok(dir) = std::env::var("DARNET_TEST_CHILD_DIR") else { return };
    let url = std::env::var("DARNET_TEST_CHILD_URL").unwrap();
    let role = std::env::var("DARNET_TEST_CHILD_ROLE").unwrap();
    let store = store_in(Path::new(&dir));
    let config = WebhookConfig {
        url,
        secret: Some(Redacted::new(SECRET.into())),
        allow_plaintext_secret: true,
        ..WebhookConfig::default()
    };
    let hook = Webhook::new(&config).unwrap();
    if role == "crash" {
        // The receiver has taken it, and the process dies before that is written down.
        let mut handle = store.handle().unwrap();
        handle.commit_outcome(&outcome(1), &[OutboxDraft::document("webhook")]).unwrap();
        let item = handle.lease_due(unix_ms(), 1).unwrap().remove(0);
        hook.deliver(&Delivery {
            result_uid: &item.result_uid,
            edition: item.edition,
            payload: &item.payload,
            attempt: item.attempt,
            now_ms: unix_ms(),
        })
        .unwrap();
        std::process::abort();
    }
    init_logging(&LogConfig { format: LogFormat::Json, filter: "trace".into() }).unwrap();
    assert!(init_logging(&LogConfig::default()).is_err(), "only once");
    let metrics = MetricsHandle::install().unwrap();
    let outbox = Outbox::start(&store, vec![Box::new(hook)], &quick(), Arc::new(SystemClock)).unwrap();
    let state = WebState {
        metrics: metrics.clone(),
        readiness: Arc::new(Vec::<Check>::new),
        store: store.clone(),
        extra: None,
    };
    let web = WebServer::start(&WebConfig { bind: "127.0.0.1:0".into(), token_file: None }, state).unwrap();
    let mut handle = store.handle().unwrap();
    handle.commit_outcome(&outcome(1), &[OutboxDraft::document("webhook")]).unwrap();
    outbox.kick();
    until("the item is given up", || counts(&store).dead == 1);
    let answer =
        http(web.local_addr(), "GET /api/results/1.2.826.0.1.777777?PatientName=Doe HTTP/1.1\r\nHost: localhost");
    eprintln!("{}", serde_json::json!({ "level": "TEST", "message": answer }));
    web.shutdown();
    outbox.shutdown(STOP);
    for line in metrics.render().lines() {
        eprintln!("{}", serde_json::json!({ "level": "TEST", "message": line }));
    }
}

fn child(role: &str, dir: &Path, receiver: &Receiver) -> std::process::Output {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_process", "--nocapture", "--test-threads=1"])
        .env("DARNET_TEST_CHILD_DIR", dir)
        .env("DARNET_TEST_CHILD_URL", format!("http://{}/hook", receiver.address))
        .env("DARNET_TEST_CHILD_ROLE", role)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[test]
fn crash_after_the_receiver_took_it_repeats_under_the_same_key() {
    let dir = tempfile::tempdir().unwrap();
    let receiver = Receiver::start(Answer::Status(200, ""));
    let died = child("crash", dir.path(), &receiver);
    assert!(!died.status.success() && receiver.all().len() == 1, "{died:?}");

    let store = store_in(dir.path());
    assert_eq!(counts(&store).sending, 1, "the attempt was left unfinished");
    let outbox = Outbox::start(&store, vec![receiver.webhook()], &quick(), Arc::new(SystemClock)).unwrap();
    until("delivery", || counts(&store).delivered == 1);
    assert!(outbox.shutdown(STOP));
    let got = receiver.all();
    assert_eq!(got.len(), 2);
    assert_eq!(got[0].headers["idempotency-key"], got[1].headers["idempotency-key"]);
    assert_eq!(got[0].body, got[1].body, "the same bytes");
}

#[test]
fn nothing_planted_reaches_logs_or_metrics() {
    let dir = tempfile::tempdir().unwrap();
    let receiver = Receiver::start(Answer::Status(422, "X-Patient: Doe^Jane\r\n"));
    let output = child("log", dir.path(), &receiver);
    let log = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{log}");
    for planted in [STUDY_UID, "777777", SECRET, "Doe", "/hook", &receiver.address.to_string()] {
        assert!(!log.contains(planted), "{planted} in\n{log}");
    }
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(!stdout.contains("darnet_") && !stdout.contains("outbox"), "logs go to stderr only: {stdout}");
    let mut messages = Vec::new();
    for line in log.lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        messages.push(line["message"].as_str().unwrap_or_default().to_owned());
    }
    assert!(messages.iter().any(|m| m == "item dead, resend it by hand"), "{messages:?}");
    assert!(messages.iter().any(|m| m.contains("darnet_outbox_items{state=\"dead\"} 1")), "{messages:?}");
}

#[test]
fn refused_items_are_dead_until_a_person_resends_them() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_in(dir.path());
    let receiver = Receiver::start(Answer::Status(500, ""));
    let outbox = Outbox::start(&store, vec![receiver.webhook()], &quick(), Arc::new(SystemClock)).unwrap();
    let mut handle = store.handle().unwrap();
    handle.commit_outcome(&outcome(1), &[OutboxDraft::document("webhook")]).unwrap();
    outbox.kick();
    until("dead after the attempts", || counts(&store).dead == 1);
    assert_eq!(receiver.all().len(), 4, "max_attempts");
    let entry = handle.outbox_entries("dead", 9).unwrap().remove(0);
    assert_eq!((entry.attempts, entry.last_error.as_deref()), (4, Some("expected status 2xx, got 500")));

    receiver.set(Answer::Status(400, ""));
    assert_eq!(handle.resend_dead(Some(entry.id), unix_ms()).unwrap(), 1);
    outbox.kick();
    until("dead at once", || counts(&store).dead == 1 && receiver.all().len() == 5);

    receiver.set(Answer::Status(200, ""));
    assert_eq!(handle.resend_dead(None, unix_ms()).unwrap(), 1);
    outbox.kick();
    until("delivery", || counts(&store).delivered == 1);
    assert!(outbox.shutdown(STOP));
    let keys: std::collections::BTreeSet<_> =
        receiver.all().iter().map(|r| r.headers["idempotency-key"].clone()).collect();
    assert_eq!(keys.len(), 1);
    let events: Vec<_> = handle.audit_tail(50).unwrap().into_iter().rev().map(|a| a.event).collect();
    assert_eq!(events, ["outcome", "dead", "resend", "dead", "resend", "delivered"]);
}

/// Fails while told to; counts.
struct Scripted {
    name: &'static str,
    calls: Arc<AtomicU32>,
    act: Box<dyn Fn(u32) -> Result<(), SinkError> + Send>,
}

impl Sink for Scripted {
    fn name(&self) -> &str {
        self.name
    }
    fn kind(&self) -> SinkKind {
        SinkKind::Webhook
    }
    fn deliver(&self, _: &Delivery<'_>) -> Result<(), SinkError> {
        (self.act)(self.calls.fetch_add(1, Ordering::SeqCst) + 1)
    }
}

fn scripted(
    name: &'static str,
    act: impl Fn(u32) -> Result<(), SinkError> + Send + 'static,
) -> (Box<dyn Sink>, Arc<AtomicU32>) {
    let calls = Arc::new(AtomicU32::new(0));
    (Box::new(Scripted { name, calls: Arc::clone(&calls), act: Box::new(act) }), calls)
}

#[test]
fn a_hanging_sink_holds_up_neither_the_others_nor_the_shutdown() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_in(dir.path());
    let free = Arc::new(AtomicBool::new(false));
    let freed = Arc::clone(&free);
    let (slow, slow_calls) = scripted("slow", move |_| {
        while !freed.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    });
    let (fast, _) = scripted("fast", |_| Ok(()));
    let outbox = Outbox::start(&store, vec![slow, fast], &quick(), Arc::new(SystemClock)).unwrap();
    let drafts = [OutboxDraft::document("slow"), OutboxDraft::document("fast")];
    store.handle().unwrap().commit_outcome(&outcome(1), &drafts).unwrap();
    outbox.kick();
    until("the fast sink", || counts(&store).delivered == 1 && slow_calls.load(Ordering::SeqCst) == 1);
    let began = Instant::now();
    assert!(!outbox.shutdown(Duration::from_millis(50)), "the slow one is not waited for");
    assert!(began.elapsed() < Duration::from_secs(3));
    free.store(true, Ordering::SeqCst);
    until("the slow sink's own end", || counts(&store).delivered == 2);
}

#[test]
fn a_panicking_sink_is_contained_and_retried() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_in(dir.path());
    let (sink, calls) = scripted("shaky", |call| if call < 3 { panic!("planted") } else { Ok(()) });
    let outbox = Outbox::start(&store, vec![sink], &quick(), Arc::new(SystemClock)).unwrap();
    store.handle().unwrap().commit_outcome(&outcome(1), &[OutboxDraft::document("shaky")]).unwrap();
    outbox.kick();
    until("delivery", || counts(&store).delivered == 1);
    assert_eq!(calls.load(Ordering::SeqCst), 3);
    assert!(outbox.shutdown(STOP));
}

struct ManualClock(AtomicI64);

impl Clock for ManualClock {
    fn now_ms(&self) -> i64 {
        self.0.load(Ordering::SeqCst)
    }
}

#[test]
fn retries_wait_for_the_backoff_and_for_what_the_receiver_asks() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_in(dir.path());
    let (sink, calls) = scripted("s", |call| match call {
        1 => Err(SinkError::retry("once")),
        2 => Err(SinkError { retry_after_ms: Some(500_000), ..SinkError::retry("busy") }),
        _ => Ok(()),
    });
    let start = unix_ms() + 1_000;
    let clock = Arc::new(ManualClock(AtomicI64::new(start)));
    let config = OutboxConfig { backoff_first_ms: 60_000, backoff_max_ms: 60_000, ..quick() };
    let outbox = Outbox::start(&store, vec![sink], &config, Arc::clone(&clock) as Arc<dyn Clock>).unwrap();
    store.handle().unwrap().commit_outcome(&outcome(1), &[OutboxDraft::document("s")]).unwrap();
    let at = |offset: i64, expected: u32| {
        clock.0.store(start + offset, Ordering::SeqCst);
        outbox.kick();
        // Also noted: the next attempt is due by the time of the note.
        until("the attempt", || calls.load(Ordering::SeqCst) >= expected && counts(&store).sending == 0);
        std::thread::sleep(Duration::from_millis(60));
        assert_eq!(calls.load(Ordering::SeqCst), expected, "at {offset} ms");
    };
    at(0, 1);
    at(29_999, 1); // The jitter leaves at least half of the wait.
    at(60_000, 2);
    at(60_000 + 499_999, 2);
    at(60_000 + 500_000, 3);
    until("delivery", || counts(&store).delivered == 1);
    assert!(outbox.shutdown(STOP));
}

#[test]
fn outbox_refuses_bad_configurations_and_buries_orphans() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_in(dir.path());
    let clock = || Arc::new(SystemClock);
    let bad = OutboxConfig { max_attempts: 0, ..quick() };
    assert!(matches!(Outbox::start(&store, vec![], &bad, clock()), Err(OutboxError::Config(_))));
    let twins = vec![scripted("a", |_| Ok(())).0, scripted("a", |_| Ok(())).0];
    assert!(matches!(Outbox::start(&store, twins, &quick(), clock()), Err(OutboxError::SameName)));
    store.handle().unwrap().commit_outcome(&outcome(1), &[OutboxDraft::document("removed")]).unwrap();
    let outbox = Outbox::start(&store, vec![], &quick(), clock()).unwrap();
    assert_eq!(counts(&store).dead, 1);
    assert!(outbox.shutdown(STOP));
}

fn http(address: SocketAddr, head: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    write!(stream, "{head}\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

fn get(address: SocketAddr, path: &str) -> (u16, String) {
    let answer = http(address, &format!("GET {path} HTTP/1.1\r\nHost: {address}"));
    let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
    (status, answer.split_once("\r\n\r\n").unwrap().1.to_owned())
}

fn web_state(store: &Store, ready: Arc<AtomicBool>) -> WebState {
    WebState {
        metrics: MetricsHandle::install().unwrap(),
        readiness: Arc::new(move || vec![Check::new("backend", ready.load(Ordering::SeqCst), "planted")]),
        store: store.clone(),
        extra: Some(axum::Router::new().route("/extra", axum::routing::get(|| async { "more" }))),
    }
}

#[test]
fn web_shows_metrics_health_readiness_and_results() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_in(dir.path());
    let ready = Arc::new(AtomicBool::new(false));
    let config = WebConfig { bind: "127.0.0.1:0".into(), token_file: None };
    let web = WebServer::start(&config, web_state(&store, Arc::clone(&ready))).unwrap();
    let address = web.local_addr();
    assert_eq!(get(address, "/healthz"), (200, "ok\n".into()));
    let (status, body) = get(address, "/readyz");
    let checks: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!((status, &checks["ready"]), (503, &false.into()));
    assert_eq!((&checks["checks"][0]["name"], &checks["checks"][0]["ok"]), (&"store".into(), &true.into()));
    assert_eq!((&checks["checks"][1]["name"], &checks["checks"][1]["ok"]), (&"backend".into(), &false.into()));
    ready.store(true, Ordering::SeqCst);
    assert_eq!(get(address, "/readyz").0, 200);
    let (status, metrics) = get(address, "/metrics");
    assert!(status == 200 && metrics.contains("# TYPE darnet_process_start_time_seconds gauge"), "{metrics}");
    assert!(metrics.contains("darnet_http_requests_total{route=\"/readyz\",status=\"503\"}"), "{metrics}");
    assert_eq!(get(address, "/extra"), (200, "more".into()));

    let mut handle = store.handle().unwrap();
    let first = handle.commit_outcome(&outcome(1), &[]).unwrap().ids.result_uid;
    let second = handle.commit_outcome(&outcome(2), &[]).unwrap().ids.result_uid;
    let json = |path: &str| -> serde_json::Value {
        let (status, body) = get(address, path);
        assert_eq!(status, 200, "{path}: {body}");
        serde_json::from_str(&body).unwrap()
    };
    assert_eq!(json("/api/results")["results"].as_array().unwrap().len(), 2);
    let live = json("/api/results?live=true&limit=5");
    assert_eq!(live["results"][0]["result_uid"], second.as_str());
    assert_eq!(live["results"].as_array().unwrap().len(), 1);
    let old = json(&format!("/api/results/{first}"));
    assert_eq!((&old["live"], &old["schema"]), (&false.into(), &"darnet.result/1".into()), "no longer live");
    let study = outcome(1).study;
    assert_eq!(json(&format!("/api/results?study={study}&before_ms=1"))["results"].as_array().unwrap().len(), 0);
    assert!(!json("/api/results").to_string().contains("777777"), "no UID of a peer");
    for (path, status) in [
        ("/api/results/2.25.1", 404),
        ("/api/results?limit=0", 400),
        ("/api/results?limit=1001", 400),
        ("/api/results?limit=x", 400),
        ("/api/results?colour=red", 400),
        ("/api/results?study=Doe", 400),
        ("/nothing", 404),
        ("/api/results/..%2f..%2fetc%2fpasswd", 404),
    ] {
        assert_eq!(get(address, path).0, status, "{path}");
    }
    let answer = http(address, "GET /api/results HTTP/1.1\r\nHost: results.example");
    assert!(answer.starts_with("HTTP/1.1 403"), "{answer}");
    let answer = http(address, "DELETE /api/results HTTP/1.1\r\nHost: localhost");
    assert!(answer.starts_with("HTTP/1.1 405"), "{answer}");
    let answer = http(address, "GET /api/results HTTP/1.1\r\nHost: localhost").to_lowercase();
    assert!(answer.contains("x-content-type-options: nosniff") && answer.contains("cache-control: no-store"));
    web.shutdown();
    assert!(TcpStream::connect(address).is_err(), "the port is free again");
}

#[test]
fn web_asks_for_the_token_and_is_not_bound_to_the_world_without_one() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_in(dir.path());
    let state = || web_state(&store, Arc::new(AtomicBool::new(true)));
    let open = WebConfig { bind: "0.0.0.0:0".into(), token_file: None };
    assert!(matches!(WebServer::start(&open, state()), Err(WebError::TokenRequired)));
    let file = dir.path().join("token");
    let config = WebConfig { bind: "0.0.0.0:0".into(), token_file: Some(file.clone()) };
    assert!(matches!(WebServer::start(&config, state()), Err(WebError::TokenFile(_))));
    for bad in ["", "short", "0123456789abcdef with blanks"] {
        std::fs::write(&file, bad).unwrap();
        assert!(matches!(WebServer::start(&config, state()), Err(WebError::BadToken)), "{bad}");
    }
    std::fs::write(&file, "0123456789abcdef\n").unwrap();
    let web = WebServer::start(&config, state()).unwrap();
    let address = SocketAddr::from(([127, 0, 0, 1], web.local_addr().port()));
    let ask = |path: &str, header: &str| {
        let answer = http(address, &format!("GET {path} HTTP/1.1\r\nHost: scanner.example{header}"));
        answer.split(' ').nth(1).unwrap().parse::<u16>().unwrap()
    };
    assert_eq!(ask("/healthz", ""), 200);
    for path in ["/metrics", "/readyz", "/api/results", "/api/results/2.25.1", "/extra", "/nothing"] {
        assert_eq!(ask(path, ""), 401, "{path}");
        assert_eq!(ask(path, "\r\nAuthorization: Bearer 0123456789abcdeX"), 401, "{path}");
        assert_eq!(ask(path, "\r\nAuthorization: Basic 0123456789abcdef"), 401, "{path}");
        assert_ne!(ask(path, "\r\nAuthorization: Bearer 0123456789abcdef"), 401, "{path}");
    }
    drop(web);
    assert!(matches!(
        WebServer::start(&WebConfig { bind: "nowhere".into(), token_file: None }, state()),
        Err(WebError::Address)
    ));
}

#[test]
fn silent_connections_do_not_shut_others_out_below_the_bound() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_in(dir.path());
    let config = WebConfig { bind: "127.0.0.1:0".into(), token_file: None };
    let web = WebServer::start(&config, web_state(&store, Arc::new(AtomicBool::new(true)))).unwrap();
    let address = web.local_addr();
    let mut silent: Vec<_> =
        (0..darnet::web::MAX_CONNECTIONS - 1).map(|_| TcpStream::connect(address).unwrap()).collect();
    assert_eq!(get(address, "/healthz").0, 200);
    // At the bound a request waits in the backlog until a connection ends.
    silent.push(TcpStream::connect(address).unwrap());
    std::thread::sleep(Duration::from_millis(100));
    let waiting = std::thread::spawn(move || get(address, "/healthz").0);
    std::thread::sleep(Duration::from_millis(200));
    assert!(!waiting.is_finished());
    silent.clear();
    assert_eq!(waiting.join().unwrap(), 200);
}
