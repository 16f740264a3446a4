//! Training: epochs, steps, validation, the best epoch, logs, resuming.
//!
//! Input: a data set, the scans to train and to validate on, [`FitOptions`] that define the result and [`RunOptions`]
//! that do not. Output: a folder:
//!
//! - `model/`: the model of the best validation epoch, as the scanner loads it;
//! - `metrics.csv` one line an epoch, `steps.csv` one a step, `events.out.tfevents.*` for TensorBoard, `curves.png`;
//! - `validation.csv`: the best model's scores on the validation scans;
//! - `checkpoint.safetensors`: where the run is; `summary.json`: written last, its presence says that the run is done.
//!
//! Invariants: the same options, data and seed give the same weights, interrupted or not (to the bit on the processor
//! with the same number of threads, and on GPUs in deterministic mode). A loss or gradient that is not finite ends the
//! run and names the batch; the checkpoint before it stays.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Reduction, Tensor, no_grad};

use super::augment::{self, AugmentOptions, Pose, Recipe};
use super::checkpoint::{self, Best, CHECKPOINT_FILE, EpochRow, State};
use super::fused::{Fused, Step};
use super::loader::{self, Batch};
use super::metrics::{self, COVID_KEY, Evaluation, Prediction};
use super::net::{Gradient, Layout, Precision, Replica, initial_weights};
use super::optimiser::{Adam, step_lr};
use super::tensorboard::EventFile;
use super::{Dataset, TrainError, plot, report, write_atomic};
use crate::engine::softmax;
use crate::model::{Architecture, Manifest, Model, Weights, sha256_hex};

/// Version of `summary.json`.
pub const SUMMARY_SCHEMA: &str = "darnet.fit/1";
/// The folder of the model within a run's.
pub const MODEL_DIR: &str = "model";
/// The file that says that a run is done.
pub const SUMMARY_FILE: &str = "summary.json";
/// Most epochs.
pub const MAX_EPOCHS: usize = 100_000;
/// Most scans a step.
pub const MAX_BATCH: usize = 4096;

/// What defines the result of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FitOptions {
    /// The network.
    pub architecture: Architecture,
    /// Passes over the training scans.
    pub epochs: usize,
    /// Scans a step.
    pub batch: usize,
    /// Scans at once on one device; gradients of a step are summed. 0: the batch, divided by the devices.
    pub micro_batch: usize,
    /// Learning rate of the first epoch.
    pub learning_rate: f64,
    /// Its factor …
    pub lr_factor: f64,
    /// … every so many epochs.
    pub lr_every: usize,
    /// Of initial weights, order and augmentation.
    pub seed: u64,
    /// What is drawn.
    pub augment: AugmentOptions,
    /// Number format.
    pub precision: Precision,
    /// Memory order of activations and kernels; the faster one on GPUs.
    pub channels_last: bool,
    /// Whether GPUs take the fused way between convolutions where they can; another rounding.
    #[serde(default = "yes")]
    pub fused: bool,
    /// Weight of the term that draws the map of the true class to the lesion mask, where a scan has one; 0 is the paper's.
    #[serde(default)]
    pub lesion_weight: f64,
}

fn yes() -> bool {
    true
}

impl FitOptions {
    /// The paper's: batch 8, 80 epochs, Adam at 1e-3, a tenth of it every 30 epochs.
    pub fn paper(architecture: Architecture) -> Self {
        Self {
            architecture,
            epochs: 80,
            batch: 8,
            micro_batch: 0,
            learning_rate: 1e-3,
            lr_factor: 0.1,
            lr_every: 30,
            seed: 1,
            augment: AugmentOptions::default(),
            precision: Precision::Fp32,
            channels_last: false,
            fused: true,
            lesion_weight: 0.0,
        }
    }

    fn validate(&self) -> Result<(), TrainError> {
        self.architecture.validate()?;
        self.augment.validate()?;
        let check = |ok: bool, option, expected: String, got: String| {
            if ok { Ok(()) } else { Err(TrainError::Option { option, expected, got }) }
        };
        check(
            (1..=MAX_EPOCHS).contains(&self.epochs),
            "epochs",
            format!("1 to {MAX_EPOCHS}"),
            self.epochs.to_string(),
        )?;
        check((1..=MAX_BATCH).contains(&self.batch), "batch", format!("1 to {MAX_BATCH}"), self.batch.to_string())?;
        let finite = self.learning_rate.is_finite() && self.learning_rate > 0.0;
        check(finite, "lr", "more than 0".to_owned(), self.learning_rate.to_string())?;
        let falls = self.lr_factor > 0.0 && self.lr_factor <= 1.0;
        check(falls, "lr-factor", "more than 0, at most 1".to_owned(), self.lr_factor.to_string())?;
        let weight = (0.0..=1000.0).contains(&self.lesion_weight);
        check(weight, "lesion-weight", "0 to 1000".to_owned(), self.lesion_weight.to_string())?;
        check(self.lr_every > 0, "lr-every", "at least 1".to_owned(), self.lr_every.to_string())
    }
}

/// What does not change the result, and where it goes.
pub struct RunOptions<'a> {
    /// The folder.
    pub out: PathBuf,
    /// Where to train; the first holds the optimiser.
    pub devices: Vec<Device>,
    /// Checkpoints within an epoch, every so many steps; 0: at the end of epochs only.
    pub checkpoint_steps: usize,
    /// Weights to start from instead of random ones.
    pub initial: Option<&'a Weights>,
    /// Set from elsewhere to stop after the step in hand.
    pub stop: Option<&'a AtomicBool>,
    /// Name of the model.
    pub id: String,
    /// What the manifest says it was trained on.
    pub trained_on: String,
    /// What the manifest says it is for.
    pub intended_use: String,
    /// Whether matrices are stored in half precision.
    pub half_weights: bool,
    /// When to end with the best epoch so far instead of doing the epochs that are left; after one epoch at the earliest.
    pub deadline: Option<Instant>,
}

/// What happens during a run.
pub enum Event<'a> {
    /// A run goes on from a checkpoint, after so many epochs and steps.
    Resumed(usize, usize),
    /// A step was done.
    Step {
        /// Counted from 1.
        epoch: usize,
        /// Within the epoch, counted from 1.
        step: usize,
        /// Steps of an epoch.
        steps: usize,
        /// Loss of the step.
        loss: f64,
    },
    /// An epoch was done and validated.
    Epoch(&'a EpochRow),
    /// Steps on a GPU do not take the fused way, and why.
    Plain(&'a str),
}

/// The end of a run, `summary.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// [`SUMMARY_SCHEMA`].
    pub schema: String,
    /// Options and data.
    pub run: serde_json::Value,
    /// Trainable parameters.
    pub parameters: u64,
    /// The best epoch.
    pub best: Best,
    /// Epochs that were done; fewer than asked for when the time was up.
    #[serde(default)]
    pub epochs_done: usize,
    /// The best model on the validation scans.
    pub validation: Evaluation,
    /// Training time, validation apart, seconds.
    pub seconds: f64,
    /// Training scans a second over the run.
    pub images_per_s: f64,
    /// Share of the training time spent waiting for data.
    pub wait_share: f64,
    /// Bytes in use on the first GPU at the end.
    pub gpu_bytes: Option<u64>,
}

/// What one step found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepOutcome {
    /// Mean cross-entropy of the batch.
    pub loss: f64,
    /// Scans whose class was right.
    pub right: usize,
    /// Whether the optimiser was left alone because a float16 gradient overflowed.
    pub skipped: bool,
}

/// Why a step did not end.
enum Fault {
    Loss,
    Gradient,
    Other(TrainError),
}

impl<E: Into<TrainError>> From<E> for Fault {
    fn from(error: E) -> Self {
        Self::Other(error.into())
    }
}

/// The network on its devices with its optimiser: the part that runs every step.
pub struct Engine {
    layout: Layout,
    replicas: Vec<Replica>,
    /// One a replica, or none at all.
    fused: Vec<Fused>,
    plain_because: Option<String>,
    adam: Adam,
    precision: Precision,
    micro_batch: usize,
    lesion_weight: f64,
}

impl Engine {
    /// An engine that starts at `weights`.
    ///
    /// # Errors
    /// Options out of range, no device, no room.
    pub fn new(options: &FitOptions, devices: &[Device], weights: &Weights) -> Result<Self, TrainError> {
        options.validate()?;
        let Some(&first) = devices.first() else {
            return Err(TrainError::Option { option: "device", expected: "one at least".into(), got: "none".into() });
        };
        if options.precision != Precision::Fp32 && devices.contains(&Device::Cpu) {
            // libtorch 2.11 (oneDNN): gradients of bf16 kernels are wrong where rows have three elements.
            return Err(TrainError::Option {
                option: "precision",
                expected: "fp32 on the processor, where libtorch's half-precision gradients cannot be trusted".into(),
                got: format!("{:?}", options.precision),
            });
        }
        let layout = Layout::new(&options.architecture, options.channels_last)?;
        let replicas = devices
            .iter()
            .map(|&device| Replica::of_weights(&layout, device, weights))
            .collect::<Result<Vec<_>, TrainError>>()?;
        let opened = if options.lesion_weight > 0.0 {
            Err("lesion masks are trained on, which the fused way does not know".to_owned())
        } else if options.fused {
            devices.iter().map(|&device| Fused::open(device, &layout, options.precision)).collect()
        } else {
            Err("it is turned off".to_owned())
        };
        let (fused, plain_because) = match opened {
            Ok(fused) => (fused, None),
            Err(reason) => (Vec::new(), Some(reason)),
        };
        let adam = Adam::new(layout.len(), first)?;
        let share = options.batch.div_ceil(devices.len());
        let micro_batch = if options.micro_batch == 0 { share } else { options.micro_batch.min(share) };
        Ok(Self {
            layout,
            replicas,
            fused,
            plain_because,
            adam,
            precision: options.precision,
            micro_batch,
            lesion_weight: options.lesion_weight,
        })
    }

    fn device(&self) -> Device {
        self.replicas[0].device
    }

    /// Why a step does not take the fused way; none when it does.
    pub fn plain_because(&self) -> Option<&str> {
        self.plain_because.as_deref()
    }

    /// One step on `volumes` (half or single precision, `N x D x H x W`, on the processor), shown in `poses`.
    ///
    /// # Errors
    /// A loss or gradient that is not finite, or no room on a device.
    pub fn step(
        &mut self,
        volumes: &Tensor,
        labels: &[i64],
        poses: &[Pose],
        learning_rate: f64,
    ) -> Result<StepOutcome, TrainError> {
        let mut scaler = super::optimiser::Scaler::default();
        self.scaled_step(volumes, None, labels, poses, learning_rate, &mut scaler).map_err(|fault| match fault {
            Fault::Loss => unnamed("loss"),
            Fault::Gradient => unnamed("gradient"),
            Fault::Other(error) => error,
        })
    }

    /// [`Engine::step`] with lesion masks beside the volumes, if there are any.
    fn scaled_step(
        &mut self,
        volumes: &Tensor,
        lesions: Option<&Tensor>,
        labels: &[i64],
        poses: &[Pose],
        learning_rate: f64,
        scaler: &mut super::optimiser::Scaler,
    ) -> Result<StepOutcome, Fault> {
        let scale = if self.precision == Precision::Fp16 { scaler.scale } else { 1.0 };
        let n = labels.len();
        let chunks: Vec<(usize, usize)> =
            (0..n).step_by(self.micro_batch).map(|at| (at, self.micro_batch.min(n - at))).collect();
        let (layout, precision, devices) = (&self.layout, self.precision, self.replicas.len());
        let fused = &self.fused;
        // Chunk i goes to device i mod the number of devices; sums are in this order whatever finishes first.
        let lesion_weight = self.lesion_weight;
        let work = |replica: &Replica, number: usize, volumes: &Tensor, lesions: Option<&Tensor>| {
            let mut found: Option<(Gradient, Tensor)> = None;
            for &(at, len) in chunks.iter().skip(number).step_by(devices) {
                let part = volumes.f_narrow(0, at as i64, len as i64)?;
                let x = augment::apply(&augment::upload(&part, replica.device)?, &poses[at..at + len])?;
                // Without waiting for what the device still does.
                let target = Tensor::f_from_slice(&labels[at..at + len])?;
                let target = target.f_to_device_(replica.device, Kind::Int64, true, false)?;
                let leaves = replica.leaves(layout, precision)?;
                let x = x.f_unsqueeze(1)?;
                let share = len as f64 / n as f64;
                let Step { gradient, loss, logits } = match fused.get(number) {
                    Some(fused) => fused.step(layout, replica, &leaves, &x, &target, share * scale)?,
                    None => {
                        let (logits, term) = match lesions {
                            None => (replica.forward(layout, &leaves, &x, true)?, None),
                            Some(lesions) => {
                                let part = lesions.f_narrow(0, at as i64, len as i64)?;
                                let part = augment::upload(&part, replica.device)?;
                                let seen = augment::apply(&part, &poses[at..at + len])?;
                                let (logits, term) =
                                    replica.forward_with_lesions(layout, &leaves, &x, &target, &seen)?;
                                (logits, Some(term))
                            }
                        };
                        let loss = logits.f_cross_entropy_loss(&target, None::<Tensor>, Reduction::Mean, -100, 0.0)?;
                        let goal = match term {
                            None => loss.shallow_clone(),
                            Some(term) => loss.f_add(&term.f_mul_scalar(lesion_weight)?)?,
                        };
                        let gradient = replica.gradient(layout, &goal.f_mul_scalar(share * scale)?, &leaves)?;
                        Step { gradient, loss, logits }
                    }
                };
                let right = logits.f_argmax(-1, false)?.f_eq_tensor(&target)?.f_sum(Kind::Float)?;
                let numbers = Tensor::f_stack(&[loss.f_detach()?.f_mul_scalar(share)?, right], 0)?;
                found = Some(match found {
                    None => (gradient, numbers),
                    Some((mut sum, all)) => {
                        sum.add(&gradient)?;
                        (sum, all.f_add(&numbers)?)
                    }
                });
            }
            Ok::<_, TrainError>(found)
        };
        let results: Vec<Result<Option<(Gradient, Tensor)>, TrainError>> = if devices == 1 {
            vec![work(&self.replicas[0], 0, volumes, lesions)]
        } else {
            std::thread::scope(|scope| {
                let work = &work;
                let handles: Vec<_> = self
                    .replicas
                    .iter_mut()
                    .enumerate()
                    .map(|(number, replica)| {
                        let (volumes, lesions) = (volumes.shallow_clone(), lesions.map(Tensor::shallow_clone));
                        scope.spawn(move || work(replica, number, &volumes, lesions.as_ref()))
                    })
                    .collect();
                let lost = || TrainError::Torch("a device's thread ended with a panic".to_owned());
                handles.into_iter().map(|h| h.join().unwrap_or_else(|_| Err(lost()))).collect()
            })
        };
        let first = self.device();
        let mut total: Option<(Gradient, Tensor)> = None;
        for result in results {
            let Some((gradient, numbers)) = result? else { continue };
            let (gradient, numbers) = (gradient.to_device(first)?, numbers.f_to_device(first)?);
            total = Some(match total {
                None => (gradient, numbers),
                Some((mut sum, all)) => {
                    sum.add(&gradient)?;
                    (sum, all.f_add(&numbers)?)
                }
            });
        }
        let Some((mut gradient, numbers)) = total else {
            return Err(TrainError::Data("a batch without scans".to_owned()).into());
        };
        // One wait for the device a step. On the processor the optimiser looks at the gradient itself.
        let norm = match (first, gradient.0.as_slice()) {
            (Device::Cpu, _) | (_, []) => Tensor::f_zeros([1], (Kind::Float, first))?,
            (_, [flat, ..]) => no_grad(|| flat.values.f_norm()?.f_view([1]))?,
        };
        let seen = Vec::<f64>::try_from(
            &Tensor::f_cat(&[numbers, norm], 0)?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?,
        )?;
        let (loss, right, norm) = (seen[0], seen[1], seen[2]);
        if !loss.is_finite() {
            return Err(Fault::Loss);
        }
        let finite = norm.is_finite();
        if precision == Precision::Fp16 {
            if !scaler.update(finite) {
                return Err(Fault::Gradient);
            }
            gradient.scale(1.0 / scale)?;
        } else if !finite {
            return Err(Fault::Gradient);
        }
        if finite {
            let (head, others) = self.replicas.split_at_mut(1);
            match self.fused.first() {
                Some(fused) => self.adam.fused_step(fused, &head[0].flat, &gradient, learning_rate)?,
                None => {
                    if !self.adam.step(&head[0].flat, &gradient, learning_rate)? {
                        return Err(Fault::Gradient);
                    }
                }
            }
            for other in others {
                no_grad(|| other.flat.f_copy_(&head[0].flat))?;
            }
        }
        Ok(StepOutcome { loss, right: right as usize, skipped: !finite })
    }

    /// Logits of `volumes` in `poses`, in evaluation, one row a volume.
    ///
    /// # Errors
    /// No room on the device.
    pub fn logits(&self, volumes: &Tensor, poses: &[Pose]) -> Result<Vec<Vec<f32>>, TrainError> {
        let replica = &self.replicas[0];
        let mut rows = Vec::with_capacity(poses.len());
        for at in (0..poses.len()).step_by(self.micro_batch) {
            let len = self.micro_batch.min(poses.len() - at);
            let part = no_grad(|| {
                let x = augment::upload(&volumes.f_narrow(0, at as i64, len as i64)?, replica.device)?;
                let x = augment::apply(&x, &poses[at..at + len])?;
                let leaves = replica.leaves(&self.layout, self.precision)?;
                replica.forward(&self.layout, &leaves, &x.f_unsqueeze(1)?, false)
            })?;
            let part = part.f_to_device(Device::Cpu)?;
            for i in 0..len {
                rows.push(Vec::<f32>::try_from(&part.f_get(i as i64)?)?);
            }
        }
        Ok(rows)
    }

    /// The weights as they are now.
    ///
    /// # Errors
    /// A device that fails.
    pub fn weights(&self) -> Result<Weights, TrainError> {
        self.replicas[0].weights(&self.layout)
    }

    /// Starts over at `weights`, the optimiser's state kept.
    fn set_weights(&mut self, weights: &Weights) -> Result<(), TrainError> {
        for replica in &mut self.replicas {
            *replica = Replica::of_weights(&self.layout, replica.device, weights)?;
        }
        Ok(())
    }

    fn restore(&mut self, loaded: &checkpoint::Loaded) -> Result<(), TrainError> {
        let first = self.device();
        for replica in &mut self.replicas {
            *replica = Replica::new(&self.layout, replica.device, &loaded.flat, &loaded.buffers)?;
        }
        self.adam = Adam {
            mean: loaded.mean.f_to_device(first)?,
            square: loaded.square.f_to_device(first)?,
            steps: loaded.state.adam_steps,
        };
        Ok(())
    }
}

fn unnamed(what: &'static str) -> TrainError {
    TrainError::NotFinite { what, epoch: 0, step: 0, batch: "the caller's".to_owned() }
}

/// Scores of `indices` of `data`, in order, with the mean cross-entropy.
fn predict(
    engine: &Engine,
    data: &dyn Dataset,
    indices: &[usize],
    pose: impl Fn(usize) -> Pose,
) -> Result<(Vec<Prediction>, f64), TrainError> {
    let plan: Vec<Vec<usize>> = indices.chunks(engine.micro_batch.max(1)).map(<[usize]>::to_vec).collect();
    let mut predictions = Vec::with_capacity(indices.len());
    let mut loss = 0.0;
    std::thread::scope(|scope| {
        let batches = loader::prefetch(scope, data, plan, engine.device(), false);
        for batch in batches {
            let batch = batch?;
            let poses: Vec<Pose> = batch.indices.iter().map(|&i| pose(i)).collect();
            let logits = engine.logits(&batch.volumes, &poses)?;
            for (&index, row) in batch.indices.iter().zip(&logits) {
                let class = data.class(index);
                if row.iter().any(|v| !v.is_finite()) {
                    return Err(TrainError::NotFinite {
                        what: "a logit of an evaluation",
                        epoch: 0,
                        step: 0,
                        batch: data.scan(index).to_owned(),
                    });
                }
                loss += cross_entropy(row, class);
                predictions.push(Prediction {
                    scan: data.scan(index).to_owned(),
                    patient: data.patient(index).to_owned(),
                    class,
                    scores: softmax(row).into_iter().map(f64::from).collect(),
                });
            }
        }
        Ok(())
    })?;
    Ok((predictions, loss / indices.len().max(1) as f64))
}

/// Scores of a model on `indices` of `data`.
///
/// # Errors
/// A model for other volumes or classes, or a device that fails.
pub fn predict_with(
    model: &Model,
    data: &dyn Dataset,
    indices: &[usize],
    device: Device,
    batch: usize,
    precision: Precision,
) -> Result<Vec<Prediction>, TrainError> {
    check_data(data, &model.manifest.architecture)?;
    let options = FitOptions {
        batch: batch.max(1),
        precision,
        channels_last: device.is_cuda(),
        // Evaluation has no fused way.
        fused: false,
        ..FitOptions::paper(model.manifest.architecture.clone())
    };
    let engine = Engine::new(&options, &[device], &model.weights)?;
    Ok(predict(&engine, data, indices, |_| Pose::IDENTITY)?.0)
}

/// `ln sum exp - logit`, in f64.
fn cross_entropy(logits: &[f32], class: usize) -> f64 {
    let max = logits.iter().fold(f64::NEG_INFINITY, |m, v| m.max(f64::from(*v)));
    let sum: f64 = logits.iter().map(|v| (f64::from(*v) - max).exp()).sum();
    max + sum.ln() - f64::from(logits[class])
}

fn check_data(data: &dyn Dataset, architecture: &Architecture) -> Result<(), TrainError> {
    if data.input_dhw() != architecture.input_dhw {
        return Err(TrainError::Data(format!(
            "the volumes are {:?}, the network takes {:?}",
            data.input_dhw(),
            architecture.input_dhw
        )));
    }
    let classes = data.class_names().len();
    if classes != architecture.num_classes {
        return Err(TrainError::Data(format!(
            "{classes} classes, the network has {} outputs",
            architecture.num_classes
        )));
    }
    Ok(())
}

/// What a run is, for resuming: its options, and a digest of which scans it learns from and is judged by.
fn identity(
    data: &dyn Dataset,
    train: &[usize],
    validation: &[usize],
    options: &FitOptions,
    run: &RunOptions<'_>,
) -> serde_json::Value {
    let mut text = format!("{:?}", data.preprocessing());
    for (name, indices) in [("train", train), ("validation", validation)] {
        text.push_str(name);
        for &i in indices {
            text.push_str(&format!("\n{} {} {}", data.scan(i), data.patient(i), data.class(i)));
        }
    }
    let initial = run.initial.map(|w| sha256_hex(&w.to_safetensors()));
    serde_json::json!({"options": options, "data": sha256_hex(text.as_bytes()), "initial": initial})
}

/// Names the first difference of two runs.
fn difference(a: &serde_json::Value, b: &serde_json::Value, path: &str) -> Option<String> {
    match (a, b) {
        (serde_json::Value::Object(x), serde_json::Value::Object(y)) => x.keys().chain(y.keys()).find_map(|k| {
            difference(x.get(k).unwrap_or_default(), y.get(k).unwrap_or_default(), &format!("{path}.{k}"))
        }),
        _ if a == b => None,
        _ => Some(format!("{} was {a} and is {b}", path.trim_start_matches('.'))),
    }
}

/// Trains, or goes on with a run that was interrupted, or returns the summary of one that is done.
///
/// # Errors
/// Options or data out of range, a folder with another run, a loss that is not finite, a full disk, a failing device,
/// or [`TrainError::Stopped`].
pub fn fit(
    data: &dyn Dataset,
    train: &[usize],
    validation: &[usize],
    options: &FitOptions,
    run: &RunOptions<'_>,
    on_event: &mut dyn FnMut(&Event<'_>),
) -> Result<Summary, TrainError> {
    options.validate()?;
    check_data(data, &options.architecture)?;
    for (name, indices) in [("training", train), ("validation", validation)] {
        if indices.is_empty() {
            return Err(TrainError::Data(format!("no {name} scans in this fold")));
        }
        if indices.iter().any(|&i| i >= data.len()) {
            return Err(TrainError::Data(format!("a {name} scan that is not in the cache")));
        }
    }
    let held: std::collections::BTreeSet<&str> = validation.iter().map(|&i| data.patient(i)).collect();
    if train.iter().any(|&i| held.contains(data.patient(i))) {
        return Err(TrainError::Data("a patient is both in training and in validation".to_owned()));
    }
    std::fs::create_dir_all(&run.out).map_err(|source| TrainError::Io {
        action: "create",
        path: run.out.clone(),
        source,
    })?;
    let what = identity(data, train, validation, options, run);
    if let Some(done) = read_summary(&run.out)? {
        return match difference(&done.run, &what, "") {
            None => Ok(done),
            Some(d) => Err(other_run(&run.out.join(SUMMARY_FILE), &d)),
        };
    }
    let start = match run.initial {
        Some(weights) => weights.clone(),
        None => initial_weights(&options.architecture, options.seed),
    };
    let mut session = Session {
        engine: Engine::new(options, &run.devices, &start)?,
        data,
        options,
        run,
        train,
        validation,
        state: State::new(what),
        best: None,
        steps_csv: String::new(),
    };
    if let (true, true, Some(reason)) = (options.fused, run.devices[0].is_cuda(), session.engine.plain_because()) {
        on_event(&Event::Plain(reason));
    }
    session.resume(on_event)?;
    session.train(on_event)?;
    session.finish()
}

/// The summary of a finished run in `out`, if there is one.
///
/// # Errors
/// A summary that cannot be read.
pub fn read_summary(out: &Path) -> Result<Option<Summary>, TrainError> {
    let path = out.join(SUMMARY_FILE);
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(TrainError::Io { action: "read", path, source }),
    };
    serde_json::from_str(&text)
        .map(Some)
        .map_err(|e| TrainError::Checkpoint { path, reason: format!("no summary of a run: {e}") })
}

fn other_run(path: &Path, difference: &str) -> TrainError {
    TrainError::Checkpoint {
        path: path.to_path_buf(),
        reason: format!("belongs to another run: {difference}; choose another folder or remove this one"),
    }
}

/// A run in progress.
struct Session<'a> {
    engine: Engine,
    data: &'a dyn Dataset,
    options: &'a FitOptions,
    run: &'a RunOptions<'a>,
    train: &'a [usize],
    validation: &'a [usize],
    state: State,
    best: Option<Weights>,
    steps_csv: String,
}

const STEPS_HEADER: &str = "step,epoch,loss,learning_rate\n";

impl Session<'_> {
    fn path(&self, name: &str) -> PathBuf {
        self.run.out.join(name)
    }

    fn resume(&mut self, on_event: &mut dyn FnMut(&Event<'_>)) -> Result<(), TrainError> {
        let path = self.path(CHECKPOINT_FILE);
        self.steps_csv = STEPS_HEADER.to_owned();
        let Some(loaded) = checkpoint::load(&path, &self.engine.layout)? else {
            return Ok(());
        };
        if let Some(d) = difference(&loaded.state.run, &self.state.run, "") {
            return Err(other_run(&path, &d));
        }
        self.engine.restore(&loaded)?;
        self.state = loaded.state;
        self.best = loaded.best;
        // Steps after the checkpoint are done again.
        if let Ok(old) = std::fs::read_to_string(self.path("steps.csv")) {
            let before = |line: &&str| {
                line.split(',').next().and_then(|n| n.parse::<u64>().ok()).is_some_and(|n| n <= self.state.global_steps)
            };
            for line in old.lines().skip(1).filter(before) {
                self.steps_csv.push_str(line);
                self.steps_csv.push('\n');
            }
        }
        on_event(&Event::Resumed(self.state.epochs, self.state.steps));
        Ok(())
    }

    fn stopping(&self) -> bool {
        self.run.stop.is_some_and(|stop| stop.load(Ordering::Relaxed))
    }

    fn save(&mut self) -> Result<(), TrainError> {
        write_atomic(&self.path("steps.csv"), self.steps_csv.as_bytes())?;
        self.state.adam_steps = self.engine.adam.steps;
        checkpoint::save(
            &self.path(CHECKPOINT_FILE),
            &self.engine.layout,
            &self.state,
            &self.engine.replicas[0],
            &self.engine.adam,
            self.best.as_ref(),
        )
    }

    fn train(&mut self, on_event: &mut dyn FnMut(&Event<'_>)) -> Result<(), TrainError> {
        let mut events = EventFile::create(&self.run.out, self.state.global_steps + 1)?;
        while self.state.epochs < self.options.epochs {
            let late = self.run.deadline.is_some_and(|deadline| Instant::now() >= deadline);
            if late && self.state.best.is_some() {
                break;
            }
            self.epoch(&mut events, on_event)?;
            let rate = self.learning_rate();
            let row = self.validate(rate)?;
            let step = self.state.global_steps;
            for (tag, value) in [
                ("loss/train", Some(row.train_loss)),
                ("loss/validation", Some(row.validation_loss)),
                ("accuracy/train", Some(row.train_accuracy)),
                ("accuracy/validation", Some(row.validation_accuracy)),
                ("auc/validation", row.validation_auc),
                ("learning_rate", Some(row.learning_rate)),
                ("images_per_s", Some(row.images_per_s)),
                ("wait_share", Some(row.wait_share)),
            ] {
                if let Some(value) = value {
                    events.scalar(tag, step, value)?;
                }
            }
            events.flush()?;
            self.state.history.push(row);
            self.state.epochs += 1;
            self.state.steps = 0;
            (self.state.loss_sum, self.state.right, self.state.seen) = (0.0, 0, 0);
            (self.state.seconds, self.state.wait_seconds) = (0.0, 0.0);
            self.save()?;
            self.write_curves()?;
            if let Some(row) = self.state.history.last() {
                on_event(&Event::Epoch(row));
            }
            if self.stopping() && self.state.epochs < self.options.epochs {
                return Err(TrainError::Stopped);
            }
        }
        Ok(())
    }

    fn learning_rate(&self) -> f64 {
        step_lr(self.options.learning_rate, self.options.lr_factor, self.options.lr_every, self.state.epochs)
    }

    /// The rest of the epoch in hand.
    fn epoch(&mut self, events: &mut EventFile, on_event: &mut dyn FnMut(&Event<'_>)) -> Result<(), TrainError> {
        let epoch = self.state.epochs;
        let order = loader::shuffled(self.train, self.options.seed, epoch);
        let all: Vec<Vec<usize>> = order.chunks(self.options.batch).map(<[usize]>::to_vec).collect();
        let steps = all.len();
        let plan = all.into_iter().skip(self.state.steps).collect();
        let rate = self.learning_rate();
        let data = self.data;
        let device = self.engine.device();
        let lesions = self.options.lesion_weight > 0.0;
        std::thread::scope(|scope| {
            let batches = loader::prefetch(scope, data, plan, device, lesions);
            loop {
                let asked = Instant::now();
                let Ok(batch) = batches.recv() else { return Ok(()) };
                let waited = asked.elapsed().as_secs_f64();
                let outcome = self.step(&batch?, rate)?;
                self.state.wait_seconds += waited;
                self.state.seconds += asked.elapsed().as_secs_f64();
                let step = self.state.steps;
                events.scalar("loss/step", self.state.global_steps, outcome.loss)?;
                on_event(&Event::Step { epoch: epoch + 1, step, steps, loss: outcome.loss });
                let due = self.run.checkpoint_steps > 0 && step.is_multiple_of(self.run.checkpoint_steps);
                if step < steps && (due || self.stopping()) {
                    self.save()?;
                    if self.stopping() {
                        return Err(TrainError::Stopped);
                    }
                }
            }
        })
    }

    fn step(&mut self, batch: &Batch, rate: f64) -> Result<StepOutcome, TrainError> {
        let epoch = self.state.epochs;
        let (augment, seed) = (&self.options.augment, self.options.seed);
        let poses: Vec<Pose> = batch.indices.iter().map(|&i| augment.pose(seed, epoch, i)).collect();
        let not_finite = |what| TrainError::NotFinite {
            what,
            epoch: epoch + 1,
            step: self.state.steps + 1,
            batch: batch.indices.iter().map(|&i| self.data.scan(i)).collect::<Vec<_>>().join(", "),
        };
        let outcome = self
            .engine
            .scaled_step(&batch.volumes, batch.lesions.as_ref(), &batch.labels, &poses, rate, &mut self.state.scaler)
            .map_err(|fault| match fault {
                Fault::Loss => not_finite("the loss"),
                Fault::Gradient => not_finite("the gradient"),
                Fault::Other(error) => error,
            })?;
        self.state.steps += 1;
        self.state.global_steps += 1;
        self.state.loss_sum += outcome.loss * batch.indices.len() as f64;
        self.state.right += outcome.right;
        self.state.seen += batch.indices.len();
        self.steps_csv.push_str(&format!("{},{},{},{rate}\n", self.state.global_steps, epoch + 1, outcome.loss));
        Ok(outcome)
    }

    fn validate(&mut self, learning_rate: f64) -> Result<EpochRow, TrainError> {
        let epoch = self.state.epochs;
        let augment = &self.options.augment;
        // Another stream than training's, so that a scan is not shown as it was trained on.
        let seed = self.options.seed ^ 0x5641_4C49_4441_5445;
        let pose = |i: usize| match augment.recipe {
            Recipe::AsReleased => augment.pose(seed, epoch, i),
            Recipe::Corrected => Pose::IDENTITY,
        };
        let (predictions, loss) = predict(&self.engine, self.data, self.validation, pose)?;
        let right = predictions.iter().filter(|p| p.predicted() == p.class).count();
        let accuracy = right as f64 / predictions.len() as f64;
        let better = self.state.best.is_none_or(|b| accuracy > b.accuracy || (accuracy == b.accuracy && loss < b.loss));
        if better {
            self.state.best = Some(Best { epoch: epoch + 1, accuracy, loss });
            self.best = Some(self.engine.weights()?);
        }
        let target = self.data.class_names().iter().position(|c| c == COVID_KEY).unwrap_or(0);
        let scores: Vec<f64> = predictions.iter().map(|p| p.scores[target]).collect();
        let truth: Vec<bool> = predictions.iter().map(|p| p.class == target).collect();
        let state = &self.state;
        let seen = state.seen.max(1) as f64;
        Ok(EpochRow {
            epoch: epoch + 1,
            learning_rate,
            train_loss: state.loss_sum / seen,
            train_accuracy: state.right as f64 / seen,
            validation_loss: loss,
            validation_accuracy: accuracy,
            validation_auc: metrics::auc(&scores, &truth),
            seconds: state.seconds,
            images_per_s: seen / state.seconds.max(1e-9),
            wait_share: state.wait_seconds / state.seconds.max(1e-9),
        })
    }

    fn write_curves(&self) -> Result<(), TrainError> {
        let mut csv = String::from(
            "epoch,learning_rate,train_loss,train_accuracy,validation_loss,validation_accuracy,validation_auc,\
             seconds,images_per_s,wait_share\n",
        );
        for r in &self.state.history {
            let auc = r.validation_auc.map_or(String::new(), |a| a.to_string());
            csv.push_str(&format!(
                "{},{},{},{},{},{},{auc},{:.3},{:.3},{:.4}\n",
                r.epoch,
                r.learning_rate,
                r.train_loss,
                r.train_accuracy,
                r.validation_loss,
                r.validation_accuracy,
                r.seconds,
                r.images_per_s,
                r.wait_share
            ));
        }
        write_atomic(&self.path("metrics.csv"), csv.as_bytes())?;
        let line = |name: &str, y: fn(&EpochRow) -> f64| plot::Line {
            name: name.to_owned(),
            points: self.state.history.iter().map(|r| [r.epoch as f64, y(r)]).collect(),
        };
        let losses = [line("TRAIN", |r| r.train_loss), line("VALIDATION", |r| r.validation_loss)];
        let shares = [
            line("TRAIN", |r| r.train_accuracy),
            line("VALIDATION", |r| r.validation_accuracy),
            line("AUC COVID-19", |r| r.validation_auc.unwrap_or(f64::NAN)),
        ];
        let mut picture = plot::Picture::new(1040, 420);
        let x = [1.0, (self.state.history.len() as f64).max(2.0)];
        let frame = plot::Frame { place: [60, 40, 430, 340], x, y: plot::y_range(&losses) };
        plot::chart(&mut picture, &frame, "LOSS", &losses);
        let frame = plot::Frame { place: [580, 40, 430, 340], x, y: [0.0, 1.0] };
        plot::chart(&mut picture, &frame, "ACCURACY", &shares);
        picture.save(&self.path("curves.png"))
    }

    fn finish(mut self) -> Result<Summary, TrainError> {
        let (Some(best), Some(weights)) = (self.state.best, self.best.take()) else {
            return Err(TrainError::Checkpoint {
                path: self.path(CHECKPOINT_FILE),
                reason: "all epochs are done, but there is no best one".to_owned(),
            });
        };
        // What is judged is what is stored.
        let weights = if self.run.half_weights {
            let bytes = half_safetensors(&weights, &self.options.architecture)?;
            Weights::from_safetensors(&bytes, &self.options.architecture)?
        } else {
            weights
        };
        self.engine.set_weights(&weights)?;
        let (predictions, _) = predict(&self.engine, self.data, self.validation, |_| Pose::IDENTITY)?;
        report::write_predictions(&self.path("validation.csv"), self.data.class_names(), &predictions)?;
        let evaluation = metrics::evaluate(&predictions, self.data.class_names(), self.options.seed)
            .map_err(|e| TrainError::Data(e.to_string()))?;
        let described = ModelText {
            id: &self.run.id,
            trained_on: &self.run.trained_on,
            intended_use: &self.run.intended_use,
            half: self.run.half_weights,
        };
        write_model(&self.path(MODEL_DIR), &weights, &self.options.architecture, self.data, &described, &evaluation)?;
        let sum = |f: fn(&EpochRow) -> f64| self.state.history.iter().map(f).sum::<f64>();
        let seconds = sum(|r| r.seconds);
        let gpu = match self.engine.device() {
            Device::Cuda(index) => super::torch::gpu_bytes_used(index),
            _ => None,
        };
        let summary = Summary {
            schema: SUMMARY_SCHEMA.to_owned(),
            run: self.state.run.clone(),
            parameters: self.options.architecture.parameter_count(),
            best,
            epochs_done: self.state.history.len(),
            validation: evaluation,
            seconds,
            images_per_s: (self.train.len() * self.state.history.len()) as f64 / seconds.max(1e-9),
            wait_share: sum(|r| r.wait_share * r.seconds) / seconds.max(1e-9),
            gpu_bytes: gpu,
        };
        let text = serde_json::to_string_pretty(&summary).map_err(|e| TrainError::Data(e.to_string()))?;
        write_atomic(&self.path(SUMMARY_FILE), text.as_bytes())?;
        Ok(summary)
    }
}

/// What a manifest says besides numbers.
pub struct ModelText<'a> {
    /// Name of the model.
    pub id: &'a str,
    /// What it was trained on.
    pub trained_on: &'a str,
    /// What it is for.
    pub intended_use: &'a str,
    /// Whether matrices are stored in half precision.
    pub half: bool,
}

/// Writes a model folder: weights, then the manifest. A folder without a manifest is no model, so an interrupted write
/// leaves none.
///
/// # Errors
/// What a model's own checks refuse, or a full disk.
pub fn write_model(
    dir: &Path,
    weights: &Weights,
    architecture: &Architecture,
    data: &dyn Dataset,
    text: &ModelText<'_>,
    evaluation: &Evaluation,
) -> Result<Manifest, TrainError> {
    let bytes = if text.half { half_safetensors(weights, architecture)? } else { weights.to_safetensors() };
    let mut manifest = Manifest::demo(text.id, architecture.clone(), &sha256_hex(&bytes));
    text.trained_on.clone_into(&mut manifest.trained_on);
    text.intended_use.clone_into(&mut manifest.intended_use);
    manifest.class_keys = data.class_names().to_vec();
    if manifest.class_keys != crate::model::CLASS_KEYS {
        manifest.class_names = manifest.class_keys.clone();
    }
    manifest.preprocessing = data.preprocessing().clone();
    manifest.source_window = data.source_window();
    manifest.scores = report::manifest_scores("validation", evaluation);
    manifest.validate()?;
    // The scanner's own checks, before anything is written.
    let model = Model::from_parts(manifest, &bytes, None)?;
    std::fs::create_dir_all(dir).map_err(|source| TrainError::Io { action: "create", path: dir.into(), source })?;
    let toml = model.manifest.to_toml()?;
    let path = dir.join(crate::model::MANIFEST_FILE);
    if std::fs::read_to_string(&path).is_ok_and(|old| old != toml) {
        std::fs::remove_file(&path).map_err(|source| TrainError::Io {
            action: "remove",
            path: path.clone(),
            source,
        })?;
    }
    write_atomic(&dir.join(&model.manifest.weights_file), &bytes)?;
    write_atomic(&path, toml.as_bytes())?;
    Ok(model.manifest)
}

/// The weights with matrices in half precision; biases and batch normalisation, which are small, stay f32.
///
/// # Errors
/// A value that half precision cannot hold.
pub fn half_safetensors(weights: &Weights, architecture: &Architecture) -> Result<Vec<u8>, TrainError> {
    use crate::model::architecture::TensorRole;
    use safetensors::tensor::{Dtype, TensorView};
    let mut parts: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    for spec in architecture.tensors() {
        let data = weights.get(&spec.name);
        if let TensorRole::Kernel { .. } = spec.role {
            let mut raw = Vec::with_capacity(2 * data.len());
            for &v in data {
                let h = half::f16::from_f32(v);
                if !h.is_finite() {
                    return Err(TrainError::Data(format!("{}: {v} is beyond half precision", spec.name)));
                }
                raw.extend(h.to_le_bytes());
            }
            parts.push((spec.name, Dtype::F16, spec.shape, raw));
        } else {
            let raw = data.iter().flat_map(|v| v.to_le_bytes()).collect();
            parts.push((spec.name, Dtype::F32, spec.shape, raw));
        }
    }
    let bad = |e: safetensors::SafeTensorError| TrainError::Data(format!("pack weights: {e}"));
    let views = parts
        .iter()
        .map(|(name, dtype, shape, raw)| Ok((name.as_str(), TensorView::new(*dtype, shape.clone(), raw)?)))
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()
        .map_err(bad)?;
    safetensors::serialize(views, None).map_err(bad)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::net::initial_weights;

    #[test]
    fn lesion_masks_draw_the_map_of_the_class_to_the_lesion() {
        // 1 x 2 x 2 cells; the lesion fills one of the quadrants, its brightness tells the class.
        const SIDE: usize = 32;
        let architecture = Architecture { base_width: 4, input_dhw: [8, SIDE, SIDE], ..Architecture::full() };
        assert_eq!(architecture.feature_shape_cdhw()[1..], [1, 2, 2]);
        let voxels = 8 * SIDE * SIDE;
        let (mut volumes, mut lesions, mut labels) = (Vec::new(), Vec::new(), Vec::new());
        for scan in 0..12 {
            let (quadrant, class) = (scan % 4, scan % 3);
            for at in 0..voxels {
                let (row, column) = (at / SIDE % SIDE, at % SIDE);
                let on = (row / (SIDE / 2), column / (SIDE / 2)) == (quadrant / 2, quadrant % 2);
                volumes.push(if on { 0.5 + 0.2 * class as f32 } else { 0.2 });
                lesions.push(if on { 1.0f32 } else { 0.0 });
            }
            labels.push(class as i64);
        }
        let shaped = |values: &[f32]| Tensor::from_slice(values).view([12, 8, SIDE as i64, SIDE as i64]);
        let (volumes, lesions) = (shaped(&volumes), shaped(&lesions));
        let term_after_training = |lesion_weight: f64, micro_batch: usize| {
            let options =
                FitOptions { lesion_weight, micro_batch, batch: 12, ..FitOptions::paper(architecture.clone()) };
            let mut engine = Engine::new(&options, &[Device::Cpu], &initial_weights(&architecture, 1)).unwrap();
            let mut scaler = super::super::optimiser::Scaler::default();
            let masks = (lesion_weight > 0.0).then_some(&lesions);
            for _ in 0..30 {
                let poses = [Pose::IDENTITY; 12];
                assert!(engine.scaled_step(&volumes, masks, &labels, &poses, 3e-3, &mut scaler).is_ok());
            }
            let replica = &engine.replicas[0];
            let leaves = replica.leaves(&engine.layout, Precision::Fp32).unwrap();
            let (x, target) = (volumes.unsqueeze(1), Tensor::from_slice(&labels));
            let both = replica.forward_with_lesions(&engine.layout, &leaves, &x, &target, &lesions).unwrap();
            both.1.double_value(&[])
        };
        // One of four cells: ln 4 when the map knows nothing.
        let (with, in_parts, without) =
            (term_after_training(1.0, 0), term_after_training(1.0, 6), term_after_training(0.0, 0));
        assert!(with < 0.5 && in_parts < 0.5, "{with} and {in_parts}");
        assert!(without > 2.0 * with, "{without} without masks, {with} with them");
    }
}
