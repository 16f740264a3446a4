//! Inference backends behind one trait.
//!
//! Input: one volume `1 x D x H x W`, f32 in [0, 1]. Output: [`Inference`]. A backend prepares a model once; each
//! worker opens a session that owns its scratch.

use std::sync::atomic::{AtomicBool, Ordering};

/// What one run of the network yields.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Inference {
    /// One a class, before softmax.
    pub logits: Vec<f32>,
    /// Softmax of the logits.
    pub scores: Vec<f32>,
    /// Global average of the last feature map, one a channel.
    pub pooled: Vec<f32>,
    /// The last feature map, row-major C, D, H, W.
    pub feature_map: Vec<f32>,
    /// Shape of `feature_map`: C, D, H, W.
    pub feature_shape_cdhw: [usize; 4],
}

/// Set from another thread to stop a run between two steps of the network.
#[derive(Debug, Default)]
pub struct CancelToken(AtomicBool);

impl CancelToken {
    /// A token that is not set.
    pub const fn new() -> Self {
        Self(AtomicBool::new(false))
    }
    /// Asks the run to stop.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Release);
    }
    /// Whether the run is asked to stop.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}
