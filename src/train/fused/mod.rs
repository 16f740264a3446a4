//! A training step on a GPU with what lies between convolutions fused: one pass for statistics, one for normalisation,
//! attention, shortcut and ReLU together, and likewise backwards.
//!
//! Input: a [`Replica`]'s leaves and a batch. Output: the gradient by every parameter, the loss and the logits: what
//! [`Replica::forward`] and [`Replica::gradient`] give, to rounding. Convolutions and their gradients are libtorch's, called
//! by hand and not through its graph; attention gates and head, which are small, keep the graph.
//!
//! Eager code reads and writes a block's activations about sixty times a step, this twenty-three times: mean, variance
//! and plane means come from one read (the sums of a plane), the attentions' scales from the plane means, and the
//! gradient through all of them from the sums of two products. The arithmetic is drawn in `kernels.cu`.
//!
//! Invariants: sums are added in one order, so that a step gives the same bits every time where libtorch's convolutions
//! do. Before it is used, [`Fused::open`] compares it with the plain way on a small network on the same device; where
//! they differ, or the compiler is absent, the plain way is taken and the reason told.
//!
//! Deliberately absent: float16 (its statistics want a scale of their own), evaluation, processors.

mod cuda;

use std::collections::HashMap;

use tch::{CModule, Device, IValue, Kind, Reduction, TchError, Tensor, no_grad};

use super::TrainError;
use super::net::{Gradient, Layout, Pass, Precision, Replica, initial_weights, phase_kernel, phases, volumes_of};
use crate::model::Architecture;
use crate::model::architecture::{BLOCKS, STAGES};

/// Channels are a multiple of this: what one thread takes.
pub const CHANNELS: usize = 8;
/// Parts of a plane that sums are made of, at most.
const MAX_PARTS: i64 = 32;
/// Blocks of a kernel that keep a large GPU busy: 132 multiprocessors, eight blocks each.
const BUSY: i64 = 1056;

const OPS: &[u8] = include_bytes!("ops.pt");

/// Activations as planes: `N * D` of `area` pixels of `channels` numbers.
#[derive(Clone, Copy, Debug)]
struct Planes {
    planes: i64,
    area: i64,
    channels: i64,
    /// Parts of a plane that are worked on side by side.
    parts: i64,
}

impl Planes {
    fn of(x: &Tensor) -> Result<Self, TchError> {
        let (n, channels, d, h, w) = x.size5()?;
        let (planes, area) = (n * d, h * w);
        let parts = (BUSY / planes).clamp(1, MAX_PARTS).min((area / 8).max(1));
        Ok(Self { planes, area, channels, parts })
    }
}

/// Statistics of a batch normalisation, f32.
struct Norm {
    a: Tensor,
    b: Tensor,
    mean: Tensor,
    invstd: Tensor,
    /// Sum of each plane, planes x channels.
    plane_x: Tensor,
}

/// Coefficients of the gradient by what a batch normalisation was given.
struct NormGradient {
    gamma: Tensor,
    beta: Tensor,
    q: Tensor,
    r: Tensor,
}

/// The shortcut of a strided block: its convolution's output and what normalises it.
struct Shortcut<'a> {
    raw: &'a Tensor,
    norm: &'a Norm,
}

/// The kernels. All tensors are contiguous; activations are `N x C x D x H x W` with channels last.
trait Kernels {
    /// `parts x 2 x planes x channels`: sums of x and of its squares.
    fn sums_forward(&self, x: &Tensor) -> Result<Tensor, TrainError>;
    /// Statistics from them; the running ones are moved. With `means`, the plane means of a x + b.
    fn coefficients(
        &self,
        sums: &Tensor,
        at: Planes,
        bn: [&Tensor; 4],
        means: bool,
    ) -> Result<(Norm, Option<Tensor>), TrainError>;
    /// relu(a x + b)
    fn affine_relu(&self, x: &Tensor, norm: &Norm) -> Result<Tensor, TrainError>;
    /// relu(scale (a x + b) + shortcut)
    fn block_out(
        &self,
        x: &Tensor,
        norm: &Norm,
        scale: Option<&Tensor>,
        shortcut: &Tensor,
        strided: Option<&Norm>,
    ) -> Result<Tensor, TrainError>;
    /// `parts x 2 x planes x channels`: sums of dz and of dz x.
    fn sums_relu(&self, g: &Tensor, g2: Option<&Tensor>, x: &Tensor, norm: &Norm) -> Result<Tensor, TrainError>;
    /// `parts x 3 x planes x channels`: sums of dz, of dz x and of dz shortcut.
    fn sums_block(
        &self,
        g: &Tensor,
        g2: Option<&Tensor>,
        y: &Tensor,
        x: &Tensor,
        shortcut: Option<&Tensor>,
    ) -> Result<Tensor, TrainError>;
    /// `planes x channels`: the gradient by the scale of each plane.
    fn gate_gradient(&self, sums: &Tensor, at: Planes, norm: &Norm) -> Result<Tensor, TrainError>;
    /// From the `which`-th sums, with the scale of each plane and the gradient through its mean.
    fn gradients(
        &self,
        sums: &Tensor,
        which: i64,
        at: Planes,
        norm: &Norm,
        scale: Option<&Tensor>,
        through: Option<&Tensor>,
    ) -> Result<NormGradient, TrainError>;
    /// a dz + q x + r
    fn grad_relu(
        &self,
        g: &Tensor,
        g2: Option<&Tensor>,
        x: &Tensor,
        norm: &Norm,
        of: &NormGradient,
    ) -> Result<Tensor, TrainError>;
    /// The gradient by x, and that by the shortcut.
    #[allow(clippy::too_many_arguments)]
    fn grad_block(
        &self,
        g: &Tensor,
        g2: Option<&Tensor>,
        y: &Tensor,
        x: &Tensor,
        norm: &Norm,
        scale: Option<&Tensor>,
        through: Option<&Tensor>,
        of: &NormGradient,
        shortcut: Option<(&Shortcut<'_>, &NormGradient)>,
    ) -> Result<(Tensor, Tensor), TrainError>;
    /// One step of Adam on flat tensors, in place: learning rate over 1 - beta1^t, and 1 over the root of 1 - beta2^t.
    fn adam(
        &self,
        p: &Tensor,
        g: &Tensor,
        mean: &Tensor,
        square: &Tensor,
        step: f64,
        root: f64,
    ) -> Result<(), TrainError>;
}

/// The fused way of one device.
pub struct Fused {
    ops: CModule,
    kernels: Box<dyn Kernels + Send + Sync>,
}

/// What a block keeps for the way back.
struct Kept {
    name: String,
    strided: bool,
    input: Tensor,
    raw1: Tensor,
    norm1: Norm,
    hidden: Tensor,
    raw2: Tensor,
    norm2: Norm,
    /// Plane means that the graph of the gates starts at, its end, and the scale as the kernels take it.
    gate: Option<(Tensor, Tensor, Tensor)>,
    shortcut: Option<(Tensor, Norm)>,
    out: Tensor,
}

/// With channels last in memory, copied only where it is not.
fn arranged(x: &Tensor) -> Result<Tensor, TchError> {
    x.f_permute([0, 2, 3, 4, 1])?.f_contiguous()?.f_permute([0, 4, 1, 2, 3])
}

impl Fused {
    /// The fused way on `device` for `layout` in `precision`, compared with the plain one first.
    ///
    /// # Errors
    /// Why it cannot be used, in words.
    pub fn open(device: Device, layout: &Layout, precision: Precision) -> Result<Self, String> {
        let Device::Cuda(index) = device else { return Err("not a GPU".to_owned()) };
        if precision == Precision::Fp16 {
            return Err("float16 goes the plain way".to_owned());
        }
        if !layout.channels_last() {
            return Err("channels are not last".to_owned());
        }
        let width = layout.architecture.base_width;
        if !width.is_multiple_of(CHANNELS) || width << (STAGES - 1) > CHANNELS * cuda::THREADS {
            return Err(format!("width {width} is no multiple of {CHANNELS}, or too large"));
        }
        let kernels = cuda::Cuda::open(index, precision.kind())?;
        let fused = Self::with(Box::new(kernels)).map_err(|e| e.to_string())?;
        let small = Architecture { base_width: 16, input_dhw: [8, 32, 32], ..Architecture::full() };
        fused.compare(&small, device, precision).map_err(|e| e.to_string())??;
        Ok(fused)
    }

    fn with(kernels: Box<dyn Kernels + Send + Sync>) -> Result<Self, TrainError> {
        Ok(Self { ops: CModule::load_data(&mut &OPS[..])?, kernels })
    }

    /// Both ways of the network `architecture`. `Ok(Err)` says how they differ.
    fn compare(
        &self,
        architecture: &Architecture,
        device: Device,
        precision: Precision,
    ) -> Result<Result<(), String>, TrainError> {
        let layout = Layout::new(architecture, true)?;
        let weights = initial_weights(architecture, 11);
        let [d, h, w] = architecture.input_dhw;
        let values = crate::model::synthetic::volume([2 * d, h, w], 5);
        let [d, h, w] = [d, h, w].map(|n| n as i64);
        let x = Tensor::f_from_slice(&values)?.f_view([2, 1, d, h, w])?.f_to_device(device)?;
        let target = Tensor::f_from_slice(&[1i64, 2])?.f_to_device(device)?;
        let run = |fused: bool| -> Result<(Tensor, Tensor, Tensor), TrainError> {
            let replica = Replica::of_weights(&layout, device, &weights)?;
            let leaves = replica.leaves(&layout, precision)?;
            let (gradient, loss) = if fused {
                let step = self.step(&layout, &replica, &leaves, &x, &target, 1.0)?;
                (step.gradient, step.loss)
            } else {
                let logits = replica.forward(&layout, &leaves, &x, true)?;
                let loss = logits.f_cross_entropy_loss(&target, None::<Tensor>, Reduction::Mean, -100, 0.0)?;
                (replica.gradient(&layout, &loss, &leaves)?, loss)
            };
            Ok((gradient.flat(layout.len())?.f_to_device(Device::Cpu)?, loss.f_detach()?, replica.buffers))
        };
        let ((g1, l1, s1), (g2, l2, s2)) = (run(false)?, run(true)?);
        let number = |t: Tensor| t.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?.f_double_value(&[]);
        let cosine = number(g1.f_dot(&g2)?)? / (number(g1.f_norm()?)? * number(g2.f_norm()?)?);
        let loss = (number(l1)? - number(l2)?).abs();
        let statistics = number(s1.f_sub(&s2)?.f_abs()?.f_max()?)?;
        let (least, most) = if precision == Precision::Fp32 { (0.9999, 1e-4) } else { (0.98, 0.05) };
        // NaN fails, too.
        Ok(if cosine >= least && loss <= most && statistics <= most {
            Ok(())
        } else {
            Err(format!(
                "it differs from the plain way on this GPU: cosine of the gradients {cosine:.5}, loss {loss:.1e}, \
                 running statistics {statistics:.1e}"
            ))
        })
    }

    /// Adam's step, one pass over everything.
    pub(super) fn adam(
        &self,
        p: &Tensor,
        g: &Tensor,
        mean: &Tensor,
        square: &Tensor,
        step: f64,
        root: f64,
    ) -> Result<(), TrainError> {
        self.kernels.adam(p, g, mean, square, step, root)
    }

    fn norm(&self, pass: &Pass<'_>, raw: &Tensor, bn: &str, means: bool) -> Result<(Norm, Option<Tensor>), TrainError> {
        let sums = self.kernels.sums_forward(raw)?;
        let tensors = [
            pass.parameter(&format!("{bn}.weight")),
            pass.parameter(&format!("{bn}.bias")),
            pass.buffer(&format!("{bn}.running_mean")),
            pass.buffer(&format!("{bn}.running_var")),
        ];
        self.kernels.coefficients(&sums, Planes::of(raw)?, tensors, means)
    }

    fn conv_backward(
        &self,
        g: &Tensor,
        x: &Tensor,
        weight: &Tensor,
        stride: i64,
        padding: i64,
        by_input: bool,
    ) -> Result<(Tensor, Tensor), TrainError> {
        let axes = x.dim() - 2;
        let answer = self.ops.method_is(
            "conv_backward",
            &[
                IValue::Tensor(g.shallow_clone()),
                IValue::Tensor(x.shallow_clone()),
                IValue::Tensor(weight.f_detach()?),
                IValue::IntList(vec![stride; axes]),
                IValue::IntList(vec![padding; axes]),
                IValue::Bool(by_input),
            ],
        )?;
        match answer {
            IValue::Tuple(parts) => match <[IValue; 2]>::try_from(parts) {
                Ok([IValue::Tensor(by_x), IValue::Tensor(by_weight)]) => Ok((by_x, by_weight)),
                _ => Err(TrainError::Torch("conv_backward: expected two tensors".to_owned())),
            },
            _ => Err(TrainError::Torch("conv_backward: expected a tuple".to_owned())),
        }
    }

    fn block(&self, pass: &Pass<'_>, input: &Tensor, name: &str, strided: bool) -> Result<Kept, TrainError> {
        let stride = if strided { 2 } else { 1 };
        let conv = |x: &Tensor, name: &str, stride: i64, pad: i64| -> Result<Tensor, TchError> {
            let weight = pass.parameter(&format!("{name}.weight"));
            arranged(&no_grad(|| x.f_conv3d(weight, None::<Tensor>, [stride; 3], [pad; 3], [1; 3], 1))?)
        };
        let raw1 = conv(input, &format!("{name}.conv1"), stride, 1)?;
        let (norm1, _) = self.norm(pass, &raw1, &format!("{name}.bn1"), false)?;
        let hidden = self.kernels.affine_relu(&raw1, &norm1)?;
        let raw2 = conv(&hidden, &format!("{name}.conv2"), 1, 1)?;
        let architecture = &pass.layout.architecture;
        let gated = architecture.depth_attention || architecture.channel_attention;
        let (norm2, means) = self.norm(pass, &raw2, &format!("{name}.bn2"), gated)?;
        let gate = match means {
            None => None,
            Some(means) => {
                let (n, c, d, _, _) = raw2.size5()?;
                let leaf = means.f_view([n, d, c])?.f_set_requires_grad(true)?;
                let planes = || leaf.f_permute([0, 2, 1])?.f_to_kind(raw2.kind());
                let scale = pass.attention(name, planes)?;
                let scale = scale.ok_or_else(|| TrainError::Torch("a gate without attention".to_owned()))?;
                let end = scale.f_permute([0, 2, 1])?.f_to_kind(Kind::Float)?.f_contiguous()?;
                let scale = end.f_detach()?;
                Some((leaf, end, scale))
            }
        };
        let shortcut = if strided {
            let raw = conv(input, &format!("{name}.downsample.0"), 2, 0)?;
            let (norm, _) = self.norm(pass, &raw, &format!("{name}.downsample.1"), false)?;
            Some((raw, norm))
        } else {
            None
        };
        let scale = gate.as_ref().map(|(_, _, scale)| scale);
        let out = match &shortcut {
            Some((raw, norm)) => self.kernels.block_out(&raw2, &norm2, scale, raw, Some(norm))?,
            None => self.kernels.block_out(&raw2, &norm2, scale, input, None)?,
        };
        let (name, input) = (name.to_owned(), input.shallow_clone());
        Ok(Kept { name, strided, input, raw1, norm1, hidden, raw2, norm2, gate, shortcut, out })
    }

    /// Gradients of a block, put into `found`; those by its input, to be added, are returned.
    fn block_back(
        &self,
        pass: &Pass<'_>,
        kept: &Kept,
        g: &Tensor,
        g2: Option<&Tensor>,
        found: &mut HashMap<String, Tensor>,
    ) -> Result<(Tensor, Tensor), TrainError> {
        let Kept { name, strided, input, raw1, norm1, hidden, raw2, norm2, gate, shortcut, out } = kept;
        let k = &self.kernels;
        let at = Planes::of(raw2)?;
        let sums = k.sums_block(g, g2, out, raw2, shortcut.as_ref().map(|(raw, _)| raw))?;
        let mut through = None;
        if let Some((leaf, end, _)) = gate {
            let ds = k.gate_gradient(&sums, at, norm2)?.f_view(end.size().as_slice())?;
            let names: Vec<String> = pass
                .layout
                .slots
                .iter()
                .map(|s| s.name.clone())
                .filter(|n| {
                    n.strip_prefix(name.as_str()).is_some_and(|r| r.starts_with(".da.") || r.starts_with(".se."))
                })
                .collect();
            let mut wanted = vec![leaf.shallow_clone()];
            wanted.extend(names.iter().map(|n| pass.parameter(n).shallow_clone()));
            let gradients = Tensor::f_run_backward(&[end.f_mul(&ds)?.f_sum(Kind::Float)?], &wanted, false, false)?;
            let mut gradients = gradients.into_iter();
            through = gradients.next().map(|t| t.f_contiguous()).transpose()?;
            found.extend(names.into_iter().zip(gradients));
        }
        let scale = gate.as_ref().map(|(_, _, scale)| scale);
        let mut put = |bn: &str, of: &NormGradient| {
            found.insert(format!("{name}.{bn}.weight"), of.gamma.shallow_clone());
            found.insert(format!("{name}.{bn}.bias"), of.beta.shallow_clone());
        };
        let of2 = k.gradients(&sums, 1, at, norm2, scale, through.as_ref())?;
        put("bn2", &of2);
        let of_shortcut = match shortcut {
            Some((_, norm)) => Some(k.gradients(&sums, 2, at, norm, None, None)?),
            None => None,
        };
        if let Some(of) = &of_shortcut {
            put("downsample.1", of);
        }
        let parts = shortcut.as_ref().map(|(raw, norm)| Shortcut { raw, norm });
        let strided_part = parts.as_ref().zip(of_shortcut.as_ref());
        let (by_raw2, by_shortcut) =
            k.grad_block(g, g2, out, raw2, norm2, scale, through.as_ref(), &of2, strided_part)?;
        let weight = |name: &str| pass.parameter(&format!("{name}.weight"));
        let conv2 = format!("{name}.conv2");
        let (by_hidden, by_conv2) = self.conv_backward(&by_raw2, hidden, weight(&conv2), 1, 1, true)?;
        drop(by_raw2);
        let by_hidden = arranged(&by_hidden)?;
        let of1 = k.gradients(&k.sums_relu(&by_hidden, None, raw1, norm1)?, 1, Planes::of(raw1)?, norm1, None, None)?;
        put("bn1", &of1);
        let by_raw1 = k.grad_relu(&by_hidden, None, raw1, norm1, &of1)?;
        drop(by_hidden);
        let conv1 = format!("{name}.conv1");
        let stride = if *strided { 2 } else { 1 };
        let (by_input, by_conv1) = self.conv_backward(&by_raw1, input, weight(&conv1), stride, 1, true)?;
        found.insert(format!("{conv2}.weight"), by_conv2);
        found.insert(format!("{conv1}.weight"), by_conv1);
        let second = if *strided {
            let conv = format!("{name}.downsample.0");
            let (by_input, by_weight) = self.conv_backward(&by_shortcut, input, weight(&conv), 2, 0, true)?;
            found.insert(format!("{conv}.weight"), by_weight);
            arranged(&by_input)?
        } else {
            by_shortcut
        };
        Ok((arranged(&by_input)?, second))
    }

    /// Forward and backward of a batch `x`, `N x 1 x D x H x W`, f32; the gradient is that of the loss times `factor`.
    ///
    /// # Errors
    /// A batch of another shape, no room on the device, a kernel that does not start.
    pub fn step(
        &self,
        layout: &Layout,
        replica: &Replica,
        leaves: &[Tensor],
        x: &Tensor,
        target: &Tensor,
        factor: f64,
    ) -> Result<Step, TrainError> {
        let pass = replica.pass(layout, leaves, true);
        let k = &self.kernels;
        let n = x.size()[0];
        let stem = pass.parameter("stem.0.weight");
        let stem_input = phases(&x.f_to_kind(stem.kind())?)?;
        let stem_kernel = phase_kernel(stem)?;
        let raw = no_grad(|| stem_input.f_conv2d(&stem_kernel, None::<Tensor>, [1; 2], [0; 2], [1; 2], 1))?;
        let raw = arranged(&volumes_of(&raw, n)?)?;
        let (norm, _) = self.norm(&pass, &raw, "stem.1", false)?;
        let mut y = k.affine_relu(&raw, &norm)?;
        let mut blocks = Vec::with_capacity(STAGES * BLOCKS);
        for stage in 1..=STAGES {
            for block in 0..BLOCKS {
                let kept = self.block(&pass, &y, &format!("layer{stage}.{block}"), stage > 1 && block == 0)?;
                y = kept.out.shallow_clone();
                blocks.push(kept);
            }
        }
        let last = y.f_detach()?.f_set_requires_grad(true)?;
        let logits = pass.linear(&last.f_mean_dim(&[2i64, 3, 4][..], false, Kind::Float)?, "fc")?;
        let loss = logits.f_cross_entropy_loss(target, None::<Tensor>, Reduction::Mean, -100, 0.0)?;
        let head = [last, pass.parameter("fc.weight").shallow_clone(), pass.parameter("fc.bias").shallow_clone()];
        let gradients = Tensor::f_run_backward(&[loss.f_mul_scalar(factor)?], &head, false, false)?;
        let mut found: HashMap<String, Tensor> = HashMap::with_capacity(layout.slots.len());
        let mut gradients = gradients.into_iter();
        let first = gradients.next().ok_or_else(|| TrainError::Torch("no gradient of the head".to_owned()))?;
        found.extend(["fc.weight", "fc.bias"].map(str::to_owned).into_iter().zip(gradients));
        let mut g = (arranged(&first)?, None);
        while let Some(kept) = blocks.pop() {
            let (a, b) = self.block_back(&pass, &kept, &g.0, g.1.as_ref(), &mut found)?;
            g = (a, Some(b));
        }
        let sums = k.sums_relu(&g.0, g.1.as_ref(), &raw, &norm)?;
        let of = k.gradients(&sums, 1, Planes::of(&raw)?, &norm, None, None)?;
        let by_raw = k.grad_relu(&g.0, g.1.as_ref(), &raw, &norm, &of)?;
        let (_, c, d, h, w) = by_raw.size5()?;
        let by_raw = by_raw.f_permute([0, 2, 3, 4, 1])?.f_view([n * d, h, w, c])?.f_permute([0, 3, 1, 2])?;
        let (_, by_kernel) = self.conv_backward(&by_raw, &stem_input, &stem_kernel, 1, 0, false)?;
        // Back through the arrangement of the kernel, which is a graph of views.
        let through = stem_kernel.f_mul(&by_kernel)?.f_sum(Kind::Float)?;
        let by_stem = Tensor::f_run_backward(&[through], &[stem], false, false)?;
        found.extend(by_stem.into_iter().map(|t| ("stem.0.weight".to_owned(), t)));
        found.insert("stem.1.weight".to_owned(), of.gamma);
        found.insert("stem.1.bias".to_owned(), of.beta);
        let in_order = layout
            .slots
            .iter()
            .map(|slot| {
                let missing = || TrainError::Torch(format!("no gradient by {}", slot.name));
                found.remove(&slot.name).ok_or_else(missing)
            })
            .collect::<Result<Vec<_>, TrainError>>()?;
        let gradient = replica.collect(layout, in_order)?;
        Ok(Step { gradient, loss: loss.f_detach()?, logits: logits.f_detach()? })
    }
}

/// What a step found.
pub struct Step {
    /// By every parameter.
    pub gradient: Gradient,
    /// Mean cross-entropy.
    pub loss: Tensor,
    /// `N x classes`.
    pub logits: Tensor,
}

#[cfg(test)]
mod tests {
    use super::super::net::BN_MOMENTUM;
    use super::*;
    use crate::model::AttentionOrder;
    use crate::model::architecture::BN_EPSILON;

    /// The kernels' arithmetic in libtorch, on the processor.
    struct Plain;

    /// Planes x area x channels, f32.
    fn flat(x: &Tensor) -> Tensor {
        let (n, c, d, h, w) = x.size5().unwrap();
        x.permute([0, 2, 3, 4, 1]).reshape([n * d, h * w, c]).to_kind(Kind::Float)
    }

    fn back(y: &Tensor, like: &Tensor) -> Tensor {
        let (n, c, d, h, w) = like.size5().unwrap();
        y.to_kind(like.kind()).view([n, d, h, w, c]).permute([0, 4, 1, 2, 3])
    }

    fn both(g: &Tensor, g2: Option<&Tensor>) -> Tensor {
        g2.map_or_else(|| flat(g), |h| flat(g) + flat(h))
    }

    fn sums(of: &[Tensor]) -> Tensor {
        let dims: &[i64] = &[1];
        let parts: Vec<Tensor> = of.iter().map(|t| t.sum_dim_intlist(dims, false, Kind::Float)).collect();
        Tensor::stack(&parts, 0).unsqueeze(0)
    }

    impl Kernels for Plain {
        fn sums_forward(&self, x: &Tensor) -> Result<Tensor, TrainError> {
            let x = flat(x);
            Ok(sums(&[x.shallow_clone(), &x * &x]))
        }
        fn coefficients(
            &self,
            sums: &Tensor,
            at: Planes,
            bn: [&Tensor; 4],
            means: bool,
        ) -> Result<(Norm, Option<Tensor>), TrainError> {
            no_grad(|| {
                let sums = sums.sum_dim_intlist(&[0i64][..], false, Kind::Float);
                let (plane_x, count) = (sums.get(0), (at.planes * at.area) as f64);
                let mean = plane_x.sum_dim_intlist(&[0i64][..], false, Kind::Float) / count;
                let var = sums.get(1).sum_dim_intlist(&[0i64][..], false, Kind::Float) / count - &mean * &mean;
                let invstd = (&var + f64::from(BN_EPSILON)).rsqrt();
                let a = bn[0] * &invstd;
                let b = bn[1] - &mean * &a;
                let _ = bn[2].shallow_clone().f_lerp_(&mean, BN_MOMENTUM)?;
                let _ = bn[3].shallow_clone().f_lerp_(&(&var * (count / (count - 1.0))), BN_MOMENTUM)?;
                let plane_mean = means.then(|| &plane_x / at.area as f64 * &a + &b);
                Ok((Norm { a, b, mean, invstd, plane_x }, plane_mean))
            })
        }
        fn affine_relu(&self, x: &Tensor, norm: &Norm) -> Result<Tensor, TrainError> {
            Ok(back(&(flat(x) * &norm.a + &norm.b).relu(), x))
        }
        fn block_out(
            &self,
            x: &Tensor,
            norm: &Norm,
            scale: Option<&Tensor>,
            shortcut: &Tensor,
            strided: Option<&Norm>,
        ) -> Result<Tensor, TrainError> {
            let mut y = flat(x) * &norm.a + &norm.b;
            if let Some(scale) = scale {
                y = &y * scale.flatten(0, 1).unsqueeze(1);
            }
            let s = flat(shortcut);
            let s = strided.map_or_else(|| s.shallow_clone(), |n| &s * &n.a + &n.b);
            Ok(back(&(y + s).relu(), x))
        }
        fn sums_relu(&self, g: &Tensor, g2: Option<&Tensor>, x: &Tensor, norm: &Norm) -> Result<Tensor, TrainError> {
            let x = flat(x);
            let dz = both(g, g2) * (&x * &norm.a + &norm.b).gt(0.0);
            Ok(sums(&[dz.shallow_clone(), &dz * &x]))
        }
        fn sums_block(
            &self,
            g: &Tensor,
            g2: Option<&Tensor>,
            y: &Tensor,
            x: &Tensor,
            shortcut: Option<&Tensor>,
        ) -> Result<Tensor, TrainError> {
            let dz = both(g, g2) * flat(y).gt(0.0);
            let third = shortcut.map_or_else(|| dz.zeros_like(), |s| &dz * flat(s));
            Ok(sums(&[dz.shallow_clone(), &dz * flat(x), third]))
        }
        fn gate_gradient(&self, sums: &Tensor, _: Planes, norm: &Norm) -> Result<Tensor, TrainError> {
            Ok(sums.get(0).get(1) * &norm.a + sums.get(0).get(0) * &norm.b)
        }
        fn gradients(
            &self,
            sums: &Tensor,
            which: i64,
            at: Planes,
            norm: &Norm,
            scale: Option<&Tensor>,
            through: Option<&Tensor>,
        ) -> Result<NormGradient, TrainError> {
            let (mut dz, mut dzx) = (sums.get(0).get(0), sums.get(0).get(which));
            if let Some(scale) = scale {
                (dz, dzx) = (dz * scale.flatten(0, 1), dzx * scale.flatten(0, 1));
            }
            if let Some(through) = through {
                let through = through.flatten(0, 1);
                dzx = &dzx + &through * &norm.plane_x / at.area as f64;
                dz = &dz + through;
            }
            let total = |t: Tensor| t.sum_dim_intlist(&[0i64][..], false, Kind::Float);
            let (dy, dyx, count) = (total(dz), total(dzx), (at.planes * at.area) as f64);
            let gamma = &norm.invstd * (dyx - &norm.mean * &dy);
            let q: Tensor = -(&norm.a * &norm.invstd * &gamma) / count;
            let r: Tensor = -(&norm.a * &dy) / count - &q * &norm.mean;
            Ok(NormGradient { gamma, beta: dy, q, r })
        }
        fn grad_relu(
            &self,
            g: &Tensor,
            g2: Option<&Tensor>,
            x: &Tensor,
            norm: &Norm,
            of: &NormGradient,
        ) -> Result<Tensor, TrainError> {
            let v = flat(x);
            let dz = both(g, g2) * (&v * &norm.a + &norm.b).gt(0.0);
            Ok(back(&(dz * &norm.a + v * &of.q + &of.r), x))
        }
        fn grad_block(
            &self,
            g: &Tensor,
            g2: Option<&Tensor>,
            y: &Tensor,
            x: &Tensor,
            norm: &Norm,
            scale: Option<&Tensor>,
            through: Option<&Tensor>,
            of: &NormGradient,
            shortcut: Option<(&Shortcut<'_>, &NormGradient)>,
        ) -> Result<(Tensor, Tensor), TrainError> {
            let dz = both(g, g2) * flat(y).gt(0.0);
            let v = flat(x);
            let mut dy = scale.map_or_else(|| dz.shallow_clone(), |s| &dz * s.flatten(0, 1).unsqueeze(1));
            if let Some(through) = through {
                dy = &dy + through.flatten(0, 1).unsqueeze(1) / v.size()[1] as f64;
            }
            let gs = match shortcut {
                None => dz,
                Some((s, of)) => dz * &s.norm.a + flat(s.raw) * &of.q + &of.r,
            };
            Ok((back(&(dy * &norm.a + v * &of.q + &of.r), x), back(&gs, x)))
        }
        fn adam(&self, _: &Tensor, _: &Tensor, _: &Tensor, _: &Tensor, _: f64, _: f64) -> Result<(), TrainError> {
            unreachable!("the processor's optimiser is another one")
        }
    }

    #[test]
    fn the_kernels_are_their_arithmetic_and_the_way_by_hand_with_them_is_that_of_the_graph() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let dir = tempfile::tempdir().unwrap();
            let cuda = cuda::Cuda::on_the_processor(dir.path(), kind);
            // Every kernel against `Plain` at odd sizes.
            let (n, c, d, h, w) = (2i64, 24i64, 3i64, 5i64, 7i64);
            let drawn = |name: &str, len: i64, low: f64| {
                let s = crate::model::synthetic::Stream::new(7, name);
                Tensor::from_slice(&(0..len as u64).map(|i| (low + 4.0 * s.uniform(i)) as f32).collect::<Vec<_>>())
            };
            let activation = |name: &str| {
                let t = drawn(name, n * c * d * h * w, -1.5).to_kind(kind);
                t.view([n, d, h, w, c]).permute([0, 4, 1, 2, 3])
            };
            let [x, s, g, g2] = ["x", "s", "g", "g2"].map(activation);
            let near = |what: &str, a: &Tensor, b: &Tensor| {
                let tolerance = if kind == Kind::Float { 1e-5 } else { 1e-2 };
                let (a, b) = (a.to_kind(Kind::Float), b.to_kind(Kind::Float));
                let far = (&a - &b).abs().max().double_value(&[]);
                let scale = b.abs().max().double_value(&[]).max(1.0);
                assert!(far <= tolerance * scale, "{what}, {kind:?}: {far} of {scale}");
            };
            let total = |t: Tensor| t.sum_dim_intlist(&[0i64][..], false, Kind::Float);
            let bn = || [drawn("gamma", c, 0.5), drawn("beta", c, -2.0), drawn("m", c, -2.0), drawn("v", c, 0.5)];
            let at = Planes::of(&x).unwrap();
            let (mine, theirs) = (cuda.sums_forward(&x).unwrap(), Plain.sums_forward(&x).unwrap());
            near("sums_forward", &total(mine.shallow_clone()), &total(theirs.shallow_clone()));
            let (bn1, bn2) = (bn(), bn());
            let (norm, means) = cuda.coefficients(&mine, at, [&bn1[0], &bn1[1], &bn1[2], &bn1[3]], true).unwrap();
            let (norm2, means2) = Plain.coefficients(&theirs, at, [&bn2[0], &bn2[1], &bn2[2], &bn2[3]], true).unwrap();
            for (what, a, b) in [
                ("a", &norm.a, &norm2.a),
                ("b", &norm.b, &norm2.b),
                ("mean", &norm.mean, &norm2.mean),
                ("invstd", &norm.invstd, &norm2.invstd),
                ("plane_x", &norm.plane_x, &norm2.plane_x),
                ("plane means", &means.unwrap(), &means2.unwrap()),
                ("running mean", &bn1[2], &bn2[2]),
                ("running variance", &bn1[3], &bn2[3]),
            ] {
                near(what, a, b);
            }
            let y = cuda.affine_relu(&x, &norm).unwrap();
            near("affine_relu", &y, &Plain.affine_relu(&x, &norm).unwrap());
            let scale = drawn("scale", n * d * c, 0.1).view([n, d, c]);
            let through = drawn("through", n * d * c, -2.0).view([n, d, c]);
            for second in [None, Some(&g2)] {
                let sums = cuda.sums_relu(&g, second, &x, &norm).unwrap();
                let plain = Plain.sums_relu(&g, second, &x, &norm).unwrap();
                near("sums_relu", &total(sums.shallow_clone()), &total(plain.shallow_clone()));
                let of = cuda.gradients(&sums, 1, at, &norm, None, None).unwrap();
                let of2 = Plain.gradients(&total(sums).unsqueeze(0), 1, at, &norm, None, None).unwrap();
                for (a, b) in [(&of.gamma, &of2.gamma), (&of.beta, &of2.beta), (&of.q, &of2.q), (&of.r, &of2.r)] {
                    near("gradients", a, b);
                }
                let gx = cuda.grad_relu(&g, second, &x, &norm, &of).unwrap();
                near("grad_relu", &gx, &Plain.grad_relu(&g, second, &x, &norm, &of).unwrap());
                for (scale, through) in [(None, None), (Some(&scale), Some(&through))] {
                    for strided in [false, true] {
                        let y = cuda.block_out(&x, &norm, scale, &s, strided.then_some(&norm)).unwrap();
                        near(
                            "block_out",
                            &y,
                            &Plain.block_out(&x, &norm, scale, &s, strided.then_some(&norm)).unwrap(),
                        );
                        let shortcut = strided.then_some(&s);
                        let sums = cuda.sums_block(&g, second, &y, &x, shortcut).unwrap();
                        let plain = Plain.sums_block(&g, second, &y, &x, shortcut).unwrap();
                        near("sums_block", &total(sums.shallow_clone()), &total(plain));
                        let one = total(sums.shallow_clone()).unsqueeze(0);
                        let ds = cuda.gate_gradient(&sums, at, &norm).unwrap();
                        near("gate_gradient", &ds, &Plain.gate_gradient(&one, at, &norm).unwrap());
                        let of = cuda.gradients(&sums, 1, at, &norm, scale, through).unwrap();
                        let of2 = Plain.gradients(&one, 1, at, &norm, scale, through).unwrap();
                        near("gradients of a block", &of.gamma, &of2.gamma);
                        near("gradients of a block", &of.r, &of2.r);
                        let third = cuda.gradients(&sums, 2, at, &norm, None, None).unwrap();
                        let kept = Shortcut { raw: &s, norm: &norm };
                        let part = strided.then_some((&kept, &third));
                        let a = cuda.grad_block(&g, second, &y, &x, &norm, scale, through, &of, part).unwrap();
                        let b = Plain.grad_block(&g, second, &y, &x, &norm, scale, through, &of, part).unwrap();
                        near("grad_block by x", &a.0, &b.0);
                        near("grad_block by the shortcut", &a.1, &b.1);
                    }
                }
            }
            let all = [drawn("p", 1000, -2.0), drawn("g", 1000, -2.0), drawn("m", 1000, -2.0), drawn("v", 1000, 0.0)];
            let whole = |t: &Tensor| super::super::net::Piece { offset: 0, values: t.copy() };
            let mut adam = super::super::optimiser::Adam { mean: all[2].copy(), square: all[3].copy(), steps: 4 };
            let p = all[0].copy();
            assert!(adam.step(&p, &Gradient(vec![whole(&all[1])]), 0.01).unwrap());
            let (step, root) = (0.01 / (1.0 - 0.9f64.powi(5)), 1.0 / (1.0 - 0.999f64.powi(5)).sqrt());
            cuda.adam(&all[0], &all[1], &all[2], &all[3], step, root).unwrap();
            for (a, b) in [(&all[0], &p), (&all[2], &adam.mean), (&all[3], &adam.square)] {
                assert!((a - b).abs().max().double_value(&[]) < 1e-6);
            }
            // Wrong tensors are refused before a kernel sees them.
            assert!(cuda.affine_relu(&x.narrow(4, 0, 6), &norm).is_err());
            assert!(cuda.affine_relu(&x.to_kind(Kind::Double), &norm).is_err());
            let short = Norm { a: norm.a.narrow(0, 0, 8).contiguous(), ..norm };
            assert!(cuda.affine_relu(&x, &short).is_err());
        }
        let dir = tempfile::tempdir().unwrap();
        let emulated = cuda::Cuda::on_the_processor(dir.path(), Kind::Float);
        let fused = Fused::with(Box::new(emulated)).unwrap();
        let small = Architecture { base_width: 8, input_dhw: [4, 24, 24], ..Architecture::full() };
        fused.compare(&small, Device::Cpu, Precision::Fp32).unwrap().unwrap();
    }

    #[test]
    fn the_way_by_hand_is_that_of_the_graph_for_every_variant() {
        let fused = Fused::with(Box::new(Plain)).unwrap();
        for order in [AttentionOrder::DepthFirst, AttentionOrder::ChannelFirst] {
            for (ca, da) in [(true, true), (true, false), (false, true), (false, false)] {
                let architecture = Architecture {
                    base_width: 8,
                    input_dhw: [8, 40, 48],
                    channel_attention: ca,
                    depth_attention: da,
                    attention_order: order,
                    ..Architecture::full()
                };
                let layout = Layout::new(&architecture, true).unwrap();
                let weights = initial_weights(&architecture, 4);
                let x = Tensor::from_slice(&crate::model::synthetic::volume([16, 40, 48], 5)).view([2, 1, 8, 40, 48]);
                let target = Tensor::from_slice(&[2i64, 0]);
                let plain = Replica::of_weights(&layout, Device::Cpu, &weights).unwrap();
                let leaves = plain.leaves(&layout, Precision::Fp32).unwrap();
                let logits = plain.forward(&layout, &leaves, &x, true).unwrap();
                let loss = logits.cross_entropy_for_logits(&target);
                let wanted = plain.gradient(&layout, &loss, &leaves).unwrap().flat(layout.len()).unwrap();
                let other = Replica::of_weights(&layout, Device::Cpu, &weights).unwrap();
                let leaves = other.leaves(&layout, Precision::Fp32).unwrap();
                let step = fused.step(&layout, &other, &leaves, &x, &target, 1.0).unwrap();
                assert!((step.loss.double_value(&[]) - loss.double_value(&[])).abs() < 1e-5);
                assert!((step.logits - logits).abs().max().double_value(&[]) < 1e-4);
                let found = step.gradient.flat(layout.len()).unwrap();
                // Another rounding of a sum can put an activation on the other side of a ReLU, which moves everything before
                // it a little; the smaller the last maps, the more. Directions stay.
                let cosine = |a: &Tensor, b: &Tensor| (a.dot(b) / (a.norm() * b.norm())).double_value(&[]);
                assert!(cosine(&wanted, &found) > 0.9995, "{order:?} ({ca}, {da}): {}", cosine(&wanted, &found));
                for slot in &layout.slots {
                    let (a, b) = (wanted.narrow(0, slot.offset, slot.len), found.narrow(0, slot.offset, slot.len));
                    let (norm, apart) = (a.norm().double_value(&[]), (&a - &b).norm().double_value(&[]));
                    assert!(apart <= 0.1 * norm + 1e-6, "{} ({ca}, {da}): {apart} of {norm}", slot.name);
                }
                let far = (plain.buffers - other.buffers).abs().max().double_value(&[]);
                assert!(far < 1e-5, "running statistics: {far}");
            }
        }
    }

    #[test]
    fn planes_are_cut_into_parts_that_fill_a_gpu() {
        let full = Planes::of(&Tensor::empty([1, 64, 64, 112, 112], (Kind::BFloat16, Device::Cpu))).unwrap();
        assert_eq!((full.planes, full.area, full.channels, full.parts), (64, 12544, 64, 16));
        let deep = Planes::of(&Tensor::empty([1, 512, 8, 14, 14], (Kind::BFloat16, Device::Cpu))).unwrap();
        assert_eq!(deep.parts, 24);
        let small = Planes::of(&Tensor::empty([16, 8, 4, 3, 3], (Kind::BFloat16, Device::Cpu))).unwrap();
        assert_eq!(small.parts, 1);
    }

    #[test]
    fn it_is_only_for_gpus_with_channels_last_and_eight_at_a_time() {
        let layout = Layout::new(&Architecture::full(), true).unwrap();
        assert!(Fused::open(Device::Cpu, &layout, Precision::Bf16).is_err());
        let odd = Layout::new(&Architecture { base_width: 12, ..Architecture::full() }, true).unwrap();
        assert!(Fused::open(Device::Cuda(0), &odd, Precision::Bf16).err().unwrap().contains("multiple"));
        assert!(Fused::open(Device::Cuda(0), &layout, Precision::Fp16).is_err());
    }
}
