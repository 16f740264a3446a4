//! Models and finished runs, judged.
//!
//! Input: folders of runs, models, or tables of predictions; for models also a data set and its scans. Output:
//! [`Judged`] rows for `report`.

use std::path::Path;

use tch::Device;

use super::fit::{MODEL_DIR, predict_with, read_summary};
use super::metrics::{self, Prediction};
use super::net::Precision;
use super::report::{Judged, read_predictions};
use super::{Dataset, TrainError};
use crate::model::Model;

/// `predictions` under `name`.
///
/// # Errors
/// Predictions that cannot be measured.
pub fn judged(name: &str, classes: &[String], predictions: Vec<Prediction>, seed: u64) -> Result<Judged, TrainError> {
    let evaluation =
        metrics::evaluate(&predictions, classes, seed).map_err(|e| TrainError::Data(format!("{name}: {e}")))?;
    Ok(Judged { name: name.to_owned(), predictions, evaluation })
}

/// The last part of a path, for the name of a row.
fn name_of(path: &Path) -> String {
    path.file_name().map_or_else(|| "model".to_owned(), |n| n.to_string_lossy().into_owned())
}

/// The finished run in `dir` on its own validation scans.
///
/// # Errors
/// A folder without a finished run.
pub fn of_run(dir: &Path, seed: u64) -> Result<Judged, TrainError> {
    if read_summary(dir)?.is_none() {
        return Err(TrainError::Data(format!("{} holds no finished run; run fit to its end", dir.display())));
    }
    let (classes, predictions) = read_predictions(&dir.join("validation.csv"))?;
    judged(&name_of(dir), &classes, predictions, seed)
}

/// The model of `dir`, which is a model's folder or a run's.
///
/// # Errors
/// No model there.
pub fn load_model(dir: &Path) -> Result<Model, TrainError> {
    let inner = dir.join(MODEL_DIR);
    let own = inner.join(crate::model::MANIFEST_FILE).exists();
    Ok(Model::load(if own { &inner } else { dir })?)
}

/// The model of `dir` on scans `indices` of `data`.
///
/// # Errors
/// No model there, another shape or preprocessing than the data's, or a device that fails.
pub fn of_model(
    dir: &Path,
    data: &dyn Dataset,
    indices: &[usize],
    device: Device,
    batch: usize,
    seed: u64,
) -> Result<Judged, TrainError> {
    let model = load_model(dir)?;
    if model.manifest.preprocessing != *data.preprocessing() {
        return Err(TrainError::Data(format!(
            "model {} wants another preprocessing than the cache has; prepare a cache for it",
            model.manifest.id
        )));
    }
    if model.manifest.class_keys != data.class_names() {
        return Err(TrainError::Data(format!("model {} has other classes than the cache", model.manifest.id)));
    }
    let predictions = predict_with(&model, data, indices, device, batch, Precision::Fp32)?;
    judged(&name_of(dir), data.class_names(), predictions, seed)
}
