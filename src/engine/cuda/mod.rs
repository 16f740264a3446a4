//! The `cuda` backend: DARNet in f16 on an NVIDIA GPU, with kernels of our own and, where they are faster or the only
//! ones, cuDNN's.
//!
//! Input: a volume D, H, W, from host memory or already on the GPU. Output: [`Inference`]. Preparing folds batch
//! normalisation, holds every kernel that could do a convolution against a plain one on this GPU, and takes the fastest
//! that is right; the choice is kept beside the model. Activations are NDHWC, f16; every sum is f32. A session owns all of
//! its memory on the GPU from the start and replays one graph a run.
//!
//! ```text
//! stem            input patch -> matrix units                                    layers.cu
//! block: conv1    + bias, ReLU                                                   conv_sm90.cu or cuDNN
//!        conv2    + bias, and the sums over rows and columns on the way out      conv_sm90.cu or cuDNN
//!        means, depth, channel: both attentions from those sums                  layers.cu
//!        downsample, strided blocks only                                         conv_sm90.cu or cuDNN
//!        merge    relu(scale * conv2 + shortcut)                                 layers.cu
//! last merge      the feature map in f32, C, D, H, W; its means
//! host            the head's logits, softmax
//! ```
//!
//! Tolerance: probabilities within 2e-3 of the cpu backend's. Invariant: the same bits for the same input on the same GPU
//! with the same choice of kernels.
//!
//! Deliberately absent: int8, and anything that would need calibration data; work ahead of a run.
#![allow(unsafe_code)]

mod choices;
mod conv;
pub mod cudnn;
mod network;
mod weights;

use std::fmt;
use std::sync::Arc;

use crate::engine::{
    Backend, CancelToken, DeviceInput, EngineError, EngineOptions, Inference, LayerTiming, Session, check_input,
    softmax_into,
};
use crate::gpu::{Gpu, GpuError};
use crate::model::Model;

pub use conv::{Shape, Trial, Variant, multiply_text};

use network::{Network, Prepared};

/// This backend's name.
const NAME: &str = "cuda";

/// Every kernel source of this backend with options that it is compiled with, for whoever checks that they compile: file,
/// text, options, and whether it needs the features of sm_90a.
pub fn sources() -> Vec<(&'static str, String, Vec<String>, bool)> {
    network::sources()
}

/// A model on a GPU.
pub struct CudaBackend {
    prepared: Arc<Prepared>,
    note: Option<String>,
}

impl fmt::Debug for CudaBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaBackend").field("gpu", &self.prepared.gpu.name()).finish_non_exhaustive()
    }
}

fn unavailable(error: impl fmt::Display) -> EngineError {
    EngineError::Unavailable { backend: NAME, reason: error.to_string() }
}

fn failed(error: impl fmt::Display) -> EngineError {
    EngineError::Device { backend: NAME, reason: error.to_string() }
}

impl From<GpuError> for EngineError {
    fn from(error: GpuError) -> Self {
        failed(error)
    }
}

impl CudaBackend {
    /// Prepares `model` on the first GPU.
    ///
    /// # Errors
    /// [`EngineError::Unavailable`] without driver, GPU or compiler, or when no kernel does one of the convolutions.
    pub fn new(model: &Model, options: &EngineOptions) -> Result<Self, EngineError> {
        let gpu = Gpu::open(0).map_err(unavailable)?;
        let prepared = Prepared::new(&gpu, model, options.weight_cache).map_err(unavailable)?;
        let note = prepared.note();
        Ok(Self { prepared: Arc::new(prepared), note: Some(note) })
    }

    /// Holds every kernel for every convolution of `model` against the plain one and times it.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn trials(model: &Model) -> Result<Vec<Trial>, EngineError> {
        let gpu = Gpu::open(0).map_err(unavailable)?;
        network::trials(&gpu, model).map_err(unavailable)
    }

    /// The GPU it runs on.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.prepared.gpu
    }
}

impl Backend for CudaBackend {
    fn name(&self) -> &'static str {
        NAME
    }

    fn session(&self) -> Result<Box<dyn Session>, EngineError> {
        let network = Network::new(&self.prepared).map_err(failed)?;
        Ok(Box::new(CudaSession { prepared: Arc::clone(&self.prepared), network, layers: Vec::new() }))
    }

    fn note(&self) -> Option<&str> {
        self.note.as_deref()
    }

    fn instruction_set(&self) -> &'static str {
        self.prepared.arch_name
    }

    fn weight_bytes(&self) -> usize {
        self.prepared.weight_bytes()
    }

    fn session_bytes(&self) -> usize {
        network::session_bytes(&self.prepared.architecture)
    }
}

struct CudaSession {
    prepared: Arc<Prepared>,
    network: Network,
    layers: Vec<LayerTiming>,
}

impl CudaSession {
    fn finish(&mut self, cancel: &CancelToken, out: &mut Inference) -> Result<(), EngineError> {
        if cancel.is_cancelled() {
            // The network has filled its own buffers; nobody reads them.
            return Err(EngineError::Cancelled);
        }
        let (map, pooled) = self.network.outputs();
        out.feature_shape_cdhw = self.prepared.architecture.feature_shape_cdhw();
        out.feature_map.clear();
        out.feature_map.extend_from_slice(map);
        out.pooled.clear();
        out.pooled.extend_from_slice(pooled);
        out.logits.clear();
        for (row, bias) in self.prepared.head_weight.chunks_exact(pooled.len()).zip(&self.prepared.head_bias) {
            let sum: f64 = row.iter().zip(pooled).map(|(w, p)| f64::from(*w) * f64::from(*p)).sum();
            out.logits.push((sum + f64::from(*bias)) as f32);
        }
        if out.logits.iter().any(|v| !v.is_finite()) {
            return Err(EngineError::NotFinite);
        }
        softmax_into(&out.logits, &mut out.scores);
        Ok(())
    }
}

impl Session for CudaSession {
    fn run(&mut self, input: &[f32], cancel: &CancelToken, out: &mut Inference) -> Result<(), EngineError> {
        check_input(input, self.prepared.architecture.input_dhw)?;
        if cancel.is_cancelled() {
            return Err(EngineError::Cancelled);
        }
        self.network.upload(input).map_err(failed)?;
        self.network.run().map_err(failed)?;
        self.finish(cancel, out)
    }

    fn device_input(&self) -> Option<DeviceInput> {
        Some(self.network.device_input())
    }

    fn run_device(&mut self, cancel: &CancelToken, out: &mut Inference) -> Result<(), EngineError> {
        if cancel.is_cancelled() {
            return Err(EngineError::Cancelled);
        }
        self.network.run().map_err(failed)?;
        self.finish(cancel, out)
    }

    fn layers(&self) -> Vec<LayerTiming> {
        self.layers.clone()
    }

    fn device_ms(&self) -> Option<f64> {
        self.network.device_ms()
    }

    fn profile(&mut self) -> Result<(), EngineError> {
        self.layers = self.network.profile().map_err(failed)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::cpu::CpuBackend;
    use crate::model::{Architecture, AttentionOrder};

    fn distance(a: &[f32], b: &[f32]) -> f64 {
        assert_eq!(a.len(), b.len());
        let apart: f64 = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum();
        let norm: f64 = b.iter().map(|b| f64::from(*b).powi(2)).sum();
        (apart / norm.max(f64::MIN_POSITIVE)).sqrt()
    }

    fn agrees(architecture: &Architecture) {
        let model = Model::synthetic("test", architecture, 3).unwrap();
        let options = EngineOptions { weight_cache: false, ..EngineOptions::default() };
        let cuda = CudaBackend::new(&model, &options).unwrap();
        let cpu = CpuBackend::new(&model, &options, None).unwrap();
        let input = crate::model::synthetic::volume(architecture.input_dhw, 5);
        let (mut got, mut want) = (Inference::default(), Inference::default());
        let mut session = cuda.session().unwrap();
        session.run(&input, &CancelToken::new(), &mut got).unwrap();
        cpu.session().unwrap().run(&input, &CancelToken::new(), &mut want).unwrap();
        let (map, pooled) = (distance(&got.feature_map, &want.feature_map), distance(&got.pooled, &want.pooled));
        let scores = got.scores.iter().zip(&want.scores).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        println!("{architecture:?}: map {map:.1e} pooled {pooled:.1e} scores {scores:.1e} {}", cuda.note().unwrap());
        assert!(map < 1e-2 && pooled < 1e-2 && scores < 2e-3, "{:?} {:?}", got.logits, want.logits);
        let first = got.clone();
        session.run(&input, &CancelToken::new(), &mut got).unwrap();
        assert_eq!(got, first, "the same bits each run");
    }

    #[test]
    fn without_a_gpu_the_backend_is_unavailable_and_nothing_panics() {
        let model = Model::embedded().unwrap();
        match CudaBackend::new(&model, &EngineOptions::default()) {
            Ok(backend) => assert_eq!(backend.name(), NAME),
            Err(EngineError::Unavailable { backend, reason }) => {
                assert_eq!(backend, NAME);
                assert!(!reason.is_empty());
            }
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    #[ignore = "needs a GPU"]
    fn gpu_agrees_with_the_cpu_backend_at_full_size() {
        agrees(&Architecture::full());
    }

    #[test]
    #[ignore = "needs a GPU"]
    fn gpu_agrees_with_the_cpu_backend_in_both_orders_and_every_ablation() {
        for (channel_attention, depth_attention) in [(true, true), (true, false), (false, true), (false, false)] {
            for attention_order in [AttentionOrder::DepthFirst, AttentionOrder::ChannelFirst] {
                agrees(&Architecture {
                    input_dhw: [16, 64, 72],
                    channel_attention,
                    depth_attention,
                    attention_order,
                    ..Architecture::full()
                });
            }
        }
    }

    #[test]
    #[ignore = "needs a GPU"]
    fn gpu_agrees_with_the_cpu_backend_on_the_embedded_shape() {
        agrees(&Model::embedded().unwrap().manifest.architecture);
    }
}
