//! Resampling on an NVIDIA GPU: a slice goes up when it arrives and becomes a plane there; the planes become the
//! network's input without coming back.
//!
//! ```text
//! resample worker:   HU of a slot -> pinned buffer -> (stream of the buffer) copy, in_plane_f32 -> device plane
//! inference worker:  (stream of the network) wait for the planes, gather_f32 -> device address of the input,
//!                    texture_f32 -> twelve sums -> pinned buffer
//! ```
//!
//! Input and weights are those of [`super::cpu`] ([`InPlanePlan`], [`DepthPlan`]), the sums run in the same order without
//! fused multiply-adds, so a plane and a gathered volume have the same bits as on the processor. That is what allows a
//! series to be judged from device planes, from planes in memory, or from HU again, with one result, and it is why
//! nothing is added up as slices arrive: the weights along depth depend on slices still to come, and a sum in the order
//! of arrival would not be the same twice.
//!
//! Invariants: everything on the device is taken when a [`GpuResampler`] is made (a fixed pool of planes, [`STAGES`]
//! staging buffers of [`MAX_PIXELS`]); a plane returns to its pool when its last holder drops it, and work of its next
//! owner is ordered after work of the last; nobody holds a lock.
//!
//! Deliberately absent: tilted series, whose in-plane plan differs from slice to slice once all are there, and slices
//! beyond [`MAX_PIXELS`]: they take the processor's path.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam_channel::{Receiver, Sender, bounded};

use super::cpu::Window;
use super::plan::{Axis, DepthPlan, InPlanePlan};
use super::texture::{CLIP, LEVELS, SUMS, Texture};
use crate::gpu::{DeviceBuffer, Event, Function, Gpu, GpuError, Pinned, Source, Stream};

/// Staging buffers. A slice occupies one for the 25 us of its copy and the kernel behind it; eight let every core of a
/// workstation hand over a slice at once. With [`MAX_PIXELS`] they hold 16 MiB of locked memory and as much on the device.
pub const STAGES: usize = 8;
/// Largest slice that goes the device's way, pixels: 1024 x 1024. Scanners reconstruct 512 x 512 and at most this.
pub const MAX_PIXELS: usize = 1 << 20;
/// Longest side of such a slice: tables are bounded by it.
const MAX_SIDE: usize = 4096;
/// Threads a block.
const BLOCK: [u32; 2] = [32, 8];
const GATHER_BLOCK: u32 = 256;
/// Threads a block that measure texture, along W.
const TEXTURE_BLOCK: u32 = 64;
/// Rows that one of them looks at.
const TEXTURE_ROWS: u32 = 16;
/// Most launches along the second axis of a grid.
const MAX_GRID_Y: usize = 65_535;

/// The kernels.
pub fn source() -> Source {
    Source {
        name: "resample.cu",
        text: include_str!("kernels.cu").into(),
        // Multiplications and additions stay apart.
        options: vec!["--fmad=false".to_owned()],
        arch_specific: false,
    }
}

/// The table of an [`InPlanePlan`] as `in_plane_f32` reads it: see `kernels.cu`.
pub fn pack_in_plane(plan: &InPlanePlan, words: &mut Vec<u32>) {
    let (rows, columns) = plan.stored_axes();
    let [_, out_w] = plan.out_hw();
    let (along_rows, along_columns) = if plan.orientation().transpose { (1, out_w) } else { (out_w, 1) };
    words.clear();
    words.extend([axis_words(rows) as u32, along_rows as u32, along_columns as u32, plan.columns()]);
    pack_axis(rows, words);
    pack_axis(columns, words);
}

fn axis_words(axis: &Axis) -> usize {
    let outputs = axis.outputs();
    2 + outputs + outputs + 1 + (0..outputs).map(|o| axis.taps(o).1.len()).sum::<usize>()
}

fn pack_axis(axis: &Axis, words: &mut Vec<u32>) {
    let outputs = axis.outputs();
    let step: i32 = if axis.is_flipped() { -1 } else { 1 };
    words.extend([outputs as u32, step as u32]);
    // An output without weights reads nothing; its first pixel may lie beyond the image.
    words.extend((0..outputs).map(|o| match axis.taps(o) {
        (_, []) => 0,
        (first, _) => axis.stored(first) as u32,
    }));
    let mut bound = 0u32;
    words.push(bound);
    for o in 0..outputs {
        bound += axis.taps(o).1.len() as u32;
        words.push(bound);
    }
    words.extend((0..outputs).flat_map(|o| axis.taps(o).1).map(|w| w.to_bits()));
}

/// The table of a [`DepthPlan`] as `gather_f32` reads it: see `kernels.cu`.
pub fn pack_depth(plan: &DepthPlan, words: &mut Vec<u32>) {
    words.clear();
    let total: usize = (0..plan.planes()).map(|p| plan.plane_weights(p).0.len()).sum();
    words.extend([plan.planes() as u32, total as u32]);
    let mut bound = 0u32;
    words.push(bound);
    for p in 0..plan.planes() {
        bound += plan.plane_weights(p).0.len() as u32;
        words.push(bound);
    }
    words.extend((0..plan.planes()).flat_map(|p| plan.plane_weights(p).0));
    words.extend((0..plan.planes()).flat_map(|p| plan.plane_weights(p).1).map(|w| w.to_bits()));
}

/// Words that the table of any plan with this output takes.
fn max_in_plane_words([h, w]: [usize; 2]) -> usize {
    // An output has at most 2 * max(scale, 1) + 1 taps, and scale * outputs is at most the side.
    let axis = |outputs: usize| 3 + 2 * outputs + 2 * MAX_SIDE.max(outputs) + outputs;
    4 + axis(h) + axis(w)
}

/// The memory of one plane in the pool.
#[derive(Debug)]
struct Cell {
    ptr: u64,
    /// When what was last written to it is there.
    made: Event,
    /// Keeps the memory.
    _memory: Arc<DeviceBuffer>,
}

/// One in-plane resampled slice on the device, `H x W` f32, shared read-only; returns to its pool on drop.
#[derive(Clone, Debug)]
pub struct DevicePlane(Arc<OwnedPlane>);

#[derive(Debug)]
struct OwnedPlane {
    cell: Option<Cell>,
    home: Sender<Cell>,
    pool: Arc<PoolMark>,
}

/// Which pool a plane is of.
#[derive(Debug)]
struct PoolMark;

impl Drop for OwnedPlane {
    fn drop(&mut self) {
        if let Some(cell) = self.cell.take() {
            // The pool's capacity is the number of planes ever made, so this never blocks; a closed pool just frees.
            let _ = self.home.try_send(cell);
        }
    }
}

impl DevicePlane {
    /// Waits until the plane is made.
    ///
    /// # Errors
    /// [`GpuError::Driver`]: the work failed.
    pub fn wait(&self) -> Result<(), GpuError> {
        self.0.cell.as_ref().map_or(Ok(()), |cell| cell.made.synchronize())
    }
}

/// A pinned buffer with its place on the device and its own order of work.
struct Stage {
    host: Pinned<i16>,
    device: DeviceBuffer,
    words_host: Pinned<u32>,
    words_device: DeviceBuffer,
    /// The plan whose table is on the device.
    plan: Option<InPlanePlan>,
    /// The copies out of the pinned buffers are done.
    copied: Event,
    stream: Stream,
    words: Vec<u32>,
}

/// Resamples slices in-plane on a GPU. Shared by the resample workers.
pub struct GpuResampler {
    gpu: Arc<Gpu>,
    kernel: Function,
    window: Window,
    out_hw: [usize; 2],
    stages: (Sender<Stage>, Receiver<Stage>),
    planes: (Sender<Cell>, Receiver<Cell>),
    pool: Arc<PoolMark>,
    failed: AtomicBool,
}

impl std::fmt::Debug for GpuResampler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GpuResampler").field("out_hw", &self.out_hw).finish_non_exhaustive()
    }
}

impl GpuResampler {
    /// Takes all memory for `slots` planes of `out_hw`: `slots * h * w * 4` bytes and the staging buffers.
    ///
    /// # Errors
    /// [`GpuError`]: no compiler, no memory.
    ///
    /// # Panics
    /// When the window's width is not positive.
    pub fn new(gpu: Arc<Gpu>, window: Window, out_hw: [usize; 2], slots: usize) -> Result<Self, GpuError> {
        assert!(window.width_hu > 0.0, "window width must be positive");
        let kernel = gpu.load(&source())?.function("in_plane_f32", 0)?;
        let stages = bounded(STAGES);
        for _ in 0..STAGES {
            let words = max_in_plane_words(out_hw);
            let stage = Stage {
                host: Pinned::new(&gpu, MAX_PIXELS)?,
                device: DeviceBuffer::new(&gpu, MAX_PIXELS * size_of::<i16>())?,
                words_host: Pinned::new(&gpu, words)?,
                words_device: DeviceBuffer::new(&gpu, words * size_of::<u32>())?,
                plan: None,
                copied: Event::new(&gpu)?,
                stream: Stream::new(&gpu)?,
                words: Vec::with_capacity(words),
            };
            let _ = stages.0.try_send(stage);
        }
        // Planes begin at multiples of 256 bytes, as the device's own reservations do.
        let stride = (out_hw[0] * out_hw[1] * size_of::<f32>()).next_multiple_of(256);
        let memory = Arc::new(DeviceBuffer::new(&gpu, stride * slots.max(1))?);
        let planes = bounded(slots.max(1));
        for slot in 0..slots {
            let cell = Cell {
                ptr: memory.ptr() + (slot * stride) as u64,
                made: Event::new(&gpu)?,
                _memory: Arc::clone(&memory),
            };
            let _ = planes.0.try_send(cell);
        }
        Ok(Self {
            gpu,
            kernel,
            window,
            out_hw,
            stages,
            planes,
            pool: Arc::new(PoolMark),
            failed: AtomicBool::new(false),
        })
    }

    /// The device.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// Planes not in use.
    pub fn available(&self) -> usize {
        self.planes.1.len()
    }

    /// Whether [`resample`](Self::resample) failed. It is of no use then.
    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// Whether `plane` is of this pool.
    pub fn owns(&self, plane: &DevicePlane) -> bool {
        Arc::ptr_eq(&self.pool, &plane.0.pool)
    }

    /// Starts to make the plane of one stored slice and does not wait for it; `hu` is copied before the call returns.
    /// `None` when the pool is empty or the slice too large.
    ///
    /// # Errors
    /// [`GpuError::Driver`]: this call's work or work before it failed on the device.
    ///
    /// # Panics
    /// When `hu` does not fit the plan, or the plan not the pool's planes.
    pub fn resample(&self, plan: &InPlanePlan, hu: &[i16]) -> Result<Option<DevicePlane>, GpuError> {
        assert_eq!(hu.len(), plan.rows() as usize * plan.columns() as usize, "slice length");
        assert_eq!(plan.out_hw(), self.out_hw, "output size");
        if hu.len() > MAX_PIXELS || plan.rows().max(plan.columns()) as usize > MAX_SIDE || self.out_hw[0] > MAX_GRID_Y {
            return Ok(None);
        }
        let Ok(cell) = self.planes.1.try_recv() else { return Ok(None) };
        let plane = OwnedPlane { cell: Some(cell), home: self.planes.0.clone(), pool: Arc::clone(&self.pool) };
        // There is always one on its way back: nobody keeps a stage.
        let Ok(mut stage) = self.stages.1.recv() else { return Ok(None) };
        let done = match &plane.cell {
            Some(cell) => self.start(&mut stage, cell, plan, hu),
            None => Ok(()),
        };
        let _ = self.stages.0.try_send(stage);
        if let Err(error) = done {
            self.failed.store(true, Ordering::Release);
            return Err(error);
        }
        Ok(Some(DevicePlane(Arc::new(plane))))
    }

    fn start(&self, stage: &mut Stage, cell: &Cell, plan: &InPlanePlan, hu: &[i16]) -> Result<(), GpuError> {
        // Eight slices ago: nearly always done.
        stage.copied.synchronize()?;
        stage.host[..hu.len()].copy_from_slice(hu);
        if stage.plan.as_ref() != Some(plan) {
            stage.plan = None;
            pack_in_plane(plan, &mut stage.words);
            let count = stage.words.len();
            stage.words_host[..count].copy_from_slice(&stage.words);
            // SAFETY: `words_device` has the length of `words_host`. The latter is changed after `copied` only, which is
            // recorded behind this copy, and both live as long as the stream they are destroyed with: dropping a
            // buffer of the device waits for work that uses it.
            unsafe { stage.stream.upload(stage.words_device.ptr(), &stage.words_host, count)? };
            stage.plan = Some(plan.clone());
        }
        // SAFETY: `device` has room for MAX_PIXELS and `hu` has at most as many. The rest as above.
        unsafe { stage.stream.upload(stage.device.ptr(), &stage.host, hu.len())? };
        stage.stream.record(&stage.copied)?;
        // What an earlier owner of the plane's memory started is done first.
        stage.stream.wait(&cell.made)?;
        let (rows, columns) = plan.stored_axes();
        let grid = [(columns.outputs() as u32).div_ceil(BLOCK[0]), (rows.outputs() as u32).div_ceil(BLOCK[1]), 1];
        let (mut hu, mut table, mut out) = (stage.device.ptr(), stage.words_device.ptr(), cell.ptr);
        let (mut low, mut inverse_width) = (self.window.low_hu(), 1.0 / self.window.width_hu);
        let mut args =
            [address(&mut hu), address(&mut table), address(&mut low), address(&mut inverse_width), address(&mut out)];
        // SAFETY: the five parameters of in_plane_f32 in order. It reads the slice and the table just copied, within the
        // lengths that the table was packed for, and writes `h * w` floats of the plane, which this call alone has.
        unsafe { stage.stream.launch(&self.kernel, grid, [BLOCK[0], BLOCK[1], 1], 0, &mut args)? };
        stage.stream.record(&cell.made)
    }
}

fn address<T>(value: &mut T) -> *mut c_void {
    std::ptr::from_mut(value).cast()
}

/// What [`GpuGatherer::gather_to_host`] brings back.
#[derive(Debug)]
pub struct GatheredToHost {
    /// The network's input, planes x h x w.
    pub values: Vec<f32>,
    /// Its texture, as the device measured it.
    pub texture: Texture,
    /// Milliseconds the device took for both.
    pub ms: f32,
}

/// Gathers planes of one [`GpuResampler`] along depth; owned by the inference worker.
pub struct GpuGatherer {
    resampler: Arc<GpuResampler>,
    kernel: Function,
    texture: Function,
    sums_host: Pinned<u64>,
    sums_device: DeviceBuffer,
    /// Addresses of the slices, two words each, then the table.
    host: Pinned<u32>,
    device: DeviceBuffer,
    words: Vec<u32>,
    done: Event,
    /// Planes that work under way reads.
    held: Vec<DevicePlane>,
}

impl std::fmt::Debug for GpuGatherer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GpuGatherer").field("held", &self.held.len()).finish_non_exhaustive()
    }
}

impl GpuGatherer {
    /// For up to `slots` slices and `planes` planes.
    ///
    /// # Errors
    /// [`GpuError`]: no memory.
    pub fn new(resampler: Arc<GpuResampler>, slots: usize, planes: usize) -> Result<Self, GpuError> {
        let gpu = resampler.gpu();
        let kernels = gpu.load(&source())?;
        let (kernel, texture) = (kernels.function("gather_f32", 0)?, kernels.function("texture_f32", 0)?);
        let (sums_host, sums_device) = (Pinned::new(gpu, SUMS)?, DeviceBuffer::new(gpu, SUMS * size_of::<u64>())?);
        // A slice has weight in two planes, in three at most where planes lie on cell borders.
        let words = 2 * slots + 2 + planes + 1 + 2 * (3 * slots + 2 * planes);
        let host = Pinned::new(gpu, words)?;
        let device = DeviceBuffer::new(gpu, words * size_of::<u32>())?;
        let done = Event::new(gpu)?;
        Ok(Self {
            kernel,
            texture,
            sums_host,
            sums_device,
            host,
            device,
            words: Vec::with_capacity(words),
            done,
            held: Vec::with_capacity(slots),
            resampler,
        })
    }

    /// The resampler whose planes it gathers.
    pub fn resampler(&self) -> &Arc<GpuResampler> {
        &self.resampler
    }

    /// Puts the gathering into the order of `stream`; the network's input is whole for what is put there later. `planes`
    /// are the in-plane results feet to head. `false`, and nothing is done, when they are not all of this resampler or
    /// too many.
    ///
    /// [`finish`](Self::finish) is to be called before the next gathering.
    ///
    /// # Errors
    /// [`GpuError::Driver`].
    ///
    /// # Panics
    /// When the plan is for another number of slices.
    ///
    /// # Safety
    /// `input` is the address of `plan.planes() * h * w` floats on this GPU that nothing outside of `stream` uses until
    /// `stream` has passed what is put there now.
    pub unsafe fn gather(
        &mut self,
        plan: &DepthPlan,
        planes: &[&DevicePlane],
        stream: &Stream,
        input: u64,
    ) -> Result<bool, GpuError> {
        assert_eq!(planes.len(), plan.slices(), "one in-plane result a slice");
        pack_depth(plan, &mut self.words);
        let count = 2 * planes.len() + self.words.len();
        let fits = count <= self.host.len() && plan.planes() <= MAX_GRID_Y;
        if !fits || !planes.iter().all(|p| self.resampler.owns(p)) {
            return Ok(false);
        }
        self.finish()?;
        self.held.extend(planes.iter().copied().cloned());
        for (k, plane) in planes.iter().enumerate() {
            let Some(cell) = &plane.0.cell else { return Ok(false) };
            (self.host[2 * k], self.host[2 * k + 1]) = (cell.ptr as u32, (cell.ptr >> 32) as u32);
            if !cell.made.is_done()? {
                stream.wait(&cell.made)?;
            }
        }
        let table_at = 2 * planes.len();
        self.host[table_at..count].copy_from_slice(&self.words);
        // SAFETY: `device` has the length of `host`, which is changed after `finish` only.
        unsafe { stream.upload(self.device.ptr(), &self.host, count)? };
        let [h, w] = self.resampler.out_hw;
        let mut area = (h * w) as u32;
        let grid = [area.div_ceil(GATHER_BLOCK), plan.planes() as u32, 1];
        let (mut slices, mut out) = (self.device.ptr(), input);
        let mut table = self.device.ptr() + (table_at * size_of::<u32>()) as u64;
        let mut args = [address(&mut slices), address(&mut table), address(&mut area), address(&mut out)];
        // SAFETY: the four parameters of gather_f32 in order. It reads planes that `held` keeps until `finish`, each of
        // `h * w` floats, and writes what the caller promises to be there.
        unsafe { stream.launch(&self.kernel, grid, [GATHER_BLOCK, 1, 1], 0, &mut args)? };
        let grid = [(w as u32).div_ceil(TEXTURE_BLOCK), plan.planes() as u32, (h as u32).div_ceil(TEXTURE_ROWS)];
        let (mut input, mut sums) = (input, self.sums_device.ptr());
        let (mut d, mut h, mut w) = (plan.planes() as u32, h as u32, w as u32);
        let (mut rows, mut levels, mut clip) = (TEXTURE_ROWS, LEVELS, i32::from(CLIP));
        let mut args = [
            address(&mut input),
            address(&mut d),
            address(&mut h),
            address(&mut w),
            address(&mut rows),
            address(&mut levels),
            address(&mut clip),
            address(&mut sums),
        ];
        // SAFETY: the parameters of texture_f32 in order. It reads the input just gathered and adds to the SUMS words of
        // `sums_device`, which this gatherer has alone and which are copied to as many of `sums_host`; that is read
        // after `finish` only.
        unsafe {
            stream.fill(self.sums_device.ptr(), 0, SUMS * size_of::<u64>())?;
            stream.launch(&self.texture, grid, [TEXTURE_BLOCK, 1, 1], 0, &mut args)?;
            stream.download(&mut self.sums_host, self.sums_device.ptr(), SUMS)?;
        }
        stream.record(&self.done)?;
        Ok(true)
    }

    /// Gathers into memory of its own and copies it back, for tests and benches. `None` as for [`gather`](Self::gather).
    ///
    /// # Errors
    /// [`GpuError`].
    ///
    /// # Panics
    /// As [`gather`](Self::gather).
    pub fn gather_to_host(
        &mut self,
        plan: &DepthPlan,
        planes: &[&DevicePlane],
    ) -> Result<Option<GatheredToHost>, GpuError> {
        let gpu = Arc::clone(self.resampler.gpu());
        let [h, w] = self.resampler.out_hw;
        let count = plan.planes() * h * w;
        let output = DeviceBuffer::new(&gpu, count * size_of::<f32>())?;
        let (stream, begun, ended) = (Stream::new(&gpu)?, Event::timed(&gpu)?, Event::timed(&gpu)?);
        for plane in planes {
            plane.wait()?;
        }
        stream.record(&begun)?;
        // SAFETY: a buffer of the size asked for, which nothing else knows and which outlives the wait below.
        let done = unsafe { self.gather(plan, planes, &stream, output.ptr())? };
        stream.record(&ended)?;
        stream.synchronize()?;
        let (Some(texture), true) = (self.finish()?, done) else { return Ok(None) };
        let mut values = vec![0.0f32; count];
        output.read(&mut values)?;
        Ok(Some(GatheredToHost { values, texture, ms: ended.since_ms(&begun)? }))
    }

    /// Waits until the last gathering is done, which after a run of the network it is, and lets its planes go. The
    /// texture of what was gathered; `None` when nothing was since the last call.
    ///
    /// # Errors
    /// [`GpuError::Driver`]: the work failed. The planes are let go all the same.
    pub fn finish(&mut self) -> Result<Option<Texture>, GpuError> {
        if self.held.is_empty() {
            return Ok(None);
        }
        let done = self.done.synchronize();
        self.held.clear();
        done.map(|()| Some(Texture(std::array::from_fn(|i| self.sums_host[i]))))
    }
}

impl Drop for GpuGatherer {
    fn drop(&mut self) {
        // The pinned table must not be freed under a copy. An error means that no copy goes on.
        let _ = self.finish();
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // As above.
        let _ = self.stream.synchronize();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::manifest::{DepthGrid, SliceDirection};
    use crate::volume::geometry::InPlaneOrientation;

    #[test]
    fn any_plan_within_the_bounds_fits_its_table() {
        let mut words = Vec::new();
        for (rows, columns) in [(1, 1), (7, 4096), (4096, 256), (512, 512), (1024, 1024), (3, 5)] {
            for out_hw in [[224, 224], [96, 128], [1, 1], [600, 2]] {
                for shift in [[0.0, 0.0], [3.7, -1.2], [-5000.0, 0.0]] {
                    let orientation = InPlaneOrientation { transpose: rows < columns, ..InPlaneOrientation::default() };
                    let plan = InPlanePlan::new(rows, columns, orientation, 1.0, out_hw, shift);
                    pack_in_plane(&plan, &mut words);
                    assert!(
                        words.len() <= max_in_plane_words(out_hw),
                        "{rows} x {columns} to {out_hw:?}: {}",
                        words.len()
                    );
                }
            }
        }
    }

    #[test]
    fn a_depth_table_has_the_weights_of_its_plan() {
        let depth_mm: Vec<f64> = (0..40).map(|k| f64::from(k) * 1.3 + f64::from(k % 3) * 0.2).collect();
        let plan = DepthPlan::new(&depth_mm, DepthGrid::Fit, SliceDirection::FeetToHead, 16).unwrap();
        let mut words = Vec::new();
        pack_depth(&plan, &mut words);
        let (planes, total) = (words[0] as usize, words[1] as usize);
        assert_eq!((planes, words.len()), (16, 2 + planes + 1 + 2 * total));
        for p in 0..planes {
            let (from, to) = (words[2 + p] as usize, words[3 + p] as usize);
            let (slices, weights) = plan.plane_weights(p);
            let at = 3 + planes;
            assert_eq!(&words[at + from..at + to], slices);
            let found: Vec<f32> =
                words[at + total + from..at + total + to].iter().map(|b| f32::from_bits(*b)).collect();
            assert_eq!(found, weights);
        }
    }
}
