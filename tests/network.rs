//! The network against PyTorch, and the backends against each other.
//!
//! The golden outputs come from `tests/golden/network/make.py`, which builds the same network in PyTorch. Weights and
//! inputs come from the counter-based generator in `darnet::model::synthetic`, so only outputs are stored.
//!
//! Tolerances (|d| the largest difference of two logits): reference with PyTorch 1e-4 * max(1, max |logit|); cpu with
//! reference 1e-3 * max(1, max |logit|), probabilities 1e-4.

use std::sync::Arc;
use std::time::{Duration, Instant};

use darnet::engine::{BackendKind, CancelToken, EngineError, EngineOptions, Inference, prepare, softmax};
use darnet::model::synthetic::{self, Stream};
use darnet::model::{Architecture, AttentionOrder, Model};
use serde::Deserialize;

#[derive(Deserialize)]
struct Goldens {
    schema: String,
    cases: Vec<Golden>,
}

#[derive(Deserialize)]
struct Golden {
    name: String,
    seed: u64,
    architecture: Architecture,
    parameters: u64,
    logits: Vec<f32>,
    scores: Vec<f32>,
    pooled: Vec<f32>,
    feature_shape_cdhw: [usize; 4],
    feature_sum: f64,
    feature_sum_squares: f64,
    feature_max: f64,
    feature_samples: Vec<f32>,
}

fn goldens() -> Vec<Golden> {
    let all: Goldens = serde_json::from_str(include_str!("golden/network/golden.json")).unwrap();
    assert_eq!(all.schema, "darnet.golden-network/1");
    all.cases
}

fn run(kind: BackendKind, threads: usize, model: &Model, input: &[f32]) -> Inference {
    let backend = prepare(kind, model, &EngineOptions { threads, ..EngineOptions::default() }).unwrap();
    let mut out = Inference::default();
    backend.session().unwrap().run(input, &CancelToken::new(), &mut out).unwrap();
    out
}

fn max_abs(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |m, v| m.max(v.abs()))
}

fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |m, (x, y)| m.max((x - y).abs()))
}

/// Compares everything stored of a golden case, each against its own magnitude.
fn assert_matches_golden(got: &Inference, golden: &Golden, tolerance: f32) {
    let name = &golden.name;
    let near = |what: &str, a: &[f32], b: &[f32]| {
        let bound = tolerance * max_abs(b).max(1.0);
        let difference = max_difference(a, b);
        assert!(difference <= bound, "{name}: {what} differ by {difference}, bound {bound}");
    };
    near("logits", &got.logits, &golden.logits);
    near("pooled vectors", &got.pooled, &golden.pooled);
    let scores = max_difference(&got.scores, &golden.scores);
    assert!(scores <= 1e-4, "{name}: scores differ by {scores}");
    assert_eq!(got.feature_shape_cdhw, golden.feature_shape_cdhw, "{name}");
    let map = &got.feature_map;
    let stream = Stream::new(golden.seed, "samples");
    let count = golden.feature_samples.len() as u64;
    let samples: Vec<f32> = (0..count).map(|i| map[(stream.bits(i) % map.len() as u64) as usize]).collect();
    let bound = tolerance * golden.feature_max.max(1.0) as f32;
    let difference = max_difference(&samples, &golden.feature_samples);
    assert!(difference <= bound, "{name}: feature maps differ by {difference}, bound {bound}");
    let wide = || map.iter().map(|&v| f64::from(v));
    let relative = |a: f64, b: f64| (a - b).abs() <= f64::from(tolerance) * b.abs().max(1.0);
    assert!(relative(wide().sum(), golden.feature_sum), "{name}: sum of the feature map");
    assert!(relative(wide().map(|v| v * v).sum(), golden.feature_sum_squares), "{name}: sum of squares");
    assert!(relative(wide().fold(0.0, f64::max), golden.feature_max), "{name}: largest value");
}

fn assert_backends_agree(cpu: &Inference, reference: &Inference, name: &str) {
    let bound = 1e-3 * max_abs(&reference.logits).max(1.0);
    let logits = max_difference(&cpu.logits, &reference.logits);
    assert!(logits <= bound, "{name}: logits differ by {logits}, bound {bound}");
    let scores = max_difference(&cpu.scores, &reference.scores);
    assert!(scores <= 1e-4, "{name}: scores differ by {scores}");
    let bound = 1e-3 * max_abs(&reference.feature_map).max(1.0);
    let maps = max_difference(&cpu.feature_map, &reference.feature_map);
    assert!(maps <= bound, "{name}: feature maps differ by {maps}, bound {bound}");
    let bound = 1e-3 * max_abs(&reference.pooled).max(1.0);
    assert!(max_difference(&cpu.pooled, &reference.pooled) <= bound, "{name}: pooled vectors");
}

/// Every stored case but the full-size one, whose 636 G multiply-adds the reference backend's plain loops would take
/// many minutes for; the cpu backend runs it below.
#[test]
fn reference_and_cpu_match_pytorch_in_every_ablation_and_order() {
    let mut seen = 0;
    for golden in goldens().into_iter().filter(|g| g.name != "full") {
        let model = Model::synthetic("golden", &golden.architecture, golden.seed).unwrap();
        assert_eq!(golden.architecture.parameter_count(), golden.parameters, "{}", golden.name);
        let input = synthetic::volume(golden.architecture.input_dhw, golden.seed);
        let reference = run(BackendKind::Reference, 1, &model, &input);
        assert_matches_golden(&reference, &golden, 1e-4);
        let cpu = run(BackendKind::Cpu, 2, &model, &input);
        assert_backends_agree(&cpu, &reference, &golden.name);
        assert_matches_golden(&cpu, &golden, 1e-3);
        seen += 1;
    }
    assert_eq!(seen, 11);
}

#[test]
fn the_cases_tell_the_ablations_and_orders_apart() {
    let all = goldens();
    let case = |name: &str| all.iter().find(|g| g.name == name).unwrap();
    let difference = |a: &str, b: &str| {
        let (a, b) = (case(a), case(b));
        assert_eq!(a.seed, b.seed, "other weights would hide what is compared");
        max_difference(&a.logits, &b.logits)
    };
    assert!(difference("odd-none-depth-first", "odd-ca-depth-first") > 1e-2);
    assert!(difference("odd-none-depth-first", "odd-da-depth-first") > 1e-2);
    assert!(difference("odd-ca-depth-first", "odd-both-depth-first") > 1e-2);
    // the order matters only with both, and then more than the tolerance
    assert_eq!(difference("odd-none-depth-first", "odd-none-channel-first"), 0.0);
    assert_eq!(difference("odd-ca-depth-first", "odd-ca-channel-first"), 0.0);
    assert_eq!(difference("odd-da-depth-first", "odd-da-channel-first"), 0.0);
    assert!(difference("odd-both-depth-first", "odd-both-channel-first") > 5e-3);
    assert_eq!(case("odd-both-channel-first").architecture.attention_order, AttentionOrder::ChannelFirst);
}

#[test]
fn the_full_size_cpu_backend_matches_pytorch() {
    let all = goldens();
    let golden = all.iter().find(|g| g.name == "full").unwrap();
    assert_eq!(golden.parameters, 35_237_163);
    let model = Model::synthetic("golden", &golden.architecture, golden.seed).unwrap();
    let input = synthetic::volume(golden.architecture.input_dhw, golden.seed);
    let backend = prepare(BackendKind::Cpu, &model, &EngineOptions::default()).unwrap();
    let mut session = backend.session().unwrap();
    let mut out = Inference::default();
    let start = Instant::now();
    session.run(&input, &CancelToken::new(), &mut out).unwrap();
    println!("full size, {} threads: {:.2} s", backend.threads(), start.elapsed().as_secs_f64());
    assert_matches_golden(&out, golden, 1e-3);

    // and a run cancelled midway ends within a block of rows on each thread, not within a layer
    let cancel = Arc::new(CancelToken::new());
    let other = Arc::clone(&cancel);
    let canceller = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        other.cancel();
        Instant::now()
    });
    let error = session.run(&input, &cancel, &mut out).unwrap_err();
    let late = canceller.join().unwrap().elapsed();
    assert_eq!(error, EngineError::Cancelled);
    println!("cancelled run ended after {:.1} ms", late.as_secs_f64() * 1e3);
    assert!(late < Duration::from_secs(2), "{late:?}; 50 ms on an idle machine");
}

/// Prints times and memory. `cargo test --release --test network -- --ignored --nocapture measure`
#[test]
#[ignore = "a measurement, not a check; meant for a release build"]
fn measure_the_full_size_cpu_backend() {
    let architecture = Architecture::full();
    let model = Model::synthetic("full", &architecture, 2026).unwrap();
    let input = synthetic::volume(architecture.input_dhw, 2026);
    for threads in [2, 1] {
        let start = Instant::now();
        let backend =
            prepare(BackendKind::Cpu, &model, &EngineOptions { threads, ..EngineOptions::default() }).unwrap();
        let mut session = backend.session().unwrap();
        let prepared = start.elapsed().as_secs_f64();
        let mut out = Inference::default();
        let mut seconds = [0.0; 3];
        for second in &mut seconds {
            let start = Instant::now();
            session.run(&input, &CancelToken::new(), &mut out).unwrap();
            *second = start.elapsed().as_secs_f64();
        }
        let best = seconds.iter().copied().fold(f64::INFINITY, f64::min);
        let rate = architecture.macs() as f64 / best * 1e-9;
        println!("{threads} threads: prepare {prepared:.2} s, runs {seconds:.2?} s, best {rate:.1} G multiply-adds/s");
        let mib = |bytes: usize| bytes >> 20;
        println!("weights {} MiB, session {} MiB", mib(backend.weight_bytes()), mib(backend.session_bytes()));
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    for golden in goldens().into_iter().filter(|g| g.name == "demo" || g.name.starts_with("odd-both")) {
        let model = Model::synthetic("golden", &golden.architecture, golden.seed).unwrap();
        let input = synthetic::volume(golden.architecture.input_dhw, golden.seed);
        let one = run(BackendKind::Cpu, 1, &model, &input);
        for threads in [2, 3, 7, 16] {
            let many = run(BackendKind::Cpu, threads, &model, &input);
            assert!(one == many, "{}: {threads} threads", golden.name);
        }
    }
}

#[test]
fn a_session_used_again_gives_the_same_bits_and_other_inputs_other_ones() {
    let model = Model::embedded().unwrap();
    let shape = model.manifest.architecture.input_dhw;
    let backend =
        prepare(BackendKind::Auto, &model, &EngineOptions { threads: 2, ..EngineOptions::default() }).unwrap();
    let mut session = backend.session().unwrap();
    let cancel = CancelToken::new();
    let mut outs = vec![Inference::default(); 3];
    let inputs = [5, 6, 5].map(|seed| synthetic::volume(shape, seed));
    for (input, out) in inputs.iter().zip(&mut outs) {
        session.run(input, &cancel, out).unwrap();
        assert_eq!(out.scores, softmax(&out.logits));
    }
    assert!(outs[0] == outs[2]);
    assert!(outs[0] != outs[1]);
}
