//! TensorRT's library behind safe types: opening it, building a plan, and running one.
//!
//! Input: paths, ONNX bytes, plan bytes, device addresses. Output: [`Library`], [`Built`], [`Engine`], [`Execution`],
//! or a [`TensorrtError`]. What calls NVIDIA's code is `shim.cpp`; what it knows of the binary interface is `layout.h`.
//!
//! Invariants: a library once opened stays open, so its objects cannot outlive it. An object is released once, and
//! nothing made from another outlives that one (`Arc`). The library's log goes to `tracing` under `tensorrt`; its last
//! errors are kept for the message of a call that fails.
//!
//! Deliberately absent: memory and streams of the GPU ([`crate::gpu`]), files ([`super::plan`]).
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::ffi::{CStr, CString, c_char, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::ptr::{NonNull, null, null_mut};
use std::sync::{Arc, Mutex, PoisonError};

use super::plan::PlanError;
use crate::engine::EngineError;

/// The environment variable that names the library, before the usual names are tried.
pub const LIBRARY_ENV: &str = "DARNET_TENSORRT";

/// A library's name and that of its ONNX parser, in the order they are tried: the full TensorRT before the one for RTX,
/// which lacks compute capability 9.0.
pub const CANDIDATES: [(&str, &str); 3] = [
    ("libnvinfer.so.11", "libnvonnxparser.so.11"),
    ("libnvinfer.so.10", "libnvonnxparser.so.10"),
    ("libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1"),
];

/// Libraries open at once: each path once, for the life of the process. A process needs one; tests open ten.
const MAX_LIBRARIES: usize = 16;
/// Room for a message of the shim.
const MESSAGE_BYTES: usize = 1024;
/// Errors of a library's log kept for the message of a failing call.
const KEPT_ERRORS: usize = 8;
/// Tensors an engine may have: the network has one input and four outputs.
const MAX_TENSORS: i32 = 64;

/// Why TensorRT cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TensorrtError {
    /// None of the libraries could be opened.
    #[error("open the TensorRT library: {reason}; install TensorRT or set {LIBRARY_ENV} to its file")]
    Absent {
        /// What was tried and what the loader said.
        reason: String,
    },
    /// The file is no TensorRT library.
    #[error("open {library}: expected a TensorRT library: {reason}")]
    Symbol {
        /// The file.
        library: String,
        /// What is missing.
        reason: String,
    },
    /// Its interface is not known.
    #[error("open {library}: expected TensorRT 10 or 11, or TensorRT for RTX 1.3 to 1.7, got {version}")]
    Version {
        /// The file.
        library: String,
        /// Its version.
        version: String,
    },
    /// No usable driver or GPU.
    #[error("{library}: no usable NVIDIA driver or GPU: {reason}")]
    Driver {
        /// The library.
        library: String,
        /// What it said.
        reason: String,
    },
    /// The library cannot build.
    #[error("{library} cannot build a plan: {reason}")]
    NoBuilder {
        /// The library.
        library: String,
        /// Why.
        reason: String,
    },
    /// The ONNX model was not understood.
    #[error("{library}: parse the ONNX model: {reason}")]
    Parse {
        /// The library.
        library: String,
        /// The parser's error.
        reason: String,
    },
    /// The builder gave no plan.
    #[error("{library}: build the plan: {reason}")]
    Build {
        /// The library.
        library: String,
        /// What it said.
        reason: String,
    },
    /// The build was stopped from outside.
    #[error("{library}: the build was stopped")]
    Stopped {
        /// The library.
        library: String,
    },
    /// The library does not accept the plan's bytes, or the plan is of another network.
    #[error("{library}: load the plan: {reason}; build it anew with `darnet engine build`")]
    Engine {
        /// The library.
        library: String,
        /// What it said.
        reason: String,
    },
    /// A call on the GPU failed.
    #[error("{library}: {action}: {reason}")]
    Run {
        /// The library.
        library: String,
        /// Which.
        action: &'static str,
        /// What it said.
        reason: String,
    },
    /// The plan's file.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The GPU.
    #[error(transparent)]
    Gpu(#[from] crate::gpu::GpuError),
    /// The model could not be exported for the builder.
    #[error("write the model for the builder: {0}")]
    Export(String),
    /// The model's network fits no plan: its outputs are not what this program reads.
    #[error("{library}: the plan is of another network: {reason}")]
    Network {
        /// The library.
        library: String,
        /// What differs.
        reason: String,
    },
}

impl From<TensorrtError> for EngineError {
    fn from(error: TensorrtError) -> Self {
        Self::Unavailable { backend: super::NAME, reason: error.to_string() }
    }
}

/// The shim's status codes.
mod status {
    pub const OK: i32 = 0;
    pub const ABSENT: i32 = 1;
    pub const SYMBOL: i32 = 2;
    pub const VERSION: i32 = 3;
    pub const DRIVER: i32 = 4;
    pub const NO_BUILDER: i32 = 5;
    pub const PARSE: i32 = 6;
}

#[repr(C)]
struct RawLibrary {
    _private: [u8; 0],
}

/// `nvinfer1::Dims64::MAX_DIMS`.
const MAX_DIMS: usize = 8;
const TYPE_FLOAT: i32 = 0;
const MODE_INPUT: i32 = 1;
const MODE_OUTPUT: i32 = 2;

#[repr(C)]
struct RawTensor {
    name: *const c_char,
    mode: i32,
    kind: i32,
    rank: i32,
    size: [i64; MAX_DIMS],
}

type LogCallback = unsafe extern "C" fn(*mut c_void, i32, *const c_char);
type ProgressCallback = unsafe extern "C" fn(*mut c_void, i32, *const c_char, *const c_char, i32) -> i32;

#[repr(C)]
struct RawBuildOptions {
    workspace_bytes: u64,
    cache: *const c_void,
    cache_bytes: usize,
    keep_cache: i32,
    progress: Option<ProgressCallback>,
    user: *mut c_void,
}

#[repr(C)]
struct RawBuilt {
    plan: *mut c_void,
    plan_data: *const c_void,
    plan_bytes: usize,
    cache: *mut c_void,
    cache_data: *const c_void,
    cache_bytes: usize,
    layers: i32,
}

unsafe extern "C" {
    fn darnet_trt_open(
        path: *const c_char,
        parser: *const c_char,
        log: LogCallback,
        user: *mut c_void,
        out: *mut *mut RawLibrary,
        version_parts: *mut i32,
        message: *mut c_char,
        room: usize,
    ) -> i32;
    fn darnet_trt_can_build(library: *const RawLibrary) -> i32;
    fn darnet_trt_layout(library: *const RawLibrary) -> *const c_char;
    fn darnet_trt_release(object: *mut c_void);
    fn darnet_trt_build(
        library: *mut RawLibrary,
        onnx: *const c_void,
        onnx_bytes: usize,
        options: *const RawBuildOptions,
        out: *mut RawBuilt,
        message: *mut c_char,
        room: usize,
    ) -> i32;
    fn darnet_trt_runtime(library: *mut RawLibrary, out: *mut *mut c_void, message: *mut c_char, room: usize) -> i32;
    fn darnet_trt_engine(
        library: *const RawLibrary,
        runtime: *mut c_void,
        plan: *const c_void,
        bytes: usize,
        out: *mut *mut c_void,
        message: *mut c_char,
        room: usize,
    ) -> i32;
    fn darnet_trt_tensor_count(library: *const RawLibrary, engine: *mut c_void) -> i32;
    fn darnet_trt_tensor(library: *const RawLibrary, engine: *mut c_void, index: i32, out: *mut RawTensor) -> i32;
    fn darnet_trt_context(
        library: *const RawLibrary,
        engine: *mut c_void,
        out: *mut *mut c_void,
        message: *mut c_char,
        room: usize,
    ) -> i32;
    fn darnet_trt_set_address(
        library: *const RawLibrary,
        context: *mut c_void,
        tensor: *const c_char,
        address: *mut c_void,
    ) -> i32;
    fn darnet_trt_enqueue(library: *const RawLibrary, context: *mut c_void, stream: *mut c_void) -> i32;
}

/// Where the shim writes what went wrong.
struct MessageRoom([u8; MESSAGE_BYTES]);

impl MessageRoom {
    const fn new() -> Self {
        Self([0; MESSAGE_BYTES])
    }

    fn as_mut_ptr(&mut self) -> *mut c_char {
        self.0.as_mut_ptr().cast()
    }

    fn text(&self) -> String {
        let end = self.0.iter().position(|b| *b == 0).unwrap_or(self.0.len());
        String::from_utf8_lossy(&self.0[..end]).into_owned()
    }
}

/// The errors a library last logged, for the message of the call that caused them.
#[derive(Default)]
struct Log {
    errors: Mutex<VecDeque<String>>,
}

impl Log {
    fn take(&self) -> Vec<String> {
        self.errors.lock().unwrap_or_else(PoisonError::into_inner).drain(..).collect()
    }
}

/// # Safety
/// `user` is a [`Log`] that lives, `text` a C string or null.
unsafe extern "C" fn on_log(user: *mut c_void, severity: i32, text: *const c_char) {
    if user.is_null() || text.is_null() {
        return;
    }
    // SAFETY: by the function's contract: `Library::open` gives a `Log` that is never freed.
    let (log, text) = unsafe { (&*user.cast::<Log>(), CStr::from_ptr(text)) };
    let text = text.to_string_lossy();
    match severity {
        0 | 1 => {
            let mut errors = log.errors.lock().unwrap_or_else(PoisonError::into_inner);
            if errors.len() == KEPT_ERRORS {
                errors.pop_front();
            }
            errors.push_back(text.clone().into_owned());
            tracing::error!(target: "tensorrt", message = %text);
        }
        2 => tracing::warn!(target: "tensorrt", message = %text),
        3 => tracing::debug!(target: "tensorrt", message = %text),
        _ => tracing::trace!(target: "tensorrt", message = %text),
    }
}

/// What a builder says of its work. A step that is answered `false` stops the build.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// A phase begins.
    Begin {
        /// Its name.
        phase: String,
        /// The phase it is a part of.
        parent: Option<String>,
        /// Steps it has.
        steps: u32,
    },
    /// A step is done.
    Step {
        /// Its phase.
        phase: String,
        /// Its number, from 0.
        step: u32,
    },
    /// A phase has ended.
    End {
        /// Its name.
        phase: String,
    },
}

/// Hears of a build's progress, from any thread; `false` stops it.
pub type OnProgress<'a> = &'a (dyn Fn(Progress) -> bool + Sync);

/// # Safety
/// `user` points to an [`OnProgress`] that lives as long as the build; texts are C strings or null.
unsafe extern "C" fn on_progress(
    user: *mut c_void,
    kind: i32,
    phase: *const c_char,
    parent: *const c_char,
    value: i32,
) -> i32 {
    let text = |p: *const c_char| {
        // SAFETY: a C string or null, by the function's contract.
        (!p.is_null()).then(|| unsafe { CStr::from_ptr(p) }.to_string_lossy().into_owned())
    };
    let number = u32::try_from(value).unwrap_or(0);
    let phase_name = text(phase).unwrap_or_default();
    let progress = match kind {
        0 => Progress::Begin { phase: phase_name, parent: text(parent), steps: number },
        1 => Progress::Step { phase: phase_name, step: number },
        _ => Progress::End { phase: phase_name },
    };
    // SAFETY: by the function's contract.
    let hear = unsafe { *user.cast::<OnProgress<'_>>() };
    // A panic must not cross C++; it stops the build.
    let goes_on = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| hear(progress))).unwrap_or(false);
    i32::from(goes_on)
}

/// An open library.
#[derive(Clone, Copy)]
pub struct Library(&'static Opened);

struct Opened {
    path: PathBuf,
    raw: NonNull<RawLibrary>,
    log: &'static Log,
    parts: [i32; 4],
    parser_note: Option<String>,
}

// SAFETY: the shim's library is written once, before it is shared; TensorRT's factories may be called from any thread,
// and its log callback takes a lock.
unsafe impl Send for Opened {}
// SAFETY: as above.
unsafe impl Sync for Opened {}

static OPEN: Mutex<Vec<&'static Opened>> = Mutex::new(Vec::new());

impl std::fmt::Debug for Library {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

impl std::fmt::Display for Library {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.product(), self.version())
    }
}

impl Library {
    /// Opens `path`, or without one what [`LIBRARY_ENV`] names, or the first of [`CANDIDATES`] that the loader finds; of a
    /// folder the first of them that it holds. The ONNX parser is looked for beside it, then by name; without one nothing can be built.
    ///
    /// # Errors
    /// [`TensorrtError::Absent`], [`TensorrtError::Symbol`], [`TensorrtError::Version`].
    pub fn open(path: Option<&Path>) -> Result<Self, TensorrtError> {
        let from_env = std::env::var_os(LIBRARY_ENV).filter(|v| !v.is_empty()).map(PathBuf::from);
        let folder = match path.map(Path::to_path_buf).or(from_env) {
            Some(path) if path.is_dir() => path,
            Some(path) => return Self::open_file(&path),
            None => PathBuf::new(),
        };
        let mut reasons = Vec::new();
        for (name, _) in CANDIDATES {
            match Self::open_file(&folder.join(name)) {
                Err(TensorrtError::Absent { reason }) => reasons.push(reason),
                other => return other,
            }
        }
        Err(TensorrtError::Absent { reason: reasons.join("; ") })
    }

    fn open_file(path: &Path) -> Result<Self, TensorrtError> {
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(opened) = open.iter().find(|o| o.path == path) {
            return Ok(Self(opened));
        }
        let name = path.display().to_string();
        if open.len() == MAX_LIBRARIES {
            return Err(TensorrtError::Absent { reason: format!("{name}: {MAX_LIBRARIES} libraries are open") });
        }
        let c_path = CString::new(path.as_os_str().as_bytes())
            .map_err(|_| TensorrtError::Absent { reason: format!("{name}: not a file name") })?;
        let parser = parser_of(path);
        let c_parser = parser.as_ref().and_then(|p| CString::new(p.as_os_str().as_bytes()).ok());
        let mut message = MessageRoom::new();
        let mut raw = null_mut();
        let mut parts = [0; 4];
        // Never freed: the library keeps it.
        let log: &'static Log = Box::leak(Box::default());
        // SAFETY: C strings that live through the call, a `Log` that lives for ever with the callback that takes it, and
        // places for one pointer, four numbers and `MESSAGE_BYTES` bytes. Loading a library runs its initialisers: that
        // of the library which the administrator installed or named.
        let code = unsafe {
            darnet_trt_open(
                c_path.as_ptr(),
                c_parser.as_ref().map_or(null(), |p| p.as_ptr()),
                on_log,
                std::ptr::from_ref(log).cast_mut().cast(),
                &raw mut raw,
                parts.as_mut_ptr(),
                message.as_mut_ptr(),
                MESSAGE_BYTES,
            )
        };
        let reason = message.text();
        match (code, NonNull::new(raw)) {
            (status::OK, Some(raw)) => {
                let parser_note = (!reason.is_empty()).then_some(reason);
                let opened = Box::leak(Box::new(Opened { path: path.to_path_buf(), raw, log, parts, parser_note }));
                open.push(opened);
                let library = Self(opened);
                tracing::debug!(target: "tensorrt", library = %library, layout = library.layout(), "library opened");
                Ok(library)
            }
            (status::ABSENT, _) => Err(TensorrtError::Absent { reason }),
            (status::SYMBOL, _) => Err(TensorrtError::Symbol { library: name, reason }),
            (status::VERSION, _) => {
                let version = version_text(parts);
                Err(TensorrtError::Version { library: name, version })
            }
            _ => Err(TensorrtError::Absent { reason }),
        }
    }

    /// `TensorRT` or `TensorRT for RTX`, which has plans and numbers of its own.
    pub fn product(&self) -> &'static str {
        if self.0.parts[0] < 8 { "TensorRT for RTX" } else { "TensorRT" }
    }

    /// Major, minor, patch and build number.
    pub fn version(&self) -> String {
        version_text(self.0.parts)
    }

    /// The file, as it was opened.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Which of the known binary interfaces it is called by.
    pub fn layout(&self) -> &'static str {
        // SAFETY: an open library, whose layout's name is a constant of the shim.
        unsafe { CStr::from_ptr(darnet_trt_layout(self.0.raw.as_ptr())) }.to_str().unwrap_or_default()
    }

    /// Whether it has a builder and its parser was found.
    pub fn can_build(&self) -> bool {
        // SAFETY: an open library.
        unsafe { darnet_trt_can_build(self.0.raw.as_ptr()) != 0 }
    }

    /// What a failed call says: the shim's message and what the library logged during it.
    fn reason(&self, message: &MessageRoom) -> String {
        let mut parts = vec![message.text()];
        parts.extend(self.0.log.take());
        parts.retain(|p| !p.is_empty());
        parts.join("; ")
    }

    /// Forgets errors of earlier calls, so that the next message has its own alone.
    fn begin(&self) {
        self.0.log.take();
    }

    fn error(&self, code: i32, reason: String) -> TensorrtError {
        let library = self.to_string();
        match code {
            status::DRIVER => TensorrtError::Driver { library, reason },
            status::NO_BUILDER => TensorrtError::NoBuilder { library, reason },
            status::PARSE => TensorrtError::Parse { library, reason },
            _ => TensorrtError::Build { library, reason },
        }
    }

    /// Builds a plan from a strongly typed ONNX model.
    ///
    /// # Errors
    /// No builder, no driver, a model it does not take, a build that fails or is stopped.
    pub fn build(&self, onnx: &[u8], options: &BuildOptions<'_>) -> Result<Built, TensorrtError> {
        self.begin();
        let stopped = std::sync::atomic::AtomicBool::new(false);
        let hear = |progress: Progress| {
            let goes_on = options.progress.is_none_or(|hear| hear(progress));
            if !goes_on {
                stopped.store(true, std::sync::atomic::Ordering::Relaxed);
            }
            goes_on
        };
        let hear: OnProgress<'_> = &hear;
        let (cache, cache_bytes) = options.timing_cache.map_or((null(), 0), |c| (c.as_ptr().cast(), c.len()));
        let raw_options = RawBuildOptions {
            workspace_bytes: options.workspace_bytes,
            cache,
            cache_bytes,
            keep_cache: i32::from(options.timing_cache.is_some()),
            progress: Some(on_progress),
            user: std::ptr::from_ref(&hear).cast_mut().cast(),
        };
        let mut built = RawBuilt {
            plan: null_mut(),
            plan_data: null(),
            plan_bytes: 0,
            cache: null_mut(),
            cache_data: null(),
            cache_bytes: 0,
            layers: 0,
        };
        let mut message = MessageRoom::new();
        // SAFETY: an open library; `onnx`, the options and what they point to live through the call, in which alone the
        // callback is used; `user` is the `OnProgress` that `on_progress` expects; a place for the result and the message.
        let code = unsafe {
            darnet_trt_build(
                self.0.raw.as_ptr(),
                onnx.as_ptr().cast(),
                onnx.len(),
                &raw const raw_options,
                &raw mut built,
                message.as_mut_ptr(),
                MESSAGE_BYTES,
            )
        };
        // What the library owns is copied and released at once.
        let copy = |data: *const c_void, bytes: usize| {
            if data.is_null() || bytes == 0 {
                return Vec::new();
            }
            // SAFETY: the library's buffer of `bytes` bytes, alive until released below.
            unsafe { std::slice::from_raw_parts(data.cast::<u8>(), bytes) }.to_vec()
        };
        let (plan, cache) = (copy(built.plan_data, built.plan_bytes), copy(built.cache_data, built.cache_bytes));
        for object in [built.plan, built.cache] {
            // SAFETY: null, or an object that the build made and that nothing else has.
            unsafe { darnet_trt_release(object) };
        }
        if stopped.load(std::sync::atomic::Ordering::Relaxed) {
            return Err(TensorrtError::Stopped { library: self.to_string() });
        }
        if code != status::OK || plan.is_empty() {
            let mut reason = self.reason(&message);
            if code == status::NO_BUILDER
                && let Some(note) = &self.0.parser_note
            {
                reason = format!("{reason} ({note})");
            }
            return Err(self.error(code, reason));
        }
        let layers = u32::try_from(built.layers).unwrap_or(0);
        Ok(Built { plan, timing_cache: (!cache.is_empty()).then_some(cache), layers })
    }

    /// Loads a plan. The driver must have been asked first ([`crate::gpu::Gpu::open`]).
    ///
    /// # Errors
    /// [`TensorrtError::Driver`] where no runtime can be made, [`TensorrtError::Engine`] for a plan it does not take.
    pub fn load(&self, plan: &[u8]) -> Result<Engine, TensorrtError> {
        self.begin();
        let mut message = MessageRoom::new();
        let mut raw = null_mut();
        // SAFETY: an open library, a place for a pointer and the message.
        let code =
            unsafe { darnet_trt_runtime(self.0.raw.as_ptr(), &raw mut raw, message.as_mut_ptr(), MESSAGE_BYTES) };
        if code != status::OK {
            let reason = self.reason(&message);
            return Err(self.error(code, reason));
        }
        let runtime = Object(raw);
        let mut raw = null_mut();
        // SAFETY: an open library, the runtime made above, `plan` is copied by the call.
        let code = unsafe {
            darnet_trt_engine(
                self.0.raw.as_ptr(),
                runtime.0,
                plan.as_ptr().cast(),
                plan.len(),
                &raw mut raw,
                message.as_mut_ptr(),
                MESSAGE_BYTES,
            )
        };
        if code != status::OK {
            return Err(TensorrtError::Engine { library: self.to_string(), reason: self.reason(&message) });
        }
        let engine = Arc::new(EngineObjects { library: *self, engine: Object(raw), _runtime: runtime });
        let tensors = engine.tensors()?;
        Ok(Engine { objects: engine, tensors })
    }
}

fn version_text(parts: [i32; 4]) -> String {
    let [major, minor, patch, build] = parts;
    format!("{major}.{minor}.{patch}.{build}")
}

/// The parser of the library at `path`: in the same folder where there is a folder, else by its name.
fn parser_of(path: &Path) -> Option<PathBuf> {
    let file = path.file_name()?.to_string_lossy();
    let named = CANDIDATES.iter().find(|(library, _)| file.starts_with(library)).map(|(_, parser)| *parser)?;
    let beside = path.with_file_name(named);
    Some(if beside.is_file() { beside } else { PathBuf::from(named) })
}

/// How to build.
#[derive(Clone, Copy, Default)]
pub struct BuildOptions<'a> {
    /// Scratch that kernels may take; 0 leaves the library's default.
    pub workspace_bytes: u64,
    /// A timing cache of an earlier build, or an empty slice to begin one; without it none is kept.
    pub timing_cache: Option<&'a [u8]>,
    /// Hears of the progress.
    pub progress: Option<OnProgress<'a>>,
}

/// What a build yields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Built {
    /// The plan, opaque to all but its library.
    pub plan: Vec<u8>,
    /// The timing cache, if one was asked for and the library keeps one.
    pub timing_cache: Option<Vec<u8>>,
    /// Layers of the network as it was parsed.
    pub layers: u32,
}

/// An object of TensorRT's.
struct Object(*mut c_void);

impl Drop for Object {
    fn drop(&mut self) {
        // SAFETY: made by a factory, released here alone.
        unsafe { darnet_trt_release(self.0) };
    }
}

// SAFETY: TensorRT's runtimes, engines and contexts may be used from any thread, one at a time; engines from several.
unsafe impl Send for Object {}

struct EngineObjects {
    library: Library,
    // Before the runtime that made it: fields are dropped in this order.
    engine: Object,
    _runtime: Object,
}

// SAFETY: what is called on a shared engine (contexts, names, shapes) is what TensorRT lets several threads call.
unsafe impl Sync for EngineObjects {}

/// A tensor at the border of an engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Whether it is an input.
    pub is_input: bool,
    /// Whether its values are f32.
    pub is_f32: bool,
    /// Its shape; a size that is not fixed is -1.
    pub shape: Vec<i64>,
}

impl EngineObjects {
    fn tensors(&self) -> Result<Vec<TensorInfo>, TensorrtError> {
        let raw = self.library.0.raw.as_ptr();
        let refuse =
            |reason: &str| TensorrtError::Network { library: self.library.to_string(), reason: reason.to_owned() };
        // SAFETY: an open library and an engine it made.
        let count = unsafe { darnet_trt_tensor_count(raw, self.engine.0) };
        if !(0..=MAX_TENSORS).contains(&count) {
            return Err(refuse("it has no plausible number of tensors"));
        }
        let mut tensors = Vec::new();
        for index in 0..count {
            let mut tensor = RawTensor { name: null(), mode: 0, kind: -1, rank: 0, size: [0; MAX_DIMS] };
            // SAFETY: as above; `index` is below the count.
            let code = unsafe { darnet_trt_tensor(raw, self.engine.0, index, &raw mut tensor) };
            let rank = usize::try_from(tensor.rank).unwrap_or(usize::MAX);
            if code != status::OK || tensor.name.is_null() || rank > MAX_DIMS {
                return Err(refuse("a tensor without name or shape"));
            }
            // SAFETY: a C string of the engine, which lives.
            let name = unsafe { CStr::from_ptr(tensor.name) }.to_string_lossy().into_owned();
            if ![MODE_INPUT, MODE_OUTPUT].contains(&tensor.mode) {
                return Err(refuse("a tensor that is neither input nor output"));
            }
            tensors.push(TensorInfo {
                name,
                is_input: tensor.mode == MODE_INPUT,
                is_f32: tensor.kind == TYPE_FLOAT,
                shape: tensor.size[..rank].to_vec(),
            });
        }
        Ok(tensors)
    }
}

/// A loaded plan; shared by all sessions.
pub struct Engine {
    objects: Arc<EngineObjects>,
    tensors: Vec<TensorInfo>,
}

impl Engine {
    /// Its inputs and outputs.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The library it belongs to.
    pub fn library(&self) -> Library {
        self.objects.library
    }

    /// Opens an execution, which takes its scratch on the GPU.
    ///
    /// # Errors
    /// No room.
    pub fn execution(&self) -> Result<Execution, TensorrtError> {
        let library = self.objects.library;
        library.begin();
        let mut message = MessageRoom::new();
        let mut raw = null_mut();
        // SAFETY: an open library, an engine that lives, places for a pointer and the message.
        let code = unsafe {
            darnet_trt_context(
                library.0.raw.as_ptr(),
                self.objects.engine.0,
                &raw mut raw,
                message.as_mut_ptr(),
                MESSAGE_BYTES,
            )
        };
        if code != status::OK {
            return Err(TensorrtError::Run {
                library: library.to_string(),
                action: "open an execution context",
                reason: library.reason(&message),
            });
        }
        Ok(Execution { context: Object(raw), engine: Arc::clone(&self.objects) })
    }
}

/// One way to run an engine; one thread at a time.
pub struct Execution {
    // Before the engine: fields are dropped in this order.
    context: Object,
    engine: Arc<EngineObjects>,
}

impl Execution {
    fn failed(&self, action: &'static str) -> TensorrtError {
        let library = self.engine.library;
        let reason = library.reason(&MessageRoom::new());
        TensorrtError::Run { library: library.to_string(), action, reason }
    }

    /// Says where a tensor lies on the GPU.
    ///
    /// # Errors
    /// A name the engine does not have.
    ///
    /// # Safety
    /// `address` must be memory of the GPU with room for the tensor, for as long as anything is enqueued.
    pub unsafe fn set_address(&mut self, tensor: &str, address: u64) -> Result<(), TensorrtError> {
        self.engine.library.begin();
        let Ok(name) = CString::new(tensor) else { return Err(self.failed("name a tensor")) };
        // SAFETY: a context that lives; the address is the caller's promise and is kept, not followed.
        let code = unsafe {
            darnet_trt_set_address(
                self.engine.library.0.raw.as_ptr(),
                self.context.0,
                name.as_ptr(),
                address as usize as *mut c_void,
            )
        };
        if code == status::OK { Ok(()) } else { Err(self.failed("place a tensor")) }
    }

    /// Puts one run on `stream` and returns.
    ///
    /// # Errors
    /// What the library refuses.
    ///
    /// # Safety
    /// `stream` must be a stream of the current context, and every tensor must have its address.
    pub unsafe fn enqueue(&mut self, stream: *mut c_void) -> Result<(), TensorrtError> {
        self.engine.library.begin();
        // SAFETY: a context that lives; stream and addresses are the caller's promise.
        let code = unsafe { darnet_trt_enqueue(self.engine.library.0.raw.as_ptr(), self.context.0, stream) };
        if code == status::OK { Ok(()) } else { Err(self.failed("enqueue a run")) }
    }
}
