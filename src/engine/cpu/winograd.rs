//! Three-dimensional Winograd convolution, 3x3x3 kernels, stride 1 and 2.
//!
//! ```text
//! for each tile (a box of M_d x M_h x M_w outputs):
//!     V[f][t][ci] = B^T x along W, H, D of the T_d x T_h x T_w inputs         input_row
//!     M[f][t][co] = sum over ci of V[f][t][ci] * U[f][ci][co]                  matrix::frequency
//!     y = A^T M along D, H, W, + bias, ReLU, sums                              output_row
//! U[f] = G w along D, H, W                                                     kernel_transform, once
//! ```
//!
//! One axis computes M outputs of a 3-tap correlation from T inputs with T products instead of 3 M ([`Axis`]); axes
//! nest. F(4,3) takes the points 0, +-5/8, +-3/2 and infinity: on random data of 64 channels its relative rms error in
//! three dimensions is 1.4e-6, that of the customary 0, +-1, +-2 is 4.6e-6, and all its constants are exact in f32.
//!
//! **Stride 2** ([`Poly4`], [`Poly2`]): output o reads the inputs 2o-1, 2o, 2o+1. The odd ones are a 2-tap correlation,
//! done by F(4,2) with the points +-5/8, +-3/2 (infinity included), the even ones a product each; both are rows of one
//! transform, so that the same three passes serve. M = 4 takes 5 + 4 products where 12 were needed.
//!
//! Multiplications an output, one channel pair: direct 27; F(4,4,4) 3.375; F(2,4,4) 4.5; F(2,2,2) 8; stride 2 with
//! M = 4 11.4, with M = 2 15.6.
//!
//! **Tricks.** Columns of voxels are transformed along D and H once and shared by the tiles that overlap along W. The
//! distance of two frequencies in V and M is an odd number of cache lines, so that the T_d T_h T_w lines that a tile
//! touches fall into different sets. Large outputs are written past the caches.
//!
//! **Arithmetic** of one tile and sixteen channels in F(4,4,4): input 1008 multiply-adds, 504 loads, 504 stores; output
//! 988, 456, 304. The matrix products of 64 -> 64 channels take 27,648 vector multiply-adds a tile, so that the
//! transforms are a sixth of the instructions where everything stays in the caches.
//!
//! **Error.** Rounding is relative to what is rounded, so with |.| taken of all matrices and data
//! `|y' - y| <= k u A|.| (sum over ci of G|w| * B|x|)`, u = 2^-24, where k counts the roundings that one term may pass:
//! per axis at most 4 in B^T and 6 in A^T (twice that without FMA), 1 for U, one a channel in the sum, and 2 for bias
//! and store: k = c_in + 3 (4 + 6) + 3, doubled without FMA. The property test computes this bound for each case.
//!
//! Deliberately absent: padding (tensors carry zero borders), any knowledge of layers.
#![allow(unsafe_code)]

use super::simd::{LANES, Simd};

/// Most inputs of an axis.
pub const MAX_T: usize = 9;
/// Most frequencies of a tile.
pub const MAX_FREQUENCIES: usize = MAX_T * MAX_T * MAX_T;
/// Vectors of a column of the largest axes.
const COLUMN: usize = MAX_T * MAX_T;
/// Most outputs of an axis.
pub const MAX_M: usize = 4;

/// Values along one axis; those beyond T are unused.
type Axial<V> = [V; MAX_T];

/// One axis of a transform.
pub trait Axis: Copy + 'static {
    /// Outputs of a tile.
    const M: usize;
    /// Inputs of a tile, and products.
    const T: usize;
    /// Inputs from one tile to the next.
    const STEP: usize;
    /// Distinct transformed weights.
    const U: usize;
    /// Which transformed weight product `t` takes.
    fn weight_of(t: usize) -> usize;
    /// G: the transformed weights of three taps.
    fn g(w: [f64; 3]) -> [f64; MAX_T];
    /// B^T.
    ///
    /// # Safety
    /// The processor has the instructions of `S`.
    unsafe fn bt<S: Simd>(x: &Axial<S::V>) -> Axial<S::V>;
    /// A^T.
    ///
    /// # Safety
    /// As [`Axis::bt`].
    unsafe fn at<S: Simd>(m: &Axial<S::V>) -> Axial<S::V>;
}

/// F(2, 3): points 0, 1, -1, infinity.
#[derive(Clone, Copy, Debug)]
pub struct Two;

impl Axis for Two {
    const M: usize = 2;
    const T: usize = 4;
    const STEP: usize = 2;
    const U: usize = 4;
    fn weight_of(t: usize) -> usize {
        t
    }
    fn g([a, b, c]: [f64; 3]) -> [f64; MAX_T] {
        [-a, (a + b + c) / 2.0, (a - b + c) / 2.0, c, 0.0, 0.0, 0.0, 0.0, 0.0]
    }
    #[inline(always)]
    unsafe fn bt<S: Simd>(x: &Axial<S::V>) -> Axial<S::V> {
        let mut o = *x;
        // SAFETY: the caller's promise.
        unsafe {
            o[0] = S::sub(x[2], x[0]);
            o[1] = S::add(x[2], x[1]);
            o[2] = S::sub(x[2], x[1]);
            o[3] = S::sub(x[3], x[1]);
        }
        o
    }
    #[inline(always)]
    unsafe fn at<S: Simd>(m: &Axial<S::V>) -> Axial<S::V> {
        let mut o = *m;
        // SAFETY: the caller's promise.
        unsafe {
            o[0] = S::add(m[0], S::add(m[1], m[2]));
            o[1] = S::add(S::sub(m[1], m[2]), m[3]);
        }
        o
    }
}

/// The inner pair of points.
const A: f32 = 0.625;
/// The outer pair of points.
const B: f32 = 1.5;

/// F(4, 3): points 0, +-5/8, +-3/2, infinity.
#[derive(Clone, Copy, Debug)]
pub struct Four;

impl Axis for Four {
    const M: usize = 4;
    const T: usize = 6;
    const STEP: usize = 4;
    const U: usize = 6;
    fn weight_of(t: usize) -> usize {
        t
    }
    fn g([w0, w1, w2]: [f64; 3]) -> [f64; MAX_T] {
        let (a, b) = (f64::from(A), f64::from(B));
        let at = |p: f64, n: f64| (w0 + p * w1 + p * p * w2) / n;
        let (na, nb) = (2.0 * a * a * (a * a - b * b), 2.0 * b * b * (b * b - a * a));
        [at(0.0, a * a * b * b), at(a, na), at(-a, na), at(b, nb), at(-b, nb), w2, 0.0, 0.0, 0.0]
    }
    #[inline(always)]
    unsafe fn bt<S: Simd>(x: &Axial<S::V>) -> Axial<S::V> {
        let mut o = *x;
        // SAFETY: the caller's promise.
        unsafe {
            let (a, b) = (S::splat(A), S::splat(B));
            let (a2, b2) = (S::splat(A * A), S::splat(B * B));
            let (product, sum) = (S::splat(A * A * B * B), S::splat(A * A + B * B));
            o[0] = S::fma(product, x[0], S::fnma(sum, x[2], x[4]));
            let (even, odd) = (S::fnma(b2, x[2], x[4]), S::fnma(b2, x[1], x[3]));
            o[1] = S::fma(a, odd, even);
            o[2] = S::fnma(a, odd, even);
            let (even, odd) = (S::fnma(a2, x[2], x[4]), S::fnma(a2, x[1], x[3]));
            o[3] = S::fma(b, odd, even);
            o[4] = S::fnma(b, odd, even);
            o[5] = S::fma(product, x[1], S::fnma(sum, x[3], x[5]));
        }
        o
    }
    #[inline(always)]
    unsafe fn at<S: Simd>(m: &Axial<S::V>) -> Axial<S::V> {
        let mut o = *m;
        // SAFETY: the caller's promise.
        unsafe {
            let (s1, d1) = (S::add(m[1], m[2]), S::sub(m[1], m[2]));
            let (s2, d2) = (S::add(m[3], m[4]), S::sub(m[3], m[4]));
            o[0] = S::add(m[0], S::add(s1, s2));
            o[1] = S::fma(S::splat(B), d2, S::mul(S::splat(A), d1));
            o[2] = S::fma(S::splat(B * B), s2, S::mul(S::splat(A * A), s1));
            o[3] = S::fma(S::splat(B * B * B), d2, S::fma(S::splat(A * A * A), d1, m[5]));
        }
        o
    }
}

/// Stride 2, two outputs: F(2, 2) on the odd inputs, products with the even ones.
#[derive(Clone, Copy, Debug)]
pub struct Poly2;

impl Axis for Poly2 {
    const M: usize = 2;
    const T: usize = 5;
    const STEP: usize = 4;
    const U: usize = 4;
    fn weight_of(t: usize) -> usize {
        t.min(3)
    }
    fn g([w0, w1, w2]: [f64; 3]) -> [f64; MAX_T] {
        [w0, w0 + w2, w2, w1, 0.0, 0.0, 0.0, 0.0, 0.0]
    }
    #[inline(always)]
    unsafe fn bt<S: Simd>(x: &Axial<S::V>) -> Axial<S::V> {
        let mut o = *x;
        // SAFETY: the caller's promise.
        unsafe {
            o[0] = S::sub(x[0], x[2]);
            o[1] = x[2];
            o[2] = S::sub(x[4], x[2]);
        }
        o[3] = x[1];
        o[4] = x[3];
        o
    }
    #[inline(always)]
    unsafe fn at<S: Simd>(m: &Axial<S::V>) -> Axial<S::V> {
        let mut o = *m;
        // SAFETY: the caller's promise.
        unsafe {
            o[0] = S::add(S::add(m[0], m[1]), m[3]);
            o[1] = S::add(S::add(m[1], m[2]), m[4]);
        }
        o
    }
}

/// Stride 2, four outputs: F(4, 2) with the points +-5/8, +-3/2, infinity on the odd inputs, products with the even ones.
#[derive(Clone, Copy, Debug)]
pub struct Poly4;

impl Axis for Poly4 {
    const M: usize = 4;
    const T: usize = 9;
    const STEP: usize = 8;
    const U: usize = 6;
    fn weight_of(t: usize) -> usize {
        t.min(5)
    }
    fn g([w0, w1, w2]: [f64; 3]) -> [f64; MAX_T] {
        let (a, b) = (f64::from(A), f64::from(B));
        let at = |p: f64, n: f64| (w0 + p * w2) / n;
        let (na, nb) = (2.0 * a * (a * a - b * b), 2.0 * b * (b * b - a * a));
        [at(a, na), at(-a, -na), at(b, nb), at(-b, -nb), w2, w1, 0.0, 0.0, 0.0]
    }
    #[inline(always)]
    unsafe fn bt<S: Simd>(x: &Axial<S::V>) -> Axial<S::V> {
        let mut o = *x;
        // SAFETY: the caller's promise.
        unsafe {
            let (a, b) = (S::splat(A), S::splat(B));
            let (a2, b2) = (S::splat(A * A), S::splat(B * B));
            // the odd inputs in sequence are x[0], x[2], x[4], x[6], x[8]
            let (even, odd) = (S::fnma(b2, x[2], x[6]), S::fnma(b2, x[0], x[4]));
            o[0] = S::fma(a, odd, even);
            o[1] = S::fnma(a, odd, even);
            let (even, odd) = (S::fnma(a2, x[2], x[6]), S::fnma(a2, x[0], x[4]));
            o[2] = S::fma(b, odd, even);
            o[3] = S::fnma(b, odd, even);
            let (product, sum) = (S::splat(A * A * B * B), S::splat(A * A + B * B));
            o[4] = S::fma(product, x[0], S::fnma(sum, x[4], x[8]));
        }
        o[5] = x[1];
        o[6] = x[3];
        o[7] = x[5];
        o[8] = x[7];
        o
    }
    #[inline(always)]
    unsafe fn at<S: Simd>(m: &Axial<S::V>) -> Axial<S::V> {
        let mut o = *m;
        // SAFETY: the caller's promise.
        unsafe {
            let (s1, d1) = (S::add(m[0], m[1]), S::sub(m[0], m[1]));
            let (s2, d2) = (S::add(m[2], m[3]), S::sub(m[2], m[3]));
            o[0] = S::add(m[5], S::add(s1, s2));
            o[1] = S::fma(S::splat(B), d2, S::fma(S::splat(A), d1, m[6]));
            o[2] = S::fma(S::splat(B * B), s2, S::fma(S::splat(A * A), s1, m[7]));
            o[3] = S::fma(S::splat(B * B * B), d2, S::fma(S::splat(A * A * A), d1, S::add(m[4], m[8])));
        }
        o
    }
}

/// Where one row of tiles of one block of sixteen channels is read and its transforms go.
#[derive(Clone, Copy, Debug)]
pub struct InputRow {
    /// The first input voxel of the first tile.
    pub x: *const f32,
    /// Floats from plane to plane of `x`.
    pub plane: usize,
    /// Floats from row to row of `x`.
    pub row: usize,
    /// Frequency 0 of the first tile.
    pub v: *mut f32,
    /// Floats from frequency to frequency of `v`.
    pub frequency: usize,
    /// Floats from tile to tile of `v`.
    pub tile: usize,
    /// Tiles.
    pub tiles: usize,
}

#[repr(C, align(64))]
struct Scratch<const N: usize>([[f32; LANES]; N]);

impl<const N: usize> Scratch<N> {
    #[inline(always)]
    fn uninit() -> std::mem::MaybeUninit<Self> {
        std::mem::MaybeUninit::uninit()
    }
}

/// B^T along D and H of one column of voxels: T_d x T_h vectors to `to`.
///
/// # Safety
/// As [`input_row`]; `to` and `tmp` are valid for `COLUMN` vectors.
#[inline(always)]
unsafe fn column<S: Simd, D: Axis, H: Axis>(p: &InputRow, x: *const f32, to: *mut f32, tmp: *mut f32) {
    // SAFETY: T_d x T_h <= COLUMN vectors of `to` and `tmp` are used; of `x` those that `input_row`'s caller promises.
    unsafe {
        let zero = S::splat(0.0);
        for y in 0..H::T {
            let mut a = [zero; MAX_T];
            for (d, a) in a.iter_mut().enumerate().take(D::T) {
                *a = S::load(x.add(d * p.plane + y * p.row));
            }
            let o = D::bt::<S>(&a);
            for (d, o) in o.iter().enumerate().take(D::T) {
                S::store(tmp.add((d * H::T + y) * LANES), *o);
            }
        }
        for d in 0..D::T {
            let mut a = [zero; MAX_T];
            for (y, a) in a.iter_mut().enumerate().take(H::T) {
                *a = S::load(tmp.add((d * H::T + y) * LANES));
            }
            let o = H::bt::<S>(&a);
            for (y, o) in o.iter().enumerate().take(H::T) {
                S::store(to.add((d * H::T + y) * LANES), *o);
            }
        }
    }
}

/// V of one row of tiles and one block of channels.
///
/// # Safety
/// The processor has the instructions of `S`. `x` is valid for reads of T_d planes x T_h rows x
/// `(tiles - 1) * STEP + T_w` voxels of sixteen floats with the given distances; `v` for writes of sixteen floats at
/// `f * frequency + t * tile` for each of the T_d T_h T_w frequencies and each tile; they do not overlap.
#[inline(always)]
pub unsafe fn input_row<S: Simd, D: Axis, H: Axis, W: Axis>(p: &InputRow) {
    let mut columns = Scratch::<{ COLUMN * MAX_T }>::uninit();
    let mut tmp = Scratch::<COLUMN>::uninit();
    let (columns, tmp) = (columns.as_mut_ptr().cast::<f32>(), tmp.as_mut_ptr().cast::<f32>());
    let mut slots: [usize; MAX_T] = std::array::from_fn(|i| i);
    let overlap = W::T - W::STEP;
    // SAFETY: voxels read and vectors written are those of the contract; slots are below T_w <= MAX_T, a slot holds
    // COLUMN vectors, and each is filled by `column` before it is read: the first `overlap` slots of a tile are the
    // last of the one before (for the first tile: filled here), the others are filled in the loop.
    unsafe {
        let zero = S::splat(0.0);
        for i in 0..overlap {
            column::<S, D, H>(p, p.x.add(i * LANES), columns.add((W::STEP + i) * COLUMN * LANES), tmp);
        }
        for t in 0..p.tiles {
            let old = slots;
            for i in 0..W::T {
                slots[i] = old[(i + W::STEP) % W::T];
            }
            for (i, slot) in slots.iter().enumerate().take(W::T).skip(overlap) {
                let x = p.x.add((t * W::STEP + i) * LANES);
                column::<S, D, H>(p, x, columns.add(slot * COLUMN * LANES), tmp);
            }
            let v = p.v.add(t * p.tile);
            for f in 0..D::T * H::T {
                let mut a = [zero; MAX_T];
                for (a, slot) in a.iter_mut().zip(&slots).take(W::T) {
                    *a = S::load(columns.add((slot * COLUMN + f) * LANES));
                }
                let o = W::bt::<S>(&a);
                for (i, o) in o.iter().enumerate().take(W::T) {
                    S::store(v.add((f * W::T + i) * p.frequency), *o);
                }
            }
        }
    }
}

/// Where the products of one row of tiles and one block of sixteen output channels lie and their outputs go.
#[derive(Clone, Copy, Debug)]
pub struct OutputRow {
    /// Frequency 0 of the first tile.
    pub m: *const f32,
    /// Floats from frequency to frequency of `m`.
    pub frequency: usize,
    /// Floats from tile to tile of `m`.
    pub tile: usize,
    /// Tiles.
    pub tiles: usize,
    /// The first output voxel of the first tile.
    pub y: *mut f32,
    /// Floats from plane to plane of `y`.
    pub plane: usize,
    /// Floats from row to row of `y`.
    pub row: usize,
    /// Outputs that exist of this row of tiles: planes and rows, at most M, and voxels along the whole row.
    pub valid: [usize; 3],
    /// Sixteen biases.
    pub bias: *const f32,
    /// Whether negative outputs become zero.
    pub relu: bool,
    /// Whether to write past the caches; then `y` and the distances are multiples of 64 bytes.
    pub stream: bool,
    /// Sixteen sums over the row's outputs for each valid plane, or null.
    pub sums: *mut f32,
}

/// A^T of one row of tiles and one block of output channels, with bias and ReLU.
///
/// # Safety
/// The processor has the instructions of `S`. `m` is valid for reads of sixteen floats at `f * frequency + t * tile`
/// for each frequency and tile; `y` for writes of the valid planes, rows and voxels; `bias` for sixteen floats; `sums`
/// is null or valid for `valid[0]` vectors. The places written overlap nothing else.
#[inline(always)]
pub unsafe fn output_row<S: Simd, D: Axis, H: Axis, W: Axis>(p: &OutputRow) {
    let mut after_w = Scratch::<{ COLUMN * MAX_M }>::uninit();
    let mut after_h = Scratch::<{ MAX_T * MAX_M * MAX_M }>::uninit();
    let (after_w, after_h) = (after_w.as_mut_ptr().cast::<f32>(), after_h.as_mut_ptr().cast::<f32>());
    let [planes, rows, width] = p.valid;
    // SAFETY: what is read and written outside the scratch is what the contract allows: tiles below `tiles`, planes,
    // rows and voxels below `valid`. Scratch is written for all indices below T and M before it is read.
    unsafe {
        let zero = S::splat(0.0);
        let bias = S::load(p.bias);
        let floor = S::splat(if p.relu { 0.0 } else { f32::NEG_INFINITY });
        let mut sums = [zero; MAX_M];
        for t in 0..p.tiles {
            let m = p.m.add(t * p.tile);
            for f in 0..D::T * H::T {
                let mut a = [zero; MAX_T];
                for (i, a) in a.iter_mut().enumerate().take(W::T) {
                    *a = S::load(m.add((f * W::T + i) * p.frequency));
                }
                let o = W::at::<S>(&a);
                for (i, o) in o.iter().enumerate().take(W::M) {
                    S::store(after_w.add((f * W::M + i) * LANES), *o);
                }
            }
            for d in 0..D::T {
                for w in 0..W::M {
                    let mut a = [zero; MAX_T];
                    for (h, a) in a.iter_mut().enumerate().take(H::T) {
                        *a = S::load(after_w.add(((d * H::T + h) * W::M + w) * LANES));
                    }
                    let o = H::at::<S>(&a);
                    for (h, o) in o.iter().enumerate().take(H::M) {
                        S::store(after_h.add(((d * H::M + h) * W::M + w) * LANES), *o);
                    }
                }
            }
            let y = p.y.add(t * W::M * LANES);
            let voxels = W::M.min(width - t * W::M);
            for h in 0..rows {
                for w in 0..voxels {
                    let mut a = [zero; MAX_T];
                    for (d, a) in a.iter_mut().enumerate().take(D::T) {
                        *a = S::load(after_h.add(((d * H::M + h) * W::M + w) * LANES));
                    }
                    let o = D::at::<S>(&a);
                    for d in 0..D::M {
                        if d < planes {
                            let v = S::max(floor, S::add(o[d], bias));
                            sums[d] = S::add(sums[d], v);
                            let to = y.add(d * p.plane + h * p.row + w * LANES);
                            if p.stream { S::stream(to, v) } else { S::store(to, v) }
                        }
                    }
                }
            }
        }
        if !p.sums.is_null() {
            for (d, sum) in sums.iter().enumerate().take(planes) {
                S::store(p.sums.add(d * LANES), *sum);
            }
        }
        if p.stream {
            S::fence();
        }
    }
}

/// U of one 3x3x3 kernel, `w[kd][kh][kw]`: U_d x U_h x U_w values to `out`.
///
/// # Panics
/// If `out` is shorter.
pub fn kernel_transform<D: Axis, H: Axis, W: Axis>(w: &[f64; 27], out: &mut [f64]) {
    let mut along_d = [[0.0; 9]; MAX_T];
    for k in 0..9 {
        let g = D::g([w[k], w[9 + k], w[18 + k]]);
        for (to, g) in along_d.iter_mut().zip(g).take(D::U) {
            to[k] = g;
        }
    }
    for (d, plane) in along_d.iter().enumerate().take(D::U) {
        let mut along_h = [[0.0; 3]; MAX_T];
        for k in 0..3 {
            let g = H::g([plane[k], plane[3 + k], plane[6 + k]]);
            for (to, g) in along_h.iter_mut().zip(g).take(H::U) {
                to[k] = g;
            }
        }
        for (h, row) in along_h.iter().enumerate().take(H::U) {
            let g = W::g(*row);
            let at = (d * H::U + h) * W::U;
            out[at..at + W::U].copy_from_slice(&g[..W::U]);
        }
    }
}

/// Which of the U_d U_h U_w transformed kernels each of the T_d T_h T_w products takes.
pub fn weight_map<D: Axis, H: Axis, W: Axis>() -> Vec<u16> {
    let mut map = Vec::with_capacity(D::T * H::T * W::T);
    for d in 0..D::T {
        for h in 0..H::T {
            for w in 0..W::T {
                map.push(((D::weight_of(d) * H::U + H::weight_of(h)) * W::U + W::weight_of(w)) as u16);
            }
        }
    }
    map
}
