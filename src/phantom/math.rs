//! Arithmetic of the phantom that gives the same bits on every IEEE 754 machine.
//!
//! Only `+ - * /`, `sqrt`, comparisons and conversions are used, all of them exactly rounded; the platform's maths
//! library is never called. Accuracy (about 1e-9) is far beyond what a synthetic anatomy needs.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// A point or vector, millimetres, LPS.
pub(super) type V3 = [f64; 3];

pub(super) fn add(a: V3, b: V3) -> V3 {
    [a[0] + b[0], a[1] + b[1], a[2] + b[2]]
}

pub(super) fn sub(a: V3, b: V3) -> V3 {
    [a[0] - b[0], a[1] - b[1], a[2] - b[2]]
}

pub(super) fn scale(a: V3, s: f64) -> V3 {
    [a[0] * s, a[1] * s, a[2] * s]
}

pub(super) fn dot(a: V3, b: V3) -> f64 {
    a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
}

pub(super) fn cross(a: V3, b: V3) -> V3 {
    [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]]
}

pub(super) fn norm(a: V3) -> f64 {
    dot(a, a).sqrt()
}

/// `a` scaled to length 1; the z axis for a null vector.
pub(super) fn unit(a: V3) -> V3 {
    let n = norm(a);
    if n < 1e-12 { [0.0, 0.0, 1.0] } else { scale(a, 1.0 / n) }
}

pub(super) fn lerp(a: f64, b: f64, t: f64) -> f64 {
    a + (b - a) * t
}

/// Hermite step from 0 at `x <= a` to 1 at `x >= b`.
pub(super) fn smoothstep(a: f64, b: f64, x: f64) -> f64 {
    let t = ((x - a) / (b - a)).clamp(0.0, 1.0);
    t * t * (3.0 - 2.0 * t)
}

/// Smooth minimum of two distances, blended over `k` millimetres.
pub(super) fn smin(a: f64, b: f64, k: f64) -> f64 {
    let h = (k - (a - b).abs()).max(0.0) / k;
    a.min(b) - h * h * k * 0.25
}

/// Sine and cosine of `x` radians, for |x| up to about 1e6.
pub(super) fn sin_cos(x: f64) -> (f64, f64) {
    use std::f64::consts::FRAC_PI_2;
    let turns = x / FRAC_PI_2;
    // Truncation with an offset is rounding to nearest, without a call into the maths library.
    let n = (turns + if turns >= 0.0 { 0.5 } else { -0.5 }) as i64;
    let r = x - n as f64 * FRAC_PI_2;
    let r2 = r * r;
    let s = r
        * (1.0
            - r2 / 6.0
                * (1.0 - r2 / 20.0 * (1.0 - r2 / 42.0 * (1.0 - r2 / 72.0 * (1.0 - r2 / 110.0 * (1.0 - r2 / 156.0))))));
    let c = 1.0
        - r2 / 2.0 * (1.0 - r2 / 12.0 * (1.0 - r2 / 30.0 * (1.0 - r2 / 56.0 * (1.0 - r2 / 90.0 * (1.0 - r2 / 132.0)))));
    match n.rem_euclid(4) {
        0 => (s, c),
        1 => (c, -s),
        2 => (-s, -c),
        _ => (-c, s),
    }
}

/// e to the `x`, for |x| below 700.
pub(super) fn exp(x: f64) -> f64 {
    use std::f64::consts::LN_2;
    let k = (x / LN_2 + if x >= 0.0 { 0.5 } else { -0.5 }) as i64;
    let r = x - k as f64 * LN_2;
    let mut sum = 1.0;
    for i in (1..=13).rev() {
        sum = 1.0 + r / f64::from(i) * sum;
    }
    let two_k = f64::from_bits(((1023 + k.clamp(-1022, 1023)) as u64) << 52);
    sum * two_k
}

/// Natural logarithm of a positive, normal `x`.
pub(super) fn ln(x: f64) -> f64 {
    use std::f64::consts::{LN_2, SQRT_2};
    let bits = x.to_bits();
    let mut e = ((bits >> 52) & 0x7ff) as i64 - 1023;
    let mut m = f64::from_bits((bits & ((1 << 52) - 1)) | (1023 << 52));
    if m > SQRT_2 {
        m *= 0.5;
        e += 1;
    }
    let t = (m - 1.0) / (m + 1.0);
    let t2 = t * t;
    let mut sum = 0.0;
    for i in (0..12).rev() {
        sum = sum * t2 + 1.0 / f64::from(2 * i + 1);
    }
    2.0 * t * sum + e as f64 * LN_2
}

/// Positive `x` to the power `p`.
pub(super) fn pow(x: f64, p: f64) -> f64 {
    exp(p * ln(x))
}

/// The value of a table of `(position, value)` knots at `x`, smooth (Catmull-Rom), constant outside.
pub(super) fn table(knots: &[(f64, f64)], x: f64) -> f64 {
    let last = knots.len() - 1;
    if x <= knots[0].0 {
        return knots[0].1;
    }
    if x >= knots[last].0 {
        return knots[last].1;
    }
    let mut i = 0;
    while x > knots[i + 1].0 {
        i += 1;
    }
    let (x0, y0) = knots[i];
    let (x1, y1) = knots[i + 1];
    let h = x1 - x0;
    let slope = |j: usize| {
        if j == 0 || j == last { 0.0 } else { (knots[j + 1].1 - knots[j - 1].1) / (knots[j + 1].0 - knots[j - 1].0) }
    };
    let (m0, m1) = (slope(i) * h, slope(i + 1) * h);
    let t = (x - x0) / h;
    let (t2, t3) = (t * t, t * t * t);
    (2.0 * t3 - 3.0 * t2 + 1.0) * y0 + (t3 - 2.0 * t2 + t) * m0 + (3.0 * t2 - 2.0 * t3) * y1 + (t3 - t2) * m1
}

/// One round of the SplitMix64 finaliser: a 64-bit hash of a 64-bit value.
pub(super) fn mix64(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A hash of several values.
pub(super) fn hash_all(values: &[u64]) -> u64 {
    values.iter().fold(0x6461_726e_6574, |h, &v| mix64(h ^ mix64(v)))
}

/// A stream of random numbers for one purpose: the draws of one purpose never shift those of another.
pub(super) struct Draw(ChaCha8Rng);

impl Draw {
    pub(super) fn new(seed: u64, purpose: u64) -> Self {
        let mut key = [0u8; 32];
        for (i, chunk) in key.chunks_exact_mut(8).enumerate() {
            chunk.copy_from_slice(&hash_all(&[seed, purpose, i as u64]).to_le_bytes());
        }
        Self(ChaCha8Rng::from_seed(key))
    }

    pub(super) fn bits(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// Uniform in [0, 1).
    pub(super) fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in [a, b).
    pub(super) fn range(&mut self, a: f64, b: f64) -> f64 {
        a + (b - a) * self.unit()
    }

    /// Uniform in 0..n (n > 0); the bias of 2^-64 n is of no concern here.
    pub(super) fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.bits()) * n as u128) >> 64) as usize
    }

    /// Bell-shaped with mean 0 and deviation 1, never beyond 3.5 (a sum of four uniforms, 4 * 1/12 variance).
    pub(super) fn bell(&mut self) -> f64 {
        (self.unit() + self.unit() + self.unit() + self.unit() - 2.0) * 1.732_050_807_568_877_2
    }

    pub(super) fn chance(&mut self, p: f64) -> bool {
        self.unit() < p
    }

    /// Bell-shaped around `mean`, clamped to `[low, high]`.
    pub(super) fn about(&mut self, mean: f64, deviation: f64, low: f64, high: f64) -> f64 {
        (mean + deviation * self.bell()).clamp(low, high)
    }

    /// A random direction.
    pub(super) fn direction(&mut self) -> V3 {
        loop {
            let v = [self.range(-1.0, 1.0), self.range(-1.0, 1.0), self.range(-1.0, 1.0)];
            let n = dot(v, v);
            if n > 0.01 && n < 1.0 {
                return scale(v, 1.0 / n.sqrt());
            }
        }
    }
}

/// A rotation followed by a translation, and its inverse.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pose {
    rotation: [V3; 3],
    shift: V3,
}

impl Pose {
    /// Small rotations about x, y and z (radians, in that order), then a shift in millimetres.
    pub(super) fn new(angles: V3, shift: V3) -> Self {
        let (sx, cx) = sin_cos(angles[0]);
        let (sy, cy) = sin_cos(angles[1]);
        let (sz, cz) = sin_cos(angles[2]);
        let rotation = [
            [cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx],
            [sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx],
            [-sy, cy * sx, cy * cx],
        ];
        Self { rotation, shift }
    }

    /// Anatomy to world.
    pub(super) fn apply(&self, p: V3) -> V3 {
        add(self.turn(p), self.shift)
    }

    /// Anatomy direction to world direction.
    pub(super) fn turn(&self, p: V3) -> V3 {
        [dot(self.rotation[0], p), dot(self.rotation[1], p), dot(self.rotation[2], p)]
    }

    /// World to anatomy.
    pub(super) fn undo(&self, p: V3) -> V3 {
        let q = sub(p, self.shift);
        let r = &self.rotation;
        [
            r[0][0] * q[0] + r[1][0] * q[1] + r[2][0] * q[2],
            r[0][1] * q[0] + r[1][1] * q[1] + r[2][1] * q[2],
            r[0][2] * q[0] + r[1][2] * q[1] + r[2][2] * q[2],
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elementary_functions_are_close_to_the_platforms() {
        for i in -400..400 {
            let x = f64::from(i) * 0.037;
            let (s, c) = sin_cos(x);
            assert!((s - x.sin()).abs() < 1e-9 && (c - x.cos()).abs() < 1e-9, "sin_cos({x})");
            assert!((exp(x) / x.exp() - 1.0).abs() < 1e-9, "exp({x})");
            let p = 0.01 + f64::from(i + 400) * 0.11;
            assert!((ln(p) - p.ln()).abs() < 1e-9, "ln({p})");
        }
    }

    #[test]
    fn a_pose_is_undone() {
        let pose = Pose::new([0.05, -0.03, 0.1], [4.0, -7.0, 2.0]);
        let p = [31.0, -52.0, 117.0];
        let q = pose.undo(pose.apply(p));
        assert!(norm(sub(p, q)) < 1e-9);
    }

    #[test]
    fn a_table_passes_through_its_knots() {
        let knots = [(0.0, 1.0), (0.5, 0.4), (1.0, 0.9)];
        for (x, y) in knots {
            assert!((table(&knots, x) - y).abs() < 1e-12);
        }
        assert_eq!(table(&knots, -1.0), 1.0);
    }
}
