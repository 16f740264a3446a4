//! Telemetry: one event type gives both its log line and its metric.
//!
//! Input: event structs from [`events`], emitted by the pipeline and by the threads of `report` and `web`. Output: log
//! lines on stderr ([`init_logging`]) and the Prometheus text of [`MetricsHandle::render`].
//!
//! Invariants: log messages are constant and carry fields; metric labels come from closed sets (or from the
//! configuration: sink, backend, model), so the number of series is bounded; no event takes a DICOM UID, a patient's
//! data, an AE title or a path. A study and a series are named by their [`StudyHash`], keyed for each installation.
//!
//! Absent: an HTTP listener (it is in `web`) and any knowledge of a stage. A leaf: imports no module of this crate.

pub mod events;
mod hash;
pub mod incidents;
mod log;
mod recorder;
mod redact;

pub use hash::{HASH_HEX_LEN, HasherError, InvalidStudyHash, StudyHash, StudyHasher};
pub use log::{LogConfig, LogError, LogFormat, init_logging};
pub use recorder::{LATENCY_BUCKETS_S, METRICS, MetricInfo, MetricKind, MetricsError, MetricsHandle};
pub use redact::Redacted;
