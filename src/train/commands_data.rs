//! `darnet-train prepare` and `darnet-train split`: arguments, progress, what is printed.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use crate::model::manifest::{CLASS_KEYS, DepthGrid, Manifest, Preprocessing, SliceDirection, SourceWindow};
use crate::phantom::Ranges;
use crate::train::cache::{Cache, CacheSpec};
use crate::train::prepare::{PrepareOptions, PrepareProgress, prepare as run_prepare};
use crate::train::sources::{PhantomOptions, SourceFormat, SourceOptions};
use crate::train::split::Split;
use crate::volume::geometry::GeometryLimits;

/// Arguments of `darnet-train prepare`.
#[derive(Args, Clone, Debug)]
pub struct PrepareArgs {
    /// Folder of the scans; of no use to `phantom`.
    #[arg(value_name = "ROOT", required_unless_present = "count")]
    pub root: Option<PathBuf>,
    /// Folder of the cache; one that is there is completed.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Layout: cc-ccii, dicom, covid-ct-md, nifti, mha, tiff16, phantom.
    #[arg(long, value_name = "FORMAT")]
    pub format: SourceFormat,
    /// The model's manifest (model.toml): input shape, preprocessing, classes.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["input", "window", "crop", "depth_grid_mm", "head_first"])]
    pub manifest: Option<PathBuf>,
    /// Input shape without a manifest: depth, height, width.
    #[arg(long, value_name = "D,H,W", value_delimiter = ',', default_values_t = [64, 224, 224])]
    pub input: Vec<usize>,
    /// Window without a manifest: centre and width, HU.
    #[arg(long, value_name = "C,W", value_delimiter = ',', allow_negative_numbers = true)]
    pub window: Vec<f32>,
    /// Share of rows and columns kept, without a manifest.
    #[arg(long, value_name = "SHARE")]
    pub crop: Option<f64>,
    /// Planes at this distance instead of fitted to the scan, without a manifest.
    #[arg(long, value_name = "MM")]
    pub depth_grid_mm: Option<f64>,
    /// Plane 0 is the one nearest the head, without a manifest.
    #[arg(long)]
    pub head_first: bool,
    /// Class of every scan, when folders do not say.
    #[arg(long, value_name = "KEY")]
    pub class: Option<String>,
    /// CSV of classes: `scan` (or PatientID), `class` (or probCOVID), perhaps `patient`, `mask`.
    #[arg(long, value_name = "FILE")]
    pub labels: Option<PathBuf>,
    /// Class of a probCOVID of 0; without it such scans are refused as unlabelled.
    #[arg(long, value_name = "KEY")]
    pub negative_class: Option<String>,
    /// The cleaned list of CC-CCII (cls,pid,scan_id,is_seg,is_repeat,repeat_ids,re_order).
    #[arg(long, value_name = "FILE")]
    pub clean_list: Option<PathBuf>,
    /// Keep scans that the cleaned list calls pre-segmented.
    #[arg(long)]
    pub keep_pre_segmented: bool,
    /// What 8-bit grey values mean: `unknown` (CC-CCII's default), or the centre and width they were exported with.
    #[arg(long, value_name = "unknown|C,W", allow_hyphen_values = true)]
    pub source_window: Option<String>,
    /// tiff16: HU = slope * value + offset.
    #[arg(long, default_value_t = 1.0, value_name = "FACTOR")]
    pub slope: f32,
    /// tiff16: HU of the value 0.
    #[arg(long, default_value_t = 0.0, value_name = "HU", allow_negative_numbers = true)]
    pub offset: f32,
    /// Fewest slices of a scan.
    #[arg(long, value_name = "N")]
    pub min_slices: Option<usize>,
    /// phantom: patients; the classes take turns.
    #[arg(long, value_name = "N")]
    pub count: Option<usize>,
    /// phantom: seed of the population.
    #[arg(long, default_value_t = 1, value_name = "S")]
    pub seed: u64,
    /// phantom: ranges that patients and scanners are drawn from, train or test (wider).
    #[arg(long, default_value = "train", value_name = "RANGES")]
    pub ranges: Ranges,
    /// phantom: rows and columns of a slice.
    #[arg(long, default_value_t = 256, value_name = "N")]
    pub size: usize,
    /// Scans at once; 0 takes the number of processors.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub workers: usize,
    /// Try again what an earlier run refused.
    #[arg(long)]
    pub retry_refused: bool,
    /// Draw no contact sheets.
    #[arg(long)]
    pub no_sheets: bool,
    /// Read the whole cache afterwards and compare every checksum.
    #[arg(long)]
    pub verify: bool,
}

impl PrepareArgs {
    /// The options these arguments mean.
    ///
    /// # Errors
    /// A manifest that cannot be read, a window that is no pair of numbers, a format without what it needs.
    pub fn options(&self) -> anyhow::Result<PrepareOptions> {
        let spec = match &self.manifest {
            Some(path) => {
                let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
                CacheSpec::of(&Manifest::parse(&text)?)
            }
            None => CacheSpec {
                input_dhw: <[usize; 3]>::try_from(self.input.as_slice()).context("--input: expected D,H,W")?,
                preprocessing: self.preprocessing()?,
                class_keys: CLASS_KEYS.map(str::to_owned).to_vec(),
            },
        };
        let mut sources = SourceOptions::new(self.format, self.root.clone().unwrap_or_default());
        if self.format == SourceFormat::Phantom {
            let count = self.count.context("--format phantom: expected --count N")?;
            sources.phantom = PhantomOptions { count, seed: self.seed, ranges: self.ranges, side: self.size };
        } else if self.root.is_none() {
            bail!("expected the folder of the scans");
        }
        sources.class = self.class.clone();
        sources.labels = self.labels.clone();
        sources.negative_class = self.negative_class.clone();
        sources.clean_list = self.clean_list.clone();
        sources.keep_pre_segmented = self.keep_pre_segmented;
        sources.slope = self.slope;
        sources.offset_hu = self.offset;
        if let Some(text) = &self.source_window {
            if self.format != SourceFormat::CcCcii {
                bail!("--source-window: {} scans hold HU", self.format);
            }
            sources.source_window = source_window(text)?;
        }
        if let Some(min_slices) = self.min_slices {
            sources.limits = GeometryLimits { min_slices, ..GeometryLimits::default() };
            if let Some(fault) = sources.limits.faults().first() {
                bail!("{fault}");
            }
        }
        Ok(PrepareOptions {
            out: self.out.clone(),
            spec,
            sources,
            workers: self.workers,
            retry_refused: self.retry_refused,
            sheets: !self.no_sheets,
        })
    }

    fn preprocessing(&self) -> anyhow::Result<Preprocessing> {
        let mut p = Preprocessing::default();
        match self.window[..] {
            [] => {}
            [center, width] => (p.window_center_hu, p.window_width_hu) = (center, width),
            _ => bail!("--window: expected C,W"),
        }
        if let Some(crop) = self.crop {
            p.crop_fraction = crop;
        }
        if let Some(mm) = self.depth_grid_mm {
            if !(mm > 0.0 && mm.is_finite()) {
                bail!("--depth-grid-mm: expected a positive number, got {mm}");
            }
            p.depth_grid = DepthGrid::FixedMm(mm);
        }
        if self.head_first {
            p.slice_direction = SliceDirection::HeadToFeet;
        }
        Ok(p)
    }
}

fn source_window(text: &str) -> anyhow::Result<SourceWindow> {
    if text == "unknown" {
        return Ok(SourceWindow::Unknown);
    }
    let parts: Vec<f32> = text.split(',').map_while(|p| p.trim().parse().ok()).collect();
    match parts[..] {
        [center_hu, width_hu] if center_hu.is_finite() && width_hu.is_finite() && width_hu > 0.0 => {
            Ok(SourceWindow::Window { center_hu, width_hu })
        }
        _ => bail!("--source-window: expected `unknown` or centre,width in HU"),
    }
}

/// `darnet-train prepare`.
///
/// # Errors
/// As [`crate::train::prepare::prepare`]; no scan that could be kept.
pub fn prepare(args: &PrepareArgs) -> anyhow::Result<()> {
    let options = args.options()?;
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("{prefix:>9} [{wide_bar}] {pos}/{len} {eta} {msg}") {
        bar.set_style(style);
    }
    bar.set_prefix("preparing");
    let prepared = run_prepare(&options, &|p: &PrepareProgress| {
        bar.set_length(p.total as u64);
        bar.set_position(p.done as u64);
        bar.set_message(format!("{} kept, {} refused", p.kept, p.refused));
    })?;
    bar.finish_and_clear();
    if args.verify {
        prepared.cache.verify()?;
    }
    let kept = prepared.outcomes.iter().filter(|o| o.kept).count();
    let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
    for reason in prepared.outcomes.iter().filter_map(|o| o.reason.as_deref()) {
        *reasons.entry(reason).or_default() += 1;
    }
    eprintln!(
        "{kept} scans kept, {} refused, {} of them done by an earlier run; the cache holds {}",
        prepared.outcomes.len() - kept,
        prepared.reused,
        prepared.cache.cases().len()
    );
    for (reason, count) in reasons {
        eprintln!("  {count:>6} {reason}");
    }
    eprintln!("why: {}", options.out.join("report.csv").display());
    if prepared.cache.cases().is_empty() {
        bail!("no scan could be kept");
    }
    Ok(())
}

/// Arguments of `darnet-train split`.
#[derive(Args, Clone, Debug)]
pub struct SplitArgs {
    /// Folder of the cache.
    #[arg(long, value_name = "DIR")]
    pub cache: PathBuf,
    /// Where the split is written.
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Take this split instead of making one; it is verified against the cache.
    #[arg(long, value_name = "CSV", conflicts_with_all = ["test_share", "folds", "seed"])]
    pub from: Option<PathBuf>,
    /// Share of each class's scans that is the test set.
    #[arg(long, default_value_t = 0.2, value_name = "SHARE")]
    pub test_share: f64,
    /// Folds.
    #[arg(long, default_value_t = 5, value_name = "N")]
    pub folds: usize,
    /// Seed.
    #[arg(long, default_value_t = 1, value_name = "S")]
    pub seed: u64,
}

/// `darnet-train split`: writes the CSV and prints Table I.
///
/// # Errors
/// As [`Cache::open`], [`Split::stratified`], [`Split::read_csv`] and [`Split::verify`].
pub fn split(args: &SplitArgs) -> anyhow::Result<()> {
    let cache = Cache::open(&args.cache)?;
    let split = match &args.from {
        Some(path) => Split::read_csv(path)?,
        None => Split::stratified(cache.cases(), args.test_share, args.folds, args.seed)?,
    };
    split.verify(cache.cases())?;
    split.write_csv(&args.out)?;
    print!("{}", split.table(cache.class_names()));
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    enum Command {
        Prepare(Box<PrepareArgs>),
        Split(SplitArgs),
    }

    fn parsed(line: &str) -> Result<PrepareOptions, String> {
        match Command::try_parse_from(line.split_whitespace()).map_err(|e| e.to_string())? {
            Command::Prepare(args) => args.options().map_err(|e| e.to_string()),
            Command::Split(args) => Err(format!("{args:?}")),
        }
    }

    #[test]
    fn arguments_become_options() {
        let options = parsed(
            "x prepare /data --out c --format cc-ccii --input 32,96,96 --window -600,1500 --source-window -600,1500",
        )
        .unwrap();
        assert_eq!(options.spec.input_dhw, [32, 96, 96]);
        let window = SourceWindow::Window { center_hu: -600.0, width_hu: 1500.0 };
        assert_eq!(options.sources.source_window, window);
        assert_eq!(options.spec.preprocessing, Preprocessing::default());
        let options = parsed("x prepare --out c --format phantom --count 3 --ranges test").unwrap();
        assert_eq!((options.sources.phantom.count, options.spec.input_dhw), (3, [64, 224, 224]));
        for bad in [
            "x prepare --out c --format nifti",
            "x prepare /data --out c --format jpeg",
            "x prepare /data --out c --format phantom",
            "x prepare /data --out c --format nifti --source-window unknown",
            "x prepare /data --out c --format cc-ccii --source-window wide",
            "x prepare /data --out c --format cc-ccii --input 32,96",
            "x prepare /data --out c --format cc-ccii --window 1500",
            "x prepare /data --out c --format dicom --manifest m --input 32,96,96",
            "x split --cache c --out s --from f --folds 3",
        ] {
            assert!(parsed(bad).is_err(), "{bad}");
        }
    }
}
