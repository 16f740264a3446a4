//! Three-dimensional Winograd convolution, 3x3x3 kernels, stride 1 and 2.
//!
//! ```text
//! for each block of strips (a strip: tiles beside each other along W, a tile: a box of M_d x M_h x M_w outputs):
//!     columns:  C[f][x][ci] = B^T along D and H of each voxel the strip reads                T_d x T_h transforms f
//!     middle, for each f:
//!         V[w][t][ci] = B^T along W of C[f]                                                  T_w frequencies w
//!         M[w][t][co] = sum over ci of V[w][t][ci] * U[f][w][ci][co], one panel of co after the other    matrix::product
//!         C[f][x][co] = A^T along W of M, in the place of what was read
//!     outputs:  y = A^T along H and D of C, + bias, ReLU, sums
//! U = G w along D, H, W                            kernel_transform, once; or without W, or without H and W, see Kept
//! ```
//!
//! One axis computes M outputs of a 3-tap correlation from T inputs with T products instead of 3 M ([`Axis`]); axes
//! nest. F(4,3) takes the points 0, +-5/8, +-3/2 and infinity: on random data of 64 channels its relative rms error in
//! three dimensions is 1.4e-6, that of the customary 0, +-1, +-2 is 4.6e-6, and all its constants are exact in f32. F(6,3), with
//! +-1/2, +-1, +-2, is taken along H alone: 2.4 times the error of F(4,4,4).
//!
//! **Stride 2** ([`Poly4`], [`Poly2`]): output o reads the inputs 2o-1, 2o, 2o+1. The odd ones are a 2-tap correlation,
//! done by F(4,2) with the points +-5/8, +-3/2 (infinity included), the even ones a product each; both are rows of one
//! transform, so that the same three passes serve. M = 4 takes 5 + 4 products where 12 were needed.
//!
//! Multiplications an output, one channel pair: direct 27; F(4,6,4) 3; F(4,4,4) 3.375; F(2,4,4) 4.5; F(2,2,2) 8; stride 2
//! with M = 4 11.4, with M = 2 15.6.
//!
//! **Tricks.** Only C has to hold all transforms: V and M are those of one f, some 30 KB, and C takes its results in place,
//! so that stores find their lines in the second-level cache (a store that misses it costs some 20 cycles, and V and M of
//! a whole tile were 216 of them). Voxels are transformed along D and H once and shared by the tiles that overlap along
//! W. The distance of two transforms is an odd number of cache lines, so that lines of a voxel fall into different sets.
//! Deep layers have few tiles for their weights: there U is kept without W or without H and W and completed in the
//! second-level cache for each f, which costs a tenth of the products and saves half or three quarters of the bytes.
//! While products are computed, weights and the next block's inputs are asked for. Large outputs go past the caches.
//!
//! **Arithmetic** of one tile and sixteen channels in F(4,4,4): columns 288 multiply-adds, 288 loads, 288 stores; along W
//! 432, 216, 216; back 360, 216, 144 and 240 + 160, 144 + 96, 96 + 64. The products of 64 -> 64 channels take 55,296
//! vector multiply-adds a tile.
//!
//! **Error.** Rounding is relative to what is rounded, so with |.| taken of all matrices and data
//! `|y' - y| <= k u A|.| (sum over ci of G|w| * B|x|)`, u = 2^-24, where k counts the roundings that one term may pass:
//! per axis at most 4 in B^T and 6 in A^T (twice that without FMA), 1 for U, one a channel in the sum, and 2 for bias
//! and store: k = c_in + 3 (4 + 6) + 3, doubled without FMA. Weights completed each time pass 4 more roundings an axis.
//! The property test computes this bound for each case.
//!
//! Deliberately absent: padding (tensors carry zero borders), any knowledge of layers.
#![allow(unsafe_code)]

use std::ops::Range;

use super::matrix::Product;
use super::simd::{LANES, Simd};

/// Most inputs of an axis.
pub const MAX_T: usize = 9;
/// Most frequencies of a tile.
pub const MAX_FREQUENCIES: usize = MAX_T * MAX_T * MAX_T;
/// Vectors of a column of the largest axes.
const COLUMN: usize = MAX_T * MAX_T;
/// Most outputs of an axis.
pub const MAX_M: usize = 6;

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
    /// G in f32, for weights that are kept without it.
    ///
    /// # Safety
    /// As [`Axis::bt`].
    unsafe fn expand<S: Simd>(w: &[S::V; 3]) -> Axial<S::V>;
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
    #[inline(always)]
    unsafe fn expand<S: Simd>(w: &[S::V; 3]) -> Axial<S::V> {
        // SAFETY: the caller's promise.
        unsafe {
            let zero = S::splat(0.0);
            let half = S::splat(0.5);
            let even = S::mul(half, S::add(w[0], w[2]));
            [
                S::sub(zero, w[0]),
                S::fma(half, w[1], even),
                S::fnma(half, w[1], even),
                w[2],
                zero,
                zero,
                zero,
                zero,
                zero,
            ]
        }
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
    #[inline(always)]
    unsafe fn expand<S: Simd>(w: &[S::V; 3]) -> Axial<S::V> {
        // SAFETY: the caller's promise.
        unsafe {
            let zero = S::splat(0.0);
            let mut o = [S::mul(S::splat(1.0 / (A * A * B * B)), w[0]), zero, zero, zero, zero, w[2], zero, zero, zero];
            for (i, p, q) in [(1, A, B), (3, B, A)] {
                let n = 2.0 * p * p * (p * p - q * q);
                let even = S::fma(S::splat(p * p / n), w[2], S::mul(S::splat(1.0 / n), w[0]));
                o[i] = S::fma(S::splat(p / n), w[1], even);
                o[i + 1] = S::fnma(S::splat(p / n), w[1], even);
            }
            o
        }
    }
}

/// The points of F(6, 3): +-1/2, +-1, +-2.
const POINTS: [f32; 3] = [0.5, 1.0, 2.0];
/// The sum of two points' squares and their product, for those that are not the first, the second, the third.
const OTHERS: [[f32; 2]; 3] = [[5.0, 4.0], [4.25, 1.0], [1.25, 0.25]];

/// F(6, 3): points 0, +-1/2, +-1, +-2, infinity.
#[derive(Clone, Copy, Debug)]
pub struct Six;

impl Axis for Six {
    const M: usize = 6;
    const T: usize = 8;
    const STEP: usize = 6;
    const U: usize = 8;
    fn weight_of(t: usize) -> usize {
        t
    }
    fn g([w0, w1, w2]: [f64; 3]) -> [f64; MAX_T] {
        let mut g = [-w0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, w2, 0.0];
        for (i, (p, [sum, product])) in POINTS.into_iter().zip(OTHERS).enumerate() {
            let (p, square) = (f64::from(p), f64::from(p * p));
            let n = 2.0 * square * (square * square - f64::from(sum) * square + f64::from(product));
            g[1 + 2 * i] = (w0 + p * w1 + square * w2) / n;
            g[2 + 2 * i] = (w0 - p * w1 + square * w2) / n;
        }
        g
    }
    #[inline(always)]
    unsafe fn bt<S: Simd>(x: &Axial<S::V>) -> Axial<S::V> {
        let mut o = *x;
        // SAFETY: the caller's promise.
        unsafe {
            let all = S::splat(5.25);
            o[0] = S::fma(all, S::sub(x[2], x[4]), S::sub(x[6], x[0]));
            for (i, (p, [sum, product])) in POINTS.into_iter().zip(OTHERS).enumerate() {
                let (sum, product) = (S::splat(sum), S::splat(product));
                let even = S::fma(product, x[2], S::fnma(sum, x[4], x[6]));
                let odd = S::fma(product, x[1], S::fnma(sum, x[3], x[5]));
                o[1 + 2 * i] = S::fma(S::splat(p), odd, even);
                o[2 + 2 * i] = S::fnma(S::splat(p), odd, even);
            }
            o[7] = S::fma(all, S::sub(x[3], x[5]), S::sub(x[7], x[1]));
        }
        o
    }
    #[inline(always)]
    unsafe fn at<S: Simd>(m: &Axial<S::V>) -> Axial<S::V> {
        let mut o = *m;
        // SAFETY: the caller's promise.
        unsafe {
            let pair = |i: usize| (S::add(m[1 + 2 * i], m[2 + 2 * i]), S::sub(m[1 + 2 * i], m[2 + 2 * i]));
            let [(s0, d0), (s1, d1), (s2, d2)] = [pair(0), pair(1), pair(2)];
            let (half, quarter, eighth) = (S::splat(0.5), S::splat(0.25), S::splat(0.125));
            o[0] = S::add(S::add(m[0], s0), S::add(s1, s2));
            o[1] = S::fma(S::splat(2.0), d2, S::fma(half, d0, d1));
            o[2] = S::fma(S::splat(4.0), s2, S::fma(quarter, s0, s1));
            o[3] = S::fma(S::splat(8.0), d2, S::fma(eighth, d0, d1));
            o[4] = S::fma(S::splat(16.0), s2, S::fma(S::splat(0.0625), s0, s1));
            o[5] = S::fma(S::splat(32.0), d2, S::fma(S::splat(0.03125), d0, S::add(d1, m[7])));
        }
        o
    }
    #[inline(always)]
    unsafe fn expand<S: Simd>(w: &[S::V; 3]) -> Axial<S::V> {
        // SAFETY: the caller's promise.
        unsafe {
            let zero = S::splat(0.0);
            let mut o = [S::sub(zero, w[0]), zero, zero, zero, zero, zero, zero, w[2], zero];
            for (i, (p, [sum, product])) in POINTS.into_iter().zip(OTHERS).enumerate() {
                let n = 2.0 * p * p * (p * p * p * p - sum * p * p + product);
                let even = S::fma(S::splat(p * p / n), w[2], S::mul(S::splat(1.0 / n), w[0]));
                o[1 + 2 * i] = S::fma(S::splat(p / n), w[1], even);
                o[2 + 2 * i] = S::fnma(S::splat(p / n), w[1], even);
            }
            o
        }
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
    #[inline(always)]
    unsafe fn expand<S: Simd>(w: &[S::V; 3]) -> Axial<S::V> {
        // SAFETY: the caller's promise.
        unsafe {
            let zero = S::splat(0.0);
            [w[0], S::add(w[0], w[2]), w[2], w[1], zero, zero, zero, zero, zero]
        }
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
    #[inline(always)]
    unsafe fn expand<S: Simd>(w: &[S::V; 3]) -> Axial<S::V> {
        // SAFETY: the caller's promise.
        unsafe {
            let zero = S::splat(0.0);
            let mut o = [zero, zero, zero, zero, w[2], w[1], zero, zero, zero];
            for (i, p, q) in [(0, A, B), (2, B, A)] {
                let n = 2.0 * p * (p * p - q * q);
                let odd = S::mul(S::splat(p / n), w[2]);
                o[i] = S::fma(S::splat(1.0 / n), w[0], odd);
                o[i + 1] = S::fnma(S::splat(1.0 / n), w[0], odd);
            }
            o
        }
    }
}

/// Where the voxels of one strip of tiles and one block of sixteen channels are read and their transforms go.
#[derive(Clone, Copy, Debug)]
pub struct Columns {
    /// The first input voxel of the first tile.
    pub x: *const f32,
    /// Floats from plane to plane of `x`.
    pub plane: usize,
    /// Floats from row to row of `x`.
    pub row: usize,
    /// The first voxel of the first of T_d x T_h transforms.
    pub to: *mut f32,
    /// Floats from one transform to the next.
    pub stride: usize,
    /// Voxels along W that the strip's tiles read.
    pub voxels: usize,
}

#[repr(C, align(64))]
struct Scratch<const N: usize>([[f32; LANES]; N]);

impl<const N: usize> Scratch<N> {
    #[inline(always)]
    fn uninit() -> std::mem::MaybeUninit<Self> {
        std::mem::MaybeUninit::uninit()
    }
}

/// Voxels that the transform along D and H asks for its inputs ahead.
const VOXELS_AHEAD: usize = 8;

/// B^T along D and H of each voxel of a strip and one block of channels.
///
/// # Safety
/// The processor has the instructions of `S`. `x` is valid for reads of T_d planes x T_h rows x `voxels` voxels of sixteen
/// floats with the given distances; `to` for writes of `voxels` vectors at `f * stride` for each f below T_d T_h; they do
/// not overlap.
#[inline(always)]
pub unsafe fn columns<S: Simd, D: Axis, H: Axis>(p: &Columns) {
    let mut tmp = Scratch::<COLUMN>::uninit();
    let tmp = tmp.as_mut_ptr().cast::<f32>();
    // SAFETY: T_d x T_h <= COLUMN vectors of `tmp` are written before they are read; the rest is the caller's promise.
    unsafe {
        let zero = S::splat(0.0);
        for i in 0..p.voxels {
            let x = p.x.add(i * LANES);
            let to = p.to.add(i * LANES);
            for y in 0..H::T {
                let mut a = [zero; MAX_T];
                for (d, a) in a.iter_mut().enumerate().take(D::T) {
                    let from = x.add(d * p.plane + y * p.row);
                    *a = S::load(from);
                    S::prefetch(from.wrapping_add(VOXELS_AHEAD * LANES));
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
                    S::store(to.add((d * H::T + y) * p.stride), *o);
                }
            }
        }
    }
}

/// How the transformed weights of a convolution are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kept {
    /// Transformed along all axes: U_d U_h U_w values a pair of channels.
    Whole,
    /// Without W: U_d U_h 3 values; G along W is done each time.
    Rows,
    /// Without H and W: U_d 9 values.
    Planes,
}

impl Kept {
    /// Every one, largest first.
    pub const ALL: [Self; 3] = [Self::Whole, Self::Rows, Self::Planes];
}

/// Inputs that are asked for before they are read: rows of voxels, a few lines during each product.
#[derive(Clone, Copy, Debug)]
pub struct Next {
    /// The first voxel.
    pub x: *const f32,
    /// Blocks of channels, planes and rows.
    pub extent: [usize; 3],
    /// Floats from one to the next of each.
    pub steps: [usize; 3],
    /// Voxels of a row, or none to ask for nothing.
    pub voxels: usize,
    /// Products that there are in all, and those before these.
    pub products: [usize; 2],
}

impl Next {
    /// What product `index` of these asks for: the first voxel, and how many.
    fn part(&self, index: usize) -> (*const f32, usize) {
        let [blocks, planes, rows] = self.extent;
        // equal parts of each row of voxels
        let parts = (self.products[0] / (blocks * planes * rows).max(1)).max(1);
        let (row, part) = ((self.products[1] + index) / parts, (self.products[1] + index) % parts);
        if row >= blocks * planes * rows {
            return (self.x, 0);
        }
        let at = [row / (planes * rows), row / rows % planes, row % rows];
        let offset: usize = at.iter().zip(self.steps).map(|(i, step)| i * step).sum();
        let (first, end) = (part * self.voxels / parts, (part + 1) * self.voxels / parts);
        (self.x.wrapping_add(offset + first * LANES), end - first)
    }
}

/// All that lies between [`columns`] and [`outputs`], for one of the T_d T_h transforms of a block of strips.
#[derive(Clone, Copy, Debug)]
pub struct Middle {
    /// `[strip][block of input channels][voxel][16]`; becomes `[strip][block of output channels][output][16]`.
    pub columns: *mut f32,
    /// Floats from strip to strip of `columns`.
    pub strip: usize,
    /// Strips.
    pub strips: usize,
    /// Tiles of a strip.
    pub tiles: usize,
    /// Blocks of input and of output channels.
    pub blocks: [usize; 2],
    /// Strips whose tiles are multiplied together.
    pub together: usize,
    /// Room for V: [`v_len`] floats.
    pub v: *mut f32,
    /// Room for M: [`m_len`] floats.
    pub m: *mut f32,
    /// Room for a panel of weights, U_w x input channels x `S::PANEL` vectors, unless they are kept whole.
    pub u: *mut f32,
    /// The weights: panels of `S::PANEL` vectors (the last may have fewer), each `[w][input channel][vector][16]` where w
    /// counts U_w transforms, 3 taps, or 3 x 3 taps of H and W.
    pub weights: *const f32,
    /// How they are kept.
    pub kept: Kept,
    /// The row of G along H, where they are kept without it.
    pub mix: [f32; 3],
    /// What is asked for meanwhile.
    pub next: Next,
    /// [`super::matrix::product`], compiled once.
    pub product: unsafe fn(&Product),
}

/// Floats between two frequencies: an odd number of cache lines.
pub const fn odd_lines(lines: usize) -> usize {
    (lines | 1) * LANES
}

/// Floats of V for `tiles` tiles in groups of `rows`, with `frequencies` along W.
pub const fn v_len(tiles: usize, rows: usize, blocks: usize, frequencies: usize) -> usize {
    frequencies * odd_lines(tiles.div_ceil(rows) * rows * blocks)
}

/// Floats of M for panels of `vectors` vectors.
pub const fn m_len(tiles: usize, rows: usize, vectors: usize, frequencies: usize) -> usize {
    frequencies * odd_lines(tiles.div_ceil(rows) * rows * vectors)
}

/// B^T along W, the products, A^T along W.
///
/// # Safety
/// The processor has the instructions of `S`; the pointers of `p` are valid as its fields say, and what is written
/// overlaps nothing else.
#[inline(always)]
pub unsafe fn middle<S: Simd, W: Axis>(p: &Middle) {
    let [c_in, c_out] = p.blocks;
    let voxels = (p.tiles - 1) * W::STEP + W::T;
    let panels = c_out.div_ceil(S::PANEL);
    let mut first = 0;
    while first < p.strips {
        let strips = p.together.min(p.strips - first);
        let tiles = strips * p.tiles;
        let groups = tiles.div_ceil(S::ROWS);
        // groups of equal size: the last one's few tiles would not keep the multiply-adds busy
        let (size, slots) = (tiles.div_ceil(groups), groups * S::ROWS);
        let v_stride = odd_lines(slots * c_in);
        // SAFETY: the caller's promise; indices are below the extents of the fields.
        unsafe {
            for strip in 0..strips {
                for block in 0..c_in {
                    let from = p.columns.add((first + strip) * p.strip + block * voxels * LANES);
                    let v = p.v.add(block * S::ROWS * LANES);
                    along_in::<S, W>(from, v, v_stride, strip * p.tiles..(strip + 1) * p.tiles, size, c_in);
                }
            }
            for panel in 0..panels {
                let vectors = S::PANEL.min(c_out - panel * S::PANEL);
                let channel = c_in * LANES * vectors * LANES;
                let kept = match p.kept {
                    Kept::Whole => W::U,
                    Kept::Rows => 3,
                    Kept::Planes => 9,
                };
                let weights = p.weights.add(panel * S::PANEL * LANES * c_in * LANES * kept);
                let mut u = weights;
                if p.kept != Kept::Whole {
                    expand::<S, W>(weights, p.u, channel / LANES, p.kept == Kept::Planes, p.mix);
                    u = p.u;
                }
                // Kept whole, the next transform is asked for; otherwise the next panel, all in the first products.
                let mut lines = kept * channel / LANES;
                let mut ahead = weights.wrapping_add(kept * channel);
                let m_stride = odd_lines(slots * vectors);
                for w in 0..W::T {
                    let at = W::weight_of(w) * channel;
                    let asked = if p.kept == Kept::Whole {
                        ahead = weights.wrapping_add(at + channel);
                        if w > 0 && W::weight_of(w - 1) == W::weight_of(w) { 0 } else { channel / LANES }
                    } else {
                        lines.min(channel / LANES)
                    };
                    let (next, next_lines) = p.next.part(panel * W::T + w);
                    (p.product)(&Product {
                        tiles,
                        size,
                        blocks: c_in,
                        vectors,
                        v: p.v.add(w * v_stride),
                        u: u.add(at),
                        m: p.m.add(w * m_stride),
                        ahead,
                        lines: asked,
                        next,
                        next_lines,
                    });
                    lines -= asked.min(lines);
                    ahead = ahead.wrapping_add(asked * LANES);
                }
                for strip in 0..strips {
                    for vector in 0..vectors {
                        let block = panel * S::PANEL + vector;
                        let to = p.columns.add((first + strip) * p.strip + block * p.tiles * W::M * LANES);
                        let tiles = strip * p.tiles..(strip + 1) * p.tiles;
                        along_out::<S, W>(p.m.add(vector * LANES), m_stride, vectors, to, tiles, size);
                    }
                }
            }
        }
        first += strips;
    }
}

/// Tiles that the transforms along W ask ahead for what they will write: a store waits for a line that is not there.
const TILES_AHEAD: usize = 4;

/// B^T along W of the tiles of one strip and block of channels, `tiles` of V, in groups of `size`.
///
/// # Safety
/// As [`middle`].
#[inline(always)]
unsafe fn along_in<S: Simd, W: Axis>(
    from: *const f32,
    v: *mut f32,
    stride: usize,
    tiles: Range<usize>,
    size: usize,
    blocks: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let (mut group, mut row) = (tiles.start / size, tiles.start % size);
        for t in 0..tiles.len() {
            let mut a = [S::splat(0.0); MAX_T];
            for (i, a) in a.iter_mut().enumerate().take(W::T) {
                *a = S::load(from.add((t * W::STEP + i) * LANES));
            }
            let o = W::bt::<S>(&a);
            let to = v.add((group * blocks * S::ROWS + row) * LANES);
            (group, row) = if row + 1 == size { (group + 1, 0) } else { (group, row + 1) };
            for (i, o) in o.iter().enumerate().take(W::T) {
                let to = to.add(i * stride);
                S::store(to, *o);
                S::prefetch_near(to.wrapping_add(TILES_AHEAD * LANES));
            }
        }
    }
}

/// A^T along W of the tiles of one strip and block of channels, `tiles` of M, in groups of `size`.
///
/// # Safety
/// As [`middle`].
#[inline(always)]
unsafe fn along_out<S: Simd, W: Axis>(
    m: *const f32,
    stride: usize,
    vectors: usize,
    to: *mut f32,
    tiles: Range<usize>,
    size: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let (mut group, mut row) = (tiles.start / size, tiles.start % size);
        for t in 0..tiles.len() {
            let mut a = [S::splat(0.0); MAX_T];
            let m = m.add((group * S::ROWS + row) * vectors * LANES);
            (group, row) = if row + 1 == size { (group + 1, 0) } else { (group, row + 1) };
            for (i, a) in a.iter_mut().enumerate().take(W::T) {
                *a = S::load(m.add(i * stride));
            }
            let o = W::at::<S>(&a);
            for (i, o) in o.iter().enumerate().take(W::M) {
                let to = to.add((t * W::M + i) * LANES);
                S::store(to, *o);
                S::prefetch_near(to.wrapping_add(TILES_AHEAD * W::M * LANES));
            }
        }
    }
}

/// G along W, and along H before it where `planes`, of `count` vectors of weights.
///
/// # Safety
/// As [`middle`]; `from` is valid for 3 (9 with `planes`) x `count` vectors, `to` for U_w x `count`.
#[inline(always)]
unsafe fn expand<S: Simd, W: Axis>(from: *const f32, to: *mut f32, count: usize, planes: bool, mix: [f32; 3]) {
    // SAFETY: the caller's promise.
    unsafe {
        let mix = mix.map(|v| S::splat(v));
        for i in 0..count {
            let tap = |k: usize| S::load(from.add((k * count + i) * LANES));
            let mut w = [S::splat(0.0); 3];
            for (k, w) in w.iter_mut().enumerate() {
                *w = if planes {
                    S::fma(mix[2], tap(6 + k), S::fma(mix[1], tap(3 + k), S::mul(mix[0], tap(k))))
                } else {
                    tap(k)
                };
            }
            let o = W::expand::<S>(&w);
            for (u, o) in o.iter().enumerate().take(W::U) {
                S::store(to.add((u * count + i) * LANES), *o);
            }
        }
    }
}

/// Where the transforms of one strip of tiles and one block of sixteen output channels lie and their outputs go.
#[derive(Clone, Copy, Debug)]
pub struct Outputs {
    /// The first output of the first of T_d x T_h transforms.
    pub from: *const f32,
    /// Floats from one transform to the next.
    pub stride: usize,
    /// The first output voxel.
    pub y: *mut f32,
    /// Floats from plane to plane of `y`.
    pub plane: usize,
    /// Floats from row to row of `y`.
    pub row: usize,
    /// Outputs that exist of this strip: planes and rows, at most M, and voxels along the whole strip.
    pub valid: [usize; 3],
    /// Sixteen biases.
    pub bias: *const f32,
    /// Whether negative outputs become zero.
    pub relu: bool,
    /// Whether to write past the caches; then `y` and the distances are multiples of 64 bytes.
    pub stream: bool,
    /// Sixteen sums over the strip's outputs for each valid plane, or null.
    pub sums: *mut f32,
}

/// A^T along H and D of one strip of tiles and one block of output channels, with bias and ReLU.
///
/// # Safety
/// The processor has the instructions of `S`. `from` is valid for reads of `valid[2]` vectors at `f * stride` for each f
/// below T_d T_h; `y` for writes of the valid planes, rows and voxels; `bias` for sixteen floats; `sums` is null or valid
/// for `valid[0]` vectors. The places written overlap nothing else.
#[inline(always)]
pub unsafe fn outputs<S: Simd, D: Axis, H: Axis>(p: &Outputs) {
    let mut after_h = Scratch::<{ MAX_T * MAX_M }>::uninit();
    let after_h = after_h.as_mut_ptr().cast::<f32>();
    let [planes, rows, width] = p.valid;
    // SAFETY: what is read and written outside the scratch is what the contract allows: planes, rows and voxels below
    // `valid`. Scratch is written for all indices below T and M before it is read.
    unsafe {
        let zero = S::splat(0.0);
        let bias = S::load(p.bias);
        let floor = S::splat(if p.relu { 0.0 } else { f32::NEG_INFINITY });
        let mut sums = [zero; MAX_M];
        for w in 0..width {
            let from = p.from.add(w * LANES);
            for d in 0..D::T {
                let mut a = [zero; MAX_T];
                for (h, a) in a.iter_mut().enumerate().take(H::T) {
                    *a = S::load(from.add((d * H::T + h) * p.stride));
                }
                let o = H::at::<S>(&a);
                for (h, o) in o.iter().enumerate().take(H::M) {
                    S::store(after_h.add((d * H::M + h) * LANES), *o);
                }
            }
            let y = p.y.add(w * LANES);
            for h in 0..rows {
                let mut a = [zero; MAX_T];
                for (d, a) in a.iter_mut().enumerate().take(D::T) {
                    *a = S::load(after_h.add((d * H::M + h) * LANES));
                }
                let o = D::at::<S>(&a);
                for d in 0..D::M {
                    if d < planes {
                        let v = S::max(floor, S::add(o[d], bias));
                        sums[d] = S::add(sums[d], v);
                        let to = y.add(d * p.plane + h * p.row);
                        if p.stream { S::stream(to, v) } else { S::store(to, v) }
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

/// U of one 3x3x3 kernel, `w[kd][kh][kw]`, along the axes that `kept` says: U_d x U_h x U_w, U_d x U_h x 3 or
/// U_d x 3 x 3 values to `out`.
///
/// # Panics
/// If `out` is shorter.
pub fn kernel_transform<D: Axis, H: Axis, W: Axis>(w: &[f64; 27], kept: Kept, out: &mut [f64]) {
    let mut along_d = [[0.0; 9]; MAX_T];
    for k in 0..9 {
        let g = D::g([w[k], w[9 + k], w[18 + k]]);
        for (to, g) in along_d.iter_mut().zip(g).take(D::U) {
            to[k] = g;
        }
    }
    let mut out = out.iter_mut();
    let mut put = |values: &[f64]| values.iter().for_each(|v| *out.next().expect("room for every weight") = *v);
    for plane in along_d.iter().take(D::U) {
        if kept == Kept::Planes {
            put(plane);
            continue;
        }
        let mut along_h = [[0.0; 3]; MAX_T];
        for k in 0..3 {
            let g = H::g([plane[k], plane[3 + k], plane[6 + k]]);
            for (to, g) in along_h.iter_mut().zip(g).take(H::U) {
                to[k] = g;
            }
        }
        for row in along_h.iter().take(H::U) {
            if kept == Kept::Rows { put(row) } else { put(&W::g(*row)[..W::U]) }
        }
    }
}

/// Which transformed weights along D and H each of the T_d x T_h transforms takes.
pub fn weight_rows<D: Axis, H: Axis>() -> Vec<[usize; 2]> {
    (0..D::T * H::T).map(|f| [D::weight_of(f / H::T), H::weight_of(f % H::T)]).collect()
}

/// The row `u` of G, for weights that are kept without it.
pub fn g_row<A: Axis>(u: usize) -> [f32; 3] {
    std::array::from_fn(|k| A::g(std::array::from_fn(|i| f64::from(u8::from(i == k))))[u] as f32)
}
