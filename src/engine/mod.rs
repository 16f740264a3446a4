//! Inference backends behind one trait.
//!
//! Input: one volume `1 x D x H x W`, f32 in [0, 1]. Output: [`Inference`]. A backend prepares a model once; each
//! worker opens a session that owns its scratch.
//!
//! - [mod@reference]: plain loops, the oracle of the tests; any shape, slow.
//! - [`cpu`]: the default; Winograd convolutions, vector kernels for each instruction set, several threads.
//! - [`tensorrt`]: a plan of NVIDIA's TensorRT, whose library is opened at run time.
//! - [`fallback`]: what `auto` chooses, and `cpu` behind a device that may fail.
//!
//! Invariants: the same backend gives the same bits for the same input, whatever the number of threads. A run either
//! fills all of its output with finite numbers or returns an error. Backends agree as follows, |d| being the largest
//! difference of two logits: cpu with reference |d| <= 1e-3 * max(1, max |logit|) and probabilities within 1e-4,
//! reference with PyTorch |d| <= 1e-4 * max(1, max |logit|).
//!
//! Deliberately absent: preprocessing, calibration, anything that knows DICOM.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};

use crate::gpu::{Gpu, Stream};
use crate::model::Model;

pub mod cpu;
pub mod cuda;
pub mod fallback;
pub mod priority;
pub mod reference;
pub mod tensorrt;

/// Most threads a backend takes; more do not help at 64 planes an input.
pub const MAX_THREADS: usize = 256;

/// What one run of the network yields.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Inference {
    /// One a class, before softmax.
    pub logits: Vec<f32>,
    /// Softmax of the logits.
    pub scores: Vec<f32>,
    /// Global average of the last feature map, one a channel.
    pub pooled: Vec<f32>,
    /// The last feature map, row-major C, D, H, W.
    pub feature_map: Vec<f32>,
    /// Shape of `feature_map`: C, D, H, W.
    pub feature_shape_cdhw: [usize; 4],
}

/// Set from another thread to stop a run between two steps of the network.
#[derive(Debug, Default)]
pub struct CancelToken(AtomicBool);

impl CancelToken {
    /// A token that is not set.
    pub const fn new() -> Self {
        Self(AtomicBool::new(false))
    }
    /// Asks the run to stop.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Release);
    }
    /// Whether the run is asked to stop.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// Which backend to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendKind {
    /// The fastest that works here.
    #[default]
    Auto,
    /// Plain loops.
    Reference,
    /// Our own, on the processor.
    Cpu,
    /// TensorRT.
    Tensorrt,
    /// cuDNN.
    Cuda,
}

impl BackendKind {
    /// Every kind.
    pub const ALL: [Self; 5] = [Self::Auto, Self::Reference, Self::Cpu, Self::Tensorrt, Self::Cuda];

    /// Its name in configuration and on the command line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Reference => "reference",
            Self::Cpu => "cpu",
            Self::Tensorrt => "tensorrt",
            Self::Cuda => "cuda",
        }
    }
}

impl fmt::Display for BackendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for BackendKind {
    type Err = EngineError;

    fn from_str(text: &str) -> Result<Self, EngineError> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.as_str() == text)
            .ok_or_else(|| EngineError::UnknownBackend(text.to_owned()))
    }
}

/// How a backend uses the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EngineOptions {
    /// Threads of the pool that all sessions of a backend share; 0 takes one a core.
    pub threads: usize,
    /// Added to the nice value of each of its threads as it starts ([`priority::lower_this_thread`]); 0 leaves it.
    pub nice: i32,
    /// Instruction set of the cpu backend; without it the best that the processor has.
    pub isa: Option<cpu::dispatch::Isa>,
    /// Keep the cpu backend's packed weights in a file beside the model, where its folder can be written.
    pub weight_cache: bool,
    /// Where the tensorrt backend finds its library and which plan it takes.
    pub tensorrt: tensorrt::TensorrtOptions,
}

impl Default for EngineOptions {
    fn default() -> Self {
        let tensorrt = tensorrt::TensorrtOptions::default();
        Self { threads: 0, nice: 0, isa: None, weight_cache: true, tensorrt }
    }
}

impl EngineOptions {
    /// The number of threads meant: `threads`, or one a core where that is 0.
    ///
    /// # Errors
    /// More than [`MAX_THREADS`].
    pub fn resolved_threads(&self) -> Result<usize, EngineError> {
        if self.threads > MAX_THREADS {
            return Err(EngineError::Threads { got: self.threads });
        }
        if self.threads > 0 {
            return Ok(self.threads);
        }
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Ok(cores.min(MAX_THREADS))
    }
}

/// Why a backend cannot be prepared, or a run gave nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// The backend is not built in, or its library, driver or device is absent.
    #[error("backend {backend} is not available: {reason}; use cpu or auto")]
    Unavailable {
        /// Which.
        backend: &'static str,
        /// Why.
        reason: String,
    },
    /// The device or its driver failed while it worked.
    #[error("backend {backend} failed: {reason}")]
    Device {
        /// Which.
        backend: &'static str,
        /// What the driver said.
        reason: String,
    },
    /// No such backend.
    #[error("unknown backend {0:?}: expected auto, reference, cpu, tensorrt or cuda")]
    UnknownBackend(String),
    /// Too many threads asked for.
    #[error("engine threads: expected at most {MAX_THREADS}, got {got}")]
    Threads {
        /// How many.
        got: usize,
    },
    /// The processor lacks an instruction set that was asked for.
    #[error("engine instruction set: this processor has no {isa}; leave isa out to take the best it has")]
    Isa {
        /// Which.
        isa: &'static str,
    },
    /// The system gave no memory.
    #[error("reserve {bytes} bytes for the engine: {reason}")]
    Memory {
        /// How many.
        bytes: usize,
        /// Why not.
        reason: String,
    },
    /// The pool could not be made.
    #[error("start {threads} engine threads: {reason}")]
    ThreadPool {
        /// How many.
        threads: usize,
        /// Why not.
        reason: String,
    },
    /// The input has another size than the model's.
    #[error("input volume: expected {expected} values for the model's input shape, got {got}")]
    InputLength {
        /// Voxels of the model's input.
        expected: usize,
        /// Values given.
        got: usize,
    },
    /// An input value is not a finite number.
    #[error("input volume: expected finite values in [0, 1], value {index} is not finite")]
    InputValue {
        /// The first such value.
        index: usize,
    },
    /// A logit is not a finite number.
    #[error("inference gave a logit that is not finite; check the input volume for values outside [0, 1]")]
    NotFinite,
    /// The run's [`CancelToken`] was set.
    #[error("inference was cancelled")]
    Cancelled,
}

/// A model prepared for running; shared by all workers.
pub trait Backend: Send + Sync {
    /// `reference`, `cpu`, `tensorrt` or `cuda`: what really runs, never `auto`.
    fn name(&self) -> &'static str;

    /// Opens a session, which allocates all of its scratch.
    ///
    /// # Errors
    /// A device without room.
    fn session(&self) -> Result<Box<dyn Session>, EngineError>;

    /// Why `auto` fell back to this backend.
    fn note(&self) -> Option<&str> {
        None
    }

    /// Threads that work on one run.
    fn threads(&self) -> usize {
        1
    }

    /// Instruction set of its kernels; empty where that says nothing.
    fn instruction_set(&self) -> &'static str {
        ""
    }

    /// Bytes of prepared weights in memory of its own, shared by all sessions.
    fn weight_bytes(&self) -> usize {
        0
    }

    /// Bytes of prepared weights in a mapped file.
    fn mapped_bytes(&self) -> usize {
        0
    }

    /// Bytes that one session allocates when it opens.
    fn session_bytes(&self) -> usize {
        0
    }
}

/// One step of a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerTiming {
    /// The layer, as the weights file names it.
    pub name: String,
    /// How it was computed.
    pub kernel: &'static str,
    /// Multiply-adds of the direct convolution.
    pub macs: u64,
    /// Seconds.
    pub seconds: f64,
}

/// How much of a run had been done by [`Session::advance`] before it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Reuse {
    /// Multiply-adds of the run that were taken over from work done ahead.
    pub reused_macs: u64,
    /// Multiply-adds of all that can be done ahead: the stem and both convolutions of the first block.
    pub ahead_macs: u64,
    /// Multiply-adds of the whole run.
    pub total_macs: u64,
}

impl Reuse {
    /// Share of what can be done ahead that was, 0 to 1; 0 for a backend that does nothing ahead.
    pub fn share(&self) -> f64 {
        if self.ahead_macs == 0 { 0.0 } else { self.reused_macs as f64 / self.ahead_macs as f64 }
    }
}

/// Where a session on a GPU takes its input from.
#[derive(Clone, Debug)]
pub struct DeviceInput {
    /// The GPU.
    pub gpu: Arc<Gpu>,
    /// Device address of D x H x W f32, row-major.
    pub ptr: u64,
    /// The stream that a run is ordered on: what fills the input is ordered there, or waited for by it.
    pub stream: Arc<Stream>,
}

/// One worker's way to run the network.
pub trait Session: Send {
    /// Runs the network on `input` (D, H, W row-major, values in [0, 1]) and fills `out`, whose buffers are reused.
    ///
    /// # Errors
    /// [`EngineError::InputLength`], [`EngineError::Cancelled`] when `cancel` is set (looked at between blocks of
    /// rows), [`EngineError::NotFinite`]. The content of `out` is then unspecified; the session stays usable.
    fn run(&mut self, input: &[f32], cancel: &CancelToken, out: &mut Inference) -> Result<(), EngineError>;

    /// Does ahead what the planes marked in `ready` (one a plane of `input`) allow: rows of the stem and of the first
    /// block's two convolutions. Work already done on planes whose bits are the same is not done again.
    ///
    /// A guess costs nothing but time: the next [`run`](Self::run) compares its input with what was used here, plane by
    /// plane and bit by bit, takes over what is the same and computes the rest, so its output has the same bits as
    /// without this call. Planes not marked are not read. The default does nothing.
    ///
    /// # Errors
    /// [`EngineError::InputLength`]; [`EngineError::Cancelled`] when `cancel` is set: what was finished is kept.
    fn advance(&mut self, input: &[f32], ready: &[bool], cancel: &CancelToken) -> Result<(), EngineError> {
        let _ = (input, ready, cancel);
        Ok(())
    }

    /// The input on the device, for whoever can fill it there; `None` for a backend that reads host memory.
    fn device_input(&self) -> Option<DeviceInput> {
        None
    }

    /// [`run`](Self::run) on what lies in [`device_input`](Self::device_input). Values are not looked at one by one: an
    /// input that is not finite ends in [`EngineError::NotFinite`].
    ///
    /// # Errors
    /// As [`run`](Self::run); [`EngineError::Unavailable`] for a backend that reads host memory.
    fn run_device(&mut self, cancel: &CancelToken, out: &mut Inference) -> Result<(), EngineError> {
        let _ = (cancel, out);
        Err(EngineError::Unavailable { backend: "device input", reason: "this backend reads host memory".to_owned() })
    }

    /// Whether [`advance`](Self::advance) does anything. Where it does not, nobody needs to gather planes for it.
    fn computes_ahead(&self) -> bool {
        false
    }

    /// The backend that made the last result, if that may be another than the session's own.
    fn ran_on(&self) -> Option<&'static str> {
        None
    }

    /// Whether a device failed and another backend stands in.
    fn is_degraded(&self) -> bool {
        false
    }

    /// What became of the device since the last call. While the session [`is_degraded`](Self::is_degraded), to be called
    /// about once a second: it is what brings the device back.
    fn news(&mut self) -> Vec<fallback::DeviceNews> {
        Vec::new()
    }

    /// Milliseconds that the last run took on the device, without copies and waits; `None` for a backend without one.
    fn device_ms(&self) -> Option<f64> {
        None
    }

    /// Times every step alone, for [`layers`](Self::layers), where a run does not do so by itself.
    ///
    /// # Errors
    /// [`EngineError::Device`].
    fn profile(&mut self) -> Result<(), EngineError> {
        Ok(())
    }

    /// Where the time of the last [`run`](Self::run) went, in order; empty for a backend that does not measure it.
    fn layers(&self) -> Vec<LayerTiming> {
        Vec::new()
    }

    /// Does `work` with each part of `values`, `len` elements long (the last may be shorter), by its number: on the session's
    /// threads where it has some, which are idle between runs, otherwise one after the other. Allocates nothing.
    ///
    /// # Panics
    /// When `len` is 0, or with the panic of `work`.
    fn share(&self, values: &mut [f32], len: usize, work: &(dyn Fn(usize, &mut [f32]) + Sync)) {
        share_alone(values, len, work);
    }

    /// How much the last [`run`](Self::run) took over from [`advance`](Self::advance).
    fn reuse(&self) -> Reuse {
        Reuse::default()
    }
}

/// One part after the other, for [`Session::share`].
fn share_alone(values: &mut [f32], len: usize, work: &(dyn Fn(usize, &mut [f32]) + Sync)) {
    for (i, part) in values.chunks_mut(len).enumerate() {
        work(i, part);
    }
}

/// Prepares `model` for `kind`: exactly that backend, or for `auto` the fastest that works here ([`fallback::ORDER`]),
/// with `cpu` behind it if it is a device's.
///
/// # Errors
/// [`EngineError::Unavailable`] for a backend this build or machine lacks (never for `auto`), and options out of range.
pub fn prepare(kind: BackendKind, model: &Model, options: &EngineOptions) -> Result<Box<dyn Backend>, EngineError> {
    match kind {
        BackendKind::Auto => fallback::auto(model, options),
        _ => open(kind, model, options),
    }
}

/// As [`prepare`], for a service that must not end with a device: `cpu` stands behind a device's backend also when it was
/// asked for by name.
///
/// # Errors
/// As [`prepare`].
pub fn prepare_service(
    kind: BackendKind,
    model: &Model,
    options: &EngineOptions,
) -> Result<Box<dyn Backend>, EngineError> {
    match kind {
        BackendKind::Cuda | BackendKind::Tensorrt => {
            fallback::guarded(kind, open(kind, model, options)?, model, options, None)
        }
        _ => prepare(kind, model, options),
    }
}

/// Exactly the backend `kind`; `auto` is `cpu` here.
fn open(kind: BackendKind, model: &Model, options: &EngineOptions) -> Result<Box<dyn Backend>, EngineError> {
    match kind {
        BackendKind::Reference => Ok(Box::new(reference::ReferenceBackend::new(model))),
        BackendKind::Cpu | BackendKind::Auto => Ok(Box::new(cpu::CpuBackend::new(model, options, None)?)),
        BackendKind::Tensorrt => Ok(Box::new(tensorrt::TensorrtBackend::new(model, &options.tensorrt)?)),
        BackendKind::Cuda => Ok(Box::new(cuda::CudaBackend::new(model, options)?)),
    }
}

/// Values looked at together for one that is not finite.
const FINITE_CHUNK: usize = 4096;

/// What every session checks before it runs.
fn check_input(input: &[f32], input_dhw: [usize; 3]) -> Result<(), EngineError> {
    let expected = input_dhw.iter().product();
    if input.len() != expected {
        return Err(EngineError::InputLength { expected, got: input.len() });
    }
    // Whole chunks first, without leaving early: that is done in vectors.
    for (chunk, values) in input.chunks(FINITE_CHUNK).enumerate() {
        if values.iter().fold(true, |all, v| all & v.is_finite()) {
            continue;
        }
        if let Some(index) = values.iter().position(|v| !v.is_finite()) {
            return Err(EngineError::InputValue { index: chunk * FINITE_CHUNK + index });
        }
    }
    Ok(())
}

/// Probabilities of `logits`: `exp(x - max) / sum`, in f64, rounded once.
pub fn softmax(logits: &[f32]) -> Vec<f32> {
    let mut scores = Vec::new();
    softmax_into(logits, &mut scores);
    scores
}

/// [`softmax`] into a buffer that is reused.
pub fn softmax_into(logits: &[f32], scores: &mut Vec<f32>) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exponential = |x: &f32| (f64::from(*x) - f64::from(max)).exp();
    let sum: f64 = logits.iter().map(exponential).sum();
    scores.clear();
    scores.extend(logits.iter().map(|x| (exponential(x) / sum) as f32));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn softmax_is_a_distribution_and_survives_large_logits() {
        assert_eq!(softmax(&[0.0, 0.0]), [0.5, 0.5]);
        let scores = softmax(&[1e30, -1e30, 0.0]);
        assert_eq!(scores, [1.0, 0.0, 0.0]);
        let scores = softmax(&[1.0, 2.0, 3.0]);
        assert!((scores.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        assert!((scores[2] - 0.665_240_94).abs() < 1e-6);
    }

    #[test]
    fn backend_names_survive_text_and_toml() {
        for kind in BackendKind::ALL {
            assert_eq!(kind.as_str().parse::<BackendKind>().unwrap(), kind);
            let json = serde_json::to_string(&kind).unwrap();
            assert_eq!(json, format!("\"{kind}\""));
        }
        assert!("gpu".parse::<BackendKind>().is_err());
    }

    #[test]
    fn a_gpu_backend_is_a_typed_error_and_auto_says_why_it_is_not_used() {
        let model = Model::embedded().unwrap();
        let options = EngineOptions { threads: 1, ..EngineOptions::default() };
        for kind in [BackendKind::Tensorrt, BackendKind::Cuda] {
            let error = prepare(kind, &model, &options).err().unwrap();
            assert!(matches!(error, EngineError::Unavailable { .. }), "{error}");
        }
        let auto = prepare(BackendKind::Auto, &model, &options).unwrap();
        assert_eq!(auto.name(), "cpu");
        let note = auto.note().unwrap();
        assert!(note.starts_with("using cpu; tensorrt not: ") && note.contains("; cuda not: "), "{note}");
        let cpu = prepare(BackendKind::Cpu, &model, &options).unwrap();
        assert_eq!(cpu.note(), None);
    }

    #[test]
    fn too_many_threads_are_refused() {
        let options = EngineOptions { threads: 100_000, ..EngineOptions::default() };
        assert!(options.resolved_threads().is_err());
        assert!(EngineOptions::default().resolved_threads().unwrap() >= 1);
    }
}
