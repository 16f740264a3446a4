//! The model rearranged for the kernels: batch normalisation folded, weights in the order they are read, blocking fixed.
//!
//! The blocking depends on the architecture alone, never on threads or machine, so that every sum is taken in one order.

use super::arena::ArenaLengths;
use super::kernels::{Padded, STEM_TAPS, panel_index};
use crate::model::architecture::{BLOCKS, BN_EPSILON, STAGES};
use crate::model::{AttentionOrder, Model};

/// Floats of a block's computed rows: 256 KiB, so that with the weights of a tap it stays in a core's second-level cache.
pub const BLOCK_FLOATS: usize = 64 * 1024;

/// A convolution with its folded batch normalisation.
pub struct Conv {
    /// Input, with border.
    pub input: Padded,
    /// Output, with border.
    pub output: Padded,
    /// 1 or 2, all axes.
    pub stride: usize,
    /// 9 matrices (kz, ky) of `kx * c_in` x `c_out`; for the stem one of `147` x `c_out`, for a shortcut `c_in` x `c_out`.
    /// Each in panels ([`panel_index`]).
    pub weights: Vec<f32>,
    /// One an output channel.
    pub bias: Vec<f32>,
    /// Output rows of a block.
    pub rows: usize,
}

impl Conv {
    /// Voxels between two rows of a computed block.
    pub fn pitch(&self) -> usize {
        if self.stride == 1 { self.output.dhw[2] + 2 } else { self.output.dhw[2] }
    }

    /// Blocks of rows in a plane.
    pub fn blocks(&self) -> usize {
        self.output.dhw[1].div_ceil(self.rows)
    }
}

/// Two linear layers with ReLU between and a sigmoid behind.
pub struct Gate {
    /// `[hidden][ends]`.
    pub w0: Vec<f32>,
    /// `[hidden]`.
    pub b0: Vec<f32>,
    /// `[ends][hidden]`.
    pub w2: Vec<f32>,
    /// `[ends]`.
    pub b2: Vec<f32>,
}

/// A residual block.
pub struct Block {
    /// First convolution; carries the block's stride.
    pub conv1: Conv,
    /// Second convolution.
    pub conv2: Conv,
    /// The shortcut of a strided block.
    pub shortcut: Option<Conv>,
    /// Depth attention.
    pub depth: Option<Gate>,
    /// Channel attention.
    pub channel: Option<Gate>,
}

/// A whole network.
pub struct Plan {
    /// Input shape.
    pub input_dhw: [usize; 3],
    /// The first convolution; its `input` is unused.
    pub stem: Conv,
    /// Eight blocks.
    pub blocks: Vec<Block>,
    /// Which attention comes first.
    pub order: AttentionOrder,
    /// `[classes][channels]`.
    pub head_weight: Vec<f32>,
    /// `[classes]`.
    pub head_bias: Vec<f32>,
}

impl Plan {
    /// Rearranges `model`.
    pub fn new(model: &Model) -> Self {
        let architecture = &model.manifest.architecture;
        let mut x = Padded { c: architecture.base_width, dhw: architecture.stem_dhw() };
        let stem = stem(model, x);
        let mut blocks = Vec::with_capacity(STAGES * BLOCKS);
        for stage in 1..=STAGES {
            for index in 0..BLOCKS {
                let name = format!("layer{stage}.{index}");
                let strided = stage > 1 && index == 0;
                let y = Padded { c: architecture.stage_channels(stage), dhw: architecture.stage_dhw(stage) };
                let stride = if strided { 2 } else { 1 };
                let gate = |part: &str| Gate {
                    w0: model.weights.get(&format!("{name}.{part}.fc.0.weight")).to_vec(),
                    b0: model.weights.get(&format!("{name}.{part}.fc.0.bias")).to_vec(),
                    w2: model.weights.get(&format!("{name}.{part}.fc.2.weight")).to_vec(),
                    b2: model.weights.get(&format!("{name}.{part}.fc.2.bias")).to_vec(),
                };
                blocks.push(Block {
                    conv1: conv(model, &name, ["conv1", "bn1"], x, y, stride),
                    conv2: conv(model, &name, ["conv2", "bn2"], y, y, 1),
                    shortcut: strided.then(|| conv(model, &name, ["downsample.0", "downsample.1"], x, y, 2)),
                    depth: architecture.depth_attention.then(|| gate("da")),
                    channel: architecture.channel_attention.then(|| gate("se")),
                });
                x = y;
            }
        }
        Self {
            input_dhw: architecture.input_dhw,
            stem,
            blocks,
            order: architecture.attention_order,
            head_weight: model.weights.head_weight().to_vec(),
            head_bias: model.weights.head_bias().to_vec(),
        }
    }

    fn convolutions(&self) -> impl Iterator<Item = &Conv> {
        let blocks = self.blocks.iter().flat_map(|b| [Some(&b.conv1), Some(&b.conv2), b.shortcut.as_ref()]);
        std::iter::once(&self.stem).chain(blocks.flatten())
    }

    fn gates(&self) -> impl Iterator<Item = &Gate> {
        self.blocks.iter().flat_map(|b| [b.depth.as_ref(), b.channel.as_ref()]).flatten()
    }

    /// What a session must allocate.
    pub fn arena_lengths(&self) -> ArenaLengths {
        let mut lengths = ArenaLengths::default();
        for conv in self.convolutions() {
            let Padded { c, dhw } = conv.output;
            let planes = dhw[0] * c;
            lengths.activation = lengths.activation.max(conv.output.len());
            lengths.sums = lengths.sums.max(planes * conv.blocks());
            lengths.planes = lengths.planes.max(planes);
        }
        for gate in self.gates() {
            lengths.gate_ends = lengths.gate_ends.max(gate.b2.len());
            lengths.gate_hidden = lengths.gate_hidden.max(gate.b0.len());
        }
        lengths
    }

    /// Floats that each thread needs for a block: computed rows, and the stem's patches.
    pub fn scratch_len(&self) -> usize {
        let block = |conv: &Conv| conv.rows * conv.pitch() * conv.output.c;
        let patches = self.stem.rows * self.stem.pitch() * STEM_TAPS;
        self.convolutions().map(block).max().unwrap_or(0).max(block(&self.stem) + patches)
    }

    /// Bytes of weights.
    pub fn weight_bytes(&self) -> usize {
        let convolutions: usize = self.convolutions().map(|c| c.weights.len() + c.bias.len()).sum();
        let gates: usize = self.gates().map(|g| g.w0.len() + g.b0.len() + g.w2.len() + g.b2.len()).sum();
        4 * (convolutions + gates + self.head_weight.len() + self.head_bias.len())
    }
}

/// Scale and shift of a batch normalisation: `y = x * scale + shift`.
fn folded(model: &Model, bn: &str) -> (Vec<f64>, Vec<f32>) {
    let get = |suffix: &str| model.weights.get(&format!("{bn}.{suffix}"));
    let (gamma, beta) = (get("weight"), get("bias"));
    let (mean, var) = (get("running_mean"), get("running_var"));
    let scale: Vec<f64> =
        gamma.iter().zip(var).map(|(&g, &v)| f64::from(g) / (f64::from(v) + f64::from(BN_EPSILON)).sqrt()).collect();
    let shift =
        scale.iter().zip(beta).zip(mean).map(|((s, &b), &m)| (f64::from(b) - f64::from(m) * s) as f32).collect();
    (scale, shift)
}

/// `[c_out][c_in][taps]` to `taps / run` matrices `run * c_in` x `c_out` in panels, scaled by output channel; `run` taps
/// along a row make one matrix.
fn rearranged(weights: &[f32], scale: &[f64], c_in: usize, taps: usize, run: usize) -> Vec<f32> {
    let c_out = scale.len();
    let depth = run * c_in;
    let mut out = vec![0.0; weights.len()];
    for ((co, kernel), scale) in weights.chunks_exact(c_in * taps).enumerate().zip(scale) {
        for (ci, kernel) in kernel.chunks_exact(taps).enumerate() {
            for (tap, &w) in kernel.iter().enumerate() {
                let matrix = tap / run * depth * c_out;
                let k = tap % run * c_in + ci;
                out[matrix + panel_index([depth, c_out], k, co)] = (f64::from(w) * scale) as f32;
            }
        }
    }
    out
}

fn block_rows(row_floats: usize, rows: usize) -> usize {
    (BLOCK_FLOATS / row_floats.max(1)).clamp(1, rows)
}

fn stem(model: &Model, output: Padded) -> Conv {
    let (scale, bias) = folded(model, "stem.1");
    let mut conv = Conv {
        input: output,
        output,
        stride: 2,
        weights: rearranged(model.weights.get("stem.0.weight"), &scale, 1, STEM_TAPS, STEM_TAPS),
        bias,
        rows: 1,
    };
    conv.rows = block_rows(conv.pitch() * output.c.max(STEM_TAPS), output.dhw[1]);
    conv
}

fn conv(model: &Model, block: &str, [name, bn]: [&str; 2], input: Padded, output: Padded, stride: usize) -> Conv {
    let (scale, bias) = folded(model, &format!("{block}.{bn}"));
    let weights = model.weights.get(&format!("{block}.{name}.weight"));
    let taps = weights.len() / (input.c * output.c);
    let mut conv =
        Conv { input, output, stride, weights: rearranged(weights, &scale, input.c, taps, taps.min(3)), bias, rows: 1 };
    conv.rows = block_rows(conv.pitch() * output.c, output.dhw[1]);
    conv
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Architecture;

    #[test]
    fn weights_are_read_in_the_order_tap_input_output() {
        // 2 outputs, 3 inputs, 2 taps
        let weights: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let expected = [0.0, 60.0, 2.0, 80.0, 4.0, 100.0, 1.0, 70.0, 3.0, 90.0, 5.0, 110.0];
        assert_eq!(rearranged(&weights, &[1.0, 10.0], 3, 2, 2), expected);
        assert_eq!(rearranged(&weights, &[1.0, 10.0], 3, 2, 1), expected);
        // 33 outputs, 1 input, 2 taps in one matrix: a panel of 32 and one of 1
        let weights: Vec<f32> = (0..66).map(|i| i as f32).collect();
        let out = rearranged(&weights, &[1.0; 33], 1, 2, 2);
        assert_eq!(out[..3], [0.0, 2.0, 4.0]);
        assert_eq!(out[32..34], [1.0, 3.0]);
        assert_eq!(out[64..], [64.0, 65.0]);
    }

    #[test]
    fn a_block_of_rows_stays_within_its_bound() {
        let architecture = Architecture { input_dhw: [8, 224, 224], base_width: 16, ..Architecture::full() };
        let plan = Plan::new(&Model::synthetic("t", &architecture, 1).unwrap());
        assert!(plan.scratch_len() <= 2 * BLOCK_FLOATS);
        for conv in plan.convolutions() {
            assert!(conv.rows >= 1 && conv.rows <= conv.output.dhw[1]);
        }
    }
}
