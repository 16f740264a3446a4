//! Adam on one flat tensor, and the loss scaler of float16.
//!
//! Input: parameters and gradients, flat, f32. Output: the parameters, changed in place. PyTorch's `torch.optim.Adam`
//! without weight decay; its state is plain data, so that a checkpoint can hold it.

use tch::{Device, Kind, TchError, Tensor, no_grad};

use super::TrainError;

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

    /// One step of `parameters` against `gradient`, which is used up.
    ///
    /// # Errors
    /// No room on the device.
    pub fn step(&mut self, parameters: &mut Tensor, gradient: &Tensor, learning_rate: f64) -> Result<(), TrainError> {
        self.steps += 1;
        let t = i32::try_from(self.steps).unwrap_or(i32::MAX);
        let step_size = learning_rate / (1.0 - BETA1.powi(t));
        let root2 = (1.0 - BETA2.powi(t)).sqrt();
        let update = || -> Result<(), TchError> {
            let _ = self.mean.f_lerp_(gradient, 1.0 - BETA1)?;
            let _ = self.square.f_mul_scalar_(BETA2)?;
            let _ = self.square.f_addcmul_(&gradient.f_mul_scalar(1.0 - BETA2)?, gradient)?;
            let mut root = self.square.f_sqrt()?;
            let _ = root.f_div_scalar_(root2)?;
            let _ = root.f_add_scalar_(EPSILON)?;
            let _ = parameters.f_addcdiv_(&self.mean.f_mul_scalar(-step_size)?, &root)?;
            Ok(())
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

    #[test]
    fn the_first_step_moves_every_parameter_by_the_learning_rate() {
        let mut p = Tensor::from_slice(&[1.0f32, 1.0, 1.0]);
        let mut adam = Adam::new(3, Device::Cpu).unwrap();
        adam.step(&mut p, &Tensor::from_slice(&[0.5f32, -20.0, 0.0]), 0.1).unwrap();
        let p = Vec::<f32>::try_from(&p).unwrap();
        for (got, wanted) in p.iter().zip([0.9, 1.1, 1.0]) {
            assert!((got - wanted).abs() < 1e-6, "{p:?}");
        }
    }

    #[test]
    fn it_walks_as_in_plain_arithmetic() {
        let mut p = Tensor::from_slice(&[0.3f32]);
        let mut adam = Adam::new(1, Device::Cpu).unwrap();
        let (mut x, mut m, mut v) = (0.3f64, 0.0, 0.0);
        for t in 1..=50 {
            let g = 2.0 * (x - 1.0) + 0.1 * f64::from(t);
            m = BETA1 * m + (1.0 - BETA1) * g;
            v = BETA2 * v + (1.0 - BETA2) * g * g;
            x -= 0.01 * (m / (1.0 - BETA1.powi(t))) / ((v / (1.0 - BETA2.powi(t))).sqrt() + EPSILON);
            adam.step(&mut p, &Tensor::from_slice(&[g as f32]), 0.01).unwrap();
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
