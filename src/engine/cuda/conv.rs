//! One convolution on the GPU: the kernels that could do it, and the one that does.
//!
//! Input: shape and folded weights. Output: [`Conv`], which puts one convolution on a stream. Candidates are variants of
//! our own kernel for Hopper (`conv_sm90.cu`) and the plans that cuDNN offers; each is held against a plain kernel and
//! timed, and the fastest that is right is taken. Invariant: a kernel that is chosen has agreed with the plain one on this
//! GPU, for this shape, on random input.
//!
//! Deliberately absent: the network; `network` knows which convolution follows which.

use std::borrow::Cow;
use std::ffi::c_void;
use std::fmt::Write as _;
use std::sync::Arc;

use cudarc::driver::sys;
use half::f16;
use serde::{Deserialize, Serialize};

use super::cudnn::{BiasType, Bound, ConvSpec, Cudnn, Pointers};
use super::weights::{Folded, swizzled};
use crate::gpu::{DeviceBuffer, Event, Function, Gpu, GpuError, Source, Stream};

const CONV_SM90: &str = include_str!("conv_sm90.cu");
pub(super) const LAYERS: &str = include_str!("layers.cu");

/// Shared memory a block of Hopper may have: 227 KiB.
const SHARED_LIMIT: usize = 232_448;
/// Threads of a block of `conv_sm90.cu`: two warpgroups that multiply, one that loads.
const THREADS: u32 = 384;
/// Bytes of scratch offered to a plan of cuDNN.
pub(super) const WORKSPACE_LIMIT: usize = 256 << 20;
/// Plans of cuDNN that are tried for one convolution.
const MAX_PLANS: usize = 4;
/// Largest ||got - want|| / ||want|| of a kernel that counts as right. f16 results differ by half a unit, 3e-4 in the mean.
const TOLERANCE: f64 = 1e-3;
/// Depth planes that are checked: the first, the last, and some between.
const CHECKED_PLANES: usize = 4;
/// Runs of which the median counts.
const TIMED_RUNS: usize = 7;

/// Why a convolution has no kernel.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConvError {
    #[error(transparent)]
    Gpu(#[from] GpuError),
    #[error("cuDNN: {0}")]
    Cudnn(#[from] super::cudnn::CudnnError),
    #[error(
        "no kernel for the convolution {shape}: {tried}; expected cuDNN 9, or a Hopper GPU and channels in groups of 64"
    )]
    NoKernel { shape: String, tried: String },
}

/// A convolution's shape; cubic kernel, the same stride on all axes, padding that keeps the size at stride 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Shape {
    /// Input channels.
    pub c_in: usize,
    /// Output channels.
    pub c_out: usize,
    /// Input size.
    pub input_dhw: [usize; 3],
    /// Output size.
    pub output_dhw: [usize; 3],
    /// Taps an axis: 1 or 3.
    pub kernel: usize,
    /// 1 or 2.
    pub stride: usize,
}

impl Shape {
    /// Multiply-adds.
    pub fn macs(&self) -> u64 {
        (self.c_in * self.c_out * self.kernel.pow(3)) as u64 * self.output_dhw.iter().product::<usize>() as u64
    }

    fn input_len(&self) -> usize {
        self.c_in * self.input_dhw.iter().product::<usize>()
    }

    fn output_len(&self) -> usize {
        self.c_out * self.output_dhw.iter().product::<usize>()
    }

    /// As in the choices file and tables.
    pub fn name(&self) -> String {
        let [d, h, w] = self.input_dhw;
        let Self { c_in, c_out, kernel, stride, .. } = self;
        format!("{c_in}x{d}x{h}x{w} to {c_out}, kernel {kernel}, stride {stride}")
    }

    fn spec(&self, relu: bool) -> ConvSpec {
        ConvSpec {
            c_in: self.c_in,
            c_out: self.c_out,
            input_dhw: self.input_dhw,
            kernel_dhw: [self.kernel; 3],
            stride_dhw: [self.stride; 3],
            padding_dhw: [self.kernel / 2; 3],
            relu,
            residual: false,
            bias: BiasType::F16,
        }
    }
}

/// The macros of `conv_sm90.cu` that may be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Variant {
    /// Rows of a tile.
    pub nh: usize,
    /// Planes a warpgroup.
    pub pw: usize,
    /// Warpgroups along depth; the others lie along channels.
    pub pd: usize,
    /// Parts of the input channels.
    pub split: usize,
    /// Slots of the ring of planes.
    pub np: usize,
    /// Slots of the ring of weights.
    pub nw: usize,
}

impl Variant {
    fn mb(&self) -> usize {
        2 / self.pd
    }

    fn unit_bytes(&self, shape: &Shape) -> usize {
        let rows = match (shape.kernel, shape.stride) {
            (3, 1) => self.nh + 2,
            (3, _) => self.nh + 1,
            _ => self.nh,
        };
        rows * 1024
    }

    /// Rows stored at a time: half of them where that is even.
    fn stored_rows(&self) -> usize {
        if self.nh.is_multiple_of(4) { self.nh / 2 } else { self.nh }
    }

    fn shared_bytes(&self, shape: &Shape) -> usize {
        let rings = self.np * self.unit_bytes(shape) + self.nw * self.mb() * 64 * 128;
        rings + 2 * self.stored_rows() * 1024 + 2 * (self.np + self.nw) * 8
    }

    fn tiles_hw(&self, shape: &Shape) -> [usize; 2] {
        let [_, h, w] = shape.output_dhw;
        [h.div_ceil(self.nh), w.div_ceil(8)]
    }

    fn tiles(&self, shape: &Shape) -> usize {
        let [th, tw] = self.tiles_hw(shape);
        th * tw * shape.output_dhw[0].div_ceil(self.pd * self.pw)
    }

    /// Pieces of work.
    fn work(&self, shape: &Shape) -> usize {
        self.tiles(shape) * (shape.c_out / (64 * self.mb())) * self.split
    }

    /// What is worth a try for `shape`, the likeliest first; empty when the kernel cannot do it.
    pub fn candidates(shape: &Shape, multiprocessors: usize) -> Vec<Self> {
        if !shape.c_in.is_multiple_of(64) || !shape.c_out.is_multiple_of(64) || !(1..=2).contains(&shape.stride) {
            return Vec::new();
        }
        let pd = if shape.c_out.is_multiple_of(128) { 1 } else { 2 };
        if pd == 2 && (shape.stride != 1 || shape.kernel != 3) {
            return Vec::new();
        }
        let h = shape.output_dhw[1];
        // Rows that waste least; of equals the most.
        let best_rows = |limit: usize| {
            (1..=limit / 2).map(|n| 2 * n).min_by_key(|nh| (h.div_ceil(*nh) * nh, usize::MAX - nh)).unwrap_or(2)
        };
        let mut out: Vec<Self> = Vec::new();
        for (pw, limit) in [(1, 28), (2, 14)] {
            if pw == 2 && (shape.stride != 1 || shape.kernel != 3) {
                continue;
            }
            let nh = best_rows(limit);
            let mut variant = Self { nh, pw, pd, split: 1, np: 0, nw: if pd == 2 { 4 } else { 3 } };
            // Too few pieces for the GPU: the input channels are divided until it is busy.
            let chunks = shape.c_in / 64;
            while variant.work(shape) * 2 <= multiprocessors + multiprocessors / 4
                && chunks.is_multiple_of(variant.split * 2)
                && shape.kernel == 3
            {
                variant.split *= 2;
            }
            let free = SHARED_LIMIT - Self { np: 0, ..variant }.shared_bytes(shape);
            variant.np = (free / (variant.unit_bytes(shape) + 16)).min(12);
            if variant.np >= (2 * pd * pw).max(3) {
                out.push(variant);
            }
        }
        out
    }

    /// As in the choices file and tables.
    pub fn name(&self) -> String {
        let Self { nh, pw, pd, split, np, nw } = self;
        format!("sm90 rows {nh} planes {pw} depth {pd} split {split} rings {np}/{nw}")
    }

    /// The kernel's text for `shape`.
    pub(super) fn source(&self, shape: &Shape) -> Source {
        let [od, oh, ow] = shape.output_dhw;
        let define = |name: &str, value: usize| format!("-D{name}={value}");
        let options = vec![
            define("C_IN", shape.c_in),
            define("C_OUT", shape.c_out),
            define("KSIZE", shape.kernel),
            define("STRIDE", shape.stride),
            define("OD", od),
            define("OH", oh),
            define("OW", ow),
            define("NH", self.nh),
            define("PW", self.pw),
            define("PD", self.pd),
            define("MB", self.mb()),
            define("SPLIT", self.split),
            define("NP", self.np),
            define("NW", self.nw),
            define("SROWS", self.stored_rows()),
        ];
        let text = CONV_SM90.replace("@MULTIPLY@", &multiply_text(8 * self.nh));
        Source { name: "conv_sm90.cu", text: Cow::Owned(text), options, arch_specific: true }
    }
}

/// `multiply` and `settle` of `conv_sm90.cu` for products 64 x `n` x 16: the instruction names every register it adds to.
pub fn multiply_text(n: usize) -> String {
    let count = n / 2;
    let mut registers = String::new();
    let mut operands = String::new();
    for i in 0..count {
        let comma = if i == 0 { "" } else { ", " };
        let _ = write!(registers, "{comma}%{i}");
        let _ = write!(operands, "{comma}\"+f\"(acc[{i}])");
    }
    let (a, b, add) = (count, count + 1, count + 2);
    format!(
        "__device__ __forceinline__ void multiply(float (&acc)[{count}], u64 a, u64 b, int add) {{\n\
         asm volatile(\"{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{add}, 0;\\n\
         wgmma.mma_async.sync.aligned.m64n{n}k16.f32.f16.f16 {{{registers}}}, %{a}, %{b}, p, 1, 1, 0, 0;\\n}}\"\n\
         : {operands} : \"l\"(a), \"l\"(b), \"r\"(add));\n}}\n\
         __device__ __forceinline__ void settle(float (&acc)[{count}]) {{\n\
         asm volatile(\"wgmma.wait_group.sync.aligned 0;\" : {operands} :: \"memory\");\n}}\n"
    )
}

/// Which kernel does a convolution.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Choice {
    /// Our own.
    Own(Variant),
    /// cuDNN's plan of this name.
    Cudnn(String),
}

impl Choice {
    /// For tables.
    pub fn name(&self) -> String {
        match self {
            Self::Own(variant) => variant.name(),
            Self::Cudnn(name) => format!("cudnn {name}"),
        }
    }
}

/// What a candidate did.
#[derive(Clone, Debug, Serialize)]
pub struct Trial {
    /// The convolution.
    pub shape: Shape,
    /// The kernel.
    pub kernel: String,
    /// ||got - want|| / ||want|| against the plain kernel.
    pub error: Option<f64>,
    /// Median, microseconds.
    pub micros: Option<f64>,
    /// Why it was not timed.
    pub fault: Option<String>,
}

impl Trial {
    /// Direct work a second.
    pub fn tflops(&self) -> Option<f64> {
        self.micros.map(|us| 2.0 * self.shape.macs() as f64 / us * 1e-6)
    }
}

/// A convolution's weights on the GPU, for the kernel that was chosen.
#[derive(Debug)]
pub(super) struct Prepared {
    pub shape: Shape,
    pub choice: Choice,
    weights: Arc<DeviceBuffer>,
    bias: Arc<DeviceBuffer>,
    own: Option<Own>,
}

/// Our own kernel, compiled.
#[derive(Clone, Debug)]
struct Own {
    variant: Variant,
    conv: Function,
    finish: Option<Function>,
}

/// Everything a kernel needs that does not depend on the session.
pub(super) struct Maker<'a> {
    pub gpu: &'a Arc<Gpu>,
    pub cudnn: Option<&'a Cudnn>,
}

impl Maker<'_> {
    fn own(&self, shape: &Shape, variant: Variant) -> Result<Own, GpuError> {
        let conv = self.gpu.load(&variant.source(shape))?.function("conv", variant.shared_bytes(shape))?;
        let finish = if variant.split > 1 {
            Some(
                self.gpu
                    .load(&block_source(
                        shape.c_out,
                        shape.output_dhw,
                        super::network::hidden(shape.c_out, shape.output_dhw),
                    ))?
                    .function("finish_split", 0)?,
            )
        } else {
            None
        };
        Ok(Own { variant, conv, finish })
    }

    /// Puts `folded` on the GPU for `choice`.
    pub fn prepare(&self, shape: &Shape, folded: &Folded, choice: &Choice) -> Result<Prepared, ConvError> {
        // cuDNN has more plans for a bias in f16.
        let bias = match choice {
            Choice::Own(_) => DeviceBuffer::holding(self.gpu, &folded.bias)?,
            Choice::Cudnn(_) => {
                let rounded: Vec<f16> = folded.bias.iter().map(|b| f16::from_f32(*b)).collect();
                DeviceBuffer::holding(self.gpu, &rounded)?
            }
        };
        let (weights, own) = match choice {
            Choice::Own(variant) => {
                let weights = swizzled(folded, 64 * variant.mb(), shape.stride);
                (DeviceBuffer::holding(self.gpu, &weights)?, Some(self.own(shape, *variant)?))
            }
            Choice::Cudnn(_) => (DeviceBuffer::holding(self.gpu, &folded.weights)?, None),
        };
        Ok(Prepared { shape: *shape, choice: choice.clone(), weights: Arc::new(weights), bias: Arc::new(bias), own })
    }
}

/// `layers.cu` for a block's output, with the hidden widths of its depth and channel attention.
pub(super) fn block_source(channels: usize, dhw: [usize; 3], hidden: [usize; 2]) -> Source {
    let [d, h, w] = dhw;
    let options = vec![
        "-DBLOCK".to_owned(),
        format!("-DC={channels}"),
        format!("-DD={d}"),
        format!("-DH={h}"),
        format!("-DW={w}"),
        format!("-DHIDDEN_D={}", hidden[0]),
        format!("-DHIDDEN_C={}", hidden[1]),
    ];
    Source { name: "layers.cu", text: Cow::Borrowed(LAYERS), options, arch_specific: false }
}

/// Parts of a plane that `finish_split` sums apart.
const FINISH_RUNS: usize = 7;

/// A convolution between two buffers of a session.
pub(super) struct Conv {
    shape: Shape,
    relu: bool,
    y: u64,
    sums: u64,
    weights: Arc<DeviceBuffer>,
    bias: Arc<DeviceBuffer>,
    kind: Kind,
}

enum Kind {
    Own { own: Own, x_map: Box<sys::CUtensorMap>, y_map: Box<sys::CUtensorMap>, parts: u64, grid: u32 },
    Cudnn(Bound),
}

/// Where a convolution reads and writes: device addresses, 0 where there is none.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Places {
    pub x: u64,
    pub y: u64,
    /// Sums over rows and columns, [`Prepared::sum_parts`] a plane.
    pub sums: u64,
    /// [`Prepared::scratch_bytes`].
    pub scratch: u64,
}

impl Prepared {
    /// Scratch that [`bind`](Self::bind) wants.
    pub fn scratch_bytes(&self, maker: &Maker<'_>) -> Result<usize, ConvError> {
        match (&self.choice, &self.own) {
            (_, Some(own)) if own.variant.split > 1 => Ok(own.variant.split * self.shape.output_len() * 4),
            (Choice::Cudnn(name), _) => {
                let Some(cudnn) = maker.cudnn else { return Ok(0) };
                let both = [true, false].map(|relu| cudnn.plan(&self.shape.spec(relu), name).map(|p| p.workspace()));
                let mut most = 0;
                for bytes in both.into_iter().flatten() {
                    most = most.max(bytes);
                }
                Ok(most)
            }
            _ => Ok(0),
        }
    }

    /// Parts of a plane whose sums the kernel writes; `None` when it writes none.
    pub fn sum_parts(&self) -> Option<usize> {
        let own = self.own.as_ref()?;
        if own.variant.split > 1 {
            return Some(FINISH_RUNS);
        }
        Some(own.variant.tiles_hw(&self.shape).iter().product())
    }

    /// Bytes of weights on the GPU.
    pub fn weight_bytes(&self) -> usize {
        self.weights.len() + self.bias.len()
    }

    /// The convolution from `places.x` to `places.y`.
    pub fn bind(&self, maker: &Maker<'_>, relu: bool, places: Places) -> Result<Conv, ConvError> {
        let shape = self.shape;
        let kind = match (&self.choice, &self.own) {
            (Choice::Own(variant), Some(own)) => {
                let x_map =
                    tensor_map(places.x, shape.c_in, shape.input_dhw, variant.unit_bytes(&shape) / 1024, shape.stride)?;
                let y_map = tensor_map(places.y, shape.c_out, shape.output_dhw, variant.stored_rows(), 1)?;
                let grid = variant.work(&shape).min(maker.gpu.multiprocessors() as usize) as u32;
                Kind::Own { own: own.clone(), x_map, y_map, parts: places.scratch, grid }
            }
            (Choice::Cudnn(name), _) => {
                let Some(cudnn) = maker.cudnn else {
                    let tried = "its plan is cuDNN's, which is not there".to_owned();
                    return Err(ConvError::NoKernel { shape: shape.name(), tried });
                };
                let candidate = cudnn.plan(&shape.spec(relu), name)?;
                let pointers = Pointers {
                    x: places.x,
                    w: self.weights.ptr(),
                    bias: self.bias.ptr(),
                    residual: 0,
                    y: places.y,
                    workspace: places.scratch,
                };
                // SAFETY: the session that owns the convolution owns the buffers, which have the sizes of the shape.
                Kind::Cudnn(unsafe { candidate.bind(&pointers) }?)
            }
            (Choice::Own(_), None) => unreachable!("prepared together"),
        };
        Ok(Conv {
            shape,
            relu,
            y: places.y,
            sums: places.sums,
            weights: Arc::clone(&self.weights),
            bias: Arc::clone(&self.bias),
            kind,
        })
    }
}

/// The map of an NDHWC f16 image for the bulk copy engine: boxes of 64 channels, 8 voxels, `rows` rows, every `stride`th.
fn tensor_map(
    at: u64,
    channels: usize,
    dhw: [usize; 3],
    rows: usize,
    stride: usize,
) -> Result<Box<sys::CUtensorMap>, GpuError> {
    let [d, h, w] = dhw.map(|n| n as u64);
    let c = channels as u64;
    let sizes = [c, w, h, d];
    let steps = [2 * c, 2 * c * w, 2 * c * w * h];
    let extent = [64, 8 * stride as u32, (rows * stride) as u32, 1];
    let every = [1, stride as u32, stride as u32, 1];
    // SAFETY: the type is sixteen words without meaning of their own; the call below writes them.
    let mut map: Box<sys::CUtensorMap> = Box::new(unsafe { std::mem::zeroed() });
    // SAFETY: the arrays have as many entries as the rank needs, the map is writable and aligned by its type.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut *map,
            sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            4,
            at as *mut c_void,
            sizes.as_ptr(),
            steps.as_ptr(),
            extent.as_ptr(),
            every.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()
    .map_err(GpuError::driver("describe a tensor to the copy engine"))?;
    Ok(map)
}

impl Conv {
    /// Puts it on `stream`.
    ///
    /// # Safety
    /// The buffers it was bound to are alive and used by nobody else until the stream has passed it; `cudnn` is bound to
    /// `stream`.
    pub unsafe fn launch(&self, stream: &Stream, cudnn: Option<&Cudnn>) -> Result<(), ConvError> {
        match &self.kind {
            Kind::Own { own, x_map, y_map, parts, grid } => {
                let (mut weights, mut bias) = (self.weights.ptr(), self.bias.ptr());
                let mut relu = i32::from(self.relu);
                let mut sums = if own.variant.split > 1 { 0 } else { self.sums };
                let mut parts = *parts;
                let mut args = [
                    (&raw const **x_map).cast_mut().cast(),
                    (&raw const **y_map).cast_mut().cast(),
                    (&raw mut weights).cast(),
                    (&raw mut bias).cast(),
                    (&raw mut sums).cast(),
                    (&raw mut parts).cast(),
                    (&raw mut relu).cast(),
                ];
                let shared = own.variant.shared_bytes(&self.shape) as u32;
                // SAFETY: the kernel's seven parameters; buffers as the caller promises.
                unsafe { stream.launch(&own.conv, [*grid, 1, 1], [THREADS, 1, 1], shared, &mut args) }?;
                if let Some(finish) = &own.finish {
                    let (mut split, mut y, mut sums) = (own.variant.split as i32, self.y, self.sums);
                    let mut args: [*mut c_void; 6] = [
                        (&raw mut parts).cast(),
                        (&raw mut split).cast(),
                        (&raw mut bias).cast(),
                        (&raw mut y).cast(),
                        (&raw mut relu).cast(),
                        (&raw mut sums).cast(),
                    ];
                    let grid = [(self.shape.c_out / 64) as u32, FINISH_RUNS as u32, self.shape.output_dhw[0] as u32];
                    // SAFETY: the kernel's six parameters; buffers as the caller promises.
                    unsafe { stream.launch(finish, grid, [256, 1, 1], 0, &mut args) }?;
                }
                Ok(())
            }
            Kind::Cudnn(bound) => {
                let Some(cudnn) = cudnn else {
                    let tried = "its plan is cuDNN's, which is not there".to_owned();
                    return Err(ConvError::NoKernel { shape: self.shape.name(), tried });
                };
                Ok(bound.execute(cudnn)?)
            }
        }
    }
}

/// Tries every kernel for `shape` and takes the fastest right one.
pub(super) struct Chooser<'a> {
    pub maker: Maker<'a>,
    pub stream: &'a Stream,
    /// Random f16, at least as long as the longest input.
    pub x: &'a DeviceBuffer,
    /// As long as the longest output.
    pub y: &'a DeviceBuffer,
    pub scratch: &'a DeviceBuffer,
    pub sums: &'a DeviceBuffer,
}

impl Chooser<'_> {
    /// Every candidate's trial, and the best choice.
    pub fn choose(&self, shape: &Shape, folded: &Folded) -> Result<(Choice, Vec<Trial>), ConvError> {
        let gpu = self.maker.gpu;
        let mut candidates: Vec<Choice> = Vec::new();
        if gpu.compute_capability() == (9, 0) {
            let own = Variant::candidates(shape, gpu.multiprocessors() as usize);
            candidates.extend(own.into_iter().map(Choice::Own));
        }
        let mut trials = Vec::new();
        if let Some(cudnn) = self.maker.cudnn {
            match cudnn.candidates(&shape.spec(true), WORKSPACE_LIMIT) {
                Ok(plans) => {
                    let right = plans.iter().filter(|p| p.is_deterministic());
                    let names = right.take(MAX_PLANS).map(|p| Choice::Cudnn(p.name().to_owned()));
                    candidates.extend(names);
                }
                Err(error) => trials.push(Trial {
                    shape: *shape,
                    kernel: "cudnn".to_owned(),
                    error: None,
                    micros: None,
                    fault: Some(error.to_string()),
                }),
            }
        }
        let want = self.plain(shape, folded)?;
        let mut best: Option<(f64, Choice)> = None;
        for choice in candidates {
            let trial = self.trial(shape, folded, &choice, &want);
            if let (Some(micros), Some(error)) = (trial.micros, trial.error)
                && error <= TOLERANCE
                && best.as_ref().is_none_or(|(least, _)| micros < *least)
            {
                best = Some((micros, choice));
            }
            trials.push(trial);
        }
        match best {
            Some((_, choice)) => Ok((choice, trials)),
            None => {
                let tried = trials
                    .iter()
                    .map(|t| match (&t.fault, t.error) {
                        (Some(fault), _) => format!("{}: {fault}", t.kernel),
                        (None, Some(error)) => format!("{}: differs by {error:.1e}", t.kernel),
                        (None, None) => t.kernel.clone(),
                    })
                    .collect::<Vec<_>>()
                    .join("; ");
                let tried = if tried.is_empty() { "none is there".to_owned() } else { tried };
                Err(ConvError::NoKernel { shape: shape.name(), tried })
            }
        }
    }

    fn checked_planes(shape: &Shape) -> (usize, usize, usize) {
        let d = shape.output_dhw[0];
        let step = if d > CHECKED_PLANES { (d - 1) / (CHECKED_PLANES - 1) } else { 1 };
        let count = (d - 1) / step + 1;
        (0, step, count)
    }

    /// The output's checked planes by the plain kernel, before clipping.
    fn plain(&self, shape: &Shape, folded: &Folded) -> Result<Vec<f32>, ConvError> {
        let gpu = self.maker.gpu;
        let source = Source {
            name: "layers.cu",
            text: Cow::Borrowed(LAYERS),
            options: vec!["-DPLAIN".to_owned()],
            arch_specific: false,
        };
        let function = gpu.load(&source)?.function("plain", 0)?;
        let (first, step, count) = Self::checked_planes(shape);
        let plane = shape.output_len() / shape.output_dhw[0];
        let out = DeviceBuffer::new(gpu, plane * count * 4)?;
        let (weights, bias) = (DeviceBuffer::holding(gpu, &folded.weights)?, DeviceBuffer::holding(gpu, &folded.bias)?);
        let (mut x, mut w, mut b, mut y) = (self.x.ptr(), weights.ptr(), bias.ptr(), out.ptr());
        let [id, ih, iw] = shape.input_dhw;
        let [_, oh, ow] = shape.output_dhw;
        let numbers = [shape.c_in, shape.c_out, id, ih, iw, oh, ow, shape.kernel, shape.stride, 0, first, step];
        let mut numbers = numbers.map(|n| n as i32);
        let mut args: Vec<*mut c_void> =
            vec![(&raw mut x).cast(), (&raw mut w).cast(), (&raw mut b).cast(), (&raw mut y).cast()];
        args.extend(numbers.iter_mut().map(|n| (&raw mut *n).cast()));
        let grid = [shape.c_out.div_ceil(256) as u32, (oh * ow) as u32, count as u32];
        // SAFETY: the kernel's sixteen parameters; all buffers live until the read below, which waits.
        unsafe { self.stream.launch(&function, grid, [256, 1, 1], 0, &mut args) }?;
        let mut values = vec![0.0f32; plane * count];
        out.read(&mut values)?;
        Ok(values)
    }

    fn trial(&self, shape: &Shape, folded: &Folded, choice: &Choice, want: &[f32]) -> Trial {
        let mut trial = Trial { shape: *shape, kernel: choice.name(), error: None, micros: None, fault: None };
        if let Err(error) = self.try_one(shape, folded, choice, want, &mut trial) {
            trial.fault = Some(error.to_string());
        }
        trial
    }

    fn try_one(
        &self,
        shape: &Shape,
        folded: &Folded,
        choice: &Choice,
        want: &[f32],
        trial: &mut Trial,
    ) -> Result<(), ConvError> {
        let prepared = self.maker.prepare(shape, folded, choice)?;
        let scratch_bytes = prepared.scratch_bytes(&self.maker)?;
        let more = if scratch_bytes > self.scratch.len() {
            Some(DeviceBuffer::new(self.maker.gpu, scratch_bytes)?)
        } else {
            None
        };
        let scratch = more.as_ref().unwrap_or(self.scratch).ptr();
        let places = Places { x: self.x.ptr(), y: self.y.ptr(), sums: self.sums.ptr(), scratch };
        let conv = prepared.bind(&self.maker, false, places)?;
        // Every bit set is no number: what is not written shows.
        // SAFETY: the buffer is the chooser's own, and everything before is done.
        unsafe { self.stream.fill(self.y.ptr(), 0xFF, shape.output_len() * 2) }?;
        // SAFETY: buffers are alive until the synchronisations below.
        unsafe { conv.launch(self.stream, self.maker.cudnn) }?;
        self.stream.synchronize()?;
        let mut got = vec![f16::ZERO; shape.output_len()];
        self.y.read(&mut got)?;
        trial.error = Some(difference(shape, &got, want));
        if !trial.error.is_some_and(|e| e <= TOLERANCE) {
            return Ok(());
        }
        let (begin, end) = (Event::timed(self.maker.gpu)?, Event::timed(self.maker.gpu)?);
        let mut times = Vec::with_capacity(TIMED_RUNS);
        for _ in 0..TIMED_RUNS {
            self.stream.record(&begin)?;
            // SAFETY: as above.
            unsafe { conv.launch(self.stream, self.maker.cudnn) }?;
            self.stream.record(&end)?;
            self.stream.synchronize()?;
            times.push(f64::from(end.since_ms(&begin)?) * 1e3);
        }
        times.sort_by(f64::total_cmp);
        trial.micros = Some(times[times.len() / 2]);
        Ok(())
    }
}

/// ||got - want|| / ||want|| over the checked planes; infinite when any value of the output is no number.
fn difference(shape: &Shape, got: &[f16], want: &[f32]) -> f64 {
    if got.iter().any(|v| !v.is_finite()) {
        return f64::INFINITY;
    }
    let (first, step, count) = Chooser::checked_planes(shape);
    let plane = shape.output_len() / shape.output_dhw[0];
    let (mut apart, mut norm) = (0.0f64, 0.0f64);
    for i in 0..count {
        let from = (first + i * step) * plane;
        for (g, w) in got[from..from + plane].iter().zip(&want[i * plane..(i + 1) * plane]) {
            apart += (f64::from(g.to_f32()) - f64::from(*w)).powi(2);
            norm += f64::from(*w).powi(2);
        }
    }
    (apart / norm.max(f64::MIN_POSITIVE)).sqrt()
}

/// Length of the input buffer that a chooser for `shapes` wants, in f16.
pub(super) fn longest_input(shapes: &[Shape]) -> usize {
    shapes.iter().map(Shape::input_len).max().unwrap_or(0)
}

/// Length of the output buffer that a chooser for `shapes` wants, in f16.
pub(super) fn longest_output(shapes: &[Shape]) -> usize {
    shapes.iter().map(Shape::output_len).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full() -> Vec<Shape> {
        let s = |c_in, c_out, input_dhw: [usize; 3], kernel, stride| Shape {
            c_in,
            c_out,
            input_dhw,
            output_dhw: input_dhw.map(|n| n.div_ceil(stride)),
            kernel,
            stride,
        };
        vec![
            s(64, 64, [64, 112, 112], 3, 1),
            s(64, 128, [64, 112, 112], 3, 2),
            s(64, 128, [64, 112, 112], 1, 2),
            s(128, 128, [32, 56, 56], 3, 1),
            s(128, 256, [32, 56, 56], 3, 2),
            s(256, 256, [16, 28, 28], 3, 1),
            s(256, 512, [16, 28, 28], 3, 2),
            s(512, 512, [8, 14, 14], 3, 1),
        ]
    }

    #[test]
    fn variants_fit_shared_memory_and_cover_the_full_network() {
        for shape in full() {
            let variants = Variant::candidates(&shape, 132);
            assert!(!variants.is_empty(), "{}", shape.name());
            for v in variants {
                assert!(v.shared_bytes(&shape) <= SHARED_LIMIT, "{} {}", shape.name(), v.name());
                assert!(v.nh % v.stored_rows() == 0 && v.stored_rows() % 2 == 0, "{}", v.name());
                assert!(v.np >= 2 * v.pd * v.pw && v.np >= 3, "{}", v.name());
                assert!((shape.c_in / 64).is_multiple_of(v.split), "{}", v.name());
                println!("{}: {} work {}", shape.name(), v.name(), v.work(&shape));
            }
        }
    }

    #[test]
    fn channels_that_are_no_groups_of_64_are_left_to_others() {
        let shape = Shape { c_in: 16, ..full()[0] };
        assert!(Variant::candidates(&shape, 132).is_empty());
    }

    #[test]
    fn unwritten_output_is_infinitely_wrong() {
        let shape = Shape { c_in: 1, c_out: 1, input_dhw: [1, 1, 2], output_dhw: [1, 1, 2], kernel: 1, stride: 1 };
        assert_eq!(difference(&shape, &[f16::ONE, f16::NAN], &[1.0, 1.0]), f64::INFINITY);
        assert_eq!(difference(&shape, &[f16::ONE, f16::ONE], &[1.0, 1.0]), 0.0);
    }
}
