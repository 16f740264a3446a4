//! Weights and index tables of the resampling: pure geometry, no pixel is touched here.
//!
//! # In-plane ([`InPlanePlan`])
//! Per axis, with a box `[a, a + n_box)` of the oriented image in edge coordinates (pixel `i` covers `[i, i + 1)`):
//!
//! ```text
//! scale  = n_box / n_out          f = max(scale, 1)          triangle(x) = max(0, 1 - |x|)
//! centre = a + (o + 1/2) * scale
//! w_i    = triangle((i + 1/2 - centre) / f),  i over the pixels of the image (not only of the box), then sum w = 1
//! ```
//!
//! This is Pillow's `resize(size, BILINEAR, box=(…))` on a mode-F image, axis by axis. The orientation (transpose,
//! flips) is folded into the tables, so the stored slice is read as it lies.
//!
//! A plan may carry a constant shift, which shears gantry tilt out: the sample for stored position `(r, c)` is taken at
//! `(r - dr, c - dc)`. An output whose centre then leaves the image altogether is air (no weights, value 0.0); one whose
//! centre is inside is normalised over the pixels that exist, like any edge.
//!
//! # Depth ([`DepthPlan`])
//! Slices `i = 0..n` at true positions `d_i`, feet to head. Cells reach from midpoint to midpoint; the two outer edges
//! mirror half the neighbouring step:
//!
//! ```text
//! e_0 = d_0 - (d_1 - d_0)/2      e_i = (d_{i-1} + d_i)/2      e_n = d_{n-1} + (d_{n-1} - d_{n-2})/2
//! c_i = e_{i+1} - e_i            width of slice i's cell
//! g(z) = the step between the two slices that enclose z (the end step outside of them)
//!
//! fit:       pitch = (e_n - e_0) / D      z_p = e_0 + (p + 1/2) * pitch
//! fixed_mm:  pitch given                  z_p = d_0 + p * pitch        (from d_{n-1} downwards when head to feet)
//!
//! g(z_p) <  pitch:  w_i = c_i * triangle((d_i - z_p) / pitch)          then sum w = 1
//! g(z_p) >= pitch:  linear interpolation between the two enclosing slices (the end slice outside of them)
//! ```
//!
//! With equal steps `s`, all `c_i` are equal and cancel, and this is the in-plane formula with `n_box = n` slices: the
//! extent runs from `d_0 - s/2` to `d_{n-1} + s/2`, and Pillow's resize along depth gives the same numbers. For
//! `fixed_mm`, a plane outside `[e_0, e_n]` is beyond the scan: no weights, value 0.0, which is what the window makes of
//! air.
//!
//! Written positions are decimals of a uniform series, rounded, and their differences are rounded once more in binary. So
//! that the weights do not hang on that, they are computed from positions freed of it:
//!
//! - `fit`, when every slice lies on the line of equal steps from first to last within [`even_tolerance_mm`]: the
//!   positions are the whole numbers `0..n` and the step is 1. The weights then depend on `n`, `D` and the direction
//!   alone, so they can be known before the last slice is there.
//! - `fixed_mm`: distances from the end slice that the grid starts at, rounded to [`POSITION_QUANTUM_MM`]. The weights of
//!   a plane depend on the slices around it and on that end slice alone.

use crate::model::manifest::{DepthGrid, SliceDirection};
use crate::volume::geometry::InPlaneOrientation;
use crate::volume::refusal::{Reason, Refusal};

/// Largest side of an image a plan is made for: DICOM's Rows and Columns are 16-bit.
pub const MAX_SIDE: u32 = 65_535;

/// Distances are rounded to this before the weights of a fixed grid are computed: a micrometre, 1/600 of the thinnest
/// slice distance and a thousandth of what any scanner's table keeps.
pub const POSITION_QUANTUM_MM: f64 = 1e-3;
/// What is added before rounding down to a quantum. Not one half: a position of up to six decimals, 1/1000 of the
/// quantum, then never lies on the border between two quanta, where the last bit of a difference would decide.
const QUANTUM_OFFSET: f64 = 0.4995;
/// A slice nearer than this to the line of equal steps is on it, millimetres. Positions rounded to 0.1 mm are off by 0.05
/// each, and so is the line between the two end slices.
pub const EVEN_MM: f64 = 0.1;
/// … and nearer than this share of the filter's half-width, so that no weight moves by more than 2 % of the largest.
pub const EVEN_SHARE: f64 = 0.02;

/// How far a slice may lie from the line of equal steps to count as on it: `slices` of `step_mm` for `out_d` planes.
pub fn even_tolerance_mm(step_mm: f64, slices: usize, out_d: usize) -> f64 {
    let pitch = step_mm * slices as f64 / out_d as f64;
    EVEN_MM.min(EVEN_SHARE * step_mm.max(pitch))
}

/// The step of the line from the first to the last slice if all lie on it; at least two slices.
fn even_step_mm(depth_mm: &[f64], out_d: usize) -> Option<f64> {
    let n = depth_mm.len();
    let step = (depth_mm[n - 1] - depth_mm[0]) / (n - 1) as f64;
    let tolerance = even_tolerance_mm(step, n, out_d);
    let on_line = |(i, d): (usize, &f64)| (d - depth_mm[0] - i as f64 * step).abs() <= tolerance;
    depth_mm.iter().enumerate().all(on_line).then_some(step)
}

fn quantised_mm(distance_mm: f64) -> f64 {
    (distance_mm / POSITION_QUANTUM_MM + QUANTUM_OFFSET).floor() * POSITION_QUANTUM_MM
}

/// Positions that the weights are computed from, and how they map back: `depth = start + position * unit`.
struct Positions {
    at: Vec<f64>,
    start: f64,
    unit: f64,
}

impl Positions {
    fn new(depth_mm: &[f64], grid: DepthGrid, sign: f64, out_d: usize) -> Self {
        let n = depth_mm.len();
        let clean = match grid {
            DepthGrid::Fit => even_step_mm(depth_mm, out_d).map(|step| Self {
                at: (0..n).map(|i| i as f64).collect(),
                start: depth_mm[0],
                unit: step,
            }),
            DepthGrid::FixedMm(_) => {
                let start = if sign > 0.0 { depth_mm[0] } else { depth_mm[n - 1] };
                let at: Vec<f64> = depth_mm.iter().map(|d| sign * quantised_mm((d - start).abs())).collect();
                at.windows(2).all(|p| p[1] > p[0]).then_some(Self { at, start, unit: 1.0 })
            }
        };
        clean.unwrap_or_else(|| Self { at: depth_mm.to_vec(), start: 0.0, unit: 1.0 })
    }
}

/// The crop box in oriented pixels, edge coordinates: pixel `i` covers `[i, i + 1)`. Sub-pixel edges are allowed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CropBox {
    /// Upper edge.
    pub row0: f64,
    /// Left edge.
    pub col0: f64,
    /// Height.
    pub rows: f64,
    /// Width.
    pub cols: f64,
}

/// A box in stored pixels, edge coordinates, half open.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StoredBox {
    /// Lower edge along stored rows.
    pub row0: f64,
    /// Lower edge along stored columns.
    pub col0: f64,
    /// Upper edge along stored rows.
    pub row1: f64,
    /// Upper edge along stored columns.
    pub col1: f64,
}

/// Height of the triangle of half-width 1 at `x`.
fn triangle(x: f64) -> f64 {
    (1.0 - x.abs()).max(0.0)
}

/// One axis of an [`InPlanePlan`]: for each output, a run of weights over oriented pixels.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Axis {
    /// Oriented pixels along this axis.
    len: usize,
    /// Whether oriented pixel `i` is stored pixel `len - 1 - i`.
    flip: bool,
    /// First edge of the box, oriented edge coordinates.
    origin: f64,
    /// Oriented pixels an output advances.
    scale: f64,
    /// Shift of the sampling position, oriented pixels.
    shift: f64,
    /// First oriented pixel of each output.
    first: Vec<u32>,
    /// Bounds of each output's weights; one more than there are outputs.
    bounds: Vec<u32>,
    /// All weights, output after output, by ascending oriented pixel.
    weights: Vec<f32>,
    /// Largest number of weights of one output.
    max_taps: usize,
}

impl Axis {
    fn new(len: usize, flip: bool, crop: f64, outputs: usize, stored_shift: f64) -> Self {
        let size = crop * len as f64;
        let origin = (len as f64 - size) / 2.0;
        let scale = size / outputs as f64;
        // The sample for stored s lies at s - shift; a flipped axis runs the other way.
        let shift = if flip { stored_shift } else { -stored_shift };
        let mut axis = Self {
            len,
            flip,
            origin,
            scale,
            shift,
            first: Vec::with_capacity(outputs),
            bounds: Vec::with_capacity(outputs + 1),
            weights: Vec::new(),
            max_taps: 0,
        };
        let width = scale.max(1.0);
        let mut row = Vec::new();
        axis.bounds.push(0);
        for output in 0..outputs {
            let centre = origin + (output as f64 + 0.5) * scale + shift;
            row.clear();
            let mut first = 0usize;
            if (0.0..=len as f64).contains(&centre) {
                // Rounding half up of both ends, as Pillow does; weights outside the triangle are zero either way.
                first = (centre - width + 0.5).floor().max(0.0) as usize;
                let last = ((centre + width + 0.5).floor().max(0.0) as usize).min(len);
                first = first.min(last);
                row.extend((first..last).map(|i| triangle((i as f64 + 0.5 - centre) / width)));
                // Outer zeros cost time and change nothing.
                while row.last() == Some(&0.0) {
                    row.pop();
                }
                let zeros = row.iter().take_while(|w| **w == 0.0).count();
                row.drain(..zeros);
                first += zeros;
            }
            let sum: f64 = row.iter().sum();
            axis.first.push(first as u32);
            if sum > 0.0 {
                axis.weights.extend(row.iter().map(|w| (w / sum) as f32));
                axis.max_taps = axis.max_taps.max(row.len());
            }
            axis.bounds.push(axis.weights.len() as u32);
        }
        axis
    }

    /// Outputs along this axis.
    pub(super) fn outputs(&self) -> usize {
        self.first.len()
    }

    /// First oriented pixel and weights of `output`.
    pub(super) fn taps(&self, output: usize) -> (usize, &[f32]) {
        let (lo, hi) = (self.bounds[output] as usize, self.bounds[output + 1] as usize);
        (self.first[output] as usize, &self.weights[lo..hi])
    }

    /// Half-open range of oriented pixels that carry weight.
    pub(super) fn span(&self) -> (usize, usize) {
        let used = (0..self.outputs()).map(|o| self.taps(o)).filter(|(_, w)| !w.is_empty());
        used.fold(None, |span: Option<(usize, usize)>, (first, w)| {
            let (lo, hi) = span.unwrap_or((first, first));
            Some((lo.min(first), hi.max(first + w.len())))
        })
        .unwrap_or((0, 0))
    }

    /// Largest number of weights of one output.
    pub(super) fn max_taps(&self) -> usize {
        self.max_taps
    }

    /// Whether oriented pixels run against stored ones.
    pub(super) fn is_flipped(&self) -> bool {
        self.flip
    }

    /// Stored pixel of an oriented one.
    pub(super) fn stored(&self, oriented: usize) -> usize {
        if self.flip { self.len - 1 - oriented } else { oriented }
    }

    /// Continuous stored index of a continuous output index.
    fn source_of(&self, output: f64) -> f64 {
        let oriented = self.origin + (output + 0.5) * self.scale + self.shift - 0.5;
        if self.flip { self.len as f64 - 1.0 - oriented } else { oriented }
    }

    /// Inverse of `source_of`.
    fn target_of(&self, stored: f64) -> f64 {
        let oriented = if self.flip { self.len as f64 - 1.0 - stored } else { stored };
        (oriented + 0.5 - self.shift - self.origin) / self.scale - 0.5
    }

    /// The box in stored edge coordinates.
    fn stored_box(&self) -> (f64, f64) {
        let (a, b) = (self.source_of(-0.5) + 0.5, self.source_of(self.outputs() as f64 - 0.5) + 0.5);
        (a.min(b), a.max(b))
    }
}

/// How one stored slice becomes one `h x w` plane: orientation, centre crop, resize, optional constant shift.
#[derive(Clone, Debug, PartialEq)]
pub struct InPlanePlan {
    rows: u32,
    columns: u32,
    orientation: InPlaneOrientation,
    crop_fraction: f64,
    out_hw: [usize; 2],
    /// Along output rows.
    pub(super) vertical: Axis,
    /// Along output columns.
    pub(super) horizontal: Axis,
}

impl InPlanePlan {
    /// A plan for slices of `rows x columns` stored pixels.
    ///
    /// `crop_fraction` of the oriented rows and columns is kept, centred. `shift_px` is `(row, column)` in stored pixels:
    /// the sample for stored position `(r, c)` is taken at `(r - shift_px[0], c - shift_px[1])`; zero for a scan without
    /// tilt.
    ///
    /// # Panics
    /// When a size is zero or a side exceeds [`MAX_SIDE`], `crop_fraction` is not in `(0, 1]`, or a shift is not finite:
    /// geometry and manifest are validated before.
    pub fn new(
        rows: u32,
        columns: u32,
        orientation: InPlaneOrientation,
        crop_fraction: f64,
        out_hw: [usize; 2],
        shift_px: [f64; 2],
    ) -> Self {
        assert!(
            (1..=MAX_SIDE).contains(&rows) && (1..=MAX_SIDE).contains(&columns),
            "slice sides must be in 1..=65535"
        );
        assert!(out_hw.iter().all(|n| (1..=MAX_SIDE as usize).contains(n)), "output sides must be in 1..=65535");
        assert!(crop_fraction > 0.0 && crop_fraction <= 1.0, "crop fraction must be in (0, 1]");
        assert!(shift_px.iter().all(|s| s.is_finite()), "shift must be finite");
        let along_rows = |outputs| Axis::new(rows as usize, orientation.flip_rows, crop_fraction, outputs, shift_px[0]);
        let along_columns =
            |outputs| Axis::new(columns as usize, orientation.flip_columns, crop_fraction, outputs, shift_px[1]);
        let (vertical, horizontal) = if orientation.transpose {
            (along_columns(out_hw[0]), along_rows(out_hw[1]))
        } else {
            (along_rows(out_hw[0]), along_columns(out_hw[1]))
        };
        Self { rows, columns, orientation, crop_fraction, out_hw, vertical, horizontal }
    }

    /// The same plan with another shift: one a slice of a tilted scan.
    pub fn shifted(&self, shift_px: [f64; 2]) -> Self {
        Self::new(self.rows, self.columns, self.orientation, self.crop_fraction, self.out_hw, shift_px)
    }

    /// Stored rows.
    pub fn rows(&self) -> u32 {
        self.rows
    }

    /// Stored columns.
    pub fn columns(&self) -> u32 {
        self.columns
    }

    /// Height and width of the output.
    pub fn out_hw(&self) -> [usize; 2] {
        self.out_hw
    }

    /// How stored pixels map to oriented ones.
    pub fn orientation(&self) -> InPlaneOrientation {
        self.orientation
    }

    /// Length of the scratch [`super::cpu::in_plane`] needs, in f32.
    pub fn scratch_len(&self) -> usize {
        super::cpu::scratch_len(self)
    }

    /// The centre crop in oriented pixels, without the shift.
    pub fn crop(&self) -> CropBox {
        let (v, h) = (&self.vertical, &self.horizontal);
        CropBox {
            row0: v.origin,
            col0: h.origin,
            rows: v.scale * v.outputs() as f64,
            cols: h.scale * h.outputs() as f64,
        }
    }

    /// The crop in stored pixels, with the shift.
    pub fn stored_crop(&self) -> StoredBox {
        let (rows, columns) = self.stored_axes();
        let ((row0, row1), (col0, col1)) = (rows.stored_box(), columns.stored_box());
        StoredBox { row0, col0, row1, col1 }
    }

    /// Continuous stored pixel coordinates `(row, column)` of a continuous output position; integers are pixel centres
    /// on both sides.
    pub fn source_of(&self, out_r: f64, out_c: f64) -> (f64, f64) {
        let (a, b) = (self.vertical.source_of(out_r), self.horizontal.source_of(out_c));
        if self.orientation.transpose { (b, a) } else { (a, b) }
    }

    /// Continuous output position `(row, column)` of continuous stored pixel coordinates: the inverse of
    /// [`Self::source_of`]. Positions outside `[-0.5, h - 0.5) x [-0.5, w - 0.5)` lie outside the crop.
    pub fn target_of(&self, stored_r: f64, stored_c: f64) -> (f64, f64) {
        if self.orientation.transpose {
            (self.vertical.target_of(stored_c), self.horizontal.target_of(stored_r))
        } else {
            (self.vertical.target_of(stored_r), self.horizontal.target_of(stored_c))
        }
    }

    /// The axes that run along stored rows and along stored columns.
    pub(super) fn stored_axes(&self) -> (&Axis, &Axis) {
        if self.orientation.transpose { (&self.horizontal, &self.vertical) } else { (&self.vertical, &self.horizontal) }
    }
}

/// How much of the scan the planes cover, and how many planes the scan fills.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DepthCoverage {
    /// Planes that lie within the scan; the others are 0.0.
    pub planes_in_scan: usize,
    /// Share of the scan's extent that lies within the planes' cells, 0 to 1.
    pub scan_share: f64,
    /// Distance between planes, millimetres.
    pub pitch_mm: f64,
    /// Extent of the scan, outer cell edge to outer cell edge, millimetres.
    pub extent_mm: f64,
}

/// How the ordered slices become `d` planes.
#[derive(Clone, Debug)]
pub struct DepthPlan {
    pitch: f64,
    /// Position of plane 0.
    origin: f64,
    /// +1 feet to head, -1 head to feet.
    sign: f64,
    edges: (f64, f64),
    /// Bounds of each plane's weights; one more than there are planes.
    bounds: Vec<u32>,
    slices: Vec<u32>,
    weights: Vec<f32>,
    slice_count: usize,
}

impl DepthPlan {
    /// A plan from the true positions of the slices, ordered feet to head and strictly increasing, in millimetres.
    ///
    /// # Errors
    /// `too_few_slices` for fewer than two; `internal` when positions are not finite and strictly increasing or the
    /// pitch of a fixed grid is not positive (both are validated before).
    ///
    /// # Panics
    /// When `out_d` is zero.
    pub fn new(depth_mm: &[f64], grid: DepthGrid, direction: SliceDirection, out_d: usize) -> Result<Self, Refusal> {
        assert!(out_d > 0, "at least one plane");
        let n = depth_mm.len();
        if n < 2 {
            return Err(Refusal::new(
                Reason::TooFewSlices,
                format!("resampling along depth needs at least 2 slices, got {n}"),
            ));
        }
        if !depth_mm.iter().all(|d| d.is_finite()) || depth_mm.windows(2).any(|p| p[1] <= p[0]) {
            return Err(Refusal::new(Reason::Internal, "slice positions are not finite and strictly increasing"));
        }
        let sign = match direction {
            SliceDirection::FeetToHead => 1.0,
            SliceDirection::HeadToFeet => -1.0,
        };
        let Positions { at, start, unit } = Positions::new(depth_mm, grid, sign, out_d);
        let edges = cell_edges(&at);
        let (low, high) = (edges[0], edges[n]);
        let (pitch, origin) = match grid {
            DepthGrid::Fit => {
                let pitch = (high - low) / out_d as f64;
                (pitch, if sign > 0.0 { low + pitch / 2.0 } else { high - pitch / 2.0 })
            }
            DepthGrid::FixedMm(pitch) => {
                if !(pitch.is_finite() && pitch > 0.0) {
                    return Err(Refusal::new(Reason::Internal, "the fixed depth pitch is not positive"));
                }
                (pitch, if sign > 0.0 { at[0] } else { at[n - 1] })
            }
        };
        let mut plan = Self {
            pitch: pitch * unit,
            origin: start + origin * unit,
            sign,
            edges: (start + low * unit, start + high * unit),
            bounds: Vec::with_capacity(out_d + 1),
            slices: Vec::new(),
            weights: Vec::new(),
            slice_count: n,
        };
        plan.bounds.push(0);
        let mut row = Vec::new();
        for plane in 0..out_d {
            let z = origin + sign * plane as f64 * pitch;
            let inside = matches!(grid, DepthGrid::Fit) || (low..=high).contains(&z);
            if inside {
                row.clear();
                depth_weights(&at, &edges, pitch, z, &mut row);
                let sum: f64 = row.iter().map(|(_, w)| w).sum();
                plan.slices.extend(row.iter().map(|(i, _)| *i));
                plan.weights.extend(row.iter().map(|(_, w)| (w / sum) as f32));
            }
            plan.bounds.push(plan.weights.len() as u32);
        }
        Ok(plan)
    }

    /// Number of planes.
    pub fn planes(&self) -> usize {
        self.bounds.len() - 1
    }

    /// Number of slices the plan was made for.
    pub fn slices(&self) -> usize {
        self.slice_count
    }

    /// Ordered slice indices, ascending, and their weights, for one plane. Empty for a plane beyond the scan; otherwise
    /// the weights sum to 1.
    ///
    /// # Panics
    /// When `plane` is not below [`Self::planes`].
    pub fn plane_weights(&self, plane: usize) -> (&[u32], &[f32]) {
        let (lo, hi) = (self.bounds[plane] as usize, self.bounds[plane + 1] as usize);
        (&self.slices[lo..hi], &self.weights[lo..hi])
    }

    /// Continuous plane index of a position along the stack axis; integers are plane centres.
    pub fn plane_of_depth(&self, depth_mm: f64) -> f64 {
        self.sign * (depth_mm - self.origin) / self.pitch
    }

    /// Position along the stack axis of a continuous plane index: the inverse of [`Self::plane_of_depth`].
    pub fn depth_of_plane(&self, plane: f64) -> f64 {
        self.origin + self.sign * plane * self.pitch
    }

    /// What the planes cover. With `fit`, always all of the scan and all planes.
    pub fn coverage(&self) -> DepthCoverage {
        let planes_in_scan = (0..self.planes()).filter(|p| !self.plane_weights(*p).0.is_empty()).count();
        let (a, b) = (self.depth_of_plane(-0.5), self.depth_of_plane(self.planes() as f64 - 0.5));
        let (low, high) = self.edges;
        let covered = (a.max(b).min(high) - a.min(b).max(low)).max(0.0);
        let extent_mm = high - low;
        DepthCoverage { planes_in_scan, scan_share: (covered / extent_mm).min(1.0), pitch_mm: self.pitch, extent_mm }
    }
}

/// Edges of the slices' cells, one more than there are slices. At least two slices.
pub(super) fn cell_edges(depth_mm: &[f64]) -> Vec<f64> {
    let n = depth_mm.len();
    let mut edges = Vec::with_capacity(n + 1);
    edges.push(depth_mm[0] - (depth_mm[1] - depth_mm[0]) / 2.0);
    edges.extend(depth_mm.windows(2).map(|p| (p[0] + p[1]) / 2.0));
    edges.push(depth_mm[n - 1] + (depth_mm[n - 1] - depth_mm[n - 2]) / 2.0);
    edges
}

/// Weights, not yet normalised and never all zero, of the plane at `z`.
fn depth_weights(depth_mm: &[f64], edges: &[f64], pitch: f64, z: f64, row: &mut Vec<(u32, f64)>) {
    let n = depth_mm.len();
    // First slice above z.
    let above = depth_mm.partition_point(|d| *d <= z);
    let lower = above.clamp(1, n - 1) - 1;
    let step = depth_mm[lower + 1] - depth_mm[lower];
    if step < pitch {
        let begin = depth_mm.partition_point(|d| *d <= z - pitch);
        let end = depth_mm.partition_point(|d| *d < z + pitch);
        row.extend((begin..end).filter_map(|i| {
            let w = (edges[i + 1] - edges[i]) * triangle((depth_mm[i] - z) / pitch);
            (w > 0.0).then_some((i as u32, w))
        }));
        if !row.is_empty() {
            return;
        }
    }
    let t = ((z - depth_mm[lower]) / step).clamp(0.0, 1.0);
    row.extend([(lower as u32, 1.0 - t), (lower as u32 + 1, t)].into_iter().filter(|(_, w)| *w > 0.0));
}
