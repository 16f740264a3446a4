//! `darnet-train cam`, `calibrate`, `flags`, `shift`: arguments, progress, documents. No libtorch.
//!
//! Documents go to stdout, progress to stderr. What is computed lies in the other modules.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use clap::Args;

use super::calibrate::{Answers, CalibrateOptions};
use super::shift::ShiftOptions;
use super::{
    Cache, Split, calibrate as calibration, cam as maps, flags as parted, judge, shift as drift, write_atomic,
};
use crate::model::Model;
use crate::report::calibration::Calibration;

/// Scans of a cache: all of them, the test set of a split, or a fold's validation scans.
#[derive(Args, Clone, Debug)]
pub struct ScanArgs {
    /// The cache
    #[arg(long, value_name = "DIR")]
    cache: PathBuf,
    /// Its split; without one, all scans are taken
    #[arg(long, value_name = "CSV")]
    split: Option<PathBuf>,
    /// Which of the split: `test`, or a fold's number for its validation scans
    #[arg(long, default_value = "test", requires = "split")]
    set: String,
}

impl ScanArgs {
    fn open(&self) -> anyhow::Result<(Cache, Vec<usize>)> {
        let cache = Cache::open(&self.cache)?;
        let Some(path) = &self.split else {
            let all = (0..cache.cases().len()).collect();
            return Ok((cache, all));
        };
        let split = Split::read_csv(path)?;
        split.verify(cache.cases())?;
        let chosen = match self.set.as_str() {
            "test" => split.test(),
            number => split.validation_of(number.parse().context("--set: expected test or a fold's number")?),
        };
        let by_name: HashMap<&str, usize> =
            cache.cases().iter().enumerate().map(|(i, c)| (c.scan.as_str(), i)).collect();
        let indices = chosen.iter().filter_map(|r| by_name.get(r.scan.as_str()).copied()).collect();
        Ok((cache, indices))
    }
}

/// The model of `dir`, which is a model's folder or a run's.
fn load(dir: &Path) -> anyhow::Result<Model> {
    let inner = dir.join("model");
    let own = inner.join(crate::model::MANIFEST_FILE).exists();
    Model::load(if own { &inner } else { dir }).with_context(|| format!("load the model of {}", dir.display()))
}

/// `darnet-train cam`.
#[derive(Args, Clone, Debug)]
pub struct CamArgs {
    /// Models or runs, each as NAME=DIR or DIR
    #[arg(required = true, value_name = "[NAME=]DIR")]
    models: Vec<String>,
    #[command(flatten)]
    scans: ScanArgs,
    /// Where tables and the figure go
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Cases of each class in the figure; 0 draws none
    #[arg(long, default_value_t = 3)]
    figure: usize,
    /// Threads; 0: one a core
    #[arg(long, default_value_t = 0)]
    threads: usize,
}

/// Runs `darnet-train cam`: activation maps against lesion masks.
///
/// # Errors
/// No model, no mask, or data that do not fit.
pub fn cam(args: &CamArgs) -> anyhow::Result<()> {
    let (cache, indices) = args.scans.open()?;
    let chosen = maps::choose(&cache, &indices, args.figure);
    let (mut models, mut columns) = (Vec::new(), Vec::new());
    for text in &args.models {
        let (name, dir) = match text.split_once('=') {
            Some((name, dir)) => (name.to_owned(), Path::new(dir)),
            None => {
                let dir = Path::new(text);
                (dir.file_name().map_or_else(|| text.clone(), |n| n.to_string_lossy().into_owned()), dir)
            }
        };
        if name.is_empty() {
            bail!("{text}: expected NAME=DIR or DIR");
        }
        eprintln!("{name}: {} scans", indices.len());
        let model = load(dir)?;
        let (figures, kept) = maps::evaluate(&name, &model, &cache, &indices, &chosen, args.threads)?;
        models.push(figures);
        columns.push((name, kept));
    }
    let document = maps::CamDocument { schema: maps::CAM_SCHEMA.to_owned(), models };
    maps::write(&args.out, &document)?;
    if !chosen.is_empty() {
        maps::figure(&args.out.join("cam.png"), &cache, &chosen, &columns)?;
    }
    print!("{}", maps::markdown(&document));
    Ok(())
}

/// `darnet-train calibrate`.
#[derive(Args, Clone, Debug)]
pub struct CalibrateArgs {
    /// The model, or the run that made it
    #[arg(value_name = "DIR")]
    model: PathBuf,
    /// The cache that it was trained on
    #[arg(long, value_name = "DIR")]
    cache: PathBuf,
    /// Its split
    #[arg(long, value_name = "CSV")]
    split: PathBuf,
    /// The fold it was validated on; it was trained on the others
    #[arg(long, default_value_t = 0)]
    fold: usize,
    /// Scans that neither training nor the choice of the epoch has seen, all of this cache; by default the split's test set
    #[arg(long, value_name = "DIR")]
    held_out: Option<PathBuf>,
    /// The file to write; by default ID.toml in the model's folder. The manifest names it afterwards
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Where the picture of the reliability goes
    #[arg(long, value_name = "PNG")]
    picture: Option<PathBuf>,
    /// What the scans are, in words
    #[arg(long, value_name = "TEXT")]
    fitted_on: Option<String>,
    /// The sensitivity that classes alert at
    #[arg(long, default_value_t = 0.95)]
    sensitivity: f64,
    /// Share of scans like the training data that are not flagged
    #[arg(long, default_value_t = 0.99)]
    quantile: f64,
    /// Seed of the resampling
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Threads; 0: one a core
    #[arg(long, default_value_t = 0)]
    threads: usize,
}

/// Runs `darnet-train calibrate`.
///
/// # Errors
/// No model, too few scans, or data that do not fit.
pub fn calibrate(args: &CalibrateArgs) -> anyhow::Result<()> {
    let model = load(&args.model)?;
    let dir = model.dir.clone().context("the model has no folder")?;
    let cache = Cache::open(&args.cache)?;
    let split = Split::read_csv(&args.split)?;
    split.verify(cache.cases())?;
    if args.fold >= split.folds() {
        bail!("--fold: the split has folds 0 to {}", split.folds().saturating_sub(1));
    }
    let by_name: HashMap<&str, usize> = cache.cases().iter().enumerate().map(|(i, c)| (c.scan.as_str(), i)).collect();
    let indices = |rows: Vec<&super::SplitRow>| -> Vec<usize> {
        rows.iter().filter_map(|r| by_name.get(r.scan.as_str()).copied()).collect()
    };
    let trained = indices(split.train_of(args.fold));
    eprintln!("{} scans of training", trained.len());
    let reference = Answers::of(&model, &cache, &trained, args.threads)?;
    let held_out = match &args.held_out {
        Some(dir) => {
            let other = Cache::open(dir)?;
            judge::check(&model, &other)?;
            Answers::of(&model, &other, &(0..other.cases().len()).collect::<Vec<_>>(), args.threads)?
        }
        None => Answers::of(&model, &cache, &indices(split.test()), args.threads)?,
    };
    eprintln!("{} held-out scans", held_out.len());
    let default =
        || format!("{} scans that were not trained on, like those of: {}", held_out.len(), model.manifest.trained_on);
    let options = CalibrateOptions {
        fitted_on: args.fitted_on.clone().unwrap_or_else(default),
        sensitivity: args.sensitivity,
        quantile: args.quantile,
        seed: args.seed,
    };
    let fitted = calibration::calibrate(&model, &held_out, &reference, &options)?;
    let out = args.out.clone().unwrap_or_else(|| dir.join(format!("{}.toml", model.manifest.id)));
    calibration::write(&out, &fitted)?;
    if let Some(picture) = &args.picture {
        calibration::draw(picture, &held_out, &fitted)?;
    }
    let name = out.file_name().map(|n| n.to_string_lossy().into_owned()).context("--out: expected a file")?;
    if model.manifest.calibration.as_ref() != Some(&name) {
        let manifest = crate::model::Manifest { calibration: Some(name), ..model.manifest.clone() };
        write_atomic(&dir.join(crate::model::MANIFEST_FILE), manifest.to_toml()?.as_bytes())?;
    }
    print!("{}", summary(&fitted, &held_out));
    Ok(())
}

fn summary(fitted: &Calibration, held_out: &Answers) -> String {
    let mut out = format!(
        "model {}: {} held-out scans, accuracy {:.4}\ntemperature {:.4}: cross-entropy {:.4} -> {:.4}",
        fitted.model,
        held_out.len(),
        held_out.accuracy(),
        fitted.temperature,
        calibration::cross_entropy(held_out, 1.0),
        calibration::cross_entropy(held_out, fitted.temperature),
    );
    if let Some([before, after]) = fitted.expected_calibration_error {
        out += &format!(", expected calibration error {before:.4} -> {after:.4} (crosswise)");
    }
    out.push('\n');
    let percent = |v: Option<f64>| v.map_or("-".to_owned(), |v| format!("{:.1}", 100.0 * v));
    let interval =
        |v: Option<[f64; 2]>| v.map_or("-".to_owned(), |[a, b]| format!("{:.1} to {:.1}", 100.0 * a, 100.0 * b));
    for (class, t) in &fitted.thresholds {
        out += &format!(
            "{class}: alerts from {:.4} ({} %), sensitivity {} % ({}), specificity {} % ({})\n",
            t.alert,
            interval(t.alert_interval_95),
            percent(t.sensitivity),
            interval(t.sensitivity_interval_95),
            percent(t.specificity),
            interval(t.specificity_interval_95)
        );
    }
    for (name, reference) in [("pooled", &fitted.ood), ("texture", &fitted.texture)] {
        let Some(ood) = reference else { continue };
        out += &format!(
            "{} {name} features of {} scans, shrinkage {:.3}; the limit is the {} quantile of {} scans\n",
            ood.features, ood.scans, ood.shrinkage, ood.quantile, ood.limit_scans
        );
    }
    out
}

/// The calibration that a model names, checked to be its own.
fn calibration_of(model: &Model) -> anyhow::Result<Calibration> {
    let text = model.calibration_text.as_deref().context("the model has no calibration; run calibrate first")?;
    let fitted = Calibration::parse(text)?;
    fitted.check_model(&model.manifest.id, &model.sha256)?;
    Ok(fitted)
}

/// `darnet-train flags`.
#[derive(Args, Clone, Debug)]
pub struct FlagsArgs {
    /// The model with its calibration
    #[arg(value_name = "DIR")]
    model: PathBuf,
    #[command(flatten)]
    scans: ScanArgs,
    /// Where the table goes
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Threads; 0: one a core
    #[arg(long, default_value_t = 0)]
    threads: usize,
}

/// Runs `darnet-train flags`: accuracy of scans that are flagged as unlike the training data, and of the others.
///
/// # Errors
/// A model without a calibration, or data that do not fit.
pub fn flags(args: &FlagsArgs) -> anyhow::Result<()> {
    let model = load(&args.model)?;
    let fitted = calibration_of(&model)?;
    let (cache, indices) = args.scans.open()?;
    let answers = Answers::of(&model, &cache, &indices, args.threads)?;
    let document = parted::part(&model, &fitted, &answers)?;
    parted::write(&args.out, &document)?;
    print!("{}", parted::markdown(&document));
    Ok(())
}

/// `darnet-train shift`.
#[derive(Args, Clone, Debug)]
pub struct ShiftArgs {
    /// The model with its calibration
    #[arg(value_name = "DIR")]
    model: PathBuf,
    /// Where table and picture go
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Phantoms; the classes take turns
    #[arg(long, default_value_t = 60)]
    count: usize,
    /// Seed of the population; another than that of the training data
    #[arg(long, default_value_t = 1001)]
    seed: u64,
    /// Rows and columns of a slice
    #[arg(long, default_value_t = 256)]
    size: usize,
    /// Threads of the network; 0: one a core
    #[arg(long, default_value_t = 0)]
    threads: usize,
}

/// Runs `darnet-train shift`: accuracy and distance score on phantoms unlike the training data.
///
/// # Errors
/// A model without reference features, phantoms that are all refused, a full disk.
pub fn shift(args: &ShiftArgs) -> anyhow::Result<()> {
    let model = load(&args.model)?;
    let fitted = calibration_of(&model)?;
    let options = ShiftOptions { count: args.count, seed: args.seed, side: args.size, threads: args.threads };
    let bar = indicatif::ProgressBar::new(args.count as u64);
    let document = drift::run(&model, &fitted, &options, &|done| bar.set_position(done as u64))?;
    bar.finish_and_clear();
    drift::write(&args.out, &document)?;
    print!("{}", drift::markdown(&document));
    Ok(())
}
