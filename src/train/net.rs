//! The network in libtorch, for training.
//!
//! Input: an [`Architecture`] and a batch `N x 1 x D x H x W`. Output: logits `N x classes`. Names, shapes and the order
//! of the attentions are those of `model`, so weights pass between the two as they are.
//!
//! All parameters lie in one flat f32 tensor, matrices first, then what stays f32 in mixed precision (batch
//! normalisation and the head); each parameter is a view of it. The optimiser therefore is a handful of operations on
//! one tensor, casting to half precision is one, and a copy to another GPU is one. Convolution kernels lie in the memory
//! order that the convolutions want.
//!
//! Deliberately absent: inference at the scanner (see `engine`), and libtorch's own modules and autocast, which hide
//! memory order and casts.

use std::cell::OnceCell;
use std::collections::HashMap;

use tch::{Device, Kind, TchError, Tensor, no_grad};

use super::TrainError;
use crate::model::architecture::{BLOCKS, BN_EPSILON, STAGES, TensorRole};
use crate::model::synthetic::Stream;
use crate::model::{self, Architecture, AttentionOrder, Weights};

/// Momentum of the running statistics, PyTorch's default.
pub const BN_MOMENTUM: f64 = 0.1;

/// Number format of convolutions and attention in training.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32 bits throughout.
    #[default]
    Fp32,
    /// bfloat16 convolutions and attention; f32 parameters, statistics and loss.
    Bf16,
    /// float16 likewise, with a scaled loss.
    Fp16,
}

impl Precision {
    /// The kind of tensors that convolutions see.
    pub fn kind(self) -> Kind {
        match self {
            Self::Fp32 => Kind::Float,
            Self::Bf16 => Kind::BFloat16,
            Self::Fp16 => Kind::Half,
        }
    }
}

/// Where a tensor lies in its flat one.
#[derive(Clone, Debug)]
pub struct Slot {
    /// Its name in a weights file.
    pub name: String,
    /// Its shape there.
    pub shape: Vec<i64>,
    /// First element.
    pub offset: i64,
    /// Elements.
    pub len: i64,
    /// What it is for.
    pub role: TensorRole,
    /// Whether it lies with its channels last: O, D, H, W, I.
    channels_last: bool,
}

impl Slot {
    /// The view of this slot in `flat`, in the shape of the weights file.
    fn view(&self, flat: &Tensor) -> Result<Tensor, TchError> {
        let part = flat.f_narrow(0, self.offset, self.len)?;
        match (self.channels_last, self.shape.as_slice()) {
            (true, &[o, i, d, h, w]) => part.f_view([o, d, h, w, i])?.f_permute([0, 4, 1, 2, 3]),
            _ => part.f_view(self.shape.as_slice()),
        }
    }

    /// `t`, in the shape of the weights file, as it lies in the flat tensor.
    fn flatten(&self, t: &Tensor) -> Result<Tensor, TchError> {
        if self.channels_last { t.f_permute([0, 2, 3, 4, 1])?.f_reshape(-1) } else { t.f_reshape(-1) }
    }
}

/// Every tensor begins at a multiple of so many elements of its flat one, 128 bytes in half precision. cuDNN has no kernel
/// with matrix units for a convolution whose kernel lies at less than 16 bytes' alignment, and attention has biases of
/// a single element.
pub const ALIGNED: i64 = 64;

/// `parts` at the places of `slots` in a flat tensor that stands for the elements from `from` to `to`, 0 in the gaps.
fn joined(slots: &[Slot], parts: Vec<Tensor>, from: i64, to: i64) -> Result<Tensor, TchError> {
    let Some(first) = parts.first() else { return Tensor::f_zeros([to - from], (Kind::Float, Device::Cpu)) };
    let gap = Tensor::f_zeros([ALIGNED], (first.kind(), first.device()))?;
    let mut all = Vec::with_capacity(2 * parts.len());
    let ends = slots.iter().skip(1).map(|s| s.offset).chain([to]);
    for ((slot, part), end) in slots.iter().zip(parts).zip(ends) {
        let rest = end - slot.offset - slot.len;
        all.push(part);
        if rest > 0 {
            all.push(gap.f_narrow(0, 0, rest)?);
        }
    }
    Tensor::f_cat(&all, 0)
}

/// Where everything lies.
#[derive(Debug)]
pub struct Layout {
    /// The network.
    pub architecture: Architecture,
    /// Parameters: those that may be cast first.
    pub slots: Vec<Slot>,
    /// Running statistics.
    pub buffers: Vec<Slot>,
    pub(super) index: HashMap<String, usize>,
    buffer_index: HashMap<String, usize>,
    /// Elements of all parameters and running statistics, and of the parameters that may be cast, gaps included.
    len: i64,
    buffer_len: i64,
    cast_len: i64,
    /// Of `slots`, how many may be cast.
    cast_slots: usize,
    channels_last: bool,
}

impl Layout {
    /// The layout of `architecture`, kernels with channels last or not.
    ///
    /// # Errors
    /// An architecture out of range.
    pub fn new(architecture: &Architecture, channels_last: bool) -> Result<Self, TrainError> {
        architecture.validate()?;
        let (mut cast, mut kept, mut buffers) = (Vec::new(), Vec::new(), Vec::new());
        for spec in architecture.tensors() {
            let shape: Vec<i64> = spec.shape.iter().map(|&n| n as i64).collect();
            // With one input channel both orders are the same memory.
            let last = channels_last && shape.len() == 5 && shape[1] > 1;
            let len = spec.len() as i64;
            let slot = Slot { name: spec.name, shape, offset: 0, len, role: spec.role, channels_last: last };
            match spec.role {
                TensorRole::BnMean | TensorRole::BnVar => buffers.push(slot),
                TensorRole::Kernel { .. } | TensorRole::Bias if !slot.name.starts_with("fc.") => cast.push(slot),
                _ => kept.push(slot),
            }
        }
        let place = |slots: &mut [Slot]| {
            slots.iter_mut().fold(0, |at, slot| {
                slot.offset = at;
                (at + slot.len + ALIGNED - 1) / ALIGNED * ALIGNED
            })
        };
        let cast_len = place(&mut cast);
        let cast_slots = cast.len();
        let mut slots = cast;
        slots.append(&mut kept);
        let len = place(&mut slots);
        let buffer_len = place(&mut buffers);
        let index = |slots: &[Slot]| slots.iter().enumerate().map(|(i, s)| (s.name.clone(), i)).collect();
        Ok(Self {
            architecture: architecture.clone(),
            index: index(&slots),
            buffer_index: index(&buffers),
            slots,
            buffers,
            len,
            buffer_len,
            cast_len,
            cast_slots,
            channels_last,
        })
    }

    /// Elements of the flat tensor of parameters, the gaps between them included.
    pub fn len(&self) -> i64 {
        self.len
    }

    /// Whether activations and kernels lie with their channels last.
    pub fn channels_last(&self) -> bool {
        self.channels_last
    }

    /// Whether there are none; never.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Elements of the flat tensor of running statistics, gaps included.
    pub fn buffer_len(&self) -> i64 {
        self.buffer_len
    }

    /// `values` by slot name, in one flat tensor of `len` elements on the processor, 0 in the gaps.
    fn pack(slots: &[Slot], len: i64, values: impl Fn(&Slot) -> Vec<f32>) -> Result<Tensor, TchError> {
        let parts = slots
            .iter()
            .map(|slot| slot.flatten(&Tensor::f_from_slice(&values(slot))?.f_view(slot.shape.as_slice())?))
            .collect::<Result<Vec<_>, TchError>>()?;
        joined(slots, parts, 0, len)
    }

    /// The values of each slot of `flat`, row-major in the shape of the weights file.
    fn unpack(slots: &[Slot], flat: &Tensor) -> Result<Vec<Vec<f32>>, TchError> {
        let flat = flat.f_to_device(Device::Cpu)?;
        slots.iter().map(|slot| Vec::<f32>::try_from(&slot.view(&flat)?.f_contiguous()?.f_view(-1)?)).collect()
    }

    /// A flat parameter tensor from values by name.
    pub(super) fn pack_parameters(&self, values: impl Fn(&str) -> Vec<f32>) -> Result<Tensor, TrainError> {
        Ok(Self::pack(&self.slots, self.len, |slot| values(&slot.name))?)
    }

    /// A flat tensor of running statistics from values by name.
    pub(super) fn pack_buffers(&self, values: impl Fn(&str) -> Vec<f32>) -> Result<Tensor, TrainError> {
        Ok(Self::pack(&self.buffers, self.buffer_len, |slot| values(&slot.name))?)
    }

    /// The parameters in `flat`, in the order of [`Layout::slots`].
    pub(super) fn unpack_parameters(&self, flat: &Tensor) -> Result<Vec<Vec<f32>>, TrainError> {
        Ok(Self::unpack(&self.slots, flat)?)
    }

    /// The running statistics in `flat`, in the order of [`Layout::buffers`].
    pub(super) fn unpack_buffers(&self, flat: &Tensor) -> Result<Vec<Vec<f32>>, TrainError> {
        Ok(Self::unpack(&self.buffers, flat)?)
    }

    /// `x`, N x C x D x H x W, in the memory order of this layout.
    pub(super) fn arrange(&self, x: &Tensor) -> Result<Tensor, TchError> {
        if self.channels_last {
            x.f_permute([0, 2, 3, 4, 1])?.f_contiguous()?.f_permute([0, 4, 1, 2, 3])
        } else {
            x.f_contiguous()
        }
    }
}

/// Initial weights: Kaiming normal over the outputs for convolutions, N(0, 0.01) for linear layers, zero biases, unit
/// batch normalisation. Each tensor has its own stream of `seed`, so that a shared part of two variants starts equal.
pub fn initial_weights(architecture: &Architecture, seed: u64) -> Weights {
    Weights::from_tensors(architecture.tensors().into_iter().map(|spec| {
        let n = spec.len();
        let data = match spec.role {
            TensorRole::Kernel { .. } => {
                let kernel: usize = spec.shape.iter().skip(2).product();
                let fan_out = spec.shape[0] * kernel;
                let deviation = if spec.shape.len() == 5 { (2.0 / fan_out as f64).sqrt() } else { 0.01 };
                normal(&Stream::new(seed, &spec.name), n, deviation)
            }
            TensorRole::BnWeight | TensorRole::BnVar => vec![1.0; n],
            TensorRole::Bias | TensorRole::BnBias | TensorRole::BnMean => vec![0.0; n],
        };
        (spec.name, model::Tensor { shape: spec.shape, data })
    }))
}

/// `n` values of N(0, `deviation`), Box and Muller's method.
fn normal(stream: &Stream, n: usize, deviation: f64) -> Vec<f32> {
    (0..n as u64)
        .map(|i| {
            // 1 - u is in (0, 1], so that the logarithm is finite.
            let radius = (-2.0 * (1.0 - stream.uniform(2 * i)).ln()).sqrt();
            (deviation * radius * (std::f64::consts::TAU * stream.uniform(2 * i + 1)).cos()) as f32
        })
        .collect()
}

/// A run of a flat gradient.
pub struct Piece {
    /// Its first element in the flat tensor of parameters.
    pub offset: i64,
    /// Its values, f32, one axis.
    pub values: Tensor,
}

/// A gradient by all parameters, in pieces that cover them in the flat tensor: one on a GPU, where each operation has its price,
/// one a parameter on the processor, where each copy has.
pub struct Gradient(pub Vec<Piece>);

impl Gradient {
    /// Adds `other`, whose pieces are the same.
    ///
    /// # Errors
    /// Pieces that differ.
    pub fn add(&mut self, other: &Self) -> Result<(), TrainError> {
        no_grad(|| {
            for (to, from) in self.0.iter_mut().zip(&other.0) {
                let _ = to.values.f_add_(&from.values)?;
            }
            Ok(())
        })
    }

    /// Multiplies by `factor`.
    ///
    /// # Errors
    /// A device that fails.
    pub fn scale(&mut self, factor: f64) -> Result<(), TrainError> {
        no_grad(|| {
            for piece in &mut self.0 {
                let _ = piece.values.f_mul_scalar_(factor)?;
            }
            Ok(())
        })
    }

    /// The same on `device`.
    ///
    /// # Errors
    /// No room there.
    pub fn to_device(self, device: Device) -> Result<Self, TrainError> {
        let moved = self.0.into_iter().map(|p| Ok(Piece { offset: p.offset, values: p.values.f_to_device(device)? }));
        Ok(Self(moved.collect::<Result<_, TchError>>()?))
    }

    /// In one flat tensor of `len` elements, 0 where no piece is.
    ///
    /// # Errors
    /// No room on the device.
    pub fn flat(&self, len: i64) -> Result<Tensor, TrainError> {
        let device = self.0.first().map_or(Device::Cpu, |p| p.values.device());
        let flat = Tensor::f_zeros([len], (Kind::Float, device))?;
        for piece in &self.0 {
            flat.f_narrow(0, piece.offset, piece.values.size1()?)?.f_copy_(&piece.values)?;
        }
        Ok(flat)
    }
}

/// The network on one device.
pub struct Replica {
    /// Where it is.
    pub device: Device,
    /// All parameters.
    pub flat: Tensor,
    /// All running statistics.
    pub buffers: Tensor,
    /// Views of `flat` that gradients are wanted for, in the order of the layout's slots.
    leaves: Vec<Tensor>,
    /// What may be cast in half precision, and its views: made once, filled anew for each step.
    half: OnceCell<(Tensor, Vec<Tensor>)>,
    buffer_views: Vec<Tensor>,
}

impl Replica {
    /// A replica with the values of `flat` and `buffers`, which are copied to `device`.
    ///
    /// # Errors
    /// What libtorch refuses, no room on the device above all.
    pub fn new(layout: &Layout, device: Device, flat: &Tensor, buffers: &Tensor) -> Result<Self, TrainError> {
        let copy = |t: &Tensor| t.f_to_device(device)?.f_to_kind(Kind::Float)?.f_detach_copy();
        let flat = copy(flat)?;
        let buffers = copy(buffers)?;
        let leaves = leaves(&layout.slots, &flat)?;
        let buffer_views = layout.buffers.iter().map(|slot| slot.view(&buffers)).collect::<Result<_, _>>()?;
        Ok(Self { device, flat, buffers, leaves, half: OnceCell::new(), buffer_views })
    }

    /// A replica of `weights`.
    ///
    /// # Errors
    /// As [`Replica::new`].
    pub fn of_weights(layout: &Layout, device: Device, weights: &Weights) -> Result<Self, TrainError> {
        let flat = layout.pack_parameters(|name| weights.get(name).to_vec())?;
        let buffers = layout.pack_buffers(|name| weights.get(name).to_vec())?;
        Self::new(layout, device, &flat, &buffers)
    }

    /// The weights as they are now.
    ///
    /// # Errors
    /// A device that fails.
    pub fn weights(&self, layout: &Layout) -> Result<Weights, TrainError> {
        let parameters = layout.unpack_parameters(&self.flat)?;
        let buffers = layout.unpack_buffers(&self.buffers)?;
        let slots = layout.slots.iter().zip(parameters).chain(layout.buffers.iter().zip(buffers));
        Ok(Weights::from_tensors(slots.map(|(slot, data)| {
            let shape = slot.shape.iter().map(|&n| n as usize).collect();
            (slot.name.clone(), model::Tensor { shape, data })
        })))
    }

    /// Views to differentiate by: the parameters themselves, or those that may be cast in `precision`, cast anew. What an
    /// earlier call returned changes with them.
    ///
    /// # Errors
    /// No room on the device.
    pub fn leaves(&self, layout: &Layout, precision: Precision) -> Result<Vec<Tensor>, TrainError> {
        let shallow = |leaves: &[Tensor]| leaves.iter().map(Tensor::shallow_clone).collect::<Vec<_>>();
        if precision == Precision::Fp32 {
            return Ok(shallow(&self.leaves));
        }
        let kind = precision.kind();
        let (cast, views) = match self.half.get().filter(|(cast, _)| cast.kind() == kind) {
            Some(kept) => kept,
            None => {
                let cast = Tensor::f_empty([layout.cast_len], (kind, self.device))?;
                let views = leaves(&layout.slots[..layout.cast_slots], &cast)?;
                // One precision a replica: the first one stays.
                self.half.get_or_init(|| (cast, views))
            }
        };
        if cast.kind() != kind {
            return Err(TrainError::Torch("a replica in two precisions".to_owned()));
        }
        no_grad(|| cast.shallow_clone().f_copy_(&self.flat.f_narrow(0, 0, layout.cast_len)?))?;
        let mut all = shallow(views);
        all.extend(shallow(&self.leaves[layout.cast_slots..]));
        Ok(all)
    }

    /// Gradients of `loss` by `leaves`.
    ///
    /// # Errors
    /// No room on the device.
    pub fn gradient(&self, layout: &Layout, loss: &Tensor, leaves: &[Tensor]) -> Result<Gradient, TrainError> {
        let gradients = Tensor::f_run_backward(&[loss], leaves, false, false)?;
        self.collect(layout, gradients)
    }

    /// `gradients` by the leaves, in the order of the layout's slots, as one gradient.
    pub(super) fn collect(&self, layout: &Layout, gradients: Vec<Tensor>) -> Result<Gradient, TrainError> {
        no_grad(|| {
            let parts =
                layout.slots.iter().zip(&gradients).map(|(s, g)| s.flatten(g)).collect::<Result<Vec<_>, TchError>>()?;
            if self.device == Device::Cpu {
                let pieces = layout.slots.iter().zip(parts).map(|(slot, part)| {
                    Ok(Piece { offset: slot.offset, values: part.f_to_kind(Kind::Float)?.f_contiguous()? })
                });
                return Ok(Gradient(pieces.collect::<Result<_, TchError>>()?));
            }
            let mut cast = parts;
            let kept = cast.split_off(layout.cast_slots);
            let (cast_slots, kept_slots) = layout.slots.split_at(layout.cast_slots);
            let cast = joined(cast_slots, cast, 0, layout.cast_len)?.f_to_kind(Kind::Float)?;
            let flat = Tensor::f_cat(&[cast, joined(kept_slots, kept, layout.cast_len, layout.len)?], 0)?;
            Ok(Gradient(vec![Piece { offset: 0, values: flat }]))
        })
    }

    /// Logits of the batch `x`, `N x 1 x D x H x W`, f32. In training, batch statistics are used and remembered.
    ///
    /// # Errors
    /// A batch of another shape, or no room on the device.
    pub fn forward(&self, layout: &Layout, leaves: &[Tensor], x: &Tensor, train: bool) -> Result<Tensor, TrainError> {
        Ok(self.pass(layout, leaves, train).logits(x)?.0)
    }

    /// In training, the logits and how far the maps of the true classes `target` are from `lesions`.
    ///
    /// The map of a class is the weighted sum of the last feature map with that class's row of the head, as in explaining.
    /// Its softmax over cells is compared with the share of the lesion in each cell by cross-entropy; the result is the
    /// mean over the batch, in which a scan without lesion counts as 0. A constant added to a map changes nothing, so the
    /// term says where lesion is and leaves it to the classification how much of it makes a class.
    ///
    /// `x` is `N x 1 x D x H x W`, `lesions` `N x D x H x W`, 1 on lesion, both f32.
    ///
    /// # Errors
    /// As [`Replica::forward`].
    pub fn forward_with_lesions(
        &self,
        layout: &Layout,
        leaves: &[Tensor],
        x: &Tensor,
        target: &Tensor,
        lesions: &Tensor,
    ) -> Result<(Tensor, Tensor), TrainError> {
        let pass = self.pass(layout, leaves, true);
        let (logits, _, map) = pass.logits(x)?;
        let (n, c, d, h, w) = map.size5()?;
        let cells = d * h * w;
        let share = lesions.f_unsqueeze(1)?.f_adaptive_avg_pool3d([d, h, w])?.f_reshape([n, cells])?;
        let all = share.f_sum_dim_intlist(&[1i64][..], true, Kind::Float)?;
        let share = share.f_div(&all.f_clamp_min(f64::from(f32::MIN_POSITIVE))?)?;
        let rows = pass.parameter("fc.weight").f_to_kind(Kind::Float)?.f_index_select(0, target)?;
        let maps = rows.f_reshape([n, 1, c])?.f_bmm(&map.f_reshape([n, c, cells])?)?.f_reshape([n, cells])?;
        let term = maps.f_log_softmax(-1, Kind::Float)?.f_mul(&share)?.f_sum(Kind::Float)?;
        Ok((logits, term.f_mul_scalar(-1.0 / n as f64)?))
    }

    /// Logits, the pooled vector `N x C` and the last feature map `N x C x D x H x W`, all f32, in evaluation.
    ///
    /// # Errors
    /// As [`Replica::forward`].
    pub fn explain(&self, layout: &Layout, x: &Tensor) -> Result<(Tensor, Tensor, Tensor), TrainError> {
        no_grad(|| Ok(self.pass(layout, &self.leaves, false).logits(x)?))
    }

    pub(super) fn pass<'a>(&'a self, layout: &'a Layout, leaves: &'a [Tensor], train: bool) -> Pass<'a> {
        // The processor's convolutions have a kernel of their own for one channel.
        Pass { layout, leaves, buffers: &self.buffer_views, train, stem_by_phases: self.device.is_cuda() }
    }
}

fn leaves(slots: &[Slot], flat: &Tensor) -> Result<Vec<Tensor>, TrainError> {
    slots.iter().map(|slot| Ok(slot.view(flat)?.f_detach()?.f_set_requires_grad(true)?)).collect()
}

/// Channels of the stem's input by phases: twelve and padding.
const PHASE_CHANNELS: i64 = 16;

/// `x`, `N x 1 x D x H x W`, for the stem as a two-dimensional 4x4 convolution with stride 1: `ND x 16 x A x B`.
///
/// With one input channel a GPU's matrix units have nothing to work on. The even and odd rows and columns of three
/// neighbouring planes make twelve channels, padded to sixteen. Same sums, another order.
pub(super) fn phases(x: &Tensor) -> Result<Tensor, TchError> {
    let (n, _, d, h, w) = x.size5()?;
    let (a, b) = ((h + 1) / 2 + 3, (w + 1) / 2 + 3);
    let padded = x.f_squeeze_dim(1)?.f_constant_pad_nd([3, 2 * b - w - 3, 3, 2 * a - h - 3, 1, 1])?;
    let phases = padded.f_reshape([n, d + 2, a, 2, b, 2])?.f_unfold(1, 3, 1)?;
    let phases = phases.f_permute([0, 1, 2, 4, 6, 3, 5])?.f_reshape([n * d, a, b, 12])?;
    phases.f_constant_pad_nd([0, PHASE_CHANNELS - 12])?.f_permute([0, 3, 1, 2])
}

/// The stem's kernel for [`phases`]: with an eighth row and column of zeros, `C x 16 x 4 x 4`.
pub(super) fn phase_kernel(weight: &Tensor) -> Result<Tensor, TchError> {
    let (out, _, taps, _, _) = weight.size5()?;
    let kernel = weight.f_constant_pad_nd([0, 1, 0, 1])?.f_reshape([out, taps, 4, 2, 4, 2])?;
    let kernel = kernel.f_permute([0, 2, 4, 1, 3, 5])?.f_reshape([out, 4, 4, 12])?;
    kernel.f_constant_pad_nd([0, PHASE_CHANNELS - 12])?.f_permute([0, 3, 1, 2])
}

/// `ND x C x H x W` as `N x C x D x H x W`; with channels last both are the same memory.
pub(super) fn volumes_of(y: &Tensor, n: i64) -> Result<Tensor, TchError> {
    let (planes, c, h, w) = y.size4()?;
    y.f_permute([0, 2, 3, 1])?.f_reshape([n, planes / n, h, w, c])?.f_permute([0, 4, 1, 2, 3])
}

/// One forward pass.
pub(super) struct Pass<'a> {
    pub(super) layout: &'a Layout,
    leaves: &'a [Tensor],
    pub(super) buffers: &'a [Tensor],
    train: bool,
    stem_by_phases: bool,
}

impl Pass<'_> {
    pub(super) fn parameter(&self, name: &str) -> &Tensor {
        &self.leaves[self.layout.index[name]]
    }

    pub(super) fn buffer(&self, name: &str) -> &Tensor {
        &self.buffers[self.layout.buffer_index[name]]
    }

    fn conv_bn(&self, x: &Tensor, conv: &str, bn: &str, stride: [i64; 3], pad: [i64; 3]) -> Result<Tensor, TchError> {
        let weight = self.parameter(&format!("{conv}.weight"));
        self.batch_norm(&x.f_conv3d(weight, None::<Tensor>, stride, pad, [1, 1, 1], 1)?, bn)
    }

    fn batch_norm(&self, y: &Tensor, bn: &str) -> Result<Tensor, TchError> {
        let buffer = |name: &str| self.buffer(&format!("{bn}.{name}"));
        y.f_batch_norm(
            Some(self.parameter(&format!("{bn}.weight"))),
            Some(self.parameter(&format!("{bn}.bias"))),
            Some(buffer("running_mean")),
            Some(buffer("running_var")),
            self.train,
            BN_MOMENTUM,
            f64::from(BN_EPSILON),
            true,
        )
    }

    pub(super) fn linear(&self, x: &Tensor, name: &str) -> Result<Tensor, TchError> {
        x.f_linear(self.parameter(&format!("{name}.weight")), Some(self.parameter(&format!("{name}.bias"))))
    }

    /// Two linear layers and a sigmoid over `mean`, `N x ends`.
    fn gate(&self, mean: &Tensor, name: &str) -> Result<Tensor, TchError> {
        let hidden = self.linear(mean, &format!("{name}.fc.0"))?.f_relu_()?;
        self.linear(&hidden, &format!("{name}.fc.2"))?.f_sigmoid()
    }

    /// What the block's attentions scale each plane by, `N x C x D`, from the means of its planes; none without attention.
    ///
    /// The second attention looks at means of what the first one scaled, and a scale that is the same all over a plane
    /// scales its mean: both follow from the plane means, and the block's output is multiplied once.
    pub(super) fn attention(
        &self,
        name: &str,
        planes: impl FnOnce() -> Result<Tensor, TchError>,
    ) -> Result<Option<Tensor>, TchError> {
        let architecture = &self.layout.architecture;
        let (da, se) = (format!("{name}.da"), format!("{name}.se"));
        let depth = |planes: &Tensor| {
            let shape = planes.size();
            self.gate(&planes.f_flatten(1, -1)?, &da)?.f_view(shape.as_slice())
        };
        let channel =
            |planes: &Tensor| self.gate(&planes.f_mean_dim(&[2i64][..], false, None::<Kind>)?, &se)?.f_unsqueeze(-1);
        let scale = match (architecture.depth_attention, architecture.channel_attention) {
            (false, false) => return Ok(None),
            (false, true) => {
                let planes = planes()?;
                channel(&planes)?.f_expand(planes.size().as_slice(), false)?
            }
            (true, false) => depth(&planes()?)?,
            (true, true) => {
                let planes = planes()?;
                if architecture.attention_order == AttentionOrder::DepthFirst {
                    let by_depth = depth(&planes)?;
                    by_depth.f_mul(&channel(&planes.f_mul(&by_depth)?)?)?
                } else {
                    let by_channel = channel(&planes)?;
                    depth(&planes.f_mul(&by_channel)?)?.f_mul(&by_channel)?
                }
            }
        };
        Ok(Some(scale))
    }

    fn block(&self, x: &Tensor, name: &str, strided: bool) -> Result<Tensor, TchError> {
        let stride = if strided { [2; 3] } else { [1; 3] };
        let y = self.conv_bn(x, &format!("{name}.conv1"), &format!("{name}.bn1"), stride, [1; 3])?.f_relu_()?;
        let mut y = self.conv_bn(&y, &format!("{name}.conv2"), &format!("{name}.bn2"), [1; 3], [1; 3])?;
        // A sum's gradient is broadcast and a mean's written out; a sum of float16 may overflow.
        let means = || match y.kind() {
            Kind::Half => y.f_mean_dim(&[3i64, 4][..], false, None::<Kind>),
            _ => {
                let (_, _, _, h, w) = y.size5()?;
                y.f_sum_dim_intlist(&[3i64, 4][..], false, None::<Kind>)?.f_mul_scalar(1.0 / (h * w) as f64)
            }
        };
        if let Some(scale) = self.attention(name, means)? {
            y = y.f_mul(&scale.f_unsqueeze(-1)?.f_unsqueeze(-1)?)?;
        }
        let mut y = if strided {
            let (conv, bn) = (format!("{name}.downsample.0"), format!("{name}.downsample.1"));
            y.f_add_(&self.conv_bn(x, &conv, &bn, [2; 3], [0; 3])?)?
        } else {
            y.f_add_(x)?
        };
        y.f_relu_()
    }

    /// The stem's convolution of `x`, `N x 1 x D x H x W`, by [`phases`].
    fn stem_by_phases(&self, x: &Tensor) -> Result<Tensor, TchError> {
        let y = phases(x)?.f_conv2d(
            &phase_kernel(self.parameter("stem.0.weight"))?,
            None::<Tensor>,
            [1; 2],
            [0; 2],
            [1; 2],
            1,
        )?;
        volumes_of(&y, x.size()[0])
    }

    fn logits(&self, x: &Tensor) -> Result<(Tensor, Tensor, Tensor), TchError> {
        let kind = self.parameter("stem.0.weight").kind();
        let x = x.f_to_kind(kind)?;
        let x = if self.stem_by_phases {
            self.stem_by_phases(&x)?
        } else {
            let weight = self.parameter("stem.0.weight");
            self.layout.arrange(&x)?.f_conv3d(weight, None::<Tensor>, [1, 2, 2], [1, 3, 3], [1, 1, 1], 1)?
        };
        let mut x = self.batch_norm(&x, "stem.1")?.f_relu_()?;
        for stage in 1..=STAGES {
            for block in 0..BLOCKS {
                x = self.block(&x, &format!("layer{stage}.{block}"), stage > 1 && block == 0)?;
            }
        }
        let pooled = x.f_mean_dim(&[2i64, 3, 4][..], false, Kind::Float)?;
        Ok((self.linear(&pooled, "fc")?, pooled, x.f_to_kind(Kind::Float)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{BackendKind, CancelToken, EngineOptions, Inference, prepare};
    use crate::model::{Model, synthetic};

    fn small() -> Architecture {
        Architecture { base_width: 4, input_dhw: [8, 20, 24], ..Architecture::full() }
    }

    fn input(dhw: [usize; 3]) -> Tensor {
        let [d, h, w] = dhw.map(|n| n as i64);
        Tensor::from_slice(&synthetic::volume(dhw, 5)).view([1, 1, d, h, w])
    }

    fn variants() -> impl Iterator<Item = Architecture> {
        [AttentionOrder::DepthFirst, AttentionOrder::ChannelFirst].into_iter().flat_map(|attention_order| {
            [(true, true), (true, false), (false, true), (false, false)].into_iter().map(
                move |(channel_attention, depth_attention)| Architecture {
                    attention_order,
                    channel_attention,
                    depth_attention,
                    ..small()
                },
            )
        })
    }

    #[test]
    fn every_variant_agrees_with_the_reference_backend() {
        for architecture in variants() {
            let model = Model::synthetic("t", &architecture, 3).unwrap();
            let backend =
                prepare(BackendKind::Reference, &model, &EngineOptions { threads: 1, ..EngineOptions::default() })
                    .unwrap();
            let mut out = Inference::default();
            let volume = synthetic::volume(architecture.input_dhw, 5);
            backend.session().unwrap().run(&volume, &CancelToken::new(), &mut out).unwrap();
            for channels_last in [false, true] {
                let layout = Layout::new(&architecture, channels_last).unwrap();
                let net = Replica::of_weights(&layout, Device::Cpu, &model.weights).unwrap();
                let (logits, pooled, map) = net.explain(&layout, &input(architecture.input_dhw)).unwrap();
                let scale = out.logits.iter().fold(1.0f32, |m, v| m.max(v.abs()));
                for (ours, theirs) in [(logits, &out.logits), (pooled, &out.pooled), (map, &out.feature_map)] {
                    let ours = Vec::<f32>::try_from(ours.contiguous().view(-1)).unwrap();
                    assert_eq!(ours.len(), theirs.len());
                    let far = ours.iter().zip(theirs).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
                    assert!(far <= 1e-4 * scale, "{architecture:?} channels last {channels_last}: {far}");
                }
            }
        }
    }

    #[test]
    fn the_lesion_term_is_the_cross_entropy_of_map_and_mask() {
        // The map has 1 x 2 x 2 cells.
        let architecture = small();
        let layout = Layout::new(&architecture, true).unwrap();
        let net = Replica::of_weights(&layout, Device::Cpu, &initial_weights(&architecture, 3)).unwrap();
        let leaves = net.leaves(&layout, Precision::Fp32).unwrap();
        let [d, h, w] = architecture.input_dhw.map(|n| n as i64);
        let x = Tensor::cat(
            &[input(architecture.input_dhw), input(architecture.input_dhw) * 0.5, input(architecture.input_dhw) * 0.3],
            0,
        );
        let target = Tensor::from_slice(&[1i64, 0, 2]);
        // The first scan's lesion is in the right half, the second's everywhere, the third has none.
        let lesions = Tensor::zeros([3, d, h, w], (Kind::Float, Device::Cpu));
        let _ = lesions.get(0).narrow(2, w / 2, w / 2).fill_(1.0);
        let _ = lesions.get(1).fill_(1.0);
        let (logits, term) = net.forward_with_lesions(&layout, &leaves, &x, &target, &lesions).unwrap();
        let (plain, _, map) = net.pass(&layout, &leaves, true).logits(&x).unwrap();
        assert!((&logits - &plain).abs().max().double_value(&[]) < 1e-6);
        let (n, c, cells) = (3, map.size()[1], map.size()[2..].iter().product::<i64>());
        assert_eq!(cells, 4);
        let map = map.contiguous().view([n, c, cells]);
        let head = &leaves[layout.index["fc.weight"]];
        let mut expected = 0.0;
        for (scan, shares) in [(0, [0.0, 0.5, 0.0, 0.5]), (1, [0.25; 4])] {
            let class = target.int64_value(&[scan]);
            let at = |cell: i64| -> f64 {
                (0..c).map(|k| head.double_value(&[class, k]) * map.double_value(&[scan, k, cell])).sum()
            };
            let all = (0..cells).map(|cell| at(cell).exp()).sum::<f64>().ln();
            expected -= shares.iter().enumerate().map(|(cell, q)| q * (at(cell as i64) - all)).sum::<f64>() / n as f64;
        }
        let got = term.double_value(&[]);
        assert!((got - expected).abs() < 1e-5, "{got}, expected {expected}");
    }

    #[test]
    fn the_stem_by_phases_is_the_stem_and_so_is_its_gradient() {
        // Odd sides have one more row of padding.
        for input_dhw in [[8, 20, 24], [5, 17, 23]] {
            let architecture = Architecture { input_dhw, ..small() };
            let weights = initial_weights(&architecture, 3);
            let layout = Layout::new(&architecture, true).unwrap();
            let net = Replica::of_weights(&layout, Device::Cpu, &weights).unwrap();
            let run = |stem_by_phases| {
                let leaves = net.leaves(&layout, Precision::Fp32).unwrap();
                let pass = Pass { stem_by_phases, ..net.pass(&layout, &leaves, true) };
                let logits = pass.logits(&input(input_dhw)).unwrap().0;
                let loss = logits.cross_entropy_for_logits(&Tensor::from_slice(&[1i64]));
                let flat = net.gradient(&layout, &loss, &leaves).unwrap().flat(layout.len()).unwrap();
                let stem = &layout.slots[layout.index["stem.0.weight"]];
                (logits, flat.narrow(0, stem.offset, stem.len))
            };
            let ((logits, gradient), (logits2, gradient2)) = (run(false), run(true));
            assert!((&logits - &logits2).abs().max().double_value(&[]) < 1e-4);
            let far = (&gradient - &gradient2).abs().max().double_value(&[]);
            let largest = gradient.abs().max().double_value(&[]);
            assert!(largest > 0.0 && far < 1e-3 * largest, "{far} of {largest}");
        }
    }

    #[test]
    fn every_tensor_is_aligned_for_matrix_units() {
        for architecture in variants() {
            for channels_last in [false, true] {
                let layout =
                    Layout::new(&Architecture { base_width: 16, ..architecture.clone() }, channels_last).unwrap();
                assert!(layout.slots.iter().all(|s| s.offset % ALIGNED == 0));
                let mut end = 0;
                for slot in &layout.slots {
                    assert!(slot.offset >= end && slot.offset - end < ALIGNED, "{}", slot.name);
                    end = slot.offset + slot.len;
                }
                assert!(end <= layout.len());
            }
        }
    }

    #[test]
    fn weights_come_back_as_they_went_in() {
        for channels_last in [false, true] {
            let layout = Layout::new(&small(), channels_last).unwrap();
            let weights = synthetic::weights(&small(), 9);
            let net = Replica::of_weights(&layout, Device::Cpu, &weights).unwrap();
            assert_eq!(net.weights(&layout).unwrap(), weights);
        }
    }

    #[test]
    fn gradients_do_not_depend_on_the_memory_order() {
        let weights = initial_weights(&small(), 2);
        let gradient = |channels_last| {
            let layout = Layout::new(&small(), channels_last).unwrap();
            let net = Replica::of_weights(&layout, Device::Cpu, &weights).unwrap();
            let leaves = net.leaves(&layout, Precision::Fp32).unwrap();
            let logits = net.forward(&layout, &leaves, &input(small().input_dhw), true).unwrap();
            let loss = logits.cross_entropy_for_logits(&Tensor::from_slice(&[1i64]));
            let flat = net.gradient(&layout, &loss, &leaves).unwrap().flat(layout.len()).unwrap();
            layout.unpack_parameters(&flat).unwrap().concat()
        };
        let (a, b) = (gradient(false), gradient(true));
        let largest = a.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        assert!(largest > 0.0);
        assert!(a.iter().zip(&b).all(|(x, y)| (x - y).abs() <= 1e-3 * largest));
    }

    #[test]
    fn half_precision_gradients_point_the_same_way() {
        // Sides that libtorch's bf16 convolutions get right on the processor; see `Engine::new`.
        let even = Architecture { input_dhw: [8, 32, 32], ..small() };
        let weights = initial_weights(&even, 2);
        let layout = Layout::new(&even, true).unwrap();
        let net = Replica::of_weights(&layout, Device::Cpu, &weights).unwrap();
        let gradient = |precision| {
            let leaves = net.leaves(&layout, precision).unwrap();
            let logits = net.forward(&layout, &leaves, &input(even.input_dhw), true).unwrap();
            let loss = logits.cross_entropy_for_logits(&Tensor::from_slice(&[1i64]));
            net.gradient(&layout, &loss, &leaves).unwrap().flat(layout.len()).unwrap()
        };
        let (a, b) = (gradient(Precision::Fp32), gradient(Precision::Bf16));
        let cosine = (a.dot(&b) / (a.norm() * b.norm())).double_value(&[]);
        assert!(cosine > 0.95, "{cosine}");
    }

    #[test]
    fn initial_weights_have_the_stated_spread() {
        let weights = initial_weights(&Architecture { base_width: 16, ..small() }, 1);
        let deviation = |name: &str| {
            let data = weights.get(name);
            (data.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / data.len() as f64).sqrt()
        };
        let wanted = (2.0 / (64.0 * 27.0_f64)).sqrt();
        assert!((deviation("layer3.1.conv2.weight") / wanted - 1.0).abs() < 0.02);
        assert!((deviation("layer4.0.da.fc.0.weight") / 0.01 - 1.0).abs() < 0.1);
        assert_eq!(deviation("fc.bias"), 0.0);
        assert_eq!(deviation("layer1.0.bn1.weight"), 1.0);
    }
}
