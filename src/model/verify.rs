//! The checks of `darnet model verify`.

use std::path::Path;

use serde::Serialize;

use super::{Model, ModelError};

/// Schema of [`VerifyReport`] as JSON.
pub const VERIFY_SCHEMA: &str = "darnet.model-verify/1";

/// What was checked on a model that passed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct VerifyReport {
    /// [`VERIFY_SCHEMA`].
    pub schema: &'static str,
    /// The model's id.
    pub id: String,
    /// SHA-256 of the weights, as in the manifest.
    pub sha256: String,
    /// Tensors found, each with its name, shape and finite values.
    pub tensors: usize,
    /// Trainable parameters.
    pub parameters: u64,
    /// What a person should know although nothing is wrong.
    pub remarks: Vec<String>,
}

/// Loads the model in `dir`, which checks all of it, and says what was checked.
///
/// # Errors
/// As [`Model::load`].
pub fn verify(dir: &Path) -> Result<VerifyReport, ModelError> {
    Ok(report(&Model::load(dir)?))
}

/// The report on a model that loaded.
pub fn report(model: &Model) -> VerifyReport {
    let m = &model.manifest;
    let mut remarks = Vec::new();
    if m.is_demo() {
        remarks.push(format!(
            "a demonstration model, trained on {}: its results say nothing about patients",
            m.trained_on
        ));
    }
    if m.calibration.is_none() {
        remarks.push("no calibration file: scores are uncalibrated".to_owned());
    }
    if m.scores.is_empty() {
        remarks.push("no measured scores".to_owned());
    }
    VerifyReport {
        schema: VERIFY_SCHEMA,
        id: m.id.clone(),
        sha256: model.sha256.clone(),
        tensors: model.weights.iter().count(),
        parameters: m.architecture.parameter_count(),
        remarks,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_embedded_model_passes_with_its_remark() {
        let report = report(&Model::embedded().unwrap());
        assert!(report.remarks[0].contains("demonstration"));
        assert!(report.tensors > 100);
    }

    #[test]
    fn a_damaged_folder_does_not_pass() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("m");
        Model::embedded().unwrap().save(&out).unwrap();
        assert!(verify(&out).is_ok());
        let weights = out.join("weights.safetensors");
        let mut bytes = std::fs::read(&weights).unwrap();
        bytes.truncate(bytes.len() / 2);
        std::fs::write(&weights, bytes).unwrap();
        assert!(matches!(verify(&out), Err(ModelError::Sha256 { .. })));
    }
}
