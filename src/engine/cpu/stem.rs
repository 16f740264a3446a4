//! The first convolution: one input channel, 3x7x7 taps, stride 1 along depth and 2 along rows and columns.
//!
//! ```text
//! for each depth tile (four planes of outputs, see SHIFT) and group of rows:
//!     V[f] = B^T along D of the six input planes                               f: the six frequencies of F(4,3)
//!     for each row of outputs and f:  M[f][x][co] = sum over 7 x 7 taps of V[f] * U[f]      matrix::direct_row
//!     y = A^T M along D, + bias, ReLU
//! ```
//!
//! Winograd's transform along depth alone: it is the axis of stride 1. It leaves 73.5 of 147 multiply-adds an output. B^T
//! costs next to nothing, since one channel comes in and 64 go out.
//!
//! **Arithmetic** of a row of 112 outputs of 64 channels in four planes: 131,712 vector multiply-adds, 2,688 stores and
//! loads of M, 1,792 stores of outputs. V and M of a group are 290 KB and stay in the second-level cache.
//!
//! **Error.** As in [`super::winograd`] with one axis: k = 49 + 4 + 6 + 3, doubled without FMA.
//!
//! Deliberately absent: other kernel sizes.
#![allow(unsafe_code)]

use super::matrix::{DirectRow, PLAIN, direct_row};
use super::simd::{LANES, Simd};
use super::winograd::{Axis, Four, MAX_T};

/// Taps of a row of the kernel.
pub const TAPS: usize = 7;
/// Taps of the kernel along rows and columns: the products of one frequency.
pub const PLANE_TAPS: usize = TAPS * TAPS;
/// Output planes of a depth tile.
pub const DEPTHS: usize = Four::M;
/// Input planes of a depth tile, and frequencies.
pub const FREQUENCIES: usize = Four::T;
/// Output planes by which the first tile lies before the first plane. The convolution that follows has tiles of planes
/// 4 t to 4 t + 3 and reads up to plane 4 t + 4: with this shift a tile of this one ends just there, so that no plane waits
/// for inputs that it is not made of when layers are computed ahead.
pub const SHIFT: usize = DEPTHS - 1;
/// Rows of outputs of a group.
pub const ROWS: usize = 8;

/// One group of rows of one depth tile.
#[derive(Clone, Copy, Debug)]
pub struct StemRows {
    /// The first input of the first output, with its border; sixteen floats behind the last are readable.
    pub x: *const f32,
    /// Floats from plane to plane of `x`.
    pub plane: usize,
    /// Floats from row to row of `x`.
    pub row: usize,
    /// Rows of outputs, 1 to [`ROWS`].
    pub rows: usize,
    /// Outputs of a row.
    pub width: usize,
    /// Room for V: [`v_len`] floats.
    pub v: *mut f32,
    /// Room for M: [`m_len`] floats.
    pub m: *mut f32,
    /// Panels of `S::NV` vectors (the last may have fewer) for each frequency, each `[tap][vector][16]`.
    pub weights: *const f32,
    /// Blocks of output channels.
    pub blocks: usize,
    /// Where the taps of a row of V begin: [`TAPS`] offsets of [`v_row`] floats.
    pub offsets: *const usize,
    /// The first output voxel of the first block, in the first plane that exists.
    pub y: *mut f32,
    /// Floats from block to block, plane to plane and row to row of `y`.
    pub y_steps: [usize; 3],
    /// Output planes of the tile before the first that exists, and how many exist.
    pub depths: [usize; 2],
    /// A bias an output.
    pub bias: *const f32,
    /// Whether to write past the caches; then outputs lie at multiples of 64 bytes.
    pub stream: bool,
}

/// Floats of a row of V for input rows of `row` floats.
pub const fn v_row(row: usize) -> usize {
    row.div_ceil(LANES) * LANES
}

/// Floats of V.
pub const fn v_len(row: usize) -> usize {
    FREQUENCIES * (2 * ROWS + TAPS - 2) * v_row(row)
}

/// Floats of M.
pub const fn m_len(width: usize, blocks: usize) -> usize {
    FREQUENCIES * width * blocks * LANES
}

/// The outputs of a group of rows.
///
/// # Safety
/// The processor has the instructions of `S`; the pointers of `p` are valid as its fields say, and what is written
/// overlaps nothing else.
#[inline(always)]
pub unsafe fn stem_rows<S: Simd>(p: &StemRows) {
    let inputs = 2 * p.rows + TAPS - 2;
    let (v_row, v_step) = (v_row(p.row), (2 * ROWS + TAPS - 2) * v_row(p.row));
    let m_step = p.width * p.blocks * LANES;
    // SAFETY: rows below `inputs` exist, and columns below `row` with sixteen floats behind; V holds `v_row` floats for
    // each of them, M `width` voxels of `blocks` blocks; the rest is the caller's promise.
    unsafe {
        for y in 0..inputs {
            for x in (0..p.row).step_by(LANES) {
                let mut a = [S::splat(0.0); MAX_T];
                for (d, a) in a.iter_mut().enumerate().take(FREQUENCIES) {
                    *a = S::load(p.x.add(d * p.plane + y * p.row + x));
                }
                let o = Four::bt::<S>(&a);
                for (f, o) in o.iter().enumerate().take(FREQUENCIES) {
                    S::store(p.v.add(f * v_step + y * v_row + x), *o);
                }
            }
        }
        for y in 0..p.rows {
            for f in 0..FREQUENCIES {
                let mut first = 0;
                while first < p.blocks {
                    let vectors = S::NV.min(p.blocks - first);
                    direct_row::<S, PLAIN>(&DirectRow {
                        a: p.v.add(f * v_step + 2 * y * v_row),
                        lda: 2,
                        voxels: p.width,
                        offsets: p.offsets,
                        segments: TAPS,
                        length: TAPS,
                        next: 0,
                        b: p.weights.add((f * p.blocks + first) * PLANE_TAPS * LANES),
                        c: p.m.add(f * m_step + first * LANES),
                        ldc: p.blocks * LANES,
                        block: LANES,
                        vectors,
                        bias: std::ptr::null(),
                        scale: std::ptr::null(),
                        stream: false,
                    });
                    first += vectors;
                }
            }
            for block in 0..p.blocks {
                let bias = S::load(p.bias.add(block * LANES));
                for x in 0..p.width {
                    let mut a = [S::splat(0.0); MAX_T];
                    for (f, a) in a.iter_mut().enumerate().take(FREQUENCIES) {
                        *a = S::load(p.m.add(f * m_step + (x * p.blocks + block) * LANES));
                    }
                    let o = Four::at::<S>(&a);
                    let to = p.y.add(block * p.y_steps[0] + y * p.y_steps[2] + x * LANES);
                    for (d, o) in o[..DEPTHS].iter().skip(p.depths[0]).enumerate() {
                        if d < p.depths[1] {
                            let value = S::max(S::splat(0.0), S::add(*o, bias));
                            let to = to.add(d * p.y_steps[1]);
                            if p.stream { S::stream(to, value) } else { S::store(to, value) }
                        }
                    }
                }
            }
        }
        if p.stream {
            S::fence();
        }
    }
}
