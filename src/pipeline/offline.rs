//! Judging files without the daemon: `darnet infer`.
//!
//! Input: DICOM files or folders, NIfTI files, folders of image slices, or a prepared tensor. Output: one
//! [`Judgement`] a series, in a fixed order. The decisions and the arithmetic are those of the daemon
//! ([`super::series::select`], [`super::workers::Judge`]), so the scores of a series are the same to the bit whichever
//! way it came.
//!
//! A file that cannot be read becomes part of a series without result; nothing is passed over in silence.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use rayon::prelude::*;

use crate::dicom::decode::PixelDecoder;
use crate::dicom::header::{self, ObjectClass, SliceHeader};
use crate::dicom::part10::read_part10;
use crate::engine::CancelToken;
use crate::pipeline::jobs::Judged;
use crate::pipeline::series::{SliceFacts, facts, select};
use crate::pipeline::workers::{Judge, VolumeToJudge};
use crate::resample::lung::{LungCheck, SliceLung};
use crate::telemetry::{StudyHash, StudyHasher};
use crate::volume::geometry::{GeometryLimits, SliceGeometry, Stack, build_stack};
use crate::volume::refusal::{Reason, Refusal};

/// Bytes one file may have: a 2048-frame 512 x 512 object is 1 GiB.
pub const MAX_FILE_BYTES: u64 = 1 << 30;
/// Files below the paths given; beyond it the run stops with an error. A whole-body study has some 10,000.
pub const MAX_FILES: usize = 200_000;
/// In-plane field assumed for image slices that state no geometry, millimetres.
pub const ASSUMED_FIELD_MM: f64 = 350.0;
/// Length assumed for image slices that state no geometry, millimetres: a chest.
pub const ASSUMED_LENGTH_MM: f64 = 300.0;

/// What stops a whole run (a bad series never does).
#[derive(Debug, thiserror::Error)]
pub enum OfflineError {
    /// A path given does not exist or cannot be listed.
    #[error("read {path}: {source}")]
    Path {
        /// The path as given by the user.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// More files than [`MAX_FILES`].
    #[error("expected at most {MAX_FILES} files below the paths given, got more; name a narrower folder")]
    TooManyFiles,
    /// There is no file at all.
    #[error("expected DICOM, NIfTI or image files below the paths given, found none")]
    Nothing,
}

/// What became of one series.
#[derive(Debug)]
pub struct Judgement {
    /// Hash of the SeriesInstanceUID, or of the file's name.
    pub series: StudyHash,
    /// The judged volume, or why there is none.
    pub result: Result<Box<JudgedSeries>, Refusal>,
    /// Objects (files, or slices of a NIfTI file).
    pub slices: usize,
    /// What a reader of the result should know.
    pub notes: Vec<String>,
    /// Seconds of reading and decoding.
    pub decode_s: f64,
    /// Seconds of the lung check and gathering.
    pub resample_s: f64,
}

/// A judged series with its pixels.
#[derive(Debug)]
pub struct JudgedSeries {
    /// Scores, map, plans.
    pub judged: Judged,
    /// Geometry.
    pub stack: Stack,
    /// HU, feet first.
    pub hu: Vec<Vec<i16>>,
}

/// A source of one series.
#[derive(Clone, Debug)]
enum Source {
    Dicom { files: Vec<(PathBuf, Arc<SliceHeader>)> },
    Unreadable { files: usize, detail: String },
    Nifti(PathBuf),
    Images(Vec<PathBuf>),
}

/// Judges everything below `paths`. `progress` hears the name of a step, how much is done, and of how much.
///
/// # Errors
/// [`OfflineError`]: a path that does not exist, too many files, no file.
pub fn judge_paths(
    paths: &[PathBuf],
    judge: &mut Judge,
    limits: &GeometryLimits,
    hasher: &StudyHasher,
    progress: &mut dyn FnMut(&'static str, usize, usize),
) -> Result<Vec<Judgement>, OfflineError> {
    let sources = sources(paths, hasher, limits)?;
    let total = sources.len();
    let mut judgements = Vec::with_capacity(total);
    for (n, (series, source)) in sources.into_iter().enumerate() {
        progress("series", n, total);
        judgements.push(judge_source(series, &source, judge, limits));
    }
    progress("series", total, total);
    Ok(judgements)
}

fn sources(
    paths: &[PathBuf],
    hasher: &StudyHasher,
    limits: &GeometryLimits,
) -> Result<Vec<(StudyHash, Source)>, OfflineError> {
    let mut dicom = Vec::new();
    let mut nifti = Vec::new();
    let mut images: BTreeMap<PathBuf, Vec<PathBuf>> = BTreeMap::new();
    let mut found = 0usize;
    let mut pending: Vec<PathBuf> = paths.to_vec();
    while let Some(path) = pending.pop() {
        let meta = std::fs::metadata(&path).map_err(|source| OfflineError::Path { path: path.clone(), source })?;
        if meta.is_dir() {
            let entries =
                std::fs::read_dir(&path).map_err(|source| OfflineError::Path { path: path.clone(), source })?;
            for entry in entries {
                let entry = entry.map_err(|source| OfflineError::Path { path: path.clone(), source })?;
                pending.push(entry.path());
            }
            continue;
        }
        found += 1;
        if found > MAX_FILES {
            return Err(OfflineError::TooManyFiles);
        }
        let name = path.file_name().map(|n| n.to_string_lossy().to_lowercase()).unwrap_or_default();
        if name.ends_with(".nii") || name.ends_with(".nii.gz") {
            nifti.push(path);
        } else if [".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"].iter().any(|e| name.ends_with(e)) {
            images.entry(path.parent().map(Path::to_path_buf).unwrap_or_default()).or_default().push(path);
        } else if name != "dicomdir" {
            dicom.push(path);
        }
    }
    if dicom.is_empty() && nifti.is_empty() && images.is_empty() {
        return Err(OfflineError::Nothing);
    }
    dicom.sort();
    nifti.sort();
    let mut out = dicom_sources(dicom, hasher, limits);
    for path in nifti {
        out.push((hasher.hash(&path.to_string_lossy()), Source::Nifti(path)));
    }
    for (folder, mut files) in images {
        files.sort_by_key(|f| natural_key(f));
        out.push((hasher.hash(&folder.to_string_lossy()), Source::Images(files)));
    }
    Ok(out)
}

/// Numbers inside a name compare as numbers: slice 9 before slice 10.
fn natural_key(path: &Path) -> Vec<(u64, String)> {
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

fn dicom_sources(files: Vec<PathBuf>, hasher: &StudyHasher, limits: &GeometryLimits) -> Vec<(StudyHash, Source)> {
    let headers: Vec<(PathBuf, Result<SliceHeader, String>)> = files
        .into_par_iter()
        .map(|path| {
            let header = read_part10(&path, MAX_FILE_BYTES).map_err(|e| e.to_string()).and_then(|file| {
                header::parse_header(&file.bytes[file.dataset_offset..], &file.transfer_syntax_uid)
                    .map_err(|e| e.to_string())
            });
            (path, header)
        })
        .collect();
    let mut series: BTreeMap<String, Vec<(PathBuf, Arc<SliceHeader>)>> = BTreeMap::new();
    let mut unreadable: BTreeMap<PathBuf, (usize, String)> = BTreeMap::new();
    for (path, header) in headers {
        match header {
            Ok(header) if header::object_class(&header) == ObjectClass::Ignored => {}
            Ok(header) => series.entry(header.series_instance_uid.clone()).or_default().push((path, Arc::new(header))),
            Err(detail) => {
                let folder = path.parent().map(Path::to_path_buf).unwrap_or_default();
                unreadable.entry(folder).or_insert((0, detail)).0 += 1;
            }
        }
    }
    let mut out = Vec::new();
    for (uid, files) in series {
        let hash = hasher.hash(&uid);
        if files.len() > limits.max_slices {
            let detail = format!("expected at most {} slices, got {}", limits.max_slices, files.len());
            out.push((hash, Source::Unreadable { files: files.len(), detail }));
        } else {
            out.push((hash, Source::Dicom { files }));
        }
    }
    for (folder, (files, detail)) in unreadable {
        let key = format!("unreadable files in {}", folder.display());
        out.push((hasher.hash(&key), Source::Unreadable { files, detail }));
    }
    out
}

fn judge_source(series: StudyHash, source: &Source, judge: &mut Judge, limits: &GeometryLimits) -> Judgement {
    match source {
        Source::Dicom { files } => judge_dicom(series, files, judge, limits),
        Source::Unreadable { files, detail } => {
            let reason = if *files > limits.max_slices { Reason::TooManySlices } else { Reason::Undecodable };
            let detail =
                if reason == Reason::TooManySlices { detail.clone() } else { format!("{files} files: {detail}") };
            Judgement {
                series,
                result: Err(Refusal::new(reason, detail)),
                slices: *files,
                notes: Vec::new(),
                decode_s: 0.0,
                resample_s: 0.0,
            }
        }
        Source::Nifti(path) => judge_loaded(series, || load_nifti(path, limits), judge, limits),
        Source::Images(files) => {
            let preprocessing = judge.preprocessing().clone();
            judge_loaded(series, || load_images(files, &preprocessing, limits), judge, limits)
        }
    }
}

fn judge_dicom(
    series: StudyHash,
    files: &[(PathBuf, Arc<SliceHeader>)],
    judge: &mut Judge,
    limits: &GeometryLimits,
) -> Judgement {
    let started = Instant::now();
    // The same object twice: identical bytes change nothing, other pixels are a conflict.
    let mut by_uid: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (i, (_, header)) in files.iter().enumerate() {
        by_uid.entry(&header.sop_instance_uid).or_default().push(i);
    }
    let decoded: Vec<(Option<Refusal>, Vec<i16>)> = files
        .par_iter()
        .map_init(PixelDecoder::new, |decoder, (path, header)| match decode_file(decoder, path, header, limits) {
            Ok(hu) => (None, hu),
            Err(refusal) => (Some(refusal), Vec::new()),
        })
        .collect();
    let decode_s = started.elapsed().as_secs_f64();
    let slices = by_uid.len();
    let done =
        |result, notes, resample_s| Judgement { series: series.clone(), result, slices, notes, decode_s, resample_s };
    let mut distinct = Vec::with_capacity(slices);
    for copies in by_uid.values() {
        let first = copies[0];
        let differs = |&c: &usize| decoded[c].1 != decoded[first].1 || !files[c].1.same_object(&files[first].1);
        if copies.iter().any(differs) {
            let detail = "one SOPInstanceUID has files with different pixels; keep one of them";
            return done(Err(Refusal::new(Reason::DuplicateConflict, detail)), Vec::new(), 0.0);
        }
        distinct.push(first);
    }
    let found: Vec<SliceFacts> = distinct
        .iter()
        .map(|&i| SliceFacts { header: Arc::clone(&files[i].1), refusal: decoded[i].0.clone() })
        .collect();
    let selection = match select(&found, limits) {
        Ok(selection) => selection,
        Err(refusal) => return done(Err(refusal), Vec::new(), 0.0),
    };
    let mut decoded = decoded;
    let hu: Vec<Vec<i16>> = selection.ordered.iter().map(|&k| std::mem::take(&mut decoded[distinct[k]].1)).collect();
    let spacing = |k: &usize| {
        let geometry = files[distinct[*k]].1.geometry.as_ref();
        geometry.map_or(selection.stack.pixel_spacing_mm, |g| g.pixel_spacing_mm)
    };
    let spacings: Vec<[f64; 2]> = selection.ordered.iter().map(spacing).collect();
    drop(decoded);
    let started = Instant::now();
    let result = judge_stack(judge, selection.stack, hu, &spacings);
    done(result, selection.notes, started.elapsed().as_secs_f64())
}

fn decode_file(
    decoder: &mut PixelDecoder,
    path: &Path,
    header: &Arc<SliceHeader>,
    limits: &GeometryLimits,
) -> Result<Vec<i16>, Refusal> {
    if let Some(refusal) = facts(header, limits).refusal {
        return Err(refusal);
    }
    let geometry = header.geometry.as_ref().map_err(Clone::clone)?;
    let file = read_part10(path, MAX_FILE_BYTES).map_err(|e| Refusal::new(Reason::Undecodable, e.to_string()))?;
    let mut hu = vec![0i16; geometry.rows as usize * geometry.columns as usize];
    decoder.decode_hu(&file.bytes[file.dataset_offset..], &file.transfer_syntax_uid, header, &mut hu)?;
    Ok(hu)
}

/// `spacings` is PixelSpacing of each slice: within the tolerance of one grid, but the lung check takes it as stated.
fn judge_stack(
    judge: &mut Judge,
    stack: Stack,
    hu: Vec<Vec<i16>>,
    spacings: &[[f64; 2]],
) -> Result<Box<JudgedSeries>, Refusal> {
    let lung: Vec<SliceLung> = hu
        .par_iter()
        .zip(spacings)
        .map_init(
            || LungCheck::new(stack.rows, stack.columns),
            |check, (slice, spacing)| check.slice_stats(slice, *spacing),
        )
        .collect();
    let slices: Vec<&[i16]> = hu.iter().map(Vec::as_slice).collect();
    let planes = vec![None; slices.len()];
    let cancel = CancelToken::new();
    let volume = VolumeToJudge { stack: &stack, hu: &slices, planes: &planes, lung: &lung, cancel: &cancel };
    let judged = judge.judge(&volume)?.ok_or_else(|| Refusal::new(Reason::Internal, "the run was cancelled"))?;
    Ok(Box::new(JudgedSeries { judged, stack, hu }))
}

struct Loaded {
    geometry: Vec<SliceGeometry>,
    hu: Vec<Vec<i16>>,
    notes: Vec<String>,
}

fn judge_loaded(
    series: StudyHash,
    load: impl FnOnce() -> Result<Loaded, Refusal>,
    judge: &mut Judge,
    limits: &GeometryLimits,
) -> Judgement {
    let started = Instant::now();
    let loaded = load();
    let decode_s = started.elapsed().as_secs_f64();
    let started = Instant::now();
    let (result, slices, notes) = match loaded {
        Err(refusal) => (Err(refusal), 0, Vec::new()),
        Ok(loaded) => {
            let slices = loaded.hu.len();
            let mut pixels: Vec<Option<Vec<i16>>> = loaded.hu.into_iter().map(Some).collect();
            let result = build_stack(&loaded.geometry, limits).and_then(|stack| {
                let hu = stack.order.iter().map(|&k| pixels[k as usize].take().unwrap_or_default()).collect();
                let spacings = vec![stack.pixel_spacing_mm; stack.order.len()];
                judge_stack(judge, stack, hu, &spacings)
            });
            (result, slices, loaded.notes)
        }
    };
    Judgement { series, result, slices, notes, decode_s, resample_s: started.elapsed().as_secs_f64() }
}

/// Rows, columns and HU of an image slice.
type Grey = (u32, u32, Vec<i16>);

fn undecodable(detail: impl std::fmt::Display) -> Refusal {
    Refusal::new(Reason::Undecodable, detail.to_string())
}

/// NIfTI: RAS affine to LPS slices; HU are the scaled values, rounded and saturated.
fn load_nifti(path: &Path, limits: &GeometryLimits) -> Result<Loaded, Refusal> {
    use nifti::{IntoNdArray, NiftiObject, NiftiVolume, ReaderOptions};

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
    let origin = column(3);
    let length = |v: [f64; 3]| v.iter().map(|x| x * x).sum::<f64>().sqrt();
    let axes: Vec<([f64; 3], f64)> = (0..3)
        .map(|a| {
            let v = column(a);
            let l = length(v);
            (v.map(|x| x / l), l)
        })
        .collect();
    let depth_axis = (0..3)
        .max_by(|&a, &b| axes[a].0[2].abs().total_cmp(&axes[b].0[2].abs()))
        .ok_or_else(|| undecodable("the affine has no axis"))?;
    let (column_axis, row_axis) = match depth_axis {
        0 => (1, 2),
        1 => (0, 2),
        _ => (0, 1),
    };
    let (rows, columns, count) = (dims[row_axis], dims[column_axis], dims[depth_axis]);
    if count > limits.max_slices {
        let detail = format!("expected at most {} slices, got {count}", limits.max_slices);
        return Err(Refusal::new(Reason::TooManySlices, detail));
    }
    let mut geometry = Vec::with_capacity(count);
    let mut hu = Vec::with_capacity(count);
    for k in 0..count {
        let step = axes[depth_axis];
        let at = k as f64 * step.1;
        let slice = SliceGeometry {
            rows: u32::try_from(rows).map_err(undecodable)?,
            columns: u32::try_from(columns).map_err(undecodable)?,
            pixel_spacing_mm: [axes[row_axis].1, axes[column_axis].1],
            position_mm: std::array::from_fn(|i| origin[i] + at * step.0[i]),
            row_cosines: axes[column_axis].0,
            column_cosines: axes[row_axis].0,
        };
        slice.validate()?;
        geometry.push(slice);
        let mut pixels = Vec::with_capacity(rows * columns);
        let mut index = vec![0usize; dims.len()];
        index[depth_axis] = k;
        for r in 0..rows {
            index[row_axis] = r;
            for c in 0..columns {
                index[column_axis] = c;
                pixels.push(to_hu(volume[index.as_slice()]));
            }
        }
        hu.push(pixels);
    }
    Ok(Loaded { geometry, hu, notes: vec!["NIfTI: voxel values are taken as HU".to_owned()] })
}

fn to_hu(value: f32) -> i16 {
    // `as` saturates; a value that is no number becomes air rather than water.
    if value.is_nan() { -1024 } else { value.round() as i16 }
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

/// Image slices: grey values are taken as already windowed with the model's window, plane 0 is the first name.
fn load_images(
    files: &[PathBuf],
    preprocessing: &crate::model::manifest::Preprocessing,
    limits: &GeometryLimits,
) -> Result<Loaded, Refusal> {
    use crate::model::manifest::SliceDirection;

    if files.len() > limits.max_slices {
        let detail = format!("expected at most {} slices, got {}", limits.max_slices, files.len());
        return Err(Refusal::new(Reason::TooManySlices, detail));
    }
    let low = preprocessing.window_center_hu - preprocessing.window_width_hu / 2.0;
    let width = preprocessing.window_width_hu;
    let decoded: Vec<Result<Grey, Refusal>> = files
        .par_iter()
        .map(|path| {
            let mut reader = image::ImageReader::open(path)
                .and_then(image::ImageReader::with_guessed_format)
                .map_err(|e| undecodable(format!("open an image slice: {e}")))?;
            let mut bounds = image::Limits::default();
            bounds.max_image_width = Some(4096);
            bounds.max_image_height = Some(4096);
            reader.limits(bounds);
            let grey = reader.decode().map_err(|e| undecodable(format!("decode an image slice: {e}")))?.into_luma16();
            let hu = grey.as_raw().iter().map(|&v| to_hu(low + f32::from(v) / 65535.0 * width)).collect();
            Ok((grey.height(), grey.width(), hu))
        })
        .collect();
    let sign = match preprocessing.slice_direction {
        SliceDirection::FeetToHead => 1.0,
        SliceDirection::HeadToFeet => -1.0,
    };
    let step = sign * ASSUMED_LENGTH_MM / files.len() as f64;
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
    let notes = vec![
        "image slices state no geometry: field and length are assumed, order is by name".to_owned(),
        "image slices state no HU: grey values are taken as windowed with the model's window".to_owned(),
    ];
    Ok(Loaded { geometry, hu, notes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_names_sort_as_numbers() {
        let mut names: Vec<PathBuf> = ["im10.png", "im9.png", "im1.png"].iter().map(PathBuf::from).collect();
        names.sort_by_key(|p| natural_key(p));
        assert_eq!(names, ["im1.png", "im9.png", "im10.png"].map(PathBuf::from));
    }
}
