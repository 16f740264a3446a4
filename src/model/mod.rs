//! The network as data: architecture, manifest, weights.
//!
//! A model is a folder: `model.toml` (the [`Manifest`]) and a `safetensors` file. [`Model::load`] reads both and proves
//! before anything runs that the weights are the ones the manifest names (SHA-256) and that they are exactly the tensors
//! its [`Architecture`] calls for, each with its shape and finite. The calibration file that a manifest names is carried
//! as opaque text; what it means is the report stage's.
//!
//! A leaf: imports no stage. Deliberately absent: anything that runs the network (see [`crate::engine`]).

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

pub mod architecture;
pub mod manifest;
pub mod new;
pub mod onnx;
pub mod show;
pub mod synthetic;
pub mod verify;
pub mod weights;

pub use architecture::{LayerRow, StageRow, TensorSpec};
pub use manifest::{Architecture, AttentionOrder, CLASS_KEYS, DepthGrid, Manifest, Preprocessing, SliceDirection};
pub use verify::verify;
pub use weights::{Tensor, Weights};

/// Name of the manifest in a model's folder.
pub const MANIFEST_FILE: &str = "model.toml";
/// Bound on a manifest and on a calibration file. A manifest is about 1 KiB; 1 MiB leaves room for long score tables.
pub const MAX_TEXT_BYTES: u64 = 1 << 20;
/// Bound on a weights file. The full network in f64 is 35.3 M values * 8 B = 282 MB; 1 GiB leaves room for wider ones.
pub const MAX_WEIGHTS_BYTES: u64 = 1 << 30;

/// Why a model cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file of the model could not be read or written.
    #[error("{action} {path}: {source}", path = path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A file is larger than its bound.
    #[error("read {path}: expected at most {limit} bytes, got {got}", path = path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The bound.
        limit: u64,
        /// Its size.
        got: u64,
    },
    /// The manifest is not the TOML it should be.
    #[error("parse model manifest: {0}")]
    ManifestSyntax(String),
    /// A manifest's field has a value out of range.
    #[error("model manifest: {field}: expected {expected}, got {got}")]
    Manifest {
        /// The field.
        field: &'static str,
        /// What it may be.
        expected: String,
        /// What it is.
        got: String,
    },
    /// The weights file is not the one the manifest was written for.
    #[error("weights: expected sha256 {expected}, got {got}; take the file the manifest was written for")]
    Sha256 {
        /// In the manifest.
        expected: String,
        /// Of the file.
        got: String,
    },
    /// The weights file is no valid safetensors file.
    #[error("weights: not a readable safetensors file: {0}")]
    Safetensors(String),
    /// The architecture calls for a tensor the file does not hold.
    #[error("weights: tensor {name} is missing, expected shape {expected:?}")]
    MissingTensor {
        /// Its name.
        name: String,
        /// Its shape.
        expected: Vec<usize>,
    },
    /// The file holds a tensor the architecture has no place for.
    #[error("weights: unexpected tensor {name}; does the manifest name the right attentions?")]
    ExtraTensor {
        /// Its name.
        name: String,
    },
    /// A tensor has another shape.
    #[error("weights: tensor {name}: expected shape {expected:?}, got {got:?}")]
    Shape {
        /// Its name.
        name: String,
        /// What the architecture calls for.
        expected: Vec<usize>,
        /// What the file holds.
        got: Vec<usize>,
    },
    /// A tensor has a number format that is not converted.
    #[error("weights: tensor {name}: expected f32, f16, bf16 or f64, got {got}")]
    Dtype {
        /// Its name.
        name: String,
        /// What the file holds.
        got: String,
    },
    /// A tensor has a value no inference can use.
    #[error("weights: tensor {name}: expected {expected}, element {index} is not")]
    Value {
        /// Its name.
        name: String,
        /// What values must be.
        expected: &'static str,
        /// The first offending element.
        index: usize,
    },
    /// A folder already holds a model.
    #[error("write model: {path} exists; choose another folder", path = path.display())]
    Exists {
        /// The file in the way.
        path: PathBuf,
    },
}

/// A network ready to be prepared by an engine.
#[derive(Clone, Debug)]
pub struct Model {
    /// What defines it besides its weights.
    pub manifest: Manifest,
    /// Every tensor of the architecture, verified.
    pub weights: Weights,
    /// SHA-256 of the weights file, lower-case hex: the model's identity in results and caches.
    pub sha256: String,
    /// The folder it came from; none for the embedded one.
    pub dir: Option<PathBuf>,
    /// The calibration file named by the manifest, as it is; none if the manifest names none.
    pub calibration_text: Option<String>,
}

const EMBEDDED_MANIFEST: &str = include_str!("../../engines/demo/model.toml");
const EMBEDDED_WEIGHTS: &[u8] = include_bytes!("../../engines/demo/weights.safetensors");
const EMBEDDED_CALIBRATION: &str = include_str!("../../calibration/demo.toml");

impl Model {
    /// Loads the model in `dir`.
    ///
    /// The calibration file is looked for in `dir`, then in `dir/../../calibration` (the shipped layout).
    ///
    /// # Errors
    /// Unreadable or oversized files, a manifest that does not parse or is out of range, another SHA-256, and any
    /// tensor missing, extra, misshapen or not finite: the error names the field or the tensor.
    pub fn load(dir: &Path) -> Result<Self, ModelError> {
        let manifest = Manifest::parse(&read_text(&dir.join(MANIFEST_FILE))?)?;
        let bytes = read_bounded(&dir.join(&manifest.weights_file), MAX_WEIGHTS_BYTES)?;
        let calibration_text = match &manifest.calibration {
            None => None,
            Some(name) => {
                let beside = dir.join(name);
                let path =
                    if beside.is_file() { beside } else { dir.join("..").join("..").join("calibration").join(name) };
                Some(read_text(&path)?)
            }
        };
        let mut model = Self::from_parts(manifest, &bytes, calibration_text)?;
        model.dir = Some(dir.to_path_buf());
        Ok(model)
    }

    /// The small demonstration network inside the program. It was trained on phantoms alone (`scripts/demo-model`).
    ///
    /// # Errors
    /// None in a build whose tests passed; the same checks run as for a model from a folder.
    pub fn embedded() -> Result<Self, ModelError> {
        let manifest = Manifest::parse(EMBEDDED_MANIFEST)?;
        let calibration = manifest.calibration.as_ref().map(|_| EMBEDDED_CALIBRATION.to_owned());
        Self::from_parts(manifest, EMBEDDED_WEIGHTS, calibration)
    }

    /// A model from a manifest, the bytes of its weights file, and the text of its calibration file.
    ///
    /// # Errors
    /// As [`Model::load`], files aside.
    pub fn from_parts(
        manifest: Manifest,
        weights: &[u8],
        calibration_text: Option<String>,
    ) -> Result<Self, ModelError> {
        manifest.validate()?;
        let sha256 = sha256_hex(weights);
        if sha256 != manifest.weights_sha256 {
            return Err(ModelError::Sha256 { expected: manifest.weights_sha256.clone(), got: sha256 });
        }
        let weights = Weights::from_safetensors(weights, &manifest.architecture)?;
        Ok(Self { manifest, weights, sha256, dir: None, calibration_text })
    }

    /// A model whose weights come from [`synthetic`], for tests and benchmarks. It was trained on nothing and says so.
    ///
    /// # Errors
    /// An architecture out of range.
    pub fn synthetic(id: &str, architecture: &Architecture, seed: u64) -> Result<Self, ModelError> {
        architecture.validate()?;
        let weights = synthetic::weights(architecture, seed);
        let sha256 = sha256_hex(&weights.to_safetensors());
        let manifest = Manifest::demo(id, architecture.clone(), &sha256);
        manifest.validate()?;
        Ok(Self { manifest, weights, sha256, dir: None, calibration_text: None })
    }
}

/// SHA-256 of `bytes` in lower-case hex.
pub(crate) fn sha256_hex(bytes: &[u8]) -> String {
    use sha2::Digest;
    use std::fmt::Write;
    let mut hex = String::with_capacity(64);
    for byte in sha2::Sha256::digest(bytes).iter() {
        let _ = write!(hex, "{byte:02x}");
    }
    hex
}

/// The whole file, refused above `limit` bytes.
pub(crate) fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>, ModelError> {
    let io = |source| ModelError::Io { action: "read", path: path.to_path_buf(), source };
    let file = fs::File::open(path).map_err(io)?;
    let size = file.metadata().map_err(io)?.len();
    if size > limit {
        return Err(ModelError::TooLarge { path: path.to_path_buf(), limit, got: size });
    }
    let mut bytes = Vec::with_capacity(size as usize);
    file.take(limit).read_to_end(&mut bytes).map_err(io)?;
    Ok(bytes)
}

/// The whole text file, refused above [`MAX_TEXT_BYTES`].
fn read_text(path: &Path) -> Result<String, ModelError> {
    let bytes = read_bounded(path, MAX_TEXT_BYTES)?;
    String::from_utf8(bytes).map_err(|error| ModelError::Io {
        action: "read as UTF-8",
        path: path.to_path_buf(),
        source: std::io::Error::new(std::io::ErrorKind::InvalidData, error.utf8_error()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_embedded_model_loads_and_says_it_is_a_demonstration() {
        let model = Model::embedded().unwrap();
        assert!(model.manifest.trained_on.contains("synthetic chest CT phantoms"), "{}", model.manifest.trained_on);
        assert!(model.manifest.is_demo());
        assert_eq!(model.manifest.class_keys, CLASS_KEYS);
        assert!(model.calibration_text.unwrap().contains("darnet.calibration/1"));
        assert!(EMBEDDED_WEIGHTS.len() < 5 << 19, "more than 2.5 MiB");
    }

    #[test]
    fn a_changed_weights_file_is_refused() {
        let manifest = Manifest::parse(EMBEDDED_MANIFEST).unwrap();
        let mut bytes = EMBEDDED_WEIGHTS.to_vec();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        let error = Model::from_parts(manifest, &bytes, None).unwrap_err();
        assert!(matches!(error, ModelError::Sha256 { .. }));
    }

    #[test]
    fn a_missing_folder_names_the_manifest_it_looked_for() {
        let dir = tempfile::tempdir().unwrap();
        let error = Model::load(&dir.path().join("absent")).unwrap_err().to_string();
        assert!(error.contains("model.toml"), "{error}");
    }
}
