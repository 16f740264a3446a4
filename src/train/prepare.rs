//! `prepare`: sources become a cache, with a report and pictures.
//!
//! Input: [`PrepareOptions`]. Output: a finished [`Cache`], `report.csv`, `report.json` and contact sheets beside it.
//!
//! - A worker has one scan in memory at a time: read, judged and resampled by the same code as at the scanner
//!   ([`crate::scan`]), written, forgotten. Slices of a scan are decoded side by side by rayon's threads.
//! - A scan that cannot be used is refused with the daemon's reasons, or one of the data set's (`unlabelled`,
//!   `patient_in_two_classes`, `repeated`, `pre_segmented`, `out_of_order`, `not_listed`, `incomplete`). A panic while one is
//!   read refuses that one as `internal`.
//! - Killed at any time, the next run does what is missing. A full disk stops the run with an error; what is whole stays.
//! - Cache and reports do not depend on the number of workers.
//!
//! Deliberately absent: progress bars (the command draws them), deletion of records.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use half::f16;
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use crate::model::manifest::SourceWindow;
use crate::scan::pictures::Grey;
use crate::scan::{Loaded, Scan, dicom, meta_image, natural_key, nifti, pictures};
use crate::train::cache::{Cache, CacheSpec, CacheWriter, Case, NewRecord, ScanOutcome, csv_io, hex, write_atomically};
use crate::train::contact;
use crate::train::error::TrainDataError;
use crate::train::sources::{SourceFormat, SourceOptions, Unit, UnitKind, discover};
use crate::volume::geometry::GeometryLimits;
use crate::volume::refusal::{Reason, Refusal};

/// Most workers: each holds a scan, a large one 1 GiB.
pub const MAX_WORKERS: usize = 256;
/// A mask's slices may lie this far from its scan's, millimetres: rounding of headers.
const MASK_TOLERANCE_MM: f64 = 0.1;

/// What [`prepare`] does.
#[derive(Clone, Debug)]
pub struct PrepareOptions {
    /// Folder of the cache.
    pub out: PathBuf,
    /// What the inputs are.
    pub spec: CacheSpec,
    /// Where scans come from.
    pub sources: SourceOptions,
    /// Scans at once; 0 takes the number of processors.
    pub workers: usize,
    /// Whether scans refused by an earlier run are tried again.
    pub retry_refused: bool,
    /// Whether contact sheets are drawn.
    pub sheets: bool,
}

/// How far a run is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrepareProgress {
    /// Units (scans, DICOM folders) done.
    pub done: usize,
    /// Units in all.
    pub total: usize,
    /// Scans kept so far.
    pub kept: usize,
    /// Scans refused so far.
    pub refused: usize,
}

/// What came of a run.
#[derive(Debug)]
pub struct Prepared {
    /// The finished cache.
    pub cache: Cache,
    /// Every scan of the sources, in the order of names.
    pub outcomes: Vec<ScanOutcome>,
    /// Scans that an earlier run had done.
    pub reused: usize,
}

/// `report.json`.
#[derive(Serialize)]
struct Report<'a> {
    schema: &'static str,
    format: &'static str,
    kept: usize,
    refused: usize,
    reasons: BTreeMap<&'a str, usize>,
    scans: &'a [ScanOutcome],
}

/// Makes or completes a cache. `progress` is called after every unit, from any worker.
///
/// # Errors
/// [`TrainDataError::NoSpace`] and other trouble with the file system; a cache of another spec; sources that cannot be
/// listed.
pub fn prepare(
    options: &PrepareOptions,
    progress: &(dyn Fn(&PrepareProgress) + Sync),
) -> Result<Prepared, TrainDataError> {
    if options.workers > MAX_WORKERS {
        let expected = format!("at most {MAX_WORKERS}");
        return Err(TrainDataError::Option { option: "workers", expected, got: options.workers.to_string() });
    }
    let writer = CacheWriter::open(&options.out, &options.spec)?;
    let units = discover(&options.sources, &options.spec.class_keys)?;
    let workers = match options.workers {
        0 => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        n => n,
    };
    let work = Work {
        options,
        writer: &writer,
        made_with: options.sources.made_with(),
        reused: AtomicUsize::new(0),
        state: Mutex::new(PrepareProgress { total: units.len(), ..PrepareProgress::default() }),
    };
    let next = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let run = || -> Result<Vec<ScanOutcome>, TrainDataError> {
        let mut outcomes = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            let Some(unit) = units.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
            match work.unit(unit) {
                Ok(done) => {
                    work.report(&done, progress);
                    outcomes.extend(done);
                }
                Err(error) => {
                    stop.store(true, Ordering::Relaxed);
                    return Err(error);
                }
            }
        }
        Ok(outcomes)
    };
    let results: Vec<Result<Vec<ScanOutcome>, TrainDataError>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..workers.min(units.len()).max(1)).map(|_| scope.spawn(run)).collect();
        threads.into_iter().map(|t| t.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    });
    let mut outcomes = Vec::new();
    for result in results {
        outcomes.extend(result?);
    }
    outcomes.sort_by(|a, b| a.scan.cmp(&b.scan));
    refuse_patients_in_two_classes(&mut outcomes);
    let cache = writer.finish(&outcomes)?;
    write_reports(options, &outcomes)?;
    if options.sheets {
        contact::write_sheets(&cache, &options.out.join("sheets"))?;
    }
    Ok(Prepared { cache, outcomes, reused: work.reused.load(Ordering::Relaxed) })
}

/// Nobody can say which class is right. The records stay, for a run with other labels; the index leaves them out.
fn refuse_patients_in_two_classes(outcomes: &mut [ScanOutcome]) {
    let mut classes: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for outcome in outcomes.iter().filter(|o| o.kept) {
        classes.entry(outcome.patient.clone()).or_default().insert(outcome.class.clone());
    }
    for outcome in outcomes.iter_mut().filter(|o| o.kept) {
        if let Some(classes) = classes.get(&outcome.patient).filter(|c| c.len() > 1) {
            let classes: Vec<&str> = classes.iter().map(String::as_str).collect();
            outcome.kept = false;
            outcome.reason = Some("patient_in_two_classes".to_owned());
            outcome.detail = Some(format!("the patient has scans of {}", classes.join(" and ")));
        }
    }
}

fn write_reports(options: &PrepareOptions, outcomes: &[ScanOutcome]) -> Result<(), TrainDataError> {
    write_atomically("write report.csv", &options.out.join("report.csv"), |out| {
        let mut out = csv::Writer::from_writer(out);
        let header =
            ["scan", "patient", "class", "source", "outcome", "reason", "detail", "slices", "has_mask", "notes"];
        out.write_record(header).map_err(csv_io)?;
        for o in outcomes {
            let row = [
                o.scan.as_str(),
                &o.patient,
                &o.class,
                &o.source,
                if o.kept { "kept" } else { "refused" },
                o.reason.as_deref().unwrap_or(""),
                o.detail.as_deref().unwrap_or(""),
                &o.slices.to_string(),
                &o.has_mask.to_string(),
                &o.notes.join("; "),
            ];
            out.write_record(row).map_err(csv_io)?;
        }
        out.flush()
    })?;
    let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
    for reason in outcomes.iter().filter_map(|o| o.reason.as_deref()) {
        *reasons.entry(reason).or_default() += 1;
    }
    let kept = outcomes.iter().filter(|o| o.kept).count();
    let report = Report {
        schema: "darnet.prepare/1",
        format: options.sources.format.as_str(),
        kept,
        refused: outcomes.len() - kept,
        reasons,
        scans: outcomes,
    };
    write_atomically("write report.json", &options.out.join("report.json"), |out| {
        serde_json::to_writer_pretty(out, &report).map_err(std::io::Error::from)
    })
}

/// What reading a scan gives.
struct Read {
    volume: Vec<f16>,
    mask: Option<Vec<u8>>,
    slices: usize,
    notes: Vec<String>,
}

/// A refusal with what became known before it.
struct Refused {
    refusal: Refusal,
    slices: usize,
    notes: Vec<String>,
}

impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Self {
        Self { refusal, slices: 0, notes: Vec::new() }
    }
}

struct Work<'a> {
    options: &'a PrepareOptions,
    writer: &'a CacheWriter,
    made_with: String,
    reused: AtomicUsize,
    state: Mutex<PrepareProgress>,
}

impl Work<'_> {
    fn report(&self, done: &[ScanOutcome], progress: &(dyn Fn(&PrepareProgress) + Sync)) {
        let Ok(mut state) = self.state.lock() else { return };
        state.done += 1;
        state.kept += done.iter().filter(|o| o.kept).count();
        state.refused += done.iter().filter(|o| !o.kept).count();
        progress(&state);
    }

    fn source(&self) -> String {
        let sources = &self.options.sources;
        match sources.format {
            SourceFormat::Phantom => format!("phantom/{}", sources.phantom.ranges),
            format => format.as_str().to_owned(),
        }
    }

    fn source_window(&self) -> SourceWindow {
        match self.options.sources.format {
            SourceFormat::CcCcii => self.options.sources.source_window,
            _ => SourceWindow::Hu,
        }
    }

    fn made_with(&self, unit: &Unit) -> String {
        // A label that changed makes the scan anew.
        let of_lists = (&unit.class, &unit.patient, &unit.mask.is_some(), &unit.refused, &unit.notes);
        let order = match &unit.kind {
            UnitKind::Pictures(files) => files.iter().filter_map(|f| f.file_name()).map(|f| f.to_owned()).collect(),
            _ => Vec::new(),
        };
        let text = format!("{} {of_lists:?} {order:?}", self.made_with);
        format!("{} {}", self.made_with, hex(&Sha256::digest(text.as_bytes())[..8]))
    }

    /// What an earlier run made of the unit, all of it.
    fn done(&self, unit: &Unit, made_with: &str) -> Option<Vec<ScanOutcome>> {
        let first = self.writer.done(&unit.scan, made_with)?;
        let mut all = Vec::with_capacity(first.siblings);
        for n in 1..first.siblings {
            all.push(self.writer.done(&sibling(&unit.scan, n), made_with)?);
        }
        all.push(first);
        (!self.options.retry_refused || all.iter().all(|o| o.kept)).then_some(all)
    }

    fn unit(&self, unit: &Unit) -> Result<Vec<ScanOutcome>, TrainDataError> {
        let made_with = self.made_with(unit);
        if let Some(done) = self.done(unit, &made_with) {
            self.reused.fetch_add(done.len(), Ordering::Relaxed);
            return Ok(done);
        }
        let target = Target {
            scan: unit.scan.clone(),
            patient: unit.patient.clone().unwrap_or_else(|| unit.scan.clone()),
            made_with,
            siblings: 1,
        };
        if let Some((reason, detail)) = &unit.refused {
            return self.refuse(unit, &target, reason, detail, 0, &[]).map(|o| vec![o]);
        }
        let spec = &self.options.spec;
        let limits = &self.options.sources.limits;
        let from_file = |loaded: Result<Loaded, Refusal>| -> Result<Read, Refused> {
            let loaded = loaded?;
            let (slices, notes) = (loaded.hu.len(), loaded.notes.clone());
            let scan = loaded.into_scan(limits);
            scan.map_err(Refusal::into).and_then(|scan| self.resample(&scan, unit)).map_err(|mut refused: Refused| {
                refused.slices = slices;
                if refused.notes.is_empty() {
                    refused.notes = notes;
                }
                refused
            })
        };
        match &unit.kind {
            UnitKind::Dicom(files) => self.dicom(unit, files, &target),
            UnitKind::Pictures(files) => {
                let grey = match (self.options.sources.format, self.source_window()) {
                    (SourceFormat::Tiff16, _) | (_, SourceWindow::Hu) => {
                        let sources = &self.options.sources;
                        Grey::Numbers { slope: sources.slope, offset_hu: sources.offset_hu }
                    }
                    (_, SourceWindow::Window { center_hu, width_hu }) => Grey::window(center_hu, width_hu),
                    (_, SourceWindow::Unknown) => Grey::as_input(&spec.preprocessing),
                };
                let direction = spec.preprocessing.slice_direction;
                let read = contained(|| from_file(pictures::load(files, grey, direction, limits)));
                self.settle(unit, &target, read).map(|o| vec![o])
            }
            UnitKind::Nifti(path) => {
                self.settle(unit, &target, contained(|| from_file(nifti::load(path, limits)))).map(|o| vec![o])
            }
            UnitKind::MetaImage(path) => {
                self.settle(unit, &target, contained(|| from_file(meta_image::load(path, limits)))).map(|o| vec![o])
            }
            UnitKind::Phantom(subject) => {
                let read = contained(|| {
                    let phantom = subject.generate();
                    let loaded = Loaded {
                        geometry: phantom.geometry(),
                        hu: phantom.hu.chunks_exact(phantom.spec.slice_len()).map(<[i16]>::to_vec).collect(),
                        notes: Vec::new(),
                    };
                    let scan = loaded.into_scan(limits)?;
                    let mut read = self.resample(&scan, unit)?;
                    // What a healthy phantom shows is no pneumonia.
                    if unit.class.as_deref() != Some("healthy") {
                        let labels = phantom.lesion.chunks_exact(phantom.spec.slice_len());
                        let labels: Vec<Vec<i16>> = labels.map(|l| l.iter().map(|v| i16::from(*v)).collect()).collect();
                        let mask = scan.mask_input(&labels, &spec.preprocessing, spec.input_dhw)?;
                        read.mask = mask.contains(&1).then_some(mask);
                    }
                    Ok(read)
                });
                self.settle(unit, &target, read).map(|o| vec![o])
            }
        }
    }

    /// The series of a DICOM folder. The one with the folder's name is written last: it says how many there are.
    fn dicom(&self, unit: &Unit, files: &[PathBuf], target: &Target) -> Result<Vec<ScanOutcome>, TrainDataError> {
        let limits = &self.options.sources.limits;
        let Ok(grouped) = catch_unwind(AssertUnwindSafe(|| dicom::group(files.to_vec()))) else {
            let detail = "a fault of this program, contained";
            return self.refuse(unit, target, Reason::Internal.as_str(), detail, 0, &[]).map(|o| vec![o]);
        };
        enum Part<'a> {
            Series(&'a [dicom::SliceFile]),
            Unreadable(usize, &'a str),
        }
        let unreadable = grouped.unreadable.values().map(|(n, detail)| Part::Unreadable(*n, detail));
        let parts: Vec<Part<'_>> =
            grouped.series.values().map(|f| Part::Series(f.as_slice())).chain(unreadable).collect();
        if parts.is_empty() {
            let detail = "the folder holds no CT object";
            return self.refuse(unit, target, Reason::NotCt.as_str(), detail, 0, &[]).map(|o| vec![o]);
        }
        let mut outcomes = Vec::with_capacity(parts.len());
        for (n, part) in parts.iter().enumerate().rev() {
            let mut target = Target { siblings: parts.len(), ..target.clone() };
            if n > 0 {
                target.scan = sibling(&unit.scan, n);
            }
            outcomes.push(match part {
                Part::Series(files) => {
                    // Who it is: the folder or the labels, else PatientID, hashed; else the folder's name.
                    let id = files[0].1.patient_id.as_deref().map(str::trim).filter(|id| !id.is_empty());
                    if let (None, Some(id)) = (&unit.patient, id) {
                        let hash = Sha256::new().chain_update(b"darnet patient\0").chain_update(id).finalize();
                        target.patient = format!("id-{}", hex(&hash[..8]));
                    }
                    let read = contained(|| {
                        let scan = dicom::load(files, limits)?;
                        self.resample(&scan, unit)
                    });
                    let slices = dicom::distinct(files);
                    let read = read.map_err(|refused| Refused { slices, ..refused });
                    self.settle(unit, &target, read)?
                }
                Part::Unreadable(n, detail) => {
                    let reason = Reason::Undecodable.as_str();
                    self.refuse(unit, &target, reason, &format!("{n} files: {detail}"), *n, &[])?
                }
            });
        }
        Ok(outcomes)
    }

    /// From a scan to what the network sees.
    fn resample(&self, scan: &Scan, unit: &Unit) -> Result<Read, Refused> {
        let spec = &self.options.spec;
        let slices = scan.hu.len();
        let mut notes = scan.notes.clone();
        let refused = |refusal: Refusal, notes: &[String]| Refused { refusal, slices, notes: notes.to_vec() };
        let input =
            scan.network_input(&spec.preprocessing, spec.input_dhw).map_err(|refusal| refused(refusal, &notes))?;
        let lung = &input.lung;
        if lung.crop_cuts_lung {
            notes.push(format!("the crop leaves up to {:.0} mm of lung outside", lung.crop_cut_mm));
        }
        if lung.lung_truncated_top || lung.lung_truncated_bottom {
            notes.push("the scan ends within the lungs".to_owned());
        }
        let volume: Vec<f16> = input.values.iter().map(|v| f16::from_f32(*v)).collect();
        let mut mask = None;
        if let Some(path) = &unit.mask {
            match self.mask(path, scan) {
                Ok(lesion) if lesion.contains(&1) => mask = Some(lesion),
                Ok(_) => notes.push("the mask shows no lesion on the input grid".to_owned()),
                Err(fault) => notes.push(format!("the mask is left out: {fault}")),
            }
        }
        Ok(Read { volume, mask, slices, notes })
    }

    /// Reads a mask that lies on the scan's grid.
    fn mask(&self, path: &Path, scan: &Scan) -> Result<Vec<u8>, Refusal> {
        // Whatever number of slices the scan has is right for its mask.
        let limits = GeometryLimits { min_slices: 1, ..self.options.sources.limits.clone() };
        let name = path.file_name().map(|n| n.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
        let spec = &self.options.spec;
        let loaded = if path.is_dir() {
            let entries = std::fs::read_dir(path).map_err(|e| Refusal::new(Reason::Undecodable, e.to_string()))?;
            let mut files: Vec<PathBuf> = entries.filter_map(|e| e.ok().map(|e| e.path())).collect();
            files.sort_by_key(|f| natural_key(f));
            let numbers = Grey::Numbers { slope: 1.0, offset_hu: 0.0 };
            pictures::load(&files, numbers, spec.preprocessing.slice_direction, &limits)?
        } else if name.ends_with(".mha") || name.ends_with(".mhd") {
            meta_image::load(path, &limits)?
        } else {
            nifti::load(path, &limits)?
        };
        let mask = loaded.into_scan(&limits)?;
        let (a, b) = (&scan.stack, &mask.stack);
        let same = (a.rows, a.columns, a.in_plane, a.depth_mm.len())
            == (b.rows, b.columns, b.in_plane, b.depth_mm.len())
            && a.depth_mm.iter().zip(&b.depth_mm).all(|(a, b)| (a - b).abs() <= MASK_TOLERANCE_MM);
        if !same {
            return Err(Refusal::new(Reason::InconsistentGeometry, "it does not lie on the grid of its scan"));
        }
        scan.mask_input(&mask.hu, &spec.preprocessing, spec.input_dhw)
    }

    fn settle(&self, unit: &Unit, target: &Target, read: Result<Read, Refused>) -> Result<ScanOutcome, TrainDataError> {
        let read = match read {
            Ok(read) => read,
            Err(refused) => {
                let Refusal { reason, detail } = refused.refusal;
                return self.refuse(unit, target, reason.as_str(), &detail, refused.slices, &refused.notes);
            }
        };
        let key = unit.class.as_deref().unwrap_or_default();
        let class = self.options.spec.class_keys.iter().position(|k| k == key);
        let Some(class) = class else {
            return self.refuse(unit, target, "unlabelled", "its class is not known", read.slices, &read.notes);
        };
        let case = Case {
            scan: target.scan.clone(),
            patient: target.patient.clone(),
            class,
            source: self.source(),
            source_window: self.source_window(),
            has_mask: read.mask.is_some(),
        };
        let outcome =
            ScanOutcome { kept: true, has_mask: case.has_mask, ..self.outcome(unit, target, read.slices, &read.notes) };
        let record = NewRecord { case: &case, slices: read.slices, volume: &read.volume, mask: read.mask.as_deref() };
        self.writer.keep(&record, &outcome)?;
        Ok(outcome)
    }

    fn outcome(&self, unit: &Unit, target: &Target, slices: usize, notes: &[String]) -> ScanOutcome {
        ScanOutcome {
            scan: target.scan.clone(),
            patient: target.patient.clone(),
            class: unit.class.clone().unwrap_or_default(),
            source: self.source(),
            kept: false,
            reason: None,
            detail: None,
            notes: unit.notes.iter().chain(notes).cloned().collect(),
            slices,
            has_mask: false,
            made_with: target.made_with.clone(),
            siblings: target.siblings,
        }
    }

    fn refuse(
        &self,
        unit: &Unit,
        target: &Target,
        reason: &str,
        detail: &str,
        slices: usize,
        notes: &[String],
    ) -> Result<ScanOutcome, TrainDataError> {
        let outcome = ScanOutcome {
            reason: Some(reason.to_owned()),
            detail: Some(detail.to_owned()),
            ..self.outcome(unit, target, slices, notes)
        };
        self.writer.refuse(&outcome)?;
        Ok(outcome)
    }
}

#[derive(Clone)]
struct Target {
    scan: String,
    patient: String,
    made_with: String,
    siblings: usize,
}

/// Name of the further series of a folder.
fn sibling(scan: &str, n: usize) -> String {
    format!("{scan}#{}", n + 1)
}

/// A panic while a scan is read is the refusal of that scan.
fn contained(read: impl FnOnce() -> Result<Read, Refused>) -> Result<Read, Refused> {
    catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|_| {
        Err(Refusal::new(Reason::Internal, "a fault of this program, contained; the scan was not read").into())
    })
}
