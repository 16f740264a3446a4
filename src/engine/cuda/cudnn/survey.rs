//! Times every plan of every convolution of DARNet at full size, and checks what it computes.
//!
//! Input: a device and a number of seconds. Output: a row a plan: time, rate, workspace, and the largest error at
//! sampled outputs against sums in f64 on the processor.
//!
//! A plan is captured into a CUDA graph several times in a row and the graph is timed with events, so that launches
//! cost what they cost in use and capture is shown to work. Inputs are pseudo-random and the same in every run.
//!
//! Invariants: all device memory is taken before the first plan; a plan that fails is a row with its fault. The driver
//! is reached through functions that are looked up before the first call.
//!
//! Deliberately absent: the choice of a plan.

use std::collections::HashSet;
use std::ffi::{c_int, c_uint, c_ulonglong, c_void};
use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cudarc::driver::sys::{CUcontext, CUdevice, CUdeviceptr, CUevent, CUgraph, CUgraphExec, CUstream};
use half::f16;

use super::library::{functions, open_for_good};
use super::{BiasType, Candidate, ConvSpec, Cudnn, CudnnError, Fusion, Library, Pointers};

/// The driver's library.
const DRIVER: &str = "libcuda.so.1";
/// Workspace taken; the plans of cuDNN 9.19 for these shapes stay below 16 MiB.
const WORKSPACE_BYTES: usize = 256 << 20;
/// Work that one timing should hold, so that the events' own half microsecond is small.
const TIMED_MICROSECONDS: f64 = 3000.0;
/// Fewest and most runs in one graph.
const RUNS: std::ops::RangeInclusive<usize> = 3..=64;
/// Timings a plan, of which the middle one counts.
const TIMINGS: usize = 5;
/// The search goes on while a round makes the fastest plan faster than this share of before.
const CLIMB: f64 = 0.995;
/// Outputs compared with the processor's.
const SAMPLES: usize = 64;
/// Largest |y - reference| / max(1, |reference|) of a right plan: half-precision output rounds by 2^-11, and sums of up
/// to 13824 products in f32 add less than 2^-12 of it at the magnitudes used.
pub const TOLERANCE: f64 = 2e-3;

const fn conv(c: [usize; 2], input_dhw: [usize; 3], kernel: usize, stride: usize, relu: bool) -> ConvSpec {
    ConvSpec {
        c_in: c[0],
        c_out: c[1],
        input_dhw,
        kernel_dhw: [kernel; 3],
        stride_dhw: [stride; 3],
        padding_dhw: [kernel / 2; 3],
        relu,
        residual: false,
        bias: BiasType::F16,
    }
}

const fn stem(c_in: usize) -> ConvSpec {
    ConvSpec {
        kernel_dhw: [3, 7, 7],
        stride_dhw: [1, 2, 2],
        padding_dhw: [1, 3, 3],
        ..conv([c_in, 64], [64, 224, 224], 3, 1, true)
    }
}

/// The convolutions of DARNet at full size, and how often each is in one inference.
///
/// A block's second convolution has no ReLU, and none has a residual, because attention comes between. The stem is also
/// there with its channel padded to 8, which tensor cores take; that case is in no inference.
pub const CASES: [(&str, usize, ConvSpec); 15] = [
    ("stem", 1, stem(1)),
    ("stem padded to 8 channels", 0, stem(8)),
    ("layer1 relu", 2, conv([64, 64], [64, 112, 112], 3, 1, true)),
    ("layer1", 2, conv([64, 64], [64, 112, 112], 3, 1, false)),
    ("layer2 strided relu", 1, conv([64, 128], [64, 112, 112], 3, 2, true)),
    ("layer2 relu", 1, conv([128, 128], [32, 56, 56], 3, 1, true)),
    ("layer2", 2, conv([128, 128], [32, 56, 56], 3, 1, false)),
    ("layer2 shortcut", 1, conv([64, 128], [64, 112, 112], 1, 2, false)),
    ("layer3 strided relu", 1, conv([128, 256], [32, 56, 56], 3, 2, true)),
    ("layer3 relu", 3, conv([256, 256], [16, 28, 28], 3, 1, true)),
    ("layer3 shortcut", 1, conv([128, 256], [32, 56, 56], 1, 2, false)),
    ("layer4 strided relu", 1, conv([256, 512], [16, 28, 28], 3, 2, true)),
    ("layer4 relu", 3, conv([512, 512], [8, 14, 14], 3, 1, true)),
    ("layer4 shortcut", 1, conv([256, 512], [16, 28, 28], 1, 2, false)),
    ("layer1 residual relu", 0, ConvSpec { residual: true, ..conv([64, 64], [64, 112, 112], 3, 1, true) }),
];

/// One plan of one convolution.
#[derive(Clone, Debug, PartialEq)]
pub struct SurveyRow {
    /// Which convolution.
    pub case: String,
    /// How often it is in one inference.
    pub uses: usize,
    /// The plan's name.
    pub name: String,
    /// How much of the graph the plan computes.
    pub fusion: Fusion,
    /// Bytes of workspace.
    pub workspace: usize,
    /// Middle time of one run within a CUDA graph.
    pub microseconds: f64,
    /// 1e12 operations a second, two a multiply-add of direct convolution.
    pub tflops: f64,
    /// Largest |y - reference| / max(1, |reference|) over the sampled outputs; right up to [`TOLERANCE`].
    pub error: f64,
    /// What cuDNN says of the engine, commas between.
    pub notes: String,
    /// Why there is no time, if there is none.
    pub fault: Option<String>,
}

impl SurveyRow {
    /// Whether it ran, computes the convolution, and gives the same bits each time.
    pub fn is_right(&self) -> bool {
        self.fault.is_none() && self.error <= TOLERANCE && !self.notes.contains("nondeterministic")
    }
}

functions! {
    /// Of `cuda.h`, as of driver 12.0.
    Driver {
        cuInit(c_uint) -> u32;
        cuDeviceGet(*mut CUdevice, c_int) -> u32;
        cuDevicePrimaryCtxRetain(*mut CUcontext, CUdevice) -> u32;
        cuDevicePrimaryCtxRelease_v2(CUdevice) -> u32;
        cuCtxSetCurrent(CUcontext) -> u32;
        cuMemAlloc_v2(*mut CUdeviceptr, usize) -> u32;
        cuMemFree_v2(CUdeviceptr) -> u32;
        cuMemcpyHtoDAsync_v2(CUdeviceptr, *const c_void, usize, CUstream) -> u32;
        cuMemcpyDtoH_v2(*mut c_void, CUdeviceptr, usize) -> u32;
        cuMemsetD8Async(CUdeviceptr, u8, usize, CUstream) -> u32;
        cuStreamCreate(*mut CUstream, c_uint) -> u32;
        cuStreamDestroy_v2(CUstream) -> u32;
        cuStreamSynchronize(CUstream) -> u32;
        cuStreamBeginCapture_v2(CUstream, c_uint) -> u32;
        cuStreamEndCapture(CUstream, *mut CUgraph) -> u32;
        cuGraphInstantiateWithFlags(*mut CUgraphExec, CUgraph, c_ulonglong) -> u32;
        cuGraphLaunch(CUgraphExec, CUstream) -> u32;
        cuGraphExecDestroy(CUgraphExec) -> u32;
        cuGraphDestroy(CUgraph) -> u32;
        cuEventCreate(*mut CUevent, c_uint) -> u32;
        cuEventRecord(CUevent, CUstream) -> u32;
        cuEventSynchronize(CUevent) -> u32;
        cuEventElapsedTime(*mut f32, CUevent, CUevent) -> u32;
        cuEventDestroy_v2(CUevent) -> u32;
    }
}

/// CU_STREAM_NON_BLOCKING.
const NON_BLOCKING: c_uint = 1;
/// CU_STREAM_CAPTURE_MODE_THREAD_LOCAL.
const THREAD_LOCAL: c_uint = 1;

fn done(status: u32, operation: &'static str) -> Result<(), CudnnError> {
    if status == 0 { Ok(()) } else { Err(CudnnError::Driver { operation, status }) }
}

/// Calls a function of the driver and turns its status into a result.
macro_rules! call {
    ($driver:expr, $name:ident($($arg:expr),*)) => {
        // SAFETY: the context was made current by `Bench::open` on this thread; addresses, streams, graphs and events
        // are live ones of this file's owners; where an address of ours is passed, it is of a live variable or slice of
        // the length given.
        done(unsafe { ($driver.$name)($($arg),*) }, stringify!($name))
    };
}

/// The device's context, one stream, two events and the buffers, released together.
struct Bench {
    driver: Driver,
    device: CUdevice,
    stream: CUstream,
    events: [CUevent; 2],
    /// x, w, bias, residual, y, workspace.
    buffers: [CUdeviceptr; 6],
}

impl Bench {
    fn open(ordinal: usize) -> Result<Self, CudnnError> {
        let path = Path::new(DRIVER);
        let driver = Driver::look_up(&*open_for_good(path)?, path)?;
        let ordinal = c_int::try_from(ordinal).map_err(|_| CudnnError::Spec(format!("device ordinal {ordinal}")))?;
        call!(driver, cuInit(0))?;
        let mut device: CUdevice = 0;
        call!(driver, cuDeviceGet(&raw mut device, ordinal))?;
        let mut context: CUcontext = std::ptr::null_mut();
        call!(driver, cuDevicePrimaryCtxRetain(&raw mut context, device))?;
        let mut bench =
            Self { driver, device, stream: std::ptr::null_mut(), events: [std::ptr::null_mut(); 2], buffers: [0; 6] };
        call!(bench.driver, cuCtxSetCurrent(context))?;
        call!(bench.driver, cuStreamCreate(&raw mut bench.stream, NON_BLOCKING))?;
        for event in &mut bench.events {
            call!(bench.driver, cuEventCreate(&raw mut *event, 0))?;
        }
        Ok(bench)
    }

    fn allocate(&mut self, bytes: [usize; 6]) -> Result<(), CudnnError> {
        for (buffer, bytes) in self.buffers.iter_mut().zip(bytes) {
            call!(self.driver, cuMemAlloc_v2(&raw mut *buffer, bytes.max(1)))?;
        }
        Ok(())
    }

    fn upload(&self, to: CUdeviceptr, values: &[f16]) -> Result<(), CudnnError> {
        // On the stream of the convolutions, which does not wait for the default one.
        let (from, bytes) = (values.as_ptr().cast(), size_of_val(values));
        let copied = call!(self.driver, cuMemcpyHtoDAsync_v2(to, from, bytes, self.stream));
        // The copy ends before `values` does.
        call!(self.driver, cuStreamSynchronize(self.stream))?;
        copied
    }

    /// Milliseconds that a graph takes.
    fn time(&self, graph: &Graph<'_>) -> Result<f64, CudnnError> {
        let [before, after] = self.events;
        call!(self.driver, cuEventRecord(before, self.stream))?;
        call!(self.driver, cuGraphLaunch(graph.executable, self.stream))?;
        call!(self.driver, cuEventRecord(after, self.stream))?;
        call!(self.driver, cuEventSynchronize(after))?;
        let mut milliseconds = 0.0f32;
        call!(self.driver, cuEventElapsedTime(&raw mut milliseconds, before, after))?;
        Ok(f64::from(milliseconds))
    }

    /// A graph of what `body` puts on the stream.
    fn capture(&self, body: impl FnOnce() -> Result<(), CudnnError>) -> Result<Graph<'_>, CudnnError> {
        call!(self.driver, cuStreamBeginCapture_v2(self.stream, THREAD_LOCAL))?;
        let result = body();
        let mut graph: CUgraph = std::ptr::null_mut();
        let ended = call!(self.driver, cuStreamEndCapture(self.stream, &raw mut graph));
        let mut captured = Graph { driver: &self.driver, graph, executable: std::ptr::null_mut() };
        result?;
        ended?;
        call!(self.driver, cuGraphInstantiateWithFlags(&raw mut captured.executable, graph, 0))?;
        Ok(captured)
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        // What fails here is leaked until the process ends.
        for buffer in self.buffers {
            if buffer != 0 {
                let _ = call!(self.driver, cuMemFree_v2(buffer));
            }
        }
        for event in self.events {
            if !event.is_null() {
                let _ = call!(self.driver, cuEventDestroy_v2(event));
            }
        }
        if !self.stream.is_null() {
            let _ = call!(self.driver, cuStreamDestroy_v2(self.stream));
        }
        let _ = call!(self.driver, cuDevicePrimaryCtxRelease_v2(self.device));
    }
}

struct Graph<'a> {
    driver: &'a Driver,
    graph: CUgraph,
    executable: CUgraphExec,
}

impl Drop for Graph<'_> {
    fn drop(&mut self) {
        if !self.executable.is_null() {
            let _ = call!(self.driver, cuGraphExecDestroy(self.executable));
        }
        if !self.graph.is_null() {
            let _ = call!(self.driver, cuGraphDestroy(self.graph));
        }
    }
}

/// The finaliser of splitmix64.
fn mix(value: u64) -> u64 {
    let z = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Element `index` of pseudo-random operand `operand`, uniform in +-`scale`, rounded to f16.
fn value(operand: u64, index: usize, scale: f64) -> f16 {
    let bits = mix((index as u64).wrapping_add(operand << 48).wrapping_mul(0x9E37_79B9_7F4A_7C15)) >> 11;
    f16::from_f64(scale * (2.0 * (bits as f64) * 2f64.powi(-53) - 1.0))
}

const X: (u64, f64) = (1, 1.0);
const BIAS: (u64, f64) = (3, 0.5);
const RESIDUAL: (u64, f64) = (4, 1.0);

/// Weights keep the outputs near 1: each has variance 1 / (taps * channels).
fn weight_scale(spec: &ConvSpec) -> f64 {
    (3.0 / (spec.w_elements() / spec.c_out) as f64).sqrt() * 1.7
}

fn fill(operand: (u64, f64), count: usize) -> Vec<f16> {
    (0..count).map(|i| value(operand.0, i, operand.1)).collect()
}

/// Element `i` of x, w, bias and residual.
#[cfg(test)]
pub(super) fn operands(spec: &ConvSpec) -> [impl Fn(usize) -> f64 + use<>; 4] {
    [X, (2, weight_scale(spec)), BIAS, RESIDUAL].map(|(operand, scale)| move |i| value(operand, i, scale).to_f64())
}

/// What output element `index` (order D, H, W, K) should be, in f64 from the rounded operands.
pub(super) fn reference(spec: &ConvSpec, fusion: Fusion, index: usize) -> f64 {
    let [_, q, o] = spec.output_dhw();
    let k = index % spec.c_out;
    let at = index / spec.c_out;
    let at = [at / o / q, at / o % q, at % o];
    let [t, r, s] = spec.kernel_dhw;
    let scale = weight_scale(spec);
    let mut sum = 0.0;
    for tap in 0..t * r * s {
        let tap_at = [tap / s / r, tap / s % r, tap % s];
        let from: [Option<usize>; 3] = std::array::from_fn(|axis| {
            (at[axis] * spec.stride_dhw[axis] + tap_at[axis])
                .checked_sub(spec.padding_dhw[axis])
                .filter(|i| *i < spec.input_dhw[axis])
        });
        let [Some(d), Some(h), Some(w)] = from else { continue };
        let x_at = ((d * spec.input_dhw[1] + h) * spec.input_dhw[2] + w) * spec.c_in;
        let w_at = (k * t * r * s + tap) * spec.c_in;
        for c in 0..spec.c_in {
            sum += value(X.0, x_at + c, X.1).to_f64() * value(2, w_at + c, scale).to_f64();
        }
    }
    let parts = fusion.parts(spec);
    if parts.residual {
        sum += value(RESIDUAL.0, index, RESIDUAL.1).to_f64();
    }
    if parts.bias {
        sum += value(BIAS.0, k, BIAS.1).to_f64();
    }
    if parts.relu { sum.max(0.0) } else { sum }
}

/// Times all plans of [`CASES`] on a device, at most about `seconds_budget` seconds.
///
/// Each case gets an equal part of the time that is left when its turn comes, so every case has rows unless the budget
/// does not even cover making the inputs (about 2 s).
///
/// # Errors
/// No library, driver or device, or not the 1.1 GB of device memory.
pub fn survey(device_ordinal: usize, seconds_budget: f64) -> Result<Vec<SurveyRow>, CudnnError> {
    survey_with(&Library::open(None)?, device_ordinal, seconds_budget)
}

/// As [`survey()`] with an opened library.
///
/// # Errors
/// As [`survey()`].
pub fn survey_with(
    library: &Arc<Library>,
    device_ordinal: usize,
    seconds_budget: f64,
) -> Result<Vec<SurveyRow>, CudnnError> {
    let budget = Duration::try_from_secs_f64(seconds_budget)
        .map_err(|_| CudnnError::Spec(format!("a budget of {seconds_budget} seconds")))?;
    let end = Instant::now() + budget;
    let mut bench = Bench::open(device_ordinal)?;
    let most = |elements: fn(&ConvSpec) -> usize| CASES.iter().map(|(_, _, spec)| elements(spec)).max().unwrap_or(0);
    let (xs, ws, ys) = (most(ConvSpec::x_elements), most(ConvSpec::w_elements), most(ConvSpec::y_elements));
    let channels = most(|spec| spec.c_out);
    bench.allocate([2 * xs, 2 * ws, 2 * channels, 2 * ys, 2 * ys, WORKSPACE_BYTES])?;
    let [x, w, bias, residual, y, workspace] = bench.buffers;
    bench.upload(x, &fill(X, xs))?;
    bench.upload(bias, &fill(BIAS, channels))?;
    bench.upload(residual, &fill(RESIDUAL, ys))?;
    // SAFETY: the stream lives in `bench`, which is dropped after `cudnn` and all plans; its context is the primary
    // one, current on this thread.
    let cudnn = unsafe { Cudnn::open_with(library, bench.stream) }?;
    let pointers = Pointers { x, w, bias, residual, y, workspace };
    let mut rows = Vec::new();
    for (i, (case, uses, spec)) in CASES.iter().enumerate() {
        let left = end.saturating_duration_since(Instant::now());
        let end = Instant::now() + left / (CASES.len() - i) as u32;
        bench.upload(w, &fill((2, weight_scale(spec)), spec.w_elements()))?;
        let blank = SurveyRow {
            case: (*case).to_owned(),
            uses: *uses,
            name: String::new(),
            fusion: Fusion::Plain,
            workspace: 0,
            microseconds: f64::NAN,
            tflops: 0.0,
            error: f64::NAN,
            notes: String::new(),
            fault: None,
        };
        match cudnn.candidates(spec, WORKSPACE_BYTES) {
            Ok(candidates) => rows.extend(survey_case(&bench, &cudnn, &pointers, &blank, candidates, end)),
            Err(e) => rows.push(SurveyRow { fault: Some(e.to_string()), ..blank }),
        }
    }
    Ok(rows)
}

/// The rows of one convolution: the plans of the heuristics, then plans one knob away from the fastest so far, as long
/// as that finds faster ones and `end` is not reached.
fn survey_case(
    bench: &Bench,
    cudnn: &Cudnn,
    pointers: &Pointers,
    blank: &SurveyRow,
    mut candidates: Vec<Candidate>,
    end: Instant,
) -> Vec<SurveyRow> {
    let Some(first) = candidates.first() else { return Vec::new() };
    let samples = sample(first.spec(), first.fusion());
    let operations = 2.0 * first.spec().macs() as f64;
    let mut rows: Vec<SurveyRow> = Vec::new();
    let mut timed = HashSet::new();
    let mut fastest: Option<(f64, Candidate)> = None;
    loop {
        let before = fastest.as_ref().map(|(time, _)| *time);
        for candidate in &candidates {
            if Instant::now() >= end {
                return rows;
            }
            if !timed.insert(candidate.name().to_owned()) {
                continue;
            }
            let notes: Vec<String> = candidate.notes().iter().map(ToString::to_string).collect();
            let mut row = SurveyRow {
                name: candidate.name().to_owned(),
                fusion: candidate.fusion(),
                workspace: candidate.workspace(),
                notes: notes.join(","),
                ..blank.clone()
            };
            match measure(bench, cudnn, candidate, pointers, &samples) {
                Ok((microseconds, error)) => {
                    (row.microseconds, row.tflops, row.error) = (microseconds, operations / microseconds / 1e6, error);
                }
                Err(e) => row.fault = Some(e.to_string()),
            }
            if row.is_right() && fastest.as_ref().is_none_or(|(time, _)| row.microseconds < *time) {
                fastest = Some((row.microseconds, candidate.clone()));
            }
            rows.push(row);
        }
        let Some((time, candidate)) = &fastest else { return rows };
        if before.is_some_and(|before| *time > before * CLIMB) {
            return rows;
        }
        let Ok(neighbours) = cudnn.neighbours(candidate, WORKSPACE_BYTES) else { return rows };
        candidates = neighbours;
    }
}

/// Places spread over the output, corners among them, with what should be there.
fn sample(spec: &ConvSpec, fusion: Fusion) -> Vec<(usize, f64)> {
    let elements = spec.y_elements();
    let place = |i: usize| match i {
        0 => 0,
        1 => elements - 1,
        _ => (mix(i as u64) % elements as u64) as usize,
    };
    (0..SAMPLES).map(place).map(|index| (index, reference(spec, fusion, index))).collect()
}

/// Microseconds of one run, and the largest error at the samples.
fn measure(
    bench: &Bench,
    cudnn: &Cudnn,
    candidate: &Candidate,
    pointers: &Pointers,
    samples: &[(usize, f64)],
) -> Result<(f64, f64), CudnnError> {
    // SAFETY: the buffers were taken for the largest of all cases; the workspace is `WORKSPACE_BYTES`, the limit given
    // when the plan was looked for; they outlive `bound` and the graphs, which end with this function.
    let bound = unsafe { candidate.bind(pointers) }?;
    // All bits set is a NaN, which no right plan leaves.
    call!(bench.driver, cuMemsetD8Async(pointers.y, 0xFF, 2 * candidate.spec().y_elements(), bench.stream))?;
    bound.execute(cudnn)?;
    call!(bench.driver, cuStreamSynchronize(bench.stream))?;
    let mut error = 0.0f64;
    for (index, expected) in samples {
        let mut bits = 0u16;
        let from = pointers.y + 2 * *index as u64;
        call!(bench.driver, cuMemcpyDtoH_v2((&raw mut bits).cast(), from, size_of::<u16>()))?;
        let difference = (f16::from_bits(bits).to_f64() - expected).abs() / expected.abs().max(1.0);
        // Not `max`, which drops NaN.
        error = if difference <= error { error } else { difference };
    }
    let once = bench.capture(|| bound.execute(cudnn))?;
    bench.time(&once)?;
    let estimate = 1000.0 * bench.time(&once)?;
    let runs = ((TIMED_MICROSECONDS / estimate.max(0.1)) as usize).clamp(*RUNS.start(), *RUNS.end());
    let many = bench.capture(|| (0..runs).try_for_each(|_| bound.execute(cudnn)))?;
    let mut times = Vec::with_capacity(TIMINGS);
    for _ in 0..TIMINGS {
        times.push(1000.0 * bench.time(&many)? / runs as f64);
    }
    times.sort_by(f64::total_cmp);
    Ok((times[TIMINGS / 2], error))
}

/// The rows as text: of each case the fastest first, and last the sum over one inference of the fastest right and
/// deterministic ones.
pub fn table(rows: &[SurveyRow]) -> String {
    let mut out = String::new();
    let mut total = 0.0;
    let mut missing = Vec::new();
    for (case, uses, spec) in &CASES {
        let mut of_case: Vec<&SurveyRow> = rows.iter().filter(|row| row.case == *case).collect();
        of_case.sort_by(|a, b| a.microseconds.total_cmp(&b.microseconds));
        let _ = writeln!(out, "{case}: {spec}; {uses} in one inference");
        for row in &of_case {
            let SurveyRow { name, workspace, microseconds, tflops, error, notes, .. } = row;
            let fault = row.fault.as_deref().unwrap_or(if *error <= TOLERANCE { "" } else { "WRONG" });
            let _ = writeln!(
                out,
                "  {microseconds:9.2} us {tflops:7.1} TFLOP/s  error {error:8.1e}  {workspace:>10} B  {name}  {notes}  {fault}"
            );
        }
        match of_case.iter().find(|row| row.is_right()) {
            Some(row) => total += *uses as f64 * row.microseconds,
            None if *uses > 0 => missing.push(*case),
            None => {}
        }
    }
    let _ = writeln!(out, "fastest plans of one inference: {total:.1} us of convolutions");
    if !missing.is_empty() {
        let _ = writeln!(out, "without a right plan: {}", missing.join(", "));
    }
    out
}
