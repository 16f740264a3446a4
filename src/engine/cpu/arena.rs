//! All memory that one session uses, allocated when it opens.
//!
//! Three padded activations, each as large as the largest stage: a block's input (which also becomes its output), and
//! the outputs of its two convolutions. At full size (66 * 114 * 114 voxels * 64 channels * 4 B = 220 MB) that is
//! 659 MB. Besides them: partial sums for the pooling (64 planes * 14 blocks * 64 channels * 8 B = 0.5 MB) and the
//! attentions' vectors.

use super::kernels::Padded;
use super::plan::Plan;

/// A padded activation that remembers which shape's border is zero in it.
pub struct Buffer {
    data: Vec<f32>,
    shape: Option<Padded>,
}

impl Buffer {
    /// The whole buffer in `shape`, its border zero, its inside unspecified.
    pub fn writable(&mut self, shape: Padded) -> &mut [f32] {
        let data = &mut self.data[..shape.len()];
        if self.shape != Some(shape) {
            shape.zero_border(data);
            self.shape = Some(shape);
        }
        data
    }

    /// What was written.
    ///
    /// # Panics
    /// If it was last written in another shape.
    pub fn readable(&self, shape: Padded) -> &[f32] {
        assert_eq!(self.shape, Some(shape), "an activation keeps its shape");
        &self.data[..shape.len()]
    }
}

/// A session's memory.
pub struct Arena {
    /// A block's input and output, then its two convolutions' outputs.
    pub activations: [Buffer; 3],
    /// `[plane][block of rows][channel]` sums.
    pub sums: Vec<f64>,
    /// `[plane][channel]` means, then the attentions' factors.
    pub means: Vec<f32>,
    /// `[plane][channel]` factors of both attentions.
    pub scale: Vec<f32>,
    /// Input, hidden and output vectors of one attention.
    pub gate: [Vec<f32>; 3],
}

/// Lengths of an arena's parts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ArenaLengths {
    /// Floats of one activation.
    pub activation: usize,
    /// Partial sums.
    pub sums: usize,
    /// Planes times channels.
    pub planes: usize,
    /// Longest input of an attention.
    pub gate_ends: usize,
    /// Widest hidden layer of an attention.
    pub gate_hidden: usize,
}

impl ArenaLengths {
    /// Bytes of an arena.
    pub fn bytes(&self) -> usize {
        4 * (3 * self.activation + 2 * self.planes + 2 * self.gate_ends + self.gate_hidden) + 8 * self.sums
    }
}

impl Arena {
    /// An arena for every layer of `plan`.
    pub fn new(plan: &Plan) -> Self {
        let lengths = plan.arena_lengths();
        let buffer = || Buffer { data: vec![0.0; lengths.activation], shape: None };
        Self {
            activations: [buffer(), buffer(), buffer()],
            sums: vec![0.0; lengths.sums],
            means: vec![0.0; lengths.planes],
            scale: vec![0.0; lengths.planes],
            gate: [vec![0.0; lengths.gate_ends], vec![0.0; lengths.gate_hidden], vec![0.0; lengths.gate_ends]],
        }
    }
}
