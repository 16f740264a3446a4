//! The cpu backend: Winograd convolutions on activations in blocks of sixteen channels.
//!
//! Input: a volume D, H, W. Output: [`Inference`]. Preparing folds batch normalisation, chooses a method a convolution
//! ([`plan`]) and packs the weights ([`cache`]); a session owns its memory ([`arena`]); all sessions share one pool
//! ([`pool`]). A run is
//!
//! ```text
//! stem (bias, ReLU)
//! for each block:  conv1 (bias, ReLU)  ->  conv2 (bias, sums)  ->  attentions from the sums
//!                  ->  merge: scale, add shortcut, ReLU (a strided shortcut's convolution does it in its registers)
//! head
//! ```
//!
//! **Work ahead.** The stem and both convolutions of the first block come before the first pooling over all planes, so
//! each of their depth rows can be computed once its input planes are known ([`Session::advance`]). The session keeps a
//! copy of the input it used: a run copies the planes whose bits differ, marks what depended on them, and computes what
//! is not marked done, with the same code in the same order of sums. A plain run is the case where nothing was done.
//!
//! Invariants: results are bit-identical for any number of threads, any work ahead, and any earlier use of the session;
//! nothing is allocated in a run after a session's first. The cancel token is read before each item of work, about a
//! millisecond at full size.
//!
//! Deliberately absent: batches (a scanner has one patient), INT8 (the weights' scores were measured in f32).

use std::sync::Arc;
use std::time::Instant;

use crate::engine::priority::lower_this_thread;
use crate::engine::{
    Backend, CancelToken, EngineError, EngineOptions, Inference, LayerTiming, Reuse, Session, check_input, softmax_into,
};
use crate::model::{AttentionOrder, Model};

pub mod arena;
pub mod cache;
pub mod conv;
pub mod dispatch;
pub mod matrix;
pub mod plan;
pub mod pool;
pub mod roof;
pub mod simd;
pub mod stem;
pub mod winograd;

use arena::{Floats, Shape, Tensor};
use cache::Packed;
use conv::{Context, DirectInput, Ending, Sums};
use dispatch::{Isa, Kernels};
use plan::{Block, Conv, Gate, Method, Plan, StemInput};
use pool::Pool;
use simd::LANES;

struct Shared {
    plan: Plan,
    kernels: Kernels,
    weights: Packed,
    pool: Pool,
}

/// The cpu backend.
pub struct CpuBackend {
    shared: Arc<Shared>,
    note: Option<&'static str>,
}

impl CpuBackend {
    /// Prepares `model` and starts the pool; `note` is what [`Backend::note`] returns.
    ///
    /// # Errors
    /// Too many threads, threads that cannot be started, no memory, an instruction set that is not there.
    pub fn new(model: &Model, options: &EngineOptions, note: Option<&'static str>) -> Result<Self, EngineError> {
        let threads = options.resolved_threads()?;
        let isa = options.isa.unwrap_or_else(Isa::best);
        let kernels = Kernels::of(isa).ok_or(EngineError::Isa { isa: isa.as_str() })?;
        let nice = options.nice;
        let started = move || {
            // A thread that keeps its priority computes as well; the system says no only where it forbids the call.
            let _ = lower_this_thread(nice);
        };
        let pool = Pool::new(threads, started)
            .map_err(|error| EngineError::ThreadPool { threads, reason: error.to_string() })?;
        let plan = Plan::new(model);
        let weights = Packed::load(model, &plan, &kernels, &pool, options.weight_cache)?;
        Ok(Self { shared: Arc::new(Shared { plan, kernels, weights, pool }), note })
    }

    /// Its kernels.
    pub fn kernels(&self) -> &Kernels {
        &self.shared.kernels
    }

    /// What was decided about the network.
    pub fn plan(&self) -> &Plan {
        &self.shared.plan
    }
}

impl Backend for CpuBackend {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn session(&self) -> Result<Box<dyn Session>, EngineError> {
        Ok(Box::new(CpuSession::new(Arc::clone(&self.shared))?))
    }

    fn note(&self) -> Option<&str> {
        self.note
    }

    fn threads(&self) -> usize {
        self.shared.pool.threads()
    }

    fn instruction_set(&self) -> &'static str {
        self.shared.kernels.isa.as_str()
    }

    fn weight_bytes(&self) -> usize {
        self.shared.weights.owned_bytes() + self.shared.plan.small_bytes()
    }

    fn mapped_bytes(&self) -> usize {
        self.shared.weights.mapped_bytes()
    }

    fn session_bytes(&self) -> usize {
        let plan = &self.shared.plan;
        let [ends, hidden] = plan.gate_lengths();
        let floats = 3 * plan.activation_len()
            + plan.stem_input().total()
            + plan.scratch_len(self.threads(), &self.shared.kernels)
            + plan.sums_len()
            + 2 * plan.planes_len()
            + 2 * ends
            + hidden;
        4 * floats
    }
}

impl Shared {
    fn weights(&self, conv: &Conv) -> &[f32] {
        &self.weights[conv.weights_at..conv.weights_at + conv.weights_len]
    }
}

/// What of the stem and of the first block's convolutions is done, for the input that the session holds a copy of.
struct Ahead {
    /// Planes of the input that the copy holds.
    known: Vec<bool>,
    /// Depth tiles of the stem.
    stem: Vec<bool>,
    /// Depth tiles of the first convolution.
    conv1: Vec<bool>,
    /// Depth tiles of the second.
    conv2: Vec<bool>,
}

impl Ahead {
    fn forget(&mut self) {
        self.stem.fill(false);
        self.conv1.fill(false);
        self.conv2.fill(false);
    }
}

/// `range` and the plane before and behind it, inside `0..d`.
fn widened(range: std::ops::Range<usize>, d: usize) -> std::ops::Range<usize> {
    range.start.saturating_sub(1)..(range.end + 1).min(d)
}

/// The tiles of `conv` (stride 1) that are not `done` and whose input planes all are, to `list`; `input(plane)` says
/// which are.
fn possible(conv: &Conv, done: &[bool], input: impl Fn(usize) -> bool, list: &mut Vec<usize>) {
    let d = conv.input.dhw[0];
    list.clear();
    list.extend((0..done.len()).filter(|&tile| !done[tile] && widened(conv.planes_of(tile), d).all(&input)));
}

/// Whether all the inputs of the depth tile of `conv` that `plane` is in fulfil `input`.
fn needs(conv: &Conv, plane: usize, input: impl Fn(usize) -> bool) -> bool {
    widened(conv.planes_of(conv.depth_tile(plane)), conv.input.dhw[0]).all(input)
}

/// Marks the tiles of `conv` as not done whose input planes are not all done.
fn withdraw(conv: &Conv, done: &mut [bool], input: impl Fn(usize) -> bool) {
    let d = conv.input.dhw[0];
    for (tile, done) in done.iter_mut().enumerate() {
        *done = *done && widened(conv.planes_of(tile), d).all(&input);
    }
}

/// Whether `plane` is done when its depth tiles are `done`.
fn plane_done(conv: &Conv, done: &[bool], plane: usize) -> bool {
    done[conv.depth_tile(plane)]
}

struct CpuSession {
    shared: Arc<Shared>,
    /// A block's input and output, then the outputs of its two convolutions.
    activations: [Tensor; 3],
    /// The input with its border.
    input: Floats,
    scratch: Floats,
    sums: Vec<f32>,
    means: Vec<f32>,
    scale: Vec<f32>,
    gate: [Vec<f32>; 3],
    ahead: Ahead,
    /// Depth tiles or planes to be computed.
    list: Vec<usize>,
    reuse: Reuse,
    /// Seconds of each layer in the last run.
    seconds: Vec<f64>,
}

impl CpuSession {
    fn new(shared: Arc<Shared>) -> Result<Self, EngineError> {
        let plan = &shared.plan;
        let first = &plan.blocks[0];
        let d = plan.input_dhw[0];
        let activation = plan.activation_len();
        let [ends, hidden] = plan.gate_lengths();
        let mut input = Floats::zeroed(plan.stem_input().total())?;
        input.touch();
        let mut scratch = Floats::zeroed(plan.scratch_len(shared.pool.threads(), &shared.kernels))?;
        scratch.touch();
        Ok(Self {
            activations: [Tensor::new(activation)?, Tensor::new(activation)?, Tensor::new(activation)?],
            input,
            scratch,
            sums: vec![0.0; plan.sums_len()],
            means: vec![0.0; plan.planes_len()],
            scale: vec![0.0; plan.planes_len()],
            gate: [vec![0.0; ends], vec![0.0; hidden], vec![0.0; ends]],
            ahead: Ahead {
                known: vec![false; d],
                stem: vec![false; plan.stem.tiles()[0]],
                conv1: vec![false; first.conv1.tiles()[0]],
                conv2: vec![false; first.conv2.tiles()[0]],
            },
            list: Vec::with_capacity(d),
            reuse: Reuse::default(),
            seconds: vec![0.0; layer_names(plan).count()],
            shared,
        })
    }

    /// Copies the `ready` planes of `input` that differ from those held, and withdraws what was made of them.
    fn take_input(&mut self, input: &[f32], ready: Option<&[bool]>) {
        let plan = &self.shared.plan;
        let [d, h, w] = plan.input_dhw;
        let stem_input = plan.stem_input();
        let [before_d, before_h, before_w] = StemInput::BEFORE;
        for z in (0..d).filter(|&z| ready.is_none_or(|ready| ready[z])) {
            let plane = &input[z * h * w..(z + 1) * h * w];
            let first = (z + before_d) * stem_input.plane() + before_h * stem_input.row() + before_w;
            let mut same = self.ahead.known[z];
            for (y, row) in plane.chunks_exact(w).enumerate() {
                let held = &mut self.input[first + y * stem_input.row()..][..w];
                // Bits are compared: -0 and 0 are different inputs. Without leaving early, which is done in vectors.
                let differing = held.iter().zip(row).fold(0, |bits, (a, b)| bits | (a.to_bits() ^ b.to_bits()));
                if same && differing == 0 {
                    continue;
                }
                same = false;
                held.copy_from_slice(row);
            }
            if !same {
                self.ahead.known[z] = true;
                for z in widened(z..z + 1, d) {
                    self.ahead.stem[plan.stem.depth_tile(z)] = false;
                }
            }
        }
        let (first, ahead) = (&plan.blocks[0], &mut self.ahead);
        withdraw(&first.conv1, &mut ahead.conv1, |z| plane_done(&plan.stem, &ahead.stem, z));
        withdraw(&first.conv2, &mut ahead.conv2, |z| plane_done(&first.conv1, &ahead.conv1, z));
    }

    /// Computes what is possible with the `ready` planes and not done of the stem and the first block's convolutions.
    fn prefix(&mut self, context: &Context<'_>, ready: Option<&[bool]>) -> Result<(), EngineError> {
        let shared = &self.shared;
        let plan = &shared.plan;
        let first = &plan.blocks[0];
        let [x, y1, y2] = &mut self.activations;
        for (tensor, shape) in
            [(&mut *x, plan.stem.output), (&mut *y1, first.conv1.output), (&mut *y2, first.conv2.output)]
        {
            tensor.reshape(shape, &shared.pool);
        }
        let (ahead, list) = (&mut self.ahead, &mut self.list);
        // What an earlier series has left behind elsewhere is not worth computing with: all that a plane was made of must
        // be ready, however long it has been done.
        let input_ready = |z: usize| ready.is_none_or(|ready| ready[z]);
        let stem_ready = |z: usize| needs(&plan.stem, z, input_ready);
        let conv1_ready = |z: usize| needs(&first.conv1, z, stem_ready);

        let started = Instant::now();
        possible(&plan.stem, &ahead.stem, input_ready, list);
        if !list.is_empty() {
            let weights = shared.weights(&plan.stem);
            let at = plan.stem_input();
            conv::stem(context, &plan.stem, at, weights, &self.input, x, &mut self.scratch, list)?;
            list.iter().for_each(|&tile| ahead.stem[tile] = true);
        }
        self.seconds[0] += started.elapsed().as_secs_f64();

        let started = Instant::now();
        possible(&first.conv1, &ahead.conv1, |z| plane_done(&plan.stem, &ahead.stem, z) && stem_ready(z), list);
        if !list.is_empty() {
            convolution(
                context,
                &first.conv1,
                shared.weights(&first.conv1),
                x,
                y1,
                true,
                None,
                &mut self.scratch,
                list,
            )?;
            list.iter().for_each(|&tile| ahead.conv1[tile] = true);
        }
        self.seconds[1] += started.elapsed().as_secs_f64();

        let started = Instant::now();
        let done = |z| plane_done(&first.conv1, &ahead.conv1, z) && conv1_ready(z);
        possible(&first.conv2, &ahead.conv2, done, list);
        if !list.is_empty() {
            let sums = Some(Sums(&mut self.sums));
            convolution(
                context,
                &first.conv2,
                shared.weights(&first.conv2),
                y1,
                y2,
                false,
                sums,
                &mut self.scratch,
                list,
            )?;
            list.iter().for_each(|&tile| ahead.conv2[tile] = true);
        }
        self.seconds[2] += started.elapsed().as_secs_f64();
        Ok(())
    }

    /// What is done of the prefix, in multiply-adds.
    fn done_macs(&self) -> (u64, u64) {
        let plan = &self.shared.plan;
        let first = &plan.blocks[0];
        let of = |conv: &Conv, planes: usize| conv.macs() / conv.output.dhw[0] as u64 * planes as u64;
        let planes =
            |conv: &Conv, done: &[bool]| (0..conv.output.dhw[0]).filter(|&z| plane_done(conv, done, z)).count();
        let done = of(&plan.stem, planes(&plan.stem, &self.ahead.stem))
            + of(&first.conv1, planes(&first.conv1, &self.ahead.conv1))
            + of(&first.conv2, planes(&first.conv2, &self.ahead.conv2));
        (done, plan.stem.macs() + first.conv1.macs() + first.conv2.macs())
    }

    /// Runs block `index` from its convolutions on; its output takes the place of its input in `activations[0]`.
    fn block(&mut self, context: &Context<'_>, index: usize) -> Result<(), EngineError> {
        let shared = Arc::clone(&self.shared);
        let block = &shared.plan.blocks[index];
        if index > 0 {
            let [x, y1, y2] = &mut self.activations;
            self.list.clear();
            self.list.extend(0..block.conv1.tiles()[0]);
            let started = Instant::now();
            y1.reshape(block.conv1.output, &shared.pool);
            convolution(
                context,
                &block.conv1,
                shared.weights(&block.conv1),
                x,
                y1,
                true,
                None,
                &mut self.scratch,
                &self.list,
            )?;
            self.seconds[3 * index + 1] = started.elapsed().as_secs_f64();
            let started = Instant::now();
            self.list.clear();
            self.list.extend(0..block.conv2.tiles()[0]);
            y2.reshape(block.conv2.output, &shared.pool);
            let sums = Some(Sums(&mut self.sums));
            convolution(
                context,
                &block.conv2,
                shared.weights(&block.conv2),
                y1,
                y2,
                false,
                sums,
                &mut self.scratch,
                &self.list,
            )?;
            self.seconds[3 * index + 2] = started.elapsed().as_secs_f64();
        }
        let started = Instant::now();
        let shape = block.conv2.output;
        plane_means(shape, block.conv2.strips(), &self.sums, &mut self.means);
        attention(block, shape, shared.plan.order, &mut self.means, &mut self.scale, &mut self.gate);
        // From here on the stem's output is no more.
        self.ahead.forget();
        let [x, _, y2] = &mut self.activations;
        if let Some(shortcut) = &block.shortcut {
            let from = shortcut.input;
            let input =
                DirectInput { data: x.data(from), step: [2 * from.plane(), 2 * from.row(), 2 * LANES], length: LANES };
            self.list.clear();
            self.list.extend(0..shape.dhw[0]);
            let ending = Ending::Merge(&self.scale);
            conv::direct(context, shortcut, shared.weights(shortcut), input, y2, ending, &self.list)?;
            self.activations.swap(0, 2);
        } else {
            let last = index + 1 == shared.plan.blocks.len();
            let sums = last.then_some(Sums(&mut self.sums));
            conv::merge(context, shape, x, y2, &self.scale, sums)?;
        }
        self.seconds[3 * index + 3] = started.elapsed().as_secs_f64();
        Ok(())
    }

    /// The pooled vector, the feature map in C, D, H, W order, the logits and scores, from the last activation.
    fn head(&mut self, out: &mut Inference) {
        let plan = &self.shared.plan;
        let Some(last) = plan.blocks.last() else { return };
        let shape = last.conv2.output;
        let [d, h, w] = shape.dhw;
        out.pooled.clear();
        out.pooled.extend((0..shape.c).map(|ch| {
            let sums = &self.sums[ch / LANES * h * d * LANES..][..h * d * LANES];
            let sum: f64 = sums[ch % LANES..].iter().step_by(LANES).map(|&v| f64::from(v)).sum();
            (sum / (d * h * w) as f64) as f32
        }));
        let x = self.activations[0].data(shape);
        out.feature_shape_cdhw = [shape.c, d, h, w];
        out.feature_map.resize(shape.c * d * h * w, 0.0);
        for block in 0..shape.blocks() {
            let lanes = LANES.min(shape.c - block * LANES);
            for (z, y) in (0..d).flat_map(|z| (0..h).map(move |y| (z, y))) {
                let row = &x[shape.at(block, [z, y, 0])..][..w * LANES];
                for lane in 0..lanes {
                    let at = (((block * LANES + lane) * d + z) * h + y) * w;
                    let to = &mut out.feature_map[at..at + w];
                    to.iter_mut().zip(row[lane..].iter().step_by(LANES)).for_each(|(to, v)| *to = *v);
                }
            }
        }
        out.logits.clear();
        out.logits.resize(plan.head_bias.len(), 0.0);
        linear(&plan.head_weight, &plan.head_bias, &out.pooled, &mut out.logits);
        softmax_into(&out.logits, &mut out.scores);
    }
}

/// The layers that a run times, in order: the stem, then each block's two convolutions and what follows them.
fn layer_names(plan: &Plan) -> impl Iterator<Item = (String, &'static str, u64)> {
    let of = |conv: &Conv| (conv.name.clone(), conv.method.as_str(), conv.macs());
    let blocks = plan.blocks.iter().flat_map(move |block| {
        let (method, macs) = block.shortcut.as_ref().map_or(("identity", 0), |s| (s.method.as_str(), s.macs()));
        [of(&block.conv1), of(&block.conv2), (format!("{}.merge", block.name), method, macs)]
    });
    std::iter::once(of(&plan.stem)).chain(blocks)
}

/// A 3x3x3 convolution by its method; `tiles` are depth tiles, or planes of a direct one.
#[allow(clippy::too_many_arguments)]
fn convolution(
    context: &Context<'_>,
    conv: &Conv,
    weights: &[f32],
    input: &Tensor,
    output: &mut Tensor,
    relu: bool,
    sums: Option<Sums<'_>>,
    scratch: &mut [f32],
    tiles: &[usize],
) -> Result<(), EngineError> {
    match conv.method {
        Method::Winograd(..) => conv::winograd(context, conv, weights, input, output, relu, sums, scratch, tiles),
        Method::Direct => {
            assert!(relu && sums.is_none(), "only a strided convolution is done directly, and it has a ReLU");
            let from = conv.input;
            let stride = conv.stride;
            let input = DirectInput {
                data: input.data(from),
                step: [stride * from.plane(), stride * from.row(), stride * LANES],
                length: LANES,
            };
            conv::direct(context, conv, weights, input, output, Ending::Relu, tiles)
        }
        Method::Depth => unreachable!("the stem alone is done along depth, by a function of its own"),
    }
}

/// The mean of each plane and channel, `[plane][channel]`, from partial sums `[block][row][plane][16]`, added in order.
fn plane_means(shape: Shape, rows: usize, sums: &[f32], means: &mut [f32]) {
    let [d, h, w] = shape.dhw;
    for z in 0..d {
        for ch in 0..shape.c {
            let first = (ch / LANES * rows * d + z) * LANES + ch % LANES;
            let sum: f64 = sums[first..].iter().step_by(d * LANES).take(rows).map(|&v| f64::from(v)).sum();
            means[z * shape.c + ch] = (sum / (h * w) as f64) as f32;
        }
    }
}

/// The factor of each plane and channel, `[plane][padded channel]`, from their means, which it changes.
///
/// The second attention sees the means of what the first has scaled: scaling a plane scales its mean.
fn attention(
    block: &Block,
    shape: Shape,
    order: AttentionOrder,
    means: &mut [f32],
    scale: &mut [f32],
    vectors: &mut [Vec<f32>; 3],
) {
    let d = shape.dhw[0];
    let (means, scale) = (&mut means[..d * shape.c], &mut scale[..d * shape.padded_c()]);
    scale.fill(1.0);
    let depth_first = order == AttentionOrder::DepthFirst;
    for depth in [depth_first, !depth_first] {
        if depth && let Some(gate) = &block.depth {
            depth_attention(gate, shape, means, scale, vectors);
        }
        if !depth && let Some(gate) = &block.channel {
            channel_attention(gate, shape, means, scale, vectors);
        }
    }
}

/// `out[i] = bias[i] + sum over k of w[i][k] * x[k]`, summed in f64.
fn linear(w: &[f32], bias: &[f32], x: &[f32], out: &mut [f32]) {
    for ((row, b), out) in w.chunks_exact(x.len()).zip(bias).zip(out) {
        // four sums in a fixed order: one would wait for itself
        let mut sums = [0.0_f64; 4];
        let (chunks, x_chunks) = (row.chunks_exact(4), x.chunks_exact(4));
        let (rest, x_rest) = (chunks.remainder(), x_chunks.remainder());
        for (w, v) in chunks.zip(x_chunks) {
            for i in 0..4 {
                sums[i] += f64::from(w[i]) * f64::from(v[i]);
            }
        }
        let tail: f64 = rest.iter().zip(x_rest).map(|(w, v)| f64::from(*w) * f64::from(*v)).sum();
        *out = ((sums[0] + sums[1]) + (sums[2] + sums[3]) + tail + f64::from(*b)) as f32;
    }
}

/// Linear, ReLU, linear, sigmoid: from the first `ends` values of `vectors[0]` to those of `vectors[2]`.
fn run_gate(gate: &Gate, vectors: &mut [Vec<f32>; 3]) {
    let [input, hidden, out] = vectors;
    let hidden = &mut hidden[..gate.b0.len()];
    let ends = gate.b2.len();
    linear(&gate.w0, &gate.b0, &input[..ends], hidden);
    for v in hidden.iter_mut() {
        // what is not a number stays so, and is found in the logits
        *v = if 0.0 > *v { 0.0 } else { *v };
    }
    linear(&gate.w2, &gate.b2, hidden, &mut out[..ends]);
    for v in &mut out[..ends] {
        *v = (1.0 / (1.0 + (-f64::from(*v)).exp())) as f32;
    }
}

fn depth_attention(gate: &Gate, shape: Shape, means: &mut [f32], scale: &mut [f32], vectors: &mut [Vec<f32>; 3]) {
    let (c, d) = (shape.c, shape.dhw[0]);
    // the weights' order is [channel][plane]
    for (z, means) in means.chunks_exact(c).enumerate() {
        for (ch, &mean) in means.iter().enumerate() {
            vectors[0][ch * d + z] = mean;
        }
    }
    run_gate(gate, vectors);
    let planes = means.chunks_exact_mut(c).zip(scale.chunks_exact_mut(shape.padded_c()));
    for (z, (means, scale)) in planes.enumerate() {
        for (ch, (mean, factor)) in means.iter_mut().zip(scale).enumerate() {
            let gain = vectors[2][ch * d + z];
            *mean *= gain;
            *factor *= gain;
        }
    }
}

fn channel_attention(gate: &Gate, shape: Shape, means: &mut [f32], scale: &mut [f32], vectors: &mut [Vec<f32>; 3]) {
    let (c, d) = (shape.c, shape.dhw[0]);
    for (ch, input) in vectors[0][..c].iter_mut().enumerate() {
        let sum: f64 = means[ch..].iter().step_by(c).map(|&m| f64::from(m)).sum();
        *input = (sum / d as f64) as f32;
    }
    run_gate(gate, vectors);
    let planes = means.chunks_exact_mut(c).zip(scale.chunks_exact_mut(shape.padded_c()));
    for (means, scale) in planes {
        let values = means.iter_mut().zip(scale);
        for ((mean, factor), gain) in values.zip(&vectors[2]) {
            *mean *= gain;
            *factor *= gain;
        }
    }
}

impl Session for CpuSession {
    fn run(&mut self, input: &[f32], cancel: &CancelToken, out: &mut Inference) -> Result<(), EngineError> {
        let shared = Arc::clone(&self.shared);
        check_input(input, shared.plan.input_dhw)?;
        let context = Context { pool: &shared.pool, kernels: &shared.kernels, cancel };
        self.seconds.fill(0.0);
        self.take_input(input, None);
        let (reused_macs, ahead_macs) = self.done_macs();
        self.reuse = Reuse { reused_macs, ahead_macs, total_macs: shared.plan.macs };
        self.prefix(&context, None)?;
        for index in 0..shared.plan.blocks.len() {
            self.block(&context, index)?;
        }
        self.head(out);
        if out.logits.iter().any(|v| !v.is_finite()) {
            return Err(EngineError::NotFinite);
        }
        Ok(())
    }

    fn computes_ahead(&self) -> bool {
        true
    }

    fn advance(&mut self, input: &[f32], ready: &[bool], cancel: &CancelToken) -> Result<(), EngineError> {
        let shared = Arc::clone(&self.shared);
        let [d, h, w] = shared.plan.input_dhw;
        if input.len() != d * h * w {
            return Err(EngineError::InputLength { expected: d * h * w, got: input.len() });
        }
        if ready.len() != d {
            return Err(EngineError::InputLength { expected: d, got: ready.len() });
        }
        self.take_input(input, Some(ready));
        self.prefix(&Context { pool: &shared.pool, kernels: &shared.kernels, cancel }, Some(ready))
    }

    fn share(&self, values: &mut [f32], len: usize, work: &(dyn Fn(usize, &mut [f32]) + Sync)) {
        arena::share(values, len, &self.shared.pool, work);
    }

    fn reuse(&self) -> Reuse {
        self.reuse
    }

    fn layers(&self) -> Vec<LayerTiming> {
        layer_names(&self.shared.plan)
            .zip(&self.seconds)
            .map(|((name, kernel, macs), &seconds)| LayerTiming { name, kernel, macs, seconds })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Architecture, synthetic};

    fn model() -> Model {
        let architecture = Architecture { base_width: 4, input_dhw: [5, 21, 30], ..Architecture::full() };
        Model::synthetic("t", &architecture, 1).unwrap()
    }

    #[test]
    fn a_cancelled_session_gives_the_same_bits_afterwards() {
        let model = model();
        let options = EngineOptions { threads: 2, ..EngineOptions::default() };
        let backend = CpuBackend::new(&model, &options, None).unwrap();
        let input = synthetic::volume(model.manifest.architecture.input_dhw, 1);
        let (mut first, mut again) = (Inference::default(), Inference::default());
        let mut session = backend.session().unwrap();
        session.run(&input, &CancelToken::new(), &mut first).unwrap();
        let cancel = CancelToken::new();
        cancel.cancel();
        let error = session.run(&input, &cancel, &mut again).unwrap_err();
        assert_eq!(error, EngineError::Cancelled);
        session.run(&input, &CancelToken::new(), &mut again).unwrap();
        assert_eq!(first, again);
        let mut other = Inference::default();
        backend.session().unwrap().run(&input, &CancelToken::new(), &mut other).unwrap();
        assert_eq!(first, other);
    }

    #[test]
    fn wrong_inputs_are_typed_errors() {
        let model = model();
        let options = EngineOptions { threads: 1, ..EngineOptions::default() };
        let backend = CpuBackend::new(&model, &options, None).unwrap();
        let mut session = backend.session().unwrap();
        let mut input = synthetic::volume(model.manifest.architecture.input_dhw, 1);
        let cancel = CancelToken::new();
        let mut out = Inference::default();
        let error = session.run(&input[1..], &cancel, &mut out).unwrap_err();
        assert!(matches!(error, EngineError::InputLength { .. }));
        input[7] = f32::INFINITY;
        let error = session.run(&input, &cancel, &mut out).unwrap_err();
        assert_eq!(error, EngineError::InputValue { index: 7 });
        input.fill(f32::MAX);
        let error = session.run(&input, &cancel, &mut out).unwrap_err();
        assert_eq!(error, EngineError::NotFinite);
    }

    #[test]
    fn shared_work_has_each_part_once_and_its_panic_is_the_callers() {
        for threads in [1, 2, 3] {
            let backend =
                CpuBackend::new(&model(), &EngineOptions { threads, ..EngineOptions::default() }, None).unwrap();
            let session = backend.session().unwrap();
            for (n, len) in [(0, 3), (1, 3), (9, 3), (1003, 10), (7, 100)] {
                let mut values = vec![0.5f32; n];
                session.share(&mut values, len, &|i, part| {
                    assert!(part.len() == len || i == n / len);
                    part.iter_mut().for_each(|v| *v += i as f32);
                });
                let expected: Vec<f32> = (0..n).map(|k| 0.5 + (k / len) as f32).collect();
                assert_eq!(values, expected, "{n} by {len} on {threads} threads");
            }
            let mut values = vec![0.0f32; 40];
            let panics = std::panic::AssertUnwindSafe(|| session.share(&mut values, 4, &|i, _| assert!(i != 5)));
            assert!(std::panic::catch_unwind(panics).is_err());
            session.share(&mut values, 4, &|_, part| part.fill(1.0));
            assert!(values.iter().all(|v| *v == 1.0));
        }
    }

    #[test]
    fn the_stated_memory_is_what_is_allocated() {
        let model = model();
        let backend = CpuBackend::new(&model, &EngineOptions { threads: 1, ..EngineOptions::default() }, None).unwrap();
        // 3 activations of the widest stage, (5 + 2) * (11 + 2) * (15 + 2) * 4 floats
        assert!(backend.session_bytes() >= 3 * 7 * 13 * 17 * 4 * 4);
        assert_eq!(backend.weight_bytes(), 4 * backend.plan().weights_len + backend.plan().small_bytes());
        assert_eq!(backend.mapped_bytes(), 0);
    }
}
