//! `calibration/*.toml`: how a model's logits become probabilities, above which probability a class alerts, and how
//! unlike the training data a scan is.
//!
//! Temperature scaling: p = softmax(logits / T) (Guo et al., "On Calibration of Modern Neural Networks", 2017). The
//! likeness is the Mahalanobis distance from the nearest class mean, under one covariance for all classes (Lee et al., "A
//! Simple Unified Framework for Detecting Out-of-Distribution Samples", 2018), of the pooled features, which show a scan
//! of something else, and of the input's texture, which shows one made in another way. A calibration belongs to one model
//! and one set of weights; only one fitted on nothing may be for `any`.
//!
//! Deliberately absent: the fit (the trainer's), what is done about a scan that is unlike (see [`super::policy`]).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::outcome::{ClassScores, Ood, class_scores, softmax};
use crate::model::manifest::CLASS_KEYS;

/// Schema of the file.
pub const CALIBRATION_SCHEMA: &str = "darnet.calibration/1";

/// Matches every model or every set of weights.
pub const ANY: &str = "any";

/// `fitted_on` of a calibration without data.
pub const NOTHING: &str = "nothing";

/// Why a scan is flagged.
pub const FAR: &str = "its features are further from the training data than those of scans of the same kind";
/// Why a scan is flagged.
pub const UNLIKE_TEXTURE: &str = "its sharpness and noise are unlike those of the training data";
/// Why every scan in HU is flagged.
pub const UNKNOWN_WINDOW: &str = "the model was trained on pictures of an unknown window, and this scan is in HU";

/// Temperatures outside this range are faults of a fit.
const TEMPERATURE_RANGE: std::ops::RangeInclusive<f64> = 0.01..=100.0;

/// Largest file, bytes: 512 features have a triangle of 131,328 numbers, 0.7 MB as base64; `model` reads no more either.
pub const MAX_CALIBRATION_BYTES: usize = 1 << 20;

/// When a class alerts, and how that was chosen.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Threshold {
    /// The class alerts at this calibrated probability or above it.
    pub alert: f64,
    /// The sensitivity it was chosen for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wanted_sensitivity: Option<f64>,
    /// 95 % interval of the sensitivity on the data it was chosen on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sensitivity_interval_95: Option<[f64; 2]>,
    /// The sensitivity itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sensitivity: Option<f64>,
    /// The specificity there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub specificity: Option<f64>,
    /// 95 % interval of the specificity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub specificity_interval_95: Option<[f64; 2]>,
    /// 95 % interval of the threshold itself, by resampling patients.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alert_interval_95: Option<[f64; 2]>,
}

/// Numbers as base64 of little-endian f32, so that a covariance of 512 features fits into a text of 0.7 MB.
mod packed {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub fn serialize<S: Serializer>(values: &[f32], to: S) -> Result<S::Ok, S::Error> {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        to.serialize_str(&STANDARD.encode(bytes))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<f32>, D::Error> {
        let bytes = STANDARD.decode(String::deserialize(from)?).map_err(D::Error::custom)?;
        let (values, rest) = bytes.as_chunks::<4>();
        if !rest.is_empty() {
            return Err(D::Error::custom("expected whole 32-bit numbers"));
        }
        Ok(values.iter().map(|b| f32::from_le_bytes(*b)).collect())
    }
}

/// Most features of a reference: those of the full network.
pub const MAX_FEATURES: usize = 512;

/// Features of the texture.
pub const TEXTURE_FEATURES: usize = 12;

/// Features of the data a model was made for. The distance of features `f` from class mean `m` is
/// `|whitening (f - m)|`; the score is the smallest of them over the classes, divided by `limit`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OodReference {
    /// Features.
    pub features: usize,
    /// Scans that means and covariance are of.
    pub scans: usize,
    /// Share of the identity in the covariance (Ledoit and Wolf).
    pub shrinkage: f64,
    /// Distance beyond which a scan is flagged.
    pub limit: f64,
    /// Share of held-out scans of the same kind within it.
    pub quantile: f64,
    /// Scans the limit was chosen on.
    pub limit_scans: usize,
    /// Means by class, row-major classes x features.
    #[serde(with = "packed")]
    pub means: Vec<f32>,
    /// Inverse of the covariance's lower Cholesky factor, itself lower triangular: row after row up to the diagonal.
    #[serde(with = "packed")]
    pub whitening: Vec<f32>,
}

impl OodReference {
    /// How far `pooled` is, 1 being the limit; `None` for another number of features, or one that is not finite.
    pub fn score(&self, pooled: &[f32]) -> Option<f64> {
        if pooled.len() != self.features {
            return None;
        }
        let square = |mean: &[f32]| {
            let apart: Vec<f64> = pooled.iter().zip(mean).map(|(f, m)| f64::from(*f) - f64::from(*m)).collect();
            let mut at = 0;
            let mut sum = 0.0;
            for row in 1..=self.features {
                let weights = &self.whitening[at..at + row];
                let dot: f64 = weights.iter().zip(&apart).map(|(w, a)| f64::from(*w) * a).sum();
                sum += dot * dot;
                at += row;
            }
            sum
        };
        let least = self.means.chunks_exact(self.features).map(square).fold(f64::INFINITY, f64::min);
        let score = least.sqrt() / self.limit;
        score.is_finite().then_some(score)
    }

    fn faults(&self, key: &str) -> Vec<String> {
        let n = self.features;
        if !(1..=MAX_FEATURES).contains(&n) {
            return vec![format!("{key}.features: expected 1 to {MAX_FEATURES}, got {n}")];
        }
        let mut faults = Vec::new();
        let mut check = |ok: bool, fault: String| {
            if !ok {
                faults.push(fault);
            }
        };
        let finite = |v: &[f32]| v.iter().all(|x| x.is_finite());
        let classes = CLASS_KEYS.len();
        check(
            self.means.len() == classes * n && finite(&self.means),
            format!("{key}.means: expected {classes} x {n} finite numbers"),
        );
        let triangle = n * (n + 1) / 2;
        check(
            self.whitening.len() == triangle && finite(&self.whitening),
            format!("{key}.whitening: expected {triangle} finite numbers"),
        );
        check(self.limit > 0.0 && self.limit.is_finite(), format!("{key}.limit: expected more than 0"));
        check((0.0..=1.0).contains(&self.quantile), format!("{key}.quantile: expected 0 to 1"));
        check((0.0..=1.0).contains(&self.shrinkage), format!("{key}.shrinkage: expected 0 to 1"));
        faults
    }
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
    /// Expected calibration error on the data it was fitted on: before, and after on scans that the temperature was not
    /// fitted on (each half of the patients by the other's).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_calibration_error: Option<[f64; 2]>,
    /// Pooled features of the training data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ood: Option<OodReference>,
    /// Texture of the training data: sharpness and noise of the network's input.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub texture: Option<OodReference>,
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
        /// What differs: `model`, `weights` or `features`.
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
            expected_calibration_error: None,
            ood: None,
            texture: None,
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
            for (name, value) in [
                ("wanted_sensitivity", t.wanted_sensitivity),
                ("sensitivity", t.sensitivity),
                ("specificity", t.specificity),
            ] {
                check(value.is_none_or(share), format!("{key}.{name}: expected 0 to 1"));
            }
            for (name, value) in [
                ("sensitivity_interval_95", t.sensitivity_interval_95),
                ("specificity_interval_95", t.specificity_interval_95),
                ("alert_interval_95", t.alert_interval_95),
            ] {
                check(
                    value.is_none_or(|[a, b]| share(a) && share(b) && a <= b),
                    format!("{key}.{name}: expected two rising numbers in 0 to 1"),
                );
            }
        }
        faults.extend(self.ood.iter().flat_map(|reference| reference.faults("ood")));
        faults.extend(self.texture.iter().flat_map(|reference| reference.faults("texture")));
        if let Some(n) = self.texture.as_ref().map(|t| t.features).filter(|n| *n != TEXTURE_FEATURES) {
            faults.push(format!("texture.features: expected {TEXTURE_FEATURES}, got {n}"));
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

    /// Whether the reference features are as many as the model's.
    pub fn check_features(&self, features: usize) -> Result<(), CalibrationError> {
        match &self.ood {
            Some(ood) if ood.features != features => Err(CalibrationError::OtherModel { what: "features" }),
            _ => Ok(()),
        }
    }

    /// How unlike the data the model was made for a scan is; none where nothing is known about that.
    ///
    /// `pooled` are the network's pooled features, `texture` those of its input, `unknown_window`: the model was trained on
    /// pictures whose grey values nobody can tell, and the scan is in HU.
    pub fn ood(&self, pooled: &[f32], texture: &[f32], unknown_window: bool) -> Option<Ood> {
        let of = |reference: &Option<OodReference>, values| reference.as_ref().and_then(|r| r.score(values));
        let (features, texture) = (of(&self.ood, pooled), of(&self.texture, texture));
        let score = features.into_iter().chain(texture).reduce(f64::max);
        let is_far = |score: Option<f64>| score.is_some_and(|s| s > 1.0);
        let reasons = [(is_far(features), FAR), (is_far(texture), UNLIKE_TEXTURE)];
        let mut why: Vec<&str> = reasons.iter().filter(|(holds, _)| *holds).map(|(_, why)| *why).collect();
        if why.is_empty() && unknown_window {
            why.push(UNKNOWN_WINDOW);
        }
        let why = (!why.is_empty()).then(|| why.join("; "));
        (score.is_some() || unknown_window).then(|| Ood { score, features, texture, flag: why.is_some(), why })
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

    const UNTRAINED: &str = include_str!("../../calibration/untrained.toml");

    #[test]
    fn the_calibration_of_untrained_models_changes_nothing() {
        let c = Calibration::parse(UNTRAINED).unwrap();
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
            [texture]
            features = 1
            scans = 10
            shrinkage = 2.0
            limit = 1.0
            quantile = 0.99
            limit_scans = 10
            means = "AAAAAAAAAAAAAAAA"
            whitening = "AACAPw=="
            [ood]
            features = 2
            scans = 10
            shrinkage = 0.1
            limit = 0.0
            quantile = 0.99
            limit_scans = 10
            means = "AAAAAA=="
            whitening = ""
        "#;
        let Err(CalibrationError::Values(faults)) = Calibration::parse(text) else { panic!() };
        assert_eq!(faults.len(), 13, "{faults:#?}");
        let torn = text.replace("AAAAAA==", "AAAA");
        assert!(matches!(Calibration::parse(&torn), Err(CalibrationError::Syntax(_))));
        assert!(matches!(Calibration::parse("colour = 1"), Err(CalibrationError::Syntax(_))));
        let nan = UNTRAINED.replace("temperature = 1.0", "temperature = nan");
        assert!(matches!(Calibration::parse(&nan), Err(CalibrationError::Values(_))));
    }

    /// Means 0, 0; 3, 0; 0, 9. Whitening diag(1, 1/2): the second feature spreads by 2.
    fn reference() -> OodReference {
        OodReference {
            features: 2,
            scans: 30,
            shrinkage: 0.0,
            limit: 2.0,
            quantile: 0.99,
            limit_scans: 30,
            means: vec![0.0, 0.0, 3.0, 0.0, 0.0, 9.0],
            whitening: vec![1.0, 0.0, 0.5],
        }
    }

    #[test]
    fn the_score_is_the_distance_from_the_nearest_class_in_limits() {
        let r = reference();
        assert_eq!(r.score(&[0.0, 4.0]), Some(1.0));
        assert_eq!(r.score(&[5.0, 0.0]), Some(1.0));
        assert_eq!(r.score(&[0.0, 8.0]), Some(0.25));
        assert_eq!(r.score(&[0.0]), None);
        assert_eq!(r.score(&[f32::NAN, 0.0]), None);
        let c = Calibration { ood: Some(r), ..Calibration::none() };
        assert!(!c.ood(&[0.0, 3.0], &[], false).unwrap().flag);
        assert!(c.ood(&[0.0, 4.5], &[], false).unwrap().flag);
        let always = c.ood(&[0.0, 3.0], &[], true).unwrap();
        assert_eq!((always.flag, always.score), (true, Some(0.75)));
        assert!(Calibration::none().ood(&[0.0], &[], false).is_none());
        let unknown = Calibration::none().ood(&[0.0], &[], true).unwrap();
        assert_eq!((unknown.flag, unknown.score), (true, None));
        assert_eq!(unknown.why.as_deref(), Some(UNKNOWN_WINDOW));
        c.check_features(2).unwrap();
        assert_eq!(c.check_features(3), Err(CalibrationError::OtherModel { what: "features" }));
    }

    #[test]
    fn the_worse_of_features_and_texture_is_the_score_and_each_has_its_reason() {
        let texture = OodReference { limit: 1.0, ..reference() };
        let c = Calibration { ood: Some(reference()), texture: Some(texture), ..Calibration::none() };
        let (near, far) = ([0.0, 3.0], [0.0, 4.5]);
        let neither = c.ood(&near, &[0.0, 1.0], false).unwrap();
        assert_eq!((neither.score, neither.features, neither.texture), (Some(0.75), Some(0.75), Some(0.5)));
        assert!(!neither.flag && neither.why.is_none());
        let made_otherwise = c.ood(&near, &[0.0, 3.0], false).unwrap();
        assert_eq!((made_otherwise.score, made_otherwise.flag), (Some(1.5), true));
        assert_eq!(made_otherwise.why.as_deref(), Some(UNLIKE_TEXTURE));
        let of_something_else = c.ood(&far, &[0.0, 1.0], false).unwrap();
        assert_eq!(of_something_else.why.as_deref(), Some(FAR));
        let both = c.ood(&far, &[0.0, 3.0], true).unwrap();
        assert_eq!(both.why.unwrap(), format!("{FAR}; {UNLIKE_TEXTURE}"));
    }

    #[test]
    fn a_reference_survives_the_text() {
        let c = Calibration {
            model: "m".into(),
            weights_sha256: "ab".repeat(32),
            fitted_on: "thirty scans".into(),
            ood: Some(reference()),
            texture: Some(OodReference {
                features: TEXTURE_FEATURES,
                means: vec![0.5; 3 * TEXTURE_FEATURES],
                whitening: vec![0.25; TEXTURE_FEATURES * (TEXTURE_FEATURES + 1) / 2],
                ..reference()
            }),
            ..Calibration::none()
        };
        let text = toml::to_string(&c).unwrap();
        assert_eq!(Calibration::parse(&text).unwrap(), c, "{text}");
    }

    #[test]
    fn fitted_calibrations_are_bound_to_their_weights() {
        let any = UNTRAINED.replace("fitted_on = \"nothing\"", "fitted_on = \"site 7, 2026\"");
        assert!(matches!(Calibration::parse(&any), Err(CalibrationError::Values(_))));
        let c = Calibration { model: "m".into(), weights_sha256: "ab".repeat(32), ..Calibration::none() };
        c.check_model("m", &"AB".repeat(32)).unwrap();
        assert_eq!(c.check_model("n", &"ab".repeat(32)), Err(CalibrationError::OtherModel { what: "model" }));
        assert_eq!(c.check_model("m", &"cd".repeat(32)), Err(CalibrationError::OtherModel { what: "weights" }));
    }
}
