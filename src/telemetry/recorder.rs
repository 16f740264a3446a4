//! The metrics recorder and the table of every metric.
//!
//! [`METRICS`] is the single list: descriptions are registered from it, and tests hold the events and
//! `docs/metrics.md` to it.

use std::sync::{Mutex, OnceLock, PoisonError};

use metrics::Unit;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

/// Upper edges of every latency histogram, seconds.
///
/// 100 us to 60 s: from one in-plane resampling (under a millisecond) to a whole inference on a small processor (tens
/// of seconds), at most a factor 2.5 from edge to edge; 2 s and 20 s are edges because they are the default waits of
/// the completion rules. 20 edges + infinity + sum + count = 23 lines a label set.
pub const LATENCY_BUCKETS_S: [f64; 20] = [
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0,
    30.0, 60.0,
];

/// What a metric is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricKind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts in [`LATENCY_BUCKETS_S`].
    Histogram,
}

impl MetricKind {
    /// As Prometheus writes it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// One metric.
#[derive(Clone, Copy, Debug)]
pub struct MetricInfo {
    /// Full name.
    pub name: &'static str,
    /// What it is.
    pub kind: MetricKind,
    /// Its labels, in the order of the documentation.
    pub labels: &'static [&'static str],
    /// One sentence, the HELP text.
    pub help: &'static str,
}

macro_rules! metrics_table {
    ($($(#[$doc:meta])* $ident:ident = $name:literal, $kind:ident, [$($label:literal),*], $help:literal;)*) => {
        pub(super) mod names {
            $(pub const $ident: &str = $name;)*
        }
        /// Every metric of the program.
        pub const METRICS: &[MetricInfo] = &[
            $(MetricInfo { name: $name, kind: MetricKind::$kind, labels: &[$($label),*], help: $help },)*
        ];
    };
}

metrics_table! {
    STAGE_SECONDS = "darnet_stage_seconds", Histogram, ["stage"],
        "Time spent in a stage of the pipeline, per slice up to resample, per series after it.";
    LAST_SLICE_TO_ALERT = "darnet_last_slice_to_alert_seconds", Histogram, [],
        "From the last P-DATA byte of the last slice to the commit of the outcome in the outbox.";
    COMPLETION_WAIT = "darnet_completion_wait_seconds", Histogram, [], "From the last slice to the moment the series counted as complete.";
    QUEUE_DEPTH = "darnet_queue_depth", Gauge, ["queue"], "Messages waiting in a queue between two stages.";
    QUEUE_CAPACITY = "darnet_queue_capacity", Gauge, ["queue"], "Messages a queue can hold before it pushes back.";
    SLICES = "darnet_slices_total", Counter, ["outcome"], "Slices received: stored, refused, duplicate or conflict.";
    INGEST_BYTES = "darnet_ingest_bytes_total", Counter, [], "Bytes of data sets received.";
    OBJECTS_IGNORED = "darnet_objects_ignored_total", Counter, ["kind"], "Objects that are no CT slice, taken and ignored.";
    ASSOCIATIONS = "darnet_associations_total", Counter, ["result"],
        "Association requests and ends: accepted, rejected, aborted or released.";
    ASSOCIATIONS_REJECTED = "darnet_association_rejects_total", Counter, ["reason"], "Association requests rejected, by reason.";
    ASSOCIATIONS_ACTIVE = "darnet_associations_active", Gauge, [], "Associations open now.";
    PROTOCOL_ERRORS = "darnet_protocol_errors_total", Counter, ["kind"], "Violations of the DICOM upper layer protocol by a peer.";
    ECHOES = "darnet_echoes_total", Counter, [], "C-ECHO requests answered.";
    SERIES_OPEN = "darnet_series_open", Gauge, [], "Series that are not complete yet.";
    SERIES_COMPLETED = "darnet_series_completed_total", Counter, ["cause"], "Series that became complete, by cause.";
    SERIES_REOPENED = "darnet_series_reopened_total", Counter, [], "Complete series that got another slice.";
    SPECULATIONS = "darnet_speculations_total", Counter, ["result"], "Inferences started before completion: used or cancelled.";
    AHEAD_ADVANCES = "darnet_ahead_advances_total", Counter, ["result"],
        "Steps of computing ahead of the last slice: done, cancelled by a run or failed.";
    AHEAD_MISPREDICTIONS = "darnet_ahead_mispredictions_total", Counter, [],
        "Guesses of a series' extent, with work done for them, that a slice or the end of the series contradicted.";
    AHEAD_REUSED = "darnet_ahead_reused_ratio", Gauge, [],
        "Share of what can be computed ahead that the last run took over, 0 to 1.";
    OUTCOMES = "darnet_outcomes_total", Counter, ["outcome", "reason"], "Outcomes published; the reason is none for a result.";
    ALERTS = "darnet_alerts_total", Counter, ["level", "class"], "Alerts raised.";
    OUTBOX_ITEMS = "darnet_outbox_items", Gauge, ["state"], "Items of the outbox: pending, sending, delivered or dead.";
    OUTBOX_ATTEMPTS = "darnet_outbox_attempts_total", Counter, ["sink", "result"],
        "Delivery attempts: delivered, failed (to be retried) or dead.";
    RECOVERED_SERIES = "darnet_recovered_series_total", Counter, [], "Series resumed after a start.";
    RECOVERED_SLICES = "darnet_recovered_slices_total", Counter, [], "Slices found in journals after a start.";
    RECOVERY_CUT_BYTES = "darnet_recovery_cut_bytes_total", Counter, [], "Bytes of torn records cut from journals after a start.";
    BACKEND_FALLBACKS = "darnet_backend_fallbacks_total", Counter, ["backend"],
        "Runs of the network that failed on a device and were done by the cpu backend.";
    BACKEND_RETRIES = "darnet_backend_retries_total", Counter, ["backend", "result"],
        "Attempts to open a failed device again: opened or failed.";
    BACKEND_DEGRADED = "darnet_backend_degraded", Gauge, [], "1 while the cpu backend stands in for a device, 0 otherwise.";
    DEVICE_RESAMPLING_FAILED = "darnet_device_resampling_failures_total", Counter, [],
        "Failures of resampling on a device; it was done in memory.";
    PANICS = "darnet_panics_total", Counter, ["stage"],
        "Panics contained; each ended one study as no result or one delivery attempt as failed.";
    CONFIG_FAULTS = "darnet_config_faults_total", Counter, [], "Faults found in configurations that were not taken.";
    HTTP_REQUESTS = "darnet_http_requests_total", Counter, ["route", "status"], "Requests to the web server.";
    BUILD_INFO = "darnet_build_info", Gauge, ["version", "commit", "backend", "model"], "Always 1; the labels say what runs.";
    START_TIME = "darnet_process_start_time_seconds", Gauge, [], "Unix time at which the process started its metrics.";
    RESIDENT_BYTES = "darnet_resident_memory_bytes", Gauge, [], "Resident set of the process (VmRSS).";
}

/// Why metrics cannot be recorded.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// Another recorder was installed in this process.
    #[error("install the metrics recorder: {0}")]
    Install(String),
}

static INSTALLED: OnceLock<MetricsHandle> = OnceLock::new();
static INSTALLING: Mutex<()> = Mutex::new(());

/// Reads what the process recorded. Cheap to clone.
#[derive(Clone)]
pub struct MetricsHandle {
    inner: PrometheusHandle,
}

impl std::fmt::Debug for MetricsHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("MetricsHandle")
    }
}

impl MetricsHandle {
    /// Installs the recorder of the process and describes every metric. A second call returns the same handle.
    pub fn install() -> Result<Self, MetricsError> {
        let _guard = INSTALLING.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(handle) = INSTALLED.get() {
            return Ok(handle.clone());
        }
        let fault = |e: &dyn std::fmt::Display| MetricsError::Install(e.to_string());
        let mut builder = PrometheusBuilder::new();
        for metric in METRICS.iter().filter(|m| m.kind == MetricKind::Histogram) {
            builder = builder
                .set_buckets_for_metric(Matcher::Full(metric.name.into()), &LATENCY_BUCKETS_S)
                .map_err(|e| fault(&e))?;
        }
        let inner = builder.install_recorder().map_err(|e| fault(&e))?;
        describe_all();
        let unix_s =
            std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64());
        metrics::gauge!(names::START_TIME).set(unix_s);
        Ok(INSTALLED.get_or_init(|| Self { inner }).clone())
    }

    /// The metrics in the Prometheus text format 0.0.4. Reads the resident set first.
    pub fn render(&self) -> String {
        if let Some(bytes) = resident_bytes() {
            metrics::gauge!(names::RESIDENT_BYTES).set(bytes as f64);
        }
        self.inner.render()
    }

    /// Folds recorded histogram samples into their buckets. Call it every few seconds: samples since the last call or
    /// the last [`MetricsHandle::render`] are held one by one.
    pub fn upkeep(&self) {
        self.inner.run_upkeep();
    }
}

fn describe_all() {
    for m in METRICS {
        let unit = if m.name.ends_with("_seconds") {
            Unit::Seconds
        } else if m.name.contains("_bytes") {
            Unit::Bytes
        } else {
            Unit::Count
        };
        match m.kind {
            MetricKind::Counter => metrics::describe_counter!(m.name, unit, m.help),
            MetricKind::Gauge => metrics::describe_gauge!(m.name, unit, m.help),
            MetricKind::Histogram => metrics::describe_histogram!(m.name, unit, m.help),
        }
    }
}

/// VmRSS of this process, bytes; none where `/proc` does not tell.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_grow_and_span_100_us_to_60_s() {
        assert!(LATENCY_BUCKETS_S.windows(2).all(|w| w[0] < w[1] && w[1] / w[0] <= 2.500001));
        assert_eq!((LATENCY_BUCKETS_S[0], LATENCY_BUCKETS_S[19]), (0.0001, 60.0));
    }

    #[test]
    fn names_follow_the_conventions() {
        for m in METRICS {
            assert!(m.name.starts_with("darnet_"), "{}", m.name);
            assert_eq!(m.name.ends_with("_total"), m.kind == MetricKind::Counter, "{}", m.name);
            assert!(m.help.ends_with('.'), "{}", m.name);
            assert_eq!(METRICS.iter().filter(|o| o.name == m.name).count(), 1, "{} twice", m.name);
        }
    }

    #[test]
    fn resident_set_is_read() {
        assert!(resident_bytes().is_some_and(|b| b > 1 << 20));
    }

    #[test]
    fn second_install_returns_the_same_recorder() {
        let a = MetricsHandle::install().unwrap();
        let b = MetricsHandle::install().unwrap();
        metrics::counter!("darnet_test_installs_total").increment(3);
        assert!(a.render().contains("darnet_test_installs_total"));
        assert!(b.render().contains("darnet_test_installs_total"));
        a.upkeep();
    }
}
