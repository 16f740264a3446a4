//! A model as an ONNX file, for other runtimes.
//!
//! Input: a [`Model`]. Output: one protobuf message, the same bytes each time. The graph takes `volume`
//! `[1, 1, D, H, W]`, f32 in [0, 1], and yields what an inference of this program yields: `logits` and `scores`
//! `[1, classes]`, `pooled` `[1, C]`, `feature_map` `[1, C, d, h, w]`, all f32. What turns a scan into `volume` stands in
//! the metadata (`darnet.preprocessing`).
//!
//! ```text
//! convolution and batch normalisation, folded in f64 and rounded once to the file's number format:
//!     s = gamma / sqrt(var + eps)      w' = w * s      b' = beta - mean * s
//! attention of a block whose second convolution yields x; m its plane means, g its gates:
//!     depth first      g_d = gate(m)        g_c = gate(mean over D of m * g_d)        x * (g_d * g_c)
//!     channel first    g_c = gate(mean over D of m)        g_d = gate(m * g_c)        x * (g_d * g_c)
//! ```
//!
//! A mean of what was scaled by a gate is the gate times the mean, so x is read twice where the attentions one after
//! the other read it four times; in exact arithmetic the results are the same.
//!
//! [`OnnxPrecision::F16`] is strongly typed: a runtime that obeys the types needs no precision flag. Convolutions, ReLU,
//! scaling and shortcuts are float16. What is small but sensitive stays float32, between casts: the means (112 * 112
//! values would overflow a float16 sum or lose its last bits), the gates with their weights, the head. Largest share of
//! the file: 33.1 M kernel values of 2 bytes.
//!
//! Operator set [`OPSET`], IR version [`IR_VERSION`]: the newest that ONNX Runtime 1.32, OpenVINO 2026 and TensorRT 10
//! all read, with axes of reductions as attributes.
//!
//! One tensor at a time is converted and written; lengths, which protobuf wants first, follow from the shapes.
//! Deliberately absent: reading ONNX, and a batch axis other than 1.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde_json::json;
use sha2::Digest;

use super::Model;
use super::architecture::{BLOCKS, BN_EPSILON, STAGES};
use super::manifest::AttentionOrder;

/// Operator set of the file.
pub const OPSET: i64 = 17;
/// Version of the ONNX format itself.
pub const IR_VERSION: i64 = 8;
/// Name of the one input.
pub const INPUT_NAME: &str = "volume";
/// Names of the outputs, in this order.
pub const OUTPUT_NAMES: [&str; 4] = ["logits", "scores", "pooled", "feature_map"];
/// Protobuf's bound on a message: readers count in 31 bits. The full network is 141 MB, the widest accepted one 2.26 GB.
pub const MAX_ONNX_BYTES: u64 = (1 << 31) - 1;

/// Number format of the weights and of what flows between layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnnxPrecision {
    /// float32 throughout.
    F32,
    /// float16 with float32 islands, see the module's description.
    F16,
}

impl OnnxPrecision {
    /// `f32` or `f16`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
        }
    }
}

/// Why a model was not exported.
#[derive(Debug, thiserror::Error)]
pub enum OnnxError {
    /// The file could not be written.
    #[error("write the ONNX model: {0}")]
    Io(#[from] io::Error),
    /// A file is in the way.
    #[error("write the ONNX model: {path} exists; choose another name or ask to overwrite", path = path.display())]
    Exists {
        /// The file in the way.
        path: PathBuf,
    },
    /// A value does not fit the number format.
    #[error("export tensor {tensor}: expected values within {precision}, element {index} is not; export as f32")]
    Range {
        /// The tensor, batch normalisation folded in.
        tensor: String,
        /// The number format.
        precision: &'static str,
        /// The first such element.
        index: usize,
    },
    /// The message would be larger than protobuf allows.
    #[error("export: expected at most {MAX_ONNX_BYTES} bytes, got {got}; export as f16 or a narrower model")]
    TooLarge {
        /// What it would be.
        got: u64,
    },
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exported {
    /// Length of the file.
    pub bytes: u64,
    /// Its SHA-256, lower-case hex.
    pub sha256: String,
}

/// Writes `model` to `out`.
///
/// # Errors
/// A failed write, and weights that do not fit the number format or the file format; `out` may then hold a part.
pub fn export(model: &Model, precision: OnnxPrecision, out: &mut impl Write) -> Result<(), OnnxError> {
    let graph = Builder::new(model, precision).build();
    let graph_head = graph.head();
    let tensors: u64 = graph.initializers.iter().map(|t| field_len(t.encoded_len())).sum();
    let graph_len = graph_head.0.len() as u64 + tensors;
    let head = model_head(model, precision);
    let mut prefix = Message::default();
    prefix.tag(7, LENGTH_DELIMITED);
    prefix.raw_varint(graph_len);
    let got = head.0.len() as u64 + prefix.0.len() as u64 + graph_len;
    if got > MAX_ONNX_BYTES {
        return Err(OnnxError::TooLarge { got });
    }
    for part in [&head, &prefix, &graph_head] {
        out.write_all(&part.0)?;
    }
    for tensor in &graph.initializers {
        let body = tensor.encode()?;
        let mut prefix = Message::default();
        prefix.tag(5, LENGTH_DELIMITED);
        prefix.raw_varint(tensor.encoded_len());
        out.write_all(&prefix.0)?;
        out.write_all(&body.0)?;
    }
    Ok(())
}

/// Writes `model` to the file `path`, whole or not at all: under a temporary name beside it, synced, then renamed.
///
/// # Errors
/// As [`export`]; [`OnnxError::Exists`] for a file that is there already, unless `overwrite`.
pub fn export_file(
    model: &Model,
    precision: OnnxPrecision,
    path: &Path,
    overwrite: bool,
) -> Result<Exported, OnnxError> {
    let exists = || OnnxError::Exists { path: path.to_path_buf() };
    if !overwrite && path.exists() {
        return Err(exists());
    }
    let Some(name) = path.file_name() else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "expected a file name").into());
    };
    let mut part_name = std::ffi::OsString::from(".");
    part_name.push(name);
    part_name.push(format!(".{}.part", std::process::id()));
    let part = path.with_file_name(part_name);
    let written = write_part(model, precision, &part).and_then(|exported| {
        if !overwrite && path.exists() {
            return Err(exists());
        }
        fs::rename(&part, path)?;
        Ok(exported)
    });
    if written.is_err() {
        let _ = fs::remove_file(&part);
    }
    written
}

fn write_part(model: &Model, precision: OnnxPrecision, part: &Path) -> Result<Exported, OnnxError> {
    let mut out = Hashing { file: fs::File::create(part)?, hasher: sha2::Sha256::new(), bytes: 0 };
    export(model, precision, &mut out)?;
    out.file.sync_all()?;
    let sha256 = out.hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(Exported { bytes: out.bytes, sha256 })
}

struct Hashing {
    file: fs::File,
    hasher: sha2::Sha256,
    bytes: u64,
}

impl Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.file.write(bytes)?;
        self.hasher.update(&bytes[..n]);
        self.bytes += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

const VARINT: u64 = 0;
const LENGTH_DELIMITED: u64 = 2;

/// A protobuf message under construction: fields in the order they are put.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn raw_varint(&mut self, mut v: u64) {
        while v >= 0x80 {
            self.0.push(v as u8 | 0x80);
            v >>= 7;
        }
        self.0.push(v as u8);
    }

    fn tag(&mut self, field: u64, wire_type: u64) {
        self.raw_varint(field << 3 | wire_type);
    }

    fn int(&mut self, field: u64, v: i64) {
        self.tag(field, VARINT);
        self.raw_varint(v.cast_unsigned());
    }

    fn bytes(&mut self, field: u64, v: &[u8]) {
        self.tag(field, LENGTH_DELIMITED);
        self.raw_varint(v.len() as u64);
        self.0.extend_from_slice(v);
    }

    fn text(&mut self, field: u64, v: &str) {
        self.bytes(field, v.as_bytes());
    }

    fn message(&mut self, field: u64, v: &Message) {
        self.bytes(field, &v.0);
    }
}

const fn varint_len(v: u64) -> u64 {
    (64 - (v | 1).leading_zeros() as u64).div_ceil(7)
}

/// Length of a length-delimited field, number below 16, with a content of `len` bytes.
const fn field_len(len: u64) -> u64 {
    1 + varint_len(len) + len
}

/// `ModelProto` but for its graph.
fn model_head(model: &Model, precision: OnnxPrecision) -> Message {
    let m = &model.manifest;
    let mut head = Message::default();
    head.int(1, IR_VERSION);
    head.text(2, "darnet");
    head.text(3, env!("CARGO_PKG_VERSION"));
    if m.is_demo() {
        head.text(6, "A demonstration model. Not a medical device. Not for diagnosis.");
    }
    let mut opset = Message::default();
    opset.text(1, "");
    opset.int(2, OPSET);
    head.message(8, &opset);
    let json = |value: serde_json::Value| value.to_string();
    for (key, value) in [
        ("darnet.model_id", m.id.clone()),
        ("darnet.weights_sha256", model.sha256.clone()),
        ("darnet.precision", precision.as_str().to_owned()),
        ("darnet.intended_use", m.intended_use.clone()),
        ("darnet.trained_on", m.trained_on.clone()),
        ("darnet.class_keys", json(json!(m.class_keys))),
        ("darnet.class_names", json(json!(m.class_names))),
        ("darnet.architecture", json(json!(m.architecture))),
        ("darnet.preprocessing", json(json!(m.preprocessing))),
    ] {
        let mut entry = Message::default();
        entry.text(1, key);
        entry.text(2, &value);
        head.message(14, &entry);
    }
    head
}

/// Element types, numbered as `TensorProto.DataType`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Element {
    F32 = 1,
    I64 = 7,
    F16 = 10,
}

impl Element {
    const fn bytes(self) -> u64 {
        match self {
            Self::F16 => 2,
            Self::F32 => 4,
            Self::I64 => 8,
        }
    }
}

enum Values<'a> {
    Plain(&'a [f32]),
    /// Kernels, one scale an output channel.
    Scaled(&'a [f32], Vec<f64>),
    Wide(Vec<f64>),
    Shape(Vec<i64>),
}

struct Initializer<'a> {
    name: String,
    dims: Vec<usize>,
    element: Element,
    values: Values<'a>,
}

impl Initializer<'_> {
    fn head(&self) -> Message {
        let mut head = Message::default();
        for &dim in &self.dims {
            head.int(1, dim as i64);
        }
        head.int(2, self.element as i64);
        head.text(8, &self.name);
        head
    }

    fn raw_len(&self) -> u64 {
        self.dims.iter().product::<usize>() as u64 * self.element.bytes()
    }

    fn encoded_len(&self) -> u64 {
        self.head().0.len() as u64 + field_len(self.raw_len())
    }

    /// `TensorProto` with its values as little-endian raw data.
    fn encode(&self) -> Result<Message, OnnxError> {
        let mut message = self.head();
        message.0.reserve_exact(field_len(self.raw_len()) as usize);
        message.tag(9, LENGTH_DELIMITED);
        message.raw_varint(self.raw_len());
        let out = &mut message.0;
        match &self.values {
            Values::Plain(data) => self.put(out, data.iter().map(|&v| f64::from(v)))?,
            Values::Wide(data) => self.put(out, data.iter().copied())?,
            Values::Scaled(data, scale) => {
                let each = data.len() / scale.len();
                let rows = data.chunks_exact(each).zip(scale);
                self.put(out, rows.flat_map(|(row, s)| row.iter().map(move |&v| f64::from(v) * s)))?;
            }
            Values::Shape(dims) => out.extend(dims.iter().flat_map(|v| v.to_le_bytes())),
        }
        assert_eq!(message.0.len() as u64, self.encoded_len(), "{}: as many values as its shape says", self.name);
        Ok(message)
    }

    fn put(&self, out: &mut Vec<u8>, values: impl Iterator<Item = f64>) -> Result<(), OnnxError> {
        let range = |index, precision| OnnxError::Range { tensor: self.name.clone(), precision, index };
        for (index, v) in values.enumerate() {
            if self.element == Element::F16 {
                let bits = f16_bits(v).ok_or_else(|| range(index, "f16"))?;
                out.extend(bits.to_le_bytes());
            } else {
                let v = v as f32;
                if !v.is_finite() {
                    return Err(range(index, "f32"));
                }
                out.extend(v.to_le_bytes());
            }
        }
        Ok(())
    }
}

/// The nearest binary16, ties to even; nothing for what is too large or no number.
fn f16_bits(v: f64) -> Option<u16> {
    /// Half way between the largest binary16, 65504, and the power of two after it; ties go up.
    const TOO_LARGE: f64 = 65_520.0;
    let magnitude = v.abs();
    if magnitude.is_nan() || magnitude >= TOO_LARGE {
        return None;
    }
    // Normal numbers have 10 bits after the leading one; below 2^-14 the quantum stays 2^-24.
    let exponent = ((magnitude.to_bits() >> 52) as i32 - 1023).max(-14);
    let quanta = (magnitude * f64::from(10 - exponent).exp2()).round_ties_even();
    // 1024 quanta are the implicit one, which the exponent's field, one less, makes up for; 2048 carry into it.
    let bits = ((exponent + 14) as u16) << 10;
    let sign = if v.is_sign_negative() { 0x8000 } else { 0 };
    Some(sign | (bits + quanta as u16))
}

/// An attribute of a node.
enum Attribute<'a> {
    Int(&'static str, i64),
    Ints(&'static str, &'a [i64]),
}

impl Attribute<'_> {
    fn encode(&self) -> Message {
        let mut message = Message::default();
        match self {
            Self::Int(name, v) => {
                message.text(1, name);
                message.int(3, *v);
                message.int(20, 2);
            }
            Self::Ints(name, list) => {
                message.text(1, name);
                for &v in *list {
                    message.int(8, v);
                }
                message.int(20, 7);
            }
        }
        message
    }
}

struct Graph<'a> {
    nodes: Vec<Message>,
    initializers: Vec<Initializer<'a>>,
    model: &'a Model,
}

impl Graph<'_> {
    /// `GraphProto` but for its initializers.
    fn head(&self) -> Message {
        let architecture = &self.model.manifest.architecture;
        let [d, h, w] = architecture.input_dhw;
        let [c, fd, fh, fw] = architecture.feature_shape_cdhw();
        let mut head = Message::default();
        for node in &self.nodes {
            head.message(1, node);
        }
        head.text(2, "darnet");
        head.message(11, &value_info(INPUT_NAME, &[1, 1, d, h, w]));
        for name in OUTPUT_NAMES {
            let shape: &[usize] = match name {
                "pooled" => &[1, c],
                "feature_map" => &[1, c, fd, fh, fw],
                _ => &[1, architecture.num_classes],
            };
            head.message(12, &value_info(name, shape));
        }
        head
    }
}

/// `ValueInfoProto` of an f32 tensor.
fn value_info(name: &str, shape: &[usize]) -> Message {
    let mut dims = Message::default();
    for &n in shape {
        let mut dim = Message::default();
        dim.int(1, n as i64);
        dims.message(1, &dim);
    }
    let mut tensor = Message::default();
    tensor.int(1, Element::F32 as i64);
    tensor.message(2, &dims);
    let mut kind = Message::default();
    kind.message(1, &tensor);
    let mut info = Message::default();
    info.text(1, name);
    info.message(2, &kind);
    info
}

/// Walks the network and notes nodes and tensors. A node's one output has the node's name.
struct Builder<'a> {
    graph: Graph<'a>,
    body: Element,
}

impl<'a> Builder<'a> {
    fn new(model: &'a Model, precision: OnnxPrecision) -> Self {
        let body = match precision {
            OnnxPrecision::F32 => Element::F32,
            OnnxPrecision::F16 => Element::F16,
        };
        Self { graph: Graph { nodes: Vec::new(), initializers: Vec::new(), model }, body }
    }

    fn node(&mut self, op: &str, inputs: &[&str], output: String, attributes: &[Attribute<'_>]) -> String {
        let mut node = Message::default();
        for input in inputs {
            node.text(1, input);
        }
        node.text(2, &output);
        node.text(3, &output);
        node.text(4, op);
        for attribute in attributes {
            node.message(5, &attribute.encode());
        }
        self.graph.nodes.push(node);
        output
    }

    fn tensor(&mut self, name: &str, dims: Vec<usize>, element: Element, values: Values<'a>) {
        self.graph.initializers.push(Initializer { name: name.to_owned(), dims, element, values });
    }

    /// A convolution with its batch normalisation folded in.
    fn conv(&mut self, name: &str, bn: &str, input: &str, stride: [i64; 3]) -> String {
        let weights = &self.graph.model.weights;
        let kernel = weights.tensor(&format!("{name}.weight"));
        let bn = |suffix: &str| weights.get(&format!("{bn}.{suffix}"));
        let (gamma, beta, mean, var) = (bn("weight"), bn("bias"), bn("running_mean"), bn("running_var"));
        let deviation = |v: f32| (f64::from(v) + f64::from(BN_EPSILON)).sqrt();
        let scale: Vec<f64> = gamma.iter().zip(var).map(|(&g, &v)| f64::from(g) / deviation(v)).collect();
        let shifts = beta.iter().zip(mean).zip(&scale);
        let bias: Vec<f64> = shifts.map(|((&b, &m), s)| f64::from(b) - f64::from(m) * s).collect();
        let kernel_shape: Vec<i64> = kernel.shape[2..].iter().map(|&k| k as i64).collect();
        let padding: Vec<i64> = kernel_shape.iter().map(|k| (k - 1) / 2).collect();
        let pads = [padding.as_slice(), padding.as_slice()].concat();
        let (weight_name, bias_name) = (format!("{name}.weight"), format!("{name}.bias"));
        self.tensor(&weight_name, kernel.shape.clone(), self.body, Values::Scaled(&kernel.data, scale));
        self.tensor(&bias_name, vec![bias.len()], self.body, Values::Wide(bias));
        let attributes = [
            Attribute::Ints("dilations", &[1, 1, 1]),
            Attribute::Int("group", 1),
            Attribute::Ints("kernel_shape", &kernel_shape),
            Attribute::Ints("pads", &pads),
            Attribute::Ints("strides", &stride),
        ];
        self.node("Conv", &[input, &weight_name, &bias_name], name.to_owned(), &attributes)
    }

    fn relu(&mut self, input: &str, output: String) -> String {
        self.node("Relu", &[input], output, &[])
    }

    /// `input`, of the body's number format, as f32.
    fn widen(&mut self, input: &str, output: String) -> String {
        match self.body {
            Element::F16 => self.node("Cast", &[input], output, &[Attribute::Int("to", Element::F32 as i64)]),
            _ => input.to_owned(),
        }
    }

    /// `input`, f32, in the body's number format.
    fn narrow(&mut self, input: &str, output: String) -> String {
        match self.body {
            Element::F16 => self.node("Cast", &[input], output, &[Attribute::Int("to", Element::F16 as i64)]),
            _ => input.to_owned(),
        }
    }

    fn mean(&mut self, input: &str, axes: &[i64], keep: bool, output: String) -> String {
        let attributes = [Attribute::Ints("axes", axes), Attribute::Int("keepdims", i64::from(keep))];
        self.node("ReduceMean", &[input], output, &attributes)
    }

    fn linear(&mut self, name: &str, input: &str, output: String) -> String {
        let weights = &self.graph.model.weights;
        let (weight_name, bias_name) = (format!("{name}.weight"), format!("{name}.bias"));
        let (weight, bias) = (weights.tensor(&weight_name), weights.tensor(&bias_name));
        self.tensor(&weight_name, weight.shape.clone(), Element::F32, Values::Plain(&weight.data));
        self.tensor(&bias_name, bias.shape.clone(), Element::F32, Values::Plain(&bias.data));
        self.node("Gemm", &[input, &weight_name, &bias_name], output, &[Attribute::Int("transB", 1)])
    }

    /// Flatten, linear, ReLU, linear, sigmoid, and back to five axes; f32.
    fn gate(&mut self, name: &str, input: &str, shape: [usize; 5]) -> String {
        let flat = self.node("Flatten", &[input], format!("{name}.flat"), &[Attribute::Int("axis", 1)]);
        let hidden = self.linear(&format!("{name}.fc.0"), &flat, format!("{name}.fc.0"));
        let hidden = self.relu(&hidden, format!("{name}.fc.1"));
        let ends = self.linear(&format!("{name}.fc.2"), &hidden, format!("{name}.fc.2"));
        let gates = self.node("Sigmoid", &[&ends], format!("{name}.fc.3"), &[]);
        let shape_name = format!("{name}.shape");
        let dims = shape.map(|n| n as i64).to_vec();
        self.tensor(&shape_name, vec![5], Element::I64, Values::Shape(dims));
        self.node("Reshape", &[&gates, &shape_name], format!("{name}.gates"), &[])
    }

    /// What scales the output of a block's second convolution, in the body's number format; nothing without attention.
    fn attention(&mut self, block: &str, x: &str, c: usize, d: usize) -> Option<String> {
        let architecture = &self.graph.model.manifest.architecture;
        let (depth, channel) = (architecture.depth_attention, architecture.channel_attention);
        let depth_first = architecture.attention_order == AttentionOrder::DepthFirst;
        if !depth && !channel {
            return None;
        }
        let (da, ca) = (format!("{block}.da"), format!("{block}.se"));
        let (planes_shape, channels_shape) = ([1, c, d, 1, 1], [1, c, 1, 1, 1]);
        let wide = self.widen(x, format!("{block}.wide"));
        let scale = if !depth {
            let means = self.mean(&wide, &[2, 3, 4], true, format!("{block}.channels"));
            self.gate(&ca, &means, channels_shape)
        } else {
            let planes = self.mean(&wide, &[3, 4], true, format!("{block}.planes"));
            if !channel {
                self.gate(&da, &planes, planes_shape)
            } else {
                let gates = if depth_first {
                    let first = self.gate(&da, &planes, planes_shape);
                    let scaled = self.node("Mul", &[&planes, &first], format!("{block}.planes.scaled"), &[]);
                    let means = self.mean(&scaled, &[2], true, format!("{block}.channels"));
                    [first, self.gate(&ca, &means, channels_shape)]
                } else {
                    let means = self.mean(&planes, &[2], true, format!("{block}.channels"));
                    let first = self.gate(&ca, &means, channels_shape);
                    let scaled = self.node("Mul", &[&planes, &first], format!("{block}.planes.scaled"), &[]);
                    [self.gate(&da, &scaled, planes_shape), first]
                };
                self.node("Mul", &[&gates[0], &gates[1]], format!("{block}.gates"), &[])
            }
        };
        Some(self.narrow(&scale, format!("{block}.gates.narrow")))
    }

    fn block(&mut self, name: &str, input: &str, strided: bool, channels: usize, depth: usize) -> String {
        let stride = if strided { [2; 3] } else { [1; 3] };
        let x = self.conv(&format!("{name}.conv1"), &format!("{name}.bn1"), input, stride);
        let x = self.relu(&x, format!("{name}.relu1"));
        let mut x = self.conv(&format!("{name}.conv2"), &format!("{name}.bn2"), &x, [1; 3]);
        if let Some(scale) = self.attention(name, &x, channels, depth) {
            x = self.node("Mul", &[&x, &scale], format!("{name}.attended"), &[]);
        }
        let shortcut = if strided {
            self.conv(&format!("{name}.downsample.0"), &format!("{name}.downsample.1"), input, stride)
        } else {
            input.to_owned()
        };
        let sum = self.node("Add", &[&x, &shortcut], format!("{name}.sum"), &[]);
        self.relu(&sum, name.to_owned())
    }

    fn build(mut self) -> Graph<'a> {
        let architecture = &self.graph.model.manifest.architecture;
        let [logits, scores, pooled, feature_map] = OUTPUT_NAMES;
        let x = self.narrow(INPUT_NAME, "volume.narrow".to_owned());
        let x = self.conv("stem.0", "stem.1", &x, [1, 2, 2]);
        let mut x = self.relu(&x, "stem.2".to_owned());
        for stage in 1..=STAGES {
            let (channels, [depth, ..]) = (architecture.stage_channels(stage), architecture.stage_dhw(stage));
            for block in 0..BLOCKS {
                let strided = stage > 1 && block == 0;
                x = self.block(&format!("layer{stage}.{block}"), &x, strided, channels, depth);
            }
        }
        match self.body {
            Element::F16 => self.widen(&x, feature_map.to_owned()),
            _ => self.node("Identity", &[&x], feature_map.to_owned(), &[]),
        };
        self.mean(feature_map, &[2, 3, 4], false, pooled.to_owned());
        self.linear("fc", pooled, logits.to_owned());
        self.node("Softmax", &[logits], scores.to_owned(), &[Attribute::Int("axis", 1)]);
        self.graph
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Architecture;
    use crate::model::weights::f16_to_f32;

    fn small() -> Model {
        let architecture = Architecture { base_width: 2, input_dhw: [4, 16, 16], ..Architecture::full() };
        Model::synthetic("small", &architecture, 3).unwrap()
    }

    fn bytes_of(model: &Model, precision: OnnxPrecision) -> Vec<u8> {
        let mut out = Vec::new();
        export(model, precision, &mut out).unwrap();
        out
    }

    #[test]
    fn every_binary16_survives_and_what_lies_between_goes_to_the_nearest() {
        for bits in 0..=0x7BFF_u16 {
            let v = f64::from(f16_to_f32(bits));
            assert_eq!(f16_bits(v), Some(bits));
            assert_eq!(f16_bits(-v), Some(bits | 0x8000));
            if bits < 0x7BFF {
                let next = f64::from(f16_to_f32(bits + 1));
                let middle = (v + next) / 2.0;
                let even = bits + (bits & 1);
                assert_eq!(f16_bits(middle), Some(even), "{middle}");
                assert_eq!(f16_bits(middle.next_down()), Some(bits));
                assert_eq!(f16_bits(middle.next_up()), Some(bits + 1));
            }
        }
        assert_eq!(f16_bits(65_519.9), Some(0x7BFF));
        for v in [65_520.0, -65_520.0, f64::INFINITY, f64::NAN] {
            assert_eq!(f16_bits(v), None);
        }
    }

    #[test]
    fn lengths_foretold_are_the_lengths_written() {
        for v in [0, 1, 127, 128, 16_383, 16_384, u64::from(u32::MAX), u64::MAX] {
            let mut message = Message::default();
            message.raw_varint(v);
            assert_eq!(message.0.len() as u64, varint_len(v), "{v}");
        }
        let model = small();
        for precision in [OnnxPrecision::F32, OnnxPrecision::F16] {
            for tensor in &Builder::new(&model, precision).build().initializers {
                assert_eq!(tensor.encode().unwrap().0.len() as u64, tensor.encoded_len(), "{}", tensor.name);
            }
        }
    }

    #[test]
    fn the_same_model_gives_the_same_bytes_and_half_the_kernels() {
        let model = small();
        let f32_bytes = bytes_of(&model, OnnxPrecision::F32);
        assert_eq!(f32_bytes, bytes_of(&model, OnnxPrecision::F32));
        let f16_bytes = bytes_of(&model, OnnxPrecision::F16);
        let kernels: usize = model.weights.iter().filter(|(_, t)| t.shape.len() == 5).map(|(_, t)| t.data.len()).sum();
        let saved = f32_bytes.len() - f16_bytes.len();
        assert!(saved > kernels * 2 - 8192 && saved < kernels * 2 + 8192, "{saved} of {kernels}");
        let text = String::from_utf8_lossy(&f32_bytes);
        assert!(text.contains(&model.sha256) && text.contains("window_center_hu"));
    }

    #[test]
    fn a_value_beyond_binary16_is_named() {
        let mut model = small();
        let tensors = model.weights.iter().map(|(name, t)| (name.to_owned(), t.clone()));
        let scaled = tensors.map(|(name, mut t)| {
            if name == "stem.1.weight" {
                t.data[1] = 1e9;
            }
            (name, t)
        });
        model.weights = crate::model::Weights::from_tensors(scaled);
        let error = export(&model, OnnxPrecision::F16, &mut io::sink()).unwrap_err();
        assert!(matches!(&error, OnnxError::Range { tensor, .. } if tensor == "stem.0.weight"), "{error}");
        export(&model, OnnxPrecision::F32, &mut io::sink()).unwrap();
    }

    #[test]
    fn a_file_is_whole_or_absent_and_not_overwritten_unasked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.onnx");
        let model = small();
        let exported = export_file(&model, OnnxPrecision::F32, &path, false).unwrap();
        let bytes = fs::read(&path).unwrap();
        assert_eq!(exported.bytes, bytes.len() as u64);
        assert_eq!(exported.sha256, crate::model::sha256_hex(&bytes));
        let error = export_file(&model, OnnxPrecision::F16, &path, false).unwrap_err();
        assert!(matches!(error, OnnxError::Exists { .. }));
        assert_eq!(fs::read(&path).unwrap(), bytes);
        export_file(&model, OnnxPrecision::F16, &path, true).unwrap();
        assert_ne!(fs::read(&path).unwrap(), bytes);
        let absent = dir.path().join("absent").join("m.onnx");
        assert!(matches!(export_file(&model, OnnxPrecision::F32, &absent, false), Err(OnnxError::Io(_))));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no part is left");
    }
}
