//! Class activation maps through the public interface: values, placement, slices, pictures, the page.

use darnet::engine::Inference;
use darnet::explain::{
    Cam, CamGeometry, ExplainError, RenderOptions, SeriesToExplain, class_activation_map, explain_series,
    oriented_size, render_slice, slice_map, top_slices, write_cam,
};
use darnet::model::manifest::{DepthGrid, SliceDirection};
use darnet::resample::cpu::{Window, gather, in_plane};
use darnet::resample::plan::{DepthPlan, InPlanePlan};
use darnet::volume::geometry::InPlaneOrientation;
use std::path::Path;

const WINDOW: Window = Window { center_hu: -600.0, width_hu: 1500.0 };
const INPUT: [usize; 3] = [64, 224, 224];
const CELLS: [usize; 3] = [8, 14, 14];

fn inference(feature: impl Fn(usize, usize) -> f32, channels: usize) -> Inference {
    let cells: usize = CELLS.iter().product();
    Inference {
        logits: vec![0.1, 2.0, -1.0],
        scores: vec![0.12, 0.84, 0.04],
        pooled: vec![0.0; channels],
        feature_map: (0..channels * cells).map(|i| feature(i / cells, i % cells)).collect(),
        feature_shape_cdhw: [channels, CELLS[0], CELLS[1], CELLS[2]],
    }
}

fn depth(n: usize, step: f64) -> Vec<f64> {
    (0..n).map(|i| i as f64 * step).collect()
}

fn fitted(depth_mm: &[f64], direction: SliceDirection) -> DepthPlan {
    DepthPlan::new(depth_mm, DepthGrid::Fit, direction, INPUT[0]).expect("a plan")
}

#[test]
fn the_map_is_the_raw_weighted_sum_and_its_mean_the_logit() {
    let inference = inference(|c, i| ((c * 31 + i * 17) % 101) as f32 / 50.0 - 1.0, 16);
    let weights: Vec<f32> = (0..48).map(|i| (i as f32 * 0.7).sin()).collect();
    let cells: usize = CELLS.iter().product();
    for class in 0..3 {
        let cam = class_activation_map(&inference, &weights, class);
        assert_eq!((cam.class, cam.shape_dhw), (class, CELLS));
        for (i, value) in cam.values.iter().enumerate() {
            let want: f64 = (0..16)
                .map(|c| f64::from(weights[class * 16 + c]) * f64::from(inference.feature_map[c * cells + i]))
                .sum();
            assert!((f64::from(*value) - want).abs() < 1e-6);
        }
        assert!(cam.values.iter().any(|v| *v < 0.0), "negative evidence is kept");
        let pooled = |c: usize| -> f64 {
            inference.feature_map[c * cells..(c + 1) * cells].iter().map(|v| f64::from(*v)).sum::<f64>() / cells as f64
        };
        let logit: f64 = (0..16).map(|c| f64::from(weights[class * 16 + c]) * pooled(c)).sum();
        let mean = cam.values.iter().map(|v| f64::from(*v)).sum::<f64>() / cells as f64;
        assert!((mean - logit).abs() < 1e-6);
    }
}

/// A blob in stored voxels goes through the resampling; its place in the input, averaged into CAM cells, comes back to
/// the same voxels.
#[test]
fn a_blob_comes_back_to_the_voxels_it_came_from() {
    let (rows, columns, slices) = (150usize, 180usize, 90usize);
    let depth_mm = depth(slices, 3.0);
    for bits in 0..16 {
        let orientation =
            InPlaneOrientation { transpose: bits & 1 > 0, flip_rows: bits & 2 > 0, flip_columns: bits & 4 > 0 };
        let direction = if bits & 8 > 0 { SliceDirection::HeadToFeet } else { SliceDirection::FeetToHead };
        let plan = InPlanePlan::new(rows as u32, columns as u32, orientation, 0.8, [224, 224], [1.5, -2.0]);
        let along = fitted(&depth_mm, direction);
        let (centre_slice, centre_row, centre_column) = (26.0, 62.0, 108.0);
        let mut planes = Vec::new();
        let mut scratch = vec![0.0; plan.scratch_len()];
        for k in 0..slices {
            let hu: Vec<i16> = (0..rows * columns)
                .map(|i| {
                    let (r, c) = ((i / columns) as f64, (i % columns) as f64);
                    let far = ((r - centre_row) / 14.0).powi(2)
                        + ((c - centre_column) / 14.0).powi(2)
                        + ((k as f64 - centre_slice) / 8.0).powi(2);
                    (-1350.0 + 1500.0 * (-far).exp()) as i16
                })
                .collect();
            let mut plane = vec![0.0; 224 * 224];
            in_plane(&plan, &WINDOW, &hu, &mut scratch, &mut plane);
            planes.push(plane);
        }
        let views: Vec<&[f32]> = planes.iter().map(Vec::as_slice).collect();
        let mut input = vec![0.0; INPUT.iter().product()];
        gather(&along, &views, &mut input);
        let mut values = vec![0.0f32; CELLS.iter().product()];
        for (i, v) in input.iter().enumerate() {
            let (d, r, c) = (i / (224 * 224), i / 224 % 224, i % 224);
            values[(d / 8 * 14 + r / 16) * 14 + c / 16] += v / (8.0 * 16.0 * 16.0);
        }
        let cam = Cam { class: 0, shape_dhw: CELLS, values };
        let geo = CamGeometry { in_plane: &plan, depth: &along, input_dhw: INPUT };
        let (mut sum, mut at) = (0.0f64, [0.0f64; 3]);
        let mut map = vec![f32::NAN; rows * columns];
        for (k, z) in depth_mm.iter().enumerate() {
            slice_map(&cam, &geo, *z, rows as u32, columns as u32, &mut map);
            for (i, v) in map.iter().enumerate() {
                // What is faint spreads to the borders of the crop, which are not symmetrical.
                let v = f64::from((v - 0.05).max(0.0));
                sum += v;
                for (a, x) in at.iter_mut().zip([k as f64, (i / columns) as f64, (i % columns) as f64]) {
                    *a += v * x;
                }
            }
        }
        let centroid = at.map(|a| a / sum);
        for (got, want) in centroid.iter().zip([centre_slice, centre_row, centre_column]) {
            assert!((got - want).abs() < 1.0, "{orientation:?} {direction:?}: {centroid:?}");
        }
        let best = top_slices(&cam, &geo, &depth_mm, 1, 10.0)[0].0;
        assert!((f64::from(best) - centre_slice).abs() <= 6.0, "top slice {best}");
    }
}

#[test]
fn the_map_is_trilinear_inside_the_crop_and_zero_outside() {
    let cells: usize = CELLS.iter().product();
    let values: Vec<f32> = (0..cells).map(|i| ((i * 7919) % 1000) as f32 / 500.0 - 1.0).collect();
    let cam = Cam { class: 0, shape_dhw: CELLS, values };
    let depth_mm = depth(100, 2.5);
    let along = fitted(&depth_mm, SliceDirection::FeetToHead);
    let plan = InPlanePlan::new(512, 512, InPlaneOrientation::default(), 416.0 / 512.0, [224, 224], [0.0; 2]);
    let geo = CamGeometry { in_plane: &plan, depth: &along, input_dhw: INPUT };
    let mut map = vec![f32::NAN; 512 * 512];
    for k in [0usize, 17, 50, 99] {
        slice_map(&cam, &geo, depth_mm[k], 512, 512, &mut map);
        for r in (0..512).step_by(5) {
            for c in (0..512).step_by(7) {
                let got = map[r * 512 + c];
                if !(48..464).contains(&r) || !(48..464).contains(&c) {
                    assert_eq!(got, 0.0);
                    continue;
                }
                // The crop is 416 pixels for 14 cells, the stack 100 slices for 8.
                let place = |x: f64, n: usize| {
                    let x = x.clamp(0.0, n as f64 - 1.0);
                    (x as usize, (x as usize + 1).min(n - 1), x - x.floor())
                };
                let (d0, d1, td) = place((k as f64 + 0.5) * 8.0 / 100.0 - 0.5, 8);
                let (r0, r1, tr) = place((r as f64 - 48.0 + 0.5) * 14.0 / 416.0 - 0.5, 14);
                let (c0, c1, tc) = place((c as f64 - 48.0 + 0.5) * 14.0 / 416.0 - 0.5, 14);
                let v = |d: usize, r: usize, c: usize| f64::from(cam.values[(d * 14 + r) * 14 + c]);
                let line = |d, r| v(d, r, c0) * (1.0 - tc) + v(d, r, c1) * tc;
                let plane = |d| line(d, r0) * (1.0 - tr) + line(d, r1) * tr;
                let want = plane(d0) * (1.0 - td) + plane(d1) * td;
                assert!((f64::from(got) - want).abs() < 1e-5, "{k} {r} {c}: {got} and {want}");
            }
        }
    }
}

#[test]
fn planes_beyond_the_scan_and_slices_beyond_the_planes_stay_dark() {
    let cam = Cam { class: 0, shape_dhw: CELLS, values: vec![1.0; CELLS.iter().product()] };
    let depth_mm = depth(100, 2.5);
    let along =
        DepthPlan::new(&depth_mm, DepthGrid::FixedMm(2.0), SliceDirection::FeetToHead, INPUT[0]).expect("a plan");
    let plan = InPlanePlan::new(16, 16, InPlaneOrientation::default(), 1.0, [224, 224], [0.0; 2]);
    let geo = CamGeometry { in_plane: &plan, depth: &along, input_dhw: INPUT };
    let mut map = vec![f32::NAN; 256];
    slice_map(&cam, &geo, 126.0, 16, 16, &mut map);
    assert!(map.iter().all(|v| *v == 1.0));
    slice_map(&cam, &geo, 130.0, 16, 16, &mut map);
    assert!(map.iter().all(|v| *v == 0.0));
    assert!(top_slices(&cam, &geo, &depth_mm, 100, 0.0).iter().all(|(i, _)| depth_mm[*i as usize] < 127.0));
}

#[test]
fn top_slices_are_apart_and_fall() {
    let cells = CELLS[1] * CELLS[2];
    let heights = [0.0, 0.0, 5.0, 1.0, 0.0, 0.0, 3.0, 0.0];
    let cam = Cam {
        class: 0,
        shape_dhw: CELLS,
        values: heights.iter().flat_map(|h| std::iter::repeat_n(*h, cells)).collect(),
    };
    let depth_mm = depth(120, 2.5);
    let plan = InPlanePlan::new(32, 32, InPlaneOrientation::default(), 1.0, [224, 224], [0.0; 2]);
    let along = fitted(&depth_mm, SliceDirection::FeetToHead);
    let geo = CamGeometry { in_plane: &plan, depth: &along, input_dhw: INPUT };
    let top = top_slices(&cam, &geo, &depth_mm, 5, 20.0);
    assert_eq!(top.len(), 5);
    assert!(top.windows(2).all(|p| p[0].1 >= p[1].1));
    for (i, a) in top.iter().enumerate() {
        for b in &top[..i] {
            assert!((f64::from(a.0) - f64::from(b.0)).abs() * 2.5 >= 20.0, "{top:?}");
        }
    }
    // Cell 2 of 8 over 120 slices is centred at slice 37.
    assert!((36..=38).contains(&top[0].0), "{top:?}");
    let dark = Cam { values: vec![-1.0; CELLS.iter().product()], ..cam };
    assert_eq!(top_slices(&dark, &geo, &depth_mm, 3, 20.0)[0], (0, 0.0));
}

#[test]
fn pictures_are_radiological_and_transparent_where_the_map_is_low() {
    let (rows, columns) = (40u32, 60u32);
    let mut hu = vec![-1350i16; 2400];
    hu[5 * 60 + 50] = 150;
    let flat = vec![0.0f32; 2400];
    for bits in 0..8 {
        let orientation =
            InPlaneOrientation { transpose: bits & 1 > 0, flip_rows: bits & 2 > 0, flip_columns: bits & 4 > 0 };
        let options = RenderOptions { orientation, ..Default::default() };
        let rgb = render_slice(&hu, rows, columns, &WINDOW, &flat, (0.0, 1.0), &options);
        let (width, height) = oriented_size(rows, columns, orientation);
        assert_eq!(rgb.len(), (3 * width * height) as usize);
        let sr = if orientation.flip_rows { 39 - 5 } else { 5 };
        let sc = if orientation.flip_columns { 59 - 50 } else { 50 };
        let (r, c) = if orientation.transpose { (sc, sr) } else { (sr, sc) };
        let at = 3 * (r * width as usize + c);
        assert_eq!(rgb[at..at + 3], [255, 255, 255], "{orientation:?}");
        assert_eq!(rgb.iter().filter(|v| **v > 0).count(), 3);
    }
    let map: Vec<f32> = (0..2400).map(|i| i as f32 / 2399.0).collect();
    let options = RenderOptions::default();
    let rgb = render_slice(&vec![-1350; 2400], rows, columns, &WINDOW, &map, (0.0, 1.0), &options);
    let light: Vec<u32> = rgb.chunks_exact(3).map(|p| p.iter().map(|v| u32::from(*v)).sum()).collect();
    assert!(light[..2400 * 14 / 100].iter().all(|l| *l == 0), "low values are transparent");
    assert!(light[2399] > light[1600] && light[1600] > light[800]);
    // A map with nothing positive, or not a number, draws nothing.
    for (value, scale) in [(-1.0, (0.0, 0.0)), (f32::NAN, (0.0, 1.0)), (-3.0, (0.0, 1.0))] {
        let rgb = render_slice(&vec![-1350; 2400], rows, columns, &WINDOW, &vec![value; 2400], scale, &options);
        assert!(rgb.iter().all(|v| *v == 0));
    }
}

fn decode(path: &Path) -> (png::OutputInfo, Vec<u8>) {
    let file = std::io::BufReader::new(std::fs::File::open(path).expect("a picture"));
    let mut reader = png::Decoder::new(file).read_info().expect("a PNG");
    let mut pixels = vec![0; reader.output_buffer_size().expect("a size")];
    let info = reader.next_frame(&mut pixels).expect("a frame");
    (info, pixels)
}

#[test]
fn a_series_is_explained_in_a_page_that_needs_nothing_else() {
    let (rows, columns, slices) = (120usize, 100usize, 60usize);
    let depth_mm = depth(slices, 4.0);
    let volume: Vec<Vec<i16>> =
        (0..slices).map(|k| (0..rows * columns).map(|i| ((i * 37 + k * 101) % 1500) as i16 - 1350).collect()).collect();
    let orientation = InPlaneOrientation { transpose: true, ..Default::default() };
    let plan = InPlanePlan::new(rows as u32, columns as u32, orientation, 0.8, [224, 224], [0.0; 2]);
    let along = fitted(&depth_mm, SliceDirection::FeetToHead);
    let inference = inference(|c, i| ((c * 31 + i * 17) % 101) as f32 / 50.0 - 1.0, 4);
    let weights: Vec<f32> = (0..12).map(|i| (i as f32 * 0.7).sin()).collect();
    let names: Vec<String> = ["Common pneumonia", "COVID-19 <b>", "Healthy"].map(String::from).to_vec();
    let notes = vec!["lung is cut & <script>alert(1)</script>".to_owned()];
    let lookup = |i: usize| volume.get(i).map(Vec::as_slice);
    let input = SeriesToExplain {
        slices: &lookup,
        depth_mm: &depth_mm,
        shear_px: None,
        rows: rows as u32,
        columns: columns as u32,
        pixel_spacing_mm: [0.8, 0.8],
        orientation,
        inference: &inference,
        head_weight: &weights,
        class: 1,
        class_names: &names,
        scores: &inference.scores,
        geometry: CamGeometry { in_plane: &plan, depth: &along, input_dhw: INPUT },
        window: WINDOW,
        banner: Some("DEMO MODEL - NOT FOR DIAGNOSIS"),
        notes: &notes,
        model_id: "test-model",
        trained_on: "nothing",
    };
    let dir = tempfile::tempdir().expect("a temporary folder");
    let out = dir.path().join("explanation");
    let explanation = explain_series(&out, &input, &RenderOptions::default()).expect("an explanation");
    assert_eq!(explanation.top_slices.len(), 5);
    assert_eq!(explanation.files.len(), 8);
    assert!(explanation.files.iter().all(|f| f.is_file()));
    let (info, pixels) = decode(&out.join("top-1.png"));
    assert_eq!((info.width, info.height), (rows as u32, columns as u32));
    assert!(pixels.chunks_exact(3).any(|p| p == [176, 0, 32]), "the banner is burnt in");
    decode(&out.join("overview.png"));

    let page = std::fs::read_to_string(&explanation.summary_html).expect("the page");
    for expected in
        ["DEMO MODEL - NOT FOR DIAGNOSIS", "COVID-19 &lt;b&gt;", "0.8400", "test-model", "trained on: nothing"]
    {
        assert!(page.contains(expected), "{expected} is missing");
    }
    assert!(!page.contains("<script") && !page.contains("COVID-19 <b>"), "texts are escaped");
    assert!(!page.contains("http:") && !page.contains("https:") && !page.contains("src=\"top"), "nothing external");
    assert_eq!(page.matches("data:image/png;base64,").count(), 6);

    let bytes = std::fs::read(out.join("cam.safetensors")).expect("the map");
    let tensors = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
    let cam = tensors.tensor("cam").expect("cam");
    assert_eq!((cam.dtype(), cam.shape()), (safetensors::Dtype::F32, CELLS.as_slice()));
    let stored: Vec<f32> = cam.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    assert_eq!(stored, class_activation_map(&inference, &weights, 1).values);

    // The same input gives the same bytes.
    let again = dir.path().join("again");
    explain_series(&again, &input, &RenderOptions::default()).expect("an explanation");
    for file in &explanation.files {
        let name = file.file_name().expect("a name");
        assert_eq!(std::fs::read(file).expect("a file"), std::fs::read(again.join(name)).expect("a file"), "{name:?}");
    }

    let gone = |_: usize| None;
    let fault = explain_series(&out, &SeriesToExplain { slices: &gone, ..input }, &RenderOptions::default());
    assert!(matches!(fault, Err(ExplainError::MissingSlice { .. })));
    let fault =
        explain_series(&out, &SeriesToExplain { head_weight: &weights[1..], ..input }, &RenderOptions::default());
    assert!(matches!(fault, Err(ExplainError::Shape { .. })));
    let fault = write_cam(&out.join("nowhere/cam"), &class_activation_map(&inference, &weights, 0));
    assert!(matches!(fault, Err(ExplainError::Write { .. })));
}
