//! The model rearranged for the kernels: batch normalisation folded, a method a convolution, weights in the order they
//! are read, shapes with their borders.
//!
//! **Choice of method.** A 3x3x3 convolution takes the tiling, and the way of keeping its weights, with the least estimated
//! time on one core (`cost_ns`; its constants were measured, see `docs/performance.md`), stride 2 also direct. Where all
//! the weights would exceed [`WINOGRAD_BYTES`], the convolution that loses least time for the bytes it saves takes its next
//! smaller choice, until they fit. At full size: F(4,6,4) in layers 1 and 3, F(4,4,4) in layers 2 and 4, 302 MiB. The
//! choice depends on the architecture alone, not on threads or machine.
//!
//! Deliberately absent: memory of a run ([`super::arena`]) and what is done with the plan ([`super::conv`]).

use super::arena::Shape;
use super::dispatch::{Kernels, Tiling};
use super::simd::LANES;
use super::stem;
use super::winograd::{Axis, Four, Kept, m_len, odd_lines, v_len};
use crate::model::architecture::{BLOCKS, BN_EPSILON, STAGES};
use crate::model::{AttentionOrder, Model};

/// Bound on the transformed weights of all Winograd convolutions. F(4,4,4) everywhere would take 864 MiB at full size.
pub const WINOGRAD_BYTES: usize = 420 << 20;
/// Bytes of the transforms along D and H that all threads work on together.
pub const SHARED_COLUMN_BYTES: usize = 40 << 20;
/// A convolution whose transformed weights are at most this many bytes keeps them in a third-level cache of 32 MiB
/// between blocks of tiles, so that each thread takes blocks of its own.
pub const PRIVATE_WEIGHT_BYTES: usize = 16 << 20;
/// Bytes of the transforms along D and H of one thread's block in that case: they live in a second-level cache of 1 MiB.
pub const PRIVATE_COLUMN_BYTES: usize = 600 << 10;
/// Tiles that a product of weights kept whole is worth being fetched for.
pub const FEWEST_TILES: usize = 14;
/// Bytes of V: it is read once a panel, from the second-level cache.
pub const V_BYTES: usize = 640 << 10;

/// Taps of the stem's kernel: 3 x 7 x 7.
const STEM_TAPS: usize = 3 * stem::PLANE_TAPS;

/// How a convolution is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Winograd transforms, and how the weights are kept.
    Winograd(Tiling, Kept),
    /// Sums over taps and channels.
    Direct,
    /// Winograd's transform along depth, sums over the taps of rows and columns: the stem.
    Depth,
}

impl Method {
    /// Its name in reports.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Winograd(tiling, _) => tiling.as_str(),
            Self::Direct => "direct",
            Self::Depth => "F(4) along depth",
        }
    }
}

/// The weights of one transform along D and H.
#[derive(Clone, Copy, Debug)]
pub struct WeightRow {
    /// Where they begin, floats from the convolution's first.
    pub at: usize,
    /// The row of G along H, where they are kept without it.
    pub mix: [f32; 3],
}

/// Floats that a block of strips takes.
#[derive(Clone, Copy, Debug)]
pub struct Scratch {
    /// The transforms along D and H.
    pub columns: usize,
    /// V.
    pub v: usize,
    /// M.
    pub m: usize,
    /// A panel of weights that are not kept whole.
    pub u: usize,
}

impl Scratch {
    /// Floats of what each thread has of its own beside the columns.
    pub const fn own(&self) -> usize {
        self.v + self.m + self.u
    }
}

/// A convolution with its folded batch normalisation.
#[derive(Clone, Debug)]
pub struct Conv {
    /// Its name in the weights file, without `.weight`.
    pub name: String,
    /// Input.
    pub input: Shape,
    /// Output.
    pub output: Shape,
    /// Taps of the kernel: 27, 1, or 147 for the stem.
    pub taps: usize,
    /// 1 or 2, all axes (the stem: rows and columns).
    pub stride: usize,
    /// How it is computed.
    pub method: Method,
    /// Where its weights begin, floats.
    pub weights_at: usize,
    /// Floats of its weights.
    pub weights_len: usize,
    /// One an output channel, zero in the padding.
    pub bias: Vec<f32>,
    /// What the weights are multiplied with, one an output channel.
    scale: Vec<f64>,
    /// With a direct method, where the segments of a voxel's inputs begin, from the first.
    pub offsets: Vec<usize>,
    /// With Winograd, the weights of each transform along D and H.
    pub weight_rows: Vec<WeightRow>,
}

impl Conv {
    /// Multiply-adds of the direct convolution.
    pub fn macs(&self) -> u64 {
        (self.taps * self.input.c * self.output.c) as u64 * self.output.dhw.iter().product::<usize>() as u64
    }

    /// Tiles along each axis; of a direct convolution its voxels.
    pub fn tiles(&self) -> [usize; 3] {
        match self.method {
            Method::Winograd(tiling, _) => tiles(tiling, self.output.dhw),
            Method::Direct => self.output.dhw,
            Method::Depth => {
                let [d, h, w] = self.output.dhw;
                [stem_tiles(d), h, w]
            }
        }
    }

    /// Output planes of a depth tile.
    pub fn depths(&self) -> usize {
        match self.method {
            Method::Winograd(tiling, _) => tiling.outputs()[0],
            Method::Direct => 1,
            Method::Depth => stem::DEPTHS,
        }
    }

    /// The depth tile that output plane `z` is in.
    pub fn depth_tile(&self, z: usize) -> usize {
        (z + self.shift()) / self.depths()
    }

    /// The output planes of depth tile `tile`.
    pub fn planes_of(&self, tile: usize) -> std::ops::Range<usize> {
        let first = (tile * self.depths()).saturating_sub(self.shift());
        first..((tile + 1) * self.depths() - self.shift()).min(self.output.dhw[0])
    }

    fn shift(&self) -> usize {
        if self.method == Method::Depth { stem::SHIFT } else { 0 }
    }

    /// Strips that a row of tiles is cut into; all have as many tiles.
    pub fn parts(&self) -> usize {
        let Method::Winograd(tiling, kept) = self.method else { return 1 };
        let tiles = self.tiles()[2];
        if !self.is_private() {
            return 1;
        }
        let fewest = (FEWEST_TILES * tiling.weights(kept)).div_ceil(tiling.frequencies());
        let parts = (1..=tiles).filter(|parts| tiles.is_multiple_of(*parts) && tiles / parts >= fewest);
        let fits = |parts: &usize| self.column_lines(tiles / parts) * LANES * 4 <= PRIVATE_COLUMN_BYTES;
        let longest = parts.clone().next_back().unwrap_or(1);
        parts.into_iter().find(fits).unwrap_or(longest)
    }

    /// Tiles of a strip.
    pub fn strip_tiles(&self) -> usize {
        self.tiles()[2] / self.parts()
    }

    /// Strips of a plane of tiles: the rows of the sums that its outputs are added up in.
    pub fn strips(&self) -> usize {
        self.tiles()[1] * self.parts()
    }

    /// Vectors of one transform along D and H of one strip of `tiles` tiles, before and after the products.
    pub fn strip_lines(&self, tiles: usize) -> usize {
        let Method::Winograd(tiling, _) = self.method else { return 0 };
        let voxels = (tiles - 1) * tiling.steps()[2] + tiling.inputs()[2];
        (self.input.blocks() * voxels).max(self.output.blocks() * tiles * tiling.outputs()[2])
    }

    /// Vectors of all transforms along D and H of one strip.
    fn column_lines(&self, tiles: usize) -> usize {
        let Method::Winograd(tiling, _) = self.method else { return 0 };
        tiling.inputs()[0] * tiling.inputs()[1] * self.strip_lines(tiles)
    }

    /// Floats from one transform along D and H to the next, of a block of `strips` strips.
    pub fn column_stride(&self, strips: usize) -> usize {
        odd_lines(strips * self.strip_lines(self.strip_tiles()))
    }

    /// Strips whose tiles are multiplied together, of a block of `strips`.
    pub fn together(&self, strips: usize) -> usize {
        let Method::Winograd(tiling, _) = self.method else { return 1 };
        let one = 4 * tiling.inputs()[2] * self.strip_tiles() * self.input.padded_c();
        let most = (V_BYTES / one).clamp(1, strips);
        strips.div_ceil(strips.div_ceil(most))
    }

    /// Floats of scratch for `threads` threads.
    pub fn scratch_len(&self, threads: usize, kernels: &Kernels) -> usize {
        let one = self.scratch(kernels);
        if self.is_private() { threads * (one.columns + one.own()) } else { one.columns + threads * one.own() }
    }

    /// Floats for a block of strips.
    pub fn scratch(&self, kernels: &Kernels) -> Scratch {
        let Method::Winograd(tiling, kept) = self.method else {
            let stem = self.method == Method::Depth;
            let row = StemInput::new([1, 1, 2 * self.output.dhw[2]]).row();
            let v = if stem { stem::v_len(row) } else { 0 };
            let m = if stem { stem::m_len(self.output.dhw[2], self.output.blocks()) } else { 0 };
            return Scratch { columns: 0, v, m, u: 0 };
        };
        let ([d, h, w], strips) = (tiling.inputs(), self.block_strips());
        let tiles = self.together(strips) * self.strip_tiles();
        let whole = kept == Kept::Whole;
        Scratch {
            columns: d * h * self.column_stride(strips),
            v: v_len(tiles, kernels.rows, self.input.blocks(), w),
            m: m_len(tiles, kernels.rows, kernels.panel, w),
            u: if whole { 0 } else { w * self.input.padded_c() * kernels.panel * LANES },
        }
    }

    /// Length of the weights, padding of the bias, offsets and map, once method and shapes are known.
    fn lay_out(&mut self, stem_input: StemInput) {
        let channels = self.input.padded_c() * self.output.padded_c();
        self.bias.resize(self.output.padded_c(), 0.0);
        (self.weights_len, self.offsets) = match self.method {
            Method::Winograd(tiling, kept) => {
                let one = tiling.weights(kept) * channels;
                let rows_of_g = tiling.rows_of_g();
                let [depths, rows] = [tiling.weights(Kept::Planes) / 9, rows_of_g.len()];
                let row = |[d, h]: [usize; 2]| match kept {
                    Kept::Planes => WeightRow { at: d * (one / depths), mix: rows_of_g[h] },
                    _ => WeightRow { at: (d * rows + h) * (one / (depths * rows)), mix: [0.0; 3] },
                };
                self.weight_rows = tiling.weight_rows().into_iter().map(row).collect();
                (one, Vec::new())
            }
            Method::Direct if self.taps == 27 => (27 * channels, taps_of(self.input)),
            Method::Direct => (channels, centre_of(self.input)),
            Method::Depth => {
                let rows = (0..stem::TAPS).map(|k| k * stem::v_row(stem_input.row()));
                (stem::FREQUENCIES * stem::PLANE_TAPS * self.output.padded_c(), rows.collect())
            }
        };
    }

    /// A 3x3x3 convolution on its own, for measurements and tests: no scale, a bias of zeros.
    pub fn alone([c_in, c_out]: [usize; 2], input_dhw: [usize; 3], stride: usize, method: Method) -> Self {
        let mut input = Shape::new(c_in, input_dhw);
        let output = Shape::new(c_out, input_dhw.map(|n| (n - 1) / stride + 1));
        if let Method::Winograd(tiling, _) = method {
            input.after = border_after(tiling, input.dhw, output.dhw);
        }
        let mut conv = Self {
            name: "alone".to_owned(),
            input,
            output,
            taps: 27,
            stride,
            method,
            weights_at: 0,
            weights_len: 0,
            bias: vec![0.0; c_out],
            scale: vec![1.0; c_out],
            offsets: Vec::new(),
            weight_rows: Vec::new(),
        };
        conv.lay_out(StemInput::new([1; 3]));
        conv
    }

    /// Its weights, `[c_out][c_in][27]`, as `kernels` read them.
    pub fn packed(&self, kernels: &Kernels, weights: &[f32]) -> Vec<f32> {
        let mut packed = vec![0.0; self.weights_len];
        for ci in 0..self.input.c {
            pack_channel(self, kernels, weights, ci, |index, value| packed[index] = value);
        }
        packed
    }

    /// Whether each thread takes blocks of its own; otherwise all work on one block.
    pub fn is_private(&self) -> bool {
        matches!(self.method, Method::Winograd(_, Kept::Whole)) && self.weights_len * 4 <= PRIVATE_WEIGHT_BYTES
    }

    /// Strips of a block: of one plane of tiles where each thread has its own, else of all.
    pub fn block_strips(&self) -> usize {
        let one = self.column_lines(self.strip_tiles()) * LANES * 4;
        let (bound, most) = if self.is_private() {
            (PRIVATE_COLUMN_BYTES, self.strips())
        } else {
            (SHARED_COLUMN_BYTES, self.tiles()[0] * self.strips())
        };
        let strips = (bound / one.max(1)).clamp(1, most);
        // blocks of equal size
        most.div_ceil(most.div_ceil(strips))
    }
}

/// Depth tiles of the stem.
fn stem_tiles(depth: usize) -> usize {
    (depth + stem::SHIFT).div_ceil(stem::DEPTHS)
}

/// Tiles along each axis of an output.
pub fn tiles(tiling: Tiling, output_dhw: [usize; 3]) -> [usize; 3] {
    let outputs = tiling.outputs();
    std::array::from_fn(|axis| output_dhw[axis].div_ceil(outputs[axis]))
}

/// Border behind each axis that the last tile reads.
fn border_after(tiling: Tiling, input_dhw: [usize; 3], output_dhw: [usize; 3]) -> [usize; 3] {
    let (tiles, steps, inputs) = (tiles(tiling, output_dhw), tiling.steps(), tiling.inputs());
    std::array::from_fn(|axis| {
        ((tiles[axis] - 1) * steps[axis] + inputs[axis]).saturating_sub(input_dhw[axis] + 1).max(1)
    })
}

/// Estimated nanoseconds of a convolution on one core. Products at 70 G a second, 0.2 and 0.1 ns a value of V and M, 0.15
/// more each where the transforms along D and H go through memory, weights at 20 GB/s, 0.04 (0.06) ns a value of U that
/// is made each time; direct at 60 G multiply-adds a second.
fn cost_ns(method: Method, c_in: usize, c_out: usize, output_dhw: [usize; 3]) -> f64 {
    match method {
        Method::Winograd(tiling, kept) => {
            let tiles = tiles(tiling, output_dhw).iter().product::<usize>() as f64;
            let values = tiles * tiling.frequencies() as f64;
            let (c_in, c_out) = (c_in as f64, c_out as f64);
            let made = match kept {
                Kept::Whole => 0.0,
                Kept::Rows => 0.04,
                Kept::Planes => 0.06,
            };
            let whole = tiling.weights(Kept::Whole) as f64 * c_in * c_out;
            let memory = if whole * 4.0 > PRIVATE_WEIGHT_BYTES as f64 { 0.15 } else { 0.0 };
            values * c_in * c_out / 70.0
                + values * memory * (c_in + c_out)
                + values * (0.2 * c_in + 0.1 * c_out)
                + tiling.weights(kept) as f64 * c_in * c_out * 4.0 / 20.0
                + whole * made
        }
        _ => (27 * c_in * c_out) as f64 * output_dhw.iter().product::<usize>() as f64 / 60.0,
    }
}

/// Two linear layers with ReLU between and a sigmoid behind.
#[derive(Clone, Debug)]
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

impl Gate {
    fn len(&self) -> usize {
        self.w0.len() + self.b0.len() + self.w2.len() + self.b2.len()
    }
}

/// A residual block.
#[derive(Clone, Debug)]
pub struct Block {
    /// `layer{stage}.{index}`.
    pub name: String,
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

/// A whole network, without its convolutions' weights.
#[derive(Clone, Debug)]
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
    /// Floats of all convolutions' weights.
    pub weights_len: usize,
    /// Multiply-adds of one run, as the architecture counts them.
    pub macs: u64,
}

/// The stem's copy of the input with its border of zeros: 4 planes, 3 rows and 3 columns before, enough behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StemInput {
    /// Voxels along each axis with the border.
    pub bordered: [usize; 3],
}

impl StemInput {
    /// Planes, rows, columns of border before the input.
    pub const BEFORE: [usize; 3] = [1 + stem::SHIFT, 3, 3];

    fn new(input_dhw: [usize; 3]) -> Self {
        let [d, h, w] = input_dhw;
        // Whole depth tiles; the last output of a row of n reads 7 voxels from 2 * (ceil(n / 2) - 1)
        let depth = stem_tiles(d) * stem::DEPTHS + 2;
        Self { bordered: [depth, 2 * h.div_ceil(2) + 5, 2 * w.div_ceil(2) + 5] }
    }
    /// Floats of a row.
    pub const fn row(&self) -> usize {
        self.bordered[2]
    }
    /// Floats of a plane.
    pub const fn plane(&self) -> usize {
        self.bordered[1] * self.bordered[2]
    }
    /// Floats of all, and the sixteen that are read behind the last.
    pub const fn total(&self) -> usize {
        self.bordered[0] * self.plane() + LANES
    }
}

impl Plan {
    /// Rearranges `model`.
    pub fn new(model: &Model) -> Self {
        let architecture = &model.manifest.architecture;
        let mut x = Shape::new(architecture.base_width, architecture.stem_dhw());
        let mut stem = conv(model, ["stem.0", "stem.1"], x, x, 2);
        stem.input.c = 1;
        let mut blocks = Vec::with_capacity(STAGES * BLOCKS);
        for stage in 1..=STAGES {
            for index in 0..BLOCKS {
                let name = format!("layer{stage}.{index}");
                let strided = stage > 1 && index == 0;
                let y = Shape::new(architecture.stage_channels(stage), architecture.stage_dhw(stage));
                let stride = if strided { 2 } else { 1 };
                let gate = |part: &str| Gate {
                    w0: model.weights.get(&format!("{name}.{part}.fc.0.weight")).to_vec(),
                    b0: model.weights.get(&format!("{name}.{part}.fc.0.bias")).to_vec(),
                    w2: model.weights.get(&format!("{name}.{part}.fc.2.weight")).to_vec(),
                    b2: model.weights.get(&format!("{name}.{part}.fc.2.bias")).to_vec(),
                };
                let part = |part: &str, bn: &str, x, y, stride| {
                    conv(model, [&format!("{name}.{part}"), &format!("{name}.{bn}")], x, y, stride)
                };
                blocks.push(Block {
                    conv1: part("conv1", "bn1", x, y, stride),
                    conv2: part("conv2", "bn2", y, y, 1),
                    shortcut: strided.then(|| part("downsample.0", "downsample.1", x, y, 2)),
                    depth: architecture.depth_attention.then(|| gate("da")),
                    channel: architecture.channel_attention.then(|| gate("se")),
                    name,
                });
                x = y;
            }
        }
        let mut plan = Self {
            input_dhw: architecture.input_dhw,
            stem,
            blocks,
            order: architecture.attention_order,
            head_weight: model.weights.head_weight().to_vec(),
            head_bias: model.weights.head_bias().to_vec(),
            weights_len: 0,
            macs: architecture.macs(),
        };
        plan.choose_methods();
        plan.lay_out();
        plan
    }

    /// Every convolution, in the order they run.
    pub fn convolutions(&self) -> impl Iterator<Item = &Conv> {
        let blocks = self.blocks.iter().flat_map(|b| [Some(&b.conv1), Some(&b.conv2), b.shortcut.as_ref()]);
        std::iter::once(&self.stem).chain(blocks.flatten())
    }

    fn convolutions_mut(&mut self) -> impl Iterator<Item = &mut Conv> {
        let blocks = self.blocks.iter_mut().flat_map(|b| [Some(&mut b.conv1), Some(&mut b.conv2), b.shortcut.as_mut()]);
        std::iter::once(&mut self.stem).chain(blocks.flatten())
    }

    fn gates(&self) -> impl Iterator<Item = &Gate> {
        self.blocks.iter().flat_map(|b| [b.depth.as_ref(), b.channel.as_ref()]).flatten()
    }

    /// Gives each 3x3x3 convolution its method: see the module's page.
    fn choose_methods(&mut self) {
        let options = |conv: &Conv| -> Vec<Method> {
            if conv.taps != 27 {
                return vec![if conv.taps == STEM_TAPS { Method::Depth } else { Method::Direct }];
            }
            // Weights that stay in the cache are kept whole: what is made each time would be made for every block.
            let whole =
                |tiling: Tiling| 4 * tiling.weights(Kept::Whole) * conv.input.padded_c() * conv.output.padded_c();
            let winograd = |tilings: &[Tiling]| -> Vec<Method> {
                let all = tilings.iter().flat_map(|t| Kept::ALL.map(|kept| (*t, kept)));
                all.filter(|(t, kept)| *kept == Kept::Whole || whole(*t) > PRIVATE_WEIGHT_BYTES)
                    .map(|(t, kept)| Method::Winograd(t, kept))
                    .collect()
            };
            if conv.stride == 1 {
                return winograd(&Tiling::STRIDE_1);
            }
            let mut all = winograd(&Tiling::STRIDE_2);
            all.push(Method::Direct);
            all
        };
        let cost =
            |conv: &Conv, method| cost_ns(method, conv.input.padded_c(), conv.output.padded_c(), conv.output.dhw);
        let bytes = |conv: &Conv, method: Method| match method {
            Method::Winograd(tiling, kept) => 4 * tiling.weights(kept) * conv.input.padded_c() * conv.output.padded_c(),
            Method::Direct | Method::Depth => 0,
        };
        for conv in self.convolutions_mut() {
            let best = options(conv).into_iter().min_by(|a, b| cost(conv, *a).total_cmp(&cost(conv, *b)));
            conv.method = best.unwrap_or(Method::Direct);
        }
        loop {
            let total: usize = self.convolutions().map(|conv| bytes(conv, conv.method)).sum();
            if total <= WINOGRAD_BYTES {
                return;
            }
            // The cheapest step down, in time lost a byte saved; the first of equals.
            let mut cheapest: Option<(f64, usize, Method)> = None;
            for (index, conv) in self.convolutions().enumerate() {
                for method in options(conv) {
                    let saved = bytes(conv, conv.method).saturating_sub(bytes(conv, method));
                    if saved == 0 {
                        continue;
                    }
                    let price = (cost(conv, method) - cost(conv, conv.method)) / saved as f64;
                    if cheapest.is_none_or(|(least, ..)| price < least) {
                        cheapest = Some((price, index, method));
                    }
                }
            }
            let Some((_, index, method)) = cheapest else { return };
            if let Some(conv) = self.convolutions_mut().nth(index) {
                conv.method = method;
            }
        }
    }

    /// Borders, offsets and places of weights, once methods are chosen.
    fn lay_out(&mut self) {
        // One shape a stage: the largest border that any of its readers needs.
        let shapes: Vec<Shape> = (1..=STAGES)
            .map(|stage| {
                let own = self.blocks[(stage - 1) * BLOCKS].conv2.input;
                let mut shape = own;
                for conv in self.convolutions().filter(|conv| conv.taps == 27) {
                    if conv.input == own
                        && let Method::Winograd(tiling, _) = conv.method
                    {
                        let after = border_after(tiling, own.dhw, conv.output.dhw);
                        shape.after = std::array::from_fn(|axis| shape.after[axis].max(after[axis]));
                    }
                }
                shape
            })
            .collect();
        let mut x = shapes[0];
        self.stem.output = x;
        for (index, block) in self.blocks.iter_mut().enumerate() {
            let y = shapes[index / BLOCKS];
            (block.conv1.input, block.conv1.output) = (x, y);
            (block.conv2.input, block.conv2.output) = (y, y);
            if let Some(shortcut) = &mut block.shortcut {
                (shortcut.input, shortcut.output) = (x, y);
            }
            x = y;
        }
        let stem_input = self.stem_input();
        let mut at = 0;
        for conv in self.convolutions_mut() {
            conv.lay_out(stem_input);
            conv.weights_at = at;
            at += conv.weights_len;
        }
        self.weights_len = at;
    }

    /// The stem's copy of the input.
    pub fn stem_input(&self) -> StemInput {
        StemInput::new(self.input_dhw)
    }

    /// Floats of the largest activation.
    pub fn activation_len(&self) -> usize {
        self.convolutions().map(|conv| conv.output.len()).max().unwrap_or(0)
    }

    /// Floats of the partial sums: of each block of channels, row of tiles (or of voxels, for the last) and plane.
    pub fn sums_len(&self) -> usize {
        let of = |conv: &Conv, rows: usize| conv.output.padded_c() * rows * conv.output.dhw[0];
        let last = self.blocks.last().map_or(0, |b| of(&b.conv2, b.conv2.output.dhw[1]));
        self.blocks.iter().map(|b| of(&b.conv2, b.conv2.strips())).max().unwrap_or(0).max(last)
    }

    /// Largest product of planes and padded channels.
    pub fn planes_len(&self) -> usize {
        self.convolutions().map(|conv| conv.output.dhw[0] * conv.output.padded_c()).max().unwrap_or(0)
    }

    /// Longest input and widest hidden layer of an attention.
    pub fn gate_lengths(&self) -> [usize; 2] {
        let longest = |len: fn(&Gate) -> usize| self.gates().map(len).max().unwrap_or(0);
        [longest(|g| g.b2.len()), longest(|g| g.b0.len())]
    }

    /// Floats of the transforms' scratch for `threads` threads.
    pub fn scratch_len(&self, threads: usize, kernels: &Kernels) -> usize {
        self.convolutions().map(|conv| conv.scratch_len(threads, kernels)).max().unwrap_or(0)
    }

    /// Bytes that all this takes besides the convolutions' weights.
    pub fn small_bytes(&self) -> usize {
        let gates: usize = self.gates().map(Gate::len).sum();
        let biases: usize = self.convolutions().map(|c| c.bias.len()).sum();
        4 * (gates + biases + self.head_weight.len() + self.head_bias.len())
    }
}

/// Where a 3x3x3 kernel's taps of each block of channels lie, from the first: kz, ky, kx, block.
fn taps_of(input: Shape) -> Vec<usize> {
    let mut offsets = Vec::with_capacity(27 * input.blocks());
    for tap in 0..27 {
        for block in 0..input.blocks() {
            offsets.push(tap / 9 * input.plane() + tap / 3 % 3 * input.row() + tap % 3 * LANES + block * input.block());
        }
    }
    offsets
}

/// As [`taps_of`] for the middle tap alone.
fn centre_of(input: Shape) -> Vec<usize> {
    (0..input.blocks()).map(|block| input.at(block, [0, 0, 0])).collect()
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

fn conv(model: &Model, [name, bn]: [&str; 2], input: Shape, output: Shape, stride: usize) -> Conv {
    let (scale, bias) = folded(model, bn);
    let weights = model.weights.tensor(&format!("{name}.weight"));
    Conv {
        name: name.to_owned(),
        input,
        output,
        taps: weights.shape[2..].iter().product(),
        stride,
        method: Method::Direct,
        weights_at: 0,
        weights_len: 0,
        bias,
        scale,
        offsets: Vec::new(),
        weight_rows: Vec::new(),
    }
}

/// Where weight (input channel or tap `k` of `depth`, output channel `co`) lies in panels of `vectors` vectors.
pub fn panel_index(vectors: usize, depth: usize, padded_c_out: usize, k: usize, co: usize) -> usize {
    let vector = co / LANES;
    let panel = vector / vectors;
    let count = vectors.min(padded_c_out / LANES - panel * vectors);
    panel * vectors * depth * LANES + (k * count + vector % vectors) * LANES + co % LANES
}

/// The weights of input channel `ci` of `conv`, for all output channels, to their places in `write(index, value)`.
///
/// `weights` is `[c_out][c_in][taps]`.
pub fn pack_channel(conv: &Conv, kernels: &Kernels, weights: &[f32], ci: usize, mut write: impl FnMut(usize, f32)) {
    let (c_in, taps) = (conv.input.c, conv.taps);
    let (padded_in, padded_out) = (conv.input.padded_c(), conv.output.padded_c());
    let vectors = kernels.vectors;
    let kernel = |co: usize| &weights[(co * c_in + ci) * taps..][..taps];
    match conv.method {
        Method::Winograd(tiling, kept) => {
            let count = tiling.weights(kept);
            // what lies together in a panel: transforms along W, taps of W, or taps of H and W
            let inner = match kept {
                Kept::Whole => count / (tiling.weights(Kept::Rows) / 3),
                Kept::Rows => 3,
                Kept::Planes => 9,
            };
            // sixteen outputs at a time, so that whole lines are written
            let mut transformed = vec![0.0_f64; count * LANES];
            let mut one = vec![0.0; count];
            for first in (0..conv.output.c).step_by(LANES) {
                let outputs = LANES.min(conv.output.c - first);
                for lane in 0..outputs {
                    let scale = conv.scale[first + lane];
                    let w: [f64; 27] = std::array::from_fn(|k| f64::from(kernel(first + lane)[k]) * scale);
                    tiling.kernel_transform(&w, kept, &mut one);
                    for (f, value) in one.iter().enumerate() {
                        transformed[f * LANES + lane] = *value;
                    }
                }
                for f in 0..count {
                    let row = f / inner * inner * padded_in * padded_out;
                    let k = f % inner * padded_in + ci;
                    let at = row + panel_index(kernels.panel, inner * padded_in, padded_out, k, first);
                    for lane in 0..outputs {
                        write(at + lane, transformed[f * LANES + lane] as f32);
                    }
                }
            }
        }
        Method::Depth => {
            for co in 0..conv.output.c {
                for tap in 0..stem::PLANE_TAPS {
                    let w = [0, 1, 2].map(|kd| f64::from(kernel(co)[kd * stem::PLANE_TAPS + tap]) * conv.scale[co]);
                    for (f, value) in Four::g(w).iter().enumerate().take(stem::FREQUENCIES) {
                        let first = f * stem::PLANE_TAPS * padded_out;
                        write(first + panel_index(vectors, stem::PLANE_TAPS, padded_out, tap, co), *value as f32);
                    }
                }
            }
        }
        Method::Direct => {
            let depth = taps * padded_in;
            for co in 0..conv.output.c {
                for (tap, w) in kernel(co).iter().enumerate() {
                    let value = (f64::from(*w) * conv.scale[co]) as f32;
                    write(panel_index(vectors, depth, padded_out, tap * padded_in + ci, co), value);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::cpu::dispatch::Isa;
    use crate::model::Architecture;

    fn plan(architecture: &Architecture) -> Plan {
        Plan::new(&Model::synthetic("t", architecture, 1).unwrap())
    }

    #[test]
    fn panels_hold_every_weight_once() {
        for (vectors, padded_c_out) in [(4, 64), (4, 16), (4, 80), (1, 48), (4, 112)] {
            let depth = 5;
            let mut seen = vec![false; depth * padded_c_out];
            for k in 0..depth {
                for co in 0..padded_c_out {
                    let at = panel_index(vectors, depth, padded_c_out, k, co);
                    assert!(!std::mem::replace(&mut seen[at], true));
                }
            }
            assert!(seen.into_iter().all(|s| s));
        }
    }

    #[test]
    fn the_full_network_keeps_within_its_bounds() {
        let plan = plan(&Architecture::full());
        let winograd: usize =
            plan.convolutions().filter(|c| c.method != Method::Direct).map(|c| c.weights_len * 4).sum();
        assert!(winograd <= WINOGRAD_BYTES, "{winograd}");
        assert_eq!(plan.convolutions().map(Conv::macs).sum::<u64>() / 1_000_000_000, 636);
        for conv in plan.convolutions().filter(|c| c.taps == 27 && c.stride == 1) {
            assert!(matches!(conv.method, Method::Winograd(..)), "{}", conv.name);
        }
        for name in ["layer1.0.conv1", "layer1.1.conv2", "layer2.0.conv2", "layer2.1.conv2"] {
            let conv = plan.convolutions().find(|c| c.name == name).unwrap();
            let tiling = if name.starts_with("layer1") { Tiling::F464 } else { Tiling::F444 };
            assert_eq!(conv.method, Method::Winograd(tiling, Kept::Whole), "{name}");
        }
        for isa in Isa::ALL {
            let Some(kernels) = Kernels::of(isa) else { continue };
            for threads in [1, 2, 16] {
                let bound = SHARED_COLUMN_BYTES + threads * (4 << 20);
                assert!(plan.scratch_len(threads, &kernels) * 4 <= bound, "{isa} {threads}");
            }
        }
    }

    #[test]
    fn borders_reach_as_far_as_the_last_tile_reads() {
        let architecture = Architecture { base_width: 4, input_dhw: [5, 21, 30], ..Architecture::full() };
        let plan = plan(&architecture);
        for conv in plan.convolutions() {
            let Method::Winograd(tiling, _) = conv.method else { continue };
            let (tiles, steps, inputs) = (conv.tiles(), tiling.steps(), tiling.inputs());
            for axis in 0..3 {
                let reads = (tiles[axis] - 1) * steps[axis] + inputs[axis];
                assert!(reads <= conv.input.bordered()[axis], "{} axis {axis}", conv.name);
            }
        }
        assert!(plan.blocks.windows(2).all(|b| b[0].conv2.output == b[1].conv1.input));
        assert_eq!(plan.stem.output, plan.blocks[0].conv1.input);
    }
}
