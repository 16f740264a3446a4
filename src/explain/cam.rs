//! The class activation map: computing it, placing it on source slices, choosing slices.
//!
//! `cam[z, y, x] = sum over channels of head_weight[class, channel] * feature[channel, z, y, x]` (Zhou et al., Learning
//! Deep Features for Discriminative Localization). Without bias, rectification or scaling, its mean plus the head's bias
//! is the class's logit.
//!
//! Cells are placed as in the usual upsampling of such maps (half-cell centres): cell `i` of `n` over an input of `m`
//! planes or pixels covers `[i * m / n, (i + 1) * m / n)`. Known limit: with the padding of the network's strided
//! convolutions the receptive field of cell `i` is centred at input `i * m / n`, its lower edge, so that the drawn map may
//! lie up to half a cell further along planes, rows and columns than what raised it.

use super::ExplainError;
use crate::engine::Inference;
use crate::resample::plan::{DepthPlan, InPlanePlan};
use std::path::Path;

/// A class activation map: raw weighted sum, no ReLU, no scaling.
#[derive(Clone, Debug, PartialEq)]
pub struct Cam {
    /// Index of the class in the network's outputs.
    pub class: usize,
    /// Depth, height, width, in cells.
    pub shape_dhw: [usize; 3],
    /// Row-major D, H, W.
    pub values: Vec<f32>,
}

impl Cam {
    /// The largest value, 0 when none is positive: the upper end of the colour scale.
    pub fn max_positive(&self) -> f32 {
        self.values.iter().fold(0.0, |most, v| if *v > most { *v } else { most })
    }
}

/// How the network's input was made from the slices: what [`slice_map`] undoes.
#[derive(Clone, Copy, Debug)]
pub struct CamGeometry<'a> {
    /// Orientation, crop and in-plane resize.
    pub in_plane: &'a InPlanePlan,
    /// Planes along the scan.
    pub depth: &'a DepthPlan,
    /// Shape of the network's input.
    pub input_dhw: [usize; 3],
}

/// The map of `class` from the last feature map and the head's weights, `classes x channels` row-major.
///
/// Sums run in f64 by ascending channel: the same to the bit on every machine.
///
/// # Panics
/// When the feature map does not fit its shape, or the head has no such class.
pub fn class_activation_map(inference: &Inference, head_weight: &[f32], class: usize) -> Cam {
    let [channels, d, h, w] = inference.feature_shape_cdhw;
    let cells = d * h * w;
    assert_eq!(inference.feature_map.len(), channels * cells, "feature map length");
    assert!(head_weight.len() >= (class + 1) * channels, "head weights of the class");
    let mut sums = vec![0.0f64; cells];
    let weights = &head_weight[class * channels..(class + 1) * channels];
    for (weight, features) in weights.iter().zip(inference.feature_map.chunks_exact(cells.max(1))) {
        let weight = f64::from(*weight);
        for (sum, feature) in sums.iter_mut().zip(features) {
            *sum += weight * f64::from(*feature);
        }
    }
    Cam { class, shape_dhw: [d, h, w], values: sums.iter().map(|s| *s as f32).collect() }
}

/// Two neighbouring cells and the share of the second; ends are held.
fn bracket(position: f64, cells: usize) -> (usize, usize, f32) {
    let clamped = position.clamp(0.0, (cells - 1) as f64);
    let low = clamped as usize;
    (low, (low + 1).min(cells - 1), (clamped - low as f64) as f32)
}

/// Continuous cell index of a continuous input index.
fn cell_of(input_index: f64, cells: usize, inputs: usize) -> f64 {
    (input_index + 0.5) * cells as f64 / inputs as f64 - 0.5
}

/// Whether a continuous cell index lies within the map.
fn within(cell: f64, cells: usize) -> bool {
    (-0.5..cells as f64 - 0.5).contains(&cell)
}

/// The map at each stored pixel of the slice at `depth_mm`: trilinear between cell centres, ends held, 0 outside the
/// crop and outside the planes. `out` is `rows x columns` in stored order. Allocates nothing.
///
/// # Panics
/// When sizes do not fit the geometry.
pub fn slice_map(cam: &Cam, geo: &CamGeometry<'_>, depth_mm: f64, rows: u32, columns: u32, out: &mut [f32]) {
    let (rows_n, columns_n) = (rows as usize, columns as usize);
    assert_eq!(out.len(), rows_n * columns_n, "map length");
    assert_eq!((rows, columns), (geo.in_plane.rows(), geo.in_plane.columns()), "slice size");
    assert_eq!(geo.in_plane.out_hw(), [geo.input_dhw[1], geo.input_dhw[2]], "input size");
    let [d, h, w] = cam.shape_dhw;
    assert_eq!(cam.values.len(), d * h * w, "cam length");
    out.fill(0.0);
    let depth_cell = cell_of(geo.depth.plane_of_depth(depth_mm), d, geo.input_dhw[0]);
    if cam.values.is_empty() || !within(depth_cell, d) {
        return;
    }
    let (d0, d1, td) = bracket(depth_cell, d);
    let (near, far) = (&cam.values[d0 * h * w..(d0 + 1) * h * w], &cam.values[d1 * h * w..(d1 + 1) * h * w]);

    // Both cell coordinates are affine in one stored coordinate each; which one depends on the orientation.
    let transpose = geo.in_plane.orientation().transpose;
    let cells_at = |r: f64, c: f64| {
        let (out_r, out_c) = geo.in_plane.target_of(r, c);
        let (y, x) = (cell_of(out_r, h, geo.input_dhw[1]), cell_of(out_c, w, geo.input_dhw[2]));
        if transpose { (x, y) } else { (y, x) }
    };
    // Along stored rows and columns: cells and their stride in the map.
    let ((row_cells, row_stride), (column_cells, column_stride)) =
        if transpose { ((w, 1), (h, w)) } else { ((h, w), (w, 1)) };
    let origin = cells_at(0.0, 0.0);
    let (row_step, column_step) = (cells_at(1.0, 0.0).0 - origin.0, cells_at(0.0, 1.0).1 - origin.1);

    for (r, line) in out.chunks_exact_mut(columns_n).enumerate() {
        let row_cell = origin.0 + row_step * r as f64;
        if !within(row_cell, row_cells) {
            continue;
        }
        let (r0, r1, tr) = bracket(row_cell, row_cells);
        // The map between two cells along the line is linear: their values are fetched once.
        let at = |column: usize| {
            let mix = |plane: &[f32]| {
                let (a, b) =
                    (plane[r0 * row_stride + column * column_stride], plane[r1 * row_stride + column * column_stride]);
                a + (b - a) * tr
            };
            let (a, b) = (mix(near), mix(far));
            a + (b - a) * td
        };
        let (mut current, mut left, mut right) = (usize::MAX, 0.0, 0.0);
        for (c, value) in line.iter_mut().enumerate() {
            let column_cell = origin.1 + column_step * c as f64;
            if !within(column_cell, column_cells) {
                continue;
            }
            let (c0, c1, tc) = bracket(column_cell, column_cells);
            if c0 != current {
                (current, left, right) = (c0, at(c0), at(c1));
            }
            *value = left + (right - left) * tc;
        }
    }
}

/// The slices that show most of the map: `(ordered index, mass)` by falling mass.
///
/// The mass of a slice is the mean over the crop of the positive part of the map at the slice's depth; slices of equal
/// mass (none positive, say) rank by the mean of the map itself, then by index. A slice nearer than `min_distance_mm` to
/// one already chosen is skipped. At most `count`; none beyond the planes.
pub fn top_slices(
    cam: &Cam,
    geo: &CamGeometry<'_>,
    depth_mm: &[f64],
    count: usize,
    min_distance_mm: f64,
) -> Vec<(u32, f32)> {
    let [d, h, w] = cam.shape_dhw;
    let area = h * w;
    if cam.values.is_empty() {
        return Vec::new();
    }
    let mut ranked: Vec<(u32, f64, f64)> = Vec::with_capacity(depth_mm.len());
    for (index, depth) in depth_mm.iter().enumerate() {
        let cell = cell_of(geo.depth.plane_of_depth(*depth), d, geo.input_dhw[0]);
        if !within(cell, d) {
            continue;
        }
        let (d0, d1, t) = bracket(cell, d);
        let (near, far) = (&cam.values[d0 * area..(d0 + 1) * area], &cam.values[d1 * area..(d1 + 1) * area]);
        let (mut mass, mut mean) = (0.0f64, 0.0f64);
        for (a, b) in near.iter().zip(far) {
            let value = f64::from(a + (b - a) * t);
            mass += value.max(0.0);
            mean += value;
        }
        ranked.push((index as u32, mass / area as f64, mean / area as f64));
    }
    ranked.sort_by(|a, b| b.1.total_cmp(&a.1).then(b.2.total_cmp(&a.2)).then(a.0.cmp(&b.0)));
    let mut chosen: Vec<(u32, f32)> = Vec::with_capacity(count);
    for (index, mass, _) in ranked {
        if chosen.len() == count {
            break;
        }
        let apart =
            |other: &(u32, f32)| (depth_mm[other.0 as usize] - depth_mm[index as usize]).abs() >= min_distance_mm;
        if chosen.iter().all(apart) {
            chosen.push((index, mass as f32));
        }
    }
    chosen
}

/// Writes the raw map as safetensors: one tensor `cam`, f32, `[d, h, w]`.
///
/// # Errors
/// When it cannot be serialised or written.
pub fn write_cam(path: &Path, cam: &Cam) -> Result<(), ExplainError> {
    let bytes: Vec<u8> = cam.values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, cam.shape_dhw.to_vec(), &bytes)?;
    let file = safetensors::serialize([("cam", view)], None)?;
    std::fs::write(path, file).map_err(|source| ExplainError::Write { file: "cam.safetensors".into(), source })
}
