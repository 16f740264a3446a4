//! What an [`Architecture`] consists of: layers, tensors, parameters, multiply-adds.
//!
//! Input: an architecture. Output: tables and lists, all derived from one walk over the network. A convolution's output
//! is `floor((n + 2p - k) / s) + 1` on each axis, so that a stride of 2 (kernel 3 with padding 1, or kernel 1 without)
//! leaves `ceil(n / 2)`.
//!
//! Multiply-adds count convolutions and linear layers; batch normalisation, activations, pooling and the scaling by the
//! attentions are not counted. The 1x1x1 convolution of a shortcut is counted with its stage.

use serde::Serialize;

use super::ModelError;
use super::manifest::Architecture;

/// Epsilon of every batch normalisation.
pub const BN_EPSILON: f32 = 1e-5;
/// Residual stages.
pub const STAGES: usize = 4;
/// Blocks of a stage.
pub const BLOCKS: usize = 2;
/// Channel attention narrows to one in so many channels (at least one).
pub const CA_REDUCTION: usize = 16;
/// Widest accepted base: 256 makes layer4 2048 wide, about 565 M parameters.
pub const MAX_BASE_WIDTH: usize = 256;
/// Largest accepted input axis.
pub const MAX_INPUT_AXIS: usize = 1024;
/// Most accepted input voxels: twenty times 64*224*224, so that sizes fit in 64 bits everywhere.
pub const MAX_INPUT_VOXELS: usize = 20 * 64 * 224 * 224;
/// Most accepted classes.
pub const MAX_CLASSES: usize = 64;

/// A tensor of the weights file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TensorSpec {
    /// Its name, the reference implementation's.
    pub name: String,
    /// Its shape; convolutions are out, in, depth, rows, columns.
    pub shape: Vec<usize>,
    /// Whether it counts as a parameter (running statistics do not).
    pub trainable: bool,
    /// What it is for.
    pub role: TensorRole,
}

impl TensorSpec {
    /// Elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no element; none has.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What a tensor is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TensorRole {
    /// Kernel of a convolution or matrix of a linear layer; the values summed into one output.
    Kernel {
        /// Inputs of one output.
        fan_in: usize,
    },
    /// Bias of a linear layer.
    Bias,
    /// Scale of a batch normalisation.
    BnWeight,
    /// Shift of a batch normalisation.
    BnBias,
    /// Running mean of a batch normalisation.
    BnMean,
    /// Running variance of a batch normalisation.
    BnVar,
}

/// A layer with weights: a convolution with its batch normalisation, an attention, the head's linear layer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerRow {
    /// Its name, the prefix of its tensors.
    pub name: String,
    /// `conv`, `depth attention`, `channel attention`, `linear`.
    pub kind: &'static str,
    /// Kernel in DHW order; convolutions only.
    pub kernel_dhw: Option<[usize; 3]>,
    /// Stride in DHW order; convolutions only.
    pub stride_dhw: Option<[usize; 3]>,
    /// Output channels.
    pub channels: usize,
    /// Output shape.
    pub output_dhw: [usize; 3],
    /// Trainable parameters, batch normalisation's included.
    pub parameters: u64,
    /// Multiply-adds of one inference.
    pub macs: u64,
    /// Index into [`Architecture::stages`].
    pub stage: usize,
}

/// A stage: the stem, layer1 to layer4, the head.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StageRow {
    /// `stem`, `layer1` … `layer4`, `head`.
    pub name: String,
    /// Output channels; the classes for the head.
    pub channels: usize,
    /// Output shape.
    pub output_dhw: [usize; 3],
    /// Trainable parameters.
    pub parameters: u64,
    /// Multiply-adds of one inference.
    pub macs: u64,
}

/// Output length of a convolution along one axis.
pub const fn conv_out(n: usize, kernel: usize, stride: usize, padding: usize) -> usize {
    (n + 2 * padding - kernel) / stride + 1
}

/// The walk over the network that every table is derived from.
struct Walk {
    tensors: Vec<TensorSpec>,
    layers: Vec<LayerRow>,
    stage: usize,
}

impl Walk {
    fn tensor(&mut self, name: String, shape: Vec<usize>, role: TensorRole) -> u64 {
        let trainable = !matches!(role, TensorRole::BnMean | TensorRole::BnVar);
        let spec = TensorSpec { name, shape, trainable, role };
        let parameters = if trainable { spec.len() as u64 } else { 0 };
        self.tensors.push(spec);
        parameters
    }

    /// A convolution without bias and its batch normalisation.
    fn conv(
        &mut self,
        conv: String,
        bn: &str,
        channels: [usize; 2],
        kernel_dhw: [usize; 3],
        stride_dhw: [usize; 3],
        output_dhw: [usize; 3],
    ) {
        let [c_in, c_out] = channels;
        let [kd, kh, kw] = kernel_dhw;
        let fan_in = c_in * kd * kh * kw;
        let shape = vec![c_out, c_in, kd, kh, kw];
        let mut parameters = self.tensor(format!("{conv}.weight"), shape, TensorRole::Kernel { fan_in });
        for (suffix, role) in [
            ("weight", TensorRole::BnWeight),
            ("bias", TensorRole::BnBias),
            ("running_mean", TensorRole::BnMean),
            ("running_var", TensorRole::BnVar),
        ] {
            parameters += self.tensor(format!("{bn}.{suffix}"), vec![c_out], role);
        }
        let voxels: usize = output_dhw.iter().product();
        self.layers.push(LayerRow {
            name: conv,
            kind: "conv",
            kernel_dhw: Some(kernel_dhw),
            stride_dhw: Some(stride_dhw),
            channels: c_out,
            output_dhw,
            parameters,
            macs: (fan_in * c_out) as u64 * voxels as u64,
            stage: self.stage,
        });
    }

    /// A linear layer with bias; returns parameters and multiply-adds.
    fn linear(&mut self, name: &str, fan_in: usize, outputs: usize) -> (u64, u64) {
        let weight = self.tensor(format!("{name}.weight"), vec![outputs, fan_in], TensorRole::Kernel { fan_in });
        let bias = self.tensor(format!("{name}.bias"), vec![outputs], TensorRole::Bias);
        (weight + bias, weight)
    }

    fn attention(
        &mut self,
        name: String,
        kind: &'static str,
        ends: usize,
        hidden: usize,
        channels: usize,
        output_dhw: [usize; 3],
    ) {
        let (p0, m0) = self.linear(&format!("{name}.fc.0"), ends, hidden);
        let (p2, m2) = self.linear(&format!("{name}.fc.2"), hidden, ends);
        self.layers.push(LayerRow {
            name,
            kind,
            kernel_dhw: None,
            stride_dhw: None,
            channels,
            output_dhw,
            parameters: p0 + p2,
            macs: m0 + m2,
            stage: self.stage,
        });
    }
}

impl Architecture {
    /// The paper's network: width 64, input 64 x 224 x 224, three classes, both attentions.
    pub fn full() -> Self {
        Self {
            base_width: 64,
            input_dhw: [64, 224, 224],
            num_classes: 3,
            channel_attention: true,
            depth_attention: true,
            attention_order: super::AttentionOrder::DepthFirst,
        }
    }

    /// Checks every field's range.
    ///
    /// # Errors
    /// The first field out of range.
    pub fn validate(&self) -> Result<(), ModelError> {
        let bad = |field, expected: String, got: String| ModelError::Manifest { field, expected, got };
        if !(1..=MAX_BASE_WIDTH).contains(&self.base_width) {
            return Err(bad("architecture.base_width", format!("1 to {MAX_BASE_WIDTH}"), self.base_width.to_string()));
        }
        if !(1..=MAX_CLASSES).contains(&self.num_classes) {
            return Err(bad("architecture.num_classes", format!("1 to {MAX_CLASSES}"), self.num_classes.to_string()));
        }
        let in_range = self.input_dhw.iter().all(|n| (1..=MAX_INPUT_AXIS).contains(n));
        if !in_range || self.input_dhw.iter().product::<usize>() > MAX_INPUT_VOXELS {
            return Err(bad(
                "architecture.input_dhw",
                format!("1 to {MAX_INPUT_AXIS} an axis and at most {MAX_INPUT_VOXELS} voxels"),
                format!("{:?}", self.input_dhw),
            ));
        }
        Ok(())
    }

    /// Voxels of one input.
    pub fn input_len(&self) -> usize {
        self.input_dhw.iter().product()
    }

    /// Shape after the stem: depth kept, rows and columns halved, rounded up.
    pub fn stem_dhw(&self) -> [usize; 3] {
        let [d, h, w] = self.input_dhw;
        [d, conv_out(h, 7, 2, 3), conv_out(w, 7, 2, 3)]
    }

    /// Channels of stage `1..=4`.
    ///
    /// # Panics
    /// For another stage.
    pub fn stage_channels(&self, stage: usize) -> usize {
        assert!((1..=STAGES).contains(&stage), "stages are 1 to 4");
        self.base_width << (stage - 1)
    }

    /// Output shape of stage `1..=4`: the stem's, halved and rounded up on all axes from stage 2 on.
    ///
    /// # Panics
    /// For another stage.
    pub fn stage_dhw(&self, stage: usize) -> [usize; 3] {
        assert!((1..=STAGES).contains(&stage), "stages are 1 to 4");
        let mut dhw = self.stem_dhw();
        for _ in 1..stage {
            dhw = dhw.map(|n| conv_out(n, 3, 2, 1));
        }
        dhw
    }

    /// Shape of the last feature map: channels, depth, rows, columns.
    pub fn feature_shape_cdhw(&self) -> [usize; 4] {
        let [d, h, w] = self.stage_dhw(STAGES);
        [self.stage_channels(STAGES), d, h, w]
    }

    /// Hidden width of the channel attention over `channels`.
    pub fn ca_hidden(channels: usize) -> usize {
        (channels / CA_REDUCTION).max(1)
    }

    fn walk(&self) -> Walk {
        let mut walk = Walk { tensors: Vec::new(), layers: Vec::new(), stage: 0 };
        walk.conv("stem.0".to_owned(), "stem.1", [1, self.base_width], [3, 7, 7], [1, 2, 2], self.stem_dhw());
        let mut c_in = self.base_width;
        for stage in 1..=STAGES {
            walk.stage = stage;
            let c = self.stage_channels(stage);
            let dhw = self.stage_dhw(stage);
            for block in 0..BLOCKS {
                let name = format!("layer{stage}.{block}");
                let strided = stage > 1 && block == 0;
                let stride = if strided { [2; 3] } else { [1; 3] };
                let (conv1, bn1) = (format!("{name}.conv1"), format!("{name}.bn1"));
                walk.conv(conv1, &bn1, [c_in, c], [3; 3], stride, dhw);
                let (conv2, bn2) = (format!("{name}.conv2"), format!("{name}.bn2"));
                walk.conv(conv2, &bn2, [c, c], [3; 3], [1; 3], dhw);
                if self.depth_attention {
                    let (ends, hidden) = (c * dhw[0], dhw[0]);
                    walk.attention(format!("{name}.da"), "depth attention", ends, hidden, c, dhw);
                }
                if self.channel_attention {
                    let hidden = Self::ca_hidden(c);
                    walk.attention(format!("{name}.se"), "channel attention", c, hidden, c, dhw);
                }
                if strided {
                    let (conv, bn) = (format!("{name}.downsample.0"), format!("{name}.downsample.1"));
                    walk.conv(conv, &bn, [c_in, c], [1; 3], [2; 3], dhw);
                }
                c_in = c;
            }
        }
        walk.stage = STAGES + 1;
        let (parameters, macs) = walk.linear("fc", c_in, self.num_classes);
        walk.layers.push(LayerRow {
            name: "fc".to_owned(),
            kind: "linear",
            kernel_dhw: None,
            stride_dhw: None,
            channels: self.num_classes,
            output_dhw: [1; 3],
            parameters,
            macs,
            stage: walk.stage,
        });
        walk
    }

    /// Every layer with weights, in the order of execution (a shortcut after what it bypasses).
    pub fn layers(&self) -> Vec<LayerRow> {
        self.walk().layers
    }

    /// Every tensor the weights file must hold, and no other.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        self.walk().tensors
    }

    /// Stem, layer1 to layer4, head.
    pub fn stages(&self) -> Vec<StageRow> {
        let mut rows: Vec<StageRow> = (0..=STAGES + 1)
            .map(|stage| {
                let (name, channels, output_dhw) = match stage {
                    0 => ("stem".to_owned(), self.base_width, self.stem_dhw()),
                    s if s <= STAGES => (format!("layer{s}"), self.stage_channels(s), self.stage_dhw(s)),
                    _ => ("head".to_owned(), self.num_classes, [1; 3]),
                };
                StageRow { name, channels, output_dhw, parameters: 0, macs: 0 }
            })
            .collect();
        for layer in self.walk().layers {
            rows[layer.stage].parameters += layer.parameters;
            rows[layer.stage].macs += layer.macs;
        }
        rows
    }

    /// Trainable parameters.
    pub fn parameter_count(&self) -> u64 {
        self.walk().layers.iter().map(|l| l.parameters).sum()
    }

    /// Multiply-adds of one inference.
    pub fn macs(&self) -> u64 {
        self.walk().layers.iter().map(|l| l.macs).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full(channel_attention: bool, depth_attention: bool) -> Architecture {
        Architecture { channel_attention, depth_attention, ..Architecture::full() }
    }

    #[test]
    fn parameter_counts_are_the_published_ones() {
        assert_eq!(full(false, false).parameter_count(), 33_148_995);
        assert_eq!(full(true, false).parameter_count(), 33_238_075);
        assert_eq!(full(false, true).parameter_count(), 35_148_083);
        assert_eq!(full(true, true).parameter_count(), 35_237_163);
    }

    #[test]
    fn multiply_adds_are_the_published_ones() {
        let giga = |n: u64| format!("{:.2}", n as f64 * 1e-9);
        for (ca, da) in [(false, false), (true, false), (false, true), (true, true)] {
            let rows = full(ca, da).stages();
            let got: Vec<String> = rows.iter().map(|r| giga(r.macs)).collect();
            assert_eq!(got, ["7.55", "355.14", "156.20", "78.10", "39.05", "0.00"]);
            assert_eq!(giga(full(ca, da).macs()), "636.04");
        }
        let convolutions = full(false, false);
        let exact: Vec<u64> = convolutions.stages().iter().map(|r| r.macs).collect();
        let layer1 = 4 * 64 * 64 * 27 * (64 * 112 * 112);
        let layer2 = (64 * 128 * 27 + 3 * 128 * 128 * 27 + 64 * 128) * (32 * 56 * 56);
        assert_eq!(exact[0], 64 * 147 * (64 * 112 * 112));
        assert_eq!(exact[1], layer1);
        assert_eq!(exact[2], layer2);
        assert_eq!(exact[3], layer2 / 2);
        assert_eq!(exact[4], layer2 / 4);
        assert_eq!(exact[5], 1536);
    }

    #[test]
    fn shapes_of_the_full_network_are_the_published_ones() {
        let a = Architecture::full();
        assert_eq!(a.stem_dhw(), [64, 112, 112]);
        assert_eq!(a.stage_dhw(1), [64, 112, 112]);
        assert_eq!(a.stage_dhw(2), [32, 56, 56]);
        assert_eq!(a.stage_dhw(3), [16, 28, 28]);
        assert_eq!(a.feature_shape_cdhw(), [512, 8, 14, 14]);
    }

    #[test]
    fn odd_axes_round_up() {
        let a = Architecture { input_dhw: [9, 33, 31], base_width: 4, ..Architecture::full() };
        assert_eq!(a.stem_dhw(), [9, 17, 16]);
        assert_eq!(a.stage_dhw(2), [5, 9, 8]);
        assert_eq!(a.stage_dhw(3), [3, 5, 4]);
        assert_eq!(a.stage_dhw(4), [2, 3, 2]);
    }

    #[test]
    fn tensor_names_are_unique_and_the_reference_implementations() {
        let tensors = Architecture::full().tensors();
        let names: std::collections::BTreeSet<&str> = tensors.iter().map(|t| t.name.as_str()).collect();
        assert_eq!(names.len(), tensors.len());
        for name in [
            "stem.0.weight",
            "stem.1.running_var",
            "layer1.0.conv1.weight",
            "layer1.1.da.fc.0.weight",
            "layer3.0.downsample.1.running_mean",
            "layer4.1.se.fc.2.bias",
            "layer2.0.downsample.0.weight",
            "fc.bias",
        ] {
            assert!(names.contains(name), "{name}");
        }
        assert!(!names.contains("layer1.0.downsample.0.weight"));
    }

    #[test]
    fn absurd_shapes_are_refused() {
        let ok = Architecture::full();
        for input_dhw in [[0, 224, 224], [64, 2000, 2], [1024, 1024, 1024]] {
            let a = Architecture { input_dhw, ..ok.clone() };
            assert!(a.validate().is_err(), "{input_dhw:?}");
        }
        assert!(ok.validate().is_ok());
        let wide = Architecture { base_width: 100_000, ..ok };
        assert!(wide.validate().is_err());
    }
}
