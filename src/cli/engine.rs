//! `engine build|show|verify`: TensorRT plans, and how far a backend is from the cpu one.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use darnet::engine::tensorrt::device::DeviceInfo;
use darnet::engine::tensorrt::{self, BuildOptions, Library, PlanKey, Precision, Progress, plan};
use darnet::engine::{Backend, BackendKind, CancelToken, EngineOptions, Inference, prepare};
use darnet::explain::class_activation_map;
use darnet::gpu::Gpu;
use darnet::model::Model;
use darnet::phantom::{PhantomClass, PhantomSpec, generate};
use darnet::pipeline::publish::model_info;
use darnet::scan::Loaded;
use darnet::volume::geometry::GeometryLimits;
use serde::Serialize;
use serde_json::{Value, json};

use super::{Ended, EngineArgs, modelcmd, print_json, progress_bar};

/// Bound on a timing cache: those of networks of this size have some hundred kilobytes.
const MAX_CACHE_BYTES: u64 = 256 << 20;
/// Slices, rows and columns of a phantom of the calibration set.
const PHANTOM_SHAPE: (usize, usize, usize) = (96, 256, 256);
/// Phantoms of a set.
const MAX_PHANTOMS: usize = 1000;

#[derive(Subcommand)]
pub enum EngineCommand {
    /// Build the TensorRT plan of a model for this machine's library, GPU and driver.
    Build(BuildArgs),
    /// Show library, GPU, and the plans of a model.
    Show(ShowArgs),
    /// Compare a backend with the cpu one on phantoms: logits, probabilities, activation maps, classes.
    Verify(VerifyArgs),
}

/// Number format of a plan.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum PrecisionArg {
    /// float16, with float32 where it would lose too much.
    Fp16,
    /// float32 throughout.
    Fp32,
}

impl From<PrecisionArg> for Precision {
    fn from(precision: PrecisionArg) -> Self {
        match precision {
            PrecisionArg::Fp16 => Self::Fp16,
            PrecisionArg::Fp32 => Self::Fp32,
        }
    }
}

/// Arguments of `darnet engine build`.
#[derive(Args)]
pub struct BuildArgs {
    /// Model folder; the embedded demonstration model when absent.
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Number format.
    #[arg(long, value_enum, default_value = "fp16")]
    precision: PrecisionArg,
    /// TensorRT library or the folder it lies in; $DARNET_TENSORRT, then the usual names when absent.
    #[arg(long, value_name = "PATH")]
    library: Option<PathBuf>,
    /// Measurements of earlier builds, read if the file is there and written: the next build is faster.
    #[arg(long, value_name = "FILE")]
    timing_cache: Option<PathBuf>,
    /// Scratch that kernels may take, MiB; the library's default when absent.
    #[arg(long, value_name = "MIB")]
    workspace_mib: Option<u64>,
    /// Number of the GPU.
    #[arg(long, default_value_t = 0, value_name = "N")]
    device: usize,
    /// Print one JSON document on stdout.
    #[arg(long)]
    json: bool,
}

/// Arguments of `darnet engine show`.
#[derive(Args)]
pub struct ShowArgs {
    /// Model folder; the embedded demonstration model when absent.
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// TensorRT library or the folder it lies in; $DARNET_TENSORRT, then the usual names when absent.
    #[arg(long, value_name = "PATH")]
    library: Option<PathBuf>,
    /// Number of the GPU.
    #[arg(long, default_value_t = 0, value_name = "N")]
    device: usize,
    /// Print one JSON document on stdout.
    #[arg(long)]
    json: bool,
}

/// Arguments of `darnet engine verify`.
#[derive(Args)]
pub struct VerifyArgs {
    #[command(flatten)]
    engine: EngineArgs,
    /// Phantoms of the set, the classes in turn.
    #[arg(long, default_value_t = 6, value_name = "N")]
    count: usize,
    /// Seed of the first phantom.
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,
    /// Print one JSON document on stdout.
    #[arg(long)]
    json: bool,
}

/// `darnet engine`.
pub fn engine(command: &EngineCommand) -> anyhow::Result<Ended> {
    match command {
        EngineCommand::Build(args) => build(args),
        EngineCommand::Show(args) => show(args),
        EngineCommand::Verify(args) => verify(args),
    }
}

/// A builder's phases as one bar: the outermost phase's steps, the innermost one's name.
struct Phases {
    bar: indicatif::ProgressBar,
    outermost: Mutex<Option<String>>,
}

impl Phases {
    fn hear(&self, progress: Progress) -> bool {
        let mut outermost = self.outermost.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match progress {
            Progress::Begin { phase, parent: None, steps } => {
                self.bar.set_length(u64::from(steps));
                self.bar.set_message(phase.clone());
                *outermost = Some(phase);
            }
            Progress::Begin { phase, .. } => self.bar.set_message(phase),
            Progress::Step { phase, step } if outermost.as_deref() == Some(&phase) => {
                self.bar.set_position(u64::from(step) + 1);
            }
            Progress::Step { .. } => self.bar.tick(),
            Progress::End { .. } => {}
        }
        true
    }
}

fn read_cache(path: &Path) -> anyhow::Result<Vec<u8>> {
    match std::fs::metadata(path) {
        Ok(meta) if meta.len() > MAX_CACHE_BYTES => {
            bail!("read the timing cache {}: expected at most {MAX_CACHE_BYTES} bytes", path.display())
        }
        Ok(_) => std::fs::read(path).with_context(|| format!("read the timing cache {}", path.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error).with_context(|| format!("read the timing cache {}", path.display())),
    }
}

fn write_beside(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let part = path.with_extension(format!("{}.new", std::process::id()));
    std::fs::write(&part, bytes)
        .and_then(|()| std::fs::rename(&part, path))
        .with_context(|| format!("write the timing cache {}", path.display()))
}

fn build(args: &BuildArgs) -> anyhow::Result<Ended> {
    let model = modelcmd::load(args.model.as_ref())?;
    let precision = Precision::from(args.precision);
    let library = Library::open(args.library.as_deref())?;
    let gpu = Gpu::open(args.device);
    let folders = plan::folders(&model);
    let cache = args.timing_cache.as_deref().map(read_cache).transpose()?;
    let workspace_bytes = match args.workspace_mib.unwrap_or(0).checked_mul(1 << 20) {
        Some(bytes) => bytes,
        None => bail!("--workspace-mib is larger than any memory"),
    };
    let phases = Phases { bar: progress_bar(1, "building"), outermost: Mutex::new(None) };
    let hear = |progress: Progress| phases.hear(progress);
    let options = BuildOptions { workspace_bytes, timing_cache: cache.as_deref(), progress: Some(&hear) };
    if let Ok(gpu) = &gpu {
        gpu.bind()?;
    }
    let started = Instant::now();
    let info = gpu.as_ref().ok().map(|gpu| DeviceInfo::of(gpu));
    let stored = tensorrt::build(&model, precision, library, info.as_ref(), &folders, &options);
    phases.bar.finish_and_clear();
    let stored = stored?;
    let seconds = started.elapsed().as_secs_f64();
    let timing_cache_bytes = match (&args.timing_cache, &stored.built.timing_cache) {
        (Some(path), Some(bytes)) => {
            write_beside(path, bytes)?;
            Some(bytes.len())
        }
        _ => None,
    };
    let note = gpu.as_ref().err().map(|error| format!("built without a GPU ({error}): this plan runs nowhere"));
    let bytes = std::fs::metadata(&stored.path).map(|m| m.len()).unwrap_or(0);
    if args.json {
        print_json(&json!({
            "schema": "darnet.engine-build/1",
            "model": model_info(&model),
            "key": stored.key,
            "file": stored.path,
            "bytes": bytes,
            "layers": stored.built.layers,
            "seconds": seconds,
            "timing_cache_bytes": timing_cache_bytes,
            "runs_here": gpu.is_ok(),
            "note": note,
        }))?;
    } else {
        println!("{}: {}", stored.path.display(), stored.key.describe());
        println!("  {bytes} bytes, {} layers, {seconds:.1} s", stored.built.layers);
        if let Some(note) = note {
            println!("  {note}");
        }
    }
    Ok(Ended::Done)
}

fn show(args: &ShowArgs) -> anyhow::Result<Ended> {
    let model = modelcmd::load(args.model.as_ref())?;
    let library = Library::open(args.library.as_deref());
    let gpu = Gpu::open(args.device).map(|gpu| DeviceInfo::of(&gpu));
    let listed = plan::list(&plan::folders(&model));
    let here = |key: &PlanKey| -> Option<bool> {
        let (Ok(library), Ok(gpu)) = (&library, &gpu) else { return None };
        Some(*key == PlanKey::new(&model, key.precision, library, Some(gpu)))
    };
    let damaged = listed.iter().any(|l| l.key.is_err());
    if args.json {
        let plans: Vec<Value> = listed
            .iter()
            .map(|listed| match &listed.key {
                Ok(key) => json!({ "file": listed.path, "bytes": listed.bytes, "key": key, "runs_here": here(key) }),
                Err(error) => json!({ "file": listed.path, "bytes": listed.bytes, "error": error.to_string() }),
            })
            .collect();
        print_json(&json!({
            "schema": "darnet.engine-show/1",
            "model": model_info(&model),
            "library": match &library {
                Ok(library) => json!({
                    "product": library.product(),
                    "version": library.version(),
                    "file": library.path(),
                    "interface": library.layout(),
                    "can_build": library.can_build(),
                }),
                Err(error) => json!({ "error": error.to_string() }),
            },
            "gpu": match &gpu {
                Ok(gpu) => json!({
                    "name": gpu.name,
                    "compute_capability": gpu.compute_capability,
                    "driver": gpu.driver,
                }),
                Err(error) => json!({ "error": error.to_string() }),
            },
            "plans": plans,
        }))?;
    } else {
        match &library {
            Ok(library) => println!("library   {library}, {}", library.path().display()),
            Err(error) => println!("library   none: {error}"),
        }
        match &gpu {
            Ok(gpu) => {
                println!("GPU       {}, compute capability {}, {}", gpu.name, gpu.compute_capability, gpu.driver);
            }
            Err(error) => println!("GPU       none: {error}"),
        }
        if listed.is_empty() {
            println!("plans     none");
        }
        for listed in &listed {
            match &listed.key {
                Ok(key) => {
                    let runs = match here(key) {
                        Some(true) => "runs here",
                        Some(false) => "for another library, GPU, driver or model",
                        None => "not run here",
                    };
                    println!("plan      {}: {}: {runs}", listed.path.display(), key.describe());
                }
                Err(error) => println!("plan      refused: {error}"),
            }
        }
    }
    Ok(if damaged { Ended::Failed } else { Ended::Done })
}

/// How far a backend may be from the cpu one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Tolerance {
    /// Largest difference of a logit, by max(1, largest logit); none where only probabilities count.
    logit: Option<f64>,
    /// Largest difference of a probability.
    probability: f64,
    /// Largest difference of a cell of an activation map, by the map's range.
    cam: f64,
}

impl Tolerance {
    fn of(backend: &str) -> Self {
        match backend {
            "tensorrt" | "cuda" => Self { logit: None, probability: 2e-3, cam: 1e-2 },
            _ => Self { logit: Some(1e-3), probability: 1e-4, cam: 1e-3 },
        }
    }
}

/// One phantom on both backends.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Compared {
    phantom: String,
    /// Differences as in [`Tolerance`], the first absolute too.
    logit_absolute: f64,
    logit: f64,
    probability: f64,
    cam: f64,
    /// The class each backend puts first.
    cpu: String,
    other: String,
    /// Whether the cpu backend's first two probabilities are further apart than twice the tolerance.
    decided: bool,
}

fn largest(a: &[f32], b: &[f32]) -> f64 {
    if a.len() != b.len() {
        return f64::INFINITY;
    }
    let difference = |(x, y): (&f32, &f32)| (f64::from(*x) - f64::from(*y)).abs();
    a.iter().zip(b).map(difference).fold(0.0, |most, d| if d.is_nan() { f64::INFINITY } else { most.max(d) })
}

fn first(scores: &[f32]) -> usize {
    scores.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |(index, _)| index)
}

fn compare(model: &Model, phantom: String, cpu: &Inference, other: &Inference, tolerance: Tolerance) -> Compared {
    let keys = &model.manifest.class_keys;
    let class = first(&cpu.scores);
    let head = model.weights.get("fc.weight");
    let (ours, theirs) = (class_activation_map(cpu, head, class), class_activation_map(other, head, class));
    let (low, high) =
        ours.values.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), v| (low.min(*v), high.max(*v)));
    let range = f64::from(high) - f64::from(low);
    let cam_absolute = largest(&ours.values, &theirs.values);
    let logit_absolute = largest(&cpu.logits, &other.logits);
    let scale = cpu.logits.iter().fold(1.0, |most, v| f64::from(v.abs()).max(most));
    let mut sorted = cpu.scores.clone();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let gap = f64::from(sorted[0]) - f64::from(sorted.get(1).copied().unwrap_or(0.0));
    Compared {
        phantom,
        logit_absolute,
        logit: logit_absolute / scale,
        probability: largest(&cpu.scores, &other.scores),
        // A flat map has no range to compare with.
        cam: if range > 0.0 { cam_absolute / range } else { cam_absolute },
        cpu: keys[class].clone(),
        other: keys[first(&other.scores)].clone(),
        decided: gap > 2.0 * tolerance.probability,
    }
}

/// The network's input of a phantom.
fn input_of(model: &Model, spec: &PhantomSpec) -> anyhow::Result<Vec<f32>> {
    let phantom = generate(spec);
    let hu = (0..spec.slices).map(|index| phantom.slice(index).to_vec()).collect();
    let scan = Loaded { geometry: phantom.geometry(), hu, notes: Vec::new() }.into_scan(&GeometryLimits::default());
    let refused = |refusal| anyhow::anyhow!("a phantom was refused: {refusal}");
    let (m, scan) = (&model.manifest, scan.map_err(refused)?);
    Ok(scan.network_input(&m.preprocessing, m.architecture.input_dhw).map_err(refused)?.values)
}

fn verify(args: &VerifyArgs) -> anyhow::Result<Ended> {
    if args.count == 0 || args.count > MAX_PHANTOMS {
        bail!("--count wants 1 to {MAX_PHANTOMS} phantoms, got {}", args.count);
    }
    let model = modelcmd::load(args.engine.model.as_ref())?;
    let options = args.engine.options();
    let backend = prepare(args.engine.backend, &model, &options)?;
    if let Some(note) = backend.note() {
        eprintln!("darnet: {note}");
    }
    let tolerance = Tolerance::of(backend.name());
    let compared = compare_all(args, &model, backend.as_ref(), &options, tolerance)?;
    let most = |of: fn(&Compared) -> f64| compared.iter().map(of).fold(0.0, f64::max);
    let (logit, probability, cam) = (most(|c| c.logit), most(|c| c.probability), most(|c| c.cam));
    let logit_absolute = most(|c| c.logit_absolute);
    let agree = compared.iter().filter(|c| c.cpu == c.other).count();
    let torn = compared.iter().any(|c| c.decided && c.cpu != c.other);
    let within = tolerance.logit.is_none_or(|allowed| logit <= allowed)
        && probability <= tolerance.probability
        && cam <= tolerance.cam
        && !torn;
    if args.json {
        print_json(&json!({
            "schema": "darnet.engine-verify/1",
            "model": model_info(&model),
            "backend": backend.name(),
            "against": "cpu",
            "phantoms": compared.len(),
            "seed": args.seed,
            "max_logit_difference": logit_absolute,
            "max_logit_difference_relative": logit,
            "max_probability_difference": probability,
            "max_cam_difference_of_range": cam,
            "agreement": agree,
            "tolerance": tolerance,
            "within": within,
            "cases": compared,
        }))?;
    } else {
        println!("{} against cpu, {} phantoms, model {}", backend.name(), compared.len(), model.manifest.id);
        let bound = |v: f64| format!("allowed {v:.0e}");
        println!("  logits         {logit_absolute:.2e}, by the largest {logit:.2e}, {}", {
            tolerance.logit.map_or_else(|| "no bound".to_owned(), bound)
        });
        println!("  probabilities  {probability:.2e}, {}", bound(tolerance.probability));
        println!("  activation map {cam:.2e} of its range, {}", bound(tolerance.cam));
        println!("  same class     {agree} of {}", compared.len());
        println!("{}", if within { "within the bounds" } else { "beyond the bounds" });
    }
    Ok(if within { Ended::Done } else { Ended::Failed })
}

fn compare_all(
    args: &VerifyArgs,
    model: &Model,
    backend: &dyn Backend,
    options: &EngineOptions,
    tolerance: Tolerance,
) -> anyhow::Result<Vec<Compared>> {
    let cpu = prepare(BackendKind::Cpu, model, options)?;
    let (mut ours, mut theirs) = (cpu.session()?, backend.session()?);
    let bar = progress_bar(args.count as u64, "phantoms");
    let classes = [PhantomClass::Covid, PhantomClass::Cp, PhantomClass::Healthy];
    let cancel = CancelToken::new();
    let (mut a, mut b) = (Inference::default(), Inference::default());
    let mut compared = Vec::with_capacity(args.count);
    for (n, class) in classes.into_iter().cycle().take(args.count).enumerate() {
        let seed = args.seed.wrapping_add(n as u64);
        let (slices, rows, columns) = PHANTOM_SHAPE;
        let input = input_of(model, &PhantomSpec::random(class, seed).with_shape(slices, rows, columns))?;
        ours.run(&input, &cancel, &mut a)?;
        theirs.run(&input, &cancel, &mut b)?;
        compared.push(compare(model, format!("{} {seed}", class.as_str()), &a, &b, tolerance));
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(compared)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inference(logits: &[f32], features: &[f32]) -> Inference {
        Inference {
            logits: logits.to_vec(),
            scores: darnet::engine::softmax(logits),
            pooled: vec![0.0; 64],
            feature_map: features.iter().copied().cycle().take(64 * 8).collect(),
            feature_shape_cdhw: [64, 2, 2, 2],
        }
    }

    #[test]
    fn differences_are_measured_by_what_they_are_allowed_by() {
        let model = Model::embedded().unwrap();
        assert_eq!(model.weights.get("fc.weight").len(), 3 * 64);
        let tolerance = Tolerance::of("tensorrt");
        let a = inference(&[4.0, 1.0, 0.0], &[0.0, 1.0, 3.0]);
        let same = compare(&model, "x".to_owned(), &a, &a, tolerance);
        assert_eq!((same.logit, same.probability, same.cam), (0.0, 0.0, 0.0));
        assert!(same.decided && same.cpu == same.other);
        let b = inference(&[4.0, 1.0, 0.4], &[0.0, 1.0, 3.1]);
        let other = compare(&model, "x".to_owned(), &a, &b, tolerance);
        assert!((other.logit_absolute - 0.4).abs() < 1e-6 && (other.logit - 0.1).abs() < 1e-6);
        assert!(other.probability > 0.0 && other.cam > 0.0);
        let c = inference(&[0.0, f32::NAN, 9.0], &[0.0]);
        let broken = compare(&model, "x".to_owned(), &a, &c, tolerance);
        assert!(broken.logit.is_infinite() && broken.cpu != broken.other);
    }
}
