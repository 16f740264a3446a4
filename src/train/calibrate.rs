//! Calibration of a model: temperature, alert thresholds, reliability, likeness to the training data.
//!
//! Input: the model's [`Answers`] on scans it was not trained on, and on scans it was. Output: a
//! [`Calibration`] bound to the model's weights, and a picture of its reliability.
//!
//! - *Temperature*: the one with the least cross-entropy, by a golden-section search over its logarithm; the loss has one
//!   minimum there.
//! - *Thresholds*: the largest probability that keeps at least the wanted share of the class's scans at or above it;
//!   Wilson's interval of that share and of the specificity, and the interval of the threshold over resampled patients.
//! - *Expected calibration error*: of the predicted class, bins of equal width (Guo et al. 2017). After the fit it is
//!   measured crosswise, each half of the patients under the temperature of the other half.
//! - *Likeness*: means by class and one covariance on the training scans, shrunk towards the identity as Ledoit and Wolf
//!   (2004) say, of the pooled features and of the input's texture; the limit is a quantile of the distances of the scans
//!   that were not trained on, since those that were lie too near. Each of the two gets half of the share that may lie
//!   beyond, so that both together flag no more.
//!
//! Deliberately absent: per-class temperatures, anything that changes which class is predicted.

use std::path::Path;

use super::cam::wilson;
use super::metrics::COVID_KEY;
use super::plot::{self, COLOURS, Frame, Line, Picture};
use super::{Dataset, TrainError, judge, write_atomic};
use crate::model::synthetic::Stream;
use crate::model::{CLASS_KEYS, Model};
use crate::report::calibration::{CALIBRATION_SCHEMA, Calibration, MAX_FEATURES, OodReference, Threshold};
use crate::resample::alone;
use crate::resample::texture::TextureMeter;

/// Bins of the expected calibration error.
pub const BINS: usize = 15;
/// Resamples for the interval of a threshold.
pub const RESAMPLES: usize = 1000;
/// The temperatures that are tried.
const TEMPERATURES: [f64; 2] = [0.05, 20.0];

/// What a model said of some scans.
#[derive(Clone, Debug, Default)]
pub struct Answers {
    /// Logits, one row a scan.
    pub logits: Vec<Vec<f64>>,
    /// Pooled features, one row a scan.
    pub pooled: Vec<Vec<f32>>,
    /// Features of the input's texture, one row a scan.
    pub texture: Vec<Vec<f32>>,
    /// True classes.
    pub classes: Vec<usize>,
    /// Whose scans they are.
    pub patients: Vec<String>,
}

impl Answers {
    /// What `model` says of scans `indices` of `data`.
    ///
    /// # Errors
    /// A model for other data.
    pub fn of(model: &Model, data: &dyn Dataset, indices: &[usize], threads: usize) -> Result<Self, TrainError> {
        let mut all = Self::default();
        let dhw = data.input_dhw();
        let mut meter = TextureMeter::new(dhw);
        judge::each(model, data, indices, threads, &mut |index, volume, inference| {
            all.texture.push(meter.measure(volume, &alone).features(dhw).to_vec());
            all.logits.push(inference.logits.iter().map(|l| f64::from(*l)).collect());
            all.pooled.push(inference.pooled.clone());
            all.classes.push(data.class(index));
            all.patients.push(data.patient(index).to_owned());
            Ok(())
        })?;
        Ok(all)
    }

    /// How many scans.
    pub fn len(&self) -> usize {
        self.classes.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.classes.is_empty()
    }

    /// Whether the largest logit of scan `i` is that of its class.
    pub fn is_right(&self, i: usize) -> bool {
        largest(&self.logits[i]) == self.classes[i]
    }

    /// Share of scans whose largest logit is that of their class.
    pub fn accuracy(&self) -> f64 {
        let right = (0..self.len()).filter(|&i| self.is_right(i)).count();
        right as f64 / self.len().max(1) as f64
    }

    fn probabilities(&self, temperature: f64) -> Vec<Vec<f64>> {
        let calibration = Calibration { temperature, ..Calibration::none() };
        self.logits.iter().map(|l| calibration.probabilities(l)).collect()
    }

    fn only(&self, keep: impl Fn(&str) -> bool) -> Self {
        let mut some = Self::default();
        for i in (0..self.len()).filter(|&i| keep(&self.patients[i])) {
            some.logits.push(self.logits[i].clone());
            some.pooled.push(self.pooled[i].clone());
            some.texture.push(self.texture[i].clone());
            some.classes.push(self.classes[i]);
            some.patients.push(self.patients[i].clone());
        }
        some
    }
}

fn largest(values: &[f64]) -> usize {
    (0..values.len()).fold(0, |best, i| if values[i] > values[best] { i } else { best })
}

/// Mean cross-entropy of `answers` under `temperature`.
pub fn cross_entropy(answers: &Answers, temperature: f64) -> f64 {
    let of = |(logits, class): (&Vec<f64>, &usize)| {
        let scaled: Vec<f64> = logits.iter().map(|l| l / temperature).collect();
        let max = scaled.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        max + scaled.iter().map(|l| (l - max).exp()).sum::<f64>().ln() - scaled[*class]
    };
    answers.logits.iter().zip(&answers.classes).map(of).sum::<f64>() / answers.len().max(1) as f64
}

/// The temperature with the least cross-entropy.
pub fn temperature(answers: &Answers) -> f64 {
    let golden = (5f64.sqrt() - 1.0) / 2.0;
    let (mut low, mut high) = (TEMPERATURES[0].ln(), TEMPERATURES[1].ln());
    let loss = |t: f64| cross_entropy(answers, t.exp());
    let (mut a, mut b) = (high - golden * (high - low), low + golden * (high - low));
    let (mut loss_a, mut loss_b) = (loss(a), loss(b));
    // 0.618^60 of the range is below the last digit of a double.
    for _ in 0..60 {
        if loss_a <= loss_b {
            (high, b, loss_b) = (b, a, loss_a);
            a = high - golden * (high - low);
            loss_a = loss(a);
        } else {
            (low, a, loss_a) = (a, b, loss_b);
            b = low + golden * (high - low);
            loss_b = loss(b);
        }
    }
    (0.5 * (low + high)).exp()
}

/// One bin of a reliability curve.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Bin {
    /// Scans.
    pub count: usize,
    /// Mean probability.
    pub probability: f64,
    /// Share for which it came true.
    pub frequency: f64,
}

/// Probabilities against what came true, in [`BINS`] bins of equal width.
pub fn reliability(pairs: &[(f64, bool)]) -> Vec<Bin> {
    let mut bins = vec![Bin::default(); BINS];
    for &(p, came_true) in pairs {
        let bin = &mut bins[((p * BINS as f64) as usize).min(BINS - 1)];
        bin.count += 1;
        bin.probability += p;
        bin.frequency += f64::from(u8::from(came_true));
    }
    for bin in bins.iter_mut().filter(|b| b.count > 0) {
        bin.probability /= bin.count as f64;
        bin.frequency /= bin.count as f64;
    }
    bins
}

/// The mean gap of a reliability curve, weighted by scans.
pub fn expected_error(bins: &[Bin]) -> f64 {
    let total: usize = bins.iter().map(|b| b.count).sum();
    let gap = |b: &Bin| b.count as f64 * (b.probability - b.frequency).abs();
    bins.iter().map(gap).sum::<f64>() / total.max(1) as f64
}

/// The predicted class's probability, and whether it is the true one.
fn confidences(probabilities: &[Vec<f64>], classes: &[usize]) -> Vec<(f64, bool)> {
    let of = |(p, class): (&Vec<f64>, &usize)| {
        let best = largest(p);
        (p[best], best == *class)
    };
    probabilities.iter().zip(classes).map(of).collect()
}

/// Confidences of every scan under the temperature of the other half of the patients.
fn crosswise(answers: &Answers) -> Vec<(f64, bool)> {
    let mut patients: Vec<&str> = answers.patients.iter().map(String::as_str).collect();
    patients.sort_unstable();
    patients.dedup();
    let odd: std::collections::HashSet<&str> = patients.iter().skip(1).step_by(2).copied().collect();
    let (a, b) = (answers.only(|p| odd.contains(p)), answers.only(|p| !odd.contains(p)));
    let under = |of: &Answers, other: &Answers| confidences(&of.probabilities(temperature(other)), &of.classes);
    [under(&a, &b), under(&b, &a)].concat()
}

/// The largest threshold that at least `wanted` of `positives` reach. None without positives.
fn threshold_for(positives: &mut [f64], wanted: f64) -> Option<f64> {
    positives.sort_unstable_by(f64::total_cmp);
    // Rounding must not cost a scan that the share allows to miss.
    let may_miss = ((1.0 - wanted) * positives.len() as f64 + 1e-9) as usize;
    positives.get(may_miss.min(positives.len().saturating_sub(1))).copied()
}

/// The threshold of `class`.
fn threshold(answers: &Answers, probabilities: &[Vec<f64>], class: usize, wanted: f64, seed: u64) -> Option<Threshold> {
    let of = |i: usize| (probabilities[i][class], answers.classes[i] == class);
    let all: Vec<(f64, bool)> = (0..answers.len()).map(of).collect();
    let positive = |pairs: &[(f64, bool)]| pairs.iter().filter(|(_, y)| *y).map(|(p, _)| *p).collect::<Vec<f64>>();
    let alert = threshold_for(&mut positive(&all), wanted)?;
    let count = |y: bool, above: bool| all.iter().filter(|(p, t)| *t == y && (*p >= alert) == above).count();
    let sensitivity = wilson(count(true, true), count(true, true) + count(true, false));
    let specificity = wilson(count(false, false), count(false, true) + count(false, false));
    // Patients, not scans, are drawn.
    let mut by_patient: std::collections::BTreeMap<&str, Vec<f64>> = std::collections::BTreeMap::new();
    for (i, (p, _)) in all.iter().enumerate().filter(|(_, (_, y))| *y) {
        by_patient.entry(answers.patients[i].as_str()).or_default().push(*p);
    }
    let patients: Vec<&Vec<f64>> = by_patient.values().collect();
    let stream = Stream::new(seed, "threshold");
    let mut drawn: Vec<f64> = (0..RESAMPLES)
        .filter_map(|r| {
            let pick = |k: usize| {
                let u = stream.uniform((r * patients.len() + k) as u64);
                patients[((u * patients.len() as f64) as usize).min(patients.len() - 1)].iter().copied()
            };
            threshold_for(&mut (0..patients.len()).flat_map(pick).collect::<Vec<f64>>(), wanted)
        })
        .collect();
    drawn.sort_unstable_by(f64::total_cmp);
    let at = |q: f64| drawn.get((q * (drawn.len().saturating_sub(1)) as f64).round() as usize).copied();
    Some(Threshold {
        alert,
        wanted_sensitivity: Some(wanted),
        sensitivity: Some(sensitivity[0]),
        sensitivity_interval_95: Some([sensitivity[1], sensitivity[2]]),
        specificity: Some(specificity[0]),
        specificity_interval_95: Some([specificity[1], specificity[2]]),
        alert_interval_95: at(0.025).zip(at(0.975)).map(|(a, b)| [a, b]),
    })
}

/// Means by class, and the inverse of the Cholesky factor of the shrunk covariance about them.
struct Fitted {
    means: Vec<f32>,
    whitening: Vec<f32>,
    shrinkage: f64,
}

/// Of one row of features a scan, with the scans' classes, of which there are `classes`.
fn fit_features(rows: &[Vec<f32>], of: &[usize], classes: usize) -> Result<Fitted, TrainError> {
    let n = rows.first().map_or(0, Vec::len);
    if !(1..=MAX_FEATURES).contains(&n) || rows.iter().any(|f| f.len() != n) {
        return Err(TrainError::Data(format!("expected 1 to {MAX_FEATURES} features a scan, got {n}")));
    }
    let mut means = vec![0.0f64; classes * n];
    let mut counts = vec![0usize; classes];
    for (row, &class) in rows.iter().zip(of) {
        counts[class] += 1;
        for (mean, v) in means[class * n..(class + 1) * n].iter_mut().zip(row) {
            *mean += f64::from(*v);
        }
    }
    if let Some(empty) = counts.iter().position(|c| *c < 2) {
        let key = CLASS_KEYS.get(empty).copied().unwrap_or("?");
        return Err(TrainError::Data(format!("expected two scans of class {key} at least, got {}", counts[empty])));
    }
    for (mean, i) in means.iter_mut().zip(0..) {
        *mean /= counts[i / n] as f64;
    }
    let apart: Vec<Vec<f64>> = rows
        .iter()
        .zip(of)
        .map(|(row, &class)| row.iter().zip(&means[class * n..]).map(|(v, m)| f64::from(*v) - m).collect())
        .collect();
    let scans = apart.len() as f64;
    let mut covariance = vec![0.0f64; n * n];
    for row in &apart {
        for (i, a) in row.iter().enumerate() {
            for (c, b) in covariance[i * n..i * n + i + 1].iter_mut().zip(row) {
                *c += a * b / scans;
            }
        }
    }
    for i in 0..n {
        for j in 0..i {
            covariance[j * n + i] = covariance[i * n + j];
        }
    }
    // Ledoit and Wolf: the target is the identity times the mean variance.
    let mean_variance = (0..n).map(|i| covariance[i * n + i]).sum::<f64>() / n as f64;
    if mean_variance <= 0.0 {
        return Err(TrainError::Data("the features do not vary".to_owned()));
    }
    let square = |v: f64| v * v;
    let spread =
        (0..n * n).map(|k| square(covariance[k] - if k / n == k % n { mean_variance } else { 0.0 })).sum::<f64>();
    let squares: f64 = covariance.iter().map(|c| c * c).sum();
    let noise = apart
        .iter()
        .map(|row| {
            // |x x^T - S|^2 = |x|^4 - 2 x^T S x + |S|^2.
            let norm: f64 = row.iter().map(|v| v * v).sum();
            let through: f64 = row.iter().enumerate().map(|(i, a)| a * dot(&covariance[i * n..(i + 1) * n], row)).sum();
            norm * norm - 2.0 * through + squares
        })
        .sum::<f64>()
        / square(scans);
    let shrinkage = if spread > 0.0 { (noise / spread).clamp(0.0, 1.0) } else { 1.0 };
    for (k, c) in covariance.iter_mut().enumerate() {
        *c *= 1.0 - shrinkage;
        if k / n == k % n {
            // Features that are constant on the training scans keep a variance, so that leaving it counts.
            *c += shrinkage * mean_variance + 1e-6 * mean_variance;
        }
    }
    let factor = cholesky(covariance, n).ok_or_else(|| TrainError::Data("the covariance is singular".to_owned()))?;
    let whitening = inverse_of_lower(&factor, n);
    let mut packed = Vec::with_capacity(n * (n + 1) / 2);
    for i in 0..n {
        packed.extend(whitening[i * n..i * n + i + 1].iter().map(|v| *v as f32));
    }
    Ok(Fitted { means: means.iter().map(|m| *m as f32).collect(), whitening: packed, shrinkage })
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// The lower factor of a symmetric positive definite matrix, row-major; none for another matrix.
fn cholesky(mut a: Vec<f64>, n: usize) -> Option<Vec<f64>> {
    for i in 0..n {
        for j in 0..=i {
            let s = a[i * n + j] - dot(&a[i * n..i * n + j], &a[j * n..j * n + j]);
            a[i * n + j] = match i == j {
                true if s > 0.0 => s.sqrt(),
                true => return None,
                false => s / a[j * n + j],
            };
        }
        a[i * n + i + 1..(i + 1) * n].fill(0.0);
    }
    Some(a)
}

/// The inverse of a lower triangular matrix, row-major.
fn inverse_of_lower(l: &[f64], n: usize) -> Vec<f64> {
    let mut inverse = vec![0.0; n * n];
    for column in 0..n {
        inverse[column * n + column] = 1.0 / l[column * n + column];
        for i in column + 1..n {
            let s: f64 = (column..i).map(|k| l[i * n + k] * inverse[k * n + column]).sum();
            inverse[i * n + column] = -s / l[i * n + i];
        }
    }
    inverse
}

/// What a calibration is made with.
#[derive(Clone, Debug, PartialEq)]
pub struct CalibrateOptions {
    /// The data, in words.
    pub fitted_on: String,
    /// The sensitivity that COVID-19 and pneumonia alert at.
    pub sensitivity: f64,
    /// Share of scans like the training data that lie within the limit.
    pub quantile: f64,
    /// Of the resampling.
    pub seed: u64,
}

/// The calibration of `model`: probabilities and limit from `held_out`, reference features from `reference`, which are
/// scans it was trained on.
///
/// # Errors
/// Too few scans, a share out of range.
pub fn calibrate(
    model: &Model,
    held_out: &Answers,
    reference: &Answers,
    options: &CalibrateOptions,
) -> Result<Calibration, TrainError> {
    let share = |option, value: f64| {
        let fault = TrainError::Option { option, expected: "more than 0, less than 1".into(), got: value.to_string() };
        if value > 0.0 && value < 1.0 { Ok(()) } else { Err(fault) }
    };
    share("sensitivity", options.sensitivity)?;
    share("quantile", options.quantile)?;
    if held_out.len() < 10 {
        return Err(TrainError::Data(format!("expected ten held-out scans at least, got {}", held_out.len())));
    }
    let temperature = temperature(held_out);
    let probabilities = held_out.probabilities(temperature);
    let before = expected_error(&reliability(&confidences(&held_out.probabilities(1.0), &held_out.classes)));
    let after = expected_error(&reliability(&crosswise(held_out)));
    let mut thresholds = std::collections::BTreeMap::new();
    for (class, key) in CLASS_KEYS.iter().enumerate().filter(|(_, key)| **key != "healthy") {
        if let Some(t) = threshold(held_out, &probabilities, class, options.sensitivity, options.seed) {
            thresholds.insert((*key).to_owned(), t);
        }
    }
    // Of what may lie beyond a limit, half for each: both together are then within bounds whatever they share.
    let quantile = 0.5 + 0.5 * options.quantile;
    let ood = reference_of([&reference.pooled[..], &held_out.pooled], &reference.classes, quantile)?;
    let texture = reference_of([&reference.texture[..], &held_out.texture], &reference.classes, quantile)?;
    let calibration = Calibration {
        schema: CALIBRATION_SCHEMA.to_owned(),
        model: model.manifest.id.clone(),
        weights_sha256: model.sha256.clone(),
        fitted_on: options.fitted_on.clone(),
        temperature,
        thresholds,
        expected_calibration_error: Some([before, after]),
        ood: Some(ood),
        texture: Some(texture),
    };
    Ok(calibration)
}

/// The reference of features `[of the training scans, of held-out scans]`; `classes` are those of the former.
fn reference_of(
    [rows, held_out]: [&[Vec<f32>]; 2],
    classes: &[usize],
    quantile: f64,
) -> Result<OodReference, TrainError> {
    let fitted = fit_features(rows, classes, CLASS_KEYS.len())?;
    let mut reference = OodReference {
        features: fitted.means.len() / CLASS_KEYS.len(),
        scans: rows.len(),
        shrinkage: fitted.shrinkage,
        limit: 1.0,
        quantile,
        limit_scans: held_out.len(),
        means: fitted.means,
        whitening: fitted.whitening,
    };
    let mut distances: Vec<f64> = held_out.iter().filter_map(|f| reference.score(f)).collect();
    distances.sort_unstable_by(f64::total_cmp);
    let at = ((quantile * distances.len() as f64).ceil() as usize).clamp(1, distances.len().max(1)) - 1;
    reference.limit = distances.get(at).copied().filter(|d| *d > 0.0).ok_or_else(|| {
        TrainError::Data("the held-out scans have no distance from the training data; are they the same?".to_owned())
    })?;
    Ok(reference)
}

/// Writes the calibration as TOML, after reading back what would be written.
///
/// # Errors
/// Values that the scanner would refuse, or a full disk.
pub fn write(path: &Path, calibration: &Calibration) -> Result<(), TrainError> {
    let bad = |e: String| TrainError::Data(format!("write the calibration: {e}"));
    let text = toml::to_string(calibration).map_err(|e| bad(e.to_string()))?;
    Calibration::parse(&text).map_err(|e| bad(e.to_string()))?;
    let head = format!("# Calibration of the model {}, made by darnet-train calibrate.\n\n", calibration.model);
    write_atomic(path, (head + &text).as_bytes())
}

/// Reliability before and after, of the predicted class and of COVID-19.
///
/// # Errors
/// A file that cannot be written.
pub fn draw(path: &Path, held_out: &Answers, calibration: &Calibration) -> Result<(), TrainError> {
    let covid = CLASS_KEYS.iter().position(|k| *k == COVID_KEY).unwrap_or(0);
    let mut picture = Picture::new(1040, 460);
    for (place, title) in [(0, "PREDICTED CLASS"), (1, "COVID-19")] {
        let left = 60 + 520 * place;
        let curve = |name: &str, temperature: f64| {
            let p = held_out.probabilities(temperature);
            let pairs = match place {
                0 => confidences(&p, &held_out.classes),
                _ => p.iter().zip(&held_out.classes).map(|(p, c)| (p[covid], *c == covid)).collect(),
            };
            let bins = reliability(&pairs);
            let name = format!("{name} ECE {:.3}", expected_error(&bins));
            let points = bins.iter().filter(|b| b.count > 0).map(|b| [b.probability, b.frequency]).collect();
            (Line { name, points }, bins)
        };
        let (before, _) = curve("T=1", 1.0);
        let (after, bins) = curve(&format!("T={:.2}", calibration.temperature), calibration.temperature);
        let frame = Frame { place: [left, 40, 430, 340], x: [0.0, 1.0], y: [0.0, 1.0] };
        plot::chart(&mut picture, &frame, title, &[]);
        picture.line([left as f64, 380.0], [(left + 430) as f64, 40.0], [190, 190, 190]);
        // How many scans a bin has, as bars at the foot.
        let most = bins.iter().map(|b| b.count).max().unwrap_or(1).max(1);
        for (i, bin) in bins.iter().enumerate() {
            let height = (60 * bin.count / most) as i64;
            let width = 430 / BINS as i64;
            picture.fill(left + 1 + i as i64 * width, 380 - height, width - 2, height, [214, 226, 236]);
        }
        for (i, line) in [before, after].iter().enumerate() {
            let at = |p: [f64; 2]| [left as f64 + 430.0 * p[0], 380.0 - 340.0 * p[1]];
            for pair in line.points.windows(2) {
                picture.line(at(pair[0]), at(pair[1]), COLOURS[i]);
            }
            for p in &line.points {
                let [x, y] = at(*p);
                picture.fill(x as i64 - 2, y as i64 - 2, 6, 6, COLOURS[i]);
            }
            picture.fill(left + 10, 54 + 14 * i as i64, 14, 3, COLOURS[i]);
            picture.text(left + 30, 52 + 14 * i as i64, 1, &line.name, [30, 30, 30]);
        }
        picture.text(left + 100, 420, 1, "FREQUENCY OVER PROBABILITY", [30, 30, 30]);
    }
    picture.save(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Scans whose true class follows softmax(logits / `t`), from a fixed stream.
    fn drawn(n: usize, t: f64) -> Answers {
        let s = Stream::new(1, "answers");
        let mut a = Answers::default();
        for i in 0..n as u64 {
            let logits: Vec<f64> = (0..3).map(|k| 8.0 * (s.uniform(5 * i + k) - 0.5)).collect();
            let p = Calibration { temperature: t, ..Calibration::none() }.probabilities(&logits);
            let u = s.uniform(5 * i + 3);
            a.classes.push(if u < p[0] {
                0
            } else if u < p[0] + p[1] {
                1
            } else {
                2
            });
            a.pooled.push(logits.iter().map(|l| *l as f32).collect());
            a.texture.push(vec![s.uniform(5 * i + 4) as f32]);
            a.logits.push(logits);
            a.patients.push(format!("p{}", i / 2));
        }
        a
    }

    #[test]
    fn the_temperature_that_made_the_data_is_found() {
        for t in [0.5, 1.0, 2.5] {
            let answers = drawn(4000, t);
            let found = temperature(&answers);
            assert!((found / t - 1.0).abs() < 0.1, "{t}: {found}");
            let error =
                |t: f64| expected_error(&reliability(&confidences(&answers.probabilities(t), &answers.classes)));
            assert!(error(found) < 0.03, "{}", error(found));
            assert!(t == 1.0 || error(1.0) > 2.0 * error(found));
        }
    }

    #[test]
    fn a_threshold_keeps_the_wanted_share_and_no_more() {
        let mut p: Vec<f64> = (1..=20).map(|i| f64::from(i) / 20.0).collect();
        assert_eq!(threshold_for(&mut p, 0.95), Some(0.1));
        assert_eq!(threshold_for(&mut p, 0.9), Some(0.15));
        assert_eq!(threshold_for(&mut p, 0.999), Some(0.05));
        assert_eq!(threshold_for(&mut [], 0.9), None);
        let answers = drawn(1000, 1.0);
        let t = threshold(&answers, &answers.probabilities(1.0), 1, 0.9, 1).unwrap();
        let s = t.sensitivity.unwrap();
        assert!((0.9..0.91).contains(&s), "{s}");
        let [low, high] = t.sensitivity_interval_95.unwrap();
        assert!(low < s && s < high && low > 0.85);
        let [low, high] = t.alert_interval_95.unwrap();
        assert!(low <= t.alert && t.alert <= high && high - low < 0.2);
    }

    #[test]
    fn the_error_is_the_mean_gap() {
        let bins = reliability(&[(0.95, true), (0.95, false), (0.05, false), (1.0, true)]);
        // The last bin: three scans of mean 0.9667, two thirds true; the first: 0.05, none.
        let wanted = (3.0 * (2.9 / 3.0 - 2.0 / 3.0) + 0.05) / 4.0;
        assert!((expected_error(&bins) - wanted).abs() < 1e-12);
    }

    #[test]
    fn the_reference_whitens_the_data_it_is_of() {
        // Correlated features about three means.
        let s = Stream::new(3, "features");
        let normal = |i: u64| (0..12).map(|k| s.uniform(12 * i + k)).sum::<f64>() - 6.0;
        let row = |i: u64, class: usize| {
            let (a, b, c) = (normal(3 * i), normal(3 * i + 1), normal(3 * i + 2));
            vec![(50.0 * class as f64 + a) as f32, (2.0 * a + 0.5 * b) as f32, c as f32]
        };
        let mut reference = Answers::default();
        for i in 0..3000u64 {
            reference.pooled.push(row(i, (i % 3) as usize));
            reference.classes.push((i % 3) as usize);
        }
        let fitted = fit_features(&reference.pooled, &reference.classes, 3).unwrap();
        assert!(fitted.shrinkage < 0.02, "{}", fitted.shrinkage);
        let ood = OodReference {
            features: 3,
            scans: 3000,
            shrinkage: fitted.shrinkage,
            limit: 1.0,
            quantile: 0.99,
            limit_scans: 1,
            means: fitted.means,
            whitening: fitted.whitening,
        };
        // The mean of the squared distance is the number of features.
        let mean = (3000..6000u64).map(|i| ood.score(&row(i, (i % 3) as usize)).unwrap().powi(2)).sum::<f64>() / 3000.0;
        assert!((mean - 3.0).abs() < 0.3, "{mean}");
        // Two deviations along the correlation are near, two against it are far.
        assert!(ood.score(&[2.0, 4.0, 0.0]).unwrap() < 2.5);
        assert!(ood.score(&[2.0, -4.0, 0.0]).unwrap() > 8.0);
        assert!(fit_features(&vec![vec![1.0]; 9], &[0; 9], 3).is_err());
    }
}
