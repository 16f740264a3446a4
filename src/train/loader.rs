//! Batches, made on a thread of their own while the last one is trained on.
//!
//! Input: a data set and the scans of each batch. Output: half-precision tensors `N x D x H x W` with labels, in order, and
//! lesion masks of the same shape if asked for.
//! At most [`AHEAD`] batches wait. The thread ends when the receiver is dropped.

use std::thread::Scope;

use crossbeam_channel::{Receiver, bounded};
use half::f16;
use tch::{Device, Tensor};

use super::{Dataset, TrainError};
use crate::model::synthetic::Stream;

/// Batches that may lie ready: at full size 8 volumes are 51 MB in half precision, so 2 and the one in the making are
/// 154 MB, twice that while one is copied into a tensor, and twice again with lesion masks.
pub const AHEAD: usize = 2;

/// Scans to train on at once.
pub struct Batch {
    /// Which scans.
    pub indices: Vec<usize>,
    /// Their volumes, half precision, on the processor; pinned when a GPU is meant.
    pub volumes: Tensor,
    /// Their classes.
    pub labels: Vec<i64>,
    /// Their lesion masks in the volumes' shape, 1 on lesion, all 0 where there is none; half precision, like the volumes.
    /// None where they are not asked for.
    pub lesions: Option<Tensor>,
}

/// The order of `indices` in `epoch`, shuffled by `seed`.
pub fn shuffled(indices: &[usize], seed: u64, epoch: usize) -> Vec<usize> {
    let stream = Stream::new(seed, &format!("shuffle {epoch}"));
    let mut order = indices.to_vec();
    for i in (1..order.len()).rev() {
        order.swap(i, (stream.bits(i as u64) % (i as u64 + 1)) as usize);
    }
    order
}

/// One batch, with lesion masks or without.
///
/// # Errors
/// No memory.
pub fn load(data: &dyn Dataset, indices: &[usize], device: Device, lesions: bool) -> Result<Batch, TrainError> {
    let [d, h, w] = data.input_dhw().map(|n| n as i64);
    let voxels: usize = data.input_dhw().iter().product();
    let tensor = |values: &[f16]| -> Result<Tensor, TrainError> {
        let made = Tensor::f_from_slice(values)?.f_view([indices.len() as i64, d, h, w])?;
        Ok(if device.is_cuda() { made.f_internal_pin_memory(device)? } else { made })
    };
    let mut values = Vec::with_capacity(indices.len() * voxels);
    for &index in indices {
        values.extend_from_slice(data.volume_f16(index));
    }
    let volumes = tensor(&values)?;
    let lesions = if lesions {
        values.clear();
        for &index in indices {
            match data.mask(index) {
                Some(mask) => values.extend(mask.iter().map(|m| if *m > 0 { f16::ONE } else { f16::ZERO })),
                None => values.resize(values.len() + voxels, f16::ZERO),
            }
        }
        Some(tensor(&values)?)
    } else {
        None
    };
    let labels = indices.iter().map(|&i| data.class(i) as i64).collect();
    Ok(Batch { indices: indices.to_vec(), volumes, labels, lesions })
}

/// Starts the thread that makes the batches of `plan` for `device`.
pub fn prefetch<'scope, 'env>(
    scope: &'scope Scope<'scope, 'env>,
    data: &'env dyn Dataset,
    plan: Vec<Vec<usize>>,
    device: Device,
    lesions: bool,
) -> Receiver<Result<Batch, TrainError>> {
    let (sender, receiver) = bounded(AHEAD);
    scope.spawn(move || {
        for indices in plan {
            // A receiver that is gone wants no more.
            if sender.send(load(data, &indices, device, lesions)).is_err() {
                return;
            }
        }
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shuffle_keeps_every_scan_and_differs_by_epoch() {
        let indices: Vec<usize> = (10..60).collect();
        let a = shuffled(&indices, 1, 0);
        assert_ne!(a, indices);
        assert_ne!(a, shuffled(&indices, 1, 1));
        assert_eq!(a, shuffled(&indices, 1, 0));
        let mut sorted = a;
        sorted.sort_unstable();
        assert_eq!(sorted, indices);
    }
}
