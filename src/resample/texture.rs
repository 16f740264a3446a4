//! How sharp and how noisy the network's input is, in twelve numbers.
//!
//! Input: the network's input, `D x H x W` f32 in [0, 1]. Output: [`Texture`], twelve exact sums, and their logarithms as
//! features for the distance from the training data. Pooled features of a trained network are made to forget what tells
//! kernels, doses and slice thicknesses apart until its answers suffer; these numbers show nothing else.
//!
//! ```text
//! q = floor(4095 v + 1/2)                          0.37 HU a level at a window of 1500 HU
//! along D, H and W, over all neighbours a, b, c:
//!   d1 = |b - a|          d2 = |a - 2 b + c|
//!   sums of  d1,  min(d1, 128),  d2,  min(d2, 128)
//! feature = ln(sum / (4095 terms) + 1e-6)
//! ```
//!
//! The ratio of second to first differences is the sharpness along that axis, whatever the contrast; the clipped sums
//! are of noise and hold few edges. Sums are of whole numbers, so that order, threads and processor do not change them:
//! the kernel of `kernels.cu` gives the same.
//!
//! Arithmetic, full size: 3.2 M values, twelve sums of 16-bit differences, 0.1 G operations; a strip's last three planes as
//! i16 (0.3 MB) stay in the second-level cache.
//!
//! Deliberately absent: grey values as such (the network sees a shift of those), any judgement.
#![allow(unsafe_code)]

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use super::Share;

/// Sums of a [`Texture`].
pub const SUMS: usize = 12;
/// Highest level.
pub const LEVELS: f32 = 4095.0;
/// Where a difference is clipped, levels.
pub const CLIP: i16 = 128;
/// What a mean difference of nothing counts as.
const FLOOR: f64 = 1e-6;

/// Sums of differences between neighbours, levels: along D, H, W each first differences, the same clipped, second
/// differences, the same clipped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Texture(pub [u64; SUMS]);

impl Texture {
    /// The features of an input of this shape.
    pub fn features(&self, dhw: [usize; 3]) -> [f32; SUMS] {
        std::array::from_fn(|i| {
            let (axis, order) = (i / 4, 1 + i % 4 / 2);
            let along = dhw[axis].saturating_sub(order);
            let terms = dhw.iter().product::<usize>() / dhw[axis].max(1) * along;
            (self.0[i] as f64 / (f64::from(LEVELS) * terms.max(1) as f64) + FLOOR).ln() as f32
        })
    }
}

/// Planes of a part of the work. The two before it are made into levels twice.
const STRIP: usize = 8;

/// Makes [`Texture`]s of inputs of one shape; owns its scratch.
#[derive(Clone, Debug)]
pub struct TextureMeter {
    dhw: [usize; 3],
    /// For each strip its last three planes as levels, by plane modulo 3: two levels in the place of a float.
    planes: Vec<f32>,
}

impl TextureMeter {
    /// Takes the memory: three planes of 16 bits for each eight of the input.
    pub fn new(dhw: [usize; 3]) -> Self {
        Self { dhw, planes: vec![0.0; dhw[0].div_ceil(STRIP) * Self::strip_len(dhw)] }
    }

    fn strip_len([_, h, w]: [usize; 3]) -> usize {
        (3 * h * w).div_ceil(2).max(1)
    }

    /// The texture of `input`, `D x H x W` in [0, 1]; `share` does its strips.
    ///
    /// # Panics
    /// When the length is not that of the shape.
    pub fn measure(&mut self, input: &[f32], share: &Share<'_>) -> Texture {
        let dhw = self.dhw;
        assert_eq!(input.len(), dhw.iter().product::<usize>(), "length of the input");
        let sums: [AtomicU64; SUMS] = std::array::from_fn(|_| AtomicU64::new(0));
        share(&mut self.planes, Self::strip_len(dhw), &|strip, scratch| {
            let first = strip * STRIP;
            let found = strip_sums(input, dhw, first..dhw[0].min(first + STRIP), bytemuck::cast_slice_mut(scratch));
            for (sum, found) in sums.iter().zip(found) {
                sum.fetch_add(found, Ordering::Relaxed);
            }
        });
        Texture(sums.map(AtomicU64::into_inner))
    }
}

/// The sums whose last plane is in `strip`; `planes` has room for three planes of levels.
fn strip_sums(input: &[f32], dhw: [usize; 3], strip: Range<usize>, planes: &mut [i16]) -> [u64; SUMS] {
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has it, as just asked.
        return unsafe { strip_sums_avx2(input, dhw, strip, planes) };
    }
    strip_sums_plain(input, dhw, strip, planes)
}

/// [`strip_sums_plain`] on vectors of 32 bytes; half its time.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn strip_sums_avx2(input: &[f32], dhw: [usize; 3], strip: Range<usize>, planes: &mut [i16]) -> [u64; SUMS] {
    strip_sums_plain(input, dhw, strip, planes)
}

#[inline(always)]
fn strip_sums_plain(input: &[f32], dhw: [usize; 3], strip: Range<usize>, planes: &mut [i16]) -> [u64; SUMS] {
    let [_, h, w] = dhw;
    let area = h * w;
    let mut sums = [[0u64; 4]; 3];
    let [along_d, along_h, along_w] = &mut sums;
    for plane in strip.start.saturating_sub(2)..strip.end {
        let levels = &mut planes[plane % 3 * area..][..area];
        for (level, value) in levels.iter_mut().zip(&input[plane * area..][..area]) {
            *level = (LEVELS * value + 0.5) as i16;
        }
        if plane < strip.start {
            continue;
        }
        let row = |back: usize, y: usize| &planes[(plane + 3 - back) % 3 * area + y * w..][..w];
        for y in 0..h {
            let here = row(0, y);
            if plane >= 1 {
                first(row(1, y), here, along_d);
            }
            if plane >= 2 {
                second(row(2, y), row(1, y), here, along_d);
            }
            if y >= 1 {
                first(row(0, y - 1), here, along_h);
            }
            if y >= 2 {
                second(row(0, y - 2), row(0, y - 1), here, along_h);
            }
            if w >= 2 {
                first(&here[..w - 1], &here[1..], along_w);
            }
            if w >= 3 {
                second(&here[..w - 2], &here[1..w - 1], &here[2..], along_w);
            }
        }
    }
    std::array::from_fn(|i| sums[i / 4][i % 4])
}

/// Adds one row's first differences. A row's sums fit 32 bits: a term is 16,380 at most, a row has fewer than 2^17.
#[inline(always)]
fn first(a: &[i16], b: &[i16], sums: &mut [u64; 4]) {
    let (mut plain, mut clipped) = (0i32, 0i32);
    for (a, b) in a.iter().zip(b) {
        let d = (b - a).abs();
        plain += i32::from(d);
        clipped += i32::from(d.min(CLIP));
    }
    sums[0] += plain as u64;
    sums[1] += clipped as u64;
}

/// Adds one row's second differences.
#[inline(always)]
fn second(a: &[i16], b: &[i16], c: &[i16], sums: &mut [u64; 4]) {
    let (mut plain, mut clipped) = (0i32, 0i32);
    for ((a, b), c) in a.iter().zip(b).zip(c) {
        let d = (a - b - b + c).abs();
        plain += i32::from(d);
        clipped += i32::from(d.min(CLIP));
    }
    sums[2] += plain as u64;
    sums[3] += clipped as u64;
}

#[cfg(test)]
mod tests {
    use super::super::{PartWork, alone};
    use super::*;

    /// Values in [0, 1] from a fixed stream.
    fn values(n: usize, seed: u64) -> Vec<f32> {
        let mut state = seed | 1;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u32 << 24) as f32
        };
        (0..n).map(|_| next()).collect()
    }

    /// Every part on a thread of its own.
    fn threads(values: &mut [f32], len: usize, work: &PartWork<'_>) {
        std::thread::scope(|scope| {
            for (i, part) in values.chunks_mut(len).enumerate() {
                scope.spawn(move || work(i, part));
            }
        });
    }

    /// The definition, one term after the other.
    fn obvious(input: &[f32], dhw: [usize; 3]) -> Texture {
        let level = |at: [usize; 3]| (LEVELS * input[(at[0] * dhw[1] + at[1]) * dhw[2] + at[2]] + 0.5).floor() as i64;
        let mut sums = [0u64; SUMS];
        for d in 0..dhw[0] {
            for h in 0..dhw[1] {
                for w in 0..dhw[2] {
                    for axis in 0..3 {
                        let ahead = |n: usize| {
                            let mut at = [d, h, w];
                            at[axis] += n;
                            (at[axis] < dhw[axis]).then(|| level(at))
                        };
                        let (Some(a), Some(b)) = (ahead(0), ahead(1)) else { continue };
                        sums[4 * axis] += (b - a).unsigned_abs();
                        sums[4 * axis + 1] += (b - a).unsigned_abs().min(CLIP as u64);
                        let Some(c) = ahead(2) else { continue };
                        sums[4 * axis + 2] += (a - 2 * b + c).unsigned_abs();
                        sums[4 * axis + 3] += (a - 2 * b + c).unsigned_abs().min(CLIP as u64);
                    }
                }
            }
        }
        Texture(sums)
    }

    #[test]
    fn sums_are_those_of_the_definition_on_every_path() {
        for (seed, dhw) in [[1, 1, 1], [2, 3, 2], [17, 7, 9], [3, 2, 33], [26, 17, 40], [8, 1, 65]].iter().enumerate() {
            let n: usize = dhw.iter().product();
            let mut input = values(n, seed as u64);
            // Differences below and above the clip, and both ends of the range.
            for (i, v) in input.iter_mut().enumerate() {
                *v = if i % 3 == 0 { *v } else { 0.4 + 0.02 * *v };
            }
            (input[0], input[n - 1]) = (0.0, 1.0);
            let mut meter = TextureMeter::new(*dhw);
            let wanted = obvious(&input, *dhw);
            // Twice: what an earlier input left behind does not count.
            for _ in 0..2 {
                assert_eq!(meter.measure(&input, &alone), wanted, "{dhw:?}");
                assert_eq!(meter.measure(&input, &threads), wanted, "{dhw:?}");
            }
            let mut planes = vec![0; 3 * dhw[1] * dhw[2]];
            assert_eq!(Texture(strip_sums_plain(&input, *dhw, 0..dhw[0], &mut planes)), wanted, "{dhw:?}");
            assert!(wanted.features(*dhw).iter().all(|f| f.is_finite()), "{dhw:?}");
        }
    }

    #[test]
    fn each_axis_has_its_own_sharpness_and_noise_its_own_numbers() {
        let dhw = [12, 40, 40];
        let input = values(12 * 40 * 40, 7);
        let area = 40 * 40;
        let of = |input: &[f32]| TextureMeter::new(dhw).measure(input, &alone).features(dhw);
        let plain = of(&input);
        // Thicker: each plane half of the next one.
        let thick: Vec<f32> = (0..input.len())
            .map(|i| 0.5 * (input[i] + input[if i + area < input.len() { i + area } else { i }]))
            .collect();
        let thick = of(&thick);
        let sharpness = |f: &[f32; SUMS], axis: usize| f[4 * axis + 2] - f[4 * axis];
        assert!(sharpness(&thick, 0) < sharpness(&plain, 0) - 0.2);
        for axis in [1, 2] {
            assert!((sharpness(&thick, axis) - sharpness(&plain, axis)).abs() < 0.1);
        }
        // Less contrast alone leaves the sharpness.
        let flat: Vec<f32> = input.iter().map(|v| 0.5 * v).collect();
        let flat = of(&flat);
        for axis in 0..3 {
            assert!((sharpness(&flat, axis) - sharpness(&plain, axis)).abs() < 0.01);
            assert!((plain[4 * axis] - flat[4 * axis] - 2f32.ln()).abs() < 0.01);
        }
        // A feature is the logarithm of a mean: of two uniform numbers' difference, a third.
        assert!((plain[0] - (1f32 / 3.0).ln()).abs() < 0.02, "{plain:?}");
    }
}
