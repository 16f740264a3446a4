//! NVIDIA's run-time compiler, opened at run time.
//!
//! Input: CUDA C++ text. Output: a cubin for one architecture, or PTX. Invariant: nothing of it is linked; an absent
//! library is [`GpuError::LibraryAbsent`]. Opened here and not through cudarc, whose list of names under the oldest
//! version feature does not know the compiler of CUDA 13.
//!
//! Deliberately absent: headers. Kernels include nothing, so that they compile wherever the library alone is installed.

use std::ffi::{CStr, CString, c_char, c_int};
use std::path::{Path, PathBuf};
use std::ptr;

use libloading::Library;

use super::GpuError;

/// File names of the library, newest first. The last is libtorch's, which depends on the library and leads to it.
const NAMES: [&str; 4] = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so", "libcaffe2_nvrtc.so"];
/// Where a toolkit lies when the system's search path does not have it.
const FOLDERS: [&str; 2] = ["/usr/local/cuda/lib64", "/usr/lib/x86_64-linux-gnu"];
/// Names a folder or file of the library and goes before all other places.
pub const ENVIRONMENT: &str = "DARNET_NVRTC";

type Program = *mut std::ffi::c_void;
type Code = c_int;

/// The compiler.
pub struct Nvrtc {
    library: Library,
    /// Held open; see [`Nvrtc::open`].
    built_in: Option<Library>,
    version: (i32, i32),
}

impl std::fmt::Debug for Nvrtc {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Nvrtc").field("version", &self.version).field("built_in", &self.built_in.is_some()).finish()
    }
}

/// Destroys a program whatever happens.
struct Guard<'a> {
    nvrtc: &'a Nvrtc,
    program: Program,
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        type F = unsafe extern "C" fn(*mut Program) -> Code;
        if let Ok(destroy) = self.nvrtc.function::<F>("nvrtcDestroyProgram") {
            // SAFETY: the program was made by nvrtcCreateProgram and is destroyed once.
            unsafe { destroy(&mut self.program) };
        }
    }
}

/// What is to be made of a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Product {
    /// Machine code for one architecture.
    Cubin,
    /// PTX, which the driver compiles.
    Ptx,
}

impl Nvrtc {
    /// Opens the library.
    ///
    /// # Errors
    /// [`GpuError::LibraryAbsent`], [`GpuError::Symbol`].
    pub fn open() -> Result<Self, GpuError> {
        let mut candidates: Vec<PathBuf> = Vec::new();
        if let Some(named) = std::env::var_os(ENVIRONMENT).map(PathBuf::from) {
            if named.is_dir() {
                candidates.extend(NAMES.iter().map(|n| named.join(n)));
            } else {
                candidates.push(named);
            }
        }
        candidates.extend(NAMES.iter().map(PathBuf::from));
        candidates.extend(FOLDERS.iter().flat_map(|f| NAMES.iter().map(move |n| PathBuf::from(f).join(n))));
        Self::open_one(&candidates)
    }

    /// Opens the library in `folder` and nowhere else.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_in(folder: &Path) -> Result<Self, GpuError> {
        Self::open_one(&NAMES.map(|n| folder.join(n)))
    }

    /// The first of `candidates` that is there.
    fn open_one(candidates: &[PathBuf]) -> Result<Self, GpuError> {
        // SAFETY: the library's initialisers are NVIDIA's own and have no precondition.
        let found = candidates.iter().find_map(|c| unsafe { Library::new(c) }.ok().map(|library| (library, c)));
        let Some((library, path)) = found else {
            let tried = candidates.iter().map(|c| c.display().to_string()).collect::<Vec<_>>().join(", ");
            return Err(GpuError::LibraryAbsent { library: "NVRTC", tried });
        };
        let mut nvrtc = Self { library, built_in: None, version: (0, 0) };
        type Version = unsafe extern "C" fn(*mut c_int, *mut c_int) -> Code;
        let version = nvrtc.function::<Version>("nvrtcVersion")?;
        let (mut major, mut minor) = (0, 0);
        // SAFETY: both pointers are valid for writing.
        unsafe { version(&mut major, &mut minor) };
        nvrtc.version = (major, minor);
        // The compiler opens its built-in declarations by name; beside it they are found only if they are open already.
        if let Some(folder) = path.parent().filter(|f| !f.as_os_str().is_empty()) {
            let built_in = folder.join(format!("libnvrtc-builtins.so.{major}.{minor}"));
            // SAFETY: as above.
            nvrtc.built_in = unsafe { Library::new(built_in) }.ok();
        }
        Ok(nvrtc)
    }

    /// Major and minor version.
    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    fn function<F: Copy>(&self, symbol: &'static str) -> Result<F, GpuError> {
        // SAFETY: every caller names the type that NVRTC's documentation gives for the symbol.
        unsafe { self.library.get::<F>(symbol.as_bytes()) }
            .map(|f| *f)
            .map_err(|_| GpuError::Symbol { library: "NVRTC", symbol })
    }

    fn text_of(&self, code: Code) -> String {
        type F = unsafe extern "C" fn(Code) -> *const c_char;
        let Ok(function) = self.function::<F>("nvrtcGetErrorString") else { return format!("error {code}") };
        // SAFETY: returns a static string for any code.
        let text = unsafe { function(code) };
        if text.is_null() {
            return format!("error {code}");
        }
        // SAFETY: not null, and terminated by the library.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }

    /// Compiles `source` for `arch` (`90`, `90a`, …), with `options` as the compiler takes them.
    ///
    /// # Errors
    /// [`GpuError::Compile`] with the compiler's log.
    pub fn compile(
        &self,
        name: &str,
        source: &str,
        arch: &str,
        options: &[String],
        product: Product,
    ) -> Result<Vec<u8>, GpuError> {
        let failed = |log: String| GpuError::Compile { name: name.to_owned(), arch: format!("sm_{arch}"), log };
        let text = |s: &str| CString::new(s).map_err(|_| failed("a zero byte in the text".to_owned()));
        let (c_source, c_name) = (text(source)?, text(name)?);
        type Create = unsafe extern "C" fn(
            *mut Program,
            *const c_char,
            *const c_char,
            c_int,
            *const *const c_char,
            *const *const c_char,
        ) -> Code;
        type Compile = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> Code;
        let create = self.function::<Create>("nvrtcCreateProgram")?;
        let compile = self.function::<Compile>("nvrtcCompileProgram")?;
        let mut program: Program = ptr::null_mut();
        // SAFETY: the strings live through the call; no headers are given.
        let code = unsafe { create(&mut program, c_source.as_ptr(), c_name.as_ptr(), 0, ptr::null(), ptr::null()) };
        if code != 0 {
            return Err(failed(self.text_of(code)));
        }
        let guard = Guard { nvrtc: self, program };
        let kind = match product {
            Product::Cubin => "sm",
            Product::Ptx => "compute",
        };
        let mut words = vec![format!("--gpu-architecture={kind}_{arch}"), "--std=c++17".to_owned()];
        words.extend(options.iter().cloned());
        let words = words.iter().map(|w| text(w)).collect::<Result<Vec<_>, _>>()?;
        let pointers: Vec<*const c_char> = words.iter().map(|w| w.as_ptr()).collect();
        // SAFETY: the program is alive, the options live through the call.
        let code = unsafe { compile(guard.program, pointers.len() as c_int, pointers.as_ptr()) };
        if code != 0 {
            let log = self.output(guard.program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog")?;
            let log = String::from_utf8_lossy(&log).trim_end_matches(['\0', '\n']).to_owned();
            return Err(failed(if log.is_empty() { self.text_of(code) } else { log }));
        }
        match product {
            Product::Cubin => self.output(guard.program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN"),
            Product::Ptx => self.output(guard.program, "nvrtcGetPTXSize", "nvrtcGetPTX"),
        }
    }

    fn output(&self, program: Program, size: &'static str, get: &'static str) -> Result<Vec<u8>, GpuError> {
        type Size = unsafe extern "C" fn(Program, *mut usize) -> Code;
        type Get = unsafe extern "C" fn(Program, *mut c_char) -> Code;
        let (size, get) = (self.function::<Size>(size)?, self.function::<Get>(get)?);
        let mut len = 0usize;
        // SAFETY: the program is alive, the pointer valid for writing.
        unsafe { size(program, &mut len) };
        let mut bytes = vec![0u8; len];
        // SAFETY: the buffer has the size that the library asked for.
        unsafe { get(program, bytes.as_mut_ptr().cast()) };
        Ok(bytes)
    }
}
