//! `darnet-train fit`, `ablate`, `evaluate`, `import`, `bench`: arguments, progress, documents.
//!
//! Progress goes to stderr, documents to stdout. What is computed lies in the other modules.

use std::collections::HashMap;
use std::io::{BufRead as _, Write as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use tch::{Device, Kind, Tensor};

use super::augment::{AugmentOptions, Pose, Recipe};
use super::fit::{Engine, Event, FitOptions, RunOptions, Summary, fit as run_fit};
use super::net::{Precision, initial_weights};
use super::report::{Judged, Variant, document, write_document, write_pictures};
use super::torch::{TorchOptions, devices, gpu_bytes_used, init};
use super::{Cache, Split, SplitRow};
use super::{ablate as plan, evaluate as judge, import as pth};
use crate::model::new::NewModel;
use crate::model::{Architecture, AttentionOrder, CLASS_KEYS, Weights};

/// Where the scans are.
#[derive(Args, Clone, Debug)]
pub struct DataArgs {
    /// The cache that `prepare` made
    #[arg(long, value_name = "DIR")]
    cache: PathBuf,
    /// The split that `split` made
    #[arg(long, value_name = "CSV")]
    split: PathBuf,
}

fn parse_dhw(text: &str) -> Result<[usize; 3], String> {
    let parts: Result<Vec<usize>, _> = text.split(',').map(str::parse).collect();
    match parts.as_deref() {
        Ok(&[d, h, w]) => Ok([d, h, w]),
        _ => Err("expected three numbers D,H,W".to_owned()),
    }
}

fn parse_share(text: &str) -> Result<(usize, usize), String> {
    let parts: Option<(usize, usize)> =
        text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
    parts.filter(|(i, n)| i < n).ok_or_else(|| "expected I/N, I from 0 to N - 1".to_owned())
}

/// The network.
#[derive(Args, Clone, Debug)]
pub struct NetArgs {
    /// Channels of the stem
    #[arg(long, default_value_t = 64)]
    width: usize,
    /// Leave an attention out
    #[arg(long, value_enum, value_name = "ATTENTION")]
    without: Vec<Attention>,
    /// Which attention comes first
    #[arg(long, value_enum, default_value_t = Order::DepthFirst)]
    attention_order: Order,
}

/// An attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Attention {
    /// Channel attention
    Ca,
    /// Depth attention
    Da,
}

/// Order of the attentions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Order {
    /// Depth, then channel
    DepthFirst,
    /// Channel, then depth
    ChannelFirst,
}

impl NetArgs {
    fn architecture(&self, input_dhw: [usize; 3], num_classes: usize) -> Architecture {
        Architecture {
            base_width: self.width,
            input_dhw,
            num_classes,
            channel_attention: !self.without.contains(&Attention::Ca),
            depth_attention: !self.without.contains(&Attention::Da),
            attention_order: self.attention_order.into(),
        }
    }
}

impl From<Order> for AttentionOrder {
    fn from(order: Order) -> Self {
        match order {
            Order::DepthFirst => Self::DepthFirst,
            Order::ChannelFirst => Self::ChannelFirst,
        }
    }
}

/// How to use the machine.
#[derive(Args, Clone, Debug)]
pub struct DeviceArgs {
    /// auto, cpu, cuda, cuda:1, cuda:0,1 or cuda:all
    #[arg(long, default_value = "auto")]
    device: String,
    /// Threads of one operation on the processor; 0: one a physical core
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// The same bits on every run on GPUs too, slower
    #[arg(long)]
    deterministic: bool,
    /// TF32 in f32 convolutions on GPUs
    #[arg(long)]
    tf32: bool,
    /// Time cuDNN's ways of doing each convolution first; costs seconds for every new shape
    #[arg(long, value_enum, default_value_t = Switch::On)]
    tune: Switch,
    /// Number format
    #[arg(long, value_enum, default_value_t = Precision::Fp32)]
    precision: Precision,
    /// Memory order; channels last by default on GPUs
    #[arg(long, value_enum)]
    channels_last: Option<Switch>,
    /// Fuse what lies between convolutions, on GPUs
    #[arg(long, value_enum, default_value_t = Switch::On)]
    fused: Switch,
}

/// Yes or no.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// Yes
    On,
    /// No
    Off,
}

impl DeviceArgs {
    fn open(&self) -> anyhow::Result<Vec<Device>> {
        init(&TorchOptions {
            threads: self.threads,
            deterministic: self.deterministic,
            tf32: self.tf32,
            half: self.precision != Precision::Fp32,
            tune: self.tune == Switch::On,
        })?;
        Ok(devices(&self.device)?)
    }

    fn channels_last(&self, device: Device) -> bool {
        self.channels_last.map_or(device.is_cuda(), |s| s == Switch::On)
    }
}

/// How to train.
#[derive(Args, Clone, Debug)]
pub struct TrainArgs {
    /// Passes over the training scans
    #[arg(long, default_value_t = 80)]
    epochs: usize,
    /// Scans a step
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Scans at once on one device, gradients are summed up to a batch; 0: all of the device's share
    #[arg(long, default_value_t = 0)]
    micro_batch: usize,
    /// Learning rate
    #[arg(long, default_value_t = 1e-3)]
    lr: f64,
    /// Its factor every --lr-every epochs
    #[arg(long, default_value_t = 0.1)]
    lr_factor: f64,
    /// Epochs of one learning rate
    #[arg(long, default_value_t = 30)]
    lr_every: usize,
    /// Seed of everything random
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// corrected: identity possible, clean validation. as-released: a flip always applied, validation augmented
    #[arg(long, value_enum, default_value_t = Recipe::Corrected)]
    recipe: Recipe,
    /// No augmentation at all
    #[arg(long)]
    no_augment: bool,
    /// Rotation, degrees both ways
    #[arg(long, default_value_t = 5.0)]
    rotation: f64,
    /// Translation, pixels of a 224-pixel side both ways
    #[arg(long, default_value_t = 5.0)]
    translation: f64,
    /// Zoom goes from 1 - this to 1 + this
    #[arg(long, default_value_t = 0.1)]
    zoom: f64,
    /// Weight of a term that draws the map of the true class to the lesion masks; 0 is the paper's
    #[arg(long, value_name = "WEIGHT", default_value_t = 0.0)]
    lesion_weight: f64,
    /// Start from this model's weights
    #[arg(long, value_name = "MODEL_DIR")]
    init: Option<PathBuf>,
    /// A checkpoint every so many steps too, not only after each epoch
    #[arg(long, value_name = "STEPS", default_value_t = 0)]
    checkpoint_steps: usize,
    /// What the manifest says it was trained on
    #[arg(long, value_name = "TEXT", default_value = "a cache of unnamed sources")]
    trained_on: String,
    /// demo, research or clinical
    #[arg(long, default_value = "research")]
    intended_use: String,
    /// Store matrices in half precision
    #[arg(long)]
    half_weights: bool,
    /// End with the best epoch so far after this time; runs of a plan share it
    #[arg(long, value_name = "SECONDS")]
    time_limit: Option<u64>,
    #[command(flatten)]
    device: DeviceArgs,
}

impl TrainArgs {
    fn options(&self, architecture: Architecture, device: Device) -> FitOptions {
        FitOptions {
            architecture,
            epochs: self.epochs,
            batch: self.batch,
            micro_batch: self.micro_batch,
            learning_rate: self.lr,
            lr_factor: self.lr_factor,
            lr_every: self.lr_every,
            seed: self.seed,
            augment: AugmentOptions {
                enabled: !self.no_augment,
                recipe: self.recipe,
                rotation_deg: self.rotation,
                translation_px: self.translation,
                zoom: [1.0 - self.zoom, 1.0 + self.zoom],
            },
            precision: self.device.precision,
            channels_last: self.device.channels_last(device),
            fused: self.device.fused == Switch::On,
            lesion_weight: self.lesion_weight,
        }
    }

    fn run<'a>(&self, out: PathBuf, id: &str, at: Vec<Device>, init: Option<&'a Weights>) -> RunOptions<'a> {
        RunOptions {
            out,
            devices: at,
            checkpoint_steps: self.checkpoint_steps,
            initial: init,
            stop: None,
            id: id.to_owned(),
            trained_on: self.trained_on.clone(),
            intended_use: self.intended_use.clone(),
            half_weights: self.half_weights,
            deadline: self.time_limit.map(|s| Instant::now() + Duration::from_secs(s)),
        }
    }

    fn initial(&self, architecture: &Architecture) -> anyhow::Result<Option<Weights>> {
        let Some(dir) = &self.init else { return Ok(None) };
        let model = judge::load_model(dir)?;
        if model.manifest.architecture != *architecture {
            bail!("--init: the model's network is another one than asked for");
        }
        Ok(Some(model.weights))
    }
}

/// A data set with its split.
struct Opened {
    data: Cache,
    split: Split,
    index: HashMap<String, usize>,
}

impl Opened {
    fn indices(&self, rows: &[&SplitRow]) -> Vec<usize> {
        rows.iter().filter_map(|row| self.index.get(&row.scan).copied()).collect()
    }

    fn fold(&self, fold: usize) -> anyhow::Result<(Vec<usize>, Vec<usize>)> {
        if fold >= self.split.folds() {
            bail!("fold {fold}: the split has folds 0 to {}", self.split.folds().saturating_sub(1));
        }
        Ok((self.indices(&self.split.train_of(fold)), self.indices(&self.split.validation_of(fold))))
    }
}

impl DataArgs {
    fn open(&self) -> anyhow::Result<Opened> {
        let cache = Cache::open(&self.cache)?;
        let split = Split::read_csv(&self.split)?;
        split.verify(cache.cases())?;
        let index = cache.cases().iter().enumerate().map(|(i, c)| (c.scan.clone(), i)).collect();
        Ok(Opened { data: cache, split, index })
    }
}

/// `darnet-train fit`.
#[derive(Args, Clone, Debug)]
pub struct FitArgs {
    #[command(flatten)]
    data: DataArgs,
    /// The fold to validate on
    #[arg(long, default_value_t = 0)]
    fold: usize,
    /// The run's folder; a run that was interrupted goes on there
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Name of the model
    #[arg(long, default_value = "darnet")]
    id: String,
    /// The summary as JSON on stdout
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    net: NetArgs,
    #[command(flatten)]
    train: TrainArgs,
}

/// Set by the first Ctrl-C or SIGTERM; the second ends the process.
fn stop_flag() -> anyhow::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(&stop))?;
        signal_hook::flag::register(signal, Arc::clone(&stop))?;
    }
    Ok(stop)
}

fn train(
    data: &Opened,
    fold: usize,
    options: &FitOptions,
    run: &RunOptions<'_>,
    what: &str,
) -> anyhow::Result<Summary> {
    let (train, validation) = data.fold(fold)?;
    let bar = indicatif::ProgressBar::no_length();
    if let Ok(style) = indicatif::ProgressStyle::with_template("{msg} [{wide_bar}] {pos}/{len} {eta}") {
        bar.set_style(style);
    }
    let epochs = options.epochs;
    let mut on_event = |event: &Event<'_>| match event {
        Event::Plain(reason) => eprintln!("{what}: steps are not fused: {reason}"),
        Event::Resumed(done, steps) => eprintln!("{what}: goes on after {done} epochs and {steps} steps"),
        Event::Step { epoch, step, steps, loss } => {
            bar.set_length(*steps as u64);
            bar.set_position(*step as u64);
            bar.set_message(format!("{what} epoch {epoch}/{epochs} loss {loss:.4}"));
        }
        Event::Epoch(row) => bar.suspend(|| {
            eprintln!(
                "{what} epoch {}/{epochs}: loss {:.4} accuracy {:.3} | validation loss {:.4} accuracy {:.3} AUC {} | \
                 {:.1} images/s, waiting for data {:.1} %",
                row.epoch,
                row.train_loss,
                row.train_accuracy,
                row.validation_loss,
                row.validation_accuracy,
                row.validation_auc.map_or("-".to_owned(), |a| format!("{a:.3}")),
                row.images_per_s,
                100.0 * row.wait_share
            );
        }),
    };
    let summary = run_fit(&data.data, &train, &validation, options, run, &mut on_event);
    bar.finish_and_clear();
    let summary = summary?;
    eprintln!(
        "{what}: best epoch {}, validation accuracy {:.4}, AUC {}; {:.1} images/s, waiting for data {:.2} %",
        summary.best.epoch,
        summary.validation.accuracy,
        summary.validation.target().and_then(|b| b.auc).map_or("-".to_owned(), |a| format!("{:.4}", a.value)),
        summary.images_per_s,
        100.0 * summary.wait_share
    );
    Ok(summary)
}

/// Runs `darnet-train fit`.
///
/// # Errors
/// Whatever ends the run.
pub fn fit(args: &FitArgs) -> anyhow::Result<()> {
    let at = args.train.device.open()?;
    let data = args.data.open()?;
    let architecture = args.net.architecture(data.data.input_dhw(), data.data.class_names().len());
    let options = args.train.options(architecture, at[0]);
    let initial = args.train.initial(&options.architecture)?;
    let stop = stop_flag()?;
    let mut run = args.train.run(args.out.clone(), &args.id, at, initial.as_ref());
    run.stop = Some(&stop);
    let summary = train(&data, args.fold, &options, &run, &format!("fold {}", args.fold))?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&summary)?);
    }
    Ok(())
}

/// `darnet-train ablate`.
#[derive(Args, Clone, Debug)]
pub struct AblateArgs {
    #[command(flatten)]
    data: DataArgs,
    /// Folds; all by default
    #[arg(long, value_delimiter = ',')]
    folds: Vec<usize>,
    /// none, ca, da, both; all by default
    #[arg(long = "variants", value_delimiter = ',')]
    variants: Vec<String>,
    /// Do share I (from 0) of N of the runs and print no tables, so that N processes share the work; the same command
    /// without this prints them
    #[arg(long, value_name = "I/N", value_parser = parse_share)]
    share: Option<(usize, usize)>,
    /// The plan's folder; a plan that was interrupted goes on there
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    net: NetArgs,
    #[command(flatten)]
    train: TrainArgs,
}

/// Runs `darnet-train ablate`.
///
/// # Errors
/// Whatever ends a run.
pub fn ablate(args: &AblateArgs) -> anyhow::Result<()> {
    let at = args.train.device.open()?;
    let data = args.data.open()?;
    let architecture = args.net.architecture(data.data.input_dhw(), data.data.class_names().len());
    let folds = if args.folds.is_empty() { (0..data.split.folds()).collect() } else { args.folds.clone() };
    let runs = plan::plan(&architecture, &args.variants, &folds, &args.out)?;
    let stop = stop_flag()?;
    let mine = |i: usize| args.share.is_none_or(|(share, of)| i % of == share);
    let end = args.train.time_limit.map(|s| Instant::now() + Duration::from_secs(s));
    let mut runs_left = (0..runs.len()).filter(|i| mine(*i)).count() as u32;
    for (i, planned) in runs.iter().enumerate().filter(|(i, _)| mine(*i)) {
        let what = format!("[{}/{}] {} fold {}", i + 1, runs.len(), planned.variant, planned.fold);
        let options = args.train.options(planned.architecture.clone(), at[0]);
        let initial = args.train.initial(&options.architecture)?;
        let id = format!("{}-fold-{}", planned.variant, planned.fold);
        let mut run = args.train.run(planned.out.clone(), &id, at.clone(), initial.as_ref());
        run.stop = Some(&stop);
        run.deadline = end.map(|end| {
            let now = Instant::now();
            now + end.saturating_duration_since(now) / runs_left
        });
        runs_left -= 1;
        train(&data, planned.fold, &options, &run, &what)?;
    }
    if args.share.is_some() {
        return Ok(());
    }
    let tables = plan::tables(&runs, args.train.seed)?;
    write_document(&args.out, &tables)?;
    let both: Vec<Judged> = runs
        .iter()
        .filter(|r| r.variant == "both")
        .map(|r| judge::of_run(&r.out, args.train.seed))
        .collect::<Result<_, _>>()?;
    write_pictures(&args.out, &both)?;
    println!("{}", super::report::markdown(&tables));
    Ok(())
}

/// `darnet-train evaluate`.
#[derive(Args, Clone, Debug)]
pub struct EvaluateArgs {
    /// Folders of runs or models. Without a cache, the runs' own validation scans are judged
    #[arg(required = true, value_name = "DIR")]
    paths: Vec<PathBuf>,
    /// A cache to judge the models on
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// Its split; without one, all scans are judged
    #[arg(long, value_name = "CSV", requires = "cache")]
    split: Option<PathBuf>,
    /// Which of the split: `test`, or a fold's number for its validation scans
    #[arg(long, default_value = "test", requires = "split")]
    set: String,
    /// Write the figures into each model's manifest too, under names that begin with this
    #[arg(long, value_name = "PREFIX", requires = "cache")]
    record: Option<String>,
    /// Where the tables and pictures go
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Scans at once
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Seed of the bootstrap
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    device: DeviceArgs,
}

/// Runs `darnet-train evaluate`.
///
/// # Errors
/// Folders without a run or model, or data that do not fit.
pub fn evaluate(args: &EvaluateArgs) -> anyhow::Result<()> {
    let at = args.device.open()?;
    let mut rows = Vec::new();
    let mut parameters = 0;
    let mut title = "Runs on their own validation scans".to_owned();
    if let Some(cache) = &args.cache {
        let cache = Cache::open(cache)?;
        let indices: Vec<usize> = match &args.split {
            None => (0..cache.cases().len()).collect(),
            Some(path) => {
                let split = Split::read_csv(path)?;
                split.verify(cache.cases())?;
                let chosen = match args.set.as_str() {
                    "test" => split.test(),
                    number => split.validation_of(number.parse().context("--set: expected test or a fold's number")?),
                };
                let by_name: HashMap<&str, usize> =
                    cache.cases().iter().enumerate().map(|(i, c)| (c.scan.as_str(), i)).collect();
                chosen.iter().filter_map(|r| by_name.get(r.scan.as_str()).copied()).collect()
            }
        };
        title = format!("Models on {} scans ({})", indices.len(), args.set);
        for path in &args.paths {
            let judged = judge::of_model(path, &cache, &indices, at[0], args.batch, args.seed)?;
            let model = judge::load_model(path)?;
            parameters = model.manifest.architecture.parameter_count();
            std::fs::create_dir_all(&args.out)?;
            let file = args.out.join(format!("{}.csv", judged.name));
            super::report::write_predictions(&file, cache.class_names(), &judged.predictions)?;
            if let Some(prefix) = &args.record {
                let dir = model.dir.as_ref().context("the model has no folder")?;
                let mut manifest = model.manifest;
                manifest.scores.extend(super::report::manifest_scores(prefix, &judged.evaluation));
                super::write_atomic(&dir.join(crate::model::MANIFEST_FILE), manifest.to_toml()?.as_bytes())?;
            }
            rows.push(judged);
        }
    } else {
        for path in &args.paths {
            rows.push(judge::of_run(path, args.seed)?);
            parameters = judge::load_model(path)?.manifest.architecture.parameter_count();
        }
    }
    let variant = Variant {
        name: "DARNet".to_owned(),
        parameters,
        rows: rows.iter().map(|j| (j.name.clone(), j.evaluation.clone())).collect(),
    };
    let tables = document(&title, vec![variant]);
    write_document(&args.out, &tables)?;
    write_pictures(&args.out, &rows)?;
    println!("{}", super::report::markdown(&tables));
    Ok(())
}

/// `darnet-train import`.
#[derive(Args, Clone, Debug)]
pub struct ImportArgs {
    /// The state dict, a `.pth` file of torch.save
    checkpoint: PathBuf,
    /// The model's folder
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Name of the model; the folder's by default
    #[arg(long)]
    id: Option<String>,
    /// Input shape
    #[arg(long, value_name = "D,H,W", value_parser = parse_dhw, default_value = "64,224,224")]
    input: [usize; 3],
    /// Which attention comes first
    #[arg(long, value_enum, default_value_t = Order::DepthFirst)]
    attention_order: Order,
    /// What the manifest says it was trained on
    #[arg(long, value_name = "TEXT")]
    trained_on: Option<String>,
    /// demo, research or clinical
    #[arg(long)]
    intended_use: Option<String>,
}

/// Runs `darnet-train import`.
///
/// # Errors
/// A file that is no state dict of this network; the first tensor that does not fit is named.
pub fn import(args: &ImportArgs) -> anyhow::Result<()> {
    init(&TorchOptions::default())?;
    let options = NewModel {
        id: args.id.clone(),
        input_dhw: Some(args.input),
        attention_order: args.attention_order.into(),
        trained_on: args.trained_on.clone(),
        intended_use: args.intended_use.clone(),
        ..NewModel::default()
    };
    let manifest = pth::import(&args.checkpoint, &args.out, &options)?;
    println!("{} {} parameters", manifest.id, manifest.architecture.parameter_count());
    Ok(())
}

/// `darnet-train bench`.
#[derive(Args, Clone, Debug)]
pub struct BenchArgs {
    /// Input shape
    #[arg(long, value_name = "D,H,W", value_parser = parse_dhw, default_value = "64,224,224")]
    input: [usize; 3],
    /// Scans a step
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Steps to time, after one to warm up on the processor, five on a GPU
    #[arg(long, default_value_t = 3)]
    steps: usize,
    /// No augmentation
    #[arg(long)]
    no_augment: bool,
    /// Time so many steps at each line on stdin and answer with a line, so that another program can be timed in turn
    #[arg(long)]
    on_request: bool,
    #[command(flatten)]
    net: NetArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

/// Runs `darnet-train bench`: times training steps on made-up volumes.
///
/// # Errors
/// No room on the device.
pub fn bench(args: &BenchArgs) -> anyhow::Result<()> {
    let at = args.device.open()?;
    let architecture = args.net.architecture(args.input, CLASS_KEYS.len());
    let options = FitOptions {
        batch: args.batch,
        precision: args.device.precision,
        channels_last: args.device.channels_last(at[0]),
        fused: args.device.fused == Switch::On,
        ..FitOptions::paper(architecture)
    };
    let in_use = || match at[0] {
        Device::Cuda(index) => gpu_bytes_used(index),
        _ => None,
    };
    let before = in_use();
    let mut engine = Engine::new(&options, &at, &initial_weights(&options.architecture, 1))?;
    if let (true, Some(reason)) = (at[0].is_cuda(), engine.plain_because()) {
        eprintln!("steps are not fused: {reason}");
    }
    let [d, h, w] = args.input.map(|n| n as i64);
    let mut volumes =
        Tensor::f_rand([args.batch as i64, d, h, w], (Kind::Float, Device::Cpu))?.f_to_kind(Kind::Half)?;
    if at[0].is_cuda() {
        volumes = volumes.f_internal_pin_memory(at[0])?;
    }
    let labels: Vec<i64> = (0..args.batch as i64).map(|i| i % 3).collect();
    let augment = AugmentOptions { enabled: !args.no_augment, ..AugmentOptions::default() };
    let warm = if at[0].is_cuda() { 5 } else { 1 };
    let plain_because = engine.plain_because().map(str::to_owned);
    let mut losses = Vec::new();
    let mut done = 0;
    let mut run = |steps: usize| -> anyhow::Result<Vec<f64>> {
        let mut times_ms = Vec::with_capacity(steps);
        for _ in 0..steps {
            let poses: Vec<Pose> = (0..args.batch).map(|i| augment.pose(1, done, i)).collect();
            let start = Instant::now();
            let outcome = engine.step(&volumes, &labels, &poses, 1e-3)?;
            times_ms.push(start.elapsed().as_secs_f64() * 1e3);
            losses.push(outcome.loss);
            done += 1;
        }
        Ok(times_ms)
    };
    run(warm)?;
    let mut times_ms = Vec::new();
    if args.on_request {
        let mut out = std::io::stdout().lock();
        let gpu = before.zip(in_use()).map(|(before, after)| after.saturating_sub(before));
        writeln!(out, "{}", serde_json::json!({"ready": true, "gpu_bytes": gpu}))?;
        out.flush()?;
        for line in std::io::stdin().lock().lines() {
            line?;
            let round = run(args.steps)?;
            writeln!(out, "{}", serde_json::json!({"steps_ms": round}))?;
            out.flush()?;
            times_ms.extend(round);
        }
    } else {
        times_ms = run(args.steps)?;
    }
    losses.drain(..warm);
    let mut sorted = times_ms.clone();
    sorted.sort_by(f64::total_cmp);
    let median = sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN);
    let gpu = before.zip(in_use()).map(|(before, after)| after.saturating_sub(before));
    println!(
        "{}",
        serde_json::json!({
            "schema": "darnet.train-bench/1",
            "step_ms": median,
            "steps_ms": times_ms,
            "losses": losses,
            "images_per_s": 1e3 * args.batch as f64 / median,
            "gpu_bytes": gpu,
            "fused": plain_because.is_none(),
            "threads": tch::get_num_threads(),
        })
    );
    Ok(())
}
