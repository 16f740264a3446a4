//! The cpu backend: matrix products on channels-last activations.
//!
//! Input: a volume D, H, W. Output: [`Inference`]. Preparing folds batch normalisation and rearranges the weights
//! ([`plan`]); a session owns its activations ([`arena`]); each thread of the backend's pool owns one block of scratch.
//! The work of a layer is split into blocks of output rows, taken by threads as they come free:
//!
//! ```text
//! for each block:  conv1 (bias, ReLU)  ->  conv2 (bias, sums)  ->  attentions from the sums
//!                  ->  one pass: scale, add shortcut (strided: computed here), ReLU, sums
//! ```
//!
//! Invariants: blocks, and the order of every sum, are fixed by the architecture, so that results are bit-identical for
//! any number of threads; a block writes only its own rows; nothing of ours is allocated in a run after the first (what
//! the matrix products allocate is said in [`kernels`]). The cancel token is read before each block: at full size the
//! largest is 0.9 G multiply-adds, 10 to 40 ms on one core.
//!
//! Deliberately absent: Winograd transforms and our own vector kernels, which will replace [`kernels`] and the layouts in
//! [`plan`] alone.

use std::cell::RefCell;
use std::sync::Arc;

use rayon::prelude::*;

use crate::engine::{Backend, CancelToken, EngineError, EngineOptions, Inference, Session, check_input, softmax_into};
use crate::model::{AttentionOrder, Model};

pub mod arena;
pub mod kernels;
pub mod plan;

use arena::{Arena, Buffer};
use kernels::Padded;
use plan::{Block, Conv, Gate, Plan};

thread_local! {
    /// A pool thread's scratch, sized when the backend is prepared.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

struct Shared {
    plan: Plan,
    pool: rayon::ThreadPool,
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
    /// Too many threads, or threads that cannot be started.
    pub fn new(model: &Model, options: &EngineOptions, note: Option<&'static str>) -> Result<Self, EngineError> {
        let threads = options.resolved_threads()?;
        let plan = Plan::new(model);
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|index| format!("darnet-cpu-{index}"))
            .build()
            .map_err(|error| EngineError::ThreadPool { threads, reason: error.to_string() })?;
        let scratch = plan.scratch_len();
        pool.broadcast(|_| SCRATCH.with_borrow_mut(|s| s.resize(scratch, 0.0)));
        Ok(Self { shared: Arc::new(Shared { plan, pool }), note })
    }
}

impl Backend for CpuBackend {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn session(&self) -> Result<Box<dyn Session>, EngineError> {
        Ok(Box::new(CpuSession { arena: Arena::new(&self.shared.plan), shared: Arc::clone(&self.shared) }))
    }

    fn note(&self) -> Option<&str> {
        self.note
    }

    fn threads(&self) -> usize {
        self.shared.pool.current_num_threads()
    }

    fn weight_bytes(&self) -> usize {
        self.shared.plan.weight_bytes()
    }

    fn session_bytes(&self) -> usize {
        self.shared.plan.arena_lengths().bytes()
    }
}

struct CpuSession {
    arena: Arena,
    shared: Arc<Shared>,
}

/// A block of output rows: plane, first row, rows.
type Rows = [usize; 3];

/// Calls `work(rows, out, sums, scratch)` for every block of `rows` rows of `output`, from the pool's threads: `out` the
/// block's rows with their border voxels, `sums` the block's one sum a channel.
fn for_row_blocks<F>(
    pool: &rayon::ThreadPool,
    shape: Padded,
    rows: usize,
    output: &mut [f32],
    sums: &mut [f64],
    cancel: &CancelToken,
    work: F,
) -> Result<(), EngineError>
where
    F: Fn(Rows, &mut [f32], &mut [f64], &mut [f32]) + Sync,
{
    let [d, h, _] = shape.dhw;
    let (row, plane) = (shape.row_len(), shape.plane_len());
    let per_plane = h.div_ceil(rows) * shape.c;
    let inside = &mut output[plane..(d + 1) * plane];
    let sums = &mut sums[..d * per_plane];
    pool.install(|| {
        let planes = inside.par_chunks_exact_mut(plane);
        let planes = planes.zip(sums.par_chunks_exact_mut(per_plane)).enumerate();
        planes.for_each(|(z, (plane, sums))| {
            let blocks = plane[row..(h + 1) * row].par_chunks_mut(rows * row);
            let blocks = blocks.zip(sums.par_chunks_exact_mut(shape.c)).enumerate();
            blocks.for_each(|(index, (out, sums))| {
                if !cancel.is_cancelled() {
                    let block = [z, index * rows, out.len() / row];
                    SCRATCH.with_borrow_mut(|scratch| work(block, out, sums, scratch));
                }
            });
        });
    });
    if cancel.is_cancelled() {
        return Err(EngineError::Cancelled);
    }
    Ok(())
}

impl Shared {
    fn stem(
        &self,
        input: &[f32],
        output: &mut Buffer,
        sums: &mut [f64],
        cancel: &CancelToken,
    ) -> Result<(), EngineError> {
        let conv = &self.plan.stem;
        let shape = conv.output;
        let w = shape.dhw[2];
        let out = output.writable(shape);
        for_row_blocks(&self.pool, shape, conv.rows, out, sums, cancel, |at, out, _, scratch| {
            let voxels = at[2] * w;
            let (patches, dst) = scratch.split_at_mut(voxels * kernels::STEM_TAPS);
            kernels::stem_patches(input, self.plan.input_dhw, at, w, patches);
            let size = [shape.c, voxels, kernels::STEM_TAPS];
            kernels::gemm_f32(size, dst, false, &conv.weights, patches, kernels::STEM_TAPS);
            kernels::finish_rows(dst, w, &conv.bias, true, out, w, &mut []);
        })
    }

    /// A 3x3x3 convolution; with ReLU (no sums), or without it (with sums).
    fn conv(
        &self,
        conv: &Conv,
        relu: bool,
        input: &Buffer,
        output: &mut Buffer,
        sums: &mut [f64],
        cancel: &CancelToken,
    ) -> Result<(), EngineError> {
        let shape = conv.output;
        let (w, pitch) = (shape.dhw[2], conv.pitch());
        let input = input.readable(conv.input);
        let out = output.writable(shape);
        for_row_blocks(&self.pool, shape, conv.rows, out, sums, cancel, |at, out, sums, scratch| {
            let dst = &mut scratch[..at[2] * pitch * shape.c];
            let (stride, weights) = (conv.stride, &conv.weights);
            kernels::conv3_rows(input, conv.input, stride, weights, shape, at, dst);
            let sums: &mut [f64] = if relu { &mut [] } else { sums };
            kernels::finish_rows(dst, pitch, &conv.bias, relu, out, w, sums);
        })
    }

    /// Runs a block; its output takes the place of its input in `arena.activations[0]`, and its sums are in `arena.sums`
    /// in blocks of `block.conv2.rows` rows.
    fn block(&self, block: &Block, arena: &mut Arena, cancel: &CancelToken) -> Result<(), EngineError> {
        let [x, y1, y2] = &mut arena.activations;
        let sums = &mut arena.sums;
        self.conv(&block.conv1, true, x, y1, sums, cancel)?;
        self.conv(&block.conv2, false, y1, y2, sums, cancel)?;
        let shape = block.conv2.output;
        let (rows, w) = (block.conv2.rows, shape.dhw[2]);
        let planes = shape.dhw[0] * shape.c;
        plane_means(shape, rows, sums, &mut arena.means[..planes]);
        self.attention(block, shape, &mut arena.means, &mut arena.scale, &mut arena.gate);
        let scale = &arena.scale;
        let scale_of = |z: usize| &scale[z * shape.c..(z + 1) * shape.c];
        let Some(shortcut) = &block.shortcut else {
            let y2 = y2.readable(shape);
            let x = x.writable(shape);
            let (row, plane) = (shape.row_len(), shape.plane_len());
            return for_row_blocks(&self.pool, shape, rows, x, sums, cancel, |at, x, sums, _| {
                let start = (at[0] + 1) * plane + (at[1] + 1) * row;
                let y = &y2[start..start + x.len()];
                kernels::merge_identity(x, y, scale_of(at[0]), w, sums);
            });
        };
        let input = x.readable(shortcut.input);
        let y = y2.writable(shape);
        for_row_blocks(&self.pool, shape, rows, y, sums, cancel, |at, y, sums, scratch| {
            let dst = &mut scratch[..at[2] * w * shape.c];
            kernels::shortcut_rows(input, shortcut.input, &shortcut.weights, shape, at, dst);
            kernels::merge_shortcut(y, dst, &shortcut.bias, scale_of(at[0]), w, sums);
        })?;
        arena.activations.swap(0, 2);
        Ok(())
    }

    /// The factor of each plane and channel, `[plane][channel]`, from their means, which it changes.
    ///
    /// The second attention sees the means of what the first has scaled: scaling a plane scales its mean.
    fn attention(
        &self,
        block: &Block,
        shape: Padded,
        means: &mut [f32],
        scale: &mut [f32],
        vectors: &mut [Vec<f32>; 3],
    ) {
        let planes = shape.dhw[0] * shape.c;
        let (means, scale) = (&mut means[..planes], &mut scale[..planes]);
        scale.fill(1.0);
        let depth_first = self.plan.order == AttentionOrder::DepthFirst;
        for depth in [depth_first, !depth_first] {
            if depth && let Some(gate) = &block.depth {
                depth_attention(gate, shape, means, scale, vectors);
            }
            if !depth && let Some(gate) = &block.channel {
                channel_attention(gate, shape, means, scale, vectors);
            }
        }
    }
}

/// The mean of each plane and channel from the sums of its blocks of rows, added in their order.
fn plane_means(shape: Padded, rows: usize, sums: &[f64], means: &mut [f32]) {
    let [_, h, w] = shape.dhw;
    let blocks = h.div_ceil(rows);
    let planes = sums.chunks_exact(blocks * shape.c);
    for (sums, means) in planes.zip(means.chunks_exact_mut(shape.c)) {
        for (ch, mean) in means.iter_mut().enumerate() {
            let sum: f64 = sums[ch..].iter().step_by(shape.c).sum();
            *mean = (sum / (h * w) as f64) as f32;
        }
    }
}

/// Linear, ReLU, linear, sigmoid: from the first `ends` values of `vectors[0]` to those of `vectors[2]`.
fn run_gate(gate: &Gate, vectors: &mut [Vec<f32>; 3]) {
    let [input, hidden, out] = vectors;
    let hidden = &mut hidden[..gate.b0.len()];
    let ends = gate.b2.len();
    kernels::linear(&gate.w0, &gate.b0, &input[..ends], hidden);
    for v in hidden.iter_mut() {
        *v = kernels::at_least(0.0, *v);
    }
    kernels::linear(&gate.w2, &gate.b2, hidden, &mut out[..ends]);
    for v in &mut out[..ends] {
        *v = (1.0 / (1.0 + (-f64::from(*v)).exp())) as f32;
    }
}

fn depth_attention(gate: &Gate, shape: Padded, means: &mut [f32], scale: &mut [f32], vectors: &mut [Vec<f32>; 3]) {
    let (c, d) = (shape.c, shape.dhw[0]);
    // the weights' order is [channel][plane]
    for (z, means) in means.chunks_exact(c).enumerate() {
        for (ch, &mean) in means.iter().enumerate() {
            vectors[0][ch * d + z] = mean;
        }
    }
    run_gate(gate, vectors);
    let planes = means.chunks_exact_mut(c).zip(scale.chunks_exact_mut(c));
    for (z, (means, scale)) in planes.enumerate() {
        for (ch, (mean, factor)) in means.iter_mut().zip(scale).enumerate() {
            let gain = vectors[2][ch * d + z];
            *mean *= gain;
            *factor *= gain;
        }
    }
}

fn channel_attention(gate: &Gate, shape: Padded, means: &mut [f32], scale: &mut [f32], vectors: &mut [Vec<f32>; 3]) {
    let (c, d) = (shape.c, shape.dhw[0]);
    for (ch, input) in vectors[0][..c].iter_mut().enumerate() {
        let sum: f64 = means[ch..].iter().step_by(c).map(|&m| f64::from(m)).sum();
        *input = (sum / d as f64) as f32;
    }
    run_gate(gate, vectors);
    let planes = means.chunks_exact_mut(c).zip(scale.chunks_exact_mut(c));
    for (means, scale) in planes {
        let values = means.iter_mut().zip(scale);
        for ((mean, factor), gain) in values.zip(&vectors[2]) {
            *mean *= gain;
            *factor *= gain;
        }
    }
}

/// The pooled vector, the feature map in C, D, H, W order, the logits and scores, from the last activation and its sums.
fn head(plan: &Plan, arena: &mut Arena, out: &mut Inference) {
    let Some(last) = plan.blocks.last() else {
        return;
    };
    let shape = last.conv2.output;
    let [d, h, w] = shape.dhw;
    let c = shape.c;
    let blocks = last.conv2.blocks();
    let sums = &arena.sums[..d * blocks * c];
    out.pooled.clear();
    out.pooled.extend((0..c).map(|ch| {
        let sum: f64 = sums[ch..].iter().step_by(c).sum();
        (sum / (d * h * w) as f64) as f32
    }));
    let x = arena.activations[0].readable(shape);
    out.feature_shape_cdhw = [c, d, h, w];
    out.feature_map.clear();
    for ch in 0..c {
        for z in 1..=d {
            for y in 1..=h {
                let start = z * shape.plane_len() + y * shape.row_len() + c + ch;
                let row = x[start..].iter().step_by(c).take(w);
                out.feature_map.extend(row);
            }
        }
    }
    out.logits.clear();
    out.logits.resize(plan.head_bias.len(), 0.0);
    kernels::linear(&plan.head_weight, &plan.head_bias, &out.pooled, &mut out.logits);
    softmax_into(&out.logits, &mut out.scores);
}

impl Session for CpuSession {
    fn run(&mut self, input: &[f32], cancel: &CancelToken, out: &mut Inference) -> Result<(), EngineError> {
        let Self { arena, shared } = self;
        check_input(input, shared.plan.input_dhw)?;
        shared.stem(input, &mut arena.activations[0], &mut arena.sums, cancel)?;
        for block in &shared.plan.blocks {
            shared.block(block, arena, cancel)?;
        }
        head(&shared.plan, arena, out);
        if out.logits.iter().any(|v| !v.is_finite()) {
            return Err(EngineError::NotFinite);
        }
        Ok(())
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
        let options = EngineOptions { threads: 2, ..Default::default() };
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
        let options = EngineOptions { threads: 1, ..Default::default() };
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
    fn the_stated_memory_is_what_is_allocated() {
        let model = model();
        let backend = CpuBackend::new(&model, &EngineOptions { threads: 1, ..Default::default() }, None).unwrap();
        // 3 activations of the widest stage, (5 + 2) * (11 + 2) * (15 + 2) * 4 floats
        assert!(backend.session_bytes() >= 3 * 7 * 13 * 17 * 4 * 4);
        let parameters = model.manifest.architecture.parameter_count() as usize;
        assert!(backend.weight_bytes() <= 4 * parameters);
    }
}
