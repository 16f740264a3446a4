//! The state of a run as one file: parameters, running statistics, optimiser, best weights, where in the run it was.
//!
//! Layout: safetensors, f32. Tensors `model.NAME` (parameters and running statistics), `mean.NAME` and `square.NAME`
//! (Adam), `best.NAME` (weights of the best epoch, if there is one); the metadata entry `darnet` is [`State`] as JSON.
//! Names and shapes are those of a weights file, so a checkpoint passes between devices and memory orders.
//!
//! A checkpoint replaces the one before by a rename after a sync: after `kill -9` or power loss there is a whole one.
//! All randomness of a run is a function of the seed, the epoch and the scan, so there is no generator to save.

use std::collections::HashMap;
use std::path::Path;

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::net::{Layout, Replica, Slot};
use super::optimiser::{Adam, Scaler};
use super::{TrainError, write_atomic};
use crate::model::{self, Weights};

/// Version of the layout.
pub const CHECKPOINT_SCHEMA: &str = "darnet.checkpoint/1";
/// The file's name in a run's folder.
pub const CHECKPOINT_FILE: &str = "checkpoint.safetensors";
/// Largest accepted checkpoint: four f32 copies of the largest accepted network are below 10 GB.
pub const MAX_CHECKPOINT_BYTES: u64 = 10_000_000_000;

const METADATA_KEY: &str = "darnet";

/// One finished epoch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EpochRow {
    /// Counted from 1.
    pub epoch: usize,
    /// Learning rate.
    pub learning_rate: f64,
    /// Mean cross-entropy over the training scans, as they were trained on.
    pub train_loss: f64,
    /// Share of training scans whose class was right.
    pub train_accuracy: f64,
    /// Mean cross-entropy over the validation scans.
    pub validation_loss: f64,
    /// Share of validation scans whose class is right.
    pub validation_accuracy: f64,
    /// Area under the ROC curve of COVID-19 against the rest on them.
    pub validation_auc: Option<f64>,
    /// Time for training, seconds.
    pub seconds: f64,
    /// Training scans a second.
    pub images_per_s: f64,
    /// Share of that time spent waiting for data.
    pub wait_share: f64,
}

/// The best epoch so far.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Counted from 1.
    pub epoch: usize,
    /// Its accuracy on the validation scans.
    pub accuracy: f64,
    /// Its loss there.
    pub loss: f64,
}

/// Where a run is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// [`CHECKPOINT_SCHEMA`].
    pub schema: String,
    /// What defines the run: options and data.
    pub run: serde_json::Value,
    /// Finished epochs.
    pub epochs: usize,
    /// Finished steps of the epoch after them.
    pub steps: usize,
    /// Finished steps of the whole run.
    pub global_steps: u64,
    /// Sum of the losses of the scans seen in the unfinished epoch.
    pub loss_sum: f64,
    /// Of them, how many were right.
    pub right: usize,
    /// How many were seen.
    pub seen: usize,
    /// Time spent in the unfinished epoch, seconds.
    pub seconds: f64,
    /// Of it, waiting for data.
    pub wait_seconds: f64,
    /// Steps of the optimiser; fewer than `global_steps` where overflow skipped some.
    pub adam_steps: u64,
    /// Scale of the loss.
    pub scaler: Scaler,
    /// Finished epochs, in order.
    pub history: Vec<EpochRow>,
    /// The best of them.
    pub best: Option<Best>,
}

impl State {
    /// The beginning of the run `run`.
    pub fn new(run: serde_json::Value) -> Self {
        Self {
            schema: CHECKPOINT_SCHEMA.to_owned(),
            run,
            epochs: 0,
            steps: 0,
            global_steps: 0,
            loss_sum: 0.0,
            right: 0,
            seen: 0,
            seconds: 0.0,
            wait_seconds: 0.0,
            adam_steps: 0,
            scaler: Scaler::default(),
            history: Vec::new(),
            best: None,
        }
    }
}

/// A checkpoint that was read.
pub struct Loaded {
    /// Where the run was.
    pub state: State,
    /// Parameters.
    pub flat: Tensor,
    /// Running statistics.
    pub buffers: Tensor,
    /// Adam's mean.
    pub mean: Tensor,
    /// Adam's mean of squares.
    pub square: Tensor,
    /// Weights of the best epoch.
    pub best: Option<Weights>,
}

/// Writes a checkpoint to `path`.
///
/// # Errors
/// A full disk, above all; the checkpoint before then stays.
pub fn save(
    path: &Path,
    layout: &Layout,
    state: &State,
    replica: &Replica,
    adam: &Adam,
    best: Option<&Weights>,
) -> Result<(), TrainError> {
    let bytes = |v: &[f32]| v.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let shape = |slot: &Slot| slot.shape.iter().map(|&n| n as usize).collect::<Vec<_>>();
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    let mut add = |prefix: &str, slots: &[Slot], values: Vec<Vec<f32>>| {
        for (slot, v) in slots.iter().zip(values) {
            tensors.push((format!("{prefix}.{}", slot.name), shape(slot), bytes(&v)));
        }
    };
    add("model", &layout.slots, layout.unpack_parameters(&replica.flat)?);
    add("model", &layout.buffers, layout.unpack_buffers(&replica.buffers)?);
    add("mean", &layout.slots, layout.unpack_parameters(&adam.mean)?);
    add("square", &layout.slots, layout.unpack_parameters(&adam.square)?);
    if let Some(best) = best {
        for (name, t) in best.iter() {
            tensors.push((format!("best.{name}"), t.shape.clone(), bytes(&t.data)));
        }
    }
    let bad = |reason: String| TrainError::Checkpoint { path: path.to_path_buf(), reason };
    let json = serde_json::to_string(state).map_err(|e| bad(e.to_string()))?;
    let views = tensors
        .iter()
        .map(|(name, shape, raw)| Ok((name.as_str(), TensorView::new(Dtype::F32, shape.clone(), raw)?)))
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()
        .map_err(|e| bad(e.to_string()))?;
    let metadata = HashMap::from([(METADATA_KEY.to_owned(), json)]);
    let file = safetensors::serialize(views, Some(metadata)).map_err(|e| bad(e.to_string()))?;
    write_atomic(path, &file)
}

/// Reads the checkpoint at `path`; none if there is no such file.
///
/// # Errors
/// A file that is no checkpoint of this layout.
pub fn load(path: &Path, layout: &Layout) -> Result<Option<Loaded>, TrainError> {
    let io = |source| TrainError::Io { action: "read", path: path.to_path_buf(), source };
    let bad = |reason: String| TrainError::Checkpoint { path: path.to_path_buf(), reason };
    let size = match std::fs::metadata(path) {
        Ok(meta) => meta.len(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(io(e)),
    };
    if size > MAX_CHECKPOINT_BYTES {
        return Err(bad(format!("expected at most {MAX_CHECKPOINT_BYTES} bytes, got {size}")));
    }
    let bytes = std::fs::read(path).map_err(io)?;
    let (_, metadata) = SafeTensors::read_metadata(&bytes).map_err(|e| bad(e.to_string()))?;
    let json = metadata.metadata().as_ref().and_then(|m| m.get(METADATA_KEY));
    let json = json.ok_or_else(|| bad("a safetensors file, but no checkpoint".to_owned()))?;
    let state: State = serde_json::from_str(json).map_err(|e| bad(e.to_string()))?;
    if state.schema != CHECKPOINT_SCHEMA {
        return Err(bad(format!("expected schema {CHECKPOINT_SCHEMA}, got {:?}", state.schema)));
    }
    let file = SafeTensors::deserialize(&bytes).map_err(|e| bad(e.to_string()))?;
    let values = |prefix: &str, slots: &[Slot]| -> Result<HashMap<String, Vec<f32>>, TrainError> {
        slots
            .iter()
            .map(|slot| {
                let name = format!("{prefix}.{}", slot.name);
                let view = file.tensor(&name).map_err(|e| bad(format!("{name}: {e}")))?;
                let shape: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
                if shape != slot.shape || view.dtype() != Dtype::F32 {
                    return Err(bad(format!("{name}: expected f32 {:?}, got {shape:?}", slot.shape)));
                }
                let data = view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
                Ok((slot.name.clone(), data))
            })
            .collect()
    };
    let parameters = |prefix: &str| {
        let found = values(prefix, &layout.slots)?;
        layout.pack_parameters(|name| found[name].clone())
    };
    let running = values("model", &layout.buffers)?;
    let best = if file.tensor("best.fc.weight").is_ok() {
        let mut all = values("best", &layout.slots)?;
        all.extend(values("best", &layout.buffers)?);
        let shapes: HashMap<&str, &Slot> =
            layout.slots.iter().chain(&layout.buffers).map(|s| (s.name.as_str(), s)).collect();
        Some(Weights::from_tensors(all.into_iter().map(|(name, data)| {
            let shape = shapes[name.as_str()].shape.iter().map(|&n| n as usize).collect();
            (name, model::Tensor { shape, data })
        })))
    } else {
        None
    };
    Ok(Some(Loaded {
        flat: parameters("model")?,
        buffers: layout.pack_buffers(|name| running[name].clone())?,
        mean: parameters("mean")?,
        square: parameters("square")?,
        best,
        state,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Architecture, synthetic};
    use crate::train::net::{Gradient, Piece};
    use tch::Device;

    #[test]
    fn a_checkpoint_survives_the_file_in_either_memory_order() {
        let architecture = Architecture { base_width: 2, input_dhw: [4, 16, 16], ..Architecture::full() };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(CHECKPOINT_FILE);
        let weights = synthetic::weights(&architecture, 1);
        let layout = Layout::new(&architecture, true).unwrap();
        assert!(load(&path, &layout).unwrap().is_none());
        let replica = Replica::of_weights(&layout, Device::Cpu, &weights).unwrap();
        let mut adam = Adam::new(layout.len(), Device::Cpu).unwrap();
        let gradient = Gradient(vec![Piece { offset: 0, values: &replica.flat * 0.5 }]);
        assert!(adam.step(&replica.flat.copy(), &gradient, 0.1).unwrap());
        let mut state = State::new(serde_json::json!({"a": 0.1}));
        state.loss_sum = 0.1 + 0.2;
        state.best = Some(Best { epoch: 3, accuracy: 1.0 / 3.0, loss: 0.7 });
        save(&path, &layout, &state, &replica, &adam, Some(&weights)).unwrap();

        let other = Layout::new(&architecture, false).unwrap();
        let back = load(&path, &other).unwrap().unwrap();
        assert_eq!(back.state, state);
        assert_eq!(back.best.unwrap(), weights);
        let again = Replica::new(&other, Device::Cpu, &back.flat, &back.buffers).unwrap();
        assert_eq!(again.weights(&other).unwrap(), weights);
        let squares = |l: &Layout, t: &Tensor| l.unpack_parameters(t).unwrap();
        let (a, b) = (squares(&layout, &adam.square), squares(&other, &back.square));
        for (i, slot) in layout.slots.iter().enumerate() {
            let j = other.slots.iter().position(|s| s.name == slot.name).unwrap();
            assert_eq!(a[i], b[j]);
        }
    }

    #[test]
    fn a_file_that_is_no_checkpoint_is_refused() {
        let architecture = Architecture { base_width: 2, input_dhw: [4, 16, 16], ..Architecture::full() };
        let layout = Layout::new(&architecture, false).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(CHECKPOINT_FILE);
        std::fs::write(&path, synthetic::weights(&architecture, 1).to_safetensors()).unwrap();
        let error = load(&path, &layout).err().unwrap().to_string();
        assert!(error.contains("no checkpoint"), "{error}");
        std::fs::write(&path, b"torn").unwrap();
        assert!(load(&path, &layout).is_err());
    }
}
