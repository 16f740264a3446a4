//! cuDNN's graph library, opened at run time: its functions, its statuses as errors, its descriptors as owned values.
//!
//! Input: nothing, or the folder of the library. Output: [`Library`], and for the rest of the module `Descriptor`.
//!
//! `libcudnn_graph` is opened, not `libcudnn`: the latter is a shim that opens the former at the first call and ends
//! the process where it cannot. Every function is looked up before the first call, so that a library that lacks one is
//! an error; `cudarc`'s own loader looks up late and panics. cuBLASLt is opened too, because cuDNN asks it for its
//! version while it plans and ends the process where it is not there. Other parts that are missing (heuristics,
//! engines, NVRTC) cost plans, or are a status. From `cudarc` come types and constants. Statuses, knobs and notes stay
//! integers, since a later cuDNN may answer with one that no `enum` of ours has.
//!
//! Invariants: a library is never closed, for cuDNN keeps threads and exit handlers. A descriptor is destroyed once, by
//! its owner.
//!
//! Deliberately absent: anything that knows convolutions.

use std::ffi::{CStr, c_char, c_void};
use std::fmt;
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cudarc::cudnn::sys;

/// What opening cuDNN, building a plan or running it can end in.
#[derive(Debug, thiserror::Error)]
pub enum CudnnError {
    /// The library, or one that it needs, is not there.
    #[error("open {library}: {detail}; install it, or add its folder to LD_LIBRARY_PATH")]
    LibraryAbsent {
        /// File name or path tried.
        library: String,
        /// The loader's words.
        detail: String,
    },
    /// The library is another one than was meant, or too old.
    #[error("{library} has no function {symbol}")]
    MissingSymbol {
        /// File name or path.
        library: String,
        /// The function.
        symbol: &'static str,
    },
    /// Another major version.
    #[error("cuDNN {got}, expected {} to {}", Library::OLDEST, Library::NEWEST)]
    Version {
        /// Major * 10000 + minor * 100 + patch.
        got: usize,
    },
    /// A call was refused or failed.
    #[error("{operation}: cuDNN status {status} ({name}){detail}")]
    Status {
        /// What was called, and on what.
        operation: String,
        /// `cudnnStatus_t`.
        status: u32,
        /// Its name.
        name: String,
        /// What cuDNN says in addition, after a colon; may be empty.
        detail: String,
    },
    /// A call of the driver failed.
    #[error("{operation}: CUDA driver status {status}")]
    Driver {
        /// The function.
        operation: &'static str,
        /// `CUresult`.
        status: u32,
    },
    /// A convolution that cannot be, or is too large.
    #[error("convolution: {0}")]
    Spec(String),
    /// No engine of cuDNN computes it, not even without what follows the convolution.
    #[error("no cuDNN engine computes {spec} within {workspace_limit} bytes of workspace{detail}")]
    NoEngine {
        /// The convolution.
        spec: String,
        /// The limit given.
        workspace_limit: usize,
        /// Why the last one did not, after a colon; may be empty.
        detail: String,
    },
    /// A plan's name that this module did not make.
    #[error("plan {0:?}, expected fusion:engine:knob=value,…")]
    PlanName(String),
    /// A device pointer that does not fit the plan.
    #[error("{operand} pointer {got:#x}, expected {expected}")]
    Pointer {
        /// Which one.
        operand: &'static str,
        /// Its value.
        got: u64,
        /// What the plan takes.
        expected: &'static str,
    },
    /// A plan was given to another handle than it was made for.
    #[error("execute: the plan belongs to another cuDNN handle")]
    ForeignHandle,
}

impl CudnnError {
    /// Whether cuDNN said that this combination is not supported, which another plan or fusion may be.
    pub fn is_unsupported(&self) -> bool {
        // CUDNN_STATUS_NOT_SUPPORTED and its kinds.
        matches!(self, Self::Status { status: 3000..=3999, .. })
    }
}

/// A table of functions that are all looked up when it is made.
macro_rules! functions {
    ($(#[$doc:meta])* $table:ident { $($name:ident($($arg:ty),*) $(-> $ret:ty)?;)* }) => {
        $(#[$doc])*
        #[allow(non_snake_case)]
        pub(super) struct $table {
            $(pub(super) $name: unsafe extern "C" fn($($arg),*) $(-> $ret)?,)*
        }

        impl $table {
            pub(super) fn look_up(
                library: &libloading::Library,
                path: &std::path::Path,
            ) -> Result<Self, $crate::engine::cuda::cudnn::CudnnError> {
                Ok(Self {
                    $($name: {
                        type Function = unsafe extern "C" fn($($arg),*) $(-> $ret)?;
                        // SAFETY: a function of this name has this type in the library's published header; the value
                        // is used only while the library is open, and the caller never closes it.
                        let symbol = unsafe { library.get::<Function>(concat!(stringify!($name), "\0")) };
                        *symbol.map_err(|_| $crate::engine::cuda::cudnn::CudnnError::MissingSymbol {
                            library: path.display().to_string(),
                            symbol: stringify!($name),
                        })?
                    },)*
                })
            }
        }
    };
}

functions! {
    /// Of `cudnn_graph.h`.
    Functions {
        cudnnGetVersion() -> usize;
        cudnnGetCudartVersion() -> usize;
        cudnnGetErrorString(u32) -> *const c_char;
        cudnnGetLastErrorString(*mut c_char, usize);
        cudnnCreate(*mut sys::cudnnHandle_t) -> u32;
        cudnnDestroy(sys::cudnnHandle_t) -> u32;
        cudnnSetStream(sys::cudnnHandle_t, sys::cudaStream_t) -> u32;
        cudnnBackendCreateDescriptor(u32, *mut Raw) -> u32;
        cudnnBackendDestroyDescriptor(Raw) -> u32;
        cudnnBackendSetAttribute(Raw, u32, u32, i64, *const c_void) -> u32;
        cudnnBackendGetAttribute(Raw, u32, u32, i64, *mut i64, *mut c_void) -> u32;
        cudnnBackendFinalize(Raw) -> u32;
        cudnnBackendExecute(sys::cudnnHandle_t, Raw, Raw) -> u32;
    }
}

type Raw = sys::cudnnBackendDescriptor_t;

/// Opens a library by name or path and never closes it.
pub(super) fn open_for_good(path: &Path) -> Result<ManuallyDrop<libloading::Library>, CudnnError> {
    // SAFETY: loading runs the library's initialisers. The names that come here are NVIDIA's libraries, or what the
    // operator put in their place.
    let opened = unsafe { libloading::Library::new(path) };
    opened.map(ManuallyDrop::new).map_err(|e| {
        let library = path.display().to_string();
        // The error's own display leaves out what the loader said, and that begins with the name.
        let said = std::error::Error::source(&e).map_or_else(|| e.to_string(), ToString::to_string);
        let detail = said.strip_prefix(&format!("{library}: ")).unwrap_or(&said).to_owned();
        CudnnError::LibraryAbsent { library, detail }
    })
}

/// The folder of a library that is open: `path`'s, or where the loader found it.
fn place(path: &Path) -> PathBuf {
    let parent = |p: &Path| p.parent().map(Path::to_path_buf).unwrap_or_default();
    if path.components().count() > 1 {
        return parent(path);
    }
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let mapped = maps.lines().filter_map(|line| line.find('/').map(|at| Path::new(&line[at..])));
    mapped.into_iter().find(|file| file.file_name() == path.file_name()).map(parent).unwrap_or_default()
}

/// Opens the cuBLASLt of this CUDA major version, where the loader looks or where cuDNN in `folder` would: beside it,
/// or where PyPI's packages lie. When cuDNN opens it by its name it then gets the one that is open.
pub(super) fn open_cublaslt(folder: &Path, cuda_major: usize) -> Result<(), CudnnError> {
    let file = format!("libcublasLt.so.{cuda_major}");
    let mut result = open_for_good(Path::new(&file));
    for near in ["", "../../cublas/lib", &format!("../../cu{cuda_major}/lib")] {
        if result.is_ok() {
            break;
        }
        let near = folder.join(near).join(&file);
        if near.exists() {
            result = open_for_good(&near);
        }
    }
    result.map(|_| ())
}

/// The opened library. No device is needed to have one.
pub struct Library {
    pub(super) functions: Functions,
    version: usize,
}

impl Library {
    /// The file looked for.
    pub const FILE: &'static str = "libcudnn_graph.so.9";
    /// The oldest version taken.
    pub const OLDEST: usize = 90_000;
    /// The newest version taken; the next major one may change what attributes mean.
    pub const NEWEST: usize = 99_999;

    /// Opens [`Self::FILE`] in `folder`, or where the loader looks (`LD_LIBRARY_PATH`, the system's cache).
    ///
    /// # Errors
    /// Absent, without one of the functions used, of another major version, or without cuBLASLt.
    pub fn open(folder: Option<&Path>) -> Result<Arc<Self>, CudnnError> {
        Self::open_file(&folder.map_or_else(|| PathBuf::from(Self::FILE), |f| f.join(Self::FILE)))
    }

    pub(super) fn open_file(path: &Path) -> Result<Arc<Self>, CudnnError> {
        let library = open_for_good(path)?;
        let functions = Functions::look_up(&library, path)?;
        // SAFETY: takes nothing and reads a constant.
        let version = unsafe { (functions.cudnnGetVersion)() };
        if !(Self::OLDEST..=Self::NEWEST).contains(&version) {
            return Err(CudnnError::Version { got: version });
        }
        // SAFETY: takes nothing and reads a constant.
        let cudart = unsafe { (functions.cudnnGetCudartVersion)() };
        open_cublaslt(&place(path), cudart / 1000)?;
        Ok(Arc::new(Self { functions, version }))
    }

    /// Major * 10000 + minor * 100 + patch.
    pub fn version(&self) -> usize {
        self.version
    }

    /// A status as a result; `operation` is made only for an error.
    pub(super) fn check(&self, status: u32, operation: impl FnOnce() -> String) -> Result<(), CudnnError> {
        if status == sys::cudnnStatus_t::CUDNN_STATUS_SUCCESS as u32 {
            return Ok(());
        }
        // SAFETY: returns a pointer to a constant string for every integer.
        let name = unsafe { (self.functions.cudnnGetErrorString)(status) };
        let name = if name.is_null() {
            "unknown".to_owned()
        } else {
            // SAFETY: not null, and cuDNN's constant strings end in zero.
            unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
        };
        let mut message = [0u8; 1024];
        // SAFETY: writes at most the length given, zero at the end included.
        unsafe { (self.functions.cudnnGetLastErrorString)(message.as_mut_ptr().cast(), message.len()) };
        let detail = CStr::from_bytes_until_nul(&message).map(CStr::to_string_lossy).unwrap_or_default();
        let detail = if detail.trim().is_empty() { String::new() } else { format!(": {}", detail.trim()) };
        Err(CudnnError::Status { operation: operation(), status, name, detail })
    }
}

impl fmt::Debug for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Library").field("version", &self.version).finish_non_exhaustive()
    }
}

/// What an attribute's elements are in memory.
///
/// # Safety
/// `TYPE` is the `cudnnBackendAttributeType_t` whose elements have this type's size and take every value that this type
/// has; every value that cuDNN writes for it is one of this type's.
pub(super) unsafe trait Element: Copy {
    /// `cudnnBackendAttributeType_t`.
    const TYPE: u32;
    /// What an array holds before cuDNN writes to it.
    const BLANK: Self;
}

// SAFETY: CUDNN_TYPE_INT64 is an int64_t.
unsafe impl Element for i64 {
    const TYPE: u32 = sys::cudnnBackendAttributeType_t::CUDNN_TYPE_INT64 as u32;
    const BLANK: Self = 0;
}

// SAFETY: CUDNN_TYPE_FLOAT is a float.
unsafe impl Element for f32 {
    const TYPE: u32 = sys::cudnnBackendAttributeType_t::CUDNN_TYPE_FLOAT as u32;
    const BLANK: Self = 0.0;
}

// SAFETY: CUDNN_TYPE_CHAR is a char.
unsafe impl Element for u8 {
    const TYPE: u32 = sys::cudnnBackendAttributeType_t::CUDNN_TYPE_CHAR as u32;
    const BLANK: Self = 0;
}

/// A C enumeration of the attribute type `T`; any integer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(transparent)]
pub(super) struct Enumerated<const T: u32>(pub(super) u32);

// SAFETY: the enumerations named below are C enums without negative values, which have the size of an unsigned int.
unsafe impl<const T: u32> Element for Enumerated<T> {
    const TYPE: u32 = T;
    const BLANK: Self = Self(0);
}

pub(super) type DataType = Enumerated<{ sys::cudnnBackendAttributeType_t::CUDNN_TYPE_DATA_TYPE as u32 }>;
pub(super) type ConvolutionMode = Enumerated<{ sys::cudnnBackendAttributeType_t::CUDNN_TYPE_CONVOLUTION_MODE as u32 }>;
pub(super) type PointwiseMode = Enumerated<{ sys::cudnnBackendAttributeType_t::CUDNN_TYPE_POINTWISE_MODE as u32 }>;
pub(super) type HeurMode = Enumerated<{ sys::cudnnBackendAttributeType_t::CUDNN_TYPE_HEUR_MODE as u32 }>;
pub(super) type KnobType = Enumerated<{ sys::cudnnBackendAttributeType_t::CUDNN_TYPE_KNOB_TYPE as u32 }>;
pub(super) type NumericalNote = Enumerated<{ sys::cudnnBackendAttributeType_t::CUDNN_TYPE_NUMERICAL_NOTE as u32 }>;
pub(super) type BehaviorNote = Enumerated<{ sys::cudnnBackendAttributeType_t::CUDNN_TYPE_BEHAVIOR_NOTE as u32 }>;

/// A handle as an attribute. Only set, never read.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct RawHandle(pub(super) sys::cudnnHandle_t);

// SAFETY: CUDNN_TYPE_HANDLE is a cudnnHandle_t.
unsafe impl Element for RawHandle {
    const TYPE: u32 = sys::cudnnBackendAttributeType_t::CUDNN_TYPE_HANDLE as u32;
    const BLANK: Self = Self(std::ptr::null_mut());
}

/// A device address as an attribute. Only set, never read.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct DevicePointer(pub(super) u64);

// SAFETY: CUDNN_TYPE_VOID_PTR is a void *, of 64 bits on every system that CUDA 12 runs on.
unsafe impl Element for DevicePointer {
    const TYPE: u32 = sys::cudnnBackendAttributeType_t::CUDNN_TYPE_VOID_PTR as u32;
    const BLANK: Self = Self(0);
}
const _: () = assert!(size_of::<DevicePointer>() == size_of::<*mut c_void>());

const DESCRIPTOR: u32 = sys::cudnnBackendAttributeType_t::CUDNN_TYPE_BACKEND_DESCRIPTOR as u32;
const BOOLEAN: u32 = sys::cudnnBackendAttributeType_t::CUDNN_TYPE_BOOLEAN as u32;

/// Names an attribute or a kind of descriptor, for calls and for messages.
#[derive(Clone, Copy)]
pub(super) struct Named {
    pub(super) value: u32,
    pub(super) name: &'static str,
}

/// An attribute of cuDNN's by its name.
macro_rules! attribute {
    ($name:ident) => {
        $crate::engine::cuda::cudnn::library::Named {
            value: cudarc::cudnn::sys::cudnnBackendAttributeName_t::$name as u32,
            name: stringify!($name),
        }
    };
}
pub(super) use attribute;

/// A kind of descriptor of cuDNN's by its name.
macro_rules! kind {
    ($name:ident) => {
        $crate::engine::cuda::cudnn::library::Named {
            value: cudarc::cudnn::sys::cudnnBackendDescriptorType_t::$name as u32,
            name: stringify!($name),
        }
    };
}
pub(super) use kind;

/// An owned descriptor.
///
/// cuDNN copies what an attribute is set to, other descriptors too, so the order in which they are dropped is free.
pub(super) struct Descriptor {
    raw: Raw,
    kind: Named,
    pub(super) library: Arc<Library>,
}

// SAFETY: a descriptor is memory of cuDNN's without ties to a thread.
unsafe impl Send for Descriptor {}
// SAFETY: through a shared reference a descriptor is only read, by `get`, by being set as another's attribute, or by
// execution: `set` and `finalize` take it exclusively.
unsafe impl Sync for Descriptor {}

impl Descriptor {
    /// A descriptor to be set and finalised.
    pub(super) fn new(library: &Arc<Library>, kind: Named) -> Result<Self, CudnnError> {
        let mut raw: Raw = std::ptr::null_mut();
        // SAFETY: any integer may be asked for; the pointer is written only on success.
        let status = unsafe { (library.functions.cudnnBackendCreateDescriptor)(kind.value, &raw mut raw) };
        library.check(status, || format!("create {}", kind.name))?;
        Ok(Self { raw, kind, library: Arc::clone(library) })
    }

    pub(super) fn raw(&self) -> Raw {
        self.raw
    }

    fn set_raw(&mut self, name: Named, kind: u32, count: usize, elements: *const c_void) -> Result<(), CudnnError> {
        let Ok(count) = i64::try_from(count) else { return Err(CudnnError::Spec(format!("{count} elements"))) };
        // SAFETY: the descriptor lives; `elements` has `count` elements of the type named, by the callers below; cuDNN
        // checks that the attribute takes that type and copies them.
        let status =
            unsafe { (self.library.functions.cudnnBackendSetAttribute)(self.raw, name.value, kind, count, elements) };
        self.library.check(status, || format!("set {} of {}", name.name, self.kind.name))
    }

    /// Sets an attribute.
    pub(super) fn set<T: Element>(&mut self, name: Named, elements: &[T]) -> Result<(), CudnnError> {
        self.set_raw(name, T::TYPE, elements.len(), elements.as_ptr().cast())
    }

    /// Sets an attribute that is a truth value.
    pub(super) fn set_flag(&mut self, name: Named, value: bool) -> Result<(), CudnnError> {
        // A C bool is a byte of 0 or 1, as Rust's.
        self.set_raw(name, BOOLEAN, 1, (&raw const value).cast())
    }

    /// Sets an attribute that refers to other descriptors.
    pub(super) fn refer(&mut self, name: Named, others: &[&Self]) -> Result<(), CudnnError> {
        let raw: Vec<Raw> = others.iter().map(|d| d.raw).collect();
        self.set_raw(name, DESCRIPTOR, raw.len(), raw.as_ptr().cast())
    }

    /// Ends the setting of attributes; cuDNN checks them together.
    pub(super) fn finalize(self) -> Result<Self, CudnnError> {
        // SAFETY: the descriptor lives.
        let status = unsafe { (self.library.functions.cudnnBackendFinalize)(self.raw) };
        self.library.check(status, || format!("finalise {}", self.kind.name))?;
        Ok(self)
    }

    /// The elements of an attribute, at most `most`.
    pub(super) fn get<T: Element>(&self, name: Named, most: usize) -> Result<Vec<T>, CudnnError> {
        let mut elements = vec![T::BLANK; most];
        let mut count = 0i64;
        // SAFETY: the descriptor lives; cuDNN writes at most `most` elements of the type named, which are values of `T`
        // by its contract, and one count.
        let status = unsafe {
            (self.library.functions.cudnnBackendGetAttribute)(
                self.raw,
                name.value,
                T::TYPE,
                most as i64,
                &raw mut count,
                elements.as_mut_ptr().cast(),
            )
        };
        self.library.check(status, || format!("get {} of {}", name.name, self.kind.name))?;
        elements.truncate(usize::try_from(count).unwrap_or(0));
        Ok(elements)
    }

    /// The one element of an attribute.
    pub(super) fn get_one<T: Element>(&self, name: Named) -> Result<T, CudnnError> {
        self.get(name, 1)?.first().copied().ok_or_else(|| CudnnError::Status {
            operation: format!("get {} of {}", name.name, self.kind.name),
            status: 0,
            name: "nothing".to_owned(),
            detail: String::new(),
        })
    }

    /// Copies of the descriptors that an attribute refers to, at most `most`.
    pub(super) fn referred(&self, name: Named, kind: Named, most: usize) -> Result<Vec<Self>, CudnnError> {
        let mut found = Vec::with_capacity(most);
        for _ in 0..most {
            found.push(Self::new(&self.library, kind)?);
        }
        let mut raw: Vec<Raw> = found.iter().map(|d| d.raw).collect();
        let mut count = 0i64;
        // SAFETY: the descriptor lives; the array holds `most` live descriptors of the kind that the attribute refers
        // to, into which cuDNN copies; it does not change the array's pointers.
        let status = unsafe {
            (self.library.functions.cudnnBackendGetAttribute)(
                self.raw,
                name.value,
                DESCRIPTOR,
                most as i64,
                &raw mut count,
                raw.as_mut_ptr().cast(),
            )
        };
        self.library.check(status, || format!("get {} of {}", name.name, self.kind.name))?;
        found.truncate(usize::try_from(count).unwrap_or(0));
        Ok(found)
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: the descriptor lives, and nothing uses it after this. A failure leaks it, which harms nothing.
        let _ = unsafe { (self.library.functions.cudnnBackendDestroyDescriptor)(self.raw) };
    }
}
