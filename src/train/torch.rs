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
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use tch::{Cuda, Device};

use super::TrainError;

/// Most GPUs one process trains on.
pub const MAX_GPUS: usize = 16;

/// How to use libtorch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TorchOptions {
    /// Threads of one operation; 0 leaves libtorch's choice, one a physical core.
    pub threads: usize,
    /// The same bits on every run of the same set-up. Always so on the processor at a given number of threads.
    pub deterministic: bool,
    /// TF32 in convolutions and products on GPUs, for f32 runs. Never in deterministic mode's favour or against it.
    pub tf32: bool,
}

/// Opens the CUDA half of libtorch if it is there; says why not otherwise. Once a process.
fn open_cuda() -> &'static Result<(), String> {
    static OPENED: OnceLock<Result<(), String>> = OnceLock::new();
    OPENED.get_or_init(|| {
        // SAFETY: opening runs the library's initialisers, which register kernels and touch nothing of ours. It is the
        // other half of the libtorch this program is linked to, found through the program's own search path.
        match unsafe { Library::open(Some("libtorch_cuda.so"), RTLD_NOW | RTLD_GLOBAL) } {
            Ok(library) => {
                // Kernels stay registered until the process ends.
                let _ = library.into_raw();
                Ok(())
            }
            Err(error) => Err(error.to_string()),
        }
    })
}

/// Prepares libtorch. Call before anything else of it.
///
/// # Errors
/// Determinism or precision switches that this libtorch lacks.
pub fn init(options: &TorchOptions) -> Result<(), TrainError> {
    let _ = open_cuda();
    if options.threads > 0 {
        tch::set_num_threads(i32::try_from(options.threads).unwrap_or(i32::MAX));
    }
    let context = Context::open()?;
    context.set_deterministic(options.deterministic)?;
    if Cuda::is_available() {
        context.set(c"_ZN2at7Context17setAllowTF32CuDNNEb", options.tf32)?;
        context.set(c"_ZN2at7Context18setAllowTF32CuBLASEb", options.tf32)?;
        Cuda::cudnn_set_benchmark(!options.deterministic);
    }
    Ok(())
}

/// Whether CUDA tensors work here, and if not, why.
///
/// # Errors
/// The reason in words.
pub fn cuda() -> Result<usize, String> {
    if let Err(reason) = open_cuda() {
        return Err(format!("libtorch has no CUDA half ({reason}); scripts/libtorch --cuda fetches it"));
    }
    match usize::try_from(Cuda::device_count()) {
        Ok(count) if count > 0 => Ok(count),
        _ => Err("no CUDA device or driver was found".to_owned()),
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
        init(&TorchOptions { threads: 1, deterministic: true, tf32: false }).unwrap();
        init(&TorchOptions::default()).unwrap();
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
