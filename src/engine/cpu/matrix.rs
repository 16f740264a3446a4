//! Matrix products in registers: the middle of a Winograd convolution, and convolutions done directly.
//!
//! ```text
//! tile:       c[r][v] = sum over segments, k of  a[r * lda + offset + k] * b[segment][k][v]     r < MR, v < NV vectors
//! frequency:  M[t][co] for one frequency: tiles of 6 rows x NV vectors over all t and co
//! direct_row: one row of output voxels: the segments are the taps and blocks of input channels of each voxel
//! ```
//!
//! Rows of `a` are broadcast value by value, `b` lies in panels of NV vectors in the order it is read, sums stay in
//! registers: 6 x 4 vectors with AVX-512, 6 x 1 (of two registers) with AVX2. What follows a direct convolution (bias,
//! ReLU; or attention scale, shortcut and ReLU) is done before the registers are stored.
//!
//! **Ahead.** While a tile is computed, the panel of weights that follows in memory (the next one, or the next
//! frequency's first) is asked for, one cache line a step of k and two in tiles of fewer rows, so that a full block of
//! tiles fetches about one panel. Asked for in bursts before each tile the same lines made it slower, because the core
//! stopped when its queue of misses was full; spread out they raised the products of layer2 from 160 to 195 GFLOP/s.
//!
//! **Arithmetic.** 24 multiply-adds for 10 loads with AVX-512: 98 % of the peak was measured out of the first-level cache
//! (EPYC 9005: 246 of 250 GFLOP/s on one core), 12 for 8 with AVX2 (118 GFLOP/s).
//!
//! **Error.** A sum of n products by FMA in sequence: |d| <= n u sum |a b|, u = 2^-24 (2 n u without FMA); the bias and
//! the scaling add 3 u of what they touch. The order of a sum is that of its segments and k, whatever tile it is in, so
//! the bits do not depend on how rows are grouped.
#![allow(unsafe_code)]

use super::simd::{LANES, Simd};

/// Rows of a tile.
pub const ROWS: usize = 6;

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
/// `bias` (and `scale`) for NV vectors. `ahead` may be any address.
#[inline(always)]
unsafe fn tile<S: Simd, const MR: usize, const NV: usize, const E: u8>(
    a: *const f32,
    c: *mut f32,
    o: &Operands<'_>,
    mut ahead: *const f32,
) {
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
                if E == PLAIN {
                    for _ in 0..lines_ahead(MR) {
                        S::prefetch(ahead);
                        ahead = ahead.wrapping_add(LANES);
                    }
                }
                b = b.add(NV * LANES);
                x = x.add(1);
            }
        }
        for v in 0..NV {
            let (bias, scale) = match E {
                PLAIN => (zero, zero),
                BIAS_RELU => (S::load(o.bias.add(v * LANES)), zero),
                _ => (S::load(o.bias.add(v * LANES)), S::load(o.scale.add(v * LANES))),
            };
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

/// Cache lines asked for in a step of a tile with so many rows.
const fn lines_ahead(rows: usize) -> usize {
    if rows < ROWS { 2 } else { 1 }
}

/// `rows` rows in tiles of six, then three, two and one.
///
/// # Safety
/// As [`tile`] for `rows` rows.
#[inline(always)]
unsafe fn rows<S: Simd, const NV: usize, const E: u8>(rows: usize, a: *const f32, c: *mut f32, o: &Operands<'_>) {
    let mut r = 0;
    let mut ahead = o.b.wrapping_add(o.length * NV * LANES);
    // SAFETY: the caller's promise; r + MR <= rows in each call.
    unsafe {
        macro_rules! step {
            ($mr:literal) => {{
                tile::<S, $mr, NV, E>(a.add(r * o.lda), c.add(r * o.ldc), o, ahead);
                ahead = ahead.wrapping_add(o.length * LANES * lines_ahead($mr));
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
        let _ = ahead;
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
            ldc: LANES,
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

/// The products of one frequency.
#[derive(Clone, Copy, Debug)]
pub struct Frequency {
    /// Tiles.
    pub tiles: usize,
    /// Input channels, a multiple of 16.
    pub c_in: usize,
    /// Output channels, a multiple of 16.
    pub c_out: usize,
    /// `[tile][c_in]`.
    pub v: *const f32,
    /// Panels of `S::NV` vectors (the last may have fewer), each `[c_in][vector][lane]`.
    pub u: *const f32,
    /// `[tile][c_out]`.
    pub m: *mut f32,
}

/// `m[t][co] = sum over ci of v[t][ci] u[ci][co]`.
///
/// # Safety
/// The processor has the instructions of `S`; the pointers of `p` are valid as its fields say; `m` overlaps nothing else.
#[inline(always)]
pub unsafe fn frequency<S: Simd>(p: &Frequency) {
    let vectors = p.c_out / LANES;
    let mut first = 0;
    while first < vectors {
        let count = S::NV.min(vectors - first);
        // SAFETY: the caller's promise; the panel begins at `first` vectors of `c_in` rows.
        unsafe {
            let o = Operands {
                lda: p.c_in,
                offsets: &[0],
                length: p.c_in,
                b: p.u.add(first * p.c_in * LANES),
                ldc: p.c_out,
                block: LANES,
                bias: std::ptr::null(),
                scale: std::ptr::null(),
                next: 0,
                stream: false,
            };
            let c = p.m.add(first * LANES);
            if S::NV == 1 {
                rows::<S, 1, PLAIN>(p.tiles, p.v, c, &o);
            } else {
                match count {
                    1 => rows::<S, 1, PLAIN>(p.tiles, p.v, c, &o),
                    2 => rows::<S, 2, PLAIN>(p.tiles, p.v, c, &o),
                    3 => rows::<S, 3, PLAIN>(p.tiles, p.v, c, &o),
                    _ => rows::<S, 4, PLAIN>(p.tiles, p.v, c, &o),
                }
            }
        }
        first += count;
    }
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
