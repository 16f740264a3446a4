//! Resampling through the public interface: against Pillow, SimpleITK and a direct formula (golden outputs made by
//! `tests/golden/resample/make.py`), its properties, and the lung check on real scans.

use darnet::model::manifest::{DepthGrid, SliceDirection};
use darnet::resample::cpu::{Window, gather, in_plane};
use darnet::resample::lung::{LungCheck, judge};
use darnet::resample::plan::{DepthPlan, InPlanePlan};
use darnet::volume::geometry::InPlaneOrientation;
use darnet::volume::refusal::Reason;
use proptest::prelude::*;
use serde::Deserialize;
use std::path::{Path, PathBuf};

const WINDOW: Window = Window { center_hu: -600.0, width_hu: 1500.0 };
/// Largest difference from the golden outputs, in [0, 1].
const TOLERANCE: f32 = 1e-4;

#[derive(Deserialize)]
struct Block {
    offset: usize,
    len: usize,
}

impl Block {
    fn f32(&self, blob: &[u8]) -> Vec<f32> {
        let bytes = &blob[self.offset..self.offset + 4 * self.len];
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }

    fn i16(&self, blob: &[u8]) -> Vec<i16> {
        let bytes = &blob[self.offset..self.offset + 2 * self.len];
        bytes.chunks_exact(2).map(|b| i16::from_le_bytes([b[0], b[1]])).collect()
    }
}

#[derive(Deserialize)]
struct Golden {
    window: [f32; 2],
    in_plane: Vec<InPlaneCase>,
    depth: Vec<DepthCase>,
    orientation: Vec<OrientationCase>,
}

#[derive(Deserialize)]
struct InPlaneCase {
    kind: String,
    rows: usize,
    columns: usize,
    crop: f64,
    out_hw: [usize; 2],
    shift: [f64; 2],
    data: Block,
}

#[derive(Deserialize)]
struct DepthCase {
    kind: String,
    depth_mm: Vec<f64>,
    planes: usize,
    fixed_mm: Option<f64>,
    head_to_feet: bool,
    data: Block,
}

#[derive(Deserialize)]
struct OrientationCase {
    code: String,
    rows: usize,
    columns: usize,
    row_cosines: [f64; 3],
    column_cosines: [f64; 3],
    positions: Vec<[f64; 3]>,
    out_dhw: [usize; 3],
    crop: f64,
    stored: Block,
    data: Block,
}

fn golden() -> (Golden, Vec<u8>) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/resample");
    let text = std::fs::read_to_string(dir.join("golden.json")).expect("golden.json");
    let golden: Golden = serde_json::from_str(&text).expect("golden.json");
    assert_eq!(golden.window, [WINDOW.center_hu, WINDOW.width_hu]);
    (golden, std::fs::read(dir.join("golden.bin")).expect("golden.bin"))
}

/// As `pattern` in make.py.
fn noise(n: usize, seed: u32) -> Vec<i16> {
    let mut state = seed;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((state >> 16) % 2600) as i16 - 1500
        })
        .collect()
}

/// As `smooth` in make.py.
fn smooth(rows: usize, columns: usize, seed: i64) -> Vec<i16> {
    (0..(rows * columns) as i64)
        .map(|i| {
            let (r, c) = (i / columns as i64, i % columns as i64);
            let v = (r * r * 3 + c * c * 5 + r * c * 2 + seed * 977) % 8191;
            ((v - 4095).abs() * 2400 / 4096 - 1300) as i16
        })
        .collect()
}

fn resample(plan: &InPlanePlan, hu: &[i16]) -> Vec<f32> {
    let [h, w] = plan.out_hw();
    // What lies in scratch and output before must not matter.
    let mut out = vec![f32::NAN; h * w];
    in_plane(plan, &WINDOW, hu, &mut vec![f32::NAN; plan.scratch_len()], &mut out);
    out
}

fn gathered(plan: &DepthPlan, planes: &[Vec<f32>]) -> Vec<f32> {
    let views: Vec<&[f32]> = planes.iter().map(Vec::as_slice).collect();
    let mut out = vec![f32::NAN; plan.planes() * planes[0].len()];
    gather(plan, &views, &mut out);
    out
}

fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |most: f32, (x, y)| {
        let d = (x - y).abs();
        assert!(!d.is_nan());
        most.max(d)
    })
}

#[test]
fn in_plane_matches_pillow() {
    let (golden, blob) = golden();
    for case in &golden.in_plane {
        let (rows, columns) = (case.rows, case.columns);
        let hu = match case.kind.as_str() {
            "smooth" => smooth(rows, columns, 5),
            _ => noise(rows * columns, (rows * 1000 + columns) as u32),
        };
        let orientation = InPlaneOrientation::default();
        let plan = InPlanePlan::new(rows as u32, columns as u32, orientation, case.crop, case.out_hw, case.shift);
        let d = difference(&resample(&plan, &hu), &case.data.f32(&blob));
        println!("in-plane {rows}x{columns} -> {:?}, shift {:?}: max abs difference {d:.1e}", case.out_hw, case.shift);
        assert!(d <= TOLERANCE, "{rows}x{columns} -> {:?}: {d}", case.out_hw);
    }
}

#[test]
fn depth_matches_pillow_and_the_direct_formula() {
    let (golden, blob) = golden();
    for case in &golden.depth {
        let n = case.depth_mm.len();
        let planes: Vec<Vec<f32>> =
            noise(n * 3, n as u32).chunks_exact(3).map(|p| p.iter().map(|v| WINDOW.apply(*v)).collect()).collect();
        let grid = case.fixed_mm.map_or(DepthGrid::Fit, DepthGrid::FixedMm);
        let direction = if case.head_to_feet { SliceDirection::HeadToFeet } else { SliceDirection::FeetToHead };
        let plan = DepthPlan::new(&case.depth_mm, grid, direction, case.planes).expect("a plan");
        let d = difference(&gathered(&plan, &planes), &case.data.f32(&blob));
        println!("depth, {}: {n} slices -> {} planes, {grid:?}, {direction:?}: {d:.1e}", case.kind, case.planes);
        assert!(d <= TOLERANCE, "{}: {n} slices -> {}: {d}", case.kind, case.planes);
    }
}

/// Orientation from direction cosines of axial slices.
fn orientation_of(row: [f64; 3], column: [f64; 3]) -> InPlaneOrientation {
    let transpose = row[1].abs() > row[0].abs();
    let (columns_run, rows_run) = if transpose { (row[1], column[0]) } else { (row[0], column[1]) };
    InPlaneOrientation { transpose, flip_rows: rows_run < 0.0, flip_columns: columns_run < 0.0 }
}

#[test]
fn orientation_and_order_match_simpleitk() {
    let (golden, blob) = golden();
    assert_eq!(golden.orientation.len(), 16);
    for case in &golden.orientation {
        let orientation = orientation_of(case.row_cosines, case.column_cosines);
        let [d, h, w] = case.out_dhw;
        let plan = InPlanePlan::new(case.rows as u32, case.columns as u32, orientation, case.crop, [h, w], [0.0, 0.0]);
        let stored = case.stored.i16(&blob);
        let mut slices: Vec<(f64, Vec<f32>)> = stored
            .chunks_exact(case.rows * case.columns)
            .zip(&case.positions)
            .map(|(hu, position)| (position[2], resample(&plan, hu)))
            .collect();
        slices.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (z, planes): (Vec<f64>, Vec<Vec<f32>>) = slices.into_iter().unzip();
        let plan = DepthPlan::new(&z, DepthGrid::Fit, SliceDirection::FeetToHead, d).expect("a plan");
        let difference = difference(&gathered(&plan, &planes), &case.data.f32(&blob));
        assert!(difference <= TOLERANCE, "{}: {difference}", case.code);
    }
}

#[test]
fn a_pixel_lands_where_the_plan_says() {
    for bits in 0..8 {
        let orientation =
            InPlaneOrientation { transpose: bits & 1 > 0, flip_rows: bits & 2 > 0, flip_columns: bits & 4 > 0 };
        let shift = [2.5, -4.0];
        let plan = InPlanePlan::new(60, 80, orientation, 0.8, [120, 120], shift);
        let mut hu = vec![-2000i16; 60 * 80];
        hu[33 * 80 + 41] = 1000;
        let out = resample(&plan, &hu);
        let (mut sum, mut at) = (0.0f64, (0.0, 0.0));
        for (i, v) in out.iter().enumerate() {
            sum += f64::from(*v);
            at = (at.0 + f64::from(*v) * (i / 120) as f64, at.1 + f64::from(*v) * (i % 120) as f64);
        }
        let centroid = (at.0 / sum, at.1 / sum);
        let said = plan.target_of(33.0, 41.0);
        assert!((centroid.0 - said.0).abs() < 0.05 && (centroid.1 - said.1).abs() < 0.05, "{centroid:?} and {said:?}");
        let back = plan.source_of(said.0, said.1);
        assert!((back.0 - 33.0).abs() < 1e-9 && (back.1 - 41.0).abs() < 1e-9);
    }
}

#[test]
fn positions_that_cannot_be_ordered_are_refused() {
    let plan =
        |d: &[f64], grid| DepthPlan::new(d, grid, SliceDirection::FeetToHead, 8).map(|_| ()).map_err(|r| r.reason);
    assert_eq!(plan(&[], DepthGrid::Fit), Err(Reason::TooFewSlices));
    assert_eq!(plan(&[1.0], DepthGrid::Fit), Err(Reason::TooFewSlices));
    assert_eq!(plan(&[0.0, 0.0], DepthGrid::Fit), Err(Reason::Internal));
    assert_eq!(plan(&[0.0, f64::NAN], DepthGrid::Fit), Err(Reason::Internal));
    assert_eq!(plan(&[0.0, 1.0], DepthGrid::FixedMm(0.0)), Err(Reason::Internal));
    assert_eq!(plan(&[0.0, 1.0], DepthGrid::FixedMm(f64::NAN)), Err(Reason::Internal));
}

#[test]
fn coverage_tells_what_a_fixed_grid_leaves_out() {
    let depth: Vec<f64> = (0..100).map(|i| f64::from(i) * 3.0).collect();
    let of = |grid| DepthPlan::new(&depth, grid, SliceDirection::FeetToHead, 64).expect("a plan").coverage();
    let fit = of(DepthGrid::Fit);
    assert_eq!((fit.planes_in_scan, fit.scan_share), (64, 1.0));
    assert!((fit.extent_mm - 300.0).abs() < 1e-9 && (fit.pitch_mm - 300.0 / 64.0).abs() < 1e-9);
    let short = of(DepthGrid::FixedMm(2.0));
    assert_eq!(short.planes_in_scan, 64);
    assert!((short.scan_share - (63.5 * 2.0 + 1.0) / 300.0).abs() < 0.01, "{short:?}");
    let long = of(DepthGrid::FixedMm(6.0));
    assert_eq!(long.planes_in_scan, 50);
    assert!(long.scan_share > 0.99);
}

fn orientations() -> impl Strategy<Value = InPlaneOrientation> {
    (any::<bool>(), any::<bool>(), any::<bool>()).prop_map(|(transpose, flip_rows, flip_columns)| InPlaneOrientation {
        transpose,
        flip_rows,
        flip_columns,
    })
}

fn stacks() -> impl Strategy<Value = Vec<f64>> {
    (prop::collection::vec(0.3f64..7.0, 1..60), -500.0f64..500.0).prop_map(|(steps, start)| {
        let mut at = start;
        std::iter::once(start)
            .chain(steps.into_iter().map(|s| {
                at += s;
                at
            }))
            .collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]

    #[test]
    fn a_constant_image_stays_constant(
        rows in 1u32..90, columns in 1u32..90, o in orientations(), crop in 0.05f64..1.0, h in 1usize..50, w in 1usize..50,
        value in -1400i16..200,
    ) {
        let plan = InPlanePlan::new(rows, columns, o, crop, [h, w], [0.0, 0.0]);
        let want = WINDOW.apply(value);
        let hu = vec![value; (rows * columns) as usize];
        prop_assert!(resample(&plan, &hu).iter().all(|v| (v - want).abs() < 2e-6));
    }

    #[test]
    fn flips_commute_to_the_bit(
        rows in 2usize..40, columns in 2usize..40, o in orientations(), crop in 0.3f64..1.0, seed in any::<u32>(),
        shift in (-3.0f64..3.0, -3.0f64..3.0),
    ) {
        let hu = noise(rows * columns, seed);
        let plan = InPlanePlan::new(rows as u32, columns as u32, o, crop, [13, 9], [shift.0, shift.1]);
        let want = resample(&plan, &hu);
        let flipped: Vec<i16> = hu.chunks_exact(columns).rev().flatten().copied().collect();
        let o = InPlaneOrientation { flip_rows: !o.flip_rows, ..o };
        let plan = InPlanePlan::new(rows as u32, columns as u32, o, crop, [13, 9], [-shift.0, shift.1]);
        prop_assert_eq!(&resample(&plan, &flipped), &want);
        let mirrored: Vec<i16> = flipped.chunks_exact(columns).flat_map(|row| row.iter().rev()).copied().collect();
        let o = InPlaneOrientation { flip_columns: !o.flip_columns, ..o };
        let plan = InPlanePlan::new(rows as u32, columns as u32, o, crop, [13, 9], [-shift.0, -shift.1]);
        prop_assert_eq!(&resample(&plan, &mirrored), &want);
    }

    #[test]
    fn transposing_twice_is_nothing(rows in 2usize..40, columns in 2usize..40, seed in any::<u32>()) {
        let hu = noise(rows * columns, seed);
        let turned: Vec<i16> = (0..rows * columns).map(|i| hu[(i % rows) * columns + i / rows]).collect();
        let plain = InPlanePlan::new(rows as u32, columns as u32, InPlaneOrientation::default(), 0.9, [11, 17], [0.0; 2]);
        let o = InPlaneOrientation { transpose: true, ..Default::default() };
        let transposed = InPlanePlan::new(columns as u32, rows as u32, o, 0.9, [11, 17], [0.0; 2]);
        prop_assert!(difference(&resample(&plain, &hu), &resample(&transposed, &turned)) < 1e-6);
    }

    #[test]
    fn depth_weights_sum_to_one_and_ascend(
        stack in stacks(), planes in 1usize..100, fixed in prop::option::of(0.2f64..9.0), down in any::<bool>(),
    ) {
        let grid = fixed.map_or(DepthGrid::Fit, DepthGrid::FixedMm);
        let direction = if down { SliceDirection::HeadToFeet } else { SliceDirection::FeetToHead };
        let plan = DepthPlan::new(&stack, grid, direction, planes).expect("a plan");
        for plane in 0..planes {
            let (slices, weights) = plan.plane_weights(plane);
            prop_assert!(fixed.is_some() || !slices.is_empty());
            prop_assert!(slices.windows(2).all(|p| p[0] < p[1]));
            prop_assert!(slices.iter().all(|s| (*s as usize) < stack.len()));
            prop_assert!(weights.iter().all(|w| *w > 0.0 && *w <= 1.0));
            if !slices.is_empty() {
                prop_assert!((weights.iter().map(|w| f64::from(*w)).sum::<f64>() - 1.0).abs() < 1e-5);
            }
            let z = plan.depth_of_plane(plane as f64);
            prop_assert!((plan.plane_of_depth(z) - plane as f64).abs() < 1e-6);
        }
    }

    #[test]
    fn a_linear_ramp_is_kept_where_slices_are_interpolated(stack in stacks(), planes in 1usize..100) {
        // Upsampling: finer than any step, so every plane lies on the line through its neighbours.
        let finest = stack.windows(2).map(|p| p[1] - p[0]).fold(f64::INFINITY, f64::min);
        let plan = DepthPlan::new(&stack, DepthGrid::FixedMm(finest * 0.9), SliceDirection::FeetToHead, planes).expect("a plan");
        let ramp: Vec<Vec<f32>> = stack.iter().map(|z| vec![((z - stack[0]) / 500.0) as f32]).collect();
        for (plane, got) in gathered(&plan, &ramp).into_iter().enumerate() {
            let z = plan.depth_of_plane(plane as f64) - stack[0];
            if z <= stack[stack.len() - 1] - stack[0] {
                prop_assert!((f64::from(got) - z / 500.0).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn order_of_arrival_does_not_change_a_bit(n in 2usize..30, planes in 1usize..20, seed in any::<u64>()) {
        let z: Vec<f64> = (0..n).map(|i| i as f64 * 1.7).collect();
        let in_plane_plan = InPlanePlan::new(20, 20, InPlaneOrientation::default(), 1.0, [8, 8], [0.0; 2]);
        let depth = DepthPlan::new(&z, DepthGrid::Fit, SliceDirection::FeetToHead, planes).expect("a plan");
        let slice = |i: usize| noise(400, i as u32 * 77 + 1);
        let ordered: Vec<Vec<f32>> = (0..n).map(|i| resample(&in_plane_plan, &slice(i))).collect();
        // The same slices as they come in any order, with one scratch that all share.
        let mut arrival: Vec<usize> = (0..n).collect();
        let mut state = seed | 1;
        for i in (1..n).rev() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            arrival.swap(i, (state >> 33) as usize % (i + 1));
        }
        let mut scratch = vec![0.0; in_plane_plan.scratch_len()];
        let mut arrived = vec![vec![0.0; 64]; n];
        for i in arrival {
            in_plane(&in_plane_plan, &WINDOW, &slice(i), &mut scratch, &mut arrived[i]);
        }
        prop_assert_eq!(gathered(&depth, &ordered), gathered(&depth, &arrived));
    }
}

/// A folder with the named archive unpacked, or `None` when no real data is set.
fn real_data(archive: &str) -> Option<(tempfile::TempDir, PathBuf)> {
    let Some(data) = std::env::var_os("DARNET_TEST_DATA") else {
        println!("not run: DARNET_TEST_DATA is not set, {archive} is needed");
        return None;
    };
    let file = Path::new(&data).join(archive);
    assert!(file.is_file(), "{archive} is missing from DARNET_TEST_DATA");
    let dir = tempfile::tempdir().expect("a temporary folder");
    let status = std::process::Command::new("tar").arg("xf").arg(&file).arg("-C").arg(dir.path()).status();
    assert!(status.expect("tar, install it with: apt-get install tar xz-utils").success());
    let path = dir.path().to_owned();
    Some((dir, path))
}

struct RealSlice {
    z: f64,
    rows: u32,
    columns: u32,
    spacing: [f64; 2],
    hu: Vec<i16>,
}

/// Uncompressed 16-bit slices under `dir`, feet to head.
fn real_slices(dir: &Path) -> Vec<RealSlice> {
    let mut slices = Vec::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "dcm") {
                let object = dicom_object::open_file(&path).expect("a DICOM file");
                let numbers = |name: &str| {
                    object.element_by_name(name).expect("an attribute").to_multi_float64().expect("numbers")
                };
                let signed = numbers("PixelRepresentation")[0] == 1.0;
                let (slope, intercept) = (numbers("RescaleSlope")[0], numbers("RescaleIntercept")[0]);
                let bytes = object.element_by_name("PixelData").expect("pixels").to_bytes().expect("pixels");
                let hu = bytes.chunks_exact(2).map(|b| {
                    let raw = if signed {
                        i16::from_le_bytes([b[0], b[1]]) as f64
                    } else {
                        u16::from_le_bytes([b[0], b[1]]) as f64
                    };
                    (raw * slope + intercept).round() as i16
                });
                slices.push(RealSlice {
                    z: numbers("ImagePositionPatient")[2],
                    rows: numbers("Rows")[0] as u32,
                    columns: numbers("Columns")[0] as u32,
                    spacing: [numbers("PixelSpacing")[0], numbers("PixelSpacing")[1]],
                    hu: hu.collect(),
                });
            }
        }
    }
    slices.sort_by(|a, b| a.z.total_cmp(&b.z));
    slices
}

#[test]
fn a_real_chest_is_accepted() {
    let Some((_keep, dir)) = real_data("lidc-idri-0306.tar.xz") else { return };
    let slices = real_slices(&dir);
    assert_eq!(slices.len(), 123);
    let mut check = LungCheck::new(slices[0].rows, slices[0].columns);
    let stats: Vec<_> = slices.iter().map(|s| check.slice_stats(&s.hu, s.spacing)).collect();
    let z: Vec<f64> = slices.iter().map(|s| s.z).collect();
    let (rows, columns) = (slices[0].rows, slices[0].columns);
    let plan = InPlanePlan::new(rows, columns, InPlaneOrientation::default(), 416.0 / 512.0, [224, 224], [0.0; 2]);
    let report = judge(&stats, &z, &plan).expect("a chest");
    println!("{report:?}");
    assert!((3.0..9.0).contains(&report.lung_volume_l), "{report:?}");
    assert!(report.lung_extent_mm > 200.0);
    assert!(!report.lung_truncated_top && !report.lung_truncated_bottom, "{report:?}");
    let narrow = InPlanePlan::new(rows, columns, InPlaneOrientation::default(), 0.5, [224, 224], [0.0; 2]);
    assert!(judge(&stats, &z, &narrow).expect("a chest").crop_cuts_lung);
    // Half a chest is seen as cut.
    let half = judge(&stats[..60], &z[..60], &plan).expect("half a chest");
    assert!(half.lung_truncated_top, "{half:?}");
}

#[test]
fn a_real_head_is_refused() {
    let Some((_keep, dir)) = real_data("tilt-ge-18.5deg.tar.xz") else { return };
    let slices = real_slices(&dir);
    assert_eq!(slices.len(), 28);
    let mut check = LungCheck::new(slices[0].rows, slices[0].columns);
    let stats: Vec<_> = slices.iter().map(|s| check.slice_stats(&s.hu, s.spacing)).collect();
    let z: Vec<f64> = slices.iter().map(|s| s.z).collect();
    let plan = InPlanePlan::new(512, 512, InPlaneOrientation::default(), 1.0, [224, 224], [0.0; 2]);
    let refusal = judge(&stats, &z, &plan).expect_err("a head");
    println!("{refusal}");
    assert_eq!(refusal.reason, Reason::NoLung);
    let areas: Vec<f64> = stats.iter().map(|s| s.lung_area_mm2).collect();
    assert!(areas.iter().all(|a| *a < 1500.0), "{areas:?}");
}
