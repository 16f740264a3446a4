//! Phantoms as NIfTI and PNG files, and whole cases with their masks.
//!
//! A case is a folder `<class>-<seed, 16 hexadecimal digits>`:
//!
//! | format | image | lesions | lungs |
//! |---|---|---|---|
//! | `dicom` | `dicom/NNNN.dcm` | `lesion.nii.gz` | `lung.nii.gz` |
//! | `nifti` | `ct.nii.gz` | `lesion.nii.gz` | `lung.nii.gz` |
//! | `png` | `png/NNNN.png` | `lesion/NNNN.png` | `lung/NNNN.png` |
//!
//! and `spec.json` beside them. PNG files count from the feet; their pixels are HU in the window
//! [`PNG_WINDOW_CENTER_HU`], [`PNG_WINDOW_WIDTH_HU`] as 0 to 255; masks hold the labels themselves.

use super::math::hash_all;
use super::{
    DicomOptions, Phantom, PhantomClass, PhantomError, PhantomSpec, create_dir, generate, text_enum, write_dicom,
};
use flate2::Compression;
use flate2::write::GzEncoder;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// Centre of the window of PNG slices.
pub const PNG_WINDOW_CENTER_HU: f64 = -600.0;
/// Width of the window of PNG slices.
pub const PNG_WINDOW_WIDTH_HU: f64 = 1500.0;

/// The voxel-to-world matrix in NIfTI's coordinates (x to the patient's right is negative: RAS), for indices
/// `(column, row, slice)`. With a tilted gantry the axes are not orthogonal.
pub fn affine_ras(phantom: &Phantom) -> [[f64; 4]; 3] {
    let origin = phantom.position_mm(0);
    let frame = super::scene::Frame::new(&phantom.spec, &phantom.acquisition);
    let pitch = phantom.spec.pixel_spacing_mm;
    let mut out = [[0.0; 4]; 3];
    for (axis, row) in out.iter_mut().enumerate() {
        // LPS to RAS.
        let sign = if axis < 2 { -1.0 } else { 1.0 };
        let column = if axis == 0 { pitch } else { 0.0 };
        *row = [sign * column, sign * pitch * frame.down[axis], sign * frame.step[axis], sign * origin[axis]];
    }
    out
}

/// Writes a NIfTI-1 file, gzip-compressed: 348 header bytes, 4 bytes "no extension", voxels with x fastest.
fn nifti(
    phantom: &Phantom,
    path: &Path,
    datatype: i16,
    bits: i16,
    voxels: impl Iterator<Item = u8>,
) -> Result<(), PhantomError> {
    let spec = &phantom.spec;
    let mut h = [0u8; 352];
    let mut put = |at: usize, bytes: &[u8]| h[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &348i32.to_le_bytes());
    let dims = [3, spec.columns as i16, spec.rows as i16, spec.slices as i16, 1, 1, 1, 1];
    for (i, d) in dims.iter().enumerate() {
        put(40 + 2 * i, &d.to_le_bytes());
    }
    put(70, &datatype.to_le_bytes());
    put(72, &bits.to_le_bytes());
    let pitch = spec.pixel_spacing_mm as f32;
    for (i, d) in [1.0f32, pitch, pitch, spec.spacing_mm as f32].iter().enumerate() {
        put(76 + 4 * i, &d.to_le_bytes());
    }
    put(108, &352.0f32.to_le_bytes());
    put(112, &1.0f32.to_le_bytes());
    // xyzt_units: millimetres and seconds.
    put(123, &[2 | 8]);
    put(148, b"darnet phantom");
    // qform_code 0 (not given), sform_code 1 (scanner).
    put(254, &1i16.to_le_bytes());
    for (r, row) in affine_ras(phantom).iter().enumerate() {
        for (c, v) in row.iter().enumerate() {
            put(280 + 16 * r + 4 * c, &(*v as f32).to_le_bytes());
        }
    }
    put(344, b"n+1\0");
    let file = File::create(path).map_err(PhantomError::write("NIfTI file"))?;
    let mut out = GzEncoder::new(BufWriter::new(file), Compression::fast());
    let write = |out: &mut GzEncoder<BufWriter<File>>, bytes: &[u8]| {
        out.write_all(bytes).map_err(PhantomError::write("NIfTI file"))
    };
    write(&mut out, &h)?;
    let mut block = Vec::with_capacity(1 << 16);
    for byte in voxels {
        block.push(byte);
        if block.len() == 1 << 16 {
            write(&mut out, &block)?;
            block.clear();
        }
    }
    write(&mut out, &block)?;
    out.finish().and_then(|mut file| file.flush()).map_err(PhantomError::write("NIfTI file"))
}

/// Writes the HU as `.nii.gz` (16-bit signed).
pub fn write_nifti(phantom: &Phantom, path: &Path) -> Result<(), PhantomError> {
    nifti(phantom, path, 4, 16, phantom.hu.iter().flat_map(|v| v.to_le_bytes()))
}

/// Writes a mask of the phantom's shape (its `lesion` or `lung`) as `.nii.gz` (8-bit unsigned).
///
/// # Panics
/// If `mask` has another length than the phantom.
pub fn write_nifti_mask(phantom: &Phantom, mask: &[u8], path: &Path) -> Result<(), PhantomError> {
    assert_eq!(mask.len(), phantom.spec.voxels(), "mask and phantom must have one shape");
    nifti(phantom, path, 2, 8, mask.iter().copied())
}

fn png(path: &Path, columns: usize, rows: usize, pixels: &[u8]) -> Result<(), PhantomError> {
    let what = "PNG file";
    let file = File::create(path).map_err(PhantomError::write(what))?;
    let mut encoder = png::Encoder::new(BufWriter::new(file), columns as u32, rows as u32);
    encoder.set_color(png::ColorType::Grayscale);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_compression(png::Compression::Fast);
    let as_io = |e: png::EncodingError| PhantomError::write(what)(std::io::Error::other(e));
    let mut writer = encoder.write_header().map_err(as_io)?;
    writer.write_image_data(pixels).map_err(as_io)?;
    writer.finish().map_err(as_io)
}

fn png_stack(
    phantom: &Phantom,
    dir: &Path,
    slice: impl Fn(usize) -> Vec<u8> + Sync,
) -> Result<Vec<PathBuf>, PhantomError> {
    let dir = create_dir(dir)?;
    let spec = &phantom.spec;
    (0..spec.slices)
        .into_par_iter()
        .map(|k| {
            let path = dir.join(format!("{k:04}.png"));
            png(&path, spec.columns, spec.rows, &slice(k)).map(|()| path)
        })
        .collect()
}

/// Writes every slice as `NNNN.png` (8-bit grey, counted from the feet) in the window of the given centre and width.
pub fn write_png(phantom: &Phantom, dir: &Path, center_hu: f64, width_hu: f64) -> Result<Vec<PathBuf>, PhantomError> {
    let low = center_hu - 0.5 * width_hu;
    let gain = 255.0 / width_hu.max(1.0);
    png_stack(phantom, dir, |k| {
        phantom.slice(k).iter().map(|&v| ((f64::from(v) - low) * gain + 0.5).clamp(0.0, 255.0) as u8).collect()
    })
}

/// Writes every slice of a mask as `NNNN.png` whose pixels are the labels.
///
/// # Panics
/// If `mask` has another length than the phantom.
pub fn write_png_mask(phantom: &Phantom, mask: &[u8], dir: &Path) -> Result<Vec<PathBuf>, PhantomError> {
    assert_eq!(mask.len(), phantom.spec.voxels(), "mask and phantom must have one shape");
    let n = phantom.spec.slice_len();
    png_stack(phantom, dir, |k| mask[k * n..(k + 1) * n].to_vec())
}

text_enum! {
    /// File format of a case.
    Format, "format" {
        /// DICOM series.
        Dicom => "dicom",
        /// NIfTI-1, compressed.
        Nifti => "nifti",
        /// 8-bit slices.
        Png => "png",
    }
}

/// A set of phantoms to write.
#[derive(Clone, Debug)]
pub struct WriteRequest {
    /// Folder that gets one folder a case; created if absent.
    pub out: PathBuf,
    /// Disease of all cases.
    pub class: PhantomClass,
    /// Number of cases.
    pub count: usize,
    /// Seed of the set; case `i` has a seed derived from it and `i`.
    pub seed: u64,
    /// File format.
    pub format: Format,
    /// Slices, rows, columns; `None` for what the random spec says.
    pub shape: Option<[usize; 3]>,
    /// For DICOM: how the series are written.
    pub dicom: DicomOptions,
    /// For DICOM: also the thick soft and the thin sharp reconstruction of each patient (`dicom`, `dicom-2`, …).
    pub variants: bool,
}

impl WriteRequest {
    /// A request with the default DICOM options and random shapes.
    pub fn new(out: impl Into<PathBuf>, class: PhantomClass, count: usize, seed: u64, format: Format) -> Self {
        Self {
            out: out.into(),
            class,
            count,
            seed,
            format,
            shape: None,
            dicom: DicomOptions::default(),
            variants: false,
        }
    }

    /// The spec of case `index`. Case 0 has the request's own seed.
    pub fn spec(&self, index: usize) -> PhantomSpec {
        let seed = if index == 0 { self.seed } else { hash_all(&[self.seed, index as u64]) };
        let spec = PhantomSpec::random(self.class, seed);
        match self.shape {
            Some([d, h, w]) => spec.with_shape(d, h, w),
            None => spec,
        }
    }
}

/// One case as written.
#[derive(Clone, Debug)]
pub struct Case {
    /// The case's folder.
    pub dir: PathBuf,
    /// Where the image is: a folder for DICOM and PNG, a file for NIfTI.
    pub image: PathBuf,
    /// The lesion mask: a folder for PNG, else a file.
    pub lesion: PathBuf,
    /// What was generated.
    pub spec: PhantomSpec,
}

/// Progress of [`write_cases`], after each case.
#[derive(Clone, Copy, Debug)]
pub struct CaseProgress {
    /// Cases written.
    pub done: usize,
    /// Cases in all.
    pub total: usize,
    /// Slices of the case just written.
    pub slices: usize,
}

/// Writes the cases of a request, one after the other (each uses all threads). Existing files are overwritten.
pub fn write_cases(request: &WriteRequest, progress: &mut dyn FnMut(&CaseProgress)) -> Result<Vec<Case>, PhantomError> {
    if let Some([d, h, w]) = request.shape {
        let fits = (1..=super::MAX_SLICES).contains(&d)
            && (1..=super::MAX_SIDE).contains(&h)
            && (1..=super::MAX_SIDE).contains(&w);
        if !fits {
            return Err(PhantomError::Option {
                option: "shape",
                expected: "1 to 4096 slices of 1 to 1024 rows and columns",
                got: format!("{d}x{h}x{w}"),
            });
        }
    }
    let mut cases = Vec::new();
    for index in 0..request.count {
        let spec = request.spec(index);
        let dir = create_dir(&request.out.join(format!("{}-{:016x}", spec.class, spec.seed)))?;
        let phantom = match request.format {
            Format::Dicom => super::generate_acquired(&spec, &request.dicom.checked_acquisition()?),
            _ => generate(&spec),
        };
        let (image, lesion) = match request.format {
            Format::Png => {
                let (image, lesion) = (dir.join("png"), dir.join("lesion"));
                write_png(&phantom, &image, PNG_WINDOW_CENTER_HU, PNG_WINDOW_WIDTH_HU)?;
                write_png_mask(&phantom, &phantom.lesion, &lesion)?;
                write_png_mask(&phantom, &phantom.lung, &dir.join("lung"))?;
                (image, lesion)
            }
            format => {
                let lesion = dir.join("lesion.nii.gz");
                write_nifti_mask(&phantom, &phantom.lesion, &lesion)?;
                write_nifti_mask(&phantom, &phantom.lung, &dir.join("lung.nii.gz"))?;
                if format == Format::Nifti {
                    let image = dir.join("ct.nii.gz");
                    write_nifti(&phantom, &image)?;
                    (image, lesion)
                } else {
                    let image = dir.join("dicom");
                    write_dicom(&phantom, &image, &request.dicom)?;
                    if request.variants {
                        write_variants(&phantom, &dir, &request.dicom)?;
                    }
                    (image, lesion)
                }
            }
        };
        let text = serde_json::to_string_pretty(&spec).map_err(|e| PhantomError::Encode(e.to_string()))?;
        std::fs::write(dir.join("spec.json"), text).map_err(PhantomError::write("spec.json"))?;
        progress(&CaseProgress { done: index + 1, total: request.count, slices: spec.slices });
        cases.push(Case { dir, image, lesion, spec });
    }
    Ok(cases)
}

fn write_variants(phantom: &Phantom, dir: &Path, options: &DicomOptions) -> Result<(), PhantomError> {
    for (i, spec) in super::series_variants(&phantom.spec).iter().enumerate().skip(1) {
        let other = super::generate_acquired(spec, &phantom.acquisition);
        let options = DicomOptions { series_number: options.series_number + i as u32, ..options.clone() };
        write_dicom(&other, &dir.join(format!("dicom-{}", i + 1)), &options)?;
    }
    Ok(())
}
