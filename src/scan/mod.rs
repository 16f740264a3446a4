//! Scans from files: DICOM series, NIfTI, MetaImage and folders of pictures become one form, or a refusal.
//!
//! - Input: files. Output: a [`Scan`]: HU slices from feet to head with their geometry, the same for every format, or the
//!   [`Refusal`] that says why there is none. [`Scan::network_input`] is what the network sees of it.
//! - What makes the volume of a DICOM series ([`select`]) is decided here for the daemon too; filtering and gathering are
//!   [`crate::resample`]'s. A scan therefore gives the same input to the bit at the scanner, offline and in training.
//! - A scan that cannot be read whole is refused; nothing is passed over in silence.
//!
//! Deliberately absent: what a scan is for, folders of many scans, labels.

use std::path::Path;

use rayon::prelude::*;

use crate::model::manifest::Preprocessing;
use crate::resample::alone;
use crate::resample::cpu::{SlicesToGather, Window, gather_slices};
use crate::resample::lung::{self, LungCheck, LungReport, SliceLung};
use crate::resample::plan::{DepthPlan, InPlanePlan};
use crate::volume::geometry::{GeometryLimits, SliceGeometry, Stack, build_stack};
use crate::volume::refusal::{Reason, Refusal};

pub mod dicom;
pub mod meta_image;
pub mod nifti;
pub mod pictures;
pub mod select;

/// Bytes one file may have: a 2048-frame 512 x 512 object is 1 GiB.
pub const MAX_FILE_BYTES: u64 = 1 << 30;

/// A readable scan.
#[derive(Clone, Debug, PartialEq)]
pub struct Scan {
    /// Geometry; the slices below are in its order.
    pub stack: Stack,
    /// HU of each slice as stored, feet first.
    pub hu: Vec<Vec<i16>>,
    /// PixelSpacing of each slice: within the tolerance of one grid, but the lung check takes it as stated.
    pub spacings: Vec<[f64; 2]>,
    /// What a reader of the result should know.
    pub notes: Vec<String>,
}

/// The input of a network and what was seen on the way.
#[derive(Clone, Debug)]
pub struct NetworkInput {
    /// D x H x W in [0, 1].
    pub values: Vec<f32>,
    /// The lung check.
    pub lung: LungReport,
}

/// Slices as a file gives them, not yet ordered.
#[derive(Clone, Debug, PartialEq)]
pub struct Loaded {
    /// Geometry of each slice.
    pub geometry: Vec<SliceGeometry>,
    /// HU of each slice.
    pub hu: Vec<Vec<i16>>,
    /// What a reader of the result should know.
    pub notes: Vec<String>,
}

impl Loaded {
    /// Orders the slices.
    ///
    /// # Errors
    /// As [`build_stack`].
    pub fn into_scan(self, limits: &GeometryLimits) -> Result<Scan, Refusal> {
        let stack = build_stack(&self.geometry, limits)?;
        let mut pixels: Vec<Option<Vec<i16>>> = self.hu.into_iter().map(Some).collect();
        let hu = stack.order.iter().map(|&k| pixels[k as usize].take().unwrap_or_default()).collect();
        let spacings = vec![stack.pixel_spacing_mm; stack.order.len()];
        Ok(Scan { stack, hu, spacings, notes: self.notes })
    }
}

impl Scan {
    /// The lung check of every slice.
    pub fn lung(&self) -> Vec<SliceLung> {
        self.hu
            .par_iter()
            .zip(&self.spacings)
            .map_init(
                || LungCheck::new(self.stack.rows, self.stack.columns),
                |check, (slice, spacing)| check.slice_stats(slice, *spacing),
            )
            .collect()
    }

    fn plan(&self, preprocessing: &Preprocessing, input_dhw: [usize; 3]) -> InPlanePlan {
        let [_, h, w] = input_dhw;
        let stack = &self.stack;
        InPlanePlan::new(stack.rows, stack.columns, stack.in_plane, preprocessing.crop_fraction, [h, w], [0.0, 0.0])
    }

    fn depth(&self, preprocessing: &Preprocessing, input_dhw: [usize; 3]) -> Result<DepthPlan, Refusal> {
        let p = preprocessing;
        DepthPlan::new(&self.stack.depth_mm, p.depth_grid, p.slice_direction, input_dhw[0])
    }

    /// What the network sees: the same bits as the daemon's for the same slices.
    ///
    /// # Errors
    /// `no_lung`, and what [`DepthPlan::new`] refuses.
    pub fn network_input(&self, preprocessing: &Preprocessing, input_dhw: [usize; 3]) -> Result<NetworkInput, Refusal> {
        let plan = self.plan(preprocessing, input_dhw);
        let lung = lung::judge(&self.lung(), &self.stack.depth_mm, &plan)?;
        let depth = self.depth(preprocessing, input_dhw)?;
        let window = Window { center_hu: preprocessing.window_center_hu, width_hu: preprocessing.window_width_hu };
        Ok(NetworkInput { values: self.gathered(&self.hu, &plan, &depth, &window, input_dhw), lung })
    }

    /// A mask of this scan on the network's grid, resampled like the image: 1 where at least half of a voxel is covered.
    ///
    /// `mask` has the slices of the scan in its order, feet first; every value but 0 is lesion.
    ///
    /// # Errors
    /// `inconsistent_geometry` when it has another number of slices or pixels; what [`DepthPlan::new`] refuses.
    pub fn mask_input(
        &self,
        mask: &[Vec<i16>],
        preprocessing: &Preprocessing,
        input_dhw: [usize; 3],
    ) -> Result<Vec<u8>, Refusal> {
        let area = self.stack.rows as usize * self.stack.columns as usize;
        if mask.len() != self.hu.len() || mask.iter().any(|m| m.len() != area) {
            return Err(Refusal::new(Reason::InconsistentGeometry, "expected a mask on the grid of its scan"));
        }
        let ones: Vec<Vec<i16>> = mask.iter().map(|m| m.iter().map(|v| i16::from(*v != 0)).collect()).collect();
        let (plan, depth) = (self.plan(preprocessing, input_dhw), self.depth(preprocessing, input_dhw)?);
        // A window that leaves 0 and 1 as they are.
        let window = Window { center_hu: 0.5, width_hu: 1.0 };
        let covered = self.gathered(&ones, &plan, &depth, &window, input_dhw);
        Ok(covered.into_iter().map(|v| u8::from(v >= 0.5)).collect())
    }

    fn gathered(
        &self,
        slices: &[Vec<i16>],
        plan: &InPlanePlan,
        depth: &DepthPlan,
        window: &Window,
        input_dhw: [usize; 3],
    ) -> Vec<f32> {
        let hu: Vec<&[i16]> = slices.iter().map(Vec::as_slice).collect();
        let planes = vec![None; hu.len()];
        let volume = SlicesToGather { hu: &hu, planes: &planes, shear_px: self.stack.shear_px.as_deref() };
        let mut out = vec![0.0; input_dhw.iter().product()];
        gather_slices(&volume, plan, depth, window, &mut Vec::new(), &mut out, &alone);
        out
    }
}

/// Value of a file as HU.
pub(crate) fn to_hu(value: f32) -> i16 {
    // `as` saturates; a value that is no number becomes air rather than water.
    if value.is_nan() { -1024 } else { value.round() as i16 }
}

/// A refusal of a file's bytes.
pub(crate) fn undecodable(detail: impl std::fmt::Display) -> Refusal {
    Refusal::new(Reason::Undecodable, detail.to_string())
}

/// A grid of voxels in the patient: where voxel `[0, 0, 0]` lies and how far along which way the next one of each file
/// axis is, LPS, millimetres.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct VoxelGrid {
    /// Voxels along each axis of the file.
    pub dims: [usize; 3],
    /// Centre of the first voxel.
    pub origin_mm: [f64; 3],
    /// From one voxel to the next along each axis.
    pub step_mm: [[f64; 3]; 3],
}

/// Cuts a voxel grid into slices across the axis that runs along the patient. `value` gives the HU at indices in the
/// file's axes.
///
/// # Errors
/// `too_many_slices`, and what [`SliceGeometry::validate`] refuses.
pub(crate) fn slices_of_grid(
    grid: &VoxelGrid,
    limits: &GeometryLimits,
    value: impl Fn([usize; 3]) -> i16 + Sync,
) -> Result<(Vec<SliceGeometry>, Vec<Vec<i16>>), Refusal> {
    let length = |v: [f64; 3]| v.iter().map(|x| x * x).sum::<f64>().sqrt();
    let axes = grid.step_mm.map(|v| (v.map(|x| x / length(v)), length(v)));
    let depth_axis = (0..3).max_by(|&a, &b| axes[a].0[2].abs().total_cmp(&axes[b].0[2].abs())).unwrap_or(2);
    let (column_axis, row_axis) = match depth_axis {
        0 => (1, 2),
        1 => (0, 2),
        _ => (0, 1),
    };
    let (rows, columns, count) = (grid.dims[row_axis], grid.dims[column_axis], grid.dims[depth_axis]);
    if count > limits.max_slices {
        let detail = format!("expected at most {} slices, got {count}", limits.max_slices);
        return Err(Refusal::new(Reason::TooManySlices, detail));
    }
    let mut geometry = Vec::with_capacity(count);
    for k in 0..count {
        let step = axes[depth_axis];
        let at = k as f64 * step.1;
        let slice = SliceGeometry {
            rows: u32::try_from(rows).map_err(undecodable)?,
            columns: u32::try_from(columns).map_err(undecodable)?,
            pixel_spacing_mm: [axes[row_axis].1, axes[column_axis].1],
            position_mm: std::array::from_fn(|i| grid.origin_mm[i] + at * step.0[i]),
            row_cosines: axes[column_axis].0,
            column_cosines: axes[row_axis].0,
        };
        slice.validate()?;
        geometry.push(slice);
    }
    let hu = (0..count)
        .into_par_iter()
        .map(|k| {
            let mut pixels = Vec::with_capacity(rows * columns);
            let mut index = [0usize; 3];
            index[depth_axis] = k;
            for r in 0..rows {
                index[row_axis] = r;
                for c in 0..columns {
                    index[column_axis] = c;
                    pixels.push(value(index));
                }
            }
            pixels
        })
        .collect();
    Ok((geometry, hu))
}

/// Numbers inside a name compare as numbers: slice 9 before slice 10.
pub fn natural_key(path: &Path) -> Vec<(u64, String)> {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let mut key = Vec::new();
    let mut text = String::new();
    let mut digits = String::new();
    for c in name.chars() {
        if c.is_ascii_digit() {
            digits.push(c);
            continue;
        }
        if !digits.is_empty() {
            key.push((digits.parse().unwrap_or(u64::MAX), std::mem::take(&mut text)));
            digits.clear();
        }
        text.push(c);
    }
    key.push((digits.parse().unwrap_or(0), text));
    key
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn numbers_in_names_sort_as_numbers() {
        let mut names: Vec<PathBuf> = ["im10.png", "im9.png", "im1.png"].iter().map(PathBuf::from).collect();
        names.sort_by_key(|p| natural_key(p));
        assert_eq!(names, ["im1.png", "im9.png", "im10.png"].map(PathBuf::from));
    }
}
