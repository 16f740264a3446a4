//! Plans on disk: one file each, with what it was built from and for.
//!
//! ```text
//! offset  bytes  field
//!      0      8  "DARNETTP"
//!      8      4  version, u32 little endian
//!     12      4  bytes of the key, u32 little endian
//!     16      8  bytes of the plan, u64 little endian
//!     24     32  SHA-256 over bytes 0 to 24, the key and the plan
//!     56         the key, JSON
//!                the plan, as its library serialised it
//! ```
//!
//! Input and output: a [`PlanKey`] and the plan's bytes. Invariants: a file is whole or refused, by length and SHA-256,
//! before any of it reaches the library; a plan whose key differs in anything is refused and never run. A file is
//! written beside, synced, and renamed. Like a model's weights, a plan is trusted as far as whoever can write to its
//! folder: the checksum finds damage, not malice.
//!
//! Deliberately absent: anything that knows the GPU or calls the library.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::Precision;
use crate::model::{Architecture, Model};

const MAGIC: &[u8; 8] = b"DARNETTP";
/// Version of the layout above.
const VERSION: u32 = 1;
/// Counts changes of what is built from the same model: what an earlier version built is not run.
const NETWORK_VERSION: u32 = 1;
const HEADER: usize = 56;
/// Where the checksum stands; what comes before is part of what it covers.
const CHECKSUM_AT: usize = 24;
/// Bound on a key: about 600 bytes; device names and versions are short.
const MAX_KEY_BYTES: usize = 64 << 10;
/// Bound on a plan: that of the full network by TensorRT for RTX is 86 MB in float16 and 147 MB in float32.
const MAX_PLAN_BYTES: u64 = 2 << 30;
/// Files of a folder that `engine show` looks at.
const MAX_LISTED: usize = 1024;
/// Ending of a plan's file name.
const EXTENSION: &str = "plan";

/// Why a plan's file is not used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// It could not be read or written.
    #[error("{action} {path}: {reason}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// The file.
        path: String,
        /// Why it failed.
        reason: String,
    },
    /// There is none.
    #[error("no plan for {0}; build it with `darnet engine build`")]
    Absent(String),
    /// It is something else.
    #[error("{path}: expected a plan of this program, layout {VERSION}: {reason}")]
    Format {
        /// The file.
        path: String,
        /// What differs.
        reason: &'static str,
    },
    /// It is cut short or longer than it says.
    #[error("{path}: expected {expected} bytes, got {got}: torn; build it anew with `darnet engine build`")]
    Torn {
        /// The file.
        path: String,
        /// What the header says.
        expected: u64,
        /// What there is.
        got: u64,
    },
    /// Its content is not what was written.
    #[error("{path}: the checksum does not fit: damaged; build it anew with `darnet engine build`")]
    Checksum {
        /// The file.
        path: String,
    },
    /// It was built from or for something else.
    #[error("{path}: {field}: expected {expected}, the plan was built for {got}; `darnet engine build` makes one")]
    Mismatch {
        /// The file.
        path: String,
        /// The field of the key.
        field: &'static str,
        /// What is here.
        expected: String,
        /// What the plan was built for.
        got: String,
    },
}

/// What a plan was built from and for. Another value in any field is another plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanKey {
    /// SHA-256 of the model's weights.
    pub model_sha256: String,
    /// What the weights do not say: attentions, their order, input shape, classes.
    pub architecture: Architecture,
    /// Version of what this program builds from a model.
    pub network: u32,
    /// Number format.
    pub precision: Precision,
    /// `TensorRT` or `TensorRT for RTX`.
    pub library: String,
    /// Its version.
    pub library_version: String,
    /// Name of the GPU, empty where it was built without one.
    pub gpu: String,
    /// Its compute capability.
    pub compute_capability: String,
    /// Version of its driver.
    pub driver: String,
}

impl PlanKey {
    /// The key of `model` on this library and GPU; `device` is none where there is no GPU, and such a plan runs nowhere.
    pub fn new(
        model: &Model,
        precision: Precision,
        library: &super::Library,
        device: Option<&super::device::DeviceInfo>,
    ) -> Self {
        Self {
            model_sha256: model.sha256.clone(),
            architecture: model.manifest.architecture.clone(),
            network: NETWORK_VERSION,
            precision,
            library: library.product().to_owned(),
            library_version: library.version(),
            gpu: device.map(|d| d.name.clone()).unwrap_or_default(),
            compute_capability: device.map(|d| d.compute_capability.clone()).unwrap_or_default(),
            driver: device.map(|d| d.driver.clone()).unwrap_or_default(),
        }
    }

    /// For messages.
    pub fn describe(&self) -> String {
        let gpu = if self.gpu.is_empty() { "no GPU" } else { &self.gpu };
        format!(
            "model {}, {}, {} {}, {gpu}",
            self.model_sha256.get(..12).unwrap_or_default(),
            self.precision.as_str(),
            self.library,
            self.library_version
        )
    }

    fn json(&self) -> Vec<u8> {
        // A structure of strings, numbers and named values has a JSON form.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// Name of the plan's file: precision and the key's SHA-256.
    pub fn file_name(&self) -> String {
        let digest = Sha256::digest(self.json());
        let short: String = digest.iter().take(8).map(|b| format!("{b:02x}")).collect();
        format!("tensorrt-{}-{short}.{EXTENSION}", self.precision.as_str())
    }

    /// The first field in which `got` differs.
    fn difference(&self, got: &Self) -> Option<(&'static str, String, String)> {
        let fields = [
            ("model SHA-256", self.model_sha256.clone(), got.model_sha256.clone()),
            ("architecture", format!("{:?}", self.architecture), format!("{:?}", got.architecture)),
            ("network version", self.network.to_string(), got.network.to_string()),
            ("precision", self.precision.as_str().to_owned(), got.precision.as_str().to_owned()),
            ("library", self.library.clone(), got.library.clone()),
            ("library version", self.library_version.clone(), got.library_version.clone()),
            ("GPU", self.gpu.clone(), got.gpu.clone()),
            ("compute capability", self.compute_capability.clone(), got.compute_capability.clone()),
            ("driver", self.driver.clone(), got.driver.clone()),
        ];
        let named = |text: String| if text.is_empty() { "none".to_owned() } else { text };
        fields.into_iter().find(|(_, a, b)| a != b).map(|(field, a, b)| (field, named(a), named(b)))
    }
}

/// A plan as read from its file.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanFile {
    /// What it was built from and for.
    pub key: PlanKey,
    /// The library's bytes.
    pub plan: Vec<u8>,
}

fn io_error(action: &'static str, path: &Path, error: &io::Error) -> PlanError {
    PlanError::Io { action, path: path.display().to_string(), reason: error.to_string() }
}

/// Writes a plan, whole or not at all.
///
/// # Errors
/// What the system says; nothing is left behind.
pub fn write(path: &Path, key: &PlanKey, plan: &[u8]) -> Result<(), PlanError> {
    let key = key.json();
    let mut header = [0u8; HEADER];
    header[..8].copy_from_slice(MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[12..16].copy_from_slice(&(key.len() as u32).to_le_bytes());
    header[16..24].copy_from_slice(&(plan.len() as u64).to_le_bytes());
    let sum = checksum(&header, &key, plan);
    header[CHECKSUM_AT..].copy_from_slice(&sum);
    let beside = path.with_extension(format!("{}.new", std::process::id()));
    let written = (|| {
        let mut file = File::create(&beside)?;
        for part in [&header[..], &key, plan] {
            file.write_all(part)?;
        }
        file.sync_all()?;
        std::fs::rename(&beside, path)
    })();
    written.map_err(|error| {
        let _ = std::fs::remove_file(&beside);
        io_error("write", path, &error)
    })
}

fn checksum(header: &[u8; HEADER], key: &[u8], plan: &[u8]) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(&header[..CHECKSUM_AT]);
    hash.update(key);
    hash.update(plan);
    hash.finalize().into()
}

/// Header and key of an open file, and its length.
struct Opened {
    file: File,
    header: [u8; HEADER],
    key_bytes: Vec<u8>,
    key: PlanKey,
    plan_len: u64,
}

fn open(path: &Path) -> Result<Opened, PlanError> {
    let name = || path.display().to_string();
    let read = |error: io::Error| io_error("read", path, &error);
    let mut file = File::open(path).map_err(read)?;
    let got = file.metadata().map_err(read)?.len();
    let mut header = [0u8; HEADER];
    if got < HEADER as u64 {
        return Err(PlanError::Torn { path: name(), expected: HEADER as u64, got });
    }
    file.read_exact(&mut header).map_err(read)?;
    let number = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    if &header[..8] != MAGIC {
        return Err(PlanError::Format { path: name(), reason: "it begins with something else" });
    }
    if number(8) != VERSION {
        return Err(PlanError::Format { path: name(), reason: "it has another version" });
    }
    let key_len = number(12) as usize;
    let plan_len = u64::from(number(16)) | u64::from(number(20)) << 32;
    if key_len > MAX_KEY_BYTES || plan_len > MAX_PLAN_BYTES {
        return Err(PlanError::Format { path: name(), reason: "it says it is larger than a plan can be" });
    }
    let expected = HEADER as u64 + key_len as u64 + plan_len;
    if got != expected {
        return Err(PlanError::Torn { path: name(), expected, got });
    }
    let mut key_bytes = vec![0; key_len];
    file.read_exact(&mut key_bytes).map_err(read)?;
    let key = serde_json::from_slice(&key_bytes)
        .map_err(|_| PlanError::Format { path: name(), reason: "its key is not one of this version" })?;
    Ok(Opened { file, header, key_bytes, key, plan_len })
}

/// Reads the plan at `path` if it was built for `key`; a key that differs is found before the plan is read.
///
/// # Errors
/// Absent, torn, damaged, or built from or for something else.
pub fn read(path: &Path, key: &PlanKey) -> Result<PlanFile, PlanError> {
    if !path.exists() {
        return Err(PlanError::Absent(key.describe()));
    }
    let mut opened = open(path)?;
    if let Some((field, expected, got)) = key.difference(&opened.key) {
        return Err(PlanError::Mismatch { path: path.display().to_string(), field, expected, got });
    }
    let plan = rest(path, &mut opened)?;
    Ok(PlanFile { key: opened.key, plan })
}

/// The plan behind the key, its checksum proved.
fn rest(path: &Path, opened: &mut Opened) -> Result<Vec<u8>, PlanError> {
    let read = |error: io::Error| io_error("read", path, &error);
    let mut plan = Vec::with_capacity(opened.plan_len as usize);
    (&mut opened.file).take(opened.plan_len).read_to_end(&mut plan).map_err(read)?;
    if checksum(&opened.header, &opened.key_bytes, &plan) != opened.header[CHECKSUM_AT..] {
        return Err(PlanError::Checksum { path: path.display().to_string() });
    }
    Ok(plan)
}

/// A plan of a folder, or why it is none.
#[derive(Clone, Debug, PartialEq)]
pub struct Listed {
    /// The file.
    pub path: PathBuf,
    /// Its size in bytes.
    pub bytes: u64,
    /// Its key, if it is whole.
    pub key: Result<PlanKey, PlanError>,
}

/// Files that are named like plans.
fn plan_files(folders: &[PathBuf]) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = folders
        .iter()
        .filter_map(|folder| std::fs::read_dir(folder).ok())
        .flat_map(|entries| entries.filter_map(Result::ok).map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|e| e == EXTENSION))
        .take(MAX_LISTED)
        .collect();
    paths.sort();
    paths.dedup();
    paths
}

/// The plans of the folders, each read whole so that damage shows; a folder that is not there has none.
pub fn list(folders: &[PathBuf]) -> Vec<Listed> {
    plan_files(folders)
        .into_iter()
        .map(|path| {
            let bytes = std::fs::metadata(&path).map_or(0, |m| m.len());
            let key = open(&path).and_then(|mut opened| rest(&path, &mut opened).map(|_| opened.key));
            Listed { path, bytes, key }
        })
        .collect()
}

/// Where plans of `model` may lie: its folder, then a cache folder of the user's or the service's.
///
/// The second serves the embedded model and folders that cannot be written. It is `$CACHE_DIRECTORY` (set by systemd),
/// else `$XDG_CACHE_HOME/darnet`, else `~/.cache/darnet`, and in it `engines/` and the model's SHA-256.
pub fn folders(model: &Model) -> Vec<PathBuf> {
    let from = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let cache = from("CACHE_DIRECTORY")
        .or_else(|| from("XDG_CACHE_HOME").map(|home| home.join("darnet")))
        .or_else(|| from("HOME").map(|home| home.join(".cache").join("darnet")));
    let cache = cache.map(|cache| cache.join("engines").join(model.sha256.get(..16).unwrap_or(&model.sha256)));
    model.dir.iter().cloned().chain(cache).collect()
}

/// Writes the plan to the first of `folders` that takes it; they are made where they are missing.
///
/// # Errors
/// The last folder's error.
pub fn store(folders: &[PathBuf], key: &PlanKey, plan: &[u8]) -> Result<PathBuf, PlanError> {
    let mut last = PlanError::Absent("any folder: neither the model's nor a cache folder is known".to_owned());
    for folder in folders {
        let path = folder.join(key.file_name());
        let made = std::fs::create_dir_all(folder).map_err(|error| io_error("make", folder, &error));
        match made.and_then(|()| write(&path, key, plan)) {
            Ok(()) => return Ok(path),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Reads the plan for `key` from the first of `folders` that has a good one.
///
/// # Errors
/// Of the first folder that has a file which is refused; else in what a plan of the same model differs; else that there is
/// none.
pub fn find(folders: &[PathBuf], key: &PlanKey) -> Result<(PathBuf, PlanFile), PlanError> {
    let mut refused = None;
    for folder in folders {
        let path = folder.join(key.file_name());
        match read(&path, key) {
            Ok(file) => return Ok((path, file)),
            Err(PlanError::Absent(_)) => {}
            Err(error) => refused = refused.or(Some(error)),
        }
    }
    Err(refused.or_else(|| nearest(folders, key)).unwrap_or_else(|| PlanError::Absent(key.describe())))
}

/// Why a plan of the same model and precision is not the one for `key`: it says more than that there is none.
fn nearest(folders: &[PathBuf], key: &PlanKey) -> Option<PlanError> {
    let same = |got: &PlanKey| got.model_sha256 == key.model_sha256 && got.precision == key.precision;
    plan_files(folders).into_iter().find_map(|path| {
        let got = open(&path).ok().map(|opened| opened.key).filter(same)?;
        let (field, expected, got) = key.difference(&got)?;
        Some(PlanError::Mismatch { path: path.display().to_string(), field, expected, got })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> PlanKey {
        PlanKey {
            model_sha256: "ab".repeat(32),
            architecture: Architecture::full(),
            network: NETWORK_VERSION,
            precision: Precision::Fp16,
            library: "TensorRT".to_owned(),
            library_version: "11.4.0.106".to_owned(),
            gpu: "NVIDIA H200".to_owned(),
            compute_capability: "9.0".to_owned(),
            driver: "580.65 (CUDA 13.0)".to_owned(),
        }
    }

    #[test]
    fn a_plan_is_read_back_and_every_cut_and_flip_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(key().file_name());
        let plan: Vec<u8> = (0..5000u32).map(|i| (i * 7) as u8).collect();
        write(&path, &key(), &plan).unwrap();
        assert_eq!(read(&path, &key()).unwrap(), PlanFile { key: key(), plan: plan.clone() });
        let whole = std::fs::read(&path).unwrap();
        for len in [0, 1, HEADER - 1, HEADER, HEADER + 10, whole.len() - plan.len(), whole.len() - 1] {
            std::fs::write(&path, &whole[..len]).unwrap();
            let error = read(&path, &key()).unwrap_err();
            assert!(matches!(error, PlanError::Torn { .. }), "{len}: {error}");
        }
        std::fs::write(&path, [&whole[..], b"x"].concat()).unwrap();
        assert!(matches!(read(&path, &key()), Err(PlanError::Torn { .. })), "longer than it says");
        let key_at = HEADER + 20;
        let places = [0, 8, 12, 16, 23, CHECKSUM_AT, HEADER - 1, key_at, whole.len() - plan.len(), whole.len() - 1];
        for at in places {
            for bit in [1u8, 0x80] {
                let mut bytes = whole.clone();
                bytes[at] ^= bit;
                std::fs::write(&path, &bytes).unwrap();
                let refused = read(&path, &key());
                assert!(refused.is_err(), "bit {bit} of byte {at}");
            }
        }
        std::fs::write(&path, &whole).unwrap();
        assert!(read(&path, &key()).is_ok());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside");
    }

    #[test]
    fn a_key_that_differs_in_anything_is_refused_by_name_and_has_a_file_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.plan");
        write(&path, &key(), b"plan").unwrap();
        let mut shallow = Architecture::full();
        shallow.channel_attention = false;
        let others: [(&str, PlanKey); 9] = [
            ("model SHA-256", PlanKey { model_sha256: "cd".repeat(32), ..key() }),
            ("architecture", PlanKey { architecture: shallow, ..key() }),
            ("network version", PlanKey { network: NETWORK_VERSION + 1, ..key() }),
            ("precision", PlanKey { precision: Precision::Fp32, ..key() }),
            ("library", PlanKey { library: "TensorRT for RTX".to_owned(), ..key() }),
            ("library version", PlanKey { library_version: "11.4.0.107".to_owned(), ..key() }),
            ("GPU", PlanKey { gpu: "NVIDIA H100".to_owned(), ..key() }),
            ("compute capability", PlanKey { compute_capability: "8.9".to_owned(), ..key() }),
            ("driver", PlanKey { driver: "570.1 (CUDA 12.8)".to_owned(), ..key() }),
        ];
        for (name, other) in others {
            match read(&path, &other).unwrap_err() {
                PlanError::Mismatch { field, .. } => assert_eq!(field, name),
                error => panic!("{name}: {error}"),
            }
            assert_ne!(other.file_name(), key().file_name(), "{name}");
        }
    }

    #[test]
    fn the_first_folder_that_takes_a_plan_has_it_and_a_damaged_one_does_not_hide_a_good_one() {
        let dir = tempfile::tempdir().unwrap();
        let folders = [PathBuf::from("/dev/null/nothing"), dir.path().join("a"), dir.path().join("b")];
        assert!(matches!(find(&folders, &key()), Err(PlanError::Absent(_))));
        let path = store(&folders, &key(), b"one").unwrap();
        assert_eq!(path.parent(), Some(folders[1].as_path()));
        store(&folders[2..], &key(), b"two").unwrap();
        assert_eq!(find(&folders, &key()).unwrap().1.plan, b"one");
        std::fs::write(&path, b"torn").unwrap();
        assert_eq!(find(&folders, &key()).unwrap().1.plan, b"two");
        assert!(matches!(find(&folders[..2], &key()), Err(PlanError::Torn { .. })));
        let updated = PlanKey { driver: "590.1 (CUDA 13.1)".to_owned(), ..key() };
        match find(&folders, &updated).unwrap_err() {
            PlanError::Mismatch { field, .. } => assert_eq!(field, "driver", "says what has changed"),
            error => panic!("{error}"),
        }
        let listed = list(&folders);
        assert_eq!(listed.len(), 2);
        assert!(listed[0].key.is_err() && listed[1].key.as_ref() == Ok(&key()));
        assert!(store(&folders[..1], &key(), b"x").is_err());
    }
}
