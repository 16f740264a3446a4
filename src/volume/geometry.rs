//! Slice geometry and ordering. Pure: no input, no output, no clock.
//!
//! Input: the geometry of each slice, in any order. Output: a [`Stack`], or the [`Refusal`] that says why there is
//! none.
//!
//! - The result depends on the set of slices only, to the bit, not on the order in which they are given: all
//!   arithmetic starts from the slice that comes first by its own numbers.
//! - The stack axis is the slice normal, turned so that it points to the head; slices are ordered by their position's
//!   projection on it. InstanceNumber and arrival order have no say.
//! - A tilted gantry moves slices along the patient while their normal leans: depths are distances along the normal,
//!   and what moves within the plane is [`Stack::shear_px`].
//! - A rotation within the plane of up to [`MAX_IN_PLANE_ROTATION_DEG`] is left as it is (a rotated head or field of
//!   view shows rotated); the nearest of the eight right-angled orientations is taken. Beyond it the series is
//!   `not_axial`.
//!
//! Deliberately absent: pixels, and any repair of a series that does not fit (a missing slice is not invented).

use std::cmp::Ordering;

use serde::{Deserialize, Serialize};

use crate::volume::layout::volume::MAX_SIDE;
use crate::volume::refusal::{Reason, Refusal};

/// Smallest plausible PixelSpacing, millimetres: a tenth of the finest detector of a clinical CT.
pub const MIN_PIXEL_SPACING_MM: f64 = 0.01;
/// Largest plausible PixelSpacing, millimetres: a 700 mm field has this with 70 columns.
pub const MAX_PIXEL_SPACING_MM: f64 = 10.0;
/// Largest plausible coordinate of ImagePositionPatient, millimetres: fifty times a table's travel.
pub const MAX_POSITION_MM: f64 = 1e5;
/// Tolerance on the length of a direction cosine triple, and on the dot product of the two: three decimals give 5e-4
/// a component.
pub const COSINE_TOLERANCE: f64 = 1e-3;
/// Relative difference of PixelSpacing within a stack.
pub const SPACING_TOLERANCE: f64 = 1e-3;
/// Difference of any direction cosine within a stack.
pub const SAME_COSINE_TOLERANCE: f64 = 1e-4;
/// Largest rotation within the plane from the nearest right angle, degrees.
pub const MAX_IN_PLANE_ROTATION_DEG: f64 = 15.0;
/// Two slices nearer than this are at one position, millimetres.
pub const SAME_POSITION_MM: f64 = 0.01;
/// Two slices nearer than this share of the median distance are at one position.
pub const SAME_POSITION_FRACTION: f64 = 0.01;
/// Neighbouring distances that a gap is judged by, so that a series of two spacings has no gap where they meet.
pub const GAP_WINDOW: usize = 9;
/// A stack is sheared when the straight line through its in-plane offsets moves by more than this from the first slice
/// to the last, or when a slice lies further than this from the line, pixels.
///
/// Positions rounded to 0.1 mm are off by 0.05 mm, at the finest chest matrix (0.5 mm) by 0.1 pixel; a line through at
/// least 20 of them moves by less. Half a pixel over the whole stack is a quarter at either end, 0.2 mm of 0.7 mm
/// pixels and less than a tenth of a voxel of the network's input; a tilt that gives so little over 300 mm has 0.07
/// degrees, while gantries are set in steps of 0.5.
pub const NO_SHEAR_PX: f64 = 0.5;
/// Largest in-plane offset from the middle slice, as a share of the field: beyond it half the image is outside.
pub const MAX_SHEAR_FRACTION: f64 = 0.5;

/// Geometry of one slice (DICOM PS3.3 C.7.6.2, Image Plane Module), millimetres, LPS.
#[derive(Clone, Debug, PartialEq)]
pub struct SliceGeometry {
    /// Rows of the image.
    pub rows: u32,
    /// Columns of the image.
    pub columns: u32,
    /// PixelSpacing: distance between rows, then between columns.
    pub pixel_spacing_mm: [f64; 2],
    /// ImagePositionPatient: centre of the first voxel.
    pub position_mm: [f64; 3],
    /// ImageOrientationPatient, first triple: direction of increasing column index.
    pub row_cosines: [f64; 3],
    /// ImageOrientationPatient, second triple: direction of increasing row index.
    pub column_cosines: [f64; 3],
}

/// How stored rows and columns map to the program's one orientation: output rows run to posterior, output columns to
/// the patient's left. Apply as: `out[r][c] = stored[r'][c']`, where `(r', c')` is `(r, c)`, swapped if `transpose`,
/// then reversed along stored rows if `flip_rows` and along stored columns if `flip_columns`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InPlaneOrientation {
    /// Stored rows run left-right instead of front-back.
    pub transpose: bool,
    /// The stored row index must be reversed.
    pub flip_rows: bool,
    /// The stored column index must be reversed.
    pub flip_columns: bool,
}

/// An ordered stack of axial slices, feet to head.
#[derive(Clone, Debug, PartialEq)]
pub struct Stack {
    /// Indices into the slices given, feet first.
    pub order: Vec<u32>,
    /// Distance of each ordered slice along the stack axis from the first, strictly increasing.
    pub depth_mm: Vec<f64>,
    /// The one in-plane orientation of all slices.
    pub in_plane: InPlaneOrientation,
    /// In-plane offset `(row, column)` in stored pixels of each ordered slice, relative to the middle slice, that
    /// shears gantry tilt out: the sample for output `(r, c)` is taken at `(r - dr, c - dc)` of the stored slice.
    /// `None` when the offsets are no more than rounding ([`NO_SHEAR_PX`]).
    pub shear_px: Option<Vec<[f64; 2]>>,
    /// Angle between the slice normal and the patient's long axis, degrees.
    pub tilt_deg: f64,
    /// Median distance between neighbours, millimetres.
    pub spacing_mm: f64,
    /// Whether every distance is within 1 % (or 0.01 mm) of the median.
    pub uniform: bool,
    /// Rows of every slice.
    pub rows: u32,
    /// Columns of every slice.
    pub columns: u32,
    /// PixelSpacing of every slice.
    pub pixel_spacing_mm: [f64; 2],
}

/// What [`build_stack`] accepts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GeometryLimits {
    /// Fewest slices: 20 are a chest of 300 mm at 15 mm, coarser than any diagnostic protocol.
    pub min_slices: usize,
    /// Most slices: 4096 of 0.25 mm are a metre.
    pub max_slices: usize,
    /// Largest angle between slice normal and the patient's long axis, degrees (a gantry tilts up to 30).
    pub max_tilt_deg: f64,
    /// A distance larger than this many local medians is a gap. Below 2, so that one missing slice is seen.
    pub gap_factor: f64,
    /// A distance larger than this is a gap whatever the median, millimetres.
    pub max_spacing_mm: f64,
}

impl Default for GeometryLimits {
    fn default() -> Self {
        Self { min_slices: 20, max_slices: 4096, max_tilt_deg: 30.0, gap_factor: 1.9, max_spacing_mm: 12.0 }
    }
}

impl GeometryLimits {
    /// Every limit out of its range, as a fragment for people; empty when all are sound.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if self.min_slices == 0 || self.min_slices > self.max_slices {
            faults.push(format!("min_slices: expected 1 to max_slices, got {}", self.min_slices));
        }
        for (name, value, range) in [
            ("max_tilt_deg", self.max_tilt_deg, 0.0..=45.0),
            ("gap_factor", self.gap_factor, 1.01..=10.0),
            ("max_spacing_mm", self.max_spacing_mm, 0.1..=100.0),
        ] {
            if !range.contains(&value) {
                faults.push(format!("{name}: expected {} to {}, got {value}", range.start(), range.end()));
            }
        }
        faults
    }
}

fn dot(a: [f64; 3], b: [f64; 3]) -> f64 {
    a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
}

fn cross(a: [f64; 3], b: [f64; 3]) -> [f64; 3] {
    [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]]
}

fn sub(a: [f64; 3], b: [f64; 3]) -> [f64; 3] {
    [a[0] - b[0], a[1] - b[1], a[2] - b[2]]
}

fn scale(a: [f64; 3], k: f64) -> [f64; 3] {
    [a[0] * k, a[1] * k, a[2] * k]
}

fn unit(a: [f64; 3]) -> [f64; 3] {
    scale(a, 1.0 / dot(a, a).sqrt())
}

/// Mean of the two middle values (or the middle one); 0 for none.
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    match n {
        0 => 0.0,
        _ if n % 2 == 1 => values[n / 2],
        _ => 0.5 * (values[n / 2 - 1] + values[n / 2]),
    }
}

/// Whether two steps count as equal in a uniform stack.
fn near(a: f64, b: f64) -> bool {
    (a - b).abs() <= (0.01 * b).max(0.01)
}

impl SliceGeometry {
    /// Whether the numbers describe a slice at all.
    ///
    /// # Errors
    /// `undecodable` for Rows or Columns out of bounds, `inconsistent_geometry` for an impossible PixelSpacing,
    /// `not_axial` for a missing or impossible position or orientation.
    pub fn validate(&self) -> Result<(), Refusal> {
        for (name, side) in [("Rows", self.rows), ("Columns", self.columns)] {
            if side == 0 || side > MAX_SIDE {
                let detail = format!("{name}: expected 1 to {MAX_SIDE}, got {side}");
                return Err(Refusal::new(Reason::Undecodable, detail));
            }
        }
        let plausible = MIN_PIXEL_SPACING_MM..=MAX_PIXEL_SPACING_MM;
        if let Some(spacing) = self.pixel_spacing_mm.iter().find(|s| !plausible.contains(*s)) {
            let detail =
                format!("PixelSpacing: expected {MIN_PIXEL_SPACING_MM} to {MAX_PIXEL_SPACING_MM} mm, got {spacing}");
            return Err(Refusal::new(Reason::InconsistentGeometry, detail));
        }
        // Written so that NaN fails too.
        if !self.position_mm.iter().all(|p| p.abs() <= MAX_POSITION_MM) {
            let detail = format!("ImagePositionPatient: expected three finite numbers within {MAX_POSITION_MM} mm");
            return Err(Refusal::new(Reason::NotAxial, detail));
        }
        let is_unit = |v: [f64; 3]| (dot(v, v).sqrt() - 1.0).abs() <= COSINE_TOLERANCE;
        if !is_unit(self.row_cosines) || !is_unit(self.column_cosines) {
            let detail = "ImageOrientationPatient: expected two direction cosine triples of length 1";
            return Err(Refusal::new(Reason::NotAxial, detail));
        }
        // `is_unit` held, so the dot product is finite.
        if dot(self.row_cosines, self.column_cosines).abs() > COSINE_TOLERANCE {
            let detail = "ImageOrientationPatient: expected two directions at a right angle";
            return Err(Refusal::new(Reason::NotAxial, detail));
        }
        Ok(())
    }

    /// Whether both slices may belong to one stack: same size, spacing and orientation. Positions are not compared.
    pub fn same_stack(&self, other: &Self) -> bool {
        self.difference(other).is_none()
    }

    /// The first attribute in which two slices of one stack must not differ and do.
    fn difference(&self, other: &Self) -> Option<&'static str> {
        let spacing = self
            .pixel_spacing_mm
            .iter()
            .zip(&other.pixel_spacing_mm)
            .all(|(a, b)| (a - b).abs() <= SPACING_TOLERANCE * a.abs().max(b.abs()));
        let cosines = (self.row_cosines.iter().zip(&other.row_cosines))
            .chain(self.column_cosines.iter().zip(&other.column_cosines))
            .all(|(a, b)| (a - b).abs() <= SAME_COSINE_TOLERANCE);
        if self.rows != other.rows {
            Some("Rows")
        } else if self.columns != other.columns {
            Some("Columns")
        } else if !spacing {
            Some("PixelSpacing")
        } else if !cosines {
            Some("ImageOrientationPatient")
        } else {
            None
        }
    }

    /// Unit normal of the plane: row cosines times column cosines, as stored (it may point to the feet).
    pub fn normal(&self) -> [f64; 3] {
        self.frame()[2]
    }

    /// Orthonormal row direction, column direction and normal, right-handed.
    fn frame(&self) -> [[f64; 3]; 3] {
        let row = unit(self.row_cosines);
        let normal = unit(cross(row, self.column_cosines));
        [row, cross(normal, row), normal]
    }

    /// Angle between the slice normal and the patient's long axis, degrees, 0 to 90.
    pub fn tilt_deg(&self) -> f64 {
        let n = self.normal();
        n[0].hypot(n[1]).atan2(n[2].abs()).to_degrees()
    }

    /// The right-angled orientation nearest to the slice's own. Enough to resample a slice in-plane as it arrives.
    ///
    /// # Errors
    /// What [`validate`](Self::validate) refuses; `not_axial` when the plane leans by more than
    /// `limits.max_tilt_deg` or is rotated within itself by more than [`MAX_IN_PLANE_ROTATION_DEG`].
    pub fn in_plane_orientation(&self, limits: &GeometryLimits) -> Result<InPlaneOrientation, Refusal> {
        self.validate()?;
        let tilt = self.tilt_deg();
        // Written so that a limit that is no number refuses.
        let axial = tilt <= limits.max_tilt_deg;
        if !axial {
            let detail = format!(
                "ImageOrientationPatient: expected axial planes tilted by at most {} degrees, got {tilt:.1}",
                limits.max_tilt_deg
            );
            return Err(Refusal::new(Reason::NotAxial, detail));
        }
        let [row, column, normal] = self.frame();
        let up = if normal[2] < 0.0 { scale(normal, -1.0) } else { normal };
        // The smallest rotation that lays the plane flat takes v to v - (v.z / (1 + up.z)) (up + z); its z is then 0.
        let flat = |v: [f64; 3]| {
            let k = v[2] / (1.0 + up[2]);
            [v[0] - k * up[0], v[1] - k * up[1]]
        };
        let (row, column) = (flat(row), flat(column));
        let transpose = row[0].abs() < row[1].abs();
        let (along, across) = if transpose { (row[1], row[0]) } else { (row[0], row[1]) };
        let rotation = across.abs().atan2(along.abs()).to_degrees();
        if rotation > MAX_IN_PLANE_ROTATION_DEG {
            let detail = format!(
                "ImageOrientationPatient: expected rows within {MAX_IN_PLANE_ROTATION_DEG} degrees of left-right or \
                 front-back, got {rotation:.1}"
            );
            return Err(Refusal::new(Reason::NotAxial, detail));
        }
        let down = if transpose { column[0] } else { column[1] };
        Ok(InPlaneOrientation { transpose, flip_rows: down < 0.0, flip_columns: along < 0.0 })
    }

    /// All numbers in a fixed order, the ones that tell slices apart first.
    fn key(&self) -> [f64; 13] {
        let [x, y, z] = self.position_mm;
        let (r, c, s) = (self.row_cosines, self.column_cosines, self.pixel_spacing_mm);
        [z, y, x, r[0], r[1], r[2], c[0], c[1], c[2], s[0], s[1], f64::from(self.rows), f64::from(self.columns)]
    }

    /// A total order by the numbers alone; equal only for slices of equal geometry.
    fn compare(&self, other: &Self) -> Ordering {
        let (a, b) = (self.key(), other.key());
        a.iter().zip(&b).map(|(a, b)| a.total_cmp(b)).find(|o| o.is_ne()).unwrap_or(Ordering::Equal)
    }
}

/// Orders slices into an axial stack, feet to head.
///
/// The result, refusals included, depends on the set of slices only: another order of the same slices gives the same
/// bits, with [`Stack::order`] naming the same slices at their new places.
///
/// # Errors
/// In this order: `too_many_slices`, `too_few_slices`; what [`SliceGeometry::validate`] refuses;
/// `inconsistent_geometry` when size, spacing or orientation differ; `not_axial`; `duplicate_conflict` when two slices
/// are nearer than 0.01 mm or 1 % of the median distance; `gap`; `inconsistent_geometry` when a slice lies more than
/// half a field beside the middle one. The detail names attributes and counts.
pub fn build_stack(slices: &[SliceGeometry], limits: &GeometryLimits) -> Result<Stack, Refusal> {
    let n = slices.len();
    if n > limits.max_slices {
        let detail = format!("slices: expected at most {}, got {n}", limits.max_slices);
        return Err(Refusal::new(Reason::TooManySlices, detail));
    }
    if n < limits.min_slices.max(1) {
        let detail = format!("slices: expected at least {}, got {n}", limits.min_slices.max(1));
        return Err(Refusal::new(Reason::TooFewSlices, detail));
    }

    // From here on only `canonical` is read in order: it does not depend on the order given.
    let mut order: Vec<u32> = (0..u32::try_from(n).unwrap_or(u32::MAX)).collect();
    order.sort_by(|&a, &b| slices[a as usize].compare(&slices[b as usize]));
    for &i in &order {
        slices[i as usize].validate()?;
    }
    let first = &slices[order[0] as usize];
    let mut different = order.iter().filter_map(|&i| first.difference(&slices[i as usize]));
    if let Some(attribute) = different.next() {
        let detail =
            format!("{attribute}: expected one value in a series, {} of {n} slices differ", different.count() + 1);
        return Err(Refusal::new(Reason::InconsistentGeometry, detail));
    }
    let in_plane = first.in_plane_orientation(limits)?;

    let [row, column, normal] = first.frame();
    let axis = if normal[2] < 0.0 { scale(normal, -1.0) } else { normal };
    let along = |i: u32| dot(sub(slices[i as usize].position_mm, first.position_mm), axis);
    // Stable: slices at one depth keep the canonical order (and are refused below).
    order.sort_by(|&a, &b| along(a).total_cmp(&along(b)));
    let start = along(order[0]);
    let depth_mm: Vec<f64> = order.iter().map(|&i| along(i) - start).collect();
    let steps: Vec<f64> = depth_mm.windows(2).map(|w| w[1] - w[0]).collect();
    let spacing_mm = median(&mut steps.clone());

    let same = SAME_POSITION_MM.max(SAME_POSITION_FRACTION * spacing_mm);
    let duplicates = steps.iter().filter(|&&s| s < same).count();
    if duplicates > 0 {
        let detail = format!(
            "ImagePositionPatient: expected one slice a position, {duplicates} of {n} slices lie within {same:.3} mm of \
             another"
        );
        return Err(Refusal::new(Reason::DuplicateConflict, detail));
    }
    check_gaps(&steps, limits)?;

    let middle = slices[order[n / 2] as usize].position_mm;
    let [row_mm, column_mm] = first.pixel_spacing_mm;
    let offsets: Vec<[f64; 2]> = order
        .iter()
        .map(|&i| {
            let d = sub(slices[i as usize].position_mm, middle);
            [dot(d, column) / row_mm, dot(d, row) / column_mm]
        })
        .collect();
    let beyond = |o: &&[f64; 2]| {
        o[0].abs() > MAX_SHEAR_FRACTION * f64::from(first.rows)
            || o[1].abs() > MAX_SHEAR_FRACTION * f64::from(first.columns)
    };
    let outside = offsets.iter().filter(beyond).count();
    if outside > 0 {
        let detail = format!(
            "ImagePositionPatient: expected slices above one another, {outside} of {n} lie more than half a field beside \
             the middle one"
        );
        return Err(Refusal::new(Reason::InconsistentGeometry, detail));
    }
    let sheared = is_sheared(&depth_mm, &offsets);

    Ok(Stack {
        order,
        depth_mm,
        in_plane,
        shear_px: sheared.then_some(offsets),
        tilt_deg: first.tilt_deg(),
        spacing_mm,
        uniform: steps.iter().all(|&s| near(s, spacing_mm)),
        rows: first.rows,
        columns: first.columns,
        pixel_spacing_mm: first.pixel_spacing_mm,
    })
}

/// Whether in-plane offsets are more than rounding: a line is fitted to each of the two by least squares over depth.
fn is_sheared(depth_mm: &[f64], offsets: &[[f64; 2]]) -> bool {
    let n = depth_mm.len() as f64;
    let mean_depth = depth_mm.iter().sum::<f64>() / n;
    let spread: f64 = depth_mm.iter().map(|d| (d - mean_depth).powi(2)).sum();
    let extent = depth_mm.last().copied().unwrap_or(0.0);
    (0..2).any(|axis| {
        let mean = offsets.iter().map(|o| o[axis]).sum::<f64>() / n;
        let together: f64 = depth_mm.iter().zip(offsets).map(|(d, o)| (d - mean_depth) * (o[axis] - mean)).sum();
        // One slice has no spread and no slope.
        let slope = if spread > 0.0 { together / spread } else { 0.0 };
        let beside = |(d, o): (&f64, &[f64; 2])| (o[axis] - mean - slope * (d - mean_depth)).abs() > NO_SHEAR_PX;
        (slope * extent).abs() > NO_SHEAR_PX || depth_mm.iter().zip(offsets).any(beside)
    })
}

/// Refuses a step larger than `gap_factor` medians of the [`GAP_WINDOW`] steps around it, or than `max_spacing_mm`.
/// Near an end the window is moved inwards, not cut.
fn check_gaps(steps: &[f64], limits: &GeometryLimits) -> Result<(), Refusal> {
    let window = GAP_WINDOW.min(steps.len());
    let mut gaps = 0;
    let mut worst = (0.0, 0.0);
    for (i, &step) in steps.iter().enumerate() {
        let from = i.saturating_sub(GAP_WINDOW / 2).min(steps.len() - window);
        let mut around = [0.0; GAP_WINDOW];
        around[..window].copy_from_slice(&steps[from..from + window]);
        let usual = median(&mut around[..window]);
        // Written so that a limit that is no number refuses.
        let fits = step <= limits.gap_factor * usual && step <= limits.max_spacing_mm;
        if !fits {
            gaps += 1;
            if step > worst.0 {
                worst = (step, usual);
            }
        }
    }
    if gaps > 0 {
        let detail = format!(
            "ImagePositionPatient: expected neighbours at most {} mm and {} times the usual distance apart, got {gaps} \
             gap(s), the largest {:.2} mm where {:.2} mm are usual",
            limits.max_spacing_mm, limits.gap_factor, worst.0, worst.1
        );
        return Err(Refusal::new(Reason::Gap, detail));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What makes a slice wrong.
    type Spoil = fn(&mut SliceGeometry);

    fn slice(z: f64) -> SliceGeometry {
        SliceGeometry {
            rows: 512,
            columns: 512,
            pixel_spacing_mm: [0.7, 0.7],
            position_mm: [-180.0, -170.0, z],
            row_cosines: [1.0, 0.0, 0.0],
            column_cosines: [0.0, 1.0, 0.0],
        }
    }

    fn straight(n: usize, spacing: f64) -> Vec<SliceGeometry> {
        (0..n).map(|i| slice(-100.0 + i as f64 * spacing)).collect()
    }

    /// Gantry tilt as scanners write it: the table moves along z, the planes lean.
    fn tilted(n: usize, spacing: f64, degrees: f64) -> Vec<SliceGeometry> {
        let (sin, cos) = degrees.to_radians().sin_cos();
        straight(n, spacing).into_iter().map(|s| SliceGeometry { column_cosines: [0.0, cos, -sin], ..s }).collect()
    }

    fn reason(slices: &[SliceGeometry]) -> Reason {
        build_stack(slices, &GeometryLimits::default()).expect_err("must be refused").reason
    }

    fn build(slices: &[SliceGeometry]) -> Stack {
        build_stack(slices, &GeometryLimits::default()).expect("must be a stack")
    }

    /// A seeded shuffle (a multiplicative generator is enough to reorder).
    fn shuffled<T: Clone>(items: &[T], seed: u64) -> Vec<T> {
        let mut items = items.to_vec();
        let mut x = seed | 1;
        for i in (1..items.len()).rev() {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            items.swap(i, ((x >> 33) % (i as u64 + 1)) as usize);
        }
        items
    }

    /// Patient position of a stored pixel (PS3.3 C.7.6.2.1.1, equation C.7.6.2.1-1).
    fn patient(s: &SliceGeometry, r: f64, c: f64) -> [f64; 3] {
        let [dr, dc] = s.pixel_spacing_mm;
        std::array::from_fn(|k| s.position_mm[k] + c * dc * s.row_cosines[k] + r * dr * s.column_cosines[k])
    }

    #[test]
    fn a_plain_series_is_ordered_from_feet_to_head() {
        let slices = straight(30, 2.5);
        let head_first: Vec<_> = slices.iter().rev().cloned().collect();
        let stack = build(&head_first);
        assert_eq!(stack.order, (0..30).rev().collect::<Vec<u32>>());
        assert_eq!(stack.depth_mm[29], 72.5);
        assert_eq!(stack.in_plane, InPlaneOrientation::default());
        assert_eq!((stack.shear_px, stack.tilt_deg, stack.spacing_mm, stack.uniform), (None, 0.0, 2.5, true));
    }

    #[test]
    fn the_result_does_not_depend_on_the_input_order() {
        // Rounded positions and cosines that differ in the last decimals, so that the reference slice matters.
        let slices: Vec<_> = tilted(60, 1.3, 17.3)
            .into_iter()
            .enumerate()
            .map(|(i, mut s)| {
                s.row_cosines[1] += 1e-6 * i as f64;
                s.pixel_spacing_mm[0] *= 1.0 + 1e-6 * (i % 7) as f64;
                s.position_mm[2] = (s.position_mm[2] * 10.0).round() / 10.0;
                s
            })
            .collect();
        let expected = build(&slices);
        let positions = |slices: &[SliceGeometry], stack: &Stack| -> Vec<[f64; 3]> {
            stack.order.iter().map(|&i| slices[i as usize].position_mm).collect()
        };
        for seed in 0..20 {
            let mixed = shuffled(&slices, seed);
            let stack = build(&mixed);
            assert_eq!(positions(&mixed, &stack), positions(&slices, &expected));
            assert_eq!(Stack { order: expected.order.clone(), ..stack }, expected);
        }
    }

    #[test]
    fn all_eight_right_angled_orientations_map_to_one() {
        let axes = [[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, -1.0, 0.0]];
        let mut seen = Vec::new();
        for row in axes {
            for column in axes.into_iter().filter(|&c| dot(c, row) == 0.0) {
                let slices: Vec<_> = straight(20, 2.0)
                    .into_iter()
                    .map(|s| SliceGeometry { row_cosines: row, column_cosines: column, columns: 300, ..s })
                    .collect();
                let stack = build(&slices);
                let o = stack.in_plane;
                let s = &slices[stack.order[0] as usize];
                let (out_rows, out_columns) = if o.transpose { (300u32, 512u32) } else { (512, 300) };
                let at = |r: u32, c: u32| {
                    let (mut r1, mut c1) = if o.transpose { (c, r) } else { (r, c) };
                    if o.flip_rows {
                        r1 = s.rows - 1 - r1;
                    }
                    if o.flip_columns {
                        c1 = s.columns - 1 - c1;
                    }
                    patient(s, f64::from(r1), f64::from(c1))
                };
                let (origin, down, right) = (at(0, 0), at(out_rows - 1, 0), at(0, out_columns - 1));
                assert!(down[1] > origin[1] && down[0] == origin[0], "rows must run to posterior: {row:?} {column:?}");
                assert!(right[0] > origin[0] && right[1] == origin[1], "columns must run to the left");
                assert!(stack.depth_mm.windows(2).all(|w| w[1] > w[0]));
                let z: Vec<f64> = stack.order.iter().map(|&i| slices[i as usize].position_mm[2]).collect();
                assert!(z.windows(2).all(|w| w[1] > w[0]), "feet first whatever the normal");
                seen.push((o.transpose, o.flip_rows, o.flip_columns));
            }
        }
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 8);
    }

    #[test]
    fn tilt_is_measured_and_sheared_out() {
        for degrees in [-29.0, -18.5, 5.0, 18.5, 29.9] {
            for mirrored in [false, true] {
                let mut slices = tilted(41, 3.0, degrees);
                if mirrored {
                    // Seen from the head: the normal points to the feet.
                    for s in &mut slices {
                        s.row_cosines = [-1.0, 0.0, 0.0];
                    }
                }
                let stack = build(&shuffled(&slices, 7));
                let slices = shuffled(&slices, 7);
                assert!((stack.tilt_deg - f64::abs(degrees)).abs() < 1e-9);
                assert!((stack.spacing_mm - 3.0 * degrees.to_radians().cos()).abs() < 1e-9);
                let shear = stack.shear_px.as_ref().expect("tilted");
                assert_eq!(shear[20], [0.0, 0.0]);
                let mut axis = slices[0].normal();
                if axis[2] < 0.0 {
                    axis = scale(axis, -1.0);
                }
                let middle = &slices[stack.order[20] as usize];
                for (k, &i) in stack.order.iter().enumerate() {
                    for (r, c) in [(0.0, 0.0), (100.0, 37.0), (511.0, 511.0)] {
                        let p = patient(&slices[i as usize], r - shear[k][0], c - shear[k][1]);
                        let d = sub(p, patient(middle, r, c));
                        let depth = stack.depth_mm[k] - stack.depth_mm[20];
                        let off = sub(d, scale(axis, depth));
                        assert!(dot(off, off).sqrt() < 1e-9, "not above one another: {off:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn rounding_is_no_tilt_and_a_small_tilt_is() {
        let round = |v: f64| (v * 10.0).round() / 10.0;
        // Each coordinate rounded on its own, at the finest matrix, with an origin between two decimals.
        let rounded: Vec<_> = (0..300)
            .map(|i| {
                let drift = 0.049 * f64::from(i % 3 - 1);
                let position_mm = [round(-127.97 + drift), round(-130.02 - drift), f64::from(i)];
                SliceGeometry { pixel_spacing_mm: [0.5, 0.5], position_mm, ..slice(0.0) }
            })
            .collect();
        assert!(rounded.iter().any(|s| s.position_mm[0] != rounded[0].position_mm[0]), "the rounding shows");
        assert_eq!(build(&rounded).shear_px, None);
        // 300 mm at 0.5 degrees: 2.6 mm.
        for degrees in [-0.5, 0.5] {
            assert!(build(&tilted(301, 1.0, degrees)).shear_px.is_some(), "{degrees}");
        }
        // Half a pixel of 0.7 mm over 299 mm: tan of 0.067 degrees.
        let just = |degrees: f64| build(&tilted(300, 1.0, degrees)).shear_px.is_some();
        assert!(!just(0.066) && just(0.068));
        // One slice beside the others.
        for (beside_mm, sheared) in [(0.3, false), (0.4, true)] {
            let mut slices = straight(100, 2.0);
            slices[40].position_mm[0] += beside_mm;
            assert_eq!(build(&slices).shear_px.is_some(), sheared, "{beside_mm} mm");
        }
        let one = GeometryLimits { min_slices: 1, ..Default::default() };
        assert_eq!(build_stack(&straight(1, 1.0), &one).map(|s| s.shear_px), Ok(None));
    }

    #[test]
    fn a_swivelled_gantry_shears_columns() {
        let (sin, cos) = 12f64.to_radians().sin_cos();
        let slices: Vec<_> =
            straight(30, 3.0).into_iter().map(|s| SliceGeometry { row_cosines: [cos, 0.0, sin], ..s }).collect();
        let stack = build(&slices);
        assert!((stack.tilt_deg - 12.0).abs() < 1e-9);
        let shear = stack.shear_px.expect("tilted");
        assert!(shear.iter().all(|o| o[0].abs() < 1e-9));
        assert!((shear[29][1] - 14.0 * 3.0 * sin / 0.7).abs() < 1e-9);
    }

    #[test]
    fn a_small_rotation_within_the_plane_is_kept_and_a_large_one_refused() {
        for (degrees, ok) in [(0.0, true), (14.0, true), (-14.0, true), (16.0, false), (45.0, false), (76.0, true)] {
            let (sin, cos) = f64::to_radians(degrees).sin_cos();
            let slices: Vec<_> = straight(25, 2.0)
                .into_iter()
                .map(|s| SliceGeometry { row_cosines: [cos, sin, 0.0], column_cosines: [-sin, cos, 0.0], ..s })
                .collect();
            match build_stack(&slices, &GeometryLimits::default()) {
                Ok(stack) => {
                    assert!(ok, "{degrees}");
                    assert_eq!(stack.in_plane.transpose, degrees > 45.0);
                    assert_eq!(stack.shear_px, None);
                }
                Err(refusal) => assert!(!ok && refusal.reason == Reason::NotAxial, "{degrees}: {refusal}"),
            }
        }
    }

    #[test]
    fn planes_that_are_not_axial_are_refused() {
        let with = |row, column| -> Vec<SliceGeometry> {
            (0..30)
                .map(|i| SliceGeometry {
                    row_cosines: row,
                    column_cosines: column,
                    position_mm: [i as f64, i as f64, i as f64],
                    ..slice(0.0)
                })
                .collect()
        };
        assert_eq!(reason(&with([1.0, 0.0, 0.0], [0.0, 0.0, -1.0])), Reason::NotAxial, "coronal");
        assert_eq!(reason(&with([0.0, 1.0, 0.0], [0.0, 0.0, -1.0])), Reason::NotAxial, "sagittal");
        assert_eq!(reason(&tilted(30, 3.0, 30.5)), Reason::NotAxial, "tilted too far");
    }

    #[test]
    fn numbers_that_are_no_geometry_are_refused_and_named() {
        let cases: [(&str, Reason, Spoil); 12] = [
            ("Rows", Reason::Undecodable, |s| s.rows = 0),
            ("Columns", Reason::Undecodable, |s| s.columns = 65535),
            ("PixelSpacing", Reason::InconsistentGeometry, |s| s.pixel_spacing_mm[0] = f64::NAN),
            ("PixelSpacing", Reason::InconsistentGeometry, |s| s.pixel_spacing_mm[1] = 0.0),
            ("PixelSpacing", Reason::InconsistentGeometry, |s| s.pixel_spacing_mm[1] = -0.7),
            ("PixelSpacing", Reason::InconsistentGeometry, |s| s.pixel_spacing_mm[1] = f64::INFINITY),
            ("ImagePositionPatient", Reason::NotAxial, |s| s.position_mm[1] = f64::NAN),
            ("ImagePositionPatient", Reason::NotAxial, |s| s.position_mm[2] = 1e300),
            ("ImageOrientationPatient", Reason::NotAxial, |s| s.row_cosines = [f64::NAN; 3]),
            ("ImageOrientationPatient", Reason::NotAxial, |s| s.row_cosines = [0.0; 3]),
            ("ImageOrientationPatient", Reason::NotAxial, |s| s.column_cosines = [1.0, 0.0, 0.0]),
            ("ImageOrientationPatient", Reason::NotAxial, |s| s.column_cosines = [0.0, 1.01, 0.0]),
        ];
        for (name, expected, spoil) in cases {
            let mut slices = straight(30, 2.5);
            spoil(&mut slices[13]);
            let refusal = build_stack(&slices, &GeometryLimits::default()).expect_err(name);
            assert_eq!(refusal.reason, expected, "{name}");
            assert!(refusal.detail.starts_with(name), "{name}: {refusal}");
            assert_eq!(Err(refusal), slices[13].validate());
        }
    }

    #[test]
    fn slices_of_another_size_spacing_or_orientation_are_refused() {
        let cases: [(&str, Spoil); 4] = [
            ("Rows", |s| s.rows = 256),
            ("Columns", |s| s.columns = 256),
            ("PixelSpacing", |s| s.pixel_spacing_mm[0] = 0.702),
            ("ImageOrientationPatient", |s| s.row_cosines = [1.0, 5e-4, 0.0]),
        ];
        for (name, spoil) in cases {
            let mut slices = straight(30, 2.5);
            spoil(&mut slices[13]);
            let refusal = build_stack(&slices, &GeometryLimits::default()).expect_err(name);
            assert_eq!(refusal.reason, Reason::InconsistentGeometry);
            assert!(refusal.detail.starts_with(name) && refusal.detail.contains("1 of 30"), "{refusal}");
            assert!(!slices[0].same_stack(&slices[13]));
            assert!(slices[0].same_stack(&slices[14]));
        }
    }

    #[test]
    fn too_few_and_too_many_slices_are_refused() {
        assert_eq!(reason(&[]), Reason::TooFewSlices);
        assert_eq!(reason(&straight(1, 1.0)), Reason::TooFewSlices);
        assert_eq!(reason(&straight(19, 1.0)), Reason::TooFewSlices);
        assert_eq!(reason(&straight(4097, 0.1)), Reason::TooManySlices);
        assert_eq!(reason(&straight(20_000, 0.1)), Reason::TooManySlices);
        let limits = GeometryLimits { min_slices: 0, ..Default::default() };
        assert_eq!(build_stack(&[], &limits).expect_err("empty").reason, Reason::TooFewSlices);
        let one = build_stack(&straight(1, 1.0), &limits).expect("one slice, when asked for");
        assert_eq!((one.depth_mm.as_slice(), one.spacing_mm, one.uniform), (&[0.0][..], 0.0, true));
    }

    #[test]
    fn two_slices_at_one_position_are_a_conflict() {
        for delta in [0.0, 0.009, 0.02] {
            let mut slices = straight(30, 2.5);
            slices.push(slice(slices[7].position_mm[2] + delta));
            assert_eq!(reason(&slices), Reason::DuplicateConflict, "{delta}");
        }
        // A real overlap is none: spacing 0.1 mm is thin, but it is a spacing.
        assert_eq!(build(&straight(30, 0.1)).order.len(), 30);
    }

    #[test]
    fn a_missing_slice_is_a_gap_wherever_it_is() {
        for missing in 1..29 {
            let mut slices = straight(30, 2.5);
            slices.remove(missing);
            assert_eq!(reason(&slices), Reason::Gap, "slice {missing}");
        }
        // Nothing tells that an end slice is missing.
        assert_eq!(build(&straight(30, 2.5)[1..]).order.len(), 29);
        assert_eq!(reason(&straight(30, 12.5)), Reason::Gap, "wider than any protocol");
    }

    #[test]
    fn two_spacings_in_one_series_are_no_gap() {
        for (near_mm, far_mm) in [(4.22, 7.38), (1.25, 5.0), (5.0, 1.25)] {
            let mut z = 0.0;
            let slices: Vec<_> = (0..40)
                .map(|i| {
                    let s = slice(z);
                    z += if i < 20 { near_mm } else { far_mm };
                    s
                })
                .collect();
            let stack = build(&slices);
            assert!(!stack.uniform);
            let mut holed = slices;
            holed.remove(30);
            assert_eq!(reason(&holed), Reason::Gap);
        }
    }

    #[test]
    fn rounded_positions_are_uniform() {
        let slices: Vec<_> = (0..200).map(|i| slice((i as f64 * 0.625 * 100.0).round() / 100.0)).collect();
        assert!(build(&slices).uniform);
    }

    #[test]
    fn limits_out_of_range_are_found_and_refuse_rather_than_accept() {
        assert_eq!(GeometryLimits::default().faults(), Vec::<String>::new());
        let nan = f64::NAN;
        let broken =
            GeometryLimits { min_slices: 0, max_slices: 4096, max_tilt_deg: nan, gap_factor: nan, max_spacing_mm: nan };
        assert_eq!(broken.faults().len(), 4);
        let refuse = |limits: GeometryLimits| build_stack(&straight(30, 1.0), &limits).expect_err("refused").reason;
        assert_eq!(refuse(GeometryLimits { max_tilt_deg: nan, ..Default::default() }), Reason::NotAxial);
        assert_eq!(refuse(GeometryLimits { gap_factor: nan, ..Default::default() }), Reason::Gap);
        assert_eq!(refuse(GeometryLimits { max_spacing_mm: nan, ..Default::default() }), Reason::Gap);
    }

    #[test]
    fn slices_beside_one_another_are_refused() {
        let mut slices = straight(30, 2.5);
        slices[3].position_mm[0] += 200.0;
        assert_eq!(reason(&slices), Reason::InconsistentGeometry);
        // A moved field of view is followed.
        slices[3].position_mm[0] -= 130.0;
        let shear = build(&slices).shear_px.expect("moved");
        assert!((shear[3][1] - 100.0).abs() < 1e-9 && shear[4] == [0.0, 0.0]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn no_numbers_make_it_panic(values in proptest::collection::vec(
            (any::<u32>(), any::<u32>(), any::<[f64; 2]>(), any::<[f64; 3]>(), any::<[f64; 3]>(), any::<[f64; 3]>()), 0..12),
            min_slices in 0usize..4, trusted in any::<bool>()) {
            let slices: Vec<_> = values.into_iter().map(|(rows, columns, spacing, position, row, column)| {
                if trusted {
                    SliceGeometry { position_mm: position, ..slice(0.0) }
                } else {
                    SliceGeometry { rows, columns, pixel_spacing_mm: spacing, position_mm: position, row_cosines: row,
                        column_cosines: column }
                }
            }).collect();
            let limits = GeometryLimits { min_slices, ..Default::default() };
            let _ = build_stack(&slices, &limits);
        }

        #[test]
        fn an_accepted_stack_is_strictly_increasing(
            gaps in proptest::collection::vec(0.5f64..0.9, 19..60), tilt in -29.0f64..29.0, seed: u64) {
            let mut z = 0.0;
            let (sin, cos) = tilt.to_radians().sin_cos();
            let slices: Vec<_> = gaps.iter().map(|g| {
                z += g;
                SliceGeometry { column_cosines: [0.0, cos, sin], ..slice(z) }
            }).chain([SliceGeometry { column_cosines: [0.0, cos, sin], ..slice(0.0) }]).collect();
            let stack = build_stack(&shuffled(&slices, seed), &GeometryLimits::default());
            let stack = stack.map_err(|e| TestCaseError::fail(e.to_string()))?;
            prop_assert!(stack.depth_mm.windows(2).all(|w| w[1] > w[0]));
            prop_assert!((stack.tilt_deg - tilt.abs()).abs() < 1e-6);
        }
    }
}
