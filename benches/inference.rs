//! One inference of the embedded model, and single layers of the full network for each instruction set.
//!
//! `cargo bench --bench inference`. Set-up stays outside the timing; outputs are compared once before. Throughput is in
//! multiply-adds of the direct convolution: "Gelem/s" reads as G multiply-adds a second.

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use darnet::engine::cpu::arena::Tensor;
use darnet::engine::cpu::conv::{self, Context, Sums};
use darnet::engine::cpu::dispatch::{Isa, Kernels, Tiling};
use darnet::engine::cpu::plan::{Conv, Method};
use darnet::engine::cpu::pool::Pool;
use darnet::engine::cpu::winograd::Kept;
use darnet::engine::{BackendKind, CancelToken, EngineOptions, Inference, prepare};
use darnet::model::Model;
use darnet::model::synthetic::{self, Stream};

fn embedded(c: &mut Criterion) {
    let model = Model::embedded().expect("the embedded model loads");
    let architecture = &model.manifest.architecture;
    let input = synthetic::volume(architecture.input_dhw, 1);
    let cancel = CancelToken::new();
    let mut group = c.benchmark_group("embedded");
    group.throughput(Throughput::Elements(architecture.macs()));
    let mut first: Option<Inference> = None;
    for threads in [1, 2] {
        let options = EngineOptions { threads, ..EngineOptions::default() };
        let backend = prepare(BackendKind::Cpu, &model, &options).expect("a pool starts");
        let mut session = backend.session().expect("a session opens");
        let mut out = Inference::default();
        session.run(&input, &cancel, &mut out).expect("it runs");
        assert!(first.get_or_insert_with(|| out.clone()) == &out, "threads change no bit");
        group.bench_function(format!("cpu/threads={threads}"), |b| {
            b.iter(|| session.run(black_box(&input), &cancel, &mut out).expect("it runs"));
        });
    }
    group.finish();
}

/// Name, channels, input, tilings and how weights are kept.
type Layer = (&'static str, [usize; 2], [usize; 3], &'static [(Tiling, Kept)]);

/// Each kind of 3x3x3 convolution of the full network, on one thread.
fn layers(c: &mut Criterion) {
    let pool = Pool::new(1, || {}).expect("a pool starts");
    let cancel = CancelToken::new();
    use Kept::{Planes, Rows, Whole};
    use Tiling::{F222, F244, F444, P222, P444};
    let stages: [Layer; 7] = [
        ("layer1", [64, 64], [64, 112, 112], &[(F444, Whole)]),
        ("layer2.0.conv1", [64, 128], [64, 112, 112], &[(P444, Whole), (P222, Whole)]),
        ("layer2", [128, 128], [32, 56, 56], &[(F444, Whole), (F444, Rows)]),
        ("layer3.0.conv1", [128, 256], [32, 56, 56], &[(P444, Whole), (P444, Rows)]),
        ("layer3", [256, 256], [16, 28, 28], &[(F444, Whole), (F444, Rows), (F444, Planes), (F244, Whole)]),
        ("layer4.0.conv1", [256, 512], [16, 28, 28], &[(P444, Rows), (P222, Whole)]),
        ("layer4", [512, 512], [8, 14, 14], &[(F444, Rows), (F444, Planes), (F244, Whole), (F222, Whole)]),
    ];
    for (name, channels, input_dhw, tilings) in stages {
        let mut group = c.benchmark_group(name);
        for isa in Isa::ALL.into_iter().filter(|isa| *isa != Isa::Scalar && isa.is_available()) {
            let kernels = Kernels::of(isa).expect("it is available");
            let context = Context { pool: &pool, kernels: &kernels, cancel: &cancel };
            for &(tiling, kept) in tilings {
                let conv = Conv::alone(channels, input_dhw, tiling.stride(), Method::Winograd(tiling, kept));
                let weights = Stream::new(1, "w").fill(27 * channels[0] * channels[1], 0.0, 0.1);
                let packed = conv.packed(&kernels, &weights);
                let mut input = Tensor::new(conv.input.len()).expect("memory");
                input.reshape(conv.input, &pool);
                let mut output = Tensor::new(conv.output.len()).expect("memory");
                output.reshape(conv.output, &pool);
                let mut sums = vec![0.0; Sums::len(conv.output, conv.strips())];
                let mut scratch = vec![0.0; conv.scratch_len(1, &kernels)];
                let tiles: Vec<usize> = (0..conv.tiles()[0]).collect();
                group.throughput(Throughput::Elements(conv.macs()));
                group.bench_function(format!("{isa}/{}/{kept:?}", tiling.as_str()), |b| {
                    b.iter(|| {
                        let sums = Some(Sums(&mut sums));
                        conv::winograd(&context, &conv, &packed, &input, &mut output, true, sums, &mut scratch, &tiles)
                    });
                });
            }
        }
        group.finish();
    }
}

fn config() -> Criterion {
    Criterion::default().sample_size(10).measurement_time(Duration::from_secs(3)).without_plots()
}

criterion_group! { name = benches; config = config(); targets = embedded, layers }
criterion_main!(benches);
