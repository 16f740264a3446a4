//! The network's steps on the GPU: what is prepared once a model, and what a session owns.

use std::borrow::Cow;
use std::ffi::c_void;
use std::sync::Arc;

use half::f16;

use super::choices::{self, Key};
use super::conv::{
    Choice, Chooser, Conv, ConvError, LAYERS, Maker, Places, Prepared as PreparedConv, Shape, Trial, Variant,
    block_source, longest_input, longest_output,
};
use super::cudnn::Cudnn;
use super::weights::{Folded, by_hidden, by_plane, fold, stem_fragments, transposed};
use crate::engine::{DeviceInput, LayerTiming};
use crate::gpu::{DeviceBuffer, Event, Function, Gpu, GpuError, Graph, Module, Pinned, Source, Stream};
use crate::model::architecture::{BLOCKS, STAGES};
use crate::model::{Architecture, AttentionOrder, Model};

/// Output rows of the stem a block of threads.
const STEM_ROWS: usize = 8;
/// Threads of the stem: seven warps, because a row of 112 voxels has seven tiles of 16.
const STEM_THREADS: u32 = 224;
/// Parts of a plane when its sums are made apart from the convolution.
const SUM_PARTS: usize = 28;
/// Blocks of threads that share a block's scales.
const CHANNEL_BLOCKS: u32 = 16;
/// Runs of which the median of each step counts.
const PROFILE_RUNS: usize = 9;
/// Alignment of parts of one buffer.
const ALIGN: usize = 256;

/// One block's attentions on the GPU.
struct Attention {
    /// First matrix, its bias, second matrix, its bias; `None` where there is no depth attention.
    depth: Option<[DeviceBuffer; 4]>,
    /// The same for channel attention.
    channel: Option<[DeviceBuffer; 4]>,
    means: Function,
    depth_kernel: Function,
    channel_kernel: Function,
}

struct Block {
    name: String,
    channels: usize,
    dhw: [usize; 3],
    conv1: PreparedConv,
    conv2: PreparedConv,
    shortcut: Option<PreparedConv>,
    attention: Attention,
    merge: Function,
    plane_sums: Function,
}

/// A model's weights and kernels on a GPU, shared by its sessions.
pub(super) struct Prepared {
    pub gpu: Arc<Gpu>,
    pub architecture: Architecture,
    pub arch_name: &'static str,
    pub head_weight: Vec<f32>,
    pub head_bias: Vec<f32>,
    stem: Function,
    stem_shared: usize,
    stem_weights: DeviceBuffer,
    stem_bias: DeviceBuffer,
    blocks: Vec<Block>,
    merge_last: Function,
    pool: Function,
    cudnn_version: Option<usize>,
    cudnn_fault: Option<String>,
}

/// A convolution of a block by name: shape and names of its tensors.
struct Named {
    shape: Shape,
    conv: String,
    bn: String,
}

fn named(architecture: &Architecture) -> Vec<[Option<Named>; 3]> {
    let mut c_in = architecture.base_width;
    let mut input_dhw = architecture.stem_dhw();
    let mut out = Vec::new();
    for stage in 1..=STAGES {
        let c = architecture.stage_channels(stage);
        let output_dhw = architecture.stage_dhw(stage);
        for block in 0..BLOCKS {
            let name = format!("layer{stage}.{block}");
            let stride = if stage > 1 && block == 0 { 2 } else { 1 };
            let shape =
                |c_in, input_dhw, kernel, stride| Shape { c_in, c_out: c, input_dhw, output_dhw, kernel, stride };
            let one = |shape, conv: &str, bn: &str| {
                Some(Named { shape, conv: format!("{name}.{conv}"), bn: format!("{name}.{bn}") })
            };
            out.push([
                one(shape(c_in, input_dhw, 3, stride), "conv1", "bn1"),
                one(shape(c, output_dhw, 3, 1), "conv2", "bn2"),
                if stride == 2 { one(shape(c_in, input_dhw, 1, 2), "downsample.0", "downsample.1") } else { None },
            ]);
            c_in = c;
            input_dhw = output_dhw;
        }
    }
    out
}

/// Hidden widths of depth and channel attention.
pub(super) fn hidden(channels: usize, dhw: [usize; 3]) -> [usize; 2] {
    [dhw[0], Architecture::ca_hidden(channels)]
}

fn stem_source(architecture: &Architecture) -> Source {
    let [id, ih, iw] = architecture.input_dhw;
    let [_, oh, ow] = architecture.stem_dhw();
    let define = |name: &str, value: usize| format!("-D{name}={value}");
    let options = vec![
        "-DSTEM".to_owned(),
        define("C", architecture.base_width),
        define("ID", id),
        define("IH", ih),
        define("IW", iw),
        define("OH", oh),
        define("OW", ow),
        define("ROWS", STEM_ROWS),
    ];
    Source { name: "layers.cu", text: Cow::Borrowed(LAYERS), options, arch_specific: false }
}

/// Shared memory of the stem: the input patch and the packed weights.
fn stem_shared(architecture: &Architecture) -> usize {
    let ow = architecture.stem_dhw()[2];
    let pitch = (2 * ow + 6).div_ceil(4) * 4;
    let patch = 3 * (2 * STEM_ROWS + 5) * pitch * 2;
    patch.div_ceil(16) * 16 + 11 * (architecture.base_width / 8) * 32 * 8
}

/// See [`super::sources`].
pub(super) fn sources() -> Vec<(&'static str, String, Vec<String>, bool)> {
    let full = Architecture::full();
    let mut out = Vec::new();
    let mut add = |source: Source| {
        out.push((source.name, source.text.into_owned(), source.options, source.arch_specific));
    };
    add(stem_source(&full));
    add(Source {
        name: "layers.cu",
        text: Cow::Borrowed(LAYERS),
        options: vec!["-DPLAIN".to_owned()],
        arch_specific: false,
    });
    for stage in 1..=STAGES {
        let (c, dhw) = (full.stage_channels(stage), full.stage_dhw(stage));
        add(block_source(c, dhw, hidden(c, dhw)));
    }
    let mut shapes: Vec<Shape> = Vec::new();
    for named in named(&full).iter().flatten().flatten() {
        if !shapes.contains(&named.shape) {
            shapes.push(named.shape);
        }
    }
    for shape in shapes {
        for variant in Variant::candidates(&shape, 132) {
            add(variant.source(&shape));
        }
    }
    out
}

/// Bytes of page-locked host memory a session takes: input, feature map, pooled vector. What it takes on the GPU is not
/// memory of this process.
pub(super) fn session_bytes(architecture: &Architecture) -> usize {
    let [c, d, h, w] = architecture.feature_shape_cdhw();
    (architecture.input_len() + c * d * h * w + c) * 4
}

/// The buffers that a chooser works on.
struct Bench {
    stream: Stream,
    x: DeviceBuffer,
    y: DeviceBuffer,
    scratch: DeviceBuffer,
    sums: DeviceBuffer,
}

impl Bench {
    fn new(gpu: &Arc<Gpu>, shapes: &[Shape]) -> Result<Self, GpuError> {
        let len = longest_input(shapes);
        // A linear congruential sequence in [-1, 1): the same on every machine.
        let mut state = 0x2545_F491_4F6C_DD1D_u64;
        let values: Vec<f16> = (0..len)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                f16::from_f32(((state >> 40) as f32) / 8_388_608.0 - 1.0)
            })
            .collect();
        let most_planes = shapes.iter().map(|s| s.c_out * s.output_dhw[0]).max().unwrap_or(0);
        // A tile has at least 2 x 8 voxels; the most of a plane at full size is 56 x 14.
        let sums = most_planes * 1024 * 4;
        Ok(Self {
            stream: Stream::new(gpu)?,
            x: DeviceBuffer::holding(gpu, &values)?,
            y: DeviceBuffer::new(gpu, longest_output(shapes) * 2)?,
            scratch: DeviceBuffer::new(gpu, 64 << 20)?,
            sums: DeviceBuffer::new(gpu, sums)?,
        })
    }
}

/// Compiles `sources` side by side: the compiler takes up to a second each, and one core. A kernel that does not compile
/// shows when it is used.
fn load_all(gpu: &Arc<Gpu>, mut sources: Vec<Source>) {
    sources.sort_by(|a, b| (a.name, &a.options).cmp(&(b.name, &b.options)));
    sources.dedup_by(|a, b| a.name == b.name && a.options == b.options);
    std::thread::scope(|scope| {
        for source in &sources {
            scope.spawn(move || gpu.load(source).map(drop));
        }
    });
}

/// Chooses for every shape that `known` does not have; what was tried comes along.
fn choose(gpu: &Arc<Gpu>, model: &Model, known: &mut Vec<(Shape, Choice)>) -> Result<Vec<Trial>, ConvError> {
    let all = named(&model.manifest.architecture);
    let mut wanted: Vec<&Named> = Vec::new();
    for one in all.iter().flatten().flatten() {
        if !known.iter().any(|(s, _)| *s == one.shape) && !wanted.iter().any(|w| w.shape == one.shape) {
            wanted.push(one);
        }
    }
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let shapes: Vec<Shape> = wanted.iter().map(|w| w.shape).collect();
    let bench = Bench::new(gpu, &shapes)?;
    let cudnn = open_cudnn(&bench.stream).ok();
    if gpu.compute_capability() == (9, 0) {
        let variants = |s: &Shape| Variant::candidates(s, gpu.multiprocessors() as usize);
        let sources = shapes.iter().flat_map(|s| variants(s).into_iter().map(|v| v.source(s)));
        load_all(gpu, sources.collect());
    }
    let chooser = Chooser {
        maker: Maker { gpu, cudnn: cudnn.as_ref() },
        stream: &bench.stream,
        x: &bench.x,
        y: &bench.y,
        scratch: &bench.scratch,
        sums: &bench.sums,
    };
    let mut trials = Vec::new();
    for one in wanted {
        let folded = fold(model, &one.conv, &one.bn);
        let (choice, tried) = chooser.choose(&one.shape, &folded)?;
        trials.extend(tried);
        known.push((one.shape, choice));
    }
    Ok(trials)
}

/// Every candidate of every convolution, tried.
pub(super) fn trials(gpu: &Arc<Gpu>, model: &Model) -> Result<Vec<Trial>, ConvError> {
    choose(gpu, model, &mut Vec::new())
}

fn open_cudnn(stream: &Stream) -> Result<Cudnn, String> {
    // SAFETY: whoever asks keeps the stream longer than the handle.
    unsafe { Cudnn::open(stream.raw()) }.map_err(|e| e.to_string())
}

impl Prepared {
    pub fn new(gpu: &Arc<Gpu>, model: &Model, keep: bool) -> Result<Self, ConvError> {
        let architecture = model.manifest.architecture.clone();
        if let Some(dir) = model.dir.as_ref().filter(|_| keep) {
            gpu.keep_cubins(dir);
        }
        let stream = Stream::new(gpu)?;
        let (cudnn, cudnn_fault) = match open_cudnn(&stream) {
            Ok(cudnn) => (Some(cudnn), None),
            Err(fault) => (None, Some(fault)),
        };
        let cudnn_version = cudnn.as_ref().map(Cudnn::version);
        let key = Key::new(gpu, cudnn_version);
        let path = model.dir.as_ref().filter(|_| keep).map(|dir| choices::path(dir, &key));
        let mut known = path.as_ref().map(|p| choices::load(p, &key)).unwrap_or_default();
        let tried = choose(gpu, model, &mut known)?;
        if let Some(path) = path.filter(|_| !tried.is_empty()) {
            choices::store(&path, &key, &known);
        }
        let maker = Maker { gpu, cudnn: cudnn.as_ref() };
        let conv = |one: &Named| -> Result<PreparedConv, ConvError> {
            let folded = fold(model, &one.conv, &one.bn);
            let choice = known.iter().find(|(s, _)| *s == one.shape).map(|(_, c)| c.clone());
            let choice = choice.expect("every shape of the network was chosen for");
            maker.prepare(&one.shape, &folded, &choice)
        };
        let mut sources = vec![stem_source(&architecture)];
        for (shape, choice) in &known {
            sources.push(block_source(shape.c_out, shape.output_dhw, hidden(shape.c_out, shape.output_dhw)));
            if let Choice::Own(variant) = choice {
                sources.push(variant.source(shape));
            }
        }
        load_all(gpu, sources);
        let mut blocks = Vec::new();
        for (i, [conv1, conv2, shortcut]) in named(&architecture).iter().enumerate() {
            let (Some(conv1), Some(conv2)) = (conv1, conv2) else { unreachable!("every block has two") };
            let name = format!("layer{}.{}", i / BLOCKS + 1, i % BLOCKS);
            let (channels, dhw) = (conv2.shape.c_out, conv2.shape.output_dhw);
            let source = block_source(channels, dhw, hidden(channels, dhw));
            let module = gpu.load(&source)?;
            blocks.push(Block {
                channels,
                dhw,
                conv1: conv(conv1)?,
                conv2: conv(conv2)?,
                shortcut: shortcut.as_ref().map(&conv).transpose()?,
                attention: attention(gpu, model, &name, channels, dhw[0], &module)?,
                merge: module.function("merge", 0)?,
                plane_sums: module.function("plane_sums", 0)?,
                name,
            });
        }
        let last = blocks.last().expect("a network has blocks");
        let module = gpu.load(&block_source(last.channels, last.dhw, hidden(last.channels, last.dhw)))?;
        let stem: Folded = fold(model, "stem.0", "stem.1");
        let shared = stem_shared(&architecture);
        Ok(Self {
            stem: gpu.load(&stem_source(&architecture))?.function("stem", shared)?,
            stem_shared: shared,
            stem_weights: DeviceBuffer::holding(gpu, &stem_fragments(&stem))?,
            stem_bias: DeviceBuffer::holding(gpu, &stem.bias)?,
            merge_last: module.function("merge_last", 0)?,
            pool: module.function("pool", 0)?,
            blocks,
            head_weight: model.weights.head_weight().to_vec(),
            head_bias: model.weights.head_bias().to_vec(),
            gpu: Arc::clone(gpu),
            architecture,
            arch_name: if gpu.compute_capability() == (9, 0) { "sm_90a" } else { "cudnn" },
            cudnn_version,
            cudnn_fault,
        })
    }

    /// Bytes of convolution weights on the GPU.
    pub fn weight_bytes(&self) -> usize {
        let convs = self.blocks.iter().flat_map(|b| [Some(&b.conv1), Some(&b.conv2), b.shortcut.as_ref()]);
        convs.flatten().map(PreparedConv::weight_bytes).sum()
    }

    /// What runs, in words.
    pub fn note(&self) -> String {
        let mut own = 0;
        let mut all = 0;
        for conv in self.blocks.iter().flat_map(|b| [Some(&b.conv1), Some(&b.conv2), b.shortcut.as_ref()]).flatten() {
            all += 1;
            own += usize::from(matches!(conv.choice, Choice::Own(_)));
        }
        let cudnn = match (&self.cudnn_version, &self.cudnn_fault) {
            (Some(version), _) => format!("cuDNN {version}"),
            (None, Some(fault)) => format!("without cuDNN ({fault})"),
            (None, None) => "without cuDNN".to_owned(),
        };
        format!("{}, {own} of {all} convolutions by own kernels, {cudnn}", self.gpu.name())
    }
}

fn attention(
    gpu: &Arc<Gpu>,
    model: &Model,
    block: &str,
    channels: usize,
    depth: usize,
    module: &Module,
) -> Result<Attention, GpuError> {
    let get = |part: String| model.weights.get(&part);
    let hold = |values: &[f32]| DeviceBuffer::holding(gpu, values);
    let architecture = &model.manifest.architecture;
    let by_depth = if architecture.depth_attention {
        let part = |p: &str| get(format!("{block}.da.fc.{p}"));
        Some([
            hold(&by_plane(part("0.weight"), depth, channels, depth))?,
            hold(part("0.bias"))?,
            hold(&by_hidden(part("2.weight"), depth, channels, depth))?,
            hold(&by_hidden(part("2.bias"), 1, channels, depth))?,
        ])
    } else {
        None
    };
    let by_channel = if architecture.channel_attention {
        let part = |p: &str| get(format!("{block}.se.fc.{p}"));
        Some([
            hold(part("0.weight"))?,
            hold(part("0.bias"))?,
            hold(&transposed(part("2.weight"), channels, Architecture::ca_hidden(channels)))?,
            hold(part("2.bias"))?,
        ])
    } else {
        None
    };
    Ok(Attention {
        depth: by_depth,
        channel: by_channel,
        means: module.function("means", 0)?,
        depth_kernel: module.function("depth", 0)?,
        channel_kernel: module.function("channel", 0)?,
    })
}

/// Memory that the attentions of all blocks share, device addresses.
#[derive(Clone, Copy)]
struct AttentionMemory {
    sums: u64,
    m: u64,
    partial: u64,
    da: u64,
    ca: u64,
    scale: u64,
}

impl Attention {
    /// The kernels of one block: name, function, blocks of threads, threads, arguments. What they leave in `scale` is
    /// what `merge` multiplies by.
    fn kernels(
        &self,
        order: AttentionOrder,
        channels: usize,
        depth: usize,
        parts: usize,
        memory: AttentionMemory,
    ) -> Vec<(&'static str, &Function, u32, u32, Vec<Arg>)> {
        let p = Arg::Pointer;
        let at = |buffers: &[DeviceBuffer; 4], i: usize| p(buffers[i].ptr());
        let AttentionMemory { sums, m, partial, da, ca, scale } = memory;
        let none = p(0);
        let planes = depth as u32;
        let cells = (channels * depth).div_ceil(256) as u32;
        let parts = Arg::Int(parts as i32);
        let means = |args: Vec<Arg>| ("means", &self.means, planes, 512, args);
        let by_depth = |args: Vec<Arg>| ("depth", &self.depth_kernel, cells, 256, args);
        let by_channel = |blocks: u32, args: Vec<Arg>| ("channel", &self.channel_kernel, blocks, 512, args);
        match (&self.depth, &self.channel) {
            (Some(d), Some(c)) if order == AttentionOrder::ChannelFirst => vec![
                means(vec![p(sums), parts, p(m), none, none, none]),
                by_channel(1, vec![p(m), none, at(c, 0), at(c, 1), at(c, 2), at(c, 3), p(ca), none]),
                means(vec![none, parts, p(m), p(ca), at(d, 0), p(partial)]),
                by_depth(vec![p(partial), at(d, 1), at(d, 2), at(d, 3), p(ca), p(scale)]),
            ],
            (Some(d), Some(c)) => vec![
                means(vec![p(sums), parts, p(m), none, at(d, 0), p(partial)]),
                by_depth(vec![p(partial), at(d, 1), at(d, 2), at(d, 3), none, p(da)]),
                by_channel(CHANNEL_BLOCKS, vec![p(m), p(da), at(c, 0), at(c, 1), at(c, 2), at(c, 3), none, p(scale)]),
            ],
            (Some(d), None) => vec![
                means(vec![p(sums), parts, p(m), none, at(d, 0), p(partial)]),
                by_depth(vec![p(partial), at(d, 1), at(d, 2), at(d, 3), none, p(scale)]),
            ],
            (None, Some(c)) => vec![
                means(vec![p(sums), parts, p(m), none, none, none]),
                by_channel(CHANNEL_BLOCKS, vec![p(m), none, at(c, 0), at(c, 1), at(c, 2), at(c, 3), none, p(scale)]),
            ],
            (None, None) => {
                vec![by_channel(CHANNEL_BLOCKS, vec![none, none, none, none, none, none, none, p(scale)])]
            }
        }
    }
}

/// One step of a run.
struct Step {
    name: String,
    kernel: &'static str,
    macs: u64,
    work: Work,
}

enum Work {
    Conv(Conv),
    Kernel { function: Function, grid: [u32; 3], block: [u32; 3], shared: u32, args: Vec<Arg> },
}

#[derive(Clone, Copy)]
enum Arg {
    Pointer(u64),
    Int(i32),
}

/// A session's memory and steps.
pub(super) struct Network {
    steps: Vec<Step>,
    graph: Graph,
    cudnn: Option<Cudnn>,
    input: DeviceBuffer,
    staging: Pinned<f32>,
    map: DeviceBuffer,
    pooled: DeviceBuffer,
    host_map: Pinned<f32>,
    host_pooled: Pinned<f32>,
    begin: Event,
    end: Event,
    ran: bool,
    _memory: Vec<DeviceBuffer>,
    // After what uses them: fields are dropped in order.
    stream: Arc<Stream>,
    _prepared: Arc<Prepared>,
}

impl Network {
    pub fn new(prepared: &Arc<Prepared>) -> Result<Self, ConvError> {
        let gpu = &prepared.gpu;
        let stream = Arc::new(Stream::new(gpu)?);
        let cudnn = if prepared.cudnn_version.is_some() { open_cudnn(&stream).ok() } else { None };
        let maker = Maker { gpu, cudnn: cudnn.as_ref() };
        let architecture = &prepared.architecture;
        let [d, oh, ow] = architecture.stem_dhw();
        let mut longest = architecture.base_width * d * oh * ow;
        let (mut longest_shortcut, mut scratch_bytes, mut sums_len, mut most_ends) = (0, 0, 0, 0);
        for block in &prepared.blocks {
            let len = block.channels * block.dhw.iter().product::<usize>();
            longest = longest.max(len);
            if block.shortcut.is_some() {
                longest_shortcut = longest_shortcut.max(len);
            }
            for conv in [Some(&block.conv1), Some(&block.conv2), block.shortcut.as_ref()].into_iter().flatten() {
                scratch_bytes = scratch_bytes.max(conv.scratch_bytes(&maker)?);
            }
            let parts = block.conv2.sum_parts().unwrap_or(SUM_PARTS);
            sums_len = sums_len.max(parts * block.channels * block.dhw[0]);
            most_ends = most_ends.max(block.channels * block.dhw[0]);
        }
        let buffer = |bytes: usize| DeviceBuffer::new(gpu, bytes.next_multiple_of(ALIGN));
        let input = buffer(architecture.input_len() * 4)?;
        let mut free: Vec<DeviceBuffer> = (0..3).map(|_| buffer(longest * 2)).collect::<Result<_, _>>()?;
        let shortcut = buffer(longest_shortcut * 2)?;
        let scratch = buffer(scratch_bytes)?;
        let sums = buffer(sums_len * 4)?;
        // m, the hidden layer's parts, da, ca, scale.
        let most_channels = architecture.stage_channels(STAGES);
        let attention = [most_ends, d * d, most_ends, most_channels, most_ends]
            .map(|len| buffer(len * 4))
            .into_iter()
            .collect::<Result<Vec<_>, _>>()?;
        let [m, partial, da, ca, scale] = std::array::from_fn(|i| attention[i].ptr());
        let attention_memory = AttentionMemory { sums: sums.ptr(), m, partial, da, ca, scale };
        let last = prepared.blocks.last().expect("a network has blocks");
        let voxels: usize = last.dhw.iter().product();
        let map = buffer(last.channels * voxels * 4)?;
        let pooled = buffer(last.channels * 4)?;

        let mut steps = Vec::new();
        let (a, b, c) = (free[0].ptr(), free[1].ptr(), free[2].ptr());
        let (mut x, mut t, y) = (a, b, c);
        steps.push(Step {
            name: "stem.0".to_owned(),
            kernel: "own",
            macs: (architecture.base_width * 147 * d * oh * ow) as u64,
            work: Work::Kernel {
                function: prepared.stem.clone(),
                grid: [oh.div_ceil(STEM_ROWS) as u32, d as u32, 1],
                block: [STEM_THREADS, 1, 1],
                shared: prepared.stem_shared as u32,
                args: vec![
                    Arg::Pointer(input.ptr()),
                    Arg::Pointer(prepared.stem_weights.ptr()),
                    Arg::Pointer(prepared.stem_bias.ptr()),
                    Arg::Pointer(x),
                ],
            },
        });
        let order = architecture.attention_order;
        for (index, block) in prepared.blocks.iter().enumerate() {
            let conv = |part: &str, prepared: &PreparedConv, relu, places| -> Result<Step, ConvError> {
                Ok(Step {
                    name: format!("{}.{part}", block.name),
                    kernel: match prepared.choice {
                        Choice::Own(_) => "own sm90",
                        Choice::Cudnn(_) => "cudnn",
                    },
                    macs: prepared.shape.macs(),
                    work: Work::Conv(prepared.bind(&maker, relu, places)?),
                })
            };
            let plain = Places { scratch: scratch.ptr(), ..Places::default() };
            steps.push(conv("conv1", &block.conv1, true, Places { x, y: t, ..plain })?);
            let own_sums = block.conv2.sum_parts();
            let sums_at = if own_sums.is_some() { sums.ptr() } else { 0 };
            steps.push(conv("conv2", &block.conv2, false, Places { x: t, y, sums: sums_at, ..plain })?);
            let [bd, bh, bw] = block.dhw;
            let area = bh * bw;
            let kernel = |part: &str, function: &Function, grid, block_dim, args| Step {
                name: format!("{}.{part}", block.name),
                kernel: "own",
                macs: 0,
                work: Work::Kernel { function: function.clone(), grid, block: block_dim, shared: 0, args },
            };
            let parts = own_sums.unwrap_or(SUM_PARTS.min(area));
            if own_sums.is_none() {
                let args = vec![Arg::Pointer(y), Arg::Pointer(sums.ptr())];
                steps.push(kernel("sums", &block.plane_sums, [parts as u32, bd as u32, 1], [256, 1, 1], args));
            }
            let attended = block.attention.kernels(order, block.channels, bd, parts, attention_memory);
            for (part, function, blocks, threads, args) in attended {
                steps.push(kernel(part, function, [blocks, 1, 1], [threads, 1, 1], args));
            }
            let from = match &block.shortcut {
                Some(prepared) => {
                    steps.push(conv("downsample", prepared, false, Places { x, y: shortcut.ptr(), ..plain })?);
                    shortcut.ptr()
                }
                None => x,
            };
            if index + 1 == prepared.blocks.len() {
                let args = vec![Arg::Pointer(y), Arg::Pointer(scale), Arg::Pointer(from), Arg::Pointer(map.ptr())];
                let grid = [voxels.div_ceil(32) as u32, block.channels.div_ceil(32) as u32, 1];
                steps.push(kernel("merge", &prepared.merge_last, grid, [32, 8, 1], args));
                let args = vec![Arg::Pointer(map.ptr()), Arg::Pointer(pooled.ptr())];
                steps.push(kernel(
                    "pool",
                    &prepared.pool,
                    [block.channels.div_ceil(4) as u32, 1, 1],
                    [128, 1, 1],
                    args,
                ));
            } else {
                let args = vec![Arg::Pointer(y), Arg::Pointer(scale), Arg::Pointer(from), Arg::Pointer(t)];
                // Eight channels a thread, two pieces a thread.
                let grid = [(area * block.channels / 8).div_ceil(512) as u32, bd as u32, 1];
                steps.push(kernel("merge", &block.merge, grid, [256, 1, 1], args));
                std::mem::swap(&mut x, &mut t);
            }
        }
        // A first run outside the graph: libraries load what they load on first use.
        for step in &steps {
            // SAFETY: all buffers were just made and are owned below; nothing else runs on them.
            unsafe { step.launch(&stream, cudnn.as_ref()) }?;
        }
        stream.synchronize()?;
        let graph = stream.capture(|| {
            for step in &steps {
                // SAFETY: as above.
                unsafe { step.launch(&stream, cudnn.as_ref()) }?;
            }
            Ok::<(), ConvError>(())
        })?;
        let mut memory = vec![shortcut, scratch, sums];
        memory.append(&mut free);
        memory.extend(attention);
        Ok(Self {
            steps,
            graph,
            cudnn,
            staging: Pinned::new(gpu, architecture.input_len())?,
            host_map: Pinned::new(gpu, last.channels * voxels)?,
            host_pooled: Pinned::new(gpu, last.channels)?,
            begin: Event::timed(gpu)?,
            end: Event::timed(gpu)?,
            ran: false,
            input,
            map,
            pooled,
            _memory: memory,
            stream,
            _prepared: Arc::clone(prepared),
        })
    }

    /// Copies `input` to the GPU.
    pub fn upload(&mut self, input: &[f32]) -> Result<(), GpuError> {
        // The last run waited for the last copy out of the staging buffer.
        self.staging.copy_from_slice(input);
        // SAFETY: the device buffer has the staging buffer's length; `run` waits before either is touched again.
        unsafe { self.stream.upload(self.input.ptr(), &self.staging, input.len()) }
    }

    /// Runs the network on what lies in the input buffer and waits.
    pub fn run(&mut self) -> Result<(), GpuError> {
        self.stream.record(&self.begin)?;
        // SAFETY: everything the graph names is owned by `self`, and the wait below ends its use.
        unsafe { self.stream.replay(&self.graph) }?;
        self.stream.record(&self.end)?;
        let (pooled, map) = (self.host_pooled.len(), self.host_map.len());
        // SAFETY: both sides have these lengths; nobody reads them before the wait.
        unsafe {
            self.stream.download(&mut self.host_pooled, self.pooled.ptr(), pooled)?;
            self.stream.download(&mut self.host_map, self.map.ptr(), map)?;
        }
        self.ran = true;
        self.stream.synchronize()
    }

    /// Milliseconds between the graph's begin and its end, of the last run.
    pub fn device_ms(&self) -> Option<f64> {
        if !self.ran {
            return None;
        }
        self.end.since_ms(&self.begin).ok().map(f64::from)
    }

    /// Feature map (C, D, H, W) and its means.
    pub fn outputs(&self) -> (&[f32], &[f32]) {
        (&self.host_map, &self.host_pooled)
    }

    pub fn device_input(&self) -> DeviceInput {
        DeviceInput { gpu: Arc::clone(self.stream.gpu()), ptr: self.input.ptr(), stream: Arc::clone(&self.stream) }
    }

    /// Times every step alone: medians.
    pub fn profile(&self) -> Result<Vec<LayerTiming>, ConvError> {
        let gpu = self.stream.gpu();
        let events: Vec<Event> = (0..=self.steps.len()).map(|_| Event::timed(gpu)).collect::<Result<_, _>>()?;
        let mut times: Vec<Vec<f64>> = vec![Vec::new(); self.steps.len()];
        for _ in 0..PROFILE_RUNS {
            self.stream.record(&events[0])?;
            for (step, event) in self.steps.iter().zip(&events[1..]) {
                // SAFETY: everything the step names is owned by `self`, and the wait below ends its use.
                unsafe { step.launch(&self.stream, self.cudnn.as_ref()) }?;
                self.stream.record(event)?;
            }
            self.stream.synchronize()?;
            for (i, times) in times.iter_mut().enumerate() {
                times.push(f64::from(events[i + 1].since_ms(&events[i])?) * 1e-3);
            }
        }
        Ok(self
            .steps
            .iter()
            .zip(times)
            .map(|(step, mut times)| {
                times.sort_by(f64::total_cmp);
                LayerTiming {
                    name: step.name.clone(),
                    kernel: step.kernel,
                    macs: step.macs,
                    seconds: times[times.len() / 2],
                }
            })
            .collect())
    }
}

impl Step {
    /// # Safety
    /// As [`Conv::launch`].
    unsafe fn launch(&self, stream: &Stream, cudnn: Option<&Cudnn>) -> Result<(), ConvError> {
        match &self.work {
            // SAFETY: passed on to the caller.
            Work::Conv(conv) => unsafe { conv.launch(stream, cudnn) },
            Work::Kernel { function, grid, block, shared, args } => {
                let mut values = args.clone();
                let mut pointers: Vec<*mut c_void> = values
                    .iter_mut()
                    .map(|arg| match arg {
                        Arg::Pointer(p) => (&raw mut *p).cast(),
                        Arg::Int(i) => (&raw mut *i).cast(),
                    })
                    .collect();
                // SAFETY: the list of each step is its kernel's parameters; buffers as the caller promises.
                unsafe { stream.launch(function, *grid, *block, *shared, &mut pointers) }?;
                Ok(())
            }
        }
    }
}
