//! Judging files without the daemon: `darnet infer`.
//!
//! Input: DICOM files or folders, NIfTI and MetaImage files, folders of image slices. Output: one
//! [`Judgement`] a series, in a fixed order. The decisions and the arithmetic are those of the daemon
//! ([`crate::scan::select`], [`super::workers::Judge`]), so the scores of a series are the same to the bit whichever
//! way it came.
//!
//! A file that cannot be read becomes part of a series without result; nothing is passed over in silence.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::engine::CancelToken;
use crate::pipeline::jobs::Judged;
use crate::pipeline::planes::SlicePlane;
use crate::pipeline::workers::{Judge, VolumeToJudge};
use crate::scan::dicom::{self, SliceFile};
use crate::scan::pictures::{self, Grey};
use crate::scan::{Loaded, Scan, meta_image, natural_key, nifti};
use crate::telemetry::{StudyHash, StudyHasher};
use crate::volume::geometry::{GeometryLimits, Stack};
use crate::volume::refusal::{Reason, Refusal};

/// Files below the paths given; beyond it the run stops with an error. A whole-body study has some 10,000.
pub const MAX_FILES: usize = 200_000;
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
    #[error("expected DICOM, NIfTI, MetaImage or image files below the paths given, found none")]
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
    /// Whether it is in HU; pictures are taken as windowed like the network's input.
    pub in_hu: bool,
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
    Dicom(Vec<SliceFile>),
    Unreadable { files: usize, detail: String },
    Nifti(PathBuf),
    MetaImage(PathBuf),
    Pictures(Vec<PathBuf>),
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
    let sources = sources(paths, hasher)?;
    let total = sources.len();
    let mut judgements = Vec::with_capacity(total);
    for (n, (series, source)) in sources.into_iter().enumerate() {
        progress("series", n, total);
        judgements.push(judge_source(series, &source, judge, limits));
    }
    progress("series", total, total);
    Ok(judgements)
}

fn sources(paths: &[PathBuf], hasher: &StudyHasher) -> Result<Vec<(StudyHash, Source)>, OfflineError> {
    let mut dicom = Vec::new();
    let mut nifti = Vec::new();
    let mut meta = Vec::new();
    let mut images: BTreeMap<PathBuf, Vec<PathBuf>> = BTreeMap::new();
    let mut found = 0usize;
    let mut pending: Vec<PathBuf> = paths.to_vec();
    while let Some(path) = pending.pop() {
        let kind = std::fs::metadata(&path).map_err(|source| OfflineError::Path { path: path.clone(), source })?;
        if kind.is_dir() {
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
        } else if name.ends_with(".mha") || name.ends_with(".mhd") {
            meta.push(path);
        } else if name.ends_with(".raw") || name.ends_with(".zraw") {
            // The voxels of a .mhd.
        } else if [".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"].iter().any(|e| name.ends_with(e)) {
            images.entry(path.parent().map(Path::to_path_buf).unwrap_or_default()).or_default().push(path);
        } else if name != "dicomdir" {
            dicom.push(path);
        }
    }
    if dicom.is_empty() && nifti.is_empty() && meta.is_empty() && images.is_empty() {
        return Err(OfflineError::Nothing);
    }
    dicom.sort();
    nifti.sort();
    meta.sort();
    let mut out = dicom_sources(dicom, hasher);
    for path in nifti {
        out.push((hasher.hash(&path.to_string_lossy()), Source::Nifti(path)));
    }
    for path in meta {
        out.push((hasher.hash(&path.to_string_lossy()), Source::MetaImage(path)));
    }
    for (folder, mut files) in images {
        files.sort_by_key(|f| natural_key(f));
        out.push((hasher.hash(&folder.to_string_lossy()), Source::Pictures(files)));
    }
    Ok(out)
}

fn dicom_sources(files: Vec<PathBuf>, hasher: &StudyHasher) -> Vec<(StudyHash, Source)> {
    let grouped = dicom::group(files);
    let mut out: Vec<(StudyHash, Source)> =
        grouped.series.into_iter().map(|(uid, files)| (hasher.hash(&uid), Source::Dicom(files))).collect();
    for (folder, (files, detail)) in grouped.unreadable {
        let key = format!("unreadable files in {}", folder.display());
        out.push((hasher.hash(&key), Source::Unreadable { files, detail }));
    }
    out
}

fn judge_source(series: StudyHash, source: &Source, judge: &mut Judge, limits: &GeometryLimits) -> Judgement {
    let started = Instant::now();
    let (slices, loaded) = match source {
        Source::Dicom(files) => (dicom::distinct(files), dicom::load(files, limits).map(Ok)),
        Source::Unreadable { files, detail } => {
            (*files, Err(Refusal::new(Reason::Undecodable, format!("{files} files: {detail}"))))
        }
        Source::Nifti(path) => of_file(nifti::load(path, limits), limits),
        Source::MetaImage(path) => of_file(meta_image::load(path, limits), limits),
        Source::Pictures(files) => {
            let p = judge.preprocessing();
            of_file(pictures::load(files, Grey::as_input(p), p.slice_direction, limits), limits)
        }
    };
    let decode_s = started.elapsed().as_secs_f64();
    let started = Instant::now();
    let (result, notes) = match loaded {
        Err(refusal) => (Err(refusal), Vec::new()),
        Ok(Err((refusal, notes))) => (Err(refusal), notes),
        Ok(Ok(mut scan)) => {
            let notes = std::mem::take(&mut scan.notes);
            (judge_scan(judge, scan), notes)
        }
    };
    let in_hu = !matches!(source, Source::Pictures(_));
    Judgement { series, result, slices, in_hu, notes, decode_s, resample_s: started.elapsed().as_secs_f64() }
}

/// A file's slices, ordered; what it says of itself is kept when they make no volume.
type Opened = Result<Result<Scan, (Refusal, Vec<String>)>, Refusal>;

fn of_file(loaded: Result<Loaded, Refusal>, limits: &GeometryLimits) -> (usize, Opened) {
    match loaded {
        Err(refusal) => (0, Err(refusal)),
        Ok(loaded) => {
            let (slices, notes) = (loaded.hu.len(), loaded.notes.clone());
            (slices, Ok(loaded.into_scan(limits).map_err(|refusal| (refusal, notes))))
        }
    }
}

fn judge_scan(judge: &mut Judge, scan: Scan) -> Result<Box<JudgedSeries>, Refusal> {
    let lung = scan.lung();
    let slices: Vec<&[i16]> = scan.hu.iter().map(Vec::as_slice).collect();
    let planes: Vec<Option<SlicePlane>> = vec![None; slices.len()];
    let cancel = CancelToken::new();
    let volume = VolumeToJudge { stack: &scan.stack, hu: &slices, planes: &planes, lung: &lung, cancel: &cancel };
    let judged = judge.judge(&volume)?.ok_or_else(|| Refusal::new(Reason::Internal, "the run was cancelled"))?;
    Ok(Box::new(JudgedSeries { judged, stack: scan.stack, hu: scan.hu }))
}
