//! Streams, events, and graphs captured from a stream.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::result::{self, stream::StreamKind};
use cudarc::driver::sys;

use super::{Element, Function, Gpu, GpuError, Pinned};

/// An order of work on a GPU.
#[derive(Debug)]
pub struct Stream {
    gpu: Arc<Gpu>,
    raw: sys::CUstream,
}

// SAFETY: stream handles may be used from any thread under a current context.
unsafe impl Send for Stream {}
// SAFETY: as above; the driver serialises calls.
unsafe impl Sync for Stream {}

impl Stream {
    /// A stream that does not wait for others.
    ///
    /// # Errors
    /// [`GpuError::Driver`].
    pub fn new(gpu: &Arc<Gpu>) -> Result<Self, GpuError> {
        gpu.bind()?;
        let raw = result::stream::create(StreamKind::NonBlocking).map_err(GpuError::driver("open a stream"))?;
        Ok(Self { gpu: Arc::clone(gpu), raw })
    }

    /// The default stream, which other libraries in this process share.
    pub fn default_of(gpu: &Arc<Gpu>) -> Self {
        Self { gpu: Arc::clone(gpu), raw: std::ptr::null_mut() }
    }

    /// The driver's handle.
    pub fn raw(&self) -> sys::CUstream {
        self.raw
    }

    /// The GPU.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// Waits until all that was given to the stream is done.
    ///
    /// # Errors
    /// [`GpuError::Driver`], also for a fault of a kernel.
    pub fn synchronize(&self) -> Result<(), GpuError> {
        self.gpu.bind()?;
        // SAFETY: the stream is alive.
        unsafe { result::stream::synchronize(self.raw) }.map_err(GpuError::driver("wait for the stream"))
    }

    /// Starts a kernel.
    ///
    /// # Errors
    /// [`GpuError::Driver`]: a launch that the GPU refuses.
    ///
    /// # Safety
    /// `args` point to values of the kernel's parameter types, and what the kernel reads and writes is alive and used by
    /// nobody else until the stream has passed it.
    pub unsafe fn launch(
        &self,
        function: &Function,
        grid: [u32; 3],
        block: [u32; 3],
        shared_bytes: u32,
        args: &mut [*mut c_void],
    ) -> Result<(), GpuError> {
        self.gpu.bind()?;
        let (grid, block) = ((grid[0], grid[1], grid[2]), (block[0], block[1], block[2]));
        // SAFETY: passed on to the caller.
        unsafe { result::launch_kernel(function.function, grid, block, shared_bytes, self.raw, args) }
            .map_err(GpuError::driver("start a kernel"))
    }

    /// Later work of this stream waits for `event`.
    ///
    /// # Errors
    /// [`GpuError::Driver`].
    pub fn wait(&self, event: &Event) -> Result<(), GpuError> {
        self.gpu.bind()?;
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: both are alive.
        unsafe { result::stream::wait_event(self.raw, event.raw, flags) }.map_err(GpuError::driver("wait for an event"))
    }

    /// `event` happens when all that was given to the stream so far is done.
    ///
    /// # Errors
    /// [`GpuError::Driver`].
    pub fn record(&self, event: &Event) -> Result<(), GpuError> {
        self.gpu.bind()?;
        // SAFETY: both are alive.
        unsafe { result::event::record(event.raw, self.raw) }.map_err(GpuError::driver("record an event"))
    }

    /// Copies the first `count` elements of `from` to `to`, in order, without waiting.
    ///
    /// # Errors
    /// [`GpuError::Driver`].
    ///
    /// # Panics
    /// When `count` exceeds `from`.
    ///
    /// # Safety
    /// `to` has room; `from` is neither changed nor dropped, nor the target freed, before the stream has passed the copy.
    pub unsafe fn upload<T: Element>(&self, to: u64, from: &Pinned<T>, count: usize) -> Result<(), GpuError> {
        self.gpu.bind()?;
        // SAFETY: passed on to the caller.
        unsafe { result::memcpy_htod_async(to, &from[..count], self.raw) }.map_err(GpuError::driver("copy to the GPU"))
    }

    /// Copies `count` elements from `from` to the start of `to`, in order, without waiting.
    ///
    /// # Errors
    /// [`GpuError::Driver`].
    ///
    /// # Panics
    /// When `count` exceeds `to`.
    ///
    /// # Safety
    /// `from` has as many; `to` is neither read nor dropped before the stream has passed the copy.
    pub unsafe fn download<T: Element>(&self, to: &mut Pinned<T>, from: u64, count: usize) -> Result<(), GpuError> {
        self.gpu.bind()?;
        // SAFETY: passed on to the caller.
        unsafe { result::memcpy_dtoh_async(&mut to[..count], from, self.raw) }
            .map_err(GpuError::driver("copy from the GPU"))
    }

    /// Sets `bytes` bytes from `to` on to `value`, in order, without waiting.
    ///
    /// # Errors
    /// [`GpuError::Driver`].
    ///
    /// # Safety
    /// As [`launch`](Self::launch), for the bytes named.
    pub unsafe fn fill(&self, to: u64, value: u8, bytes: usize) -> Result<(), GpuError> {
        self.gpu.bind()?;
        // SAFETY: passed on to the caller.
        unsafe { result::memset_d8_async(to, value, bytes, self.raw) }.map_err(GpuError::driver("fill GPU memory"))
    }

    /// Records what `work` gives to this stream as a graph, without doing it.
    ///
    /// # Errors
    /// The error of `work`; [`GpuError::Driver`].
    pub fn capture<E: From<GpuError>>(&self, work: impl FnOnce() -> Result<(), E>) -> Result<Graph, E> {
        self.gpu.bind()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive and not capturing: capture is begun here alone, and ended below.
        unsafe { result::stream::begin_capture(self.raw, mode) }.map_err(GpuError::driver("begin a graph"))?;
        let done = work();
        // SAFETY: begun above.
        let graph = unsafe { result::stream::end_capture(self.raw) }.map_err(GpuError::driver("end a graph"));
        if let Err(error) = done {
            if let Ok(graph) = graph
                && !graph.is_null()
            {
                // SAFETY: as the driver just gave it; nobody else has it.
                let _ = unsafe { result::graph::destroy(graph) };
            }
            return Err(error);
        }
        let graph = graph?;
        let mut exec = std::ptr::null_mut();
        // SAFETY: a whole graph, as the driver just gave it; the pointer is valid for writing.
        let made = unsafe { sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0) }
            .result()
            .map_err(GpuError::driver("prepare a graph"));
        // SAFETY: the executable graph does not need it any more.
        let _ = unsafe { result::graph::destroy(graph) };
        made?;
        Ok(Graph { gpu: Arc::clone(&self.gpu), exec })
    }

    /// Does what `graph` recorded.
    ///
    /// # Errors
    /// [`GpuError::Driver`].
    ///
    /// # Safety
    /// All memory that the recorded work names is alive, as in [`launch`](Self::launch).
    pub unsafe fn replay(&self, graph: &Graph) -> Result<(), GpuError> {
        self.gpu.bind()?;
        // SAFETY: passed on to the caller; both are alive.
        unsafe { result::graph::launch(graph.exec, self.raw) }.map_err(GpuError::driver("start a graph"))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // The default stream is nobody's.
        if !self.raw.is_null() && self.gpu.bind().is_ok() {
            // SAFETY: made in `new`, destroyed once; the driver finishes what it was given.
            let _ = unsafe { result::stream::destroy(self.raw) };
        }
    }
}

/// A point in a stream's order.
#[derive(Debug)]
pub struct Event {
    gpu: Arc<Gpu>,
    raw: sys::CUevent,
}

// SAFETY: as for streams.
unsafe impl Send for Event {}
// SAFETY: as for streams.
unsafe impl Sync for Event {}

impl Event {
    /// An event without time.
    ///
    /// # Errors
    /// [`GpuError::Driver`].
    pub fn new(gpu: &Arc<Gpu>) -> Result<Self, GpuError> {
        Self::with_flags(gpu, sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
    }

    /// An event that keeps its time.
    ///
    /// # Errors
    /// [`GpuError::Driver`].
    pub fn timed(gpu: &Arc<Gpu>) -> Result<Self, GpuError> {
        Self::with_flags(gpu, sys::CUevent_flags::CU_EVENT_DEFAULT)
    }

    fn with_flags(gpu: &Arc<Gpu>, flags: sys::CUevent_flags) -> Result<Self, GpuError> {
        gpu.bind()?;
        let raw = result::event::create(flags).map_err(GpuError::driver("make an event"))?;
        Ok(Self { gpu: Arc::clone(gpu), raw })
    }

    /// The driver's handle.
    pub fn raw(&self) -> sys::CUevent {
        self.raw
    }

    /// Whether it happened. An event never recorded has.
    ///
    /// # Errors
    /// [`GpuError::Driver`]: a fault of the work before it.
    pub fn is_done(&self) -> Result<bool, GpuError> {
        self.gpu.bind()?;
        // SAFETY: the event is alive.
        match unsafe { result::event::query(self.raw) } {
            Ok(()) => Ok(true),
            Err(error) if error.0 == sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            Err(error) => Err(GpuError::driver("ask for an event")(error)),
        }
    }

    /// Waits until it happened.
    ///
    /// # Errors
    /// [`GpuError::Driver`].
    pub fn synchronize(&self) -> Result<(), GpuError> {
        self.gpu.bind()?;
        // SAFETY: the event is alive.
        unsafe { result::event::synchronize(self.raw) }.map_err(GpuError::driver("wait for an event"))
    }

    /// Milliseconds from `earlier` to this one; both timed and done.
    ///
    /// # Errors
    /// [`GpuError::Driver`].
    pub fn since_ms(&self, earlier: &Self) -> Result<f32, GpuError> {
        self.gpu.bind()?;
        // SAFETY: both are alive.
        unsafe { result::event::elapsed(earlier.raw, self.raw) }.map_err(GpuError::driver("read a time"))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.gpu.bind().is_ok() {
            // SAFETY: made once, destroyed once.
            let _ = unsafe { result::event::destroy(self.raw) };
        }
    }
}

/// Work recorded by [`Stream::capture`].
#[derive(Debug)]
pub struct Graph {
    gpu: Arc<Gpu>,
    exec: sys::CUgraphExec,
}

// SAFETY: a graph is launched under a current context; launches of one graph are serialised by the driver.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.gpu.bind().is_ok() {
            // SAFETY: made once, destroyed once.
            let _ = unsafe { result::graph::exec_destroy(self.exec) };
        }
    }
}
