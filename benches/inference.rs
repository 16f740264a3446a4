//! One inference of the embedded model, and single layers of the full network.
//!
//! `cargo bench --bench inference`. Set-up stays outside the timing; each network's output is checked once before.
//! Throughput is in multiply-adds: "Gelem/s" reads as G multiply-adds a second.

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
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
        let backend = prepare(BackendKind::Cpu, &model, &EngineOptions { threads, ..EngineOptions::default() })
            .expect("a pool starts");
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

/// One block of output rows of a 3x3x3 convolution, as each stage of the full network has it.
fn layers(c: &mut Criterion) {
    let mut group = c.benchmark_group("conv3_rows");
    let stages =
        [(64, 64, 112, 1, 8), (64, 128, 56, 2, 8), (128, 128, 56, 1, 8), (256, 256, 28, 1, 8), (512, 512, 14, 1, 8)];
    for (c_in, c_out, w, stride, rows) in stages {
        let x = Stream::new(1, "x").fill(input.len(), 0.5, 0.5);
        let weights = Stream::new(1, "w").fill(27 * c_in * c_out, 0.0, 0.1);
        let mut dst = vec![0.0; rows * (w + 2) * c_out];
        group.throughput(Throughput::Elements((27 * c_in * c_out * rows * w) as u64));
        group.bench_function(format!("{c_in}to{c_out}_w{w}_stride{stride}"), |b| {});
    }
    group.finish();
}

fn config() -> Criterion {
    Criterion::default().sample_size(10).measurement_time(Duration::from_secs(3)).without_plots()
}

criterion_group! { name = benches; config = config(); targets = embedded, layers }
criterion_main!(benches);
