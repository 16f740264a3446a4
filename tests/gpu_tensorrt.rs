//! What of the tensorrt backend needs a GPU, with the library that `$DARNET_TENSORRT` names, else TensorRT for RTX of
//! `.tensorrt`. `tests/run` names these tests as not run where there is no GPU.

use std::path::{Path, PathBuf};

use darnet::engine::tensorrt::device::DeviceInfo;
use darnet::engine::tensorrt::library::LIBRARY_ENV;
use darnet::engine::tensorrt::{Library, Precision, TensorrtBackend, TensorrtOptions};
use darnet::engine::{Backend, BackendKind, CancelToken, EngineOptions, Inference, prepare};
use darnet::explain::class_activation_map;
use darnet::gpu::Gpu;
use darnet::model::{Architecture, Model, synthetic};

/// Compute capabilities that TensorRT for RTX serves.
const RTX_CAPABILITIES: [&str; 6] = ["7.5", "8.0", "8.6", "8.9", "12.0", "12.1"];

/// The library; none where it does not serve this GPU.
fn library() -> Option<PathBuf> {
    let gpu = Gpu::open(0).unwrap_or_else(|error| panic!("this test needs a GPU: {error}"));
    let path = std::env::var_os(LIBRARY_ENV).map_or_else(
        || {
            let fetched = Path::new(env!("CARGO_MANIFEST_DIR")).join(".tensorrt/rtx-1.7");
            assert!(fetched.is_dir(), "{} is missing: scripts/tensorrt", fetched.display());
            fetched
        },
        PathBuf::from,
    );
    let library = Library::open(Some(&path)).unwrap();
    let capability = DeviceInfo::of(&gpu).compute_capability;
    if library.product() == "TensorRT for RTX" && !RTX_CAPABILITIES.contains(&capability.as_str()) {
        println!("NOT RUN: {library} does not serve compute capability {capability}; set {LIBRARY_ENV} to a TensorRT");
        return None;
    }
    Some(path)
}

fn run(session: &mut dyn darnet::engine::Session, input: &[f32]) -> Inference {
    let mut out = Inference::default();
    session.run(input, &CancelToken::new(), &mut out).unwrap();
    out
}

fn largest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

fn agrees(architecture: &Architecture, precision: Precision) {
    let Some(library) = library() else { return };
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("m");
    Model::synthetic("gpu", architecture, 3).unwrap().save(&folder).unwrap();
    let model = Model::load(&folder).unwrap();
    let options = TensorrtOptions { library: Some(library), precision, build: true, device: 0 };
    let backend = TensorrtBackend::new(&model, &options).unwrap();
    let cpu = prepare(BackendKind::Cpu, &model, &EngineOptions::default()).unwrap();
    let (mut ours, mut theirs) = (cpu.session().unwrap(), backend.session().unwrap());
    for seed in 0..3 {
        let input = synthetic::volume(architecture.input_dhw, seed);
        let (want, got) = (run(ours.as_mut(), &input), run(theirs.as_mut(), &input));
        assert_eq!(got, run(theirs.as_mut(), &input), "the same bits each run");
        let probability = largest(&got.scores, &want.scores);
        let head = model.weights.head_weight();
        let (a, b) = (class_activation_map(&want, head, 1), class_activation_map(&got, head, 1));
        let (low, high) = a.values.iter().fold((f32::MAX, f32::MIN), |(l, h), v| (l.min(*v), h.max(*v)));
        let cam = largest(&a.values, &b.values) / (high - low);
        println!("{} {architecture:?} {precision:?}: {probability:.1e}, map {cam:.1e}", backend.describe());
        assert!(probability <= 2e-3 && cam <= 1e-2, "{:?} {:?}", got.logits, want.logits);
    }
    // The plan is there now: it is taken as it is.
    TensorrtBackend::new(&model, &TensorrtOptions { build: false, ..options }).unwrap();
}

#[test]
#[ignore = "needs a GPU"]
fn a_small_tensorrt_plan_agrees_with_the_cpu_backend_in_both_precisions() {
    for precision in [Precision::Fp16, Precision::Fp32] {
        agrees(&Architecture { base_width: 16, input_dhw: [8, 32, 32], ..Architecture::full() }, precision);
    }
}

#[test]
#[ignore = "needs a GPU"]
fn the_complete_networks_tensorrt_plan_agrees_with_the_cpu_backend() {
    agrees(&Architecture::full(), Precision::Fp16);
}
