//! Slice geometry and ordering. Pure: no input, no output, no clock.

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
    /// `None` when every offset is below 0.05 pixel (no tilt).
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
