//! Resampling on the CPU: windowing, the in-plane filter, the gather along depth.
//!
//! ```text
//! in_plane:
//!   for each block of LANES outputs along stored rows
//!     for each output of the block: sum the windowed stored rows with its weights        rows are contiguous
//!     transpose the block, so that LANES outputs lie side by side
//!     for each output along stored columns: sum the LANES-wide columns with its weights
//!     store the block, transposed back unless the slice itself is transposed
//! gather:
//!   for each plane, in runs that stay in the first-level cache: sum the slices with their weights
//! ```
//!
//! The first pass runs along stored rows whatever the orientation, because a stored row is contiguous. Windowed rows are
//! kept in a ring as long as an output needs them, so each pixel is windowed once. All inner loops are element by
//! element over contiguous f32, which the compiler turns into vector code; there is no fused multiply-add and no
//! horizontal sum, so the result does not depend on the vector width.
//!
//! Arithmetic, 512x512 to 224x224 with crop 416/512: 174 k pixels are windowed, the first pass does 224 x 420 outputs of
//! 3.7 taps (0.35 M multiply-adds), the second 224 x 224 of 3.7 (0.19 M). Scratch: a ring of 4 rows, two blocks of 16 rows and
//! one of 16 x 224 floats, about 75 KB, which the second-level cache holds.

use super::Share;
use super::plan::{DepthPlan, InPlanePlan};

/// Outputs along stored rows that are filtered side by side.
const LANES: usize = 16;

/// Floats of one plane gathered at a time: 8 KiB, so that the output stays in the first-level cache.
const GATHER_RUN: usize = 2048;

/// The window that maps HU to [0, 1].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Window {
    /// Centre, HU.
    pub center_hu: f32,
    /// Width, HU; positive.
    pub width_hu: f32,
}

impl Window {
    /// The lowest HU that is not black.
    pub fn low_hu(&self) -> f32 {
        self.center_hu - self.width_hu / 2.0
    }

    /// `(hu - (center - width / 2)) / width`, clamped to [0, 1].
    pub fn apply(&self, hu: i16) -> f32 {
        scaled(hu, self.low_hu(), 1.0 / self.width_hu)
    }
}

#[inline(always)]
fn scaled(hu: i16, low: f32, inverse_width: f32) -> f32 {
    ((f32::from(hu) - low) * inverse_width).clamp(0.0, 1.0)
}

/// Where the parts of the scratch lie.
struct Layout {
    /// First stored column that is read.
    column0: usize,
    /// Stored columns that are read.
    width: usize,
    ring_rows: usize,
}

impl Layout {
    fn of(plan: &InPlanePlan) -> Self {
        let (rows, columns) = plan.stored_axes();
        let (lo, hi) = columns.span();
        let column0 = if hi > lo { columns.stored(lo).min(columns.stored(hi - 1)) } else { 0 };
        Self { column0, width: hi - lo, ring_rows: rows.max_taps().max(1) }
    }

    fn scratch_len(&self, outputs_along_columns: usize) -> usize {
        self.ring_rows * self.width + 2 * LANES * self.width + LANES * outputs_along_columns
    }
}

pub(super) fn scratch_len(plan: &InPlanePlan) -> usize {
    Layout::of(plan).scratch_len(plan.stored_axes().1.outputs())
}

/// Windows one stored slice and resamples it in-plane.
///
/// `hu` is `rows x columns` in stored order, HU; `out` becomes `out_h x out_w` in [0, 1], rows to posterior, columns to
/// the patient's left. `scratch` has at least [`InPlanePlan::scratch_len`] floats; its content does not matter.
/// Allocates nothing. Within 1e-4 of Pillow's mode-F resize; the same to the bit on every machine.
///
/// # Panics
/// When a length does not fit the plan or the window's width is not positive.
pub fn in_plane(plan: &InPlanePlan, window: &Window, hu: &[i16], scratch: &mut [f32], out: &mut [f32]) {
    let [out_h, out_w] = plan.out_hw();
    let stored_columns = plan.columns() as usize;
    assert_eq!(hu.len(), plan.rows() as usize * stored_columns, "slice length");
    assert_eq!(out.len(), out_h * out_w, "output length");
    assert!(window.width_hu > 0.0, "window width must be positive");
    let layout = Layout::of(plan);
    let (rows, columns) = plan.stored_axes();
    assert!(scratch.len() >= layout.scratch_len(columns.outputs()), "scratch length");
    let transpose = plan.orientation().transpose;
    let (low, inverse_width) = (window.low_hu(), 1.0 / window.width_hu);
    let width = layout.width;
    if width == 0 {
        out.fill(0.0);
        return;
    }

    let (ring, rest) = scratch.split_at_mut(layout.ring_rows * width);
    let (by_row, rest) = rest.split_at_mut(LANES * width);
    let (by_column, rest) = rest.split_at_mut(LANES * width);
    let filtered = &mut rest[..LANES * columns.outputs()];
    // Oriented rows [loaded.0, loaded.1) are in the ring, row i in slot i % ring_rows.
    let mut loaded = (0usize, 0usize);

    for block in (0..rows.outputs()).step_by(LANES) {
        let lanes = LANES.min(rows.outputs() - block);
        for lane in 0..LANES {
            let sum = &mut by_row[lane * width..(lane + 1) * width];
            if lane >= lanes {
                sum.fill(0.0);
                continue;
            }
            let (first, weights) = rows.taps(block + lane);
            if first >= loaded.1 || first < loaded.0 {
                loaded = (first, first);
            }
            for oriented in loaded.1..first + weights.len() {
                let begin = rows.stored(oriented) * stored_columns + layout.column0;
                let slot = oriented % layout.ring_rows;
                for (to, from) in ring[slot * width..(slot + 1) * width].iter_mut().zip(&hu[begin..begin + width]) {
                    *to = scaled(*from, low, inverse_width);
                }
                loaded.1 = oriented + 1;
            }
            loaded.0 = loaded.0.max(loaded.1.saturating_sub(layout.ring_rows));
            sum.fill(0.0);
            for (tap, weight) in weights.iter().enumerate() {
                let slot = (first + tap) % layout.ring_rows;
                accumulate(sum, &ring[slot * width..(slot + 1) * width], *weight);
            }
        }
        transpose_block(by_row, by_column, width);
        let last_stored = layout.column0 + width - 1;
        for (output, sum) in filtered.chunks_exact_mut(LANES).enumerate() {
            let (first, weights) = columns.taps(output);
            let mut lanes_sum = [0.0f32; LANES];
            for (tap, weight) in weights.iter().enumerate() {
                let stored = columns.stored(first + tap);
                debug_assert!((layout.column0..=last_stored).contains(&stored));
                let at = (stored - layout.column0) * LANES;
                for (s, v) in lanes_sum.iter_mut().zip(&by_column[at..at + LANES]) {
                    *s += weight * v;
                }
            }
            sum.copy_from_slice(&lanes_sum);
        }
        if transpose {
            // Stored columns are output rows: a run of lanes is a run of the output row.
            for (output, sum) in filtered.chunks_exact(LANES).enumerate() {
                let at = output * out_w + block;
                out[at..at + lanes].copy_from_slice(&sum[..lanes]);
            }
        } else {
            for lane in 0..lanes {
                let row = &mut out[(block + lane) * out_w..(block + lane + 1) * out_w];
                for (to, from) in row.iter_mut().zip(filtered.chunks_exact(LANES)) {
                    *to = from[lane];
                }
            }
        }
    }
}

/// `sum += weight * row`, element by element.
#[inline(always)]
fn accumulate(sum: &mut [f32], row: &[f32], weight: f32) {
    for (s, v) in sum.iter_mut().zip(row) {
        *s += weight * v;
    }
}

/// `LANES x width` to `width x LANES`.
fn transpose_block(from: &[f32], to: &mut [f32], width: usize) {
    for (column, lanes) in to.chunks_exact_mut(LANES).enumerate() {
        for (lane, value) in lanes.iter_mut().enumerate() {
            *value = from[lane * width + column];
        }
    }
}

/// Gathers all planes along depth.
///
/// `planes` are the in-plane results of the slices, ordered feet to head, each `h * w`; `out` becomes `d * h * w`. Sums
/// run by ascending ordered index: the same to the bit whatever order the slices came in. A plane beyond the scan is 0.0.
///
/// # Panics
/// When a length does not fit the plan.
pub fn gather(plan: &DepthPlan, planes: &[&[f32]], out: &mut [f32]) {
    assert_eq!(planes.len(), plan.slices(), "one in-plane result a slice");
    let area = planes[0].len();
    assert_eq!(out.len(), plan.planes() * area, "output length");
    for (plane, out) in out.chunks_exact_mut(area).enumerate() {
        gather_plane(plan, plane, planes, out);
    }
}

/// Gathers one plane; [`gather`] is this for every plane. Slices without weight in it are not read.
///
/// # Panics
/// When a length does not fit the plan.
pub fn gather_plane(plan: &DepthPlan, plane: usize, planes: &[&[f32]], out: &mut [f32]) {
    let (slices, weights) = plan.plane_weights(plane);
    for slice in slices {
        assert_eq!(planes[*slice as usize].len(), out.len(), "plane length");
    }
    for (run, out) in out.chunks_mut(GATHER_RUN).enumerate() {
        let begin = run * GATHER_RUN;
        out.fill(0.0);
        for (slice, weight) in slices.iter().zip(weights) {
            accumulate(out, &planes[*slice as usize][begin..begin + out.len()], *weight);
        }
    }
}

/// The slices of a stack, for [`gather_slices`].
#[derive(Clone, Copy, Debug)]
pub struct SlicesToGather<'a> {
    /// HU of each slice as stored, feet first.
    pub hu: &'a [&'a [i16]],
    /// In-plane results made earlier, where there are any; one entry a slice. They are without shear.
    pub planes: &'a [Option<&'a [f32]>],
    /// In-plane offset of each slice that shears gantry tilt out.
    pub shear_px: Option<&'a [[f64; 2]]>,
}

/// Gathers all planes along depth, resampling in-plane the slices that are not yet. Every plane sums its slices in depth
/// order, so it is the same to the bit whether they were resampled on arrival or are resampled here.
///
/// `out` becomes `d * h * w`; `scratch` grows as needed. Where every slice was resampled before, `share` does the planes; else
/// they are made one after the other, and only the slices of one are held at a time.
///
/// # Panics
/// When a length does not fit the plans.
pub fn gather_slices(
    volume: &SlicesToGather<'_>,
    plan: &InPlanePlan,
    depth: &DepthPlan,
    window: &Window,
    scratch: &mut Vec<f32>,
    out: &mut [f32],
    share: &Share<'_>,
) {
    let [h, w] = plan.out_hw();
    let area = h * w;
    assert_eq!(out.len(), depth.planes() * area, "output length");
    assert_eq!(volume.planes.len(), volume.hu.len(), "one entry a slice");
    let shear = volume.shear_px;
    if shear.is_none() && volume.planes.iter().all(Option::is_some) {
        let planes: Vec<&[f32]> = volume.planes.iter().flatten().copied().collect();
        share(out, area, &|plane, out| gather_plane(depth, plane, &planes, out));
        return;
    }
    scratch.resize(plan.scratch_len().max(scratch.len()), 0.0);
    let mut held: Vec<(u32, Vec<f32>)> = Vec::new();
    for (plane, out) in out.chunks_exact_mut(area).enumerate() {
        let (wanted, _) = depth.plane_weights(plane);
        let mut kept: Vec<(u32, Vec<f32>)> = Vec::with_capacity(wanted.len());
        let mut spare: Vec<Vec<f32>> = Vec::new();
        for (index, values) in held.drain(..) {
            if wanted.contains(&index) { kept.push((index, values)) } else { spare.push(values) }
        }
        for &index in wanted {
            if kept.iter().any(|(i, _)| *i == index) {
                continue;
            }
            let mut values = spare.pop().unwrap_or_else(|| vec![0.0; area]);
            let at = index as usize;
            match (shear, volume.planes[at]) {
                (None, Some(made)) => values.copy_from_slice(made),
                (None, None) => in_plane(plan, window, volume.hu[at], scratch, &mut values),
                (Some(shear), _) => in_plane(&plan.shifted(shear[at]), window, volume.hu[at], scratch, &mut values),
            }
            kept.push((index, values));
        }
        let mut planes: Vec<&[f32]> = vec![&[]; volume.hu.len()];
        for (index, values) in &kept {
            planes[*index as usize] = values;
        }
        gather_plane(depth, plane, &planes, out);
        held = kept;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::manifest::{DepthGrid, SliceDirection};
    use crate::volume::geometry::InPlaneOrientation;

    const WINDOW: Window = Window { center_hu: -600.0, width_hu: 1500.0 };

    fn run(plan: &InPlanePlan, hu: &[i16]) -> Vec<f32> {
        let [h, w] = plan.out_hw();
        let mut out = vec![f32::NAN; h * w];
        in_plane(plan, &WINDOW, hu, &mut vec![f32::NAN; plan.scratch_len()], &mut out);
        out
    }

    /// The formula of `plan`'s module page, pixel by pixel in f64, on the oriented image.
    fn direct(oriented: &[f64], rows: usize, columns: usize, crop: f64, out_hw: [usize; 2]) -> Vec<f64> {
        let axis = |len: usize, outputs: usize| -> Vec<Vec<f64>> {
            let (size, n) = (crop * len as f64, outputs as f64);
            let (origin, scale) = ((len as f64 - size) / 2.0, size / n);
            (0..outputs)
                .map(|o| {
                    let centre = origin + (o as f64 + 0.5) * scale;
                    let w: Vec<f64> =
                        (0..len).map(|i| (1.0 - ((i as f64 + 0.5 - centre) / scale.max(1.0)).abs()).max(0.0)).collect();
                    let sum: f64 = w.iter().sum();
                    w.iter().map(|w| w / sum).collect()
                })
                .collect()
        };
        let (vertical, horizontal) = (axis(rows, out_hw[0]), axis(columns, out_hw[1]));
        let mut out = Vec::new();
        for v in &vertical {
            for h in &horizontal {
                let mut sum = 0.0;
                for (r, wr) in v.iter().enumerate().filter(|(_, w)| **w > 0.0) {
                    for (c, wc) in h.iter().enumerate().filter(|(_, w)| **w > 0.0) {
                        sum += wr * wc * oriented[r * columns + c];
                    }
                }
                out.push(sum);
            }
        }
        out
    }

    fn noise(len: usize) -> Vec<i16> {
        let mut state = 12345u32;
        (0..len)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                ((state >> 16) % 2600) as i16 - 1400
            })
            .collect()
    }

    #[test]
    fn every_orientation_and_odd_size_matches_the_direct_formula() {
        for (rows, columns, crop, out_hw) in
            [(31, 45, 0.8, [9, 17]), (20, 17, 1.0, [33, 40]), (64, 64, 0.75, [16, 48]), (7, 90, 0.5, [1, 1])]
        {
            let hu = noise(rows * columns);
            for bits in 0..8 {
                let o =
                    InPlaneOrientation { transpose: bits & 1 > 0, flip_rows: bits & 2 > 0, flip_columns: bits & 4 > 0 };
                let (h, w) = if o.transpose { (columns, rows) } else { (rows, columns) };
                let mut oriented = Vec::new();
                for r in 0..h {
                    for c in 0..w {
                        let (mut sr, mut sc) = if o.transpose { (c, r) } else { (r, c) };
                        if o.flip_rows {
                            sr = rows - 1 - sr;
                        }
                        if o.flip_columns {
                            sc = columns - 1 - sc;
                        }
                        oriented.push(((f64::from(hu[sr * columns + sc]) + 1350.0) / 1500.0).clamp(0.0, 1.0));
                    }
                }
                let plan = InPlanePlan::new(rows as u32, columns as u32, o, crop, out_hw, [0.0; 2]);
                let got = run(&plan, &hu);
                let want = direct(&oriented, h, w, crop, out_hw);
                for (g, w) in got.iter().zip(&want) {
                    assert!((f64::from(*g) - w).abs() < 1e-5, "{o:?} {rows}x{columns}: {g} and {w}");
                }
            }
        }
    }

    #[test]
    fn window_clamps_before_filtering() {
        assert_eq!(WINDOW.apply(i16::MIN), 0.0);
        assert_eq!(WINDOW.apply(-1350), 0.0);
        assert_eq!(WINDOW.apply(150), 1.0);
        assert_eq!(WINDOW.apply(i16::MAX), 1.0);
        assert!((WINDOW.apply(-600) - 0.5).abs() < 1e-6);
        // Metal next to air: the mean of the clamped values, not the clamped mean.
        let plan = InPlanePlan::new(1, 2, InPlaneOrientation::default(), 1.0, [1, 1], [0.0; 2]);
        assert!((run(&plan, &[-2000, 30_000])[0] - 0.5).abs() < 1e-6);
    }

    #[test]
    fn shift_moves_the_image_by_its_own_amount_and_shows_air_outside() {
        let (rows, columns) = (20usize, 24usize);
        let mut hu = vec![-2000i16; rows * columns];
        hu[10 * columns + 12] = 1000;
        for flip in [false, true] {
            let o = InPlaneOrientation { flip_rows: flip, ..Default::default() };
            let plan = InPlanePlan::new(rows as u32, columns as u32, o, 1.0, [rows, columns], [3.0, -2.0]);
            let got = run(&plan, &hu);
            let bright: Vec<usize> = (0..got.len()).filter(|i| got[*i] > 0.5).collect();
            // Output (r, c) shows stored (r - 3, c + 2): stored (10, 12) appears at (13, 10).
            let row = if flip { rows - 1 - 13 } else { 13 };
            assert_eq!(bright, [row * columns + 10]);
        }
        let far = InPlanePlan::new(20, 24, InPlaneOrientation::default(), 1.0, [20, 24], [500.0, 0.0]);
        assert!(run(&far, &vec![1000; 480]).iter().all(|v| *v == 0.0));
        let half = InPlanePlan::new(20, 24, InPlaneOrientation::default(), 1.0, [20, 24], [10.0, 0.0]);
        let got = run(&half, &vec![1000; 480]);
        assert!(got[..10 * 24 - 24].iter().all(|v| *v == 0.0));
        assert!(got[10 * 24..].iter().all(|v| (*v - 1.0).abs() < 1e-6));
    }

    #[test]
    fn gather_keeps_planes_beyond_a_fixed_grid_dark() {
        let depth = [0.0, 2.0, 4.0];
        let plan = DepthPlan::new(&depth, DepthGrid::FixedMm(2.0), SliceDirection::FeetToHead, 5).unwrap();
        let data = [[0.25f32; 3], [0.5; 3], [0.75; 3]];
        let planes: Vec<&[f32]> = data.iter().map(|p| p.as_slice()).collect();
        let mut out = vec![f32::NAN; 15];
        gather(&plan, &planes, &mut out);
        assert_eq!(out.chunks(3).map(|p| p[0]).collect::<Vec<_>>(), [0.25, 0.5, 0.75, 0.0, 0.0]);
        let plan = DepthPlan::new(&depth, DepthGrid::FixedMm(2.0), SliceDirection::HeadToFeet, 4).unwrap();
        let mut out = vec![f32::NAN; 12];
        gather(&plan, &planes, &mut out);
        assert_eq!(out.chunks(3).map(|p| p[0]).collect::<Vec<_>>(), [0.75, 0.5, 0.25, 0.0]);
    }
}
