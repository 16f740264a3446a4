//! The cache: network inputs as half floats, one file a scan, read as mapped memory.
//!
//! - Input: what [`crate::train::prepare`] makes of a scan. Output: [`Cache`], for the trainer.
//! - Layout: `docs/formats.md`, "Training cache". Every file is written under another name, synced and renamed, so what
//!   has its final name is whole; the index comes last and names every record with its length and checksum.
//! - A cache belongs to one [`CacheSpec`] (shape, preprocessing, classes); its key is in every record. Another is refused.
//! - Cases are in the order of their scan names, however many threads wrote them and however often that was interrupted.
//!
//! [`Cache::open`] checks headers, lengths and keys, which is quick; [`Cache::verify`] reads every byte.
//!
//! Deliberately absent: removal of single scans, a second writer (a lock keeps it out), any resampling.

use std::fs::{self, File};
use std::io::{BufWriter, Read as _, Write as _};
use std::path::{Path, PathBuf};

use half::f16;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

pub use crate::model::manifest::SourceWindow;

use crate::model::manifest::{Manifest, Preprocessing};
use crate::train::error::TrainDataError;
use crate::train::folder_of;
use crate::train::layout::*;
use crate::train::map::MappedFile;
use crate::volume::layout::Field;

/// Schema of `cache.json`.
pub const CACHE_SCHEMA: &str = "darnet.cache/1";
/// Schema of `index.json`.
pub const INDEX_SCHEMA: &str = "darnet.cache-index/1";
/// Most scans of a cache: each is a mapping, of which a process may have 65,530 by Linux's default.
pub const MAX_SCANS: usize = 50_000;
/// Largest JSON file of a cache: an index entry takes about 120 bytes, the largest index then 6 MB.
const MAX_JSON_BYTES: u64 = 64 << 20;

const SPEC_FILE: &str = "cache.json";
const INDEX_FILE: &str = "index.json";
const LOCK_FILE: &str = "lock";
const SCANS_DIR: &str = "scans";
const TEMPORARY: &str = ".tmp-";

/// What defines the inputs of a network; a cache holds inputs of one of these.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CacheSpec {
    /// Depth, height, width.
    pub input_dhw: [usize; 3],
    /// From HU to input.
    pub preprocessing: Preprocessing,
    /// Keys of the classes, in the order of the network's outputs.
    pub class_keys: Vec<String>,
}

impl CacheSpec {
    /// What a model's manifest asks for.
    pub fn of(manifest: &Manifest) -> Self {
        Self {
            input_dhw: manifest.architecture.input_dhw,
            preprocessing: manifest.preprocessing.clone(),
            class_keys: manifest.class_keys.clone(),
        }
    }

    /// Voxels of an input.
    pub fn voxels(&self) -> usize {
        self.input_dhw.iter().product()
    }

    /// SHA-256 of the spec as JSON.
    pub fn key(&self) -> [u8; 32] {
        // A struct of numbers and strings always serialises.
        let text = serde_json::to_string(self).unwrap_or_default();
        Sha256::digest(text.as_bytes()).into()
    }

    /// What differs from another, for people; `None` when nothing does.
    fn difference(&self, other: &Self) -> Option<String> {
        let mut found = Vec::new();
        if self.input_dhw != other.input_dhw {
            found.push(format!("input {:?} instead of {:?}", other.input_dhw, self.input_dhw));
        }
        if self.preprocessing != other.preprocessing {
            found.push("another preprocessing".to_owned());
        }
        if self.class_keys != other.class_keys {
            found.push(format!("classes {} instead of {}", other.class_keys.join(","), self.class_keys.join(",")));
        }
        (!found.is_empty()).then(|| found.join(", "))
    }

    fn check(&self) -> Result<(), TrainDataError> {
        let option = |option, expected: String, got: String| TrainDataError::Option { option, expected, got };
        let shape = self.input_dhw;
        if shape.contains(&0) || shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d)).is_none_or(|n| n > MAX_VOXELS)
        {
            return Err(option("input", format!("1 to {MAX_VOXELS} voxels"), format!("{shape:?}")));
        }
        if !(2..=64).contains(&self.class_keys.len()) {
            return Err(option("classes", "2 to 64".to_owned(), self.class_keys.len().to_string()));
        }
        let p = &self.preprocessing;
        if !(p.window_width_hu > 0.0 && p.window_width_hu.is_finite() && p.window_center_hu.is_finite()) {
            return Err(option("window", "a positive width".to_owned(), format!("{}", p.window_width_hu)));
        }
        if !(p.crop_fraction > 0.0 && p.crop_fraction <= 1.0) {
            return Err(option("crop", "more than 0, at most 1".to_owned(), format!("{}", p.crop_fraction)));
        }
        Ok(())
    }
}

/// One scan of a cache.
#[derive(Clone, Debug, PartialEq)]
pub struct Case {
    /// Name of the scan within its source: a relative path, or a phantom's seed. Unique in the cache.
    pub scan: String,
    /// Name of the patient, who may have several scans.
    pub patient: String,
    /// Index into [`Cache::class_names`].
    pub class: usize,
    /// Where it came from: the format and whatever else tells sources apart.
    pub source: String,
    /// What grey values of the source meant.
    pub source_window: SourceWindow,
    /// Whether [`Cache::mask`] has a lesion mask. A mask without one lesion voxel on the input grid is none.
    pub has_mask: bool,
}

/// A record to write.
#[derive(Clone, Debug)]
pub struct NewRecord<'a> {
    /// What it is.
    pub case: &'a Case,
    /// Slices of the source.
    pub slices: usize,
    /// The input, D x H x W in [0, 1].
    pub volume: &'a [f16],
    /// The lesion mask on the same grid, 0 or 1.
    pub mask: Option<&'a [u8]>,
}

/// What became of a scan, as `<hash>.json` beside its record and as a row of the report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScanOutcome {
    /// As in [`Case`].
    pub scan: String,
    /// As in [`Case`]; empty when it never became known.
    pub patient: String,
    /// Class key; empty when it never became known.
    pub class: String,
    /// As in [`Case`].
    pub source: String,
    /// Whether the cache has a record of it.
    pub kept: bool,
    /// Why not, in one word: a reason of [`crate::volume::refusal::Reason`] or of the data set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Why not, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// What a user of the scan should know.
    #[serde(default)]
    pub notes: Vec<String>,
    /// Slices of the source, 0 when it could not be read.
    pub slices: usize,
    /// Whether the record has a lesion mask.
    pub has_mask: bool,
    /// The reading options it was made with; other ones make it anew.
    pub made_with: String,
    /// Scans of the folder it came from, itself included.
    pub siblings: usize,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SpecFile {
    schema: String,
    key: String,
    spec: CacheSpec,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct IndexFile {
    schema: String,
    key: String,
    records: Vec<IndexEntry>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct IndexEntry {
    file: String,
    bytes: u64,
    header_crc32: u32,
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// The file stem of a scan: half of the SHA-256 of its name, so that file names hold no name.
fn stem(scan: &str) -> String {
    hex(&Sha256::digest(scan.as_bytes())[..16])
}

/// Writes a file so that its name appears with all of its bytes or not at all.
pub(crate) fn write_atomically(
    operation: &'static str,
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<File>) -> std::io::Result<()>,
) -> Result<(), TrainDataError> {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let folder = folder_of(path);
    let temporary = folder.join(format!("{TEMPORARY}{name}"));
    let written = File::create(&temporary).and_then(|file| {
        let mut out = BufWriter::with_capacity(1 << 20, file);
        fill(&mut out)?;
        let file = out.into_inner().map_err(std::io::IntoInnerError::into_error)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        File::open(folder)?.sync_all()
    });
    written.map_err(|source| {
        // What is left of it is never read; it goes at the next run if it does not go now.
        let _ = fs::remove_file(&temporary);
        TrainDataError::io(operation, path)(source)
    })
}

/// The system's error inside an error of the CSV writer, so that a full disk is seen as one.
pub(crate) fn csv_io(error: csv::Error) -> std::io::Error {
    match error.into_kind() {
        csv::ErrorKind::Io(error) => error,
        other => std::io::Error::other(format!("{other:?}")),
    }
}

fn write_json(operation: &'static str, path: &Path, value: &impl Serialize) -> Result<(), TrainDataError> {
    write_atomically(operation, path, |out| {
        serde_json::to_writer_pretty(&mut *out, value)?;
        out.write_all(b"\n")
    })
}

/// Reads a JSON file of a cache; `None` when there is none.
fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>, TrainDataError> {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(TrainDataError::io("read", path)(e)),
    };
    let mut text = String::new();
    file.take(MAX_JSON_BYTES).read_to_string(&mut text).map_err(TrainDataError::io("read", path))?;
    serde_json::from_str(&text).map(Some).map_err(|e| TrainDataError::damaged(&name, e))
}

/// The spec of the cache in `dir`; `None` when there is no cache.
fn read_spec(dir: &Path) -> Result<Option<CacheSpec>, TrainDataError> {
    // The schema is looked at first: another version may have other fields.
    let Some(value) = read_json::<serde_json::Value>(&dir.join(SPEC_FILE))? else { return Ok(None) };
    let schema = value.get("schema").and_then(|s| s.as_str()).unwrap_or("none");
    if schema != CACHE_SCHEMA {
        let got = schema.chars().take(40).collect();
        return Err(TrainDataError::Version { expected: CACHE_SCHEMA.to_owned(), got });
    }
    let file: SpecFile = serde_json::from_value(value).map_err(|e| TrainDataError::damaged(SPEC_FILE, e))?;
    file.spec.check()?;
    if file.key != hex(&file.spec.key()) {
        return Err(TrainDataError::damaged(SPEC_FILE, "the key does not belong to the spec"));
    }
    Ok(Some(file.spec))
}

fn header(record: &NewRecord<'_>, key: &[u8; 32], dhw: [usize; 3]) -> Result<Vec<u8>, TrainDataError> {
    let case = record.case;
    let strings = [&case.scan, &case.patient, &case.source];
    for (name, text) in ["scan", "patient", "source"].into_iter().zip(strings) {
        if text.is_empty() || text.len() > MAX_STRING_LEN {
            let expected = format!("1 to {MAX_STRING_LEN} bytes");
            return Err(TrainDataError::Option { option: name, expected, got: format!("{} bytes", text.len()) });
        }
    }
    let volume_len = size_of_val(record.volume);
    let mask_offset = (PAGE + volume_len).next_multiple_of(PAGE);
    let mut h = vec![0u8; HEADER_LEN];
    let mut put = |field: Field, value: &[u8]| field.put(&mut h, value);
    put(F_MAGIC, &MAGIC);
    put(F_VERSION, &VERSION.to_le_bytes());
    put(F_HEADER_LEN, &(HEADER_LEN as u32).to_le_bytes());
    put(F_KEY, key);
    for (field, n) in [F_DEPTH, F_HEIGHT, F_WIDTH].into_iter().zip(dhw) {
        put(field, &(n as u32).to_le_bytes());
    }
    put(F_CLASS, &(case.class as u32).to_le_bytes());
    put(F_FLAGS, &(if record.mask.is_some() { FLAG_MASK } else { 0 }).to_le_bytes());
    let (kind, center, width) = match case.source_window {
        SourceWindow::Hu => (WINDOW_HU, 0.0, 0.0),
        SourceWindow::Window { center_hu, width_hu } => (WINDOW_KNOWN, center_hu, width_hu),
        SourceWindow::Unknown => (WINDOW_UNKNOWN, 0.0f32, 0.0f32),
    };
    put(F_SOURCE_WINDOW, &kind.to_le_bytes());
    put(F_WINDOW_CENTER, &center.to_le_bytes());
    put(F_WINDOW_WIDTH, &width.to_le_bytes());
    put(F_VOLUME_OFFSET, &(PAGE as u64).to_le_bytes());
    put(F_VOLUME_LEN, &(volume_len as u64).to_le_bytes());
    put(F_VOLUME_CRC, &crc_of_halves(record.volume).to_le_bytes());
    if let Some(mask) = record.mask {
        put(F_MASK_OFFSET, &(mask_offset as u64).to_le_bytes());
        put(F_MASK_LEN, &(mask.len() as u64).to_le_bytes());
        put(F_MASK_CRC, &crc32fast::hash(mask).to_le_bytes());
    }
    put(F_SLICES, &u32::try_from(record.slices).unwrap_or(u32::MAX).to_le_bytes());
    for (field, text) in [F_SCAN_LEN, F_PATIENT_LEN, F_SOURCE_LEN].into_iter().zip(strings) {
        put(field, &(text.len() as u32).to_le_bytes());
    }
    for text in strings {
        h.extend_from_slice(text.as_bytes());
    }
    let crc = header_crc(&h);
    F_HEADER_CRC.put(&mut h, &crc.to_le_bytes());
    Ok(h)
}

/// Of the header without its checksum, then the strings.
fn header_crc(header_and_strings: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&header_and_strings[..F_HEADER_CRC.offset]);
    crc.update(&header_and_strings[HEADER_LEN..]);
    crc.finalize()
}

fn crc_of_halves(values: &[f16]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    let mut block = Vec::with_capacity(8192);
    for run in values.chunks(4096) {
        block.clear();
        block.extend(run.iter().flat_map(|v| v.to_le_bytes()));
        crc.update(&block);
    }
    crc.finalize()
}

/// A record as mapped.
#[derive(Debug)]
struct Mapped {
    file: String,
    map: MappedFile,
    volume_crc32: u32,
    /// Offset and checksum.
    mask: Option<(usize, u32)>,
    header_crc32: u32,
}

fn u32_of(field: Field, bytes: &[u8]) -> u32 {
    field.of(bytes).try_into().map_or(0, u32::from_le_bytes)
}

fn u64_of(field: Field, bytes: &[u8]) -> u64 {
    field.of(bytes).try_into().map_or(0, u64::from_le_bytes)
}

/// Maps a record and checks everything but the voxels' checksums.
fn map_record(path: &Path, spec: &CacheSpec, key: &[u8; 32]) -> Result<(Case, Mapped), TrainDataError> {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let damaged = |fault: String| TrainDataError::damaged(&name, fault);
    let file = File::open(path).map_err(TrainDataError::io("open", path))?;
    let len = file.metadata().map_err(TrainDataError::io("open", path))?.len();
    if len < PAGE as u64 {
        return Err(damaged(format!("expected at least {PAGE} bytes, got {len}")));
    }
    let map = MappedFile::new(&file).map_err(TrainDataError::io("map", path))?;
    let bytes = map.bytes();
    if F_MAGIC.of(bytes) != MAGIC {
        return Err(damaged("expected a cache record, got something else".to_owned()));
    }
    let version = u32_of(F_VERSION, bytes);
    if version != VERSION {
        let expected = format!("record version {VERSION}");
        return Err(TrainDataError::Version { expected, got: format!("version {version}") });
    }
    let lengths = [F_SCAN_LEN, F_PATIENT_LEN, F_SOURCE_LEN].map(|f| u32_of(f, bytes) as usize);
    if u32_of(F_HEADER_LEN, bytes) as usize != HEADER_LEN || lengths.iter().any(|l| *l > MAX_STRING_LEN) {
        return Err(damaged("a length in the header is out of range".to_owned()));
    }
    let strings_end = HEADER_LEN + lengths.iter().sum::<usize>();
    let header_crc32 = u32_of(F_HEADER_CRC, bytes);
    if header_crc(&bytes[..strings_end]) != header_crc32 {
        return Err(damaged("the header's checksum is wrong".to_owned()));
    }
    if F_KEY.of(bytes) != key {
        return Err(TrainDataError::OtherPreprocessing { difference: format!("the key of record {name}") });
    }
    let [d, h, w] = [F_DEPTH, F_HEIGHT, F_WIDTH].map(|f| u32_of(f, bytes) as usize);
    let voxels = spec.voxels();
    let volume_len = (voxels * size_of::<f16>()) as u64;
    let has_mask = u32_of(F_FLAGS, bytes) & FLAG_MASK != 0;
    let mask_offset = (PAGE as u64 + volume_len).next_multiple_of(PAGE as u64);
    let expected = if has_mask { mask_offset + voxels as u64 } else { PAGE as u64 + volume_len };
    if [d, h, w] != spec.input_dhw
        || u64_of(F_VOLUME_OFFSET, bytes) != PAGE as u64
        || u64_of(F_VOLUME_LEN, bytes) != volume_len
        || (has_mask && (u64_of(F_MASK_OFFSET, bytes), u64_of(F_MASK_LEN, bytes)) != (mask_offset, voxels as u64))
    {
        return Err(damaged("the header's shape is not the cache's".to_owned()));
    }
    if len != expected {
        return Err(damaged(format!("expected {expected} bytes, got {len}")));
    }
    let class = u32_of(F_CLASS, bytes) as usize;
    if class >= spec.class_keys.len() {
        return Err(damaged(format!("expected a class below {}, got {class}", spec.class_keys.len())));
    }
    let source_window = match u32_of(F_SOURCE_WINDOW, bytes) {
        WINDOW_HU => SourceWindow::Hu,
        WINDOW_KNOWN => SourceWindow::Window {
            center_hu: f32::from_bits(u32_of(F_WINDOW_CENTER, bytes)),
            width_hu: f32::from_bits(u32_of(F_WINDOW_WIDTH, bytes)),
        },
        WINDOW_UNKNOWN => SourceWindow::Unknown,
        other => return Err(damaged(format!("expected a source window of 0 to 2, got {other}"))),
    };
    let mut at = HEADER_LEN;
    let mut text = |len: usize| {
        let part = std::str::from_utf8(&bytes[at..at + len]).map(str::to_owned);
        at += len;
        part.map_err(|_| damaged("a string is not UTF-8".to_owned()))
    };
    let (scan, patient, source) = (text(lengths[0])?, text(lengths[1])?, text(lengths[2])?);
    let case = Case { scan, patient, class, source, source_window, has_mask };
    let volume_crc32 = u32_of(F_VOLUME_CRC, bytes);
    let mask = has_mask.then(|| (mask_offset as usize, u32_of(F_MASK_CRC, bytes)));
    Ok((case, Mapped { file: name, map, volume_crc32, mask, header_crc32 }))
}

/// A finished cache, read-only, mapped.
#[derive(Debug)]
pub struct Cache {
    spec: CacheSpec,
    cases: Vec<Case>,
    records: Vec<Mapped>,
}

impl Cache {
    /// Opens the cache in `dir`.
    ///
    /// # Errors
    /// A folder without a finished cache, another version, a file that is cut short or torn, a record of other
    /// preprocessing.
    pub fn open(dir: &Path) -> Result<Self, TrainDataError> {
        let spec = read_spec(dir)?.ok_or(TrainDataError::Nothing { expected: "a training cache (cache.json)" })?;
        let key = spec.key();
        let index: IndexFile = read_json(&dir.join(INDEX_FILE))?.ok_or(TrainDataError::Unfinished)?;
        if index.schema != INDEX_SCHEMA {
            let got = index.schema.chars().take(40).collect();
            return Err(TrainDataError::Version { expected: INDEX_SCHEMA.to_owned(), got });
        }
        if index.key != hex(&key) {
            return Err(TrainDataError::OtherPreprocessing { difference: "the key of the index".to_owned() });
        }
        let plain = |file: &str| file.len() == 37 && file.ends_with(".scan") && !file.contains(['/', '\\']);
        if index.records.len() > MAX_SCANS || index.records.iter().any(|r| !plain(&r.file)) {
            return Err(TrainDataError::damaged(INDEX_FILE, "expected plain names of records, got something else"));
        }
        let mut cases = Vec::with_capacity(index.records.len());
        let mut records = Vec::with_capacity(index.records.len());
        for entry in &index.records {
            let (case, record) = map_record(&dir.join(SCANS_DIR).join(&entry.file), &spec, &key)?;
            if record.header_crc32 != entry.header_crc32 || record.map.bytes().len() as u64 != entry.bytes {
                return Err(TrainDataError::damaged(&entry.file, "it is not the record the index names"));
            }
            cases.push(case);
            records.push(record);
        }
        if !cases.is_sorted_by(|a, b| a.scan < b.scan) {
            return Err(TrainDataError::damaged(INDEX_FILE, "expected scans in order, each once"));
        }
        Ok(Self { spec, cases, records })
    }

    /// Opens the cache in `dir` if it was made for `spec`.
    ///
    /// # Errors
    /// As [`Cache::open`], and [`TrainDataError::OtherPreprocessing`].
    pub fn open_for(dir: &Path, spec: &CacheSpec) -> Result<Self, TrainDataError> {
        let cache = Self::open(dir)?;
        match spec.difference(&cache.spec) {
            Some(difference) => Err(TrainDataError::OtherPreprocessing { difference }),
            None => Ok(cache),
        }
    }

    /// The scans, in the order of their names.
    pub fn cases(&self) -> &[Case] {
        &self.cases
    }

    /// Depth, height, width of every volume.
    pub fn input_dhw(&self) -> [usize; 3] {
        self.spec.input_dhw
    }

    /// How the volumes were made.
    pub fn preprocessing(&self) -> &Preprocessing {
        &self.spec.preprocessing
    }

    /// Keys of the classes (`cp`, `covid19`, `healthy`), in the order of the network's outputs.
    pub fn class_names(&self) -> &[String] {
        &self.spec.class_keys
    }

    /// All that defines the inputs.
    pub fn spec(&self) -> &CacheSpec {
        &self.spec
    }

    /// The input of case `index`: D, H, W in [0, 1]. Pages come from the disk when they are first read.
    ///
    /// # Panics
    /// When there is no such case.
    pub fn volume(&self, index: usize) -> &[f16] {
        self.records[index].map.halves(PAGE, self.spec.voxels())
    }

    /// The lesion mask of case `index` on the input grid: D, H, W, 0 or 1.
    ///
    /// # Panics
    /// When there is no such case.
    pub fn mask(&self, index: usize) -> Option<&[u8]> {
        let record = &self.records[index];
        record.mask.map(|(offset, _)| &record.map.bytes()[offset..offset + self.spec.voxels()])
    }

    /// The least informed source window of all cases: unknown if any is, else a window if any has one.
    pub fn source_window(&self) -> SourceWindow {
        let rank = |w: &SourceWindow| match w {
            SourceWindow::Hu => 0,
            SourceWindow::Window { .. } => 1,
            SourceWindow::Unknown => 2,
        };
        self.cases.iter().map(|c| c.source_window).max_by_key(rank).unwrap_or_default()
    }

    /// Reads every byte and compares the checksums.
    ///
    /// # Errors
    /// The first record, in order, that is damaged.
    pub fn verify(&self) -> Result<(), TrainDataError> {
        let faults: Vec<Option<TrainDataError>> =
            (0..self.cases.len()).into_par_iter().map(|i| self.verify_one(i).err()).collect();
        faults.into_iter().flatten().next().map_or(Ok(()), Err)
    }

    fn verify_one(&self, index: usize) -> Result<(), TrainDataError> {
        let record = &self.records[index];
        let bytes = record.map.bytes();
        let volume = &bytes[PAGE..PAGE + self.spec.voxels() * size_of::<f16>()];
        if crc32fast::hash(volume) != record.volume_crc32 {
            return Err(TrainDataError::damaged(&record.file, "the volume's checksum is wrong"));
        }
        if let (Some(mask), Some((_, crc))) = (self.mask(index), record.mask)
            && crc32fast::hash(mask) != crc
        {
            return Err(TrainDataError::damaged(&record.file, "the mask's checksum is wrong"));
        }
        Ok(())
    }
}

/// The one writer of a cache.
#[derive(Debug)]
pub struct CacheWriter {
    dir: PathBuf,
    spec: CacheSpec,
    key: [u8; 32],
    _lock: File,
}

impl CacheWriter {
    /// Makes the cache in `dir`, or goes on with one of the same spec.
    ///
    /// # Errors
    /// [`TrainDataError::OtherPreprocessing`], [`TrainDataError::Busy`], and what the file system says.
    pub fn open(dir: &Path, spec: &CacheSpec) -> Result<Self, TrainDataError> {
        spec.check()?;
        let scans = dir.join(SCANS_DIR);
        fs::create_dir_all(&scans).map_err(TrainDataError::io("make folder", &scans))?;
        let lock_path = dir.join(LOCK_FILE);
        let lock = File::options().create(true).truncate(false).write(true).open(&lock_path);
        let lock = lock.map_err(TrainDataError::io("open", &lock_path))?;
        if !crate::volume::journal::try_lock(&lock).map_err(TrainDataError::io("lock", &lock_path))? {
            return Err(TrainDataError::Busy);
        }
        let key = spec.key();
        match read_spec(dir)? {
            Some(found) => {
                if let Some(difference) = spec.difference(&found) {
                    return Err(TrainDataError::OtherPreprocessing { difference });
                }
            }
            None => {
                let file = SpecFile { schema: CACHE_SCHEMA.to_owned(), key: hex(&key), spec: spec.clone() };
                write_json("write cache.json", &dir.join(SPEC_FILE), &file)?;
            }
        }
        for folder in [dir, &scans] {
            for entry in fs::read_dir(folder).map_err(TrainDataError::io("list", folder))? {
                let path = entry.map_err(TrainDataError::io("list", folder))?.path();
                if path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(TEMPORARY)) {
                    fs::remove_file(&path).map_err(TrainDataError::io("remove", &path))?;
                }
            }
        }
        Ok(Self { dir: dir.to_path_buf(), spec: spec.clone(), key, _lock: lock })
    }

    /// What defines the inputs.
    pub fn spec(&self) -> &CacheSpec {
        &self.spec
    }

    fn scan_file(&self, scan: &str, extension: &str) -> PathBuf {
        self.dir.join(SCANS_DIR).join(format!("{}.{extension}", stem(scan)))
    }

    /// What an earlier run, with the same reading options, made of a scan. `None` when it is to be done: never begun,
    /// interrupted, or damaged since.
    pub fn done(&self, scan: &str, made_with: &str) -> Option<ScanOutcome> {
        let outcome: ScanOutcome = read_json(&self.scan_file(scan, "json")).ok()??;
        if outcome.scan != scan || outcome.made_with != made_with {
            return None;
        }
        if outcome.kept {
            let (case, _) = map_record(&self.scan_file(scan, "scan"), &self.spec, &self.key).ok()?;
            if case.scan != scan {
                return None;
            }
        }
        Some(outcome)
    }

    /// Keeps a scan: its record, then its outcome.
    ///
    /// # Errors
    /// [`TrainDataError::NoSpace`] and other trouble with the file system; a name that is empty or too long.
    ///
    /// # Panics
    /// When a length does not fit the spec.
    pub fn keep(&self, record: &NewRecord<'_>, outcome: &ScanOutcome) -> Result<(), TrainDataError> {
        assert_eq!(record.volume.len(), self.spec.voxels(), "voxels of the volume");
        assert!(record.mask.is_none_or(|m| m.len() == self.spec.voxels()), "voxels of the mask");
        assert!(record.case.class < self.spec.class_keys.len(), "class of the case");
        assert!(outcome.kept && outcome.scan == record.case.scan, "outcome of the case");
        let header = header(record, &self.key, self.spec.input_dhw)?;
        let path = self.scan_file(&record.case.scan, "scan");
        write_atomically("write a cache record", &path, |out| {
            const ZEROS: [u8; PAGE] = [0; PAGE];
            out.write_all(&header)?;
            out.write_all(&ZEROS[header.len()..])?;
            for run in record.volume.chunks(4096) {
                let block: Vec<u8> = run.iter().flat_map(|v| v.to_le_bytes()).collect();
                out.write_all(&block)?;
            }
            if let Some(mask) = record.mask {
                let end = size_of_val(record.volume);
                out.write_all(&ZEROS[..end.next_multiple_of(PAGE) - end])?;
                out.write_all(mask)?;
            }
            Ok(())
        })?;
        write_json("write a scan's outcome", &self.scan_file(&outcome.scan, "json"), outcome)
    }

    /// Notes that a scan is refused; a record it had goes.
    ///
    /// # Errors
    /// Trouble with the file system.
    pub fn refuse(&self, outcome: &ScanOutcome) -> Result<(), TrainDataError> {
        assert!(!outcome.kept, "outcome of a refused scan");
        write_json("write a scan's outcome", &self.scan_file(&outcome.scan, "json"), outcome)?;
        let record = self.scan_file(&outcome.scan, "scan");
        match fs::remove_file(&record) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(TrainDataError::io("remove", &record)(e)),
            _ => Ok(()),
        }
    }

    /// Writes the index over the kept scans of `outcomes` and those that an earlier index names; the cache is then
    /// whole. A scan of the earlier index that `outcomes` refuses goes.
    ///
    /// # Errors
    /// A record that is not what it should be; trouble with the file system.
    pub fn finish(&self, outcomes: &[ScanOutcome]) -> Result<Cache, TrainDataError> {
        let mut stems: std::collections::BTreeSet<String> =
            outcomes.iter().filter(|o| o.kept).map(|o| stem(&o.scan)).collect();
        let refused: std::collections::BTreeSet<String> =
            outcomes.iter().filter(|o| !o.kept).map(|o| stem(&o.scan)).collect();
        let earlier: Option<IndexFile> = read_json(&self.dir.join(INDEX_FILE))?;
        if let Some(earlier) = earlier.filter(|i| i.key == hex(&self.key)) {
            let names = earlier.records.into_iter().filter_map(|r| r.file.strip_suffix(".scan").map(str::to_owned));
            stems.extend(names.filter(|s| !refused.contains(s)));
        }
        if stems.len() > MAX_SCANS {
            let expected = format!("at most {MAX_SCANS} in one cache");
            return Err(TrainDataError::Option { option: "scans", expected, got: stems.len().to_string() });
        }
        let mut records = Vec::with_capacity(stems.len());
        for stem in &stems {
            let file = format!("{stem}.scan");
            let (case, record) = map_record(&self.dir.join(SCANS_DIR).join(&file), &self.spec, &self.key)?;
            let bytes = record.map.bytes().len() as u64;
            records.push((case.scan, IndexEntry { file, bytes, header_crc32: record.header_crc32 }));
        }
        records.sort_by(|a, b| a.0.cmp(&b.0));
        let records = records.into_iter().map(|(_, entry)| entry).collect();
        let index = IndexFile { schema: INDEX_SCHEMA.to_owned(), key: hex(&self.key), records };
        write_json("write index.json", &self.dir.join(INDEX_FILE), &index)?;
        Cache::open(&self.dir)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn spec() -> CacheSpec {
        CacheSpec {
            input_dhw: [4, 6, 5],
            preprocessing: Preprocessing::default(),
            class_keys: ["cp", "covid19", "healthy"].map(str::to_owned).to_vec(),
        }
    }

    fn case(n: usize) -> Case {
        Case {
            scan: format!("scan/{n:03}"),
            patient: format!("p{n}"),
            class: n % 3,
            source: "test".to_owned(),
            source_window: [
                SourceWindow::Hu,
                SourceWindow::Window { center_hu: -600.0, width_hu: 1500.0 },
                SourceWindow::Unknown,
            ][n % 3],
            has_mask: n.is_multiple_of(2),
        }
    }

    fn outcome(case: &Case, kept: bool) -> ScanOutcome {
        ScanOutcome {
            scan: case.scan.clone(),
            patient: case.patient.clone(),
            class: "cp".to_owned(),
            source: case.source.clone(),
            kept,
            reason: (!kept).then(|| "gap".to_owned()),
            detail: None,
            notes: vec!["a note".to_owned()],
            slices: 9,
            has_mask: case.has_mask,
            made_with: "test/1".to_owned(),
            siblings: 1,
        }
    }

    fn volume(n: usize) -> Vec<f16> {
        (0..120).map(|i| f16::from_f32(((i + n) % 97) as f32 / 97.0)).collect()
    }

    fn put(writer: &CacheWriter, n: usize) -> ScanOutcome {
        let case = case(n);
        let outcome = outcome(&case, true);
        let mask: Vec<u8> = (0..120).map(|i| u8::from((i + n).is_multiple_of(7))).collect();
        let mask = case.has_mask.then_some(mask.as_slice());
        writer.keep(&NewRecord { case: &case, slices: 9, volume: &volume(n), mask }, &outcome).unwrap();
        outcome
    }

    fn made(dir: &Path, count: usize) -> Cache {
        let writer = CacheWriter::open(dir, &spec()).unwrap();
        let outcomes: Vec<_> = (0..count).rev().map(|n| put(&writer, n)).collect();
        writer.finish(&outcomes).unwrap()
    }

    #[test]
    fn what_is_written_is_read_in_order() {
        let dir = tempfile::tempdir().unwrap();
        made(dir.path(), 5);
        let cache = Cache::open_for(dir.path(), &spec()).unwrap();
        assert_eq!(cache.cases(), (0..5).map(case).collect::<Vec<_>>());
        for n in 0..5 {
            assert_eq!(cache.volume(n), volume(n));
            assert_eq!(cache.mask(n).is_some(), n % 2 == 0);
            assert!(cache.mask(n).is_none_or(|m| (0..120).all(|i| m[i] == u8::from((i + n) % 7 == 0))));
        }
        assert_eq!((cache.input_dhw(), cache.source_window()), ([4, 6, 5], SourceWindow::Unknown));
        cache.verify().unwrap();
    }

    #[test]
    fn a_later_run_adds_to_the_index_and_takes_out_what_it_refuses() {
        let dir = tempfile::tempdir().unwrap();
        made(dir.path(), 3);
        let writer = CacheWriter::open(dir.path(), &spec()).unwrap();
        assert!(writer.done("scan/001", "test/1").is_some());
        assert_eq!(writer.done("scan/001", "test/2"), None, "other reading options");
        let refused = outcome(&case(0), false);
        writer.refuse(&refused).unwrap();
        assert_eq!(writer.done("scan/000", "test/1"), Some(refused.clone()));
        let cache = writer.finish(&[put(&writer, 7), refused]).unwrap();
        let scans: Vec<_> = cache.cases().iter().map(|c| c.scan.as_str()).collect();
        assert_eq!(scans, ["scan/001", "scan/002", "scan/007"]);
    }

    #[test]
    fn a_record_cut_at_any_page_or_torn_anywhere_is_never_read_as_whole() {
        let dir = tempfile::tempdir().unwrap();
        made(dir.path(), 1);
        let path = fs::read_dir(dir.path().join(SCANS_DIR)).unwrap().map(|e| e.unwrap().path());
        let path = path.into_iter().find(|p| p.extension().is_some_and(|e| e == "scan")).unwrap();
        let whole = fs::read(&path).unwrap();
        for keep in [0, 1, 255, 256, 4095, 4096, whole.len() / 2, whole.len() - 1] {
            fs::write(&path, &whole[..keep]).unwrap();
            assert!(matches!(Cache::open(dir.path()), Err(TrainDataError::Damaged { .. })), "cut at {keep}");
            let writer = CacheWriter::open(dir.path(), &spec()).unwrap();
            assert_eq!(writer.done("scan/000", "test/1"), None, "cut at {keep}");
        }
        for at in (0..HEADER_LEN + 10).step_by(3) {
            let mut torn = whole.clone();
            torn[at] ^= 0x40;
            fs::write(&path, &torn).unwrap();
            assert!(Cache::open(dir.path()).is_err(), "flipped at {at}");
        }
        for at in [PAGE, PAGE + 239, 2 * PAGE, whole.len() - 1] {
            let mut torn = whole.clone();
            torn[at] ^= 1;
            fs::write(&path, &torn).unwrap();
            let cache = Cache::open(dir.path()).unwrap();
            assert!(matches!(cache.verify(), Err(TrainDataError::Damaged { .. })), "flipped at {at}");
        }
    }

    #[test]
    fn a_cache_without_index_is_unfinished_and_the_next_run_goes_on_from_it() {
        let dir = tempfile::tempdir().unwrap();
        {
            let writer = CacheWriter::open(dir.path(), &spec()).unwrap();
            put(&writer, 0);
            // Killed here, in the middle of the next record.
            fs::write(dir.path().join(SCANS_DIR).join(format!("{TEMPORARY}x.scan")), b"half").unwrap();
        }
        assert!(matches!(Cache::open(dir.path()), Err(TrainDataError::Unfinished)));
        let writer = CacheWriter::open(dir.path(), &spec()).unwrap();
        let outcome = writer.done("scan/000", "test/1").unwrap();
        assert_eq!(writer.finish(&[outcome]).unwrap().cases().len(), 1);
        let left = fs::read_dir(dir.path().join(SCANS_DIR)).unwrap().count();
        assert_eq!(left, 2, "the record and its outcome, no half file");
    }

    #[test]
    fn a_cache_of_another_manifest_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        made(dir.path(), 1);
        let mut other = spec();
        other.preprocessing.window_width_hu = 1400.0;
        assert!(matches!(Cache::open_for(dir.path(), &other), Err(TrainDataError::OtherPreprocessing { .. })));
        assert!(matches!(CacheWriter::open(dir.path(), &other), Err(TrainDataError::OtherPreprocessing { .. })));
        let second = tempfile::tempdir().unwrap();
        other.preprocessing = Preprocessing::default();
        other.input_dhw = [4, 5, 6];
        let writer = CacheWriter::open(second.path(), &other).unwrap();
        drop(writer);
        // A record of another cache, put where one of this is expected.
        let from = dir.path().join(SCANS_DIR).join(format!("{}.scan", stem("scan/000")));
        fs::copy(&from, second.path().join(SCANS_DIR).join(format!("{}.scan", stem("scan/000")))).unwrap();
        let writer = CacheWriter::open(second.path(), &other).unwrap();
        let error = writer.finish(&[outcome(&case(0), true)]).unwrap_err();
        assert!(matches!(error, TrainDataError::OtherPreprocessing { .. }), "{error}");
    }

    #[test]
    fn two_writers_and_another_version_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let writer = CacheWriter::open(dir.path(), &spec()).unwrap();
        assert!(matches!(CacheWriter::open(dir.path(), &spec()), Err(TrainDataError::Busy)));
        drop(writer);
        let path = dir.path().join(SPEC_FILE);
        let text = fs::read_to_string(&path).unwrap().replace(CACHE_SCHEMA, "darnet.cache/2");
        fs::write(&path, text).unwrap();
        assert!(matches!(CacheWriter::open(dir.path(), &spec()), Err(TrainDataError::Version { .. })));
    }

    #[test]
    fn a_full_disk_is_a_clear_error() {
        let error = TrainDataError::io("write a cache record", "x")(std::io::Error::from_raw_os_error(28));
        assert!(matches!(error, TrainDataError::NoSpace { .. }));
        // What is written to the temporary name goes to a device that is always full.
        let dir = tempfile::tempdir().unwrap();
        made(dir.path(), 1);
        let name = format!("{TEMPORARY}{}.scan", stem("scan/003"));
        std::os::unix::fs::symlink("/dev/full", dir.path().join(SCANS_DIR).join(name)).unwrap();
        let writer = CacheWriter {
            dir: dir.path().to_path_buf(),
            spec: spec(),
            key: spec().key(),
            _lock: File::create(dir.path().join(LOCK_FILE)).unwrap(),
        };
        let (case, volume) = (case(3), volume(3));
        let record = NewRecord { case: &case, slices: 9, volume: &volume, mask: None };
        let error = writer.keep(&record, &outcome(&case, true)).unwrap_err();
        assert!(error.to_string().contains("no space left"), "{error}");
        assert_eq!(writer.done("scan/003", "test/1"), None);
        assert_eq!(Cache::open(dir.path()).unwrap().cases().len(), 1, "what was whole is whole");
    }
}
