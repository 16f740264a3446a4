//! From stored HU slices to the network's input.
//!
//! - Input: slices of HU (`i16`, stored order), their positions, the model's preprocessing.
//! - Output: `D x H x W` f32 in [0, 1], rows to posterior, columns to the patient's left, plane 0 at the end the
//!   manifest names.
//!
//! The filter is an anti-aliased separable triangle: its support grows with the down-sampling factor, pixel centres lie
//! at half-integers, weights are normalised at the edges. It is separable on purpose: a slice is windowed and resampled
//! in-plane when it arrives ([`cpu::in_plane`]), and the planes are gathered along depth ([`cpu::gather`]) when the
//! series is there.
//!
//! Invariants: every weight is computed in f64 and rounded once to f32; every sum runs in the order of oriented pixel or
//! ordered slice index, never in the order of arrival, and uses separate multiplications and additions. The result is
//! therefore the same to the bit for any arrival order, any number of threads and any processor.
//!
//! [`plan`] holds geometry and weights and touches no pixel; [`cpu`] applies them and allocates nothing; [`cuda`] applies
//! them on a GPU, with the same bits; [`lung`] is the check that what was scanned is a chest and that the crop keeps the
//! lungs; [`texture`] says how sharp and noisy the input is.
//!
//! Deliberately absent: interpolation between tilted planes out of their own plane (tilt is sheared out in-plane), any
//! intensity normalisation besides the window.

pub mod cpu;
pub mod cuda;
pub mod lung;
pub mod plan;
pub mod texture;

/// What is done with a part, by its number.
pub type PartWork<'a> = dyn Fn(usize, &mut [f32]) + Sync + 'a;
/// Does work with each part of some values, so many elements long (the last may be shorter), each once, perhaps on several
/// threads at a time.
pub type Share<'a> = dyn Fn(&mut [f32], usize, &PartWork<'_>) + 'a;

/// One part after the other.
pub fn alone(values: &mut [f32], len: usize, work: &PartWork<'_>) {
    for (i, part) in values.chunks_mut(len).enumerate() {
        work(i, part);
    }
}
