//! The network in plain loops: the oracle of every test.
//!
//! Activations are f32, row-major C, D, H, W; every sum (convolution, linear layer, mean) accumulates in f64 and is
//! rounded once. Batch normalisation is applied as written, not folded. One thread; each layer allocates its output.
//!
//! ```text
//! out[co, z, y, x] = sum over ci, kz, ky, kx of w[co, ci, kz, ky, kx] * in[ci, z*sz + kz - pz, y*sy + ky - py, x*sx + kx - px]
//! ```
//!
//! Arithmetic: one multiply-add a weight and output, no reuse in registers; the full network's 636 G take minutes to
//! hours. Deliberately absent: speed.

use std::sync::Arc;

use crate::engine::{Backend, CancelToken, EngineError, Inference, Session, check_input, softmax_into};
use crate::model::architecture::{BLOCKS, BN_EPSILON, STAGES, conv_out};
use crate::model::{AttentionOrder, Model};

/// The reference backend; holds its own copy of the model.
pub struct ReferenceBackend {
    model: Arc<Model>,
}

impl ReferenceBackend {
    /// Prepares `model`, which only copies it.
    pub fn new(model: &Model) -> Self {
        Self { model: Arc::new(model.clone()) }
    }
}

impl Backend for ReferenceBackend {
    fn name(&self) -> &'static str {
        "reference"
    }

    fn session(&self) -> Result<Box<dyn Session>, EngineError> {
        Ok(Box::new(ReferenceSession { model: Arc::clone(&self.model) }))
    }

    fn weight_bytes(&self) -> usize {
        self.model.weights.iter().map(|(_, t)| t.data.len() * 4).sum()
    }
}

struct ReferenceSession {
    model: Arc<Model>,
}

/// Activations, row-major C, D, H, W.
#[derive(Clone, Debug, PartialEq)]
struct Activations {
    channels: usize,
    dhw: [usize; 3],
    data: Vec<f32>,
}

impl Activations {
    fn plane_len(&self) -> usize {
        self.dhw[1] * self.dhw[2]
    }

    /// Mean of each (channel, plane), index `c * D + d`.
    fn plane_means(&self) -> Vec<f32> {
        let n = self.plane_len();
        self.data
            .chunks_exact(n)
            .map(|plane| (plane.iter().map(|&v| f64::from(v)).sum::<f64>() / n as f64) as f32)
            .collect()
    }

    /// Mean of each channel.
    fn channel_means(&self) -> Vec<f32> {
        let n = self.dhw[0] * self.plane_len();
        self.data
            .chunks_exact(n)
            .map(|volume| (volume.iter().map(|&v| f64::from(v)).sum::<f64>() / n as f64) as f32)
            .collect()
    }

    fn relu(&mut self) {
        for v in &mut self.data {
            *v = relu(*v);
        }
    }
}

struct Run<'a> {
    model: &'a Model,
    cancel: &'a CancelToken,
}

impl Run<'_> {
    fn weight(&self, name: &str) -> &[f32] {
        self.model.weights.get(name)
    }

    fn conv(
        &self,
        name: &str,
        input: &Activations,
        stride: [usize; 3],
        padding: [usize; 3],
    ) -> Result<Activations, EngineError> {
        let tensor = self.model.weights.tensor(&format!("{name}.weight"));
        let &[c_out, c_in, kd, kh, kw] = tensor.shape.as_slice() else {
            panic!("a convolution's kernel has five axes");
        };
        assert_eq!(c_in, input.channels, "{name}");
        let [id, ih, iw] = input.dhw;
        let od = conv_out(id, kd, stride[0], padding[0]);
        let oh = conv_out(ih, kh, stride[1], padding[1]);
        let ow = conv_out(iw, kw, stride[2], padding[2]);
        let mut data = Vec::with_capacity(c_out * od * oh * ow);
        let mut row = vec![0.0_f64; ow];
        for co in 0..c_out {
            for z in 0..od {
                if self.cancel.is_cancelled() {
                    return Err(EngineError::Cancelled);
                }
                for y in 0..oh {
                    row.fill(0.0);
                    for ci in 0..c_in {
                        for kz in 0..kd {
                            let Some(iz) = source(z, stride[0], kz, padding[0], id) else {
                                continue;
                            };
                            for ky in 0..kh {
                                let Some(iy) = source(y, stride[1], ky, padding[1], ih) else {
                                    continue;
                                };
                                let at = ((ci * id + iz) * ih + iy) * iw;
                                let line = &input.data[at..at + iw];
                                let kernel = (((co * c_in + ci) * kd + kz) * kh + ky) * kw;
                                let taps = &tensor.data[kernel..kernel + kw];
                                accumulate_row(&mut row, line, taps, stride[2], padding[2]);
                            }
                        }
                    }
                    data.extend(row.iter().map(|&v| v as f32));
                }
            }
        }
        Ok(Activations { channels: c_out, dhw: [od, oh, ow], data })
    }

    fn batch_norm(&self, name: &str, x: &mut Activations) {
        let gamma = self.weight(&format!("{name}.weight"));
        let beta = self.weight(&format!("{name}.bias"));
        let mean = self.weight(&format!("{name}.running_mean"));
        let var = self.weight(&format!("{name}.running_var"));
        let n = x.dhw[0] * x.plane_len();
        for (c, volume) in x.data.chunks_exact_mut(n).enumerate() {
            let deviation = (f64::from(var[c]) + f64::from(BN_EPSILON)).sqrt();
            for v in volume {
                let normal = (f64::from(*v) - f64::from(mean[c])) / deviation;
                *v = (normal * f64::from(gamma[c]) + f64::from(beta[c])) as f32;
            }
        }
    }

    fn linear(&self, name: &str, x: &[f32]) -> Vec<f32> {
        let weight = self.weight(&format!("{name}.weight"));
        let bias = self.weight(&format!("{name}.bias"));
        weight
            .chunks_exact(x.len())
            .zip(bias)
            .map(|(row, &b)| {
                let dot: f64 = row.iter().zip(x).map(|(&w, &v)| f64::from(w) * f64::from(v)).sum();
                (dot + f64::from(b)) as f32
            })
            .collect()
    }

    /// Linear, ReLU, linear, sigmoid.
    fn gate(&self, name: &str, x: &[f32]) -> Vec<f32> {
        let mut hidden = self.linear(&format!("{name}.fc.0"), x);
        for v in &mut hidden {
            *v = relu(*v);
        }
        let mut out = self.linear(&format!("{name}.fc.2"), &hidden);
        for v in &mut out {
            *v = (1.0 / (1.0 + (-f64::from(*v)).exp())) as f32;
        }
        out
    }

    fn depth_attention(&self, name: &str, x: &mut Activations) {
        let scale = self.gate(name, &x.plane_means());
        let n = x.plane_len();
        scale_chunks(&mut x.data, n, &scale);
    }

    fn channel_attention(&self, name: &str, x: &mut Activations) {
        let scale = self.gate(name, &x.channel_means());
        let n = x.dhw[0] * x.plane_len();
        scale_chunks(&mut x.data, n, &scale);
    }

    fn block(&self, name: &str, x: &Activations, stride: usize) -> Result<Activations, EngineError> {
        let architecture = &self.model.manifest.architecture;
        let mut out = self.conv(&format!("{name}.conv1"), x, [stride; 3], [1; 3])?;
        self.batch_norm(&format!("{name}.bn1"), &mut out);
        out.relu();
        let mut out = self.conv(&format!("{name}.conv2"), &out, [1; 3], [1; 3])?;
        self.batch_norm(&format!("{name}.bn2"), &mut out);
        let depth = |out: &mut Activations| {
            if architecture.depth_attention {
                self.depth_attention(&format!("{name}.da"), out);
            }
        };
        let channel = |out: &mut Activations| {
            if architecture.channel_attention {
                self.channel_attention(&format!("{name}.se"), out);
            }
        };
        match architecture.attention_order {
            AttentionOrder::DepthFirst => {
                depth(&mut out);
                channel(&mut out);
            }
            AttentionOrder::ChannelFirst => {
                channel(&mut out);
                depth(&mut out);
            }
        }
        if stride == 1 {
            add(&mut out, x);
        } else {
            let mut shortcut = self.conv(&format!("{name}.downsample.0"), x, [stride; 3], [0; 3])?;
            self.batch_norm(&format!("{name}.downsample.1"), &mut shortcut);
            add(&mut out, &shortcut);
        }
        out.relu();
        Ok(out)
    }
}

/// The larger of 0 and `v`; what is not a number stays so.
fn relu(v: f32) -> f32 {
    if 0.0 > v { 0.0 } else { v }
}

/// The input index of output `o` and tap `k`, if it lies inside.
fn source(o: usize, stride: usize, k: usize, padding: usize, len: usize) -> Option<usize> {
    (o * stride + k).checked_sub(padding).filter(|&i| i < len)
}

/// Adds the contribution of one input row and one row of taps to one output row.
fn accumulate_row(row: &mut [f64], line: &[f32], taps: &[f32], stride: usize, padding: usize) {
    for (k, &tap) in taps.iter().enumerate() {
        // first output whose source is inside, and one past the last
        let first = padding.saturating_sub(k).div_ceil(stride);
        let past = (line.len() + padding).saturating_sub(k).div_ceil(stride).min(row.len());
        if first >= past {
            continue;
        }
        let start = first * stride + k - padding;
        let sources = line[start..].iter().step_by(stride);
        for (sum, &v) in row[first..past].iter_mut().zip(sources) {
            *sum += f64::from(tap) * f64::from(v);
        }
    }
}

fn scale_chunks(data: &mut [f32], n: usize, scale: &[f32]) {
    for (chunk, &factor) in data.chunks_exact_mut(n).zip(scale) {
        for v in chunk {
            *v *= factor;
        }
    }
}

fn add(out: &mut Activations, other: &Activations) {
    assert_eq!(out.dhw, other.dhw, "a shortcut has its block's shape");
    for (a, &b) in out.data.iter_mut().zip(&other.data) {
        *a += b;
    }
}

impl Session for ReferenceSession {
    fn run(&mut self, input: &[f32], cancel: &CancelToken, out: &mut Inference) -> Result<(), EngineError> {
        let architecture = &self.model.manifest.architecture;
        check_input(input, architecture.input_dhw)?;
        let run = Run { model: &self.model, cancel };
        let volume = Activations { channels: 1, dhw: architecture.input_dhw, data: input.to_vec() };
        let mut x = run.conv("stem.0", &volume, [1, 2, 2], [1, 3, 3])?;
        run.batch_norm("stem.1", &mut x);
        x.relu();
        for stage in 1..=STAGES {
            for block in 0..BLOCKS {
                let stride = if stage > 1 && block == 0 { 2 } else { 1 };
                x = run.block(&format!("layer{stage}.{block}"), &x, stride)?;
            }
        }
        out.pooled = x.channel_means();
        out.logits = run.linear("fc", &out.pooled);
        let [d, h, w] = x.dhw;
        out.feature_shape_cdhw = [x.channels, d, h, w];
        out.feature_map = x.data;
        softmax_into(&out.logits, &mut out.scores);
        if out.logits.iter().any(|v| !v.is_finite()) {
            return Err(EngineError::NotFinite);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Architecture, synthetic};

    #[test]
    fn a_row_of_taps_meets_its_definition_at_every_edge() {
        for len in 1..9_usize {
            for (kernel, padding) in [(1, 0), (3, 1), (7, 3)] {
                for stride in [1, 2] {
                    if len + 2 * padding < kernel {
                        continue;
                    }
                    let line: Vec<f32> = (0..len).map(|i| (i * i + 1) as f32).collect();
                    let taps: Vec<f32> = (0..kernel).map(|k| 1.0 + k as f32 * 0.5).collect();
                    let outputs = conv_out(len, kernel, stride, padding);
                    let mut row = vec![0.0; outputs];
                    accumulate_row(&mut row, &line, &taps, stride, padding);
                    for (o, &got) in row.iter().enumerate() {
                        let expected: f64 = (0..kernel)
                            .filter_map(|k| source(o, stride, k, padding, len).map(|i| (k, i)))
                            .map(|(k, i)| f64::from(taps[k]) * f64::from(line[i]))
                            .sum();
                        assert_eq!(got, expected, "len {len} kernel {kernel} stride {stride}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_set_token_stops_the_run() {
        let architecture = Architecture { base_width: 2, input_dhw: [2, 8, 8], ..Architecture::full() };
        let model = Model::synthetic("t", &architecture, 1).unwrap();
        let mut session = ReferenceBackend::new(&model).session().unwrap();
        let input = synthetic::volume(architecture.input_dhw, 1);
        let cancel = CancelToken::new();
        let mut out = Inference::default();
        session.run(&input, &cancel, &mut out).unwrap();
        let wrong = session.run(&input[1..], &cancel, &mut out).unwrap_err();
        assert_eq!(wrong, EngineError::InputLength { expected: 128, got: 127 });
        cancel.cancel();
        let error = session.run(&input, &cancel, &mut out).unwrap_err();
        assert_eq!(error, EngineError::Cancelled);
    }
}
