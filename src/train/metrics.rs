//! Figures of merit: AUC with intervals, accuracy, sensitivity, specificity, F1, for one class against the rest and over
//! all classes.
//!
//! Input: predictions, that is scores a class and the true class. Output: an [`Evaluation`]. Pure arithmetic in f64.
//!
//! Definitions are those of scikit-learn: the predicted class is the first of the largest score; a ratio whose
//! denominator is 0 counts as 0 in means over classes and is absent elsewhere; macro figures are plain means over
//! classes. AUC counts ties half. Its intervals: DeLong, DeLong and Clarke-Pearson (1988), which takes scans for
//! independent, and a percentile bootstrap over patients, which does not.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::model::synthetic::{Stream, fnv1a64, mix};

/// Resamples of a bootstrap.
pub const BOOTSTRAP_SAMPLES: usize = 2000;
/// The normal quantile of a two-sided 95 % interval.
pub const Z_95: f64 = 1.959_963_984_540_054;
/// The class that alerts are about.
pub const COVID_KEY: &str = "covid19";

/// One scan as a model saw it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    /// The scan.
    pub scan: String,
    /// Whose it is.
    pub patient: String,
    /// True class.
    pub class: usize,
    /// Probability of each class.
    pub scores: Vec<f64>,
}

impl Prediction {
    /// The class with the largest score, the first of equals.
    pub fn predicted(&self) -> usize {
        let mut best = 0;
        for (i, s) in self.scores.iter().enumerate() {
            if *s > self.scores[best] {
                best = i;
            }
        }
        best
    }
}

/// A figure with its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// The figure.
    pub value: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// One class against the rest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Binary {
    /// Scans of the class.
    pub positives: usize,
    /// All others.
    pub negatives: usize,
    /// Right answers to "is it this class?".
    pub accuracy: f64,
    /// Recall.
    pub sensitivity: Option<f64>,
    /// Recall of the rest.
    pub specificity: Option<f64>,
    /// Share of right ones among those called this class.
    pub precision: Option<f64>,
    /// Harmonic mean of precision and sensitivity.
    pub f1: f64,
    /// Area under the ROC curve, with DeLong's interval.
    pub auc: Option<Interval>,
    /// The same with a bootstrap over patients.
    pub auc_bootstrap: Option<Interval>,
}

/// Everything measured on a set of predictions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Keys of the classes.
    pub classes: Vec<String>,
    /// Scans.
    pub scans: usize,
    /// Patients.
    pub patients: usize,
    /// Scans of true class (row) by predicted class (column).
    pub confusion: Vec<Vec<usize>>,
    /// Share of scans whose class is right, over all classes.
    pub accuracy: f64,
    /// Mean of the classes' sensitivities.
    pub macro_sensitivity: f64,
    /// Mean of the classes' specificities.
    pub macro_specificity: f64,
    /// Mean of the classes' precisions.
    pub macro_precision: f64,
    /// Mean of the classes' F1.
    pub macro_f1: f64,
    /// Mean of the classes' AUC, each against the rest.
    pub macro_auc: Option<f64>,
    /// Each class against the rest.
    pub per_class: Vec<Binary>,
    /// Index of COVID-19 among the classes, if it is one.
    pub covid: Option<usize>,
}

impl Evaluation {
    /// COVID-19 against the rest, or the first class where there is no COVID-19.
    pub fn target(&self) -> Option<&Binary> {
        self.per_class.get(self.covid.unwrap_or(0))
    }
}

/// Why predictions cannot be measured.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum MetricsError {
    /// There are none.
    #[error("measure predictions: there are none")]
    Empty,
    /// A prediction has a class or a number of scores that does not fit.
    #[error("measure predictions: number {index} has {scores} scores and class {class}, expected {classes} classes")]
    Shape {
        /// Which.
        index: usize,
        /// Its scores.
        scores: usize,
        /// Its class.
        class: usize,
        /// Classes there are.
        classes: usize,
    },
    /// A score is not a finite number.
    #[error("measure predictions: number {index} has a score that is not finite")]
    NotFinite {
        /// Which.
        index: usize,
    },
}

/// Measures `predictions`.
///
/// # Errors
/// No predictions, or one that does not fit `classes`.
pub fn evaluate(predictions: &[Prediction], classes: &[String], seed: u64) -> Result<Evaluation, MetricsError> {
    if predictions.is_empty() {
        return Err(MetricsError::Empty);
    }
    let k = classes.len();
    for (index, p) in predictions.iter().enumerate() {
        if p.scores.len() != k || p.class >= k {
            return Err(MetricsError::Shape { index, scores: p.scores.len(), class: p.class, classes: k });
        }
        if p.scores.iter().any(|s| !s.is_finite()) {
            return Err(MetricsError::NotFinite { index });
        }
    }
    let mut confusion = vec![vec![0usize; k]; k];
    for p in predictions {
        confusion[p.class][p.predicted()] += 1;
    }
    let n = predictions.len();
    let right: usize = (0..k).map(|i| confusion[i][i]).sum();
    let mut number = BTreeMap::new();
    let patients: Vec<usize> = predictions
        .iter()
        .map(|p| {
            let next = number.len();
            *number.entry(p.patient.as_str()).or_insert(next)
        })
        .collect();
    let per_class: Vec<Binary> = (0..k).map(|c| binary(predictions, &confusion, &patients, c, seed)).collect();
    let mean = |f: &dyn Fn(&Binary) -> f64| per_class.iter().map(f).sum::<f64>() / k as f64;
    let macro_auc =
        if per_class.iter().all(|b| b.auc.is_some()) { Some(mean(&|b| b.auc.map_or(0.0, |a| a.value))) } else { None };
    Ok(Evaluation {
        classes: classes.to_vec(),
        scans: n,
        patients: number.len(),
        accuracy: right as f64 / n as f64,
        macro_sensitivity: mean(&|b| b.sensitivity.unwrap_or(0.0)),
        macro_specificity: mean(&|b| b.specificity.unwrap_or(0.0)),
        macro_precision: mean(&|b| b.precision.unwrap_or(0.0)),
        macro_f1: mean(&|b| b.f1),
        macro_auc,
        per_class,
        covid: classes.iter().position(|c| c == COVID_KEY),
        confusion,
    })
}

fn binary(predictions: &[Prediction], confusion: &[Vec<usize>], patients: &[usize], c: usize, seed: u64) -> Binary {
    let n = predictions.len();
    let tp = confusion[c][c];
    let positives: usize = confusion[c].iter().sum();
    let called: usize = confusion.iter().map(|row| row[c]).sum();
    let (fp, missed) = (called - tp, positives - tp);
    let negatives = n - positives;
    let ratio = |a: usize, b: usize| (b > 0).then(|| a as f64 / b as f64);
    let scores: Vec<f64> = predictions.iter().map(|p| p.scores[c]).collect();
    let truth: Vec<bool> = predictions.iter().map(|p| p.class == c).collect();
    Binary {
        positives,
        negatives,
        accuracy: (n - fp - missed) as f64 / n as f64,
        sensitivity: ratio(tp, positives),
        specificity: ratio(negatives - fp, negatives),
        precision: ratio(tp, called),
        f1: ratio(2 * tp, 2 * tp + fp + missed).unwrap_or(0.0),
        auc: delong(&scores, &truth),
        auc_bootstrap: bootstrap_auc(&scores, &truth, patients, BOOTSTRAP_SAMPLES, seed),
    }
}

/// Ranks from 1, ties sharing the mean of theirs.
fn midranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
    let mut ranks = vec![0.0; values.len()];
    let mut i = 0;
    while i < order.len() {
        let mut j = i;
        while j < order.len() && values[order[j]] == values[order[i]] {
            j += 1;
        }
        for &at in &order[i..j] {
            ranks[at] = 0.5 * (i + 1 + j) as f64;
        }
        i = j;
    }
    ranks
}

fn split(scores: &[f64], positive: &[bool]) -> (Vec<f64>, Vec<f64>) {
    let of = |wanted: bool| scores.iter().zip(positive).filter(|(_, p)| **p == wanted).map(|(s, _)| *s).collect();
    (of(true), of(false))
}

/// Area under the ROC curve: the chance that a positive scores higher than a negative, ties counting half. None without
/// both kinds.
pub fn auc(scores: &[f64], positive: &[bool]) -> Option<f64> {
    let m = positive.iter().filter(|p| **p).count();
    let n = positive.len() - m;
    if m == 0 || n == 0 {
        return None;
    }
    let ranks = midranks(scores);
    let sum: f64 = ranks.iter().zip(positive).filter(|(_, p)| **p).map(|(r, _)| r).sum();
    Some((sum - 0.5 * (m * (m + 1)) as f64) / (m * n) as f64)
}

/// Area under the ROC curve with DeLong's 95 % interval, cut to [0, 1]. None with fewer than two of either kind.
pub fn delong(scores: &[f64], positive: &[bool]) -> Option<Interval> {
    let (x, y) = split(scores, positive);
    let (m, n) = (x.len(), y.len());
    if m < 2 || n < 2 {
        return auc(scores, positive).map(|value| Interval { value, low: 0.0, high: 1.0 });
    }
    let all = midranks(&[x.as_slice(), y.as_slice()].concat());
    let (within_x, within_y) = (midranks(&x), midranks(&y));
    let v10: Vec<f64> = (0..m).map(|i| (all[i] - within_x[i]) / n as f64).collect();
    let v01: Vec<f64> = (0..n).map(|j| 1.0 - (all[m + j] - within_y[j]) / m as f64).collect();
    let value = mean(&v10);
    let error = (variance(&v10) / m as f64 + variance(&v01) / n as f64).sqrt();
    Some(Interval { value, low: (value - Z_95 * error).max(0.0), high: (value + Z_95 * error).min(1.0) })
}

/// Area under the ROC curve with a 95 % percentile interval over resampled patients. `patients[i]` is whose scan `i` is.
/// Resamples without both kinds are drawn again, at most as often as there are resamples.
pub fn bootstrap_auc(
    scores: &[f64],
    positive: &[bool],
    patients: &[usize],
    samples: usize,
    seed: u64,
) -> Option<Interval> {
    let value = auc(scores, positive)?;
    let count = patients.iter().max().map_or(0, |m| m + 1);
    let mut scans = vec![Vec::new(); count];
    for (i, &p) in patients.iter().enumerate() {
        scans[p].push(i);
    }
    let mut found = Vec::with_capacity(samples);
    let (mut s, mut truth) = (Vec::new(), Vec::new());
    for round in 0..2 * samples as u64 {
        let stream = Stream::new(mix(seed ^ fnv1a64("bootstrap")).wrapping_add(round), "patients");
        s.clear();
        truth.clear();
        for draw in 0..count as u64 {
            for &i in &scans[(stream.bits(draw) % count as u64) as usize] {
                s.push(scores[i]);
                truth.push(positive[i]);
            }
        }
        found.extend(auc(&s, &truth));
        if found.len() == samples {
            break;
        }
    }
    found.sort_by(f64::total_cmp);
    let at = |q: f64| found.get((q * (found.len().saturating_sub(1)) as f64).round() as usize).copied();
    Some(Interval { value, low: at(0.025)?, high: at(0.975)? })
}

/// Points of the ROC curve: false positive rate, true positive rate, threshold; from (0, 0) to (1, 1).
pub fn roc(scores: &[f64], positive: &[bool]) -> Vec<[f64; 3]> {
    let m = positive.iter().filter(|p| **p).count();
    let n = positive.len() - m;
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    let mut points = vec![[0.0, 0.0, f64::INFINITY]];
    let (mut tp, mut fp) = (0usize, 0usize);
    for (i, &at) in order.iter().enumerate() {
        if positive[at] {
            tp += 1;
        } else {
            fp += 1;
        }
        let last_of_tie = order.get(i + 1).is_none_or(|&next| scores[next] != scores[at]);
        if last_of_tie {
            points.push([fp as f64 / n.max(1) as f64, tp as f64 / m.max(1) as f64, scores[at]]);
        }
    }
    points
}

/// Mean.
pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// Variance with n - 1; 0 for fewer than two values.
pub fn variance(values: &[f64]) -> f64 {
    if values.len() < 2 {
        return 0.0;
    }
    let m = mean(values);
    values.iter().map(|v| (v - m).powi(2)).sum::<f64>() / (values.len() - 1) as f64
}

/// Mean and standard deviation (n - 1).
pub fn mean_deviation(values: &[f64]) -> (f64, f64) {
    (mean(values), variance(values).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn predictions(rows: &[(usize, [f64; 3])]) -> Vec<Prediction> {
        rows.iter()
            .enumerate()
            .map(|(i, (class, scores))| Prediction {
                scan: format!("s{i}"),
                patient: format!("p{}", i / 2),
                class: *class,
                scores: scores.to_vec(),
            })
            .collect()
    }

    fn keys() -> Vec<String> {
        crate::model::CLASS_KEYS.map(str::to_owned).to_vec()
    }

    #[test]
    fn a_hand_made_table() {
        let rows = [
            (0, [0.8, 0.1, 0.1]),
            (0, [0.2, 0.7, 0.1]),
            (1, [0.1, 0.8, 0.1]),
            (1, [0.1, 0.7, 0.2]),
            (2, [0.1, 0.1, 0.8]),
            (2, [0.0, 0.1, 0.9]),
        ];
        let e = evaluate(&predictions(&rows), &keys(), 1).unwrap();
        assert_eq!(e.confusion, [[1, 1, 0], [0, 2, 0], [0, 0, 2]]);
        assert!((e.accuracy - 5.0 / 6.0).abs() < 1e-15);
        assert_eq!((e.patients, e.covid), (3, Some(1)));
        let covid = e.target().unwrap();
        assert_eq!((covid.sensitivity, covid.specificity), (Some(1.0), Some(0.75)));
        assert!((covid.f1 - 0.8).abs() < 1e-15);
        // 8 pairs; 0.7 against 0.7 is half.
        assert!((covid.auc.unwrap().value - 7.5 / 8.0).abs() < 1e-15);
    }

    #[test]
    fn auc_of_perfect_reversed_and_constant_scores() {
        let truth = [true, true, false, false, false];
        assert_eq!(auc(&[5.0, 4.0, 3.0, 2.0, 1.0], &truth), Some(1.0));
        assert_eq!(auc(&[1.0, 2.0, 3.0, 4.0, 5.0], &truth), Some(0.0));
        assert_eq!(auc(&[1.0; 5], &truth), Some(0.5));
        assert_eq!(auc(&[1.0, 2.0], &[true, true]), None);
    }

    #[test]
    fn the_roc_curve_holds_the_area() {
        let stream = Stream::new(3, "roc");
        let truth: Vec<bool> = (0..300).map(|i| stream.uniform(i) < 0.4).collect();
        let scores: Vec<f64> = (0..300u64)
            .map(|i| ((stream.uniform(1000 + i) + if truth[i as usize] { 0.3 } else { 0.0 }) * 20.0).round())
            .collect();
        let points = roc(&scores, &truth);
        let area: f64 = points.windows(2).map(|w| (w[1][0] - w[0][0]) * 0.5 * (w[1][1] + w[0][1])).sum();
        assert!((area - auc(&scores, &truth).unwrap()).abs() < 1e-12);
        let (d, b) = (delong(&scores, &truth).unwrap(), {
            let own: Vec<usize> = (0..300).collect();
            bootstrap_auc(&scores, &truth, &own, 1000, 1).unwrap()
        });
        assert!((d.low - b.low).abs() < 0.02 && (d.high - b.high).abs() < 0.02, "{d:?} {b:?}");
    }

    #[test]
    fn what_cannot_be_measured_is_an_error() {
        assert_eq!(evaluate(&[], &keys(), 1), Err(MetricsError::Empty));
        let mut p = predictions(&[(0, [1.0, 0.0, 0.0])]);
        p[0].class = 3;
        assert!(matches!(evaluate(&p, &keys(), 1), Err(MetricsError::Shape { .. })));
        p[0].class = 0;
        p[0].scores[2] = f64::NAN;
        assert_eq!(evaluate(&p, &keys(), 1), Err(MetricsError::NotFinite { index: 0 }));
    }

    #[test]
    fn a_class_without_scans_leaves_the_rest_measured() {
        let e = evaluate(&predictions(&[(0, [0.9, 0.1, 0.0]), (2, [0.1, 0.0, 0.9])]), &keys(), 1).unwrap();
        assert_eq!(e.accuracy, 1.0);
        assert_eq!(e.macro_auc, None);
        assert_eq!(e.per_class[1].sensitivity, None);
    }
}
