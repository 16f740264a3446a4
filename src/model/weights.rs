//! The tensors of a model, read from `safetensors` and checked against its architecture.
//!
//! Input: the bytes of a safetensors file. Output: f32 tensors by name. f16, bf16 and f64 are converted. The scalar
//! `num_batches_tracked` that PyTorch keeps in every batch normalisation is ignored.

use std::collections::BTreeMap;

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

use super::ModelError;
use super::architecture::{TensorRole, TensorSpec};
use super::manifest::Architecture;

/// One tensor, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its values.
    pub data: Vec<f32>,
}

/// Tensors by name.
#[derive(Clone, Debug, PartialEq)]
pub struct Weights(BTreeMap<String, Tensor>);

impl Weights {
    /// Reads a safetensors file that holds exactly the tensors of `architecture`.
    ///
    /// # Errors
    /// An unreadable file; the first tensor that is missing, misshapen, of an unknown number format, not finite (a
    /// running variance: negative), or that has no place in the architecture.
    pub fn from_safetensors(bytes: &[u8], architecture: &Architecture) -> Result<Self, ModelError> {
        let file = SafeTensors::deserialize(bytes).map_err(|e| ModelError::Safetensors(e.to_string()))?;
        let mut found: BTreeMap<String, TensorView<'_>> = file.tensors().into_iter().collect();
        let mut tensors = BTreeMap::new();
        for spec in architecture.tensors() {
            let Some(view) = found.remove(&spec.name) else {
                return Err(ModelError::MissingTensor { name: spec.name, expected: spec.shape });
            };
            if let Some(bn) = spec.name.strip_suffix(".running_var") {
                found.remove(&format!("{bn}.num_batches_tracked"));
            }
            let tensor = read_tensor(&spec, &view)?;
            tensors.insert(spec.name, tensor);
        }
        match found.into_keys().next() {
            Some(name) => Err(ModelError::ExtraTensor { name }),
            None => Ok(Self(tensors)),
        }
    }

    /// Weights from tensors made in the program; the caller answers for names and shapes.
    /// The same tensors with their values changed by `change`.
    pub fn with_values(&self, mut change: impl FnMut(&str, &mut [f32])) -> Self {
        let mut changed = self.clone();
        for (name, tensor) in &mut changed.0 {
            change(name, &mut tensor.data);
        }
        changed
    }

    pub(crate) fn from_tensors(tensors: impl Iterator<Item = (String, Tensor)>) -> Self {
        Self(tensors.collect())
    }

    /// The values of `name`.
    ///
    /// # Panics
    /// If the architecture has no such tensor: reading proved that all of its tensors are there.
    pub fn get(&self, name: &str) -> &[f32] {
        &self.tensor(name).data
    }

    /// The tensor `name`.
    ///
    /// # Panics
    /// As [`Weights::get`].
    pub fn tensor(&self, name: &str) -> &Tensor {
        match self.0.get(name) {
            Some(tensor) => tensor,
            None => panic!("the architecture has no tensor {name}"),
        }
    }

    /// Every tensor by name, sorted.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.0.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// The head's matrix, row-major classes x channels.
    pub fn head_weight(&self) -> &[f32] {
        self.get("fc.weight")
    }

    /// The head's bias, one a class.
    pub fn head_bias(&self) -> &[f32] {
        self.get("fc.bias")
    }

    /// The tensors as an f32 safetensors file.
    pub fn to_safetensors(&self) -> Vec<u8> {
        let bytes: Vec<(&str, &[usize], Vec<u8>)> = self
            .iter()
            .map(|(name, t)| {
                let raw = t.data.iter().flat_map(|v| v.to_le_bytes()).collect();
                (name, t.shape.as_slice(), raw)
            })
            .collect();
        let views: Vec<(&str, TensorView<'_>)> = bytes
            .iter()
            .map(|(name, shape, raw)| {
                let view = TensorView::new(Dtype::F32, shape.to_vec(), raw)
                    .expect("a tensor has as many values as its shape says");
                (*name, view)
            })
            .collect();
        safetensors::serialize(views, None).expect("views were checked when made")
    }
}

fn read_tensor(spec: &TensorSpec, view: &TensorView<'_>) -> Result<Tensor, ModelError> {
    if view.shape() != spec.shape {
        return Err(ModelError::Shape {
            name: spec.name.clone(),
            expected: spec.shape.clone(),
            got: view.shape().to_vec(),
        });
    }
    let raw = view.data();
    let data: Vec<f32> = match view.dtype() {
        Dtype::F32 => values(raw, f32::from_le_bytes),
        Dtype::F64 => values(raw, |b| f64::from_le_bytes(b) as f32),
        Dtype::F16 => values(raw, |b| f16_to_f32(u16::from_le_bytes(b))),
        Dtype::BF16 => values(raw, |b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)),
        other => {
            return Err(ModelError::Dtype { name: spec.name.clone(), got: format!("{other:?}") });
        }
    };
    let (expected, good): (&str, fn(&f32) -> bool) = match spec.role {
        TensorRole::BnVar => ("finite values of at least 0", |v| v.is_finite() && *v >= 0.0),
        _ => ("finite values", |v| v.is_finite()),
    };
    if let Some(index) = data.iter().position(|v| !good(v)) {
        return Err(ModelError::Value { name: spec.name.clone(), expected, index });
    }
    Ok(Tensor { shape: spec.shape.clone(), data })
}

fn values<const N: usize>(raw: &[u8], convert: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    raw.as_chunks::<N>().0.iter().map(|b| convert(*b)).collect()
}

/// IEEE 754 binary16 to binary32, exact.
pub(super) fn f16_to_f32(half: u16) -> f32 {
    let sign = u32::from(half >> 15) << 31;
    let exponent = u32::from(half >> 10) & 0x1F;
    let fraction = u32::from(half) & 0x3FF;
    let magnitude = match exponent {
        // zero and subnormals: fraction * 2^-24
        0 => (fraction as f32 * (1.0 / 16_777_216.0)).to_bits(),
        0x1F => 0x7F80_0000 | (fraction << 13),
        // rebias from 15 to 127
        _ => ((exponent + 112) << 23) | (fraction << 13),
    };
    f32::from_bits(sign | magnitude)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::synthetic;

    fn architecture() -> Architecture {
        Architecture { base_width: 2, input_dhw: [4, 16, 16], ..Architecture::full() }
    }

    type Raw = (String, Dtype, Vec<usize>, Vec<u8>);

    fn raw_tensors(weights: &Weights) -> Vec<Raw> {
        weights
            .iter()
            .map(|(name, t)| {
                let bytes = t.data.iter().flat_map(|v| v.to_le_bytes()).collect();
                (name.to_owned(), Dtype::F32, t.shape.clone(), bytes)
            })
            .collect()
    }

    fn read(tensors: &[Raw]) -> Result<Weights, ModelError> {
        let views: Vec<(&str, TensorView<'_>)> = tensors
            .iter()
            .map(|(name, dtype, shape, bytes)| (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap()))
            .collect();
        let file = safetensors::serialize(views, None).unwrap();
        Weights::from_safetensors(&file, &architecture())
    }

    #[test]
    fn weights_survive_the_file() {
        let weights = synthetic::weights(&architecture(), 3);
        let back = Weights::from_safetensors(&weights.to_safetensors(), &architecture()).unwrap();
        assert_eq!(weights, back);
    }

    #[test]
    fn a_missing_extra_or_misshapen_tensor_is_named() {
        let good = raw_tensors(&synthetic::weights(&architecture(), 3));
        let at = |name: &str| good.iter().position(|t| t.0 == name).unwrap();

        let mut missing = good.clone();
        missing.remove(at("layer2.0.downsample.0.weight"));
        let error = read(&missing).unwrap_err().to_string();
        assert!(error.contains("layer2.0.downsample.0.weight is missing"), "{error}");

        let mut extra = good.clone();
        extra.push(("layer5.0.x".into(), Dtype::F32, vec![1], vec![0; 4]));
        let error = read(&extra).unwrap_err().to_string();
        assert!(error.contains("layer5.0.x"), "{error}");

        let mut misshapen = good.clone();
        let i = at("fc.weight");
        misshapen[i].2.reverse();
        let error = read(&misshapen).unwrap_err().to_string();
        assert!(error.contains("fc.weight") && error.contains("[16, 3]"), "{error}");
    }

    #[test]
    fn a_value_no_inference_can_use_is_named() {
        let good = raw_tensors(&synthetic::weights(&architecture(), 3));
        for (name, value) in [("fc.bias", f32::NAN), ("stem.1.running_var", -1.0)] {
            let mut bad = good.clone();
            let tensor = bad.iter_mut().find(|t| t.0 == name).unwrap();
            tensor.3[4..8].copy_from_slice(&value.to_le_bytes());
            let error = read(&bad).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("element 1"), "{error}");
        }
    }

    #[test]
    fn a_pytorch_checkpoints_counters_are_ignored_and_only_those() {
        let mut tensors = raw_tensors(&synthetic::weights(&architecture(), 3));
        let counter = |name: &str| (name.to_owned(), Dtype::I64, vec![], vec![0; 8]);
        tensors.push(counter("layer1.0.bn1.num_batches_tracked"));
        tensors.push(counter("layer3.0.downsample.1.num_batches_tracked"));
        read(&tensors).unwrap();
        tensors.push(counter("other.num_batches_tracked"));
        assert!(matches!(read(&tensors), Err(ModelError::ExtraTensor { .. })));
    }

    #[test]
    fn other_float_formats_are_converted_and_integers_refused() {
        let good = raw_tensors(&synthetic::weights(&architecture(), 3));
        let i = good.iter().position(|t| t.0 == "fc.bias").unwrap();
        let with = |dtype, bytes: Vec<u8>| {
            let mut t = good.clone();
            t[i].1 = dtype;
            t[i].3 = bytes;
            read(&t)
        };
        let wide = [0.1_f64, -2.0, 3.5].iter().flat_map(|v| v.to_le_bytes());
        assert_eq!(with(Dtype::F64, wide.collect()).unwrap().head_bias(), [0.1, -2.0, 3.5]);
        let half = [0x3C00_u16, 0xC100, 0x0001].iter().flat_map(|v| v.to_le_bytes());
        let expected = [1.0, -2.5, 1.0 / 16_777_216.0];
        assert_eq!(with(Dtype::F16, half.collect()).unwrap().head_bias(), expected);
        let brain = [0x3F80_u16, 0xC020, 0x0000].iter().flat_map(|v| v.to_le_bytes());
        assert_eq!(with(Dtype::BF16, brain.collect()).unwrap().head_bias(), [1.0, -2.5, 0.0]);
        let error = with(Dtype::I32, vec![0; 12]).unwrap_err().to_string();
        assert!(error.contains("fc.bias") && error.contains("I32"), "{error}");
    }

    #[test]
    fn half_precision_keeps_infinities_and_zero() {
        assert_eq!(f16_to_f32(0x7C00), f32::INFINITY);
        assert!(f16_to_f32(0x7E00).is_nan());
        assert_eq!(f16_to_f32(0x8000).to_bits(), (-0.0_f32).to_bits());
        assert_eq!(f16_to_f32(0x7BFF), 65504.0);
    }

    #[test]
    fn a_truncated_file_is_an_error() {
        let file = synthetic::weights(&architecture(), 3).to_safetensors();
        for len in [0, 4, 8, 100, file.len() - 1] {
            let error = Weights::from_safetensors(&file[..len], &architecture()).unwrap_err();
            assert!(matches!(error, ModelError::Safetensors(_)), "{len}");
        }
    }
}
