//! Folders of pictures: PNG, JPEG, BMP, TIFF, one a slice.
//!
//! Input: the files in their order and what their grey values mean ([`Grey`]). Output: [`Loaded`] slices. Pictures state
//! no geometry: field and length of a chest are assumed, which the depth grid and the crop do not depend on, but the
//! lung check does.
//!
//! Deliberately absent: colour, other sizes within one scan (they are refused).

use std::path::PathBuf;

use rayon::prelude::*;

use crate::model::manifest::{Preprocessing, SliceDirection};
use crate::scan::{Loaded, to_hu, undecodable};
use crate::volume::geometry::{GeometryLimits, SliceGeometry};
use crate::volume::refusal::{Reason, Refusal};

/// In-plane field assumed for image slices that state no geometry, millimetres.
pub const ASSUMED_FIELD_MM: f64 = 350.0;
/// Length assumed for image slices that state no geometry, millimetres: a chest.
pub const ASSUMED_LENGTH_MM: f64 = 300.0;
/// Most rows and columns of a picture.
const MAX_SIDE: u32 = 4096;

/// What grey values mean.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Grey {
    /// Black to white is this window: `black_hu + grey / white * width_hu`.
    Windowed {
        /// HU of black.
        black_hu: f32,
        /// HU from black to white.
        width_hu: f32,
    },
    /// The numbers themselves: `slope * value + offset_hu`.
    Numbers {
        /// Factor.
        slope: f32,
        /// HU of 0.
        offset_hu: f32,
    },
}

impl Grey {
    /// Windowed with this centre and width.
    pub fn window(center_hu: f32, width_hu: f32) -> Self {
        Self::Windowed { black_hu: center_hu - width_hu / 2.0, width_hu }
    }

    /// Windowed as the model's input is.
    pub fn as_input(preprocessing: &Preprocessing) -> Self {
        Self::window(preprocessing.window_center_hu, preprocessing.window_width_hu)
    }
}

/// Rows, columns and HU of an image slice.
type Slice = (u32, u32, Vec<i16>);

/// Reads the pictures of one scan, in the order given; the first is plane 0 of a network with this `direction`.
///
/// # Errors
/// `too_many_slices`; `undecodable` for a picture that cannot be read; `inconsistent_geometry` for several sizes.
pub fn load(
    files: &[PathBuf],
    grey: Grey,
    direction: SliceDirection,
    limits: &GeometryLimits,
) -> Result<Loaded, Refusal> {
    if files.len() > limits.max_slices {
        let detail = format!("expected at most {} slices, got {}", limits.max_slices, files.len());
        return Err(Refusal::new(Reason::TooManySlices, detail));
    }
    let decoded: Vec<Result<Slice, Refusal>> = files.par_iter().map(|path| decode(path, grey)).collect();
    let sign = match direction {
        SliceDirection::FeetToHead => 1.0,
        SliceDirection::HeadToFeet => -1.0,
    };
    // So few that a chest would need gaps are taken as near as the limits allow: nothing is known of their distance.
    let step = sign * (ASSUMED_LENGTH_MM / files.len() as f64).min(limits.max_spacing_mm);
    let mut geometry = Vec::with_capacity(files.len());
    let mut hu = Vec::with_capacity(files.len());
    for (k, slice) in decoded.into_iter().enumerate() {
        let (rows, columns, pixels) = slice?;
        let spacing = ASSUMED_FIELD_MM / f64::from(rows.max(columns).max(1));
        let slice = SliceGeometry {
            rows,
            columns,
            pixel_spacing_mm: [spacing; 2],
            position_mm: [0.0, 0.0, k as f64 * step],
            row_cosines: [1.0, 0.0, 0.0],
            column_cosines: [0.0, 1.0, 0.0],
        };
        slice.validate()?;
        if geometry.first().is_some_and(|first: &SliceGeometry| !first.same_stack(&slice)) {
            return Err(Refusal::new(Reason::InconsistentGeometry, "expected image slices of one size, got several"));
        }
        geometry.push(slice);
        hu.push(pixels);
    }
    let mut notes = vec!["image slices state no geometry: field and length are assumed, order is by name".to_owned()];
    if matches!(grey, Grey::Windowed { .. }) {
        notes.push("image slices state no HU: grey values are taken as windowed".to_owned());
    }
    Ok(Loaded { geometry, hu, notes })
}

fn decode(path: &std::path::Path, grey: Grey) -> Result<Slice, Refusal> {
    let mut reader = image::ImageReader::open(path)
        .and_then(image::ImageReader::with_guessed_format)
        .map_err(|e| undecodable(format!("open an image slice: {e}")))?;
    let mut bounds = image::Limits::default();
    bounds.max_image_width = Some(MAX_SIDE);
    bounds.max_image_height = Some(MAX_SIDE);
    reader.limits(bounds);
    let picture = reader.decode().map_err(|e| undecodable(format!("decode an image slice: {e}")))?;
    let (rows, columns) = (picture.height(), picture.width());
    let hu = match grey {
        Grey::Windowed { black_hu, width_hu } => {
            let luma = picture.into_luma16();
            luma.as_raw().iter().map(|&v| to_hu(black_hu + f32::from(v) / 65535.0 * width_hu)).collect()
        }
        Grey::Numbers { slope, offset_hu } => {
            let scaled = |v: f32| to_hu(slope * v + offset_hu);
            match &picture {
                image::DynamicImage::ImageLuma8(p) => p.as_raw().iter().map(|&v| scaled(f32::from(v))).collect(),
                image::DynamicImage::ImageLuma16(p) => p.as_raw().iter().map(|&v| scaled(f32::from(v))).collect(),
                other => {
                    let detail = format!("expected grey values of 8 or 16 bits, got {:?}", other.color());
                    return Err(undecodable(detail));
                }
            }
        }
    };
    Ok((rows, columns, hu))
}
