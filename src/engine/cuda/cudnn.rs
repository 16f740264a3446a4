//! Three-dimensional convolutions on cuDNN's graph API: channels-last half precision, single-precision sums.
//!
//! Input: a [`ConvSpec`] and device pointers. Output: [`Candidate`]s, the execution plans that cuDNN has for
//! `y = relu?(conv(x, w) + residual? + bias)` as one fused graph, and [`Bound`], one of them with its pointers, ready
//! to be launched or captured.
//!
//! ```text
//! x [D, H, W, C] f16 ──┐
//! w [K, T, R, S, C] f16┴─ conv ──f32──(+ residual)──f32──(+ bias [K])──f32──(relu)── y [D', H', W', K] f16
//! ```
//!
//! The residual comes before the bias, and what lies between the operations is f32: that is the pattern for which cuDNN
//! has precompiled tensor-core engines. Where no engine takes the whole graph, the candidates compute less of it and
//! [`Candidate::fusion`] says how much; the rest is then the caller's kernel.
//!
//! A plan's [name](Candidate::name) is its fusion, engine and knobs. It means the same plan for the same `ConvSpec` on
//! the same cuDNN version and the same kind of device, and [`Cudnn::plan`] makes that plan again without asking the
//! heuristics; so a choice made once by timing can be kept under those four.
//!
//! Invariants: [`Bound::execute`] neither allocates nor synchronises. A plan runs only with the handle that it was made
//! for. Nothing here panics for what a library, driver or caller does.
//!
//! Deliberately absent: device memory, streams and contexts (the caller's); backward passes; the choice among the
//! candidates.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use cudarc::cudnn::sys;
use cudarc::driver::sys::{CUdeviceptr, CUstream};

use library::{
    BehaviorNote, ConvolutionMode, DataType, Descriptor, DevicePointer, Enumerated, HeurMode, KnobType, Named,
    NumericalNote, PointwiseMode, RawHandle, attribute, kind,
};

mod library;
#[cfg(test)]
mod tests;

pub use library::{CudnnError, Library};

/// Bytes to which every tensor's address is aligned, which cuDNN's vector loads need.
pub const ALIGNMENT: u64 = 16;
/// Most configurations taken from one heuristic; cuDNN 9.19 answers with at most 40.
const MAX_CONFIGURATIONS: usize = 128;
/// Most knobs of an engine; cuDNN has 44 kinds.
const MAX_KNOBS: usize = 64;
/// Most notes of an engine; cuDNN has 10 numerical ones and 5 on behaviour.
const MAX_NOTES: usize = 32;
/// Most elements of a tensor: engines index with 32 bits.
const MAX_ELEMENTS: usize = i32::MAX as usize;

/// Element type of the bias.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum BiasType {
    /// Half precision; the type for which the fused engines exist.
    #[default]
    F16,
    /// Single precision. cuDNN 9.19 has no precompiled fused engine for it: plans need NVRTC or compute less of the
    /// graph.
    F32,
}

/// One convolution, batch 1, dilation 1, one group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConvSpec {
    /// Channels of the input.
    pub c_in: usize,
    /// Channels of the output.
    pub c_out: usize,
    /// Planes, rows, columns of the input.
    pub input_dhw: [usize; 3],
    /// Extent of the filter.
    pub kernel_dhw: [usize; 3],
    /// Step of the filter.
    pub stride_dhw: [usize; 3],
    /// Zeros before and after each axis.
    pub padding_dhw: [usize; 3],
    /// Whether negative results become zero, last of all.
    pub relu: bool,
    /// Whether a tensor of the output's shape and type is added.
    pub residual: bool,
    /// Element type of the bias, which is always there.
    pub bias: BiasType,
}

impl ConvSpec {
    /// Checks that the convolution has an output and fits 32-bit indices.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self) -> Result<(), CudnnError> {
        let fault = |what: String| Err(CudnnError::Spec(format!("{what} in {self}")));
        if self.c_in == 0 || self.c_out == 0 {
            return fault("no channels".to_owned());
        }
        for axis in 0..3 {
            let [input, kernel, stride, padding] =
                [self.input_dhw, self.kernel_dhw, self.stride_dhw, self.padding_dhw].map(|a| a[axis]);
            if input == 0 || kernel == 0 || stride == 0 || kernel > MAX_ELEMENTS || padding >= kernel {
                return fault(format!("axis {axis}: extent, kernel or stride 0, or padding not below the kernel"));
            }
            if input > MAX_ELEMENTS || input + 2 * padding < kernel {
                return fault(format!("axis {axis}: kernel larger than the padded input, or input too large"));
            }
        }
        let fits = |extents: [usize; 4]| {
            extents.into_iter().try_fold(1usize, usize::checked_mul).is_some_and(|n| n <= MAX_ELEMENTS)
        };
        let [d, h, w] = self.input_dhw;
        let [t, r, s] = self.kernel_dhw;
        let [p, q, o] = self.output_dhw();
        let filter = self.c_out.checked_mul(self.c_in).is_some_and(|kc| fits([kc, t, r, s]));
        if !fits([self.c_in, d, h, w]) || !fits([self.c_out, p, q, o]) || !filter {
            return fault(format!("a tensor of more than {MAX_ELEMENTS} elements"));
        }
        Ok(())
    }

    /// Planes, rows, columns of the output, of a spec that passes [`Self::check`].
    pub fn output_dhw(&self) -> [usize; 3] {
        std::array::from_fn(|axis| {
            (self.input_dhw[axis] + 2 * self.padding_dhw[axis] - self.kernel_dhw[axis]) / self.stride_dhw[axis] + 1
        })
    }

    /// Elements of the input, order D, H, W, C.
    pub fn x_elements(&self) -> usize {
        self.input_dhw.iter().product::<usize>() * self.c_in
    }

    /// Elements of the filter, order K, T, R, S, C.
    pub fn w_elements(&self) -> usize {
        self.kernel_dhw.iter().product::<usize>() * self.c_in * self.c_out
    }

    /// Elements of the output and of the residual, order D, H, W, K.
    pub fn y_elements(&self) -> usize {
        self.output_dhw().iter().product::<usize>() * self.c_out
    }

    /// Multiply-adds of direct convolution, those with padding included.
    pub fn macs(&self) -> u64 {
        (self.y_elements() as u64) * (self.kernel_dhw.iter().product::<usize>() as u64) * (self.c_in as u64)
    }
}

impl fmt::Display for ConvSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { c_in, c_out, input_dhw, kernel_dhw, stride_dhw, padding_dhw, relu, residual, bias } = self;
        let axes = |[d, h, w]: [usize; 3]| format!("{d}x{h}x{w}");
        write!(f, "{c_in}->{c_out} on {}, kernel {}", axes(*input_dhw), axes(*kernel_dhw))?;
        write!(f, ", stride {}, padding {}, {bias:?} bias", axes(*stride_dhw), axes(*padding_dhw))?;
        write!(f, "{}{}", if *residual { ", residual" } else { "" }, if *relu { ", relu" } else { "" })
    }
}

/// How much of the graph a plan computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fusion {
    /// All that the spec asks for.
    Full,
    /// Convolution and bias; residual and ReLU are left.
    Bias,
    /// The convolution alone; bias, residual and ReLU are left.
    Plain,
}

impl Fusion {
    const ALL: [Self; 3] = [Self::Full, Self::Bias, Self::Plain];

    /// Its name in a plan's.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Bias => "bias",
            Self::Plain => "plain",
        }
    }

    /// What is added to the convolution, and the ReLU, under this fusion.
    fn parts(self, spec: &ConvSpec) -> Parts {
        Parts {
            residual: self == Self::Full && spec.residual,
            bias: self != Self::Plain,
            relu: self == Self::Full && spec.relu,
        }
    }
}

#[derive(Clone, Copy)]
struct Parts {
    residual: bool,
    bias: bool,
    relu: bool,
}

/// The owned handle.
struct Handle {
    raw: sys::cudnnHandle_t,
    library: Arc<Library>,
}

// SAFETY: cuDNN allows a handle to be used from any thread, one at a time.
unsafe impl Send for Handle {}
// SAFETY: the handle is used only through `&Cudnn`, which is not `Sync`, hence by one thread at a time; plans hold it
// only so that it outlives them.
unsafe impl Sync for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: the handle lives and this is its last owner. A failure (a context that is gone) leaks it.
        let _ = unsafe { (self.library.functions.cudnnDestroy)(self.raw) };
    }
}

/// cuDNN on one stream. May move to another thread, is used by one at a time.
pub struct Cudnn {
    handle: Arc<Handle>,
    one_thread_at_a_time: PhantomData<Cell<()>>,
}

impl Cudnn {
    /// Opens cuDNN where the loader finds it, on `stream` of the current context.
    ///
    /// # Errors
    /// As [`Self::open_with`] and [`Library::open`].
    ///
    /// # Safety
    /// As [`Self::open_with`].
    pub unsafe fn open(stream: CUstream) -> Result<Self, CudnnError> {
        let library = Library::open(None)?;
        // SAFETY: passed on.
        unsafe { Self::open_with(&library, stream) }
    }

    /// A handle of `library` on `stream` (null: the default stream) of the context that is current.
    ///
    /// # Errors
    /// No driver, no device, not enough memory.
    ///
    /// # Safety
    /// `stream` is null or a live stream of the device's primary context, current on this thread, and stays so as long
    /// as the `Cudnn` and what is made with it are used.
    pub unsafe fn open_with(library: &Arc<Library>, stream: CUstream) -> Result<Self, CudnnError> {
        let mut raw: sys::cudnnHandle_t = std::ptr::null_mut();
        // SAFETY: without a device this is an error; the pointer is written only on success.
        let status = unsafe { (library.functions.cudnnCreate)(&raw mut raw) };
        library.check(status, || "create a cuDNN handle".to_owned())?;
        let handle = Arc::new(Handle { raw, library: Arc::clone(library) });
        // SAFETY: the handle was just made; the stream is the caller's promise. The driver's and the runtime's stream
        // are the same type.
        let status = unsafe { (library.functions.cudnnSetStream)(raw, stream.cast()) };
        library.check(status, || "set the stream of a cuDNN handle".to_owned())?;
        Ok(Self { handle, one_thread_at_a_time: PhantomData })
    }

    /// Major * 10000 + minor * 100 + patch of the library.
    pub fn version(&self) -> usize {
        self.handle.library.version()
    }

    /// The plans that compute `spec` with at most `workspace_limit` bytes of workspace, in the order in which the
    /// heuristics rank them, each once.
    ///
    /// All have the same [`Fusion`]: the most of the graph for which any engine is found.
    ///
    /// # Errors
    /// A spec that cannot be, or for which no engine is found.
    pub fn candidates(&self, spec: &ConvSpec, workspace_limit: usize) -> Result<Vec<Candidate>, CudnnError> {
        spec.check()?;
        let mut last = None;
        for fusion in Fusion::ALL {
            match self.candidates_fused(spec, fusion, workspace_limit) {
                Ok(found) if !found.is_empty() => return Ok(found),
                Ok(_) => {}
                Err(e) => last = Some(e),
            }
        }
        Err(no_engine(spec, workspace_limit, last))
    }

    /// The plans of exactly this fusion; perhaps none.
    ///
    /// # Errors
    /// A spec that cannot be, or a graph that cuDNN refuses to take.
    pub fn candidates_fused(
        &self,
        spec: &ConvSpec,
        fusion: Fusion,
        workspace_limit: usize,
    ) -> Result<Vec<Candidate>, CudnnError> {
        find_plans(&Target::Handle(&self.handle), spec, fusion, workspace_limit)
    }

    /// The plan of this [name](Candidate::name), made without the heuristics.
    ///
    /// # Errors
    /// A name that is none, or a plan that this version or device does not have; then choose again.
    pub fn plan(&self, spec: &ConvSpec, name: &str) -> Result<Candidate, CudnnError> {
        named_plan(&Target::Handle(&self.handle), spec, name)
    }
}

impl fmt::Debug for Cudnn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cudnn").field("version", &self.version()).finish_non_exhaustive()
    }
}

fn no_engine(spec: &ConvSpec, workspace_limit: usize, last: Option<CudnnError>) -> CudnnError {
    let detail = last.map(|e| format!(": {e}")).unwrap_or_default();
    CudnnError::NoEngine { spec: spec.to_string(), workspace_limit, detail }
}

/// For what device plans are made.
enum Target<'a> {
    /// That of a handle.
    Handle(&'a Arc<Handle>),
    /// One that is only described (`CUDNN_BACKEND_DEVICEPROP_DESCRIPTOR`, from 9.8 on): for tests on machines without
    /// one.
    #[cfg(test)]
    Described(Descriptor),
}

impl Target<'_> {
    fn library(&self) -> &Arc<Library> {
        match self {
            Self::Handle(handle) => &handle.library,
            #[cfg(test)]
            Self::Described(properties) => &properties.library,
        }
    }

    /// Sets the attribute of these two by which a descriptor learns of the device.
    fn tell(
        &self,
        descriptor: &mut Descriptor,
        handle: Option<Named>,
        #[cfg_attr(not(test), allow(unused_variables))] described: Option<Named>,
    ) -> Result<(), CudnnError> {
        match self {
            Self::Handle(owner) => handle.map_or(Ok(()), |name| descriptor.set(name, &[RawHandle(owner.raw)])),
            #[cfg(test)]
            Self::Described(properties) => described.map_or(Ok(()), |name| descriptor.refer(name, &[properties])),
        }
    }
}

const FLOAT: DataType = Enumerated(sys::cudnnDataType_t::CUDNN_DATA_FLOAT as u32);
const HALF: DataType = Enumerated(sys::cudnnDataType_t::CUDNN_DATA_HALF as u32);

/// Names of the tensors in a variant pack.
mod uid {
    pub(super) const X: i64 = 1;
    pub(super) const W: i64 = 2;
    pub(super) const BIAS: i64 = 3;
    pub(super) const RESIDUAL: i64 = 4;
    pub(super) const Y: i64 = 5;
    /// The first of those between two operations.
    pub(super) const BETWEEN: i64 = 16;
}

fn extents(dhw: [usize; 3]) -> [i64; 3] {
    dhw.map(|n| n as i64)
}

/// A channels-last tensor `n x c x d x h x w` at a multiple of [`ALIGNMENT`].
fn tensor(
    library: &Arc<Library>,
    uid: i64,
    data_type: DataType,
    n: usize,
    c: usize,
    dhw: [usize; 3],
) -> Result<Descriptor, CudnnError> {
    tensor_at(library, uid, data_type, n, c, dhw, ALIGNMENT as i64)
}

/// The same at a multiple of `alignment` bytes.
fn tensor_at(
    library: &Arc<Library>,
    uid: i64,
    data_type: DataType,
    n: usize,
    c: usize,
    dhw: [usize; 3],
    alignment: i64,
) -> Result<Descriptor, CudnnError> {
    let mut tensor = Descriptor::new(library, kind!(CUDNN_BACKEND_TENSOR_DESCRIPTOR))?;
    let ([d, h, w], n, c) = (extents(dhw), n as i64, c as i64);
    tensor.set(attribute!(CUDNN_ATTR_TENSOR_UNIQUE_ID), &[uid])?;
    tensor.set(attribute!(CUDNN_ATTR_TENSOR_DATA_TYPE), &[data_type])?;
    tensor.set(attribute!(CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT), &[alignment])?;
    tensor.set(attribute!(CUDNN_ATTR_TENSOR_DIMENSIONS), &[n, c, d, h, w])?;
    tensor.set(attribute!(CUDNN_ATTR_TENSOR_STRIDES), &[d * h * w * c, 1, h * w * c, w * c, c])?;
    if uid >= uid::BETWEEN {
        tensor.set_flag(attribute!(CUDNN_ATTR_TENSOR_IS_VIRTUAL), true)?;
    }
    tensor.finalize()
}

/// `y = op(x)` or `y = x op b`, computed in f32.
fn pointwise(
    library: &Arc<Library>,
    mode: sys::cudnnPointwiseMode_t,
    x: &Descriptor,
    b: Option<&Descriptor>,
    y: &Descriptor,
) -> Result<Descriptor, CudnnError> {
    let mut how = Descriptor::new(library, kind!(CUDNN_BACKEND_POINTWISE_DESCRIPTOR))?;
    let mode: PointwiseMode = Enumerated(mode as u32);
    how.set(attribute!(CUDNN_ATTR_POINTWISE_MODE), &[mode])?;
    how.set(attribute!(CUDNN_ATTR_POINTWISE_MATH_PREC), &[FLOAT])?;
    let how = how.finalize()?;
    let mut operation = Descriptor::new(library, kind!(CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR))?;
    operation.refer(attribute!(CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR), &[&how])?;
    operation.refer(attribute!(CUDNN_ATTR_OPERATION_POINTWISE_XDESC), &[x])?;
    if let Some(b) = b {
        operation.refer(attribute!(CUDNN_ATTR_OPERATION_POINTWISE_BDESC), &[b])?;
    }
    operation.refer(attribute!(CUDNN_ATTR_OPERATION_POINTWISE_YDESC), &[y])?;
    operation.finalize()
}

/// Axes, padding and step of a convolution, summed in f32.
fn convolution_descriptor(library: &Arc<Library>, spec: &ConvSpec) -> Result<Descriptor, CudnnError> {
    let mut how = Descriptor::new(library, kind!(CUDNN_BACKEND_CONVOLUTION_DESCRIPTOR))?;
    let mode: ConvolutionMode = Enumerated(sys::cudnnConvolutionMode_t::CUDNN_CROSS_CORRELATION as u32);
    let padding = extents(spec.padding_dhw);
    how.set(attribute!(CUDNN_ATTR_CONVOLUTION_SPATIAL_DIMS), &[3i64])?;
    how.set(attribute!(CUDNN_ATTR_CONVOLUTION_COMP_TYPE), &[FLOAT])?;
    how.set(attribute!(CUDNN_ATTR_CONVOLUTION_CONV_MODE), &[mode])?;
    how.set(attribute!(CUDNN_ATTR_CONVOLUTION_PRE_PADDINGS), &padding)?;
    how.set(attribute!(CUDNN_ATTR_CONVOLUTION_POST_PADDINGS), &padding)?;
    how.set(attribute!(CUDNN_ATTR_CONVOLUTION_DILATIONS), &[1i64; 3])?;
    how.set(attribute!(CUDNN_ATTR_CONVOLUTION_FILTER_STRIDES), &extents(spec.stride_dhw))?;
    how.finalize()
}

/// `y = conv(x, w)`.
fn convolution(
    library: &Arc<Library>,
    spec: &ConvSpec,
    x: &Descriptor,
    w: &Descriptor,
    y: &Descriptor,
) -> Result<Descriptor, CudnnError> {
    let how = convolution_descriptor(library, spec)?;
    let mut operation = Descriptor::new(library, kind!(CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR))?;
    operation.refer(attribute!(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_CONV_DESC), &[&how])?;
    operation.refer(attribute!(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_X), &[x])?;
    operation.refer(attribute!(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_W), &[w])?;
    operation.refer(attribute!(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_Y), &[y])?;
    operation.set(attribute!(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_ALPHA), &[1.0f32])?;
    operation.set(attribute!(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_BETA), &[0.0f32])?;
    operation.finalize()
}

/// The operation graph of `spec` under `fusion`.
fn graph(target: &Target<'_>, spec: &ConvSpec, fusion: Fusion) -> Result<Descriptor, CudnnError> {
    spec.check()?;
    let library = target.library();
    let parts = fusion.parts(spec);
    let of_output = |uid, data_type| tensor(library, uid, data_type, 1, spec.c_out, spec.output_dhw());
    let x = tensor(library, uid::X, HALF, 1, spec.c_in, spec.input_dhw)?;
    let w = tensor(library, uid::W, HALF, spec.c_out, spec.c_in, spec.kernel_dhw)?;
    let mut left = [parts.residual, parts.bias, parts.relu].into_iter().filter(|p| *p).count();
    let mut between = uid::BETWEEN;
    // Where the next operation writes: the output if it is the last, else a tensor that never is in memory.
    let mut next = || {
        if left == 0 {
            return of_output(uid::Y, HALF);
        }
        (left, between) = (left - 1, between + 1);
        of_output(between, FLOAT)
    };
    let add = sys::cudnnPointwiseMode_t::CUDNN_POINTWISE_ADD;
    let mut last = next()?;
    let mut operations = vec![convolution(library, spec, &x, &w, &last)?];
    if parts.residual {
        let (residual, y) = (of_output(uid::RESIDUAL, HALF)?, next()?);
        operations.push(pointwise(library, add, &last, Some(&residual), &y)?);
        last = y;
    }
    if parts.bias {
        let data_type = match spec.bias {
            BiasType::F16 => HALF,
            BiasType::F32 => FLOAT,
        };
        let (bias, y) = (tensor(library, uid::BIAS, data_type, 1, spec.c_out, [1; 3])?, next()?);
        operations.push(pointwise(library, add, &last, Some(&bias), &y)?);
        last = y;
    }
    if parts.relu {
        let relu = sys::cudnnPointwiseMode_t::CUDNN_POINTWISE_RELU_FWD;
        operations.push(pointwise(library, relu, &last, None, &next()?)?);
    }
    let mut graph = Descriptor::new(library, kind!(CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR))?;
    let operations: Vec<&Descriptor> = operations.iter().collect();
    graph.refer(attribute!(CUDNN_ATTR_OPERATIONGRAPH_OPS), &operations)?;
    target.tell(&mut graph, Some(attribute!(CUDNN_ATTR_OPERATIONGRAPH_HANDLE)), None)?;
    graph.finalize()
}

/// The configurations that one heuristic proposes for a graph.
fn proposals(
    target: &Target<'_>,
    graph: &Descriptor,
    mode: sys::cudnnBackendHeurMode_t,
) -> Result<Vec<Descriptor>, CudnnError> {
    let mut heuristic = Descriptor::new(target.library(), kind!(CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR))?;
    let mode: HeurMode = Enumerated(mode as u32);
    heuristic.refer(attribute!(CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH), &[graph])?;
    heuristic.set(attribute!(CUDNN_ATTR_ENGINEHEUR_MODE), &[mode])?;
    target.tell(&mut heuristic, None, Some(attribute!(CUDNN_ATTR_ENGINEHEUR_DEVICEPROP)))?;
    heuristic.finalize()?.referred(
        attribute!(CUDNN_ATTR_ENGINEHEUR_RESULTS),
        kind!(CUDNN_BACKEND_ENGINECFG_DESCRIPTOR),
        MAX_CONFIGURATIONS,
    )
}

/// Engine and knobs of a configuration.
fn identify(configuration: &Descriptor, fusion: Fusion) -> Result<(PlanName, Descriptor), CudnnError> {
    let engine =
        configuration.referred(attribute!(CUDNN_ATTR_ENGINECFG_ENGINE), kind!(CUDNN_BACKEND_ENGINE_DESCRIPTOR), 1)?;
    let Some(engine) = engine.into_iter().next() else {
        return Err(CudnnError::PlanName("a configuration without an engine".to_owned()));
    };
    let choices = configuration.referred(
        attribute!(CUDNN_ATTR_ENGINECFG_KNOB_CHOICES),
        kind!(CUDNN_BACKEND_KNOB_CHOICE_DESCRIPTOR),
        MAX_KNOBS,
    )?;
    let mut knobs = Vec::with_capacity(choices.len());
    for choice in choices {
        let knob: KnobType = choice.get_one(attribute!(CUDNN_ATTR_KNOB_CHOICE_KNOB_TYPE))?;
        knobs.push((knob.0, choice.get_one(attribute!(CUDNN_ATTR_KNOB_CHOICE_KNOB_VALUE))?));
    }
    knobs.sort_unstable();
    Ok((PlanName { fusion, engine: engine.get_one(attribute!(CUDNN_ATTR_ENGINE_GLOBAL_INDEX))?, knobs }, engine))
}

/// Makes the plan of a configuration.
fn build(
    target: &Target<'_>,
    spec: &ConvSpec,
    name: &PlanName,
    engine: &Descriptor,
    configuration: &Descriptor,
) -> Result<Candidate, CudnnError> {
    let mut plan = Descriptor::new(target.library(), kind!(CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR))?;
    plan.refer(attribute!(CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG), &[configuration])?;
    let handle = attribute!(CUDNN_ATTR_EXECUTION_PLAN_HANDLE);
    target.tell(&mut plan, Some(handle), Some(attribute!(CUDNN_ATTR_EXECUTION_PLAN_DEVICEPROP)))?;
    let plan = plan.finalize()?;
    let bytes: i64 = plan.get_one(attribute!(CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE))?;
    let workspace = usize::try_from(bytes).map_err(|_| CudnnError::Spec(format!("workspace of {bytes} bytes")))?;
    let numerical: Vec<NumericalNote> = engine.get(attribute!(CUDNN_ATTR_ENGINE_NUMERICAL_NOTE), MAX_NOTES)?;
    let behavior: Vec<BehaviorNote> = engine.get(attribute!(CUDNN_ATTR_ENGINE_BEHAVIOR_NOTE), MAX_NOTES)?;
    let notes = numerical.iter().map(|n| Note::Numerical(n.0)).chain(behavior.iter().map(|n| Note::Behavior(n.0)));
    let handle = match target {
        Target::Handle(handle) => Some(Arc::clone(handle)),
        #[cfg(test)]
        Target::Described(_) => None,
    };
    Ok(Candidate {
        name: name.to_string(),
        fusion: name.fusion,
        workspace,
        notes: notes.collect(),
        spec: *spec,
        plan: Arc::new(Plan { descriptor: plan, handle }),
    })
}

fn find_plans(
    target: &Target<'_>,
    spec: &ConvSpec,
    fusion: Fusion,
    workspace_limit: usize,
) -> Result<Vec<Candidate>, CudnnError> {
    use sys::cudnnBackendHeurMode_t as Mode;
    let graph = graph(target, spec, fusion)?;
    let mut found: Vec<Candidate> = Vec::new();
    let mut tried = std::collections::HashSet::new();
    for mode in [
        Mode::CUDNN_HEUR_MODE_A,
        Mode::CUDNN_HEUR_MODE_B,
        Mode::CUDNN_HEUR_MODE_INSTANT,
        Mode::CUDNN_HEUR_MODE_FALLBACK,
    ] {
        // A heuristic that does not know the graph, or is not in this version, proposes nothing.
        let Ok(configurations) = proposals(target, &graph, mode) else { continue };
        for configuration in &configurations {
            let Ok((name, engine)) = identify(configuration, fusion) else { continue };
            if !tried.insert(name.to_string()) {
                continue;
            }
            match build(target, spec, &name, &engine, configuration) {
                Ok(candidate) if candidate.workspace <= workspace_limit => found.push(candidate),
                // What does not build or takes too much is no candidate.
                Ok(_) | Err(_) => {}
            }
        }
    }
    Ok(found)
}

fn named_plan(target: &Target<'_>, spec: &ConvSpec, name: &str) -> Result<Candidate, CudnnError> {
    let name = PlanName::parse(name).ok_or_else(|| CudnnError::PlanName(name.to_owned()))?;
    let engine = engine(target, &graph(target, spec, name.fusion)?, name.engine)?;
    turned_plan(target, spec, &name, &engine)
}

/// The engine of this index for a graph.
fn engine(target: &Target<'_>, graph: &Descriptor, index: i64) -> Result<Descriptor, CudnnError> {
    let mut engine = Descriptor::new(target.library(), kind!(CUDNN_BACKEND_ENGINE_DESCRIPTOR))?;
    engine.refer(attribute!(CUDNN_ATTR_ENGINE_OPERATION_GRAPH), &[graph])?;
    engine.set(attribute!(CUDNN_ATTR_ENGINE_GLOBAL_INDEX), &[index])?;
    // CUDNN_ATTR_ENGINE_DEVICEPROP, which cudarc does not list.
    let device = Named { value: 1307, name: "CUDNN_ATTR_ENGINE_DEVICEPROP" };
    target.tell(&mut engine, None, Some(device))?;
    engine.finalize()
}

/// The plan of an engine with the knobs that `name` states.
fn turned_plan(
    target: &Target<'_>,
    spec: &ConvSpec,
    name: &PlanName,
    engine: &Descriptor,
) -> Result<Candidate, CudnnError> {
    let library = target.library();
    let mut choices = Vec::with_capacity(name.knobs.len());
    for (knob, value) in &name.knobs {
        let mut choice = Descriptor::new(library, kind!(CUDNN_BACKEND_KNOB_CHOICE_DESCRIPTOR))?;
        let knob: KnobType = Enumerated(*knob);
        choice.set(attribute!(CUDNN_ATTR_KNOB_CHOICE_KNOB_TYPE), &[knob])?;
        choice.set(attribute!(CUDNN_ATTR_KNOB_CHOICE_KNOB_VALUE), &[*value])?;
        choices.push(choice.finalize()?);
    }
    let mut configuration = Descriptor::new(library, kind!(CUDNN_BACKEND_ENGINECFG_DESCRIPTOR))?;
    configuration.refer(attribute!(CUDNN_ATTR_ENGINECFG_ENGINE), &[engine])?;
    if !choices.is_empty() {
        let choices: Vec<&Descriptor> = choices.iter().collect();
        configuration.refer(attribute!(CUDNN_ATTR_ENGINECFG_KNOB_CHOICES), &choices)?;
    }
    build(target, spec, name, engine, &configuration.finalize()?)
}

/// What makes a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
struct PlanName {
    fusion: Fusion,
    engine: i64,
    /// Kind and value, in order of the kind.
    knobs: Vec<(u32, i64)>,
}

impl PlanName {
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(':');
        let (fusion, engine, knobs) = (parts.next()?, parts.next()?, parts.next()?);
        if parts.next().is_some() {
            return None;
        }
        let fusion = Fusion::ALL.into_iter().find(|f| f.as_str() == fusion)?;
        let pair = |pair: &str| {
            let (knob, value) = pair.split_once('=')?;
            Some((knob.parse().ok()?, value.parse().ok()?))
        };
        let knobs: Vec<(u32, i64)> = knobs.split(',').filter(|k| !k.is_empty()).map(pair).collect::<Option<_>>()?;
        let name = Self { fusion, engine: engine.parse().ok()?, knobs };
        // Only the one way in which `Display` writes it.
        (name.knobs.len() <= MAX_KNOBS && name.to_string() == text).then_some(name)
    }
}

impl fmt::Display for PlanName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:", self.fusion.as_str(), self.engine)?;
        for (i, (knob, value)) in self.knobs.iter().enumerate() {
            write!(f, "{}{knob}={value}", if i == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

/// What cuDNN says of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Note {
    /// `cudnnBackendNumericalNote_t`.
    Numerical(u32),
    /// `cudnnBackendBehaviorNote_t`.
    Behavior(u32),
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NUMERICAL: [&str; 10] = [
            "tensor-core",
            "down-convert-inputs",
            "reduced-precision-reduction",
            "fft",
            "nondeterministic",
            "winograd",
            "winograd-4x4",
            "winograd-6x6",
            "winograd-13x13",
            "strict-nan",
        ];
        const BEHAVIOR: [&str; 5] =
            ["runtime-compilation", "reorders-int8-filter", "reorders-int8-bias", "native-cuda-graph", "cublaslt"];
        let (names, kind, number): (&[&str], _, _) = match *self {
            Self::Numerical(number) => (&NUMERICAL, "numerical", number),
            Self::Behavior(number) => (&BEHAVIOR, "behaviour", number),
        };
        match names.get(number as usize) {
            Some(name) => f.write_str(name),
            None => write!(f, "{kind}-{number}"),
        }
    }
}

struct Plan {
    // Dropped before the handle.
    descriptor: Descriptor,
    /// None for a device that is only described; such a plan cannot run.
    handle: Option<Arc<Handle>>,
}

/// Device addresses of a convolution's operands, each aligned to [`ALIGNMENT`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pointers {
    /// [`ConvSpec::x_elements`] f16, order D, H, W, C.
    pub x: CUdeviceptr,
    /// [`ConvSpec::w_elements`] f16, order K, T, R, S, C.
    pub w: CUdeviceptr,
    /// `c_out` values of [`ConvSpec::bias`]; not looked at under [`Fusion::Plain`].
    pub bias: CUdeviceptr,
    /// [`ConvSpec::y_elements`] f16, order D, H, W, K; looked at only where the plan adds it.
    pub residual: CUdeviceptr,
    /// [`ConvSpec::y_elements`] f16, order D, H, W, K; none of the inputs.
    pub y: CUdeviceptr,
    /// [`Candidate::workspace`] bytes; not looked at where that is 0.
    pub workspace: CUdeviceptr,
}

/// An execution plan.
#[derive(Clone)]
pub struct Candidate {
    name: String,
    fusion: Fusion,
    workspace: usize,
    notes: Vec<Note>,
    spec: ConvSpec,
    plan: Arc<Plan>,
}

impl Candidate {
    /// Fusion, engine and knobs as `fusion:engine:knob=value,…`, for [`Cudnn::plan`].
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How much of the graph it computes.
    pub fn fusion(&self) -> Fusion {
        self.fusion
    }

    /// Bytes of workspace.
    pub fn workspace(&self) -> usize {
        self.workspace
    }

    /// What cuDNN says of its engine.
    pub fn notes(&self) -> &[Note] {
        &self.notes
    }

    /// Whether the same input gives the same bits.
    pub fn is_deterministic(&self) -> bool {
        let note = sys::cudnnBackendNumericalNote_t::CUDNN_NUMERICAL_NOTE_NONDETERMINISTIC as u32;
        !self.notes.contains(&Note::Numerical(note))
    }

    /// The convolution it computes.
    pub fn spec(&self) -> &ConvSpec {
        &self.spec
    }

    /// Ties the plan to addresses.
    ///
    /// # Errors
    /// An address that is used and is null or misaligned.
    ///
    /// # Safety
    /// Each address that is used points to memory of the handle's device of the size and order that [`Pointers`]
    /// states, and stays so as long as the [`Bound`], and any CUDA graph that captured it, is executed.
    pub unsafe fn bind(&self, pointers: &Pointers) -> Result<Bound, CudnnError> {
        let parts = self.fusion.parts(&self.spec);
        let Pointers { x, w, bias, residual, y, workspace } = *pointers;
        let operands = [
            ("x", uid::X, x, true),
            ("w", uid::W, w, true),
            ("bias", uid::BIAS, bias, parts.bias),
            ("residual", uid::RESIDUAL, residual, parts.residual),
            ("y", uid::Y, y, true),
        ];
        let (mut uids, mut addresses) = (Vec::with_capacity(5), Vec::with_capacity(5));
        let check = |operand, address: u64| {
            if address == 0 || !address.is_multiple_of(ALIGNMENT) {
                return Err(CudnnError::Pointer { operand, got: address, expected: "a multiple of 16, not null" });
            }
            Ok(())
        };
        for (operand, uid, address, used) in operands {
            if used {
                check(operand, address)?;
                uids.push(uid);
                addresses.push(DevicePointer(address));
            }
        }
        let workspace = if self.workspace == 0 { 0 } else { workspace };
        if self.workspace > 0 {
            check("workspace", workspace)?;
        }
        let library = &self.plan.descriptor.library;
        let mut pack = Descriptor::new(library, kind!(CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR))?;
        pack.set(attribute!(CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS), &uids)?;
        pack.set(attribute!(CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS), &addresses)?;
        pack.set(attribute!(CUDNN_ATTR_VARIANT_PACK_WORKSPACE), &[DevicePointer(workspace)])?;
        Ok(Bound { pack: pack.finalize()?, plan: Arc::clone(&self.plan) })
    }
}

impl fmt::Debug for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let notes: Vec<String> = self.notes.iter().map(ToString::to_string).collect();
        f.debug_struct("Candidate")
            .field("name", &self.name)
            .field("workspace", &self.workspace)
            .field("notes", &notes)
            .finish_non_exhaustive()
    }
}

/// A plan with its addresses.
pub struct Bound {
    pack: Descriptor,
    plan: Arc<Plan>,
}

impl Bound {
    /// Puts the convolution on the handle's stream, or into the graph that is being captured from it. Does not wait and
    /// does not allocate. The handle's context is current on this thread. Execute a plan once before it is captured:
    /// the first run may load code, which a capture does not allow.
    ///
    /// # Errors
    /// Another handle than the plan's, or a launch that fails.
    pub fn execute(&self, cudnn: &Cudnn) -> Result<(), CudnnError> {
        let handle = &cudnn.handle;
        if !self.plan.handle.as_ref().is_some_and(|own| Arc::ptr_eq(own, handle)) {
            return Err(CudnnError::ForeignHandle);
        }
        // SAFETY: handle, plan and pack live and belong together; `&Cudnn` is held by one thread at a time, so no other
        // call uses the handle or this plan; the addresses are good by the promise of `bind`.
        let status = unsafe {
            (handle.library.functions.cudnnBackendExecute)(handle.raw, self.plan.descriptor.raw(), self.pack.raw())
        };
        handle.library.check(status, || "execute a convolution".to_owned())
    }
}

impl fmt::Debug for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bound").finish_non_exhaustive()
    }
}
