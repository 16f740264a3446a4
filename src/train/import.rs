//! A PyTorch state dict (`.pth`) as a model folder.
//!
//! Input: a file that `torch.save` wrote: a state dict, alone or under `state_dict`, `model_state_dict`, `model` or
//! `net`; names may carry the prefix of `DataParallel`. Output: a model folder, after the checks of every weights file:
//! a missing, extra or misshapen tensor is named.

use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};

use super::TrainError;
use super::pickle::{self, Kind};
use crate::model::Manifest;
use crate::model::new::{NewModel, write_model};

/// Prefix that `torch.nn.DataParallel` puts before every name.
const PARALLEL: &str = "module.";
/// Names under which trainers keep a state dict beside other things.
const HOLDERS: [&str; 4] = ["state_dict", "model_state_dict", "model", "net"];

fn bare(name: &str) -> &str {
    name.strip_prefix(PARALLEL).unwrap_or(name)
}

/// Writes the model folder `dir` from the state dict at `path`.
///
/// # Errors
/// As [`pickle::read`], a name that occurs twice once prefixes are gone, and whatever a model's own checks refuse.
pub fn import(path: &Path, dir: &Path, options: &NewModel) -> Result<Manifest, TrainError> {
    let tensors = pickle::read(path, &HOLDERS, |name| bare(name) == "stem.0.weight")?;
    let twice = tensors.keys().find(|n| n.starts_with(PARALLEL) && tensors.contains_key(bare(n)));
    if let Some(name) = twice {
        return Err(TrainError::Data(format!("tensor {} occurs twice in the state dict", bare(name))));
    }
    let bad = |e: safetensors::SafeTensorError| TrainError::Data(format!("pack weights: {e}"));
    let views = tensors
        .iter()
        .map(|(name, t)| {
            let dtype = match t.kind {
                Kind::F64 => Dtype::F64,
                Kind::F32 => Dtype::F32,
                Kind::F16 => Dtype::F16,
                Kind::Bf16 => Dtype::BF16,
                Kind::I64 => Dtype::I64,
                Kind::Unknown(_) => {
                    return Err(TrainError::Data(format!("tensor {name} has a number format that is no weight's")));
                }
            };
            Ok((bare(name), TensorView::new(dtype, t.shape.clone(), &t.bytes).map_err(bad)?))
        })
        .collect::<Result<Vec<_>, TrainError>>()?;
    let bytes = safetensors::serialize(views, None).map_err(bad)?;
    let io = |action, path: &Path| {
        let path = path.to_path_buf();
        move |source| TrainError::Io { action, path, source }
    };
    // The model's own writer takes a file, so that what it checks is what it copies.
    std::fs::create_dir_all(dir).map_err(io("create", dir))?;
    let part = dir.join(".import.safetensors.part");
    std::fs::write(&part, &bytes).map_err(io("write", &part))?;
    let written = write_model(&part, dir, options);
    let _ = std::fs::remove_file(&part);
    if written.is_err() {
        // Fails, as it should, if the folder held something.
        let _ = std::fs::remove_dir(dir);
    }
    Ok(written?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Architecture, Model, synthetic};

    #[test]
    fn a_state_dict_of_either_format_becomes_a_model() {
        let tiny = Architecture { base_width: 1, input_dhw: [2, 8, 8], ..Architecture::full() };
        let dir = tempfile::tempdir().unwrap();
        let options = NewModel { input_dhw: Some(tiny.input_dhw), ..NewModel::default() };
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/train");
        for file in ["state.pth", "legacy.pth"] {
            let out = dir.path().join(file);
            import(&golden.join(file), &out, &options).unwrap();
            assert_eq!(Model::load(&out).unwrap().weights, synthetic::weights(&tiny, 5));
        }
        // Another network: the first tensor that does not fit is named.
        let other = NewModel { base_width: Some(2), ..options.clone() };
        let bad = dir.path().join("bad");
        let error = import(&golden.join("state.pth"), &bad, &other).unwrap_err().to_string();
        assert!(error.contains("stem.0.weight"), "{error}");
        let without = NewModel { channel_attention: Some(false), ..options };
        let error = import(&golden.join("state.pth"), &bad, &without).unwrap_err().to_string();
        assert!(error.contains(".se.fc."), "{error}");
        assert!(!bad.exists());
    }

    #[test]
    fn a_file_that_is_no_state_dict_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in [("a", &b"PK no"[..]), ("b", b""), ("c", b"\x80\x02}.")] {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            let error = import(&path, &dir.path().join("m"), &NewModel::default()).unwrap_err().to_string();
            assert!(error.contains("state dict"), "{error}");
        }
    }
}
