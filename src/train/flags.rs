//! Whether a model's distance score tells where it is right: accuracy of flagged scans and of the others.
//!
//! Input: a model's [`Answers`] on scans it was not trained on, above all those of another hospital, and its calibration.
//! Output: a [`FlagsDocument`].
//!
//! Deliberately absent: any fit; whoever changes the limit after seeing this has no held-out scans any more.

use std::fmt::Write as _;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::calibrate::Answers;
use super::cam::wilson;
use super::{TrainError, write_results};
use crate::model::Model;
use crate::report::calibration::Calibration;

/// Version of the JSON document.
pub const FLAGS_SCHEMA: &str = "darnet.flags/1";

/// Scans that have something in common.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FlagsRow {
    /// What that is.
    pub what: String,
    /// Scans.
    pub scans: usize,
    /// Scans whose largest logit is that of their class.
    pub right: usize,
    /// Their share with Wilson's 95 % interval; none without a scan.
    pub accuracy: Option<[f64; 3]>,
    /// Median score; 1 is the limit.
    pub score: Option<f64>,
}

/// The JSON document.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FlagsDocument {
    /// [`FLAGS_SCHEMA`].
    pub schema: String,
    /// The model's id.
    pub model: String,
    /// SHA-256 of its weights.
    pub weights_sha256: String,
    /// What the calibration was fitted on.
    pub fitted_on: String,
    /// All scans, those not flagged, those flagged, those flagged for their features and for their texture.
    pub rows: Vec<FlagsRow>,
}

/// Parts `answers` by what the calibration says of each scan.
///
/// # Errors
/// A calibration without a reference, no scan.
pub fn part(model: &Model, calibration: &Calibration, answers: &Answers) -> Result<FlagsDocument, TrainError> {
    if answers.is_empty() {
        return Err(TrainError::Data("expected a scan at least, got none".to_owned()));
    }
    struct Seen {
        right: bool,
        score: f64,
        flag: bool,
        features: bool,
        texture: bool,
    }
    let beyond = |score: Option<f64>| score.is_some_and(|s| s > 1.0);
    let seen: Vec<Seen> = (0..answers.len())
        .filter_map(|i| {
            let ood = calibration.ood(&answers.pooled[i], &answers.texture[i], false)?;
            let (features, texture) = (beyond(ood.features), beyond(ood.texture));
            Some(Seen { right: answers.is_right(i), score: ood.score?, flag: ood.flag, features, texture })
        })
        .collect();
    if seen.len() < answers.len() {
        return Err(TrainError::Data("the calibration has no reference features; run calibrate first".to_owned()));
    }
    let row = |what: &str, of: fn(&Seen) -> bool| {
        let some: Vec<&Seen> = seen.iter().filter(|s| of(s)).collect();
        let right = some.iter().filter(|s| s.right).count();
        let mut scores: Vec<f64> = some.iter().map(|s| s.score).collect();
        scores.sort_unstable_by(f64::total_cmp);
        FlagsRow {
            what: what.to_owned(),
            scans: some.len(),
            right,
            accuracy: (!some.is_empty()).then(|| wilson(right, some.len())),
            score: scores.get(scores.len() / 2).copied(),
        }
    };
    Ok(FlagsDocument {
        schema: FLAGS_SCHEMA.to_owned(),
        model: model.manifest.id.clone(),
        weights_sha256: model.sha256.clone(),
        fitted_on: calibration.fitted_on.clone(),
        rows: vec![
            row("all", |_| true),
            row("not flagged", |s| !s.flag),
            row("flagged", |s| s.flag),
            row("flagged for their features", |s| s.features),
            row("flagged for their texture", |s| s.texture),
        ],
    })
}

/// The document as Markdown.
pub fn markdown(document: &FlagsDocument) -> String {
    let mut out = format!("# Model {}: flagged scans and the others\n\n", document.model);
    out.push_str(
        "| scans | number | right | accuracy, % (95 %) | median score (1 is the limit) |\n|---|---|---|---|---|\n",
    );
    for r in &document.rows {
        let accuracy = r.accuracy.map_or("–".to_owned(), |a| {
            let [share, low, high] = a.map(|v| 100.0 * v);
            format!("{share:.1} ({low:.1} to {high:.1})")
        });
        let score = r.score.map_or("–".to_owned(), |s| format!("{s:.2}"));
        let _ = writeln!(out, "| {} | {} | {} | {accuracy} | {score} |", r.what, r.scans, r.right);
    }
    out
}

/// Writes `flags.json` and `flags.md` into `dir`.
///
/// # Errors
/// A full disk.
pub fn write(dir: &Path, document: &FlagsDocument) -> Result<(), TrainError> {
    write_results(dir, "flags", document, &markdown(document))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::calibration::{OodReference, TEXTURE_FEATURES};

    /// A distance from 0 in the first feature alone.
    fn reference(features: usize, limit: f64) -> OodReference {
        let mut whitening = vec![0.0; features * (features + 1) / 2];
        whitening[0] = 1.0;
        OodReference {
            features,
            scans: 9,
            shrinkage: 0.0,
            limit,
            quantile: 0.99,
            limit_scans: 9,
            means: vec![0.0; 3 * features],
            whitening,
        }
    }

    #[test]
    fn scans_are_parted_by_flag_and_reason() {
        let model = Model::embedded().unwrap();
        let n = model.manifest.architecture.feature_shape_cdhw()[0];
        let calibration = Calibration {
            ood: Some(reference(n, 1.0)),
            texture: Some(reference(TEXTURE_FEATURES, 2.0)),
            ..Calibration::none()
        };
        let mut answers = Answers::default();
        // Class, what is said, distance of features and of texture.
        for (class, said, features, texture) in
            [(0, 0, 0.5, 0.2), (1, 1, 0.9, 1.9), (2, 1, 1.5, 0.0), (0, 0, 0.1, 2.5), (1, 2, 3.0, 8.0)]
        {
            let mut logits = vec![0.0; 3];
            logits[said] = 4.0;
            answers.logits.push(logits);
            let row = |len: usize, first: f32| (0..len).map(|i| if i == 0 { first } else { 7.0 }).collect::<Vec<f32>>();
            answers.pooled.push(row(n, features));
            answers.texture.push(row(TEXTURE_FEATURES, texture));
            answers.classes.push(class);
            answers.patients.push(format!("{features}"));
        }
        let document = part(&model, &calibration, &answers).unwrap();
        let counts: Vec<(usize, usize)> = document.rows.iter().map(|r| (r.scans, r.right)).collect();
        assert_eq!(counts, [(5, 3), (2, 2), (3, 1), (2, 0), (2, 1)]);
        assert!((document.rows[2].score.unwrap() - 1.5).abs() < 1e-6);
        let text = markdown(&document);
        assert!(text.contains("| not flagged | 2 | 2 | 100.0 (34.2 to 100.0) | 0.95 |"), "{text}");
        assert!(part(&model, &Calibration::none(), &answers).is_err());
        assert!(part(&model, &calibration, &Answers::default()).is_err());
    }
}
