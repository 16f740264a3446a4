//! A model folder for a weights file: what `darnet model new` does.

use std::fs;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;

use super::manifest::{Architecture, AttentionOrder, Manifest, Preprocessing, default_classes};
use super::weights::Weights;
use super::{MANIFEST_FILE, MAX_WEIGHTS_BYTES, Model, ModelError, read_bounded, sha256_hex};

/// What to write. `None` is taken from the weights where they tell, else from the paper's network.
#[derive(Clone, Debug, Default)]
pub struct NewModel {
    /// Name of the model; the folder's name by default.
    pub id: Option<String>,
    /// Channels of the stem; read from `stem.0.weight` by default.
    pub base_width: Option<usize>,
    /// Input shape; 64 x 224 x 224 by default. Weights fix the depth only where there is depth attention.
    pub input_dhw: Option<[usize; 3]>,
    /// Order of the attentions. The weights do not tell.
    pub attention_order: AttentionOrder,
    /// Whether there is channel attention; seen from the weights by default.
    pub channel_attention: Option<bool>,
    /// Whether there is depth attention; seen from the weights by default.
    pub depth_attention: Option<bool>,
    /// What it was trained on; "unknown" by default.
    pub trained_on: Option<String>,
    /// "research" by default.
    pub intended_use: Option<String>,
    /// The calibration file's name; none by default.
    pub calibration: Option<String>,
    /// From HU to network input; the paper's by default.
    pub preprocessing: Preprocessing,
}

/// Writes `dir/model.toml` and a copy of the weights beside it, after checking the weights against the architecture.
///
/// The manifest is written last, under a temporary name and then renamed, so that an interrupted run leaves no folder
/// that looks like a model.
///
/// # Errors
/// An existing manifest in `dir`, unreadable weights, and whatever [`Model::load`] would refuse.
pub fn write_model(weights: &Path, dir: &Path, options: &NewModel) -> Result<Manifest, ModelError> {
    let manifest_path = dir.join(MANIFEST_FILE);
    if manifest_path.exists() {
        return Err(ModelError::Exists { path: manifest_path });
    }
    let bytes = read_bounded(weights, MAX_WEIGHTS_BYTES)?;
    let manifest = manifest_for(&bytes, dir, options)?;
    manifest.validate()?;
    Weights::from_safetensors(&bytes, &manifest.architecture)?;
    let io = |action, path: &Path| {
        let path = path.to_path_buf();
        move |source| ModelError::Io { action, path, source }
    };
    fs::create_dir_all(dir).map_err(io("create", dir))?;
    write_synced(&dir.join(&manifest.weights_file), &bytes)?;
    let part = dir.join(format!("{MANIFEST_FILE}.part"));
    write_synced(&part, manifest.to_toml()?.as_bytes())?;
    fs::rename(&part, &manifest_path).map_err(io("rename", &part))?;
    Ok(manifest)
}

impl Model {
    /// Writes the model as a folder, its calibration text included.
    ///
    /// # Errors
    /// An existing manifest in `dir` or a failed write.
    pub fn save(&self, dir: &Path) -> Result<(), ModelError> {
        let manifest_path = dir.join(MANIFEST_FILE);
        if manifest_path.exists() {
            return Err(ModelError::Exists { path: manifest_path });
        }
        let mut manifest = self.manifest.clone();
        let bytes = self.weights.to_safetensors();
        manifest.weights_sha256 = sha256_hex(&bytes);
        // A calibration is bound to the file of weights it was fitted for, and this may be another one of the same values.
        if manifest.weights_sha256 != self.sha256 {
            manifest.calibration = None;
        }
        fs::create_dir_all(dir).map_err(|source| ModelError::Io {
            action: "create",
            path: dir.to_path_buf(),
            source,
        })?;
        write_synced(&dir.join(&manifest.weights_file), &bytes)?;
        if let (Some(name), Some(text)) = (&manifest.calibration, &self.calibration_text) {
            write_synced(&dir.join(name), text.as_bytes())?;
        }
        write_synced(&manifest_path, manifest.to_toml()?.as_bytes())
    }
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), ModelError> {
    use std::io::Write;
    let write = || -> std::io::Result<()> {
        let mut file = fs::File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|source| ModelError::Io { action: "write", path: PathBuf::from(path), source })
}

fn manifest_for(bytes: &[u8], dir: &Path, options: &NewModel) -> Result<Manifest, ModelError> {
    let file = SafeTensors::deserialize(bytes).map_err(|e| ModelError::Safetensors(e.to_string()))?;
    let first_axis = |name: &str, expected: Vec<usize>| match file.tensor(name) {
        Ok(view) => Ok(view.shape().first().copied().unwrap_or(0)),
        Err(_) => Err(ModelError::MissingTensor { name: name.to_owned(), expected }),
    };
    let has = |part: &str| file.names().iter().any(|name| name.contains(part));
    let base_width = match options.base_width {
        Some(width) => width,
        None => first_axis("stem.0.weight", vec![64, 1, 3, 7, 7])?,
    };
    let num_classes = first_axis("fc.weight", vec![3, 8 * base_width])?;
    let architecture = Architecture {
        base_width,
        input_dhw: options.input_dhw.unwrap_or([64, 224, 224]),
        num_classes,
        channel_attention: options.channel_attention.unwrap_or_else(|| has(".se.fc.")),
        depth_attention: options.depth_attention.unwrap_or_else(|| has(".da.fc.")),
        attention_order: options.attention_order,
    };
    architecture.validate()?;
    let folder = dir.file_name().map(|name| name.to_string_lossy().into_owned());
    let (class_keys, class_names) = default_classes(num_classes);
    Ok(Manifest {
        id: match (&options.id, folder) {
            (Some(id), _) => id.clone(),
            (None, Some(folder)) => folder,
            (None, None) => "model".to_owned(),
        },
        trained_on: options.trained_on.clone().unwrap_or_else(|| "unknown".to_owned()),
        intended_use: options.intended_use.clone().unwrap_or_else(|| "research".to_owned()),
        class_keys,
        class_names,
        calibration: options.calibration.clone(),
        preprocessing: options.preprocessing.clone(),
        ..Manifest::demo("model", architecture, &sha256_hex(bytes))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::synthetic;

    fn small() -> Architecture {
        Architecture { base_width: 2, input_dhw: [4, 16, 16], depth_attention: false, ..Architecture::full() }
    }

    #[test]
    fn a_new_model_loads_and_its_width_and_attentions_are_seen_from_the_weights() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("w.safetensors");
        fs::write(&file, synthetic::weights(&small(), 1).to_safetensors()).unwrap();
        let out = dir.path().join("site-a");
        let options = NewModel { input_dhw: Some([4, 16, 16]), ..NewModel::default() };
        let manifest = write_model(&file, &out, &options).unwrap();
        assert_eq!(manifest.id, "site-a");
        assert_eq!(manifest.intended_use, "research");
        let model = Model::load(&out).unwrap();
        assert_eq!(model.manifest.architecture, small());
        assert_eq!(model.calibration_text, None);
        let again = write_model(&file, &out, &options).unwrap_err();
        assert!(matches!(again, ModelError::Exists { .. }));
    }

    #[test]
    fn weights_that_do_not_fit_leave_no_folder() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("w.safetensors");
        fs::write(&file, synthetic::weights(&small(), 1).to_safetensors()).unwrap();
        let out = dir.path().join("m");
        let options = NewModel { depth_attention: Some(true), ..NewModel::default() };
        let error = write_model(&file, &out, &options).unwrap_err().to_string();
        assert!(error.contains("layer1.0.da.fc.0.weight is missing"), "{error}");
        assert!(!out.exists());
    }

    #[test]
    fn a_saved_model_is_the_same_model() {
        let dir = tempfile::tempdir().unwrap();
        let mut model = Model::synthetic("s", &small(), 5).unwrap();
        model.manifest.calibration = Some("c.toml".into());
        model.calibration_text = Some("x = 1\n".into());
        let out = dir.path().join("s");
        model.save(&out).unwrap();
        let back = Model::load(&out).unwrap();
        assert_eq!(back.weights, model.weights);
        assert_eq!(back.sha256, model.sha256);
        assert_eq!(back.calibration_text, model.calibration_text);
        assert_eq!(back.dir.as_deref(), Some(out.as_path()));
    }
}
