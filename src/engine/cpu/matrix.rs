//! Matrix products in registers: the middle of a Winograd convolution, and convolutions done directly.
//!
//! ```text
//! product:    m[t][v] = sum over ci of  v[t][ci] * u[ci][v]           groups of 14 tiles x 2 vectors (AVX2: 6 x 1)
//! direct_row: c[x][v] = sum over segments, k of  a[x * lda + offset + k] * b[segment][k][v]       6 voxels x 4 vectors
//! ```
//!
//! One side is broadcast value by value, the other lies in panels in the order it is read, sums stay in registers. V has
//! the sixteen channels of a group's tiles one after the other, so that every broadcast is at a constant distance from one
//! pointer: with rows far apart the fourteen addresses do not fit the registers.
//! Fourteen tiles take two cache lines of weights in 28 multiply-adds, 6 x 4 took four in 24: weights come from the second
//! and third level. Groups are of equal size: of 14 tiles in sixes the last two would wait for their own sums.
//! What follows a direct convolution (bias, ReLU; or attention scale, shortcut and ReLU) is done before it is stored.
//!
//! **Ahead.** While a group is computed, the panel of weights that follows is asked for, one or two cache lines a step,
//! and a few lines of the inputs that come next. Spread out: in bursts they fill the queue of misses and the core stops.
//!
//! **Arithmetic.** 28 multiply-adds for 16 loads with AVX-512, 12 for 8 with AVX2; 97 % of the measured peak out of the
//! first-level cache with both (EPYC 9004: 228 and 229 of 236 GFLOP/s on two cores).
//!
//! **Error.** A sum of n products by FMA in sequence: |d| <= n u sum |a b|, u = 2^-24 (2 n u without FMA); the bias and
//! the scaling add 3 u of what they touch. The order of a sum is that of its segments and k, whatever tile it is in, so
//! the bits do not depend on how rows are grouped.
#![allow(unsafe_code)]

use super::simd::{LANES, Simd};

/// Rows of a tile of a direct convolution.
const ROWS: usize = 6;

/// Store the sums.
pub const PLAIN: u8 = 0;
/// Add the bias, then ReLU.
pub const BIAS_RELU: u8 = 1;
/// `relu(sum + bias + scale * what is there)`.
pub const MERGE: u8 = 2;

/// What one row of output voxels and one panel of output channels is computed from.
#[derive(Clone, Copy, Debug)]
pub struct DirectRow {
    /// The first voxel's first input.
    pub a: *const f32,
    /// Floats from voxel to voxel of the input.
    pub lda: usize,
    /// Voxels.
    pub voxels: usize,
    /// Where each segment of a voxel's inputs begins, floats from its first.
    pub offsets: *const usize,
    /// Segments.
    pub segments: usize,
    /// Inputs of a segment.
    pub length: usize,
    /// Floats from voxel to voxel of the output.
    pub ldc: usize,
    /// Floats to the inputs of the row that follows; with [`MERGE`], whose few multiply-adds an input would wait for
    /// memory, they are asked for.
    pub next: usize,
    /// Weights `[segment][k][vector][lane]`.
    pub b: *const f32,
    /// The first voxel's output of the panel's first block.
    pub c: *mut f32,
    /// Floats from block to block of the output.
    pub block: usize,
    /// Vectors of the panel, 1 to 4.
    pub vectors: usize,
    /// A bias an output.
    pub bias: *const f32,
    /// With [`MERGE`] a factor an output.
    pub scale: *const f32,
    /// Whether to write past the caches; then outputs lie at multiples of 64 bytes.
    pub stream: bool,
}

/// The operands of a tile besides its rows.
#[derive(Clone, Copy)]
struct Operands<'a> {
    lda: usize,
    offsets: &'a [usize],
    length: usize,
    b: *const f32,
    ldc: usize,
    /// Floats from vector to vector of `c`.
    block: usize,
    bias: *const f32,
    scale: *const f32,
    next: usize,
    stream: bool,
}

/// # Safety
/// The processor has the instructions of `S`; `a` is valid for reads at `r * lda + offset + k`, `o.b` for
/// `segments * length * NV` vectors, `c` for reads and writes of vectors at `r * ldc + v * block`; with an epilogue,
/// `bias` (and `scale`) for NV vectors.
#[inline(always)]
unsafe fn tile<S: Simd, const MR: usize, const NV: usize, const E: u8>(a: *const f32, c: *mut f32, o: &Operands<'_>) {
    // SAFETY: the caller's promise.
    unsafe {
        let zero = S::splat(0.0);
        let mut sums = [[zero; NV]; MR];
        let mut b = o.b;
        for &offset in o.offsets {
            let mut x = a.add(offset);
            if E == MERGE {
                for r in 0..MR {
                    S::prefetch(x.wrapping_add(r * o.lda + o.next));
                }
            }
            for _ in 0..o.length {
                let mut weights = [zero; NV];
                for (v, weights) in weights.iter_mut().enumerate() {
                    *weights = S::load(b.add(v * LANES));
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let value = S::splat(*x.add(r * o.lda));
                    for (sum, weights) in sums.iter_mut().zip(&weights) {
                        *sum = S::fma(value, *weights, *sum);
                    }
                }
                b = b.add(NV * LANES);
                x = x.add(1);
            }
        }
        for v in 0..NV {
            let bias = if E == PLAIN { zero } else { S::load(o.bias.add(v * LANES)) };
            let scale = if E == MERGE { S::load(o.scale.add(v * LANES)) } else { zero };
            for (r, sums) in sums.iter().enumerate() {
                let to = c.add(r * o.ldc + v * o.block);
                let value = match E {
                    PLAIN => sums[v],
                    BIAS_RELU => S::max(zero, S::add(sums[v], bias)),
                    _ => S::max(zero, S::fma(scale, S::load(to), S::add(sums[v], bias))),
                };
                if E == BIAS_RELU && o.stream { S::stream(to, value) } else { S::store(to, value) }
            }
        }
    }
}

/// `rows` rows in tiles of six, then three, two and one.
///
/// # Safety
/// As [`tile`] for `rows` rows.
#[inline(always)]
unsafe fn rows<S: Simd, const NV: usize, const E: u8>(rows: usize, a: *const f32, c: *mut f32, o: &Operands<'_>) {
    let mut r = 0;
    // SAFETY: the caller's promise; r + MR <= rows in each call.
    unsafe {
        macro_rules! step {
            ($mr:literal) => {{
                tile::<S, $mr, NV, E>(a.add(r * o.lda), c.add(r * o.ldc), o);
                r += $mr;
            }};
        }
        while r + ROWS <= rows {
            step!(6);
        }
        if r + 3 <= rows {
            step!(3);
        }
        if r + 2 <= rows {
            step!(2);
        }
        if r < rows {
            step!(1);
        }
        debug_assert_eq!(r, rows);
    }
}

/// One row of a direct convolution.
///
/// # Safety
/// The processor has the instructions of `S`. The pointers of `p` are valid as its fields say, for all voxels, segments
/// and vectors; the output overlaps nothing else; `vectors` is 1 to `S::NV`.
#[inline(always)]
pub unsafe fn direct_row<S: Simd, const E: u8>(p: &DirectRow) {
    // SAFETY: the caller's promise.
    unsafe {
        let o = Operands {
            lda: p.lda,
            offsets: std::slice::from_raw_parts(p.offsets, p.segments),
            length: p.length,
            b: p.b,
            ldc: p.ldc,
            block: p.block,
            bias: p.bias,
            scale: p.scale,
            next: p.next,
            stream: p.stream,
        };
        if S::NV == 1 {
            rows::<S, 1, E>(p.voxels, p.a, p.c, &o);
        } else {
            match p.vectors {
                1 => rows::<S, 1, E>(p.voxels, p.a, p.c, &o),
                2 => rows::<S, 2, E>(p.voxels, p.a, p.c, &o),
                3 => rows::<S, 3, E>(p.voxels, p.a, p.c, &o),
                _ => rows::<S, 4, E>(p.voxels, p.a, p.c, &o),
            }
        }
        if p.stream {
            S::fence();
        }
    }
}

/// The products of tiles with one panel of transformed weights.
#[derive(Clone, Copy, Debug)]
pub struct Product {
    /// Tiles.
    pub tiles: usize,
    /// Tiles of a group (the last may have fewer), at most `S::ROWS`.
    pub size: usize,
    /// Blocks of input channels.
    pub blocks: usize,
    /// Vectors of the panel, 1 to `S::PANEL`.
    pub vectors: usize,
    /// `[group][block][tile of the group][16]`, with room for `S::ROWS` tiles in each group.
    pub v: *const f32,
    /// `[input channel][vector][16]`.
    pub u: *const f32,
    /// `[group][tile of the group][vector][16]`, with room for `S::ROWS` tiles in each group.
    pub m: *mut f32,
    /// What is asked for meanwhile, a cache line a step: weights.
    pub ahead: *const f32,
    /// How many lines.
    pub lines: usize,
    /// What else is asked for meanwhile, a few lines a block of channels: inputs.
    pub next: *const f32,
    /// How many lines.
    pub next_lines: usize,
}

/// The products of `MR` tiles of one group; `AHEAD` lines are asked for each step.
///
/// # Safety
/// As [`product`].
#[inline(always)]
unsafe fn group<S: Simd, const MR: usize, const NV: usize, const AHEAD: usize>(
    mut v: *const f32,
    m: *mut f32,
    p: &Product,
    mut ahead: *const f32,
    [mut next, end]: [*const f32; 2],
) {
    // SAFETY: the caller's promise; MR <= ROWS.
    unsafe {
        let mut sums = [[S::splat(0.0); NV]; MR];
        let mut u = p.u;
        for _ in 0..p.blocks {
            for _ in 0..NEXT_LINES {
                if next < end {
                    S::prefetch(next);
                    next = next.wrapping_add(LANES);
                }
            }
            for k in 0..LANES {
                let mut weights = [S::splat(0.0); NV];
                for (i, weights) in weights.iter_mut().enumerate() {
                    *weights = S::load(u.add(i * LANES));
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let value = S::splat(*v.add(r * LANES + k));
                    for (sum, weights) in sums.iter_mut().zip(&weights) {
                        *sum = S::fma(value, *weights, *sum);
                    }
                }
                for _ in 0..AHEAD {
                    S::prefetch(ahead);
                    ahead = ahead.wrapping_add(LANES);
                }
                u = u.add(NV * LANES);
            }
            v = v.add(S::ROWS * LANES);
        }
        for (r, sums) in sums.iter().enumerate() {
            for (i, sum) in sums.iter().enumerate() {
                S::store(m.add((r * NV + i) * LANES), *sum);
            }
        }
    }
}

/// All groups of tiles of a product.
///
/// # Safety
/// As [`product`].
#[inline(always)]
unsafe fn groups<S: Simd, const NV: usize>(p: &Product) {
    let steps = p.blocks * LANES;
    let (mut first, mut lines, mut ahead) = (0, p.lines, p.ahead);
    let (mut v, mut m) = (p.v, p.m);
    let (mut next, end) = (p.next, p.next.wrapping_add(p.next_lines * LANES));
    while first < p.tiles {
        let here = (p.tiles - first).min(p.size);
        // Two lines a step where one would not fetch all before the tiles end.
        let left = (p.tiles - first).div_ceil(p.size);
        let a_step = lines.div_ceil(steps * left).min(2);
        macro_rules! group {
            ($mr:literal) => {
                match a_step {
                    0 => group::<S, $mr, NV, 0>(v, m, p, ahead, [next, end]),
                    1 => group::<S, $mr, NV, 1>(v, m, p, ahead, [next, end]),
                    _ => group::<S, $mr, NV, 2>(v, m, p, ahead, [next, end]),
                }
            };
        }
        // SAFETY: the caller's promise; rows behind the last tile exist and are computed for nothing.
        unsafe {
            match here {
                13.. if S::ROWS == WIDE_ROWS => group!(14),
                12 if S::ROWS == WIDE_ROWS => group!(12),
                11 if S::ROWS == WIDE_ROWS => group!(11),
                9.. if S::ROWS == WIDE_ROWS => group!(10),
                8 if S::ROWS == WIDE_ROWS => group!(8),
                7 if S::ROWS == WIDE_ROWS => group!(7),
                6.. => group!(6),
                5 => group!(5),
                3.. => group!(4),
                _ => group!(2),
            }
        }
        let fetched = (steps * a_step).min(lines);
        (lines, ahead) = (lines - fetched, ahead.wrapping_add(fetched * LANES));
        next = next.wrapping_add(p.blocks * NEXT_LINES * LANES);
        (v, m) = (v.wrapping_add(steps * S::ROWS), m.wrapping_add(S::ROWS * NV * LANES));
        first += p.size;
    }
}

/// Lines of inputs asked for in each block of channels: one in three or four steps.
const NEXT_LINES: usize = 5;

/// Tiles of a group with AVX-512.
const WIDE_ROWS: usize = 14;

/// `m[t][co] = sum over ci of v[t][ci] u[ci][co]` for one panel of outputs.
///
/// # Safety
/// The processor has the instructions of `S`; the pointers of `p` are valid as its fields say, but for `ahead` and
/// `next`, which may be any; `m` overlaps nothing else.
#[inline(always)]
pub unsafe fn product<S: Simd>(p: &Product) {
    // SAFETY: the caller's promise.
    unsafe { if S::PANEL == 1 || p.vectors == 1 { groups::<S, 1>(p) } else { groups::<S, 2>(p) } }
}

/// One row of voxels of one block of channels to be merged with its shortcut.
#[derive(Clone, Copy, Debug)]
pub struct MergeRow {
    /// The shortcut, which becomes the output.
    pub x: *mut f32,
    /// What is scaled and added.
    pub y: *const f32,
    /// Voxels.
    pub voxels: usize,
    /// Sixteen factors.
    pub scale: *const f32,
    /// Sixteen sums of the outputs, or null.
    pub sums: *mut f32,
}

/// `x = relu(x + scale * y)`.
///
/// # Safety
/// The processor has the instructions of `S`; `x` and `y` are valid for `voxels` vectors and do not overlap, `scale` for
/// one, `sums` is null or valid for one.
#[inline(always)]
pub unsafe fn merge_row<S: Simd>(p: &MergeRow) {
    // SAFETY: the caller's promise.
    unsafe {
        let zero = S::splat(0.0);
        let scale = S::load(p.scale);
        let mut sum = zero;
        for i in 0..p.voxels {
            let x = p.x.add(i * LANES);
            let value = S::max(zero, S::fma(scale, S::load(p.y.add(i * LANES)), S::load(x)));
            sum = S::add(sum, value);
            S::store(x, value);
        }
        if !p.sums.is_null() {
            S::store(p.sums, sum);
        }
    }
}

/// Sum of all lanes.
///
/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
unsafe fn total<S: Simd>(vectors: &[S::V]) -> f32 {
    let mut lanes = [0.0; LANES];
    let mut total = 0.0;
    for vector in vectors {
        // SAFETY: the caller's promise; sixteen floats are written to sixteen.
        unsafe { S::store(lanes.as_mut_ptr(), *vector) };
        total += lanes.iter().sum::<f32>();
    }
    total
}

/// Sum of `values`, sixteen at a time: reads memory as fast as it comes.
///
/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
pub unsafe fn read<S: Simd>(values: &[f32]) -> f32 {
    // SAFETY: chunks hold eight vectors.
    unsafe {
        let mut sums = [S::splat(0.0); 8];
        for chunk in values.chunks_exact(8 * LANES) {
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = S::add(*sum, S::load(chunk.as_ptr().add(i * LANES)));
            }
        }
        total::<S>(&sums)
    }
}

/// `rounds` times twelve vector multiply-adds that depend on nothing but their own last result.
///
/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
pub unsafe fn multiply_adds<S: Simd>(rounds: usize) -> f32 {
    // SAFETY: registers only, but for the last sixteen floats.
    unsafe {
        let (factor, term) = (S::splat(0.999), S::splat(1e-3));
        let mut sums = [S::splat(0.5); INDEPENDENT];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = S::fma(*sum, factor, term);
            }
        }
        total::<S>(&sums)
    }
}

/// Multiply-adds that [`multiply_adds`] has under way: more than latency times width of any processor.
pub const INDEPENDENT: usize = 12;
