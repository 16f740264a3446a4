//! `calibration/*.toml`: how a model's logits become probabilities, and above which probability a class alerts.
//!
//! Temperature scaling: p = softmax(logits / T) (Guo et al., "On Calibration of Modern Neural Networks", 2017). A
//! calibration belongs to one model and one set of weights; only one fitted on nothing may be for `any`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::outcome::{ClassScores, class_scores, softmax};
use crate::model::manifest::CLASS_KEYS;

/// Schema of the file.
pub const CALIBRATION_SCHEMA: &str = "darnet.calibration/1";

/// Matches every model or every set of weights.
pub const ANY: &str = "any";

/// `fitted_on` of a calibration without data.
pub const NOTHING: &str = "nothing";

/// Temperatures outside this range are faults of a fit.
const TEMPERATURE_RANGE: std::ops::RangeInclusive<f64> = 0.01..=100.0;

/// Largest file, bytes: a covariance of 512 x 512 numbers of 25 characters is 6.6 MB.
pub const MAX_CALIBRATION_BYTES: usize = 8 << 20;

/// When a class alerts, and how that was chosen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Threshold {
    /// The class alerts at this calibrated probability or above it.
    pub alert: f64,
    /// The sensitivity it was chosen for.
    #[serde(default)]
    pub wanted_sensitivity: Option<f64>,
    /// 95 % interval of the sensitivity on the data it was chosen on.
    #[serde(default)]
    pub sensitivity_interval_95: Option<[f64; 2]>,
}

/// Reference data for the likeness to the training data: of the pooled features. Kept, not used yet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OodReference {
    /// Mean of the features.
    pub mean: Vec<f64>,
    /// Their covariance, row-major.
    #[serde(default)]
    pub covariance: Option<Vec<f64>>,
}

/// A calibration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    /// [`CALIBRATION_SCHEMA`].
    pub schema: String,
    /// Id of the model, or [`ANY`].
    pub model: String,
    /// SHA-256 of the weights in hex, or [`ANY`].
    #[serde(default = "any")]
    pub weights_sha256: String,
    /// The data it was fitted on; [`NOTHING`] if none.
    pub fitted_on: String,
    /// T of the softmax.
    pub temperature: f64,
    /// Thresholds by class key.
    #[serde(default)]
    pub thresholds: BTreeMap<String, Threshold>,
    /// Reference features.
    #[serde(default)]
    pub ood: Option<OodReference>,
}

fn any() -> String {
    ANY.into()
}

/// Why a calibration cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CalibrationError {
    /// No TOML, a key missing, unknown or of another type.
    #[error("read the calibration: {0}")]
    Syntax(String),
    /// Values out of range; every one of them.
    #[error("read the calibration: {}", .0.join("; "))]
    Values(Vec<String>),
    /// It was fitted for something else.
    #[error("use the calibration: fitted for another {what} than the loaded model; fit it again")]
    OtherModel {
        /// What differs: `model` or `weights`.
        what: &'static str,
    },
}

impl Calibration {
    /// No calibration: T = 1, no thresholds, fits every model.
    pub fn none() -> Self {
        Self {
            schema: CALIBRATION_SCHEMA.into(),
            model: ANY.into(),
            weights_sha256: ANY.into(),
            fitted_on: NOTHING.into(),
            temperature: 1.0,
            thresholds: BTreeMap::new(),
            ood: None,
        }
    }

    /// Reads the text of a file.
    pub fn parse(text: &str) -> Result<Self, CalibrationError> {
        if text.len() > MAX_CALIBRATION_BYTES {
            return Err(CalibrationError::Syntax(format!("expected at most {MAX_CALIBRATION_BYTES} bytes")));
        }
        let parsed: Self = toml::from_str(text).map_err(|e| CalibrationError::Syntax(e.message().to_owned()))?;
        let faults = parsed.faults();
        if faults.is_empty() { Ok(parsed) } else { Err(CalibrationError::Values(faults)) }
    }

    fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let mut check = |ok: bool, fault: String| {
            if !ok {
                faults.push(fault);
            }
        };
        check(self.schema == CALIBRATION_SCHEMA, format!("schema: expected {CALIBRATION_SCHEMA:?}"));
        check(!self.model.is_empty(), "model: expected an id or \"any\"".into());
        let hex = self.weights_sha256.len() == 64 && self.weights_sha256.bytes().all(|b| b.is_ascii_hexdigit());
        check(hex || self.weights_sha256 == ANY, "weights_sha256: expected 64 hex digits or \"any\"".into());
        check(!self.fitted_on.is_empty(), "fitted_on: expected the data set's name or \"nothing\"".into());
        let for_any = self.model == ANY || self.weights_sha256 == ANY;
        check(
            !for_any || self.fitted_on == NOTHING,
            "weights_sha256: a fitted calibration must name its model and weights, not \"any\"".into(),
        );
        let range = format!("{} to {}", TEMPERATURE_RANGE.start(), TEMPERATURE_RANGE.end());
        check(
            TEMPERATURE_RANGE.contains(&self.temperature),
            format!("temperature: expected {range}, got {}", self.temperature),
        );
        let share = |v: f64| (0.0..=1.0).contains(&v);
        for (class, t) in &self.thresholds {
            let key = format!("thresholds.{class}");
            check(CLASS_KEYS.contains(&class.as_str()), format!("{key}: no such class"));
            check(share(t.alert), format!("{key}.alert: expected 0 to 1, got {}", t.alert));
            check(t.wanted_sensitivity.is_none_or(share), format!("{key}.wanted_sensitivity: expected 0 to 1"));
            check(
                t.sensitivity_interval_95.is_none_or(|[a, b]| share(a) && share(b) && a <= b),
                format!("{key}.sensitivity_interval_95: expected two rising numbers in 0 to 1"),
            );
        }
        if let Some(ood) = &self.ood {
            let finite = |v: &[f64]| v.iter().all(|x| x.is_finite());
            check(!ood.mean.is_empty() && finite(&ood.mean), "ood.mean: expected finite numbers".into());
            let n = ood.mean.len();
            check(
                ood.covariance.as_deref().is_none_or(|c| c.len() == n * n && finite(c)),
                format!("ood.covariance: expected {n} x {n} finite numbers"),
            );
        }
        faults
    }

    /// Whether it was fitted for this model.
    pub fn check_model(&self, model_id: &str, weights_sha256: &str) -> Result<(), CalibrationError> {
        if self.model != ANY && self.model != model_id {
            return Err(CalibrationError::OtherModel { what: "model" });
        }
        if self.weights_sha256 != ANY && !self.weights_sha256.eq_ignore_ascii_case(weights_sha256) {
            return Err(CalibrationError::OtherModel { what: "weights" });
        }
        Ok(())
    }

    /// Whether data stands behind it. If not, documents show no calibrated probabilities.
    pub fn is_fitted(&self) -> bool {
        self.fitted_on != NOTHING
    }

    /// softmax(logits / T) in f64, one a class in the order of [`CLASS_KEYS`].
    pub fn probabilities(&self, logits: &[f64]) -> Vec<f64> {
        softmax(&logits.iter().map(|l| l / self.temperature).collect::<Vec<_>>())
    }

    /// [`Calibration::probabilities`] by class key.
    pub fn apply(&self, logits: &[f64]) -> ClassScores {
        class_scores(&self.probabilities(logits))
    }
}

impl Default for Calibration {
    fn default() -> Self {
        Self::none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEMO: &str = include_str!("../../calibration/demo.toml");

    #[test]
    fn shipped_demo_changes_nothing() {
        let c = Calibration::parse(DEMO).unwrap();
        assert_eq!((c.temperature, c.fitted_on.as_str(), c.is_fitted()), (1.0, "nothing", false));
        assert_eq!(c.thresholds["covid19"].alert, 0.5);
        assert_eq!(c.thresholds["cp"].alert, 0.5);
        c.check_model("whatever", "00").unwrap();
        let logits = [0.25, -1.0, 3.0];
        assert_eq!(c.probabilities(&logits), softmax(&logits));
    }

    #[test]
    fn temperature_flattens_and_keeps_the_order() {
        let hot = Calibration { temperature: 4.0, ..Calibration::none() };
        let p = hot.apply(&[0.0, 4.0, 0.0]);
        // softmax(0, 1, 0)
        let e = std::f64::consts::E;
        assert!((p["covid19"] - e / (e + 2.0)).abs() < 1e-15);
        assert!(p["covid19"] < Calibration::none().apply(&[0.0, 4.0, 0.0])["covid19"]);
    }

    #[test]
    fn huge_logits_do_not_overflow() {
        let p = Calibration::none().probabilities(&[f64::from(f32::MAX), -f64::from(f32::MAX), 0.0]);
        assert_eq!(p, [1.0, 0.0, 0.0]);
    }

    #[test]
    fn every_fault_is_named() {
        let text = r#"
            schema = "other"
            model = ""
            weights_sha256 = "abc"
            fitted_on = "ten scans"
            temperature = 0.0
            [thresholds.covid]
            alert = 1.5
            wanted_sensitivity = -1.0
            sensitivity_interval_95 = [0.9, 0.8]
            [ood]
            mean = [0.0, 1.0]
            covariance = [1.0]
        "#;
        let Err(CalibrationError::Values(faults)) = Calibration::parse(text) else { panic!() };
        assert_eq!(faults.len(), 9, "{faults:#?}");
        assert!(matches!(Calibration::parse("colour = 1"), Err(CalibrationError::Syntax(_))));
        let nan = DEMO.replace("temperature = 1.0", "temperature = nan");
        assert!(matches!(Calibration::parse(&nan), Err(CalibrationError::Values(_))));
    }

    #[test]
    fn fitted_calibrations_are_bound_to_their_weights() {
        let any = DEMO.replace("fitted_on = \"nothing\"", "fitted_on = \"site 7, 2026\"");
        assert!(matches!(Calibration::parse(&any), Err(CalibrationError::Values(_))));
        let c = Calibration { model: "m".into(), weights_sha256: "ab".repeat(32), ..Calibration::none() };
        c.check_model("m", &"AB".repeat(32)).unwrap();
        assert_eq!(c.check_model("n", &"ab".repeat(32)), Err(CalibrationError::OtherModel { what: "model" }));
        assert_eq!(c.check_model("m", &"cd".repeat(32)), Err(CalibrationError::OtherModel { what: "weights" }));
    }
}
