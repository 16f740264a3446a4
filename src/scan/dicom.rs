//! DICOM series from Part 10 files.
//!
//! Input: paths in any order. Output: the series they hold ([`group`]), then a [`Scan`] each ([`load`]). Deliberately
//! absent: a search for files, and any trust in file names.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;

use crate::dicom::decode::PixelDecoder;
use crate::dicom::header::{self, ObjectClass, SliceHeader};
use crate::dicom::part10::read_part10;
use crate::scan::select::{SliceFacts, facts, select};
use crate::scan::{MAX_FILE_BYTES, Scan};
use crate::volume::geometry::GeometryLimits;
use crate::volume::refusal::{Reason, Refusal};

/// A file and its header.
pub type SliceFile = (PathBuf, Arc<SliceHeader>);

/// What a set of files holds.
#[derive(Clone, Debug, Default)]
pub struct Grouped {
    /// Files of each series, by SeriesInstanceUID; each at least one.
    pub series: BTreeMap<String, Vec<SliceFile>>,
    /// Files that are no DICOM objects: folder, how many, and what was wrong with one of them.
    pub unreadable: BTreeMap<PathBuf, (usize, String)>,
}

/// Reads the headers. Objects of other kinds (reports, presentation states) are left out.
pub fn group(files: Vec<PathBuf>) -> Grouped {
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
    let mut grouped = Grouped::default();
    for (path, header) in headers {
        match header {
            Ok(header) if header::object_class(&header) == ObjectClass::Ignored => {}
            Ok(header) => {
                let uid = header.series_instance_uid.clone();
                grouped.series.entry(uid).or_default().push((path, Arc::new(header)));
            }
            Err(detail) => {
                let folder = path.parent().map(Path::to_path_buf).unwrap_or_default();
                grouped.unreadable.entry(folder).or_insert((0, detail)).0 += 1;
            }
        }
    }
    grouped
}

/// Distinct objects among the files of a series.
pub fn distinct(files: &[SliceFile]) -> usize {
    files.iter().map(|(_, h)| h.sop_instance_uid.as_str()).collect::<std::collections::BTreeSet<_>>().len()
}

/// Decodes one series.
///
/// # Errors
/// `too_many_slices`; `duplicate_conflict` when one SOPInstanceUID has files with different pixels; what [`select`]
/// refuses.
pub fn load(files: &[SliceFile], limits: &GeometryLimits) -> Result<Scan, Refusal> {
    if files.len() > limits.max_slices {
        let detail = format!("expected at most {} slices, got {}", limits.max_slices, files.len());
        return Err(Refusal::new(Reason::TooManySlices, detail));
    }
    // The same object twice: identical bytes change nothing, other pixels are a conflict.
    let mut by_uid: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (i, (_, header)) in files.iter().enumerate() {
        by_uid.entry(&header.sop_instance_uid).or_default().push(i);
    }
    let mut decoded: Vec<(Option<Refusal>, Vec<i16>)> = files
        .par_iter()
        .map_init(PixelDecoder::new, |decoder, (path, header)| match decode_file(decoder, path, header, limits) {
            Ok(hu) => (None, hu),
            Err(refusal) => (Some(refusal), Vec::new()),
        })
        .collect();
    let mut distinct = Vec::with_capacity(by_uid.len());
    for copies in by_uid.values() {
        let first = copies[0];
        let differs = |&c: &usize| decoded[c].1 != decoded[first].1 || !files[c].1.same_object(&files[first].1);
        if copies.iter().any(differs) {
            let detail = "one SOPInstanceUID has files with different pixels; keep one of them";
            return Err(Refusal::new(Reason::DuplicateConflict, detail));
        }
        distinct.push(first);
    }
    let found: Vec<SliceFacts> = distinct
        .iter()
        .map(|&i| SliceFacts { header: Arc::clone(&files[i].1), refusal: decoded[i].0.clone() })
        .collect();
    let selection = select(&found, limits)?;
    let hu: Vec<Vec<i16>> = selection.ordered.iter().map(|&k| std::mem::take(&mut decoded[distinct[k]].1)).collect();
    let spacing = |k: &usize| {
        let geometry = files[distinct[*k]].1.geometry.as_ref();
        geometry.map_or(selection.stack.pixel_spacing_mm, |g| g.pixel_spacing_mm)
    };
    let spacings = selection.ordered.iter().map(spacing).collect();
    Ok(Scan { stack: selection.stack, hu, spacings, notes: selection.notes })
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
