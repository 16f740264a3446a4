//! Where scans come from: the layouts users have, found by name without opening an image.
//!
//! Input: [`SourceOptions`]. Output: [`Unit`]s in the order of their names, each with its class, patient and mask as far as
//! folders, names and lists tell, or with the reason why it is not to be read at all.
//!
//! | format | layout |
//! |---|---|
//! | `cc-ccii` | `<class>/<patient>/<scan>/NNNN.{png,jpg,bmp,tif}`, deeper on either side in some archives; its lists |
//! | `dicom` | any folders; a folder is read together, its series are scans of their own |
//! | `covid-ct-md` | `{COVID-19,Cap,Normal} Cases/<patient>/*.dcm` |
//! | `nifti`, `mha` | one file a scan (MosMedData: `CT-0` to `CT-4`; STOIC2021); masks beside |
//! | `tiff16` | folders of 16-bit pictures: `slope * value + offset` is HU |
//! | `phantom` | nothing on disk: [`Subject`]s |
//!
//! The class is the last folder with the name of one (see [`class_of_name`]), else what `--labels` or `--class` say. The
//! lists of CC-CCII that are applied: `unzip_filenames.csv` (a scan with fewer pictures than listed is refused),
//! `lesion_slices.csv` or `lesions_slices.csv` (how many slices show lesions, noted), and the cleaned list given by the
//! user (see [`CleanRow`]).
//!
//! Deliberately absent: archives (they are to be unpacked), any guess of a class from a file's content.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use crate::model::manifest::SourceWindow;
use crate::phantom::{PhantomClass, Ranges, Subject};
use crate::scan::natural_key;
use crate::train::error::TrainDataError;
use crate::train::split::MAX_ROWS;
use crate::volume::geometry::GeometryLimits;

/// Files below a root; CC-CCII has 620,000 pictures.
pub const MAX_FILES: usize = 4_000_000;
/// Folders above one another.
const MAX_DEPTH: usize = 32;

/// A layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceFormat {
    /// CC-CCII.
    CcCcii,
    /// DICOM folders.
    Dicom,
    /// COVID-CT-MD.
    CovidCtMd,
    /// NIfTI files.
    Nifti,
    /// MetaImage files.
    Mha,
    /// Folders of 16-bit TIFF.
    Tiff16,
    /// Synthetic patients.
    Phantom,
}

impl SourceFormat {
    /// Every format.
    pub const ALL: [Self; 7] =
        [Self::CcCcii, Self::Dicom, Self::CovidCtMd, Self::Nifti, Self::Mha, Self::Tiff16, Self::Phantom];

    /// The text form.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::CcCcii => "cc-ccii",
            Self::Dicom => "dicom",
            Self::CovidCtMd => "covid-ct-md",
            Self::Nifti => "nifti",
            Self::Mha => "mha",
            Self::Tiff16 => "tiff16",
            Self::Phantom => "phantom",
        }
    }
}

impl std::fmt::Display for SourceFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for SourceFormat {
    type Err = TrainDataError;

    fn from_str(text: &str) -> Result<Self, TrainDataError> {
        Self::ALL.into_iter().find(|f| f.as_str() == text).ok_or_else(|| TrainDataError::Option {
            option: "format",
            expected: Self::ALL.map(Self::as_str).join(", "),
            got: text.chars().take(40).collect(),
        })
    }
}

/// A population of phantoms.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PhantomOptions {
    /// Patients; classes take turns.
    pub count: usize,
    /// Seed of the population.
    pub seed: u64,
    /// Which ranges.
    pub ranges: Ranges,
    /// Rows and columns of a slice.
    pub side: usize,
}

/// What is read and how.
#[derive(Clone, Debug)]
pub struct SourceOptions {
    /// The layout.
    pub format: SourceFormat,
    /// The folder; of no use to `phantom`.
    pub root: PathBuf,
    /// Class key of every scan, when folders do not say.
    pub class: Option<String>,
    /// CSV of classes: a column `scan`, `PatientID`, `id` or `filename`; a column `class`, `label` or `probCOVID`; perhaps
    /// `patient` and `mask`.
    pub labels: Option<PathBuf>,
    /// Class key of a 0 in a column `probCOVID`; without it those scans are `unlabelled`.
    pub negative_class: Option<String>,
    /// CC-CCII's cleaned list.
    pub clean_list: Option<PathBuf>,
    /// Whether scans the cleaned list calls pre-segmented are kept.
    pub keep_pre_segmented: bool,
    /// What grey values of 8-bit pictures mean.
    pub source_window: SourceWindow,
    /// `tiff16`: factor.
    pub slope: f32,
    /// `tiff16`: HU of 0.
    pub offset_hu: f32,
    /// Geometry that is accepted, as in the daemon's configuration.
    pub limits: GeometryLimits,
    /// `phantom`: which.
    pub phantom: PhantomOptions,
}

impl SourceOptions {
    /// The defaults of a format.
    pub fn new(format: SourceFormat, root: impl Into<PathBuf>) -> Self {
        Self {
            format,
            root: root.into(),
            class: None,
            labels: None,
            negative_class: None,
            clean_list: None,
            keep_pre_segmented: false,
            source_window: match format {
                SourceFormat::CcCcii => SourceWindow::Unknown,
                _ => SourceWindow::Hu,
            },
            slope: 1.0,
            offset_hu: 0.0,
            limits: GeometryLimits::default(),
            phantom: PhantomOptions { count: 0, seed: 1, ranges: Ranges::Train, side: 256 },
        }
    }

    /// What changes the reading of a scan, as text: records made with other options are made anew.
    pub(crate) fn made_with(&self) -> String {
        format!("1 {} {:?} {} {} {:?}", self.format, self.source_window, self.slope, self.offset_hu, self.limits)
    }
}

/// What to open.
#[derive(Clone, Debug, PartialEq)]
pub enum UnitKind {
    /// Pictures, in order.
    Pictures(Vec<PathBuf>),
    /// Files of one folder, which may hold several series.
    Dicom(Vec<PathBuf>),
    /// A NIfTI file.
    Nifti(PathBuf),
    /// A MetaImage file.
    MetaImage(PathBuf),
    /// A synthetic patient.
    Phantom(Box<Subject>),
}

/// Something to read: one scan, or a folder of DICOM files.
#[derive(Clone, Debug, PartialEq)]
pub struct Unit {
    /// Name: the path below the root, with `/`.
    pub scan: String,
    /// Patient, when folders or lists say who.
    pub patient: Option<String>,
    /// Class key, when folders, lists or options say which.
    pub class: Option<String>,
    /// Lesion mask: a file, or a folder of pictures.
    pub mask: Option<PathBuf>,
    /// What to open.
    pub kind: UnitKind,
    /// Why it is not read: reason and detail.
    pub refused: Option<(&'static str, String)>,
    /// What lists say of it.
    pub notes: Vec<String>,
}

/// Class key of a folder's name: case, spaces and signs do not matter. `ncp`, `covid…` are `covid19`; `cp`, `cap…`,
/// `pneumonia` are `cp`; `normal…`, `healthy`, `control` are `healthy`; of MosMedData `CT-0` is `healthy`, `CT-1` to `CT-4`
/// are `covid19`; the folders of phantom cases (`cp-<seed>`) are theirs.
pub fn class_of_name(name: &str) -> Option<&'static str> {
    let seedless = match name.rsplit_once('-') {
        Some((class, seed)) if seed.len() == 16 && seed.bytes().all(|b| b.is_ascii_hexdigit()) => class,
        _ => name,
    };
    let plain: String = seedless.chars().filter(char::is_ascii_alphanumeric).collect::<String>().to_ascii_lowercase();
    let plain = plain.strip_suffix("cases").unwrap_or(&plain);
    Some(match plain {
        "ncp" | "covid" | "covid19" | "ct1" | "ct2" | "ct3" | "ct4" => "covid19",
        "cp" | "cap" | "pneumonia" | "commonpneumonia" => "cp",
        "normal" | "healthy" | "control" | "ct0" => "healthy",
        _ => return None,
    })
}

/// A row of CC-CCII's cleaned list, columns `cls,pid,scan_id,is_seg,is_repeat,repeat_ids,re_order`.
///
/// - `is_seg` true: someone has blackened what is not lung; the scan is refused unless asked for.
/// - `is_repeat` true: the same images are in the scans `repeat_ids`; of those that are there and listed, the one with the
///   lowest number is kept. Without numbers the scan is refused.
/// - `re_order`: the right order of the slices as their numbers, `3 1 2` or `[3, 1, 2]`, by file name, or by position from
///   0 when names have no such numbers. A bare "yes" without an order is refused; empty, `0`, `no` leaves the order of names.
/// - A scan that is not in the list is refused: the list names what is sound.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CleanRow {
    /// Only the lung is left of the images.
    pub is_seg: bool,
    /// Others hold the same images.
    pub is_repeat: bool,
    /// Scans with the same images.
    pub repeat_ids: Vec<u64>,
    /// The right order.
    pub re_order: ReOrder,
}

/// What a cleaned list says about order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ReOrder {
    /// The order of names is right.
    #[default]
    Keep,
    /// It is not, and nobody says what is.
    Unknown,
    /// This is.
    Order(Vec<u64>),
}

fn truth(text: &str) -> Option<bool> {
    match text.trim().to_ascii_lowercase().as_str() {
        "" | "0" | "0.0" | "no" | "false" | "nan" | "none" | "[]" => Some(false),
        "1" | "1.0" | "yes" | "true" => Some(true),
        _ => None,
    }
}

fn numbers(text: &str) -> Option<Vec<u64>> {
    let parts = text.split(|c: char| c.is_whitespace() || ",;[]()'\"".contains(c)).filter(|p| !p.is_empty());
    parts.map(|p| p.strip_suffix(".0").unwrap_or(p).parse().ok()).collect()
}

/// Reads a CSV into rows of `wanted` columns; a name of `wanted` may have several spellings. Missing optional columns are
/// empty.
fn table(
    what: &'static str,
    path: &Path,
    wanted: &[(&[&str], bool)],
) -> Result<Vec<(u64, Vec<String>)>, TrainDataError> {
    let file = std::fs::File::open(path).map_err(TrainDataError::io("open", path))?;
    let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).flexible(true).from_reader(file);
    let headers = reader.headers().map_err(|e| TrainDataError::table(what, e))?.clone();
    let mut columns = Vec::with_capacity(wanted.len());
    for (spellings, needed) in wanted {
        let is = |h: &str| spellings.iter().any(|s| h.trim_start_matches('\u{feff}').eq_ignore_ascii_case(s));
        let found = headers.iter().position(is);
        if found.is_none() && *needed {
            return Err(TrainDataError::table(what, format!("expected a column {}", spellings.join(" or "))));
        }
        columns.push(found);
    }
    let mut rows = Vec::new();
    for record in reader.records() {
        let record = record.map_err(|e| TrainDataError::table(what, e))?;
        let cells = columns.iter().map(|c| c.and_then(|c| record.get(c)).unwrap_or_default().to_owned()).collect();
        rows.push((record.position().map_or(0, csv::Position::line), cells));
        if rows.len() > MAX_FILES.max(MAX_ROWS) {
            return Err(TrainDataError::table(what, format!("expected at most {MAX_FILES} rows, got more")));
        }
    }
    Ok(rows)
}

/// Class key, patient and scan number as CC-CCII's lists and folders name a scan.
type CcKey = (&'static str, String, String);

/// Reads the cleaned list.
fn clean_list(path: &Path) -> Result<HashMap<CcKey, CleanRow>, TrainDataError> {
    let what = "read the cleaned list";
    let wanted: [(&[&str], bool); 7] = [
        (&["cls"], true),
        (&["pid"], true),
        (&["scan_id"], true),
        (&["is_seg"], true),
        (&["is_repeat"], true),
        (&["repeat_ids"], true),
        (&["re_order"], true),
    ];
    let mut out = HashMap::new();
    for (line, cells) in table(what, path, &wanted)? {
        let fault = |column: &str| TrainDataError::table(what, format!("line {line}: {column} is not understood"));
        let class = class_of_name(&cells[0]).ok_or_else(|| fault("cls"))?;
        let re_order = match truth(&cells[6]) {
            Some(false) => ReOrder::Keep,
            Some(true) => ReOrder::Unknown,
            None => match numbers(&cells[6]) {
                Some(order) => ReOrder::Order(order),
                None => ReOrder::Unknown,
            },
        };
        let row = CleanRow {
            is_seg: truth(&cells[3]).ok_or_else(|| fault("is_seg"))?,
            is_repeat: truth(&cells[4]).ok_or_else(|| fault("is_repeat"))?,
            repeat_ids: match truth(&cells[5]) {
                Some(false) => Vec::new(),
                _ => numbers(&cells[5]).ok_or_else(|| fault("repeat_ids"))?,
            },
            re_order,
        };
        let plain = |s: &str| s.strip_suffix(".0").unwrap_or(s).to_owned();
        out.insert((class, plain(&cells[1]), plain(&cells[2])), row);
    }
    Ok(out)
}

/// Orders pictures as a list says.
fn reordered(files: &[PathBuf], order: &[u64]) -> Result<Vec<PathBuf>, String> {
    let number = |p: &PathBuf| p.file_stem().and_then(|s| s.to_string_lossy().parse::<u64>().ok());
    let by_name: HashMap<u64, &PathBuf> = files.iter().filter_map(|f| Some((number(f)?, f))).collect();
    let distinct: std::collections::BTreeSet<&u64> = order.iter().collect();
    if distinct.len() != order.len() {
        return Err("a slice is named twice".to_owned());
    }
    let named: Option<Vec<PathBuf>> = order.iter().map(|n| by_name.get(n).map(|p| (*p).clone())).collect();
    let placed = || order.iter().map(|n| files.get(usize::try_from(*n).ok()?).cloned()).collect();
    named.or_else(placed).ok_or_else(|| format!("it names slices that are not among the {} there", files.len()))
}

#[derive(Clone, Debug, Default)]
struct Label {
    class: Option<String>,
    patient: Option<String>,
    mask: Option<PathBuf>,
}

/// Reads the labels; keys are as written.
fn labels(options: &SourceOptions, class_keys: &[String]) -> Result<HashMap<String, Label>, TrainDataError> {
    let what = "read the labels";
    let Some(path) = &options.labels else { return Ok(HashMap::new()) };
    let wanted: [(&[&str], bool); 5] = [
        (&["scan", "PatientID", "id", "filename", "file", "study"], true),
        (&["class", "label"], false),
        (&["probCOVID"], false),
        (&["patient"], false),
        (&["mask"], false),
    ];
    let mut out = HashMap::new();
    for (line, cells) in table(what, path, &wanted)? {
        let fault = |text: &str| TrainDataError::table(what, format!("line {line}: {text}"));
        let class = if !cells[1].is_empty() {
            let known = class_keys.iter().find(|k| **k == cells[1]).cloned();
            let known = known.or_else(|| class_of_name(&cells[1]).map(str::to_owned));
            Some(known.ok_or_else(|| fault("the class is not one of the model's"))?)
        } else {
            match truth(&cells[2]) {
                Some(true) => Some("covid19".to_owned()),
                Some(false) if !cells[2].is_empty() => options.negative_class.clone(),
                Some(false) => None,
                None => return Err(fault("expected a probCOVID of 0 or 1")),
            }
        };
        let patient = (!cells[3].is_empty()).then(|| cells[3].clone());
        let mask = (!cells[4].is_empty()).then(|| options.root.join(&cells[4]));
        out.insert(cells[0].clone(), Label { class, patient, mask });
    }
    Ok(out)
}

/// Folders with their files, both sorted; names that begin with a dot are passed over, and so are caches.
fn folders(root: &Path) -> Result<Vec<(PathBuf, Vec<PathBuf>)>, TrainDataError> {
    let mut out = Vec::new();
    let mut pending = vec![(root.to_path_buf(), 0usize)];
    let mut found = 0usize;
    while let Some((folder, depth)) = pending.pop() {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(&folder).map_err(TrainDataError::io("list", &folder))? {
            let entry = entry.map_err(TrainDataError::io("list", &folder))?;
            if entry.file_name().to_string_lossy().starts_with('.') {
                continue;
            }
            let path = entry.path();
            let kind = std::fs::metadata(&path).map_err(TrainDataError::io("look at", &path))?;
            if kind.is_dir() {
                let is_cache = path.join("cache.json").is_file() && path.join("scans").is_dir();
                if depth < MAX_DEPTH && !is_cache {
                    pending.push((path, depth + 1));
                }
            } else if kind.is_file() {
                found += 1;
                files.push(path);
            }
        }
        if found > MAX_FILES {
            let expected = format!("at most {MAX_FILES} files");
            return Err(TrainDataError::Option { option: "root", expected, got: "more".to_owned() });
        }
        files.sort();
        if !files.is_empty() {
            out.push((folder, files));
        }
    }
    out.sort();
    Ok(out)
}

fn ends(path: &Path, endings: &[&str]) -> bool {
    let name = path.file_name().map(|n| n.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
    endings.iter().any(|e| name.ends_with(e))
}

/// Name of a path below the root.
fn relative(root: &Path, path: &Path) -> String {
    let below = path.strip_prefix(root).unwrap_or(path);
    let parts: Vec<String> = below.components().map(|c| c.as_os_str().to_string_lossy().into_owned()).collect();
    if parts.is_empty() { ".".to_owned() } else { parts.join("/") }
}

/// The class that folders say, and what follows below it.
fn class_and_rest(scan: &str) -> Option<(&'static str, Vec<&str>)> {
    let parts: Vec<&str> = scan.split('/').collect();
    let at = parts.iter().rposition(|p| class_of_name(p).is_some())?;
    Some((class_of_name(parts[at])?, parts[at + 1..].to_vec()))
}

/// A file's name without its last endings.
fn stem_of(path: &Path) -> String {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let lower = name.to_ascii_lowercase();
    let cut = [".nii.gz", ".nii", ".mha", ".mhd"].iter().find(|e| lower.ends_with(**e)).map_or(0, |e| e.len());
    name[..name.len() - cut].to_owned()
}

const PICTURES: [&str; 6] = [".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"];
/// What lies beside DICOM files and is none.
const NOT_DICOM: [&str; 19] = [
    ".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".csv", ".tsv", ".txt", ".json", ".xml", ".xlsx", ".xls", ".md",
    ".pdf", ".nii", ".nii.gz", ".npy", ".zip",
];
/// Names of masks: they are no scans.
const MASK_WORDS: [&str; 4] = ["mask", "lesion", "_seg", "lung."];

/// Finds what there is to read, in the order of names.
///
/// # Errors
/// A root or list that cannot be read; a list that is not understood; a class that the model does not have; nothing found.
pub fn discover(options: &SourceOptions, class_keys: &[String]) -> Result<Vec<Unit>, TrainDataError> {
    for key in [&options.class, &options.negative_class].into_iter().flatten() {
        if !class_keys.contains(key) {
            let expected = class_keys.join(", ");
            return Err(TrainDataError::Option { option: "class", expected, got: key.chars().take(40).collect() });
        }
    }
    if options.format == SourceFormat::Phantom {
        return phantoms(&options.phantom, class_keys);
    }
    let labels = labels(options, class_keys)?;
    let tree = folders(&options.root)?;
    let mut units = match options.format {
        SourceFormat::CcCcii => cc_ccii(options, &tree)?,
        SourceFormat::Tiff16 => pictures(options, &tree, &[".tif", ".tiff"]),
        SourceFormat::Dicom | SourceFormat::CovidCtMd => dicom(options, &tree),
        SourceFormat::Nifti => volumes(options, &tree, &[".nii", ".nii.gz"]),
        SourceFormat::Mha => volumes(options, &tree, &[".mha", ".mhd"]),
        SourceFormat::Phantom => Vec::new(),
    };
    if units.is_empty() {
        let expected = match options.format {
            SourceFormat::CcCcii => "folders of PNG, JPEG, BMP or TIFF slices",
            SourceFormat::Tiff16 => "folders of TIFF slices",
            SourceFormat::Nifti => "NIfTI files (.nii, .nii.gz)",
            SourceFormat::Mha => "MetaImage files (.mha, .mhd)",
            _ => "DICOM files",
        };
        return Err(TrainDataError::Nothing { expected });
    }
    for unit in &mut units {
        let last = unit.scan.rsplit('/').next().unwrap_or(&unit.scan);
        let file = match &unit.kind {
            UnitKind::Nifti(path) | UnitKind::MetaImage(path) => stem_of(path),
            _ => last.to_owned(),
        };
        let label = [unit.scan.as_str(), last, &file].into_iter().find_map(|name| labels.get(name));
        if let Some(label) = label {
            unit.class = label.class.clone().or(unit.class.take());
            unit.patient = label.patient.clone().or(unit.patient.take());
            unit.mask = label.mask.clone().or(unit.mask.take());
        } else if options.labels.is_some() {
            unit.class = None;
        }
        if unit.class.is_none() {
            unit.class = options.class.clone();
        }
        let known = unit.class.as_ref().is_some_and(|c| class_keys.contains(c));
        if !known && unit.refused.is_none() {
            let detail = "neither folders nor labels say which class it has; name --labels or --class";
            unit.refused = Some(("unlabelled", detail.to_owned()));
        }
        if !known {
            unit.class = None;
        }
    }
    units.sort_by(|a, b| a.scan.cmp(&b.scan));
    Ok(units)
}

fn phantoms(options: &PhantomOptions, class_keys: &[String]) -> Result<Vec<Unit>, TrainDataError> {
    if !(1..=crate::train::cache::MAX_SCANS).contains(&options.count) {
        let expected = format!("1 to {}", crate::train::cache::MAX_SCANS);
        return Err(TrainDataError::Option { option: "count", expected, got: options.count.to_string() });
    }
    let classes: Vec<PhantomClass> =
        class_keys.iter().filter_map(|k| PhantomClass::ALL.iter().copied().find(|c| c.class_key() == k)).collect();
    if classes.len() != class_keys.len() {
        let expected = "classes the phantom has: cp, covid19, healthy".to_owned();
        return Err(TrainDataError::Option { option: "format", expected, got: class_keys.join(",") });
    }
    (0..options.count)
        .map(|index| {
            let class = classes[index % classes.len()];
            let subject = Subject::numbered(class, index, options.seed, options.ranges, options.side);
            let subject = subject.map_err(|e| TrainDataError::Option {
                option: "side",
                expected: "64 to 1024".to_owned(),
                got: e.to_string(),
            })?;
            let name = format!("phantom/{}/{}/{}/{index:06}", options.ranges, options.seed, options.side);
            Ok(Unit {
                patient: Some(name.clone()),
                scan: name,
                class: Some(class.class_key().to_owned()),
                mask: None,
                kind: UnitKind::Phantom(Box::new(subject)),
                refused: None,
                notes: Vec::new(),
            })
        })
        .collect()
}

type Tree = [(PathBuf, Vec<PathBuf>)];

fn of_endings(files: &[PathBuf], endings: &[&str]) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = files.iter().filter(|f| ends(f, endings)).cloned().collect();
    files.sort_by_key(|f| natural_key(f));
    files
}

/// Whether a folder is `lesion` or `lung` beside one of pictures.
fn is_mask_folder(folder: &Path) -> bool {
    let name = folder.file_name().map(|n| n.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
    ["lesion", "lung", "mask", "masks"].contains(&name.as_str())
}

fn pictures(options: &SourceOptions, tree: &Tree, endings: &[&str]) -> Vec<Unit> {
    let mut units = Vec::new();
    for (folder, files) in tree {
        let files = of_endings(files, endings);
        if files.is_empty() || is_mask_folder(folder) {
            continue;
        }
        let scan = relative(&options.root, folder);
        let found = class_and_rest(&scan);
        let patient = match &found {
            Some((_, rest)) => rest.first().map(|p| (*p).to_owned()),
            None => scan.split('/').next().map(str::to_owned),
        };
        let mask = folder.parent().map(|p| p.join("lesion")).filter(|p| p.is_dir());
        let class = found.map(|(class, _)| class.to_owned());
        units.push(Unit {
            patient: patient.or_else(|| Some(scan.clone())),
            scan,
            class,
            mask,
            kind: UnitKind::Pictures(files),
            refused: None,
            notes: Vec::new(),
        });
    }
    units
}

fn cc_ccii(options: &SourceOptions, tree: &Tree) -> Result<Vec<Unit>, TrainDataError> {
    let mut units = pictures(options, tree, &PICTURES);
    let at_root = |names: &[&str]| names.iter().map(|n| options.root.join(n)).find(|p| p.is_file());
    let mut listed: HashMap<CcKey, usize> = HashMap::new();
    if let Some(path) = at_root(&["unzip_filenames.csv"]) {
        let wanted: [(&[&str], bool); 4] =
            [(&["label"], true), (&["patient_id"], true), (&["scan_id"], true), (&["n_slice"], true)];
        for (_, cells) in table("read unzip_filenames.csv", &path, &wanted)? {
            if let (Some(class), Ok(n)) = (class_of_name(&cells[0]), cells[3].parse()) {
                listed.insert((class, cells[1].clone(), cells[2].clone()), n);
            }
        }
    }
    let mut lesions: HashMap<CcKey, usize> = HashMap::new();
    if let Some(path) = at_root(&["lesion_slices.csv", "lesions_slices.csv"]) {
        for (_, cells) in table("read the lesion list", &path, &[(&["imgpath", "path", "img_path"], true)])? {
            let parts: Vec<&str> = cells[0].split(['/', '\\']).collect();
            if let [.., class, patient, scan, _] = parts[..]
                && let Some(class) = class_of_name(class)
            {
                *lesions.entry((class, patient.to_owned(), scan.to_owned())).or_default() += 1;
            }
        }
    }
    let clean = options.clean_list.as_deref().map(clean_list).transpose()?;
    // Numbers as the lists have them: the patient, then the scan, are the first two folders below the class.
    let key_of = |unit: &Unit| -> Option<CcKey> {
        let (class, rest) = class_and_rest(&unit.scan)?;
        let patient = (*rest.first()?).to_owned();
        Some((class, patient.clone(), rest.get(1).map_or(patient, |s| (*s).to_owned())))
    };
    let here: std::collections::HashSet<CcKey> = units.iter().filter_map(key_of).collect();
    for unit in &mut units {
        let Some(key) = key_of(unit) else { continue };
        let UnitKind::Pictures(files) = &mut unit.kind else { continue };
        if let Some(n) = lesions.get(&key) {
            unit.notes.push(format!("the lesion list names {n} of its slices"));
        }
        match listed.get(&key) {
            Some(n) if *n > files.len() => {
                let detail = format!("unzip_filenames.csv lists {n} slices, {} are there", files.len());
                unit.refused = Some(("incomplete", detail));
                continue;
            }
            Some(n) if *n < files.len() => {
                unit.notes.push(format!("unzip_filenames.csv lists {n} slices, {} are there", files.len()));
            }
            _ => {}
        }
        let Some(clean) = &clean else { continue };
        let Some(row) = clean.get(&key) else {
            unit.refused = Some(("not_listed", "the cleaned list does not name it".to_owned()));
            continue;
        };
        if row.is_seg {
            if !options.keep_pre_segmented {
                let detail = "the cleaned list calls it pre-segmented; --keep-pre-segmented keeps such scans";
                unit.refused = Some(("pre_segmented", detail.to_owned()));
                continue;
            }
            unit.notes.push("the cleaned list calls it pre-segmented".to_owned());
        }
        if row.is_repeat {
            let own = key.2.parse::<u64>().unwrap_or(u64::MAX);
            // A repeat that is refused itself cannot stand for this one.
            let stands = |id: &u64| {
                let of_patient = |c: &CcKey| c.2 == id.to_string();
                here.iter().filter(|c| of_patient(c)).any(|c| {
                    clean
                        .get(c)
                        .is_some_and(|r| (!r.is_seg || options.keep_pre_segmented) && r.re_order != ReOrder::Unknown)
                })
            };
            match row.repeat_ids.iter().filter(|id| **id != own && stands(id)).min() {
                Some(first) if *first < own => {
                    let detail = format!("the cleaned list calls it a repeat of scan {first}");
                    unit.refused = Some(("repeated", detail));
                    continue;
                }
                Some(_) => unit.notes.push("the cleaned list names repeats of it".to_owned()),
                None if row.repeat_ids.is_empty() => {
                    let detail = "the cleaned list calls it a repeat and does not say of which";
                    unit.refused = Some(("repeated", detail.to_owned()));
                    continue;
                }
                None => unit.notes.push("the scans it repeats are not there".to_owned()),
            }
        }
        match &row.re_order {
            ReOrder::Keep => {}
            ReOrder::Unknown => {
                let detail = "the cleaned list says its slices are out of order and not in which they belong";
                unit.refused = Some(("out_of_order", detail.to_owned()));
            }
            ReOrder::Order(order) => match reordered(files, order) {
                Ok(sorted) => {
                    if sorted.len() < files.len() {
                        let left = files.len() - sorted.len();
                        unit.notes.push(format!("{left} slices that the cleaned list's order leaves out"));
                    }
                    unit.notes.push("slices in the cleaned list's order".to_owned());
                    *files = sorted;
                }
                Err(fault) => unit.refused = Some(("out_of_order", format!("the cleaned list's order: {fault}"))),
            },
        }
    }
    Ok(units)
}

fn dicom(options: &SourceOptions, tree: &Tree) -> Vec<Unit> {
    let mut units = Vec::new();
    for (folder, files) in tree {
        let files: Vec<PathBuf> =
            files.iter().filter(|f| !ends(f, &NOT_DICOM) && !ends(f, &["dicomdir"])).cloned().collect();
        if files.is_empty() {
            continue;
        }
        let scan = relative(&options.root, folder);
        let found = class_and_rest(&scan);
        // Elsewhere PatientID says who it is.
        let patient = match (&found, options.format) {
            (Some((_, rest)), SourceFormat::CovidCtMd) => rest.first().map(|p| (*p).to_owned()),
            _ => None,
        };
        let mask = folder.parent().map(|p| p.join("lesion.nii.gz")).filter(|p| p.is_file());
        let class = found.map(|(class, _)| class.to_owned());
        units.push(Unit { scan, patient, class, mask, kind: UnitKind::Dicom(files), refused: None, notes: Vec::new() });
    }
    units
}

fn volumes(options: &SourceOptions, tree: &Tree, endings: &[&str]) -> Vec<Unit> {
    let is_mask = |path: &Path| {
        let name = path.file_name().map(|n| n.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
        MASK_WORDS.iter().any(|w| name.contains(w)) || path.parent().is_some_and(is_mask_folder)
    };
    let all: Vec<&PathBuf> = tree.iter().flat_map(|(_, files)| files).filter(|f| ends(f, endings)).collect();
    // Masks by the name of their scan, wherever they lie.
    let mut masks: BTreeMap<String, &PathBuf> = BTreeMap::new();
    for path in all.iter().filter(|p| is_mask(p)) {
        let stem = stem_of(path);
        let name = ["_mask", "-mask", "_seg", "_lesion", "-lesion"].iter().find_map(|e| stem.strip_suffix(e));
        masks.insert(name.unwrap_or(&stem).to_owned(), path);
    }
    let mut units = Vec::new();
    for path in all.into_iter().filter(|p| !is_mask(p)) {
        let scan = relative(&options.root, path);
        let folder = path.parent().unwrap_or(&options.root);
        let stem = stem_of(path);
        let general = ["ct", "image", "volume", "scan"].contains(&stem.to_ascii_lowercase().as_str());
        let beside = ["lesion.nii.gz", "lesion.nii"].iter().map(|n| folder.join(n)).find(|p| p.is_file());
        let patient = if general { relative(&options.root, folder) } else { stem.clone() };
        units.push(Unit {
            class: class_and_rest(&scan).map(|(class, _)| class.to_owned()),
            scan,
            patient: Some(patient),
            mask: beside.or_else(|| masks.get(&stem).map(|p| (*p).clone())),
            kind: if ends(path, &[".mha", ".mhd"]) {
                UnitKind::MetaImage(path.clone())
            } else {
                UnitKind::Nifti(path.clone())
            },
            refused: None,
            notes: Vec::new(),
        });
    }
    units
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys() -> Vec<String> {
        ["cp", "covid19", "healthy"].map(str::to_owned).to_vec()
    }

    fn touch(root: &Path, names: &[&str]) {
        for name in names {
            let path = root.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, b"").unwrap();
        }
    }

    /// Scan, patient, class, why it is not read.
    type Found = (String, Option<String>, Option<String>, Option<&'static str>);

    fn found(options: &SourceOptions) -> Vec<Found> {
        let units = discover(options, &keys()).unwrap();
        units.into_iter().map(|u| (u.scan, u.patient, u.class, u.refused.map(|(reason, _)| reason))).collect()
    }

    #[test]
    fn names_of_classes_in_every_spelling() {
        for (name, class) in [
            ("NCP", "covid19"),
            ("COVID-19 Cases", "covid19"),
            ("Cap Cases", "cp"),
            ("CP", "cp"),
            ("Normal Cases", "healthy"),
            ("CT-0", "healthy"),
            ("CT-3", "covid19"),
            ("covid-00000000000000ff", "covid19"),
        ] {
            assert_eq!(class_of_name(name), Some(class), "{name}");
        }
        assert_eq!(class_of_name("patient-1"), None);
        assert_eq!(class_of_name("CT-9"), None);
    }

    #[test]
    fn cc_ccii_is_found_at_any_depth_with_natural_order() {
        let dir = tempfile::tempdir().unwrap();
        let names =
            ["COVID19-1/NCP/7/100/10.png", "COVID19-1/NCP/7/100/9.JPG", "CP/8/200/deep/1.bmp", "Normal/9/300/1.tif"];
        touch(dir.path(), &names);
        let options = SourceOptions::new(SourceFormat::CcCcii, dir.path());
        let units = discover(&options, &keys()).unwrap();
        let summary: Vec<_> = units.iter().map(|u| (u.patient.as_deref(), u.class.as_deref())).collect();
        assert_eq!(summary, [(Some("7"), Some("covid19")), (Some("8"), Some("cp")), (Some("9"), Some("healthy"))]);
        let UnitKind::Pictures(files) = &units[0].kind else { panic!("pictures") };
        assert!(files[0].ends_with("9.JPG") && files[1].ends_with("10.png"));
        assert_eq!(options.source_window, SourceWindow::Unknown);
    }

    #[test]
    fn the_lists_of_cc_ccii_are_applied() {
        let dir = tempfile::tempdir().unwrap();
        for scan in 100..109 {
            for slice in 1..4 {
                touch(dir.path(), &[&format!("NCP/7/{scan}/{slice:04}.png")]);
            }
        }
        let list = "zip_file,label,patient_id,scan_id,n_slice\na.zip,NCP,7,100,5\na.zip,NCP,7,101,3\n";
        std::fs::write(dir.path().join("unzip_filenames.csv"), list).unwrap();
        std::fs::write(dir.path().join("lesions_slices.csv"), "imgpath\nNCP/7/101/0001.jpg\nNCP/7/101/0002.jpg\n")
            .unwrap();
        let clean = dir.path().join("clean.csv");
        let rows = "cls,pid,scan_id,is_seg,is_repeat,repeat_ids,re_order\n\
                    NCP,7,100,0,0,,\nNCP,7,101,0,0,,0\nNCP,7,102,1,0,,\nNCP,7,103,0,1,[104],\nNCP,7,104,0,1,103,\n\
                    NCP,7,105,0,1,,\nNCP,7,106,0,0,,\"[3, 1, 2]\"\nNCP,7,107,0,0,,1\n";
        std::fs::write(&clean, rows).unwrap();
        let mut options = SourceOptions::new(SourceFormat::CcCcii, dir.path());
        options.clean_list = Some(clean.clone());
        let reasons: Vec<Option<&str>> = found(&options).into_iter().map(|u| u.3).collect();
        let expected = [
            Some("incomplete"),
            None,
            Some("pre_segmented"),
            None,
            Some("repeated"),
            Some("repeated"),
            None,
            Some("out_of_order"),
            Some("not_listed"),
        ];
        assert_eq!(reasons, expected);
        let units = discover(&options, &keys()).unwrap();
        assert_eq!(units[1].notes, ["the lesion list names 2 of its slices"]);
        let UnitKind::Pictures(files) = &units[6].kind else { panic!("pictures") };
        let names: Vec<_> = files.iter().map(|f| f.file_stem().unwrap().to_string_lossy().into_owned()).collect();
        assert_eq!(names, ["0003", "0001", "0002"]);
        options.keep_pre_segmented = true;
        assert_eq!(found(&options)[2].3, None);
        // The other spelling; a column that is missing.
        std::fs::rename(dir.path().join("lesions_slices.csv"), dir.path().join("lesion_slices.csv")).unwrap();
        assert_eq!(discover(&options, &keys()).unwrap()[1].notes.len(), 1);
        std::fs::write(&clean, "cls,pid\n").unwrap();
        let error = discover(&options, &keys()).unwrap_err().to_string();
        assert!(error.contains("expected a column scan_id"), "{error}");
    }

    #[test]
    fn volumes_find_their_masks_classes_and_labels() {
        let dir = tempfile::tempdir().unwrap();
        let names = [
            "studies/CT-0/study_0001.nii.gz",
            "studies/CT-2/study_0255.nii.gz",
            "masks/study_0255_mask.nii.gz",
            "cp-0000000000000001/ct.nii.gz",
            "cp-0000000000000001/lesion.nii.gz",
            "cp-0000000000000001/lung.nii.gz",
            "other/x.nii",
        ];
        touch(dir.path(), &names);
        let mut options = SourceOptions::new(SourceFormat::Nifti, dir.path());
        let units = discover(&options, &keys()).unwrap();
        let of = |name: &str| units.iter().find(|u| u.scan == name).unwrap();
        assert_eq!(units.len(), 4);
        assert_eq!(of("studies/CT-0/study_0001.nii.gz").class.as_deref(), Some("healthy"));
        let mosmed = of("studies/CT-2/study_0255.nii.gz");
        assert!(mosmed.mask.as_ref().is_some_and(|m| m.ends_with("masks/study_0255_mask.nii.gz")));
        assert_eq!((mosmed.class.as_deref(), mosmed.patient.as_deref()), (Some("covid19"), Some("study_0255")));
        let phantom = of("cp-0000000000000001/ct.nii.gz");
        assert!(phantom.mask.is_some() && phantom.patient.as_deref() == Some("cp-0000000000000001"));
        assert_eq!(of("other/x.nii").refused.as_ref().map(|r| r.0), Some("unlabelled"));
        let labels = dir.path().join("reference.csv");
        std::fs::write(&labels, "PatientID,probCOVID,probSevere\nx,0,0\nstudy_0001,1,0\n").unwrap();
        options.labels = Some(labels);
        options.negative_class = Some("healthy".to_owned());
        let found = found(&options);
        assert!(found.contains(&("other/x.nii".into(), Some("x".into()), Some("healthy".into()), None)));
        let relabelled = found.iter().find(|f| f.0.ends_with("0001.nii.gz")).unwrap();
        assert_eq!(relabelled.2.as_deref(), Some("covid19"));
        assert_eq!(found.iter().filter(|f| f.3 == Some("unlabelled")).count(), 2, "the labels name two");
        options.class = Some("flu".to_owned());
        assert!(discover(&options, &keys()).is_err());
    }

    #[test]
    fn an_empty_folder_says_what_was_looked_for() {
        let dir = tempfile::tempdir().unwrap();
        for format in SourceFormat::ALL.into_iter().filter(|f| *f != SourceFormat::Phantom) {
            let error = discover(&SourceOptions::new(format, dir.path()), &keys()).unwrap_err();
            assert!(matches!(error, TrainDataError::Nothing { .. }), "{format}: {error}");
            assert_eq!(format.as_str().parse::<SourceFormat>().unwrap(), format);
        }
        let error = discover(&SourceOptions::new(SourceFormat::Nifti, dir.path().join("none")), &keys()).unwrap_err();
        assert!(matches!(error, TrainDataError::Io { .. }));
    }
}
