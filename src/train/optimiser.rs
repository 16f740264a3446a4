//! Adam on one flat tensor, and the loss scaler of float16.
//!
//! Input: parameters and gradients, flat, f32. Output: the parameters, changed in place. PyTorch's `torch.optim.Adam`
//! without weight decay; its state is plain data, so that a checkpoint can hold it.

use tch::{Device, Kind, TchError, Tensor, no_grad};

use super::TrainError;
use super::fused::Fused;
use super::net::Gradient;

/// Elements of a block on the processor: 5 arrays of 256 KiB lie in a core's second-level cache, and temporaries come
/// from memory that is in use already.
pub const BLOCK: i64 = 1 << 16;

/// Decay of the mean of gradients.
pub const BETA1: f64 = 0.9;
/// Decay of the mean of squared gradients.
pub const BETA2: f64 = 0.999;
/// What is added to the root.
pub const EPSILON: f64 = 1e-8;

/// Adam (Kingma and Ba 2015) with bias correction.
pub struct Adam {
    /// Mean of gradients.
    pub mean: Tensor,
    /// Mean of squared gradients.
    pub square: Tensor,
    /// Steps taken.
    pub steps: u64,
}

impl Adam {
    /// A fresh state for `len` parameters.
    ///
    /// # Errors
    /// No room on the device.
    pub fn new(len: i64, device: Device) -> Result<Self, TrainError> {
        let zeros = || Tensor::f_zeros([len], (Kind::Float, device));
        Ok(Self { mean: zeros()?, square: zeros()?, steps: 0 })
    }

    /// Counts a step: its size, and the root of 1 - beta2^t.
    fn next(&mut self, learning_rate: f64) -> (f64, f64) {
        self.steps += 1;
        let t = i32::try_from(self.steps).unwrap_or(i32::MAX);
        (learning_rate / (1.0 - BETA1.powi(t)), (1.0 - BETA2.powi(t)).sqrt())
    }

    /// One step on a GPU as one kernel, `gradient` being in one piece and finite.
    ///
    /// # Errors
    /// Another gradient, or a kernel that does not start.
    pub fn fused_step(
        &mut self,
        fused: &Fused,
        parameters: &Tensor,
        gradient: &Gradient,
        learning_rate: f64,
    ) -> Result<(), TrainError> {
        let [piece] = gradient.0.as_slice() else {
            return Err(TrainError::Torch("a gradient in pieces where one is expected".to_owned()));
        };
        let (step, root) = self.next(learning_rate);
        fused.adam(parameters, &piece.values, &self.mean, &self.square, step, 1.0 / root)
    }

    /// One step of the flat `parameters` against `gradient`. On the processor it goes block by block, all of a block's
    /// operations while it is in the cache, and ends with `false` at the first block that is not finite; the blocks
    /// before it are then changed already. On a GPU the caller looks first.
    ///
    /// # Errors
    /// No room on the device.
    pub fn step(&mut self, parameters: &Tensor, gradient: &Gradient, learning_rate: f64) -> Result<bool, TrainError> {
        let (step_size, root2) = self.next(learning_rate);
        let processor = parameters.device() == Device::Cpu;
        let update = || -> Result<bool, TchError> {
            for piece in &gradient.0 {
                let len = piece.values.size1()?;
                let block = if processor { BLOCK } else { len.max(1) };
                let mut at = 0;
                while at < len {
                    let n = block.min(len - at);
                    let g = piece.values.f_narrow(0, at, n)?;
                    if processor && !g.f_sum(Kind::Float)?.f_double_value(&[])?.is_finite() {
                        return Ok(false);
                    }
                    let from = piece.offset + at;
                    let mut mean = self.mean.f_narrow(0, from, n)?;
                    let mut square = self.square.f_narrow(0, from, n)?;
                    let mut p = parameters.f_narrow(0, from, n)?;
                    let _ = mean.f_lerp_(&g, 1.0 - BETA1)?;
                    let _ = square.f_mul_scalar_(BETA2)?;
                    let _ = square.f_addcmul_(&g.f_mul_scalar(1.0 - BETA2)?, &g)?;
                    let mut root = square.f_sqrt()?;
                    let _ = root.f_div_scalar_(root2)?;
                    let _ = root.f_add_scalar_(EPSILON)?;
                    let _ = p.f_addcdiv_(&mean.f_mul_scalar(-step_size)?, &root)?;
                    at += n;
                }
            }
            Ok(true)
        };
        Ok(no_grad(update)?)
    }
}

/// The learning rate of `epoch` (from 0): `start`, times `factor` every `every` epochs.
pub fn step_lr(start: f64, factor: f64, every: usize, epoch: usize) -> f64 {
    start * factor.powi(i32::try_from(epoch / every.max(1)).unwrap_or(i32::MAX))
}

/// Scale of the loss in float16, PyTorch's rule: halved when a gradient overflows, doubled after a while without.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Scaler {
    /// The scale now.
    pub scale: f64,
    /// Steps since it last changed.
    pub good_steps: u32,
}

impl Default for Scaler {
    fn default() -> Self {
        Self { scale: 65_536.0, good_steps: 0 }
    }
}

impl Scaler {
    /// Steps without overflow before the scale doubles.
    pub const GROWTH_INTERVAL: u32 = 2000;
    /// Below this, overflow is no matter of the scale any more.
    pub const LOWEST: f64 = 1.0;

    /// Notes whether the step's gradients were finite; false when the scale cannot go lower.
    pub fn update(&mut self, finite: bool) -> bool {
        if !finite {
            self.good_steps = 0;
            self.scale *= 0.5;
            return self.scale >= Self::LOWEST;
        }
        self.good_steps += 1;
        if self.good_steps == Self::GROWTH_INTERVAL {
            self.good_steps = 0;
            self.scale *= 2.0;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::net::Piece;

    fn gradient(values: &[f32]) -> Gradient {
        Gradient(vec![Piece { offset: 0, values: Tensor::from_slice(values) }])
    }

    #[test]
    fn blocks_and_pieces_change_nothing() {
        let n = 3 * BLOCK + 17;
        let values = Tensor::arange(n, (Kind::Float, Device::Cpu)).sin();
        let step = |cuts: &[i64]| {
            let p = Tensor::zeros([n], (Kind::Float, Device::Cpu));
            let mut adam = Adam::new(n, Device::Cpu).unwrap();
            for _ in 0..2 {
                let piece = |w: &[i64]| Piece { offset: w[0], values: values.narrow(0, w[0], w[1] - w[0]) };
                assert!(adam.step(&p, &Gradient(cuts.windows(2).map(piece).collect()), 0.1).unwrap());
            }
            p
        };
        let whole = step(&[0, n]);
        assert_eq!(whole, step(&[0, 5, BLOCK + 3, n]));
        assert_ne!(whole.double_value(&[n - 1]), 0.0);
    }

    #[test]
    fn a_gradient_that_is_not_finite_is_noticed() {
        let p = Tensor::from_slice(&[0.0f32; 2]);
        let mut adam = Adam::new(2, Device::Cpu).unwrap();
        assert!(!adam.step(&p, &gradient(&[1.0, f32::NAN]), 0.1).unwrap());
        assert!(!adam.step(&p, &gradient(&[f32::INFINITY, 1.0]), 0.1).unwrap());
    }

    #[test]
    fn the_first_step_moves_every_parameter_by_the_learning_rate() {
        let p = Tensor::from_slice(&[1.0f32, 1.0, 1.0]);
        let mut adam = Adam::new(3, Device::Cpu).unwrap();
        assert!(adam.step(&p, &gradient(&[0.5, -20.0, 0.0]), 0.1).unwrap());
        let p = Vec::<f32>::try_from(&p).unwrap();
        for (got, wanted) in p.iter().zip([0.9, 1.1, 1.0]) {
            assert!((got - wanted).abs() < 1e-6, "{p:?}");
        }
    }

    #[test]
    fn it_walks_as_in_plain_arithmetic() {
        let p = Tensor::from_slice(&[0.3f32]);
        let mut adam = Adam::new(1, Device::Cpu).unwrap();
        let (mut x, mut m, mut v) = (0.3f64, 0.0, 0.0);
        for t in 1..=50 {
            let g = 2.0 * (x - 1.0) + 0.1 * f64::from(t);
            m = BETA1 * m + (1.0 - BETA1) * g;
            v = BETA2 * v + (1.0 - BETA2) * g * g;
            x -= 0.01 * (m / (1.0 - BETA1.powi(t))) / ((v / (1.0 - BETA2.powi(t))).sqrt() + EPSILON);
            assert!(adam.step(&p, &gradient(&[g as f32]), 0.01).unwrap());
        }
        assert!((p.double_value(&[0]) - x).abs() < 1e-5);
    }

    #[test]
    fn the_learning_rate_falls_in_steps() {
        let rates: Vec<f64> = [0, 29, 30, 59, 60, 79].iter().map(|&e| step_lr(1e-3, 0.1, 30, e)).collect();
        for (got, wanted) in rates.iter().zip([1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5]) {
            assert!((got / wanted - 1.0).abs() < 1e-12);
        }
    }

    #[test]
    fn the_scale_halves_on_overflow_and_grows_with_patience() {
        let mut s = Scaler::default();
        assert!(s.update(false));
        assert_eq!(s.scale, 32_768.0);
        for _ in 0..Scaler::GROWTH_INTERVAL {
            assert!(s.update(true));
        }
        assert_eq!(s.scale, 65_536.0);
        assert!((0..40).any(|_| !s.update(false)));
    }
}
