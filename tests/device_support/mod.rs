//! What is asked of a device, whether it is a GPU (`tests/gpu.rs`) or stands in for one (`tests/gpu_simulated.rs`).

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use darnet::config::Config;
use darnet::dicom::scu::{SendOptions, send};
use darnet::engine::Backend;
use darnet::gpu::Gpu;
use darnet::model::Model;
use darnet::model::manifest::{DepthGrid, SliceDirection};
use darnet::pipeline::{Daemon, observer};
use darnet::resample::alone;
use darnet::resample::cpu::{Window, gather, in_plane};
use darnet::resample::cuda::{DevicePlane, GpuGatherer, GpuResampler, MAX_PIXELS, STAGES};
use darnet::resample::plan::{DepthPlan, InPlanePlan};
use darnet::resample::texture::TextureMeter;
use darnet::volume::geometry::InPlaneOrientation;

const WINDOW: Window = Window { center_hu: -600.0, width_hu: 1500.0 };

fn hu(count: usize, seed: u64) -> Vec<i16> {
    let mut state = seed | 1;
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 40) % 3000) as i16 - 1200
        })
        .collect()
}

/// Slices of several sizes and orientations, made on the GPU and gathered there, in the order given.
fn resampled_on(gpu: &Arc<Gpu>, order: &[usize], count: usize, out_hw: [usize; 2]) -> (Vec<f32>, Vec<f32>) {
    let depth_mm: Vec<f64> = (0..count).map(|k| k as f64 * 1.1 + (k % 4) as f64 * 0.25).collect();
    let depth = DepthPlan::new(&depth_mm, DepthGrid::Fit, SliceDirection::FeetToHead, 32).unwrap();
    let orientation =
        |k: usize| InPlaneOrientation { transpose: k % 2 == 1, flip_rows: k % 3 == 1, flip_columns: k % 5 == 2 };
    let plan = |k: usize| {
        let (rows, columns) = [(512, 512), (300, 417), (1024, 1024)][k % 3];
        InPlanePlan::new(rows, columns, orientation(k), 0.8125, out_hw, [0.0, 0.0])
    };
    let resampler = Arc::new(GpuResampler::new(Arc::clone(gpu), WINDOW, out_hw, count).unwrap());
    let mut gatherer = GpuGatherer::new(Arc::clone(&resampler), count, 32).unwrap();
    let mut planes: Vec<Option<DevicePlane>> = vec![None; count];
    for &k in order {
        let plan = plan(k);
        let hu = hu(plan.rows() as usize * plan.columns() as usize, k as u64);
        planes[k] = Some(resampler.resample(&plan, &hu).unwrap().expect("room"));
    }
    assert_eq!(resampler.available(), 0);
    let planes: Vec<DevicePlane> = planes.into_iter().map(|p| p.expect("every slice")).collect();
    let got = gatherer.gather_to_host(&depth, &planes.iter().collect::<Vec<_>>()).unwrap().expect("of this pool");
    let texture = TextureMeter::new([32, out_hw[0], out_hw[1]]).measure(&got.values, &alone);
    assert_eq!(got.texture, texture, "sums of the device and of the processor");
    let got = got.values;
    let expected: Vec<Vec<f32>> = (0..count)
        .map(|k| {
            let plan = plan(k);
            let hu = hu(plan.rows() as usize * plan.columns() as usize, k as u64);
            let mut plane = vec![0.0; out_hw[0] * out_hw[1]];
            in_plane(&plan, &WINDOW, &hu, &mut vec![0.0; plan.scratch_len()], &mut plane);
            plane
        })
        .collect();
    let mut volume = vec![0.0; got.len()];
    gather(&depth, &expected.iter().map(Vec::as_slice).collect::<Vec<_>>(), &mut volume);
    drop(planes);
    assert_eq!(resampler.available(), count, "every plane went home");
    (got, volume)
}

/// The processor's bits, whatever the order of arrival.
pub fn any_order_of_arrival(gpu: Arc<Gpu>) {
    let count = 3 * STAGES + 5;
    let forward: Vec<usize> = (0..count).collect();
    let mixed: Vec<usize> = (0..count).map(|k| k * 7 % count).collect();
    for out_hw in [[224, 224], [96, 130]] {
        for order in [&forward, &mixed] {
            let (got, expected) = resampled_on(&gpu, order, count, out_hw);
            let different = got.iter().zip(&expected).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
            assert_eq!(different, 0, "of {}", got.len());
        }
    }
}

/// Four threads at once, planes used again and again.
pub fn shared_by_threads(gpu: Arc<Gpu>) {
    let plan = InPlanePlan::new(512, 512, InPlaneOrientation::default(), 0.8125, [224, 224], [0.0, 0.0]);
    let depth = DepthPlan::new(&[0.0, 1.0], DepthGrid::Fit, SliceDirection::FeetToHead, 2).unwrap();
    let resampler = Arc::new(GpuResampler::new(Arc::clone(&gpu), WINDOW, [224, 224], 16).unwrap());
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let (resampler, plan, depth) = (Arc::clone(&resampler), &plan, &depth);
            scope.spawn(move || {
                let mut gatherer = GpuGatherer::new(Arc::clone(&resampler), 2, 2).unwrap();
                let slice = hu(512 * 512, 100 + thread);
                let mut expected = vec![0.0; 224 * 224];
                in_plane(plan, &WINDOW, &slice, &mut vec![0.0; plan.scratch_len()], &mut expected);
                for _ in 0..100 {
                    let pair = [(); 2].map(|()| resampler.resample(plan, &slice).unwrap().expect("room for all"));
                    // Planes at the ends of a stack of two are the slices themselves.
                    let got = gatherer.gather_to_host(depth, &[&pair[0], &pair[1]]).unwrap().unwrap();
                    assert!(got.values.chunks(224 * 224).all(|plane| plane == expected));
                }
            });
        }
    });
    assert_eq!(resampler.available(), 16);
}

/// Slices that are too large, an empty pool, planes of another pool, no memory.
pub fn left_to_the_processor(gpu: Arc<Gpu>) {
    let resampler = Arc::new(GpuResampler::new(Arc::clone(&gpu), WINDOW, [96, 96], 1).unwrap());
    let side = (MAX_PIXELS as f64).sqrt() as u32;
    let large = InPlanePlan::new(side + 1, side + 1, InPlaneOrientation::default(), 1.0, [96, 96], [0.0, 0.0]);
    let slice = vec![0i16; ((side + 1) * (side + 1)) as usize];
    assert!(resampler.resample(&large, &slice).unwrap().is_none(), "too large");
    let plan = InPlanePlan::new(64, 64, InPlaneOrientation::default(), 1.0, [96, 96], [0.0, 0.0]);
    let slice = vec![0i16; 64 * 64];
    let only = resampler.resample(&plan, &slice).unwrap().unwrap();
    assert!(resampler.resample(&plan, &slice).unwrap().is_none(), "the pool is empty");
    drop(only);
    assert!(resampler.resample(&plan, &slice).unwrap().is_some());
    // Planes of another pool are not gathered.
    let other = Arc::new(GpuResampler::new(Arc::clone(&gpu), WINDOW, [96, 96], 2).unwrap());
    let mut gatherer = GpuGatherer::new(Arc::clone(&other), 2, 2).unwrap();
    let depth = DepthPlan::new(&[0.0, 1.0], DepthGrid::Fit, SliceDirection::FeetToHead, 2).unwrap();
    let (mine, theirs) = (other.resample(&plan, &slice), resampler.resample(&plan, &slice));
    let (mine, theirs) = (mine.unwrap().unwrap(), theirs.unwrap().unwrap());
    assert!(gatherer.gather_to_host(&depth, &[&mine, &theirs]).unwrap().is_none());
    // No memory is an error that says so.
    let slots = usize::MAX / (1 << 20);
    let error = GpuResampler::new(gpu, WINDOW, [96, 96], slots).expect_err("more than any GPU has");
    assert!(error.to_string().contains("GPU memory"), "{error}");
}

/// What is published of a series pushed to a daemon on `backend`.
pub fn judged(backend: &dyn Backend, files: &[PathBuf], associations: usize) -> serde_json::Value {
    let dir = tempfile::tempdir().unwrap();
    let mut config = Config { data_dir: dir.path().to_path_buf(), ..Config::default() };
    config.dicom.bind = "127.0.0.1:0".to_owned();
    config.web.bind = "127.0.0.1:0".to_owned();
    config.assembly.grace_ms = 200;
    let model = Model::embedded().unwrap();
    let (tx, notices) = observer();
    let daemon = Daemon::start_on(&config, &model, backend, Some(tx)).unwrap();
    let options = SendOptions { to: daemon.dicom_addr().to_string(), associations, ..SendOptions::default() };
    assert_eq!(send(files, &options, &mut |_| {}).unwrap().stored, files.len());
    let notice = notices.recv_timeout(Duration::from_secs(120)).unwrap();
    daemon.shutdown(Duration::from_secs(1));
    notice.document
}

/// A plane that nobody read goes home while it is still being made; its next owner's values are the ones that stay.
pub fn dropped_before_it_is_made(gpu: Arc<Gpu>) {
    let plan = InPlanePlan::new(256, 256, InPlaneOrientation::default(), 1.0, [96, 96], [0.0, 0.0]);
    let depth = DepthPlan::new(&[0.0, 1.0], DepthGrid::Fit, SliceDirection::FeetToHead, 2).unwrap();
    let resampler = Arc::new(GpuResampler::new(gpu, WINDOW, [96, 96], 2).unwrap());
    let mut gatherer = GpuGatherer::new(Arc::clone(&resampler), 2, 2).unwrap();
    for round in 0..40 {
        for unread in 0..3 {
            drop(resampler.resample(&plan, &hu(256 * 256, 1000 + unread)).unwrap().expect("room"));
        }
        let slice = hu(256 * 256, round);
        let pair = [(); 2].map(|()| resampler.resample(&plan, &slice).unwrap().expect("room"));
        let mut expected = vec![0.0; 96 * 96];
        in_plane(&plan, &WINDOW, &slice, &mut vec![0.0; plan.scratch_len()], &mut expected);
        let got = gatherer.gather_to_host(&depth, &[&pair[0], &pair[1]]).unwrap().unwrap();
        assert!(got.values.chunks(96 * 96).all(|plane| plane == expected), "round {round}");
    }
}
