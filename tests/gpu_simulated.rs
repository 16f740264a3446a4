//! The GPU path of the pipeline on a machine without a GPU, on a driver that stands in for NVIDIA's
//! (`tests/gpu_host/driver.cpp`): as late as a driver may be, with the resampling kernels compiled for the processor.
//! What the network's kernels do is not in it; the network runs on the cpu backend, from the device's memory.
//!
//! The stand-in is loaded under the driver's name before anything asks for that, so these tests run the same way where
//! there is a GPU.
#![allow(unsafe_code)]

mod common;
mod device_support;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use common::phantom_series;
use darnet::engine::cpu::CpuBackend;
use darnet::engine::fallback::{FallbackBackend, Reopen};
use darnet::engine::{Backend, CancelToken, DeviceInput, EngineError, EngineOptions, Inference, Session};
use darnet::gpu::{DeviceBuffer, Gpu, GpuError, Stream};
use darnet::model::Model;
use device_support::judged;
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

/// The stand-in's own functions.
struct Simulated {
    library: Library,
}

static SIMULATED: LazyLock<Simulated> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    let built = |source: &str, name: &str| -> Library {
        let library = dir.path().join(name);
        let soname = format!("-Wl,-soname,{name}");
        common::compile_gpu_host(source, &library, &["-shared", "-fPIC", "-pthread", &soname]);
        // SAFETY: the library was just built and has no initialisers but those of C++.
        unsafe { Library::open(Some(&library), RTLD_NOW | RTLD_GLOBAL) }.unwrap()
    };
    // Whoever opens these names later gets what is open already.
    std::mem::forget(built("compiler.cpp", "libnvrtc.so.13"));
    Simulated { library: built("driver.cpp", "libcuda.so") }
});

impl Simulated {
    /// The device breaks after so many launches from now.
    fn fail_after(&self, launches: i64) {
        // SAFETY: the function of driver.cpp, with its type.
        unsafe { self.library.get::<unsafe extern "C" fn(i64)>(b"simulated_fail\0").unwrap()(launches) }
    }

    fn repair(&self) {
        // SAFETY: as above.
        unsafe { self.library.get::<unsafe extern "C" fn()>(b"simulated_repair\0").unwrap()() }
    }

    fn launches(&self) -> u64 {
        // SAFETY: as above.
        unsafe { self.library.get::<unsafe extern "C" fn() -> u64>(b"simulated_launches\0").unwrap()() }
    }
}

/// One test at a time has the device: it can break.
fn device() -> (MutexGuard<'static, ()>, &'static Simulated, Arc<Gpu>) {
    static ONE: Mutex<()> = Mutex::new(());
    let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let simulated = &*SIMULATED;
    simulated.repair();
    let gpu = Gpu::open(0).unwrap();
    assert_eq!(gpu.name(), "simulated device");
    (one, simulated, gpu)
}

/// The cpu backend, reading its input from the device as a GPU's session would.
struct OnDevice {
    cpu: Arc<CpuBackend>,
    gpu: Arc<Gpu>,
    input_len: usize,
    /// Runs from the device's memory.
    runs: Arc<AtomicU64>,
}

struct OnDeviceSession {
    cpu: Box<dyn Session>,
    gpu: Arc<Gpu>,
    stream: Arc<Stream>,
    buffer: DeviceBuffer,
    input: Vec<f32>,
    runs: Arc<AtomicU64>,
}

fn failed(error: GpuError) -> EngineError {
    EngineError::Device { backend: "cuda", reason: error.to_string() }
}

impl Backend for OnDevice {
    fn name(&self) -> &'static str {
        "cuda"
    }

    fn session(&self) -> Result<Box<dyn Session>, EngineError> {
        let stream = Arc::new(Stream::new(&self.gpu).map_err(failed)?);
        let buffer = DeviceBuffer::new(&self.gpu, 4 * self.input_len).map_err(failed)?;
        let (gpu, runs) = (Arc::clone(&self.gpu), Arc::clone(&self.runs));
        let input = vec![0.0; self.input_len];
        Ok(Box::new(OnDeviceSession { cpu: self.cpu.session()?, gpu, stream, buffer, input, runs }))
    }
}

impl Session for OnDeviceSession {
    fn run(&mut self, input: &[f32], cancel: &CancelToken, out: &mut Inference) -> Result<(), EngineError> {
        self.stream.synchronize().map_err(failed)?;
        self.cpu.run(input, cancel, out)
    }

    fn device_input(&self) -> Option<DeviceInput> {
        Some(DeviceInput { gpu: Arc::clone(&self.gpu), ptr: self.buffer.ptr(), stream: Arc::clone(&self.stream) })
    }

    fn run_device(&mut self, cancel: &CancelToken, out: &mut Inference) -> Result<(), EngineError> {
        // Not `read`, which waits for the whole device: only this stream's order counts.
        self.stream.synchronize().map_err(failed)?;
        self.buffer.read(&mut self.input).map_err(failed)?;
        self.runs.fetch_add(1, Ordering::SeqCst);
        self.cpu.run(&self.input, cancel, out)
    }
}

fn on_device(gpu: &Arc<Gpu>) -> OnDevice {
    let model = Model::embedded().unwrap();
    let options = EngineOptions { threads: 1, ..EngineOptions::default() };
    let cpu = Arc::new(CpuBackend::new(&model, &options, None).unwrap());
    let input_len = model.manifest.architecture.input_dhw.iter().product();
    OnDevice { cpu, gpu: Arc::clone(gpu), input_len, runs: Arc::default() }
}

fn backwards(files: &[PathBuf]) -> Vec<PathBuf> {
    files.iter().rev().cloned().collect()
}

#[test]
fn a_late_device_resamples_with_the_processors_bits_in_any_order_of_arrival() {
    let (_one, _, gpu) = device();
    device_support::any_order_of_arrival(gpu);
}

#[test]
fn threads_share_a_late_device_and_planes_are_reused_without_a_mix() {
    let (_one, _, gpu) = device();
    device_support::shared_by_threads(gpu);
}

#[test]
fn what_does_not_fit_a_device_is_left_to_the_processor() {
    let (_one, _, gpu) = device();
    device_support::left_to_the_processor(gpu);
}

#[test]
fn a_plane_dropped_before_it_is_made_does_not_spoil_the_next() {
    let (_one, _, gpu) = device();
    device_support::dropped_before_it_is_made(gpu);
}

#[test]
fn a_daemon_on_a_device_gives_the_processors_bits_in_any_order_of_arrival() {
    let (_one, simulated, gpu) = device();
    let series = phantom_series(7, 120, 256);
    let backend = on_device(&gpu);
    let cpu = judged(backend.cpu.as_ref(), &series.files, 1)["report"].clone();
    assert_eq!(cpu["outcome"], "result", "{cpu}");
    for (files, associations) in [(&series.files, 1), (&backwards(&series.files), 1), (&series.files, 4)] {
        let (launches, runs) = (simulated.launches(), backend.runs.load(Ordering::SeqCst));
        let document = judged(&backend, files, associations);
        assert_eq!(document["backend"], "cuda");
        let device = &document["report"];
        assert_eq!(device["logits"], cpu["logits"]);
        // Sums of the device and of the processor.
        assert_eq!(device["ood"], cpu["ood"]);
        let judged_there = backend.runs.load(Ordering::SeqCst) - runs;
        assert!(judged_there >= 1, "the input came from memory");
        // Each slice once, and two kernels a run.
        assert_eq!(simulated.launches() - launches, 120 + 2 * judged_there);
    }
}

#[test]
fn a_device_that_breaks_at_any_point_of_a_series_costs_no_result() {
    let (_one, simulated, gpu) = device();
    let series = phantom_series(8, 40, 128);
    let alone = on_device(&gpu);
    let expected = judged(alone.cpu.as_ref(), &series.files, 1)["report"].clone();
    drop((alone, gpu));
    // At the first slice, in the middle, at the last, at the gathering, at the texture.
    for launches in [0, 20, 39, 40, 41] {
        simulated.repair();
        let gpu = Gpu::open(0).unwrap();
        let backend = on_device(&gpu);
        let cpu: Arc<dyn Backend> = Arc::new(
            CpuBackend::new(
                &Model::embedded().unwrap(),
                &EngineOptions { threads: 1, ..EngineOptions::default() },
                None,
            )
            .unwrap(),
        );
        let reopen: Reopen =
            Arc::new(|| Err(EngineError::Device { backend: "cuda", reason: "it stays broken".to_owned() }));
        let guarded = FallbackBackend::new(Box::new(backend), cpu, reopen, None);
        simulated.fail_after(launches);
        let document = judged(&guarded, &series.files, 1);
        let result = &document["report"];
        assert_eq!(result["outcome"], "result", "broken after {launches}: {document}");
        assert_eq!(document["backend"], "cpu", "broken after {launches}");
        assert_eq!(result["logits"], expected["logits"], "broken after {launches}");
        assert_eq!(result["ood"], expected["ood"], "broken after {launches}");
    }
    simulated.repair();
}
