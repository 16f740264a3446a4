//! Weights and volumes from a counter: the same numbers in Rust and in numpy, without storing them.
//!
//! Element `i` of the stream `(seed, name)`:
//!
//! ```text
//! key  = mix(seed + fnv1a64(name))             all arithmetic modulo 2^64
//! x    = mix(key + (i + 1) * 0x9E3779B97F4A7C15)
//! u    = (x >> 11) * 2^-53                     f64 in [0, 1), exact
//! mix  = the finaliser of splitmix64:
//!        z ^= z >> 30; z *= 0xBF58476D1CE4E5B9; z ^= z >> 27; z *= 0x94D049BB133111EB; z ^= z >> 31
//! ```
//!
//! A value is `center + half_width * (2u - 1)` in f64, rounded once to f32. Only integer operations, `+ * /` and `sqrt`
//! are used, all exactly rounded, so the numbers agree to the bit wherever they are made. By tensor role:
//!
//! ```text
//! kernel        center 0, half width sqrt(3) * sqrt(2 / fan_in): the variance of Kaiming's normal initialisation
//! bias          0 +- 0.1       BN weight        1 +- 0.3     BN bias  0 +- 0.2
//!                              BN running mean  0 +- 0.2     BN running variance  1 +- 0.5
//! ```
//!
//! Such a network keeps its activations in range at any depth, and every tensor changes the result. It has learned
//! nothing. `tests/golden/network/make.py` holds the same generator in numpy.

use super::architecture::TensorRole;
use super::manifest::Architecture;
use super::weights::{Tensor, Weights};

const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;
const SQRT_3: f64 = 1.732_050_807_568_877_2;

/// The finaliser of splitmix64.
pub const fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// FNV-1a, 64 bits.
pub const fn fnv1a64(name: &str) -> u64 {
    let bytes = name.as_bytes();
    let mut hash = 0xCBF2_9CE4_8422_2325_u64;
    let mut i = 0;
    while i < bytes.len() {
        hash = (hash ^ bytes[i] as u64).wrapping_mul(0x0000_0100_0000_01B3);
        i += 1;
    }
    hash
}

/// A stream of numbers addressed by index.
#[derive(Clone, Copy, Debug)]
pub struct Stream {
    key: u64,
}

impl Stream {
    /// The stream of `name` under `seed`.
    pub const fn new(seed: u64, name: &str) -> Self {
        Self { key: mix(seed.wrapping_add(fnv1a64(name))) }
    }

    /// 64 bits at `index`.
    pub const fn bits(&self, index: u64) -> u64 {
        mix(self.key.wrapping_add(index.wrapping_add(1).wrapping_mul(GOLDEN)))
    }

    /// Uniform in [0, 1) at `index`.
    pub fn uniform(&self, index: u64) -> f64 {
        const SCALE: f64 = 1.0 / (1_u64 << 53) as f64;
        (self.bits(index) >> 11) as f64 * SCALE
    }

    /// `len` values of `center +- half_width`.
    pub fn fill(&self, len: usize, center: f64, half_width: f64) -> Vec<f32> {
        (0..len as u64).map(|i| (center + half_width * (2.0 * self.uniform(i) - 1.0)) as f32).collect()
    }
}

/// Every tensor of `architecture`.
pub fn weights(architecture: &Architecture, seed: u64) -> Weights {
    Weights::from_tensors(architecture.tensors().into_iter().map(|spec| {
        let (center, half_width) = match spec.role {
            TensorRole::Kernel { fan_in } => (0.0, SQRT_3 * (2.0 / fan_in as f64).sqrt()),
            TensorRole::Bias => (0.0, 0.1),
            TensorRole::BnWeight => (1.0, 0.3),
            TensorRole::BnBias | TensorRole::BnMean => (0.0, 0.2),
            TensorRole::BnVar => (1.0, 0.5),
        };
        let data = Stream::new(seed, &spec.name).fill(spec.len(), center, half_width);
        (spec.name, Tensor { shape: spec.shape, data })
    }))
}

/// A volume of uniform values in [0, 1], row-major D, H, W: the stream `input`.
pub fn volume(input_dhw: [usize; 3], seed: u64) -> Vec<f32> {
    Stream::new(seed, "input").fill(input_dhw.iter().product(), 0.5, 0.5)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hashes_have_their_published_values() {
        assert_eq!(fnv1a64(""), 0xCBF2_9CE4_8422_2325);
        assert_eq!(fnv1a64("a"), 0xAF63_DC4C_8601_EC8C);
        // The first output of splitmix64 seeded with 0.
        assert_eq!(mix(GOLDEN), 0xE220_A839_7B1D_CDAF);
    }

    #[test]
    fn values_are_uniform_with_the_stated_spread() {
        let n = 100_000;
        let values = Stream::new(7, "x").fill(n, 1.0, 3.0);
        let mean: f64 = values.iter().map(|&v| f64::from(v)).sum::<f64>() / n as f64;
        let var: f64 = values.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n as f64;
        assert!((mean - 1.0).abs() < 0.02, "{mean}");
        assert!((var - 3.0).abs() < 0.05, "{var}");
        assert!(values.iter().all(|v| (-2.0..=4.0).contains(v)));
    }

    #[test]
    fn streams_differ_by_seed_and_by_name() {
        let a = Stream::new(1, "a");
        assert_ne!(a.bits(0), Stream::new(2, "a").bits(0));
        assert_ne!(a.bits(0), Stream::new(1, "b").bits(0));
        assert_ne!(a.bits(0), a.bits(1));
    }
}
