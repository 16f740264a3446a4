//! NIfTI-1 files.
//!
//! Input: a `.nii` or `.nii.gz` file. Output: [`Loaded`] slices whose HU are the file's scaled values, rounded and saturated;
//! the RAS affine (s-form, else q-form, else voxel sizes) becomes LPS slices. Deliberately absent: series over time.

use std::path::Path;

use nifti::{IntoNdArray, NiftiObject, NiftiVolume, ReaderOptions};

use crate::scan::{Loaded, VoxelGrid, slices_of_grid, to_hu, undecodable};
use crate::volume::geometry::GeometryLimits;
use crate::volume::refusal::Refusal;

/// Reads a file.
///
/// # Errors
/// `undecodable` for what is no volume of three axes; `too_many_slices`; an impossible geometry.
pub fn load(path: &Path, limits: &GeometryLimits) -> Result<Loaded, Refusal> {
    let object = ReaderOptions::new().read_file(path).map_err(|e| undecodable(format!("read NIfTI: {e}")))?;
    let h = object.header().clone();
    let dims: Vec<usize> = object.volume().dim().iter().map(|&d| usize::from(d)).collect();
    if dims.len() < 3 || dims[3..].iter().any(|&d| d > 1) {
        return Err(undecodable(format!("expected a NIfTI volume of three axes, got {}", dims.len())));
    }
    let affine = if h.sform_code > 0 {
        [h.srow_x, h.srow_y, h.srow_z].map(|row| row.map(f64::from))
    } else {
        quaternion_affine(&h)
    };
    let volume =
        object.into_volume().into_ndarray::<f32>().map_err(|e| undecodable(format!("read NIfTI voxels: {e}")))?;
    // RAS to LPS: x and y change sign.
    let column = |axis: usize| [-affine[0][axis], -affine[1][axis], affine[2][axis]];
    let grid = VoxelGrid {
        dims: [dims[0], dims[1], dims[2]],
        origin_mm: column(3),
        step_mm: [column(0), column(1), column(2)],
    };
    let (geometry, hu) = slices_of_grid(&grid, limits, |[x, y, z]| {
        let mut index = vec![0usize; dims.len()];
        index[..3].copy_from_slice(&[x, y, z]);
        to_hu(volume[index.as_slice()])
    })?;
    Ok(Loaded { geometry, hu, notes: vec!["NIfTI: voxel values are taken as HU".to_owned()] })
}

/// The affine of a NIfTI header's quaternion (nifti1.h, method 2), or of its voxel sizes alone (method 1).
fn quaternion_affine(h: &nifti::NiftiHeader) -> [[f64; 4]; 3] {
    let p = h.pixdim.map(f64::from);
    if h.qform_code <= 0 {
        return [[p[1], 0.0, 0.0, 0.0], [0.0, p[2], 0.0, 0.0], [0.0, 0.0, p[3], 0.0]];
    }
    let (b, c, d) = (f64::from(h.quatern_b), f64::from(h.quatern_c), f64::from(h.quatern_d));
    let a = (1.0 - b * b - c * c - d * d).max(0.0).sqrt();
    let q = if p[0] < 0.0 { -1.0 } else { 1.0 };
    let r = [
        [a * a + b * b - c * c - d * d, 2.0 * (b * c - a * d), 2.0 * (b * d + a * c)],
        [2.0 * (b * c + a * d), a * a + c * c - b * b - d * d, 2.0 * (c * d - a * b)],
        [2.0 * (b * d - a * c), 2.0 * (c * d + a * b), a * a + d * d - b * b - c * c],
    ];
    let offset = [h.quatern_x, h.quatern_y, h.quatern_z].map(f64::from);
    std::array::from_fn(|i| [r[i][0] * p[1], r[i][1] * p[2], r[i][2] * p[3] * q, offset[i]])
}
