//! The metrics page, the code and Prometheus agree; nothing identifies a patient.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use darnet::telemetry::events::*;
use darnet::telemetry::{METRICS, MetricsHandle, StudyHasher};

/// Emits each event at least once.
fn emit_all() {
    let hasher = StudyHasher::new([5; 32]);
    let (study, series) = (hasher.hash("1.2.3"), hasher.hash("1.2.3.4"));
    let took = Duration::from_millis(12);
    ServerStarted {
        choice: "as configured",
        version: "0.1.0",
        commit: "abc",
        backend: "cpu",
        instruction_set: "avx2",
        model: "demo",
        intended_use: "demo",
    }
    .emit();
    BackendFell { backend: "cuda", detail: "out of memory", retry_in: Some(took) }.emit();
    BackendRetried { backend: "cuda", result: "failed", detail: "out of memory" }.emit();
    BackendDegraded { degraded: true }.emit();
    DeviceResamplingFailed { detail: "out of memory" }.emit();
    ServerStopping { cause: "signal" }.emit();
    AssociationAccepted { association: 1, active: 1 }.emit();
    AssociationRejected { reason: "called_ae_title" }.emit();
    AssociationAborted { association: 1, active: 0 }.emit();
    AssociationClosed { association: 2, active: 0, objects: 300 }.emit();
    ProtocolViolated { kind: "pdu_too_long" }.emit();
    EchoAnswered.emit();
    BytesReceived { bytes: 526_000 }.emit();
    SliceStored { series: &series, slices: 1 }.emit();
    SliceRefused { reason: "no_space", status: 0xA700 }.emit();
    SliceDuplicate { series: &series, conflict: false }.emit();
    SliceDuplicate { series: &series, conflict: true }.emit();
    ObjectIgnored { kind: "dose_report" }.emit();
    for stage in Stage::ALL {
        StageTimed { stage, took }.emit();
    }
    QueueObserved { queue: "decode", depth: 3, capacity: 64 }.emit();
    SeriesOpened { study: &study, series: &series, open: 1 }.emit();
    SeriesCompleted { series: &series, cause: "released", slices: 300, waited: took, open: 0 }.emit();
    SeriesReopened { series: &series, revision: 1, open: 1 }.emit();
    for result in ["done", "cancelled", "failed"] {
        AheadAdvanced { series: &series, planes: 12, result, took }.emit();
    }
    AheadMispredicted { series: &series }.emit();
    AheadReused { series: &series, share: 0.9 }.emit();
    SpeculationEnded { series: &series, used: true }.emit();
    OutcomePublished {
        study: &study,
        series: &series,
        revision: 1,
        outcome: "result",
        reason: None,
        last_slice_to_alert: Some(took),
    }
    .emit();
    AlertRaised { study: &study, level: "urgent", class: "covid19" }.emit();
    SinkDelivered { sink: "webhook", item: 1, attempts: 1, took }.emit();
    SinkFailed { sink: "webhook", item: 1, attempts: 1, detail: "timed out", retry_in: took }.emit();
    SinkDead { sink: "webhook", item: 1, attempts: 9, detail: "timed out" }.emit();
    OutboxObserved { pending: 1, ..Default::default() }.emit();
    OutboxStoreFailed { detail: "busy" }.emit();
    RecoveryDone { series: 2, slices: 300, cut_bytes: 17, took }.emit();
    PanicContained { stage: "decode", series: Some(&series) }.emit();
    ConfigFault { fault: "web.bind: expected ADDRESS:PORT" }.emit();
    WebStarted { port: 8470, token: false }.emit();
    RequestAnswered { route: "/metrics", status: 200 }.emit();
}

fn rendered() -> String {
    let metrics = MetricsHandle::install().expect("install the recorder");
    emit_all();
    metrics.render()
}

#[test]
fn promtool_accepts_the_metrics() {
    let text = rendered();
    let child = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("this test needs promtool; install it: apt-get install -y --no-install-recommends prometheus");
    child.stdin.as_ref().unwrap().write_all(text.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && said.trim().is_empty(), "{said}\n{text}");
}

#[test]
fn every_metric_of_the_table_is_emitted_with_its_kind_and_labels_and_no_other() {
    let text = rendered();
    let mut seen = BTreeSet::new();
    for line in text.lines().filter_map(|l| l.strip_prefix("# TYPE ")) {
        let (name, kind) = line.split_once(' ').unwrap();
        let metric = METRICS.iter().find(|m| m.name == name).unwrap_or_else(|| panic!("{name} is not in the table"));
        assert_eq!(metric.kind.as_str(), kind, "{name}");
        assert!(text.contains(&format!("# HELP {name} {}", metric.help)), "{name}");
        seen.insert(name.to_owned());
        for sample in text.lines().filter(|l| l.starts_with(&format!("{name}{{"))) {
            let labels: BTreeSet<&str> = sample[name.len() + 1..sample.rfind('}').unwrap()]
                .split("\",")
                .map(|l| l.split_once('=').unwrap().0)
                .collect();
            assert_eq!(labels, metric.labels.iter().copied().collect(), "{sample}");
        }
    }
    for metric in METRICS {
        assert!(seen.contains(metric.name), "{} is never emitted", metric.name);
    }
}

#[test]
fn the_page_lists_exactly_the_metrics() {
    let page = include_str!("../docs/metrics.md");
    let rows: Vec<Vec<&str>> = page
        .lines()
        .filter(|l| l.starts_with("| `darnet_"))
        .map(|l| l.trim_matches('|').split('|').map(str::trim).collect())
        .collect();
    assert_eq!(rows.len(), METRICS.len());
    for (row, metric) in rows.iter().zip(METRICS) {
        assert_eq!(row[0], format!("`{}`", metric.name));
        assert_eq!(row[1], metric.kind.as_str(), "{}", metric.name);
        let labels: Vec<String> = metric.labels.iter().map(|l| format!("`{l}`")).collect();
        assert_eq!(row[2], if labels.is_empty() { "-".into() } else { labels.join(", ") }, "{}", metric.name);
        assert_eq!(row[3], metric.help, "{}", metric.name);
    }
    let edges: Vec<String> = darnet::telemetry::LATENCY_BUCKETS_S.iter().map(f64::to_string).collect();
    assert!(page.contains(&edges.join(" ")), "bucket edges: {}", edges.join(" "));
}

#[test]
fn latencies_are_real_histograms() {
    let text = rendered();
    assert!(text.contains("darnet_stage_seconds_bucket{stage=\"infer\",le=\"0.025\"}"), "{text}");
    assert!(text.contains("darnet_last_slice_to_alert_seconds_bucket{le=\"60\"}"), "{text}");
    assert!(!text.contains("quantile="));
}
