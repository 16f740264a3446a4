//! The network as a TensorRT plan on an NVIDIA GPU.
//!
//! Input: a [`Model`] and a TensorRT library that is installed on the machine and opened at run time. Output: a
//! [`Backend`] of FP16 or FP32, whose sessions give logits, scores, the pooled vector and the last feature map.
//!
//! ```text
//! model ── strongly typed ONNX ──> Library::build ──> plan file in the model's folder   (`darnet engine build`)
//! plan file ── key and checksum proved ──> Library::load ──> Engine ──> one Execution, stream and graph a session
//! ```
//!
//! - [`library`]: the library behind safe types; `shim.cpp` calls it, `layout.h` says how.
//! - [`plan`]: the plan's file and its key.
//! - [`device`]: what of the GPU is in a key.
//!
//! Invariants: nothing of NVIDIA's is linked, and an absent library, driver, GPU or plan is
//! [`EngineError::Unavailable`]; a plan runs only where its key says; a run is one recorded graph of network and copies
//! back where the library lets itself be recorded, else call by call. Scores are the softmax that the other
//! backends use, from the logits. The network itself has four f32 outputs, see [`crate::model::onnx`].
//!
//! Deliberately absent: building at start-up unless asked ([`TensorrtOptions::build`]), because a build takes minutes;
//! stopping a run inside (it takes milliseconds); work ahead of the last slice. No GPU has run this module: see
//! `docs/tensorrt.md`.
#![allow(unsafe_code)]

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use self::device::DeviceInfo;
pub use self::library::{BuildOptions, Built, Engine, Execution, Library, OnProgress, Progress, TensorrtError};
pub use self::plan::{PlanError, PlanKey};
use super::{Backend, CancelToken, DeviceInput, EngineError, Inference, Session, check_input, softmax_into};
use crate::gpu::{DeviceBuffer, Gpu, Graph, Pinned, Stream};
use crate::model::onnx::{self, INPUT_NAME, OUTPUT_NAMES, OnnxPrecision};
use crate::model::{Architecture, Model};

pub mod device;
pub mod library;
pub mod plan;

/// Name of the backend.
pub const NAME: &str = "tensorrt";

/// Number format of a plan.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// float16, with float32 where it would lose too much.
    #[default]
    Fp16,
    /// float32 throughout; the GPU may round operands of products to TF32.
    Fp32,
}

impl Precision {
    /// `fp16` or `fp32`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Fp16 => "fp16",
            Self::Fp32 => "fp32",
        }
    }

    const fn onnx(self) -> OnnxPrecision {
        match self {
            Self::Fp16 => OnnxPrecision::F16,
            Self::Fp32 => OnnxPrecision::F32,
        }
    }
}

/// How the backend finds its library and plan.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TensorrtOptions {
    /// The library's file or folder; without it what [`library::LIBRARY_ENV`] names, then the usual names.
    pub library: Option<PathBuf>,
    /// Number format.
    pub precision: Precision,
    /// Whether a missing plan is built when the backend is prepared, which takes minutes.
    pub build: bool,
    /// Number of the GPU.
    pub device: usize,
}

/// The bytes that a plan is built from.
///
/// # Errors
/// Weights that do not fit the number format.
pub fn network(model: &Model, precision: Precision) -> Result<Vec<u8>, TensorrtError> {
    let mut bytes = Vec::new();
    onnx::export(model, precision.onnx(), &mut bytes).map_err(|error| TensorrtError::Export(error.to_string()))?;
    Ok(bytes)
}

/// A plan built and kept.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    /// The file.
    pub path: PathBuf,
    /// What it was built from and for.
    pub key: PlanKey,
    /// What the library gave.
    pub built: Built,
}

/// Builds the plan of `model` for `device` (none: for no GPU, to see whether it can be built) and keeps it in the first of
/// `folders` that can be written.
///
/// # Errors
/// No builder, a build that fails or is stopped, no folder that takes it.
pub fn build(
    model: &Model,
    precision: Precision,
    library: Library,
    device: Option<&DeviceInfo>,
    folders: &[PathBuf],
    options: &BuildOptions<'_>,
) -> Result<Stored, TensorrtError> {
    let key = PlanKey::new(model, precision, &library, device);
    let onnx = network(model, precision)?;
    let built = library.build(&onnx, options)?;
    drop(onnx);
    let path = plan::store(folders, &key, &built.plan)?;
    Ok(Stored { path, key, built })
}

/// Sizes of a plan's outputs, in f32, as [`OUTPUT_NAMES`] orders them.
fn output_sizes(architecture: &Architecture) -> [usize; 4] {
    let classes = architecture.num_classes;
    let feature = architecture.feature_shape_cdhw();
    [classes, classes, feature[0], feature.iter().product()]
}

/// That the engine takes and gives what this program sends and reads.
fn check_tensors(engine: &Engine, architecture: &Architecture) -> Result<(), TensorrtError> {
    let refuse = |reason: String| TensorrtError::Network { library: engine.library().to_string(), reason };
    let inputs = std::iter::once((INPUT_NAME, true, architecture.input_dhw.iter().product::<usize>()));
    let outputs = OUTPUT_NAMES.into_iter().zip(output_sizes(architecture)).map(|(name, len)| (name, false, len));
    let expected: Vec<_> = inputs.chain(outputs).collect();
    if engine.tensors().len() != expected.len() {
        return Err(refuse(format!("expected {} tensors, got {}", expected.len(), engine.tensors().len())));
    }
    for (name, is_input, len) in expected {
        let tensor = engine.tensors().iter().find(|t| t.name == name && t.is_input == is_input);
        let Some(tensor) = tensor else { return Err(refuse(format!("tensor {name} is missing"))) };
        // Sizes are positive and fixed: -1 makes the product fail.
        let got = tensor.shape.iter().try_fold(1usize, |n, &size| n.checked_mul(usize::try_from(size).ok()?));
        if got != Some(len) || !tensor.is_f32 {
            return Err(refuse(format!("tensor {name}: expected {len} f32, got shape {:?}", tensor.shape)));
        }
    }
    Ok(())
}

/// A plan loaded onto the GPU.
pub struct TensorrtBackend {
    engine: Engine,
    // After the engine: fields are dropped in this order.
    gpu: Arc<Gpu>,
    architecture: Architecture,
    note: String,
    plan_bytes: usize,
    /// Contexts are made one at a time.
    opening: Mutex<()>,
}

impl TensorrtBackend {
    /// Loads the plan of `model` for this machine's library, GPU and driver.
    ///
    /// Nothing is built unless [`TensorrtOptions::build`] asks for it.
    ///
    /// # Errors
    /// [`EngineError::Unavailable`], saying what is absent or does not fit: driver, GPU, library, plan.
    pub fn new(model: &Model, options: &TensorrtOptions) -> Result<Self, EngineError> {
        Ok(Self::load(model, options)?)
    }

    fn load(model: &Model, options: &TensorrtOptions) -> Result<Self, TensorrtError> {
        // The driver first: without one TensorRT's factories return what is no object.
        let gpu = Gpu::open(options.device)?;
        let info = DeviceInfo::of(&gpu);
        let library = Library::open(options.library.as_deref())?;
        let key = PlanKey::new(model, options.precision, &library, Some(&info));
        let folders = plan::folders(model);
        let (path, bytes) = match plan::find(&folders, &key) {
            Ok((path, file)) => (path, file.plan),
            Err(error) if !options.build => return Err(error.into()),
            Err(error) => {
                tracing::warn!(target: "tensorrt", reason = %error, "building the plan, which takes minutes");
                let build_options = BuildOptions::default();
                let stored = build(model, options.precision, library, Some(&info), &folders, &build_options)?;
                (stored.path, stored.built.plan)
            }
        };
        gpu.bind()?;
        let engine = library.load(&bytes)?;
        let architecture = model.manifest.architecture.clone();
        check_tensors(&engine, &architecture)?;
        let note = format!("{library}, {}, {} on {}", options.precision.as_str(), path.display(), info.name);
        tracing::info!(
            target: "tensorrt",
            library = %library,
            gpu = info.name,
            driver = info.driver,
            precision = options.precision.as_str(),
            "plan loaded"
        );
        Ok(Self { engine, gpu, architecture, note, plan_bytes: bytes.len(), opening: Mutex::new(()) })
    }

    /// Library, precision, plan and GPU, for logs.
    pub fn describe(&self) -> &str {
        &self.note
    }

    fn open_session(&self) -> Result<TensorrtSession, TensorrtError> {
        self.gpu.bind()?;
        let execution = {
            let _one = self.opening.lock().unwrap_or_else(PoisonError::into_inner);
            self.engine.execution()?
        };
        TensorrtSession::new(execution, &self.gpu, &self.architecture)
    }
}

impl Backend for TensorrtBackend {
    fn name(&self) -> &'static str {
        NAME
    }

    fn session(&self) -> Result<Box<dyn Session>, EngineError> {
        let session = self.open_session().map_err(run_error)?;
        Ok(Box::new(session))
    }

    fn weight_bytes(&self) -> usize {
        // On the GPU, not of the process: what the plan holds is mostly weights.
        0
    }

    fn mapped_bytes(&self) -> usize {
        0
    }

    fn session_bytes(&self) -> usize {
        let values: usize = self.architecture.input_dhw.iter().product::<usize>()
            + output_sizes(&self.architecture).iter().sum::<usize>();
        values * size_of::<f32>()
    }
}

impl std::fmt::Debug for TensorrtBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TensorrtBackend({}, {} bytes)", self.note, self.plan_bytes)
    }
}

fn run_error(error: TensorrtError) -> EngineError {
    EngineError::Device { backend: NAME, reason: error.to_string() }
}

/// One execution with its buffers.
struct TensorrtSession {
    // In this order they are dropped: what uses the others first.
    graph: Option<Graph>,
    execution: Execution,
    input: Pinned<f32>,
    outputs: [Pinned<f32>; 4],
    device_input: DeviceBuffer,
    device_outputs: [DeviceBuffer; 4],
    stream: Arc<Stream>,
    gpu: Arc<Gpu>,
    architecture: Architecture,
}

impl TensorrtSession {
    fn new(mut execution: Execution, gpu: &Arc<Gpu>, architecture: &Architecture) -> Result<Self, TensorrtError> {
        let [a, b, c, d] = output_sizes(architecture);
        let input_len = architecture.input_dhw.iter().product();
        let pinned = |len| Pinned::new(gpu, len);
        let buffer = |len: usize| DeviceBuffer::new(gpu, len * size_of::<f32>());
        let device_input = buffer(input_len)?;
        let device_outputs = [buffer(a)?, buffer(b)?, buffer(c)?, buffer(d)?];
        let outputs = OUTPUT_NAMES.iter().zip(&device_outputs);
        for (name, buffer) in std::iter::once((&INPUT_NAME, &device_input)).chain(outputs) {
            // SAFETY: a buffer of the tensor's size (`check_tensors`), which the session owns beyond its execution.
            unsafe { execution.set_address(name, buffer.ptr()) }?;
        }
        let mut session = Self {
            graph: None,
            execution,
            input: pinned(input_len)?,
            outputs: [pinned(a)?, pinned(b)?, pinned(c)?, pinned(d)?],
            device_input,
            device_outputs,
            stream: Arc::new(Stream::new(gpu)?),
            gpu: Arc::clone(gpu),
            architecture: architecture.clone(),
        };
        // The first run lets the library prepare itself; what it does then cannot be recorded. The input is zero.
        session.run_once(true)?;
        session.record();
        Ok(session)
    }

    /// Puts network and copies back on the stream.
    fn put(
        execution: &mut Execution,
        stream: &Stream,
        from: &[DeviceBuffer; 4],
        to: &mut [Pinned<f32>; 4],
    ) -> Result<(), TensorrtError> {
        // SAFETY: every buffer belongs to the session, which waits for the stream before it reads or frees one; the stream
        // is of the context that is current.
        unsafe {
            execution.enqueue(stream.raw().cast())?;
            for (from, to) in from.iter().zip(to) {
                let count = to.len();
                stream.download(to, from.ptr(), count)?;
            }
        }
        Ok(())
    }

    /// Records a run, if the library lets itself be recorded.
    fn record(&mut self) {
        let Self { stream, execution, outputs, device_outputs, .. } = self;
        match stream.capture(|| Self::put(execution, stream, device_outputs, outputs)) {
            Ok(graph) => self.graph = Some(graph),
            Err(error) => {
                tracing::warn!(target: "tensorrt", reason = %error, "the run cannot be recorded, it goes call by call");
            }
        }
    }

    fn start(&mut self, upload: bool) -> Result<(), TensorrtError> {
        if upload {
            // SAFETY: both belong to the session, which waits before it writes or frees one.
            unsafe { self.stream.upload(self.device_input.ptr(), &self.input, self.input.len()) }?;
        }
        match &self.graph {
            // SAFETY: recorded with this session's buffers, which live.
            Some(graph) => unsafe { self.stream.replay(graph) }?,
            None => Self::put(&mut self.execution, &self.stream, &self.device_outputs, &mut self.outputs)?,
        }
        Ok(())
    }

    /// One run; `upload` brings the input from the host first.
    fn run_once(&mut self, upload: bool) -> Result<(), TensorrtError> {
        self.gpu.bind()?;
        let started = self.start(upload);
        // Even after an error: what was put before it must be done before a buffer is touched again.
        let waited = self.stream.synchronize();
        started?;
        Ok(waited?)
    }

    fn finish(&mut self, cancel: &CancelToken, out: &mut Inference) -> Result<(), EngineError> {
        if cancel.is_cancelled() {
            return Err(EngineError::Cancelled);
        }
        let [logits, _, pooled, feature_map] = &self.outputs;
        for (to, from) in [(&mut out.logits, logits), (&mut out.pooled, pooled), (&mut out.feature_map, feature_map)] {
            to.clear();
            to.extend_from_slice(from);
        }
        out.feature_shape_cdhw = self.architecture.feature_shape_cdhw();
        // A float16 overflow inside shows in the pooled vector before it can vanish in the head.
        if out.logits.iter().chain(&out.pooled).any(|v| !v.is_finite()) {
            return Err(EngineError::NotFinite);
        }
        softmax_into(&out.logits, &mut out.scores);
        Ok(())
    }
}

impl Drop for TensorrtSession {
    fn drop(&mut self) {
        // Nothing may be under way when buffers are freed. An error means that the driver has given up on it.
        let _ = self.stream.synchronize();
    }
}

impl Session for TensorrtSession {
    fn run(&mut self, input: &[f32], cancel: &CancelToken, out: &mut Inference) -> Result<(), EngineError> {
        check_input(input, self.architecture.input_dhw)?;
        if cancel.is_cancelled() {
            return Err(EngineError::Cancelled);
        }
        self.input.copy_from_slice(input);
        self.run_once(true).map_err(run_error)?;
        self.finish(cancel, out)
    }

    fn device_input(&self) -> Option<DeviceInput> {
        let (gpu, stream) = (Arc::clone(&self.gpu), Arc::clone(&self.stream));
        Some(DeviceInput { gpu, ptr: self.device_input.ptr(), stream })
    }

    fn run_device(&mut self, cancel: &CancelToken, out: &mut Inference) -> Result<(), EngineError> {
        if cancel.is_cancelled() {
            return Err(EngineError::Cancelled);
        }
        self.run_once(false).map_err(run_error)?;
        self.finish(cancel, out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_driver_the_backend_is_a_typed_error_that_says_so() {
        if Gpu::open(0).is_ok() {
            // With a driver and without a plan it is the plan that is missing, or the library.
            let missing = TensorrtOptions { library: Some(PathBuf::from("/nothing.so")), ..TensorrtOptions::default() };
            assert!(TensorrtBackend::new(&Model::embedded().unwrap(), &missing).is_err());
            return;
        }
        let error = TensorrtBackend::new(&Model::embedded().unwrap(), &TensorrtOptions::default()).unwrap_err();
        match error {
            EngineError::Unavailable { backend, reason } => {
                assert_eq!(backend, "tensorrt");
                assert!(reason.contains("driver"), "{reason}");
            }
            other => panic!("{other}"),
        }
    }

    #[test]
    fn a_library_that_is_not_there_or_is_none_is_a_typed_error() {
        let absent = Library::open(Some(std::path::Path::new("/nothing/libnvinfer.so.11"))).unwrap_err();
        assert!(matches!(&absent, TensorrtError::Absent { reason } if reason.contains("libnvinfer")), "{absent}");
        let dir = tempfile::tempdir().unwrap();
        let text = dir.path().join("libnvinfer.so.11");
        std::fs::write(&text, "no library").unwrap();
        assert!(matches!(Library::open(Some(&text)), Err(TensorrtError::Absent { .. })));
        let folder = Library::open(Some(dir.path())).unwrap_err();
        assert!(matches!(folder, TensorrtError::Absent { .. }), "{folder}");
        // A library that every machine of the project has, and that is not TensorRT.
        let other = Library::open(Some(std::path::Path::new("libm.so.6"))).unwrap_err();
        assert!(matches!(other, TensorrtError::Symbol { .. }), "{other}");
    }

    #[test]
    fn outputs_have_the_sizes_of_the_network() {
        assert_eq!(output_sizes(&Architecture::full()), [3, 3, 512, 512 * 8 * 14 * 14]);
    }
}
