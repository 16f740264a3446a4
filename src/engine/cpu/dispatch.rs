//! The kernels of one instruction set, chosen once.
//!
//! Input: an [`Isa`] that the processor has. Output: function pointers ([`Kernels`]). Nothing else in the backend knows
//! instruction sets, and nothing but this file names a kernel of one.
#![allow(unsafe_code)]

use std::fmt;

use serde::{Deserialize, Serialize};

use super::matrix::{self, DirectRow, Frequency, MergeRow};
#[cfg(target_arch = "x86_64")]
use super::simd::{Avx2, Avx512};
use super::simd::{Scalar, Simd};
use super::winograd::{self, Axis, Four, InputRow, OutputRow, Poly2, Poly4, Two};

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
    pub const STRIDE_1: [Self; 3] = [Self::F444, Self::F244, Self::F222];
    /// Those of stride 2.
    pub const STRIDE_2: [Self; 2] = [Self::P444, Self::P222];
    /// Every one.
    pub const ALL: [Self; 5] = [Self::F444, Self::F244, Self::F222, Self::P444, Self::P222];

    /// Its name in reports.
    pub const fn as_str(self) -> &'static str {
        match self {
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

    /// Transformed weights of a pair of channels.
    pub fn weights(self) -> usize {
        macro_rules! f {
            ($d:ty, $h:ty, $w:ty) => {
                <$d>::U * <$h>::U * <$w>::U
            };
        }
        with_axes!(self, f)
    }

    /// Which transformed weight each product takes.
    pub fn weight_map(self) -> Vec<u16> {
        macro_rules! f {
            ($d:ty, $h:ty, $w:ty) => {
                winograd::weight_map::<$d, $h, $w>()
            };
        }
        with_axes!(self, f)
    }

    /// Transformed weights of one 3x3x3 kernel, [`weights`](Self::weights) of them to `out`.
    pub fn kernel_transform(self, w: &[f64; 27], out: &mut [f64]) {
        macro_rules! f {
            ($d:ty, $h:ty, $w:ty) => {
                winograd::kernel_transform::<$d, $h, $w>(w, out)
            };
        }
        with_axes!(self, f);
    }
}

/// The transforms of one tiling.
#[derive(Clone, Copy)]
pub struct Transforms {
    /// [`winograd::input_row`].
    pub input_row: unsafe fn(&InputRow),
    /// [`winograd::output_row`].
    pub output_row: unsafe fn(&OutputRow),
}

/// The kernels of one instruction set. Their contracts are those of the functions named, without the one about the
/// processor: a table exists only where its instruction set does.
#[derive(Clone, Copy)]
pub struct Kernels {
    /// Which.
    pub isa: Isa,
    /// Vectors of a full panel of weights.
    pub vectors: usize,
    /// [`matrix::frequency`].
    pub frequency: unsafe fn(&Frequency),
    /// [`matrix::direct_row`] with bias and ReLU.
    pub direct_relu: unsafe fn(&DirectRow),
    /// [`matrix::direct_row`] merging into the output.
    pub direct_merge: unsafe fn(&DirectRow),
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
            unsafe fn input_row<D: Axis, H: Axis, W: Axis>(p: &InputRow) {
                // SAFETY: the caller's promise, and the instructions are enabled here.
                unsafe { winograd::input_row::<$simd, D, H, W>(p) }
            }
            $(#[$feature])?
            unsafe fn output_row<D: Axis, H: Axis, W: Axis>(p: &OutputRow) {
                // SAFETY: as above.
                unsafe { winograd::output_row::<$simd, D, H, W>(p) }
            }
            $(#[$feature])?
            unsafe fn frequency(p: &Frequency) {
                // SAFETY: as above.
                unsafe { matrix::frequency::<$simd>(p) }
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
                        Transforms { input_row: input_row::<$d, $h, $w>, output_row: output_row::<$d, $h, $w> }
                    };
                }
                with_axes!(tiling, f)
            }
            pub fn kernels() -> Kernels {
                Kernels {
                    isa: $isa,
                    vectors: <$simd>::NV,
                    frequency,
                    direct_relu,
                    direct_merge,
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
