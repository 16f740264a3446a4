//! The GPU as this backend needs it: a context, a stream, buffers, a recorded graph.
//!
//! Input: a device number, sizes. Output: [`Device`], [`Buffer`], [`Staging`], [`Stream`], [`Graph`], or a
//! [`DeviceError`]. Through `cudarc`'s raw driver functions, opened at run time.
//!
//! Invariants: nothing of the driver is called before its library was found and `cuInit` succeeded, so that an absent
//! driver is an error and never a panic. The device's primary context is used, which TensorRT uses too, and is made
//! current in the calling thread by each entry. What is allocated is freed once, while the context is still held.
//!
//! Deliberately absent: kernels, and any order of work beyond one stream.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr::NonNull;
use std::sync::Arc;

use cudarc::driver::{DriverError, result, sys};

/// Where the kernel module says its version.
const DRIVER_VERSION_FILE: &str = "/sys/module/nvidia/version";
/// Bound on that file, bytes.
const MAX_VERSION_TEXT: usize = 64;

/// Why the GPU cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// The driver's library is not there.
    #[error("no NVIDIA driver: libcuda.so.1 was not found")]
    NoDriver,
    /// The driver is there and does not start.
    #[error("the NVIDIA driver does not start: {0}")]
    Init(String),
    /// It has no such device.
    #[error("the NVIDIA driver has {count} devices, none numbered {ordinal}")]
    NoDevice {
        /// How many.
        count: i32,
        /// Which was asked for.
        ordinal: usize,
    },
    /// A call failed.
    #[error("GPU: {action}: {reason}")]
    Call {
        /// Which.
        action: &'static str,
        /// What the driver said.
        reason: String,
    },
}

/// What identifies a GPU and its driver in a plan's key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its name.
    pub name: String,
    /// Compute capability, major and minor.
    pub compute_capability: String,
    /// Version of the driver and of the CUDA interface it has.
    pub driver: String,
}

fn text(error: DriverError) -> String {
    let mut name: *const c_char = std::ptr::null();
    // SAFETY: the driver is loaded, or there would be no error of its; a place for one pointer.
    let known = unsafe { sys::cuGetErrorName(error.0, &raw mut name) };
    if known != sys::CUresult::CUDA_SUCCESS || name.is_null() {
        return format!("error {}", error.0 as u32);
    }
    // SAFETY: a C string of the driver's, which is constant.
    unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
}

/// Names the call in its error.
fn called<T>(action: &'static str, result: Result<T, DriverError>) -> Result<T, DeviceError> {
    result.map_err(|error| DeviceError::Call { action, reason: text(error) })
}

/// Whether the driver is there and starts.
///
/// # Errors
/// [`DeviceError::NoDriver`], [`DeviceError::Init`].
pub fn probe() -> Result<(), DeviceError> {
    // SAFETY: loads the driver's library, or not; nothing of it is called.
    if !unsafe { sys::is_culib_present() } {
        return Err(DeviceError::NoDriver);
    }
    result::init().map_err(|error| DeviceError::Init(text(error)))
}

/// A GPU whose primary context is held.
pub struct Device {
    context: sys::CUcontext,
    device: sys::CUdevice,
    info: DeviceInfo,
}

// SAFETY: a context may be current in several threads; the driver takes its own locks.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

impl Device {
    /// Holds device `ordinal`.
    ///
    /// # Errors
    /// No driver, no such device, no context.
    pub fn open(ordinal: usize) -> Result<Arc<Self>, DeviceError> {
        probe()?;
        let count = called("count devices", result::device::get_count())?;
        let number = c_int::try_from(ordinal).ok().filter(|n| *n < count);
        let Some(number) = number else { return Err(DeviceError::NoDevice { count, ordinal }) };
        let device = called("take a device", result::device::get(number))?;
        let name = called("name a device", result::device::get_name(device))?;
        let attribute = |which| {
            // SAFETY: a device the driver just gave.
            called("ask a device", unsafe { result::device::get_attribute(device, which) })
        };
        let major = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let info = DeviceInfo { name, compute_capability: format!("{major}.{minor}"), driver: driver_version()? };
        // SAFETY: a device the driver just gave; released in `drop`.
        let context = called("hold a device's context", unsafe { result::primary_ctx::retain(device) })?;
        let device = Arc::new(Self { context, device, info });
        device.bind()?;
        Ok(device)
    }

    /// What it is.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// Makes the context current in this thread.
    ///
    /// # Errors
    /// The driver's.
    pub fn bind(&self) -> Result<(), DeviceError> {
        // SAFETY: a context that is held.
        called("make the context current", unsafe { result::ctx::set_current(self.context) })
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: held since `open`. An error here leaves the context held, which harms nothing.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

fn driver_version() -> Result<String, DeviceError> {
    let mut cuda: c_int = 0;
    // SAFETY: the driver is loaded; a place for one number.
    let asked = unsafe { sys::cuDriverGetVersion(&raw mut cuda) };
    called("ask the driver's version", asked.result())?;
    let cuda = format!("CUDA {}.{}", cuda / 1000, cuda % 1000 / 10);
    // In a container without it the interface's version stands alone.
    let module = std::fs::read_to_string(DRIVER_VERSION_FILE).unwrap_or_default();
    let module: String = module.trim().chars().take(MAX_VERSION_TEXT).collect();
    Ok(if module.is_empty() { cuda } else { format!("{module} ({cuda})") })
}

/// Memory of the GPU.
pub struct Buffer {
    address: sys::CUdeviceptr,
    bytes: usize,
    device: Arc<Device>,
}

impl Buffer {
    /// Room for `values` f32.
    ///
    /// # Errors
    /// No room.
    pub fn new(device: &Arc<Device>, values: usize) -> Result<Self, DeviceError> {
        device.bind()?;
        let bytes = values * size_of::<f32>();
        // SAFETY: the context is current; freed in `drop`.
        let address = called("allocate memory", unsafe { result::malloc_sync(bytes) })?;
        Ok(Self { address, bytes, device: Arc::clone(device) })
    }

    /// Where it lies.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: allocated in `new`, freed here alone.
            let _ = unsafe { result::free_sync(self.address) };
        }
    }
}

/// Page-locked memory of the host, which the GPU reads and writes by itself.
pub struct Staging {
    values: NonNull<f32>,
    len: usize,
    device: Arc<Device>,
}

// SAFETY: plain memory with one owner.
unsafe impl Send for Staging {}

impl Staging {
    /// Room for `len` f32, zero.
    ///
    /// # Errors
    /// No room.
    pub fn new(device: &Arc<Device>, len: usize) -> Result<Self, DeviceError> {
        device.bind()?;
        // SAFETY: the context is current; freed in `drop`.
        let memory = called("lock memory", unsafe { result::malloc_host(len * size_of::<f32>(), 0) })?;
        let values = NonNull::new(memory.cast::<f32>())
            .ok_or_else(|| DeviceError::Call { action: "lock memory", reason: "none was given".to_owned() })?;
        // SAFETY: `len` f32 just allocated; page-locked memory is aligned to a page.
        unsafe { std::ptr::write_bytes(values.as_ptr(), 0, len) };
        Ok(Self { values, len, device: Arc::clone(device) })
    }

    /// Its values.
    ///
    /// The caller must have waited for the stream that writes it.
    pub fn values(&self) -> &[f32] {
        // SAFETY: `len` initialised f32.
        unsafe { std::slice::from_raw_parts(self.values.as_ptr(), self.len) }
    }

    /// Its values, to be written.
    pub fn values_mut(&mut self) -> &mut [f32] {
        // SAFETY: `len` initialised f32, borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.values.as_ptr(), self.len) }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: allocated in `new`, freed here alone.
            let _ = unsafe { result::free_host(self.values.as_ptr().cast()) };
        }
    }
}

/// A queue of work.
pub struct Stream {
    raw: sys::CUstream,
    device: Arc<Device>,
}

// SAFETY: a stream may be used from any thread; it has one owner here.
unsafe impl Send for Stream {}

impl Stream {
    /// A stream that waits for no other.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(device: &Arc<Device>) -> Result<Self, DeviceError> {
        device.bind()?;
        let raw = called("make a stream", result::stream::create(result::stream::StreamKind::NonBlocking))?;
        Ok(Self { raw, device: Arc::clone(device) })
    }

    /// For the library's interface.
    pub fn as_ptr(&self) -> *mut c_void {
        self.raw.cast()
    }

    /// Copies to the GPU when its turn comes.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// When the sizes differ.
    ///
    /// # Safety
    /// Both must live, and `from` must not be written, until [`Self::wait`] has returned.
    pub unsafe fn upload(&self, from: &Staging, to: &Buffer) -> Result<(), DeviceError> {
        assert_eq!(size_of_val(from.values()), to.bytes, "staging and buffer have one size");
        // SAFETY: memory of this size on both sides; the rest is the caller's promise.
        called("copy to the GPU", unsafe { result::memcpy_htod_async(to.address, from.values(), self.raw) })
    }

    /// Copies from the GPU when its turn comes.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// When the sizes differ.
    ///
    /// # Safety
    /// Both must live, and `to` must not be read, until [`Self::wait`] has returned.
    pub unsafe fn download(&self, from: &Buffer, to: &mut Staging) -> Result<(), DeviceError> {
        assert_eq!(size_of_val(to.values()), from.bytes, "staging and buffer have one size");
        // SAFETY: memory of this size on both sides; the rest is the caller's promise.
        called("copy from the GPU", unsafe { result::memcpy_dtoh_async(to.values_mut(), from.address, self.raw) })
    }

    /// Waits until everything put on it is done.
    ///
    /// # Errors
    /// What any of it met.
    pub fn wait(&self) -> Result<(), DeviceError> {
        // SAFETY: a stream that lives.
        called("wait for the GPU", unsafe { result::stream::synchronize(self.raw) })
    }

    /// Records what `work` puts on it, without doing it.
    ///
    /// # Errors
    /// Work that cannot be recorded; the stream is then as before.
    pub fn record<E: From<DeviceError>>(&self, work: impl FnOnce() -> Result<(), E>) -> Result<Graph, E> {
        self.device.bind()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: a stream that lives, and that nothing is being recorded on.
        called("begin a recording", unsafe { result::stream::begin_capture(self.raw, mode) })?;
        let worked = work();
        // SAFETY: the recording begun above, ended whatever became of it.
        let ended = called("end a recording", unsafe { result::stream::end_capture(self.raw) });
        let graph = match (worked, ended) {
            (Ok(()), Ok(graph)) => graph,
            (Ok(()), Err(error)) => return Err(error.into()),
            (Err(error), ended) => {
                if let Ok(graph) = ended
                    && !graph.is_null()
                {
                    // SAFETY: a graph just made, used by nothing.
                    let _ = unsafe { result::graph::destroy(graph) };
                }
                return Err(error);
            }
        };
        // SAFETY: a graph just made.
        let executable = called("prepare a recording", unsafe {
            result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0))
        });
        // SAFETY: the executable form does not need it; used by nothing else.
        let _ = unsafe { result::graph::destroy(graph) };
        Ok(Graph { raw: executable?, device: Arc::clone(&self.device) })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: made in `new`, destroyed here alone.
            let _ = unsafe { result::stream::destroy(self.raw) };
        }
    }
}

/// Recorded work, launched as one.
pub struct Graph {
    raw: sys::CUgraphExec,
    device: Arc<Device>,
}

// SAFETY: an executable graph may be launched from any thread; it has one owner here.
unsafe impl Send for Graph {}

impl Graph {
    /// Puts the work on `stream`.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Safety
    /// The buffers it was recorded with must live until it is done.
    pub unsafe fn launch(&self, stream: &Stream) -> Result<(), DeviceError> {
        // SAFETY: a graph and a stream that live; the buffers are the caller's promise.
        called("launch a recording", unsafe { result::graph::launch(self.raw, stream.raw) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: made in `record`, destroyed here alone.
            let _ = unsafe { result::graph::exec_destroy(self.raw) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_driver_opening_is_an_error_and_no_panic() {
        // SAFETY: loads the driver's library, or not.
        if unsafe { sys::is_culib_present() } {
            // A machine with a driver: whatever it answers, it answers.
            assert!(Device::open(usize::MAX).is_err());
            return;
        }
        assert_eq!(probe(), Err(DeviceError::NoDriver));
        assert!(matches!(Device::open(0), Err(DeviceError::NoDriver)));
    }
}
