//! Whether a scan shows lungs, and whether the crop keeps them.
//!
//! A cheap, deterministic check on HU slices, not a segmentation. Per slice, on a grid of block means of at most
//! [`MAX_GRID`] cells a side:
//!
//! ```text
//! tissue   = cells of at least TISSUE_HU; body = the largest 4-connected tissue region
//! outside  = cells reachable from the border of the image without entering the body
//! lung     = cells neither body nor outside, with a mean in LUNG_HU (aerated parenchyma; gas is below),
//!            in 4-connected regions with at least MIN_CORE_MM2 of cells whose four neighbours are in range too
//! ```
//!
//! Taking what the *largest* tissue region encloses keeps out the table, head holders and mattresses. The core rule keeps
//! out the partial-volume rims of gas pockets (bowel, sinuses, trachea), which are one cell wide; the lower HU limit keeps
//! out the gas itself.
//!
//! [`judge`] sums the areas to a volume over true positions and looks for one long contiguous extent.
//!
//! Known limits: a field of view so small that the lungs touch the border of the image finds no lung there; the limits
//! are for adults; a lung that is consolidated altogether is not lung here. None of these can turn a chest into a wrong
//! result: they end as `no_lung`.

use super::plan::{InPlanePlan, cell_edges};
use crate::volume::refusal::{Reason, Refusal};

/// Largest side of the grid the check works on.
pub const MAX_GRID: usize = 128;
/// Cells of at least this mean are tissue.
const TISSUE_HU: f32 = -300.0;
/// Mean HU of aerated lung: from hyperinflated (-960) to the tissue limit.
const LUNG_HU: std::ops::Range<f32> = -960.0..TISSUE_HU;
/// A lung region has at least this area of cells surrounded by cells in range.
const MIN_CORE_MM2: f64 = 100.0;
/// A slice shows lung from this area on.
const MIN_SLICE_MM2: f64 = 400.0;
/// Least aerated lung volume of a chest, litres. Adults hold 2 to 7 at inspiration and about 1.2 at residual volume; half
/// of that leaves room for one lung collapsed. Sinuses, pharynx and bowel rims stay below 0.15 after the rules above.
pub const MIN_LUNG_L: f64 = 0.5;
/// Most lung volume of a person, litres, with room for emphysema.
pub const MAX_LUNG_L: f64 = 14.0;
/// Least contiguous extent along the stack that shows lung, millimetres.
pub const MIN_EXTENT_MM: f64 = 80.0;
/// The end slice cuts the lungs when it shows at least this share of the largest slice's area.
const TRUNCATED_SHARE: f64 = 0.15;
/// The crop cuts the lungs when the part outside is wider than this, millimetres ...
const CUT_MM: f64 = 5.0;
/// ... on at least this many slices.
const CUT_SLICES: usize = 2;

/// What one slice shows.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SliceLung {
    /// Aerated lung, square millimetres.
    pub lung_area_mm2: f64,
    /// Gas below the lung's range enclosed by the body (bowel, sinuses, airways, bullae), square millimetres.
    pub gas_area_mm2: f64,
    /// The largest tissue region, square millimetres.
    pub body_area_mm2: f64,
    /// Bounding box of the lung in stored pixels, half open: first row, first column, end row, end column.
    pub lung_box: Option<[u32; 4]>,
    /// PixelSpacing of the slice, millimetres: between rows, between columns.
    pub pixel_spacing_mm: [f64; 2],
}

/// What a series shows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LungReport {
    /// Aerated lung volume, litres.
    pub lung_volume_l: f64,
    /// The longest contiguous extent with lung, millimetres.
    pub lung_extent_mm: f64,
    /// The centre crop leaves lung outside.
    pub crop_cuts_lung: bool,
    /// Width of the widest part outside the crop, millimetres; 0 when nothing is.
    pub crop_cut_mm: f64,
    /// The last slice, nearest the head, still shows much lung.
    pub lung_truncated_top: bool,
    /// The first slice, nearest the feet, still shows much lung.
    pub lung_truncated_bottom: bool,
}

/// The scratch of the check for slices of one size; allocates when made and not after.
#[derive(Debug)]
pub struct LungCheck {
    rows: usize,
    columns: usize,
    /// Pixels a cell, along both axes.
    step: usize,
    grid_rows: usize,
    grid_columns: usize,
    means: Vec<f32>,
    labels: Vec<u8>,
    stack: Vec<u32>,
    row_sums: Vec<i32>,
}

// Labels of a cell.
const OPEN: u8 = 0;
const SEEN: u8 = 1;
const BODY: u8 = 2;
const OUTSIDE: u8 = 3;
const LUNG_SEEN: u8 = 4;

impl LungCheck {
    /// Scratch for slices of `rows x columns` pixels.
    ///
    /// # Panics
    /// When a size is zero.
    pub fn new(rows: u32, columns: u32) -> Self {
        assert!(rows > 0 && columns > 0, "slice sides must be positive");
        let (rows, columns) = (rows as usize, columns as usize);
        let step = rows.max(columns).div_ceil(MAX_GRID);
        let (grid_rows, grid_columns) = (rows.div_ceil(step), columns.div_ceil(step));
        let cells = grid_rows * grid_columns;
        Self {
            rows,
            columns,
            step,
            grid_rows,
            grid_columns,
            means: vec![0.0; cells],
            labels: vec![OPEN; cells],
            stack: Vec::with_capacity(cells),
            row_sums: vec![0; grid_columns],
        }
    }

    /// Looks at one slice of HU in stored order. The result does not depend on orientation but for the box.
    ///
    /// # Panics
    /// When `hu` is not `rows x columns` long.
    pub fn slice_stats(&mut self, hu: &[i16], pixel_spacing_mm: [f64; 2]) -> SliceLung {
        assert_eq!(hu.len(), self.rows * self.columns, "slice length");
        self.block_means(hu);
        let cell_mm2 = pixel_spacing_mm[0] * pixel_spacing_mm[1] * (self.step * self.step) as f64;
        let body_cells = self.mark_body();
        self.mark_outside();
        let mut out =
            SliceLung { body_area_mm2: body_cells as f64 * cell_mm2, pixel_spacing_mm, ..SliceLung::default() };
        let min_core = (MIN_CORE_MM2 / cell_mm2).ceil().max(1.0) as usize;
        let mut cells = 0usize;
        let mut gas = 0usize;
        let mut found: Option<[usize; 4]> = None;
        for at in 0..self.means.len() {
            if self.labels[at] != OPEN {
                continue;
            }
            if self.means[at] < LUNG_HU.start {
                gas += 1;
            }
            if !LUNG_HU.contains(&self.means[at]) {
                continue;
            }
            let (count, core, region) = self.lung_region(at);
            if core >= min_core {
                cells += count;
                found = Some(match found {
                    None => region,
                    Some(b) => [b[0].min(region[0]), b[1].min(region[1]), b[2].max(region[2]), b[3].max(region[3])],
                });
            }
        }
        out.lung_area_mm2 = cells as f64 * cell_mm2;
        out.gas_area_mm2 = gas as f64 * cell_mm2;
        out.lung_box = found.map(|b| {
            let pixel = |cell: usize, limit: usize| (cell * self.step).min(limit) as u32;
            [pixel(b[0], self.rows), pixel(b[1], self.columns), pixel(b[2], self.rows), pixel(b[3], self.columns)]
        });
        out
    }

    /// Means of the blocks; a block at the right or lower edge may be smaller.
    fn block_means(&mut self, hu: &[i16]) {
        let step = self.step;
        for grid_row in 0..self.grid_rows {
            let first = grid_row * step;
            let last = (first + step).min(self.rows);
            self.row_sums.fill(0);
            for row in hu[first * self.columns..last * self.columns].chunks_exact(self.columns) {
                for (sum, block) in self.row_sums.iter_mut().zip(row.chunks(step)) {
                    // At most 512 x 512 pixels a block (65,535 / MAX_GRID), of 1024 at most: 2^28. Limiting the values also
                    // keeps metal and padding from outweighing their neighbours.
                    *sum += block.iter().map(|v| i32::from((*v).clamp(-1024, 1023))).sum::<i32>();
                }
            }
            for grid_column in 0..self.grid_columns {
                let width = (self.columns - grid_column * step).min(step);
                let pixels = ((last - first) * width) as f32;
                self.means[grid_row * self.grid_columns + grid_column] = self.row_sums[grid_column] as f32 / pixels;
            }
        }
        self.labels.fill(OPEN);
    }

    /// Labels the largest tissue region BODY and opens every other cell again; returns its cells.
    fn mark_body(&mut self) -> usize {
        let mut best: Option<(usize, usize)> = None;
        for at in 0..self.means.len() {
            if self.labels[at] == OPEN && self.means[at] >= TISSUE_HU {
                let count = self.flood(at, SEEN, |mean| mean >= TISSUE_HU);
                if best.is_none_or(|(most, _)| count > most) {
                    best = Some((count, at));
                }
            }
        }
        self.labels.fill(OPEN);
        best.map_or(0, |(_, at)| self.flood(at, BODY, |mean| mean >= TISSUE_HU))
    }

    /// Labels OUTSIDE everything that is reachable from the border around the body.
    fn mark_outside(&mut self) {
        let (rows, columns) = (self.grid_rows, self.grid_columns);
        let border = (0..columns)
            .flat_map(|c| [c, (rows - 1) * columns + c])
            .chain((0..rows).flat_map(|r| [r * columns, r * columns + columns - 1]));
        for at in border {
            if self.labels[at] == OPEN {
                self.flood(at, OUTSIDE, |_| true);
            }
        }
    }

    /// Labels the open 4-connected region of cells that `take` around `start`; returns its size.
    fn flood(&mut self, start: usize, label: u8, take: impl Fn(f32) -> bool) -> usize {
        let mut count = 0;
        self.labels[start] = label;
        self.stack.push(start as u32);
        while let Some(at) = self.stack.pop() {
            count += 1;
            for next in neighbours(at as usize, self.grid_rows, self.grid_columns).into_iter().flatten() {
                if self.labels[next] == OPEN && take(self.means[next]) {
                    self.labels[next] = label;
                    self.stack.push(next as u32);
                }
            }
        }
        count
    }

    /// Labels one region of cells in range; returns its cells, its core cells and its box in cells, half open.
    fn lung_region(&mut self, start: usize) -> (usize, usize, [usize; 4]) {
        let (rows, columns) = (self.grid_rows, self.grid_columns);
        let (mut count, mut core) = (0, 0);
        let mut region = [usize::MAX, usize::MAX, 0, 0];
        self.labels[start] = LUNG_SEEN;
        self.stack.push(start as u32);
        while let Some(at) = self.stack.pop() {
            let at = at as usize;
            count += 1;
            let (r, c) = (at / columns, at % columns);
            region = [region[0].min(r), region[1].min(c), region[2].max(r + 1), region[3].max(c + 1)];
            let mut inside = 0;
            for next in neighbours(at, rows, columns).into_iter().flatten() {
                let open = self.labels[next] == OPEN || self.labels[next] == LUNG_SEEN;
                if open && LUNG_HU.contains(&self.means[next]) {
                    inside += 1;
                    if self.labels[next] == OPEN {
                        self.labels[next] = LUNG_SEEN;
                        self.stack.push(next as u32);
                    }
                }
            }
            core += usize::from(inside == 4);
        }
        (count, core, region)
    }
}

/// The up to four neighbours of a cell.
fn neighbours(at: usize, rows: usize, columns: usize) -> [Option<usize>; 4] {
    let (r, c) = (at / columns, at % columns);
    [
        (r > 0).then(|| at - columns),
        (r + 1 < rows).then(|| at + columns),
        (c > 0).then(|| at - 1),
        (c + 1 < columns).then(|| at + 1),
    ]
}

/// Judges a series from its slices, ordered feet to head, at `depth_mm`, with the plan whose crop is to be checked (the
/// plan without shift).
///
/// # Errors
/// `no_lung` when the aerated volume is outside [`MIN_LUNG_L`]..[`MAX_LUNG_L`] or no contiguous extent of
/// [`MIN_EXTENT_MM`] shows lung.
///
/// # Panics
/// When the lengths differ.
pub fn judge(slices: &[SliceLung], depth_mm: &[f64], plan: &InPlanePlan) -> Result<LungReport, Refusal> {
    assert_eq!(slices.len(), depth_mm.len(), "one position a slice");
    if slices.len() < 2 {
        return Err(Refusal::new(Reason::NoLung, "the lung check needs at least 2 slices"));
    }
    let edges = cell_edges(depth_mm);
    let mut volume_mm3 = 0.0;
    let (mut extent, mut run) = (0.0f64, 0.0);
    for (i, slice) in slices.iter().enumerate() {
        let cell = edges[i + 1] - edges[i];
        volume_mm3 += slice.lung_area_mm2 * cell;
        run = if slice.lung_area_mm2 >= MIN_SLICE_MM2 { run + cell } else { 0.0 };
        extent = extent.max(run);
    }
    let lung_volume_l = volume_mm3 / 1e6;
    if !(MIN_LUNG_L..=MAX_LUNG_L).contains(&lung_volume_l) {
        return Err(Refusal::new(
            Reason::NoLung,
            format!(
                "expected {MIN_LUNG_L} to {MAX_LUNG_L} litres of aerated lung, found {lung_volume_l:.2}; is this a chest CT?"
            ),
        ));
    }
    if extent < MIN_EXTENT_MM {
        return Err(Refusal::new(
            Reason::NoLung,
            format!("expected lung on {MIN_EXTENT_MM} mm without a break, found {extent:.0}; is this a chest CT?"),
        ));
    }
    let crop = plan.stored_crop();
    let (mut cut_slices, mut crop_cut_mm) = (0, 0.0f64);
    for slice in slices {
        let Some([row0, col0, row1, col1]) = slice.lung_box else { continue };
        let along_rows = (crop.row0 - f64::from(row0)).max(f64::from(row1) - crop.row1);
        let along_columns = (crop.col0 - f64::from(col0)).max(f64::from(col1) - crop.col1);
        let cut = (along_rows * slice.pixel_spacing_mm[0]).max(along_columns * slice.pixel_spacing_mm[1]).max(0.0);
        cut_slices += usize::from(cut > CUT_MM);
        crop_cut_mm = crop_cut_mm.max(cut);
    }
    let largest = slices.iter().fold(0.0, |most: f64, s| most.max(s.lung_area_mm2));
    let truncated = |end: &SliceLung| end.lung_area_mm2 >= (TRUNCATED_SHARE * largest).max(MIN_SLICE_MM2);
    Ok(LungReport {
        lung_volume_l,
        lung_extent_mm: extent,
        crop_cuts_lung: cut_slices >= CUT_SLICES,
        crop_cut_mm,
        lung_truncated_top: truncated(&slices[slices.len() - 1]),
        lung_truncated_bottom: truncated(&slices[0]),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::geometry::InPlaneOrientation;

    const SPACING: [f64; 2] = [0.75, 0.75];

    /// A body ellipse with two lungs of `lung_hu`, and a closed table shell of foam below.
    fn chest(lung_hu: i16, lung_offset: f64, lung_radius: f64) -> Vec<i16> {
        let mut hu = vec![-1000i16; 512 * 512];
        for r in 0..512 {
            for c in 0..512 {
                let (y, x) = (r as f64 - 240.0, c as f64 - 256.0);
                let inside = |cx: f64, rx: f64, ry: f64| ((x - cx) / rx).powi(2) + (y / ry).powi(2) < 1.0;
                let at = &mut hu[r * 512 + c];
                if inside(0.0, 230.0, 160.0) {
                    *at = 40;
                }
                if inside(lung_offset, lung_radius, 110.0) || inside(-lung_offset, lung_radius, 110.0) {
                    *at = lung_hu;
                }
                if (420..480).contains(&r) && (60..450).contains(&c) {
                    let shell = !(426..474).contains(&r) || !(66..444).contains(&c);
                    *at = if shell { 200 } else { -900 };
                }
            }
        }
        hu
    }

    fn plan(crop: f64) -> InPlanePlan {
        InPlanePlan::new(512, 512, InPlaneOrientation::default(), crop, [224, 224], [0.0; 2])
    }

    fn depth(n: usize, step: f64) -> Vec<f64> {
        (0..n).map(|i| i as f64 * step).collect()
    }

    #[test]
    fn two_lungs_are_measured_and_table_foam_is_not() {
        let mut check = LungCheck::new(512, 512);
        let stats = check.slice_stats(&chest(-850, 100.0, 80.0), SPACING);
        let expected = 2.0 * std::f64::consts::PI * 80.0 * 110.0 * SPACING[0] * SPACING[1];
        assert!((stats.lung_area_mm2 / expected - 1.0).abs() < 0.05, "{} and {expected}", stats.lung_area_mm2);
        let [r0, c0, r1, c1] = stats.lung_box.unwrap();
        for (got, want) in [(r0, 130), (c0, 76), (r1, 350), (c1, 436)] {
            assert!((i64::from(got) - want).abs() <= 4, "{got} and {want}");
        }
    }

    #[test]
    fn gas_pockets_and_solid_bodies_are_no_lung() {
        let mut check = LungCheck::new(512, 512);
        for hu in [-1000, 30] {
            let slice = chest(hu, 100.0, 30.0);
            let stats: Vec<_> = (0..60).map(|_| check.slice_stats(&slice, SPACING)).collect();
            let refusal = judge(&stats, &depth(60, 5.0), &plan(1.0)).unwrap_err();
            assert_eq!(refusal.reason, Reason::NoLung);
        }
        let all_air = check.slice_stats(&vec![-1024; 512 * 512], SPACING);
        assert_eq!(all_air.lung_area_mm2, 0.0);
    }

    #[test]
    fn crop_and_truncation_are_flagged() {
        let mut check = LungCheck::new(512, 512);
        let lung = check.slice_stats(&chest(-850, 100.0, 80.0), SPACING);
        let none = check.slice_stats(&chest(40, 100.0, 80.0), SPACING);
        let mut slices = vec![lung; 60];
        slices[59] = none;
        let report = judge(&slices, &depth(60, 3.0), &plan(416.0 / 512.0)).unwrap();
        assert!(report.lung_truncated_bottom && !report.lung_truncated_top);
        assert!(!report.crop_cuts_lung, "cut {}", report.crop_cut_mm);
        let report = judge(&slices, &depth(60, 3.0), &plan(0.5)).unwrap();
        assert!(report.crop_cuts_lung && (report.crop_cut_mm - 52.0 * 0.75).abs() < 4.0);
        let short = judge(&slices, &depth(60, 1.0), &plan(1.0)).unwrap_err();
        assert_eq!(short.reason, Reason::NoLung);
    }

    #[test]
    fn odd_sizes_and_single_pixels_do_not_fail() {
        for (rows, columns) in [(1, 1), (3, 200), (130, 129), (513, 1025)] {
            let mut check = LungCheck::new(rows, columns);
            let stats = check.slice_stats(&vec![i16::MAX; (rows * columns) as usize], SPACING);
            assert!(stats.lung_box.is_none());
            // Blocks that reach over the edge count in full.
            let ratio = stats.body_area_mm2 / (f64::from(rows * columns) * 0.5625);
            assert!((1.0 - 1e-9..1.4).contains(&ratio), "{rows}x{columns}: {ratio}");
        }
    }
}
