//! The trainer: readers of what users have, the cache, the split, training, evaluation, ablations, import. Built with
//! feature `train-data`; what needs libtorch with feature `trainer`.
//!
//! ```text
//! sources ──> prepare ──> cache ──> split ──> fit ──────> evaluate
//! folders,    same code   f16,      by patient  folds,      tables,
//! phantoms    as daemon   mapped                variants    curves
//! ```
//!
//! - Input: folders of scans in the layouts of public data sets, or the phantom; for training, anything that is a
//!   [`Dataset`]. Output: a [`cache::Cache`] of network inputs with a report of what was refused and why, a
//!   [`split::Split`], model folders that the scanner loads, tables, curves.
//! - The preprocessing is the daemon's, called and not repeated ([`crate::resample`], [`crate::scan`]).
//!
//! Invariants: the outcome does not depend on the number of threads of the preparation, nor on where an earlier run was
//! killed. A training run is defined by its options, its data and its seed; stopped at any moment and started again it ends
//! with the same weights (bit for bit on the processor with the same number of threads). The network is the one that
//! `model` describes, and weights leave through `model`'s own checks.
//!
//! Deliberately absent: a preprocessing of its own, any download, Python.

use std::path::PathBuf;

use crate::model::manifest::SourceWindow;
use crate::model::{ModelError, Preprocessing};

pub mod cache;
pub mod calibrate;
pub mod cam;
pub mod commands_data;
pub mod commands_judge;
pub mod contact;
pub mod error;
pub mod flags;
pub mod import;
pub mod judge;
pub(crate) mod layout;
mod map;
pub mod metrics;
pub mod pickle;
pub mod plot;
pub mod prepare;
pub mod report;
pub mod shift;
pub mod sources;
pub mod split;

pub use cache::{Cache, Case};
pub use error::TrainDataError;
pub use split::{Split, SplitRow};

#[cfg(feature = "trainer")]
pub mod ablate;
#[cfg(feature = "trainer")]
pub mod augment;
#[cfg(feature = "trainer")]
pub mod checkpoint;
#[cfg(feature = "trainer")]
pub mod commands_fit;
#[cfg(feature = "trainer")]
pub mod evaluate;
#[cfg(feature = "trainer")]
pub mod fit;
#[cfg(feature = "trainer")]
pub mod fused;
#[cfg(feature = "trainer")]
pub mod loader;
#[cfg(feature = "trainer")]
pub mod net;
#[cfg(feature = "trainer")]
pub mod optimiser;
#[cfg(feature = "trainer")]
pub mod tensorboard;
#[cfg(feature = "trainer")]
pub mod torch;

/// Why training or evaluation ended without a result.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// An option is out of range.
    #[error("option {option}: expected {expected}, got {got}")]
    Option {
        /// Its name.
        option: &'static str,
        /// What it may be.
        expected: String,
        /// What it was.
        got: String,
    },
    /// The data do not fit what is asked for.
    #[error("training data: {0}")]
    Data(String),
    /// libtorch refused.
    #[error("libtorch: {0}")]
    Torch(String),
    /// Loss or gradient is not a finite number.
    #[error(
        "{what} is not finite in epoch {epoch}, step {step}; the batch is {batch}; \
         lower the learning rate or look at these volumes"
    )]
    NotFinite {
        /// The loss or the gradient.
        what: &'static str,
        /// Epoch, counted from 1.
        epoch: usize,
        /// Step within the epoch, counted from 1.
        step: usize,
        /// Names of the scans of the batch.
        batch: String,
    },
    /// A file could not be read or written.
    #[error("{action} {path}: {source}", path = path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A checkpoint cannot be used.
    #[error("checkpoint {path}: {reason}", path = path.display())]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// A model or weights file.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A picture.
    #[error("draw a picture: {0}")]
    Picture(String),
    /// The run was asked to stop; it can be resumed.
    #[error("stopped as asked; the same command goes on from the last checkpoint")]
    Stopped,
}

#[cfg(feature = "trainer")]
impl From<tch::TchError> for TrainError {
    /// The first line alone: what follows is a C++ stack trace.
    fn from(error: tch::TchError) -> Self {
        Self::Torch(error.to_string().lines().next().unwrap_or_default().to_owned())
    }
}

/// Labelled volumes that lie ready.
pub trait Dataset: Sync {
    /// How many.
    fn len(&self) -> usize;
    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Shape of every volume.
    fn input_dhw(&self) -> [usize; 3];
    /// How they were made from HU.
    fn preprocessing(&self) -> &Preprocessing;
    /// Keys of the classes, in the order of the network's outputs.
    fn class_names(&self) -> &[String];
    /// The name of scan `index`.
    fn scan(&self, index: usize) -> &str;
    /// The patient of scan `index`.
    fn patient(&self, index: usize) -> &str;
    /// The class of scan `index`.
    fn class(&self, index: usize) -> usize;
    /// The volume, row-major D, H, W, in [0, 1].
    fn volume_f16(&self, index: usize) -> &[half::f16];
    /// What grey values of the sources meant, the least informed of all scans.
    fn source_window(&self) -> SourceWindow {
        SourceWindow::Hu
    }
    /// The lesion mask in the volume's shape, 0 outside lesions, if there is one.
    fn mask(&self, index: usize) -> Option<&[u8]> {
        let _ = index;
        None
    }
}

impl Dataset for Cache {
    fn len(&self) -> usize {
        self.cases().len()
    }
    fn input_dhw(&self) -> [usize; 3] {
        self.input_dhw()
    }
    fn preprocessing(&self) -> &Preprocessing {
        self.preprocessing()
    }
    fn class_names(&self) -> &[String] {
        self.class_names()
    }
    fn scan(&self, index: usize) -> &str {
        &self.cases()[index].scan
    }
    fn patient(&self, index: usize) -> &str {
        &self.cases()[index].patient
    }
    fn class(&self, index: usize) -> usize {
        self.cases()[index].class
    }
    fn volume_f16(&self, index: usize) -> &[half::f16] {
        self.volume(index)
    }
    fn source_window(&self) -> SourceWindow {
        self.source_window()
    }
    fn mask(&self, index: usize) -> Option<&[u8]> {
        self.mask(index)
    }
}

/// One scan of a [`MemoryDataset`].
#[derive(Clone, Debug)]
pub struct MemoryCase {
    /// Its name.
    pub scan: String,
    /// Whose it is.
    pub patient: String,
    /// What it shows.
    pub class: usize,
    /// Row-major D, H, W, in [0, 1].
    pub volume: Vec<half::f16>,
    /// Lesions, if known.
    pub mask: Option<Vec<u8>>,
}

/// Volumes in memory, for tests and small experiments.
#[derive(Clone, Debug)]
pub struct MemoryDataset {
    input_dhw: [usize; 3],
    preprocessing: Preprocessing,
    class_names: Vec<String>,
    cases: Vec<MemoryCase>,
}

impl MemoryDataset {
    /// A data set of `cases`.
    ///
    /// # Errors
    /// A volume or mask of another size, or a class that has no name.
    pub fn new(
        input_dhw: [usize; 3],
        preprocessing: Preprocessing,
        class_names: Vec<String>,
        cases: Vec<MemoryCase>,
    ) -> Result<Self, TrainError> {
        let voxels: usize = input_dhw.iter().product();
        for (i, case) in cases.iter().enumerate() {
            let mask = case.mask.as_ref().map_or(voxels, Vec::len);
            if case.volume.len() != voxels || mask != voxels {
                return Err(TrainError::Data(format!("case {i}: expected {voxels} voxels in volume and mask")));
            }
            if case.class >= class_names.len() {
                return Err(TrainError::Data(format!("case {i}: class {} has no name", case.class)));
            }
        }
        Ok(Self { input_dhw, preprocessing, class_names, cases })
    }
}

impl Dataset for MemoryDataset {
    fn len(&self) -> usize {
        self.cases.len()
    }
    fn input_dhw(&self) -> [usize; 3] {
        self.input_dhw
    }
    fn preprocessing(&self) -> &Preprocessing {
        &self.preprocessing
    }
    fn class_names(&self) -> &[String] {
        &self.class_names
    }
    fn scan(&self, index: usize) -> &str {
        &self.cases[index].scan
    }
    fn patient(&self, index: usize) -> &str {
        &self.cases[index].patient
    }
    fn class(&self, index: usize) -> usize {
        self.cases[index].class
    }
    fn volume_f16(&self, index: usize) -> &[half::f16] {
        &self.cases[index].volume
    }
    fn mask(&self, index: usize) -> Option<&[u8]> {
        self.cases[index].mask.as_deref()
    }
}

/// The folder that a file is in; that of a bare name is the present one, and never the empty path.
pub(crate) fn folder_of(path: &std::path::Path) -> &std::path::Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(std::path::Path::new("."))
}

/// Writes `name.json` and `name.md` into `dir`, which is made where it is not.
pub(crate) fn write_results(
    dir: &std::path::Path,
    name: &str,
    document: &impl serde::Serialize,
    markdown: &str,
) -> Result<(), TrainError> {
    std::fs::create_dir_all(dir).map_err(|source| TrainError::Io { action: "create", path: dir.into(), source })?;
    let json = serde_json::to_string_pretty(document).map_err(|e| TrainError::Data(e.to_string()))?;
    write_atomic(&dir.join(format!("{name}.json")), json.as_bytes())?;
    write_atomic(&dir.join(format!("{name}.md")), markdown.as_bytes())
}

/// Writes a file that is either the old one or the new one, whole, whatever happens.
pub(crate) fn write_atomic(path: &std::path::Path, bytes: &[u8]) -> Result<(), TrainError> {
    use std::io::Write;
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let part = path.with_file_name(format!(".{name}.part"));
    let io = |action, path: &std::path::Path| {
        let path = path.to_path_buf();
        move |source| TrainError::Io { action, path, source }
    };
    let write = || -> std::io::Result<()> {
        let mut file = std::fs::File::create(&part)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    if let Err(source) = write() {
        let _ = std::fs::remove_file(&part);
        return Err(TrainError::Io { action: "write", path: path.to_path_buf(), source });
    }
    std::fs::rename(&part, path).map_err(io("rename", &part))?;
    let folder = folder_of(path);
    std::fs::File::open(folder).and_then(|f| f.sync_all()).map_err(io("sync", folder))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::folder_of;

    #[test]
    fn a_bare_file_name_is_in_the_present_folder() {
        assert_eq!(folder_of(Path::new("split.csv")), Path::new("."));
        assert_eq!(folder_of(Path::new("out/split.csv")), Path::new("out"));
        assert_eq!(folder_of(Path::new("/split.csv")), Path::new("/"));
    }
}
