//! A model's answers on prepared scans, by the scanner's own engine. No libtorch.
//!
//! Input: a [`Model`], a [`Dataset`], the scans. Output: each scan with its [`Inference`], in order, to a
//! closure. The `cpu`
//! backend computes them, so that what is measured here (maps, pooled features, logits) is what the daemon will see.

use half::f16;

use super::{Dataset, TrainError};
use crate::engine::{BackendKind, CancelToken, EngineOptions, Inference, prepare};
use crate::model::Model;

/// Checks that `data` is what `model` was made for: shape, preprocessing, classes.
///
/// # Errors
/// The first difference, in words.
pub fn check(model: &Model, data: &dyn Dataset) -> Result<(), TrainError> {
    let manifest = &model.manifest;
    let bad = |what: String| Err(TrainError::Data(format!("model {} {what}; prepare a cache for it", manifest.id)));
    if manifest.architecture.input_dhw != data.input_dhw() {
        return bad(format!("takes {:?}, the cache has {:?}", manifest.architecture.input_dhw, data.input_dhw()));
    }
    if manifest.preprocessing != *data.preprocessing() {
        return bad("wants another preprocessing than the cache has".to_owned());
    }
    if manifest.class_keys != data.class_names() {
        return bad("has other classes than the cache".to_owned());
    }
    Ok(())
}

/// Hears of one scan: its index, the network's input, what the network says.
pub type Take<'a> = dyn FnMut(usize, &[f32], &Inference) -> Result<(), TrainError> + 'a;

/// The scanner's view of `model`, on `threads` threads (0: one a core).
///
/// # Errors
/// A model that the backend does not take.
pub fn each(
    model: &Model,
    data: &dyn Dataset,
    indices: &[usize],
    threads: usize,
    take: &mut Take<'_>,
) -> Result<(), TrainError> {
    check(model, data)?;
    let failed = |e: crate::engine::EngineError| TrainError::Data(format!("model {}: {e}", model.manifest.id));
    let options = EngineOptions { threads, ..EngineOptions::default() };
    let backend = prepare(BackendKind::Cpu, model, &options).map_err(failed)?;
    let mut session = backend.session().map_err(failed)?;
    let (cancel, mut out) = (CancelToken::new(), Inference::default());
    let mut volume = Vec::new();
    for &index in indices {
        volume.clear();
        volume.extend(data.volume_f16(index).iter().map(|v: &f16| v.to_f32()));
        session.run(&volume, &cancel, &mut out).map_err(failed)?;
        take(index, &volume, &out)?;
    }
    Ok(())
}
