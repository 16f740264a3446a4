//! Sixteen lanes of f32 on whatever the processor has.
//!
//! Kernels are written once, generic over [`Simd`], and compiled once an instruction set inside a `#[target_feature]`
//! function ([`super::dispatch`]). A vector has sixteen lanes everywhere: one AVX-512 register, two of AVX2, an array
//! otherwise. Layouts are the same for all instruction sets, and so are the numbers but for rounding: without FMA a
//! product is rounded before it is added.
//!
//! Deliberately absent: masks and other widths. Channels are padded to a multiple of [`LANES`] instead.
#![allow(unsafe_code)]
// One contract serves all methods of the trait: it stands there.
#![allow(clippy::missing_safety_doc)]

/// Lanes of a vector.
pub const LANES: usize = 16;

/// Operations on sixteen f32.
///
/// # Safety
/// Every method may only run on a processor with the instruction set of its type. Pointers must be valid for sixteen
/// f32, without any alignment but for `stream`, which needs 64 bytes; `prefetch` and `prefetch_near` take any.
pub trait Simd: Copy + Send + Sync + 'static {
    /// A vector.
    type V: Copy;
    /// Vectors of outputs that a direct convolution holds in registers for each of its six rows.
    const NV: usize;
    /// Vectors of outputs of a panel of transformed weights.
    const PANEL: usize;
    /// Tiles whose products with a panel are held in registers at a time.
    const ROWS: usize;
    /// Sixteen values.
    unsafe fn load(p: *const f32) -> Self::V;
    /// Writes sixteen values.
    unsafe fn store(p: *mut f32, v: Self::V);
    /// Writes sixteen values past the caches, where there is such an instruction.
    unsafe fn stream(p: *mut f32, v: Self::V);
    /// One value in all lanes.
    unsafe fn splat(x: f32) -> Self::V;
    /// `a + b`.
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    /// `a - b`.
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b`.
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `c - a * b`.
    unsafe fn fnma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger of both; `b` where one is not a number.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// Asks for a cache line ahead of its use, into the second level.
    unsafe fn prefetch(p: *const f32);
    /// Asks for a cache line ahead of its use, into the first level.
    unsafe fn prefetch_near(p: *const f32);
    /// Makes streamed values visible to other threads.
    unsafe fn fence();
}

/// Portable: arrays that the compiler may vectorise.
#[derive(Clone, Copy, Debug)]
pub struct Scalar;

macro_rules! lanes {
    (|$i:ident| $value:expr) => {{
        let mut out = [0.0_f32; LANES];
        let mut $i = 0;
        while $i < LANES {
            out[$i] = $value;
            $i += 1;
        }
        out
    }};
}

// SAFETY (all methods): pointers are used only as the trait's contract allows.
impl Simd for Scalar {
    type V = [f32; LANES];
    const NV: usize = 1;
    const PANEL: usize = 1;
    const ROWS: usize = 6;
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::V {
        // SAFETY: the trait's contract; an array of f32 needs no more alignment than one f32.
        unsafe { p.cast::<[f32; LANES]>().read() }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::V) {
        // SAFETY: as above.
        unsafe { p.cast::<[f32; LANES]>().write(v) }
    }
    #[inline(always)]
    unsafe fn stream(p: *mut f32, v: Self::V) {
        // SAFETY: as above.
        unsafe { p.cast::<[f32; LANES]>().write(v) }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        lanes!(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        lanes!(|i| a[i] - b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        lanes!(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        lanes!(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn fnma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        lanes!(|i| c[i] - a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        lanes!(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn prefetch(_: *const f32) {}
    #[inline(always)]
    unsafe fn prefetch_near(_: *const f32) {}
    #[inline(always)]
    unsafe fn fence() {}
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{LANES, Simd};
    use std::arch::x86_64::*;

    const HALF: usize = LANES / 2;

    /// One register of AVX-512F.
    #[derive(Clone, Copy, Debug)]
    pub struct Avx512;

    /// Two registers of AVX2 with FMA.
    #[derive(Clone, Copy, Debug)]
    pub struct Avx2;

    macro_rules! avx512 {
        ($($name:ident($($arg:ident: $type:ty),*) $(-> $out:ty)? = $value:expr;)*) => {$(
            #[inline(always)]
            unsafe fn $name($($arg: $type),*) $(-> $out)? {
                // SAFETY: the trait's contract: AVX-512F is there, pointers are valid for sixteen f32.
                unsafe { $value }
            }
        )*};
    }

    impl Simd for Avx512 {
        type V = __m512;
        const NV: usize = 4;
        const PANEL: usize = 2;
        const ROWS: usize = 14;
        avx512! {
            load(p: *const f32) -> __m512 = _mm512_loadu_ps(p);
            store(p: *mut f32, v: __m512) = _mm512_storeu_ps(p, v);
            stream(p: *mut f32, v: __m512) = _mm512_stream_ps(p, v);
            splat(x: f32) -> __m512 = _mm512_set1_ps(x);
            add(a: __m512, b: __m512) -> __m512 = _mm512_add_ps(a, b);
            sub(a: __m512, b: __m512) -> __m512 = _mm512_sub_ps(a, b);
            mul(a: __m512, b: __m512) -> __m512 = _mm512_mul_ps(a, b);
            fma(a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_fmadd_ps(a, b, c);
            fnma(a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_fnmadd_ps(a, b, c);
            max(a: __m512, b: __m512) -> __m512 = _mm512_max_ps(a, b);
            prefetch(p: *const f32) = _mm_prefetch::<_MM_HINT_T1>(p.cast());
            prefetch_near(p: *const f32) = _mm_prefetch::<_MM_HINT_T0>(p.cast());
            fence() = _mm_sfence();
        }
    }

    macro_rules! avx2 {
        ($($name:ident($($arg:ident: $type:ty),*) $(-> $out:ty)? = $value:expr;)*) => {$(
            #[inline(always)]
            unsafe fn $name($($arg: $type),*) $(-> $out)? {
                // SAFETY: the trait's contract: AVX2 and FMA are there, pointers are valid for sixteen f32.
                unsafe { $value }
            }
        )*};
    }

    type Two = [__m256; 2];

    impl Simd for Avx2 {
        type V = Two;
        const NV: usize = 1;
        const PANEL: usize = 1;
        const ROWS: usize = 6;
        avx2! {
            load(p: *const f32) -> Two = [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(HALF))];
            store(p: *mut f32, v: Two) = {
                _mm256_storeu_ps(p, v[0]);
                _mm256_storeu_ps(p.add(HALF), v[1])
            };
            stream(p: *mut f32, v: Two) = {
                _mm256_stream_ps(p, v[0]);
                _mm256_stream_ps(p.add(HALF), v[1])
            };
            splat(x: f32) -> Two = [_mm256_set1_ps(x); 2];
            add(a: Two, b: Two) -> Two = [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])];
            sub(a: Two, b: Two) -> Two = [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])];
            mul(a: Two, b: Two) -> Two = [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])];
            fma(a: Two, b: Two, c: Two) -> Two =
                [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])];
            fnma(a: Two, b: Two, c: Two) -> Two =
                [_mm256_fnmadd_ps(a[0], b[0], c[0]), _mm256_fnmadd_ps(a[1], b[1], c[1])];
            max(a: Two, b: Two) -> Two = [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])];
            prefetch(p: *const f32) = _mm_prefetch::<_MM_HINT_T1>(p.cast());
            prefetch_near(p: *const f32) = _mm_prefetch::<_MM_HINT_T0>(p.cast());
            fence() = _mm_sfence();
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Avx512};
