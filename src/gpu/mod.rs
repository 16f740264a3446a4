//! The layer between this program and an NVIDIA GPU: device, memory, streams, kernels. A leaf.
//!
//! Input: nothing of this crate. Output: typed handles that free what they hold. Invariants: no library is linked; the
//! driver is looked for, and every function that is used is looked up, before the first call, so that an absent or old
//! driver is a [`GpuError`] and never a panic; every method makes the device's primary context current on the calling
//! thread first.
//!
//! Deliberately absent: what is computed. `resample::cuda` and `engine::cuda` bring kernels and plans.
#![allow(unsafe_code)]

mod cubins;
mod error;
mod memory;
pub mod nvrtc;
mod stream;

use std::borrow::Cow;
use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::result;
use cudarc::driver::sys::{self, CUdevice_attribute};

pub use error::GpuError;
pub use memory::{DeviceBuffer, Element, Pinned};
pub use stream::{Event, Graph, Stream};

use nvrtc::{Nvrtc, Product};

/// Functions of the driver that this crate calls, so that none is found missing later.
const DRIVER_FUNCTIONS: [&str; 46] = [
    "cuInit",
    "cuDriverGetVersion",
    "cuDeviceGet",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDeviceGetAttribute",
    "cuDeviceTotalMem_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
    "cuCtxSetCurrent",
    "cuCtxSynchronize",
    "cuMemGetInfo_v2",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemHostAlloc",
    "cuMemFreeHost",
    "cuMemcpyHtoD_v2",
    "cuMemcpyDtoH_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuMemsetD8Async",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
    "cuStreamBeginCapture_v2",
    "cuStreamEndCapture",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventRecord",
    "cuEventQuery",
    "cuEventSynchronize",
    "cuEventElapsedTime",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuModuleGetFunction",
    "cuFuncSetAttribute",
    "cuLaunchKernel",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuTensorMapEncodeTiled",
];

/// One GPU, with its primary context retained.
#[derive(Debug)]
pub struct Gpu {
    device: sys::CUdevice,
    context: sys::CUcontext,
    name: String,
    compute_capability: (u32, u32),
    driver_version: u32,
    multiprocessors: u32,
    modules: Mutex<Vec<(ModuleKey, Arc<RawModule>)>>,
    cubins: Mutex<Option<PathBuf>>,
}

type ModuleKey = (String, Vec<String>);

// SAFETY: a context handle may be used from any thread that makes it current, which every method does.
unsafe impl Send for Gpu {}
// SAFETY: as above; the driver locks what it shares.
unsafe impl Sync for Gpu {}

/// Kernel text for [`Gpu::load`].
#[derive(Clone, Debug)]
pub struct Source {
    /// Its file name.
    pub name: &'static str,
    /// The CUDA C++ text; includes nothing.
    pub text: Cow<'static, str>,
    /// Options for the compiler, such as `-DN=3`.
    pub options: Vec<String>,
    /// Compiled for the GPU's own feature set (`sm_90a`), which runs on no other.
    pub arch_specific: bool,
}

#[derive(Debug)]
struct RawModule {
    module: sys::CUmodule,
}

// SAFETY: module handles are used under a current context only.
unsafe impl Send for RawModule {}
// SAFETY: as above.
unsafe impl Sync for RawModule {}

/// Compiled kernels on a GPU.
#[derive(Clone, Debug)]
pub struct Module {
    gpu: Arc<Gpu>,
    raw: Arc<RawModule>,
}

/// One kernel.
#[derive(Clone, Debug)]
pub struct Function {
    pub(super) function: sys::CUfunction,
    /// Keeps the module loaded.
    _module: Module,
}

// SAFETY: function handles are used under a current context only.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// The driver's library, with every function that will be called.
fn driver() -> Result<(), GpuError> {
    // SAFETY: only opens the library; its initialisers have no precondition.
    if !unsafe { sys::is_culib_present() } {
        return Err(GpuError::LibraryAbsent { library: "the NVIDIA driver", tried: "libcuda.so, libcuda.so.1".into() });
    }
    // SAFETY: present, as just seen, so this does not panic.
    let library = unsafe { sys::culib() };
    for symbol in DRIVER_FUNCTIONS {
        // SAFETY: the symbol is looked up and not called.
        if unsafe { library.get::<*const ()>(symbol.as_bytes()) }.is_err() {
            return Err(GpuError::Symbol { library: "the NVIDIA driver", symbol });
        }
    }
    Ok(())
}

impl Gpu {
    /// Opens GPU `ordinal`.
    ///
    /// # Errors
    /// [`GpuError::LibraryAbsent`] without a driver, [`GpuError::Symbol`] with one older than CUDA 12.0,
    /// [`GpuError::NoDevice`], [`GpuError::Driver`].
    pub fn open(ordinal: usize) -> Result<Arc<Self>, GpuError> {
        driver()?;
        result::init().map_err(GpuError::driver("initialise the driver"))?;
        let count = result::device::get_count().map_err(GpuError::driver("count GPUs"))?.max(0) as usize;
        if ordinal >= count {
            return Err(GpuError::NoDevice { ordinal, count });
        }
        let device = result::device::get(ordinal as i32).map_err(GpuError::driver("open the GPU"))?;
        let name = result::device::get_name(device).map_err(GpuError::driver("ask the GPU's name"))?;
        let attribute = |which| {
            // SAFETY: the device was given by the driver.
            unsafe { result::device::get_attribute(device, which) }
                .map(|v| v.max(0) as u32)
                .map_err(GpuError::driver("ask the GPU's attributes"))
        };
        let compute_capability = (
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        let multiprocessors = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let mut version = 0;
        // SAFETY: the pointer is valid for writing.
        unsafe { sys::cuDriverGetVersion(&mut version) }
            .result()
            .map_err(GpuError::driver("ask the driver's version"))?;
        // SAFETY: the device was given by the driver; released on drop.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(GpuError::driver("open a context"))?;
        let gpu = Self {
            device,
            context,
            name,
            compute_capability,
            driver_version: version.max(0) as u32,
            multiprocessors,
            modules: Mutex::new(Vec::new()),
            cubins: Mutex::new(None),
        };
        gpu.bind()?;
        Ok(Arc::new(gpu))
    }

    /// Makes the context current on this thread.
    ///
    /// # Errors
    /// [`GpuError::Driver`].
    pub fn bind(&self) -> Result<(), GpuError> {
        // SAFETY: the context is retained as long as `self` lives.
        unsafe { result::ctx::set_current(self.context) }.map_err(GpuError::driver("select the GPU"))
    }

    /// The product's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Major and minor compute capability.
    pub fn compute_capability(&self) -> (u32, u32) {
        self.compute_capability
    }

    /// Newest CUDA version that the driver knows: 1000 a major, 10 a minor.
    pub fn driver_version(&self) -> u32 {
        self.driver_version
    }

    /// Multiprocessors.
    pub fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    /// Free and total bytes.
    ///
    /// # Errors
    /// [`GpuError::Driver`].
    pub fn memory(&self) -> Result<(usize, usize), GpuError> {
        self.bind()?;
        result::mem_get_info().map_err(GpuError::driver("ask for free GPU memory"))
    }

    /// Waits for all work on the GPU.
    ///
    /// # Errors
    /// [`GpuError::Driver`], also for a fault of work done earlier.
    pub fn synchronize(&self) -> Result<(), GpuError> {
        self.bind()?;
        result::ctx::synchronize().map_err(GpuError::driver("wait for the GPU"))
    }

    /// The compiler's name of this GPU's architecture.
    pub fn arch(&self, specific: bool) -> String {
        let (major, minor) = self.compute_capability;
        format!("{major}{minor}{}", if specific { "a" } else { "" })
    }

    /// Keeps what is compiled from now on in files in `folder`, and takes it from there: a machine that has them needs no
    /// compiler. A folder that cannot be written is no error.
    pub fn keep_cubins(&self, folder: &Path) {
        *self.cubins.lock().unwrap_or_else(PoisonError::into_inner) = Some(folder.to_path_buf());
    }

    /// Compiles `source` for this GPU and loads it. Kept in memory: the same source and options are compiled once.
    ///
    /// # Errors
    /// [`GpuError::LibraryAbsent`] without NVRTC, [`GpuError::Compile`], [`GpuError::Driver`].
    pub fn load(self: &Arc<Self>, source: &Source) -> Result<Module, GpuError> {
        let key = (source.name.to_owned(), source.options.clone());
        let loaded = |raw: &Arc<RawModule>| Module { gpu: Arc::clone(self), raw: Arc::clone(raw) };
        let modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, raw)) = modules.iter().find(|(k, _)| *k == key) {
            return Ok(loaded(raw));
        }
        drop(modules);
        // Not under the lock: several threads may compile at once. Two that compile the same load it twice, and one of
        // the two is unloaded with the other at the end.
        let arch = self.arch(source.arch_specific);
        let folder = self.cubins.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let file = folder.map(|f| cubins::path(&f, source, &arch));
        let cubin = match file.as_deref().and_then(cubins::load) {
            Some(cubin) => cubin,
            None => {
                let nvrtc = Nvrtc::open()?;
                let cubin = nvrtc.compile(source.name, &source.text, &arch, &source.options, Product::Cubin)?;
                if let Some(file) = &file {
                    cubins::store(file, &cubin);
                }
                cubin
            }
        };
        self.bind()?;
        // SAFETY: the image is a whole cubin, which carries its own length; the driver copies it.
        let module =
            unsafe { result::module::load_data(cubin.as_ptr().cast()) }.map_err(GpuError::driver("load kernels"))?;
        let raw = Arc::new(RawModule { module });
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        modules.push((key, Arc::clone(&raw)));
        Ok(loaded(&raw))
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        if self.bind().is_err() {
            return;
        }
        let modules = self.modules.get_mut().unwrap_or_else(PoisonError::into_inner);
        for (_, raw) in modules.drain(..) {
            // SAFETY: functions hold the Gpu alive through their module, so nothing uses it any more.
            let _ = unsafe { result::module::unload(raw.module) };
        }
        // SAFETY: retained once in `open`, released once here.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

impl Module {
    /// The kernel `name`, with room for `shared_bytes` of dynamic shared memory a block.
    ///
    /// # Errors
    /// [`GpuError::Driver`]: no such kernel, or more shared memory than a block may have.
    pub fn function(&self, name: &str, shared_bytes: usize) -> Result<Function, GpuError> {
        self.gpu.bind()?;
        let text = CString::new(name).map_err(|_| GpuError::Unsupported {
            what: "kernel name",
            expected: "no zero byte".into(),
            got: name.escape_debug().to_string(),
        })?;
        // SAFETY: the module is loaded and stays so as long as `self` lives.
        let function = unsafe { result::module::get_function(self.raw.module, text) }
            .map_err(GpuError::driver("find a kernel"))?;
        if shared_bytes > 0 {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function belongs to the loaded module.
            unsafe { result::function::set_function_attribute(function, attribute, shared_bytes as i32) }
                .map_err(GpuError::driver("reserve shared memory for a kernel"))?;
        }
        Ok(Function { function, _module: self.clone() })
    }

    /// The GPU it is loaded on.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_driver_gets_a_typed_error() {
        match Gpu::open(0) {
            Ok(gpu) => assert!(!gpu.name().is_empty()),
            Err(GpuError::LibraryAbsent { .. } | GpuError::Driver { .. } | GpuError::NoDevice { .. }) => {}
            Err(other) => panic!("{other}"),
        }
        match Gpu::open(usize::MAX) {
            Ok(_) => panic!("opened a GPU that cannot be there"),
            Err(GpuError::LibraryAbsent { .. } | GpuError::Driver { .. } | GpuError::NoDevice { .. }) => {}
            Err(other) => panic!("{other}"),
        }
    }
}
