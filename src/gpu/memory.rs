//! Device memory and page-locked host memory, freed on drop.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use cudarc::driver::result;

use super::{Gpu, GpuError};

/// Bytes on the GPU, not initialised.
#[derive(Debug)]
pub struct DeviceBuffer {
    gpu: Arc<Gpu>,
    ptr: u64,
    len: usize,
}

impl DeviceBuffer {
    /// Takes `bytes` (at least one), aligned to 256.
    ///
    /// # Errors
    /// [`GpuError::Memory`].
    pub fn new(gpu: &Arc<Gpu>, bytes: usize) -> Result<Self, GpuError> {
        gpu.bind()?;
        // SAFETY: the context is current; freed once, on drop.
        let ptr = unsafe { result::malloc_sync(bytes.max(1)) }.map_err(|error| GpuError::Memory {
            bytes,
            name: error.error_name().map_or_else(|_| format!("{error:?}"), |n| n.to_string_lossy().into_owned()),
        })?;
        Ok(Self { gpu: Arc::clone(gpu), ptr, len: bytes })
    }

    /// Takes as many bytes as `values` has and copies it there.
    ///
    /// # Errors
    /// [`GpuError::Memory`], [`GpuError::Driver`].
    pub fn holding<T: Element>(gpu: &Arc<Gpu>, values: &[T]) -> Result<Self, GpuError> {
        let buffer = Self::new(gpu, size_of_val(values))?;
        if !values.is_empty() {
            // SAFETY: the buffer has the size of `values`, and the copy is done when the call returns.
            unsafe { result::memcpy_htod_sync(buffer.ptr, values) }.map_err(GpuError::driver("copy to the GPU"))?;
        }
        Ok(buffer)
    }

    /// Its address on the GPU.
    pub fn ptr(&self) -> u64 {
        self.ptr
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Waits for the GPU and copies the first elements out.
    ///
    /// # Errors
    /// [`GpuError::Driver`].
    ///
    /// # Panics
    /// When `to` is longer than the buffer.
    pub fn read<T: Element>(&self, to: &mut [T]) -> Result<(), GpuError> {
        assert!(size_of_val(to) <= self.len, "read of a device buffer beyond its end");
        self.gpu.synchronize()?;
        if to.is_empty() {
            return Ok(());
        }
        // SAFETY: within the buffer, as asserted; any bits are an Element.
        unsafe { result::memcpy_dtoh_sync(to, self.ptr) }.map_err(GpuError::driver("copy from the GPU"))
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        if self.gpu.bind().is_ok() {
            // SAFETY: taken in `new`, freed once. The driver waits for work that uses it.
            let _ = unsafe { result::free_sync(self.ptr) };
        }
    }
}

mod sealed {
    pub trait Sealed {}
}

/// Values for which any bits are valid.
pub trait Element: Copy + Send + Sync + 'static + sealed::Sealed {}

macro_rules! element {
    ($($t:ty),*) => { $(impl sealed::Sealed for $t {} impl Element for $t {})* };
}
element!(u8, i16, u16, i32, u32, u64, f32, half::f16);

/// Page-locked host memory: copies from it are asynchronous.
#[derive(Debug)]
pub struct Pinned<T: Element> {
    gpu: Arc<Gpu>,
    ptr: *mut T,
    len: usize,
    _values: PhantomData<T>,
}

// SAFETY: owns its memory like a Box.
unsafe impl<T: Element> Send for Pinned<T> {}
// SAFETY: shared references only read.
unsafe impl<T: Element> Sync for Pinned<T> {}

impl<T: Element> Pinned<T> {
    /// `len` elements, zeroed.
    ///
    /// # Errors
    /// [`GpuError::Driver`]: no memory that can be locked.
    pub fn new(gpu: &Arc<Gpu>, len: usize) -> Result<Self, GpuError> {
        gpu.bind()?;
        let bytes = (len * size_of::<T>()).max(1);
        // SAFETY: the context is current; freed once, on drop.
        let ptr = unsafe { result::malloc_host(bytes, 0) }.map_err(GpuError::driver("lock host memory"))?;
        // SAFETY: just taken, `bytes` long, page-aligned.
        unsafe { ptr.cast::<u8>().write_bytes(0, bytes) };
        Ok(Self { gpu: Arc::clone(gpu), ptr: ptr.cast(), len, _values: PhantomData })
    }
}

impl<T: Element> Deref for Pinned<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `len` elements, initialised in `new`; any bits are an Element.
        unsafe { std::slice::from_raw_parts(self.ptr, self.len) }
    }
}

impl<T: Element> DerefMut for Pinned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.len) }
    }
}

impl<T: Element> Drop for Pinned<T> {
    fn drop(&mut self) {
        if self.gpu.bind().is_ok() {
            // SAFETY: taken in `new`, freed once. Copies in flight were waited for by whoever started them, which is
            // the contract of `Stream::upload` and `Stream::download`.
            let _ = unsafe { result::free_host(self.ptr.cast()) };
        }
    }
}
