//! The publisher: from a judged series to a committed outcome, the outbox, and pictures.
//!
//! Input: [`PublishJob`]s. Output: a row in the store and items in the outbox in one transaction, the publication note
//! in the journal, a [`Published`] to the assembler, and later the pictures. Invariants: UIDs are fixed before anything
//! leaves; repeating a publication after a restart yields the same UIDs and no second item; the alert never waits for
//! a picture.
//!
//! Deliberately absent: DICOM, HL7 and FHIR objects (sinks of `report`), the dashboard (`web`).

use std::cmp::Reverse;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::Config;
use crate::dicom::header::SliceHeader;
use crate::explain::{CamGeometry, RenderOptions, SeriesToExplain, explain_series};
use crate::model::Model;
use crate::model::manifest::SourceWindow;
use crate::pipeline::StartError;
use crate::pipeline::ingest::{Journals, PublishedNote};
use crate::pipeline::jobs::{Breakdown, Inferred, Judged, PublishJob, Published};
use crate::report::calibration::Calibration;
use crate::report::outbox::{Outbox, SystemClock};
use crate::report::outcome::{
    CamInfo, LatencyMs, ModelInfo, Outcome, Reconstruction, ResultDocument, ResultLatency, SeriesReport,
};
use crate::report::policy::{AlertPolicy, Decision};
use crate::report::sink::Sink;
use crate::report::webhook::{WEBHOOK_SINK, Webhook, WebhookConfig, WebhookEvents};
use crate::resample::cpu::Window;
use crate::resample::lung::LungReport;
use crate::store::{
    DecidedBody, NewOutcome, OutboxDraft, OutcomeBody, Restated, ResultRecord, Store, StoreError, StoreHandle, unix_ms,
};
use crate::telemetry::events::{self, Stage};
use crate::telemetry::{MetricsHandle, StudyHash, incidents};
use crate::volume::refusal::{Reason, Refusal};

/// Pictures waiting to be made; a further one is not made and counted (its result stands all the same).
const RENDER_QUEUE: usize = 32;
/// How often old data is looked for.
const HOUSEKEEPING: Duration = Duration::from_secs(3600);
/// How often the metrics recorder folds its samples.
const UPKEEP: Duration = Duration::from_secs(5);

/// Sharpness of a reconstruction kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KernelClass {
    /// Soft tissue.
    Soft,
    /// Between.
    Medium,
    /// Lung or bone.
    Sharp,
    /// The name says nothing known.
    Unknown,
}

/// Which reconstruction of a study is live.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Preference {
    /// Kernels preferred over the others.
    pub kernels: Vec<KernelClass>,
    /// Whether thinner slices are preferred among equals.
    pub thinnest: bool,
}

impl Default for Preference {
    fn default() -> Self {
        Self { kernels: vec![KernelClass::Soft, KernelClass::Medium], thinnest: true }
    }
}

/// What is rendered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ResultsConfig {
    /// Whether pictures and the summary page are made.
    pub render: bool,
    /// Slices shown.
    pub top_slices: usize,
}

impl Default for ResultsConfig {
    fn default() -> Self {
        Self { render: true, top_slices: 5 }
    }
}

impl ResultsConfig {
    /// Every fault, as a sentence fragment.
    pub fn validate(&self) -> Vec<String> {
        let bound = 1..=64;
        if bound.contains(&self.top_slices) {
            return Vec::new();
        }
        vec![format!("results.top_slices: expected 1 to 64, got {}", self.top_slices)]
    }
}

/// Reads the sharpness from ConvolutionKernel, by the vendors' published naming: Siemens letters with two digits (below
/// 36 soft, below 50 medium), GE names, Canon FC numbers, Philips letters.
pub fn kernel_class(name: &str) -> KernelClass {
    let name = name.split('\\').next().unwrap_or_default().trim().to_ascii_uppercase();
    if ["LUNG", "BONE", "EDGE", "SHARP"].iter().any(|w| name.contains(w)) {
        return KernelClass::Sharp;
    }
    if ["SOFT", "SMOOTH"].iter().any(|w| name.contains(w)) {
        return KernelClass::Soft;
    }
    if ["STAND", "CHEST", "MEDIUM", "DETAIL"].iter().any(|w| name.contains(w)) {
        return KernelClass::Medium;
    }
    let letters: String = name.chars().take_while(char::is_ascii_alphabetic).collect();
    let digits: String = name.chars().skip(letters.len()).take_while(char::is_ascii_digit).collect();
    let number: Option<u32> = digits.parse().ok();
    match (letters.as_str(), number) {
        ("FC", Some(n)) if n < 20 => KernelClass::Medium,
        ("FC", Some(_)) => KernelClass::Sharp,
        ("A" | "B", None) => KernelClass::Soft,
        ("C", None) => KernelClass::Medium,
        ("D" | "E" | "F" | "L" | "YA" | "YB" | "YC" | "YD", None) => KernelClass::Sharp,
        (_, Some(n)) if digits.len() == 2 && letters.len() <= 2 => match n {
            0..36 => KernelClass::Soft,
            36..50 => KernelClass::Medium,
            _ => KernelClass::Sharp,
        },
        _ => KernelClass::Unknown,
    }
}

/// The place of a result among those of its study; the largest is live: a result before no result, one that covers the
/// lungs, a preferred kernel, the thinnest slices.
type Rank = (bool, bool, bool, i64);

fn rank(preference: &Preference, outcome: Outcome, r: &Reconstruction) -> Rank {
    let class = r.kernel.as_deref().map_or(KernelClass::Unknown, kernel_class);
    let micrometres = (r.slice_thickness_mm.or(r.spacing_mm).unwrap_or(1e3) * 1e3) as i64;
    (
        outcome == Outcome::Result,
        r.covers_lungs,
        preference.kernels.contains(&class),
        if preference.thinnest { -micrometres } else { 0 },
    )
}

/// Which of `others`, the latest results of the study's other series, ranks before the result of `series`; the first if
/// several do. A document that cannot be read ranks last; of equals the smaller hash ranks first.
fn outranked_by(preference: &Preference, mine: Rank, series: &str, others: &[ResultRecord]) -> Option<usize> {
    let mut best = (Some(mine), Reverse(series));
    let mut winner = None;
    for (i, other) in others.iter().enumerate() {
        let document = serde_json::from_str::<ResultDocument>(&other.document).ok();
        let theirs = document.map(|d| rank(preference, d.report.outcome, &d.reconstruction.unwrap_or_default()));
        let theirs = (theirs, Reverse(other.series.as_str()));
        if theirs > best {
            best = theirs;
            winner = Some(i);
        }
    }
    winner
}

/// What a publisher decides by.
struct Judgement<'a> {
    policy: &'a AlertPolicy,
    calibration: &'a Calibration,
    model: &'a ModelInfo,
    webhook: &'a WebhookConfig,
}

impl Judgement<'_> {
    /// The next edition of a result that became live or ceased to be: the alert is decided anew. None for a document
    /// that cannot be read.
    fn restate(&self, record: &ResultRecord) -> Result<Option<DecidedBody>, StoreError> {
        let Ok(mut document) = serde_json::from_str::<ResultDocument>(&record.document) else { return Ok(None) };
        // Another model's logits must not go through this one's temperature and thresholds.
        let uncalibrated = Calibration::none();
        let calibration = if document.model.sha256 == self.model.sha256 { self.calibration } else { &uncalibrated };
        let alert = self.policy.decide(&document.report, calibration, record.live);
        let told_anew = document.alert != alert && (alert.alert || record.alerted);
        document.alert = alert;
        document.live = record.live;
        document.edition = record.edition;
        let mut outbox = Vec::new();
        if self.webhook.is_enabled() && (self.webhook.events == WebhookEvents::All || told_anew) {
            outbox.push(OutboxDraft::document(WEBHOOK_SINK));
        }
        Ok(Some(DecidedBody {
            alerted: document.alert.alert,
            body: OutcomeBody { document: to_json(&document)?, outbox },
        }))
    }
}

fn to_json(document: &ResultDocument) -> Result<String, StoreError> {
    serde_json::to_string(document)
        .map_err(|_| StoreError::Invalid { operation: "commit an outcome", fault: "the document is no JSON" })
}

/// What an observer in the same process hears of a publication.
#[derive(Debug)]
pub struct ResultNotice {
    /// The document as stored and sent.
    pub document: Value,
    /// New editions of the results of other series of the study that became live or ceased to be by it, as stored and
    /// sent.
    pub restated: Vec<Value>,
    /// Seconds from the last P-DATA byte to the commit.
    pub last_slice_to_alert_s: f64,
    /// Seconds of it that were waiting for completion.
    pub completion_wait_s: f64,
    /// Seconds of the network.
    pub infer_s: f64,
    /// Share of what can be computed ahead that was, if anything can be.
    pub reused_share: Option<f64>,
    /// Where the time went; none without a result.
    pub breakdown: Option<Breakdown>,
    /// Where the pictures will be.
    pub results_dir: PathBuf,
    /// Closed when the pictures are made.
    pub rendered: Receiver<()>,
}

impl ResultNotice {
    /// Waits until the pictures are made, at most `wait`.
    pub fn wait_rendered(&self, wait: Duration) {
        let _ = self.rendered.recv_timeout(wait);
    }

    /// The report of the series inside the document.
    pub fn report(&self) -> &Value {
        &self.document["report"]
    }

    /// The summary pages that exist.
    pub fn pages(&self) -> Vec<PathBuf> {
        let Ok(entries) = std::fs::read_dir(&self.results_dir) else { return Vec::new() };
        let mut pages: Vec<PathBuf> =
            entries.flatten().map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "html")).collect();
        pages.sort();
        pages
    }
}

/// What the publisher, the renderer and the outbox are made from.
pub struct Setup {
    store: Store,
    model: ModelInfo,
    backend: &'static str,
    completion: Completion,
    policy: AlertPolicy,
    preference: Preference,
    results: ResultsConfig,
    webhook: WebhookConfig,
    sinks: Vec<Box<dyn Sink>>,
    outbox: crate::report::outbox::OutboxConfig,
    results_dir: PathBuf,
    series_dir: PathBuf,
    retention_days: u32,
    observer: Option<Sender<ResultNotice>>,
    class_names: Vec<String>,
    class_keys: Vec<String>,
    head_weight: Vec<f32>,
    window: Window,
    input_dhw: [usize; 3],
}

impl Setup {
    /// Reads calibration and secrets; opens nothing that must be closed.
    ///
    /// # Errors
    /// The calibration is not the model's, or a sink cannot be set up.
    pub fn new(
        config: &Config,
        model: &Model,
        backend: &'static str,
        store: &Store,
        results_dir: &Path,
        observer: Option<Sender<ResultNotice>>,
    ) -> Result<Self, StartError> {
        let completion = Completion::of(model)?;
        let mut sinks: Vec<Box<dyn Sink>> = Vec::new();
        if config.webhook.is_enabled() {
            sinks.push(Box::new(Webhook::new(&config.webhook).map_err(|e| StartError::Sink(e.to_string()))?));
        }
        let manifest = &model.manifest;
        Ok(Self {
            store: store.clone(),
            model: model_info(model),
            backend,
            completion,
            policy: config.alert.clone(),
            preference: config.preference.clone(),
            results: config.results.clone(),
            webhook: config.webhook.clone(),
            sinks,
            outbox: config.outbox.clone(),
            results_dir: results_dir.to_path_buf(),
            series_dir: config.data_dir.join("series"),
            retention_days: config.assembly.retention_days,
            observer,
            class_names: manifest.class_names.clone(),
            class_keys: manifest.class_keys.clone(),
            head_weight: model.weights.head_weight().to_vec(),
            window: Window {
                center_hu: manifest.preprocessing.window_center_hu,
                width_hu: manifest.preprocessing.window_width_hu,
            },
            input_dhw: manifest.architecture.input_dhw,
        })
    }

    /// Starts the outbox; makes the publisher and the renderer, which the caller gives threads.
    ///
    /// # Errors
    /// The store cannot be opened, or a thread cannot be made.
    pub fn start(
        self,
        journals: Journals,
        metrics: MetricsHandle,
    ) -> Result<(Arc<Outbox>, Publisher, Renderer), StartError> {
        let outbox = Outbox::start(&self.store, self.sinks, &self.outbox, Arc::new(SystemClock))
            .map_err(|e| StartError::Sink(e.to_string()))?;
        let outbox = Arc::new(outbox);
        let (render, jobs) = bounded(RENDER_QUEUE);
        let renderer = Renderer {
            jobs,
            options: RenderOptions { top_slices: self.results.top_slices, ..RenderOptions::default() },
            class_names: self.class_names,
            head_weight: self.head_weight,
            window: self.window,
            input_dhw: self.input_dhw,
            model: self.model.clone(),
            store: self.store.handle()?,
            metrics,
            results_dir: self.results_dir.clone(),
            series_dir: self.series_dir,
            journals: journals.clone(),
            retention_days: self.retention_days,
        };
        let publisher = Publisher {
            store: self.store.handle()?,
            model: self.model,
            backend: self.backend,
            completion: self.completion,
            policy: self.policy,
            preference: self.preference,
            webhook: self.webhook,
            results_dir: self.results_dir,
            class_keys: self.class_keys,
            observer: self.observer,
            outbox: Arc::clone(&outbox),
            journals,
            render,
            renders: self.results.render,
        };
        Ok((outbox, publisher, renderer))
    }
}

/// The model's calibration, or none; checked to be this model's.
///
/// # Errors
/// It cannot be read or belongs to another model.
pub fn calibration(model: &Model) -> Result<Calibration, StartError> {
    let calibration = match &model.calibration_text {
        Some(text) => Calibration::parse(text)?,
        None => Calibration::none(),
    };
    calibration.check_model(&model.manifest.id, &model.sha256)?;
    calibration.check_features(model.manifest.architecture.feature_shape_cdhw()[0])?;
    Ok(calibration)
}

/// What every output says of the model.
pub fn model_info(model: &Model) -> ModelInfo {
    ModelInfo {
        id: model.manifest.id.clone(),
        sha256: model.sha256.clone(),
        intended_use: model.manifest.intended_use.clone(),
        trained_on: model.manifest.trained_on.clone(),
    }
}

/// What the lung check adds to a result's notes.
pub fn lung_notes(lung: &LungReport) -> Vec<String> {
    let mut notes = Vec::new();
    if lung.crop_cuts_lung {
        notes.push(format!("the centre crop leaves lung outside ({:.0} mm)", lung.crop_cut_mm));
    }
    if lung.lung_truncated_top {
        notes.push("lung reaches the slice nearest the head: the scan may not cover the apices".to_owned());
    }
    if lung.lung_truncated_bottom {
        notes.push("lung reaches the slice nearest the feet: the scan may not cover the bases".to_owned());
    }
    notes
}

/// The publisher; owned by its thread.
pub struct Publisher {
    store: StoreHandle,
    model: ModelInfo,
    backend: &'static str,
    completion: Completion,
    policy: AlertPolicy,
    preference: Preference,
    webhook: WebhookConfig,
    results_dir: PathBuf,
    class_keys: Vec<String>,
    observer: Option<Sender<ResultNotice>>,
    outbox: Arc<Outbox>,
    journals: Journals,
    /// Held also where no pictures are made: the renderer's thread, which keeps house, ends with it.
    render: Sender<RenderJob>,
    renders: bool,
}

struct RenderJob {
    series: StudyHash,
    inferred: Box<Inferred>,
    scores: Vec<f32>,
    notes: Vec<String>,
    dir: PathBuf,
    _done: Sender<()>,
}

struct Committed {
    document: ResultDocument,
    revision: u32,
    fresh: bool,
    restated: Vec<Restated>,
}

impl Publisher {
    /// Publishes until the queue closes.
    pub fn run(mut self, jobs: &Receiver<PublishJob>, published: &Sender<Published>) {
        while let Ok(job) = jobs.recv() {
            let message = self.publish(job);
            if published.send(message).is_err() {
                return;
            }
        }
    }

    fn publish(&mut self, mut job: PublishJob) -> Published {
        let started = Instant::now();
        let mut message = Published {
            series: job.series.clone(),
            epoch: job.epoch,
            version: job.version,
            revision: job.revision,
            failed: None,
        };
        let report = self.report(&mut job);
        let committed = match self.commit(&job, &report) {
            Ok(committed) => committed,
            Err(error) => {
                incidents::CommitFailed { series: &job.series, detail: &error.to_string() }.emit();
                message.failed = Some(Box::new(job));
                return message;
            }
        };
        let committed_at = Instant::now();
        let last_slice_to_alert = committed_at.saturating_duration_since(job.timing.last_pdata_at);
        self.outbox.kick();
        events::StageTimed { stage: Stage::Publish, took: started.elapsed() }.emit();
        message.revision = committed.revision;
        if committed.fresh {
            events::OutcomePublished {
                study: &job.study,
                series: &job.series,
                revision: committed.revision,
                outcome: report.outcome.as_str(),
                reason: report.reason.map(Reason::as_str),
                last_slice_to_alert: Some(last_slice_to_alert),
            }
            .emit();
            raised(&job.study, &committed.document.alert);
        }
        for restated in committed.restated.iter().filter(|r| !r.was_alerted) {
            if let Ok(document) = serde_json::from_str::<ResultDocument>(&restated.record.document) {
                raised(&job.study, &document.alert);
            }
        }
        // An outcome that covers nothing is that of a journal that cannot be read, nor written to.
        if job.covered > 0 {
            let note = PublishedNote {
                revision: committed.revision,
                covered: job.covered,
                distinct: job.slices as u64,
                conflict: job.conflict,
                result_uid: committed.document.result_uid.clone(),
            };
            self.journals.note(job.series.clone(), note);
        }
        self.after(job, &report, committed, (started, committed_at));
        message
    }

    /// Pictures and observers, after the alert.
    fn after(
        &mut self,
        job: PublishJob,
        report: &SeriesReport,
        committed: Committed,
        (started, committed_at): (Instant, Instant),
    ) {
        let last_slice_to_alert = committed_at.saturating_duration_since(job.timing.last_pdata_at);
        let breakdown = job.result.as_ref().ok().map(|i| Breakdown::new(&job.timing, &i.judged, started, committed_at));
        let dir = self.results_dir.join(job.series.as_str()).join(committed.revision.to_string());
        let (done, rendered) = bounded(0);
        let completion_wait = job.timing.completed_at.duration_since(job.timing.last_pdata_at);
        let infer_s = job.result.as_ref().map_or(0.0, |i| i.judged.infer_s);
        let reused_share = job.result.as_ref().ok().and_then(|i| i.judged.reused_share());
        if let (true, Ok(inferred)) = (self.renders, job.result) {
            let render_job = RenderJob {
                series: job.series.clone(),
                scores: inferred.judged.inference.scores.clone(),
                inferred,
                notes: report.quality.clone(),
                dir: dir.clone(),
                _done: done,
            };
            if self.render.try_send(render_job).is_err() {
                incidents::RenderingSkipped { series: &job.series }.emit();
            }
        }
        if let Some(observer) = &self.observer {
            let notice = ResultNotice {
                document: serde_json::to_value(&committed.document).unwrap_or_default(),
                restated: committed
                    .restated
                    .iter()
                    .filter_map(|r| serde_json::from_str(&r.record.document).ok())
                    .collect(),
                last_slice_to_alert_s: last_slice_to_alert.as_secs_f64(),
                completion_wait_s: completion_wait.as_secs_f64(),
                infer_s,
                reused_share,
                breakdown,
                results_dir: dir,
                rendered,
            };
            // An observer that does not listen must not hold the publisher.
            let _ = observer.try_send(notice);
        }
    }

    fn report(&self, job: &mut PublishJob) -> SeriesReport {
        let slices = job.slices as u64;
        let made = match &job.result {
            Ok(inferred) => SeriesReport::result(job.series.as_str(), &inferred.judged.inference.logits, slices),
            Err(refusal) => Ok(SeriesReport::no_result(job.series.as_str(), refusal, slices)),
        };
        let mut report = made.unwrap_or_else(|refusal| {
            let report = SeriesReport::no_result(job.series.as_str(), &refusal, slices);
            job.result = Err(refusal);
            report
        });
        report.quality.clone_from(&job.notes);
        report.latency_ms.decode = Some(job.timing.decode_s * 1e3);
        report.latency_ms.resample = Some(job.timing.resample_s * 1e3);
        if let Ok(inferred) = &job.result {
            complete(
                &mut report,
                &self.completion,
                &inferred.judged,
                true,
                self.class_keys.get(inferred.judged.cam.class).cloned().unwrap_or_default(),
                Some("cam.safetensors".to_owned()),
            );
            report.latency_ms = LatencyMs {
                decode: Some(job.timing.decode_s * 1e3),
                resample: Some((job.timing.resample_s + inferred.judged.gather_s) * 1e3),
                infer: Some(inferred.judged.infer_s * 1e3),
                explain: Some(inferred.judged.cam_s * 1e3),
            };
        }
        self.policy.admit(report).unwrap_or_else(|instead| {
            let (refused, refusal) = *instead;
            job.result = Err(refusal);
            refused
        })
    }

    /// Commits, once. A revision that the store has already for the same slices is taken over, not repeated.
    fn commit(&mut self, job: &PublishJob, report: &SeriesReport) -> Result<Committed, StoreError> {
        let latest = self.store.latest_result(&job.series)?;
        let reason = report.reason.map(Reason::as_str);
        let same =
            |l: &ResultRecord| l.revision >= job.revision && l.slices == report.slices && l.reason.as_deref() == reason;
        let revision = match &latest {
            None => 1,
            Some(l) if same(l) => l.revision,
            Some(l) => l.revision + 1,
        };
        let reconstruction = reconstruction(&job.header, job.result.as_deref());
        let mine = rank(&self.preference, report.outcome, &reconstruction);
        let created_at_ms = unix_ms();
        let completion_wait = job.timing.completed_at.duration_since(job.timing.last_pdata_at);
        let mut document = ResultDocument::new(
            &job.study,
            self.model.clone(),
            job.result.as_ref().ok().and_then(|i| i.judged.ran_on).unwrap_or(self.backend),
            job.cause.as_str(),
            // Decided anew when it is known whether the result is live.
            self.policy.decide(report, &self.completion.calibration, false),
            ResultLatency {
                last_slice_to_alert_ms: Some(job.timing.last_pdata_at.elapsed().as_secs_f64() * 1e3),
                completion_wait_ms: Some(completion_wait.as_secs_f64() * 1e3),
                reused_share: job.result.as_ref().ok().and_then(|i| i.judged.reused_share()),
            },
            report.clone(),
            created_at_ms,
        );
        document.reconstruction = Some(reconstruction);
        let outcome = NewOutcome {
            study: job.study.clone(),
            study_instance_uid: job.header.study_instance_uid.clone(),
            series: job.series.clone(),
            series_instance_uid: job.header.series_instance_uid.clone(),
            revision,
            slices: report.slices,
            reason,
            document: Value::Null,
            live: false,
            alerted: false,
            created_at_ms,
        };
        let judgement = Judgement {
            policy: &self.policy,
            calibration: &self.completion.calibration,
            model: &self.model,
            webhook: &self.webhook,
        };
        let stamped = &mut document;
        let committed = self.store.commit_outcome_ranked(
            &outcome,
            |others| outranked_by(&self.preference, mine, job.series.as_str(), others),
            |ids| {
                stamped.stamp(ids);
                stamped.alert = judgement.policy.decide(report, judgement.calibration, ids.live);
                let mut outbox = Vec::new();
                if judgement.webhook.wants(&stamped.alert, ids.supersedes_alert) {
                    outbox.push(OutboxDraft::document(WEBHOOK_SINK));
                }
                let body = OutcomeBody { document: to_json(stamped)?, outbox };
                Ok(DecidedBody { body, alerted: stamped.alert.alert })
            },
            |record| judgement.restate(record),
        )?;
        if !committed.fresh {
            // What was committed then counts, not what was made now.
            document.stamp(&committed.ids);
            let stored = self.store.result(&committed.ids.result_uid)?;
            if let Some(stored) = stored.and_then(|r| serde_json::from_str(&r.document).ok()) {
                document = stored;
            }
        }
        Ok(Committed {
            document,
            revision: committed.ids.revision,
            fresh: committed.fresh,
            restated: committed.restated,
        })
    }
}

/// Counts an alert, if it is one.
fn raised(study: &StudyHash, alert: &Decision) {
    if alert.alert {
        let class = CLASS_LABELS.iter().find(|c| alert.class.as_deref() == Some(**c)).unwrap_or(&"none");
        events::AlertRaised { study, level: alert.level.as_str(), class }.emit();
    }
}

/// Metric labels of the classes.
const CLASS_LABELS: [&str; 3] = crate::model::manifest::CLASS_KEYS;

/// What a model's answers are completed with.
#[derive(Clone, Debug)]
pub struct Completion {
    /// Temperature, thresholds, reference features.
    pub calibration: Calibration,
    /// Whether the model was trained on pictures of an unknown window.
    pub unknown_window: bool,
}

impl Completion {
    /// Those of `model`, checked to be its own.
    ///
    /// # Errors
    /// As [`calibration`].
    pub fn of(model: &Model) -> Result<Self, StartError> {
        let unknown_window = model.manifest.source_window == SourceWindow::Unknown;
        Ok(Self { calibration: calibration(model)?, unknown_window })
    }

    /// Adds the calibrated probabilities and the likeness to the training data to a result, from the
    /// pooled features and the input's texture. `in_hu`: whether the scan
    /// came in HU, as from a scanner, and not as pictures.
    pub fn judge(&self, report: &mut SeriesReport, pooled: &[f32], texture: &[f32], in_hu: bool) {
        let fitted = self.calibration.is_fitted();
        report.calibrated =
            fitted.then(|| report.logits.as_deref().map(|logits| self.calibration.apply(logits))).flatten();
        report.ood = self.calibration.ood(pooled, texture, self.unknown_window && in_hu);
        if let Some(why) = report.ood.as_ref().and_then(|o| o.why.as_deref()) {
            report.quality.push(format!("unlike the training data: {why}"));
        }
    }
}

/// Adds what calibration, lung check and map say to a result.
pub fn complete(
    report: &mut SeriesReport,
    completion: &Completion,
    judged: &Judged,
    in_hu: bool,
    cam_class: String,
    cam_file: Option<String>,
) {
    report.quality.extend(lung_notes(&judged.lung));
    completion.judge(report, &judged.inference.pooled, &judged.texture, in_hu);
    report.cam = Some(CamInfo { class: cam_class, file: cam_file });
}

fn reconstruction(header: &SliceHeader, result: Result<&Inferred, &Refusal>) -> Reconstruction {
    Reconstruction {
        kernel: header.convolution_kernel.clone(),
        slice_thickness_mm: header.slice_thickness_mm.filter(|t| t.is_finite()),
        spacing_mm: result.ok().map(|i| i.stack.spacing_mm),
        covers_lungs: result.is_ok_and(|i| !i.judged.lung.lung_truncated_top && !i.judged.lung.lung_truncated_bottom),
    }
}

/// Makes the pictures and removes what is too old; owned by its thread.
pub struct Renderer {
    jobs: Receiver<RenderJob>,
    options: RenderOptions,
    class_names: Vec<String>,
    head_weight: Vec<f32>,
    window: Window,
    input_dhw: [usize; 3],
    model: ModelInfo,
    store: StoreHandle,
    metrics: MetricsHandle,
    results_dir: PathBuf,
    series_dir: PathBuf,
    journals: Journals,
    retention_days: u32,
}

impl Renderer {
    /// Renders until the queue closes.
    pub fn run(mut self) {
        // Not at once: what was open when the daemon stopped, however long ago, is resumed and published first.
        let mut kept = Instant::now();
        loop {
            if self.retention_days > 0 && kept.elapsed() >= HOUSEKEEPING {
                self.remove_old();
                kept = Instant::now();
            }
            self.metrics.upkeep();
            // A commit does it when this fails again and again.
            let _ = self.store.checkpoint();
            match self.jobs.recv_timeout(UPKEEP) {
                Ok(job) => self.render(&job),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn render(&self, job: &RenderJob) {
        let started = Instant::now();
        let made = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.try_render(job)));
        match made {
            Ok(Ok(())) => {}
            Ok(Err(detail)) => incidents::RenderingFailed { series: &job.series, detail: &detail }.emit(),
            Err(_) => events::PanicContained { stage: "explain", series: Some(&job.series) }.emit(),
        }
        events::StageTimed { stage: Stage::Explain, took: started.elapsed() }.emit();
    }

    fn try_render(&self, job: &RenderJob) -> Result<(), String> {
        let inferred = &job.inferred;
        let slices = |k: usize| inferred.slices.get(k).and_then(|s| s.volume.slot(s.slot));
        let notice = self.model.notice();
        let input = SeriesToExplain {
            slices: &slices,
            depth_mm: &inferred.stack.depth_mm,
            shear_px: inferred.stack.shear_px.as_deref(),
            rows: inferred.stack.rows,
            columns: inferred.stack.columns,
            pixel_spacing_mm: inferred.stack.pixel_spacing_mm,
            orientation: inferred.stack.in_plane,
            inference: &inferred.judged.inference,
            head_weight: &self.head_weight,
            class: inferred.judged.cam.class,
            class_names: &self.class_names,
            scores: &job.scores,
            geometry: CamGeometry {
                in_plane: &inferred.judged.in_plane,
                depth: &inferred.judged.depth,
                input_dhw: self.input_dhw,
            },
            window: self.window,
            banner: notice.as_deref(),
            notes: &job.notes,
            model_id: &self.model.id,
            trained_on: &self.model.trained_on,
        };
        std::fs::create_dir_all(&job.dir).map_err(|e| e.kind().to_string())?;
        explain_series(&job.dir, &input, &self.options).map(drop).map_err(|e| e.to_string())
    }

    /// Folders of which the store knows nothing (any more): a crash came between the store and the disk.
    fn remove_orphans(&self, not_after: SystemTime) {
        for root in [&self.series_dir, &self.results_dir] {
            let Ok(entries) = std::fs::read_dir(root) else { continue };
            for entry in entries.flatten() {
                let old = entry.metadata().and_then(|m| m.modified()).is_ok_and(|at| at <= not_after);
                let name = entry.file_name();
                let Some(series) = name.to_str().and_then(|n| StudyHash::parse(n).ok()) else { continue };
                if !old || !matches!(self.store.latest_result(&series), Ok(None)) {
                    continue;
                }
                if root == &self.results_dir {
                    let _ = std::fs::remove_dir_all(entry.path());
                } else {
                    self.journals.delete(series, not_after);
                }
            }
        }
    }

    fn remove_old(&mut self) {
        let now = unix_ms();
        let age = Duration::from_secs(u64::from(self.retention_days) * 24 * 3600);
        let cutoff = now - age.as_millis() as i64;
        let Some(not_after) = SystemTime::now().checked_sub(age) else { return };
        self.remove_orphans(not_after);
        match self.store.delete_older_than(cutoff, now) {
            Ok(report) => {
                for series in report.series {
                    let _ = std::fs::remove_dir_all(self.results_dir.join(series.as_str()));
                    self.journals.delete(series, not_after);
                }
                if report.studies > 0 {
                    incidents::RetentionDone { studies: report.studies, kept: report.kept_for_outbox }.emit();
                }
            }
            Err(error) => incidents::RetentionFailed { detail: &error.to_string() }.emit(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::StudyHasher;

    fn model(sha256: &str) -> ModelInfo {
        ModelInfo { id: "m".into(), sha256: sha256.into(), intended_use: "demo".into(), trained_on: "nothing".into() }
    }

    /// The latest result of a series, not live: COVID-19 by far the likeliest.
    fn record(series: &str, r: Reconstruction, outcome: Outcome) -> ResultRecord {
        let hasher = StudyHasher::new([2; 32]);
        let report = match outcome {
            Outcome::Result => SeriesReport::result(series, &[0.0, 5.0, 0.0], 100).unwrap(),
            Outcome::NoResult => SeriesReport::no_result(series, &Refusal::new(Reason::Gap, "a hole"), 100),
        };
        let alert = AlertPolicy::default().decide(&report, &Calibration::none(), false);
        let latency = ResultLatency::default();
        let mut document =
            ResultDocument::new(&hasher.hash("1"), model("a"), "cpu", "released", alert, latency, report, 5);
        document.reconstruction = Some(r);
        ResultRecord {
            result_uid: "2.25.7".into(),
            study: document.study.clone(),
            series: series.into(),
            revision: 1,
            slices: 100,
            outcome: outcome.as_str().into(),
            reason: None,
            document: serde_json::to_string(&document).unwrap(),
            supersedes: None,
            live: false,
            alerted: false,
            created_at_ms: 5,
            edition: 1,
        }
    }

    fn made(kernel: &str, thickness_mm: f64, covers_lungs: bool) -> Reconstruction {
        Reconstruction {
            kernel: Some(kernel.into()),
            slice_thickness_mm: Some(thickness_mm),
            spacing_mm: Some(thickness_mm),
            covers_lungs,
        }
    }

    #[test]
    fn each_result_ranks_where_the_preference_puts_it_whoever_asks() {
        let mut unreadable = record("a", made("B31f", 0.5, true), Outcome::Result);
        unreadable.document = "{}".into();
        // Best first.
        let ordered = [
            record("f", made("B31f", 1.0, true), Outcome::Result),
            record("g", made("B31f", 1.0, true), Outcome::Result),
            record("b", made("B31f", 5.0, true), Outcome::Result),
            record("c", made("B70f", 0.6, true), Outcome::Result),
            record("d", made("B31f", 1.0, false), Outcome::Result),
            record("e", made("B31f", 1.0, true), Outcome::NoResult),
            unreadable,
        ];
        let preference = Preference::default();
        for (mine, record) in ordered.iter().enumerate().take(ordered.len() - 1) {
            let document: ResultDocument = serde_json::from_str(&record.document).unwrap();
            let rank = rank(&preference, document.report.outcome, &document.reconstruction.unwrap());
            let mut others: Vec<ResultRecord> = ordered.iter().filter(|r| r.series != record.series).cloned().collect();
            for _ in 0..others.len() {
                others.rotate_left(1);
                let winner =
                    outranked_by(&preference, rank, &record.series, &others).map(|w| others[w].series.as_str());
                assert_eq!(winner, (mine > 0).then_some("f"), "asked by {}", record.series);
            }
        }
        assert_eq!(outranked_by(&preference, (false, false, false, i64::MIN), "z", &[]), None);
    }

    #[test]
    fn a_restated_result_decides_its_alert_anew() {
        let (policy, calibration, model) = (AlertPolicy::default(), Calibration::none(), model("a"));
        let webhook = |events| WebhookConfig { url: "https://receiver.example/".into(), events, ..Default::default() };
        let restate = |webhook: &WebhookConfig, policy: &AlertPolicy, record: &ResultRecord| {
            let judgement = Judgement { policy, calibration: &calibration, model: &model, webhook };
            judgement.restate(record).unwrap()
        };
        let (all, alerts) = (webhook(WebhookEvents::All), webhook(WebhookEvents::Alerts));
        let before = record("a", made("B31f", 1.0, true), Outcome::Result);
        let now = ResultRecord { live: true, edition: 2, ..before.clone() };
        let won = restate(&alerts, &policy, &now).unwrap();
        assert!(won.alerted && won.body.outbox == [OutboxDraft::document(WEBHOOK_SINK)]);
        let document: ResultDocument = serde_json::from_str(&won.body.document).unwrap();
        assert_eq!((document.live, document.edition, document.alert.class.as_deref()), (true, 2, Some("covid19")));
        // And back: the alert is taken back; the document says again what it said first.
        let again =
            ResultRecord { live: false, alerted: true, edition: 3, document: won.body.document, ..before.clone() };
        let lost = restate(&alerts, &policy, &again).unwrap();
        assert!(!lost.alerted && lost.body.outbox.len() == 1);
        let document: ResultDocument = serde_json::from_str(&lost.body.document).unwrap();
        let first: ResultDocument = serde_json::from_str(&before.document).unwrap();
        assert_eq!(document, ResultDocument { edition: 3, ..first });

        // Without an alert before or now, only a receiver of everything hears of it.
        let silent = AlertPolicy { classes: Default::default(), ..AlertPolicy::default() };
        assert!(restate(&alerts, &silent, &now).unwrap().body.outbox.is_empty());
        assert_eq!(restate(&all, &silent, &now).unwrap().body.outbox.len(), 1);
        assert!(restate(&WebhookConfig::default(), &policy, &now).unwrap().body.outbox.is_empty(), "no webhook");
        // An alert that does not depend on being live is not told twice.
        let always = AlertPolicy { only_live: false, ..AlertPolicy::default() };
        let told = ResultRecord { alerted: true, live: false, ..again.clone() };
        let kept = restate(&alerts, &always, &told).unwrap();
        assert!(kept.alerted && kept.body.outbox.is_empty());
        assert_eq!(restate(&all, &policy, &ResultRecord { document: "{}".into(), ..now }), None);
    }
}
