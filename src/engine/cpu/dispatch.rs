//! The kernels of one instruction set, chosen once.
//!
//! Input: an [`Isa`] that the processor has. Output: function pointers ([`Kernels`]). Nothing else in the backend knows
//! instruction sets, and nothing but this file names a kernel of one.
#![allow(unsafe_code)]

use std::fmt;

use serde::{Deserialize, Serialize};

use super::matrix::{self, DirectRow, MergeRow, Product};
#[cfg(target_arch = "x86_64")]
use super::simd::{Avx2, Avx512};
use super::simd::{Scalar, Simd};
use super::stem::{self, StemRows};
use super::winograd::{self, Axis, Columns, Four, Kept, Middle, Outputs, Poly2, Poly4, Six, Two};

/// An instruction set with kernels of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Isa {
    /// Whatever the compiler makes of portable code.
    Scalar,
    /// AVX2 with FMA.
    Avx2,
    /// AVX-512F.
    Avx512,
}

impl Isa {
    /// Every one, slowest first.
    pub const ALL: [Self; 3] = [Self::Scalar, Self::Avx2, Self::Avx512];

    /// Its name in configuration and reports.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }

    /// Whether this processor, and its operating system, has it.
    pub fn is_available(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => is_x86_feature_detected!("avx512f"),
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// The fastest that is available.
    pub fn best() -> Self {
        Self::ALL.into_iter().rev().find(|isa| isa.is_available()).unwrap_or(Self::Scalar)
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for Isa {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|isa| isa.as_str() == text);
        found.ok_or_else(|| format!("unknown instruction set {text:?}: expected scalar, avx2 or avx512"))
    }
}

/// Tiles of a Winograd convolution: outputs along depth, rows and columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum Tiling {
    /// F(4,6,4), stride 1.
    #[serde(rename = "F(4,6,4)")]
    F464,
    /// F(4,4,4), stride 1.
    #[serde(rename = "F(4,4,4)")]
    F444,
    /// F(2,4,4), stride 1.
    #[serde(rename = "F(2,4,4)")]
    F244,
    /// F(2,2,2), stride 1.
    #[serde(rename = "F(2,2,2)")]
    F222,
    /// Four outputs an axis, stride 2.
    #[serde(rename = "stride 2, 4x4x4")]
    P444,
    /// Two outputs an axis, stride 2.
    #[serde(rename = "stride 2, 2x2x2")]
    P222,
}

/// Calls `$f` with the axes of a tiling.
macro_rules! with_axes {
    ($tiling:expr, $f:ident) => {
        match $tiling {
            Tiling::F464 => $f!(Four, Six, Four),
            Tiling::F444 => $f!(Four, Four, Four),
            Tiling::F244 => $f!(Two, Four, Four),
            Tiling::F222 => $f!(Two, Two, Two),
            Tiling::P444 => $f!(Poly4, Poly4, Poly4),
            Tiling::P222 => $f!(Poly2, Poly2, Poly2),
        }
    };
}

impl Tiling {
    /// Those of stride 1.
    pub const STRIDE_1: [Self; 4] = [Self::F464, Self::F444, Self::F244, Self::F222];
    /// Those of stride 2.
    pub const STRIDE_2: [Self; 2] = [Self::P444, Self::P222];
    /// Every one.
    pub const ALL: [Self; 6] = [Self::F464, Self::F444, Self::F244, Self::F222, Self::P444, Self::P222];

    /// Its name in reports.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::F464 => "F(4,6,4)",
            Self::F444 => "F(4,4,4)",
            Self::F244 => "F(2,4,4)",
            Self::F222 => "F(2,2,2)",
            Self::P444 => "stride 2, 4x4x4",
            Self::P222 => "stride 2, 2x2x2",
        }
    }

    /// 1 or 2.
    pub const fn stride(self) -> usize {
        match self {
            Self::P444 | Self::P222 => 2,
            _ => 1,
        }
    }

    /// Outputs of a tile along each axis.
    pub fn outputs(self) -> [usize; 3] {
        macro_rules! f {
            ($d:ty, $h:ty, $w:ty) => {
                [<$d>::M, <$h>::M, <$w>::M]
            };
        }
        with_axes!(self, f)
    }

    /// Inputs of a tile along each axis.
    pub fn inputs(self) -> [usize; 3] {
        macro_rules! f {
            ($d:ty, $h:ty, $w:ty) => {
                [<$d>::T, <$h>::T, <$w>::T]
            };
        }
        with_axes!(self, f)
    }

    /// Inputs from one tile to the next along each axis.
    pub fn steps(self) -> [usize; 3] {
        macro_rules! f {
            ($d:ty, $h:ty, $w:ty) => {
                [<$d>::STEP, <$h>::STEP, <$w>::STEP]
            };
        }
        with_axes!(self, f)
    }

    /// Products of a tile and pair of channels.
    pub fn frequencies(self) -> usize {
        self.inputs().iter().product()
    }

    /// Weights of a pair of channels, kept as `kept` says.
    pub fn weights(self, kept: Kept) -> usize {
        macro_rules! f {
            ($d:ty, $h:ty, $w:ty) => {
                match kept {
                    Kept::Whole => <$d>::U * <$h>::U * <$w>::U,
                    Kept::Rows => <$d>::U * <$h>::U * 3,
                    Kept::Planes => <$d>::U * 9,
                }
            };
        }
        with_axes!(self, f)
    }

    /// Which transformed weights along D and H each transform along D and H takes.
    pub fn weight_rows(self) -> Vec<[usize; 2]> {
        macro_rules! f {
            ($d:ty, $h:ty, $w:ty) => {
                winograd::weight_rows::<$d, $h>()
            };
        }
        with_axes!(self, f)
    }

    /// The rows of G along H.
    pub fn rows_of_g(self) -> Vec<[f32; 3]> {
        macro_rules! f {
            ($d:ty, $h:ty, $w:ty) => {
                (0..<$h>::U).map(winograd::g_row::<$h>).collect()
            };
        }
        with_axes!(self, f)
    }

    /// Transformed weights of one 3x3x3 kernel, [`weights`](Self::weights) of them to `out`.
    pub fn kernel_transform(self, w: &[f64; 27], kept: Kept, out: &mut [f64]) {
        macro_rules! f {
            ($d:ty, $h:ty, $w:ty) => {
                winograd::kernel_transform::<$d, $h, $w>(w, kept, out)
            };
        }
        with_axes!(self, f);
    }
}

/// The transforms of one tiling.
#[derive(Clone, Copy)]
pub struct Transforms {
    /// [`winograd::columns`].
    pub columns: unsafe fn(&Columns),
    /// [`winograd::middle`].
    pub middle: unsafe fn(&Middle),
    /// [`winograd::outputs`].
    pub outputs: unsafe fn(&Outputs),
}

/// The kernels of one instruction set. Their contracts are those of the functions named, without the one about the
/// processor: a table exists only where its instruction set does.
#[derive(Clone, Copy)]
pub struct Kernels {
    /// Which.
    pub isa: Isa,
    /// Vectors of a full panel of a direct convolution's weights.
    pub vectors: usize,
    /// Vectors of a full panel of transformed weights.
    pub panel: usize,
    /// Tiles whose products are computed at a time.
    pub rows: usize,
    /// [`matrix::product`].
    pub product: unsafe fn(&Product),
    /// [`matrix::direct_row`] with bias and ReLU.
    pub direct_relu: unsafe fn(&DirectRow),
    /// [`matrix::direct_row`] merging into the output.
    pub direct_merge: unsafe fn(&DirectRow),
    /// [`stem::stem_rows`].
    pub stem_rows: unsafe fn(&StemRows),
    /// [`matrix::merge_row`].
    pub merge_row: unsafe fn(&MergeRow),
    /// [`matrix::read`].
    pub read: unsafe fn(&[f32]) -> f32,
    /// [`matrix::multiply_adds`].
    pub multiply_adds: unsafe fn(usize) -> f32,
    transforms: fn(Tiling) -> Transforms,
}

impl Kernels {
    /// The kernels of `isa`; `None` where the processor lacks it.
    pub fn of(isa: Isa) -> Option<Self> {
        if !isa.is_available() {
            return None;
        }
        match isa {
            Isa::Scalar => Some(scalar::kernels()),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Some(avx2::kernels()),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => Some(avx512::kernels()),
            #[cfg(not(target_arch = "x86_64"))]
            _ => None,
        }
    }

    /// The transforms of `tiling`.
    pub fn transforms(&self, tiling: Tiling) -> Transforms {
        (self.transforms)(tiling)
    }
}

/// A module with the kernels for `$simd`, compiled with `$feature`.
macro_rules! isa {
    ($module:ident, $isa:expr, $simd:ty $(, #[$feature:meta])?) => {
        mod $module {
            use super::*;

            $(#[$feature])?
            unsafe fn columns<D: Axis, H: Axis>(p: &Columns) {
                // SAFETY: the caller's promise, and the instructions are enabled here.
                unsafe { winograd::columns::<$simd, D, H>(p) }
            }
            $(#[$feature])?
            unsafe fn middle<W: Axis>(p: &Middle) {
                // SAFETY: as above.
                unsafe { winograd::middle::<$simd, W>(p) }
            }
            $(#[$feature])?
            unsafe fn outputs<D: Axis, H: Axis>(p: &Outputs) {
                // SAFETY: as above.
                unsafe { winograd::outputs::<$simd, D, H>(p) }
            }
            $(#[$feature])?
            unsafe fn product(p: &Product) {
                // SAFETY: as above.
                unsafe { matrix::product::<$simd>(p) }
            }
            $(#[$feature])?
            unsafe fn direct_relu(p: &DirectRow) {
                // SAFETY: as above.
                unsafe { matrix::direct_row::<$simd, { matrix::BIAS_RELU }>(p) }
            }
            $(#[$feature])?
            unsafe fn direct_merge(p: &DirectRow) {
                // SAFETY: as above.
                unsafe { matrix::direct_row::<$simd, { matrix::MERGE }>(p) }
            }
            $(#[$feature])?
            unsafe fn stem_rows(p: &StemRows) {
                // SAFETY: as above.
                unsafe { stem::stem_rows::<$simd>(p) }
            }
            $(#[$feature])?
            unsafe fn merge_row(p: &MergeRow) {
                // SAFETY: as above.
                unsafe { matrix::merge_row::<$simd>(p) }
            }
            $(#[$feature])?
            unsafe fn read(values: &[f32]) -> f32 {
                // SAFETY: as above.
                unsafe { matrix::read::<$simd>(values) }
            }
            $(#[$feature])?
            unsafe fn multiply_adds(rounds: usize) -> f32 {
                // SAFETY: as above.
                unsafe { matrix::multiply_adds::<$simd>(rounds) }
            }
            fn transforms(tiling: Tiling) -> Transforms {
                macro_rules! f {
                    ($d:ty, $h:ty, $w:ty) => {
                        Transforms { columns: columns::<$d, $h>, middle: middle::<$w>, outputs: outputs::<$d, $h> }
                    };
                }
                with_axes!(tiling, f)
            }
            pub fn kernels() -> Kernels {
                Kernels {
                    isa: $isa,
                    vectors: <$simd>::NV,
                    panel: <$simd>::PANEL,
                    rows: <$simd>::ROWS,
                    product,
                    direct_relu,
                    direct_merge,
                    stem_rows,
                    merge_row,
                    read,
                    multiply_adds,
                    transforms,
                }
            }
        }
    };
}

isa!(scalar, Isa::Scalar, Scalar);
#[cfg(target_arch = "x86_64")]
isa!(avx2, Isa::Avx2, Avx2, #[target_feature(enable = "avx2,fma")]);
#[cfg(target_arch = "x86_64")]
isa!(avx512, Isa::Avx512, Avx512, #[target_feature(enable = "avx512f,avx2,fma")]);
