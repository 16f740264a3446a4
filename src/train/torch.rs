//! libtorch at start-up: its CUDA half, threads, determinism, devices.
//!
//! Input: what the command line asked for. Output: the devices to train on. [`init`] must come before every other use of
//! libtorch in the process, since libtorch decides once whether it has CUDA.
//!
//! The linker drops `libtorch_cuda`, because no symbol refers to it; it registers itself when it is opened. The switches
//! for determinism have no binding, so they are looked up by their C++ names; libtorch's version is fixed, and a name
//! that is not there is an error, never a silent loss of determinism.

#![allow(unsafe_code)]

use std::ffi::{CStr, c_void};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use tch::{Cuda, Device};

use super::TrainError;

/// Most GPUs one process trains on.
pub const MAX_GPUS: usize = 16;

/// How to use libtorch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TorchOptions {
    /// Threads of one operation; 0 leaves libtorch's choice, one a physical core.
    pub threads: usize,
    /// The same bits on every run of the same set-up. Always so on the processor at a given number of threads.
    pub deterministic: bool,
    /// TF32 in convolutions and products on GPUs, for f32 runs. Never in deterministic mode's favour or against it.
    pub tf32: bool,
    /// Whether convolutions are in half precision. libtorch refuses every engine of cuDNN with matrix units to whoever
    /// forbids TF32, those of half precision too; so it is allowed then, and changes no number.
    pub half: bool,
    /// Whether cuDNN times its ways of doing each new convolution first. Not in deterministic mode.
    pub tune: bool,
}

impl Default for TorchOptions {
    fn default() -> Self {
        Self { threads: 0, deterministic: false, tf32: false, half: false, tune: true }
    }
}

/// What the heap grows by at the least. One activation of a full-size network has 103 MB.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const TOP_PAD_BYTES: libc::c_int = 64 << 20;
const CUDA_LIBRARY: &str = "libtorch_cuda.so";
/// Largest accepted list of mappings: a process has at most 65,530 by Linux's default, of about 120 bytes a line.
const MAX_MAPS_BYTES: u64 = 16 << 20;

/// The folder of the libtorch this process runs with, whichever way the loader found it.
fn loaded_from(maps: &str) -> Option<PathBuf> {
    let path = maps.lines().find_map(|line| {
        let path = &line[line.find('/')?..];
        path.rsplit('/').next().is_some_and(|name| name.starts_with("libtorch_cpu.so")).then_some(path)
    })?;
    Path::new(path).parent().map(Path::to_path_buf)
}

/// Where the CUDA half may be: beside the half that is loaded, which is the same build; in the folder that `LIBTORCH`
/// names now; wherever the loader looks (`LD_LIBRARY_PATH`, the program's own search path).
fn cuda_candidates(maps: &str, libtorch: Option<&Path>) -> Vec<PathBuf> {
    let folders = [loaded_from(maps), libtorch.map(|root| root.join("lib"))];
    let mut all: Vec<PathBuf> = folders.into_iter().flatten().map(|folder| folder.join(CUDA_LIBRARY)).collect();
    all.push(PathBuf::from(CUDA_LIBRARY));
    all.dedup();
    all
}

/// What the loader said, which libloading keeps as the cause of its error.
fn loader_words(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

/// Opens the CUDA half of libtorch if it is there; says what was tried otherwise. Once a process.
fn open_cuda() -> &'static Result<PathBuf, String> {
    static OPENED: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    OPENED.get_or_init(|| {
        let mut maps = String::new();
        // Without a list of mappings the other places are left.
        if let Ok(file) = std::fs::File::open("/proc/self/maps") {
            let _ = file.take(MAX_MAPS_BYTES).read_to_string(&mut maps);
        }
        let root = std::env::var_os("LIBTORCH").map(PathBuf::from);
        let mut tried = Vec::new();
        for path in cuda_candidates(&maps, root.as_deref()) {
            if path.is_absolute() && !path.exists() {
                tried.push(format!("{}: no such file", path.display()));
                continue;
            }
            // SAFETY: opening runs the library's initialisers, which register kernels and touch nothing of ours. It is
            // the other half of the libtorch this program is linked to.
            match unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) } {
                Ok(library) => {
                    // Kernels stay registered until the process ends.
                    let _ = library.into_raw();
                    return Ok(path);
                }
                // The loader's own words name the file that is missing, which may be a library of NVIDIA's.
                Err(error) => tried.push(format!("{}: {}", path.display(), loader_words(&error))),
            }
        }
        Err(tried.join("; "))
    })
}

/// Lets glibc keep what a training step frees. Left alone, it maps every large activation anew and hands it back, so that
/// each step clears the same pages again. M_MMAP_MAX and not M_MMAP_THRESHOLD, whose largest value is 32 MiB.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn keep_freed_memory() {
    // SAFETY: mallopt sets numbers of the allocator and may be called at any time; one that it refuses is left as it was.
    unsafe {
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
        libc::mallopt(libc::M_TOP_PAD, TOP_PAD_BYTES);
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn keep_freed_memory() {}

/// Prepares libtorch. Call before anything else of it.
///
/// # Errors
/// Determinism or precision switches that this libtorch lacks.
pub fn init(options: &TorchOptions) -> Result<(), TrainError> {
    keep_freed_memory();
    let _ = open_cuda();
    if options.threads > 0 {
        tch::set_num_threads(i32::try_from(options.threads).unwrap_or(i32::MAX));
    }
    let context = Context::open()?;
    context.set_deterministic(options.deterministic)?;
    if Cuda::is_available() {
        context.set(c"_ZN2at7Context17setAllowTF32CuDNNEb", options.tf32 || options.half)?;
        context.set(c"_ZN2at7Context18setAllowTF32CuBLASEb", options.tf32)?;
        Cuda::cudnn_set_benchmark(options.tune && !options.deterministic);
    }
    Ok(())
}

/// Whether CUDA tensors work here, and if not, why.
///
/// # Errors
/// The reason in words.
pub fn cuda() -> Result<usize, String> {
    if let Err(reason) = open_cuda() {
        return Err(format!(
            "libtorch's CUDA half did not open; tried {reason}; scripts/libtorch --cuda fetches it, or let \
             LD_LIBRARY_PATH or LIBTORCH name a torch 2.11 that has it"
        ));
    }
    match usize::try_from(Cuda::device_count()) {
        Ok(count) if count > 0 => Ok(count),
        _ => Err(match open_cuda() {
            Ok(path) => format!("{} is open, but found no CUDA device or driver", path.display()),
            Err(_) => "no CUDA device or driver was found".to_owned(),
        }),
    }
}

/// The devices that `text` names: `cpu`, `cuda`, `cuda:1`, `cuda:0,2`, `cuda:all`, or `auto`: the first GPU, if any.
///
/// # Errors
/// A text of another form, a GPU that is not there, or CUDA that does not work; `auto` never fails.
pub fn devices(text: &str) -> Result<Vec<Device>, TrainError> {
    let absent = |reason: String| TrainError::Option {
        option: "device",
        expected: "a device of this machine".to_owned(),
        got: format!("{text} ({reason})"),
    };
    match text {
        "cpu" => return Ok(vec![Device::Cpu]),
        "auto" => return Ok(vec![if cuda().is_ok() { Device::Cuda(0) } else { Device::Cpu }]),
        _ => {}
    }
    let list = match text.strip_prefix("cuda") {
        Some("") => "0",
        Some(rest) => rest.strip_prefix(':').unwrap_or("?"),
        None => "?",
    };
    let indices: Vec<usize> = if list == "all" {
        (0..cuda().map_err(absent)?.min(MAX_GPUS)).collect()
    } else {
        list.split(',').map(str::parse).collect::<Result<_, _>>().map_err(|_| TrainError::Option {
            option: "device",
            expected: "auto, cpu, cuda, cuda:N, cuda:N,M or cuda:all".to_owned(),
            got: text.to_owned(),
        })?
    };
    let count = cuda().map_err(absent)?;
    let twice = indices.iter().enumerate().any(|(i, g)| indices[..i].contains(g));
    if twice || indices.len() > MAX_GPUS || indices.iter().any(|&i| i >= count) {
        return Err(absent(format!("{count} there, each may be named once, at most {MAX_GPUS}")));
    }
    Ok(indices.into_iter().map(Device::Cuda).collect())
}

/// Bytes in use on GPU `index`, by everyone, libtorch's cache included; none where CUDA does not say.
pub fn gpu_bytes_used(index: usize) -> Option<u64> {
    if open_cuda().is_err() || !Cuda::is_available() {
        return None;
    }
    type MemGetInfo = unsafe extern "C" fn(*mut usize, *mut usize) -> i32;
    type SetDevice = unsafe extern "C" fn(i32) -> i32;
    let library = Library::this();
    // SAFETY: both are functions of the CUDA run-time library with these C signatures (documented, stable), already
    // loaded by libtorch; the pointers are to live locals.
    unsafe {
        let set = library.get::<SetDevice>(b"cudaSetDevice\0").ok()?;
        let info = library.get::<MemGetInfo>(b"cudaMemGetInfo\0").ok()?;
        let (mut free, mut total) = (0usize, 0usize);
        if set(i32::try_from(index).ok()?) != 0 || info(&raw mut free, &raw mut total) != 0 {
            return None;
        }
        Some(total.saturating_sub(free) as u64)
    }
}

/// libtorch's global settings, `at::Context`.
struct Context {
    library: Library,
    this: *mut c_void,
}

impl Context {
    fn open() -> Result<Self, TrainError> {
        let library = Library::this();
        type Global = unsafe extern "C" fn() -> *mut c_void;
        // SAFETY: `at::Context& at::globalContext()` takes nothing and returns a reference, a pointer in the C++ ABI.
        let this = unsafe { library.get::<Global>(b"_ZN2at13globalContextEv\0").map(|global| global()) }
            .map_err(|e| TrainError::Torch(format!("find libtorch's settings: {e}")))?;
        Ok(Self { library, this })
    }

    /// Calls `void at::Context::name(bool)`.
    fn set(&self, name: &'static CStr, value: bool) -> Result<(), TrainError> {
        type Set = unsafe extern "C" fn(*mut c_void, bool);
        // SAFETY: `name` is one of the setters of one bool; `this` is the global context, which lives for ever.
        unsafe { self.library.get::<Set>(name.to_bytes_with_nul()).map(|set| set(self.this, value)) }
            .map_err(|e| TrainError::Torch(format!("find a setting of libtorch: {e}")))
    }

    fn set_deterministic(&self, value: bool) -> Result<(), TrainError> {
        self.set(c"_ZN2at7Context21setDeterministicCuDNNEb", value)?;
        self.set(c"_ZN2at7Context22setDeterministicMkldnnEb", value)?;
        type Set = unsafe extern "C" fn(*mut c_void, bool, bool);
        // SAFETY: `void at::Context::setDeterministicAlgorithms(bool mode, bool warn_only)` on the global context.
        unsafe {
            self.library
                .get::<Set>(b"_ZN2at7Context26setDeterministicAlgorithmsEbb\0")
                .map(|set| set(self.this, value, false))
        }
        .map_err(|e| TrainError::Torch(format!("find a setting of libtorch: {e}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libtorch_starts_with_and_without_determinism() {
        init(&TorchOptions { threads: 1, deterministic: true, ..TorchOptions::default() }).unwrap();
        init(&TorchOptions::default()).unwrap();
    }

    #[test]
    fn the_cuda_half_is_looked_for_beside_the_half_that_is_loaded() {
        let maps = "7f00-7f01 r--p 0 00:00 1 /usr/lib/libc.so.6\n7f02-7f03 r-xp 0 00:00 2   /a b/lib/libtorch_cpu.so\n";
        let found = cuda_candidates(maps, Some(Path::new("/t")));
        let wanted = ["/a b/lib/libtorch_cuda.so", "/t/lib/libtorch_cuda.so", "libtorch_cuda.so"].map(PathBuf::from);
        assert_eq!(found, wanted);
        assert_eq!(cuda_candidates("", None), [PathBuf::from(CUDA_LIBRARY)]);
        let own = std::fs::read_to_string("/proc/self/maps").unwrap();
        assert!(loaded_from(&own).is_some_and(|folder| folder.join("libtorch_cpu.so").exists()));
    }

    #[test]
    fn a_device_that_is_not_there_is_named() {
        assert_eq!(devices("cpu").unwrap(), [Device::Cpu]);
        assert_eq!(devices("auto").unwrap().len(), 1);
        for bad in ["cuda:99", "cuda:0,0", "gpu", "cuda:x", "cuda0"] {
            let error = devices(bad).unwrap_err().to_string();
            assert!(error.contains(bad), "{error}");
        }
    }

    #[test]
    fn cuda_tensors_work_where_there_is_a_gpu() {
        match cuda() {
            Err(reason) => eprintln!("not run: {reason}"),
            Ok(_) => {
                let x = tch::Tensor::from_slice(&[1.0f32, 2.0]).to_device(Device::Cuda(0));
                assert_eq!((&x * &x).sum(tch::Kind::Float).double_value(&[]), 5.0);
                assert!(gpu_bytes_used(0).is_some_and(|b| b > 0));
            }
        }
    }
}
