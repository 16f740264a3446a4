//! What a model's answers and its distance score do when scans drift away from its training data.
//!
//! Input: a model with a calibration, a number of phantoms drawn from the training ranges. Output: a [`ShiftDocument`]:
//! the same patients along four axes, each in steps away from what training has seen, with accuracy and flags at each.
//! What the scanner would refuse (a window in which no lung is found) counts as caught like a flag.
//!
//! | axis | steps |
//! |---|---|
//! | `kernel` | edges raised by 1, 2, 4, 8 times the difference from a 3 x 3 mean: sharper than any kernel of the phantom |
//! | `dose` | 2, 4, 8, 16 times the noise |
//! | `window` | grey values clipped to windows from the model's own towards the mediastinal one (40, 400), and stretched |
//! | `thickness` | slices of 8, 16, 24, 32 mm at the same distances; training has at most 6.25 mm |
//!
//! Deliberately absent: any fit; the limit is the calibration's.

use std::fmt::Write as _;
use std::path::Path;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::calibrate::Answers;
use super::plot::{self, Frame, Line, Picture};
use super::{Dataset as _, MemoryCase, MemoryDataset, TrainError, write_results};
use crate::model::Model;
use crate::phantom::{Phantom, PhantomClass, Ranges, Subject};
use crate::report::calibration::Calibration;
use crate::scan::Loaded;
use crate::volume::geometry::GeometryLimits;

/// Version of the JSON document.
pub const SHIFT_SCHEMA: &str = "darnet.shift/1";
/// The axes.
pub const AXES: [&str; 4] = ["kernel", "dose", "window", "thickness"];
/// Steps of an axis beside none.
pub const STEPS: usize = 4;
/// Most phantoms: all of them at all steps lie in memory as half floats, 17 x 500 x 0.6 MB.
pub const MAX_COUNT: usize = 500;
/// Accuracy has fallen when it is this much below that without a shift.
pub const FALLEN: f64 = 0.1;
/// The score has risen when so many times more scans are flagged or refused than without a shift, a tenth of them at least.
pub const RISEN: f64 = 2.0;

/// What is shifted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShiftOptions {
    /// Phantoms; classes take turns.
    pub count: usize,
    /// Seed of the population; another than that of the training data.
    pub seed: u64,
    /// Rows and columns of a slice.
    pub side: usize,
    /// Threads of the network; 0: one a core.
    pub threads: usize,
}

/// One step of one axis.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ShiftRow {
    /// The axis.
    pub axis: String,
    /// Steps away from none, which is 0.
    pub step: usize,
    /// What the step is.
    pub what: String,
    /// Scans judged.
    pub scans: usize,
    /// Scans that were refused, as the scanner would.
    pub refused: usize,
    /// Share of those judged whose class is right; none where all were refused.
    pub accuracy: Option<f64>,
    /// Share of all that is flagged or refused.
    pub flagged: f64,
    /// Median score of those judged; 1 is the limit.
    pub score: Option<f64>,
    /// Median of the pooled features' part of it.
    #[serde(default)]
    pub features: Option<f64>,
    /// Median of the texture's part of it.
    #[serde(default)]
    pub texture: Option<f64>,
}

/// Where an axis lets the score rise and accuracy fall.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ShiftVerdict {
    /// The axis.
    pub axis: String,
    /// The first step at which flags have become more.
    pub rises_at: Option<usize>,
    /// The first step at which accuracy has fallen.
    pub falls_at: Option<usize>,
    /// Whether the score rises no later than accuracy falls.
    pub in_time: bool,
}

/// The JSON document.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ShiftDocument {
    /// [`SHIFT_SCHEMA`].
    pub schema: String,
    /// The model's id.
    pub model: String,
    /// SHA-256 of its weights.
    pub weights_sha256: String,
    /// Every step of every axis, step 0 included.
    pub rows: Vec<ShiftRow>,
    /// One an axis.
    pub verdicts: Vec<ShiftVerdict>,
}

const SHARPER: [f32; STEPS] = [1.0, 2.0, 4.0, 8.0];
const NOISIER: [f64; STEPS] = [2.0, 4.0, 8.0, 16.0];
const NARROWER: [f32; STEPS] = [0.25, 0.5, 0.75, 1.0];
const THICKER_MM: [f64; STEPS] = [8.0, 16.0, 24.0, 32.0];

fn what(axis: &str, step: usize) -> String {
    match (axis, step) {
        (_, 0) => "as trained".to_owned(),
        ("kernel", s) => format!("edges +{:.0}", SHARPER[s - 1]),
        ("dose", s) => format!("noise x{:.0}", NOISIER[s - 1]),
        ("window", s) => format!("{:.0} % of the way", 100.0 * NARROWER[s - 1]),
        (_, s) => format!("{:.0} mm", THICKER_MM[s - 1]),
    }
}

/// Raises every pixel by `amount` times its difference from the mean of its 3 x 3 neighbours.
fn sharpened(phantom: &Phantom, amount: f32) -> Vec<i16> {
    let (rows, columns) = (phantom.spec.rows, phantom.spec.columns);
    let mut out = phantom.hu.clone();
    for (slice, to) in phantom.hu.chunks_exact(rows * columns).zip(out.chunks_exact_mut(rows * columns)) {
        for y in 1..rows.saturating_sub(1) {
            for x in 1..columns.saturating_sub(1) {
                let mut sum = 0.0;
                for dy in 0..3 {
                    for dx in 0..3 {
                        sum += f32::from(slice[(y + dy - 1) * columns + x + dx - 1]);
                    }
                }
                let hu = f32::from(slice[y * columns + x]);
                to[y * columns + x] = (hu + amount * (hu - sum / 9.0)).round().clamp(-1024.0, 3071.0) as i16;
            }
        }
    }
    out
}

/// Grey values as if the scan came through a picture in a narrower window, stretched over the model's.
fn windowed(hu: &[i16], model: &Model, share: f32) -> Vec<i16> {
    let p = &model.manifest.preprocessing;
    let mix = |own: f32, narrow: f32| own + share * (narrow - own);
    let (center, width) = (mix(p.window_center_hu, 40.0), mix(p.window_width_hu, 400.0));
    hu.iter()
        .map(|v| {
            let grey = ((f32::from(*v) - center) / width + 0.5).clamp(0.0, 1.0);
            (p.window_center_hu + (grey - 0.5) * p.window_width_hu).round() as i16
        })
        .collect()
}

/// One subject at every step: the network's inputs, none where the scan is refused.
fn inputs(subject: &Subject, model: &Model) -> Vec<(usize, usize, Option<Vec<half::f16>>)> {
    let manifest = &model.manifest;
    let input = |phantom: &Phantom, hu: &[i16]| {
        let loaded = Loaded {
            geometry: phantom.geometry(),
            hu: hu.chunks_exact(phantom.spec.slice_len()).map(<[i16]>::to_vec).collect(),
            notes: Vec::new(),
        };
        let scan = loaded.into_scan(&GeometryLimits::default()).ok()?;
        let made = scan.network_input(&manifest.preprocessing, manifest.architecture.input_dhw).ok()?;
        Some(made.values.iter().map(|v| half::f16::from_f32(*v)).collect::<Vec<_>>())
    };
    let varied = |change: &dyn Fn(&mut Subject)| {
        let mut other = subject.clone();
        change(&mut other);
        let phantom = other.generate();
        input(&phantom, &phantom.hu)
    };
    let plain = subject.generate();
    let mut all = vec![(0, 0, input(&plain, &plain.hu))];
    for s in 0..STEPS {
        all.push((0, s + 1, input(&plain, &sharpened(&plain, SHARPER[s]))));
        all.push((1, s + 1, varied(&|o| o.spec.noise_hu *= NOISIER[s])));
        all.push((2, s + 1, input(&plain, &windowed(&plain.hu, model, NARROWER[s]))));
        all.push((
            3,
            s + 1,
            varied(&|o| {
                // Thicker slices are means of more: less noise.
                o.spec.noise_hu *= (o.spec.thickness_mm / THICKER_MM[s]).sqrt();
                o.spec.thickness_mm = THICKER_MM[s];
            }),
        ));
    }
    all
}

/// Judges the phantoms of `options` along every axis.
///
/// # Errors
/// A calibration without reference features, a count out of range, phantoms that are all refused.
pub fn run(
    model: &Model,
    calibration: &Calibration,
    options: &ShiftOptions,
    progress: &(dyn Fn(usize) + Sync),
) -> Result<ShiftDocument, TrainError> {
    if calibration.ood.is_none() {
        return Err(TrainError::Data("the calibration has no reference features; run calibrate first".to_owned()));
    }
    if !(3..=MAX_COUNT).contains(&options.count) {
        let got = options.count.to_string();
        return Err(TrainError::Option { option: "count", expected: format!("3 to {MAX_COUNT}"), got });
    }
    let subjects: Vec<(usize, Subject)> = (0..options.count)
        .map(|i| {
            let class = PhantomClass::ALL[i % PhantomClass::ALL.len()];
            let subject = Subject::numbered(class, i, options.seed, Ranges::Train, options.side)
                .map_err(|e| TrainError::Data(e.to_string()))?;
            let key = class.class_key();
            let index = model.manifest.class_keys.iter().position(|k| k == key);
            Ok((index.ok_or_else(|| TrainError::Data(format!("the model has no class {key}")))?, subject))
        })
        .collect::<Result<_, TrainError>>()?;
    let done = std::sync::atomic::AtomicUsize::new(0);
    let made: Vec<(usize, Vec<_>)> = subjects
        .par_iter()
        .map(|(class, subject)| {
            let all = inputs(subject, model);
            progress(done.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1);
            (*class, all)
        })
        .collect();
    let mut rows = Vec::new();
    for (a, axis) in AXES.iter().enumerate() {
        for step in 0..=STEPS {
            let mut cases = Vec::new();
            for (i, (class, all)) in made.iter().enumerate() {
                let found = all.iter().find(|(of, s, _)| *s == step && (step == 0 || *of == a));
                if let Some((_, _, Some(volume))) = found {
                    let (scan, patient) = (format!("{i}"), format!("{i}"));
                    cases.push(MemoryCase { scan, patient, class: *class, volume: volume.clone(), mask: None });
                }
            }
            let manifest = &model.manifest;
            let data = MemoryDataset::new(
                manifest.architecture.input_dhw,
                manifest.preprocessing.clone(),
                manifest.class_keys.clone(),
                cases,
            )?;
            let indices: Vec<usize> = (0..data.len()).collect();
            let answers = Answers::of(model, &data, &indices, options.threads)?;
            if answers.is_empty() && step == 0 {
                return Err(TrainError::Data("every phantom was refused as it is".to_owned()));
            }
            let refused = made.len() - answers.len();
            let features = answers.pooled.iter().zip(&answers.texture);
            let ood: Vec<_> = features.filter_map(|(p, t)| calibration.ood(p, t, false)).collect();
            let flagged = ood.iter().filter(|o| o.flag).count();
            let scores: Vec<[Option<f64>; 3]> = ood.iter().map(|o| [o.score, o.features, o.texture]).collect();
            let median = |of: usize| {
                let mut scores: Vec<f64> = scores.iter().filter_map(|s| s[of]).collect();
                scores.sort_unstable_by(f64::total_cmp);
                scores.get(scores.len() / 2).copied()
            };
            rows.push(ShiftRow {
                axis: (*axis).to_owned(),
                step,
                what: what(axis, step),
                scans: answers.len(),
                refused,
                accuracy: (!answers.is_empty()).then(|| answers.accuracy()),
                flagged: (flagged + refused) as f64 / made.len() as f64,
                score: median(0),
                features: median(1),
                texture: median(2),
            });
        }
    }
    let verdicts = AXES.iter().map(|axis| verdict(axis, &rows)).collect();
    Ok(ShiftDocument {
        schema: SHIFT_SCHEMA.to_owned(),
        model: model.manifest.id.clone(),
        weights_sha256: model.sha256.clone(),
        rows,
        verdicts,
    })
}

fn verdict(axis: &str, rows: &[ShiftRow]) -> ShiftVerdict {
    let of: Vec<&ShiftRow> = rows.iter().filter(|r| r.axis == axis).collect();
    let base = of.first().map_or((0.0, 0.0), |r| (r.accuracy.unwrap_or(0.0), r.flagged));
    let rises = (RISEN * base.1).max(0.1);
    let rises_at = of.iter().skip(1).find(|r| r.flagged >= rises).map(|r| r.step);
    let falls_at = of.iter().skip(1).find(|r| r.accuracy.is_some_and(|a| a < base.0 - FALLEN)).map(|r| r.step);
    let in_time = match (rises_at, falls_at) {
        (_, None) => true,
        (Some(rises), Some(falls)) => rises <= falls,
        (None, Some(_)) => false,
    };
    ShiftVerdict { axis: axis.to_owned(), rises_at, falls_at, in_time }
}

/// The document as Markdown.
pub fn markdown(document: &ShiftDocument) -> String {
    let mut out = format!("# Model {} on shifted phantoms\n\n", document.model);
    out.push_str(
        "| axis | step | judged | refused | accuracy, % | flagged or refused, % | median score (1 is the limit) | \
         of features | of texture |\n",
    );
    out.push_str("|---|---|---|---|---|---|---|---|---|\n");
    let number = |v: Option<f64>, digits: usize| v.map_or("–".to_owned(), |v| format!("{v:.digits$}"));
    for r in &document.rows {
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} | {} | {:.1} | {} | {} | {} |",
            r.axis,
            r.what,
            r.scans,
            r.refused,
            number(r.accuracy.map(|a| 100.0 * a), 1),
            100.0 * r.flagged,
            number(r.score, 2),
            number(r.features, 2),
            number(r.texture, 2)
        );
    }
    out.push('\n');
    for v in &document.verdicts {
        let at = |s: Option<usize>| s.map_or("at no step".to_owned(), |s| format!("at step {s}"));
        let word = if v.in_time { "in time" } else { "TOO LATE" };
        let _ = writeln!(
            out,
            "- {}: flags rise {}, accuracy falls by more than {:.0} points {}: {word}",
            v.axis,
            at(v.rises_at),
            100.0 * FALLEN,
            at(v.falls_at)
        );
    }
    out
}

/// Writes `shift.json`, `shift.md` and `shift.png` into `dir`.
///
/// # Errors
/// A full disk.
pub fn write(dir: &Path, document: &ShiftDocument) -> Result<(), TrainError> {
    write_results(dir, "shift", document, &markdown(document))?;
    let mut picture = Picture::new(1040, 820);
    for (i, axis) in AXES.iter().enumerate() {
        let line = |name: &str, y: fn(&ShiftRow) -> Option<f64>| Line {
            name: name.to_owned(),
            points: document
                .rows
                .iter()
                .filter(|r| r.axis == *axis)
                .filter_map(|r| Some([r.step as f64, y(r)?]))
                .collect(),
        };
        let lines = [line("ACCURACY", |r| r.accuracy), line("FLAGGED", |r| Some(r.flagged))];
        let place = [60 + 520 * (i as i64 % 2), 40 + 400 * (i as i64 / 2), 430, 320];
        let frame = Frame { place, x: [0.0, STEPS as f64], y: [0.0, 1.0] };
        plot::chart(&mut picture, &frame, &axis.to_uppercase(), &lines);
    }
    picture.save(&dir.join("shift.png"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(axis: &str, step: usize, accuracy: f64, flagged: f64) -> ShiftRow {
        let accuracy = Some(accuracy).filter(|a| a.is_finite());
        ShiftRow {
            axis: axis.into(),
            step,
            what: String::new(),
            scans: 10,
            refused: 0,
            accuracy,
            flagged,
            score: None,
            features: None,
            texture: None,
        }
    }

    #[test]
    fn a_verdict_says_which_comes_first() {
        let rows = |pairs: &[(f64, f64)]| {
            pairs.iter().enumerate().map(|(i, (a, f))| row("dose", i, *a, *f)).collect::<Vec<_>>()
        };
        let v = verdict("dose", &rows(&[(0.9, 0.0), (0.88, 0.2), (0.7, 0.9)]));
        assert_eq!((v.rises_at, v.falls_at, v.in_time), (Some(1), Some(2), true));
        let v = verdict("dose", &rows(&[(0.9, 0.1), (0.7, 0.15), (0.5, 0.9)]));
        assert_eq!((v.rises_at, v.falls_at, v.in_time), (Some(2), Some(1), false));
        let v = verdict("dose", &rows(&[(0.9, 0.1), (0.89, 0.1)]));
        assert_eq!((v.rises_at, v.falls_at, v.in_time), (None, None, true));
        assert!(!verdict("dose", &rows(&[(0.9, 0.0), (0.5, 0.0)])).in_time);
        // All refused: nothing is wrong, and everything is caught.
        let v = verdict("dose", &rows(&[(0.9, 0.0), (f64::NAN, 1.0), (0.5, 1.0)]));
        assert_eq!((v.rises_at, v.falls_at, v.in_time), (Some(1), Some(2), true));
    }

    #[test]
    fn the_model_s_own_window_changes_little_and_a_narrow_one_saturates() {
        let model = Model::embedded().unwrap();
        let hu = [-2000i16, -1000, -600, 0, 140, 500];
        let own = windowed(&hu, &model, 0.0);
        assert_eq!(own, [-1350, -1000, -600, 0, 140, 150]);
        let narrow = windowed(&hu, &model, 1.0);
        assert_eq!(narrow[1], -1350);
        assert_eq!(narrow[5], 150);
        // 140 HU is three quarters of (40, 400).
        assert_eq!(narrow[4], -225);
    }
}
