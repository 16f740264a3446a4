//! Resampling, per size: in-plane from stored slices, the gather along depth, the texture, the lung check.
//!
//! `cargo bench --bench resample`

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use darnet::model::manifest::{DepthGrid, SliceDirection};
use darnet::resample::alone;
use darnet::resample::cpu::{Window, gather, in_plane};
use darnet::resample::lung::LungCheck;
use darnet::resample::plan::{DepthPlan, InPlanePlan};
use darnet::resample::texture::TextureMeter;
use darnet::volume::geometry::InPlaneOrientation;
use std::hint::black_box;

const WINDOW: Window = Window { center_hu: -600.0, width_hu: 1500.0 };

fn slice(side: usize) -> Vec<i16> {
    (0..side * side).map(|i| ((i * 7919) % 2600) as i16 - 1400).collect()
}

fn in_plane_bench(c: &mut Criterion) {
    let mut group = c.benchmark_group("in_plane_224");
    for side in [512usize, 1024] {
        let hu = slice(side);
        group.throughput(Throughput::Elements((side * side) as u64));
        for (name, transpose) in [("stored", false), ("transposed", true)] {
            let orientation = InPlaneOrientation { transpose, ..Default::default() };
            let plan = InPlanePlan::new(side as u32, side as u32, orientation, 416.0 / 512.0, [224, 224], [0.0; 2]);
            let mut scratch = vec![0.0; plan.scratch_len()];
            let mut out = vec![0.0; 224 * 224];
            group.bench_function(BenchmarkId::new(name, side), |b| {
                b.iter(|| in_plane(&plan, &WINDOW, black_box(&hu), &mut scratch, black_box(&mut out)));
            });
            assert!(out.iter().all(|v| (0.0..=1.0).contains(v)));
        }
    }
    group.finish();
}

fn gather_bench(c: &mut Criterion) {
    let mut group = c.benchmark_group("gather_64x224x224");
    group.sample_size(10);
    for slices in [123usize, 600] {
        let depth: Vec<f64> = (0..slices).map(|i| i as f64 * 0.6).collect();
        let plan = DepthPlan::new(&depth, DepthGrid::Fit, SliceDirection::FeetToHead, 64).expect("a uniform stack");
        let data: Vec<Vec<f32>> = (0..slices).map(|i| vec![i as f32 / slices as f32; 224 * 224]).collect();
        let planes: Vec<&[f32]> = data.iter().map(Vec::as_slice).collect();
        let mut out = vec![0.0; 64 * 224 * 224];
        group.bench_function(BenchmarkId::from_parameter(slices), |b| {
            b.iter(|| gather(&plan, black_box(&planes), black_box(&mut out)));
        });
        assert!(out.iter().all(|v| (0.0..=1.0).contains(v)));
    }
    group.finish();
}

fn texture_bench(c: &mut Criterion) {
    let dhw = [64, 224, 224];
    let input: Vec<f32> = (0..64 * 224 * 224).map(|i| ((i * 7919) % 4096) as f32 / 4096.0).collect();
    let mut meter = TextureMeter::new(dhw);
    c.bench_function("texture/64x224x224", |b| b.iter(|| meter.measure(black_box(&input), &alone)));
}

fn lung_bench(c: &mut Criterion) {
    let hu = slice(512);
    let mut check = LungCheck::new(512, 512);
    c.bench_function("lung_check/512", |b| b.iter(|| check.slice_stats(black_box(&hu), [0.7, 0.7])));
}

criterion_group!(benches, in_plane_bench, gather_bench, texture_bench, lung_bench);
criterion_main!(benches);
