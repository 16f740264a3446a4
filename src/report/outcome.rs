//! The JSON documents: `darnet.infer/1` (what `darnet infer --json` prints) and `darnet.result/1` (what the daemon
//! stores and sends). Described for receivers in `docs/webhook.md`.
//!
//! All numbers are f64 and printed with as many digits as it takes to read back the same bits; an f32 of the network is
//! widened exactly.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::policy::Decision;
use crate::model::manifest::CLASS_KEYS;
use crate::store::ResultIds;
use crate::telemetry::StudyHash;
use crate::volume::refusal::{Reason, Refusal};

/// Schema of [`InferDocument`].
pub const INFER_SCHEMA: &str = "darnet.infer/1";

/// Schema of [`ResultDocument`].
pub const RESULT_SCHEMA: &str = "darnet.result/1";

/// `intended_use` of a model that is not for patients.
pub const DEMO: &str = "demo";

/// Scores by class key, in alphabetical order, which is the order of the network's outputs too.
pub type ClassScores = BTreeMap<String, f64>;

/// Whether there is a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The network's answer.
    Result,
    /// "No result, because …": never a negative finding.
    NoResult,
}

impl Outcome {
    /// The text form.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Result => "result",
            Self::NoResult => "no_result",
        }
    }
}

/// The model that spoke.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelInfo {
    /// Its id.
    pub id: String,
    /// SHA-256 of the weights, hex.
    pub sha256: String,
    /// What it is for; `demo` is not for patients.
    pub intended_use: String,
    /// What it was trained on.
    pub trained_on: String,
}

impl ModelInfo {
    /// A sentence that must be shown with every output of a demo model; none for others.
    pub fn notice(&self) -> Option<String> {
        (self.intended_use == DEMO)
            .then(|| format!("demo model trained on {}: not a medical finding, not for diagnosis", self.trained_on))
    }
}

/// How unlike the training data a scan is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ood {
    /// Larger is less alike, 1 is the limit: the larger of the two below; null where the calibration has no reference.
    pub score: Option<f64>,
    /// Of the network's pooled features: what is seen in the scan.
    #[serde(default)]
    pub features: Option<f64>,
    /// Of the input's sharpness and noise: how it was made.
    #[serde(default)]
    pub texture: Option<f64>,
    /// Whether it is flagged.
    pub flag: bool,
    /// Why, for people; null without a flag.
    #[serde(default)]
    pub why: Option<String>,
}

/// Where the class activation map is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CamInfo {
    /// The class it explains.
    pub class: String,
    /// Safetensors file with `cam`, relative to the output folder; none if it was not written.
    pub file: Option<String>,
}

/// Time spent on a series, ms; a stage that did not run is null.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LatencyMs {
    /// Pixels to HU, all slices.
    pub decode: Option<f64>,
    /// In-plane resampling of all slices and the gathering.
    pub resample: Option<f64>,
    /// The network.
    pub infer: Option<f64>,
    /// CAM and pictures.
    pub explain: Option<f64>,
}

/// What is said about one series.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SeriesReport {
    /// Keyed hash of the SeriesInstanceUID.
    pub series: String,
    /// Whether there is a result.
    pub outcome: Outcome,
    /// Why there is none.
    pub reason: Option<Reason>,
    /// Why there is none, for people: counts and attribute names.
    pub detail: Option<String>,
    /// The network's outputs before softmax, in the order of the classes.
    pub logits: Option<Vec<f64>>,
    /// Softmax of the logits.
    pub scores: Option<ClassScores>,
    /// Calibrated probabilities; null without a fitted calibration.
    pub calibrated: Option<ClassScores>,
    /// The class with the highest score.
    pub predicted: Option<String>,
    /// Likeness to the training data; null where nothing is known of it.
    pub ood: Option<Ood>,
    /// Remarks on the scan: constant phrases.
    pub quality: Vec<String>,
    /// The class activation map.
    pub cam: Option<CamInfo>,
    /// Slices the answer is made from.
    pub slices: u64,
    /// Time spent.
    pub latency_ms: LatencyMs,
}

/// Softmax in f64, stable. Empty in, empty out.
pub fn softmax(logits: &[f64]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exp: Vec<f64> = logits.iter().map(|l| (l - max).exp()).collect();
    let sum: f64 = exp.iter().sum();
    exp.into_iter().map(|e| e / sum).collect()
}

/// Scores by class key.
pub fn class_scores(values: &[f64]) -> ClassScores {
    CLASS_KEYS.iter().zip(values).map(|(k, v)| ((*k).to_owned(), *v)).collect()
}

impl SeriesReport {
    /// A report of the network's answer. The scores are the softmax of the logits in f64; on a tie the first class in
    /// the order of [`CLASS_KEYS`] is predicted.
    ///
    /// # Errors
    /// A [`Refusal`] with [`Reason::Internal`] if there is not one finite logit a class: such an answer must end as
    /// [`SeriesReport::no_result`].
    pub fn result(series: impl Into<String>, logits: &[f32], slices: u64) -> Result<Self, Refusal> {
        if logits.len() != CLASS_KEYS.len() {
            let detail = format!("expected {} logits, got {}", CLASS_KEYS.len(), logits.len());
            return Err(Refusal::new(Reason::Internal, detail));
        }
        if logits.iter().any(|l| !l.is_finite()) {
            return Err(Refusal::new(Reason::Internal, "the network returned a number that is not finite"));
        }
        let logits: Vec<f64> = logits.iter().map(|l| f64::from(*l)).collect();
        let scores = softmax(&logits);
        let mut best = 0;
        for (i, logit) in logits.iter().enumerate() {
            if *logit > logits[best] {
                best = i;
            }
        }
        Ok(Self {
            outcome: Outcome::Result,
            scores: Some(class_scores(&scores)),
            logits: Some(logits),
            predicted: Some(CLASS_KEYS[best].to_owned()),
            ..Self::empty(series.into(), slices)
        })
    }

    /// A report that there is no result.
    pub fn no_result(series: impl Into<String>, refusal: &Refusal, slices: u64) -> Self {
        Self {
            reason: Some(refusal.reason),
            detail: Some(refusal.detail.clone()),
            ..Self::empty(series.into(), slices)
        }
    }

    fn empty(series: String, slices: u64) -> Self {
        Self {
            series,
            outcome: Outcome::NoResult,
            reason: None,
            detail: None,
            logits: None,
            scores: None,
            calibrated: None,
            predicted: None,
            ood: None,
            quality: Vec::new(),
            cam: None,
            slices,
            latency_ms: LatencyMs::default(),
        }
    }
}

/// `darnet.infer/1`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InferDocument {
    /// [`INFER_SCHEMA`].
    pub schema: String,
    /// The model.
    pub model: ModelInfo,
    /// The backend in use.
    pub backend: String,
    /// One report a series.
    pub series: Vec<SeriesReport>,
}

impl InferDocument {
    /// A document with the present schema.
    pub fn new(model: ModelInfo, backend: impl Into<String>, series: Vec<SeriesReport>) -> Self {
        Self { schema: INFER_SCHEMA.into(), model, backend: backend.into(), series }
    }

    /// Whether at least one series has a result (exit code 0, else 3).
    pub fn any_result(&self) -> bool {
        self.series.iter().any(|s| s.outcome == Outcome::Result)
    }
}

/// How the slices were reconstructed; by it one series of a study is chosen to speak for it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Reconstruction {
    /// ConvolutionKernel.
    pub kernel: Option<String>,
    /// SliceThickness, millimetres.
    pub slice_thickness_mm: Option<f64>,
    /// Median distance between slices, millimetres.
    pub spacing_mm: Option<f64>,
    /// Whether neither end of the scan cuts the lungs.
    pub covers_lungs: bool,
}

/// How a series came to its end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompletionInfo {
    /// `declared`, `released`, `idle`, `flushed`.
    pub cause: String,
}

/// The waits of the daemon; null for files and after a restart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ResultLatency {
    /// From the last P-DATA byte of the last slice to the writing of this document, just before its commit.
    pub last_slice_to_alert_ms: Option<f64>,
    /// The part of it spent waiting for completion.
    pub completion_wait_ms: Option<f64>,
    /// Share of what can be computed ahead of the last slice that the run took over, 0 to 1; null when there was no run,
    /// or the backend does nothing ahead.
    pub reused_share: Option<f64>,
}

const fn first_edition() -> u32 {
    1
}

/// `darnet.result/1`: one outcome of the daemon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ResultDocument {
    /// [`RESULT_SCHEMA`].
    pub schema: String,
    /// UID of this result, `2.25.…`; set at the commit.
    #[serde(default)]
    pub result_uid: String,
    /// Keyed hash of the StudyInstanceUID.
    pub study: String,
    /// Keyed hash of the SeriesInstanceUID.
    pub series: String,
    /// Revision, from 1; set at the commit.
    #[serde(default)]
    pub revision: u32,
    /// The result it replaces; set at the commit.
    #[serde(default)]
    pub supersedes: Option<String>,
    /// Whether it is the live result of its study; set at the commit, and again when that changes.
    #[serde(default)]
    pub live: bool,
    /// How often this document was written; from 1. Only `live` and `alert` differ between editions.
    #[serde(default = "first_edition")]
    pub edition: u32,
    /// Unix time, ms.
    pub created_at_ms: i64,
    /// Must be shown with the result where present.
    pub notice: Option<String>,
    /// The model.
    pub model: ModelInfo,
    /// The backend in use.
    pub backend: String,
    /// How the series came to its end.
    pub completion: CompletionInfo,
    /// Who is to be alerted.
    pub alert: Decision,
    /// The daemon's waits.
    pub latency: ResultLatency,
    /// How the slices were reconstructed.
    #[serde(default)]
    pub reconstruction: Option<Reconstruction>,
    /// What is said about the series.
    pub report: SeriesReport,
}

impl ResultDocument {
    /// A document with the present schema; the members fixed at the commit are empty.
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        study: &StudyHash,
        model: ModelInfo,
        backend: impl Into<String>,
        completion_cause: impl Into<String>,
        alert: Decision,
        latency: ResultLatency,
        report: SeriesReport,
        created_at_ms: i64,
    ) -> Self {
        Self {
            schema: RESULT_SCHEMA.into(),
            result_uid: String::new(),
            study: study.to_string(),
            series: report.series.clone(),
            revision: 0,
            supersedes: None,
            live: false,
            edition: first_edition(),
            created_at_ms,
            notice: model.notice(),
            model,
            backend: backend.into(),
            completion: CompletionInfo { cause: completion_cause.into() },
            alert,
            latency,
            reconstruction: None,
            report,
        }
    }

    /// Sets what the commit fixed.
    pub fn stamp(&mut self, ids: &ResultIds) {
        self.result_uid = ids.result_uid.clone();
        self.revision = ids.revision;
        self.supersedes = ids.supersedes.clone();
        self.live = ids.live;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::policy::Level;
    use super::*;
    use crate::telemetry::StudyHasher;

    fn model(intended_use: &str) -> ModelInfo {
        ModelInfo {
            id: "m".into(),
            sha256: "0".repeat(64),
            intended_use: intended_use.into(),
            trained_on: "nothing".into(),
        }
    }

    #[test]
    fn infer_document_has_the_published_members() {
        let mut report = SeriesReport::result("ab", &[0.5, 2.0, -1.0], 120).unwrap();
        report.cam = Some(CamInfo { class: "covid19".into(), file: Some("cam.safetensors".into()) });
        let json = serde_json::to_value(InferDocument::new(model("demo"), "cpu", vec![report])).unwrap();
        assert_eq!(json["schema"], "darnet.infer/1");
        assert_eq!(json["model"]["intended_use"], "demo");
        assert_eq!(json["backend"], "cpu");
        let s = json["series"][0].as_object().unwrap();
        let expected = [
            "series",
            "outcome",
            "reason",
            "logits",
            "scores",
            "calibrated",
            "predicted",
            "ood",
            "quality",
            "cam",
            "slices",
            "latency_ms",
        ];
        for key in expected {
            assert!(s.contains_key(key), "{key}");
        }
        assert_eq!(s["outcome"], "result");
        assert_eq!(s["predicted"], "covid19");
        assert!(s["reason"].is_null() && s["calibrated"].is_null() && s["ood"].is_null());
        assert_eq!(s["scores"].as_object().unwrap().keys().collect::<Vec<_>>(), ["covid19", "cp", "healthy"]);
        assert_eq!(s["latency_ms"].as_object().unwrap().len(), 4);
    }

    #[test]
    fn no_result_has_a_reason_and_no_scores() {
        for reason in Reason::ALL {
            let report = SeriesReport::no_result("ab", &Refusal::new(reason, "because"), 3);
            let json = serde_json::to_value(&report).unwrap();
            assert_eq!(json["outcome"], "no_result");
            assert_eq!(json["reason"], reason.as_str());
            assert!(json["scores"].is_null() && json["predicted"].is_null() && json["logits"].is_null());
            assert!(!InferDocument::new(model("x"), "cpu", vec![report]).any_result());
        }
    }

    #[test]
    fn answers_that_are_no_numbers_are_refused() {
        for logits in [&[1.0, f32::NAN, 0.0][..], &[f32::INFINITY, 0.0, 0.0], &[0.0, 1.0], &[]] {
            assert_eq!(SeriesReport::result("ab", logits, 1).unwrap_err().reason, Reason::Internal);
        }
    }

    #[test]
    fn ties_go_to_the_first_class() {
        assert_eq!(SeriesReport::result("ab", &[1.0, 1.0, 1.0], 1).unwrap().predicted.as_deref(), Some("cp"));
    }

    #[test]
    fn demo_results_say_what_they_are() {
        assert!(model("demo").notice().unwrap().contains("trained on nothing"));
        assert_eq!(model("triage").notice(), None);
    }

    fn result_document(report: SeriesReport, at: i64) -> ResultDocument {
        let alert = Decision {
            alert: true,
            level: Level::Urgent,
            class: Some("covid19".into()),
            probability: Some(0.75),
            threshold: Some(0.5),
            why: "test".into(),
        };
        let latency = ResultLatency {
            last_slice_to_alert_ms: Some(2100.5),
            completion_wait_ms: Some(2000.25),
            reused_share: Some(0.875),
        };
        let study = StudyHasher::new([1; 32]).hash("1.2");
        ResultDocument::new(&study, model("demo"), "cpu", "released", alert, latency, report, at)
    }

    #[test]
    fn stamping_sets_what_the_commit_fixed() {
        let mut document = result_document(SeriesReport::result("ab", &[1.0, 2.0, 3.0], 9).unwrap(), 5);
        let ids = ResultIds {
            result_uid: "2.25.7".into(),
            revision: 2,
            supersedes: Some("2.25.6".into()),
            live: true,
            supersedes_alert: false,
        };
        document.stamp(&ids);
        let json = serde_json::to_value(&document).unwrap();
        assert_eq!(json["result_uid"], "2.25.7");
        assert_eq!(json["supersedes"], "2.25.6");
        assert_eq!((&json["revision"], &json["live"]), (&2.into(), &true.into()));
        assert_eq!(json["completion"]["cause"], "released");
        assert_eq!(json["latency"]["completion_wait_ms"], 2000.25);
        assert_eq!(json["latency"]["reused_share"], 0.875);
        assert_eq!(json["alert"]["level"], "urgent");
        assert!(json["notice"].as_str().unwrap().contains("not for diagnosis"));
    }

    #[test]
    fn the_documented_example_is_a_result_document() {
        let page = include_str!("../../docs/webhook.md");
        let example = page.split("```json").nth(1).and_then(|t| t.split("```").next()).unwrap();
        let document: ResultDocument = serde_json::from_str(example).unwrap();
        let (value, again): (serde_json::Value, _) =
            (serde_json::from_str(example).unwrap(), serde_json::to_value(&document).unwrap());
        assert_eq!(value, again, "the example shows every member and no other");
        for member in value.as_object().unwrap().keys().chain(value["report"].as_object().unwrap().keys()) {
            assert!(page.contains(&format!("`{member}`")) || member == "completion", "{member} is not described");
        }
        for reason in Reason::ALL {
            assert!(page.contains(&format!("`{reason}`")), "{reason} is not described");
        }
    }

    fn finite() -> impl Strategy<Value = f32> {
        any::<f32>().prop_filter("finite", |v| v.is_finite())
    }

    proptest! {
        #[test]
        fn documents_round_trip_to_the_bit(logits in [finite(), finite(), finite()], slices in 0u64..5000,
                                           infer in prop::option::of(0.0f64..1e6), at in any::<i64>()) {
            let mut report = SeriesReport::result("ab", &logits, slices).unwrap();
            report.latency_ms.infer = infer;
            report.calibrated = report.scores.clone();
            let back: Vec<f32> = report.logits.as_ref().unwrap().iter().map(|l| *l as f32).collect();
            prop_assert_eq!(back, logits.to_vec());
            prop_assert!((report.scores.as_ref().unwrap().values().sum::<f64>() - 1.0).abs() < 1e-12);
            let infer = InferDocument::new(model("demo"), "cpu", vec![report.clone()]);
            prop_assert_eq!(&serde_json::from_str::<InferDocument>(&serde_json::to_string(&infer).unwrap()).unwrap(), &infer);
            let result = result_document(report, at);
            prop_assert_eq!(&serde_json::from_str::<ResultDocument>(&serde_json::to_string(&result).unwrap()).unwrap(), &result);
            // Also by way of a generic value, as the store does it.
            let value = serde_json::to_value(&result).unwrap();
            prop_assert_eq!(&serde_json::from_str::<ResultDocument>(&value.to_string()).unwrap(), &result);
        }

        #[test]
        fn refusals_round_trip(reason in prop::sample::select(Reason::ALL.to_vec()), detail in ".*", slices in 0u64..99) {
            let report = SeriesReport::no_result("ab", &Refusal::new(reason, detail), slices);
            prop_assert_eq!(&serde_json::from_str::<SeriesReport>(&serde_json::to_string(&report).unwrap()).unwrap(), &report);
        }
    }
}
