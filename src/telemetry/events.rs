//! The events: each gives its log line and its metric by `emit`.
//!
//! Fields are counts, durations, names from closed sets (`&'static str`) and [`StudyHash`]es. There is no field that
//! could take a patient's data; text of peers does not fit in.

use std::time::Duration;

use metrics::{counter, gauge, histogram};
use tracing::{debug, error, info, trace, warn};

use super::hash::StudyHash;
use super::recorder::names;

/// A stage of the pipeline, as the label of `darnet_stage_seconds`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stage {
    /// From the first to the last P-DATA byte of a slice.
    Ingest,
    /// Append and sync.
    Journal,
    /// Pixels to HU.
    Decode,
    /// Geometry, slot, completion rules.
    Assemble,
    /// In-plane resampling of a slice, or the gathering along depth.
    Resample,
    /// The network.
    Infer,
    /// CAM and pictures.
    Explain,
    /// The commit of the outcome and its outbox items.
    Publish,
}

impl Stage {
    /// Every stage in the order of the data.
    pub const ALL: [Stage; 8] = [
        Stage::Ingest,
        Stage::Journal,
        Stage::Decode,
        Stage::Assemble,
        Stage::Resample,
        Stage::Infer,
        Stage::Explain,
        Stage::Publish,
    ];

    /// The label.
    pub const fn as_str(self) -> &'static str {
        match self {
            Stage::Ingest => "ingest",
            Stage::Journal => "journal",
            Stage::Decode => "decode",
            Stage::Assemble => "assemble",
            Stage::Resample => "resample",
            Stage::Infer => "infer",
            Stage::Explain => "explain",
            Stage::Publish => "publish",
        }
    }
}

/// The daemon is up.
#[derive(Clone, Debug)]
pub struct ServerStarted<'a> {
    /// Version of the program.
    pub version: &'a str,
    /// Commit it was built from.
    pub commit: &'a str,
    /// Inference backend in use.
    pub backend: &'a str,
    /// Instruction set of its kernels, if that says anything.
    pub instruction_set: &'a str,
    /// Why it is this backend.
    pub choice: &'a str,
    /// Model id.
    pub model: &'a str,
    /// What the model's manifest says it is for.
    pub intended_use: &'a str,
}

impl ServerStarted<'_> {
    /// Logs and records.
    pub fn emit(&self) {
        info!(
            version = self.version,
            commit = self.commit,
            backend = self.backend,
            instruction_set = self.instruction_set,
            choice = self.choice,
            model = self.model,
            intended_use = self.intended_use,
            "server started"
        );
        gauge!(
            names::BUILD_INFO,
            "version" => self.version.to_owned(),
            "commit" => self.commit.to_owned(),
            "backend" => self.backend.to_owned(),
            "model" => self.model.to_owned()
        )
        .set(1.0);
    }
}

/// The daemon stops.
#[derive(Clone, Copy, Debug)]
pub struct ServerStopping {
    /// What asked for it: `signal`, `request`, `fault`.
    pub cause: &'static str,
}

impl ServerStopping {
    /// Logs.
    pub fn emit(&self) {
        info!(cause = self.cause, "server stopping");
    }
}

/// An association was accepted.
#[derive(Clone, Copy, Debug)]
pub struct AssociationAccepted {
    /// Number of the association in this process.
    pub association: u64,
    /// Associations open now, this one included.
    pub active: usize,
}

impl AssociationAccepted {
    /// Logs and records.
    pub fn emit(&self) {
        debug!(association = self.association, active = self.active, "association accepted");
        counter!(names::ASSOCIATIONS, "result" => "accepted").increment(1);
        gauge!(names::ASSOCIATIONS_ACTIVE).set(self.active as f64);
    }
}

/// An association was rejected.
#[derive(Clone, Copy, Debug)]
pub struct AssociationRejected {
    /// Why, from a closed set: `calling_ae_title`, `called_ae_title`, `local_limit`, …
    pub reason: &'static str,
}

impl AssociationRejected {
    /// Logs and records.
    pub fn emit(&self) {
        warn!(reason = self.reason, "association rejected");
        counter!(names::ASSOCIATIONS, "result" => "rejected").increment(1);
        counter!(names::ASSOCIATIONS_REJECTED, "reason" => self.reason).increment(1);
    }
}

/// An association ended without a release.
#[derive(Clone, Copy, Debug)]
pub struct AssociationAborted {
    /// Number of the association in this process.
    pub association: u64,
    /// Associations open now.
    pub active: usize,
}

impl AssociationAborted {
    /// Logs and records.
    pub fn emit(&self) {
        warn!(association = self.association, active = self.active, "association aborted");
        counter!(names::ASSOCIATIONS, "result" => "aborted").increment(1);
        gauge!(names::ASSOCIATIONS_ACTIVE).set(self.active as f64);
    }
}

/// An association was released.
#[derive(Clone, Copy, Debug)]
pub struct AssociationClosed {
    /// Number of the association in this process.
    pub association: u64,
    /// Associations open now.
    pub active: usize,
    /// Objects it brought.
    pub objects: u64,
}

impl AssociationClosed {
    /// Logs and records.
    pub fn emit(&self) {
        debug!(association = self.association, active = self.active, objects = self.objects, "association released");
        counter!(names::ASSOCIATIONS, "result" => "released").increment(1);
        gauge!(names::ASSOCIATIONS_ACTIVE).set(self.active as f64);
    }
}

/// A peer broke the upper layer protocol.
#[derive(Clone, Copy, Debug)]
pub struct ProtocolViolated {
    /// What it did, from a closed set.
    pub kind: &'static str,
}

impl ProtocolViolated {
    /// Logs and records.
    pub fn emit(&self) {
        warn!(kind = self.kind, "protocol violated by a peer");
        counter!(names::PROTOCOL_ERRORS, "kind" => self.kind).increment(1);
    }
}

/// A C-ECHO was answered.
#[derive(Clone, Copy, Debug)]
pub struct EchoAnswered;

impl EchoAnswered {
    /// Logs and records.
    pub fn emit(&self) {
        debug!("echo answered");
        counter!(names::ECHOES).increment(1);
    }
}

/// Bytes of a data set came in.
#[derive(Clone, Copy, Debug)]
pub struct BytesReceived {
    /// How many.
    pub bytes: u64,
}

impl BytesReceived {
    /// Records; no log line, there is one for each slice.
    pub fn emit(&self) {
        counter!(names::INGEST_BYTES).increment(self.bytes);
    }
}

/// A slice is in the journal.
#[derive(Clone, Copy, Debug)]
pub struct SliceStored<'a> {
    /// Its series.
    pub series: &'a StudyHash,
    /// Slices of the series, this one included.
    pub slices: u64,
}

impl SliceStored<'_> {
    /// Logs and records.
    pub fn emit(&self) {
        trace!(series = %self.series, slices = self.slices, "slice stored");
        counter!(names::SLICES, "outcome" => "stored").increment(1);
    }
}

/// A slice was answered with a failure.
#[derive(Clone, Copy, Debug)]
pub struct SliceRefused {
    /// Why, from a closed set.
    pub reason: &'static str,
    /// The DICOM status sent.
    pub status: u16,
}

impl SliceRefused {
    /// Logs and records.
    pub fn emit(&self) {
        warn!(reason = self.reason, status = self.status, "slice refused");
        counter!(names::SLICES, "outcome" => "refused").increment(1);
    }
}

/// A slice came again.
#[derive(Clone, Copy, Debug)]
pub struct SliceDuplicate<'a> {
    /// Its series.
    pub series: &'a StudyHash,
    /// Whether its content differs from the first.
    pub conflict: bool,
}

impl SliceDuplicate<'_> {
    /// Logs and records.
    pub fn emit(&self) {
        if self.conflict {
            warn!(series = %self.series, "slice conflicts with an earlier one");
            counter!(names::SLICES, "outcome" => "conflict").increment(1);
        } else {
            debug!(series = %self.series, "slice came again");
            counter!(names::SLICES, "outcome" => "duplicate").increment(1);
        }
    }
}

/// An object that is no CT slice was taken and ignored.
#[derive(Clone, Copy, Debug)]
pub struct ObjectIgnored {
    /// What it is, from a closed set: `dose_report`, `presentation_state`, `private`, …
    pub kind: &'static str,
}

impl ObjectIgnored {
    /// Logs and records.
    pub fn emit(&self) {
        debug!(kind = self.kind, "object ignored");
        counter!(names::OBJECTS_IGNORED, "kind" => self.kind).increment(1);
    }
}

/// A stage has worked.
#[derive(Clone, Copy, Debug)]
pub struct StageTimed {
    /// Which.
    pub stage: Stage,
    /// How long.
    pub took: Duration,
}

impl StageTimed {
    /// Logs and records.
    pub fn emit(&self) {
        trace!(stage = self.stage.as_str(), took_us = self.took.as_micros() as u64, "stage done");
        histogram!(names::STAGE_SECONDS, "stage" => self.stage.as_str()).record(self.took.as_secs_f64());
    }
}

/// How full a queue is.
#[derive(Clone, Copy, Debug)]
pub struct QueueObserved {
    /// Name of the queue.
    pub queue: &'static str,
    /// Messages in it.
    pub depth: usize,
    /// Messages it can hold.
    pub capacity: usize,
}

impl QueueObserved {
    /// Records; no log line.
    pub fn emit(&self) {
        gauge!(names::QUEUE_DEPTH, "queue" => self.queue).set(self.depth as f64);
        gauge!(names::QUEUE_CAPACITY, "queue" => self.queue).set(self.capacity as f64);
    }
}

/// The first slice of a series came.
#[derive(Clone, Copy, Debug)]
pub struct SeriesOpened<'a> {
    /// Its study.
    pub study: &'a StudyHash,
    /// The series.
    pub series: &'a StudyHash,
    /// Series open now, this one included.
    pub open: usize,
}

impl SeriesOpened<'_> {
    /// Logs and records.
    pub fn emit(&self) {
        info!(study = %self.study, series = %self.series, open = self.open, "series opened");
        gauge!(names::SERIES_OPEN).set(self.open as f64);
    }
}

/// A series is complete.
#[derive(Clone, Copy, Debug)]
pub struct SeriesCompleted<'a> {
    /// The series.
    pub series: &'a StudyHash,
    /// Why, from a closed set: `declared`, `released`, `idle`, `flushed`.
    pub cause: &'static str,
    /// Its slices.
    pub slices: u64,
    /// From its last slice to now.
    pub waited: Duration,
    /// Series open now.
    pub open: usize,
}

impl SeriesCompleted<'_> {
    /// Logs and records.
    pub fn emit(&self) {
        info!(
            series = %self.series,
            cause = self.cause,
            slices = self.slices,
            waited_ms = self.waited.as_millis() as u64,
            open = self.open,
            "series completed"
        );
        counter!(names::SERIES_COMPLETED, "cause" => self.cause).increment(1);
        histogram!(names::COMPLETION_WAIT).record(self.waited.as_secs_f64());
        gauge!(names::SERIES_OPEN).set(self.open as f64);
    }
}

/// A complete series got another slice.
#[derive(Clone, Copy, Debug)]
pub struct SeriesReopened<'a> {
    /// The series.
    pub series: &'a StudyHash,
    /// Revisions published so far.
    pub revision: u32,
    /// Series open now, this one included.
    pub open: usize,
}

impl SeriesReopened<'_> {
    /// Logs and records.
    pub fn emit(&self) {
        warn!(series = %self.series, revision = self.revision, open = self.open, "series reopened by a late slice");
        counter!(names::SERIES_REOPENED).increment(1);
        gauge!(names::SERIES_OPEN).set(self.open as f64);
    }
}

/// An inference that was started before completion was used, or cancelled.
#[derive(Clone, Copy, Debug)]
pub struct SpeculationEnded<'a> {
    /// The series.
    pub series: &'a StudyHash,
    /// Whether its result was published.
    pub used: bool,
}

impl SpeculationEnded<'_> {
    /// Logs and records.
    pub fn emit(&self) {
        let result = if self.used { "used" } else { "cancelled" };
        debug!(series = %self.series, result, "speculative inference ended");
        counter!(names::SPECULATIONS, "result" => result).increment(1);
    }
}

/// A step of computing ahead of the last slice ended.
#[derive(Clone, Copy, Debug)]
pub struct AheadAdvanced<'a> {
    /// The series.
    pub series: &'a StudyHash,
    /// Planes that were final for it.
    pub planes: usize,
    /// How it ended: `done`, `cancelled` or `failed`.
    pub result: &'static str,
    /// How long it took.
    pub took: Duration,
}

impl AheadAdvanced<'_> {
    /// Logs and records.
    pub fn emit(&self) {
        let took_ms = self.took.as_millis() as u64;
        debug!(series = %self.series, planes = self.planes, result = self.result, took_ms, "computed ahead");
        counter!(names::AHEAD_ADVANCES, "result" => self.result).increment(1);
    }
}

/// What a series was expected to become turned out wrong, and work was done for it.
#[derive(Clone, Copy, Debug)]
pub struct AheadMispredicted<'a> {
    /// The series.
    pub series: &'a StudyHash,
}

impl AheadMispredicted<'_> {
    /// Logs and records.
    pub fn emit(&self) {
        debug!(series = %self.series, "the extent of a series was guessed wrong");
        counter!(names::AHEAD_MISPREDICTIONS).increment(1);
    }
}

/// A run ended, and took over so much of what can be computed ahead.
#[derive(Clone, Copy, Debug)]
pub struct AheadReused<'a> {
    /// The series.
    pub series: &'a StudyHash,
    /// Share, 0 to 1.
    pub share: f64,
}

impl AheadReused<'_> {
    /// Logs and records.
    pub fn emit(&self) {
        debug!(series = %self.series, share = self.share, "took over what was computed ahead");
        gauge!(names::AHEAD_REUSED).set(self.share);
    }
}

/// An outcome is committed.
#[derive(Clone, Copy, Debug)]
pub struct OutcomePublished<'a> {
    /// Its study.
    pub study: &'a StudyHash,
    /// Its series.
    pub series: &'a StudyHash,
    /// Revision, from 1.
    pub revision: u32,
    /// `result` or `no_result`.
    pub outcome: &'static str,
    /// The reason of `no_result`.
    pub reason: Option<&'static str>,
    /// From the last P-DATA byte of the last slice to the commit; none for files and after a restart.
    pub last_slice_to_alert: Option<Duration>,
}

impl OutcomePublished<'_> {
    /// Logs and records.
    pub fn emit(&self) {
        let reason = self.reason.unwrap_or("none");
        info!(
            study = %self.study,
            series = %self.series,
            revision = self.revision,
            outcome = self.outcome,
            reason,
            last_slice_to_alert_ms = self.last_slice_to_alert.map(|d| d.as_secs_f64() * 1e3),
            "outcome published"
        );
        counter!(names::OUTCOMES, "outcome" => self.outcome, "reason" => reason).increment(1);
        if let Some(latency) = self.last_slice_to_alert {
            histogram!(names::LAST_SLICE_TO_ALERT).record(latency.as_secs_f64());
        }
    }
}

/// An alert is committed.
#[derive(Clone, Copy, Debug)]
pub struct AlertRaised<'a> {
    /// Its study.
    pub study: &'a StudyHash,
    /// `urgent` or `routine`.
    pub level: &'static str,
    /// The class, or `none` for an alert that there is no result.
    pub class: &'static str,
}

impl AlertRaised<'_> {
    /// Logs and records.
    pub fn emit(&self) {
        info!(study = %self.study, level = self.level, class = self.class, "alert raised");
        counter!(names::ALERTS, "level" => self.level, "class" => self.class).increment(1);
    }
}

/// A sink took an item.
#[derive(Clone, Copy, Debug)]
pub struct SinkDelivered<'a> {
    /// Name of the sink, from the configuration.
    pub sink: &'a str,
    /// Number of the item in the outbox.
    pub item: i64,
    /// Attempts it took.
    pub attempts: u32,
    /// How long the last one took.
    pub took: Duration,
}

impl SinkDelivered<'_> {
    /// Logs and records.
    pub fn emit(&self) {
        info!(
            sink = self.sink,
            item = self.item,
            attempts = self.attempts,
            took_ms = self.took.as_millis() as u64,
            "item delivered"
        );
        counter!(names::OUTBOX_ATTEMPTS, "sink" => self.sink.to_owned(), "result" => "delivered").increment(1);
    }
}

/// A sink did not take an item; it will be tried again.
#[derive(Clone, Copy, Debug)]
pub struct SinkFailed<'a> {
    /// Name of the sink, from the configuration.
    pub sink: &'a str,
    /// Number of the item in the outbox.
    pub item: i64,
    /// Attempts so far.
    pub attempts: u32,
    /// The sink's own words; sinks repeat nothing a peer sent.
    pub detail: &'a str,
    /// Until the next attempt.
    pub retry_in: Duration,
}

impl SinkFailed<'_> {
    /// Logs and records.
    pub fn emit(&self) {
        warn!(
            sink = self.sink,
            item = self.item,
            attempts = self.attempts,
            detail = self.detail,
            retry_in_ms = self.retry_in.as_millis() as u64,
            "item not delivered, to be retried"
        );
        counter!(names::OUTBOX_ATTEMPTS, "sink" => self.sink.to_owned(), "result" => "failed").increment(1);
    }
}

/// An item is given up until a person resends it.
#[derive(Clone, Copy, Debug)]
pub struct SinkDead<'a> {
    /// Name of the sink, from the configuration.
    pub sink: &'a str,
    /// Number of the item in the outbox.
    pub item: i64,
    /// Attempts made.
    pub attempts: u32,
    /// The sink's own words; sinks repeat nothing a peer sent.
    pub detail: &'a str,
}

impl SinkDead<'_> {
    /// Logs and records.
    pub fn emit(&self) {
        error!(
            sink = self.sink,
            item = self.item,
            attempts = self.attempts,
            detail = self.detail,
            "item dead, resend it by hand"
        );
        counter!(names::OUTBOX_ATTEMPTS, "sink" => self.sink.to_owned(), "result" => "dead").increment(1);
    }
}

/// How many items the outbox holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OutboxObserved {
    /// Waiting for an attempt.
    pub pending: u64,
    /// In an attempt.
    pub sending: u64,
    /// Taken by their sink.
    pub delivered: u64,
    /// Given up.
    pub dead: u64,
}

impl OutboxObserved {
    /// Records; no log line.
    pub fn emit(&self) {
        for (state, n) in
            [("pending", self.pending), ("sending", self.sending), ("delivered", self.delivered), ("dead", self.dead)]
        {
            gauge!(names::OUTBOX_ITEMS, "state" => state).set(n as f64);
        }
    }
}

/// The outbox cannot use the store for now.
#[derive(Clone, Copy, Debug)]
pub struct OutboxStoreFailed<'a> {
    /// The store's error.
    pub detail: &'a str,
}

impl OutboxStoreFailed<'_> {
    /// Logs.
    pub fn emit(&self) {
        error!(detail = self.detail, "outbox cannot use the store, to be retried");
    }
}

/// The journals of an earlier run are read.
#[derive(Clone, Copy, Debug)]
pub struct RecoveryDone {
    /// Series found.
    pub series: u64,
    /// Slices found.
    pub slices: u64,
    /// Bytes of torn records cut off.
    pub cut_bytes: u64,
    /// How long it took.
    pub took: Duration,
}

impl RecoveryDone {
    /// Logs and records.
    pub fn emit(&self) {
        info!(
            series = self.series,
            slices = self.slices,
            cut_bytes = self.cut_bytes,
            took_ms = self.took.as_millis() as u64,
            "recovery done"
        );
        counter!(names::RECOVERED_SERIES).increment(self.series);
        counter!(names::RECOVERED_SLICES).increment(self.slices);
        counter!(names::RECOVERY_CUT_BYTES).increment(self.cut_bytes);
    }
}

/// A run of the network failed on a device and was done by the cpu backend.
#[derive(Clone, Copy, Debug)]
pub struct BackendFell<'a> {
    /// The device's backend.
    pub backend: &'static str,
    /// Its error.
    pub detail: &'a str,
    /// Until the device is opened again; none if it stays open.
    pub retry_in: Option<Duration>,
}

impl BackendFell<'_> {
    /// Logs and records.
    pub fn emit(&self) {
        let retry_in_s = self.retry_in.map(|wait| wait.as_secs());
        error!(backend = self.backend, detail = self.detail, retry_in_s, "device failed, cpu stands in");
        counter!(names::BACKEND_FALLBACKS, "backend" => self.backend).increment(1);
    }
}

/// A device that failed was opened again, or could not be.
#[derive(Clone, Copy, Debug)]
pub struct BackendRetried<'a> {
    /// The device's backend.
    pub backend: &'static str,
    /// `opened` or `failed`.
    pub result: &'static str,
    /// Why not, or how long it was away.
    pub detail: &'a str,
}

impl BackendRetried<'_> {
    /// Logs and records.
    pub fn emit(&self) {
        warn!(backend = self.backend, result = self.result, detail = self.detail, "failed device tried again");
        counter!(names::BACKEND_RETRIES, "backend" => self.backend, "result" => self.result).increment(1);
    }
}

/// Whether the cpu backend stands in for a device.
#[derive(Clone, Copy, Debug)]
pub struct BackendDegraded {
    /// Whether it does.
    pub degraded: bool,
}

impl BackendDegraded {
    /// Records; no log line.
    pub fn emit(&self) {
        gauge!(names::BACKEND_DEGRADED).set(f64::from(u8::from(self.degraded)));
    }
}

/// Resampling on a device failed; it is done in memory.
#[derive(Clone, Copy, Debug)]
pub struct DeviceResamplingFailed<'a> {
    /// The device's error.
    pub detail: &'a str,
}

impl DeviceResamplingFailed<'_> {
    /// Logs and records.
    pub fn emit(&self) {
        warn!(detail = self.detail, "resampling on the device failed, done in memory");
        counter!(names::DEVICE_RESAMPLING_FAILED).increment(1);
    }
}

/// A panic was caught. Its message is not logged: it may quote what a peer sent.
#[derive(Clone, Copy, Debug)]
pub struct PanicContained<'a> {
    /// Where: a stage's name, `sink`, `web`.
    pub stage: &'static str,
    /// The series that ends as no result, if any.
    pub series: Option<&'a StudyHash>,
}

impl PanicContained<'_> {
    /// Logs and records.
    pub fn emit(&self) {
        error!(stage = self.stage, series = self.series.map(StudyHash::as_str), "panic contained");
        counter!(names::PANICS, "stage" => self.stage).increment(1);
    }
}

/// A configuration was not taken because of this fault.
#[derive(Clone, Copy, Debug)]
pub struct ConfigFault<'a> {
    /// The fault: key, what was expected, what was got.
    pub fault: &'a str,
}

impl ConfigFault<'_> {
    /// Logs and records.
    pub fn emit(&self) {
        error!(fault = self.fault, "configuration fault");
        counter!(names::CONFIG_FAULTS).increment(1);
    }
}

/// The web server answers.
#[derive(Clone, Copy, Debug)]
pub struct WebStarted {
    /// The bound port.
    pub port: u16,
    /// Whether a token is asked for.
    pub token: bool,
}

impl WebStarted {
    /// Logs.
    pub fn emit(&self) {
        info!(port = self.port, token = self.token, "web server started");
    }
}

/// A request was answered.
#[derive(Clone, Copy, Debug)]
pub struct RequestAnswered {
    /// The route, from a closed set; `other` for unknown paths.
    pub route: &'static str,
    /// HTTP status.
    pub status: u16,
}

impl RequestAnswered {
    /// Logs and records.
    pub fn emit(&self) {
        trace!(route = self.route, status = self.status, "request answered");
        // An HTTP status has three digits: the label's values are bounded by what the routes return.
        counter!(names::HTTP_REQUESTS, "route" => self.route, "status" => self.status.to_string()).increment(1);
    }
}
