//! What needs an NVIDIA GPU. `tests/run` names these tests as not run where there is none; with one:
//! `cargo nextest run --run-ignored only --test gpu`, or the built test program with `--ignored`.

mod common;
mod device_support;

use std::path::PathBuf;
use std::sync::Arc;

use common::phantom_series;
use darnet::engine::{Backend, BackendKind, EngineError, EngineOptions, prepare};
use darnet::gpu::Gpu;
use darnet::model::Model;
use device_support::judged;

fn gpu() -> Arc<Gpu> {
    Gpu::open(0).unwrap_or_else(|error| panic!("this test needs a GPU: {error}"))
}

#[test]
#[ignore = "needs a GPU"]
fn the_gpu_resamples_with_the_processors_bits_in_any_order_of_arrival() {
    device_support::any_order_of_arrival(gpu());
}

#[test]
#[ignore = "needs a GPU"]
fn threads_share_the_gpu_and_planes_are_reused_without_a_mix() {
    device_support::shared_by_threads(gpu());
}

#[test]
#[ignore = "needs a GPU"]
fn what_does_not_fit_the_gpu_is_left_to_the_processor() {
    device_support::left_to_the_processor(gpu());
}

#[test]
#[ignore = "needs a GPU"]
fn a_plane_dropped_before_it_is_made_does_not_spoil_the_next() {
    device_support::dropped_before_it_is_made(gpu());
}

#[test]
#[ignore = "needs a GPU"]
fn a_daemon_on_a_gpu_gives_the_same_bits_in_any_order_of_arrival_and_agrees_with_cpu() {
    let series = phantom_series(7, 120, 256);
    let mut backwards = series.files.clone();
    backwards.reverse();
    let model = Model::embedded().unwrap();
    let [cuda, cpu] = [BackendKind::Cuda, BackendKind::Cpu]
        .map(|kind| prepare(kind, &model, &EngineOptions::default()).unwrap_or_else(|error| panic!("{error}")));
    let on = |backend: &dyn Backend, files: &[PathBuf], associations| {
        let document = judged(backend, files, associations);
        assert_eq!(document["backend"], backend.name(), "{document}");
        assert_eq!(document["report"]["outcome"], "result", "{document}");
        document["report"].clone()
    };
    let first = on(cuda.as_ref(), &series.files, 1);
    for (files, associations) in [(&backwards, 1), (&series.files, 4)] {
        assert_eq!(on(cuda.as_ref(), files, associations)["logits"], first["logits"]);
    }
    let cpu = on(cpu.as_ref(), &series.files, 1);
    for class in ["cp", "covid19", "healthy"] {
        let (a, b) = (first["scores"][class].as_f64().unwrap(), cpu["scores"][class].as_f64().unwrap());
        assert!((a - b).abs() <= 2e-3, "{class}: {a} on the GPU, {b} on the processor");
    }
}

#[test]
#[ignore = "needs a GPU"]
fn auto_takes_a_gpu_backend_here() {
    let model = Model::embedded().unwrap();
    let backend = prepare(BackendKind::Auto, &model, &EngineOptions::default()).unwrap();
    assert_ne!(backend.name(), "cpu", "{:?}", backend.note());
    assert!(backend.note().is_some_and(|note| note.contains(backend.name())));
}

/// Without one; runs everywhere.
#[test]
fn without_a_driver_a_gpu_is_a_typed_error_and_backends_say_so() {
    let model = Model::embedded().unwrap();
    for kind in [BackendKind::Cuda, BackendKind::Tensorrt] {
        match prepare(kind, &model, &EngineOptions::default()) {
            Ok(backend) => assert_eq!(backend.name(), kind.as_str()),
            Err(EngineError::Unavailable { backend, .. }) => assert_eq!(backend, kind.as_str()),
            Err(other) => panic!("{kind}: {other}"),
        }
    }
}
