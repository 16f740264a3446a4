//! Convolutions and merges over whole activations: the work cut into items, the items handed to the pool.
//!
//! Input and output: activations ([`super::arena::Tensor`]), packed weights, sums. Invariants: items write to places of
//! their own; which thread does one, and how tiles are grouped, changes no bit of any output. The cancel token is read
//! before each item; an item takes about a millisecond on one core at full size.
//!
//! Two ways through a Winograd convolution. Where the transformed weights stay in the cache ([`Conv::is_private`]) each
//! thread takes strips of tiles through all three steps, along depth first, so that the planes two tiles share are still in
//! the cache, and asks for the inputs of its likely next strip during the products of this one; otherwise all threads do
//! one step of one block together, so that weights are read once a block.
//!
//! Every function here checks the lengths that its kernels rely on, and is safe to call.
#![allow(unsafe_code)]

use super::arena::{Place, Shape, Tensor};
use super::dispatch::{Kernels, Tiling, Transforms};
use super::matrix::{DirectRow, MergeRow, Product};
use super::plan::{Conv, Method, Scratch, StemInput};
use super::pool::Pool;
use super::simd::LANES;
use super::stem::{self, StemRows};
use super::winograd::{Columns, Kept, Middle, Next, Outputs};
use crate::engine::{CancelToken, EngineError};

/// Outputs larger than this are written past the caches: nothing of them would be left there when they are read.
const STREAM_FROM_BYTES: usize = 24 << 20;
/// Rows of output voxels of an item of a direct convolution: about half a millisecond at full size.
const DIRECT_ROWS: usize = 8;

/// What every step needs.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// Threads.
    pub pool: &'a Pool,
    /// Kernels.
    pub kernels: &'a Kernels,
    /// Looked at before each item.
    pub cancel: &'a CancelToken,
}

impl Context<'_> {
    fn run(&self, items: usize, work: &(dyn Fn(usize, usize) + Sync)) -> Result<(), EngineError> {
        self.pool.run(items, &|item, thread| {
            if !self.cancel.is_cancelled() {
                work(item, thread);
            }
        });
        if self.cancel.is_cancelled() { Err(EngineError::Cancelled) } else { Ok(()) }
    }
}

/// What is added up besides the output, and where.
pub struct Sums<'a>(pub &'a mut [f32]);

impl Sums<'_> {
    /// Floats for `rows` partial sums of each channel and plane: `[block][row][plane][16]`.
    pub const fn len(shape: Shape, rows: usize) -> usize {
        shape.padded_c() * rows * shape.dhw[0]
    }
}

/// The parts of a Winograd convolution that its items share.
struct Winograd<'a> {
    conv: &'a Conv,
    tiling: Tiling,
    kept: Kept,
    transforms: Transforms,
    product: unsafe fn(&Product),
    weights: &'a [f32],
    input: &'a [f32],
    output: Place,
    sums: Option<Place>,
    relu: bool,
    stream: bool,
    /// Vectors of a panel of weights.
    panel: usize,
    /// Strips of a row of tiles, and tiles of a strip.
    parts: [usize; 2],
    lens: Scratch,
    /// Floats from one transform along D and H to the next, and from strip to strip.
    strides: [usize; 2],
    /// Strips multiplied together.
    together: usize,
}

/// Where a block's transforms lie, and what its thread has of its own.
#[derive(Clone, Copy)]
struct Room {
    columns: Place,
    own: Place,
}

impl Winograd<'_> {
    /// B^T along D and H of the strip at `place`, depth and number, the `slot`th of its block, for one block of channels.
    ///
    /// # Safety
    /// All indices are in range, and `columns` holds the block's transforms.
    unsafe fn columns(&self, place: [usize; 2], slot: usize, block: usize, columns: Place) {
        let shape = self.conv.input;
        let voxels = self.voxels();
        // SAFETY: the input's border reaches as far as the last tile reads (checked in `winograd`); strips of a block lie
        // within a transform.
        unsafe {
            let first = block * shape.block() + self.first_voxel(place);
            (self.transforms.columns)(&Columns {
                x: self.input.as_ptr().add(first),
                plane: shape.plane(),
                row: shape.row(),
                to: columns.at(slot * self.strides[1] + block * voxels * LANES),
                stride: self.strides[0],
                voxels,
            });
        }
    }

    /// Where the voxels begin that strip `strip` of depth `z` reads, floats from the input's first.
    fn first_voxel(&self, [z, strip]: [usize; 2]) -> usize {
        let (shape, steps) = (self.conv.input, self.tiling.steps());
        let [parts, tiles] = self.parts;
        let (y, part) = (strip / parts, strip % parts);
        z * steps[0] * shape.plane() + y * steps[1] * shape.row() + part * tiles * steps[2] * LANES
    }

    /// Rows of tiles of a plane.
    fn rows(&self) -> usize {
        self.conv.tiles()[1]
    }

    /// Voxels along W that a strip reads.
    fn voxels(&self) -> usize {
        (self.parts[1] - 1) * self.tiling.steps()[2] + self.tiling.inputs()[2]
    }

    /// What transform `frequency` along D and H asks for of the `strips` strips at `place`: the planes that no tile before
    /// it has read.
    fn next(&self, frequency: usize, place: Option<[usize; 2]>, strips: usize) -> Next {
        let shape = self.conv.input;
        let (steps, inputs, parts) = (self.tiling.steps(), self.tiling.inputs(), self.parts[0]);
        let panels = self.conv.output.blocks().div_ceil(self.panel);
        let products = panels * inputs[2];
        let seen = inputs[0] - steps[0];
        let first = place.map_or(0, |place| self.first_voxel(place) + seen * shape.plane());
        Next {
            x: self.input.as_ptr().wrapping_add(first),
            extent: [shape.blocks(), steps[0], (strips.div_ceil(parts) - 1) * steps[1] + inputs[1]],
            steps: [shape.block(), shape.plane(), shape.row()],
            voxels: if place.is_some() { self.voxels() } else { 0 },
            products: [inputs[0] * inputs[1] * products, frequency * products],
        }
    }

    /// What lies between, for one transform along D and H of a block of `strips` strips.
    ///
    /// # Safety
    /// `frequency` is in range; the room is the block's and the thread's.
    unsafe fn middle(&self, frequency: usize, strips: usize, room: Room, next: Next) {
        let row = &self.conv.weight_rows[frequency];
        // SAFETY: the caller's promise; the weights' length was checked in `winograd`.
        unsafe {
            (self.transforms.middle)(&Middle {
                columns: room.columns.at(frequency * self.strides[0]),
                strip: self.strides[1],
                strips,
                tiles: self.parts[1],
                blocks: [self.conv.input.blocks(), self.conv.output.blocks()],
                together: self.together,
                v: room.own.at(0),
                m: room.own.at(self.lens.v),
                u: room.own.at(self.lens.v + self.lens.m),
                weights: self.weights.as_ptr().add(row.at),
                kept: self.kept,
                mix: row.mix,
                next,
                product: self.product,
            });
        }
    }

    /// A^T along H and D of one strip, the `slot`th of its block, for one block of output channels.
    ///
    /// # Safety
    /// As [`Winograd::columns`]; no other item writes this strip and block of channels.
    unsafe fn outputs(&self, [z, strip]: [usize; 2], slot: usize, block: usize, columns: Place) {
        let shape = self.conv.output;
        let outputs = self.tiling.outputs();
        let [d, h, w] = shape.dhw;
        let [parts, tiles] = self.parts;
        let (y, part) = (strip / parts, strip % parts);
        let width = tiles * outputs[2];
        let first = [z * outputs[0], y * outputs[1], part * width];
        let strips = self.conv.strips();
        // SAFETY: the output's inside is written up to `valid`; sums have their places by block, strip, plane.
        unsafe {
            (self.transforms.outputs)(&Outputs {
                from: columns.at(slot * self.strides[1] + block * width * LANES),
                stride: self.strides[0],
                y: self.output.at(shape.at(block, first)),
                plane: shape.plane(),
                row: shape.row(),
                valid: [outputs[0].min(d - first[0]), outputs[1].min(h - first[1]), width.min(w - first[2])],
                bias: self.conv.bias.as_ptr().add(block * LANES),
                relu: self.relu,
                stream: self.stream,
                sums: match self.sums {
                    Some(sums) => sums.at(((block * strips + strip) * d + first[0]) * LANES),
                    None => std::ptr::null_mut(),
                },
            });
        }
    }
}

/// A 3x3x3 convolution by Winograd transforms; only the tiles of the depths in `depth_tiles` are computed.
///
/// `sums`, if any, receives for each block of channels, strip of tiles and plane sixteen sums of the outputs.
///
/// # Errors
/// Cancelled.
///
/// # Panics
/// If a length does not fit the convolution: that is a fault of the plan.
#[allow(clippy::too_many_arguments)]
pub fn winograd(
    context: &Context<'_>,
    conv: &Conv,
    weights: &[f32],
    input: &Tensor,
    output: &mut Tensor,
    relu: bool,
    sums: Option<Sums<'_>>,
    scratch: &mut [f32],
    depth_tiles: &[usize],
) -> Result<(), EngineError> {
    let Method::Winograd(tiling, kept) = conv.method else { panic!("winograd: {} is done directly", conv.name) };
    let tiles = conv.tiles();
    let nd = tiles[0];
    let (in_blocks, out_blocks) = (conv.input.blocks(), conv.output.blocks());
    let (steps, inputs, outputs) = (tiling.steps(), tiling.inputs(), tiling.outputs());
    for axis in 0..3 {
        let reads = (tiles[axis] - 1) * steps[axis] + inputs[axis];
        assert!(reads <= conv.input.bordered()[axis], "winograd: the input's border is too small");
        assert!(tiles[axis] * outputs[axis] >= conv.output.dhw[axis], "winograd: too few tiles");
        assert!((tiles[axis] - 1) * outputs[axis] < conv.output.dhw[axis], "winograd: too many tiles");
    }
    assert!(depth_tiles.iter().all(|z| *z < nd), "winograd: no such tiles");
    let channels = conv.input.padded_c() * conv.output.padded_c();
    assert_eq!(weights.len(), tiling.weights(kept) * channels);
    assert_eq!(conv.weight_rows.len(), inputs[0] * inputs[1]);
    let row = match kept {
        Kept::Whole => 3 * tiling.weights(kept) / tiling.weights(Kept::Rows),
        Kept::Rows => 3,
        Kept::Planes => 9,
    };
    assert!(conv.weight_rows.iter().all(|w| w.at + row * channels <= weights.len()));
    assert_eq!(conv.bias.len(), conv.output.padded_c());
    let nh = conv.strips();
    let sums = sums.map(|sums| {
        assert!(sums.0.len() >= Sums::len(conv.output, nh), "winograd: sums are too short");
        Place(sums.0.as_mut_ptr())
    });
    let strips = conv.block_strips();
    let lens = conv.scratch(context.kernels);
    let threads = context.pool.threads();
    assert!(scratch.len() >= conv.scratch_len(threads, context.kernels), "winograd: scratch is too short");
    assert_eq!(conv.parts() * conv.strip_tiles(), tiles[2]);
    let work = Winograd {
        conv,
        tiling,
        kept,
        transforms: context.kernels.transforms(tiling),
        product: context.kernels.product,
        weights,
        input: input.data(conv.input),
        output: Place(output.data_mut(conv.output).as_mut_ptr()),
        sums,
        relu,
        stream: conv.output.len() * 4 > STREAM_FROM_BYTES,
        panel: context.kernels.panel,
        parts: [conv.parts(), conv.strip_tiles()],
        lens,
        strides: [conv.column_stride(strips), conv.strip_lines(conv.strip_tiles()) * LANES],
        together: conv.together(strips),
    };
    let frequencies = inputs[0] * inputs[1];
    let scratch = Place(scratch.as_mut_ptr());
    if conv.is_private() {
        let groups = nh.div_ceil(strips);
        let items = groups * depth_tiles.len();
        // The item that the same thread is likely to do next.
        let threads = context.pool.threads();
        let place = |item: usize| {
            let (z, group) = (depth_tiles[item % depth_tiles.len()], item / depth_tiles.len());
            // Strips below each other follow each other: they share rows.
            let strip =
                if strips == 1 { group % work.rows() * work.parts[0] + group / work.rows() } else { group * strips };
            [z, strip]
        };
        return context.run(items, &|item, thread| {
            let [z, first] = place(item);
            let next = (item + threads < items).then(|| place(item + threads));
            let count = strips.min(nh - first);
            // SAFETY: each thread has its own room; strips and blocks are in range; an item has strips of its own.
            unsafe {
                let columns = Place(scratch.at(thread * (lens.columns + lens.own())));
                let room = Room { columns, own: Place(columns.at(lens.columns)) };
                for strip in 0..count {
                    for block in 0..in_blocks {
                        work.columns([z, first + strip], strip, block, columns);
                    }
                }
                for frequency in 0..frequencies {
                    work.middle(frequency, count, room, work.next(frequency, next, strips));
                }
                for strip in 0..count {
                    for block in 0..out_blocks {
                        work.outputs([z, first + strip], strip, block, columns);
                    }
                }
            }
        });
    }
    let total = nh * depth_tiles.len();
    let place = |strip: usize| [depth_tiles[strip / nh], strip % nh];
    for first in (0..total).step_by(strips) {
        let count = strips.min(total - first);
        context.run(count * in_blocks, &|item, _| {
            let (strip, block) = (item / in_blocks, item % in_blocks);
            // SAFETY: strip and block are in range, each item has its own; the steps follow each other.
            unsafe { work.columns(place(first + strip), strip, block, scratch) };
        })?;
        context.run(frequencies, &|frequency, thread| {
            // SAFETY: as above, for transforms along D and H; each thread has room of its own behind the columns.
            unsafe {
                let own = Place(scratch.at(lens.columns + thread * lens.own()));
                work.middle(frequency, count, Room { columns: scratch, own }, work.next(frequency, None, 1));
            }
        })?;
        context.run(count * out_blocks, &|item, _| {
            let (strip, block) = (item / out_blocks, item % out_blocks);
            // SAFETY: as above.
            unsafe { work.outputs(place(first + strip), strip, block, scratch) };
        })?;
    }
    Ok(())
}

/// The first convolution; only the depth tiles in `depth_tiles` are computed. `input` is the network's, with its border.
///
/// # Errors
/// Cancelled.
///
/// # Panics
/// If a length does not fit the convolution: that is a fault of the plan.
#[allow(clippy::too_many_arguments)]
pub fn stem(
    context: &Context<'_>,
    conv: &Conv,
    at: StemInput,
    weights: &[f32],
    input: &[f32],
    output: &mut Tensor,
    scratch: &mut [f32],
    depth_tiles: &[usize],
) -> Result<(), EngineError> {
    let shape = conv.output;
    let [_, h, w] = shape.dhw;
    let [bd, bh, bw] = at.bordered;
    assert_eq!(conv.method, Method::Depth, "stem: {} is another convolution", conv.name);
    assert!(
        conv.tiles()[0] * stem::DEPTHS + 2 <= bd && 2 * h + 5 <= bh && 2 * w + 5 <= bw,
        "stem: the input is too small"
    );
    assert!(input.len() >= at.total(), "stem: the input is too short");
    assert_eq!(weights.len(), stem::FREQUENCIES * stem::PLANE_TAPS * shape.padded_c());
    assert_eq!(conv.bias.len(), shape.padded_c());
    assert_eq!(conv.offsets.len(), stem::TAPS);
    assert!(conv.offsets.iter().enumerate().all(|(k, offset)| *offset == k * stem::v_row(at.row())));
    assert!(depth_tiles.iter().all(|z| *z < conv.tiles()[0]), "stem: no such tiles");
    let lens = conv.scratch(context.kernels);
    assert!(lens.v >= stem::v_len(at.row()) && lens.m >= stem::m_len(w, shape.blocks()));
    assert!(scratch.len() >= context.pool.threads() * lens.own(), "stem: scratch is too short");
    let scratch = Place(scratch.as_mut_ptr());
    let stream = shape.len() * 4 > STREAM_FROM_BYTES;
    let output = Place(output.data_mut(shape).as_mut_ptr());
    let groups = h.div_ceil(stem::ROWS);
    context.run(groups * depth_tiles.len(), &|item, thread| {
        let tile = depth_tiles[item / groups];
        let planes = conv.planes_of(tile);
        let y = item % groups * stem::ROWS;
        // SAFETY: what is read was checked above; each thread has its own V and M, each item its own output rows.
        unsafe {
            let own = scratch.at(thread * lens.own());
            (context.kernels.stem_rows)(&StemRows {
                x: input.as_ptr().add(tile * stem::DEPTHS * at.plane() + 2 * y * at.row()),
                plane: at.plane(),
                row: at.row(),
                rows: stem::ROWS.min(h - y),
                width: w,
                v: own,
                m: own.add(lens.v),
                weights: weights.as_ptr(),
                blocks: shape.blocks(),
                offsets: conv.offsets.as_ptr(),
                y: output.at(shape.at(0, [planes.start, y, 0])),
                y_steps: [shape.block(), shape.plane(), shape.row()],
                depths: [(planes.start + stem::SHIFT) - tile * stem::DEPTHS, planes.len()],
                bias: conv.bias.as_ptr(),
                stream,
            });
        }
    })
}

/// Where a direct convolution reads.
#[derive(Clone, Copy)]
pub struct DirectInput<'a> {
    /// The values.
    pub data: &'a [f32],
    /// Floats from one output's inputs to the next's, along depth, rows and columns.
    pub step: [usize; 3],
    /// Inputs of a segment.
    pub length: usize,
}

/// What a direct convolution does with its sums.
#[derive(Clone, Copy)]
pub enum Ending<'a> {
    /// Bias and ReLU.
    Relu,
    /// `relu(sum + bias + scale * output)`; the scale is `[plane][padded channel]`.
    Merge(&'a [f32]),
}

/// A convolution done directly; only the `planes` of the output are computed.
///
/// # Errors
/// Cancelled.
///
/// # Panics
/// If a length does not fit the convolution: that is a fault of the plan.
pub fn direct(
    context: &Context<'_>,
    conv: &Conv,
    weights: &[f32],
    input: DirectInput<'_>,
    output: &mut Tensor,
    ending: Ending<'_>,
    planes: &[usize],
) -> Result<(), EngineError> {
    let shape = conv.output;
    let [d, h, w] = shape.dhw;
    let (blocks, vectors) = (shape.blocks(), context.kernels.vectors);
    let panels = blocks.div_ceil(vectors);
    let depth = conv.offsets.len() * input.length;
    let last: usize = (0..3).map(|axis| (shape.dhw[axis] - 1) * input.step[axis]).sum();
    let reach = conv.offsets.iter().max().map_or(0, |offset| offset + input.length);
    assert!(last + reach <= input.data.len(), "direct convolution: the input is too short");
    assert_eq!(weights.len(), depth * shape.padded_c());
    assert_eq!(conv.bias.len(), shape.padded_c());
    assert!(planes.iter().all(|z| *z < d), "direct convolution: no such plane");
    let (kernel, scale): (unsafe fn(&DirectRow), &[f32]) = match ending {
        Ending::Relu => (context.kernels.direct_relu, &[]),
        Ending::Merge(scale) => {
            assert!(scale.len() >= d * shape.padded_c(), "direct convolution: too few factors");
            (context.kernels.direct_merge, scale)
        }
    };
    let stream = shape.len() * 4 > STREAM_FROM_BYTES;
    let output = Place(output.data_mut(shape).as_mut_ptr());
    let groups = h.div_ceil(DIRECT_ROWS);
    context.run(planes.len() * groups * panels, &|item, _| {
        let (panel, group) = (item % panels, item / panels % groups);
        let z = planes[item / panels / groups];
        let first = panel * vectors;
        for y in group * DIRECT_ROWS..h.min((group + 1) * DIRECT_ROWS) {
            // SAFETY: what is read was checked above; each item has output rows and blocks of its own; a panel's
            // weights, biases and factors begin at its first block.
            unsafe {
                kernel(&DirectRow {
                    a: input.data.as_ptr().add(z * input.step[0] + y * input.step[1]),
                    lda: input.step[2],
                    voxels: w,
                    offsets: conv.offsets.as_ptr(),
                    segments: conv.offsets.len(),
                    length: input.length,
                    next: input.step[1],
                    b: weights.as_ptr().add(first * depth * LANES),
                    c: output.at(shape.at(first, [z, y, 0])),
                    ldc: LANES,
                    block: shape.block(),
                    vectors: vectors.min(blocks - first),
                    bias: conv.bias.as_ptr().add(first * LANES),
                    scale: scale.as_ptr().wrapping_add(z * shape.padded_c() + first * LANES),
                    stream,
                });
            }
        }
    })
}

/// `x = relu(x + scale * y)`, the scale `[plane][padded channel]`. `sums`, if any, receives for each block of channels,
/// row of voxels and plane sixteen sums of the outputs.
///
/// # Errors
/// Cancelled.
///
/// # Panics
/// If a length does not fit the shape.
pub fn merge(
    context: &Context<'_>,
    shape: Shape,
    x: &mut Tensor,
    y: &Tensor,
    scale: &[f32],
    sums: Option<Sums<'_>>,
) -> Result<(), EngineError> {
    let [d, h, w] = shape.dhw;
    let blocks = shape.blocks();
    assert!(scale.len() >= d * shape.padded_c(), "merge: too few factors");
    let sums = sums.map(|sums| {
        assert!(sums.0.len() >= Sums::len(shape, h), "merge: sums are too short");
        Place(sums.0.as_mut_ptr())
    });
    let y = y.data(shape);
    let x = Place(x.data_mut(shape).as_mut_ptr());
    context.run(d * blocks, &|item, _| {
        let (z, block) = (item / blocks, item % blocks);
        for row in 0..h {
            let at = shape.at(block, [z, row, 0]);
            // SAFETY: rows inside the border, each item's its own; factors and sums have a vector for each.
            unsafe {
                (context.kernels.merge_row)(&MergeRow {
                    x: x.at(at),
                    y: y.as_ptr().add(at),
                    voxels: w,
                    scale: scale.as_ptr().add((z * blocks + block) * LANES),
                    sums: match sums {
                        Some(sums) => sums.at(((block * h + row) * d + z) * LANES),
                        None => std::ptr::null_mut(),
                    },
                });
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::cpu::dispatch::Isa;
    use crate::engine::cpu::plan::Plan;
    use crate::engine::cpu::simd::Scalar;
    use crate::engine::cpu::winograd::{Axis, Four, MAX_T, Poly2, Poly4, Six, Two, g_row};
    use crate::model::synthetic::Stream;
    use crate::model::{Architecture, Model};
    use proptest::prelude::*;

    /// Unit roundoff of f32.
    const U: f64 = 1.0 / (1_u64 << 24) as f64;

    type Matrix = Vec<Vec<f64>>;
    type Axial = [[f32; LANES]; MAX_T];

    /// |B^T|, |G| and |A^T| of an axis, from its functions applied to unit vectors.
    fn magnitudes<A: Axis>() -> [Matrix; 3] {
        let column = |i: usize, f: &dyn Fn(&Axial) -> Axial| -> Vec<f64> {
            let mut unit = [[0.0; LANES]; MAX_T];
            unit[i] = [1.0; LANES];
            f(&unit).iter().map(|v| f64::from(v[0].abs())).collect()
        };
        let transposed = |columns: Vec<Vec<f64>>, rows: usize| -> Matrix {
            (0..rows).map(|r| columns.iter().map(|c| c[r]).collect()).collect()
        };
        // SAFETY: portable code.
        let bt = (0..A::T).map(|i| column(i, &|x| unsafe { A::bt::<Scalar>(x) })).collect();
        // SAFETY: portable code.
        let at = (0..A::T).map(|i| column(i, &|x| unsafe { A::at::<Scalar>(x) })).collect();
        let unit = |k: usize| A::g(std::array::from_fn(|i| f64::from(u8::from(i == k)))).map(f64::abs).to_vec();
        let g = transposed((0..3).map(unit).collect(), A::U);
        let g = (0..A::T).map(|t| g[A::weight_of(t)].clone()).collect();
        [transposed(bt, A::T), g, transposed(at, A::M)]
    }

    fn axes(tiling: Tiling) -> [[Matrix; 3]; 3] {
        match tiling {
            Tiling::F464 => [magnitudes::<Four>(), magnitudes::<Six>(), magnitudes::<Four>()],
            Tiling::F444 => [magnitudes::<Four>(), magnitudes::<Four>(), magnitudes::<Four>()],
            Tiling::F244 => [magnitudes::<Two>(), magnitudes::<Four>(), magnitudes::<Four>()],
            Tiling::F222 => [magnitudes::<Two>(), magnitudes::<Two>(), magnitudes::<Two>()],
            Tiling::P444 => [magnitudes::<Poly4>(), magnitudes::<Poly4>(), magnitudes::<Poly4>()],
            Tiling::P222 => [magnitudes::<Poly2>(), magnitudes::<Poly2>(), magnitudes::<Poly2>()],
        }
    }

    /// `out[i][j][k] = sum d[i][a] h[j][b] w[k][c] x[a][b][c]`, along one axis after the other.
    fn nested([d, h, w]: [&Matrix; 3], x: &[f64]) -> Vec<f64> {
        let (b, c) = (h[0].len(), w[0].len());
        let mut along_d = vec![0.0; d.len() * b * c];
        for (i, row) in d.iter().enumerate() {
            for (a, m) in row.iter().enumerate().filter(|(_, m)| **m != 0.0) {
                for at in 0..b * c {
                    along_d[i * b * c + at] += m * x[a * b * c + at];
                }
            }
        }
        let mut along_h = vec![0.0; d.len() * h.len() * c];
        for i in 0..d.len() {
            for (j, row) in h.iter().enumerate() {
                for (a, m) in row.iter().enumerate() {
                    for at in 0..c {
                        along_h[(i * h.len() + j) * c + at] += m * along_d[(i * b + a) * c + at];
                    }
                }
            }
        }
        let rows = along_h.chunks_exact(c);
        rows.flat_map(|x| w.iter().map(move |m| m.iter().zip(x).map(|(m, x)| m * x).sum::<f64>())).collect()
    }

    struct Case {
        conv: Conv,
        weights: Vec<f32>,
        input: Tensor,
    }

    impl Case {
        fn new(channels: [usize; 2], dhw: [usize; 3], stride: usize, method: Method, seed: u64) -> Self {
            let mut conv = Conv::alone(channels, dhw, stride, method);
            let bias = Stream::new(seed, "bias").fill(channels[1], 0.0, 1.0);
            conv.bias[..channels[1]].copy_from_slice(&bias);
            let weights = Stream::new(seed, "w").fill(27 * channels[0] * channels[1], 0.0, 1.0);
            let mut input = Tensor::new(conv.input.len()).unwrap();
            input.reshape(conv.input, &Pool::new(1, || {}).unwrap());
            let values = Stream::new(seed, "x").fill(dhw.iter().product::<usize>() * channels[0], 0.3, 1.0);
            let mut values = values.into_iter();
            for ch in 0..channels[0] {
                for z in 0..dhw[0] {
                    for y in 0..dhw[1] {
                        for x in 0..dhw[2] {
                            let at = conv.input.at(ch / LANES, [z, y, x]) + ch % LANES;
                            input.data_mut(conv.input)[at] = values.next().unwrap();
                        }
                    }
                }
            }
            Self { conv, weights, input }
        }

        /// Input of a channel; the border is zero.
        fn x(&self, ch: usize, zyx: [usize; 3]) -> f64 {
            let shape = self.conv.input;
            let at = ch / LANES * shape.block() + zyx[0] * shape.plane() + zyx[1] * shape.row() + zyx[2] * LANES;
            f64::from(self.input.data(shape)[at + ch % LANES])
        }

        /// Output before ReLU and the sum of the absolute products, in f64.
        fn expected(&self, co: usize, zyx: [usize; 3]) -> (f64, f64) {
            let (mut sum, mut size) = (f64::from(self.conv.bias[co]), f64::from(self.conv.bias[co].abs()));
            for ci in 0..self.conv.input.c {
                for k in 0..27 {
                    let offset = [k / 9, k / 3 % 3, k % 3];
                    let x = self.x(ci, std::array::from_fn(|a| self.conv.stride * zyx[a] + offset[a]));
                    let w = f64::from(self.weights[(co * self.conv.input.c + ci) * 27 + k]);
                    sum += w * x;
                    size += (w * x).abs();
                }
            }
            (sum, size)
        }

        fn run(&self, isa: Isa, threads: usize, relu: bool, parts: &[Vec<usize>]) -> (Vec<f32>, Vec<f32>) {
            let kernels = Kernels::of(isa).unwrap();
            let pool = Pool::new(threads, || {}).unwrap();
            let cancel = CancelToken::new();
            let context = Context { pool: &pool, kernels: &kernels, cancel: &cancel };
            let conv = &self.conv;
            let packed = conv.packed(&kernels, &self.weights);
            let mut output = Tensor::new(conv.output.len()).unwrap();
            output.reshape(conv.output, &pool);
            let mut sums = vec![f32::NAN; Sums::len(conv.output, conv.strips())];
            for part in parts {
                match conv.method {
                    Method::Winograd(..) => {
                        let mut scratch = vec![f32::NAN; conv.scratch_len(threads, &kernels)];
                        let sums = Some(Sums(&mut sums));
                        winograd(&context, conv, &packed, &self.input, &mut output, relu, sums, &mut scratch, part)
                            .unwrap();
                    }
                    Method::Depth => unreachable!(),
                    Method::Direct => {
                        let (from, stride) = (conv.input, conv.stride);
                        let input = DirectInput {
                            data: self.input.data(from),
                            step: [stride * from.plane(), stride * from.row(), stride * LANES],
                            length: LANES,
                        };
                        direct(&context, conv, &packed, input, &mut output, Ending::Relu, part).unwrap();
                    }
                }
            }
            (output.data(conv.output).to_vec(), sums)
        }

        fn whole(&self) -> Vec<Vec<usize>> {
            vec![(0..self.conv.tiles()[0]).collect()]
        }
    }

    /// Compares a Winograd convolution with its definition, within the bound of the module's page, and its sums.
    fn check_winograd(
        isa: Isa,
        (tiling, kept): (Tiling, Kept),
        channels: [usize; 2],
        dhw: [usize; 3],
        relu: bool,
        seed: u64,
    ) -> f64 {
        let case = Case::new(channels, dhw, tiling.stride(), Method::Winograd(tiling, kept), seed);
        let conv = &case.conv;
        let (out, sums) = case.run(isa, 1, relu, &case.whole());
        let axes = axes(tiling);
        let part = |i: usize| std::array::from_fn::<&Matrix, 3, _>(|axis| &axes[axis][i]);
        let (outputs, steps, inputs) = (tiling.outputs(), tiling.steps(), tiling.inputs());
        let made = match kept {
            Kept::Whole => 0,
            Kept::Rows => 4,
            Kept::Planes => 8,
        };
        let terms = (channels[0] + 3 * (4 + 6) + 3 + made) as f64 * if isa == Isa::Scalar { 2.0 } else { 1.0 };
        let tiles = conv.tiles();
        let shape = conv.output;
        let mut worst: f64 = 0.0;
        for co in 0..channels[1] {
            for tile in 0..tiles.iter().product() {
                let tile = [tile / (tiles[1] * tiles[2]), tile / tiles[2] % tiles[1], tile % tiles[2]];
                let mut products = vec![0.0; tiling.frequencies()];
                for ci in 0..channels[0] {
                    let x: Vec<f64> = (0..inputs.iter().product())
                        .map(|i| [i / (inputs[1] * inputs[2]), i / inputs[2] % inputs[1], i % inputs[2]])
                        .map(|i| case.x(ci, std::array::from_fn(|a| tile[a] * steps[a] + i[a])).abs())
                        .collect();
                    let w = &case.weights[(co * channels[0] + ci) * 27..][..27];
                    let w: Vec<f64> = w.iter().map(|w| f64::from(w.abs())).collect();
                    let (v, u) = (nested(part(0), &x), nested(part(1), &w));
                    products.iter_mut().zip(v.iter().zip(u)).for_each(|(p, (v, u))| *p += v * u);
                }
                let size = nested(part(2), &products);
                for (i, size) in size.iter().enumerate() {
                    let i = [i / (outputs[1] * outputs[2]), i / outputs[2] % outputs[1], i % outputs[2]];
                    let zyx: [usize; 3] = std::array::from_fn(|a| tile[a] * outputs[a] + i[a]);
                    if (0..3).any(|a| zyx[a] >= shape.dhw[a]) {
                        continue;
                    }
                    let (expected, _) = case.expected(co, zyx);
                    let expected = if relu { expected.max(0.0) } else { expected };
                    let got = f64::from(out[shape.at(co / LANES, zyx) + co % LANES]);
                    let bound = terms * U * (size + f64::from(conv.bias[co].abs()));
                    assert!((got - expected).abs() <= bound, "{isa} {tiling:?} {kept:?}: {got} {expected} {bound}");
                    worst = worst.max((got - expected).abs() / bound);
                }
            }
            let (parts, width) = (conv.parts(), conv.strip_tiles() * outputs[2]);
            for strip in 0..conv.strips() {
                let (y, part) = (strip / parts, strip % parts);
                for z in 0..shape.dhw[0] {
                    let rows = y * outputs[1]..((y + 1) * outputs[1]).min(shape.dhw[1]);
                    let columns = part * width..((part + 1) * width).min(shape.dhw[2]);
                    let sum: f64 = rows
                        .flat_map(|y| columns.clone().map(move |x| [z, y, x]))
                        .map(|zyx| f64::from(out[shape.at(co / LANES, zyx) + co % LANES]))
                        .sum();
                    let got = sums[((co / LANES * conv.strips() + strip) * shape.dhw[0] + z) * LANES + co % LANES];
                    assert!((f64::from(got) - sum).abs() <= 1e-4 * (1.0 + sum.abs()), "sums {got} {sum}");
                }
            }
        }
        // the border and the padding of the channels stay zero
        let inside = |i: usize| {
            let (block, at) = (i / shape.block(), i % shape.block());
            let zyx = [at / shape.plane(), at % shape.plane() / shape.row(), at % shape.row() / LANES];
            let channel = block * LANES + i % LANES;
            channel < shape.c && (0..3).all(|a| (1..=shape.dhw[a]).contains(&zyx[a]))
        };
        for (i, v) in out.iter().enumerate().filter(|(i, _)| !inside(*i)) {
            let channel = i / shape.block() * LANES + i % LANES;
            assert!(*v == 0.0 && (channel < shape.padded_c()), "{i}: {v}");
        }
        worst
    }

    fn methods() -> impl Iterator<Item = (Tiling, Kept)> {
        Tiling::ALL.into_iter().flat_map(|tiling| Kept::ALL.map(|kept| (tiling, kept)))
    }

    fn available() -> impl Iterator<Item = Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.is_available())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(6))]

        #[test]
        fn winograd_keeps_its_error_bound(
            c_in in 1_usize..20, c_out in 1_usize..20, d in 1_usize..10, h in 1_usize..10, w in 1_usize..12,
            relu: bool, seed: u64,
        ) {
            for isa in available() {
                for method in methods() {
                    check_winograd(isa, method, [c_in, c_out], [d, h, w], relu, seed);
                }
            }
        }

        #[test]
        fn neither_threads_nor_grouping_change_a_bit(
            c_in in 1_usize..40, c_out in 1_usize..140, d in 1_usize..14, h in 1_usize..14, w in 1_usize..14, seed: u64,
        ) {
            let isa = Isa::best();
            for (tiling, kept) in methods() {
                let case = Case::new([c_in, c_out], [d, h, w], tiling.stride(), Method::Winograd(tiling, kept), seed);
                let once = case.run(isa, 1, true, &case.whole());
                let tiles = case.conv.tiles()[0];
                let parts = vec![(0..tiles).rev().step_by(2).collect(), (0..tiles.saturating_sub(1)).rev().step_by(2).collect()];
                prop_assert!(once == case.run(isa, 3, true, &parts));
            }
        }

        #[test]
        fn direct_convolutions_match_their_definition(
            c_in in 1_usize..20, c_out in 1_usize..100, d in 1_usize..5, h in 1_usize..12, w in 1_usize..16, seed: u64,
        ) {
            for isa in available() {
                let case = Case::new([c_in, c_out], [d, h, w], 2, Method::Direct, seed);
                let conv = &case.conv;
                let (out, _) = case.run(isa, 2, true, &case.whole());
                let terms = (27 * conv.input.padded_c() + 3) as f64 * if isa == Isa::Scalar { 2.0 } else { 1.0 };
                for co in 0..c_out {
                    for voxel in 0..conv.output.dhw.iter().product() {
                        let [_, oh, ow] = conv.output.dhw;
                        let zyx = [voxel / (oh * ow), voxel / ow % oh, voxel % ow];
                        let (expected, size) = case.expected(co, zyx);
                        let got = f64::from(out[conv.output.at(co / LANES, zyx) + co % LANES]);
                        prop_assert!((got - expected.max(0.0)).abs() <= terms * U * size, "{isa} {got} {expected}");
                    }
                }
            }
        }

        #[test]
        fn merging_matches_its_definition(c in 1_usize..40, d in 1_usize..4, h in 1_usize..6, w in 1_usize..9, seed: u64) {
            let shape = Shape::new(c, [d, h, w]);
            let random = |name: &str| {
                let mut tensor = Tensor::new(shape.len()).unwrap();
                tensor.reshape(shape, &Pool::new(1, || {}).unwrap());
                let values = Stream::new(seed, name).fill(shape.len(), 0.0, 1.0);
                tensor.data_mut(shape).copy_from_slice(&values);
                tensor
            };
            let scale = Stream::new(seed, "scale").fill(d * shape.padded_c(), 0.5, 0.5);
            for isa in available() {
                let (mut x, y) = (random("x"), random("y"));
                let before = x.data(shape).to_vec();
                let kernels = Kernels::of(isa).unwrap();
                let pool = Pool::new(2, || {}).unwrap();
                let context = Context { pool: &pool, kernels: &kernels, cancel: &CancelToken::new() };
                let mut sums = vec![f32::NAN; Sums::len(shape, h)];
                merge(&context, shape, &mut x, &y, &scale, Some(Sums(&mut sums))).unwrap();
                for ch in 0..c {
                    for z in 0..d {
                        let mut sum = 0.0;
                        for row in 0..h {
                            let mut line = 0.0;
                            for column in 0..w {
                                let at = shape.at(ch / LANES, [z, row, column]) + ch % LANES;
                                let factor = f64::from(scale[z * shape.padded_c() + ch]);
                                let expected = f64::from(before[at]) + factor * f64::from(y.data(shape)[at]);
                                let got = f64::from(x.data(shape)[at]);
                                prop_assert!((got - expected.max(0.0)).abs() <= 3.0 * U * (expected.abs() + 2.0));
                                line += got;
                            }
                            let got = sums[((ch / LANES * h + row) * d + z) * LANES + ch % LANES];
                            prop_assert!((f64::from(got) - line).abs() <= 1e-5 * (1.0 + line));
                            sum += line;
                        }
                        prop_assert!(sum >= 0.0);
                    }
                }
            }
        }
    }

    /// The stem and a shortcut of a whole model's plan: segments and strides of their own, the shortcut merging.
    #[test]
    fn the_stem_and_shortcuts_match_their_definition() {
        for (width, dhw, seed) in [(3, [4, 15, 22], 1), (17, [3, 30, 17], 2), (70, [2, 16, 16], 3)] {
            let architecture = Architecture { base_width: width, input_dhw: dhw, ..Architecture::full() };
            let model = Model::synthetic("t", &architecture, seed).unwrap();
            let plan = Plan::new(&model);
            let folded = |bn: &str| -> Vec<(f64, f64)> {
                let get = |part: &str| model.weights.get(&format!("{bn}.{part}"));
                let values =
                    get("weight").iter().zip(get("bias")).zip(get("running_mean").iter().zip(get("running_var")));
                values
                    .map(|((w, b), (mean, var))| {
                        let scale = f64::from(*w) / (f64::from(*var) + 1e-5).sqrt();
                        (scale, f64::from(*b) - f64::from(*mean) * scale)
                    })
                    .collect()
            };
            for isa in available() {
                let kernels = Kernels::of(isa).unwrap();
                let pool = Pool::new(2, || {}).unwrap();
                let context = Context { pool: &pool, kernels: &kernels, cancel: &CancelToken::new() };
                let doubled = if isa == Isa::Scalar { 2.0 } else { 1.0 };

                let volume = crate::model::synthetic::volume(dhw, seed);
                let [_, h, w] = dhw;
                let at = plan.stem_input();
                let mut bordered = vec![0.0_f32; at.total()];
                for (i, v) in volume.iter().enumerate() {
                    let (z, y, x) = (i / (h * w), i / w % h, i % w);
                    bordered[(z + 4) * at.plane() + (y + 3) * at.row() + x + 3] = *v;
                }
                let stem = &plan.stem;
                let mut output = Tensor::new(stem.output.len()).unwrap();
                output.reshape(stem.output, &pool);
                let weights = model.weights.get("stem.0.weight");
                let packed = stem.packed(&kernels, weights);
                let mut scratch = vec![f32::NAN; stem.scratch_len(2, &kernels)];
                // one part after the other, the last first
                for part in [vec![stem.tiles()[0] - 1], (0..stem.tiles()[0] - 1).collect()] {
                    super::stem(&context, stem, at, &packed, &bordered, &mut output, &mut scratch, &part).unwrap();
                }
                let out = output.data(stem.output);
                let [bt, g, a] = magnitudes::<Four>();
                for (co, (scale, shift)) in folded("stem.1").into_iter().enumerate() {
                    for voxel in 0..stem.output.dhw.iter().product() {
                        let [_, oh, ow] = stem.output.dhw;
                        let (z, y, x) = (voxel / (oh * ow), voxel / ow % oh, voxel % ow);
                        let mut sum = shift;
                        // |products| of each frequency along depth
                        let mut products = [0.0; 6];
                        for k in 0..49 {
                            let from = (2 * y + k / 7) * at.row() + 2 * x + k % 7;
                            let w: [f64; 3] =
                                std::array::from_fn(|kd| f64::from(weights[co * 147 + kd * 49 + k]) * scale);
                            let x = |plane: usize| f64::from(bordered[plane * at.plane() + from]);
                            sum += (0..3).map(|kd| w[kd] * x(z + 3 + kd)).sum::<f64>();
                            for (f, product) in products.iter_mut().enumerate() {
                                let u: f64 = (0..3).map(|kd| g[f][kd] * w[kd].abs()).sum();
                                let v: f64 = (0..6).map(|d| bt[f][d] * x(z.div_ceil(4) * 4 + d).abs()).sum();
                                *product += u * v;
                            }
                        }
                        let size: f64 = (0..6).map(|f| a[(z + 3) % 4][f] * products[f]).sum::<f64>() + shift.abs();
                        let got = f64::from(out[stem.output.at(co / LANES, [z, y, x]) + co % LANES]);
                        let bound = doubled * (49 + 4 + 6 + 3) as f64 * U * size;
                        assert!((got - sum.max(0.0)).abs() <= bound, "{isa} stem {got} {sum} {bound}");
                    }
                }

                let block = &plan.blocks[2];
                let shortcut = block.shortcut.as_ref().unwrap();
                let (from, to) = (shortcut.input, shortcut.output);
                let mut x = Tensor::new(from.len()).unwrap();
                x.reshape(from, &pool);
                let mut y = Tensor::new(to.len()).unwrap();
                y.reshape(to, &pool);
                for (tensor, shape, name) in [(&mut x, from, "x"), (&mut y, to, "y")] {
                    let values = Stream::new(seed, name).fill(shape.c * shape.dhw.iter().product::<usize>(), 0.2, 1.0);
                    for (i, v) in values.into_iter().enumerate() {
                        let [_, h, w] = shape.dhw;
                        let (voxel, ch) = (i / shape.c, i % shape.c);
                        let zyx = [voxel / (h * w), voxel / w % h, voxel % w];
                        tensor.data_mut(shape)[shape.at(ch / LANES, zyx) + ch % LANES] = v;
                    }
                }
                let before = y.data(to).to_vec();
                let scale = Stream::new(seed, "scale").fill(to.dhw[0] * to.padded_c(), 0.5, 0.5);
                let weights = model.weights.get("layer2.0.downsample.0.weight");
                let packed = shortcut.packed(&kernels, weights);
                let step = [2 * from.plane(), 2 * from.row(), 2 * LANES];
                let input = DirectInput { data: x.data(from), step, length: LANES };
                let planes: Vec<usize> = (0..to.dhw[0]).collect();
                direct(&context, shortcut, &packed, input, &mut y, Ending::Merge(&scale), &planes).unwrap();
                for (co, (factor, shift)) in folded("layer2.0.downsample.1").into_iter().enumerate() {
                    for voxel in 0..to.dhw.iter().product() {
                        let [_, oh, ow] = to.dhw;
                        let zyx = [voxel / (oh * ow), voxel / ow % oh, voxel % ow];
                        let at = to.at(co / LANES, zyx) + co % LANES;
                        let scaled = f64::from(scale[zyx[0] * to.padded_c() + co]) * f64::from(before[at]);
                        let (mut sum, mut size) = (shift + scaled, shift.abs() + scaled.abs());
                        for ci in 0..from.c {
                            let value = x.data(from)[from.at(ci / LANES, zyx.map(|v| 2 * v)) + ci % LANES];
                            let product = f64::from(weights[co * from.c + ci]) * factor * f64::from(value);
                            sum += product;
                            size += product.abs();
                        }
                        let got = f64::from(y.data(to)[at]);
                        let bound = doubled * (from.padded_c() + 4) as f64 * U * size;
                        assert!((got - sum.max(0.0)).abs() <= bound, "{isa} shortcut {got} {sum}");
                    }
                }
            }
        }
    }

    /// Random data stay far below the bound, but not absurdly: a bound that no error could ever reach shows nothing.
    #[test]
    fn the_error_bound_is_not_empty() {
        for (tiling, kept) in methods() {
            let worst = check_winograd(Isa::best(), (tiling, kept), [16, 4], [8, 8, 8], false, 3);
            println!("{tiling:?} {kept:?}: largest error {worst:.4} of its bound");
            assert!(worst > 1e-5 && worst < 1.0, "{tiling:?} {kept:?}: {worst}");
        }
    }

    /// What is made of weights each time is what would have been kept.
    #[test]
    fn expanding_weights_is_g() {
        fn check<A: Axis>() {
            for w in [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.3, -1.7, 0.9]] {
                let lanes = w.map(|v| [v; LANES]);
                // SAFETY: portable code.
                let got = unsafe { A::expand::<Scalar>(&lanes) };
                let expected = A::g(w.map(f64::from));
                for u in 0..A::U {
                    let size: f64 = (0..3).map(|k| f64::from((g_row::<A>(u)[k] * w[k]).abs())).sum();
                    assert!((f64::from(got[u][0]) - expected[u]).abs() <= 4.0 * U * size, "{u} {got:?} {expected:?}");
                }
            }
        }
        check::<Two>();
        check::<Four>();
        check::<Six>();
        check::<Poly2>();
        check::<Poly4>();
    }

    #[test]
    fn a_set_token_stops_before_the_next_item() {
        let case = Case::new([16, 16], [8, 16, 16], 1, Method::Winograd(Tiling::F444, Kept::Whole), 1);
        let kernels = Kernels::of(Isa::best()).unwrap();
        let pool = Pool::new(1, || {}).unwrap();
        let cancel = CancelToken::new();
        cancel.cancel();
        let context = Context { pool: &pool, kernels: &kernels, cancel: &cancel };
        let packed = case.conv.packed(&kernels, &case.weights);
        let mut output = Tensor::new(case.conv.output.len()).unwrap();
        output.reshape(case.conv.output, &pool);
        let mut scratch = vec![0.0; case.conv.scratch_len(1, &kernels)];
        let result =
            winograd(&context, &case.conv, &packed, &case.input, &mut output, true, None, &mut scratch, &[0, 1]);
        assert_eq!(result, Err(EngineError::Cancelled));
        assert!(output.data(case.conv.output).iter().all(|v| *v == 0.0));
    }
}
